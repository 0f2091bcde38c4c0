"""Figures of results, DataFrame -> Figure: bars, points with intervals, curves (of images: pictures.py).

No file is read, nothing shown, no global style changed. Intervals are the columns ci_low and ci_high.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from elva_core.experiments import sentences
from elva_core.experiments.claims import modalities
from elva_core.experiments.pictures import PlainFigure
from elva_core.experiments.sizes import task_of

GREY, BLUE, AMBER, RED, GREEN = "#9aa0a6", "#4c78a8", "#e4a23a", "#c43d4b", "#2e8b57"
MODEL_COLOURS = {"zero-shot": GREY, "stage 2": BLUE, "InfoNCE control": AMBER, "stage 3": RED}
WAY_COLOURS = (GREY, GREEN, BLUE, AMBER, "#7b5ea7")
ROLE_COLOURS = {"other": "#c7c7c7", "one grain differs": AMBER, "positive": GREEN, "query": RED}
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 11, "font.size": 9}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
INTERVAL = ["value", "ci_low", "ci_high"]


def axes_of(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 3.4), **shared: bool):
    """A figure of `size` inches and its (rows, columns) axes in the style of this package."""
    with mpl.rc_context(STYLE):
        figure = PlainFigure(figsize=size, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def spread(rows: pd.DataFrame | Mapping, value="value", low="ci_low", high="ci_high") -> np.ndarray:
    """(2, rows): how far an interval reaches below and above the value, for errorbar; never negative."""
    return np.vstack([rows[value] - rows[low], rows[high] - rows[value]]).clip(min=0)


def _legend_below(figure: Figure, axis, columns: int, fontsize: float = 8) -> None:
    """The legend of one of the axes, under the whole figure."""
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=fontsize, ncols=columns, loc="outside lower center")


def counts(table: pd.DataFrame, x: str, y: str, title: str, unit: str) -> Figure:
    """Bar chart of counts, each with its value printed."""
    figure, ((axis,),) = axes_of(size=(6.4, 0.32 * len(table) + 1.2))
    bars = axis.barh(table[y].astype(str), table[x], color=BLUE)
    axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axis.set(title=title, xlabel=unit)
    axis.margins(x=0.12)
    axis.invert_yaxis()
    return figure


def histogram(values: pd.Series, title: str, unit: str) -> Figure:
    """Distribution of a count over queries, with n and the median."""
    figure, ((axis,),) = axes_of()
    sns.histplot(values, discrete=True, ax=axis, color=BLUE)
    label = f"median {values.median():.0f}, n = {len(values):,}"
    axis.axvline(values.median(), color=RED, linestyle="--", label=label)
    axis.set(title=title, xlabel=unit, ylabel="queries")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, axis, columns=1)
    return figure


def curves(history: pd.DataFrame, columns: Sequence[tuple[str, str]], title: str, window: int = 15) -> Figure:
    """Training curves: each column of the step metrics (thin) with its running mean (thick).

    Args:
        history: one row per step, with `step`, and `run` where several runs share a panel.
        columns: (column, axis label with unit), a panel each. window: steps of the running mean, centred.
    """
    width = 3 if len(columns) > 4 else min(2, len(columns))
    height = -(-len(columns) // width)
    figure, axes = axes_of(height, width, (3.3 * width, 2.2 * height + 0.4))
    runs = history.groupby("run", sort=False) if "run" in history else [(None, history)]
    for axis, (column, label) in zip(axes.flat, columns, strict=False):
        for name, part in runs:
            mean = part[column].rolling(window, min_periods=1, center=True).mean()
            (line,) = axis.plot(part["step"], mean, label=name, linewidth=1.6)
            axis.plot(part["step"], part[column], color=line.get_color(), alpha=0.25, linewidth=0.7)
        axis.set(xlabel="step", ylabel=textwrap.fill(label, 26))  # a panel is not higher
    if "run" in history:
        axes.flat[0].legend(frameon=False, fontsize=8)
    for axis in axes.flat[len(columns) :]:
        axis.remove()
    steps = " and ".join(dict.fromkeys(f"{len(part):,}" for _, part in runs))
    each = f" in each of {len(runs)} runs" if len(runs) > 1 else ""
    told = f"n = {steps} steps{each}; thin: each step, thick: centred mean of {window}"
    figure.suptitle(f"{title}\n{told}", fontsize=10)
    return figure


def model_bars(table: pd.DataFrame, title: str, metric: str) -> Figure:
    """Bar chart with 95 % intervals: one group per unit, one bar per model.

    Args:
        table: columns unit, model, value, ci_low, ci_high (shares), n.
    """
    units, models = list(dict.fromkeys(table["unit"])), list(dict.fromkeys(table["model"]))
    figure, ((axis,),) = axes_of(size=(max(6.4, 1.15 * len(units) + 2), 3.6))
    width = 0.8 / len(models)
    for place, model in enumerate(models):
        bars = 100 * table[table["model"] == model].set_index("unit")[INTERVAL].reindex(units)
        x = np.arange(len(units)) + (place - (len(models) - 1) / 2) * width
        style = {"color": MODEL_COLOURS.get(model), "error_kw": {"elinewidth": 0.9}}
        axis.bar(x, bars["value"], width, yerr=spread(bars), label=model, **style)
    axis.set(ylabel=f"{metric}, % (higher is better)", ylim=(0, None))
    sizes = [f"{n:,}" for n in sorted(set(table["n"]))]
    n = " or ".join(sizes) if len(sizes) < 3 else f"{sizes[0]} to {sizes[-1]}"
    axis.set_title(f"{title} (n = {n} queries a bar, 95 % interval)", fontsize=10)
    tasks = {u: f"{textwrap.fill(modalities(u), 16)}\n(task {task_of(u)})" for u in units if "_task" in u}
    axis.set_xticks(np.arange(len(units)), [tasks.get(u, u) for u in units], fontsize=8)
    _legend_below(figure, axis, columns=len(models))
    return figure


def arms(table: pd.DataFrame, title: str, unit: str) -> Figure:
    """Forest plot: each arm's mean over seeds with its 95 % interval over queries, and each seed as a bar.

    Args:
        table: columns arm, value, ci_low, ci_high, seeds, by seed (tuple of values), n, and paper where it
            printed one; in `unit`. Values may be differences.
    """
    figure, ((axis,),) = axes_of(size=(7.6, 0.34 * len(table) + 1.3))
    place = np.arange(len(table))
    label = "mean over seeds, 95 % interval over queries"
    style = {"color": BLUE, "markersize": 5, "elinewidth": 1.4, "label": label}
    axis.errorbar(table["value"], place, xerr=spread(table), fmt="o", **style)
    several = table.assign(place=place)[table["seeds"].map(len) > 1].explode("by seed")
    if len(several):
        axis.plot(several["by seed"], several["place"], "|", color=RED, markersize=9, label="one seed")
    if "paper" in table and table["paper"].notna().any():
        axis.plot(table["paper"], place, "D", color="#444444", markersize=4, label="paper")
    if (table["ci_low"] <= 0).any():
        axis.axvline(0, color="black", linewidth=0.8)
    alike = len(set(table["n"])) == 1
    labels = [
        f"{r.arm}  ({len(r.seeds)} seed{'s' * (len(r.seeds) > 1)}{'' if alike else f', n = {r.n:,}'})"
        for r in table.itertuples()
    ]
    axis.set_yticks(place, labels)
    axis.set_xlabel(unit)
    axis.set_ylim(len(table) - 0.5, -0.5)  # the first on top
    figure.suptitle(f"{title} ({sentences.counted(table['n'])})", fontsize=10)
    _legend_below(figure, axis, columns=3, fontsize=7)
    return figure


def efficiency(table: pd.DataFrame, title: str) -> Figure:
    """`compare.efficiency`: gain against queries seen and seconds of training, a line per way of training."""
    figure, ((left, right),) = axes_of(columns=2, size=(9, 3.2))
    panels = ((left, "queries", "training queries seen"), (right, "seconds", "seconds of training"))
    for axis, column, label in panels:
        for name, part in table.groupby("run", sort=False):
            points = part.sort_values(column)
            style = {"marker": "o", "capsize": 2, "color": MODEL_COLOURS.get(name), "label": name}
            axis.errorbar(points[column], points["value"], yerr=spread(points), **style)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel=label, ylabel="points of hit@5 over stage 2")
    _legend_below(figure, left, columns=2)
    figure.suptitle(f"{title} ({sentences.counted(table['n'])}, 95 % intervals)", fontsize=10)
    return figure


def generalisation(table: pd.DataFrame, title: str) -> Figure:
    """Forest plot of unseen data, a line per row: each model with its 95 % interval over queries, and chance.

    Args:
        table: columns row, model, value, ci_low, ci_high, chance (shares), n.
    """
    rows, models = table.groupby("row", sort=False)[["chance", "n"]].first(), table["model"].unique()
    figure, ((axis,),) = axes_of(size=(8.4, 0.42 * len(rows) + 1.4))
    y = np.arange(len(rows))
    for place, model in enumerate(models):
        points = 100 * table[table["model"] == model].set_index("row")[INTERVAL].reindex(rows.index)
        style = {"fmt": "o", "markersize": 3.5, "elinewidth": 1.1, "color": MODEL_COLOURS.get(model)}
        beside = y + 0.7 * ((place + 0.5) / len(models) - 0.5)
        axis.errorbar(points["value"], beside, xerr=spread(points), label=model, **style)
    axis.plot(100 * rows["chance"], y, "k|", markersize=18, label="chance")
    axis.set(xlabel="% of queries, macro mean where a row has groups (higher is better)", xlim=(-1, 101))
    axis.set_yticks(y, [f"{row}, n = {n:,}" for row, n in rows["n"].items()])
    axis.invert_yaxis()
    figure.suptitle(f"{title} (95 % intervals over queries, ties against the target)", fontsize=10)
    _legend_below(figure, axis, columns=len(models) + 1)
    return figure


def frames_seen(table: pd.DataFrame, title: str) -> Figure:
    """Hit rate against frames per clip: a panel for each model, a line for each motion, 95 % intervals.

    Args:
        table: columns model, motion, frames, value, ci_low, ci_high (shares), n.
    """
    models = table.groupby("model", sort=False)
    figure, axes = axes_of(1, max(1, len(models)), (4.2 * max(1, len(models)), 3.2))
    for axis, (model, part) in zip(axes.flat, models, strict=False):
        motions = part.groupby("motion", sort=False)
        for place, (motion, points) in enumerate(motions):
            beside = points["frames"] * 1.06 ** (place - (len(motions) - 1) / 2)  # else they hide one another
            style = {"marker": "o", "capsize": 2, "label": motion}
            axis.errorbar(beside, 100 * points["value"], yerr=100 * spread(points), **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(set(table["frames"])))
        axis.set(xlabel="frames looked at", ylabel="hit@5, % (higher is better)", title=model)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_ylim(0, 100 * table["ci_high"].max() * 1.05)
    _legend_below(figure, axes[0, 0], columns=4)
    figure.suptitle(f"{title} ({sentences.counted(table['n'])}, 95 % intervals)", fontsize=10)
    return figure


def grain_distances(table: pd.DataFrame, paper: dict[str, float], title: str) -> Figure:
    """Box plot of cosine distances by grain kind and model; dashed: the means of the paper's Figure 4."""
    figure, ((axis,),) = axes_of(size=(7, 3.6))
    style = {"palette": MODEL_COLOURS, "fliersize": 1.5, "linewidth": 0.8}
    sns.boxplot(table, x="kind", y="distance", hue="model", ax=axis, **style)
    for name, value in paper.items():
        axis.axhline(value, color="black", linestyle="--", linewidth=0.8)
        axis.text(axis.get_xlim()[1], value, f" paper, {name}: {value}", va="center", fontsize=7)
    axis.set(xlabel="grain taken away", ylabel="1 - cosine (0 = grain is not there)")
    counts = table.groupby("kind", sort=False)["qid"].nunique()
    axis.set_xticks(range(len(counts)), [f"{kind}\n{n} queries" for kind, n in counts.items()])
    axis.set_title(f"{title} (n = {table['qid'].nunique()} queries)")
    axis.legend(frameon=False, fontsize=8)
    return figure


