"""One function per figure: DataFrame -> Figure. No file is read, nothing is shown, no global style is changed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from elva_core.config import RewardSettings
from elva_core.data import images
from elva_core.training import rewards

MODEL_COLOURS = {
    "zero-shot": "#9aa0a6",
    "stage 2": "#4c78a8",
    "InfoNCE control": "#e4a23a",
    "stage 3": "#c43d4b",
}
WAY_COLOURS = ("#9aa0a6", "#2e8b57", "#4c78a8", "#e4a23a", "#7b5ea7")
PRINTED, CORRECTED = "#c43d4b", "#4c78a8"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 11,
    "font.size": 9,
}


def _axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 3.4)):
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def image_grid(rows: Sequence[tuple[str, Sequence[tuple[str, Path | None]]]], title: str) -> Figure:
    """One row per label with captioned pictures; a picture without a path is a text card."""
    columns = max(len(cells) for _, cells in rows)
    figure, axes = _axes(len(rows), columns, (1.35 * columns + 0.8, 1.45 * len(rows) + 0.4))
    for line, (label, cells) in zip(axes, rows, strict=True):
        for place, axis in enumerate(line):
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
            if place < len(cells):
                caption, path = cells[place]
                if path is not None:
                    axis.imshow(images.open_image(path))
                    axis.set_title(_wrapped(caption), fontsize=6)
                else:
                    axis.text(
                        0.5,
                        0.5,
                        _wrapped(caption),
                        ha="center",
                        va="center",
                        fontsize=7,
                        transform=axis.transAxes,
                    )
        line[0].set_ylabel(label, fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def retrieved(
    rows: Sequence[tuple[str, Path | None, Sequence[tuple[str, Sequence[tuple[str, Path | None, bool]]]]]],
    title: str,
) -> Figure:
    """Queries with the top answers of each model; a right answer has a green frame.

    Args:
        rows: (query text, query image, [(model, [(caption, image, right), ...]), ...]) per query.
    """
    depth = max(len(answers) for _, _, models in rows for _, answers in models)
    lines = [
        (query, image, model, answers, i == 0)
        for query, image, models in rows
        for i, (model, answers) in enumerate(models)
    ]
    figure, axes = _axes(len(lines), depth + 1, (1.3 * (depth + 1), 1.4 * len(lines) + 0.4))
    for line, (query, image, model, answers, first) in zip(axes, lines, strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        if first:
            if image is not None:
                line[0].imshow(images.open_image(image))
            line[0].set_title(_wrapped(f"query: {query}"), fontsize=6)
        line[0].set_ylabel(model, fontsize=8)
        for axis, (caption, path, right) in zip(line[1:], answers, strict=False):
            if path is not None:
                axis.imshow(images.open_image(path))
                axis.set_title(_wrapped(caption), fontsize=5)
            else:
                axis.text(
                    0.5,
                    0.5,
                    _wrapped(caption),
                    ha="center",
                    va="center",
                    fontsize=6,
                    transform=axis.transAxes,
                )
            if right:
                axis.spines[:].set(visible=True, color="#2e8b57", linewidth=2.5)
    figure.suptitle(title, fontsize=10)
    return figure


def contact_sheet(cards: Sequence[tuple[str, Path | None, str]], title: str, columns: int = 6) -> Figure:
    """A grid of pictures with a label under each; the first has a frame.

    Args:
        cards: (text, image, label); a text without an image is a text card, with one it goes under the label.
    """
    lines = -(-len(cards) // columns)
    figure, axes = _axes(lines, columns, (1.6 * columns, 1.9 * lines + 0.4))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for axis, (text, image, label) in zip(axes.flat, cards, strict=False):
        text = _wrapped(text.replace("$", r"\$"))  # no formulas
        if image is not None:
            axis.imshow(images.open_image(image))
            label = f"{label}\n{text}".strip()
        else:
            axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=7, transform=axis.transAxes)
            axis.set(aspect="equal")
        axis.set_xlabel(label, fontsize=7)
    axes.flat[0].spines[:].set(visible=True, color="#4c78a8", linewidth=2)
    figure.suptitle(title, fontsize=10)
    return figure


def _wrapped(text: str, width: int = 22) -> str:
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:4])


def counts(table: pd.DataFrame, x: str, y: str, title: str, unit: str) -> Figure:
    """Bars with their value printed."""
    figure, ((axis,),) = _axes(size=(6.4, 0.32 * len(table) + 1.2))
    bars = axis.barh(table[y].astype(str), table[x], color="#4c78a8")
    axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axis.set(title=title, xlabel=unit)
    axis.margins(x=0.12)
    axis.invert_yaxis()
    return figure


def histogram(values: pd.Series, title: str, unit: str) -> Figure:
    """Distribution of a count, with n and the median."""
    figure, ((axis,),) = _axes()
    sns.histplot(values, discrete=True, ax=axis, color="#4c78a8")
    axis.axvline(
        values.median(),
        color="#c43d4b",
        linestyle="--",
        label=f"median {values.median():.0f}, n = {len(values):,}",
    )
    axis.set(title=title, xlabel=unit, ylabel="queries")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center")
    return figure


def curves(history: pd.DataFrame, columns: Sequence[tuple[str, str]], title: str, window: int = 15) -> Figure:
    """Training curves: each column with its running mean.

    Args:
        history: one row per step, with `step`. columns: (column, axis label with unit).
    """
    width = 3 if len(columns) > 4 else min(2, len(columns))
    height = -(-len(columns) // width)
    figure, axes = _axes(height, width, (3.3 * width, 2.2 * height + 0.4))
    for axis, (column, label) in zip(axes.flat, columns, strict=False):
        for name, part in history.groupby("run", sort=False) if "run" in history else [("", history)]:
            (line,) = axis.plot(
                part["step"],
                part[column].rolling(window, min_periods=1).mean(),
                label=name or None,
                linewidth=1.6,
            )
            axis.plot(part["step"], part[column], color=line.get_color(), alpha=0.25, linewidth=0.7)
        axis.set(xlabel="step", ylabel=textwrap.fill(label, 26))  # a panel is not higher
    if "run" in history:
        axes.flat[0].legend(frameon=False, fontsize=8)
    for axis in axes.flat[len(columns) :]:
        axis.remove()
    figure.suptitle(f"{title} (n = {history['step'].nunique()} steps, mean of {window})", fontsize=11)
    return figure


def rank_weights(ranks: Sequence[int], gamma: float) -> tuple[Figure, pd.DataFrame]:
    """Weight of a negative against its rank, as printed and corrected, and the positive's discount."""
    import torch

    k = torch.tensor(ranks)
    table = pd.DataFrame(
        {
            "rank": ranks,
            "printed": rewards.negative_weights(k, "printed"),
            "corrected": rewards.negative_weights(k, "corrected"),
            "positive": 1 / (1 + k.float().log()),
        }
    )
    figure, axes = _axes(1, 2, (8, 3))
    axes[0, 0].axhline(0, color="black", linewidth=0.8)
    axes[0, 0].plot(table["rank"], table["printed"], label="printed: ln k - 1", color=PRINTED)
    axes[0, 0].plot(
        table["rank"],
        table["corrected"],
        label="corrected: max(0, ln k - 1)",
        color=CORRECTED,
        linestyle="--",
    )
    axes[0, 0].set(
        xlabel="rank k of the negative",
        ylabel="weight of the penalty",
        title=f"Below 0 a negative is rewarded (gamma = {gamma})",
        xscale="log",
    )
    axes[0, 0].legend(frameon=False)
    axes[0, 1].plot(table["rank"], table["positive"], color=CORRECTED)
    axes[0, 1].set(
        xlabel="rank r of the positive",
        ylabel="1 / (1 + ln r)",
        title="Discount of the positive",
        xscale="log",
        ylim=(0, 1.05),
    )
    return figure, table


