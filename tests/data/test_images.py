"""Images of every orientation, depth and transparency are read as people see them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from elva_core.data import images
from elva_core.export import inputs
from elva_core.models import chat
from elva_core.mrbench import annotate, verify

# what an image with this orientation tag needs to stand upright: EXIF 2.32, 4.6.4
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def drawing() -> np.ndarray:
    """(4, 6, 3) blocks, all different."""
    return np.kron(np.arange(24 * 3).reshape(4, 6, 3) * 3, np.ones((16, 16, 1))).astype(np.uint8)


def tagged(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_every_orientation_of_every_format_stands_upright_from_file_and_from_memory(orientation, kind, tmp_path):
    path = tmp_path / f"p.{kind}"
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    Image.fromarray(drawing()).save(path, exif=tagged(orientation), **options)
    expected = TURNS[orientation](drawing()).astype(int)
    with Image.open(path) as lying:
        for image in (images.open_image(path), images.upright_rgb(lying)):
            assert image.mode == "RGB" and image.size == expected.shape[1::-1]
            assert np.abs(np.asarray(image).astype(int) - expected).max() <= (12 if kind == "jpg" else 0)
            assert image.getexif().get(0x0112, 1) == 1  # nobody turns it again


def sent(pixels: bytes | str) -> np.ndarray:
    """What a PNG holds, as bytes or in a data URL."""
    data = base64.b64decode(pixels.partition(",")[2]) if isinstance(pixels, str) else pixels
    return np.asarray(Image.open(io.BytesIO(data)))


def handed_in(image) -> np.ndarray:
    """What the model sees of an image that sentence-transformers or mteb hands over."""
    with inputs.items([("", image, "")]) as (item,):
        return np.asarray(images.open_image(item.image))


WAYS_IN = {
    "sentence-transformers, mteb: in memory": lambda path: handed_in(Image.open(path)),
    "sentence-transformers: path": lambda path: handed_in(str(path)),
    "verification and explorer": lambda path: sent(verify.thumbnail(path)),
    "annotator behind a server": lambda path: sent(annotate._data_url(path)["image_url"]["url"]),
    "models of other families": lambda path: np.asarray(chat.pictures(path)[0]),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("way", WAYS_IN)
def test_every_way_in_sees_an_image_upright(way, orientation, tmp_path):
    Image.fromarray(drawing()).save(tmp_path / "p.png", exif=tagged(orientation))
    assert np.array_equal(WAYS_IN[way](tmp_path / "p.png"), TURNS[orientation](drawing()))


def test_a_broken_exif_block_does_not_refuse_the_picture(tmp_path):
    Image.fromarray(drawing()).save(tmp_path / "p.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken")
    Image.fromarray(drawing()).save(tmp_path / "p.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff")
    for name in ("p.png", "p.jpg"):
        assert images.open_image(tmp_path / name).size == (96, 64)


def ramp(top: float, kind: str) -> np.ndarray:
    return np.tile(np.linspace(0, top, 256).astype(kind), (8, 1))


@pytest.mark.parametrize(("top", "kind"), [(65535, "<u2"), (65535, ">u2"), (65535, "<i4"), (255, "<i4"), (1, "<f4"), (255, "<f4")])
def test_a_deep_grey_ramp_keeps_256_levels_from_black_to_white(top, kind, tmp_path):
    image = Image.fromarray(ramp(top, kind))
    ways = [images.upright_rgb(image)]
    if top == 65535:
        image.convert("I;16" if image.mode == "I" else image.mode).save(tmp_path / "g.png")
        ways.append(images.open_image(tmp_path / "g.png"))
    assert image.mode in images.DEEP
    for rgb in map(np.asarray, ways):
        assert len(np.unique(rgb)) == 256 and rgb[0, [0, -1], 0].tolist() == [0, 255]


def test_a_dark_file_of_sixteen_bits_stays_dark(tmp_path):
    Image.fromarray(ramp(200, "<u2")).save(tmp_path / "dark.png")
    assert np.asarray(images.open_image(tmp_path / "dark.png")).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_what_is_transparent_is_white_and_what_is_opaque_stays(mode):
    layer = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    layer.paste((51, 51, 51, 255), (2, 0, 4, 2))
    way = {"La": ["LA", "La"], "LA": ["LA"], "RGBa": ["RGBa"], "RGBA": []}
    image = layer
    for step in way.get(mode, []):
        image = image.convert(step)
    if mode == "PA":
        image = layer.convert("RGB").convert("P").convert("PA")
        image.putalpha(layer.getchannel("A"))
    assert image.mode == mode
    seen = np.asarray(images.upright_rgb(image))
    assert (seen[:, :2] == 255).all() and (np.abs(seen[:, 2:].astype(int) - 51) <= 1).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "I;16"])
def test_a_transparent_colour_of_a_png_is_white(mode, tmp_path):
    image = (
        Image.fromarray(np.array([[0, 40 * 257]], "<u2"))
        if mode == "I;16"
        else Image.fromarray(np.array([[0, 40]], np.uint8)).convert(mode)
    )
    image.save(tmp_path / "t.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    with Image.open(tmp_path / "t.png") as lying:
        for seen in (images.open_image(tmp_path / "t.png"), images.upright_rgb(lying)):
            assert seen.getpixel((0, 0)) == (255, 255, 255)
            assert mode == "1" or seen.getpixel((1, 0)) == (40, 40, 40)


@given(st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "La", "RGBa"]), st.integers(0, 8), st.data())
def test_any_mode_and_orientation_gives_rgb_of_the_upright_size(mode, orientation, data):
    width, height = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    source = Image.new("RGBA", (width, height), (200, 100, 50, 128))
    image = source.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode if mode in ("RGBA", "LA") else "RGB"))
    image = image.convert(mode)
    image.getexif()[0x0112] = orientation
    turned = images.upright_rgb(image)
    assert turned.mode == "RGB"
    assert turned.size == ((height, width) if orientation in (5, 6, 7, 8) else (width, height))
