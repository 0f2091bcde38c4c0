"""Single pass: the EOL state learns what [RET] says after a summary; folders say how they want to be read; what reading costs."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from elva_core import cli, distributed
from elva_core.config import ProfileError
from elva_core.data import images
from elva_core.data import items as data_items
from elva_core.evaluation import statistics, throughput
from elva_core.experiments import claims, estimate, figures, jobs, plan, results, sentences, stages
from elva_core.export import hub
from elva_core.models import encoder, generation
from elva_core.retrieval import cache, retriever
from elva_core.training import distillation, losses
from elva_core.training.contrastive import union_pairs


@pytest.fixture(scope="module")
def drawn(root, smoke) -> list[data_items.Item]:
    return distillation.sample(union_pairs(root, smoke.stage2, 1), 16, 8)


def settings(smoke, **changes):
    optimiser = {"lr": 0.003, "warmup": 0.1, "checkpoint_every": 3}
    return smoke.changed({"distil": {"steps": 8, "batch": 12, "chunk": 5, "optimiser": optimiser} | changes}).distil


def read(model, items, template) -> torch.Tensor:
    return torch.from_numpy(retriever.encode(model, items, batch=16, template=template)[0])


def never(*_, **__):
    pytest.fail("nothing may be generated here")


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.backbone.parameters()])


def test_the_divergence_is_that_of_plain_torch():
    generator = torch.Generator().manual_seed(1)
    student, teacher, bank = (torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=-1) for n in (4, 4, 9))
    distance, divergence = losses.distillation(student, teacher, bank, temperature=0.1)
    for row in range(4):
        p, q = (torch.distributions.Categorical(logits=(x[row] * bank).sum(-1) / 0.1) for x in (teacher, student))
        torch.testing.assert_close(divergence[row], torch.distributions.kl_divergence(p, q))
        torch.testing.assert_close(distance[row], 1 - torch.cosine_similarity(student[row], teacher[row], dim=0))


def test_the_sample_is_what_stage_2_drew_first(root, smoke, drawn):
    pairs = [p for step in range(2) for p in union_pairs(root, smoke.stage2, 1)(step, 8)]
    assert set(drawn) == {p.query for p in pairs} | {p.candidate for p in pairs} and len(drawn) == len(set(drawn))


def test_a_model_that_agrees_with_its_teacher_has_nothing_to_learn(tiny, drawn, smoke, tmp_path):
    before = read(tiny, drawn, "eol")
    (row,) = distillation.train(tiny, drawn, before, settings(smoke, steps=1, kl_weight=2.0), seed=4, folder=tmp_path)
    # no more steps: AdamW would scale what rounding leaves of the gradient up to the learning rate
    assert abs(row["loss"]) < 1e-6 and abs(row["kl"]) < 1e-6 and row["cosine"] == pytest.approx(1) and row["grad_norm"] < 1e-4


def test_the_eol_state_comes_to_say_what_the_summary_said(tiny, drawn, smoke, tmp_path):
    targets = distillation.taught(tiny, drawn, batch=16, path=tmp_path / "teacher.safetensors")
    torch.testing.assert_close(targets, read(tiny, drawn, "summary"))
    before = (read(tiny, drawn, "eol") * targets).sum(-1).mean()
    rows = distillation.train(tiny, drawn, targets, settings(smoke, steps=20), seed=4, folder=tmp_path)
    after = (read(tiny, drawn, "eol") * targets).sum(-1).mean()
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and rows[-1]["kl"] < rows[0]["kl"]
    assert rows[0]["cosine"] == pytest.approx(float(before), abs=0.1) and 1 - after < 0.5 * (1 - before)


def test_summaries_of_the_teacher_are_not_written_twice(tiny, drawn, tmp_path, monkeypatch):
    first = distillation.taught(tiny, drawn, batch=16, path=tmp_path / "teacher.safetensors")
    monkeypatch.setattr(generation, "generate", never)
    assert torch.equal(distillation.taught(tiny, drawn, batch=16, path=tmp_path / "teacher.safetensors"), first)
    assert [p.name for p in tmp_path.iterdir()] == ["teacher.safetensors"]


def test_an_interrupted_run_ends_with_the_weights_of_a_whole_one(model_folder, drawn, smoke, tmp_path, interrupted):
    targets = read(encoder.load(model_folder, smoke.encoder), drawn, "summary")

    def run(name):
        model = encoder.load(model_folder, smoke.encoder)
        rows = distillation.train(model, drawn, targets, settings(smoke), seed=4, folder=tmp_path / name)
        return weights(model), rows

    whole, _ = run("whole")
    with interrupted(distributed, "own_share", 6):
        run("cut")
    cut, rows = run("cut")
    assert torch.equal(cut, whole) and [row["step"] for row in rows] == list(range(8))


def test_shares_of_a_step_add_up_to_the_step_of_one_process_in_one_chunk(model_folder, drawn, smoke, tmp_path, monkeypatch):
    targets, found = read(encoder.load(model_folder, smoke.encoder), drawn, "summary"), {}
    for name, share in {"all": lambda n: range(n), "even": lambda n: range(0, n, 2), "odd": lambda n: range(1, n, 2)}.items():
        monkeypatch.setattr(distributed, "own_share", share)
        kept = found.setdefault(name, [])
        monkeypatch.setattr(
            distributed, "sum_gradients", lambda ps, kept=kept: kept.extend(p.grad.clone() for p in ps if p.grad is not None)
        )
        model = encoder.load(model_folder, smoke.encoder)
        values = settings(smoke, steps=1, chunk=12 if name == "all" else 5)
        distillation.train(model, drawn, targets, values, seed=4, folder=tmp_path / name)
    assert any(g.abs().max() > 1e-4 for g in found["even"])
    for whole, even, odd in zip(*found.values(), strict=True):
        torch.testing.assert_close(even + odd, whole, atol=1e-6, rtol=1e-4)


def test_a_folder_says_how_it_wants_to_be_read(tiny, tmp_path):
    for template in encoder.TEMPLATES:
        tiny.save(tmp_path / template, stage="test", parent="none", template=template)
        assert encoder.load(tmp_path / template).template == template
    path = tmp_path / "eol/elva.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in card.items() if k != "template"}))
    assert encoder.load(tmp_path / "eol").template == "summary"  # folders of before
    path.write_text(json.dumps(card | {"template": "mean"}))
    with pytest.raises(ValueError, match=r"elva\.json: template 'mean' is none of summary, eol"):
        encoder.load(tmp_path / "eol")


def test_the_stage_teaches_the_single_pass_and_its_folder_says_so(root, smoke, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "start", lambda threads: None)
    job = jobs.Job("distil", smoke, 1, root, tmp_path, str(model_folder), tmp_path / "work", tmp_path / "none")
    jobs.run(job)
    card = json.loads((job.model / "elva.json").read_text())
    assert card["template"] == "eol" and card["stage"] == "distil" and card["parents"][-1]["stage"] == "backbone"
    assert len(jobs.history(job)) == smoke.distil.steps
    assert (weights(encoder.load(job.model)) - weights(encoder.load(model_folder, smoke.encoder))).abs().max() > 1e-4


@pytest.mark.parametrize("section", ["distil", "rerank"])
def test_a_profile_without_the_section_is_told_what_to_add(smoke, tmp_path, section):
    stage = stages.Stage("85_trade_cost", smoke.model_copy(update={section: None}), 1, tmp_path, {})
    with pytest.raises(ProfileError, match=rf"params/smoke\.yaml has no section {section}; copy the one"):
        jobs.following(section, stage)


@pytest.fixture
def command(tiny, root, tmp_path, monkeypatch):
    """search or evaluate on a model that wants to be read in one pass."""
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    monkeypatch.setattr(distributed, "start", lambda threads: None)
    tiny.save(tmp_path / "model", stage="test", parent="none", template="eol")
    common = ["--model", str(tmp_path / "model"), "--root", str(root.folder), "--unit", "emoji_task0", "--profile", "smoke"]
    return lambda name, *more: cli.main([name, *common, *more])


def test_a_search_in_one_pass_generates_nothing_and_shows_no_summary(command, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(generation, "generate", never)
        assert command("search", "--no-pictures", "--k", "3", "woman running") == 0
    single = capsys.readouterr().out.strip().splitlines()
    assert len(single) == 3 and not any("summary" in line for line in single)
    assert command("search", "--no-pictures", "--k", "3", "--template", "summary", "woman running") == 0
    assert capsys.readouterr().out.startswith("summary: ")


def test_evaluate_reads_as_the_folder_says_unless_told_otherwise(command, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(generation, "generate", never)
        assert command("evaluate", "--out", str(tmp_path / "own")) == 0
    assert command("evaluate", "--out", str(tmp_path / "summary"), "--template", "summary") == 0
    own, summary = ((tmp_path / name / "runs/emoji_task0_local_trec.txt").read_text() for name in ("own", "summary"))
    assert own != summary


def test_queries_in_one_pass_meet_the_pool_of_another_model(tiny, root, smoke, command, tmp_path, capsys, monkeypatch):
    tiny.save(tmp_path / "teacher", stage="test", parent="none")
    teacher, student = (retriever.Searcher(tiny, root, "test", smoke.evaluation, template=t) for t in encoder.TEMPLATES)
    mixed = retriever.Searcher(tiny, root, "test", smoke.evaluation, template="eol", embed_pool=teacher.vectors).embedded("emoji_task0")
    assert (mixed.query_vectors == student.embedded("emoji_task0").query_vectors).all()
    assert (mixed.pool_vectors == teacher.embedded("emoji_task0").pool_vectors).all()
    assert command("search", "--no-pictures", "--k", "3", "--pool-model", str(tmp_path / "teacher"), "woman running") == 0
    shown = capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(generation, "generate", never)  # the pool is kept; a query needs no summary
        assert command("search", "--no-pictures", "--k", "3", "--pool-model", str(tmp_path / "teacher"), "woman running") == 0
    assert capsys.readouterr().out == shown
    assert command("search", "--no-pictures", "--k", "3", "woman running") == 0 and capsys.readouterr().out != shown
    assert command("evaluate", "--out", str(tmp_path / "out"), "--pool-model", str(tmp_path / "teacher")) == 0
    got = pd.read_csv(tmp_path / "out/results.csv").set_index("metric").loc["mrr@10", "value"]
    assert got == pytest.approx(np.mean([1 / r[0] if r[0] <= 10 else 0 for r in student_ranks(mixed)]), abs=1e-3)


def student_ranks(asked) -> list[list[int]]:
    scores = asked.query_vectors @ np.asarray(asked.pool_vectors).T
    return [sorted(int((row > row[i]).sum()) + 1 for i in rows) for row, rows in zip(scores, asked.relevant, strict=True)]


def test_the_pool_of_a_model_of_another_size_is_refused(tiny, command, tmp_path, capsys, monkeypatch):
    tiny.save(tmp_path / "wide", stage="test", parent="none")
    load, config = encoder.load, tiny.backbone.config.get_text_config()

    def wider(folder, *arguments, **named):
        model = load(folder, *arguments, **named)
        if "wide" in str(folder):
            model.backbone.config.get_text_config().hidden_size = 2 * config.hidden_size
        return model

    monkeypatch.setattr(encoder, "load", wider)
    assert command("search", "--no-pictures", "--pool-model", str(tmp_path / "wide"), "x") == 1
    assert f"has embeddings of size {2 * config.hidden_size}" in capsys.readouterr().err


def test_one_pass_is_one_pass_and_a_summary_waits_for_its_longest(tiny, items, monkeypatch):
    written = max(len(row) for (row,) in generation.generate(tiny, items).summaries(tiny.end_id))
    ways = {"summary": throughput.Way(tiny, "summary"), "eol": throughput.Way(tiny, "eol")}
    order, timed = [], throughput._timed
    monkeypatch.setattr(throughput, "_timed", lambda way, *rest: order.append(way.template) or timed(way, *rest))
    table = throughput.measure(ways, {"queries": items}, batches=(len(items),), rounds=2).set_index("way")
    # each of the tokens, its end or the cap, [RET], and the prompt
    assert table.loc["summary", "forwards"] == written + 2 and table.loc["eol", "forwards"] == 1
    assert order == ["summary", "eol", "summary", "eol", "eol", "summary"]  # untimed, then in turns
    assert (
        (table["lowest"] <= table["per second"]).all()
        and (table["per second"] <= table["highest"]).all()
        and (table["n"] == len(set(items))).all()
    )


def test_timed_items_come_from_the_whole_side(tiny, items, monkeypatch):
    seen = []
    monkeypatch.setattr(throughput, "_timed", lambda way, chosen, batch: seen.append(chosen) or 1.0)
    texts = [data_items.Item(str(n)) for n in range(7)]
    throughput.measure({"eol": throughput.Way(tiny, "eol")}, {"queries": [*texts, texts[0]]}, batches=(1,), rounds=1, least=3)
    assert seen[0] == texts[:6:2]


def test_images_are_paid_for_in_every_round(tiny, items, monkeypatch):
    opened, features = [], tiny.vision.image_features
    monkeypatch.setattr(tiny.vision, "image_features", lambda paths: opened.append(len(paths)) or features(paths))
    throughput.measure({"eol": throughput.Way(tiny, "eol")}, {"queries": items}, batches=(8,), rounds=2)
    assert opened == [len({i.image for i in items if i.image})] * 3


def test_the_card_of_a_single_pass_has_code_that_makes_one(tiny, items, tmp_path):
    tiny.save(tmp_path / "model", stage="distil", parent="none", template="eol")
    hub.push(tmp_path / "model", str(tmp_path / "elva"))
    card = (tmp_path / "elva/README.md").read_text()
    code, space = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {}
    assert "generate" not in code and "One forward" in card
    exec(code.replace('from_pretrained("elva")', f"from_pretrained({str(tmp_path / 'elva')!r})"), space)
    with torch.no_grad():
        for item, vector in zip(items, tiny.embed_eol(items), strict=True):
            theirs, _ = space["embed"](item.text, images.open_image(item.image) if item.image else None)
            torch.testing.assert_close(theirs, vector, atol=1e-5, rtol=0)


def test_a_plan_counts_the_passes_and_summaries_of_the_single_pass(smoke):
    load = estimate.make(smoke, gpu="cpu")
    rows = {stage.name: stage.cost for stage in plan.stages(load)}
    assert rows["single pass"].prompts == smoke.distil.steps * smoke.distil.batch and rows["single pass"].rollouts == 0
    assert rows["single pass, its summaries"].rollouts == 2 * smoke.distil.pairs
    without = estimate.make(smoke.model_copy(update={"distil": None}), gpu="cpu")
    assert {stage.name for stage in plan.stages(without)} == rows.keys() - {"single pass", "single pass, its summaries"}


def test_how_many_times_as_fast_is_of_medians_with_the_range_of_the_rounds():
    rows = [("base", "queries", 1, 10.0, 8.0, 20.0), ("new", "queries", 1, 30.0, 20.0, 40.0), ("new", "candidates", 1, 5.0, 5.0, 5.0)]
    table = pd.DataFrame(rows, columns=["way", "side", "batch", "per second", "lowest", "highest"]).assign(n=16, rounds=3)
    (row,) = throughput.times(table, "base").to_dict("records")  # no row for what its base was not timed on
    assert [row[c] for c in ("times", "lowest", "highest")] == [3, 1, 5] and row["way"] == "new"
    said = sentences.faster(throughput.times(table, "base"), "new", "base").data
    assert said.endswith("multiple of base: queries 1 at a time 3.0 [1.0, 5.0] (median and range of 3 rounds, 16 items or more).")


def test_quality_and_speed_become_claims_and_a_figure():
    quality = pd.DataFrame([["single pass", "average", "hit@5", 0.3, 0.2, 0.4, 50]], columns=["model", "unit", "metric", *"vlhn"])
    quality.columns = ["model", "unit", "metric", "value", "ci_low", "ci_high", "n"]
    pair = {"new": "single pass", "old": "stage 3", "metric": "hit@5", "relative": -25.0, "relative low": -50.0, "relative high": 0.0}
    speed = pd.DataFrame({"way": "single pass", "side": "queries", "batch": [1, 64], "per second": [9.0, 90.0], "forwards": [1.0, 1.0]})
    speed = speed.assign(lowest=80.0, highest=95.0, n=128, rounds=5)
    pairs = pd.DataFrame([pair | {"n": 50}])
    rows = pd.concat([results.scores(quality), results.gains(pairs), results.speeds(speed)])
    table = claims.assemble(rows.assign(experiment="single pass"), statistics.reported(), evidence=True).query("ours.notna()")
    assert list(table.columns) == claims.COLUMNS and set(table["verdict"]) == {""} and set(table["source"]) == {"single pass"}
    ours = table.set_index(["claim", "metric"])["ours"]
    assert ours["single pass, average", "hit@5"] == 30 and ours["single pass", "queries per second, 64 at a time"] == 90
    assert ours["single pass", "queries per second, 1 at a time"] == 9 and ours["single pass", "forward passes, queries"] == 1
    assert table.set_index("claim").loc["single pass over stage 3", "ci_low"] == pytest.approx(-50)
    rates = quality.rename(columns={"model": "way"}).assign(value=30.0, ci_low=20.0, ci_high=40.0)
    rates = pd.concat([rates, rates.assign(way="another", value=35.0)])
    trade = rates.merge(speed[speed["batch"] == 64].drop(columns="n"), on="way", how="left")
    assert sentences.trade(trade, "stage 3").data.endswith(
        "at 90 [80, 95] queries a second (n = 50 queries); speed not measured: another (35.0 %)."
    )
    (axis,) = figures.quality_against_speed(trade, "t").axes
    assert [text.get_text() for text in axis.figure.legends[0].texts] == ["another (speed not measured)", "single pass"]
    assert axis.get_xlim()[0] == 0 and "n = 50" in axis.get_title()
    assert next(tuple(line.get_xydata()[0]) for line in axis.lines if len(line.get_xydata()) == 1) == (90, 30)
