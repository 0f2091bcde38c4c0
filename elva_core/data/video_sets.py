"""MSR-VTT and MSVD, the sets of the paper's Table 7, as retrieval tasks from caption to video.

task = SETS["msrvtt"](Path("data/msrvtt"), frames=12)
"""

from __future__ import annotations

from collections.abc import Iterable
from glob import glob
from pathlib import Path

from elva_core.data.benchmark_files import Files, entries, read_csv, text
from elva_core.data.caption_sets import Task, asked
from elva_core.data.frames import Clip
from elva_core.data.items import Item
from elva_core.files import ElvaDataError

INSTRUCTION = "Find an everyday video match with caption."  # LamRA's, of both sets
FRAMES = 12  # LamRA's, of MSVD
CUTOFFS = (1, 5, 10)  # of Table 7
SUFFIXES = (".mp4", ".webm", ".avi", ".mkv")


def msrvtt(root: Path, frames: int, instruction: str = INSTRUCTION) -> Task:
    """The 1k-A test split of MSR-VTT.

    In the layout that CLIP4Clip and LamRA read, root/MSRVTT_JSFUSION_test.csv with the columns video_id and
    sentence, or in that of the hub's copy, which VLM2Vec reads, root/msrvtt_test_1k.json, a list of
    {video_id, caption}. A row is a query and its one video, root/videos/**/<video_id>.mp4 (or .webm, .avi,
    .mkv).

    Raises:
        ElvaDataError: a file, column or value that is missing, or a video; names the line or entry.
    """
    files, table, records = Files(root, strict=True), root / "MSRVTT_JSFUSION_test.csv", "msrvtt_test_1k.json"
    if table.is_file():
        path, rows = table, read_csv(table, ["video_id", "sentence"]).itertuples(index=False)
    elif (root / records).is_file():
        path, values = files.read(records)
        rows = files.rows(path, values, lambda _, record: (record["video_id"], record["caption"]))
    else:
        missing = f"neither {table.name} nor {records} is there"
        raise ElvaDataError(f"{root}: {missing}; unpack the annotations of MSR-VTT 1k-A there")
    return _task("MSR-VTT", files, path, rows, frames, instruction)


def msvd(root: Path, frames: int, instruction: str = INSTRUCTION) -> Task:
    """The test split of MSVD, in the layout that CLIP4Clip and LamRA read.

    Every caption of a video is a query of its own. root/test_list.txt has one video id a line,
    root/raw-captions.pkl is {video id: [[word, ...], ...]}, and videos are root/videos/**/<video id>.avi
    (or .mp4, .webm, .mkv).

    Raises:
        ElvaDataError: as `msrvtt` has it, and a pickle with more in it than lists of words.
    """
    files = Files(root, strict=True)
    _, captions = files.read("raw-captions.pkl", kind=dict)
    path, listed = files.read("test_list.txt")

    def parse(_, line):
        video = line.strip()
        return [(video, " ".join(entries(words, "caption"))) for words in entries(captions[video], video)]

    rows = [row for of_video in files.rows(path, listed, parse) for row in of_video]
    return _task("MSVD", files, path, rows, frames, instruction)


SETS = {"msrvtt": msrvtt, "msvd": msvd}


def _task(name: str, files: Files, path: Path, rows: Iterable[tuple], frames: int, instruction: str) -> Task:
    """Rows (video id, caption) as a task; each distinct video is one candidate."""
    folder = files.root.folder / "videos"
    names = glob("**/*", root_dir=folder, recursive=True)  # noqa: PTH207 - rglob follows no linked folder
    paths = sorted((folder / name for name in names), reverse=True)
    films = {film.stem: film for film in paths if film.suffix.lower() in SUFFIXES}

    def parse(_, row):
        video, caption = row
        if video not in films:
            raise ElvaDataError(f"video {video!r} is not below {folder}; unpack the videos there")
        return video, asked(instruction, text(caption, f"the caption of video {video!r}"))

    rows = files.rows(path, rows, parse)
    if not rows:
        raise ElvaDataError(f"{path}: no rows; is it the right file?")
    place = {video: row for row, video in enumerate(dict.fromkeys(video for video, _ in rows))}
    candidates = [Item("", None, (Clip(films[video], frames),)) for video in place]
    queries, positives = [query for _, query in rows], [[place[video]] for video, _ in rows]
    return Task(name, queries, candidates, positives, cutoffs=CUTOFFS)
