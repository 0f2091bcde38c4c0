"""A trained model as a folder that sentence-transformers loads and that gives the same vectors.

export.sentence_transformer(Path("outputs/cpu/40_finetune_rlvr/model"), Path("elva"), root=mbeir.Root(ROOT))
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard

from elva_core.data import mbeir
from elva_core.export import hub
from elva_core.models.encoder import TEMPLATES

MODULE = "elva_core.sentence_module.Embedder"  # the name in exported folders, old and new
CARD_KEYS = (
    "encoder",
    "pooling",
    "stage",
    "parents",
)  # of elva.json; older ones also name a folder of this machine


def sentence_transformer(
    model: Path,
    to: Path,
    *,
    template: str | None = None,
    root: mbeir.Root | None = None,
    unit: str | None = None,
) -> Path:
    """Writes the folder, whole or not at all; it also stays a model of ours, for `encoder.load`, `evaluate` and `push`.

    Args:
        template: "summary" (generative, ELVA) or "eol" (one pass); None is what elva.json says, else "summary".
        root: whose instructions become prompts, one per test unit. unit: the one that `encode_query` takes by itself.

    Raises:
        PublishError: no model of ours, or a target in use. ValueError: an unknown template or unit.
    """
    found = hub.checked(model)
    card = json.loads((model / "elva.json").read_text(encoding="utf-8"))
    template = template or card.get("template", "summary")
    if template not in TEMPLATES:
        raise ValueError(f"{model / 'elva.json'}: template {template!r} is none of {TEMPLATES}")
    texts = prompts(root, unit)
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "model"
        staged.mkdir()
        for path in found:
            shutil.copyfile(path, staged / path.name)
        kept = {key: card[key] for key in CARD_KEYS if key in card} | {"template": template}
        _write(staged / "elva.json", kept)
        _write(staged / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": MODULE}])
        _write(staged / "config_sentence_transformers.json", configuration(texts))
        (staged / "README.md").write_text(readme(staged, to.name, template, texts), encoding="utf-8")
        hub.refuse_local_paths(staged)
        return Path(hub.to_folder(staged, to))


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def prompts(root: mbeir.Root | None, unit: str | None) -> dict[str, str]:
    """Name -> prompt, as sentence-transformers keeps them: "query" and "document", and the first instruction of each test unit.

    Candidates never carry an instruction. Without a root, or a unit, a query carries none either unless one is asked for.
    """
    named = {name: _instruction(root, name) for name in root.units("test")} if root else {}
    if unit is not None and unit not in named:
        raise ValueError(
            f"{root.folder if root else 'no root was given, so there'} has no test unit {unit}; it has {sorted(named)}"
        )
    return {"query": named[unit] if unit else "", "document": ""} | named


def _instruction(root: mbeir.Root, unit: str) -> str:
    query = root.queries(unit, "test")[0]
    bare = mbeir.Query(query.qid, None, None, query.modality, (), (), query.task)
    return root.query_text(bare, prompt_index=0) + " "


def configuration(texts: dict[str, str]) -> dict:
    """config_sentence_transformers.json: an installation that lacks this package is told so before anything is loaded."""
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
    }


USE = """## Use with sentence-transformers

Install `sentence-transformers=={library}` and the ELVA workbook (`pip install -e .` in its clone), whose module class modules.json names.
From version 6 on, sentence-transformers asks for `trust_remote_code=True` before it imports any class that is not its own, also an
installed one; there is no code in this folder, and none of it would be run. `sentence_module.load` does without the flag.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code=True)
# or: from elva_core import sentence_module; model = sentence_module.load("{name}")
documents = model.encode_document(["A dog.", "photo.jpg", image, {{"text": "A dog.", "image": image}}])  # a PIL image, or a path
queries = model.encode_query(["A dog on a beach."]{example})
scores = model.similarity(queries, documents)
```

Embeddings are read with the {template} template. Write texts as sentences, as in training (`elva_core.mbeir.normalise`). The instruction of
a query is a prompt; candidates have none. `encode_query` and `encode_document` take the prompts of their names by themselves:

| prompt | text |
|--|--|
{names}
"""


def readme(staged: Path, name: str, template: str, texts: dict[str, str]) -> str:
    """The model card of `push`, with how sentence-transformers uses it."""
    card = ModelCard(hub.card(staged, name, profile=None, results=None, license_name="apache-2.0"))
    card.data.library_name = "sentence-transformers"
    card.data.pipeline_tag = "sentence-similarity"
    units = [key for key in texts if key not in ("query", "document")]
    use = USE.format(
        library=version("sentence-transformers"),
        name=name,
        template={"summary": "generative", "eol": "EOL (one pass)"}[template],
        example=f', prompt_name="{units[0]}"' if units else "",
        names="\n".join(f"| `{key}` | {text.strip()} |" for key, text in texts.items()),
    )
    head, mark, rest = card.content.partition("## Use with transformers")
    return f"{head}{use}\n{mark}{rest}"
