"""A reranking: prompts and scores of the reranker, its training, and what fusion does to a ranking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import mined
from elva_core.data import images as image_files
from elva_core.data import items as data_items
from elva_core.evaluation import benchmark, reranking
from elva_core.experiments import figures, jobs, results
from elva_core.models import encoder
from elva_core.models.lineage import lineage
from elva_core.retrieval import retriever
from elva_core.training import reranker
from elva_core.training.reranker import Asked


@pytest.fixture
def asked(items) -> list[Asked]:
    """Two queries, of an image and of a text, with seven candidates of all modalities."""
    others = (*items, data_items.Item("A last one."))
    return [Asked(f"9:{n}", query, tuple(f"9:{i}" for i in range(7)), others) for n, query in enumerate((items[0], items[1]))]


@pytest.fixture
def settings(smoke):
    return smoke.rerank


@pytest.fixture(scope="module")
def model(model_folder, smoke) -> encoder.Encoder:
    """Read by the tests, changed by none."""
    return encoder.load(model_folder, smoke.encoder)


@pytest.fixture(scope="module")
def ranked(model, root, smoke):
    return mined(model, root, smoke, 8)


@pytest.fixture(scope="module")
def searcher(model, root, smoke):
    return retriever.Searcher(model, root, "test", smoke.evaluation, template="eol")


@pytest.fixture(scope="module")
def seen(model, searcher, smoke) -> reranking.Reranked:
    return reranking.rerank_unit(model, searcher, searcher.evaluate("emoji_task0"), smoke.rerank)


def permuted(one: Asked, order) -> Asked:
    return one._replace(dids=tuple(one.dids[i] for i in order), candidates=tuple(one.candidates[i] for i in order))


@pytest.mark.parametrize("kind", reranker.KINDS)
def test_logits_equal_a_plain_forward_of_transformers(model, asked, settings, kind):
    one = asked[0]
    words = reranker.YES_NO if kind == "pointwise" else [str(n + 1) for n in range(settings.window)]
    shown = [reranker.prompt(one.query, one.candidates[:n], kind) for n in ((1,) if kind == "pointwise" else (2, 4))]
    request = settings.pointwise_request if kind == "pointwise" else settings.listwise_request
    text = model.prompts([p.item for p in shown], request)
    images = [image_files.open_image(path) for p in shown for path in p.item.images]
    inputs = model.processor(text=text, images=images or None, padding=True, padding_side="left", return_tensors="pt")
    first = [model.processor.tokenizer(word).input_ids[0] for word in words]
    with torch.no_grad():
        theirs = model.backbone(**inputs).logits[:, -1, first]
        ours = reranker.log_p(model, shown, kind, settings, reranker.answer_ids(model, kind, settings))
    for own, row, p in zip(ours, theirs, shown, strict=True):
        torch.testing.assert_close(own[: p.offered], row[: p.offered].log_softmax(-1), atol=1e-5, rtol=0)
        assert (own[p.offered :] == float("-inf")).all()


def test_prompts_show_everything_once_and_in_order(items, settings):
    image, text, both = (next(i for i in items if i.content == word) for word in ("image", "sentence", "image and sentence"))
    shown = reranker.prompt(both, [image, text], "listwise").item
    words = [part for part in shown.parts if part]
    wanted = ["Query: ", *both.parts, "\n(1) ", *image.parts, "\n(2) ", *text.parts]
    assert words == [part for part in wanted if part]


def test_answers_that_begin_alike_are_refused(model, settings):
    with pytest.raises(ValueError, match=r"'1' and '10' both begin.*rerank.window to 9"):
        reranker.answer_ids(model, "listwise", settings.model_copy(update={"window": 12}))
    assert len(reranker.answer_ids(model, "pointwise", settings)) == 2


@pytest.mark.parametrize(
    ("kind", "window", "order"),
    [("pointwise", 4, (6, 2, 0, 5, 1, 4, 3)), ("listwise", 7, (6, 2, 0, 5, 1, 4, 3)), ("listwise", 4, (0, 6, 2, 5, 1, 4, 3))],
)
def test_scores_do_not_depend_on_the_order_of_the_candidates(model, asked, settings, kind, window, order):
    """Where windows are needed, behind the first."""
    settings = settings.model_copy(update={"window": window})
    straight, mixed = (reranker.score(model, [a], kind, settings, batch=4)[0] for a in (asked[0], permuted(asked[0], order)))
    np.testing.assert_allclose(np.diff(mixed), np.diff(straight[list(order)]), atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_windows_show_every_candidate_once_and_the_first_in_all(asked, size):
    shown = reranker.windows(asked[0], size)
    assert all(len(w) <= size and 0 in w for w in shown)
    assert sorted(i for w in shown for i in w if i) == list(range(1, 7))


def test_windows_do_not_say_where_the_best_stands(asked):
    places = [reranker.windows(asked[0]._replace(qid=f"9:{n}"), 7)[0].index(0) for n in range(700)]
    assert np.bincount(places, minlength=7).min() > 60  # 100 expected


def test_windows_agree_where_probabilities_are_in_proportion(model, asked, settings, monkeypatch):
    """Under Luce's axiom the worth of each candidate comes back, whatever it was shown beside."""
    worth = dict(zip(asked[0].candidates, np.random.default_rng(0).normal(size=7), strict=True))

    def by_worth(_, prompts, kind, settings, ids):
        out = torch.full((len(prompts), len(ids)), float("-inf"))
        for row, p in zip(out, prompts, strict=True):
            row[: len(p.candidates)] = torch.tensor([worth[c] for c in p.candidates]).log_softmax(0)
        return out

    class Shown(reranker.Prompt):
        pass

    def remembered(query, candidates, kind, answer=0):
        shown = Shown(data_items.Item(str(len(candidates))), len(candidates), answer)
        shown.candidates = tuple(candidates)
        return shown

    monkeypatch.setattr(reranker, "log_p", by_worth)
    monkeypatch.setattr(reranker, "prompt", remembered)
    (scores,) = reranker.score(model, asked[:1], "listwise", settings, batch=2)
    values = np.array([worth[c] for c in asked[0].candidates])
    np.testing.assert_allclose(scores, values - values[0], atol=1e-6)


