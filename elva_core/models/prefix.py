"""Prompts run through a model once, with a key/value cache that several rollouts of each go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from elva_core.models.arithmetic import mixed

ROOM = 8  # lengths of fixed caches are multiples of it, which CUDA's attention reads without a copy


@dataclass(slots=True)
class Prefix:
    """R rows that the model has read so far.

    mask: (R, L) int64. last: (R, D) state of the last prompt token. position: (..., R, 1) of the next token.
    """

    cache: DynamicCache
    mask: torch.Tensor
    last: torch.Tensor
    position: torch.Tensor


@dataclass(slots=True)
class FixedPrefix:
    """The same in tensors that keep their shapes and places, so that a CUDA graph can read on in them.

    bias: (R, 1, 1, K) added to attention's scores, -inf where a row does not look. position: (..., R, 1).
    """

    cache: StaticCache
    bias: torch.Tensor
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
    with mixed(model):
        out = model.model(**inputs, past_key_values=cache, use_cache=True)
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        raise TypeError(
            "its layers keep a state that is no keys and values; rollouts cannot share a prompt's"
        )
    position = inputs["position_ids"][..., -1:] + 1
    return repeated(Prefix(cache, inputs["attention_mask"], out.last_hidden_state[:, -1], position), rollouts)


def repeated(prefix: Prefix, rollouts: int) -> Prefix:
    """Each row `rollouts` times, one after another; the cache is changed in place."""
    if rollouts == 1:
        return prefix
    prefix.cache.batch_repeat_interleave(rollouts)
    mask, last = (x.repeat_interleave(rollouts, dim=0) for x in (prefix.mask, prefix.last))
    return Prefix(prefix.cache, mask, last, prefix.position.repeat_interleave(rollouts, dim=-2))


def can_be_fixed(prefix: Prefix) -> bool:
    """Whether every layer keeps all keys and values; one with a sliding window, say, does not."""
    return all(type(layer) is DynamicLayer for layer in prefix.cache.layers)


def fixed(model, prefix: Prefix, rollouts: int, more: int) -> FixedPrefix:
    """Each row `rollouts` times with room for `more` tokens, without gradient."""
    rows, length = len(prefix.mask) * rollouts, prefix.mask.shape[1]
    cache = StaticCache(model.config.get_text_config(), max_cache_len=-(-(length + more) // ROOM) * ROOM)
    for place, layer in enumerate(prefix.cache.layers):
        cache.update(*(x.repeat_interleave(rollouts, dim=0) for x in (layer.keys, layer.values)), place)
    bias = prefix.last.new_full((rows, 1, 1, cache.layers[0].max_cache_len), -torch.inf)
    bias[:, 0, 0, :length].masked_fill_(prefix.mask.bool().repeat_interleave(rollouts, dim=0), 0.0)
    return FixedPrefix(cache, bias, prefix.position.repeat_interleave(rollouts, dim=-2))


def kept(prefix: FixedPrefix, rows: torch.Tensor) -> FixedPrefix:
    """The rows (n,) int64 of it, in new tensors."""
    prefix.cache.reorder_cache(rows)
    return FixedPrefix(prefix.cache, prefix.bias[rows], prefix.position.index_select(-2, rows))


def read_next(model, prefix: FixedPrefix, words: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """States (R, D) of one further token of each row; all of `prefix` moves along in place.

    Args:
        words: (R, D) embeddings of tokens. valid: (R,) bool, False where it is never attended to.
    """
    column = prefix.cache.layers[0].cumulative_length[None]
    look = torch.zeros_like(valid, dtype=prefix.bias.dtype).masked_fill_(~valid, -torch.inf)
    prefix.bias.index_copy_(-1, column, look[:, None, None, None])
    with mixed(model):
        out = model.model(
            inputs_embeds=words[:, None],
            attention_mask=prefix.bias,
            position_ids=prefix.position,
            past_key_values=prefix.cache,
            use_cache=True,
        )
    prefix.position.add_(1)
    return out.last_hidden_state[:, 0]


def advance(model, prefix: Prefix, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """States (R, n, D) of n further tokens; `prefix` moves along.

    Args:
        ids: (R, n) int64. valid: (R, n) bool, False where a token is never attended to.
    """
    prefix.mask = torch.cat([prefix.mask, valid.long()], dim=1)
    positions = prefix.position + torch.arange(ids.shape[1], device=ids.device)
    prefix.position = prefix.position + ids.shape[1]
    with mixed(model):
        out = model.model(
            input_ids=ids,
            attention_mask=prefix.mask,
            position_ids=positions,
            past_key_values=prefix.cache,
            use_cache=True,
        )
    return out.last_hidden_state
