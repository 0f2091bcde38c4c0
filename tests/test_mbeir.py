"""The format: normaliser and id vectors, reader, linter, and every kind of bad input with its message."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from elva_core import mbeir
from elva_core.mbeir import ElvaDataError

VECTORS = {
    None: "",
    "a dog": "A dog.",
    '"hello"  ': "Hello.",
    "what?": "What?",
    "a\r\nb": "A\nb.",
    '" hi "': " hi .",
    'say "hi"': 'Say "hi.',
    '"': "",
}


@pytest.mark.parametrize(("raw", "normal"), VECTORS.items())
def test_normaliser_vectors(raw, normal):
    assert mbeir.normalise(raw) == normal


def test_normaliser_is_not_idempotent():
    assert mbeir.normalise(mbeir.normalise('" hi "')) == "Hi ."


def test_id_vectors():
    assert mbeir.hashed_query_id("9:12") == 4_500_012
    assert mbeir.hashed_candidate_id("9:12") == 90_000_012
    assert mbeir.hashed_query_id("4:2") == 2_000_002
    assert mbeir.hashed_candidate_id("5:1") == 50_000_001


@given(st.integers(0, 50), st.integers(1, mbeir.CANDIDATE_ID_BASE - 1))
def test_candidate_ids_survive_hashing(dataset, number):
    did = f"{dataset}:{number}"
    assert mbeir.unhashed_candidate_id(mbeir.hashed_candidate_id(did)) == did


def test_ids_that_spill_or_are_fillers_are_refused():
    with pytest.raises(ElvaDataError, match="spills into dataset 10"):
        mbeir.hashed_query_id("9:500000")
    with pytest.raises(ElvaDataError, match="fewer hits"):
        mbeir.unhashed_candidate_id(-1)
    for bad in ("9", "9:0", "x:1", "9:1:2", "²:1"):
        with pytest.raises(ElvaDataError, match="dataset_id:n"):
            mbeir.split_id(bad)


def test_a_written_root_is_clean(root):
    assert mbeir.lint(root) == []


def test_records_survive_writing_and_reading(root):
    for unit in root.units("test"):
        for q in root.queries(unit, "test"):
            assert mbeir.parse_query(json.loads(json.dumps(mbeir.query_record(q)))) == q


def test_the_card_form_of_positives_and_the_swapped_modality_are_read():
    q = mbeir.parse_query(
        {
            "qid": "8:1",
            "query_modality": "text,image",
            "query_txt": "a",
            "query_img_path": "b",
            "pos_cand_list": [{"did": "8:3"}],
            "task_id": 7,
        }
    )
    assert (q.modality, q.positives, q.negatives) == ("image,text", ("8:3",), ())


def test_official_units_come_first_and_in_the_papers_order(tmp_path):
    root = mbeir.Root(tmp_path)
    for unit in ("zoo_task0", "cirr_task7", "mscoco_task0", "visualnews_task0"):
        mbeir.write_jsonl(root.query_path(unit, "test"), [])
    assert root.units("test") == ["visualnews_task0", "mscoco_task0", "cirr_task7", "zoo_task0"]


def test_prompt_is_chosen_by_a_stable_hash_and_can_be_fixed(root):
    q = root.queries(root.units("test")[0], "test")[0]
    assert root.query_text(q, seed=1) == root.query_text(q, seed=1)
    prompts = {root.query_text(q, prompt_index=i) for i in range(4)}
    assert len(prompts) == 4 and root.query_text(q, seed=5) in prompts
    assert all(p.endswith(q.text) for p in prompts)


def replace_line(path, number, line):
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


def test_a_malformed_line_is_named_with_file_and_number(own_root):
    path = own_root.query_path("emoji_task0", "test")
    replace_line(path, 3, '{"qid": "10:1", ')
    with pytest.raises(ElvaDataError, match=rf"{path.name}:3: not a JSON object"):
        own_root.queries("emoji_task0", "test")
    assert any(f"{path}:3" in p for p in mbeir.lint(own_root))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("qid", "10:0", "dataset_id:n"), ("query_txt", 7, "query_txt is int"), ("task_id", "x", "invalid literal")],
)
def test_a_wrong_field_is_named_with_file_and_line(own_root, key, value, message):
    path = own_root.query_path("emoji_task0", "test")
    record = json.loads(path.read_text().splitlines()[1])
    replace_line(path, 2, json.dumps(record | {key: value}))
    with pytest.raises(ElvaDataError, match=rf"{path.name}:2: .*{message}"):
        own_root.queries("emoji_task0", "test")


def test_a_judged_did_that_the_pool_lacks_is_found(own_root):
    path = own_root.qrels_path("emoji_task0", "test")
    replace_line(path, 1, path.read_text().split("\n")[0].replace(" 0 10:", " 0 10:9"))
    problems = mbeir.lint(own_root)
    assert any("is only in the qrels" in p for p in problems) and any("is only in pos_cand_list" in p for p in problems)


def test_image_problems_are_named(own_root):
    some = own_root.pool("emoji_task0", "test")
    missing, truncated, wide = (own_root.image_path(c.image) for c in some[:3])
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:300])
    Image.new("RGB", (5000, 10)).save(wide)
    for path, message in ((missing, "is missing"), (truncated, "cannot be decoded"), (wide, "5000x10")):
        with pytest.raises(ElvaDataError, match=message) as caught:
            mbeir.open_image(path)
        assert str(path) in str(caught.value)
    problems = mbeir.lint(own_root)
    assert all(any(str(p) in line for line in problems) for p in (missing, truncated, wide))


def test_a_path_may_not_leave_the_root(own_root):
    for outside in ("../../x.png", "/etc/passwd", "mbeir_images/../../x.png"):
        with pytest.raises(ElvaDataError, match="leaves the root"):
            own_root.image_path(outside)
    path = own_root.pool_path("emoji_task0", "test")
    record = json.loads(path.read_text().splitlines()[0])
    replace_line(path, 1, json.dumps(record | {"img_path": "../../x.png"}))
    assert any(f"{path}:1" in p and "leaves the root" in p for p in mbeir.lint(own_root))


def test_lint_finds_broken_rules_of_content(own_root):
    path = own_root.query_path("emoji_task0", "test")
    first, second, third = (json.loads(line) for line in path.read_text().splitlines()[:3])
    replace_line(path, 1, json.dumps(first | {"query_txt": None}))
    replace_line(path, 2, json.dumps(second | {"task_id": 7}))
    replace_line(path, 3, json.dumps(third | {"neg_cand_list": third["pos_cand_list"]}))
    problems = "\n".join(mbeir.lint(own_root))
    for message in ("modality text but text is None", "task_id 7 does not fit", "positive and negative at once"):
        assert message in problems


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert mbeir.open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


@given(st.binary(max_size=200))
def test_random_bytes_are_data_or_a_named_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(data)
    try:
        for number, record in mbeir.read_lines(path):
            assert number >= 1 and isinstance(record, dict)
    except ElvaDataError as error:
        assert "fuzz.jsonl:" in str(error)
