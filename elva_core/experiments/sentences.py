"""Sentences that answer a notebook's questions from its tables: value, interval, n, and how sure that is.

answer = sentences.differences(comparisons)
run.close(answer=sentences.joined(answer, sentences.wrong_modality(units)))
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from IPython.display import Markdown

from elva_core import distributed
from elva_core.retrieval import metrics

SAMPLES = 1000  # of the bootstrap over training steps
START = "**Answer.** "


def joined(*answers: Markdown) -> Markdown:
    """Several answers as one.

    >>> joined(Markdown("**Answer.** Yes."), Markdown("**Answer.** No.")).data
    '**Answer.** Yes. No.'
    """
    return Markdown(START + " ".join(answer.data.removeprefix(START) for answer in answers))


def _said(text: str) -> Markdown:
    return Markdown(START + text[:1].upper() + text[1:])


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
        return Markdown(f"{START}{metric}: {told(rows[0])}.")
    return Markdown(f"{START}{metric}: highest for {told(rows[0])}, lowest for {told(rows[-1])}.")


def differences(pairs: pd.DataFrame, scale: float = 100.0, unit: str = "points") -> Markdown:
    """What paired differences say, one clause for each pair; "inconclusive" is an answer, too.

    Args:
        pairs: new, old, metric, value, ci_low, ci_high, n, as `statistics.comparison` gives them.
        scale: from the table's values to `unit`.
    """
    clauses, same = [], len(set(pairs["n"])) == 1
    for (new, old), rows in pairs.groupby(["new", "old"], sort=False):
        told = []
        for row in rows.to_dict("records"):
            value, low, high = (scale * row[column] for column in ("value", "ci_low", "ci_high"))
            n = "" if same else f", n = {row['n']:,}"
            said = number(value, low, high, unit, sign=True)
            told.append(f"{row['metric']} {direction(low, high)} ({said}{n})")
        clauses.append(f"{new} against {old}: {', '.join(told)}")
    if not clauses:
        return Markdown(f"{START}Nothing could be compared.")
    n = f"; n = {pairs['n'].iloc[0]:,}" if same else ""
    return _said(f"{'; '.join(clauses)}{n}.")


def shares(table: pd.DataFrame) -> Markdown:
    """Which kind of grain most queries have, and which the fewest; of `build.describe`."""
    rows = table.to_dict("records")
    told = [f"{row['kind']} ({row['queries']:,} queries, {row['share']:.0%})" for row in rows]
    ends = f"most queries name {told[0]}, fewest {told[-1]}" if len(told) > 1 else f"all name {told[0]}"
    return Markdown(f"{START}Of {len(rows)} kinds of grains {ends}.")


def rewarded_ranks(weights: pd.DataFrame) -> Markdown:
    """At which ranks a negative raises the reward; of `figures.rank_weights`."""
    paid = {form: weights[weights[form] < 0] for form in ("printed", "corrected")}
    told = ", ".join(
        f"rank {row['rank']:.0f} ({row['printed']:+.2f})" for _, row in paid["printed"].iterrows()
    )
    count = f"{len(paid['corrected'])} of {len(weights)} ranks"
    return Markdown(
        f"{START}As printed the weight is below zero, so that a negative raises the reward, "
        f"at {told or 'no rank'}; in the corrected form at {count}."
    )


def passing(table: pd.DataFrame, positive: float) -> Markdown:
    """What the total reward does as one negative passes the positive; of `figures.hardest_negative`."""
    before, after = (
        table[side].iloc[end]
        for side, end in ((table["hardest"] < positive, -1), (table["hardest"] > positive, 0))
    )
    clauses = []
    for form in ("printed", "corrected"):
        old, new = before[f"R_total {form}"], after[f"R_total {form}"]
        word = "rises" if new > old else "falls"
        clauses.append(f"as {form} it {word} from {old:.3f} to {new:.3f}")
    return Markdown(f"{START}The total reward as the negative passes: {', '.join(clauses)}.")


def wrong_modality(shares: pd.DataFrame) -> Markdown:
    """For which units the first answer mostly has the wrong modality.

    Args:
        shares: unit, value, ci_low, ci_high (shares of queries), n, of one model in the global pool.
    """
    rows = shares.sort_values("value", ascending=False).to_dict("records")
    most = [row for row in rows if row["value"] > 0.5]
    told = []
    for row in most:
        bounds = (100 * row[column] for column in ("value", "ci_low", "ci_high"))
        told.append(f"{row['unit']} ({number(*bounds, '%')})")
    units = f"{len(most)} of {len(rows)} units" + (f": {', '.join(told)}" if told else "")
    return Markdown(
        f"{START}In the global pool, which holds every modality, the first answer mostly has the wrong one "
        f"in {units}; n = {shares['n'].min():,} queries a unit."
    )


def first_by_metric(means: pd.DataFrame) -> Markdown:
    """Which model is first under which metric, and what ties cost.

    Args:
        means: a row per metric, a column per model, in percent; "... pessimistic" beside the plain metrics.
    """
    plain = [name for name in means.index if f"{name} pessimistic" in means.index]
    ties = max((means.loc[name] - means.loc[f"{name} pessimistic"]).max() for name in plain)
    ranked = means[[name.startswith(("hit", "recall", "mrr", "ndcg")) for name in means.index]]
    counts = ranked.idxmax(axis=1).value_counts()
    told = ", ".join(f"{model} under {count}" for model, count in counts.items())
    return Markdown(
        f"{START}Of {len(ranked)} metrics the highest mean has {told}; "
        f"ties change a hit rate by {ties:.1f} points at most."
    )


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
    return _said(f"{'; '.join(clauses)}; {steps}.")
