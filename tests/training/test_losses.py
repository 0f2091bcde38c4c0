"""Losses against independent forms and enumerable cases."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis.strategies import floats, integers

from elva_core.training import losses


def test_an_ignored_pair_does_not_matter_and_the_positive_stays():
    q = torch.eye(3)
    c = torch.eye(3).clone()
    c[2] = q[0]  # candidate 2 is a second positive of query 0
    ignore = losses.false_negatives([["a", "c"], ["b"], ["c"]], ["a", "b", "c"])
    assert ignore.tolist() == [[False, False, True], [False, False, False], [False, False, False]]
    with_mask = losses.infonce(q[:1], c, temperature=1.0, ignore=ignore[:1])
    assert with_mask.item() == pytest.approx(-math.log(math.e / (math.e + 1)), rel=1e-6)


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
