"""The files of the nine unseen sets of Table 2 as their authors lay them out, small."""

from __future__ import annotations

import json
import shutil

import torch
from PIL import Image

from elva_core.data import caption_sets
from elva_core.data.caption_sets import GENECIS, SETS, SUGARCREPE


def put(path, value):
    """A file with a value, a picture of a shade, a file that a function changes, or none any more (None)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if value is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif callable(value):
        value(data := json.loads(path.read_text()))
        path.write_text(json.dumps(data))
    elif isinstance(value, bytes | str):
        path.write_bytes(value if isinstance(value, bytes) else value.encode())
    elif path.suffix.lower() in (".jpg", ".png"):
        Image.new("RGB", (8, 8), (value, 80, 90)).save(path)
    elif path.suffix == ".pt":
        torch.save(value, path)
    else:
        path.write_text(json.dumps(value))


def shades(*names):
    return {name: shade for shade, name in enumerate(names)}


def compared(n, name):
    """A row of GeneCIS."""
    reference, target, *gallery = ({"val_image_id" if "object" in name else "image_id": 10 * n + i} for i in range(1, 5))
    return {"reference": reference, "target": target, "gallery": gallery, "condition": "blue"}


ASLEEP = {"reference_img_id": 5, "relative_caption": "is asleep"}
ROUNDS = [{"question": 0, "answer": 1}, {"question": 1, "answer": 0}]
DIALOGS = [{"image_id": i, "caption": "never used", "dialog": ROUNDS[:n]} for i, n in ((3, 2), (4, 1))]
GARMENTS = [["dress", ["is longer", "", "is red"], "A"], ["dress", ["has sleeves"], "B"]]
SAID = [{"json": {"caption": f"a cat {i}"}, "sop_data": {"negative-prompt": f"not, a cat, {i}"}} for i in range(3)]
FILES = {  # set -> its files as its authors publish them; the first has the rows that are queries
    "sharegpt4v": {"datas_for_validation.json": [{"image_name": f"{i}.jpg", "caption": f"a long caption {i}"} for i in range(3)]}
    | shades(*(f"val_data/{i}.jpg" for i in range(3))),
    "urban1k": {f"caption/{i}.txt": f"street {i}\nnever read" for i in (1, 2, 10)} | shades(*(f"image/{i}.jpg" for i in (1, 2, 10))),
    "flickr30k": {"flickr_text.json": [f"caption {j}" for j in range(10)]} | shades("images/0.png", "images/1.png"),
    "circo": {
        "annotations/val.json": [ASLEEP | {"id": 0, "target_img_id": 9, "gt_img_ids": [9, 11]}],
        "annotations/test.json": [ASLEEP | {"id": 0}, ASLEEP | {"id": 1, "reference_img_id": 7}],
        "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json": {
            "images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in (5, 7, 9, 11)]
        },
    }
    | shades(*(f"COCO2017_unlabeled/unlabeled2017/{i:012}.jpg" for i in (5, 7, 9, 11))),
    "genecis": {f"annotations/{name}.json": [compared(n, name)] for n, name in enumerate(GENECIS)}
    | shades(*(f"vg/{GENECIS[n]}/{10 * n + i + 1}_0_{i}.jpg" for n in (0, 1) for i in range(4)))
    | shades(*(f"val2017/{10 * n + i:012}.jpg" for n in (2, 3) for i in range(1, 5))),
    "visdial": {
        "visdial_1.0_val.json": {
            "data": {"questions": ["is it red", "is it big"], "answers": ["no", "yes"], "dialogs": DIALOGS}
        }
    }
    | shades(*(f"VisualDialog_val2018/VisualDialog_val2018_{i:012}.jpg" for i in (3, 4))),
    "mt_fashioniq": {
        "data/all.val.json": [{"target": ["dress", "C"], "reference": GARMENTS}],
        "image_splits/split.all.val.json": list("DCB"),
    }
    | shades(*(f"fashioniq_images/{name}.jpg" for name in "ABCD")),
    "ccneg": {
        "ccneg_preprocessed.pt": {
            "image_paths": [f"/workspace/datasets/cc3m/cc3m_subset/{i}.jpg" for i in range(3)],
            "annotations": SAID,
        }
    }
    | shades(*(f"cc3m_subset/{i}.jpg" for i in range(3))),
    "sugarcrepe": {
        f"data/{kind}.json": {
            str(i): {"filename": f"{i}.jpg", "caption": f"true {n} {i}", "negative_caption": f"false {n} {i}"} for i in range(1 + n % 2)
        }
        for n, kind in enumerate(SUGARCREPE)
    }
    | shades("val2017/0.jpg", "val2017/1.jpg"),
}  # fmt: skip


def build(folder, *names):
    """Sets in a folder of theirs each."""
    for name in names:
        for file, value in FILES[name].items():
            put(folder / SETS[name].folder / file, value)
    return folder


def load(sets, name, **how):
    return caption_sets.load(name, sets / SETS[name].folder, **how)
