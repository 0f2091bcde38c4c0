"""Statistics of every comparison: the paper's numbers, paired differences and their intervals."""

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
        new and old average, difference with 95 % interval (queries resampled inside each task), relative gain in %.
    """
    wide = hits.pivot(index=["unit", "qid"], columns="model", values=f"hit@{k}")
    groups = [part for _, part in wide.groupby(level="unit")]
    first, second = (float(np.mean([g[m].mean() for g in groups])) for m in (new, old))
    rng = distributed.rng_for(seed, "paired", new, old, k)
    low, high = metrics.stratified_interval([(g[new] - g[old]).to_numpy() for g in groups], samples, rng)
    return {
        "new": new,
        "old": old,
        "metric": f"hit@{k}",
        "new value": first,
        "old value": second,
        "difference": first - second,
        "ci_low": low,
        "ci_high": high,
        "relative %": 100 * (first / second - 1) if second else float("nan"),
        "n": len(wide),
    }


def percent(r) -> dict:
    """The numbers of a claim from a row of shares: value, ci_low, ci_high, n."""
    return {"ours": 100 * r.value, "ci_low": 100 * r.ci_low, "ci_high": 100 * r.ci_high, "n": r.n}
