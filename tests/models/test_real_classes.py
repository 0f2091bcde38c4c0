"""Qwen2-VL and Qwen2.5-VL of the real classes, with the real vocabulary of 151,936 rows and few parameters, through every stage.

So do two families that are read by their own processors. The profile is qwen2vl-2b with another path and smaller numbers; nothing
is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tokenizers import AddedToken
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

import families
from elva_core import config
from elva_core.data import emoji, mbeir
from elva_core.data import items as data_items
from elva_core.evaluation import benchmark, grains
from elva_core.experiments import jobs
from elva_core.models import encoder, small_models
from elva_core.mrbench import annotate, build
from elva_core.retrieval import cache, retriever

ROWS, WORDS = 151_936, 151_643  # rows of the embedding matrix, and tokens before the special ones
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
TEXT = families.TEXT | {
    "vocab_size": ROWS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 3, 3]},
}
VISION = {"depth": 2, "num_heads": 2, "patch_size": 14}
CLASSES = {
    "Qwen2VL": {"vision_config": VISION | {"embed_dim": 32, "hidden_size": 32}, "tie_word_embeddings": True},
    "Qwen2_5_VL": {
        "vision_config": VISION | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
        "tie_word_embeddings": False,
    },
}


def write_checkpoint(name: str, texts: list[str], folder: Path) -> None:
    """A pretrained folder as the hub has it: special tokens at the ids of the release, spare rows behind them."""
    small = small_models.train_tokenizer(texts, 1000)
    vocabulary = {token: i for token, i in small.get_vocab().items() if token not in SPECIAL}
    vocabulary |= {f"unused{i}": i for i in range(len(vocabulary), WORDS)}
    merges = [tuple(m) for m in json.loads(small.backend_tokenizer.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t, special=True, normalized=False) for t in SPECIAL]})
    images, videos = Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()
    kind = getattr(transformers, f"{name}Processor")
    processor = kind(image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=small_models.CHAT_TEMPLATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(
            getattr(transformers, f"{name}Config")(text_config=TEXT, **CLASSES[name])
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


OTHERS = {"Qwen3-VL": families.qwen3_vl, "LLaVA-NeXT": families.llava_next}


@pytest.fixture(scope="module", params=[*CLASSES, *OTHERS])
def trained(request, root, texts, emojis, tmp_path_factory):
    """(settings, start, {stage: folder of its model}) after all four trainings."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in OTHERS:
        families.write(OTHERS[request.param], texts, folder / "start", dtype=torch.bfloat16)
    else:
        write_checkpoint(request.param, texts, folder / "start")
    emoji.write_triplets(emoji.sample(emojis, 60), folder / "nli.csv", held_out_share=0.15)
    few = {"steps": 2, "batch": 4, "chunk": 4, "optimiser": {"lr": 0.01, "checkpoint_every": 2}}
    profile = config.load("qwen2vl-2b").changed(
        {
            "device": "cpu",
            "backbone": {"path": str(folder / "start")},
            "encoder": {"max_summary_tokens": 4, "workers": 0},
            "stage1": few | {"lora": {"rank": 4}},
            "stage2": few | {"lora": {"rank": 4}},
            "control": few | {"batch": 2, "lora": {"rank": 4}},
            "stage3": {
                "queries": 4,
                "queries_per_step": 2,
                "num_generations": 2,
                "lora": {"rank": 4},
                "negatives": {"hard": 2, "random": 2, "threshold": 2.0, "pool": 8},
                "optimiser": {"lr": 0.01, "checkpoint_every": 2},
            },
            "mrbench": {"queries": 8, "units": [], "tasks": [0, 3, 4, 7], "annotator": {"kind": "exact", "model": None}},
            "evaluation": {"batch": 32, "cutoffs": [1, 5], "bootstrap": 10},
        }
    )
    start, models = profile.backbone.path, {}
    for stage in ("stage1", "stage2", "stage3", "control"):
        before = models.get("stage1" if stage == "stage2" else "stage2", start)
        job = jobs.Job(stage, profile, 1, root, folder / "nli.csv", str(before), folder / stage, folder / "mined.safetensors")
        jobs.run(job)
        assert all(row["loss"] == row["loss"] for row in jobs.history(job))
        models[stage] = job.model
    return profile, Path(start), models


