"""Keys of stages: the values that a result depends on, its inputs, its method, and their hash.

made = made_from(config.load("cpu"), 17, "30_pretrain_contrastive")
if key(made) != manifest("cpu", 17, "30_pretrain_contrastive")["key"]:
    differences(done["made_from"], made)  # ["stage2.steps 600 -> 300"]
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, NamedTuple

from elva_core import files
from elva_core.config import Settings
from elva_core.experiments.arms import arms
from elva_core.values import model_source

Training = Literal["stage1", "stage2", "stage3", "control", "distil", "rerank"]  # what is trained alone
ALL = " ".join(name for name in Settings.model_fields if name != "profile")
RUNS_ON = "device dtype threads "
LARGE = 100_000_000  # bytes of weights that take longer to read than `status` may


class Notebook(NamedTuple):
    reads: str  # numbers of the notebooks whose results it takes
    sections: str  # of the profile, whose values its result depends on
    method: int  # raised by hand when the same values and inputs come to give another result
    result: str = ""  # files and folders that later ones take; empty: everything but the figures


# in the order in which they run
TABLE = {
    "00_check_environment": Notebook("", ALL, 1),
    "10_prepare_data": Notebook("", "data threads", 1, "root nli.csv"),
    "20_build_mrbench": Notebook("10", RUNS_ON + "data mrbench", 1, "bench"),
    "30_pretrain_contrastive": Notebook(
        "10", RUNS_ON + "data backbone encoder stage1 stage2", 1, "model backbone.txt"
    ),
    "40_finetune_rlvr": Notebook("10 30", RUNS_ON + "data encoder stage3 control", 1, "model control"),
    "50_evaluate": Notebook("10 20 30 40", RUNS_ON + "data encoder evaluation", 1),
    "60_ablate": Notebook(
        "10 20 30",
        RUNS_ON + "evidence data backbone encoder stage1 stage2 stage3 control mrbench evaluation study",
        5,
    ),
    "70_analyse_grains": Notebook("10 20 30 40", RUNS_ON + "data encoder evaluation", 3),
    "80_generalise": Notebook("10 30 40", RUNS_ON + "data encoder evaluation unseen", 2),
    "82_transfer": Notebook("10 30 40 50 60", RUNS_ON + "data encoder stage3 evaluation study video", 1),
    "85_trade_cost": Notebook(
        "10 20 30 40", RUNS_ON + "data encoder stage2 stage3 distil rerank evaluation", 2
    ),
    "90_report": Notebook(
        "00 10 20 30 40 50 60 70 80 82 85",
        "evidence device threads data backbone stage2 stage3 control mrbench evaluation study unseen video",
        5,
    ),
}
STAGES = {
    stage: tuple(s for s in TABLE if s[:2] in notebook.reads.split()) for stage, notebook in TABLE.items()
}


def seed_folder(profile: str, seed: int) -> Path:
    return files.OUTPUTS / profile / f"seed-{seed}"


def stage_folder(profile: str, seed: int, stage: str) -> Path:
    return seed_folder(profile, seed) / stage


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a folder of a stage, None if it has none: it is not finished."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def manifest(profile: str, seed: int, stage: str) -> dict | None:
    """The manifest of a finished stage, None if there is none."""
    return read_manifest(stage_folder(profile, seed, stage))


def made_from(settings: Settings, seed: int, stage: str) -> dict:
    """The record of all that a stage's result depends on, as of now.

    Returns:
        seed; values: of the sections that it reads, without those that are the default, so that a new one
        changes no key; inputs: a hash of each stage (or other data) that it reads; method: its version.

    Raises:
        ProfileError: an arm of the study is wrong.
    """
    notebook = TABLE[stage]
    sections = set(notebook.sections.split())
    values = settings.model_dump(mode="json", include=sections, exclude_defaults=True)
    inputs = {name: _content(settings.profile, seed, name) for name in STAGES[stage]}
    if stage == "10_prepare_data" and settings.data.root:
        inputs["data.root"] = files.digest(*map(_listed, (settings.data.root, settings.data.nli)))
    if stage == "30_pretrain_contrastive":
        inputs["backbone.path"] = _weights(Path(model_source(settings.backbone.path)))
    if "study" in sections and stage != "00_check_environment":
        rows = arms(settings).items()
        values["arms"] = {
            name: arm.model_dump(mode="json", exclude={"why"}, exclude_defaults=True) for name, arm in rows
        }
        if not settings.study.in_chain:  # else the stage itself makes what is missing
            results = sorted((files.OUTPUTS / settings.profile / "study").glob("*/*/manifest.json"))
            inputs["study"] = files.digest([files.file_hash(path) for path in results])
    return {"seed": seed, "values": values, "inputs": inputs, "method": notebook.method}


def key(made: dict) -> str:
    """A hash of what `made_from` says."""
    return files.digest(made)


def differences(before: dict | None, now: dict) -> list[str]:
    """Changes from one `made_from` to another, a line each; None is the one of an older layout."""
    if before is None:
        return ["made by another layout"]
    inputs = before["inputs"]
    lines = [f"input {name} changed" for name, its in now["inputs"].items() if inputs.get(name) != its]
    for name in ("seed", "method"):
        if before[name] != now[name]:
            lines.append(f"{name.replace('method', 'method version')} {before[name]} -> {now[name]}")
    old, new = _flat(before["values"]), _flat(now["values"])
    for name in sorted(old.keys() | new.keys()):
        if (left := old.get(name, "default")) != (right := new.get(name, "default")):
            lines.append(f"{name} {left} -> {right}")
    return lines


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested values by their dotted names."""
    out = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def _content(profile: str, seed: int, stage: str) -> str:
    """Hash of the files of a finished stage that later ones take; not of when and by whom it was made."""
    done = manifest(profile, seed, stage)
    if done is None:
        return "missing"
    wanted = TABLE[stage].result.split()
    taken = {
        name: file
        for name, file in done["files"].items()
        if (name.split("/")[0] in wanted if wanted else not name.startswith("figures/"))
    }
    # data that the stage only links to are not among its files
    return files.digest(taken, done.get("made_from", {}).get("inputs", {}).get("data.root"))


def _weights(folder: Path) -> str:
    """Hash of the weights in a model folder; of large ones the size and time. A hub's model has none here."""
    paths = [(path, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    read = (files.file_hash(p) if s.st_size < LARGE else [s.st_size, s.st_mtime_ns] for p, s in paths)
    return files.digest(list(read))


def _listed(name: str) -> list:
    """Names, sizes and times of a file, or of the tables of an M-BEIR root; not of its many images."""
    place = Path(name)
    paths = [place] if place.is_file() else [path for path in place.glob("*") if path.is_file()]
    for part in ("query", "cand_pool", "qrels", "instructions"):
        for folder, _, names in os.walk(place / part, followlinks=True):
            paths += [Path(folder) / name for name in names]
    status = {path.relative_to(place.parent).as_posix(): path.stat() for path in paths}
    return sorted((name, s.st_size, s.st_mtime_ns) for name, s in status.items())
