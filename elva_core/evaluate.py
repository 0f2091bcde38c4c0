"""One model measured on the units of a root and on MRBench: tables, hits per query, retrieved candidates.

measured = measure("stage 2", encoder, root, bench, settings.evaluation, seed=17)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from elva_core import mbeir, metrics, prepare, runtime
from elva_core.encoder import Encoder
from elva_core.retrieval import Searcher, UnitResult
from elva_core.settings import EvaluationSettings


@dataclass(frozen=True)
class Measured:
    """results: long table over units, pools and metrics. hits: one row per MRBench query. bench: ranked MRBench units."""

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
) -> Measured:
    """Encodes every query and candidate once, then ranks all units on each pool, and MRBench on local pools."""
    searcher = Searcher(encoder, root, split, settings, template=template)
    rows = []
    for pool in pools:
        for unit in root.units(split):
            rows += searcher.evaluate(unit, pool=pool).table(settings.cutoffs, settings.bootstrap, seed)
    ranked = {unit: searcher.evaluate(unit, root=bench) for unit in bench.units(split)}
    hits = []
    for unit, result in ranked.items():
        scores = {f"hit@{k}": metrics.hit_rate_at_k(result.ranks, k) for k in settings.cutoffs}
        scores["rank"] = [ranks[0] for ranks in result.ranks]  # of the first positive
        new = prepare.unseen(root, result.queries)
        hits.append(pd.DataFrame({"model": model, "unit": unit, "qid": [q.qid for q in result.queries], "unseen": new, **scores}))
    table = pd.DataFrame(rows)
    table.insert(0, "model", model)
    return Measured(model, table, pd.concat(hits, ignore_index=True), ranked, searcher)


def mrbench_table(hits: pd.DataFrame, cutoffs: Sequence[int], samples: int, seed: int) -> pd.DataFrame:
    """Hit rates per model and MRBench unit, and their unweighted mean ("average"), with 95 % intervals."""
    rows = []
    for model, own in hits.groupby("model", sort=False):
        for k in cutoffs:
            groups = {unit: part[f"hit@{k}"].to_numpy() for unit, part in own.groupby("unit")}
            for unit, values in groups.items():
                low, high = metrics.bootstrap_interval(values, samples, runtime.rng_for(seed, "mrbench", unit, k))
                rows.append(
                    {
                        "model": model,
                        "unit": unit,
                        "metric": f"hit@{k}",
                        "value": values.mean(),
                        "ci_low": low,
                        "ci_high": high,
                        "n": len(values),
                    }
                )
            low, high = metrics.stratified_interval(list(groups.values()), samples, runtime.rng_for(seed, "mrbench average", k))
            mean = float(np.mean([v.mean() for v in groups.values()]))
            rows.append(
                {"model": model, "unit": "average", "metric": f"hit@{k}", "value": mean, "ci_low": low, "ci_high": high, "n": len(own)}
            )
    return pd.DataFrame(rows)


def by_composition(hits: pd.DataFrame, k: int) -> pd.DataFrame:
    """MRBench hit rates for compositions of grains that were and were not in training rows."""
    groups = hits.groupby(["model", "unseen"], sort=False)[f"hit@{k}"].agg(["mean", "count"]).reset_index()
    groups["composition"] = groups["unseen"].map({True: "unseen", False: "seen"})
    return groups.rename(columns={"mean": f"hit@{k}", "count": "n"})[["model", "composition", f"hit@{k}", "n"]]


def prompt_spread(searcher: Searcher, units: Sequence[str], k: int) -> pd.DataFrame:
    """Hit rate of each unit under each of the four instructions alone: mean, lowest, highest."""
    rows = []
    for unit in units:
        values = [metrics.hit_rate_at_k(searcher.evaluate(unit, prompt_index=i).ranks, k).mean() for i in range(4)]
        rows.append({"unit": unit, "mean": np.mean(values), "lowest": min(values), "highest": max(values)})
    return pd.DataFrame(rows)


def side_by_side(measured: Sequence[Measured], unit: str, index: int, depth: int) -> tuple[str, Path | None, list]:
    """One query with the top answers of several models, for figures.retrieved."""
    first = measured[0].bench[unit]
    query, root = first.queries[index], measured[0].searcher.root
    answers = []
    for m in measured:
        found = [m.bench[unit].candidates[row] for row in m.bench[unit].top[index][:depth]]
        answers.append(
            (m.model, [(mbeir.caption(c), root.image_path(c.image) if c.image else None, c.did in query.positives) for c in found])
        )
    text = f"{query.text or ''} [{mbeir.caption(query)}]" if query.image else query.text or ""
    return text, root.image_path(query.image) if query.image else None, answers
