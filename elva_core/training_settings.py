"""Training values of a profile: steps, rates, adapters, rewards, negatives."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from elva_core.values import Section, Share

Dims = tuple[PositiveInt, ...]  # sizes of nested embeddings (Matryoshka); none means the whole alone


class OptimiserSettings(Section):
    lr: PositiveFloat
    warmup: Share  # of all steps
    final_lr: Share = 0.0  # of the peak, at the end of the cosine
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0
    checkpoint_every: PositiveInt


class LoopSettings(Section):
    steps: PositiveInt
    batch: PositiveInt  # pairs, items or queries of a step
    optimiser: OptimiserSettings


class SmallModelSettings(Section):
    """Sizes of a small model of the real classes."""

    architecture: Literal["qwen2_vl", "qwen2_5_vl"] = "qwen2_vl"
    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    intermediate: PositiveInt
    vision_hidden: PositiveInt
    vision_layers: PositiveInt
    vision_heads: PositiveInt
    patch: PositiveInt
    image_side: PositiveInt
    vocabulary: PositiveInt
    spare_rows: PositiveInt


class RedrawSettings(Section):
    """Random changes of a drawing each time that it is shown; zeros show it as it is."""

    warp: NonNegativeFloat  # turn, shear, shift, and change of scale and aspect
    jitter: NonNegativeFloat  # gain and offset of its colours
    blur: Share  # or sharpening
    holes: Share  # drawings with a white square in them


class TeachSettings(Section):
    """Recipe of a small backbone that can read drawings: params/backbone/<name>.yaml."""

    profile: str  # whose data, vocabulary and prompts
    seed: NonNegativeInt
    sizes: SmallModelSettings
    first: str | None = None  # a backbone whose words and weights are taken over as far as they fit
    vendors: tuple[str, ...]  # of the embedded collection, whose drawings it sees
    styles: tuple[str, ...]  # npm packages of @iconify-json, likewise
    redraw: RedrawSettings
    dropout: Share  # in the tower
    label_smoothing: Share  # of captions
    bfloat16: bool  # matrix products in half the bits
    tower: LoopSettings  # grains of drawings by a linear readout
    joint: LoopSettings  # captions of drawings, of texts, and of both; tower and language model
    tower_rate: PositiveFloat  # in the joint lesson, of the language model's rate
    keep: tuple[
        PositiveInt, ...
    ] = ()  # steps of the joint lesson after which a copy is kept, which reads less well

    @model_validator(mode="after")
    def _as_built(self) -> TeachSettings:
        if self.sizes.architecture == "qwen2_5_vl" and not self.first:
            raise ValueError("a qwen2_5_vl takes the weights of a qwen2_vl; name its folder as first")
        return self


class LoraSettings(Section):
    rank: PositiveInt
    alpha: PositiveFloat
    dropout: Share


class AdapterSettings(LoopSettings):
    """Values of the training of one adapter: steps and rates, its size, bounds of memory."""

    chunk: PositiveInt  # rows, items or prompts per forward
    gradient_checkpointing: bool = False  # one layer's activations in memory; same gradient, one more forward
    lora: LoraSettings


class ContrastiveSettings(AdapterSettings):
    """InfoNCE over pairs (stages 1 and 2, and the control of stage 3)."""

    # tokens of a forward, with padding, rows of like length together; None is `chunk` rows in their order,
    # which no card says
    chunk_tokens: Annotated[PositiveInt | None, Field(exclude_if=lambda value: value is None)] = None
    gradient_cache: bool  # one chunk's graph in memory at a time; same gradient, one more forward
    temperature: PositiveFloat
    ret_share: Share  # of the steps that train the state at [RET] instead of the EOL state
    summary_weight: NonNegativeFloat  # of the cross-entropy that keeps the model writing its first summaries
    one_task_per_batch: bool  # batches of one unit instead of a plain shuffle of the union
    mask_false_negatives: bool
    dims: Dims = ()  # the loss is the mean over these prefixes of the embeddings; list the whole size, too
    bare_share: Share = 0.0  # of a step's items, read at [RET] at once: adaptive summaries start from that


class ControlSettings(ContrastiveSettings):
    """Stage 3's queries and negatives without reinforcement learning; its best rival sets all of these."""

    hard: NonNegativeInt | None = None  # of a query's mined hard negatives, the hardest; None is all
    random: NonNegativeInt | None = None  # of its random ones
    loss: Literal["infonce", "grains"] = "infonce"  # grains: divergence from the overlap of grains
    grain_temperature: PositiveFloat = 0.1  # of the overlap; ours: with half of it a candidate weighs e^-5

    @property
    def queries(self) -> int:
        """Queries of stage 3 that it sees."""
        return self.steps * self.batch

    @model_validator(mode="after")
    def _both_counts(self) -> ControlSettings:
        if (self.hard is None) != (self.random is None):
            raise ValueError("give both hard and random, or neither")
        return self


