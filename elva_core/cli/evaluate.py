"""Commands that check data and score a trained model: lint, evaluate, video, unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from elva_core import config, files
from elva_core.cli.options import (
    EVALUATION,
    ManyValues,
    Model,
    OptionalModel,
    Out,
    PoolModel,
    SettingsFrom,
    Template,
    app,
    open_model,
    pool_encoder,
    store,
)

FROM_CARD = "default: those that it was trained at (dims of its elva.json)"


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
    dim: Annotated[list[int] | None, Option(min=1, help=f"prefixes to score as well; {FROM_CARD}")] = None,
    profile: SettingsFrom = "cpu",
) -> None:
    """Score a trained model on units of an M-BEIR folder; what a killed run has done is not done again.

    Example: python -m elva_core evaluate --root data/M-BEIR --unit mscoco_task0 --model MODEL --out results
    """
    from elva_core.data import mbeir
    from elva_core.evaluation import benchmark

    settings, pools = config.load(profile), ("local", "global") if pool == "both" else (pool,)
    loaded = open_model(model, settings)
    other = pool_model and pool_encoder(pool_model, loaded, settings)
    embed_pool = other and store(other, settings.evaluation.batch)
    dims = dim or json.loads((model / "elva.json").read_text(encoding="utf-8")).get("dims", ())
    if max(dims, default=0) > (size := loaded.backbone.config.get_text_config().hidden_size):
        raise ValueError(f"embeddings have {size} numbers, fewer than --dim {max(dims)}; name a smaller one")
    on_disk = settings.evaluation.model_copy(update={"on_disk": True})
    data, template = mbeir.Root(root), template or loaded.template
    searcher = benchmark.searcher_of(loaded, data, "test", on_disk, template, embed_pool)
    known = data.units("test")
    if lost := sorted(set(unit or ()) - set(known)):
        raise ValueError(f"{root} has no test units {lost}; it has {known}")
    results = benchmark.score(searcher, unit or known, pools, out, model=model.resolve().name, dims=dims)
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
    embed = store(open_model(model, settings), batch, template)
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
    embed = store(open_model(model, settings), settings.evaluation.batch, template)
    said = {"model": model.resolve().name, "encoding": encoding, "samples": settings.evaluation.bootstrap}
    results = captions.run(sets, names or (), embed, out, **said)
    if results is not None:
        print(results.round(4).to_string(index=False))
        print((out / "table2.md").read_text())
