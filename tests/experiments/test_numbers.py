"""Every number that README, report and executed notebooks print comes from a committed file, the same one everywhere."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from elva_core import config, files
from elva_core.evaluation import headroom, statistics
from elva_core.experiments import arms, claims, compare, decomposition, findings, keys, report, study
from elva_core.experiments.keys import STAGES

REPORTED = statistics.reported()
BLOCK = re.compile(r"<!-- (\w+):start -->\n(.*?)\n<!-- \1:end -->", re.DOTALL)
# code, inline code, the targets of links, names of files and folders: what is typed there is no result
NO_PROSE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|\b[\w./-]+/[\w./-]+|\b\w+\.\w*[a-z]+\b", re.DOTALL)
# all numbers that README's prose may have outside its blocks; none is measured
TYPED = {
    "the paper": r"arXiv 2606\.20280|Tables? \d( and \d)?|[Ss]tages? ?\d( to \d)?",
    "versions": r"Python 3\.11|vLLM 0\.33\.0|torch 2\.14\.0|transformers below 5\.21",
    "names": r"Qwen[\d.]+-VL|2B or 7B|b?float(16|32)|ZeRO-2|sharegpt4v|Urban1k|seed-?\s?17|00_check_environment",
    "licences": r"Apache-2\.0|CC BY(-SA)? 4\.0",
    "notebooks": r"[Nn]otebooks? \d\d( and \d\d)?",
    "definitions": r"1 if any positive|RANK from 0|8 \+ 16/N bytes|instead of 16|70 to 85 %",  # plan's target for memory
}
TIMES = r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|half an?) (?:second|minute|hour|day)s?\b"


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """README, reference run and study as they are committed: a run of one's own replaces those in the working tree."""
    paths = ["README.md", "outputs/cpu/seed-17/90_report", "outputs/cpu/seed-17/executed", "outputs/cpu/study"]
    shown = subprocess.run(["git", "archive", "HEAD", *paths], cwd=files.REPOSITORY, capture_output=True)
    if shown.returncode:
        pytest.skip(f"nothing can be read from git: {shown.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("committed")
    with tarfile.open(fileobj=io.BytesIO(shown.stdout)) as archive:
        archive.extractall(folder, filter="data")
    made = json.loads((folder / "outputs/cpu/seed-17/90_report/manifest.json").read_text())["made_from"]
    if made["method"] != keys.TABLE["90_report"].method:
        pytest.skip("the committed report is of an earlier method; run the reference run again and commit it")
    return folder


@pytest.fixture(scope="module")
def folder(committed) -> Path:
    return committed / "outputs/cpu/seed-17/90_report"


@pytest.fixture(scope="module")
def tables(folder) -> findings.Tables:
    return findings.read(folder)


def printed(committed: Path, stage: str) -> str:
    """What an executed notebook says: its first cell and all its outputs, as text."""
    book = nbformat.read(committed / f"outputs/cpu/seed-17/executed/{stage}.ipynb", as_version=4)
    texts = [book.cells[0].source]
    for output in (output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs):
        texts += [output.get("text", ""), *(text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))]
    return "\n".join(texts)


def test_report_and_blocks_are_what_their_tables_make(committed, folder, tmp_path):
    again = tmp_path / "90_report"
    shutil.copytree(folder, again)
    for path in again.glob("*.md"):
        path.unlink()
    report.write(again, config.load("cpu"), 17, REPORTED)
    for name in (*(f"{block}.md" for block in report.BLOCKS), "report.md", "report.html"):
        assert (again / name).read_text() == (folder / name).read_text(), f"{name}; run: python -m elva_core readme cpu"
    assert list(pd.read_csv(folder / "claims.csv").columns) == claims.COLUMNS


def test_readme_has_the_blocks_of_the_report(committed, folder):
    blocks = dict(BLOCK.findall((committed / "README.md").read_text()))
    assert set(blocks) == {*report.BLOCKS, "gpu"}  # gpu: test_measured
    for name in report.BLOCKS:
        assert blocks[name] == (folder / f"{name}.md").read_text().strip(), f"{name}; run: python -m elva_core readme cpu"


