"""Encoding items, and the positives of a unit ranked against a pool.

result = Searcher(encoder, root, "test", settings).evaluate("mscoco_task0", pool="global")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from elva_core import distributed, files
from elva_core.config import EvaluationSettings
from elva_core.data import mbeir
from elva_core.data.items import Item, candidate_item, query_item
from elva_core.models import generation
from elva_core.models.encoder import Encoder
from elva_core.retrieval import metrics, search


@torch.no_grad()
def encode(
    encoder: Encoder, items: Sequence[Item], *, batch: int, template: str = "summary"
) -> tuple[np.ndarray, list[str]]:
    """Embeddings of items, each distinct item once.

    Args:
        template: "summary" writes a greedy summary and reads [RET] (ELVA), "eol" takes the prompt's last state.

    Returns:
        (N, D) float32, L2-normalised, and the summary text of each item ("" for eol).
    """
    distinct = list(dict.fromkeys(items))
    # rows of one shape together: less padding, and the order does not depend on the caller
    order = sorted(
        range(len(distinct)),
        key=lambda i: (distinct[i].frames, len(distinct[i].images), distinct[i].length, str(distinct[i])),
    )
    parts = [order[start : start + batch] for start in range(0, len(order), batch)]
    done = {}
    for number in distributed.own_share(len(parts)):
        part, summaries = [distinct[i] for i in parts[number]], [""] * len(parts[number])
        if template == "eol":
            embedded = encoder.embed_eol(part)
        else:
            out = generation.generate(encoder, part)
            embedded = out.embeddings[:, 0]
            summaries = [
                encoder.processor.tokenizer.decode(summary) for (summary,) in out.summaries(encoder.end_id)
            ]
        done[number] = embedded.float().cpu().numpy(), summaries
    vectors: list[np.ndarray] = [None] * len(distinct)  # type: ignore[list-item]
    texts = [""] * len(distinct)
    for number, (embedded, summaries) in distributed.gathered(done).items():
        for i, vector, summary in zip(parts[number], embedded, summaries, strict=True):
            vectors[i], texts[i] = vector, summary
    place = {item: i for i, item in enumerate(distinct)}
    found = [place[item] for item in items]
    return np.stack([vectors[i] for i in found]), [texts[i] for i in found]


@dataclass(frozen=True)
class UnitResult:
    """Ranks of the positives of one unit under one model. `queries` are in the order of the ranks, `candidates` in that of the pool."""

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
        asked = [mbeir.CANDIDATE_MODALITY[query.task] for query in self.queries]
        return np.array(
            [float(self.candidates[top[0]].modality != m) for top, m in zip(self.top, asked, strict=True)]
        )

    def table(self, cutoffs: Sequence[int], samples: int, seed: int) -> list[dict]:
        """One row per metric with a bootstrap interval over queries; a unit of M-BEIR also at the cut-off it is reported at."""
        cutoffs = sorted(
            {*cutoffs, *([mbeir.OFFICIAL_UNITS[self.unit]] if self.unit in mbeir.OFFICIAL_UNITS else [])}
        )
        measured = {f"hit@{k}": metrics.hit_rate_at_k(self.ranks, k) for k in cutoffs}
        measured |= {f"recall@{k}": metrics.recall_at_k(self.ranks, k, self.relevant) for k in cutoffs}
        measured |= {f"hit@{k} pessimistic": metrics.hit_rate_at_k(self.pessimistic, k) for k in cutoffs}
        measured |= {"wrong modality@1": self.wrong_modality()}
        measured |= {
            "mrr@10": metrics.reciprocal_rank(self.ranks),
            "ndcg@10": metrics.ndcg_at_k(self.ranks, 10, self.relevant),
        }
        rows = []
        for name, values in measured.items():
            low, high = metrics.bootstrap_interval(
                values, samples, distributed.rng_for(seed, "bootstrap", self.unit, name)
            )
            rows.append(
                {
                    "unit": self.unit,
                    "pool": self.pool,
                    "metric": name,
                    "value": values.mean(),
                    "ci_low": low,
                    "ci_high": high,
                    "n": len(values),
                }
            )
        return rows


class Embedded(NamedTuple):
    """The queries and candidates of a unit with their vectors (Q, D), (C, D). relevant: per query the pool rows judged relevant."""

    unit: str
    pool: str
    queries: Sequence[mbeir.Query]
    candidates: Sequence[mbeir.Candidate]
    relevant: list[list[int]]
    query_vectors: Sequence
    pool_vectors: Sequence


class Searcher:
    """One encoder over one root and split: embeds each distinct query and candidate once, whatever asks for it.

    Args:
        store: where embeddings are kept (store.Store); None keeps them, and the summaries, in memory.
        embed_pool: what embeds the candidates, where that is another model than the queries'; None is this one.
    """

    def __init__(
        self,
        encoder: Encoder,
        root: mbeir.Root,
        split: str,
        settings: EvaluationSettings,
        *,
        template: str = "summary",
        seed: int = 0,
        store: Callable[[Iterable[Item]], Sequence] | None = None,
        embed_pool: Callable[[Iterable[Item]], Sequence] | None = None,
    ) -> None:
        self.encoder, self.root, self.split, self.settings, self.template, self.seed = (
            encoder,
            root,
            split,
            settings,
            template,
            seed,
        )
        self._known: dict[Item, tuple[np.ndarray, str]] = {}
        self.vectors = store or self._in_memory
        self.embed_pool = embed_pool or self.vectors

    def _in_memory(self, items: Iterable[Item]) -> np.ndarray:
        """(N, D) embeddings."""
        items = list(items)
        missing = [i for i in dict.fromkeys(items) if i not in self._known]
        if missing:
            vectors, texts = encode(self.encoder, missing, batch=self.settings.batch, template=self.template)
            self._known.update(zip(missing, zip(vectors, texts, strict=True), strict=True))
        return np.stack([self._known[i][0] for i in items])

    def summary(self, item: Item) -> str:
        """The text the model wrote for an item that was embedded before."""
        return self._known[item][1]

    def query(self, query: mbeir.Query, unit: str, prompt_index: int | None = None) -> Item:
        """The query with its instruction, chosen by a stable hash of split, unit and qid, or by index."""
        return query_item(
            self.root, query, seed=self.seed, scope=f"{self.split}/{unit}", prompt_index=prompt_index
        )

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
            sample: at most so many queries, in their order, chosen by a stable hash, so that fewer are part of more.

        Raises:
            ElvaDataError: a query without judgement, or (global pool) a judged did that the pool lacks.
        """
        asked = root or self.root
        queries, judged, candidates = (
            asked.queries(unit, self.split),
            asked.qrels(unit, self.split),
            asked.pool(unit, self.split, pool),
        )
        if sample is not None:
            order = sorted(range(len(queries)), key=lambda i: mbeir.stable_hash("sample", queries[i].qid))
            queries = [queries[i] for i in sorted(order[:sample])]
        relevant = []
        for query in queries:
            if query.qid not in judged:
                raise files.ElvaDataError(
                    f"{asked.qrels_path(unit, self.split)}: query {query.qid} has no judgement"
                )
            own = [
                d
                for d in judged[query.qid]
                if pool == "global" or d.partition(":")[0] == query.qid.partition(":")[0]
            ]
            rows = [candidates.row(d) for d in own]
            if None in rows:
                raise files.ElvaDataError(
                    f"{asked.qrels_path(unit, self.split)}: {query.qid} is judged with {own[rows.index(None)]}, "
                    f"which the {pool} pool lacks; run lint"
                )
            relevant.append(rows)
        q = self.vectors(self.query(query, unit, prompt_index) for query in queries)
        return Embedded(
            unit,
            pool,
            queries,
            candidates,
            relevant,
            q,
            self.embed_pool(candidate_item(self.root, x) for x in candidates),
        )

    def rank(self, asked: Embedded) -> UnitResult:
        """Where the positives stand, and the best candidates."""
        k = min(max(self.settings.cutoffs), len(asked.candidates))
        found = search.exact(asked.query_vectors[:], asked.pool_vectors, k, asked.relevant)
        sizes = [len(rows) for rows in asked.relevant]
        return UnitResult(
            asked.unit,
            asked.pool,
            asked.queries,
            found.ranks,
            found.pessimistic,
            sizes,
            found.rows,
            found.scores,
            asked.candidates,
        )


