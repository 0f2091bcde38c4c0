"""The plan's arithmetic against what is really built, run and counted."""

from __future__ import annotations

import dataclasses
import io
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from conftest import mined
from elva_core import cli, config, distributed
from elva_core.config import ProfileError
from elva_core.data import items as data_items
from elva_core.data import mbeir
from elva_core.experiments import catalogue, plan, sizes, workload
from elva_core.experiments.workload import Side, Workload
from elva_core.models import encoder, generation
from elva_core.training import contrastive, grpo, reranker

ARCHITECTURES = catalogue.known().architectures


def config_of(s: sizes.Sizes, **language) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config={
            "vocab_size": s.vocabulary,
            "hidden_size": s.hidden,
            "intermediate_size": s.intermediate,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv_heads,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        | language,
        vision_config={
            "depth": s.vision_layers,
            "embed_dim": s.vision_hidden,
            "hidden_size": s.hidden,
            "mlp_ratio": s.vision_intermediate // s.vision_hidden,
            "patch_size": s.patch,
        },
        tie_word_embeddings=s.tied,
    )


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_parameters_are_those_of_the_class_built_on_the_meta_device(name):
    planned = sizes.Sizes(**ARCHITECTURES[name])
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config_of(planned))
    assert sum(p.numel() for p in model.parameters()) == planned.parameters
    assert sum(p.numel() for p in model.model.visual.parameters()) == planned.vision_parameters
    assert sizes.of_config(model.config) == planned


def test_parameters_of_the_small_backbone_and_its_adapter_are_those_of_the_model(tiny, smoke):
    planned = sizes.of_config(tiny.backbone.config)
    assert sum(p.numel() for p in tiny.backbone.parameters()) == planned.parameters
    bound = sizes.of_tiny(smoke.backbone.tiny, catalogue.known().tiny_tokens)
    assert bound.vocabulary >= planned.vocabulary and dataclasses.replace(bound, vocabulary=planned.vocabulary) == planned
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
    assert counted(lambda: tiny.logits(hidden)) == planned.logits(rows * length)


@pytest.fixture
def saving(smoke):
    """Runs forwards of a small model in one dtype and measures what autograd saves, in bytes without the weights."""

    def run(dtype, dropout, work):
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
        backbone = Qwen2VLForConditionalGeneration(config_of(SMALL, rope_parameters=rope)).to(dtype)
        holder = object.__new__(encoder.Encoder)
        holder.model, holder.ret_id = backbone, 3
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

    return run


SMALL = sizes.Sizes(128, 3, 4, 2, 512, 300, True, 32, 1, 128, 14)
MASK = torch.ones(2, 40, dtype=torch.long)
MASK[0, :5] = 0  # padding, as almost every batch has it: attention then wants keys and values for every head


def words(holder, rows, length) -> torch.Tensor:
    return holder.backbone.get_input_embeddings()(torch.randint(0, SMALL.vocabulary, (rows, length)))


def prompt(holder) -> encoder.Batch:
    return encoder.Batch(None, MASK, torch.arange(40).expand(3, 2, 40), {"inputs_embeds": words(holder, 2, 40)})


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_activations_are_what_autograd_saves(smoke, saving, dtype, width, dropout):
    measured = saving(dtype, dropout, lambda h: h.states(prompt(h))) / MASK.numel()
    planned = SMALL.activation_bytes(width, smoke.stage2.lora.rank, dropout=dropout > 0)
    planned += 3 * SMALL.layers * (6 * SMALL.hidden + SMALL.intermediate) if dropout else 0  # on a CPU the mask is float32, on a GPU a byte
    assert measured == pytest.approx(planned, rel=0.04)  # the last norm and a layer's mask are not planned


