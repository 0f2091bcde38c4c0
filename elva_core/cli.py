"""The command line: what each command is given and prints. Imports heavy modules only inside the command that needs them.

python -m elva_core run smoke
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from elva_core import config
from elva_core import files as artifacts
from elva_core.experiments import chain, stages


def lint(root: Path) -> int:
    """Prints every violation; the exit status is 1 if there is one."""
    from elva_core.data import lint as rules
    from elva_core.data import mbeir

    problems = rules.check(mbeir.Root(root))
    for problem in problems:
        print(problem)
    print(f"{root}: {len(problems)} problems")
    return int(bool(problems))


def _loaded(model: Path, profile: config.Settings):
    """A model folder, with the device, dtype and threads of a profile."""
    from elva_core import distributed
    from elva_core.models import encoder

    distributed.start(profile.threads)
    return encoder.load(model, dtype=profile.dtype, device=profile.device)


def evaluate(
    *,
    root: Path,
    units: Sequence[str],
    model: Path,
    pool: str,
    out: Path,
    profile_name: str,
    template: str | None,
    pool_model: Path | None,
) -> None:
    """Scores a trained model on units of any M-BEIR root; embeddings are kept, and what is done is not done again.

    Args:
        template: how the queries are read; None reads them as the model's folder says. pool_model: embeds the candidates,
            as its folder says; None is `model`, read like the queries.
    """
    from elva_core.data import mbeir
    from elva_core.evaluation import benchmark as evaluation

    profile, pools = config.load(profile_name), ("local", "global") if pool == "both" else (pool,)
    loaded = _loaded(model, profile)
    kept = profile.evaluation.model_copy(update={"on_disk": True})
    candidates = _kept_pool(pool_model, loaded, profile) if pool_model else None
    searcher = evaluation.searcher_of(
        loaded, mbeir.Root(root), "test", kept, template or loaded.template, candidates
    )
    known = searcher.root.units("test")
    if lost := sorted(set(units) - set(known)):
        raise ValueError(f"{root} has no test units {lost}; it has {known}")
    results = evaluation.score(searcher, units or known, pools, out, model=model.name)
    if results is None:
        return
    print(results.pivot(index="metric", columns=["unit", "pool"], values="value").round(4).to_string())
    print((out / "table.md").read_text())


def video(
    *,
    name: str,
    root: Path,
    model: Path,
    out: Path,
    frames: int | None,
    template: str | None,
    profile_name: str,
) -> None:
    """Scores a trained model on text to video; embeddings are kept, so that a killed run goes on."""
    from elva_core import distributed
    from elva_core import files as artifact_files
    from elva_core.data import video_sets
    from elva_core.evaluation import captions as unseen_scores
    from elva_core.evaluation import video as videos
    from elva_core.retrieval import cache

    profile, frames = config.load(profile_name), video_sets.FRAMES if frames is None else frames
    task = video_sets.SETS[name](root, frames)
    loaded = _loaded(model, profile)
    batch = max(1, profile.evaluation.batch // max(1, frames))  # a frame takes at most what an image takes
    kept = cache.Store(cache.EMBEDDINGS, loaded, batch=batch, template=template or loaded.template)
    hits = unseen_scores.score(task.name, [task], kept)[["set", "query", "metric", "value"]]
    results = videos.table(hits, profile.evaluation.bootstrap, 0).assign(model=model.name)
    if distributed.processes().is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        artifact_files.write_whole(out / f"{name}.csv", results.to_csv(index=False))
        print(results.round(4).to_string(index=False))


def unseen(
    *,
    sets: Path,
    names: Sequence[str],
    model: Path | None,
    out: Path | None,
    profile_name: str,
    template: str | None,
    encoding: str,
    lint_only: bool,
) -> int:
    """Lints a folder of unseen sets and, if it is clean, scores a trained model on them; the exit status is 1 if it is not."""
    from elva_core.evaluation import captions as unseen_scores

    if not lint_only and (model is None or out is None):
        raise ValueError("unseen needs --model and --out, or --lint")
    problems, notes = unseen_scores.check(sets, names, decode=lint_only)
    for line in [*(f"note: {note}" for note in notes), *problems]:
        print(line)
    print(f"{sets}: {len(problems)} problems, {len(notes)} notes")
    if problems or lint_only:
        return int(bool(problems))
    from elva_core.retrieval import cache

    profile = config.load(profile_name)
    loaded = _loaded(model, profile)
    kept = cache.Store(
        cache.EMBEDDINGS, loaded, batch=profile.evaluation.batch, template=template or loaded.template
    )
    results = unseen_scores.run(
        sets, names, kept, out, model=model.name, encoding=encoding, samples=profile.evaluation.bootstrap
    )
    if results is not None:
        print(results.round(4).to_string(index=False))
        print((out / "table2.md").read_text())
    return 0


def _kept_pool(folder: Path, asking, profile: config.Settings):
    """The kept embeddings of another model than the one that reads the queries; errors as `_pool_encoder` has them."""
    from elva_core.retrieval import cache

    loaded = _pool_encoder(folder, asking, profile)
    return cache.Store(cache.EMBEDDINGS, loaded, batch=profile.evaluation.batch, template=loaded.template)


def _pool_encoder(folder: Path, asking, profile: config.Settings):
    """The model that embeds the candidates.

    Raises:
        ValueError: its embeddings have another size than those of the model that reads the queries.
    """
    loaded = _loaded(folder, profile)
    sizes = [e.backbone.config.get_text_config().hidden_size for e in (asking, loaded)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{folder} has embeddings of size {sizes[1]}, {asking.source} of {sizes[0]}; take its teacher"
        )
    return loaded


def search(
    *,
    model: Path | None,
    root: Path | None,
    unit: str | None,
    text: str,
    image: Path | None,
    k: int,
    profile_name: str,
    template: str | None,
    pool_model: Path | None,
    built: Path | None,
    pictures: bool,
) -> None:
    """Prints the best candidates of a unit's pool, or of a built index, for a free query; a sheet of pictures goes where one stands.

    The pool of a unit is embedded once and kept. An index says which model and root it was made from; either may be given instead.

    Args:
        template, pool_model: as in `evaluate`; an index is asked as it was read. In one pass there is no summary to print.
    """
    from elva_core.apps import answers
    from elva_core.data import mbeir
    from elva_core.export import faiss_index
    from elva_core.retrieval import pool as pools

    if built is None and not (model and root and unit):
        raise ValueError("search needs --model, --root and --unit, or --index")
    if built is not None:
        written = faiss_index.manifest(built)
        if unit not in (None, written["unit"]):
            raise ValueError(
                f"{built} is an index of {written['unit']}, not of {unit}; leave --unit out, or export that unit's index"
            )
        places = written["made_from"]
        model, root = (
            given or faiss_index.place_of(built, places[name])
            for given, name in ((model, "model"), (root, "root"))
        )
        if model is None:
            raise ValueError(
                f"{built} was made by {places['model']}, which is not there; say where it is with --model DIR"
            )
    profile = config.load(profile_name)
    loaded = _loaded(model, profile)
    data = mbeir.Root(root) if root else None
    if built and pool_model:
        raise ValueError("--index holds embedded candidates; leave --pool-model out")
    other = _pool_encoder(pool_model, loaded, profile) if pool_model else loaded
    read = other.template if pool_model else template or loaded.template
    batch = profile.evaluation.batch
    pool = (
        faiss_index.opened(built, loaded, data)
        if built
        else pools.of_unit(other, data, unit, batch=batch, template=read)
    )
    asked = template or (pool.template if built else loaded.template)
    found = answers.search(loaded, pool, text, image, k=k, template=asked)
    if asked == "summary":
        print(f"summary: {found.summary!r}")
    for rank, score, did, words, picture, caption in found.table().fillna("").itertuples(index=False):
        print(f"{rank:3} {score:.3f} {did:10} {words} {picture} {caption}")
    if pictures:
        print(
            f"pictures: {found.save(Path.cwd())}"
            + ("" if data else " without images; say where they are with --root ROOT")
        )


def export(
    *,
    model: Path,
    to: Path,
    template: str | None,
    root: Path | None,
    unit: str | None,
    index_wanted: bool,
    pool: str,
    profile_name: str,
) -> None:
    """Writes a model for sentence-transformers, or the embeddings of a unit's pool as parquet and for FAISS."""
    from elva_core.data import mbeir

    data = mbeir.Root(root) if root else None
    if not index_wanted:
        from elva_core.export import sentence_transformers as exporting

        print(
            f"{model} is now {exporting.sentence_transformer(model, to, template=template, root=data, unit=unit)}; see its README.md"
        )
        return
    from elva_core.export import faiss_index
    from elva_core.retrieval import pool as pools

    if not (data and unit):
        raise ValueError("export --index needs --root and --unit, whose pool it embeds")
    profile = config.load(profile_name)
    loaded = _loaded(model, profile)
    embedded = pools.of_unit(
        loaded, data, unit, batch=profile.evaluation.batch, template=template or loaded.template, pool=pool
    )
    files = faiss_index.write(loaded, embedded, to)
    print(f"{to}: {len(embedded.candidates)} candidates in {', '.join(files)}")
    if faiss_index.FAISS not in files:
        print(f"no {faiss_index.FAISS}: faiss is not installed; pip install faiss-cpu, then export again")


