"""Grain blindness, measured: how far an embedding moves when one grain is taken away, and which grain errors touch.

ELVA Definition 2 and Figure 4: d(f(q), f(q without grain k)) with d = 1 - cosine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from elva_core.data import mbeir
from elva_core.data.items import Item, candidate_item
from elva_core.evaluation import statistics
from elva_core.retrieval.retriever import Searcher, UnitResult


def without(query: mbeir.Query, *dropped: int) -> mbeir.Query:
    """A query with some of its `removable` grains taken out.

    Of a text that is the sequence of its grains the others stay. Of any other text the words of the grains are cut out, with
    the space and the punctuation that would be left over; articles and conjunctions around them stay.
    """
    own = mbeir.grains(query)
    if not dropped:
        return query
    if query.text == mbeir.caption(query):
        return replace(
            query, text=mbeir.normalise(" ".join(text for i, (_, text) in enumerate(own) if i not in dropped))
        )
    rest = query.text or ""
    for start, end in sorted((_spans(rest, own[i][1])[0] for i in dropped), reverse=True):
        rest = f"{rest[:start]} {rest[end:]}"
    rest = re.sub(r"\s+([,;:.!?])", r"\1", " ".join(rest.split()))
    rest = re.sub(r"[,;:]+(?=[,;:.!?])", "", rest).lstrip(
        ",;:.!? "
    )  # of two marks side by side the later one stays
    return replace(query, text=mbeir.normalise(rest))


def ablatable(queries: Sequence[mbeir.Query]) -> list[mbeir.Query]:
    """Multi-grain text queries of which every grain can be taken away alone (`removable`)."""
    return [q for q in queries if q.modality == "text" and len(removable(q)) == len(mbeir.grains(q)) >= 2]


def removable(query: mbeir.Query) -> list[int]:
    """Which grains the text lets go alone: none of what only the picture shows.

    The text is the sequence of its grains, or holds the grain exactly once, as whole words, apart from every other one.
    """
    own = mbeir.grains(query)
    if query.text == mbeir.caption(query):
        return list(range(len(own)))
    spans = [_spans(query.text or "", text) for _, text in own]
    others = [[span for j, found in enumerate(spans) if j != i for span in found] for i in range(len(own))]
    return [
        i
        for i, found in enumerate(spans)
        if len(found) == 1 and not any(start < found[0][1] and found[0][0] < end for start, end in others[i])
    ]


def _spans(text: str, grain: str) -> list[tuple[int, int]]:
    """Where a grain stands in a text, in any case, as whole words."""
    return [m.span() for m in re.finditer(rf"(?<!\w){re.escape(grain)}(?!\w)", text, re.IGNORECASE)]


def distances(searcher: Searcher, queries: Sequence[mbeir.Query], unit: str) -> pd.DataFrame:
    """Cosine distance between each query and the query with one grain removed.

    Returns:
        one row per query and grain: qid, kind, distance (0 = the grain is not in the embedding).
    """
    rows = [(q, i, kind) for q in queries for i, (kind, _) in enumerate(mbeir.grains(q))]
    full = _embedded(searcher, [searcher.query(q, unit) for q, _, _ in rows])
    less = _embedded(searcher, [searcher.query(without(q, i), unit) for q, i, _ in rows])
    return pd.DataFrame(
        {
            "qid": [q.qid for q, _, _ in rows],
            "kind": [k for *_, k in rows],
            "distance": 1 - (full * less).sum(1),
        }
    )


def mean_distance(distances: pd.DataFrame, samples: int) -> pd.DataFrame:
    """Grain blindness of each model (Figure 4): the mean over queries of the mean distance over a query's grains.

    Args:
        distances: `distances` of several models, with a column model. samples: of the bootstrap over queries.

    Returns:
        columns model, value, ci_low, ci_high (95 % interval), n queries.
    """
    queries = distances.groupby(["qid", "model"], as_index=False)["distance"].mean()
    queries = queries.rename(columns={"distance": "value"})
    return statistics.scores(queries, ["model"], samples, (0, "grain distance"))


def _embedded(searcher: Searcher, items: Sequence[Item]) -> np.ndarray:
    """(N, D) float32, also of embeddings that are kept on disk."""
    return np.asarray(searcher.vectors(items)[:], np.float32)


def errors(result: UnitResult) -> pd.DataFrame:
    """For every query: is the top-1 answer right, and if not, which grains of the wanted one it lacks.

    Returns:
        one row per query and grain kind: unit, qid, kind, missed (the top-1 candidate is not a positive), wrong (it is not,
        and lacks a grain of that kind). No row where the top-1 candidate carries no grains: nothing is known about it.
    """
    rows = []
    for query, ranks, top in zip(result.queries, result.ranks, result.top, strict=True):
        wanted, found = mbeir.grains(query), set(mbeir.grains(result.candidates[top[0]]))
        hit = bool(ranks) and ranks[0] == 1
        lacking = {kind for kind, text in wanted if (kind, text) not in found}
        rows += [
            {
                "unit": result.unit,
                "qid": query.qid,
                "kind": k,
                "missed": not hit,
                "wrong": not hit and k in lacking,
            }
            for k in dict(wanted)
            if found
        ]
    return pd.DataFrame(rows, columns=["unit", "qid", "kind", "missed", "wrong"]).astype(
        {"missed": bool, "wrong": bool}
    )


def neighbourhood(searcher: Searcher, result: UnitResult, index: int, size: int, seed: int) -> pd.DataFrame:
    """t-SNE of one query, its positive and its nearest candidates.

    Returns:
        columns x, y, role (query, positive, shares all but one grain, other), label.
    """
    from sklearn.manifold import TSNE

    query = result.queries[index]
    item = searcher.query(query, result.unit)
    pool = _embedded(searcher, [candidate_item(searcher.root, c) for c in result.candidates])
    vector = _embedded(searcher, [item])
    positives = {i for i, c in enumerate(result.candidates) if c.did in query.positives}
    order = [int(i) for i in np.argsort(-(pool @ vector[0]), kind="stable")]
    chosen = sorted(positives | set(order[:size]))
    wanted = set(mbeir.grains(query))
    points = TSNE(
        n_components=2,
        perplexity=min(15, len(chosen) // 3),
        random_state=seed % 2**32,
        metric="cosine",
        init="random",
    ).fit_transform(np.concatenate([vector, pool[chosen]]))
    roles = ["query"]
    for i in chosen:
        grains = set(mbeir.grains(result.candidates[i]))
        shared = len(wanted & grains)
        roles.append(
            "positive"
            if i in positives
            else "one grain differs"
            if shared == len(wanted) - 1 and len(grains) == len(wanted)
            else "other"
        )
    labels = [query.text or "query"] + [mbeir.caption(result.candidates[i]) for i in chosen]
    return pd.DataFrame({"x": points[:, 0], "y": points[:, 1], "role": roles, "label": labels})
