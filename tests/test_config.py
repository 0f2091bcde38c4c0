"""Profiles are refused with file and key, never half understood."""

from __future__ import annotations

import pytest
import yaml

from elva_core import config, files, values
from elva_core.config import ProfileError


@pytest.fixture
def params(tmp_path, monkeypatch):
    for name in ("cpu", "smoke"):
        (tmp_path / f"{name}.yaml").write_text((config.PARAMS / f"{name}.yaml").read_text())
    monkeypatch.setattr(config, "PARAMS", tmp_path)
    return tmp_path


def dumped(settings: config.Settings) -> str:
    """The values of which keys and fingerprints are the hashes."""
    return settings.model_dump_json(exclude_defaults=True)


@pytest.mark.parametrize("profile", sorted(p.stem for p in config.PARAMS.glob("*.yaml") if p.stem not in config.NO_PROFILES))
def test_every_committed_profile_loads(profile):
    assert config.load(profile).profile == profile


def test_extending_changes_only_what_it_names():
    smoke, cpu = config.load("smoke"), config.load("cpu")
    assert smoke.stage3.reward == cpu.stage3.reward and smoke.stage3.num_generations != cpu.stage3.num_generations
    assert dumped(smoke) != dumped(cpu) == dumped(config.load("cpu"))


def test_the_digest_is_that_of_the_values_that_differ_from_their_defaults(params):
    """So a key that is added with a default, and one that a profile writes out although it is the default, leave it."""
    cpu = config.load("cpu")
    every_value = yaml.safe_dump(cpu.model_dump(mode="json", exclude={"profile"}), sort_keys=False)
    (params / "cpu.yaml").write_text(every_value)
    assert "sampler: transformers" in every_value and dumped(config.load("cpu")) == dumped(cpu)
    changed = cpu.changed({"stage3": {"sampler": "vllm", "vllm": {"drift_bound": 0.1}}})
    assert changed.stage3.sampler == "vllm" and changed.changed({}) == changed and dumped(changed) != dumped(cpu)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("extends: cpu\nstage2: {temprature: 0.1}\n", r"x\.yaml: stage2\.temprature: Extra inputs"),
        ("extends: cpu\nstage3: {num_generations: 1}\n", r"stage3\.num_generations: Input should be greater"),
        ("extends: cpu\nstage3: {kl_weight: 0.1}\n", r"x\.yaml: stage3\.kl_weight is called beta now"),
        ("extends: cpu\nstage3: {rollouts: 8}\n", r"stage3\.rollouts is called num_generations now"),
        ("extends: cpu\nstage3: {advantage: group}\n", r"stage3\.advantage is called scale_rewards now"),
        ("extends: cpu\nstage3: {aggregation: sequence}\n", r"stage3\.aggregation is called loss_type \(sequence is grpo now\) now"),
        ("extends: cpu\nstage2: {temperature: 0}\n", r"stage2\.temperature"),
        ("extends: x\n", r"x\.yaml: extends x, which is this profile"),
        ("extends: nowhere\n", r"nowhere\.yaml is missing; profiles are"),
        ("- a\n", "expected keys and values"),
        ("a: [\n", "not readable as YAML"),
        (
            "extends: cpu\nstage2: {steps: 1}\nstage3: {beta: 1}\nstage2: {batch: 2}\n",
            r"x\.yaml, line 4: .*key stage2 is in line 2 already",
        ),
        ("extends: cpu\nstage2: {steps: 1, steps: 2}\n", "line 2: .*key steps is in line 2 already"),
        ("extends: cpu\nevaluation: {cutoffs: [1, -5]}\n", r"x\.yaml: evaluation\.cutoffs\.1: Input should be greater than 0"),
        ("extends: cpu\nevaluation: {cutoffs: []}\n", r"evaluation\.cutoffs: "),
        ("extends: cpu\nstudy: {seeds: [-1]}\n", r"study\.seeds\.0: "),
        ("extends: cpu\nencoder: {max_pixels: -1}\n", r"encoder\.max_pixels: Input should be greater than 0"),
        ("extends: cpu\nencoder: {min_pixels: 9, max_pixels: 4}\n", "encoder: min_pixels = 9 is above max_pixels = 4"),
        ("extends: cpu\nstage3: {beta: .nan}\n", r"stage3\.beta: Input should be a finite number"),
        ("extends: cpu\nstage2: {optimiser: {lr: -1.0}}\n", r"stage2\.optimiser\.lr: "),
        ("extends: cpu\n7: x\n", "expected keys and values"),
        ("extends: cpu\nrerank: {window: 18}\n", "hard = 16 negatives do not fill negatives = 1 and window = 18"),
        ("extends: cpu\nstage3: {negatives: {again_every: 7}}\n", r"must be a multiple of negatives\.again_every = 7"),
        ("extends: cpu\ncontrol: {hard: 8, random: 9}\n", r"are more than stage3\.negatives has: 8 [+] 8"),
        ("extends: cpu\ncontrol: {random: null}\n", "both hard and random, or neither"),
        (
            "extends: cpu\nencoder: {candidate_summaries: false}\nstage3: {rollout_sides: all}\n",
            "rollout_sides: all rolls candidates out",
        ),
    ],
)
def test_bad_profiles_are_named(params, change, message):
    (params / "x.yaml").write_text(change)
    with pytest.raises(ProfileError, match=message):
        config.load("x")


