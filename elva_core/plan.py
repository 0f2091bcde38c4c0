"""What a profile costs before anything starts: hours, memory per device and disk, printed; writes nothing.

`python -m elva_core plan PROFILE [--gpu H20] [--devices 8]`: the stages as the profile asks for them, stage 3 both with
rollouts of the query and in the paper's literal reading, and the paper's own hours beside the same arithmetic.

    show(settings.load("qwen2vl-2b"), gpu="H100", devices=1, console=Console())
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import yaml
from rich.console import Console
from rich.table import Table

from elva_core import workload
from elva_core.settings import PARAMS, ContrastiveSettings, Settings
from elva_core.workload import Cost, Side, Workload

SAVED_MODELS = 3  # stage 2, stage 3, control
CHECKPOINT_BYTES = 12  # of a trained parameter: weight and AdamW's two moments in float32


@dataclass(frozen=True, slots=True)
class Peak:
    """GB of one device at its fullest, by part; `lower` is the key that shrinks the largest of them."""

    parts: Mapping[str, float]
    lower: str

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Stage:
    """One row: what is computed in all, the devices it is divided among, the fullest of them, the key for rows per call."""

    name: str
    cost: Cost
    devices: int
    peak: Peak | None = None
    rows: str = ""

    @property
    def hours(self) -> float:
        return self.cost.seconds / self.devices / 3600


def stages(load: Workload) -> list[Stage]:
    """The rows of the plan, in the order of the chain."""
    s, data, n = load.settings, load.data, load.devices
    rows = []
    if not s.data.emoji:
        rows.append(_alone("MRBench, annotation", load.annotation(), _annotating(load)))
    sentence = Side(data.nli_tokens, 0.0)
    rows += _contrastive(load, "stage 1", s.stage1, sentence, sentence)
    rows += _contrastive(load, "stage 2", s.stage2, load.side("query", "train"), load.side("candidate", "train"), distinct=data.train_pool)
    batch = _writing(load, s.evaluation.batch, "evaluation.batch")
    rows.append(_alone("mining", load.mining(), batch))
    for sides in ("query", "all"):
        rows.append(Stage(f"stage 3, rollout_sides: {sides}", load.rlvr(sides), n, _rlvr_peak(load, sides), "stage3.chunk"))
    negatives = s.stage3.negatives
    rows += _contrastive(
        load,
        "control",
        s.control,
        load.side("query"),
        load.side("candidate"),
        negatives=negatives.hard + negatives.random,
        distinct=s.stage3.queries + min(data.train_pool, 3 * (negatives.pool or data.train_pool)),
    )
    models = load.known.evaluated_models
    rows.append(_alone(f"evaluation of {models} models", load.evaluation() * models, batch))
    rows += [_alone(f"their search, {pool} pool", load.search(pool) * models, None) for pool in ("local", "global")]
    return rows


def _alone(name: str, cost: Cost, peak: Peak | None) -> Stage:
    """What one process does, however many devices there are."""
    return Stage(name, cost, 1, peak, peak.lower if peak else "")


def _contrastive(load: Workload, name: str, s: ContrastiveSettings, query: Side, candidate: Side, **pairs) -> list[Stage]:
    (train, made), key = load.contrastive(s, query, candidate, **pairs), name.replace(" ", "")
    items = s.batch * (2 + pairs.get("negatives", 0))
    rows = [Stage(name, train, load.devices, _training_peak(load, key, s, items, candidate), f"{key}.chunk")]
    return rows + ([_alone(f"{name}, its summaries", made, _writing(load, items, f"{key}.batch"))] if made.rollouts else [])


def _weights(load: Workload, rank: int = 0) -> dict[str, float]:
    trained = load.sizes.training_bytes(rank) / 1e9 if rank else 0.0
    return {"weights": load.sizes.parameters * load.width / 1e9, "adapter and optimiser": trained}


def _training_peak(load: Workload, key: str, s: ContrastiveSettings, items: int, candidate: Side) -> Peak:
    """One chunk with its graph; without gradient_cache all chunks of a batch."""
    ending = load.cap + 1 if s.ret_share else 0
    rows = s.chunk if s.gradient_cache or load.devices > 1 else items
    request = load.settings.encoder.summary_request if ending else load.settings.encoder.eol_request
    length = load.length(candidate, request) * load.data.padding + ending
    recompute = getattr(s, "gradient_checkpointing", False)
    kept = load.sizes.activation_bytes(load.width, s.lora.rank, dropout=s.lora.dropout > 0, checkpointing=recompute)
    parts = _weights(load, s.lora.rank) | {"activations": rows * length * kept / 1e9, "logits": _logits(load, rows * ending)}
    return Peak(parts, f"{key}.chunk" if rows == s.chunk else f"{key}.batch, or set {key}.gradient_cache")


def _rlvr_peak(load: Workload, sides: str) -> Peak:
    """The larger of learning from one chunk and writing the candidates of a step, which is one call per modality."""
    s, others = load.settings.stage3, 1 + load.settings.stage3.negatives.hard + load.settings.stage3.negatives.random
    inputs, side = max(1, s.chunk // s.rollouts), load.side("candidate" if sides == "all" else "query")
    prompt = load.length(side, load.settings.encoder.summary_request) * load.data.padding
    kept = load.sizes.activation_bytes(load.width, s.lora.rank, dropout=s.lora.dropout > 0)
    rollouts = inputs * s.rollouts
    parts = _weights(load, s.lora.rank) | {
        "activations": (inputs * prompt + rollouts * (load.cap + 1)) * kept / 1e9,
        "key/value cache": rollouts * (prompt + load.cap + 1) * load.sizes.kv_bytes(load.width) / 1e9,
        "logits": _logits(load, rollouts * load.cap),
    }
    learning = Peak(parts, "stage3.chunk")
    if sides == "all" or s.candidates == "mined":
        return learning
    image = load.side("candidate").image
    together = s.queries_per_step * others * max(image, 1 - image)
    return max(learning, _writing(load, together, "stage3.queries_per_step", s.lora.rank), key=lambda p: p.total)


def _writing(load: Workload, rows: float, lower: str, rank: int = 0) -> Peak:
    """Summaries written in one call: the inside of one layer, the cache of all, and the logits of one position."""
    length = load.length(load.side("candidate"), load.settings.encoder.summary_request) * load.data.padding
    inside = (3 * load.sizes.intermediate + 4 * load.sizes.hidden) * load.width
    parts = _weights(load, rank) | {
        "activations": rows * length * inside / 1e9,
        "key/value cache": rows * (length + load.cap + 1) * load.sizes.kv_bytes(load.width) / 1e9,
        "logits": _logits(load, rows),
    }
    return Peak(parts, lower)


def _annotating(load: Workload) -> Peak:
    return _writing(load.annotator(), load.known.annotation.batch, "annotation.batch in params/plan.yaml")


def _logits(load: Workload, positions: float) -> float:
    return load.known.assumed.logit_copies * 4 * load.sizes.vocabulary * positions / 1e9


def disk(load: Workload) -> dict[str, float]:
    """GB on disk."""
    s, sizes = load.settings, load.sizes
    ranks = {"stage 1": s.stage1.lora.rank, "stage 2": s.stage2.lora.rank, "stage 3": s.stage3.lora.rank, "control": s.control.lora.rank}
    pool = sum(u.pool for u in load.data.units.values())
    return {
        "images": load.data.images_gb,
        f"weights of {SAVED_MODELS} trained models": SAVED_MODELS * sizes.parameters * load.width / 1e9,
        "largest checkpoint while training": CHECKPOINT_BYTES * max(map(sizes.adapter, ranks.values())) / 1e9,
        "embeddings of all pools, float16, if kept": 2 * pool * sizes.hidden / 1e9,
    }


def beside_reported(settings: Settings) -> list[dict]:
    """The reported hours of the same stages, and ours on the same devices.

    Stage 2 of the paper and of LamRA is read at the EOL state alone, so it is planned without the steps at [RET]; the layers
    that they compute again cost what our gradient cache costs, one more forward.
    """
    runs = yaml.safe_load((PARAMS / "reported.yaml").read_text(encoding="utf-8"))["training_time"]["runs"]
    eol_only, rows = settings.changed({"stage2": {"ret_share": 0.0}}), []
    for run in runs:
        planned = {s.name: s.hours for s in stages(workload.make(eol_only, gpu=run["gpu"], devices=run["devices"]))}
        rows += [run | {"name": name, "ours": hours} for name, hours in planned.items() if name.startswith(run["stage"])]
    return rows


def show(settings: Settings, *, gpu: str | None, devices: int, console: Console) -> None:
    """Prints the plan and what does not fit."""
    load = workload.make(settings, gpu=gpu, devices=devices)
    planned, name = stages(load), gpu or load.known.default_gpu[settings.device.partition(":")[0]]
    work = _table(
        f"{settings.profile} on {devices} x {name}, every summary {load.cap} tokens long",
        ("stage", "prompts", "summaries", "tokens", "FLOP", "devices", "time", "GB a device"),
    )
    for s in planned:
        counts = [f"{n:,.0f}" if n else "" for n in (s.cost.prompts, s.cost.rollouts)] + [_scaled(s.cost.tokens), _scaled(s.cost.flops)]
        work.add_row(s.name, *counts, str(s.devices) if s.peak else "host", _time(s.hours), f"{s.peak.total:,.3g}" if s.peak else "")
    parts = list(dict.fromkeys(part for s in planned if s.peak for part in s.peak.parts))
    memory = _table("Memory of the fullest device, GB", ("stage", *parts))
    for s in planned:
        if s.peak:
            memory.add_row(s.name, *(f"{s.peak.parts[p]:,.3g}" if s.peak.parts.get(p) else "" for p in parts))
    storage = _table("Disk, GB", ("what", "GB"))
    for what, size in disk(load).items():
        storage.add_row(what, f"{size:,.3g}")
    wide = Console(file=console.file, width=max(console.width, 150))
    for shown in (work, memory, storage, *([] if settings.data.emoji else [_reported_table(settings)])):
        wide.print(shown)
    for line in (*advice(load, planned, name), *_assumptions(load)):
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
    amount, unit = (hours, "h") if hours >= 1 else (60 * hours, "min") if hours >= 1 / 60 else (3600 * hours, "s")
    return f"{amount:,.0f} {unit}" if amount >= 100 else f"{amount:.3g} {unit}"


def _reported_table(settings: Settings) -> Table:
    table = _table(
        "Beside reported times; stage 2 without the steps at [RET], as theirs",
        ("stage", "devices", "reported, h", "ours, h", "ours over reported"),
    )
    for row in beside_reported(settings):
        numbers = (f"{row['hours']}", f"{row['ours']:.3g}", f"{row['ours'] / row['hours']:.2f}")
        table.add_row(f"{row['by']}: {row['name']}", f"{row['devices']} x {row['gpu']}", *numbers)
    return table


def advice(load: Workload, planned: list[Stage], name: str) -> list[str]:
    """What does not fit and which key to lower; what leaves the device idle although there is room, and which key to raise."""
    room, out = load.gpu.memory * load.known.assumed.memory_share, []
    for s in (s for s in planned if s.peak):
        if s.peak.total > room:
            out.append(f"does not fit: {s.name} needs {s.peak.total:.0f} GB, {name} has {room:.0f} GB free; lower {s.peak.lower}")
        elif s.cost.waiting > s.cost.seconds / 2 and s.peak.total < room / 2 and load.kind != "cpu":
            share = s.cost.waiting / s.cost.seconds
            out.append(f"mostly idle: {s.name} waits for Python {share:.0%} of its time and uses {s.peak.total:.0f} GB; raise {s.rows}")
    return out


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
        "of one device, whatever their number: annotation, mining, evaluation, and summaries of stages 1 and 2 and of the control",
    ]
