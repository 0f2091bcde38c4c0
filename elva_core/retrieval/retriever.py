"""Encoding items, and the positives of a unit ranked against a pool.

result = Searcher(encoder, root, "test", settings).evaluate("mscoco_task0", pool="global")
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from elva_core import distributed, files
from elva_core.config import EvaluationSettings
from elva_core.data import mbeir
from elva_core.data.items import Item, candidate_item, query_item
from elva_core.models import batching, generation
from elva_core.models.ahead import preparing
from elva_core.models.encoder import Encoder
from elva_core.models.vision import stamp
from elva_core.retrieval import metrics, search

PLACES = {"local": "single", "global": "union"}  # UniIR's words for pools, in names of run files
COLUMNS = ("model", "unit", "pool", "metric", "value", "ci_low", "ci_high", "n")  # of a table of results


def identity(item: Item) -> tuple:
    """Identity of an item for its embedding: its parts, and the size and time of change of its files.

    An image or a clip counts by path and these: reading its bytes would take as long as embedding it.
    """
    paths = (*item.images, *(clip.path for clip in item.clips))
    return (item.text, *(value for path in paths for value in (path, *stamp(path))), *item.more)


@torch.no_grad()
def encode(
    encoder: Encoder, items: Sequence[Item], *, batch: int, template: str = "summary"
) -> tuple[np.ndarray, list[str]]:
    """Embeddings of items, each distinct item once.

    Args:
        template: "summary" writes a greedy summary and reads [RET] (ELVA), "eol" takes the prompt's last
            state, "bare" that at a [RET] without a summary.

    Returns:
        (N, D) float32, L2-normalised, and the summary text of each item ("" for eol and bare).
    """
    request = encoder.settings.eol_request if template == "eol" else encoder.settings.summary_request
    parts = _parts(encoder, items, batch, request, summaries=template != "eol")
    mine, done = distributed.own_share(len(parts)), {}
    with preparing(encoder, lambda turn: (parts[mine[turn]], request), len(mine)) as prepare:
        for turn, number in enumerate(mine):
            prepare(turn)
            part, summaries = parts[number], [""] * len(parts[number])
            if template == "eol":
                embedded = encoder.embed_eol(part)
            elif template == "bare":
                embedded, _ = encoder.embed_summaries(part, [[]] * len(part))
            else:
                out = generation.generate(encoder, part)
                embedded = out.embeddings[:, 0]
                ids = out.summaries(encoder.end_id)
                summaries = [encoder.processor.tokenizer.decode(summary) for (summary,) in ids]
            done[number] = embedded.float().cpu().numpy(), summaries
    embeddings = {}
    for number, (embedded, summaries) in distributed.gathered(done).items():
        embeddings.update(zip(parts[number], zip(embedded, summaries, strict=True), strict=True))
    vectors, texts = zip(*(embeddings[item] for item in items), strict=True)
    return np.stack(vectors), list(texts)


def _parts(
    encoder: Encoder, items: Sequence[Item], batch: int, request: str, *, summaries: bool
) -> list[list[Item]]:
    """Distinct items that share a forward: `batch` of them, or as many as the encoder's `batch_tokens` allow.

    Rows of one shape are together: less padding, and the order does not depend on the caller.
    """
    distinct = sorted(
        dict.fromkeys(items), key=lambda item: (item.frames, len(item.images), item.length, str(item))
    )
    prompts, by_row = encoder.settings, distinct
    parts: list[list[Item]] = []
    if prompts.batch_tokens is not None:
        by_row = [item for item in distinct if item.clips]  # whose length only their video tells
        distinct = distinct[: len(distinct) - len(by_row)]
        more = prompts.max_summary_tokens + 1 if summaries else 0
        counts = batching.lengths(encoder, distinct, request) if distinct else []
        tokens = [count + more for count in counts]
        parts = [[distinct[i] for i in rows] for rows in batching.by_tokens(tokens, prompts.batch_tokens)]
    return parts + [by_row[start : start + batch] for start in range(0, len(by_row), batch)]


@dataclass(frozen=True)
class UnitResult:
    """Ranks of the positives of one unit under one model.

    `queries` are in the order of the ranks, `candidates` in that of the pool.
    """

    unit: str
    pool: str
    queries: Sequence[mbeir.Query]
    ranks: list[list[int]]
    pessimistic: list[list[int]]
    relevant: list[int]
    top: np.ndarray  # (Q, k) pool rows
    scores: np.ndarray  # (Q, k)
    candidates: Sequence[mbeir.Candidate]

    def wrong_modality(self) -> np.ndarray:
        """1 where the first answer has another modality than the task asks for, per query."""
        modalities = [mbeir.MODALITIES_OF[query.task][1] for query in self.queries]
        first = [self.candidates[rows[0]].modality for rows in self.top]
        return np.array([float(a != b) for a, b in zip(first, modalities, strict=True)])

    def table(self, cutoffs: Sequence[int], samples: int, seed: int) -> list[dict]:
        """One row per metric with a bootstrap interval over queries, in COLUMNS without the model.

        A unit of M-BEIR is also measured at the cut-off it is reported at.
        """
        cutoffs = sorted({*cutoffs, mbeir.OFFICIAL_UNITS.get(self.unit, cutoffs[0])})
        measured = {f"hit@{k}": metrics.hit_rate_at_k(self.ranks, k) for k in cutoffs}
        measured |= {f"recall@{k}": metrics.recall_at_k(self.ranks, k, self.relevant) for k in cutoffs}
        measured |= {f"hit@{k} pessimistic": metrics.hit_rate_at_k(self.pessimistic, k) for k in cutoffs}
        measured["wrong modality@1"] = self.wrong_modality()
        measured["mrr@10"] = metrics.reciprocal_rank(self.ranks)
        measured["ndcg@10"] = metrics.ndcg_at_k(self.ranks, 10, self.relevant)
        rows = []
        for name, values in measured.items():
            rng = distributed.rng_for(seed, "bootstrap", self.unit, name)
            low, high = metrics.interval([values], samples, rng)
            row = (self.unit, self.pool, name, values.mean(), low, high, len(values))
            rows.append(dict(zip(COLUMNS[1:], row, strict=True)))
        return rows


class Embedded(NamedTuple):
    """The queries and candidates of a unit with their vectors (Q, D), (C, D).

    relevant: per query the pool rows judged relevant.
    """

    unit: str
    pool: str
    queries: Sequence[mbeir.Query]
    candidates: Sequence[mbeir.Candidate]
    relevant: list[list[int]]
    query_vectors: Sequence
    pool_vectors: Sequence

    @property
    def content(self) -> tuple[str, str]:
        """Hashes of what was embedded, queries and candidates: the cache's, or of the vectors in memory."""
        return _content(self.query_vectors), _content(self.pool_vectors)


