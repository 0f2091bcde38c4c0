"""The explorer without a browser: what a tick changes, for both models alike, and what a person may type."""

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
def asked(measured, monkeypatch) -> list[data_items.Item]:
    """What the models are asked, in order."""
    seen: list = []
    for m in measured:
        monkeypatch.setattr(m.searcher, "vectors", lambda items, own=m.searcher: seen.extend(items := list(items)) or own._in_memory(items))
    return seen


def shown(widget) -> list[list[str]]:
    """The cells of every answer that each model shows, without pictures."""
    rows = [re.findall("<tr.*?</tr>", panel.value)[1:] for panel in widget.panels]
    return [[re.sub("<[^>]*>", "|", row) for row in own] for own in rows]


def box(widget, place):
    return widget.boxes.children[1 + place]


def test_a_query_with_all_its_grains_is_ranked_as_the_benchmark_ranked_it(measured):
    for m in measured:
        for unit, result in m.bench.items():
            got = explorer.Asker(m)(unit, result.queries[2], DEPTH)
            assert [c.did for c, _ in got.found] == [result.candidates[row].did for row in result.top[2][:DEPTH]]
            assert [s for _, s in got.found] == pytest.approx(result.scores[2][:DEPTH].tolist(), abs=1e-6)
            assert got.rank == result.ranks[2][0] and got.size == len(result.candidates)


def test_unticking_a_grain_changes_query_and_rankings_and_ticking_it_restores_them(measured, asked):
    widget = explorer.Explorer(measured, DEPTH)
    query = next(iter(measured[0].bench["emoji_task0"].queries))
    before, everything = shown(widget), widget.head.value
    assert query.text.lower() in everything.lower() and len(before) == 2 and all(len(own) == DEPTH for own in before)
    del asked[:]
    box(widget, 0).value = False
    less = grains.without(query, 0)
    wanted = measured[0].searcher.query(less, "emoji_task0")
    assert less.text != query.text and asked == [wanted, wanted]  # both models, the same words
    assert wanted.text in widget.head.value
    assert all(a != b for a, b in zip(shown(widget), before, strict=True))
    box(widget, 0).value = True
    assert shown(widget) == before and widget.head.value == everything


def test_without_any_grain_the_instruction_alone_is_asked(measured, asked):
    widget = explorer.Explorer(measured, DEPTH)
    for tick in widget.boxes.children[1:]:
        tick.value = False
    assert asked[-1].text and asked[-1].text == mbeir.normalise(asked[-1].text)
    assert not any(grain.lower() in asked[-1].text.lower() for _, grain in mbeir.grains(measured[0].bench["emoji_task0"].queries[0]))


def test_a_query_without_text_is_asked_and_its_grains_stay(measured, asked):
    widget = explorer.Explorer(measured, DEPTH)
    widget.unit.value = "emoji_task3"
    query = next(iter(measured[0].bench["emoji_task3"].queries))
    assert query.text is None and asked[-1].image == measured[0].searcher.root.image_path(query.image)
    assert [tick.description for tick in widget.boxes.children[1:]] == [f"{k}: {g} (in the picture)" for k, g in mbeir.grains(query)]
    assert all(tick.disabled and tick.value for tick in widget.boxes.children[1:]) and len(widget.boxes.children) > 1
    assert widget.text.disabled and "<img" in widget.head.value and all(shown(widget))


def test_of_an_image_with_text_only_what_the_text_names_can_go(measured, asked):
    widget = explorer.Explorer(measured, DEPTH)
    widget.unit.value = "emoji_task7"
    queries = list(measured[0].bench["emoji_task7"].queries)
    index = next(i for i, q in enumerate(queries) if len(mbeir.grains(q)) > len(grains.removable(q)) > 0)
    widget.choice.value = ("emoji_task7", index)
    (place, *_) = grains.removable(queries[index])
    named = mbeir.grains(queries[index])[place][1]
    assert [not tick.disabled for tick in widget.boxes.children[1:]].index(True) == place and named in asked[-1].text
    box(widget, place).value = False
    assert named not in asked[-1].text and asked[-1].image is not None


def test_another_query_or_unit_begins_with_all_grains(measured, asked):
    widget = explorer.Explorer(measured, DEPTH)
    box(widget, 0).value = False
    widget.choice.value = ("emoji_task0", 3)
    assert all(tick.value for tick in widget.boxes.children[1:])
    widget.text.value = "a red dog"
    del asked[:]
    widget.unit.value = "emoji_task1"
    assert widget.text.value == "" and widget.choice.value == ("emoji_task1", 0)
    assert asked[-1] == measured[0].searcher.query(measured[0].bench["emoji_task1"].queries[0], "emoji_task1")


