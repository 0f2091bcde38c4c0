"""The M-BEIR layout: records, reader and writer of a root folder.

Owns the format (schema, ids, prompts, file names); lint.py checks whole roots against its rules. A root may hold any
dataset names and ids. Files are read by byte offset, so a pool of millions never becomes millions of objects.

    root = Root(Path("outputs/smoke/10_prepare_data/root"))
    for query in root.queries("emoji_task0", "test"): ...
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np

from elva_core.files import ElvaDataError

QUERY_ID_BASE = 500_000
CANDIDATE_ID_BASE = 10_000_000
MODALITIES = ("text", "image", "image,text")
TASKS = {
    ("text", "image"): 0,
    ("text", "text"): 1,
    ("text", "image,text"): 2,
    ("image", "text"): 3,
    ("image", "image"): 4,
    ("image,text", "text"): 6,
    ("image,text", "image"): 7,
    ("image,text", "image,text"): 8,
}
MODALITIES_OF = {task: pair for pair, task in TASKS.items()}  # of query and candidate
CANDIDATE_MODALITY = {task: pair[1] for pair, task in TASKS.items()}
# The sixteen official units in the column order of ELVA Table 1, with the cut-off each is reported at.
OFFICIAL_UNITS = {
    "visualnews_task0": 5, "mscoco_task0": 5, "fashion200k_task0": 10, "webqa_task1": 5,
    "edis_task2": 5, "webqa_task2": 5, "visualnews_task3": 5, "mscoco_task3": 5,
    "fashion200k_task3": 10, "nights_task4": 5, "oven_task6": 5, "infoseek_task6": 5,
    "fashioniq_task7": 10, "cirr_task7": 5, "oven_task8": 5, "infoseek_task8": 5,
}  # fmt: skip
MAX_LINE = 16 * 2**20  # bytes; the longest candidate of M-BEIR has 60,546 characters
ID = re.compile(r"(\d{1,6}):([1-9]\d{0,8})", re.ASCII)
QRELS_LINE = re.compile(r"(\S+)\s+\S+\s+(\S+)\s+(-?\d{1,9})(?:\s+(\d{1,9}))?", re.ASCII)


def normalise(text: str | None) -> str:
    r"""FMT, the normaliser of every caption, query and prompt (mbeir_format.md 4.1). Not idempotent.

    >>> normalise("a dog"), normalise('"hello"  '), normalise(None), normalise("a\r\nb")
    ('A dog.', 'Hello.', '', 'A\nb.')
    """
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else text + "."


def split_id(identifier: str) -> tuple[int, int]:
    """Dataset id and running number of a qid or did "dataset:n".

    Raises:
        ElvaDataError: not of this form, or not positive.
    """
    found = ID.fullmatch(identifier)
    if not found:
        raise ElvaDataError(f'id {identifier[:80]!r} is not "dataset_id:n" with n counted from 1')
    return int(found[1]), int(found[2])


def hashed_query_id(qid: str) -> int:
    """UniIR's integer form of a qid: dataset * 500,000 + n. Fails where n would spill into the next dataset.

    >>> hashed_query_id("9:12"), hashed_candidate_id("9:12"), unhashed_candidate_id(90_000_012)
    (4500012, 90000012, '9:12')
    """
    return _hashed(qid, QUERY_ID_BASE)


def hashed_candidate_id(did: str) -> int:
    """UniIR's integer form of a did: dataset * 10,000,000 + n."""
    return _hashed(did, CANDIDATE_ID_BASE)


def unhashed_candidate_id(value: int) -> str:
    """Inverse of `hashed_candidate_id`. A negative value is FAISS's filler, never an id, and is refused."""
    if value < 0:
        raise ElvaDataError(f"candidate id {value}: a search returned fewer hits than asked for")
    return ":".join(map(str, divmod(value, CANDIDATE_ID_BASE)))


