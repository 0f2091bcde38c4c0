"""Batches by tokens: lengths of prompts, and rows of like length together.

tokens = lengths(encoder, items, request)
batches = by_tokens(tokens, 8192)        # places of items
batches = evenly(tokens, 8192, 8)        # the same, for eight processes
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from elva_core.data.images import image_size
from elva_core.data.items import Item
from elva_core.models.encoder import Encoder

MARKERS = 2  # tokens around an image


def lengths(encoder: Encoder, items: Sequence[Item], request: str) -> list[int]:
    """Tokens of each item's prompt, with those that the processor makes of an image of its size.

    Of images only the headers are read. Within a few tokens: some families write more around an image. Clips
    count nothing.
    """
    shown, around = items, -1  # a placeholder
    if not encoder.vision:  # whose chats hold pictures
        texts = (tuple(part for part in item.more if isinstance(part, str)) for item in items)
        shown = [replace(item, image=None, more=more) for item, more in zip(items, texts, strict=True)]
        around = MARKERS
    rows = encoder.processor.tokenizer(encoder.prompts(shown, request), add_special_tokens=False).input_ids
    tokens = [len(row) for row in rows]
    sizes = [(place, image_size(path)) for place, item in enumerate(items) for path in item.images]
    if sizes:
        # what transformers offers to those who plan batches before they have pixels
        made = encoder.processor._get_num_multimodal_tokens(image_sizes=[size for _, size in sizes])
        for (place, _), count in zip(sizes, made.num_image_tokens, strict=True):
            tokens[place] += count + around
    return tokens


def by_tokens(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Places of rows in batches, longest first, none of more than `budget` tokens with its padding.

    A row that is longer than that is alone.

    >>> by_tokens([3, 9, 4, 1], 8)
    [[1], [2, 0], [3]]
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        if batches and tokens[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def evenly(tokens: Sequence[int], budget: int, processes: int) -> list[list[int]]:
    """`by_tokens` with the smallest budget that needs no more turns, so that no process waits for another.

    >>> by_tokens([2, 2, 2, 2], 6), evenly([2, 2, 2, 2], 6, 2)
    ([[0, 1, 2], [3]], [[0, 1], [2, 3]])
    """
    turns = math.ceil(len(by_tokens(tokens, budget)) / processes)
    smaller = range(1, budget + 1)
    place = bisect_left(smaller, -turns * processes, key=lambda size: -len(by_tokens(tokens, size)))
    return by_tokens(tokens, smaller[min(place, budget - 1)])
