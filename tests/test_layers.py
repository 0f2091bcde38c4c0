"""The package imports one way, folder by folder."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path

import elva_core

PACKAGE = Path(__file__).resolve().parent.parent / "elva_core"
# the wings, bottom to top; "" is config, files and what processes share
WINGS = ("", "data", "models", "retrieval", "training", "mrbench", "evaluation", "experiments", "export", "apps", "cli")
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
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("elva_core.") for name in node.names), f"{path}: from elva_core... import ..."
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
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(WINGS) - {""}


def test_pure_mathematics_imports_nothing_of_ours_but_its_settings():
    for name in ("training/losses", "training/rewards", "retrieval/metrics"):
        modules = set(re.findall(r"^from elva_core(?:\.(\S+))? import", (PACKAGE / f"{name}.py").read_text(encoding="utf-8"), re.M))
        assert modules <= {"training_settings"}


def test_only_who_writes_data_knows_the_emoji():
    known = re.compile(r"from elva_core\.data import .*\bemoji(_variants)?\b")
    users = {p.stem for p in PACKAGE.rglob("*.py") if known.search(p.read_text(encoding="utf-8"))}
    assert users == {"sources", "emoji_variants"}


def test_every_name_in_the_table_of_the_paper_exists():
    table, folders = elva_core.__doc__.split("A folder imports only")
    names = re.findall(rf"\b(?:{'|'.join(WINGS[1:])})\.[\w.]+", table)
    notebooks = re.findall(r"notebooks/\S+\.ipynb", table)
    items = re.findall(r"^    \S.*?  +(\S.*)$", table, re.MULTILINE)
    assert len(items) == len(table.strip().splitlines()) - 4
    assert sorted(", ".join(items).split(", ")) == sorted(names + notebooks)
    assert re.findall(r"^    Table (\d)", table, re.MULTILINE) == list("12345678")  # all that the paper has
    for name in names:
        pkgutil.resolve_name(f"elva_core.{name}")
    assert all((PACKAGE.parent / path).is_file() for path in notebooks)
    assert re.findall(r"^    (\w+)  ", folders, re.MULTILINE) == list(WINGS[1:])
