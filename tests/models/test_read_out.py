"""Where an embedding is read: at [RET], one token before, or at a [RET] without a summary."""

from __future__ import annotations

import pytest
import torch

from elva_core.evaluation import benchmark
from elva_core.models import encoder, generation
from elva_core.models.encoder import normalised
from elva_core.retrieval import retriever
from elva_core.training import contrastive


@pytest.mark.parametrize("read_out", ["ret", "before"])
@torch.no_grad()
def test_every_way_reads_the_state_that_a_plain_forward_has_there(model_folder, smoke, items, read_out):
    model = encoder.load(model_folder, smoke.encoder.model_copy(update={"read_out": read_out}))
    uniform = torch.rand(len(items), 2, smoke.encoder.max_summary_tokens, generator=torch.Generator().manual_seed(1))
    out = generation.generate(model, items, noise=uniform)
    taught = generation.score(model, items, out)[1]
    summaries = out.summaries(model.end_id)
    for g in range(2):
        written = [group[g] for group in summaries]
        endings = [[*s, model.ret_id][: None if read_out == "ret" else -1] for s in written]
        for row, (item, ending) in enumerate(zip(items, endings, strict=True)):
            plain = normalised(model.states(model.batch([item], model.settings.summary_request, [ending]))[:, -1])[0]
            for found in (out.embeddings[row, g], taught[row, g], model.embed_summaries([item], [written[row]])[0][0]):
                torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)


@torch.no_grad()
def test_bare_is_what_the_model_gives_that_ends_at_once(tiny, items):
    ends = torch.full((len(items), 1, 1), tiny.end_id)
    wanted = generation.completed(tiny, items, ends, torch.ones_like(ends, dtype=torch.bool)).embeddings[:, 0]
    vectors, texts = retriever.encode(tiny, items, batch=4, template="bare")
    torch.testing.assert_close(torch.from_numpy(vectors), wanted, atol=1e-5, rtol=0)
    assert set(texts) == {""}


def test_candidates_without_summaries_are_trained_and_searched_at_once(model_folder, smoke, root, tmp_path, monkeypatch):
    model = encoder.load(model_folder, smoke.encoder.model_copy(update={"candidate_summaries": False}))
    searcher = benchmark.searcher_of(model, root, "test", smoke.evaluation, "summary")
    unit = root.units("test")[0]
    found = searcher.embedded(unit)
    pool = [benchmark.retriever.candidate_item(root, c) for c in found.candidates]
    for vectors, asked, template in (
        (found.pool_vectors, pool, "bare"),
        (found.query_vectors, [searcher.query(q, unit) for q in found.queries], "summary"),
    ):
        torch.testing.assert_close(*map(torch.as_tensor, (vectors, retriever.encode(model, asked, batch=16, template=template)[0])))
    given, embed = [], model.embed_summaries
    monkeypatch.setattr(model, "embed_summaries", lambda items, texts: given.extend(zip(items, texts, strict=True)) or embed(items, texts))
    settings = smoke.stage2.model_copy(update={"steps": 1, "ret_share": 1.0})
    draw = contrastive.union_pairs(root, settings, 1)
    contrastive.train(model, draw, settings, seed=1, folder=tmp_path)
    candidates = {pair.candidate for pair in draw(0, settings.batch)}
    assert {item for item, text in given if not text} == candidates
    assert {item for item, text in given if text} == {pair.query for pair in draw(0, settings.batch)}
