"""What a study says: arms side by side over seeds and queries, paired differences, sample efficiency. Percent throughout.

table = comparisons.differences(found, [("stage 3", "stage 2")], k=5, samples=1000)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from elva_core.config import Settings
from elva_core.evaluation import benchmark, statistics
from elva_core.experiments import study

OTHER = "other arms of the study"  # source of what the paper has no figure for


def averaged(found: study.Study, names: Sequence[str], cutoffs: Sequence[int]) -> pd.DataFrame:
    """Hits of each query, averaged over the seeds that all of `names` have: model, unit, qid, hit@k, as `claims.comparison` takes them."""
    seeds = shared_seeds(found, names)
    own = found.hits[found.hits["arm"].isin(names) & found.hits["seed"].isin(seeds)]
    scores = pd.DataFrame({f"hit@{k}": (own["rank"] <= k).astype(float) for k in cutoffs})
    table = pd.concat([own[["arm", "unit", "qid"]].rename(columns={"arm": "model"}), scores], axis=1)
    return table.groupby(["model", "unit", "qid"], sort=False, as_index=False).mean()


def shared_seeds(found: study.Study, names: Sequence[str]) -> list[int]:
    """The seeds under which all of these arms were trained."""
    return sorted(
        set.intersection(*(set(found.runs.loc[found.runs["arm"] == name, "seed"]) for name in names))
    )


def scores(found: study.Study, names: Sequence[str], k: int, samples: int) -> pd.DataFrame:
    """Each arm on every MRBench unit and on average; arms without a result are left out.

    Returns:
        arm, unit, value (mean over its seeds), ci_low and ci_high (over queries), by seed (tuple), spread (standard
        deviation over seeds), n queries, seeds (tuple).
    """
    rows = []
    for name in names:
        seeds = shared_seeds(found, [name])
        if not seeds:
            continue
        table = benchmark.mrbench_table(averaged(found, [name], [k]), [k], samples, 0)
        single = [
            benchmark.mrbench_table(
                averaged(replace(found, runs=found.runs[found.runs["seed"] == seed]), [name], [k]), [k], 1, 0
            )
            for seed in seeds
        ]
        for r in table.itertuples():
            by_seed = tuple(100 * float(t.loc[t["unit"] == r.unit, "value"].iloc[0]) for t in single)
            spread = float(np.std(by_seed, ddof=1)) if len(seeds) > 1 else np.nan
            value, low, high = (100 * x for x in (r.value, r.ci_low, r.ci_high))
            rows.append([name, r.unit, value, low, high, by_seed, spread, r.n, tuple(seeds)])
    return pd.DataFrame(
        rows, columns=["arm", "unit", "value", "ci_low", "ci_high", "by seed", "spread", "n", "seeds"]
    )


def differences(found: study.Study, pairs: Sequence[tuple[str, str]], k: int, samples: int) -> pd.DataFrame:
    """Paired differences of the MRBench average, in percentage points, over the seeds that both arms have.

    Returns:
        arm ("new over old"), new, old, value, ci_low, ci_high (queries resampled inside each task), relative (percent
        of old) with its interval, by seed (tuple), n, seeds (tuple).
    """
    rows = []
    for new, old in pairs:
        seeds = shared_seeds(found, [new, old])
        if not seeds:
            continue
        pair = statistics.comparison(averaged(found, [new, old], [k]), new, old, k, samples, 0)
        by_seed = []
        for seed in seeds:
            one = replace(found, runs=found.runs[found.runs["seed"] == seed])
            by_seed.append(
                100 * statistics.comparison(averaged(one, [new, old], [k]), new, old, k, 1, 0)["difference"]
            )
        value, low, high = (100 * pair[x] for x in ("difference", "ci_low", "ci_high"))
        relative = [
            x / (pair["old value"] or np.nan) for x in (value, low, high)
        ]  # of nothing there is no percentage
        rows.append(
            [
                f"{new} over {old}",
                new,
                old,
                value,
                low,
                high,
                *relative,
                tuple(by_seed),
                pair["n"],
                tuple(seeds),
            ]
        )
    columns = [
        "arm",
        "new",
        "old",
        "value",
        "ci_low",
        "ci_high",
        "relative",
        "relative low",
        "relative high",
        "by seed",
        "n",
        "seeds",
    ]
    return pd.DataFrame(rows, columns=columns)


def pairs(chosen: dict[str, study.Arm], group: str) -> list[tuple[str, str]]:
    """(new, old) of every comparison that the arms of a group ask for, among the arms there are."""
    return [
        (name, old)
        for name, arm in chosen.items()
        if arm.group == group
        for old in arm.against
        if old in chosen
    ]


def beside_paper(table: pd.DataFrame, chosen: dict[str, study.Arm]) -> pd.DataFrame:
    """`differences` with what the paper prints for the same change, in points of the average that it compares, and where ("source")."""
    reported = statistics.reported()
    printed = {
        name: reported[arm.paper[0]]["rows"][arm.paper[1]][-1] if arm.paper else np.nan
        for name, arm in chosen.items()
    }
    paper = [printed[new] - printed[old] for new, old in zip(table["new"], table["old"], strict=True)]
    sources = [
        reported[chosen[new].paper[0]]["source"] if p == p else OTHER
        for new, p in zip(table["new"], paper, strict=True)
    ]
    return table.assign(paper=paper, source=sources)


def on_units(found: study.Study) -> study.Study:
    """The study with the queries of the units that arms name in the place of MRBench's."""
    return replace(found, hits=found.units)


