"""Images made ready by worker processes: the same batches for any number of them, opened by nobody else, and no process stays."""

from __future__ import annotations

import multiprocessing
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import families
from conftest import mined
from elva_core import files
from elva_core.data import emoji_variants, frames
from elva_core.data import items as data_items
from elva_core.models import ahead, chat, encoder, vision
from elva_core.retrieval import retriever
from elva_core.training import contrastive, distillation, grpo, reranker


def of(folder, smoke, workers: int) -> encoder.Encoder:
    return encoder.load(folder, smoke.encoder.model_copy(update={"cache_vision": False, "workers": workers}))


@pytest.fixture
def opened(monkeypatch) -> list:
    """Images that this process opens itself."""
    paths = []
    for module, name in ((vision, "open_image"), (chat.images, "open_image")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, original=original: paths.append(path) or original(path))
    return paths


def gone() -> bool:
    """Whether all workers end, which takes a moment."""
    end = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.05)
    return not multiprocessing.active_children()


def noted(model: encoder.Encoder) -> list[torch.Tensor]:
    """What the model is given of each batch from now on."""
    batches, original = [], model.batch

    def batch(*given):
        made = original(*given)
        looked = made.given.get("mm_encoder_outputs", {}).get("image", {}).get("pooler_output", [])
        batches.extend([made.given.get("inputs_embeds", made.input_ids).detach().clone(), *looked])
        return made

    model.batch = batch
    return batches


def ways(root, smoke, tmp_path):
    """Name -> what reads images of `root` with a model, in several steps."""
    base = smoke.stage2.model_copy(update={"steps": 3, "batch": 8, "chunk": 3, "ret_share": 0.5, "one_task_per_batch": False})
    pool = [data_items.candidate_item(root, c) for c in root.pool("", "test", "global")][:40]
    few = smoke.distil.model_copy(update={"steps": 3, "batch": 6, "chunk": 4})
    looks = smoke.rerank.model_copy(update={"steps": 3, "batch": 2, "chunk": 2})
    ranked = [SimpleNamespace(item=pool[i], positive=pool[i + 1], negatives=tuple(pool[i + 2 : i + 6])) for i in range(0, 24, 6)]
    asked = [reranker.Asked(str(i), r.item, tuple("abcd"), r.negatives) for i, r in enumerate(ranked)]
    targets = lambda m: torch.nn.functional.normalize(torch.ones(len(pool), m.backbone.config.get_text_config().hidden_size))  # noqa: E731
    return {
        "stage 2": lambda m: contrastive.train(m, contrastive.union_pairs(root, base, 1), base, seed=1, folder=tmp_path),
        "embedding": lambda m: retriever.encode(m, pool, batch=8, template="eol"),
        "distillation": lambda m: distillation.train(m, pool, targets(m), few, seed=1, folder=tmp_path),
        "reranker": lambda m: reranker.train(m, ranked, looks, seed=1, folder=tmp_path),
        "ordering": lambda m: [reranker.score(m, asked, kind, looks, batch=2) for kind in reranker.KINDS],
    }


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *(("qwen2_vl", way) for way in ("stage 2", "embedding", "distillation", "reranker", "ordering")),
        *(("qwen3_vl", way) for way in ("stage 2", "embedding")),
    ],
)
def test_batches_are_the_same_bit_for_bit_and_workers_alone_open_images(family, way, texts, model_folder, root, smoke, tmp_path, opened):
    folder = model_folder if family == "qwen2_vl" else families.write(families.qwen3_vl, texts, tmp_path / "model")
    seen = {}
    for workers in (0, 1, 2):
        model = of(folder, smoke, workers)
        opened.clear()
        seen[workers] = noted(model)
        ways(root, smoke, tmp_path)[way](model)
        assert bool(opened) == (workers == 0)
        assert gone()
    assert len(seen[0]) > 3
    for workers in (1, 2):
        assert len(seen[workers]) == len(seen[0]) and all(map(torch.equal, seen[workers], seen[0]))


