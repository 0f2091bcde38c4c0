"""Inputs of the estimate: GPUs, assumptions and data sets of params/plan.yaml, and a model's sizes.

torch counts a model's parameters, FLOPs and bytes on the meta device: it is built from its configuration
without weights, its parts run at two lengths under FlopCounterMode, and what grows with the length and with
its square is read off. A multiply-add is 2 FLOPs, and attention is the whole square, as a mask saves nothing
here. Only what autograd keeps is a formula, since a GPU's fused attention does not run on meta tensors.
A data set's counts come from its files where they are on this machine.

    table = known()
    dataset(config.load("qwen2vl-2b"), table).units["cirr_task7"].pool
    of_model("Qwen/Qwen2-VL-2B-Instruct", table.architectures).forward(tokens=64 * 200, context=200)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

from elva_core import config, files
from elva_core.config import PARAMS, ProfileError, Section, Settings
from elva_core.data import mbeir
from elva_core.models.vision import SPLICED
from elva_core.values import model_source

TABLE = PARAMS / "plan.yaml"
TRAINED_BYTES = 16  # of a trained parameter: float32 weight, gradient and AdamW's two moments
COUNTED_TOKENS = 64  # that are run, and twice as many
COUNTED_SIDE = 16  # patches; a multiple of the side of Qwen2.5-VL's windows


class Gpu(Section):
    memory: float  # GB
    tflops: float  # dense bfloat16
    bandwidth: float  # GB/s


class Assumed(Section):
    utilisation: float
    bandwidth_share: float
    seconds_per_layer: dict[str, float]
    memory_share: float
    host_tflops: float
    seconds_per_megapixel: float
    logit_copies: int
    chat_tokens: dict[str, float]
    characters_per_token: float


class Unit(Section):
    """Counts of one unit, and mean tokens of a query with its instruction and of a candidate's text."""

    train: int = 0
    test: int = 0
    pool: int = 0
    query: float
    candidate: float


class Dataset(Section):
    image_pixels: float
    padding: float  # tokens of a padded batch over tokens
    nli_tokens: float
    images_gb: float
    multi_grain: float = 1.0  # share of the queries of MRBench's units
    union_rows: int = 0
    train_pool: int = 0
    collection: int = 0
    units: dict[str, Unit]


class Run1(Section):
    """The setting of run 1, which its lines in outputs/gpu/run1.jsonl leave out."""

    date: str
    commit: str
    gpu: str
    model: str
    rows: int  # of a step of stage 2, queries and candidates
    tokens: float  # of a row in its padded chunk
    images: float  # share of the rows that have one
    image_pixels: float
    rank: int
    summary: int  # tokens


class Known(Section):
    """params/plan.yaml: GPUs, configurations of models, counts of data sets, assumptions, goals."""

    gpus: dict[str, Gpu]
    default_gpu: dict[str, str]
    assumed: Assumed
    architectures: dict[str, dict]
    evaluated_models: int
    datasets: dict[str, Dataset]
    run1: Run1
    gpu_goals: dict[str, str]  # section of `make gpu` -> what it should reach on an H100


def task_of(unit: str) -> int:
    """The number of a unit's task, which its name ends with."""
    return int(unit.rpartition("_task")[2])


def known() -> Known:
    return config.read(TABLE, Known)


