"""Figures of the reward's terms: their weights by rank, and one query whose negative passes its positive."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from matplotlib.figure import Figure

from elva_core.experiments.figures import BLUE, RED, axes_of
from elva_core.training import rewards
from elva_core.training_settings import RewardSettings


def rank_weights(ranks: Sequence[int], gamma: float) -> tuple[Figure, pd.DataFrame]:
    """Weight of a negative in R_rank against its rank, as printed and corrected; discount of the positive."""
    k = torch.tensor(ranks)
    weights = {form: rewards.negative_weights(k, form) for form in ("printed", "corrected")}
    table = pd.DataFrame({"rank": ranks, **weights, "positive": 1 / (1 + k.float().log())})
    figure, ((left, right),) = axes_of(columns=2, size=(8, 3))
    left.axhline(0, color="black", linewidth=0.8)
    left.plot(k, table["printed"], "o-", markersize=3, label="printed: ln k - 1", color=RED)
    left.plot(k, table["corrected"], ".--", label="corrected: max(0, ln k - 1)", color=BLUE)
    left.set(xlabel="rank k of the negative", ylabel="weight of the penalty", xscale="log")
    left.set_title(f"Below 0 a negative is rewarded (gamma = {gamma})", fontsize=10)
    left.legend(frameon=False)
    right.plot(k, table["positive"], "o-", markersize=3, color=BLUE)
    right.set(xlabel="rank r of the positive", ylabel="1 / (1 + ln r)", xscale="log", ylim=(0, 1.05))
    right.set_title("Discount of the positive", fontsize=10)
    whole = [rank for rank in (1, 2, 3, 5, 10, 20, 50, 100) if rank <= max(ranks)]
    for axis in (left, right):
        axis.xaxis.set(ticks=whole, ticklabels=whole)
        axis.minorticks_off()
    return figure, table


def hardest_negative(
    settings: RewardSettings, positive: float, others: Sequence[float]
) -> tuple[Figure, pd.DataFrame]:
    """R_rank and R_total of one query, as printed and corrected, while a negative passes the positive.

    Args:
        positive: cosine of the positive. others: cosines of the other negatives, held fixed.
    """
    hardest = torch.linspace(0, 1, 201)
    s_p = torch.full_like(hardest, positive)
    s_n = torch.cat([hardest[:, None], torch.tensor(others).expand(201, -1)], dim=1)
    margin = rewards.margin_reward(s_p, s_n, delta=settings.delta)
    table = pd.DataFrame({"hardest": hardest, "R_margin": margin})
    how = {"gamma": settings.gamma, "reduction": settings.penalty_reduction}
    for form in ("printed", "corrected"):
        rank = rewards.rank_reward(s_p, s_n, form=form, **how)
        total = rewards.total_reward(margin, rank, alpha=settings.alpha, epsilon=settings.epsilon)
        table[f"R_rank {form}"], table[f"R_total {form}"] = rank, total
    figure, (axes,) = axes_of(1, 2, (8, 3.2))
    for axis, name in zip(axes, ("R_rank", "R_total"), strict=True):
        for form, colour, dash in (("printed", RED, "-"), ("corrected", BLUE, "--")):
            axis.plot(table["hardest"], table[f"{name} {form}"], color=colour, linestyle=dash, label=form)
        axis.axvline(positive, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="cosine of the hardest negative", title=name)
    axes[0].set_ylabel("reward")
    axes[1].legend(frameon=False, title=f"{len(others)} others fixed", fontsize=7, title_fontsize=7)
    highest = f"the margin reward is {margin.max():.2f} at most"
    title = f"Reward of one query while one negative passes its positive (dotted: cosine {positive:.2f})"
    figure.suptitle(f"{title}\n{highest}", fontsize=10)
    return figure, table