def hardest_negative(
    settings: RewardSettings, positive: float, others: Sequence[float]
) -> tuple[Figure, pd.DataFrame]:
    """Both rewards and their sum while one negative comes closer and passes the positive, as printed and corrected.

    Args:
        positive: cosine of the positive. others: cosines of the other negatives, held fixed.
    """
    import torch

    hardest = torch.linspace(0, 1, 201)
    s_p, s_n = (
        torch.full_like(hardest, positive),
        torch.cat([hardest[:, None], torch.tensor(others).expand(201, -1)], dim=1),
    )
    margin = rewards.margin_reward(s_p, s_n, delta=settings.delta)
    table = pd.DataFrame({"hardest": hardest, "R_margin": margin})
    for form in ("printed", "corrected"):
        rank = rewards.rank_reward(
            s_p, s_n, gamma=settings.gamma, form=form, reduction=settings.penalty_reduction
        )
        total = rewards.total_reward(margin, rank, alpha=settings.alpha, epsilon=settings.epsilon)
        table[f"R_rank {form}"], table[f"R_total {form}"] = rank, total
    figure, axes = _axes(1, 3, (10, 3))
    for axis, name in zip(axes.flat, ("R_margin", "R_rank", "R_total"), strict=True):
        forms = [c for c in table.columns if c.startswith(name)]
        for column, colour, dash in zip(forms, (PRINTED, CORRECTED), ("-", "--"), strict=False):
            axis.plot(
                table["hardest"],
                table[column],
                color=colour,
                linestyle=dash,
                label=column.removeprefix(name).strip() or None,
            )
        axis.axvline(positive, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="cosine of the hardest negative", title=name)
    axes[0, 0].set_ylabel("reward")
    axes[0, 2].legend(frameon=False, title=f"{len(others)} others fixed", fontsize=7, title_fontsize=7)
    figure.suptitle(
        f"Reward while one negative passes the positive (dotted: cosine {positive:.2f})", fontsize=10
    )
    return figure, table


