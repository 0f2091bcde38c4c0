"""The nine unseen sets of the paper's Table 2, read from the files that their authors publish (mbeir_format.md section 10).

A set becomes tasks: queries and candidates as items, and which candidates are right. Reading is strict, or goes on and keeps
what it found wrong; both ways run the same lines.

    for task in load("sugarcrepe", Path("data/unseen/sugar-crepe")): ...
    problems, notes = lint("sugarcrepe", Path("data/unseen/sugar-crepe"))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elva_core.data import mbeir
from elva_core.data.benchmark_files import Files, entries, number, text
from elva_core.data.items import Item
from elva_core.files import ElvaDataError

CCNEG_ROWS, CCNEG_ROOT = (
    40_000,
    "/workspace/datasets/cc3m/",
)  # the rows at the end that are tested; where its authors had the images
SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
GENECIS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
CAPTIONS = 5  # of each image of Flickr30K
Prompts = Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """One ranking task of a set, as it is scored.

    positives: per query its right rows of `candidates`; none where the labels are not public. galleries: per query the rows that
    it ranks, the whole pool if None. groups: of each query; the score is the mean of their means. ids: of queries and candidates,
    where a submission needs them. cutoffs: of `metric`, the reported one first.
    """

    name: str
    queries: Sequence[Item]
    candidates: Sequence[Item]
    positives: Sequence[Sequence[int]]
    galleries: Sequence[Sequence[int]] | None = None
    groups: Sequence[str] | None = None
    metric: Literal["hit", "map"] = "hit"
    cutoffs: tuple[int, ...] = (1,)
    ids: tuple[Sequence[int], Sequence[int]] | None = None


def asked(prompt: str, words: str = "", image: Path | None = None) -> Item:
    """A query as M-BEIR words it: instruction and text, each normalised, and once more together."""
    return Item(mbeir.normalise(f"{mbeir.normalise(prompt)} {mbeir.normalise(words)}"), image)


def both_ways(
    images: list[Path],
    captions: list[str],
    owner: list[int],
    prompts: Prompts,
    groups: list[str] | None = None,
) -> list[Task]:
    """Text to image and image to text. owner: the image of each caption."""
    of_image: list[list[int]] = [[] for _ in images]
    for row, image in enumerate(owner):
        of_image[image].append(row)
    pictures, names = (
        [asked(prompts.get("images", ""), image=i) for i in images],
        [asked("", c) for c in captions],
    )
    t2i = Task(
        "t2i", [asked(prompts["t2i"], c) for c in captions], pictures, [[i] for i in owner], groups=groups
    )
    return [
        t2i,
        Task("i2t", [asked(prompts["i2t"], image=i) for i in images], names, of_image, groups=groups),
    ]


def sharegpt4v(files: Files, prompts: Prompts) -> list[Task]:
    """datas_for_validation.json, a list of {image_name, caption}, and val_data/. A key `group` (ours) parts the queries."""
    path, records = files.json("datas_for_validation.json")

    def pair(_, record):
        return (
            files.image(f"val_data/{text(record['image_name'], 'image_name')}"),
            text(record["caption"], "caption"),
            record.get("group"),
        )

    pairs = files.rows(path, records, pair)
    files.repeated(path, "image", [i.name for i, _, _ in pairs])
    files.repeated(path, "caption", [c for _, c, _ in pairs])
    groups = [str(g) for _, _, g in pairs] if any(g is not None for _, _, g in pairs) else None
    return both_ways(
        [i for i, _, _ in pairs], [c for _, c, _ in pairs], list(range(len(pairs))), prompts, groups
    )


def urban1k(files: Files, prompts: Prompts) -> list[Task]:
    """image/{n}.jpg and the first line of caption/{n}.txt."""
    folder = files.root.folder
    names = {
        kind: {p.stem for p in (folder / kind).glob(f"*.{end}")}
        for kind, end in (("image", "jpg"), ("caption", "txt"))
    }
    if not names["image"] & names["caption"]:
        files.wrong(folder, "no image/{n}.jpg with its caption/{n}.txt; unpack the set there")
    for name in sorted(names["image"] ^ names["caption"]):
        files.wrong(folder, f"image/{name}.jpg or caption/{name}.txt is missing; restore the pair")

    def pair(_, name):
        with (folder / f"caption/{name}.txt").open(encoding="utf-8") as lines:
            return files.image(f"image/{name}.jpg"), text(
                lines.readline(10**6).rstrip("\n"), f"first line of {name}.txt"
            )

    ordered = sorted(names["image"] & names["caption"], key=lambda n: (len(n), n))
    pairs = files.rows(folder, ordered, pair)
    files.repeated(folder, "caption", [c for _, c in pairs])
    return both_ways([i for i, _ in pairs], [c for _, c in pairs], list(range(len(pairs))), prompts)


def flickr30k(files: Files, prompts: Prompts) -> list[Task]:
    """flickr_text.json, a list of captions, five for each of images/{n}.png."""
    path, captions = files.json("flickr_text.json")
    count = len(list((files.root.folder / "images").glob("*.png")))
    if count * CAPTIONS != len(captions):
        files.wrong(
            path,
            f"{len(captions):,} captions for {count:,} images, expected {CAPTIONS} each; one of both is incomplete",
        )
    rows = range(-(-len(captions) // CAPTIONS))
    images = dict(files.rows(path, rows, lambda n, _: (n, files.image(f"images/{n}.png"))))
    places = {n: place for place, n in enumerate(images)}
    known = [
        (c, places[n // CAPTIONS])
        for n, c in files.rows(path, captions, lambda n, c: (n, text(c, "caption")))
        if n // CAPTIONS in places
    ]
    return both_ways(list(images.values()), [c for c, _ in known], [i for _, i in known], prompts)


def circo(files: Files, prompts: Prompts) -> list[Task]:
    """annotations/val.json and test.json, one of both at least; the pool is all of COCO's unlabeled2017, reference images among it."""
    coco = "COCO2017_unlabeled"
    path, records = files.json(f"{coco}/annotations/image_info_unlabeled2017.json", "images")

    def known(_, record):
        return number(record["id"], "id"), files.image(
            f"{coco}/unlabeled2017/{text(record['file_name'], 'file_name')}"
        )

    pool = dict(files.rows(path, records, known))
    place = {image: row for row, image in enumerate(pool)}

    def row_of(image, name):
        if number(image, name) not in place:
            raise ElvaDataError(f"{name} {image} is not among the images of {coco}")
        return place[number(image, name)]

    def parse(_, record):
        reference = candidates[row_of(record["reference_img_id"], "reference_img_id")].image
        query = asked(prompts[""], text(record["relative_caption"], "relative_caption"), reference)
        right = (
            [row_of(i, "gt_img_ids") for i in dict.fromkeys(entries(record["gt_img_ids"], "gt_img_ids"))]
            if split == "val"
            else []
        )
        return number(record["id"], "id"), query, right

    candidates, tasks = [Item("", image) for image in pool.values()], []
    splits = [s for s in ("val", "test") if (files.root.folder / f"annotations/{s}.json").is_file()]
    if not splits:
        files.wrong(
            files.root.folder / "annotations", "neither val.json nor test.json is there; copy at least one"
        )
    for split in splits:
        path, records = files.json(f"annotations/{split}.json")
        rows = files.rows(path, records, parse)
        ids = [i for i, _, _ in rows]
        if twice := [i for i, n in Counter(ids).items() if n > 1]:
            files.wrong(path, f"id {twice[0]} occurs twice; a submission has each once")
        metric = {"metric": "map", "cutoffs": (5, 10, 25, 50), "ids": (ids, list(pool))}
        tasks.append(Task(split, [q for _, q, _ in rows], candidates, [r for _, _, r in rows], **metric))
    return tasks


