"""Arms of the ablation study: the rows of params/arms.yaml, validated, and the order in which they run.

for name, arm, seed in arms.planned(settings):
    changed = arm.applied(settings)
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from pydantic import Field, PositiveInt, ValidationError

from elva_core import files
from elva_core.config import PARAMS, ProfileError, Section, Settings, mapping
from elva_core.values import problems


class Arm(Section):
    """One row of params/arms.yaml: what is trained after stage 2, and which values of the profile change."""

    group: str  # the table it belongs to
    trains: Literal["nothing", "stage3", "control"]
    start: Literal["backbone", "stage2", "own stage 2"] = "stage2"
    template: Literal["summary", "eol"] = "summary"
    seeds: PositiveInt | Literal["all"] = 1  # how many of the study's, from the first
    timed: bool = False  # whether queries per second, and passes of a query, are measured
    changes: dict = Field(default_factory=dict)
    against: tuple[str, ...] = ()  # arms that it is compared with, paired
    curves: tuple[str, ...] = ()  # lines of the sample-efficiency figure that it is a point of
    units: tuple[str, ...] = ()  # test units, or patterns of them, that it is measured on besides MRBench
    paper: tuple[str, str] | None = None  # table and row of params/reported.yaml; its last value is compared
    why: str

    def seeds_of(self, settings: Settings) -> tuple[int, ...]:
        """The seeds it is trained with."""
        return settings.study.seeds[: None if self.seeds == "all" else self.seeds]

    def applied(self, settings: Settings) -> Settings:
        """The profile with this arm's changes; `all` negatives are as many as it has of both kinds."""
        both = settings.stage3.negatives.hard + settings.stage3.negatives.random
        changes, stage3 = dict(self.changes), self.changes.get("stage3")
        negatives = stage3.get("negatives") if isinstance(stage3, dict) else None
        if isinstance(negatives, dict):
            counts = {kind: both if value == "all" else value for kind, value in negatives.items()}
            changes["stage3"] = stage3 | {"negatives": counts}
        return settings.changed(changes)


def arms(settings: Settings) -> dict[str, Arm]:
    """The arms a profile asks for, in the order of params/arms.yaml; every row is validated.

    Raises:
        ProfileError: an unknown name, a row that is no arm, or a change that is no value of the profile; with
            file, arm and key.
    """
    path, names, known = PARAMS / "arms.yaml", settings.study.arms, {}
    rows = mapping(path)
    for name, values in rows.items():
        try:
            known[name] = Arm.model_validate(values)
            if name in names or not names:
                known[name].applied(settings)
        except ValidationError as error:
            raise ProfileError(f"{path}: arm {name}: {problems(error)}") from None
        if unknown := sorted({*known[name].against, *known[name].curves} - set(rows)):
            raise ProfileError(f"{path}: arm {name} is compared with {unknown}, which is no arm of this file")
        table, row = known[name].paper or ("", "")
        if table and row not in _printed().get(table, {}).get("rows", {}):
            lacking = f"params/reported.yaml has no row {row!r} in {table!r}"
            raise ProfileError(f"{path}: arm {name}: paper: {lacking}")
    if unknown := sorted(set(names) - set(known)):
        lacking = f"study.arms names {unknown}; {path} has {sorted(known)}"
        raise ProfileError(f"params/{settings.profile}.yaml: {lacking}")
    return {name: arm for name, arm in known.items() if name in names or not names}


@cache
def _printed() -> dict:
    """The paper's numbers, in whose rows arms have their counterpart."""
    return files.read_yaml(files.REPOSITORY / "params/reported.yaml")


def planned(settings: Settings) -> list[tuple[str, Arm, int]]:
    """(name, arm, seed) in the order they run: what has most seeds first, seed by seed."""
    rows = [(name, arm, seed) for name, arm in arms(settings).items() for seed in arm.seeds_of(settings)]
    seeds = settings.study.seeds
    return sorted(rows, key=lambda row: (-len(row[1].seeds_of(settings)), seeds.index(row[2])))
