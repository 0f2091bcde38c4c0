"""A pool of candidates with their vectors, which a free query is ranked against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from elva_core.data import mbeir
from elva_core.data.items import candidate_item
from elva_core.models.encoder import Encoder
from elva_core.retrieval import cache
from elva_core.retrieval.cache import Store


@dataclass(frozen=True)
class Pool:
    """Candidates (C) in pool order with their vectors (C, D).

    kind: local or global. template: how the vectors were read. root: where the images are, None if not known.
    first: (Q, D) queries and a number of answers -> (Q, n) rows, ascending, that are worth scoring; None
        scores all.
    """

    unit: str
    kind: str
    candidates: Sequence[mbeir.Candidate]
    vectors: Sequence
    template: str
    root: mbeir.Root | None
    first: Callable[[np.ndarray, int], np.ndarray] | None = None


def of_unit(
    loaded: Encoder,
    root: mbeir.Root,
    unit: str,
    *,
    batch: int,
    template: str = "summary",
    pool: str = "local",
) -> Pool:
    """The test pool of a unit, embedded once and kept in outputs/cache/embeddings (float16)."""
    candidates = root.pool(unit, "test", pool)
    kept = Store(cache.EMBEDDINGS, loaded, batch=batch, template=template)
    return Pool(unit, pool, candidates, kept(candidate_item(root, c) for c in candidates), template, root)
