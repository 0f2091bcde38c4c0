"""Arithmetic of models: attention without cuDNN's kernel, bfloat16 products, float32 where that hurts.

Importing this module switches cuDNN's attention off for the process: with a mask and a length of 64 modulo
128 its backward is not a number for rows that see almost nothing, since torch 2.11 (pytorch issue 196678,
trl issue 7181), and on a B200 it spoils decoding with fewer than 8 key/value heads (pytorch issue 193893).
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_padding_sees_itself"  # `attn_implementation` of what encoder.load reads

torch.backends.cuda.enable_cudnn_sdp(False)


def _mask(*, q_length: int, kv_length: int, q_offset=0, kv_offset=0, device="cpu", **given):
    """transformers' mask (B, 1, q_length, kv_length); a token of padding sees itself instead of nothing."""
    sizes = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
    mask = sdpa_mask(**sizes, device=device, **given)
    if mask is None:  # nothing is padded
        return None
    itself = torch.arange(q_length, device=device)[:, None] + q_offset
    itself = itself == torch.arange(kv_length, device=device) + kv_offset
    return mask | (itself & ~mask.any(-1, keepdim=True))


AttentionInterface.register(ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(ATTENTION, _mask)


def mixed(model) -> torch.autocast:
    """Context in which a forward uses a float32 adapter on a bfloat16 model: products in bfloat16."""
    # each weight is used once a forward; a cache would only outlive a CUDA graph that fills it
    return torch.autocast(
        model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16, cache_enabled=False
    )


def keep_inputs(model) -> None:
    """Lets an adapter take its inputs as they are, not as float32 that `mixed` turns into bfloat16 again."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False


class _Product(torch.autograd.Function):
    """(N, D) states times a frozen (V, D) weight, both bfloat16, as float32: (N, V)."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        if states.is_cuda:
            return torch.mm(states, weight.t(), out_dtype=torch.float32)
        return states.float() @ weight.float().t()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None


def float32_logits(head: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """(..., V) float32 logits of (..., D) states; sums of products are not rounded to bfloat16.

    A logit of 16 is rounded by 0.06 there, its probability by 6 %. [RET] is never sampled, so an adapter's
    row of it, for which PEFT would copy all rows, does not matter.
    """
    head = getattr(getattr(head, "token_adapter", None), "base_layer", head)
    if states.dtype == torch.bfloat16 and head.bias is None:
        return _Product.apply(states.flatten(0, -2), head.weight).unflatten(0, states.shape[:-1])
    return head(states).float()
