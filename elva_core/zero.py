"""ZeRO-2 optimizer: AdamW whose moments, master weights and summed gradients are split over the processes.

DeepSpeed reduces gradients inside each backward pass, the same passes in every process. Our loops
backpropagate as often as a process has work. So the engine holds parameters of its own on the memory of ours,
and once a step backpropagates sum(parameter * gradient), whose gradient is ours. No loop knows of this, and
what is computed does not change. Until then each process has the whole gradient of its rows.

    optimiser = zero.SharedAdamW(parameters, settings)    # loop.train_loop, in place of AdamW
    norm = optimiser.reduce()
    optimiser.step()
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from elva_core import sharding
from elva_core.training_settings import OptimiserSettings

BUCKET = 2**24  # numbers that are summed at once; more where one parameter is larger


def requested() -> bool:
    """Whether `accelerate launch` was given DeepSpeed and has started more than one process."""
    return sharding.requested("ACCELERATE_USE_DEEPSPEED")


class SharedAdamW:
    """AdamW over float32 parameters that are the same in every process; each keeps its share of the moments.

    Raises:
        ValueError: the launch file asks for another stage of ZeRO, or for moments outside the device.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], settings: OptimiserSettings) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        import deepspeed  # an extra; without it a launch file cannot ask for this

        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")
        if stage != "2" or offload not in (None, "none"):
            advice = "must set zero_stage: 2 without offloading, as params/accelerate/zero2.yaml does"
            raise ValueError(f"the launch file {advice}")
        self._ours = list(parameters)
        theirs = torch.nn.ParameterList([torch.nn.Parameter(parameter.data) for parameter in self._ours])
        adam = torch.optim.AdamW(theirs, lr=settings.lr, weight_decay=settings.weight_decay)
        bucket = max(BUCKET, *(p.numel() for p in theirs))
        sharing = {"stage": 2, "overlap_comm": False, "reduce_bucket_size": bucket}
        config = {
            "train_micro_batch_size_per_gpu": 1,  # has no effect: batches are made by our loops
            "gradient_clipping": settings.clip,
            "zero_optimization": sharing,
            "zero_allow_untested_optimizer": True,  # torch's own AdamW, which needs no kernel to be compiled
        }
        self._engine, self._zero, _, _ = deepspeed.initialize(model=theirs, optimizer=adam, config=config)
        self._theirs = list(theirs)
        for our, their in zip(self._ours, self._theirs, strict=True):
            our.data = their.data  # DeepSpeed has moved them next to each other
        (self._share,) = self._zero.single_partition_of_fp32_groups
        self.param_groups = adam.param_groups
        self._moments = adam.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._ours:
            parameter.grad = None

    def reduce(self) -> float:
        """Sums the gradients of all processes, each of which keeps its share.

        Returns:
            norm of the whole gradient, infinite where a number of it is not finite.
        """
        count = dist.get_world_size()  # DeepSpeed takes the mean
        grads = (torch.zeros_like(our) if our.grad is None else our.grad for our in self._ours)
        # one sum of the same terms everywhere: DeepSpeed joins gradients in the order in which they come
        products = ((their * grad).sum() for their, grad in zip(self._theirs, grads, strict=True))
        self._engine.backward(sum(products) * count)
        for parameter in self._ours:
            parameter.grad = None
        norm = float(self._zero.scaled_global_norm())
        return norm if norm >= 0 else float("inf")  # DeepSpeed says -1

    def step(self) -> None:
        self._engine.step()

    @property
    def state(self) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
        """The gathered moments on the CPU, per parameter as AdamW has them. All processes take part."""
        share = self._moments[self._share]
        gathered: dict = {parameter: {} for parameter in self._ours if share}
        for key, value in share.items():
            if not value.dim():  # the count of steps, the same everywhere
                for moments in gathered.values():
                    moments[key] = value.clone()
                continue
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, value)
            numbers, start = torch.cat(parts).cpu(), 0
            for parameter, moments in gathered.items():
                moments[key] = numbers[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
        return gathered

    def take(self, moments: Sequence[dict[str, torch.Tensor]]) -> None:
        """Takes this process's share of all parameters' moments, after their weights were set.

        Args:
            moments: per parameter, as AdamW has them; empty ones are those of a first step.
        """
        self._zero.refresh_fp32_params()
        state, size = self._moments[self._share], len(self._share)
        for value in state.values():
            value.zero_()
        for key, value in moments[0].items():
            if key != "step":
                value, numbers = torch.zeros_like(self._share), torch.cat([m[key].flatten() for m in moments])
                part = numbers[dist.get_rank() * size :][:size]
                value[: len(part)] = part
            if key in state:
                state[key].copy_(value)
            else:
                state[key] = value.detach()
