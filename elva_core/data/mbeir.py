"""The M-BEIR layout: reader and writer of a root folder.

Owns the file names, prompts and qrels; what one row holds is in records and importable from here; lint
checks whole roots against both. A root may hold any dataset names and ids. Files are read by byte offset,
so a pool of millions never becomes millions of objects.

    root = Root(Path("outputs/smoke/seed-17/10_prepare_data/root"))
    for query in root.queries("emoji_task0", "test"): ...
"""

from __future__ import annotations

import codecs
import fnmatch
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

# users of the layout say mbeir.normalise, mbeir.grains ...
# isort: off
from elva_core.data.records import (  # noqa: F401
    CANDIDATE_ID_BASE, ID, MODALITIES, MODALITIES_OF, QUERY_ID_BASE, TASKS, Candidate,
    Query, candidate_record, caption, grains, hashed_candidate_id, hashed_query_id, masked, normalise,
    parse_candidate, parse_modality, parse_query, query_record, split_id, unhashed_candidate_id,
)  # fmt: skip

# isort: on
from elva_core.files import ElvaDataError

# The sixteen official units in the column order of ELVA Table 1, with the cut-off each is reported at.
OFFICIAL_UNITS = {
    "visualnews_task0": 5, "mscoco_task0": 5, "fashion200k_task0": 10, "webqa_task1": 5,
    "edis_task2": 5, "webqa_task2": 5, "visualnews_task3": 5, "mscoco_task3": 5,
    "fashion200k_task3": 10, "nights_task4": 5, "oven_task6": 5, "infoseek_task6": 5,
    "fashioniq_task7": 10, "cirr_task7": 5, "oven_task8": 5, "infoseek_task8": 5,
}  # fmt: skip
SPLITS = ("train", "val", "test")
MAX_LINE = 16 * 2**20  # bytes; the longest candidate of M-BEIR has 60,546 characters
QRELS_LINE = re.compile(r"(\S+)\s+\S+\s+(\S+)\s+(-?\d{1,9})(?:\s+(\d{1,9}))?", re.ASCII)


R = TypeVar("R", Query, Candidate)


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line) of a file, streamed, without byte order mark and blank end.

    Of blank lines before another line only the first is given: nothing that is read here has any.

    Raises:
        ElvaDataError: missing file, or a line that is too long to be a record; names file and line.
    """
    if not path.is_file():
        raise ElvaDataError(f"{path} is missing; an M-BEIR root needs it, check the unit and split")
    with path.open("rb") as lines:
        offset, blank = 0, None
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                raise ElvaDataError(
                    f"{path}:{number}: the line has more than {MAX_LINE:,} bytes; repair or remove it"
                )
            start, offset = offset, offset + len(line)
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                start, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                blank = blank or (number, start, line)
                continue
            if blank:
                yield blank
                blank = None
            yield number, start, line


def parsed(path: Path, number: int, line: bytes, parse: Callable[[dict], R]) -> R:
    """One record of a JSONL file.

    Raises:
        ElvaDataError: not a JSON object, a key is missing, a value has the wrong type; names file and line.
    """
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ElvaDataError(f"{where}: not a JSON object ({error}); repair or remove the line") from None
    if not isinstance(record, dict):
        raise ElvaDataError(f"{where}: {type(record).__name__} instead of a JSON object")
    try:
        return parse(record)
    except KeyError as error:
        raise ElvaDataError(f"{where}: key {error} is missing") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ElvaDataError(f"{where}: {error}") from None


def judgement(path: Path, number: int, line: bytes) -> tuple[str, str, int, int | None]:
    """(qid, did, relevance, task) of a qrels line; in TREC's four columns there is no task.

    Raises:
        ElvaDataError: another form, or no ids; names file and line.
    """
    match = QRELS_LINE.fullmatch(line.decode("utf-8", "replace").strip())
    if not match or not all(ID.fullmatch(match[i]) for i in (1, 2)):
        raise ElvaDataError(f'{path}:{number}: expected "qid 0 did relevance task", found {line[:80]!r}')
    return match[1], match[2], int(match[3]), int(match[4]) if match[4] else None


class Records(Sequence[R], Generic[R]):
    """The records of one file in its order, parsed when they are asked for; 25 bytes a record are in memory.

    ids: (N,) int64, hashed. kinds: (N,) int8, the task of a query, or the place of a candidate's
    modality in MODALITIES.
    Opening reads the file once and fails on the first line that is no record.
    """

    def __init__(self, path: Path, parse: Callable[[dict], R]) -> None:
        self.path, self._parse = path, parse
        ids, kinds, offsets = array("q"), array("b"), array("q", [0])
        for number, offset, line in read_lines(path):
            record = parsed(path, number, line, parse)
            if isinstance(record, Query):
                ids.append(hashed_query_id(record.qid))
                kinds.append(record.task)
            else:
                ids.append(hashed_candidate_id(record.did))
                kinds.append(MODALITIES.index(record.modality))
            offsets.append(offset + len(line))
        self.ids, self.kinds, self._offsets = (np.asarray(x) for x in (ids, kinds, offsets))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int | slice) -> R | list[R]:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        row = range(len(self))[place]
        with self.path.open("rb") as file:
            file.seek(self._offsets[row])
            return parsed(
                self.path, row + 1, file.read(self._offsets[row + 1] - self._offsets[row]), self._parse
            )

    def __iter__(self) -> Iterator[R]:
        return (parsed(self.path, number, line, self._parse) for number, _, line in read_lines(self.path))


class Pool(Records[Candidate]):
    """The candidates of a pool; every did occurs once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, parse_candidate)
        self._order = np.argsort(self.ids, kind="stable")
        ranked = self.ids[self._order]
        again = self._order[1:][ranked[1:] == ranked[:-1]]
        if len(again):
            row = int(again.min())
            raise ElvaDataError(f"{path}:{row + 1}: did {self[row].did} occurs twice in one pool")

    def row(self, did: str) -> int | None:
        """Row of a candidate, None if it is not in the pool."""
        key = hashed_candidate_id(did)
        place = int(np.searchsorted(self.ids, key, sorter=self._order))
        there = place < len(self) and self.ids[self._order[place]] == key
        return int(self._order[place]) if there else None

    def judged(self, did: str, qid: str) -> int:
        """Row of a candidate that a training query names; raises ElvaDataError where the pool lacks it."""
        row = self.row(did)
        if row is None:
            raise ElvaDataError(
                f"{self.path}: judged candidate {did} of {qid} is not in the train pool; run lint"
            )
        return row

    def rows_of(self, modality: str) -> np.ndarray:
        """Rows of one modality, ascending."""
        return np.flatnonzero(self.kinds == MODALITIES.index(modality))


