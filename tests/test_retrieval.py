"""Exact search, ranks and ties, scoring a unit, run files."""

from __future__ import annotations

import numpy as np
import pytest

from elva_core import mbeir, retrieval


def unit_vectors(n, d=8, seed=0):
    v = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return v / np.linalg.norm(v, axis=1, keepdims=True)


@pytest.mark.parametrize("shard", [3, 10, 1000])
def test_search_in_shards_equals_a_full_sort(shard):
    q, c = unit_vectors(5), unit_vectors(40, seed=1)
    rows, scores = retrieval.top_k(q, c, 7, shard=shard)
    full = np.argsort(-(q @ c.T), axis=1, kind="stable")[:, :7]
    assert np.array_equal(rows, full)
    np.testing.assert_allclose(scores, np.take_along_axis(q @ c.T, full, 1), atol=1e-6)


def test_more_hits_than_candidates_is_refused():
    with pytest.raises(ValueError, match="exceeds the pool"):
        retrieval.top_k(unit_vectors(1), unit_vectors(3), 4)


def test_ranks_agree_with_the_search():
    q, c = unit_vectors(6), unit_vectors(30, seed=2)
    rows, _ = retrieval.top_k(q, c, 30)
    ranks = retrieval.relevant_ranks(q, c, [[4, 9]] * 6)
    assert ranks == [sorted([list(r).index(4) + 1, list(r).index(9) + 1]) for r in rows.tolist()]


def test_ties_go_by_pool_order_and_pessimistically_to_the_end():
    same = np.ones((4, 2), np.float32) / np.sqrt(2)  # collapsed embeddings
    assert retrieval.relevant_ranks(same[:1], same, [[1]]) == [[2]]
    assert retrieval.relevant_ranks(same[:1], same, [[1]], pessimistic=True) == [[4]]


def test_encoding_keeps_order_and_repeats(tiny, items):
    vectors, summaries = retrieval.encode(tiny, [*items, *items[::-1]], batch=4)
    assert np.array_equal(vectors, vectors[::-1]) and summaries == summaries[::-1]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_scoring_a_unit(tiny, root, smoke, tmp_path):
    searcher = retrieval.Searcher(tiny, root, "test", smoke.evaluation, template="eol")
    unit = root.units("test")[0]
    local, everything = searcher.evaluate(unit), searcher.evaluate(unit, pool="global")
    assert len(local.ranks) == len(root.queries(unit, "test"))
    assert all(b[0] >= a[0] for a, b in zip(local.ranks, everything.ranks, strict=True))
    for path, columns in zip(retrieval.write_run(local, tmp_path, "x"), (6, 7), strict=True):
        lines = path.read_text().splitlines()
        assert len(lines) == len(local.queries) * 10 and all(len(line.split()) == columns for line in lines)


def test_a_judgement_the_pool_lacks_and_a_query_without_judgement_fail_loudly(tiny, own_root, smoke):
    searcher = retrieval.Searcher(tiny, own_root, "test", smoke.evaluation, template="eol")
    path = own_root.qrels_path("emoji_task0", "test")
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first.replace(" 0 10:", " 0 10:99"), *rest]) + "\n")
    with pytest.raises(mbeir.ElvaDataError, match=r"judged with 10:99.*lacks; run lint"):
        searcher.evaluate("emoji_task0")
    path.write_text("\n".join(rest) + "\n")
    with pytest.raises(mbeir.ElvaDataError, match="has no judgement"):
        searcher.evaluate("emoji_task0")
