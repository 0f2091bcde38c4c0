"""Stage 3: what a step does, the guard, resuming, and the choice of negatives."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import exit_codes, mined
from elva_core import distributed
from elva_core.models import decoding, encoder, generation
from elva_core.training import contrastive, grpo, loop, rewards, rollouts
from elva_core.training_settings import NegativeSettings, RlvrSettings

STEP = 5e-3  # of finite differences, in the units of the weights
ONE = NegativeSettings(hard=1, random=0, threshold=2.0)


def stage3(smoke, **changes):
    return smoke.changed({"stage3": {"queries": 8, "queries_per_step": 4, "num_generations": 3} | changes}).stage3


def noise(encoder, ranked, settings, seed=0):
    sides = len(grpo.sides(ranked[0], settings.rollout_sides))
    shape = (len(ranked), sides, settings.num_generations, encoder.settings.max_summary_tokens)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sides", ["query", "all"])
def test_a_step_leaves_gradients_and_logs_every_line(tiny, ranked, smoke, sides):
    settings = stage3(smoke, rollout_sides=sides)
    tiny.add_lora(settings.lora, seed=0)
    row = grpo.step(tiny, ranked[:2], settings, noise(tiny, ranked[:2], settings))
    rewards_logged = {"reward", "reward_margin", "reward_rank", "reward_std", "frac_reward_zero_std", "cos_positive"}
    policy_logged = {"kl", "entropy", "clip_fraction", "summary_length", "no_natural_end", "distinct_summaries"}
    assert rewards_logged | policy_logged <= set(row)
    assert all(np.isfinite(v) for v in row.values())
    assert row["kl"] == pytest.approx(0, abs=1e-6)  # a fresh adapter is the reference
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in tiny.trainable().items() if "lora_B" in n)


@pytest.mark.parametrize("sides", ["query", "both", "all"])
def test_a_rollout_is_paid_for_its_own_candidates(tiny, ranked, smoke, sides):
    """Every rollout's reward from the definition, one vector at a time."""
    settings, asked = stage3(smoke, rollout_sides=sides, candidates="mined"), ranked[:2]
    shape = (2, len(grpo.sides(asked[0], sides)), 3, asked[0].vectors.shape[1])
    v = torch.nn.functional.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), dim=-1)
    (sides_of,) = rollouts.cosines(tiny, asked, v, settings)
    total = rewards.reward(*sides_of, settings.reward).total

    def by_definition(query, positive, negatives):
        s_p, s_n, r = query @ positive, negatives @ query, settings.reward
        margin = rewards.margin_reward(s_p, s_n, delta=r.delta)
        return 0.4 * margin + 0.6 * rewards.rank_reward(s_p, s_n, gamma=r.gamma, form=r.form, reduction=r.penalty_reduction)

    mined = [torch.from_numpy(r.vectors) for r in asked]
    for q in range(2):
        for i in range(3):
            wanted = by_definition(v[q, 0, i], mined[q][0], mined[q][1:])
            if sides == "all":
                wanted = by_definition(v[q, 0, i], v[q, 1, i], v[q, 2:, i])
            torch.testing.assert_close(total[q, i], wanted, atol=1e-6, rtol=0)


