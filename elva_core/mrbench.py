"""MRBench: the multi-grain queries of an M-BEIR root, the same number per task, with local pools.

bench, counts, sheet = build(root, settings, annotate=mbeir.grains, folder=out)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from elva_core import mbeir
from elva_core.settings import MrbenchSettings

Grains = list[tuple[str, str]]  # (kind, text), for instance ("tone", "dark skin tone")
Annotator = Callable[[mbeir.Query], Grains]


def build(
    root: mbeir.Root, settings: MrbenchSettings, *, annotate: Annotator, folder: Path, seed: int, split: str = "test"
) -> tuple[mbeir.Root, pd.DataFrame, pd.DataFrame]:
    """Draws the benchmark and writes it as an M-BEIR root (queries, qrels, local pools; images stay in `root`).

    Args:
        annotate: query -> its grains; exact for the embedded collection, a vision-language model for M-BEIR.

    Returns:
        (benchmark root, counts per unit and step, sheet for human verification).

    Raises:
        ElvaDataError: a task has fewer multi-grain queries than its share.
    """
    units = [u for u in root.units(split) if int(u.rpartition("_task")[2]) in settings.tasks]
    if not units:
        raise mbeir.ElvaDataError(f"{root.folder} has no {split} unit of tasks {settings.tasks}; correct mrbench.tasks")
    share = settings.queries // len(units)
    bench, counts, sheet = mbeir.Root(folder), [], []
    for unit in units:
        queries = root.queries(unit, split)
        grains = {q.qid: annotate(q) for q in queries}
        multi = [q for q in queries if len(grains[q.qid]) >= settings.min_grains]
        if len(multi) < share:
            raise mbeir.ElvaDataError(
                f"{unit}: {len(multi)} queries with {settings.min_grains} grains, {share} wanted; lower mrbench.queries"
            )
        drawn = sorted(multi, key=lambda q: mbeir.stable_hash(seed, "mrbench", unit, q.qid))[:share]
        drawn.sort(key=lambda q: mbeir.split_id(q.qid))
        mbeir.write_jsonl(bench.query_path(unit, split), map(mbeir.query_record, drawn))
        mbeir.write_qrels(bench.qrels_path(unit, split), drawn)
        pool = bench.folder / f"cand_pool/local/mbeir_{unit}_{split}_cand_pool.jsonl"
        pool.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root.pool_path(unit, split), pool)
        counts.append(
            {"unit": unit, "queries": len(queries), "multi-grain": len(multi), "drawn": len(drawn), "pool": len(root.pool(unit, split))}
        )
        sheet += [_sheet_row(unit, q, grains[q.qid]) for q in drawn]
    rows = sorted(sheet, key=lambda r: mbeir.stable_hash(seed, "verify", r["unit"], r["qid"]))[: settings.verify]
    return bench, pd.DataFrame(counts), pd.DataFrame(rows)


def _sheet_row(unit: str, query: mbeir.Query, grains: Grains) -> dict:
    text = "; ".join(f"{kind}: {value}" for kind, value in grains)
    return {"unit": unit, "qid": query.qid, "text": query.text or "", "image": query.image or "", "grains": text, "accept": ""}


def agreement(sheet: pd.DataFrame) -> dict[str, float]:
    """Share of sampled queries that a person accepted, with a 95 % Wilson interval.

    Args:
        sheet: `accept` holds yes, no, or nothing where nobody has looked yet.

    Returns:
        checked (count), precision, ci_low, ci_high; the last three are NaN while nothing is filled in.
    """
    answers = sheet["accept"].fillna("").astype(str).str.strip().str.lower()
    if odd := sorted(set(answers) - {"", "yes", "no"}):
        raise mbeir.ElvaDataError(f'verification sheet: accept holds {odd}; write "yes", "no" or nothing')
    n, accepted = int((answers != "").sum()), int((answers == "yes").sum())
    if n == 0:
        return {"checked": 0, "precision": np.nan, "ci_low": np.nan, "ci_high": np.nan}
    z, p = 1.959964, accepted / n
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"checked": n, "precision": p, "ci_low": centre - half, "ci_high": centre + half}


def describe(queries: Sequence[mbeir.Query]) -> pd.DataFrame:
    """How often each kind of grain occurs, and how many grains a query has."""
    kinds = [kind for q in queries for kind, _ in mbeir.grains(q)]
    sizes = [len(mbeir.grains(q)) for q in queries]
    table = pd.Series(kinds, dtype=str).value_counts().rename_axis("kind").reset_index(name="queries")
    return table.assign(share=table["queries"] / max(1, len(sizes)))


def as_dataset(bench: mbeir.Root, split: str = "test"):
    """The benchmark as a `datasets.Dataset`: one row per query with unit, text, image path, grains and positives."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    rows = [
        {
            "unit": unit,
            "qid": q.qid,
            "text": q.text or "",
            "image": q.image or "",
            "grains": [t for _, t in mbeir.grains(q)],
            "positives": list(q.positives),
        }
        for unit in bench.units(split)
        for q in bench.queries(unit, split)
    ]
    return Dataset.from_list(rows)
