"""Exact search: what is found, ties, ranks, pools on disk, and that nothing depends on how the work is cut."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from elva_core.retrieval import search


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
    for name, value in {"QUERIES": 8, "ROWS": 512, "TILE": 256}.items():
        monkeypatch.setattr(search, name, value)


@pytest.mark.parametrize("size", [1, 9, 130, 3000])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("judged", [True, False])
def test_one_pass_equals_a_full_sort_with_copies_in_the_pool(small_blocks, monkeypatch, size, threads, judged):
    """Without judgements bfloat16 looks first."""
    monkeypatch.setattr(search, "MANY", 1)
    monkeypatch.setattr(search, "_has_bfloat16", lambda: True)  # torch can do without
    c = unit_vectors(size) if size < 100 else with_copies(size)
    q = np.concatenate([unit_vectors(20, seed=2), c[3:4] if size > 3 else c])  # the last query's best are the copies
    rng = np.random.default_rng(3)
    relevant = [list(rng.choice(size, min(size, i % 4), replace=False)) for i in range(len(q))]
    relevant[-1] = [size - 1, min(3, size - 1)][: min(size, 2)]
    relevant = relevant if judged else [[]] * len(q)
    k, before = min(size, 7), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = search.exact(q, c, k, relevant if judged else None)
    finally:
        torch.set_num_threads(before)
    rows, scores, ranks, worst = by_full_sort(q, c, k, relevant)
    assert np.array_equal(found.rows, rows) and np.array_equal(found.scores, scores)
    assert found.ranks == ranks and found.pessimistic == worst


def test_collapsed_embeddings_rank_in_pool_order_and_pessimistically_last(small_blocks):
    same = np.repeat(unit_vectors(1), 2000, axis=0)
    found = search.exact(same[:9], same, 5, [[i, 1500] for i in range(9)])
    assert (found.rows == np.arange(5)).all()
    assert found.ranks == [[i + 1, 1501] for i in range(9)] and found.pessimistic == [[2000, 2000]] * 9


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
    found = search.exact(q, c, 6, relevant)
    assert np.array_equal(found.rows, rows) and found.ranks == ranks and found.pessimistic == worst


@pytest.mark.parametrize("spread", [1, 0.03, 1e-4, 0])
def test_what_bfloat16_cannot_tell_apart_is_ranked_exactly(small_blocks, monkeypatch, spread):
    """From rows that it orders well to rows that it takes for one."""
    monkeypatch.setattr(search, "_has_bfloat16", lambda: True)  # torch can do without
    c = unit_vectors(1, d=64) + spread * unit_vectors(3000, d=64, seed=4)
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    q = unit_vectors(search.MANY, d=64, seed=5)
    rows, scores, _, _ = by_full_sort(q, c, 6, [[]] * len(q))
    found = search.exact(q, c, 6)
    assert np.array_equal(found.rows, rows) and np.array_equal(found.scores, scores)


def test_bfloat16_decides_what_is_far_apart_and_leaves_counts_to_float32(small_blocks, monkeypatch):
    passes, run = [], search._passed
    monkeypatch.setattr(search, "_has_bfloat16", lambda: True)
    monkeypatch.setattr(search, "_passed", lambda vectors, *rest: passes.append((len(vectors), rest[-1])) or run(vectors, *rest))
    q, c = unit_vectors(search.MANY, d=64), unit_vectors(3000, d=64, seed=1)
    search.exact(q, c, 6)
    assert passes[0] == (len(q), torch.bfloat16) and sum(n for n, _ in passes[1:]) < len(q) / 4
    passes.clear()
    search.exact(q, c, 6, [[1]] * len(q))
    search.exact(q[:-1], c, 6)
    assert [precision for _, precision in passes] == [torch.float32] * 2


def test_threads_are_as_many_after_a_search_as_before():
    before, broken = torch.get_num_threads(), unit_vectors(9)
    broken[3] *= 5
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as later:
            search.exact(unit_vectors(4), unit_vectors(9), 3)
            assert torch.get_num_threads() == later.submit(torch.get_num_threads).result() == 2
        with ThreadPoolExecutor(1) as later:
            with pytest.raises(ValueError, match="pool row 3"):
                search.exact(unit_vectors(4), broken, 3)
            assert torch.get_num_threads() == later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_files_are_one_pool_and_float16_is_normalised_again(small_blocks, tmp_path):
    c, q = unit_vectors(1500), unit_vectors(5, seed=1)
    half = c.astype(np.float16)
    for i, start in enumerate((0, 700, 1400)):
        np.save(tmp_path / f"{i}.npy", half[start : start + 700])
    wide = half.astype(np.float32)
    wide /= np.sqrt(np.vecdot(wide, wide))[:, None]
    relevant = [[0, 1499], [699], [700], [], [1400]]
    found = search.exact(q, sorted(tmp_path.glob("*.npy")), 9, relevant)
    expected = search.exact(q, wide, 9, relevant)
    assert np.array_equal(found.rows, expected.rows) and np.array_equal(found.scores, expected.scores)
    assert found.ranks == expected.ranks
    assert not np.array_equal(found.scores, np.sort(q @ half.astype(np.float32).T, axis=1)[:, ::-1][:, :9])


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
