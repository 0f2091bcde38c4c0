"""Losses and advantages as pure tensor functions; torch only.

Letters: B batch, C candidates, D embedding size, T summary tokens, G rollouts of one query, N negatives of a
query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

ADVANTAGE_EPSILON = 1e-4  # TRL's and UME-R1's; keeps a zero-variance group at advantage 0


def nested(vectors: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    """Prefixes of embeddings (..., D), one (..., dim) per dim, L2-normalised anew; all of them without dims.

    Source: Kusupati et al. 2022, Matryoshka Representation Learning.

    Raises:
        ValueError: a dim exceeds D.

    >>> [part.tolist() for part in nested(torch.tensor([[0.6, 0.0, 0.8]]), [1, 3])]
    [[[1.0]], [[0.6000000238418579, 0.0, 0.800000011920929]]]
    """
    if max(dims, default=0) > vectors.shape[-1]:
        raise ValueError(f"dims = {list(dims)}, but embeddings have {vectors.shape[-1]} numbers; lower them")
    return [torch.nn.functional.normalize(vectors[..., :dim], dim=-1) for dim in dims] or [vectors]


def infonce(
    queries: torch.Tensor, candidates: torch.Tensor, *, temperature: float, ignore: torch.Tensor | None = None
) -> torch.Tensor:
    """InfoNCE from query to candidates, cosine / temperature, mean over the batch (ELVA stages 1 and 2).

    Args:
        queries: (B, D) float32, L2-normalised.
        candidates: (C, D) float32, L2-normalised, C >= B; row i is the positive of query i, the rest are
            negatives.
        temperature: > 0, divides the cosine; sentence-transformers' scale is its inverse.
        ignore: (B, C) bool, pairs to leave out (false negatives); the positive itself must stay.

    Embeddings that are all zero give log C:

    >>> round(infonce(torch.zeros(4, 2), torch.zeros(4, 2), temperature=0.05).item(), 4)
    1.3863
    """
    scores = queries @ candidates.T / temperature
    if ignore is not None:
        scores = scores.masked_fill(ignore, float("-inf"))
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(queries), device=scores.device))


def false_negatives(positives: Sequence[Sequence[str]], candidates: Sequence[str]) -> torch.Tensor:
    """(B, C) bool: candidate j is a judged positive of query i, but not the one in its own slot i.

    >>> false_negatives([["a", "b"], ["b"]], ["a", "b"])
    tensor([[False,  True],
            [False, False]])
    """
    relevant = [set(p) for p in positives]
    return torch.tensor(
        [[i != j and did in dids for j, did in enumerate(candidates)] for i, dids in enumerate(relevant)]
    )


def overlap(queries: Sequence[frozenset], candidates: Sequence[frozenset]) -> torch.Tensor:
    """(B, C) share of grains that query and candidate have in common, of all that either has; 0 without any.

    >>> overlap([frozenset("ab")], [frozenset("ab"), frozenset("ac"), frozenset()])
    tensor([[1.0000, 0.3333, 0.0000]])
    """
    return torch.tensor([[len(q & c) / max(1, len(q | c)) for c in candidates] for q in queries])


def graded(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    overlap: torch.Tensor,
    *,
    temperature: float,
    grain_temperature: float,
) -> torch.Tensor:
    """Listwise divergence KL(t || p): t the softmax of overlaps, p that of cosines; mean, in nats.

    Ranking by degree without reinforcement learning: negatives differ, as their overlap does. It sees the
    grains, so it is a bound for what sees judgements alone.

    Args:
        queries: (B, D), candidates: (C, D) float32, L2-normalised. overlap: (B, C).
        temperature, grain_temperature: divide the cosines and the overlaps.
    """
    log_p = torch.log_softmax(queries @ candidates.T / temperature, dim=1)
    target = torch.log_softmax(overlap / grain_temperature, dim=1)
    return torch.nn.functional.kl_div(log_p, target, reduction="batchmean", log_target=True)


def distillation(
    student: torch.Tensor, teacher: torch.Tensor, bank: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distillation loss of embeddings: distance to the teacher's, and divergence of similarities to a bank.

    Args:
        student, teacher: (B, D) float32, L2-normalised; row i of both is of the same item.
        bank: (N, D) teacher embeddings that both are compared with; the item's own may be among them.
        temperature: divides the cosines before the softmax over the bank.

    Returns:
        1 - cosine (B,), and KL(teacher || student) of the softmax over the bank (B,), in nats.

    Source: the divergence is SEED's (Fang et al. 2021), with all of a fixed sample for its queue.

    >>> x = torch.eye(3)
    >>> [part.abs().max().item() for part in distillation(x, x, x, temperature=0.05)]
    [0.0, 0.0]
    """
    log_t, log_s = (torch.log_softmax(x @ bank.T / temperature, dim=-1) for x in (teacher, student))
    return 1 - (student * teacher).sum(-1), (log_t.exp() * (log_t - log_s)).sum(-1)


