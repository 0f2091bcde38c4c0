"""Scores of strata and paired differences, the audit of the printed figures, and the one verdict."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elva_core import distributed
from elva_core.evaluation import statistics
from elva_core.retrieval import metrics

numbers = st.floats(-100, 100, allow_nan=False)
intervals = st.tuples(numbers, numbers).map(sorted)


@given(st.floats(0.01, 50), intervals)
def test_exactly_one_of_four_verdicts_holds_of_a_difference(paper, interval):
    low, high = interval
    holds = {
        "reproduced": low > 0 and high >= paper,
        "same direction": low > 0 and high < paper,
        "inconclusive": low <= 0 and high >= paper / 2,
        "contradicted": low <= 0 and high < paper / 2,
    }
    assert sum(holds.values()) == 1 and holds[statistics.verdict(paper, low, high, difference=True)]


@given(st.floats(0.01, 50), intervals)
def test_a_difference_and_its_mirror_have_the_same_verdict(paper, interval):
    low, high = interval
    mirrored = statistics.verdict(-paper, -high, -low, difference=True)
    assert mirrored == statistics.verdict(paper, low, high, difference=True)


@given(st.floats(0.01, 50), intervals)
def test_an_interval_that_holds_the_papers_value_never_contradicts_it(paper, interval):
    low, high = min(interval[0], paper), max(interval[1], paper)
    assert statistics.verdict(paper, low, high, difference=True) in ("reproduced", "inconclusive")


def test_a_score_in_the_papers_setting_is_reproduced_if_its_interval_reaches_the_papers():
    assert statistics.verdict(50.0, 40.0, 50.0, difference=False) == "reproduced"
    assert statistics.verdict(50.0, 60.0, 70.0, difference=False) == "reproduced"
    assert statistics.verdict(50.0, 40.0, 49.9, difference=False) == "below"
    with pytest.raises(ValueError, match="no direction"):
        statistics.verdict(0.0, -1.0, 1.0, difference=True)


def test_a_comparison_is_paired_and_weighs_tasks_equally():
    rng = np.random.default_rng(0)
    rows = []
    for unit, base in (("a", 0.2), ("b", 0.6)):
        for q in range(400):
            u = rng.random()
            rows += [{"model": m, "unit": unit, "qid": str(q), "hit@5": float(u < base + d)} for m, d in (("old", 0), ("new", 0.1))]
    table = pd.DataFrame(rows)
    row = statistics.comparison(table, "new", "old", 5, 500, 0)
    by_hand = table.groupby(["model", "unit"])["hit@5"].mean().groupby("model").mean()
    assert row["value"] == pytest.approx(by_hand["new"] - by_hand["old"])
    assert row["ci_low"] < row["value"] < row["ci_high"]
    # paired: the difference is 0 or 1, its standard error sqrt(0.1 * 0.9 / 800) = 0.011, far below the unpaired 0.022
    assert row["ci_high"] - row["ci_low"] < 2 * 1.96 * 0.014
    relative = [row["relative low"], row["relative"], row["relative high"]]
    assert relative == pytest.approx([100 * row[x] / by_hand["old"] for x in ("ci_low", "value", "ci_high")])


def test_the_audit_finds_the_figures_that_do_not_add_up():
    audit = statistics.audit(statistics.reported()).set_index("what")
    assert audit.loc["Table 6, Qwen2-VL-7B: mean of 4 columns", "recomputed"] == 24.4
    assert not audit.loc["Table 6, Qwen2-VL-7B: mean of 4 columns", "agrees"]
    assert audit.loc["Table 1, ELVA-7B: mean of 16 columns", "recomputed"] == 58.64


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
    low, high = metrics.interval(strata, 20, distributed.rng_for(7, "x", "old"))
    expected = [np.mean([s.mean() for s in strata]), low, high, 39]
    assert table.loc["old"].tolist() == expected and table.index.tolist() == ["new", "old"]
    plain = statistics.scores(hits, ["model", "task"], 20, lambda model, task: (7, task)).set_index(["model", "task"])
    interval = metrics.interval([strata[0]], 20, distributed.rng_for(7, "b"))
    assert plain.loc[("old", "b"), ["ci_low", "ci_high"]].tolist() == list(interval)
    assert list(statistics.scores(hits[:0], ["model"], 20, (7,)).columns) == ["model", "value", "ci_low", "ci_high", "n"]


def test_a_paired_difference_joins_queries_by_name_and_turns_its_sign(hits):
    there, back = (statistics.paired(hits, ["task", "qid"], *pair) for pair in (("new", "old"), ("old", "new")))
    values = hits.set_index(["model", "task", "qid"])["value"]
    assert there["value"].tolist() == [values["new", r.task, r.qid] - values["old", r.task, r.qid] for r in there.itertuples()]
    assert there["value"].tolist() == (-back["value"]).tolist() and len(there) == 39


def test_a_share_is_a_ratio_of_averages_over_tasks_and_no_number_where_the_whole_may_be_nothing():
    """Task a gains 2 of 4 points from the part, task b 1 of 1: averages 1.5 and 2.5, not the mean of the two ratios."""
    rows = [("a", 2.0, 4.0)] * 10 + [("b", 1.0, 1.0)] * 30
    table = pd.DataFrame(rows, columns=["unit", "part", "whole"])
    assert statistics.share(table, "part", "whole", 50, (0, "x")) == {"value": 0.6, "ci_low": 0.6, "ci_high": 0.6, "n": 40}
    mixed = pd.DataFrame({"unit": "a", "part": 1.0, "whole": [1.0, -1.0] * 20})
    assert np.isnan(statistics.share(mixed, "part", "whole", 50, (0, "x"))["value"])
    # where both are the same the share is one in every draw: queries are resampled together
    paired = pd.DataFrame({"unit": "a", "part": np.arange(20.0), "whole": np.arange(20.0)})
    assert statistics.share(paired, "part", "whole", 50, (0, "x"))["ci_low"] == pytest.approx(1)
