"""One model measured on the units of a root and on MRBench: tables, hits per query, retrieved candidates.

measured = measure("stage 2", encoder, root, bench, settings.evaluation, seed=17)
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from elva_core import distributed, files
from elva_core.config import EvaluationSettings
from elva_core.data import mbeir, sources
from elva_core.data.items import Item
from elva_core.evaluation import statistics
from elva_core.models.encoder import Encoder
from elva_core.retrieval import cache, metrics, retriever
from elva_core.retrieval.cache import Store
from elva_core.retrieval.retriever import Embedded, Searcher, UnitResult
from elva_core.tables import markdown_table

Vectors = Callable[[Iterable[Item]], Sequence]  # items -> (N, D) embeddings


@dataclass(frozen=True)
class Measured:
    """What `measure` found of one model.

    Attributes:
        results: long table over units, pools and metrics. hits: one row per MRBench query. bench: ranked
            MRBench units.
    """

    model: str
    results: pd.DataFrame
    hits: pd.DataFrame
    bench: dict[str, UnitResult]
    searcher: Searcher


def measure(
    model: str,
    encoder: Encoder,
    root: mbeir.Root,
    bench: mbeir.Root,
    settings: EvaluationSettings,
    *,
    seed: int,
    split: str = "test",
    template: str = "summary",
    pools: Sequence[str] = ("local", "global"),
    embed_pool: Vectors | None = None,
) -> Measured:
    """Encodes every query and candidate once, then ranks all units on each pool, and MRBench on local pools.

    Args:
        embed_pool: what embeds the candidates, where that is another model, for instance `vectors` of its
            searcher.
    """
    searcher = searcher_of(encoder, root, split, settings, template, embed_pool)
    rows = []
    for pool in pools:
        for unit in root.units(split):
            rows += searcher.evaluate(unit, pool=pool).table(settings.cutoffs, settings.bootstrap, seed)
    ranked = {unit: searcher.evaluate(unit, root=bench) for unit in bench.units(split)}
    hits = []
    for unit, result in ranked.items():
        scores = {f"hit@{k}": metrics.hit_rate_at_k(result.ranks, k) for k in settings.cutoffs}
        scores["rank"] = [ranks[0] for ranks in result.ranks]  # of the first positive
        columns = {"model": model, "unit": unit, "qid": [q.qid for q in result.queries]}
        columns |= {"unseen": sources.unseen(root, result.queries)} | scores
        hits.append(pd.DataFrame(columns))
    table = pd.DataFrame(rows)
    table.insert(0, "model", model)
    return Measured(model, table, pd.concat(hits, ignore_index=True), ranked, searcher)


def searcher_of(
    encoder: Encoder,
    root: mbeir.Root,
    split: str,
    settings: EvaluationSettings,
    template: str,
    embed_pool: Vectors | None = None,
) -> Searcher:
    """A searcher that keeps its embeddings where the profile says."""
    store = None
    if settings.on_disk:
        store = Store(cache.EMBEDDINGS, encoder, batch=settings.batch, template=template)
    return Searcher(encoder, root, split, settings, template=template, store=store, embed_pool=embed_pool)


def score(
    searcher: Searcher, units: Sequence[str], pools: Sequence[str], out: Path, *, model: str
) -> pd.DataFrame | None:
    """Scores units on pools, one file per unit and pool, so that a killed run goes on with the next one.

    Of several processes all embed, each its share; then the main one ranks and writes, and the others are
    done.

    Writes out/units/*.csv (all metrics), out/runs (ranked lists, judgements), out/results.csv (all of them),
    out/table.csv and out/table.md (`official_table`).

    Args:
        model: name in the tables.

    Returns:
        the long table; None in a process that is not the main one.
    """
    if distributed.processes().num_processes > 1:
        for unit, pool in itertools.product(units, pools):
            searcher.embedded(unit, pool=pool)
    if not distributed.processes().is_main_process:
        return None
    settings, parts = searcher.settings, []
    for pool, unit in itertools.product(pools, units):
        embedded = searcher.embedded(unit, pool=pool)
        path = out / "units" / f"{unit}_{pool}_{_key(embedded, settings)}.csv"
        if not path.is_file():
            result = searcher.rank(embedded)
            rows = [row | {"model": model} for row in result.table(settings.cutoffs, settings.bootstrap, 0)]
            retriever.write_run(result, out / "runs", model, searcher.split)
            retriever.write_qrels(searcher.root, unit, searcher.split, out / "runs")
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, retriever.tabulate(rows).to_csv(index=False))
        parts.append(pd.read_csv(path))
    results = pd.concat(parts, ignore_index=True)
    table = official_table(results)
    files.write_whole(out / "results.csv", results.to_csv(index=False))
    files.write_whole(out / "table.csv", table.to_csv(index=False))
    files.write_whole(out / "table.md", markdown_table(table))
    return results


def _key(embedded: Embedded, settings: EvaluationSettings) -> str:
    """What the scores of a unit depend on: vectors, judgements and settings, as a hash."""
    values = [*embedded.content, embedded.relevant, settings.model_dump_json()]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def official_table(results: pd.DataFrame) -> pd.DataFrame:
    """Hit rates in percent, a row per model and pool.

    Columns: the sixteen units of M-BEIR in the paper's order, each at its own cut-off, unless there is none
    of them; then others at 5; then Avg: the unweighted mean of the sixteen, or "partial" where one is
    missing.
    """
    rows = []
    official = mbeir.OFFICIAL_UNITS
    for (model, pool), group in results.groupby(["model", "pool"], sort=False):
        values = group.set_index(["unit", "metric"])["value"]
        units = [unit for unit in official if unit in set(group["unit"])]
        others = [unit for unit in group["unit"].unique() if unit not in official]
        row: dict[str, object] = {"model": model, "pool": pool}
        for unit in [*(official if units else ()), *others]:
            k = official.get(unit, 5)
            row[f"{unit} @{k}"] = 100 * values.get((unit, f"hit@{k}"), np.nan)
        row["Avg"] = "partial"
        if len(units) == len(official):
            row["Avg"] = float(np.mean([row[f"{unit} @{k}"] for unit, k in official.items()]))
        rows.append(row)
    return pd.DataFrame(rows)


def mrbench_table(hits: pd.DataFrame, cutoffs: Sequence[int], samples: int, seed: int) -> pd.DataFrame:
    """Hit rates per model and MRBench unit, and their unweighted mean ("average"), with 95 % intervals.

    Args:
        hits: one row per query and model: model, unit and a column hit@k for every cut-off k.

    Returns:
        columns model, unit, metric, value, ci_low, ci_high, n.
    """

    def of_unit(model: str, unit: str, metric: str) -> tuple:
        return seed, "mrbench", unit, metric.removeprefix("hit@")

    def of_average(model: str, unit: str, metric: str) -> tuple:
        return seed, "mrbench average", metric.removeprefix("hit@")

    by, parts = ["model", "unit", "metric"], []
    for _, rows in hits.groupby("model", sort=False):
        for metric in (f"hit@{k}" for k in cutoffs):
            values = rows.sort_values("unit", kind="stable").assign(metric=metric, value=rows[metric])
            parts.append(statistics.scores(values, by, samples, of_unit))
            values = values.assign(task=values["unit"], unit="average")
            parts.append(statistics.scores(values, by, samples, of_average, "task"))
    return pd.concat(parts, ignore_index=True)


def by_composition(hits: pd.DataFrame, k: int) -> pd.DataFrame:
    """MRBench hit rates for compositions of grains that were and were not in training rows."""
    hits = hits.assign(composition=hits["unseen"].map({True: "unseen", False: "seen"}))
    groups = hits.groupby(["model", "composition"], sort=False)[f"hit@{k}"].agg(["mean", "count"])
    return groups.reset_index().rename(columns={"mean": f"hit@{k}", "count": "n"})


def prompt_spread(searcher: Searcher, units: Sequence[str], k: int, pool: str = "local") -> pd.DataFrame:
    """Hit rate of each unit under each of the four instructions alone: mean, lowest, highest."""
    rows = []
    for unit in units:
        results = [searcher.evaluate(unit, pool=pool, prompt_index=i) for i in range(4)]
        values = [metrics.hit_rate_at_k(result.ranks, k).mean() for result in results]
        rows.append({"unit": unit, "mean": np.mean(values), "lowest": min(values), "highest": max(values)})
    return pd.DataFrame(rows)


def side_by_side(
    measured: Sequence[Measured], unit: str, index: int, depth: int
) -> tuple[str, Path | None, list]:
    """One query with the top answers of several models, for figures.retrieved."""
    query, root = measured[0].bench[unit].queries[index], measured[0].searcher.root

    def image(row: mbeir.Query | mbeir.Candidate) -> Path | None:
        return root.image_path(row.image) if row.image else None

    answers = []
    for one in measured:
        result = one.bench[unit]
        top = [result.candidates[row] for row in result.top[index][:depth]]
        answers.append((one.model, [(mbeir.caption(c), image(c), c.did in query.positives) for c in top]))
    text = f"{query.text or ''} [{mbeir.caption(query)}]" if query.image else query.text or ""
    return text, image(query), answers
