"""Stage 3: reinforcement learning with verifiable rewards (GRPO) over generated summaries.

Per query G summaries are sampled, each gives an embedding at [RET]; its cosines to the positive and the
negatives are scored by the rules of rewards.py; GRPO raises the probability of the better summaries. The
reference policy is the merged stage-2 model: the adapter of this stage, disabled.

How this departs from textbook GRPO:

* One update per sample: the policy that learns is the one that sampled, so the probability ratio is 1 and
  PPO's clipping (`clip`) never acts; `clip_fraction` is logged and stays 0.
* `gradient`: the reward is computed from an embedding, which depends on the weights too. "score" is GRPO's
  gradient, through the probability of the sampled tokens; "pathwise" that through the embedding after them;
  "full" both (`learn`).
* `loss_type` (grpo, dr_grpo, dapo: how tokens are averaged) and `scale_rewards` (group, batch, none: what
  divides the centred rewards) are named and computed as TRL's.
* The candidates' side: the paper's rollout has a summary of every positive and negative as well
  (`rollout_sides: all`); with `query` they are constants, encoded once per step or as mining encoded them.
  With `both` every other step rolls out the positives instead, each paid by the same rules for its query
  among other queries (hard_negatives.exchanged).
* `resample`: a group without spread of rewards teaches nothing and gives way to another query's (DAPO).
* `gradient: gated` adds InfoNCE of the rollouts whose reward is below their group's mean (after ARR).

    rows = train(encoder, ranked, settings.stage3, seed=17, folder=out)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path

import torch

from elva_core import distributed
from elva_core.data.items import Item
from elva_core.models import generation, vllm_sampler
from elva_core.models.ahead import preparing
from elva_core.models.encoder import Encoder
from elva_core.training import hard_negatives, loop, losses, rewards
from elva_core.training.contrastive import epochs
from elva_core.training.hard_negatives import TrainingQuery
from elva_core.training.rollouts import as_sampled, rolled_out, sides
from elva_core.training_settings import RlvrSettings

FLAT = 1e-6  # standard deviation of rewards below which a group has no spread
COLLAPSE_WINDOW = 20  # steps in a row without any reward spread before the guard calls it a collapse


def step(
    encoder: Encoder,
    ranked: Sequence[TrainingQuery],
    settings: RlvrSettings,
    noise: torch.Tensor,
    sampler: generation.Sampler = generation.in_process,
    spares: Sequence[tuple[Sequence[TrainingQuery], torch.Tensor]] = (),
) -> dict[str, float]:
    """One GRPO step: samples, scores, and leaves the gradient in the adapter's parameters.

    Each process takes its share of the queries; the sum of their gradients is that of the whole step.

    Args:
        noise: (Q, sides, G, T) uniform in [0, 1); decides what is sampled.
        spares: Q queries and their noise per round: each takes the place of the query before it whose rewards
            have no spread. What has none in the end stays.

    Returns:
        what is logged, of the whole step.
    """
    rows, again = distributed.own_share(len(ranked)), 0
    groups = rolled_out(encoder, ranked, rows, noise, settings, sampler)
    for queries, uniform in spares:
        flat = groups.scored.total.std(dim=1) < FLAT
        if not flat.any():
            break
        rows = [row for row, without in zip(groups.rows, flat.tolist(), strict=True) if without]
        fresh = rolled_out(encoder, queries, rows, uniform, settings, sampler)
        groups, again = groups.only(~flat).joined(fresh), again + len(rows)
    acting, sampled, scored = groups.acting, groups.sampled, groups.scored

    # advantages: "batch" divides by the standard deviation over all processes
    spread = None
    if settings.scale_rewards == "batch":
        totals = distributed.exchanged(dict(zip(groups.rows, scored.total, strict=True)))
        spread = torch.stack(list(totals.values())).std()
    gain = losses.advantages(scored.total, settings.scale_rewards, spread)
    # every side of a query shares its advantage
    gain = gain.repeat_interleave(len(acting) // len(groups.rows), dim=0)

    share = len(groups.rows) / len(ranked)
    policy_metrics = learn(encoder, acting, sampled, gain, groups.slope, settings, share=share)
    weighted = {name: value * share for name, value in _step_metrics(encoder, scored, sampled).items()}
    if spares:
        weighted["resampled"] = again / len(ranked)
    return policy_metrics | distributed.summed(weighted)


def learn(
    encoder: Encoder,
    acting: Sequence[Item],
    sampled: Sequence[generation.Rollouts],
    gain: torch.Tensor,
    slope: torch.Tensor,
    settings: RlvrSettings,
    share: float = 1.0,
) -> dict[str, float]:
    """Adds the gradient of one step to the parameters, chunk by chunk: memory does not grow with rollouts.

    The expected reward depends on the weights through the sampled tokens (`score`, all that GRPO uses) and
    through the embedding computed after them (`pathwise`); `full` is both, the gradient of the expected
    reward with ranks held fixed. It is exact, up to the centring by the group's own mean, with scale_rewards
    "none" and loss_type "dr_grpo" times the cap; the paper's standardised advantages only change how the two
    terms are weighted. `gated` is the score with another slope.

    Args:
        acting: R inputs. sampled: their rollouts, in chunks.
        gain: (R, G) advantages. slope: (R, G, D) derivative of the mean reward by each embedding, or of what
            else is raised through them.
        share: of the step's inputs that these R are; the rest is with other processes.

    Returns:
        kl (nats per token), clip_fraction and loss, of the whole step.
    """
    metrics = {"kl": 0.0, "clip_fraction": 0.0, "loss": 0.0}
    if settings.gradient == "pathwise":
        gain = torch.zeros_like(gain)
    # only the token mean over all sequences needs to know the other chunks
    tokens = distributed.summed({"tokens": sum(int(s.actions.sum()) for s in sampled)})["tokens"]
    parts = zip(*(as_sampled(x, sampled) for x in (acting, gain, slope)), sampled, strict=True)
    for part, gains, slopes, out in parts:
        # log-probabilities of the sampled tokens under the reference and, with a graph, under the policy
        with torch.no_grad(), encoder.model.disable_adapter():
            reference, _ = generation.score(encoder, part, out, temperature=settings.temperature)
        log_p, vectors = generation.score(encoder, part, out, temperature=settings.temperature)
        loss, part_metrics = losses.policy_loss(
            *(x.flatten(0, 1) for x in (log_p, out.log_p, reference, out.actions)),
            gains.flatten(),
            clip=settings.clip,
            beta=settings.beta,
            loss_type=settings.loss_type,
            max_length=encoder.settings.max_summary_tokens,
        )
        # the chunk's share of the step's mean; the reward is raised, so its derivative is subtracted
        weight = share * len(part) / len(acting)
        if settings.loss_type == "dapo":
            weight = int(out.actions.sum()) / tokens
        direct = 0.0 if settings.gradient == "score" else (vectors * slopes).sum()
        (loss * weight - direct).backward()
        for name, value in (part_metrics | {"loss": float(loss.detach())}).items():
            metrics[name] += value * weight
    return distributed.summed(metrics)


def _step_metrics(
    encoder: Encoder, scored: rewards.Scored, sampled: Sequence[generation.Rollouts]
) -> dict[str, float]:
    """Step metrics of this process's queries: rewards, ranks, entropy (nats per token), summaries."""
    spread = scored.total.std(dim=1)
    actions = torch.cat([s.actions.flatten(0, 1).sum(1) for s in sampled]).float()
    ended = torch.cat([((s.tokens == encoder.end_id) & s.actions).any(-1).flatten() for s in sampled])
    groups = [{tuple(t) for t in group} for s in sampled for group in s.summaries(encoder.end_id)]
    drift = [(s.engine_log_p - s.log_p).abs().sum() for s in sampled if s.engine_log_p is not None]
    return {
        "reward": float(scored.total.mean()),
        "reward_margin": float(scored.margin.mean()),
        "reward_rank": float(scored.rank.mean()),
        "reward_std": float(spread.mean()),
        "frac_reward_zero_std": float((spread < FLAT).float().mean()),
        "cos_positive": float(scored.cosine.mean()),
        "rank_positive": float(scored.position.float().mean()),
        "rewarded_negatives": float(scored.rewarded_negatives.float().mean()),
        "entropy": float(sum(s.entropy.sum() for s in sampled) / actions.sum()),
        "summary_length": float(actions.mean()),
        "no_natural_end": float(1 - ended.float().mean()),
        "distinct_summaries": sum(map(len, groups)) / (len(groups) * scored.total.shape[1]),
    } | ({"sampler_drift": float(sum(drift) / actions.sum())} if drift else {})


