"""Model inputs from chats, by a model's own template and processor, and a check of its forward.

How an image becomes tokens, what else the layers are told about it, and how positions are counted is left to
the model's own code; here rows get endings and are padded on the left. What holds of every model that we know
need not hold of the next, so `check` compares with `generate` of transformers before a model is used.

    chats = [chat.prepared(processor, messages, names)]
    given = chat.read(model, processor, chats, endings, features={})
    states = model.model(**given).last_hidden_state
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from elva_core.data import frames, images
from elva_core.data.frames import Clip
from elva_core.data.items import Item
from elva_core.models.prefix import advance, can_be_fixed, fixed, prefill, read_next, repeated
from elva_core.models.vision import moved

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


@dataclass(slots=True)
class Chat:
    """A chat that ends in the assistant's header, as its processor makes it.

    tokens: what is said of each token, (n,). pictures: what else the processor makes, for the tower and for
    positions. names: what the pictures are known by.
    """

    tokens: dict[str, torch.Tensor]
    pictures: dict[str, torch.Tensor]
    names: tuple[Hashable, ...]


def prepared(processor, messages: list[dict], names: tuple[Hashable, ...]) -> Chat:
    """A chat from messages of transformers with pictures in them; on the CPU."""
    made = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = {name: made.pop(name)[0] for name in PER_TOKEN if name in made}
    return Chat(tokens, dict(made), names)


def read(
    model,
    processor,
    chats: Sequence[Chat],
    endings: Sequence[Sequence[int]] | None,
    features: dict[tuple, ModelOutput],
) -> dict:
    """Arguments of `model.model` for chats, each followed by its ending.

    Args:
        endings: token ids, as many as there are chats. features: what the tower made of pictures, by their
            names; those that are missing are computed and put there, and their pixels dropped.

    Returns:
        input_ids, attention_mask (B, L), left-padded; position_ids (..., B, L); what the tower made of the
        pictures, or, for a model that cannot be given that, the pictures.
    """
    given = _padded([chat.tokens for chat in chats], endings, processor.tokenizer.pad_token_id)
    given = {name: values.to(model.device) for name, values in given.items()}
    shown, looked = [chat for chat in chats if chat.names], {}
    if shown and "mm_encoder_outputs" in signature(model.model.forward).parameters:
        looked = {"mm_encoder_outputs": {"image": _look(model, shown, features)}}
    pictures = _stacked(chats, model)
    # the one place where transformers says how positions are counted, M-RoPE or not; `check` guards it
    positions = model._prepare_position_ids_for_generation(given["input_ids"], given | pictures)
    return {**given, **(looked or pictures), "position_ids": positions}


def _padded(
    rows: Sequence[dict[str, torch.Tensor]], endings: Sequence[Sequence[int]] | None, pad_id: int
) -> dict[str, torch.Tensor]:
    """The fields of each token, (B, L), with endings; a token of an ending is text."""
    out = {}
    for name in rows[0]:
        filler = pad_id if name == "input_ids" else 0
        ends = endings or [[]] * len(rows)
        if name != "input_ids":
            ends = [[int(name == "attention_mask")] * len(ending) for ending in ends]
        out[name] = left_padded(
            [[*row[name].tolist(), *end] for row, end in zip(rows, ends, strict=True)], filler
        )
    return out


def _stacked(chats: Sequence[Chat], model) -> dict[str, torch.Tensor]:
    """The pictures of all chats, by the names of arguments, with zeros behind those that have fewer tiles."""
    out = {}
    for name in dict.fromkeys(name for chat in chats for name in chat.pictures):
        parts = [chat.pictures[name] for chat in chats if name in chat.pictures]
        most = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        behind = [
            [x for a, b in zip(most, p.shape[1:], strict=True) for x in (a - b, 0)][::-1] for p in parts
        ]
        whole = torch.cat([torch.nn.functional.pad(p, b) for p, b in zip(parts, behind, strict=True)])
        out[name] = moved(whole.to(model.dtype) if whole.is_floating_point() else whole, model.device)
    return out


@torch.no_grad()
def _look(model, chats: Sequence[Chat], features: dict[tuple, ModelOutput]) -> ModelOutput:
    """The tower's output for chats' pictures; those that `features` lacks are computed in one call."""
    new = {chat.names: chat for chat in chats if chat.names not in features}
    if new:
        names = signature(model.model.get_image_features).parameters
        given = {name: x for name, x in _stacked(list(new.values()), model).items() if name in names}
        out = model.model.get_image_features(**given, return_dict=True)
        # a picture's features are as many as its placeholders; only these two of the output are read
        counts = [int((c.tokens["input_ids"] == model.config.image_token_id).sum()) for c in new.values()]
        pooled = _split(out.pooler_output, counts)
        layers = [_split(layer, counts) for layer in out.get("deepstack_features") or ()]
        for place, name in enumerate(new):
            deeper = {"deepstack_features": [layer[place] for layer in layers]} if layers else {}
            features[name] = type(out)(pooler_output=pooled[place], **deeper)
    for chat in chats:
        chat.pictures = {name: x for name, x in chat.pictures.items() if not name.startswith("pixel")}
    shown = [features[chat.names] for chat in chats]
    return type(shown[0])(**{name: _joined([output[name] for output in shown]) for name in shown[0]})


# Features are a list of tensors (n, D) or, in other families, one tensor (pictures, n, D); deeper layers' are
# a list of either.
def _split(features, counts: list[int]) -> list:
    if isinstance(features, torch.Tensor):
        return [part[None] for part in features.reshape(-1, features.shape[-1]).split(counts)]
    return [[part] for part in torch.cat(list(features)).split(counts)]


def _joined(parts: list):
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, dim=1)
    if isinstance(parts[0][0], torch.Tensor):
        return [torch.cat([x for part in parts for x in part])]
    return [_joined(list(layers)) for layers in zip(*parts, strict=True)]


class Reader:
    """Items as arguments of a model that is read by its own processor.

    Args:
        messages: (item, request) -> a chat in messages of transformers, with pictures in them.
    """

    def __init__(self, model, processor, messages: Callable[[Item, str], list[dict]]) -> None:
        self.model, self.processor, self._messages = model, processor, messages
        self.ahead = None  # elva_core.models.ahead.Ahead while chats are made ready ahead
        self._chats: dict[tuple[Item, str], Chat] | None = None  # set within a step
        self._features: dict[tuple, ModelOutput] | None = None

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Within it a picture is opened once, and the tower sees it once, if the model can be told."""
        self._chats, self._features = {}, {}
        try:
            yield
        finally:
            self._chats = self._features = None

    def batch(
        self,
        items: Sequence[Item],
        request: str,
        endings: Sequence[Sequence[int]] | None,
    ) -> dict:
        """Model inputs of items and a request, by `read`."""
        chats, features = ({}, {}) if self._chats is None else (self._chats, self._features)
        for item in dict.fromkeys(items):
            if (item, request) not in chats:
                made = self.ahead.take((item, request)) if self.ahead else None
                chats[item, request] = made or self.prepared((item, request))
        asked = [chats[item, request] for item in items]
        return read(self.model, self.processor, asked, endings, features)

    def keys(self, items: Sequence[Item], request: str) -> list[tuple[Item, str]]:
        """Keys of what workers make ready for items: the chats of those with pictures."""
        return [(item, request) for item in dict.fromkeys(items) if item.images or item.clips]

    def prepared(self, key: tuple[Item, str]) -> Chat:
        """A chat made ready, in a worker or here."""
        item, request = key
        names = tuple(part for part in item.parts if not isinstance(part, str))
        return prepared(self.processor, self._messages(item, request), names)


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
        prepared(processor, [{"role": "user", "content": content}], ("a picture",) * (len(content) - 1))
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
        inputs = {name: values[None].to(model.device) for name, values in chat.tokens.items()}
        alone.append(model.generate(**inputs, **_stacked([chat], model), generation_config=greedy))
    expected = torch.stack([torch.cat(out.logits) for out in alone]).float()
    written = [out.sequences[0, -WRITTEN:-1].tolist() for out in alone]

    # all but the last written token are read again, in whole rows and on the cache of the prompts
    features: dict[tuple, ModelOutput] = {}
    inputs = read(model, processor, chats, written, features)
    whole = model.model(**inputs, use_cache=False).last_hidden_state
    prefix = prefill(model, read(model, processor, chats, None, features), rollouts=1)
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
