"""Scoring a root as M-BEIR does: the same hit rates as UniIR, embeddings that are kept, tables and files."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pandas as pd
import pytest

from conftest import ODD_NAMES
from elva_core import config
from elva_core.data import mbeir
from elva_core.data.mbeir import Candidate, Query
from elva_core.evaluation import benchmark
from elva_core.retrieval import cache, metrics, retriever
from elva_core.tables import markdown_table

# unit -> task and size of its pool; OVEN and InfoSeek judge each other's passages
UNITS = {"mscoco_task0": (9, 0, 40), "oven_task6": (5, 6, 40), "infoseek_task6": (6, 6, 40)}


@pytest.fixture
def official(tmp_path) -> mbeir.Root:
    """A small root with the names, ids, cross-links and MSCOCO's pool of M-BEIR; its images do not exist."""
    root, rng, everything = mbeir.Root(tmp_path / "M-BEIR"), np.random.default_rng(0), []
    lines = ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4"]
    for unit, (dataset, task, size) in UNITS.items():
        asked, wanted = mbeir.MODALITIES_OF[task]
        content = {"image": lambda n: (None, f"i/{n}.jpg"), "text": lambda n, d=dataset: (f"Passage {d} {n}.", None)}[wanted]
        pool = [Candidate(f"{dataset}:{n}", *content(n), wanted) for n in rng.permutation(size) + 1]
        everything += pool
        queries = []
        for n in range(1, 31):
            positives = [f"{dataset}:{i}" for i in rng.permutation(size)[: rng.integers(1, 4)] + 1]
            if dataset in (5, 6):
                positives += [f"{11 - dataset}:{i}" for i in rng.permutation(size)[:2] + 1]
            image = f"q/{dataset}-{n}.jpg" if "image" in asked else None
            queries.append(Query(f"{dataset}:{2 * n}", f"Question {n}?", image, asked, tuple(positives), (), task))
        root.write_queries(unit, "test", queries)
        name = f"mbeir_{unit}_test_cand_pool.jsonl" if "mscoco" in unit else f"mbeir_{unit}_cand_pool.jsonl"
        mbeir.write_records(root.folder / "cand_pool/local" / name, pool)
        prompts = "\t".join(f"Prompt {i} of {unit}" for i in range(4))
        lines.append(f"{asked}\t{wanted}\t{unit}\t{dataset}\t{prompts}")
    root.write_global_pool("test", everything)
    (root.folder / "instructions").mkdir()
    (root.folder / "instructions/query_instructions.tsv").write_text("\n".join(lines) + "\n")
    return root


def vector(item) -> np.ndarray:
    drawn = np.random.default_rng(mbeir.stable_hash(item.text, item.image and item.image.name)).normal(size=16).astype(np.float32)
    return drawn / np.linalg.norm(drawn)


@pytest.fixture
def encoded(monkeypatch) -> list:
    """Embeds items by their content alone; lists what was embedded."""
    seen: list = []

    def encode(encoder, items, *, batch, template):
        seen.extend(items)
        return np.stack([vector(item) for item in items]), [""] * len(items)

    monkeypatch.setattr(cache, "encode", encode)
    return seen


@pytest.fixture
def wanted() -> config.EvaluationSettings:
    return config.load("qwen2vl-2b").evaluation.model_copy(update={"bootstrap": 10, "cutoffs": (1, 5, 10)})


def searcher(tiny, root, wanted, tmp_path):
    kept = cache.Store(tmp_path / "kept", tiny, batch=4, template="summary")
    return retriever.Searcher(tiny, root, "test", wanted, store=kept)


