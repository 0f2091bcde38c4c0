"""The M-BEIR layout: records, reader, writer and linter of a root folder.

Owns every rule of the format (schema, ids, prompts, file names). A root may hold any dataset names and ids.

    root = Root(Path("outputs/smoke/10_prepare_data/root"))
    for query in root.queries("emoji_task0", "test"): ...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

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
CANDIDATE_MODALITY = {task: pair[1] for pair, task in TASKS.items()}
# The sixteen official units in the column order of ELVA Table 1, with the cut-off each is reported at.
OFFICIAL_UNITS = {
    "visualnews_task0": 5, "mscoco_task0": 5, "fashion200k_task0": 10, "webqa_task1": 5,
    "edis_task2": 5, "webqa_task2": 5, "visualnews_task3": 5, "mscoco_task3": 5,
    "fashion200k_task3": 10, "nights_task4": 5, "oven_task6": 5, "infoseek_task6": 5,
    "fashioniq_task7": 10, "cirr_task7": 5, "oven_task8": 5, "infoseek_task8": 5,
}  # fmt: skip
MAX_ASPECT = 200  # Qwen2-VL's processor refuses more; M-BEIR holds images 51,200 px wide
MAX_PIXELS = 64_000_000


class ElvaDataError(ValueError):
    """Bad input data. The message says what is wrong, in which file and line, and what to do."""


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
    dataset, _, number = str(identifier).partition(":")
    # isascii: "²" and Arabic digits pass isdigit alone
    if not (identifier.isascii() and dataset.isdigit() and number.isdigit() and int(number) > 0):
        raise ElvaDataError(f'id {identifier!r} is not "dataset_id:n" with n counted from 1')
    return int(dataset), int(number)


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
        raise ElvaDataError(f"id {identifier!r}: n must stay below {base:,}, else it spills into dataset {dataset + 1}")
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
    """Grains (kind, text) that a root carries in *_src_content as {"grains": [[kind, text], ...]}; [] if it has none."""
    return [(str(kind), str(text)) for kind, text in record.source.get("grains", [])]


def caption(record: Query | Candidate) -> str:
    """The grains as one phrase, normalised."""
    return normalise(" ".join(text for _, text in grains(record)))


def _modality(value: object) -> str:
    return "image,text" if value == "text,image" else str(value)


def _source(value: object) -> dict:
    """The *_src_content field is a JSON document inside a JSON string."""
    if isinstance(value, str) and value:
        value = json.loads(value)
    return value if isinstance(value, dict) else {}


def _ids(values: object) -> tuple[str, ...]:
    """did strings; the dataset card shows objects with a "did" key, so both forms are read."""
    return tuple(str(v["did"] if isinstance(v, dict) else v) for v in values or ())  # type: ignore[union-attr]


def _optional_text(record: dict, key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise ElvaDataError(f"{key} is {type(value).__name__}, expected a string or null")
    return value


def parse_query(record: dict) -> Query:
    """A query record from one JSON object; tolerant of absent keys, strict about types."""
    query = Query(
        qid=str(record["qid"]),
        text=_optional_text(record, "query_txt"),
        image=_optional_text(record, "query_img_path"),
        modality=_modality(record["query_modality"]),
        positives=_ids(record.get("pos_cand_list")),
        negatives=_ids(record.get("neg_cand_list")),
        task=int(record["task_id"]),
        source=_source(record.get("query_src_content")),
    )
    split_id(query.qid)
    return query


def parse_candidate(record: dict) -> Candidate:
    """A candidate record from one JSON object."""
    candidate = Candidate(
        did=str(record["did"]),
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


def read_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, JSON object) of a JSONL file, streamed.

    Raises:
        ElvaDataError: missing file, or a line that is not a JSON object; names file and line.
    """
    if not path.is_file():
        raise ElvaDataError(f"{path} is missing; an M-BEIR root needs it, check the unit and split")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ElvaDataError(f"{path}:{number}: not a JSON object ({error}); repair or remove the line") from None
            if not isinstance(record, dict):
                raise ElvaDataError(f"{path}:{number}: {type(record).__name__} instead of a JSON object")
            yield number, record


