"""The compute and memory estimate of a profile, printed before anything starts: hours, memory, disk.

`python -m elva_core plan PROFILE [--gpu H20] [--devices 8]`: the stages as the profile asks for them, stage 3
in the paper's literal reading as well, and the paper's own hours beside the same arithmetic. Writes nothing.

    show(config.load("qwen2vl-2b"), gpu="H100", devices=1, console=Console())
"""

from __future__ import annotations

import math
from bisect import bisect, bisect_left
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from elva_core import files
from elva_core.config import PARAMS, Settings
from elva_core.experiments import estimate
from elva_core.experiments.cost import Cost, Side
from elva_core.experiments.estimate import Workload
from elva_core.training_settings import ContrastiveSettings

SAVED_MODELS = 5  # stage 2, stage 3, control, single pass, reranker
FILLED = (0.70, 0.85)  # of a card's memory, that the rows of a call should fill at the longest prompts
MOST_ROWS = 4096  # per call, that are looked at
CHECKPOINT_BYTES = 12  # of a trained parameter: weight and AdamW's two moments in float32


@dataclass(frozen=True, slots=True)
class Stage:
    """One row: what is computed in all, the devices kept busy on average, the key of its rows per call."""

    name: str
    cost: Cost
    devices: float
    lower: str = ""

    @property
    def hours(self) -> float:
        return self.cost.seconds / self.devices / 3600

    @property
    def waiting(self) -> float:
        """Share of the time."""
        return self.cost.waiting / self.cost.seconds


def stages(load: Workload) -> list[Stage]:
    """The rows of the plan, in the order of the chain."""
    s, data, rows = load.settings, load.data, []

    def embedding(name: str, cost: Cost, devices: float | None = None) -> Stage:
        calls = cost.prompts / s.evaluation.batch
        return Stage(name, cost, devices or load.dealt(calls), "evaluation.batch")

    if s.mrbench.annotator.kind == "transformers":
        rows.append(Stage("MRBench, annotation", load.annotation(), 1, "mrbench.annotator.batch"))
    # stages 1 to 3 and the control of stage 3
    sentence = Side(data.nli_tokens, 0.0)
    rows += _contrastive(load, "stage 1", s.stage1, sentence, sentence)
    query, candidate = load.side("query", "train"), load.side("candidate", "train")
    rows += _contrastive(load, "stage 2", s.stage2, query, candidate, distinct=data.train_pool)
    rows.append(embedding("mining", load.mining()))
    dealt, negatives = load.dealt(s.stage3.queries_per_step), s.stage3.negatives
    read = "query" if s.stage3.rollout_sides == "all" else s.stage3.rollout_sides
    lower = "stage3.chunk or stage3.decode_rows"
    for sides in (read, "all"):
        rows.append(Stage(f"stage 3, rollout_sides: {sides}", load.rlvr(sides), dealt, lower))
    distinct = s.stage3.queries + min(data.train_pool, 3 * (negatives.pool or data.train_pool))
    each = {"negatives": negatives.hard + negatives.random, "distinct": distinct}
    rows += _contrastive(load, "control", s.control, load.side("query"), load.side("candidate"), **each)
    # what follows the stages, and the evaluation
    if s.distil:
        train, written = load.distillation()
        rows.append(Stage("single pass", train, load.dealt(s.distil.batch / s.distil.chunk), "distil.chunk"))
        rows.append(embedding("single pass, its summaries", written))
    if s.rerank:
        train, mining, val, looks = load.reranking()
        prompts = s.rerank.batch * (2 + s.rerank.negatives) / 2  # the mean of the two kinds of step
        rows.append(Stage("reranker", train, load.dealt(prompts / s.rerank.chunk), "rerank.chunk"))
        rows.append(embedding("reranker, its negatives", mining))
        rows.append(embedding("reranker, val embedded", val, devices=1))
        rows.append(Stage("reranker, ordering", looks, 1, "rerank.prompts"))
    models = load.known.evaluated_models
    rows.append(embedding(f"evaluation of {models} models", load.evaluation() * models, devices=1))
    searches = {pool: load.search(pool) * models for pool in ("local", "global")}
    return rows + [Stage(f"their search, {pool} pool", cost, 1) for pool, cost in searches.items()]