def _hashed(identifier: str, base: int) -> int:
    dataset, number = split_id(identifier)
    if number >= base:
        raise ElvaDataError(
            f"id {identifier!r}: n must stay below {base:,}, else it spills into dataset {dataset + 1}"
        )
    return dataset * base + number


@dataclass(frozen=True, slots=True)
class Query:
    """One query record. `text` and `image` are raw, not yet normalised; `image` is relative to the root."""

    qid: str
    text: str | None
    image: str | None
    modality: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    task: int
    source: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One candidate record. `image` is relative to the root."""

    did: str
    text: str | None
    image: str | None
    modality: str
    source: dict = field(default_factory=dict)


R = TypeVar("R", Query, Candidate)


def grains(record: Query | Candidate) -> list[tuple[str, str]]:
    """Grains (kind, text) that a root carries in *_src_content as {"grains": [[kind, text], ...]}; [] if it has none."""
    return [(str(kind), str(text)) for kind, text in record.source.get("grains", [])]


def masked(pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[tuple, str]]:
    """(its kind and all other grains, its text) of every grain: what differs in it alone has the same key."""
    for place, (kind, text) in enumerate(pairs):
        yield (kind, *pairs[:place], *pairs[place + 1 :]), text


def caption(record: Query | Candidate) -> str:
    """The grains as one phrase, normalised."""
    return normalise(" ".join(text for _, text in grains(record)))


def _modality(value: object) -> str:
    modality = "image,text" if value == "text,image" else str(value)
    if modality not in MODALITIES:
        raise ElvaDataError(f"modality {modality[:80]!r} is none of {MODALITIES}")
    return modality


def _source(value: object) -> dict:
    """The *_src_content field is a JSON document inside a JSON string."""
    if isinstance(value, str) and value:
        value = json.loads(value)
    source = value if isinstance(value, dict) else {}
    if not all(isinstance(g, list) and len(g) == 2 for g in source.get("grains", [])):
        raise ElvaDataError("grains in the source content are not [[kind, text], ...]")
    return source


def _ids(values: object, key: str) -> tuple[str, ...]:
    """did strings; the dataset card shows objects with a "did" key, so both forms are read."""
    if not isinstance(values, list | None):
        raise ElvaDataError(f"{key} is {type(values).__name__}, expected a list of dids")
    dids = tuple(v["did"] if isinstance(v, dict) else v for v in values or ())
    for did in dids:
        split_id(_text(did, key))
    return dids


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ElvaDataError(f"{key} is {type(value).__name__}, expected a string")
    value.encode()  # half of a surrogate pair passes JSON, and nothing after it
    return value


def _optional_text(record: dict, key: str) -> str | None:
    return None if record.get(key) is None else _text(record[key], key)


def _task(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value <= 8:
        raise ElvaDataError(f"task_id is {str(value)[:80]!r}, expected 0 to 8")
    return value


def parse_query(record: dict) -> Query:
    """A query record from one JSON object; tolerant of absent keys, strict about types."""
    query = Query(
        qid=_text(record["qid"], "qid"),
        text=_optional_text(record, "query_txt"),
        image=_optional_text(record, "query_img_path"),
        modality=_modality(record["query_modality"]),
        positives=_ids(record.get("pos_cand_list"), "pos_cand_list"),
        negatives=_ids(record.get("neg_cand_list"), "neg_cand_list"),
        task=_task(record["task_id"]),
        source=_source(record.get("query_src_content")),
    )
    split_id(query.qid)
    return query


def parse_candidate(record: dict) -> Candidate:
    """A candidate record from one JSON object."""
    candidate = Candidate(
        did=_text(record["did"], "did"),
        text=_optional_text(record, "txt"),
        image=_optional_text(record, "img_path"),
        modality=_modality(record["modality"]),
        source=_source(record.get("src_content")),
    )
    split_id(candidate.did)
    return candidate


def query_record(query: Query) -> dict:
    """The JSON object of a query, in the released key order."""
    return {
        "qid": query.qid,
        "query_txt": query.text,
        "query_img_path": query.image,
        "query_modality": query.modality,
        "query_src_content": json.dumps(query.source) if query.source else None,
        "pos_cand_list": list(query.positives),
        "neg_cand_list": list(query.negatives),
        "task_id": query.task,
    }


def candidate_record(candidate: Candidate) -> dict:
    """The JSON object of a candidate."""
    return {
        "txt": candidate.text,
        "img_path": candidate.image,
        "modality": candidate.modality,
        "did": candidate.did,
        "src_content": json.dumps(candidate.source) if candidate.source else None,
    }


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line) of a file, streamed.

    Raises:
        ElvaDataError: missing file, or a line that is too long to be a record; names file and line.
    """
    if not path.is_file():
        raise ElvaDataError(f"{path} is missing; an M-BEIR root needs it, check the unit and split")
    with path.open("rb") as lines:
        offset = 0
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                raise ElvaDataError(
                    f"{path}:{number}: the line has more than {MAX_LINE:,} bytes; repair or remove it"
                )
            yield number, offset, line
            offset += len(line)


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
    except ElvaDataError as error:
        raise ElvaDataError(f"{where}: {error}") from None
    except KeyError as error:
        raise ElvaDataError(f"{where}: key {error} is missing") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ElvaDataError(f"{where}: {error}") from None


