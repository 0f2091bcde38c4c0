"""How the model computes: what the layers' masks show, what is float32 in a bfloat16 model, what an adapter's products lose."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import LoraLayer

import families
from elva_core.models import arithmetic, encoder, prefix
from elva_core.training_settings import LoraSettings


@pytest.fixture
def half(model_folder, smoke) -> encoder.Encoder:
    return encoder.load(model_folder, smoke.encoder, dtype="bfloat16")


def masks_of(model, items) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The masks that the layers are given for these items, and which tokens are none of padding, (B, L)."""
    masks, batch = [], model.batch(items, model.settings.eol_request)
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, args, given: masks.append(given["attention_mask"]), with_kwargs=True)
        for layer in model.backbone.get_decoder().layers
    ]
    with torch.no_grad():
        model.states(batch)
    for hook in hooks:
        hook.remove()
    return masks, batch.mask.bool()


def test_cudnns_attention_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_a_token_of_padding_sees_itself_and_every_other_what_precedes_it(tiny, items):
    masks, present = masks_of(tiny, items)
    assert not present.all() and len(masks) == len(tiny.backbone.get_decoder().layers)
    length = present.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    wanted = torch.where(present[:, :, None], causal & present[:, None], torch.eye(length, dtype=torch.bool))
    for mask in masks:
        assert torch.equal(mask[:, 0], wanted)


def test_embeddings_are_those_of_transformers_own_mask(tiny, items):
    with torch.no_grad():
        ours = tiny.embed_eol(items)
        tiny.backbone.get_decoder().config._attn_implementation = "sdpa"
        theirs = tiny.embed_eol(items)
    assert not all(mask.any(-1).all() for mask in masks_of(tiny, items)[0])  # there a row saw nothing
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", [families.qwen3_vl, families.gemma3])
def test_no_row_of_a_mask_is_empty_in_other_families(family, texts, tmp_path, smoke, items):
    families.write(family, texts, tmp_path)
    masks, present = masks_of(encoder.load(tmp_path, smoke.encoder), items)
    assert not present.all() and all(mask.any(-1).all() for mask in masks if mask is not None)


def test_logits_of_a_bfloat16_model_are_not_rounded_and_have_its_gradient(half, items):
    with torch.no_grad():
        states = half.states(half.batch(items, "x"))[:, -1] * 4  # logits as large as a trained model's
    weight = half.backbone.lm_head.weight
    exact = states.double() @ weight.double().t()
    states.requires_grad_()
    logits = arithmetic.float32_logits(half.backbone.lm_head, states)
    rounded = half.backbone.lm_head(states).double()
    assert logits.dtype == torch.float32
    assert (logits.double() - exact).abs().max() < 1e-4 * (rounded - exact).abs().max().clamp(min=1)
    assert (rounded - exact).abs().max() > 1e-3  # what bfloat16 would cost
    logits.log_softmax(-1)[:, half.end_id].sum().backward()
    wanted = torch.autograd.functional.jacobian(
        lambda s: (s @ weight.double().t()).log_softmax(-1)[:, half.end_id].sum(), states.detach().double()
    )
    assert (states.grad.double() - wanted).norm() < 0.01 * wanted.norm()


def trained(model, items) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings, and the gradient of all that trains, with an adapter that is not zero."""
    model.add_lora(LoraSettings(rank=8, alpha=16, dropout=0.0), seed=0)
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(parameter)))
    vectors, writing = model.embed_summaries(items, [[7, 8]] * len(items))
    ((vectors * torch.linspace(-1, 1, vectors.shape[1])).sum() + writing).backward()
    return vectors.detach(), torch.cat([p.grad.flatten() for p in model.trainable().values()])


def test_an_adapter_of_a_bfloat16_model_is_float32_and_its_products_lose_no_more_than_the_model_does(
    model_folder, smoke, items, monkeypatch
):
    """Against the same weights in float32: products in bfloat16 are as near as the adapter in float32 on a bfloat16 model."""
    half = encoder.load(model_folder, smoke.encoder, dtype="bfloat16")
    vectors, gradient = trained(half, items)
    assert vectors.dtype == gradient.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in half.trainable().values())

    whole = encoder.load(model_folder, smoke.encoder)
    for parameter in whole.backbone.parameters():
        parameter.data = parameter.data.bfloat16().float()
    exact = trained(whole, items)

    monkeypatch.setattr(encoder, "mixed", lambda model: nullcontext())
    monkeypatch.setattr(encoder, "keep_inputs", lambda model: None)
    slow = encoder.load(model_folder, smoke.encoder, dtype="bfloat16")
    assert all(layer.cast_input_dtype_enabled for layer in slow.model.modules() if isinstance(layer, LoraLayer))
    before = trained(slow, items)
    drift = [float((got[0] - exact[0]).norm(dim=1).max()) for got in ((vectors, gradient), before)]
    off = [float((got[1] - exact[1]).norm() / exact[1].norm()) for got in ((vectors, gradient), before)]
    said = f"off float32, adapter in bfloat16 and in float32: embeddings {drift}, gradient {off}"
    print(said)  # noqa: T201  (pytest -s shows how much it is)
    assert drift[0] < 1.5 * drift[1] and off[0] < 1.5 * off[1], said


def test_an_adapted_layer_of_a_bfloat16_model_is_one_graph(half, items):
    """Its input is not cast to float32 and back, which is work; nothing in it breaks a graph, which a compiler would pay for."""
    half.add_lora(LoraSettings(rank=8, alpha=16, dropout=0.0), seed=0)
    layers = [layer for layer in half.model.modules() if isinstance(layer, LoraLayer)]
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)

    def product(x):
        with arithmetic.mixed(half.backbone):
            return layer(x)

    layer = next(layer for layer in layers if isinstance(layer, torch.nn.Module) and hasattr(layer, "in_features"))
    explained = torch._dynamo.explain(product)(torch.ones(2, layer.in_features, dtype=torch.bfloat16))
    assert explained.graph_count == 1 and explained.graph_break_count == 0, explained.break_reasons


def test_no_step_of_a_float32_model_is_mixed(tiny, half):
    for model, dtype in ((tiny, torch.float32), (half, torch.bfloat16)):
        with prefix.mixed(model.backbone):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
