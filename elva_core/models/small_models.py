"""Small Qwen2-VL and Qwen2.5-VL of the real classes with random weights, for machines without a GPU.

training/teach.py teaches them.

model, processor = small_models.build(texts, settings.sizes, seed=0)
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from elva_core.training_settings import SmallModelSettings

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


def build(texts: Sequence[str], sizes: SmallModelSettings, *, seed: int):
    """A Qwen2-VL: (model, processor) with random weights.

    Args:
        texts: that the tokenizer is trained on; images get the fixed square size of `sizes`.
    """
    tokenizer = train_tokenizer(texts, sizes.vocabulary)
    pixels = sizes.image_side**2
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    images = Qwen2VLImageProcessor(size=size, patch_size=sizes.patch)
    videos = Qwen2VLVideoProcessor(size=size, patch_size=sizes.patch)
    processor = Qwen2VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=CHAT_TEMPLATE
    )
    half_head = sizes.hidden // sizes.heads // 2
    third = half_head // 3
    names = ("pad", "start", "end", "vision_start", "vision_end", "image", "video")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + sizes.spare_rows,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.heads,
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
            "depth": sizes.vision_layers,
            "embed_dim": sizes.vision_hidden,
            "hidden_size": sizes.hidden,
            "num_heads": sizes.vision_heads,
            "mlp_ratio": 4,
            "patch_size": sizes.patch,
            "hidden_act": "relu",  # quick_gelu costs a third of the tower's time on a CPU
        },
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    return _with_random_weights(Qwen2VLForConditionalGeneration, config, seed), processor


def build_from(first: str, sizes: SmallModelSettings, *, seed: int):
    """A backbone that goes on from another's words and weights: (model, processor).

    A Qwen2-VL is `first` itself, to be taught further. A Qwen2.5-VL is another start for stage 3 (Table 5).
    Its tower differs from Qwen2-VL's (windows of attention, RMSNorm, gated layers); the rest has its shape.

    Args:
        first: folder of a small Qwen2-VL, whose tokenizer and image processor are taken over, and every
            weight that has the same name and shape; the others, those of the gated layers, are random.
    """
    known, shared = AutoConfig.from_pretrained(first), AutoProcessor.from_pretrained(first)
    before = Qwen2VLForConditionalGeneration.from_pretrained(first, dtype="float32")
    if sizes.architecture == "qwen2_vl":
        return before, shared
    parts = ("image_processor", "tokenizer", "video_processor", "chat_template")
    processor = Qwen2_5_VLProcessor(**{name: getattr(shared, name) for name in parts})
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "tie_word_embeddings")
    text = known.text_config.to_dict()
    config = Qwen2_5_VLConfig(
        text_config={
            name: text[name] for name in text if name not in ("model_type", "architectures", "dtype")
        },
        vision_config={
            "depth": sizes.vision_layers,
            "hidden_size": sizes.vision_hidden,
            # three matrices with as many weights as two of four times the width
            "intermediate_size": 8 * sizes.vision_hidden // 3,
            "out_hidden_size": sizes.hidden,
            "num_heads": sizes.vision_heads,
            "patch_size": sizes.patch,
            "fullatt_block_indexes": [sizes.vision_layers - 1],
        },
        **{name: getattr(known, name) for name in tokens},
    )
    model = _with_random_weights(Qwen2_5_VLForConditionalGeneration, config, seed)
    taken = before.state_dict()
    fitting = {n: w for n, w in model.state_dict().items() if n in taken and taken[n].shape == w.shape}
    model.load_state_dict({n: taken[n] for n in fitting}, strict=False)
    return model, processor


def _with_random_weights(kind: type, config, seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)
