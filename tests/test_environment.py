"""Pins stand in two files and must be the same."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def test_environment_yml_and_pyproject_carry_the_same_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {pin for pins in (project["dependencies"], *project["optional-dependencies"].values()) for pin in pins}
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    listed = next(d["pip"] for d in conda if isinstance(d, dict))
    assert pinned == set(listed) - {"-e ."}
    assert all("==" in pin for pin in pinned)
