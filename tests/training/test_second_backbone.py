"""The other architecture: the real class, the first backbone's words, taught once."""

from __future__ import annotations

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from elva_core.models import encoder
from elva_core.training import second_backbone, teach


def test_it_is_a_qwen25_vl_with_the_words_of_the_first_taught_once_and_loads_in_plain_transformers(
    model_folder, smoke, root, items, tmp_path, monkeypatch
):
    lesson = {"steps": 1, "batch": 4}
    settings = smoke.changed(
        {"backbone": {"tiny": {"architecture": "qwen2_5_vl"}, "teach": {"vision": lesson, "language": lesson}}}
    ).backbone
    folder = second_backbone.ensure(str(model_folder), settings, smoke.encoder, root, tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(plain, Qwen2_5_VLForConditionalGeneration)
    first, second = (encoder.load(f, smoke.encoder) for f in (model_folder, folder))
    assert first.prompts(items, "x") == second.prompts(items, "x")
    assert first.batch(items, "x").input_ids.tolist() == second.batch(items, "x").input_ids.tolist()
    with torch.no_grad():
        assert second.embed_eol(items).isfinite().all()
    monkeypatch.setattr(teach, "teach_vision", None)  # called again it would fail
    assert second_backbone.ensure(str(model_folder), settings, smoke.encoder, root, tmp_path) == folder
