"""Grain blindness, measured: how far an embedding moves when one grain is taken away, and which grain errors touch.

ELVA Definition 2 and Figure 4: d(f(q), f(q without grain k)) with d = 1 - cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from elva_core import mbeir
from elva_core.retrieval import Searcher, UnitResult


def without(query: mbeir.Query, dropped: int) -> mbeir.Query:
    """The text query with one grain taken out. Exact, since its text is the sequence of its grains."""
    kept = [text for i, (_, text) in enumerate(mbeir.grains(query)) if i != dropped]
    return replace(query, text=mbeir.normalise(" ".join(kept)))


def ablatable(queries: Sequence[mbeir.Query]) -> list[mbeir.Query]:
    """Multi-grain queries whose text is exactly their grains, so that taking one away is exact."""
    return [q for q in queries if q.modality == "text" and len(mbeir.grains(q)) >= 2 and q.text == mbeir.caption(q)]


def distances(searcher: Searcher, queries: Sequence[mbeir.Query], unit: str) -> pd.DataFrame:
    """Cosine distance between each query and the query with one grain removed.

    Returns:
        one row per query and grain: qid, kind, distance (0 = the grain is not in the embedding).
    """
    rows = [(q, i, kind) for q in queries for i, (kind, _) in enumerate(mbeir.grains(q))]
    full = searcher.vectors([searcher.query(q, unit) for q, _, _ in rows])
    less = searcher.vectors([searcher.query(without(q, i), unit) for q, i, _ in rows])
    return pd.DataFrame({"qid": [q.qid for q, _, _ in rows], "kind": [k for *_, k in rows], "distance": 1 - (full * less).sum(1)})


def errors(result: UnitResult) -> pd.DataFrame:
    """For every query: is the top-1 answer right, and if not, which grains of the wanted one it lacks.

    Returns:
        one row per query and grain kind: unit, qid, kind, missed (the top-1 candidate is not a positive), wrong (it is not,
        and differs in that grain).
    """
    rows = []
    for query, ranks, top in zip(result.queries, result.ranks, result.top, strict=True):
        wanted = dict(mbeir.grains(query))
        found = dict(mbeir.grains(result.candidates[top[0]]))
        hit = bool(ranks) and ranks[0] == 1
        rows += [
            {"unit": result.unit, "qid": query.qid, "kind": k, "missed": not hit, "wrong": not hit and found.get(k) != v}
            for k, v in wanted.items()
        ]
    return pd.DataFrame(rows)


def neighbourhood(searcher: Searcher, result: UnitResult, index: int, size: int, seed: int) -> pd.DataFrame:
    """t-SNE of one query, its positive and its nearest candidates.

    Returns:
        columns x, y, role (query, positive, shares all but one grain, other), label.
    """
    from sklearn.manifold import TSNE

    from elva_core.encoder import candidate_item

    query = result.queries[index]
    item = searcher.query(query, result.unit)
    pool = searcher.vectors([candidate_item(searcher.root, c) for c in result.candidates])
    vector = searcher.vectors([item])
    positives = {i for i, c in enumerate(result.candidates) if c.did in query.positives}
    order = [int(i) for i in np.argsort(-(pool @ vector[0]), kind="stable")]
    chosen = sorted(positives | set(order[:size]))
    wanted = dict(mbeir.grains(query))
    points = TSNE(
        n_components=2, perplexity=min(15, len(chosen) // 3), random_state=seed % 2**32, metric="cosine", init="random"
    ).fit_transform(np.concatenate([vector, pool[chosen]]))
    roles = ["query"]
    for i in chosen:
        grains = dict(mbeir.grains(result.candidates[i]))
        shared = sum(grains.get(k) == v for k, v in wanted.items())
        roles.append(
            "positive" if i in positives else "one grain differs" if shared == len(wanted) - 1 and len(grains) == len(wanted) else "other"
        )
    labels = [query.text or "query"] + [mbeir.caption(result.candidates[i]) for i in chosen]
    return pd.DataFrame({"x": points[:, 0], "y": points[:, 1], "role": roles, "label": labels})
