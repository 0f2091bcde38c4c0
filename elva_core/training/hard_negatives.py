"""Balanced negatives of stage 3: filtered hard ones from the model's own ranking, and random ones.

ELVA section 3 after UniME and U-MARVEL: rank the pool by the stage-2 model, drop what is more similar than a
threshold (likely an unjudged positive), keep the next `hard`; add `random` ones from the whole pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from elva_core import distributed, files
from elva_core.config import NegativeSettings, RlvrSettings
from elva_core.data import mbeir
from elva_core.data.items import Item, candidate_item, query_item
from elva_core.models.encoder import Encoder
from elva_core.retrieval.retriever import encode


@dataclass(frozen=True, slots=True)
class Ranked:
    """A query of stage 3 with one positive and its N negatives, as one model ranked them.

    positive_cosine, cosines: that model's, of the positive and of the negatives. near: (D,) its embedding of
    the positive. bank: (C, D) its embeddings of the whole pool, shared by the queries; the negatives are its
    `rows`.
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


def choose(
    scores: np.ndarray,
    excluded: set[int],
    positive: float,
    settings: NegativeSettings,
    rng: np.random.Generator,
) -> list[int]:
    """Pool rows of the negatives of one query: hard ones first, then random ones; hard + random of them in all.

    Where fewer than `hard` rows pass the threshold, random ones take their place: rewards need equal counts.

    Args:
        scores: (C,) cosine of every pool row. excluded: rows that are positives.
        positive: cosine of the chosen positive.

    Raises:
        ElvaDataError: the pool has too few rows.
    """
    limit = (
        settings.threshold if settings.margin is None else min(settings.threshold, positive + settings.margin)
    )
    order = np.argsort(-scores, kind="stable")
    order = order[~np.isin(order, list(excluded))]
    hard = order[scores[order] <= limit][: settings.hard]
    rest = order[~np.isin(order, hard)]
    wanted = settings.hard + settings.random
    if len(order) < wanted:
        raise files.ElvaDataError(
            f"{len(order)} candidates for {wanted} negatives of a query; lower stage3.negatives or raise their pool"
        )
    return np.concatenate([hard, rng.permutation(rest)[: wanted - len(hard)]]).tolist()


class Mined(NamedTuple):
    """What mining has chosen for M queries, N negatives each; everything else can be read from the root again.

    queries: (M,) rows of the union train file. positives: (M,), negatives: (M, N) rows of the train pool.
    rows: (M, N) rows of the bank. positive_cosine: (M,), cosines: (M, N). near: (M, D) embeddings of the
    positives. bank: (C, D) embeddings of all candidates that were ranked.
    """

    queries: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    rows: np.ndarray
    positive_cosine: np.ndarray
    cosines: np.ndarray
    near: np.ndarray
    bank: np.ndarray


def select(
    encoder: Encoder,
    root: mbeir.Root,
    settings: RlvrSettings,
    *,
    batch: int,
    seed: int,
    excluded: Sequence[str] = (),
) -> Mined:
    """`settings.queries` train queries, the same number per task, with the negatives that the model chooses; none of the excluded units.

    Negatives have the modality of the positive. The pool may be sampled (`settings.negatives.pool` per
    modality).
    """
    queries, pool = root.union_train(), root.pool("", "train", "global")
    drawn = _equal_draw(queries, root.trained_rows(excluded), settings.queries, seed)
    parts, banks, ranked_before = [], [], 0
    for modality in mbeir.MODALITIES:
        rng = distributed.rng_for(seed, "negatives", modality)
        asked = [(row, q) for row in drawn if mbeir.CANDIDATE_MODALITY[(q := queries[row]).task] == modality]
        if not asked:
            continue
        members = pool.rows_of(modality)
        kept = members[sorted(rng.permutation(len(members))[: settings.negatives.pool or len(members)])]
        positives = [_judged(pool, q.positives[int(rng.integers(len(q.positives)))]) for _, q in asked]
        bank, _ = encode(encoder, [candidate_item(root, pool[row]) for row in kept], batch=batch)
        vectors, _ = encode(encoder, [_asked(root, q, seed) for _, q in asked], batch=batch)
        near, _ = encode(encoder, [candidate_item(root, pool[row]) for row in positives], batch=batch)
        for (row, query), positive, vector, close in zip(asked, positives, vectors, near, strict=True):
            scores = bank @ vector
            same = {pool.row(did) for did in query.positives}
            excluded = set(np.flatnonzero(np.isin(kept, [r for r in same if r is not None])).tolist())
            chosen = choose(scores, excluded, float(vector @ close), settings.negatives, rng)
            places = np.array(chosen)
            parts.append(
                (
                    row,
                    positive,
                    kept[places],
                    places + ranked_before,
                    float(vector @ close),
                    scores[places],
                    close,
                )
            )
        banks.append(bank)
        ranked_before += len(bank)
    order = distributed.rng_for(seed, "stage3 order").permutation(len(parts))
    return Mined(
        *(np.array([parts[i][column] for i in order]) for column in range(len(parts[0]))),
        np.concatenate(banks),
    )


def _asked(root: mbeir.Root, query: mbeir.Query, seed: int) -> Item:
    return query_item(root, query, seed=seed, scope="train/rl")


def assemble(mined: Mined, root: mbeir.Root, seed: int) -> list[Ranked]:
    """The queries with their texts and images, read from the root."""
    queries, pool = root.union_train(), root.pool("", "train", "global")
    out = []
    for i, row in enumerate(mined.queries):
        query, positive = queries[row], pool[mined.positives[i]]
        others = tuple(candidate_item(root, pool[r]) for r in mined.negatives[i])
        cosines = float(mined.positive_cosine[i]), tuple(mined.cosines[i].tolist())
        vectors = mined.near[i], mined.bank, tuple(mined.rows[i].tolist())
        out.append(
            Ranked(
                query,
                _asked(root, query, seed),
                candidate_item(root, positive),
                positive.did,
                others,
                *cosines,
                *vectors,
            )
        )
    return out


def write(mined: Mined, path: Path) -> None:
    """One safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(mined._asdict(), partial)
    partial.replace(path)


def read(path: Path, root: mbeir.Root, seed: int) -> list[Ranked]:
    """What `write` has kept, as queries with their negatives."""
    return assemble(Mined(**load_file(path)), root, seed)


def _judged(pool: mbeir.Pool, did: str) -> int:
    row = pool.row(did)
    if row is None:
        raise files.ElvaDataError(f"{pool.path}: judged candidate {did} is not in the train pool; run lint")
    return row


def _equal_draw(queries: mbeir.Records[mbeir.Query], allowed: np.ndarray, count: int, seed: int) -> list[int]:
    """Allowed rows of the same number of queries per (dataset, task), by stable hash; what a small set lacks is not refilled.

    Rows that up-sampling repeats count once.
    """
    _, firsts = np.unique(queries.ids[allowed], return_index=True)
    groups: dict[tuple, list[int]] = {}
    for row in allowed[firsts].tolist():
        groups.setdefault((int(queries.ids[row]) // mbeir.QUERY_ID_BASE, int(queries.kinds[row])), []).append(
            row
        )
    out = []
    for key in sorted(groups):
        qids = {row: f"{key[0]}:{queries.ids[row] - key[0] * mbeir.QUERY_ID_BASE}" for row in groups[key]}
        out += sorted(groups[key], key=lambda row, qids=qids: mbeir.stable_hash(seed, "stage3", qids[row]))[
            : -(-count // len(groups))
        ]
    return out[:count]
