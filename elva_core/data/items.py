"""Items to embed: texts, images, clips and their mixtures, and items made of rows of M-BEIR."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from elva_core.data import mbeir
from elva_core.data.frames import Clip


@dataclass(frozen=True, slots=True)
class Item:
    """One input of the embedder: a query (text = instruction and query text) or a candidate, normalised.

    image: a file; its path may be given as a string.
    more: further parts between image and text, in their order: a path is an image, a string is text, a clip
        is a video. M-BEIR needs none; dialogues about several images, a reranker's prompts, and videos do.
    instruction: the beginning of `text` that some models read as the system's turn; says nothing new, so it
        is not compared.
    """

    text: str = ""
    image: Path | None = None
    more: tuple[str | Path | Clip, ...] = ()
    instruction: str = field(default="", compare=False, repr=False)

    @property
    def without_instruction(self) -> Item:
        """The content alone."""
        return replace(self, text=self.text.removeprefix(self.instruction).lstrip(), instruction="")

    def __post_init__(self) -> None:
        if isinstance(self.image, str):  # among the parts a string is text
            object.__setattr__(self, "image", Path(self.image))

    @property
    def parts(self) -> tuple[str | Path | Clip, ...]:
        """Everything in the order in which the model reads it."""
        return (*([self.image] if self.image else []), *self.more, self.text)

    @property
    def images(self) -> list[Path]:
        return [part for part in self.parts if isinstance(part, Path)]

    @property
    def clips(self) -> list[Clip]:
        return [part for part in self.parts if isinstance(part, Clip)]

    @property
    def frames(self) -> int:
        """Frames of all clips."""
        return sum(clip.frames for clip in self.clips)

    @property
    def length(self) -> int:
        """Characters of all texts."""
        return sum(len(part) for part in self.parts if isinstance(part, str))

    @property
    def content(self) -> str:
        """The word LamRA's prompts use for what stands above."""
        there = {"image": self.images, "video": self.clips, "sentence": self.length}
        return " and ".join(word for word, found in there.items() if found) or "sentence"


def query_item(root: mbeir.Root, query: mbeir.Query, **prompt: object) -> Item:
    """A query with its instruction, normalised as UniIR and LamRA do; keywords go to `Root.instruction`."""
    instruction, image = root.instruction(query, **prompt), query.image and root.image_path(query.image)
    return Item(mbeir.normalise(f"{instruction} {query.text or ''}"), image or None, instruction=instruction)


def candidate_item(root: mbeir.Root, candidate: mbeir.Candidate) -> Item:
    """A candidate; candidates never carry an instruction."""
    return Item(
        mbeir.normalise(candidate.text), root.image_path(candidate.image) if candidate.image else None
    )
