"""The executed notebooks and the report of one run as a static site, built by Sphinx; nothing is executed.

build("cpu", 17, Path("outputs/cpu/seed-17/book"))
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from elva_core import files
from elva_core.experiments.keys import STAGES, stage_folder
from elva_core.experiments.stages import numbered, refuse_missing

# a link to a file of the repository, also in JSON of one line: its text stays
OUTSIDE = re.compile(r"\[([^\[\]\n]+)\]\(\.\./[^)\s]*\)")
# for reading offline: MathJax lies in the site, a widget is what it printed, furo's footer is left out
FOOTER = '{% extends "furo/page.html" %}{% block footer %}{% endblock %}'
SPHINX = {
    "project": "ELVA workbook",
    "extensions": ["myst_nb", "sphinx-mathjax-offline"],
    "html_theme": "furo",
    "html_title": "ELVA workbook",
    "html_show_sphinx": False,
    "html_copy_source": False,
    "templates_path": ["."],
    "nb_execution_mode": "off",
    "nb_mime_priority_overrides": [["html", "application/vnd.jupyter.widget-view+json", None]],
    "nb_ipywidgets_js": {},
    "myst_enable_extensions": ["dollarmath", "amsmath"],
    "myst_heading_anchors": 3,
    "suppress_warnings": ["myst.header", "mystnb.unknown_mime_type"],
}


def build(profile: str, seed: int, target: Path) -> Path:
    """Writes the site of a profile's run into `target`, whole; returns its first page.

    Raises:
        MissingStageError: a notebook has not been run. ElvaDataError: Sphinx refuses a page; says which.
    """
    from sphinx.cmd.build import build_main

    report = stage_folder(profile, seed, numbered("90"))
    notebooks = [report.parent / "executed" / f"{stage}.ipynb" for stage in STAGES]
    refuse_missing((report / "report.md", *notebooks), profile, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, site = Path(folder) / "source", Path(folder) / "site"
        shutil.copytree(report / "figures", source / "figures", ignore=shutil.ignore_patterns("*.csv"))
        for path in (report / "report.md", *notebooks):
            text = OUTSIDE.sub(r"\1", path.read_text(encoding="utf-8"))
            (source / path.name).write_text(text, encoding="utf-8")
        pages = "\n".join(("report", *STAGES))
        text = "# ELVA workbook\n\n```{toctree}\n:maxdepth: 1\n\n" + pages + "\n```\n"
        (source / "index.md").write_text(text, encoding="utf-8")
        lines = [f"{name} = {value!r}\n" for name, value in SPHINX.items()]
        (source / "conf.py").write_text("".join(lines), encoding="utf-8")
        (source / "page.html").write_text(FOOTER, encoding="utf-8")
        if build_main(["-q", "-W", "--keep-going", "-b", "html", str(source), str(site)]):
            raise files.ElvaDataError("Sphinx refuses a page of the book; see the lines above")
        shutil.rmtree(target, ignore_errors=True)
        site.rename(target)
    return target / "index.html"
