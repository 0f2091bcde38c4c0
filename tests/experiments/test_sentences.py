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
