"""Hit rates on the unseen caption and composition sets of Table 2; every tie counts against the target.

hits = score("sugarcrepe", caption_sets.load("sugarcrepe", folder), vectors)       # one row per query
rows = table(hits, samples=1000, seed=17)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from elva_core import distributed, files
from elva_core.config import Settings
from elva_core.data import caption_sets, sources
from elva_core.data.caption_sets import SETS, Task
from elva_core.data.emoji_variants import COMPOSITIONS
from elva_core.data.items import Item
from elva_core.evaluation import statistics
from elva_core.evaluation.benchmark import Vectors, results_folder
from elva_core.files import ElvaDataError
from elva_core.retrieval import metrics, search
from elva_core.tables import markdown_table, percent_cells

COLUMNS = ["set", "task", "group", "query", "metric", "reported", "value", "chance"]  # of `score`
SUBMITTED = 50  # images per query of CIRCO's server
# questions of the paper; the others share no more with its sets than the layout of the files
PAPER_QUESTIONS = ("Table 2", "captions")
GROUPED_QUESTION = "vendor"  # its groups, kinds of compositions, are a question of their own


@dataclass(frozen=True)
class CaptionSet:
    """A set to score.

    Attributes:
        name: in the tables. question: that it answers. kind: of SETS, how its files are read.
        prompts, cutoffs: instead of the set's own. tasks: of the set; all if empty.
    """

    name: str
    question: str
    kind: str
    folder: Path
    prompts: dict[str, str] | None = None
    cutoffs: tuple[int, ...] | None = None
    tasks: tuple[str, ...] = ()


Loaded = Sequence[tuple[CaptionSet, Sequence[Task]]]  # sets with their tasks


def profile_sets(settings: Settings, folder: Path) -> list[CaptionSet]:
    """The unseen sets of a profile: those that its data collection has of its own, else the nine of Table 2.

    The former are written into `folder`. There are none of the latter, with a warning, where their folder is
    missing, so that the chain goes on without them.

    Raises:
        ElvaDataError: the profile names neither.
    """
    unseen = settings.unseen
    if unseen is None:
        raise ElvaDataError(
            "the profile has no unseen sets; "
            "give unseen.sets, a folder of them, or unseen.language for the embedded data"
        )
    if unseen.sets:
        root = Path(unseen.sets)
        if not root.is_dir():
            message = "%s is missing: no unseen set is scored; put them there and run the stage again"
            distributed.log.warning(message, unseen.sets)
            return []
        names = caption_sets.present(root)
        return [CaptionSet(name, PAPER_QUESTIONS[0], name, root / SETS[name].folder) for name in names]
    return [
        CaptionSet(name, question, kind, folder / name, prompts, cutoffs=(5, 1), tasks=("t2i", "pairs"))
        for name, (question, kind, prompts) in sources.write_unseen(settings, folder).items()
    ]


def load(source: CaptionSet) -> list[Task]:
    """The tasks of a set; errors as `caption_sets.load` has them."""
    tasks = caption_sets.load(source.kind, source.folder, source.prompts)
    return [task for task in tasks if not source.tasks or task.name in source.tasks]


def ranked(task: Task, vectors: Vectors) -> list[list[int]]:
    """Per query the ranks of its positives, ascending, each behind everything wrong that scores the same."""
    queries, candidates = vectors(task.queries), vectors(task.candidates)
    if task.galleries is None:
        pessimistic = search.exact(queries[:], candidates, 1, task.positives).pessimistic
        return [behind_ties(ranks) for ranks in pessimistic]
    return [
        [gallery_rank(queries[i : i + 1][0], candidates[np.array(rows)], rows.index(target))]
        for i, (rows, (target,)) in enumerate(zip(task.galleries, task.positives, strict=True))
    ]


def behind_ties(pessimistic: Sequence[int]) -> list[int]:
    """Ranks of positives that stand behind every wrong candidate of the same score, one after another.

    Args:
        pessimistic: ranks that count everything of the same score, positives too.

    >>> behind_ties([3, 3, 7])
    [2, 3, 7]
    """
    last: dict[int, int] = {}
    for rank in sorted(pessimistic, reverse=True):
        last[rank] = last.get(rank, rank + 1) - 1
    return sorted(rank for top, low in last.items() for rank in range(low, top + 1))


def gallery_rank(query: np.ndarray, gallery: np.ndarray, target: int) -> int:
    """Rank of one row of a gallery (n, D) for a query (D,), behind everything else that scores the same.

    A score is the cosine in float64, rounded to float32, as `search.exact` has it: a copy of a vector ties
    with it.
    """
    wide = gallery.astype(np.float64)
    scores = np.einsum("nd,nd->n", wide, np.broadcast_to(query.astype(np.float64), wide.shape))
    scores = (scores / np.sqrt(np.einsum("nd,nd->n", wide, wide))).astype(np.float32)
    return int((scores >= scores[target]).sum())


def average_precision(ranks: Sequence[int], k: int) -> float:
    """Mean precision at the ranks of the right answers among the top k, over min(number of right answers, k).

    >>> average_precision([1, 4, 9], 5)
    0.5
    """
    precisions = (place / rank for place, rank in enumerate(ranks, start=1) if rank <= k)
    return sum(precisions, 0.0) / min(len(ranks), k)


def chance(task: Task, query: int, k: int) -> float:
    """Probability that a random order puts a right answer among the top k."""
    size = len(task.galleries[query] if task.galleries else task.candidates)
    right = len(task.positives[query])
    return 1 - math.prod((size - right - i) / (size - i) for i in range(min(k, size - right + 1)))


def score(
    name: str, tasks: Sequence[Task], vectors: Vectors, cutoffs: Sequence[int] | None = None
) -> pd.DataFrame:
    """One row per query, task and metric: set, task, group, query, metric, reported, value, chance.

    reported: at the first cut-off. Two captions are reported as accuracy, which is hit@1 of a gallery of two.
    Tasks without labels have no rows.
    """
    rows = []
    for task in (task for task in tasks if any(task.positives)):
        pairs, hit = task.name == "pairs", task.metric == "hit"
        ks = (1,) if pairs else cutoffs or task.cutoffs
        for query, ranks in enumerate(ranked(task, vectors)):
            group = task.groups[query] if task.groups else ""
            for k in ks:
                metric = "accuracy" if pairs else f"{task.metric}@{k}"
                value = float(ranks[0] <= k) if hit else average_precision(ranks, k)
                expected = chance(task, query, k) if hit else np.nan
                rows.append((name, task.name, group, query, metric, k == ks[0], value, expected))
    types = {"query": int, "reported": bool, "value": float, "chance": float}  # also of no rows
    return pd.DataFrame(rows, columns=COLUMNS).astype(types)


def measure(loaded: Loaded, vectors: Vectors, model: str) -> pd.DataFrame:
    """`score` of several sets under one model, with columns model, question and kind."""
    parts = []
    for source, tasks in loaded:
        hits = score(source.name, tasks, vectors, source.cutoffs)
        parts.append(hits.assign(model=model, question=source.question, kind=source.kind))
    empty = pd.DataFrame(columns=[*COLUMNS, "model", "question", "kind"])
    return pd.concat(parts, ignore_index=True) if parts else empty


def described(loaded: Loaded) -> pd.DataFrame:
    """Tasks as a table: an example of a query and of a right answer, and the numbers of both."""
    rows = []
    for source, tasks in loaded:
        for task in tasks:
            right = shown(task.candidates[task.positives[0][0]]) if task.positives[0] else ""
            sizes = [len(task.candidates)] if task.galleries is None else [len(g) for g in task.galleries]
            row = {"question": source.question, "set": source.name, "task": task.name}
            row |= {"queries": len(task.queries), "ranked": round(float(np.mean(sizes)), 1)}
            row |= {"groups": len(set(task.groups or ())), "query": shown(task.queries[0]), "right": right}
            rows.append(row)
    return pd.DataFrame(rows)


def shown(item: Item) -> str:
    """An item in words; images by name."""
    return " ".join(part if isinstance(part, str) else f"<{part.name}>" for part in item.parts).strip()


def false_captions(loaded: Loaded) -> pd.DataFrame:
    """One true caption and the false one beside it, of every set and group of pairs."""
    rows = []
    for source, tasks in loaded:
        for task in (t for t in tasks if t.name == "pairs"):
            groups = list(task.groups or [""] * len(task.queries))
            for group in dict.fromkeys(groups):
                true, false = (task.candidates[row].text for row in task.galleries[groups.index(group)])
                rows.append((source.name, group, true, false, groups.count(group)))
    return pd.DataFrame(rows, columns=["set", "group", "true", "false", "queries"])


def table(hits: pd.DataFrame, samples: int, seed: int) -> pd.DataFrame:
    """Scores with 95 % intervals over queries: a row per group, and for "" the mean of the groups' means.

    Args:
        hits: `score` of several sets, or `measure`. samples: of the bootstrap, which resamples inside the
            groups.

    Returns:
        what names a task and metric (of model, question, kind, set, task, metric, reported), group, value,
        ci_low, ci_high, n, chance. A task of one group has no row for it.
    """
    keys = [c for c in ("model", "question", "kind", "set", "task", "metric", "reported") if c in hits]
    by, scope = [*keys, "group"], (seed, "unseen")
    means = statistics.scores(
        hits.assign(part=hits["group"], group=""), by, samples, scope, "part", ["chance"]
    )
    several = hits[hits.groupby(keys)["group"].transform("nunique") > 1]
    rows = pd.concat([means, statistics.scores(several, by, samples, scope, means=["chance"])])
    rows = rows.iloc[np.argsort(rows.groupby(keys, sort=False).ngroup(), kind="stable")].reset_index(
        drop=True
    )
    return rows.astype({"reported": bool})


def headline(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of `table` or `differences` that a summary needs.

    They are those of the reported metrics; of vendors each group, of other questions the mean of the groups.
    """
    of_group = results["group"] != ""
    return results[results["reported"].astype(bool) & ((results["question"] == GROUPED_QUESTION) == of_group)]


