"""A pool's embeddings leave as files, and are searched there as they are here."""

from __future__ import annotations

import json
import re
import shutil

import datasets
import faiss
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from elva_core import cli
from elva_core.apps import answers
from elva_core.data import items, mbeir
from elva_core.export import faiss_index, hub
from elva_core.files import ElvaDataError
from elva_core.models import encoder
from elva_core.models.lineage import lineage
from elva_core.retrieval import cache, retriever, search
from elva_core.retrieval import pool as pools

UNIT = "emoji_task2"  # candidates with image and text


@pytest.fixture(scope="module")
def made(model_folder, smoke, root, tmp_path_factory):
    """(model, pool, folder of its index); several row groups, the last one short."""
    folder = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cache, "EMBEDDINGS", folder / "kept")
        patched.setattr(faiss_index, "ROWS", 25)
        encoder.load(model_folder, smoke.encoder).save(folder / "model", stage="test", parent="none")
        loaded = encoder.load(folder / "model")
        pool = pools.of_unit(loaded, root, UNIT, batch=64)
        assert len(pool.candidates) % faiss_index.ROWS
        faiss_index.write(loaded, pool, folder / "index")
    return loaded, pool, folder / "index"


@pytest.fixture
def own(made, tmp_path):
    """An index the test may damage."""
    return shutil.copytree(made[2], tmp_path / "index")


@pytest.fixture(scope="module")
def queries(made, root):
    loaded, _, _ = made
    return retriever.encode(loaded, [items.query_item(root, q) for q in root.queries(UNIT, "test")], batch=32)[0]


def test_the_parquet_file_holds_the_pool_row_by_row(made, root):
    _, pool, folder = made
    table = pd.read_parquet(folder / faiss_index.CANDIDATES)
    raw = [json.loads(line) for line in root.pool_path(UNIT, "test").read_text().splitlines()]
    for column, key in {"did": "did", "modality": "modality", "text": "txt", "image": "img_path"}.items():
        assert table[column].astype(object).where(table[column].notna(), None).tolist() == [r[key] for r in raw]
    np.testing.assert_allclose(np.stack(table["vector"]), pool.vectors[:], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(np.stack(table["vector"]), axis=1), 1, atol=1e-6)
    again = datasets.Dataset.from_parquet(str(folder / faiss_index.CANDIDATES), cache_dir=str(folder.parent / "cache"))
    assert again["did"][:] == table["did"].tolist() and np.array_equal(again.with_format("numpy")["vector"][:], np.stack(table["vector"]))
    assert all((root.folder / path).is_file() for path in table["image"].dropna())


def test_faiss_and_the_opened_index_rank_as_our_search_does(made, queries):
    loaded, pool, folder = made
    k = 10
    wanted = search.exact(queries, pool.vectors, k)
    scores, ids = faiss.read_index(str(folder / faiss_index.FAISS)).search(queries, k)
    np.testing.assert_allclose(scores, wanted.scores, atol=1e-6)
    ours = [[pool.candidates[int(row)].did for row in rows] for rows in wanted.rows]
    theirs = [[mbeir.unhashed_candidate_id(int(i)) for i in row] for row in ids]
    tie = 5e-7  # of float32 sums of unit vectors: closer answers may change places
    assert np.median(-np.diff(wanted.scores)) > 10 * tie
    for mine, other, value in zip(ours, theirs, wanted.scores, strict=True):
        for left, right, score in zip(mine, other, value, strict=True):
            assert left == right or abs((value[mine.index(right)] if right in mine else value[-1]) - score) < tie
    opened = faiss_index.opened(folder, loaded)
    found = search.exact(queries, opened.vectors, k)
    np.testing.assert_array_equal(found.rows, wanted.rows)
    np.testing.assert_array_equal(found.scores, wanted.scores)


def test_rows_of_an_opened_index_come_in_any_order(made):
    loaded, pool, folder = made
    opened, size = faiss_index.opened(folder, loaded), len(pool.candidates)
    whole = opened.vectors[:]
    for rows in (slice(20, 60), slice(size, None), np.array([size - 1, 0, 26, 26, 24])):
        assert np.array_equal(opened.vectors[rows], whole[rows]) or (opened.vectors[rows].size == whole[rows].size == 0)
    plain = [mbeir.Candidate(c.did, c.text, c.image, c.modality) for c in pool.candidates]
    assert opened.candidates[:] == plain and opened.candidates[-1] == plain[-1]


def test_the_manifest_says_what_it_is_and_nothing_of_this_machine(made, root):
    loaded, pool, folder = made
    found = faiss_index.manifest(folder)
    assert (found["template"], found["unit"], found["pool"]) == ("summary", UNIT, "local")
    assert (found["dim"], found["count"]) == (pool.vectors[:1].shape[1], len(pool.candidates))
    assert found["model"] == lineage(loaded.source)[-1]
    assert "/tmp" not in (folder / faiss_index.MANIFEST).read_text() and not any(
        str(v).startswith("/") for v in found["made_from"].values()
    )
    assert faiss_index.place_of(folder, found["made_from"]["root"]).samefile(root.folder)
    assert faiss_index.place_of(folder, "../nowhere") is None and faiss_index.place_of(folder, "") is None