def as_uniir(root: mbeir.Root, unit: str, pool: str, k: int, asked: retriever.Searcher) -> float:
    """UniIR's own evaluation, as its code has it: hashed ids, float16 on disk, faiss, R@k as a hit."""

    def saved(vectors):
        out = np.array(vectors, np.float16).astype(np.float32)
        faiss.normalize_L2(out)
        return out

    records = [json.loads(line) for line in root.pool_path(unit, "test", pool).read_text().splitlines()]
    dids = [int(d) * 10_000_000 + int(n) for d, n in (r["did"].split(":") for r in records)]
    candidates = [Candidate(r["did"], r["txt"], r["img_path"], r["modality"]) for r in records]
    index = faiss.index_factory(16, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    index.add_with_ids(saved([vector(retriever.candidate_item(root, c)) for c in candidates]), np.array(dids))
    queries = list(root.queries(unit, "test"))
    _, found = index.search(saved([vector(asked.query(q, unit)) for q in queries]), k)
    judged: dict[str, set[str]] = {}
    for line in root.qrels_path(unit, "test").read_text().splitlines():
        qid, _, did, relevance, _ = line.split()
        if int(relevance) > 0:
            judged.setdefault(qid, set()).add(did)
    names = [{f"{i // 10_000_000}:{i % 10_000_000}" for i in row} for row in found.tolist()]
    hits = [bool(names[i] & judged[q.qid]) for i, q in enumerate(queries)]
    return round(sum(hits) / len(hits), 4)


def test_hit_rates_are_uniirs_on_local_and_global_pools(tiny, official, wanted, encoded, tmp_path):
    asked = searcher(tiny, official, wanted, tmp_path)
    results = benchmark.score(asked, official.units("test"), ("local", "global"), tmp_path / "out", model="m")
    compared = {}
    for (unit, pool), own in results.groupby(["unit", "pool"]):
        for k in (1, 5, 10):
            ours = own.set_index("metric").loc[f"hit@{k}", "value"]
            assert round(ours, 4) == as_uniir(official, unit, pool, k, asked)
            compared[unit, pool, k] = ours
    assert len(compared) == 18 and min(compared["oven_task6", p, 10] for p in ("local", "global")) > 0
    # passages of the other dataset count only where they are in the pool
    assert compared["oven_task6", "local", 10] != compared["oven_task6", "global", 10]


def test_everything_is_embedded_once_whatever_asks_and_however_often_it_is_killed(tiny, official, wanted, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 16)
    writing = cache.Store._write

    def dies(own, names, vectors):
        if len(own._files) == 5:
            raise KeyboardInterrupt
        writing(own, names, vectors)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cache.Store, "_write", dies)
        benchmark.score(
            searcher(tiny, official, wanted, tmp_path), official.units("test"), ("local", "global"), tmp_path / "out", model="m"
        )
    lost = encoded[16 + 14 + 16 + 16 + 8 :]  # five shards were kept, the sixth was being written
    del encoded[-len(lost) :]
    for _ in range(2):
        asked = searcher(tiny, official, wanted, tmp_path)
        benchmark.score(asked, official.units("test"), ("local", "global"), tmp_path / "out", model="m")
    assert lost and len(encoded) == len(set(encoded)) == 3 * 30 + 3 * 40
    in_memory = retriever.Searcher(tiny, official, "test", wanted)
    items = [asked.query(q, "oven_task6") for q in official.queries("oven_task6", "test")]
    kept = asked.vectors(items)
    np.testing.assert_allclose(kept[:], [vector(i) for i in items], atol=1e-3)
    assert in_memory.query(official.queries("oven_task6", "test")[0], "oven_task6") == items[0]


def test_a_unit_that_was_scored_is_not_ranked_again_but_a_changed_one_is(tiny, own_root, wanted, encoded, tmp_path, monkeypatch):
    units, ranked = own_root.units("test")[:2], []
    rank = retriever.Searcher.rank
    monkeypatch.setattr(retriever.Searcher, "rank", lambda self, asked: ranked.append(asked.unit) or rank(self, asked))

    def run():
        ranked.clear(), encoded.clear()
        benchmark.score(searcher(tiny, own_root, wanted, tmp_path), units, ("local",), tmp_path / "out", model="m")
        return list(ranked), len(encoded)

    assert run()[0] == units and run() == ([], 0)
    image = own_root.image_path(next(c.image for c in own_root.pool(units[0], "test")))
    os.utime(image, ns=(1, 1))
    assert run() == ([units[0]], 1)
    path = own_root.qrels_path(units[1], "test")
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, *rest, first.split()[0] + " 0 " + rest[-1].split()[2] + " 1 1"]) + "\n")
    assert run() == ([units[1]], 0)


def test_embeddings_in_memory_score_as_those_on_disk_do_and_again_when_they_change(tiny, official, wanted, tmp_path, monkeypatch):
    ranked, rank, scale = [], retriever.Searcher.rank, np.ones(16, np.float32)
    monkeypatch.setattr(retriever.Searcher, "rank", lambda self, asked: ranked.append(asked.unit) or rank(self, asked))

    def embed(items):
        return np.stack([vector(item).astype(np.float16) for item in items]) * scale

    def run():
        ranked.clear()
        asked = retriever.Searcher(tiny, official, "test", wanted, store=embed)
        results = benchmark.score(asked, ["oven_task6"], ("local",), tmp_path / "memory", model="m")
        return results, list(ranked)

    results, first = run()
    assert first == ["oven_task6"] and run()[1] == []
    monkeypatch.setattr(cache, "encode", lambda encoder, items, **_: (np.stack([vector(i) for i in items]), [""] * len(items)))
    kept = benchmark.score(searcher(tiny, official, wanted, tmp_path), ["oven_task6"], ("local",), tmp_path / "disk", model="m")
    pd.testing.assert_frame_equal(results, kept)
    scale[:] = -1
    assert run()[1] == ["oven_task6"]