def side_by_side(results: pd.DataFrame, question: str) -> pd.DataFrame:
    """One question of `table` in percent, a column with value and interval per model; chance in percent."""
    rows = results[results["question"] == question]
    rows = rows.assign(cell=percent_cells(rows), chance=(100 * rows["chance"]).round(1))
    wide = rows.pivot(index=["metric", "set", "group", "n", "chance"], columns="model", values="cell")
    return wide[list(dict.fromkeys(rows["model"]))].sort_index(sort_remaining=False, level="metric")


def shifts(hits: pd.DataFrame, model: str, samples: int, seed: int) -> pd.DataFrame:
    """Differences of one model's hit rate by unseen vendor, unseen composition and another language.

    Args:
        hits: `measure` of the embedded collection's own rows, in which a query's number means the same
            drawing in every vendor and language. samples: of the bootstrap.

    Returns:
        what, value, ci_low, ci_high (shares), n: vendors and languages are paired over drawings; compositions
        are other drawings. The third row is the first less the second: of which of the two the loss is
        larger. Empty without those rows.
    """
    rows = hits[(hits["model"] == model) & hits["reported"].astype(bool)]
    wide = rows[rows["question"].isin(["vendor", "language"])].pivot(
        index="query", columns="set", values="value"
    )
    out = []
    if {"trained vendor", "unseen vendor"} <= set(wide):
        group = rows[rows["set"] == "unseen vendor"].set_index("query")["group"]
        known, unseen = (wide[group.reindex(wide.index) == name] for name in COMPOSITIONS)
        losses = [part["unseen vendor"] - part["trained vendor"] for part in (known, unseen)]
        means = [part[["unseen vendor", "trained vendor"]].mean(axis=1) for part in (unseen, known)]
        parts = {
            "an unseen vendor": (1, losses),
            "an unseen composition": (2, [means[0], -means[1]]),  # a difference is twice its halves' mean
            "the vendor's change less the composition's": (
                2,
                [known["unseen vendor"], -unseen["trained vendor"]],
            ),
        }
        languages = [name for name in rows["set"].unique() if name in wide and "vendor" not in name]
        parts |= {name: (1, [wide[name] - wide["unseen vendor"]]) for name in languages}
        for what, (factor, groups) in parts.items():
            values = [part.to_numpy() for part in groups]
            ends = metrics.interval(values, samples, distributed.rng_for(seed, "shifts", what))
            mean = float(np.mean([part.mean() for part in values]))
            low, high = (factor * end for end in ends)
            out.append((what, factor * mean, low, high, len(wide)))
    return pd.DataFrame(out, columns=["what", "value", "ci_low", "ci_high", "n"])


