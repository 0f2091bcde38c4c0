"""Profiles are refused with file and key, never half understood."""

from __future__ import annotations

import pytest
import yaml

from elva_core import config
from elva_core.config import ProfileError


@pytest.fixture
def params(tmp_path, monkeypatch):
    for name in ("cpu", "smoke"):
        (tmp_path / f"{name}.yaml").write_text((config.PARAMS / f"{name}.yaml").read_text())
    monkeypatch.setattr(config, "PARAMS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("profile", sorted(p.stem for p in config.PARAMS.glob("*.yaml") if p.stem not in config.NO_PROFILES))
def test_every_committed_profile_loads(profile):
    assert config.load(profile).profile == profile


def test_extending_changes_only_what_it_names():
    smoke, cpu = config.load("smoke"), config.load("cpu")
    assert smoke.stage3.reward == cpu.stage3.reward and smoke.stage3.num_generations != cpu.stage3.num_generations
    assert smoke.digest() != cpu.digest() == config.load("cpu").digest()


def test_the_digest_is_that_of_the_values_that_differ_from_their_defaults(params):
    """So a key that is added with a default, and one that a profile writes out although it is the default, leave it."""
    cpu = config.load("cpu")
    every_value = yaml.safe_dump(cpu.model_dump(mode="json", exclude={"profile"}), sort_keys=False)
    (params / "cpu.yaml").write_text(every_value)
    assert "sampler: transformers" in every_value and config.load("cpu").digest() == cpu.digest()
    changed = cpu.changed({"stage3": {"sampler": "vllm", "vllm": {"drift_bound": 0.1}}})
    assert changed.stage3.sampler == "vllm" and changed.changed({}) == changed and changed.digest() != cpu.digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("extends: cpu\nstage2: {temprature: 0.1}\n", r"x\.yaml: stage2\.temprature: Extra inputs"),
        ("extends: cpu\nstage3: {num_generations: 1}\n", r"stage3\.num_generations: Input should be greater"),
        ("extends: cpu\nstage3: {kl_weight: 0.1}\n", r"x\.yaml: stage3\.kl_weight is called beta now"),
        ("extends: cpu\nstage2: {temperature: 0}\n", r"stage2\.temperature"),
        ("extends: smoke\n", "one level only"),
        ("extends: nowhere\n", r"nowhere\.yaml is missing; profiles are"),
        ("- a\n", "expected keys and values"),
        ("a: [\n", "not readable as YAML"),
    ],
)
def test_bad_profiles_are_named(params, change, message):
    (params / "x.yaml").write_text(change)
    with pytest.raises(ProfileError, match=message):
        config.load("x")


def test_every_value_of_the_whole_profile_names_its_source():
    lines = (config.PARAMS / "cpu.yaml").read_text().splitlines()
    assert sum("#" in line for line in lines) > 60
