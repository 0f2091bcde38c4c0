"""How fast, how busy, how full: the table of the GPU issue, and TRL's GRPOTrainer and transformers' generate beside ours in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from material import Place, counted, embedder, items, mixed, pairs, ranked, stock, vectors
from PIL import Image

from elva_core.experiments import sizes
from elva_core.models import encoder as encoders
from elva_core.models import generation
from elva_core.models.encoder import Encoder
from elva_core.retrieval import search
from elva_core.training import contrastive, grpo
from elva_core.training.contrastive import Pair

TWO, SEVEN = "Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"
ROUNDS = 3  # of a comparison, after one that is not counted


def peak_tflops() -> float | None:
    """Of this card's dense bfloat16 by params/plan.yaml; None for a card that it does not know."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().replace("-", " ").split()
    return next((gpu.tflops for key, gpu in sizes.known().gpus.items() if key in name), None)


def mfu(flops: float, seconds: float) -> float | None:
    """Share of the card's peak."""
    peak = peak_tflops()
    return flops / seconds / (peak * 1e12) if peak else None


def seconds(place: Place, work: Callable[[], object]) -> float:
    place.synchronise()
    began = time.perf_counter()
    work()
    place.synchronise()
    return time.perf_counter() - began


def in_turns(place: Place, **sides: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each side, one round after another; a first round is not counted."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, work in sides.items():
            once = seconds(place, work)
            if turn:
                took[name].append(once)
    return took


class Models:
    """The 2B, made when a section first needs it, so that one section's failure is not the next one's."""

    def __init__(self, place: Place) -> None:
        self.place, self._made = place, None

    def two(self) -> Encoder:
        if self._made is None:
            self._made = embedder(self.place, TWO, "float32" if self.place.device == "cpu" else "bfloat16")
        model = self._made
        if hasattr(model.model, "unload"):  # a section that failed left its adapter
            model.model = model.model.unload()
        model.model.eval().requires_grad_(False)
        model.backbone.gradient_checkpointing_disable()
        return model

    def forget(self) -> None:
        self._made = None


def steps(place: Place, model: Encoder, name: str, drawn: list[list[Pair]], **changes) -> tuple[list[dict], float]:
    """Log lines of a contrastive stage's steps, and the FLOPs of one."""
    changes |= {"steps": len(drawn), "batch": len(drawn[0]), "optimiser": {"checkpoint_every": 1000}}
    s = getattr(place.profile.changed({name: changes}), name)
    with counted(model, rank=s.lora.rank, again=s.gradient_checkpointing) as work:
        rows = contrastive.train(model, lambda step, size: drawn[step], s, seed=1, folder=place.folder / f"{name}-{time.time()}")
    return rows, work.flops / len(drawn)


def step_facts(rows: list[dict], flops: float) -> dict:
    """Of the last step."""
    took = [row["step_time"] for row in rows]
    return {"value": took[-1], "unit": "s", "mfu": mfu(flops, took[-1]), "loss": rows[-1]["loss"], "steps_s": took}


def stage1(place: Place, models: Models) -> dict:
    """Four steps; the loop stops where a gradient is not finite."""
    batch = place.profile.stage1.batch
    drawn = [pairs(place, ("text", "text"), batch, seed) for seed in range(4)]
    return step_facts(*steps(place, models.two(), "stage1", drawn))


def stage2(place: Place, models: Models, ret: bool) -> dict:
    """A step of the whole batch, after a small one that loads the kernels."""
    model, s = models.two(), place.profile.stage2
    steps(place, model, "stage2", [mixed(place, 2 * s.chunk)], ret_share=float(ret))
    return step_facts(*steps(place, model, "stage2", [mixed(place, s.batch)], ret_share=float(ret)))


@torch.no_grad()
def embedding(place: Place, models: Models, kind: str, summary: bool) -> dict:
    """Items a second at the profile's batch, as many batches as fit eight seconds, after one that is not counted."""
    model, batch = models.two(), min(place.profile.evaluation.batch, 256)
    asked = items(place, kind, 4 * batch)
    parts = [asked[i : i + batch] for i in range(0, len(asked), batch)]
    embed = (lambda part: generation.generate(model, part)) if summary else model.embed_eol
    seconds(place, lambda: embed(parts[0]))
    done, took = 0, 0.0
    with counted(model) as work:
        for part in parts[1:]:
            took += seconds(place, lambda part=part: embed(part))
            done += len(part)
            if took > 8:
                break
    return {"value": done / took, "unit": "a second", "n": done, **({} if summary else {"mfu": mfu(work.flops, took)})}


@torch.no_grad()
def summaries(place: Place, models: Models) -> dict:
    """48 images embedded after a greedy summary each, ours and by `generate` and a second forward, in turns."""
    model, count = models.two(), 4 if place.tiny else 48
    processor, theirs, cap = model.processor, model.backbone, model.settings.max_summary_tokens
    asked = items(place, "image", count)

    def by_generate() -> None:
        prompts = model.prompts(asked, model.settings.summary_request)
        shown = [Image.open(item.image).convert("RGB") for item in asked]
        given = processor(text=prompts, images=shown, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        banned = {"suppress_tokens": model.banned_ids.tolist(), "pad_token_id": model.pad_id}
        ids = theirs.generate(**given, max_new_tokens=cap, min_new_tokens=cap, do_sample=False, **banned)
        ends = ids[:, given["input_ids"].shape[1] :].tolist()
        full = model.batch(asked, model.settings.summary_request, [[*end, model.ret_id] for end in ends])
        encoders.normalised(model.states(full)[:, -1])

    took = in_turns(place, ours=lambda: generation.generate(model, asked), generate=by_generate)
    ours, other = (statistics.median(took[name]) for name in ("ours", "generate"))
    layers = model.backbone.config.get_text_config().num_hidden_layers
    return {
        "value": ours,
        "unit": "s",
        "against": "generate and a forward",
        "ratio": other / ours,
        "seconds_per_layer": ours / (cap + 1) / layers,
        "took": took,
    }


def searching(place: Place, _: Models) -> dict:
    """The 50 nearest of a million vectors, exactly; FAISS's flat index on a card does the same product, and picks likewise."""
    queries, pool = vectors(1000), vectors(20_000 if place.tiny else 1_000_000)

    def plain() -> None:  # both begin with vectors that the host holds
        here = torch.from_numpy(pool).to(place.device)
        for part in torch.from_numpy(queries).to(place.device).split(100):
            (part @ here.T).topk(50)

    took = in_turns(place, ours=lambda: search.exact(queries, pool, 50, device=place.device), plain=plain)
    ours, other = (statistics.median(took[name]) for name in ("ours", "plain"))
    against = "a product and topk without ranks or checks"
    return {"value": len(queries) / ours, "unit": "queries a second", "against": against, "ratio": other / ours, "took": took}


class OurSteps:
    """RL steps of the 2B on mined candidates: sampling, rewards, reference, policy gradient, KL, optimiser."""

    def __init__(self, place: Place, model: Encoder, count: int) -> None:
        self.place, self.model, self.s = place, model, place.profile.stage3.model_copy(update={"candidates": "mined"})
        negatives = self.s.negatives.hard + self.s.negatives.random
        self.queries = ranked(model, items(place, "image", self.s.queries_per_step * count), negatives)
        model.add_lora(self.s.lora, seed=0)
        model.model.eval()
        self.optimiser = torch.optim.AdamW(model.trainable().values(), lr=self.s.optimiser.lr)

    @property
    def rollouts(self) -> int:
        return self.s.queries_per_step * self.s.num_generations

    def take(self, number: int) -> float:
        """Seconds of one step."""
        shape = (self.s.queries_per_step, 1, self.s.num_generations, self.model.settings.max_summary_tokens)
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(number))
        drawn = self.queries[number * self.s.queries_per_step :][: self.s.queries_per_step]

        def work() -> None:
            self.optimiser.zero_grad()
            grpo.step(self.model, drawn, self.s, noise)
            self.optimiser.step()

        return seconds(self.place, work)


def rl(place: Place, models: Models) -> dict:
    """Rollouts a second: median of the steps after the first."""
    ours = OurSteps(place, models.two(), ROUNDS + 1)
    took = [ours.take(number) for number in range(ROUNDS + 1)]
    return {"value": ours.rollouts / statistics.median(took[1:]), "unit": "rollouts a second", "steps_s": took}


def trl(place: Place, models: Models) -> dict:
    """TRL's GRPOTrainer with the same prompts, G, summary length, KL and LoRA, its steps and ours in turns."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ours = OurSteps(place, models.two(), ROUNDS + 1)
    dtype = "float32" if place.device == "cpu" else "bfloat16"
    theirs, processor = stock(place, TWO, dtype)
    s, took = ours.s, {"trl": [], "ours": []}

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            place.synchronise()
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_) -> None:
            place.synchronise()
            took["trl"].append(time.perf_counter() - self.began)
            took["ours"].append(ours.take(state.global_step - 1))

    request = [{"role": "user", "content": place.profile.encoder.summary_request}]
    rows = [{"prompt": request, "image": Image.open(q.item.image)} for q in ours.queries]
    options = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "gradient_checkpointing": False}
    GRPOTrainer(
        model=theirs,
        processing_class=processor,
        reward_funcs=lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=s.lora.rank, lora_alpha=s.lora.alpha, target_modules=encoders.lora_targets(theirs)),
        callbacks=[Turns()],
        args=GRPOConfig(
            output_dir=str(place.folder / "trl"),
            use_cpu=place.device == "cpu",
            bf16=place.device != "cpu",
            per_device_train_batch_size=ours.rollouts,
            num_generations=s.num_generations,
            max_completion_length=place.profile.encoder.max_summary_tokens,
            generation_kwargs={"suppress_tokens": ours.model.banned_ids.tolist()},
            temperature=s.temperature,
            beta=s.beta,
            loss_type=s.loss_type,
            learning_rate=s.optimiser.lr,
            max_steps=ROUNDS + 1,
            **options,
        ),
    ).train()
    ratios = [a / b for a, b in zip(took["trl"][1:], took["ours"][1:], strict=True)]
    return {"value": statistics.median(ratios), "unit": "times as long", "took": took}


def seven(place: Place, models: Models) -> dict:
    """One EOL step of stage 2 of the 7B: two chunks a side."""
    models.forget()
    model = embedder(place, SEVEN, "float32" if place.device == "cpu" else "bfloat16")
    chunk = 2 if place.tiny else 60
    drawn = [mixed(place, 2 * chunk, seed) for seed in range(2)]
    return step_facts(*steps(place, model, "stage2", drawn, ret_share=0.0, chunk=chunk, chunk_tokens=None))
