"""A stage of training from folder to folder: on one process, on two, by accelerate's launchers, and from the chain."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from conftest import COMMAND, started
from elva_core import cli, config, files
from elva_core.data import sources
from elva_core.experiments import jobs as training
from elva_core.experiments import stages
from elva_core.models import encoder
from elva_core.retrieval import cache
from elva_core.training import contrastive, hard_negatives
from elva_core.values import model_source

# what the test's processes start with: outputs in a folder of the test
COMMAND_LINE = """
import sys
from pathlib import Path
from elva_core import cli, distributed, files, sharding, zero
files.OUTPUTS = Path(sys.argv[1])
print(f"one of {distributed.processes().num_processes}, in slices: {sharding.requested()}")
if zero.requested():
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles another way to talk, minutes on one core
sys.exit(max(cli.main(["train", stage, "smoke", "--seed", "1"]) for stage in sys.argv[2:]))
"""
NOTEBOOK = """
import sys
from pathlib import Path
from elva_core import files
from elva_core.experiments import jobs, stages
files.OUTPUTS = Path(sys.argv[1])
jobs.devices = lambda settings: 2
job = jobs.following("stage1", stages.open_stage("30_pretrain_contrastive", "smoke", 1))
jobs.launch(jobs.run, job)
print(len(jobs.history(job)))
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """Data stage and backbone of the smoke profile, done."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "OUTPUTS", folder)
        stage = stages.open_stage("10_prepare_data", "smoke", 1)
        sources.write(stage.settings.data, stage.folder, seed=1)
        stage.close()
        training.following("stage1", stages.open_stage("30_pretrain_contrastive", "smoke", 1))
    return folder


def trained_here(outputs: Path, *names: str) -> None:
    """Stages of training, through the command line in this process: the one that several are compared with."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "OUTPUTS", outputs)
        assert [cli.main(["train", name, "smoke", "--seed", "1"]) for name in names] == [0] * len(names)


def saved(folder: Path, stage: str) -> Path:
    (begun,) = folder.glob("smoke/seed-1/.30_pretrain_contrastive.*.partial")
    return begun / f"work/{stage}/model"


def weights(model: Path) -> torch.Tensor:
    return torch.cat([t.flatten().float() for _, t in sorted(load_file(model / "model.safetensors").items())])


@pytest.fixture(scope="module")
def alone(outputs, tmp_path_factory) -> Path:
    """Stages 1 and 2, trained by one process."""
    folder = shutil.copytree(outputs, tmp_path_factory.mktemp("alone") / "outputs")
    trained_here(folder, "stage1", "stage2")
    before = weights(Path(model_source(config.load("smoke").backbone.path)))
    assert (weights(saved(folder, "stage2")) - before).abs().max() > 1e-3  # it has learnt something
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launch_file", ["cpu.yaml", "fsdp2.yaml", "zero2.yaml"])
def test_two_processes_train_the_model_of_one(outputs, alone, tmp_path, launch_file):
    """Stages 1 and 2 through the command line; batches, negatives and summaries are those of the whole step."""
    if launch_file == "zero2.yaml":
        pytest.importorskip("deepspeed", reason="pip install -e '.[deepspeed]'")
    folder = shutil.copytree(outputs, tmp_path / "of-2")
    out = started(COMMAND_LINE, folder, tmp_path, "stage1", "stage2", launched_by=launch_file)
    assert out.count(f"one of 2, in slices: {launch_file == 'fsdp2.yaml'}") == 2
    assert out.count("--from 30") == 2  # one of the processes reports
    torch.testing.assert_close(weights(saved(folder, "stage2")), weights(saved(alone, "stage2")), atol=1e-5, rtol=0)
    left, right = ({p.name for p in saved(f, "stage2").iterdir()} for f in (alone, folder))
    assert left == right


