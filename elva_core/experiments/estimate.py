"""Estimate of the work of each stage of a profile: prompts, tokens, FLOPs, seconds of a device, memory.

Arithmetic on the profile, the counts of backbone and data, and the assumptions of params/plan.yaml, for what
the loops of training/, retrieval/ and mrbench/ do, every summary being as long as its cap. Amounts are those
of all devices, memory that of the fullest one.

    load = make(config.load("qwen2vl-2b"), gpu="H20")
    load.rlvr("all").rollouts
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from elva_core.config import SUMMARIES_AT_ONCE, ProfileError, Settings
from elva_core.data import mbeir
from elva_core.experiments import measured
from elva_core.experiments.cost import Cost, Side
from elva_core.experiments.sizes import TABLE, Dataset, Gpu, Known, Sizes, dataset, known, of_model, task_of
from elva_core.models.vision import IMAGES_AT_ONCE
from elva_core.mrbench import annotate
from elva_core.training_settings import ContrastiveSettings


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
    measured: str | None = None  # card, date and commit of what the assumptions were measured on

    @property
    def width(self) -> int:  # bytes of a weight
        return 2 if self.settings.dtype == "bfloat16" else 4

    @property
    def cap(self) -> int:
        return self.settings.encoder.max_summary_tokens

    @property
    def image_tokens(self) -> float:
        pixels = self.data.image_pixels
        return self.sizes.image_tokens(min(pixels, self.settings.encoder.max_pixels or pixels))

    def length(self, side: Side, request: str) -> float:
        """Mean tokens of a prompt."""
        text = min(side.text, side.items * self.settings.encoder.max_text_tokens)
        return self._frame(request) + text + side.image * (self.image_tokens + 2)

    def longest(self, side: Side, request: str) -> float:
        """Tokens of the longest prompt that the encoder's limits allow: one such row pads all of its call."""
        limits = self.settings.encoder
        image = self.sizes.image_tokens(limits.max_pixels or self.data.image_pixels) + 2 if side.image else 0
        return self._frame(request) + side.items * (limits.max_text_tokens + image)

    def _frame(self, request: str) -> float:
        assumed = self.known.assumed
        return assumed.chat_tokens[self.kind] + len(request) / assumed.characters_per_token

    def dealt(self, parts: float) -> float:
        """Devices that equal parts, rounded up, keep busy on average, dealt by `distributed.own_share`."""
        whole = math.ceil(parts)
        return whole / math.ceil(whole / self.devices)

    def side(self, which: str, weight: str | None = None) -> Side:
        """Mean query or candidate over the units, weighted by a count of theirs, or alike."""
        units = {name: getattr(u, weight) if weight else 1 for name, u in self.data.units.items()}
        total, place = sum(units.values()), ("query", "candidate").index(which)
        text = sum(n * getattr(self.data.units[name], which) for name, n in units.items())
        image = sum(n for name, n in units.items() if "image" in mbeir.MODALITIES_OF[task_of(name)][place])
        return Side(text / total, image / total)

    def together(self, candidates: float) -> Side:
        """A query and so many candidates in one prompt."""
        query, candidate = self.side("query", "train"), self.side("candidate", "train")
        text, image = query.text + candidates * candidate.text, query.image + candidates * candidate.image
        return Side(text, image, 1 + candidates)

    def _seconds(self, flops: float, layers: float, read=0.0, images=0.0) -> tuple[float, float]:
        """(seconds, those of waiting): the slowest of computing, reading and starting layers; and images.

        Args:
            layers: that Python starts. read: bytes of memory. images: that the host opens and resizes, ahead
                where there are workers.
        """
        assumed = self.known.assumed
        computing = flops / (self.gpu.tflops * 1e12 * assumed.utilisation)
        busy = max(computing, read / (self.gpu.bandwidth * 1e9 * assumed.bandwidth_share))
        waiting = images * self.data.image_pixels / 1e6 * assumed.seconds_per_megapixel
        if workers := self.settings.encoder.workers:
            waiting = max(0.0, waiting / workers - busy)
        waiting += max(0.0, layers * assumed.seconds_per_layer[self.kind] - busy)
        return busy + waiting, waiting

    def memory(self, rank: int, activations: float, cache: float, positions: float) -> dict[str, float]:
        """GB of a device by part: adapter and optimiser where `rank` is trained.

        Args:
            activations, cache: bytes, the latter of keys and values. positions: that have logits at once.
        """
        parts = {
            "weights": self.sizes.parameters * self.width,
            "adapter and optimiser": self.sizes.training_bytes(rank) if rank else 0,
            "activations": activations,
            "key/value cache": cache,
            "logits": self.known.assumed.logit_copies * 4 * self.sizes.vocabulary * positions,
        }
        return {part: size / 1e9 for part, size in parts.items()}

    def read(
        self,
        rows: float,
        side: Side,
        request: str,
        *,
        per_call: float,
        held: float | None = None,
        fullest: Side | None = None,
        rank: int = 0,
        learning=None,
        continuations: int = 0,
        ending: int = 0,
        logits: int = 0,
        mixed: bool = True,
        looks: float = 1.0,
    ) -> Cost:
        """Prompts run through tower and language model.

        Args:
            per_call: rows of a forward. held: rows in memory at once, where they are not those of a forward.
            fullest: the longest of the prompts, where they are not alike. rank: of the adapter, 0 for none.
            learning: the training section whose adapter the way back is taken to; None: forward only.
            continuations: of each prompt, `ending` tokens long, on its cache (0: the ending is in the row).
            logits: positions per row, or per continuation. mixed: padded rows of different lengths.
            looks: share of the images that no pass of the same step has looked at.
        """
        model, data, kept = self.sizes, self.data, self.sizes.inside_bytes(self.width)
        backward, again = learning is not None, getattr(learning, "gradient_checkpointing", False)
        if backward:
            rank, dropout = learning.lora.rank, learning.lora.dropout > 0
            kept = model.activation_bytes(self.width, rank, dropout=dropout, checkpointing=again)
        length = self.length(side, request) + (0 if continuations else ending)
        padded = length * (data.padding if mixed else 1.0)
        parts = [(rows * padded, padded)]  # tokens, and the positions that each attends to
        if continuations:
            parts.append((rows * continuations * ending, padded + ending))
        # FLOPs: layers, once more where they are computed again; output layer; the way back; tower
        flops = sum(model.forward(*part, rank) for part in parts) * (1 + again)
        flops += model.logit * rows * max(1, continuations) * logits * (1 + backward)
        flops += sum(model.backward(*part, rank) for part in parts) * backward
        images = (
            looks * side.image * (min(rows, data.train_pool) if self.settings.encoder.cache_vision else rows)
        )
        flops += model.vision(images, self.image_tokens)
        layers = rows / per_call * model.layers * len(parts) * (1 + again + 2 * backward)
        layers += images / min(per_call, IMAGES_AT_ONCE) * model.vision_layers
        seconds = self._seconds(flops, layers, images=images)
        # memory, with prompts as long as the limits allow; the way back repeats a prompt's keys and values
        held, longest = held or per_call, self.longest(fullest or side, request)
        together = held * (longest + max(1, continuations) * ending)
        once, repeated = (model.kv_bytes(self.width, repeated=r) for r in (False, True))
        cache = held * continuations * ((longest + ending) * once + longest * repeated * backward)
        memory = self.memory(rank, together * kept, cache, held * max(1, continuations) * logits)
        return Cost(rows, 0, rows * (length + continuations * ending), flops, *seconds, memory)

    def write(
        self, rows: float, side: Side, rollouts: int, *, per_call: float, held=None, rank=0, mixed=True
    ) -> Cost:
        """`generation.generate`: each prompt once, then one token of all its rollouts at a time, and [RET].

        Arguments are those of `read`; the memory is that of the first step, one layer of all prompts inside.
        """
        held, per_call = held or per_call, min(per_call, rows)
        model, request = self.sizes, self.settings.encoder.summary_request
        prefill = self.read(rows, side, request, per_call=per_call, rank=rank, mixed=mixed)
        steps, together = self.cap + 1, per_call * rollouts
        context = self.length(side, request) + (self.cap + 2) / 2
        flops = model.forward(together, context, rank) + model.logit * together
        weights = (model.linear + model.adapter(rank) + model.hidden * model.vocabulary) * self.width
        moved = weights + together * context * model.kv_bytes(self.width)
        longest, summaries = self.longest(side, request), rows * rollouts
        cache = held * rollouts * (longest + self.cap + 1) * model.kv_bytes(self.width)
        memory = self.memory(rank, held * longest * model.inside_bytes(self.width), cache, held * rollouts)
        one_step = Cost(0, 0, 0, flops, *self._seconds(flops, model.layers, moved), memory)
        return prefill + Cost(0, summaries, summaries * steps) + one_step * (steps * rows / per_call)

    def embed(self, rows: float, which: str, weight: str | None = None) -> Cost:
        """Queries or candidates embedded, of like length in a call (retriever.py)."""
        return self._encoded(rows, which, weight, per_call=self.settings.evaluation.batch, mixed=False)

    def _encoded(self, rows: float, which: str, weight: str | None = None, **shape) -> Cost:
        """After one summary each; candidates that write none are read at [RET] at once."""
        side, encoder = self.side(which, weight), self.settings.encoder
        if which == "query" or encoder.candidate_summaries:
            return self.write(rows, side, 1, **shape)
        return self.read(rows, side, encoder.summary_request, ending=1, logits=1, **shape)

    def contrastive(
        self, s: ContrastiveSettings, query: Side, candidate: Side, *, negatives=0, distinct=math.inf
    ) -> tuple[Cost, Cost]:
        """(training, writing the summaries it trains on).

        Args:
            negatives: of a query, beside its positive.
            distinct: candidates that there are; each process writes a summary once, for its own chunks.
        """
        at_ret, encoder = int(s.steps * s.ret_share), self.settings.encoder
        train, written, items = Cost(), Cost(), s.batch * (2 + negatives)
        # a batch is read once more where its chunks have one graph at a time
        again = s.gradient_cache or self.devices > 1
        sides = (query, s.batch), (candidate, s.batch * (1 + negatives))
        for side, n in sides:
            writes = side is query or encoder.candidate_summaries
            rows = at_ret * n
            missing = min(rows, distinct * self.devices) if side is candidate else rows
            for steps, request, ending in (
                (s.steps - at_ret, encoder.eol_request, 0),
                (at_ret, encoder.summary_request, 1 + self.cap * writes),
            ):
                shape = {"per_call": min(s.chunk, n), "held": None, "ending": ending, "logits": ending}
                if s.chunk_tokens:  # rows of like length, dealt evenly; memory is that of the longest ones
                    ends = 1 + self.cap if ending else 0
                    tokens = sum(k * (self.length(x, request) + ends) for x, k in sides)
                    chunks = self.devices * math.ceil(tokens / s.chunk_tokens / self.devices)
                    shape["per_call"] = tokens / chunks / (self.length(side, request) + ending)
                    shape["held"] = min(s.chunk_tokens / (self.longest(side, request) + ends), items)
                    shape["mixed"] = False
                if steps:
                    looks = 1 - missing / rows if ending and writes else 1
                    how = {"looks": 0 if again else looks} | ({} if again else {"held": items})
                    train += self.read(steps * n, side, request, learning=s, **(shape | how))
                    shape |= {"rank": s.lora.rank, "looks": looks}
                    train += self.read(again * steps * n, side, request, **shape)
            if rows and writes:
                per_call = min(SUMMARIES_AT_ONCE, n / self.devices) * missing / rows
                held = min(SUMMARIES_AT_ONCE, items / self.devices)  # queries and candidates together
                written += self.write(missing, side, 1, per_call=per_call, held=held)
        adapter = self.sizes.training_bytes(s.lora.rank) / 1e9  # switched off while summaries are written
        return train, written.beside("adapter and optimiser", adapter) if written.rollouts else written

    def distillation(self) -> tuple[Cost, Cost]:
        """(training the single pass, the teacher's summaries); comparing vectors is little beside them."""
        s, train, written = self.settings.distil, Cost(), Cost()
        rows, shape = s.steps * s.batch / 2, {"per_call": min(s.chunk, s.batch), "learning": s}
        bank = 2 * s.pairs * self.sizes.hidden * 4 / 1e9
        for which in ("query", "candidate"):
            train += self.read(rows, self.side(which, "train"), self.settings.encoder.eol_request, **shape)
            written += self.embed(s.pairs, which, "train")
        return train.beside("teacher's embeddings", bank), written

    def reranking(self) -> tuple[Cost, Cost, Cost, Cost]:
        """(training the reranker, mining its negatives, embedding val, its looks at MRBench and val)."""
        s, bench, train, looks = self.settings.rerank, self.bench.units, Cost(), Cost()
        answers = self.settings.mrbench.queries + s.validation * len(bench)
        # listwise windows overlap by one candidate, as `reranker.windows` has it
        windows = 1 if s.depth <= s.window else math.ceil((s.depth - 1) / (s.window - 1))
        for request, prompts, trained, shown, seen in (
            (s.pointwise_request, 1 + s.negatives, 1, s.depth, 1),
            (s.listwise_request, 1, (2 + s.window) / 2, windows, min(s.window, s.depth)),
        ):
            rows, shape = s.steps / 2 * s.batch * prompts, {"per_call": min(s.chunk, s.batch * prompts)}
            shape["fullest"] = self.together(s.window if trained > 1 else 1)
            train += self.read(rows, self.together(trained), request, learning=s, logits=1, **shape)
            looks += self.read(answers * shown, self.together(seen), request, per_call=s.prompts, logits=1)
        drawn = {"stage3": {"queries": s.queries, "negatives": {"pool": s.pool, "again_every": None}}}
        mined = replace(self, settings=self.settings.changed(drawn)).mining()
        val = self.embed(s.validation * len(bench), "query")
        val += self.embed(sum(u.pool for u in bench.values()), "candidate")  # as large as test's
        return train, mined, val, looks

    def rlvr(self, rollout_sides: str) -> Cost:
        """Stage 3: sampling, candidates of the step, reference and policy; `both`: positives act in turns."""
        s = self.settings.stage3
        steps = s.queries // s.queries_per_step
        turned = steps // 2 if rollout_sides == "both" else 0
        cost = self._rolled_out(steps - turned, "query", "candidate", rollout_sides)
        if turned:
            cost += self._rolled_out(turned, "candidate", "query", rollout_sides)
        vllm = self.gpu.memory * s.vllm.gpu_memory_utilization
        return cost.beside("vLLM", vllm if s.sampler == "vllm" else 0)

    def _rolled_out(self, steps: int, asks: str, answers: str, rollout_sides: str) -> Cost:
        """Steps of stage 3 whose `asks` have rollouts, against one right and all wrong `answers` each."""
        s, request, cost = self.settings.stage3, self.settings.encoder.summary_request, Cost()
        every, fitting = rollout_sides == "all", max(1, s.chunk // s.num_generations)
        rows, ranked = steps * s.queries_per_step, 1 + s.negatives.hard + s.negatives.random
        own = math.ceil(s.queries_per_step / self.devices)  # of a step, that one device takes
        rank, per_call = s.lora.rank, fitting if every else min(fitting, own)
        shape = {"continuations": s.num_generations, "ending": self.cap + 1, "logits": self.cap, "looks": 0}
        for which, of_one in ((asks, 1), (answers, ranked))[: 1 + every]:
            n, side, inputs = rows * of_one, self.side(which), own * of_one
            together = max(1, s.decode_rows // s.num_generations) if s.decode_rows else inputs
            cost += self.write(n, side, s.num_generations, per_call=min(together, inputs), rank=rank)
            cost += self.read(n, side, request, per_call=per_call, **shape)
            cost += self.read(n, side, request, per_call=per_call, learning=s, **shape)
        if not every and s.candidates == "step":
            apart = own * ranked / 2  # texts and images
            per_call = min(s.decode_rows or apart, apart)
            cost += self._encoded(rows * ranked, answers, per_call=per_call, rank=rank)
        return cost

    def mining(self) -> Cost:
        """Negatives of stage 3: a pool per modality, queries and their positives, as often as repeated."""
        s, everything = self.settings.stage3, self.data.train_pool
        again, pool = s.negatives.again_every, s.negatives.pool or everything
        rounds = 1 + ((s.queries // s.queries_per_step - 1) // again if again else 0)
        candidates = min(everything, len(mbeir.MODALITIES) * pool) + s.mined_queries
        return (self.embed(candidates, "candidate") + self.embed(s.mined_queries, "query")) * rounds

    def evaluation(self) -> Cost:
        """One model: every test query and every candidate once, whatever pool asks for it."""
        queries, pool = (sum(getattr(u, n) for u in self.data.units.values()) for n in ("test", "pool"))
        return self.embed(queries, "query", "test") + self.embed(pool, "candidate", "pool")

    def search(self, pool: str) -> Cost:
        """Exact search of one model, on the host: one pass over the pool gives the best and the ranks."""
        units = self.data.units.values()
        everything = sum(u.pool for u in units)
        pairs = sum(u.test * (u.pool if pool == "local" else everything) for u in units)
        flops = 2 * self.sizes.hidden * pairs
        return Cost(flops=flops, seconds=flops / (self.known.assumed.host_tflops * 1e12))

    @property
    def bench(self) -> Dataset:
        """The data with the units that MRBench's queries are taken from.

        Raises:
            ProfileError: the data has none of these units.
        """
        s, units = self.settings.mrbench, self.data.units
        chosen = {name: u for name, u in units.items() if name in s.units or task_of(name) in s.tasks}
        if not chosen:
            name = self.settings.data.name
            raise ProfileError(f"{name} has no unit of mrbench.units or mrbench.tasks; correct them")
        return self.data.model_copy(update={"units": chosen})

    def annotator(self) -> Workload:
        """A device with the model that names MRBench's grains, and the units whose queries it reads."""
        annotator, request = self.settings.mrbench.annotator, annotate.PROMPT + annotate.QUOTE["text"]
        prompts = {"summary_request": request, "max_summary_tokens": annotator.max_tokens, "workers": 0}
        settings = self.settings.changed({"encoder": prompts})
        model = of_model(annotator.model, self.known.architectures)
        return replace(self, sizes=model, data=self.bench, settings=settings, devices=1)

    def annotation(self) -> Cost:
        """Queries are read until each unit has its share of those with several grains, or no more queries."""
        annotator, s, units = self.annotator(), self.settings.mrbench, self.bench.units.values()
        share = s.queries // len(units) / self.data.multi_grain
        queries = sum(min(unit.test, share) for unit in units)
        return annotator.write(queries, annotator.side("query"), 1, per_call=s.annotator.batch)


def make(settings: Settings, *, gpu: str | None = None, devices: int = 1) -> Workload:
    """The workload of a profile.

    Args:
        gpu: a name of params/plan.yaml; None takes the default of the profile's device.

    Raises:
        ProfileError: an unknown GPU, backbone or data set; names what there is.
    """
    table, model = known(), settings.backbone
    name = gpu or table.default_gpu[settings.device.partition(":")[0]]
    if name not in table.gpus:
        raise ProfileError(f"no GPU {name!r} in {TABLE}; it has {', '.join(table.gpus)}")
    sizes = of_model(model.path, table.architectures)
    kind = "cpu" if name == "cpu" else "cuda"
    table, source = measured.applied(table, name)
    return Workload(settings, table, sizes, dataset(settings, table), table.gpus[name], kind, devices, source)
