"""Embeddings on disk under two real processes at one folder: no order of their writes gives an item another's vector."""

from __future__ import annotations

import multiprocessing
import time
from types import SimpleNamespace

import numpy as np
import pytest

from elva_core import distributed
from elva_core.data import mbeir
from elva_core.data.items import Item
from elva_core.retrieval import cache

FORK = multiprocessing.get_context("fork")  # a process in milliseconds: nothing is imported again
ENCODER = SimpleNamespace(
    source="none/none", settings=SimpleNamespace(model_dump_json=lambda: "{}"), backbone=SimpleNamespace(dtype="float32")
)
SHARD = 4


def expected(items) -> np.ndarray:
    return np.stack([np.random.default_rng(mbeir.stable_hash(item.text)).normal(size=8) for item in items]).astype(np.float16)


def parts_of(*name) -> list[list[Item]]:
    return [[Item(f"{name} {part} {n}") for n in range(SHARD)] for part in range(10)]


@pytest.fixture
def embedded(monkeypatch) -> list[Item]:
    """What this process embeds; what another one embeds is not seen here."""
    seen: list[Item] = []

    def encode(encoder, items, *, batch, template):
        seen.extend(items)
        return expected(items).astype(np.float32), [""] * len(items)

    monkeypatch.setattr(cache, "encode", encode)
    monkeypatch.setattr(cache, "SHARD", SHARD)
    distributed.processes()  # made once, before the others are forked
    return seen


@pytest.fixture
def opened(embedded, tmp_path):
    return lambda name: cache.Store(tmp_path / name, ENCODER, batch=SHARD, template="eol")


def test_a_kill_at_any_moment_loses_and_swaps_nothing_that_was_kept(opened, embedded):
    """And each of the two finds its own vectors while the other one writes."""
    rng = np.random.default_rng(0)
    kept_by_kills = 0
    for trial in range(20):
        done = FORK.RawArray("i", 2)  # no lock, which a killed process would keep

        def work(place, trial=trial, done=done):
            store = opened(str(trial))
            for items in parts_of(trial, place):
                assert np.array_equal(store(items)[:], expected(items))
                done[place] += 1

        two = [FORK.Process(target=work, args=(place,)) for place in range(2)]
        for one in two:
            one.start()
        time.sleep(rng.uniform(0.01, 0.06))
        for one in two:
            one.kill()
            one.join()
        assert {one.exitcode for one in two} <= {0, -9}
        everything = [item for place in range(2) for items in parts_of(trial, place) for item in items]
        embedded.clear()
        assert np.array_equal(opened(str(trial))(everything)[:], expected(everything))
        assert len(embedded) <= len(everything) - SHARD * sum(done)
        kept_by_kills += sum(done)
    assert kept_by_kills  # the moments were not all too early
