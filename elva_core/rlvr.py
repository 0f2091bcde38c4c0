"""Stage 3: reinforcement learning with verifiable rewards (GRPO) over generated summaries.

Per query G summaries are sampled, each gives an embedding at [RET]; its cosines to the positive and the negatives are
scored by the rules of rewards.py; GRPO raises the probability of the better summaries. The reference policy is the
merged stage-2 model: the adapter of this stage, disabled.

    rows = train(encoder, ranked, settings.stage3, seed=17, folder=out)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from elva_core import objectives, rewards, rollout, runtime
from elva_core.contrastive import epochs
from elva_core.encoder import Encoder, Item
from elva_core.negatives import Ranked
from elva_core.settings import RewardSettings, RlvrSettings

COLLAPSE_WINDOW = 20  # steps in a row without any reward spread before the guard calls it a collapse


class Scored(NamedTuple):
    """Rewards of one step, each (Q, G)."""

    total: torch.Tensor
    margin: torch.Tensor
    rank: torch.Tensor
    cosine: torch.Tensor  # to the positive
    position: torch.Tensor  # rank of the positive, from 1
    rewarded_negatives: torch.Tensor  # negatives above the positive whose printed weight is below 0


def reward(queries: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, settings: RewardSettings) -> Scored:
    """Rewards of rollouts.

    Args:
        queries: (Q, G, D). positives: (Q, G, D) or (Q, 1, D). negatives: (Q, G, N, D) or (Q, 1, N, D). L2-normalised.
    """
    s_p = (queries * positives).sum(-1)
    s_n = (queries[:, :, None] * negatives).sum(-1)
    margin = rewards.margin_reward(s_p, s_n, delta=settings.delta)
    rank = rewards.rank_reward(s_p, s_n, gamma=settings.gamma, form=settings.form, reduction=settings.penalty_reduction)
    r, k = rewards.ranks(s_p, s_n)
    rewarded = ((k < r[..., None]) & (rewards.negative_weights(k, "printed") < 0)).sum(-1)
    total = rewards.total_reward(margin, rank, alpha=settings.alpha, epsilon=settings.epsilon)
    return Scored(total, margin, rank, s_p, r, rewarded)


def sides(ranked: Sequence[Ranked], which: str) -> list[Item]:
    """Items whose summaries are actions: the queries alone, or queries, positives and all negatives, query by query."""
    if which == "query":
        return [r.item for r in ranked]
    return [item for r in ranked for item in (r.item, r.positive, *r.negatives)]


def candidates_once(encoder: Encoder, ranked: Sequence[Ranked]) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy embeddings of positives (Q, 1, D) and negatives (Q, 1, N, D), each distinct item once."""
    distinct = list(dict.fromkeys(item for r in ranked for item in (r.positive, *r.negatives)))
    texts, images = [i for i in distinct if not i.image], [i for i in distinct if i.image]
    vectors = {}
    for part in (texts, images):
        if part:
            vectors.update(zip(part, rollout.generate(encoder, part).embeddings[:, 0], strict=True))
    positives = torch.stack([vectors[r.positive] for r in ranked])[:, None]
    negatives = torch.stack([torch.stack([vectors[n] for n in r.negatives]) for r in ranked])[:, None]
    return positives, negatives