def model_bars(table: pd.DataFrame, title: str, metric: str) -> Figure:
    """Grouped bars with 95 % intervals: one group per unit, one bar per model.

    Args:
        table: columns unit, model, value, ci_low, ci_high (shares), n.
    """
    units, models = list(dict.fromkeys(table["unit"])), list(dict.fromkeys(table["model"]))
    figure, ((axis,),) = _axes(size=(max(6.4, 1.15 * len(units) + 2), 3.6))
    width = 0.8 / len(models)
    for place, model in enumerate(models):
        part = table[table["model"] == model].set_index("unit").reindex(units)
        x = np.arange(len(units)) + (place - (len(models) - 1) / 2) * width
        spread = 100 * np.vstack([part["value"] - part["ci_low"], part["ci_high"] - part["value"]]).clip(
            min=0
        )
        axis.bar(
            x,
            100 * part["value"],
            width,
            yerr=spread,
            label=model,
            color=MODEL_COLOURS.get(model),
            error_kw={"elinewidth": 0.9},
        )
    axis.set(
        xticks=np.arange(len(units)),
        ylabel=f"{metric}, % (higher is better)",
        title=f"{title} (n = {table['n'].min()} queries a bar, 95 % interval)",
        ylim=(0, None),
    )
    axis.set_xticklabels([u.replace("_", "\n", 1) for u in units])
    axis.legend(frameon=False, ncols=len(models), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def grain_distances(table: pd.DataFrame, paper: dict[str, float], title: str) -> Figure:
    """Cosine distance by grain kind and model; the paper's means as dashed lines."""
    figure, ((axis,),) = _axes(size=(7, 3.6))
    sns.boxplot(
        table,
        x="kind",
        y="distance",
        hue="model",
        palette=MODEL_COLOURS,
        ax=axis,
        fliersize=1.5,
        linewidth=0.8,
    )
    for name, value in paper.items():
        axis.axhline(value, color="black", linestyle="--", linewidth=0.8)
        axis.text(axis.get_xlim()[1], value, f" paper, Figure 4\n {name}: {value}", va="center", fontsize=7)
    axis.set(
        title=f"{title} (n = {table['qid'].nunique()} queries)",
        xlabel="grain taken away",
        ylabel="1 - cosine (0 = grain is not there)",
    )
    axis.legend(frameon=False, fontsize=8)
    return figure


def neighbourhoods(tables: dict[str, pd.DataFrame], title: str) -> Figure:
    """t-SNE maps of one query's candidates, one panel per model."""
    figure, axes = _axes(1, len(tables), (4.2 * len(tables), 3.8))
    colours = {"other": "#c7c7c7", "one grain differs": "#e4a23a", "positive": "#2e8b57", "query": "#c43d4b"}
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=True):
        for role, colour in colours.items():
            part = table[table["role"] == role]
            axis.scatter(
                part["x"],
                part["y"],
                s=90 if role in ("query", "positive") else 22,
                c=colour,
                marker="*" if role == "query" else "o",
                label=role,
            )
        axis.set(title=f"{name} ({len(table)} points)", xticks=[], yticks=[])
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        ncols=4,
        loc="outside lower center",
    )
    figure.suptitle(title, fontsize=10)
    return figure


