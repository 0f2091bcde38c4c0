"""Statistics of every comparison: the paper's numbers, paired differences with intervals, the one verdict."""

from __future__ import annotations

import numpy as np
import pandas as pd
import yaml

from elva_core import config, distributed
from elva_core.retrieval import metrics


def reported() -> dict:
    """Every number of the paper, the only figures a person typed."""
    return yaml.safe_load((config.PARAMS / "reported.yaml").read_text(encoding="utf-8"))


def audit(tables: dict) -> pd.DataFrame:
    """Recomputes every average and relative gain the paper prints, where it prints what they are made of."""
    rows = []
    for table in (t for t in tables.values() if "averaged" in t):
        for method, row in table["rows"].items():
            columns, printed = row[:-1], row[-1]
            what = f"{table['source']}, {method}: mean of {len(columns)} columns"
            rows.append({"what": what, "printed": printed, "recomputed": round(float(np.mean(columns)), 2)})
    for gain in tables["relative_gains"]:
        new, old = (tables[gain["table"]]["rows"][gain[side]] for side in ("new", "old"))
        for basis, ratio in (
            ("printed averages", new[-1] / old[-1]),
            ("columns", np.mean(new[:-1]) / np.mean(old[:-1])),
        ):
            rows.append(
                {
                    "what": f"{gain['what']} ({basis})",
                    "printed": gain["printed"],
                    "recomputed": round(100 * (ratio - 1), 2),
                }
            )
    out = pd.DataFrame(rows)
    return out.assign(agrees=(out["printed"] - out["recomputed"]).abs() < 0.1)


def comparison(hits: pd.DataFrame, new: str, old: str, k: int, samples: int, seed: int) -> dict:
    """Paired difference of two models on the MRBench average hit rate.

    Args:
        hits: one row per query and model with model, unit, qid and hit@k columns.

    Returns:
        new, old, metric; both averages; value: their difference with its 95 % interval ci_low, ci_high
        (queries resampled inside each task); relative, relative low, relative high: the same in percent of
        the old average, nan where that is zero; n queries.
    """
    wide = hits.pivot(index=["unit", "qid"], columns="model", values=f"hit@{k}")
    groups = [part for _, part in wide.groupby(level="unit")]
    first, second = (float(np.mean([g[m].mean() for g in groups])) for m in (new, old))
    rng = distributed.rng_for(seed, "paired", new, old, k)
    low, high = metrics.stratified_interval([(g[new] - g[old]).to_numpy() for g in groups], samples, rng)
    row = {"new": new, "old": old, "metric": f"hit@{k}", "new value": first, "old value": second}
    row |= {"value": first - second, "ci_low": low, "ci_high": high, "n": len(wide)}
    percent = 100 / second if second else float("nan")
    return row | {
        "relative": percent * (first - second),
        "relative low": percent * low,
        "relative high": percent * high,
    }


RULE = (
    "Of a difference, signed so that the paper's direction is positive: *reproduced* if its interval lies "
    "above zero and reaches the paper's value, *same direction* if it only lies above zero; else "
    "*inconclusive* if it reaches half of the paper's value, *contradicted* if it does not. Of a score in "
    "the paper's own setting: *reproduced* if its interval reaches the paper's, else *below*. A score in "
    "another setting, and what the paper has no figure for, is a result without a verdict."
)


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
