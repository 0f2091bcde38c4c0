"""Tables as people read them, Markdown and cells of percent with their intervals; and how we read our own."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

# columns of our tables that hold names, which may look like numbers or like a missing value: 007, None
NAMES = (
    *("model", "unit", "pool", "metric", "set", "task", "group", "question", "kind", "encoding"),
    *("experiment", "seed", "dataset", "baseline", "backbone", "claim", "source", "seeds", "verdict"),
    *("stage", "answer", "missing", "needs", "command", "package", "installed"),
)


def read_table(path: Path) -> pd.DataFrame:
    """A table that we wrote: names are text as it stands, "" where there is none; elsewhere "" is NaN."""
    numbers = set(pd.read_csv(path, nrows=0)) - set(NAMES)
    empty = {column: [""] for column in numbers}
    return pd.read_csv(path, dtype=dict.fromkeys(NAMES, str), keep_default_na=False, na_values=empty)


def markdown_table(table: pd.DataFrame) -> str:
    """A Markdown table: fractions with one decimal, as papers print; nothing where nothing was measured."""
    cells = [
        ["" if v != v else f"{v:.1f}" if isinstance(v, float) else str(v) for v in row]
        for row in table.itertuples(index=False)
    ]
    lines = [list(map(str, table.columns)), ["--"] * len(table.columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percent_cells(rows: pd.DataFrame) -> list[str]:
    """Value and interval of each row of shares, as people read them: "52.3 [48.1, 56.0]"."""
    return [f"{100 * r.value:.1f} [{100 * r.ci_low:.1f}, {100 * r.ci_high:.1f}]" for r in rows.itertuples()]
