"""Cost of planned work: prompts, tokens, FLOPs and seconds, which add up, and the peak memory.

(Cost(prompts=4, memory={"weights": 2.0}) + Cost(prompts=4, memory={"weights": 3.0})).peak    # 3.0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Side:
    """Mean text tokens and images of a prompt (of an item: the share that has an image), and its items."""

    text: float
    image: float
    items: float = 1


@dataclass(frozen=True)
class Cost:
    """Amounts of work, which add up, and the memory of a device at its fullest moment.

    prompts: rows of `Encoder.batch`, every pass counted. rollouts: summaries written. seconds: on one device;
    waiting: those for an image, or for the start of a layer. memory: GB by part; {} for the host's work.
    """

    prompts: float = 0
    rollouts: float = 0
    tokens: float = 0
    flops: float = 0
    seconds: float = 0
    waiting: float = 0
    memory: Mapping[str, float] = field(default_factory=dict)

    @property
    def amounts(self) -> tuple[float, ...]:
        return astuple(self)[:-1]

    @property
    def peak(self) -> float:  # GB of the fullest moment
        return sum(self.memory.values())

    def __add__(self, other: Cost) -> Cost:
        amounts = (a + b for a, b in zip(self.amounts, other.amounts, strict=True))
        return Cost(*amounts, memory=max(self, other, key=lambda cost: cost.peak).memory)

    def __mul__(self, times: float) -> Cost:
        return Cost(*(amount * times for amount in self.amounts), memory=self.memory)

    def beside(self, part: str, gigabytes: float) -> Cost:
        """The same work beside something else in memory."""
        return replace(self, memory={**self.memory, part: gigabytes})
