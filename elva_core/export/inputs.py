"""Items made of other libraries' inputs: a text, an image in memory or in a file, or both.

with inputs.items([("A dog.", None, ""), ("Find it.", photograph, "Find it.")]) as items:
    vectors, _ = retriever.encode(encoder, items, batch=2)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from elva_core.data.images import upright_rgb
from elva_core.data.items import Item

Picture = Image.Image | Path | str


@contextmanager
def items(pairs: Sequence[tuple[str, Picture | None, str]]) -> Iterator[list[Item]]:
    """Items of texts, images, and instructions with which the texts begin.

    Images in memory lie in a temporary folder meanwhile, as upright RGB.

    Raises:
        ValueError: a text or an image of another type, or the address of a web page: nothing is downloaded.
    """
    with TemporaryDirectory(prefix="elva-") as folder:
        made = []
        for n, (text, image, instruction) in enumerate(pairs):
            if not isinstance(text, str):
                raise ValueError(f"a text is {type(text).__name__}; pass a string")
            made.append(Item(text, _file(image, Path(folder) / f"{n}.png"), instruction=instruction))
        yield made


def _file(image: object, path: Path) -> Path | None:
    if image is None:
        return None
    if isinstance(image, Image.Image):
        upright_rgb(image).save(path, compress_level=1)
        return path
    if not isinstance(image, str | Path) or str(image).startswith(("http://", "https://", "data:")):
        name, kind = str(image)[:80], type(image).__name__
        raise ValueError(f"an image is {name!r} ({kind}); pass a PIL image or the path of a file")
    return Path(image)
