"""Evaluation sets made of the embedded emoji: captions that no stage saw, and short clips.

They are written in the layouts of ShareGPT4V, CC-Neg and SugarCrepe, and of MSR-VTT.

write_unseen(emojis, folder, settings.data.emoji, settings.unseen)
write_clips(emojis, folder, settings.video, vendor="Twtr", seed=17)
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from elva_core.config import EmojiSettings, UnseenSettings, VideoSettings
from elva_core.data import emoji, frames, mbeir
from elva_core.data.caption_sets import SUGARCREPE
from elva_core.data.emoji import Emoji
from elva_core.data.images import open_image

TONES = tuple(f"{shade} skin tone" for shade in ("light", "medium-light", "medium", "medium-dark", "dark"))
_ONE_TONE = re.compile("|".join(TONES))
_TWO = re.compile(r"\b(woman)( and | )(man)\b")
PARTNER = {"man": "woman", "woman": "man", "boy": "girl", "girl": "boy"}
COMPOSITIONS = ("seen composition", "unseen composition")
SIDE = 96  # pixels of a clip; the small backbone sees 72
# word for a motion -> turn in degrees, size, and shift in sides at a time from 0 to 1
MOTIONS: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "still": lambda t: (0, 1, 0),
    "rotating": lambda t: (360 * t, 1, 0),
    "growing": lambda t: (0, 0.4 + 0.6 * t, 0),
    "sliding": lambda t: (0, 1, 0.8 * (t - 0.5)),
}


def write_clips(
    emojis: Sequence[Emoji], folder: Path, video: VideoSettings, *, vendor: str, seed: int
) -> None:
    """Short clips of multi-grain emoji, one folder in MSR-VTT's layout for each motion.

    All folders show the same emoji.

    Args:
        video: drawings, as many emoji are drawn by `seed`, which also says which way each turns or slides;
            length, frames; rate, frames per second.
    """
    rng = random.Random(mbeir.stable_hash(seed, "clips"))
    known = [e for e in emojis if e.multi_grain]
    chosen = rng.sample(known, min(video.drawings, len(known)))
    signs = [rng.choice((-1, 1)) for _ in chosen]
    for word, motion in MOTIONS.items():
        rows = [(f"ret{i}", f"msr{i}", f"video{i}", e.name) for i, e in enumerate(chosen)]
        for (_, _, name, _), e, sign in zip(rows, chosen, signs, strict=True):
            picture = open_image(emoji.image_folder() / vendor / f"{e.codes}.png")
            drawing = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            film = [_moved(drawing, sign, *motion((i + 0.5) / video.length)) for i in range(video.length)]
            frames.write(folder / word / "videos" / f"{name}.mp4", film, rate=video.rate)
        table = pd.DataFrame(rows, columns=["key", "vid_key", "video_id", "sentence"])
        table.to_csv(folder / word / "MSRVTT_JSFUSION_test.csv", index=False)


def _moved(drawing: Image.Image, sign: int, turn: float, size: float, shift: float) -> Image.Image:
    """A frame on white: the drawing in another size, turned about its middle, moved to the side."""
    small = drawing.resize((round(size * SIDE), round(size * SIDE)), Image.Resampling.BILINEAR)
    if turn:
        small = small.rotate(sign * turn, Image.Resampling.BILINEAR, fillcolor="white")
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(small, ((SIDE - small.width) // 2 + round(sign * shift * SIDE), (SIDE - small.height) // 2))
    return canvas


def write_unseen(
    emojis: Sequence[Emoji], folder: Path, data: EmojiSettings, asked: UnseenSettings
) -> dict[str, tuple[str, str]]:
    """Sets that no stage saw, as files in the layouts of ShareGPT4V, CC-Neg and SugarCrepe.

    Args:
        emojis: of the root; compositions held out of training are told from the others in the key `group`.
        data: of the root; its vendors have drawings that were trained on, and that were not, its language is
            the second one of training.
        asked: language, one that no stage trains on; queries of each row, or as many as there are.

    Returns:
        set -> (question that it answers, format of its files); the set's folder has its name.
    """
    trained, new = data.vendors["train"][0], data.vendors["test"][0]
    languages, queries = (data.language, asked.language), asked.queries
    names = {"en": {e.codes: e.name for e in emojis}}
    names |= {language: {e.codes: e.translation for e in emoji.load(language)} for language in languages}
    shared = emoji.shared_drawings(new, data.vendors["train"])
    # a caption must name one emoji only, in every language, and no training vendor may have its drawing
    counts = {language: Counter(texts.values()) for language, texts in names.items()}
    unique = [
        e
        for e in emojis
        if e.multi_grain
        and e.codes not in shared
        and all(counts[language][texts[e.codes]] == 1 for language, texts in names.items())
    ]
    held_out = emoji.held_out(emojis, data.held_out_share)
    by_group = {
        group: _drawn([e for e in unique if (e.codes in held_out) == (group == COMPOSITIONS[1])], queries)
        for group in COMPOSITIONS
    }
    # names against drawings: another vendor, another language
    sets = {"trained vendor": ("vendor", trained, "en"), "unseen vendor": ("vendor", new, "en")}
    sets |= {f"names in {language}": ("language", new, language) for language in languages}
    drawings = [e for rows in by_group.values() for e in rows]
    for name, (question, vendor, language) in sets.items():
        records = [
            {"image_name": f"{e.codes}.png", "caption": names[language][e.codes]}
            | ({"group": group} if question == "vendor" else {})
            for group, rows in by_group.items()
            for e in rows
        ]
        _write_set(folder / name, "val_data", vendor, drawings, {"datas_for_validation.json": records})
    # true captions against false ones
    _write_negations(folder / "negation", new, _drawn(unique, queries))
    replaced = replaced_captions(emoji.load(languages[0]))
    false = {kind: _drawn(rows, queries, by=lambda row: row[0]) for kind, rows in replaced.items()}
    tables = {
        f"data/{kind}.json": {
            str(i): {"filename": f"{e.codes}.png", "caption": e.name, "negative_caption": untrue}
            for i, (e, untrue) in enumerate(rows)
        }
        for kind, rows in false.items()
    }
    drawings = [e for rows in false.values() for e, _ in rows]
    _write_set(folder / "composition", "val2017", new, drawings, tables)
    questions = {name: (question, "sharegpt4v") for name, (question, _, _) in sets.items()}
    return questions | {"negation": ("captions", "ccneg"), "composition": ("captions", "sugarcrepe")}


def _differs_in(e: Emoji, kind: str) -> str:
    """SugarCrepe's word for a grain: object, relation (what somebody does) or attribute."""
    if kind in ("tone", "hair"):
        return "att"
    return "rel" if kind == "what" and "who" in e.grains else "obj"