def test_the_sixteen_columns_come_in_the_papers_order_and_average_only_if_all_are_there():
    def results(units):
        rows = [("m", u, "local", f"hit@{mbeir.OFFICIAL_UNITS.get(u, 5)}", 0.01 * i) for i, u in enumerate(units, start=1)]
        return pd.DataFrame(rows, columns=["model", "unit", "pool", "metric", "value"])

    all_units = list(mbeir.OFFICIAL_UNITS)
    table = benchmark.official_table(results([*all_units[::-1], "zoo_task0"]))
    columns = [f"{u} @{k}" for u, k in mbeir.OFFICIAL_UNITS.items()]
    assert list(table.columns) == ["model", "pool", *columns, "zoo_task0 @5", "Avg"]
    assert table.loc[0, "Avg"] == pytest.approx(8.5) and table.loc[0, columns[0]] == pytest.approx(16.0)
    partial = benchmark.official_table(results(all_units[:15]))
    assert partial.loc[0, "Avg"] == "partial" and markdown_table(partial).strip().endswith("|  | partial |")


def test_the_share_of_wrong_modalities_is_that_of_the_first_answers():
    candidates = [Candidate("1:1", "a", None, "text"), Candidate("1:2", None, "b", "image")]
    queries = [SimpleNamespace(task=0, qid="1:1"), SimpleNamespace(task=1, qid="1:2"), SimpleNamespace(task=0, qid="1:3")]
    top = np.array([[0, 1], [0, 1], [1, 0]])  # asked for an image, a text, an image
    result = retriever.UnitResult("u", "global", queries, [[1]] * 3, [[1]] * 3, [1] * 3, top, np.zeros((3, 2)), candidates)
    assert result.wrong_modality().tolist() == [1.0, 0.0, 0.0]
    table = pd.DataFrame(result.table((1,), 10, 0)).set_index("metric")
    assert table.loc["wrong modality@1", "value"] == pytest.approx(1 / 3)


def test_files_of_the_ranked_lists(tiny, official, wanted, encoded, tmp_path):
    asked = searcher(tiny, official, wanted, tmp_path)
    benchmark.score(asked, ["oven_task6"], ("local", "global"), tmp_path / "out", model="m")
    names = {p.name: p.read_text().splitlines() for p in (tmp_path / "out/runs").iterdir()}
    assert set(names) == {
        "mbeir_oven_task6_single_pool_test_k10_run.txt", "mbeir_oven_task6_union_pool_test_k10_run.txt",
        "oven_task6_local_trec.txt", "oven_task6_global_trec.txt", "oven_task6_qrels_trec.txt",
    }  # fmt: skip
    columns = {"mbeir_oven_task6_union_pool_test_k10_run.txt": 7, "oven_task6_global_trec.txt": 6, "oven_task6_qrels_trec.txt": 4}
    assert all(len(line.split()) == columns[name] for name in columns for line in names[name])
    first = names["oven_task6_global_trec.txt"][:10]
    assert [line.split()[3] for line in first] == [str(i) for i in range(1, 11)]
    scores = [float(line.split()[4]) for line in first]
    assert scores == sorted(scores, reverse=True)
    ranked = [line.split()[2] for line in first]
    hit = any(d in official.qrels("oven_task6", "test")[first[0].split()[0]] for d in ranked[:5])
    (result,) = [asked.evaluate("oven_task6", pool="global")]
    assert metrics.hit_rate_at_k(result.ranks, 5)[0] == hit
    (row,) = benchmark.prompt_spread(asked, ["oven_task6"], 5).to_dict("records")
    assert row["lowest"] <= row["mean"] <= row["highest"] and row["lowest"] < row["highest"]


