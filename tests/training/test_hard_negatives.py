"""Which queries stage 3 takes, against which negatives, from either side; and the control's share of them."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import mined
from elva_core import files
from elva_core.data import mbeir
from elva_core.training import contrastive, hard_negatives
from elva_core.training_settings import NegativeSettings

FEW = NegativeSettings(hard=2, random=1, threshold=2.0)


@pytest.fixture
def ranked(tiny, root, smoke):
    """Three queries of every task."""
    return mined(tiny, root, smoke, 24)


def test_negatives_are_hard_first_below_the_threshold_and_never_positive():
    scores = np.array([0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.1])
    settings = NegativeSettings(hard=2, random=2, threshold=0.95)
    for seed in range(20):
        rows = hard_negatives.choose(scores, {1}, 0.9, settings, np.random.default_rng(seed))
        assert rows[:2] == [2, 3] and not {1} & set(rows) and len(set(rows)) == 4
    narrow = NegativeSettings(hard=2, random=0, threshold=0.95, margin=0.05)
    assert hard_negatives.choose(scores, set(), 0.6, narrow, np.random.default_rng(0)) == [4, 5]


def test_every_query_has_as_many_negatives_even_when_all_are_above_the_threshold():
    scores = np.array([0.99, 0.98, 0.97, 0.96, 0.5])
    settings = NegativeSettings(hard=2, random=2, threshold=0.9)
    rows = hard_negatives.choose(scores, set(), 0.9, settings, np.random.default_rng(0))
    assert rows[0] == 4 and len(set(rows)) == 4
    with pytest.raises(files.ElvaDataError, match="3 candidates for 4 negatives"):
        hard_negatives.choose(scores[:3], set(), 0.9, settings, np.random.default_rng(0))


def test_mined_negatives_have_the_positives_modality_and_are_not_judged_positive(ranked):
    for r in ranked:
        assert r.positive not in r.negatives
        assert {(bool(n.image), bool(n.text)) for n in r.negatives} == {(bool(r.positive.image), bool(r.positive.text))}


def test_a_query_is_as_hard_as_its_positive_stands_low_among_what_may_be_a_negative():
    scores, settings = np.array([0.99, 0.9, 0.8, 0.7, 0.8]), NegativeSettings(hard=1, random=1, threshold=0.95)
    for positive, wanted in ((0.95, (1, -0.05)), (0.8, (4, 0.1)), (0.75, (4, 0.15)), (0.1, (5, 0.8))):
        assert hard_negatives.hardness(scores, set(), positive, settings) == (wanted[0], pytest.approx(wanted[1]))
    assert hard_negatives.hardness(scores, {1, 4}, 0.75, settings) == (2, pytest.approx(0.05))
    near = settings.model_copy(update={"margin": 0.1})
    assert hard_negatives.hardness(scores, set(), 0.75, near) == (3, pytest.approx(0.05))


def test_the_harder_half_and_the_easier_are_all_queries_of_each_task(tiny, root, smoke):
    def asked(queries, difficulty=None):
        negatives = smoke.stage3.negatives.model_copy(update={"difficulty": difficulty, "pool": None})
        return mined(tiny, root, smoke.model_copy(update={"stage3": smoke.stage3.model_copy(update={"negatives": negatives})}), queries)

    every, easy, hard = asked(64), asked(32, (0, 0.5)), asked(32, (0.5, 1))

    def by_task(rows):
        return {task: {r.query.qid: r.positive_cosine - r.cosines[0] for r in rows if r.query.task == task} for task in range(9)}

    for task, of_all in by_task(every).items():
        below, above = by_task(easy)[task], by_task(hard)[task]
        assert not set(below) & set(above) and set(below) | set(above) == set(of_all)
        assert abs(len(below) - len(above)) <= 1
        if min(above.values(), default=-1) > 0:  # where even a hard one is solved, all easy ones are
            assert min(below.values()) > 0
    ahead = [np.mean([r.positive_cosine - r.cosines[0] for r in rows]) for rows in (easy, hard)]
    assert ahead[0] > ahead[1] + 1e-3


def test_exchanged_pairs_are_chosen_by_the_same_rules(ranked):
    turned = hard_negatives.exchanged(ranked, FEW, seed=3)
    item_of = {r.item: r for r in ranked}
    for before, after in zip(ranked, turned, strict=True):
        assert (after.item, after.positive) == (before.positive, before.item)
        for other in after.negatives:
            query = item_of[other].query
            assert mbeir.MODALITIES_OF[query.task][1] == mbeir.MODALITIES_OF[before.query.task][1]
            assert before.positive_did not in query.positives
        np.testing.assert_allclose(after.vectors, np.stack([item_of[i].asking for i in (after.positive, *after.negatives)]))
        np.testing.assert_allclose(after.vectors @ before.near, [before.positive_cosine, *after.cosines], atol=1e-6)
        assert after.cosines[0] >= after.cosines[1]  # the hard ones first
    assert [r.rows for r in turned] == [r.rows for r in hard_negatives.exchanged(ranked, FEW, seed=3)]


def test_too_few_queries_to_exchange_say_what_to_raise(ranked):
    with pytest.raises(files.ElvaDataError, match=r"both, stage3\.queries"):
        hard_negatives.exchanged(ranked[:2], FEW, seed=3)


def test_the_control_takes_the_hardest_and_the_random_negatives_it_asks_for(ranked, smoke):
    """With the grains of each: the positive has all of the query's, as exact judgements say."""

    def pairs(**changes):
        return contrastive.ranked_pairs(ranked, 1, smoke.control.model_copy(update=changes))(0, 24)

    by_query = {r.item: r for r in ranked}
    for pair, some in zip(pairs(hard=None, random=None), pairs(hard=2, random=1), strict=True):
        r = by_query[pair.query]
        assert pair.negatives == r.negatives and pair.grains == r.grains
        assert some.negatives == (*r.negatives[:2], r.negatives[-1]) and some.grains[2:] == (*r.grains[2:4], r.grains[-1])
        assert pair.grains[0] == pair.grains[1] != frozenset()
