"""The unseen sets of Table 2: every reader on its authors' layout, every metric against an enumeration, ties against the target."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score

from conftest import COMMAND, started
from elva_core import cli
from elva_core import config as profiles
from elva_core.data import caption_sets, emoji_variants, mbeir, sources
from elva_core.data import emoji as ec
from elva_core.data.caption_sets import GENECIS, SETS, SUGARCREPE, Task
from elva_core.data.items import Item
from elva_core.evaluation import captions, statistics
from elva_core.experiments import claims, figures
from elva_core.experiments import results as schema
from elva_core.files import ElvaDataError
from elva_core.retrieval import cache
from elva_core.tables import read_table


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade % 256, 80, 90)).save(path)


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def write_sharegpt4v(folder):
    for i in range(3):
        picture(folder / f"val_data/{i}.jpg", i)
    put(folder / "datas_for_validation.json", [{"image_name": f"{i}.jpg", "caption": f"a long caption {i}"} for i in range(3)])


def write_urban1k(folder):
    for i in (1, 2, 10):
        picture(folder / f"image/{i}.jpg", i)
        put(folder / f"caption/{i}.txt", f"street {i}\nnever read")


def write_flickr30k(folder):
    for i in range(2):
        picture(folder / f"images/{i}.png", i)
    put(folder / "flickr_text.json", [f"caption {j}" for j in range(10)])


def write_circo(folder):
    known = [5, 7, 9, 11]
    for i in known:
        picture(folder / f"COCO2017_unlabeled/unlabeled2017/{i:012}.jpg", i)
    images = [{"id": i, "file_name": f"{i:012}.jpg"} for i in known]
    put(folder / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", {"images": images})
    query = {"reference_img_id": 5, "relative_caption": "is asleep"}
    put(folder / "annotations/val.json", [query | {"id": 0, "target_img_id": 9, "gt_img_ids": [9, 11]}])
    put(folder / "annotations/test.json", [query | {"id": 0}, query | {"id": 1, "reference_img_id": 7}])


def write_genecis(folder):
    for n, name in enumerate(GENECIS):
        key = "val_image_id" if name.endswith("object") else "image_id"
        ids = [10 * n + i for i in range(1, 5)]
        for slot, image in enumerate(ids):
            picture(folder / (f"val2017/{image:012}.jpg" if key == "val_image_id" else f"vg/{name}/{image}_0_{slot}.jpg"), image)
        reference, target, *gallery = ({key: image} for image in ids)
        put(folder / f"annotations/{name}.json", [{"reference": reference, "target": target, "gallery": gallery, "condition": "blue"}])


def write_visdial(folder):
    for i in (3, 4):
        picture(folder / f"VisualDialog_val2018/VisualDialog_val2018_{i:012}.jpg", i)
    rounds = [{"question": 0, "answer": 1}, {"question": 1, "answer": 0}]
    dialogs = [{"image_id": i, "caption": "never used", "dialog": rounds[:n]} for i, n in ((3, 2), (4, 1))]
    data = {"questions": ["is it red", "is it big"], "answers": ["no", "yes"], "dialogs": dialogs}
    put(folder / "visdial_1.0_val.json", {"data": data})


def write_mt_fashioniq(folder):
    for i, name in enumerate("ABCD"):
        picture(folder / f"fashioniq_images/{name}.jpg", i)
    put(folder / "image_splits/split.all.val.json", list("DCB"))
    rounds = [["dress", ["is longer", "", "is red"], "A"], ["dress", ["has sleeves"], "B"]]
    put(folder / "data/all.val.json", [{"target": ["dress", "C"], "reference": rounds}])


def write_ccneg(folder, rows=3):
    names = [f"cc3m_subset/{i}.jpg" for i in range(rows)]
    for i, name in enumerate(names):
        picture(folder / name, i)
    said = [{"json": {"caption": f"a cat {i}"}, "sop_data": {"negative-prompt": f"not, a cat, {i}"}} for i in range(rows)]
    data = {"image_paths": [f"/workspace/datasets/cc3m/{name}" for name in names], "annotations": said}
    torch.save(data, folder / "ccneg_preprocessed.pt")


def write_sugarcrepe(folder):
    for n, kind in enumerate(SUGARCREPE):
        rows = {
            str(i): {"filename": f"{i}.jpg", "caption": f"true {n} {i}", "negative_caption": f"false {n} {i}"} for i in range(1 + n % 2)
        }
        put(folder / f"data/{kind}.json", rows)
    for i in range(2):
        picture(folder / f"val2017/{i}.jpg", i)


WRITERS = {
    "sharegpt4v": write_sharegpt4v, "urban1k": write_urban1k, "flickr30k": write_flickr30k, "circo": write_circo,
    "genecis": write_genecis, "visdial": write_visdial, "mt_fashioniq": write_mt_fashioniq, "ccneg": write_ccneg,
    "sugarcrepe": write_sugarcrepe,
}  # fmt: skip


@pytest.fixture
def sets(tmp_path):
    for name, write in WRITERS.items():
        (tmp_path / SETS[name].folder).mkdir(parents=True)
        write(tmp_path / SETS[name].folder)
    return tmp_path


def load(sets, name, **how):
    return caption_sets.load(name, sets / SETS[name].folder, **how)


def files(items):
    return [item.image.name for item in items]


def test_all_nine_layouts_are_clean_and_give_tasks(sets):
    assert caption_sets.present(sets) == list(SETS) == list(WRITERS)
    for name in SETS:
        assert caption_sets.lint(name, sets / SETS[name].folder) == ([], [])
        for task in load(sets, name):
            assert len(task.queries) == len(task.positives) and all(0 <= r < len(task.candidates) for rows in task.positives for r in rows)


def test_the_columns_are_those_of_the_papers_table_in_its_order():
    results = pd.DataFrame([{"model": "m", "set": "x", "task": "t", "group": "", "metric": "m", "value": 0.5}])
    assert list(captions.table2(results).columns) == ["model", *statistics.reported()["table2"]["columns"]]


def test_captioned_sets_are_ranked_both_ways(sets):
    t2i, i2t = load(sets, "sharegpt4v")
    assert files(t2i.candidates) == files(i2t.queries) == ["0.jpg", "1.jpg", "2.jpg"] and t2i.positives == i2t.positives == [[0], [1], [2]]
    assert t2i.queries[1].text == "Find an image that the caption describes. A long caption 1." and t2i.candidates[1].text == ""
    assert i2t.candidates[1] == Item("A long caption 1.") and i2t.queries[1].text.startswith("Find a caption")
    t2i, _ = load(sets, "urban1k")
    assert files(t2i.candidates) == ["1.jpg", "2.jpg", "10.jpg"] and t2i.queries[2].text.endswith("Street 10.")
    t2i, i2t = load(sets, "flickr30k")
    assert t2i.positives == [[j // 5] for j in range(10)] and i2t.positives == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_lamras_way_encodes_each_item_once_for_both_directions(sets):
    for name in ("sharegpt4v", "urban1k", "flickr30k"):
        t2i, i2t = load(sets, name, encoding="once")
        assert list(t2i.queries) == list(i2t.candidates) and list(t2i.candidates) == list(i2t.queries) and t2i.candidates[0].text
    assert load(sets, "visdial", encoding="once") == load(sets, "visdial")
    with pytest.raises(ElvaDataError, match="is none of"):
        load(sets, "flickr30k", encoding="both")


def test_circo_ranks_all_images_and_has_labels_for_val_only(sets):
    val, test = load(sets, "circo")
    assert files(val.candidates) == [f"{i:012}.jpg" for i in (5, 7, 9, 11)] and val.positives == [[2, 3]] and test.positives == [[], []]
    assert val.queries[0].image.name == f"{5:012}.jpg" and val.queries[0].text.endswith("Is asleep.") and val.metric == "map"


def test_genecis_ranks_target_and_gallery_of_each_row(sets):
    (task,) = load(sets, "genecis")
    assert list(task.groups) == list(GENECIS)
    for i, name in enumerate(GENECIS):
        names = [task.candidates[row].image.name for row in task.galleries[i]]
        ids = [10 * i + n for n in (2, 3, 4)]
        wanted = [f"{n:012}.jpg" for n in ids] if "object" in name else [f"{n}_0_{slot}.jpg" for slot, n in enumerate(ids, start=1)]
        assert names == wanted and task.positives[i] == [task.galleries[i][0]] and task.queries[i].text.endswith("Blue.")


def test_a_dialogue_is_all_its_rounds_without_the_caption(sets):
    (task,) = load(sets, "visdial")
    assert task.queries[0].text.endswith("dialogue is about. Q: is it red? A: yes. Q: is it big? A: no.") and task.positives == [[0], [1]]


def test_rounds_of_fashion_keep_the_order_of_images_and_captions(sets):
    (task,) = load(sets, "mt_fashioniq")
    prompt, first, said, second, last = task.queries[0].parts
    assert (first.name, said, second.name, last) == ("A.jpg", "Is longer and is red.", "B.jpg", "Has sleeves.") and "garment" in prompt
    assert files(task.candidates) == ["D.jpg", "C.jpg", "B.jpg"] and task.positives == [[1]] and task.cutoffs == (5, 8, 10)


def test_ccneg_takes_the_last_rows_and_removes_commas(sets, monkeypatch):
    monkeypatch.setattr(caption_sets, "CCNEG_ROWS", 2)
    (task,) = load(sets, "ccneg")
    assert [c.text for c in task.candidates] == ["A cat 1.", "Not a cat 1.", "A cat 2.", "Not a cat 2."]
    assert files(task.queries) == ["1.jpg", "2.jpg"] and task.galleries == [[0, 1], [2, 3]] and task.queries[0].text == ""


def vectors_of(scores):
    """`vectors` for one task: queries are axes, so that the cosine of query q and candidate c is scores[q][c]."""
    scores = np.asarray(scores, np.float32)
    rest = np.sqrt(1 - (scores**2).sum(0, dtype=np.float64)).astype(np.float32)
    size, wide = scores.shape

    def vectors(items):
        if items[0].text.startswith("q"):
            return np.eye(size, size + wide, dtype=np.float32)
        return np.hstack([scores.T, np.diag(rest)])

    return vectors


def task_of(scores, positives, **more):
    size, wide = np.shape(scores)
    return Task("t", [Item(f"q{i}") for i in range(size)], [Item(f"c{i}") for i in range(wide)], positives, **more)


def worst_order(scores, right):
    """Candidates by score; of equal ones the wrong first: the worst of all orders that the scores allow."""
    return sorted(range(len(scores)), key=lambda c: (-scores[c], c in right))


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=7, max_size=7), st.sets(st.integers(0, 6), min_size=1, max_size=4))
def test_ranks_are_the_worst_that_equal_scores_allow(scores, right):
    order = worst_order(scores, right)
    (ranks,) = captions.ranked(task_of([scores], [sorted(right)]), vectors_of([scores]))
    assert ranks == sorted(order.index(c) + 1 for c in right)
    gallery = [*sorted(set(range(7)) - right), min(right)]
    task = task_of([scores], [[min(right)]], galleries=[gallery])
    assert captions.ranked(task, vectors_of([scores])) == [[1 + sum(scores[c] >= scores[min(right)] for c in gallery[:-1])]]


def test_map_agrees_with_sklearn_where_the_cutoff_is_the_whole_list():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, right = rng.permutation(9) / 10, rng.choice(9, 4, replace=False)
        ranks = sorted(worst_order(scores, right).index(c) + 1 for c in right)
        assert captions.average_precision(ranks, 9) == pytest.approx(average_precision_score(np.isin(range(9), right), scores))


def test_map_at_5_is_over_the_smaller_of_5_and_the_right_answers():
    # by hand: precision 1/1, 2/3, 3/5 at the ranks of the right answers; the one at rank 6 is too late
    assert captions.average_precision([1, 3, 5, 6], 5) == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    assert captions.average_precision([1, 3, 5, 6, 7, 8, 9], 5) == pytest.approx((1 + 2 / 3 + 3 / 5) / 5)
    assert captions.average_precision([6], 5) == 0


def test_constant_embeddings_score_nothing_anywhere(sets):
    constant = lambda items: np.tile(np.float32([1, 0]), (len(items), 1))  # noqa: E731
    for name in SETS:
        hits = captions.score(name, load(sets, name), constant)
        at1 = hits[hits["metric"].isin(["accuracy", "hit@1"])]
        assert len(hits) and (at1["value"] == 0).all()


def test_a_true_caption_must_score_strictly_higher():
    scores = [[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.4, 0.3, 0, 0], [0, 0, 0, 0, 0.2, 0.3]]
    task = task_of(scores, [[0], [2], [4]], galleries=[[0, 1], [2, 3], [4, 5]])
    assert captions.ranked(task, vectors_of(scores)) == [[2], [1], [2]]


def test_vectors_of_half_precision_tie_with_their_copies():
    rng = np.random.default_rng(1)
    gallery = rng.normal(size=(40, 33)).astype(np.float16)
    gallery[[3, 17, 39]] = gallery[8]
    query = gallery[8].astype(np.float32)
    assert captions.gallery_rank(query / np.linalg.norm(query), gallery, 8) == 4


@pytest.mark.parametrize(("size", "right", "k"), [(6, 1, 1), (6, 1, 5), (6, 3, 2), (4, 4, 1), (3, 1, 5)])
def test_chance_is_the_share_of_orders_that_hit(size, right, k):
    task = task_of(np.zeros((1, size)), [list(range(right))])
    orders = list(itertools.permutations(range(size)))
    assert captions.chance(task, 0, k) == pytest.approx(np.mean([min(o[:right]) < k for o in orders]))


def test_the_score_of_a_set_is_the_mean_of_its_files_means():
    groups = ["a"] * 30 + ["b"] * 10
    values = [1.0] * 30 + [0.0] * 10
    hits = pd.DataFrame(
        {"set": "s", "task": "t", "group": groups, "query": range(40), "metric": "accuracy", "value": values, "chance": 0.5}
    )
    hits = hits.assign(question="captions", kind="sugarcrepe", reported=True)
    table = captions.table(hits, 50, 0).set_index("group")
    assert table["value"].to_dict() == {"": 0.5, "a": 1.0, "b": 0.0} and table["n"].to_dict() == {"": 40, "a": 30, "b": 10}
    both = pd.concat([hits.assign(model="old"), hits.assign(model="new", value=[1.0] * 40)])
    gain = captions.differences(both, "new", "old", 50, 0, statistics.reported()).set_index("group")
    assert gain["value"].to_dict() == {"": 0.5, "a": 0.0, "b": 1.0} and (gain["ci_low"] <= gain["value"]).all()


def test_a_submission_lists_the_ids_of_the_best_images():
    scores = [[0.1, 0.5, 0.3], [0.6, 0.2, 0.4]]
    task = task_of(scores, [[], []], metric="map", ids=([4, 9], [70, 80, 90]))
    assert captions.submission(task, vectors_of(scores)) == {"4": [80, 90, 70], "9": [70, 90, 80]}


def change(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


BROKEN = {
    "sharegpt4v": [
        (lambda f: (f / "datas_for_validation.json").unlink(), "datas_for_validation.json: is missing"),
        (lambda f: (f / "val_data/1.jpg").unlink(), "entry 2: image .*1.jpg is missing"),
        (lambda f: (f / "val_data/2.jpg").write_bytes(b"no"), "entry 3: image .*2.jpg cannot be decoded"),
        (lambda f: change(f / "datas_for_validation.json", lambda v: v[0].update(image_name="../../x.jpg")), "entry 1: .* leaves the root"),
        (lambda f: change(f / "datas_for_validation.json", lambda v: v[2].pop("caption")), "entry 3: key 'caption' is missing"),
        (lambda f: change(f / "datas_for_validation.json", lambda v: v.append(7)), "entry 4: "),
    ],
    "urban1k": [
        (lambda f: (f / "caption/2.txt").unlink(), "caption/2.txt is missing"),
        (lambda f: put(f / "caption/2.txt", "\nsecond line"), "first line of 2.txt is"),
        (lambda f: (f / "caption/2.txt").write_bytes(b"\xff\xfe"), "entry 2: .*decode"),
    ],
    "flickr30k": [
        (lambda f: picture(f / "images/2.png"), "10 captions for 3 images, expected 5 each"),
        (lambda f: change(f / "flickr_text.json", lambda v: v.pop()), "9 captions for 2 images"),
        (lambda f: change(f / "flickr_text.json", lambda v: v.__setitem__(6, None)), "entry 7: caption is 'None'"),
    ],
    "circo": [
        (lambda f: change(f / "annotations/val.json", lambda v: v[0].update(gt_img_ids=[9, 1234])), "entry 1: gt_img_ids 1234 is not"),
        (lambda f: change(f / "annotations/val.json", lambda v: v[0].update(gt_img_ids=[])), "entry 1: gt_img_ids is .*expected a list"),
        (lambda f: change(f / "annotations/test.json", lambda v: v[1].update(id=0)), "id 0 occurs twice"),
        (lambda f: change(f / "annotations/test.json", lambda v: v[1].update(reference_img_id=1)), "entry 2: reference_img_id 1 is not"),
        (lambda f: [(f / f"annotations/{s}.json").unlink() for s in ("val", "test")], "neither val.json nor test.json"),
    ],
    "genecis": [
        (lambda f: (f / "annotations/change_object.json").unlink(), "change_object.json: is missing"),
        (lambda f: change(f / "annotations/focus_object.json", lambda v: v[0].update(gallery=[])), "entry 1: gallery is"),
        (lambda f: change(f / "annotations/focus_object.json", lambda v: v[0].pop("target")), "entry 1: key 'target' is missing"),
        (lambda f: next((f / "vg/focus_attribute").glob("*_1.jpg")).unlink(), "entry 1: image .*_0_1.jpg is missing"),
    ],
    "visdial": [
        (lambda f: change(f / "visdial_1.0_val.json", lambda v: v["data"]["dialogs"][1].update(image_id=99)), "entry 2: image .*99.jpg is"),
        (lambda f: change(f / "visdial_1.0_val.json", lambda v: v["data"]["answers"].pop()), "entry 1: answer is '1', expected a number"),
        (lambda f: change(f / "visdial_1.0_val.json", lambda v: v["data"].pop("questions")), "KeyError: 'questions'"),
    ],
    "mt_fashioniq": [
        (lambda f: change(f / "data/all.val.json", lambda v: v[0].update(target=["dress", "Z"])), "entry 1: target Z is not in"),
        (lambda f: change(f / "data/all.val.json", lambda v: v[0].update(reference=[])), "entry 1: reference is"),
        (lambda f: change(f / "data/all.val.json", lambda v: v[0]["reference"][0].__setitem__(1, "abc")), "captions is 'abc'"),
    ],
    "ccneg": [
        (lambda f: (f / "ccneg_preprocessed.pt").write_bytes(b"no"), "ccneg_preprocessed.pt: cannot be read as expected"),
        (lambda f: torch.save({"image_paths": ["a"], "annotations": [SimpleNamespace()]}, f / "ccneg_preprocessed.pt"), "UnpicklingError"),
        (lambda f: torch.save({"image_paths": ["/etc/x"] * 2, "annotations": [{}]}, f / "ccneg_preprocessed.pt"), "2 image paths and"),
        (lambda f: torch.save({"image_paths": ["/etc/x"], "annotations": [{}]}, f / "ccneg_preprocessed.pt"), "entry 1: .*leaves the root"),
    ],
    "sugarcrepe": [
        (lambda f: (f / "data/swap_obj.json").unlink(), "swap_obj.json: is missing"),
        (lambda f: change(f / "data/add_att.json", lambda v: v.clear()), "add_att.json: expected a dict with entries"),
        (lambda f: change(f / "data/add_obj.json", lambda v: v["1"].pop("negative_caption")), "add_obj.json, entry 2: key"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), [(n, d, m) for n, cases in BROKEN.items() for d, m in cases])
def test_what_is_broken_is_named_with_file_and_entry_and_refused(tmp_path, name, damage, message):
    WRITERS[name](tmp_path)
    damage(tmp_path)
    problems, _ = caption_sets.lint(name, tmp_path)
    assert pd.Series(problems).str.contains(message).any() and all(str(tmp_path) in p for p in problems)
    if "decode" not in message:
        with pytest.raises(ElvaDataError, match=message):
            caption_sets.load(name, tmp_path)


@pytest.mark.parametrize("name", SETS)
def test_a_byte_order_mark_and_a_blank_end_are_harmless(tmp_path, name):
    WRITERS[name](tmp_path)
    before = caption_sets.load(name, tmp_path)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".txt"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\n")
    assert caption_sets.lint(name, tmp_path) == ([], []) and caption_sets.load(name, tmp_path) == before


def test_urban1k_reads_capital_suffixes_and_passes_over_hidden_files(tmp_path):
    write_urban1k(tmp_path)
    picture(tmp_path / "image/3.JPG")
    picture(tmp_path / "image/4.JPG")  # without a caption
    put(tmp_path / "caption/3.txt", "street 3")
    for name in ("image/._1.jpg", "caption/._1.txt"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7 of macOS \xff")
    t2i, _ = caption_sets.load("urban1k", tmp_path)
    assert files(t2i.candidates) == ["1.jpg", "2.jpg", "3.JPG", "10.jpg"] and t2i.queries[2].text.endswith("Street 3.")
    problems, (note,) = caption_sets.lint("urban1k", tmp_path)
    assert not problems and "4.JPG has no caption" in note


def test_flickr30k_passes_over_hidden_files(tmp_path):
    write_flickr30k(tmp_path)
    (tmp_path / "images/._0.png").write_bytes(b"of macOS")
    (tmp_path / "images/1.png").rename(tmp_path / "images/1.PNG")
    t2i, _ = caption_sets.load("flickr30k", tmp_path)
    assert files(t2i.candidates) == ["0.png", "1.PNG"]


def test_the_linter_goes_on_after_the_first_problem(tmp_path):
    write_sugarcrepe(tmp_path)
    (tmp_path / "val2017/0.jpg").unlink()
    problems, _ = caption_sets.lint("sugarcrepe", tmp_path)
    assert len(problems) == len(SUGARCREPE) and all("entry 1: image" in p for p in problems)


def test_what_ties_by_itself_is_noted_and_counts_against_the_target(sets):
    share, genecis = (sets / SETS[name].folder for name in ("sharegpt4v", "genecis"))
    change(share / "datas_for_validation.json", lambda v: v[2].update(caption=v[0]["caption"]))
    change(genecis / "annotations/focus_object.json", lambda v: v[0]["gallery"].append(v[0]["target"]))
    problems, notes = captions.check(sets, ["sharegpt4v", "genecis"], decode=True)
    assert not problems and "entry 3: caption 'a long caption 0' is that of entry 1, too" in notes[0] and "once more" in notes[1]
    (task,) = load(sets, "genecis")
    place = GENECIS.index("focus_object")
    own = lambda items: np.eye(64, dtype=np.float32)[[int(i.image.name[:12].split("_")[0]) for i in items]]  # noqa: E731
    assert captions.ranked(task, own)[place] == [len(task.galleries[place])]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 12) | st.floats() | st.text(max_size=8) | st.sampled_from(["0.jpg", "A", "../x", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["caption", "image_id", "dialog", "x"]), inner, max_size=3),
    max_leaves=5,
)
PLACES = {  # file, and where in it the value goes
    "sharegpt4v": ("datas_for_validation.json", [(), (0,), (0, "image_name"), (0, "caption")]),
    "flickr30k": ("flickr_text.json", [(), (0,)]),
    "circo": ("annotations/val.json", [(), (0,), (0, "id"), (0, "gt_img_ids"), (0, "gt_img_ids", 0), (0, "reference_img_id")]),
    "genecis": ("annotations/focus_object.json", [(), (0,), (0, "target"), (0, "gallery"), (0, "gallery", 0), (0, "condition")]),
    "visdial": ("visdial_1.0_val.json", [(), ("data",), ("data", "questions"), ("data", "answers", 1), ("data", "dialogs", 0, "dialog")]),
    "mt_fashioniq": ("data/all.val.json", [(), (0,), (0, "target"), (0, "reference"), (0, "reference", 0), (0, "reference", 0, 1)]),
    "sugarcrepe": ("data/add_obj.json", [(), ("0",), ("0", "filename"), ("0", "caption")]),
}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A folder of each set, and the bytes of the file that is changed."""
    out = {}
    for name, (file, _) in PLACES.items():
        folder = tmp_path_factory.mktemp(name)
        WRITERS[name](folder)
        out[name] = folder, (folder / file).read_bytes()
    return out


