"""The model that ships is the run's stage 3 model in half the bytes, and it is asked without any argument."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from elva_core import cli, files
from elva_core.apps import answers, reference
from elva_core.data import items, sources
from elva_core.experiments import stages
from elva_core.models import encoder
from elva_core.retrieval import retriever


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """A run of the smoke profile with a stage 3 model and a table of claims, in outputs of its own."""
    monkeypatch.setattr(files, "OUTPUTS", tmp_path)
    monkeypatch.setattr(reference, "PROFILE", "smoke")
    trained = tmp_path / "smoke/seed-17/40_finetune_rlvr/model"
    tiny.save(trained, stage="stage3", parent=tiny.source)
    report = tmp_path / "smoke/seed-17/90_report"
    report.mkdir()
    columns = ["claim", "dataset", "metric", "paper", "seeds", "verdict", "ours", "ci_low", "ci_high", "n"]
    (report / "claims.csv").write_text(",".join(columns) + "\n")
    return trained


def test_what_ships_embeds_as_what_was_trained(run):
    folder = reference.ship()
    weights = [sum(path.stat().st_size for path in place.glob("*.safetensors")) for place in (folder, run)]
    assert weights[0] < 0.6 * weights[1]
    asked = [items.Item("A dog."), items.Item("Frau läuft.")]
    shipped, trained = (retriever.encode(encoder.load(place), asked, batch=2, template="eol")[0] for place in (folder, run))
    assert np.allclose(shipped, trained, atol=2e-3)
    card = (folder / "README.md").read_text()
    assert "## Its backbone" in card and "all rights with its owner" in card
    assert json.loads((folder / "elva.json").read_text())["stage"] == "stage3"


def test_nothing_ships_of_a_run_that_is_not_done(run):
    shutil.rmtree(run)
    with pytest.raises(stages.MissingStageError, match="python -m elva_core run smoke --seed 17"):
        reference.ship()
    assert not reference.folder().exists()


def test_a_query_without_any_argument_is_asked_of_the_model_that_ships(run, monkeypatch, capsys, tmp_path):
    reference.ship()
    written = []
    monkeypatch.setattr(sources, "write", lambda *given, write=sources.write, **more: (written.append(given), write(*given, **more)))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cli.main(["search", "--k", "3", "--no-pictures", "--profile", "smoke", "woman running"]) == 0
    assert len(written) == 1 and capsys.readouterr().out.count("summary: ") == 2
    model, pool = reference.opened()
    assert pool.unit == "emoji_task0" and len(pool.candidates) == len(pool.vectors) and model.template == "summary"
    assert answers.search(model, pool, "woman running", k=2).save(".").is_file()  # README's quick start
    assert cli.main(["search", "--model", str(reference.folder()), "x"]) == 1
