"""One stage of training, from a model folder to a model folder, on as many processes as there are.

    launch(run, job("stage2", stage, start))     # a notebook: one process per GPU, or this one
    run(following("stage2", stage))              # inside the processes that `accelerate launch` has started

What a job has finished is never done again, so a notebook finds what `python -m elva_core train` has trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState, notebook_launcher

from elva_core import distributed, files, sharding
from elva_core.config import ProfileError, Settings
from elva_core.data import mbeir, nli, sources
from elva_core.experiments import stages
from elva_core.models import encoder
from elva_core.training import contrastive, distillation, grpo, hard_negatives, reranker, teach

Name = Literal["stage1", "stage2", "stage3", "control", "distil", "rerank"]
# stage of training -> the notebook that holds it
NOTEBOOKS = {
    "stage1": "30_pretrain_contrastive",
    "stage2": "30_pretrain_contrastive",
    "stage3": "40_finetune_rlvr",
    "control": "40_finetune_rlvr",
    "distil": "85_trade_cost",
    "rerank": "85_trade_cost",
}


@dataclass(frozen=True)
class Job:
    """What one stage needs.

    start: folder or hub name of the model it begins with. folder: checkpoints and metrics.jsonl, and in the end model/.
    mined: file of the negatives of stage 3, its control or the reranker, written by whichever of them in the folder comes first.
    """

    name: Name
    settings: Settings
    seed: int
    root: mbeir.Root
    triplets: Path
    start: str
    folder: Path
    mined: Path

    @property
    def model(self) -> Path:
        """Where the trained model will be."""
        return self.folder / "model"


def job(name: Name, stage: stages.Stage, start: str | Path) -> Job:
    """The job of one of the chain's notebooks."""
    root, triplets = sources.locate(stage.require("10_prepare_data"))
    work = stage.folder / "work"
    return Job(
        name,
        stage.settings,
        stage.seed,
        root,
        triplets,
        str(start),
        work / name,
        work / "negatives.safetensors",
    )


def following(name: Name, stage: stages.Stage) -> Job:
    """The job of a stage that begins where the chain's earlier ones ended.

    Raises:
        MissingStageError: they have not been trained; the message has the command.
        ProfileError: the profile has no values for it.
    """
    if NOTEBOOKS[name] != stage.name:
        raise ValueError(f"{name} belongs to {NOTEBOOKS[name]}, not to {stage.name}")
    if name == "stage1":
        root, _ = sources.locate(stage.require("10_prepare_data"))
        return job(
            name,
            stage,
            teach.ensure(stage.settings.backbone, stage.settings.encoder, root, files.OUTPUTS / "cache"),
        )
    if name in ("distil", "rerank"):
        if (own := getattr(stage.settings, name)) is None:
            raise ProfileError(
                f"params/{stage.settings.profile}.yaml has no section {name}; copy the one of params/cpu.yaml"
            )
        begun = job(name, stage, stage.require("40_finetune_rlvr") / "model")
        if name == "distil":
            return begun
        mining = {
            "stage3": {"queries": own.queries, "negatives": {"pool": own.pool}}
        }  # of its own, with stage 3's rules
        return replace(begun, settings=stage.settings.changed(mining))
    if name != "stage2":
        return job(name, stage, stage.require("30_pretrain_contrastive") / "model")
    before = job("stage1", stage, "")
    if not finished(before):
        command = f"python -m elva_core train stage1 {stage.settings.profile} --seed {stage.seed}"
        raise stages.MissingStageError(f"{before.model} is missing; run: {command}")
    return job(name, stage, before.model)


def launch(work: Callable[[Job], None], wanted: Job) -> None:
    """Does `work` (`run` or `mine`) in one process per GPU, or in this one where there is one GPU or none.

    With several GPUs this process must not have used one before: accelerate forks it.
    """
    if (count := devices(wanted.settings)) > 1:
        notebook_launcher(_forked, (work, wanted), num_processes=count)
    else:
        work(wanted)