def dataset(settings: Settings, table: Known) -> Dataset:
    """The entry of the profile's data in params/plan.yaml, with the counts of its files where they are here.

    Raises:
        ProfileError: no such entry.
    """
    name, emoji = settings.data.name, settings.data.emoji
    if name not in table.datasets:
        raise ProfileError(
            f"no data set {name!r} in {TABLE}; it has {', '.join(table.datasets)}; add an entry"
        )
    data = table.datasets[name]
    if emoji:  # as the settings ask for it: upper bounds, for some units hold fewer
        size, limits = emoji.size or data.collection, emoji.queries_per_unit
        train, drawings = max(limits["train"], emoji.up_sample), size * len(emoji.vendors["train"])
        counts = {"train": train, "test": limits["test"], "pool": size * len(emoji.vendors["test"])}
        units = {unit: values.model_copy(update=counts) for unit, values in data.units.items()}
        pool = 2 * drawings + 2 * size  # drawings stand alone and captioned; names and translations
        data = data.model_copy(update={"units": units, "union_rows": train * len(units), "train_pool": pool})
    place = files.OUTPUTS / settings.profile
    folder = next(iter(sorted(place.glob("seed-*/10_prepare_data"))), place)  # any seed's has as many rows
    root = mbeir.Root(Path(settings.data.root or folder / "root"))
    if not root.union_train_path().is_file():
        return data
    texts = {side: fmean(getattr(u, side) for u in data.units.values()) for side in ("query", "candidate")}
    units, mean = {}, Unit(train=1, **texts)
    for unit in root.units("test"):
        counts = {"test": lines(root.query_path(unit, "test")), "pool": lines(root.pool_path(unit, "test"))}
        units[unit] = data.units.get(unit, mean).model_copy(update=counts)
    counts = {
        "units": units,
        "union_rows": lines(root.union_train_path()),
        "train_pool": lines(root.pool_path("", "train", "global")),
    }
    return data.model_copy(update=counts)


def lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Counts of a model; pairs are FLOPs per token (or patch), and per token and position it attends to."""

    parameters: int
    hidden: int
    intermediate: int  # width inside an MLP
    vocabulary: int
    layers: int
    vision_layers: int
    linear: int  # weights of the language model's linear layers, which decoding reads at every step
    adapter_width: int  # inputs and outputs of these layers together: LoRA's weights per unit of rank
    language: tuple[float, float]
    tower: tuple[float, float]
    logit: int  # FLOPs of the output layer at one position
    cached: int  # numbers that a token keeps in the key/value cache
    heads_per_key: int  # heads of queries that share one of keys and values
    patch: int  # pixels a side
    merged: int  # patches that become one token

    def adapter(self, rank: int) -> int:
        """LoRA weights on every linear layer of the language model."""
        return rank * self.adapter_width

    def image_tokens(self, pixels: float) -> float:
        """Tokens that an image of that many pixels becomes."""
        return pixels / (self.patch**2 * self.merged)

    def forward(self, tokens: float, context: float, rank: int = 0) -> float:
        """FLOPs of the language model's layers on `tokens` that each attend to `context` positions."""
        return tokens * (self.language[0] + 2 * self.adapter(rank) + self.language[1] * context)

    def backward(self, tokens: float, context: float, rank: int) -> float:
        """FLOPs of the way back: once the forward for frozen weights, which need no gradient, else twice."""
        return tokens * (self.language[0] + 4 * self.adapter(rank) + 2 * self.language[1] * context)

    def vision(self, images: float, tokens_per_image: float) -> float:
        """FLOPs of the tower on images of equal size; always forward only, the tower is frozen."""
        patches = tokens_per_image * self.merged
        return images * patches * (self.tower[0] + self.tower[1] * patches)

    def kv_bytes(self, width: int, *, repeated: bool = False) -> int:
        """Bytes that one token keeps in the key/value cache, `width` bytes a number.

        The way back needs them repeated for every head of queries: SDPA takes no fewer beside a padding mask.
        """
        return self.cached * width * (self.heads_per_key if repeated else 1)

    def training_bytes(self, rank: int) -> int:
        """Adapter and [RET] row with gradient and AdamW's moments; PEFT keeps them in float32."""
        return TRAINED_BYTES * (self.adapter(rank) + self.hidden)

    def shared_bytes(self, rank: int, processes: int) -> float:
        """The same where zero.py shares moments, float32 copy and summed gradient; the rest stays whole."""
        whole = 4 + 4  # weight and own gradient
        return (whole + 16 / processes) * (self.adapter(rank) + self.hidden)

    def inside_bytes(self, width: int) -> int:
        """Bytes of one token inside one layer, all that a forward without a graph holds of it."""
        return (3 * self.intermediate + 4 * self.hidden) * width

    def activation_bytes(self, width: int, rank: int, *, dropout: bool, checkpointing: bool = False) -> float:
        """Bytes that one token keeps for the way back (autograd's saved tensors), `width` bytes a number.

        Adapters take their inputs in the model's dtype; dropout makes a copy of each and a mask of a byte.
        With checkpointing only each layer's input stays, and one layer at a time is computed again.
        """
        h, inner = self.hidden, self.intermediate
        inputs = 6 * h + inner  # of the adapters of q, k, v, o, gate, up and of down
        copies = (width + 1) * inputs if dropout else width * (2 * h + inner)  # the norms' outputs are shared
        # queries, repeated keys and values, result; under autocast a copy of it
        attention = width * (4 if width == 4 else 5) * h
        norms, mlp = 4 * 2 * h, width * 3 * inner
        layer = copies + width * 7 * rank + norms + attention + mlp
        return width * h * self.layers + layer if checkpointing else self.layers * layer


