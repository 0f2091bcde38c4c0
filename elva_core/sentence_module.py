"""The module of sentence-transformers that exported folders name; lives in elva_core/export/embedder.py."""

from elva_core.export.embedder import Embedder, load

__all__ = ["Embedder", "load"]
