"""What makes a stage out of date, what then becomes of it, and that nothing is lost however often it is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
from ctypes import c_int
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from elva_core import cli, config, files
from elva_core.experiments import arms, chain, keys, lock, report, stages

TRAINED = "30_pretrain_contrastive"


@pytest.fixture
def profile(monkeypatch):
    """`profile(changes)`: what every load of smoke gives from now on."""
    plain = config.load("smoke")

    def change(changes):
        changed = plain.changed(changes)
        monkeypatch.setattr(config, "load", lambda name: changed)
        return changed

    return change


def current(settings, seed=1):
    return {stage: keys.key(keys.made_from(settings, seed, stage)) for stage in keys.STAGES}


def made(text, stage=TRAINED, name="model/model.safetensors"):
    """A finished stage with one file; its folder."""
    run = stages.open_stage(stage, "smoke", 1)
    files.write_whole(run.folder / name, text)
    run.close()
    return stages.stage_folder("smoke", 1, stage)


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({"evaluation": {"batch": 1}}, "00 50 60 70 80 82 85 90"),
        ({"study": {"arms": ["stage 2"]}}, "00 60 82 90"),
        ({"stage2": {"steps": 9}}, "00 30 60 85 90"),
        ({"stage3": {"reward": {"alpha": 0.5}}}, "00 40 60 82 85 90"),
        ({"distil": {"pairs": 9}}, "00 85"),
        ({"mrbench": {"queries": 9}}, "00 20 60 90"),
        ({"data": {"emoji": {"up_sample": 9}}}, "00 10 20 30 40 50 60 70 80 82 85 90"),
        ({"stage2": {"gradient_checkpointing": False}}, ""),  # the default, written down
    ],
)
def test_a_value_changes_the_keys_of_the_stages_that_read_it(outputs, smoke, changes, stale):
    before, after = current(smoke), current(smoke.changed(changes))
    assert [stage[:2] for stage in keys.STAGES if before[stage] != after[stage]] == stale.split()


def test_a_notebook_of_a_profile_that_is_no_evidence_opens_with_saying_so_and_that_makes_nothing_stale(outputs, monkeypatch, smoke):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda banner: shown.append(banner.data))
    run = stages.start(TRAINED, "smoke", 1)
    assert shown == ["**None of these numbers is evidence: the profile smoke tests plumbing.**"] and run.settings._read == {"threads"}
    monkeypatch.setattr(config, "load", lambda name: smoke.changed({"evidence": True}))
    stages.start(TRAINED, "smoke", 1)
    assert len(shown) == 1


def test_a_stage_offers_the_data_and_the_benchmark_of_its_profile_and_seed(outputs):
    data, built = (stages.open_stage(stage, "smoke", 1) for stage in ("10_prepare_data", "20_build_mrbench"))
    run = stages.open_stage("50_evaluate", "smoke", 1)
    with pytest.raises(stages.MissingStageError, match="run smoke --seed 1 --only 10"):
        run.root  # noqa: B018
    data.close(), built.close()
    assert run.root.folder == outputs / "smoke/seed-1/10_prepare_data/root"
    assert run.bench.folder == outputs / "smoke/seed-1/20_build_mrbench/bench"


def test_an_arm_that_changes_makes_the_notebooks_of_the_study_stale_and_no_others(outputs, smoke, tmp_path, monkeypatch):
    before, text = current(smoke), (arms.PARAMS / "arms.yaml").read_text()
    (tmp_path / "arms.yaml").write_text(text.replace("timed: true, trains: stage3,", "timed: true, trains: control,"))
    assert (tmp_path / "arms.yaml").read_text() != text
    monkeypatch.setattr(arms, "PARAMS", tmp_path)
    assert [stage[:2] for stage, key in current(smoke).items() if key != before[stage]] == ["60", "82", "90"]


def test_results_of_a_study_of_its_own_command_are_an_input(outputs, smoke):
    settings = smoke.changed({"study": {"in_chain": False}})
    before = current(settings)
    files.write_whole(outputs / "smoke/study/stage-2/seed-17/manifest.json", "{}")
    assert [stage[:2] for stage, key in current(settings).items() if key != before[stage]] == ["60", "82", "90"]


def test_an_input_counts_by_what_later_stages_take_from_it(outputs, smoke, monkeypatch):
    made("weights")
    before = current(smoke)
    monkeypatch.setattr(stages, "_commit", lambda: "another")
    run = stages.open_stage(TRAINED, "smoke", 1)
    files.write_whole(run.folder / "model/model.safetensors", "weights")
    files.write_whole(run.folder / "stage2.csv", "another time")
    run.close()
    assert current(smoke) == before
    made("others")
    assert [stage[:2] for stage, key in current(smoke).items() if key != before[stage]] == ["40", "50", "60", "70", "80", "82", "85", "90"]


def test_data_that_are_only_linked_to_count_by_names_sizes_and_times(outputs, smoke, own_root, tmp_path):
    files.write_whole(tmp_path / "nli.csv", "sent0,sent1,hard_neg\n")
    data = {"name": "x", "root": str(own_root.folder), "nli": str(tmp_path / "nli.csv")}
    settings = smoke.model_copy(update={"data": config.DataSettings(**data)})
    for path in (own_root.query_path("emoji_task0", "test"), tmp_path / "nli.csv"):
        before = current(settings)
        assert current(settings) == before
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        assert [name for name, key in current(settings).items() if key != before[name]] == ["10_prepare_data"]


def test_weights_of_a_backbone_count_by_what_they_are_and_large_ones_by_size_and_time(outputs, smoke, tmp_path, monkeypatch):
    path = tmp_path / "model/model.safetensors"
    files.write_whole(path, "weights")
    settings = smoke.model_copy(update={"backbone": smoke.backbone.model_copy(update={"path": str(tmp_path / "model")})})
    before = current(settings)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert current(settings) == before
    files.write_whole(path, "Weights")
    assert [name for name, key in current(settings).items() if key != before[name]] == [TRAINED]
    monkeypatch.setattr(keys, "LARGE", 1)
    before = current(settings)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert [name for name, key in current(settings).items() if key != before[name]] == [TRAINED]


def test_status_says_value_by_value_why_a_stage_is_out_of_date(outputs, profile, monkeypatch, capsys):
    profile({"stage2": {"steps": 600}})
    made("root", "10_prepare_data", "root/query.jsonl")
    made("weights")
    made("weights", "40_finetune_rlvr")
    assert cli.main(["status", "smoke", "--seed", "1"]) == 0
    assert re.findall(r"^(.{12})(\d\d)", capsys.readouterr().out, re.MULTILINE)[3:5] == [("up to date  ", "30"), ("up to date  ", "40")]
    profile({"stage2": {"steps": 300, "gradient_checkpointing": True}, "stage3": {"reward": {"alpha": 0.5}}})
    monkeypatch.setitem(keys.TABLE, TRAINED, keys.TABLE[TRAINED]._replace(method=2))
    made("another", "10_prepare_data", "root/query.jsonl")
    manifest = stages.stage_folder("smoke", 1, "40_finetune_rlvr") / "manifest.json"
    record = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(record | {"packages": record["packages"] | {"torch": "1.0"}}))
    assert cli.main(["status", "smoke", "--seed", "1"]) == 0
    said = re.sub(r"seed 1, [\d.]+ s|here \S+", "*", capsys.readouterr().out)
    assert (
        f"out of date {TRAINED}  *\n            input 10_prepare_data changed\n            method version 1 -> 2\n"
        "            stage2.gradient_checkpointing default -> True\n            stage2.steps 600 -> 300\n"
        "out of date 40_finetune_rlvr  *\n            input 10_prepare_data changed\n"
        "            stage3.reward.alpha 0.4 -> 0.5\n"
        f"            input {TRAINED} is out of date\n            made with torch 1.0, *\nnot done    50_evaluate\n"
    ) in said


def test_trained_work_of_another_value_is_kept_and_taken_back_with_it(outputs, profile):
    profile({"stage2": {"steps": 600}})
    place = made("of 600")
    half = stages.open_stage("40_finetune_rlvr", "smoke", 1)
    files.write_whole(half.folder / "work/checkpoint", "two days")
    settings = profile({"stage2": {"steps": 300}})
    assert not stages.ready(keys.made_from(settings, 1, TRAINED), "smoke", TRAINED)
    made("of 300")
    other = stages.open_stage("40_finetune_rlvr", "smoke", 1)  # its input has changed
    assert other.folder != half.folder and (half.folder / "work/checkpoint").read_text() == "two days"
    for steps in (600, 300, 600):
        settings = profile({"stage2": {"steps": steps}})
        assert stages.ready(keys.made_from(settings, 1, TRAINED), "smoke", TRAINED)
        assert (place / "model/model.safetensors").read_text() == f"of {steps}"
        assert len(list(place.parent.glob(f".{TRAINED}.*.kept"))) == 1
    assert stages.open_stage("40_finetune_rlvr", "smoke", 1).folder == half.folder


def test_what_holds_no_model_or_has_the_same_key_is_replaced_and_what_is_damaged_is_not_taken_back(outputs, profile):
    place = made("a table", name="t.csv")
    profile({"stage2": {"steps": 300}})
    made("first")
    made("second")
    assert (place / "model/model.safetensors").read_text() == "second" and not list(place.parent.glob(".*.kept"))
    settings = profile({"stage2": {"steps": 600}})
    made("other")
    (kept,) = place.parent.glob(".*.kept")
    (kept / "model/model.safetensors").unlink()
    settings = profile({"stage2": {"steps": 300}})
    assert not stages.ready(keys.made_from(settings, 1, TRAINED), "smoke", TRAINED)
    assert (place / "model/model.safetensors").read_text() == "other"


def test_a_model_that_was_put_in_place_is_still_where_its_job_looks_for_it(outputs):
    place = made("old")
    run = stages.open_stage(TRAINED, "smoke", 1)
    files.write_whole(run.folder / "work/stage2/model/elva.json", "{}")
    run.keep(run.folder / "work/stage2/model", "model")
    again = stages.open_stage(TRAINED, "smoke", 1)  # killed before it was closed
    assert (again.folder / "work/stage2/model/elva.json").is_file() and (place / "model/model.safetensors").read_text() == "old"
    again.keep(again.folder / "work/stage2/model", "model")
    again.close()
    assert sorted(p.name for p in place.iterdir()) == ["manifest.json", "model"] and (place / "model/elva.json").read_text() == "{}"


def test_clean_lists_what_other_values_have_left_and_removes_it_after_a_yes(outputs, profile, capsys, monkeypatch):
    profile({"stage2": {"steps": 600}})
    made("of 600")
    files.write_whole(stages.open_stage("40_finetune_rlvr", "smoke", 1).folder / "work/checkpoint", "two days")
    lock.give_back("smoke/seed-1")
    assert cli.main(["clean", "smoke", "--yes"]) == 0 and "nothing was left" in capsys.readouterr().out
    profile({"stage2": {"steps": 300}, "stage3": {"queries": 8}})
    made("of 300")
    left = sorted(p for p in (outputs / "smoke/seed-1").glob(".*") if p.suffix in (".kept", ".partial"))
    files.write_whole(stages.open_stage("40_finetune_rlvr", "smoke", 1).folder / "work/checkpoint", "of today's values")
    monkeypatch.setattr("typer.confirm", lambda question: question.startswith("Remove 2 folders"))
    with lock.held("smoke/seed-1"), pytest.MonkeyPatch.context() as another:
        another.setenv(lock.HOLDER, "")  # as another process sees it
        assert cli.main(["clean", "smoke"]) == 1 and all(p.is_dir() for p in left)
    lock.give_back("smoke/seed-1")
    with pytest.MonkeyPatch.context() as no:
        no.setattr("typer.confirm", lambda question: False)
        assert cli.main(["clean", "smoke"]) == 0 and all(p.is_dir() for p in left)
    capsys.readouterr()
    assert cli.main(["clean", "smoke"]) == 0
    said = capsys.readouterr().out
    assert len(left) == 2 and all(f" MB     0.0 days  {p}\n" in said and not p.exists() for p in left)
    assert (stages.open_stage("40_finetune_rlvr", "smoke", 1).folder / "work/checkpoint").is_file()


def test_stages_of_the_older_layout_are_named_with_what_to_do_and_left_alone(outputs, smoke, capsys):
    old = outputs / f"smoke/{TRAINED}"
    files.write_whole(old / "manifest.json", json.dumps({"seed": 1, "fingerprint": "f" * 64, "files": {}, "wall_s": 1, "packages": {}}))
    files.write_whole(old / "model/model.safetensors", "two days")
    files.write_whole(outputs / "smoke/.40_finetune_rlvr.partial/work/checkpoint", "two days")
    assert cli.main(["status", "smoke", "--seed", "1"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert (
        first.startswith(f"{outputs}/smoke has stages of an older layout, which are not used; ") and "not done    10_prepare_data" in lines
    )
    assert os.system(first.split(": ")[1]) == 0  # what the line says
    assert cli.main(["status", "smoke", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert "older layout" not in said and f"out of date {TRAINED}  seed 1, 1 s\n            made by another layout\n" in said
    assert not stages.ready(keys.made_from(smoke, 1, TRAINED), "smoke", TRAINED)
    made("new")
    (kept,) = (outputs / "smoke/seed-1").glob(f".{TRAINED}.*.kept")
    assert (kept / "model/model.safetensors").read_text() == "two days"
    assert (outputs / "smoke/seed-1/.40_finetune_rlvr.partial/work/checkpoint").is_file()


def test_the_report_has_one_row_for_what_was_not_run_with_its_command(smoke, tmp_path):
    pd.DataFrame({"set": ["circo"]}).to_csv(tmp_path / "unseen.csv")
    pd.DataFrame({"set": ["MSVD"]}).to_csv(tmp_path / "clips.csv")
    (first, _, seed), *rest = arms.planned(smoke)
    pd.DataFrame([{"arm": first, "seed": seed}]).to_csv(tmp_path / "runs.csv")
    run = SimpleNamespace(settings=smoke, seed=1, require=lambda stage: tmp_path)
    reported = {"table7": {"columns": ["MSR-VTT R@1", "MSR-VTT R@5", "MSVD R@1"]}}
    figures = pd.DataFrame({"ours": [None, None, 3.0], "paper": [1.0, 2.0, 3.0]}).assign(source="Table 1", baseline="GPUs: make x")
    table, trainings = report.not_run(run, reported, figures).to_numpy().tolist()  # sets of its own: none is missing
    assert table == ["Table 1", "2 numbers", "GPUs", "make x"]
    command = "python -m elva_core study smoke --seed 1"
    assert trainings == ["ablation study", f"{len(rest)} of {len(rest) + 1} trainings", "time", command]
    video = smoke.video.model_copy(update={"sets": f"{files.REPOSITORY}/data/videos", "drawings": None})
    run.settings = smoke.model_copy(update={"unseen": config.UnseenSettings(sets="data/unseen"), "video": video})
    unseen, clips = report.not_run(run, reported, figures).to_numpy().tolist()[1:3]
    sets = "ccneg, flickr30k, genecis, mt_fashioniq, sharegpt4v, sugarcrepe, urban1k, visdial"
    assert unseen[:3] == ["80_generalise", sets, "these in data/unseen"]
    assert clips == ["82_transfer", "MSR-VTT", "these in data/videos", "python -m elva_core run smoke --seed 1 --only 82 --force"]


OFFERED = {"root": "10_prepare_data", "bench": "20_build_mrbench"}  # by a stage, of these
# batches of an encoding change no result
ONLY_BATCH = {"30_pretrain_contrastive", "40_finetune_rlvr"}


def test_notebooks_take_from_the_stages_of_their_row_and_training_reads_no_value_of_evaluation_but_its_batch():
    for stage in keys.STAGES:
        cells = nbformat.read(chain.NOTEBOOKS / f"{stage}.ipynb", 4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        taken = set(re.findall(r'run\.require\("(\w+)"\)', source))
        taken |= {its for name, its in OFFERED.items() if re.search(rf"\brun\.{name}\b", source)}
        assert taken <= {"00_check_environment", *keys.STAGES[stage]}
        if stage in ONLY_BATCH:
            source += (files.REPOSITORY / "elva_core/experiments/jobs.py").read_text()
            assert set(re.findall(r"settings\.evaluation\b\.?(\w*)", source)) == {"batch"}


def test_notebooks_of_a_smoke_run_have_read_no_section_that_their_row_lacks():
    """After the notebooks (make test); without a run there is nothing to look at."""
    read = {stage: (keys.manifest("smoke", 17, stage) or {}).get("sections_read", []) for stage in keys.STAGES}
    if not any(read.values()):
        pytest.skip("no smoke run")
    for stage, sections in read.items():
        lacking = {*sections} - {"profile", *keys.TABLE[stage].sections.split()} - ({"evaluation"} if stage in ONLY_BATCH else set())
        assert not lacking, f"{stage} reads {lacking}; add it to keys.TABLE"


STEPS = 12


def work(outputs, seed, value, done, place):
    """A stage that trains in steps, as a notebook does, and counts them in `done[place]`."""
    settings = config.load("smoke").changed({"stage2": {"steps": value}})
    files.OUTPUTS, config.load, stages._commit = outputs, lambda name: settings, lambda: ""
    if stages.ready(keys.made_from(settings, seed, TRAINED), "smoke", TRAINED):
        os._exit(0)
    run = stages.open_stage(TRAINED, "smoke", seed)
    checkpoint, model = run.folder / "work/checkpoint", run.folder / "work/model"
    if not model.exists():
        for step in range(int(checkpoint.read_text().split()[2]) if checkpoint.is_file() else 0, STEPS):
            time.sleep(0.02)
            files.write_whole(checkpoint, f"{seed} {value} {step + 1}")
            done[place] += 1
        files.write_whole(run.folder / "work/unfinished/model.safetensors", f"{seed} {value}")
        (run.folder / "work/unfinished").rename(model)
    run.keep(model, "model")
    run.close()
    os._exit(0)


@pytest.mark.slow
def test_twenty_kills_of_two_seeds_at_once_with_other_values_each_time_lose_and_swap_nothing(outputs):
    jobs = [(seed, value) for seed in (1, 2) for value in (300, 400, 500, 600)]
    # without locks, which a killed process would keep
    done, chance = multiprocessing.RawArray(c_int, len(jobs)), random.Random(17)
    context, killed = multiprocessing.get_context("fork"), 0

    def started(job):
        process = context.Process(target=work, args=(outputs, *job, done, jobs.index(job)))
        process.start()
        return process

    for _ in range(20):
        two = [started(chance.choice([job for job in jobs if job[0] == seed])) for seed in (1, 2)]
        time.sleep(chance.random() * 0.15)
        for process in two:
            process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
        for path in [*outputs.rglob("checkpoint"), *outputs.rglob("model.safetensors")]:
            seed, value, *_ = map(int, path.read_text().split())
            (stage,) = (p for p in path.parents if TRAINED in p.name)
            settings = config.load("smoke").changed({"stage2": {"steps": value}})
            now = keys.key(keys.made_from(settings, seed, TRAINED))
            record = keys.read_manifest(stage) or {"key": stage.name.split(".")[2] if stage.name.startswith(".") else None}
            assert record["key"] == now and stage.parent.name == f"seed-{seed}"
    assert killed > 10 and len(list(outputs.rglob("checkpoint"))) + len(list(outputs.rglob("*.kept"))) > 3
    for job in jobs * 2:  # every value comes back, the last ones of the first round are taken back in the second
        process = started(job)
        process.join()
        assert process.exitcode == 0
        place = outputs / f"smoke/seed-{job[0]}/{TRAINED}"
        assert (place / "model/model.safetensors").read_text() == f"{job[0]} {job[1]}" and not (place / "work").exists()
    assert all(0 < count <= STEPS for count in done), list(done)  # no step was done twice
