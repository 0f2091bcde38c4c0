"""The train loop says how far it is, in one line, also after it was resumed."""

from __future__ import annotations

import torch

from elva_core.training import loop
from elva_core.training_settings import OptimiserSettings

SETTINGS = OptimiserSettings(lr=0.1, warmup=0.0, checkpoint_every=2)


def test_progress_counts_the_steps_of_before(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    weight = torch.nn.Parameter(torch.ones(2))

    def step_fn(step: int) -> dict[str, float]:
        if step == 3 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        weight.square().sum().backward()
        return {}

    try:
        loop.train_loop({"weight": weight}, step_fn, 4, SETTINGS, tmp_path / "stage3")
    except KeyboardInterrupt:
        capsys.readouterr()
    rows = loop.train_loop({"weight": weight}, step_fn, 4, SETTINGS, tmp_path / "stage3")
    told = capsys.readouterr().err
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert "stage3:  50%" in told and "4/4" in told and told.count("\n") == 1
