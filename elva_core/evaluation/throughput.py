"""Throughput benchmark: forward passes and items per second of several ways to embed the same items.

ways = {"stage 3": Way(teacher, "summary"), "single pass": Way(student, "eol")}
table = measure(ways, {"queries": queries}, batches=(1, 256), rounds=5)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pandas as pd

from elva_core.data.items import Item
from elva_core.models.encoder import Encoder
from elva_core.retrieval.retriever import encode

ROUNDS = 3
LEAST = 16  # items of a round


class Way(NamedTuple):
    """A model and how it is read: "summary" or "eol"."""

    encoder: Encoder
    template: str


def measure(
    ways: Mapping[str, Way],
    sides: Mapping[str, Sequence[Item]],
    *,
    batches: Sequence[int],
    rounds: int = ROUNDS,
    least: int = LEAST,
) -> pd.DataFrame:
    """Items per second from item to embedding, images opened and seen anew by the vision tower each time.

    Every round takes all ways, each round starts with another one, and one round before them is not timed: so
    a machine that slows down, or a first call that is slow, favours none.

    Args:
        sides: name, for instance "queries", -> items; a batch of the distinct ones, evenly chosen, and at
            least `least` are timed.

    Returns:
        way, side, batch, per second (median of the rounds), lowest, highest, forwards (passes of the language
        model that a row of a batch waits for), n items, rounds.
    """
    rows = []
    for side, items in sides.items():
        for batch in batches:
            distinct = list(dict.fromkeys(items))
            asked = max(batch, least)
            chosen = distinct[:: max(1, len(distinct) // asked)][:asked]
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            passes = {}
            for name, way in ways.items():
                with counted(way.encoder) as seen:
                    _timed(way, chosen, batch)
                passes[name] = sum(seen) / len(chosen)
            for turn in range(rounds):
                for place in range(len(ways)):
                    name = list(ways)[(turn + place) % len(ways)]
                    seconds[name].append(_timed(ways[name], chosen, batch))
            for name, taken in seconds.items():
                rates = [len(chosen) / s for s in taken]
                row = {"way": name, "side": side, "batch": batch, "per second": statistics.median(rates)}
                row |= {"lowest": min(rates), "highest": max(rates), "forwards": passes[name]}
                rows.append(row | {"n": len(chosen), "rounds": rounds})
    return pd.DataFrame(rows)


def times(table: pd.DataFrame, base: str) -> pd.DataFrame:
    """Speed of each way over that of one of them; the range is that of their rounds.

    Args:
        table: `measure`. base: the way that the others are divided by.

    Returns:
        way, side, batch, times (of the medians), lowest, highest, n items, rounds; no row for `base`.
    """
    keys, rates = ["side", "batch"], ["per second", "lowest", "highest"]
    both = table[table["way"] != base].merge(
        table[table["way"] == base][[*keys, *rates]], on=keys, suffixes=("", " base")
    )
    ratios = {
        "times": both["per second"] / both["per second base"],
        "lowest": both["lowest"] / both["highest base"],
        "highest": both["highest"] / both["lowest base"],
    }
    return both.assign(**ratios)[["way", *keys, *ratios, "n", "rounds"]]


def _timed(way: Way, items: Sequence[Item], batch: int) -> float:
    if way.encoder.vision:
        way.encoder.vision.forget()
    began = time.perf_counter()
    encode(way.encoder, items, batch=batch, template=way.template)
    return time.perf_counter() - began


@contextmanager
def counted(encoder: Encoder):
    """`with counted(encoder) as rows`: the rows of every pass through the language model meanwhile."""
    rows: list[int] = []
    hook = encoder.backbone.get_decoder().register_forward_hook(
        lambda model, inputs, output: rows.append(len(output.last_hidden_state))
    )
    try:
        yield rows
    finally:
        hook.remove()
