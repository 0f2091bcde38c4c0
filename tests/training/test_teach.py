"""The small backbones: what they are built from, how they are taught, that a run that was killed ends the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from elva_core import config, files
from elva_core.data import images, mbeir, sources
from elva_core.export import backbone_card
from elva_core.models import encoder, small_models
from elva_core.models.lineage import lineage
from elva_core.training import drawings, loop, teach
from elva_core.values import merged
from pretend_card import PretendCard


@pytest.fixture
def lessons() -> config.TeachSettings:
    short = {"batch": 16, "optimiser": {"checkpoint_every": 2}}
    changes = {"tower": short | {"steps": 4}, "joint": short | {"steps": 5}, "styles": ("openmoji",), "keep": (3,)}
    return config.TeachSettings(**merged(config.teaching("tiny").model_dump(), changes))


@pytest.fixture
def packages(root, tmp_path_factory):
    """A node_modules folder with a style that draws two emoji of the root."""
    folder = tmp_path_factory.mktemp("npm")
    place = folder / "@iconify-json/openmoji"
    place.mkdir(parents=True)
    codes = [Path(c.image).stem for c in root.pool("", "train", "global") if c.modality == "image"][:2]
    icon = {"body": '<circle cx="5" cy="5" r="4" fill="#f00"/>'}
    contents = {
        "icons": {"icons": {"a": icon, "b": icon}, "width": 10, "height": 10},
        "chars": dict(zip((code.replace("U+", "") for code in codes), "ab", strict=True)),
        "info": {"license": {"title": "CC BY-SA 4.0"}},
        "package": {"version": "9.9"},
    }
    for name, value in contents.items():
        (place / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def make(root, packages, tmp_path, monkeypatch):
    """`teach.make` on the tests' small root."""
    monkeypatch.setattr(
        sources, "write", lambda data, folder, seed: folder.mkdir(parents=True) or (folder / "root").symlink_to(root.folder)
    )
    return lambda settings, name: teach.make(settings, tmp_path / name, tmp_path / f"{name}-work", packages=packages)


def test_drawings_that_are_not_redrawn_are_patches_as_the_processor_makes_them(tiny, root):
    paths = [root.image_path(c.image) for c in root.pool("emoji_task0", "test")[:6]]
    side = config.teaching("tiny").sizes.image_side
    pictures = [images.open_image(p).resize((side, side)) for p in paths]
    expected = tiny.processor.image_processor(pictures, return_tensors="pt").pixel_values
    still, settings = {"warp": 0, "jitter": 0, "blur": 0, "holes": 0}, config.teaching("tiny").redraw
    stacked = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
    shown = drawings.redrawn(stacked, settings.model_copy(update=still), np.random.default_rng(0))
    torch.testing.assert_close(drawings.patch_rows(shown, tiny.processor.image_processor), expected, atol=1e-4, rtol=0)
    for key in still:
        moved = drawings.redrawn(stacked, settings.model_copy(update=still | {key: 1.0}), np.random.default_rng(0))
        assert ((moved - shown).abs() > 0.02).float().mean() > 0.003 and moved.min() >= 0 and moved.max() <= 1


def test_no_text_is_unknown_to_the_tokenizer(tiny):
    tokenizer = tiny.processor.tokenizer
    for text in ("woman running", "naïve 日本 🙂", "x" * 50):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(make, lessons, tmp_path, interrupted):
    whole = make(lessons, "whole")
    assert [folder.name for folder in whole] == ["whole-3", "whole"]
    for call in (1, 2, 2):  # at the tower's only checkpoint, and at the first and the second of the joint lesson
        with interrupted(loop, "_checkpoint", call):
            make(lessons, "killed")
    torch.rand(3)  # whatever torch drew before
    assert [folder.name for folder in make(lessons, "killed")] == ["killed-3", "killed"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "killed-3", "killed-work", "whole", "whole-3", "whole-work"]
    for name in ("", "-3"):
        one, other = (load_file(tmp_path / f"{run}{name}/model.safetensors") for run in ("whole", "killed"))
        assert all(torch.equal(one[n], other[n]) and one[n].dtype == torch.float16 for n in one)
    final = load_file(whole[1] / "model.safetensors")
    assert any(not torch.equal(one[n], final[n]) for n in one)  # the copy of three steps is not that of five
    with pytest.raises(FileExistsError, match="whole is there already"):
        make(lessons, "whole")


def test_the_folder_loads_and_its_card_says_what_was_measured(make, lessons, smoke):
    folder = make(lessons.model_copy(update={"keep": ()}), "out")[0]
    model = encoder.load(folder, smoke.encoder)
    words = model.backbone.get_input_embeddings().weight
    torch.testing.assert_close(words[model.ret_id], words[: model.ret_id].mean(0), atol=1e-3, rtol=0)
    made = json.loads((folder / "teaching.json").read_text())
    made["reading"]["Goog"]["exact"] = 0.4321
    (folder / "teaching.json").write_text(json.dumps(made))
    backbone_card.write(folder)
    card = (folder / "README.md").read_text()
    assert "43.2 %" in card and "openmoji 9.9 (npm, @iconify-json), CC BY-SA 4.0: 2 drawings" in card
    assert "4 steps of\n  16 drawings" in card and "5 steps of 16" in card


