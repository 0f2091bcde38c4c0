"""Models of real sizes with random weights, noise for pictures, made-up sentences, and the counters of a measurement.

Nothing is downloaded: speed and correctness do not depend on what the weights know. Random weights never end a summary, so every one
is as long as its cap.
"""

from __future__ import annotations

import json
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2Tokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from elva_core import config
from elva_core.data import mbeir
from elva_core.data.items import Item
from elva_core.experiments import sizes
from elva_core.models import encoder, small_models
from elva_core.models.arithmetic import ATTENTION
from elva_core.models.encoder import Encoder
from elva_core.training.contrastive import Pair
from elva_core.training.hard_negatives import TrainingQuery

SIDES = (341, 256)  # of a picture: about what UniIR resizes to
TEXT = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048}
SMALL = {
    # to compare with the CPU: heads as wide as the real ones, so that the same kernels run
    "check": (
        TEXT | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3},
        {"depth": 2, "embed_dim": 128, "num_heads": 2},
    ),
    # about the laptop's backbone
    "small": (
        TEXT | {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3},
        {"depth": 3, "embed_dim": 128, "num_heads": 4},
    ),
    # for tests of this script
    "tiny": (TEXT | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}, {"depth": 1, "embed_dim": 32, "num_heads": 2}),
}


@dataclass(frozen=True)
class Place:
    """Where and at what size a section runs."""

    device: str
    tiny: bool
    folder: Path  # for pictures and checkpoints

    @property
    def profile(self) -> config.Settings:
        """The 2B's profile, or values for seconds on a CPU."""
        profile = config.load("qwen2vl-2b").changed({"device": self.device})
        if not self.tiny:
            return profile
        few = {"batch": 8, "chunk": 4, "chunk_tokens": None}
        rl = {"queries_per_step": 2, "num_generations": 2, "negatives": {"hard": 2, "random": 2}}
        return profile.changed(
            {"encoder": {"max_summary_tokens": 4}, "stage1": few, "stage2": few, "stage3": rl, "evaluation": {"batch": 4}}
        )

    def synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def words(rng: random.Random, count: int) -> str:
    parts = ["ka", "lo", "mi", "ne", "pu", "ra", "si", "to", "ve", "wy"]
    return " ".join(rng.choice(parts) + rng.choice(parts) for _ in range(count))


def stock(place: Place, name: str, dtype: str, device: str | None = None, attention: str = "sdpa"):
    """(model, processor) of a hub name of params/plan.yaml or of SMALL, as transformers runs it, with random weights."""
    prompts, rng = place.profile.encoder, random.Random(0)
    small = SMALL.get("tiny" if place.tiny else name)
    values = sizes.known().architectures[name] if small is None else {"model_type": "qwen2_vl", "tie_word_embeddings": True}
    text, vision = small or (values["text_config"], values["vision_config"])
    tokenizer = _tokenizer([words(rng, 9) + prompts.eol_request + prompts.summary_request for _ in range(300)], text["vocab_size"])
    edges = {"shortest_edge": prompts.min_pixels, "longest_edge": prompts.max_pixels}
    images, videos = Qwen2VLImageProcessor(size=edges), Qwen2VLVideoProcessor(size=edges)
    processor = Qwen2VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=small_models.CHAT_TEMPLATE
    )
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tokens = {f"{what}_token_id": tokenizer.convert_tokens_to_ids(f"<|{what}_pad|>") for what in ("image", "video")}
    tokens |= {f"vision_{end}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>") for end in ("start", "end")}
    vision = {"mlp_ratio": 4, "patch_size": 14} | vision | {"hidden_size": text["hidden_size"]}
    configured = AutoConfig.for_model(**values | tokens | {"text_config": text | ends | {"rope_parameters": rope}, "vision_config": vision})
    torch.manual_seed(0)
    with torch.device(device or place.device):
        model = AutoModelForImageTextToText.from_config(configured, dtype=getattr(torch, dtype), attn_implementation=attention)
    encoder.add_ret_token(model, tokenizer, prompts.ret_token)
    return model.requires_grad_(False).eval(), processor


