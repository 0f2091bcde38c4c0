"""The one schema of everything that is measured; each notebook leaves its rows of it in measured.csv.

columns = of_chain(run, MRBENCH)
rows = pd.concat([scores(mrbench, **columns), gains(comparisons, **columns)])
run.save_table("measured", rows)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from elva_core.experiments import study
from elva_core.experiments.stages import Stage

# value, ci_low and ci_high are in the unit that `metric` names, percent for hit rates; ci is a 95 % interval
# over n queries. baseline: not empty where value is a paired difference of model and baseline. paper: the
# figure of the paper that is compared. backbone: hash of the weights that all models of the row started from.
NUMBERS = ["value", "ci_low", "ci_high"]
SCHEMA = [
    *["experiment", "model", "seed", "dataset", "unit", "group", "metric"],
    *[*NUMBERS, "n", "baseline", "paper", "backbone"],
]
TEXTS = [column for column in SCHEMA if column not in (*NUMBERS, "n", "paper")]
MRBENCH = "MRBench"  # the experiment behind the paper's main claims


def of_chain(run: Stage, experiment: str, dataset: str = "") -> dict[str, str]:
    """Columns of what the chain measures: experiment, dataset (MRBench if not given), seed, backbone."""
    backbone = study.chain_backbone(run.require("30_pretrain_contrastive"))
    dataset = dataset or f"{MRBENCH}-{run.settings.data.name}"
    return {
        "experiment": experiment,
        "dataset": dataset,
        "seed": seed_label([run.seed]),
        "backbone": backbone,
    }


def scores(table: pd.DataFrame, *, scale: float = 100.0, **columns: object) -> pd.DataFrame:
    """Rows of scores.

    Args:
        table: value, ci_low, ci_high, n and other columns of the schema by their names.
        scale: from the table's values to the metric's unit; 100 makes percent of shares.
        columns: of the schema, the same or a series for all rows, in place of the table's.
    """
    rows = table.assign(**columns).reindex(columns=SCHEMA)
    rows[[*NUMBERS, "paper"]] = rows[[*NUMBERS, "paper"]].astype(float)
    rows[NUMBERS] *= scale
    rows[TEXTS] = rows[TEXTS].astype(object).where(rows[TEXTS].notna(), "")
    return rows.reset_index(drop=True)


def gains(pairs: pd.DataFrame, **columns: object) -> pd.DataFrame:
    """Rows of paired differences relative to the baseline's value, in percent of it.

    Args:
        pairs: `statistics.comparison` of some pairs, or `compare.differences`.
    """
    relative = pairs[["relative", "relative low", "relative high"]].set_axis(NUMBERS, axis=1)
    return _differences(pairs.assign(**relative), "relative gain of ", ", %", 1.0, **columns)


def points(pairs: pd.DataFrame, *, scale: float = 100.0, **columns: object) -> pd.DataFrame:
    """Rows of paired differences in points.

    Args:
        pairs: new, old, metric and the difference as value. scale: as in `scores`.
    """
    return _differences(pairs, "difference of ", ", points", scale, **columns)


def _differences(pairs: pd.DataFrame, start: str, end: str, scale: float, **columns: object) -> pd.DataFrame:
    """Rows of paired differences, whose metric is that of the pairs with some words around it."""
    names = {"model": pairs["new"], "baseline": pairs["old"], "metric": start + pairs["metric"] + end}
    return scores(pairs, scale=scale, **names, **columns)


def speeds(table: pd.DataFrame, **columns: object) -> pd.DataFrame:
    """Rows of `throughput.measure` for queries: how many a second, and the forward passes of a single one."""
    queries = table[table["side"] == "queries"].assign(model=table["way"])
    rates = queries.assign(
        value=queries["per second"],
        metric=[f"queries per second, {batch} at a time" for batch in queries["batch"]],
    )
    single = queries[queries["batch"] == 1]  # in a larger batch all wait for the longest summary
    passes = single.assign(value=single["forwards"], metric="forward passes, queries")
    return scores(pd.concat([rates, passes]), scale=1.0, **columns)


def seed_label(seeds: Sequence[int], spread: float = np.nan) -> str:
    """Number of seeds, the seeds, and the standard deviation over them where it is known.

    >>> seed_label((17, 18), 0.25)
    '2 (17, 18), sd 0.2'
    """
    listed = ", ".join(map(str, seeds))
    return f"{len(seeds)} ({listed})" + (f", sd {spread:.1f}" if spread == spread else "")
