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

import torch
from accelerate import PartialState, notebook_launcher

from elva_core import distributed, sharding
from elva_core.config import ProfileError, Settings
from elva_core.data import mbeir, sources
from elva_core.experiments import stages
from elva_core.experiments.keys import Training
from elva_core.models import encoder
from elva_core.models.lineage import lineage
from elva_core.training import contrastive, distillation, grpo, hard_negatives, reranker
from elva_core.values import model_source

PREPARED, CONTRASTIVE, RLVR, COST = (stages.numbered(number) for number in ("10", "30", "40", "85"))
# stage of training -> the notebook that holds it
NOTEBOOKS: dict[Training, str] = {
    "stage1": CONTRASTIVE,
    "stage2": CONTRASTIVE,
    "stage3": RLVR,
    "control": RLVR,
    "distil": COST,
    "rerank": COST,
}


@dataclass(frozen=True)
class Job:
    """Inputs of one stage of training.

    start: folder or hub name of the model it begins with.
    folder: checkpoints and metrics.jsonl, and in the end model/.
    mined: file of the negatives of stage 3, its control or the reranker; whichever comes first in the folder
        writes it.
    """

    name: Training
    settings: Settings
    seed: int
    root: mbeir.Root
    triplets: Path
    start: str
    folder: Path
    mined: Path

    @property
    def model(self) -> Path:
        """Folder of the trained model, once there is one."""
        return self.folder / "model"


def job(name: Training, stage: stages.Stage, start: str | Path) -> Job:
    """The job of one of the chain's notebooks."""
    root, triplets = sources.locate(stage.require(PREPARED))
    work = stage.folder / "work"
    mined = work / "negatives.safetensors"
    return Job(name, stage.settings, stage.seed, root, triplets, str(start), work / name, mined)


def following(name: Training, stage: stages.Stage) -> Job:
    """The job of a stage that begins where the chain's earlier ones ended.

    Raises:
        MissingStageError: they have not been trained; the message has the command.
        ProfileError: the profile has no values for it.
    """
    if name == "stage1":
        return job(name, stage, model_source(stage.settings.backbone.path))
    if name in ("distil", "rerank"):
        profile = f"params/{stage.settings.profile}.yaml"
        if (section := getattr(stage.settings, name)) is None:
            raise ProfileError(f"{profile} has no section {name}; copy the one of params/cpu.yaml")
        following_rlvr = job(name, stage, stage.require(RLVR) / "model")
        if name == "distil":
            return following_rlvr
        # the reranker mines by stage 3's rules, with values of its own
        mining = {"stage3": {"queries": section.queries, "negatives": {"pool": section.pool}}}
        return replace(following_rlvr, settings=stage.settings.changed(mining))
    if name != "stage2":
        return job(name, stage, stage.require(CONTRASTIVE) / "model")
    before = job("stage1", stage, "")
    if not finished(before):
        command = f"python -m elva_core train stage1 {stage.settings.profile} --seed {stage.seed}"
        raise stages.MissingStageError(f"{before.model} is missing; run: {command}")
    return job(name, stage, before.model)


def backbone_hash(backbone: str | Path) -> str:
    """sha256 of the weights of a model folder, or of the copy that this machine has of a model of the hub.

    Raises:
        ValueError: there are no weights to hash.
    """
    weights = lineage(backbone)[-1:]
    if not weights or "sha256" not in weights[0]:
        raise ValueError(
            f"{backbone} has no weights on this machine; give a model folder, or download it first"
        )
    return weights[0]["sha256"]


def record_backbone(stage: stages.Stage, backbone: str | Path) -> None:
    """Writes backbone.txt, the model that a contrastive stage started from, and its hash for the manifest."""
    (stage.folder / "backbone.txt").write_text(f"{backbone}\n", encoding="utf-8")
    stage.record["backbone_sha256"] = backbone_hash(backbone)


def launch(work: Callable[[Job], None], spec: Job) -> None:
    """Does `work` (`run` or `mine`) in one process per GPU, or in this one where there is one GPU or none.

    With several GPUs this process must not have used one before: accelerate forks it.
    """
    if (count := devices(spec.settings)) > 1:
        notebook_launcher(_forked, (work, spec), num_processes=count)
    else:
        work(spec)


def devices(settings: Settings) -> int:
    """GPUs that the profile may use; asking does not touch them."""
    return torch.cuda.device_count() if settings.device == "cuda" else 1


