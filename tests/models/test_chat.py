"""Models that are read as their own processor says: against transformers alone, and what is refused."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import families
from elva_core.data import frames as clips
from elva_core.data import images
from elva_core.data import items as data_items
from elva_core.data.frames import Clip
from elva_core.export import embedder, sentence_transformers
from elva_core.models import chat, encoder, generation, vllm_sampler

READ = [families.qwen3_vl, families.llava_next, families.gemma3, families.idefics3]


@pytest.fixture(scope="module", params=READ, ids=lambda family: family.__name__)
def folder(request, texts, tmp_path_factory):
    return families.write(request.param, texts, tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture
def loaded(folder, smoke) -> encoder.Encoder:
    return encoder.load(folder, smoke.encoder)


@pytest.fixture
def items(items, tmp_path) -> list[data_items.Item]:
    """The items of other tests, and one with several images of different shapes."""
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 150, 3), dtype=np.uint8))
    wide.save(tmp_path / "wide.png")
    return [*items, data_items.Item("Which one?", tmp_path / "wide.png", ("or", items[0].image or items[1].image))]


@pytest.fixture
def plain(folder, loaded):
    """(item, request, ending) -> (state, logits) of the last token, as transformers alone reads them from the folder."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    encoder.add_ret_token(model, processor.tokenizer, "[RET]")
    return lambda item, request, ending: families.plain(model, processor, *loaded.prompts([item], request), item.images, ending)


def test_a_vector_of_a_mixed_batch_is_that_of_plain_transformers(plain, loaded, items, smoke):
    with torch.no_grad():
        summaries = [[7, 8, 9][: 1 + place % 3] for place in range(len(items))]
        eol, (generative, _) = loaded.embed_eol(items), loaded.embed_summaries(items, summaries)
    for item, summary, first, second in zip(items, summaries, eol, generative, strict=True):
        alone, _ = plain(item, smoke.encoder.eol_request, [])
        torch.testing.assert_close(first, encoder.normalised(alone), atol=1e-5, rtol=0)
        alone, _ = plain(item, smoke.encoder.summary_request, [*summary, loaded.ret_id])
        torch.testing.assert_close(second, encoder.normalised(alone), atol=1e-5, rtol=0)


def test_a_rollout_says_of_its_tokens_what_plain_transformers_says(plain, loaded, items, smoke):
    items = items[-2:]
    out = generation.generate(
        loaded, items, noise=torch.rand(2, 2, smoke.encoder.max_summary_tokens, generator=torch.Generator().manual_seed(1))
    )
    scored, vectors = generation.score(loaded, items, out)
    torch.testing.assert_close(scored.detach(), out.log_p, atol=1e-4, rtol=0)
    torch.testing.assert_close(vectors.detach(), out.embeddings, atol=1e-5, rtol=0)
    for place, item in enumerate(items):
        summary = out.summaries(loaded.end_id)[place][1]
        state, _ = plain(item, smoke.encoder.summary_request, [*summary, loaded.ret_id])
        torch.testing.assert_close(out.embeddings[place, 1], encoder.normalised(state), atol=1e-5, rtol=0)
        for step in range(int(out.actions[place, 1].sum())):
            token = out.tokens[place, 1, step]
            _, logits = plain(item, smoke.encoder.summary_request, out.tokens[place, 1, :step].tolist())
            allowed = logits.index_fill(0, loaded.banned_ids, float("-inf")).log_softmax(-1)
            assert allowed[token] == pytest.approx(float(out.log_p[place, 1, step]), abs=1e-4)


def test_an_adapter_reaches_every_layer_of_the_language_model_and_nothing_else(loaded, items, smoke):
    inside = {id(module) for module in loaded.backbone.get_decoder().modules()}
    linear = {n for n, m in loaded.backbone.named_modules() if isinstance(m, torch.nn.Linear) and id(m) in inside}
    loaded.add_lora(smoke.stage2.lora, seed=0)
    adapted = {n.partition("base_model.model.")[2].partition(".lora_")[0] for n in loaded.trainable() if "lora_" in n}
    assert adapted == linear and len(linear) >= 14
    loaded.model.train()
    vectors, _ = loaded.embed_summaries(items, [[7, 8]] * len(items))
    vectors[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in loaded.trainable().items() if "lora_B" in n)


