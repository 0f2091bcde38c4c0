"""Settings: params/<profile>.yaml -> one frozen tree of pydantic models.

A profile carries values only; no code asks which profile runs. `extends: NAME` (one level) takes another
profile and changes single keys. Unknown keys and wrong types are refused with file and key. Relative paths
are meant from the repository.

    settings = load("smoke")
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from elva_core import files
from elva_core.values import (
    NonNegative,
    NonNegativeFloat,
    Place,
    Positive,
    PositiveFloat,
    Share,
    merged,
    problems,
)

PARAMS = files.REPOSITORY / "params"
NO_PROFILES = ("reported", "arms", "plan")  # the paper's numbers, what the study changes, what `plan` knows
SUMMARIES_AT_ONCE = 256  # written in one call: without a graph they take less memory than a chunk with one


class ProfileError(ValueError):
    """A profile that cannot be used; the message names file and key."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EmojiSettings(Section):
    """What the embedded collection is written from."""

    language: str
    size: Positive | None = None  # slice of the collection; None is all of it
    vendors: dict[Literal["train", "val", "test"], tuple[str, ...]]
    held_out_share: Share
    queries_per_unit: dict[Literal["train", "val", "test"], Positive]
    up_sample: NonNegative


class DataSettings(Section):
    """Exactly one source: an M-BEIR folder with an NLI file, or the embedded collection."""

    name: str
    root: Place | None = None
    nli: Place | None = None
    emoji: EmojiSettings | None = None
    exclude_units: tuple[str, ...] = ()  # units, or patterns of units, whose queries no training sees


class TinySettings(Section):
    """Sizes of the small model that is built here."""

    architecture: Literal["qwen2_vl", "qwen2_5_vl"] = "qwen2_vl"
    hidden: Positive
    layers: Positive
    heads: Positive
    intermediate: Positive
    vision_hidden: Positive
    vision_layers: Positive
    vision_heads: Positive
    patch: Positive
    image_side: Positive
    vocabulary: Positive
    spare_rows: Positive


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


class BackboneSettings(Section):
    """A folder or hub name, or a small model taught here."""

    path: str | None = None  # as values.model_source reads it
    seed: NonNegative = 0
    tiny: TinySettings | None = None
    teach: TeachSettings | None = None


class EncoderSettings(Section):
    """Prompts and limits of the embedder. `{content}` in a request becomes image, sentence or both."""

    ret_token: str = "[RET]"
    eol_request: str
    summary_request: str
    max_text_tokens: Positive
    min_pixels: Positive | None = None  # of Qwen2-VL and Qwen2.5-VL; other processors have their own
    max_pixels: Positive | None = None
    max_summary_tokens: Positive
    cache_vision: bool

    @model_validator(mode="after")
    def _pixels(self) -> EncoderSettings:
        low, high = self.min_pixels, self.max_pixels
        if low and high and low > high:
            raise ValueError(f"min_pixels = {low} is above max_pixels = {high}; swap them")
        return self


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


class AnnotatorSettings(Section):
    """Annotator of grains: the data itself (exact), a model loaded here, or an OpenAI-compatible server."""

    kind: Literal["exact", "transformers", "openai"]
    model: str | None = None  # as values.model_source reads it; for a server the name it serves
    base_url: str | None = None  # of the server, up to and with its /v1
    key_variable: str | None = None  # environment variable that holds the server's key; None sends none
    batch: Positive = 1  # queries per forward, or requests at once
    retries: NonNegative = 0  # of a request that failed, and of an answer that cannot be read
    max_tokens: Positive = 512  # of an answer
    timeout: Positive = 120  # seconds that a request may take

    @model_validator(mode="after")
    def _complete(self) -> AnnotatorSettings:
        required = {"exact": (), "transformers": ("model",), "openai": ("model", "base_url")}[self.kind]
        optional = {"key_variable"} if self.kind == "openai" else set()
        keys = ("model", "base_url", "key_variable")
        given = tuple(key for key in keys if getattr(self, key) is not None)
        if not set(required) <= set(given) <= {*required, *optional}:
            raise ValueError(f"kind {self.kind} needs {required or 'no model'} and was given {given}")
        return self


