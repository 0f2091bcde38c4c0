"""Model inputs from chats, by a model's own template and processor, and a check of its forward.

How an image becomes tokens, what else the layers are told about it, and how positions are counted is left to
the model's own code; here rows get endings and are padded on the left. What holds of every model that we know
need not hold of the next, so `check` compares with `generate` of transformers before a model is used.

    given = chat.read(model, processor, chats, endings)
    states = model.model(**given).last_hidden_state
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from elva_core.data import frames, images
from elva_core.data.frames import Clip
from elva_core.models.prefix import advance, can_be_fixed, fixed, prefill, read_next, repeated

# What processors say of each token
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
WRITTEN = 3  # tokens of `check`
# of the difference of a logit, in standard deviations of all of them
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


def end_of_turn(processor) -> int:
    """Id of the token that the chat template puts behind an answer; the tokenizer's eos where it puts none.

    Raises:
        ValueError: the template cannot be filled.
    """
    tokenizer, answer = processor.tokenizer, "xyz"
    turns = [{"role": role, "content": [{"type": "text", "text": answer}]} for role in ("user", "assistant")]
    try:
        behind = processor.apply_chat_template(turns).rpartition(answer)[2].strip()
    except Exception as error:  # templates are programs of their own
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} cannot be filled "
            f"({type(error).__name__}: {error}); save one with its processor that takes a turn of the user "
            "and one of the assistant, each a list of parts"
        ) from error
    first = tokenizer(behind, add_special_tokens=False).input_ids[:1]
    return first[0] if first and first[0] in tokenizer.get_added_vocab().values() else tokenizer.eos_token_id


def pictures(source: Path | Clip) -> list[Image.Image]:
    """An image, or the frames of a clip: not every template knows videos.

    Raises:
        ElvaDataError: missing, truncated, too large, or neither image nor video; names the file.
    """
    if isinstance(source, Clip):
        return [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in frames.read(source).pixels]
    return [images.open_image(source)]


def left_padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    """(B, L) int64 of B rows that end together.

    >>> left_padded([[1, 2], [3]], 0)
    tensor([[1, 2],
            [0, 3]])
    """
    length = max(map(len, rows))
    return torch.tensor([[*[filler] * (length - len(row)), *row] for row in rows])


def read(
    model, processor, chats: Sequence[list[dict]], endings: Sequence[Sequence[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Arguments of `model.model` for chats that end in the assistant's header, each followed by its ending.

    Args:
        chats: B of them, messages of transformers with pictures in them. endings: token ids, as many as there
            are chats.

    Returns:
        input_ids, attention_mask (B, L), left-padded; position_ids (..., B, L); pixels and what else the
        processor makes.
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
    # the one place where transformers says how positions are counted, M-RoPE or not; `check` guards it
    given["position_ids"] = model._prepare_position_ids_for_generation(given["input_ids"], given)
    return given


def _followed(given, endings: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """What is said of each token, (B, L), with endings and padded anew; a token of an ending is text."""
    out, present = {}, given["attention_mask"].bool()
    for name in (name for name in PER_TOKEN if name in given):
        filler = pad_id if name == "input_ids" else 0
        ends = endings
        if name != "input_ids":
            ends = [[int(name == "attention_mask")] * len(ending) for ending in endings]
        rows = zip(given[name], present, ends, strict=True)
        out[name] = left_padded([[*row[mask].tolist(), *end] for row, mask, end in rows], filler)
    return out


def check(model, processor, name: str, banned: Sequence[int]) -> None:
    """Compares logits of a text and a picture, in a padded batch and in pieces on a cache, with `generate`.

    In bfloat16 only gross errors stand out from rounding; float32 shows the finer ones.

    Args:
        name: of the model, for messages. banned: token ids that nothing here samples, placeholders of images
            among them.

    Raises:
        ValueError: the model cannot be read so, or has a cache that rollouts cannot share, or its logits are
            others than those of transformers, which reads each chat alone.
    """
    kind = model.config.model_type
    try:
        expected, ways = _logits(model, processor, banned)
    except Exception as error:  # whatever a model of a kind that nobody has tried stumbles over
        raise ValueError(
            f"{name}, a {kind}, cannot be read by its own processor and forward: "
            f"{type(error).__name__}: {error}"
        ) from error
    for way, logits in ways.items():
        off = float((logits.float() - expected).abs().max() / expected.std())
        if not off <= LIMITS[model.dtype]:
            raise ValueError(
                f"{name}, a {kind}, gives other logits {way} than in transformers' generate: off by "
                f"{off:.2g} of their standard deviation, {LIMITS[model.dtype]:.2g} is rounding; it cannot be "
                "trained here as it is"
            )


@torch.no_grad()
def _logits(model, processor, banned: Sequence[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits (2, WRITTEN, V) of what transformers writes after two chats: by `generate`, and in our ways."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8))
    text = {"type": "text", "text": "What is this?"}
    chats = [
        [{"role": "user", "content": content}]
        for content in ([text], [{"type": "image", "image": picture}, text])
    ]
    # the model's own generation_config might ask for sampling or penalties
    greedy = GenerationConfig(
        max_new_tokens=WRITTEN,
        min_new_tokens=WRITTEN,
        do_sample=False,
        suppress_tokens=list(banned),
        pad_token_id=processor.tokenizer.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    alone = []
    for chat in chats:
        inputs = read(model, processor, [chat])
        del inputs["position_ids"]
        alone.append(model.generate(**inputs, generation_config=greedy))
    expected = torch.stack([torch.cat(out.logits) for out in alone]).float()
    written = [out.sequences[0, -WRITTEN:-1].tolist() for out in alone]

    # all but the last written token are read again, in whole rows and on the cache of the prompts
    whole = model.model(**read(model, processor, chats, written), use_cache=False).last_hidden_state
    prefix = prefill(model, read(model, processor, chats), rollouts=1)
    ids = torch.tensor(written, device=model.device).repeat_interleave(2, dim=0)
    place = fixed(model, prefix, 2, WRITTEN) if can_be_fixed(prefix) else None
    words, valid = model.get_input_embeddings()(ids), torch.ones_like(ids, dtype=torch.bool)
    single = [read_next(model, place, words[:, i], valid[:, i]) for i in range(WRITTEN - 1) if place]
    prefix = repeated(prefix, 2)
    states = advance(model, prefix, ids, valid)
    pieces = torch.cat([prefix.last[:, None], states], dim=1)
    ways = {
        "in a padded batch": whole[:, -WRITTEN:],
        "on the cache of a prompt": pieces[::2],
        "of a second rollout": pieces[1::2],
    }
    if place:
        ways["a token at a time"] = torch.stack([prefix.last, *single], dim=1)[1::2]
    head = model.get_output_embeddings()
    return expected, {way: head(states) for way, states in ways.items()}
