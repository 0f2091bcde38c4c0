"""Tables of a study, in percent: arms side by side over seeds, paired differences, sample efficiency.

table = compare.differences(study, [("stage 3", "stage 2")], k=5, samples=1000)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from elva_core.config import Settings
from elva_core.evaluation import benchmark, grains, statistics
from elva_core.experiments.results import NUMBERS, seed_label
from elva_core.experiments.study import Arm, Study, arms
from elva_core.tables import number, signed

OTHER = "other arms of the study"  # experiment of what the paper has no figure for


def averaged(study: Study, names: Sequence[str], cutoffs: Sequence[int]) -> pd.DataFrame:
    """Hits of each query, averaged over the seeds that all of `names` have.

    Returns:
        model, unit, qid and a column hit@k for each cut-off, as `statistics.comparison` takes them.
    """
    seeds = shared_seeds(study, names)
    ranks = study.hits[study.hits["arm"].isin(names) & study.hits["seed"].isin(seeds)]
    hits = {f"hit@{k}": (ranks["rank"] <= k).astype(float) for k in cutoffs}
    table = ranks[["arm", "unit", "qid"]].rename(columns={"arm": "model"}).assign(**hits)
    return table.groupby(["model", "unit", "qid"], sort=False, as_index=False).mean()


def shared_seeds(study: Study, names: Sequence[str]) -> list[int]:
    """The seeds under which all of these arms were trained."""
    trained = study.runs.groupby("arm")["seed"].agg(set)
    each = [trained.get(name, set()) for name in names]
    return sorted(set.intersection(*each)) if each else []


def _single(study: Study, seed: int) -> Study:
    """The study as if it had one seed."""
    return replace(study, runs=study.runs[study.runs["seed"] == seed])


def scores(study: Study, names: Sequence[str], k: int, samples: int) -> pd.DataFrame:
    """Each arm on every MRBench unit and on average; arms without a result are left out.

    Returns:
        model (the arm), unit, metric, value (mean over its seeds), ci_low and ci_high (over queries), by seed
        (tuple), spread (standard deviation over seeds), n queries, seeds (tuple), seed (both in words).
    """
    rows = []
    for name in names:
        seeds = shared_seeds(study, [name])
        if not seeds:
            continue
        table = benchmark.mrbench_table(averaged(study, [name], [k]), [k], samples, 0)
        single = [
            benchmark.mrbench_table(averaged(_single(study, s), [name], [k]), [k], 1, 0).set_index("unit")[
                "value"
            ]
            for s in seeds
        ]
        for row in table.to_dict("records"):
            by_seed = tuple(100 * float(values[row["unit"]]) for values in single)
            spread = float(np.std(by_seed, ddof=1)) if len(seeds) > 1 else np.nan
            row |= {column: 100 * row[column] for column in NUMBERS}
            words = seed_label(seeds, spread)
            rows.append(row | {"by seed": by_seed, "spread": spread, "seeds": tuple(seeds), "seed": words})
    columns = ["model", "unit", "metric", *NUMBERS, "by seed", "spread", "n", "seeds", "seed"]
    return pd.DataFrame(rows, columns=columns)


def differences(study: Study, pairs: Sequence[tuple[str, str]], k: int, samples: int) -> pd.DataFrame:
    """Paired differences of the MRBench average, in percentage points, over the seeds that both arms have.

    Returns:
        arm ("new over old"), new, old, metric, value, ci_low, ci_high (queries resampled inside each task),
        relative (percent of old) with its interval, by seed (tuple), n, seeds (tuple), seed (in words).
    """
    rows = []
    for new, old in pairs:
        seeds = shared_seeds(study, [new, old])
        if not seeds:
            continue
        pair = statistics.comparison(averaged(study, [new, old], [k]), new, old, k, samples, 0)
        row = pair | {column: 100 * pair[column] for column in NUMBERS} | {"arm": f"{new} over {old}"}
        row |= {"by seed": by_seed(study, new, old, k), "seeds": tuple(seeds), "seed": seed_label(seeds)}
        rows.append(row)
    columns = ["arm", "new", "old", "metric", *NUMBERS, "relative", "relative low", "relative high"]
    return pd.DataFrame(rows, columns=[*columns, "by seed", "n", "seeds", "seed"])


def overview(study: Study, table: pd.DataFrame, samples: int) -> pd.DataFrame:
    """`differences` as people read them, with those at hit@1 beside the cut-off that they have.

    Returns:
        arm, over (the two that are compared); points and percent at each cut-off, with their intervals;
        points by seed at the table's own; n queries; seed (in words).
    """
    cells = {"arm": list(table["new"]), "over": list(table["old"])}
    first = differences(study, list(zip(table["new"], table["old"], strict=True)), 1, samples)
    for rows in (first, table):
        for unit, names in {"points": NUMBERS, "%": ["relative", "relative low", "relative high"]}.items():
            said = [number(*row, "", sign=True) for row in rows[names].itertuples(index=False)]
            cells |= {f"{metric}, {unit}": said for metric in rows["metric"].unique()}
    seeds = [" ".join(signed(values)) for values in table["by seed"]]
    return pd.DataFrame(cells | {"by seed": seeds, "n": list(table["n"]), "seed": list(table["seed"])})


def queries_seen(settings: Settings, arm: Arm) -> int:
    """Queries of an arm's own training, on top of its stage 2."""
    changed = arm.applied(settings)
    return {"nothing": 0, "stage3": changed.stage3.queries, "control": changed.control.queries}[arm.trains]