def test_rollouts_that_share_a_prompt_save_their_own_tokens_and_the_prompt_repeated_for_every_head(smoke, saving):
    rollouts, ending, rank = 5, 10, smoke.stage2.lora.rank

    def scored(h):
        cache = DynamicCache(config=h.backbone.config.get_text_config())
        mask = torch.cat([MASK.repeat_interleave(rollouts, 0), torch.ones(2 * rollouts, ending, dtype=torch.long)], dim=1)
        first = h.states(prompt(h), cache)
        cache.batch_repeat_interleave(rollouts)
        positions = torch.arange(40, 40 + ending).expand(3, 2 * rollouts, ending)
        return first, h.states(encoder.Batch(None, mask, positions, {"inputs_embeds": words(h, 2 * rollouts, ending)}), cache)

    kept = SMALL.activation_bytes(4, rank, dropout=False)
    planned = (2 * 40 + 2 * rollouts * ending) * kept + 2 * rollouts * 40 * SMALL.kv_bytes(4, repeated=True)
    assert saving(torch.float32, 0.0, scored) == pytest.approx(planned, rel=0.04)


def test_the_literal_reading_is_nine_million_summaries():
    load = workload.make(config.load("qwen2vl-7b"))
    assert load.rlvr("all").rollouts == 11_000 * 8 * 102 == 8_976_000
    assert load.rlvr("query").rollouts == 11_000 * 8 + 11_000 * 101  # of the query; one of each candidate


@pytest.fixture
def pictures(root):
    """Distinct inputs of equal length: drawings alone."""
    return [data_items.candidate_item(root, c) for c in root.pool("emoji_task0", "test")]


@pytest.fixture
def load(tiny, smoke, monkeypatch) -> Workload:
    """The smoke profile on the tiny model, for inputs that are drawings alone, each seen anew."""
    tiny.settings = tiny.settings.model_copy(update={"cache_vision": False})
    made = workload.make(smoke)
    data = made.data.model_copy(update={"padding": 1.0})
    changed = smoke.model_copy(update={"encoder": tiny.settings})
    monkeypatch.setattr(Workload, "side", lambda self, which, weight=None: Side(0.0, 1.0))
    return dataclasses.replace(made, data=data, settings=changed, sizes=sizes.of_config(tiny.backbone.config))


@pytest.fixture
def rows(monkeypatch) -> dict[str, int]:
    """Counts what passes through the encoder while a test runs."""
    seen = {"prompts": 0, "rollouts": 0}
    batch, generate = encoder.Encoder.batch, generation.generate

    def counting_batch(self, items, *args, **kwargs):
        seen["prompts"] += len(items)
        return batch(self, items, *args, **kwargs)

    def counting_generate(*args, **kwargs):
        out = generate(*args, **kwargs)
        seen["rollouts"] += out.tokens.shape[0] * out.tokens.shape[1]
        return out

    monkeypatch.setattr(encoder.Encoder, "batch", counting_batch)
    monkeypatch.setattr(generation, "generate", counting_generate)
    return seen


def lengths(monkeypatch, tiny, picture):
    """The plan takes the true length of these prompts instead of its estimate."""
    exact = {request: tiny.batch([picture], request).input_ids.shape[1] for request in _requests(tiny.settings)}
    monkeypatch.setattr(Workload, "length", lambda self, side, request: exact[request])


def _requests(prompts) -> tuple[str, str]:
    return prompts.eol_request, prompts.summary_request


@pytest.mark.parametrize(("ret_share", "cache", "negatives"), [(0.0, False, 0), (0.0, True, 0), (1.0, False, 0), (1.0, True, 1)])
def test_a_contrastive_step_is_what_the_plan_counts(tiny, load, pictures, rows, monkeypatch, tmp_path, ret_share, cache, negatives):
    changes = {"steps": 1, "batch": 4, "chunk": 3, "ret_share": ret_share, "gradient_cache": cache}
    s = load.settings.stage2.model_copy(update=changes)
    lengths(monkeypatch, tiny, pictures[0])
    rows.update(prompts=0)
    distinct = iter(pictures)
    pairs = [contrastive.Pair(next(distinct), next(distinct), str(i), (str(i),), tuple(islice(distinct, negatives))) for i in range(4)]
    flops = counted(lambda: contrastive.train(tiny, lambda step, size: pairs, s, seed=0, folder=tmp_path))
    train, made = load.contrastive(s, load.side("query"), load.side("candidate"), negatives=negatives)
    assert rows == {"prompts": train.prompts + made.prompts, "rollouts": made.rollouts}
    assert flops == pytest.approx(train.flops + made.flops, rel=0.02)  # merging the adapter and the loss are not planned


