"""One model measured on the units of a root and on MRBench: tables, hits per query, retrieved candidates.

measured = measure("stage 2", encoder, root, bench, settings.evaluation, seed=17)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tempfile
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
from elva_core.retrieval import cache, metrics, retriever, search
from elva_core.retrieval.cache import Store
from elva_core.retrieval.retriever import Embedded, Searcher, UnitResult
from elva_core.tables import markdown_table, read_table

Vectors = Callable[[Iterable[Item]], Sequence]  # items -> (N, D) embeddings
# names of the files in units/
SCORES = re.compile(r"(?P<unit>.+)_(?P<pool>local|global)_[0-9a-f]{12}\.csv")
TABLES = ("results.csv", "table.csv", "table.md")


@dataclass(frozen=True)
class Measured:
    """Measurements of one model by `measure`.

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
    template: str = "summary",
    pools: Sequence[str] = ("local", "global"),
    embed_pool: Vectors | None = None,
) -> Measured:
    """Encodes every query and candidate once, then ranks all units on each pool, and MRBench on local pools.

    Args:
        embed_pool: what embeds the candidates, where that is another model, for instance `vectors` of its
            searcher.
    """
    searcher = searcher_of(encoder, root, "test", settings, template, embed_pool)
    rows = []
    for pool in pools:
        for unit in root.units("test"):
            rows += searcher.evaluate(unit, pool=pool).table(settings.cutoffs, settings.bootstrap, seed)
    ranked = {unit: searcher.evaluate(unit, root=bench) for unit in bench.units("test")}
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
    if template == "summary" != encoder.settings.pool_template and embed_pool is None:
        embed_pool = searcher_of(encoder, root, split, settings, encoder.settings.pool_template).vectors
    return Searcher(encoder, root, split, settings, template=template, store=store, embed_pool=embed_pool)


