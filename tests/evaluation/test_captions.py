"""The unseen sets of Table 2: every metric against an enumeration, ties against the target, and the embedded collection's own sets."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from caption_files import build, load, put
from conftest import COMMAND, started
from elva_core import cli
from elva_core import config as profiles
from elva_core.data import caption_sets, emoji_variants, mbeir
from elva_core.data import emoji as ec
from elva_core.data.caption_sets import SETS, SUGARCREPE, Task
from elva_core.data.items import Item
from elva_core.evaluation import captions, statistics
from elva_core.experiments import claims, figures
from elva_core.experiments import results as schema
from elva_core.files import ElvaDataError
from elva_core.retrieval import cache
from elva_core.tables import read_table


@pytest.fixture
def sets(tmp_path):
    return build(tmp_path, *SETS)


def vectors_of(scores):
    """`vectors` by which the cosine of query q0, q1, .. and candidate c0, c1, .. is scores[q][c]."""
    scores = np.asarray(scores, np.float32)
    rest = np.sqrt(1 - (scores**2).sum(0, dtype=np.float64)).astype(np.float32)
    rows = {"q": np.eye(len(scores), sum(scores.shape), dtype=np.float32), "c": np.hstack([scores.T, np.diag(rest)])}
    return lambda items: np.stack([rows[i.text[0]][int(i.text[1:])] for i in items])


def named(kind, count):
    return [Item(f"{kind}{i}") for i in range(count)]


SCORES = st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=7, max_size=7)
RIGHTS = st.lists(st.sets(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=3)  # of each query


@settings(max_examples=40)
@given(SCORES, RIGHTS)
def test_ranks_hits_and_map_are_the_worst_that_equal_scores_allow(scores, rights):
    """Of equal candidates the wrong come first, in the whole pool and in a gallery, as of a true caption and a false one."""
    look, queries, pool = vectors_of([scores]), named("q", 1) * len(rights), named("c", 7)
    orders = [sorted(range(7), key=lambda c, right=right: (-scores[c], c in right)) for right in rights]
    ranks = [[order.index(c) + 1 for c in sorted(right, key=order.index)] for order, right in zip(orders, rights, strict=True)]
    task = Task("t", queries, pool, [sorted(right) for right in rights], cutoffs=(2, 1, 5))
    assert captions.ranked(task, look) == ranks
    assert captions.score("s", [task], look)["value"].tolist() == [own[0] <= k for own in ranks for k in (2, 1, 5)]
    for order, right, own in zip(orders, rights, ranks, strict=True):
        expected = average_precision_score(np.isin(order, list(right)), -np.arange(7))
        assert captions.average_precision(own, 7) == pytest.approx(expected)
    galleries = [[c for c in range(7) if c == min(right) or c not in right] for right in rights]
    places = [sum(scores[c] >= scores[min(right)] for c in own) for own, right in zip(galleries, rights, strict=True)]
    for name, ks in (("pairs", (1,)), ("all", (1, 2))):
        task = Task(name, queries, pool, [[min(right)] for right in rights], galleries, cutoffs=(1, 2))
        assert captions.ranked(task, look) == [[place] for place in places]
        assert captions.score("s", [task], look)["value"].tolist() == [place <= k for place in places for k in ks]


def test_map_at_5_is_over_the_smaller_of_5_and_the_right_answers():
    # by hand: precision 1/1, 2/3, 3/5 at the ranks of the right answers; the one at rank 6 is too late
    for ranks, answers in (([1, 3, 5, 6], 4), ([1, 3, 5, 6, 7, 8, 9], 5)):
        assert captions.average_precision(ranks, 5) == pytest.approx((1 + 2 / 3 + 3 / 5) / answers)
    assert captions.average_precision([6], 5) == 0


def test_constant_embeddings_score_nothing_anywhere(sets):
    for name in SETS:
        hits = captions.score(name, load(sets, name), lambda items: np.tile(np.float32([1, 0]), (len(items), 1)))
        assert len(hits) and (hits.query("metric in ['accuracy', 'hit@1']")["value"] == 0).all()


def test_vectors_of_half_precision_tie_with_their_copies():
    gallery = np.random.default_rng(1).normal(size=(40, 33)).astype(np.float16)
    gallery[[3, 17, 39]] = gallery[8]
    query = gallery[8].astype(np.float32)
    assert captions.gallery_rank(query / np.linalg.norm(query), gallery, 8) == 4


@pytest.mark.parametrize(("size", "right", "k"), [(6, 1, 1), (6, 1, 5), (6, 3, 2), (4, 4, 1), (3, 1, 5)])
def test_chance_is_the_share_of_orders_that_hit(size, right, k):
    task = Task("t", named("q", 1), named("c", size), [list(range(right))])
    assert captions.chance(task, 0, k) == pytest.approx(np.mean([min(o[:right]) < k for o in itertools.permutations(range(size))]))


def test_the_score_of_a_set_is_the_mean_of_its_files_means():
    values = {"group": ["a"] * 30 + ["b"] * 10, "query": range(40), "value": [1.0] * 30 + [0.0] * 10}
    hits = pd.DataFrame(values).assign(set="s", task="t", metric="accuracy", chance=0.5)
    hits = hits.assign(question="captions", kind="sugarcrepe", reported=True)
    table = captions.table(hits, 50, 0).set_index("group")
    assert table["value"].to_dict() == {"": 0.5, "a": 1.0, "b": 0.0} and table["n"].to_dict() == {"": 40, "a": 30, "b": 10}
    both = pd.concat([hits.assign(model="old"), hits.assign(model="new", value=1.0)])
    gain = captions.differences(both, "new", "old", 50, 0, statistics.reported()).set_index("group")
    assert gain["value"].to_dict() == {"": 0.5, "a": 0.0, "b": 1.0} and (gain["ci_low"] <= gain["value"]).all()


def test_a_submission_lists_the_ids_of_the_best_images():
    task = Task("t", named("q", 2), named("c", 3), [[], []], metric="map", ids=([4, 9], [70, 80, 90]))
    assert captions.submission(task, vectors_of([[0.1, 0.5, 0.3], [0.6, 0.2, 0.4]])) == {"4": [80, 90, 70], "9": [70, 90, 80]}


def test_the_command_lints_scores_and_writes_the_table(tiny, sets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    tiny.save(tmp_path / "model", stage="test", parent="none")
    asked, out = ["unseen", "--sets", str(sets)], tmp_path / "out"
    scored = [*asked, "--profile", "smoke", "--template", "eol", "--model", str(tmp_path / "model"), "--out", str(out)]
    assert cli.main(scored) == 0
    table, results = pd.read_csv(out / "table2.csv"), pd.read_csv(out / "results.csv")
    assert table.notna().all(axis=None) and "| model |" in capsys.readouterr().out
    assert {len(v) for v in json.loads((out / "circo_test.json").read_text()).values()} == {4}
    assert set(results["set"]) == set(SETS) and (results["encoding"] == "by direction").all()
    put(sets / "CIRCO/annotations/val.json", "[")
    assert cli.main([*scored, "--set", "circo", "sugarcrepe"]) == 1 and "val.json: cannot be read" in capsys.readouterr().out
    assert cli.main([*asked, "--set", "sugarcrepe", "--lint"]) == 0
    assert cli.main([*asked, "--set", "nothing", "--lint"]) == 1 and "no sets ['nothing']" in capsys.readouterr().err


def hashed(items):
    """`vectors` that are drawn by what an item says and shows."""
    drawn = np.stack([np.random.default_rng(mbeir.stable_hash(str(item))).normal(size=8) for item in items])
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def test_the_same_folder_again_holds_the_last_call_alone(sets, tmp_path):
    """And the table has the columns of the paper's, in its order, whichever sets are there."""
    how = {"encoding": "by direction", "samples": 5}
    for number, (model, names) in enumerate([("a", ["circo", "sugarcrepe"]), ("None", ["sugarcrepe"]), ("b", ["circo"])]):
        folders = [tmp_path / "again", tmp_path / f"{number}"]
        for folder in folders:
            captions.run(sets, names, hashed, folder, model=model, **how)
        again, alone = ({path.name: path.read_text() for path in folder.iterdir()} for folder in folders)
        assert again == alone and ("circo_test.json" in again) == ("circo" in names)
        assert set(read_table(folders[0] / "results.csv")["model"]) == {model}
        assert list(read_table(folders[0] / "table2.csv")) == ["model", *statistics.reported()["table2"]["columns"]]
    put(sets / "CIRCO/annotations/val.json", None)  # the labels of the other split are not public
    assert captions.run(sets, ["circo"], hashed, tmp_path / "again", model="c", **how).empty
    assert len(json.loads((tmp_path / "again/circo_test.json").read_text())) == 2
    put(tmp_path / "file", "")
    with pytest.raises(ValueError, match=r"file cannot hold the results \(it is a file\)"):
        captions.run(sets, ["circo"], hashed, tmp_path / "file", model="a", **how)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_score_as_one_does(tiny, sets, tmp_path):
    tiny.save(tmp_path / "model", stage="test", parent="none", template="eol")
    asked, tables = ["--sets", str(sets), "--set", "urban1k", "genecis", "circo", "--model", str(tmp_path / "model")], []
    for launch_file, count in (("", 1), ("cpu.yaml", 2)):
        out = tmp_path / f"outputs-{launch_file}"
        assert f"one of {count}" in started(COMMAND, out, tmp_path, "unseen", *asked, launched_by=launch_file)
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
    return {s.name: (s, captions.load(s)) for s in captions.profile_sets(profile, tmp_path_factory.mktemp("own"))}