def differences(
    hits: pd.DataFrame, new: str, old: str, samples: int, seed: int, reported: dict
) -> pd.DataFrame:
    """`table` of the paired differences of two models; columns new and old name them.

    Args:
        reported: the paper's numbers. Column paper: what its model gains over its baseline, in points, where
            a set asks the same.
    """
    query = ["question", "kind", "set", "task", "group", "query", "metric", "reported"]
    values = statistics.paired(hits, query, new, old).assign(chance=np.nan)
    out = table(values, samples, seed).drop(columns="chance").assign(new=new, old=old)
    baseline, model = reported["table2"]["rows"].values()
    gains = pd.Series(np.subtract(model, baseline).round(1), reported["table2"]["columns"])
    columns, tasks = _table2_columns(), zip(out["kind"], out["task"], out["metric"], strict=True)
    paper = pd.Series([gains.get(columns.get(task), np.nan) for task in tasks], out.index, dtype=float)
    return out.assign(paper=paper.where(out["question"].isin(PAPER_QUESTIONS) & (out["group"] == "")))


def _table2_columns() -> dict[tuple[str, str, str], str]:
    """Column of the paper's Table 2 by set, task and metric."""
    columns = {}
    for name, kind in SETS.items():
        for task, column in kind.columns.items():
            metric = column.rpartition(" ")[2].replace("R@", "hit@").replace("MAP", "map")
            columns[name, task, metric] = column
    return columns


