"""Reranker of a retriever's first answers: a model that reads a query together with its candidates.

In the manner of LamRA-Rank (arXiv 2412.01720), with an adapter of its own:

* pointwise: one candidate, the answer is Yes or No; its score is the log-odds of Yes, whose order is that of
  P(Yes).
* listwise: several candidates, the answer is the number of the right one; the score is the log-probability of
  the number.

    rows = train(encoder, ranked, settings.rerank, seed=17, folder=out)
    scores = score(encoder, asked, "listwise", settings.rerank, batch=256)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from elva_core import distributed
from elva_core.data import mbeir
from elva_core.data.items import Item
from elva_core.models.ahead import preparing
from elva_core.models.encoder import Encoder
from elva_core.training import loop
from elva_core.training.contrastive import epochs
from elva_core.training.hard_negatives import TrainingQuery
from elva_core.training_settings import RerankSettings

Kind = Literal["pointwise", "listwise"]
KINDS: tuple[Kind, ...] = ("pointwise", "listwise")
YES_NO = ("Yes", "No")


class Asked(NamedTuple):
    """A query with the candidates that a retriever found for it, best first."""

    qid: str
    query: Item
    dids: tuple[str, ...]
    candidates: tuple[Item, ...]


class Prompt(NamedTuple):
    """A question to the reranker.

    item: query and candidates. offered: how many of `answers`, from the first, it can have. answer: place of
    the right one.
    """

    item: Item
    offered: int
    answer: int = 0


def prompt(query: Item, candidates: Sequence[Item], kind: Kind, answer: int = 0) -> Prompt:
    """Query and candidates in one turn; pointwise shows the only candidate, listwise numbers them from 1."""
    labels = (
        ["\nCandidate: "] if kind == "pointwise" else [f"\n({n}) " for n in range(1, len(candidates) + 1)]
    )
    parts = ["Query: ", *(part for part in query.parts if part)]
    for label, candidate in zip(labels, candidates, strict=True):
        parts += [label, *(part for part in candidate.parts if part)]
    more, text = (parts[:-1], parts[-1]) if isinstance(parts[-1], str) else (parts, "")
    return Prompt(Item(text, None, tuple(more)), 2 if kind == "pointwise" else len(candidates), answer)


def request(kind: Kind, settings: RerankSettings) -> str:
    """The request that stands behind query and candidates."""
    return settings.pointwise_request if kind == "pointwise" else settings.listwise_request


def answer_ids(encoder: Encoder, kind: Kind, settings: RerankSettings) -> torch.Tensor:
    """First token of each answer, (A,).

    Raises:
        ValueError: two answers begin with the same token, so that the next token does not tell them apart.
    """
    words = YES_NO if kind == "pointwise" else tuple(map(str, range(1, settings.window + 1)))
    tokenizer = encoder.processor.tokenizer
    first = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]
    for place, token in enumerate(first):
        if (before := first.index(token)) < place:
            shared = tokenizer.convert_ids_to_tokens(token)
            raise ValueError(
                f"{words[before]!r} and {words[place]!r} both begin with {shared!r} in the vocabulary of "
                f"{encoder.source or 'this model'}: the next token cannot tell them apart; "
                f"lower rerank.window to {place}"
            )
    return torch.tensor(first, device=encoder.device)


def log_p(
    encoder: Encoder, prompts: Sequence[Prompt], kind: Kind, settings: RerankSettings, ids: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities (B, A) in nats of the answers that each prompt offers, else -inf; with gradient."""
    states = encoder.states(encoder.batch([p.item for p in prompts], request(kind, settings)))
    logits = encoder.logits(states[:, -1])[:, ids]
    offered = torch.tensor([p.offered for p in prompts], device=logits.device)
    absent = torch.arange(len(ids), device=logits.device) >= offered[:, None]
    return logits.masked_fill(absent, float("-inf")).log_softmax(-1)


