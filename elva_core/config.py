"""Settings: params/<profile>.yaml -> one frozen tree of pydantic models.

A profile carries values only; no code asks which profile runs. `extends: NAME` takes another
profile and changes single keys. Unknown keys and wrong types are refused with file and key. Relative paths
are meant from the repository.

    settings = load("smoke")
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from elva_core import files
from elva_core.training_settings import (
    ContrastiveSettings,
    ControlSettings,
    DistilSettings,
    RerankSettings,
    RlvrSettings,
    TeachSettings,
)
from elva_core.values import Place, Section, Share, merged, problems

PARAMS = files.REPOSITORY / "params"
NO_PROFILES = ("reported", "arms", "plan")  # the paper's numbers, what the study changes, what `plan` knows
SUMMARIES_AT_ONCE = 256  # written in one call: without a graph they take less memory than a chunk with one


class ProfileError(ValueError):
    """A profile that cannot be used; the message names file and key."""


class EmojiSettings(Section):
    """Values that the embedded collection is written from."""

    language: str
    size: PositiveInt | None = None  # slice of the collection; None is all of it
    vendors: dict[Literal["train", "val", "test"], tuple[str, ...]]
    held_out_share: Share
    queries_per_unit: dict[Literal["train", "val", "test"], PositiveInt]
    up_sample: NonNegativeInt


class DataSettings(Section):
    """Exactly one source: an M-BEIR folder with an NLI file, or the embedded collection."""

    name: str
    root: Place | None = None
    nli: Place | None = None
    emoji: EmojiSettings | None = None
    exclude_units: tuple[str, ...] = ()  # units, or patterns of units, whose queries no training sees


class BackboneSettings(Section):
    """The model that stage 1 starts from."""

    path: str  # a folder or a name on the hub, as values.model_source reads it


class EncoderSettings(Section):
    """Prompts and limits of the embedder. `{content}` in a request becomes image, sentence or both.

    A key with `exclude_if` stands in elva.json, an index's manifest and a card only if it was set.
    """

    ret_token: str = "[RET]"
    # the system's turn of an item without an instruction; None: no such turn, instructions precede the text
    system_prompt: str | None = Field(default=None, exclude_if=lambda prompt: prompt is None)
    eol_request: str
    summary_request: str
    max_text_tokens: PositiveInt
    min_pixels: PositiveInt | None = None  # of Qwen2-VL and Qwen2.5-VL; other processors have their own
    max_pixels: PositiveInt | None = None
    max_summary_tokens: PositiveInt
    cache_vision: bool
    # processes that open and resize images ahead; results are the same for any number
    workers: Annotated[NonNegativeInt, Field(exclude_if=lambda value: value == 0)] = 0
    # of passes without gradient, with padding, rows of like length together; None is evaluation.batch rows
    batch_tokens: Annotated[PositiveInt | None, Field(exclude_if=lambda value: value is None)] = None
    read_out: Literal["ret", "before"] = (
        "ret"  # the state that is the embedding: at [RET], or one token before
    )
    candidate_summaries: bool = True  # False: candidates are read at [RET] without one

    @property
    def pool_template(self) -> str:
        """Template of candidates where queries are read after a summary (retriever.encode)."""
        return "summary" if self.candidate_summaries else "bare"

    @model_validator(mode="after")
    def _pixels(self) -> EncoderSettings:
        low, high = self.min_pixels, self.max_pixels
        if low and high and low > high:
            raise ValueError(f"min_pixels = {low} is above max_pixels = {high}; swap them")
        return self


class AnnotatorSettings(Section):
    """Annotator of grains: the data itself (exact), a model loaded here, or an OpenAI-compatible server."""

    kind: Literal["exact", "transformers", "openai"]
    model: str | None = None  # as values.model_source reads it; for a server the name it serves
    base_url: str | None = None  # of the server, up to and with its /v1
    key_variable: str | None = None  # environment variable that holds the server's key; None sends none
    batch: PositiveInt = 1  # queries per forward, or requests at once
    retries: NonNegativeInt = 0  # of a request that failed, and of an answer that cannot be read
    max_tokens: PositiveInt = 512  # of an answer
    timeout: PositiveInt = 120  # seconds that a request may take

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
    queries: PositiveInt
    min_grains: PositiveInt
    verify: PositiveInt  # rows of the human-verification sheet
    precision: Annotated[float, Field(gt=0, lt=1)]  # share of right annotations that verification is to show
    annotator: AnnotatorSettings
    licence: str  # of the images, for the data card


class EvaluationSettings(Section):
    batch: PositiveInt
    on_disk: bool = False  # embeddings go to disk instead of memory
    cutoffs: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    bootstrap: PositiveInt
    grain_queries: PositiveInt
    tsne_candidates: PositiveInt
    headroom_queries: PositiveInt | None = None  # of each MRBench unit; None takes all
    headroom_samples: PositiveInt = 8  # summaries of each query


class StudySettings(Section):
    """Arms of params/arms.yaml that are compared, and their training seeds."""

    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    arms: tuple[str, ...] = ()  # none means all
    units: tuple[str, ...] = ()  # test units, or patterns of them, of every arm besides MRBench
    reading: tuple[str, ...] = ()  # profiles that differ in the backbone alone, which reads more or less well
    in_chain: bool  # whether the chain trains arms that have no result yet; else `study` does


class VideoSettings(Section):
    """Text to video: the sets of the paper's Table 7, or short clips of the collection's drawings."""

    sets: Place | None = None  # folder with msrvtt/ and msvd/, or one of them
    drawings: PositiveInt | None = None  # of the embedded collection, each in every motion
    length: PositiveInt = 16  # frames of a clip
    rate: PositiveInt = 8  # of them in a second
    frames: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]  # looked at; ascending, last is reported
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
    queries: PositiveInt | None = None  # of each row

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
    threads: PositiveInt | None
    data: DataSettings
    backbone: BackboneSettings
    encoder: EncoderSettings
    stage1: ContrastiveSettings
    stage2: ContrastiveSettings
    stage3: RlvrSettings
    control: ControlSettings
    distil: DistilSettings | None = None
    rerank: RerankSettings | None = None
    mrbench: MrbenchSettings
    evaluation: EvaluationSettings
    study: StudySettings
    video: VideoSettings | None = None
    unseen: UnseenSettings | None = None

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        control, mined = self.control, self.stage3.negatives
        if control.hard is not None and (control.hard > mined.hard or control.random > mined.random):
            asked, there = f"{control.hard} + {control.random}", f"{mined.hard} + {mined.random}"
            raise ValueError(f"control.hard + random = {asked} are more than stage3.negatives has: {there}")
        if self.stage3.rollout_sides != "query" and not self.encoder.candidate_summaries:
            sides = f"stage3.rollout_sides: {self.stage3.rollout_sides}"
            raise ValueError(f"{sides} rolls candidates out; set encoder.candidate_summaries: true")
        return self

    def changed(self, changes: dict) -> Settings:
        """A copy with some values replaced, as deep as `changes` goes; unknown keys are refused."""
        return Settings.model_validate(merged(self.model_dump(), changes))


def load(profile: str) -> Settings:
    """The resolved profile.

    Raises:
        ProfileError: missing file, broken YAML, unknown key, wrong type; says where.
    """
    return read(PARAMS / f"{profile}.yaml", Settings, profile=profile)


def teaching(name: str) -> TeachSettings:
    """Recipe of a small backbone: params/backbone/<name>.yaml.

    Raises:
        ProfileError: as `load`.
    """
    return read(PARAMS / "backbone" / f"{name}.yaml", TeachSettings)


def read(path: Path, kind: type[Section], **more: str) -> Section:
    """The values of a file of params/ and those it extends, and `more`, as a section; raises as `load`."""
    try:
        return kind(**more, **_extended(path))
    except ValidationError as error:
        raise ProfileError(f"{path}: {problems(error)}") from None


def _extended(path: Path, *below: Path) -> dict:
    """The values of a file over those of the file beside it that it extends; `below` extend this one."""
    values = mapping(path)
    parent = values.pop("extends", None)
    if parent in {known.stem for known in (path, *below)}:
        raise ProfileError(f"{path}: extends {parent}, which is this profile or extends it; name another one")
    if parent is None:
        return values
    return merged(_extended(path.with_name(f"{parent}.yaml"), path, *below), values)


def mapping(path: Path) -> dict:
    """Content of a file of params/, by key; raises ProfileError where it is missing or holds no keys."""
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml") if p.stem not in NO_PROFILES)
        raise ProfileError(f"{path} is missing; profiles are {known}")
    try:
        values = files.read_yaml(path)
    except files.ElvaDataError as error:
        raise ProfileError(str(error)) from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ProfileError(f"{path}: expected keys and values at the top level")
    return values