def test_own_rows_are_clean_files_of_the_papers_formats(own):
    assert {source.question for source, _ in own.values()} == {"vendor", "language", "captions"}
    for source, (task,) in own.values():
        assert caption_sets.lint(source.kind, source.folder) == ([], []) and len(task.queries) >= 6
    assert captions.described(list(own.values()))["ranked"].tolist() == [14, 14, 14, 14, 2, 2]


def test_unseen_compositions_are_in_no_training_row_and_the_others_are(own, root):
    trained = {c.source["codes"] for c in root.pool("", "train", "global") if "codes" in c.source}
    for name in ("trained vendor", "unseen vendor"):
        (task,) = own[name][1]
        codes = [task.candidates[row].image.stem for (row,) in task.positives]
        assert [c not in trained for c in codes] == [g == "unseen composition" for g in task.groups] and len(set(task.groups)) == 2


def test_vendors_and_languages_are_asked_for_the_same_emoji(own, emojis):
    english = {e.codes: e.name for e in emojis}
    names = {"trained vendor": english, "unseen vendor": english, "names in de": {e.codes: e.translation for e in emojis}}
    names["names in es"] = {e.codes: e.translation for e in ec.load("es")}
    asked = set()
    for name, (_, (task,)) in own.items():
        if task.name != "t2i":
            continue
        asked.add(codes := tuple(c.image.stem for c in task.candidates))
        assert [q.text.lower() for q in task.queries] == [f"find the image. {names[name][c].lower()}." for c in codes]
        vendor = "Appl" if name == "trained vendor" else "Twtr"
        assert all(c.image.read_bytes() == (ec.image_folder() / vendor / c.image.name).read_bytes() for c in task.candidates)
    assert len(asked) == 1