@pytest.mark.slow
def test_the_tables_of_the_study_are_what_its_trainings_make(committed, tables):
    settings = config.load("cpu")
    done = study.read(committed / "outputs/cpu/study", settings)
    assert len(done.runs) == len(tables.runs) and done.runs["wall_s"].sum() == pytest.approx(tables.runs["wall_s"].sum())
    steps = decomposition.table(done, None, settings)
    saved = tables.decomposition[tables.decomposition["group"] == ""]
    assert steps["unit"].tolist() == saved["unit"].tolist()
    numbers = ["value", "ci_low", "ci_high", "relative", "n"]
    assert saved[numbers].to_numpy() == pytest.approx(steps[numbers].to_numpy(float), nan_ok=True)
    main = compare.pairs(arms.arms(settings), "main")
    differences = compare.differences(done, main, k=5, samples=settings.evaluation.bootstrap)
    drawn = findings.read_study_table(committed / "outputs/cpu/seed-17/90_report/figures/differences.csv")
    assert differences["arm"].tolist() == drawn["arm"].tolist()
    assert drawn["value"].to_numpy() == pytest.approx(differences["value"].to_numpy())
    for pairs in ((saved, steps), (drawn, differences)):
        for kept, again in zip(*(table["by seed"] for table in pairs), strict=True):
            assert kept == pytest.approx(again, abs=1e-9)


def test_what_readme_report_and_notebooks_share_is_the_same(committed, folder, tables):
    readme, text = (committed / "README.md").read_text(), (folder / "report.md").read_text()
    # the gain over EOL and each step, in points of hit@5 and hit@1
    said = decomposition.sentence(tables.decomposition, "")  # without what is missing
    assert said in text and said in printed(committed, "60_ablate") and said in printed(committed, "90_report")
    for k in (1, 5):
        steps = decomposition.at_cutoff(tables.decomposition, k)
        for step in decomposition.STEPS | decomposition.SUMS:
            points = decomposition.interval(steps.loc[step])
            assert points in readme and points in text and points in printed(committed, "60_ablate")
    whole = decomposition.at_cutoff(tables.decomposition, 5).loc["all"]
    gain = decomposition.interval(whole, "relative", "relative low", "relative high")
    assert gain in readme and gain in said
    # hit@5 of stage 3 over the seeds, in words and in the table
    average = claims.main(tables.claims, REPORTED).query("claim == 'stage 3, average' and metric == 'hit@5'")["ours"].item()
    assert average == pytest.approx(whole["new value"])
    assert all(where.count(f"{average:.1f}") >= 2 for where in (readme, text))
    # the room that better summaries have
    settings = config.load("cpu")
    left = headroom.sentence(tables.headroom, tables.shares, settings.evaluation.headroom_samples)
    assert left in readme and left in text and left in printed(committed, "70_analyse_grains")
    # how many claims
    counted = claims.counted(tables.claims)
    assert counted in text and counted in printed(committed, "90_report")


def test_every_notebook_gives_the_answer_that_the_report_has(committed, folder, tables):
    assert tables.answers["stage"].tolist() == list(STAGES["90_report"])
    answers = dict(zip(tables.answers["stage"], tables.answers["answer"], strict=True))
    answers["90_report"] = json.loads((folder / "manifest.json").read_text())["answer"]
    for stage, answer in answers.items():
        head = printed(committed, stage).partition("**Inputs**")[0]
        assert answer and f"**Answer** {' '.join(answer.split())}\n" in head, stage


@pytest.mark.parametrize("stage", keys.TABLE)
def test_an_executed_notebook_names_no_place_of_the_machine_that_ran_it(committed, stage):
    assert not re.search(r"/(?:home|root|work|tmp|Users|mnt|opt)/", printed(committed, stage))


def literals(source: str) -> str:
    """The texts that a cell's code holds, without what is computed between braces."""
    return " ".join(node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str))


@pytest.mark.parametrize("stage", keys.TABLE)
def test_no_number_of_an_answer_is_typed(stage):
    names = r"hit@\d+|[Tt]op[- ]\d|[Ss]tages? ?\d( and \d)?|95 %|[Tt]ables? ?\d|\b\d\d_\w+|[:.,<>+ ]*\.\d+[f%g]|task\d"
    for cell in nbformat.read(files.REPOSITORY / f"notebooks/{stage}.ipynb", as_version=4).cells:
        if cell.cell_type == "code" and re.search(r"\*\*Answer\.\*\*|\bsentences\.\w+\(", cell.source):
            left = re.sub(names, "", literals(cell.source))
            assert not re.search(r"\d", left), left


def test_numbers_that_are_typed_in_readme_are_no_results():
    prose = BLOCK.sub("", (files.REPOSITORY / "README.md").read_text())
    for allowed in (*TYPED.values(), NO_PROSE):
        prose = re.sub(allowed, " ", prose)
    left = re.findall(rf".{{0,30}}(?:\d|{TIMES}).{{0,30}}", prose)
    assert not left, f"measured numbers belong into the blocks; others into TYPED: {left}"


def test_no_picture_is_wider_than_its_column():
    assert "img{max-width:100%}" in report.STYLE and "table{" in report.STYLE and "overflow-x:auto" in report.STYLE
    assert not re.search(r"<img|width=", (files.REPOSITORY / "README.md").read_text())  # Markdown pictures are fitted to the column
