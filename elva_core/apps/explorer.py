"""The explorer: a query, its grains as check boxes, and what several models answer, side by side.

In JupyterLab a grain that is unticked leaves the query; `inline` shows the answers alone.

Explorer([measured["stage 2"], measured["stage 3"]], depth=5)
inline([measured["stage 3"]], unit, typed("a dog, red", query), depth=5)
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import ipywidgets

from elva_core import files
from elva_core.data import mbeir
from elva_core.data.items import Item, candidate_item
from elva_core.evaluation import grains
from elva_core.evaluation.benchmark import Measured
from elva_core.models.vision import Stamp, stamp
from elva_core.mrbench import verify
from elva_core.retrieval import retriever, search

PLACEHOLDER = "type a query, for instance: a dog, red"
SIDE = 48  # pixels of a thumbnail
SPACED = {"width": "auto", "margin": "2px 20px 2px 0"}


@dataclass(frozen=True)
class Answers:
    """What one model answers to a query.

    asked: the text it was given, instruction and query. image: of the query. found: candidate and cosine,
    best first. right: dids of the positives; empty where nobody knows them. rank: of the first positive in a
    pool of `size`, None without one.
    """

    model: str
    asked: str
    image: Path | None
    summary: str
    found: Sequence[tuple[mbeir.Candidate, float]]
    right: Sequence[str]
    rank: int | None
    size: int


class Asker:
    """One measured model that answers queries about the pools of its benchmark, each embedded once."""

    def __init__(self, measured: Measured) -> None:
        self._measured, self._pools = measured, {}

    def __call__(self, unit: str, query: mbeir.Query, depth: int) -> Answers:
        """The `depth` best candidates of the local pool of `unit`.

        Raises:
            ElvaDataError: an image leaves the root.
        """
        searcher, candidates = self._measured.searcher, self._measured.bench[unit].candidates
        item, size = searcher.query(query, unit), len(candidates)
        if unit not in self._pools:
            self._pools[unit] = searcher.vectors(candidate_item(searcher.root, c) for c in candidates)
        vectors, summary = _embedded(searcher, item)
        positives = [row for row in map(candidates.row, query.positives) if row is not None]
        depth, device = min(depth, size), searcher.encoder.device
        ranking = search.exact(vectors, self._pools[unit], depth, [positives], device=device)
        best = [candidates[row] for row in ranking.rows[0]]
        answers = list(zip(best, ranking.scores[0].tolist(), strict=True))
        rank = ranking.ranks[0][0] if positives else None
        model = self._measured.model
        return Answers(model, item.text, item.image, summary, answers, query.positives, rank, size)


def _embedded(searcher: retriever.Searcher, item: Item):
    """(1, D) embedding and the summary of a query.

    Where embeddings are kept on disk it is not looked up there: every query that is typed would be a file of
    its own, without its summary.
    """
    if not searcher.settings.on_disk:
        return searcher.vectors([item]), searcher.summary(item)
    vectors, (summary,) = retriever.encode(searcher.encoder, [item], batch=1, template=searcher.template)
    return vectors, summary


def typed(text: str, like: mbeir.Query) -> mbeir.Query:
    """A query that a person typed, in the place of the benchmark's query `like`.

    It has that query's image and instruction, and no positives. Nobody has named the grains of a typed text:
    where it holds commas or semicolons, a grain is what stands between them; else it is a word.
    """
    parts = [part for part in (part.strip().rstrip(".!?") for part in re.split("[,;]", text)) if part]
    words = text.split() if len(parts) < 2 else []
    named = [["word", word] for word in words] or [["part", part] for part in parts]
    text = mbeir.normalise(" ".join(words) or text)
    return replace(like, text=text, positives=(), negatives=(), source={"grains": named})


def inline(measured: Sequence[Measured], unit: str, query: mbeir.Query, depth: int):
    """A query and the answers of each model with their pictures, for JupyterLab to show."""
    from IPython.display import HTML

    answers = [Asker(m)(unit, query, depth) for m in measured]
    tables = "".join(table(a, m.searcher.root) for a, m in zip(answers, measured, strict=True))
    return HTML(f'{heading(answers[0])}<div style="display:flex;gap:2em">{tables}</div>')


class Explorer(ipywidgets.VBox):
    """A widget: choose a query of the benchmark or type one, untick grains, and see what each model answers.

    A grain that only the picture shows cannot be taken out of it, so its box stays ticked. "Right" is what
    answers the whole query.

    Args:
        measured: models measured on the same benchmark. depth: how many answers each shows.
    """

    def __init__(self, measured: Sequence[Measured], depth: int) -> None:
        super().__init__()
        wide, column = ({"width": width} for width in ("auto", f"{100 // len(measured)}%"))
        self._bench, self._depth = measured[0].bench, depth
        self._askers, self._roots = [Asker(m) for m in measured], [m.searcher.root for m in measured]
        self.unit = ipywidgets.Dropdown(options=list(self._bench), description="Unit")
        self.choice = ipywidgets.Dropdown(options=self._queries(), description="Query", layout=wide)
        self.text = ipywidgets.Text(
            description="or", placeholder=PLACEHOLDER, continuous_update=False, layout=wide
        )
        self.boxes = ipywidgets.HBox(layout={"flex_flow": "row wrap"})
        self.head = ipywidgets.HTML(layout=wide)
        self.panels = [ipywidgets.HTML(layout=column) for _ in measured]
        for changed, act in ((self.unit, self._list), (self.choice, self._choose), (self.text, self._begin)):
            changed.observe(act, "value")
        panels = ipywidgets.HBox(self.panels, layout=wide)
        self.children = [self.unit, self.choice, self.text, self.boxes, self.head, panels]
        self._begin()

    def _queries(self) -> list[tuple[str, tuple[str, int]]]:
        """The queries of the unit, each with its name in the list."""
        unit = self.unit.value
        return [(label(i, query), (unit, i)) for i, query in enumerate(self._bench[unit].queries)]

    def _list(self, _) -> None:
        """Another unit: its first query is chosen."""
        self.choice.options = self._queries()

    def _choose(self, _) -> None:
        """Another query: what was typed goes, and that begins anew."""
        if self.text.value:
            self.text.value = ""
        else:
            self._begin()

    def _query(self) -> mbeir.Query:
        """What is asked while every box is ticked."""
        unit, index = self.choice.value
        query = self._bench[unit].queries[index]
        return typed(self.text.value, query) if self.text.value.strip() else query

    def _begin(self, _=None) -> None:
        """A query with all its grains."""
        query = self._query()
        allowed, self.text.disabled = grains.removable(query), "text" not in query.modality
        names = [f"{kind}: {grain}" for kind, grain in mbeir.grains(query)]
        if query.image:
            names = [name if i in allowed else f"{name} (in the picture)" for i, name in enumerate(names)]
        ticks = [
            ipywidgets.Checkbox(
                True, description=name, disabled=i not in allowed, indent=False, layout=SPACED
            )
            for i, name in enumerate(names)
        ]
        self.boxes.children = [ipywidgets.Label("Grains:", layout=SPACED), *ticks]
        for box in ticks:
            box.observe(self._ask, "value")
        self._ask()

    def _ask(self, _=None) -> None:
        """The query without the grains that are not ticked, put to every model."""
        dropped = [i for i, box in enumerate(self.boxes.children[1:]) if not box.value]
        query = grains.without(self._query(), *dropped)
        try:
            answers = [ask(self.unit.value, query, self._depth) for ask in self._askers]
            tables = [table(answer, root) for answer, root in zip(answers, self._roots, strict=True)]
            self.head.value = heading(answers[0])
        except files.ElvaDataError as error:  # a callback has no cell that would show it
            self.head.value, tables = f"<b>{html.escape(str(error))}</b>", [""] * len(self.panels)
        for panel, shown in zip(self.panels, tables, strict=True):
            panel.value = shown


def label(index: int, query: mbeir.Query) -> str:
    """A query in the list of all."""
    return f"{index + 1}. {query.text or ''}" + (f" [{mbeir.caption(query)}]" if query.image else "")


def heading(answers: Answers) -> str:
    """What every model was asked, as HTML."""
    picture = f"{_picture(answers.image)} " if answers.image else ""
    return f"{picture}Asked: {html.escape(answers.asked)}"


def table(answers: Answers, root: mbeir.Root) -> str:
    """The answers of one model as an HTML table; a right one is framed.

    Raises:
        ElvaDataError: an image leaves the root.
    """
    size = f"{answers.size:,}"
    known = f"first right answer at rank {answers.rank:,} of {size}" if answers.rank else f"{size} candidates"
    rows = [_cells("th", ["rank", "", "answer", "cosine", ""])]
    for rank, (candidate, score) in enumerate(answers.found, start=1):
        picture = _picture(root.image_path(candidate.image)) if candidate.image else ""
        words = html.escape(candidate.text or mbeir.caption(candidate) or candidate.did)
        mark, style = ("right", "outline:2px solid #2e8b57") if candidate.did in answers.right else ("", "")
        rows.append(_cells("td", [rank, picture, words, f"{score:.3f}", mark], style))
    return (
        f"<div><b>{html.escape(answers.model)}</b>, {known}"
        f"<br>summary: <i>{html.escape(answers.summary) or 'none'}</i>"
        f'<table style="border-collapse:collapse;line-height:1.3">{"".join(rows)}</table></div>'
    )


def _cells(tag: str, cells: Iterable[object], style: str = "") -> str:
    columns = (f'<{tag} style="padding:2px 8px;text-align:left">{cell}</{tag}>' for cell in cells)
    return f'<tr style="{style}">{"".join(columns)}</tr>'


def _picture(path: Path) -> str:
    return _thumbnail(path, stamp(path))


@lru_cache(maxsize=1024)
def _thumbnail(path: Path, _stamp: Stamp) -> str:
    """HTML of a picture, of the file as it was when it had this stamp."""
    data = base64.b64encode(verify.thumbnail(path, SIDE)).decode()
    return f'<img src="data:image/png;base64,{data}" style="height:{SIDE}px;vertical-align:middle">'