def costs(study: Study, settings: Settings) -> pd.DataFrame:
    """Cost of each arm's own training: seeds with a result, queries, steps, median seconds."""
    there = study.runs.groupby("arm", sort=False)
    table = there.agg(seeds=("seed", "count"), steps=("steps", "first"), seconds=("train_s", "median"))
    seen = {name: queries_seen(settings, arm) for name, arm in arms(settings).items()}
    table.insert(1, "queries", table.index.map(seen))
    return table.reset_index()


def by_seed(study: Study, new: str, old: str, k: int) -> tuple[float, ...]:
    """Points of hit@k between two arms under each of their shared seeds alone, in the order of the seeds."""
    alone = [averaged(_single(study, seed), [new, old], [k]) for seed in shared_seeds(study, [new, old])]
    return tuple(100 * statistics.comparison(hits, new, old, k, 1, 0)["value"] for hits in alone)


def distances(study: Study, compared: Sequence[tuple[str, str]], samples: int) -> pd.DataFrame:
    """Grain distance of each arm, and paired differences, over the seeds that all of these arms have.

    Args:
        compared: (new, old); an arm without a result is left out.

    Returns:
        `grains.mean_distance` with arm ("new over old"), by seed (tuple of means; of a pair, of differences),
        seeds (tuple) and seed (in words).
    """
    trained = set(study.runs["arm"])
    names = [name for name in dict.fromkeys(sum(compared, ())) if name in trained]
    seeds = shared_seeds(study, names)
    rows = study.distances.rename(columns={"arm": "model"})
    rows = rows[rows["model"].isin(names) & rows["seed"].isin(seeds)]
    queries = rows.groupby(["seed", "model", "qid"])["distance"].mean()
    each = queries.groupby(["seed", "model"]).mean().unstack()
    table = grains.mean_distance(rows, samples, compared)
    alone = [
        tuple(each[row.model] - (each[row.baseline] if row.baseline else 0.0)) for row in table.itertuples()
    ]
    table["arm"] = table["model"] + (" over " + table["baseline"]).where(table["baseline"] != "", "")
    return table.assign(**{"by seed": alone, "seeds": [tuple(seeds)] * len(table), "seed": seed_label(seeds)})


def pairs(chosen: dict[str, Arm], *groups: str) -> list[tuple[str, str]]:
    """(new, old) of every comparison that the arms of these groups ask for, among the arms there are."""
    members = {name: arm for name, arm in chosen.items() if arm.group in groups}
    return [(name, old) for name, arm in members.items() for old in arm.against if old in chosen]


