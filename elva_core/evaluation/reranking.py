"""Reranking with score fusion: weight chosen on validation, hit rates before and after, seconds per query.

Retriever and reranker both say how probable each of the first candidates is, in nats, so the weight has one
meaning for all of them: weight * retriever + (1 - weight) * reranker (LamRA-Rank's fusion, there of a cosine
and P(Yes)).

    seen = rerank_unit(model, searcher, result, settings.rerank)
    weights = choose(weigh(validation, temperature))
    table = hits(test, weights, temperature, first="stage 3", cutoffs=[1, 5])
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from elva_core.data.items import candidate_item
from elva_core.evaluation import statistics
from elva_core.models.encoder import Encoder
from elva_core.retrieval import metrics, retriever, search
from elva_core.retrieval.retriever import Embedded, Searcher, UnitResult
from elva_core.training import reranker
from elva_core.training.reranker import Asked, Kind
from elva_core.training_settings import RerankSettings

WEIGHTS = tuple(np.linspace(0, 1, 21).round(2).tolist())  # of the retriever
FUSED = ", fused"
CEILING = "best order of the first"  # what no reranking can exceed


@dataclass(frozen=True)
class Reranked:
    """A unit whose first candidates were reranked. scores: per kind (Q, depth), in the retriever's order."""

    result: UnitResult
    asked: list[Asked]
    scores: dict[Kind, np.ndarray]

    @property
    def depth(self) -> int:
        return len(self.asked[0].dids)


def first_answers(searcher: Searcher, result: UnitResult, depth: int) -> list[Asked]:
    """Each query with its first `depth` candidates, or with all that the pool has.

    Raises:
        ValueError: the retriever kept fewer.
    """
    depth = min(depth, len(result.candidates))
    if result.top.shape[1] < depth:
        lists = f"ranked lists have {result.top.shape[1]} candidates"
        raise ValueError(f"rerank.depth = {depth}, but {lists}; raise evaluation.cutoffs")
    out = []
    for query, rows in zip(result.queries, result.top[:, :depth], strict=True):
        first = [result.candidates[row] for row in rows]
        items = tuple(candidate_item(searcher.root, c) for c in first)
        out.append(Asked(query.qid, searcher.query(query, result.unit), tuple(c.did for c in first), items))
    return out


def rerank_unit(model: Encoder, searcher: Searcher, result: UnitResult, settings: RerankSettings) -> Reranked:
    """Scores the first answers of a unit, pointwise and listwise."""
    asked, scores = first_answers(searcher, result, settings.depth), {}
    for kind in reranker.KINDS:
        scores[kind] = np.stack(reranker.score(model, asked, kind, settings, batch=settings.prompts))
    return Reranked(result, asked, scores)


def log_share(values: np.ndarray) -> np.ndarray:
    """Log-probabilities (Q, K) among the K candidates: one of them is taken to be the answer."""
    return values - np.logaddexp.reduce(values, axis=1, keepdims=True)


def fuse(cosines: np.ndarray, scores: np.ndarray, weight: float, temperature: float) -> np.ndarray:
    """(Q, K) fused log-scores; weight 1 is the retriever's order, 0 the reranker's.

    Args:
        cosines: (Q, K) of the retriever. scores: (Q, K) of the reranker, in nats.
        temperature: that the retriever's cosines were trained with.
    """
    return weight * log_share(cosines.astype(float) / temperature) + (1 - weight) * log_share(scores)


def reorder(ranks: Sequence[Sequence[int]], scores: np.ndarray) -> list[list[int]]:
    """Ranks of the positives after the first K candidates are ordered by score.

    Candidates of equal score keep the old order, and so do those behind the first K.

    Args:
        ranks: per query, from 1, in the old order. scores: (Q, K) in that order.

    >>> reorder([[2, 9]], np.array([[0.1, 0.7, 0.2]]))
    [[1, 9]]
    """
    depth = scores.shape[1]
    place = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1) + 1
    return [sorted(int(place[q, r - 1]) if r <= depth else r for r in own) for q, own in enumerate(ranks)]


def after(seen: Reranked, kind: Kind, weight: float, temperature: float) -> list[list[int]]:
    """Ranks of a unit's positives after the reranking."""
    cosines = seen.result.scores[:, : seen.depth]
    return reorder(seen.result.ranks, fuse(cosines, seen.scores[kind], weight, temperature))


def weigh(validation: Sequence[Reranked], temperature: float) -> pd.DataFrame:
    """Mean reciprocal rank of every weight on units of the validation split.

    Returns:
        columns kind, weight, mrr (unweighted mean of the units).
    """
    rows = []
    for kind, weight in itertools.product(reranker.KINDS, WEIGHTS):
        ranks = [(after(seen, kind, weight, temperature), seen.depth) for seen in validation]
        units = [metrics.reciprocal_rank(of_unit, depth).mean() for of_unit, depth in ranks]
        rows.append({"kind": kind, "weight": weight, "mrr": float(np.mean(units))})
    return pd.DataFrame(rows)


def choose(table: pd.DataFrame) -> dict[Kind, float]:
    """The best weight of each kind; of equals the one that trusts the retriever most."""
    best = table.assign(mrr=table["mrr"].round(9)).sort_values(["mrr", "weight"]).groupby("kind").last()
    return {kind: float(best.loc[kind, "weight"]) for kind in reranker.KINDS}