def error_bars(table: pd.DataFrame, title: str) -> Figure:
    """Share of queries whose top-1 answer lacks a grain, by kind and model, with 95 % intervals over the queries."""
    figure, ((axis,),) = _axes(size=(7, 3.3))
    shares, lines = table.assign(share=100 * table["wrong"]), {"linewidth": 0.9}
    sns.barplot(
        shares,
        x="kind",
        y="share",
        hue="model",
        palette=MODEL_COLOURS,
        ax=axis,
        errorbar=("ci", 95),
        seed=0,
        err_kws=lines,
    )
    axis.set(
        title=f"{title} (n = {table['qid'].nunique():,} queries, 95 % intervals)",
        xlabel="grain of the wanted answer",
        ylabel="top-1 answers without it, %\n(lower is better)",
    )
    axis.legend(frameon=False, fontsize=8)
    return figure


def speed_ratios(table: pd.DataFrame) -> Figure:
    """How many times as fast as the alternative, with the range of the rounds and the target of each comparison."""
    figure, ((axis,),) = _axes(size=(6.4, 0.6 + 0.6 * len(table)))
    spread = [table["ratio"] - table["lowest ratio"], table["highest ratio"] - table["ratio"]]
    axis.barh(
        table["comparison"], table["ratio"], xerr=np.array(spread), height=0.5, color=MODEL_COLOURS["stage 2"]
    )
    axis.plot(table["target"], table["comparison"], "k|", markersize=22, label="target")
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set(
        xlabel="times as fast (median, range of rounds)",
        title=f"Stage 3 against the alternatives (n = {table['rounds'].min()} rounds)",
    )
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=7)
    return figure


def search_costs(speed: pd.DataFrame, growth: pd.DataFrame, memory: pd.DataFrame) -> Figure:
    """Queries per second beside FAISS, seconds over the size of the pool, peak memory beside the size of the pool on disk.

    Args:
        speed: columns comparison, ours per s, theirs per s. growth: columns pool, seconds. memory: columns pool and peak, in MB.
    """
    figure, ((left, middle, right),) = _axes(columns=3, size=(10.5, 3.2))
    place = np.arange(len(speed))
    left.barh(place - 0.2, speed["ours per s"], height=0.4, color=CORRECTED, label="ours")
    left.barh(
        place + 0.2, speed["theirs per s"], height=0.4, color=MODEL_COLOURS["zero-shot"], label="FAISS, top k"
    )
    left.set(yticks=place, yticklabels=speed["comparison"], xlabel="queries per second", title="Throughput")
    left.invert_yaxis()
    left.margins(x=0.3)
    left.legend(frameon=False, fontsize=7, loc="upper right")
    middle.plot(growth["pool"] / 1000, growth["seconds"], "o-", color=CORRECTED, label="measured")
    line = growth["pool"] / 1000, growth["pool"] * (growth["seconds"].iloc[-1] / growth["pool"].iloc[-1])
    middle.plot(*line, "--", color="grey", linewidth=0.8, label="proportional")
    middle.set(xlabel="pool, thousands of vectors", ylabel="seconds, 1 thread", title="Growth with the pool")
    middle.legend(frameon=False, fontsize=7)
    place = np.arange(len(memory))
    right.bar(place - 0.2, memory["pool"], width=0.4, color=MODEL_COLOURS["zero-shot"], label="pool on disk")
    right.bar(place + 0.2, memory["peak"], width=0.4, color=CORRECTED, label="peak of the process")
    right.set(
        xticks=place,
        xticklabels=[f"{int(n):,}" for n in memory.index],
        xlabel="vectors on disk",
        ylabel="MB",
        title="Memory",
    )
    right.margins(y=0.25)
    right.legend(frameon=False, fontsize=7, loc="upper left")
    return figure


def quality_against_speed(table: pd.DataFrame, title: str) -> Figure:
    """One point per way to answer: its hit rate with the 95 % interval over queries, against queries per second with their range.

    Args:
        table: columns way, value, ci_low, ci_high (percent), per second, lowest, highest, n, rounds.
    """
    figure, ((axis,),) = _axes(size=(7.2, 3.8))
    for place, r in enumerate(table.to_dict("records")):
        low, high = max(0, r["value"] - r["ci_low"]), max(0, r["ci_high"] - r["value"])
        slow, fast = r["per second"] - r["lowest"], r["highest"] - r["per second"]
        colour, mark = MODEL_COLOURS.get(r["way"], WAY_COLOURS[place % len(WAY_COLOURS)]), "osD^vP"[place % 6]
        axis.errorbar(
            r["per second"],
            r["value"],
            [[low], [high]],
            [[slow], [fast]],
            fmt=mark,
            color=colour,
            capsize=2,
            label=r["way"],
        )
    axis.set_xscale("log")
    for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        which("{x:,.0f}")
    axis.set(
        xlabel=f"queries per second, one process (median and range of {table['rounds'].min()} rounds)",
        ylabel="hit@5, % (higher is better)",
        title=f"{title} (n = {table['n'].min():,} queries, 95 % intervals)",
    )
    figure.legend(
        *axis.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=2, loc="outside lower center"
    )
    return figure


