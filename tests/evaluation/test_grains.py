"""Grains taken out of queries, how far that moves an embedding (Figure 4), and which grains errors touch."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from elva_core.data import emoji, items, mbeir
from elva_core.evaluation import grains
from elva_core.retrieval import retriever


def query(text, *segments):
    return mbeir.Query("10:1", text, None, "text", ("10:2",), (), 0, {"grains": [list(s) for s in segments]})


def test_taking_a_grain_away_is_exact():
    q = query("Woman running dark skin tone.", ("who", "woman"), ("what", "running"), ("tone", "dark skin tone"))
    assert grains.ablatable([q]) == [q]
    assert [grains.without(q, i).text for i in range(3)] == ["Running dark skin tone.", "Woman dark skin tone.", "Woman running."]
    assert grains.ablatable([query("A photo of it.", ("who", "woman"), ("what", "running"))]) == []


@pytest.mark.parametrize(
    ("text", "segments", "less"),
    [
        ("A brown dog, with a ball.", ["brown", "dog", "ball"], ["A dog, with a ball.", "A brown, with a ball.", "A brown dog, with a."]),
        ("Dogs run; red sky!", ["dogs", "run", "red sky"], ["Run; red sky!", "Dogs; red sky!", "Dogs run!"]),
        ("Two, three (four)?", ["two", "three"], ["Three (four)?", "Two, (four)?"]),
        ("Dog on the grass", ["dog", "on the grass"], ["On the grass.", "Dog."]),
    ],
)
def test_a_grain_is_cut_out_of_any_text_with_the_marks_it_would_leave(text, segments, less):
    q = query(text, *(("entity", s) for s in segments))
    assert grains.ablatable([q]) == [q]
    assert [grains.without(q, i).text for i in range(len(segments))] == less


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("A dog and a dog.", ["dog", "a dog and"]),  # twice
        ("A doghouse and a cat.", ["dog", "cat"]),  # part of a word
        ("A red dress.", ["red dress", "dress"]),  # one inside the other
        ("A red dress.", ["red dress"]),  # alone
        ("A red dress.", ["red", "shoe"]),  # not there
    ],
)
def test_a_grain_that_cannot_go_alone_keeps_its_query_out(text, segments):
    assert grains.ablatable([query(text, *(("entity", s) for s in segments))]) == []


def test_cutting_and_joining_agree_on_texts_that_are_their_grains(emojis, monkeypatch):
    asked = [
        q for e in emoji.sample(emojis, 400) if len(e.segments) > 1 for q in grains.ablatable([query(mbeir.normalise(e.name), *e.segments)])
    ]
    taken = [(q, some) for q in asked for n in (1, 2) for some in combinations(range(len(mbeir.grains(q))), n)]
    joined = [grains.without(q, *some).text for q, some in taken]
    monkeypatch.setattr(mbeir, "caption", lambda record: None)
    assert len(joined) > 600 and grains.ablatable(asked) == asked
    assert [grains.without(q, *some).text for q, some in taken] == joined
    assert [grains.without(q, *reversed(some)).text for q, some in taken] == joined


def test_a_grain_that_moves_nothing_has_distance_zero(tiny, root, smoke):
    searcher = retriever.Searcher(tiny, root, "test", smoke.evaluation, template="eol")
    queries = grains.ablatable(root.queries("emoji_task0", "test"))[:3]
    table = grains.distances(searcher, queries, "emoji_task0")
    assert len(table) == sum(len(mbeir.grains(q)) for q in queries) and (table["distance"] > 1e-6).all()
    searcher.vectors = lambda items: np.ones((len(items), 1))  # blind to everything
    assert grains.distances(searcher, queries, "emoji_task0")["distance"].abs().max() == 0


def result(queries, ranks, top=(), candidates=()):
    return retriever.UnitResult("u", "local", queries, [[r] for r in ranks], [], [], np.array(top), None, candidates)


def test_errors_look_at_every_grain_of_a_kind_and_skip_answers_that_carry_none():
    wanted = query("x", ("entity", "dog"), ("entity", "ball"), ("action", "run"))
    answers = ([list(g) for g in mbeir.grains(wanted)], [["action", "run"], ["entity", "dog"]], [])
    candidates = [mbeir.Candidate(f"10:{i}", None, "x", "image", {"grains": g}) for i, g in enumerate(answers, start=2)]
    table = grains.errors(result([wanted] * 3, [2, 1, 2], [[1], [0], [2]], candidates))
    assert table[["kind", "missed", "wrong"]].to_numpy().tolist() == [
        ["entity", True, True], ["action", True, False], ["entity", False, False], ["action", False, False],
    ]  # fmt: skip


def test_the_mean_distance_counts_queries_alike_however_many_grains_they_have():
    rows = [("m", "q1", 0.2), ("m", "q1", 0.4), ("m", "q1", 0.6), ("m", "q2", 0.8)]
    table = grains.mean_distance(pd.DataFrame(rows, columns=["model", "qid", "distance"]), 50)
    assert table["value"].tolist() == pytest.approx([0.6]) and table["n"].tolist() == [2]
    assert (table["ci_low"].item(), table["ci_high"].item()) == pytest.approx((0.4, 0.8))


def test_the_growth_of_the_distance_is_paired_over_queries():
    rows = [("stage 2", "a", 0.1), ("stage 2", "b", 0.5), ("stage 3", "a", 0.2), ("stage 3", "b", 0.6)]
    table = grains.mean_distance(pd.DataFrame(rows, columns=["model", "qid", "distance"]), 50)
    (growth,) = table[table["baseline"] == "stage 2"].to_dict("records")
    assert growth["model"] == "stage 3" and [growth[c] for c in ("ci_low", "value", "ci_high")] == pytest.approx([0.1] * 3)


def test_twins_are_the_candidates_that_differ_in_one_grain_and_count_ahead_of_the_positive(tiny, root, smoke):
    """Every pair of query and candidate compared grain by grain, and the pool sorted by numpy."""
    searcher = retriever.Searcher(tiny, root, "test", smoke.evaluation)
    table = grains.twins(searcher, root).set_index(["unit", "qid", "kind"])
    unit, compared = "emoji_task0", 0
    candidates = list(root.pool(unit, "test"))
    pool = searcher.vectors([items.candidate_item(root, c) for c in candidates]).astype(float)
    for q in root.queries(unit, "test"):
        vector = searcher.vectors([searcher.query(q, unit)])[0].astype(float)
        order = [candidates[i] for i in np.argsort(-(pool @ vector).astype(np.float32), kind="stable")]
        first = next(i for i, c in enumerate(order) if c.did in q.positives)
        for place, (kind, text) in enumerate(mbeir.grains(q)):
            near = []
            for i, c in enumerate(order):
                differs = [a != b for a, b in zip(mbeir.grains(c), mbeir.grains(q), strict=False)]
                alone = len(mbeir.grains(c)) == len(mbeir.grains(q)) and differs.index(True) == place if any(differs) else False
                if alone and sum(differs) == 1 and mbeir.grains(c)[place][0] == kind and mbeir.grains(c)[place][1] != text:
                    near.append(i)
            assert ((unit, q.qid, kind) in table.index) == bool(near)
            if near:
                row = table.loc[(unit, q.qid, kind)]
                assert (row["twins"], row["first"]) == (len(near), near[0] + 1)
                assert row["value"] == pytest.approx(np.mean([i < first for i in near]))
                compared += 1
    assert compared > 5


def test_twins_ahead_are_paired_over_queries_and_said_beside_the_distance():
    rows = [("stage 2", "a", "who", 0.5), ("stage 2", "a", "tone", 1.0), ("stage 2", "b", "who", 0.5)]
    rows += [("stage 3", "a", "who", 0.3), ("stage 3", "a", "tone", 0.8), ("stage 3", "b", "who", 0.3)]
    twins = pd.DataFrame(rows, columns=["model", "qid", "kind", "value"]).assign(unit="x_task0")
    table = grains.twins_ahead(twins, 50).set_index("group")
    assert table.loc["any grain", ["old value", "new value", "value", "n"]].tolist() == pytest.approx([0.625, 0.425, -0.2, 2])
    assert table.loc["who", "value"] == pytest.approx(-0.2) and table.loc["tone", "n"] == 1
    rows = [("stage 2", "a", 0.1), ("stage 2", "b", 0.5), ("stage 3", "a", 0.0), ("stage 3", "b", 0.6)]
    distance = grains.mean_distance(pd.DataFrame(rows, columns=["model", "qid", "distance"]), 200)
    said = grains.what_grows(distance, table.reset_index())
    assert said.startswith("From stage 2 to stage 3 the grain distance has no clear change, +0.000 [-0.100, 0.100] (n = 2 queries).")
    assert "ahead of the positive, 62.5 % under stage 2, shrinks, -20.0 [-20.0, -20.0] points (n = 2 queries)" in said
    assert said.endswith("by the grain that differs: who shrinks, -20.0 [-20.0, -20.0]; tone shrinks, -20.0 [-20.0, -20.0].")
    told = grains.blindness(distance)
    assert "is stage 2 0.300 [0.100, 0.500], stage 3 0.300 [0.000, 0.600]; from stage 2 to stage 3 it has no clear change, +0.000" in told


def test_the_query_to_show_is_the_one_of_median_change_of_rank():
    three = [["who", "a"], ["what", "b"], ["tone", "c"]]
    queries = [query("x", *three), query("y", *three[:2]), query("z", *three), query("w", *three), query("v", *three)]

    def gain(old, new, fewest, within):
        return grains.median_gain(result(queries, old), result(queries, new), fewest, within)

    # ratios 2, (too few grains), 1 (did not move), 8, 0.5: the median of 0.5, 2, 8 is that of the first
    assert gain([4, 9, 3, 8, 1], [2, 1, 3, 1, 2], 3, 9) == 0
    assert gain([4, 9, 3, 8, 1], [2, 1, 3, 1, 2], 3, 3) == 4  # of the third and fifth, the one that moved
    assert gain([4, 9, 3, 8, 1], [4, 1, 3, 8, 1], 3, 9) == 0  # none moved: the first
    with pytest.raises(ValueError, match="no query has 4 grains"):
        gain([1] * 5, [1] * 5, 4, 9)
