"""vLLM as the sampler of stage 3, against the stand-in of vllm_stand_in.py: the engine there is not ours, nor is its forward."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_grpo import stage3, train_as_one_of
from transformers import AutoProcessor

import vllm_stand_in
from conftest import exit_codes, mined
from elva_core.models import encoder, generation, vllm_sampler
from elva_core.training import grpo, loop
from elva_core.training_settings import LoraSettings, VllmSettings


@pytest.fixture
def engine(monkeypatch):
    """vllm is installed, or rather its stand-in."""
    for name, module in vllm_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def prompting(smoke):
    """A request that names [RET], as the paper's does: its trained row is then in every prompt."""
    return smoke.encoder.model_copy(update={"summary_request": "Summarize, then [RET]:"})


@pytest.fixture
def policy(model_folder, prompting):
    return encoder.load(model_folder, prompting)


@pytest.fixture
def sampler(engine, policy, smoke, tmp_path):
    """Made before the adapter, which then moves away from its start."""
    with grpo.sampler_of(policy, stage3(smoke, sampler="vllm"), tmp_path / "vllm") as made:
        policy.add_lora(smoke.stage3.lora, seed=0)
        move(policy, seed=1)
        yield made


@pytest.fixture
def noise(policy, items):
    return torch.rand(len(items), 3, policy.settings.max_summary_tokens, generator=torch.Generator().manual_seed(0))


def move(model, seed, only=""):
    """An optimiser step as large as can be seen in every log-probability."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.trainable().items():
        if only in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def test_given_the_same_tokens_it_is_what_transformers_sample(policy, sampler, items, noise):
    """Tokens, actions, log-probabilities, entropy and embeddings of two parts that are asked for at once."""
    parts = (items[:2], items[2:])
    for part, theirs in zip(parts, sampler(policy, parts, [noise[:2], noise[2:]], 1.3), strict=True):
        ours = generation.generate(policy, part, noise=noise_that_draws(policy, part, theirs, 1.3), temperature=1.3)
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.actions, theirs.actions)
        for name in ("log_p", "entropy", "embeddings"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=0)


def noise_that_draws(model, items, found, temperature):
    """The middle of each token's part of [0, 1): sampling by inversion then gives these tokens again."""
    noise = torch.full((*found.tokens.shape[:2], model.settings.max_summary_tokens), 0.5)
    log_p, *_ = generation._forced(model, items, found.tokens, found.actions, temperature)
    chance = log_p.detach().double().exp()
    token = found.tokens[found.actions][:, None]
    middle = chance.cumsum(-1).gather(-1, token) - chance.gather(-1, token) / 2
    noise[..., : found.tokens.shape[2]][found.actions] = middle[:, 0].float()
    return noise


def test_banned_tokens_are_never_sampled_and_nothing_is_an_action_after_the_end_of_turn(policy, sampler, items, noise):
    found = torch.cat([noise, noise.flip(-1), noise.flip(1)], dim=1)
    (out,) = sampler(policy, [items], [found], 2.0)
    assert not set(policy.banned_ids.tolist()) & set(out.tokens[out.actions].tolist())
    assert out.entropy[out.actions].min() > 1  # so that the banned ones had their chance
    for tokens, actions in zip(out.tokens.flatten(0, 1).tolist(), out.actions.flatten(0, 1).tolist(), strict=True):
        chosen = [t for t, a in zip(tokens, actions, strict=True) if a]
        assert chosen and policy.end_id not in chosen[:-1] and actions == sorted(actions, reverse=True)


