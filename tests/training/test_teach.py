"""The small backbones: what they are built from, how they are taught, that they are taught once."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from elva_core.data import images, mbeir
from elva_core.models import encoder
from elva_core.training import teach


def test_redrawing_with_strength_zero_changes_nothing(tiny, root, smoke, tmp_path):
    paths = [root.image_path(c.image) for c in root.pool("emoji_task0", "test")[:6]]
    images.open_image(paths[0]).resize((40, 90)).save(tmp_path / "narrow.png")
    paths.insert(2, tmp_path / "narrow.png")
    pixels, grids = tiny.vision.pixels(paths)
    assert len(grids.unique(dim=0)) > 1  # images of several shapes
    draw = {"patch": tiny.processor.image_processor.patch_size, "rng": np.random.default_rng(0)}
    still = teach.redrawn(pixels, grids, teach=smoke.backbone.teach.model_copy(update={"warp": 0.0, "jitter": 0.0}), **draw)
    torch.testing.assert_close(still, pixels, atol=2e-3, rtol=0)
    moved = teach.redrawn(pixels, grids, teach=smoke.backbone.teach, **draw)
    assert moved.shape == pixels.shape and (moved - pixels).abs().mean() > 0.01


def test_no_text_is_unknown_to_the_tokenizer(tiny):
    tokenizer = tiny.processor.tokenizer
    for text in ("woman running", "naïve 日本 🙂", "x" * 50):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def taught_for(smoke, *, vision, language):
    lessons = smoke.backbone.teach
    changes = {
        "vision": lessons.vision.model_copy(update={"steps": vision}),
        "language": lessons.language.model_copy(update={"steps": language}),
    }
    return smoke.backbone.model_copy(update={"teach": lessons.model_copy(update=changes)})


def test_the_same_seed_teaches_the_same_backbone_whatever_torch_drew_before(root, smoke, tmp_path):
    settings = taught_for(smoke, vision=2, language=2)
    weights = []
    for place in ("a", "b"):
        torch.rand(len(weights) + 1)
        weights.append(load_file(teach.ensure(settings, smoke.encoder, root, tmp_path / place) + "/model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_teaching_lowers_both_losses_and_happens_once(root, smoke, tmp_path, monkeypatch):
    settings = taught_for(smoke, vision=150, language=30)
    losses = {}
    for name in ("teach_vision", "teach_language"):
        original = getattr(teach, name)

        def recorded(*args, original=original, name=name):
            losses[name] = [row["loss"] for row in original(*args)]

        monkeypatch.setattr(teach, name, recorded)
    folder = teach.ensure(settings, smoke.encoder, root, tmp_path)
    for values in losses.values():
        assert np.mean(values[-5:]) < 0.9 * np.mean(values[:5])
    losses.clear()
    assert teach.ensure(settings, smoke.encoder, root, tmp_path) == folder and not losses
    assert [p.name for p in tmp_path.iterdir()] == [folder.rsplit("/", 1)[1]]


def test_the_second_is_a_qwen25_vl_with_the_words_of_the_first_taught_once_that_plain_transformers_loads(
    model_folder, smoke, root, items, tmp_path, monkeypatch
):
    settings = taught_for(smoke, vision=1, language=1)
    given = {"settings": settings, "prompts": smoke.encoder, "root": root, "cache": tmp_path, "first": str(model_folder)}
    folder = teach.ensure(**given)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(folder), Qwen2_5_VLForConditionalGeneration)
    first, second = (encoder.load(f, smoke.encoder) for f in (model_folder, folder))
    assert first.prompts(items, "x") == second.prompts(items, "x")
    assert first.batch(items, "x").input_ids.tolist() == second.batch(items, "x").input_ids.tolist()
    with torch.no_grad():
        assert second.embed_eol(items).isfinite().all()
    monkeypatch.setattr(teach, "teach_vision", None)  # called again it would fail
    assert teach.ensure(**given) == folder


def test_the_folder_of_a_taught_model_keeps_its_name(smoke, root, tmp_path):
    """By the hash of what it depends on: a folder that is there is not taught again after an update of this package."""
    depends = smoke.backbone.model_dump_json() + smoke.encoder.model_dump_json() + teach.VERSION
    key = hashlib.sha256(depends.encode() + root.union_train_path().read_bytes()).hexdigest()
    (tmp_path / f"backbone-{key[:16]}").mkdir()
    (tmp_path / f"backbone-{key[:16]}/config.json").write_text("{}")
    assert teach.ensure(smoke.backbone, smoke.encoder, root, tmp_path) == str(tmp_path / f"backbone-{key[:16]}")


def test_a_named_backbone_is_taken_as_it_is(smoke, root, tmp_path):
    settings = smoke.backbone.model_copy(update={"path": "Qwen/Qwen2-VL-2B-Instruct"})
    assert teach.ensure(settings, smoke.encoder, root, tmp_path) == "Qwen/Qwen2-VL-2B-Instruct"


def test_a_summary_names_the_grains_that_the_record_carries(root):
    q = next(q for q in root.union_train() if len(mbeir.grains(q)) == 3)
    assert mbeir.caption(q) == mbeir.normalise(" ".join(t for _, t in mbeir.grains(q)))
