"""The explorer: a query, its grains as check boxes, and what several models answer, side by side.

Explorer([measured["stage 2"], measured["stage 3"]], depth=5)  # in JupyterLab: a grain that is unticked leaves the query
inline([measured["stage 3"]], unit, typed("a dog, red", query), depth=5)  # the answers alone
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
from elva_core.mrbench import verify
from elva_core.retrieval import retriever, search

PLACEHOLDER = "type a query, for instance: a dog, red"
SIDE = 48  # pixels of a thumbnail
SPACED = {"width": "auto", "margin": "2px 20px 2px 0"}


@dataclass(frozen=True)
class Answers:
    """What one model answers to a query.

    asked: the text it was given, instruction and query. image: of the query. found: candidate and cosine, best first.
    right: dids of the positives; empty where nobody knows them. rank: of the first positive in a pool of `size`, None without one.
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
    """One measured model that answers queries about the pools of its benchmark; the vectors of a pool are looked up once."""

    def __init__(self, measured: Measured) -> None:
        self._measured, self._pools = measured, {}

    def __call__(self, unit: str, query: mbeir.Query, depth: int) -> Answers:
        """The `depth` best candidates of the local pool of `unit`. Raises ElvaDataError where an image leaves the root."""
        searcher, candidates = self._measured.searcher, self._measured.bench[unit].candidates
        item = searcher.query(query, unit)
        if unit not in self._pools:
            self._pools[unit] = searcher.vectors(candidate_item(searcher.root, c) for c in candidates)
        vectors, summary = _embedded(searcher, item)
        positives = [row for row in map(candidates.row, query.positives) if row is not None]
        found = search.exact(vectors, self._pools[unit], min(depth, len(candidates)), [positives])
        answers = [
            (candidates[row], float(score)) for row, score in zip(found.rows[0], found.scores[0], strict=True)
        ]
        rank = found.ranks[0][0] if found.ranks[0] else None
        return Answers(
            self._measured.model,
            item.text,
            item.image,
            summary,
            answers,
            query.positives,
            rank,
            len(candidates),
        )


def _embedded(searcher: retriever.Searcher, item: Item):
    """(1, D) embedding and the summary. On disk every query that is typed would be a file of its own, without its summary."""
    if searcher.settings.on_disk:
        vectors, (summary,) = retriever.encode(searcher.encoder, [item], batch=1, template=searcher.template)
        return vectors, summary
    return searcher.vectors([item]), searcher.summary(item)


def typed(text: str, like: mbeir.Query) -> mbeir.Query:
    """A query that a person typed, in the place of the benchmark's query `like`: its image, its instruction, no positives.

    Nobody has named the grains of a typed text. Where it holds commas or semicolons, a grain is what stands between them; else
    it is a word.
    """
    parts = [part for part in (part.strip().rstrip(".!?") for part in re.split("[,;]", text)) if part]
    words = text.split() if len(parts) < 2 else []
    own = [["word", word] for word in words] or [["part", part] for part in parts]
    return replace(
        like,
        text=mbeir.normalise(" ".join(words) or text),
        positives=(),
        negatives=(),
        source={"grains": own},
    )


def inline(measured: Sequence[Measured], unit: str, query: mbeir.Query, depth: int):
    """A query and the answers of each model with their pictures, for JupyterLab to show."""
    from IPython.display import HTML

    answers = [Asker(m)(unit, query, depth) for m in measured]
    tables = "".join(table(a, m.searcher.root) for a, m in zip(answers, measured, strict=True))
    return HTML(f'{heading(answers[0])}<div style="display:flex;gap:2em">{tables}</div>')