def alike(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Rows in chunks of like length: less padding."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].item.images), prompts[i].item.length))
    return [order[start : start + size] for start in range(0, len(order), size)]


def windows(asked: Asked, size: int) -> list[list[int]]:
    """Candidates that are shown together, in the order of a stable hash, so that a place says nothing.

    Where they do not all fit, each window has the first candidate too: what its probability is to that of the
    others can be compared across windows, if adding a candidate takes from all others in proportion (Luce's
    choice axiom).

    >>> item = Item("a")
    >>> [sorted(w) for w in windows(Asked("1", item, tuple("abcd"), (item,) * 4), 4)]
    [[0, 1, 2, 3]]
    >>> [len(w) for w in windows(Asked("1", item, tuple("abcdefg"), (item,) * 7), 4)]
    [4, 4]
    """
    hashes = [mbeir.stable_hash("rerank", asked.qid, did) for did in asked.dids]
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    if len(order) <= size:
        return [order]
    others = [i for i in order if i]
    parts = -(-len(others) // (size - 1))
    members = [{0, *others[part::parts]} for part in range(parts)]
    return [[i for i in order if i in window] for window in members]


@torch.no_grad()
def score(
    encoder: Encoder, asked: Sequence[Asked], kind: Kind, settings: RerankSettings, *, batch: int
) -> list[np.ndarray]:
    """Scores of each query's candidates, (candidates,) float64: log-odds in nats, up to a constant.

    Args:
        batch: prompts per forward; of several processes each takes its share.
    """
    # prompts of all queries, in chunks of like length
    rows: list[tuple[int, list[int]]] = []  # number of a query, places of the candidates in the prompt
    for number, query in enumerate(asked):
        single = [[i] for i in range(len(query.candidates))]
        shown = single if kind == "pointwise" else windows(query, settings.window)
        rows += [(number, window) for window in shown]
    prompts = [prompt(asked[n].query, [asked[n].candidates[i] for i in window], kind) for n, window in rows]
    parts = alike(prompts, batch)

    # this process's share of them, then those of all
    ids, answered, mine = answer_ids(encoder, kind, settings), {}, distributed.own_share(len(parts))

    def reads(turn: int) -> tuple[list[Item], str]:
        return [prompts[i].item for i in parts[mine[turn]]], request(kind, settings)

    with preparing(encoder, reads, len(mine)) as prepare:
        for turn, part in enumerate(mine):
            prepare(turn)
            values = log_p(encoder, [prompts[i] for i in parts[part]], kind, settings, ids)
            answered[part] = values.double().cpu().numpy()
    scores = [np.zeros(len(query.candidates)) for query in asked]
    for part, batch_values in distributed.gathered(answered).items():
        for i, values in zip(parts[part], batch_values, strict=True):
            number, window = rows[i]
            if kind == "pointwise":
                scores[number][window] = values[0] - values[1]
            else:
                scores[number][window] = values[: len(window)] - values[window.index(0)]
    return scores


def exercise(
    ranked: TrainingQuery, kind: Kind, settings: RerankSettings, rng: np.random.Generator
) -> list[Prompt]:
    """Prompts that a query is trained on.

    Pointwise its positive and some of its hard negatives one by one, listwise the positive at a random place
    among some of them.
    """
    hard = ranked.negatives[: settings.hard]
    count = settings.negatives if kind == "pointwise" else int(rng.integers(1, settings.window))
    others = [hard[i] for i in rng.permutation(len(hard))[:count]]
    if kind == "pointwise":
        yes, no = range(2)  # places in YES_NO
        negatives = [prompt(ranked.item, [negative], kind, no) for negative in others]
        return [prompt(ranked.item, [ranked.positive], kind, yes), *negatives]
    place = int(rng.integers(len(others) + 1))
    return [prompt(ranked.item, [*others[:place], ranked.positive, *others[place:]], kind, place)]


def train(
    encoder: Encoder, ranked: Sequence[TrainingQuery], settings: RerankSettings, *, seed: int, folder: Path
) -> list[dict[str, float]]:
    """Trains a fresh adapter by cross-entropy on the answers, pointwise and listwise in turn, and merges it.

    Args:
        ranked: queries with their negatives, hardest first, as the retriever mined them.

    Returns:
        one row per step: loss, accuracy, listwise (1 or 0), grad_norm, step_time.
    """
    ids = {kind: answer_ids(encoder, kind, settings) for kind in KINDS}
    draws = {kind: epochs(ranked, seed, f"rerank {kind}") for kind in KINDS}

    def drawn(step: int) -> tuple[Kind, list[Prompt], list[list[int]]]:
        turn, listwise = divmod(step, 2)
        kind, rng = KINDS[listwise], distributed.rng_for(seed, "rerank", step)
        prompts = [p for r in draws[kind](turn, settings.batch) for p in exercise(r, kind, settings, rng)]
        return kind, prompts, alike(prompts, settings.chunk)

    def reads(step: int) -> tuple[list[Item], str]:
        kind, prompts, parts = drawn(step)
        computed = [prompts[i].item for part in distributed.own_share(len(parts)) for i in parts[part]]
        return computed, request(kind, settings)

    @encoder.one_step()
    def step_fn(step: int) -> dict[str, float]:
        prepare(step)
        (kind, prompts, parts), metrics = drawn(step), {"loss": 0.0, "accuracy": 0.0}
        for part in distributed.own_share(len(parts)):
            # the same dropout on any number of processes
            torch.manual_seed(mbeir.stable_hash(seed, step, part))
            chunk = [prompts[i] for i in parts[part]]
            predicted = log_p(encoder, chunk, kind, settings, ids[kind])
            target = torch.tensor([p.answer for p in chunk], device=encoder.device)
            loss = torch.nn.functional.nll_loss(predicted, target, reduction="sum") / len(prompts)
            loss.backward()
            metrics["loss"] += float(loss.detach())
            metrics["accuracy"] += float((predicted.argmax(1) == target).sum()) / len(prompts)
        distributed.sum_gradients(parameters.values())
        return distributed.summed(metrics) | {"listwise": float(kind == "listwise")}

    with (
        encoder.adapting(settings, seed=seed) as parameters,
        preparing(encoder, reads, settings.steps) as prepare,
    ):
        return loop.train_loop(parameters, step_fn, settings.steps, settings.optimiser, folder)
