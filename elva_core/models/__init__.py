"""A vision-language model as an embedder: prompts, encoding, generation, and small models of the real classes."""
