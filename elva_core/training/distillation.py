"""Distillation into single-pass embeddings: the state at [RET] after a summary, taught to the EOL state.

The teacher is the model itself, read after a greedy summary; it embeds a fixed sample of train items once.
The student is the same model with a fresh adapter, read after one forward. Every item is compared with its
own teacher embedding and, through the bank of all of them, with what the teacher says of its neighbours; so
no row of a batch needs another, and a pool that the teacher embedded stays in use.

    items = sample(union_pairs(root, settings.stage2, seed), settings.distil.pairs, settings.stage2.batch)
    targets = taught(encoder, items, batch=256, path=out / "teacher.safetensors")
    rows = train(encoder, items, targets, settings.distil, seed=17, folder=out)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from elva_core import distributed, files
from elva_core.data import mbeir
from elva_core.data.items import Item
from elva_core.models.ahead import preparing
from elva_core.models.encoder import Encoder
from elva_core.retrieval import retriever
from elva_core.training import loop, losses
from elva_core.training.contrastive import Draw, epochs
from elva_core.training_settings import DistilSettings


def sample(draw: Draw, pairs: int, batch: int) -> list[Item]:
    """The distinct items of the first `pairs` pairs that stage 2 drew, queries with their instruction."""
    steps = range(-(-pairs // batch))
    drawn = [pair for step in steps for pair in draw(step, batch)][:pairs]
    return list(dict.fromkeys([p.query for p in drawn] + [p.candidate for p in drawn]))


def taught(encoder: Encoder, items: Sequence[Item], *, batch: int, path: Path) -> torch.Tensor:
    """The teacher's embeddings (N, D); kept in `path`, so that an interrupted run writes no summary twice."""
    if not path.is_file():
        vectors, _ = retriever.encode(encoder, items, batch=batch)
        if distributed.processes().is_main_process:
            with files.whole(path) as partial:
                save_file({"embeddings": torch.from_numpy(vectors)}, partial)
        distributed.processes().wait_for_everyone()
    return load_file(path)["embeddings"]


def train(
    encoder: Encoder,
    items: Sequence[Item],
    targets: torch.Tensor,
    settings: DistilSettings,
    *,
    seed: int,
    folder: Path,
) -> list[dict[str, float]]:
    """Trains a fresh adapter until the EOL state of each item is its target, and merges it.

    Args:
        targets: (N, D) float32, L2-normalised, one per item.

    Returns:
        one row per step: loss, cosine (mean, to the item's target), kl (nats), grad_norm, step_time (s).
    """
    banks = losses.nested(targets.to(encoder.device), settings.dims)
    draw, temperature = epochs(range(len(items)), seed, "distil"), settings.temperature

    def drawn(step: int) -> tuple[list[int], list[list[int]]]:
        # rows of one shape together: less padding
        rows = sorted(draw(step, settings.batch), key=lambda i: (len(items[i].images), items[i].length, i))
        return rows, [rows[start : start + settings.chunk] for start in range(0, len(rows), settings.chunk)]

    def reads(step: int) -> tuple[list[Item], str]:
        _, chunks = drawn(step)
        computed = [items[i] for number in distributed.own_share(len(chunks)) for i in chunks[number]]
        return computed, encoder.settings.eol_request

    @encoder.one_step()
    def step_fn(step: int) -> dict[str, float]:
        prepare(step)
        rows, chunks = drawn(step)
        sums = {"distance": 0.0, "kl": 0.0}
        for number in distributed.own_share(len(chunks)):
            # dropout is the same on any number of processes
            torch.manual_seed(mbeir.stable_hash(seed, step, number))
            chunk = chunks[number]
            nested = zip(
                losses.nested(encoder.embed_eol([items[i] for i in chunk]), settings.dims), banks, strict=True
            )
            parts = [losses.distillation(v, b[chunk], b, temperature=temperature) for v, b in nested]
            distance, kl = (torch.stack(part).mean(0) for part in zip(*parts, strict=True))
            ((distance + settings.kl_weight * kl).sum() / len(rows)).backward()
            sums["distance"] += float(distance.detach().sum())
            sums["kl"] += float(kl.detach().sum())
        distributed.sum_gradients(parameters.values())
        distance, kl = (value / len(rows) for value in distributed.summed(sums).values())
        return {"loss": distance + settings.kl_weight * kl, "cosine": 1 - distance, "kl": kl}

    with (
        encoder.adapting(settings, seed=seed) as parameters,
        preparing(encoder, reads, settings.steps) as prepare,
    ):
        return loop.train_loop(parameters, step_fn, settings.steps, settings.optimiser, folder)