def _tokenizer(texts: list[str], rows: int) -> Qwen2Tokenizer:
    """A vocabulary that almost fills the rows, most of it never met."""
    taught = small_models.train_tokenizer(texts, 800)
    known = {token: i for token, i in taught.get_vocab().items() if token not in small_models.SPECIAL}
    known |= {f"unused{i}": i for i in range(len(known), rows - 64)}
    merges = [tuple(merge) for merge in json.loads(taught.backend_tokenizer.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=known, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    special = [AddedToken(token, special=True, normalized=False) for token in small_models.SPECIAL]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def embedder(place: Place, name: str, dtype: str, device: str | None = None) -> Encoder:
    """The same model as this package runs it."""
    return Encoder(*stock(place, name, dtype, device, ATTENTION), place.profile.encoder)


def vectors(count: int) -> np.ndarray:
    """(count, 256) float32 of unit length, in any direction."""
    drawn = np.random.default_rng(count).standard_normal((count, 256), dtype=np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def pictures(place: Place, count: int) -> list[Path]:
    """Different noise in each, as JPEG; kept."""
    folder, (width, height) = place.folder / "pictures", (64, 48) if place.tiny else SIDES
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (height * 2, width * 2, 3), dtype=np.uint8)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.is_file():  # the same in another process and in any order
            rng = np.random.default_rng([1, i])
            down, right = rng.integers(0, height), rng.integers(0, width)
            Image.fromarray(noise[down : down + height, right : right + width] ^ np.uint8(rng.integers(255))).save(path, quality=88)
    return paths


def items(place: Place, kind: str, count: int, seed: int = 0) -> list[Item]:
    """Distinct items of one kind: text (of 9 to 40 words), image, or "image,text"."""
    rng = random.Random(seed)
    texts = [f"{words(rng, rng.choice((9, 12, 20, 40)))} {i}." if "text" in kind else "" for i in range(count)]
    return [Item(text, path) for text, path in zip(texts, pictures(place, count) if "image" in kind else [None] * count, strict=True)]


def pairs(place: Place, kinds: tuple[str, str], count: int, seed: int) -> list[Pair]:
    """(query, candidate) of two kinds."""
    sides = zip(items(place, kinds[0], count, seed), items(place, kinds[1], count, seed + 1), strict=True)
    return [Pair(query, candidate, f"{seed}:{i}", (f"{seed}:{i}",)) for i, (query, candidate) in enumerate(sides)]


def mixed(place: Place, count: int, seed: int = 0) -> list[Pair]:
    """Pairs as stage 2 meets them: a third text to image, image to text, image with text to image."""
    kinds = (("text", "image"), ("image", "text"), ("image,text", "image"))
    parts = [pairs(place, kind, -(-count // 3), seed + 10 * i) for i, kind in enumerate(kinds)]
    return [pair for group in zip(*parts, strict=True) for pair in group][:count]


def ranked(model: Encoder, queries: list[Item], negatives: int) -> list[TrainingQuery]:
    """Queries of stage 3 with mined candidates in random directions."""
    rng, width = np.random.default_rng(0), model.backbone.config.get_text_config().hidden_size
    candidates = tuple(Item(f"{i}.") for i in range(negatives + 1))
    query = mbeir.Query("1:1", None, None, "image", (), (), 3)
    out = []
    for item in queries:
        vectors = rng.normal(size=(negatives + 1, width)).astype(np.float32)
        near, *bank = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        mined = (0.0, (0.0,) * negatives, near, np.stack(bank), tuple(range(negatives)), near)
        out.append(TrainingQuery(query, item, candidates[0], "1:1", candidates[1:], *mined))
    return out


class Busy(threading.Thread):
    """Mean utilisation of the card in percent, by nvidia-smi; None without it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[float] = []
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "250"]
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self.process = None
        self.start()

    def run(self) -> None:
        for line in self.process.stdout if self.process else ():
            if line.strip().isdigit():
                self.seen.append(float(line))

    def taken(self) -> float | None:
        """Since the last call."""
        seen, self.seen = self.seen, []
        return round(sum(seen) / len(seen), 1) if seen else None

    def stop(self) -> None:
        if self.process:
            self.process.terminate()


class Work:
    """FLOPs of what a model reads, padding and all that is computed again among them, as `plan` counts them."""

    flops = 0.0


@contextmanager
def counted(model: Encoder, *, rank: int = 0, again: bool = False) -> Iterator[Work]:
    """Counts while the block runs; what is written token by token on a cache is not counted.

    Args:
        rank: of the adapter. again: layers are computed once more on the way back.
    """
    of, work, original = sizes.of_config(model.backbone.config), Work(), Encoder.batch

    def batch(self, *given, **named):
        made = original(self, *given, **named)
        rows, length = made.input_ids.shape
        work.flops += of.forward(rows * length, length, rank) * (1 + (again and torch.is_grad_enabled()))
        if torch.is_grad_enabled():
            work.flops += of.backward(rows * length, length, rank)
        return made

    def look(_, given, named):
        grids = named["grid_thw"] if "grid_thw" in named else given[1]
        work.flops += sum(of.vision(1, n / of.merged) for n in grids.prod(-1).tolist())

    hook = model.backbone.model.visual.register_forward_pre_hook(look, with_kwargs=True)
    Encoder.batch = batch
    try:
        yield work
    finally:
        Encoder.batch = original
        hook.remove()