@pytest.fixture
def climb(model_folder, smoke, ranked, tmp_path, monkeypatch):
    """`climb(seed, sign)`: how far the mean reward rises in a run whose advantages are multiplied by `sign`.

    Two queries, nine summaries of two words. A frozen copy of the model reads the summaries, so that the reward is a function of the
    sampled words alone: one of them is the positive, the others are the negatives. A reward rises only if the policy learns to write it.
    With "both" sides it is that of the candidates' steps, which have a toy of the same kind; `run.acted` are the items of each step.
    """
    prompts = smoke.encoder.model_copy(update={"max_summary_tokens": 2})
    reader = encoder.load(model_folder, prompts)
    words = torch.tensor(reader.processor.tokenizer("Katze Hund")["input_ids"][:3])
    every = torch.cartesian_prod(words, words)[None]

    def toy(row, item, positive):
        vectors = generation.completed(reader, [item], every, torch.ones_like(every, dtype=torch.bool)).embeddings[0].numpy()
        others = (*range(positive), *range(positive + 1, 9))
        return dataclasses.replace(row, item=item, near=vectors[positive], bank=vectors, rows=others)

    queries = [toy(row, row.item, positive) for row, positive in zip(ranked[:2], (4, 7), strict=True)]
    turned = [toy(row, row.positive, positive) for row, positive in zip(ranked[:2], (2, 5), strict=True)]
    monkeypatch.setattr(grpo.hard_negatives, "exchanged", lambda *_: turned)

    def read_by_the_frozen_copy(model, parts, noises, temperature):
        sampled = generation.in_process(model, parts, noises, temperature)
        run.acted.append({item for part in parts for item in part})
        for part, out in zip(parts, sampled, strict=True):
            out.embeddings = generation.completed(reader, part, out.tokens, out.actions).embeddings
        return sampled

    monkeypatch.setattr(grpo, "sampler_of", lambda *_: nullcontext(read_by_the_frozen_copy))
    advantages = grpo.losses.advantages
    toy = {"queries": 100, "queries_per_step": 2, "num_generations": 16, "chunk": 32, "beta": 0.0, "candidates": "mined"}
    settings = stage3(smoke, **toy, optimiser={"lr": 0.002, "checkpoint_every": 99})

    def run(seed, sign, rollout_sides="query"):
        monkeypatch.setattr(grpo.losses, "advantages", lambda *given: sign * advantages(*given))
        model = encoder.load(model_folder, prompts)
        model.banned_ids = torch.tensor(sorted(set(range(model.vocabulary_rows)) - set(words.tolist())))
        changed = settings.model_copy(update={"rollout_sides": rollout_sides, "queries": 200 if rollout_sides == "both" else 100})
        rows = grpo.train(model, queries, changed, seed=seed, folder=tmp_path / f"{seed} {sign}")
        earned = [row["reward"] for row in rows if row.get("candidates_act", 1)]
        return np.mean(earned[-10:]) - np.mean(earned[:3])

    run.acted = []
    return run


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stage_3_raises_the_reward(climb, seed):
    assert climb(seed, 1) > 0.06


@pytest.mark.parametrize("sign", [0, 1])
def test_in_turns_the_candidates_steps_raise_their_reward_by_their_advantages_alone(climb, ranked, sign):
    assert (climb(0, sign, "both") > 0.06) == bool(sign)
    sides = [{r.item for r in ranked[:2]}, {r.positive for r in ranked[:2]}]
    assert climb.acted == sides * 50


@pytest.mark.parametrize("sign", [0, -1])
def test_without_its_advantages_or_against_them_the_reward_does_not_rise(climb, sign):
    assert climb(0, sign) < 0.03


def test_mined_vectors_are_those_that_a_forward_gives(tiny, ranked):
    stored = torch.stack([torch.from_numpy(r.vectors) for r in ranked])
    for known, fresh in zip((stored[:, 0], stored[:, 1:]), rollouts.candidates_once(tiny, ranked, 3), strict=True):
        torch.testing.assert_close(known, fresh, atol=1e-5, rtol=0)


def test_chunks_do_not_change_the_gradient(model_folder, smoke, ranked, monkeypatch):
    """Gains are given: dividing by the tiny spread of an untrained model's rewards would blow up rounding."""
    monkeypatch.setattr(grpo.losses, "advantages", lambda r, *_: torch.arange(r.numel()).float().view_as(r) - 2)
    for loss_type in ("grpo", "dr_grpo", "dapo"):
        gradients = []
        for chunk in (2, 6, 8):
            model = encoder.load(model_folder, smoke.encoder)
            settings = stage3(smoke, chunk=chunk, num_generations=2, loss_type=loss_type)
            model.add_lora(settings.lora, seed=0)
            grpo.step(model, ranked[:4], settings, noise(model, ranked[:4], settings))
            gradients.append(torch.cat([p.grad.flatten() for p in model.trainable().values() if p.grad is not None]))
        assert gradients[0].abs().max() > 0
        for other in gradients[1:]:
            assert (gradients[0] - other).abs().max() < 1e-5 * gradients[0].abs().max().clamp(min=1)