def matrix(folder: Path) -> torch.Tensor:
    with safe_open(folder / "model.safetensors", "pt") as file:
        (name,) = [key for key in file.keys() if key.endswith("embed_tokens.weight")]  # noqa: SIM118
        return file.get_tensor(name)


def test_ret_takes_a_spare_row_and_no_other_row_moves(trained):
    _, start, models = trained
    before, tokens = matrix(start), len(AutoProcessor.from_pretrained(start).tokenizer)
    if "Qwen2" in json.loads((start / "config.json").read_text())["architectures"][0]:
        assert (len(before), tokens) == (ROWS, WORDS + len(SPECIAL))
    for folder in models.values():
        after = matrix(folder)
        moved = (after != before).any(1).nonzero().flatten().tolist()
        assert len(after) == len(before) and moved == [tokens]
        assert AutoProcessor.from_pretrained(folder).tokenizer.convert_tokens_to_ids("[RET]") == moved[0]


def test_every_stage_changes_the_model(trained):
    _, start, models = trained
    order = [start, models["stage1"], models["stage2"], models["stage3"], models["control"]]
    projections = []
    for folder in order:
        with safe_open(folder / "model.safetensors", "pt") as file:
            ends = "layers.1.self_attn.q_proj.weight"
            (name,) = [key for key in file.keys() if key.endswith(ends) and "vision" not in key]  # noqa: SIM118
            projections.append(file.get_tensor(name).float())
    assert all(not torch.equal(a, b) for i, a in enumerate(projections) for b in projections[:i])


def test_plain_transformers_gives_the_same_vector(trained, root):
    """Its processor, its M-RoPE positions, its forward; no padding, one input at a time."""
    profile, _, models = trained
    ours = encoder.load(models["stage3"])
    model, processor = AutoModelForImageTextToText.from_pretrained(models["stage3"], dtype="float32"), ours.processor
    pool = root.pool("", "test", "global")
    items = [data_items.candidate_item(root, next(c for c in pool if c.modality == m)) for m in mbeir.MODALITIES]
    summary = [100, 200]
    found, _ = ours.embed_summaries(items, [summary] * len(items))
    for item, vector in zip(items, found, strict=True):
        (prompt,) = ours.prompts([item], profile.encoder.summary_request)
        state, _ = families.plain(model, processor, prompt, item.images, [*summary, ours.ret_id])
        plain = torch.nn.functional.normalize(state, dim=-1)
        torch.testing.assert_close(plain, vector.detach(), atol=2e-5, rtol=0)


def test_peft_adds_saves_and_reloads_an_adapter(trained, tmp_path):
    _, _, models = trained
    model = AutoModelForImageTextToText.from_pretrained(models["stage2"], dtype="float32")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=encoder.lora_targets(model), init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
        plain = AutoModelForImageTextToText.from_pretrained(models["stage2"], dtype="float32")
        assert not torch.allclose(plain(input_ids=ids).logits, wanted)
        torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path)(input_ids=ids).logits, wanted)


def test_evaluation_and_mrbench(trained, root, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "EMBEDDINGS", tmp_path / "kept")
    profile, _, models = trained
    bench, *_ = build.build(root, profile.mrbench, annotate=annotate.exact, folder=tmp_path / "bench", seed=1)
    loaded = encoder.load(models["stage3"], dtype=profile.dtype)
    measured = benchmark.measure("stage 3", loaded, root, bench, profile.evaluation, seed=1)
    assert set(measured.results["unit"]) == set(root.units("test")) and len(measured.hits) == 8
    queries = grains.ablatable(bench.queries("emoji_task0", "test"))
    distances = grains.distances(measured.searcher, queries, "emoji_task0")["distance"]
    assert len(distances) and distances.between(-1e-2, 2).all()  # of embeddings that the profile keeps on disk
    vectors, summaries = retriever.encode(loaded, [data_items.Item("A dog.")], batch=1)
    assert abs(float((vectors**2).sum()) - 1) < 1e-5 and "<|" not in summaries[0]
