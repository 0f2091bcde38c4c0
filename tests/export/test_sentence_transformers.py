"""A model goes where people use models, and its vectors stay what they are."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from elva_core import encoder as former_encoder
from elva_core import sentence_module
from elva_core.data import items as data_items
from elva_core.data import mbeir
from elva_core.export import embedder, sentence_transformers
from elva_core.models import encoder
from elva_core.retrieval import retriever

TEMPLATES = ("summary", "eol")


@pytest.fixture(scope="module")
def saved(model_folder, smoke, tmp_path_factory):
    """A model folder as a training stage writes it."""
    folder = tmp_path_factory.mktemp("stage") / "model"
    encoder.load(model_folder, smoke.encoder).save(folder, stage="test", parent="none")
    return folder


@pytest.fixture(scope="module", params=TEMPLATES)
def exported(request, saved, root, tmp_path_factory):
    folder = sentence_transformers.sentence_transformer(
        saved, tmp_path_factory.mktemp("to") / "elva", template=request.param, root=root, unit="emoji_task0"
    )
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu"), folder, request.param


def ours(model, items, template):
    return retriever.encode(model, items, batch=3, template=template)[0]


@pytest.fixture(scope="module")
def reference(saved):
    return encoder.load(saved)


@pytest.fixture(scope="module")
def forms(items, smoke, tmp_path_factory):
    """(item, every form in which sentence-transformers takes it)."""
    clear = tmp_path_factory.mktemp("clear") / "half.png"
    pixels = np.random.default_rng(1).integers(0, 256, (72, 72, 4), np.uint8)
    Image.fromarray(pixels, "RGBA").save(clear)
    lying, exif = clear.with_name("lying.png"), Image.Exif()
    exif[0x0112] = 6  # a telephone held upright
    Image.fromarray(pixels[:40, :, :3]).save(lying, exif=exif)
    long = "A woman is running. " * smoke.encoder.max_text_tokens
    everything = [*items, data_items.Item(long), data_items.Item(long, clear), data_items.Item("", clear), data_items.Item("", lying)]
    pairs = []
    for item in everything:
        if item.image is None:
            pairs += [(item, item.text), (item, {"text": item.text})]
        for image in (str(item.image), Image.open(item.image)) if item.image else ():
            pairs += [(item, {"text": item.text, "image": image})] if item.text else [(item, image), (item, {"image": image})]
    return pairs


def test_sentence_transformers_gives_our_vectors_for_every_form_of_input(exported, reference, forms):
    model, _, template = exported
    found, everything = model.encode([form for _, form in forms], batch_size=5), [item for item, _ in forms]
    np.testing.assert_allclose(found, ours(reference, everything, template), atol=1e-5)
    other = next(t for t in TEMPLATES if t != template)  # the templates are two embeddings
    assert abs(found - ours(reference, everything, other)).max() > 0.01
    assert model.get_embedding_dimension() == found.shape[1]
    np.testing.assert_allclose(model.similarity(found, found).diagonal(), 1, atol=1e-5)


def test_a_query_prompt_is_the_instruction_of_its_unit_and_documents_have_none(exported, reference, root):
    model, _, template = exported
    for unit in root.units("test"):
        query = next(q for q in root.queries(unit, "test") if q.text is None or q.text.endswith(("?", ".", "!")) or q.image)
        item = data_items.query_item(root, query, prompt_index=0)
        text = mbeir.normalise(f"X. {query.text or ''}")[len("X. ") :]
        form = {"text": text, "image": str(item.image)} if item.image and text else str(item.image) if item.image else text
        found = model.encode_query(form, prompt_name=unit)
        np.testing.assert_allclose(found, ours(reference, [item], template)[0], atol=1e-5, err_msg=unit)
    instruction, text = model.prompts["emoji_task0"], "Woman running."
    assert instruction.strip() in {mbeir.normalise(p) for prompts in root.instructions.values() for p in prompts}
    np.testing.assert_array_equal(model.encode_query(text), model.encode(instruction + text))
    np.testing.assert_array_equal(model.encode_document(text), model.encode(text))


def test_without_a_root_a_query_carries_no_instruction(saved, tmp_path):
    sentence_transformers.sentence_transformer(saved, tmp_path / "elva")
    model = embedder.load(tmp_path / "elva")
    assert model.prompts == {"query": "", "document": ""}
    np.testing.assert_array_equal(model.encode_query("A dog."), model.encode("A dog."))
    with pytest.raises(ValueError, match="no root was given, so there has no test unit emoji_task0"):
        sentence_transformers.sentence_transformer(saved, tmp_path / "other", unit="emoji_task0")


def test_the_folder_is_still_a_model_of_ours_and_survives_saving(exported, reference, items, tmp_path):
    model, folder, template = exported
    before = ours(reference, items, template)
    np.testing.assert_array_equal(ours(encoder.load(folder), items, template), before)
    assert json.loads((folder / "elva.json").read_text())["template"] == template
    model.save_pretrained(str(tmp_path / "again"))
    np.testing.assert_array_equal(ours(encoder.load(tmp_path / "again"), items, template), before)
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    assert again.prompts == model.prompts
    np.testing.assert_array_equal(
        again.encode([i.text for i in items if not i.image]), model.encode([i.text for i in items if not i.image])
    )


def test_a_copy_for_another_process_gives_the_same_vectors(exported, forms):
    model = exported[0]  # sentence-transformers sends it to the processes of a pool
    again = pickle.loads(pickle.dumps(model))
    inputs = [form for _, form in forms if isinstance(form, str)]
    np.testing.assert_array_equal(again.encode(inputs), model.encode(inputs))


def test_what_elva_json_says_is_how_it_is_read(exported, tmp_path):
    _, folder, template = exported
    again = sentence_transformers.sentence_transformer(folder, tmp_path / "again")
    assert json.loads((again / "elva.json").read_text())["template"] == template
    assert (again / "README.md").read_text().count("## Use with sentence-transformers") == 1
    (again / "elva.json").write_text(json.dumps(json.loads((again / "elva.json").read_text()) | {"template": "x"}))
    with pytest.raises(ValueError, match="template 'x' is none of"):
        sentence_transformers.sentence_transformer(again, tmp_path / "third")


def test_nothing_that_lies_in_the_folder_is_run(saved, tmp_path, items):
    folder = sentence_transformers.sentence_transformer(saved, tmp_path / "elva")
    for name in ("elva_core.py", "sentence_module.py", "Embedder.py"):
        (folder / name).write_text("raise SystemExit('run')")
    (folder / "elva_core").mkdir()
    (folder / "elva_core/sentence_module.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="trust_remote_code"):  # the library's own question, before anything is imported
        SentenceTransformer(str(folder), device="cpu")
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert type(model[0]) is embedder.Embedder
    np.testing.assert_array_equal(embedder.load(folder).encode(items[0].text), model.encode(items[0].text))
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "elva_core.Other"}]))
    with pytest.raises(ValueError, match=r"elva_core\.Other.*no export of the ELVA workbook"):
        embedder.load(folder)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("https://host/a.png", "pass a PIL image or the path of a file"),
        ({"image": "https://host/a.png"}, "pass a PIL image or the path of a file"),
        ({"image": "nowhere.png"}, r"nowhere\.png is missing"),
        ({"text": 7}, "a text is int"),
        ({"role": "user", "content": "A dog."}, r"\['content', 'role'\]; pass a text"),
        (np.zeros((8, 8, 3), np.uint8), "ndarray"),
        (None, "input 0 of a batch is None, without text and image"),
        ({}, r"input 0 of a batch is \{\}, without text and image"),
        ({"text": None, "image": None}, "input 0 of a batch .* without text and image"),
    ],
)
def test_an_input_that_cannot_be_read_is_refused_and_named(exported, form, message):
    for prompt in (None, "Find it. "):  # with a prompt the library tries again where a TypeError comes up
        with pytest.raises(ValueError, match=message):
            exported[0].encode([form], prompt=prompt)


def test_an_export_says_nothing_of_this_machine_and_what_must_be_installed(saved, tmp_path):
    model = shutil.copytree(saved, tmp_path / "model")
    card = json.loads((model / "elva.json").read_text()) | {"parent": str(saved)}  # as older runs wrote it
    (model / "elva.json").write_text(json.dumps(card))
    folder = sentence_transformers.sentence_transformer(model, tmp_path / "elva")
    texts = [p.read_text() for p in folder.iterdir() if p.suffix in (".json", ".md")]
    assert not any(str(tmp_path) in text or str(saved) in text for text in texts)
    readme = (folder / "README.md").read_text()
    assert "sentence-transformers==6.2.0" in readme and "trust_remote_code=True" in readme
    required = json.loads((folder / "config_sentence_transformers.json").read_text())["requirements"]
    assert set(required) == {"elva-workbook"}


def test_a_folder_that_was_exported_before_still_loads(saved, reference, items, tmp_path):
    """modules.json names the class at its former place; the newest keys of the library's configuration are missing."""
    folder = shutil.copytree(saved, tmp_path / "old")
    config = {"model_type": "SentenceTransformer", "prompts": {"query": "", "document": ""}, "default_prompt_name": None}
    written = {
        "elva.json": json.loads((folder / "elva.json").read_text()) | {"template": "summary"},
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "elva_core.sentence_module.Embedder"}],
        "config_sentence_transformers.json": config,
    }
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content))
    texts = [item for item in items if not item.image]
    expected = ours(reference, texts, "summary")
    for model in (SentenceTransformer(str(folder), trust_remote_code=True, device="cpu"), sentence_module.load(folder)):
        assert type(model[0]) is embedder.Embedder
        np.testing.assert_allclose(model.encode([item.text for item in texts]), expected, atol=1e-5)
    assert former_encoder.load is encoder.load


def test_the_lines_of_model_cards_of_the_last_version_still_run(tiny, tmp_path):
    from elva_core import encoder, retrieval

    tiny.save(tmp_path / "model", stage="test", parent="none")
    vectors, summaries = retrieval.encode(encoder.load(tmp_path / "model"), [encoder.Item("A dog.")], batch=1)
    assert vectors.shape[0] == len(summaries) == 1
