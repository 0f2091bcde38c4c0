"""Grain blindness, measured: how far an embedding moves when one grain is taken away, and which grain errors touch.

ELVA Definition 2 and Figure 4: d(f(q), f(q without grain k)) with d = 1 - cosine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd

from elva_core import mbeir
from elva_core.encoder import Item, candidate_item
from elva_core.retrieval import Searcher, UnitResult


def without(query: mbeir.Query, dropped: int) -> mbeir.Query:
    """A query of `ablatable` with one grain taken out.

    Of a text that is the sequence of its grains the others stay. Of any other text the words of the grain are cut out, with
    the space and the punctuation that would be left over; articles and conjunctions around them stay.
    """
    own = mbeir.grains(query)
    if query.text == mbeir.caption(query):
        return replace(query, text=mbeir.normalise(" ".join(text for i, (_, text) in enumerate(own) if i != dropped)))
    start, end = _span(query.text or "", own[dropped][1])
    rest = f"{query.text[:start]} {query.text[end:]}"
    rest = re.sub(r"\s+([,;:.!?])", r"\1", " ".join(rest.split()))
    rest = re.sub(r"[,;:]+(?=[,;:.!?])", "", rest).lstrip(",;:.!? ")  # of two marks side by side the later one stays
    return replace(query, text=mbeir.normalise(rest))


def ablatable(queries: Sequence[mbeir.Query]) -> list[mbeir.Query]:
    """Multi-grain text queries of which every grain can be taken away alone.

    The text is the sequence of its grains, or holds each of them exactly once, as whole words, none inside another.
    """
    return [q for q in queries if q.modality == "text" and len(mbeir.grains(q)) >= 2 and (q.text == mbeir.caption(q) or _apart(q))]


def _apart(query: mbeir.Query) -> bool:
    spans = [_span(query.text or "", text) for _, text in mbeir.grains(query)]
    return None not in spans and all(end <= start for (_, end), (start, _) in pairwise(sorted(spans)))


def _span(text: str, grain: str) -> tuple[int, int] | None:
    """Where a grain stands in a text, in any case; None unless it stands there once, as whole words."""
    found = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(grain)}(?!\w)", text, re.IGNORECASE)]
    return found[0] if len(found) == 1 else None


def distances(searcher: Searcher, queries: Sequence[mbeir.Query], unit: str) -> pd.DataFrame:
    """Cosine distance between each query and the query with one grain removed.

    Returns:
        one row per query and grain: qid, kind, distance (0 = the grain is not in the embedding).
    """
    rows = [(q, i, kind) for q in queries for i, (kind, _) in enumerate(mbeir.grains(q))]
    full = _embedded(searcher, [searcher.query(q, unit) for q, _, _ in rows])
    less = _embedded(searcher, [searcher.query(without(q, i), unit) for q, i, _ in rows])
    return pd.DataFrame({"qid": [q.qid for q, _, _ in rows], "kind": [k for *_, k in rows], "distance": 1 - (full * less).sum(1)})


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
            {"unit": result.unit, "qid": query.qid, "kind": k, "missed": not hit, "wrong": not hit and k in lacking}
            for k in dict(wanted)
            if found
        ]
    return pd.DataFrame(rows, columns=["unit", "qid", "kind", "missed", "wrong"]).astype({"missed": bool, "wrong": bool})


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
        n_components=2, perplexity=min(15, len(chosen) // 3), random_state=seed % 2**32, metric="cosine", init="random"
    ).fit_transform(np.concatenate([vector, pool[chosen]]))
    roles = ["query"]
    for i in chosen:
        grains = set(mbeir.grains(result.candidates[i]))
        shared = len(wanted & grains)
        roles.append(
            "positive" if i in positives else "one grain differs" if shared == len(wanted) - 1 and len(grains) == len(wanted) else "other"
        )
    labels = [query.text or "query"] + [mbeir.caption(result.candidates[i]) for i in chosen]
    return pd.DataFrame({"x": points[:, 0], "y": points[:, 1], "role": roles, "label": labels})
