"""An encoder for mteb's tasks; lives in elva_core/export/mteb_encoder.py."""

from elva_core.export.mteb_encoder import MtebEncoder

__all__ = ["MtebEncoder"]
