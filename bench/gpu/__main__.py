"""One card, eight minutes, no network: is it right, how fast, how full? Writes outputs/gpu/<card>.json after every section, and a figure.

    make gpu [PYTHON=python3]

It runs with the Python that is there (torch 2.11 to 2.14, transformers 5.17 to 5.23). Sections come in the order of their worth; one
whose time is not left, or whose library is missing, is skipped and named. Without a card it says so and ends well; `--device cpu
--tiny` runs its sections at a size for tests, and marks the result as that of a simulated device.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TQDM_DISABLE", "1")

import correct
import speed
import torch
import transformers
from material import Busy, Place

from elva_core import distributed, files
from elva_core.experiments import stages

LIMIT = 480  # seconds in all


class Section(NamedTuple):
    name: str
    seconds: int  # that it may take
    work: Callable[[Place, speed.Models], dict]


SECTIONS = (
    Section("same as on the CPU", 100, lambda place, _: correct.as_on_the_cpu(place)),
    Section("resume after a kill", 60, lambda place, _: correct.resumes(place)),
    Section("stage 1 step", 60, speed.stage1),
    Section("stage 2, EOL step", 90, lambda *given: speed.stage2(*given, ret=False)),
    Section("48 summaries of 64 tokens", 60, speed.summaries),
    Section("RL step", 60, speed.rl),
    Section("embedding images at EOL", 30, lambda *given: speed.embedding(*given, "image", summary=False)),
    Section("embedding images with a summary", 40, lambda *given: speed.embedding(*given, "image", summary=True)),
    Section("embedding texts at EOL", 20, lambda *given: speed.embedding(*given, "text", summary=False)),
    Section("embedding texts with a summary", 30, lambda *given: speed.embedding(*given, "text", summary=True)),
    Section("stage 2, [RET] step", 150, lambda *given: speed.stage2(*given, ret=True)),
    Section("small backbone, three stages and search", 60, lambda place, _: correct.small_chain(place)),
    Section("exact search, 1,000 in a million", 30, speed.searching),
    Section("TRL's GRPO step over ours", 90, speed.trl),
    Section("7B, stage 2 step of 120", 60, speed.seven),
)


class OutOfTimeError(Exception):
    """A section that took longer than it may."""


def section(one: Section, place: Place, models: speed.Models, busy: Busy) -> dict:
    """What a section measured; "skipped" or "error" with the reason where it did not."""
    card = place.device == "cuda"
    gc.collect()
    if card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    busy.taken()

    def late(*_) -> None:
        raise OutOfTimeError(f"took more than its {one.seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(one.seconds)
    began = time.perf_counter()
    try:
        facts = one.work(place, models)
    except ImportError as missing:
        facts = {"skipped": f"a library is missing: {missing}"[:200]}
    except Exception as wrong:
        traceback.print_exc()
        facts = {"error": f"{type(wrong).__name__}: {wrong}"[:500]}
    finally:
        signal.alarm(0)
    facts |= {"s": round(time.perf_counter() - began, 1), "util": busy.taken()}
    return facts | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9 if card else None}


def measure(place: Place, out: Path, limit: float, wanted: str) -> dict:
    """Runs the sections whose name has `wanted` in it."""
    card = torch.cuda.get_device_name() if place.device == "cuda" else "simulated device"
    report = {
        "card": card,
        "simulated": place.device != "cuda",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": stages._commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sections": {},
    }
    path = out / f"{re.sub('[^A-Za-z0-9]+', '-', card)}.json"
    began, models, busy = time.monotonic(), speed.Models(place), Busy()
    for one in SECTIONS:
        if wanted not in one.name:
            continue
        left = limit - (time.monotonic() - began)
        if left < one.seconds / 2:
            facts = {"skipped": f"{max(left, 0):.0f} of {limit:.0f} s are left"}
        else:
            facts = section(one._replace(seconds=int(min(one.seconds, left)) + 1), place, models, busy)
        four_digits = json.loads(json.dumps(facts), parse_float=lambda number: float(f"{float(number):.4g}"))
        report["sections"][one.name] = four_digits
        files.write_whole(path, json.dumps(report, indent=1) + "\n")
        print(f"{time.monotonic() - began:5.0f} s  {one.name}: {json.dumps(report['sections'][one.name])[:300]}", flush=True)
    busy.stop()
    picture(report, path.with_suffix(".png"))
    print(f"written: {path}")
    return report


def picture(report: dict, path: Path) -> None:
    """How busy the card was and how much of its peak was used, by section."""
    shown = {name: e for name, e in report["sections"].items() if e.get("util") is not None or e.get("mfu") is not None}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for shift, key, scale, label in ((-0.2, "util", 1, "busy, % (nvidia-smi)"), (0.2, "mfu", 100, "of the peak, %")):
        axes.barh([i + shift for i in range(len(shown))], [scale * (e.get(key) or 0) for e in shown.values()], 0.38, label=label)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_title(f"{report['card']}, {report['date']}")
    axes.legend(loc="lower right")
    with files.whole(path) as partial:
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes of seconds on a CPU")
    parser.add_argument("--out", type=Path, default=files.REPOSITORY / "outputs/gpu")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all")
    parser.add_argument("--only", default="", help="sections with this in their name")
    parser.add_argument("--killed", type=Path, help=argparse.SUPPRESS)  # of correct.resumes
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no card on this machine: nothing was measured")
        return
    distributed.start(None)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(given.device, given.tiny, Path(folder))
        if given.killed:
            correct.trained(place, given.killed, killed=True)
            return
        measure(place, given.out, given.limit, given.only)


if __name__ == "__main__":
    main()
