"""The explorer without a browser: what a tick changes, for both models alike and in its column alone, and what a person may type."""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from elva_core import files
from elva_core.apps import explorer
from elva_core.data import items as data_items
from elva_core.data import mbeir
from elva_core.evaluation import benchmark, grains
from elva_core.models import encoder
from elva_core.retrieval import retriever

DEPTH = 5


@pytest.fixture(scope="module")
def measured(model_folder, root, smoke):
    """Two models on four units of one root: the tiny encoder, and the same one read in one pass."""
    model, units = encoder.load(model_folder, smoke.encoder), ("emoji_task0", "emoji_task3", "emoji_task7", "emoji_task1")
    searchers = {t: retriever.Searcher(model, root, "test", smoke.evaluation, template=t) for t in ("summary", "eol")}
    return [benchmark.Measured(t, None, None, {u: s.evaluate(u) for u in units}, s) for t, s in searchers.items()]


@pytest.fixture
def read(measured, monkeypatch) -> list[data_items.Item]:
    """What the models embed, in order."""
    seen: list = []
    for m in measured:
        monkeypatch.setattr(
            m.searcher, "vectors", lambda items, searcher=m.searcher: seen.extend(items := list(items)) or searcher._in_memory(items)
        )
    return seen


def shown(column) -> list[list[str]]:
    """The answers that each model shows, without tags."""
    return [[re.sub("<[^>]*>", "|", card) for card in re.findall("<li.*?</li>", panel.value)] for panel in column.panels]


@pytest.fixture
def column(measured) -> explorer.Column:
    """The first column of an explorer."""
    return explorer.Explorer(measured, DEPTH).columns[0]


def box(column, place):
    return column.boxes.children[1 + place]


def test_a_query_with_all_its_grains_is_ranked_as_the_benchmark_ranked_it(measured):
    for m in measured:
        for unit, result in m.bench.items():
            got = explorer.Model(m).answers(unit, result.queries[2], DEPTH)
            assert [c.did for c, _ in got.best] == [result.candidates[row].did for row in result.top[2][:DEPTH]]
            assert [s for _, s in got.best] == pytest.approx(result.scores[2][:DEPTH].tolist(), abs=1e-6)
            assert got.rank == result.ranks[2][0] and got.size == len(result.candidates)


def test_unticking_a_grain_changes_query_and_rankings_and_ticking_it_restores_them(measured, read, column):
    query = next(iter(measured[0].bench["emoji_task0"].queries))
    before, everything = shown(column), column.head.value
    assert query.text.lower() in everything.lower() and len(before) == 2 and all(len(cards) == DEPTH for cards in before)
    read.clear()
    box(column, 0).value = False
    less = grains.without(query, 0)
    wanted = measured[0].searcher.query(less, "emoji_task0")
    assert less.text != query.text and read == [wanted, wanted]  # both models, the same words
    assert wanted.text in column.head.value
    assert all(a != b for a, b in zip(shown(column), before, strict=True))
    box(column, 0).value = True
    assert shown(column) == before and column.head.value == everything


def test_without_any_grain_the_instruction_alone_is_read(measured, read, column):
    for tick in column.boxes.children[1:]:
        tick.value = False
    assert read[-1].text and read[-1].text == mbeir.normalise(read[-1].text)
    assert not any(grain.lower() in read[-1].text.lower() for _, grain in mbeir.grains(measured[0].bench["emoji_task0"].queries[0]))


def test_a_query_without_text_keeps_its_grains(measured, read, column):
    column.unit.value = "emoji_task3"
    query = next(iter(measured[0].bench["emoji_task3"].queries))
    assert query.text is None and read[-1].image == measured[0].searcher.root.image_path(query.image)
    assert [tick.description for tick in column.boxes.children[1:]] == [f"{k}: {g} (in the picture)" for k, g in mbeir.grains(query)]
    assert all(tick.disabled and tick.value for tick in column.boxes.children[1:]) and len(column.boxes.children) > 1
    assert column.text.disabled and "<img" in column.head.value and all(shown(column))


