"""Stages 1 and 2, and the control of stage 3: InfoNCE over pairs.

rows = train(encoder, union_pairs(root, settings.stage2, 17), settings.stage2, seed=17, folder=out)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from elva_core import distributed
from elva_core.config import SUMMARIES_AT_ONCE
from elva_core.data import mbeir
from elva_core.data.items import Item, candidate_item, query_item
from elva_core.models import batching, generation
from elva_core.models.ahead import preparing
from elva_core.models.encoder import Encoder
from elva_core.training import loop, losses
from elva_core.training.hard_negatives import TrainingQuery
from elva_core.training_settings import ContrastiveSettings, ControlSettings


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, one of its positives (`candidate`) and, for the control, hard negatives of its own.

    did: of the candidate. positives: all judged dids, to recognise false negatives in the batch.
    grains: texts of the grains of the query, the candidate and each negative; `loss: grains` compares them.
    """

    query: Item
    candidate: Item
    did: str
    positives: tuple[str, ...]
    negatives: tuple[Item, ...] = ()
    grains: tuple[frozenset[str], ...] = ()


Draw = Callable[[int, int], list[Pair]]  # (step, batch size) -> pairs


def epochs(rows: Sequence, seed: int, scope: str) -> Callable[[int, int], list]:
    """Draws batches from a new permutation of `rows` per epoch, as a pure function of the step."""

    def draw(step: int, size: int) -> list:
        size = min(size, len(rows))
        per_epoch = len(rows) // size
        epoch, offset = divmod(step, per_epoch)
        order = distributed.rng_for(seed, scope, epoch).permutation(len(rows))
        return [rows[i] for i in order[offset * size : (offset + 1) * size]]

    return draw


def triplet_pairs(triplets: pd.DataFrame, seed: int) -> Draw:
    """Stage 1: (sent0, sent1); as in LamRA the hard negative is not used, in-batch negatives are."""
    rows = [Pair(Item(a), Item(b), b, (b,)) for a, b in zip(triplets.sent0, triplets.sent1, strict=True)]
    return epochs(rows, seed, "stage1")


def union_pairs(
    root: mbeir.Root, settings: ContrastiveSettings, seed: int, excluded: Sequence[str] = ()
) -> Draw:
    """Stage 2: rows of the union train file, one random positive and a random instruction per visit.

    Args:
        excluded: units, or patterns of units, whose queries are left out.
    """
    queries, pool, rows = root.union_train(), root.pool("", "train", "global"), root.trained_rows(excluded)
    tasks = queries.kinds[rows] if settings.one_task_per_batch else np.zeros(len(rows), int)
    draws = {task: epochs(rows[tasks == task], seed, f"stage2/{task}") for task in np.unique(tasks).tolist()}

    def draw(step: int, size: int) -> list[Pair]:
        rng = distributed.rng_for(seed, "stage2", step)
        # tasks take turns, in a new order each round, so every task is seen equally often
        turn, place = divmod(step, len(draws))
        task = list(draws)[distributed.rng_for(seed, "turn", turn).permutation(len(draws))[place]]
        pairs = []
        for query in (queries[row] for row in draws[task](turn, size)):
            did = query.positives[int(rng.integers(len(query.positives)))]
            asked = query_item(root, query, seed=seed, scope=f"train/{step}")
            candidate = candidate_item(root, pool[pool.judged(did, query.qid)])
            pairs.append(Pair(asked, candidate, did, query.positives))
        return pairs

    return draw


def ranked_pairs(ranked: Sequence[TrainingQuery], seed: int, settings: ControlSettings) -> Draw:
    """The control of stage 3: its queries with their positive and their own negatives, all or some."""
    rows = []
    for r in ranked:
        kept = range(len(r.negatives))
        if settings.hard is not None:  # the hardest come first, the random ones last
            kept = [*kept[: settings.hard], *kept[len(kept) - settings.random :]]
        negatives, grains = zip(*((r.negatives[i], r.grains[2 + i]) for i in kept), strict=True)
        judged = r.positive_did, r.query.positives
        rows.append(Pair(r.item, r.positive, *judged, negatives, (*r.grains[:2], *grains)))
    return epochs(rows, seed, "stage3")


