"""Train loop: optimiser steps, learning rate, checkpoints, and the guard that stops a run that diverges."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from elva_core import zero
from elva_core.distributed import processes
from elva_core.files import whole, write_whole
from elva_core.training_settings import OptimiserSettings

log = logging.getLogger("elva")


def learning_rate(step: int, steps: int, settings: OptimiserSettings) -> float:
    """Linear warm-up, then a cosine from lr to final_lr * lr.

    >>> learning_rate(99, 100, OptimiserSettings(lr=1.0, warmup=0.1, checkpoint_every=1)) < 0.001
    True
    """
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / max(1, steps - warmup)))
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * cosine)


class DivergedError(RuntimeError):
    """Training was stopped by its guard; the message names the reason and the checkpoint to resume from."""


def train_loop(
    parameters: dict[str, torch.nn.Parameter],
    step_fn: Callable[[int], dict[str, float]],
    steps: int,
    settings: OptimiserSettings,
    folder: Path,
    check: Callable[[dict[str, float]], str | None] = lambda row: None,
    optimisers: Sequence[torch.optim.Optimizer] = (),
) -> list[dict[str, float]]:
    """Train loop over `parameters`; resumes from folder/checkpoint if there is one.

    Args:
        optimisers: between them they hold every parameter; none means one AdamW over all. A group's `rate`
            is its share of the learning rate.
        step_fn: leaves the gradients of one step (calls backward), the same in every process, and returns
            what to log.
        check: returns the reason to stop, given the row that was logged.

    Returns:
        the rows of folder/metrics.jsonl, from step 0.

    Raises:
        DivergedError: a gradient is not finite, or `check` gave a reason. The last checkpoint stays.
    """
    shared = zero.SharedAdamW(parameters.values(), settings) if zero.requested() and not optimisers else None
    if not optimisers:
        adam = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        optimisers = [shared or torch.optim.AdamW(parameters.values(), **adam)]
    checkpoint = folder / "checkpoint"
    rows = _restore(checkpoint, parameters, optimisers)

    quiet = not processes().is_main_process
    progress = tqdm(
        range(len(rows), steps), folder.name, steps, unit="step", initial=len(rows), disable=quiet
    )
    for step in progress:
        began = time.perf_counter()
        rate = learning_rate(step, steps, settings)
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = rate * group.get("rate", 1.0)
        row = {"step": step, "lr": rate} | step_fn(step)

        # the guard looks before the weights move
        if shared:
            row["grad_norm"] = shared.reduce()
        else:
            row["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip))
        reason = "gradient is not finite" if not math.isfinite(row["grad_norm"]) else check(row)
        if reason:
            advice = (
                f"the state before it is in {checkpoint}; lower the profile's learning rate and train anew"
            )
            raise DivergedError(f"step {step}: {reason}; {advice}")

        for optimiser in optimisers:
            optimiser.step()
        row["step_time"] = time.perf_counter() - began
        rows.append(row)
        if "padding" in row:
            progress.set_postfix(padding=f"{row['padding']:.0%}", refresh=False)
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < steps:
            _checkpoint(checkpoint, parameters, optimisers, rows)
    if processes().is_main_process:
        write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _checkpoint(
    folder: Path, parameters: dict, optimisers: Sequence[torch.optim.Optimizer], rows: list[dict]
) -> None:
    """One safetensors file with weights, moments and step metrics; all processes hold the same."""
    states = [optimiser.state for optimiser in optimisers]  # shares are gathered: every process takes part
    if not processes().is_main_process:
        return
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weight/{name}"] = parameter.detach()
        for moments in states:
            if parameter in moments:
                for key, value in moments[parameter].items():
                    tensors[f"{key}/{name}"] = torch.as_tensor(value)
    with whole(folder / "state.safetensors") as partial:
        metadata = {"rows": json.dumps(rows)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=metadata)


def _restore(folder: Path, parameters: dict, optimisers: Sequence[torch.optim.Optimizer]) -> list[dict]:
    """Puts weights and moments of the checkpoint in place; its step metrics, empty without a checkpoint."""
    path = folder / "state.safetensors"
    if not path.is_file():
        return []
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        rows = json.loads(file.metadata()["rows"])
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        state.setdefault(name, {})[kind] = value
    for name, parameter in parameters.items():
        parameter.data.copy_(state[name].pop("weight"))
        for optimiser in optimisers:
            if any(parameter is p for group in optimiser.param_groups for p in group["params"]):
                moments = {k: v if k == "step" else v.to(parameter.device) for k, v in state[name].items()}
                optimiser.state[parameter] = moments  # the count of steps stays on the CPU
    for optimiser in optimisers:
        if isinstance(optimiser, zero.SharedAdamW):
            optimiser.take([state[name] for name in parameters])
    log.info("resumed after step %d from %s", len(rows), path)
    return rows
