"""Exact cosine search: one pass over a pool of any size gives the top k and the ranks of the relevant rows.

A score is the dot product in float64, rounded to float32; equal scores go by pool order. Products of less precision only find what
could matter: the result does not depend on blocks, threads or BLAS, and a copy of a vector ties with it wherever it stands.

    found = exact(queries, pool, k=10, relevant=[[3], [5, 8]])
    found.rows[0], found.ranks[0]
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

QUERIES = 1024  # that are multiplied at once
ROWS, TILE = (
    8192,
    2048,
)  # of the pool: read at once; multiplied at once, and looked at while a near cache has the scores
GROUP, COUNTED = (
    8,
    64,
)  # rows whose maximum gives the first bound; rows whose maximum, or count, says whether to look at each of them
AHEAD = 2  # blocks of rows that are read before they are worked on
SPARE = 14  # rows kept beyond k (bfloat16: 2 k), because less than float64 may order neighbours wrongly
MANY = 128  # queries from which on rounding the pool to bfloat16 costs less than it saves
PAIRS = 128  # scored in float64 at once
EMPTY = np.iinfo(np.int64).min
PAGE = 2**21  # bytes of a huge page

PRECISIONS = (
    torch.bfloat16,
    torch.float32,
    torch.float64,
)  # of the passes; each takes what the one before could not decide

# slices and row numbers give arrays: an array, or what is on disk and looks like one (store.Kept)
Rows = np.ndarray | Sequence
Pool = Rows | list[Rows | Path]


@dataclass(frozen=True)
class Found:
    """rows (Q, k) int64 and scores (Q, k) float32, best first. ranks: per query the 1-based ranks of its relevant rows, ascending;
    pessimistic: the same with every relevant row behind all that score the same."""

    rows: np.ndarray
    scores: np.ndarray
    ranks: list[list[int]]
    pessimistic: list[list[int]]


def exact(queries: np.ndarray, pool: Pool, k: int, relevant: Sequence[Sequence[int]] | None = None) -> Found:
    """The k best pool rows of every query, and where its relevant rows stand. Uses as many threads as torch.

    Queries for which too many scores are too close for one precision, as when all embeddings are the same, take another pass in the next.
    The first is float32; bfloat16, twice as fast, for at least MANY queries without relevant rows, where the CPU multiplies it.

    Args:
        queries: (Q, D), unit length.
        pool: (C, D) array, or a list of arrays and .npy files that follow one another. float32 rows have unit length; float16
            rows are scaled to it again. Files are read block by block and never held.
        k: at most C.
        relevant: per query the pool rows judged relevant; may be empty. None means none.

    Raises:
        ValueError: k exceeds the pool, or a vector is not finite or not of unit length.
    """
    parts = pool if isinstance(pool, list) else [pool]
    size = sum(len(_opened(part)) for part in parts)
    if k > size:
        raise ValueError(f"k = {k} exceeds the pool of {size}; lower the cut-off")
    vectors, asked = _unit(queries, "query", 0), [[]] * len(queries) if relevant is None else relevant
    keys, ranks, pessimistic = np.empty((len(vectors), k), np.int64), [[]] * len(vectors), [[]] * len(vectors)
    undecided = np.arange(len(vectors))
    # bfloat16 finds the best rows, but is too coarse to count what stands above a row
    for precision in PRECISIONS[
        0 if not any(map(len, asked)) and len(vectors) >= MANY and _has_bfloat16() else 1 :
    ]:
        keys[undecided], *counted, clear = _passed(
            vectors[undecided], parts, size, k, [asked[i] for i in undecided], precision
        )
        for i, *found in zip(undecided, *counted, strict=True):
            ranks[i], pessimistic[i] = found
        undecided = undecided[~clear]
        if not len(undecided):
            break
    return Found(*_decoded(keys), ranks, pessimistic)


def _has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, twice as fast as float32 or more."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _passed(
    vectors: np.ndarray,
    parts: list,
    size: int,
    k: int,
    relevant: Sequence[Sequence[int]],
    precision: torch.dtype,
) -> tuple[np.ndarray, list, list, np.ndarray]:
    """Keys (Q, k), ranks and pessimistic ranks of some queries, and for which of them these are certain."""
    threads = torch.get_num_threads()
    width = max(1, min(QUERIES, -(-len(vectors) // threads)))
    starts = range(0, len(vectors), width)
    blocks = [
        _Block(vectors[i : i + width], k, relevant[i : i + width], parts, size, precision) for i in starts
    ]
    space = [_in_huge_pages(TILE * width) for _ in range(threads)]

    def work(thread: int, part: np.ndarray, rounded: torch.Tensor, start: int) -> None:
        for block in blocks[thread::threads]:
            block.see(part, rounded, start, space[thread])

    with threadpool_limits(1), ExitStack() as stack:
        stack.callback(
            torch.set_num_threads, threads
        )  # what a worker sets for itself, torch sets for threads to come, too
        workers = [
            stack.enter_context(ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)))
            for _ in range(threads)
        ]
        running: deque[list[Future]] = deque()
        for start, part in _read(
            parts
        ):  # rows are read while those before are worked on; no worker waits for another
            rounded = torch.from_numpy(part).to(precision)
            running.append(
                [worker.submit(work, thread, part, rounded, start) for thread, worker in enumerate(workers)]
            )
            if len(running) > AHEAD:
                for future in running.popleft():
                    future.result()
        for future in itertools.chain(*running):
            future.result()
        best = [workers[i % threads].submit(block.best_keys, parts) for i, block in enumerate(blocks)]
        keys, clear = (
            zip(*[x.result() for x in best], strict=True)
            if blocks
            else ([np.empty((0, k), np.int64)], [np.empty(0, bool)])
        )
    ranks, pessimistic = (
        [row for block in blocks for row in block.ranks(tied)] for tied in ("before", "tied")
    )
    return np.concatenate(keys), ranks, pessimistic, np.concatenate(clear)


class _Block:
    """Some queries and what is known of them so far: keys of their best rows, and counts for each relevant row ("entry").

    precision: of the scores; with float64 nothing is too close to say, with bfloat16 nothing can be counted.
    """

    def __init__(
        self,
        queries: np.ndarray,
        k: int,
        relevant: Sequence[Sequence[int]],
        parts: list,
        size: int,
        precision: torch.dtype,
    ) -> None:
        self.queries, self.k, self.size, self.precision = queries, k, size, precision
        self.factor = torch.from_numpy(queries.T.copy()).to(precision)
        # float32: rounding errors are random; this is far more than any that was seen
        self.slack = np.float32(4 * np.sqrt(queries.shape[1]) * 2.0**-24 if precision == torch.float32 else 0)
        kept = {torch.bfloat16: 2 * k + SPARE, torch.float32: k + SPARE, torch.float64: k}[precision]
        self.best = np.full(
            (len(queries), min(kept, size)), EMPTY
        )  # the least one first, the others in any order
        self.floor = np.full(
            len(queries), -np.inf, np.float32
        )  # a lower score than this is not among the best
        self.tops: np.ndarray | None = np.empty(
            (0, len(queries)), np.float32
        )  # maxima of groups, until the first keys are kept
        self.new: list[tuple[np.ndarray, np.ndarray]] = []
        self.waiting = 0  # keys in `new`
        lengths = [len(rows) for rows in relevant]
        self.column = np.repeat(np.arange(len(queries)), lengths)
        self.row = np.array([row for rows in relevant for row in rows], np.int64)
        self.goal = _scores_at(queries, self.column, parts, self.row)
        self.greater, self.before, self.tied, self.close = np.zeros((4, len(self.row)), np.int64)
        self.too_close = max(1000, size // 100)  # scores that are worth computing one by one
        nth = np.arange(len(self.row)) - np.repeat(np.cumsum(lengths) - lengths, lengths).astype(np.int64)
        self.layers = [
            np.flatnonzero(nth == n) for n in range(max(lengths, default=0))
        ]  # at most one entry per query in each

    def see(self, part: np.ndarray, rounded: torch.Tensor, start: int, scores: np.ndarray) -> None:
        """Takes the rows from `start` on into account.

        Args:
            part: (n, D) float32. rounded: the same in this block's precision.
            scores: (at least TILE times the queries,) float32, to work in.
        """
        width = len(self.queries)
        scores = scores[: TILE * width].reshape(TILE, width)
        for first in range(0, len(part), TILE):
            rows = part[first : first + TILE]
            n = len(rows)
            if self.precision == torch.float32:
                np.matmul(rows, self.factor.numpy(), out=scores[:n])  # numpy's is faster than torch's
            else:
                torch.from_numpy(scores[:n]).copy_(rounded[first : first + TILE] @ self.factor)
            scores[n:] = -np.inf
            if self.tops is not None:
                self._raise_floor(scores)
            groups = scores.reshape(-1, COUNTED, width)
            peaks = groups.max(1)  # one look at all scores; few groups are looked at again
            group, column = _marked(peaks >= self.floor)
            values = groups[group, :, column]
            found, row = _marked(values >= self.floor[column, None])
            self._add(column[found], values[found, row], start + first + group[found] * COUNTED + row)
            if self.precision == torch.float64:
                self._count_exactly(scores[:n], np.arange(start + first, start + first + n))
            else:
                for layer in self.layers:
                    self._count(scores, peaks.max(0), layer, rows, start + first)

    def _raise_floor(self, scores: np.ndarray) -> None:
        """A bound before anything is kept: where n groups of rows have a score as high as this, n rows have."""
        n = self.best.shape[1]
        self.tops = np.concatenate([self.tops, scores.reshape(-1, GROUP, scores.shape[1]).max(1)])
        if len(self.tops) >= n:
            self.tops = np.partition(self.tops, -n, axis=0)[-n:]
            self.floor = self.tops[0]

    def _add(self, columns: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> None:
        self.new.append((columns, _keys(scores, rows)))
        self.waiting += len(rows)
        if self.waiting > self.best.size // 4:
            self._keep()

    def _keep(self) -> None:
        """Lets the new keys compete with the best ones."""
        columns, keys = (np.concatenate(x) for x in zip(*self.new, strict=True))
        self.new, self.waiting, self.tops = [], 0, None
        order = np.argsort(columns.astype(np.uint16), kind="stable")  # numpy sorts two bytes by their digits
        touched, first, count = np.unique(columns[order], return_index=True, return_counts=True)
        width = count.max(initial=0)
        new = np.full((len(touched), width), EMPTY)
        new[np.repeat(np.arange(len(touched)), count), np.arange(len(keys)) - np.repeat(first, count)] = keys[
            order
        ]
        self.best[touched] = np.partition(np.hstack([self.best[touched], new]), width, axis=1)[:, width:]
        floor = _decoded(self.best[touched, 0])[1]
        self.floor[touched] = np.where(self.best[touched, 0] == EMPTY, -np.inf, floor)

    def _count(
        self, scores: np.ndarray, peaks: np.ndarray, layer: np.ndarray, rows: np.ndarray, start: int
    ) -> None:
        """Counts the scores above those of a layer's entries; those too close to say are computed exactly."""
        reached = layer[
            (peaks[self.column[layer]] >= self.goal[layer] - self.slack)
            & (self.close[layer] <= self.too_close)
        ]
        if not len(reached):
            return
        place = self.column[reached]
        if len(reached) * 4 < scores.shape[1]:  # else copying their columns costs more than looking at all
            scores, place = scores[:, place], np.arange(len(reached))
        goal, entry = np.full(scores.shape[1], np.inf, np.float32), np.zeros(scores.shape[1], np.int64)
        goal[place], entry[place] = self.goal[reached], reached
        low, high, groups = goal - self.slack, goal + self.slack, scores.reshape(-1, COUNTED, scores.shape[1])
        over = _counted(groups > high)
        self.greater[reached] += over.sum(0, dtype=np.int64)[place]
        group, which = _marked(over != _counted(groups >= low))
        values = groups[group, :, which]
        near, row = _marked((values >= low[which, None]) & (values <= high[which, None]))
        row, entry = group[near] * COUNTED + row, entry[which[near]]
        exactly = _cosines(rows, row, self.queries, self.column[entry])
        equal, early = exactly == self.goal[entry], start + row <= self.row[entry]
        counts = (
            (self.close, row >= 0),
            (self.greater, exactly > self.goal[entry]),
            (self.tied, equal),
            (self.before, equal & early),
        )
        for total, chosen in counts:
            total += np.bincount(entry[chosen], minlength=len(total))

    def _count_exactly(self, scores: np.ndarray, rows: np.ndarray) -> None:
        own = scores[:, self.column]
        equal = own == self.goal
        self.greater += (own > self.goal).sum(0)
        self.tied += equal.sum(0)
        self.before += (equal & (rows[:, None] <= self.row)).sum(0)

    def best_keys(self, parts: list) -> tuple[np.ndarray, np.ndarray]:
        """Exact keys (queries, k), best first, and for which queries neither a key nor a count can be wrong."""
        if self.new:
            self._keep()
        keys, clear = self.best, np.ones(len(self.best), bool)
        if self.precision != torch.float64:
            rows = _decoded(keys)[0]
            columns = np.repeat(np.arange(len(rows)), rows.shape[1])
            keys = _keys(_scores_at(self.queries, columns, parts, rows.ravel()), rows.ravel()).reshape(
                rows.shape
            )
            clear[self.column[self.close > self.too_close]] = False
        keys = np.sort(keys, axis=1)[:, : -self.k - 1 : -1]
        if (
            self.k < self.best.shape[1] < self.size
        ):  # a row that was not kept scores at most the floor and an error
            clear &= _decoded(keys[:, -1])[1] > self.floor + self._error()
        return keys, clear

    def _error(self) -> np.ndarray | np.float32:
        """The most by which a row that scores the floor may be better.

        bfloat16 rounds either vector by 2^-8 of its length, and their score by 2^-8 of itself; a few percent more for the sums.
        """
        return (
            np.float32(2.1 * 2**-8) + abs(self.floor) * np.float32(1.1 * 2**-8)
            if self.precision == torch.bfloat16
            else self.slack
        )

    def ranks(self, tied: str) -> list[list[int]]:
        out: list[list[int]] = [[] for _ in self.queries]
        for column, rank in zip(self.column, self.greater + getattr(self, tied), strict=True):
            out[column].append(int(rank))
        return [sorted(row) for row in out]


