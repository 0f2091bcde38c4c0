"""Tables as people read them: Markdown, and cells of percent with their intervals."""

from __future__ import annotations

import pandas as pd


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
