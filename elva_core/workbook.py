"""The chain of notebooks and the command line. Imports heavy modules only inside the command that needs them.

python -m elva_core run smoke
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from elva_core import artifacts, settings

NOTEBOOKS = artifacts.REPOSITORY / "notebooks"
PACKAGE = Path(__file__).resolve().parent
# stage -> the stages it reads
STAGES = {
    "00_check_environment": (),
    "10_prepare_data": ("00_check_environment",),
    "20_build_mrbench": ("10_prepare_data",),
    "30_pretrain_contrastive": ("10_prepare_data",),
    "40_finetune_rlvr": ("10_prepare_data", "30_pretrain_contrastive"),
    "50_evaluate": ("10_prepare_data", "20_build_mrbench", "30_pretrain_contrastive", "40_finetune_rlvr"),
    "60_ablate": ("10_prepare_data", "20_build_mrbench", "30_pretrain_contrastive"),
    "70_analyse_grains": ("10_prepare_data", "20_build_mrbench", "30_pretrain_contrastive", "40_finetune_rlvr"),
    "80_generalise": ("10_prepare_data", "20_build_mrbench", "30_pretrain_contrastive", "40_finetune_rlvr"),
    "82_transfer": ("10_prepare_data", "30_pretrain_contrastive", "40_finetune_rlvr", "50_evaluate", "60_ablate"),
    "85_trade_cost": ("10_prepare_data", "20_build_mrbench", "30_pretrain_contrastive", "40_finetune_rlvr"),
    "90_report": (),
}
STAGES["90_report"] = tuple(s for s in STAGES if s != "90_report")
# Large tensors come and go all the time; without these glibc gives the pages back and faults them in again.
KERNEL_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296",
    "TQDM_MININTERVAL": "30",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",  # transformers announces its next major version in every kernel
    "HF_HUB_OFFLINE": "1",
}


class ChainError(RuntimeError):
    """A notebook failed; the message names notebook, cell, reason and executed copy."""


def code_hash(notebook: Path) -> str:
    """Hash of a notebook's code cells and of every module of the package they reach through imports."""
    import nbformat

    source = "\n".join(cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code")
    digest, queue, seen = hashlib.sha256(source.encode()), _imports(source), set()
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue |= _imports((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    for name in sorted(seen):
        digest.update((PACKAGE / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _imports(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "elva_core":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("elva_core."):
            names.add(node.module.split(".")[1])
    return {name for name in names if (PACKAGE / f"{name}.py").is_file()}


def wanted_fingerprint(profile: settings.Settings, seed: int, stage: str) -> str:
    """What the manifest of an up-to-date stage carries."""
    inputs = {}
    for name in STAGES[stage]:
        path = artifacts.stage_folder(profile.profile, name) / "manifest.json"
        inputs[name] = artifacts.file_hash(path) if path.is_file() else "missing"
    return artifacts.fingerprint(profile, seed, inputs, code_hash(NOTEBOOKS / f"{stage}.ipynb"))


def up_to_date(profile: settings.Settings, seed: int, stage: str) -> bool:
    found = artifacts.manifest(profile.profile, stage)
    return found is not None and found["fingerprint"] == wanted_fingerprint(profile, seed, stage)


def run_notebook(source: Path, executed: Path, parameters: dict[str, object], fingerprint: str = "") -> None:
    """Executes one notebook with papermill; refuses unknown parameters, notices cells that never ran.

    Raises:
        ChainError: with notebook, cell, last line of the traceback and the executed copy.
    """
    import papermill

    declared = papermill.inspect_notebook(str(source))
    if unknown := sorted(parameters.keys() - declared.keys()):
        raise ChainError(f"{source.name} declares no parameter {unknown}; it declares {sorted(declared)}")
    executed.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(KERNEL_ENVIRONMENT, ELVA_FINGERPRINT=fingerprint)
    try:
        notebook = papermill.execute_notebook(
            str(source),
            str(executed),
            parameters,
            cwd=str(source.parent),
            progress_bar=False,
            stderr_file=sys.stderr,
            kernel_name="python3",
            store_widget_state=False,  # a widget of a finished run has nothing behind its buttons
            extra_arguments=["--IPKernelApp.log_level=40"],  # it warns of local TCP at every start
        )
    except papermill.PapermillExecutionError as error:
        last = error.evalue.strip().splitlines()[-1] if error.evalue.strip() else ""
        raise ChainError(
            f"{source.name}, cell {error.cell_index} ({_heading(executed, error.cell_index)}): {error.ename}: {last}\n"
            f"executed copy: {executed}"
        ) from None
    skipped = [i for i, c in enumerate(notebook.cells) if c.cell_type == "code" and c.source.strip() and c.execution_count is None]
    if skipped:
        raise ChainError(f"{source.name}: cells {skipped} never ran (sys.exit?); executed copy: {executed}")


def _heading(executed: Path, index: int) -> str:
    import nbformat

    cells = nbformat.read(executed, as_version=4).cells[: index + 1]
    lines = [line for c in cells if c.cell_type == "markdown" for line in c.source.splitlines() if line.startswith("#")]
    return lines[-1].lstrip("# ") if lines else "no heading"


def expected_seconds(profile: str) -> dict[str, float]:
    """Seconds each stage took last time here, else in the committed reference run."""
    import csv

    cost = artifacts.stage_folder(profile, "90_report") / "cost.csv"
    known = {}
    if cost.is_file():
        with cost.open(encoding="utf-8") as rows:
            known = {r["stage"]: float(r["wall_s"]) for r in csv.DictReader(rows)}
    for stage in STAGES:
        if found := artifacts.manifest(profile, stage):
            known[stage] = found["wall_s"]
    return known


def run(
    profile_name: str, *, seed: int, only: str | None = None, start: str | None = None, force: bool = False, console: Console | None = None
) -> None:
    """Runs the chain, or a part of it; stages whose inputs, profile, seed and code have not changed are skipped.

    Raises:
        ChainError: at the first failure; later stages are named as skipped.
    """
    console = console or Console(soft_wrap=True)
    profile = settings.load(profile_name)
    stages = [s for s in STAGES if (only is None or s.startswith(only)) and (start is None or s >= start)]
    if not stages:
        raise ChainError(f"no stage starts with {only or start!r}; stages are {', '.join(STAGES)}")
    expected, began = expected_seconds(profile_name), time.monotonic()
    for place, stage in enumerate(stages):
        if not force and up_to_date(profile, seed, stage):
            console.print(f"[green]up to date[/]  {stage}")
            continue
        left = [s for s in stages[place:] if s in expected]
        hint = f"about {sum(expected[s] for s in left) / 60:.0f} min left" if len(left) == len(stages[place:]) else "no estimate yet"
        console.print(f"[cyan]running[/]     {stage}  ({hint})")
        stage_began = time.monotonic()
        executed = artifacts.OUTPUTS / profile_name / "executed" / f"{stage}.ipynb"
        try:
            run_notebook(
                NOTEBOOKS / f"{stage}.ipynb", executed, {"profile": profile_name, "seed": seed}, wanted_fingerprint(profile, seed, stage)
            )
            if artifacts.manifest(profile_name, stage) is None:
                raise ChainError(f"{stage}.ipynb ended without closing its stage; executed copy: {executed}")
        except ChainError as error:
            rest = ", ".join(stages[place + 1 :])
            raise ChainError(f"{error}" + (f"\nskipped (need {stage}): {rest}" if rest else "")) from None
        console.print(f"[green]done[/]        {stage}  {time.monotonic() - stage_began:.0f} s")
    console.print(f"{profile_name}, seed {seed}: {time.monotonic() - began:.0f} s")
    if "90_report" in stages:
        _print_claims(artifacts.stage_folder(profile_name, "90_report"), console)


def _print_claims(report: Path, console: Console) -> None:
    """The averages at rank 5, the gains and the distances; units, ablations and the rest stay in claims.csv."""
    import csv

    table = Table(title="measured in this run; every row: claims.csv")
    for column in ("claim", "metric", "paper", "ours", "95 % interval", "n", "verdict"):
        table.add_column(column, no_wrap=True)
    with (report / "claims.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            average = row["claim"].endswith("average") and row["metric"] == "hit@5"
            if row["ours"] and (average or "gain of hit@5" in row["metric"] or "distance" in row["metric"]):
                paper, ours, low, high = (f"{float(row[c]):.3g}" if row[c] else "" for c in ("paper", "ours", "ci_low", "ci_high"))
                interval = f"[{low}, {high}]" if low else ""
                table.add_row(row["claim"], row["metric"], paper, ours, interval, row["n"].removesuffix(".0"), row["verdict"])
    Console(file=console.file, width=max(console.width, 150)).print(table)  # print(width=) never exceeds the console's own
    console.print(f"report: {report / 'report.md'}")


def status(profile_name: str, seed: int) -> None:
    """One line per stage: done and current, out of date, or not done."""
    profile, console = settings.load(profile_name), Console(soft_wrap=True)
    for stage in STAGES:
        found = artifacts.manifest(profile_name, stage)
        word = "not done" if found is None else "up to date" if up_to_date(profile, seed, stage) else "out of date"
        console.print(f"{word:12}{stage}" + (f"  seed {found['seed']}, {found['wall_s']} s" if found else ""))


def study(profile_name: str, seed: int) -> None:
    """Trains and measures the arms that have no result yet, on the data and backbone of the chain; then the notebooks that show them."""
    from elva_core import mbeir, prepare, runtime
    from elva_core import study as arms

    profile = settings.load(profile_name)
    for stage in ("00_check_environment", *STAGES["60_ablate"]):
        run(profile_name, seed=seed, only=stage)
    os.environ.update(KERNEL_ENVIRONMENT)
    runtime.start(profile.threads)
    data, bench, trained = (artifacts.stage_folder(profile_name, stage) for stage in STAGES["60_ablate"])
    root, triplets = prepare.locate(data)
    arms.run(profile, root, triplets, mbeir.Root(bench / "bench"), arms.backbone_of(trained), *arms.folders(profile_name))
    for stage in ("60_ablate", "90_report"):
        run(profile_name, seed=seed, only=stage)


def train(stage: str, profile_name: str, seed: int) -> None:
    """Trains one stage on the processes that `accelerate launch` has started; the notebook of the stage finds it done."""
    from elva_core import runtime, training

    profile, notebook = settings.load(profile_name), training.NOTEBOOKS[stage]
    os.environ.update(KERNEL_ENVIRONMENT, ELVA_FINGERPRINT=wanted_fingerprint(profile, seed, notebook))
    with runtime.processes().main_process_first():
        opened = artifacts.open_stage(notebook, profile_name, seed)
        job = training.following(stage, opened)
    training.run(job)
    if runtime.processes().is_main_process:
        print(f"{job.model}; goes on with: python -m elva_core run {profile_name} --seed {seed} --from {notebook[:2]}")


def check(root: Path) -> int:
    """Prints every violation; the exit status is 1 if there is one."""
    from elva_core import lint, mbeir

    problems = lint.check(mbeir.Root(root))
    for problem in problems:
        print(problem)
    print(f"{root}: {len(problems)} problems")
    return int(bool(problems))


def _opened(model: Path, profile: settings.Settings):
    """A model folder, with the device, dtype and threads of a profile."""
    from elva_core import encoder, runtime

    runtime.start(profile.threads)
    return encoder.load(model, dtype=profile.dtype, device=profile.device)


def evaluate(
    root: Path,
    units: Sequence[str],
    model: Path,
    pool: str,
    out: Path,
    profile_name: str,
    template: str | None,
    spread: bool,
    pool_model: Path | None,
) -> None:
    """Scores a trained model on units of any M-BEIR root; embeddings are kept, and what is done is not done again.

    Args:
        template: how the queries are read; None reads them as the model's folder says. pool_model: embeds the candidates,
            as its folder says; None is `model`, read like the queries.
    """
    from elva_core import evaluate as evaluation
    from elva_core import mbeir

    profile, pools = settings.load(profile_name), ("local", "global") if pool == "both" else (pool,)
    loaded = _opened(model, profile)
    kept = profile.evaluation.model_copy(update={"on_disk": True})
    candidates = _kept_pool(pool_model, loaded, profile) if pool_model else None
    searcher = evaluation.searcher_of(loaded, mbeir.Root(root), "test", kept, template or loaded.template, candidates)
    known = searcher.root.units("test")
    if lost := sorted(set(units) - set(known)):
        raise ValueError(f"{root} has no test units {lost}; it has {known}")
    results = evaluation.score(searcher, units or known, pools, out, model=model.name, spread=spread)
    if results is None:
        return
    print(results.pivot(index="metric", columns=["unit", "pool"], values="value").round(4).to_string())
    print((out / "table.md").read_text())


def video(name: str, root: Path, model: Path, out: Path, frames: int | None, profile_name: str) -> None:
    """Scores a trained model on text to video; embeddings are kept, so that a killed run goes on."""
    from elva_core import evaluate, runtime, store, video_sets
    from elva_core import unseen as unseen_scores
    from elva_core import video as videos

    profile, frames = settings.load(profile_name), video_sets.FRAMES if frames is None else frames
    task = video_sets.SETS[name](root, frames)
    loaded = _opened(model, profile)
    batch = max(1, profile.evaluation.batch // max(1, frames))  # a frame takes at most what an image takes
    kept = store.Store(evaluate.EMBEDDINGS, loaded, batch=batch, template="summary")
    hits = unseen_scores.score(task.name, [task], kept)[["set", "query", "metric", "value"]]
    results = videos.table(hits, profile.evaluation.bootstrap, 0).assign(model=model.name)
    if runtime.processes().is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        runtime.write_whole(out / f"{name}.csv", results.to_csv(index=False))
        print(results.round(4).to_string(index=False))


def unseen(
    sets: Path, names: Sequence[str], model: Path | None, out: Path | None, profile_name: str, template: str, encoding: str, lint_only: bool
) -> int:
    """Lints a folder of unseen sets and, if it is clean, scores a trained model on them; the exit status is 1 if it is not."""
    from elva_core import unseen as unseen_scores

    if not lint_only and (model is None or out is None):
        raise ValueError("unseen needs --model and --out, or --lint")
    problems, notes = unseen_scores.check(sets, names, decode=lint_only)
    for line in [*(f"note: {note}" for note in notes), *problems]:
        print(line)
    print(f"{sets}: {len(problems)} problems, {len(notes)} notes")
    if problems or lint_only:
        return int(bool(problems))
    from elva_core import evaluate, store

    profile = settings.load(profile_name)
    loaded = _opened(model, profile)
    kept = store.Store(evaluate.EMBEDDINGS, loaded, batch=profile.evaluation.batch, template=template)
    results = unseen_scores.run(sets, names, kept, out, model=model.name, encoding=encoding, samples=profile.evaluation.bootstrap)
    if results is not None:
        print(results.round(4).to_string(index=False))
        print((out / "table2.md").read_text())
    return 0


def _kept_pool(folder: Path, asking, profile: settings.Settings):
    """The kept embeddings of another model than the one that reads the queries; errors as `_pool_encoder` has them."""
    from elva_core import evaluate as evaluation
    from elva_core import store

    loaded = _pool_encoder(folder, asking, profile)
    return store.Store(evaluation.EMBEDDINGS, loaded, batch=profile.evaluation.batch, template=loaded.template)


def _pool_encoder(folder: Path, asking, profile: settings.Settings):
    """The model that embeds the candidates.

    Raises:
        ValueError: its embeddings have another size than those of the model that reads the queries.
    """
    loaded = _opened(folder, profile)
    sizes = [e.backbone.config.get_text_config().hidden_size for e in (asking, loaded)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{folder} has embeddings of size {sizes[1]}, {asking.source} of {sizes[0]}; take its teacher")
    return loaded


def search(
    model: Path | None,
    root: Path | None,
    unit: str | None,
    text: str,
    image: Path | None,
    k: int,
    profile_name: str,
    template: str | None = None,
    pool_model: Path | None = None,
    built: Path | None = None,
    pictures: bool = True,
) -> None:
    """Prints the best candidates of a unit's pool, or of a built index, for a free query; a sheet of pictures goes where one stands.

    The pool of a unit is embedded once and kept. An index says which model and root it was made from; either may be given instead.

    Args:
        template, pool_model: as in `evaluate`; an index is asked as it was read. In one pass there is no summary to print.
    """
    from elva_core import answers, index, mbeir

    if built is None and not (model and root and unit):
        raise ValueError("search needs --model, --root and --unit, or --index")
    if built is not None:
        written = index.manifest(built)
        if unit not in (None, written["unit"]):
            raise ValueError(f"{built} is an index of {written['unit']}, not of {unit}; leave --unit out, or export that unit's index")
        places = written["made_from"]
        model, root = (given or index.place_of(built, places[name]) for given, name in ((model, "model"), (root, "root")))
        if model is None:
            raise ValueError(f"{built} was made by {places['model']}, which is not there; say where it is with --model DIR")
    profile = settings.load(profile_name)
    loaded = _opened(model, profile)
    data = mbeir.Root(root) if root else None
    if built and pool_model:
        raise ValueError("--index holds embedded candidates; leave --pool-model out")
    other = _pool_encoder(pool_model, loaded, profile) if pool_model else loaded
    read = other.template if pool_model else template or loaded.template
    batch = profile.evaluation.batch
    pool = index.opened(built, loaded, data) if built else answers.of_unit(other, data, unit, batch=batch, template=read)
    asked = template or (pool.template if built else loaded.template)
    found = answers.search(loaded, pool, text, image, k=k, template=asked)
    if asked == "summary":
        print(f"summary: {found.summary!r}")
    for rank, score, did, words, picture, caption in found.table().fillna("").itertuples(index=False):
        print(f"{rank:3} {score:.3f} {did:10} {words} {picture} {caption}")
    if pictures:
        print(f"pictures: {found.save(Path.cwd())}" + ("" if data else " without images; say where they are with --root ROOT"))


def export(
    model: Path, to: Path, template: str | None, root: Path | None, unit: str | None, index_wanted: bool, pool: str, profile_name: str
) -> None:
    """Writes a model for sentence-transformers, or the embeddings of a unit's pool as parquet and for FAISS."""
    from elva_core import mbeir

    data = mbeir.Root(root) if root else None
    if not index_wanted:
        from elva_core import export as exporting

        print(f"{model} is now {exporting.sentence_transformer(model, to, template=template, root=data, unit=unit)}; see its README.md")
        return
    from elva_core import answers, index

    if not (data and unit):
        raise ValueError("export --index needs --root and --unit, whose pool it embeds")
    profile = settings.load(profile_name)
    loaded = _opened(model, profile)
    embedded = answers.of_unit(loaded, data, unit, batch=profile.evaluation.batch, template=template or loaded.template, pool=pool)
    files = index.write(loaded, embedded, to)
    print(f"{to}: {len(embedded.candidates)} candidates in {', '.join(files)}")
    if index.FAISS not in files:
        print(f"no {index.FAISS}: faiss is not installed; pip install faiss-cpu, then export again")


def plan(profile_name: str, gpu: str | None, devices: int) -> None:
    """Prints what a profile costs on a named GPU; starts nothing, writes nothing."""
    from elva_core import plan as costs

    costs.show(settings.load(profile_name), gpu=gpu, devices=devices, console=Console())


def push(model: Path, to: str, profile_name: str | None, results: Path | None) -> None:
    """Puts a trained model with its card into a folder or on the hub."""
    from elva_core import publish

    profile = settings.load(profile_name) if profile_name else None
    print(f"{model} is now {publish.push(model, to, profile=profile, results=results)}")


def readme(profile_name: str) -> None:
    """Writes the tables of the committed run between the README's markers."""
    from elva_core import report

    folder = artifacts.stage_folder(profile_name, "90_report")
    blocks = {name: (folder / file).read_text(encoding="utf-8") for name, file in (("claims", "table.md"), ("stages", "stages.md"))}
    report.update_readme(artifacts.REPOSITORY / "README.md", blocks)


def _reading(command: argparse.ArgumentParser) -> None:
    """How a command turns queries and candidates into vectors."""
    said = "read at [RET] after a summary, or in one pass; default: as the model's elva.json says"
    command.add_argument("--template", choices=("summary", "eol"), help=said)
    command.add_argument("--pool-model", type=Path, metavar="DIR", help="the model that embeds the candidates; default: --model")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elva_core", description="The ELVA workbook")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run", help="run the chain of notebooks")
    p.add_argument("profile")
    p.add_argument("--seed", type=int, default=17)
    p.add_argument("--only", metavar="NN", help="only this stage")
    p.add_argument("--from", dest="start", metavar="NN", help="this stage and those after it")
    p.add_argument("--force", action="store_true", help="run stages that are up to date, too")
    p = commands.add_parser("status", help="which stages are done and current")
    p.add_argument("profile")
    p.add_argument("--seed", type=int, default=17)
    p = commands.add_parser("study", help="train and measure the arms of params/arms.yaml that have no result yet")
    p.add_argument("profile")
    p.add_argument("--seed", type=int, default=17, help="of the finished chain, whose data and backbone it takes")
    p = commands.add_parser("train", help="train one stage, also under accelerate launch")
    p.add_argument("stage", choices=("stage1", "stage2", "stage3", "control", "distil", "rerank"))
    p.add_argument("profile")
    p.add_argument("--seed", type=int, default=17)
    p = commands.add_parser("plan", help="what a profile costs before it is started: sequences, FLOPs, hours, memory, disk")
    p.add_argument("profile")
    p.add_argument("--gpu", help="a name of params/plan.yaml, for instance H100, A100, H20, L40S; default by the profile's device")
    p.add_argument("--devices", type=int, default=1)
    p = commands.add_parser("lint", help="check an M-BEIR folder")
    p.add_argument("root", type=Path)
    p = commands.add_parser("evaluate", help="score a trained model on units of an M-BEIR folder")
    p.add_argument("--root", type=Path, required=True)
    p.add_argument("--unit", nargs="*", default=[])
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--pool", choices=("local", "global", "both"), default="local")
    _reading(p)
    p.add_argument("--spread", action="store_true", help="also under each of the four instructions")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--profile", default="cpu", help="where device, batch and cut-offs come from")
    p = commands.add_parser("video", help="score a trained model on text to video: MSR-VTT or MSVD")
    p.add_argument("--set", dest="name", choices=("msrvtt", "msvd"), required=True)
    p.add_argument("--root", type=Path, required=True, help="folder with the annotations and videos/; layouts: elva_core/video_sets.py")
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--frames", type=int, help="looked at in each video; default as LamRA on MSVD")
    p.add_argument("--profile", default="cpu", help="where device and batch come from")
    p = commands.add_parser("unseen", help="check the unseen sets of the paper's Table 2 and score a trained model on them")
    p.add_argument("--sets", type=Path, required=True, help="the folder that holds sharegpt4v, Urban1k, flickr, CIRCO, ...")
    p.add_argument("--set", nargs="*", default=[], dest="names", metavar="NAME", help="only these; default: all whose folder is there")
    p.add_argument("--lint", action="store_true", help="only check, and decode every image")
    p.add_argument("--model", type=Path)
    p.add_argument("--template", choices=("summary", "eol"), default="summary")
    p.add_argument("--encoding", choices=("by direction", "once"), default="by direction", help="once: LamRA's way of the captioned sets")
    p.add_argument("--out", type=Path)
    p.add_argument("--profile", default="cpu", help="where device and batch come from")
    p = commands.add_parser("search", help="search a unit's pool, or a built index, with a text, an image, or both")
    p.add_argument("--model", type=Path)
    p.add_argument("--root", type=Path)
    p.add_argument("--unit")
    p.add_argument("--index", type=Path, help="what `export --index` wrote, instead of --model, --root and --unit")
    p.add_argument("text", nargs="?", default="")
    p.add_argument("--image", type=Path)
    p.add_argument("--k", type=int, default=10)
    _reading(p)
    p.add_argument("--no-pictures", action="store_true", help="write no contact sheet into this folder")
    p.add_argument("--profile", default="cpu")
    p = commands.add_parser(
        "export", help="write a model for sentence-transformers, or with --index a pool's embeddings for FAISS and as parquet"
    )
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    p.add_argument(
        "--template", choices=("summary", "eol"), help="read at [RET] after a summary, or in one pass; by default what the model says"
    )
    p.add_argument("--root", type=Path, help="an M-BEIR folder: its instructions become prompts; with --index, where the pool is")
    p.add_argument("--unit", help="whose instruction encode_query takes; with --index, whose pool is embedded")
    p.add_argument("--index", action="store_true", help="the embeddings of a pool as parquet and for FAISS, instead of the model")
    p.add_argument("--pool", choices=("local", "global"), default="local")
    p.add_argument("--profile", default="cpu", help="where device and batch come from")
    p = commands.add_parser("push", help="put a trained model with its model card into a folder or on the hub")
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--to", required=True, metavar="REPO_OR_FOLDER", help="a folder (existing, or starting with . / ~), else a hub name")
    p.add_argument("--profile", help="whose training values the card shows")
    p.add_argument("--results", type=Path, help="results.csv of `evaluate` or claims.csv of a report, for the card")
    p = commands.add_parser("readme", help="refresh the tables of README.md")
    p.add_argument("profile", nargs="?", default="cpu")
    a = parser.parse_args(arguments)
    try:
        if a.command == "run":
            run(a.profile, seed=a.seed, only=a.only, start=a.start, force=a.force)
        elif a.command == "status":
            status(a.profile, a.seed)
        elif a.command == "study":
            study(a.profile, a.seed)
        elif a.command == "train":
            train(a.stage, a.profile, a.seed)
        elif a.command == "plan":
            plan(a.profile, a.gpu, a.devices)
        elif a.command == "lint":
            return check(a.root)
        elif a.command == "evaluate":
            evaluate(a.root, a.unit, a.model, a.pool, a.out, a.profile, a.template, a.spread, a.pool_model)
        elif a.command == "video":
            video(a.name, a.root, a.model, a.out, a.frames, a.profile)
        elif a.command == "unseen":
            return unseen(a.sets, a.names, a.model, a.out, a.profile, a.template, a.encoding, a.lint)
        elif a.command == "search":
            search(a.model, a.root, a.unit, a.text, a.image, a.k, a.profile, a.template, a.pool_model, a.index, not a.no_pictures)
        elif a.command == "export":
            export(a.model, a.to, a.template, a.root, a.unit, a.index, a.pool, a.profile)
        elif a.command == "push":
            push(a.model, a.to, a.profile, a.results)
        elif a.command == "readme":
            readme(a.profile)
    except (ChainError, settings.ProfileError, artifacts.MissingStageError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