def _opened(part: Rows | Path) -> Rows:
    return np.load(part, mmap_mode="r") if isinstance(part, Path) else part


def _read(parts: list) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 vectors) of each block. A file is mapped anew for every block, so what has been read is given back."""
    start = 0
    for part in parts:
        length = len(_opened(part))
        for first in range(0, length, ROWS):
            yield start + first, _unit(_opened(part)[first : first + ROWS], "pool row", start + first)
        start += length


def _unit(vectors: np.ndarray, name: str, start: int) -> np.ndarray:
    half = vectors.dtype == np.float16
    # torch converts float16 six times as fast as numpy
    out = (
        torch.from_numpy(np.array(vectors)).float().numpy()
        if half
        else np.require(vectors, np.float32, ["C", "W"])
    )
    lengths = np.sqrt(np.vecdot(out, out))
    if len(wrong := np.flatnonzero(~(abs(lengths - 1) < 0.01))):
        raise ValueError(
            f"{name} {start + wrong[0]} has length {lengths[wrong[0]]}, not 1; encode it again, normalised"
        )
    return out / lengths[:, None] if half else out


def _scores_at(queries: np.ndarray, columns: np.ndarray, parts: list, rows: np.ndarray) -> np.ndarray:
    """Exact scores of pairs of query and pool row, read in pool order."""
    scores, order, start = np.empty(len(rows), np.float32), np.argsort(rows, kind="stable"), 0
    for part in parts:
        length = len(_opened(part))
        chosen = order[slice(*np.searchsorted(rows[order], [start, start + length]))]
        for first in range(0, len(chosen), TILE):
            some = chosen[first : first + TILE]
            vectors = _unit(
                _opened(part)[rows[some] - start], "one of the pool rows from", int(rows[some[0]])
            )
            scores[some] = _cosines(vectors, np.arange(len(some)), queries, columns[some])
        start += length
    if len(outside := rows[(rows < 0) | (rows >= start)]):
        raise ValueError(f"relevant row {outside[0]} is outside the pool of {start}")
    return scores


def _cosines(part: np.ndarray, rows: np.ndarray, queries: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Exact scores of the pairs (part[rows], queries[columns])."""
    out = np.empty(len(rows), np.float32)
    for first in range(0, len(rows), PAIRS):
        some = slice(first, first + PAIRS)
        out[some] = np.einsum(
            "nd,nd->n", part[rows[some]].astype(np.float64), queries[columns[some]].astype(np.float64)
        )
    return out


def _in_huge_pages(count: int) -> np.ndarray:
    """Room for float32 numbers. numpy asks for huge pages, in which a product finds its rows sooner; none is only half in it."""
    room = np.empty(count + 2 * PAGE // 4, np.float32)
    return room[-room.ctypes.data % PAGE // 4 :][:count]


def _marked(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every mark; numpy's own nonzero takes ten times as long."""
    return np.divmod(np.flatnonzero(marks), max(1, marks.shape[1]))


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
