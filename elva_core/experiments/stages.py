"""The notebooks as stages, with a folder each: outputs/<profile>/seed-<seed>/<stage>.

A stage is written in a hidden folder, its manifest last, which is then renamed. No manifest = not done.
What was made from other values stays beside it until `clean`: begun in .<stage>.<key>.partial, finished in
.<stage>.<key>.kept (`keys.key`).

run = start("20_build_mrbench", "smoke", 17)
queries = run.root.queries("emoji_task0", "test")
run.close(metrics={"queries": 1200}, answer="1,200 queries have two grains or more.")
"""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PrivateAttr

from elva_core import config as profiles
from elva_core import files
from elva_core.experiments import lock
from elva_core.experiments.keys import (
    STAGES,
    key,
    made_from,
    manifest,
    read_manifest,
    seed_folder,
    stage_folder,
)

if TYPE_CHECKING:
    from IPython.display import Markdown

    from elva_core.data.mbeir import Root
    from elva_core.models.encoder import Encoder

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")


class MissingStageError(RuntimeError):
    """A stage was asked for that has not been done; the message has the command that makes it."""


def refuse_missing(paths: Iterable[Path], profile: str, seed: int) -> None:
    """Raises MissingStageError for the first file that the run of a profile and seed has not left."""
    for path in paths:
        if not path.is_file():
            raise MissingStageError(
                f"{path} is missing; run: python -m elva_core run {profile} --seed {seed}"
            )


def numbered(number: str) -> str:
    """The name of the notebook with this number, "40" for instance."""
    return next(stage for stage in STAGES if stage.startswith(number))


class RecordedSettings(profiles.Settings):
    """A profile that notes which of its sections are read, for the test of `keys.TABLE`."""

    _read: set[str] = PrivateAttr(default_factory=set)

    def __getattribute__(self, name: str):
        if name in profiles.Settings.model_fields:
            self._read.add(name)
        return super().__getattribute__(name)