def second_look(table: pd.DataFrame, first: str, title: str) -> Figure:
    """Hit rates against the milliseconds of a query, before (`first`) and after; dashed: the best order of what was looked at.

    Args:
        table: `fusion.table`.
    """
    figure, (pair,) = _axes(columns=2, size=(9.0, 3.8))
    columns = ["seconds", "lower quartile", "upper quartile"]
    table = table.assign(**(1000 * table[columns]))
    timed, ceiling = table[table["seconds"].notna()], table[table["seconds"].isna()]
    for axis, metric in zip(pair, ("hit@1", "hit@5"), strict=True):
        before = timed[timed["model"] == first].iloc[0]
        for place, r in enumerate(timed.to_dict("records")):
            colour = MODEL_COLOURS.get(r["model"], f"C{place}")
            if r["model"] != first:
                axis.plot(
                    [before["seconds"], r["seconds"]],
                    [before[metric], r[metric]],
                    color=colour,
                    linewidth=0.8,
                    alpha=0.5,
                )
            across = [[r["seconds"] - r["lower quartile"]], [r["upper quartile"] - r["seconds"]]]
            along = [[max(0, r[metric] - r[f"{metric} low"])], [max(0, r[f"{metric} high"] - r[metric])]]
            axis.errorbar(
                r["seconds"], r[metric], along, across, fmt="o", color=colour, capsize=2, label=r["model"]
            )
        for r in ceiling.to_dict("records"):
            axis.axhline(r[metric], color="grey", linestyle="--", linewidth=0.9, label=r["model"])
        axis.set(
            xlabel="milliseconds per query (median and quartiles)",
            ylabel=f"{metric}, % (95 % interval)",
            xlim=(0, None),
            ylim=(0, None),
        )
    figure.suptitle(
        f"{title} (n = {table['n'].min():,} queries; higher and further left is better)", fontsize=11
    )
    figure.legend(
        *pair[0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="outside lower center"
    )
    return figure


def arms(table: pd.DataFrame, title: str, unit: str) -> Figure:
    """One line per arm: the mean over seeds with its 95 % interval over queries, and each seed as a dot.

    Args:
        table: columns arm, value, ci_low, ci_high, by seed (tuple of values), n, and paper where it printed one; in `unit`.
            Values may be differences.
    """
    figure, ((axis,),) = _axes(size=(7.6, 0.34 * len(table) + 1.3))
    place = np.arange(len(table))
    spread = np.vstack([table["value"] - table["ci_low"], table["ci_high"] - table["value"]]).clip(min=0)
    axis.errorbar(
        table["value"],
        place,
        xerr=spread,
        fmt="o",
        color=CORRECTED,
        markersize=5,
        elinewidth=1.4,
        label="mean, 95 % over queries",
    )
    several = [(y, seeds) for y, seeds in zip(place, table["by seed"], strict=True) if len(seeds) > 1]
    if several:
        values, rows = [v for _, seeds in several for v in seeds], [y for y, seeds in several for _ in seeds]
        axis.plot(values, rows, "|", color=PRINTED, markersize=9, label="one seed")
    if "paper" in table and table["paper"].notna().any():
        axis.plot(table["paper"], place, "D", color="#444444", markersize=4, label="paper")
    if (table["ci_low"] <= 0).any():
        axis.axvline(0, color="black", linewidth=0.8)
    labels = [f"{r.arm}  ({len(r.seeds)} seeds)" if len(r.seeds) > 1 else r.arm for r in table.itertuples()]
    axis.set(yticks=place, xlabel=unit)
    axis.set_yticklabels(labels)
    axis.invert_yaxis()
    figure.suptitle(f"{title} ({_queries(table)})", fontsize=10)
    figure.legend(
        *axis.get_legend_handles_labels(), frameon=False, fontsize=7, ncols=3, loc="outside lower center"
    )
    return figure


def frames_seen(table: pd.DataFrame, title: str) -> Figure:
    """Hit rate against the number of frames that are looked at: a panel for each model, a line for each motion, 95 % intervals.

    Args:
        table: columns model, motion, frames, value, ci_low, ci_high (shares), n.
    """
    models = list(dict.fromkeys(table["model"]))
    figure, axes = _axes(1, max(1, len(models)), (4.2 * max(1, len(models)), 3.2))
    for axis, model in zip(axes.flat, models, strict=False):
        motions = table[table["model"] == model].groupby("motion", sort=False)
        for place, (motion, own) in enumerate(motions):
            spread = 100 * np.vstack([own["value"] - own["ci_low"], own["ci_high"] - own["value"]]).clip(
                min=0
            )
            beside = own["frames"] * 1.06 ** (
                place - (len(motions) - 1) / 2
            )  # else intervals hide one another
            axis.errorbar(beside, 100 * own["value"], yerr=spread, marker="o", label=motion, capsize=2)
        axis.set_xscale("log", base=2)
        axis.set(
            xticks=sorted(set(table["frames"])),
            xlabel="frames looked at",
            ylabel="hit@5, % (higher is better)",
            title=model,
        )
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_ylim(0, 100 * table["ci_high"].max() * 1.05)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        ncols=4,
        loc="outside lower center",
    )
    figure.suptitle(
        f"{title} (n = {table['n'].min() if models else 0:,} queries a point, 95 % intervals)", fontsize=10
    )
    return figure