def test_an_index_is_whole_or_not_there(made, tmp_path, monkeypatch):
    loaded, pool, _ = made
    with monkeypatch.context() as patched:
        patched.setattr(faiss_index, "_write_faiss", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            faiss_index.write(loaded, pool, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    assert set(faiss_index.write(loaded, pool, tmp_path / "index")) == {p.name for p in (tmp_path / "index").iterdir()}
    faiss_index.write(loaded, pool, tmp_path / "index")  # its own kind is replaced
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years")
    with pytest.raises(hub.PublishError, match="holds other files"):
        faiss_index.write(loaded, pool, tmp_path / "thesis")


def test_without_faiss_the_rest_is_written(made, tmp_path, monkeypatch):
    loaded, pool, _ = made
    monkeypatch.setattr(faiss_index.importlib.util, "find_spec", lambda name: None)
    assert faiss_index.write(loaded, pool, tmp_path / "index") == [faiss_index.CANDIDATES, faiss_index.MANIFEST]
    assert len(faiss_index.opened(tmp_path / "index", loaded).candidates) == len(pool.candidates)


def _cut(folder):
    (folder / faiss_index.CANDIDATES).write_bytes((folder / faiss_index.CANDIDATES).read_bytes()[:-9])


DAMAGE = {
    "no manifest": (lambda f: (f / faiss_index.MANIFEST).unlink(), r"is no index, manifest\.json is missing; make one with"),
    "no JSON": (lambda f: (f / faiss_index.MANIFEST).write_text("{"), "is not the manifest of an index"),
    "of a stage": (lambda f: (f / faiss_index.MANIFEST).write_text('{"stage": "x"}'), "is not the manifest of an index"),
    "of another kind": (
        lambda f: (f / faiss_index.MANIFEST).write_text(json.dumps({key: [] for key in faiss_index.KEYS})),
        "is not the manifest of an index",
    ),
    "cut": (_cut, r"candidates\.parquet is missing or not the file"),
    "gone": (lambda f: (f / faiss_index.FAISS).unlink(), r"index\.faiss is missing or not the file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_index_is_refused_with_one_clear_message(made, own, damage, capsys):
    harm, message = DAMAGE[damage]
    harm(own)
    with pytest.raises(ValueError, match=message):
        faiss_index.opened(own, made[0])
    assert cli.main(["search", "--index", str(own), "a dog"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_an_index_of_another_model_or_other_prompts_is_refused(made, model_folder, smoke, tmp_path):
    _, _, folder = made
    other = encoder.load(model_folder, smoke.encoder)
    other.backbone.lm_head.weight.data[0, 0] += 1
    other.save(tmp_path / "model", stage="test", parent="none")
    asked = encoder.load(folder.parent / "model", smoke.encoder.model_copy(update={"summary_request": "Why?"}))
    for loaded in (encoder.load(tmp_path / "model"), asked):
        with pytest.raises(ValueError, match="made by another model, or with other prompts"):
            faiss_index.opened(folder, loaded)


def test_a_search_by_text_image_or_both_is_our_search_of_that_item(made, root):
    loaded, pool, _ = made
    image = root.image_path(next(c.image for c in pool.candidates if c.image))
    for text, picture, item in (
        ("a dog", None, items.Item("A dog.")),
        ("", image, items.Item("", image)),
        ("a dog", image, items.Item("A dog.", image)),
    ):
        vector, (summary,) = retriever.encode(loaded, [item], batch=1)
        wanted = search.exact(vector, pool.vectors, 4)
        found = answers.search(loaded, pool, text, picture, k=4)
        assert found.summary == summary and found.table()["did"].tolist() == [pool.candidates[int(r)].did for r in wanted.rows[0]]
        np.testing.assert_array_equal(np.float32(found.table()["score"]), wanted.scores[0])
        assert found.table()["rank"].tolist() == [1, 2, 3, 4]
    assert len(answers.search(loaded, pool, "a dog", k=10**6).found) == len(pool.candidates)
    with pytest.raises(ValueError, match="nothing to search for"):
        answers.search(loaded, pool, " ")
    with pytest.raises(ValueError, match="k = 0; ask for at least one"):
        answers.search(loaded, pool, "a dog", k=0)


def test_the_sheet_has_rank_score_and_id_under_each_picture(made, root):
    loaded, pool, folder = made
    found = answers.search(loaded, pool, "costs $5 and $6", root.image_path(pool.candidates[0].image), k=7)
    labels = [axis.get_xlabel().splitlines()[0] for axis in found.sheet().axes if axis.get_xlabel()]
    assert labels == ["query", *(f"{r.rank}   {r.score:.3f}   {r.did}" for r in found.table().itertuples())]
    assert sum(len(axis.images) for axis in found.sheet().axes) == 1 + 7
    assert found._repr_png_().startswith(b"\x89PNG") and repr(found) == f"best 7 of {len(pool.candidates)} for 'Costs $5 and $6.'"
    unplaced = answers.search(loaded, faiss_index.opened(folder, loaded), "a dog", k=2)  # no root, so no pictures: text cards
    assert not any(axis.images for axis in unplaced.sheet().axes) and unplaced._repr_png_()


def test_the_command_line_exports_and_searches(made, root, tmp_path, capsys, monkeypatch):
    loaded, pool, _ = made
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    common = ["--model", loaded.source, "--root", str(root.folder), "--unit", UNIT, "--profile", "smoke"]
    assert cli.main(["export", "--index", *common, "--to", "index"]) == 0
    assert f"{len(pool.candidates)} candidates in candidates.parquet, index.faiss, manifest.json" in capsys.readouterr().out
    assert cli.main(["search", *common, "--k", "3", "woman running"]) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(cache, "encode", lambda *_, **__: 1 / 0)  # nothing of the pool is embedded again
    assert cli.main(["search", "--index", "index", "--k", "3", "woman running", "--profile", "smoke"]) == 0
    second = capsys.readouterr().out

    def shown(out):
        return [line.split()[:3] for line in out.splitlines() if line.strip()[0].isdigit()]

    assert len(shown(first)) == 3 and shown(first) == shown(second)
    assert f"pictures: {tmp_path / 'search_woman_running.png'}" in first
    assert Image.open("search_woman_running.png").format == "PNG"
    (tmp_path / "search_woman_running.png").unlink()
    assert cli.main(["search", "--index", "index", "--no-pictures", "woman running", "--profile", "smoke"]) == 0
    assert not list(tmp_path.glob("*.png")) and "pictures" not in capsys.readouterr().out
    assert cli.main(["search", "--index", "index", "--unit", "emoji_task0", "woman running"]) == 1
    assert f"index is an index of {UNIT}, not of emoji_task0" in capsys.readouterr().err
    assert (
        cli.main(["search", "--root", str(tmp_path), "woman"]) == 1 and "--model, --root and --unit, or --index" in capsys.readouterr().err
    )
    assert cli.main(["export", "--index", "--model", loaded.source, "--to", "x"]) == 1
    assert cli.main(["export", "--model", loaded.source, "--to", "elva", "--root", str(root.folder), "--unit", UNIT]) == 0
    assert (tmp_path / "elva/modules.json").is_file()


def test_an_index_that_was_moved_asks_where_its_model_and_images_are(made, own, tmp_path, monkeypatch, capsys):
    content = json.loads((own / faiss_index.MANIFEST).read_text())
    content["made_from"]["model"] = "../elsewhere/model"
    (own / faiss_index.MANIFEST).write_text(json.dumps(content))
    assert cli.main(["search", "--index", str(own), "a dog"]) == 1
    assert "say where it is with --model DIR" in capsys.readouterr().err
    content["made_from"]["root"] = "../elsewhere/root"
    (own / faiss_index.MANIFEST).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["search", "--index", str(own), "--model", made[0].source, "a dog", "--profile", "smoke"]) == 0
    assert "search_a_dog.png without images; say where they are with --root ROOT" in capsys.readouterr().out


def test_a_query_picture_is_read_as_it_is_now_by_path_or_by_name(made, root, tmp_path):
    loaded, pool, _ = made
    place, first = tmp_path / "query.png", None
    for row in (0, 1):
        picture = root.image_path(pool.candidates[row].image)
        place.write_bytes(picture.read_bytes())
        expected = answers.search(loaded, pool, "", picture, k=5).table()
        for image in (place, str(place)):
            pd.testing.assert_frame_equal(answers.search(loaded, pool, image=image, k=5).table(), expected)
        assert first is None or not expected.equals(first)
        first = expected
    with pytest.raises(ElvaDataError, match=r"nowhere\.png is missing"):
        answers.search(loaded, pool, "a dog", "nowhere.png")
    with pytest.raises(ValueError, match=r"an image is Image; give the path of a file"):
        answers.search(loaded, pool, "a dog", Image.new("RGB", (8, 8)))


def test_sheets_of_queries_that_words_do_not_tell_apart_have_names_of_their_own(made, tmp_path):
    pool, word = made[1], "running " * 20
    texts = ["\u2764", "\U0001f436", "?!", "dog \u2764", "dog", f"{word} a", f"{word} b"]
    names = {text: answers.Answers(items.Item(text), "", [], [], pool).file_name() for text in texts}
    assert len(set(names.values())) == len(texts) and names["dog"] == "search_dog.png"
    assert all(re.fullmatch(r"search_\w*\.png", name) and len(name) < 100 for name in names.values())


def test_export_into_the_folder_one_is_in_is_refused_with_a_line(made, tmp_path, monkeypatch, capsys):
    loaded, pool, _ = made
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    for to in (".", "..", "../here"):
        for more in ([], ["--index", "--root", str(pool.root.folder), "--unit", UNIT, "--profile", "smoke"]):
            assert cli.main(["export", "--model", loaded.source, "--to", to, *more]) == 1
            assert "is the folder you are in, or above it; name one inside it" in capsys.readouterr().err
    assert not list((tmp_path / "here").iterdir())
