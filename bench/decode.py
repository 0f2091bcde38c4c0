"""What the CPU can show of the GPU issue, in one run: the fixed cache against a growing one, launches a token, looks of the tower, padding.

The shipped backbone on the smoke profile's emoji; both caches in one process in turns, medians and ratios, and the same tokens.
Writes outputs/bench/decode.json.

    make bench
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.profiler import profile

from elva_core import config, distributed, files
from elva_core.data import sources
from elva_core.data.items import Item, candidate_item
from elva_core.models import decoding, encoder, generation
from elva_core.models.encoder import Encoder
from elva_core.training import contrastive

PROFILE = config.load("cpu")
ROLLOUTS, ROUNDS, WARMUP = 8, 9, 1
QUERIES, CANDIDATES = 16, 256  # of a step of stage 3, of a batch of the evaluation
STEPS, ROWS, TOKENS = 6, 16, {"stage1": 900, "stage2": 1000}  # of the padding: rows of a chunk, and about as many tokens


def growing() -> mock._patch:
    """Decoding with the cache that grows, as families with windows of attention have it."""
    return mock.patch.object(decoding, "can_be_fixed", lambda prefix: False)


def turns(work: Callable[[], generation.Rollouts]) -> dict:
    """Seconds with both caches, and how far apart what they write is."""
    seconds: dict[str, list[float]] = {"growing": [], "fixed": []}
    for turn in range(ROUNDS + WARMUP):
        made = {}
        for name in seconds:
            with growing() if name == "growing" else nullcontext():
                began = time.perf_counter()
                made[name] = work()
                took = time.perf_counter() - began
            if turn >= WARMUP:
                seconds[name].append(took)
    ratios = [a / b for a, b in zip(seconds["fixed"], seconds["growing"], strict=True)]
    grown, fixed = made["growing"], made["fixed"]
    return {
        "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "fixed over growing": round(statistics.median(ratios), 3),
        "lowest, highest": [round(min(ratios), 3), round(max(ratios), 3)],
        "same tokens": bool(torch.equal(grown.tokens, fixed.tokens)),
        "embeddings apart": float((grown.embeddings - fixed.embeddings).abs().max()),
        "log-probabilities apart": float((grown.log_p - fixed.log_p).abs().max()),
    }


def operations(model: Encoder, items: list[Item], noise: torch.Tensor) -> float:
    """Outermost operations of torch that a token takes, prompts left out: those of all tokens less those of one."""
    counts = []
    for length in (1, noise.shape[-1]):
        model.settings = model.settings.model_copy(update={"max_summary_tokens": length})
        with profile() as seen:
            generation.generate(model, items, noise=noise[..., :length])
        counts.append(sum(event.cpu_parent is None for event in seen.events()))
    return round((counts[1] - counts[0]) / (noise.shape[-1] - 1), 1)


def looks(model: Encoder, draw: contrastive.Draw, cached: bool, folder: Path) -> float:
    """Images that the tower has looked at in a step at [RET], over the distinct images of the step."""
    seen, tower = [], model.backbone.get_encoder(modality="image")
    hook = tower.register_forward_hook(lambda module, given, out: seen.append(out.last_hidden_state.numel()))
    images = {path for pair in draw(0, ROWS) for item in (pair.query, pair.candidate) for path in item.images}
    for path in images:
        model.batch([Item("", path)], "x")
    alone = sum(seen)
    seen.clear()
    changes = {"steps": 1, "batch": ROWS, "chunk": 5, "ret_share": 1.0, "gradient_cache": cached}
    contrastive.train(model, draw, PROFILE.stage2.model_copy(update=changes), seed=1, folder=folder)
    hook.remove()
    return sum(seen) / alone


def padding(model: Encoder, stage: str, draw: contrastive.Draw, folder: Path) -> dict[str, float]:
    """Share of the places of token rows: chunks of so many rows, and of about as many tokens sorted by length."""
    s, shares = getattr(PROFILE, stage), {}
    for name, changes in {"rows": {"chunk": ROWS}, "tokens": {"chunk_tokens": TOKENS[stage]}}.items():
        s = s.model_copy(update={"steps": STEPS, "gradient_cache": True, "ret_share": 0.0, **changes})
        rows = contrastive.train(model, draw, s, seed=1, folder=folder / name)
        shares[name] = round(float(np.mean([row["padding"] for row in rows])), 3)
    return shares


def main() -> None:
    distributed.start(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root, triplets = sources.write(config.load("smoke").data, folder / "data", seed=17)
        load = lambda **changes: encoder.load(  # noqa: E731
            files.REPOSITORY / PROFILE.backbone.path, PROFILE.encoder.model_copy(update=changes)
        )
        model, pool = load(), root.pool("", "test", "global")
        items = [candidate_item(root, c) for c in pool][:CANDIDATES]
        asked = [item for item in items if item.images][:QUERIES]
        noise = torch.rand(len(asked), ROLLOUTS, PROFILE.encoder.max_summary_tokens, generator=torch.Generator().manual_seed(0))
        made = {
            f"{len(asked)} queries, {ROLLOUTS} rollouts": turns(lambda: generation.generate(model, asked, noise=noise)),
            f"{len(items)} candidates, greedy": turns(lambda: generation.generate(model, items)),
        }
        by_cache = {"fixed": operations(load(), asked, noise)}
        with growing():
            by_cache["growing"] = operations(load(), asked, noise)
        made["operations of torch a token"] = by_cache
        mixed = contrastive.union_pairs(root, PROFILE.stage2.model_copy(update={"one_task_per_batch": False}), 1)
        made["looks of the tower, of distinct images"] = {
            f"gradient cache {cached}": looks(load(cache_vision=False), mixed, cached, folder / str(cached)) for cached in (False, True)
        }
        draws = {
            "stage1": contrastive.triplet_pairs(sources.read_nli(triplets), 1),
            "stage2": contrastive.union_pairs(root, PROFILE.stage2, 1),
        }
        made["share of padding"] = {stage: padding(load(), stage, draw, folder / stage) for stage, draw in draws.items()}
    files.write_whole(files.REPOSITORY / "outputs/bench/decode.json", json.dumps(made, indent=1) + "\n")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
