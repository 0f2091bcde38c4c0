"""What was measured on a card: run 1's lines, results of `make gpu`, the plan's values from them, README's section."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys

import pytest
import torch

from elva_core import config, files
from elva_core.experiments import cost, estimate, measured, plan, sizes

RESULT = {
    "card": "NVIDIA H100 80GB HBM3",
    "simulated": False,
    "date": "2027-01-02",
    "commit": "abc1234",
    "torch": "2.14.1",
    "transformers": "5.23.0",
    "sections": {
        "same as on the CPU": {"ok": False, "differs": ["gradient of stage 3 in bfloat16"], "util": None, "peak_gb": 1.0},
        "stage 2, EOL step": {"value": 12.5, "unit": "s", "mfu": 0.35, "util": 91.0, "peak_gb": 60.0},
        "48 summaries of 64 tokens": {"value": 0.3, "unit": "s", "seconds_per_layer": 0.0002, "against": "generate", "ratio": 5.5},
        "TRL's GRPO step over ours": {"skipped": "a library is missing: trl"},
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """outputs/gpu of a test, with run 1's lines."""
    (tmp_path / "run1.jsonl").write_text((measured.FOLDER / "run1.jsonl").read_text())
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    return tmp_path


def assumed(gpu: str) -> tuple[float, float, str | None]:
    table, source = measured.applied(sizes.known(), gpu)
    return table.assumed.utilisation, table.assumed.seconds_per_layer["cuda"], source


def test_run_1s_share_of_the_peak_is_that_of_its_issue(folder):
    share, layer, source = assumed("H100")
    assert 0.07 <= share <= 0.09 and 0.0009 < layer < 0.0012 and "071c39b" in source
    table = sizes.known()
    work = measured.step_flops(sizes.of_model(table.run1.model, table.architectures), table.run1)
    assert 4e15 <= work <= 5e15


def test_a_card_that_was_not_measured_keeps_the_assumptions(folder):
    table = sizes.known()
    assert measured.applied(table, "H20") == (table, None)
    (folder / "run1.jsonl").unlink()
    assert measured.applied(table, "H100") == (table, None)


def test_a_result_replaces_run_1_and_a_simulated_one_does_not(folder):
    (folder / "a.json").write_text(json.dumps(RESULT | {"simulated": True}))
    assert assumed("H100")[0] < 0.1
    (folder / "b.json").write_text(json.dumps(RESULT))
    assert assumed("H100") == (0.35, 0.0002, "NVIDIA H100 80GB HBM3, 2027-01-02, commit abc1234")
    load = estimate.make(config.load("qwen2vl-2b"), gpu="H100")
    slow = estimate.make(config.load("qwen2vl-2b"), gpu="H200")
    assert load.measured and not slow.measured
    assert (
        load.contrastive(load.settings.stage2, *[load.side("query")] * 2)[0].seconds
        < slow.contrastive(slow.settings.stage2, *[slow.side("query")] * 2)[0].seconds
    )


def test_the_section_says_since_when_nothing_was_measured_or_what_was(folder):
    table = sizes.known()
    before = measured.readme_block(table)
    assert "Last measured on a card on 2026-11-27" in before and "| stage 2, EOL step | 54.3 s | <= 15 s | 69 % |" in before
    assert "gradient is not finite" in before
    (folder / "b.json").write_text(json.dumps(RESULT))
    block = measured.readme_block(table)
    for text in (
        "**differs from the CPU**: gradient of stage 3 in bfloat16",
        "0.3 s; generate 5.5 times as long",
        "| stage 2, EOL step | 12.5 s | <= 15 s | 91 % | 35% | 60.0 |",
        "skipped, a library is missing: trl",
    ):
        assert text in block
    assert "Last measured" not in block