def genecis(files: Files, prompts: Prompts) -> list[Task]:
    """annotations/{focus,change}_{attribute,object}.json; images in val2017/ (objects) and vg/{file}/ (attributes, cut out).

    A query ranks its target and its gallery.
    """
    images: dict[Path, int] = {}

    def image(record: dict, row: int, slot: int) -> Path:
        if name.endswith("object"):
            return files.image(f"val2017/{number(record['val_image_id'], 'val_image_id'):012}.jpg")
        return files.image(f"vg/{name}/{number(record['image_id'], 'image_id')}_{row}_{slot}.jpg")

    def parse(row, record):
        query = asked(
            prompts[name], text(record["condition"], "condition"), image(record["reference"], row, 0)
        )
        ranked = [record["target"], *entries(record["gallery"], "gallery")]
        target, *others = (
            images.setdefault(image(x, row, slot), len(images)) for slot, x in enumerate(ranked, start=1)
        )
        if target in others:
            files.notes.append(
                f"{path}, entry {row + 1}: the gallery holds the target once more; that ties, against the target"
            )
        return query, [target], [target, *others], name

    rows = []
    for name in GENECIS:
        path, records = files.json(f"annotations/{name}.json")
        rows += files.rows(path, records, parse)
    queries, targets, galleries, groups = ([r[i] for r in rows] for i in range(4))
    return [
        Task("all", queries, [Item("", i) for i in images], targets, galleries, groups, cutoffs=(1, 2, 3))
    ]


