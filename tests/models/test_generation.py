"""Sampling with a shared prompt against teacher forcing and against transformers' generate."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from elva_core.models import decoding, encoder, generation


@pytest.fixture
def sampled(tiny, items, noise):
    return generation.generate(tiny, items, noise=noise)


def test_log_probabilities_and_embeddings_equal_a_teacher_forced_forward(tiny, items, sampled):
    log_p, vectors = generation.score(tiny, items, sampled)
    assert (log_p - sampled.log_p).abs().max() < 1e-4
    torch.testing.assert_close(vectors, sampled.embeddings, atol=1e-5, rtol=0)


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


def test_the_blocks_give_the_token_of_the_whole_distribution():
    """Against inversion by one float64 sum over a large vocabulary, at the edges of [0, 1) too; none of probability 0 is drawn."""
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(40, 9_001, generator=generator)
    logits[:, torch.rand(9_001, generator=generator) < 0.3] = float("-inf")
    logits[0, :256] = float("-inf")
    chance = logits.softmax(-1)
    noise = torch.rand(40, generator=generator)
    noise[:2], noise[2:4] = 0.0, 1 - 2**-24
    reached = chance.double().cumsum(-1)
    wanted = torch.searchsorted(reached, noise.double()[:, None] * reached[:, -1:], right=True)[:, 0]
    token = decoding.sample(chance, noise)
    assert torch.equal(token, wanted) and (chance.gather(1, token[:, None]) > 0).all()


@torch.no_grad()
def test_rollouts_equal_those_of_a_plain_loop_on_a_growing_cache(tiny, items, noise, sampled):
    """One row at a time, its cache transformers' own, its sampling one sum over the vocabulary."""
    assert any(len({tuple(s) for s in group}) > 1 for group in sampled.summaries(tiny.end_id))
    for place, item in enumerate(items):
        for group in range(noise.shape[1]):
            batch, cache = tiny.batch([item], tiny.settings.summary_request), DynamicCache()
            read = tiny.backbone.model(**batch.inputs, past_key_values=cache, use_cache=True)
            state, position = read.last_hidden_state[:, -1], batch.positions[..., -1:]
            words, token = [], None
            while len(words) < noise.shape[2] and token != tiny.end_id:
                reached = tiny.logits(state)[0].softmax(-1).double().cumsum(-1)
                token = int(torch.searchsorted(reached, noise[place, group, len(words)].double() * reached[-1], right=True))
                words += [token]
                if token == tiny.end_id:
                    break
                position = position + 1
                state = tiny.backbone.model(
                    input_ids=torch.tensor([[token]]), position_ids=position, past_key_values=cache, use_cache=True
                ).last_hidden_state[:, -1]
            last = tiny.backbone.model(
                input_ids=torch.tensor([[tiny.ret_id]]), position_ids=position + 1, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            actions = sampled.actions[place, group].tolist()  # none behind the end of turn
            assert sampled.tokens[place, group][: len(words)].tolist() == words and actions == [i < len(words) for i in range(len(actions))]
            torch.testing.assert_close(encoder.normalised(last)[0], sampled.embeddings[place, group], atol=1e-5, rtol=0)


def test_rollouts_do_not_depend_on_how_many_are_written_together(tiny, items, noise):
    parts, noises = [items[:1], items[1:]], [noise[:1], noise[1:]]
    alone = [generation.generate(tiny, part, noise=own) for part, own in zip(parts, noises, strict=True)]
    for rows in (None, 1, 2 * noise.shape[1]):
        together = generation.in_process(tiny, parts, noises, 1.0, rows)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.actions, other.actions)
            for name in ("log_p", "entropy", "embeddings"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=0)


def test_rows_that_are_done_are_dropped_and_their_rollouts_stay(tiny, items, noise, monkeypatch):
    """The end of turn is about as probable as all else together: half of the rows are done at every token."""
    noise = torch.rand(len(items), 12, noise.shape[2], generator=torch.Generator().manual_seed(3))
    logits, rows = tiny.logits, []

    def ending(states):
        out = logits(states)
        rows.append(len(out))
        out[:, tiny.end_id] = out.index_fill(1, torch.tensor([tiny.end_id]), -torch.inf).logsumexp(1)
        return out

    monkeypatch.setattr(tiny, "logits", ending)
    dropped, fewer = generation.generate(tiny, items, noise=noise), rows.copy()
    monkeypatch.setattr(decoding, "ROWS", len(items) * noise.shape[1])  # nothing is dropped
    rows.clear()
    whole = generation.generate(tiny, items, noise=noise)
    assert min(fewer) < max(fewer) == min(rows) == max(rows)
    monkeypatch.setattr(decoding, "CHECK", {"cpu": 4})  # the host looks later
    late = generation.generate(tiny, items, noise=noise)
    for other in (dropped, late):
        assert torch.equal(whole.tokens, other.tokens) and torch.equal(whole.actions, other.actions)
        torch.testing.assert_close(whole.embeddings, other.embeddings, atol=1e-5, rtol=0)
        torch.testing.assert_close(whole.log_p, other.log_p, atol=1e-5, rtol=0)
