"""The study: what is run, what is run again, and the statistics over seeds and queries."""

from __future__ import annotations

import json

import pytest

from elva_core import config
from elva_core.evaluation import statistics
from elva_core.experiments import jobs, stages, study
from elva_core.experiments.study import Arm
from elva_core.mrbench import annotate, build


@pytest.fixture(scope="module")
def profile(smoke):
    """Smoke, with short training."""
    quick = {"steps": 2, "batch": 4}
    stage3 = {"queries": 4, "queries_per_step": 2, "num_generations": 2, "negatives": {"hard": 1, "random": 1}}
    arms = {"arms": ["stage 2", "InfoNCE control", "stage 3", "stage 2, cap 4", "held out, stage 3"]}
    return smoke.changed({"stage1": quick, "stage2": quick, "control": {"steps": 1, "batch": 2}, "stage3": stage3, "study": arms})


@pytest.fixture(scope="module")
def bench(root, profile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return build.build(root, profile.mrbench, annotate=annotate.exact, folder=folder, seed=1)[0]


@pytest.fixture(scope="module")
def triplets(tmp_path_factory):
    path = tmp_path_factory.mktemp("nli") / "nli.csv"
    path.write_text("sent0,sent1,hard_neg\n" + "".join(f"A {i}.,B {i}.,C {i}.\n" for i in range(8)))
    return path


@pytest.fixture
def run(profile, root, triplets, bench, model_folder, tmp_path, monkeypatch):
    """Runs the study into tmp_path and returns the arms that were measured."""
    measured, original = [], study.measure

    def counted(model, arm, *rest):
        measured.append(arm.trains)
        return original(model, arm, *rest)

    def run(changed=profile, backbone=model_folder):
        measured.clear()
        monkeypatch.setattr(study, "measure", counted)
        study.run(changed, root, triplets, bench, str(backbone), tmp_path / "study", tmp_path / "work")
        return list(measured)

    return run


def test_every_arm_changes_values_that_a_profile_has_and_says_why():
    for name in ("smoke", "cpu", "qwen2vl-2b"):
        loaded = config.load(name)
        for arm in study.arms(loaded).values():
            assert (arm.applied(loaded) != loaded) == bool(arm.changes)
            assert arm.why


def test_a_profile_has_the_arm_of_every_row_of_tables_4_and_8_that_a_claim_says_it_can_run():
    reported = statistics.reported()
    rows = {(table, row): name for table in ("table4", "table8") for row, name in reported[table]["ours"].items()}
    assert rows.pop(("table4", "0.4 and 0.6")) == rows["table8", "full"]  # the paper's own weights: stage 3 itself
    for row, name in rows.items():
        assert row in [arm.paper for arm in study.arms(config.load(name)).values()], row


def test_all_negatives_are_as_many_as_the_profile_has_of_both_kinds():
    for name in ("cpu", "qwen2vl-7b"):
        loaded = config.load(name)
        both = loaded.stage3.negatives.hard + loaded.stage3.negatives.random
        chosen = {name: arm.applied(loaded).stage3.negatives for name, arm in study.arms(loaded).items()}
        assert (chosen["without sampling strategy"].hard, chosen["without sampling strategy"].random) == (0, both)
        assert (chosen["without random negatives"].hard, chosen["without random negatives"].random) == (both, 0)


def test_a_result_is_named_by_the_values_it_uses_and_by_no_others(profile):
    def mark(template="summary", start="stage2", trains="nothing", seed=1, **changes):
        arm = Arm(group="", trains=trains, template=template, start=start, why="")
        return study.fingerprint(profile.changed(changes), arm, seed, "b")

    drawn_by = {"annotator": {"kind": "transformers", "model": "m"}}
    used = [{}, {"template": "eol"}, {"start": "backbone"}, {"seed": 2}, {"mrbench": drawn_by}, {"mrbench": {"units": ["u"]}}]
    used += [{"mrbench": {"queries": 8}}, {"stage1": {"steps": 9}}, {"trains": "stage3"}, {"trains": "stage3", "stage3": {"beta": 0.5}}]
    assert len({mark(**change) for change in used}) == len(used)
    said = {"mrbench": {"precision": 0.5, "licence": "x"}}  # about the benchmark; and what is not trained, or not from stage 2
    assert mark(**said) == mark() == mark(stage3={"beta": 0.5}) == mark(threads=7)
    assert mark(start="backbone", stage1={"steps": 9}) == mark(start="backbone")


def test_an_unknown_arm_is_refused_with_those_that_exist(profile):
    with pytest.raises(config.ProfileError, match=r"names \['stage 4'\].*stage 3"):
        study.arms(profile.changed({"study": {"arms": ("stage 4",)}}))


def test_arms_of_most_seeds_run_first(profile):
    plan = study.planned(profile.changed({"study": {"seeds": (5, 6, 7, 8), "arms": ()}}))
    seeds = {name: [s for n, _, s in plan if n == name] for name, _, _ in plan}
    assert all(
        own == {"all": [5, 6, 7, 8], 3: [5, 6, 7], 1: [5]}[study.arms(profile.changed({"study": {"arms": ()}}))[name].seeds]
        for name, own in seeds.items()
    )
    counts = [len(seeds[name]) for name, _, _ in plan]
    assert counts == sorted(counts, reverse=True) and set(counts) == {4, 3, 1}
    of_all = [seed for (_, _, seed), count in zip(plan, counts, strict=True) if count == 4]
    assert of_all == sorted(of_all)  # seed by seed


@pytest.mark.slow
def test_a_killed_study_goes_on_and_only_a_changed_arm_is_run_again(profile, run, tmp_path, interrupted):
    names = len(study.planned(profile))
    with interrupted(jobs, "run", 4):
        run()
    done = len(list((tmp_path / "study").glob("*/seed-*/manifest.json")))
    assert 0 < done < names and len(list((tmp_path / "study").glob("*/seed-*"))) == done
    assert len(run()) == names - done
    assert run() == []
    assert run(profile.changed({"control": {"optimiser": {"lr": 1e-5}}})) == ["control"] * len(profile.study.seeds)
    found = study.read(tmp_path / "study", profile)
    assert len(found.runs) == names and len(set(found.hits.groupby(["arm", "seed"]).size())) == 1
    held_out = found.units[found.units["arm"] == "held out, stage 3"]
    assert set(held_out["unit"]) == {"emoji_task4", "emoji_task6", "emoji_task8"}


@pytest.mark.slow
def test_every_arm_that_nobody_has_side_by_side_runs_to_its_result(profile, run, tmp_path):
    names = [name for name, arm in study.arms(profile.changed({"study": {"arms": ()}})).items() if arm.group == "side by side"]
    stage3 = {"queries": 24, "queries_per_step": 12}
    small = profile.changed({"stage3": stage3, "study": {"arms": names, "seeds": (1,)}})
    assert len(run(small)) == len(names) >= 11 and run(small) == []
    found = study.read(tmp_path / "study", small)
    runs = found.runs.set_index("arm")
    assert runs["hit@5"].between(0, 1).all() and set(runs.index) == set(names)
    assert (runs["steps"] > 0).tolist() == [study.arms(small)[name].trains != "nothing" for name in runs.index]
    timed = runs.loc[[name for name in names if study.arms(small)[name].timed]]
    assert (timed["queries_s"] > 0).all() and (timed["query_passes"] >= 1).all() and len(timed) == 2
    assert {"own stage 2"} < {study.arms(small)[name].start for name in names}
    assert len(list((tmp_path / "work").glob("stage2-*"))) == 4  # the profile's, two that are read otherwise, the adaptive one


@pytest.mark.parametrize("recorded", [None, "0" * 64])
def test_a_study_goes_on_only_with_the_backbone_it_began_with(profile, run, model_folder, tmp_path, recorded):
    folder, weights = tmp_path / "study", study.backbone_hash(model_folder)
    assert study.recorded_backbone(folder, profile) == "not recorded"  # nothing has been measured
    only = profile.changed({"study": {"arms": ["zero-shot"]}})
    assert run(only) == ["nothing"] and study.recorded_backbone(folder, only) == weights
    assert run(only) == []
    (path,) = folder.glob("*/*/manifest.json")
    record = json.loads(path.read_text())
    assert record.pop("backbone_sha256") == weights
    path.write_text(json.dumps(record | ({"backbone_sha256": recorded} if recorded else {})))
    before = recorded or "not recorded"
    assert study.recorded_backbone(folder, only) == before
    with pytest.raises(
        ValueError, match=f"{folder}.* sha256 {before}; the chain's has {weights}.*[Mm]ove that folder away, or give the old"
    ):
        run(only)


def test_a_cached_stage_2_belongs_to_the_weights_it_started_from(profile, root, triplets, tmp_path, monkeypatch):
    def train(_, job):
        job.model.mkdir(parents=True)
        (job.model / "elva.json").write_text("{}")

    monkeypatch.setattr(jobs, "launch", train)
    places = []
    for weights in ("old", "new", "old"):  # in folders of one name
        (backbone := tmp_path / weights / "backbone").mkdir(parents=True, exist_ok=True)
        (backbone / "model.safetensors").write_text(weights)
        places.append(study.retriever(profile, root, triplets, str(backbone), 1, tmp_path / "work"))
    assert places[0] == places[2] != places[1]


def test_the_chain_records_the_backbone_it_trained(model_folder, outputs):
    trained = stages.stage_folder("smoke", 1, "30_pretrain_contrastive")
    assert study.chain_backbone(trained) == "not recorded"
    stage = stages.open_stage("30_pretrain_contrastive", "smoke", 1)
    jobs.record_backbone(stage, model_folder)
    stage.close()
    assert study.backbone_of(trained) == str(model_folder) and study.chain_backbone(trained) == study.backbone_hash(model_folder)
    with pytest.raises(ValueError, match="me/nowhere has no weights on this machine"):
        study.backbone_hash("me/nowhere")


def test_an_empty_study_names_the_command(profile, tmp_path):
    with pytest.raises(config.ProfileError, match="run: python -m elva_core study smoke"):
        study.read(tmp_path, profile)