def error_bars(table: pd.DataFrame, title: str) -> Figure:
    """Share of queries whose top-1 answer lacks a grain, by kind and model; 95 % intervals over queries."""
    figure, ((axis,),) = axes_of(size=(7, 3.3))
    shares = table.assign(share=100 * table["wrong"])
    style = {"palette": MODEL_COLOURS, "err_kws": {"linewidth": 0.9}}
    sns.barplot(shares, x="kind", y="share", hue="model", ax=axis, errorbar=("ci", 95), seed=0, **style)
    axis.set(xlabel="grain of the wanted answer", ylabel="top-1 answers without it, %\n(lower is better)")
    axis.set_title(f"{title} (n = {table['qid'].nunique():,} queries, 95 % intervals)")
    axis.legend(frameon=False, fontsize=8)
    return figure


def neighbourhoods(tables: dict[str, pd.DataFrame], title: str) -> Figure:
    """t-SNE maps of one query's candidates, one panel per model."""
    figure, axes = axes_of(1, len(tables), (4.2 * len(tables), 3.8))
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=True):
        for role, colour in ROLE_COLOURS.items():
            points = table[table["role"] == role]
            size, marker = 90 if role in ("query", "positive") else 22, "*" if role == "query" else "o"
            axis.scatter(points["x"], points["y"], s=size, c=colour, marker=marker, label=role)
        axis.set(title=f"{name} ({len(table)} points)", xticks=[], yticks=[])
    _legend_below(figure, axes.flat[0], columns=4)
    figure.suptitle(title, fontsize=10)
    return figure


