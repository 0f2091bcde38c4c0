"""Clips as candidates: which frames are seen, parity with transformers, files that cannot be read, the two data sets."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
import trl
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

import families
from elva_core import cli, files
from elva_core import config as settings
from elva_core.data import caption_sets, emoji, emoji_variants, images, mbeir, video_sets
from elva_core.data import frames as clips
from elva_core.data.frames import Clip
from elva_core.data.items import Item
from elva_core.evaluation import captions as unseen
from elva_core.evaluation import statistics, video
from elva_core.experiments import figures
from elva_core.experiments import results as results_schema
from elva_core.models import encoder, generation, small_models
from elva_core.retrieval import cache, retriever

TEXT = families.TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}}
CLIPS = settings.VideoSettings(drawings=5, length=8, rate=8, frames=(1,), instruction="")
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_heads": 2, "fullatt_block_indexes": [1]}


def pictures(count: int, *, seed: int = 0, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    """Frames that differ in colour and in a gradient."""
    width, height = size
    rng, ramp = np.random.default_rng(seed), np.linspace(0, 1, width)[None, :, None] * np.ones((height, 1, 1))
    return [Image.fromarray((255 * ramp * rng.random(3)).astype(np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[Path]:
    """Three files of different length, shape and rate."""
    folder = tmp_path_factory.mktemp("films")
    for name, count, size, rate in (("a", 9, (64, 64), 8), ("b", 30, (96, 48), 25), ("c", 3, (64, 64), 2)):
        clips.write(folder / f"{name}.mp4", pictures(count, seed=count, size=size), rate=rate)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def other_class(model_folder, smoke) -> encoder.Encoder:
    """A small Qwen2.5-VL with the vocabulary of the small Qwen2-VL."""
    known = encoder.load(model_folder, smoke.encoder)
    tokenizer, old = known.processor.tokenizer, known.backbone.config
    ids = {n: getattr(old, n) for n in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": known.vocabulary_rows}, vision_config=VISION | {"patch_size": 16}, **ids
    )
    size = known.processor.image_processor.size
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, patch_size=16),
        chat_template=small_models.CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    return encoder.Encoder(model, processor, smoke.encoder)


@pytest.fixture(params=["Qwen2-VL", "Qwen2.5-VL"])
def either(request, tiny, other_class) -> encoder.Encoder:
    return tiny if request.param == "Qwen2-VL" else other_class


@pytest.fixture
def mixed(items, films) -> list[Item]:
    """Texts, images, clips, and all of them in one item."""
    picture = next(i.image for i in items if i.image)
    a, b, c = films
    return [
        Item("", None, (Clip(a, 4),)),
        *items[:3],
        Item("What is it?", None, (Clip(b, 8), "and what is that?", Clip(a, 3))),
        Item("Which moves?", picture, (Clip(c, 6), "or", picture)),
        Item("", None, (Clip(b, 1),)),
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


@pytest.mark.parametrize("total", range(1, 40))
def test_sampled_frames_are_the_middles_of_equal_segments(total):
    for count in range(1, 20):
        found = clips.sampled(total, count)
        assert len(found) == count and found == sorted(found)
        for i, frame in enumerate(found):  # the middle of segment i lies in the frame's own stretch of time
            middle = (i + 0.5) * total / count
            assert frame <= middle < frame + 1
        if total % count == 0 and (total // count) % 2:  # whole segments with a middle frame: as many frames before as after
            assert [total - 1 - f for f in reversed(found)] == found
    assert clips.sampled(total, total) == list(range(total))


def test_the_frames_are_those_of_the_file_in_its_order(films):
    shown = pictures(9, seed=9)
    found = clips.read(Clip(films[0], 3))
    assert found.indices == [1, 4, 7] and (found.total, found.rate) == (9, 8.0) and found.pixels.shape == (3, 3, 64, 64)
    for i, frame in zip(found.indices, found.pixels, strict=True):
        errors = [np.abs(frame.transpose(1, 2, 0) - np.asarray(p, int)).mean() for p in shown]
        assert np.argmin(errors) == i and min(errors) < 4  # of 255, by compression
    assert found.sampled_rate == 3 / (9 / 8)


def test_written_files_are_the_same_bytes_again(films, tmp_path):
    clips.write(tmp_path / "again.mp4", pictures(9, seed=9), rate=8)
    assert (tmp_path / "again.mp4").read_bytes() == films[0].read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.mp4"]


def test_tokens_positions_and_states_equal_those_of_plain_transformers(either, mixed):
    request = either.settings.eol_request
    theirs, ours = plain_inputs(either, mixed, request), either.batch(mixed, request)
    assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.mask, theirs.attention_mask)
    wanted = either.backbone.model.compute_3d_position_ids(
        inputs_embeds=ours.given["inputs_embeds"],
        past_key_values=None,
        **{
            name: theirs.get(name)
            for name in ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask", "mm_token_type_ids", "second_per_grid_ts")
            if name in theirs
        },
    )
    assert torch.equal(ours.positions, wanted)
    with torch.no_grad():
        states = either.backbone.model(**theirs).last_hidden_state[:, -1]
        found = either.embed_eol(mixed)
    torch.testing.assert_close(found, torch.nn.functional.normalize(states, dim=-1), atol=1e-5, rtol=0)


def test_time_between_frames_counts_for_one_class_alone(tiny, other_class, tmp_path):
    shown = pictures(8)
    for rate in (1, 8):
        clips.write(tmp_path / f"{rate}.mp4", shown, rate=rate)
    slow, fast = (Item("", None, (Clip(tmp_path / f"{rate}.mp4", 8),)) for rate in (1, 8))
    for model, same in ((tiny, True), (other_class, False)):
        first, second = model.batch([slow, fast], "x").positions.unbind(1)
        assert torch.equal(first, second) is same


def test_text_and_images_are_bit_equal_beside_clips_and_without(tiny, items, mixed):
    again = [copy.copy(i) for i in items]
    with torch.no_grad():
        before = tiny.embed_eol(items)
        tiny.embed_eol(mixed)
        assert torch.equal(tiny.embed_eol(again), before)


def test_an_embedding_does_not_depend_on_its_batch_nor_on_what_is_kept(either, mixed):
    with torch.no_grad():
        together, alone = either.embed_eol(mixed), torch.cat([either.embed_eol([i]) for i in mixed])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        assert torch.equal(either.embed_eol(mixed), together)


def test_frames_are_kept_by_file_and_number(tiny, films, monkeypatch):
    reads = []
    monkeypatch.setattr("elva_core.models.vision.read_clip", lambda clip, read=clips.read: reads.append(clip) or read(clip))
    few, many = Item("", None, (Clip(films[1], 2),)), Item("", None, (Clip(films[1], 6),))
    with torch.no_grad():
        first, second, third = tiny.embed_eol([few, many, few])
        tiny.embed_eol([many])
    assert reads == [Clip(films[1], 2), Clip(films[1], 6)]
    assert torch.equal(first, third) and not torch.allclose(first, second, atol=1e-4)


def test_two_equal_frames_and_one_frame_are_the_picture_itself(either, tmp_path):
    """Qwen2-VL shows an image as two equal frames."""
    clips.write(tmp_path / "still.mp4", pictures(1), rate=1)
    Image.fromarray(clips.read(Clip(tmp_path / "still.mp4", 1)).pixels[0].transpose(1, 2, 0)).save(tmp_path / "still.png")
    picture = Item("What?", tmp_path / "still.png")
    with torch.no_grad():
        wanted = either.embed_eol([picture])
        for count in (1, 2):
            found = either.embed_eol([Item("What?", None, (Clip(tmp_path / "still.mp4", count),))])
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        longer = either.embed_eol([Item("What?", None, (Clip(tmp_path / "still.mp4", 4),))])
    assert not torch.allclose(longer, wanted, atol=1e-4)


def test_the_order_of_frames_matters(either, tmp_path):
    shown = pictures(8)
    for name, frames in (("forward", shown), ("backward", shown[::-1])):
        clips.write(tmp_path / f"{name}.mp4", frames, rate=8)
    with torch.no_grad():
        first, second = either.embed_eol([Item("", None, (Clip(tmp_path / f"{n}.mp4", 8),)) for n in ("forward", "backward")])
    assert float(1 - first @ second) > 1e-4


def test_the_prompt_is_the_one_of_the_released_template(tiny, films):
    """The template of Qwen2-VL and Qwen2.5-VL, as TRL ships it, with a part of type video."""
    template = (Path(trl.__file__).parent / "chat_templates/qwen2_5_vl.jinja").read_text()
    tiny.processor.chat_template = template
    (found,) = tiny.prompts([Item("Which?", None, ("first", Clip(films[0], 4), "then", Clip(films[1], 2)))], "In one word:")
    videos = [{"type": "video"}] * 2
    texts = [{"type": "text", "text": t} for t in ("first", "then", "Which?\nIn one word:")]
    content = [texts[0], videos[0], texts[1], videos[1], texts[2]]
    assert found == tiny.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_content_names_what_stands_above(films, tmp_path):
    clip = (Clip(films[0], 4),)
    assert Item("", None, clip).content == "video" and Item("x", None, clip).content == "video and sentence"
    assert Item("x", tmp_path, clip).content == "image and video and sentence"
    assert [Item("x", tmp_path).content, Item("", tmp_path).content, Item("x").content, Item().content] == [
        "image and sentence",
        "image",
        "sentence",
        "sentence",
    ]


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
    few, many = Item("", None, (Clip(films[0], 2),)), Item("", None, (Clip(films[0], 4),))
    assert not np.array_equal(*kept([few, many])[:])
    before = cache._name(few)
    films[0].touch()
    assert cache._name(few) != before and cache._name(few) != cache._name(many)


def test_frames_are_as_large_as_images(model_folder, smoke, tmp_path):
    clips.write(tmp_path / "large.mp4", pictures(2, size=(256, 256)), rate=2)
    small = encoder.load(model_folder, smoke.encoder.model_copy(update={"min_pixels": 16 * 1024, "max_pixels": 16 * 1024}))
    (seen,) = small.vision.clip_features([Clip(tmp_path / "large.mp4", 2)])
    assert seen.grid.tolist() == [1, 8, 8]  # the folder's own processor makes it 4 x 4


def _sound(path: Path) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _broken(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "wide":
        clips.write(path, [Image.new("RGB", (2010, 10))] * 2, rate=2)
    elif kind == "silent film's sound":
        _sound(path)
    elif kind == "playlist":
        clips.write(folder / "other.mp4", pictures(2), rate=2)
        path.write_text("ffconcat version 1.0\nfile other.mp4\n")
    elif kind != "missing":
        clips.write(path, pictures(40, size=(256, 256)), rate=8)
        whole = path.read_bytes()
        path.write_bytes({"noise": b"\0" * 4000, "empty": b"", "cut": whole[: len(whole) // 2]}[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "is missing; restore the file"),
        ("noise", "cannot be decoded"),
        ("empty", "cannot be decoded"),
        ("cut", "cannot be decoded"),
        ("playlist", "cannot be decoded"),
        ("silent film's sound", "holds no video stream"),
        ("wide", "is 2010x10; crop it"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(kind, says, tmp_path):
    path = _broken(kind, tmp_path)
    with pytest.raises(files.ElvaDataError, match=says) as error:
        clips.read(Clip(path, 4))
    assert str(path) in str(error.value)
    with pytest.raises(files.ElvaDataError, match="ask for one at least"):
        clips.read(Clip(path, 0))


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_clip_with_a_display_matrix_is_read_upright(quarters, mirrored, tmp_path):
    """All eight orientations; the matrix rotates counterclockwise, then mirrors."""
    import av

    drawn = pictures(3, size=(96, 48))
    clips.write(tmp_path / "plain.mp4", drawn, rate=2)
    with av.open(str(tmp_path / "turned.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=2, options=clips.QUALITY)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        stream.set_display_rotation(90 * quarters, hflip=mirrored)
        for frame in drawn:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    expected = np.rot90(clips.read(Clip(tmp_path / "plain.mp4", 3)).pixels, quarters, axes=(2, 3))
    seen = clips.read(Clip(tmp_path / "turned.mp4", 3)).pixels
    assert np.array_equal(seen, expected[..., ::-1] if mirrored else expected)


def test_an_index_at_the_front_does_not_hide_a_cut(tmp_path):
    """Then the file opens, and only the number of frames tells."""
    import av

    whole = tmp_path / "whole.mp4"
    with av.open(str(whole), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for frame in pictures(40):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    with av.open(str(whole)) as container:  # between two frames: half of one does not decode
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: ends[27]])
    assert clips.read(Clip(whole, 4)).total == 40
    with pytest.raises(files.ElvaDataError, match=r"is truncated: .* its header declares 40"):
        clips.read(Clip(tmp_path / "cut.mp4", 4))


def write_msrvtt(root: Path, rows: list[tuple[str, str]], *, suffix: str = ".mp4") -> Path:
    """The annotations of the 1k-A split in CLIP4Clip's layout, and a film for each distinct video."""
    for number, name in enumerate(dict.fromkeys(name for name, _ in rows)):
        clips.write(root / f"videos/{name}.mp4", pictures(4, seed=number), rate=4)
        (root / f"videos/{name}.mp4").rename(root / f"videos/{name}{suffix}")
    table = pd.DataFrame([(f"ret{i}", f"msr{i}", *row) for i, row in enumerate(rows)], columns=["key", "vid_key", "video_id", "sentence"])
    table.to_csv(root / "MSRVTT_JSFUSION_test.csv", index=False)
    return root