def chosen(table: pd.DataFrame, weights: Mapping[Kind, float], n: int) -> str:
    """The weights that were chosen, in words, with the mean reciprocal rank of each and of the retriever.

    Args:
        table: `weigh`. n: queries of the validation.
    """
    mrr = table.set_index(["kind", "weight"])["mrr"]
    words = [f"{kind} {weight:.2f} (MRR {mrr[kind, weight]:.3f})" for kind, weight in weights.items()]
    alone = mrr.xs(WEIGHTS[-1], level="weight").iloc[0]
    none = " A weight of 1 leaves the retriever's order." if WEIGHTS[-1] in weights.values() else ""
    return (
        f"{', '.join(words)}; the retriever alone has MRR {alone:.3f} (n = {n:,} validation queries).{none}"
    )


def hits(
    seen: Sequence[Reranked],
    weights: Mapping[Kind, float],
    temperature: float,
    *,
    first: str,
    cutoffs: Sequence[int],
) -> pd.DataFrame:
    """Hits of each query before and after reranking, as mrbench_table and statistics.comparison take them.

    Models: the retriever (`first`), each kind alone and fused, and the best order there is of the candidates
    reranked.

    Returns:
        columns model, unit, qid, hit@k of every cut-off.
    """
    parts = []
    for unit in seen:
        ways = {first: unit.result.ranks}
        for kind, weight in weights.items():
            ways[kind] = after(unit, kind, 0.0, temperature)
            ways[kind + FUSED] = after(unit, kind, weight, temperature)
        best = [[1 if rank <= unit.depth else rank for rank in ranks] for ranks in unit.result.ranks]
        ways[f"{CEILING} {unit.depth}"] = best
        for model, ranks in ways.items():
            columns = {"model": model, "unit": unit.result.unit, "qid": [a.qid for a in unit.asked]}
            scores = {f"hit@{k}": metrics.hit_rate_at_k(ranks, k) for k in cutoffs}
            parts.append(pd.DataFrame(columns | scores))
    return pd.concat(parts, ignore_index=True)


def compared(
    table: pd.DataFrame, first: str, cutoffs: Sequence[int], samples: int, seed: int
) -> pd.DataFrame:
    """Each way but the best order over the retriever alone, paired: rows of `statistics.comparison`."""
    ways = [m for m in dict.fromkeys(table["model"]) if m != first and not m.startswith(CEILING)]
    pairs = itertools.product(ways, cutoffs)
    return pd.DataFrame([statistics.comparison(table, way, first, k, samples, seed) for way, k in pairs])


def seconds(
    model: Encoder,
    searcher: Searcher,
    seen: Sequence[tuple[Reranked, Embedded]],
    settings: RerankSettings,
    weights: Mapping[Kind, float],
    temperature: float,
    *,
    first: str,
) -> pd.DataFrame:
    """Median seconds of one query alone: retrieval, with each kind of reranking, with its fusion, in turns.

    Nothing is known of a query or a candidate but the pool's embeddings: images are opened and seen anew.

    Returns:
        model (as in `hits`), seconds, lower and upper quartile, n queries.
    """
    writer, reader = searcher.encoder.forgetful(), model.forgetful()
    ways = (way for kind in reranker.KINDS for way in (kind, kind + FUSED))
    taken: dict[str, list[float]] = {way: [] for way in (first, *ways)}
    rounds = range(-(-settings.timed // len(seen)))
    turns = [(unit, pool, i) for i in rounds for unit, pool in seen if i < len(unit.asked)]
    for unit, pool, i in [turns[0], *turns[: settings.timed]]:  # the first one warms up
        asked = unit.asked[i]
        began = time.perf_counter()
        vectors, _ = retriever.encode(writer, [asked.query], batch=1, template=searcher.template)
        search.exact(vectors, pool.pool_vectors, unit.depth)
        taken[first].append(time.perf_counter() - began)
        for kind in reranker.KINDS:
            began = time.perf_counter()
            scores = reranker.score(reader, [asked], kind, settings, batch=settings.depth)
            ranks = [list(range(1, unit.depth + 1))]
            reorder(ranks, np.stack(scores))
            taken[kind].append(taken[first][-1] + time.perf_counter() - began)
            fused = fuse(
                unit.result.scores[i : i + 1, : unit.depth], np.stack(scores), weights[kind], temperature
            )
            reorder(ranks, fused)
            taken[kind + FUSED].append(taken[first][-1] + time.perf_counter() - began)
    rows = []
    for way, values in taken.items():
        low, middle, high = np.percentile(values[1:], [25, 50, 75])
        rows.append((way, middle, low, high, len(values) - 1))
    return pd.DataFrame(rows, columns=["model", "seconds", "lower quartile", "upper quartile", "n"])


def table(averages: pd.DataFrame, taken: pd.DataFrame) -> pd.DataFrame:
    """Quality and cost of reranking, a row per model: hit rates in percent with intervals, seconds per query.

    Args:
        averages: `benchmark.mrbench_table` of `hits`. taken: `seconds`; nan for a model that it has not.
    """
    averages = averages[averages["unit"] == "average"].set_index("model")
    out = pd.DataFrame(index=averages.index.drop_duplicates())
    for metric, rows in averages.groupby("metric"):
        for column, name in (("value", metric), ("ci_low", f"{metric} low"), ("ci_high", f"{metric} high")):
            out[name] = 100 * rows[column]
        out["n"] = rows["n"]
    return out.join(taken.set_index("model").drop(columns="n")).reset_index()
