"""Exact cosine search: one pass over a pool of any size, top-k and ranks of the relevant rows at once.

A score is the dot product in float64, rounded to float32; equal scores go by pool order. float32 products only find what could
matter, so the result does not depend on blocks, threads or BLAS, and a copy of a vector ties with it wherever it stands.

    found = exact(queries, pool, k=10, relevant=[[3], [5, 8]])
    found.rows[0], found.ranks[0]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

QUERIES = 512  # that share one pass over the rows in memory
ROWS, TILE = 8192, 1024  # of the pool: read at once; multiplied at once, to be looked at while a near cache has the scores
GROUP, COUNTED = 8, 128  # rows whose maximum, and whose count, decides whether they are looked at one by one
DENSE = 16  # rows are scored in float64 as a whole if more than 1/16 of the scores is that close to what is counted
PAIRS = 1024  # computed in float64 at once
EMPTY = np.iinfo(np.int64).min

Pool = np.ndarray | Sequence[np.ndarray | Path]


@dataclass(frozen=True)
class Found:
    """rows (Q, k) int64 and scores (Q, k) float32, best first. ranks: per query the 1-based ranks of its relevant rows, ascending;
    pessimistic: the same with every relevant row behind all that score the same."""

    rows: np.ndarray
    scores: np.ndarray
    ranks: list[list[int]]
    pessimistic: list[list[int]]


def exact(queries: np.ndarray, pool: Pool, k: int, relevant: Sequence[Sequence[int]] | None = None) -> Found:
    """The k best pool rows of every query, and where its relevant rows stand.

    Args:
        queries: (Q, D), unit length.
        pool: (C, D) array, or a sequence of arrays and .npy files that follow one another. float32 rows have unit length; float16
            rows are scaled to it again. Files are read block by block: memory holds the queries and about 200 MB for D = 1536.
        k: at most C.
        relevant: per query the pool rows judged relevant; may be empty. None means none.

    Raises:
        ValueError: k exceeds the pool, or a vector is not finite or not of unit length.
    """
    parts = pool if isinstance(pool, list) else [pool]
    size = sum(len(_opened(part)) for part in parts)
    if k > size:
        raise ValueError(f"k = {k} exceeds the pool of {size}; lower the cut-off")
    vectors = _unit(queries, "query", 0)
    asked = [[]] * len(vectors) if relevant is None else relevant
    threads = torch.get_num_threads()
    width = max(1, min(QUERIES, -(-len(vectors) // threads)))
    blocks = [_Block(vectors[i : i + width], k, asked[i : i + width], parts) for i in range(0, len(vectors), width)]
    space = [(np.empty((TILE, width), np.float32), np.empty((ROWS, width), bool)) for _ in range(threads)]

    def work(thread: int, part: np.ndarray, start: int) -> None:
        for block in blocks[thread::threads]:
            block.see(part, start, *space[thread])

    with threadpool_limits(1), ThreadPoolExecutor(threads) as workers:
        running: list[Future] = []
        for start, part in _read(parts):  # the next rows are read while the last ones are worked on
            for future in running:
                future.result()
            running = [workers.submit(work, thread, part, start) for thread in range(threads)]
        for future in running:
            future.result()
    keys = np.sort(np.concatenate([b.best for b in blocks] or [np.empty((0, k), np.int64)]), axis=1)[:, ::-1]
    ranks, pessimistic = ([row for b in blocks for row in b.ranks(tied)] for tied in ("before", "tied"))
    return Found(*_decoded(keys), ranks, pessimistic)


class _Block:
    """Some queries and what is known of them so far: the keys of their best rows, and counts for each relevant row."""

    def __init__(self, queries: np.ndarray, k: int, relevant: Sequence[Sequence[int]], parts: list) -> None:
        self.queries, self.wide = queries, queries.astype(np.float64)
        self.best = np.full((len(queries), k), EMPTY)  # the least one first, the others in any order
        self.floor = np.full(len(queries), -np.inf, np.float32)  # score of the k-th best
        self.slack = np.float32(4 * np.sqrt(queries.shape[1]) * 2.0**-24)  # float32 errors are random: far more than any
        self.tops: np.ndarray | None = np.empty((0, len(queries)), np.float32)  # highest scores of groups, until rows are kept
        lengths = [len(rows) for rows in relevant]
        # one entry per relevant row, in the order of the queries
        self.column = np.repeat(np.arange(len(queries)), lengths)
        self.row = np.array([row for rows in relevant for row in rows], np.int64)
        self.goal = _scores_at(queries, self.column, parts, self.row)
        self.greater, self.before, self.tied = np.zeros((3, len(self.row)), np.int64)
        nth = np.arange(len(self.row)) - np.repeat(np.cumsum(lengths) - lengths, lengths).astype(np.int64)
        self.layers = [np.flatnonzero(nth == n) for n in range(max(lengths, default=0))]  # at most one entry per query in each

    def see(self, part: np.ndarray, start: int, scores: np.ndarray, marks: np.ndarray) -> None:
        """Takes rows of the pool into account.

        Args:
            part: (n, D) float32, the rows from `start` on; n <= ROWS.
            scores: (TILE, >= queries) and marks: (ROWS, >= queries), to work in.
        """
        width, height = len(self.queries), -(-len(part) // COUNTED) * COUNTED
        scores, marks = (x.reshape(-1)[: len(x) * width].reshape(-1, width) for x in (scores, marks[:height]))
        above, unsure, many = np.zeros_like(self.greater), [], marks.size // DENSE
        marks[len(part) :] = False
        for first in range(0, len(part), TILE):
            n = min(TILE, len(part) - first)
            np.matmul(part[first : first + n], self.queries.T, out=scores[:n])
            scores[n:] = -np.inf
            if self.tops is not None:
                self._raise_floor(scores)
            np.greater_equal(scores[:n], self.floor - self.slack, out=marks[first : first + n])
            for layer in self.layers:
                rows, entries = self._near_goals(scores, layer, above)
                unsure.append((first + rows, entries))
        if np.count_nonzero(marks) > many or sum(len(rows) for rows, _ in unsure) > many:
            self._see_exactly(part, start)
            return
        self.greater += above
        for rows, entries in unsure:
            self._compare(entries, _cosines(part, rows, self.queries, self.column[entries]), start + rows)
        some = np.flatnonzero(marks.reshape(-1, 8).view(np.uint64) != 0)  # eight at a time: nearly all are unmarked
        place = np.flatnonzero(marks.reshape(-1, 8)[some])
        rows, columns = np.divmod(some[place // 8] * 8 + place % 8, width)
        self._keep(columns, _keys(_cosines(part, rows, self.queries, columns), start + rows))

    def _raise_floor(self, scores: np.ndarray) -> None:
        """A bound before anything is kept: where k groups of rows have a score as high as this, k rows have."""
        k = self.best.shape[1]
        self.tops = np.concatenate([self.tops, scores.reshape(-1, GROUP, scores.shape[1]).max(1)])
        if len(self.tops) >= k:
            self.tops = np.partition(self.tops, -k, axis=0)[-k:]
            self.floor = self.tops[0]

    def _near_goals(self, scores: np.ndarray, layer: np.ndarray, above: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds to `above` how many scores are surely above those of the entries; rows and entries of those too close to say."""
        reached = layer[scores.max(0)[self.column[layer]] >= self.goal[layer] - self.slack]
        place = self.column[reached]
        if len(reached) * 4 < scores.shape[1]:  # else copying their columns costs more than looking at all
            scores, place = scores[:, place], np.arange(len(reached))
        goal, entry = np.full(scores.shape[1], np.inf, np.float32), np.zeros(scores.shape[1], np.int64)
        goal[place], entry[place] = self.goal[reached], reached
        low, high, groups = goal - self.slack, goal + self.slack, scores.reshape(-1, COUNTED, scores.shape[1])
        over = _counted(groups > high)
        above[reached] += over.sum(0, dtype=np.int64)[place]
        group, which = _marked(over != _counted(groups >= low))
        values = groups[group, :, which]
        near, row = _marked((values >= low[which, None]) & (values <= high[which, None]))
        return group[near] * COUNTED + row, entry[which[near]]

    def _see_exactly(self, part: np.ndarray, start: int) -> None:
        scores = (self.wide @ part.astype(np.float64).T).astype(np.float32)
        rows, self.tops = np.arange(start, start + len(part)), None
        self.best = np.partition(np.hstack([self.best, _keys(scores, rows)]), len(part), axis=1)[:, len(part) :]
        self.floor = _decoded(self.best[:, 0])[1]
        for entry, column in enumerate(self.column):
            near = np.flatnonzero(scores[column] >= self.goal[entry])
            self._compare(np.full(len(near), entry), scores[column, near], rows[near])

    def _keep(self, columns: np.ndarray, keys: np.ndarray) -> None:
        """Lets new keys of some columns compete with the best ones."""
        self.tops = None
        if not len(keys):
            return
        order = np.argsort(columns, kind="stable")
        touched, first, count = np.unique(columns[order], return_index=True, return_counts=True)
        width = count.max()
        new = np.full((len(touched), width), EMPTY)
        new[np.repeat(np.arange(len(touched)), count), np.arange(len(keys)) - np.repeat(first, count)] = keys[order]
        self.best[touched] = np.partition(np.hstack([self.best[touched], new]), width, axis=1)[:, width:]
        self.floor[touched] = _decoded(self.best[touched, 0])[1]

    def _compare(self, entries: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> None:
        """Counts exact scores of pool rows for the entries they were computed for."""
        equal = scores == self.goal[entries]
        for counts, chosen in (
            (self.greater, scores > self.goal[entries]),
            (self.before, equal & (rows <= self.row[entries])),
            (self.tied, equal),
        ):
            counts += np.bincount(entries[chosen], minlength=len(counts))

    def ranks(self, tied: str) -> list[list[int]]:
        out: list[list[int]] = [[] for _ in self.queries]
        for column, rank in zip(self.column, self.greater + getattr(self, tied), strict=True):
            out[column].append(int(rank))
        return [sorted(row) for row in out]


def _opened(part: np.ndarray | Path) -> np.ndarray:
    return np.load(part, mmap_mode="r") if isinstance(part, Path) else part


def _read(parts: list) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 vectors) of each block. A file is mapped anew for every block, so what has been read is given back."""
    start = 0
    for part in parts:
        for first in range(0, len(_opened(part)), ROWS):
            block = _unit(_opened(part)[first : first + ROWS], "pool row", start + first)
            yield start + first, block
        start += len(_opened(part))


def _unit(vectors: np.ndarray, name: str, start: int) -> np.ndarray:
    # torch converts float16 six times as fast as numpy
    half = vectors.dtype == np.float16
    out = torch.from_numpy(np.array(vectors)).float().numpy() if half else np.ascontiguousarray(vectors, dtype=np.float32)
    lengths = np.sqrt(np.vecdot(out, out))
    if len(wrong := np.flatnonzero(~(abs(lengths - 1) < 0.01))):
        raise ValueError(f"{name} {start + wrong[0]} has length {lengths[wrong[0]]}, not 1; encode it again, normalised")
    return out / lengths[:, None] if half else out


def _scores_at(queries: np.ndarray, columns: np.ndarray, parts: list, rows: np.ndarray) -> np.ndarray:
    """Scores of given (query, pool row) pairs, read in pool order."""
    scores = np.empty(len(rows), np.float32)
    order, start = np.argsort(rows, kind="stable"), 0
    for part in parts:
        end = start + len(_opened(part))
        chosen = order[(rows[order] >= start) & (rows[order] < end)]
        for first in range(0, len(chosen), PAIRS):
            some = chosen[first : first + PAIRS]
            vectors = _unit(_opened(part)[rows[some] - start], "relevant pool row", 0)
            scores[some] = _cosines(vectors, np.arange(len(some)), queries, columns[some])
        start = end
    if len(outside := rows[(rows < 0) | (rows >= start)]):
        raise ValueError(f"relevant row {outside[0]} is outside the pool of {start}")
    return scores


def _cosines(part: np.ndarray, rows: np.ndarray, queries: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Exact scores of the pairs (part[rows], queries[columns])."""
    out = np.empty(len(rows), np.float32)
    for first in range(0, len(rows), PAIRS):
        some = slice(first, first + PAIRS)
        out[some] = np.einsum("nd,nd->n", part[rows[some]].astype(np.float64), queries[columns[some]].astype(np.float64))
    return out


def _marked(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every mark; numpy's own nonzero takes ten times as long."""
    return np.divmod(np.flatnonzero(marks), marks.shape[1])


def _counted(marks: np.ndarray) -> np.ndarray:
    """(G, COUNTED, N) marks to their numbers (G, N), which a byte holds."""
    return marks.view(np.uint8).sum(1, dtype=np.uint8)


def _keys(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """One integer per (score, row) that sorts as ranking does: a higher score, then a lower row, is the larger."""
    bits = (scores + 0.0).view(np.int32)  # -0 becomes 0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32) | (0xFFFFFFFF - rows)


def _decoded(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of keys. The inverse of `_keys`."""
    bits = (keys >> 32).astype(np.int32)
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF), (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32)