def test_a_summary_that_ends_early_is_read_at_its_own_ret(engine, policy, smoke, items, noise, tmp_path):
    with torch.no_grad():  # the end of turn is about as probable as all else together
        direction = policy.states(policy.batch(items[:1], policy.settings.summary_request))[0, -1]
        policy.backbone.lm_head.weight[policy.end_id] += 6 * direction / direction.norm() ** 2
    with grpo.sampler_of(policy, stage3(smoke, sampler="vllm"), tmp_path / "vllm") as sampler:
        policy.add_lora(smoke.stage3.lora, seed=0)
        (out,) = sampler(policy, [items], [noise], 1.0)
    lengths = out.actions.sum(-1)
    assert lengths.min() < lengths.max() and (out.tokens[lengths == 1] == policy.end_id).any()
    for g, summaries in enumerate(zip(*out.summaries(policy.end_id), strict=True)):
        with torch.no_grad():
            alone, _ = policy.embed_summaries(items, summaries)
        torch.testing.assert_close(out.embeddings[:, g], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("only", ["lora", "token_adapter"])
def test_the_next_sampling_sees_the_weights_of_the_optimiser(policy, sampler, items, noise, only):
    """The engine's own log-probabilities, by another forward on weights it was handed over, are those of the policy."""
    (before,) = sampler(policy, [items], [noise], 1.0)
    assert (before.engine_log_p - before.log_p).abs().max() < 1e-4
    move(policy, seed=2, only=only)
    stale = generation.score(policy, items, before)[0]
    assert (stale - before.engine_log_p)[before.actions].abs().mean() > 1e-3
    (after,) = sampler(policy, [items], [noise], 1.0)
    assert (after.engine_log_p - after.log_p).abs().max() < 1e-4


def test_a_summary_depends_on_its_own_noise_however_items_are_split(policy, sampler, items, noise):
    (whole,) = sampler(policy, [items], [noise], 1.0)
    alone = sampler(policy, [[item] for item in items], noise.split(1), 1.0)
    assert whole.summaries(policy.end_id) == [group for one in alone for group in one.summaries(policy.end_id)]
    (other,) = sampler(policy, [items], [noise.flip(0)], 1.0)
    assert whole.summaries(policy.end_id) != other.summaries(policy.end_id)
    assert any(len({tuple(s) for s in group}) > 1 for group in whole.summaries(policy.end_id))


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights_and_leaves_no_folder(
    engine, model_folder, prompting, root, smoke, tmp_path, interrupted
):
    def run(name, **changes):
        optimiser = {"checkpoint_every": 2, "lr": 0.01} | changes
        settings = stage3(smoke, queries_per_step=2, sampler="vllm", candidates="mined", optimiser=optimiser)
        model = encoder.load(model_folder, prompting)
        ranked = mined(model, root, smoke, 8)
        rows = grpo.train(model, ranked, settings, seed=4, folder=tmp_path / name)
        return torch.cat([p.detach().flatten() for p in model.backbone.parameters()]), rows

    whole, rows = run("whole")
    assert max(row["sampler_drift"] for row in rows) < 1e-4 and not (tmp_path / "whole/vllm").exists()
    with interrupted(grpo, "step", 4):
        run("cut")
    (tmp_path / "cut/vllm/adapter-0-1").mkdir(parents=True)  # what kill -9 leaves
    resumed, _ = run("cut")
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, run("slower", lr=0.005)[0])


def test_another_prompt_than_the_trainers_is_refused(engine, policy, smoke, items, noise, tmp_path, monkeypatch):
    """An engine that makes twice as wide and high an image of every image."""
    shrink = AutoProcessor.from_pretrained

    def other(folder):
        processor = shrink(folder)
        side = policy.processor.image_processor.patch_size * policy.processor.image_processor.merge_size
        processor.image_processor.size = {"shortest_edge": side * side, "longest_edge": side * side}
        return processor

    monkeypatch.setattr(vllm_stand_in.AutoProcessor, "from_pretrained", other)
    with grpo.sampler_of(policy, stage3(smoke, sampler="vllm"), tmp_path / "vllm") as sampler:
        policy.add_lora(smoke.stage3.lora, seed=0)
        with pytest.raises(ValueError, match=r"vLLM read \d+ prompt tokens where the trainer has \d+.*image processors"):
            sampler(policy, [items], [noise], 1.0)


def test_a_wrong_engine_is_noticed(engine, model_folder, prompting, root, smoke, tmp_path, monkeypatch):
    """Its base is not the merged stage-2 model: nothing but the drift shows it."""
    model = encoder.load(model_folder, prompting)
    ranked = mined(model, root, smoke, 8)
    load = vllm_stand_in.AutoModelForImageTextToText.from_pretrained

    def perturbed(folder, **options):
        wrong = load(folder, **options)
        with torch.no_grad():
            wrong.lm_head.weight *= 3
        return wrong

    monkeypatch.setattr(vllm_stand_in.AutoModelForImageTextToText, "from_pretrained", perturbed)
    with pytest.raises(loop.DivergedError, match=r"step 0: vLLM is \d\.\d+ nats a token from the trainer"):
        grpo.train(model, ranked, stage3(smoke, sampler="vllm", candidates="mined"), seed=4, folder=tmp_path)
    assert not (tmp_path / "vllm").exists()


