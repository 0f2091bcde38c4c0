"""A small Qwen2.5-VL of the real class, taught like the first backbone: another retriever for stage 3 to start from (Table 5).

Its tower differs from Qwen2-VL's (windows of attention, RMSNorm, gated layers); the language model has the same shape.
Tokenizer and image processor are those of the first backbone, the weights start from nothing.

folder = second_backbone.ensure(first, settings.backbone, settings.encoder, root, cache=...)
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from elva_core.config import BackboneSettings, EncoderSettings, TinySettings
from elva_core.data import mbeir
from elva_core.models import encoder
from elva_core.models.encoder import Encoder
from elva_core.training import teach


def build(first: str, tiny: TinySettings, *, seed: int):
    """(model, processor): random weights in the sizes of `tiny`, the words and pictures of the backbone `first`."""
    known, shared = AutoConfig.from_pretrained(first), AutoProcessor.from_pretrained(first)
    processor = Qwen2_5_VLProcessor(
        image_processor=shared.image_processor,
        tokenizer=shared.tokenizer,
        video_processor=shared.video_processor,
        chat_template=shared.chat_template,
    )
    tokens = {
        name: getattr(known, name)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "tie_word_embeddings")
    }
    text = {
        name: value
        for name, value in known.text_config.to_dict().items()
        if name not in ("model_type", "architectures")
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": tiny.vision_layers,
            "hidden_size": tiny.vision_hidden,
            "intermediate_size": 8
            * tiny.vision_hidden
            // 3,  # three matrices with as many weights as two of four times the width
            "out_hidden_size": tiny.hidden,
            "num_heads": tiny.vision_heads,
            "patch_size": tiny.patch,
            "fullatt_block_indexes": [tiny.vision_layers - 1],
        },
        **tokens,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config), processor


def ensure(
    first: str, settings: BackboneSettings, prompts: EncoderSettings, root: mbeir.Root, cache: Path
) -> str:
    """Path of the taught model, kept under `cache` by the hash of what it depends on, so it is taught once."""
    key = hashlib.sha256(
        settings.model_dump_json().encode() + Path(first).name.encode() + teach.VERSION.encode()
    )
    folder = cache / f"backbone-{key.hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return str(folder)
    work = folder.with_name(folder.name + ".partial")
    model, processor = build(first, settings.tiny, seed=settings.seed)
    if prompts.ret_token not in processor.tokenizer.get_vocab():
        encoder.add_ret_token(model, processor.tokenizer, prompts.ret_token)
    taught, queries, candidates = (
        Encoder(model, processor, prompts),
        root.union_train(),
        root.pool("", "train", "global"),
    )
    teach.teach_vision(taught, root, candidates, settings.teach, settings.seed, work / "vision")
    teach.teach_language(taught, root, queries, candidates, settings.teach, settings.seed, work / "language")
    model.save_pretrained(work / "model")
    processor.save_pretrained(work / "model")
    (work / "model").rename(folder)
    shutil.rmtree(work)
    return str(folder)