def plan(profile_name: str, gpu: str | None, devices: int) -> None:
    """Prints what a profile costs on a named GPU; starts nothing, writes nothing."""
    from elva_core.experiments import plan as costs

    costs.show(config.load(profile_name), gpu=gpu, devices=devices, console=Console())


def push(model: Path, to: str, profile_name: str | None, results: Path | None) -> None:
    """Puts a trained model with its card into a folder or on the hub."""
    from elva_core.export import hub

    profile = config.load(profile_name) if profile_name else None
    print(f"{model} is now {hub.push(model, to, profile=profile, results=results)}")


def readme(profile_name: str) -> None:
    """Writes the tables of the committed run between the README's markers."""
    from elva_core.experiments import report

    folder = stages.stage_folder(profile_name, "90_report")
    blocks = {
        name: (folder / file).read_text(encoding="utf-8")
        for name, file in (("claims", "table.md"), ("stages", "stages.md"))
    }
    report.update_readme(artifacts.REPOSITORY / "README.md", blocks)


def _run(command: argparse.ArgumentParser) -> None:
    """Which run of the chain is meant."""
    command.add_argument("profile_name", metavar="PROFILE")
    command.add_argument("--seed", type=int, default=17)


def _profile(command: argparse.ArgumentParser, said: str = "where device and batch come from") -> None:
    command.add_argument(
        "--profile", dest="profile_name", metavar="PROFILE", default="cpu", help=said + "; default: cpu"
    )


