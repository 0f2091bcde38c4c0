"""Encoding items, and scoring a model on one unit.

vectors, texts = encode(encoder, items, batch=256)
result = Searcher(encoder, root, "test", settings.evaluation).evaluate("emoji_task0")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from elva_core import mbeir, metrics, rollout, runtime, search
from elva_core.encoder import Encoder, Item, candidate_item, query_item
from elva_core.settings import EvaluationSettings


@torch.no_grad()
def encode(encoder: Encoder, items: Sequence[Item], *, batch: int, template: str = "summary") -> tuple[np.ndarray, list[str]]:
    """Embeddings of items, each distinct item once.

    Args:
        template: "summary" writes a greedy summary and reads [RET] (ELVA), "eol" takes the prompt's last state.

    Returns:
        (N, D) float32, L2-normalised, and the summary text of each item ("" for eol).
    """
    distinct = list(dict.fromkeys(items))
    # rows of one shape together: less padding, and the order does not depend on the caller
    order = sorted(range(len(distinct)), key=lambda i: (distinct[i].image is not None, len(distinct[i].text), str(distinct[i])))
    vectors: list[np.ndarray] = [None] * len(distinct)  # type: ignore[list-item]
    texts = [""] * len(distinct)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        part = [distinct[i] for i in rows]
        if template == "eol":
            embedded = encoder.embed_eol(part)
        else:
            out = rollout.generate(encoder, part)
            embedded = out.embeddings[:, 0]
            for i, (summary,) in zip(rows, out.summaries(encoder.end_id), strict=True):
                texts[i] = encoder.processor.tokenizer.decode(summary)
        for i, vector in zip(rows, embedded.float().cpu().numpy(), strict=True):
            vectors[i] = vector
    place = {item: i for i, item in enumerate(distinct)}
    found = [place[item] for item in items]
    return np.stack([vectors[i] for i in found]), [texts[i] for i in found]


@dataclass(frozen=True)
class UnitResult:
    """Ranks of the positives of one unit under one model. `queries` are in the order of the ranks."""

    unit: str
    pool: str
    queries: tuple[mbeir.Query, ...]
    ranks: list[list[int]]
    pessimistic: list[list[int]]
    relevant: list[int]
    top: np.ndarray  # (Q, k) pool rows
    scores: np.ndarray  # (Q, k)
    candidates: tuple[mbeir.Candidate, ...]

    def table(self, cutoffs: Sequence[int], samples: int, seed: int) -> list[dict]:
        """One row per metric with a bootstrap interval over queries."""
        measured = {f"hit@{k}": metrics.hit_rate_at_k(self.ranks, k) for k in cutoffs}
        measured |= {f"recall@{k}": metrics.recall_at_k(self.ranks, k, self.relevant) for k in cutoffs}
        measured |= {f"hit@{k} pessimistic": metrics.hit_rate_at_k(self.pessimistic, k) for k in cutoffs}
        measured |= {"mrr@10": metrics.reciprocal_rank(self.ranks), "ndcg@10": metrics.ndcg_at_k(self.ranks, 10, self.relevant)}
        rows = []
        for name, values in measured.items():
            low, high = metrics.bootstrap_interval(values, samples, runtime.rng_for(seed, "bootstrap", self.unit, name))
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


class Searcher:
    """One encoder over one root and split: encodes each distinct query and candidate once, whatever asks for it."""

    def __init__(
        self, encoder: Encoder, root: mbeir.Root, split: str, settings: EvaluationSettings, *, template: str = "summary", seed: int = 0
    ) -> None:
        self.encoder, self.root, self.split, self.settings, self.template, self.seed = encoder, root, split, settings, template, seed
        self._known: dict[Item, tuple[np.ndarray, str]] = {}

    def vectors(self, items: Sequence[Item]) -> np.ndarray:
        """(N, D) embeddings."""
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
        return query_item(self.root, query, seed=self.seed, scope=f"{self.split}/{unit}", prompt_index=prompt_index)

    def evaluate(self, unit: str, *, pool: str = "local", root: mbeir.Root | None = None, prompt_index: int | None = None) -> UnitResult:
        """Ranks every judged query of a unit against a pool.

        Args:
            root: where queries and qrels come from (a benchmark); None is this searcher's root.

        Raises:
            ElvaDataError: a query without judgement, or (global pool) a judged did that the pool lacks.
        """
        asked = root or self.root
        queries, judged = asked.queries(unit, self.split), asked.qrels(unit, self.split)
        candidates = asked.pool(unit, self.split, pool)
        row = {c.did: i for i, c in enumerate(candidates)}
        relevant = []
        for query in queries:
            if query.qid not in judged:
                raise mbeir.ElvaDataError(f"{asked.qrels_path(unit, self.split)}: query {query.qid} has no judgement")
            own = [d for d in judged[query.qid] if pool == "global" or d.partition(":")[0] == query.qid.partition(":")[0]]
            if lost := [d for d in own if d not in row]:
                raise mbeir.ElvaDataError(
                    f"{asked.qrels_path(unit, self.split)}: {query.qid} is judged with {lost[0]}, which the {pool} pool lacks; run lint"
                )
            relevant.append([row[d] for d in own])
        q = self.vectors([self.query(query, unit, prompt_index) for query in queries])
        c = self.vectors([candidate_item(self.root, x) for x in candidates])
        k = min(max(self.settings.cutoffs), len(candidates))
        found = search.exact(q, c, k, relevant)
        numbers = [len(rows) for rows in relevant]
        return UnitResult(unit, pool, tuple(queries), found.ranks, found.pessimistic, numbers, found.rows, found.scores, tuple(candidates))


def write_run(result: UnitResult, folder: Path, run_id: str) -> list[Path]:
    """TREC's six columns and UniIR's seven (the last is the task), `qid Q0 did rank score run [task]`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: Mapping[str, list[str]] = {"trec": [], "uniir": []}
    for query, rows, scores in zip(result.queries, result.top, result.scores, strict=True):
        for rank, (row, value) in enumerate(zip(rows, scores, strict=True), start=1):
            line = f"{query.qid} Q0 {result.candidates[row].did} {rank} {value:.6f} {run_id}"
            lines["trec"].append(line)
            lines["uniir"].append(f"{line} {query.task}")
    paths = []
    for form, text in lines.items():
        paths.append(folder / f"{result.unit}_{result.pool}_{form}.txt")
        runtime.write_whole(paths[-1], "\n".join(text) + "\n")
    return paths


def tabulate(rows: Sequence[dict]) -> pd.DataFrame:
    """Long table of results in a stable column order."""
    return pd.DataFrame(rows)[["model", "unit", "pool", "metric", "value", "ci_low", "ci_high", "n"]]
