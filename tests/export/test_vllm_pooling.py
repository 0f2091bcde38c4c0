"""The request and the flags on an exported folder's card, given to a stand-in of vLLM: its prompt and its vector are ours."""

from __future__ import annotations

import re

import pytest
import torch

import families
import vllm_stand_in
from elva_core import config
from elva_core.data import items as data_items
from elva_core.export import embedder, sentence_transformers
from elva_core.models import encoder


@pytest.fixture(params=["qwen2_vl", "qwen3_vl", "instructed"])
def loaded(request, model_folder, texts, smoke, tmp_path):
    """A model that splices features, one that is read by its own processor, and one that reads instructions as a turn of their own."""
    if request.param == "qwen2_vl":
        return encoder.load(model_folder, smoke.encoder)
    start = families.write(families.qwen3_vl, texts, tmp_path / "start")
    instructed = config.load("qwen3vl-embedding-2b").encoder.model_copy(update={"max_summary_tokens": 6})
    return encoder.load(start, instructed if request.param == "instructed" else smoke.encoder)


def served(loaded, tmp_path, template):
    """(folder, server, `request` of its card)."""
    loaded.save(tmp_path / "model", stage="test", parent="none", template=template, dims=(8, 16))
    folder = sentence_transformers.sentence_transformer(tmp_path / "model", tmp_path / "elva")
    section = (folder / "README.md").read_text().partition("## Serve with vLLM")[2].partition("\n## ")[0]
    names = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    return folder, vllm_stand_in.Embeddings(re.search(r"^vllm serve .*$", section, re.MULTILINE)[0], folder), names["request"]


def test_a_single_pass_is_served_with_the_prompt_and_the_vector_of_the_export(loaded, items, tmp_path):
    folder, server, request = served(loaded, tmp_path, "eol")
    export = embedder.load(folder)
    for item in items:
        ids, vector = server.post(request(item.text, item.image))
        assert ids == loaded.batch([item], loaded.settings.eol_request).input_ids[0].tolist()
        form = {name: value for name, value in (("text", item.text), ("image", item.image and str(item.image))) if value}
        torch.testing.assert_close(vector, torch.from_numpy(export.encode(form)), atol=1e-5, rtol=0)
        _, short = server.post(request(item.text, item.image) | {"dimensions": 8})
        torch.testing.assert_close(short, torch.nn.functional.normalize(vector[:8], dim=0), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="matryoshka"):
        server.post(request("A dog.") | {"dimensions": 9})
    if loaded.settings.system_prompt:
        ids, vector = server.post(request("A dog.", instruction="Find it."))
        item = data_items.Item("Find it. A dog.", instruction="Find it.")
        assert ids == loaded.batch([item], "").input_ids[0].tolist()
        found = export.encode("A dog.", prompt="Find it. ")
        torch.testing.assert_close(vector, torch.from_numpy(found), atol=1e-5, rtol=0)


def test_the_state_at_ret_is_served_behind_the_summary(loaded, items, tmp_path):
    _, server, request = served(loaded, tmp_path, "summary")
    for item in items:
        summary = "A small dog."
        ids, vector = server.post(request(item.text, item.image, summary=summary))
        written = loaded.processor.tokenizer(summary, add_special_tokens=False).input_ids
        batch = loaded.batch([item], loaded.settings.summary_request, [[*written, loaded.ret_id]])
        assert ids == batch.input_ids[0].tolist()
        with torch.no_grad():
            expected, _ = loaded.embed_summaries([item], [written])
        torch.testing.assert_close(vector, expected[0], atol=1e-5, rtol=0)