def _contrastive(
    load: Workload, name: str, s: ContrastiveSettings, query: Side, candidate: Side, **each
) -> list[Stage]:
    """Training, and the summaries that it trains on; both are divided by chunks."""
    train, written = load.contrastive(s, query, candidate, **each)
    candidates = s.batch * (1 + each.get("negatives", 0))
    # chunks of one side each, where they are not cut evenly by tokens
    chunks = math.ceil(s.batch / s.chunk) + math.ceil(candidates / s.chunk)
    devices = load.devices if s.chunk_tokens else load.dealt(chunks)
    key, cached = name.replace(" ", ""), s.gradient_cache or load.devices > 1
    lower = f"{key}.{'chunk_tokens' if s.chunk_tokens else 'chunk'}"
    lower += "" if cached else " with gradient_cache: true"
    rows = [Stage(name, train, devices, lower)]
    if written.rollouts:
        rows.append(Stage(f"{name}, its summaries", written, devices, f"{key}.batch"))
    return rows


def disk(load: Workload) -> dict[str, float]:
    """GB on disk."""
    s, sizes = load.settings, load.sizes
    sections = (s.stage1, s.stage2, s.stage3, s.control, s.distil, s.rerank)
    rank = max(section.lora.rank for section in sections if section)
    vectors = sum(u.pool for u in load.data.units.values()) * sizes.hidden
    return {
        "images": load.data.images_gb,
        f"{SAVED_MODELS} trained models": SAVED_MODELS * sizes.parameters * load.width / 1e9,
        "largest checkpoint": CHECKPOINT_BYTES * sizes.adapter(rank) / 1e9,
        "embeddings of all pools in float16, a model": 2 * vectors / 1e9,
    }


def show(settings: Settings, *, gpu: str | None, devices: int, console: Console) -> None:
    """Prints the plan and what does not fit."""
    load = estimate.make(settings, gpu=gpu, devices=devices)
    planned, name = stages(load), gpu or load.known.default_gpu[settings.device.partition(":")[0]]
    work = _table(
        f"{settings.profile} on {devices} x {name}, every summary {load.cap} tokens long",
        ("stage", "prompts", "summaries", "tokens", "FLOP", "devices", "time", "waiting", "GB a device"),
    )
    for s in planned:
        counts = [f"{n:,.0f}" if n else "" for n in (s.cost.prompts, s.cost.rollouts)]
        counts += [_scaled(s.cost.tokens), _scaled(s.cost.flops)]
        where, waiting, full = "host", "", ""
        if s.cost.memory:
            where, waiting, full = f"{s.devices:.3g}", f"{s.waiting:.0%}", f"{s.cost.peak:,.3g}"
        work.add_row(s.name, *counts, where, _time(s.hours), waiting, full)
    parts = list(dict.fromkeys(part for s in planned for part in s.cost.memory))
    memory = _table("Memory of the fullest device, GB", ("stage", *parts))
    for s in planned:
        sizes = [s.cost.memory.get(part, 0) for part in parts]
        if any(sizes):
            memory.add_row(s.name, *(f"{size:,.3g}" if size else "" for size in sizes))
    wide = Console(file=console.file, width=max(console.width, 150))
    more = [] if load.kind == "cpu" else [_filling(load, name)]
    for shown in (work, memory, *more, *([] if settings.data.emoji else [_reported(settings)])):
        wide.print(shown)
    room = "disk, GB: " + ", ".join(f"{what} {size:,.3g}" for what, size in disk(load).items())
    for line in (*advice(load, planned, name), room, *_assumptions(load)):
        wide.print(line, highlight=False, soft_wrap=True)


def _filling(load: Workload, name: str) -> Table:
    low, high = FILLED
    card = f"{name}'s {load.gpu.memory:g} GB"
    title = f"Rows per call that fill {low:.0%} to {high:.0%} of {card} at the longest prompts"
    table = _table(title, ("key", "now", "memory", "filling", "memory", "tokens"))
    for b in budgets(load):
        tokens = f"{b.tokens:,}" if b.tokens else ""
        table.add_row(b.key, f"{b.rows}", f"{b.share:.0%}", f"{b.filling}", f"{b.filled:.0%}", tokens)
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def _scaled(number: float) -> str:
    """
    >>> _scaled(2.304e9)
    '2.3 G'
    """
    power = next((p for p in (18, 15, 12, 9, 6, 3) if number >= 10**p), 0)
    return f"{number / 10**power:.3g} {' kMGTPE'[power // 3]}".strip() if number else ""


