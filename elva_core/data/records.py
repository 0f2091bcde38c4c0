"""One row of an M-BEIR file: its ids, its text rules, queries and candidates, read and written.

query = parse_query(json.loads(line))
query_record(query)    # the JSON object again, in the released key order
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
ID = re.compile(r"(0|[1-9]\d{0,5}):([1-9]\d{0,8})", re.ASCII)  # one way to write each number


def normalise(text: str | None) -> str:
    r"""UniIR's normaliser of every caption, query and prompt. Not idempotent.

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
    match = ID.fullmatch(identifier)
    if not match:
        raise ElvaDataError(f'id {identifier[:80]!r} is not "dataset_id:n", n from 1, without leading zeros')
    return int(match[1]), int(match[2])


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


def grains(record: Query | Candidate) -> list[tuple[str, str]]:
    """Grains (kind, text) of *_src_content, {"grains": [[kind, text], ...]}; [] if it has none."""
    return [(str(kind), str(text)) for kind, text in record.source.get("grains", [])]


def masked(pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[tuple, str]]:
    """(its kind and all other grains, its text) of every grain: what differs in it alone has the same key."""
    for place, (kind, text) in enumerate(pairs):
        yield (kind, *pairs[:place], *pairs[place + 1 :]), text


def caption(record: Query | Candidate) -> str:
    """The grains as one phrase, normalised."""
    return normalise(" ".join(text for _, text in grains(record)))


def parse_modality(value: object) -> str:
    """One of MODALITIES; "text,image" is read as "image,text"."""
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
        modality=parse_modality(record["query_modality"]),
        positives=_ids(record.get("pos_cand_list"), "pos_cand_list"),
        negatives=_ids(record.get("neg_cand_list"), "neg_cand_list"),
        task=_task(record["task_id"]),
        source=_source(record.get("query_src_content")),
    )
    hashed_query_id(query.qid)
    return query


def parse_candidate(record: dict) -> Candidate:
    """A candidate record from one JSON object."""
    candidate = Candidate(
        did=_text(record["did"], "did"),
        text=_optional_text(record, "txt"),
        image=_optional_text(record, "img_path"),
        modality=parse_modality(record["modality"]),
        source=_source(record.get("src_content")),
    )
    hashed_candidate_id(candidate.did)
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