@pytest.mark.parametrize("kind", reranker.KINDS)
def test_an_exercise_has_its_positive_where_it_says(ranked, settings, kind):
    places = set()
    for n in range(60):
        r = ranked[n % 8]
        shown = reranker.exercise(r, kind, settings, np.random.default_rng(n))
        right = reranker.prompt(r.item, [r.positive], "pointwise").item
        if kind == "pointwise":
            assert [(p.item == right) == (p.answer == 0) for p in shown] == [True] * (1 + settings.negatives)
            continue
        (p,) = shown
        places.add((p.offered, p.answer))
        hard = set(r.negatives[: settings.hard])
        label, after = f"\n({p.answer + 1}) ", f"\n({p.answer + 2}) "
        parts = [*p.item.more, *([p.item.text] if p.item.text else [])]
        own = parts[parts.index(label) + 1 : parts.index(after) if after in parts else None]
        assert own == [part for part in r.positive.parts if part]
        assert sum(part in {q for h in hard for q in h.parts if q} for part in parts) >= p.offered - 1
    assert kind == "pointwise" or places == {(n, i) for n in (2, 3, 4) for i in range(n)}


def test_training_lowers_the_loss_and_resumes_to_the_same_weights(model_folder, ranked, smoke, tmp_path, interrupted):
    changes = {"steps": 40, "batch": 2, "chunk": 16, "optimiser": {"lr": 0.003, "checkpoint_every": 16}, "window": 2, "hard": 1}
    settings = smoke.changed({"rerank": changes}).rerank
    ends = []
    for name, stop in (("straight", None), ("broken", 20)):
        if stop:
            with interrupted(reranker, "log_p", stop):
                reranker.train(encoder.load(model_folder, smoke.encoder), ranked[:2], settings, seed=1, folder=tmp_path / name)
        model = encoder.load(model_folder, smoke.encoder)
        rows = reranker.train(model, ranked[:2], settings, seed=1, folder=tmp_path / name)
        ends.append(torch.cat([p.flatten() for p in model.backbone.parameters()]))
    assert torch.equal(*ends)
    losses = [r["loss"] for r in rows if not r["listwise"]]
    assert 0 < np.mean(losses[-3:]) < 0.6 * losses[0]


def test_a_job_trains_a_reranker_from_its_own_negatives(root, smoke, model_folder, tmp_path):
    small = smoke.changed({"threads": None, "stage3": {"queries": 4}, "rerank": {"steps": 2, "batch": 2}})
    job = jobs.Job("rerank", small, 1, root, tmp_path, str(model_folder), tmp_path / "rerank", tmp_path / "mined.safetensors")
    jobs.run(job)
    assert job.mined.is_file() and [r["listwise"] for r in jobs.history(job)] == [0, 1]
    assert lineage(job.model)[-1]["stage"] == "rerank"


@pytest.mark.parametrize("kind", reranker.KINDS)
def test_weight_one_is_the_retriever_and_zero_the_reranker(seen, kind):
    cosines, scores = seen.result.scores[:, : seen.depth], seen.scores[kind]
    assert reranking.after(seen, kind, 1.0, 0.05) == seen.result.ranks
    alone = reranking.fuse(cosines, scores, 0.0, 0.05)
    assert (np.argsort(-alone, kind="stable") == np.argsort(-scores, kind="stable")).all()


def test_what_is_below_the_depth_keeps_its_place(seen):
    rng = np.random.default_rng(0)
    ranks = [sorted(rng.choice(np.arange(1, 40), size=3, replace=False).tolist()) for _ in range(50)]
    after = reranking.reorder(ranks, rng.normal(size=(50, 10)))
    for old, new in zip(ranks, after, strict=True):
        assert [r for r in old if r > 10] == [r for r in new if r > 10]
        assert len({*new}) == 3 and sum(r <= 10 for r in new) == sum(r <= 10 for r in old)


