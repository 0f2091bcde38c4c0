"""Drawings of emoji in open styles, from the npm packages @iconify-json/<style>, as PNG files.

    paths = render(Path("node_modules"), "openmoji", ["U+1F3C3"], folder, side=72)

A style's icons are matched by code points, or by English name where its package has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

import emoji as unicode_names

from elva_core.files import ElvaDataError, whole

CODE_POINTS = {"fluent-emoji": "fluent-emoji-flat"}  # has no code points of its own, but the same names


def render(packages: Path, style: str, codes: Collection[str], folder: Path, *, side: int) -> list[Path]:
    """Writes {codes}.png, side x side pixels, for the emoji that the style draws; those that are there stay.

    Args:
        packages: a node_modules folder. codes: as in file names, "U+1F3C3-U+1F3FB".

    Raises:
        ElvaDataError: a package is missing, or one of its drawings cannot be rendered.
    """
    import resvg_py

    icons = _read(packages, style, "icons.json")
    drawings, paths = icons["icons"], []
    # an alias that is turned or mirrored is another drawing, and left out
    aliases = {name: a["parent"] for name, a in icons.get("aliases", {}).items() if set(a) == {"parent"}}
    for code, name in sorted(_matched(packages, style, codes, [*drawings, *aliases]).items()):
        if (icon := drawings.get(aliases.get(name, name))) is None:
            continue
        left, top, width, height = ({**icons, **icon}.get(key, default) for key, default in BOX.items())
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{side}" height="{side}">'
            f"{icon['body'].replace('currentColor', '#222')}</svg>"
        )
        path = folder / f"{code}.png"
        if not path.is_file():
            try:
                png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
            except ValueError as error:
                raise ElvaDataError(f"{style}: icon {name} cannot be rendered: {error}") from None
            with whole(path) as partial:
                partial.write_bytes(png)
        paths.append(path)
    return paths


BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # of an icon, by Iconify's format


def about(packages: Path, style: str) -> dict[str, str]:
    """Version and licence of a style, as its package says."""
    info = _read(packages, style, "info.json")
    return {"version": _read(packages, style, "package.json")["version"], "licence": info["license"]["title"]}


def _read(packages: Path, style: str, name: str) -> dict:
    path = packages / "@iconify-json" / style / name
    if not path.is_file():
        raise ElvaDataError(f"{path} is missing; run: npm install @iconify-json/{style}")
    return json.loads(path.read_text(encoding="utf-8"))


def _matched(packages: Path, style: str, codes: Collection[str], icons: Collection[str]) -> dict[str, str]:
    """Our code points -> name of the icon."""
    if listed := _read(packages, CODE_POINTS.get(style, style), "chars.json"):
        ours = {_plain(code): code for code in codes}
        return {ours[_plain(c)]: name for c, name in listed.items() if _plain(c) in ours}
    wanted, english = set(codes), {}
    for characters, entry in unicode_names.EMOJI_DATA.items():
        code = "-".join(f"U+{ord(c):04X}" for c in characters)
        for name in (entry["en"], *entry.get("alias", ())) if code in wanted else ():
            english.setdefault(_letters(name), code)
    return {english[_letters(icon)]: icon for icon in icons if _letters(icon) in english}


def _plain(codes: str) -> str:
    """Code points without the variation selector, which not every package writes."""
    parts = codes.lower().replace("u+", "").split("-")
    return "-".join(part.lstrip("0") for part in parts if part != "fe0f")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
