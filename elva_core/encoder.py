"""The embedder; lives in elva_core/models/encoder.py. Folders exported before name this place."""

from elva_core.data.items import Item
from elva_core.models.encoder import Encoder, add_ret_token, load
from elva_core.models.lineage import lineage

__all__ = ["Encoder", "Item", "add_ret_token", "lineage", "load"]
