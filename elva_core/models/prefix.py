"""Prompts run through a model once, with a key/value cache that several rollouts of each go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin


@dataclass(slots=True)
class Prefix:
    """What is read so far of R rows.

    mask: (R, L) int64. last: (R, D) state of the last prompt token. position: (..., R, 1) of the next token.
    """

    cache: DynamicCache
    mask: torch.Tensor
    last: torch.Tensor
    position: torch.Tensor


def prefill(model, inputs: Mapping[str, torch.Tensor], rollouts: int) -> Prefix:
    """Runs each of B prompts once and repeats the result for its G rollouts; rows 0..G-1 belong to prompt 0.

    Args:
        model: of transformers, with its head. inputs: what `model.model` is given, left-padded,
            `attention_mask` (B, L) and `position_ids` (..., B, L) among it.

    Raises:
        TypeError: some layers keep something else than keys and values.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    last = model.model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        raise TypeError(
            "its layers keep a state that is no keys and values; rollouts cannot share a prompt's"
        )
    if rollouts > 1:
        cache.batch_repeat_interleave(rollouts)
    mask, last = (x.repeat_interleave(rollouts, dim=0) for x in (inputs["attention_mask"], last))
    return Prefix(
        cache, mask, last, (inputs["position_ids"][..., -1:] + 1).repeat_interleave(rollouts, dim=-2)
    )


def advance(model, prefix: Prefix, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """States (R, n, D) of n further tokens; `prefix` moves along.

    Args:
        ids: (R, n) int64. valid: (R, n) bool, False where a token is never attended to.
    """
    prefix.mask = torch.cat([prefix.mask, valid.long()], dim=1)
    positions = prefix.position + torch.arange(ids.shape[1], device=ids.device)
    prefix.position = prefix.position + ids.shape[1]
    out = model.model(
        input_ids=ids,
        attention_mask=prefix.mask,
        position_ids=positions,
        past_key_values=prefix.cache,
        use_cache=True,
    )
    return out.last_hidden_state