def _template(command: argparse.ArgumentParser) -> None:
    said = "read at [RET] after a summary, or in one pass; default: as the model's elva.json says"
    command.add_argument("--template", choices=("summary", "eol"), help=said)


def _pool_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pool-model",
        type=Path,
        metavar="DIR",
        help="the model that embeds the candidates; default: --model",
    )


def parser() -> argparse.ArgumentParser:
    """What can be typed; `do` is the function that takes the rest as keywords and may return an exit status."""
    whole = argparse.ArgumentParser(prog="python -m elva_core", description="The ELVA workbook")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def command(do: Callable[..., int | None], said: str) -> argparse.ArgumentParser:
        added = commands.add_parser(do.__name__, help=said)
        added.set_defaults(do=do)
        return added

    p = command(chain.run, "run the chain of notebooks")
    _run(p)
    p.add_argument("--only", metavar="NN", help="only this stage")
    p.add_argument("--from", dest="start", metavar="NN", help="this stage and those after it")
    p.add_argument("--force", action="store_true", help="run stages that are up to date, too")

    _run(command(chain.status, "which stages are done and current"))

    said = "train and measure the arms of params/arms.yaml that have no result yet, on the data and backbone of the chain"
    _run(command(chain.study, said))

    p = command(chain.train, "train one stage, also under accelerate launch")
    p.add_argument("stage", choices=("stage1", "stage2", "stage3", "control", "distil", "rerank"))
    _run(p)

    p = command(plan, "what a profile costs before it is started: sequences, FLOPs, hours, memory, disk")
    p.add_argument("profile_name", metavar="PROFILE")
    p.add_argument(
        "--gpu",
        help="a name of params/plan.yaml, for instance H100, A100, H20, L40S; default by the profile's device",
    )
    p.add_argument("--devices", type=int, default=1)

    p = command(lint, "check an M-BEIR folder")
    p.add_argument("root", type=Path)

    p = command(evaluate, "score a trained model on units of an M-BEIR folder")
    p.add_argument("--root", type=Path, required=True)
    p.add_argument("--unit", nargs="*", default=[], dest="units")
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--pool", choices=("local", "global", "both"), default="local")
    _template(p)
    _pool_model(p)
    p.add_argument("--out", type=Path, required=True)
    _profile(p, "where device, batch and cut-offs come from")

    p = command(video, "score a trained model on text to video: MSR-VTT or MSVD")
    p.add_argument("--set", dest="name", choices=("msrvtt", "msvd"), required=True)
    p.add_argument(
        "--root",
        type=Path,
        required=True,
        help="folder with the annotations and videos/; layouts: elva_core/video_sets.py",
    )
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--frames", type=int, help="looked at in each video; default as LamRA on MSVD")
    _template(p)
    _profile(p)

    p = command(unseen, "check the unseen sets of the paper's Table 2 and score a trained model on them")
    p.add_argument(
        "--sets",
        type=Path,
        required=True,
        help="the folder that holds sharegpt4v, Urban1k, flickr, CIRCO, ...",
    )
    p.add_argument(
        "--set",
        nargs="*",
        default=[],
        dest="names",
        metavar="NAME",
        help="only these; default: all whose folder is there",
    )
    p.add_argument("--lint", action="store_true", dest="lint_only", help="only check, and decode every image")
    p.add_argument("--model", type=Path)
    p.add_argument(
        "--encoding",
        choices=("by direction", "once"),
        default="by direction",
        help="once: LamRA's way of the captioned sets",
    )
    p.add_argument("--out", type=Path)
    _template(p)
    _profile(p)

    p = command(search, "search a unit's pool, or a built index, with a text, an image, or both")
    p.add_argument("--model", type=Path)
    p.add_argument("--root", type=Path)
    p.add_argument("--unit")
    p.add_argument(
        "--index",
        type=Path,
        dest="built",
        help="what `export --index` wrote, instead of --model, --root and --unit",
    )
    p.add_argument("text", nargs="?", default="")
    p.add_argument("--image", type=Path)
    p.add_argument("--k", type=int, default=10)
    _template(p)
    _pool_model(p)
    p.add_argument(
        "--no-pictures", action="store_false", dest="pictures", help="write no contact sheet into this folder"
    )
    _profile(p)

    p = command(
        export,
        "write a model for sentence-transformers, or with --index a pool's embeddings for FAISS and as parquet",
    )
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    p.add_argument(
        "--root",
        type=Path,
        help="an M-BEIR folder: its instructions become prompts; with --index, where the pool is",
    )
    p.add_argument(
        "--unit", help="whose instruction encode_query takes; with --index, whose pool is embedded"
    )
    p.add_argument(
        "--index",
        action="store_true",
        dest="index_wanted",
        help="the embeddings of a pool, instead of the model",
    )
    p.add_argument("--pool", choices=("local", "global"), default="local")
    _template(p)
    _profile(p)

    p = command(push, "put a trained model with its model card into a folder or on the hub")
    p.add_argument("--model", type=Path, required=True)
    p.add_argument(
        "--to",
        required=True,
        metavar="REPO_OR_FOLDER",
        help="a folder (existing, or starting with . / ~), else a hub name",
    )
    p.add_argument(
        "--profile", dest="profile_name", metavar="PROFILE", help="whose training values the card shows"
    )
    p.add_argument(
        "--results", type=Path, help="results.csv of `evaluate` or claims.csv of a report, for the card"
    )

    p = command(readme, "refresh the tables of README.md")
    p.add_argument("profile_name", metavar="PROFILE", nargs="?", default="cpu")
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Does one command; what went wrong is one line, and the exit status is 1."""
    given = vars(parser().parse_args(arguments))
    do = given.pop("do")
    try:
        return do(**given) or 0
    except (
        chain.ChainError,
        config.ProfileError,
        stages.MissingStageError,
        FileNotFoundError,
        ValueError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
