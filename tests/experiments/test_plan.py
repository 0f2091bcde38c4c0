"""The plan's arithmetic against what is really built, run and counted."""

from __future__ import annotations

import dataclasses
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import mined
from elva_core import cli, config, distributed
from elva_core.config import ProfileError
from elva_core.data import items as data_items
from elva_core.data import mbeir
from elva_core.experiments import estimate, plan, sizes
from elva_core.experiments.cost import Side
from elva_core.experiments.estimate import Workload
from elva_core.models import encoder, generation
from elva_core.training import contrastive, grpo, hard_negatives, reranker

# what the classes have at the sizes of the hub's config.json; its pages show 2.21 B and 8.29 B
PUBLISHED = {
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
}


def test_parameters_are_those_of_the_published_models():
    architectures = sizes.known().architectures
    assert {name: sizes.of_model(name, architectures).parameters for name in architectures} == PUBLISHED


def test_parameters_of_the_small_backbone_and_its_adapter_are_those_of_the_model(tiny, model_folder, smoke):
    planned = sizes.of_config(tiny.backbone.config)
    assert estimate.make(smoke.changed({"backbone": {"path": str(model_folder)}})).sizes == planned
    assert sum(p.numel() for p in tiny.backbone.parameters()) == planned.parameters
    tiny.add_lora(smoke.stage2.lora, seed=0)
    assert sum(p.numel() for p in tiny.trainable().values()) == planned.adapter(smoke.stage2.lora.rank) + planned.hidden


