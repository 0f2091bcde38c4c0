"""The chain of notebooks: running it or a part of it, what is up to date, its ablation study, its training.

    run("smoke", seed=17)

Imports heavy modules only where they are needed.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from elva_core import config, files
from elva_core.experiments import lock, stages
from elva_core.experiments.arms import arms
from elva_core.experiments.keys import STAGES, differences, key, made_from, manifest, stage_folder
from elva_core.experiments.stages import numbered
from elva_core.values import model_source

ABLATION, REPORT = numbered("60"), numbered("90")
NOTEBOOKS = files.REPOSITORY / "notebooks"
LINK = re.compile(r"\]\((\.\./[^)\s]*)\)")  # of a notebook to a file of the repository
QUESTION = re.compile(r"^(\*\*Question\*\* .*)(?:\n\n\*\*Answer\*\* .*\n)?", re.MULTILINE)
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


def run_notebook(source: Path, executed: Path, parameters: dict[str, object]) -> None:
    """Executes one notebook with papermill, by this interpreter whatever kernelspecs there are.

    Unknown parameters are refused, cells that never ran are noticed.

    Args:
        executed: where the executed copy is written; paths below the repository are relative in it, and links
            lead where those of the source do.

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
    os.environ.update(KERNEL_ENVIRONMENT)
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
        cell = _cell(executed, error.cell_index)
        raise ChainError(f"{source.name}, {cell}: {error.ename}: {last}\nexecuted copy: {executed}") from None
    except RuntimeError as error:  # nbclient's, of a kernel that died
        reason = "ended by the system, often for want of memory, or by a crash; see the lines above"
        place = f"{source.name}, {_cell(executed)}"
        raise ChainError(f"{place}: {error}: {reason}\nexecuted copy: {executed}") from None
    finally:
        _relative_paths(source, executed)
    code = [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    if skipped := [i for i, cell in code if cell.source.strip() and cell.execution_count is None]:
        raise ChainError(f"{source.name}: cells {skipped} never ran (sys.exit?); executed copy: {executed}")


def _relative_paths(source: Path, executed: Path) -> None:
    """Makes the repository's paths in an executed notebook (metadata, outputs, tracebacks) relative to it.

    The links of its source are made to lead to the same places from where the copy lies.
    """
    if executed.is_file():
        place = json.dumps(f"{files.REPOSITORY}{os.sep}", ensure_ascii=False)[1:-1]  # as JSON has it
        text = executed.read_text(encoding="utf-8").replace(place, "")
        for link in set(LINK.findall(source.read_text(encoding="utf-8"))):
            target = os.path.relpath(source.parent / link, executed.parent)
            text = text.replace(f"]({link})", f"]({Path(target).as_posix()})")
        files.write_whole(executed, text)


def put_answer(executed: Path, answer: str) -> None:
    """Writes a notebook's answer under its question in an executed copy, in place of an earlier one."""
    import nbformat

    book = nbformat.read(executed, as_version=4)
    line = f"\n\n**Answer** {' '.join(answer.split())}\n" if answer else ""
    head = book.cells[0].source
    book.cells[0].source = QUESTION.sub(lambda question: question[1] + line, head, count=1)
    files.write_whole(executed, nbformat.writes(book) + "\n")


def _cell(executed: Path, index: int | None = None) -> str:
    """A cell of an executed notebook with its heading; if none is named, the one that the notebook got to."""
    import nbformat

    cells = nbformat.read(executed, as_version=4).cells
    if index is None:
        index = max((i for i, c in enumerate(cells) if c.metadata.papermill.get("start_time")), default=None)
    if index is None:
        return "before its first cell"
    before = [cell.source for cell in cells[: index + 1] if cell.cell_type == "markdown"]
    lines = [line for source in before for line in source.splitlines()]
    headings = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return f"cell {index} ({headings[-1] if headings else 'no heading'})"


def expected_seconds(profile: str, seed: int) -> dict[str, float]:
    """Seconds each stage took last time here, else in another run, such as the committed reference run."""
    known = {}
    for cost in sorted((files.OUTPUTS / profile).glob(f"seed-*/{REPORT}/cost.csv")):
        with cost.open(encoding="utf-8") as rows:
            known |= {r["stage"]: float(r["wall_s"]) for r in csv.DictReader(rows)}
    for stage in STAGES:
        if done := manifest(profile, seed, stage):
            known[stage] = done["wall_s"]
    return known


def run(
    profile_name: str,
    *,
    seed: int,
    only: str | None = None,
    start: str | None = None,
    force: bool = False,
) -> None:
    """Runs the chain, or a part of it; what was made of the same values, inputs and method is skipped.

    Raises:
        ChainError: at the first failure; later stages are named as skipped.
        LockedError: another process runs this profile and seed. ProfileError: it, or an arm of its study, is
            wrong.
    """
    console, began = Console(soft_wrap=True), time.monotonic()
    profile = config.load(profile_name)
    chosen = [s for s in STAGES if (only is None or s.startswith(only)) and (start is None or s >= start)]
    if not chosen:
        raise ChainError(f"no stage starts with {only or start!r}; stages are {', '.join(STAGES)}")
    if ABLATION in chosen:
        arms(profile)  # refused before anything trains
    _name_older_layout(profile_name, console)
    if not profile.evidence:
        console.print(stages.no_evidence(profile_name))
    with lock.held(stages.seed_place(profile_name, seed)):
        _run_stages(chosen, profile, seed, force, console)
    console.print(f"{profile_name}, seed {seed}: {time.monotonic() - began:.0f} s")
    if REPORT in chosen:
        _print_claims(stage_folder(profile_name, seed, REPORT), console)


def _name_older_layout(profile_name: str, console: Console) -> None:
    if line := stages.older_layout(profile_name):
        console.print(line, markup=False, highlight=False)


def _run_stages(chosen: list[str], profile: config.Settings, seed: int, force: bool, console) -> None:
    """Runs the notebooks of some stages in their order, with a line before and after each."""
    profile_name, expected = profile.profile, expected_seconds(profile.profile, seed)
    for place, stage in enumerate(chosen):
        if not force and stages.ready(made_from(profile, seed, stage), profile_name, stage):
            console.print(f"[green]up to date[/]  {stage}")
            continue
        left, hint = chosen[place:], "no estimate yet"
        if all(s in expected for s in left):
            hint = f"about {sum(expected[s] for s in left) / 60:.0f} min left"
        console.print(f"[cyan]running[/]     {stage}  ({hint})")
        stage_began = time.monotonic()
        executed = stages.seed_folder(profile_name, seed) / "executed" / f"{stage}.ipynb"
        try:
            run_notebook(NOTEBOOKS / f"{stage}.ipynb", executed, {"profile": profile_name, "seed": seed})
            if (done := manifest(profile_name, seed, stage)) is None:
                raise ChainError(f"{stage}.ipynb ended without closing its stage; executed copy: {executed}")
            put_answer(executed, done["answer"])
        except ChainError as error:
            rest = ", ".join(chosen[place + 1 :])
            raise ChainError(f"{error}" + (f"\nskipped (need {stage}): {rest}" if rest else "")) from None
        console.print(f"[green]done[/]        {stage}  {time.monotonic() - stage_began:.0f} s")


def _print_claims(report: Path, console: Console) -> None:
    """The averages at rank 5, the gains and the distances; units, ablations and so on stay in claims.csv."""
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
    """One line per stage: up to date, out of date with a line for every reason, or not done."""
    profile, console = config.load(profile_name), Console(soft_wrap=True, highlight=False, markup=False)
    _name_older_layout(profile_name, console)
    stale = set()
    for stage in STAGES:
        done, made = manifest(profile_name, seed, stage), made_from(profile, seed, stage)
        kept = stages.beside(profile_name, seed, stage, key(made), "kept")
        if done is None:
            console.print(f"{'not done':12}{stage}")
            stale.add(stage)
            continue
        reasons = differences(done.get("made_from"), made)
        if reasons and kept.is_dir():
            reasons.append("one of today's values was kept; run takes it back")
        reasons += [f"input {name} is out of date" for name in STAGES[stage] if name in stale]
        if reasons:
            stale.add(stage)
        word = "out of date" if reasons else "up to date"
        console.print(f"{word:12}{stage}  seed {done['seed']}, {done['wall_s']} s")
        other = {name: v for name, v in stages.packages().items() if done["packages"].get(name) != v}
        reasons += [f"made with {name} {done['packages'].get(name)}, here {v}" for name, v in other.items()]
        for line in reasons:
            console.print(f"{'':12}{line}")


def clean(profile_name: str, agreed: Callable[[str], bool]) -> None:
    """Lists what other values of a profile have left, with size and age, and removes it if that is agreed.

    Raises:
        LockedError: another process runs this profile with a seed that has such work.
    """
    console, total, found = Console(soft_wrap=True, highlight=False, markup=False), 0, []
    for folder in stages.leftovers(profile_name):
        paths = [p.lstat() for p in folder.rglob("*") if p.is_file()]
        size, age = sum(s.st_size for s in paths), time.time() - max((s.st_mtime for s in paths), default=0)
        console.print(f"{size / 1e6:10.1f} MB  {age / 86400:6.1f} days  {folder}")
        total, found = total + size, [*found, folder]
    if not found:
        console.print(f"{profile_name}: nothing was left by other values")
    elif not agreed(f"Remove {len(found)} folders, {total / 1e6:.1f} MB?"):
        console.print("nothing was removed")
    else:
        for folder in found:
            with lock.held(f"{profile_name}/{folder.parent.name}"):
                shutil.rmtree(folder)
            console.print(f"removed {folder}")


def study(profile_name: str, seed: int) -> None:
    """Trains and measures the arms that have no result yet, on the data and backbone of the chain.

    Then it runs the notebooks that show them, but for those that also read stages that have not been run.

    Raises:
        ValueError: the results are of another backbone. ChainError: a training diverged.
    """
    from elva_core import distributed
    from elva_core.data import mbeir, sources
    from elva_core.experiments import study as ablations
    from elva_core.training.loop import DivergedError

    profile = config.load(profile_name)
    arms(profile)  # refused before anything trains
    data, bench, trained = (stage_folder(profile_name, seed, stage) for stage in STAGES[ABLATION])
    results, work = ablations.folders(profile_name)
    weights = ablations.backbone_hash(model_source(profile.backbone.path))
    ablations.refuse_another_backbone(profile, results, weights)  # before anything trains, too
    with lock.held(f"{profile_name}/study"), lock.held(stages.seed_place(profile_name, seed)):
        for stage in (numbered("00"), *STAGES[ABLATION]):
            run(profile_name, seed=seed, only=stage)
        os.environ.update(KERNEL_ENVIRONMENT)
        distributed.start(profile.threads)
        root, triplets = sources.locate(data)
        backbone = ablations.backbone_of(trained)
        try:
            ablations.run(profile, root, triplets, mbeir.Root(bench / "bench"), backbone, results, work)
        except DivergedError as error:
            raise ChainError(f"study of {profile_name}: {error}") from None
        for stage in map(numbered, ("60", "82", "90")):
            lacking = [name for name in STAGES[stage] if manifest(profile_name, seed, name) is None]
            if lacking:
                command = f"python -m elva_core run {profile_name} --seed {seed}"
                print(f"left out  {stage}, which needs {', '.join(lacking)}; run: {command}")
            else:
                run(profile_name, seed=seed, only=stage)


def train(stage: str, profile_name: str, seed: int) -> None:
    """Trains one stage on the processes that `accelerate launch` has started; its notebook finds it done.

    Raises:
        ChainError: the training diverged.
    """
    from elva_core import distributed
    from elva_core.experiments import jobs
    from elva_core.training.loop import DivergedError

    config.load(profile_name)  # refused before anything is locked
    notebook = jobs.NOTEBOOKS[stage]
    os.environ.update(KERNEL_ENVIRONMENT)
    with lock.held_by_launch(stages.seed_place(profile_name, seed)):
        with distributed.processes().main_process_first():
            opened = stages.open_stage(notebook, profile_name, seed)
            job = jobs.following(stage, opened)
        try:
            jobs.run(job)
        except DivergedError as error:
            raise ChainError(f"{stage} of {profile_name}, seed {seed}: {error}") from None
    if distributed.processes().is_main_process:
        command = f"python -m elva_core run {profile_name} --seed {seed} --from {notebook[:2]}"
        print(f"{job.model}; goes on with: {command}")
