"""Losses against independent forms and enumerable cases."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis.strategies import floats, integers

from elva_core.training import losses


def test_infonce_equals_its_formula_on_a_random_batch():
    torch.manual_seed(0)
    q, c = (torch.nn.functional.normalize(torch.randn(n, 8), dim=-1) for n in (5, 9))
    scores = (q @ c.T / 0.05).double()
    by_hand = -(scores.diagonal() - scores.exp().sum(1).log()).mean()
    assert losses.infonce(q, c, temperature=0.05).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_an_ignored_pair_does_not_matter_and_the_positive_stays():
    q = torch.eye(3)
    c = torch.eye(3).clone()
    c[2] = q[0]  # candidate 2 is a second positive of query 0
    ignore = losses.false_negatives([["a", "c"], ["b"], ["c"]], ["a", "b", "c"])
    assert ignore.tolist() == [[False, False, True], [False, False, False], [False, False, False]]
    with_mask = losses.infonce(q[:1], c, temperature=1.0, ignore=ignore[:1])
    assert with_mask.item() == pytest.approx(-math.log(math.e / (math.e + 1)), rel=1e-6)


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_gradient_cache_gives_the_gradient_of_the_plain_loss(chunks):
    torch.manual_seed(1)
    inputs, layer = torch.randn(20, 6), torch.nn.Linear(6, 4)
    parts = inputs.chunk(chunks)

    def embed(i):
        return torch.nn.functional.normalize(torch.tanh(layer(parts[i])), dim=-1), 0.1 * layer(parts[i]).square().sum()

    def loss_fn(v):
        return losses.infonce(v[:10], v[10:], temperature=0.05)

    gradients = []
    for cache in (False, True):
        layer.zero_grad()
        loss = losses.backward_in_chunks(embed, range(len(parts)), loss_fn, cache=cache)
        gradients.append((loss, layer.weight.grad.clone()))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert (gradients[0][1] - gradients[1][1]).abs().max() < 1e-5


def test_a_group_without_spread_gets_advantage_zero():
    rewards = torch.tensor([[0.3, 0.3, 0.3], [0.0, 1.0, 2.0]])
    for scale in ("group", "batch", "none"):
        got = losses.advantages(rewards, scale, rewards.std())
        assert got[0].abs().max() < 1e-4 and torch.isfinite(got).all()
    # std of (0, 1, 2) is 1: advantages are -1, 0, 1
    assert losses.advantages(rewards)[1].tolist() == pytest.approx([-1, 0, 1], abs=1e-3)


@hypothesis.given(torch_seed=integers(0, 999), shift=floats(-5, 5), factor=floats(0.5, 9))
def test_scaled_by_the_group_advantages_sum_to_zero_and_do_not_know_the_units_of_the_reward(torch_seed, shift, factor):
    rewards = torch.rand(3, 8, generator=torch.Generator().manual_seed(torch_seed)).double()
    gain = losses.advantages(rewards)
    torch.testing.assert_close(losses.advantages(factor * rewards + shift), gain, atol=5e-3, rtol=0)  # but for ADVANTAGE_EPSILON
    torch.testing.assert_close(gain.sum(1), torch.zeros(3).double(), atol=1e-9, rtol=0)


def test_k3_is_never_negative_and_zero_only_for_equal_policies():
    p = torch.log(torch.tensor([0.2, 0.5, 0.9]))
    assert losses.k3(p, p).abs().max() == 0
    assert (losses.k3(p, p.flip(0))[[0, 2]] > 0).all()
    # its mean under p is the KL: sum p (exp(lr - lp) - (lr - lp) - 1) = KL for normalised p and r
    p, r = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    assert (p * losses.k3(p.log(), r.log())).sum().item() == pytest.approx((p * (p / r).log()).sum().item(), rel=1e-5)


def loss(log_p, advantage, mask, log_old=None, log_ref=None, loss_type="grpo"):
    return losses.policy_loss(
        log_p, log_p.detach() if log_old is None else log_old, log_p.detach() if log_ref is None else log_ref, mask, advantage,
        clip=0.2, beta=0.5, loss_type=loss_type, max_length=4,
    )  # fmt: skip


def test_on_policy_the_loss_is_minus_the_advantage_and_its_gradient_that_of_reinforce():
    log_p = torch.tensor([[-1.0, -2.0], [-0.5, -0.1]], requires_grad=True)
    value, facts = loss(log_p, torch.tensor([1.0, -2.0]), torch.tensor([[1, 1], [1, 0]]))
    assert value.item() == pytest.approx(-(1.0 - 2.0) / 2)
    value.backward()
    # d/d log_p of -A * ratio is -A; two tokens share the first sequence, masked tokens get nothing
    torch.testing.assert_close(log_p.grad, torch.tensor([[-0.25, -0.25], [1.0, 0.0]]))
    assert facts == {"kl": 0.0, "clip_fraction": 0.0}


def test_the_three_loss_types_by_hand():
    log_p = torch.zeros(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    gain = torch.tensor([1.0, 3.0])
    got = [loss(log_p, gain, mask, loss_type=a)[0].item() for a in ("grpo", "dr_grpo", "dapo")]
    assert got == pytest.approx([-(1 + 3) / 2, -(4 + 3) / 8, -(4 + 3) / 5])


def test_a_clipped_token_has_no_gradient():
    log_p = torch.tensor([[0.0], [0.0]], requires_grad=True)
    value, facts = loss(log_p, torch.tensor([1.0, -1.0]), torch.ones(2, 1), log_old=torch.tensor([[-1.0], [1.0]]))
    value.backward()
    assert log_p.grad.abs().max() == 0 and facts["clip_fraction"] == 1


def test_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="none of"):
        loss(torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), loss_type="mean")
