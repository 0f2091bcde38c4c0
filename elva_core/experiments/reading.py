"""The steps under backbones that read better or worse, and what public work reports on the same question.

rows, not_run = reading.against_reading(done, settings)
reading.figure(rows)
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from elva_core import config
from elva_core.config import ProfileError, Settings
from elva_core.evaluation import statistics
from elva_core.experiments import figures, results, sentences, study
from elva_core.experiments.decomposition import (
    COLOURS,
    CUTOFFS,
    RET,
    STEPS,
    average,
    interval,
    panels,
    table,
)
from elva_core.experiments.study import Study


def against_reading(done: Study, settings: Settings) -> tuple[pd.DataFrame, str]:
    """The steps under backbones that read more or less well: this study, and those of `study.reading`.

    Returns:
        profile, reading (percent: `headroom.reading` of stage 2, mean over its seeds), step, metric, value,
        ci_low, ci_high (points), n, seeds (their number); and what was not run, with its command ("" where
        nothing is missing).
    """
    studies, words, rows = {settings.profile: done}, [], []
    for name in settings.study.reading:
        try:
            studies[name] = study.read(study.folders(name)[0], config.load(name))
        except ProfileError as error:
            words.append(f"{name}: {error}")
    if not settings.study.reading:
        words.append(
            "no other backbone: keep earlier steps of a teaching (python -m elva_core teach), write a "
            f"profile that extends {settings.profile} with such a backbone.path, run it (python -m "
            "elva_core run PROFILE, study PROFILE), and name it in study.reading of "
            f"params/{settings.profile}.yaml"
        )
    for name, one in studies.items():
        runs = one.runs[one.runs["arm"] == RET]
        reading = 100 * runs["reading"].mean() if "reading" in runs else np.nan
        if np.isnan(reading):
            words.append(
                f"{name}: its results have no reading of stage 2; move {study.folders(name)[0]} away and run "
                f"{study.command(name)}"
            )
            continue
        steps = average(table(one, None, settings)).dropna(subset="value")
        steps["seeds"] = steps["seeds"].map(len)
        rows.append(steps.assign(profile=name, reading=reading))
    columns = ["profile", "reading", "step", "metric", *results.NUMBERS, "n", "seeds"]
    out = pd.concat(rows)[columns] if rows else pd.DataFrame(columns=columns)
    return out.reset_index(drop=True), "Not run: " + "; ".join(words) + "." if words else ""


def told(rows: pd.DataFrame) -> str:
    """Points of each step under the other backbones, and how well each of all reads, in words.

    Args:
        rows: of `against_reading`, this study's first; nothing is said of one backbone alone.
    """
    own, *others = rows["profile"].unique() if len(rows) else [""]
    if not others:
        return ""
    at, cuts = rows.set_index(["profile", "step", "metric"]), [f"hit@{k}" for k in CUTOFFS]
    read, seeds = (rows.groupby("profile")[column].first() for column in ("reading", "seeds"))
    said = []
    for name in others:
        points = "; ".join(
            f"{step} {' / '.join(interval(at.loc[name, step, cut]) for cut in cuts)}"
            for step in [*STEPS, "all"]
        )
        trained = f"{name}, {_seeds(seeds[name])}"
        said.append(f"Where stage 2 reads {read[name]:.0f} % of the pictures exactly ({trained}): {points}.")
    said.append(
        f"Points of {' / '.join(cuts)}, {sentences.counted(rows['n'])}; {own} reads {read[own]:.0f} % "
        "and was taught other drawings, too."
    )
    return " ".join(said)


def _seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def figure(rows: pd.DataFrame) -> Figure:
    """Points of each step under each backbone, a panel for each cut-off."""
    drawn, axes = panels((9.6, 3.4))
    backbones = rows.groupby("profile")[["reading", "seeds"]].first().sort_values("reading")
    for axis, k in zip(axes, CUTOFFS, strict=True):
        for place, step in enumerate(STEPS):
            chosen = rows["step"].eq(step) & rows["metric"].eq(f"hit@{k}")
            part = rows[chosen].set_index("profile").reindex(backbones.index)
            beside = np.arange(len(backbones)) + 0.12 * (place - 1)  # else intervals hide one another
            style = {"fmt": "o", "capsize": 3, "color": COLOURS[step], "label": step}
            axis.errorbar(beside, part["value"], yerr=figures.spread(part), **style)
        labels = [
            f"{row.Index}: {row.reading:.0f} % read\n{_seeds(row.seeds)}" for row in backbones.itertuples()
        ]
        axis.set_xticks(range(len(backbones)), labels)
        axis.set_xlim(-0.5, max(len(backbones), 1) - 0.5)
    axes[0].set_ylabel("percentage points")
    axes[0].legend(frameon=False, fontsize=8)
    n = f"n = {int(rows['n'].min()):,} queries a point" if len(rows) else "not run"
    drawn.suptitle(
        "Each step under backbones that read more or fewer pictures exactly, and were taught otherwise\n"
        f"{n}, 95 % intervals over queries",
        fontsize=10,
    )
    return drawn


def public_work() -> pd.DataFrame:
    """Public results on the same question: scores, points of generation and of RL, share of RL."""
    works = pd.DataFrame(statistics.reported()["public_work"]["works"])
    none, written, learnt = (works[name].astype(float) for name in ("no generation", "generation", "with RL"))
    points = {"of generation, points": written - none, "of RL, points": learnt - written}
    share = (100 * (learnt - written) / (learnt - none)).where(learnt > none)
    order = ["work", "benchmark", "no generation", "generation", "with RL", *points, "share of RL, %"]
    works = works.assign(**points, **{"share of RL, %": share}, note=works["note"].fillna(""))
    return works[[*order, "note", "source"]]