def test_equal_scores_leave_the_order():
    assert reranking.reorder([[2, 7], [10]], np.zeros((2, 10))) == [[2, 7], [10]]


def test_an_oracle_puts_every_positive_first_that_was_found(seen):
    """Hit@1 after is hit@depth before, which is the ceiling that the table names."""
    oracle = np.zeros((len(seen.asked), seen.depth))
    for row, ranks in zip(oracle, seen.result.ranks, strict=True):
        row[[r - 1 for r in ranks if r <= seen.depth]] = 100.0
    best = replace(seen, scores={"pointwise": oracle})
    table = reranking.hits([best], {"pointwise": 0.5}, 0.05, first="before", cutoffs=[1, seen.depth])
    means = table.groupby("model")[["hit@1", f"hit@{seen.depth}"]].mean()
    assert means.loc["before", "hit@1"] < means.loc["before", f"hit@{seen.depth}"]
    for model in ("pointwise", "pointwise, fused", f"best order of the first {seen.depth}"):
        assert means.loc[model, "hit@1"] == means.loc["before", f"hit@{seen.depth}"]


def test_the_weight_is_the_best_of_validation_and_ties_trust_the_retriever():
    """One query, two candidates, the second right: only weights below 0.3 put it first, and the largest of them is taken."""
    result = retriever.UnitResult("u", "local", [None], [[2]], [[2]], [1], np.array([[0, 1]]), np.array([[0.7, 0.0]]), [None] * 2)
    one = Asked("1", data_items.Item("q"), ("a", "b"), (data_items.Item("a"), data_items.Item("b")))
    seen = reranking.Reranked(result, [one], {"pointwise": np.array([[0.0, 0.3]]), "listwise": np.array([[0.0, -1.0]])})
    table = reranking.weigh([seen], temperature=1.0)
    own = table[table["kind"] == "pointwise"].set_index("weight")["mrr"]
    assert (own[own.index < 0.3] == 1.0).all() and (own[own.index > 0.3] == 0.5).all()
    assert reranking.choose(table)["pointwise"] == max(w for w in own.index if own[w] == 1.0) < 0.31
    assert reranking.choose(table)["listwise"] == 1.0  # it never helps
    said = reranking.chosen(table, reranking.choose(table), 1)
    assert said.startswith("pointwise 0.30 (MRR 1.000), listwise 1.00 (MRR 0.500); the retriever alone has MRR 0.500 (n = 1 validation")


def test_a_depth_beyond_the_lists_is_refused(searcher, smoke):
    with pytest.raises(ValueError, match=r"rerank\.depth = 11, but ranked lists have 10"):
        reranking.first_answers(searcher, searcher.evaluate("emoji_task0"), 11)


def test_table_figure_and_claims_of_a_second_look(model, searcher, seen, settings, smoke):
    weights = reranking.choose(reranking.weigh([seen], 0.05))
    hits = reranking.hits([seen], weights, 0.05, first="stage 3", cutoffs=[1, 5])
    pool = [(seen, searcher.embedded("emoji_task0"))]
    taken = reranking.seconds(model, searcher, pool, settings, weights, 0.05, first="stage 3")
    assert taken["n"].tolist() == [settings.timed] * 5 and (taken["seconds"].iloc[1:] > taken["seconds"].iloc[0]).all()
    alone = reranking.table(benchmark.mrbench_table(hits, [1, 5], 50, 0), taken[~taken["model"].str.contains("fused")])
    assert alone.set_index("model")["seconds"].isna().to_dict() == {
        m: "fused" in m or "best" in m for m in alone["model"]
    }  # none is copied
    table = reranking.table(benchmark.mrbench_table(hits, [1, 5], 50, 0), taken)
    assert table["seconds"].isna().tolist() == ["best" in m for m in table["model"]]
    assert reranking.table(benchmark.mrbench_table(hits, [1, 5], 50, 0), taken)["hit@1"].between(0, 100).all()
    assert len(figures.reranking(table, "stage 3", "MRBench").axes) == 2
    pairs = reranking.compared(hits, "stage 3", [1, 5], 50, 0)
    times = results.scores(taken, scale=1000.0, value=taken["seconds"], metric="milliseconds per query")
    assert len(results.points(pairs)) == 2 * 4 and times["value"].tolist() == pytest.approx((1000 * taken["seconds"]).tolist())
    known = pairs.assign(value=0.25, ci_low=0.125, ci_high=0.5)  # a tiny model's own differences may all be 0
    points = results.points(known).iloc[0]
    assert points[["model", "baseline", "metric"]].tolist() == ["pointwise", "stage 3", "difference of hit@1, points"]
    assert points[["value", "ci_low", "ci_high"]].tolist() == [25, 12.5, 50]