def write_msvd(root: Path, captions: dict[str, list[str]]) -> Path:
    """As MSVD is passed on: a list of names, a pickle of lists of words."""
    for number, name in enumerate(captions):
        clips.write(root / f"videos/{name}.mp4", pictures(4, seed=number), rate=4)
        (root / f"videos/{name}.mp4").rename(root / f"videos/{name}.avi")
    (root / "test_list.txt").write_text("\n".join(captions) + "\n")
    (root / "raw-captions.pkl").write_bytes(pickle.dumps({n: [c.split() for c in own] for n, own in captions.items()} | {"train": [["x"]]}))
    return root


def test_msrvtt_is_read_in_both_layouts(tmp_path):
    rows = [("video9", 'a man says "no, thanks"'), ("video7", "a dog runs"), ("video9", "NA")]
    task = video_sets.msrvtt(write_msrvtt(tmp_path, rows), 4)
    words = ["a man says no, thanks.", "a dog runs.", "NA."]
    assert [q.text.replace('"', "") for q in task.queries] == [f"{video_sets.INSTRUCTION} {w[0].upper()}{w[1:]}" for w in words]
    assert [c.clips for c in task.candidates] == [[Clip(tmp_path / f"videos/{n}.mp4", 4)] for n in ("video9", "video7")]
    assert task.positives == [[0], [1], [0]] and task.galleries is None
    (tmp_path / "MSRVTT_JSFUSION_test.csv").unlink()
    records = [{"video_id": v, "video": f"{v}.mp4", "caption": c, "id": i} for i, (v, c) in enumerate(rows)]
    (tmp_path / "msrvtt_test_1k.json").write_text(json.dumps(records))
    assert video_sets.msrvtt(tmp_path, 4) == task