def judgement(path: Path, number: int, line: bytes) -> tuple[str, str, int, int | None]:
    """(qid, did, relevance, task) of a qrels line; in TREC's four columns there is no task.

    Raises:
        ElvaDataError: another form, or no ids; names file and line.
    """
    found = QRELS_LINE.fullmatch(line.decode("utf-8", "replace").strip())
    if not found or not all(ID.fullmatch(found[i]) for i in (1, 2)):
        raise ElvaDataError(f'{path}:{number}: expected "qid 0 did relevance task", found {line[:80]!r}')
    return found[1], found[2], int(found[3]), int(found[4]) if found[4] else None


class Records(Sequence[R], Generic[R]):
    """The records of one file in its order, parsed when they are asked for; 25 bytes a record are in memory.

    ids: (N,) int64, hashed. kinds: (N,) int8, the task of a query, or the place of a candidate's modality in MODALITIES.
    Opening reads the file once and fails on the first line that is no record.
    """

    def __init__(self, path: Path, parse: Callable[[dict], R], hashed: Callable[[str], int]) -> None:
        self.path, self._parse = path, parse
        ids, kinds, offsets = array("q"), array("b"), array("q", [0])
        for number, offset, line in read_lines(path):
            record = parsed(path, number, line, parse)
            try:
                ids.append(hashed(record.qid if isinstance(record, Query) else record.did))
            except ElvaDataError as error:
                raise ElvaDataError(f"{path}:{number}: {error}") from None
            kinds.append(record.task if isinstance(record, Query) else MODALITIES.index(record.modality))
            offsets.append(offset + len(line))
        self.ids, self.kinds, self._offsets = (np.asarray(x) for x in (ids, kinds, offsets))

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> R: ...
    @overload
    def __getitem__(self, place: slice) -> list[R]: ...
    def __getitem__(self, place):
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
        super().__init__(path, parse_candidate, hashed_candidate_id)
        self._order = np.argsort(self.ids, kind="stable")
        ranked = self.ids[self._order]
        again = self._order[1:][ranked[1:] == ranked[:-1]]
        if len(again):
            row = int(again.min())
            raise ElvaDataError(f"{path}:{row + 1}: did {self[row].did} occurs twice in one pool")

    def row(self, did: str) -> int | None:
        """Row of a candidate, None if it is not in the pool."""
        wanted = hashed_candidate_id(did)
        place = int(np.searchsorted(self.ids, wanted, sorter=self._order))
        found = place < len(self) and self.ids[self._order[place]] == wanted
        return int(self._order[place]) if found else None

    def rows_of(self, modality: str) -> np.ndarray:
        """Rows of one modality, ascending."""
        return np.flatnonzero(self.kinds == MODALITIES.index(modality))


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """ASCII-escaped JSON, one object per line, each ended by a newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii", newline="\n") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)


def write_qrels(path: Path, queries: Iterable[Query]) -> None:
    """Five columns "qid 0 did 1 task", positives only, in the order of pos_cand_list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii", newline="\n") as out:
        out.writelines(f"{q.qid} 0 {did} 1 {q.task}\n" for q in queries for did in q.positives)


