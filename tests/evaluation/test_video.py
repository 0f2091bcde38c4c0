"""Clips as candidates: which frames are seen, files that cannot be read, the two data sets, and what is measured on them."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from elva_core import cli, files
from elva_core import config as settings
from elva_core.data import emoji, emoji_variants, images, mbeir, video_sets
from elva_core.data import frames as clips
from elva_core.data.frames import Clip
from elva_core.data.items import Item
from elva_core.evaluation import statistics, video
from elva_core.experiments import figures
from elva_core.experiments import results as results_schema
from elva_core.models import encoder
from elva_core.retrieval import cache
from films import film, pictures

CLIPS = settings.VideoSettings(drawings=5, length=8, rate=8, frames=(1,), instruction="")


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


def test_the_frames_are_those_of_the_file_in_its_order(tmp_path):
    shown = pictures(9)
    path = film(tmp_path / "a.mp4", shown)
    found = clips.read(Clip(path, 3))
    assert found.indices == [1, 4, 7] and (found.total, found.rate) == (9, 8.0) and found.pixels.shape == (3, 3, 64, 64)
    for i, frame in zip(found.indices, found.pixels, strict=True):
        errors = [np.abs(frame.transpose(1, 2, 0) - np.asarray(p, int)).mean() for p in shown]
        assert np.argmin(errors) == i and min(errors) < 4  # of 255, by compression
    assert found.sampled_rate == 3 / (9 / 8)


@pytest.mark.parametrize("text", ["", "x"])
@pytest.mark.parametrize("clip", [(), (Clip(Path("a.mp4"), 4),)])
@pytest.mark.parametrize("image", [None, Path("a.png")])
def test_content_names_what_stands_above(text, clip, image):
    words = ["image"] * bool(image) + ["video"] * bool(clip) + ["sentence"] * bool(text)
    assert Item(text, image, clip).content == (" and ".join(words) or "sentence")


def encoded(path: Path, shown: list[Image.Image], *, turned: int = 0, mirrored: bool = False, **options: str) -> Path:
    """A film with a display matrix, and options of the container."""
    import av

    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("mpeg4", rate=2, options=clips.QUALITY)
        stream.width, stream.height = shown[0].size
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(90 * turned, hflip=mirrored)
        for frame in shown:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(path: Path) -> None:
    whole = film(path, pictures(40, size=(256, 256))).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def playlist(path: Path) -> None:
    other = film(path.with_name("other.mp4"), pictures(2))
    path.write_text(f"ffconcat version 1.0\nfile {other.name}\n")


UNREADABLE = [
    pytest.param(lambda path: None, "is missing; restore the file", id="missing"),
    pytest.param(lambda path: path.write_bytes(b"\0" * 4000), "cannot be decoded", id="noise"),
    pytest.param(lambda path: path.write_bytes(b""), "cannot be decoded", id="empty"),
    pytest.param(cut, "cannot be decoded", id="cut"),
    pytest.param(playlist, "cannot be decoded", id="playlist"),
    pytest.param(sound, "holds no video stream", id="a silent film's sound"),
    pytest.param(lambda path: film(path, [Image.new("RGB", (2010, 10))] * 2), "is 2010x10; crop it", id="wide"),
]


@pytest.mark.parametrize(("make", "says"), UNREADABLE)
def test_a_file_that_cannot_be_read_is_named(make, says, tmp_path):
    make(tmp_path / "film.mp4")
    with pytest.raises(files.ElvaDataError, match=says) as error:
        clips.read(Clip(tmp_path / "film.mp4", 4))
    assert str(tmp_path / "film.mp4") in str(error.value)


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_clip_with_a_display_matrix_is_read_upright(quarters, mirrored, tmp_path):
    """All eight orientations; the matrix rotates counterclockwise, then mirrors."""
    drawn = pictures(3, size=(96, 48))
    plain, turned = film(tmp_path / "plain.mp4", drawn), encoded(tmp_path / "turned.mp4", drawn, turned=quarters, mirrored=mirrored)
    expected = np.rot90(clips.read(Clip(plain, 3)).pixels, quarters, axes=(2, 3))
    assert np.array_equal(clips.read(Clip(turned, 3)).pixels, expected[..., ::-1] if mirrored else expected)


def test_an_index_at_the_front_does_not_hide_a_cut(tmp_path):
    """Then the file opens, and only the number of frames tells."""
    import av

    whole = encoded(tmp_path / "whole.mp4", pictures(40), movflags="faststart")
    with av.open(str(whole)) as container:  # between two frames: half of one does not decode
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: ends[27]])
    assert clips.read(Clip(whole, 4)).total == 40
    with pytest.raises(files.ElvaDataError, match=r"is truncated: .* its header declares 40"):
        clips.read(Clip(tmp_path / "cut.mp4", 4))


ROWS = [("video1", "a"), ("video2", "b")]
TABLE, RECORDS, LIST, WORDS = "MSRVTT_JSFUSION_test.csv", "msrvtt_test_1k.json", "test_list.txt", "raw-captions.pkl"


def write_set(root: Path, rows: list[tuple[str, str]], layout: str = TABLE) -> Path:
    """(video, caption) in CLIP4Clip's or the hub's layout of MSR-VTT 1k-A, or as MSVD is passed on; and a film for each video."""
    names = list(dict.fromkeys(name for name, _ in rows))
    for number, name in enumerate(names):
        path = film(root / f"videos/{name}.mp4", pictures(4, seed=number))
        path.rename(path.with_suffix(".avi" if layout == WORDS else ".mp4"))
    if layout == TABLE:
        cells = [(f"ret{i}", f"msr{i}", *row) for i, row in enumerate(rows)]
        pd.DataFrame(cells, columns=["key", "vid_key", "video_id", "sentence"]).to_csv(root / TABLE, index=False)
    elif layout == RECORDS:
        records = [{"video_id": v, "video": f"{v}.mp4", "caption": c, "id": i} for i, (v, c) in enumerate(rows)]
        (root / RECORDS).write_text(json.dumps(records))
    else:
        (root / LIST).write_text("\n".join(names) + "\n")
        words = {name: [c.split() for v, c in rows if v == name] for name in names}
        (root / WORDS).write_bytes(pickle.dumps(words | {"train": [["x"]]}))
    return root


@pytest.mark.parametrize(("layout", "order"), [(TABLE, (0, 1, 2)), (RECORDS, (0, 1, 2)), (WORDS, (0, 2, 1))])
@pytest.mark.parametrize("instruction", [(), ("Find it.",)])
def test_every_caption_of_a_set_asks_for_its_video_in_all_layouts(layout, order, instruction, tmp_path):
    rows = [("video9", 'a man says "no, thanks"'), ("video7", "a dog runs"), ("video9", "NA")]
    task = (video_sets.msvd if layout == WORDS else video_sets.msrvtt)(write_set(tmp_path, rows, layout), 4, *instruction)
    (prompt,), words = instruction or (video_sets.INSTRUCTION,), ["A man says no, thanks.", "A dog runs.", "NA."]
    assert [q.text.replace('"', "") for q in task.queries] == [f"{prompt} {words[i]}" for i in order]
    suffix = ".avi" if layout == WORDS else ".mp4"
    assert [c.clips for c in task.candidates] == [[Clip(tmp_path / f"videos/{n}{suffix}", 4)] for n in ("video9", "video7")]
    assert task.positives == [[i % 2] for i in order] and task.galleries is None


def test_sets_are_read_with_marks_blank_ends_hidden_files_and_linked_folders(tmp_path):
    first, second = write_set(tmp_path / "a", ROWS), write_set(tmp_path / "b", ROWS, WORDS)
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

    def __reduce__(self):
        return Path.mkdir, (Path("made"),)


NOT_WHOLE = [  # layout, file, its new content or what is replaced in it (None: it is gone), what is said
    (TABLE, TABLE, None, f"{{root}}: neither {TABLE}"),
    (TABLE, TABLE, ("video2,b", "video2,"), "{file}, entry 2: the caption of video 'video2' is ''"),
    (TABLE, TABLE, b"key,vid_key,video_id,sentence\n", "{file}: no rows"),
    (TABLE, "videos/video2.mp4", None, f"{{root}}/{TABLE}, entry 2: video 'video2' is not below {{root}}/videos"),
    (WORDS, WORDS, {"video1": [["a"]]}, f"{{root}}/{LIST}, entry 2: key 'video2' is missing"),
    (WORDS, WORDS, {"video1": ["a b"], "video2": [["c"]]}, f"{{root}}/{LIST}, entry 1: caption is 'a b', expected a list"),
    (WORDS, WORDS, {"video1": Call(), "video2": [["c"]]}, "{file}: cannot be read as expected (UnpicklingError: it wants "),
]


@pytest.mark.parametrize(("layout", "file", "content", "says"), NOT_WHOLE)
def test_a_set_that_is_not_whole_is_refused_with_its_place(layout, file, content, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, path = write_set(tmp_path, ROWS, layout), tmp_path / file
    if content is None:
        path.unlink()
    elif isinstance(content, tuple):
        path.write_text(path.read_text().replace(*content))
    else:
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(files.ElvaDataError) as error:
        (video_sets.msvd if layout == WORDS else video_sets.msrvtt)(root, 4)
    assert says.format(root=root, file=path) in str(error.value) and not (tmp_path / "made").exists()


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

    write_set(tmp_path / "msrvtt", ROWS)
    write_set(tmp_path / "msvd", [*ROWS, ("video3", "c")], WORDS)
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
    root = write_set(tmp_path / "set", [*ROWS, ("video3", "c")])
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
