"""A vision-language model as an embedder: prompts, token batches, the [RET] token, LoRA, vision features, loading and saving.

Two ways to an embedding, both the state of the last position after the final norm, L2-normalised:

* EOL (stages 1 and 2): the prompt asks for one word, the state of the prompt's last token is the embedding.
* generative (ELVA): the prompt asks for a summary that ends in [RET], the state at [RET] is the embedding.

Batches are left-padded, so the last position of every row is the one that counts. Into a prompt of Qwen2-VL or Qwen2.5-VL the
features of their frozen tower are spliced, which can be kept; any other model is read as its own processor says.

    encoder = encoder.load(DIR)
    vectors = encoder.embed_eol([Item("A dog.")])
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor.experimental import implicit_replication
from transformers import AutoModelForImageTextToText, AutoProcessor

from elva_core import files, sharding
from elva_core.config import EncoderSettings, LoraSettings
from elva_core.data.frames import Clip
from elva_core.data.frames import read as read_clip
from elva_core.data.images import open_image
from elva_core.data.items import Item
from elva_core.models import chat
from elva_core.models.tower import quicken

POOLING = "last position, L2-normalised"
# Whose features can be spliced: one token stands for an image in the prompt, and the tower speaks to the first layer only
SPLICED = ("qwen2_vl", "qwen2_5_vl")
TEMPLATES = ("summary", "eol")  # the two ways, as elva.json and the command line name them
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# What the chat template of Qwen2-VL makes of a video; as text it also passes through templates that know images alone
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
CLIPS_AT_ONCE = (
    8  # that the vision tower sees in one call: of 12 frames, three quarters of what 64 images take
)


class Seen(NamedTuple):
    """What the vision tower makes of an image or a clip. features: (n, D). grid: (3,) patches in time, height, width.
    seconds: from one step in time to the next; an image has one step."""

    features: torch.Tensor
    grid: torch.Tensor
    seconds: float = 1.0


@dataclass(slots=True)
class Batch:
    """Left-padded token rows with everything the model needs.

    input_ids, mask: (B, L) int64. positions: (..., B, L), M-RoPE's three or four numbers first where the model has them.
    given: what it reads there, by the names of its arguments: `inputs_embeds` (B, L, D) that hold the images already, or
    `input_ids` with pixels.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    given: dict[str, torch.Tensor]


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
        self.splices = self.backbone.config.model_type in SPLICED
        if self.splices:
            quicken(self.backbone.model.visual)
        # (pixels, grids) -> pixels; set only while a small backbone is taught, whose tower then sees every image anew
        self.augment: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self._vision: dict[Path | Clip, Seen] = {}
        self._pixels: dict[Path, tuple[torch.Tensor, torch.Tensor]] = {}
        tokenizer = processor.tokenizer
        self.ret_id = tokenizer.convert_tokens_to_ids(settings.ret_token)
        if self.ret_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"{settings.ret_token} is not in the vocabulary; encoder.add_ret_token() puts it there"
            )
        self.end_id = chat.end_of_turn(processor)
        self.pad_id = tokenizer.pad_token_id
        self.banned_ids = banned_ids(tokenizer, self.end_id, self.vocabulary_rows)
        special = {*tokenizer.all_special_tokens, *processor.all_special_multimodal_tokens}
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))

    @property
    def device(self) -> torch.device:
        return self.backbone.get_input_embeddings().weight.device

    @property
    def backbone(self):
        """The transformers model, without PEFT's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def vocabulary_rows(self) -> int:
        return self.backbone.config.get_text_config().vocab_size

    def prompts(self, items: Sequence[Item], request: str) -> list[str]:
        """Chat prompts up to and including the assistant's header; order: the item's parts, if the template keeps it, then the request."""
        return [
            self.processor.apply_chat_template(self._chat(item, request), add_generation_prompt=True)
            for item in items
        ]

    def _chat(self, item: Item, request: str) -> list[dict]:
        *before, text = itertools.chain(*map(self._content, item.parts))
        text["text"] += "\n" + request.replace("{content}", item.content)
        return [{"role": "user", "content": [*before, text]}]

    def _content(self, part: str | Path | Clip) -> list[dict]:
        """A part as chat templates know it: a placeholder where features will be spliced, else the pictures themselves."""
        if isinstance(part, str):
            return [{"type": "text", "text": self._cut(part)}]
        if not self.splices:
            return [{"type": "image", "image": picture} for picture in chat.pictures(part)]
        return [{"type": "text", "text": CLIP} if isinstance(part, Clip) else {"type": "image"}]

    def _cut(self, text: str) -> str:
        text = self._special.sub(
            lambda found: f"{found[0][:1]} {found[0][1:]}", text
        )  # a text that names a placeholder is no image
        limit, tokenizer = self.settings.max_text_tokens, self.processor.tokenizer
        if len(text) <= limit:  # a token is never shorter than a character
            return text
        return tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:limit])

    def batch(
        self, items: Sequence[Item], request: str, endings: Sequence[Sequence[int]] | None = None
    ) -> Batch:
        """Token rows of prompts, each followed by its ending (for instance summary tokens and [RET])."""
        return (
            self._spliced(items, request, endings)
            if self.splices
            else self._processed(items, request, endings)
        )

    def _processed(
        self, items: Sequence[Item], request: str, endings: Sequence[Sequence[int]] | None
    ) -> Batch:
        given = chat.read(
            self.backbone, self.processor, [self._chat(item, request) for item in items], endings
        )
        mask, positions = given.pop("attention_mask"), given.pop("position_ids")
        return Batch(given["input_ids"], mask, positions, given)

    def _spliced(self, items: Sequence[Item], request: str, endings: Sequence[Sequence[int]] | None) -> Batch:
        images = self._seen([path for item in items for path in item.images], self._vision_features)
        videos = self._seen([clip for item in items for clip in item.clips], self._clip_features)
        rows = self._token_rows(items, request, images, videos)
        if endings is not None:
            rows = [row + list(ending) for row, ending in zip(rows, endings, strict=True)]
        ids = chat.left_padded(rows, self.pad_id).to(self.device)
        mask = chat.left_padded([[1] * len(row) for row in rows], 0).to(self.device)
        embeds, config = self.backbone.get_input_embeddings()(ids), self.backbone.config
        if not images and not videos:
            positions = (mask.cumsum(-1) - 1).clamp_min(0).expand(3, *ids.shape)
            return Batch(ids, mask, positions, {"inputs_embeds": embeds})
        kinds, grids = torch.zeros_like(ids, dtype=torch.int), []
        for kind, token, seen in ((1, config.image_token_id, images), (2, config.video_token_id, videos)):
            kinds[ids == token] = kind
            grids.append(torch.stack([s.grid for s in seen]).to(self.device) if seen else None)
            if seen:
                embeds = embeds.masked_scatter(
                    (kinds == kind)[..., None], torch.cat([s.features for s in seen]).to(embeds)
                )
        positions, _ = self.backbone.model.get_rope_index(
            ids,
            kinds,
            image_grid_thw=grids[0],
            video_grid_thw=grids[1],
            second_per_grid_ts=torch.tensor([s.seconds for s in videos]),  # only Qwen2.5-VL looks at them
            attention_mask=mask,
        )
        return Batch(ids, mask, positions, {"inputs_embeds": embeds})

    def _token_rows(
        self, items: Sequence[Item], request: str, images: Sequence[Seen], videos: Sequence[Seen]
    ) -> list[list[int]]:
        config, tokenizer = self.backbone.config, self.processor.tokenizer
        lengths = {config.image_token_id: iter(images), config.video_token_id: iter(videos)}
        rows = tokenizer(self.prompts(items, request), add_special_tokens=False).input_ids
        return [
            [i for t in row for i in ([t] * len(next(lengths[t]).features) if t in lengths else [t])]
            for row in rows
        ]

    def _seen(self, wanted: Sequence[Path | Clip], look: Callable[[Sequence], list[Seen]]) -> list[Seen]:
        """Images or clips in their order; what a frozen tower made of them is kept."""
        missing = [w for w in dict.fromkeys(wanted) if w not in self._vision]
        fresh = dict(zip(missing, look(missing), strict=True))
        if self.settings.cache_vision and not self.augment:
            self._vision.update(fresh)
        return [fresh[w] if w in fresh else self._vision[w] for w in wanted]

    def _vision_features(self, paths: Sequence[Path]) -> list[Seen]:
        out = []
        for start in range(0, len(paths), 64):
            pixels, grids = self.pixels(paths[start : start + 64])
            with torch.no_grad():
                features = self.backbone.model.get_image_features(pixels, grids).pooler_output
            out += map(Seen, features, grids)
        return out

    def _clip_features(self, wanted: Sequence[Clip]) -> list[Seen]:
        out, processor = [], self.processor.video_processor
        for start in range(0, len(wanted), CLIPS_AT_ONCE):
            frames = [read_clip(clip) for clip in wanted[start : start + CLIPS_AT_ONCE]]
            videos = [torch.from_numpy(f.pixels) for f in frames]
            # frames are never that many that their number should make them smaller
            inputs = processor(
                videos, do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt"
            ).to(self.device)
            with torch.no_grad():
                features = self.backbone.model.get_video_features(
                    inputs.pixel_values_videos, inputs.video_grid_thw
                ).pooler_output
            seconds = [processor.temporal_patch_size / f.sampled_rate for f in frames]
            out += map(Seen, features, inputs.video_grid_thw, seconds)
        return out

    def pixels(self, paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch rows (patches, values) and grids (images, 3); rows are kept while the tower sees images again and again."""
        if not self.augment:
            pixels, grids = self._patches(paths)
            return pixels.to(self.device), grids.to(self.device)
        if missing := [p for p in dict.fromkeys(paths) if p not in self._pixels]:
            pixels, grids = self._patches(missing)
            rows = pixels.bfloat16().split(grids.prod(-1).tolist())  # half the memory of what is kept
            self._pixels.update(zip(missing, zip(rows, grids, strict=True), strict=True))
        found = [self._pixels[p] for p in paths]
        pixels, grids = (
            torch.cat([r for r, _ in found]).float().to(self.device),
            torch.stack([g for _, g in found]).to(self.device),
        )
        return self.augment(pixels, grids), grids

    def _patches(self, paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.processor.image_processor([open_image(p) for p in paths], return_tensors="pt")
        return inputs.pixel_values, inputs.image_grid_thw

    def states(self, batch: Batch, cache=None) -> torch.Tensor:
        """States after the final norm, (B, L, D)."""
        return self.backbone.model(
            **batch.given,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Next-token logits in float32; tokens that must never be sampled get -inf. (..., D) -> (..., V)"""
        logits = self.backbone.get_output_embeddings()(states).float()
        return logits.index_fill(-1, self.banned_ids.to(logits.device), float("-inf"))

    def embed_eol(self, items: Sequence[Item]) -> torch.Tensor:
        """EOL embeddings (B, D), float32, L2-normalised, with gradient."""
        return normalised(self.states(self.batch(items, self.settings.eol_request))[:, -1])

    def embed_summaries(
        self, items: Sequence[Item], summaries: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings at [RET] after given summaries, and how well the model writes these summaries.

        Returns:
            (B, D) float32, L2-normalised; mean cross-entropy of the summary tokens and the end of turn. With gradient.
        """
        states = self.states(
            self.batch(items, self.settings.summary_request, [[*s, self.ret_id] for s in summaries])
        )
        width = max(map(len, summaries)) + 1
        labels = chat.left_padded([[*s, self.end_id] for s in summaries], -100).to(states.device)
        wanted = labels != -100
        logits = self.logits(states[:, -width - 1 : -1][wanted])
        return normalised(states[:, -1]), torch.nn.functional.cross_entropy(logits, labels[wanted])

    def add_lora(self, lora: LoraSettings, *, seed: int) -> None:
        """A fresh adapter on the language model's linear layers, and the [RET] row trainable; all else frozen."""
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

    def merge_lora(self) -> None:
        """Folds the adapter into the weights; the next stage starts a fresh one on the merged model."""
        with implicit_replication():  # a slice of the weights takes its part of the sum
            self.model = self.model.merge_and_unload()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def adapting(
        self, lora: LoraSettings, *, seed: int, checkpointing: bool
    ) -> Iterator[dict[str, torch.nn.Parameter]]:
        """`with encoder.adapting(...) as parameters`: a fresh adapter in training mode, folded into the weights at the end.

        A run that is stopped keeps the adapter as it was.
        """
        self.add_lora(lora, seed=seed)
        self.backbone.get_decoder().train()  # not the tower, which is frozen: one with batch statistics would move
        if checkpointing:
            self.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        yield self.trainable()
        self.merge_lora()
        self.model.eval()
        if checkpointing:
            self.backbone.gradient_checkpointing_disable()

    def forgetful(self) -> Encoder:
        """The same model without the memory of images: their files are gone, or changed, at the next call, or shall be paid for."""
        settings = self.settings.model_copy(update={"cache_vision": False})
        return Encoder(self.model, self.processor, settings, self.source, self.template)

    def forget(self) -> None:
        """Drops the vision features that were kept: the next batch pays for its images, as one that nobody has seen."""
        self._vision.clear()

    def save(
        self,
        folder: Path,
        *,
        stage: str,
        parent: str,
        weights: dict[str, torch.Tensor] | None = None,
        template: str = "summary",
    ) -> None:
        """Safetensors, processor and elva.json (prompts, pooling, template, stage, and the models it came from).

        Args:
            parent: folder or hub name of the model that training started from; a folder is recorded by its hash alone.
            weights: of a sharded model, from `sharding.full_state_dict`.
            template: the way it wants to be read, "summary" or "eol".
        """
        self.model.save_pretrained(folder, state_dict=weights)
        self.processor.save_pretrained(folder)
        card = {"encoder": self.settings.model_dump(), "pooling": POOLING, "template": template}
        card |= {"stage": stage, "parents": lineage(parent)}
        (folder / "elva.json").write_text(json.dumps(card, indent=1, sort_keys=True) + "\n")


def lineage(parent: str | Path) -> list[dict[str, str]]:
    """The models behind one that starts from `parent`, oldest first; no path among them.

    Returns:
        {"stage", "sha256" of the weights} of a folder; {"hub", "sha256"} of a name like owner/model, whose weights are those
        of the hub's copy on this machine.
    """
    folder, name = Path(parent), {}
    if not folder.is_dir():
        if not HUB_NAME.fullmatch(str(parent)):
            return []
        copy = try_to_load_from_cache(str(parent), "config.json")
        folder, name = Path(copy).parent if isinstance(copy, str) else None, {"hub": str(parent)}
    if folder is None:
        return [name]
    card = json.loads((folder / "elva.json").read_text()) if (folder / "elva.json").is_file() else {}
    weights = "".join(
        f"{path.name} {files.file_hash(path)}\n" for path in sorted(folder.glob("*.safetensors"))
    )
    own = {"stage": card.get("stage", "backbone"), "sha256": hashlib.sha256(weights.encode()).hexdigest()}
    return [*card.get("parents", []), own | name]


def lora_targets(model) -> str:
    """Every linear layer of the language model, as PEFT's `target_modules`."""
    decoder = model.get_decoder()
    (path,) = [name for name, module in model.named_modules() if module is decoder]
    names = {
        name.rpartition(".")[-1]
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return rf"{re.escape(path)}\.(.*\.)?({'|'.join(sorted(names))})"


def banned_ids(tokenizer, end_id: int, rows: int) -> torch.Tensor:
    """Ids the policy must never sample: every special token but the end of turn, and the spare rows.

    A sampled vision placeholder would make the next forward fail on a token/feature mismatch; [RET] is appended
    by us and is no action.
    """
    special = {token_id for token_id in tokenizer.get_added_vocab().values() if token_id != end_id}
    return torch.tensor(sorted(special | set(range(len(tokenizer), rows))), dtype=torch.long)


def normalised(states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(states.float(), dim=-1)


def load(
    folder: str | Path,
    settings: EncoderSettings | None = None,
    *,
    dtype: str = "float32",
    device: str = "cpu",
) -> Encoder:
    """An encoder from a folder written by `Encoder.save` or from a checkpoint of any vision-language model with a chat template.

    Args:
        settings: the prompts; None takes those of the folder's elva.json.

    Raises:
        FileNotFoundError: no elva.json and no settings.
        ValueError: elva.json wants to be read in a way that is not known here; the model has no chat template, no token for padding, no
            room for [RET], or does not pass `chat.check`.
    """
    path = Path(folder) / "elva.json"
    card = json.loads(path.read_text()) if path.is_file() else {}
    template = card.get("template", "summary")
    if template not in TEMPLATES:
        raise ValueError(
            f"{path}: template {template!r} is none of {', '.join(TEMPLATES)}; correct it, or save the model again"
        )
    if settings is None:
        if not card:
            raise FileNotFoundError(
                f"{path} is missing: pass settings, or a folder that a training stage wrote"
            )
        settings = EncoderSettings.model_validate(card["encoder"])
    processor = AutoProcessor.from_pretrained(folder)
    if not getattr(processor, "chat_template", None):  # before its weights are read
        raise ValueError(
            f"{folder} has no chat template; save one with its processor (processor.chat_template = ...)"
        )
    if processor.tokenizer.pad_token_id is None:
        raise ValueError(
            f"{folder} has no token for padding; save one with its tokenizer (tokenizer.pad_token = tokenizer.eos_token)"
        )
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    ).requires_grad_(False)
    if sharding.requested():  # before the device holds all of it
        sharding.shard(model.get_decoder())
    model.to(device).eval()
    if settings.ret_token not in processor.tokenizer.get_vocab():
        add_ret_token(model, processor.tokenizer, settings.ret_token)
    loaded = Encoder(model, processor, settings, str(folder), template)
    if not loaded.splices:
        chat.check(model, processor, str(folder), loaded.banned_ids.tolist())
    elif settings.max_pixels:
        for images in (
            processor.image_processor,
            processor.video_processor,
        ):  # a frame is as large as an image
            images.size = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    return loaded


@torch.no_grad()
def add_ret_token(model, tokenizer, token: str) -> None:
    """Puts [RET] on a spare vocabulary row, started from the mean of the used rows. The matrix is never resized.

    Raises:
        ValueError: the matrix has no spare row.
    """
    used, rows = len(tokenizer), model.get_input_embeddings().weight
    if used >= len(rows):
        raise ValueError(
            f"the embedding matrix has {len(rows)} rows for {used} tokens: no spare row for {token}; give the model some with transformers "
            f"(model.resize_token_embeddings({used + 1}, pad_to_multiple_of=64)) and save it"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    rows[used] = rows[:used].mean(0)