def _time(hours: float) -> str:
    """
    >>> _time(0.5), _time(12.34), _time(0.001)
    ('30 min', '12.3 h', '3.6 s')
    """
    seconds = 3600 * hours
    size, unit = next(x for x in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= x[0])
    amount = seconds / (size or 1)
    return f"{amount:,.0f} {unit}" if amount >= 100 else f"{amount:.3g} {unit}"


def _reported(settings: Settings) -> Table:
    """The reported hours of the same stages, and ours on the same devices.

    Stage 2 of the paper and of LamRA is read at the EOL state alone, so it is planned without the steps at
    [RET]. Their layers are computed again, one forward more, and ours are in the gradient cache as well, two:
    here it is one.
    """
    runs = files.read_yaml(PARAMS / "reported.yaml")["training_time"]["runs"]
    once = {"gradient_checkpointing": False}
    theirs = settings.changed({"stage1": once, "stage2": once | {"ret_share": 0.0}})
    title = "Beside reported times, with one forward more as theirs, stage 2 without the steps at [RET]"
    table = _table(title, ("stage", "devices", "reported, h", "ours, h", "ours over reported"))
    for run in runs:
        for s in stages(estimate.make(theirs, gpu=run["gpu"], devices=run["devices"])):
            if s.name.startswith(run["stage"]):
                numbers = (f"{run['hours']}", f"{s.hours:.3g}", f"{s.hours / run['hours']:.2f}")
                table.add_row(f"{run['by']}: {s.name}", f"{run['devices']} x {run['gpu']}", *numbers)
    return table


def advice(load: Workload, planned: list[Stage], name: str) -> list[str]:
    """Warnings: stages that cannot run, do not fit, or leave a device idle, each with the key to change."""
    room, out, s3 = load.gpu.memory * load.known.assumed.memory_share, [], load.settings.stage3
    if s3.queries_per_step < load.devices:
        queries = f"{s3.queries_per_step} queries a step for {load.devices} devices"
        out.append(f"cannot run: {queries}; raise stage3.queries_per_step")
    vllm, weights = load.gpu.memory * s3.vllm.gpu_memory_utilization, load.sizes.parameters * load.width / 1e9
    if s3.sampler == "vllm" and vllm < weights:
        has = f"vLLM has {vllm:.0f} GB for {weights:.0f} GB of weights"
        out.append(f"cannot run: {has}; raise stage3.vllm.gpu_memory_utilization")
    rows = _used(load, planned)
    for s in rows:
        peak, fullest = s.cost.peak, max(x.cost.peak for x in rows if x.lower == s.lower)
        if peak > room:
            needs = f"{s.name} needs {peak:.0f} GB, {name} has {room:.0f} GB free"
            out.append(f"does not fit: {needs}; lower {s.lower}")
        elif s.waiting > 1 / 2 and fullest < room / 2 and load.kind != "cpu":
            used = f"waits {s.waiting:.0%} of its time and uses {peak:.0f} GB"
            out.append(f"mostly idle: {s.name} {used}; raise {s.lower}")
    return out


class Budget(NamedTuple):
    """Rows per call of one key; shares are those of the card's memory at the longest prompts."""

    key: str
    rows: int  # as the profile has them
    share: float
    filling: int  # rows that fill the card, or those of a whole step, if that takes less
    filled: float
    tokens: int | None  # of them, where chunks are contrastive