def _content(vectors: Sequence) -> str:
    if isinstance(vectors, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(vectors)).hexdigest()
    return vectors.content  # of cache.Kept


class Searcher:
    """One encoder over one root and split: embeds each distinct query and candidate once.

    Args:
        store: where embeddings are kept (cache.Store); None keeps them, and the summaries, in memory.
        embed_pool: what embeds the candidates, where that is another model than the queries'; None is this.
    """

    def __init__(
        self,
        encoder: Encoder,
        root: mbeir.Root,
        split: str,
        settings: EvaluationSettings,
        *,
        template: str = "summary",
        store: Callable[[Iterable[Item]], Sequence] | None = None,
        embed_pool: Callable[[Iterable[Item]], Sequence] | None = None,
    ) -> None:
        self.encoder, self.root, self.split, self.settings = encoder, root, split, settings
        self.template = template
        self._known: dict[Item, tuple[tuple, np.ndarray, str]] = {}  # `identity`, embedding, summary
        self.vectors = store or self._in_memory
        self.embed_pool = embed_pool or self.vectors

    def _in_memory(self, items: Iterable[Item]) -> np.ndarray:
        """(N, D) embeddings."""
        items = list(items)
        identities = {i: identity(i) for i in dict.fromkeys(items)}
        missing = [i for i, now in identities.items() if i not in self._known or self._known[i][0] != now]
        if missing:
            vectors, texts = encode(self.encoder, missing, batch=self.settings.batch, template=self.template)
            for item, vector, text in zip(missing, vectors, texts, strict=True):
                self._known[item] = identities[item], vector, text
        return np.stack([self._known[i][1] for i in items])

    def summary(self, item: Item) -> str:
        """The text the model wrote for an item that was embedded before."""
        return self._known[item][2]

    def query(self, query: mbeir.Query, unit: str, prompt_index: int | None = None) -> Item:
        """The query with its instruction, chosen by a stable hash of split, unit and qid, or by index."""
        return query_item(self.root, query, scope=f"{self.split}/{unit}", prompt_index=prompt_index)

    def evaluate(self, unit: str, **how) -> UnitResult:
        """Ranks every judged query of a unit against a pool; arguments and errors as `embedded` has them."""
        return self.rank(self.embedded(unit, **how))

    def embedded(
        self,
        unit: str,
        *,
        pool: str = "local",
        root: mbeir.Root | None = None,
        prompt_index: int | None = None,
        sample: int | None = None,
    ) -> Embedded:
        """A unit and a pool, as vectors.

        Args:
            root: where queries and qrels come from (a benchmark); None is this searcher's root.
            sample: at most so many queries, in their order, chosen by a stable hash: fewer are part of more.

        Raises:
            ElvaDataError: no query, a query without judgement or without a positive in the pool, or (global
                pool) a judged did that the pool lacks.
        """
        source = root or self.root
        queries, path = source.queries(unit, self.split), source.query_path(unit, self.split)
        if not len(queries):
            raise files.ElvaDataError(f"{path} has no queries; restore the file, or leave the unit out")
        judged = source.qrels(unit, self.split)
        candidates = source.pool(unit, self.split, pool)
        places = list(range(len(queries)))
        if sample is not None:
            places.sort(key=lambda i: mbeir.stable_hash("sample", queries[i].qid))
            places = sorted(places[:sample])
            queries = [queries[i] for i in places]
        relevant, path = [], source.qrels_path(unit, self.split)
        for place, query in zip(places, queries, strict=True):
            if query.qid not in judged:
                raise files.ElvaDataError(f"{path}: query {query.qid} has no judgement")
            dataset = query.qid.partition(":")[0]  # all that a local pool holds
            dids = [d for d in judged[query.qid] if pool == "global" or d.partition(":")[0] == dataset]
            rows = [candidates.row(did) for did in dids]
            if None in rows:
                raise files.ElvaDataError(
                    f"{path}: {query.qid} is judged with {dids[rows.index(None)]}, "
                    f"which the {pool} pool lacks; run lint"
                )
            if not rows:
                line = f"{source.query_path(unit, self.split)}:{place + 1}"
                problem = f"query {query.qid} has no positive in the {pool} pool"
                raise files.ElvaDataError(f"{line}: {problem}; remove it, or take the global pool")
            relevant.append(rows)
        query_vectors = self.vectors(self.query(query, unit, prompt_index) for query in queries)
        pool_vectors = self.embed_pool(candidate_item(self.root, candidate) for candidate in candidates)
        return Embedded(unit, pool, queries, candidates, relevant, query_vectors, pool_vectors)

    def rank(self, embedded: Embedded) -> UnitResult:
        """Ranks of the positives, and the best candidates."""
        unit, pool, queries, candidates, relevant, query_vectors, pool_vectors = embedded
        k = min(max(self.settings.cutoffs), len(candidates))
        ranking = search.exact(query_vectors[:], pool_vectors, k, relevant, device=self.encoder.device)
        return UnitResult(
            unit,
            pool,
            queries,
            ranking.ranks,
            ranking.pessimistic,
            [len(rows) for rows in relevant],
            ranking.rows,
            ranking.scores,
            candidates,
        )