@dataclass(frozen=True)
class Root:
    """A folder in the M-BEIR layout (mbeir_format.md section 2)."""

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
        """Pool file of a unit. MSCOCO and emoji have one local pool per split, the other datasets one for all."""
        if pool == "global":
            return self.folder / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"
        per_split = self.folder / f"cand_pool/local/mbeir_{unit}_{split}_cand_pool.jsonl"
        return (
            per_split
            if per_split.is_file()
            else self.folder / f"cand_pool/local/mbeir_{unit}_cand_pool.jsonl"
        )

    def queries(self, unit: str, split: str) -> Records[Query]:
        """Queries of one unit in file order."""
        return Records(self.query_path(unit, split), parse_query, hashed_query_id)

    def union_train(self) -> Records[Query]:
        """The default training file; up-sampled sets repeat whole rows, so qids repeat."""
        return Records(self.union_train_path(), parse_query, hashed_query_id)

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
        """Rows of the union train file but those of the excluded units (names or patterns of test units), told by dataset and task."""
        queries = self.union_train()
        kept = np.ones(len(queries), bool)
        for unit in self.matching(excluded, "test"):
            first = self.queries(unit, "test")[0]
            kept &= (queries.ids // QUERY_ID_BASE != int(first.qid.split(":")[0])) | (
                queries.kinds != first.task
            )
        return np.flatnonzero(kept)

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

    @cached_property
    def instructions(self) -> dict[tuple[int, str, str], tuple[str, ...]]:
        """(dataset id, query modality, candidate modality) -> up to four prompts. Columns are read by position."""
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
                table[int(cells[3]), _modality(cells[0]), _modality(cells[1])] = prompts
            except ElvaDataError as error:
                raise ElvaDataError(f"{path}:{number}: {error}") from None
        return table

    def query_text(
        self, query: Query, *, seed: int = 0, scope: str = "", prompt_index: int | None = None
    ) -> str:
        """Instruction plus query text, normalised as UniIR and LamRA do (4.2).

        Args:
            seed, scope: the prompt is chosen by a stable hash of (seed, scope, qid), so a score never
                depends on the number of workers; scope is "split/unit" or "train/step".
            prompt_index: take this prompt instead (modulo the number there is).
        """
        key = (split_id(query.qid)[0], query.modality, CANDIDATE_MODALITY.get(query.task, "?"))
        if key not in self.instructions:
            raise ElvaDataError(
                f"no instruction for (dataset, query, candidate) = {key} in {self.folder}/instructions"
            )
        prompts = self.instructions[key]
        index = stable_hash(seed, scope, query.qid) if prompt_index is None else prompt_index
        return normalise(normalise(prompts[index % len(prompts)]) + " " + (query.text or ""))

    def image_path(self, relative: str) -> Path:
        """Absolute path of an image named in a record. Raises ElvaDataError if it leaves the root."""
        path = (self.folder / relative).resolve() if "\0" not in relative else None
        if path is None or not path.is_relative_to(self.folder.resolve()):
            raise ElvaDataError(
                f"image path {relative!r} leaves the root {self.folder}; paths are relative to the root"
            )
        return path


def stable_hash(*parts: object) -> int:
    """A non-negative 60-bit integer that is the same in every process and on every machine."""
    text = "\x1f".join(map(str, parts)).encode()
    return int(hashlib.sha256(text).hexdigest()[:15], 16)
