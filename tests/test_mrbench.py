"""MRBench and the analysis of grains."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from elva_core import grains, mbeir, mrbench, prepare, retrieval


@pytest.fixture
def built(root, smoke, tmp_path):
    settings = smoke.mrbench.model_copy(update={"queries": 32})
    return mrbench.build(root, settings, annotate=mbeir.grains, folder=tmp_path / "bench", seed=1)


def test_every_task_gives_the_same_number_of_multi_grain_queries(built, root):
    bench, counts, sheet = built
    assert counts["drawn"].tolist() == [8] * 4 and [u[-1] for u in bench.units("test")] == list("0347")
    for unit in bench.units("test"):
        drawn = bench.queries(unit, "test")
        assert all(len(mbeir.grains(q)) >= 2 for q in drawn)
        assert {q.qid for q in drawn} <= {q.qid for q in root.queries(unit, "test")}
        assert set(bench.qrels(unit, "test")) == {q.qid for q in drawn}
    assert len(sheet) == 12


def test_the_annotator_decides(root, smoke, tmp_path):
    with pytest.raises(mbeir.ElvaDataError, match="0 queries with 2 grains, 8 wanted"):
        mrbench.build(root, smoke.mrbench, annotate=lambda q: [("what", "x")], folder=tmp_path, seed=1)


def test_the_benchmark_becomes_a_dataset(built):
    table = mrbench.as_dataset(built[0])
    assert len(table) == 32 and set(table.column_names) == {"unit", "qid", "text", "image", "grains", "positives"}


def test_agreement_and_its_wilson_interval():
    sheet = pd.DataFrame({"accept": ["yes"] * 8 + ["No", "no ", "", None]})
    got = mrbench.agreement(sheet)
    # Wilson for 8 of 10: centre (0.8 + 0.19207) / 1.38415 = 0.71674, half-width 0.22656
    assert got["checked"] == 10 and got["precision"] == 0.8
    assert (got["ci_low"], got["ci_high"]) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert np.isnan(mrbench.agreement(pd.DataFrame({"accept": ["", ""]}))["precision"])
    with pytest.raises(mbeir.ElvaDataError, match="maybe"):
        mrbench.agreement(pd.DataFrame({"accept": ["maybe"]}))


def query(text, *segments):
    return mbeir.Query("10:1", text, None, "text", ("10:2",), (), 0, {"grains": [list(s) for s in segments]})


def test_taking_a_grain_away_is_exact():
    q = query("Woman running dark skin tone.", ("who", "woman"), ("what", "running"), ("tone", "dark skin tone"))
    assert grains.ablatable([q]) == [q]
    assert [grains.without(q, i).text for i in range(3)] == ["Running dark skin tone.", "Woman dark skin tone.", "Woman running."]
    assert grains.ablatable([query("A photo of it.", ("who", "woman"), ("what", "running"))]) == []


def test_a_grain_that_moves_nothing_has_distance_zero(tiny, root, smoke):
    searcher = retrieval.Searcher(tiny, root, "test", smoke.evaluation, template="eol")
    queries = grains.ablatable(root.queries("emoji_task0", "test"))[:3]
    table = grains.distances(searcher, queries, "emoji_task0")
    assert len(table) == sum(len(mbeir.grains(q)) for q in queries) and (table["distance"] > 1e-6).all()
    searcher.vectors = lambda items: np.ones((len(items), 1))  # blind to everything
    assert grains.distances(searcher, queries, "emoji_task0")["distance"].abs().max() == 0


def test_errors_name_the_grain_that_the_first_answer_lacks():
    wanted = query("x", ("who", "woman"), ("tone", "dark"))
    candidates = tuple(
        mbeir.Candidate(f"10:{i}", None, "x", "image", {"grains": g})
        for i, g in ((2, [["who", "woman"], ["tone", "dark"]]), (3, [["who", "man"], ["tone", "dark"]]))
    )
    result = retrieval.UnitResult(
        "u", "local", (wanted, wanted), [[2], [1]], [[2], [1]], [1, 1], np.array([[1, 0], [0, 1]]), np.zeros((2, 2)), candidates
    )
    table = grains.errors(result)
    assert table["wrong"].tolist() == [True, False, False, False]


def test_twins_in_the_pool_are_counted_once_each(root):
    counts = prepare.twins_in_pool(root, "emoji_task0", "test")
    pool = [dict(mbeir.grains(c)) for c in root.pool("emoji_task0", "test")]
    for q, n in zip(root.queries("emoji_task0", "test"), counts, strict=True):
        own = dict(mbeir.grains(q))
        by_hand = sum(list(p) == list(own) and sum(p[k] != own[k] for k in own) == 1 for p in pool)
        assert n == by_hand
