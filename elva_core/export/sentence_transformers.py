"""A trained model as a folder that sentence-transformers loads and that gives the same vectors.

sentence_transformer(Path("outputs/cpu/seed-17/40_finetune_rlvr/model"), Path("elva"), root=mbeir.Root(ROOT))
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from elva_core.data import mbeir
from elva_core.data.items import query_item
from elva_core.export import hub
from elva_core.models.encoder import TEMPLATES

MODULE = "elva_core.sentence_module.Embedder"  # the name in exported folders, old and new
# of elva.json; older ones also name a folder of this machine
CARD_KEYS = ("encoder", "pooling", "stage", "parents", "dims")


def sentence_transformer(
    model: Path,
    to: Path,
    *,
    template: str | None = None,
    root: mbeir.Root | None = None,
    unit: str | None = None,
    truncate_dim: int | None = None,
) -> Path:
    """Writes the folder, whole or not at all; `encoder.load`, `evaluate` and `push` still take it.

    Args:
        template: "summary" (generative, ELVA) or "eol" (one pass); None is what elva.json says, or "summary".
        root: whose instructions become prompts, one per test unit.
        unit: the one whose prompt `encode_query` takes by itself.
        truncate_dim: numbers of an embedding that `encode` gives unless told otherwise; None is all.

    Raises:
        PublishError: no model of ours, or a target in use. ValueError: an unknown template or unit, or a
            truncation that the model was not trained at.
    """
    with hub.staged_copy(model) as staged:
        card = json.loads((staged / "elva.json").read_text(encoding="utf-8"))
        template = template or card.get("template", "summary")
        if template not in TEMPLATES:
            raise ValueError(f"{model / 'elva.json'}: template {template!r} is none of {TEMPLATES}")
        check_dim(staged, truncate_dim)
        texts = prompts(root, unit)
        card = {key: card[key] for key in CARD_KEYS if key in card} | {"template": template}
        _write(staged / "elva.json", card)
        _write(staged / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": MODULE}])
        _write(staged / "config_sentence_transformers.json", configuration(texts, truncate_dim))
        readme = hub.card(staged, to.resolve().name, prompts=texts)
        (staged / "README.md").write_text(readme, encoding="utf-8")
        hub.refuse_local_paths(staged)
        return Path(hub.to_folder(staged, to))


def check_dim(model: Path, dim: int | None) -> None:
    """Raises ValueError where embeddings of a model were not trained to be cut to `dim` numbers."""
    dims = json.loads((model / "elva.json").read_text(encoding="utf-8")).get("dims", [])
    if dim not in (None, *dims):
        raise ValueError(
            f"{model.name} was trained at dims {dims}, so {dim} numbers of its embeddings say little; "
            "truncate at one of these, or train with dims in the profile"
        )


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def prompts(root: mbeir.Root | None, unit: str | None) -> dict[str, str]:
    """Name -> prompt, as sentence-transformers keeps them.

    "query", "document", and for each test unit its first instruction. Candidates never carry one; without a
    root, or a unit, a query carries none either unless one is asked for.

    Raises:
        ValueError: a unit that the root lacks.
    """
    named = {name: _instruction(root, name) for name in root.units("test")} if root else {}
    if unit is not None and unit not in named:
        place = root.folder if root else "no root was given, so there"
        raise ValueError(f"{place} has no test unit {unit}; it has {sorted(named)}")
    return {"query": named[unit] if unit else "", "document": ""} | named


def _instruction(root: mbeir.Root, unit: str) -> str:
    query = root.queries(unit, "test")[0]
    bare = mbeir.Query(query.qid, None, None, query.modality, (), (), query.task)
    return query_item(root, bare, prompt_index=0).text + " "


def configuration(texts: dict[str, str], truncate_dim: int | None) -> dict:
    """config_sentence_transformers.json; an installation without this package is told before it loads."""
    reason = "the module class of this model is part of the ELVA workbook"
    return {
        "model_type": "SentenceTransformer",
        "__version__": {
            "sentence_transformers": version("sentence-transformers"),
            "transformers": transformers.__version__,
            "pytorch": torch.__version__,
        },
        "requirements": {"elva-workbook": {"specifier": f">={version('elva-workbook')}", "reason": reason}},
        "prompts": texts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    } | ({"truncate_dim": truncate_dim} if truncate_dim else {})
