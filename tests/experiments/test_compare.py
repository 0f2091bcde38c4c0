"""Arms of a study side by side: scores over seeds, paired differences, curves; by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from test_decomposition import made

from elva_core.experiments import arms, compare, figures, sentences


@pytest.fixture
def made_up():
    """Two arms, two seeds, two tasks with two queries each; ranks by hand."""
    ranks = {
        ("old", 1): [1, 9, 9, 9],
        ("old", 2): [1, 9, 9, 1],
        ("new", 1): [1, 1, 9, 9],
        ("new", 2): [1, 1, 1, 1],
        ("new", 3): [1, 9, 9, 9],
    }
    return made(ranks)


def test_a_difference_is_taken_over_the_seeds_that_both_arms_have(made_up):
    # old: 25 and 50 percent, new: 50 and 100 (its third seed has no counterpart)
    row = compare.differences(made_up, [("new", "old")], 5, samples=500).iloc[0]
    assert row["seeds"] == (1, 2) and row["by seed"] == pytest.approx((25, 50))
    assert row["value"] == pytest.approx(37.5) and row["relative"] == pytest.approx(100)
    # gains, mean over seeds: 0 and 1 in task 0, 0.5 and 0 in task 1; resampled inside each task the average is 0 to 75 percent
    assert row["ci_low"] == pytest.approx(0) and row["ci_high"] == pytest.approx(75)


def test_an_overview_has_both_cut_offs_with_intervals_and_the_seeds(made_up):
    table = compare.differences(made_up, [("new", "old")], 5, samples=500)
    (row,) = compare.overview(made_up, table, 500).to_dict("records")
    assert row["hit@5, points"] == "+37.5 [0.0, 75.0]" and row["hit@5, %"].startswith("+100.0 [")
    assert row["hit@1, points"] == "+37.5 [0.0, 75.0]"  # every hit of these ranks is a first answer
    assert (row["arm"], row["over"], row["by seed"]) == ("new", "old", "+25.0 +50.0") and (row["n"], row["seed"]) == (4, "2 (1, 2)")
    assert compare.overview(made_up, table[:0], 10).empty


def test_an_arm_costs_the_queries_steps_and_seconds_of_its_own_training(made_up, smoke):
    names = {"old": "stage 2", "new": "InfoNCE control"}
    runs = made_up.runs.assign(arm=made_up.runs["arm"].map(names), train_s=[0.0, 0.0, 7.0, 9.0, 50.0], steps=smoke.control.steps)
    table = compare.costs(dataclasses.replace(made_up, runs=runs), smoke).set_index("arm")
    assert table["seeds"].tolist() == [2, 3] and table["seconds"].tolist() == [0, 9]
    assert table["queries"].tolist() == [0, smoke.control.steps * smoke.control.batch]
    assert compare.queries_seen(smoke, arms.arms(smoke)["stage 3"]) == smoke.stage3.queries


def test_more_than_nothing_is_a_difference_without_a_percentage(made_up):
    hits = made_up.hits.assign(rank=made_up.hits["rank"].where(made_up.hits["arm"] == "new", 9))
    row = compare.differences(dataclasses.replace(made_up, hits=hits), [("new", "old")], 5, samples=10).iloc[0]
    assert row["value"] == pytest.approx(75) and np.isnan([row["relative"], row["relative low"], row["relative high"]]).all()


def test_curves_begin_at_stage_2_and_hold_the_paired_differences_to_it(made_up, smoke):
    names = {"old": "stage 2", "new": "stage 3"}
    runs = made_up.runs.assign(arm=made_up.runs["arm"].replace(names), train_s=7.0, seed=made_up.runs["seed"])
    study = dataclasses.replace(made_up, runs=runs, hits=made_up.hits.assign(arm=made_up.hits["arm"].replace(names)))
    first = smoke.changed({"study": {"seeds": [int(runs["seed"].iloc[0])]}})
    table = compare.efficiency(study, first, 5, 50).set_index(["run", "queries"])
    assert table.loc[("stage 3", 0), ["value", "ci_low", "ci_high", "n"]].tolist() == [0, 0, 0, 4]
    one = dataclasses.replace(study, runs=runs[runs["seed"] == runs["seed"].iloc[0]])
    expected = compare.differences(one, [("stage 3", "stage 2")], 5, samples=50).iloc[0]
    row = table.loc[("stage 3", smoke.stage3.queries)]
    assert row["value"] == pytest.approx(expected["value"]) and row["n"] == 4 and row["seconds"] == 7
    assert compare.efficiency(dataclasses.replace(study, runs=runs[runs["arm"] != "stage 2"]), first, 5, 50).empty


def test_a_figure_of_arms_that_the_profile_does_not_name_says_so(made_up, smoke):
    table = compare.differences(made_up, [("new", "old")], 5, samples=10)
    curves = compare.efficiency(made_up, smoke, 5, 10)
    titles = [
        figures.arms(table, "All", "points").get_suptitle(),
        figures.arms(table[:0].assign(paper=np.nan), "None", "points").get_suptitle(),
        figures.efficiency(curves, "None").get_suptitle(),
    ]
    assert titles == ["All (n = 4 queries)", "None (nothing measured)", "None (nothing measured, 95 % intervals)"]


def test_a_score_is_the_mean_over_seeds_with_their_spread(made_up):
    table = compare.scores(made_up, ["new"], 5, samples=50).set_index("unit")
    assert table.loc["average", "value"] == pytest.approx((50 + 100 + 25) / 3)
    assert table.loc["average", "by seed"] == pytest.approx((50, 100, 25))
    assert table.loc["average", "spread"] == pytest.approx(np.std([50, 100, 25], ddof=1))
    assert table.loc["x_task0", "value"] == pytest.approx(100 * (2 + 2 + 1) / 6)


def test_speeds_are_means_over_the_seeds_of_timed_arms_and_empty_without_any(made_up):
    assert compare.speeds(made_up).empty
    runs = made_up.runs.assign(**{"hit@5": [0.1, 0.3, 0.5, 0.5, 0.5]})
    timed = runs.assign(queries_s=[10, 20, np.nan, np.nan, np.nan], query_passes=[4, 2, np.nan, np.nan, np.nan])
    (row,) = compare.speeds(dataclasses.replace(made_up, runs=timed)).to_dict("records")
    assert row == {"arm": "old", "hit@5": pytest.approx(20), "passes": 3, "queries a second": 15, "seeds": 2}
    told = sentences.costs(pd.DataFrame([row])).data
    assert "old finds 20.0 % and takes 3.0 passes a query, 15.0 queries a second (2 seeds); each arm was timed by itself" in told
    assert sentences.costs(compare.speeds(made_up)).data.endswith("no arm was timed.")


def test_the_grain_that_wrong_first_answers_lack_most_is_counted_over_all_seeds(made_up):
    rows = [("new", 1, "tone", 3, 4), ("new", 2, "tone", 1, 4), ("new", 1, "who", 1, 8), ("old", 1, "who", 9, 9)]
    errors = pd.DataFrame(rows, columns=["arm", "seed", "kind", "sum", "count"])
    said = compare.most_lacking(dataclasses.replace(made_up, errors=errors), "new")
    assert said == "Wrong first answers of new lack tone (50.0 % of 8) most often, and who (12.5 % of 8) least often, 2 seeds together."
    assert compare.most_lacking(made_up, "new") == "No error of new was counted."


def test_the_grain_distance_of_arms_is_paired_over_queries_and_has_each_seed(made_up):
    """Two grains of query a, one of b; the third seed of `new` has no counterpart; an arm without a result is left out."""
    rows = [
        ("old", 1, "a", 0.1),
        ("old", 1, "a", 0.3),
        ("old", 1, "b", 0.4),
        ("old", 2, "a", 0.2),
        ("old", 2, "a", 0.2),
        ("old", 2, "b", 0.6),
    ]
    rows += [("new", seed, qid, distance + 0.1 * seed) for _, seed, qid, distance in rows] + [("new", 3, "a", 9.0)]
    study = dataclasses.replace(made_up, distances=pd.DataFrame(rows, columns=["arm", "seed", "qid", "distance"]))
    table = compare.distances(study, [("new", "old"), ("new", "none")], samples=50).set_index(["model", "baseline"])
    assert list(table.index) == [("new", ""), ("old", ""), ("new", "old")] and set(table["seed"]) == {"2 (1, 2)"}
    assert table.loc[("old", ""), "value"] == pytest.approx((0.2 + 0.5) / 2) and table.loc[("old", ""), "by seed"] == pytest.approx(
        (0.3, 0.4)
    )
    growth = table.loc[("new", "old")]
    assert growth["arm"] == "new over old" and growth["seeds"] == (1, 2) and table.loc[("old", ""), "arm"] == "old"
    assert growth["by seed"] == pytest.approx((0.1, 0.2)) and [growth[c] for c in ("ci_low", "value", "ci_high")] == pytest.approx(
        [0.15] * 3
    )
