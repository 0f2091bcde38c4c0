"""Balanced negatives of stage 3: filtered hard ones from the model's own ranking, and random ones.

ELVA section 3 after UniME and U-MARVEL: rank the pool by the stage-2 model, drop what is more similar than a
threshold (likely an unjudged positive), keep the next `hard`; add `random` ones from the whole pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from elva_core import distributed, files
from elva_core.data import mbeir
from elva_core.data.items import Item, candidate_item, query_item
from elva_core.models.encoder import Encoder
from elva_core.retrieval.retriever import encode
from elva_core.training_settings import NegativeSettings, RlvrSettings


@dataclass(frozen=True, slots=True)
class TrainingQuery:
    """A query of stage 3 with one positive and its N negatives, as one model ranked them.

    positive_cosine, cosines: that model's, of the positive and of the negatives. near: (D,) its embedding of
    the positive. bank: (C, D) its embeddings of the whole pool, shared by the queries; the negatives are its
    `rows`. asking: (D,) its embedding of the query. grains: texts of the grains of the query, the positive
    and each negative.
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
    asking: np.ndarray
    grains: tuple[frozenset[str], ...] = ()

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
    """Pool rows of one query's negatives: the hard ones first, then the random ones; hard + random in all.

    Where fewer than `hard` rows pass the threshold, random ones take their place: rewards need equal counts.

    Args:
        scores: (C,) cosine of every pool row. excluded: rows that are positives.
        positive: cosine of the chosen positive.

    Raises:
        ElvaDataError: the pool has too few rows.
    """
    limit, count = _limit(positive, settings), settings.hard + settings.random
    order = np.argsort(-scores, kind="stable")
    order = order[~np.isin(order, list(excluded))]
    hard = order[scores[order] <= limit][: settings.hard]
    rest = order[~np.isin(order, hard)]
    if len(order) < count:
        advice = "lower stage3.negatives or raise their pool (rollout_sides: both, stage3.queries)"
        raise files.ElvaDataError(f"{len(order)} candidates for {count} negatives of a query; {advice}")
    return np.concatenate([hard, rng.permutation(rest)[: count - len(hard)]]).tolist()


def hardness(
    scores: np.ndarray, excluded: set[int], positive: float, settings: NegativeSettings
) -> tuple[int, float]:
    """Difficulty of queries, by which they are ordered, the easiest first.

    Returns:
        rank of the positive among the candidates that may be its negatives, from 1, a tie counts against it;
        cosine of the first of them minus the positive's.
    """
    rivals = np.delete(scores, list(excluded))
    rivals = rivals[rivals <= _limit(positive, settings)]
    return 1 + int((rivals >= positive).sum()), float(rivals.max(initial=-1.0)) - positive


def _limit(positive: float, settings: NegativeSettings) -> float:
    """Cosine above which a candidate is taken for a positive that nobody has judged."""
    margin = float("inf") if settings.margin is None else settings.margin
    return min(settings.threshold, positive + margin)


class Mined(NamedTuple):
    """Mined negatives of M queries, N each, as rows and vectors; texts and images stay in the root.

    queries: (M,) rows of the union train file. positives: (M,), negatives: (M, N) rows of the train pool.
    rows: (M, N) rows of the bank. positive_cosine: (M,), cosines: (M, N). near: (M, D) embeddings of the
    positives, asking: (M, D) of the queries. bank: (C, D) embeddings of all candidates that were ranked.
    """

    queries: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    rows: np.ndarray
    positive_cosine: np.ndarray
    cosines: np.ndarray
    near: np.ndarray
    asking: np.ndarray
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
    """`settings.queries` train queries, the same number per task, with the negatives that the model chooses.

    Negatives have the modality of the positive. The pool may be sampled (`settings.negatives.pool` per
    modality). With `settings.negatives.difficulty` more queries are mined, and of each task those kept that
    are as hard for this model as it says.

    Args:
        batch: items per forward. excluded: units, or patterns of units, whose queries are left out.

    Raises:
        ElvaDataError: a judged candidate is not in the train pool, or the pool is too small.
    """
    queries, pool = root.union_train(), root.pool("", "train", "global")
    drawn = _equal_draw(queries, root.trained_rows(excluded), settings.mined_queries, seed)
    chosen, banks, bank_start, hard = [], [], 0, {}
    for modality in mbeir.MODALITIES:
        rng = distributed.rng_for(seed, "negatives", modality)
        rows = [row for row in drawn if mbeir.MODALITIES_OF[queries[row].task][1] == modality]
        if not rows:
            continue

        # the candidates that are ranked, and one positive of each query
        members, asking = pool.rows_of(modality), [queries[row] for row in rows]
        members = members[sorted(rng.permutation(len(members))[: settings.negatives.pool or len(members)])]
        positives = [pool.judged(q.positives[int(rng.integers(len(q.positives)))], q.qid) for q in asking]
        side = {"batch": batch, "template": encoder.settings.pool_template}
        bank, _ = encode(encoder, [candidate_item(root, pool[row]) for row in members], **side)
        vectors, _ = encode(encoder, [_train_item(root, q, seed) for q in asking], batch=batch)
        near, _ = encode(encoder, [candidate_item(root, pool[row]) for row in positives], **side)

        for row, query, positive, vector, close in zip(rows, asking, positives, vectors, near, strict=True):
            scores, cosine = bank @ vector, float(vector @ close)
            judged = [pool_row for did in query.positives if (pool_row := pool.row(did)) is not None]
            judged_places = set(np.flatnonzero(np.isin(members, judged)).tolist())
            places = np.array(choose(scores, judged_places, cosine, settings.negatives, rng))
            negatives = members[places], places + bank_start
            chosen.append((row, positive, *negatives, cosine, scores[places], close, vector))
            hard[row] = hardness(scores, judged_places, cosine, settings.negatives)
        banks.append(bank)
        bank_start += len(bank)

    if settings.negatives.difficulty:
        kept = _share_of(hard, queries, settings.negatives.difficulty)
        chosen = [columns for columns in chosen if columns[0] in kept]
    order = distributed.rng_for(seed, "stage3 order").permutation(len(chosen))
    columns = zip(*(chosen[i] for i in order), strict=True)
    return Mined(*map(np.array, columns), np.concatenate(banks))


