"""Sentences say what the intervals of their tables say, no more."""

from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from elva_core.experiments import sentences

ROW = {"new": "stage 3", "old": "stage 2", "metric": "hit@5", "n": 1200}


@given(st.floats(-1, 1), st.floats(0, 0.5))
def test_only_an_interval_without_zero_gives_a_direction(middle, half):
    pairs = pd.DataFrame([ROW | {"value": middle, "ci_low": middle - half, "ci_high": middle + half}])
    text = sentences.differences(pairs).data
    expected = "is higher than" if middle - half > 0 else "is lower than" if middle + half < 0 else "is inconclusive against"
    assert expected in text and "n = 1,200" in text


def test_scores_name_the_highest_and_the_lowest_with_their_intervals():
    table = pd.DataFrame(
        {"model": ["a", "b", "c"], "value": [0.2, 0.5, 0.3], "ci_low": [0.1, 0.4, 0.2], "ci_high": [0.3, 0.6, 0.4], "n": 10}
    )
    assert (
        sentences.scores(table, "model", "hit@5").data
        == "**Answer.** hit@5: highest for b (50.0 % [40.0, 60.0], n = 10), lowest for a (20.0 % [10.0, 30.0], n = 10)."
    )
    assert sentences.scores(table[:1], "model", "hit@5").data == "**Answer.** hit@5: a (20.0 % [10.0, 30.0], n = 10)."


def test_a_trend_is_named_only_beyond_the_noise_of_the_steps():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=200)
    history = pd.DataFrame({"up": np.arange(200) / 20 + noise, "flat": noise, "down": -np.arange(200) / 20 + noise})
    text = sentences.trend(history, {"up": "the reward", "flat": "the length", "down": "the loss"}).data
    assert "the reward rose" in text and "the length did not change clearly" in text and "the loss fell" in text
    assert "first against last 20 of 200 steps" in text


def test_changes_are_grouped_by_what_their_intervals_say():
    rows = [("a", 0.02, 0.01, 0.03), ("b", -0.02, -0.03, -0.01), ("c", 0.01, -0.01, 0.03), ("d", 0.0, 0.0, 0.0)]
    pairs = pd.DataFrame(rows, columns=["unit", "value", "ci_low", "ci_high"]).assign(n=[120, 780, 240, 240])
    said = sentences.changes(pairs, "unit", "stage 3 over stage 2").data
    assert "points: higher for a +2.0 [1.0, 3.0]; lower for b -2.0 [-3.0, -1.0]; inconclusive for c +1.0" in said
    assert said.endswith("the same for d +0.0 [0.0, 0.0] (n = 120 to 780 queries).")
    seeds = pairs[:1].assign(**{"by seed": [(1.0, -1.0)]})
    assert "a +2.0 [1.0, 3.0] (seeds disagree: -1.0 to +1.0)" in sentences.changes(seeds, "unit", "x").data
    assert sentences.changes(pairs[:0], "unit", "x", command="make study").data == "**Answer.** x: not run (make study)."


def test_a_training_is_above_only_from_where_no_longer_one_is_inconclusive():
    points = {800: (0.5, 2.0), 1600: (-0.5, 2.0), 3200: (0.2, 2.0)}
    rows = [{"run": "stage 3", "queries": q, "value": 1.0, "ci_low": low, "ci_high": high, "n": 9} for q, (low, high) in points.items()]
    start = {"run": "stage 3", "queries": 0, "value": 0.0, "ci_low": 0.0, "ci_high": 0.0, "n": 9}
    assert (
        "above stage 2 from 3,200 queries on (lengths tried: 3; 3,200 queries: +1.0 points [0.2, 2.0])"
        in sentences.lengths(pd.DataFrame([start, *rows])).data
    )
    rows[-1]["ci_low"] = -0.1
    assert "not clearly above stage 2 at its longest" in sentences.lengths(pd.DataFrame([start, *rows])).data
    assert sentences.lengths(pd.DataFrame([start])).data == "**Answer.** Not run."


def test_a_score_is_above_chance_only_where_its_interval_is():
    rows = [("a", 0.8, 0.6, 0.9), ("b", 0.6, 0.4, 0.8), ("c", 0.2, 0.1, 0.4)]
    table = pd.DataFrame(rows, columns=["set", "value", "ci_low", "ci_high"]).assign(chance=0.5, n=9)
    said = sentences.beside_chance(table, "set", "stage 3").data
    assert "above chance: a 80.0 % [60.0, 90.0] (50.0); below chance: c 20.0" in said and "not clearly off chance: b 60.0" in said
    assert sentences.beside_chance(table[:0], "set", "stage 3").data == "**Answer.** stage 3: not measured."