@dataclass
class Stage:
    """One run of one notebook.

    folder: where it writes; it becomes outputs/<profile>/seed-<seed>/<stage> in `close`.
    made_from: what its result depends on (`keys.made_from`). record: further entries of its manifest.
    """

    name: str
    settings: RecordedSettings
    seed: int
    folder: Path
    made_from: dict
    record: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def require(self, stage: str) -> Path:
        """Folder of a finished stage of this profile and seed.

        Raises:
            MissingStageError: no manifest, another seed, or a file that changed since it was written.
        """
        profile = self.settings.profile
        done, folder = manifest(profile, self.seed, stage), stage_folder(profile, self.seed, stage)
        command = f"python -m elva_core run {profile} --seed {self.seed} --only {stage[:2]}"
        if done is None:
            raise MissingStageError(f"{folder / 'manifest.json'} is missing; run: {command}")
        if done["seed"] != self.seed:
            raise MissingStageError(
                f"{folder} was made with seed {done['seed']}, not {self.seed}; run: {command}"
            )
        for path in _damaged(folder, done):
            raise MissingStageError(
                f"{path} is missing or changed since its manifest; run: {command} --force"
            )
        return folder

    @property
    def root(self) -> Root:
        """The data of this profile and seed; raises what `require` raises."""
        from elva_core.data import sources

        return sources.locate(self.require(numbered("10")))[0]

    @property
    def bench(self) -> Root:
        """MRBench of this profile and seed; raises what `require` raises."""
        from elva_core.data import mbeir

        return mbeir.Root(self.require(numbered("20")) / "bench")

    def encoder(self, model: str | Path, device: str | None = None) -> Encoder:
        """A model folder or hub name as an encoder, with the profile's prompts, precision and device.

        Args:
            device: another one than the profile's.
        """
        from elva_core.models import encoder

        settings = self.settings
        return encoder.load(model, settings.encoder, dtype=settings.dtype, device=device or settings.device)

    def keep(self, model: Path, name: str) -> None:
        """Puts a trained model into the folder, as `name`.

        The one in work/ stays until the stage is closed, so that a stage that is killed before finds it.
        """
        shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.copytree(model, self.folder / name, copy_function=files.link)

    def save_table(self, name: str, table) -> None:
        """A data frame as CSV, whole or not at all."""
        with files.whole(self.folder / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)

    def save_figure(self, name: str, figure, plotted):
        """figures/<name>.png and the plotted rows as CSV beside it; returns the picture, for the notebook."""
        from IPython.display import Image

        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.png", metadata={"Software": None}, bbox_inches="tight", dpi=110)
        plotted.to_csv(folder / f"{name}.csv", index=False)
        return Image(filename=folder / f"{name}.png")

    def close(self, metrics: dict | None = None, answer: Markdown | str = "") -> dict:
        """Writes the manifest, moves the folder into place and frees the profile and seed.

        What stands there is replaced if it has the same key or holds no trained model, else kept beside it.
        Nothing may be written after it.

        Args:
            answer: to the notebook's question; the chain puts it under the question in the executed copy.
        """
        read = sorted(self.settings._read)
        sizes = listed_files(self.folder)
        record = {
            "stage": self.name,
            "profile": self.settings.profile,
            "seed": self.seed,
            "key": key(self.made_from),
            "made_from": self.made_from,
            "sections_read": read,
            "files": sizes,
            "metrics": metrics or {},
            "answer": getattr(answer, "data", answer).removeprefix("**Answer.** "),
            "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "wall_s": round(time.time() - self.started, 1),
            "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            "commit": _commit(),
            "packages": packages(),
            "device": self.settings.device,
            **self.record,
        }
        (self.folder / "manifest.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        _move_into_place(self.folder, stage_folder(self.settings.profile, self.seed, self.name))
        lock.give_back(seed_place(self.settings.profile, self.seed))
        return {"stage": self.name, "profile": self.settings.profile, "seed": self.seed, "files": len(sizes)}


def listed_files(folder: Path) -> dict[str, dict]:
    """Size and hash of every file of a stage's folder, by name, as its manifest has them."""
    sizes: dict[str, dict] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("work/") and name != "manifest.json":
            sizes[name] = {"bytes": path.stat().st_size, "sha256": files.file_hash(path)}
    return sizes


def packages() -> dict[str, str]:
    """Installed versions of those that change numbers."""
    return {name: version(name) for name in PACKAGES}


def seed_place(profile: str, seed: int) -> str:
    """Name of the lock that is held while a stage of this profile and seed is made."""
    return f"{profile}/seed-{seed}"


def start(name: str, profile: str, seed: int) -> Stage:
    """The first call of a notebook: opens its stage, starts the profile's threads, says what is no evidence.

    Raises:
        LockedError: another process runs this profile and seed.
    """
    from IPython.display import Markdown, display

    from elva_core import distributed

    run = open_stage(name, profile, seed)
    distributed.start(run.settings.threads)
    if not profiles.load(profile).evidence:  # not `run`'s: no result depends on it
        display(Markdown(f"**{no_evidence(profile)}**"))
    return run


def no_evidence(profile: str) -> str:
    """Warning at the head of a run whose profile is no evidence."""
    return f"None of these numbers is evidence: the profile {profile} tests plumbing."


def open_stage(name: str, profile: str, seed: int) -> Stage:
    """Opens a stage in outputs/<profile>/seed-<seed>/.<stage>.<key>.partial.

    What was begun with the same values and inputs is gone on with, so that interrupted training resumes from
    <folder>/work. The profile and seed are locked until the stage is closed or this process ends.

    Raises:
        LockedError: another process runs this profile and seed.
    """
    settings = RecordedSettings.model_validate(profiles.load(profile).model_dump())
    lock.take(seed_place(profile, seed))
    made = made_from(settings, seed, name)
    folder = beside(profile, seed, name, key(made), "partial")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # it is written anew
    settings._read.clear()
    return Stage(name, settings, seed, folder, made)


def beside(profile: str, seed: int, stage: str, its_key: str, kind: str) -> Path:
    """Folder of a stage that was begun (kind partial) or replaced (kept)."""
    return seed_folder(profile, seed) / f".{stage}.{its_key}.{kind}"


def ready(made: dict, profile: str, stage: str) -> bool:
    """Whether a stage is finished that was made from this (`keys.made_from`).

    One that was kept while there were other values is taken back; so is one that was killed in `close`.
    """
    seed, wanted = made["seed"], key(made)
    final = stage_folder(profile, seed, stage)
    if (manifest(profile, seed, stage) or {}).get("key") == wanted:
        shutil.rmtree(final / "work", ignore_errors=True)  # of one that was killed in `close`
        return True
    for kind in ("partial", "kept"):
        folder = beside(profile, seed, stage, wanted, kind)
        done = read_manifest(folder)
        if done and done["key"] == wanted and not any(_damaged(folder, done)):
            _move_into_place(folder, final)
            return True
    return False


def _move_into_place(folder: Path, final: Path) -> None:
    """Renames a finished folder to its place. What stands there is kept, unless it is worth nothing then."""
    aside = None
    if final.exists():
        done, after = read_manifest(final) or {}, read_manifest(folder)
        # one of an older layout has no key, and one that a person has damaged not even a manifest
        old = done.get("key") or done.get("fingerprint") or f"{int(final.stat().st_mtime):x}"
        aside = final.with_name(f".{final.name}.{old[:16]}.kept")
        shutil.rmtree(aside, ignore_errors=True)  # of the same key, and older
        final.rename(aside)
    folder.rename(final)
    shutil.rmtree(final / "work", ignore_errors=True)
    if aside and (done.get("key") == after["key"] or not next(aside.rglob("*.safetensors"), None)):
        shutil.rmtree(aside)


def leftovers(profile: str) -> Iterator[Path]:
    """Work beside the stages of every seed that the profile's values of now do not go on with."""
    settings = profiles.load(profile)
    for folder in sorted((files.OUTPUTS / profile).glob("seed-*/.*.*.*")):
        stage, its_key, kind = folder.name[1:].rsplit(".", 2)
        seed = folder.parent.name.removeprefix("seed-")
        if stage in STAGES and kind in ("partial", "kept") and seed.isdigit():
            now = key(made_from(settings, int(seed), stage))
            done = read_manifest(folder.with_name(stage)) or {}
            if its_key != now or done.get("key") == now:
                yield folder


def older_layout(profile: str) -> str:
    """One line on the stages of an older layout, without a folder for each seed; empty if there are none."""
    place, names = files.OUTPUTS / profile, ("executed", *STAGES)
    hidden = {f".{stage}.partial" for stage in STAGES}
    old = [p.name for p in sorted(place.glob("*")) if p.name in names or p.name in hidden]
    if not old:
        return ""
    seeds = [done["seed"] for name in old if (done := read_manifest(place / name))]
    target = f"seed-{seeds[0] if seeds else 17}"
    moved = f"cd {shlex.quote(str(place))} && mkdir -p {target} && mv {' '.join(old)} {target}"
    return f"{place} has stages of an older layout, which are not used; to keep them beside the new: {moved}"


def _damaged(folder: Path, done: dict) -> Iterator[Path]:
    """Files of a manifest that are missing or have another size."""
    for name, file in done["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            yield path


def _commit() -> str:
    """Commit of the working tree, with "+dirty" when tracked code differs from it."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+dirty"]
    try:
        said = subprocess.run(command, cwd=files.REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()
