"""Moments in shares: two processes with DeepSpeed ZeRO-2 train the model of one and hold half of what AdamW needs."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch

from conftest import exit_codes, mined
from elva_core import distributed, zero
from elva_core.data.items import Item
from elva_core.experiments import sizes
from elva_core.models import encoder
from elva_core.training import contrastive, grpo, loop
from elva_core.training_settings import OptimiserSettings

pytest.importorskip("deepspeed", reason="pip install -e '.[deepspeed]'")


def frequent(optimiser: OptimiserSettings) -> OptimiserSettings:
    return optimiser.model_copy(update={"checkpoint_every": 2})


def stage1(folder, model_folder, smoke, ranked):
    model, settings = encoder.load(model_folder, smoke.encoder), smoke.stage1.model_copy(update={"batch": 4, "chunk": 2})
    texts = [f"{r.item.text} {i}" for i, r in enumerate(ranked)]
    draw = contrastive.epochs([contrastive.Pair(Item(a), Item(a[1:]), a, (a,)) for a in texts], 4, "stage1")
    contrastive.train(model, draw, settings.model_copy(update={"optimiser": frequent(settings.optimiser)}), seed=4, folder=folder)
    return model.model.state_dict()


def stage3(folder, model_folder, smoke, ranked):
    """Three queries a step: one process has two of them, the other one."""
    model, settings = encoder.load(model_folder, smoke.encoder), smoke.stage3.model_copy(update={"queries": 12, "queries_per_step": 3})
    grpo.train(model, ranked, settings.model_copy(update={"optimiser": frequent(settings.optimiser)}), seed=4, folder=folder)
    return model.model.state_dict()


def with_a_gap(folder, fatal):
    """Six steps on three parameters, one of which only the first row reaches.

    A first run meets a gradient that is not finite at step `fatal` and stops; a second one resumes from what it left.
    """
    settings = OptimiserSettings(lr=0.1, warmup=0.1, checkpoint_every=2, clip=0.5)

    def run(broken):
        parameters = {name: torch.nn.Parameter(torch.linspace(-1, 1, size)) for name, size in (("a", 5), ("b", 3), ("c", 7))}

        def step_fn(step):
            for row in distributed.own_share(3):
                for name in "abc" if row == 0 else "ac":
                    (parameters[name] * torch.linspace(row, step, len(parameters[name]))).sum().backward()
            if step == broken:
                for parameter in parameters.values():
                    parameter.grad = torch.full_like(parameter, float("nan"))
            distributed.sum_gradients(parameters.values())
            return {}

        return parameters, loop.train_loop(parameters, step_fn, 6, settings, folder)

    with pytest.raises(loop.DivergedError, match=f"step {fatal}: gradient is not finite"):
        run(fatal)
    parameters, rows = run(None)
    return {name: parameter.detach() for name, parameter in parameters.items()} | {
        "norms": torch.tensor([row["grad_norm"] for row in rows])
    }


def as_one_of(rank, count, port, shared, fatal_step, stage, folder, *given):
    """Trains in this process, which kills itself without any warning before `fatal_step`, if there is one."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": str(shared).lower(), "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles another way to talk, minutes on one core
    distributed.processes()
    held, steps, reduce, step = {}, [], zero.SharedAdamW.reduce, torch.optim.AdamW.step

    def mortal(self, *args, **kwargs):
        if len(steps) == fatal_step:
            os.kill(os.getpid(), signal.SIGKILL)
        steps.append(1)
        return step(self, *args, **kwargs)

    def watched(self):
        """What a process holds between `reduce` and `step`."""
        norm, moments = reduce(self), self._moments[self._share].values()
        held["moments"] = sum(value.nbytes for value in moments if value.dim())
        held["weights"] = self._share.nbytes
        held["gradients"] = sum(g.nbytes for g in self._zero.averaged_gradients[0])
        return norm

    torch.optim.AdamW.step, zero.SharedAdamW.reduce = mortal, watched
    torch.save(stage(folder, *given), folder / f"{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps(held))


def in_two(stage, folder, *given, shared=True, fatal_step=-1) -> list[int]:
    """Exit codes of two processes."""
    folder.mkdir(exist_ok=True)
    return exit_codes(as_one_of, 2, shared, fatal_step, stage, folder, *given, timeout=240)


def assert_same(left: dict, right: dict) -> None:
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def given(tiny, model_folder, smoke, root):
    return model_folder, smoke, mined(tiny, root, smoke, 12)


def test_two_that_share_moments_train_the_model_of_one(given, tmp_path, record_testsuite_property):
    """Stage 1, and what each process holds: half of the moments, of the copy of the weights and of the summed gradients."""
    (tmp_path / "alone").mkdir()
    alone = stage1(tmp_path / "alone", *given)
    before = encoder.load(given[0], given[1].encoder).model.state_dict()
    assert max(float((alone[name] - before[name]).abs().max()) for name in before) > 1e-3
    assert in_two(stage1, tmp_path / "two", *given) == [0, 0]
    model = encoder.load(given[0], given[1].encoder)
    model.add_lora(given[1].stage1.lora, seed=1)
    trained = sum(parameter.numel() for parameter in model.trainable().values())
    for rank in range(2):
        assert_same(alone, torch.load(tmp_path / f"two/{rank}.pt"))
        held = json.loads((tmp_path / f"two/{rank}.json").read_text())
        record_testsuite_property(f"bytes of {trained} parameters whole, held by process {rank}", ({"moments": 8 * trained}, held))
        shares = {"moments": 8, "weights": 4, "gradients": 4}
        for name, bytes_each in shares.items():
            assert abs(held[name] - bytes_each * trained / 2) <= 64 * bytes_each, name  # but for padding
        planned = sizes.of_config(model.backbone.config).shared_bytes(given[1].stage1.lora.rank, 2)
        assert abs(8 * trained + sum(held.values()) - planned) <= 64 * 16  # with weight and own gradient


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_run_goes_on_in_two_processes_or_in_one(given, tmp_path):
    (tmp_path / "alone").mkdir()
    alone = stage3(tmp_path / "alone", *given)
    assert in_two(stage3, tmp_path / "two", *given, fatal_step=3) == [-signal.SIGKILL] * 2
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert_same(alone, stage3(tmp_path / "one", *given))  # moments are kept put together
    assert in_two(stage3, tmp_path / "two", *given) == [0, 0]
    for rank in range(2):
        assert_same(alone, torch.load(tmp_path / f"two/{rank}.pt"))


@pytest.mark.parametrize("fatal", [1, 3])
def test_a_run_that_diverged_is_resumed_as_in_one_process(tmp_path, fatal):
    """From nothing, and from a checkpoint; norms are those of the whole gradient."""
    alone = with_a_gap(tmp_path / "alone", fatal)
    assert in_two(with_a_gap, tmp_path / "two", fatal) == [0, 0]
    for rank in range(2):
        assert_same(alone, torch.load(tmp_path / f"two/{rank}.pt"))


def test_another_stage_of_zero_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(ValueError, match="as params/accelerate/zero2"):
        zero.SharedAdamW([torch.nn.Parameter(torch.ones(2))], OptimiserSettings(lr=0.1, warmup=0.1, checkpoint_every=2))