def efficiency(found: study.Study, settings: Settings, k: int, samples: int) -> pd.DataFrame:
    """Points of the sample-efficiency curves, first seed: run, queries seen, seconds of training, value, ci_low, ci_high, n."""
    rows = []
    for name, arm in study.arms(settings).items():
        own = found.runs[(found.runs["arm"] == name) & (found.runs["seed"] == settings.study.seeds[0])]
        if not arm.curves or own.empty:
            continue
        changed = arm.applied(settings)
        seen = {
            "nothing": 0,
            "stage3": changed.stage3.queries,
            "control": changed.control.steps * changed.control.batch,
        }[arm.trains]
        last = scores(replace(found, runs=own), [name], k, samples).query("unit == 'average'").iloc[0]
        rows += [
            [curve, seen, own["train_s"].iloc[0], *last[["value", "ci_low", "ci_high", "n"]]]
            for curve in arm.curves
        ]
    return pd.DataFrame(rows, columns=["run", "queries", "seconds", "value", "ci_low", "ci_high", "n"])


def overtakes(curves: pd.DataFrame, new: str, old: str) -> int | None:
    """Fewest queries, among the points measured, from which `new` stays above `old` (linear between its points); None if it does not.

    Both have points.

    >>> points = [["a", 0, 1.0], ["a", 10, 2.0], ["a", 20, 4.0], ["b", 0, 1.0], ["b", 20, 3.0]]
    >>> overtakes(pd.DataFrame(points, columns=["run", "queries", "value"]), "a", "b")
    20
    """
    ours, theirs = (curves[curves["run"] == name].sort_values("queries") for name in (new, old))
    above = ours["value"].to_numpy() > np.interp(ours["queries"], theirs["queries"], theirs["value"])
    last_below = np.flatnonzero(~above)[-1] if (~above).any() else -1
    return int(ours["queries"].iloc[last_below + 1]) if last_below + 1 < len(ours) else None


def said(curves: pd.DataFrame, new: str, old: str) -> str:
    """What the curves show, as a title."""
    if absent := [name for name in (new, old) if name not in set(curves["run"])]:
        return f"Not trained in this study: {' and '.join(absent)}"
    passed = overtakes(curves, new, old)
    return (
        f"Mean of {new} above that of {old} from {passed:,} queries on"
        if passed is not None
        else f"{new} does not pass {old}"
    )