def table2(results: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table 2: a row per model, in percent, in its column order; NaN where nothing was measured.

    Args:
        results: `table` of sets under their names in SETS.
    """
    columns = {column: task for task, column in _table2_columns().items()}
    order = sorted(columns, key=lambda c: 0 if " t2i " in c else 1 if " i2t " in c else 2)
    rows = []
    for model, scores in results[results["group"] == ""].groupby("model", sort=False):
        values = scores.set_index(["set", "task", "metric"])["value"]
        rows.append({"model": model} | {c: 100 * values.get(columns[c], np.nan) for c in order})
    return pd.DataFrame(rows, columns=["model", *order])


def submission(task: Task, vectors: Vectors) -> dict[str, list[int]]:
    """CIRCO's answer file: per query id the ids of the first 50 images, best first."""
    queries, images = task.ids
    top = search.exact(vectors(task.queries)[:], vectors(task.candidates), min(SUBMITTED, len(images))).rows
    return {str(query): [images[row] for row in rows] for query, rows in zip(queries, top, strict=True)}


def check(folder: Path, names: Sequence[str], *, decode: bool) -> tuple[list[str], list[str]]:
    """Problems and notes of all sets of a folder."""
    problems, notes = [], []
    for name in caption_sets.present(folder, names):
        of_set = caption_sets.lint(name, folder / SETS[name].folder, decode=decode)
        problems += of_set[0]
        notes += of_set[1]
    return problems, notes


def run(
    folder: Path,
    names: Sequence[str],
    vectors: Vectors,
    out: Path,
    *,
    model: str,
    encoding: str,
    samples: int,
) -> pd.DataFrame | None:
    """Scores the sets of a folder with one model.

    Writes out/results.csv, table2.csv, table2.md and, of CIRCO's test split, circo_test.json; those of an
    earlier call are gone, whether this one has their sets or not.

    Returns:
        the long table; None in a process that is not the main one, which only embeds.

    Raises:
        ValueError: `out` cannot be written.
    """
    hits, out, submissions = [], results_folder(out), {}
    for name in caption_sets.present(folder, names):
        tasks = caption_sets.load(name, folder / SETS[name].folder, encoding=encoding)
        if not distributed.processes().is_main_process:
            for task in tasks:
                vectors(task.queries), vectors(task.candidates)
            continue
        hits.append(score(name, tasks, vectors).assign(model=model))
        for task in tasks:
            if task.ids and not any(task.positives):
                submissions[f"{name}_{task.name}.json"] = json.dumps(submission(task, vectors))
    if not hits:
        return None
    results = table(pd.concat(hits), samples, 0).assign(encoding=encoding)
    official = table2(results)
    tables = {"results.csv": results.to_csv(index=False), "table2.csv": official.to_csv(index=False)}
    contents = submissions | tables | {"table2.md": markdown_table(official)}
    for old in (*contents, *(f"{name}_test.json" for name in SETS)):  # a kill leaves no two calls' files
        (out / old).unlink(missing_ok=True)
    for name, content in contents.items():
        files.write_whole(out / name, content)
    return results
