"""Fixed key/value caches: which families may have one, and that a token read in one needs nothing from the host."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile

import families
from elva_core.data.items import Item
from elva_core.models import decoding, encoder, generation
from elva_core.models.prefix import can_be_fixed, prefill


def writing(model, items, noise) -> decoding.Writing:
    return decoding.Writing(model, generation._prefilled(model, items, 1), noise, 1.0)


@pytest.fixture
def adapted(tiny, smoke) -> encoder.Encoder:
    """With an adapter whose weights are not zero, as in training."""
    tiny.add_lora(smoke.stage3.lora, seed=0)
    for parameter in tiny.trainable().values():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(parameter)))
    return tiny


@torch.no_grad()
def test_a_token_takes_nothing_from_the_host_and_tells_it_nothing(adapted, items, noise):
    """What a CUDA graph cannot record: numbers made on the host, or looked at there."""
    work = writing(adapted, items, noise)
    with profile() as seen:
        work._choose()
        work._read()
    names = {event.key for event in seen.key_averages()}
    assert "aten::index_copy_" in names and "aten::scaled_dot_product_attention" in names
    assert not names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh"}


@torch.no_grad()
def test_a_token_that_is_recorded_and_replayed_is_the_one_that_is_computed(adapted, items, noise):
    """Replayed as a CUDA graph is: the same operations on the same tensors, without the code that called them."""
    plain, replayed = writing(adapted, items, noise), writing(adapted, items, noise)

    def token():
        replayed._choose()
        replayed._read()
        return replayed._column + 0

    token()  # the first is not recorded
    recorded = make_fx(token)()  # which computes the second
    for _ in range(noise.shape[-1] - 2):
        recorded()
    for _ in range(noise.shape[-1]):
        plain._choose()
        plain._read()
    assert replayed._column.item() == noise.shape[-1]
    for name, wanted in plain._tensors.items():
        torch.testing.assert_close(replayed._tensors[name], wanted, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("family", "whole"), [(families.qwen3_vl, True), (families.llava_next, False), (families.idefics3, True), (families.gemma3, False)]
)
def test_a_cache_with_windows_is_not_fixed(family, whole, texts, smoke):
    config, processor = family(texts)
    model = encoder.AutoModelForImageTextToText.from_config(config).eval()
    encoder.add_ret_token(model, processor.tokenizer, smoke.encoder.ret_token)
    read = encoder.Encoder(model, processor, smoke.encoder).batch([Item("What is this?")], smoke.encoder.summary_request)
    assert can_be_fixed(prefill(model, read.inputs, rollouts=1)) == whole
