"""The nine unseen sets of the paper's Table 2, read from the files that their authors publish.

A set becomes tasks: queries and candidates as items, and which candidates are right. Reading is strict, or
goes on and keeps what it found wrong; both ways run the same lines.

    for task in load("sugarcrepe", Path("data/unseen/sugar-crepe")): ...
    problems, notes = lint("sugarcrepe", Path("data/unseen/sugar-crepe"))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from elva_core.data import mbeir
from elva_core.data.benchmark_files import Files, entries, number, text, transposed
from elva_core.data.items import Item
from elva_core.files import ElvaDataError

CCNEG_ROWS = 40_000  # the rows at the end that are tested
CCNEG_ROOT = "/workspace/datasets/cc3m/"  # where its authors had the images
SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
GENECIS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
CAPTIONS = 5  # of each image of Flickr30K
Prompts = Mapping[str, str]
Groups = Sequence[str] | None
Encoding = Literal["by direction", "once"]


@dataclass(frozen=True)
class Task:
    """One ranking task of a set, as it is scored.

    positives: per query its right rows of `candidates`; none where the labels are not public.
    galleries: per query the rows that it ranks, the whole pool if None.
    groups: of each query; the score is the mean of their means.
    ids: of queries and candidates, where a submission needs them.
    cutoffs: of `metric`, the reported one first.
    """

    name: str
    queries: Sequence[Item]
    candidates: Sequence[Item]
    positives: Sequence[Sequence[int]]
    galleries: Sequence[Sequence[int]] | None = None
    groups: Groups = None
    metric: Literal["hit", "map"] = "hit"
    cutoffs: tuple[int, ...] = (1,)
    ids: tuple[Sequence[int], Sequence[int]] | None = None


def asked(prompt: str, words: str = "", image: Path | None = None) -> Item:
    """A query as M-BEIR words it: instruction and text, each normalised, and once more together."""
    instruction = mbeir.normalise(prompt)
    return Item(mbeir.normalise(f"{instruction} {mbeir.normalise(words)}"), image, instruction=instruction)


def both_ways(
    images: list[Path], captions: list[str], owner: Sequence[int], prompts: Prompts, groups: Groups = None
) -> list[Task]:
    """Text to image and image to text. owner: the image of each caption."""
    captions_of: list[list[int]] = [[] for _ in images]
    for row, image in enumerate(owner):
        captions_of[image].append(row)
    text_queries = [asked(prompts["t2i"], c) for c in captions]
    image_candidates = [asked(prompts.get("images", ""), image=i) for i in images]
    t2i = Task("t2i", text_queries, image_candidates, [[i] for i in owner], groups=groups)
    image_queries = [asked(prompts["i2t"], image=i) for i in images]
    text_candidates = [asked("", c) for c in captions]
    return [t2i, Task("i2t", image_queries, text_candidates, captions_of, groups=groups)]


def two_captions(
    images: list[Path], true: list[str], false: list[str], prompts: Prompts, groups: Groups = None
) -> list[Task]:
    """Image against a true and a false caption: right only if the true one scores strictly higher."""
    queries = [asked(prompts["i2t"], image=i) for i in images]
    candidates = [asked("", caption) for pair in zip(true, false, strict=True) for caption in pair]
    starts = range(0, len(candidates), 2)
    return [Task("pairs", queries, candidates, [[i] for i in starts], [[i, i + 1] for i in starts], groups)]


def sharegpt4v(files: Files, prompts: Prompts) -> list[Task]:
    """datas_for_validation.json, a list of {image_name, caption}, and val_data/.

    A key `group` (ours) parts the queries.
    """
    path, records = files.read("datas_for_validation.json")

    def parse(_, record):
        image = files.image(f"val_data/{text(record['image_name'], 'image_name')}")
        return image, text(record["caption"], "caption"), record.get("group")

    images, captions, groups = transposed(files.rows(path, records, parse), 3)
    files.repeated(path, "image", [i.name for i in images])
    files.repeated(path, "caption", captions)
    named = [str(g) for g in groups] if any(g is not None for g in groups) else None
    return both_ways(images, captions, range(len(images)), prompts, named)


def urban1k(files: Files, prompts: Prompts) -> list[Task]:
    """image/{n}.jpg and the first line of caption/{n}.txt."""
    folder = files.root.folder
    image_of, caption_of = files.named("image", ".jpg"), files.named("caption", ".txt")
    pairs = image_of.keys() & caption_of.keys()
    if not pairs:
        files.wrong(folder, "no image/{n}.jpg with its caption/{n}.txt; unpack the set there")
    for name in sorted(image_of.keys() ^ caption_of.keys()):
        if image_of.get(name, ".jpg").endswith(".jpg"):
            files.wrong(folder, f"image/{name}.jpg or caption/{name}.txt is missing; restore the pair")
        else:  # not a name of the set's own
            files.notes.append(f"{folder / image_of[name]} has no caption; it is left out")

    def parse(_, name):
        with (folder / caption_of[name]).open(encoding="utf-8-sig") as lines:
            first = lines.readline(10**6).rstrip("\n")
        return files.image(image_of[name]), text(first, f"first line of {name}.txt")

    names = sorted(pairs, key=lambda n: (len(n), n))
    images, captions = transposed(files.rows(folder, names, parse), 2)
    files.repeated(folder, "caption", captions)
    return both_ways(images, captions, range(len(images)), prompts)


def flickr30k(files: Files, prompts: Prompts) -> list[Task]:
    """flickr_text.json, a list of captions, five for each of images/{n}.png."""
    path, captions = files.read("flickr_text.json")
    named = files.named("images", ".png")
    if len(named) * CAPTIONS != len(captions):
        problem = f"{len(captions):,} captions for {len(named):,} images, expected {CAPTIONS} each"
        files.wrong(path, f"{problem}; one of both is incomplete")
    names = [named.get(str(n), f"images/{n}.png") for n in range(-(-len(captions) // CAPTIONS))]
    images = dict(files.rows(path, names, lambda n, name: (n, files.image(name))))
    row_of = {n: row for row, n in enumerate(images)}
    texts = files.rows(path, captions, lambda n, c: (text(c, "caption"), n // CAPTIONS))
    known = [(caption, row_of[n]) for caption, n in texts if n in row_of]
    return both_ways(list(images.values()), [c for c, _ in known], [row for _, row in known], prompts)


def circo(files: Files, prompts: Prompts) -> list[Task]:
    """annotations/val.json or test.json, or both; the pool is all of COCO's unlabeled2017, references too."""
    coco = "COCO2017_unlabeled"
    path, records = files.read(f"{coco}/annotations/image_info_unlabeled2017.json", "images")

    def parse_image(_, record):
        image_id = number(record["id"], "id")
        return image_id, files.image(f"{coco}/unlabeled2017/{text(record['file_name'], 'file_name')}")

    pool = dict(files.rows(path, records, parse_image))
    rows = {image_id: row for row, image_id in enumerate(pool)}
    candidates = [Item("", image) for image in pool.values()]

    def row_of(image_id, name):
        if (row := rows.get(number(image_id, name))) is None:
            raise ElvaDataError(f"{name} {image_id} is not among the images of {coco}")
        return row

    def parse(_, record):
        reference = candidates[row_of(record["reference_img_id"], "reference_img_id")].image
        query = asked(prompts[""], text(record["relative_caption"], "relative_caption"), reference)
        labels = dict.fromkeys(entries(record["gt_img_ids"], "gt_img_ids")) if split == "val" else ()
        return number(record["id"], "id"), query, [row_of(i, "gt_img_ids") for i in labels]

    tasks, annotations = [], files.root.folder / "annotations"
    splits = [s for s in ("val", "test") if (annotations / f"{s}.json").is_file()]
    if not splits:
        files.wrong(annotations, "neither val.json nor test.json is there; copy at least one")
    for split in splits:
        path, records = files.read(f"annotations/{split}.json")
        ids, queries, positives = transposed(files.rows(path, records, parse), 3)
        if twice := [i for i, n in Counter(ids).items() if n > 1]:
            files.wrong(path, f"id {twice[0]} occurs twice; a submission has each once")
        metric = {"metric": "map", "cutoffs": (5, 10, 25, 50), "ids": (ids, list(pool))}
        tasks.append(Task(split, queries, candidates, positives, **metric))
    return tasks