@pytest.mark.parametrize("sides", ["query", "all"])
@pytest.mark.parametrize("candidates", ["step", "mined"])
def test_a_step_of_stage_3_is_what_the_plan_counts(tiny, load, pictures, root, smoke, rows, monkeypatch, sides, candidates):
    changes = {"queries": 2, "queries_per_step": 2, "num_generations": 3, "candidates": candidates, "rollout_sides": sides}
    s = load.settings.stage3.model_copy(update=changes)
    load = dataclasses.replace(load, settings=load.settings.model_copy(update={"stage3": s}))
    per_query = 2 + s.negatives.hard + s.negatives.random
    ranked = mined(tiny, root, smoke, 8)[:2]
    asked = [
        dataclasses.replace(r, item=own[0], positive=own[1], negatives=tuple(own[2:]))
        for r, own in zip(ranked, (pictures[:per_query], pictures[per_query : 2 * per_query]), strict=True)
    ]
    tiny.add_lora(s.lora, seed=0)
    lengths(monkeypatch, tiny, pictures[0])
    rows.update(prompts=0, rollouts=0)
    noise = torch.rand(2, len(grpo.sides(asked[0], sides)), 3, tiny.settings.max_summary_tokens, generator=torch.Generator().manual_seed(0))
    flops = counted(lambda: grpo.step(tiny, asked, s, noise))
    planned = load.rlvr(sides)
    assert rows == {"prompts": planned.prompts, "rollouts": planned.rollouts}
    assert flops == pytest.approx(planned.flops, rel=0.02)  # the rewards are not planned


def test_the_rerankers_training_and_looks_are_what_the_plan_counts(tiny, load, pictures, root, smoke, rows, monkeypatch, tmp_path):
    """A step of each kind, then looks at the answers to a query of MRBench and one of val; prompts of two or three items, all drawings."""
    s = load.settings.rerank.model_copy(update={"steps": 2, "batch": 2, "chunk": 3, "window": 2, "depth": 3, "validation": 1})
    one = load.settings.mrbench.model_copy(update={"queries": 1, "tasks": (), "units": tuple(load.data.units)[:1]})
    load = dataclasses.replace(load, settings=load.settings.model_copy(update={"rerank": s, "mrbench": one}))
    items = iter(pictures)
    ranked = [
        dataclasses.replace(r, item=next(items), positive=next(items), negatives=tuple(islice(items, len(r.negatives))))
        for r in mined(tiny, root, smoke, 8)[:2]
    ]
    asked = [reranker.Asked(str(i), r.item, tuple("abc"), r.negatives[:3]) for i, r in enumerate(ranked)]
    shown = {"pointwise": ranked[0].negatives[:1], "listwise": ranked[0].negatives[:2]}
    requests = {"pointwise": s.pointwise_request, "listwise": s.listwise_request}
    exact = {requests[k]: tiny.batch([reranker.prompt(ranked[0].item, shown[k], k).item], requests[k]).input_ids.shape[1] for k in requests}
    monkeypatch.setattr(Workload, "length", lambda self, side, request: exact.get(request, 1))
    train, _, _, looks = load.reranking()
    rows.update(prompts=0)
    flops = counted(lambda: reranker.train(tiny, ranked, s, seed=0, folder=tmp_path))
    assert rows["prompts"] == train.prompts and flops == pytest.approx(train.flops, rel=0.02)
    rows.update(prompts=0)
    flops = counted(lambda: [reranker.score(tiny, asked, kind, s, batch=1) for kind in reranker.KINDS])
    assert rows["prompts"] == looks.prompts == 2 * (3 + 2) and flops == pytest.approx(looks.flops, rel=0.02)