class NegativeSettings(Section):
    """Balanced negatives of stage 3: hard ones below a similarity threshold, and random ones."""

    hard: NonNegativeInt
    random: NonNegativeInt
    threshold: float  # absolute cosine; candidates above are dropped as likely positives
    margin: float | None = None  # if set, also drop above cosine(positive) + margin
    pool: PositiveInt | None = None  # hard ones are mined from that many candidates per modality; None is all
    again_every: PositiveInt | None = None  # steps after which the current model mines them anew
    # of the mined queries of each task, by rank of the positive: [0.5, 1] is the harder half, and mines twice
    # as many queries
    difficulty: tuple[Share, Share] | None = None

    @model_validator(mode="after")
    def _some_are_left(self) -> NegativeSettings:
        if self.difficulty and self.difficulty[0] >= self.difficulty[1]:
            raise ValueError(f"difficulty must ascend from the easiest share, and is {list(self.difficulty)}")
        return self


class RewardSettings(Section):
    alpha: float
    epsilon: float
    delta: float
    gamma: float
    form: Literal["printed", "corrected"]
    penalty_reduction: Literal["sum", "mean"]
    weights: Literal["fixed", "adaptive"] = "fixed"  # adaptive: by the share of rollouts that succeed
    token_cost: NonNegativeFloat = 0.0  # subtracted for every token of a summary


class VllmSettings(Section):
    """Values of `sampler: vllm`; every process has an engine of its own on its own GPU."""

    # ours: a second copy of the 7B weights and 12 GB of cache, of 80 GB
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.35
    drift_bound: PositiveFloat = 0.2  # nats a token; ours: bf16 alone gives some 0.05 (TRL issue 6789)


class RlvrSettings(Section):
    """Stage 3."""

    queries: PositiveInt  # seen in all; one epoch
    queries_per_step: PositiveInt
    num_generations: Annotated[int, Field(ge=2)]  # rollouts of one query
    rollout_sides: Literal["query", "all", "both"]  # whose summaries are actions; both: in turns
    resample: NonNegativeInt = 0  # times that a group without spread of rewards gives way to another query's
    sampler: Literal["transformers", "vllm"] = "transformers"
    vllm: VllmSettings = VllmSettings()
    candidates: Literal["step", "mined"]  # encoded once per step, or as mining encoded them
    temperature: PositiveFloat
    clip: PositiveFloat  # PPO's; never acts: one update per sample, so the ratio is 1 (grpo.py)
    beta: NonNegativeFloat  # weight of the KL divergence from the reference policy
    scale_rewards: Literal["group", "batch", "none"]
    loss_type: Literal["grpo", "dr_grpo", "dapo"]
    # through sampled tokens, through the embedding, both; gated: score, and InfoNCE of low rewards (ARR)
    gradient: Literal["score", "pathwise", "full", "gated"]
    infonce_weight: NonNegativeFloat = 0.1  # of gradient: gated, as LREM's
    infonce_temperature: PositiveFloat = 0.05  # that of stages 1 and 2
    chunk: PositiveInt  # rollouts per forward; bounds the memory of a step
    decode_rows: PositiveInt | None = None  # summaries written together, with no graph; None: all of a step's
    dims: Dims = ()  # rewards are the mean over these prefixes of the embeddings
    kl_bound: PositiveFloat  # the guard stops above it
    negatives: NegativeSettings
    reward: RewardSettings
    lora: LoraSettings
    optimiser: OptimiserSettings

    @property
    def mined_queries(self) -> int:
        """Queries of which `negatives.difficulty` keeps `queries`."""
        low, high = self.negatives.difficulty or (0, 1)
        return math.ceil(self.queries / (high - low))

    @model_validator(mode="after")
    def _resumable(self) -> RlvrSettings:
        again = self.negatives.again_every
        if again and self.optimiser.checkpoint_every % again:
            multiple = f"a multiple of negatives.again_every = {again}"
            raise ValueError(f"optimiser.checkpoint_every must be {multiple}, else a resumed run differs")
        return self


class DistilSettings(AdapterSettings):
    """Distillation of the generative embedding into the EOL pass of the same model; batches of items."""

    pairs: PositiveInt  # of stage 2's first batches, whose queries and candidates the teacher embeds once
    temperature: PositiveFloat  # of the similarities that are matched
    kl_weight: NonNegativeFloat  # of their divergence, beside 1 - cosine
    dims: Dims = ()  # as in ContrastiveSettings; of student, teacher and bank


class RerankSettings(AdapterSettings):
    """Reranker: reads a query together with its first candidates; steps half pointwise, half listwise."""

    queries: PositiveInt  # of the train split, the same number per task
    pool: PositiveInt | None = None  # candidates per modality that their negatives are mined from; None: all
    hard: PositiveInt  # of each query's mined negatives the first are trained on
    negatives: PositiveInt  # of a query in a pointwise step, beside its positive
    window: Annotated[int, Field(ge=2)]  # most candidates in a listwise prompt
    depth: Annotated[int, Field(ge=2)]  # of the retriever's answers that are looked at again
    prompts: PositiveInt  # per forward, where answers are looked at
    validation: PositiveInt  # queries of a val unit that choose the weight of the fusion
    timed: PositiveInt  # queries whose seconds are measured
    pointwise_request: str
    listwise_request: str

    @model_validator(mode="after")
    def _enough(self) -> RerankSettings:
        if max(self.negatives, self.window - 1) > self.hard:
            places = f"negatives = {self.negatives} and window = {self.window} (one is right)"
            raise ValueError(f"hard = {self.hard} negatives do not fill {places}")
        return self
