"""The embedded collection: grains are exact, splits are clean, draws repeat."""

from __future__ import annotations

import pandas as pd
import pytest

from elva_core import config, files
from elva_core.data import emoji as ec
from elva_core.data import mbeir, sources


def test_grains_joined_give_the_name_again(emojis):
    import emoji

    emoji.config.load_language("en")
    names = {"-".join(f"U+{ord(c):04X}" for c in k): v["en"].strip(":").replace("_", " ") for k, v in emoji.EMOJI_DATA.items()}
    assert all(e.name == names[e.codes] for e in emojis)


def test_the_collection_has_the_size_the_design_counts_on(emojis):
    assert len(emojis) == 2807
    assert sum(e.multi_grain for e in emojis) == 1703
    assert all(1 <= len(e.segments) <= 3 for e in emojis)


KINDS = {
    "woman running dark skin tone": "who what tone", "man light skin tone red hair": "who tone hair", "woman bald": "who hair",
    "thumbs up medium skin tone": "what tone", "handshake light skin tone dark skin tone": "what tone",
    "sunset": "what", "mango": "what", "mantelpiece clock": "what", "man’s shoe": "what",
}  # fmt: skip


@pytest.mark.parametrize(("name", "kinds"), KINDS.items())
def test_names_and_their_grains(name, kinds):
    assert [k for k, _ in ec.parse_name(name)] == kinds.split()


def test_twins_differ_in_exactly_one_grain_and_know_each_other(emojis):
    near = ec.twins(emojis)
    by_codes = {e.codes: e for e in emojis}
    for e in emojis[::37]:
        for t in near[e.codes]:
            assert sum(a != b for a, b in zip(e.segments, t.segments, strict=True)) == 1
            assert e in near[t.codes] and by_codes[t.codes] is t


def test_a_drawing_is_shared_where_two_vendors_have_the_same_file(tmp_path, monkeypatch):
    for path, content in {"a/x": b"1", "a/y": b"2", "a/z": b"3", "b/x": b"1", "b/y": b"3", "c/y": b"2"}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / f"{path}.png").write_bytes(content)
    monkeypatch.setattr(ec, "image_folder", lambda: tmp_path)
    assert ec.shared_drawings("a", ["b"]) == {"x"} and ec.shared_drawings("a", ["b", "c"]) == {"x", "y"}


def test_a_query_is_seen_where_its_picture_or_that_of_a_positive_is_shared(root, emojis, monkeypatch):
    vendors = {"train": ["Appl", "Joy"], "val": ["Goog"], "test": ["Twtr"]}
    data = config.DataSettings(name="emoji", emoji=config.EmojiSettings(language="de", vendors=vendors, held_out_share=0.15,
        queries_per_unit={"train": 1, "val": 1, "test": 1}, up_sample=1))  # fmt: skip
    shared = {e.codes for e in ec.sample(emojis, 60)[::2]}
    monkeypatch.setattr(
        ec, "shared_drawings", lambda vendor, others: shared if vendor == "Twtr" and tuple(others) == ("Appl", "Joy") else set()
    )
    table = sources.seen_pictures(data, root)
    for unit, rows in table.groupby("unit"):
        pool = {c.did: c.image for c in root.pool(unit, "test")}
        pictures = {q.qid: [q.image, *(pool[did] for did in q.positives)] for q in root.queries(unit, "test")}
        seen = {qid: any(f"/Twtr/{codes}.png" in (path or "") for path in paths for codes in shared) for qid, paths in pictures.items()}
        assert dict(zip(rows["qid"], rows["seen"], strict=True)) == seen
    assert table["seen"].any() and not table["seen"].all()
    assert sources.seen_pictures(config.DataSettings(name="m", root="r", nli="n"), root).empty


def test_held_out_compositions_are_in_no_training_row(root, emojis, tmp_path):
    unseen = ec.held_out(ec.sample(emojis, 60), 0.15)
    assert unseen
    for path in [*root.folder.glob("query/*train/*.jsonl"), root.pool_path("", "train", "global")]:
        text = path.read_text()
        assert not [c for c in unseen if f"{c}.png" in text or f'{c}\\"' in text]
    path = tmp_path / "nli.csv"
    ec.write_triplets(ec.sample(emojis, 60), path, held_out_share=0.15)
    names = {mbeir.normalise(e.name) for e in emojis if e.codes in unseen}
    table = sources.read_nli(path)
    pd.testing.assert_frame_equal(table, pd.read_csv(path, dtype=str, keep_default_na=False)[sources.NLI_COLUMNS])
    assert not names & set(pd.concat([table.sent0, table.hard_neg]))


