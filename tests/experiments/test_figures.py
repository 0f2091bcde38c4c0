"""Figures: an interval ends where its columns say, a positive is framed, text is text."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

from elva_core.experiments import figures, pictures

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


PRICE, SHOP = "from $20 to $30", "Ba$$in"
TITLE = r"$5_{ or \$6$"
SHOPS = TABLE.join(NAMES).assign(**{name: [PRICE, SHOP] for name in ("model", "run", "arm", "motion", "way", "row", "unit")})
COSTS = SHOPS.assign(
    seconds=[0.1, np.nan], rounds=5, **{"per second": [2, 5], "lower quartile": 0.1, "upper quartile": 0.2}, lowest=1, highest=6
)
COSTS = COSTS.assign(**{f"hit@{k}{end}": 50.0 for k in (1, 5) for end in ("", " low", " high")})
GRAINS = pd.DataFrame({"qid": ["10:1", "10:2"] * 2, "kind": [PRICE, SHOP] * 2, "model": ["stage 2"] * 2 + ["stage 3"] * 2})
POINTS = pd.DataFrame({"x": [0.0, 1.0], "y": [0.0, 1.0], "role": ["query", "positive"]})
CELLS = [(PRICE, None), (SHOP, None)]
WITH_PRICES = {  # figures whose texts hold these three
    "counts": lambda: figures.counts(SHOPS, "n", "arm", TITLE, PRICE),
    "histogram": lambda: figures.histogram(pd.Series([1, 2]), f"{TITLE} {SHOP}", PRICE),
    "curves": lambda: figures.curves(SHOPS.assign(step=1), [("value", PRICE)], TITLE),
    "model_bars": lambda: figures.model_bars(SHOPS, TITLE, PRICE),
    "arms": lambda: figures.arms(SHOPS, TITLE, PRICE),
    "efficiency": lambda: figures.efficiency(SHOPS.assign(queries=1, seconds=3.0), TITLE),
    "generalisation": lambda: figures.generalisation(SHOPS, TITLE),
    "frames_seen": lambda: figures.frames_seen(SHOPS, TITLE),
    "grain_distances": lambda: figures.grain_distances(GRAINS.assign(distance=[0.1, 0.2] * 2), {SHOP: 0.3}, TITLE),
    "error_bars": lambda: figures.error_bars(GRAINS.assign(wrong=[0, 1] * 2), TITLE),
    "neighbourhoods": lambda: figures.neighbourhoods({PRICE: POINTS, SHOP: POINTS}, TITLE),
    "quality_against_speed": lambda: figures.quality_against_speed(COSTS, TITLE),
    "second_look": lambda: figures.reranking(COSTS, PRICE, TITLE),
    "image_grid": lambda: pictures.image_grid([(PRICE, CELLS)], TITLE),
    "retrieved": lambda: pictures.retrieved([(PRICE, None, [(SHOP, [(PRICE, None, True)])])], TITLE),
    "contact_sheet": lambda: pictures.contact_sheet([(PRICE, None, SHOP), (SHOP, None, PRICE)], TITLE),
}


@pytest.mark.parametrize("name", WITH_PRICES)
def test_text_is_text_in_every_figure(name):
    figure = WITH_PRICES[name]()
    figure.savefig(io.BytesIO(), format="png")
    texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert not [text.get_text() for text in texts if text.get_parse_math()]
    together = " ".join(" ".join(text.get_text().split()) for text in texts)
    assert all(word in together for word in (PRICE, SHOP, TITLE))


def test_ticks_of_a_logarithmic_axis_stay_powers():
    figure = pictures.PlainFigure()
    figure.subplots().set(xscale="log", xlim=(1, 1000))
    figure.savefig(io.BytesIO(), format="png")
    ticks = [text for axis in figure.axes for text in axis.get_xticklabels() if "$" in text.get_text()]
    assert ticks and all(text.get_parse_math() for text in ticks)


COLUMN = 9.4  # inches, of a notebook's outputs in a window of 1,280 pixels


@pytest.mark.parametrize("columns", [2, 6])
def test_the_captions_of_a_grid_of_pictures_have_eight_points_where_it_is_shown(columns):
    cells = [("a caption", None)] * columns
    grids = [
        pictures.image_grid([("unit", cells)], "t"),
        pictures.retrieved([("query", None, [("stage 3", [("a", None, True)] * (columns - 1))])], "t"),
        pictures.contact_sheet([("a text", None, "a label")] * columns, "t"),
    ]
    for grid in grids:
        shrunk = min(1.0, COLUMN / grid.get_figwidth())
        shown = [text.get_fontsize() * shrunk for text in grid.findobj(Text) if text.get_text()]
        assert len(shown) > columns and min(shown) >= 8


def test_no_caption_of_a_grid_covers_another_or_the_label_of_its_row(tmp_path):
    picture = tmp_path / "p.png"
    Image.new("RGB", (72, 72), "red").save(picture)
    long = "Wasserballspieler(in) mit mitteldunkler hautfarbe, Woman golfing medium tone."
    rows = [("emoji_task0", [(long, None), (long, picture)] * 3), ("emoji_task4", [(long, picture)] * 6)]
    answers = [(long, None, True), (long, picture, False)] * 2
    grids = [pictures.image_grid(rows, "t"), pictures.retrieved([(long, None, [("stage 2", answers), ("stage 3", answers)])] * 2, "t")]
    for grid in grids:
        grid.savefig(io.BytesIO(), format="png")
        boxes = [text.get_window_extent() for text in grid.findobj(Text) if text.get_text()]
        assert len(boxes) > 12 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_every_positive_is_framed():
    rows = [("costs", None, [("stage 3", [("a", None, True), ("b", None, False)]), ("stage 2", [("b", None, False)])])]
    figure = pictures.retrieved(rows, "t")
    assert [a.spines["top"].get_visible() for a in figure.axes] == [False, True, False, False, False, False]
