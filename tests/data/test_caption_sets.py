"""The unseen sets of Table 2: every reader on its authors' layout; what is broken is named, whatever it is."""

from __future__ import annotations

import copy
import io
import json
from functools import reduce
from operator import getitem
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_files import FILES, build, load, put
from elva_core.data import caption_sets
from elva_core.data.caption_sets import GENECIS, SETS, SUGARCREPE
from elva_core.evaluation import captions
from elva_core.files import ElvaDataError


@pytest.fixture
def sets(tmp_path):
    return build(tmp_path, *SETS)


def lint(sets, name, **how):
    return caption_sets.lint(name, sets / SETS[name].folder, **how)


FIND, TELL = "Find an image that the caption describes.", "Find a caption that describes the image."
CHANGE = "Find an everyday image like this one with the change described."
DIALOGUE = "Find the everyday image that this dialogue is about."
COCO = [f"<{i:012}.jpg>" for i in range(40)]
SPOKEN = [f"<VisualDialog_val2018_{i:012}.jpg>" for i in (3, 4)]
READ = [  # set, task, right rows of every query, one query: number, words, what it ranks
    ("sharegpt4v", 0, [[0], [1], [2]], 1, f"{FIND} A long caption 1.", [f"<{i}.jpg>" for i in range(3)]),
    ("sharegpt4v", 1, [[0], [1], [2]], 1, f"<1.jpg> {TELL}", [f"A long caption {i}." for i in range(3)]),
    ("urban1k", 0, [[0], [1], [2]], 2, f"{FIND} Street 10.", ["<1.jpg>", "<2.jpg>", "<10.jpg>"]),
    ("urban1k", 1, [[0], [1], [2]], 2, f"<10.jpg> {TELL}", ["Street 1.", "Street 2.", "Street 10."]),
    ("flickr30k", 0, [[j // 5] for j in range(10)], 7, f"{FIND} Caption 7.", ["<0.png>", "<1.png>"]),
    ("flickr30k", 1, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], 1, f"<1.png> {TELL}", [f"Caption {j}." for j in range(10)]),
    ("circo", 0, [[2, 3]], 0, f"{COCO[5]} {CHANGE} Is asleep.", COCO[5:12:2]),
    ("circo", 1, [[], []], 1, f"{COCO[7]} {CHANGE} Is asleep.", COCO[5:12:2]),  # its labels are not public
    ("genecis", 0, [[0], [3], [6], [9]], 0, "<1_0_0.jpg> Find an image that shows the same attribute as this one. Blue.",
     ["<2_0_1.jpg>", "<3_0_2.jpg>", "<4_0_3.jpg>"]),
    ("genecis", 0, [[0], [3], [6], [9]], 2, f"{COCO[21]} {CHANGE} Blue.", COCO[22:25]),
    ("visdial", 0, [[0], [1]], 0, f"{DIALOGUE} Q: is it red? A: yes. Q: is it big? A: no.", SPOKEN),  # all rounds without the caption
    ("mt_fashioniq", 0, [[1]], 0, "Find a garment like these with every change described, in turn. <A.jpg> Is longer and is red. "
     "<B.jpg> Has sleeves.", ["<D.jpg>", "<C.jpg>", "<B.jpg>"]),
    ("ccneg", 0, [[0], [2]], 0, "<1.jpg>", ["A cat 1.", "Not a cat 1."]),  # the last rows, no commas
    ("sugarcrepe", 0, [[2 * i] for i in range(10)], 2, "<1.jpg>", ["True 1 1.", "False 1 1."]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "number", "right", "query", "words", "ranked"), READ)
def test_a_set_is_read_as_queries_candidates_and_what_is_right(tmp_path, monkeypatch, name, number, right, query, words, ranked):
    monkeypatch.setattr(caption_sets, "CCNEG_ROWS", 2)
    task = load(build(tmp_path, name), name)[number]
    rows = task.galleries[query] if task.galleries else range(len(task.candidates))
    assert task.positives == right and len(task.queries) == len(right) and captions.shown(task.queries[query]) == words
    assert [captions.shown(task.candidates[row]) for row in rows] == ranked


def test_all_nine_layouts_are_clean_and_scored_as_their_authors_do(sets):
    assert caption_sets.present(sets) == list(SETS) == list(FILES) and all(lint(sets, name) == ([], []) for name in SETS)
    (genecis,), (garments,), circo = (load(sets, name) for name in ("genecis", "mt_fashioniq", "circo"))
    assert list(genecis.groups) == list(GENECIS) and garments.cutoffs == (5, 8, 10) and circo[0].metric == "map"


def test_lamras_way_encodes_each_item_once_for_both_directions(sets):
    for name in ("sharegpt4v", "urban1k", "flickr30k"):
        t2i, i2t = load(sets, name, encoding="once")
        assert list(t2i.queries) == list(i2t.candidates) and list(t2i.candidates) == list(i2t.queries) and t2i.candidates[0].text
    assert load(sets, "visdial", encoding="once") == load(sets, "visdial")


SHARE, VAL, TEST, FOCUS = "datas_for_validation.json", "annotations/val.json", "annotations/test.json", "annotations/focus_object.json"
TALK, NEGATED = "visdial_1.0_val.json", "ccneg_preprocessed.pt"
BROKEN = [  # set, file, what `put` puts there, what is said; one for each check
    ("sharegpt4v", SHARE, None, "datas_for_validation.json: is missing"),
    ("sharegpt4v", "val_data/1.jpg", None, "entry 2: image .*1.jpg is missing"),
    ("sharegpt4v", "val_data/2.jpg", b"no", "entry 3: image .*2.jpg cannot be decoded"),
    ("sharegpt4v", SHARE, lambda v: v[0].update(image_name="../../x.jpg"), "entry 1: .* leaves the root"),
    ("sharegpt4v", SHARE, lambda v: v[2].pop("caption"), "entry 3: key 'caption' is missing"),
    ("sharegpt4v", SHARE, lambda v: v.append(7), "entry 4: "),
    ("urban1k", "caption/2.txt", None, "caption/2.txt is missing"),
    ("urban1k", "caption/2.txt", "\nsecond line", "first line of 2.txt is"),
    ("flickr30k", "images/2.png", 0, "10 captions for 3 images, expected 5 each"),
    ("circo", VAL, lambda v: v[0].update(gt_img_ids=[9, 1234]), "entry 1: gt_img_ids 1234 is not"),
    ("circo", VAL, lambda v: v[0].update(gt_img_ids=[]), "entry 1: gt_img_ids is .*expected a list"),
    ("circo", TEST, lambda v: v[1].update(id=0), "id 0 occurs twice"),
    ("circo", "annotations", None, "neither val.json nor test.json"),
    ("visdial", TALK, lambda v: v["data"]["answers"].pop(), "entry 1: answer is '1', expected a number"),
    ("visdial", TALK, lambda v: v["data"].pop("questions"), "KeyError: 'questions'"),
    ("mt_fashioniq", "data/all.val.json", lambda v: v[0].update(target=["dress", "Z"]), "entry 1: target Z is not in"),
    ("ccneg", NEGATED, {"image_paths": ["a"], "annotations": [SimpleNamespace()]}, "cannot be read as expected .*UnpicklingError"),
    ("ccneg", NEGATED, {"image_paths": ["/etc/x"] * 2, "annotations": [{}]}, "2 image paths and"),
    ("sugarcrepe", "data/add_att.json", lambda v: v.clear(), "add_att.json: expected a dict with entries"),
]


@pytest.mark.parametrize(("name", "file", "value", "message"), BROKEN)
def test_what_is_broken_is_named_with_file_and_entry_and_refused(tmp_path, name, file, value, message):
    put(build(tmp_path, name) / SETS[name].folder / file, value)
    problems, _ = lint(tmp_path, name)
    assert pd.Series(problems).str.contains(message).any() and all(str(tmp_path / SETS[name].folder) in p for p in problems)
    if "decode" not in message:
        with pytest.raises(ElvaDataError, match=message):
            load(tmp_path, name)


def test_the_linter_goes_on_after_the_first_problem(sets):
    put(sets / "sugar-crepe/val2017/0.jpg", None)
    problems, _ = lint(sets, "sugarcrepe")
    assert len(problems) == len(SUGARCREPE) and all("entry 1: image" in p for p in problems)


@pytest.mark.parametrize("name", SETS)
def test_a_byte_order_mark_and_a_blank_end_are_harmless(tmp_path, name):
    before = load(build(tmp_path, name), name)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".txt"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\n")
    assert lint(tmp_path, name) == ([], []) and load(tmp_path, name) == before


def test_capital_suffixes_are_read_and_hidden_files_passed_over(sets):
    added = {"image/3.JPG": 0, "image/4.JPG": 0, "caption/3.txt": "street 3"}  # 4 has no caption
    for name, value in (added | dict.fromkeys(["image/._1.jpg", "caption/._1.txt"], b"\0\5\x16\7 of macOS \xff")).items():
        put(sets / "Urban1k" / name, value)
    t2i, _ = load(sets, "urban1k")
    assert [i.image.name for i in t2i.candidates] == ["1.jpg", "2.jpg", "3.JPG", "10.jpg"] and t2i.queries[2].text.endswith("Street 3.")
    problems, (note,) = lint(sets, "urban1k")
    assert not problems and "4.JPG has no caption" in note
    put(sets / "flickr/images/._0.png", b"of macOS")
    (sets / "flickr/images/1.png").rename(sets / "flickr/images/1.PNG")
    assert [i.image.name for i in load(sets, "flickr30k")[0].candidates] == ["0.png", "1.PNG"]


def test_what_ties_by_itself_is_noted_and_counts_against_the_target(sets):
    put(sets / "sharegpt4v" / SHARE, lambda v: v[2].update(caption=v[0]["caption"]))
    put(sets / "genecis" / FOCUS, lambda v: v[0]["gallery"].append(v[0]["target"]))
    problems, notes = captions.check(sets, ["sharegpt4v", "genecis"], decode=True)
    assert not problems and "entry 3: caption 'a long caption 0' is that of entry 1, too" in notes[0] and "once more" in notes[1]
    (task,) = load(sets, "genecis")
    own = lambda items: np.eye(64, dtype=np.float32)[[int(i.image.name[:12].split("_")[0]) for i in items]]  # noqa: E731
    place = GENECIS.index("focus_object")
    assert captions.ranked(task, own)[place] == [len(task.galleries[place])]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 12) | st.floats() | st.text(max_size=8) | st.sampled_from(["0.jpg", "A", "../x", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["caption", "image_id", "dialog", "x"]), inner, max_size=3),
    max_leaves=5,
)