def test_stage_3_opens_no_image_itself(model_folder, root, smoke, tmp_path, opened):
    model = of(model_folder, smoke, 2)
    ranked = mined(model, root, smoke, 12)
    opened.clear()
    changes = {"queries": 12, "queries_per_step": 4, "num_generations": 2, "chunk": 4, "candidates": "step", "rollout_sides": "query"}
    seen = noted(model)
    rows = grpo.train(model, ranked, smoke.stage3.model_copy(update=changes), seed=1, folder=tmp_path / "2")
    assert not opened and gone()
    plain = of(model_folder, smoke, 0)
    seen_plain = noted(plain)
    again = grpo.train(plain, ranked, smoke.stage3.model_copy(update=changes), seed=1, folder=tmp_path / "0")
    assert [row["reward"] for row in rows] == [row["reward"] for row in again] and opened
    assert len(seen) == len(seen_plain) > 3 and all(map(torch.equal, seen, seen_plain))


def test_clips_are_decoded_by_workers_to_the_same_features(model_folder, smoke, emojis, tmp_path, monkeypatch):
    emoji_variants.write_clips(emojis, tmp_path, smoke.video.model_copy(update={"drawings": 2, "length": 4}), vendor="Twtr", seed=1)
    clips = [data_items.Item("", more=(frames.Clip(path, 2),)) for path in sorted(tmp_path.rglob("*.mp4"))[:6]]
    decoded, read = [], vision.read_clip
    monkeypatch.setattr(vision, "read_clip", lambda clip: decoded.append(clip) or read(clip))
    made = []
    for workers in (0, 2):
        decoded.clear()
        made.append(retriever.encode(of(model_folder, smoke, workers), clips, batch=2, template="eol")[0])
        assert bool(decoded) == (workers == 0) and gone()
    assert len(clips) > 3 and np.array_equal(*made)


def test_a_resumed_run_is_made_ready_from_its_first_step_on_and_leaves_no_process(model_folder, root, smoke, tmp_path, opened, interrupted):
    model = of(model_folder, smoke, 1)
    changes = {"steps": 4, "batch": 6, "chunk": 6, "ret_share": 0.0, "optimiser": {"checkpoint_every": 2}}
    settings = smoke.changed({"stage2": changes}).stage2
    train = lambda m: contrastive.train(m, contrastive.union_pairs(root, settings, 1), settings, seed=1, folder=tmp_path)  # noqa: E731
    with interrupted(contrastive.losses, "infonce", 3):
        train(model)
    del model
    assert gone()
    rows = train(of(model_folder, smoke, 1))
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and not opened and gone()


def test_a_broken_image_is_named_by_the_step_that_reads_it(model_folder, own_root, smoke):
    model = of(model_folder, smoke, 1)
    pool = [data_items.candidate_item(own_root, c) for c in own_root.pool("", "test", "global") if c.image]
    pool[-1].image.write_bytes(b"no image")
    with pytest.raises(files.ElvaDataError, match=rf"{re.escape(pool[-1].image.name)} cannot be decoded"):
        retriever.encode(model, pool, batch=4, template="eol")
    assert gone()


def test_each_step_takes_what_was_made_for_it_and_nothing_else():
    keys, state = [["a", "b"], ["b", "c"], [], ["d", "e", "f"]], torch.get_rng_state()
    made = ahead.Ahead(str.upper, lambda step: keys[step], 4, 2)
    made.begin(1)
    assert made.take("c") == "C" and made.take("a") is None and made.take("b") == "B" and made.take("b") is None
    made.begin(3)
    assert made.take("f") == "F" and made.take("c") is None
    assert torch.equal(torch.get_rng_state(), state)
    made.close()
    assert made.take("d") is None and gone()


def test_resizing_first_and_the_rest_behind_gives_the_pixels_of_the_processor(tiny, items):
    paths = [path for item in items for path in item.images]
    whole = tiny.processor.image_processor([chat.images.open_image(path) for path in paths], return_tensors="pt")
    pixels, grids = tiny.vision.pixels(paths)
    assert np.array_equal(pixels, whole.pixel_values) and torch.equal(grids, whole.image_grid_thw)
