"""Metrics by hand and against ir-measures on random rankings."""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, lists
from ir_measures import RR, R, Success, nDCG

from elva_core.retrieval import metrics


def test_three_documents_by_hand():
    ranks, relevant = [[1, 3], [2], []], [2, 1, 1]
    assert metrics.hit_rate_at_k(ranks, 1).tolist() == [1, 0, 0]
    assert metrics.recall_at_k(ranks, 2, relevant).tolist() == [0.5, 1, 0]
    assert metrics.reciprocal_rank(ranks).tolist() == [1, 0.5, 0]
    # (1 + 1/2) / (1 + 1/log2 3) and 1/log2 3
    assert metrics.ndcg_at_k(ranks, 3, relevant)[:2] == pytest.approx([1.5 / (1 + 1 / np.log2(3)), 1 / np.log2(3)])


@settings(max_examples=10, deadline=None)
@given(integers(0, 2**32 - 1), integers(1, 60))
def test_equal_to_ir_measures_on_random_runs(seed, depth):
    """Of candidates below `depth` the run says nothing: a query may have no relevant one in it."""
    rng = np.random.default_rng(seed)
    run, qrels, ranks, relevant = {}, {}, [], []
    for q in range(60):
        scores = rng.permutation(50)
        judged = set(rng.choice(50, size=rng.integers(1, 6), replace=False).tolist())
        order = np.argsort(-scores)[:depth]
        run[str(q)] = {str(d): float(scores[d]) for d in order}
        qrels[str(q)] = {str(d): 1 for d in judged}
        ranks.append([i + 1 for i, d in enumerate(order) if d in judged])
        relevant.append(len(judged))
    theirs = ir_measures.calc_aggregate([Success @ 5, R @ 5, RR @ 10, nDCG @ 10], qrels, run)
    ours = {
        Success @ 5: metrics.hit_rate_at_k(ranks, 5),
        R @ 5: metrics.recall_at_k(ranks, 5, relevant),
        RR @ 10: metrics.reciprocal_rank(ranks),
        nDCG @ 10: metrics.ndcg_at_k(ranks, 10, relevant),
    }
    for name, values in ours.items():
        assert values.mean() == pytest.approx(theirs[name], abs=1e-9), name


@given(lists(integers(1, 20), max_size=6, unique=True), integers(1, 20), integers(1, 20))
def test_more_depth_never_lowers_a_rate_and_a_hit_is_recall_of_a_single_positive(ranks, k, deeper):
    relevant = [max(1, len(ranks))]
    for rate in (metrics.hit_rate_at_k, lambda r, k: metrics.recall_at_k(r, k, relevant), metrics.reciprocal_rank):
        assert rate([ranks], k)[0] <= rate([ranks], k + deeper)[0] <= 1
    assert metrics.recall_at_k([ranks], k, relevant)[0] <= metrics.hit_rate_at_k([ranks], k)[0]
    assert metrics.recall_at_k([ranks[:1]], k, [1])[0] == metrics.hit_rate_at_k([ranks[:1]], k)[0]
    best = list(range(1, len(ranks) + 1))
    assert metrics.ndcg_at_k([ranks], k, relevant)[0] <= metrics.ndcg_at_k([best], k, relevant)[0] + 1e-12


def test_interval_covers_the_mean_and_shrinks_with_the_square_root_of_n():
    rng = np.random.default_rng(1)
    widths = []
    for n in (100, 1600):
        values = (np.arange(n) % 2).astype(float)
        low, high = metrics.interval([values], 2000, rng)
        assert low < 0.5 < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.15)  # spread of 2000 bootstrap means is about 3 %


def test_groups_are_resampled_each_by_itself_and_weigh_the_same():
    assert metrics.interval([np.ones(5), np.zeros(50)], 50, np.random.default_rng(0)) == (0.5, 0.5)
    few, many, rng = np.arange(3.0), np.random.default_rng(2).normal(size=(40, 2)), np.random.default_rng(3)
    draws = [[g[rng.integers(len(g), size=len(g))].mean() for _ in range(200)] for g in (few, many)]
    means = (np.array(draws[0]) + draws[1]) / 2
    expected = tuple(np.percentile(means, [2.5, 97.5]).round(12))
    assert metrics.interval([few, many], 200, np.random.default_rng(3)) == expected


@given(integers(0, 2**32 - 1), integers(1, 7), integers(2, 40))
def test_a_bound_of_zero_is_zero_and_no_error_of_rounding(seed, groups, n):
    """Differences of hits over several units: sums of thirds and sevenths that cancel leave 1e-17, which is below or above zero."""
    rng = np.random.default_rng(seed)
    low, high = metrics.interval([rng.integers(-1, 2, size=(n, 3)).mean(1) for _ in range(groups)], 50, rng)
    assert low <= high and all(bound == 0 or abs(bound) > 1e-9 for bound in (low, high))


def test_without_rows_there_is_no_interval():
    for groups in ([], [np.empty(0)], [np.ones(3), np.empty(0)]):
        assert np.isnan(metrics.interval(groups, 10, np.random.default_rng(0))).all()