def test_recomputed_layers_cost_a_forward_and_save_memory():
    load = workload.make(config.load("qwen2vl-7b"))
    query, candidate, again = load.side("query"), load.side("candidate"), load.settings.stage1
    plain = again.model_copy(update={"gradient_checkpointing": False})
    (once, _), (twice, _) = (load.contrastive(s, query, candidate) for s in (plain, again))
    rows, padding, request = plain.steps * plain.batch, load.data.padding, load.settings.encoder.eol_request
    lengths = [load.length(side, request) * padding for side in (query, candidate)]
    assert twice.flops - once.flops == pytest.approx(sum(load.sizes.forward(rows * n, n, plain.lora.rank) for n in lengths))
    kept, left = (load.sizes.activation_bytes(2, 64, dropout=True, checkpointing=c) for c in (False, True))
    assert left < kept / 10


def test_counts_come_from_the_root_where_there_is_one(own_root, smoke, tmp_path):
    with_root = smoke.changed({"data": {"root": str(own_root.folder), "nli": str(tmp_path / "nli.csv")}})
    data = catalogue.dataset(with_root.model_copy(update={"profile": "nowhere"}), catalogue.known())
    assert list(data.units) == own_root.units("test")
    for name, unit in data.units.items():
        assert (unit.test, unit.pool) == (len(own_root.queries(name, "test")), len(own_root.pool(name, "test")))
    assert data.union_rows == len(own_root.union_train()) and data.train_pool == len(own_root.pool("", "train", "global"))


def test_the_table_of_m_beir_adds_up_to_its_totals():
    """190,573 test queries, 5,609,079 candidates, about 1.1 M training queries (mbeir_format 6)."""
    units = catalogue.known().datasets["M-BEIR"].units
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


def test_more_devices_divide_all_that_trains_and_mines_and_nothing_of_one_process():
    one, eight = ({s.name: s for s in plan.stages(workload.make(config.load("qwen2vl-7b"), gpu="H20", devices=n))} for n in (1, 8))
    for name in ("stage 1", "stage 2", "stage 2, its summaries", "stage 3, rollout_sides: all", "control"):
        assert one[name].hours == pytest.approx(8 * eight[name].hours)
    assert one["mining"].hours == pytest.approx(eight["mining"].devices * eight["mining"].hours)
    for name in ("MRBench, annotation", "evaluation of 4 models", "their search, global pool"):
        assert one[name].hours == eight[name].hours
    sampling = "stage 3, rollout_sides: query"  # a query a device: the calls get smaller, not fewer
    assert eight[sampling].hours < one[sampling].hours < 8 * eight[sampling].hours


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("gpu", ["H100", "H20", "A100"])
@pytest.mark.parametrize("profile", ["qwen2vl-2b", "qwen2vl-7b"])
def test_the_papers_profiles_fit(profile, gpu, devices):
    load = workload.make(config.load(profile), gpu=gpu, devices=devices)
    assert not [line for line in plan.advice(load, plan.stages(load), gpu) if line.startswith(("does not fit", "cannot run"))]


def test_what_does_not_fit_is_named_with_the_key_to_lower():
    profile = config.load("qwen2vl-7b")
    load = workload.make(profile, gpu="L40S")
    said = plan.advice(load, plan.stages(load), "L40S")
    assert any(line.startswith("does not fit: stage 2 needs") and "lower stage2.chunk" in line for line in said)
    small = profile.changed({"stage2": {"chunk": 20}})
    load = workload.make(small, gpu="L40S")
    assert not any("stage 2 needs" in line for line in plan.advice(load, plan.stages(load), "L40S"))


