"""A vision-language model as an embedder: prompts, token batches, the [RET] token, LoRA, loading and saving.

Two ways to an embedding, both the state of the last position after the final norm, L2-normalised:

* EOL (stages 1 and 2): the prompt asks for one word, the state of the prompt's last token is the embedding.
* generative (ELVA): the prompt asks for a summary that ends in [RET], the state at [RET] is the embedding.

Batches are left-padded, so the last position of every row is the one that counts. Into a prompt of Qwen2-VL
or Qwen2.5-VL the features of their frozen tower are spliced (vision.py); any other model is read as its own
processor says (chat.py).

    encoder = encoder.load(DIR)
    vectors = encoder.embed_eol([Item("A dog.")])
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor.experimental import implicit_replication
from transformers import AutoModelForImageTextToText, AutoProcessor

from elva_core import sharding
from elva_core.config import EncoderSettings
from elva_core.data.frames import Clip
from elva_core.data.items import Item
from elva_core.models import chat
from elva_core.models.arithmetic import ATTENTION, float32_logits, keep_inputs, mixed
from elva_core.models.lineage import lineage
from elva_core.models.vision import SPLICED, Vision, VisionFeatures
from elva_core.models.vocabulary import add_ret_token, banned_ids
from elva_core.training_settings import AdapterSettings, LoraSettings

POOLING = "last position, L2-normalised"
TEMPLATES = ("summary", "eol")  # the two ways, as elva.json and the command line name them
# Qwen2-VL's chat template makes this of a video; as text it passes through templates that know images alone
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"


@dataclass(slots=True)
class Batch:
    """Left-padded token rows with everything the model needs.

    input_ids, mask: (B, L) int64. positions: (..., B, L), M-RoPE's three or four numbers first where it has
    them. given: what the model reads there, by the names of arguments: `inputs_embeds` (B, L, D) that hold
    the images already, or `input_ids` with pixels.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    given: dict[str, torch.Tensor]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """All that the model is given, by the names of its arguments."""
        return {**self.given, "attention_mask": self.mask, "position_ids": self.positions}