def step(encoder: Encoder, ranked: Sequence[Ranked], settings: RlvrSettings, generator: torch.Generator) -> dict[str, float]:
    """One GRPO step: samples, scores, and leaves the gradient in the adapter's parameters. Returns what is logged."""
    acting = sides(ranked, settings.rollout_sides)
    sampled = [
        rollout.generate(encoder, part, rollouts=settings.rollouts, temperature=settings.temperature, generator=generator)
        for part in _chunks(acting, settings)
    ]
    vectors = torch.cat([s.embeddings for s in sampled]).requires_grad_()
    if settings.rollout_sides == "query":
        scored = reward(vectors, *candidates_once(encoder, ranked), settings.reward)
    else:
        grouped = vectors.unflatten(0, (len(ranked), -1)).transpose(1, 2)  # (Q, G, 2 + N, D)
        scored = reward(grouped[:, :, 0], grouped[:, :, 1], grouped[:, :, 2:], settings.reward)
    (slope,) = torch.autograd.grad(scored.total.mean(), vectors)
    scored = Scored(*(x.detach() for x in scored))
    gain = objectives.advantages(scored.total, settings.advantage)
    gain = gain.repeat_interleave(len(acting) // len(ranked), dim=0)  # every side of a query shares its advantage
    return learn(encoder, acting, sampled, gain, slope, settings) | _facts(encoder, scored, sampled)


def learn(
    encoder: Encoder,
    acting: Sequence[Item],
    sampled: Sequence[rollout.Rollouts],
    gain: torch.Tensor,
    slope: torch.Tensor,
    settings: RlvrSettings,
) -> dict[str, float]:
    """Adds the gradient of one step to the parameters, chunk by chunk: memory does not grow with the number of rollouts.

    The expected reward depends on the weights through the sampled tokens (`score`, all that GRPO uses) and through the
    embedding computed after them (`pathwise`); `full` is both, the gradient of the expected reward with ranks held
    fixed. It is exact, up to the centring by the group's own mean, with advantage "none" and aggregation "dr_grpo"
    times the cap; the paper's standardised advantages only change how the two terms are weighted.

    Args:
        acting: R inputs. sampled: their rollouts, in chunks.
        gain: (R, G) advantages. slope: (R, G, D) derivative of the mean reward by each embedding.
    """
    facts = {"kl": 0.0, "clip_fraction": 0.0, "loss": 0.0}
    if settings.gradient == "pathwise":
        gain = torch.zeros_like(gain)
    # only the token mean over all sequences needs to know the other chunks
    tokens = sum(int(s.actions.sum()) for s in sampled)
    parts = zip(*(_chunks(x, settings) for x in (acting, gain, slope)), sampled, strict=True)
    for part, gains, slopes, out in parts:
        with torch.no_grad(), encoder.model.disable_adapter():
            reference, _ = rollout.score(encoder, part, out, temperature=settings.temperature)
        log_p, vectors = rollout.score(encoder, part, out, temperature=settings.temperature)
        loss, seen = objectives.policy_loss(
            *(x.flatten(0, 1) for x in (log_p, out.log_p, reference, out.actions)),
            gains.flatten(),
            clip=settings.clip,
            kl_weight=settings.kl_weight,
            aggregation=settings.aggregation,
            max_length=encoder.settings.max_summary_tokens,
        )
        weight = int(out.actions.sum()) / tokens if settings.aggregation == "dapo" else len(part) / len(acting)
        direct = 0.0 if settings.gradient == "score" else (vectors * slopes).sum()
        (loss * weight - direct).backward()
        for name, value in (seen | {"loss": float(loss.detach())}).items():
            facts[name] += value * weight
    return facts


def _chunks(rows, settings: RlvrSettings) -> list:
    """Rows of as many inputs as have `settings.chunk` rollouts between them, at least one."""
    size = max(1, settings.chunk // settings.rollouts)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _facts(encoder: Encoder, scored: Scored, sampled: Sequence[rollout.Rollouts]) -> dict[str, float]:
    """The log line of design.md."""
    spread = scored.total.std(dim=1)
    actions = torch.cat([s.actions.flatten(0, 1).sum(1) for s in sampled]).float()
    ended = torch.cat([((s.tokens == encoder.end_id) & s.actions).any(-1).flatten() for s in sampled])
    groups = [{tuple(t) for t in group} for s in sampled for group in s.summaries(encoder.end_id)]
    return {
        "reward": float(scored.total.mean()),
        "reward_margin": float(scored.margin.mean()),
        "reward_rank": float(scored.rank.mean()),
        "reward_std": float(spread.mean()),
        "frac_reward_zero_std": float((spread < 1e-6).float().mean()),
        "cos_positive": float(scored.cosine.mean()),
        "rank_positive": float(scored.position.float().mean()),
        "rewarded_negatives": float(scored.rewarded_negatives.float().mean()),
        "entropy": float(sum(s.entropy.sum() for s in sampled) / actions.sum()),
        "summary_length": float(actions.mean()),
        "no_natural_end": float(1 - ended.float().mean()),
        "distinct_summaries": sum(map(len, groups)) / (len(groups) * scored.total.shape[1]),
    }


def guard(settings: RlvrSettings):
    """The reason to stop, if there is one: reward or KL not finite, KL above its bound, constant summaries."""
    flat = 0

    def check(row: dict[str, float]) -> str | None:
        nonlocal flat
        flat = flat + 1 if row["frac_reward_zero_std"] == 1 else 0
        if row["reward"] != row["reward"]:
            return "reward is not a number"
        if not row["kl"] <= settings.kl_bound:
            return f"KL {row['kl']:.3f} is above its bound {settings.kl_bound}"
        if flat >= COLLAPSE_WINDOW:
            return f"collapse: all rollouts of a query earned the same for {flat} steps"
        return None

    return check


def train(encoder: Encoder, ranked: Sequence[Ranked], settings: RlvrSettings, *, seed: int, folder: Path) -> list[dict[str, float]]:
    """One pass over `ranked` with a fresh adapter, merged at the end. Dropout stays off.

    Returns:
        the log lines, one per step.
    """
    encoder.add_lora(settings.lora, seed=seed)
    encoder.model.eval()
    draw = epochs(ranked, seed, "stage3")
    steps = settings.queries // settings.queries_per_step
    rows = runtime.optimise(
        encoder.trainable(),
        lambda i: step(encoder, draw(i, settings.queries_per_step), settings, runtime.torch_rng(seed, "rollout", i)),
        steps,
        settings.optimiser,
        folder,
        guard(settings),
    )
    encoder.merge_lora()
    return rows
