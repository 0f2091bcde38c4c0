"""Vectors and ranks: exact search, metrics, cached embeddings, positives of a unit ranked against a pool."""
