"""Headroom of summaries: hit rates with the one a model writes, its best of several, and the true one.

hits = headroom.measure(searcher, bench, (1, 5), samples=8, seed=17)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from elva_core import distributed
from elva_core.data import mbeir
from elva_core.data.items import Item, candidate_item
from elva_core.evaluation import benchmark, statistics
from elva_core.models import generation
from elva_core.models.encoder import Encoder
from elva_core.retrieval import metrics
from elva_core.retrieval.retriever import Embedded, Searcher

# whose summaries a query and its candidates are read with; unless named, candidates have greedy ones
GREEDY, SAMPLED, BEST = "greedy", "one sampled", "best sampled"
TRUE, ALL_TRUE = "true, query", "true, both sides"


def measure(
    searcher: Searcher,
    bench: mbeir.Root,
    cutoffs: Sequence[int],
    *,
    samples: int,
    seed: int,
    limit: int | None = None,
) -> pd.DataFrame:
    """Hits of every MRBench query with summaries of different origin.

    Args:
        samples: summaries of each query that are sampled, at temperature 1.
        limit: queries of each unit, chosen by a stable hash; None takes all.

    Returns:
        one row per query and kind of summary: unit, qid, summaries, hit@k. GREEDY is what `benchmark.measure`
        gives; SAMPLED is the mean over the samples, BEST one sample's hit if any has one, so the most that
        choosing among its own summaries can give. TRUE is the query's grains as its summary; ALL_TRUE is
        left out of a unit where a candidate has no grains.
    """
    rows, told = [], {}
    size = samples, searcher.encoder.settings.max_summary_tokens  # random numbers that a query's samples take
    for unit in bench.units(searcher.split):
        read = searcher.embedded(unit, root=bench, sample=limit)
        items = [searcher.query(query, unit) for query in read.queries]
        qids = [query.qid for query in read.queries]

        # samples: each competes alone against the pool as it is
        noise = np.stack([distributed.rng_for(seed, "headroom", unit, qid).random(size) for qid in qids])
        vectors = sampled(searcher.encoder, items, noise, searcher.settings.batch)
        each = read._replace(
            queries=[query for query in read.queries for _ in range(samples)],
            relevant=[rows for rows in read.relevant for _ in range(samples)],
            query_vectors=vectors.reshape(-1, vectors.shape[-1]),
        )
        hits = _hits(searcher, each, cutoffs).reshape(len(qids), samples, -1)
        kinds = {GREEDY: _hits(searcher, read, cutoffs), SAMPLED: hits.mean(1), BEST: hits.max(1)}

        # the true summary of the query, then of the candidates, too
        captions = [mbeir.caption(query) for query in read.queries]
        if all(captions):
            true = read._replace(query_vectors=_told(searcher, items, captions, told))
            kinds[TRUE] = _hits(searcher, true, cutoffs)
            if all(captions := [mbeir.caption(candidate) for candidate in read.candidates]):
                pool = [candidate_item(searcher.root, candidate) for candidate in read.candidates]
                both = true._replace(pool_vectors=_told(searcher, pool, captions, told))
                kinds[ALL_TRUE] = _hits(searcher, both, cutoffs)
        names = [f"hit@{k}" for k in cutoffs]
        tables = [
            pd.DataFrame(values, columns=names).assign(summaries=kind, qid=qids)
            for kind, values in kinds.items()
        ]
        rows.append(pd.concat(tables).assign(unit=unit))
    return pd.concat(rows, ignore_index=True)[["unit", "qid", "summaries", *(f"hit@{k}" for k in cutoffs)]]


def sampled(encoder: Encoder, items: Sequence[Item], noise: np.ndarray, batch: int) -> np.ndarray:
    """Embeddings (N, samples, D) after sampled summaries.

    Args:
        noise: (N, samples, T) uniform in [0, 1), as `generation.generate` takes it. batch: rows of a forward.
    """
    size = max(1, batch // noise.shape[1])
    parts = []
    for start in range(0, len(items), size):
        part = torch.from_numpy(noise[start : start + size]).to(encoder.device)
        parts.append(
            generation.generate(encoder, items[start : start + size], noise=part).embeddings.cpu().numpy()
        )
    return np.concatenate(parts)


@torch.no_grad()
def after(encoder: Encoder, items: Sequence[Item], texts: Sequence[str], batch: int) -> np.ndarray:
    """Embeddings (N, D) at [RET] after given texts as summaries, cut where the model itself would be."""
    cap = encoder.settings.max_summary_tokens
    tokens = [
        row[:cap] for row in encoder.processor.tokenizer(list(texts), add_special_tokens=False).input_ids
    ]
    # rows of one shape together: less padding
    order = sorted(range(len(items)), key=lambda i: (len(items[i].images), items[i].length, len(tokens[i])))
    vectors = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        states, _ = encoder.embed_summaries([items[i] for i in part], [tokens[i] for i in part])
        vectors.update(zip(part, states.cpu().numpy(), strict=True))
    return np.stack([vectors[i] for i in range(len(items))])


def _told(searcher: Searcher, items: Sequence[Item], captions: Sequence[str], known: dict) -> np.ndarray:
    """`after` their captions; units share candidates, so what was embedded is kept in `known`."""
    pairs = list(zip(items, captions, strict=True))
    new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
    if new:
        known.update(
            zip(new, after(searcher.encoder, *zip(*new, strict=True), searcher.settings.batch), strict=True)
        )
    return np.stack([known[pair] for pair in pairs])


def _hits(searcher: Searcher, embedded: Embedded, cutoffs: Sequence[int]) -> np.ndarray:
    """(Q, cutoffs) 1 where a positive is among the first k."""
    ranks = searcher.rank(embedded).ranks
    return np.stack([metrics.hit_rate_at_k(ranks, k) for k in cutoffs], axis=1)


def table(hits: pd.DataFrame, cutoffs: Sequence[int], samples: int, seed: int) -> pd.DataFrame:
    """Hit rates by model and kind of summary on every unit and on average.

    Args:
        hits: of `measure`, with a column model. samples: of the bootstrap.

    Returns:
        `benchmark.mrbench_table` with a column summaries.
    """
    parts = [
        benchmark.mrbench_table(part, cutoffs, samples, seed).assign(summaries=kind)
        for kind, part in hits.groupby("summaries", sort=False)
    ]
    return pd.concat(parts, ignore_index=True)


def shares_taken(hits: pd.DataFrame, cutoffs: Sequence[int], samples: int) -> pd.DataFrame:
    """Share of the room up to the best of stage 2's own samples that stage 3's greedy summaries take.

    Args:
        hits: of `measure`, with a column model. samples: of the bootstrap over queries.

    Returns:
        metric, value, ci_low, ci_high, n, as `statistics.share` has them.
    """
    rows = []
    for metric in (f"hit@{k}" for k in cutoffs):
        wide = hits.pivot(index=["unit", "qid"], columns=["model", "summaries"], values=metric)
        before = wide["stage 2", GREEDY]
        parts = {"part": wide["stage 3", GREEDY] - before, "whole": wide["stage 2", BEST] - before}
        queries = pd.DataFrame(parts).reset_index()
        share = statistics.share(queries, "part", "whole", samples, (0, "headroom", metric))
        rows.append({"metric": metric} | share)
    return pd.DataFrame(rows)


def sentence(rows: pd.DataFrame, shares: pd.DataFrame, samples: int) -> str:
    """What the table shows, in words: the room from stage 2's greedy summary to the best of several sampled
    ones, and what stage 3 takes of it.

    Args:
        rows: of `table`. shares: of `shares_taken`. samples: summaries of each query.
    """
    reached, taken, clear = [], [], []
    at = rows[rows["unit"] == "average"].set_index(["metric", "model", "summaries"])["value"]
    for share in shares.to_dict("records"):
        best, before = (100 * at[share["metric"], "stage 2", summaries] for summaries in (BEST, GREEDY))
        reached.append(f"{best:.1f} % {share['metric']} ({before:.1f} with its own)")
        if share["value"] != share["value"]:
            taken.append("a share that cannot be measured")
            continue
        percent = {name: 100 * share[name] for name in ("value", "ci_low", "ci_high")}
        taken.append("{value:.0f} % [{ci_low:.0f}, {ci_high:.0f}]".format(**percent))
        clear.append(share["ci_low"] > 0 or share["ci_high"] < 0)
    doubt = "" if all(clear) else ", and may take none" if not any(clear) else ", of which one may be none"
    return (
        f"With the best of {samples} sampled summaries, chosen knowing the answer, stage 2 would reach "
        f"{' and '.join(reached)}. Stage 3 takes {' and '.join(taken)} of these gains{doubt} "
        f"(n = {shares['n'].iloc[0]:,} queries, one seed)."
    )


def reading(searcher: Searcher, bench: mbeir.Root) -> float | None:
    """Share of the pools' pictures whose greedy summary is exactly their grains.

    Returns:
        None where no picture has grains, or summaries of the candidates were not kept (embeddings on disk).
    """
    pictures = {
        candidate_item(searcher.root, candidate): mbeir.caption(candidate)
        for unit in bench.units(searcher.split)
        for candidate in bench.pool(unit, searcher.split)
        if candidate.modality == "image" and mbeir.grains(candidate)
    }
    try:
        exact = [searcher.summary(item) == caption for item, caption in pictures.items()]
    except KeyError:
        return None
    return sum(exact) / len(exact) if exact else None
