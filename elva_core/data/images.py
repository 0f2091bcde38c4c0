"""Images: one way from a file or a PIL image to upright RGB, with guards of size and aspect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from elva_core.files import ElvaDataError

MAX_ASPECT = 200  # Qwen2-VL's processor refuses more; M-BEIR holds images 51,200 px wide
MAX_PIXELS = 64_000_000
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no format whose decoder starts another program
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # greys of more than eight bits


def guard_size(what: str, width: int, height: int) -> None:
    """Raises ElvaDataError where an image or a frame is too large, or too elongated. what: names the file."""
    if max(width, height) > MAX_ASPECT * min(width, height) or width * height > MAX_PIXELS:
        raise ElvaDataError(
            f"{what} is {width}x{height}; crop it below {MAX_PIXELS:,} pixels and aspect {MAX_ASPECT}"
        )


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """The block's errors as ElvaDataError: missing, or cannot be decoded. what: names the file."""
    try:
        yield
    except ElvaDataError:
        raise
    except FileNotFoundError:
        raise ElvaDataError(f"{what} is missing; restore the file or drop the record") from None
    except Exception as error:  # a decoder given random bytes raises whatever its parser stumbles over
        raise ElvaDataError(f"{what} cannot be decoded ({error}); replace the file") from None


def open_image(path: Path) -> Image.Image:
    """An upright RGB image, decoded in full (`upright_rgb`).

    Raises:
        ElvaDataError: missing, truncated, not an image, too large, or too elongated.
    """
    with _opened(path) as image:
        return upright_rgb(image)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width as the header has them, before the image is turned upright; errors of `open_image`."""
    with _opened(path) as image:
        return image.height, image.width


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with decoding(f"image {path}"), Image.open(path, formats=IMAGE_FORMATS) as image:
        guard_size(f"image {path}", *image.size)
        yield image


def upright_rgb(image: Image.Image) -> Image.Image:
    """A copy as 8-bit RGB: turned as its EXIF orientation says, deep greys scaled, transparency white."""
    image.load()
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block is no reason to refuse the picture
        upright = image
    if upright.mode in DEEP:
        upright = _eight_bits(upright)
    if upright.mode == "RGB" and "transparency" not in upright.info:
        return upright.copy()
    if upright.mode == "La":  # premultiplied; PIL takes it to RGBA in two steps only
        upright = upright.convert("LA")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep greys as L, or as LA where one grey value is transparent.

    16 bits fill 0 to 65,535. Modes I and F say no range: I holds eight bits if nothing exceeds 255, else
    sixteen; F holds 0 to 1 if nothing exceeds 1, else 0 to 255, as PIL's own conversions have it.
    """
    values = np.asarray(image).astype(np.float64)
    highest = values.max(initial=0)
    top = 65_535 if image.mode.startswith("I;") or (image.mode == "I" and highest > 255) else 255
    if image.mode == "F" and highest <= 1:
        top = 1
    grey = np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(grey)
    opaque = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([grey, opaque]), "LA")
