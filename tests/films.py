"""Small films for tests of clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from elva_core.data import frames as clips


def pictures(count: int, *, seed: int = 0, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    """Frames that differ in colour and in a gradient."""
    width, height = size
    rng, ramp = np.random.default_rng(seed), np.linspace(0, 1, width)[None, :, None] * np.ones((height, 1, 1))
    return [Image.fromarray((255 * ramp * rng.random(3)).astype(np.uint8)) for _ in range(count)]


def film(path: Path, shown: list[Image.Image], rate: int = 8) -> Path:
    clips.write(path, shown, rate=rate)
    return path