def test_every_launch_file_is_one_that_accelerate_reads():
    for path in (files.REPOSITORY / "params/accelerate").glob("*.yaml"):
        read = load_config_from_file(str(path))
        assert read.num_processes % read.num_machines == 0 and str(read.mixed_precision) == "no"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_notebook_on_two_devices_trains_in_two_processes(outputs, alone, tmp_path):
    two = shutil.copytree(outputs, tmp_path / "two")
    out = started(NOTEBOOK, two, tmp_path)
    assert "Launching training on 2" in out and out.strip().endswith("4")
    torch.testing.assert_close(weights(saved(alone, "stage1")), weights(saved(two, "stage1")), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_teach_the_student_and_the_reranker_of_one(alone, tmp_path, monkeypatch):
    """Both begin with stage 3, for which stage 2 stands in."""
    ready = shutil.copytree(alone, tmp_path / "ready")
    monkeypatch.setattr(files, "OUTPUTS", ready)
    stage = stages.open_stage("40_finetune_rlvr", "smoke", 1)
    shutil.copytree(saved(ready, "stage2"), stage.folder / "model")
    stage.close()
    of_one, of_two = (shutil.copytree(ready, tmp_path / name) for name in ("of-one", "of-two"))
    trained_here(of_one, "distil", "rerank")
    assert "one of 2" in started(COMMAND_LINE, of_two, tmp_path, "distil", "rerank", launched_by="cpu.yaml")
    for name in ("distil", "rerank"):
        begun = [next(folder.glob("smoke/seed-1/.85_trade_cost.*.partial")) for folder in (of_one, of_two)]
        one, two = (weights(folder / f"work/{name}/model") for folder in begun)
        assert (one - weights(saved(ready, "stage2"))).abs().max() > 1e-3
        torch.testing.assert_close(two, one, atol=1e-5, rtol=0)


def test_a_stage_whose_start_is_missing_names_the_command(outputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "OUTPUTS", shutil.copytree(outputs, tmp_path / "fresh"))
    assert cli.main(["train", "stage2", "smoke", "--seed", "1"]) == 1
    assert "train stage1 smoke --seed 1" in capsys.readouterr().err
    assert cli.main(["train", "stage3", "smoke", "--seed", "1"]) == 1
    assert "run smoke --seed 1 --only 30" in capsys.readouterr().err


def test_what_a_job_has_finished_is_not_done_again(root, smoke, model_folder, tmp_path, monkeypatch):
    settings = smoke.changed({"stage3": {"queries": 4}, "control": {"steps": 2, "batch": 2}})
    jobs = [
        training.Job(name, settings, 1, root, tmp_path, str(model_folder), tmp_path / name, tmp_path / "mined.safetensors")
        for name in ("stage3", "control")
    ]
    mined = []
    monkeypatch.setattr(hard_negatives, "select", lambda *a, select=hard_negatives.select, **k: mined.append(1) or select(*a, **k))
    for job in jobs:
        training.run(job)
    assert len(mined) == 1 and len(training.history(jobs[0])) == 1 and len(training.history(jobs[1])) == 2
    monkeypatch.setattr(encoder, "load", lambda *_, **__: pytest.fail("a finished job loads no model"))
    for job in jobs:
        training.run(job)


def test_kept_negatives_are_those_that_were_mined(tiny, root, smoke, tmp_path):
    mined = hard_negatives.select(tiny, root, smoke.stage3, batch=32, seed=1)
    hard_negatives.write(mined, tmp_path / "kept.safetensors")
    for before, after in zip(
        hard_negatives.assemble(mined, root, 1), hard_negatives.read(tmp_path / "kept.safetensors", root, 1), strict=True
    ):
        assert (before.vectors == after.vectors).all()
        for name in ("query", "item", "positive", "positive_did", "negatives", "positive_cosine", "cosines"):
            assert getattr(before, name) == getattr(after, name)


def test_checkpointing_changes_memory_not_weights(model_folder, root, smoke, tmp_path):
    """Also while summaries are generated, whose cache a checkpointing layer would drop."""
    ends = []
    for on in (False, True):
        model = encoder.load(model_folder, smoke.encoder)
        settings = smoke.stage2.model_copy(update={"steps": 2, "gradient_checkpointing": on})
        contrastive.train(model, contrastive.union_pairs(root, settings, 1), settings, seed=1, folder=tmp_path / str(on))
        ends.append(torch.cat([p.detach().flatten() for p in model.backbone.parameters()]))
    torch.testing.assert_close(*ends, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_evaluate_as_one_does(tiny, root, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    tiny.save(tmp_path / "model", stage="test", parent="none")
    arguments = ["evaluate", "--unit", "emoji_task3", "--root", str(root.folder), "--model", str(tmp_path / "model")]
    assert cli.main([*arguments, "--out", str(tmp_path / "one"), "--profile", "smoke"]) == 0
    assert "one of 2" in started(COMMAND, tmp_path / "two", tmp_path, *arguments, launched_by="cpu.yaml")
    one, two = ((tmp_path / name / "results.csv").read_text() for name in ("one", "two"))
    assert one == two and "hit@5" in one
