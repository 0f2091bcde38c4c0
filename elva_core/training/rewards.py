"""The two verifiable rewards of ELVA stage 3 as pure functions; torch only.

Letters: r rank of the positive, k rank of a negative, both from 1 in the list of one rollout sorted by
cosine; N negatives of a query; any leading dimensions (queries, rollouts) are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from elva_core.training_settings import RewardSettings


def margin_reward(positive: torch.Tensor, negatives: torch.Tensor, *, delta: float) -> torch.Tensor:
    """R_margin = max(0, s_p - max_n s_n - delta).

    Args:
        positive: (...) cosine of the positive. negatives: (..., N) cosines of the negatives. delta: in cosine
            units.

    It is 0 on exactly the rollouts that fail, and grows without bound on easy ones.

    >>> margin_reward(torch.tensor(0.9), torch.tensor([0.5, 0.2]), delta=0.1)
    tensor(0.3000)
    """
    return (positive - negatives.amax(-1) - delta).clamp(min=0)


def ranks(positive: torch.Tensor, negatives: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks of the positive (...) and of the negatives (..., N), from 1; a tie counts against the positive.

    >>> ranks(torch.tensor(0.5), torch.tensor([0.9, 0.5, 0.1]))
    (tensor(3), tensor([1, 2, 4]))
    """
    scores = torch.cat([negatives, positive[..., None]], dim=-1)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1) + 1
    return rank[..., -1], rank[..., :-1]


def negative_weights(rank: torch.Tensor, form: str) -> torch.Tensor:
    """Weight ln k - 1 that a negative at rank k is punished with.

    As printed it is -1 at k=1 and -0.31 at k=2: a negative that stands above the positive is *rewarded*.
    The corrected form clips the weight at 0.
    """
    weight = rank.double().log() - 1
    if form == "printed":
        return weight.float()
    if form == "corrected":
        return weight.clamp(min=0).float()
    raise ValueError(f"reward form {form!r} is neither printed nor corrected")


def rank_reward(
    positive: torch.Tensor,
    negatives: torch.Tensor,
    *,
    gamma: float,
    form: str = "printed",
    reduction: str = "mean",
) -> torch.Tensor:
    """R_rank = s_p / (1 + ln r) - gamma * (sum | mean) over negatives of s_n (ln k - 1); natural logarithm.

    Args:
        positive: (...). negatives: (..., N). gamma: weight of the penalty, about 0.1 on the mean, 0.001 on
            the sum of 100.

    The gradient with respect to the cosines is that of the formula with ranks held fixed.
    """
    r, k = ranks(positive.detach(), negatives.detach())
    penalty = negatives * negative_weights(k, form)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"penalty reduction {reduction!r} is neither sum nor mean")
    penalty = penalty.sum(-1) if reduction == "sum" else penalty.mean(-1)
    return positive / (1 + r.float().log()) - gamma * penalty


def total_reward(
    margin: torch.Tensor, rank: torch.Tensor, *, alpha: float | torch.Tensor, epsilon: float | torch.Tensor
) -> torch.Tensor:
    """R_total = alpha R_margin + epsilon R_rank; the paper takes 0.4 and 0.6."""
    return alpha * margin + epsilon * rank


def adaptive_weights(
    rank: torch.Tensor, *, alpha: float, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (alpha, epsilon) per query, each (Q, 1, ...), that follow training; they sum to the fixed two.

    The margin says nothing about rollouts that fail, the rank nothing about those that succeed; so the margin
    gets the share of a query's rollouts that already put the positive first, and the rank the rest. Ours; the
    paper names adaptive rules as future work.

    Args:
        rank: (Q, ...) rank of the positive in each rollout, from 1.

    >>> adaptive_weights(torch.tensor([[1, 1, 2, 5]]), alpha=0.4, epsilon=0.6)
    (tensor([[0.5000]]), tensor([[0.5000]]))
    """
    solved = (rank == 1).float().flatten(1).mean(1).view(-1, *[1] * (rank.ndim - 1))
    return (alpha + epsilon) * solved, (alpha + epsilon) * (1 - solved)


class Scored(NamedTuple):
    """Rewards of one step, each (Q, G)."""

    total: torch.Tensor
    margin: torch.Tensor
    rank: torch.Tensor
    cosine: torch.Tensor  # to the positive
    position: torch.Tensor  # rank of the positive, from 1
    rewarded_negatives: torch.Tensor  # negatives above the positive whose printed weight is below 0


def reward(
    positive: torch.Tensor,
    negatives: torch.Tensor,
    settings: RewardSettings,
    lengths: torch.Tensor | None = None,
) -> Scored:
    """Rewards of rollouts.

    Args:
        positive: (Q, G) cosines to the positive. negatives: (Q, G, N) cosines to the negatives.
        lengths: (Q, G) tokens written, which `token_cost` is paid for.
    """
    form, reduction = settings.form, settings.penalty_reduction
    margin = margin_reward(positive, negatives, delta=settings.delta)
    rank = rank_reward(positive, negatives, gamma=settings.gamma, form=form, reduction=reduction)
    r, k = ranks(positive, negatives)
    rewarded = ((k < r[..., None]) & (negative_weights(k, "printed") < 0)).sum(-1)
    alpha, epsilon = settings.alpha, settings.epsilon
    if settings.weights == "adaptive":
        alpha, epsilon = adaptive_weights(r, alpha=alpha, epsilon=epsilon)
    total = total_reward(margin, rank, alpha=alpha, epsilon=epsilon)
    if lengths is not None:
        total = total - settings.token_cost * lengths
    return Scored(total, margin, rank, positive, r, rewarded)