def test_a_false_caption_is_false_in_one_thing(emojis):
    known = {e.name: e for e in emojis}
    kinds = {"replace_obj": {"who", "what"}, "replace_rel": {"what"}, "replace_att": {"tone", "hair"}}
    found = emoji_variants.replaced_captions(emojis)
    assert list(found) == list(SUGARCREPE) and min(map(len, found.values())) >= 60
    for kind, rows in found.items():
        for e, false in rows:
            if kind in kinds:
                (differing,) = (k for (k, a), (_, b) in zip(e.segments, known[false].segments, strict=True) if a != b)
                assert differing in kinds[kind] and (kind != "replace_rel" or "who" in e.grains)
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
        assert any(false.partition("not ")[2].startswith(text) for _, text in ec.parse_name(true))


@pytest.mark.parametrize(
    ("unseen", "error", "says"),
    [
        ({"language": "en", "queries": 3}, ElvaDataError, "en is trained on; choose another"),
        ({"language": "de", "queries": 3}, ElvaDataError, "de is trained on; choose another"),
        (None, ElvaDataError, r"give unseen\.sets, a folder of them, or unseen\.language"),
        ({"sets": "x", "language": "es", "queries": 3}, ValueError, "either sets"),
    ],
)
def test_unseen_sets_that_a_profile_cannot_have_are_refused(profile, tmp_path, unseen, error, says):
    with pytest.raises(error, match=says):
        captions.profile_sets(profile.model_copy(update={"unseen": unseen and profiles.UnseenSettings(**unseen)}), tmp_path)


