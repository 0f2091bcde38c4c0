"""How much work each stage of a profile is: sequences, tokens, FLOPs and seconds of one device.

Arithmetic on the profile, the backbone's sizes and the assumptions of params/plan.yaml; nothing is loaded. It counts what
the loops of contrastive.py, rlvr.py, negatives.py, distil.py, rerank.py and retrieval.py do, every summary being as long as its
cap. Costs are those of all devices together; what one of several cannot take as a whole call shows in the rows per call.

    load = make(settings.load("qwen2vl-2b"), gpu="H20")
    load.rlvr("all").rollouts
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from elva_core.config import PARAMS, SUMMARIES_AT_ONCE, ContrastiveSettings, ProfileError, Settings
from elva_core.data import mbeir
from elva_core.experiments.catalogue import Dataset, Gpu, Known, Unit, architecture, dataset, known
from elva_core.experiments.sizes import Sizes, of_tiny

VISION_CALL = 64  # images per call of the tower, models/vision.py


@dataclass(frozen=True, slots=True)
class Side:
    """Inputs of one kind: mean text tokens, mean images (of one item: the share that has one); so many items in one prompt."""

    text: float
    image: float
    items: float = 1


@dataclass(frozen=True, slots=True)
class Cost:
    """prompts: rows of `Encoder.batch`, every pass counted. rollouts: summaries written. seconds: on one device.

    waiting: those of the seconds in which the device waits for Python: for an image, or for the start of the next layer.
    """

    prompts: float = 0
    rollouts: float = 0
    tokens: float = 0
    flops: float = 0
    seconds: float = 0
    waiting: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, n) + getattr(other, n) for n in self.__slots__))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(getattr(self, n) * times for n in self.__slots__))


@dataclass(frozen=True)
class Workload:
    """A profile on `devices` of one kind."""

    settings: Settings
    known: Known
    sizes: Sizes
    data: Dataset
    gpu: Gpu
    kind: str  # cuda or cpu
    devices: int  # a process each

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.settings.dtype == "bfloat16" else 4

    @property
    def cap(self) -> int:
        return self.settings.encoder.max_summary_tokens

    @property
    def image_tokens(self) -> float:
        return self.sizes.image_tokens(
            min(self.data.image_pixels, self.settings.encoder.max_pixels or self.data.image_pixels)
        )

    def length(self, side: Side, request: str) -> float:
        """Mean tokens of a prompt."""
        text = min(side.text, side.items * self.settings.encoder.max_text_tokens)
        return self._frame(request) + text + side.image * (self.image_tokens + 2)

    def longest(self, side: Side, request: str) -> float:
        """Tokens of the longest prompt that the encoder's limits allow: one such row pads all rows of its call."""
        limits = self.settings.encoder
        image = self.sizes.image_tokens(limits.max_pixels or self.data.image_pixels) + 2 if side.image else 0
        return self._frame(request) + side.items * (limits.max_text_tokens + image)

    def _frame(self, request: str) -> float:
        return (
            self.known.assumed.chat_tokens[self.kind] + len(request) / self.known.assumed.characters_per_token
        )

    def dealt(self, parts: int) -> float:
        """Devices that `parts` equal parts keep busy on average, dealt out in turn (`runtime.own_share`): all, if they divide evenly."""
        return parts / math.ceil(parts / self.devices)

    def side(self, which: str, weight: str | None = None) -> Side:
        """Mean query or candidate over the units, weighted by a count of theirs, or alike."""
        units = {name: getattr(u, weight) if weight else 1 for name, u in self.data.units.items()}
        total, place = sum(units.values()), ("query", "candidate").index(which)
        text = sum(n * getattr(self.data.units[name], which) for name, n in units.items())
        image = sum(n for name, n in units.items() if "image" in mbeir.MODALITIES_OF[task_of(name)][place])
        return Side(text / total, image / total)

    def _seconds(
        self, flops: float, layers: float, read: float = 0.0, images: float = 0.0
    ) -> tuple[float, float]:
        """Preparing images, then the slowest of computing, reading memory, and starting layers from Python; and what of it is waiting."""
        assumed = self.known.assumed
        busy = max(
            flops / (self.gpu.tflops * 1e12 * assumed.utilisation),
            read / (self.gpu.bandwidth * 1e9 * assumed.bandwidth_share),
        )
        waiting = images * self.data.image_pixels / 1e6 * assumed.seconds_per_megapixel
        waiting += max(0.0, layers * assumed.seconds_per_layer[self.kind] - busy)
        return busy + waiting, waiting

    def read(
        self,
        rows: float,
        side: Side,
        request: str,
        *,
        per_call: float,
        rank: int = 0,
        backward: bool = False,
        checkpointing: bool = False,
        continuations: int = 0,
        ending: int = 0,
        logits: int = 0,
        mixed: bool = True,
    ) -> Cost:
        """Prompts run through tower and language model, with the way back if asked.

        Args:
            continuations: of each prompt, `ending` tokens long, on its cache (0: the ending is part of the row).
            logits: positions per row, or per continuation. mixed: padded rows of different lengths.
        """
        sizes, length = self.sizes, self.length(side, request) + (0 if continuations else ending)
        padding = self.data.padding if mixed else 1.0
        parts = [(rows * length * padding, length * padding)]
        if continuations:
            parts.append((rows * continuations * ending, length * padding + ending))
        positions = rows * max(1, continuations) * logits
        forward = sum(sizes.forward(t, c, rank) for t, c in parts) * (2 if backward and checkpointing else 1)
        flops = forward + sizes.logits(positions) * (2 if backward else 1)
        flops += sum(sizes.backward(t, c, rank) for t, c in parts) if backward else 0
        images = (
            rows
            * side.image
            * (min(1.0, self.data.train_pool / rows) if self.settings.encoder.cache_vision else 1.0)
        )
        flops += sizes.vision(images, self.image_tokens)
        passes = len(parts) * (1 + (2 if backward else 0) + (1 if backward and checkpointing else 0))
        layers = (
            rows / per_call * sizes.layers * passes
            + images / min(per_call, VISION_CALL) * sizes.vision_layers
        )
        tokens = rows * (length + continuations * ending)
        return Cost(rows, 0, tokens, flops, *self._seconds(flops, layers, images=images))

    def write(
        self, rows: float, side: Side, rollouts: int, *, per_call: float, rank: int = 0, mixed: bool = True
    ) -> Cost:
        """`rollout.generate`: each prompt once, then one token of all its rollouts at a time, and [RET]."""
        request, per_call = self.settings.encoder.summary_request, min(per_call, rows)
        prefill = self.read(rows, side, request, per_call=per_call, rank=rank, mixed=mixed)
        steps, together, context = (
            self.cap + 1,
            per_call * rollouts,
            self.length(side, request) + (self.cap + 2) / 2,
        )
        flops = self.sizes.forward(together, context, rank) + self.sizes.logits(together)
        weights = (
            self.sizes.linear + self.sizes.adapter(rank) + self.sizes.hidden * self.sizes.vocabulary
        ) * self.width
        read = weights + together * context * self.sizes.kv_bytes(self.width)
        made, one_step = rows * rollouts, Cost(0, 0, 0, flops, *self._seconds(flops, self.sizes.layers, read))
        return prefill + Cost(0, made, made * steps) + one_step * (steps * rows / per_call)

    def contrastive(
        self,
        s: ContrastiveSettings,
        query: Side,
        candidate: Side,
        *,
        negatives: int = 0,
        distinct: float = float("inf"),
    ) -> tuple[Cost, Cost]:
        """(training, writing the summaries it trains on).

        Args:
            distinct: candidates that there are; each process writes a summary once, for the chunks that are its own.
        """
        ret_steps, encoder = int(s.steps * s.ret_share), self.settings.encoder
        train, made = Cost(), Cost()
        for side, n in ((query, s.batch), (candidate, s.batch * (1 + negatives))):
            for steps, request, ending in (
                (s.steps - ret_steps, encoder.eol_request, 0),
                (ret_steps, encoder.summary_request, self.cap + 1),
            ):
                if steps:
                    shape = {
                        "per_call": min(s.chunk, n),
                        "rank": s.lora.rank,
                        "ending": ending,
                        "logits": ending,
                    }
                    train += self.read(
                        steps * n,
                        side,
                        request,
                        backward=True,
                        checkpointing=s.gradient_checkpointing,
                        **shape,
                    )
                    train += (
                        self.read(steps * n, side, request, **shape)
                        if s.gradient_cache or self.devices > 1
                        else Cost()
                    )
            if ret_steps:
                asked = ret_steps * n
                missing = min(asked, distinct * self.devices) if side is candidate else asked
                made += self.write(
                    missing, side, 1, per_call=min(SUMMARIES_AT_ONCE, n / self.devices) * missing / asked
                )
        return train, made

    def distillation(self) -> tuple[Cost, Cost]:
        """(training the single pass, the teacher's summaries); comparing with the bank is little beside a forward."""
        s, train, made = self.settings.distil, Cost(), Cost()
        for which in ("query", "candidate"):
            side, shape = self.side(which, "train"), {"per_call": min(s.chunk, s.batch), "rank": s.lora.rank}
            rows = s.steps * s.batch / 2
            train += self.read(
                rows,
                side,
                self.settings.encoder.eol_request,
                backward=True,
                checkpointing=s.gradient_checkpointing,
                **shape,
            )
            made += self.write(s.pairs, side, 1, per_call=self.settings.evaluation.batch, mixed=False)
        return train, made

    def reranking(self) -> tuple[Cost, Cost, Cost, Cost]:
        """(training the reranker, mining its negatives, embedding val, its looks at the answers to MRBench and to a sample of val)."""
        s, train, looks = self.settings.rerank, Cost(), Cost()
        asked = self.settings.mrbench.queries + s.validation * len(self.bench)
        windows = (
            1 if s.depth <= s.window else math.ceil((s.depth - 1) / (s.window - 1))
        )  # as rerank.windows has it
        for request, prompts, trained, shown, seen in (
            (s.pointwise_request, 1 + s.negatives, 1, s.depth, 1),
            (s.listwise_request, 1, (2 + s.window) / 2, windows, min(s.window, s.depth)),
        ):
            shape = {"rank": s.lora.rank, "backward": True, "checkpointing": s.gradient_checkpointing}
            rows = s.steps / 2 * s.batch * prompts
            train += self.read(
                rows,
                self.together(trained),
                request,
                per_call=min(s.chunk, s.batch * prompts),
                logits=1,
                **shape,
            )
            looks += self.read(asked * shown, self.together(seen), request, per_call=s.prompts, logits=1)
        own = {"stage3": {"queries": s.queries, "negatives": {"pool": s.pool, "again_every": None}}}
        mined = replace(self, settings=self.settings.changed(own)).mining()
        shape = {"per_call": self.settings.evaluation.batch, "mixed": False}
        val = self.write(s.validation * len(self.bench), self.side("query"), 1, **shape)
        val += self.write(
            sum(u.pool for u in self.bench.values()), self.side("candidate"), 1, **shape
        )  # as large as test's
        return train, mined, val, looks

    def together(self, candidates: float) -> Side:
        """A query and so many candidates in one prompt."""
        query, candidate = self.side("query", "train"), self.side("candidate", "train")
        return Side(
            query.text + candidates * candidate.text,
            query.image + candidates * candidate.image,
            1 + candidates,
        )

    @property
    def own_queries(self) -> int:
        """Queries of a step of stage 3 that one device takes."""
        return math.ceil(self.settings.stage3.queries_per_step / self.devices)

    def inputs(self, rollout_sides: str) -> int:
        """Inputs of one call of stage 3: those of `chunk` rollouts, if a device has as many."""
        s = self.settings.stage3
        fitting = max(1, s.chunk // s.num_generations)
        return fitting if rollout_sides == "all" else min(fitting, self.own_queries)

    def rlvr(self, rollout_sides: str) -> Cost:
        """Stage 3: sampling, candidates of the step, reference and policy."""
        s, cost = self.settings.stage3, Cost()
        steps, others = s.queries // s.queries_per_step, 1 + s.negatives.hard + s.negatives.random
        rows, per_call = steps * s.queries_per_step, self.inputs(rollout_sides)
        acting = [(self.side("query"), rows)] + (
            [(self.side("candidate"), rows * others)] if rollout_sides == "all" else []
        )
        for side, n in acting:
            cost += self.write(n, side, s.num_generations, per_call=per_call, rank=s.lora.rank)
            scored = {
                "per_call": per_call,
                "continuations": s.num_generations,
                "ending": self.cap + 1,
                "logits": self.cap,
            }
            cost += self.read(n, side, self.settings.encoder.summary_request, **scored)
            cost += self.read(
                n, side, self.settings.encoder.summary_request, rank=s.lora.rank, backward=True, **scored
            )
        if rollout_sides == "query" and s.candidates == "step":
            per_call = min(s.chunk, self.own_queries * others / 2)  # texts and images apart
            cost += self.write(rows * others, self.side("candidate"), 1, per_call=per_call, rank=s.lora.rank)
        return cost

    def mining(self) -> Cost:
        """Negatives of stage 3: a pool per modality, the queries and their positives; as often as it is repeated."""
        s, batch = self.settings.stage3, self.settings.evaluation.batch
        again = s.negatives.again_every
        rounds = 1 + ((s.queries // s.queries_per_step - 1) // again if again else 0)
        pool = min(self.data.train_pool, len(mbeir.MODALITIES) * (s.negatives.pool or self.data.train_pool))
        cost = self.write(pool + s.queries, self.side("candidate"), 1, per_call=batch, mixed=False)
        return (cost + self.write(s.queries, self.side("query"), 1, per_call=batch, mixed=False)) * rounds

    def evaluation(self) -> Cost:
        """One model: every test query and every candidate once, whatever pool asks for it."""
        queries, pool = (sum(getattr(u, n) for u in self.data.units.values()) for n in ("test", "pool"))
        asked = self.write(
            queries, self.side("query", "test"), 1, per_call=self.settings.evaluation.batch, mixed=False
        )
        return asked + self.write(
            pool, self.side("candidate", "pool"), 1, per_call=self.settings.evaluation.batch, mixed=False
        )

    def search(self, pool: str) -> Cost:
        """Exact search of one model, on the host: one pass over the pool gives the best and the ranks."""
        units = self.data.units.values()
        pairs = (
            sum(u.test * u.pool for u in units)
            if pool == "local"
            else sum(u.test for u in units) * sum(u.pool for u in units)
        )
        flops = 2 * self.sizes.hidden * pairs
        return Cost(flops=flops, seconds=flops / (self.known.assumed.host_tflops * 1e12))

    @property
    def bench(self) -> dict[str, Unit]:
        """The units that MRBench's queries are taken from.

        Raises:
            ProfileError: the data has none of these units.
        """
        asked = self.settings.mrbench
        units = {
            name: u
            for name, u in self.data.units.items()
            if name in asked.units or task_of(name) in asked.tasks
        }
        if not units:
            raise ProfileError(
                f"{self.settings.data.name} has no unit of mrbench.units or mrbench.tasks; correct them"
            )
        return units

    def annotator(self) -> Workload:
        """One of the devices with the model that names MRBench's grains, and the units whose queries it reads."""
        from elva_core.mrbench import annotate  # torch

        bench = self.settings.mrbench
        prompts = {
            "summary_request": annotate.PROMPT + annotate.QUOTE["text"],
            "max_summary_tokens": bench.annotator.max_tokens,
        }
        return replace(
            self,
            sizes=architecture(bench.annotator.model, self.known),
            data=self.data.model_copy(update={"units": self.bench}),
            settings=self.settings.changed({"encoder": prompts}),
            devices=1,
        )

    def annotation(self) -> Cost:
        """Queries of MRBench's units are read until each unit has its share of those with several grains, or no more queries."""
        annotator, bench = self.annotator(), self.settings.mrbench
        units = annotator.data.units.values()
        asked = sum(min(u.test, bench.queries // len(units) / self.data.multi_grain) for u in units)
        return annotator.write(asked, annotator.side("query"), 1, per_call=bench.annotator.batch)


def task_of(unit: str) -> int:
    return int(unit.rpartition("_task")[2])


def make(settings: Settings, *, gpu: str | None = None, devices: int = 1) -> Workload:
    """The workload of a profile.

    Args:
        gpu: a name of params/plan.yaml; None takes the default of the profile's device.

    Raises:
        ProfileError: an unknown GPU, backbone or data set; names what there is.
    """
    table = known()
    name = gpu or table.default_gpu[settings.device.partition(":")[0]]
    if name not in table.gpus:
        raise ProfileError(f"no GPU {name!r} in {PARAMS / 'plan.yaml'}; it has {', '.join(table.gpus)}")
    own = settings.backbone
    sizes = architecture(own.path, table) if own.path else of_tiny(own.tiny, table.tiny_tokens)
    return Workload(
        settings,
        table,
        sizes,
        dataset(settings, table),
        table.gpus[name],
        "cpu" if name == "cpu" else "cuda",
        devices,
    )
