"""The package imports one way."""

from __future__ import annotations

import ast
from pathlib import Path

import elva_core

PACKAGE = Path(__file__).resolve().parent.parent / "elva_core"
# the list in the package's docstring: names first, two spaces, what they are for
LINES = [line.strip().split("  ")[0] for line in (elva_core.__doc__ or "").splitlines() if line.startswith("    ")]
ORDER = [*(name for line in LINES for name in line.split(", ")), "__main__"]


def imports(path: Path) -> set[str]:
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "elva_core":
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("elva_core."):
            used.add(node.module.split(".")[1])
    return used


def test_every_module_imports_only_modules_below_it():
    for place, name in enumerate(ORDER):
        upward = imports(PACKAGE / f"{name}.py") - set(ORDER[:place])
        assert not upward, f"{name} imports upward: {sorted(upward)}"


def test_every_module_has_a_place():
    assert {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"} == set(ORDER)


def test_pure_mathematics_imports_nothing_of_ours():
    for name in ("objectives", "rewards", "metrics"):
        assert not imports(PACKAGE / f"{name}.py")


def test_only_the_emoji_module_and_who_writes_data_know_it():
    users = {p.stem for p in PACKAGE.glob("*.py") if "emoji_collection" in imports(p)}
    assert users == {"prepare"}
