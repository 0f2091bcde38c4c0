"""Stage 1's text pairs: triplets in SimCSE's CSV form (sent0, sent1, hard_neg)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from elva_core.files import ElvaDataError

COLUMNS = ["sent0", "sent1", "hard_neg"]


def read(path: Path) -> pd.DataFrame:
    """The triplets, one row each.

    Raises:
        ElvaDataError: missing file, missing column, or an empty cell; names the line.
    """
    if not path.is_file():
        raise ElvaDataError(
            f"{path} is missing; set data.nli to SimCSE's nli_for_simcse.csv or use the embedded collection"
        )
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise ElvaDataError(f"{path}: not readable as CSV ({error})") from None
    if missing := [c for c in COLUMNS if c not in table]:
        raise ElvaDataError(f"{path}:1: columns {missing} are missing; expected {COLUMNS}")
    empty = (table[COLUMNS] == "").any(axis=1)
    if empty.any():
        raise ElvaDataError(f"{path}:{int(empty.idxmax()) + 2}: an empty cell; remove the row")
    return table[COLUMNS]
