"""Files and folders that are written whole or not at all, their hashes, and where outputs are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUTS = REPOSITORY / "outputs"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