def test_without_vllm_the_message_has_both_ways_out_and_nothing_is_written(policy, root, smoke, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    ranked = mined(policy, root, smoke, 8)
    with pytest.raises(ModuleNotFoundError, match=r"pip install vllm==\d.*or set stage3\.sampler: transformers"):
        grpo.train(policy, ranked, stage3(smoke, sampler="vllm"), seed=4, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (16, 16), (48, 64), (512, 512)])
def test_the_engine_keeps_room_for_the_rank(engine, policy, tmp_path, rank, room):
    made = vllm_sampler.VllmSampler(policy, LoraSettings(rank=rank, alpha=1, dropout=0), VllmSettings(), tmp_path / "vllm")
    assert made._engine._max_rank == room
    made.close()


def test_the_real_vllm_takes_what_is_handed_over(policy, items, smoke, tmp_path, monkeypatch):
    """Where vllm is installed, without its engine: its arguments, its processor of prompts, its loader of adapters."""
    pytest.importorskip("vllm")
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora import lora_model, peft_helper, request
    from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs, context

    for ours, theirs in (("SamplingParams", SamplingParams), ("LLM", EngineArgs), ("LoRARequest", request.LoRARequest)):
        asked, known = (set(inspect.signature(made).parameters) for made in (getattr(vllm_stand_in, ours), theirs))
        assert asked <= known, ours
    policy.model.save_pretrained(tmp_path / "base")
    policy.processor.save_pretrained(tmp_path / "base")
    processor = MULTIMODAL_REGISTRY.create_processor(EngineArgs(model=str(tmp_path / "base"), dtype="float32").create_model_config())
    rows = vllm_sampler.token_rows(policy, items)
    for row, prompt in zip(rows, vllm_sampler.prompts(policy, items, rows), strict=True):
        if "multi_modal_data" in prompt:
            image = processor.info.parse_mm_data(prompt["multi_modal_data"])
            read = processor.apply(ProcessorInputs(prompt["prompt_token_ids"], image), context.TimingContext())
            assert read["prompt_token_ids"] == row
    policy.add_lora(smoke.stage3.lora, seed=0)
    vllm_sampler.write_adapter(policy, tmp_path / "adapter")
    monkeypatch.setattr(lora_model, "PIN_MEMORY", False)
    helper = peft_helper.PEFTHelper.from_local_dir(str(tmp_path / "adapter"), None)
    names = Qwen2VLForConditionalGeneration.hf_to_vllm_mapper.get_rename_mapper()
    loaded = lora_model.LoRAModel.from_local_checkpoint(
        str(tmp_path / "adapter"), vllm_stand_in.MODULES, helper, lora_model_id=1, device="cpu", weights_mapper=names
    )
    layers = range(policy.backbone.config.get_text_config().num_hidden_layers)
    assert {name.rsplit(".", 2)[0] for name in loaded.loras} == {f"language_model.model.layers.{i}" for i in layers}


def with_the_stand_in(*asked):
    vllm_stand_in.install()
    train_as_one_of(*asked)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_with_an_engine_each_give_the_update_of_one(engine, model_folder, prompting, ranked, smoke, tmp_path):
    """Three queries a step, so that the shares are uneven."""
    settings = stage3(smoke, queries=6, queries_per_step=3, sampler="vllm", candidates="mined")
    one = encoder.load(model_folder, prompting)
    before = {name: p.clone() for name, p in one.backbone.named_parameters()}
    grpo.train(one, ranked, settings, seed=4, folder=tmp_path / "one")
    after = dict(one.backbone.named_parameters())
    (tmp_path / "both").mkdir()
    given = (tmp_path, model_folder, prompting, ranked, {"both": (settings, grpo.FLAT)})
    assert exit_codes(with_the_stand_in, 2, *given, timeout=120) == [0, 0]
    both = load_file(tmp_path / "both" / "weights.safetensors")
    assert max(float((after[n] - p).abs().max()) for n, p in before.items()) > 1e-4
    assert max(float((after[n] - both[n]).abs().max()) for n in before) < 1e-5
