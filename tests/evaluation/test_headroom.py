"""Headroom of summaries: best of several, true ones, shares of the room; against brute force and by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from elva_core import distributed
from elva_core.data import mbeir
from elva_core.data.items import candidate_item
from elva_core.evaluation import benchmark, headroom
from elva_core.models import generation
from elva_core.retrieval import retriever

CUTOFFS = (1, 5)


def test_the_best_of_several_is_the_best_single_sample_and_never_below_one(tiny, root, bench, smoke):
    """Each sample ranked by numpy, equal scores in pool order; greedy rows are those of notebook 50."""
    searcher = retriever.Searcher(tiny, root, "test", smoke.evaluation)
    table = headroom.measure(searcher, bench, CUTOFFS, samples=3, seed=5)
    wide = table.set_index(["summaries", "unit", "qid"])[["hit@1", "hit@5"]]
    assert (wide.loc[headroom.BEST] >= wide.loc[headroom.SAMPLED]).all(axis=None)
    greedy = benchmark.measure("m", tiny, root, bench, smoke.evaluation, seed=0, pools=()).hits.set_index(["unit", "qid"])
    assert wide.loc[headroom.GREEDY]["hit@5"].to_dict() == greedy["hit@5"].to_dict()
    unit = bench.units("test")[0]
    pool = searcher.vectors([candidate_item(root, c) for c in bench.pool(unit, "test")])
    dids = [c.did for c in bench.pool(unit, "test")]
    for query in list(bench.queries(unit, "test"))[:3]:
        noise = distributed.rng_for(5, "headroom", unit, query.qid).random((3, smoke.encoder.max_summary_tokens))
        vectors = generation.generate(tiny, [searcher.query(query, unit)], noise=torch.from_numpy(noise)[None]).embeddings[0].numpy()
        hits = []
        for vector in vectors:
            order = np.argsort(-(pool.astype(float) @ vector.astype(float)).astype(np.float32), kind="stable")
            hits.append(any(dids[row] in query.positives for row in order[:5]))
        assert wide.loc[(headroom.BEST, unit, query.qid), "hit@5"] == max(hits)
        assert wide.loc[(headroom.SAMPLED, unit, query.qid), "hit@5"] == pytest.approx(np.mean(hits))


def test_a_true_summary_is_read_as_embed_summaries_reads_it_alone(tiny, items):
    texts = ["Woman running.", "Dog.", "A very long name of something with many more words than the cap.", *["Man."] * (len(items) - 3)]
    together = headroom.after(tiny, items, texts, batch=4)
    tokens = tiny.processor.tokenizer(texts, add_special_tokens=False).input_ids
    for item, ids, vector in zip(items, tokens, together, strict=True):
        with torch.no_grad():
            alone, _ = tiny.embed_summaries([item], [ids[: tiny.settings.max_summary_tokens]])
        assert vector == pytest.approx(alone[0].numpy(), abs=1e-5)
    assert len(tokens[2]) > tiny.settings.max_summary_tokens  # a text that was cut


def test_every_kind_of_summary_is_ranked_with_its_own_vectors(tiny, root, bench, smoke, monkeypatch):
    """Greedy: everything at one place, so that pool order decides; one of two samples and the true one of the query at its
    positives' place; of candidates, true ones at a place of each name's own."""
    searcher = retriever.Searcher(tiny, root, "test", smoke.evaluation)
    captions = sorted({mbeir.caption(c) for unit in bench.units("test") for c in bench.pool(unit, "test")})
    places = np.eye(len(captions) + 1, dtype=np.float32)
    searcher.vectors = searcher.embed_pool = lambda items: np.stack([places[-1] for _ in items])
    monkeypatch.setattr(headroom, "sampled", lambda _, items, noise, batch: np.stack([[places[-1], places[0]] for _ in items]))
    monkeypatch.setattr(headroom, "after", lambda _, items, texts, batch: np.stack([places[captions.index(t)] for t in texts]))
    table = headroom.measure(searcher, bench, CUTOFFS, samples=2, seed=0)
    rates = table.groupby("summaries")["hit@1"].mean()
    assert rates[headroom.ALL_TRUE] == 1 and rates[headroom.GREEDY] < 0.2
    # against a pool at one place every query finds the same candidate: the first
    for kind in (headroom.SAMPLED, headroom.BEST, headroom.TRUE):
        assert rates[kind] == rates[headroom.GREEDY]
    some = headroom.measure(searcher, bench, CUTOFFS, samples=2, seed=0, limit=3)
    assert set(some["qid"]) < set(table["qid"]) and len(some) == 5 * 3 * len(bench.units("test"))


def test_the_share_of_the_room_is_what_stage_3_gains_of_what_the_best_sample_would():
    """Of four queries stage 2 has one and the best of its samples three; stage 3 has two: half of the room."""
    hits = {
        ("stage 2", headroom.GREEDY): [1, 0, 0, 0],
        ("stage 2", headroom.BEST): [1, 1, 1, 0],
        ("stage 3", headroom.GREEDY): [1, 1, 0, 0],
        ("stage 3", headroom.BEST): [1, 1, 1, 1],
    }
    rows = [
        {"model": model, "summaries": kind, "unit": f"x_task{i % 2}", "qid": f"1:{i}", "hit@1": float(hit), "hit@5": 1.0}
        for (model, kind), values in hits.items()
        for i, hit in enumerate(values * 50)
    ]
    table = pd.DataFrame(rows).drop_duplicates(["model", "summaries", "qid"])
    shares = headroom.shares_taken(table, CUTOFFS, 200).set_index("metric")
    assert shares.loc["hit@1", "value"] == pytest.approx(0.5)
    assert shares.loc["hit@1", "ci_low"] < 0.5 < shares.loc["hit@1", "ci_high"]
    assert np.isnan(shares.loc["hit@5", "value"])  # no room
    said = headroom.sentence(headroom.table(table, CUTOFFS, 20, 0), shares.reset_index(), 8)
    assert said.startswith(
        "With the best of 8 sampled summaries, chosen knowing the answer, stage 2 would reach 75.0 % hit@1 (25.0 with its"
    )
    assert "and 100.0 % hit@5 (100.0 with its own). Stage 3 takes 50 % [" in said
    assert "] and a share that cannot be measured of these gains (n = 200 queries" in said
    low = shares.reset_index().assign(ci_low=-0.1)
    assert "of these gains, and may take none (n" in headroom.sentence(headroom.table(table, CUTOFFS, 20, 0), low, 8)


def test_reading_is_the_share_of_pictures_whose_summary_is_exact(root, bench):
    pictures = [c for unit in bench.units("test") for c in bench.pool(unit, "test") if c.modality == "image"]
    wrong = candidate_item(root, pictures[0])
    written = {candidate_item(root, c): mbeir.caption(c) for c in pictures} | {wrong: "Something else."}
    searcher = SimpleNamespace(root=root, split="test", summary=written.__getitem__)
    assert headroom.reading(searcher, bench) == pytest.approx(1 - 1 / len(written))
    searcher.summary = {}.__getitem__  # kept nowhere
    assert headroom.reading(searcher, bench) is None