def test_readme_shows_the_section_of_the_committed_measurements():
    text = (files.REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = text.split("<!-- gpu:start -->")[1].split("<!-- gpu:end -->")[0]
    assert block.strip() == measured.readme_block(sizes.known()).strip()


@pytest.mark.parametrize(("profile", "gpu"), [("qwen2vl-2b", "A100"), ("qwen2vl-7b", "H200")])
def test_the_rows_that_fill_a_card_fill_it_and_one_more_is_too_many(profile, gpu):
    """The budget is the largest number of rows whose fullest stage stays below the middle of FILLED, or a whole step."""
    load = estimate.make(config.load(profile), gpu=gpu)
    budgets = {b.key: b for b in plan.budgets(load)}
    by_tokens = {"stage1.chunk_tokens", "stage2.chunk_tokens", "control.chunk_tokens"}
    assert by_tokens | {"stage3.chunk", "evaluation.batch"} <= set(budgets)
    low, high = plan.FILLED
    for key, b in budgets.items():
        more = plan._share(load, key, b.filling + 1)
        assert b.filled <= high
        assert more > (low + high) / 2 or more == b.filled, key
        if more != b.filled and key != "stage3.chunk":  # which grows by the rollouts of a whole query
            assert b.filled >= low, key
    longest = load.longest(cost.Side(0, 1), load.settings.encoder.summary_request) + load.cap + 1
    assert budgets["stage2.chunk_tokens"].tokens == int(budgets["stage2.chunk_tokens"].filling * longest)


@pytest.mark.parametrize("profile", ["qwen2vl-2b", "qwen2vl-7b"])
def test_the_papers_profiles_fill_an_h100_where_they_count_tokens_and_never_more_than_it_has(profile):
    """Rows are even shares of eight GPUs as well, so some are fewer than fill one card; chunks by tokens are cut evenly as they come."""
    low, high = plan.FILLED
    budgets = plan.budgets(estimate.make(config.load(profile), gpu="H100"))
    assert all(b.share <= high for b in budgets) and all(b.share >= low for b in budgets if b.key.endswith("chunk_tokens"))


@pytest.mark.slow
def test_every_section_of_make_gpu_runs_on_a_simulated_device(tmp_path):
    command = [sys.executable, "bench/gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files.REPOSITORY, timeout=400)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "simulated-device.json").read_text())
    assert result["simulated"] and len(result["sections"]) == 15
    assert not {name: e["error"] for name, e in result["sections"].items() if "error" in e}
    for name in ("same as on the CPU", "resume after a kill", "small backbone, three stages and search"):
        assert result["sections"][name]["ok"], result["sections"][name]
    assert (tmp_path / "simulated-device.png").stat().st_size > 1000


def test_a_card_that_computes_something_else_is_named(monkeypatch, tmp_path):
    """A gradient that is not a number in float32, and one in bfloat16 further off than twice a CPU's."""
    monkeypatch.syspath_prepend(str(files.REPOSITORY / "bench/gpu"))
    import correct
    from material import Place

    one = torch.ones(4)
    read = iter(
        {"EOL embeddings": one + a, "gradient of stage 1, 64 tokens": one + b}
        for a, b in ((0, 0), (5e-5, float("nan")), (0.01, 0.01), (0.019, 0.03))  # CPU float32, card, CPU bfloat16, card
    )
    monkeypatch.setattr(correct, "readings", lambda *_: next(read))
    made = correct.as_on_the_cpu(Place("cpu", True, tmp_path))
    assert not made["ok"]
    assert made["differs"] == [f"gradient of stage 1, 64 tokens in {dtype}" for dtype in ("float32", "bfloat16")]


def test_sections_without_time_or_library_are_skipped_and_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(files.REPOSITORY / "bench/gpu"))
    gpu = runpy.run_path(str(files.REPOSITORY / "bench/gpu/__main__.py"))
    place = gpu["Place"]("cpu", True, tmp_path)
    late = gpu["measure"](place, tmp_path, 0, "")
    assert len(late["sections"]) == 15 and all(e == {"skipped": "0 of 0 s are left"} for e in late["sections"].values())

    def lacking(*_):
        raise ImportError("No module named 'trl'")

    facts = gpu["section"](gpu["Section"]("TRL", 9, lacking), place, None, gpu["Busy"]())
    assert facts["skipped"] == "a library is missing: No module named 'trl'"


def test_without_a_card_make_gpu_says_so_and_ends_well(tmp_path):
    done = subprocess.run([sys.executable, "bench/gpu", "--out", str(tmp_path)], capture_output=True, text=True, cwd=files.REPOSITORY)
    assert done.returncode == 0 and "no card on this machine" in done.stdout and not list(tmp_path.iterdir())