@pytest.mark.parametrize("name", sorted(p.name for p in (files.OUTPUTS / "backbone").iterdir()))
def test_a_backbone_that_ships_is_the_one_that_its_card_and_its_values_describe(name, tmp_path):
    folder = files.OUTPUTS / "backbone" / name
    made = json.loads((folder / "teaching.json").read_text())
    assert made["sha256"] == lineage(folder)[-1]["sha256"]
    assert config.TeachSettings(**made["settings"]) == config.teaching(name)
    (tmp_path / "teaching.json").write_text(json.dumps(made))
    backbone_card.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()
    assert sum(p.stat().st_size for p in folder.iterdir()) < 12e6
    kept = load_file(folder / "model.safetensors")
    assert kept and all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in kept.values())


def test_the_tower_learns_at_its_own_rate(tmp_path, lessons):
    generator = torch.Generator().manual_seed(0)
    names = ("visual.blocks.0.w", "visual.b", "layers.0.w", "b")
    values = {n: torch.nn.Parameter(torch.rand((3, 3) if n.endswith("w") else (3,), generator=generator)) for n in names}
    before = {name: p.detach().clone() for name, p in values.items()}

    def step_fn(step):
        loss = sum((p**2).sum() for p in values.values())
        loss.backward()
        return {"loss": float(loss.detach())}

    teach._learn(values, step_fn, lessons.joint, tmp_path, tower_rate=0.0)
    assert [torch.equal(p, before[name]) for name, p in values.items()] == [True, True, False, False]


def test_both_lessons_lower_their_loss(root, lessons, smoke, tmp_path):
    longer = {"tower": lessons.tower.model_copy(update={"steps": 100}), "joint": lessons.joint.model_copy(update={"steps": 30}), "keep": ()}
    settings = lessons.model_copy(update=longer | {"styles": ()})
    taught = teach._untaught(settings, smoke.encoder, root, None)
    shown = drawings.read(root, settings, tmp_path, None)
    assert {p.parent.name for p in shown.paths} == {"Appl", "Joy"}  # the train vendors of the tests' root
    tower = teach.teach_tower(taught, shown, settings, tmp_path / "tower")
    both = teach.teach_both(taught, shown, root, settings, tmp_path / "joint", keep=lambda **_: None)
    for rows in (tower, both):
        losses = [row["loss"] for row in rows]
        assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_the_second_is_a_qwen25_vl_with_the_words_and_weights_of_the_first(model_folder, smoke, items, tmp_path):
    sizes = config.teaching("tiny").sizes.model_copy(update={"architecture": "qwen2_5_vl"})
    model, processor = small_models.build_from(str(model_folder), sizes, seed=0)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), Qwen2_5_VLForConditionalGeneration)
    first, second = (encoder.load(f, smoke.encoder) for f in (model_folder, tmp_path))
    texts = [item for item in items if not item.image]
    assert first.batch(items, "x").input_ids.tolist() == second.batch(items, "x").input_ids.tolist()
    with torch.no_grad():
        torch.testing.assert_close(first.embed_eol(texts), second.embed_eol(texts))  # the language model is the same
        assert second.embed_eol(items).isfinite().all()


def test_one_that_is_taught_further_begins_with_all_that_the_first_knows(model_folder, smoke):
    model, processor = small_models.build_from(str(model_folder), config.teaching("tiny").sizes, seed=0)
    first = encoder.load(model_folder, smoke.encoder)
    kept = first.backbone.state_dict()
    assert all(torch.equal(weights, kept[name]) for name, weights in model.state_dict().items())
    assert processor.tokenizer.get_vocab() == first.processor.tokenizer.get_vocab()


def test_reading_counts_exact_summaries_and_grains_named_as_whole_words(tiny, root, monkeypatch):
    """A model that is right but for men, of whom it writes women."""

    def encode(model, items, *, batch):
        captions = {root.image_path(c.image): mbeir.caption(c) for s in ("val", "test") for c in root.pool("", s, "global") if c.image}
        return None, [re.sub(r"(?i)^man\b", "Woman", captions[item.image]) for item in items]

    monkeypatch.setattr(teach.retriever, "encode", encode)
    out = teach.reading(tiny, root, batch=8)
    pool = [mbeir.grains(c) for c in root.pool("", "test", "global") if c.modality == "image"]
    men = sum(("who", "man") in g for g in pool)
    who = sum("who" in dict(g) for g in pool)
    assert set(out) == {"Goog", "Twtr"} and 0 < men < who
    assert out["Twtr"]["exact"] == pytest.approx(1 - men / len(pool), abs=1e-4)
    assert out["Twtr"]["who"] == pytest.approx(1 - men / who, abs=1e-4)
    assert out["Twtr"]["what"] == 1 and out["Twtr"]["drawings"] == len(pool)


def test_a_style_without_its_package_is_named(root, lessons, tmp_path):
    with pytest.raises(files.ElvaDataError, match="npm install @iconify-json/openmoji"):
        drawings.read(root, lessons, tmp_path, tmp_path)
    with pytest.raises(files.ElvaDataError, match="--styles"):
        drawings.read(root, lessons, tmp_path, None)


def test_teaching_keeps_its_tensors_on_one_device(make, lessons, packages, tmp_path):
    with PretendCard():
        folder = teach.make(lessons, tmp_path / "card", tmp_path / "card-work", packages=packages, device="cuda")[-1]
    assert (folder / "model.safetensors").is_file()
