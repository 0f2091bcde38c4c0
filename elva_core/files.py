"""Files that are written whole or not at all, their hashes, and where outputs are."""

from __future__ import annotations

import hashlib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUTS = REPOSITORY / "outputs"


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class ElvaDataError(ValueError):
    """Bad input data. The message says what is wrong, in which file and line, and what to do."""
