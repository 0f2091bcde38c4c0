"""Model card of a small backbone: what it was taught from, how, how well it reads, out of teaching.json."""

from __future__ import annotations

import json
from pathlib import Path

from elva_core.files import write_whole
from elva_core.tables import markdown_rows

FAMILY = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL"}
VENDORS = {
    "Appl": "Apple",
    "FB": "Facebook",
    "Goog": "Noto Emoji (Google)",
    "Joy": "JoyPixels",
    "Sams": "Samsung",
    "Twtr": "Twemoji (Twitter)",
    "Wind": "Windows",
}
CARD = """# A small {family} that reads drawings of emoji

{sizes[layers]} layers of width {sizes[hidden]}; \
a tower of {sizes[vision_layers]} layers of width {sizes[vision_hidden]};
images of {sizes[image_side]} x {sizes[image_side]} pixels; float16.
It plays the part of a pretrained model in the ELVA workbook, whose stages 1 to 3 start from it. It knows the
names of emoji and nothing else.

* Made by: {made[made_by]}. Weights: sha256 {made[sha256]}.
* Drawings that it saw; none is in this folder:
{drawings}
* Names: the package emoji (Unicode CLDR), in English and the language of the profile {profile}.
* {start}. First the tower: the grains of a drawing by a linear readout, {tower[steps]:,} steps of
  {tower[batch]:,} drawings. Then tower and language model: captions of drawings, texts and both in turns,
  {made[joint_steps]:,} steps of {joint[batch]:,}. Muon for matrices inside the layers, AdamW for the rest;
  each drawing is turned, sheared, recoloured, blurred or sharpened anew each time.

How well it reads, by greedy summaries of drawings that it has not seen:

{reading}
"""
COLUMNS = {"drawings": "drawings", "exact": "exact summary", "new": "exact, unseen compositions"}


def write(folder: Path) -> None:
    """Writes README.md of a folder of `teach.make`; its numbers are those of the folder's teaching.json."""
    made = json.loads((folder / "teaching.json").read_text(encoding="utf-8"))
    settings, sizes = made["settings"], made["settings"]["sizes"]
    shown = [f"{VENDORS.get(v, v)}, all rights with its owner" for v in settings["vendors"]]
    shown += [
        f"{name} {style['version']} (npm, @iconify-json), {style['licence']}: {style['drawings']:,} drawings"
        for name, style in made["styles"].items()
    ]
    kinds = [key for key in next(iter(made["reading"].values())) if key not in COLUMNS]
    names = COLUMNS | {kind: f"{kind} named" for kind in kinds}
    table = []
    for vendor, values in made["reading"].items():
        shares = [f"{100 * values[key]:.1f} %" if key in values else "" for key in names if key != "drawings"]
        table.append([VENDORS.get(vendor, vendor), f"{values['drawings']:,}", *shares])
    start = "Random weights"
    if settings["first"]:
        start = f"The weights of {settings['first']} where name and shape agree, the others random"
    card = CARD.format(
        family=FAMILY[sizes["architecture"]],
        made=made,
        start=start,
        drawings="\n".join(f"  * {line}" for line in shown),
        reading=markdown_rows(["vendor", *names.values()], table),
        **settings,
    )
    write_whole(folder / "README.md", card)
