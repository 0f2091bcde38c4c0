"""A vision-language model as an embedder: prompts, encoding, generation, small models of the real classes."""