def tried(name, folder):
    """Strict reading gives tasks or the one error that names the folder; the linter finds a problem just then."""
    problems, _ = caption_sets.lint(name, folder, decode=False)
    try:
        tasks = caption_sets.load(name, folder)
    except ElvaDataError as error:
        assert str(folder) in str(error) and problems
        return
    assert not problems and tasks


@settings(max_examples=150)
@given(st.sampled_from(sorted(PLACES)), st.integers(0, 5), JSON)
def test_any_value_anywhere_is_data_or_a_named_error(fuzzed, name, place, value):
    folder, whole = fuzzed[name]
    file, places = PLACES[name]
    data = {"top": json.loads(whole)}
    *way, last = ("top", *places[place % len(places)])
    inner = data
    for key in way:
        inner = inner[key]
    inner[last] = value
    (folder / file).write_text(json.dumps(data["top"]))
    tried(name, folder)


@settings(max_examples=60)
@given(st.sampled_from(sorted(PLACES)), st.integers(0, 200), st.binary(max_size=20))
def test_a_cut_or_garbled_file_is_data_or_a_named_error(fuzzed, name, kept, tail):
    folder, whole = fuzzed[name]
    (folder / PLACES[name][0]).write_bytes(whole[:kept] + tail)
    tried(name, folder)


