"""Sampling with a shared prompt against teacher forcing and against transformers' generate."""

from __future__ import annotations

import pytest
import torch

from elva_core.models import decoding, generation


@pytest.fixture
def noise(tiny, items):
    return torch.rand(len(items), 3, tiny.settings.max_summary_tokens, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sampled(tiny, items, noise):
    return generation.generate(tiny, items, noise=noise)


def test_log_probabilities_and_embeddings_equal_a_teacher_forced_forward(tiny, items, sampled):
    log_p, vectors = generation.score(tiny, items, sampled)
    assert (log_p - sampled.log_p).abs().max() < 1e-4
    torch.testing.assert_close(vectors, sampled.embeddings, atol=1e-5, rtol=0)


def test_the_shared_prompt_gives_what_the_whole_row_gives(tiny, items, sampled):
    summaries = sampled.summaries(tiny.end_id)
    for g in range(3):
        with torch.no_grad():
            vectors, _ = tiny.embed_summaries(items, [group[g] for group in summaries])
        torch.testing.assert_close(vectors, sampled.embeddings[:, g], atol=1e-5, rtol=0)


def test_the_gradient_through_the_shared_prompt_equals_that_of_whole_rows(tiny, items, sampled, smoke):
    tiny.add_lora(smoke.stage3.lora, seed=0)
    summaries = sampled.summaries(tiny.end_id)
    direction = torch.randn(sampled.embeddings.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for shared in (True, False):
        tiny.model.zero_grad()
        if shared:
            vectors = generation.score(tiny, items, sampled)[1]
        else:
            vectors = torch.stack([tiny.embed_summaries(items, [s[g] for s in summaries])[0] for g in range(3)], dim=1)
        (vectors * direction).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in tiny.trainable().values()]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[1].abs().max().clamp(min=1)


def test_greedy_summaries_equal_transformers_generate(tiny, items):
    text = [i for i in items if not i.image]
    batch = tiny.batch(text, tiny.settings.summary_request)
    theirs = tiny.backbone.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.mask,
        max_new_tokens=tiny.settings.max_summary_tokens,
        do_sample=False,
        suppress_tokens=tiny.banned_ids.tolist(),
        pad_token_id=tiny.pad_id,
    )[:, batch.input_ids.shape[1] :]
    ours = generation.generate(tiny, text).summaries(tiny.end_id)
    for (mine,), row in zip(ours, theirs.tolist(), strict=True):
        assert mine == [t for t in row if t not in (tiny.end_id, tiny.pad_id)]


def test_nothing_is_an_action_after_the_end_of_turn(tiny, sampled):
    for tokens, actions in zip(sampled.tokens.flatten(0, 1).tolist(), sampled.actions.flatten(0, 1).tolist(), strict=True):
        chosen = [t for t, a in zip(tokens, actions, strict=True) if a]
        assert tiny.end_id not in chosen[:-1]
        assert actions == sorted(actions, reverse=True)


def test_an_early_end_is_read_at_its_own_ret(tiny, items):
    """Rows that end at different steps: force one row to end at once by making the end of turn certain."""
    weight = tiny.backbone.lm_head.weight
    with torch.no_grad():
        weight[tiny.end_id] += 40 * torch.nn.functional.normalize(
            tiny.states(tiny.batch(items[:1], tiny.settings.summary_request))[0, -1], dim=0
        )
    out = generation.generate(tiny, items)
    lengths = out.actions.sum(-1)[:, 0]
    assert lengths.min() == 1 and out.log_p[0, 0, 0] > -1e-3
    with torch.no_grad():
        vectors, _ = tiny.embed_summaries(items, [s for (s,) in out.summaries(tiny.end_id)])
    torch.testing.assert_close(vectors, out.embeddings[:, 0], atol=1e-5, rtol=0)


def test_a_summary_depends_on_its_own_noise_alone_and_differs_between_rollouts(tiny, items, noise, sampled):
    for place in range(len(items)):  # alone in its batch
        own = generation.generate(tiny, items[place : place + 1], noise=noise[place : place + 1])
        assert own.summaries(tiny.end_id) == sampled.summaries(tiny.end_id)[place : place + 1]
    assert any(len({tuple(s) for s in group}) > 1 for group in sampled.summaries(tiny.end_id))


def test_sampling_by_inversion_has_the_distribution_it_is_given():
    """A regular grid of noise hits every token as often as its probability says, and never one of probability 0."""
    chance = torch.tensor([0.1, 0.0, 0.45, 0.25, 0.0, 0.2, 0.0])
    grid = (torch.arange(2000) + 0.5) / 2000
    counts = torch.bincount(decoding.sample(chance.expand(2000, -1), grid), minlength=len(chance))
    assert (counts / 2000 - chance).abs().max() < 1e-3 and (counts[chance == 0] == 0).all()