def test_every_caption_of_msvd_asks_for_its_video(tmp_path):
    captions = {"b_0_5": ["a cat sleeps", "the cat is asleep"], "a_3_9": ["a man cooks"]}
    task = video_sets.msvd(write_msvd(tmp_path, captions), 6, "Find it.")
    assert [q.text for q in task.queries] == ["Find it. A cat sleeps.", "Find it. The cat is asleep.", "Find it. A man cooks."]
    assert [c.clips for c in task.candidates] == [[Clip(tmp_path / f"videos/{n}.avi", 6)] for n in captions]
    assert task.positives == [[0], [0], [1]]


def test_sets_are_read_with_marks_blank_ends_hidden_files_and_linked_folders(tmp_path):
    first, second = write_msrvtt(tmp_path / "a", [("video1", "a")]), write_msvd(tmp_path / "b", {"one": ["a b"]})
    before = video_sets.msrvtt(first, 4), video_sets.msvd(second, 4)
    for path in (first / "MSRVTT_JSFUSION_test.csv", second / "test_list.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n")
    for folder in (first, second):
        (folder / "videos").rename(folder / "disk")
        (folder / "videos").mkdir()
        (folder / "videos/part").symlink_to(folder / "disk")
        (folder / "disk/._one.avi").write_bytes(b"of macOS")
    after = video_sets.msrvtt(first, 4), video_sets.msvd(second, 4)
    for old, new in zip(before, after, strict=True):
        assert new.queries == old.queries and new.positives == old.positives
        assert [c.clips[0].path.name for c in new.candidates] == [c.clips[0].path.name for c in old.candidates]


