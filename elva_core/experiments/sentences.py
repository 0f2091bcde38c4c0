"""Sentences that answer a notebook's question from its table: value, interval, n, and how sure that is.

Markdown(sentences.differences(comparisons))
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from IPython.display import Markdown

from elva_core import distributed
from elva_core.retrieval import metrics

SAMPLES = 1000  # of the bootstrap over training steps


def direction(low: float, high: float, words: tuple[str, str] = ("higher", "lower")) -> str:
    """What an interval of a difference says: one of two words, or "inconclusive" where it holds zero.

    >>> direction(0.4, 3.0), direction(-0.1, 3.0), direction(-2.0, -0.5)
    ('higher', 'inconclusive', 'lower')
    """
    return words[0] if low > 0 else words[1] if high < 0 else "inconclusive"


def number(value: float, low: float, high: float, unit: str, *, sign: bool = False) -> str:
    """A value with its interval.

    >>> number(36.71, 34.1, 39.25, "%"), number(0.04, -0.06, 0.1, "points", sign=True)
    ('36.7 % [34.1, 39.2]', '+0.0 points [-0.1, 0.1]')
    """
    return f"{value:{'+' if sign else ''}.1f} {unit} [{low:.1f}, {high:.1f}]"


def scores(table: pd.DataFrame, name: str, metric: str) -> Markdown:
    """The highest and the lowest of some scores, with their intervals.

    Args:
        table: value, ci_low, ci_high as shares, n, and the column `name` of what is compared.
    """
    rows = table.sort_values("value", ascending=False).to_dict("records")

    def told(row: Mapping) -> str:
        bounds = (100 * row[column] for column in ("value", "ci_low", "ci_high"))
        return f"{row[name]} ({number(*bounds, '%')}, n = {row['n']:,})"

    if len(rows) == 1:
        return Markdown(f"**Answer.** {metric}: {told(rows[0])}.")
    return Markdown(f"**Answer.** {metric}: highest for {told(rows[0])}, lowest for {told(rows[-1])}.")


def differences(pairs: pd.DataFrame, scale: float = 100.0, unit: str = "points") -> Markdown:
    """What paired differences say, one clause each; "inconclusive" is an answer, too.

    Args:
        pairs: new, old, metric, value, ci_low, ci_high, n, as `statistics.comparison` gives them.
        scale: from the table's values to `unit`.
    """
    clauses = []
    for row in pairs.to_dict("records"):
        value, low, high = (scale * row[column] for column in ("value", "ci_low", "ci_high"))
        word = direction(low, high)
        against = f"{row['new']} is {word} {'than' if word != 'inconclusive' else 'against'} {row['old']}"
        clauses.append(
            f"{against} in {row['metric']} ({number(value, low, high, unit, sign=True)}, n = {row['n']:,})"
        )
    return Markdown("**Answer.** " + "; ".join(clauses) + ".")


def trend(history: pd.DataFrame, columns: Mapping[str, str]) -> Markdown:
    """Whether quantities of a training rose, from its first tenth of steps to its last.

    Steps are resampled inside each tenth; they are no independent sample, so this is a rough interval.

    Args:
        history: one row per step. columns: of it, and what each is called.
    """
    tenth, clauses = max(2, len(history) // 10), []
    for column, name in columns.items():
        first, last = (part[column].dropna().to_numpy() for part in (history[:tenth], history[-tenth:]))
        low, high = metrics.interval([last, -first], SAMPLES, distributed.rng_for(0, "trend", column))
        word = direction(low, high, ("rose", "fell"))
        text = "did not change clearly" if word == "inconclusive" else word
        change = f"{np.mean(first):.3g} to {np.mean(last):.3g}"
        clauses.append(f"{name} {text} ({change}, change [{2 * low:.2g}, {2 * high:.2g}])")
    steps = f"first against last {tenth} of {len(history)} steps"
    return Markdown(f"**Answer.** {'; '.join(clauses)}; {steps}.")