def of_config(config) -> Sizes:
    """Counts of the model of a transformers configuration; takes seconds on one core, no memory of its size.

    Raises:
        ProfileError: another family; its tower is called, or its layers keep activations, in another way.
    """
    if config.model_type not in SPLICED:
        counted = f"plan counts {' and '.join(SPLICED)}, not {config.model_type}"
        raise ProfileError(f"{counted}; enter a like configuration for its name in {TABLE}: architectures")
    return _count(config.to_json_string(use_diff=False))


@functools.cache
def _count(values: str) -> Sizes:
    """`of_config` of its values as JSON."""
    config = AutoConfig.for_model(**json.loads(values))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    decoder, tower, text = model.get_decoder(), model.model.visual, config.get_text_config()
    linear = [layer for layer in decoder.modules() if isinstance(layer, torch.nn.Linear)]
    patch_values = tower.patch_embed.proj.weight[0].numel()
    cache = DynamicCache(config=text)

    def read(tokens: int, cache: DynamicCache | None = None) -> None:
        embedded = torch.empty(1, tokens, text.hidden_size, device="meta")
        decoder(inputs_embeds=embedded, past_key_values=cache, use_cache=cache is not None)

    def look(patches: int) -> None:
        # frames, height and width are read on the host, so this is no meta tensor
        grid = torch.tensor([[1, COUNTED_SIDE, patches // COUNTED_SIDE]])
        places = torch.empty(patches, 2, device="meta")
        tower(torch.empty(patches, patch_values, device="meta"), grid_thw=grid, position_ids=places)

    read(COUNTED_TOKENS, cache)
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        vision_layers=len(tower.blocks),
        linear=sum(layer.weight.numel() for layer in linear),
        adapter_width=sum(layer.in_features + layer.out_features for layer in linear),
        language=_per_token(read, COUNTED_TOKENS),
        tower=_per_token(look, COUNTED_SIDE**2),
        logit=_flops(model.lm_head, torch.empty(1, text.hidden_size, device="meta")),
        cached=sum(x.keys.numel() + x.values.numel() for x in cache.layers) // COUNTED_TOKENS,
        heads_per_key=text.num_attention_heads // text.num_key_value_heads,
        patch=tower.patch_embed.patch_size,
        merged=config.vision_config.spatial_merge_size**2,
    )


def _flops(work: Callable, *given) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work(*given)
    return counter.get_total_flops()


def _per_token(work: Callable[[int], None], tokens: int) -> tuple[float, float]:
    """(a, b) of the FLOPs a n + b n² of `work(n)`, from n = tokens and twice that."""
    once, twice = _flops(work, tokens), _flops(work, 2 * tokens)
    square = (twice - 2 * once) / (2 * tokens**2)
    return once / tokens - square * tokens, square


def of_model(name: str, architectures: Mapping[str, dict]) -> Sizes:
    """Counts of a hub name of params/plan.yaml, else of a folder or of the hub's copy on this machine.

    Raises:
        ProfileError: neither has its configuration, or it is of another family.
    """
    if name in architectures:
        return of_config(AutoConfig.for_model(**architectures[name]))
    try:
        return of_config(AutoConfig.from_pretrained(model_source(name), local_files_only=True))
    except OSError:
        raise ProfileError(
            f"no entry for {name} in {TABLE}: architectures, and no config.json on this machine; "
            "add its sizes there"
        ) from None