def quality_against_speed(table: pd.DataFrame, title: str) -> Figure:
    """Hit rate (95 % interval over queries) against queries per second (range), a point per way to answer.

    Args:
        table: way, value, ci_low, ci_high (percent), per second (nan: not timed), lowest, highest, n, rounds.
    """
    figure, ((axis,),) = axes_of(size=(7.2, 3.8))
    for place, r in enumerate(table.to_dict("records")):
        colour = MODEL_COLOURS.get(r["way"], WAY_COLOURS[place % len(WAY_COLOURS)])
        if np.isnan(r["per second"]):
            axis.axhline(r["value"], color=colour, ls="--", label=f"{r['way']} (speed not measured)")
            continue
        style = {"fmt": "osD^vP"[place % 6], "color": colour, "capsize": 2, "label": r["way"]}
        rates = spread(r, "per second", "lowest", "highest")
        axis.errorbar(r["per second"], r["value"], spread(r), rates, **style)
    axis.set_xlim(0, 1.08 * table["highest"].max())
    rounds = f"median and range of {table['rounds'].min():.0f} rounds"
    axis.set(xlabel=f"queries per second, one process ({rounds})", ylabel="hit@5, % (higher is better)")
    n = sentences.counted(table["n"])
    axis.set_title(f"{title} ({n}; vertical: 95 % intervals over them)", fontsize=10)
    _legend_below(figure, axis, columns=2)
    return figure


