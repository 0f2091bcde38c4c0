"""Models and vectors for other libraries: the hub, sentence-transformers, mteb, FAISS."""
