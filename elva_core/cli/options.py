"""The command line itself, the arguments that several commands share, and how they open a model.

Heavy modules are imported only inside the command that needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option
from typer.core import TyperCommand

from elva_core import config

app = typer.Typer(
    help="The ELVA workbook: its notebooks, training, evaluation and use of what was trained.",
    epilog="Installed as `elva`, too; `elva --install-completion` completes commands, flags and profiles.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
WORKBOOK, TRAINING, EVALUATION = "Workbook", "Training", "Data and evaluation"
USE = "Use and sharing of a trained model"
PROFILES = sorted({path.stem for path in config.PARAMS.glob("*.yaml")} - {*config.NO_PROFILES})

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


class ManyValues(TyperCommand):
    """A command whose repeatable options take several values after one flag: `--unit a b`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        repeatable = {flag for p in self.params if getattr(p, "multiple", False) for flag in p.opts}
        words, flag = [], None
        for word in args:
            if word.startswith("-"):
                flag = word if word in repeatable else None
            if flag is None:
                words.append(word)
            elif word != flag:
                words += [flag, word]
        return super().parse_args(ctx, words)


def open_model(model: Path, settings: config.Settings):
    """A model folder, with the device, dtype and threads of a profile."""
    from elva_core import distributed
    from elva_core.models import encoder

    distributed.start(settings.threads)
    return encoder.load(model, dtype=settings.dtype, device=settings.device)


def store(loaded, batch: int, template: str | None = None):
    """Embeddings of a model, kept on disk; it is read as its folder says, or as `template` does."""
    from elva_core.retrieval import cache

    return cache.Store(cache.EMBEDDINGS, loaded, batch=batch, template=template or loaded.template)


def pool_encoder(folder: Path, queries, settings: config.Settings):
    """The model that embeds the candidates, where another one, `queries`, reads the queries.

    Raises:
        ValueError: its embeddings have another size than those of the model that reads the queries.
    """
    loaded = open_model(folder, settings)
    sizes = [e.backbone.config.get_text_config().hidden_size for e in (queries, loaded)]
    if sizes[0] != sizes[1]:
        other = f"{queries.source} of {sizes[0]}"
        raise ValueError(f"{folder} has embeddings of size {sizes[1]}, {other}; take its teacher")
    return loaded