def test_only_the_full_gradient_is_that_of_the_enumerated_expected_reward(model_folder, smoke, ranked, monkeypatch):
    """Two tokens, cap 2, no end of turn: four summaries, whose expected reward can be written out and differentiated by steps."""
    model = encoder.load(model_folder, smoke.encoder.model_copy(update={"max_summary_tokens": 2}))
    pair = model.processor.tokenizer("Katze Hund")["input_ids"][:2]
    model.banned_ids = torch.tensor(sorted(set(range(model.vocabulary_rows)) - set(pair)))
    settings = stage3(smoke, beta=0.0, loss_type="dr_grpo", scale_rewards="none", chunk=1)
    model.add_lora(settings.lora, seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.trainable().values():  # far enough from the start for summaries to matter
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    asked = ranked[:2]
    items = [r.item for r in asked]
    words = torch.cartesian_prod(torch.tensor(pair), torch.tensor(pair)).expand(len(asked), 4, 2)
    drawn = generation.Rollouts(words, torch.ones_like(words, dtype=torch.bool), None, None, None)

    with torch.no_grad():  # the first summary hits its positive, the others a negative: ranks differ, slopes are small
        wanted = generation.score(model, items, drawn)[1]
    found_ranks = rewards.ranks((wanted * wanted[:, :1]).sum(-1), wanted @ wanted[:, 1:].mT)
    monkeypatch.setattr(rewards, "ranks", lambda *cosines: found_ranks)  # the gradient holds them fixed, so the steps do too

    def expectation():
        log_p, vectors = generation.score(model, items, drawn)
        cosines = (vectors * wanted[:, :1]).sum(-1), vectors @ wanted[:, 1:].mT
        return log_p, vectors, log_p.sum(-1).exp(), rewards.reward(*cosines, settings.reward).total

    log_p, vectors, chance, earned = expectation()
    assert torch.allclose(chance.sum(1), torch.ones(len(asked)), atol=1e-5)
    # every summary stands once, so its chance goes into its advantage; "dr_grpo" divides by 4 rollouts times the cap of 2
    gain = (chance * (earned - (chance * earned).sum(1, keepdim=True)) * 4 * 2).detach()
    (slope,) = torch.autograd.grad((chance.detach() * earned).sum(1).mean(), vectors)
    one_by_one = [generation.Rollouts(words[[i]], drawn.actions[[i]], log_p[[i]].detach(), None, None) for i in range(len(asked))]
    ways, found = ("score", "pathwise", "full"), {}
    for gradient in ways:
        model.model.zero_grad()
        grpo.learn(model, items, one_by_one, gain, slope, settings.model_copy(update={"gradient": gradient}))
        found[gradient] = {n: -p.grad for n, p in model.trainable().items() if p.grad is not None}
    parameters = model.trainable()
    for way in ("score", "pathwise"):  # along the direction in which this part is largest
        size = torch.stack([g.norm() for g in found[way].values()]).norm()
        direction = {n: g / size for n, g in found[way].items()}
        values = []
        with torch.no_grad():
            for signed in (STEP, -STEP):
                for n, d in direction.items():
                    parameters[n] += signed * d
                _, _, chance, earned = expectation()
                values.append((chance.double() * earned.double()).sum(1).mean().item())
                for n, d in direction.items():
                    parameters[n] -= signed * d
        measured = (values[0] - values[1]) / (2 * STEP)
        along = {w: sum((found[w][n] * d).sum().item() for n, d in direction.items()) for w in ways}
        assert along["full"] == pytest.approx(measured, rel=0.02)
        other = "pathwise" if way == "score" else "score"
        assert abs(along[other] - measured) > 0.1 * abs(measured)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"kl": float("nan")}, "KL"),
        ({"kl": 9.0}, "above its bound"),
        ({"reward": float("nan")}, "not a number"),
        ({"sampler_drift": 0.3}, "nats a token from the trainer, above its bound 0.2"),
        ({"sampler_drift": float("nan")}, "above its bound"),
    ],
)
def test_the_guard_names_its_reason(smoke, row, reason):
    healthy = {"reward": 0.5, "kl": 0.1, "frac_reward_zero_std": 0.2, "sampler_drift": 0.05}
    check = grpo.guard(smoke.stage3)
    assert check(healthy) is None
    assert reason in check(healthy | row)


