"""Statistics of every comparison: the paper's numbers, paired differences with intervals, the one verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from elva_core import config, distributed, files
from elva_core.retrieval import metrics


def reported() -> dict:
    """Every number of the paper, the only figures a person typed."""
    return files.read_yaml(config.PARAMS / "reported.yaml")


def audit(tables: dict) -> pd.DataFrame:
    """Recomputes every average and relative gain the paper prints, where it prints what they are made of."""
    rows = []
    for table in (t for t in tables.values() if "averaged" in t):
        for method, row in table["rows"].items():
            columns, printed = row[:-1], row[-1]
            what = f"{table['source']}, {method}: mean of {len(columns)} columns"
            rows.append((what, printed, round(float(np.mean(columns)), 2)))
    for gain in tables["relative_gains"]:
        new, old = (tables[gain["table"]]["rows"][gain[side]] for side in ("new", "old"))
        for basis, ratio in (
            ("printed averages", new[-1] / old[-1]),
            ("columns", np.mean(new[:-1]) / np.mean(old[:-1])),
        ):
            rows.append((f"{gain['what']} ({basis})", gain["printed"], round(100 * (ratio - 1), 2)))
    out = pd.DataFrame(rows, columns=["what", "printed", "recomputed"])
    return out.assign(agrees=(out["printed"] - out["recomputed"]).abs() < 0.1)


Scope = tuple | Callable[..., tuple]


def scores(
    hits: pd.DataFrame,
    by: Sequence[str],
    samples: int,
    scope: Scope,
    stratum: str | None = None,
    means: Sequence[str] = (),
) -> pd.DataFrame:
    """Mean over queries of every group of rows, with a 95 % bootstrap interval.

    Args:
        hits: one row per query with the columns of `by` and value.
        by: columns whose values name a group; groups come in the order in which they first appear.
        samples: of the bootstrap.
        scope: of the random stream (`distributed.rng_for`), the seed first: a tuple that the values of `by`
            are appended to, or a function of them.
        stratum: column inside a group, for instance the task of a query; then the value is the unweighted
            mean of the strata's means, and queries are resampled inside each of them.
        means: further columns to average in the same way, without interval.

    Returns:
        columns by, value, ci_low, ci_high, n (queries), means.
    """
    rows = []
    for names, group in hits.groupby(list(by), sort=False):
        strata = [part for _, part in group.groupby(stratum, sort=False)] if stratum else [group]
        stream = scope(*names) if callable(scope) else (*scope, *names)
        values = [part["value"].to_numpy() for part in strata]
        low, high = metrics.interval(values, samples, distributed.rng_for(*stream))
        averages = [float(np.mean([part[column].mean() for part in strata])) for column in ("value", *means)]
        rows.append([*names, averages[0], low, high, len(group), *averages[1:]])
    return pd.DataFrame(rows, columns=[*by, "value", "ci_low", "ci_high", "n", *means])


def paired(hits: pd.DataFrame, by: Sequence[str], new: str, old: str) -> pd.DataFrame:
    """Difference of two models on each query: columns by, new value, old value, value (new - old).

    Args:
        hits: one row per query and model with the columns of `by`, which name a query, and model and value.
    """
    wide = hits.pivot(index=list(by), columns="model", values="value").reindex(columns=[new, old])
    columns = {"new value": wide[new], "old value": wide[old], "value": wide[new] - wide[old]}
    return pd.DataFrame(columns).reset_index()


def comparison(hits: pd.DataFrame, new: str, old: str, k: int, samples: int, seed: int) -> dict:
    """Paired difference of two models on the MRBench average hit rate.

    Args:
        hits: one row per query and model with model, unit, qid and hit@k columns.

    Returns:
        new, old, metric; both averages; value: their difference with its 95 % interval ci_low, ci_high
        (queries resampled inside each task); relative, relative low, relative high: the same in percent of
        the old average, nan where that is zero; n queries.
    """
    metric = f"hit@{k}"
    values = hits[["unit", "qid", "model", metric]].rename(columns={metric: "value"})
    differences = paired(values, ["unit", "qid"], new, old).assign(new=new, old=old, metric=metric)
    scope, means = (seed, "paired", new, old, k), ["new value", "old value"]
    by = ["new", "old", "metric"]
    (row,) = scores(differences, by, samples, lambda *_: scope, "unit", means).to_dict("records")
    percent = 100 / row["old value"] if row["old value"] else float("nan")
    bounds = {"relative": "value", "relative low": "ci_low", "relative high": "ci_high"}
    return row | {name: percent * row[column] for name, column in bounds.items()}


def share(queries: pd.DataFrame, part: str, whole: str, samples: int, scope: tuple) -> dict[str, float]:
    """Ratio of two mean differences over the same queries.

    Args:
        queries: one row per query with the columns `part`, `whole` and unit; both averages are unweighted
            means of the units' means.
        scope: of the random stream, the seed first.

    Returns:
        value, ci_low, ci_high (95 % interval, both columns of a query resampled together inside its
        unit) and n; all but n are nan where the interval of the whole is not above zero: a share of
        nothing, or of a loss, means nothing.
    """
    groups = [group[[part, whole]].to_numpy(float) for _, group in queries.groupby("unit", sort=False)]
    rng, nan = distributed.rng_for(*scope), float("nan")
    result = {"value": nan, "ci_low": nan, "ci_high": nan, "n": len(queries)}
    if not groups:
        return result
    drawn = [[g[rng.integers(len(g), size=len(g))].mean(0) for _ in range(samples)] for g in groups]
    parts, wholes = np.mean(drawn, axis=0).T
    if np.percentile(wholes, 2.5) <= 0:
        return result
    value = np.divide(*np.mean([g.mean(0) for g in groups], axis=0))
    low, high = np.percentile(parts[wholes > 0] / wholes[wholes > 0], [2.5, 97.5])
    return result | {"value": float(value), "ci_low": float(low), "ci_high": float(high)}


RULE = (
    "Of a difference, signed so that the paper's direction is positive: *reproduced* if its interval lies "
    "above zero and reaches the paper's value, *same direction* if it only lies above zero; else "
    "*inconclusive* if it reaches half of the paper's value, *contradicted* if it does not. Of a score in "
    "the paper's own setting: *reproduced* if its interval reaches the paper's, else *below*. A score in "
    "another setting, and what the paper has no figure for, is a result without a verdict."
)


def over_seeds(points: Sequence[float]) -> tuple[float, float]:
    """95 % interval for the mean over training seeds: Student's t, which takes seeds as draws.

    Args:
        points: a value for each seed.

    Returns:
        (nan, nan) for fewer than three seeds, of which it would say nothing.

    >>> low, high = over_seeds((1.0, 2.0, 3.0))
    >>> round(low, 2), round(high, 2)
    (-0.48, 4.48)
    """
    if len(points) < 3:
        return float("nan"), float("nan")
    low, high = stats.t.interval(0.95, len(points) - 1, np.mean(points), stats.sem(points))
    return float(low), float(high)


def verdict(paper: float, low: float, high: float, *, difference: bool) -> str:
    """The verdict on one claim, by `RULE`.

    Args:
        paper: its value; of a difference the sign is the direction. low, high: the 95 % interval measured
            here.
        difference: of two models; else a score in the paper's own setting.

    Raises:
        ValueError: a difference of zero has no direction that could be reproduced.
    """
    if not difference:
        return "reproduced" if high >= paper else "below"
    if paper == 0:
        raise ValueError("a difference of zero has no direction; leave it without the paper's figure")
    if paper < 0:
        paper, low, high = -paper, -high, -low
    if low > 0:
        return "reproduced" if high >= paper else "same direction"
    return "inconclusive" if high >= paper / 2 else "contradicted"
