"""A second look at the first answers: the same class of model reads a query together with its candidates.

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
from elva_core.config import RerankSettings
from elva_core.data import mbeir
from elva_core.data.items import Item
from elva_core.models.encoder import Encoder
from elva_core.training import loop
from elva_core.training.contrastive import epochs
from elva_core.training.hard_negatives import Ranked

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
    """item: query and candidates. offered: the first answers, in the order of `answers`, that it can have. answer: the right one."""

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


def answers(kind: Kind, settings: RerankSettings) -> tuple[str, ...]:
    """What the model can answer."""
    return YES_NO if kind == "pointwise" else tuple(map(str, range(1, settings.window + 1)))


def answer_ids(encoder: Encoder, kind: Kind, settings: RerankSettings) -> torch.Tensor:
    """First token of each answer, (A,).

    Raises:
        ValueError: two answers begin with the same token, so that the next token does not tell them apart.
    """
    words, tokenizer = answers(kind, settings), encoder.processor.tokenizer
    first = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]
    for place, token in enumerate(first):
        if (before := first.index(token)) < place:
            raise ValueError(
                f"{words[before]!r} and {words[place]!r} both begin with {tokenizer.convert_ids_to_tokens(token)!r} in the vocabulary "
                f"of {encoder.source or 'this model'}: the next token cannot tell them apart; lower rerank.window to {place}"
            )
    return torch.tensor(first, device=encoder.device)


def log_p(
    encoder: Encoder, prompts: Sequence[Prompt], kind: Kind, settings: RerankSettings, ids: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities (B, A) of the answers among those that each prompt offers; -inf for the others. With gradient."""
    request = settings.pointwise_request if kind == "pointwise" else settings.listwise_request
    states = encoder.states(encoder.batch([p.item for p in prompts], request))
    logits = encoder.logits(states[:, -1])[:, ids]
    offered = torch.tensor([p.offered for p in prompts], device=logits.device)
    return logits.masked_fill(
        torch.arange(len(ids), device=logits.device) >= offered[:, None], float("-inf")
    ).log_softmax(-1)


def alike(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Rows in chunks of like length: less padding."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].item.images), prompts[i].item.length))
    return [order[start : start + size] for start in range(0, len(order), size)]


def windows(asked: Asked, size: int) -> list[list[int]]:
    """Which candidates are shown together, and in which order: that of a stable hash, so that a place says nothing.

    Where they do not all fit, each window has the first candidate too: what its probability is to that of the
    others can be compared across windows, if adding a candidate takes from all others in proportion (Luce's
    choice axiom).

    >>> item = Item("a")
    >>> [sorted(w) for w in windows(Asked("1", item, tuple("abcd"), (item,) * 4), 4)]
    [[0, 1, 2, 3]]
    >>> [len(w) for w in windows(Asked("1", item, tuple("abcdefg"), (item,) * 7), 4)]
    [4, 4]
    """
    order = sorted(
        range(len(asked.dids)), key=lambda i: mbeir.stable_hash("rerank", asked.qid, asked.dids[i])
    )
    if len(order) <= size:
        return [order]
    others = [i for i in order if i]
    parts = -(-len(others) // (size - 1))
    shared = [{0, *others[part::parts]} for part in range(parts)]
    return [[i for i in order if i in own] for own in shared]


@torch.no_grad()
def score(
    encoder: Encoder, asked: Sequence[Asked], kind: Kind, settings: RerankSettings, *, batch: int
) -> list[np.ndarray]:
    """What the model thinks of each query's candidates, (candidates,) float64 in nats: log-odds of being the answer, up to a constant.

    Args:
        batch: prompts per forward; of several processes each takes its share.
    """
    shown = [
        [[i] for i in range(len(a.candidates))] if kind == "pointwise" else windows(a, settings.window)
        for a in asked
    ]
    rows = [(number, window) for number, of in enumerate(shown) for window in of]
    prompts = [
        prompt(asked[number].query, [asked[number].candidates[i] for i in window], kind)
        for number, window in rows
    ]
    ids, parts, done = answer_ids(encoder, kind, settings), alike(prompts, batch), {}
    for part in distributed.own_share(len(parts)):
        done[part] = (
            log_p(encoder, [prompts[i] for i in parts[part]], kind, settings, ids).double().cpu().numpy()
        )
    scores = [np.zeros(len(a.candidates)) for a in asked]
    for part, found in distributed.gathered(done).items():
        for i, values in zip(parts[part], found, strict=True):
            number, window = rows[i]
            scores[number][window] = (
                values[0] - values[1]
                if kind == "pointwise"
                else values[: len(window)] - values[window.index(0)]
            )
    return scores


def exercise(ranked: Ranked, kind: Kind, settings: RerankSettings, rng: np.random.Generator) -> list[Prompt]:
    """What is trained on a query: its positive and some of its hard negatives one by one, or the positive at a random place among some."""
    hard = ranked.negatives[: settings.hard]
    wanted = settings.negatives if kind == "pointwise" else int(rng.integers(1, settings.window))
    others = [hard[i] for i in rng.permutation(len(hard))[:wanted]]
    if kind == "pointwise":
        return [
            prompt(ranked.item, [c], kind, answer)
            for c, answer in ((ranked.positive, 0), *((n, 1) for n in others))
        ]
    place = int(rng.integers(len(others) + 1))
    return [prompt(ranked.item, [*others[:place], ranked.positive, *others[place:]], kind, place)]


def train(
    encoder: Encoder, ranked: Sequence[Ranked], settings: RerankSettings, *, seed: int, folder: Path
) -> list[dict[str, float]]:
    """Trains a fresh adapter by cross-entropy on the answers, pointwise and listwise in turn, and merges it.

    Args:
        ranked: queries with their negatives, hardest first, as the retriever mined them.

    Returns:
        one row per step: loss, accuracy, listwise (1 or 0), grad_norm, step_time.
    """
    ids = {kind: answer_ids(encoder, kind, settings) for kind in KINDS}
    draws = {kind: epochs(ranked, seed, f"rerank {kind}") for kind in KINDS}

    def step_fn(step: int) -> dict[str, float]:
        turn, listwise = divmod(step, 2)
        kind, rng = KINDS[listwise], distributed.rng_for(seed, "rerank", step)
        prompts = [p for r in draws[kind](turn, settings.batch) for p in exercise(r, kind, settings, rng)]
        parts, facts = alike(prompts, settings.chunk), {"loss": 0.0, "accuracy": 0.0}
        for part in distributed.own_share(len(parts)):
            torch.manual_seed(
                mbeir.stable_hash(seed, step, part)
            )  # the same dropout on any number of processes
            own = [prompts[i] for i in parts[part]]
            found, wanted = (
                log_p(encoder, own, kind, settings, ids[kind]),
                torch.tensor([p.answer for p in own], device=encoder.device),
            )
            loss = torch.nn.functional.nll_loss(found, wanted, reduction="sum") / len(prompts)
            loss.backward()
            facts["loss"] += float(loss.detach())
            facts["accuracy"] += float((found.argmax(1) == wanted).sum()) / len(prompts)
        distributed.sum_gradients(parameters.values())
        return distributed.summed(facts) | {"listwise": float(listwise)}

    with encoder.adapting(
        settings.lora, seed=seed, checkpointing=settings.gradient_checkpointing
    ) as parameters:
        return loop.optimise(parameters, step_fn, settings.steps, settings.optimiser, folder)