def places(value, way=("whole",)):
    """The ways to everything inside a value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [way, *(inner for key in keys for inner in places(value[key], (*way, key)))]


@st.composite
def damaged(draw):
    """(set, file, bytes): any value anywhere in the file, or the file cut and with any end."""
    name = draw(st.sampled_from(sorted(set(FILES) - {"urban1k"})))
    file, value = next(iter(FILES[name].items()))
    data, kept = {"whole": copy.deepcopy(value)}, draw(st.none() | st.integers(0, 200))
    if kept is None:
        *way, last = draw(st.sampled_from(places(value)))
        reduce(getitem, way, data)[last] = draw(JSON)
    torch.save(data["whole"], buffer := io.BytesIO())
    whole = buffer.getvalue() if name == "ccneg" else json.dumps(data["whole"]).encode()
    return name, file, whole if kept is None else whole[:kept] + draw(st.binary(max_size=120))


@settings(max_examples=250)
@given(damaged())
def test_any_value_anywhere_and_a_garbled_file_are_data_or_a_named_error(tmp_path_factory, case):
    """Strict reading gives tasks or the one error that names the folder; the linter finds a problem just then."""
    (name, file, content), sets = case, tmp_path_factory.getbasetemp() / "damaged"
    if not (sets / SETS[name].folder).is_dir():
        build(sets, name)
    put(sets / SETS[name].folder / file, content)
    problems, _ = lint(sets, name, decode=False)
    try:
        assert load(sets, name) and not problems
    except ElvaDataError as error:
        assert str(sets / SETS[name].folder) in str(error) and problems
