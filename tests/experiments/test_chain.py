"""The chain: strict runner, skipping, stages that are done or not, claims and README."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from elva_core import config, files
from elva_core.data import mbeir, sources
from elva_core.experiments import arms, chain, stages, study
from elva_core.experiments.chain import ChainError


def notebook(path, *sources):
    """A notebook of these cells; what begins with # is Markdown, the first of the others has the parameters."""
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    book.cells = [nbformat.v4.new_markdown_cell(s) if s.startswith("#") else nbformat.v4.new_code_cell(s) for s in sources]
    next(cell for cell in book.cells if cell.cell_type == "code").metadata["tags"] = ["parameters"]
    nbformat.write(book, path)
    return path


def test_a_misspelt_parameter_is_refused(tmp_path):
    book = notebook(tmp_path / "a.ipynb", "seed: int = 1")
    with pytest.raises(ChainError, match=r"declares no parameter \['sead'\]; it declares \['seed'\]"):
        chain.run_notebook(book, tmp_path / "out.ipynb", {"sead": 2})


def test_a_failing_cell_is_named_with_its_heading_and_executed_copy_which_names_no_place_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REPOSITORY", tmp_path)
    printed = "from pathlib import Path\nprint(Path('outputs').resolve())\nPath('models').resolve()"
    broken = "exec(compile('1 / 0', Path('broken.py').resolve(), 'exec'))"
    book = notebook(tmp_path / "a.ipynb", "seed: int = 1", "## Where it breaks", printed, broken)
    with pytest.raises(ChainError, match=r"(?s)a\.ipynb, cell \d \(Where it breaks\): ZeroDivisionError: division by zero.*out\.ipynb"):
        chain.run_notebook(book, tmp_path / "out.ipynb", {})
    copy = nbformat.read(tmp_path / "out.ipynb", 4)
    assert str(tmp_path) not in (tmp_path / "out.ipynb").read_text()
    assert [copy.metadata.papermill[f"{side}_path"] for side in ("input", "output")] == ["a.ipynb", "out.ipynb"]
    shown, resolved = next(cell for cell in copy.cells if "print(" in cell.source).outputs
    assert shown.text == "outputs\n" and resolved.data["text/plain"] == "PosixPath('models')"
    assert any("broken.py" in line for o in copy.cells[-1].outputs for line in o.traceback)


@pytest.fixture
def foreign_kernelspec(tmp_path, monkeypatch):
    """A kernelspec python3 of somebody else's, found before that of this interpreter."""
    folder = tmp_path / "jupyter/kernels/python3"
    folder.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


def test_the_chain_runs_notebooks_in_its_own_interpreter_whatever_kernelspecs_there_are(tmp_path, foreign_kernelspec):
    book = notebook(tmp_path / "a.ipynb", "seed: int = 1", f"import sys; print(sys.executable == {sys.executable!r})")
    chain.run_notebook(book, tmp_path / "out.ipynb", {})
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0].text == "True\n"