def _train_item(root: mbeir.Root, query: mbeir.Query, seed: int) -> Item:
    """The query with the instruction that stage 3 shows it with."""
    return query_item(root, query, seed=seed, scope="train/rl")


def assemble(mined: Mined, root: mbeir.Root, seed: int) -> list[TrainingQuery]:
    """The queries with their texts and images, read from the root."""
    queries, pool = root.union_train(), root.pool("", "train", "global")
    # of many negatives few are distinct
    distinct = {int(row): pool[row] for row in np.unique([*mined.positives, *mined.negatives.flat])}
    items = {row: candidate_item(root, candidate) for row, candidate in distinct.items()}
    texts = {row: _grains(candidate) for row, candidate in distinct.items()}
    ranked = []
    for i, row in enumerate(mined.queries):
        query, positive, others = queries[row], int(mined.positives[i]), mined.negatives[i].tolist()
        pair = _train_item(root, query, seed), items[positive]
        negatives = tuple(items[other] for other in others)
        cosines = float(mined.positive_cosine[i]), tuple(mined.cosines[i].tolist())
        vectors = mined.near[i], mined.bank, tuple(mined.rows[i].tolist()), mined.asking[i]
        grains = _grains(query), *(texts[r] for r in (positive, *others))
        did = distinct[positive].did
        ranked.append(TrainingQuery(query, *pair, did, negatives, *cosines, *vectors, grains))
    return ranked


def _grains(record: mbeir.Query | mbeir.Candidate) -> frozenset[str]:
    return frozenset(text for _, text in mbeir.grains(record))


def exchanged(ranked: Sequence[TrainingQuery], settings: NegativeSettings, seed: int) -> list[TrainingQuery]:
    """The same pairs with query and candidate in each other's place: the positive asks for its query.

    Its negatives are other queries that ask for its modality, chosen by the rules of `choose`: those that it
    is a hard negative of, and random ones; none that it is judged relevant for. Ours: the paper says neither
    how a candidate's summary is rewarded nor against what.

    Raises:
        ElvaDataError: a modality has too few queries.
    """
    rng, pairs = distributed.rng_for(seed, "exchanged"), list(ranked)
    for modality in mbeir.MODALITIES:
        places = [i for i, r in enumerate(ranked) if mbeir.MODALITIES_OF[r.query.task][1] == modality]
        askers = [ranked[i] for i in places]
        bank = np.stack([r.asking for r in askers]) if askers else np.empty(0)
        relevant: dict[str, set[int]] = {}
        for row, asker in enumerate(askers):
            for did in asker.query.positives:
                relevant.setdefault(did, set()).add(row)
        for place, r in zip(places, askers, strict=True):
            scores = bank @ r.near
            rows = choose(scores, relevant[r.positive_did], r.positive_cosine, settings, rng)
            pairs[place] = replace(
                r,
                item=r.positive,
                positive=r.item,
                positive_did=r.query.qid,
                negatives=tuple(askers[row].item for row in rows),
                cosines=tuple(scores[rows].tolist()),
                near=r.asking,
                bank=bank,
                rows=tuple(rows),
                asking=r.near,
                grains=(),
            )
    return pairs


def write(mined: Mined, path: Path) -> None:
    """One safetensors file, whole or not at all."""
    with files.whole(path) as partial:
        save_file(mined._asdict(), partial)


def read(path: Path, root: mbeir.Root, seed: int) -> list[TrainingQuery]:
    """The queries with the negatives that `write` has put into `path`."""
    return assemble(Mined(**load_file(path)), root, seed)


def _share_of(
    hardness: dict[int, tuple[int, float]],
    queries: mbeir.Records[mbeir.Query],
    difficulty: tuple[float, float],
) -> set[int]:
    """Rows whose place by hardness among those of their (dataset, task) lies between two shares."""
    kept = set()
    for members in _groups(list(hardness), queries).values():
        low, high = (round(share * len(members)) for share in difficulty)
        kept.update(sorted(members, key=lambda row: (*hardness[row], row))[low:high])
    return kept


def _groups(rows: list[int], queries: mbeir.Records[mbeir.Query]) -> dict[tuple[int, int], list[int]]:
    """Rows by (dataset, task)."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        groups.setdefault((int(queries.ids[row]) // mbeir.QUERY_ID_BASE, int(queries.kinds[row])), []).append(
            row
        )
    return groups


def _equal_draw(queries: mbeir.Records[mbeir.Query], allowed: np.ndarray, count: int, seed: int) -> list[int]:
    """Allowed rows, as many queries of every (dataset, task), by stable hash; a row of up-sampling once.

    A set that has too few is not made up for by the others.
    """
    base = mbeir.QUERY_ID_BASE
    _, firsts = np.unique(queries.ids[allowed], return_index=True)
    groups = _groups(allowed[firsts].tolist(), queries)
    rows, per_group = [], -(-count // len(groups))
    for (dataset, _), members in sorted(groups.items()):
        qids = {row: f"{dataset}:{queries.ids[row] - dataset * base}" for row in members}
        hashes = {row: mbeir.stable_hash(seed, "stage3", qids[row]) for row in members}
        rows += sorted(members, key=hashes.get)[:per_group]
    return rows[:count]