def write_run(result: UnitResult, folder: Path, run_id: str, split: str = "test") -> list[Path]:
    """The ranked lists as trec_eval reads them, six columns, and as UniIR names and writes them, seven: the last is the task.

    Columns: qid Q0 did rank score run [task].
    """
    folder.mkdir(parents=True, exist_ok=True)
    depth, place = result.top.shape[1], "single" if result.pool == "local" else "union"
    trec, uniir = (
        folder / f"{result.unit}_{result.pool}_trec.txt",
        folder / f"mbeir_{result.unit}_{place}_pool_{split}_k{depth}_run.txt",
    )
    lines = [
        (f"{query.qid} Q0 {result.candidates[row].did} {rank} {value:.6f} {run_id}", query.task)
        for query, rows, scores in zip(result.queries, result.top, result.scores, strict=True)
        for rank, (row, value) in enumerate(zip(rows, scores, strict=True), start=1)
    ]
    files.write_whole(trec, "".join(f"{line}\n" for line, _ in lines))
    files.write_whole(uniir, "".join(f"{line} {task}\n" for line, task in lines))
    return [trec, uniir]


def write_qrels(root: mbeir.Root, unit: str, split: str, folder: Path) -> Path:
    """The judgements of a unit in trec_eval's four columns; the root's own file has UniIR's fifth, the task."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{qid} 0 {did} {relevance}"
        for qid, dids in root.qrels(unit, split).items()
        for did, relevance in dids.items()
    ]
    files.write_whole(folder / f"{unit}_qrels_trec.txt", "\n".join(lines) + "\n")
    return folder / f"{unit}_qrels_trec.txt"


def tabulate(rows: Sequence[dict]) -> pd.DataFrame:
    """Long table of results in a stable column order."""
    return pd.DataFrame(rows)[["model", "unit", "pool", "metric", "value", "ci_low", "ci_high", "n"]]
