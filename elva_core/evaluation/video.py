"""Hit rates of text to video by frames, on the sets of Table 7 or on clips of things that stand or move.

hits = measure(settings.video, folder, vectors)     # one row per query and cut-off
rows = table(hits, samples=1000, seed=17)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from elva_core.config import VideoSettings
from elva_core.data import mbeir
from elva_core.data.caption_sets import Task
from elva_core.data.items import Item
from elva_core.data.video_sets import SETS, msrvtt
from elva_core.evaluation import captions, statistics
from elva_core.evaluation.benchmark import Vectors
from elva_core.files import ElvaDataError
from elva_core.tables import percent_cells

STILL = "still"  # the folder of clips in which nothing moves
COLUMNS = ["set", "motion", "frames", "words", "query", "metric", "value"]


def table(hits: pd.DataFrame, samples: int, seed: int) -> pd.DataFrame:
    """Means with 95 % intervals over queries, a row per combination of the columns beside query and value."""
    by = [column for column in hits if column not in ("query", "value")]
    return statistics.scores(hits, by, samples, (seed, "video"))


def measure(settings: VideoSettings | None, folder: Path, vectors: Vectors) -> pd.DataFrame:
    """Hits of one model on the profile's sets, or on the clips in `folder`, or none; columns as `moving`.

    Raises:
        ElvaDataError: the sets are asked for and none is there.
    """
    if settings is None:
        return pd.DataFrame(columns=COLUMNS)
    if settings.drawings:
        return moving(folder, settings, vectors)
    names = [name for name in SETS if (Path(settings.sets) / name).is_dir()]
    if not names:
        raise ElvaDataError(
            f"{settings.sets}: none of {list(SETS)} is there; unpack one, or leave video out of the profile"
        )
    parts = []
    for name, frames in itertools.product(names, settings.frames):
        task = SETS[name](Path(settings.sets) / name, frames, settings.instruction)
        hits = captions.score(task.name, [task], vectors)
        parts.append(hits.assign(motion=task.name, frames=frames, words="name"))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def moving(folder: Path, settings: VideoSettings, vectors: Vectors) -> pd.DataFrame:
    """Hits of the same queries on clips in which what they ask for stands still or moves in various ways.

    Args:
        folder: one folder in MSR-VTT's layout for each motion, named by the word for it; the rows of all show
            the same things.

    Returns:
        one row per query and metric. words: "name", or "name, motion" where the word for the motion stands in
        the query, too. metric "named motion first": of the clips of one thing in all its motions (not still),
        how often the one that the query names is first, per thing; 1 in their number by chance.
    """
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name != STILL, name))
    parts, seen = [], {}
    for motion in names:
        for frames in settings.frames:
            task = seen[motion] = msrvtt(folder / motion, frames, settings.instruction)
            hits = captions.score("clips", [task], vectors)
            parts.append(hits.assign(motion=motion, frames=frames, words="name"))
    most, words = settings.frames[-1], [n for n in names if n != STILL]
    told = {m: [Item(mbeir.normalise(f"{q.text.rstrip('.')} {m}")) for q in seen[m].queries] for m in words}
    for motion in words:
        hits = captions.score("clips", [replace(seen[motion], queries=told[motion])], vectors)
        parts.append(hits.assign(motion=motion, frames=most, words="name, motion"))
    first = _named_first(told, {m: seen[m].candidates for m in words}, vectors)
    parts.append(first.assign(motion="all", frames=most, words="name, motion"))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def _named_first(
    told: dict[str, Sequence[Item]], shown: dict[str, Sequence[Item]], vectors: Vectors
) -> pd.DataFrame:
    """Share of a thing's motions that are found by name: each query ranks its thing in all motions."""
    per_thing = len(told)
    queries, candidates = (
        [item for row in zip(*of.values(), strict=True) for item in row] for of in (told, shown)
    )
    rows = range(len(queries))
    galleries = [list(range(r - r % per_thing, r - r % per_thing + per_thing)) for r in rows]
    task = Task("all", queries, candidates, [[r] for r in rows], galleries, cutoffs=(1,))
    share = captions.score("clips", [task], vectors)["value"].to_numpy().reshape(-1, per_thing).mean(1)
    columns = {"set": "clips", "query": range(len(share)), "metric": "named motion first", "value": share}
    return pd.DataFrame(columns)