def test_nbval_of_make_test_runs_notebooks_in_the_interpreter_of_the_tests(tmp_path, foreign_kernelspec):
    makefile = (files.REPOSITORY / "Makefile").read_text()
    given = next(line for line in makefile.splitlines() if "--nbval" in line).split("-m pytest ")[1].split()
    book = notebook(tmp_path / "a.ipynb", f"import sys; assert sys.executable == {sys.executable!r}")
    command = [sys.executable, "-m", "pytest", *[str(book) if word == "notebooks" else word for word in given]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_a_kernel_that_dies_is_one_message_with_notebook_and_cell(tmp_path):
    killed = "import os; os.kill(os.getpid(), 9)"
    book = notebook(tmp_path / "a.ipynb", "seed: int = 1", "x = 1", "## Where it dies", killed, "y = 1")
    with pytest.raises(ChainError, match=r"^a\.ipynb, cell 3 \(Where it dies\): Kernel died: .*memory.*\nexecuted copy: .*out\.ipynb$"):
        chain.run_notebook(book, tmp_path / "out.ipynb", {})


INTERRUPTED = """
import sys
from pathlib import Path
from elva_core import cli, files
from elva_core.experiments import chain
files.OUTPUTS, chain.NOTEBOOKS = Path("outputs").resolve(), Path(".").resolve()
sys.exit(cli.main(["run", "smoke", "--only", "00"]))
"""


def test_an_interrupt_ends_the_chain_with_one_line_status_130_and_no_kernel(tmp_path):
    slow = "from pathlib import Path\nimport os, time\nPath('pid').write_text(str(os.getpid()))\ntime.sleep(600)"
    notebook(tmp_path / "00_check_environment.ipynb", "profile: str = 'smoke'\nseed: int = 1", slow)
    environment = os.environ | {"PYTHONPATH": str(files.REPOSITORY)}
    chained = subprocess.Popen([sys.executable, "-c", INTERRUPTED], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    kernel = int((tmp_path / "pid").read_text())
    chained.send_signal(signal.SIGINT)
    _, said = chained.communicate(timeout=60)
    assert (chained.returncode, said) == (130, "interrupted\n")
    assert not Path(f"/proc/{kernel}").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{group: x, trains: nothing, why: x, changes: {stage3: {bta: 1}}}", r"arms\.yaml: arm mine: stage3\.bta: Extra inputs"),
        ("{group: x, trains: nothing, why: x, changes: {stage3: 5}}", "arm mine: stage3: "),
        ("{group: x, trains: stage2, why: x}", "arm mine: trains: "),
        ("{group: x, trains: nothing, why: x, against: [nobody]}", r"arm mine is compared with \['nobody'\]"),
        ("{group: x, trains: nothing, why: x, paper: [table8, fool]}", r"arm mine: paper: params/reported\.yaml has no row 'fool'"),
        ("{group: x, trains: nothing, why: x}\nmine: {}", r"arms\.yaml, line 2: .*key mine is in line 1"),
    ],
)
@pytest.mark.parametrize("start", [chain.run, chain.study])
def test_a_wrong_arm_is_refused_before_anything_runs(outputs, tmp_path, monkeypatch, row, message, start):
    (tmp_path / "arms.yaml").write_text(f"mine: {row}\n")
    monkeypatch.setattr(arms, "PARAMS", tmp_path)
    profile = config.load("smoke").changed({"study": {"arms": []}})
    monkeypatch.setattr(config, "load", lambda name: profile)
    monkeypatch.setattr(chain, "run_notebook", lambda *given: pytest.fail("a notebook has run"))
    with pytest.raises(config.ProfileError, match=message) as refused:
        start("smoke", seed=1)
    assert "\n" not in str(refused.value)


def test_cells_that_never_ran_are_noticed(tmp_path):
    book = notebook(tmp_path / "a.ipynb", "seed: int = 1", "import os, sys; sys.exit(0)", "x = 1")
    with pytest.raises(ChainError, match=r"never ran|SystemExit"):
        chain.run_notebook(book, tmp_path / "out.ipynb", {})


HEAD = "# 00 A\n**Question** Is it so?\n**Inputs** [the profile](../params/smoke.yaml)"
ANSWERED = """
from elva_core import files
from elva_core.experiments import stages
files.OUTPUTS = files.Path(r"{}")
stages.open_stage("00_check_environment", "smoke", seed).close(answer="**Answer.** It is so: {{}} %.".format(seed))
"""


