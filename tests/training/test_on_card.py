"""Everything that trains, mines, embeds and searches keeps its tensors on one device, by a pretended card (tests/pretend_card.py)."""

from __future__ import annotations

import pytest
import torch

from conftest import mined
from elva_core.models import encoder, generation
from elva_core.retrieval import retriever, search
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


def test_search_and_evaluation(loaded, root, smoke, card):
    result = retriever.Searcher(loaded, root, "test", smoke.evaluation).evaluate("emoji_task0")
    assert len(result.ranks) == len(result.queries)
    generator = torch.Generator().manual_seed(0)
    pool, queries = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator)).numpy() for n in (3000, 40))
    pool[7] = pool[2000]  # a tie
    relevant = [[i, 2000] for i in range(40)]
    there, here = (search.exact(queries, pool, 10, relevant, device=device) for device in ("cuda", "cpu"))
    assert (there.rows == here.rows).all() and (there.scores == here.scores).all()
    assert there.ranks == here.ranks and there.pessimistic == here.pessimistic
