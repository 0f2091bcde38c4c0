"""Exact cosine search: one pass over a pool of any size gives the top k and the ranks of the relevant rows.

A blocked matrix product and a running top k in torch, on any device. A score is the dot product in float64,
rounded to float32; equal scores go by pool order. Products in float32 only find what could matter: the result
does not depend on blocks, threads, BLAS or device, and a copy of a vector ties with it wherever it stands.

    ranking = exact(queries, pool, k=10, relevant=[[3], [5, 8]])
    ranking.rows[0], ranking.ranks[0]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

QUERIES = 1024  # that are multiplied at once
ROWS = 8192  # of the pool that are read and looked at at once; a GPU multiplies all of them
TILE = 1024  # rows that a CPU multiplies at once, so that a near cache has their scores for the maxima
GROUP = 32  # rows whose maximum says whether to look at each of them
SPARE = 14  # rows kept beyond k, because float32 may order neighbours otherwise than float64
PAIRS = 1024  # scored in float64 at once
EMPTY = torch.iinfo(torch.int64).min  # a key below that of any row


@dataclass(frozen=True)
class Ranking:
    """rows (Q, k) int64 and scores (Q, k) float32, best first.

    ranks: per query the 1-based ranks of its relevant rows, ascending; pessimistic: the same with every
    relevant row behind all that score the same.
    """

    rows: np.ndarray
    scores: np.ndarray
    ranks: list[list[int]]
    pessimistic: list[list[int]]


def exact(
    queries: np.ndarray,
    pool: np.ndarray | Sequence,
    k: int,
    relevant: Sequence[Sequence[int]] | None = None,
    *,
    device: str | torch.device = "cpu",
) -> Ranking:
    """The k best pool rows of every query, and where its relevant rows stand.

    Queries for which too many scores are too close for float32, as when all embeddings are the same, take a
    second pass in float64; all take only that where torch may round float32 products further (TF32).

    Args:
        queries: (Q, D), unit length.
        pool: (C, D); an array, or what looks like one (np.memmap, cache.Kept): slices and row numbers give
            arrays. Read block by block and never held. float32 rows have unit length; float16 rows are scaled
            to it again.
        k: at most C.
        relevant: per query the pool rows judged relevant; may be empty. None means none.
        device: where scores are computed, as torch names it.

    Raises:
        ValueError: k exceeds the pool, or a vector is not finite or not of unit length.
    """
    size = len(pool)
    if k > size:
        raise ValueError(f"k = {k} exceeds the pool of {size}; lower the cut-off")
    vectors = torch.from_numpy(unit_rows(queries, "query", 0)).to(device)
    relevant = [[]] * len(vectors) if relevant is None else relevant

    # an entry is a query and one of its relevant rows
    query = np.repeat(np.arange(len(vectors)), [len(rows) for rows in relevant])
    row = np.array([row for rows in relevant for row in rows], np.int64)
    if len(outside := row[(row < 0) | (row >= size)]):
        raise ValueError(f"relevant row {outside[0]} is outside the pool of {size}")
    query, row = torch.from_numpy(query).to(device), torch.from_numpy(row).to(device)
    goals = _scores_of_pairs(vectors, query, pool, row)
    keys = torch.empty((len(vectors), k), dtype=torch.int64, device=device)
    ranks, pessimistic = torch.zeros_like(row), torch.zeros_like(row)

    undecided = torch.arange(len(vectors), device=device)
    coarse = [torch.float32] if torch.get_float32_matmul_precision() == "highest" else []
    for precision in (*coarse, torch.float64):
        if not len(undecided):
            break
        blocks = []
        for members in undecided.split(QUERIES):
            place = torch.full((len(vectors),), -1, device=device)
            place[members] = torch.arange(len(members), device=device)
            entry = (place[query] >= 0).nonzero()[:, 0]
            known = place[query[entry]], row[entry], goals[entry]
            blocks.append((members, entry, _Block(vectors[members], k, size, *known, precision)))
        _see_all([block for _, _, block in blocks], pool)
        unclear = []
        for members, entry, block in blocks:
            keys[members], clear = block.best(pool)
            ranks[entry], pessimistic[entry] = block.above + block.before, block.above + block.tied
            unclear.append(members[~clear])
        undecided = torch.cat(unclear)

    rows, scores = _decoded(keys)
    ends = np.cumsum([len(rows) for rows in relevant])[:-1]
    per_query = (np.split(values.cpu().numpy(), ends) for values in (ranks, pessimistic))
    lists = ([sorted(values.tolist()) for values in arrays[: len(vectors)]] for arrays in per_query)
    return Ranking(rows.cpu().numpy(), scores.cpu().numpy(), *lists)


def _see_all(blocks: list[_Block], pool: np.ndarray | Sequence) -> None:
    """Shows every row of the pool, in its order, to every block of queries."""
    device = blocks[0].queries.device
    # one room for the scores of all blocks: fresh memory would cost more than what is written to it
    room = torch.empty(ROWS * len(blocks[0].queries), dtype=blocks[0].precision, device=device)
    for start in range(0, len(pool), ROWS):
        part = torch.from_numpy(unit_rows(pool[start : start + ROWS], "pool row", start)).to(device)
        for block in blocks:
            block.see(part, start, room)


class _Block:
    """Some queries and what is known of them so far: keys of their best rows, counts for their relevant rows.

    An entry is a query and one of its relevant rows.

    Args:
        queries: (n, D) float32.
        query, row, goal: of the entries (E,): place among the queries, row of the pool, exact score.
        precision: of the products; with float64 nothing is too close to say.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        k: int,
        size: int,
        query: torch.Tensor,
        row: torch.Tensor,
        goal: torch.Tensor,
        precision: torch.dtype,
    ) -> None:
        self.queries, self.k, self.size, self.precision = queries, k, size, precision
        self.query, self.row, self.goal = query, row, goal
        self.factor = queries.T.to(precision)
        single = precision == torch.float32
        # rounding errors are random; this is far more than any that was seen
        self.slack = 4 * queries.shape[1] ** 0.5 * 2.0**-24 if single else 0.0
        kept = min(k + SPARE if single else k, size)
        self.keys = torch.full((len(queries), kept), EMPTY, device=queries.device)
        self.floor = torch.full((len(queries),), -torch.inf, device=queries.device)  # least score of `keys`
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []  # (query, key) that may be among the best
        self.waiting_keys = 0
        self.above, self.before, self.tied, self.close = torch.zeros(
            (4, len(row)), dtype=torch.int64, device=queries.device
        )
        # scores of an entry that are worth computing one by one; float64 leaves none to compute
        self.too_close = max(1000, size // 100) if single else size

    def see(self, vectors: torch.Tensor, start: int, room: torch.Tensor) -> None:
        """Takes the pool rows from `start` on into account.

        Args:
            vectors: (n, D) float32. room: at least (n up to a full GROUP) times the queries, to work in.
        """
        width, count = len(self.queries), len(vectors)
        scores = room[: (count + -count % GROUP) * width].view(-1, width)
        scores[count:] = -torch.inf
        peaks = torch.empty((len(scores) // GROUP, width), device=scores.device)
        tile = TILE if scores.device.type == "cpu" else ROWS
        for first in range(0, count, tile):
            last = min(first + tile, count)
            torch.mm(vectors[first:last].to(self.precision), self.factor, out=scores[first:last])
            fresh = scores[first : first + tile].float().view(-1, GROUP, width)
            peaks[first // GROUP : first // GROUP + len(fresh)] = fresh.amax(1)
        groups = scores.float().view(-1, GROUP, width)

        # a bound before anything is kept: where n groups have a score as high as this, n rows have
        if start == 0 and len(peaks) >= self.keys.shape[1] > 0:
            least = peaks.topk(self.keys.shape[1], dim=0)[0][-1]
            self.floor = least.nextafter(torch.full_like(least, -torch.inf))
        # what scores as the least of the best does stands behind it: rows come in pool order
        group, query = (peaks > self.floor).nonzero(as_tuple=True)
        values = groups[group, :, query]
        pair, place = (values > self.floor[query, None]).nonzero(as_tuple=True)
        rows = start + group[pair] * GROUP + place
        self.waiting.append((query[pair], _keys(values[pair, place], rows)))
        self.waiting_keys += len(pair)
        if self.waiting_keys > self.keys.numel() // 4:
            self._merge()
        if len(self.row):
            self._count(groups, peaks, vectors, start)

    def _merge(self) -> None:
        """Lets the waiting keys compete with the best ones."""
        query, keys = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting, self.waiting_keys = [], 0
        order = query.argsort(stable=True)
        counts = query.bincount(minlength=len(self.keys))
        nth = torch.arange(len(keys), device=keys.device) - (counts.cumsum(0) - counts)[query[order]]
        table = torch.full((len(self.keys), int(counts.max())), EMPTY, device=keys.device)
        table[query[order], nth] = keys[order]
        self.keys = torch.cat([self.keys, table], 1).topk(self.keys.shape[1], sorted=False)[0]
        least = self.keys.amin(1)
        self.floor = torch.where(least == EMPTY, -torch.inf, _decoded(least)[1])

    def _count(self, groups: torch.Tensor, peaks: torch.Tensor, vectors: torch.Tensor, start: int) -> None:
        """Counts the scores above those of the entries; those too close to say are computed exactly."""
        low, high = (self.goal - self.slack)[:, None], (self.goal + self.slack)[:, None]
        reached = (peaks.T[self.query] >= low) & (self.close <= self.too_close)[:, None]
        for pairs in reached.nonzero().split(ROWS):
            entry, group = pairs.unbind(1)
            values = groups[group, :, self.query[entry]]
            over = values > high[entry]
            self.above.index_add_(0, entry, over.sum(1))
            pair, place = ((values >= low[entry]) & ~over).nonzero(as_tuple=True)
            entry, row = entry[pair], group[pair] * GROUP + place
            if self.precision == torch.float64:
                score = values[pair, place]
            else:
                score = _cosines(vectors, row, self.queries, self.query[entry])
            equal = score == self.goal[entry]
            early = start + row <= self.row[entry]
            self.close.index_add_(0, entry, torch.ones_like(entry))
            self.above.index_add_(0, entry, (score > self.goal[entry]).long())
            self.tied.index_add_(0, entry, equal.long())
            self.before.index_add_(0, entry, (equal & early).long())

    def best(self, pool: np.ndarray | Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact keys (queries, k), best first, and for which queries no key and no count can be wrong."""
        if self.waiting:
            self._merge()
        keys, clear = self.keys, torch.ones_like(self.floor, dtype=torch.bool)
        if self.precision == torch.float32:
            rows = _decoded(keys)[0].ravel()
            query = torch.arange(len(keys), device=keys.device).repeat_interleave(keys.shape[1])
            keys = _keys(_scores_of_pairs(self.queries, query, pool, rows), rows).view(keys.shape)
            clear[self.query[self.close > self.too_close]] = False
        keys = keys.sort(descending=True)[0][:, : self.k]
        if self.k and self.k < self.keys.shape[1] < self.size:
            # a row that was not kept scores at most the floor and an error
            clear &= _decoded(keys[:, -1])[1] > self.floor + self.slack
        return keys, clear


def unit_rows(vectors: np.ndarray, name: str = "row", start: int = 0) -> np.ndarray:
    """(N, D) vectors as float32 of unit length; float16 ones, which were rounded, are scaled to it again.

    Args:
        name, start: what a row is called, and the number of the first, where one is refused.

    Raises:
        ValueError: a vector is not finite, or its length is not 1 within 1 %.
    """
    half = vectors.dtype == np.float16
    if half:  # torch converts float16 six times as fast as numpy
        out = torch.from_numpy(np.array(vectors)).float().numpy()
    else:
        out = np.require(vectors, np.float32, ["C", "W"])
    lengths = np.sqrt(np.vecdot(out, out))
    if len(wrong := np.flatnonzero(~(abs(lengths - 1) < 0.01))):
        raise ValueError(
            f"{name} {start + wrong[0]} has length {lengths[wrong[0]]}, not 1; encode it again, normalised"
        )
    return out / lengths[:, None] if half else out


class Prefixes:
    """(N, dim) float32: the first numbers of N longer vectors, of unit length again; read where it is sliced.

    Raises:
        ValueError: the vectors are shorter.
    """

    def __init__(self, vectors: np.ndarray | Sequence, dim: int) -> None:
        if len(vectors) and dim > (size := vectors[:1].shape[1]):
            raise ValueError(f"{dim} numbers were asked for of vectors of {size}; ask for fewer")
        self._vectors, self._dim = vectors, dim

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, rows) -> np.ndarray:
        part = np.asarray(self._vectors[rows][:, : self._dim], np.float32)
        return part / np.linalg.norm(part, axis=1, keepdims=True)


def _scores_of_pairs(
    queries: torch.Tensor, query: torch.Tensor, pool: np.ndarray | Sequence, row: torch.Tensor
) -> torch.Tensor:
    """Exact scores (N,) of pairs of a query and a pool row (N,), (N,); the pool is read in its order."""
    scores = torch.empty(len(row), dtype=torch.float32, device=queries.device)
    order = row.argsort(stable=True)
    for first in range(0, len(row), ROWS):
        chosen = order[first : first + ROWS]
        rows = row[chosen].cpu().numpy()
        vectors = torch.from_numpy(unit_rows(pool[rows], "one of the pool rows from", rows[0]))
        place = torch.arange(len(chosen), device=queries.device)
        scores[chosen] = _cosines(vectors.to(queries.device), place, queries, query[chosen])
    return scores


def _cosines(
    vectors: torch.Tensor, row: torch.Tensor, queries: torch.Tensor, query: torch.Tensor
) -> torch.Tensor:
    """Exact scores (N,) of the pairs (vectors[row], queries[query]): sums in float64, rounded to float32."""
    parts = [
        (vectors[rows].double() * queries[places].double()).sum(1).float()
        for rows, places in zip(row.split(PAIRS), query.split(PAIRS), strict=True)
    ]
    return torch.cat(parts)


def _keys(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Integers (N,) that sort as (score, row) is ranked: a higher score, or else a lower row, is larger."""
    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (0xFFFFFFFF - rows)


def _decoded(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and scores of keys. The inverse of `_keys`."""
    bits = (keys >> 32).int()
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF), (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