class Explorer(ipywidgets.VBox):
    """A widget: choose a query of the benchmark or type one, untick grains, and see what each model answers.

    A grain that only the picture shows cannot be taken out of it, so its box stays ticked. "Right" is what answers the whole query.

    Args:
        measured: models measured on the same benchmark. depth: how many answers each shows.
    """

    def __init__(self, measured: Sequence[Measured], depth: int) -> None:
        super().__init__()
        wide = ipywidgets.Layout(width="auto")
        self._bench, self._askers, self._roots = (
            measured[0].bench,
            [Asker(m) for m in measured],
            [m.searcher.root for m in measured],
        )
        self._depth = depth
        self.unit = ipywidgets.Dropdown(options=list(self._bench), description="Unit")
        self.choice = ipywidgets.Dropdown(options=self._queries(), description="Query", layout=wide)
        self.text = ipywidgets.Text(
            description="or", placeholder=PLACEHOLDER, continuous_update=False, layout=wide
        )
        self.boxes, self.head = (
            ipywidgets.HBox(layout=ipywidgets.Layout(flex_flow="row wrap")),
            ipywidgets.HTML(layout=wide),
        )
        self.panels = [
            ipywidgets.HTML(layout=ipywidgets.Layout(width=f"{100 // len(measured)}%")) for _ in measured
        ]
        for changed, act in ((self.unit, self._list), (self.choice, self._choose), (self.text, self._begin)):
            changed.observe(act, "value")
        self.children = [
            self.unit,
            self.choice,
            self.text,
            self.boxes,
            self.head,
            ipywidgets.HBox(self.panels, layout=wide),
        ]
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
        self.boxes.children = [ipywidgets.Label("Grains:", layout=SPACED)] + [
            ipywidgets.Checkbox(
                True, description=name, disabled=i not in allowed, indent=False, layout=SPACED
            )
            for i, name in enumerate(names)
        ]
        for box in self.boxes.children[1:]:
            box.observe(self._ask, "value")
        self._ask()

    def _ask(self, _=None) -> None:
        """The query without the grains that are not ticked, put to every model."""
        dropped = [i for i, box in enumerate(self.boxes.children[1:]) if not box.value]
        query = grains.without(self._query(), *dropped)
        try:
            answers = [ask(self.unit.value, query, self._depth) for ask in self._askers]
            tables = [table(own, root) for own, root in zip(answers, self._roots, strict=True)]
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
    """The answers of one model as an HTML table; a right one is framed. Raises ElvaDataError where an image leaves the root."""
    known = (
        f"first right answer at rank {answers.rank:,} of {answers.size:,}"
        if answers.rank
        else f"{answers.size:,} candidates"
    )
    rows = "".join(
        _row(i, c, score, c.did in answers.right, root) for i, (c, score) in enumerate(answers.found, start=1)
    )
    return (
        f"<div><b>{html.escape(answers.model)}</b>, {known}<br>summary: <i>{html.escape(answers.summary) or 'none'}</i>"
        f'<table style="border-collapse:collapse;line-height:1.3">{_cells("th", ["rank", "", "answer", "cosine", ""])}{rows}</table></div>'
    )


def _row(rank: int, candidate: mbeir.Candidate, score: float, right: bool, root: mbeir.Root) -> str:
    picture = _picture(root.image_path(candidate.image)) if candidate.image else ""
    words = html.escape(candidate.text or mbeir.caption(candidate) or candidate.did)
    return _cells(
        "td",
        [rank, picture, words, f"{score:.3f}", "right" if right else ""],
        "outline:2px solid #2e8b57" if right else "",
    )


def _cells(tag: str, cells: Iterable[object], style: str = "") -> str:
    return (
        f'<tr style="{style}">'
        + "".join(f'<{tag} style="padding:2px 8px;text-align:left">{cell}</{tag}>' for cell in cells)
        + "</tr>"
    )


@lru_cache(maxsize=1024)
def _picture(path: Path) -> str:
    data = base64.b64encode(verify.thumbnail(path, SIDE)).decode()
    return f'<img src="data:image/png;base64,{data}" style="height:{SIDE}px;vertical-align:middle">'
