"""Everything that trains, mines, embeds and searches keeps its tensors on one device, by a pretended card (tests/pretend_card.py)."""

from __future__ import annotations

import pytest
import torch

import families
from conftest import mined
from elva_core.evaluation import grains, headroom
from elva_core.export import faiss_index
from elva_core.models import encoder, generation
from elva_core.mrbench import annotate, build
from elva_core.retrieval import cache, retriever, search
from elva_core.retrieval import pool as pools
from elva_core.training import contrastive, distillation, grpo, reranker
from pretend_card import PretendCard, on_card


@pytest.fixture
def card():
    with PretendCard() as pretended:
        yield pretended


@pytest.fixture
def loaded(card, model_folder, smoke):
    """The tiny encoder on the card."""
    return encoder.load(model_folder, smoke.encoder, device="cuda")


def test_the_card_refuses_what_a_card_refuses(card):
    a, layer = torch.zeros(3, device="cuda"), torch.nn.Linear(3, 2).to("cuda")
    assert a.device.type == "cuda" and (a + 1).is_cuda and a[torch.tensor([0])].is_cuda and torch.nn.Parameter(a).is_cuda
    assert not on_card(a.cpu()) and (a + torch.tensor(2.0)).cpu().numpy().sum() == 6
    for wrong in (
        lambda: a + torch.zeros(3),
        lambda: layer(torch.zeros(1, 3)),
        lambda: torch.stack([a, torch.zeros(3)]),
        lambda: torch.zeros(3)[a.long()],
        lambda: torch.rand(3, generator=torch.Generator(), device="cuda"),
        lambda: a.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()


def test_embeddings_are_those_of_the_cpu(loaded, items, model_folder, smoke, card):
    noise = torch.rand(len(items), 2, smoke.encoder.max_summary_tokens)
    out, eol = generation.generate(loaded, items, noise=noise), loaded.embed_eol(items)
    assert on_card(out.embeddings) and on_card(eol)
    here = encoder.load(model_folder, smoke.encoder)
    assert torch.equal(out.tokens.cpu(), generation.generate(here, items, noise=noise).tokens)
    assert torch.equal(eol.cpu(), here.embed_eol(items))


@pytest.mark.parametrize("family", [None, families.qwen3_vl])
def test_pixels_go_to_the_card_through_pinned_memory(card, model_folder, texts, tmp_path, smoke, items, family):
    """Those of a spliced model's images one by one, of any other's as its processor has stacked them."""
    model = encoder.load(families.write(family, texts, tmp_path) if family else model_folder, smoke.encoder, device="cuda")
    card.pinned = 0
    model.embed_eol([item for item in items if item.images])
    assert card.pinned >= 1
    before = card.pinned
    model.embed_eol([item for item in items if not item.images])
    assert card.pinned == before


@pytest.mark.parametrize("gradient_cache", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_contrastive_stages(loaded, root, smoke, tmp_path, gradient_cache, checkpointing):
    changes = {"steps": 2, "gradient_cache": gradient_cache, "gradient_checkpointing": checkpointing}
    s = smoke.stage2.model_copy(update=changes)
    rows = contrastive.train(loaded, contrastive.union_pairs(root, s, 1), s, seed=1, folder=tmp_path)
    assert [row["ret"] for row in rows] == [0, 1]


RL = {
    "as it is": {},
    "candidates of the step": {"candidates": "step", "gradient": "full", "loss_type": "dapo", "scale_rewards": "batch"},
    "all sides": {"rollout_sides": "all"},
}


@pytest.mark.parametrize("change", RL.values(), ids=list(RL))
def test_stage_3_and_its_control(loaded, root, smoke, tmp_path, change):
    ranked = mined(loaded, root, smoke, 8)
    s = smoke.stage3.model_copy(update={"queries": 8, "queries_per_step": 4, **change})
    assert len(grpo.train(loaded, ranked, s, seed=1, folder=tmp_path / "rl")) == 2
    control = smoke.control.model_copy(update={"steps": 1})
    contrastive.train(loaded, contrastive.ranked_pairs(ranked, 1, control), control, seed=1, folder=tmp_path / "control")
    loaded.save(tmp_path / "model", stage="stage3", parent="")


def test_distillation_and_reranker(loaded, root, smoke, tmp_path):
    items = distillation.sample(contrastive.union_pairs(root, smoke.stage2, 1), 8, 8)
    targets = distillation.taught(loaded, items, batch=8, path=tmp_path / "teacher.safetensors")
    distil = smoke.distil.model_copy(update={"steps": 1})
    distillation.train(loaded, items, targets, distil, seed=1, folder=tmp_path / "distil")
    ranked, rerank = mined(loaded, root, smoke, 4), smoke.rerank.model_copy(update={"steps": 2, "batch": 2})
    reranker.train(loaded, ranked, rerank, seed=1, folder=tmp_path / "rerank")
    asked = [reranker.Asked(str(i), r.item, tuple("abc"), r.negatives[:3]) for i, r in enumerate(ranked[:2])]
    for kind in reranker.KINDS:
        assert len(reranker.score(loaded, asked, kind, rerank, batch=4)) == 2


def test_the_analyses_of_grains_and_summaries_and_an_index(loaded, root, smoke, tmp_path, monkeypatch):
    bench = build.build(root, smoke.mrbench, annotate=annotate.exact, folder=tmp_path / "bench", seed=1)[0]
    searcher = retriever.Searcher(loaded, root, "test", smoke.evaluation)
    room = headroom.measure(searcher, bench, (1, 5), samples=2, seed=1, limit=4)
    assert set(room["summaries"]) >= {headroom.GREEDY, headroom.BEST} and 0 <= headroom.reading(searcher, bench) <= 1
    unit = bench.units("test")[0]
    removable = grains.ablatable(bench.queries(unit, "test"))[:4]
    assert len(grains.distances(searcher, removable, unit)) >= len(removable) and len(grains.twins(searcher, bench))
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    loaded.save(tmp_path / "model", stage="test", parent="none")
    again = encoder.load(tmp_path / "model", device="cuda")
    assert faiss_index.write(again, pools.of_unit(again, root, unit, batch=16), tmp_path / "index", precision="int8")


def test_search_and_evaluation(loaded, root, smoke, card, monkeypatch):
    result = retriever.Searcher(loaded, root, "test", smoke.evaluation).evaluate("emoji_task0")
    assert len(result.ranks) == len(result.queries)
    monkeypatch.setattr(search, "ROWS", 1024)
    generator = torch.Generator().manual_seed(0)
    pool, queries = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator)).numpy() for n in (3000, 40))
    pool[7] = pool[2000]  # a tie
    relevant = [[i, 2000] for i in range(40)]
    for vectors in (pool, pool[:1].repeat(3000, axis=0)):  # the same everywhere: a second pass in float64
        there, here = (search.exact(queries, vectors, 10, relevant, device=device) for device in ("cuda", "cpu"))
        assert (there.rows == here.rows).all() and (there.scores == here.scores).all()
        assert there.ranks == here.ranks and there.pessimistic == here.pessimistic
