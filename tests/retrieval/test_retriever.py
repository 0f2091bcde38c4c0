"""Encoding, scoring a unit, run files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from elva_core import files
from elva_core.data import lint
from elva_core.data.items import Item
from elva_core.retrieval import cache, retriever


def test_encoding_keeps_order_and_repeats(tiny, items):
    vectors, summaries = retriever.encode(tiny, [*items, *items[::-1]], batch=4)
    assert np.array_equal(vectors, vectors[::-1]) and summaries == summaries[::-1]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_scoring_a_unit(tiny, root, smoke, tmp_path):
    searcher = retriever.Searcher(tiny, root, "test", smoke.evaluation, template="eol")
    unit = root.units("test")[0]
    local, everything = searcher.evaluate(unit), searcher.evaluate(unit, pool="global")
    assert len(local.ranks) == len(root.queries(unit, "test"))
    assert all(b[0] >= a[0] for a, b in zip(local.ranks, everything.ranks, strict=True))
    for path, columns in zip(retriever.write_run(local, tmp_path, "x"), (6, 7), strict=True):
        lines = path.read_text().splitlines()
        assert len(lines) == len(local.queries) * 10 and all(len(line.split()) == columns for line in lines)


def test_a_sample_is_ranked_as_in_the_whole_unit_and_is_part_of_a_larger_one(tiny, root, smoke):
    searcher = retriever.Searcher(tiny, root, "test", smoke.evaluation, template="eol")
    whole, few, more, all_of_them = (searcher.evaluate("emoji_task0", sample=n) for n in (None, 3, 7, 10**6))
    known = {q.qid: (ranks, top.tolist()) for q, ranks, top in zip(whole.queries, whole.ranks, whole.top, strict=True)}
    place = {q.qid: i for i, q in enumerate(whole.queries)}
    assert {q.qid for q in few.queries} < {q.qid for q in more.queries} and len(few.queries) == 3
    assert [place[q.qid] for q in more.queries] == sorted(place[q.qid] for q in more.queries)
    assert all(known[q.qid] == (r, t.tolist()) for q, r, t in zip(more.queries, more.ranks, more.top, strict=True))
    assert [q.qid for q in all_of_them.queries] == [q.qid for q in whole.queries]


def test_a_judgement_the_pool_lacks_and_a_query_without_judgement_fail_loudly(tiny, own_root, smoke):
    searcher = retriever.Searcher(tiny, own_root, "test", smoke.evaluation, template="eol")
    path = own_root.qrels_path("emoji_task0", "test")
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first.replace(" 0 10:", " 0 10:99"), *rest]) + "\n")
    with pytest.raises(files.ElvaDataError, match=r"judged with 10:99.*lacks; run lint"):
        searcher.evaluate("emoji_task0")
    path.write_text("\n".join(rest) + "\n")
    with pytest.raises(files.ElvaDataError, match="has no judgement"):
        searcher.evaluate("emoji_task0")


def test_a_query_without_a_positive_in_its_local_pool_is_refused_with_file_and_line(tiny, own_root, smoke):
    searcher = retriever.Searcher(tiny, own_root, "test", smoke.evaluation, template="eol")
    path, qrels = own_root.query_path("emoji_task0", "test"), own_root.qrels_path("emoji_task0", "test")
    lines = path.read_text().splitlines()
    qid = json.loads(lines[2])["qid"]
    judged = [line for line in qrels.read_text().splitlines() if line.split()[0] != qid]
    qrels.write_text("\n".join([*judged, f"{qid} 0 9:1 1 0"]) + "\n")
    for sample in (None, len(lines)):
        with pytest.raises(files.ElvaDataError, match=rf"{path}:3: query {qid} has no positive in the local pool; "):
            searcher.embedded("emoji_task0", sample=sample)


@pytest.mark.parametrize("part", ["qid", "did", "judgement"])
def test_an_id_with_leading_zeros_is_refused_with_file_and_line(tiny, own_root, smoke, part):
    """The same number would have two names, and a local pool is told by the dataset's."""
    searcher = retriever.Searcher(tiny, own_root, "test", smoke.evaluation, template="eol")
    path, qrels = own_root.query_path("emoji_task0", "test"), own_root.qrels_path("emoji_task0", "test")
    changed = qrels if part == "judgement" else own_root.pool_path("emoji_task0", "test") if part == "did" else path
    first, *rest = changed.read_text().splitlines()
    changed.write_text("\n".join([first.replace("10:", "010:", 1), *rest]) + "\n")
    with pytest.raises(files.ElvaDataError, match=rf"{changed}:1: .*010:"):
        searcher.evaluate("emoji_task0")
    assert any(p.startswith(f"{changed}:1: ") and "010:" in p for p in lint.check(own_root, decode_images=False))


def test_what_was_embedded_has_a_hash_wherever_the_vectors_are(tiny, root, smoke, tmp_path):
    store = cache.Store(tmp_path, tiny, batch=4, template="eol")
    for where in (None, store):
        searcher = retriever.Searcher(tiny, root, "test", smoke.evaluation, template="eol", store=where)
        all_of_them, few = searcher.embedded("emoji_task0"), searcher.embedded("emoji_task0", sample=3)
        assert all_of_them.content == searcher.embedded("emoji_task0").content
        assert all_of_them.content[1] == few.content[1] != all_of_them.content[0] != few.content[0]


def test_a_unit_without_queries_is_refused_and_named(tiny, own_root, smoke):
    path = own_root.query_path("emoji_task0", "test")
    path.write_text("")
    with pytest.raises(files.ElvaDataError, match=f"{path} has no queries"):
        retriever.Searcher(tiny, own_root, "test", smoke.evaluation, template="eol").evaluate("emoji_task0")


def test_a_picture_that_is_overwritten_is_embedded_again(tiny, items, smoke, root, tmp_path):
    first, second = [item.image for item in items if item.image and not item.text][:2]
    place = tmp_path / "query.png"
    searcher = retriever.Searcher(tiny, root, "test", smoke.evaluation, template="eol")
    for picture in (first, second):
        place.write_bytes(picture.read_bytes())
        found = searcher.vectors([Item("", place)])
        np.testing.assert_array_equal(found, retriever.encode(tiny.forgetful(), [Item("", picture)], batch=1, template="eol")[0])
