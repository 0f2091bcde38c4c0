"""The book holds every notebook of the committed reference run, can be searched, and links to nothing that is not there."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from elva_core.experiments import book, stages

SOURCES = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src"}


class Page(HTMLParser):
    """What a page links to and loads, and the anchors it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs) -> None:
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if link := values.get(SOURCES.get(tag, "")):
            self.links.append(link)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return book.build("cpu", 17, tmp_path_factory.mktemp("book") / "site").parent


def test_every_link_of_the_book_leads_to_a_page_and_anchor_of_it(site):
    pages = {path.resolve(): Page(path) for path in site.glob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme == "data":
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if parts.scheme or parts.netloc or not to.is_file() or (anchor and to in pages and anchor not in pages[to].anchors):
                dead.append(f"{path.name}: {link}")
    assert not dead
    assert sum(len(page.links) for page in pages.values()) > 300


def test_the_book_has_every_notebook_with_its_figures_and_a_search(site):
    contents = (site / "index.html").read_text(encoding="utf-8")
    for stage in (*stages.STAGES, "report"):
        assert f'href="{stage}.html"' in contents
    assert "data:image" not in contents and len(list((site / "_images").glob("*.png"))) >= 25
    assert "blind" in (site / "searchindex.js").read_text(encoding="utf-8")
    assert (site / "search.html").is_file()


def test_a_book_of_a_run_that_is_not_there_names_its_command(tmp_path):
    with pytest.raises(stages.MissingStageError, match="python -m elva_core run qwen2vl-2b"):
        book.build("qwen2vl-2b", 17, tmp_path / "site")
    assert not list(tmp_path.iterdir())


def test_links_to_the_repository_lose_their_address_also_in_a_notebook_of_one_line():
    text = json.dumps({"cells": [{"source": "See [a run](../outputs/x.ipynb), [the next](b.ipynb)."}]})
    assert json.loads(book.OUTSIDE.sub(r"\1", text))["cells"][0]["source"] == "See a run, [the next](b.ipynb)."