def test_splits_use_their_own_vendors(root):
    images = {split: {c.image.split("/")[2] for c in root.pool("", split, "global") if c.image} for split in ("train", "val", "test")}
    assert images == {"train": {"Appl", "Joy"}, "val": {"Goog"}, "test": {"Twtr"}}


def test_every_task_of_the_layout_is_there_and_test_queries_are_multi_grain(root):
    assert [u[-1] for u in root.units("test")] == list("01234678")
    assert {q.task for q in root.union_train()} == {0, 1, 2, 3, 4, 6, 7, 8}
    for unit in ("emoji_task0", "emoji_task3", "emoji_task4", "emoji_task7"):
        assert all(len(mbeir.grains(q)) >= 2 for q in root.queries(unit, "test"))


def test_a_dropped_grain_is_entailed_and_a_swapped_one_contradicts(emojis, tmp_path):
    ec.write_triplets(emojis[:400], tmp_path / "t.csv", held_out_share=0.0)
    for r in sources.read_nli(tmp_path / "t.csv").head(50).itertuples():
        whole, less, other = (set(x.lower().strip(".").split()) for x in r[1:])
        assert less < whole and other != whole and other - whole


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(emojis, tmp_path):
    texts = []
    vendors, limits = {"train": ["Appl"], "val": ["Goog"], "test": ["Twtr"]}, {"train": 20, "val": 5, "test": 5}
    settings = config.EmojiSettings(language="de", vendors=vendors, held_out_share=0.1, queries_per_unit=limits, up_sample=30)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        root = ec.write_root(emojis[1500:1560], tmp_path / name, settings, seed=seed)
        texts.append(root.union_train_path().read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_a_profile_without_data_or_with_an_unknown_language_is_refused(tmp_path):
    with pytest.raises(files.ElvaDataError, match="'xx' is none of"):
        ec.load("xx")
    with pytest.raises(files.ElvaDataError, match="either emoji, or both"):
        sources.write(config.DataSettings(name="x"), tmp_path, seed=0)
    with pytest.raises(files.ElvaDataError, match="does not exist"):
        sources.write(config.DataSettings(name="x", root=str(tmp_path / "no"), nli=str(tmp_path / "no.csv")), tmp_path, seed=0)


def test_triplets_are_read_with_a_mark_in_front_and_a_blank_end_and_other_columns(tmp_path):
    (tmp_path / "n.csv").write_bytes(b'\xef\xbb\xbfsent0,x,hard_neg,sent1\r\n"a, ""b""",1,"c\nd",NA\r\n \r\n\r\n')
    assert sources.read_nli(tmp_path / "n.csv").to_numpy().tolist() == [['a, "b"', "NA", "c\nd"]]


def test_any_mbeir_folder_is_linked_and_read(root, tmp_path):
    (tmp_path / "n.csv").write_text("sent0,sent1,hard_neg\na,b,c\n")
    linked, triplets = sources.write(
        config.DataSettings(name="x", root=str(root.folder), nli=str(tmp_path / "n.csv")), tmp_path / "out", seed=0
    )
    assert linked.units("test") == root.units("test") and len(sources.read_nli(triplets)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "columns"),
        ("sent0,sent1,hard_neg\nx,y,z\nx,,z\n", r":3: an empty cell"),
        ('sent0,sent1,hard_neg\n"x\n",y,z\n\nx,,z\n', r":5: an empty cell"),
        ("sent0,sent1,hard_neg\nx,y,z\nx,a comma, y,z\n", r":3: 4 cells, the header has 3"),
        ("sent0,sent1,hard_neg\nx,y,z\nx,y\n", r":3: 2 cells, the header has 3"),
        ('sent0,sent1,hard_neg\nx,y,z\n"x,y,z\n', r"behind line 2 "),
        ("", "columns"),
    ],
)
def test_broken_triplets_are_named(tmp_path, text, message):
    (tmp_path / "n.csv").write_text(text)
    with pytest.raises(files.ElvaDataError, match=message):
        sources.read_nli(tmp_path / "n.csv")
