"""Stage 3: what a step does, the guard, resuming, and the choice of negatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elva_core import encoder, mbeir, negatives, rewards, rlvr, runtime
from elva_core.settings import NegativeSettings


@pytest.fixture
def ranked(tiny, root, smoke):
    return negatives.mine(tiny, root, 8, smoke.stage3.negatives, batch=32, seed=1)


def stage3(smoke, **changes):
    return smoke.stage3.model_copy(update={"queries": 8, "queries_per_step": 4, "rollouts": 3} | changes)


@pytest.mark.parametrize("sides", ["query", "all"])
def test_a_step_leaves_gradients_and_logs_every_line(tiny, ranked, smoke, sides):
    settings = stage3(smoke, rollout_sides=sides)
    tiny.add_lora(settings.lora, seed=0)
    row = rlvr.step(tiny, ranked[:2], settings, torch.Generator().manual_seed(0))
    rewards_logged = {"reward", "reward_margin", "reward_rank", "reward_std", "frac_reward_zero_std", "cos_positive"}
    policy_logged = {"kl", "entropy", "clip_fraction", "summary_length", "no_natural_end", "distinct_summaries"}
    assert rewards_logged | policy_logged <= set(row)
    assert all(np.isfinite(v) for v in row.values())
    assert row["kl"] == pytest.approx(0, abs=1e-6)  # a fresh adapter is the reference
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in tiny.trainable().items() if "lora_B" in n)


def test_the_actions_are_one_or_all_sides(ranked):
    assert len(rlvr.sides(ranked, "query")) == len(ranked)
    assert len(rlvr.sides(ranked, "all")) == sum(2 + len(r.negatives) for r in ranked)


def test_rewards_of_a_rollout_use_its_own_candidates(smoke):
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    q, p, n = unit(torch.randn(2, 3, 8), dim=-1), unit(torch.randn(2, 3, 8), dim=-1), unit(torch.randn(2, 3, 5, 8), dim=-1)
    r = smoke.stage3.reward
    got = rlvr.reward(q, p, n, r)
    s_p, s_n = q[1, 2] @ p[1, 2], n[1, 2] @ q[1, 2]
    margin = rewards.margin_reward(s_p, s_n, delta=r.delta)
    rank = rewards.rank_reward(s_p, s_n, gamma=r.gamma, form=r.form, reduction=r.penalty_reduction)
    assert got.total[1, 2].item() == pytest.approx((0.4 * margin + 0.6 * rank).item(), abs=1e-6)


def test_chunks_do_not_change_the_gradient(model_folder, smoke, ranked, monkeypatch):
    """Greedy rollouts, so that both chunkings sample the same; gains are given, since equal rollouts have none."""
    greedy = rlvr.rollout.generate
    monkeypatch.setattr(rlvr.rollout, "generate", lambda *a, **k: greedy(*a, **{**k, "generator": None}))
    monkeypatch.setattr(rlvr.objectives, "advantages", lambda r, scale: torch.arange(r.numel()).float().view_as(r) - 2)
    for aggregation in ("sequence", "dr_grpo", "dapo"):
        gradients = []
        for chunk in (1, 3, 4):
            model = encoder.load(model_folder, smoke.encoder)
            settings = stage3(smoke, chunk=chunk, rollouts=2, aggregation=aggregation)
            model.add_lora(settings.lora, seed=0)
            rlvr.step(model, ranked[:4], settings, torch.Generator())
            gradients.append(torch.cat([p.grad.flatten() for p in model.trainable().values() if p.grad is not None]))
        assert gradients[0].abs().max() > 0
        for other in gradients[1:]:
            assert (gradients[0] - other).abs().max() < 1e-5 * gradients[0].abs().max().clamp(min=1)


def test_negatives_are_hard_first_below_the_threshold_and_never_positive():
    scores = np.array([0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.1])
    settings = NegativeSettings(hard=2, random=2, threshold=0.95)
    for seed in range(20):
        rows = negatives.choose(scores, {1}, 0.9, settings, np.random.default_rng(seed))
        assert rows[:2] == [2, 3] and not {1} & set(rows) and len(set(rows)) == 4
    narrow = NegativeSettings(hard=2, random=0, threshold=0.95, margin=0.05)
    assert negatives.choose(scores, set(), 0.6, narrow, np.random.default_rng(0)) == [4, 5]


def test_every_query_has_as_many_negatives_even_when_all_are_above_the_threshold():
    scores = np.array([0.99, 0.98, 0.97, 0.96, 0.5])
    settings = NegativeSettings(hard=2, random=2, threshold=0.9)
    rows = negatives.choose(scores, set(), 0.9, settings, np.random.default_rng(0))
    assert rows[0] == 4 and len(set(rows)) == 4
    with pytest.raises(mbeir.ElvaDataError, match="3 candidates for 4 negatives"):
        negatives.choose(scores[:3], set(), 0.9, settings, np.random.default_rng(0))


def test_mined_negatives_have_the_positives_modality_and_are_not_judged_positive(ranked):
    for r in ranked:
        assert r.positive not in r.negatives
        assert {(bool(n.image), bool(n.text)) for n in r.negatives} == {(bool(r.positive.image), bool(r.positive.text))}


@pytest.mark.parametrize(
    ("row", "reason"),
    [({"kl": float("nan")}, "KL"), ({"kl": 9.0}, "above its bound"), ({"reward": float("nan")}, "not a number")],
)
def test_the_guard_names_its_reason(smoke, row, reason):
    healthy = {"reward": 0.5, "kl": 0.1, "frac_reward_zero_std": 0.2}
    check = rlvr.guard(smoke.stage3)
    assert check(healthy) is None
    assert reason in check(healthy | row)


def test_constant_summaries_are_called_a_collapse(smoke):
    check = rlvr.guard(smoke.stage3)
    row = {"reward": 0.5, "kl": 0.1, "frac_reward_zero_std": 1.0}
    answers = [check(row) for _ in range(rlvr.COLLAPSE_WINDOW)]
    assert answers[:-1] == [None] * (rlvr.COLLAPSE_WINDOW - 1) and "collapse" in answers[-1]


def test_an_interrupted_run_ends_with_the_same_weights(model_folder, smoke, ranked, tmp_path, monkeypatch):
    settings = stage3(smoke, queries_per_step=2, optimiser=smoke.stage3.optimiser.model_copy(update={"checkpoint_every": 2}))
    whole = encoder.load(model_folder, smoke.encoder)
    rlvr.train(whole, ranked, settings, seed=4, folder=tmp_path / "whole")

    original, calls = rlvr.step, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(rlvr, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        rlvr.train(encoder.load(model_folder, smoke.encoder), ranked, settings, seed=4, folder=tmp_path / "cut")
    monkeypatch.setattr(rlvr, "step", original)
    resumed = encoder.load(model_folder, smoke.encoder)
    rows = rlvr.train(resumed, ranked, settings, seed=4, folder=tmp_path / "cut")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    for (name, a), b in zip(whole.backbone.named_parameters(), resumed.backbone.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, smoke):
    weight = torch.nn.Parameter(torch.ones(2))
    settings = smoke.stage3.optimiser.model_copy(update={"checkpoint_every": 1})

    def step_fn(step):
        (weight * (float("nan") if step == 2 else 1.0)).sum().backward()
        return {}

    with pytest.raises(runtime.DivergedError, match="step 2: gradient is not finite"):
        runtime.optimise({"w": weight}, step_fn, 5, settings, tmp_path)
    assert (tmp_path / "checkpoint/state.safetensors").is_file() and not (tmp_path / "metrics.jsonl").exists()
