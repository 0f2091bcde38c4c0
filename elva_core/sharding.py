"""The frozen weights of the language model in slices, one per process, where the launch file says FSDP.

torch's `fully_shard` gathers a layer's slices before the layer computes and frees them after it, so a pass of
one process needs all of them. Their work differs: summaries end early, chunks run out. So before every pass,
and before runtime's exchanges, the processes agree on what comes next: the earliest of what they want. Who
wants something later gathers along without computing, and asks again. No loop knows of this, and what is
computed does not change.

Whole on every process stay the adapters, the vision tower, the embeddings and the head.

    sharding.shard(model.get_decoder())           # encoder.load, before the adapters are there
    sharding.turn(MEETING)                        # runtime, before the processes exchange something
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

FORWARD, BACKWARD, MEETING = range(3)  # what a process may want, in the order in which it happens
_layers: Sequence[FSDPModule] = ()  # of the model that was sharded last; empty where nothing is


def asked() -> bool:
    """Whether `accelerate launch` was given FSDP and has started more than one process."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and dist.is_initialized() and dist.get_world_size() > 1


def shard(language_model: torch.nn.Module) -> None:
    """Leaves this process one slice of every decoder layer's weights. All of them must be frozen.

    Raises:
        ValueError: the launch file lets one process alone read the weights, for accelerate to send them;
            nothing here does.
    """
    global _layers
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "the launch file must set fsdp_cpu_ram_efficient_loading: false, as params/accelerate/fsdp2.yaml does"
        )
    _layers = list(language_model.layers)
    mesh = init_device_mesh(PartialState().device.type, (dist.get_world_size(),))
    for layer in _layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # the root owns nothing: the layers share its streams, and so the memory they are gathered into
    fully_shard(language_model, mesh=mesh, ignored_params=set(language_model.parameters()))
    for layer, below in zip(_layers, [_layers[0], *_layers], strict=False):
        layer.set_modules_to_backward_prefetch(
            [below]
        )  # by default the first layer would fetch from an earlier pass
    language_model.register_forward_pre_hook(lambda *_: turn(FORWARD), prepend=True)
    language_model.register_forward_hook(_announce_backward)


def _announce_backward(language_model: torch.nn.Module, inputs: tuple, output) -> None:
    if output.last_hidden_state.requires_grad:
        output.last_hidden_state.register_hook(lambda gradient: turn(BACKWARD))


def turn(wanted: int) -> None:
    """Returns when it is the turn of what this process wants; until then it helps the others with theirs."""
    while _layers and (next_up := _earliest(wanted)) != wanted:
        for layer in _layers if next_up == FORWARD else reversed(_layers):
            layer.unshard()
            layer.reshard()


def _earliest(wanted: int) -> int:
    wishes = torch.tensor(wanted, device=PartialState().device)
    dist.all_reduce(wishes, dist.ReduceOp.MIN)
    return int(wishes)


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """What `save_pretrained` takes as `state_dict`: the weights of a sharded model put together, None for any other.

    All processes take part.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return None
    return {
        name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        for name, tensor in state.items()
    }