def genecis(files: Files, prompts: Prompts) -> list[Task]:
    """annotations/{focus,change}_{attribute,object}.json.

    Images are in val2017/ (objects) and vg/{file}/ (attributes, cut out). A query ranks its target and
    its gallery.
    """
    rows: dict[Path, int] = {}

    def image(record: dict, row: int, slot: int) -> Path:
        if name.endswith("object"):
            return files.image(f"val2017/{number(record['val_image_id'], 'val_image_id'):012}.jpg")
        return files.image(f"vg/{name}/{number(record['image_id'], 'image_id')}_{row}_{slot}.jpg")

    def parse(row, record):
        condition = text(record["condition"], "condition")
        query = asked(prompts[name], condition, image(record["reference"], row, 0))
        ranked = [record["target"], *entries(record["gallery"], "gallery")]
        target, *others = (
            rows.setdefault(image(x, row, slot), len(rows)) for slot, x in enumerate(ranked, start=1)
        )
        if target in others:
            note = "the gallery holds the target once more; that ties, against the target"
            files.notes.append(f"{path}, entry {row + 1}: {note}")
        return query, [target], [target, *others], name

    parsed = []
    for name in GENECIS:
        path, records = files.read(f"annotations/{name}.json")
        parsed += files.rows(path, records, parse)
    queries, targets, galleries, groups = transposed(parsed, 4)
    candidates = [Item("", i) for i in rows]
    return [Task("all", queries, candidates, targets, galleries, groups, cutoffs=(1, 2, 3))]


