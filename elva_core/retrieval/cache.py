"""Embeddings on disk: float16 shards, looked up by the content of what was embedded.

A killed run goes on at the next shard. Processes that evaluate one model at once share a folder: each adds
shards of names that are its own.

store = Store(folder, encoder, batch=64, template="summary")
vectors = store(items)        # an array on disk in the order of `items`, read row by row where it is sliced
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from elva_core import distributed, files
from elva_core.data import mbeir
from elva_core.data.items import Item
from elva_core.models.encoder import Encoder
from elva_core.models.lineage import lineage
from elva_core.retrieval.retriever import encode, identity

EMBEDDINGS = files.OUTPUTS / "cache/embeddings"
SHARD = 16_384  # vectors of a file: 50 MB at 1,536 dimensions, minutes of work on one GPU


class Kept:
    """(N, D) float16 rows of several files, in any order, on disk until slices or row numbers ask for arrays.

    content: hash of the model and of what it embedded, in its order.
    """

    def __init__(self, files: list[Path], file: np.ndarray, row: np.ndarray, content: str) -> None:
        self._files, self._file, self._row, self.content = files, file, row, content

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, rows) -> np.ndarray:
        file, row, out = self._file[rows], self._row[rows], None
        for number in np.unique(file):
            shard = np.load(self._files[number], mmap_mode="r")
            out = np.empty((len(file), shard.shape[1]), shard.dtype) if out is None else out
            out[file == number] = shard[row[file == number]]
        return np.empty((0, 0), np.float16) if out is None else out


class Store:
    """Embeds every distinct item once, whichever unit or pool asks for it.

    Args:
        folder: shared by all models; each has its own folder by the hash of its weights, prompts and dtype.
    """

    def __init__(self, folder: Path, encoder: Encoder, *, batch: int, template: str) -> None:
        self._encoder, self._batch, self._template = encoder, batch, template
        self.key = mbeir.stable_hash(
            lineage(encoder.source), encoder.settings.model_dump_json(), encoder.backbone.dtype, template
        )
        self._folder = folder / f"{self.key:016x}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        """Reads which items the finished shards hold."""
        names = sorted(self._folder.glob("*.items.npy"))
        self._files = [path.with_name(path.name.replace(".items.", ".vectors.")) for path in names]
        items = [np.load(path) for path in names]
        self._items = np.concatenate([np.empty(0, np.int64), *items])
        self._file = np.repeat(np.arange(len(items)), [len(x) for x in items])
        self._row = np.concatenate([np.empty(0, np.int64), *(np.arange(len(x)) for x in items)])
        self._order = np.argsort(self._items, kind="stable")

    def __call__(self, items: Iterable[Item]) -> Kept:
        """Embeddings (N, D) of items in their order; what no shard holds is computed first, by shards."""
        source = iter(items)
        parts = iter(lambda: list(islice(source, SHARD)), [])
        names = np.concatenate([np.empty(0, np.int64), *map(self._ensure, parts)])
        place = self._order[np.searchsorted(self._items, names, sorter=self._order)]
        content = hashlib.sha256(f"{self.key}".encode() + names.tobytes()).hexdigest()
        return Kept(self._files, self._file[place], self._row[place], content)

    def _ensure(self, items: Sequence[Item]) -> np.ndarray:
        names = np.array([_name(item) for item in items], np.int64)
        missing = {int(names[i]): items[i] for i in np.flatnonzero(~np.isin(names, self._items))}
        if missing:
            new = list(missing.values())
            vectors, _ = encode(self._encoder, new, batch=self._batch, template=self._template)
            if distributed.processes().is_main_process:
                self._write(np.array(list(missing), np.int64), vectors.astype(np.float16))
            distributed.processes().wait_for_everyone()
            self._open()
        return names

    def _write(self, names: np.ndarray, vectors: np.ndarray) -> None:
        """The vectors, then the names: a shard without names does not exist."""
        # no two writers give a shard one name, or the names of one would stand beside vectors of the other
        shard = f"{len(self._files):06}-{uuid.uuid4().hex}"
        for kind, array in (("vectors", vectors), ("items", names)):
            with files.whole(self._folder / f"{shard}.{kind}.npy") as partial, partial.open("wb") as out:
                np.save(out, array)


def _name(item: Item) -> int:
    """60 bits for the parts of an item: among six million the chance of two alike is 16 in a million."""
    return mbeir.stable_hash(*identity(item))