def visdial(files: Files, prompts: Prompts) -> list[Task]:
    """visdial_1.0_val.json and VisualDialog_val2018/; a query is the whole dialogue, without the image's caption."""
    name = "visdial_1.0_val.json"
    (_, questions), (_, answers), (path, dialogs) = (
        files.json(name, "data", key) for key in ("questions", "answers", "dialogs")
    )

    def said(words: list, turn: dict, key: str) -> str:
        return text(words[number(turn[key], key, len(words))], key)

    def parse(_, dialog):
        rounds = [
            f"Q: {said(questions, turn, 'question')}? A: {said(answers, turn, 'answer')}."
            for turn in entries(dialog["dialog"], "dialog")
        ]
        image = files.image(
            f"VisualDialog_val2018/VisualDialog_val2018_{number(dialog['image_id'], 'image_id'):012}.jpg"
        )
        return asked(prompts[""], text(" ".join(rounds), "dialog")), image

    rows = files.rows(path, dialogs, parse)
    files.repeated(path, "image", [image.name for _, image in rows])
    images = {image: row for row, image in enumerate(dict.fromkeys(image for _, image in rows))}
    return [Task("t2i", [q for q, _ in rows], [Item("", i) for i in images], [[images[i]] for _, i in rows])]


def mt_fashioniq(files: Files, prompts: Prompts) -> list[Task]:
    """data/all.val.json, image_splits/split.all.val.json (the pool) and fashioniq_images/; rounds of image and captions, in order."""
    path, names = files.json("image_splits/split.all.val.json")
    pool = files.rows(
        path, names, lambda _, name: (text(name, "name"), files.image(f"fashioniq_images/{name}.jpg"))
    )
    files.repeated(path, "image", [name for name, _ in pool])
    place = {name: row for row, (name, _) in enumerate(dict(pool).items())}
    path, records = files.json("data/all.val.json")

    def parse(_, record):
        target, parts = text(record["target"][1], "target"), [mbeir.normalise(prompts[""])]
        if target not in place:
            raise ElvaDataError(f"target {target} is not in image_splits/split.all.val.json")
        for turn in entries(record["reference"], "reference"):
            captions = [text(c, "caption") for c in entries(turn[1], "captions") if c != ""]
            parts += [
                files.image(f"fashioniq_images/{text(turn[2], 'reference')}.jpg"),
                mbeir.normalise(" and ".join(captions)),
            ]
        return Item(str(parts[-1]), None, tuple(parts[:-1])), [place[target]]

    rows = files.rows(path, records, parse)
    return [
        Task(
            "all",
            [q for q, _ in rows],
            [Item("", i) for i in dict(pool).values()],
            [t for _, t in rows],
            cutoffs=(5, 8, 10),
        )
    ]


def two_captions(rows: Sequence[tuple[Path, str, str, str | None]], prompts: Prompts) -> list[Task]:
    """Image against a true and a false caption: right only if the true one scores strictly higher. Rows: image, true, false, group."""
    queries, candidates = (
        [asked(prompts["i2t"], image=r[0]) for r in rows],
        [asked("", caption) for r in rows for caption in r[1:3]],
    )
    groups = [r[3] for r in rows] if any(r[3] for r in rows) else None
    starts = range(0, 2 * len(rows), 2)
    return [Task("pairs", queries, candidates, [[i] for i in starts], [[i, i + 1] for i in starts], groups)]


def ccneg(files: Files, prompts: Prompts) -> list[Task]:
    """ccneg_preprocessed.pt {image_paths, annotations}, the last 40,000 rows; images below the folder as they were below CCNEG_ROOT."""
    (path, images), (_, annotations) = (
        files.tensors("ccneg_preprocessed.pt", key) for key in ("image_paths", "annotations")
    )
    if len(images) != len(annotations):
        files.wrong(
            path, f"{len(images):,} image paths and {len(annotations):,} annotations; download it again"
        )

    def parse(_, pair):
        image, said = files.image(text(pair[0], "image path").removeprefix(CCNEG_ROOT)), pair[1]
        false = text(said["sop_data"]["negative-prompt"], "negative-prompt").replace(",", "")
        return image, text(said["json"]["caption"], "caption"), text(false, "negative-prompt"), None

    return two_captions(
        files.rows(path, list(zip(images, annotations, strict=False))[-CCNEG_ROWS:], parse), prompts
    )