def shown(results: pd.DataFrame) -> pd.DataFrame:
    """`table` at the most frames as people read it: percent and interval, a column per metric and model."""
    most = results[results["frames"] == results["frames"].max()]
    rows = ["words", "motion", "n"]
    cells = most.assign(cell=percent_cells(most))
    wide = cells.pivot(index=rows, columns=["metric", "model"], values="cell")
    pairs = itertools.product(most["metric"].unique(), most["model"].unique())
    order = most.set_index(rows).index.unique()
    return wide.reindex(columns=[pair for pair in pairs if pair in wide], index=order).fillna("")


def experiment(hits: pd.DataFrame) -> str:
    """Heading of the claims of `measure`: Table 7, or the clips of the embedded collection."""
    return "Table 7, own clips" if "clips" in set(hits["set"]) else "Table 7"


def headline(results: pd.DataFrame) -> pd.DataFrame:
    """Rows of `table` for its summary, at the most frames: motions by name, how often the named is first.

    Returns:
        the rows with unit (the motion) and group (the frames, and the chance of finding the named motion).
    """
    most = results[results["frames"] == results["frames"].max()]
    told = (most["words"] == "name, motion") & (most["motion"] != "all")
    rows = most[((most["words"] == "name") & (most["metric"] == "hit@5")) | (most["motion"] == "all")]
    frames = rows["frames"].astype(str) + " frames"
    chance = f", chance {100 / max(1, most.loc[told, 'motion'].nunique()):.1f}"
    return rows.assign(unit=rows["motion"], group=frames.where(rows["motion"] != "all", frames + chance))


def more_frames(hits: pd.DataFrame, model: str, samples: int, seed: int) -> pd.DataFrame:
    """Paired difference of one model's hit@5 on moving things: the most frames less the fewest.

    Args:
        hits: `measure`, with a column model.

    Returns:
        one row of what, value, ci_low, ci_high (shares), n; none where all were looked at alike.
    """
    rows = hits[(hits["metric"] == "hit@5") & (hits["words"] == "name") & (hits["motion"] != STILL)]
    rows = rows[rows["model"] == model]
    few, most = rows["frames"].min(), rows["frames"].max()
    if rows.empty or few == most:
        return pd.DataFrame(columns=["what", "value", "ci_low", "ci_high", "n"])
    values = rows.groupby(["set", "query", "frames"], as_index=False)["value"].mean()
    pairs = statistics.paired(values.rename(columns={"frames": "model"}), ["set", "query"], most, few)
    what = f"{most} frames over {few}"
    return statistics.scores(pairs.assign(what=what), ["what"], samples, lambda *_: (seed, "frames"), "set")


def gain(hits: pd.DataFrame, new: str, old: str, tables: dict, samples: int, seed: int) -> pd.DataFrame:
    """By how much a model finds more of what moves: difference of hit@5, paired over queries.

    Args:
        hits: `measure` of several models, with a column model; the mean of the sets' means is compared.
        tables: the paper's; its gain is that of R@5 on MSR-VTT over LamRA.

    Returns:
        one row of new, old, metric, unit, value, ci_low, ci_high (shares), n, paper (points); none of no
        hits.
    """
    most = hits[hits["frames"] == hits["frames"].max()]
    moving = most[(most["metric"] == "hit@5") & (most["words"] == "name") & (most["motion"] != STILL)]
    values = moving.groupby(["set", "query", "model"], as_index=False)["value"].mean()
    columns, rows = tables["table7"]["columns"], tables["table7"]["rows"]
    column = columns.index("MSR-VTT R@5")
    paper = round(rows["ELVA-7B"][column] - rows["LamRA-7B"][column], 1)
    names = {"new": new, "old": old, "metric": "hit@5", "unit": "what moves", "paper": paper}
    differences = statistics.paired(values, ["set", "query"], new, old).assign(**names)
    scope = seed, "video", new, old
    return statistics.scores(differences, list(names), samples, lambda *_: scope, "set")
