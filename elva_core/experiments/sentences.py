"""Sentences that answer a notebook's questions from its tables: value, interval, n, and how sure that is.

answer = sentences.differences(comparisons)
run.close(answer=sentences.answer(answer, sentences.wrong_modality(units)))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from IPython.display import Markdown

from elva_core import distributed
from elva_core.evaluation import statistics
from elva_core.retrieval import metrics
from elva_core.tables import direction, number, rounded

SAMPLES = 1000  # of the bootstrap over training steps
START = "**Answer.** "
MOST = 8  # differences that are named in one sentence although they are inconclusive


def _said(text: str) -> Markdown:
    return Markdown(START + (text if text.startswith("hit@") else text[:1].upper() + text[1:]))


def answer(*parts: Markdown | str) -> Markdown:
    """Sentences as one answer, each of which may be an answer of its own.

    >>> answer("One.", Markdown("**Answer.** Two.")).data
    '**Answer.** One. Two.'
    """
    texts = (getattr(part, "data", part).removeprefix(START) for part in parts)
    return Markdown(START + " ".join(text for text in texts if text))


def _told(row: Mapping, unit: str, scale: float = 100.0, *, sign: bool = False) -> str:
    """The value of a row with its interval, `scale` times what its table has."""
    return number(*(scale * row[column] for column in ("value", "ci_low", "ci_high")), unit, sign=sign)


def scores(table: pd.DataFrame, name: str, metric: str, scale: float = 100.0) -> Markdown:
    """The highest and the lowest of some scores, with their intervals.

    Args:
        table: value, ci_low, ci_high, n, and the column `name` of what is compared. scale: from the values to
            percent.
    """
    if table.empty:
        return _said(f"{metric}: not measured.")
    rows = table.sort_values("value", ascending=False).to_dict("records")
    told = [f"{row[name]} ({_told(row, '%', scale)}, n = {row['n']:,})" for row in rows]
    if len(told) == 1:
        return Markdown(f"{START}{metric}: {told[0]}.")
    return Markdown(f"{START}{metric}: highest for {told[0]}, lowest for {told[-1]}.")


def differences(pairs: pd.DataFrame, scale: float = 100.0) -> Markdown:
    """Paired differences in words, one clause for each pair; "inconclusive" is an answer, too.

    Args:
        pairs: new, old, metric, value, ci_low, ci_high, n, as `statistics.comparison` gives them.
        scale: from the table's values to points.
    """
    clauses, same = [], len(set(pairs["n"])) == 1
    for (new, old), rows in pairs.groupby(["new", "old"], sort=False):
        told = []
        for row in rows.to_dict("records"):
            n = "" if same else f", n = {row['n']:,}"
            word = direction(row["ci_low"], row["ci_high"])
            told.append(f"{row['metric']} {word} ({_told(row, 'points', scale, sign=True)}{n})")
        clauses.append(f"{new} against {old}: {', '.join(told)}")
    if not clauses:
        return Markdown(f"{START}Nothing could be compared.")
    n = f"; n = {pairs['n'].iloc[0]:,}" if same else ""
    return _said(f"{'; '.join(clauses)}{n}.")


def shares(table: pd.DataFrame) -> Markdown:
    """The kind of grain that most queries have, and the rarest; of `build.describe`."""
    rows = table.to_dict("records")
    told = [f"{row['kind']} ({row['queries']:,} queries, {row['share']:.0%})" for row in rows]
    ends = f"most queries name {told[0]}, fewest {told[-1]}" if len(told) > 1 else f"all name {told[0]}"
    return Markdown(f"{START}Of {len(rows)} kinds of grains {ends}.")


def rewarded_ranks(weights: pd.DataFrame) -> Markdown:
    """At which ranks a negative raises the reward; of `reward_figures.rank_weights`."""
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
    """Change of the total reward as one negative passes the positive.

    Args:
        table: `reward_figures.hardest_negative`. positive: its cosine.
    """
    before = table[table["hardest"] < positive].iloc[-1]
    after = table[table["hardest"] > positive].iloc[0]
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
    told = [f"{row['unit']} ({_told(row, '%')})" for row in most]
    units = f"{len(most)} of {len(rows)} units" + (f": {', '.join(told)}" if told else "")
    return Markdown(
        f"{START}In the global pool, which holds every modality, the first answer mostly has the wrong one "
        f"in {units}; n = {shares['n'].min():,} queries a unit."
    )


def first_by_metric(means: pd.DataFrame) -> Markdown:
    """The first model under each metric, and the cost of ties.

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
    """Rise or fall of quantities of a training, from its first tenth of steps to its last.

    Steps are resampled inside each tenth; they are no independent sample, so this is a rough interval.

    Args:
        history: one row per step. columns: of it, and what each is called.
    """
    tenth, clauses = max(2, len(history) // 10), []
    for column, name in columns.items():
        first, last = (part[column].dropna().to_numpy() for part in (history[:tenth], history[-tenth:]))
        low, high = metrics.interval([last, -first], SAMPLES, distributed.rng_for(0, "trend", column))
        word = direction(low, high, ("rose", "fell"), "did not change clearly")
        change = f"{np.mean(first):.3g} to {np.mean(last):.3g}"
        clauses.append(f"{name} {word} ({change}, change [{2 * low:.2g}, {2 * high:.2g}])")
    steps = f"first against last {tenth} of {len(history)} steps"
    return _said(f"{'; '.join(clauses)}; {steps}.")


def agreement(points: Sequence[float]) -> str:
    """Agreement of single seeds on the sign of a difference, with the interval over them; "" without any.

    >>> agreement((0.5, -0.1, 3.0)), agreement((0.5, 2.0)), agreement((0.5,))
    (' (seeds disagree: -0.1 to +3.0; over seeds [-3.0, 5.2])', ' (every seed: +0.5 to +2.0)', ' (one seed)')
    """
    if len(points) < 2:
        return " (one seed)" if points else ""
    low, high = (rounded(end(points), 9) for end in (min, max))  # no noise of the last digit
    word = "seeds disagree" if low < 0 < high else "every seed" if low > 0 or high < 0 else "single seeds"
    low, high, *interval = map(rounded, (low, high, *statistics.over_seeds(points)))
    over = "; over seeds [{:.1f}, {:.1f}]".format(*interval) if len(points) > 2 else ""
    return f" ({word}: {low:+.1f} to {high:+.1f}{over})"


def changes(
    pairs: pd.DataFrame, label: str, what: str, *, scale: float = 100.0, command: str = ""
) -> Markdown:
    """Many paired differences in words: those above zero, those below it, the inconclusive ones.

    Args:
        pairs: value, ci_low, ci_high, n, the column `label` that names a row, and by seed where there are
            several. what: is compared, in words. scale: from the values to points. command: that runs what
            is missing.
    """
    if pairs.empty:
        return _said(f"{what}: not run{f' ({command})' if command else ''}.")
    groups: dict[str, list[str]] = {"higher": [], "lower": [], "inconclusive": [], "the same": []}
    for row in pairs.to_dict("records"):
        value, low, high = (row[column] for column in ("value", "ci_low", "ci_high"))
        word = "the same" if value == low == high == 0 else direction(low, high)
        seeds = agreement(row["by seed"]) if "by seed" in row else ""
        groups[word].append(f"{row[label]} {_told(row, '', scale, sign=True)}{seeds}")
    if len(pairs) > MOST and len(groups["inconclusive"]) > 1:
        groups["inconclusive"] = [f"the {len(groups['inconclusive'])} others of the table"]
    listed = "; ".join(f"{word} for {', '.join(rows)}" for word, rows in groups.items() if rows)
    return _said(f"{what}, in points: {listed} ({counted(pairs['n'])}).")


def counted(n: pd.Series) -> str:
    """The number of queries behind rows of a table, from the smallest to the largest where they differ.

    >>> counted(pd.Series([120, 1200])), counted(pd.Series([60, 60])), counted(pd.Series([]))
    ('n = 120 to 1,200 queries', 'n = 60 queries', 'nothing measured')
    """
    if n.empty:
        return "nothing measured"
    low, high = int(n.min()), int(n.max())
    return f"n = {low:,} queries" if low == high else f"n = {low:,} to {high:,} queries"


def beside_chance(table: pd.DataFrame, label: str, what: str) -> Markdown:
    """Scores above chance, below it, and those of which neither can be said.

    Args:
        table: value, ci_low, ci_high, chance (shares), n, and the column `label` that names a row.
    """
    groups: dict[str, list[str]] = {"above": [], "below": [], "not clearly off": []}
    for row in table.to_dict("records"):
        low, high = (row[column] - row["chance"] for column in ("ci_low", "ci_high"))
        word = direction(low, high, ("above", "below"), "not clearly off")
        groups[word].append(f"{row[label]} {_told(row, '%')} ({100 * row['chance']:.1f})")
    listed = "; ".join(f"{word} chance: {', '.join(rows)}" for word, rows in groups.items() if rows)
    counts = f" ({counted(table['n'])}; chance in brackets)" if len(table) else ""
    return _said(f"{what}: {listed or 'not measured'}{counts}.")


def faster(table: pd.DataFrame, way: str, base: str) -> Markdown:
    """Speed of one way over another, on each side and batch that was timed.

    Args:
        table: `throughput.times`.
    """
    clauses = [
        f"{row.side} {row.batch} at a time {row.times:.1f} [{row.lowest:.1f}, {row.highest:.1f}]"
        for row in table[table["way"] == way].itertuples()
    ]
    told = f"median and range of {table['rounds'].min()} rounds, {int(table['n'].min())} items or more"
    return _said(f"Items a second of {way} as a multiple of {base}: {', '.join(clauses)} ({told}).")


def trade(table: pd.DataFrame, base: str) -> Markdown:
    """Hit rate and speed of every way that was timed, and those that were not.

    Args:
        table: way, value, ci_low, ci_high (percent), n and per second, nan where it was not measured. base:
            the way that the others stand beside.
    """
    timed, untimed = table[table["per second"].notna()], table[table["per second"].isna()]
    clauses = []
    for row in timed.sort_values("way", key=lambda ways: ways != base).to_dict("records"):
        speed = "{per second:,.0f} [{lowest:,.0f}, {highest:,.0f}]".format(**row)
        clauses.append(f"{row['way']} {_told(row, '%', 1.0)} at {speed} queries a second")
    rest = [f"{row['way']} ({row['value']:.1f} %)" for row in untimed.to_dict("records")]
    apart = f"; speed not measured: {', '.join(rest)}" if rest else ""
    return _said(f"hit@5: {', '.join(clauses)} ({counted(table['n'])}){apart}.")


def costs(table: pd.DataFrame) -> Markdown:
    """Cost of writing a summary: hit rate, speed of one query at a time, passes of the language model.

    Args:
        table: `compare.speeds`.
    """
    clauses = [
        f"{row['arm']} finds {row['hit@5']:.1f} % and takes {row['passes']:.1f} passes a query, "
        f"{row['queries a second']:.1f} queries a second ({row['seeds']} seeds)"
        for row in table.to_dict("records")
    ]
    if not clauses:
        return _said("hit@5 and cost: no arm was timed.")
    apart = "each arm was timed by itself, not in turns: passes compare, queries a second hardly do"
    return _said(f"hit@5 and cost: {'; '.join(clauses)}; {apart}.")


def lengths(table: pd.DataFrame) -> Markdown:
    """From how many queries on a training is above where it began, if it is at every longer one, too.

    Args:
        table: `compare.efficiency`.
    """
    clauses = []
    for name, part in table[table["queries"] > 0].groupby("run", sort=False):
        part = part.sort_values("queries")
        enough = part[(part["ci_low"] > 0)[::-1].cummin()[::-1]]  # at this length and at every longer one
        text = "not clearly above stage 2 at its longest"
        if len(enough):
            text = f"above stage 2 from {enough['queries'].iloc[0]:,} queries on"
        last = part.iloc[-1]
        gain = _told(last, "points", 1.0, sign=True)
        clauses.append(f"{name} is {text} (lengths tried: {len(part)}; {last['queries']:,} queries: {gain})")
    if not clauses:
        return _said("not run.")
    return _said(f"{'; '.join(clauses)} ({counted(table['n'])}, one seed).")
