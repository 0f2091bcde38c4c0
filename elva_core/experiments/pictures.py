"""Figures made of images: example rows, retrieved candidates side by side, one query's contact sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text

from elva_core.data import images

CAPTION = 9  # points, of what stands at a picture
CELL = 1.6  # inches: six beside each other are no wider than a notebook
FORMULA = r"$\mathdefault{"  # how matplotlib writes the ticks of a logarithmic axis


class PlainFigure(Figure):
    """A figure in which `$` starts no formula: its titles, legends and labels hold captions and names."""

    def draw(self, renderer) -> None:
        for axes in self.axes:  # asking for labels makes them; otherwise some are made while they are drawn
            axes.get_xticklabels(), axes.get_yticklabels()
        for text in self.findobj(Text):
            text.set_parse_math(text.get_text().startswith(FORMULA))
        super().draw(renderer)


def image_grid(rows: Sequence[tuple[str, Sequence[tuple[str, Path | None]]]], title: str) -> Figure:
    """Grid of captioned images, a labelled row at a time; a caption without an image is a text card.

    Args:
        rows: (label, [(caption, image), ...]) per row; a row may be shorter than the others.
    """
    columns = max(len(cells) for _, cells in rows)
    figure, axes = _bare_axes(len(rows), columns, (CELL * columns + 0.3, 2 * len(rows) + 0.4), title)
    for line, (label, cells) in zip(axes, rows, strict=True):
        line[0].set_ylabel(label, fontsize=CAPTION)
        for axis, (caption, image) in zip(line, cells, strict=False):
            _cell(axis, caption, image)
    return figure


def retrieved(
    rows: Sequence[tuple[str, Path | None, Sequence[tuple[str, Sequence[tuple[str, Path | None, bool]]]]]],
    title: str,
) -> Figure:
    """Queries with the top candidates of each model, one model a line; a positive has a green frame.

    Args:
        rows: (query text, query image, [(model, [(caption, image, is positive), ...]), ...]) per query.
    """
    depth = max(len(candidates) for _, _, models in rows for _, candidates in models)
    height = sum(len(models) for _, _, models in rows)
    figure, axes = _bare_axes(height, depth + 1, (CELL * (depth + 1) + 0.3, 2 * height + 0.4), title)
    lines = iter(axes)
    for query, query_image, models in rows:
        for place, (model, candidates) in enumerate(models):
            first, *others = next(lines)
            first.set_ylabel(model, fontsize=CAPTION)
            if place == 0:
                first.set_title(_wrapped(f"query: {query}"), fontsize=CAPTION)
                if query_image is not None:
                    first.imshow(images.open_image(query_image))
            for axis, (caption, image, positive) in zip(others, candidates, strict=False):
                _cell(axis, caption, image)
                if positive:
                    axis.spines[:].set(visible=True, color="#2e8b57", linewidth=2.5)
    return figure


def contact_sheet(cards: Sequence[tuple[str, Path | None, str]], title: str, columns: int = 6) -> Figure:
    """Grid of images with a label under each; the first, the query, has a frame.

    Args:
        cards: (text, image, label); a text without an image is a text card, with one it goes under the label.
    """
    height = -(-len(cards) // columns)
    figure, axes = _bare_axes(height, columns, (CELL * columns, 2.3 * height + 0.4), title)
    for axis, (text, image, label) in zip(axes.flat, cards, strict=False):
        _cell(axis, text if image is None else "", image)
        below = label if image is None else f"{label}\n{_wrapped(text)}"
        axis.set_xlabel(below.strip(), fontsize=CAPTION)
    axes.flat[0].spines[:].set(visible=True, color="#4c78a8", linewidth=2)
    return figure


def _bare_axes(rows: int, columns: int, size: tuple[float, float], title: str):
    """A figure of `size` inches and its (rows, columns) axes without ticks and frames."""
    figure = PlainFigure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def _cell(axis, caption: str, image: Path | None) -> None:
    """An image under its caption, or the caption in the middle where there is none."""
    if image is not None:
        axis.imshow(images.open_image(image))
        axis.set_title(_wrapped(caption), fontsize=CAPTION)
    else:
        middle = {"x": 0.5, "y": 0.5, "ha": "center", "va": "center", "transform": axis.transAxes}
        axis.text(s=_wrapped(caption, most=9), fontsize=CAPTION, **middle)  # so many fill a cell
        axis.set(aspect="equal")


def _wrapped(text: str, most: int = 5) -> str:
    """The first lines of a text, none of them wider than a cell; dots where it goes on.

    >>> _wrapped("one two three four five six seven", most=1)
    'one two three four …'
    """
    lines = textwrap.wrap(text, 20, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines[:most]) + (" …" if len(lines) > most else "")
