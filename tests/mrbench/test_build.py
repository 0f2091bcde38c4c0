"""MRBench as it is drawn: the same number of multi-grain queries per unit, whoever annotates, in a root that stands alone."""

from __future__ import annotations

import os

import pytest

from elva_core import files
from elva_core.data import lint, mbeir, sources
from elva_core.mrbench import annotate, build


def test_every_task_gives_the_same_number_of_multi_grain_queries(built, root):
    bench, counts, sheet = built
    assert counts["drawn"].tolist() == [8] * 4 and [u[-1] for u in bench.units("test")] == list("0347")
    for unit in bench.units("test"):
        drawn = bench.queries(unit, "test")
        assert all(len(mbeir.grains(q)) >= 2 for q in drawn)
        assert {q.qid for q in drawn} <= {q.qid for q in root.queries(unit, "test")}
        assert set(bench.qrels(unit, "test")) == {q.qid for q in drawn}
    assert len(sheet) == 12


@pytest.mark.parametrize(
    ("answer", "message"),
    [([("what", "x")], "0 queries with 2 grains, 8 wanted, 12 annotated, 0 of them unreadable"), (None, "none of 8 answers can be read")],
)
def test_an_annotator_without_two_grains_is_refused_and_one_that_is_never_readable_at_once(root, smoke, tmp_path, answer, message):
    with pytest.raises(files.ElvaDataError, match=message):
        build.build(root, smoke.mrbench, annotate=lambda queries: [answer] * len(queries), folder=tmp_path, seed=1)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_annotating_until_the_share_is_full_draws_what_annotating_everything_draws(root, smoke, tmp_path, batch):
    asked = []

    def some(queries):
        """One of three queries has two grains, every fourth is unreadable."""
        asked.extend(q.qid for q in queries)
        number = [mbeir.split_id(q.qid)[1] for q in queries]
        return [None if n % 4 == 0 else [("entity", "x"), ("entity", "y")][: 1 + (n % 3 == 0)] for n in number]

    own = smoke.mrbench.model_copy(update={"queries": 8, "annotator": smoke.mrbench.annotator.model_copy(update={"batch": batch})})
    bench, counts, _ = build.build(root, own, annotate=some, folder=tmp_path, seed=1)
    for row in counts.itertuples():
        queries = root.queries(row.unit, "test")
        fit = [q.qid for q, grains in zip(queries, some(queries), strict=True) if grains and len(grains) == 2]
        wanted = sorted(fit, key=lambda qid: mbeir.stable_hash(1, "mrbench", row.unit, qid))[:2]
        assert {q.qid for q in bench.queries(row.unit, "test")} == set(wanted)
        assert (row.queries, row.drawn) == (len(queries), 2) and row.annotated <= len(queries)
        assert row.unreadable <= sum(g is None for g in some(queries))
    assert (counts["annotated"] == counts["queries"]).all() == (batch == 100)


def test_the_grains_of_the_annotator_stand_beside_what_the_query_carried(root, smoke, tmp_path):
    found = [("entity", "x"), ("attribute", "y")]
    bench, _, sheet = build.build(root, smoke.mrbench, annotate=lambda queries: [found] * len(queries), folder=tmp_path, seed=1)
    before = {q.qid: q for q in root.queries("emoji_task0", "test")}
    for q in bench.queries("emoji_task0", "test"):
        assert mbeir.grains(q) == found and q.source["codes"] == before[q.qid].source["codes"]
        assert (q.text, q.positives) == (before[q.qid].text, before[q.qid].positives)
    assert set(sheet["grains"]) == {"entity: x; attribute: y"}


def test_units_may_be_named_and_must_be_there(root, smoke, tmp_path):
    named = smoke.mrbench.model_copy(update={"tasks": (), "units": ("emoji_task4",)})
    bench, counts, _ = build.build(root, named.model_copy(update={"queries": 5}), annotate=annotate.exact, folder=tmp_path / "a", seed=1)
    assert bench.units("test") == ["emoji_task4"] and counts["drawn"].tolist() == [5]
    absent = named.model_copy(update={"units": ("cirr_task7",)})
    with pytest.raises(files.ElvaDataError, match=r"no test units \['cirr_task7'\]"):
        build.build(root, absent, annotate=annotate.exact, folder=tmp_path / "b", seed=1)


def test_the_benchmark_stands_alone_and_is_clean(built, root):
    bench = built[0]
    assert lint.check(bench) == []
    union = {c.did for unit in bench.units("test") for c in bench.pool(unit, "test")}
    assert [c.did for c in bench.pool("", "test", "global")] == sorted(union, key=mbeir.split_id)
    assert built[1]["pool"].tolist() == [len(bench.pool(unit, "test")) for unit in bench.units("test")]
    image = next(q.image for q in bench.queries("emoji_task3", "test"))
    assert bench.image_path(image).samefile(root.image_path(image))  # no second copy on this disk


def test_images_are_copied_where_no_link_is_possible(root, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another file system")))
    bench = build.build(root, smoke.mrbench, annotate=annotate.exact, folder=tmp_path, seed=1)[0]
    assert lint.check(bench) == []
    image = next(q.image for q in bench.queries("emoji_task3", "test"))
    assert not bench.image_path(image).samefile(root.image_path(image))


def test_a_kind_is_counted_once_a_query():
    kinds = ([["entity", "dog"], ["entity", "ball"]], [["action", "run"]])
    table = build.describe([mbeir.Query("10:1", "x", None, "text", ("10:2",), (), 0, {"grains": grains}) for grains in kinds])
    assert table.set_index("kind")["share"].to_dict() == {"entity": 0.5, "action": 0.5}


def test_twins_in_the_pool_are_counted_once_each(root):
    counts = sources.twins_in_pool(root, "emoji_task0", "test")
    pool = [dict(mbeir.grains(c)) for c in root.pool("emoji_task0", "test")]
    for q, n in zip(root.queries("emoji_task0", "test"), counts, strict=True):
        own = dict(mbeir.grains(q))
        by_hand = sum(list(p) == list(own) and sum(p[k] != own[k] for k in own) == 1 for p in pool)
        assert n == by_hand
