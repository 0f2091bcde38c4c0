"""Vectors and ranks: exact search, metrics, cached embeddings, and the positives of a unit ranked against a pool."""