class Encoder:
    """A vision-language model of transformers with its processor and the prompts of `EncoderSettings`."""

    def __init__(
        self, model, processor, settings: EncoderSettings, source: str = "", template: str = "summary"
    ) -> None:
        self.source = source  # folder or hub name that it was loaded from
        self.template = template  # the way it was trained to be read
        self.model = model
        self.processor = processor
        self.settings = settings
        # what is spliced into prompts; None for a model that is read by its own processor
        self.vision: Vision | None = None
        if self.backbone.config.model_type in SPLICED:
            self.vision = Vision(self.backbone, processor, keep=settings.cache_vision)
        self.reader = chat.Reader(self.backbone, processor, self._chat)
        tokenizer = processor.tokenizer
        self.ret_id = tokenizer.convert_tokens_to_ids(settings.ret_token)
        if self.ret_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"{settings.ret_token} is not in the vocabulary; encoder.add_ret_token() puts it there"
            )
        self.end_id = chat.end_of_turn(processor)
        self.pad_id = tokenizer.pad_token_id
        self.banned_ids = banned_ids(tokenizer, self.end_id, self.vocabulary_rows).to(self.device)
        special = {*tokenizer.all_special_tokens, *processor.all_special_multimodal_tokens}
        self._placeholders = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        # of all batches so far, without (on the device) and with their padding
        self.tokens_read, self.places_read = torch.zeros((), dtype=torch.int64), 0

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def backbone(self):
        """The transformers model, without PEFT's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def vocabulary_rows(self) -> int:
        return self.backbone.config.get_text_config().vocab_size

    def prompts(self, items: Sequence[Item], request: str) -> list[str]:
        """Chat prompts up to and including the assistant's header: the item's parts, then the request."""
        chats = [self._chat(item, request) for item in items]
        return self.processor.apply_chat_template(chats, add_generation_prompt=True)

    def _chat(self, item: Item, request: str) -> list[dict]:
        turns, system = [], self.settings.system_prompt
        if system is not None:
            turns = [{"role": "system", "content": self._content(item.instruction or system)}]
            item = item.without_instruction
        *before, text = itertools.chain(*map(self._content, item.parts))
        written = text["text"] + "\n" + request.replace("{content}", item.content)
        text["text"] = written.strip() if turns else written
        return [*turns, {"role": "user", "content": [*before, text]}]

    def _content(self, part: str | Path | Clip) -> list[dict]:
        """A part as chat templates know it: a placeholder where features are spliced, else the pictures."""
        if isinstance(part, str):
            return [{"type": "text", "text": self._cut(part)}]
        if not self.vision:
            return [{"type": "image", "image": picture} for picture in chat.pictures(part)]
        return [{"type": "text", "text": CLIP} if isinstance(part, Clip) else {"type": "image"}]

    def _cut(self, text: str) -> str:
        # a text that names a placeholder is no image
        text = self._placeholders.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)
        limit, tokenizer = self.settings.max_text_tokens, self.processor.tokenizer
        if len(text) <= limit:  # a token is never shorter than a character
            return text
        return tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:limit])

    def batch(
        self, items: Sequence[Item], request: str, endings: Sequence[Sequence[int]] | None = None
    ) -> Batch:
        """Token rows of prompts, each followed by its ending (for instance summary tokens and [RET])."""
        if self.vision:
            batch = self._spliced(items, request, endings)
        else:
            given = self.reader.batch(items, request, endings)
            batch = Batch(given["input_ids"], given.pop("attention_mask"), given.pop("position_ids"), given)
        self.tokens_read = self.tokens_read + batch.mask.sum()
        self.places_read += batch.mask.numel()
        return batch

    def _spliced(self, items: Sequence[Item], request: str, endings: Sequence[Sequence[int]] | None) -> Batch:
        backbone, config = self.backbone, self.backbone.config
        # what stands for the placeholder token of an image and of a clip, in the order of the prompts
        visual = {
            config.image_token_id: self.vision.images([path for item in items for path in item.images]),
            config.video_token_id: self.vision.clips([clip for item in items for clip in item.clips]),
        }
        rows = self._token_rows(items, request, visual)
        if endings is not None:
            rows = [row + list(ending) for row, ending in zip(rows, endings, strict=True)]
        ids = chat.left_padded(rows, self.pad_id).to(self.device)
        mask = chat.left_padded([[1] * len(row) for row in rows], 0).to(self.device)
        embeds = backbone.get_input_embeddings()(ids)
        if not any(visual.values()):
            positions = (mask.cumsum(-1) - 1).clamp_min(0).expand(3, *ids.shape)
            return Batch(ids, mask, positions, {"inputs_embeds": embeds})
        kinds, grids = torch.zeros_like(ids, dtype=torch.int), []
        for kind, (token, features) in enumerate(visual.items(), start=1):
            kinds[ids == token] = kind
            grids.append(torch.stack([f.grid for f in features]).to(self.device) if features else None)
            if features:
                values = torch.cat([f.features for f in features]).to(embeds)
                embeds = embeds.masked_scatter((kinds == kind)[..., None], values)
        positions, _ = backbone.model.get_rope_index(
            ids,
            kinds,
            image_grid_thw=grids[0],
            video_grid_thw=grids[1],
            # only Qwen2.5-VL looks at the seconds
            second_per_grid_ts=torch.tensor([f.seconds for f in visual[config.video_token_id]]),
            attention_mask=mask,
        )
        return Batch(ids, mask, positions, {"inputs_embeds": embeds})

    def _token_rows(
        self, items: Sequence[Item], request: str, visual: dict[int, list[VisionFeatures]]
    ) -> list[list[int]]:
        """Prompts in which a placeholder token stands as often as its image or clip has features."""
        features = {token: iter(of_token) for token, of_token in visual.items()}
        rows = self.processor.tokenizer(self.prompts(items, request), add_special_tokens=False).input_ids

        def repeated(token: int) -> list[int]:
            return [token] * len(next(features[token]).features) if token in features else [token]

        return [list(itertools.chain(*map(repeated, row))) for row in rows]

    def states(self, batch: Batch) -> torch.Tensor:
        """States after the final norm, (B, L, D)."""
        with mixed(self.backbone):
            return self.backbone.model(**batch.inputs, use_cache=False).last_hidden_state

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Next-token logits in float32; tokens that must never be sampled get -inf. (..., D) -> (..., V)"""
        logits = float32_logits(self.backbone.get_output_embeddings(), states)
        return logits.index_fill(-1, self.banned_ids.to(logits.device), float("-inf"))

    def embed_eol(self, items: Sequence[Item]) -> torch.Tensor:
        """EOL embeddings (B, D), float32, L2-normalised, with gradient."""
        return normalised(self.states(self.batch(items, self.settings.eol_request))[:, -1])

    def embed_summaries(
        self, items: Sequence[Item], summaries: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings at [RET] after given summaries, and how well the model writes these summaries.

        Returns:
            (B, D) float32, L2-normalised; mean cross-entropy of summaries and ends of turn. With gradient.
        """
        endings = [[*summary, self.ret_id] for summary in summaries]
        states = self.states(self.batch(items, self.settings.summary_request, endings))
        labels = chat.left_padded([[*s, self.end_id] for s in summaries], -100).to(states.device)
        written = labels != -100
        # a token is written from the state before it; the last state is that of [RET]
        logits = self.logits(states[:, -labels.shape[1] - 1 : -1][written])
        state = states[:, -1 if self.settings.read_out == "ret" else -2]
        return normalised(state), torch.nn.functional.cross_entropy(logits, labels[written])

    def add_lora(self, lora: LoraSettings, *, seed: int) -> None:
        """Puts a fresh adapter on the language model's linear layers; it and the [RET] row alone train."""
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora_targets(self.backbone),
            trainable_token_indices={"embed_tokens": [self.ret_id]},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = get_peft_model(self.model, config)
        if self.backbone.dtype == torch.bfloat16:
            keep_inputs(self.model)

    def merge_lora(self) -> None:
        """Folds the adapter into the weights; the next stage starts a fresh one on the merged model."""
        with implicit_replication():  # a slice of the weights takes its part of the sum
            self.model = self.model.merge_and_unload()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def adapting(self, settings: AdapterSettings, *, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
        """A fresh adapter in training mode, folded into the weights at the end: `with ... as parameters`.

        A run that is stopped keeps the adapter as it was.
        """
        self.add_lora(settings.lora, seed=seed)
        # not the tower, which is frozen: one with batch statistics would move
        self.backbone.get_decoder().train()
        if settings.gradient_checkpointing:
            self.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        yield self.trainable()
        self.merge_lora()
        self.model.eval()
        if settings.gradient_checkpointing:
            self.backbone.gradient_checkpointing_disable()

    def forgetful(self) -> Encoder:
        """The same model that keeps no vision features: files may be gone, or changed, at the next call."""
        settings = self.settings.model_copy(update={"cache_vision": False})
        return Encoder(self.model, self.processor, settings, self.source, self.template)

    def one_step(self) -> AbstractContextManager[None]:
        """Around a step of training: the tower sees each image once."""
        return (self.vision or self.reader).one_step()

    def save(
        self,
        folder: Path,
        *,
        stage: str,
        parent: str,
        weights: dict[str, torch.Tensor] | None = None,
        template: str = "summary",
        dims: Sequence[int] = (),
    ) -> None:
        """Writes safetensors, processor and elva.json (prompts, pooling, template, stage, parents, dims).

        Args:
            parent: folder or hub name of the model that training started from; a folder is recorded by its
                hash alone.
            weights: of a sharded model, from `sharding.full_state_dict`.
            template: the way it wants to be read. dims: prefixes of its embeddings that are embeddings, too.
        """
        self.model.save_pretrained(folder, state_dict=weights)
        self.processor.save_pretrained(folder)
        card = {"encoder": self.settings.model_dump(), "pooling": POOLING, "template": template}
        card |= {"stage": stage, "parents": lineage(parent)} | ({"dims": list(dims)} if dims else {})
        (folder / "elva.json").write_text(json.dumps(card, indent=1, sort_keys=True) + "\n")


def lora_targets(model) -> str:
    """Every linear layer of the language model, as PEFT's `target_modules`."""
    decoder = model.get_decoder()
    (path,) = [name for name, module in model.named_modules() if module is decoder]
    linear = [name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    names = {name.rpartition(".")[-1] for name in linear}
    return rf"{re.escape(path)}\.(.*\.)?({'|'.join(sorted(names))})"


def normalised(states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(states.float(), dim=-1)


def load(
    folder: str | Path,
    settings: EncoderSettings | None = None,
    *,
    dtype: str = "float32",
    device: str = "cpu",
) -> Encoder:
    """An encoder from a folder of `Encoder.save` or from any vision-language model with a chat template.

    Args:
        settings: the prompts; None takes those of the folder's elva.json.

    Raises:
        FileNotFoundError: no elva.json and no settings.
        ValueError: elva.json wants to be read in a way that is not known here; the model has no chat
            template, no token for padding, no room for [RET], or does not pass `chat.check`.
    """
    path = Path(folder) / "elva.json"
    card = json.loads(path.read_text()) if path.is_file() else {}
    template = card.get("template", "summary")
    if template not in TEMPLATES:
        raise ValueError(
            f"{path}: template {template!r} is none of {', '.join(TEMPLATES)}; correct it, or "
            "save the model again"
        )
    if settings is None:
        if not card:
            raise FileNotFoundError(f"{path} is missing: pass settings, or a folder that a stage wrote")
        settings = EncoderSettings.model_validate(card["encoder"])
    processor = AutoProcessor.from_pretrained(folder)
    if not getattr(processor, "chat_template", None):  # before its weights are read
        raise ValueError(
            f"{folder} has no chat template; save one with its processor (processor.chat_template = ...)"
        )
    if processor.tokenizer.pad_token_id is None:
        raise ValueError(
            f"{folder} has no token for padding; save one with its tokenizer "
            "(tokenizer.pad_token = tokenizer.eos_token)"
        )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION)
    model.requires_grad_(False)
    if sharding.requested():  # before the device holds all of it
        sharding.shard(model.get_decoder())
    model.to(device).eval()
    if settings.ret_token not in processor.tokenizer.get_vocab():
        add_ret_token(model, processor.tokenizer, settings.ret_token)
    loaded = Encoder(model, processor, settings, str(folder), template)
    if not loaded.vision:
        chat.check(model, processor, str(folder), loaded.banned_ids.tolist())
    elif settings.max_pixels:
        # a frame is as large as an image
        size = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
        processor.image_processor.size = processor.video_processor.size = size
    return loaded
