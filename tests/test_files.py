"""Files appear whole or not at all."""

from __future__ import annotations

import multiprocessing

import pytest

from elva_core import files


def test_an_error_leaves_the_file_of_before_and_nothing_else(tmp_path):
    path = tmp_path / "new folder" / "table.csv"
    files.write_whole(path, "a")
    with pytest.raises(KeyboardInterrupt), files.whole(path) as partial:
        partial.write_text("half of ")
        assert path.read_text() == "a"
        raise KeyboardInterrupt
    assert path.read_text() == "a" and list(path.parent.iterdir()) == [path]


def write_often(path, letter):
    for _ in range(200):
        files.write_whole(path, letter * 9999)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_that_write_one_file_never_mix(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(tmp_path / "file", letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert (tmp_path / "file").read_text() in ("a" * 9999, "b" * 9999) and len(list(tmp_path.iterdir())) == 1