def visdial(files: Files, prompts: Prompts) -> list[Task]:
    """visdial_1.0_val.json and VisualDialog_val2018/; a query is the dialogue without the image's caption."""
    name = "visdial_1.0_val.json"
    _, questions = files.read(name, "data", "questions")
    _, answers = files.read(name, "data", "answers")
    path, dialogs = files.read(name, "data", "dialogs")

    def said(texts: list, turn: dict, key: str) -> str:
        return text(texts[number(turn[key], key, len(texts))], key)

    def parse(_, dialog):
        rounds = [
            f"Q: {said(questions, turn, 'question')}? A: {said(answers, turn, 'answer')}."
            for turn in entries(dialog["dialog"], "dialog")
        ]
        name = f"VisualDialog_val2018_{number(dialog['image_id'], 'image_id'):012}.jpg"
        image = files.image(f"VisualDialog_val2018/{name}")
        return asked(prompts[""], " ".join(rounds)), image

    queries, images = transposed(files.rows(path, dialogs, parse), 2)
    files.repeated(path, "image", [image.name for image in images])
    rows = {image: row for row, image in enumerate(dict.fromkeys(images))}
    return [Task("t2i", queries, [Item("", i) for i in rows], [[rows[i]] for i in images])]


def mt_fashioniq(files: Files, prompts: Prompts) -> list[Task]:
    """data/all.val.json, image_splits/split.all.val.json (the pool) and fashioniq_images/.

    A query is rounds of image and captions, in order.
    """
    path, names = files.read("image_splits/split.all.val.json")
    folder = "fashioniq_images"
    named = files.rows(path, names, lambda _, n: (text(n, "name"), files.image(f"{folder}/{n}.jpg")))
    files.repeated(path, "image", [name for name, _ in named])
    pool = dict(named)
    rows = {name: row for row, name in enumerate(pool)}
    path, records = files.read("data/all.val.json")

    def parse(_, record):
        target, parts = text(record["target"][1], "target"), [mbeir.normalise(prompts[""])]
        if target not in rows:
            raise ElvaDataError(f"target {target} is not in image_splits/split.all.val.json")
        for turn in entries(record["reference"], "reference"):
            captions = [text(c, "caption") for c in entries(turn[1], "captions") if c != ""]
            image = files.image(f"{folder}/{text(turn[2], 'reference')}.jpg")
            parts += [image, mbeir.normalise(" and ".join(captions))]
        return Item(str(parts[-1]), None, tuple(parts[:-1])), [rows[target]]

    queries, targets = transposed(files.rows(path, records, parse), 2)
    return [Task("all", queries, [Item("", i) for i in pool.values()], targets, cutoffs=(5, 8, 10))]


def ccneg(files: Files, prompts: Prompts) -> list[Task]:
    """ccneg_preprocessed.pt {image_paths, annotations}, the last 40,000 rows.

    Images are below the folder as they were below CCNEG_ROOT.
    """
    path, paths = files.read("ccneg_preprocessed.pt", "image_paths")
    _, annotations = files.read("ccneg_preprocessed.pt", "annotations")
    if len(paths) != len(annotations):
        counts = f"{len(paths):,} image paths and {len(annotations):,} annotations"
        files.wrong(path, f"{counts}; download it again")

    def parse(_, pair):
        image = files.image(text(pair[0], "image path").removeprefix(CCNEG_ROOT))
        false = text(pair[1]["sop_data"]["negative-prompt"], "negative-prompt").replace(",", "")
        return image, text(pair[1]["json"]["caption"], "caption"), text(false, "negative-prompt")

    rows = list(zip(paths, annotations, strict=False))[-CCNEG_ROWS:]
    return two_captions(*transposed(files.rows(path, rows, parse), 3), prompts)


