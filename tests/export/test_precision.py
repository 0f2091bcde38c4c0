"""Stored vectors of fewer bytes: the codes of FAISS, what is scored again, and what the README says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings

from elva_core import cli
from elva_core.apps import answers
from elva_core.data import items as data_items
from elva_core.export import faiss_index, sentence_transformers
from elva_core.models import encoder
from elva_core.retrieval import cache, retriever, search
from elva_core.retrieval import pool as pools

UNIT = "emoji_task2"


def asked_of(pool) -> retriever.Embedded:
    """Forty queries, each a noisy copy of the one candidate that is right."""
    rng, vectors = np.random.default_rng(0), search.unit_rows(pool.vectors[:])
    rows = rng.permutation(len(vectors))[:40]
    noisy = vectors[rows] + rng.normal(size=(40, vectors.shape[1])) * 1.5 * vectors.std(0)
    queries = np.float32(noisy / np.linalg.norm(noisy, axis=1, keepdims=True))
    return retriever.Embedded(UNIT, "local", [], pool.candidates, rows[:, None].tolist(), queries, pool.vectors)


@pytest.fixture(scope="module")
def made(model_folder, smoke, root, tmp_path_factory):
    """(model, pool, judged queries, {precision: folder}); the pool is several row groups."""
    folder = tmp_path_factory.mktemp("precision")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cache, "EMBEDDINGS", folder / "kept")
        patched.setattr(faiss_index, "ROWS", 25)
        encoder.load(model_folder, smoke.encoder).save(folder / "model", stage="test", parent="none", dims=(20, 48))
        loaded = encoder.load(folder / "model")
        pool = pools.of_unit(loaded, root, UNIT, batch=64)
        judged = asked_of(pool)
        folders = {}
        for precision in ("float32", "int8", "binary"):
            folders[precision] = folder / precision
            faiss_index.write(loaded, pool, folders[precision], precision=precision, judged=judged)
    return loaded, pool, judged, folders


def codes(index) -> np.ndarray:
    """(C, bytes) of an index with ids."""
    binary = isinstance(index, faiss.IndexBinaryIDMap)
    stored = faiss.downcast_IndexBinary(index.index).xb if binary else faiss.downcast_index(index.index).codes
    return faiss.vector_to_array(stored).reshape(index.ntotal, -1)


def test_int8_codes_are_sentence_transformers(made):
    _, pool, _, folders = made
    found = codes(faiss.read_index(str(folders["int8"] / faiss_index.FAISS))).astype(int)
    vectors = search.unit_rows(pool.vectors[:])
    wanted = quantize_embeddings(vectors, "uint8", calibration_embeddings=vectors).astype(int)
    assert found.shape == wanted.shape == vectors.shape and len(np.unique(wanted)) > 200
    assert abs(found - wanted).max() <= 1 and (found == wanted).mean() > 0.99  # a number between two codes


def test_binary_codes_are_sentence_transformers_and_any_dim_is_stored(made, tmp_path):
    loaded, pool, _, folders = made
    vectors = search.unit_rows(pool.vectors[:])
    found = codes(faiss.read_index_binary(str(folders["binary"] / faiss_index.FAISS)))
    np.testing.assert_array_equal(found, quantize_embeddings(vectors, "ubinary"))
    odd = pools.Pool(pool.unit, pool.kind, pool.candidates, search.Prefixes(pool.vectors, 20), pool.template, None)
    faiss_index.write(loaded, odd, tmp_path / "odd", precision="binary")
    found = codes(faiss.read_index_binary(str(tmp_path / "odd" / faiss_index.FAISS)))
    np.testing.assert_array_equal(found, quantize_embeddings(odd.vectors[:], "ubinary"))
    assert found.shape[1] == 3


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_a_search_scores_the_first_candidates_again(made, root, precision):
    """Against brute force over the codes, one query at a time."""
    loaded, pool, _, folders = made
    opened, vectors, k = faiss_index.opened(folders[precision], loaded, root), search.unit_rows(pool.vectors[:]), 3
    n = faiss_index.RESCORED * k
    low, span = vectors.min(0), np.ptp(vectors, axis=0)
    for text in ("A dog.", "Two flags.", "Something red."):
        query = retriever.encode(loaded, [data_items.Item(text)], batch=1)[0][0]
        if precision == "binary":
            near = -((vectors > 0) != (query > 0)).sum(1)
        else:
            near = (low + (np.floor((vectors - low) / span * 255).clip(0, 255) + 0.5) / 255 * span) @ query
        rows = opened.first(query[None], k)[0]
        assert len(set(rows.tolist())) == n and (np.diff(rows) > 0).all()
        assert np.sort(near[rows])[::-1] == pytest.approx(np.sort(near)[::-1][:n], abs=1e-5)
        best = rows[np.argsort(-(vectors[rows].astype(np.float64) @ query), kind="stable")[:k]]
        found = answers.search(loaded, opened, text, k=k).table()
        assert found["did"].tolist() == [pool.candidates[int(row)].did for row in best]
        np.testing.assert_allclose(found["score"], vectors[best] @ query, atol=1e-6)
    whole = len(pool.candidates)  # more answers than the pool has: all of it, in the order of float32
    found, exact = (answers.search(loaded, where, "A dog.", k=whole).table()[["did", "score"]] for where in (opened, pool))
    assert found.equals(exact)


def table(folder) -> pd.DataFrame:
    lines = [line.strip("| ").split(" | ") for line in (folder / faiss_index.README).read_text().splitlines() if line.startswith("|")]
    return pd.DataFrame(lines[2:], columns=lines[0]).set_index("vectors").astype(float)


@pytest.mark.parametrize(("precision", "size"), [("int8", 48), ("binary", 6)])
def test_the_readme_has_bytes_and_hit_rates_beside_those_of_float32(made, precision, size):
    loaded, pool, judged, folders = made
    shown = table(folders[precision])
    assert shown["bytes per vector"].tolist() == [192, size, size]
    queries, vectors = search.unit_rows(judged.query_vectors[:]), search.unit_rows(pool.vectors[:])
    exact = np.argsort(-(queries.astype(np.float64) @ vectors.T), axis=1, kind="stable").tolist()
    first = faiss_index.opened(folders[precision], loaded).first(queries, 10)
    again = [[row for row in rows if row in few] for rows, few in zip(exact, first, strict=True)]
    assert first.shape == (40, 40) and len(shown.columns) == 4
    for name, ranked in {"float32": exact, f"{precision}, first 40 scored again with float32": again}.items():
        for k in (1, 5, 10):
            hit = np.mean([bool(set(rows[:k]) & set(rel)) for rows, rel in zip(ranked, judged.relevant, strict=True)])
            assert shown.loc[name, f"hit@{k}"] == round(100 * hit, 1)
    assert 0 < shown.loc[precision, "hit@1"] <= shown.loc["float32", "hit@1"] + 10 and 0 < shown.loc["float32", "hit@1"] < 100
    assert not (folders["float32"] / faiss_index.README).exists()
    code = re.search(r"```python\n(.*?)```", (folders[precision] / faiss_index.README).read_text(), re.DOTALL)[1]
    names = {"faiss": faiss, "np": np, "queries": queries}
    exec(code.replace(f'"{faiss_index.FAISS}"', repr(str(folders[precision] / faiss_index.FAISS))), names)
    assert names["ids"].shape == (len(queries), 40)


def test_the_command_line_exports_prefixes_in_few_bytes_and_searches_them(made, root, tmp_path, monkeypatch, capsys):
    loaded, pool, _, _ = made
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    common = ["--model", loaded.source, "--root", str(root.folder), "--unit", UNIT, "--profile", "smoke"]
    asked = ["export", "--index", *common, "--precision", "binary", "--truncate-dim", "20"]
    assert cli.main([*asked, "--to", "index"]) == 0
    assert "candidates in README.md, candidates.parquet, index.faiss, manifest.json" in capsys.readouterr().out
    content = json.loads((tmp_path / "index/manifest.json").read_text())
    assert (content["dim"], content["precision"]) == (20, "binary") and table(tmp_path / "index")["bytes per vector"].tolist() == [80, 3, 3]
    assert cli.main(["search", "--index", "index", "--no-pictures", "--k", "2", "a dog", "--profile", "smoke"]) == 0
    shown = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.strip()[0].isdigit()]
    short = search.Prefixes(pool.vectors, 20)[:]
    query = search.Prefixes(retriever.encode(loaded, [data_items.Item("A dog.")], batch=1)[0], 20)[:][0]
    first = np.argsort(((short > 0) != (query > 0)).sum(1), kind="stable")
    assert len(shown) == 2 and all(did in {pool.candidates[int(row)].did for row in first[:20]} for did in shown)
    assert cli.main([*asked[:-1], "16", "--to", "other"]) == 1
    assert "trained at dims [20, 48], so 16 numbers" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_without_faiss_few_bytes_are_refused_and_a_written_index_is_searched_exactly(made, tmp_path, monkeypatch):
    loaded, pool, _, folders = made
    monkeypatch.setattr(faiss_index.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="int8 vectors are an index of faiss, which is not installed"):
        faiss_index.write(loaded, pool, tmp_path / "index", precision="int8")
    assert not (tmp_path / "index").exists() and faiss_index.opened(folders["int8"], loaded).first is None


def test_an_export_is_cut_by_sentence_transformers_when_asked_or_by_itself(made, tmp_path):
    loaded, _, _, _ = made
    texts = ["A dog.", "A woman is running."]
    whole = retriever.encode(loaded, [data_items.Item(text) for text in texts], batch=2)[0]
    plain = sentence_transformers.sentence_transformer(Path(loaded.source), tmp_path / "plain")
    cut = sentence_transformers.sentence_transformer(Path(loaded.source), tmp_path / "cut", truncate_dim=20)
    for folder, given, size in ((plain, {}, 48), (plain, {"truncate_dim": 20}, 20), (cut, {}, 20), (cut, {"truncate_dim": 48}, 48)):
        model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **given)
        assert model.get_embedding_dimension() == size
        expected = search.Prefixes(whole, size)[:]
        np.testing.assert_allclose(model.encode(texts, normalize_embeddings=True), expected, atol=1e-5)
    card = json.loads((plain / "elva.json").read_text())
    assert card["dims"] == [20, 48] and "truncate_dim=20" in (plain / "README.md").read_text()
    with pytest.raises(ValueError, match="model was trained at dims"):
        sentence_transformers.sentence_transformer(Path(loaded.source), tmp_path / "no", truncate_dim=16)