class Call:
    """A pickle of it would make a folder where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize(
    "damage", ["annotations", "column", "cells", "empty", "video", "noise", "no captions", "not words", "call", "nothing"]
)
def test_a_set_that_is_not_whole_is_refused_with_its_place(damage, tmp_path):
    if damage in ("annotations", "column", "cells", "empty", "video", "nothing"):
        root, read = write_msrvtt(tmp_path, [("video1", "a"), ("video2", "b")]), video_sets.msrvtt
    else:
        root, read = write_msvd(tmp_path, {"one": ["a b"], "two": ["c"]}), video_sets.msvd
    table, captions, made = root / "MSRVTT_JSFUSION_test.csv", root / "raw-captions.pkl", tmp_path / "made"
    if damage == "annotations":
        table.unlink()
    elif damage == "column":
        table.write_text(table.read_text().replace("sentence", "text"))
    elif damage == "cells":
        table.write_text(table.read_text().replace("video1,a", "video1,a, then b"))
    elif damage == "empty":
        table.write_text(table.read_text().replace("video2,b", "video2,"))
    elif damage == "nothing":
        table.write_text(table.read_text().splitlines()[0] + "\n")
    elif damage == "video":
        (root / "videos/video2.mp4").unlink()
    elif damage == "noise":
        captions.write_bytes(b"\x80\x05noise")
    elif damage == "call":
        captions.write_bytes(pickle.dumps({"one": Call(made), "two": [["c"]]}))
    else:
        captions.write_bytes(pickle.dumps({"one": [["a"]]} if damage == "no captions" else {"one": ["a b"], "two": [["c"]]}))
    says = {
        "annotations": f"{root}: neither MSRVTT_JSFUSION_test.csv",
        "column": f"{table}: ['sentence'] is missing",
        "cells": f"{table}:2: 5 cells, the header has 4",
        "empty": f"{table}:3: the caption of video 'video2' is ''",
        "video": f"{table}:3: video 'video2' is not below {root / 'videos'}",
        "nothing": f"{root}: no rows",
        "noise": f"{captions} cannot be read as expected",
        "no captions": f"{captions}: no captions of video 'two' ({root / 'test_list.txt'}:2)",
        "not words": f"{captions}: no captions of video 'one'",
        "call": f"{captions} cannot be read as expected (it wants ",
    }
    with pytest.raises(files.ElvaDataError) as error:
        read(root, 4)
    assert says[damage] in str(error.value) and not made.exists()


def test_ties_count_against_the_target_in_the_pool_and_in_a_gallery():
    vectors = {"q": [1, 0], "same": [0.6, 0.8], "twin": [0.6, 0.8], "best": [0.8, 0.6], "far": [0, 1]}

    def look(items):
        return np.array([vectors[i.text] for i in items], np.float32)

    pool = [Item(n) for n in ("same", "twin", "best", "far")]
    task = caption_sets.Task("t", [Item("q")] * 3, pool, [[0], [1], [2]], cutoffs=(1, 2, 3))
    found = unseen.score("s", [task], look).pivot(index="query", columns="metric", values="value")
    assert found.to_numpy().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1]]  # without twins in the way `same` would be second
    task = caption_sets.Task("t", [Item("q")] * 2, pool, [[0], [1]], [[0, 3], [0, 1]], cutoffs=(1, 2))
    assert unseen.score("s", [task], look)["value"].tolist() == [1, 1, 0, 1]


@pytest.fixture(scope="module")
def drawn(emojis, tmp_path_factory) -> Path:
    """Clips of five emoji in every motion."""
    folder = tmp_path_factory.mktemp("drawn")
    emoji_variants.write_clips(emojis, folder, CLIPS, vendor="Twtr", seed=3)
    return folder


def test_clips_show_the_same_drawings_in_the_layout_of_msrvtt(drawn, emojis, tmp_path):
    tasks = {word: video_sets.msrvtt(drawn / word, 8, "Find it.") for word in emoji_variants.MOTIONS}
    (texts,) = {tuple(q.text for q in task.queries) for task in tasks.values()}
    assert len(set(texts)) == 5 and all(task.positives == [[i] for i in range(5)] for task in tasks.values())
    film = {word: clips.read(task.candidates[0].clips[0]).pixels.astype(int) for word, task in tasks.items()}
    codes = next(e.codes for e in emojis if f"Find it. {mbeir.normalise(e.name)}" == texts[0])
    drawing = images.open_image(emoji.image_folder() / "Twtr" / f"{codes}.png").resize((96, 96), Image.Resampling.BICUBIC)
    for frame in film["still"]:
        assert np.abs(frame.transpose(1, 2, 0) - np.asarray(drawing, int)).mean() < 4
    shown = (film["growing"] < 200).any(1).sum((1, 2))  # pixels that are not white
    assert (np.diff(shown) > 0).all()
    columns = [(f < 200).any((0, 1)).nonzero()[0].mean() for f in film["sliding"]]
    assert len(set(np.sign(np.diff(columns)))) == 1 and abs(columns[-1] - columns[0]) > 24
    assert all(np.abs(a - b).mean() > 4 for a, b in itertools.pairwise(film["rotating"]))
    emoji_variants.write_clips(emojis, tmp_path, CLIPS, vendor="Twtr", seed=3)
    for path in drawn.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(drawn)).read_bytes()


def test_a_model_that_sees_motion_finds_the_named_one_and_a_blind_one_has_ties_against_it(drawn, smoke):
    """Vectors made of what is known: the words of a query, the folder and number of a clip."""
    words = sorted(emoji_variants.MOTIONS)
    names = [q.text for q in video_sets.msrvtt(drawn / "still", 1, smoke.video.instruction).queries]

    def look(items, *, sees):
        out = np.zeros((len(items), len(names) + len(words) + 1), np.float32)
        for row, item in zip(out, items, strict=True):
            if item.clips:
                path = item.clips[0].path
                row[int(path.stem.removeprefix("video"))], motion = 1, path.parent.parent.name
            else:
                row[next(i for i, n in enumerate(names) if item.text.startswith(n.rstrip(".")))] = 1
                motion = next((w for w in words if item.text.endswith(f"{w}.")), None)
            row[len(names) + words.index(motion) if sees and motion else -1] = 0.5
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    seeing, blind = (video.moving(drawn, smoke.video, lambda items, s=s: look(items, sees=s)) for s in (True, False))
    for hits, expected in ((seeing, 1), (blind, 0)):  # a blind one ties, and ties count against the target
        means = hits.groupby("metric")["value"].mean()
        assert means["hit@1"] == 1 and means["named motion first"] == expected
    counts = seeing.groupby(["words", "metric"])["value"].size()
    assert counts["name", "hit@1"] == 5 * 4 * len(smoke.video.frames) and counts["name, motion", "hit@5"] == 5 * 3
    rows = video.table(seeing.assign(model="m"), 10, 1)
    assert set(rows["n"]) == {5} and len(rows) == len(seeing) / 5


def test_the_gain_is_paired_over_what_moves_at_the_most_frames(tmp_path):
    rng = np.random.default_rng(1)
    rows = itertools.product(("a", "b"), ("still", "rotating", "sliding"), (1, 8), ("name", "name, motion"), ("hit@1", "hit@5"), range(30))
    hits = pd.DataFrame(rows, columns=["model", "motion", "frames", "words", "metric", "query"]).assign(set="clips")
    hits["value"] = rng.integers(0, 2, len(hits))
    tables = statistics.reported()
    (row,) = video.gain(hits, "a", "b", tables, 200, 1).to_dict("records")
    own = hits.query("frames == 8 and words == 'name' and metric == 'hit@5' and motion != 'still'").set_index("model")["value"]
    assert row["value"] == pytest.approx(own["a"].mean() - own["b"].mean()) and row["ci_low"] < row["value"] < row["ci_high"]
    assert row["paper"] == pytest.approx(70.5 - 68.6) and row["n"] == 30
    (more,) = video.more_frames(hits, "a", 200, 1).to_dict("records")
    few = hits.query("frames == 1 and words == 'name' and metric == 'hit@5' and motion != 'still' and model == 'a'")["value"].mean()
    assert more["what"] == "8 frames over 1" and more["value"] == pytest.approx(own["a"].mean() - few) and more["n"] == 30
    assert video.more_frames(hits[hits["frames"] == 1], "a", 5, 1).empty
    results = video.table(hits, 10, 1)
    rows = video.headline(results)
    assert len(rows) == 2 * 3 and set(rows["group"]) == {"8 frames"} and video.experiment(hits) == "Table 7, own clips"
    claim = results_schema.points(pd.DataFrame([row])).iloc[0]
    assert claim["value"] == pytest.approx(100 * row["value"]) and claim["metric"] == "difference of hit@5, points"


def test_a_profile_may_name_the_sets_or_nothing(tmp_path, smoke):
    def look(items):
        return np.eye(len(items), 8, dtype=np.float32)

    write_msrvtt(tmp_path / "msrvtt", [("video1", "a dog"), ("video2", "a cat")])
    write_msvd(tmp_path / "msvd", {"one": ["a b"], "two": ["c"], "three": ["d"]})
    known = settings.VideoSettings(sets=str(tmp_path), frames=(2, 4), instruction="Find it.")
    hits = pd.concat(video.measure(known, tmp_path, look).assign(model=m) for m in "ab")
    assert hits.groupby(["set", "frames"])["query"].nunique().to_dict() == {
        ("MSR-VTT", 2): 2, ("MSR-VTT", 4): 2, ("MSVD", 2): 3, ("MSVD", 4): 3,
    }  # fmt: skip
    gains = video.gain(hits, "a", "b", statistics.reported(), 5, 1)
    assert gains["n"].tolist() == [5] and video.experiment(hits) == "Table 7"
    with pytest.raises(files.ElvaDataError, match="none of"):
        video.measure(known.model_copy(update={"sets": str(tmp_path / "msvd")}), tmp_path, look)
    nothing = video.measure(None, tmp_path, look).assign(model="a")
    assert video.more_frames(nothing, "a", 5, 1).empty
    results, gains = video.table(nothing, 5, 1), video.gain(nothing, "a", "b", statistics.reported(), 5, 1)
    assert not len(results) and not len(gains) and not len(video.headline(results)) and not len(results_schema.points(gains))
    assert figures.frames_seen(results, "none") and figures.frames_seen(video.table(hits.query("metric == 'hit@5'"), 5, 1), "some")
    for wrong in ({"sets": "x", "drawings": 3}, {}, {"drawings": 3, "frames": (4, 2)}):
        with pytest.raises(ValueError, match=r"give either|must ascend"):
            settings.VideoSettings(**{"frames": (2,), "instruction": ""} | wrong)


def test_the_command_scores_a_folder_and_names_a_broken_video(model_folder, smoke, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    encoder.load(model_folder, smoke.encoder).save(tmp_path / "model", stage="test", parent="none")
    root = write_msrvtt(tmp_path / "set", [("video1", "a dog"), ("video2", "a cat"), ("video3", "a cow")])
    asked = ["video", "--set", "msrvtt", "--root", root, "--model", tmp_path / "model", "--out", tmp_path / "out", "--profile", "smoke"]
    assert cli.main([*map(str, asked), "--frames", "2"]) == 0
    found = pd.read_csv(tmp_path / "out/msrvtt.csv").set_index("metric")
    assert found.loc["hit@5", "value"] == 1 and set(found["n"]) == {3}  # of three
    (root / "videos/video2.mp4").write_bytes(b"no film")
    assert cli.main([*map(str, asked), "--frames", "2"]) == 1
    assert "video2.mp4 cannot be decoded" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    assert cli.main([str(a) if a != root else str(tmp_path / "other") for a in asked]) == 1
    assert "unpack the annotations" in capsys.readouterr().err
