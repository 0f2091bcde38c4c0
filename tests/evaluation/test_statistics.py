"""Tables of scores: means of strata, their intervals, paired differences."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from elva_core import distributed
from elva_core.evaluation import statistics
from elva_core.retrieval import metrics


@pytest.fixture
def hits() -> pd.DataFrame:
    """Two models on the same queries of two tasks of unequal size, the queries in another order."""
    rng, sizes = np.random.default_rng(1), {"b": 9, "a": 30}
    rows = [(m, task, i, rng.random()) for m in ("new", "old") for task in sizes for i in rng.permutation(sizes[task])]
    return pd.DataFrame(rows, columns=["model", "task", "qid", "value"])


def test_a_stratified_score_is_the_mean_of_means_and_resamples_inside(hits):
    by_hand = hits[hits["model"] == "old"]
    strata = [by_hand[by_hand["task"] == task]["value"].to_numpy() for task in ("b", "a")]
    table = statistics.scores(hits, ["model"], 20, (7, "x"), "task").set_index("model")
    low, high = metrics.stratified_interval(strata, 20, distributed.rng_for(7, "x", "old"))
    expected = [np.mean([s.mean() for s in strata]), low, high, 39]
    assert table.loc["old"].tolist() == expected and table.index.tolist() == ["new", "old"]
    plain = statistics.scores(hits, ["model", "task"], 20, lambda model, task: (7, task)).set_index(["model", "task"])
    interval = metrics.bootstrap_interval(strata[0], 20, distributed.rng_for(7, "b"))
    assert plain.loc[("old", "b"), ["ci_low", "ci_high"]].tolist() == list(interval)
    assert list(statistics.scores(hits[:0], ["model"], 20, (7,)).columns) == ["model", "value", "ci_low", "ci_high", "n"]


def test_a_paired_difference_joins_queries_by_name_and_turns_its_sign(hits):
    there, back = (statistics.paired(hits, ["task", "qid"], *pair) for pair in (("new", "old"), ("old", "new")))
    values = hits.set_index(["model", "task", "qid"])["value"]
    assert there["value"].tolist() == [values["new", r.task, r.qid] - values["old", r.task, r.qid] for r in there.itertuples()]
    assert there["value"].tolist() == (-back["value"]).tolist() and len(there) == 39


def test_markdown_rounds_fractions_alone_and_leaves_holes_empty():
    table = pd.DataFrame({"a": ["x", "y"], "n": [3, 4], "share": [0.25, np.nan]})
    assert statistics.markdown_table(table) == "| a | n | share |\n| -- | -- | -- |\n| x | 3 | 0.2 |\n| y | 4 |  |\n"
