"""The notebooks as stages, with a folder each under outputs/.

A stage is written in a hidden folder, its manifest last, which is then renamed. No manifest = not done.

run = open_stage("20_build_mrbench", "smoke", 17)
root = run.require("10_prepare_data") / "root"
run.close(metrics={"queries": 1200})
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from elva_core import config as profiles
from elva_core import files
from elva_core.experiments import lock
from elva_core.files import REPOSITORY, file_hash

# notebook -> the numbers of those it reads, in the order in which they run
READS = {
    "00_check_environment": "",
    "10_prepare_data": "00",
    "20_build_mrbench": "10",
    "30_pretrain_contrastive": "10",
    "40_finetune_rlvr": "10 30",
    "50_evaluate": "10 20 30 40",
    "60_ablate": "10 20 30",
    "70_analyse_grains": "10 20 30 40",
    "80_generalise": "10 20 30 40",
    "82_transfer": "10 30 40 50 60",
    "85_trade_cost": "10 20 30 40",
    "90_report": "00 10 20 30 40 50 60 70 80 82 85",
}
STAGES = {stage: tuple(s for s in READS if s[:2] in numbers.split()) for stage, numbers in READS.items()}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")


class MissingStageError(RuntimeError):
    """A stage was asked for that has not been done; the message has the command that makes it."""


def numbered(number: str) -> str:
    """The name of the notebook with this number, "40" for instance."""
    return next(stage for stage in STAGES if stage.startswith(number))


def stage_folder(profile: str, stage: str) -> Path:
    return files.OUTPUTS / profile / stage


def manifest(profile: str, stage: str) -> dict | None:
    """The manifest of a finished stage, None if there is none."""
    path = stage_folder(profile, stage) / "manifest.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def fingerprint(settings: profiles.Settings, seed: int, inputs: dict[str, str], code: str) -> str:
    """What a stage depends on: resolved profile, seed, the manifests of its inputs, its code."""
    values = json.dumps([settings.digest(), seed, inputs, code], sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()


@dataclass
class Stage:
    """One run of one notebook.

    folder: where it writes; it becomes outputs/<profile>/<stage> in `close`.
    inputs: hash of the manifest of each stage that it has read. record: further entries of its own manifest.
    """

    name: str
    settings: profiles.Settings
    seed: int
    folder: Path
    inputs: dict[str, str] = field(default_factory=dict)
    record: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def require(self, stage: str) -> Path:
        """Folder of a finished stage of this profile and seed.

        Raises:
            MissingStageError: no manifest, another seed, or a file that changed since it was written.
        """
        profile = self.settings.profile
        done, folder = manifest(profile, stage), stage_folder(profile, stage)
        command = f"python -m elva_core run {profile} --seed {self.seed} --only {stage[:2]}"
        if done is None:
            raise MissingStageError(f"{folder / 'manifest.json'} is missing; run: {command}")
        if done["seed"] != self.seed:
            raise MissingStageError(
                f"{folder} was made with seed {done['seed']}, not {self.seed}; run: {command}"
            )
        for name, size in done["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size["bytes"]:
                raise MissingStageError(
                    f"{path} is missing or changed since its manifest; run: {command} --force"
                )
        self.inputs[stage] = file_hash(folder / "manifest.json")
        return folder

    def save_table(self, name: str, table) -> None:
        """A data frame as CSV, whole or not at all."""
        partial = self.folder / f"{name}.csv.partial"
        table.to_csv(partial, index=False)
        partial.replace(self.folder / f"{name}.csv")

    def save_figure(self, name: str, figure, plotted):
        """figures/<name>.png and the plotted rows as CSV beside it; returns the picture, for the notebook."""
        from IPython.display import Image

        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.png", metadata={"Software": None}, bbox_inches="tight", dpi=110)
        plotted.to_csv(folder / f"{name}.csv", index=False)
        return Image(filename=folder / f"{name}.png")

    def close(self, metrics: dict | None = None) -> dict:
        """Writes the manifest, moves the folder into place and frees the profile.

        Nothing may be written after it.
        """
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        (self.folder / "fingerprint").unlink(missing_ok=True)
        paths = {
            p.relative_to(self.folder).as_posix(): p for p in sorted(self.folder.rglob("*")) if p.is_file()
        }
        sizes: dict[str, dict] = {name: {"bytes": path.stat().st_size} for name, path in paths.items()}
        for name, path in paths.items():
            if name.count("/") <= 1:  # top-level results carry a hash; the many images of a root do not
                sizes[name]["sha256"] = file_hash(path)
        record = {
            "stage": self.name,
            "profile": self.settings.profile,
            "settings_sha256": self.settings.digest(),
            "seed": self.seed,
            "inputs": dict(sorted(self.inputs.items())),
            "fingerprint": os.environ.get("ELVA_FINGERPRINT", ""),
            "files": sizes,
            "metrics": metrics or {},
            "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "wall_s": round(time.time() - self.started, 1),
            "peak_memory_gb": _peak_memory_gb(),
            "commit": _commit(),
            "packages": {name: version(name) for name in PACKAGES},
            "device": self.settings.device,
            **self.record,
        }
        (self.folder / "manifest.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        final = stage_folder(self.settings.profile, self.name)
        retired = final.with_name(f".{self.name}.retired")
        shutil.rmtree(retired, ignore_errors=True)
        if final.exists():
            final.rename(retired)
        self.folder.rename(final)
        shutil.rmtree(retired, ignore_errors=True)
        lock.give_back(self.settings.profile)
        return {"stage": self.name, "profile": self.settings.profile, "seed": self.seed, "files": len(sizes)}


def open_stage(name: str, profile: str, seed: int) -> Stage:
    """Starts a stage in outputs/<profile>/.<stage>.partial.

    A partial folder of the same settings and seed is kept, so that interrupted training resumes from
    <folder>/work; a partial folder of anything else is removed. The profile is locked until the stage is
    closed or this process ends.

    Raises:
        LockedError: another process runs this profile.
    """
    settings = profiles.load(profile)
    lock.take(profile)
    folder = files.OUTPUTS / profile / f".{name}.partial"
    mark = f"{settings.digest()} {seed} {os.environ.get('ELVA_FINGERPRINT', '')}"
    if not (folder / "fingerprint").is_file() or (folder / "fingerprint").read_text() != mark:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "fingerprint").write_text(mark)
    return Stage(name, settings, seed, folder)


def _peak_memory_gb() -> float:
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def _commit() -> str:
    """Commit of the working tree, with "+dirty" when tracked code differs from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD").strip()
        return head + ("+dirty" if _git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