def test_the_exported_folder_gives_the_vectors_of_the_encoder(loaded, items, tmp_path):
    loaded.save(tmp_path / "model", stage="test", parent="none")
    sentence_transformers.sentence_transformer(tmp_path / "model", tmp_path / "exported")
    asked = [item for item in items if not item.more]
    inputs = [
        {name: value for name, value in (("text", i.text), ("image", i.image and images.open_image(i.image))) if value} for i in asked
    ]
    found = embedder.load(tmp_path / "exported").encode(inputs)
    wanted = generation.generate(encoder.load(tmp_path / "model"), asked).embeddings[:, 0]
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=0)


def test_a_summary_ends_as_the_chat_template_ends_a_turn(loaded):
    """Gemma's template ends it with another token than the tokenizer's eos; where a template ends it with none, eos it is."""
    tokenizer = loaded.processor.tokenizer
    ends = "<end_of_turn>" if loaded.backbone.config.model_type == "gemma3" else tokenizer.eos_token
    assert loaded.end_id == tokenizer.convert_tokens_to_ids(ends)
    assert loaded.end_id not in loaded.banned_ids.tolist()
    loaded.processor.chat_template = loaded.processor.chat_template.replace(ends, "")
    assert chat.end_of_turn(loaded.processor) == tokenizer.eos_token_id


def test_a_text_that_names_a_placeholder_is_read_as_text(loaded, items):
    processor, image = loaded.processor, items[-1].image
    special = set(processor.tokenizer.all_special_ids)
    plain = [i for i in loaded.batch([data_items.Item("the tag", image)], "x").input_ids[0].tolist() if i in special]
    for word in {*processor.tokenizer.all_special_tokens, *processor.all_special_multimodal_tokens}:
        ids = loaded.batch([data_items.Item(f"the {word} tag", image)], "x").input_ids[0].tolist()
        assert [i for i in ids if i in special] == plain, word
    (prompt,) = loaded.prompts([data_items.Item("a {content}", image)], "the {content}")
    assert "a {content}\nthe image and sentence" in prompt


def test_a_model_that_answers_otherwise_than_in_generate_is_refused(folder, smoke, monkeypatch):
    """Positions twice as far apart, M-RoPE's or not; and a head with a cap that nobody told us of."""
    kind = type(AutoModelForImageTextToText.from_pretrained(folder))
    with monkeypatch.context() as patched:
        original = chat.read
        stretched = lambda *given: (out := original(*given)) | {"position_ids": 2 * out["position_ids"]}  # noqa: E731
        patched.setattr(chat, "read", stretched)
        with pytest.raises(ValueError, match="gives other logits in a padded batch than"):
            encoder.load(folder, smoke.encoder)
    forward = kind.forward

    @functools.wraps(forward)
    def capped(self, *args, **given):
        out = forward(self, *args, **given)
        out.logits = out.logits.div(3).tanh() * 3
        return out

    monkeypatch.setattr(kind, "forward", capped)
    with pytest.raises(ValueError, match="gives other logits"):
        encoder.load(folder, smoke.encoder)


def test_a_clip_is_read_as_its_frames(loaded, items, tmp_path):
    shown = [Image.new("RGB", (48, 32), colour) for colour in ("red", "green", "blue", "white")]
    clips.write(tmp_path / "a.mp4", shown, rate=4)
    clip = Clip(tmp_path / "a.mp4", 4)
    for place, frame in enumerate(clips.read(clip).pixels):
        Image.fromarray(frame.transpose(1, 2, 0)).save(tmp_path / f"{place}.png")
    frames = tuple(tmp_path / f"{place}.png" for place in range(4))
    with torch.no_grad():
        once, twice, apart = loaded.embed_eol([data_items.Item("x", None, more) for more in ((clip,), (clip, clip), frames)])
    torch.testing.assert_close(once, apart, atol=1e-5, rtol=0)
    assert not torch.allclose(once, twice, atol=1e-3)