def replaced_captions(emojis: Sequence[Emoji]) -> dict[str, list[tuple[Emoji, str]]]:
    """SugarCrepe's seven kinds by grain algebra: kind -> emoji with a caption that is false in one thing.

    obj is who, or what there is if there is nobody; rel is what somebody does; att is skin tone and hair. Two
    people with two skin tones swap tones, or swap places. A false caption is the name of another emoji where
    one exists.
    """
    near, names = emoji.twins(emojis), {e.name for e in emojis}
    out: dict[str, list[tuple[Emoji, str]]] = {kind: [] for kind in SUGARCREPE}
    for e in emojis:
        # replace: a twin that differs in this grain
        for kind, _ in e.segments:
            others = [t for t in near[e.codes] if t.grains[kind] != e.grains[kind]]
            if others:
                other = others[mbeir.stable_hash("replace", e.codes, kind) % len(others)]
                out[f"replace_{_differs_in(e, kind)}"].append((e, other.name))
        # add: a skin tone, or a second person
        toned = [name for tone in TONES if (name := f"{e.name} {tone}") in names]
        if toned and "tone" not in e.grains:
            out["add_att"].append((e, toned[mbeir.stable_hash("add", e.codes) % len(toned)]))
        if (who := e.grains.get("who")) in PARTNER:
            out["add_obj"].append((e, e.name.replace(who, f"{who} and {PARTNER[who]}", 1)))
        # swap: the tones of two people, or the people
        tones = _ONE_TONE.findall(e.name)
        swapped = e.name.replace(" ".join(tones), " ".join(tones[::-1])) if len(tones) == 2 else e.name
        if swapped in names and swapped != e.name:
            out["swap_att"].append((e, swapped))
            if two := _TWO.search(e.name):
                out["swap_obj"].append((e, e.name.replace(two.group(), f"{two[3]}{two[2]}{two[1]}")))
    return out


def _drawn(rows: Sequence, count: int, by: Callable[..., Emoji] = lambda e: e) -> list:
    """`count` rows, the same emoji in every set that can have them, so that sets compare the same drawings.

    by: the emoji of a row.
    """
    return sorted(rows, key=lambda row: mbeir.stable_hash("unseen", by(row).codes))[:count]


def _write_set(
    folder: Path, images: str, vendor: str, emojis: Sequence[Emoji], tables: Mapping[str, object]
) -> None:
    emoji.copy_drawings(vendor, emojis, folder / images)
    for name, table in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(table), encoding="ascii")


def _write_negations(folder: Path, vendor: str, emojis: Sequence[Emoji]) -> None:
    """Each name against itself with "not" before one of its grains."""
    rows = []
    for e in emojis:
        denied = mbeir.stable_hash("negation", e.codes) % len(e.segments)
        false = " ".join(f"not {text}" if i == denied else text for i, (_, text) in enumerate(e.segments))
        rows.append({"json": {"caption": e.name}, "sop_data": {"negative-prompt": false}})
    _write_set(folder, "images", vendor, emojis, {})
    paths = [f"images/{e.codes}.png" for e in emojis]
    torch.save({"image_paths": paths, "annotations": rows}, folder / "ccneg_preprocessed.pt")
