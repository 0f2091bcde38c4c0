"""The linter: every violation of mbeir_format.md 3.7 in a root, each with file and line.

    problems = lint.check(root)

Files are streamed; of a pool only ids and modalities are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from elva_core.data import mbeir
from elva_core.data.images import open_image
from elva_core.data.mbeir import MODALITIES, OFFICIAL_UNITS, TASKS, Candidate, Query, Root
from elva_core.files import ElvaDataError


@dataclass
class Known:
    """The candidates of a pool: hashed ids, ascending, and the place of each one's modality in MODALITIES."""

    ids: np.ndarray
    kinds: np.ndarray

    def modality(self, did: str) -> str | None:
        """None if the pool lacks it."""
        wanted = _hashed(did)
        place = int(np.searchsorted(self.ids, wanted))
        return MODALITIES[self.kinds[place]] if place < len(self.ids) and self.ids[place] == wanted else None


@dataclass
class Report:
    """What one pass over a root has found so far. images: hashes of the paths that were looked at already."""

    root: Root
    decode_images: bool
    prompts: dict[tuple[int, str, str], tuple[str, ...]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    images: set[int] = field(default_factory=set)

    def attempt(self, work: Callable, *arguments):
        """The result of `work`, or None and its error as a problem."""
        try:
            return work(*arguments)
        except ElvaDataError as error:
            self.problems.append(str(error))
            return None


def check(
    root: Root, splits: Sequence[str] = ("train", "val", "test"), *, decode_images: bool = True
) -> list[str]:
    """Every violation, as "file:line: what is wrong". An empty list is a clean root."""
    report = Report(root, decode_images)
    if not any(root.units(split) for split in splits):
        report.problems.append(
            f"{root.folder}/query has no file of {', '.join(splits)}; is this the root of an M-BEIR folder?"
        )
        return report.problems
    report.prompts = report.attempt(lambda: root.instructions) or {}
    for split in splits:
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
                if len(local.ids) < OFFICIAL_UNITS.get(unit, 5):
                    report.problems.append(
                        f"{path}: {len(local.ids)} candidates are fewer than the reported cut-off k"
                    )
            judged = _queries(report, root.query_path(unit, split), local, everything)
            _qrels(report, unit, split, judged)
        if union:
            _queries(report, root.union_train_path(), None, everything)
    return report.problems


def _records(report: Report, path: Path, parse: Callable) -> Iterator[tuple[int, Query | Candidate]]:
    """(line number, record) of the lines that are one; a line that is none is a problem and is passed over."""
    lines = mbeir.read_lines(path)
    while line := report.attempt(next, lines, None):
        if record := report.attempt(mbeir.parsed, path, line[0], line[2], parse):
            yield line[0], record


def _pool(report: Report, path: Path) -> Known:
    ids, kinds, numbers = array("q"), array("b"), array("q")
    for number, candidate in _records(report, path, mbeir.parse_candidate):
        where = f"{path}:{number}"
        _content(report, where, candidate.text, candidate.image, candidate.modality)
        try:
            ids.append(mbeir.hashed_candidate_id(candidate.did))
        except ElvaDataError as error:
            report.problems.append(f"{where}: {error}")
            continue
        kinds.append(MODALITIES.index(candidate.modality))
        numbers.append(number)
    order = np.argsort(np.asarray(ids), kind="stable")
    known = Known(np.asarray(ids)[order], np.asarray(kinds)[order])
    for place in np.flatnonzero(known.ids[1:] == known.ids[:-1]) + 1:
        did = mbeir.unhashed_candidate_id(int(known.ids[place]))
        report.problems.append(f"{path}:{numbers[order[place]]}: did {did} occurs twice in one pool")
    return known


def _content(report: Report, where: str, text: str | None, image: str | None, modality: str) -> None:
    if ("text" in modality) != bool(text):
        report.problems.append(f"{where}: modality {modality} but text is {text!r}")
    if ("image" in modality) != bool(image):
        report.problems.append(f"{where}: modality {modality} but image path is {image!r}")
    if image and hash(image) not in report.images:
        report.images.add(hash(image))
        try:
            path = report.root.image_path(image)
            if report.decode_images:
                open_image(path)
            elif not path.is_file():
                raise ElvaDataError(f"image {path} is missing; restore the file or drop the record")
        except (ElvaDataError, OSError) as error:
            report.problems.append(f"{where}: {error}")


def _queries(
    report: Report, path: Path, local: Known | None, everything: Known
) -> dict[tuple[str, str], int]:
    """Checks a query file; returns the task of every (qid, positive).

    Args:
        local: None for the union file, whose rows may repeat and whose positives are looked for in the whole pool alone.
    """
    seen: set[str] = set()
    judged = {}
    for number, query in _records(report, path, mbeir.parse_query):
        where = f"{path}:{number}"
        if query.qid in seen and local is not None:
            report.problems.append(f"{where}: qid {query.qid} occurs twice in one file")
        seen.add(query.qid)
        try:
            mbeir.hashed_query_id(query.qid)
        except ElvaDataError as error:
            report.problems.append(f"{where}: {error}")
        _content(report, where, query.text, query.image, query.modality)
        report.problems.extend(
            f"{where}: {message}"
            for message in _judge(query, local or everything, everything, report.prompts)
        )
        if local is not None:
            judged |= {(query.qid, did): query.task for did in query.positives}
    return judged


def _judge(query: Query, local: Known, everything: Known, prompts: dict) -> Iterator[str]:
    dataset = mbeir.split_id(query.qid)[0]
    if not query.positives:
        yield "pos_cand_list is empty"
        return
    if both := set(query.positives) & set(query.negatives):
        yield f"{sorted(both)} are positive and negative at once"
    found = {did: everything.modality(did) for did in query.positives}
    for did, modality in found.items():
        if did.startswith(f"{dataset}:") and local.modality(did) is None:
            yield f"positive {did} is not in the local pool"
        if modality is None:
            yield f"positive {did} is not in the global pool"
    for modality in sorted(set(found.values()) - {None}):
        if TASKS.get((query.modality, modality)) != query.task:
            yield f"task_id {query.task} does not fit {query.modality} -> {modality}"
        if prompts and (dataset, query.modality, modality) not in prompts:
            yield f"no instruction for dataset {dataset}, {query.modality} -> {modality}"


def _qrels(report: Report, unit: str, split: str, listed: dict[tuple[str, str], int]) -> None:
    path, judged = report.root.qrels_path(unit, split), set()
    lines = mbeir.read_lines(path)
    while line := report.attempt(next, lines, None):
        number = line[0]
        if not (found := report.attempt(mbeir.judgement, path, number, line[2])):
            continue
        qid, did, relevance, task = found
        if relevance > 0:
            judged.add((qid, did))
            if (qid, did) not in listed:
                report.problems.append(
                    f"{path}:{number}: {qid} {did} is only in the qrels, not in pos_cand_list"
                )
            elif task is not None and task != listed[qid, did]:
                report.problems.append(
                    f"{path}:{number}: task {task}, but the query has task_id {listed[qid, did]}"
                )
    for qid, did in listed:
        if (qid, did) not in judged:
            report.problems.append(f"{path}: {qid} {did} is only in pos_cand_list")


def _hashed(did: str) -> int:
    """-1, which no candidate has, for an id that is out of bounds; that is reported where it is defined."""
    try:
        return mbeir.hashed_candidate_id(did)
    except ElvaDataError:
        return -1
