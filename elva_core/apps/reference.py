"""The stage 3 model of the committed reference run, which ships, and the pools that it is asked for.

model, pool = reference.opened()
answers.search(model, pool, "woman running")
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from elva_core import config, distributed, files
from elva_core.data import mbeir, sources
from elva_core.experiments.keys import seed_folder, stage_folder
from elva_core.experiments.stages import refuse_missing
from elva_core.export import hub
from elva_core.models import encoder
from elva_core.models.encoder import Encoder
from elva_core.retrieval import pool as pools
from elva_core.retrieval.pool import Pool
from elva_core.values import model_source

PROFILE, SEED = "cpu", 17
# what a text, an image and both are asked of: units whose candidates are images
UNITS = {(True, False): "emoji_task0", (False, True): "emoji_task4", (True, True): "emoji_task7"}


def folder() -> Path:
    """Folder of the model that ships."""
    return seed_folder(PROFILE, SEED) / "model"


def root() -> mbeir.Root:
    """The data of the reference run: the run's own, else written on the first call, in half a minute."""
    prepared = stage_folder(PROFILE, SEED, "10_prepare_data")
    if not (prepared / "manifest.json").is_file():
        prepared = files.OUTPUTS / "cache" / f"data-{PROFILE}-{SEED}"
        if not prepared.is_dir():
            distributed.log.warning("writing the drawings into %s, once", prepared)
            with hub.whole_folder(prepared, "nli.csv") as partial:
                sources.write(config.load(PROFILE).data, partial, seed=SEED)
    return sources.locate(prepared)[0]


def opened(unit: str = UNITS[True, False]) -> tuple[Encoder, Pool]:
    """The model, and the test pool of a unit with its embeddings, which are computed on the first call."""
    settings = config.load(PROFILE)
    distributed.start(settings.threads)
    model = encoder.load(folder(), dtype=settings.dtype, device=settings.device)
    batch, template = settings.evaluation.batch, model.template
    return model, pools.of_unit(model, root(), unit, batch=batch, template=template)


def ship() -> Path:
    """Puts the run's stage 3 model where it is committed: float16, its card with that of its backbone.

    Raises:
        MissingStageError: the run has no such model, or no report.
    """
    settings = config.load(PROFILE)
    trained, report = (stage_folder(PROFILE, SEED, name) for name in ("40_finetune_rlvr", "90_report"))
    refuse_missing((trained / "model/elva.json", report / "claims.csv"), PROFILE, SEED)
    with hub.staged_copy(trained / "model") as staged, hub.whole_folder(folder(), "elva.json") as partial:
        for path in staged.glob("*.safetensors"):
            halves = {
                name: tensor.half() if tensor.dtype == torch.float32 else tensor
                for name, tensor in load_file(path).items()
            }
            save_file(halves, path, metadata={"format": "pt"})
        card = hub.card(staged, "outputs/cpu/seed-17/model", profile=settings, results=report / "claims.csv")
        backbone = Path(model_source(settings.backbone.path), "README.md").read_text(encoding="utf-8")
        heading, _, told = backbone.partition("\n")
        text = f"{card.rstrip()}\n\n## Its backbone: {heading.removeprefix('# ')}\n{told}"
        (staged / "README.md").write_text(text, encoding="utf-8")
        hub.refuse_local_paths(staged)
        shutil.copytree(staged, partial)
    return folder()
