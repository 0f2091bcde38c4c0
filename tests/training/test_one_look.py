"""How often the frozen tower looks at an image in a step of training: once, whoever asks, and nothing is kept behind the step."""

from __future__ import annotations

import pytest
import torch

import families
from conftest import mined
from elva_core.models import encoder, generation
from elva_core.training import contrastive, grpo


@pytest.fixture(params=["qwen2_vl", "qwen3_vl"])
def forgetting(request, model_folder, texts, smoke, tmp_path) -> encoder.Encoder:
    """A model that splices features, and one that is read by its own processor, whose features are kept for a step alone."""
    folder = model_folder if request.param == "qwen2_vl" else families.write(families.qwen3_vl, texts, tmp_path / "model")
    return encoder.load(folder, smoke.encoder.model_copy(update={"cache_vision": False}))


def watched(model: encoder.Encoder) -> list[int]:
    """Numbers that the tower gives out, call by call: as many for each image as it has patches."""
    seen, tower = [], model.backbone.get_encoder(modality="image")
    tower.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state.numel()))
    return seen


def once(model: encoder.Encoder, seen: list[int], items) -> int:
    """What the tower gives out for each distinct image of the items alone."""
    seen.clear()
    for item in {item.images[0]: item for item in items if item.images}.values():
        model.batch([item], "x")
    total = sum(seen)
    seen.clear()
    return total


@pytest.mark.parametrize("ret_share", [0.0, 1.0])
@pytest.mark.parametrize("cached", [False, True])
def test_a_contrastive_step_looks_once_at_each_image(forgetting, root, smoke, tmp_path, ret_share, cached):
    changes = {"steps": 2, "batch": 12, "chunk": 5, "ret_share": ret_share, "gradient_cache": cached}
    settings = smoke.stage2.model_copy(update=changes | {"one_task_per_batch": False})
    draw, seen = contrastive.union_pairs(root, settings, 1), watched(forgetting)
    steps = [[item for pair in draw(step, 12) for item in (pair.query, pair.candidate)] for step in range(2)]
    alone = sum(once(forgetting, seen, step) for step in steps)
    contrastive.train(forgetting, draw, settings, seed=1, folder=tmp_path)
    assert sum(seen) == alone > 0
    assert not (forgetting.vision and forgetting.vision._features)


def test_a_step_of_stage_3_looks_once_at_each_image(forgetting, root, smoke, tmp_path):
    ranked, seen = mined(forgetting, root, smoke, 12), watched(forgetting)
    changes = {"queries": 12, "queries_per_step": 12, "num_generations": 2, "chunk": 6, "candidates": "step", "rollout_sides": "query"}
    alone = once(forgetting, seen, [item for r in ranked for item in (r.item, r.positive, *r.negatives)])
    grpo.train(forgetting, ranked, smoke.stage3.model_copy(update=changes), seed=1, folder=tmp_path)
    assert sum(seen) == alone > 0
    assert not (forgetting.vision and forgetting.vision._features)


@pytest.mark.parametrize("family", [families.qwen3_vl, families.llava_next, families.gemma3, families.idefics3])
def test_a_model_that_is_read_by_its_own_processor_looks_once_at_each_image_and_says_the_same(family, texts, items, smoke, tmp_path):
    model = encoder.load(families.write(family, texts, tmp_path), smoke.encoder)
    items = [*items, items[0], *reversed(items)]
    summaries = [[7, 8, 9][: 1 + place % 3] for place in range(len(items))]

    def asked() -> list[torch.Tensor]:
        with torch.no_grad():
            rollouts = generation.generate(model, items)
            scored = [generation.score(model, part, rollouts)[1] for part in (items, items)]
            return [rollouts.embeddings, *scored, model.embed_eol(items[:3]), model.embed_summaries(items, summaries)[0]]

    apart, seen = asked(), watched(model)
    alone = once(model, seen, items)
    with model.one_step():
        for one, other in zip(asked(), apart, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert sum(seen) == alone > 0
    seen.clear()
    model.embed_eol(items)
    assert sum(seen) == alone  # nothing was kept behind the step, and one batch looks once, too