def guard(settings: RlvrSettings) -> Callable[[dict[str, float]], str | None]:
    """Guard of a run: given a row of step metrics, the reason to stop, or None.

    It stops at a reward or a KL that is not finite, a KL above its bound, rewards without any spread for
    COLLAPSE_WINDOW steps, and a sampler that drifts away from the trainer.
    """
    flat = 0

    def check(row: dict[str, float]) -> str | None:
        nonlocal flat
        flat = flat + 1 if row["frac_reward_zero_std"] == 1 else 0
        drift, bound = row.get("sampler_drift", 0.0), settings.vllm.drift_bound
        if not drift <= bound:
            return f"vLLM is {drift:.3f} nats a token from the trainer, above its bound {bound}"
        if row["reward"] != row["reward"]:
            return "reward is not a number"
        if not row["kl"] <= settings.kl_bound:
            return f"KL {row['kl']:.3f} is above its bound {settings.kl_bound}"
        if flat >= COLLAPSE_WINDOW:
            return f"collapse: all rollouts of a query earned the same for {flat} steps"
        return None

    return check


def sampler_of(
    encoder: Encoder, settings: RlvrSettings, folder: Path
) -> AbstractContextManager[generation.Sampler]:
    """Sampler of a run that starts from `encoder`, without an adapter yet; vLLM's files go to `folder`."""
    if settings.sampler == "vllm":
        return closing(vllm_sampler.VllmSampler(encoder, settings.lora, settings.vllm, folder))
    return nullcontext(partial(generation.in_process, decode_rows=settings.decode_rows))


