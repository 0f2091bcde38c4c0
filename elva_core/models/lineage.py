"""Lineage of a model: the models that it comes from, by the hashes of their weights."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from elva_core import files

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def lineage(parent: str | Path) -> list[dict[str, str]]:
    """The models that one which starts from `parent` comes from, oldest first, by stage and hash.

    Returns:
        {"stage", "sha256" of the weights} of a folder; {"hub", "sha256"} of a name like owner/model, whose
        weights are those of the hub's copy on this machine.
    """
    folder, name = Path(parent), {}
    if not folder.is_dir():
        if not HUB_NAME.fullmatch(str(parent)):
            return []
        copy = try_to_load_from_cache(str(parent), "config.json")
        name = {"hub": str(parent)}
        if not isinstance(copy, str):
            return [name]
        folder = Path(copy).parent
    card = json.loads((folder / "elva.json").read_text()) if (folder / "elva.json").is_file() else {}
    weights = sorted(folder.glob("*.safetensors"))
    listed = "".join(f"{path.name} {files.file_hash(path)}\n" for path in weights)
    this = {"stage": card.get("stage", "backbone"), "sha256": hashlib.sha256(listed.encode()).hexdigest()}
    return [*card.get("parents", []), this | name]
