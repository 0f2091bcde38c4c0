"""MRBench: the multi-grain queries of an M-BEIR root, the same number per unit, with local pools.

bench, counts, sheet = build(root, settings.mrbench, annotate=annotate.exact, folder=out, seed=17)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from elva_core import files
from elva_core.config import MrbenchSettings
from elva_core.data import mbeir
from elva_core.mrbench.annotate import Annotator, Grains

SPLIT = "test"  # whose queries are drawn


def build(
    root: mbeir.Root, settings: MrbenchSettings, *, annotate: Annotator, folder: Path, seed: int
) -> tuple[mbeir.Root, pd.DataFrame, pd.DataFrame]:
    """Draws the benchmark and writes it as an M-BEIR root that stands alone.

    Queries are annotated in the order they would be drawn, so that annotation ends with the share of its
    unit.

    Args:
        annotate: queries -> their grains; exact for the embedded collection, a vision-language model for
            M-BEIR.

    Returns:
        (benchmark root, whose queries carry their grains; counts per unit and step; sheet for human
        verification).

    Raises:
        ElvaDataError: a unit is not there, has fewer multi-grain queries than its share, or gets no answer
            that can be read.
    """
    known, tasks = root.units(SPLIT), set(map(str, settings.tasks))
    if lost := sorted(set(settings.units) - set(known)):
        raise files.ElvaDataError(
            f"{root.folder} has no {SPLIT} units {lost}, it has {known}; correct mrbench.units"
        )
    units = [u for u in known if u in settings.units or u.rpartition("_task")[2] in tasks]
    if not units:
        raise files.ElvaDataError(
            f"{root.folder} has no {SPLIT} unit of tasks {settings.tasks}; correct mrbench.tasks"
        )
    share = settings.queries // len(units)
    bench, counts, sheet = mbeir.Root(folder), [], []
    for unit in units:
        queries = root.queries(unit, SPLIT)
        order = {q.qid: mbeir.stable_hash(seed, "mrbench", unit, q.qid) for q in queries}
        queries = sorted(queries, key=lambda q: order[q.qid])
        multi: list[tuple[mbeir.Query, Grains]] = []
        annotated = unreadable = 0
        while len(multi) < share and annotated < len(queries):
            part = queries[annotated : annotated + max(share - len(multi), settings.annotator.batch)]
            answers = annotate(part)
            annotated += len(part)
            unreadable += sum(grains is None for grains in answers)
            if unreadable == annotated:
                reasons = "the log has the reasons, see mrbench.annotator"
                raise files.ElvaDataError(f"{unit}: none of {annotated} answers can be read; {reasons}")
            readable = [(q, grains) for q, grains in zip(part, answers, strict=True) if grains]
            multi += [(q, grains) for q, grains in readable if len(grains) >= settings.min_grains]
        if len(multi) < share:
            raise files.ElvaDataError(
                f"{unit}: {len(multi)} queries with {settings.min_grains} grains, {share} wanted, "
                f"{annotated} annotated, {unreadable} of them unreadable; lower mrbench.queries"
            )
        chosen = sorted(multi[:share], key=lambda pair: mbeir.split_id(pair[0].qid))
        drawn = [replace(q, source=q.source | {"grains": [list(g) for g in grains]}) for q, grains in chosen]
        bench.write_queries(unit, SPLIT, drawn)
        pool = bench.folder / f"cand_pool/local/mbeir_{unit}_{SPLIT}_cand_pool.jsonl"
        pool.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root.pool_path(unit, SPLIT), pool)
        row = {"unit": unit, "queries": len(queries), "annotated": annotated, "multi-grain": len(multi)}
        row |= {"unreadable": unreadable, "drawn": len(drawn), "pool": sum(1 for _ in mbeir.read_lines(pool))}
        counts.append(row)
        for query in drawn:
            grains = "; ".join(f"{kind}: {value}" for kind, value in mbeir.grains(query))
            row = {"unit": unit, "qid": query.qid, "text": query.text or "", "image": query.image or ""}
            sheet.append(row | {"grains": grains})
    complete(bench, root)
    sheet.sort(key=lambda row: mbeir.stable_hash(seed, "verify", row["unit"], row["qid"]))
    return bench, pd.DataFrame(counts), pd.DataFrame(sheet[: settings.verify])


def complete(bench: mbeir.Root, root: mbeir.Root) -> None:
    """Writes what the benchmark needs to stand alone: the instructions, a global pool, every image.

    The global pool is the union of its local pools. Images are hard links where the file system allows, so
    that they take no room here; a copy of the folder has them whole.
    """
    (bench.folder / "instructions").mkdir(exist_ok=True)
    instructions = "instructions/query_instructions.tsv"
    shutil.copyfile(root.folder / instructions, bench.folder / instructions)
    bench.write_global_pool(SPLIT, (c for unit in bench.units(SPLIT) for c in bench.pool(unit, SPLIT)))
    images = {c.image for c in bench.pool("", SPLIT, "global")}
    images |= {q.image for unit in bench.units(SPLIT) for q in bench.queries(unit, SPLIT)}
    for name in sorted(filter(None, images)):
        source, target = root.image_file(name), bench.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        files.link(source, target)


def describe(queries: Sequence[mbeir.Query]) -> pd.DataFrame:
    """Number of queries with a grain of each kind."""
    # once a query, however many grains of a kind it has
    kinds = [kind for q in queries for kind in dict(mbeir.grains(q))]
    table = pd.Series(kinds, dtype=str).value_counts().rename_axis("kind").reset_index(name="queries")
    return table.assign(share=table["queries"] / max(1, len(queries)))
