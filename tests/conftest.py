"""One tiny M-BEIR root and one tiny encoder, made once for all tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
import torch

from elva_core import config, files
from elva_core.data import emoji, mbeir
from elva_core.data import items as data_items
from elva_core.experiments import lock
from elva_core.models import encoder, small_models
from elva_core.mrbench import annotate, build
from elva_core.training import hard_negatives

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def smoke() -> config.Settings:
    return config.load("smoke")


@pytest.fixture(scope="session")
def emojis() -> list[emoji.Emoji]:
    return emoji.load("de")


def write_tiny_root(emojis, folder: Path) -> mbeir.Root:
    vendors = {"train": ["Appl", "Joy"], "val": ["Goog"], "test": ["Twtr"]}
    limits = {"train": 40, "val": 10, "test": 12}
    settings = config.EmojiSettings(language="de", vendors=vendors, held_out_share=0.15, queries_per_unit=limits, up_sample=50)
    return emoji.write_root(emoji.sample(emojis, 60), folder, settings, seed=3)


@pytest.fixture(scope="session")
def root(emojis, tmp_path_factory) -> mbeir.Root:
    return write_tiny_root(emojis, tmp_path_factory.mktemp("root"))


@pytest.fixture
def own_root(emojis, tmp_path) -> mbeir.Root:
    """A root the test may damage."""
    return write_tiny_root(emojis, tmp_path / "root")


@pytest.fixture(scope="session")
def built(root, smoke, tmp_path_factory):
    """(benchmark, counts, sheet) that MRBench is made of; no test may damage it."""
    return build.build(root, smoke.mrbench, annotate=annotate.exact, folder=tmp_path_factory.mktemp("bench"), seed=1)


@pytest.fixture(scope="session")
def bench(built) -> mbeir.Root:
    return built[0]


@pytest.fixture(scope="session")
def texts(root) -> list[str]:
    """What a small tokenizer is trained on."""
    return [c.text for c in root.pool("", "train", "global") if c.text] * 20


@pytest.fixture(scope="session")
def model_folder(texts, tmp_path_factory) -> Path:
    """A tiny Qwen2-VL of the real class with random weights, saved as a pretrained folder."""
    model, processor = small_models.build(texts, config.teaching("tiny").sizes, seed=5)
    encoder.add_ret_token(model, processor.tokenizer, "[RET]")
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(model_folder, smoke) -> encoder.Encoder:
    return encoder.load(model_folder, smoke.encoder)


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Outputs of the test's own; no run holds a lock there."""
    monkeypatch.setattr(files, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.delenv(lock.HOLDER, raising=False)
    yield tmp_path / "outputs"
    lock.give_back("smoke/seed-1")


# of models and units: what a reader of tables may take for a number or for a missing value
ODD_NAMES = ["None", "nan", "NA", "null", "n/a", "007", "1e-5", "True", "a\tb c"]

# a command that scores a model, with embeddings and results in a folder of the test
COMMAND = """
import sys
from pathlib import Path
from elva_core import cli, distributed
from elva_core.retrieval import cache
out, name, *more = sys.argv[1:]
print(f"one of {distributed.processes().num_processes}")
cache.EMBEDDINGS = Path(out) / "kept"
sys.exit(cli.main([name, *more, "--out", out, "--profile", "smoke"]))
"""


def started(script: str, folder: Path, tmp_path: Path, *arguments: str, launched_by: str = "") -> str:
    """Output of a script run in a process of its own, or in two that `accelerate launch` starts with this launch file, on the CPU."""
    path = tmp_path / "script.py"
    path.write_text(script)
    configured = str(files.REPOSITORY / "params/accelerate" / launched_by)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", configured, "--num_processes", "2", "--main_process_port", "0"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(files.REPOSITORY)}
    command = [sys.executable, *(launcher if launched_by else []), str(path), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _to_the_end(work, *given) -> None:
    """Leaves the group as torch asks for: its threads, met by the end of the interpreter, abort a process whose work is done."""
    work(*given)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def exit_codes(work, count: int, *given, timeout: float) -> list[int | None]:
    """Runs `work(rank, count, port, *given)` in `count` processes that can reach each other at `port`; None where one had to be killed.

    Args:
        timeout: seconds to wait for each: a process that fails leaves the others waiting for it.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_to_the_end, args=(work, rank, count, port, *given)) for rank in range(count)]
    for one in started:
        one.start()
    for one in started:
        one.join(timeout=timeout)
    codes = [one.exitcode for one in started]
    for one in started:
        one.kill()
    return codes


def mined(model, root, smoke, queries: int) -> list[hard_negatives.TrainingQuery]:
    """`queries` train queries with the negatives that the model chooses."""
    settings = smoke.stage3.model_copy(update={"queries": queries})
    return hard_negatives.assemble(hard_negatives.select(model, root, settings, batch=32, seed=1), root, 1)


@pytest.fixture
def ranked(tiny, root, smoke) -> list[hard_negatives.TrainingQuery]:
    """Eight queries of stage 3, one of every task."""
    return mined(tiny, root, smoke, 8)


@pytest.fixture
def noise(tiny, items) -> torch.Tensor:
    """Of three rollouts of each item."""
    return torch.rand(len(items), 3, tiny.settings.max_summary_tokens, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def interrupted(monkeypatch):
    """`with interrupted(module, "name", call)`: that call of module.name is a keyboard interrupt, which must reach the top."""

    @contextmanager
    def at(module, name, call):
        original, calls = getattr(module, name), []

        def mortal(*args, **options):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*args, **options)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(module, name, mortal)
            yield

    return at


@pytest.fixture(scope="session")
def items(root) -> list[data_items.Item]:
    """Images, texts and both, of different lengths."""
    pool = root.pool("", "test", "global")
    return [data_items.candidate_item(root, next(c for c in pool[start:] if c.modality == m)) for start in (0, 7) for m in mbeir.MODALITIES]
