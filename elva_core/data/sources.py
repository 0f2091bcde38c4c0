"""The data a profile names, as an M-BEIR root and NLI triplets; counts and examples of them.

root, triplets = write(settings.data, folder, seed=17)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from elva_core import files
from elva_core.config import DataSettings, Settings
from elva_core.data import benchmark_files, emoji, emoji_variants, mbeir

NLI_COLUMNS = ["sent0", "sent1", "hard_neg"]


def write(data: DataSettings, folder: Path, *, seed: int) -> tuple[mbeir.Root, Path]:
    """(root, NLI file): the embedded collection in `folder`, or links to the M-BEIR copy the profile names.

    Raises:
        ElvaDataError: the profile names neither or both, or a path that does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root, triplets = folder / "root", folder / "nli.csv"
    if (data.emoji is None) == (data.root is None or data.nli is None):
        raise files.ElvaDataError(
            "data: give either emoji, or both root (an M-BEIR folder) and nli (SimCSE's CSV)"
        )
    if data.emoji is None:
        for link, target in ((root, Path(data.root)), (triplets, Path(data.nli))):
            if not target.exists():
                raise files.ElvaDataError(
                    f"{target} does not exist; correct data.root and data.nli in the profile"
                )
            link.unlink(missing_ok=True)
            link.symlink_to(target.resolve())
        return locate(folder)
    emojis = emoji.sample(emoji.load(data.emoji.language), data.emoji.size)
    emoji.write_root(emojis, root, data.emoji, seed=seed)
    emoji.write_triplets(emojis, triplets, held_out_share=data.emoji.held_out_share)
    return locate(folder)


def write_unseen(settings: Settings, folder: Path) -> dict[str, tuple[str, str, dict[str, str]]]:
    """Writes the embedded collection's own unseen sets, beside those of the paper, into `folder`.

    Returns:
        set -> (question, format, the instructions of training by direction); the set's folder has its name.
    """
    data, asked = settings.data.emoji, settings.unseen
    if data is None:
        raise files.ElvaDataError(
            "unseen.language is for the embedded data; give unseen.sets, a folder of the paper's unseen sets"
        )
    emojis = emoji.sample(emoji.load(data.language), data.size)
    if asked.language in ("en", data.language):
        raise files.ElvaDataError(f"unseen.language {asked.language} is trained on; choose another")
    written = emoji_variants.write_unseen(emojis, folder, data, asked)
    words = emoji.INSTRUCTIONS
    prompts = {"t2i": words["text", "image"][0], "i2t": words["image", "text"][0]}
    return {name: (question, kind, prompts) for name, (question, kind) in written.items()}


def read_nli(path: Path) -> pd.DataFrame:
    """Stage 1's text pairs: triplets in SimCSE's CSV form, one row each.

    The columns are sent0 (premise), sent1 (entailed) and hard_neg (contradicted).

    Raises:
        ElvaDataError: missing file, missing column, an empty cell, or a row with more or fewer cells than
            the header; names the line.
    """
    if not path.is_file():  # read_csv knows no key of the profile to name
        raise files.ElvaDataError(
            f"{path} is missing; set data.nli to SimCSE's nli_for_simcse.csv or use the embedded collection"
        )
    table = benchmark_files.read_csv(path, NLI_COLUMNS)
    empty = (table == "").any(axis=1)
    if empty.any():
        raise files.ElvaDataError(f"{path}:{empty.idxmax()}: an empty cell; remove the row")
    return table.reset_index(drop=True)


def locate(folder: Path) -> tuple[mbeir.Root, Path]:
    """(root, NLI file) of a finished data stage."""
    return mbeir.Root(folder / "root"), folder / "nli.csv"


