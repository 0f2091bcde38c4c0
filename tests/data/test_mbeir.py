"""The format: normaliser and id vectors, reader, linter, and every kind of bad input with its message."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from elva_core.data import images, lint, mbeir
from elva_core.data.items import Item, query_item
from elva_core.files import ElvaDataError
from elva_core.mrbench import annotate, build
from elva_core.training import contrastive

VECTORS = {  # beside those of its docstring
    "what?": "What?",
    '" hi "': " hi .",
    " hi .": "Hi .",  # so it is not idempotent
    'say "hi"': 'Say "hi.',
    '"': "",
}


@pytest.mark.parametrize(("raw", "normal"), VECTORS.items())
def test_normaliser_vectors(raw, normal):
    assert mbeir.normalise(raw) == normal


@given(st.integers(0, 50), st.integers(1, mbeir.CANDIDATE_ID_BASE - 1))
def test_candidate_ids_survive_hashing(dataset, number):
    did = f"{dataset}:{number}"
    assert mbeir.unhashed_candidate_id(mbeir.hashed_candidate_id(did)) == did


def test_ids_that_spill_or_are_fillers_are_refused():
    with pytest.raises(ElvaDataError, match="spills into dataset 10"):
        mbeir.hashed_query_id("9:500000")
    with pytest.raises(ElvaDataError, match="fewer hits"):
        mbeir.unhashed_candidate_id(-1)
    for bad in ("9", "9:0", "x:1", "9:1:2", "²:1", "09:1", "00:1", "9:01"):
        with pytest.raises(ElvaDataError, match="dataset_id:n"):
            mbeir.split_id(bad)


def test_a_written_root_is_clean(root):
    assert lint.check(root) == []


def test_the_card_form_of_positives_and_the_swapped_modality_are_read():
    row = {"qid": "8:1", "query_modality": "text,image", "query_txt": "a", "query_img_path": "b", "pos_cand_list": [{"did": "8:3"}]}
    q = mbeir.parse_query(row | {"task_id": 7})
    assert (q.modality, q.positives, q.negatives) == ("image,text", ("8:3",), ())


def test_official_units_come_first_and_in_the_papers_order(tmp_path):
    root = mbeir.Root(tmp_path)
    for unit in ("zoo_task0", "cirr_task7", "mscoco_task0", "visualnews_task0"):
        root.write_queries(unit, "test", [])
    assert root.units("test") == ["visualnews_task0", "mscoco_task0", "cirr_task7", "zoo_task0"]


def test_prompt_is_chosen_by_a_stable_hash_and_can_be_fixed(root):
    q = root.queries(root.units("test")[0], "test")[0]
    assert query_item(root, q, seed=1).text == query_item(root, q, seed=1).text
    prompts = {query_item(root, q, prompt_index=i).text for i in range(4)}
    assert len(prompts) == 4 and query_item(root, q, seed=5).text in prompts
    assert all(p.endswith(q.text) for p in prompts)


def replace_line(path, number, line):
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


def change_record(path, number, **changes):
    """The record of a line, in which some keys get other values."""
    record = json.loads(path.read_text().splitlines()[number - 1])
    replace_line(path, number, json.dumps(record | changes))
    return record


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("qid", "10:0", "dataset_id:n"),
        ("query_txt", 7, "query_txt is int"),
        ("task_id", "x", "expected 0 to 8"),
        ("pos_cand_list", "10:1", "expected a list"),
        ("query_modality", "sound", "is none of"),
        ("query_txt", "\ud800", "surrogates not allowed"),
        ("query_src_content", "[" * 100_000, "recursion"),
        ("query_src_content", '{"grains": ["who"]}', "kind, text"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(own_root, key, value, message):
    path = own_root.query_path("emoji_task0", "test")
    change_record(path, 2, **{key: value})
    with pytest.raises(ElvaDataError, match=rf"{path.name}:2: .*{message}"):
        own_root.queries("emoji_task0", "test")


def test_image_problems_are_named(own_root):
    some = own_root.pool("emoji_task0", "test")
    missing, truncated, wide = (own_root.image_path(c.image) for c in some[:3])
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:300])
    Image.new("RGB", (5000, 10)).save(wide)
    for path, message in ((missing, "is missing"), (truncated, "cannot be decoded"), (wide, "5000x10")):
        with pytest.raises(ElvaDataError, match=message) as caught:
            images.open_image(path)
        assert str(path) in str(caught.value)
    problems = lint.check(own_root)
    assert all(any(str(p) in line for line in problems) for p in (missing, truncated, wide))


def test_a_link_in_the_root_is_followed_wherever_it_leads(own_root, smoke, tmp_path):
    """Of a folder, of one picture through a second link, and of a file of the layout."""
    whole = {c.did: np.asarray(images.open_image(own_root.image_path(c.image))) for c in own_root.pool("", "test", "global") if c.image}
    (own_root.folder / "mbeir_images").rename(tmp_path / "disk")
    (own_root.folder / "mbeir_images").symlink_to(tmp_path / "disk")
    picture = own_root.image_path(next(c.image for c in own_root.pool("", "test", "global") if c.image))
    for n, path in enumerate((picture, own_root.query_path("emoji_task0", "test"))):
        path.rename(tmp_path / f"blob{n}")
        (tmp_path / f"link{n}").symlink_to(f"blob{n}")
        path.symlink_to(tmp_path / f"link{n}")
    assert lint.check(own_root) == []
    seen = {c.did: np.asarray(images.open_image(own_root.image_path(c.image))) for c in own_root.pool("", "test", "global") if c.image}
    assert seen.keys() == whole.keys() and all(np.array_equal(seen[did], whole[did]) for did in whole)
    bench = build.build(own_root, smoke.mrbench, annotate=annotate.exact, folder=tmp_path / "bench", seed=1)[0]
    assert lint.check(bench) == [] and not [p for p in bench.folder.rglob("*") if p.is_symlink()]


def test_a_byte_order_mark_and_a_blank_end_are_harmless_in_every_file(own_root, smoke, tmp_path):
    plain = [list(own_root.queries(unit, "test")) for unit in own_root.units("test")]
    judged, prompts = own_root.qrels("emoji_task0", "test"), own_root.instructions
    texts = [p for kind in ("jsonl", "txt", "tsv") for p in own_root.folder.rglob(f"*.{kind}")]
    assert {p.suffix for p in texts} == {".jsonl", ".txt", ".tsv"}
    for path in texts:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n \n")
    marked = mbeir.Root(own_root.folder)
    assert lint.check(marked) == []
    assert [list(marked.queries(unit, "test")) for unit in marked.units("test")] == plain
    assert [marked.queries(unit, "test")[:] for unit in marked.units("test")] == plain
    assert marked.qrels("emoji_task0", "test") == judged and marked.instructions == prompts
    _, counts, _ = build.build(marked, smoke.mrbench, annotate=annotate.exact, folder=tmp_path / "bench", seed=1)
    assert counts["pool"].tolist() == [len(marked.pool(unit, "test")) for unit in counts["unit"]]


def test_a_query_without_a_positive_in_its_local_pool_is_named(own_root):
    path, qrels = own_root.query_path("emoji_task0", "test"), own_root.qrels_path("emoji_task0", "test")
    record = change_record(path, 3, pos_cand_list=["9:1"])
    image = next(c.image for c in own_root.pool("emoji_task0", "test") if c.image)
    with own_root.pool_path("", "test", "global").open("a") as everything:
        everything.write(json.dumps({"did": "9:1", "txt": None, "img_path": image, "modality": "image"}) + "\n")
    lines = [line for line in qrels.read_text().splitlines() if line.split()[0] != record["qid"]]
    qrels.write_text("\n".join([*lines, f"{record['qid']} 0 9:1 1 0"]) + "\n")
    assert lint.check(own_root) == [f"{path}:3: no positive is of dataset 10, so the local pool holds none"]


def test_every_broken_rule_is_named_with_its_place_in_one_pass(own_root):
    asked, judged = own_root.query_path("emoji_task0", "test"), own_root.qrels_path("emoji_task0", "test")
    pool, union, lines = own_root.pool_path("emoji_task0", "test"), own_root.union_train_path(), judged.read_text().splitlines()
    change_record(asked, 1, query_txt=None)
    change_record(asked, 2, task_id=7)
    change_record(asked, 3, neg_cand_list=change_record(asked, 3)["pos_cand_list"])
    change_record(pool, 1, img_path="../../x.png")
    change_record(union, 3, pos_cand_list=["10:999999"])
    replace_line(judged, 4, lines[3].replace(" 0 10:", " 0 10:9"))
    replace_line(judged, 5, lines[4][:-1] + "7")
    replace_line(judged, 6, lines[5].replace(" 1 0", " yes 0"))
    problems = lint.check(own_root)
    for where, what in (
        (f"{asked}:1", "modality text but text is None"),
        (f"{asked}:2", "task_id 7 does not fit"),
        (f"{asked}:3", "positive and negative at once"),
        (f"{pool}:1", "leaves the root"),
        (f"{union}:3", "positive 10:999999 is not in the global pool"),
        (f"{judged}:4", "is only in the qrels"),
        (f"{judged}:5", "task 7"),
        (f"{judged}:6", "expected"),
        (judged, "is only in pos_cand_list"),
    ):
        assert any(p.startswith(f"{where}: ") and what in p for p in problems), what


def test_a_pool_is_read_by_offset_and_in_any_order(root):
    pool = root.pool("", "test", "global")
    records = list(pool)
    assert [pool[i] for i in range(-1, -len(pool) - 1, -1)] == records[::-1] and pool[2:9:3] == records[2:9:3]
    assert [pool.row(c.did) for c in records] == list(range(len(pool))) and pool.row("10:9999999") is None
    for modality in mbeir.MODALITIES:
        assert pool.rows_of(modality).tolist() == [i for i, c in enumerate(records) if c.modality == modality]
    with pytest.raises(IndexError):
        pool[len(pool)]


def test_a_large_pool_takes_few_bytes_a_candidate(tmp_path):
    path, count = tmp_path / "pool.jsonl", 50_000
    text = "a passage of some length " * 10
    mbeir.write_records(path, (mbeir.Candidate(f"9:{n}", text, None, "text") for n in range(1, count + 1)))
    tracemalloc.start()
    pool = mbeir.Pool(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pool.row("9:777") == 776 and held < 40 * count and peak < 80 * count


@pytest.mark.parametrize("line", ['{"did": "10:1", ', "\n"])
def test_a_malformed_or_blank_line_is_named_with_file_and_number_and_the_linter_goes_on(own_root, line):
    path = own_root.pool_path("emoji_task0", "test")
    replace_line(path, 2, line)
    with pytest.raises(ElvaDataError, match=rf"{path.name}:2: not a JSON object"):
        own_root.pool("emoji_task0", "test")
    replace_line(path, 5, json.dumps({"did": "10:1", "modality": "text", "txt": None}))
    problems = lint.check(own_root, decode_images=False)
    assert any(f"{path}:2: not a JSON" in p for p in problems) and any(f"{path}:5: modality text but" in p for p in problems)


def test_a_folder_that_is_no_root_is_a_problem(tmp_path):
    assert "is this the root" in lint.check(mbeir.Root(tmp_path))[0]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["10:1", "text", "image", "image,text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
QUERY = {"qid": "10:1", "query_txt": "a", "query_img_path": None, "query_modality": "text", "pos_cand_list": ["10:2"], "task_id": 0}
CANDIDATE = {"did": "10:2", "txt": "b", "img_path": None, "modality": "text", "src_content": None}


def written(tmp_path_factory, name, data: bytes):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    return path


def data_or_a_named_error(read, path):
    """What `read` gives, or None if it raised the one error that names file and line."""
    try:
        return read()
    except ElvaDataError as error:
        assert f"{path}:" in str(error) or f"{path} " in str(error)
        return None


FIELDS = [(QUERY, key, mbeir.parse_query, mbeir.query_record) for key in (*QUERY, "query_src_content", "neg_cand_list")]
FIELDS += [(CANDIDATE, key, mbeir.parse_candidate, mbeir.candidate_record) for key in CANDIDATE]


@settings(max_examples=200)
@given(st.sampled_from(FIELDS), JSON)
def test_a_row_with_any_value_in_any_key_is_data_or_a_named_error(tmp_path_factory, field, value):
    row, key, parse, record = field
    path = written(tmp_path_factory, "row.jsonl", json.dumps(row | {key: value}).encode() + b"\n")
    records = data_or_a_named_error(lambda: list(mbeir.Records(path, parse)), path)
    assert not records or parse(record(records[0])) == records[0]


@given(st.integers(0, 200), st.binary(max_size=200))
def test_a_file_cut_anywhere_with_any_end_is_data_or_a_named_error(tmp_path_factory, kept, end):
    whole = (json.dumps(CANDIDATE) + "\n" + json.dumps(CANDIDATE | {"did": "10:3"})).encode()
    path = written(tmp_path_factory, "cut.jsonl", whole[:kept] + end)
    records = data_or_a_named_error(lambda: list(mbeir.Pool(path)), path)
    assert records is None or [c.did for c in records] == ["10:2", "10:3"][: len(records)]


@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_random_qrels_and_instructions_are_data_or_a_named_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    root = mbeir.Root(folder)
    for path, read in (
        (root.qrels_path("x_task0", "test"), lambda: root.qrels("x_task0", "test")),
        (folder / "instructions/query_instructions.tsv", lambda: mbeir.Root(folder).instructions),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"header\n" * (path.suffix == ".tsv") + data)
        data_or_a_named_error(read, path)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(mbeir, "MAX_LINE", 100)
    (tmp_path / "long.jsonl").write_bytes(b"{}\n" + b"x" * 1000)
    with pytest.raises(ElvaDataError, match=r"long.jsonl:2: the line has more than 100 bytes"):
        list(mbeir.read_lines(tmp_path / "long.jsonl"))


def png(width: int, height: int, body: bytes) -> bytes:
    """A PNG of any announced size, whatever its data hold."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize("size", [(50_000, 1), (1, 50_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1), (0, 7)])