def test_a_model_whose_layers_keep_no_keys_is_refused(texts, tmp_path, smoke):
    families.write(families.qwen3_5, texts, tmp_path)
    with pytest.raises(ValueError, match=r"a qwen3_5, cannot be read by .* keep a state that is no keys and values"):
        encoder.load(tmp_path, smoke.encoder)


def test_a_model_without_template_or_padding_is_refused_before_its_weights_are_read(texts, tmp_path, smoke):
    families.write(families.llava_next, texts, tmp_path)
    (tmp_path / "model.safetensors").write_text("no weights")
    template, padding = tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"
    written = padding.read_text()
    padding.write_text(json.dumps(json.loads(written) | {"pad_token": None}))
    with pytest.raises(ValueError, match="has no token for padding; save one"):
        encoder.load(tmp_path, smoke.encoder)
    padding.write_text(written)
    template.unlink()
    with pytest.raises(ValueError, match="has no chat template; save one"):
        encoder.load(tmp_path, smoke.encoder)


def test_a_model_that_cannot_be_read_is_named_with_what_it_stumbled_over(texts, tmp_path, smoke):
    families.write(families.llava_next, texts, tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ 'User: ' + messages[0]['content'] }}")
    with pytest.raises(ValueError, match=r"cannot be filled \(TypeError: can only concatenate.*each a list of parts"):
        encoder.load(tmp_path, smoke.encoder)
    template.write_text("User: {{ messages[0]['content'][-1]['text'] }}")  # which drops the image
    with pytest.raises(ValueError, match=r"llava_next, cannot be read by its own processor and forward: \w+: .*<image>"):
        encoder.load(tmp_path, smoke.encoder)


def test_a_model_without_a_spare_row_loads_after_what_the_message_says(texts, tmp_path, smoke):
    def full(texts):
        config, processor = families.llava_next(texts)
        config.text_config.vocab_size = len(processor.tokenizer)
        return config, processor

    families.write(full, texts, tmp_path)
    with pytest.raises(ValueError, match="no spare row") as refused:
        encoder.load(tmp_path, smoke.encoder)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    exec(re.search(r"\((model\.resize.*\))\) and save it", str(refused.value))[1], {"model": model})
    model.save_pretrained(tmp_path)
    loaded = encoder.load(tmp_path, smoke.encoder)
    assert loaded.vocabulary_rows % 64 == 0 and set(range(loaded.ret_id, loaded.vocabulary_rows)) <= set(loaded.banned_ids.tolist())


def test_a_placeholder_that_the_model_likes_best_is_no_reason_to_refuse_it(loaded, items, tmp_path):
    """Nothing holds down what is never sampled."""
    liked = loaded.states(loaded.batch(items[:1], "What is this?"))[0, -1].detach()
    row = loaded.processor.tokenizer.convert_tokens_to_ids(loaded.processor.all_special_multimodal_tokens[0])
    with torch.no_grad():
        loaded.backbone.get_output_embeddings().weight[row] = 50 * liked
    loaded.save(tmp_path, stage="test", parent="none")
    assert encoder.load(tmp_path).end_id == loaded.end_id


def test_vllm_is_refused(loaded, smoke, tmp_path):
    with pytest.raises(ValueError, match=r"stage3\.sampler is vllm, which is given prompts of qwen2_vl, qwen2_5_vl, not of"):
        vllm_sampler.VllmSampler(loaded, smoke.stage3.lora, smoke.stage3.vllm, tmp_path)


def test_rounding_of_bfloat16_passes_the_check_and_positions_twice_as_far_apart_do_not(texts, tmp_path, smoke, monkeypatch):
    families.write(families.gemma3, texts, tmp_path, dtype=torch.bfloat16)
    assert encoder.load(tmp_path, smoke.encoder, dtype="bfloat16").backbone.dtype == torch.bfloat16
    original = chat.read
    monkeypatch.setattr(chat, "read", lambda *given: (out := original(*given)) | {"position_ids": 2 * out["position_ids"]})
    with pytest.raises(ValueError, match="gives other logits in a padded batch than"):
        encoder.load(tmp_path, smoke.encoder, dtype="bfloat16")
