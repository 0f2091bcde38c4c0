"""Rollouts of a step before they are learnt from: groups drawn again, what is raised through embeddings, what tokens cost."""

from __future__ import annotations

import pytest
import torch
from test_grpo import noise, stage3

from elva_core.models import encoder, generation
from elva_core.training import grpo, losses, rollouts


def gradient_of(model_folder, smoke, asked, settings, *given):
    """Of one step, and what it logs."""
    model = encoder.load(model_folder, smoke.encoder)
    model.add_lora(settings.lora, seed=0)
    row = grpo.step(model, asked, settings, *given)
    return torch.cat([p.grad.flatten() for p in model.trainable().values() if p.grad is not None]), row


@pytest.mark.parametrize("sides", ["query", "all"])
def test_a_group_without_spread_gives_way_to_the_next_query(model_folder, smoke, tiny, ranked, sides):
    """As if the other query had been drawn in its place; without another one with spread it stays, and is counted."""
    settings = stage3(smoke, rollout_sides=sides, scale_rewards="none", chunk=5, resample=2)
    uniform, flat, fresh = (noise(tiny, ranked[:3], settings, seed) for seed in range(3))
    uniform[1] = flat[:] = uniform[1, :1, :1]  # the same summary in all rollouts
    spare, drawn = ranked[3:6], [ranked[0], ranked[2], ranked[4]]
    given = uniform, generation.in_process, [(spare[::-1], flat), (spare, fresh)]
    found, row = gradient_of(model_folder, smoke, ranked[:3], settings, *given)
    wanted, plain = gradient_of(model_folder, smoke, drawn, settings, torch.stack([uniform[0], uniform[2], fresh[1]]))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
    assert row.pop("resampled") == pytest.approx(2 / 3) and row == pytest.approx(plain, rel=1e-4, abs=1e-6)
    _, row = gradient_of(model_folder, smoke, ranked[:3], settings, uniform, generation.in_process, [(spare, flat)])
    assert [row["resampled"], row["frac_reward_zero_std"]] == pytest.approx([1 / 3, 1 / 3])


def test_gated_raises_infonce_of_the_rollouts_below_their_mean_alone(tiny, ranked, smoke):
    settings = stage3(smoke, gradient="gated", infonce_weight=0.5)
    groups = rollouts.rolled_out(tiny, ranked[:2], [0, 1], noise(tiny, ranked[:2], settings), settings, generation.in_process)
    vectors = torch.cat([s.embeddings for s in groups.sampled]).requires_grad_()
    total, low = torch.zeros(()), groups.scored.total < groups.scored.total.mean(1, keepdim=True)
    for q, g in low.nonzero().tolist():
        total = total - losses.infonce(vectors[q, g][None], torch.from_numpy(ranked[q].vectors), temperature=0.05)
    (wanted,) = torch.autograd.grad(0.5 * total / low.numel(), vectors)
    torch.testing.assert_close(groups.slope, wanted, atol=1e-6, rtol=1e-4)
    assert 0 < low.sum() < low.numel()


@pytest.mark.parametrize(("rows", "calls"), [(None, [4]), (6, [2, 2])])
def test_a_steps_rollouts_are_written_in_one_call_or_so_many_rows_at_once(model_folder, smoke, ranked, monkeypatch, tmp_path, rows, calls):
    """Whatever the chunk that gradients are taken in; likewise the step's candidates."""
    settings = stage3(smoke, queries=4, queries_per_step=4, chunk=3, decode_rows=rows, candidates="step")
    sampled, candidates, written, generate = [], [], generation._written, generation.generate

    def noted(model, items, noise, *rest):
        if noise is not None:
            sampled.append(len(items))
        return written(model, items, noise, *rest)

    monkeypatch.setattr(generation, "_written", noted)
    monkeypatch.setattr(generation, "generate", lambda model, items: candidates.append(len(items)) or generate(model, items))
    grpo.train(encoder.load(model_folder, smoke.encoder), ranked[:4], settings, seed=1, folder=tmp_path)
    assert sampled == calls
    texts, images = ({i for r in ranked[:4] for i in (r.positive, *r.negatives) if bool(i.image) == kind} for kind in (False, True))
    least = sum(1 if rows is None else -(-len(part) // rows) for part in (texts, images) if part)
    assert len(candidates) == least and max(candidates) <= (rows or len(texts | images))


def test_a_token_costs_and_the_end_of_turn_does_not(tiny, ranked, smoke):
    settings, end, pad = stage3(smoke), tiny.end_id, tiny.pad_id
    paying = settings.model_copy(update={"reward": settings.reward.model_copy(update={"token_cost": 0.25})})
    tokens = torch.tensor([[5, end, pad], [5, 6, end], [end, pad, pad]])
    acted = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)

    def written(model, parts, noises, temperature):
        shape = [(len(part), *tokens.shape) for part in parts]
        return [generation.completed(model, part, tokens.expand(s), acted.expand(s)) for part, s in zip(parts, shape, strict=True)]

    given = ranked[:2], [0, 1], noise(tiny, ranked[:2], settings)
    free, costly = (rollouts.rolled_out(tiny, *given, s, written).scored.total for s in (settings, paying))
    torch.testing.assert_close(free - costly, 0.25 * torch.tensor([[1.0, 2.0, 0.0]] * 2))
