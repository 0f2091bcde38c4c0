"""The command line: its help, its exit status, and evaluation and search of a saved model from end to end."""

from __future__ import annotations

import builtins
import os
import runpy
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import typer

from elva_core import cli, files, tables
from elva_core.data import mbeir
from elva_core.retrieval import cache

COMMANDS = [*typer.main.get_command(cli.app).commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example_with_flags_that_it_has(command, capsys):
    assert cli.main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    example = printed.split("Example: ")[1].split("╭")[0]
    assert command in example.split()
    assert all(flag in printed.split("╭", 1)[1] for flag in example.split(f" {command} ")[1].split() if flag.startswith("--"))


def test_the_help_lists_every_command_in_groups_and_imports_nothing_heavy():
    script = "import sys; from elva_core import cli; cli.main(['--help']); print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=files.REPOSITORY).stdout
    assert printed.strip().endswith("set()")
    assert all(f"│ {command} " in printed for command in COMMANDS) and printed.count("╭") == 1 + 4


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["lint"],
        ["plan", "smoke", "--devices", "two"],
        ["plan", "smoke", "--devices", "0"],
        ["run", "smoke", "--seed", "-1"],
        ["evaluate", "--root", "x"],
    ],
)
def test_a_wrong_command_has_status_2(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "Usage" in capsys.readouterr().err


def test_an_unknown_profile_ends_with_one_line_and_status_1(capsys):
    assert cli.main(["run", "nowhere"]) == 1
    printed = capsys.readouterr().err
    assert "nowhere.yaml is missing" in printed and printed.startswith("error: ") and printed.count("\n") == 1


@pytest.mark.parametrize("problems", ["none", "more than a pipe holds"])
def test_a_reader_that_has_read_enough_ends_lint_without_a_word(own_root, problems):
    for picture in own_root.folder.rglob("*.png") if problems != "none" else ():
        picture.unlink()
    lint = subprocess.Popen(
        [sys.executable, "-m", "elva_core", "lint", str(own_root.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=files.REPOSITORY,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    lint.stdout.close()
    assert (lint.stderr.read(), lint.wait()) == (b"", 1)


def test_what_cannot_be_read_or_written_ends_with_one_line(tiny, root, tmp_path, monkeypatch, capsys):
    """An output that is a file, one below a file, and a disk that may not be written."""
    tiny.save(tmp_path / "model", stage="test", parent="none")
    (tmp_path / "file").write_text("")
    common = ["--model", str(tmp_path / "model"), "--root", str(root.folder), "--unit", "emoji_task0", "--profile", "smoke"]
    for out in (tmp_path / "file", tmp_path / "file/out"):
        assert cli.main(["evaluate", *common, "--out", str(out)]) == 1
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith(f"error: {tmp_path}/file") and not any("Traceback" in line for line in said)
    monkeypatch.setattr(files, "OUTPUTS", tmp_path / "file")
    assert cli.main(["run", "smoke"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/file/smoke/seed-17: Not a directory\n"
    denied = PermissionError(13, "Permission denied", "queries.jsonl")
    monkeypatch.setattr(mbeir, "Root", lambda folder: (_ for _ in ()).throw(denied))
    assert cli.main(["lint", "x"]) == 1
    assert capsys.readouterr().err == "error: queries.jsonl: Permission denied\n"


def test_lint_exits_with_1_on_a_bad_root(own_root, capsys):
    assert cli.main(["lint", str(own_root.folder)]) == 0
    own_root.image_path(own_root.pool("emoji_task0", "test")[0].image).unlink()
    assert cli.main(["lint", str(own_root.folder)]) == 1
    assert "is missing; restore the file" in capsys.readouterr().out


@pytest.mark.parametrize("units", [["--unit", "x", "y"], ["--unit", "x", "--unit", "y"], ["--unit=x", "--unit", "y", "--pool", "both"]])
def test_an_option_takes_several_values_after_one_flag(units, tiny, root, tmp_path, capsys):
    tiny.save(tmp_path / "model", stage="test", parent="none")
    common = ["--model", str(tmp_path / "model"), "--root", str(root.folder), "--out", str(tmp_path / "out"), "--profile", "smoke"]
    assert cli.main(["evaluate", *units, *common]) == 1
    assert "no test units ['x', 'y']; it has ['emoji_task0'" in capsys.readouterr().err


def test_evaluate_and_search_run_on_a_saved_model(tiny, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    tiny.save(tmp_path / "model", stage="test", parent="none")
    common = ["--model", str(tmp_path / "model"), "--root", str(root.folder), "--unit", "emoji_task0", "--profile", "smoke"]
    assert cli.main(["evaluate", *common, "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out/results.csv")
    assert {"hit@5", "recall@5", "hit@5 pessimistic", "mrr@10", "ndcg@10"} <= set(table["metric"])
    assert len(list((tmp_path / "out/runs").glob("*.txt"))) == 3 and "partial" in capsys.readouterr().out
    monkeypatch.chdir(shutil.copytree(tmp_path / "model", tmp_path / "None"))
    here = [*common, "--unit", "emoji_task0", "--model", ".", "--out", str(tmp_path / "out")]  # one unit, named twice
    assert cli.main(["evaluate", *here]) == 0 and "| None | local |" in capsys.readouterr().out
    assert set(tables.read_table(tmp_path / "out/results.csv")["model"]) == {"None"}
    assert cli.main(["evaluate", *common, "--out", str(tmp_path / "out/table.md")]) == 1
    printed = capsys.readouterr().err
    assert "table.md cannot hold the results (it is a file); name another folder" in printed and printed.count("\n") == 1
    assert cli.main(["search", *common, "--k", "3", "--no-pictures", "woman running"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 1 + 3
    assert cli.main(["search", *common, "--no-pictures", "woman \udcff"]) == 1  # a byte of the shell that is no UTF-8
    said = capsys.readouterr().err
    assert said.startswith("error: character 7 of the text") and said.count("\n") == 1


def test_an_interrupt_while_the_commands_are_imported_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "elva_core.cli", None)
    plain = builtins.__import__

    def interrupted(name, *args, **options):
        if name == "elva_core.cli":
            raise KeyboardInterrupt
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("elva_core", run_name="__main__")
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"
