"""Rollouts of a step of stage 3: sampled summaries, their cosines to the candidates, their rewards.

groups = rolled_out(encoder, ranked, rows, noise, settings.stage3, generation.in_process)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from elva_core.data.items import Item
from elva_core.models import generation
from elva_core.models.encoder import Encoder
from elva_core.training import losses, rewards
from elva_core.training.hard_negatives import TrainingQuery
from elva_core.training_settings import RlvrSettings


def sides(ranked: TrainingQuery, which: str) -> list[Item]:
    """Items of a query whose summaries are actions: itself, or itself, its positive and all its negatives."""
    return [ranked.item, ranked.positive, *ranked.negatives] if which == "all" else [ranked.item]


def candidates_once(
    encoder: Encoder, ranked: Sequence[TrainingQuery], rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy embeddings of positives (Q, D) and negatives (Q, N, D); distinct items, `rows` a call or all."""
    distinct = list(dict.fromkeys(item for r in ranked for item in (r.positive, *r.negatives)))
    texts, images = [i for i in distinct if not i.image], [i for i in distinct if i.image]
    vectors = {}
    for part in [*_parts(texts, rows), *_parts(images, rows)]:
        if encoder.settings.candidate_summaries:
            embedded = generation.generate(encoder, part).embeddings[:, 0]
        else:
            with torch.no_grad():
                embedded, _ = encoder.embed_summaries(part, [[]] * len(part))
        vectors.update(zip(part, embedded, strict=True))
    positives = torch.stack([vectors[r.positive] for r in ranked])
    negatives = torch.stack([torch.stack([vectors[n] for n in r.negatives]) for r in ranked])
    return positives, negatives


def cosines(
    encoder: Encoder, ranked: Sequence[TrainingQuery], vectors: torch.Tensor, settings: RlvrSettings
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cosines of each rollout to the positive (Q, G) and to the negatives (Q, G, N), for each of `dims`.

    Args:
        vectors: (Q, sides, G, D) embeddings of the rollouts; the paper's action is a rollout of all sides.
    """
    if settings.rollout_sides == "all":
        rollouts = losses.nested(vectors, settings.dims)
        return [
            ((v[:, 0] * v[:, 1]).sum(-1), torch.einsum("qgd,qngd->qgn", v[:, 0], v[:, 2:])) for v in rollouts
        ]
    if settings.candidates == "mined":  # as the model that chose the negatives computed them: no forward
        known = torch.stack([torch.from_numpy(r.vectors) for r in ranked]).to(encoder.device)
        positives, negatives = known[:, 0], known[:, 1:]
    else:
        positives, negatives = candidates_once(encoder, ranked, settings.decode_rows)
    nested = (losses.nested(x, settings.dims) for x in (vectors[:, 0], positives, negatives))
    return [
        (torch.einsum("qgd,qd->qg", q, p), torch.einsum("qgd,qnd->qgn", q, n))
        for q, p, n in zip(*nested, strict=True)
    ]


class Groups(NamedTuple):
    """Rollouts of Q queries and what they have earned.

    rows: their places in the step. acting: R = Q * sides items, whose rollouts are `sampled`, in chunks.
    slope: (R, G, D) derivative by the embeddings of what `learn` raises through them.
    """

    rows: list[int]
    acting: list[Item]
    sampled: list[generation.Rollouts]
    scored: rewards.Scored
    slope: torch.Tensor

    def only(self, kept: torch.Tensor) -> Groups:
        """Those of some queries, (Q,) bool."""
        wide = kept.repeat_interleave(len(self.acting) // len(self.rows))
        parts = zip(self.sampled, as_sampled(wide, self.sampled), strict=True)
        return Groups(
            [row for row, keep in zip(self.rows, kept.tolist(), strict=True) if keep],
            [item for item, keep in zip(self.acting, wide.tolist(), strict=True) if keep],
            [out.only(keep) for out, keep in parts if keep.any()],
            rewards.Scored(*(x[kept] for x in self.scored)),
            self.slope[wide],
        )

    def joined(self, other: Groups) -> Groups:
        scored = rewards.Scored(*map(torch.cat, zip(self.scored, other.scored, strict=True)))
        slope = torch.cat([self.slope, other.slope])
        return Groups(*(a + b for a, b in zip(self[:3], other[:3], strict=True)), scored, slope)


def rolled_out(
    encoder: Encoder,
    ranked: Sequence[TrainingQuery],
    rows: list[int],
    noise: torch.Tensor,
    settings: RlvrSettings,
    sampler: generation.Sampler,
) -> Groups:
    """G summaries of every acting item of some `rows` of a step's queries, and their rewards."""
    mine = [ranked[i] for i in rows]
    acting = [item for r in mine for item in sides(r, settings.rollout_sides)]
    noises = _chunks(noise[rows].flatten(0, 1), settings)
    sampled = sampler(encoder, _chunks(acting, settings), noises, settings.temperature)

    # rewards, and their derivative by the embeddings, which the pathwise gradient needs
    vectors = torch.cat([s.embeddings for s in sampled]).requires_grad_()
    grouped = vectors.unflatten(0, (len(mine), -1))
    written = torch.cat([(s.actions & (s.tokens != encoder.end_id)).sum(-1) for s in sampled])
    lengths = written.float().unflatten(0, (len(mine), -1)).mean(1)
    by_dim = [
        (rewards.reward(*pair, settings.reward, lengths), _infonce(*pair, settings))
        for pair in cosines(encoder, mine, grouped, settings)
    ]
    columns = zip(*(scored for scored, _ in by_dim), strict=True)
    scored = rewards.Scored(*(torch.stack(column).float().mean(0) for column in columns))
    raised = scored.total
    if settings.gradient == "gated":
        low = scored.total < scored.total.mean(dim=1, keepdim=True)
        raised = settings.infonce_weight * low * torch.stack([chance for _, chance in by_dim]).mean(0)
    (slope,) = torch.autograd.grad(raised.mean(1).sum() / len(ranked), vectors)
    return Groups(rows, acting, sampled, rewards.Scored(*(x.detach() for x in scored)), slope)


def _infonce(positive: torch.Tensor, negatives: torch.Tensor, settings: RlvrSettings) -> torch.Tensor:
    """Log-probability (Q, G) of the positive among all candidates."""
    scores = torch.cat([positive[..., None], negatives], dim=-1) / settings.infonce_temperature
    return scores.log_softmax(-1)[..., 0]


def as_sampled(rows, sampled: Sequence[generation.Rollouts]) -> list:
    """Rows of R inputs in the chunks of their rollouts."""
    sizes = [len(out.tokens) for out in sampled]
    return [rows[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _parts(rows, size: int | None) -> list:
    """Rows in parts of one size, at least one row each; None is a single part."""
    size = max(1, len(rows) if size is None else size)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _chunks(rows, settings: RlvrSettings) -> list:
    """Rows of as many inputs as have `settings.chunk` rollouts between them, at least one."""
    return _parts(rows, settings.chunk // settings.num_generations)