def test_negatives_mined_again_change_the_run_and_survive_an_interruption(model_folder, smoke, root, ranked, tmp_path, interrupted):
    changes = {"negatives": {"again_every": 2}, "optimiser": {"checkpoint_every": 2, "lr": 0.05}}
    settings = stage3(smoke, queries_per_step=2, candidates="mined", **changes)

    def run(name, changed=settings):
        model, times = encoder.load(model_folder, smoke.encoder), []

        def mine():
            times.append(1)
            return mined(model, root, smoke, 8)

        grpo.train(model, ranked, changed, seed=4, folder=tmp_path / name, mine=mine)
        return torch.cat([p.detach().flatten() for p in model.backbone.parameters()]), len(times)

    whole, times = run("whole")
    assert times == 1  # of four steps, at the third
    once, times = run("once", settings.model_copy(update={"negatives": smoke.stage3.negatives}))
    assert times == 0 and not torch.equal(whole, once)
    with interrupted(grpo, "step", 4):
        run("cut")
    assert torch.equal(run("cut")[0], whole)


@pytest.mark.parametrize(
    ("cause", "reason", "done"),
    [("not a number", "gradient is not finite", 0), ("runaway", "is above its bound", 1), ("constant", "collapse", 1)],
)
def test_what_goes_wrong_stops_training_by_name_and_a_calmer_run_goes_on_from_there(
    model_folder, smoke, ranked, tmp_path, monkeypatch, cause, reason, done
):
    def with_rate(lr):
        return stage3(smoke, queries_per_step=2, kl_bound=1e-3, optimiser={"checkpoint_every": 1, "lr": lr})

    wild, calm = with_rate(0.3 if cause == "runaway" else 1e-4), with_rate(1e-5)
    healthy = rewards.rank_reward
    with monkeypatch.context() as broken:
        if cause == "not a number":
            broken.setattr(rewards, "rank_reward", lambda *a, **k: healthy(*a, **k) * float("nan"))
        if cause == "constant":  # the same summary, whatever the noise
            broken.setattr(grpo, "COLLAPSE_WINDOW", 2)
            broken.setattr(decoding, "sample", lambda chance, noise: chance.argmax(-1))
        with pytest.raises(loop.DivergedError, match=f"step {done}: .*{reason}.*before it is in .*checkpoint"):
            grpo.train(encoder.load(model_folder, smoke.encoder), ranked, wild, seed=4, folder=tmp_path)
    if cause == "runaway":  # its one step was too large to go on from
        return
    rows = grpo.train(encoder.load(model_folder, smoke.encoder), ranked, calm, seed=4, folder=tmp_path)
    rates = [loop.learning_rate(step, 4, (wild if step < done else calm).optimiser) for step in range(4)]
    assert [r["lr"] for r in rows] == pytest.approx(rates)


@pytest.mark.parametrize("cause", ["gradient is not finite", "too fast"])
def test_the_guard_stops_before_the_weights_move_and_the_last_checkpoint_stays(tmp_path, smoke, cause):
    weight = torch.nn.Parameter(torch.ones(2))
    settings = smoke.stage3.optimiser.model_copy(update={"checkpoint_every": 1})

    def step_fn(step):
        (weight * (float("nan") if step == 2 and cause != "too fast" else 1.0)).sum().backward()
        return {}

    with pytest.raises(
        loop.DivergedError, match=f"step 2: {cause}; the state before it is in .*checkpoint; lower the profile's learning rate"
    ):
        loop.train_loop({"w": weight}, step_fn, 5, settings, tmp_path, lambda row: "too fast" if row["step"] == 2 else None)
    kept = load_file(tmp_path / "checkpoint/state.safetensors")["weight/w"]
    assert torch.equal(kept, weight) and not torch.equal(kept, torch.ones(2)) and not (tmp_path / "metrics.jsonl").exists()


