"""Prompts, batches, [RET], LoRA, saving: on a tiny model of the real class."""

from __future__ import annotations

import copy

import pytest
import torch

from elva_core.data import images as image_files
from elva_core.data import items as data_items
from elva_core.models import encoder


def test_special_tokens_and_spare_rows_are_banned_and_the_end_of_turn_is_not(tiny, items):
    with torch.no_grad():
        logits = tiny.logits(tiny.states(tiny.batch(items, "x"))[:, -1])
    tokenizer = tiny.processor.tokenizer
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|endoftext|>", "[RET]"):
        assert (logits[:, tokenizer.convert_tokens_to_ids(token)] == float("-inf")).all(), token
    assert (logits[:, len(tokenizer) :] == float("-inf")).all()
    assert torch.isfinite(logits[:, tiny.end_id]).all()


def test_long_text_is_cut_to_its_token_limit(tiny):
    long = data_items.Item("running " * 500)
    short = tiny.batch([long], "x").input_ids.shape[1]
    assert short < tiny.settings.max_text_tokens + 40


def test_lora_trains_the_language_model_and_the_ret_row_only(tiny, items, smoke):
    before = {n: p.clone() for n, p in tiny.backbone.named_parameters()}
    tiny.add_lora(smoke.stage2.lora, seed=0)
    assert all("lora" in n or "token_adapter" in n for n in tiny.trainable())
    assert not any("visual" in n for n in tiny.trainable())
    optimiser = torch.optim.SGD(tiny.trainable().values(), lr=1.0)
    for _ in range(2):  # the first step moves lora_B alone
        vectors, _ = tiny.embed_summaries(items, [[7, 8]] * len(items))
        vectors[:, 0].sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    tiny.merge_lora()
    after = dict(tiny.backbone.named_parameters())
    changed = {n for n, p in before.items() if not torch.equal(p, after[n])}
    assert changed and all("language_model.layers" in n or "embed_tokens" in n for n in changed)
    rows = (before["model.language_model.embed_tokens.weight"] != after["model.language_model.embed_tokens.weight"]).any(1)
    assert rows.nonzero().flatten().tolist() == [tiny.ret_id]


def test_only_the_language_model_is_in_training_mode_while_an_adapter_trains(tiny, smoke):
    def modes():
        return {module.training for module in tiny.backbone.model.visual.modules()}, {
            m.training for m in tiny.backbone.get_decoder().modules()
        }

    with tiny.adapting(smoke.stage2, seed=0):
        assert modes() == ({False}, {True})
    assert modes() == ({False}, {False})


def test_a_folder_without_card_needs_settings(model_folder):
    with pytest.raises(FileNotFoundError, match=r"elva\.json is missing: pass settings"):
        encoder.load(model_folder)


def test_the_quick_tower_gives_the_features_of_the_plain_one(tiny, root, tmp_path):
    paths = [root.image_path(c.image) for c in root.pool("emoji_task0", "test")[:5]]
    image_files.open_image(paths[0]).resize((40, 90)).save(tmp_path / "narrow.png")
    pixels, grids = tiny.vision.pixels([*paths[:2], tmp_path / "narrow.png", *paths[2:]])
    tower = tiny.backbone.model.visual
    config = copy.deepcopy(tower.config)
    config._attn_implementation = "sdpa"
    plain = type(tower)(config).eval()
    plain.load_state_dict(tower.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels, grids).pooler_output, plain(pixels, grids).pooler_output, atol=1e-5, rtol=1e-5)


def test_features_of_a_file_are_kept_until_it_changes(tiny, items, tmp_path):
    place, vision, seen = tmp_path / "image.png", tiny.vision, []
    for picture in [item.image for item in items if item.image and not item.text]:
        place.write_bytes(picture.read_bytes())
        (features,), (again,) = vision.images([place]), vision.images([place])
        assert features.features is again.features
        torch.testing.assert_close(features.features, vision.image_features([picture])[0].features)
        seen.append(features.features)
    assert not torch.equal(*seen)