def sugarcrepe(files: Files, prompts: Prompts) -> list[Task]:
    """data/{kind}.json of seven kinds, {key: {filename, caption, negative_caption}}, and val2017/; the mean over the seven files."""

    def parse(_, record):
        image = files.image(f"val2017/{text(record['filename'], 'filename')}")
        return (
            image,
            text(record["caption"], "caption"),
            text(record["negative_caption"], "negative_caption"),
            kind,
        )

    rows = []
    for kind in SUGARCREPE:
        path, records = files.json(f"data/{kind}.json", kind=dict)
        rows += files.rows(path, records.values(), parse)
    return two_captions(rows, prompts)


@dataclass(frozen=True)
class Format:
    """How a set is read. folder: below the folder of all sets. columns: task -> column of Table 2. prompts: one fixed instruction
    each, worded by us; "" is the one for all queries."""

    folder: str
    read: Callable[[Files, Prompts], list[Task]]
    columns: Mapping[str, str]
    prompts: Prompts


CAPTIONED = {
    "t2i": "Find an image that the caption describes.",
    "i2t": "Find a caption that describes the image.",
}
CHANGED = "Find an everyday image like this one with the change described."
SETS = {
    "sharegpt4v": Format(
        "sharegpt4v", sharegpt4v, {"t2i": "ShareGPT4V t2i R@1", "i2t": "ShareGPT4V i2t R@1"}, CAPTIONED
    ),
    "urban1k": Format("Urban1k", urban1k, {"t2i": "Urban-1k t2i R@1", "i2t": "Urban-1k i2t R@1"}, CAPTIONED),
    "flickr30k": Format(
        "flickr", flickr30k, {"t2i": "Flickr30K t2i R@1", "i2t": "Flickr30K i2t R@1"}, CAPTIONED
    ),
    "circo": Format("CIRCO", circo, {"val": "CIRCO MAP@5"}, {"": CHANGED}),
    "genecis": Format(
        "genecis",
        genecis,
        {"all": "GeneCIS R@1"},
        dict.fromkeys(GENECIS, CHANGED)
        | {"focus_attribute": "Find an image that shows the same attribute as this one."},
    ),
    "visdial": Format(
        "visdial",
        visdial,
        {"t2i": "VisDial R@1"},
        {"": "Find the everyday image that this dialogue is about."},
    ),
    "mt_fashioniq": Format(
        "multiturnfashion",
        mt_fashioniq,
        {"all": "MT-FashionIQ R@5"},
        {"": "Find a garment like these with every change described, in turn."},
    ),
    "ccneg": Format("ccneg", ccneg, {"pairs": "CC-Neg accuracy"}, {"i2t": ""}),
    "sugarcrepe": Format("sugar-crepe", sugarcrepe, {"pairs": "SugarCrepe accuracy"}, {"i2t": ""}),
}
ENCODINGS = ("by direction", "once")


def load(
    name: str, folder: Path, prompts: Prompts | None = None, encoding: str = "by direction"
) -> list[Task]:
    """The tasks of a set.

    Args:
        name: of SETS; it says how the files are read. prompts: instead of those of the set.
        encoding: "by direction": every query has the instruction of its direction and no candidate has one, as the models are
            trained. "once", LamRA's way: where a set is ranked both ways, images carry the image-to-text instruction and texts
            none, on either side.

    Raises:
        ElvaDataError: the first problem, with file and entry, and what to do.
    """
    return SETS[name].read(Files(folder, strict=True), _worded(name, prompts, encoding))


def lint(name: str, folder: Path, *, decode: bool = True) -> tuple[list[str], list[str]]:
    """(problems, notes) of a set, each with file and entry; goes on after the first. decode: open every image."""
    files = Files(folder, strict=False, decode=decode)
    SETS[name].read(files, SETS[name].prompts)
    return files.problems, files.notes


def present(folder: Path, names: Sequence[str] = ()) -> list[str]:
    """The sets whose folder is there, in the order of the table; all that were named, whether there or not.

    Raises:
        ElvaDataError: a name that is none, or nothing is there.
    """
    if unknown := sorted(set(names) - set(SETS)):
        raise ElvaDataError(f"no sets {unknown}; there are {', '.join(SETS)}")
    found = [
        name
        for name, kind in SETS.items()
        if name in names or (not names and (folder / kind.folder).is_dir())
    ]
    if not found:
        raise ElvaDataError(
            f"{folder} has none of {', '.join(kind.folder for kind in SETS.values())}; put the sets there"
        )
    return found


def _worded(name: str, prompts: Prompts | None, encoding: str) -> Prompts:
    if encoding not in ENCODINGS:
        raise ElvaDataError(f"encoding {encoding!r} is none of {ENCODINGS}")
    own = dict(prompts or SETS[name].prompts)
    return (
        own | {"t2i": "", "images": own["i2t"]}
        if encoding == "once" and {"t2i", "i2t"} <= own.keys()
        else own
    )
