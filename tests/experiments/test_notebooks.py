"""Structure of the notebooks; nbval executes them (see `make test`)."""

from __future__ import annotations

import re

import nbformat
import pytest

from elva_core import config
from elva_core.experiments import chain

BOOKS = sorted(chain.NOTEBOOKS.glob("*.ipynb"))
FORBIDDEN = (
    r"^\s*(def|class)\s|^\s*[!%]|sys\.(path|exit)|except\s*:|warnings\.filterwarnings|os\.chdir|import \*"
    r"|[\"'](/home|/root|/tmp|/work|\.\./)"
)


@pytest.fixture(params=BOOKS, ids=lambda p: p.stem)
def book(request):
    return nbformat.read(request.param, as_version=4)


COPIES = sorted(chain.files.OUTPUTS.glob("cpu/seed-17/executed/*.ipynb"))  # those in the repository
SAYS = re.compile(r"\*\*Answer\.\*\*|\bsentences\.\w+\(|\bsentence\(")
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")


def code(book):
    return [c for c in book.cells if c.cell_type == "code"]


def test_the_notebooks_are_the_stages_of_the_chain():
    assert [p.stem for p in BOOKS] == list(chain.STAGES)


def test_the_first_code_cell_is_the_only_parameters_cell_and_holds_scalars(book):
    tagged = [i for i, c in enumerate(code(book)) if "parameters" in c.metadata.get("tags", [])]
    assert tagged == [0]
    assert code(book)[0].source.splitlines()[0].startswith('profile: str = "smoke"') and config.load("smoke")
    assert all(re.match(r"\w+: (str|int|float|bool) = ", line) for line in code(book)[0].source.splitlines())


def test_no_cell_defines_hides_or_names_a_path(book):
    for cell in code(book):
        assert not re.search(FORBIDDEN, cell.source, re.MULTILINE), cell.source
        assert len(cell.source.splitlines()) <= 15, cell.source


def says(cell):
    """Whether a cell displays an answer: what it has displayed, or, where no output is stored, what it will."""
    shown = [str(o.get("data", {}).get("text/markdown", "")) + o.get("text", "") for o in cell.outputs]
    return any("**Answer.**" in text for text in shown) if shown else bool(SAYS.search(cell.source))


def test_every_question_is_answered_before_the_next_heading(book):
    answered, heading = {}, None
    for cell in book.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            heading = cell.source.splitlines()[0]
            if heading.endswith("?"):
                answered[heading] = False
        elif cell.cell_type == "code" and heading in answered:
            answered[heading] |= says(cell)
    assert answered and not [question for question, said in answered.items() if not said]


@pytest.mark.parametrize("path", [*BOOKS, *COPIES], ids=lambda p: "/".join(p.parts[-4:]))
def test_every_link_of_a_notebook_and_of_an_executed_copy_leads_to_a_file(path):
    prose = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    links = [link for link in LINK.findall(prose) if "://" not in link]
    assert not [link for link in links if not (path.parent / link).exists()]
    assert path not in BOOKS or f"../outputs/cpu/seed-17/executed/{path.name}" in links


def test_size_and_kernel(book):
    assert 12 <= len(book.cells) <= 30 and book.metadata.kernelspec.name == "python3"


def test_the_last_code_cell_closes_the_stage_with_the_answer_to_the_first_question(book):
    assert book.cells[0].source.splitlines()[1].startswith("**Question** ")
    assert "run.close(" in code(book)[-1].source and "answer=" in code(book)[-1].source
    assert book.cells[-1].cell_type == "markdown" and book.cells[-1].source.startswith("## What this does not show")


def test_outputs_are_stored_so_that_nbval_compares_something(book):
    assert [c.execution_count for c in code(book)] == list(range(1, len(code(book)) + 1))
    checked = [c for c in code(book) if "nbval-check-output" in c.metadata.get("tags", [])]
    assert checked and all(c.outputs for c in checked)
    assert not any(o.output_type == "error" for c in code(book) for o in c.outputs)
    assert any(c.outputs for c in code(book) if c not in checked)
