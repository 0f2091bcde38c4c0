"""Commands of the workbook (run, status, study, readme, book, clean) and of training (train, teach, plan)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from typer import Argument, Option

from elva_core import config, files
from elva_core.cli.options import TRAINING, WORKBOOK, Profile, Seed, app
from elva_core.experiments import chain, keys


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
    """Say which stages are done and current, and which value has changed since where they are not.

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
def readme(profile: Profile = "cpu", seed: Seed = 17) -> None:
    """Refresh a profile's report from its tables, README.md from both and outputs/gpu, the model that ships.

    Example: python -m elva_core readme cpu
    """
    from elva_core.apps import reference
    from elva_core.experiments import measured, report, sizes

    folder = report.renew(profile, seed)
    blocks = {name: (folder / f"{name}.md").read_text(encoding="utf-8") for name in report.BLOCKS}
    blocks["gpu"] = measured.readme_block(sizes.known())
    report.update_readme(files.REPOSITORY / "README.md", blocks)
    if (profile, seed) == (reference.PROFILE, reference.SEED):
        print(reference.ship())


@app.command(rich_help_panel=WORKBOOK)
def book(
    profile: Profile = "cpu",
    seed: Seed = 17,
    to: Annotated[Path | None, Option(help="folder that is written anew; default: book/ of the run")] = None,
) -> None:
    """Make a static site of a run's executed notebooks and report, to be read without a server.

    Example: python -m elva_core book cpu
    """
    from elva_core.experiments import book as site

    print(site.build(profile, seed, to or keys.seed_folder(profile, seed) / "book"))


@app.command(rich_help_panel=WORKBOOK)
def clean(
    profile: Profile, yes: Annotated[bool, Option("--yes", help="remove without asking")] = False
) -> None:
    """List what was trained with other values of a profile, and remove it after a yes.

    Example: python -m elva_core clean cpu
    """
    chain.clean(profile, lambda question: yes or typer.confirm(question))


@app.command(rich_help_panel=TRAINING)
def train(
    stage: Annotated[keys.Training, Argument(metavar="STAGE", help=" ".join(get_args(keys.Training)))],
    profile: Profile,
    seed: Seed = 17,
) -> None:
    """Train one stage, also under accelerate launch; its notebook finds it done.

    Example: accelerate launch --config_file params/accelerate/fsdp2.yaml -m elva_core train stage2 qwen2vl-2b
    """
    chain.train(stage, profile, seed)


@app.command(rich_help_panel=TRAINING)
def teach(
    name: Annotated[str, Argument(metavar="NAME", help="a file of params/backbone")],
    out: Annotated[Path, Option(help="folder of the model; must not be there yet")],
    packages: Annotated[
        Path | None, Option("--styles", help="node_modules with the styles' packages")
    ] = None,
    device: Annotated[str, Option(help="cpu, cuda")] = "cpu",
) -> None:
    """Make a small backbone that reads drawings, as those of outputs/backbone; goes on where it was stopped.

    Example: python -m elva_core teach qwen2vl --out outputs/cache/qwen2vl --styles node_modules --device cuda
    """
    from elva_core import distributed
    from elva_core.export import backbone_card
    from elva_core.training import teach as teaching

    settings = config.teaching(name)
    distributed.start(config.load(settings.profile).threads)
    for folder in teaching.make(settings, out, files.OUTPUTS / "cache", packages=packages, device=device):
        backbone_card.write(folder)


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