def write_records(path: Path, records: Iterable[Query | Candidate]) -> None:
    """ASCII-escaped JSON, one object per line, each ended by a newline."""
    rows = (query_record(r) if isinstance(r, Query) else candidate_record(r) for r in records)
    _write(path, (json.dumps(row) + "\n" for row in rows))


def _write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii", newline="\n") as out:
        out.writelines(lines)


@dataclass(frozen=True)
class Root:
    """A folder in the M-BEIR layout."""

    folder: Path

    def units(self, split: str) -> list[str]:
        """Unit names that have a query file in this split; official ones first, in official order."""
        names = [
            p.name[len("mbeir_") : -len(f"_{split}.jsonl")]
            for p in self.query_path("*", split).parent.glob(f"mbeir_*_{split}.jsonl")
        ]
        order = list(OFFICIAL_UNITS)
        return sorted(names, key=lambda n: (order.index(n) if n in order else len(order), n))

    def query_path(self, unit: str, split: str) -> Path:
        return self.folder / "query" / split / f"mbeir_{unit}_{split}.jsonl"

    def union_train_path(self) -> Path:
        return self.folder / "query/union_train/mbeir_union_up_train.jsonl"

    def qrels_path(self, unit: str, split: str) -> Path:
        return self.folder / "qrels" / split / f"mbeir_{unit}_{split}_qrels.txt"

    def pool_path(self, unit: str, split: str, pool: str = "local") -> Path:
        """Pool file of a unit: MSCOCO and emoji have one local pool per split, the others one for all."""
        if pool == "global":
            return self.folder / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"
        per_split = self.folder / f"cand_pool/local/mbeir_{unit}_{split}_cand_pool.jsonl"
        shared = self.folder / f"cand_pool/local/mbeir_{unit}_cand_pool.jsonl"
        return per_split if per_split.is_file() else shared

    def queries(self, unit: str, split: str) -> Records[Query]:
        """Queries of one unit in file order."""
        return Records(self.query_path(unit, split), parse_query)

    def union_train(self) -> Records[Query]:
        """The default training file; up-sampled sets repeat whole rows, so qids repeat."""
        return Records(self.union_train_path(), parse_query)

    def matching(self, patterns: Sequence[str], split: str) -> list[str]:
        """Units of a split by name or pattern ("*_task4"), in the order of `units`.

        Raises:
            ElvaDataError: a pattern that no unit matches.
        """
        units = self.units(split)
        if lost := [pattern for pattern in patterns if not fnmatch.filter(units, pattern)]:
            raise ElvaDataError(f"{self.folder}: no {split} unit matches {lost}; it has {units}")
        return [unit for unit in units if any(fnmatch.fnmatch(unit, pattern) for pattern in patterns)]

    def trained_rows(self, excluded: Sequence[str] = ()) -> np.ndarray:
        """Rows of the union train file but those of the excluded units, told by dataset and task.

        Args:
            excluded: names or patterns of test units.
        """
        queries = self.union_train()
        trained = np.ones(len(queries), bool)
        for unit in self.matching(excluded, "test"):
            first = self.queries(unit, "test")[0]
            same_dataset = queries.ids // QUERY_ID_BASE == split_id(first.qid)[0]
            trained &= ~(same_dataset & (queries.kinds == first.task))
        return np.flatnonzero(trained)

    def pool(self, unit: str, split: str, pool: str = "local") -> Pool:
        """Candidates of a pool in file order. Raises ElvaDataError on a repeated did."""
        return Pool(self.pool_path(unit, split, pool))

    def qrels(self, unit: str, split: str) -> dict[str, dict[str, int]]:
        """qid -> {did: relevance} of the lines with relevance above 0."""
        path, out = self.qrels_path(unit, split), {}
        for number, _, line in read_lines(path):
            qid, did, relevance, _ = judgement(path, number, line)
            if relevance > 0:
                out.setdefault(qid, {})[did] = relevance
        return out

    def write_queries(self, unit: str, split: str, queries: Sequence[Query]) -> None:
        """Query file and qrels of a unit.

        Five columns "qid 0 did 1 task", positives only, in the order of pos_cand_list.
        """
        write_records(self.query_path(unit, split), queries)
        lines = (f"{q.qid} 0 {did} 1 {q.task}\n" for q in queries for did in q.positives)
        _write(self.qrels_path(unit, split), lines)

    def write_global_pool(self, split: str, candidates: Iterable[Candidate]) -> None:
        """Every candidate once, in the order of the dids."""
        once = {c.did: c for c in candidates}
        write_records(self.pool_path("", split, "global"), (once[did] for did in sorted(once, key=split_id)))

    @cached_property
    def instructions(self) -> dict[tuple[int, str, str], tuple[str, ...]]:
        """(dataset id, query modality, candidate modality) -> up to four prompts.

        Columns are read by position.
        """
        path = self.folder / "instructions/query_instructions.tsv"
        if not path.is_file():
            raise ElvaDataError(f"{path} is missing; it holds the prompts of every dataset and modality pair")
        table = {}
        for number, _, raw in read_lines(path):
            cells = raw.decode("utf-8", "replace").strip().split("\t")
            prompts = tuple(c.strip() for c in cells[4:8] if c.strip())
            if number == 1:
                continue  # the header's names are never read
            if len(cells) < 5 or not re.fullmatch("[0-9]{1,6}", cells[3]) or not prompts:
                raise ElvaDataError(
                    f"{path}:{number}: expected 3 names, a dataset id and 1 to 4 prompts, tab-separated"
                )
            try:
                table[int(cells[3]), parse_modality(cells[0]), parse_modality(cells[1])] = prompts
            except ElvaDataError as error:
                raise ElvaDataError(f"{path}:{number}: {error}") from None
        return table

    def instruction(
        self, query: Query, *, seed: int = 0, scope: str = "", prompt_index: int | None = None
    ) -> str:
        """The instruction of a query, normalised.

        Args:
            seed, scope: the prompt is chosen by a stable hash of (seed, scope, qid), so a score never
                depends on the number of workers; scope is "split/unit" or "train/step".
            prompt_index: take this prompt instead (modulo the number there is).
        """
        key = (split_id(query.qid)[0], query.modality, MODALITIES_OF.get(query.task, "??")[1])
        if key not in self.instructions:
            raise ElvaDataError(
                f"no instruction for (dataset, query, candidate) = {key} in {self.folder}/instructions"
            )
        prompts = self.instructions[key]
        index = stable_hash(seed, scope, query.qid) if prompt_index is None else prompt_index
        return normalise(prompts[index % len(prompts)])

    def image_path(self, relative: str) -> Path:
        """Absolute path of an image named in a record; a symbolic link in the root may lead anywhere.

        Raises:
            ElvaDataError: the name itself is absolute or holds "..".
        """
        name = Path(relative)
        if name.is_absolute() or ".." in name.parts or "\0" in relative:
            raise ElvaDataError(
                f"image path {relative!r} leaves the root {self.folder}; paths are relative to the root, "
                'without ".."'
            )
        return self.folder.resolve() / name

    def image_file(self, relative: str) -> Path:
        """The same of an image that is there.

        Raises:
            ElvaDataError: it is missing, too.
        """
        path = self.image_path(relative)
        if not path.is_file():
            raise ElvaDataError(f"image {path} is missing; restore the file or drop the record")
        return path


def stable_hash(*parts: object) -> int:
    """A non-negative 60-bit integer that is the same in every process and on every machine."""
    text = "\x1f".join(map(str, parts)).encode()
    return int(hashlib.sha256(text).hexdigest()[:15], 16)