def sugarcrepe(files: Files, prompts: Prompts) -> list[Task]:
    """data/{kind}.json of seven kinds, {key: {filename, caption, negative_caption}}, and val2017/.

    The score is the mean over the seven files.
    """

    def parse(_, record):
        image = files.image(f"val2017/{text(record['filename'], 'filename')}")
        return image, *(text(record[key], key) for key in ("caption", "negative_caption")), kind

    parsed = []
    for kind in SUGARCREPE:
        path, records = files.read(f"data/{kind}.json", kind=dict)
        parsed += files.rows(path, records.values(), parse)
    images, true, false, kinds = transposed(parsed, 4)
    return two_captions(images, true, false, prompts, kinds or None)


@dataclass(frozen=True)
class Format:
    """Reader of one set and the tasks made of it.

    folder: below the folder of all sets. columns: task -> column of Table 2. prompts: one fixed instruction
    each, worded by us; "" is the one for all queries.
    """

    folder: str
    read: Callable[[Files, Prompts], list[Task]]
    columns: Mapping[str, str]
    prompts: Prompts


CAPTIONED = {
    "t2i": "Find an image that the caption describes.",
    "i2t": "Find a caption that describes the image.",
}
CHANGED = {"": "Find an everyday image like this one with the change described."}
ALIKE = dict.fromkeys(GENECIS, CHANGED[""])
ALIKE["focus_attribute"] = "Find an image that shows the same attribute as this one."
DIALOGUE = {"": "Find the everyday image that this dialogue is about."}
GARMENT = {"": "Find a garment like these with every change described, in turn."}
FALSE = {"i2t": ""}


def _two_columns(name: str) -> dict[str, str]:
    return {"t2i": f"{name} t2i R@1", "i2t": f"{name} i2t R@1"}


SETS = {
    "sharegpt4v": Format("sharegpt4v", sharegpt4v, _two_columns("ShareGPT4V"), CAPTIONED),
    "urban1k": Format("Urban1k", urban1k, _two_columns("Urban-1k"), CAPTIONED),
    "flickr30k": Format("flickr", flickr30k, _two_columns("Flickr30K"), CAPTIONED),
    "circo": Format("CIRCO", circo, {"val": "CIRCO MAP@5"}, CHANGED),
    "genecis": Format("genecis", genecis, {"all": "GeneCIS R@1"}, ALIKE),
    "visdial": Format("visdial", visdial, {"t2i": "VisDial R@1"}, DIALOGUE),
    "mt_fashioniq": Format("multiturnfashion", mt_fashioniq, {"all": "MT-FashionIQ R@5"}, GARMENT),
    "ccneg": Format("ccneg", ccneg, {"pairs": "CC-Neg accuracy"}, FALSE),
    "sugarcrepe": Format("sugar-crepe", sugarcrepe, {"pairs": "SugarCrepe accuracy"}, FALSE),
}


def load(
    name: str, folder: Path, prompts: Prompts | None = None, encoding: Encoding = "by direction"
) -> list[Task]:
    """The tasks of a set.

    Args:
        name: of SETS; it says how the files are read. prompts: instead of those of the set.
        encoding: "by direction": every query has the instruction of its direction and no candidate has one,
            as the models are trained. "once", LamRA's way: where a set is ranked both ways, images carry
            the image-to-text instruction and texts none, on either side.

    Raises:
        ElvaDataError: the first problem, with file and entry, and what to do.
    """
    if encoding not in get_args(Encoding):
        raise ElvaDataError(f"encoding {encoding!r} is none of {get_args(Encoding)}")
    words = dict(prompts or SETS[name].prompts)
    if encoding == "once" and {"t2i", "i2t"} <= words.keys():
        words |= {"t2i": "", "images": words["i2t"]}
    return SETS[name].read(Files(folder, strict=True), words)


def lint(name: str, folder: Path, *, decode: bool = True) -> tuple[list[str], list[str]]:
    """(problems, notes) of a set, each with file and entry; goes on after the first.

    decode: open every image.
    """
    files = Files(folder, strict=False, decode=decode)
    SETS[name].read(files, SETS[name].prompts)
    return list(dict.fromkeys(files.problems)), files.notes


def present(folder: Path, names: Sequence[str] = ()) -> list[str]:
    """The sets whose folder is there, in the order of the table; all that were named, whether there or not.

    Raises:
        ElvaDataError: a name that is none, or nothing is there.
    """
    if unknown := sorted(set(names) - set(SETS)):
        raise ElvaDataError(f"no sets {unknown}; there are {', '.join(SETS)}")
    there = [n for n in SETS if (n in names if names else (folder / SETS[n].folder).is_dir())]
    if not there:
        folders = ", ".join(kind.folder for kind in SETS.values())
        raise ElvaDataError(f"{folder} has none of {folders}; put the sets there")
    return there
