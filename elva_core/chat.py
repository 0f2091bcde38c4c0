"""Any vision-language model of transformers as it wants to be read: its chat template, its processor, its forward.

How an image becomes tokens, what else the layers are told about it, and how positions are counted is left to the model's own
code; here rows get endings and are padded on the left. What holds of every model that we know need not hold of the next, so
`check` compares with `generate` of transformers before a model is used.

    given = chat.read(model, processor, chats, endings)
    states = model.model(**given).last_hidden_state
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache, GenerationConfig

from elva_core import clips, mbeir
from elva_core.clips import Clip

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # what processors say of each token
WRITTEN = 3  # tokens of `check`
LIMITS = {torch.float32: 1e-2, torch.bfloat16: 0.25, torch.float16: 0.05}  # of a logit, in standard deviations of all of them

Chat = list[dict]  # messages of transformers, whose images are paths or clips until `opened`


def end_of_turn(processor) -> int:
    """The token that the chat template puts behind an answer, which need not be the tokenizer's eos; that, where there is none."""
    tokenizer, answer = processor.tokenizer, "xyz"
    turns = [{"role": role, "content": [{"type": "text", "text": answer}]} for role in ("user", "assistant")]
    behind = processor.apply_chat_template(turns).rpartition(answer)[2].strip()
    first = tokenizer(behind, add_special_tokens=False).input_ids[:1]
    return first[0] if first and first[0] in tokenizer.get_added_vocab().values() else tokenizer.eos_token_id


def opened(chat: Chat, max_pixels: int | None) -> Chat:
    """The same messages with pictures in place of their paths, made smaller where they have more pixels than that.

    A clip stands there once for each of its frames, and becomes them in turn.
    """
    frames = {clip: cycle(_frames(clip)) for message in chat for part in message["content"] if isinstance(clip := part.get("image"), Clip)}

    def picture(source: Path | Clip) -> Image.Image:
        image = next(frames[source]) if isinstance(source, Clip) else mbeir.open_image(source)
        if max_pixels and (pixels := image.width * image.height) > max_pixels:
            image = image.resize([max(1, int(side * (max_pixels / pixels) ** 0.5)) for side in image.size])
        return image

    return [
        message | {"content": [part | {"image": picture(part["image"])} if "image" in part else part for part in message["content"]]}
        for message in chat
    ]


def _frames(clip: Clip) -> list[Image.Image]:
    return [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in clips.read(clip).pixels]


def read(model, processor, chats: Sequence[Chat], endings: Sequence[Sequence[int]] | None = None) -> dict[str, torch.Tensor]:
    """What `model.model` is given for chats up to and including the assistant's header, each followed by its ending.

    Returns:
        input_ids, attention_mask (B, L), left-padded; position_ids (..., B, L); pixels and what else the processor makes.
    """
    given = processor.apply_chat_template(
        list(chats),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    if endings is not None:
        given.update(_followed(given, endings, processor.tokenizer.pad_token_id))
    given = dict(given.to(model.device, model.dtype))
    # the one place where transformers says how positions are counted, M-RoPE or not; `check` notices if it should move
    given["position_ids"] = model._prepare_position_ids_for_generation(given["input_ids"], given)
    return given


def _followed(given, endings: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """What is said of each token, with endings, padded anew."""
    out, kept = {}, given["attention_mask"].bool()
    for name in (name for name in PER_TOKEN if name in given):
        ends = {"input_ids": list, "attention_mask": lambda e: [1] * len(e)}.get(name, lambda e: [0] * len(e))
        rows = [[*row[there].tolist(), *ends(e)] for row, there, e in zip(given[name], kept, endings, strict=True)]
        length, filler = max(map(len, rows)), pad_id if name == "input_ids" else 0
        out[name] = torch.tensor([[filler] * (length - len(row)) + row for row in rows])
    return out


@torch.no_grad()
def check(model, processor, name: str) -> None:
    """Reads a text and a picture as `read` does, in one padded batch and in pieces on a cache, and compares with `generate`.

    Raises:
        ValueError: the logits are others than those of transformers, which reads each chat alone.
    """
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8))
    text = {"type": "text", "text": "What is this?"}
    chats = [[{"role": "user", "content": content}] for content in ([text], [{"type": "image", "image": picture}, text])]
    wanted, written = [], []
    wish = GenerationConfig(max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id)
    for chat in chats:
        alone = {key: value for key, value in read(model, processor, [chat]).items() if key != "position_ids"}
        out = model.generate(**alone, generation_config=wish, output_logits=True, return_dict_in_generate=True)
        wanted.append(torch.cat(out.logits))
        written.append(out.sequences[0, -WRITTEN:-1].tolist())
    wanted = torch.stack(wanted).float()
    head, cache = model.get_output_embeddings(), DynamicCache(config=model.config.get_text_config())
    together = head(model.model(**read(model, processor, chats, written), use_cache=False).last_hidden_state[:, -WRITTEN:])
    given = read(model, processor, chats)
    first = model.model(**given, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
        raise ValueError(f"{name}, a {model.config.model_type}, keeps a state that is no keys and values; rollouts cannot share a prompt's")
    ids = torch.tensor(written, device=model.device)
    mask = torch.cat([given["attention_mask"], torch.ones_like(ids)], dim=1)
    positions = given["position_ids"][..., -1:] + 1 + torch.arange(WRITTEN - 1, device=model.device)
    then = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    pieces = head(torch.cat([first, then.last_hidden_state], dim=1))
    for way, found in (("a padded batch", together), ("pieces on a cache", pieces)):
        error = float((found.float() - wanted).abs().max() / wanted.std())
        if not error <= LIMITS[model.dtype]:
            raise ValueError(
                f"{name}, a {model.config.model_type}, gives other logits in {way} than in transformers' generate: off by {error:.2g} "
                f"of their standard deviation, {LIMITS[model.dtype]:.2g} is rounding; it cannot be trained here as it is"
            )
