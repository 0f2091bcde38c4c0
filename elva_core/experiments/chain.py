"""The chain of notebooks: running it or a part of it, what is up to date, its ablation study, its training.

    run("smoke", seed=17)

Imports heavy modules only where they are needed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from elva_core import config, files
from elva_core.experiments import lock
from elva_core.experiments.arms import arms
from elva_core.experiments.stages import STAGES, fingerprint, manifest, numbered, open_stage, stage_folder

REPORT = numbered("90")
NOTEBOOKS = files.REPOSITORY / "notebooks"
PACKAGE = files.REPOSITORY / "elva_core"
FOUR_GB = 4294967296
KERNEL_ENVIRONMENT = {
    # large tensors come and go all the time; else glibc gives the pages back and faults them in again
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"
    f":glibc.malloc.mmap_threshold={FOUR_GB}:glibc.malloc.trim_threshold={FOUR_GB}",
    "TQDM_MININTERVAL": "30",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",  # transformers announces its next version in every kernel
    "HF_HUB_OFFLINE": "1",
}


class ChainError(RuntimeError):
    """A notebook failed; the message names notebook, cell, reason and executed copy."""


def code_hash(notebook: Path) -> str:
    """Hash of a notebook's code cells and of every module of the package they reach through imports."""
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    digest, queue, seen = hashlib.sha256(source.encode()), _imports(source), set()
    while queue:
        path = queue.pop()
        if path not in seen:
            seen.add(path)
            queue |= _imports(path.read_text(encoding="utf-8"))
    for path in sorted(seen):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _imports(source: str) -> set[Path]:
    """Files of the package that a source imports from."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {PACKAGE.parent / f"{name.replace('.', '/')}.py" for name in names}
    return {path for path in paths if path.is_file()}


def current_fingerprint(profile: config.Settings, seed: int, stage: str) -> str:
    """What the manifest of an up-to-date stage carries."""
    inputs = {}
    for name in STAGES[stage]:
        path = stage_folder(profile.profile, name) / "manifest.json"
        inputs[name] = files.file_hash(path) if path.is_file() else "missing"
    return fingerprint(profile, seed, inputs, code_hash(NOTEBOOKS / f"{stage}.ipynb"))


def up_to_date(profile: config.Settings, seed: int, stage: str) -> bool:
    """Whether a finished stage has the inputs, profile, seed and code of now."""
    done = manifest(profile.profile, stage)
    return done is not None and done["fingerprint"] == current_fingerprint(profile, seed, stage)


def run_notebook(source: Path, executed: Path, parameters: dict[str, object], mark: str = "") -> None:
    """Executes one notebook with papermill, by this interpreter whatever kernelspecs there are.

    Unknown parameters are refused, cells that never ran are noticed.

    Args:
        executed: where the executed copy is written; paths below the repository are relative in it.
        mark: fingerprint that the stage's manifest will carry.

    Raises:
        ChainError: with notebook, cell, last line of the traceback (or that the kernel died) and the executed
            copy.
    """
    import papermill

    from elva_core.experiments.kernel import ThisInterpreter

    declared = papermill.inspect_notebook(str(source))
    if unknown := sorted(parameters.keys() - declared.keys()):
        raise ChainError(f"{source.name} declares no parameter {unknown}; it declares {sorted(declared)}")
    executed.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(KERNEL_ENVIRONMENT, ELVA_FINGERPRINT=mark)
    try:
        notebook = papermill.execute_notebook(
            str(source),
            str(executed),
            parameters,
            cwd=str(source.parent),
            progress_bar=False,
            stderr_file=sys.stderr,
            kernel_name="python3",
            kernel_manager_class=ThisInterpreter,
            store_widget_state=False,  # a widget of a finished run has nothing behind its buttons
            extra_arguments=["--IPKernelApp.log_level=50"],  # it warns of local TCP, and of an interrupt
        )
    except papermill.PapermillExecutionError as error:
        last = (error.evalue.strip().splitlines() or [""])[-1]
        cell = f"cell {error.cell_index} ({_heading(executed, error.cell_index)})"
        raise ChainError(f"{source.name}, {cell}: {error.ename}: {last}\nexecuted copy: {executed}") from None
    except RuntimeError as error:  # nbclient's, of a kernel that died
        reason = "ended by the system, often for want of memory, or by a crash; see the lines above"
        place = f"{source.name}, {_last_started(executed)}"
        raise ChainError(f"{place}: {error}: {reason}\nexecuted copy: {executed}") from None
    finally:
        _relative_paths(executed)
    code = [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    if skipped := [i for i, cell in code if cell.source.strip() and cell.execution_count is None]:
        raise ChainError(f"{source.name}: cells {skipped} never ran (sys.exit?); executed copy: {executed}")


def _relative_paths(executed: Path) -> None:
    """Makes the repository's paths in an executed notebook (metadata, outputs, tracebacks) relative to it."""
    if executed.is_file():
        place = json.dumps(f"{files.REPOSITORY}{os.sep}", ensure_ascii=False)[1:-1]  # as JSON has it
        files.write_whole(executed, executed.read_text(encoding="utf-8").replace(place, ""))