class SummaryCache:
    """Greedy summaries of the model as it was when training began, once per item (ELVA leaves this open)."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[Item, list[int]] = {}

    def __call__(self, items: Sequence[Item], bare: set[Item]) -> list[list[int]]:
        """Token ids; none for an item of `bare`."""
        missing = [i for i in dict.fromkeys(items) if i not in self._known and i not in bare]
        if missing:
            decoder = self._encoder.backbone.get_decoder()
            training = decoder.training
            decoder.eval()  # layers that checkpoint while they train keep no cache
            with self._encoder.model.disable_adapter():
                for start in range(0, len(missing), SUMMARIES_AT_ONCE):
                    part = missing[start : start + SUMMARIES_AT_ONCE]
                    out = generation.generate(self._encoder, part)
                    summaries = (summary for (summary,) in out.summaries(self._encoder.end_id))
                    self._known.update(zip(part, summaries, strict=True))
            decoder.train(training)
        return [[] if i in bare else self._known[i] for i in items]


def ret_step(step: int, share: float) -> bool:
    """Whether this step trains the [RET] state; exact share, spread evenly.

    >>> [ret_step(i, 0.5) for i in range(4)]
    [False, True, False, True]
    """
    return int((step + 1) * share) > int(step * share)


def _chunks(
    encoder: Encoder, items: Sequence[Item], queries: int, settings: ContrastiveSettings, *, use_ret: bool
) -> list[list[int]]:
    """Places of items that share a forward; the first `queries` of the items are queries."""
    if settings.chunk_tokens is None:
        # never queries and candidates together: rows of one modality need less padding
        sides, size = (range(queries), range(queries, len(items))), settings.chunk
        return [list(side[start : start + size]) for side in sides for start in range(0, len(side), size)]
    prompts = encoder.settings
    # every process must cut alike, and knows only the summaries of its own chunks: all count as the longest
    more = prompts.max_summary_tokens + 1 if use_ret else 0
    tokens = batching.lengths(encoder, items, prompts.summary_request if use_ret else prompts.eol_request)
    places = [count + more for count in tokens]
    return batching.evenly(places, settings.chunk_tokens, distributed.processes().num_processes)


def train(
    encoder: Encoder, draw: Draw, settings: ContrastiveSettings, *, seed: int, folder: Path
) -> list[dict[str, float]]:
    """Trains a fresh adapter with InfoNCE and merges it.

    Args:
        draw: (step, batch size) -> pairs; all pairs of a batch share its candidates as negatives.

    Returns:
        one row per step: loss, batch accuracy, ret (1 or 0), summary_loss, padding (share of the places of
        all token rows), grad_norm, step_time (s).
    """
    summaries = SummaryCache(encoder)

    @lru_cache(maxsize=8)  # drawn when it is made ready, and when it comes
    def drawn(step: int) -> tuple[bool, list[Pair], list[Item], list[list[int]]]:
        pairs = draw(step, settings.batch)
        items = [p.query for p in pairs] + [p.candidate for p in pairs]
        items += [negative for p in pairs for negative in p.negatives]
        use_ret = ret_step(step, settings.ret_share)
        return use_ret, pairs, items, _chunks(encoder, items, len(pairs), settings, use_ret=use_ret)

    def reads(step: int) -> tuple[list[Item], str]:
        (use_ret, _, items, rows), prompts = drawn(step), encoder.settings
        computed = [items[i] for chunk in distributed.own_share(len(rows)) for i in rows[chunk]]
        return computed, prompts.summary_request if use_ret else prompts.eol_request

    @encoder.one_step()
    def step_fn(step: int) -> dict[str, float]:
        prepare(step)
        use_ret, pairs, items, rows = drawn(step)
        place = torch.tensor(list(chain(*rows)), device=encoder.device).argsort()  # of each item among them
        chunks = distributed.own_share(len(rows))
        chance = distributed.rng_for(seed, "bare", step).random(len(items))
        bare = {item for item, u in zip(items, chance, strict=True) if u < settings.bare_share}
        if not encoder.settings.candidate_summaries:
            bare.update(items[len(pairs) :])
        if use_ret:
            summaries(reads(step)[0], bare)  # written together, and kept
        ignore = None
        if settings.mask_false_negatives:
            ignore = losses.false_negatives([p.positives for p in pairs], [p.did for p in pairs])
            ignore = torch.nn.functional.pad(ignore, (0, len(items) - 2 * len(pairs))).to(encoder.device)
        loss_of = partial(losses.infonce, ignore=ignore, temperature=settings.temperature)
        if isinstance(settings, ControlSettings) and settings.loss == "grains":
            answers = [p.grains[1] for p in pairs] + [g for p in pairs for g in p.grains[2:]]
            overlap = losses.overlap([p.grains[0] for p in pairs], answers).to(encoder.device)
            how = {"temperature": settings.temperature, "grain_temperature": settings.grain_temperature}
            loss_of = partial(losses.graded, overlap=overlap, **how)
        accuracy, written = [], {}
        tokens, places = encoder.tokens_read, encoder.places_read

        def embed(chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
            # the same dropout in both passes of the cache
            torch.manual_seed(mbeir.stable_hash(seed, step, chunk))
            part = [items[i] for i in rows[chunk]]
            if not use_ret:
                return encoder.embed_eol(part), torch.zeros((), device=encoder.device)
            vectors, writing = encoder.embed_summaries(part, summaries(part, bare))
            share = settings.summary_weight * len(vectors) / len(items)
            written[chunk] = float(writing.detach())
            return vectors, share * writing

        def loss_fn(vectors: torch.Tensor) -> torch.Tensor:
            queries, candidates = vectors[place].tensor_split([len(pairs)])
            best = (queries @ candidates.T).detach()
            best = (best if ignore is None else best.masked_fill(ignore, -2)).argmax(1).cpu()
            accuracy.append(float((best == torch.arange(len(pairs))).float().mean()))
            nested = zip(*(losses.nested(side, settings.dims) for side in (queries, candidates)), strict=True)
            return torch.stack([loss_of(*sides) for sides in nested]).mean()

        # the gradient, with the embeddings of all processes as each other's negatives
        cache = settings.gradient_cache or distributed.processes().num_processes > 1
        exchange = distributed.exchanged
        loss = losses.backward_in_chunks(embed, chunks, loss_fn, cache=cache, exchange=exchange)
        distributed.sum_gradients(parameters.values())
        counts = {"loss": sum(written.values()), "chunks": len(written)}
        counts |= {"tokens": float(encoder.tokens_read - tokens), "places": encoder.places_read - places}
        sums = distributed.summed(counts)
        return {
            "loss": float(loss),
            "accuracy": accuracy[0],
            "ret": float(use_ret),
            "summary_loss": sums["loss"] / max(1, sums["chunks"]),
            "padding": 1 - sums["tokens"] / sums["places"],
        }

    with (
        encoder.adapting(settings, seed=seed) as parameters,
        preparing(encoder, reads, settings.steps) as prepare,
    ):
        return loop.train_loop(parameters, step_fn, settings.steps, settings.optimiser, folder)