def test_announced_sizes_beyond_reason_are_refused_before_decoding(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png(*size, zlib.compress(bytes(10_000_000))))
    with pytest.raises(ElvaDataError, match=r"bomb.png (is \d+x\d+|cannot be decoded)"):
        images.open_image(tmp_path / "bomb.png")
    (tmp_path / "wide.png").write_bytes(png(4000, 20, zlib.compress(bytes(4001 * 20))))  # as wide as the processor takes
    assert images.open_image(tmp_path / "wide.png").size == (4000, 20)


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"RIFF\x10\0\0\0WEBP", b"%!PS-Adobe-3.0 EPSF\n"])
)
def test_random_images_are_pictures_or_a_named_error(tmp_path_factory, data, magic):
    path = written(tmp_path_factory, "fuzz.img", magic + data)
    image = data_or_a_named_error(lambda: images.open_image(path), path)
    assert image is None or image.mode == "RGB"


@given(st.text(max_size=60) | st.sampled_from(["..", "a/../..", "a/../../x.png", "/etc/passwd", "a\0b", "x" * 5000]))
def test_no_image_path_leaves_the_root(tmp_path_factory, relative):
    folder = tmp_path_factory.getbasetemp() / "inside"
    try:
        assert Path(os.path.normpath(mbeir.Root(folder).image_path(relative))).is_relative_to(folder.resolve())
    except ElvaDataError as error:
        assert "leaves the root" in str(error)


def test_excluded_units_leave_every_row_of_their_dataset_and_task_out_of_training(root, smoke):
    queries, tasks = root.union_train(), {4, 6}
    rows = root.trained_rows(["*_task4", "emoji_task6"])
    assert {queries[row].task for row in rows} == {q.task for q in queries} - tasks
    assert len(rows) == sum(q.task not in tasks for q in queries)
    draw = contrastive.union_pairs(root, smoke.stage2, 1, ["*_task4", "emoji_task6"])
    kept = {queries[row].positives for row in rows}
    assert all(pair.positives in kept for step in range(12) for pair in draw(step, 4))


def test_a_pattern_that_no_unit_matches_is_refused_with_the_units_there_are(root):
    with pytest.raises(ElvaDataError, match=r"nights_task4.*emoji_task4"):
        root.trained_rows(["nights_task4"])


def test_an_image_given_as_a_string_is_an_image_and_no_text():
    assert Item("a dog", "a.jpg") == Item("a dog", Path("a.jpg")) and Item("a dog", "a.jpg").images == [Path("a.jpg")]
