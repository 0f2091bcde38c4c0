"""The study: what is run, what is run again, and the statistics over seeds and queries."""

from __future__ import annotations

import pytest

from elva_core import config
from elva_core.evaluation import statistics
from elva_core.experiments import jobs, study
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

    def run(changed=profile):
        measured.clear()
        monkeypatch.setattr(study, "measure", counted)
        study.run(changed, root, triplets, bench, str(model_folder), tmp_path / "study", tmp_path / "work")
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


def test_what_is_said_about_a_benchmark_asks_for_no_arm_again_but_who_draws_it_does(profile):
    def mark(**changes):
        return study.fingerprint(profile.changed({"mrbench": changes}), Arm(group="", trains="nothing", why=""), 1, "b")

    assert mark() == mark(precision=0.5, licence="x")
    model = {"kind": "transformers", "model": "m"}
    assert len({mark(), mark(annotator=model), mark(units=["u"]), mark(queries=8)}) == 4


def test_an_unknown_arm_is_refused_with_those_that_exist(profile):
    with pytest.raises(config.ProfileError, match=r"names \['stage 4'\].*stage 3"):
        study.arms(profile.changed({"study": {"arms": ("stage 4",)}}))


def test_arms_of_every_seed_run_first_and_the_others_once(profile):
    plan = study.planned(profile.changed({"study": {"seeds": (5, 6), "arms": ()}}))
    seeds = {name: [s for n, _, s in plan if n == name] for name, _, _ in plan}
    assert all(
        own == ([5, 6] if study.arms(profile.changed({"study": {"arms": ()}}))[name].every_seed else [5]) for name, own in seeds.items()
    )
    everywhere = [arm.every_seed for _, arm, _ in plan]
    assert everywhere == sorted(everywhere, reverse=True)


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


def test_an_empty_study_names_the_command(profile, tmp_path):
    with pytest.raises(config.ProfileError, match="run: python -m elva_core study smoke"):
        study.read(tmp_path, profile)


def test_a_template_and_a_start_belong_to_what_is_measured(profile):
    plain = Arm(group="main", trains="nothing", why="x")
    marks = {
        study.fingerprint(profile, a, 1, "b")
        for a in (plain, plain.model_copy(update={"template": "eol"}), plain.model_copy(update={"start": "backbone"}))
    }
    assert len(marks) == 3
