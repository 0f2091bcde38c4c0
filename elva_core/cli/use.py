"""Commands that use and share a trained model: search, export, push."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from elva_core import config
from elva_core.cli.options import (
    USE,
    Model,
    OptionalModel,
    PoolModel,
    SettingsFrom,
    Template,
    app,
    open_model,
    pool_encoder,
)


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

    Without any of them the model that ships is asked for drawings of emoji. The pool of a unit is embedded
    once and kept. An index says which model and root it was made from; either may be given instead.

    Example: python -m elva_core search --model MODEL --root data/M-BEIR --unit mscoco_task0 "woman running"
    """
    from elva_core.apps import answers, reference
    from elva_core.data import mbeir
    from elva_core.export import faiss_index
    from elva_core.retrieval import pool as pools

    if index and pool_model:
        raise ValueError("--index holds embedded candidates; leave --pool-model out")
    if index:
        model, root = faiss_index.made_from(index, model, root, unit)
    elif not (model or root or unit):
        model, root = reference.folder(), reference.root().folder
        unit = reference.UNITS.get((bool(text), bool(image)), "")
    elif not (model and root and unit):
        raise ValueError("search needs --model, --root and --unit, or --index, or none of them")
    settings = config.load(profile)
    loaded, data = open_model(model, settings), mbeir.Root(root) if root else None
    if index:
        pool = faiss_index.opened(index, loaded, data)
        template = template or pool.template  # an index is asked as it was read
    else:
        other = pool_encoder(pool_model, loaded, settings) if pool_model else loaded
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
    precision: Annotated[Literal["float32", "int8", "binary"], Option(help="of --index")] = "float32",
    truncate_dim: Annotated[int | None, Option(min=1, help="numbers of an embedding; default: all")] = None,
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

        asked = {"template": template, "root": data, "unit": unit, "truncate_dim": truncate_dim}
        written = sentence_transformers.sentence_transformer(model, to, **asked)
        print(f"{model} is now {written}; see its README.md")
        return
    from elva_core.evaluation import benchmark
    from elva_core.export import faiss_index
    from elva_core.export.sentence_transformers import check_dim
    from elva_core.retrieval import pool as pools
    from elva_core.retrieval import search

    if not (data and unit):
        raise ValueError("export --index needs --root and --unit, whose pool it embeds")
    settings = config.load(profile)
    check_dim(model, truncate_dim)
    loaded, batch = open_model(model, settings), settings.evaluation.batch
    template, judged = template or loaded.template, None
    embedded = pools.of_unit(loaded, data, unit, batch=batch, template=template, pool=pool)
    if truncate_dim:
        embedded = replace(embedded, vectors=search.Prefixes(embedded.vectors, truncate_dim))
    if precision != "float32" and data.qrels_path(unit, "test").is_file():
        on_disk = settings.evaluation.model_copy(update={"on_disk": True})
        judged = benchmark.searcher_of(loaded, data, "test", on_disk, template).embedded(unit, pool=pool)
    written = faiss_index.write(loaded, embedded, to, precision=precision, judged=judged)
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