def test_of_an_image_with_text_only_what_the_text_names_can_go(measured, read, column):
    column.unit.value = "emoji_task7"
    queries = list(measured[0].bench["emoji_task7"].queries)
    index = next(i for i, q in enumerate(queries) if len(mbeir.grains(q)) > len(grains.removable(q)) > 0)
    column.choice.value = ("emoji_task7", index)
    (place, *_) = grains.removable(queries[index])
    named = mbeir.grains(queries[index])[place][1]
    assert [not tick.disabled for tick in column.boxes.children[1:]].index(True) == place and named in read[-1].text
    box(column, place).value = False
    assert named not in read[-1].text and read[-1].image is not None


def test_another_query_or_unit_begins_with_all_grains(measured, read, column):
    box(column, 0).value = False
    column.choice.value = ("emoji_task0", 3)
    assert all(tick.value for tick in column.boxes.children[1:])
    column.text.value = "a red dog"
    read.clear()
    column.unit.value = "emoji_task1"
    assert column.text.value == "" and column.choice.value == ("emoji_task1", 0)
    assert read[-1] == measured[0].searcher.query(measured[0].bench["emoji_task1"].queries[0], "emoji_task1")


def test_columns_are_apart_and_share_the_embedded_pools(measured, read):
    left, right = explorer.Explorer(measured, DEPTH).columns
    pool, before = len(measured[0].bench["emoji_task0"].candidates), (shown(right), right.head.value)
    assert len(read) == 2 * pool + 4 and shown(left) != before[0]  # two models, and two queries for each
    box(left, 0).value = False
    left.text.value = "a red dog"
    assert (shown(right), right.head.value) == before and len(read) == 2 * pool + 8


def test_positives_are_marked_as_far_as_they_are_known(measured, column):
    m = measured[0]
    result = m.bench["emoji_task0"]
    query, best = result.queries[0], result.candidates[result.top[0][0]]
    for positives, count in (((best.did,), 1), ((), 0)):
        answers = explorer.Model(m).answers("emoji_task0", replace(query, positives=positives), DEPTH)
        page = explorer.page(answers, m.searcher.root)
        assert page.count("✓ positive") == count == page.count("<li class") and (answers.rank == 1) == bool(count)
    assert f"rank {result.ranks[0][0]} of {len(result.candidates)}" in column.panels[0].value


@pytest.mark.parametrize("dropped", [(), (0,)])
def test_the_grains_that_were_queried_and_an_answer_lacks_are_struck(measured, dropped):
    struck = 0
    for m in measured:
        query = m.bench["emoji_task0"].queries[2]
        answers = explorer.Model(m).answers("emoji_task0", query, DEPTH, dropped)
        cards = explorer.page(answers, m.searcher.root).split("<li")[1:]
        for card, (candidate, cosine) in zip(cards, answers.best, strict=True):
            lacks = [pair[1] for i, pair in enumerate(mbeir.grains(query)) if i not in dropped and pair not in mbeir.grains(candidate)]
            assert re.findall("✗ <del>(.*?)</del>", card) == lacks and f"{cosine:.3f}" in card
            struck += len(lacks)
    assert struck


@pytest.mark.parametrize(
    ("wanted", "named", "lines"),
    [
        ([("who", "man"), ("what", "pilot")], [("who", "woman"), ("what", "pilot")], ["✗ man woman", "✓ pilot"]),
        (
            [("tone", "dark skin tone")],
            [("who", "man"), ("tone", "medium-dark skin tone")],
            ["✗ dark skin tone medium-dark skin tone", "+ man"],
        ),
        ([("who", "man"), ("tone", "dark skin tone")], [("who", "man")], ["✓ man", "✗ dark skin tone "]),
        ([("word", "MAN"), ("word", "red")], [("who", "man"), ("what", "pilot")], ["✓ MAN", "✗ red ", "+ man pilot"]),
        ([("what", "man")], [("who", "man")], ["✗ man ", "+ man"]),
        ([("word", "man")], [("who", "woman")], ["✗ man ", "+ woman"]),
        ([("who", "<b>")], [("who", "<i>")], ["✗ &lt;b&gt; &lt;i&gt;"]),
        ([("who", "man")], [], []),
    ],
)
def test_what_an_answer_has_instead_stands_beside_what_it_lacks(measured, wanted, named, lines):
    candidate = replace(measured[0].bench["emoji_task0"].candidates[0], source={"grains": named})
    assert [re.sub("<[^>]*>", "", line) for line in explorer._compared(wanted, candidate)] == lines


