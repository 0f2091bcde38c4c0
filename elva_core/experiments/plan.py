"""What a profile costs before anything starts: hours, memory per device and disk, printed; writes nothing.

`python -m elva_core plan PROFILE [--gpu H20] [--devices 8]`: the stages as the profile asks for them, stage 3 both with
rollouts of the query and in the paper's literal reading, and the paper's own hours beside the same arithmetic.

    show(settings.load("qwen2vl-2b"), gpu="H100", devices=1, console=Console())
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import yaml
from rich.console import Console
from rich.table import Table

from elva_core.config import PARAMS, SUMMARIES_AT_ONCE, ContrastiveSettings, Settings
from elva_core.experiments import estimate
from elva_core.experiments.estimate import Cost, Side, Workload

SAVED_MODELS = 5  # stage 2, stage 3, control, single pass, reranker
CHECKPOINT_BYTES = 12  # of a trained parameter: weight and AdamW's two moments in float32


@dataclass(frozen=True, slots=True)
class Peak:
    """GB of one device at its fullest, by part; `lower` is the key of the rows per call."""

    parts: Mapping[str, float]
    lower: str

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __or__(self, more: Mapping[str, float]) -> Peak:
        return Peak({**self.parts, **more}, self.lower)


@dataclass(frozen=True, slots=True)
class Stage:
    """One row: what is computed in all, the devices that it keeps busy on average, the fullest of them (none: the host)."""

    name: str
    cost: Cost
    devices: float
    peak: Peak | None = None

    @property
    def hours(self) -> float:
        return self.cost.seconds / self.devices / 3600

    @property
    def waiting(self) -> float:
        """Share of the time."""
        return self.cost.waiting / self.cost.seconds


def stages(load: Workload) -> list[Stage]:
    """The rows of the plan, in the order of the chain."""
    s, data, batch, dealt = load.settings, load.data, load.settings.evaluation.batch, load.dealt
    embedding = _writing(load, batch, "evaluation.batch")
    rows = []
    if s.mrbench.annotator.kind == "transformers":
        peak = _writing(load.annotator(), s.mrbench.annotator.batch, "mrbench.annotator.batch")
        rows.append(Stage("MRBench, annotation", load.annotation(), 1, peak))

    # stages 1 to 3 and the control of stage 3
    sentence, query, candidate = Side(data.nli_tokens, 0.0), load.side("query"), load.side("candidate")
    rows += _contrastive(load, "stage 1", s.stage1, sentence, sentence)
    union = load.side("query", "train"), load.side("candidate", "train")
    rows += _contrastive(load, "stage 2", s.stage2, *union, distinct=data.train_pool)
    mining = load.mining()
    rows.append(Stage("mining", mining, dealt(mining.prompts / batch), embedding))
    for sides in ("query", "all"):
        name, devices = f"stage 3, rollout_sides: {sides}", dealt(s.stage3.queries_per_step)
        rows.append(Stage(name, load.rlvr(sides), devices, _rlvr_peak(load, sides)))
    negatives = s.stage3.negatives
    distinct = s.stage3.queries + min(data.train_pool, 3 * (negatives.pool or data.train_pool))
    each = {"negatives": negatives.hard + negatives.random, "distinct": distinct}
    rows += _contrastive(load, "control", s.control, query, candidate, **each)

    # what follows the stages, and the evaluation
    if s.distil:
        train, written = load.distillation()
        length = load.longest(union[1], s.encoder.eol_request)
        teacher = {"teacher's embeddings": 2 * s.distil.pairs * load.sizes.hidden * 4 / 1e9}
        peak = _training(load, "distil.chunk", s.distil, s.distil.chunk * length) | teacher
        rows.append(Stage("single pass", train, dealt(s.distil.batch / s.distil.chunk), peak))
        rows.append(
            Stage("single pass, its summaries", written, dealt(2 * s.distil.pairs / batch), embedding)
        )
    if s.rerank:
        train, mining, val, looks = load.reranking()
        prompts = s.rerank.batch * (2 + s.rerank.negatives) / 2  # the mean of the two kinds of step
        longest, chunk = (
            load.longest(load.together(s.rerank.window), s.rerank.listwise_request),
            s.rerank.chunk,
        )
        peak = _training(load, "rerank.chunk", s.rerank, chunk * longest, chunk)
        rows.append(Stage("reranker", train, dealt(prompts / chunk), peak))
        rows.append(Stage("reranker, its negatives", mining, dealt(mining.prompts / batch), embedding))
        rows.append(Stage("reranker, val embedded", val, 1, embedding))
        inside = s.rerank.prompts * longest * _inside(load)
        peak = _peak(load, "rerank.prompts", inside, s.rerank.prompts)
        rows.append(Stage("reranker, second looks", looks, 1, peak))
    models = load.known.evaluated_models
    rows.append(Stage(f"evaluation of {models} models", load.evaluation() * models, 1, embedding))
    for pool in ("local", "global"):
        rows.append(Stage(f"their search, {pool} pool", load.search(pool) * models, 1))
    return rows


def _contrastive(
    load: Workload,
    name: str,
    s: ContrastiveSettings,
    query: Side,
    candidate: Side,
    negatives=0,
    distinct=math.inf,
) -> list[Stage]:
    """Training, and the summaries that it trains on; both are divided by chunks, which never mix queries and candidates."""
    train, written = load.contrastive(s, query, candidate, negatives=negatives, distinct=distinct)
    devices = load.dealt(math.ceil(s.batch / s.chunk) + math.ceil(s.batch * (1 + negatives) / s.chunk))
    key, items = name.replace(" ", ""), s.batch * (2 + negatives)
    # one chunk has a graph at a time; without gradient_cache all chunks of a batch
    rows, lower = s.chunk, f"{key}.chunk"
    if not s.gradient_cache and load.devices == 1 and items != s.chunk:
        rows, lower = items, f"{key}.chunk with gradient_cache: true"
    prompts, ending = load.settings.encoder, load.cap + 1 if s.ret_share else 0
    length = load.longest(candidate, prompts.summary_request if ending else prompts.eol_request) + ending
    peak = _training(load, lower, s, rows * length, rows * ending)
    stages = [Stage(name, train, devices, peak)]
    if written.rollouts:
        together = min(SUMMARIES_AT_ONCE, items / load.devices)
        peak = _writing(load, together, f"{key}.batch", s.lora.rank)
        stages.append(Stage(f"{name}, its summaries", written, devices, peak))
    return stages


def _peak(load: Workload, lower: str, activations: float, positions: float, rank=0, cache=0.0) -> Peak:
    """Bytes of activations and of the key/value cache, positions with logits at once, the adapter's rank."""
    trained = load.sizes.training_bytes(rank) if rank else 0.0
    parts = {
        "weights": load.sizes.parameters * load.width,
        "adapter and optimiser": trained,
        "activations": activations,
        "key/value cache": cache,
        "logits": load.known.assumed.logit_copies * 4 * load.sizes.vocabulary * positions,
    }
    return Peak({part: size / 1e9 for part, size in parts.items()}, lower)


