"""The explorer: two queries side by side, their grains as check boxes, and what several models answer.

In JupyterLab a grain that is unticked leaves its query; a grain of the query that an answer lacks is struck.

Explorer([measured["stage 2"], measured["stage 3"]], depth=5)
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
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
from elva_core.retrieval.retriever import UnitResult

QUERIES = 2  # side by side
PLACEHOLDER = "type a query, for instance: a dog, red"
TYPED = ("word", "part")  # kinds of grains of a text that a person typed
SIDE = 64  # pixels of a thumbnail
# columns as there is room; a model stands at one height in all of them
STYLE = """<style>
.elva .jupyter-widgets { width: auto; overflow: visible }
.elva .widget-checkbox { margin-right: 14px }
.elva .widget-gridbox { grid: auto / repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 0 24px }
.elva .elva-column { display: grid; grid-template: subgrid / minmax(0, 1fr) }
.elva .widget-html-content { line-height: 1.3; overflow-wrap: anywhere }
.elva img { max-width: 100%; vertical-align: middle }
.elva ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(68px, 1fr)); gap: 4px }
.elva ol { list-style: none; margin: 4px 2px 12px; padding: 0 }
.elva li { padding: 3px; border: 1px solid #8886; font-size: 12px }
.elva li.positive { outline: 2px solid #2e8b57 }
.elva li div { margin-top: 2px }
.elva .lacks { color: #d33 }
</style>
"""
# else JupyterLab takes arrow keys and letters for commands on cells, d d deletes one (ipywidgets issue 3912)
KEYS = """<style onload="this.closest('.elva').addEventListener('focusin',
event => event.target.dataset.lmSuppressShortcuts = true)"></style>"""
LEGEND = """In each answer: rank · cosine; ✓ a grain of the query that it has;
<span class="lacks">✗ <del>a grain that it lacks</del></span> and what it has instead; + what it has besides.
A positive, which answers the whole query, is framed."""


@dataclass(frozen=True)
class Answers:
    """One model's ranked answers to a query.

    text, image: what it read, instruction and query. grains: (kind, text) of the query, without those taken
    out. best: candidate and cosine, best first. positives: dids; empty where nobody knows them. rank: of the
    first positive in a pool of `size`, None without one.
    """

    model: str
    text: str
    image: Path | None
    grains: Sequence[tuple[str, str]]
    summary: str
    best: Sequence[tuple[mbeir.Candidate, float]]
    positives: Sequence[str]
    rank: int | None
    size: int


class Model:
    """One measured model that answers queries about the pools of its benchmark, each embedded once."""

    def __init__(self, measured: Measured) -> None:
        self.root = measured.searcher.root
        self._measured, self._pools = measured, {}

    def answers(self, unit: str, query: mbeir.Query, depth: int, dropped: Sequence[int] = ()) -> Answers:
        """The `depth` best candidates of the local pool of `unit`, for a query without its grains `dropped`.

        Raises:
            ElvaDataError: an image leaves the root.
        """
        searcher, candidates = self._measured.searcher, self._measured.bench[unit].candidates
        item, size = searcher.query(grains.without(query, *dropped), unit), len(candidates)
        if unit not in self._pools:
            self._pools[unit] = searcher.vectors(candidate_item(searcher.root, c) for c in candidates)
        vectors, summary = _embedded(searcher, item)
        positives = [row for row in map(candidates.row, query.positives) if row is not None]
        depth, device = min(depth, size), searcher.encoder.device
        ranking = search.exact(vectors, self._pools[unit], depth, [positives], device=device)
        cosines = ranking.scores[0].tolist()
        best = [(candidates[row], cosine) for row, cosine in zip(ranking.rows[0], cosines, strict=True)]
        rank = ranking.ranks[0][0] if positives else None
        kept = [grain for i, grain in enumerate(mbeir.grains(query)) if i not in dropped]
        model = self._measured.model
        return Answers(model, item.text, item.image, kept, summary, best, query.positives, rank, size)


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
    named = [[TYPED[0], word] for word in words] or [[TYPED[1], part] for part in parts]
    text = mbeir.normalise(" ".join(words) or text)
    return replace(like, text=text, positives=(), negatives=(), source={"grains": named})


class Explorer(ipywidgets.VBox):
    """A widget: two queries of the benchmark, or typed ones, side by side, each put to every model.

    Args:
        measured: models measured on the same benchmark. depth: how many answers each shows.
    """

    def __init__(self, measured: Sequence[Measured], depth: int) -> None:
        super().__init__()
        models, bench = [Model(one) for one in measured], measured[0].bench
        self.columns = [Column(models, bench, number, depth) for number in range(1, QUERIES + 1)]
        self.children = [ipywidgets.HTML(STYLE + KEYS + LEGEND), ipywidgets.GridBox(self.columns)]
        self.add_class("elva")

    def __repr__(self) -> str:
        """The text that stands in its place in a notebook without JupyterLab."""
        return "The explorer, a widget: run the notebook in JupyterLab to use it."


class Column(ipywidgets.VBox):
    """One query: chosen or typed, its grains to untick, and below it what each model answers.

    A grain that only the picture shows cannot be taken out of it, so its box stays ticked. A positive is what
    answers the whole query.

    Args:
        number: which column this is; it begins with that query of the first unit.
    """

    def __init__(
        self, models: Sequence[Model], bench: Mapping[str, UnitResult], number: int, depth: int
    ) -> None:
        super().__init__(layout={"grid_area": f"span {1 + len(models)}"})
        self.add_class("elva-column")
        self._models, self._bench, self._depth = models, bench, depth
        self.unit = ipywidgets.Dropdown(options=list(bench), description="Unit")
        self.choice = ipywidgets.Dropdown(options=self._queries(), description=f"Query {number}")
        self.choice.index = min(number, len(self.choice.options)) - 1
        self.text = ipywidgets.Text(description="or", placeholder=PLACEHOLDER, continuous_update=False)
        self.boxes = ipywidgets.HBox(layout={"flex_flow": "row wrap"})
        self.head = ipywidgets.HTML()
        self.panels = [ipywidgets.HTML() for _ in models]
        for changed, act in ((self.unit, self._list), (self.choice, self._choose), (self.text, self._begin)):
            changed.observe(act, "value")
        controls = [self.unit, self.choice, self.text, self.boxes, self.head]
        self.children = [ipywidgets.VBox(controls), *self.panels]
        self._begin()

    def _queries(self) -> list[tuple[str, tuple[str, int]]]:
        """The queries of the unit, each with its name in the list."""
        unit, listed = self.unit.value, []
        for i, query in enumerate(self._bench[unit].queries):
            name = f"{i + 1}. {query.text or ''}" + (f" [{mbeir.caption(query)}]" if query.image else "")
            listed.append((name, (unit, i)))
        return listed

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
        """The query with all its grains."""
        unit, index = self.choice.value
        query = self._bench[unit].queries[index]
        return typed(self.text.value, query) if self.text.value.strip() else query

    def _begin(self, _=None) -> None:
        """A query with all its grains."""
        query = self._query()
        allowed, self.text.disabled = grains.removable(query), "text" not in query.modality
        ticks = []
        for place, (kind, grain) in enumerate(mbeir.grains(query)):
            fixed = place not in allowed
            name = f"{kind}: {grain}" + (" (in the picture)" if fixed and query.image else "")
            ticks.append(ipywidgets.Checkbox(True, description=name, disabled=fixed, indent=False))
            ticks[-1].observe(self._search, "value")
        self.boxes.children = [ipywidgets.Label("Grains:"), *ticks]
        self._search()

    def _search(self, _=None) -> None:
        """Answers of every model to the query without the grains that are not ticked."""
        dropped = [i for i, box in enumerate(self.boxes.children[1:]) if not box.value]
        unit, query = self.unit.value, self._query()
        try:
            answers = [model.answers(unit, query, self._depth, dropped) for model in self._models]
            pages = [page(one, model.root) for one, model in zip(answers, self._models, strict=True)]
            picture = _picture(answers[0].image) if answers[0].image else ""
            self.head.value = f"{picture} Query as read: {html.escape(answers[0].text)}"
        except files.ElvaDataError as error:  # a callback has no cell that would show it
            self.head.value, pages = f"<b>{html.escape(str(error))}</b>", [""] * len(self.panels)
        for panel, shown in zip(self.panels, pages, strict=True):
            panel.value = shown


def page(answers: Answers, root: mbeir.Root) -> str:
    """The answers of one model as HTML: rank, cosine, picture, text and grains of each; positives are framed.

    Raises:
        ElvaDataError: an image leaves the root.
    """
    known = f"first positive at rank {answers.rank:,} of " if answers.rank else ""
    cards = []
    for rank, (candidate, cosine) in enumerate(answers.best, start=1):
        positive = candidate.did in answers.positives
        picture = _picture(root.image_path(candidate.image)) if candidate.image else ""
        text = html.escape(candidate.text or ("" if picture else candidate.did))
        lines = [f"{rank} · {cosine:.3f}", picture, text, "✓ positive" if positive else ""]
        lines += _compared(answers.grains, candidate)
        mark = ' class="positive"' if positive else ""
        cards.append(f"<li{mark}>{''.join(f'<div>{line}</div>' for line in lines if line)}</li>")
    return (
        f"<b>{html.escape(answers.model)}</b>, {known}{answers.size:,} candidates"
        f"<br>summary: <i>{html.escape(answers.summary) or 'none'}</i><ol>{''.join(cards)}</ol>"
    )


def _compared(wanted: Sequence[tuple[str, str]], candidate: mbeir.Candidate) -> list[str]:
    """The grains of a query as a candidate has them, as LEGEND says; none where nobody named its grains.

    Those of a typed text have no kind: they are looked up in the candidate's grains as words.
    """
    shown = [(kind, html.escape(text)) for kind, text in mbeir.grains(candidate)]
    lines = []
    for kind, text in wanted if shown else ():
        word, instead = html.escape(text), " ".join(other for same, other in shown if same == kind)
        if grains.spans(mbeir.caption(candidate), text) if kind in TYPED else (kind, word) in shown:
            lines.append(f"✓ {word}")
        else:
            lines.append(f'<span class="lacks">✗ <del>{word}</del></span> {instead}')
    besides = " ".join(text for kind, text in shown if kind not in dict(wanted))
    return [*lines, f"+ {besides}"] if besides else lines


def _picture(path: Path) -> str:
    return _thumbnail(path, stamp(path))


@lru_cache(maxsize=1024)
def _thumbnail(path: Path, _stamp: Stamp) -> str:
    """HTML of a picture, of the file as it was when it had this stamp."""
    data = base64.b64encode(verify.thumbnail(path, SIDE)).decode()
    return f'<img src="data:image/png;base64,{data}" alt="">'