def test_sets_of_a_profile_are_scored_where_they_are(profile, sets):
    asked = profile.model_copy(update={"unseen": profiles.UnseenSettings(sets=str(sets))})
    found = captions.profile_sets(asked, sets / "nowhere")
    assert [source.name for source in found] == list(SETS) and all(captions.load(source) for source in found)


def test_a_vendor_a_composition_and_a_language_are_told_apart():
    """Four drawings, two of each composition: hits under each vendor and language by hand."""
    values = {"trained vendor": [1, 1, 1, 0], "unseen vendor": [1, 0, 0, 0], "names in es": [0, 0, 0, 0]}
    hits = pd.DataFrame([{"set": name, "query": i, "value": v} for name, own in values.items() for i, v in enumerate(own)])
    vendor = hits["set"].str.contains("vendor")
    hits["question"] = np.where(vendor, "vendor", "language")
    hits["group"] = np.where(vendor, np.array(emoji_variants.COMPOSITIONS)[hits["query"] // 2], "")
    hits = hits.assign(model="m", reported=True)
    table = captions.shifts(pd.concat([hits, hits.assign(model="other", value=1)]), "m", 200, 0).set_index("what")
    # known compositions lose 0.5 and unseen ones 0.5 by the vendor; means over vendors 0.75 and 0.25; 0.5 against 0.5 of the mixed cells
    assert table["value"].tolist() == pytest.approx([-0.5, -0.5, 0.0, -0.25]) and set(table["n"]) == {4}
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    assert captions.shifts(hits[~vendor], "m", 5, 0).empty


def test_a_chain_without_the_sets_goes_on_with_empty_tables(profile, tmp_path):
    asked = profile.model_copy(update={"unseen": profiles.UnseenSettings(sets=str(tmp_path / "nowhere"))})
    loaded = captions.profile_sets(asked, tmp_path)
    hits = pd.concat([pd.DataFrame(), captions.measure(loaded, None, "stage 2")], ignore_index=True)
    results = captions.table(hits, 10, 0)
    gains = captions.differences(hits, "stage 3", "stage 2", 10, 0, statistics.reported())
    results.to_csv(tmp_path / "unseen.csv", index=False)
    again = pd.read_csv(tmp_path / "unseen.csv").fillna({"group": ""})
    tables = [captions.described(loaded), captions.false_captions(loaded), captions.side_by_side(results, "vendor")]
    tables += [captions.shifts(hits, "stage 3", 5, 0), schema.scores(captions.headline(again)), schema.points(captions.headline(gains))]
    assert not any(map(len, [loaded, *tables]))
    reached = results[results["reported"]]
    assert figures.generalisation(reached.assign(row=reached["set"] + reached["group"].radd(", ")), "title").axes


def test_claims_have_a_verdict_only_beside_a_figure_of_the_paper(own):
    spaces = {m: lambda items, m=m: hashed([(m, captions.shown(i)) for i in items]) for m in ("old", "new")}
    hits = pd.concat([captions.measure(list(own.values()), space, model) for model, space in spaces.items()])
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