def _training(load: Workload, lower: str, s, tokens: float, positions: float = 0, cache: float = 0) -> Peak:
    """Tokens whose graph is kept for the way back to the adapter of training section `s`."""
    again, dropout = getattr(s, "gradient_checkpointing", False), s.lora.dropout > 0
    kept = load.sizes.activation_bytes(load.width, s.lora.rank, dropout=dropout, checkpointing=again)
    return _peak(load, lower, tokens * kept, positions, s.lora.rank, cache)


def _writing(load: Workload, rows: float, lower: str, rank: int = 0) -> Peak:
    """Summaries written in one call: the inside of one layer, the cache of all, and the logits of one position."""
    length = load.longest(load.side("candidate"), load.settings.encoder.summary_request)
    cache = rows * (length + load.cap + 1) * load.sizes.kv_bytes(load.width)
    return _peak(load, lower, rows * length * _inside(load), rows, rank, cache)


def _inside(load: Workload) -> int:
    """Bytes of a token inside one layer."""
    return (3 * load.sizes.intermediate + 4 * load.sizes.hidden) * load.width


def _rlvr_peak(load: Workload, sides: str) -> Peak:
    """Learning from one chunk; writing the candidates, as many at a time and without a graph, takes less."""
    s, inputs, ending = load.settings.stage3, load.inputs(sides), load.cap + 1
    side, rollouts = load.side("candidate" if sides == "all" else "query"), inputs * s.num_generations
    prompt = load.longest(side, load.settings.encoder.summary_request)
    kept, repeated = (load.sizes.kv_bytes(load.width, repeated=r) for r in (False, True))
    cache = rollouts * ((prompt + ending) * kept + prompt * repeated)
    vllm = {"vLLM": load.gpu.memory * s.vllm.gpu_memory_utilization if s.sampler == "vllm" else 0.0}
    tokens = inputs * prompt + rollouts * ending
    return _training(load, "stage3.chunk", s, tokens, rollouts * load.cap, cache=cache) | vllm


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
        where, full = (f"{s.devices:.3g}", f"{s.peak.total:,.3g}") if s.peak else ("host", "")
        work.add_row(s.name, *counts, where, _time(s.hours), f"{s.waiting:.0%}" if s.peak else "", full)
    peaks = {s.name: s.peak for s in planned if s.peak}
    parts = list(dict.fromkeys(part for peak in peaks.values() for part in peak.parts))
    memory = _table("Memory of the fullest device, GB", ("stage", *parts))
    for stage, peak in peaks.items():
        sizes = [peak.parts.get(part, 0) for part in parts]
        memory.add_row(stage, *(f"{size:,.3g}" if size else "" for size in sizes))
    wide = Console(file=console.file, width=max(console.width, 150))
    for shown in (work, memory, *([] if settings.data.emoji else [_reported(settings)])):
        wide.print(shown)
    room = "disk, GB: " + ", ".join(f"{what} {size:,.3g}" for what, size in disk(load).items())
    for line in (*advice(load, planned, name), room, *_assumptions(load)):
        wide.print(line, highlight=False, soft_wrap=True)


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

    Stage 2 of the paper and of LamRA is read at the EOL state alone, so it is planned without the steps at [RET]. Their layers
    are computed again, one forward more, and ours are in the gradient cache as well, two: here it is one.
    """
    runs = yaml.safe_load((PARAMS / "reported.yaml").read_text(encoding="utf-8"))["training_time"]["runs"]
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
    """What cannot run and which key to change; what leaves the device idle although there is room, and which key to raise."""
    room, out, s3 = load.gpu.memory * load.known.assumed.memory_share, [], load.settings.stage3
    if s3.queries_per_step < load.devices:
        out.append(
            f"cannot run: {s3.queries_per_step} queries a step for {load.devices} devices; raise stage3.queries_per_step"
        )
    vllm, weights = load.gpu.memory * s3.vllm.gpu_memory_utilization, load.sizes.parameters * load.width / 1e9
    if s3.sampler == "vllm" and vllm < weights:
        out.append(
            f"cannot run: vLLM has {vllm:.0f} GB for {weights:.0f} GB of weights; raise stage3.vllm.gpu_memory_utilization"
        )
    other = f"stage 3, rollout_sides: {'query' if s3.rollout_sides == 'all' else 'all'}"
    asked = [s for s in planned if s.peak and s.name != other]
    for s in asked:
        fullest = max(x.peak.total for x in asked if x.peak.lower == s.peak.lower)
        if s.peak.total > room:
            out.append(
                f"does not fit: {s.name} needs {s.peak.total:.0f} GB, {name} has {room:.0f} GB free; lower {s.peak.lower}"
            )
        elif s.waiting > 1 / 2 and fullest < room / 2 and load.kind != "cpu":
            used = f"waits {s.waiting:.0%} of its time and uses {s.peak.total:.0f} GB"
            out.append(f"mostly idle: {s.name} {used}; raise {s.peak.lower}")
    return out


def _shared(load: Workload) -> list[str]:
    """What the launch files for models that do not fit leave on a device."""
    if load.devices == 1:
        return []
    rank, sizes = load.settings.stage2.lora.rank, load.sizes
    whole, shared = sizes.training_bytes(rank) / 1e9, sizes.shared_bytes(rank, load.devices) / 1e9
    layers = sizes.linear * load.width / 1e9
    return [
        f"by ddp.yaml; zero2.yaml: adapter and optimiser of stage 2 take {shared:.3g} GB of each device instead of {whole:.3g}; "
        f"fsdp2.yaml: {layers / load.devices:.3g} GB of frozen layers instead of {layers:.3g}, and one layer at a time whole"
    ]


def _assumptions(load: Workload) -> list[str]:
    a, data = load.known.assumed, load.data
    query, candidate = (load.side(which, "train") for which in ("query", "candidate"))
    epochs = load.settings.stage2.steps * load.settings.stage2.batch / data.union_rows
    return [
        f"assumed: {a.utilisation:.0%} of {load.gpu.tflops:g} TFLOP/s, {a.bandwidth_share:.0%} of {load.gpu.bandwidth:g} GB/s, "
        f"{1000 * a.seconds_per_layer[load.kind]:g} ms a layer from Python; {load.image_tokens:.0f} tokens an image, "
        f"{query.text:.0f} text tokens a query and {candidate.text:.0f} a candidate, {data.padding:g} times that in a padded batch",
        f"counted: {load.sizes.parameters:,} parameters; stage 2 is {epochs:.2f} epochs of {data.union_rows:,} rows; "
        "every value and its source: params/plan.yaml",
        "memory: with the longest prompt that the encoder's limits allow; waiting: for images from the host, or for Python",
        *_shared(load),
        "of one device, whatever their number: annotation, val, second looks and evaluation",
        "not planned: a server that annotates, and what vLLM saves",
    ]
