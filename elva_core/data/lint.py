"""The linter: every violation of M-BEIR's rules in a root, each with file and line.

    problems = lint.check(root)

Files are streamed; of a pool only ids and modalities are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from elva_core.data import mbeir
from elva_core.data.images import open_image
from elva_core.data.mbeir import MODALITIES, OFFICIAL_UNITS, SPLITS, TASKS, Query, Root
from elva_core.files import ElvaDataError


@dataclass
class Report:
    """Findings of one pass over a root so far. images: hashes of the paths that were looked at already."""

    root: Root
    decode_images: bool
    prompts: dict[tuple[int, str, str], tuple[str, ...]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    images: set[int] = field(default_factory=set)

    def wrong(self, where: object, what: object) -> None:
        self.problems.append(f"{where}: {what}")

    def attempt(self, work: Callable, *arguments):
        """The result of `work`, or None and its error as a problem."""
        try:
            return work(*arguments)
        except ElvaDataError as error:
            self.problems.append(str(error))
            return None


def check(root: Root, *, decode_images: bool = True) -> list[str]:
    """Every violation, as "file:line: what is wrong". An empty list is a clean root."""
    report = Report(root, decode_images)
    if not any(root.units(split) for split in SPLITS):
        names = ", ".join(SPLITS)
        return [f"{root.folder}/query has no file of {names}; is this the root of an M-BEIR folder?"]
    report.prompts = report.attempt(lambda: root.instructions) or {}
    for split in SPLITS:
        units, union = root.units(split), split == "train" and root.union_train_path().is_file()
        if not units and not union:
            continue
        path = root.pool_path("", split, "global")
        everything = _pool(report, path)
        for unit in units:
            local = everything
            if split != "train":
                path = root.pool_path(unit, split)
                local = _pool(report, path)
                if len(local) < OFFICIAL_UNITS.get(unit, 5):
                    report.wrong(path, f"{len(local)} candidates are fewer than the reported cut-off k")
            judged = _queries(report, root.query_path(unit, split), local, everything)
            _qrels(report, unit, split, judged)
        if union:
            _queries(report, root.union_train_path(), None, everything)
    return report.problems


def _records(report: Report, path: Path, parse: Callable) -> Iterator[tuple]:
    """(line number, record) of the lines that are one; any other is a problem and is passed over.

    Args:
        parse: (path, line number, line) -> record.
    """
    lines = mbeir.read_lines(path)
    while line := report.attempt(next, lines, None):
        if record := report.attempt(parse, path, line[0], line[2]):
            yield line[0], record


def _pool(report: Report, path: Path) -> pd.Series:
    """Hashed id -> place of the modality in MODALITIES."""
    ids, kinds, numbers = array("q"), array("b"), array("q")
    for number, candidate in _records(report, path, partial(mbeir.parsed, parse=mbeir.parse_candidate)):
        _content(report, f"{path}:{number}", candidate.text, candidate.image, candidate.modality)
        ids.append(mbeir.hashed_candidate_id(candidate.did))
        kinds.append(MODALITIES.index(candidate.modality))
        numbers.append(number)
    pool = pd.Series(np.asarray(kinds), np.asarray(ids))
    again = pool.index.duplicated()
    for place in np.flatnonzero(again):
        did = mbeir.unhashed_candidate_id(ids[place])
        report.wrong(f"{path}:{numbers[place]}", f"did {did} occurs twice in one pool")
    return pool[~again]


def _modality(pool: pd.Series, did: str) -> str | None:
    """None if the pool lacks it; an id that is out of bounds is reported where it is defined."""
    try:
        return MODALITIES[pool[mbeir.hashed_candidate_id(did)]]
    except (KeyError, ElvaDataError):
        return None


def _content(report: Report, where: str, text: str | None, image: str | None, modality: str) -> None:
    if ("text" in modality) != bool(text):
        report.wrong(where, f"modality {modality} but text is {text!r}")
    if ("image" in modality) != bool(image):
        report.wrong(where, f"modality {modality} but image path is {image!r}")
    if image and hash(image) not in report.images:
        report.images.add(hash(image))
        try:
            path = report.root.image_file(image)
            if report.decode_images:
                open_image(path)
        except (ElvaDataError, OSError) as error:
            report.wrong(where, error)


def _queries(
    report: Report, path: Path, local: pd.Series | None, everything: pd.Series
) -> dict[tuple[str, str], int]:
    """Checks a query file; returns the task of every (qid, positive).

    Args:
        local: None for the union file, whose rows may repeat and whose positives are looked for in the
            whole pool alone.
    """
    seen: set[str] = set()
    judged = {}
    for number, query in _records(report, path, partial(mbeir.parsed, parse=mbeir.parse_query)):
        where = f"{path}:{number}"
        if query.qid in seen and local is not None:
            report.wrong(where, f"qid {query.qid} occurs twice in one file")
        seen.add(query.qid)
        _content(report, where, query.text, query.image, query.modality)
        for message in _judge(query, everything if local is None else local, everything, report.prompts):
            report.wrong(where, message)
        if local is not None:
            judged |= {(query.qid, did): query.task for did in query.positives}
    return judged


def _judge(query: Query, local: pd.Series, everything: pd.Series, prompts: dict) -> Iterator[str]:
    dataset = mbeir.split_id(query.qid)[0]
    if not query.positives:
        yield "pos_cand_list is empty"
        return
    if both := set(query.positives) & set(query.negatives):
        yield f"{sorted(both)} are positive and negative at once"
    modalities = {did: _modality(everything, did) for did in query.positives}
    for did, modality in modalities.items():
        if did.startswith(f"{dataset}:") and _modality(local, did) is None:
            yield f"positive {did} is not in the local pool"
        if modality is None:
            yield f"positive {did} is not in the global pool"
    if local is not everything and not any(did.startswith(f"{dataset}:") for did in query.positives):
        yield f"no positive is of dataset {dataset}, so the local pool holds none"
    for modality in sorted(set(modalities.values()) - {None}):
        if TASKS.get((query.modality, modality)) != query.task:
            yield f"task_id {query.task} does not fit {query.modality} -> {modality}"
        if prompts and (dataset, query.modality, modality) not in prompts:
            yield f"no instruction for dataset {dataset}, {query.modality} -> {modality}"


def _qrels(report: Report, unit: str, split: str, listed: dict[tuple[str, str], int]) -> None:
    path, judged = report.root.qrels_path(unit, split), set()
    for number, (qid, did, relevance, task) in _records(report, path, mbeir.judgement):
        if relevance <= 0:
            continue
        judged.add((qid, did))
        where, query_task = f"{path}:{number}", listed.get((qid, did))
        if query_task is None:
            report.wrong(where, f"{qid} {did} is only in the qrels, not in pos_cand_list")
        elif task not in (None, query_task):
            report.wrong(where, f"task {task}, but the query has task_id {query_task}")
    for qid, did in listed:
        if (qid, did) not in judged:
            report.wrong(path, f"{qid} {did} is only in pos_cand_list")
