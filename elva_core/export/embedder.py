"""The module of an exported folder for sentence-transformers: it summarises and returns the state at [RET].

Imported by name from modules.json of the folder; see sentence_transformers.py.

model = SentenceTransformer(FOLDER, trust_remote_code=True)
model.encode(["A dog.", PIL_IMAGE, {"text": "Make it red.", "image": "photo.jpg"}])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import is_image_url_or_path
from sentence_transformers.base.modules import InputModule

from elva_core.export import inputs
from elva_core.export.sentence_transformers import MODULE
from elva_core.models import encoder
from elva_core.retrieval import retriever

CARD = "elva.json"  # of a model folder; "template" says how it is read
FORMS = "pass a text, a PIL image, an image's path, or {'text': ..., 'image': ...}"


class Embedder(InputModule):
    """A whole model of ours: prompts, summary, pooling. Vectors have unit length.

    Args:
        card: the content of elva.json.
    """

    def __init__(self, loaded: encoder.Encoder, card: dict[str, Any]) -> None:
        super().__init__()
        self.encoder, self.card = loaded.forgetful(), card
        self.model = self.encoder.backbone  # registered, so that the device, dtype and size are found
        self.tokenizer = self.encoder.processor.tokenizer

    @property
    def modalities(self) -> list:
        """Of one input, and "message", which is this library's word for several kinds in one batch."""
        return ["text", "image", ("image", "text"), "message"]

    def get_embedding_dimension(self) -> int:
        return self.model.config.get_text_config().hidden_size

    def preprocess(
        self,
        entries: Sequence,
        prompt: str | None = None,
        task: str | None = None,
        processing_kwargs: dict | None = None,
    ) -> dict[str, Any]:
        """(text, image, prompt), the prompt before each text, too.

        `task` and `processing_kwargs` are given by the library and mean nothing here.

        Raises:
            ValueError: an input that is no text, image or both; says where in `entries`, which the library
            sorts, longest first.
        """
        return {"pairs": [_pair(entry, prompt or "", place) for place, entry in enumerate(entries)]}

    def forward(self, features: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Embeddings (B, D), float32, on the model's device."""
        template = self.card["template"]
        with inputs.items(features["pairs"]) as items:
            vectors, _ = retriever.encode(self.encoder, items, batch=len(items), template=template)
        return {"sentence_embedding": torch.from_numpy(vectors).to(self.encoder.device)}

    def save(self, output_path: str, *args, safe_serialization: bool = True) -> None:
        """The folder that `load` reads; weights are safetensors whatever is asked for."""
        self.model.save_pretrained(output_path)
        self.encoder.processor.save_pretrained(output_path)
        text = json.dumps(self.card, indent=1, sort_keys=True) + "\n"
        Path(output_path, CARD).write_text(text, encoding="utf-8")

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **_unused,  # the library gives every module what only its own modules read
    ) -> Embedder:
        """From a folder or a hub name. `model_kwargs={"dtype": "bfloat16"}` is the only one of its kind."""
        source = (model_name_or_path, subfolder, token, cache_folder, revision, local_files_only)
        place = cls.load_dir_path(*source)
        if place is None:
            raise ValueError(f"{model_name_or_path} is neither a folder nor a model of the hub")
        card = json.loads(Path(place, CARD).read_text(encoding="utf-8"))
        return cls(encoder.load(place, dtype=(model_kwargs or {}).get("dtype", "float32")), card)


def load(folder: str | Path, *, dtype: str = "float32", device: str = "cpu") -> SentenceTransformer:
    """An exported folder without `trust_remote_code`: the one class there is to trust is named here.

    Raises:
        ValueError: modules.json names another class than ours.
    """
    modules = json.loads(Path(folder, "modules.json").read_text(encoding="utf-8"))
    types = [module["type"] for module in modules]
    if types != [MODULE]:
        raise ValueError(f"{folder} has the modules {types}; it is no export of the ELVA workbook")
    config = json.loads(Path(folder, "config_sentence_transformers.json").read_text(encoding="utf-8"))
    module = Embedder.load(str(folder), model_kwargs={"dtype": dtype})
    return SentenceTransformer(
        modules=[module],
        prompts=config["prompts"],
        similarity_fn_name="cosine",
        truncate_dim=config.get("truncate_dim"),
        device=device,
    )


def _pair(entry: object, prompt: str, place: int) -> tuple[str, object, str]:
    """Text, image and instruction of one input, in the forms the library documents."""
    if isinstance(entry, list) and len(entry) == 1:  # a chat message comes as a conversation of one
        (entry,) = entry
    parts = entry if isinstance(entry, dict) else {"image": entry}
    if isinstance(entry, str) and not is_image_url_or_path(entry):
        parts = {"text": entry}
    if unknown := sorted(map(str, parts.keys() - {"text", "image"})):
        raise ValueError(f"input {place} of a batch has {unknown}; {FORMS}")
    if all(part is None for part in parts.values()):
        raise ValueError(f"input {place} of a batch is {entry!r}, without text and image; {FORMS}")
    text = parts.get("text")
    text = "" if text is None else text
    if prompt and isinstance(text, str):  # an image alone is asked with the instruction alone
        text = prompt + text if text else prompt.strip()
    return text, parts.get("image"), prompt.strip()