def test_the_answer_of_a_notebook_stands_under_its_question_in_the_executed_copy_alone_once_and_whole(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "NOTEBOOKS", tmp_path / "notebooks")
    chain.NOTEBOOKS.mkdir()
    parameters = "profile: str = 'smoke'\nseed: int = 1"
    book = notebook(chain.NOTEBOOKS / "00_check_environment.ipynb", HEAD, parameters, ANSWERED.format(outputs))
    chain.run("smoke", seed=3, only="00")
    executed = outputs / "smoke/seed-3/executed/00_check_environment.ipynb"
    assert stages.manifest("smoke", 3, "00_check_environment")["answer"] == "It is so: 3 %."
    assert not (outputs / "smoke/seed-3/.lock").exists()  # which the kernel held with the chain
    head = HEAD.replace("../params", "../../../../params")
    under = head.replace("so?\n", "so?\n\n**Answer** It is so: 3 %.\n\n")
    assert nbformat.read(executed, 4).cells[0].source == under and nbformat.read(book, 4).cells[0].source == HEAD
    for answer in ("It is so: 3 %.", "Not so.", ""):  # again, another one, none
        chain.put_answer(executed, answer)
        expected = under.replace("It is so: 3 %.", answer) if answer else head
        assert nbformat.read(executed, 4).cells[0].source == expected
    before = executed.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *given: 1 / 0)  # killed before the copy is in place
    with pytest.raises(ZeroDivisionError):
        chain.put_answer(executed, "Half")
    assert executed.read_bytes() == before and list(executed.parent.iterdir()) == [executed]


def test_a_stage_without_manifest_is_not_done_and_the_message_has_the_command(outputs):
    first = stages.open_stage("10_prepare_data", "smoke", 1)
    (first.folder / "data.txt").write_text("half")
    with pytest.raises(stages.MissingStageError, match=r"manifest\.json is missing; run: python -m elva_core run smoke --seed 1 --only 10"):
        stages.open_stage("20_build_mrbench", "smoke", 1).require("10_prepare_data")
    assert not (outputs / "smoke/seed-1/10_prepare_data").exists()
    first.close()
    second = stages.open_stage("20_build_mrbench", "smoke", 1)
    assert (second.require("10_prepare_data") / "data.txt").read_text() == "half"
    with pytest.raises(stages.MissingStageError, match=r"seed-2/10_prepare_data/manifest\.json is missing"):
        stages.open_stage("20_build_mrbench", "smoke", 2).require("10_prepare_data")
    (outputs / "smoke/seed-2/10_prepare_data").symlink_to(outputs / "smoke/seed-1/10_prepare_data")
    with pytest.raises(stages.MissingStageError, match="made with seed 1, not 2"):
        stages.open_stage("20_build_mrbench", "smoke", 2).require("10_prepare_data")
    (outputs / "smoke/seed-1/10_prepare_data/data.txt").write_text("changed")
    with pytest.raises(stages.MissingStageError, match="missing or changed"):
        second.require("10_prepare_data")


@pytest.mark.parametrize("trained", [False, True])
def test_a_study_shows_what_can_be_shown_and_names_the_command_for_the_rest(outputs, monkeypatch, capsys, trained):
    """Table 5 needs no stage 3 of the chain: a study of two arms ends well without it."""
    done = [s for s in chain.STAGES if trained or s < "40"]
    for stage in done:
        (outputs / "smoke/seed-17" / stage).mkdir(parents=True)
        (outputs / "smoke/seed-17" / stage / "manifest.json").write_text('{"files": {}}')
    ran: list[str] = []

    def note(profile_name, *, seed, only):
        ran.append(only)
        (outputs / "smoke/seed-17" / only).mkdir(parents=True, exist_ok=True)
        (outputs / "smoke/seed-17" / only / "manifest.json").write_text('{"files": {}}')

    monkeypatch.setattr(chain, "run", note)
    monkeypatch.setattr(study, "run", lambda *given: None)
    monkeypatch.setattr(study, "backbone_of", lambda trained: "x")
    monkeypatch.setattr(sources, "locate", lambda data: (None, None))
    monkeypatch.setattr(mbeir, "Root", lambda folder: None)
    chain.study("smoke", 17)
    shown = ["60_ablate", *(["82_transfer", "90_report"] if trained else [])]
    assert ran == ["00_check_environment", *chain.STAGES["60_ablate"], *shown]
    out = capsys.readouterr().out
    assert trained != ("left out  82_transfer, which needs 40_finetune_rlvr, 50_evaluate; run: python -m elva_core run smoke" in out)
