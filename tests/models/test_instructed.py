"""A model that reads the instruction as the system's turn, as Qwen3-VL-Embedding does: the profile, its prompts, and stage 3 on it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import families
from elva_core import config
from elva_core.data import items as data_items
from elva_core.data import mbeir
from elva_core.experiments import jobs
from elva_core.export import embedder, sentence_transformers
from elva_core.models import encoder
from elva_core.retrieval import retriever

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def profile():
    few = {"queries": 4, "queries_per_step": 2, "num_generations": 2, "chunk": 4, "dims": [8, 32], "lora": {"rank": 4}}
    negatives = {"hard": 2, "random": 2, "threshold": 2.0, "pool": 8}
    return config.load("qwen3vl-embedding-2b").changed(
        {
            "device": "cpu",
            "dtype": "float32",
            "encoder": {"max_summary_tokens": 4},
            "stage3": few | {"negatives": negatives, "optimiser": {"lr": 0.01, "checkpoint_every": 2}},
        }
    )


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    return families.write(families.qwen3_vl, texts, tmp_path_factory.mktemp("instructed") / "start")


def documented(instruction: str, text: str, image: bool) -> str:
    """The prompt of format_model_input in QwenLM/Qwen3-VL-Embedding, src/models/qwen3_vl_embedding.py."""
    turns = f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{IMAGE if image else ''}{text}<|im_end|>\n"
    return turns + "<|im_start|>assistant\n"


def test_prompt_and_vector_are_those_of_its_documented_format(folder, profile, root):
    loaded = encoder.load(folder, profile.encoder)
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    pool = root.pool("", "test", "global")
    asked = [(data_items.candidate_item(root, next(c for c in pool if c.modality == m)), None) for m in mbeir.MODALITIES]
    for unit in root.units("test"):
        query = root.queries(unit, "test")[0]
        asked.append((data_items.query_item(root, query, prompt_index=1), root.instruction(query, prompt_index=1)))
    for item, instruction in asked:
        text = item.text if instruction is None else item.text[len(instruction) :].strip()
        expected = documented(instruction or "Represent the user's input.", text, item.image is not None)
        assert loaded.prompts([item], profile.encoder.eol_request) == [expected]
        state, _ = families.plain(model, processor, expected, item.images, [])
        with torch.no_grad():
            torch.testing.assert_close(loaded.embed_eol([item])[0], encoder.normalised(state), atol=1e-5, rtol=0)
    (prompt,) = loaded.prompts([asked[-1][0]], "Summarise the {content}.")
    assert "Summarise the " in prompt.partition("<|im_start|>user")[2] and "{content}" not in prompt


def test_models_that_know_no_such_turn_read_what_they_read_before_and_settings_have_the_same_keys(tiny, smoke, root):
    item = data_items.query_item(root, query := root.queries("emoji_task0", "test")[0])
    assert item.text == mbeir.normalise(f"{root.instruction(query)} {query.text or ''}") and item.instruction
    assert item.text.startswith(item.instruction)
    (prompt,) = tiny.prompts([item], "x")
    assert prompt == f"<|im_start|>user\n{item.text}\nx<|im_end|>\n<|im_start|>assistant\n" and str(item) == str(data_items.Item(item.text))
    assert "system_prompt" not in smoke.encoder.model_dump() and "system_prompt" not in json.loads(smoke.encoder.model_dump_json())


def test_a_placeholder_in_an_instruction_is_text(folder, profile):
    loaded = encoder.load(folder, profile.encoder)
    (prompt,) = loaded.prompts([data_items.Item("Find <|image_pad|>. A dog.", instruction="Find <|image_pad|>.")], "")
    assert prompt == documented("Find < |image_pad|>.", "A dog.", False)


def test_stage_3_trains_it_and_its_export_asks_as_it_was_trained(folder, profile, root, tmp_path):
    job = jobs.Job("stage3", profile, 1, root, None, str(folder), tmp_path / "stage3", tmp_path / "mined.safetensors")
    jobs.run(job)
    rows = jobs.history(job)
    long = dataclasses.replace(job, settings=profile.changed({"stage3": {"dims": [64]}}), folder=tmp_path / "long")
    with pytest.raises(ValueError, match=r"stage3\.dims = \[64\], but embeddings have 32 numbers"):
        jobs.run(dataclasses.replace(long, mined=tmp_path / "other.safetensors"))
    assert not (tmp_path / "other.safetensors").exists()
    assert len(rows) == 2 and all(np.isfinite(row["reward"]) for row in rows)
    before, after = (AutoModelForImageTextToText.from_pretrained(f).state_dict() for f in (folder, job.model))
    assert any(not torch.equal(before[name], after[name]) for name in before if "language_model.layers" in name)
    card = json.loads((job.model / "elva.json").read_text())
    assert card["dims"] == [8, 32] and card["encoder"]["system_prompt"] == "Represent the user's input."
    trained = encoder.load(job.model)
    exported = sentence_transformers.sentence_transformer(job.model, tmp_path / "elva", template="eol", root=root, unit="emoji_task0")
    item = data_items.query_item(root, root.queries("emoji_task0", "test")[0], prompt_index=0)
    alone = ([item], [data_items.Item(item.text)])  # which compare as equal
    expected = [retriever.encode(trained, items, batch=1, template="eol")[0][0] for items in alone]
    found = embedder.load(exported).encode_query(item.without_instruction.text)
    np.testing.assert_allclose(found, expected[0], atol=1e-5)
    assert abs(found - expected[1]).max() > 1e-3  # the same words, all of them in the user's turn
