"""A pool's embeddings as files that others read: parquet, a FAISS index, a manifest; whole or not at all.

The FAISS index holds float32, int8 (a byte a number) or binary vectors (the signs). What the latter two find
first is scored again with the float32 vectors of the parquet file, which stay on disk.

faiss_index.write(encoder, pool.of_unit(encoder, root, unit, batch=64), Path("index"))
pool = faiss_index.opened(Path("index"), encoder)         # searched without embedding it again
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from elva_core.data import mbeir
from elva_core.export import hub
from elva_core.models.encoder import Encoder
from elva_core.models.lineage import lineage
from elva_core.retrieval import metrics, search
from elva_core.retrieval.pool import Pool
from elva_core.retrieval.retriever import Embedded
from elva_core.tables import markdown_table

CANDIDATES, FAISS, MANIFEST, README = "candidates.parquet", "index.faiss", "manifest.json", "README.md"
RESCORED = 4  # times the answers are scored again with float32; as sentence-transformers' examples do
CUTOFFS = (1, 5, 10)  # of hit rates in the README
COLUMNS = ["did", "modality", "text", "image"]  # of a candidate
ROWS = 8192  # of a row group: what search.py reads at once
KEYS = {"model", "encoder", "template", "unit", "pool", "dim", "count", "bytes", "made_from"}


def write(
    loaded: Encoder, pool: Pool, to: Path, *, precision: str = "float32", judged: Embedded | None = None
) -> list[str]:
    """The index of a pool; the manifest is written last, then the folder gets its name.

    candidates.parquet: did, modality, text, image (relative to the root), vector (D float32, unit length), in
    pool order. index.faiss: an IndexFlatIP, IndexScalarQuantizer or IndexBinaryFlat under an IndexIDMap; ids
    are UniIR's integers, mbeir.unhashed_candidate_id gives the did.

    Args:
        precision: float32, int8 or binary; the latter two get a README.md with their size beside float's.
        judged: queries of the pool's unit, whose hit rates the README shows, too.

    Returns:
        the names of the files; without index.faiss where faiss is not installed.

    Raises:
        PublishError: the target holds something else. ValueError: int8 or binary without faiss.
    """
    has_faiss = importlib.util.find_spec("faiss") is not None
    if precision != "float32" and not has_faiss:
        raise ValueError(
            f"{precision} vectors are an index of faiss, which is not installed; pip install faiss-cpu"
        )
    with hub.whole_folder(to, MANIFEST) as partial:
        partial.mkdir(parents=True)
        dim = int(pool.vectors[:1].shape[1])
        _write_parquet(pool, dim, partial / CANDIDATES)
        if has_faiss:
            index = _write_faiss(pool, dim, partial / FAISS, precision)
        if precision != "float32":
            readme = _readme(pool, precision, comparison(pool, index, precision, judged))
            (partial / README).write_text(readme, encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        places = {"model": loaded.source, "root": pool.root.folder if pool.root else ""}
        content = {
            **_reader(loaded),
            "template": pool.template,
            "unit": pool.unit,
            "pool": pool.kind,
            "precision": precision,
            "dim": dim,
            "count": len(pool.candidates),
            "bytes": sizes,
            "made_from": {name: _relative(place, to) for name, place in places.items()},
        }
        (partial / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [*sizes, MANIFEST]


def _reader(loaded: Encoder) -> dict:
    """Record of all that a model's vectors depend on, beside the template."""
    return {
        "model": (lineage(loaded.source) or [{}])[-1],
        "encoder": loaded.settings.model_dump(exclude={"cache_vision"}),
    }


def _relative(place: str | Path, to: Path) -> str:
    """A folder as seen from the index, so that nothing names this machine; a hub name as it is."""
    is_folder = place and Path(place).is_dir()
    return os.path.relpath(Path(place).resolve(), to.resolve()) if is_folder else str(place)


def place_of(folder: Path, place: str) -> Path | None:
    """Inverse of `_relative`: where a folder that an index was made from is now, None if it is not there."""
    path = Path(os.path.normpath(folder.resolve() / place))
    return path if place and path.is_dir() else None


def made_from(
    index: Path, model: Path | None, root: Path | None, unit: str | None
) -> tuple[Path, Path | None]:
    """Model and root of a built index; what is given goes before what its manifest says.

    Raises:
        ValueError: it is an index of another unit, or its model is not there.
    """
    written = manifest(index)
    if unit not in (None, written["unit"]):
        raise ValueError(
            f"{index} is an index of {written['unit']}, not of {unit}; "
            "leave --unit out, or export that unit's index"
        )
    places = written["made_from"]
    model = model or place_of(index, places["model"])
    if model is None:
        raise ValueError(
            f"{index} was made by {places['model']}, which is not there; say where it is with --model DIR"
        )
    return model, root or place_of(index, places["root"])