@pytest.mark.parametrize(
    ("text", "names", "less"),
    [
        ("a  red dog", ["a", "red", "dog"], "A red."),
        ("a man, a red dog; running.", ["a man", "a red dog", "running"], "A man, a red dog."),
        ("dog dog", ["dog", "dog"], "Dog."),
        (", ,", [",", ","], ","),
    ],
)
def test_grains_of_a_typed_query_are_what_stands_between_commas_else_words(measured, text, names, less):
    like = measured[0].bench["emoji_task7"].queries[0]
    query = explorer.typed(text, like)
    assert [name for _, name in mbeir.grains(query)] == names and grains.removable(query) == list(range(len(names)))
    assert grains.without(query, len(names) - 1).text.startswith(less)
    assert (query.image, query.qid, query.positives) == (like.image, like.qid, ())


def test_a_typed_query_is_read_in_the_place_of_the_chosen_one(measured, read, column):
    chosen = measured[0].searcher.query(measured[0].bench["emoji_task0"].queries[0], "emoji_task0").text
    instruction = chosen.removesuffix(measured[0].bench["emoji_task0"].queries[0].text)
    column.text.value = "<b>big</b>, dog"
    assert read[-1].text == read[-2].text == instruction + "<b>big</b>, dog."
    assert "&lt;b&gt;big" in column.head.value and "<b>big" not in column.head.value  # data is text, never markup
    assert [tick.description for tick in column.boxes.children[1:]] == ["part: <b>big</b>", "part: dog"]
    assert "positive" not in "".join(panel.value for panel in column.panels)
    column.text.value = ""
    assert read[-1].text == chosen


def test_thumbnails_are_small_and_only_from_the_root(measured, tmp_path):
    m = measured[0]
    root = m.searcher.root
    answers = explorer.Model(m).answers("emoji_task0", m.bench["emoji_task0"].queries[0], DEPTH)
    pictures = re.findall('base64,([^"]*)', explorer.page(answers, root))
    shapes = [Image.open(io.BytesIO(base64.b64decode(p))).size for p in pictures]
    assert len(pictures) == DEPTH and all(max(shape) == explorer.SIDE for shape in shapes)
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    for path in (str(tmp_path / "secret.png"), "../../secret.png"):
        outside = replace(answers, best=[(replace(answers.best[0][0], image=path), 1.0)])
        with pytest.raises(files.ElvaDataError, match="leaves the root"):
            explorer.page(outside, root)


def test_an_image_that_is_gone_is_named_in_the_widget(column, monkeypatch):
    monkeypatch.setattr(explorer, "page", lambda *_: (_ for _ in ()).throw(files.ElvaDataError("image <a> is missing")))
    box(column, 0).value = False
    assert "image &lt;a&gt; is missing" in column.head.value and not any(panel.value for panel in column.panels)


def test_a_query_against_a_pool_on_disk_is_embedded_without_being_kept(measured):
    m = measured[0]
    kept: list = []
    on_disk = SimpleNamespace(
        **{name: getattr(m.searcher, name) for name in ("root", "query", "encoder", "template")},
        settings=SimpleNamespace(on_disk=True),
        vectors=lambda items: kept.append(items := list(items)) or m.searcher._in_memory(items),
    )
    model, query = explorer.Model(replace(m, searcher=on_disk)), m.bench["emoji_task0"].queries[1]
    once, again, other = (model.answers("emoji_task0", q, DEPTH) for q in (query, query, explorer.typed("dog", query)))
    plain = explorer.Model(m).answers("emoji_task0", query, DEPTH)
    assert len(kept) == 1 and len(kept[0]) == len(m.bench["emoji_task0"].candidates)  # the pool, once
    assert once == again and once.summary == plain.summary and other.text != once.text
    np.testing.assert_allclose([s for _, s in once.best], [s for _, s in plain.best], atol=1e-5)


def test_a_picture_that_is_overwritten_is_shown_as_it_is_now(tmp_path):
    shown = []
    for color in ("red", "blue"):
        Image.new("RGB", (40, 40), color).save(tmp_path / "x.bmp")
        os.utime(tmp_path / "x.bmp", ns=(len(shown), len(shown)))
        shown.append(explorer._picture(tmp_path / "x.bmp"))
    assert shown[0] != shown[1]