def train(
    encoder: Encoder,
    ranked: Sequence[TrainingQuery],
    settings: RlvrSettings,
    *,
    seed: int,
    folder: Path,
    mine: Callable[[], Sequence[TrainingQuery]] | None = None,
) -> list[dict[str, float]]:
    """One pass over `ranked` with a fresh adapter, merged at the end. Dropout stays off.

    Args:
        mine: gives the same queries with negatives that the model of this moment chooses; called every
            `settings.negatives.again_every` steps, if that is set.

    Returns:
        the step metrics, one row per step.

    Raises:
        ValueError: more processes than queries per step. DivergedError: the guard stopped the run.
    """
    per_step, again = settings.queries_per_step, settings.negatives.again_every
    processes = distributed.processes().num_processes
    if per_step < processes:
        value = f"stage3.queries_per_step = {per_step}"
        raise ValueError(f"{value} is fewer than the {processes} processes; raise it")
    acting = len(sides(ranked[0], settings.rollout_sides))
    shape = (per_step, acting, settings.num_generations, encoder.settings.max_summary_tokens)
    resample, both = settings.resample, settings.rollout_sides == "both"

    def drawn_from(queries: Sequence[TrainingQuery]) -> list:
        """Queries that even and odd steps draw from: those of the step, and those that replace them."""
        turns = [queries, hard_negatives.exchanged(queries, settings.negatives, seed)] if both else [queries]
        return [[epochs(rows, seed, scope) for scope in ("stage3", "stage3 spare")] for rows in turns]

    def uniform(i: int, *scope: int) -> torch.Tensor:
        return torch.rand(shape, generator=distributed.torch_rng(seed, "rollout", i, *scope))

    turns = drawn_from(ranked)

    def reads(i: int) -> tuple[list[Item], str]:
        which = "all" if settings.candidates == "step" else settings.rollout_sides
        drawn = turns[i % len(turns)][0](i, per_step)
        share = [drawn[row] for row in distributed.own_share(len(drawn))]
        return [item for r in share for item in sides(r, which)], encoder.settings.summary_request

    def step_fn(i: int) -> dict[str, float]:
        nonlocal turns
        prepare(i)
        if again and i and i % again == 0:
            turns = drawn_from(mine())
        draw, spare = turns[i % len(turns)]
        spares = [(spare(i * resample + k, per_step), uniform(i, k)) for k in range(resample)]
        with encoder.one_step():  # not around mining, which would keep what the tower makes of a whole pool
            row = step(encoder, draw(i, per_step), settings, uniform(i), sampler, spares)
        distributed.sum_gradients(parameters.values())
        return row | ({"candidates_act": float(i % 2)} if both else {})

    steps = settings.queries // per_step
    with (
        sampler_of(encoder, settings, folder / "vllm") as sampler,
        preparing(encoder, reads, steps) as prepare,
    ):
        encoder.add_lora(settings.lora, seed=seed)
        encoder.model.eval()
        parameters = encoder.trainable()
        rows = loop.train_loop(parameters, step_fn, steps, settings.optimiser, folder, guard(settings))
    encoder.merge_lora()
    return rows
