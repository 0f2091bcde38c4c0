"""Our model as mteb asks for one, for its M-BEIR and MIEB retrieval tasks.

results = mteb.evaluate(MtebEncoder(encoder.load(DIR)), mteb.get_tasks(tasks=["CIRRIT2IRetrieval"]))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from elva_core.data import mbeir
from elva_core.export import inputs
from elva_core.models.encoder import Encoder
from elva_core.models.lineage import lineage
from elva_core.retrieval import retriever

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from torch.utils.data import DataLoader


class MtebEncoder(AbsEncoder):
    """Queries carry the instruction of the task, candidates none; texts are normalised as in training.

    Args:
        template: "summary" (generative, ELVA) or "eol" (one pass).
        instructions: by name of a task, instead of its own. mteb keeps results under the model's name and
            revision, which do not say which instructions were given: keep those apart with
            `cache=mteb.ResultCache(FOLDER)`.
    """

    def __init__(
        self, encoder: Encoder, *, template: str = "summary", instructions: Mapping[str, str] | None = None
    ) -> None:
        self.encoder, self.template, self.instructions = encoder.forgetful(), template, instructions or {}
        weights = lineage(encoder.source)[-1:]  # none of a model that was never saved
        revision = weights[0].get("sha256", "unknown")[:12] if weights else "unsaved"
        self.mteb_model_meta = ModelMeta.create_empty().model_copy(
            update={
                "name": f"elva/{Path(encoder.source).resolve().name}",
                "revision": f"{revision}-{template}",
                "n_parameters": encoder.backbone.num_parameters(),
                "embed_dim": encoder.backbone.config.get_text_config().hidden_size,
                "max_tokens": encoder.settings.max_text_tokens,
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": True,
                "modalities": ["text", "image"],
                "framework": ["PyTorch", "Transformers"],
            }
        )

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        precision: str = "float32",
    ) -> np.ndarray:
        """Embeddings (N, D) float32, unit length, of batches with "text", "image" or both.

        The size of a batch is the loader's.

        Raises:
            ValueError: another precision than float32, or a batch without text and image.
        """
        if precision != "float32":
            raise ValueError(f"precision {precision!r} is not given; embeddings are float32")
        prompt, instruction = task_metadata.prompt, ""
        if prompt_type == PromptType.query:
            prompt = prompt.get("query") if isinstance(prompt, dict) else prompt
            instruction = self.instructions.get(task_metadata.name, prompt or "")
        return np.concatenate([self._embedded(batch, instruction) for batch in inputs])

    def _embedded(self, batch: Mapping[str, list], instruction: str) -> np.ndarray:
        if not batch.keys() & {"text", "image"}:
            raise ValueError(f"a batch has {sorted(batch)}; this model reads text and images")
        images = batch.get("image", [None] * len(batch.get("text", ())))
        texts = batch.get("text", [None if image is None else "" for image in images])
        for place, (text, image) in enumerate(zip(texts, images, strict=True)):
            if text is None and image is None:
                raise ValueError(f"input {place} of a batch has neither text nor image; drop it")
        prefix = mbeir.normalise(instruction)
        texts = [mbeir.normalise(f"{prefix} {text or ''}") for text in texts]  # as query_item
        with inputs.items([(*pair, prefix) for pair in zip(texts, images, strict=True)]) as items:
            return retriever.encode(self.encoder, items, batch=len(items), template=self.template)[0]
