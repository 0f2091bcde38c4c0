"""Rewards by hand-computed cases; every expected number is derived in a comment."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis.strategies import integers

from elva_core.training import rewards


def test_printed_weight_rewards_negatives_at_ranks_one_and_two():
    # ln 1 - 1 = -1, ln 2 - 1 = -0.3069, ln 3 - 1 = 0.0986
    weights = rewards.negative_weights(torch.tensor([1, 2, 3]), "printed")
    assert weights.tolist() == pytest.approx([-1, math.log(2) - 1, math.log(3) - 1], abs=1e-6)
    assert rewards.negative_weights(torch.tensor([1, 2, 3]), "corrected").tolist() == pytest.approx([0, 0, math.log(3) - 1], abs=1e-6)


def test_rank_reward_of_a_perfect_ranking():
    # r = 1, negatives at ranks 2 and 3: 0.9 - 0.1 * (0.5 (ln 2 - 1) + 0.2 (ln 3 - 1)) on the sum
    s_p, s_n = torch.tensor(0.9), torch.tensor([0.5, 0.2])
    by_hand = 0.9 - 0.1 * (0.5 * (math.log(2) - 1) + 0.2 * (math.log(3) - 1))
    assert rewards.rank_reward(s_p, s_n, gamma=0.1, reduction="sum").item() == pytest.approx(by_hand, abs=1e-6)
    mean = 0.9 - 0.05 * (0.5 * (math.log(2) - 1) + 0.2 * (math.log(3) - 1))
    assert rewards.rank_reward(s_p, s_n, gamma=0.1, reduction="mean").item() == pytest.approx(mean, abs=1e-6)


def test_as_printed_a_stronger_negative_above_the_positive_raises_the_reward_and_corrected_it_does_not():
    s_p = torch.tensor(0.3)
    weak, strong = torch.tensor([0.5, 0.1]), torch.tensor([0.9, 0.1])  # same ranks: 1 and 3, positive at 2
    printed = [rewards.rank_reward(s_p, n, gamma=0.5, form="printed").item() for n in (weak, strong)]
    corrected = [rewards.rank_reward(s_p, n, gamma=0.5, form="corrected").item() for n in (weak, strong)]
    assert printed[1] - printed[0] == pytest.approx(0.5 / 2 * 0.4, abs=1e-6)  # weight -1, mean of 2, 0.4 more
    assert corrected[0] == pytest.approx(corrected[1], abs=1e-6)


def test_a_tie_counts_against_the_positive():
    r, _ = rewards.ranks(torch.tensor(0.5), torch.tensor([0.5, 0.5]))
    assert r.item() == 3


def test_margin_pays_nothing_to_failures_and_without_bound_to_easy_ones():
    negatives = torch.tensor([[0.4, 0.1], [0.4, 0.1], [-0.9, -1.0]])
    got = rewards.margin_reward(torch.tensor([0.3, 0.6, 1.0]), negatives, delta=0.1)
    assert got.tolist() == pytest.approx([0.0, 0.1, 1.8], abs=1e-6)


def test_leading_dimensions_are_kept_and_do_not_mix():
    torch.manual_seed(0)
    s_p, s_n = torch.rand(3, 4), torch.rand(3, 4, 5)
    whole = rewards.rank_reward(s_p, s_n, gamma=0.1)
    single = torch.stack([torch.stack([rewards.rank_reward(s_p[i, j], s_n[i, j], gamma=0.1) for j in range(4)]) for i in range(3)])
    torch.testing.assert_close(whole, single)


@pytest.mark.parametrize("form", ["printed", "corrected"])
@hypothesis.given(torch_seed=integers(0, 999))
def test_the_order_in_which_negatives_are_listed_does_not_matter(form, torch_seed):
    generator = torch.Generator().manual_seed(torch_seed)
    s_p, s_n = torch.rand(4, generator=generator), torch.rand(4, 9, generator=generator)
    shuffled = s_n[:, torch.randperm(9, generator=generator)]
    for negatives in (s_n, shuffled):
        assert torch.equal(rewards.ranks(s_p, negatives)[0], 1 + (negatives >= s_p[:, None]).sum(1))
    for reduction in ("sum", "mean"):
        given, again = (rewards.rank_reward(s_p, n, gamma=0.1, form=form, reduction=reduction) for n in (s_n, shuffled))
        torch.testing.assert_close(given, again)


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="neither printed nor corrected"):
        rewards.negative_weights(torch.tensor([1]), "typo")
    with pytest.raises(ValueError, match="neither sum nor mean"):
        rewards.rank_reward(torch.tensor(0.1), torch.tensor([0.2]), gamma=0.1, reduction="max")


def test_the_margin_weighs_as_much_as_a_query_is_solved():
    alpha, epsilon = rewards.adaptive_weights(torch.tensor([[1, 1, 1, 1], [1, 4, 2, 1], [3, 2, 2, 9]]), alpha=0.4, epsilon=0.6)
    assert alpha.flatten().tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert (alpha + epsilon).flatten().tolist() == pytest.approx([1.0] * 3)
