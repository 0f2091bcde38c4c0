"""Figures: an interval ends where its columns say, a positive is framed, text is text."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from elva_core.experiments import figures

TABLE = pd.DataFrame(
    {"value": [0.5, 0.2], "ci_low": [0.4, 0.1], "ci_high": [0.7, 0.4], "n": 10, "seeds": [(17,), (17,)], "by seed": [(0.5,), (0.2,)]}
)
NAMES = pd.DataFrame({"model": ["stage 2", "stage 3"], "run": ["a", "b"], "arm": ["a", "b"], "motion": "still", "chance": 0.1, "frames": 2})
WAYS = TABLE.assign(way=["a", "b"], lowest=[1, 3], highest=[4, 6], rounds=5, **{"per second": [2, 5]})


@pytest.mark.parametrize(
    ("figure", "axis", "factor"),
    [
        (figures.arms(TABLE.join(NAMES), "t", "points"), 0, 1),
        (figures.efficiency(TABLE.join(NAMES).assign(queries=[1, 2], seconds=3.0), "t"), 1, 1),
        (figures.frames_seen(TABLE.join(NAMES), "t"), 1, 100),
        (figures.generalisation(TABLE.join(NAMES).assign(row="r"), "t"), 0, 100),
        (figures.model_bars(TABLE.join(NAMES).assign(unit="a_b"), "t", "hit@5"), 1, 100),
        (figures.quality_against_speed(WAYS, "t"), 1, 1),
    ],
)
def test_an_interval_ends_at_ci_low_and_ci_high(figure, axis, factor):
    drawn = [segment[:, axis] for a in figure.axes for lines in a.collections for segment in lines.get_segments()]
    ends = {tuple(np.round(ends, 6)) for ends in drawn}
    assert {(0.4 * factor, 0.7 * factor), (0.1 * factor, 0.4 * factor)} <= ends


def test_every_positive_is_framed_and_a_dollar_starts_no_formula():
    rows = [("costs $5_{", None, [("stage 3", [("a $x", None, True), ("b", None, False)]), ("stage 2", [("b", None, False)])])]
    figure = figures.retrieved(rows, "t")
    assert [a.spines["top"].get_visible() for a in figure.axes] == [False, True, False, False, False, False]
    figure.savefig(io.BytesIO())
