"""Arms of the ablation study: the rows of params/arms.yaml, validated, and the order in which they run.

for name, arm, seed in arms.planned(settings):
    changed = arm.applied(settings)
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError

from elva_core import files
from elva_core.config import PARAMS, ProfileError, Section, Settings
from elva_core.values import problems


class Arm(Section):
    """One row of params/arms.yaml: what is trained after stage 2, and which values of the profile change."""

    group: str  # the table it belongs to
    trains: Literal["nothing", "stage3", "control"]
    start: Literal["backbone", "stage2"] = "stage2"
    template: Literal["summary", "eol"] = "summary"
    every_seed: bool = False  # else the first seed alone
    changes: dict = Field(default_factory=dict)
    against: tuple[str, ...] = ()  # arms that it is compared with, paired
    curves: tuple[str, ...] = ()  # lines of the sample-efficiency figure that it is a point of
    units: tuple[str, ...] = ()  # test units, or patterns of them, that it is measured on besides MRBench
    paper: tuple[str, str] | None = None  # table and row of params/reported.yaml; its last value is compared
    why: str

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
    try:
        rows = files.read_yaml(path)
    except files.ElvaDataError as error:
        raise ProfileError(str(error)) from None
    if not isinstance(rows, dict) or not all(isinstance(name, str) for name in rows):
        raise ProfileError(f"{path}: expected an arm's name and its values in each row")
    for name, values in rows.items():
        try:
            known[name] = Arm.model_validate(values)
            if name in names or not names:
                known[name].applied(settings)
        except ValidationError as error:
            raise ProfileError(f"{path}: arm {name}: {problems(error)}") from None
        if unknown := sorted({*known[name].against, *known[name].curves} - set(rows)):
            raise ProfileError(f"{path}: arm {name} is compared with {unknown}, which is no arm of this file")
    if unknown := sorted(set(names) - set(known)):
        lacking = f"study.arms names {unknown}; {path} has {sorted(known)}"
        raise ProfileError(f"params/{settings.profile}.yaml: {lacking}")
    return {name: arm for name, arm in known.items() if name in names or not names}


def planned(settings: Settings) -> list[tuple[str, Arm, int]]:
    """(name, arm, seed) in the order they run: what has every seed first, seed by seed."""
    chosen, seeds = arms(settings), settings.study.seeds
    every = [(name, arm, seed) for seed in seeds for name, arm in chosen.items() if arm.every_seed]
    return every + [(name, arm, seeds[0]) for name, arm in chosen.items() if not arm.every_seed]
