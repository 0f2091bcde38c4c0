"""Grain blindness: how far an embedding moves without one grain, and which kinds of grain errors touch.

ELVA Definition 2 and Figure 4: d(f(q), f(q without grain k)) with d = 1 - cosine.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from elva_core.data import mbeir
from elva_core.data.items import Item, candidate_item
from elva_core.evaluation import statistics
from elva_core.retrieval.retriever import Searcher, UnitResult
from elva_core.tables import direction, number


def without(query: mbeir.Query, *dropped: int) -> mbeir.Query:
    """A query with some of its `removable` grains taken out.

    Of a text that is the sequence of its grains the others stay. Of any other text the words of the grains
    are cut out, with the space and the punctuation that would be left over; articles and conjunctions around
    them stay.
    """
    grains = [text for _, text in mbeir.grains(query)]
    if not dropped:
        return query
    if query.text == mbeir.caption(query):
        text = " ".join(grain for i, grain in enumerate(grains) if i not in dropped)
        return replace(query, text=mbeir.normalise(text))
    text = query.text or ""
    for start, end in sorted((spans(text, grains[i])[0] for i in dropped), reverse=True):
        text = f"{text[:start]} {text[end:]}"
    text = re.sub(r"\s+([,;:.!?])", r"\1", " ".join(text.split()))
    text = re.sub(r"[,;:]+(?=[,;:.!?])", "", text)  # of two marks side by side the later one stays
    return replace(query, text=mbeir.normalise(text.lstrip(",;:.!? ")))


def ablatable(queries: Sequence[mbeir.Query]) -> list[mbeir.Query]:
    """Multi-grain text queries of which every grain can be taken away alone (`removable`)."""
    return [q for q in queries if q.modality == "text" and len(removable(q)) == len(mbeir.grains(q)) >= 2]


def removable(query: mbeir.Query) -> list[int]:
    """Grains that can be removed from the text alone: none that only the picture shows.

    The text is the sequence of its grains, or holds the grain exactly once, as whole words, apart from every
    other one.
    """
    grains = mbeir.grains(query)
    if query.text == mbeir.caption(query):
        return list(range(len(grains)))
    places = [(i, *span) for i, (_, grain) in enumerate(grains) for span in spans(query.text or "", grain)]
    once = [place for place in places if sum(i == place[0] for i, *_ in places) == 1]
    return [i for i, a, b in once if not any(j != i and start < b and a < end for j, start, end in places)]


def spans(text: str, grain: str) -> list[tuple[int, int]]:
    """Places of a grain in a text, in any case, as whole words."""
    return [m.span() for m in re.finditer(rf"(?<!\w){re.escape(grain)}(?!\w)", text, re.IGNORECASE)]


def distances(searcher: Searcher, queries: Sequence[mbeir.Query], unit: str) -> pd.DataFrame:
    """Cosine distance between each query and the query with one grain removed.

    Returns:
        one row per query and grain: qid, kind, distance (0 = the grain is not in the embedding).
    """
    rows = [(q, i, kind) for q in queries for i, (kind, _) in enumerate(mbeir.grains(q))]
    full = _embedded(searcher, [searcher.query(q, unit) for q, _, _ in rows])
    less = _embedded(searcher, [searcher.query(without(q, i), unit) for q, i, _ in rows])
    names = {"qid": [q.qid for q, *_ in rows], "kind": [kind for *_, kind in rows]}
    return pd.DataFrame(names | {"distance": 1 - (full * less).sum(1)})


def mean_distance(
    distances: pd.DataFrame, samples: int, pairs: Sequence[tuple[str, str]] = (("stage 3", "stage 2"),)
) -> pd.DataFrame:
    """Grain blindness of each model (Figure 4): mean over queries of the mean distance over a query's grains.

    Args:
        distances: `distances` of several models, with a column model; those of several seeds are averaged.
        samples: of the bootstrap over queries. pairs: (model, baseline) whose paired difference is taken.

    Returns:
        columns model, baseline, metric, value, ci_low, ci_high (95 % interval), n queries: a row for each
        model, and for each of the pairs that is there.
    """
    queries = distances.groupby(["qid", "model"], as_index=False)["distance"].mean()
    queries = queries.rename(columns={"distance": "value"})
    scope = 0, "grain distance"
    table = statistics.scores(queries, ["model"], samples, scope).assign(baseline="")
    parts = [table]
    for new, old in pairs:
        if {new, old} <= set(table["model"]):
            growth = statistics.paired(queries, ["qid"], new, old).assign(model=f"{new} over {old}")
            row = statistics.scores(growth, ["model"], samples, scope)
            parts.append(row.assign(model=new, baseline=old))
    return pd.concat(parts, ignore_index=True).assign(metric="mean cosine distance")


def blindness(distance: pd.DataFrame) -> str:
    """In words: how far embeddings move without a grain, and whether that grows from one model to another.

    Args:
        distance: `mean_distance`.
    """
    models, growth = distance[distance["baseline"] == ""], distance[distance["baseline"] != ""]
    said = [
        f"{row.model} {number(row.value, row.ci_low, row.ci_high, '', digits=3)}"
        for row in models.itertuples()
    ]
    grown = [
        f"; from {row['baseline']} to {row['model']} it {_changed(row, 1, 3)}" for _, row in growth.iterrows()
    ]
    return (
        f"The mean grain distance, 0 for a model that is blind, is {', '.join(said)}{''.join(grown)} "
        f"(n = {distance['n'].min():,} queries)."
    )


def _changed(row: pd.Series, scale: float, digits: int) -> str:
    """A difference in words, with what its interval says."""
    value, low, high = (round(scale * row[name], digits) for name in ("value", "ci_low", "ci_high"))
    clear = direction(low, high, ("grows", "shrinks"), "has no clear change")
    return f"{clear}, {number(value, low, high, '', sign=True, digits=digits)}"


def _embedded(searcher: Searcher, items: Sequence[Item]) -> np.ndarray:
    """(N, D) float32, also of embeddings that are kept on disk."""
    return np.asarray(searcher.vectors(items)[:], np.float32)


def errors(result: UnitResult) -> pd.DataFrame:
    """For every query: is the top-1 answer right, and if not, which grains of the wanted one it lacks.

    Returns:
        one row per query and grain kind: unit, qid, kind, missed (the top-1 candidate is not a positive),
        wrong (it is not, and lacks a grain of that kind). No row where the top-1 candidate carries no grains:
        nothing is known about it.
    """
    rows = []
    for query, ranks, top in zip(result.queries, result.ranks, result.top, strict=True):
        grains, shown = mbeir.grains(query), set(mbeir.grains(result.candidates[top[0]]))
        missed = not ranks or ranks[0] != 1
        lacking = {kind for kind, text in grains if (kind, text) not in shown}
        kinds = dict(grains) if shown else ()
        rows += [(result.unit, query.qid, kind, missed, missed and kind in lacking) for kind in kinds]
    table = pd.DataFrame(rows, columns=["unit", "qid", "kind", "missed", "wrong"])
    return table.astype({"missed": bool, "wrong": bool})


def twins(searcher: Searcher, bench: mbeir.Root) -> pd.DataFrame:
    """Where the candidates stand that differ from a query's grains in exactly one: a model that is blind to
    that grain cannot tell them from the positive.

    Returns:
        one row per query of the benchmark and kind of grain that has such twins in the local pool: unit, qid,
        kind, twins (how many), first (rank of the best one), value (share of them ahead of the first
        positive).
    """
    rows = []
    for unit in bench.units(searcher.split):
        read, near = searcher.embedded(unit, root=bench), defaultdict(list)
        for row, candidate in enumerate(read.candidates):
            for key, text in mbeir.masked(mbeir.grains(candidate)):
                near[key].append((row, text))
        places, kinds, relevant = [], [], []
        for place, query in enumerate(read.queries):
            for key, text in mbeir.masked(mbeir.grains(query)):
                if others := [row for row, other in near[key] if other != text]:
                    places.append(place), kinds.append(key[0]), relevant.append(others)
        if not places:
            continue
        positives = searcher.rank(read).ranks
        again = read._replace(relevant=relevant, query_vectors=np.asarray(read.query_vectors[:])[places])
        for place, kind, ranks in zip(places, kinds, searcher.rank(again).ranks, strict=True):
            ahead = np.mean([rank < positives[place][0] for rank in ranks])
            rows.append((unit, read.queries[place].qid, kind, len(ranks), ranks[0], ahead))
    return pd.DataFrame(rows, columns=["unit", "qid", "kind", "twins", "first", "value"])


def twins_ahead(twins: pd.DataFrame, samples: int) -> pd.DataFrame:
    """Share of one-grain twins that stand ahead of a positive, by kind of the grain, and for all kinds.

    Args:
        twins: `twins` of stage 2 and stage 3, with a column model. samples: of the bootstrap over queries.

    Returns:
        group, new, old, metric, value (the paired difference), ci_low, ci_high, n queries, new value, old
        value; shares.
    """
    by = ["unit", "qid"]
    levels = [twins.assign(kind="any grain"), twins]
    means = [t.groupby([*by, "model", "kind"], sort=False, as_index=False)["value"].mean() for t in levels]
    names = {"new": "stage 3", "old": "stage 2", "metric": "twins ahead of the positive"}
    pairs = [
        statistics.paired(part, by, names["new"], names["old"]).assign(group=kind, **names)
        for kind, part in pd.concat(means).groupby("kind", sort=False)
    ]
    scope, both = (0, "one-grain twins"), ("new value", "old value")
    return statistics.scores(pd.concat(pairs), ["group", *names], samples, scope, means=both)


def what_grows(distance: pd.DataFrame, twins: pd.DataFrame) -> str:
    """In words: whether the grain distance grows from stage 2 to stage 3, and what the one-grain twins do.

    Args:
        distance: `mean_distance`. twins: `twins_ahead`.
    """
    growth = distance[distance["baseline"] == "stage 2"].iloc[0]
    twins = twins.set_index("group")
    every, kinds = twins.loc["any grain"], twins.drop("any grain")
    clear = kinds[(kinds["ci_low"] > 0) | (kinds["ci_high"] < 0)]
    listed = [f"{kind} {_changed(row, 100, 1)}" for kind, row in clear.iterrows()]
    before = f"{100 * every['old value']:.1f} % under stage 2"
    return (
        f"From stage 2 to stage 3 the grain distance {_changed(growth, 1, 3)} (n = {growth['n']:,} queries). "
        f"The share of one-grain twins ahead of the positive, {before}, {_changed(every, 100, 1)} points "
        f"(n = {every['n']:,} queries); by the grain that differs: {'; '.join(listed) or 'no clear change'}."
    )


def median_gain(old: UnitResult, new: UnitResult, fewest: int, within: int) -> int:
    """Place of the query to show: of those with at least `fewest` grains whose rank of the positive differs
    between two models, the one with the median ratio of ranks; the first with so many where none differs.
    Queries whose positive is among the first `within` under both come before others: it is on the map then.

    Raises:
        ValueError: no query has so many grains.
    """
    chosen = [i for i, q in enumerate(old.queries) if len(mbeir.grains(q)) >= fewest]
    if not chosen:
        raise ValueError(f"{old.unit}: no query has {fewest} grains; ask for fewer")
    near = [i for i in chosen if max(old.ranks[i][0], new.ranks[i][0]) <= within]
    chosen = near or chosen
    moved = [i for i in chosen if old.ranks[i][0] != new.ranks[i][0]]
    ordered = sorted(moved, key=lambda i: old.ranks[i][0] / new.ranks[i][0])
    return ordered[(len(ordered) - 1) // 2] if ordered else chosen[0]


def neighbourhood(searcher: Searcher, result: UnitResult, index: int, size: int, seed: int) -> pd.DataFrame:
    """t-SNE of one query, its positive and its nearest candidates.

    Returns:
        columns x, y, role (query, positive, one grain differs, other), label.
    """
    from sklearn.manifold import TSNE

    query = result.queries[index]
    item = searcher.query(query, result.unit)
    pool = _embedded(searcher, [candidate_item(searcher.root, c) for c in result.candidates])
    vector = _embedded(searcher, [item])
    positives = {i for i, c in enumerate(result.candidates) if c.did in query.positives}
    order = [int(i) for i in np.argsort(-(pool @ vector[0]), kind="stable")]
    chosen = sorted(positives | set(order[:size]))
    settings = {"metric": "cosine", "init": "random", "random_state": seed % 2**32}
    tsne = TSNE(n_components=2, perplexity=min(15, len(chosen) // 3), **settings)
    points = tsne.fit_transform(np.concatenate([vector, pool[chosen]]))
    of_query, roles = set(mbeir.grains(query)), ["query"]
    for i in chosen:
        grains = set(mbeir.grains(result.candidates[i]))
        close = len(of_query & grains) == len(of_query) - 1 and len(grains) == len(of_query)
        roles.append("positive" if i in positives else "one grain differs" if close else "other")
    labels = [query.text or "query"] + [mbeir.caption(result.candidates[i]) for i in chosen]
    return pd.DataFrame({"x": points[:, 0], "y": points[:, 1], "role": roles, "label": labels})
