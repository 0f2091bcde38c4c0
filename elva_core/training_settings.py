"""Values of a profile that say how something is trained: steps, rates, adapters, rewards, negatives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from elva_core.values import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, Share


class OptimiserSettings(Section):
    lr: PositiveFloat
    warmup: Share  # of all steps
    final_lr: Share = 0.0  # of the peak, at the end of the cosine
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0
    checkpoint_every: Positive


class LoopSettings(Section):
    steps: Positive
    batch: Positive  # pairs, items or queries of a step
    optimiser: OptimiserSettings


class TeachSettings(Section):
    """How the small backbone learns to see and to summarise before any stage of the paper."""

    jitter: NonNegativeFloat  # spread of a random gain and offset of normalised pixels
    warp: NonNegativeFloat  # largest random scale, turn and shift of a drawing
    vision: LoopSettings
    language: LoopSettings


class LoraSettings(Section):
    rank: Positive
    alpha: PositiveFloat
    dropout: Share


class AdapterSettings(LoopSettings):
    """What the training of one adapter has: steps and rates, its size, what bounds the memory."""

    chunk: Positive  # rows, items or prompts per forward
    gradient_checkpointing: bool = False  # one layer's activations in memory; same gradient, one more forward
    lora: LoraSettings


class ContrastiveSettings(AdapterSettings):
    """InfoNCE over pairs (stages 1 and 2, and the control of stage 3)."""

    # tokens of a forward, with padding, rows of like length together; None is `chunk` rows in their order
    chunk_tokens: Annotated[Positive | None, Field(exclude_if=lambda value: value is None)] = None
    gradient_cache: bool  # one chunk's graph in memory at a time; same gradient, one more forward
    temperature: PositiveFloat
    ret_share: Share  # of the steps that train the state at [RET] instead of the EOL state
    summary_weight: NonNegativeFloat  # of the cross-entropy that keeps the model writing its first summaries
    one_task_per_batch: bool  # batches of one unit instead of a plain shuffle of the union
    mask_false_negatives: bool


class NegativeSettings(Section):
    """Balanced negatives of stage 3: hard ones below a similarity threshold, and random ones."""

    hard: NonNegative
    random: NonNegative
    threshold: float  # absolute cosine; candidates above are dropped as likely positives
    margin: float | None = None  # if set, also drop above cosine(positive) + margin
    pool: Positive | None = None  # hard ones are mined from that many candidates per modality; None is all
    again_every: Positive | None = None  # steps after which the current model mines them anew


class RewardSettings(Section):
    alpha: float
    epsilon: float
    delta: float
    gamma: float
    form: Literal["printed", "corrected"]
    penalty_reduction: Literal["sum", "mean"]
    weights: Literal["fixed", "adaptive"] = "fixed"  # adaptive: by the share of rollouts that succeed


class VllmSettings(Section):
    """Values of `sampler: vllm`; every process has an engine of its own on its own GPU."""

    # ours: a second copy of the 7B weights and 12 GB of cache, of 80 GB
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.35
    drift_bound: PositiveFloat = 0.2  # nats a token; ours: bf16 alone gives some 0.05 (TRL issue 6789)


class RlvrSettings(Section):
    """Stage 3."""

    queries: Positive  # seen in all; one epoch
    queries_per_step: Positive
    num_generations: Annotated[int, Field(ge=2)]  # rollouts of one query
    rollout_sides: Literal["query", "all"]  # whose summaries are actions
    sampler: Literal["transformers", "vllm"] = "transformers"
    vllm: VllmSettings = VllmSettings()
    candidates: Literal["step", "mined"]  # encoded once per step, or as mining encoded them
    temperature: PositiveFloat
    clip: PositiveFloat  # PPO's; never acts: one update per sample, so the ratio is 1 (grpo.py)
    beta: NonNegativeFloat  # weight of the KL divergence from the reference policy
    scale_rewards: Literal["group", "batch", "none"]
    loss_type: Literal["grpo", "dr_grpo", "dapo"]
    gradient: Literal["score", "pathwise", "full"]  # through sampled tokens, through the embedding, both
    chunk: Positive  # rollouts per forward; bounds the memory of a step
    kl_bound: PositiveFloat  # the guard stops above it
    negatives: NegativeSettings
    reward: RewardSettings
    lora: LoraSettings
    optimiser: OptimiserSettings

    @model_validator(mode="after")
    def _resumable(self) -> RlvrSettings:
        again = self.negatives.again_every
        if again and self.optimiser.checkpoint_every % again:
            multiple = f"a multiple of negatives.again_every = {again}"
            raise ValueError(f"optimiser.checkpoint_every must be {multiple}, else a resumed run differs")
        return self


class DistilSettings(AdapterSettings):
    """Distillation of the generative embedding into the EOL pass of the same model; batches of items."""

    pairs: Positive  # of stage 2's first batches, whose queries and candidates the teacher embeds once
    temperature: PositiveFloat  # of the similarities that are matched
    kl_weight: NonNegativeFloat  # of their divergence, beside 1 - cosine


class RerankSettings(AdapterSettings):
    """Reranker: reads a query together with its first candidates; steps half pointwise, half listwise."""

    queries: Positive  # of the train split, the same number per task
    pool: Positive | None = None  # candidates per modality that their negatives are mined from; None is all
    hard: Positive  # of each query's mined negatives the first are trained on
    negatives: Positive  # of a query in a pointwise step, beside its positive
    window: Annotated[int, Field(ge=2)]  # most candidates in a listwise prompt
    depth: Annotated[int, Field(ge=2)]  # of the retriever's answers that are looked at again
    prompts: Positive  # per forward, where answers are looked at
    validation: Positive  # queries of a val unit that choose the weight of the fusion
    timed: Positive  # queries whose seconds are measured
    pointwise_request: str
    listwise_request: str

    @model_validator(mode="after")
    def _enough(self) -> RerankSettings:
        if max(self.negatives, self.window - 1) > self.hard:
            places = f"negatives = {self.negatives} and window = {self.window} (one is right)"
            raise ValueError(f"hard = {self.hard} negatives do not fill {places}")
        return self
