"""The exact search beside FAISS's IndexFlatIP: throughput on the same vectors, growth with the pool, memory over a pool on disk.

Rounds are made in turns in one process with the same number of threads; medians and ratios go to outputs/bench/search.json.

    make bench
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from elva_core import config, distributed, files
from elva_core.experiments import figures
from elva_core.retrieval import search

PROFILE = config.load("cpu")
QUERIES, WIDTH, DEPTH, ROUNDS = 1000, 256, 50, 9
TOP, RANKS = "top k", "top k and ranks"
TARGET = 0.9  # of FAISS's throughput, for the top k
POOLS = (125_000, 250_000, 500_000, 1_000_000)
MEMORY_WIDTH, MEMORY_POOLS, MEMORY_BOUND = 1536, (350_000, 700_000), 1024  # MB; the smaller pool is larger than that already
WHOLE, WHOLE_BOUND = 5_609_079, 4096  # candidates of M-BEIR's global pool, MB
FOLDER = files.REPOSITORY / "outputs/bench"


def vectors(count: int, width: int, seed: int) -> np.ndarray:
    """(count, width) float32 of unit length, in any direction."""
    out = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    out /= np.sqrt(np.vecdot(out, out))[:, None]
    return out


def in_turns(sides: dict[str, Callable[[], object]], threads: int) -> dict[str, list[float]]:
    """Seconds of each side, one round after another; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    for turn in range(ROUNDS + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def against_faiss(queries: np.ndarray, pool: np.ndarray, threads: int) -> list[dict]:
    """Queries per second over the largest pool: the top k alone, and with the ranks that an evaluation needs.

    A query's positive is one of its top k, any with the same chance: a rank among the last costs as much time again as the top k.
    """
    index = faiss.IndexFlatIP(WIDTH)
    index.add(pool)
    _, theirs = index.search(queries, DEPTH)
    ours = search.exact(queries, pool, DEPTH).rows
    if (agree := (ours == theirs).mean()) < 0.999:
        raise RuntimeError(f"the two sides do not find the same: {agree:.2%} of the places agree")
    relevant = np.random.default_rng(4).permuted(ours, axis=1)[:, :1].tolist()
    sides = {
        "faiss": lambda: index.search(queries, DEPTH),
        TOP: lambda: search.exact(queries, pool, DEPTH),
        RANKS: lambda: search.exact(queries, pool, DEPTH, relevant),
    }
    seconds = in_turns(sides, threads)
    rows = []
    for name in (TOP, RANKS):
        ratios = [a / b for a, b in zip(seconds["faiss"], seconds[name], strict=True)]
        rows.append(
            {
                "comparison": f"{name}, {threads} thread{'s' * (threads > 1)}",
                "against": "IndexFlatIP, which gives no ranks",
                "rounds": ROUNDS,
                "theirs per s": round(QUERIES / statistics.median(seconds["faiss"]), 1),
                "ours per s": round(QUERIES / statistics.median(seconds[name]), 1),
                "ratio": round(statistics.median(ratios), 2),
                "lowest ratio": round(min(ratios), 2),
                "highest ratio": round(max(ratios), 2),
                "target": TARGET if name == TOP else None,
                "met": statistics.median(ratios) >= TARGET if name == TOP else None,
            }
        )
    return rows


def growth(queries: np.ndarray, pool: np.ndarray) -> list[dict]:
    """Seconds per pool size, in turns."""
    seconds = in_turns({str(n): lambda n=n: search.exact(queries, pool[:n], DEPTH) for n in POOLS}, 1)
    return [{"pool": n, "seconds": round(statistics.median(seconds[str(n)]), 3)} for n in POOLS]


def write_pool(path: Path, rows: int) -> None:
    """A float16 .npy file, written in pieces; every piece is the first with its columns shifted."""
    piece = vectors(10_000, MEMORY_WIDTH, seed=2).astype(np.float16)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, MEMORY_WIDTH))
    for i, start in enumerate(range(0, rows, len(piece))):
        out[start : start + len(piece)] = np.roll(piece, i, axis=1)
    out.flush()


