"""Processes and their randomness: start, shares of a step, exchange between processes, versions of packages.

All randomness of a step is derived from (seed, name, step), so resuming needs no saved generator state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.metadata import requires, version

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, get_int_from_env, reduce

from elva_core import sharding, zero

log = logging.getLogger("elva")


def rng_for(seed: int, *scope: object) -> np.random.Generator:
    """An independent random stream per name, so that a new consumer never shifts the others."""
    return np.random.default_rng([seed, *(int.from_bytes(str(s).encode()[-24:], "big") for s in scope)])


def torch_rng(seed: int, *scope: object) -> torch.Generator:
    """The same for torch, on the CPU."""
    return torch.Generator().manual_seed(int(rng_for(seed, *scope).integers(2**62)))


def start(threads: int | None) -> None:
    """Thread count, plain log lines, no progress bars from libraries. Deterministic for one thread count.

    Args:
        threads: of the machine; the processes on it share them, for more threads than cores hinder each
            other.
    """
    if threads:
        torch.set_num_threads(max(1, threads // get_int_from_env(["LOCAL_WORLD_SIZE"], 1)))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    from transformers.utils import logging as hf

    hf.set_verbosity_error()
    hf.disable_progress_bar()


def processes() -> PartialState:
    """The processes that train together: one, or those that `accelerate launch` started."""
    return PartialState(cpu=not torch.cuda.is_available())


def own_share(count: int) -> list[int]:
    """Places of the rows, of `count` in a step, that this process computes."""
    return list(range(processes().process_index, count, processes().num_processes))


def summed(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over the processes."""
    if processes().num_processes == 1:  # a card would be waited for
        return values
    sharding.collective_turn(sharding.EXCHANGE)
    total = reduce(torch.tensor(list(values.values()), dtype=torch.float64, device=processes().device), "sum")
    return dict(zip(values, total.tolist(), strict=True))


def gathered(parts: dict[int, object]) -> dict[int, object]:
    """Numbered objects of all processes."""
    if processes().num_processes == 1:
        return parts
    sharding.collective_turn(sharding.EXCHANGE)
    return {number: part for theirs in gather_object([parts]) for number, part in theirs.items()}


def exchanged(parts: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Numbered tensors of all processes, of any sizes; without gradient."""
    if processes().num_processes == 1:
        return parts
    everywhere = gathered({number: part.detach().cpu() for number, part in parts.items()})
    return {number: part.to(processes().device) for number, part in everywhere.items()}


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Every process gets the sum of all gradients; each has computed its own rows of the step.

    Where DeepSpeed shares them, `loop.train_loop` sums them.
    """
    if processes().num_processes > 1 and not zero.requested():
        sharding.collective_turn(sharding.EXCHANGE)
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(gradient, "sum")


def environment() -> pd.DataFrame:
    """Pinned and installed version of every dependency.

    Raises:
        RuntimeError: a version differs from its pin; results would not be comparable.
    """
    rows = []
    for line in requires("elva-workbook") or []:
        name, _, rest = line.partition("==")
        if "extra ==" not in line:
            rows.append({"package": name, "pinned": rest, "installed": version(name)})
    table = pd.DataFrame(rows)
    wrong = table[table["pinned"] != table["installed"].str.split("+").str[0]]
    if len(wrong):
        raise RuntimeError(
            f"installed versions differ from the pins: {wrong.to_dict('records')}; run: make setup"
        )
    return table