def counted(work) -> int:
    """FLOPs by torch's counter, which does not know the CPU's fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts(tiny, items, smoke):
    planned, rank = sizes.of_config(tiny.backbone.config), smoke.stage2.lora.rank
    pixels = tiny.vision.pixels([i.image for i in items if i.image])
    features = sum(map(len, tiny.backbone.model.get_image_features(*pixels).pooler_output))
    images = len(pixels[1])
    assert counted(lambda: tiny.backbone.model.get_image_features(*pixels)) == planned.vision(images, features / images)
    tiny.add_lora(smoke.stage2.lora, seed=0)
    batch = tiny.batch(items, "x")
    (rows, length), states = batch.input_ids.shape, []
    assert counted(lambda: states.append(tiny.states(batch))) == planned.forward(rows * length, length, rank)
    assert counted(lambda: states[0][:, -1].sum().backward()) == planned.backward(rows * length, length, rank)
    hidden = states[0].detach()
    assert counted(lambda: tiny.logits(hidden)) == planned.logit * rows * length


WIDTHS = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
CONFIG = transformers.Qwen2VLConfig(
    text_config=WIDTHS | {"num_key_value_heads": 2, "rope_parameters": ROPE, "bos_token_id": None, "eos_token_id": None},
    vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 128, "mlp_ratio": 4, "num_heads": 2},
    tie_word_embeddings=True,
)


def test_flops_of_a_tower_with_windows_are_those_that_torch_counts():
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 128, "num_heads": 2, "fullatt_block_indexes": [1]}
    text = CONFIG.get_text_config().to_dict() | {"model_type": "qwen2_5_vl_text"}
    model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    pixels, grid = torch.zeros(24 * 40, 3 * 2 * 14 * 14), torch.tensor([[1, 24, 40]])
    flops = counted(lambda: model.model.get_image_features(pixels, grid))
    assert flops == sizes.of_config(model.config).vision(1, 24 * 40 / 4)


SMALL = sizes.of_config(CONFIG)


def saved_bytes(smoke, dtype, dropout, work) -> int:
    """What autograd saves of forwards of a small model, without the weights."""
    holder = object.__new__(encoder.Encoder)
    holder.model, holder.ret_id = transformers.Qwen2VLForConditionalGeneration(CONFIG).to(dtype), 3
    holder.add_lora(smoke.stage2.lora.model_copy(update={"dropout": dropout}), seed=0)
    holder.model.train()
    weights, saved = {p.untyped_storage().data_ptr() for p in holder.model.parameters()}, {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = work(holder)  # alive until it is counted
        assert kept is not None
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in weights)


MASK = torch.ones(2, 40, dtype=torch.long)
MASK[0, :5] = 0  # padding, as almost every batch has it: attention then wants keys and values for every head


def words(holder, rows, length) -> torch.Tensor:
    return holder.backbone.get_input_embeddings()(torch.randint(0, CONFIG.text_config.vocab_size, (rows, length)))


def prompt(holder) -> encoder.Batch:
    return encoder.Batch(None, MASK, torch.arange(40).expand(3, 2, 40), {"inputs_embeds": words(holder, 2, 40)})


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_activations_are_what_autograd_saves(smoke, dtype, width, dropout):
    measured = saved_bytes(smoke, dtype, dropout, lambda h: h.states(prompt(h))) / MASK.numel()
    planned = SMALL.activation_bytes(width, smoke.stage2.lora.rank, dropout=dropout > 0)
    if dropout:  # on a CPU the mask has the dtype of the input, on a GPU it is a byte
        planned += (width - 1) * SMALL.layers * (6 * SMALL.hidden + SMALL.intermediate)
    if width < 4:  # what autocast makes of the adapter does not grow with tokens
        planned += 2 * SMALL.adapter(smoke.stage2.lora.rank) / MASK.numel()
    assert measured == pytest.approx(planned, rel=0.04)  # the last norm and a layer's mask are not planned


def test_rollouts_that_share_a_prompt_save_their_own_tokens_and_the_prompt_repeated_for_every_head(smoke):
    rollouts, ending, rank = 5, 10, smoke.stage2.lora.rank

    def scored(h):
        cache = transformers.DynamicCache(config=h.backbone.config.get_text_config())
        mask = torch.cat([MASK.repeat_interleave(rollouts, 0), torch.ones(2 * rollouts, ending, dtype=torch.long)], dim=1)
        first = h.backbone.model(**prompt(h).inputs, past_key_values=cache, use_cache=True).last_hidden_state
        cache.batch_repeat_interleave(rollouts)
        positions = torch.arange(40, 40 + ending).expand(3, 2 * rollouts, ending)
        more = encoder.Batch(None, mask, positions, {"inputs_embeds": words(h, 2 * rollouts, ending)})
        return first, h.backbone.model(**more.inputs, past_key_values=cache, use_cache=True).last_hidden_state

    kept = SMALL.activation_bytes(4, rank, dropout=False)
    planned = (2 * 40 + 2 * rollouts * ending) * kept + 2 * rollouts * 40 * SMALL.kv_bytes(4, repeated=True)
    assert saved_bytes(smoke, torch.float32, 0.0, scored) == pytest.approx(planned, rel=0.04)


@pytest.fixture(scope="module")
def paper() -> config.Settings:
    return config.load("qwen2vl-7b")


def test_the_literal_reading_is_nine_million_summaries(paper):
    load = estimate.make(paper)
    assert load.rlvr("all").rollouts == 11_000 * 8 * 102 == 8_976_000
    assert load.rlvr("query").rollouts == 11_000 * 8 + 11_000 * 101  # of the query; one of each candidate


@pytest.fixture
def pictures(root):
    """Distinct inputs of equal length: drawings alone."""
    return [data_items.candidate_item(root, c) for c in root.pool("emoji_task0", "test")]


@pytest.fixture
def ranked(tiny, root, smoke, pictures) -> list[hard_negatives.TrainingQuery]:
    """Two queries for stage 3 with their positives and negatives, all of them distinct drawings."""
    items = iter(pictures)
    drawn = ((r, next(items), next(items), tuple(islice(items, len(r.negatives)))) for r in mined(tiny, root, smoke, 8)[:2])
    return [dataclasses.replace(r, item=query, positive=positive, negatives=others) for r, query, positive, others in drawn]


@pytest.fixture
def load(tiny, smoke, monkeypatch) -> Workload:
    """The smoke profile on the tiny model, for inputs that are drawings alone, each seen anew."""
    tiny.settings = tiny.settings.model_copy(update={"cache_vision": False})
    tiny.vision.keep = False
    made = estimate.make(smoke)
    data = made.data.model_copy(update={"padding": 1.0})
    changed = smoke.model_copy(update={"encoder": tiny.settings})
    monkeypatch.setattr(Workload, "side", lambda self, which, weight=None: Side(0.0, 1.0))
    return dataclasses.replace(made, data=data, settings=changed, sizes=sizes.of_config(tiny.backbone.config))


def changed(load: Workload, **sections) -> Workload:
    """Of the same profile with other sections."""
    return dataclasses.replace(load, settings=load.settings.model_copy(update=sections))


@pytest.fixture
def rows(monkeypatch) -> dict[str, int]:
    """Counts what passes through the encoder while a test runs."""
    seen = {"prompts": 0, "rollouts": 0}
    batch, written = encoder.Encoder.batch, generation._written

    def counting_batch(self, items, *args, **kwargs):
        seen["prompts"] += len(items)
        return batch(self, items, *args, **kwargs)

    def counting_written(*args):
        out = written(*args)
        seen["rollouts"] += out["tokens"].shape[:2].numel()
        return out

    monkeypatch.setattr(encoder.Encoder, "batch", counting_batch)
    monkeypatch.setattr(generation, "_written", counting_written)
    return seen


def agrees(rows, planned, work, rel=0.02) -> None:
    """What `work` passes through the encoder and computes is as planned; the loss, rewards and merging of adapters are not."""
    rows.update(prompts=0, rollouts=0)
    assert counted(work) == pytest.approx(sum(p.flops for p in planned), rel=rel)
    assert rows == {"prompts": sum(p.prompts for p in planned), "rollouts": sum(p.rollouts for p in planned)}


def lengths(monkeypatch, tiny, item_of) -> None:
    """The plan takes the true length of the item that stands for a side and a request, instead of its estimate."""
    exact = lambda self, side, request: tiny.batch([item_of(side, request)], request).input_ids.shape[1]  # noqa: E731
    monkeypatch.setattr(Workload, "length", exact)


def bare(tiny, load) -> Workload:
    """The same where candidates write no summaries."""
    tiny.settings = tiny.settings.model_copy(update={"candidate_summaries": False})
    return changed(load, encoder=tiny.settings)


@pytest.mark.parametrize("tokens", [None, 70])
@pytest.mark.parametrize(
    ("ret_share", "cache", "negatives", "of"),
    [(0.0, False, 0, None), (0.0, True, 0, None), (1.0, False, 0, None), (1.0, True, 1, None), (1.0, True, 1, bare)],
)
def test_a_contrastive_step_is_what_the_plan_counts(
    tiny, load, pictures, rows, monkeypatch, tmp_path, ret_share, cache, negatives, of, tokens
):
    load = of(tiny, load) if of else load
    changes = {"steps": 1, "batch": 4, "chunk": 3, "chunk_tokens": tokens, "ret_share": ret_share, "gradient_cache": cache}
    s = load.settings.stage2.model_copy(update=changes)
    lengths(monkeypatch, tiny, lambda side, request: pictures[0])
    distinct = iter(pictures)
    pairs = [contrastive.Pair(next(distinct), next(distinct), str(i), (str(i),), tuple(islice(distinct, negatives))) for i in range(4)]
    planned = load.contrastive(s, load.side("query"), load.side("candidate"), negatives=negatives)
    agrees(rows, planned, lambda: contrastive.train(tiny, lambda step, size: pairs, s, seed=0, folder=tmp_path))


@pytest.mark.parametrize(
    ("sides", "candidates", "of"),
    [("query", "step", None), ("query", "mined", None), ("all", "step", None), ("all", "mined", None), ("query", "step", bare)],
)
def test_a_step_of_stage_3_is_what_the_plan_counts(tiny, load, pictures, ranked, rows, monkeypatch, sides, candidates, of):
    load = of(tiny, load) if of else load
    changes = {"queries": 2, "queries_per_step": 2, "num_generations": 3, "candidates": candidates, "rollout_sides": sides}
    s = load.settings.stage3.model_copy(update=changes)
    tiny.add_lora(s.lora, seed=0)
    lengths(monkeypatch, tiny, lambda side, request: pictures[0])
    size = 2, len(grpo.sides(ranked[0], sides)), 3, tiny.settings.max_summary_tokens
    noise = torch.rand(size, generator=torch.Generator().manual_seed(0))
    planned = changed(load, stage3=s).rlvr(sides)
    with tiny.one_step():
        agrees(rows, [planned], lambda: grpo.step(tiny, ranked, s, noise))


def test_steps_in_turns_cost_what_the_loop_computes_for_queries_and_for_positives_among_queries(
    tiny, load, pictures, ranked, rows, monkeypatch, tmp_path
):
    """Three steps, the second with rollouts of the positives; queries are texts, candidates drawings."""
    wrong = iter([data_items.Item(text) for text in ("a b", "c d", "e f", "g h")])
    asking = [dataclasses.replace(r, item=data_items.Item(text)) for r, text in zip(ranked, ("i j", "k l"), strict=True)]
    turned = [dataclasses.replace(r, item=r.positive, positive=r.item, negatives=tuple(islice(wrong, 2))) for r in asking]
    asking = [dataclasses.replace(r, negatives=r.negatives[:2]) for r in asking]
    monkeypatch.setattr(hard_negatives, "exchanged", lambda *given: turned)
    changes = {"queries": 6, "queries_per_step": 2, "num_generations": 3, "candidates": "step", "rollout_sides": "both"}
    negatives = {"negatives": load.settings.stage3.negatives.model_copy(update={"hard": 1, "random": 1})}
    s = load.settings.stage3.model_copy(update=changes | negatives)
    load = changed(load, stage3=s)
    monkeypatch.setattr(Workload, "side", lambda self, which, weight=None: Side(0.0, float(which == "candidate")))
    lengths(monkeypatch, tiny, lambda side, request: pictures[0] if side.image else asking[0].item)
    planned = load.rlvr("both")
    agrees(rows, [planned], lambda: grpo.train(tiny, asking, s, seed=0, folder=tmp_path))
    assert planned.flops != pytest.approx(load.rlvr("query").flops, rel=0.02)


def test_the_rerankers_training_and_looks_are_what_the_plan_counts(tiny, load, ranked, rows, monkeypatch, tmp_path):
    """A step of each kind, then looks at the answers to a query of MRBench and one of val; prompts of two or three items, all drawings."""
    s = load.settings.rerank.model_copy(update={"steps": 2, "batch": 2, "chunk": 3, "window": 2, "depth": 3, "validation": 1})
    one = load.settings.mrbench.model_copy(update={"queries": 1, "tasks": (), "units": tuple(load.data.units)[:1]})
    load = changed(load, rerank=s, mrbench=one)
    asked = [reranker.Asked(str(i), r.item, tuple("abc"), r.negatives[:3]) for i, r in enumerate(ranked)]
    shown = {"pointwise": ranked[0].negatives[:1], "listwise": ranked[0].negatives[:2]}
    prompts = {getattr(s, f"{k}_request"): reranker.prompt(ranked[0].item, others, k).item for k, others in shown.items()}
    lengths(monkeypatch, tiny, lambda side, request: prompts.get(request, ranked[0].item))
    train, _, _, looks = load.reranking()
    # a drawing that is shown twice in a step is looked at once
    agrees(rows, [train], lambda: reranker.train(tiny, ranked, s, seed=0, folder=tmp_path), rel=0.03)
    agrees(rows, [looks], lambda: [reranker.score(tiny, asked, kind, s, batch=1) for kind in reranker.KINDS])
    assert looks.prompts == 2 * (3 + 2)


def test_recomputed_layers_cost_a_forward_and_save_memory(paper):
    load = estimate.make(paper)
    query, candidate = load.side("query"), load.side("candidate")
    again = load.settings.stage1.model_copy(update={"chunk_tokens": None})
    plain = again.model_copy(update={"gradient_checkpointing": False})
    (once, _), (twice, _) = (load.contrastive(s, query, candidate) for s in (plain, again))
    rows, padding, request = plain.steps * plain.batch, load.data.padding, load.settings.encoder.eol_request
    lengths = [load.length(side, request) * padding for side in (query, candidate)]
    assert twice.flops - once.flops == pytest.approx(sum(load.sizes.forward(rows * n, n, plain.lora.rank) for n in lengths))
    kept, left = (load.sizes.activation_bytes(2, 64, dropout=True, checkpointing=c) for c in (False, True))
    assert left < kept / 10


def test_counts_come_from_the_root_where_there_is_one(own_root, smoke, tmp_path):
    with_root = smoke.changed({"data": {"root": str(own_root.folder), "nli": str(tmp_path / "nli.csv")}})
    data = sizes.dataset(with_root.model_copy(update={"profile": "nowhere"}), sizes.known())
    assert list(data.units) == own_root.units("test")
    for name, unit in data.units.items():
        assert (unit.test, unit.pool) == (len(own_root.queries(name, "test")), len(own_root.pool(name, "test")))
    assert data.union_rows == len(own_root.union_train()) and data.train_pool == len(own_root.pool("", "train", "global"))


def test_the_table_of_m_beir_adds_up_to_its_totals():
    """190,573 test queries, 5,609,079 candidates, about 1.1 M training queries (UniIR's data card)."""
    units = sizes.known().datasets["M-BEIR"].units
    assert list(units) == list(mbeir.OFFICIAL_UNITS)
    assert sum(u.test for u in units.values()) == 190_573 and sum(u.pool for u in units.values()) == 5_609_079
    assert sum(u.train for u in units.values()) == pytest.approx(1.1e6, rel=0.05)


@pytest.mark.parametrize("devices", [1, 2, 7, 8])
@pytest.mark.parametrize("parts", [1, 8, 15, 30])
def test_devices_that_are_kept_busy_are_those_of_the_share_of_each_process(monkeypatch, load, parts, devices):
    shares = []
    for process in range(devices):
        monkeypatch.setattr(distributed, "processes", lambda p=process: SimpleNamespace(process_index=p, num_processes=devices))
        shares.append(len(distributed.own_share(parts)))
    assert dataclasses.replace(load, devices=devices).dealt(parts) == parts / max(shares)


def test_more_devices_divide_all_that_trains_and_mines_and_nothing_of_one_process(paper):
    one, eight = ({s.name: s for s in plan.stages(estimate.make(paper, gpu="H20", devices=n))} for n in (1, 8))
    for name in ("stage 1", "stage 2", "stage 2, its summaries"):
        assert one[name].hours == pytest.approx(8 * eight[name].hours)
    # each process writes the summaries of its own negatives, and has looked at them when it trains
    assert 0.95 * one["control"].hours < 8 * eight["control"].hours < one["control"].hours
    assert one["mining"].hours == pytest.approx(eight["mining"].devices * eight["mining"].hours)
    for name in ("MRBench, annotation", "evaluation of 4 models", "their search, global pool"):
        assert one[name].hours == eight[name].hours
    for sides in ("query", "all"):  # a query a device: the calls of decoding get smaller, not fewer
        sampling = f"stage 3, rollout_sides: {sides}"
        assert eight[sampling].hours < one[sampling].hours < 8 * eight[sampling].hours


def advised(profile, gpu: str, devices: int = 1) -> list[str]:
    load = estimate.make(profile, gpu=gpu, devices=devices)
    return plan.advice(load, plan.stages(load), gpu)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("gpu", ["H100", "H20", "A100"])
@pytest.mark.parametrize("profile", ["qwen2vl-2b", "qwen2vl-7b"])
def test_the_papers_profiles_fit(profile, gpu, devices):
    assert not [line for line in advised(config.load(profile), gpu, devices) if line.startswith(("does not fit", "cannot run"))]


def test_what_does_not_fit_or_cannot_run_is_named_with_the_key_to_change(paper):
    lines = advised(paper, "L40S")
    assert any(line.startswith("does not fit: stage 2 needs") and line.endswith("lower stage2.chunk_tokens") for line in lines)
    assert not any("stage 2 needs" in line for line in advised(paper.changed({"stage2": {"chunk_tokens": 18_000}}), "L40S"))
    assert "cannot run: 8 queries a step for 9 devices; raise stage3.queries_per_step" in advised(paper, "H100", devices=9)


def test_without_a_gradient_cache_one_device_holds_the_graphs_of_a_whole_batch(smoke):
    cost = {}
    for cached, devices in ((True, 1), (False, 1), (False, 2)):
        s = smoke.changed({"stage2": {"gradient_cache": cached, "batch": 8, "chunk": 4}})
        cost[cached, devices] = next(x.cost for x in plan.stages(estimate.make(s, devices=devices)) if x.name == "stage 2")
    for part in ("activations", "logits"):
        assert cost[False, 1].memory[part] == 2 * 8 / 4 * cost[True, 1].memory[part] == 4 * cost[False, 2].memory[part]


def test_vllm_takes_its_share_of_the_memory_and_must_hold_the_weights(paper):
    paper = paper.changed({"stage3": {"chunk": 48}})
    with_vllm = paper.changed({"stage3": {"sampler": "vllm", "vllm": {"gpu_memory_utilization": 0.2}}})
    plain, beside = ({s.name: s for s in plan.stages(estimate.make(s))} for s in (paper, with_vllm))
    for name, stage in beside.items():
        if stage.cost.memory:
            more = 0.2 * 80 if name.startswith("stage 3") else 0
            assert stage.cost.peak - plain[name].cost.peak == pytest.approx(more)
    said = "\n".join(advised(with_vllm, "H100"))
    assert "cannot run: vLLM has 16 GB for 17 GB of weights" in said and "lower stage3.chunk" in said


@pytest.mark.parametrize(("multi_grain", "asked"), [(1.0, 1000), (0.5, 2000), (0.001, 24_809 + 5000 + 2120 + 4170)])
def test_annotation_stops_at_the_share_of_a_unit_or_at_its_end(paper, multi_grain, asked):
    load = estimate.make(paper)
    load = dataclasses.replace(load, data=load.data.model_copy(update={"multi_grain": multi_grain}))
    assert load.annotation().prompts == load.annotation().rollouts == asked


def test_only_a_model_that_is_loaded_here_is_planned_to_annotate(paper):
    served = {"kind": "openai", "base_url": "http://localhost:8000/v1"}
    for annotator, rows in (({}, 1), (served, 0), ({"kind": "exact", "model": None}, 0)):
        load = estimate.make(paper.changed({"mrbench": {"annotator": annotator}}))
        assert len([s for s in plan.stages(load) if "annotation" in s.name]) == rows
    with pytest.raises(ProfileError, match=r"M-BEIR has no unit of mrbench\.units"):
        estimate.make(paper.changed({"mrbench": {"units": ["emoji_task0"]}})).annotation()


def test_workers_open_images_while_the_card_computes():
    """All but what so many cannot open in the time of the computing; the work itself is the same."""
    alone, ahead = (
        estimate.make(config.load("qwen2vl-7b").changed({"encoder": {"workers": workers}}), gpu="H100").embed(9999, "candidate")
        for workers in (0, 4)
    )
    assert alone.flops == ahead.flops and alone.prompts == ahead.prompts
    assert ahead.waiting < alone.waiting and alone.seconds - ahead.seconds == pytest.approx(alone.waiting - ahead.waiting)


@pytest.mark.parametrize("profile", ["smoke", "cpu", "qwen2vl-2b", "qwen2vl-7b"])
def test_plan_prints_every_stage_and_the_papers_hours_beside_ours_and_writes_nothing(profile, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", profile, "--devices", "2"]) == 0
    shown = capsys.readouterr().out
    stages = ("stage 1", "stage 2", "mining", "rollout_sides: query", "rollout_sides: all", "control", "evaluation", "global pool")
    reported = yaml.safe_load((config.PARAMS / "reported.yaml").read_text())["training_time"]["runs"]
    runs = [text for run in reported for text in (f"{run['by']}: {run['stage']}", f"{run['devices']} x {run['gpu']}")]
    for text in (*stages, "single pass", "reranker", "zero2.yaml", *(runs if profile.startswith("qwen") else [])):
        assert text in shown
    assert not list(tmp_path.iterdir())


def test_unknown_gpu_backbone_and_data_are_named(smoke):
    with pytest.raises(ProfileError, match=r"no GPU 'B900' in .*plan\.yaml; it has H100"):
        estimate.make(smoke, gpu="B900")
    with pytest.raises(ProfileError, match=r"no entry for no/where in .*no config\.json on this machine"):
        estimate.make(smoke.changed({"backbone": {"path": "no/where"}}))
    with pytest.raises(ProfileError, match=r"no data set 'x' .*it has M-BEIR, emoji"):
        estimate.make(smoke.changed({"data": {"name": "x"}}))
    with pytest.raises(ProfileError, match="counts qwen2_vl and qwen2_5_vl, not qwen3_vl"):
        sizes.of_config(transformers.Qwen3VLConfig())
