"""One run at a time of a profile, with processes of this machine."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from conftest import exit_codes, started
from elva_core import cli, files
from elva_core.experiments import lock, stages

HOST = socket.gethostname()
KERNEL = """
import sys
from pathlib import Path
from elva_core import files
from elva_core.experiments import stages
files.OUTPUTS = Path(sys.argv[1])
stage = stages.open_stage("10_prepare_data", "smoke", 1)
(stage.folder / "work").mkdir(exist_ok=True)
(stage.folder / "work/checkpoint").write_text("two days")
print("open", flush=True)
sys.stdin.readline()
stage.close()
print("closed", flush=True)
sys.stdin.readline()
"""
RANK = """
import contextlib, io, sys
from pathlib import Path
from elva_core import cli, distributed, files
files.OUTPUTS = Path(sys.argv[1])
distributed.processes()
with contextlib.redirect_stderr(io.StringIO()) as said:
    status = cli.main(["train", "stage1", "smoke", "--seed", "1"])
sys.stdout.write(f"status {status}, lines {said.getvalue().count('is in use by process')}\\n")
"""


def checkpoint(outputs):
    """Of the stage that a kernel has begun."""
    (begun,) = outputs.glob("smoke/seed-1/.10_prepare_data.*.partial")
    return begun / "work/checkpoint"


@contextmanager
def kernel(outputs):
    """A process that has opened a stage of smoke, as a kernel of JupyterLab does."""
    environment = {name: value for name, value in os.environ.items() if name != lock.HOLDER} | {"PYTHONPATH": str(files.REPOSITORY)}
    command = [sys.executable, "-c", KERNEL, str(outputs)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("command", [["run", "smoke"], ["train", "stage1", "smoke"], ["study", "smoke"]])
def test_the_second_run_of_a_profile_is_refused_with_one_line_and_takes_nothing_away(outputs, capsys, command):
    with kernel(outputs) as holder:
        assert cli.main([*command, "--seed", "1"]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: outputs/smoke/seed-1 is in use by process {holder.pid} on host {HOST}; ") and said.count("\n") == 1
        assert f"kill {holder.pid}" in said
        assert checkpoint(outputs).read_text() == "two days"
        lock.give_back("smoke/seed-1")  # not ours
        with pytest.raises(lock.LockedError):
            stages.open_stage("20_build_mrbench", "smoke", 1)
        for other in ("cpu/seed-1", "smoke/seed-2", "smoke/study"):
            assert lock.take(other)
            lock.give_back(other)


def test_a_stage_that_is_closed_frees_its_profile_while_its_kernel_lives(outputs):
    with kernel(outputs) as holder:
        print(file=holder.stdin, flush=True)
        assert holder.stdout.readline() == "closed\n"
        assert lock.take("smoke/seed-1") and not lock.take("smoke/seed-1")
        lock.give_back("smoke/seed-1")
        assert not (outputs / "smoke/seed-1/.lock").exists()


@pytest.mark.slow
def test_a_lock_whose_process_was_killed_is_taken_over_with_its_work(outputs):
    for seed in range(5):
        with kernel(outputs) as holder:
            time.sleep(random.Random(seed).random() / 20)
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert (outputs / "smoke/seed-1/.lock").read_text() == f"{HOST} {holder.pid}"
        assert checkpoint(outputs).read_text() == "two days"
        assert lock.take("smoke/seed-1") and (outputs / "smoke/seed-1/.lock").read_text() == f"{HOST} {os.getpid()}"
        lock.give_back("smoke/seed-1")


def test_where_a_file_system_has_no_locks_the_process_in_the_file_is_looked_for(outputs, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with kernel(outputs) as holder:
        with pytest.raises(lock.LockedError, match=f"process {holder.pid} on host"):
            lock.take("smoke/seed-1")
        holder.kill()
        holder.wait()
        assert lock.take("smoke/seed-1")
        lock.give_back("smoke/seed-1")


def test_a_lock_of_another_host_is_taken_over_only_after_its_file_was_deleted(outputs, capsys):
    path = outputs / "smoke/seed-1/.lock"
    files.write_whole(path, "far-away 123")
    for _ in range(2):
        assert cli.main(["run", "smoke", "--seed", "1"]) == 1
        said = capsys.readouterr().err
        assert "process 123 on host far-away" in said and f"delete {path}" in said and said.count("\n") == 1
    assert path.read_text() == "far-away 123"
    path.unlink()
    assert lock.take("smoke/seed-1")


def race(rank, count, port, outputs):
    """Takes the lock as often as it can for a while; inside, nobody else may be."""
    files.OUTPUTS, inside, times = outputs, outputs / "inside", 0
    end = time.monotonic() + 3
    while time.monotonic() < end:
        try:
            with lock.held("smoke/seed-1"):
                inside.mkdir()
                inside.rmdir()
                times += 1
        except lock.LockedError:
            pass
    assert times


@pytest.mark.slow
def test_of_many_that_take_and_free_it_one_at_a_time_is_inside(outputs):
    outputs.mkdir()
    assert exit_codes(race, 3, outputs, timeout=60) == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.distributed
def test_of_a_launch_whose_profile_is_in_use_every_process_ends_and_one_says_why(outputs, tmp_path):
    """That the processes of a launch are one holder is what the tests of training on two processes show."""
    with kernel(outputs):
        out = started(RANK, outputs, tmp_path, launched_by="cpu.yaml")
    assert sorted(out.splitlines()) == ["status 1, lines 0", "status 1, lines 1"]