def devices(settings: Settings) -> int:
    """GPUs that the profile may use; asking does not touch them."""
    return torch.cuda.device_count() if settings.device == "cuda" else 1


def _forked(work: Callable[[Job], None], wanted: Job) -> None:
    PartialState._reset_state()  # what the notebook's process knew of itself
    work(wanted)


def finished(wanted: Job) -> bool:
    return (wanted.model / "elva.json").is_file()


def history(wanted: Job) -> list[dict[str, float]]:
    """The log lines of a finished job, one per step."""
    return [json.loads(line) for line in (wanted.folder / "metrics.jsonl").read_text().splitlines()]


def run(wanted: Job) -> None:
    """Trains one stage in this process, which may be one of several; resumes from the last checkpoint."""
    if finished(wanted):
        return
    settings, seed, folder = wanted.settings, wanted.seed, wanted.folder
    distributed.start(settings.threads)
    distributed.processes()  # each takes its own device before anything is loaded
    if wanted.name in ("stage3", "control", "rerank"):
        mine(wanted)
    model = _loaded(wanted)
    if wanted.name == "stage1":
        contrastive.train(
            model,
            contrastive.triplet_pairs(nli.read(wanted.triplets), seed),
            settings.stage1,
            seed=seed,
            folder=folder,
        )
    elif wanted.name == "stage2":
        contrastive.train(model, _stage2_pairs(wanted), settings.stage2, seed=seed, folder=folder)
    elif wanted.name == "distil":
        drawn = distillation.sample(_stage2_pairs(wanted), settings.distil.pairs, settings.stage2.batch)
        targets = distillation.taught(
            model, drawn, batch=settings.evaluation.batch, path=folder / "teacher.safetensors"
        )
        distillation.train(model, drawn, targets, settings.distil, seed=seed, folder=folder)
    else:
        ranked = hard_negatives.read(wanted.mined, wanted.root, seed)
        if wanted.name == "control":
            contrastive.train(
                model, contrastive.ranked_pairs(ranked, seed), settings.control, seed=seed, folder=folder
            )
        elif wanted.name == "rerank":
            reranker.train(model, ranked, settings.rerank, seed=seed, folder=folder)
        else:
            grpo.train(
                model,
                ranked,
                settings.stage3,
                seed=seed,
                folder=folder,
                mine=lambda: _mined_by(model, wanted),
            )
    weights = sharding.full_state_dict(model.model)
    if distributed.processes().is_main_process:
        partial = folder / "model.partial"
        template = "eol" if wanted.name in ("stage1", "distil") else "summary"
        model.save(partial, stage=wanted.name, parent=wanted.start, weights=weights, template=template)
        partial.rename(wanted.model)
    distributed.processes().wait_for_everyone()


def _stage2_pairs(wanted: Job) -> contrastive.Draw:
    return contrastive.union_pairs(
        wanted.root, wanted.settings.stage2, wanted.seed, wanted.settings.data.exclude_units
    )


def mine(wanted: Job) -> None:
    """Writes the file of the negatives that the model of `wanted.start` chooses, unless it is there."""
    if wanted.mined.is_file():
        return
    found = _select(_loaded(wanted), wanted)
    if distributed.processes().is_main_process:
        hard_negatives.write(found, wanted.mined)
    distributed.processes().wait_for_everyone()


def _mined_by(model: encoder.Encoder, wanted: Job) -> list[hard_negatives.Ranked]:
    """The queries of stage 3 with the negatives that the model of this moment chooses."""
    return hard_negatives.assemble(_select(model, wanted), wanted.root, wanted.seed)


def _select(model: encoder.Encoder, wanted: Job) -> hard_negatives.Mined:
    settings = wanted.settings
    size, excluded = settings.evaluation.batch, settings.data.exclude_units
    return hard_negatives.select(
        model, wanted.root, settings.stage3, batch=size, seed=wanted.seed, excluded=excluded
    )


def _loaded(wanted: Job) -> encoder.Encoder:
    settings = wanted.settings
    return encoder.load(wanted.start, settings.encoder, dtype=settings.dtype, device=settings.device)
