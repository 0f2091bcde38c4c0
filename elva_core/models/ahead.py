"""Pictures of coming steps, opened and resized by worker processes while the model computes.

with preparing(encoder, reads, steps) as prepare:    # reads(step) -> items and their request
    prepare(step)                                    # before each step, in their order
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Dataset

from elva_core.data.items import Item
from elva_core.files import ElvaDataError
from elva_core.models.encoder import Encoder

AT_ONCE = 16  # pictures that a worker makes ready before it hands them over


class Ahead(Dataset):
    """Values that worker processes make of keys, such as paths of images, in the order of the steps.

    Args:
        work: makes a value of a key; pure. keys_of: step -> the keys it will ask for; pure. steps: the number
            of steps that there are.
    """

    def __init__(
        self,
        work: Callable[[Hashable], object],
        keys_of: Callable[[int], Iterable[Hashable]],
        steps: int,
        workers: int,
    ) -> None:
        self._work, self._keys_of, self._steps, self._workers = work, keys_of, steps, workers
        self._made: dict[tuple[int, Hashable], bytes] = {}
        self._step = self._reached = 0
        self._batches: Iterator | None = None

    def begin(self, step: int) -> None:
        """Goes on to a step; what was made for the steps before it and not taken is dropped."""
        self._step, self._made = step, {at: made for at, made in self._made.items() if at[0] >= step}
        if self._batches is None:
            # by fork: the work may hold a model, which no worker touches; the seed is no one's
            self._batches = iter(
                DataLoader(
                    self,
                    batch_sampler=self._asked(step),
                    num_workers=self._workers,
                    collate_fn=list,
                    multiprocessing_context="fork",
                    generator=torch.Generator(),
                )
            )

    def __getitem__(self, asked: tuple[int, Hashable]) -> tuple[int, Hashable, bytes]:
        """A step, a key and the value made of it, in a worker."""
        try:
            made = self._work(asked[1])
        except ElvaDataError:  # None for one that cannot be made ready, which fails where it is needed
            made = None
        # bytes go through a pipe; tensors would take a file descriptor each, and shared memory
        return *asked, pickle.dumps(made)

    def _asked(self, first: int) -> Iterator[list[tuple[int, Hashable]]]:
        for step in range(first, self._steps):
            keys = list(self._keys_of(step))
            for start in range(0, len(keys), AT_ONCE):
                yield [(step, key) for key in keys[start : start + AT_ONCE]]

    def take(self, key: Hashable) -> object | None:
        """The value made of a key for this step, once; None where there is none."""
        while (
            self._batches is not None and (self._step, key) not in self._made and self._reached <= self._step
        ):
            batch = next(self._batches, None)
            if batch is None:
                self._reached = self._steps
                break
            self._reached = batch[0][0]
            self._made |= {(step, made_of): made for step, made_of, made in batch if step >= self._step}
        made = self._made.pop((self._step, key), None)
        return None if made is None else pickle.loads(made)  # what a process of ours has dumped

    def close(self) -> None:
        """Ends the workers."""
        self._batches, self._made = None, {}


@contextmanager
def preparing(
    encoder: Encoder, reads: Callable[[int], tuple[Sequence[Item], str]], steps: int
) -> Iterator[Callable[[int], None]]:
    """Within it `encoder.settings.workers` processes open and resize pictures; the pixels are the same.

    Nothing is started for one step, or for no workers. What a step asks for besides is opened when it asks.

    Args:
        reads: step -> the items that it reads, and the request; pure.

    Yields:
        what is called with the number of a step before it, in ascending order, from any first one.
    """
    source, workers = encoder.vision or encoder.reader, encoder.settings.workers
    if not workers or steps < 2:
        yield lambda step: None
        return
    ahead = Ahead(source.prepared, lambda step: source.keys(*reads(step)), steps, workers)
    before, source.ahead = source.ahead, ahead
    try:
        yield ahead.begin
    finally:
        source.ahead = before
        ahead.close()