def contents(folder) -> dict[str, str]:
    """Every file of a folder but the judgements, which are the root's."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "qrels" not in path.name]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def test_the_same_folder_again_holds_what_the_last_call_writes_into_a_new_one(tiny, official, wanted, tmp_path, interrupted):
    def call(out, model, sign, units=("oven_task6", "mscoco_task0"), pools=("local", "global"), cutoffs=(1, 5, 10)):
        def embed(items, sign=1):
            return np.stack([vector(item) for item in items]) * np.float32(sign)

        settings = wanted.model_copy(update={"cutoffs": cutoffs})
        asked = retriever.Searcher(tiny, official, "test", settings, store=lambda items: embed(items, sign), embed_pool=embed)
        return benchmark.score(asked, units, pools, out, model=model)

    calls = [("a", 1), ("a", -1), ("a", 1), ("b", 1), ("b", 1, ("oven_task6",), ("local",)), ("b", 1, ("oven_task6",), ("local",), (1, 5))]
    for number, one in enumerate(calls):
        results = call(tmp_path / "again", *one)
        call(tmp_path / str(number), *one)
        assert contents(tmp_path / "again") == contents(tmp_path / str(number)), one
        assert set(results["model"]) == {one[0]}
    with interrupted(retriever.Searcher, "rank", 2):
        call(tmp_path / "again", "c", 1)
    left = contents(tmp_path / "again")
    assert not {"results.csv", "table.csv", "table.md"} & set(left)  # they would tell of another model than the lists do
    assert {line.split()[5] for name, text in left.items() if "runs/" in name for line in text.splitlines()} == {"c"}


@pytest.mark.parametrize("name", [*ODD_NAMES, "", " "])
def test_every_name_of_a_model_stands_in_its_tables_and_leaves_run_files_their_columns(name, tiny, official, wanted, encoded, tmp_path):
    for _ in range(2):  # written, and read back
        results = benchmark.score(searcher(tiny, official, wanted, tmp_path), ["oven_task6"], ("local",), tmp_path / "out", model=name)
        assert set(results["model"]) == {name} and len(benchmark.official_table(results)) == 1
    assert f"| {name} | local |" in (tmp_path / "out/table.md").read_text()
    for path in (tmp_path / "out/runs/oven_task6_local_trec.txt", *(tmp_path / "out/runs").glob("mbeir_*")):
        lines = [line.removesuffix("\n").split(" ") for line in path.open()]
        assert {len(line) for line in lines} == {7 if "mbeir" in path.name else 6} and all(all(line) for line in lines)
        assert not any("\t" in line[5] for line in lines)


def test_a_unit_or_pool_that_is_named_twice_counts_once(tiny, official, wanted, encoded, tmp_path):
    once, twice = (
        benchmark.score(searcher(tiny, official, wanted, tmp_path), units, pools, tmp_path / str(len(units)), model="m")
        for units, pools in ((["oven_task6"], ("local",)), (["oven_task6"] * 2, ("local",) * 2))
    )
    pd.testing.assert_frame_equal(once, twice)


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_a_folder_that_cannot_hold_results_is_refused_before_anything_is_embedded(kind, tiny, official, wanted, encoded, tmp_path):
    with tempfile.TemporaryDirectory() as place:  # where another user may look
        out = Path(place) / "out"
        if kind == "read-only":
            out.mkdir(mode=0o555)
        else:
            out.write_text("years of work")
        out = out / "deeper" if kind == "below a file" else out
        user = os.geteuid()
        Path(place).chmod(0o755)
        asked = searcher(tiny, official, wanted, tmp_path)
        os.seteuid(user or 65_534)  # root may write anywhere
        try:
            with pytest.raises(ValueError, match=r"out.* cannot hold the results \(.+\); name another folder"):
                benchmark.score(asked, ["oven_task6"], ("local",), out, model="m")
        finally:
            os.seteuid(user)
        assert not encoded


def test_the_gap_of_unseen_compositions_has_the_interval_of_a_difference_of_two_independent_means():
    rng = np.random.default_rng(0)
    unseen = np.repeat([True, False], [400, 1600])
    hits = pd.DataFrame({"model": "m", "unseen": unseen, "hit@5": (rng.random(2000) < np.where(unseen, 0.3, 0.5)).astype(float)})
    (row,) = benchmark.composition_gaps(hits, 5, 2000, 0).to_dict("records")
    groups = hits.groupby("unseen")["hit@5"]
    means, variances = groups.mean(), groups.var(ddof=0)
    half = 1.96 * np.sqrt(variances[True] / 400 + variances[False] / 1600)
    assert row["value"] == pytest.approx(means[True] - means[False]) and row["n"] == 2000
    assert row["value"] - row["ci_low"] == pytest.approx(half, rel=0.1) and row["ci_high"] - row["value"] == pytest.approx(half, rel=0.1)
    assert benchmark.composition_gaps(hits[unseen], 5, 10, 0).empty
