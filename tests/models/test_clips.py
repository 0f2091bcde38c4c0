"""Texts, images and clips under the encoders: parity with transformers, batches, what is kept, prompts, summaries, the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from PIL import Image
from transformers.video_utils import VideoMetadata

from elva_core import config as settings
from elva_core.data import frames as clips
from elva_core.data import images
from elva_core.data.frames import Clip
from elva_core.data.items import Item
from elva_core.models import encoder, generation, small_models
from elva_core.retrieval import cache, retriever
from films import film, pictures


def shows(path: Path, frames: int, text: str = "") -> Item:
    return Item(text, None, (Clip(path, frames),))


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[Path]:
    """Three files of different length, shape and rate."""
    folder = tmp_path_factory.mktemp("films")
    made = (("a", 9, (64, 64), 8), ("b", 30, (96, 48), 25), ("c", 3, (64, 64), 2))
    return [film(folder / f"{name}.mp4", pictures(count, seed=count, size=size), rate) for name, count, size, rate in made]


@pytest.fixture(scope="module")
def other_class(model_folder, smoke) -> encoder.Encoder:
    """A small Qwen2.5-VL with the vocabulary of the small Qwen2-VL."""
    sizes = settings.teaching("tiny").sizes.model_copy(update={"architecture": "qwen2_5_vl"})
    model, processor = small_models.build_from(str(model_folder), sizes, seed=0)
    return encoder.Encoder(model.eval(), processor, smoke.encoder)


@pytest.fixture(params=["Qwen2-VL", "Qwen2.5-VL"])
def either(request, tiny, other_class) -> encoder.Encoder:
    return tiny if request.param == "Qwen2-VL" else other_class


@pytest.fixture
def mixed(items, films) -> list[Item]:
    """Texts, images, clips, several of a kind and all of them in one item."""
    picture, other = [i.image for i in items if i.image][:2]
    a, b, c = films
    return [
        shows(a, 4),
        *items[:3],
        Item("What is it?", None, (Clip(b, 8), "and what is that?", Clip(a, 3))),
        Item("Which moves?", picture, (Clip(c, 6), "or", picture)),
        Item("Which one?", picture, ("is shorter than", other, "and bluer")),
        shows(b, 1),
    ]


def plain_inputs(model: encoder.Encoder, items: list[Item], request: str):
    """What transformers' own processor makes of the prompts, given the same frames and when they were taken."""
    seen = [clips.read(clip) for item in items for clip in item.clips]
    return model.processor(
        text=model.prompts(items, request),
        images=[images.open_image(path) for item in items for path in item.images],
        videos=[torch.from_numpy(f.pixels) for f in seen],
        videos_kwargs={
            "video_metadata": [VideoMetadata(total_num_frames=f.total, fps=f.rate, frames_indices=f.indices) for f in seen],
            "do_sample_frames": False,
        },
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def test_tokens_positions_and_states_equal_those_of_plain_transformers(either, mixed):
    """So the order of frames counts, and the time between them for one class alone."""
    request = either.settings.eol_request
    theirs, ours = plain_inputs(either, mixed, request), either.batch(mixed, request)
    assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.mask, theirs.attention_mask)
    names = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask", "mm_token_type_ids", "second_per_grid_ts")
    known = {name: theirs[name] for name in names if name in theirs}
    wanted = either.backbone.model.compute_3d_position_ids(inputs_embeds=ours.given["inputs_embeds"], past_key_values=None, **known)
    assert torch.equal(ours.positions, wanted)
    with torch.no_grad():
        states = either.backbone.model(**theirs).last_hidden_state[:, -1]
        found = either.embed_eol(mixed)
    torch.testing.assert_close(found, torch.nn.functional.normalize(states, dim=-1), atol=1e-5, rtol=0)


def test_an_embedding_does_not_depend_on_its_batch_nor_on_what_is_kept(either, mixed):
    with torch.no_grad():
        together, alone = either.embed_eol(mixed), torch.cat([either.embed_eol([i]) for i in mixed])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        assert torch.equal(either.embed_eol(mixed), together)


def test_frames_are_kept_by_file_and_number(tiny, films, monkeypatch):
    reads = []
    monkeypatch.setattr("elva_core.models.vision.read_clip", lambda clip, read=clips.read: reads.append(clip) or read(clip))
    few, many = shows(films[1], 2), shows(films[1], 6)
    with torch.no_grad():
        first, second, third = tiny.embed_eol([few, many, few])
        tiny.embed_eol([many])
    assert reads == [Clip(films[1], 2), Clip(films[1], 6)]
    assert torch.equal(first, third) and not torch.allclose(first, second, atol=1e-4)


def test_two_equal_frames_and_one_frame_are_the_picture_itself(either, tmp_path):
    """Qwen2-VL shows an image as two equal frames."""
    still = film(tmp_path / "still.mp4", pictures(1))
    Image.fromarray(clips.read(Clip(still, 1)).pixels[0].transpose(1, 2, 0)).save(tmp_path / "still.png")
    with torch.no_grad():
        (wanted,) = either.embed_eol([Item("What?", tmp_path / "still.png")])
        once, twice, longer = (either.embed_eol([shows(still, count, "What?")])[0] for count in (1, 2, 4))
    for found in (once, twice):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(longer, wanted, atol=1e-4)


def test_the_prompt_is_the_one_of_the_released_template(tiny, films):
    """The template of Qwen2-VL and Qwen2.5-VL, as TRL ships it, with a part of type video."""
    template = (Path(trl.__file__).parent / "chat_templates/qwen2_5_vl.jinja").read_text()
    tiny.processor.chat_template = template
    (found,) = tiny.prompts([Item("Which?", None, ("first", Clip(films[0], 4), "then", Clip(films[1], 2)))], "In one word:")
    videos = [{"type": "video"}] * 2
    texts = [{"type": "text", "text": t} for t in ("first", "then", "Which?\nIn one word:")]
    content = [texts[0], videos[0], texts[1], videos[1], texts[2]]
    assert found == tiny.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_a_summary_is_written_of_a_clip_and_its_vector_is_that_of_one_forward(either, mixed):
    with torch.no_grad():
        out = generation.generate(either, mixed)
        summaries = [s for (s,) in out.summaries(either.end_id)]
        whole, _ = either.embed_summaries(mixed, summaries)
    torch.testing.assert_close(out.embeddings[:, 0], whole, atol=2e-5, rtol=0)


def test_encode_and_the_store_know_clips(tiny, mixed, films, tmp_path):
    vectors, _ = retriever.encode(tiny, mixed, batch=2, template="eol")
    with torch.no_grad():
        np.testing.assert_allclose(vectors, tiny.embed_eol(mixed).numpy(), atol=1e-5)
    kept = cache.Store(tmp_path, tiny, batch=4, template="eol")
    few, many = shows(films[0], 2), shows(films[0], 4)
    assert not np.array_equal(*kept([few, many])[:])
    before = cache._name(few)
    films[0].touch()
    assert cache._name(few) != before and cache._name(few) != cache._name(many)


def test_frames_are_as_large_as_images(model_folder, smoke, tmp_path):
    large = film(tmp_path / "large.mp4", pictures(2, size=(256, 256)))
    small = encoder.load(model_folder, smoke.encoder.model_copy(update={"min_pixels": 16 * 1024, "max_pixels": 16 * 1024}))
    (seen,) = small.vision.clip_features([Clip(large, 2)])
    assert seen.grid.tolist() == [1, 8, 8]  # the folder's own processor makes it 4 x 4
