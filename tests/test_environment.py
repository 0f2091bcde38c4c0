"""constraints.txt names every package that the pins of pyproject.toml bring along, as it is installed."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints() -> dict[str, str]:
    lines = (line.split(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def needed(requirements: list[str]) -> dict[str, str]:
    """Installed version of everything that some requirements bring along on this machine."""
    versions, queue = {}, [(text, "") for text in requirements]
    seen = set()
    while queue:
        text, extra = queue.pop()
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        versions[name] = (dist := distribution(name)).version
        for each in (name, *(f"{name}[{e}]" for e in wanted.extras)):
            if each not in seen:
                seen.add(each)
                queue += [(r, each.partition("[")[2].rstrip("]")) for r in dist.requires or ()]
    return versions


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="constraints.txt is resolved for Python 3.11")
def test_constraints_name_every_package_that_is_needed_as_it_is_installed():
    installed = needed([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
    locked = constraints()
    wrong = {name: (version, locked.get(name)) for name, version in installed.items() if locked.get(name) != version}
    assert not wrong, f"installed and locked differ: {wrong}; `make setup` installs what is locked, `make lock` locks anew"
    assert len(installed) > 100


def test_every_pin_is_exact_and_locked_as_it_stands():
    pins = [pin for pins in (PROJECT["dependencies"], PROJECT["optional-dependencies"]["test"]) for pin in pins]
    locked = constraints()
    for pin in pins:
        name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", pin).groups()
        assert locked[canonicalize_name(name)] == version


def test_constraints_name_nothing_that_is_not_installed_and_other():
    for name, version in constraints().items():
        try:
            assert distribution(name).version == version, name
        except PackageNotFoundError:  # of another platform
            continue


def test_conda_installs_by_the_same_lock():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert next(d["pip"] for d in conda if isinstance(d, dict)) == ["-c constraints.txt", "-e .[test]"]
    assert "python=3.11" in conda
