"""Kinds of profile values (shares, counts, paths, models), changes laid over them, and their checks.

A relative path of a profile is meant from the repository, wherever a command or a notebook was started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from elva_core import files

Share = Annotated[float, Field(ge=0, le=1)]

# former keys of a profile and today's, which are those of TRL's GRPOConfig
RENAMED = {
    "stage3.rollouts": "num_generations",
    "stage3.kl_weight": "beta",
    "stage3.advantage": "scale_rewards",
    "stage3.aggregation": "loss_type (sequence is grpo now)",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def resolved(path: str) -> str:
    """A path of a profile as an absolute one."""
    return path if path.startswith("/") else f"{files.REPOSITORY}/{path}"


def as_written(path: str) -> str:
    """The inverse of `resolved`, so that no hash of a profile depends on where the repository lies."""
    return path.removeprefix(f"{files.REPOSITORY}/")


# a file or folder: absolute in the program, as written where the profile is dumped or hashed
Place = Annotated[str, AfterValidator(resolved), PlainSerializer(as_written)]


def model_source(name: str) -> str:
    """Source of a profile's model for transformers: an absolute folder, or a name on the hub.

    It is a folder where that folder exists, and where the name starts with `.` or `/`.
    """
    folder = resolved(name)
    return folder if name.startswith((".", "/")) or Path(folder).is_dir() else name


def merged(base: dict, changes: dict) -> dict:
    """Values with some replaced, as deep as `changes` goes."""
    sections = [key for key in changes if isinstance(changes[key], dict) and isinstance(base.get(key), dict)]
    return base | changes | {key: merged(base[key], changes[key]) for key in sections}


def problems(error: ValidationError) -> str:
    """One line for what pydantic refuses, with the name of today where a key has been renamed."""
    lines = []
    for row in error.errors():
        key, said = ".".join(map(str, row["loc"])), row["msg"].removeprefix("Value error, ")
        lines.append(f"{key} is called {RENAMED[key]} now" if key in RENAMED else f"{key}: {said}")
    return "; ".join(lines)
