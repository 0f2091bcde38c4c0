"""Grains taken out of queries, how far that moves an embedding (Figure 4), and which grains errors touch."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from elva_core.data import emoji, mbeir
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


def test_errors_name_the_grain_that_the_first_answer_lacks():
    wanted = query("x", ("who", "woman"), ("tone", "dark"))
    candidates = tuple(
        mbeir.Candidate(f"10:{i}", None, "x", "image", {"grains": g})
        for i, g in ((2, [["who", "woman"], ["tone", "dark"]]), (3, [["who", "man"], ["tone", "dark"]]))
    )
    result = retriever.UnitResult(
        "u", "local", (wanted, wanted), [[2], [1]], [[2], [1]], [1, 1], np.array([[1, 0], [0, 1]]), np.zeros((2, 2)), candidates
    )
    table = grains.errors(result)
    assert table["wrong"].tolist() == [True, False, False, False]


def test_errors_look_at_every_grain_of_a_kind_and_skip_answers_that_carry_none():
    wanted = query("x", ("entity", "dog"), ("entity", "ball"), ("action", "run"))
    answers = ([["action", "run"], ["entity", "dog"]], [])
    candidates = tuple(mbeir.Candidate(f"10:{i}", None, "x", "image", {"grains": g}) for i, g in enumerate(answers, start=3))
    result = retriever.UnitResult("u", "local", (wanted, wanted), [[2]] * 2, [[2]] * 2, [1, 1], np.array([[0], [1]]), None, candidates)
    table = grains.errors(result)
    assert table[["kind", "wrong"]].values.tolist() == [["entity", True], ["action", False]]


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
