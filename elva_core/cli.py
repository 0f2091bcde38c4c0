"""The command line: what each command is given and prints.

Heavy modules are imported only inside the command that needs them.

python -m elva_core run smoke
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer
from rich.console import Console
from typer import Argument, Option

from elva_core import config, files
from elva_core.command_options import ManyValues
from elva_core.experiments import chain, lock, stages

app = typer.Typer(
    help="The ELVA workbook: its notebooks, training, evaluation and use of what was trained.",
    epilog="Installed as `elva`, too; `elva --install-completion` completes commands, flags and profiles.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
WORKBOOK, TRAINING, EVALUATION = "Workbook", "Training", "Data and evaluation"
USE = "Use and sharing of a trained model"
# what ends a command with one line
EXPECTED = (chain.ChainError, stages.MissingStageError, lock.LockedError, OSError, ValueError)
PROFILES = sorted({path.stem for path in config.PARAMS.glob("*.yaml")} - {*config.NO_PROFILES})

# Arguments that several commands share
Stage = Literal["stage1", "stage2", "stage3", "control", "distil", "rerank"]
Profile = Annotated[
    str, Argument(metavar="PROFILE", help="a file of params/", autocompletion=lambda: PROFILES)
]
Seed = Annotated[int, Option(min=0, help="every generator derives from it")]
SettingsFrom = Annotated[str, Option("--profile", help="device and batch", autocompletion=lambda: PROFILES)]
Model = Annotated[Path, Option(help="folder of a trained model")]
OptionalModel = Annotated[Path | None, Option(help="folder of a trained model")]
Out = Annotated[Path, Option(help="folder of the results")]
PoolModel = Annotated[Path | None, Option(help="the model that embeds the candidates; default: --model")]
READ = "read at \\[RET] after a summary, or in one pass; default: as the model's elva.json says"
Template = Annotated[Literal["summary", "eol"] | None, Option(help=READ)]


@app.command(rich_help_panel=WORKBOOK)
def run(
    profile: Profile,
    seed: Seed = 17,
    only: Annotated[str | None, Option(metavar="NN", help="only this stage")] = None,
    start: Annotated[str | None, Option("--from", metavar="NN", help="this one and all after it")] = None,
    force: Annotated[bool, Option("--force", help="run stages that are up to date, too")] = False,
) -> None:
    """Run the chain of notebooks; what is up to date is skipped.

    Example: python -m elva_core run cpu --from 40
    """
    chain.run(profile, seed=seed, only=only, start=start, force=force)


@app.command(rich_help_panel=WORKBOOK)
def status(profile: Profile, seed: Seed = 17) -> None:
    """Say which stages are done and current.

    Example: python -m elva_core status cpu
    """
    chain.status(profile, seed)


@app.command(rich_help_panel=WORKBOOK)
def study(profile: Profile, seed: Seed = 17) -> None:
    """Train and measure the arms of params/arms.yaml that have no result yet, from the chain's backbone.

    Example: python -m elva_core study cpu
    """
    chain.study(profile, seed)


@app.command(rich_help_panel=WORKBOOK)
def readme(profile: Profile = "cpu") -> None:
    """Refresh the tables of README.md with those of a profile's report.

    Example: python -m elva_core readme cpu
    """
    from elva_core.experiments import report

    folder = stages.stage_folder(profile, "90_report")
    tables = {"claims": "table.md", "stages": "stages.md"}
    blocks = {name: (folder / file).read_text(encoding="utf-8") for name, file in tables.items()}
    report.update_readme(files.REPOSITORY / "README.md", blocks)


@app.command(rich_help_panel=TRAINING)
def train(
    stage: Annotated[Stage, Argument(metavar="STAGE", help=" ".join(get_args(Stage)))],
    profile: Profile,
    seed: Seed = 17,
) -> None:
    """Train one stage, also under accelerate launch; its notebook finds it done.

    Example: accelerate launch --config_file params/accelerate/fsdp2.yaml -m elva_core train stage2 qwen2vl-2b
    """
    chain.train(stage, profile, seed)


@app.command(rich_help_panel=TRAINING)
def plan(
    profile: Profile,
    gpu: Annotated[str | None, Option(help="of params/plan.yaml: H100, A100, H20, L40S, ...")] = None,
    devices: Annotated[int, Option(min=1, help="GPUs that train together")] = 1,
) -> None:
    """Say what a profile costs before it is started: sequences, FLOPs, hours, memory, disk. Writes nothing.

    Example: python -m elva_core plan qwen2vl-7b --gpu H20 --devices 8
    """
    from elva_core.experiments import plan as costs

    costs.show(config.load(profile), gpu=gpu, devices=devices, console=Console())


@app.command(rich_help_panel=EVALUATION)
def lint(root: Annotated[Path, Argument(metavar="ROOT", help="an M-BEIR folder")]) -> None:
    """Check an M-BEIR folder and print every violation; the exit status is 1 if there is one.

    Example: python -m elva_core lint data/M-BEIR
    """
    from elva_core.data import lint as rules
    from elva_core.data import mbeir

    problems = rules.check(mbeir.Root(root))
    print(*problems, f"{root}: {len(problems)} problems", sep="\n")
    raise typer.Exit(bool(problems))


@app.command(rich_help_panel=EVALUATION, cls=ManyValues)
def evaluate(
    root: Annotated[Path, Option(help="an M-BEIR folder")],
    model: Model,
    out: Out,
    unit: Annotated[list[str] | None, Option(help="only these test units; default: all")] = None,
    pool: Annotated[Literal["local", "global", "both"], Option(help="of candidates")] = "local",
    template: Template = None,
    pool_model: PoolModel = None,
    profile: SettingsFrom = "cpu",
) -> None:
    """Score a trained model on units of an M-BEIR folder; what a killed run has done is not done again.

    Example: python -m elva_core evaluate --root data/M-BEIR --unit mscoco_task0 --model MODEL --out results
    """
    from elva_core.data import mbeir
    from elva_core.evaluation import benchmark

    settings, pools = config.load(profile), ("local", "global") if pool == "both" else (pool,)
    loaded = _loaded(model, settings)
    other = pool_model and _pool_encoder(pool_model, loaded, settings)
    embed_pool = other and _store(other, settings.evaluation.batch)
    on_disk = settings.evaluation.model_copy(update={"on_disk": True})
    data, template = mbeir.Root(root), template or loaded.template
    searcher = benchmark.searcher_of(loaded, data, "test", on_disk, template, embed_pool)
    known = data.units("test")
    if lost := sorted(set(unit or ()) - set(known)):
        raise ValueError(f"{root} has no test units {lost}; it has {known}")
    results = benchmark.score(searcher, unit or known, pools, out, model=model.resolve().name)
    if results is not None:
        print(results.pivot(index="metric", columns=["unit", "pool"], values="value").round(4).to_string())
        print((out / "table.md").read_text())


@app.command(rich_help_panel=EVALUATION)
def video(
    name: Annotated[Literal["msrvtt", "msvd"], Option("--set")],
    root: Annotated[Path, Option(help="annotations and videos/, as elva_core/data/video_sets.py says")],
    model: Model,
    out: Out,
    frames: Annotated[int | None, Option(min=1, help="of each video; default: as LamRA on MSVD")] = None,
    template: Template = None,
    profile: SettingsFrom = "cpu",
) -> None:
    """Score a trained model on text to video: MSR-VTT or MSVD.

    Example: python -m elva_core video --set msvd --root data/msvd --model MODEL --out results
    """
    from elva_core import distributed
    from elva_core.data import video_sets
    from elva_core.evaluation import benchmark, captions
    from elva_core.evaluation import video as videos

    settings, frames = config.load(profile), video_sets.FRAMES if frames is None else frames
    benchmark.results_folder(out)
    task = video_sets.SETS[name](root, frames)
    batch = max(1, settings.evaluation.batch // max(1, frames))  # a frame takes at most what an image takes
    embed = _store(_loaded(model, settings), batch, template)
    hits = captions.score(task.name, [task], embed)[["set", "query", "metric", "value"]]
    results = videos.table(hits, settings.evaluation.bootstrap, 0).assign(model=model.resolve().name)
    if distributed.processes().is_main_process:
        files.write_whole(out / f"{name}.csv", results.to_csv(index=False))
        print(results.round(4).to_string(index=False))


@app.command(rich_help_panel=EVALUATION, cls=ManyValues)
def unseen(
    sets: Annotated[Path, Option(help="the folder that holds sharegpt4v, Urban1k, flickr, CIRCO, ...")],
    names: Annotated[list[str] | None, Option("--set", help="default: all that are there")] = None,
    model: OptionalModel = None,
    out: Annotated[Path | None, Option(help="folder of the results")] = None,
    lint_only: Annotated[bool, Option("--lint", help="only check, and decode every image")] = False,
    encoding: Annotated[Literal["by direction", "once"], Option(help="once: as LamRA")] = "by direction",
    template: Template = None,
    profile: SettingsFrom = "cpu",
) -> None:
    """Check the unseen sets of the paper's Table 2 and, if they are clean, score a trained model on them.

    Example: python -m elva_core unseen --sets data/unseen --set circo sugarcrepe --model MODEL --out results
    """
    from elva_core.evaluation import captions

    if not lint_only and (model is None or out is None):
        raise ValueError("unseen needs --model and --out, or --lint")
    problems, notes = captions.check(sets, names or (), decode=lint_only)
    counts = f"{sets}: {len(problems)} problems, {len(notes)} notes"
    print(*(f"note: {note}" for note in notes), *problems, counts, sep="\n")
    if problems or lint_only:
        raise typer.Exit(bool(problems))
    settings = config.load(profile)
    embed = _store(_loaded(model, settings), settings.evaluation.batch, template)
    said = {"model": model.resolve().name, "encoding": encoding, "samples": settings.evaluation.bootstrap}
    results = captions.run(sets, names or (), embed, out, **said)
    if results is not None:
        print(results.round(4).to_string(index=False))
        print((out / "table2.md").read_text())


@app.command(rich_help_panel=USE)
def search(
    text: Annotated[str, Argument(metavar="TEXT")] = "",
    image: Annotated[Path | None, Option(help="a file")] = None,
    model: OptionalModel = None,
    root: Annotated[Path | None, Option(help="an M-BEIR folder")] = None,
    unit: Annotated[str | None, Option(help="whose pool is searched")] = None,
    index: Annotated[Path | None, Option(help="of `export --index`, for --model, --root and --unit")] = None,
    k: Annotated[int, Option(min=1, help="how many answers")] = 10,
    template: Template = None,
    pool_model: PoolModel = None,
    no_pictures: Annotated[bool, Option("--no-pictures", help="write no contact sheet here")] = False,
    profile: SettingsFrom = "cpu",
) -> None:
    """Search a unit's pool, or a built index, with a text, an image, or both.

    The pool of a unit is embedded once and kept. An index says which model and root it was made from; either
    may be given instead.

    Example: python -m elva_core search --model MODEL --root data/M-BEIR --unit mscoco_task0 "woman running"
    """
    from elva_core.apps import answers
    from elva_core.data import mbeir
    from elva_core.export import faiss_index
    from elva_core.retrieval import pool as pools

    if index and pool_model:
        raise ValueError("--index holds embedded candidates; leave --pool-model out")
    if index:
        model, root = faiss_index.made_from(index, model, root, unit)
    elif not (model and root and unit):
        raise ValueError("search needs --model, --root and --unit, or --index")
    settings = config.load(profile)
    loaded, data = _loaded(model, settings), mbeir.Root(root) if root else None
    if index:
        pool = faiss_index.opened(index, loaded, data)
        template = template or pool.template  # an index is asked as it was read
    else:
        other = _pool_encoder(pool_model, loaded, settings) if pool_model else loaded
        read = other.template if pool_model else template or loaded.template
        pool = pools.of_unit(other, data, unit, batch=settings.evaluation.batch, template=read)
        template = template or loaded.template
    results = answers.search(loaded, pool, text, image, k=k, template=template)
    if template == "summary":
        print(f"summary: {results.summary!r}")
    for rank, score, did, words, picture, caption in results.table().fillna("").itertuples(index=False):
        print(f"{rank:3} {score:.3f} {did:10} {words} {picture} {caption}")
    if not no_pictures:
        lacking = "" if data else " without images; say where they are with --root ROOT"
        print(f"pictures: {results.save(Path.cwd())}{lacking}")


@app.command(rich_help_panel=USE)
def export(
    model: Model,
    to: Annotated[Path, Option(help="folder that is written")],
    root: Annotated[Path | None, Option(help="an M-BEIR folder: its instructions, or the pool's")] = None,
    unit: Annotated[str | None, Option(help="whose instruction is encode_query's, or whose pool")] = None,
    index: Annotated[bool, Option("--index", help="embeddings of a pool, instead of the model")] = False,
    pool: Annotated[Literal["local", "global"], Option(help="of --index")] = "local",
    template: Template = None,
    profile: SettingsFrom = "cpu",
) -> None:
    """Write a model for sentence-transformers, or with --index a pool's embeddings for FAISS and as parquet.

    Example: python -m elva_core export --model MODEL --to FOLDER
    """
    from elva_core.data import mbeir

    data = mbeir.Root(root) if root else None
    if not index:
        from elva_core.export import sentence_transformers

        asked = {"template": template, "root": data, "unit": unit}
        written = sentence_transformers.sentence_transformer(model, to, **asked)
        print(f"{model} is now {written}; see its README.md")
        return
    from elva_core.export import faiss_index
    from elva_core.retrieval import pool as pools

    if not (data and unit):
        raise ValueError("export --index needs --root and --unit, whose pool it embeds")
    settings = config.load(profile)
    loaded, batch = _loaded(model, settings), settings.evaluation.batch
    embedded = pools.of_unit(loaded, data, unit, batch=batch, template=template or loaded.template, pool=pool)
    written = faiss_index.write(loaded, embedded, to)
    print(f"{to}: {len(embedded.candidates)} candidates in {', '.join(written)}")
    if faiss_index.FAISS not in written:
        print(f"no {faiss_index.FAISS}: faiss is not installed; pip install faiss-cpu, then export again")


@app.command(rich_help_panel=USE)
def push(
    model: Model,
    to: Annotated[str, Option(help="a folder (existing, or starting with . / ~), else a hub name")],
    profile: Annotated[str | None, Option(help="whose training values the card shows")] = None,
    results: Annotated[Path | None, Option(help="of `evaluate`, or a claims.csv, for the card")] = None,
) -> None:
    """Put a trained model with its model card into a folder or on the hub.

    Example: python -m elva_core push --model MODEL --to ./published --profile cpu
    """
    from elva_core.export import hub

    settings = config.load(profile) if profile else None
    print(f"{model} is now {hub.push(model, to, profile=settings, results=results)}")


def _loaded(model: Path, settings: config.Settings):
    """A model folder, with the device, dtype and threads of a profile."""
    from elva_core import distributed
    from elva_core.models import encoder

    distributed.start(settings.threads)
    return encoder.load(model, dtype=settings.dtype, device=settings.device)


def _store(loaded, batch: int, template: str | None = None):
    """Embeddings of a model, kept on disk; it is read as its folder says, or as `template` does."""
    from elva_core.retrieval import cache

    return cache.Store(cache.EMBEDDINGS, loaded, batch=batch, template=template or loaded.template)


def _pool_encoder(folder: Path, queries, settings: config.Settings):
    """The model that embeds the candidates, where another one, `queries`, reads the queries.

    Raises:
        ValueError: its embeddings have another size than those of the model that reads the queries.
    """
    loaded = _loaded(folder, settings)
    sizes = [e.backbone.config.get_text_config().hidden_size for e in (queries, loaded)]
    if sizes[0] != sizes[1]:
        other = f"{queries.source} of {sizes[0]}"
        raise ValueError(f"{folder} has embeddings of size {sizes[1]}, {other}; take its teacher")
    return loaded


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of one command: 1 for what went wrong, in one line; 2 for a wrong one; 130 interrupted."""
    try:
        status = _status(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if status == 130:
        print("interrupted", file=sys.stderr)
    return status


def _status(arguments: Sequence[str] | None) -> int:
    try:
        app(args=arguments)
    except SystemExit as end:
        return end.code or 0
    except EXPECTED as error:
        if isinstance(error, BrokenPipeError):
            raise
        known = isinstance(error, OSError) and error.filename is not None
        print(f"error: {f'{error.filename}: {error.strerror}' if known else error}", file=sys.stderr)
    return 1
