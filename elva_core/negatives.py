"""Balanced negatives of stage 3: filtered hard ones from the model's own ranking, and random ones.

ELVA section 3 after UniME and U-MARVEL: rank the pool by the stage-2 model, drop what is more similar than a
threshold (likely an unjudged positive), keep the next `hard`; add `random` ones from the whole pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elva_core import mbeir, runtime
from elva_core.encoder import Encoder, Item, candidate_item, query_item
from elva_core.retrieval import encode
from elva_core.settings import NegativeSettings


@dataclass(frozen=True, slots=True)
class Ranked:
    """A query of stage 3 with one positive and its N negatives, as one model ranked them.

    positive_cosine, cosines: that model's, of the positive and of the negatives.
    near: (D,) its embedding of the positive. bank: (C, D) its embeddings of the whole pool, shared by the queries; the
    negatives are its `rows`.
    """

    query: mbeir.Query
    item: Item
    positive: Item
    positive_did: str
    negatives: tuple[Item, ...]
    positive_cosine: float
    cosines: tuple[float, ...]
    near: np.ndarray
    bank: np.ndarray
    rows: tuple[int, ...]

    @property
    def vectors(self) -> np.ndarray:
        """(1 + N, D) float32, L2-normalised: the positive, then the negatives."""
        return np.concatenate([self.near[None], self.bank[list(self.rows)]])


def choose(scores: np.ndarray, excluded: set[int], positive: float, settings: NegativeSettings, rng: np.random.Generator) -> list[int]:
    """Pool rows of the negatives of one query: hard ones first, then random ones; hard + random of them in all.

    Where fewer than `hard` rows pass the threshold, random ones take their place: rewards need equal counts.

    Args:
        scores: (C,) cosine of every pool row. excluded: rows that are positives.
        positive: cosine of the chosen positive.

    Raises:
        ElvaDataError: the pool has too few rows.
    """
    limit = settings.threshold if settings.margin is None else min(settings.threshold, positive + settings.margin)
    order = [int(i) for i in np.argsort(-scores, kind="stable") if int(i) not in excluded]
    hard = [i for i in order if scores[i] <= limit][: settings.hard]
    rest = [i for i in order if i not in set(hard)]
    wanted = settings.hard + settings.random
    if len(order) < wanted:
        raise mbeir.ElvaDataError(f"{len(order)} candidates for {wanted} negatives of a query; lower stage3.negatives or raise their pool")
    return hard + [int(i) for i in rng.permutation(rest)[: wanted - len(hard)]]


def mine(encoder: Encoder, root: mbeir.Root, count: int, settings: NegativeSettings, *, batch: int, seed: int) -> list[Ranked]:
    """`count` train queries, the same number per task, with their negatives.

    Negatives have the modality of the positive. The pool may be sampled (`settings.pool` per modality).
    """
    queries, pool = _equal_draw(root.union_train(), count, seed), root.pool("", "train", "global")
    out: list[Ranked] = []
    for modality in mbeir.MODALITIES:
        rng = runtime.rng_for(seed, "negatives", modality)
        asked = [q for q in queries if mbeir.CANDIDATE_MODALITY[q.task] == modality]
        members = pool.rows_of(modality)
        if not asked:
            continue
        kept = sorted(rng.permutation(len(members))[: settings.pool or len(members)])
        chosen = [pool[row] for row in members[kept]]
        positives = [_judged(pool, q.positives[int(rng.integers(len(q.positives)))]) for q in asked]
        items = [candidate_item(root, c) for c in chosen]
        vectors, _ = encode(encoder, items, batch=batch)
        query_items = [query_item(root, q, seed=seed, scope="train/rl") for q in asked]
        asked_vectors, _ = encode(encoder, query_items, batch=batch)
        positive_vectors, _ = encode(encoder, [candidate_item(root, p) for p in positives], batch=batch)
        for query, item, positive, vector, near in zip(asked, query_items, positives, asked_vectors, positive_vectors, strict=True):
            scores = vectors @ vector
            same = {i for i, c in enumerate(chosen) if c.did in set(query.positives)}
            rows = choose(scores, same, float(vector @ near), settings, rng)
            out.append(
                Ranked(
                    query,
                    item,
                    candidate_item(root, positive),
                    positive.did,
                    tuple(items[i] for i in rows),
                    float(vector @ near),
                    tuple(float(scores[i]) for i in rows),
                    near,
                    vectors,
                    tuple(rows),
                )
            )
    order = runtime.rng_for(seed, "stage3 order").permutation(len(out))
    return [out[i] for i in order]


def _judged(pool: mbeir.Pool, did: str) -> mbeir.Candidate:
    row = pool.row(did)
    if row is None:
        raise mbeir.ElvaDataError(f"{pool.path}: judged candidate {did} is not in the train pool; run lint")
    return pool[row]


def _equal_draw(queries: mbeir.Records[mbeir.Query], count: int, seed: int) -> list[mbeir.Query]:
    """The same number of queries per (dataset, task), by stable hash; what a small set lacks is not refilled.

    Rows that up-sampling repeats count once.
    """
    _, rows = np.unique(queries.ids, return_index=True)
    groups: dict[tuple, list[int]] = {}
    for row in rows.tolist():
        groups.setdefault((int(queries.ids[row]) // mbeir.QUERY_ID_BASE, int(queries.kinds[row])), []).append(row)
    out = []
    for key in sorted(groups):
        qids = {row: f"{key[0]}:{queries.ids[row] - key[0] * mbeir.QUERY_ID_BASE}" for row in groups[key]}
        out += sorted(groups[key], key=lambda row, qids=qids: mbeir.stable_hash(seed, "stage3", qids[row]))[: -(-count // len(groups))]
    return [queries[row] for row in out[:count]]