def _blocks(pool: Pool) -> Iterator[tuple[list[mbeir.Candidate], np.ndarray]]:
    for start in range(0, len(pool.candidates), ROWS):
        vectors = np.asarray(pool.vectors[start : start + ROWS])
        yield pool.candidates[start : start + ROWS], search.unit_rows(vectors, "pool row", start)


def _write_parquet(pool: Pool, dim: int, path: Path) -> None:
    fields = [(name, pa.string()) for name in COLUMNS]
    schema = pa.schema([*fields, ("vector", pa.list_(pa.float32(), dim))])
    with pq.ParquetWriter(path, schema) as out:
        for candidates, vectors in _blocks(pool):
            columns = [pa.array([getattr(c, name) for c in candidates], pa.string()) for name in COLUMNS]
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim))
            out.write_table(pa.Table.from_arrays(columns, schema=schema))


def _write_faiss(pool: Pool, dim: int, path: Path, precision: str):
    """Writes index.faiss and returns it."""
    import faiss

    if precision == "binary":
        index = faiss.IndexBinaryIDMap(faiss.IndexBinaryFlat(-(-dim // 8) * 8))
    elif precision == "int8":
        flat = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        # it learns the range of each number, which two rows give without all vectors in memory
        ends = [(vectors.min(0), vectors.max(0)) for _, vectors in _blocks(pool)]
        low, high = zip(*ends, strict=True)
        flat.train(np.stack([np.min(low, 0), np.max(high, 0)]))
        index = faiss.IndexIDMap(flat)
    else:
        index = faiss.IndexIDMap(faiss.IndexFlatIP(dim))
    for candidates, vectors in _blocks(pool):
        ids = np.array([mbeir.hashed_candidate_id(c.did) for c in candidates], np.int64)
        index.add_with_ids(np.packbits(vectors > 0, axis=1) if precision == "binary" else vectors, ids)
    (faiss.write_index_binary if precision == "binary" else faiss.write_index)(index, str(path))
    return index


def _nearest(index, precision: str, queries: np.ndarray, k: int) -> np.ndarray:
    """(Q, k) pool rows, best first, as the index alone ranks them.

    Args:
        index: with ids, in the order of the pool. queries: (Q, D) float32.
    """
    queries = np.packbits(queries > 0, axis=1) if precision == "binary" else queries
    return index.index.search(queries, k)[1]


def _first(index, precision: str, queries: np.ndarray, k: int) -> np.ndarray:
    """`Pool.first` of an index: rows of the candidates that are scored again for k answers."""
    return np.sort(_nearest(index, precision, queries, min(RESCORED * k, index.ntotal)))


def comparison(pool: Pool, index, precision: str, judged: Embedded | None) -> pd.DataFrame:
    """Bytes per vector in memory of float32 and of an index, and where there are judged queries hit rates.

    Columns: vectors, bytes per vector, hit@k in percent; rows: float32, the index alone, and with the first
    candidates scored again.
    """
    k = min(max(CUTOFFS), len(pool.candidates))
    again = f"{precision}, first {min(RESCORED * k, len(pool.candidates))} scored again with float32"
    size = index.index.code_size if precision == "binary" else index.index.sa_code_size()
    table = pd.DataFrame({"vectors": ["float32", precision, again]})
    table["bytes per vector"] = [4 * pool.vectors[:1].shape[1], size, size]
    if judged is None:
        return table
    queries = search.Prefixes(judged.query_vectors, pool.vectors[:1].shape[1])[:]
    first = _first(index, precision, queries, k)
    scored = zip(queries, first, strict=True)
    rows = {
        "float32": search.exact(queries, pool.vectors, k).rows,
        precision: _nearest(index, precision, queries, k),
        again: [chosen[search.exact(q[None], pool.vectors[chosen], k).rows[0]] for q, chosen in scored],
    }
    for cutoff in (c for c in CUTOFFS if c <= k):
        table[f"hit@{cutoff}"] = [_hits(rows[name], judged.relevant, cutoff) for name in table["vectors"]]
    return table


def _hits(rows: Sequence, relevant: list[list[int]], k: int) -> float:
    """Share of queries, in percent, with a relevant row among the first k of their ranked rows (Q, K)."""
    pairs = zip(rows, relevant, strict=True)
    ranks = [[n for n, row in enumerate(ranked, 1) if row in judged] for ranked, judged in pairs]
    return 100 * metrics.hit_rate_at_k(ranks, k).mean()


def _readme(pool: Pool, precision: str, table: pd.DataFrame) -> str:
    read, query = "read_index", "queries"
    if precision == "binary":
        read, query = "read_index_binary", "np.packbits(queries > 0, axis=1)"
    dim = pool.vectors[:1].shape[1]
    return f"""# {pool.unit}, {pool.kind} pool: {len(pool.candidates):,} candidates, {precision}

{markdown_table(table)}
Hit rates in percent, where the queries of the unit are judged. `{FAISS}` is what a search keeps in memory;
`{CANDIDATES}` has the float32 vectors, from which the first candidates are scored again, on disk.
`python -m elva_core search --index .` does both. Without it, for queries (Q, {dim}) of unit length:

```python
_, ids = faiss.{read}("{FAISS}").search({query}, 40)  # 10_000_000 * dataset + number of a did
```
"""


def manifest(folder: Path) -> dict:
    """The manifest of an index.

    Raises:
        ValueError: no index, or one of its files is missing or not whole.
    """
    remedy = (
        "make one with: python -m elva_core export --index --model DIR --root ROOT --unit UNIT --to FOLDER"
    )
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is no index, {MANIFEST} is missing; {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        complete = content.keys() >= KEYS and content["bytes"].keys() and content["made_from"].keys()
    except (ValueError, AttributeError):  # no JSON, or something else than a table where one belongs
        complete = False
    if not complete:
        raise ValueError(f"{path} is not the manifest of an index; {remedy}")
    for name, size in content["bytes"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise ValueError(
                f"{folder / name} is missing or not the file that {MANIFEST} names ({size:,} bytes); "
                "export the index again"
            )
    return content


def opened(folder: Path, loaded: Encoder, root: mbeir.Root | None = None) -> Pool:
    """A written index as a pool to search, in any size of memory.

    Raises:
        ValueError: no whole index, or another model made it.
    """
    content, reader = manifest(folder), _reader(loaded)
    if any(content[key] != value for key, value in reader.items()):
        raise ValueError(
            f"{folder} was made by another model, or with other prompts, than {loaded.source}; "
            "give that model, or export anew"
        )
    file = pq.ParquetFile(folder / CANDIDATES)
    vectors, candidates = Vectors(file), Candidates(file)
    if len(vectors) != content["count"]:
        raise ValueError(
            f"{folder / CANDIDATES} has {len(vectors)} rows, the manifest says {content['count']}; "
            "export the index again"
        )
    # without an index search is exact, with the float32 vectors
    first, precision = None, content.get("precision", "float32")
    if precision != "float32" and importlib.util.find_spec("faiss"):
        import faiss

        read = faiss.read_index_binary if precision == "binary" else faiss.read_index
        first = functools.partial(_first, read(str(folder / FAISS)), precision)
    return Pool(content["unit"], content["pool"], candidates, vectors, content["template"], root, first)


class _Rows:
    """Rows of a parquet file, which are read when they are asked for: one row group at a time."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _taken(self, rows: np.ndarray, columns: list[str]) -> pa.Table:
        """Columns of rows (N,), in their order."""
        group = np.searchsorted(self._starts, rows, side="right") - 1
        parts = [pa.schema([self._file.schema_arrow.field(name) for name in columns]).empty_table()]
        for number in np.unique(group).tolist():
            table = self._file.read_row_group(number, columns=columns)
            parts.append(table.take(rows[group == number] - self._starts[number]))
        return pa.concat_tables(parts).take(group.argsort(kind="stable").argsort())


class Vectors(_Rows):
    """(C, D) float32 rows of a parquet file, on disk until slices or row numbers ask for arrays."""

    def __getitem__(self, rows) -> np.ndarray:
        column = self._taken(np.arange(len(self))[rows], ["vector"])["vector"].combine_chunks()
        return column.flatten().to_numpy().reshape(-1, column.type.list_size)


class Candidates(_Rows, Sequence[mbeir.Candidate]):
    """The candidates of a parquet file, read when they are asked for."""

    def __getitem__(self, place):
        rows = np.arange(len(self))[place]
        table = self._taken(np.atleast_1d(rows), COLUMNS).to_pylist()
        candidates = [mbeir.Candidate(c["did"], c["text"], c["image"], c["modality"]) for c in table]
        return candidates if rows.ndim else candidates[0]
