"""Frozen weights in slices: two processes with unequal work compute what one with all the weights does."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import families
from conftest import exit_codes
from elva_core import distributed, sharding
from elva_core.models import encoder, generation
from elva_core.retrieval import retriever


def adapted(folder, prompts, lora) -> encoder.Encoder:
    """The model with an adapter that is not zero."""
    model = encoder.load(folder, prompts)
    model.add_lora(lora, seed=1)
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(parameter)))
    return model


def work(model, chunks, items) -> dict[str, torch.Tensor]:
    """Gradients of these chunks, each through three passes in one graph; then, of all processes together, embeddings of the items."""
    for chunk in chunks:
        noise = torch.rand(len(chunk), 2, model.settings.max_summary_tokens, generator=torch.Generator().manual_seed(len(chunk[0].text)))
        log_p, _ = generation.score(model, chunk, generation.generate(model, chunk, noise=noise))
        vectors, writing = model.embed_summaries(chunk, [[5] * (1 + len(item.text) % 3) for item in chunk])
        ((vectors * torch.linspace(0, 1, vectors.shape[1])).sum() + writing - log_p.sum()).backward()
    parameters = model.trainable()
    distributed.sum_gradients(parameters.values())
    found = {name: parameter.grad for name, parameter in parameters.items()}
    return found | {"vectors": torch.from_numpy(retriever.encode(model, items, batch=2)[0])}


def work_as_one_of(rank, count, port, folder, model_folder, prompts, lora, chunks, items):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "ACCELERATE_USE_FSDP": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    distributed.processes()
    model = adapted(model_folder, prompts, lora)
    layers = model.backbone.get_decoder().layers
    frozen = [[p for p in layer.parameters() if not p.requires_grad] for layer in layers]
    assert sum(p.to_local().numel() for ps in frozen for p in ps) == sum(p.numel() for ps in frozen for p in ps) / 2
    seen = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append([not isinstance(x.mlp.down_proj.weight, DTensor) for x in layers]))
    found = work(model, chunks[:1] if rank else chunks[1:], items)
    assert sum(map(len, seen)) and all(sum(whole) == 1 for whole in seen)  # the layer that computes, no other
    model.merge_lora()
    found |= sharding.full_state_dict(model.model)
    if rank == 0:
        save_file({name: tensor.clone() for name, tensor in found.items()}, folder / "found.safetensors")


@pytest.fixture(params=["Qwen2-VL", "Qwen3-VL"])
def either(request, model_folder, texts, tmp_path):
    """Folder of a model that splices features into its prompts, and of one that is read as its processor says."""
    if request.param == "Qwen2-VL":
        return model_folder
    return families.write(families.qwen3_vl, texts, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.distributed
def test_unequal_work_on_slices_is_that_of_one_process(either, smoke, items, tmp_path):
    """One process has one chunk, the other four; five items are encoded in three parts, whose summaries end where they end."""
    lora, chunks = smoke.stage2.lora, [[item] for item in items[:5]]
    model = adapted(either, smoke.encoder, lora)
    wanted = work(model, chunks, items[:5])
    model.merge_lora()
    wanted |= model.model.state_dict()
    given = (tmp_path, either, smoke.encoder, lora, chunks, items[:5])
    assert exit_codes(work_as_one_of, 2, *given, timeout=120) == [0, 0]
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.abs().max() > 0 or "bias" in name
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_weights_that_one_process_alone_has_read_are_refused(tiny, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="as params/accelerate/fsdp2"):
        sharding.shard(tiny.backbone.get_decoder())