def write_run(result: UnitResult, folder: Path, run_id: str, split: str = "test") -> list[Path]:
    """The ranked lists as trec_eval reads them, and as UniIR names and writes them.

    Columns: qid Q0 did rank score run [task]; UniIR's files have the last.

    Args:
        run_id: its blanks become underscores, for they end a column; "run" where nothing is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    depth, place = result.top.shape[1], PLACES[result.pool]
    trec = folder / f"{result.unit}_{result.pool}_trec.txt"
    uniir = folder / f"mbeir_{result.unit}_{place}_pool_{split}_k{depth}_run.txt"
    tag = "_".join(run_id.split()) or "run"
    lines = [
        (f"{query.qid} Q0 {result.candidates[row].did} {rank} {value:.6f} {tag}", query.task)
        for query, rows, scores in zip(result.queries, result.top, result.scores, strict=True)
        for rank, (row, value) in enumerate(zip(rows, scores, strict=True), start=1)
    ]
    files.write_whole(trec, "".join(f"{line}\n" for line, _ in lines))
    files.write_whole(uniir, "".join(f"{line} {task}\n" for line, task in lines))
    return [trec, uniir]


def run_files(folder: Path, unit: str, pool: str, split: str) -> list[Path]:
    """The ranked lists of a unit and pool that `write_run` left in a folder, of any depth."""
    uniir = re.compile(rf"mbeir_{re.escape(unit)}_{PLACES[pool]}_pool_{split}_k\d+_run\.txt")
    names = (path.name for path in folder.glob("*.txt"))
    return [folder / name for name in names if name == f"{unit}_{pool}_trec.txt" or uniir.fullmatch(name)]


def write_qrels(root: mbeir.Root, unit: str, split: str, folder: Path) -> Path:
    """The judgements of a unit in trec_eval's four columns; the root's file has UniIR's fifth, the task."""
    folder.mkdir(parents=True, exist_ok=True)
    judged = root.qrels(unit, split)
    lines = [f"{qid} 0 {did} {value}" for qid, dids in judged.items() for did, value in dids.items()]
    path = folder / f"{unit}_qrels_trec.txt"
    files.write_whole(path, "\n".join(lines) + "\n")
    return path
