"""The exported benchmark: what a stranger loads from the folder is what the M-BEIR root holds, and the card says how it was made."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from elva_core.data import mbeir
from elva_core.mrbench import annotate, dataset_card, verify


@pytest.fixture
def written(built, smoke, tmp_path):
    def make(settings=smoke, accept=""):
        agreement = verify.agreement(built[2].assign(accept=accept), settings.mrbench.precision)
        dataset_card.write(built[0], tmp_path / "dataset", settings, built[1], agreement)
        return tmp_path / "dataset", (tmp_path / "dataset/README.md").read_text()

    return make


def test_a_stranger_loads_queries_with_their_images_and_the_corpus(built, written, tmp_path):
    bench, folder = built[0], written()[0]
    queries = datasets.load_dataset(str(folder), "queries", split="train", cache_dir=str(tmp_path / "cache"))
    expected = [(unit, q) for unit in bench.units("test") for q in bench.queries(unit, "test")]
    assert len(queries) == len(expected) == 32
    for row, (unit, q) in zip(queries, expected, strict=True):
        assert (row["unit"], row["qid"], row["text"], row["positives"]) == (unit, q.qid, q.text, list(q.positives))
        assert [(g["kind"], g["text"]) for g in row["grains"]] == mbeir.grains(q)
        assert (row["image"] is None) == (q.image is None)
    row, (_, q) = next((r, e) for r, e in zip(queries, expected, strict=True) if e[1].image)
    assert np.array_equal(np.asarray(row["image"].convert("RGBA")), np.asarray(Image.open(bench.image_path(q.image)).convert("RGBA")))
    corpus = datasets.load_dataset(str(folder), "corpus", split="train", cache_dir=str(tmp_path / "cache"))
    pools = [(unit, c) for unit in bench.units("test") for c in bench.pool(unit, "test")]
    assert [(r["unit"], r["did"], r["text"], r["image"]) for r in corpus] == [(u, c.did, c.text, c.image) for u, c in pools]


def test_the_card_has_a_header_counts_licence_and_who_checked(built, written, smoke):
    _, text = written()
    header = yaml.safe_load(text.split("---")[1])
    assert {c["config_name"]: c["data_files"] for c in header["configs"]} == {"queries": "queries.parquet", "corpus": "corpus.parquet"}
    for row in built[1].itertuples(index=False):
        assert f"| {' | '.join(map(str, row))} |" in text
    assert smoke.mrbench.licence in text and "Not verified" in text and "no model guessed" in text
    assert f"holds {sum(1 for p in (built[0].folder / 'mbeir_images').rglob('*.png')):,} images" in text
    half = ["yes", "no"] * (len(built[2]) // 2)
    assert "accepted 6 of 12 sampled queries: 50.0 %" in written(accept=half)[1]


def test_the_card_names_the_model_and_its_prompt(written, smoke):
    model = smoke.changed({"mrbench": {"annotator": {"kind": "openai", "model": "Some-VL", "base_url": "x"}}})
    text = written(model)[1]
    assert "Some-VL" in text and annotate.prompt_hash() in text