def efficiency(table: pd.DataFrame, title: str) -> Figure:
    """Hit rate against queries seen and against seconds of training, one line per way of training, with 95 % intervals.

    Args:
        table: columns run, queries, seconds, value, ci_low, ci_high (percent), n.
    """
    figure, axes = _axes(1, 2, (9, 3.2))
    for axis, (column, label) in zip(
        axes.flat, (("queries", "training queries seen"), ("seconds", "seconds of training")), strict=True
    ):
        for name, part in table.groupby("run", sort=False):
            own = part.sort_values(column)
            spread = np.vstack([own["value"] - own["ci_low"], own["ci_high"] - own["value"]]).clip(min=0)
            axis.errorbar(
                own[column],
                own["value"],
                yerr=spread,
                marker="o",
                label=name,
                color=MODEL_COLOURS.get(name),
                capsize=2,
            )
        axis.set(xlabel=label, ylabel="hit@5, %")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        ncols=2,
        loc="outside lower center",
    )
    figure.suptitle(f"{title} ({_queries(table)}, 95 % intervals)", fontsize=10)
    return figure


def _queries(table: pd.DataFrame) -> str:
    return f"n = {table['n'].min():,} queries" if len(table) else "no arm of the study"


def generalisation(table: pd.DataFrame, title: str) -> Figure:
    """One line per row of unseen data: each model with its 95 % interval over queries, and what chance would give.

    Args:
        table: columns row, model, value, ci_low, ci_high, chance (shares), n.
    """
    rows, models = list(dict.fromkeys(table["row"])), list(dict.fromkeys(table["model"]))
    figure, ((axis,),) = _axes(size=(8.4, 0.42 * len(rows) + 1.4))
    for place, model in enumerate(models):
        part = (
            100
            * table[table["model"] == model].set_index("row").reindex(rows)[["value", "ci_low", "ci_high"]]
        )
        y = np.arange(len(rows)) + 0.7 * ((place + 0.5) / len(models) - 0.5)
        spread = np.vstack([part["value"] - part["ci_low"], part["ci_high"] - part["value"]]).clip(min=0)
        style = {"fmt": "o", "markersize": 3.5, "elinewidth": 1.1, "color": MODEL_COLOURS.get(model)}
        axis.errorbar(part["value"], y, xerr=spread, label=model, **style)
    axis.plot(
        100 * table.groupby("row", sort=False)["chance"].first(),
        np.arange(len(rows)),
        "k|",
        markersize=18,
        label="chance",
    )
    counts = table.groupby("row", sort=False)["n"].first()
    axis.set(
        yticks=np.arange(len(rows)),
        xlabel="% of queries, macro mean where a row has groups (higher is better)",
        xlim=(-1, 101),
    )
    axis.set_yticklabels([f"{row}, n = {counts[row]:,}" for row in rows])
    axis.invert_yaxis()
    figure.suptitle(f"{title} (95 % intervals over queries, ties against the target)", fontsize=10)
    figure.legend(
        *axis.get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        ncols=len(models) + 1,
        loc="outside lower center",
    )
    return figure