def results_folder(out: Path) -> Path:
    """A folder that results can be written to, made where it is missing; asked before hours of embedding.

    Raises:
        ValueError: it is a file, or cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror
        raise ValueError(f"{out} cannot hold the results ({reason}); name another folder") from None


def score(
    searcher: Searcher,
    units: Sequence[str],
    pools: Sequence[str],
    out: Path,
    *,
    model: str,
    dims: Sequence[int] = (),
) -> pd.DataFrame | None:
    """Scores units on pools, one file per unit and pool, so that a killed run goes on with the next one.

    Of several processes all embed, each its share; then the main one ranks and writes, and the others are
    done.

    Writes out/units/*.csv (all metrics), out/runs (ranked lists, judgements), out/results.csv (all of them),
    out/table.csv and out/table.md (`official_table`). All of them hold this call alone: scores and lists that
    another one left there, of another model, template, unit or pool, are removed.

    Args:
        units, pools: each counts once. model: name in the tables and run files.
        dims: prefixes of the embeddings whose hit rates are rows of their own, "hit@5 dim 64".

    Returns:
        the long table; None in a process that is not the main one.

    Raises:
        ValueError: `out` cannot be written.
    """
    results_folder(out)
    pairs = list(dict.fromkeys(itertools.product(pools, units)))
    if distributed.processes().num_processes > 1:
        for pool, unit in pairs:
            searcher.embedded(unit, pool=pool)
    if not distributed.processes().is_main_process:
        return None
    settings, parts = searcher.settings, []
    for pool, unit in pairs:
        embedded = searcher.embedded(unit, pool=pool)
        path = out / "units" / f"{unit}_{pool}_{_key(model, embedded, searcher, dims)}.csv"
        if not path.is_file():
            _remove(out, searcher.split, {(pool, unit)}.__contains__)
            result = searcher.rank(embedded)
            rows = result.table(settings.cutoffs, settings.bootstrap, 0)
            rows += [row for dim in dims for row in _of_prefixes(searcher, embedded, dim)]
            rows = [row | {"model": model} for row in rows]
            retriever.write_run(result, out / "runs", model, searcher.split)
            retriever.write_qrels(searcher.root, unit, searcher.split, out / "runs")
            files.write_whole(path, pd.DataFrame(rows)[list(retriever.COLUMNS)].to_csv(index=False))
        parts.append(read_table(path))
    _remove(out, searcher.split, lambda pair: pair not in pairs)
    results = pd.concat(parts, ignore_index=True)
    table = official_table(results)
    contents = (results.to_csv(index=False), table.to_csv(index=False), markdown_table(table))
    for name, content in zip(TABLES, contents, strict=True):
        files.write_whole(out / name, content)
    return results


def _of_prefixes(searcher: Searcher, embedded: Embedded, dim: int) -> list[dict]:
    """Rows of the hit rates that the first `dim` numbers of the embeddings give."""
    names = ("query_vectors", "pool_vectors")
    short = {name: search.Prefixes(getattr(embedded, name), dim) for name in names}
    result = searcher.rank(embedded._replace(**short))
    rows = result.table(searcher.settings.cutoffs, searcher.settings.bootstrap, 0)
    hits = (row for row in rows if re.fullmatch(r"hit@\d+", row["metric"]))
    return [row | {"metric": f"{row['metric']} dim {dim}"} for row in hits]


def _key(model: str, embedded: Embedded, searcher: Searcher, dims: Sequence[int]) -> str:
    """Hash of all that scores and ranked lists depend on: name, ids, vectors, judgements, settings."""
    settings = searcher.settings.model_dump_json()
    values = [model, searcher.split, *embedded.content, embedded.relevant, settings, *dims]
    ids = (embedded.queries.ids.tobytes(), embedded.candidates.ids.tobytes())
    return hashlib.sha256(b"".join([json.dumps(values).encode(), *ids])).hexdigest()[:12]


def _remove(out: Path, split: str, chosen: Callable[[tuple[str, str]], bool]) -> None:
    """Removes what `score` left in a folder of the (pool, unit) pairs that are chosen.

    The tables first, which tell of them; then the scores, whose absence says that there are no ranked lists.
    """
    for path in sorted((out / "units").glob("*.csv")):
        match = SCORES.fullmatch(path.name)
        if match and chosen((match["pool"], match["unit"])):
            lists = retriever.run_files(out / "runs", match["unit"], match["pool"], split)
            for old in (*(out / name for name in TABLES), path, *lists):
                old.unlink(missing_ok=True)


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

    def scope(model: str, unit: str, metric: str) -> tuple:
        names = ("mrbench average",) if unit == "average" else ("mrbench", unit)
        return seed, *names, metric.removeprefix("hit@")

    by, parts = ["model", "unit", "metric"], []
    for _, rows in hits.groupby("model", sort=False):
        for metric in (f"hit@{k}" for k in cutoffs):
            values = rows.sort_values("unit", kind="stable").assign(metric=metric, value=rows[metric])
            parts.append(statistics.scores(values, by, samples, scope))
            values = values.assign(task=values["unit"], unit="average")
            parts.append(statistics.scores(values, by, samples, scope, "task"))
    return pd.concat(parts, ignore_index=True)


def by_composition(hits: pd.DataFrame, k: int) -> pd.DataFrame:
    """MRBench hit rates for compositions of grains that were and were not in training rows."""
    hits = hits.assign(composition=hits["unseen"].map({True: "unseen", False: "seen"}))
    groups = hits.groupby(["model", "composition"], sort=False)[f"hit@{k}"].agg(["mean", "count"])
    return groups.reset_index().rename(columns={"mean": f"hit@{k}", "count": "n"})


def composition_gaps(hits: pd.DataFrame, k: int, samples: int, seed: int) -> pd.DataFrame:
    """Difference of MRBench hit rates: compositions that no training row has less the others.

    Returns:
        a row per model that has queries of both: new, old, metric, value and its 95 % interval (queries
        resampled inside each of the two), ci_low, ci_high, n of both.
    """
    rows, metric = [], f"hit@{k}"
    for model, of_model in hits.groupby("model", sort=False):
        unseen, seen = (
            of_model.loc[of_model["unseen"] == is_new, metric].to_numpy() for is_new in (True, False)
        )
        if len(unseen) and len(seen):
            low, high = metrics.interval(
                [unseen, -seen], samples, distributed.rng_for(seed, "unseen", model, k)
            )
            names = {"new": f"{model}, unseen", "old": "seen compositions", "metric": metric}
            # the interval is of the mean of two groups, which is half their difference
            bounds = {"value": unseen.mean() - seen.mean(), "ci_low": 2 * low, "ci_high": 2 * high}
            rows.append(names | bounds | {"n": len(of_model)})
    return pd.DataFrame(rows, columns=["new", "old", "metric", "value", "ci_low", "ci_high", "n"])


def prompt_spread(searcher: Searcher, units: Sequence[str], k: int) -> pd.DataFrame:
    """Hit rate of each unit under each of the four instructions alone: mean, lowest, highest; n queries."""
    rows = []
    for unit in units:
        results = [searcher.evaluate(unit, prompt_index=i) for i in range(4)]
        values = [metrics.hit_rate_at_k(result.ranks, k).mean() for result in results]
        spread = {"mean": np.mean(values), "lowest": min(values), "highest": max(values)}
        rows.append({"unit": unit} | spread | {"n": len(results[0].queries)})
    return pd.DataFrame(rows)


def side_by_side(
    measured: Sequence[Measured], unit: str, index: int, depth: int
) -> tuple[str, Path | None, list]:
    """One query with the top answers of several models, for pictures.retrieved."""
    query, root = measured[0].bench[unit].queries[index], measured[0].searcher.root

    def image(row: mbeir.Query | mbeir.Candidate) -> Path | None:
        return root.image_path(row.image) if row.image else None

    answers = []
    for one in measured:
        result = one.bench[unit]
        top = [result.candidates[row] for row in result.top[index][:depth]]
        answers.append((one.model, [(mbeir.caption(c), image(c), c.did in query.positives) for c in top]))
    wanted = f"wanted: {mbeir.caption(query)}" if query.image else ""
    return "\n".join(filter(None, (f"task {query.task}: {query.text or ''}", wanted))), image(query), answers
