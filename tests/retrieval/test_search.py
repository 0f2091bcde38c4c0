"""Exact search: what is found, ties, ranks, pools on disk, and that nothing depends on how the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elva_core.retrieval import cache, search


def unit_vectors(n, d=16, seed=0):
    v = np.random.default_rng(seed).normal(size=(n, d))
    return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)


def by_full_sort(q, c, k, relevant):
    """All scores in float64 rounded to float32, a stable sort, and ranks counted one by one."""
    scores = (q.astype(np.float64)[:, None] * c.astype(np.float64)[None]).sum(-1).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")
    place = np.argsort(order, axis=1)
    ranks = [sorted(int(place[i, r]) + 1 for r in rows) for i, rows in enumerate(relevant)]
    worst = [sorted(int((scores[i] >= scores[i, r]).sum()) for r in rows) for i, rows in enumerate(relevant)]
    return order[:, :k], np.take_along_axis(scores, order[:, :k], 1), ranks, worst


def with_copies(n, seed=1):
    """A pool in which every fourth row is a copy of an earlier one, and one vector stands 40 times: more than are kept to spare."""
    c = unit_vectors(n, seed=seed)
    rng = np.random.default_rng(seed)
    for i in range(4, n, 4):
        c[i] = c[rng.integers(i)]
    c[rng.choice(n, 40, replace=False)] = c[3]
    return c


@pytest.fixture
def small_blocks(monkeypatch):
    for name, value in {"QUERIES": 8, "ROWS": 1024, "TILE": 256}.items():
        monkeypatch.setattr(search, name, value)


@pytest.mark.parametrize("size", [1, 9, 130, 3000])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("judged", [True, False])
def test_one_pass_equals_a_full_sort_with_copies_in_the_pool(small_blocks, size, threads, judged):
    c = unit_vectors(size) if size < 100 else with_copies(size)
    q = np.concatenate([unit_vectors(20, seed=2), c[3:4] if size > 3 else c])  # the last query's best are the copies
    rng = np.random.default_rng(3)
    relevant = [list(rng.choice(size, min(size, i % 4), replace=False)) for i in range(len(q))]
    relevant[-1] = [size - 1, min(3, size - 1)][: min(size, 2)]
    relevant = relevant if judged else [[]] * len(q)
    k, before = min(size, 7), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ranking = search.exact(q, c, k, relevant if judged else None)
    finally:
        torch.set_num_threads(before)
    rows, scores, ranks, worst = by_full_sort(q, c, k, relevant)
    assert np.array_equal(ranking.rows, rows) and np.array_equal(ranking.scores, scores)
    assert ranking.ranks == ranks and ranking.pessimistic == worst


def test_collapsed_embeddings_rank_in_pool_order_and_pessimistically_last(small_blocks):
    same = np.repeat(unit_vectors(1), 2000, axis=0)
    ranking = search.exact(same[:9], same, 5, [[i, 1500] for i in range(9)])
    assert (ranking.rows == np.arange(5)).all()
    assert ranking.ranks == [[i + 1, 1501] for i in range(9)] and ranking.pessimistic == [[2000, 2000]] * 9


@pytest.mark.parametrize("clear", [0, 40])
def test_a_cloud_as_narrow_as_the_errors_of_float32_is_ranked_exactly(small_blocks, clear):
    """More rows than are computed one by one; with `clear` rows that are above it beyond doubt, only the ranks inside are in question."""
    c = unit_vectors(1, d=64).astype(np.float64) + np.random.default_rng(4).normal(size=(3000, 64)) * 1e-7
    q = unit_vectors(20, d=64, seed=5)
    q[(q @ c[0]) > 0] *= -1
    c[100 : 100 + clear] = unit_vectors(clear, d=64, seed=6) * 0.1 + q.sum(0) / np.linalg.norm(q.sum(0))
    c = (c / np.linalg.norm(c, axis=1, keepdims=True)).astype(np.float32)
    relevant = [[10, 2000], [], [7], *[[i] for i in range(1000, 1017)]] if clear else [[]] * 20
    rows, _, ranks, worst = by_full_sort(q, c, 6, relevant)
    ranking = search.exact(q, c, 6, relevant)
    assert np.array_equal(ranking.rows, rows) and ranking.ranks == ranks and ranking.pessimistic == worst


@pytest.mark.parametrize("spread", [1, 0.03, 1e-4, 0])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_what_float32_or_less_cannot_tell_apart_is_ranked_exactly(small_blocks, spread, precision):
    """From rows that are far apart to rows that are one; "medium" lets torch round the factors of its products to bfloat16."""
    c = unit_vectors(1, d=64) + spread * unit_vectors(3000, d=64, seed=4)
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    q = unit_vectors(128, d=64, seed=5)
    rows, scores, _, _ = by_full_sort(q, c, 6, [[]] * len(q))
    torch.set_float32_matmul_precision(precision)
    try:
        ranking = search.exact(q, c, 6)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert np.array_equal(ranking.rows, rows) and np.array_equal(ranking.scores, scores)


def test_float32_decides_what_is_far_apart(small_blocks, monkeypatch):
    passes, run = [], search._see_all
    monkeypatch.setattr(
        search, "_see_all", lambda blocks, pool: passes.extend((len(b.queries), b.precision) for b in blocks) or run(blocks, pool)
    )
    search.exact(unit_vectors(20, d=64), unit_vectors(3000, d=64, seed=1), 6, [[1]] * 20)
    assert passes == [(8, torch.float32), (8, torch.float32), (4, torch.float32)]


def test_a_pool_on_disk_is_read_in_parts_and_float16_is_normalised_again(small_blocks, tmp_path):
    c, q = unit_vectors(1500), unit_vectors(5, seed=1)
    half = c.astype(np.float16)
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, rows in zip(paths, np.split(half, (700, 1400)), strict=True):
        np.save(path, rows)
    kept = cache.Kept(paths, np.arange(1500) // 700, np.arange(1500) % 700, "")
    wide = half.astype(np.float32)
    wide /= np.sqrt(np.vecdot(wide, wide))[:, None]
    relevant = [[0, 1499], [699], [700], [], [1400]]
    expected = search.exact(q, wide, 9, relevant)
    np.save(tmp_path / "whole.npy", half)
    for pool in (kept, half, np.load(tmp_path / "whole.npy", mmap_mode="r")):
        ranking = search.exact(q, pool, 9, relevant)
        assert np.array_equal(ranking.rows, expected.rows) and np.array_equal(ranking.scores, expected.scores)
        assert ranking.ranks == expected.ranks
    assert not np.array_equal(expected.scores, np.sort(q @ half.astype(np.float32).T, axis=1)[:, ::-1][:, :9])


def test_no_query_and_no_relevant_row():
    c = unit_vectors(10)
    assert search.exact(c[:0], c, 3).rows.shape == (0, 3)
    assert search.exact(c[:2], c, 3).ranks == [[], []]


def test_what_cannot_be_searched_is_refused():
    c = unit_vectors(30)
    with pytest.raises(ValueError, match="exceeds the pool of 30"):
        search.exact(c[:1], c, 31)
    with pytest.raises(ValueError, match="row 30 is outside the pool of 30"):
        search.exact(c[:1], c, 3, [[30]])
    for broken in (np.nan, 3.0, 0.0):
        wrong = c.copy()
        wrong[17] *= broken
        with pytest.raises(ValueError, match="pool row 17 has length"):
            search.exact(c[:1], wrong, 3)
    with pytest.raises(ValueError, match="query 1 has length"):
        search.exact(c[:2] * np.array([[1.0], [2.0]], np.float32), c, 3)
