"""Reader of benchmark files in their authors' formats.

It stops at the first problem, or goes on and keeps all of them.

files = Files(folder, strict=False)
path, records = files.read("data.json")
rows = files.rows(path, records, lambda number, record: text(record["caption"], "caption"))
files.problems
"""

from __future__ import annotations

import csv
import json
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

from elva_core.data import images, mbeir
from elva_core.files import ElvaDataError

MAX_BYTES = 2**31  # of one file; the largest, CC-Neg's, has some hundred million
R = TypeVar("R")


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of a CSV file as texts; the index says on which line a row ends. Blank lines are skipped.

    Raises:
        ElvaDataError: missing file, no CSV, a missing column, or a row with more or fewer cells than the
            header; names the line.
    """
    if not path.is_file():
        raise ElvaDataError(f"{path} is missing; put it there")
    rows: dict[int, list[str]] = {}  # by the line where they end
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for row in reader:
                if len(row) > 1 or "".join(row).strip():
                    rows[reader.line_num] = row
        except (ValueError, csv.Error) as error:
            place = f"{path}: not readable as CSV behind line {max(rows, default=0)}"
            raise ElvaDataError(f"{place} ({error}); repair it") from None
    header = rows.pop(min(rows, default=0), [])
    if missing := [column for column in columns if column not in header]:
        raise ElvaDataError(
            f"{path}: {missing} is missing; expected columns {list(columns)}, repair the header"
        )
    for line, row in rows.items():
        if len(row) != len(header):
            cells = f"{len(row)} cells, the header has {len(header)}"
            raise ElvaDataError(f"{path}:{line}: {cells}; quote commas in texts, or remove the row")
    places = [header.index(column) for column in columns]
    texts = [[row[place] for place in places] for row in rows.values()]
    return pd.DataFrame(texts, index=list(rows), columns=list(columns), dtype=str)


class _Plain(pickle.Unpickler):
    """Lists, dictionaries and texts only: a pickle may otherwise call whatever it names."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants {module}.{name}, and captions are lists of words")


# by suffix; nothing but lists, dictionaries, texts, numbers and tensors is loaded
FORMATS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_bytes()),
    ".pkl": lambda path: _Plain(path.open("rb")).load(),
    ".pt": lambda path: torch.load(path, map_location="cpu", weights_only=True),
    ".txt": lambda path: path.read_text(encoding="utf-8-sig").rstrip().splitlines(),
}


class Files:
    """The files of one set.

    strict: the first problem is an error; else problems are kept, what they touch is left out. notes: what is
    odd but leaves the set usable; every such tie counts against the target.
    """

    def __init__(self, folder: Path, *, strict: bool, decode: bool = False) -> None:
        self.root, self.strict, self.decode = mbeir.Root(folder), strict, decode
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._seen: dict[str, Path] = {}
        self._read: dict[str, Any] = {}

    def wrong(self, where: object, what: object) -> None:
        if self.strict:
            raise ElvaDataError(f"{where}: {what}")
        self.problems.append(f"{where}: {what}")

    def image(self, relative: str) -> Path:
        """An image below the folder, decoded if asked for.

        Raises:
            ElvaDataError: it is missing, broken or outside.
        """
        if relative not in self._seen:
            path = self.root.image_file(relative)
            if self.decode:
                images.open_image(path)
            self._seen[relative] = path
        return self._seen[relative]

    def named(self, folder: str, suffix: str) -> dict[str, str]:
        """stem -> path, relative to the root, of a folder's files with a suffix, in any case; none is hidden.

        ".jpg" comes before ".JPG". macOS leaves a hidden ._1.jpg beside each 1.jpg on disks of others.
        """
        paths = sorted((self.root.folder / folder).glob("[!.]*"))
        return {p.stem: f"{folder}/{p.name}" for p in paths if p.suffix.lower() == suffix}

    def read(self, relative: str, *keys: str, kind: type = list) -> tuple[Path, Any]:
        """The path, and what stands under some keys of a file of FORMATS.

        That is a list or a dictionary (`kind`) with entries, empty where the file has another thing there.
        """
        path = self.root.folder / relative
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
            if relative not in self._read:
                with warnings.catch_warnings(action="ignore"):
                    self._read = {relative: FORMATS[path.suffix](path)}  # the last one only
            value = self._read[relative]
            for key in keys:
                value = value[key]
        except FileNotFoundError:
            self.wrong(path, "is missing; unpack the set so that it is there")
        except Exception as error:  # an unpickler given random bytes raises whatever it stumbles over
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            self.wrong(path, f"cannot be read as expected ({reason}); download it again")
        else:
            if isinstance(value, kind) and value:
                return path, value
            under = f" under {keys}" if keys else ""
            self.wrong(path, f"expected a {kind.__name__} with entries{under}; is it the right file?")
        return path, kind()

    def rows(self, path: Path, rows: Iterable, parse: Callable[[int, object], R]) -> list[R]:
        """parse(row number from 0, row) of every row that is as it should be; others are problems, from 1."""
        out = []
        for number, row in enumerate(rows):
            where = f"{path}, entry {number + 1}"
            try:
                out.append(parse(number, row))
            except KeyError as error:
                self.wrong(where, f"key {error} is missing")
            except ElvaDataError as error:
                self.wrong(where, error)
            except (TypeError, ValueError, IndexError, AttributeError, OSError) as error:
                self.wrong(where, f"{error}; repair or remove it")
        return out

    def repeated(self, path: Path, what: str, values: Iterable[object]) -> None:
        """A note for every value that was there before."""
        first: dict[object, int] = {}
        for number, value in enumerate(values, start=1):
            if first.setdefault(value, number) != number:
                note = f"{what} {str(value)[:80]!r} is that of entry {first[value]}, too"
                self.notes.append(f"{path}, entry {number}: {note}")


def transposed(rows: Sequence[tuple], count: int) -> list[list]:
    """Rows of `count` values as so many lists, also where there is no row."""
    return [[row[i] for row in rows] for i in range(count)]


def text(value: object, name: str) -> str:
    """A string with something in it that can be written."""
    if not isinstance(value, str) or not value.strip():
        raise ElvaDataError(f"{name} is {str(value)[:40]!r}, expected a text")
    value.encode()  # half of a surrogate pair passes JSON
    return value


def number(value: object, name: str, below: int = 10**12) -> int:
    """A whole number from 0 to below - 1, given as one or as its digits."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 12:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
        raise ElvaDataError(f"{name} is {str(value)[:40]!r}, expected a number from 0 to {below - 1:,}")
    return value


def entries(value: object, name: str) -> list:
    """A list that is not empty."""
    if not isinstance(value, list) or not value:
        raise ElvaDataError(f"{name} is {str(value)[:40]!r}, expected a list with entries")
    return value