class MrbenchSettings(Section):
    tasks: tuple[int, ...] = ()  # every unit of these
    units: tuple[str, ...] = ()  # and these
    queries: Positive
    min_grains: Positive
    verify: Positive  # rows of the human-verification sheet
    precision: Annotated[float, Field(gt=0, lt=1)]  # share of right annotations that verification is to show
    annotator: AnnotatorSettings
    licence: str  # of the images, for the data card


class EvaluationSettings(Section):
    batch: Positive
    on_disk: bool = False  # embeddings go to disk instead of memory
    cutoffs: Annotated[tuple[Positive, ...], Field(min_length=1)]
    bootstrap: Positive
    grain_queries: Positive
    tsne_candidates: Positive


class StudySettings(Section):
    """Which arms of params/arms.yaml are compared, over which training seeds."""

    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)]
    arms: tuple[str, ...] = ()  # none means all
    units: tuple[str, ...] = ()  # test units, or patterns of them, of every arm besides MRBench
    in_chain: bool  # whether the chain trains arms that have no result yet; else `study` does


class VideoSettings(Section):
    """Text to video: the sets of the paper's Table 7, or short clips of the collection's drawings."""

    sets: Place | None = None  # folder with msrvtt/ and msvd/, or one of them
    drawings: Positive | None = None  # of the embedded collection, each in every motion
    length: Positive = 16  # frames of a clip
    rate: Positive = 8  # of them in a second
    frames: Annotated[tuple[Positive, ...], Field(min_length=1)]  # looked at; ascending, the last is reported
    instruction: str  # of the queries

    @model_validator(mode="after")
    def _one_source(self) -> VideoSettings:
        if (self.sets is None) == (self.drawings is None):
            raise ValueError("give either sets or drawings")
        if list(self.frames) != sorted(set(self.frames)):
            raise ValueError(f"frames must ascend, and are {list(self.frames)}")
        return self


class UnseenSettings(Section):
    """Sets that no stage saw: those of the paper's Table 2, or the embedded collection's own rows."""

    sets: Place | None = None  # folder of the sets, as their authors publish them
    language: str | None = None  # of the embedded collection: one that no stage trains on
    queries: Positive | None = None  # of each row

    @model_validator(mode="after")
    def _one_source(self) -> UnseenSettings:
        if (self.sets is None) != (self.language is not None and self.queries is not None):
            raise ValueError("give either sets, or both language and queries")
        return self


class Settings(Section):
    """One whole profile."""

    profile: str
    evidence: bool  # False: the run tests plumbing and gets no verdicts
    device: str
    dtype: Literal["float32", "bfloat16"]
    threads: Positive | None
    data: DataSettings
    backbone: BackboneSettings
    encoder: EncoderSettings
    stage1: ContrastiveSettings
    stage2: ContrastiveSettings
    stage3: RlvrSettings
    control: ContrastiveSettings
    distil: DistilSettings | None = None
    rerank: RerankSettings | None = None
    mrbench: MrbenchSettings
    evaluation: EvaluationSettings
    study: StudySettings
    video: VideoSettings | None = None
    unseen: UnseenSettings | None = None

    def changed(self, changes: dict) -> Settings:
        """A copy with some values replaced, as deep as `changes` goes; unknown keys are refused."""
        return Settings.model_validate(merged(self.model_dump(), changes))

    def digest(self) -> str:
        """SHA-256 of the values that differ from their defaults: a new key leaves the digests of before."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()


def load(profile: str) -> Settings:
    """The resolved profile.

    Raises:
        ProfileError: missing file, broken YAML, unknown key, wrong type; says where.
    """
    path = PARAMS / f"{profile}.yaml"
    values = _read(path)
    if parent := values.pop("extends", None):
        base = _read(PARAMS / f"{parent}.yaml")
        if "extends" in base:
            raise ProfileError(f"{path}: extends {parent}, which extends {base['extends']}; one level only")
        values = merged(base, values)
    try:
        return Settings(profile=profile, **values)
    except ValidationError as error:
        raise ProfileError(f"{path}: {problems(error)}") from None


def _read(path: Path) -> dict:
    if not path.is_file():
        known = sorted(p.stem for p in PARAMS.glob("*.yaml") if p.stem not in NO_PROFILES)
        raise ProfileError(f"{path} is missing; profiles are {known}")
    try:
        values = files.read_yaml(path)
    except files.ElvaDataError as error:
        raise ProfileError(str(error)) from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ProfileError(f"{path}: expected keys and values at the top level")
    return values
