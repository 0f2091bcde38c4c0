"""The package imports one way, folder by folder."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "elva_core"
# the wings, bottom to top; "" is config, files and what processes share
WINGS = ("", "data", "models", "retrieval", "training", "evaluation", "mrbench", "experiments", "export", "apps", "cli")
ABOVE_ALL = ("cli", "__main__", "__init__", "encoder", "sentence_module", "mteb_encoder", "answers")  # entries and former places


def wing(parts: tuple[str, ...]) -> str:
    """Wing of a module, given its path below the package."""
    if len(parts) > 1:
        return parts[0]
    return "cli" if parts[0].removesuffix(".py") in ABOVE_ALL else ""


def imported(path: Path) -> set[str]:
    """Wings that a file imports from."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "elva_core":
            for name in node.names:
                parts = (*node.module.split("."), name.name)[1:]
                used.add(wing(parts[:2] if (PACKAGE / parts[0]).is_dir() else parts[:1]))
    return used


def test_every_wing_imports_only_wings_below_it():
    for path in sorted(PACKAGE.rglob("*.py")):
        own = wing(path.relative_to(PACKAGE).parts)
        upward = imported(path) - set(WINGS[: WINGS.index(own) + 1])
        assert not upward, f"{path.relative_to(PACKAGE)} imports from {sorted(upward)}, which stand above {own or 'the root'}"


def test_every_folder_is_a_wing():
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(WINGS) - {"", "cli"}


def test_pure_mathematics_imports_nothing_of_ours():
    for name in ("training/losses", "training/rewards", "retrieval/metrics"):
        assert not imported(PACKAGE / f"{name}.py")


def test_only_who_writes_data_knows_the_emoji():
    users = {p.stem for p in PACKAGE.rglob("*.py") if re.search(r"from elva_core\.data import .*\bemoji\b", p.read_text(encoding="utf-8"))}
    assert users == {"sources"}