def _forked(work: Callable[[Job], None], spec: Job) -> None:
    PartialState._reset_state()  # what the notebook's process knew of itself
    work(spec)


def finished(spec: Job) -> bool:
    return (spec.model / "elva.json").is_file()


def history(spec: Job) -> list[dict[str, float]]:
    """The log lines of a finished job, one per step."""
    return [json.loads(line) for line in (spec.folder / "metrics.jsonl").read_text().splitlines()]


def run(spec: Job) -> None:
    """Trains one stage in this process, which may be one of several; resumes from the last checkpoint."""
    if finished(spec):
        return
    settings, seed, folder = spec.settings, spec.seed, spec.folder
    distributed.start(settings.threads)
    distributed.processes()  # each takes its own device before anything is loaded
    if spec.name in ("stage3", "control", "rerank"):
        mine(spec)
    model = _loaded(spec)
    if spec.name == "stage1":
        pairs = contrastive.triplet_pairs(sources.read_nli(spec.triplets), seed)
        contrastive.train(model, pairs, settings.stage1, seed=seed, folder=folder)
    elif spec.name == "stage2":
        contrastive.train(model, _stage2_pairs(spec), settings.stage2, seed=seed, folder=folder)
    elif spec.name == "distil":
        drawn = distillation.sample(_stage2_pairs(spec), settings.distil.pairs, settings.stage2.batch)
        batch, path = settings.evaluation.batch, folder / "teacher.safetensors"
        targets = distillation.taught(model, drawn, batch=batch, path=path)
        distillation.train(model, drawn, targets, settings.distil, seed=seed, folder=folder)
    else:
        ranked = hard_negatives.read(spec.mined, spec.root, seed)
        if spec.name == "control":
            pairs = contrastive.ranked_pairs(ranked, seed, settings.control)
            contrastive.train(model, pairs, settings.control, seed=seed, folder=folder)
        elif spec.name == "rerank":
            reranker.train(model, ranked, settings.rerank, seed=seed, folder=folder)
        else:

            def mine_again() -> list[hard_negatives.TrainingQuery]:
                """The queries with the negatives that the model of this moment chooses."""
                return hard_negatives.assemble(_select(model, spec), spec.root, seed)

            grpo.train(model, ranked, settings.stage3, seed=seed, folder=folder, mine=mine_again)
    weights = sharding.full_state_dict(model.model)
    if distributed.processes().is_main_process:
        unfinished = folder / "model.partial"
        template = "eol" if spec.name in ("stage1", "distil") else "summary"
        how = {"weights": weights, "template": template, "dims": _dims(spec)}
        model.save(unfinished, stage=spec.name, parent=spec.start, **how)
        unfinished.rename(spec.model)
    distributed.processes().wait_for_everyone()


def _stage2_pairs(spec: Job) -> contrastive.Draw:
    settings = spec.settings
    return contrastive.union_pairs(spec.root, settings.stage2, spec.seed, settings.data.exclude_units)


def mine(spec: Job) -> None:
    """Writes the file of the negatives that the model of `spec.start` chooses, unless it is there."""
    if spec.mined.is_file():
        return
    mined = _select(_loaded(spec), spec)
    if distributed.processes().is_main_process:
        hard_negatives.write(mined, spec.mined)
    distributed.processes().wait_for_everyone()


def _select(model: encoder.Encoder, spec: Job) -> hard_negatives.Mined:
    rules, batch = spec.settings.stage3, spec.settings.evaluation.batch
    excluded = spec.settings.data.exclude_units
    return hard_negatives.select(model, spec.root, rules, batch=batch, seed=spec.seed, excluded=excluded)


def _loaded(spec: Job) -> encoder.Encoder:
    """The model that training starts from. Raises ValueError where `dims` exceed its embeddings."""
    settings, dims = spec.settings, _dims(spec)
    loaded = encoder.load(spec.start, settings.encoder, dtype=settings.dtype, device=settings.device)
    if max(dims, default=0) > (size := loaded.backbone.config.get_text_config().hidden_size):
        raise ValueError(f"{spec.name}.dims = {list(dims)}, but embeddings have {size} numbers; lower them")
    return loaded


def _dims(spec: Job) -> tuple[int, ...]:
    return getattr(getattr(spec.settings, spec.name), "dims", ())  # the reranker has none
