"""Images on disk: opening them safely, with guards of size and aspect."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from elva_core.files import ElvaDataError

MAX_ASPECT = 200  # Qwen2-VL's processor refuses more; M-BEIR holds images 51,200 px wide
MAX_PIXELS = 64_000_000
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no format whose decoder starts another program


def guard_size(what: str, width: int, height: int) -> None:
    """Raises ElvaDataError where an image or a frame is too large, or too elongated. what: names the file."""
    if max(width, height) > MAX_ASPECT * min(width, height) or width * height > MAX_PIXELS:
        raise ElvaDataError(
            f"{what} is {width}x{height}; crop it below {MAX_PIXELS:,} pixels and aspect {MAX_ASPECT}"
        )


def open_image(path: Path) -> Image.Image:
    """An RGB image, decoded in full; transparency becomes white.

    Raises:
        ElvaDataError: missing, truncated, not an image, too large, or too elongated.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            guard_size(f"image {path}", *image.size)
            if image.mode == "RGB":
                return image.copy()
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except ElvaDataError:
        raise
    except FileNotFoundError:
        raise ElvaDataError(f"image {path} is missing; restore the file or drop the record") from None
    except Exception as error:  # a decoder given random bytes raises whatever its parser stumbles over
        raise ElvaDataError(f"image {path} cannot be decoded ({error}); replace the file") from None