def _parsed(path: Path, parse) -> Iterator[tuple[int, Query | Candidate]]:
    for number, record in read_lines(path):
        try:
            yield number, parse(record)
        except ElvaDataError as error:
            raise ElvaDataError(f"{path}:{number}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            reason = f"key {error} is missing" if isinstance(error, KeyError) else error
            raise ElvaDataError(f"{path}:{number}: {reason}") from None


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
        names = [p.name[len("mbeir_") : -len(f"_{split}.jsonl")] for p in self.query_path("*", split).parent.glob(f"mbeir_*_{split}.jsonl")]
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
        return per_split if per_split.is_file() else self.folder / f"cand_pool/local/mbeir_{unit}_cand_pool.jsonl"

    def queries(self, unit: str, split: str) -> list[Query]:
        """Queries of one unit in file order; every positive must be judged for the task its modalities imply."""
        return [query for _, query in _parsed(self.query_path(unit, split), parse_query)]

    def union_train(self) -> list[Query]:
        """The default training file; up-sampled sets repeat whole rows, so qids repeat."""
        return [query for _, query in _parsed(self.union_train_path(), parse_query)]

    def pool(self, unit: str, split: str, pool: str = "local") -> list[Candidate]:
        """Candidates of a pool in file order. Raises ElvaDataError on a repeated did."""
        path, seen, out = self.pool_path(unit, split, pool), set(), []
        for number, candidate in _parsed(path, parse_candidate):
            if candidate.did in seen:
                raise ElvaDataError(f"{path}:{number}: did {candidate.did} occurs twice in one pool")
            seen.add(candidate.did)
            out.append(candidate)
        return out

    def qrels(self, unit: str, split: str) -> dict[str, dict[str, int]]:
        """qid -> {did: relevance} of the lines with relevance above 0; the fifth column is the task."""
        path = self.qrels_path(unit, split)
        if not path.is_file():
            raise ElvaDataError(f"{path} is missing; an M-BEIR root needs one qrels file per unit and split")
        out: dict[str, dict[str, int]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            cells = line.split()
            if len(cells) not in (4, 5) or not cells[3].lstrip("-").isdecimal():
                raise ElvaDataError(f'{path}:{number}: expected "qid 0 did relevance task", found {line[:80]!r}')
            if int(cells[3]) > 0:
                out.setdefault(cells[0], {})[cells[2]] = int(cells[3])
        return out

    @cached_property
    def instructions(self) -> dict[tuple[int, str, str], tuple[str, ...]]:
        """(dataset id, query modality, candidate modality) -> up to four prompts. Columns are read by position."""
        path = self.folder / "instructions/query_instructions.tsv"
        if not path.is_file():
            raise ElvaDataError(f"{path} is missing; it holds the prompts of every dataset and modality pair")
        table = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
            cells = line.strip().split("\t")
            prompts = tuple(c.strip() for c in cells[4:8] if c.strip())
            if len(cells) < 5 or not cells[3].isdecimal() or not prompts:
                raise ElvaDataError(f"{path}:{number}: expected 3 names, a dataset id and 1 to 4 prompts, tab-separated")
            table[int(cells[3]), _modality(cells[0]), _modality(cells[1])] = prompts
        return table

    def query_text(self, query: Query, *, seed: int = 0, scope: str = "", prompt_index: int | None = None) -> str:
        """Instruction plus query text, normalised as UniIR and LamRA do (4.2).

        Args:
            seed, scope: the prompt is chosen by a stable hash of (seed, scope, qid), so a score never
                depends on the number of workers; scope is "split/unit" or "train/step".
            prompt_index: take this prompt instead (modulo the number there is).
        """
        key = (split_id(query.qid)[0], query.modality, CANDIDATE_MODALITY.get(query.task, "?"))
        if key not in self.instructions:
            raise ElvaDataError(f"no instruction for (dataset, query, candidate) = {key} in {self.folder}/instructions")
        prompts = self.instructions[key]
        index = stable_hash(seed, scope, query.qid) if prompt_index is None else prompt_index
        return normalise(normalise(prompts[index % len(prompts)]) + " " + (query.text or ""))

    def image_path(self, relative: str) -> Path:
        """Absolute path of an image named in a record. Raises ElvaDataError if it leaves the root."""
        path = (self.folder / relative).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise ElvaDataError(f"image path {relative!r} leaves the root {self.folder}; paths are relative to the root")
        return path


def stable_hash(*parts: object) -> int:
    """A non-negative 60-bit integer that is the same in every process and on every machine."""
    text = "\x1f".join(map(str, parts)).encode()
    return int(hashlib.sha256(text).hexdigest()[:15], 16)


def open_image(path: Path) -> Image.Image:
    """An RGB image, decoded in full; transparency becomes white.

    Raises:
        ElvaDataError: missing, truncated, not an image, too large, or too elongated.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if max(width, height) > MAX_ASPECT * min(width, height) or width * height > MAX_PIXELS:
                raise ElvaDataError(f"image {path} is {width}x{height}; crop it below {MAX_PIXELS:,} pixels and aspect {MAX_ASPECT}")
            if image.mode == "RGB":
                return image.copy()
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except FileNotFoundError:
        raise ElvaDataError(f"image {path} is missing; restore the file or drop the record") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ElvaDataError):
            raise
        raise ElvaDataError(f"image {path} cannot be decoded ({error}); replace the file") from None


def lint(root: Root, splits: Sequence[str] = ("train", "val", "test"), *, decode_images: bool = True) -> list[str]:
    """Every violation of mbeir_format.md 3.7, each as "file:line: what is wrong". An empty list is a clean root."""
    problems: list[str] = []
    images: dict[str, str] = {}
    try:
        prompts = root.instructions
    except ElvaDataError as error:
        problems.append(str(error))
        prompts = {}
    for split in splits:
        everything = {}
        path = root.pool_path("", split, "global")
        if root.units(split):
            everything = _lint_pool(root, path, problems, images, decode_images)
        for unit in root.units(split):
            local_path = path if split == "train" else root.pool_path(unit, split)
            local = everything if split == "train" else _lint_pool(root, local_path, problems, images, decode_images)
            if split != "train" and len(local) < OFFICIAL_UNITS.get(unit, 5):
                problems.append(f"{local_path}: {len(local)} candidates are fewer than the reported cut-off k")
            _lint_queries(root, unit, split, local, everything, prompts, problems, images, decode_images)
    if "train" in splits and root.union_train_path().is_file():
        try:
            root.union_train()
        except ElvaDataError as error:
            problems.append(str(error))
    return problems


def _lint_content(root: Root, where: str, text, image, modality, problems, images, decode: bool) -> None:
    if modality not in MODALITIES:
        problems.append(f"{where}: modality {modality!r} is none of {MODALITIES}")
        return
    if ("text" in modality) != bool(text):
        problems.append(f"{where}: modality {modality} but text is {text!r}")
    if ("image" in modality) != bool(image):
        problems.append(f"{where}: modality {modality} but image path is {image!r}")
    if image and image not in images:
        images[image] = where
        try:
            path = root.image_path(image)
            if decode:
                open_image(path)
            elif not path.is_file():
                raise ElvaDataError(f"image {path} is missing; restore the file or drop the record")
        except ElvaDataError as error:
            problems.append(f"{where}: {error}")


def _lint_pool(root: Root, path: Path, problems: list[str], images: dict, decode: bool) -> dict[str, Candidate]:
    seen: dict[str, Candidate] = {}
    try:
        for number, candidate in _parsed(path, parse_candidate):
            where = f"{path}:{number}"
            if candidate.did in seen:
                problems.append(f"{where}: did {candidate.did} occurs twice in one pool")
            seen[candidate.did] = candidate
            try:
                hashed_candidate_id(candidate.did)
            except ElvaDataError as error:
                problems.append(f"{where}: {error}")
            _lint_content(root, where, candidate.text, candidate.image, candidate.modality, problems, images, decode)
    except ElvaDataError as error:
        problems.append(str(error))
    return seen


def _lint_queries(root, unit, split, local, everything, prompts, problems, images, decode) -> None:
    path, seen = root.query_path(unit, split), {}
    try:
        for number, query in _parsed(path, parse_query):
            where = f"{path}:{number}"
            if query.qid in seen:
                problems.append(f"{where}: qid {query.qid} occurs twice in one file")
            seen[query.qid] = query
            try:
                hashed_query_id(query.qid)
            except ElvaDataError as error:
                problems.append(f"{where}: {error}")
            _lint_content(root, where, query.text, query.image, query.modality, problems, images, decode)
            problems.extend(f"{where}: {message}" for message in _judge(query, local, everything, prompts))
    except ElvaDataError as error:
        problems.append(str(error))
    try:
        judged = {(qid, did) for qid, dids in root.qrels(unit, split).items() for did in dids}
    except ElvaDataError as error:
        problems.append(str(error))
        return
    listed = {(q.qid, did) for q in seen.values() for did in q.positives}
    for qid, did in sorted(judged ^ listed):
        side = "the qrels" if (qid, did) in judged else "pos_cand_list"
        problems.append(f"{root.qrels_path(unit, split)}: {qid} {did} is only in {side}")


def _judge(query: Query, local: dict, everything: dict, prompts: dict) -> Iterator[str]:
    dataset = split_id(query.qid)[0]
    if not query.positives:
        yield "pos_cand_list is empty"
        return
    if both := set(query.positives) & set(query.negatives):
        yield f"{sorted(both)} are positive and negative at once"
    for did in query.positives:
        own = did.startswith(f"{dataset}:")
        if own and did not in local:
            yield f"positive {did} is not in the local pool"
        if did not in everything:
            yield f"positive {did} is not in the global pool"
    wanted = {everything[did].modality for did in query.positives if did in everything}
    for modality in sorted(wanted):
        if TASKS.get((query.modality, modality)) != query.task:
            yield f"task_id {query.task} does not fit {query.modality} -> {modality}"
        if prompts and (dataset, query.modality, modality) not in prompts:
            yield f"no instruction for dataset {dataset}, {query.modality} -> {modality}"