@settings(max_examples=30)
@given(st.binary(max_size=120) | JSON)
def test_a_pickle_of_anything_is_data_or_a_named_error(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "ccneg"
    folder.mkdir(exist_ok=True)
    write_ccneg(folder, rows=2)
    path = folder / "ccneg_preprocessed.pt"
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save({"image_paths": ["cc3m_subset/0.jpg"], "annotations": [value]}, path)
    tried("ccneg", folder)


def test_the_command_lints_scores_and_writes_the_table(tiny, sets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    tiny.save(tmp_path / "model", stage="test", parent="none")
    common = ["unseen", "--sets", str(sets), "--profile", "smoke", "--template", "eol", "--model", str(tmp_path / "model")]
    common += ["--out", str(tmp_path / "out")]
    assert cli.main(common) == 0
    printed, table = capsys.readouterr().out, pd.read_csv(tmp_path / "out/table2.csv")
    assert list(table.columns[1:]) == statistics.reported()["table2"]["columns"] and table.notna().all(axis=None) and "| model |" in printed
    assert {len(v) for v in json.loads((tmp_path / "out/circo_test.json").read_text()).values()} == {4}
    results = pd.read_csv(tmp_path / "out/results.csv")
    assert set(results["set"]) == set(SETS) and (results["encoding"] == "by direction").all()
    (sets / "CIRCO/annotations/val.json").write_text("[")
    assert cli.main([*common, "--set", "circo", "sugarcrepe"]) == 1 and "val.json: cannot be read" in capsys.readouterr().out
    assert cli.main(["unseen", "--sets", str(sets), "--set", "sugarcrepe", "--lint"]) == 0
    assert cli.main(["unseen", "--sets", str(sets), "--set", "nothing", "--lint"]) == 1
    assert "no sets ['nothing']" in capsys.readouterr().err


def test_the_same_folder_again_holds_the_last_call_alone(sets, tmp_path):
    def vectors(items):
        drawn = [np.random.default_rng(mbeir.stable_hash(str(item))).normal(size=8) for item in items]
        return np.stack([v / np.linalg.norm(v) for v in drawn]).astype(np.float32)

    def contents(folder):
        return {path.name: path.read_text() for path in folder.iterdir()}

    how = {"encoding": "by direction", "samples": 5}
    for number, (model, names) in enumerate([("a", ["circo", "sugarcrepe"]), ("None", ["sugarcrepe"]), ("b", ["circo"])]):
        captions.run(sets, names, vectors, tmp_path / "again", model=model, **how)
        captions.run(sets, names, vectors, tmp_path / f"{number}", model=model, **how)
        assert contents(tmp_path / "again") == contents(tmp_path / f"{number}")
        assert ("circo_test.json" in contents(tmp_path / "again")) == ("circo" in names)
        assert set(read_table(tmp_path / "again/results.csv")["model"]) == {model}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file cannot hold the results \(it is a file\)"):
        captions.run(sets, ["circo"], vectors, tmp_path / "file", model="a", **how)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_score_as_one_does(tiny, sets, tmp_path):
    tiny.save(tmp_path / "model", stage="test", parent="none", template="eol")
    tables = []
    for launch_file in ("", "cpu.yaml"):
        out = tmp_path / f"outputs-{launch_file}"
        asked = ["--sets", str(sets), "--set", "urban1k", "genecis", "circo", "--model", str(tmp_path / "model")]
        assert f"one of {2 if launch_file else 1}" in started(COMMAND, out, tmp_path, "unseen", *asked, launched_by=launch_file)
        tables.append((out / "results.csv").read_text())
    assert tables[0] == tables[1] and "genecis" in tables[0]


@pytest.fixture(scope="module")
def profile():
    """A profile whose root is that of conftest.py."""
    data = {"vendors": {"train": ("Appl", "Joy"), "val": ("Goog",), "test": ("Twtr",)}, "size": 60}
    return profiles.load("smoke").changed({"data": {"emoji": data}, "unseen": {"queries": 7}})


@pytest.fixture(scope="module")
def own(profile, tmp_path_factory):
    """The rows of the embedded collection: name -> (source, tasks)."""
    sources = captions.profile_sets(profile, tmp_path_factory.mktemp("own"))
    return {source.name: (source, captions.load(source)) for source in sources}


def test_own_rows_are_clean_files_of_the_papers_formats(own):
    assert {source.question for source, _ in own.values()} == {"vendor", "language", "captions"}
    for source, tasks in own.values():
        assert caption_sets.lint(source.kind, source.folder) == ([], []) and len(tasks) == 1 and len(tasks[0].queries) >= 6
    table = captions.described(list(own.values()))
    assert (table["ranked"] == [14, 14, 14, 14, 2, 2]).all()


def test_unseen_compositions_are_in_no_training_row_and_the_others_are(own, root):
    trained = {c.source["codes"] for c in root.pool("", "train", "global") if "codes" in c.source}
    for name in ("trained vendor", "unseen vendor"):
        (task,) = own[name][1]
        codes = [task.candidates[row].image.stem for (row,) in task.positives]
        assert [c not in trained for c in codes] == [g == "unseen composition" for g in task.groups] and len(set(task.groups)) == 2


def test_vendors_and_languages_are_asked_for_the_same_emoji(own, emojis):
    rows = {name: [c.image.stem for c in tasks[0].candidates] for name, (_, tasks) in own.items() if tasks[0].name == "t2i"}
    assert len(set(map(tuple, rows.values()))) == 1
    names = {"trained vendor": {e.codes: e.name for e in emojis}, "names in de": {e.codes: e.translation for e in emojis}}
    names |= {"unseen vendor": names["trained vendor"], "names in es": {e.codes: e.translation for e in ec.load("es")}}
    for name, codes in rows.items():
        (task,) = own[name][1]
        assert [q.text.lower() for q in task.queries] == [f"find the image. {names[name][c].lower()}." for c in codes]
        vendor = "Appl" if name == "trained vendor" else "Twtr"
        assert all(c.image.read_bytes() == (ec.image_folder() / vendor / c.image.name).read_bytes() for c in task.candidates)


def test_a_false_caption_is_false_in_one_thing(emojis):
    known = {e.name: e for e in emojis}
    kinds = {"replace_obj": {"who", "what"}, "replace_rel": {"what"}, "replace_att": {"tone", "hair"}}
    found = emoji_variants.replaced_captions(emojis)
    assert list(found) == list(SUGARCREPE) and min(map(len, found.values())) >= 60
    for kind, rows in found.items():
        for e, false in rows:
            if kind in kinds:
                differing = [k for (k, a), (_, b) in zip(e.segments, known[false].segments, strict=True) if a != b]
                assert len(differing) == 1 and differing[0] in kinds[kind]
                assert kind != "replace_rel" or "who" in e.grains
            elif kind.startswith("swap"):
                assert sorted(false.split()) == sorted(e.name.split()) and false != e.name
            else:
                assert len(false.split()) > len(e.name.split()) and set(e.name.split()) < set(false.split())
            assert kind not in ("swap_att", "add_att") or known[false].codes != e.codes


def test_a_negation_denies_one_grain(own):
    (task,) = own["negation"][1]
    texts = [c.text.lower().rstrip(".") for c in task.candidates]
    for true, false in zip(texts[::2], texts[1::2], strict=True):
        assert false.split().count("not") == 1 and false.replace("not ", "") == true
        grain = false.partition("not ")[2]
        assert any(grain.startswith(text) for _, text in ec.parse_name(true))


def test_a_language_of_training_is_no_unseen_one(profile, tmp_path):
    for language in ("en", "de"):
        with pytest.raises(ElvaDataError, match="is trained on"):
            sources.write_unseen(profile.changed({"unseen": {"language": language}}), tmp_path)
    with pytest.raises(ElvaDataError, match=r"unseen\.sets"):
        captions.profile_sets(profile.model_copy(update={"unseen": None}), tmp_path)


def test_sets_of_a_profile_are_scored_where_they_are(profile, sets):
    asked = profile.model_copy(update={"unseen": profiles.UnseenSettings(sets=str(sets))})
    found = captions.profile_sets(asked, sets / "nowhere")
    assert [source.name for source in found] == list(SETS) and all(captions.load(source) for source in found)
    with pytest.raises(ValueError, match="either sets"):
        profiles.UnseenSettings(sets="x", language="es", queries=3)


def test_a_vendor_a_composition_and_a_language_are_told_apart():
    """Four drawings, two of each composition: hits under each vendor and language by hand."""
    values = {"trained vendor": [1, 1, 1, 0], "unseen vendor": [1, 0, 0, 0], "names in es": [0, 0, 0, 0]}
    rows = [
        {"set": name, "question": "vendor" if "vendor" in name else "language", "query": i, "value": v, "model": "m", "reported": True}
        | {"group": emoji_variants.COMPOSITIONS[i // 2] if "vendor" in name else ""}
        for name, hits in values.items()
        for i, v in enumerate(hits)
    ]
    hits = pd.DataFrame(rows)
    table = captions.shifts(pd.concat([hits, hits.assign(model="other", value=1)]), "m", 200, 0).set_index("what")
    # known compositions lose 0.5 and unseen ones 0.5 by the vendor; means over vendors 0.75 and 0.25; 0.5 against 0.5 of the mixed cells
    assert table["value"].tolist() == pytest.approx([-0.5, -0.5, 0.0, -0.25]) and set(table["n"]) == {4}
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    assert captions.shifts(hits[hits["set"] == "names in es"], "m", 5, 0).empty


def test_a_chain_without_the_sets_goes_on_with_empty_tables(profile, tmp_path):
    asked = profile.model_copy(update={"unseen": profiles.UnseenSettings(sets=str(tmp_path / "nowhere"))})
    loaded = captions.profile_sets(asked, tmp_path)
    hits = pd.concat([pd.DataFrame(), captions.measure(loaded, None, "stage 2")], ignore_index=True)
    results = captions.table(hits, 10, 0)
    gains = captions.differences(hits, "stage 3", "stage 2", 10, 0, statistics.reported())
    results.to_csv(tmp_path / "unseen.csv", index=False)
    again = pd.read_csv(tmp_path / "unseen.csv").fillna({"group": ""})
    assert (
        not loaded
        and captions.described(loaded).empty
        and captions.false_captions(loaded).empty
        and captions.side_by_side(results, "vendor").empty
        and captions.shifts(hits, "stage 3", 5, 0).empty
    )
    assert not len(schema.scores(captions.headline(again))) and not len(schema.points(captions.headline(gains)))
    reached = results[results["reported"]]
    assert figures.generalisation(reached.assign(row=reached["set"] + reached["group"].radd(", ")), "title").axes


def test_claims_have_a_verdict_only_beside_a_figure_of_the_paper(own):
    rng = np.random.default_rng(0)
    spaces = {name: rng.normal(size=(4000, 8)) for name in ("old", "new")}

    def space(name):
        return lambda items: (
            (v := spaces[name][[mbeir.stable_hash(captions.shown(i)) % 4000 for i in items]]) / np.linalg.norm(v, axis=1, keepdims=True)
        )

    loaded = list(own.values())
    hits = pd.concat([captions.measure(loaded, space(name), name) for name in spaces])
    results, gains = captions.table(hits, 20, 0), captions.differences(hits, "new", "old", 20, 0, statistics.reported())
    assert gains.dropna(subset="paper").set_index("set")["paper"].to_dict() == {"negation": 7.7, "composition": 5.3}
    rows = pd.concat([schema.scores(results, unit=results["set"]), schema.points(gains, unit=gains["set"])])
    table = claims.assemble(rows.assign(experiment="x"), statistics.reported(), evidence=True).query("source == 'x'")
    beside = table["paper"].notna()
    assert table.loc[beside, "verdict"].isin(claims.VERDICTS).all() and (table.loc[~beside, "verdict"] == "").all()
    assert len(table) == len(rows) and table["ours"].notna().all() and beside.sum() == 2
    main = captions.headline(results[results["model"] == "new"])
    assert len(main) == 8 and set(main["metric"]) == {"hit@5", "accuracy"} and set(main["group"]) == {"", *emoji_variants.COMPOSITIONS}
    figure = figures.generalisation(results.assign(row=results["set"] + results["group"] + results["metric"]), "title")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(results) / 2 and all("n = " in label for label in labels)
