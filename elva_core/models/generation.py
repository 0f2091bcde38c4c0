"""Sampling summaries and reading the embedding at [RET], with the prompt computed once for its G rollouts.

The prompt's key/value cache is computed once per input and expanded to G. Generation and training use the
same two pieces, `prefill` and a continuation on the cache, so their log-probabilities agree.

    out = generate(encoder, items, noise=torch.rand(len(items), 8, cap))   # out.embeddings: (B, 8, D)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from elva_core.data.items import Item
from elva_core.models.decoding import Writing
from elva_core.models.encoder import Encoder, normalised
from elva_core.models.prefix import Prefix, advance, prefill


@dataclass(slots=True)
class Rollouts:
    """Sampled summaries of B inputs, G each.

    tokens: (B, G, T) int64, padded. actions: (B, G, T) bool, True where the policy chose (the end of turn
    counts, [RET] does not). log_p: (B, G, T) log-probabilities at sampling, 0 where no action.
    entropy: (B, G, T) nats.
    embeddings: (B, G, D) float32, L2-normalised state at [RET]. engine_log_p: (B, G, T) what another engine,
    which sampled the tokens, says of them; None where the trainer sampled them itself.
    """

    tokens: torch.Tensor
    actions: torch.Tensor
    log_p: torch.Tensor
    entropy: torch.Tensor
    embeddings: torch.Tensor
    engine_log_p: torch.Tensor | None = None

    def only(self, kept: torch.Tensor) -> Rollouts:
        """The rollouts of some inputs, (B,) bool."""
        values = (getattr(self, field.name) for field in fields(self))
        return Rollouts(*(None if x is None else x[kept] for x in values))

    def summaries(self, end_id: int) -> list[list[list[int]]]:
        """Token ids of each summary without the end of turn."""
        written = self.actions & (self.tokens != end_id)
        groups = zip(self.tokens.cpu(), written.cpu(), strict=True)
        return [[row[mask].tolist() for row, mask in zip(*group, strict=True)] for group in groups]


# (encoder, items in parts, (items, G, T) noise of each part, temperature) -> the rollouts of each part
Sampler = Callable[[Encoder, Sequence[Sequence[Item]], Sequence[torch.Tensor], float], list[Rollouts]]


def _prefilled(encoder: Encoder, items: Sequence[Item], rollouts: int) -> Prefix:
    batch = encoder.batch(items, encoder.settings.summary_request)
    return prefill(encoder.backbone, batch.inputs, rollouts)


@torch.no_grad()
def generate(
    encoder: Encoder, items: Sequence[Item], *, noise: torch.Tensor | None = None, temperature: float = 1.0
) -> Rollouts:
    """Summaries of each item and the embedding at the [RET] that is appended to each.

    Args:
        noise: (B, G, T) uniform in [0, 1), one number per token that may be sampled; a summary depends on its
            own row alone, however the items are split over chunks and processes. Without it, G = 1 and the
            most probable token is taken.
        temperature: of sampling; log-probabilities are those of the tempered distribution.
    """
    return _rollouts(_written(encoder, items, noise, temperature))


def _written(
    encoder: Encoder, items: Sequence[Item], noise: torch.Tensor | None, temperature: float
) -> dict[str, torch.Tensor]:
    """Fields of `Rollouts`, each as long as the cap: (B, G, ...)."""
    rollouts = 1 if noise is None else noise.shape[1]
    out = Writing(encoder, _prefilled(encoder, items, 1), noise, temperature).write()
    return {name: rows.unflatten(0, (-1, rollouts)) for name, rows in out.items()}


def _rollouts(fields: dict[str, torch.Tensor]) -> Rollouts:
    """They end where the longest summary ends."""
    longest = int(fields["actions"].flatten(0, 1).any(0).sum())
    return Rollouts(**{name: x if name == "embeddings" else x[..., :longest] for name, x in fields.items()})


@torch.no_grad()
def in_process(
    encoder: Encoder,
    parts: Sequence[Sequence[Item]],
    noises: Sequence[torch.Tensor],
    temperature: float,
    decode_rows: int | None = None,
) -> list[Rollouts]:
    """The sampler of transformers: the model that is trained writes the summaries.

    Args:
        decode_rows: that are written together, whatever part they belong to; None is all of them.
    """
    items, noise = list(itertools.chain(*parts)), torch.cat(list(noises))
    size = max(1, decode_rows // noise.shape[1]) if decode_rows else len(items)
    calls = [
        _written(encoder, items[first : first + size], noise[first : first + size], temperature)
        for first in range(0, len(items), size)
    ]
    by_part = [torch.cat([call[name] for call in calls]).split([*map(len, parts)]) for name in calls[0]]
    return [_rollouts(dict(zip(calls[0], fields, strict=True))) for fields in zip(*by_part, strict=True)]


def _forced(
    encoder: Encoder, items: Sequence[Item], tokens: torch.Tensor, actions: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher forcing of given summaries on the shared cache of their prompts.

    Args:
        tokens, actions: (B, G, T), as in `Rollouts`.

    Returns:
        (N, V) log-probabilities of all tokens at each of the N actions; (B, G, T) those of the tokens chosen,
        0 where no action; (B, G, D) embeddings.
    """
    rows, acts = tokens.flatten(0, 1), actions.flatten(0, 1)
    prefix = _prefilled(encoder, items, tokens.shape[1])
    # the summary without its end of turn, then [RET], then nothing that counts
    lengths = (acts & (rows != encoder.end_id)).sum(1)
    column = torch.arange(rows.shape[1] + 1, device=rows.device)
    inputs = torch.cat([rows, rows.new_full((len(rows), 1), encoder.pad_id)], dim=1)
    inputs = torch.where(column == lengths[:, None], encoder.ret_id, inputs)
    inputs = torch.where(column > lengths[:, None], encoder.pad_id, inputs)
    states = advance(encoder.backbone, prefix, inputs, column <= lengths[:, None])
    # a token was chosen from the state before it
    states = torch.cat([prefix.last[:, None], states], dim=1)
    before = states[:, : rows.shape[1]]
    log_p = torch.log_softmax(encoder.logits(before[acts]) / temperature, dim=-1)
    chosen = log_p.gather(-1, tokens[actions][:, None])[:, 0]
    places = lengths + (encoder.settings.read_out == "ret")
    embeddings = normalised(states[torch.arange(len(states)), places]).unflatten(0, tokens.shape[:2])
    return log_p, torch.zeros_like(tokens, dtype=log_p.dtype).masked_scatter(actions, chosen), embeddings


def score(
    encoder: Encoder, items: Sequence[Item], rollouts: Rollouts, *, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher-forced log-probabilities and embeddings of given rollouts, with gradient.

    The prompt is computed once per item, gradients included; its G continuations share the cache.

    Returns:
        log_p (B, G, T), 0 where no action; embeddings (B, G, D), L2-normalised state at [RET].
    """
    return _forced(encoder, items, rollouts.tokens, rollouts.actions, temperature)[1:]


@torch.no_grad()
def completed(
    encoder: Encoder,
    items: Sequence[Item],
    tokens: torch.Tensor,
    actions: torch.Tensor,
    *,
    temperature: float = 1.0,
) -> Rollouts:
    """The rollouts that `generate` gives where it samples these tokens; one forward, without gradient.

    Args:
        tokens, actions: (B, G, T), as in `Rollouts`.
    """
    log_p, chosen, embeddings = _forced(encoder, items, tokens, actions, temperature)
    entropy = torch.zeros_like(chosen).masked_scatter(actions, torch.special.entr(log_p.exp()).sum(-1))
    return Rollouts(tokens, actions, chosen, entropy, embeddings)