def beside_paper(table: pd.DataFrame, chosen: dict[str, Arm]) -> pd.DataFrame:
    """`differences` with what the paper prints for the same change.

    Returns:
        the table with paper (points of the average that the paper compares) and experiment (its table, else
        OTHER).
    """
    reported = statistics.reported()
    beside = {name: arm.paper for name, arm in chosen.items() if arm.paper}
    printed = {name: reported[place]["rows"][row][-1] for name, (place, row) in beside.items()}
    sources = {name: reported[place]["source"] for name, (place, _) in beside.items()}
    paper = table["new"].map(printed) - table["old"].map(printed)
    return table.assign(paper=paper, experiment=table["new"].map(sources).where(paper.notna(), OTHER))


def speeds(study: Study) -> pd.DataFrame:
    """Arms whose queries were timed: what a summary costs beside what it finds, means over seeds.

    Returns:
        arm, hit@5 (%), passes (of the language model that a query waits for, 2 without a summary), queries a
        second, seeds.
    """
    columns = {"hit@5": "hit@5", "passes": "query_passes", "queries a second": "queries_s"}
    runs = study.runs.reindex(columns=["arm", "seed", *columns.values()]).dropna()
    means = {name: runs.groupby("arm", sort=False)[column].mean() for name, column in columns.items()}
    table = pd.DataFrame(means | {"seeds": runs.groupby("arm", sort=False)["seed"].count()})
    return table.assign(**{"hit@5": 100 * table["hit@5"]}).reset_index()


def most_lacking(study: Study, name: str) -> str:
    """The grain that an arm's wrong first answers lack most often, and least, in words; all its seeds."""
    errors = study.errors[study.errors["arm"] == name] if len(study.errors) else study.errors
    if errors.empty:
        return f"No error of {name} was counted."
    sums = errors.groupby("kind")[["sum", "count"]].sum()
    shares = (100 * sums["sum"] / sums["count"]).sort_values(ascending=False)
    ends = [f"{kind} ({shares[kind]:.1f} % of {sums.loc[kind, 'count']:,})" for kind in shares.index]
    rest = f", and {ends[-1]} least often" if len(ends) > 1 else ""
    seeds = f"{errors['seed'].nunique()} seeds together"
    return f"Wrong first answers of {name} lack {ends[0]} most often{rest}, {seeds}."


def on_units(study: Study) -> Study:
    """The study with the queries of the units that arms name in the place of MRBench's."""
    return replace(study, hits=study.units)


BASE = "stage 2"  # where the curves of sample efficiency begin


def efficiency(study: Study, settings: Settings, k: int, samples: int) -> pd.DataFrame:
    """Points of the sample-efficiency curves, first seed: paired differences to stage 2, where they begin.

    Returns:
        run, queries (seen in training), seconds (of training), value, ci_low, ci_high (points of hit@k), n.
    """
    rows, first = [], _single(study, settings.study.seeds[0])
    for name, arm in arms(settings).items():
        run = first.runs[first.runs["arm"] == name]
        if not arm.curves or run.empty or BASE not in set(first.runs["arm"]):
            continue
        asked = first.hits[first.hits["arm"] == BASE].drop_duplicates(["unit", "qid"])
        pair = dict.fromkeys(NUMBERS, 0.0) | {"n": len(asked)}
        if name != BASE:
            hits = averaged(first, [name, BASE], [k])
            pair = statistics.comparison(hits, name, BASE, k, samples, 0)
            pair |= {column: 100 * pair[column] for column in NUMBERS}
        point = {"queries": queries_seen(settings, arm), "seconds": run["train_s"].iloc[0]}
        point |= {column: pair[column] for column in (*NUMBERS, "n")}
        rows += [{"run": curve} | point for curve in arm.curves]
    return pd.DataFrame(rows, columns=["run", "queries", "seconds", *NUMBERS, "n"])