def budgets(load: Workload) -> list[Budget]:
    """For every key of rows per call the rows whose fullest stage takes the middle of FILLED."""
    out, tried = [], range(1, MOST_ROWS + 1)
    for key in dict.fromkeys(s.lower.split()[0] for s in _used(load, stages(load)) if s.lower):
        section, _, name = key.rpartition(".")
        if not name.startswith("chunk") and key not in ("rerank.prompts", "evaluation.batch"):
            continue  # a batch decides what is learnt
        share = partial(_share, load, key)
        rows = bisect(tried, sum(FILLED) / 2, key=share)  # so many are not above it
        if rows and share(rows) < FILLED[0]:  # few inputs, of many rollouts each
            rows = bisect(tried, FILLED[1], key=share)
        whole_step = 1 + bisect_left(tried, share(MOST_ROWS), key=share)
        rows = max(1, min(rows, whole_step))
        now, longest = getattr(getattr(load.settings, section), name), _longest(load, section)
        now = int(now / longest) if name == "chunk_tokens" else now
        tokens = int(rows * longest) if longest else None
        out.append(Budget(key, now, share(now), rows, share(rows), tokens))
    return out


def _share(load: Workload, key: str, rows: int) -> float:
    """Share of the card's memory that the fullest stage of a key takes with so many rows per call."""
    section, _, name = key.rpartition(".")
    amount = math.ceil(rows * _longest(load, section)) if name == "chunk_tokens" else rows
    changed = replace(load, settings=load.settings.changed({section: {name: amount}}))
    peaks = (s.cost.peak for s in _used(changed, stages(changed)) if s.lower.split()[:1] == [key])
    return max(peaks) / load.gpu.memory


def _longest(load: Workload, section: str) -> float:
    """Tokens of the longest row of a contrastive stage, 0 for another section."""
    s = getattr(load.settings, section)
    if not isinstance(s, ContrastiveSettings):
        return 0
    prompts, side = load.settings.encoder, Side(0.0, float(section != "stage1"))
    if s.ret_share:
        return load.longest(side, prompts.summary_request) + load.cap + 1
    return load.longest(side, prompts.eol_request)


def _used(load: Workload, planned: list[Stage]) -> list[Stage]:
    """Stages of a device, without the reading of stage 3 that the profile does not ask for."""
    other = f"stage 3, rollout_sides: {'query' if load.settings.stage3.rollout_sides == 'all' else 'all'}"
    return [s for s in planned if s.cost.memory and s.name != other]


def _shared(load: Workload) -> list[str]:
    """Memory that the launch files for models that do not fit leave on a device."""
    if load.devices == 1:
        return []
    rank, sizes = load.settings.stage2.lora.rank, load.sizes
    whole, shared = sizes.training_bytes(rank) / 1e9, sizes.shared_bytes(rank, load.devices) / 1e9
    layers = sizes.linear * load.width / 1e9
    return [
        "by ddp.yaml; zero2.yaml: adapter and optimiser of stage 2 take "
        f"{shared:.3g} GB of each device instead of {whole:.3g}; "
        f"fsdp2.yaml: {layers / load.devices:.3g} GB of frozen layers instead of {layers:.3g}, "
        "and one layer at a time whole"
    ]


def _assumptions(load: Workload) -> list[str]:
    a, data, gpu = load.known.assumed, load.data, load.gpu
    query, candidate = (load.side(which, "train") for which in ("query", "candidate"))
    epochs = load.settings.stage2.steps * load.settings.stage2.batch / data.union_rows
    return [
        f"{'measured on ' + load.measured if load.measured else 'assumed'}: "
        f"{a.utilisation:.1%} of {gpu.tflops:g} TFLOP/s, "
        f"{a.bandwidth_share:.0%} of {gpu.bandwidth:g} GB/s, "
        f"{1000 * a.seconds_per_layer[load.kind]:.3g} ms a layer from Python; "
        f"{load.image_tokens:.0f} tokens an image, {query.text:.0f} text tokens a query and "
        f"{candidate.text:.0f} a candidate, {data.padding:g} times that in a padded batch",
        f"counted: {load.sizes.parameters:,} parameters; stage 2 is {epochs:.2f} epochs of "
        f"{data.union_rows:,} rows; every value and its source: params/plan.yaml",
        "memory: with the longest prompt that the encoder's limits allow; "
        "waiting: for images from the host, or for Python",
        *_shared(load),
        "of one device, whatever their number: annotation, val, ordering and evaluation",
        "not planned: a server that annotates, groups that are sampled again, and what vLLM saves",
    ]
