"""FSDP of the frozen language model: each process holds a slice of every decoder layer's weights.

torch's `fully_shard` gathers a layer's slices before the layer computes and frees them after it, so a pass
of one process needs all processes. Their work differs: summaries end early, chunks run out. So before every
pass, and before an exchange (distributed.py), the processes agree on the collective that comes next: the
earliest of those that they are about to enter. A process that is further on takes part in it without
computing, and asks again. No loop knows of this, and what is computed does not change.

accelerate's own FSDP2 plugin wants the same passes in every process, which would mean empty chunks and
generation that goes on until the last process is done. Adapters, vision tower, embeddings and head are not
sharded.

    sharding.shard(model.get_decoder())           # encoder.load, before the adapters are there
    sharding.collective_turn(EXCHANGE)            # distributed, before the processes exchange something
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

FORWARD, BACKWARD, EXCHANGE = range(3)  # collectives that a process may enter, in the order of a step
_layers: Sequence[FSDPModule] = ()  # of the model that was sharded last; empty where nothing is


def requested(flag: str = "ACCELERATE_USE_FSDP") -> bool:
    """Whether `accelerate launch` was given FSDP, or what sets `flag`, and has started several processes."""
    return parse_flag_from_env(flag) and dist.is_initialized() and dist.get_world_size() > 1


def shard(language_model: torch.nn.Module) -> None:
    """Leaves this process one slice of every decoder layer's weights. All of them must be frozen.

    Raises:
        ValueError: the launch file lets one process alone read the weights, for accelerate to send them;
            nothing here does.
    """
    global _layers
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        advice = "must set fsdp_cpu_ram_efficient_loading: false, as params/accelerate/fsdp2.yaml does"
        raise ValueError(f"the launch file {advice}")
    _layers = list(language_model.layers)
    mesh = init_device_mesh(PartialState().device.type, (dist.get_world_size(),))
    for layer in _layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # the root owns nothing: the layers share its streams, and so the memory they are gathered into
    fully_shard(language_model, mesh=mesh, ignored_params=set(language_model.parameters()))
    for layer, below in zip(_layers, [_layers[0], *_layers], strict=False):
        # by default the first layer would fetch from an earlier pass
        layer.set_modules_to_backward_prefetch([below])
    language_model.register_forward_pre_hook(lambda *_: collective_turn(FORWARD), prepend=True)
    language_model.register_forward_hook(_announce_backward)


def _announce_backward(language_model: torch.nn.Module, inputs: tuple, output) -> None:
    if output.last_hidden_state.requires_grad:
        output.last_hidden_state.register_hook(lambda gradient: collective_turn(BACKWARD))


def collective_turn(collective: int) -> None:
    """Returns when all processes enter `collective`; until then takes part in the others' earlier ones."""
    while _layers:
        earliest = torch.tensor(collective, device=PartialState().device)
        dist.all_reduce(earliest, dist.ReduceOp.MIN)  # of what all processes are about to enter
        if (next_up := int(earliest)) == collective:
            return
        for layer in _layers if next_up == FORWARD else reversed(_layers):
            layer.unshard()
            layer.reshard()


def full_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The `state_dict` that `save_pretrained` takes: gathered weights of a sharded model, None for any other.

    All processes take part.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return None
    return {
        name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        for name, tensor in state.items()
    }
