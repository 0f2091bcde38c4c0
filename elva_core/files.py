"""Files that are written whole or not at all, their hashes, YAML without repeated keys, where outputs are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUTS = REPOSITORY / "outputs"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*values: object, length: int = 16) -> str:
    """The first hexadecimal digits of the SHA-256 of some values as JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:length]


def link(source: str | Path, target: str | Path) -> None:
    """A hard link, to what a symbolic link leads to; a copy where the file system has none, or is another."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a partial path beside `path` to write to, and renames it when the block ends without an error.

    The partial file is this process's own. An error or an interrupt removes it, so that only a killed process
    leaves one. Makes the folder that `path` is in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


class ElvaDataError(ValueError):
    """Bad input data. The message says what is wrong, in which file and line, and what to do."""


class _UniqueKeys(yaml.SafeLoader):
    """Reads YAML and refuses a mapping that holds a key twice, of which the last would replace the first."""

    def compose_mapping_node(self, anchor):
        mapping, lines = super().compose_mapping_node(anchor), {}
        for key, _ in mapping.value:
            line = key.start_mark.line + 1
            if (first := lines.setdefault((key.tag, str(key.value)), (line, key))) != (line, key):
                problem = f"key {key.value} is in line {first[0]} already; keep one of the two"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return mapping


def read_yaml(path: Path) -> object:
    """Content of a YAML file.

    Raises:
        ElvaDataError: it is no YAML, or a mapping holds a key twice; with file and line.
    """
    try:
        with path.open("rb") as file:
            return yaml.load(file, _UniqueKeys)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        place = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        raise ElvaDataError(f"{place}: not readable as YAML: {' '.join(str(problem).split())}") from None
