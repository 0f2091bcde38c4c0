"""A small Qwen2-VL of the real class, built and taught here, for machines without a GPU.

It is taught what the real backbone already knows: to describe an image, a text, or an image with a change, in a
short summary. The result is an ordinary pretrained folder that AutoProcessor and from_pretrained load.

    folder = backbone.ensure(settings, root, cache=...)
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from elva_core.config import TinySettings

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Qwen2Tokenizer:
    """A byte-level BPE in Qwen2's class, trained on `texts`; no text is ever unknown to it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    model = json.loads(core.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, special=True, normalized=False) for t in SPECIAL]}
    )
    return tokenizer


def build(texts: Sequence[str], tiny: TinySettings, *, seed: int):
    """(model, processor): random weights, trained tokenizer, image processor with a fixed square size."""
    tokenizer = train_tokenizer(texts, tiny.vocabulary)
    pixels = tiny.image_side**2
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    images = Qwen2VLImageProcessor(size=size, patch_size=tiny.patch)
    videos = Qwen2VLVideoProcessor(size=size, patch_size=tiny.patch)
    processor = Qwen2VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=CHAT_TEMPLATE
    )
    half_head = tiny.hidden // tiny.heads // 2
    third = half_head // 3
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in zip(
            ("pad", "start", "end", "vision_start", "vision_end", "image", "video"), SPECIAL, strict=True
        )
    }
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + tiny.spare_rows,
            "hidden_size": tiny.hidden,
            "intermediate_size": tiny.intermediate,
            "num_hidden_layers": tiny.layers,
            "num_attention_heads": tiny.heads,
            "num_key_value_heads": tiny.heads,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [half_head - 2 * third, third, third],
            },
            "bos_token_id": None,
            "eos_token_id": ids["end"],
            "pad_token_id": ids["pad"],
        },
        vision_config={
            "depth": tiny.vision_layers,
            "embed_dim": tiny.vision_hidden,
            "hidden_size": tiny.hidden,
            "num_heads": tiny.vision_heads,
            "mlp_ratio": 4,
            "patch_size": tiny.patch,
            "hidden_act": "relu",  # quick_gelu costs a third of the tower's time on a CPU
        },
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    return model, processor
