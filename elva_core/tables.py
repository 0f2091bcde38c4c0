"""Tables for people: Markdown, cells of percent with their intervals; and the reader of our own CSV files."""

from __future__ import annotations

from collections.abc import Iterable
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


def markdown_rows(columns: Iterable, rows: Iterable[Iterable]) -> str:
    """A Markdown table of cells as they are, without a newline at its end."""
    header = list(columns)
    lines = (header, ["--"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def markdown_table(table: pd.DataFrame) -> str:
    """A Markdown table: fractions with one decimal, as papers print; nothing where nothing was measured."""
    cells = [
        ["" if v != v else f"{v:.1f}" if isinstance(v, float) else str(v) for v in row]
        for row in table.itertuples(index=False)
    ]
    return markdown_rows(table.columns, cells) + "\n"


def percent_cells(rows: pd.DataFrame) -> list[str]:
    """Value and interval of each row of shares, as people read them: "52.3 [48.1, 56.0]"."""
    return [number(100 * r.value, 100 * r.ci_low, 100 * r.ci_high, "") for r in rows.itertuples()]


def direction(
    low: float, high: float, words: tuple[str, str] = ("higher", "lower"), neither: str = "inconclusive"
) -> str:
    """An interval of a difference in a word: one of two, or `neither` where it holds zero.

    >>> direction(0.4, 3.0), direction(-0.1, 3.0), direction(-2.0, -0.5)
    ('higher', 'inconclusive', 'lower')
    """
    return words[0] if low > 0 else words[1] if high < 0 else neither


def rounded(value: float, digits: int = 1) -> float:
    """A value to so many digits, never -0.0, by the one rounding of all intervals and differences.

    NumPy's own makes 0.6 of 0.65, Python's 0.7, and a sum in another order 0.6 again.

    >>> import numpy as np
    >>> rounded(np.float64(0.65)), rounded(0.65), rounded(0.6499999999999999), rounded(-0.04)
    (0.7, 0.7, 0.7, 0.0)
    """
    return round(round(float(value), 9), digits) + 0.0


def signed(values: Iterable[float]) -> list[str]:
    """Differences as people read them.

    >>> signed((0.65, -2.0, -0.04))
    ['+0.7', '-2.0', '+0.0']
    """
    return [f"{rounded(value):+.1f}" for value in values]


def number(value: float, low: float, high: float, unit: str, *, sign: bool = False, digits: int = 1) -> str:
    """A value with its interval.

    >>> number(36.71, 34.1, 39.25, "%"), number(-0.04, -0.06, 0.1, "", sign=True)
    ('36.7 % [34.1, 39.2]', '+0.0 [-0.1, 0.1]')
    """
    value, low, high = (rounded(bound, digits) for bound in (value, low, high))
    said = f"{value:{'+' if sign else ''}.{digits}f}{f' {unit}' if unit else ''}"
    return f"{said} [{low:.{digits}f}, {high:.{digits}f}]"
