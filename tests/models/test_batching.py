"""Batches by tokens: lengths that are planned and those that are read, the budget, the gradient, and the padding that is saved."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from PIL import Image

import families
from elva_core.data import items as data_items
from elva_core.models import batching, encoder
from elva_core.retrieval import retriever
from elva_core.training import contrastive


@pytest.fixture
def items(items, tmp_path) -> list[data_items.Item]:
    """The items of other tests, one of them with a second image of another shape, lying on its side."""
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.new("RGB", (150, 40), "red").save(tmp_path / "wide.jpg", exif=exif)
    return [*items, data_items.Item("Which one?", tmp_path / "wide.jpg", ("or", items[0].image or items[1].image))]


def test_planned_lengths_are_those_that_are_read(tiny, items):
    for request in (tiny.settings.eol_request, "Summarize {content} above:"):
        assert batching.lengths(tiny, items, request) == tiny.batch(items, request).mask.sum(1).tolist()


@pytest.mark.parametrize("family", [families.qwen3_vl, families.llava_next, families.gemma3, families.idefics3])
def test_planned_lengths_are_near_those_of_a_family_with_its_own_processor(family, texts, items, smoke, tmp_path):
    model = encoder.load(families.write(family, texts, tmp_path), smoke.encoder)
    read = model.batch(items, "x").mask.sum(1).tolist()
    for item, planned, real in zip(items, batching.lengths(model, items, "x"), read, strict=True):
        assert abs(planned - real) <= 20 * len(item.images), (planned, real)


@hypothesis.given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_batches_hold_every_row_once_within_the_budget_and_none_could_take_the_next_row(tokens, budget):
    batches = batching.by_tokens(tokens, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(tokens)))
    costs = [max(tokens[i] for i in batch) * len(batch) for batch in batches]
    assert all(cost <= budget or len(batch) == 1 for cost, batch in zip(costs, batches, strict=True))
    for batch, after in itertools.pairwise(batches):
        assert tokens[batch[-1]] >= tokens[after[0]] and tokens[batch[0]] * (len(batch) + 1) > budget


@hypothesis.given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120), st.integers(1, 5))
def test_even_batches_take_no_more_turns_and_no_smaller_budget_would_do(tokens, budget, processes):
    turns = -(-len(batching.by_tokens(tokens, budget)) // processes)
    batches = batching.evenly(tokens, budget, processes)
    assert sorted(i for batch in batches for i in batch) == list(range(len(tokens))) and len(batches) <= turns * processes
    costs = [max(tokens[i] for i in batch) * len(batch) for batch in batches]
    assert all(cost <= budget or len(batch) == 1 for cost, batch in zip(costs, batches, strict=True))
    if (most := max((cost for cost, batch in zip(costs, batches, strict=True) if len(batch) > 1), default=1)) > 1:
        assert len(batching.by_tokens(tokens, most - 1)) > turns * processes


@pytest.mark.parametrize("ret_share", [0.0, 1.0])
def test_a_step_by_tokens_has_the_gradient_of_one_by_rows_and_less_padding(
    tiny, model_folder, root, smoke, tmp_path, monkeypatch, ret_share
):
    changes = {"steps": 1, "batch": 16, "chunk": 5, "ret_share": ret_share, "one_task_per_batch": False, "mask_false_negatives": True}
    rows = smoke.stage2.model_copy(update=changes | {"lora": smoke.stage2.lora.model_copy(update={"dropout": 0.0})})
    gradients, padding, losses = [], [], []

    def noted(parameters, step_fn, *rest):
        row = step_fn(0)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters.values()]))
        padding.append(row["padding"])
        losses.append(row["loss"])
        return [row]

    monkeypatch.setattr(contrastive.loop, "train_loop", noted)
    budget = 5 * (34 if ret_share else 20)
    for changes in ({}, {"chunk_tokens": budget}, {"gradient_cache": True, "chunk_tokens": budget}):
        model = encoder.load(model_folder, smoke.encoder)
        settings = rows.model_copy(update={"gradient_cache": False} | changes)
        contrastive.train(model, contrastive.union_pairs(root, rows, 1), settings, seed=1, folder=tmp_path)
    assert gradients[0].abs().max() > 1e-3
    for gradient, loss in zip(gradients[1:], losses[1:], strict=True):
        torch.testing.assert_close(gradient, gradients[0], atol=1e-5, rtol=0)
        assert loss == pytest.approx(losses[0], abs=1e-5)
    assert padding[1] == pytest.approx(padding[2]) and padding[1] < padding[0]


@pytest.mark.parametrize("template", ["eol", "summary"])
def test_embeddings_do_not_depend_on_the_budget(tiny, items, template):
    plain, words = retriever.encode(tiny, items, batch=3, template=template)
    for budget in (1, 60, 10_000):
        tiny.settings = tiny.settings.model_copy(update={"batch_tokens": budget})
        vectors, texts = retriever.encode(tiny, items, batch=3, template=template)
        assert texts == words and abs(vectors - plain).max() < 1e-5


def test_a_batch_that_is_embedded_keeps_the_budget(tiny, root, monkeypatch):
    pool = [data_items.candidate_item(root, c) for c in root.pool("", "test", "global")]
    tiny.settings, sizes, original = tiny.settings.model_copy(update={"batch_tokens": 300}), [], tiny.batch
    monkeypatch.setattr(tiny, "batch", lambda *given: (made := original(*given), sizes.append(made.mask.shape))[0])
    retriever.encode(tiny, pool, batch=1, template="eol")
    assert all(rows * length <= 300 for rows, length in sizes) and sum(rows for rows, _ in sizes) == len(set(pool))
    assert min((rows + 1) * length for rows, length in sizes[:-1]) > 300  # and fills it