def test_vllm_takes_its_share_of_the_memory_and_must_hold_the_weights():
    profile = config.load("qwen2vl-7b")
    with_vllm = profile.changed({"stage3": {"sampler": "vllm", "vllm": {"gpu_memory_utilization": 0.2}}})
    plain, beside = ({s.name: s for s in plan.stages(workload.make(s))} for s in (profile, with_vllm))
    for name, stage in beside.items():
        if stage.peak:
            more = 0.2 * 80 if name.startswith("stage 3") else 0
            assert stage.peak.total - plain[name].peak.total == pytest.approx(more)
    load = workload.make(with_vllm)
    said = "\n".join(plan.advice(load, plan.stages(load), "H100"))
    assert "cannot run: vLLM has 16 GB for 17 GB of weights" in said and "lower stage3.chunk" in said


def test_a_step_needs_a_query_for_every_device():
    load = workload.make(config.load("qwen2vl-7b"), devices=9)
    assert "cannot run: 8 queries a step for 9 devices; raise stage3.queries_per_step" in plan.advice(load, plan.stages(load), "H100")


@pytest.mark.parametrize(("multi_grain", "asked"), [(1.0, 1000), (0.5, 2000), (0.001, 24_809 + 5000 + 2120 + 4170)])
def test_annotation_stops_at_the_share_of_a_unit_or_at_its_end(multi_grain, asked):
    load = workload.make(config.load("qwen2vl-7b"))
    load = dataclasses.replace(load, data=load.data.model_copy(update={"multi_grain": multi_grain}))
    assert load.annotation().prompts == load.annotation().rollouts == asked


def test_only_a_model_that_is_loaded_here_is_planned_to_annotate():
    profile = config.load("qwen2vl-7b")
    served = {"kind": "openai", "base_url": "http://localhost:8000/v1"}
    for annotator, rows in (({}, 1), (served, 0), ({"kind": "exact", "model": None}, 0)):
        load = workload.make(profile.changed({"mrbench": {"annotator": annotator}}))
        assert len([s for s in plan.stages(load) if "annotation" in s.name]) == rows
    with pytest.raises(ProfileError, match=r"M-BEIR has no unit of mrbench\.units"):
        workload.make(profile.changed({"mrbench": {"units": ["emoji_task0"]}})).annotation()


@pytest.mark.parametrize("profile", ["smoke", "cpu", "qwen2vl-2b", "qwen2vl-7b"])
def test_plan_prints_every_stage_and_writes_nothing(profile, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", profile, "--devices", "2"]) == 0
    shown = capsys.readouterr().out
    stages = ("stage 1", "stage 2", "mining", "rollout_sides: query", "rollout_sides: all", "control", "evaluation", "global pool")
    for stage in (*stages, "single pass", "reranker", "zero2.yaml"):
        assert stage in shown
    assert not list(tmp_path.iterdir())


def test_the_papers_hours_stand_beside_ours():
    out = io.StringIO()
    plan.show(config.load("qwen2vl-7b"), gpu="H20", devices=8, console=Console(file=out, width=150))
    reported = yaml.safe_load((config.PARAMS / "reported.yaml").read_text())["training_time"]["runs"]
    for run in reported:
        assert f"{run['by']}: {run['stage']}" in out.getvalue() and f"{run['devices']} x {run['gpu']}" in out.getvalue()


def test_unknown_gpu_backbone_and_data_are_named(smoke):
    with pytest.raises(ProfileError, match=r"no GPU 'B900' in .*plan\.yaml; it has H100"):
        workload.make(smoke, gpu="B900")
    with pytest.raises(ProfileError, match=r"no entry for no/where in .*no config\.json on this machine"):
        workload.make(smoke.changed({"backbone": {"path": "no/where"}}))
    with pytest.raises(ProfileError, match=r"no data set 'x' .*it has M-BEIR, emoji"):
        workload.make(smoke.changed({"data": {"name": "x"}}))
    with pytest.raises(ProfileError, match="knows the sizes of Qwen2-VL, not of qwen2_5_vl"):
        from transformers import Qwen2_5_VLConfig

        sizes.of_config(Qwen2_5_VLConfig())


def test_sizes_of_a_folder_come_from_its_config(model_folder, smoke, tiny):
    load = workload.make(smoke.changed({"backbone": {"path": str(model_folder)}}))
    assert load.sizes == sizes.of_config(tiny.backbone.config)
