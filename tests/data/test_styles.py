"""Open drawings from npm packages: which icon is which emoji, and what is left out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from elva_core.data import images, styles
from elva_core.files import ElvaDataError

RUNNER, KEYCAP, MEDAL = "U+1F3C3-U+1F3FB", "U+0023-U+FE0F-U+20E3", "U+1F947"


def package(folder, style, icons, chars, **more):
    place = folder / "@iconify-json" / style
    place.mkdir(parents=True)
    for name, value in {"icons": {"icons": icons, "width": 10, "height": 10, **more}, "chars": chars}.items():
        (place / f"{name}.json").write_text(json.dumps(value))


def square(colour):
    return {"body": f'<path fill="{colour}" d="M0 0h10v10h-10z"/>'}


def colours(paths):
    return {p.stem: tuple(np.asarray(images.open_image(p))[4, 4].tolist()) for p in paths}


def test_icons_are_matched_by_code_points_whatever_selector_is_written(tmp_path):
    icons = {"runner": square("#f00"), "hash": square("currentColor"), "unknown": square("#00f"), "medal": square("#0f0") | {"width": 4}}
    chars = {"1f3c3-1f3fb": "runner", "23-20e3": "hash", "1f4a9": "unknown"}
    package(tmp_path, "a", icons, chars)
    paths = styles.render(tmp_path, "a", [RUNNER, KEYCAP, MEDAL], tmp_path / "out", side=8)
    assert colours(paths) == {RUNNER: (255, 0, 0), KEYCAP: (0x22, 0x22, 0x22)}
    assert images.open_image(paths[0]).size == (8, 8)


def test_without_code_points_the_english_name_decides_and_mirrored_aliases_are_left_out(tmp_path):
    aliases = {"person-running-light-skin-tone": {"parent": "red"}, "keycap": {"parent": "red", "hFlip": True}}
    icons = {"red": square("#f00"), "1stPlaceMedal": square("#0f0"), "thumbsup": square("#00f")}  # the last by a shorter name
    package(tmp_path, "b", icons, {}, aliases=aliases)
    paths = styles.render(tmp_path, "b", [RUNNER, KEYCAP, MEDAL, "U+1F44D"], tmp_path / "out", side=8)
    assert colours(paths) == {RUNNER: (255, 0, 0), MEDAL: (0, 255, 0), "U+1F44D": (0, 0, 255)}


def test_a_broken_icon_is_named(tmp_path):
    package(tmp_path, "c", {"medal": {"body": "<path"}}, {"1f947": "medal"})
    with pytest.raises(ElvaDataError, match="c: icon medal cannot be rendered"):
        styles.render(tmp_path, "c", [MEDAL], tmp_path / "out", side=8)
