"""Vectors and ranks: exact search, metrics, cached embeddings, units ranked against a pool."""


def __getattr__(name: str):
    """`retrieval.encode`, as model cards of the last version call it; it lives in retriever.py."""
    if name == "encode":
        from elva_core.retrieval.retriever import encode

        return encode
    raise AttributeError(name)