def _last_started(executed: Path) -> str:
    """The cell that an executed notebook got to."""
    import nbformat

    cells = nbformat.read(executed, as_version=4).cells
    begun = [i for i, cell in enumerate(cells) if cell.metadata.papermill.get("start_time")]
    return f"cell {begun[-1]} ({_heading(executed, begun[-1])})" if begun else "before its first cell"


def _heading(executed: Path, index: int) -> str:
    import nbformat

    cells = nbformat.read(executed, as_version=4).cells[: index + 1]
    lines = [line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    headings = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return headings[-1] if headings else "no heading"


def expected_seconds(profile: str) -> dict[str, float]:
    """Seconds each stage took last time here, else in the committed reference run."""
    import csv

    cost = stage_folder(profile, REPORT) / "cost.csv"
    known = {}
    if cost.is_file():
        with cost.open(encoding="utf-8") as rows:
            known = {r["stage"]: float(r["wall_s"]) for r in csv.DictReader(rows)}
    for stage in STAGES:
        if done := manifest(profile, stage):
            known[stage] = done["wall_s"]
    return known


def run(
    profile_name: str,
    *,
    seed: int,
    only: str | None = None,
    start: str | None = None,
    force: bool = False,
    console: Console | None = None,
) -> None:
    """Runs the chain, or a part of it; stages whose inputs, profile, seed and code are the same are skipped.

    Raises:
        ChainError: at the first failure; later stages are named as skipped.
        LockedError: another process runs this profile. ProfileError: it, or an arm of its study, is wrong.
    """
    console, began = console or Console(soft_wrap=True), time.monotonic()
    profile = config.load(profile_name)
    stages = [s for s in STAGES if (only is None or s.startswith(only)) and (start is None or s >= start)]
    if not stages:
        raise ChainError(f"no stage starts with {only or start!r}; stages are {', '.join(STAGES)}")
    if profile.study.in_chain:
        arms(profile)  # refused before anything trains
    with lock.held(profile_name):
        _run_stages(stages, profile, seed, force, console)
    console.print(f"{profile_name}, seed {seed}: {time.monotonic() - began:.0f} s")
    if REPORT in stages:
        _print_claims(stage_folder(profile_name, REPORT), console)


def _run_stages(stages: list[str], profile: config.Settings, seed: int, force: bool, console) -> None:
    """Runs the notebooks of some stages in their order, with a line before and after each."""
    profile_name, expected = profile.profile, expected_seconds(profile.profile)
    for place, stage in enumerate(stages):
        if not force and up_to_date(profile, seed, stage):
            console.print(f"[green]up to date[/]  {stage}")
            continue
        left, hint = stages[place:], "no estimate yet"
        if all(s in expected for s in left):
            hint = f"about {sum(expected[s] for s in left) / 60:.0f} min left"
        console.print(f"[cyan]running[/]     {stage}  ({hint})")
        stage_began = time.monotonic()
        executed = files.OUTPUTS / profile_name / "executed" / f"{stage}.ipynb"
        try:
            parameters = {"profile": profile_name, "seed": seed}
            mark = current_fingerprint(profile, seed, stage)
            run_notebook(NOTEBOOKS / f"{stage}.ipynb", executed, parameters, mark)
            if manifest(profile_name, stage) is None:
                raise ChainError(f"{stage}.ipynb ended without closing its stage; executed copy: {executed}")
        except ChainError as error:
            rest = ", ".join(stages[place + 1 :])
            raise ChainError(f"{error}" + (f"\nskipped (need {stage}): {rest}" if rest else "")) from None
        console.print(f"[green]done[/]        {stage}  {time.monotonic() - stage_began:.0f} s")


def _print_claims(report: Path, console: Console) -> None:
    """The averages at rank 5, the gains and the distances; units, ablations and so on stay in claims.csv."""
    import csv

    table = Table(title="measured in this run; every row: claims.csv")
    for column in ("claim", "metric", "paper", "ours", "95 % interval", "n", "verdict"):
        table.add_column(column, no_wrap=True)
    with (report / "claims.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        average = row["claim"].endswith("average") and row["metric"] == "hit@5"
        if row["ours"] and (average or "gain of hit@5" in row["metric"] or "distance" in row["metric"]):
            numbers = [row[column] for column in ("paper", "ours", "ci_low", "ci_high")]
            # + 0.0: no -0
            paper, ours, low, high = (n and f"{round(float(n), 6) + 0.0:.3g}" for n in numbers)
            interval, n = f"[{low}, {high}]" if low else "", row["n"].removesuffix(".0")
            table.add_row(row["claim"], row["metric"], paper, ours, interval, n, row["verdict"])
    # print(width=) never exceeds the console's own
    Console(file=console.file, width=max(console.width, 150)).print(table)
    console.print(f"report: {report / 'report.md'}")


def status(profile_name: str, seed: int) -> None:
    """One line per stage: done and current, out of date, or not done."""
    profile, console = config.load(profile_name), Console(soft_wrap=True)
    for stage in STAGES:
        done = manifest(profile_name, stage)
        if done is None:
            console.print(f"{'not done':12}{stage}")
            continue
        word = "up to date" if up_to_date(profile, seed, stage) else "out of date"
        console.print(f"{word:12}{stage}  seed {done['seed']}, {done['wall_s']} s")


def study(profile_name: str, seed: int) -> None:
    """Trains and measures the arms that have no result yet, on the data and backbone of the chain.

    Then it runs the notebooks that show them, but for those that also read stages that have not been run.
    """
    from elva_core import distributed
    from elva_core.data import mbeir, sources
    from elva_core.experiments import study as ablations

    profile, ablation = config.load(profile_name), numbered("60")
    arms(profile)  # refused before anything trains
    with lock.held(profile_name):
        for stage in (numbered("00"), *STAGES[ablation]):
            run(profile_name, seed=seed, only=stage)
        os.environ.update(KERNEL_ENVIRONMENT)
        distributed.start(profile.threads)
        data, bench, trained = (stage_folder(profile_name, stage) for stage in STAGES[ablation])
        root, triplets = sources.locate(data)
        backbone, places = ablations.backbone_of(trained), ablations.folders(profile_name)
        ablations.run(profile, root, triplets, mbeir.Root(bench / "bench"), backbone, *places)
        for stage in map(numbered, ("60", "82", "90")):
            if lacking := ", ".join(name for name in STAGES[stage] if manifest(profile_name, name) is None):
                command = f"python -m elva_core run {profile_name} --seed {seed}"
                print(f"left out  {stage}, which needs {lacking}; run: {command}")
            else:
                run(profile_name, seed=seed, only=stage)


def train(stage: str, profile_name: str, seed: int) -> None:
    """Trains one stage on the processes that `accelerate launch` has started; its notebook finds it done."""
    from elva_core import distributed
    from elva_core.experiments import jobs

    profile, notebook = config.load(profile_name), jobs.NOTEBOOKS[stage]
    os.environ.update(KERNEL_ENVIRONMENT, ELVA_FINGERPRINT=current_fingerprint(profile, seed, notebook))
    with lock.held_by_launch(profile_name):
        with distributed.processes().main_process_first():
            opened = open_stage(notebook, profile_name, seed)
            job = jobs.following(stage, opened)
        jobs.run(job)
    if distributed.processes().is_main_process:
        command = f"python -m elva_core run {profile_name} --seed {seed} --from {notebook[:2]}"
        print(f"{job.model}; goes on with: {command}")