def train_in_a_process(folder, model_folder, prompts, ranked, settings, fatal_step):
    """Stage 3 in a process of its own, which kills itself without any warning before `fatal_step`."""
    torch.set_num_threads(1)
    step, taken = grpo.step, []

    def mortal(*args):
        if len(taken) == fatal_step:
            os.kill(os.getpid(), signal.SIGKILL)
        taken.append(1)
        return step(*args)

    grpo.step = mortal
    model = encoder.load(model_folder, prompts)
    grpo.train(model, ranked, settings, seed=4, folder=folder / "work")
    model.save(folder / "model", stage="stage 3", parent="test")


@pytest.mark.slow
def test_kill_9_at_any_step_and_a_rerun_give_the_weights_of_an_uninterrupted_run(model_folder, smoke, ranked, tmp_path):
    settings = stage3(smoke, queries_per_step=2, optimiser={"checkpoint_every": 2})

    def run(name, fatal_step):
        one = multiprocessing.get_context("spawn").Process(
            target=train_in_a_process, args=(tmp_path / name, model_folder, smoke.encoder, ranked, settings, fatal_step)
        )
        one.start()
        one.join()
        return one.exitcode

    assert run("whole", None) == 0
    # killed before its first checkpoint, then between two, then not any more
    assert [run("cut", 1), run("cut", 3), run("cut", None)] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    whole, cut = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    for name in ("whole", "cut"):
        rows = [json.loads(line) for line in (tmp_path / name / "work/metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1, 2, 3]


def train_as_one_of(rank, count, port, folder, model_folder, prompts, ranked, cases):
    """What `accelerate launch --cpu --num_processes COUNT` starts, case after case: stage 3, or its InfoNCE control."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    for what, (settings, flat) in cases.items():
        grpo.FLAT, own = flat, folder / what
        model = encoder.load(model_folder, prompts)
        if isinstance(settings, RlvrSettings):
            rows = grpo.train(model, ranked, settings, seed=4, folder=own)
        else:
            rows = contrastive.train(model, contrastive.ranked_pairs(ranked, 4, settings), settings, seed=4, folder=own)
        assert distributed.processes().num_processes == count
        if distributed.processes().is_main_process:
            save_file({n: p.detach().clone() for n, p in model.backbone.named_parameters()}, own / "weights.safetensors")
            (own / "rows.json").write_text(json.dumps(rows))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_update_of_one(model_folder, smoke, ranked, tmp_path):
    """Three queries a step, so that the shares are uneven; weights after two steps, and the log, are those of one process."""
    few = {"queries": 6, "queries_per_step": 3}
    everything = {"gradient": "full", "loss_type": "dapo", "scale_rewards": "batch", "rollout_sides": "all"}
    in_turns = {"gradient": "gated", "scale_rewards": "batch", "rollout_sides": "both", "resample": 2, "negatives": ONE}
    cases = {
        "score, sequence": (stage3(smoke, **few), grpo.FLAT),
        "full, dapo, batch, all sides": (stage3(smoke, **few, **everything), grpo.FLAT),
        "gated, in turns, drawn again": (stage3(smoke, **few, **in_turns), 5e-3),  # some groups of an untrained model, not all
        "InfoNCE": (smoke.control.model_copy(update={"steps": 2, "batch": 3, "chunk": 2}), grpo.FLAT),
    }
    for count in (1, 2):
        given = (tmp_path / str(count), model_folder, smoke.encoder, ranked, cases)
        for what in cases:
            (tmp_path / str(count) / what).mkdir(parents=True)
        assert exit_codes(train_as_one_of, count, *given, timeout=300) == [0] * count
    before = dict(encoder.load(model_folder, smoke.encoder).backbone.named_parameters())
    for what in cases:
        one, two = (load_file(tmp_path / count / what / "weights.safetensors") for count in "12")
        moved = max(float((one[n] - p).abs().max()) for n, p in before.items())
        apart = max(float((one[n] - two[n]).abs().max()) for n in before)
        assert moved > 1e-4 and apart < 1e-5, what
        logs = [json.loads((tmp_path / count / what / "rows.json").read_text()) for count in "12"]
        if "drawn again" in what:
            assert 0 < sum(row["resampled"] for row in logs[0]) < 4 and {row["candidates_act"] for row in logs[0]} == {0, 1}
        for alone, shared in zip(*logs, strict=True):
            assert alone.pop("step_time") and shared.pop("step_time") and shared == pytest.approx(alone, rel=1e-5, abs=1e-5), what
