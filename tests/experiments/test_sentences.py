"""Sentences say what the intervals of their tables say, no more."""

from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from elva_core.experiments import reward_figures, sentences

ROW = {"new": "stage 3", "old": "stage 2", "metric": "hit@5", "n": 1200}


@given(st.floats(-1, 1), st.floats(0, 0.5))
def test_only_an_interval_without_zero_gives_a_direction(middle, half):
    pairs = pd.DataFrame([ROW | {"value": middle, "ci_low": middle - half, "ci_high": middle + half}])
    text = sentences.differences(pairs).data
    expected = "higher" if middle - half > 0 else "lower" if middle + half < 0 else "inconclusive"
    assert text.startswith(f"**Answer.** Stage 3 against stage 2: hit@5 {expected} (") and text.endswith("; n = 1,200.")


def test_the_metrics_of_a_pair_stand_together_and_each_has_its_n_where_they_differ():
    bounds = {"value": 0.02, "ci_low": 0.01, "ci_high": 0.03}
    pairs = pd.DataFrame([ROW | bounds, ROW | bounds | {"old": "control"}, ROW | bounds | {"metric": "hit@1", "n": 7}])
    said = "higher (+2.0 points [1.0, 3.0], n = 1,200)"
    expected = f"Stage 3 against stage 2: hit@5 {said}, hit@1 {said.replace('1,200', '7')}; stage 3 against control: hit@5 {said}."
    assert sentences.differences(pairs).data == f"**Answer.** {expected}"
    assert sentences.differences(pairs[:0]).data == "**Answer.** Nothing could be compared."


def test_the_grains_that_most_and_fewest_queries_name():
    kinds = pd.DataFrame({"kind": ["what", "tone", "hair"], "queries": [1100, 900, 40], "share": [0.92, 0.75, 0.03]})
    most = "**Answer.** Of 3 kinds of grains most queries name what (1,100 queries, 92%), fewest hair (40 queries, 3%)."
    assert sentences.shares(kinds).data == most
    assert sentences.shares(kinds[:1]).data == "**Answer.** Of 1 kinds of grains all name what (1,100 queries, 92%)."


def test_the_ranks_at_which_a_negative_is_rewarded_are_those_of_the_weights():
    _, weights = reward_figures.rank_weights(range(1, 9), 0.1)
    assert (
        sentences.rewarded_ranks(weights).data
        == "**Answer.** As printed the weight is below zero, so that a negative raises the reward, at rank 1 (-1.00), rank 2 (-0.31); "
        "in the corrected form at 0 of 8 ranks."
    )
    assert "at no rank; in the corrected form at 0 of 6 ranks" in sentences.rewarded_ranks(weights[2:]).data


def test_what_passing_the_positive_does_is_read_beside_it():
    table = pd.DataFrame({"hardest": [0.0, 0.4, 0.5, 0.6, 1.0], "R_total printed": [9, 3, 8, 4, 9], "R_total corrected": [9, 3, 8, 1, 9]})
    text = sentences.passing(table, 0.5).data
    assert "as printed it rises from 3.000 to 4.000, as corrected it falls from 3.000 to 1.000" in text


def test_units_whose_first_answer_mostly_has_the_wrong_modality_are_named_the_worst_first():
    table = pd.DataFrame(
        {
            "unit": ["a", "b", "c"],
            "value": [0.2, 0.6, 0.99],
            "ci_low": [0.1, 0.5, 0.98],
            "ci_high": [0.3, 0.7, 1.0],
            "n": [60, 60, 50],
        }
    )
    text = sentences.wrong_modality(table).data
    assert "in 2 of 3 units: c (99.0 % [98.0, 100.0]), b (60.0 % [50.0, 70.0]); n = 50 queries a unit." in text
    assert "in 0 of 1 units; n = 60" in sentences.wrong_modality(table[:1]).data


def test_the_first_model_of_each_metric_is_counted_and_the_largest_cost_of_ties_named():
    means = pd.DataFrame(
        {"stage 2": [50.0, 49.0, 30.0, 90.0], "stage 3": [52.0, 51.5, 29.0, 80.0]},
        index=["hit@1", "hit@1 pessimistic", "mrr@10", "wrong modality@1"],
    )
    text = "**Answer.** Of 3 metrics the highest mean has stage 3 under 2, stage 2 under 1; ties change a hit rate by 1.0 points at most."
    assert sentences.first_by_metric(means).data == text


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
    assert "The reward rose" in text and "the length did not change clearly" in text and "the loss fell" in text
    assert "first against last 20 of 200 steps" in text


def test_changes_are_grouped_by_what_their_intervals_say():
    rows = [("a", 0.02, 0.01, 0.03), ("b", -0.02, -0.03, -0.01), ("c", 0.01, -0.01, 0.03), ("d", 0.0, 0.0, 0.0)]
    pairs = pd.DataFrame(rows, columns=["unit", "value", "ci_low", "ci_high"]).assign(n=[120, 780, 240, 240])
    said = sentences.changes(pairs, "unit", "stage 3 over stage 2").data
    assert "points: higher for a +2.0 [1.0, 3.0]; lower for b -2.0 [-3.0, -1.0]; inconclusive for c +1.0" in said
    assert said.endswith("the same for d +0.0 [0.0, 0.0] (n = 120 to 780 queries).")
    seeds = pairs[:1].assign(**{"by seed": [(1.0, -1.0)]})
    assert "a +2.0 [1.0, 3.0] (seeds disagree: -1.0 to +1.0)" in sentences.changes(seeds, "unit", "x").data
    assert sentences.changes(pairs[:0], "unit", "x", command="make study").data == "**Answer.** X: not run (make study)."
    many = sentences.changes(pd.concat([pairs[:1], *[pairs[2:3]] * sentences.MOST]), "unit", "x").data
    assert f"higher for a +2.0 [1.0, 3.0]; inconclusive for the {sentences.MOST} others of the table (n" in many


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
    assert sentences.beside_chance(table[:0], "set", "stage 3").data == "**Answer.** Stage 3: not measured."
