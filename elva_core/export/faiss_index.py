"""A pool's embeddings as files that others read: parquet, a FAISS index, a manifest; whole or not at all.

index.write(encoder, answers.of_unit(encoder, root, unit, batch=64), Path("index"))
pool = index.opened(Path("index"), encoder)         # searched without embedding it again
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elva_core.data import mbeir
from elva_core.export import hub
from elva_core.models.encoder import Encoder, lineage
from elva_core.retrieval.pool import Pool

CANDIDATES, FAISS, MANIFEST = "candidates.parquet", "index.faiss", "manifest.json"
ROWS = 8192  # of a row group: what search.py reads at once
KEYS = {"model", "encoder", "template", "unit", "pool", "dim", "count", "bytes", "made_from"}


def write(loaded: Encoder, pool: Pool, to: Path) -> list[str]:
    """The index of a pool; the manifest is written last, then the folder gets its name.

    candidates.parquet: did, modality, text, image (relative to the root), vector (D float32, unit length), in pool order.
    index.faiss: IndexFlatIP under an IndexIDMap; ids are UniIR's integers, mbeir.unhashed_candidate_id gives the did.

    Returns:
        the names of the files; without index.faiss where faiss is not installed.

    Raises:
        PublishError: the target holds something else.
    """
    with hub.whole_folder(to, MANIFEST) as partial:
        partial.mkdir(parents=True)
        dim = int(pool.vectors[:1].shape[1])
        _write_parquet(pool, dim, partial / CANDIDATES)
        if importlib.util.find_spec("faiss"):
            _write_faiss(pool, dim, partial / FAISS)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        places = {"model": loaded.source, "root": pool.root.folder if pool.root else ""}
        content = {
            **_reader(loaded),
            "template": pool.template,
            "unit": pool.unit,
            "pool": pool.kind,
            "dim": dim,
            "count": len(pool.candidates),
            "bytes": sizes,
            "made_from": {name: _relative(place, to) for name, place in places.items()},
        }
        (partial / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [*sizes, MANIFEST]


def _reader(loaded: Encoder) -> dict:
    """What the vectors of a model depend on, beside the template."""
    return {
        "model": (lineage(loaded.source) or [{}])[-1],
        "encoder": loaded.settings.model_dump(exclude={"cache_vision"}),
    }


def _relative(place: str | Path, to: Path) -> str:
    """A folder as seen from the index, so that nothing names this machine; a hub name as it is."""
    return (
        os.path.relpath(Path(place).resolve(), to.resolve()) if place and Path(place).is_dir() else str(place)
    )


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
        if vectors.dtype == np.float16:  # unit length again, as search.exact has it
            vectors = vectors.astype(np.float32)
            vectors /= np.sqrt(np.vecdot(vectors, vectors))[:, None]
        yield pool.candidates[start : start + ROWS], vectors


def _write_parquet(pool: Pool, dim: int, path: Path) -> None:
    names = ("did", "modality", "text", "image")
    schema = pa.schema([*((name, pa.string()) for name in names), ("vector", pa.list_(pa.float32(), dim))])
    with pq.ParquetWriter(path, schema) as out:
        for candidates, vectors in _blocks(pool):
            columns = [pa.array([getattr(c, name) for c in candidates], pa.string()) for name in names]
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim))
            out.write_table(pa.Table.from_arrays(columns, schema=schema))


def _write_faiss(pool: Pool, dim: int, path: Path) -> None:
    import faiss

    index = faiss.IndexIDMap(faiss.IndexFlatIP(dim))
    for candidates, vectors in _blocks(pool):
        index.add_with_ids(
            vectors, np.array([mbeir.hashed_candidate_id(c.did) for c in candidates], np.int64)
        )
    faiss.write_index(index, str(path))


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
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if (
        not isinstance(found, dict)
        or not found.keys() >= KEYS
        or not all(isinstance(found[key], dict) for key in ("bytes", "made_from"))
    ):
        raise ValueError(f"{path} is not the manifest of an index; {remedy}")
    for name, size in found["bytes"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise ValueError(
                f"{folder / name} is missing or not the file that {MANIFEST} names ({size:,} bytes); export the index again"
            )
    return found


def opened(folder: Path, loaded: Encoder, root: mbeir.Root | None = None) -> Pool:
    """A written index as a pool to search, in any size of memory.

    Raises:
        ValueError: no whole index, or another model made it.
    """
    found, wanted = manifest(folder), _reader(loaded)
    if any(found[key] != wanted[key] for key in wanted):
        raise ValueError(
            f"{folder} was made by another model, or with other prompts, than {loaded.source}; give that model, or export anew"
        )
    file = pq.ParquetFile(folder / CANDIDATES)
    vectors, candidates = Vectors(file), Candidates(file)
    if len(vectors) != found["count"]:
        raise ValueError(
            f"{folder / CANDIDATES} has {len(vectors)} rows, the manifest says {found['count']}; export the index again"
        )
    return Pool(found["unit"], found["pool"], candidates, vectors, found["template"], root)


class Vectors:
    """(C, D) float32 rows of a parquet file; slices and row numbers give arrays, nothing else is in memory."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        counts = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        self._first = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, rows) -> np.ndarray:
        rows = np.arange(len(self))[rows]
        group = np.searchsorted(self._first, rows, side="right") - 1
        parts = {int(g): self._read(int(g)) for g in np.unique(group)}
        out = np.empty((len(rows), next(iter(parts.values())).shape[1] if parts else 0), np.float32)
        for g, vectors in parts.items():
            out[group == g] = vectors[rows[group == g] - self._first[g]]
        return out

    def _read(self, group: int) -> np.ndarray:
        column = self._file.read_row_group(group, columns=["vector"]).column("vector").combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1)


class Candidates(Sequence[mbeir.Candidate]):
    """The candidates of a parquet file, read when they are asked for."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def __getitem__(self, place):
        row = range(len(self))[place]
        if isinstance(row, range):
            return [self[i] for i in row]
        group, left = 0, row
        while left >= (size := self._file.metadata.row_group(group).num_rows):
            group, left = group + 1, left - size
        found = (
            self._file.read_row_group(group, columns=["did", "modality", "text", "image"])
            .slice(left, 1)
            .to_pylist()[0]
        )
        return mbeir.Candidate(found["did"], found["text"], found["image"], found["modality"])
