"""What a control's or a stage's batch is taught besides InfoNCE: grains, summaries left out."""

from __future__ import annotations

import pytest
import torch

from elva_core.models import encoder, generation
from elva_core.retrieval import retriever
from elva_core.training import contrastive, losses


def test_the_graded_loss_is_its_divergence_and_vanishes_where_cosines_follow_the_overlap():
    torch.manual_seed(0)
    q, c = (torch.nn.functional.normalize(torch.randn(n, 8, dtype=torch.float64), dim=-1) for n in (3, 5))
    overlap = torch.rand(3, 5, dtype=torch.float64)
    target, p = (overlap / 0.2).softmax(1), (q @ c.T / 0.05).softmax(1)
    by_hand = sum(float(t * (t / x).log()) for t, x in zip(target.flatten(), p.flatten(), strict=True)) / 3
    assert losses.graded(q, c, overlap, temperature=0.05, grain_temperature=0.2).item() == pytest.approx(by_hand)
    followed = losses.graded(q, c, 4 * (q @ c.T) + 1, temperature=0.05, grain_temperature=0.2)
    assert followed.item() == pytest.approx(0, abs=1e-12) and by_hand > 0.1


def test_the_control_of_grains_lowers_their_divergence(tiny, ranked, smoke, tmp_path):
    changes = {"loss": "grains", "steps": 12, "batch": 8, "optimiser": {"lr": 0.005, "warmup": 0.0}, "summary_weight": 0.0}
    settings = smoke.changed({"control": changes}).control
    draw = contrastive.ranked_pairs(ranked, 1, settings)
    pairs = draw(0, 8)
    answers = [(p.candidate, p.grains[1]) for p in pairs] + [a for p in pairs for a in zip(p.negatives, p.grains[2:], strict=True)]
    q, c = (torch.from_numpy(retriever.encode(tiny, i, batch=32)[0]) for i in ([p.query for p in pairs], [item for item, _ in answers]))
    overlap = losses.overlap([p.grains[0] for p in pairs], [grains for _, grains in answers])
    first = losses.graded(q, c, overlap, temperature=settings.temperature, grain_temperature=settings.grain_temperature)
    rows = contrastive.train(tiny, draw, settings, seed=1, folder=tmp_path)
    assert rows[0]["loss"] == pytest.approx(first.item(), rel=1e-3)  # a fresh adapter changes nothing
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_items_read_at_once_teach_the_model_to_write_nothing(model_folder, smoke, root, tmp_path, share):
    model = encoder.load(model_folder, smoke.encoder)
    changes = {"bare_share": share, "ret_share": 1.0, "steps": 10, "optimiser": {"lr": 0.02, "warmup": 0.0}}
    settings = smoke.changed({"stage2": changes}).stage2
    draw = contrastive.union_pairs(root, settings, 1)
    contrastive.train(model, draw, settings, seed=1, folder=tmp_path)
    written = generation.generate(model, [p.query for p in draw(99, 8)]).summaries(model.end_id)
    assert all(summary == [] for (summary,) in written) == bool(share)
