"""Small models of other families of transformers, of the real classes with random weights: what stage 3 may be put on top of.

Each is read otherwise than Qwen2-VL: Qwen3-VL's tower speaks to deeper layers too, LLaVA-NeXT cuts an image into tiles, Gemma 3
looks both ways inside an image and has windows, Idefics3 writes its tiles' rows and columns as text, Qwen3.5 has layers without keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken

from elva_core.data import images as image_files
from elva_core.models import chat, small_models

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
QWEN_VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 16}
TILES = [[28, 56], [56, 28], [56, 56]]


def tokenizer_of(texts: Sequence[str], added: Sequence[str] = (), **named: str):
    """Of Qwen2's class, with a family's own special tokens, some of them under names its processor asks for."""
    tokenizer = small_models.train_tokenizer(texts, 1000)
    special = [AddedToken(token, special=True, normalized=False) for token in (*added, *named.values())]
    tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
    if named:  # by a save, as a tokenizer class has no other way to learn them
        tokenizer.init_kwargs["extra_special_tokens"] = named
        tokenizer._set_model_specific_special_tokens(special_tokens=named)
    return tokenizer


def template(image: str, end: str = "<|im_end|>") -> str:
    """Our small backbone's chat template with another placeholder, and another end of a turn."""
    return small_models.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", image).replace("<|im_end|>", end)


def _like_qwen3(texts: Sequence[str], name: str, text: dict, vision: dict):
    tokenizer = tokenizer_of(texts)
    ids = {f"{what}_token_id": tokenizer.convert_tokens_to_ids(f"<|{what}_pad|>") for what in ("image", "video")}
    ids |= {f"vision_{edge}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{edge}|>") for edge in ("start", "end")}
    images = transformers.Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 32**2, "longest_edge": 128**2})
    videos = transformers.Qwen3VLVideoProcessor()
    processor = transformers.Qwen3VLProcessor(images, tokenizer, videos, chat_template=small_models.CHAT_TEMPLATE)
    config = getattr(transformers, f"{name}Config")(
        text_config=TEXT | {"vocab_size": len(tokenizer) + 8, "head_dim": 16} | text,
        vision_config=QWEN_VISION | {"num_position_embeddings": 64} | vision,
        tie_word_embeddings=True,
        **ids,
    )
    return config, processor


def qwen3_vl(texts: Sequence[str]):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    return _like_qwen3(texts, "Qwen3VL", {"rope_parameters": rope}, {"deepstack_visual_indexes": [0, 1]})


def qwen3_5(texts: Sequence[str]):
    heads = {f"linear_{what}": size for what, size in (("num_key_heads", 2), ("num_value_heads", 2), ("key_head_dim", 8))}
    return _like_qwen3(texts, "Qwen3_5", heads | {"num_hidden_layers": 4, "linear_value_head_dim": 8}, {})


def llava_next(texts: Sequence[str]):
    tokenizer = tokenizer_of(texts, ["<image>"])
    square = {"height": 28, "width": 28}
    images = transformers.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=square, image_grid_pinpoints=TILES)
    processor = transformers.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    config = transformers.LlavaNextConfig(
        text_config=TEXT | {"model_type": "mistral", "vocab_size": len(tokenizer) + 8},
        vision_config=VISION | {"model_type": "clip_vision_model", "image_size": 28, "projection_dim": 32},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=TILES,
    )
    return config, processor


def gemma3(texts: Sequence[str]):
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = tokenizer_of(texts, ["<end_of_turn>"], **named)
    images = transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = transformers.Gemma3Processor(
        images, tokenizer, image_seq_length=4, chat_template=template(named["boi_token"], "<end_of_turn>")
    )
    indices = {name.replace("_token", "_token_index"): tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    config = transformers.Gemma3Config(
        text_config=TEXT | {"vocab_size": len(tokenizer) + 8, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6},
        vision_config=VISION | {"model_type": "siglip_vision_model", "image_size": 56, "vision_use_head": False},
        mm_tokens_per_image=4,
        **indices,
    )
    return config, processor


def idefics3(texts: Sequence[str]):
    places = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
    tokenizer = tokenizer_of(texts, ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places])
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template("<image>"))
    config = transformers.Idefics3Config(
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokenizer) + 8},
        vision_config=VISION | {"image_size": 56},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return config, processor


def plain(model, processor, prompt: str, images: Sequence[Path], ending: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(state, logits) of the last token by transformers alone: its processor, its positions, its forward, one input, no padding."""
    inputs = processor(text=[prompt], images=[[image_files.open_image(path) for path in images]] if images else None, return_tensors="pt")
    added = torch.tensor([ending], dtype=torch.long)
    for name in set(inputs) & set(chat.PER_TOKEN):
        own = {"input_ids": added, "attention_mask": torch.ones_like(added)}.get(name, torch.zeros_like(added))
        inputs[name] = torch.cat([inputs[name], own], dim=1)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    return out.hidden_states[-1][0, -1], out.logits[0, -1]


def write(family, texts: Sequence[str], folder: Path, *, dtype: torch.dtype = torch.float32, spread: float = 0.2) -> Path:
    """A pretrained folder.

    Args:
        spread: of random weights, ten times the usual, so that what is read wrongly shows.
    """
    config, processor = family(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=spread)
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
