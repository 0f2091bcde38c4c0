"""Nested embeddings: the losses of every stage at several prefixes, against sentence-transformers and against one prefix at a time."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

from conftest import mined
from elva_core import cli, config
from elva_core.models import encoder
from elva_core.retrieval import cache, retriever
from elva_core.training import contrastive, distillation, grpo, losses

DIMS = (8, 20, 48)  # 48 is all


class Given(torch.nn.Module):
    """A model of sentence-transformers whose embeddings are what it is given."""

    def forward(self, features):
        return dict(features)

    def get_embedding_dimension(self):
        return 48


def theirs(queries, candidates, dims, temperature):
    """MatryoshkaLoss over their InfoNCE, with weights that sum to 1."""
    model = Given()
    ranking = MultipleNegativesRankingLoss(model, scale=1 / temperature)
    nested = MatryoshkaLoss(model, ranking, list(dims), [1 / len(dims)] * len(dims))
    return nested([{"sentence_embedding": queries}, {"sentence_embedding": candidates}], None)


@pytest.mark.parametrize("cache_gradients", [False, True])
@pytest.mark.parametrize("dims", [(8,), DIMS])
def test_the_loss_of_a_step_and_its_gradient_are_sentence_transformers(model_folder, smoke, root, tmp_path, dims, cache_gradients):
    changes = {"dims": dims, "gradient_cache": cache_gradients, "steps": 1, "batch": 6, "mask_false_negatives": False, "ret_share": 0.0}
    settings = smoke.changed({"stage2": changes | {"lora": {"dropout": 0.0}}}).stage2
    draw, gradients, seen = contrastive.union_pairs(root, settings, 1), [], []
    one, other = (encoder.load(model_folder, smoke.encoder) for _ in range(2))

    def kept(parameters, step_fn, *_):
        seen.append(step_fn(0))
        gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        return seen

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(contrastive.loop, "train_loop", kept)
        contrastive.train(one, draw, settings, seed=4, folder=tmp_path)
    pairs = draw(0, 6)
    other.add_lora(settings.lora, seed=4)
    expected = theirs(*(other.embed_eol([getattr(p, side) for p in pairs]) for side in ("query", "candidate")), dims, 0.05)
    expected.backward()
    assert settings.temperature == 0.05 and seen[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
    wanted = {name: p.grad for name, p in other.trainable().items() if p.grad is not None}
    assert gradients[0].keys() == wanted.keys() and any(g.abs().max() > 1e-4 for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-5, rtol=1e-4)


def test_without_dims_the_embeddings_are_those_of_before_and_longer_prefixes_are_refused():
    vectors = torch.randn(3, 48)
    (whole,) = losses.nested(vectors, ())
    assert whole is vectors
    with pytest.raises(ValueError, match=r"dims = \[8, 64\], but embeddings have 48 numbers"):
        losses.nested(vectors, (8, 64))


@pytest.mark.parametrize("candidates", ["step", "mined"])
@pytest.mark.parametrize("sides", ["query", "all"])
def test_a_reward_is_the_mean_of_those_at_each_dim_and_so_is_its_derivative(model_folder, smoke, root, sides, candidates):
    tiny = encoder.load(model_folder, smoke.encoder)
    ranked = mined(tiny, root, smoke, 2)
    shape = (2, len(grpo.sides(ranked[0], sides)), 3, smoke.encoder.max_summary_tokens)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    rewards, slopes = {}, {}
    for dims in (DIMS, *((dim,) for dim in DIMS)):
        settings = smoke.stage3.model_copy(
            update={"num_generations": 3, "rollout_sides": sides, "candidates": candidates, "dims": dims, "gradient": "pathwise"}
        )
        model = encoder.load(model_folder, smoke.encoder)
        model.add_lora(settings.lora, seed=0)
        rewards[dims] = grpo.step(model, ranked, settings, noise)["reward"]
        slopes[dims] = torch.cat([p.grad.flatten() for n, p in model.trainable().items() if "lora_B" in n])
    single = [(dim,) for dim in DIMS]
    assert len({round(rewards[dim], 6) for dim in single}) == 3
    assert rewards[DIMS] == pytest.approx(np.mean([rewards[dim] for dim in single]), abs=1e-6)
    torch.testing.assert_close(slopes[DIMS], torch.stack([slopes[dim] for dim in single]).mean(0), atol=1e-6, rtol=1e-4)


def test_distillation_is_the_mean_over_its_dims(model_folder, smoke, root, tmp_path):
    drawn = distillation.sample(contrastive.union_pairs(root, smoke.stage2, 1), 8, 8)
    targets = torch.from_numpy(retriever.encode(encoder.load(model_folder, smoke.encoder), drawn, batch=16)[0])
    row = {}
    for dims in (DIMS, *((dim,) for dim in DIMS), ()):
        settings = smoke.changed({"distil": {"steps": 1, "batch": 12, "dims": dims}}).distil
        model = encoder.load(model_folder, smoke.encoder)
        (row[dims],) = distillation.train(model, drawn, targets, settings, seed=4, folder=tmp_path / str(dims))
    for name in ("loss", "kl", "cosine"):
        assert row[DIMS][name] == pytest.approx(np.mean([row[dim,][name] for dim in DIMS]), abs=1e-5)
        assert row[48,][name] == pytest.approx(row[()][name], abs=1e-5) != row[8,][name]


def test_evaluate_scores_every_dim_that_the_folder_names_and_whole_embeddings_as_before(tiny, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    common = ["evaluate", "--root", str(root.folder), "--profile", "smoke", "--template", "eol"]
    tables = {}
    for name, dims in (("whole", ()), ("nested", (8, 48))):
        tiny.save(tmp_path / name, stage="test", parent="none", template="eol", dims=dims)
        assert json.loads((tmp_path / name / "elva.json").read_text()).get("dims", []) == list(dims)
        assert cli.main([*common, "--model", str(tmp_path / name), "--out", str(tmp_path / f"of {name}")]) == 0
        tables[name] = pd.read_csv(tmp_path / f"of {name}/results.csv").set_index(["unit", "metric"])["value"]
    whole, nested = tables["whole"], tables["nested"]
    hits = [place for place in whole.index if place[1].removeprefix("hit@").isdigit()]
    assert nested[whole.index].equals(whole)
    assert set(nested.index) - set(whole.index) == {(unit, f"{name} dim {dim}") for unit, name in hits for dim in (8, 48)}
    assert all(nested[unit, f"{name} dim 48"] == nested[unit, name] for unit, name in hits)

    # hit rates at 8 numbers from nothing but the embeddings
    searcher = retriever.Searcher(tiny, root, "test", config.EvaluationSettings.model_construct(batch=16, cutoffs=(5,)), template="eol")
    for unit in root.units("test"):
        found = searcher.embedded(unit)
        q, c = (np.float16(v).astype(np.float64)[:, :8] for v in (found.query_vectors, found.pool_vectors))
        scores = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (c / np.linalg.norm(c, axis=1, keepdims=True)).T
        best = np.argsort(-scores, axis=1, kind="stable").tolist()
        for name in (name for of, name in hits if of == unit):
            first = int(name.removeprefix("hit@"))
            hit = np.mean([bool(set(rows[:first]) & set(judged)) for rows, judged in zip(best, found.relevant, strict=True)])
            assert nested[unit, f"{name} dim 8"] == pytest.approx(hit)
    assert any(nested[unit, f"{name} dim 8"] != nested[unit, name] for unit, name in hits)

    # in the folder of scores without these dims
    again = [*common, "--unit", "emoji_task0", "--model", str(tmp_path / "whole"), "--out", str(tmp_path / "of whole")]
    assert cli.main([*again, "--dim", "16"]) == 0 and "hit@5 dim 16" in capsys.readouterr().out
    assert cli.main([*again, "--dim", "64"]) == 1
    assert "embeddings have 48 numbers, fewer than --dim 64" in capsys.readouterr().err