def test_values_of_a_small_backbone_extend_others_and_bad_ones_are_named(params):
    (params / "backbone").mkdir(exist_ok=True)
    for name in ("qwen2vl", "tiny"):
        (params / f"backbone/{name}.yaml").write_text((files.REPOSITORY / f"params/backbone/{name}.yaml").read_text())
    (params / "backbone/x.yaml").write_text("extends: qwen2vl\njoint: {stepz: 3}\n")
    tiny, whole = config.teaching("tiny"), config.teaching("qwen2vl")
    assert (tiny.sizes.hidden, tiny.vendors) == (48, whole.vendors)
    with pytest.raises(ProfileError, match=r"backbone/x\.yaml: joint\.stepz: "):
        config.teaching("x")
    with pytest.raises(ProfileError, match=r"backbone/y\.yaml is missing; profiles are \['qwen2vl', 'tiny', 'x'\]"):
        config.teaching("y")
    (params / "backbone/x.yaml").write_text("extends: qwen2vl\nsizes: {architecture: qwen2_5_vl}\n")
    with pytest.raises(ProfileError, match=r"backbone/x\.yaml: .*a qwen2_5_vl takes the weights of a qwen2_vl; name its folder as first"):
        config.teaching("x")


PLACES = """extends: cpu
data: {name: mine, emoji: null, root: data/M-BEIR, nli: ../nli.csv}
backbone: {path: models/base}
unseen: {sets: data/unseen, language: null, queries: null}
video: {sets: /far/videos, drawings: null}
"""


def test_paths_of_a_profile_are_meant_from_the_repository_wherever_it_is_loaded(params, monkeypatch):
    """And its digest does not depend on where that is: it is that of the values as written."""
    (params / "x.yaml").write_text(PLACES)
    loaded, digests = [], []
    for repository in (params / "here", params / "there"):
        monkeypatch.setattr(files, "REPOSITORY", repository)
        (repository / "notebooks").mkdir(parents=True)
        for folder in (repository, repository / "notebooks"):
            monkeypatch.chdir(folder)
            read = config.load("x")
            given = [read.data.root, read.data.nli, read.unseen.sets, read.video.sets]
            assert given == [f"{repository}/data/M-BEIR", f"{repository}/../nli.csv", f"{repository}/data/unseen", "/far/videos"]
            loaded.append(read)
            digests.append(dumped(read))
            assert read.changed({"threads": 2}).changed({"threads": read.threads}) == read
    assert len(set(digests)) == 1 and loaded[0] == loaded[1] != loaded[2]
    assert read.model_dump()["data"]["root"] == "data/M-BEIR" and read.model_dump()["video"]["sets"] == "/far/videos"


def test_a_model_is_a_folder_where_one_exists_or_a_path_is_meant_and_a_hub_name_else(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REPOSITORY", tmp_path / "repository")
    (tmp_path / "repository/Qwen/local").mkdir(parents=True)
    (tmp_path / "elsewhere/Qwen/Qwen2-VL-2B-Instruct").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")  # a folder of the caller's is not meant
    assert values.model_source("Qwen/local") == f"{tmp_path}/repository/Qwen/local"
    assert values.model_source("./nowhere") == f"{tmp_path}/repository/./nowhere"
    assert values.model_source("/nowhere") == "/nowhere"
    assert values.model_source("Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"


def test_every_value_of_the_whole_profile_names_its_source():
    lines = (config.PARAMS / "cpu.yaml").read_text().splitlines()
    assert sum("#" in line for line in lines) > 60