def search_file(path: Path) -> None:
    """Prints the most memory in MB that this process held of its own (RssAnon) while it searched one file.

    Pages of the mapped file come on top of it, but the kernel takes them back whenever it wants.
    """
    size, peak, done = len(np.load(path, mmap_mode="r")), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            peak.append(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024)

    watching = threading.Thread(target=watch)
    watching.start()
    relevant = [[i * (size // QUERIES)] for i in range(QUERIES)]
    search.exact(vectors(QUERIES, MEMORY_WIDTH, seed=3), np.load(path, mmap_mode="r"), DEPTH, relevant)
    done.set()
    watching.join()
    print(max(peak))


def memory(folder: Path) -> dict:
    """Peak memory over two pools on disk, each in a process of its own, and what that makes for the whole of M-BEIR."""
    peaks = {}
    for rows in MEMORY_POOLS:
        path = folder / f"{rows}.npy"
        write_pool(path, rows)
        command = [sys.executable, __file__, str(path)]
        peaks[rows] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        path.unlink()
    (few, low), (many, high) = peaks.items()
    whole = high + max(0, high - low) / (many - few) * (WHOLE - many)
    return {
        "comparison": f"peak memory of its own, {QUERIES} queries, top {DEPTH} and ranks, float16 pool on disk of width {MEMORY_WIDTH}",
        "pool MB": {str(n): n * MEMORY_WIDTH * 2 // 2**20 for n in peaks},
        "peak MB": {str(n): round(mb) for n, mb in peaks.items()},
        "bound MB": MEMORY_BOUND,
        "met": max(peaks.values()) < MEMORY_BOUND,
        f"peak MB scaled to {WHOLE:,} rows": round(whole),
        "bound MB for these": WHOLE_BOUND,
        "met for these": whole < WHOLE_BOUND,
    }


def search_costs(speed: pd.DataFrame, growth: pd.DataFrame, memory: pd.DataFrame) -> Figure:
    """Exact search: queries per second beside FAISS, seconds over pool size, peak memory beside size on disk.

    Args:
        speed: columns comparison, ours per s, theirs per s. growth: columns pool, seconds.
        memory: columns pool and peak, in MB; index: number of vectors.
    """
    figure, ((left, middle, right),) = figures.axes_of(columns=3, size=(10.5, 3.2))
    speed.plot.barh("comparison", ["ours per s", "theirs per s"], ax=left, width=0.8, color=[figures.BLUE, figures.GREY])
    left.set(xlabel="queries per second", ylabel="", title="Throughput")
    left.invert_yaxis()
    left.margins(x=0.3)
    left.legend(["ours", "FAISS, top k"], frameon=False, fontsize=7, loc="upper right")
    thousands, seconds = growth["pool"] / 1000, growth["seconds"]
    middle.plot(thousands, seconds, "o-", color=figures.BLUE, label="measured")
    proportional = growth["pool"] * (seconds.iloc[-1] / growth["pool"].iloc[-1])
    middle.plot(thousands, proportional, "--", color="grey", linewidth=0.8, label="proportional")
    middle.set(xlabel="pool, thousands of vectors", ylabel="seconds, 1 thread", title="Growth with the pool")
    middle.legend(frameon=False, fontsize=7)
    megabytes = memory.set_axis([f"{int(n):,}" for n in memory.index])
    megabytes.plot.bar(y=["pool", "peak"], ax=right, width=0.8, color=[figures.GREY, figures.BLUE], rot=0)
    right.set(xlabel="vectors on disk", ylabel="MB", title="Memory")
    right.margins(y=0.25)
    right.legend(["pool on disk", "peak of the process"], frameon=False, fontsize=7, loc="upper left")
    return figure


def main() -> None:
    distributed.start(PROFILE.threads)
    FOLDER.mkdir(parents=True, exist_ok=True)
    queries, pool = vectors(QUERIES, WIDTH, seed=0), vectors(max(POOLS), WIDTH, seed=1)
    speed = [row for threads in (1, 2) for row in against_faiss(queries, pool, threads)]
    seconds = growth(queries, pool)
    with tempfile.TemporaryDirectory() as folder:
        measured = {"speed": speed, "growth": seconds, "memory": memory(Path(folder))}
    files.write_whole(FOLDER / "search.json", json.dumps(measured, indent=1) + "\n")
    peaks = pd.DataFrame({"pool": measured["memory"]["pool MB"], "peak": measured["memory"]["peak MB"]})
    search_costs(pd.DataFrame(speed), pd.DataFrame(seconds), peaks).savefig(FOLDER / "search.png", dpi=110)
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    if sys.argv[1:]:
        search_file(Path(sys.argv[1]))
    else:
        main()