def backward_in_chunks(
    embed: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    chunks: Sequence[int],
    loss_fn: Callable[[torch.Tensor], torch.Tensor],
    *,
    cache: bool,
    exchange: Callable[[dict[int, torch.Tensor]], dict[int, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Gradient cache: backward of loss_fn(all embeddings) + the chunks' own losses, chunk by chunk.

    With `cache` only one chunk's graph is in memory at a time: the embeddings are computed once without a
    graph, the loss gives their gradient, each chunk is computed again with a graph and receives its slice of
    it. Equal to the plain way as long as `embed` gives the same twice (seed dropout per chunk).

    Args:
        embed: number of a chunk -> ((rows, D) embeddings, scalar loss of the chunk alone), with gradient.
        chunks: the numbers that are computed here; without `exchange` they are all there are.
        loss_fn: (all rows, D) -> scalar.
        exchange: embeddings of the chunks computed here -> those of all processes. The gradients of all
            processes then add up to that of the whole. Needs `cache`.

    Returns:
        the value of loss_fn, detached. Gradients are added to the parameters behind `embed`.

    Source: Gao et al. 2021, GradCache.
    """
    if not cache:
        parts = [embed(i) for i in chunks]
        loss = loss_fn(torch.cat([vectors for vectors, _ in parts]))
        (loss + sum(chunk_loss for _, chunk_loss in parts)).backward()
        return loss.detach()

    # all embeddings, without a graph
    with torch.no_grad():
        vectors = {i: embed(i)[0] for i in chunks}
    vectors = dict(sorted((exchange(vectors) if exchange else vectors).items()))

    # the gradient of the loss by each of them
    leaf = torch.cat(list(vectors.values())).requires_grad_(True)
    loss = loss_fn(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    sizes = [len(part) for part in vectors.values()]
    slopes = dict(zip(vectors, gradient.split(sizes), strict=True))

    # each chunk again with a graph, which passes its slice on to the parameters
    for i in chunks:
        part, chunk_loss = embed(i)
        ((part * slopes[i]).sum() + chunk_loss).backward()
    return loss.detach()


def advantages(
    rewards: torch.Tensor, scale: str = "group", spread: torch.Tensor | None = None
) -> torch.Tensor:
    """Advantages of GRPO: rewards minus the mean of their group, divided by a spread.

    Args:
        rewards: (Q, G), one row per query.
        scale: "group" divides by the group's standard deviation (GRPO), "batch" by that of all, "none" by 1.
        spread: with "batch", the standard deviation of all rewards of a step of which these are only a part.

    A group whose rewards are all equal gets advantage 0, never NaN.

    >>> advantages(torch.tensor([[1.0, 1.0], [0.0, 2.0]]), "none")
    tensor([[ 0.,  0.],
            [-1.,  1.]])
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "none":
        return centred
    if scale == "group":
        spread = rewards.std(dim=1, keepdim=True)
    elif spread is None:
        spread = rewards.std()
    return centred / (spread + ADVANTAGE_EPSILON)


def k3(log_p: torch.Tensor, log_reference: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimator of KL(p || reference) per token: e^d - d - 1, d = log_reference - log_p; >= 0.

    Args:
        log_p, log_reference: (...) log-probabilities of the same tokens under the policy and the reference.
    """
    difference = log_reference - log_p
    return difference.exp() - difference - 1


def policy_loss(
    log_p: torch.Tensor,
    log_old: torch.Tensor,
    log_reference: torch.Tensor,
    mask: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip: float,
    beta: float,
    loss_type: str,
    max_length: int,
) -> tuple[torch.Tensor, dict[str, float]]:
    """GRPO: clipped surrogate plus KL, aggregated over tokens (ELVA stage 3).

    Args:
        log_p, log_old, log_reference: (B, T) log-probabilities of the sampled tokens under the policy, the
            policy that sampled them, and the reference.
        mask: (B, T), 1 where a token was an action of the policy.
        advantage: (B,).
        clip: the ratio is clipped to [1 - clip, 1 + clip]; never where the policy is the one that sampled.
        loss_type: "grpo" mean over tokens then over sequences (the paper), "dr_grpo" sum over tokens divided
            by B * max_length, "dapo" mean over all tokens.

    Returns:
        (loss, {"kl", "clip_fraction"}).
    """
    mask = mask.to(log_p.dtype)
    ratio = (log_p - log_old).exp()
    gain = advantage[:, None]
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    divergence = k3(log_p, log_reference)
    per_token = (beta * divergence - surrogate) * mask
    if loss_type == "grpo":
        loss = (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()
    elif loss_type == "dr_grpo":
        loss = per_token.sum() / (len(mask) * max_length)
    elif loss_type == "dapo":
        loss = per_token.sum() / mask.sum().clamp(min=1)
    else:
        raise ValueError(f"loss_type {loss_type!r} is none of grpo, dr_grpo, dapo")
    with torch.no_grad():
        clipped = ((ratio < 1 - clip) & (gain < 0)) | ((ratio > 1 + clip) & (gain > 0))
        tokens = mask.sum().clamp(min=1)
        kl, clip_fraction = ((per * mask).sum() / tokens for per in (divergence, clipped))
    return loss, {"kl": float(kl), "clip_fraction": float(clip_fraction)}
