"""Reader of benchmark files in their authors' formats.

It stops at the first problem, or goes on and keeps all of them.

files = Files(folder, strict=False)
path, records = files.json("data.json")
rows = files.rows(path, records, lambda number, record: text(record["caption"], "caption"))
files.problems
"""

from __future__ import annotations

import csv
import json
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
    lines, rows = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for row in reader:
                if len(row) > 1 or "".join(row).strip():
                    lines.append(reader.line_num)
                    rows.append(row)
        except (ValueError, csv.Error) as error:
            place = f"{path}: not readable as CSV behind line {lines[-1] if lines else 0}"
            raise ElvaDataError(f"{place} ({error}); repair it") from None
    header = rows[0] if rows else []
    if missing := [column for column in columns if column not in header]:
        raise ElvaDataError(
            f"{path}: {missing} is missing; expected columns {list(columns)}, repair the header"
        )
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(header):
            cells = f"{len(row)} cells, the header has {len(header)}"
            raise ElvaDataError(f"{path}:{line}: {cells}; quote commas in texts, or remove the row")
    places = [header.index(column) for column in columns]
    texts = [[row[place] for place in places] for row in rows[1:]]
    return pd.DataFrame(texts, index=lines[1:], columns=list(columns), dtype=str)


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
            path = self.root.image_path(relative)
            try:
                if self.decode:
                    images.open_image(path)
                elif not path.is_file():
                    raise ElvaDataError(f"image {path} is missing; unpack the images of the set there")
            except OSError as error:  # a name that no file can have
                raise ElvaDataError(
                    f"image {relative[:80]!r} cannot be opened ({error.strerror}); correct the name"
                ) from None
            self._seen[relative] = path
        return self._seen[relative]

    def named(self, folder: str, suffix: str) -> dict[str, str]:
        """stem -> path, relative to the root, of a folder's files with a suffix, in any case; none is hidden.

        ".jpg" comes before ".JPG". macOS leaves a hidden ._1.jpg beside each 1.jpg on disks of others.
        """
        paths = sorted((self.root.folder / folder).glob("[!.]*"))
        return {p.stem: f"{folder}/{p.name}" for p in paths if p.suffix.lower() == suffix}

    def path(self, relative: str) -> Path | None:
        """A file that is there and not too large, else None."""
        path = self.root.folder / relative
        if not path.is_file():
            return self.wrong(path, "is missing; unpack the set so that it is there")
        if path.stat().st_size > MAX_BYTES:
            return self.wrong(path, f"has more than {MAX_BYTES:,} bytes; is it the right file?")
        return path

    def json(self, relative: str, *keys: str, kind: type = list) -> tuple[Path, list | dict]:
        """The path, and what stands under some keys of a JSON file.

        That is a list or a dictionary (`kind`) with entries, empty where the file has another thing there.
        """
        return self._opened(relative, lambda path: json.loads(path.read_bytes()), keys, kind)

    def tensors(self, relative: str, *keys: str) -> tuple[Path, list]:
        """The same of a list in a file of torch.save.

        Nothing but lists, dictionaries, texts, numbers and tensors is loaded.
        """

        def read(path: Path) -> Any:
            return torch.load(path, map_location="cpu", weights_only=True)

        return self._opened(relative, read, keys, list)

    def _opened(
        self, relative: str, read: Callable[[Path], Any], keys: tuple[str, ...], kind: type
    ) -> tuple[Path, Any]:
        where = self.root.folder / relative
        try:
            if relative not in self._read:
                path = self.path(relative)
                with warnings.catch_warnings(action="ignore"):
                    self._read = {relative: read(path) if path else None}  # the last one only
            if (value := self._read[relative]) is not None:
                for key in keys:
                    value = value[key]
                if isinstance(value, kind) and value:
                    return where, value
                under = f" under {keys}" if keys else ""
                self.wrong(where, f"expected a {kind.__name__} with entries{under}; is it the right file?")
        except ElvaDataError:
            raise
        except Exception as error:  # an unpickler given random bytes raises whatever it stumbles over
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            self.wrong(where, f"cannot be read as expected ({reason}); download it again")
        return where, kind()

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
            except (TypeError, ValueError, IndexError, AttributeError) as error:
                self.wrong(where, f"{error}; repair or remove it")
        return out

    def columns(
        self, path: Path, rows: Iterable, parse: Callable[[int, object], tuple], count: int
    ) -> list[list]:
        """`rows` where `parse` gives tuples of `count` values, as so many lists."""
        return transposed(self.rows(path, rows, parse), count)

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


def text_of(record: Any, key: str) -> str:
    """The `text` that a record has under a key."""
    return text(record[key], key)


def number_of(record: Any, key: str) -> int:
    """The `number` that a record has under a key."""
    return number(record[key], key)


def entries_of(record: Any, key: str) -> list:
    """The `entries` that a record has under a key."""
    return entries(record[key], key)