def test_right_answers_are_marked_as_far_as_they_are_known(measured):
    m = measured[0]
    result = m.bench["emoji_task0"]
    query, first = result.queries[0], result.candidates[result.top[0][0]]
    for positives, count in (((first.did,), 1), ((), 0)):
        answers = explorer.Asker(m)("emoji_task0", replace(query, positives=positives), DEPTH)
        page = explorer.table(answers, m.searcher.root)
        assert page.count(">right<") == count == page.count("outline") and (answers.rank == 1) == bool(count)
    assert f"rank {result.ranks[0][0]} of {len(result.candidates)}" in explorer.Explorer(measured, DEPTH).panels[0].value


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


def test_a_typed_query_is_asked_in_the_place_of_the_chosen_one(measured, asked):
    widget = explorer.Explorer(measured, DEPTH)
    chosen = asked[-1].text
    instruction = chosen.removesuffix(measured[0].bench["emoji_task0"].queries[0].text)
    widget.text.value = "<b>big</b>, dog"
    assert asked[-1].text == asked[-2].text == instruction + "<b>big</b>, dog."
    assert "&lt;b&gt;big" in widget.head.value and "<b>big" not in widget.head.value  # data is text, never markup
    assert [tick.description for tick in widget.boxes.children[1:]] == ["part: <b>big</b>", "part: dog"]
    assert "right" not in "".join(panel.value for panel in widget.panels)
    widget.text.value = ""
    assert asked[-1].text == chosen


def test_thumbnails_are_small_and_only_from_the_root(measured, tmp_path):
    m = measured[0]
    root = m.searcher.root
    answers = explorer.Asker(m)("emoji_task0", m.bench["emoji_task0"].queries[0], DEPTH)
    pictures = re.findall('base64,([^"]*)', explorer.table(answers, root))
    shapes = [Image.open(io.BytesIO(base64.b64decode(p))).size for p in pictures]
    assert len(pictures) == DEPTH and all(max(shape) == explorer.SIDE for shape in shapes)
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    for path in (str(tmp_path / "secret.png"), "../../secret.png"):
        outside = replace(answers, found=[(replace(answers.found[0][0], image=path), 1.0)])
        with pytest.raises(files.ElvaDataError, match="leaves the root"):
            explorer.table(outside, root)


def test_an_image_that_is_gone_is_named_in_the_widget(measured, monkeypatch):
    widget = explorer.Explorer(measured, DEPTH)
    monkeypatch.setattr(explorer, "table", lambda *_: (_ for _ in ()).throw(files.ElvaDataError("image <a> is missing")))
    box(widget, 0).value = False
    assert "image &lt;a&gt; is missing" in widget.head.value and not any(panel.value for panel in widget.panels)


def test_a_query_against_a_pool_on_disk_is_embedded_without_being_kept(measured, monkeypatch):
    m = measured[0]
    kept: list = []
    on_disk = SimpleNamespace(
        **{name: getattr(m.searcher, name) for name in ("root", "query", "encoder", "template")},
        settings=SimpleNamespace(on_disk=True),
        vectors=lambda items: kept.append(items := list(items)) or m.searcher._in_memory(items),
    )
    ask, query = explorer.Asker(replace(m, searcher=on_disk)), m.bench["emoji_task0"].queries[1]
    once, again, other = (ask("emoji_task0", q, DEPTH) for q in (query, query, explorer.typed("dog", query)))
    plain = explorer.Asker(m)("emoji_task0", query, DEPTH)
    assert len(kept) == 1 and len(kept[0]) == len(m.bench["emoji_task0"].candidates)  # the pool, once
    assert once == again and once.summary == plain.summary and other.asked != once.asked
    np.testing.assert_allclose([s for _, s in once.found], [s for _, s in plain.found], atol=1e-5)


def test_answers_are_shown_inline_without_a_widget(measured):
    page = explorer.inline(measured, "emoji_task0", measured[0].bench["emoji_task0"].queries[0], DEPTH).data
    assert page.count("<table") == 2 and page.count("<img") == 2 * DEPTH and page.count("Asked:") == 1


def test_a_picture_that_is_overwritten_is_shown_as_it_is_now(tmp_path):
    shown = []
    for color in ("red", "blue"):
        Image.new("RGB", (40, 40), color).save(tmp_path / "x.bmp")
        os.utime(tmp_path / "x.bmp", ns=(len(shown), len(shown)))
        shown.append(explorer._picture(tmp_path / "x.bmp"))
    assert shown[0] != shown[1]
