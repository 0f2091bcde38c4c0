"""The package imports one way."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "elva_core"
ORDER = [
    "settings", "artifacts", "mbeir", "clips", "lint", "sharding", "zero", "runtime", "emoji_collection", "nli", "prepare",
    "objectives", "rewards", "metrics", "encoder", "backbone", "second_backbone", "rollout", "search", "retrieval", "store",
    "negatives", "annotate", "verification", "mrbench", "release", "contrastive", "vllm_rollout", "rlvr", "distil", "rerank",
    "training", "evaluate", "grains", "explorer", "claims", "unseen_files", "unseen_sets", "unseen", "video_sets", "video", "study",
    "comparisons", "figures", "report", "sizes", "catalogue", "workload", "plan", "publish", "inputs", "sentence_module", "export",
    "mteb_encoder", "answers", "index", "throughput", "fusion", "workbook", "__main__",
]  # fmt: skip


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
