"""MSR-VTT and MSVD, the sets of the paper's Table 7, as retrieval tasks from caption to video.

task = SETS["msrvtt"](Path("data/msrvtt"), frames=12)
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path

import pandas as pd

from elva_core.data.benchmark_files import read_csv
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
    table, records = root / "MSRVTT_JSFUSION_test.csv", root / "msrvtt_test_1k.json"
    if table.is_file():
        path, values = table, read_csv(table, ["video_id", "sentence"])
    elif records.is_file():
        path, columns = records, ["video_id", "caption"]
        values = pd.DataFrame(_opened(records, lambda path: json.loads(path.read_bytes())))
        if lost := [c for c in columns if c not in values]:
            raise ElvaDataError(f"{path}: {lost} is missing; expected {columns}")
        values = values[columns].set_axis(range(1, len(values) + 1))
    else:
        missing = f"neither {table.name} nor {records.name} is there"
        raise ElvaDataError(f"{root}: {missing}; unpack the annotations of MSR-VTT 1k-A there")
    rows = [(f"{path}:{line}", *row) for line, *row in values.itertuples()]
    return _task("MSR-VTT", root, rows, frames, instruction)


def msvd(root: Path, frames: int, instruction: str = INSTRUCTION) -> Task:
    """The test split of MSVD, in the layout that CLIP4Clip and LamRA read.

    Every caption of a video is a query of its own. root/test_list.txt has one video id a line,
    root/raw-captions.pkl is {video id: [[word, ...], ...]}, and videos are root/videos/**/<video id>.avi
    (or .mp4, .webm, .mkv).

    Raises:
        ElvaDataError: as `msrvtt` has it, and a pickle with more in it than lists of words.
    """
    listed, path = root / "test_list.txt", root / "raw-captions.pkl"
    lines = _opened(listed, lambda p: p.read_text(encoding="utf-8-sig")).rstrip().splitlines()
    ids = [line.strip() for line in lines]
    captions = _opened(path, lambda p: _Plain(p.open("rb")).load())
    rows = []
    for number, name in enumerate(ids, start=1):
        texts = captions.get(name) if isinstance(captions, dict) else None
        if not texts or not all(isinstance(c, list) and all(isinstance(w, str) for w in c) for c in texts):
            problem = f"no captions of video {name!r} ({listed}:{number}) as lists of words"
            raise ElvaDataError(f"{path}: {problem}; is it the right file?")
        rows += [(f"{listed}:{number}", name, " ".join(words)) for words in texts]
    return _task("MSVD", root, rows, frames, instruction)


SETS = {"msrvtt": msrvtt, "msvd": msvd}


class _Plain(pickle.Unpickler):
    """Lists, dictionaries and texts only: a pickle may otherwise call whatever it names."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants {module}.{name}, and captions are lists of words")


def _opened(path: Path, read: Callable):
    try:
        return read(path)
    except FileNotFoundError:
        raise ElvaDataError(f"{path} is missing; unpack the annotations of the set there") from None
    except Exception as error:  # a parser given random bytes raises whatever it stumbles over
        raise ElvaDataError(f"{path} cannot be read as expected ({error}); download it again") from None


def _task(
    name: str, root: Path, rows: Sequence[tuple[str, object, object]], frames: int, instruction: str
) -> Task:
    """Rows (where it stands, video id, caption) as a task; each distinct video is one candidate."""
    folder = root / "videos"
    names = glob("**/*", root_dir=folder, recursive=True)  # noqa: PTH207 - rglob follows no linked folder
    paths = sorted((folder / name for name in names), reverse=True)
    files = {path.stem: path for path in paths if path.suffix.lower() in SUFFIXES}
    place: dict[str, int] = {}
    for where, video, caption in rows:
        if not isinstance(caption, str) or not caption.strip():
            raise ElvaDataError(
                f"{where}: the caption of video {video!r} is {caption!r}; repair or remove it"
            )
        if video not in files:
            problem = f"video {video!r} is not below {folder}"
            raise ElvaDataError(f"{where}: {problem}; unpack the videos there")
        place.setdefault(video, len(place))
    if not rows:
        raise ElvaDataError(f"{root}: no rows; is it the right folder?")
    queries = [asked(instruction, caption) for _, _, caption in rows]
    candidates = [Item("", None, (Clip(files[v], frames),)) for v in place]
    return Task(name, queries, candidates, [[place[v]] for _, v, _ in rows], cutoffs=CUTOFFS)