def write_clips(settings: Settings, folder: Path, seed: int) -> None:
    """Short clips of the test vendor's drawings, one folder in MSR-VTT's layout for each motion.

    Nothing is written where the profile has no drawings.

    Raises:
        ElvaDataError: clips are asked for of data that has no drawings.
    """
    data, video = settings.data.emoji, settings.video
    if video is None or video.drawings is None:
        return
    if data is None:
        raise files.ElvaDataError(
            "video.drawings needs the embedded collection; give video.sets, a folder with msrvtt/ and msvd/"
        )
    emojis = emoji.sample(emoji.load(data.language), data.size)
    (vendor,) = data.vendors["test"]
    emoji_variants.write_clips(emojis, folder, video, vendor=vendor, seed=seed)


def counts(root: mbeir.Root) -> pd.DataFrame:
    """Queries, positives per query, and pool size of every unit and split."""
    rows = []
    for split in mbeir.SPLITS:
        for unit in root.units(split):
            queries = root.queries(unit, split)
            pool = root.pool(unit, split, "global" if split == "train" else "local")
            positives = pd.Series([len(q.positives) for q in queries])
            for task, counts_of_task in positives.groupby(queries.kinds):
                modalities = mbeir.MODALITIES_OF[task]
                row = {"split": split, "unit": unit if f"task{task}" in unit else f"{unit}_task{task}"}
                row |= {"query -> candidate": " -> ".join(modalities), "queries": len(counts_of_task)}
                row |= {"positives per query": round(counts_of_task.mean(), 2)}
                rows.append(row | {"pool": len(pool.rows_of(modalities[1]))})
    return pd.DataFrame(rows)


def examples(root: mbeir.Root, unit: str, split: str, count: int) -> list[tuple[str, Path | None]]:
    """`count` queries of a unit, each followed by its positive, as captioned cells."""
    queries, pool = root.queries(unit, split), root.pool(unit, split)
    cells = []
    for query in sorted(queries, key=lambda q: mbeir.stable_hash("example", q.qid))[:count]:
        positive = pool[next(row for did in query.positives if (row := pool.row(did)) is not None)]
        for label, record in (("Q", query), ("C", positive)):
            path = root.image_path(record.image) if record.image else None
            cells.append((f"{label}: {record.text or ''}", path))
    return cells


def twins_in_pool(root: mbeir.Root, unit: str, split: str) -> pd.Series:
    """Per query, how many candidates of its local pool differ from the wanted grains in exactly one."""
    texts: dict[tuple, set[str]] = {}
    for candidate in root.pool(unit, split):
        for key, text in mbeir.masked(mbeir.grains(candidate)):
            texts.setdefault(key, set()).add(text)
    counts = [
        sum(len(texts.get(key, set()) - {text}) for key, text in mbeir.masked(mbeir.grains(query)))
        for query in root.queries(unit, split)
    ]
    return pd.Series(counts, name="twins")


def unseen(root: mbeir.Root, queries: Sequence[mbeir.Query]) -> pd.Series:
    """Whether each query's composition of grains is in no training row."""
    trained = {tuple(mbeir.grains(c)) for c in root.pool("", "train", "global")}
    return pd.Series([tuple(mbeir.grains(q)) not in trained for q in queries], name="unseen composition")


def seen_pictures(data: DataSettings, bench: mbeir.Root) -> pd.DataFrame:
    """Whether a training vendor has a test query's picture, or that of a positive, byte for byte.

    Returns:
        unit, qid, seen; no rows where the data has no vendors.
    """
    columns = ["unit", "qid", "seen"]
    if data.emoji is None:
        return pd.DataFrame(columns=columns)
    vendors, rows = data.emoji.vendors, []
    others = (*vendors["val"], *vendors["test"])  # queries by picture are drawn by the former
    shared = {vendor: emoji.shared_drawings(vendor, vendors["train"]) for vendor in others}
    for unit in bench.units("test"):
        pool = bench.pool(unit, "test")
        for query in bench.queries(unit, "test"):
            positives = [pool[row] for did in query.positives if (row := pool.row(did)) is not None]
            pictures = {Path(record.image) for record in (query, *positives) if record.image}
            seen = any(picture.stem in shared.get(picture.parent.name, ()) for picture in pictures)
            rows.append((unit, query.qid, seen))
    return pd.DataFrame(rows, columns=columns)