def reranking(table: pd.DataFrame, first: str, title: str) -> Figure:
    """Hit rates against milliseconds per query, before (`first`) and after reranking; dashed: the oracle.

    Args:
        table: `reranking.table`; the oracle, the best order of what was reranked, has no seconds.
    """
    figure, (panels,) = axes_of(columns=2, size=(9.0, 3.8))
    columns = ["seconds", "lower quartile", "upper quartile"]
    table = table.assign(**(1000 * table[columns]))
    timed, oracle = table[table["seconds"].notna()], table[table["seconds"].isna()]
    before = timed[timed["model"] == first].iloc[0]
    for axis, metric in zip(panels, ("hit@1", "hit@5"), strict=True):
        for place, r in enumerate(timed.to_dict("records")):
            colour = MODEL_COLOURS.get(r["model"], WAY_COLOURS[place % len(WAY_COLOURS)])
            ends = [before["seconds"], r["seconds"]], [before[metric], r[metric]]
            axis.plot(*ends, color=colour, linewidth=0.8, alpha=0.5)
            along, across = spread(r, metric, f"{metric} low", f"{metric} high"), spread(r, *columns)
            style = {"fmt": "o", "color": colour, "capsize": 2, "label": r["model"]}
            axis.errorbar(r["seconds"], r[metric], along, across, **style)
        for r in oracle.to_dict("records"):
            axis.axhline(r[metric], color="grey", linestyle="--", linewidth=0.9, label=r["model"])
        axis.set(xlabel="milliseconds per query (median and quartiles)", xlim=(0, None), ylim=(0, None))
        axis.set_ylabel(f"{metric}, % (95 % interval)")
    title += f" ({sentences.counted(table['n'])}; higher and further left is better)"
    figure.suptitle(title, fontsize=11)
    _legend_below(figure, panels[0], columns=3)
    return figure
