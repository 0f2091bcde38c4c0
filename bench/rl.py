"""Stage 3 beside what a user would otherwise run: TRL's GRPOTrainer, and `generate` plus a second forward.

Every comparison is made in one process on the same tiny Qwen2-VL with the same images, in turns; the medians and their
ratio go to outputs/bench/rl.json. Every turn sees new images, so neither side profits from a cache.

    make bench
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from elva_core import config, distributed, files
from elva_core.data import images as image_files
from elva_core.data import mbeir
from elva_core.data.items import Item
from elva_core.experiments import figures
from elva_core.models import encoder, generation, small_models
from elva_core.models.encoder import Encoder
from elva_core.training import grpo, hard_negatives

PROFILE = config.load("cpu")
SIZES = config.teaching("qwen2vl").sizes.model_copy(update={"patch": 16})
QUERIES, ROLLOUTS, ROUNDS, WARMUP = 4, 8, 7, 1
BATCH = QUERIES * ROLLOUTS  # summaries a turn, in every comparison
SIDES = {16: 128, 256: 512}  # visual tokens -> pixels, at 16-pixel patches merged two by two
TARGETS = {
    "rl step, 16 visual tokens": 2,
    "rl step, 256 visual tokens": 5,
    "embedding, 16 visual tokens": 2,
    "embedding, 256 visual tokens": 2,
}
MEMORY_GROUPS, MEMORY_CHUNK = (4, 32), 32  # G, and rollouts a forward may hold
FOLDER = files.REPOSITORY / "outputs/bench"


def stock(tokens: int):
    """(model, processor) of the laptop profile with random weights, as transformers runs it; images give `tokens` visual tokens."""
    names = ["Frau läuft mittlere Hautfarbe.", "Ein Bild."] * 50
    model, processor = small_models.build(names, SIZES.model_copy(update={"image_side": SIDES[tokens]}), seed=0)
    encoder.add_ret_token(model, processor.tokenizer, PROFILE.encoder.ret_token)
    model.requires_grad_(False)
    return model.eval(), processor


def tiny(tokens: int) -> Encoder:
    """The same model as this package runs it."""
    return Encoder(*stock(tokens), PROFILE.encoder.model_copy(update={"cache_vision": False}))


def pictures(count: int, tokens: int, folder: Path, seed: int) -> list[Path]:
    """Noise, written as PNG: speed does not depend on what is drawn."""
    rng = np.random.default_rng(seed)
    paths = [folder / f"{seed}-{i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (SIDES[tokens], SIDES[tokens], 3), dtype=np.uint8)).save(path)
    return paths


def rl_step(
    model: Encoder, paths: list[Path], optimiser: torch.optim.Optimizer, rollouts: int, seed: int, chunk: int = PROFILE.stage3.chunk
) -> None:
    """One update as the profile makes it: sampling, embeddings, rewards against mined candidates, policy gradient, KL, optimiser."""
    candidates = (Item("Ein Bild."), Item("Frau läuft."), Item("Hautfarbe."))
    query = mbeir.Query("1:1", None, None, "image", (), (), 3)
    near, *bank = np.eye(SIZES.hidden, dtype=np.float32)[:3]
    mined = (0.0, (0.0, 0.0), near, np.stack(bank), (0, 1), near)
    ranked = [hard_negatives.TrainingQuery(query, Item("", path), candidates[0], "1:1", candidates[1:], *mined) for path in paths]
    asked = PROFILE.stage3.model_copy(update={"num_generations": rollouts, "chunk": chunk})
    noise = torch.rand(len(paths), 1, rollouts, model.settings.max_summary_tokens, generator=torch.Generator().manual_seed(seed))
    optimiser.zero_grad()
    grpo.step(model, ranked, asked, noise)
    optimiser.step()


class Turns(TrainerCallback):
    """Times TRL's steps and takes ours between them."""

    def __init__(self, ours: Callable[[int], None]) -> None:
        self.ours, self.seconds = ours, {"TRL": [], "ours": []}

    def on_step_begin(self, *_, **__) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        self.seconds["TRL"].append(time.perf_counter() - self.began)
        began = time.perf_counter()
        self.ours(state.global_step)
        self.seconds["ours"].append(time.perf_counter() - began)


def against_trl(tokens: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of full RL steps: same prompts, G, summary length, KL to a reference and LoRA on both sides."""
    ours, (theirs, processor) = tiny(tokens), stock(tokens)
    stage3, banned = PROFILE.stage3, ours.banned_ids.tolist()
    ours.add_lora(stage3.lora, seed=0)
    optimiser = torch.optim.AdamW(ours.trainable().values(), lr=stage3.optimiser.lr)
    paths = pictures(QUERIES * (ROUNDS + WARMUP), tokens, folder, seed=tokens)
    turns = Turns(lambda step: rl_step(ours, paths[QUERIES * (step - 1) : QUERIES * step], optimiser, ROLLOUTS, step))
    request = PROFILE.encoder.summary_request
    rows = [{"prompt": [{"role": "user", "content": request}], "image": Image.open(path)} for path in paths]
    trainer = GRPOTrainer(
        model=theirs,
        processing_class=processor,
        reward_funcs=lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=stage3.lora.rank, lora_alpha=stage3.lora.alpha, target_modules=encoder.lora_targets(theirs)),
        callbacks=[turns],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            per_device_train_batch_size=BATCH,
            num_generations=ROLLOUTS,
            max_completion_length=PROFILE.encoder.max_summary_tokens,
            generation_kwargs={"suppress_tokens": banned},
            temperature=stage3.temperature,
            beta=stage3.beta,
            loss_type="grpo",
            learning_rate=stage3.optimiser.lr,
            max_steps=ROUNDS + WARMUP,
        ),
    )
    trainer.train()
    return {name: seconds[WARMUP:] for name, seconds in turns.seconds.items()}


@torch.no_grad()
def against_generate(tokens: int, folder: Path) -> dict[str, list[float]]:
    """Seconds for the embeddings of BATCH images after a greedy summary each."""
    model, (theirs, processor) = tiny(tokens), stock(tokens)
    tokenizer, cap = processor.tokenizer, model.settings.max_summary_tokens
    seconds: dict[str, list[float]] = {"generate and forward": [], "ours": [], "images and tower": []}
    for turn in range(ROUNDS + WARMUP):
        items = [Item("", path) for path in pictures(BATCH, tokens, folder, seed=1000 + turn)]
        began = time.perf_counter()
        mine = generation.generate(model, items)
        seconds["ours"].append(time.perf_counter() - began)
        began = time.perf_counter()
        prompts = model.prompts(items, model.settings.summary_request)
        images = [image_files.open_image(i.image) for i in items]
        inputs = processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
        written = theirs.generate(
            **inputs, max_new_tokens=cap, do_sample=False, suppress_tokens=model.banned_ids.tolist(), pad_token_id=tokenizer.pad_token_id
        )[:, inputs["input_ids"].shape[1] :]
        texts = [
            p + tokenizer.decode([t for t in row if t not in (model.end_id, model.pad_id)]) + model.settings.ret_token
            for p, row in zip(prompts, written.tolist(), strict=True)
        ]
        again = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        states = theirs(**again, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        vectors = encoder.normalised(states[:, -1])
        seconds["generate and forward"].append(time.perf_counter() - began)
        began = time.perf_counter()
        model.vision.image_features([i.image for i in items])
        seconds["images and tower"].append(time.perf_counter() - began)
        agree = float((mine.embeddings[:, 0] * vectors).sum(-1).median())
        if agree < 0.999:
            raise RuntimeError(f"the two ways do not compute the same: median cosine {agree:.4f}")
    return {name: values[WARMUP:] for name, values in seconds.items()}


def resident(line: str) -> float:
    """MB of this process: "VmRSS" now, "VmHWM" at its peak."""
    text = Path("/proc/self/status").read_text()
    return next(int(row.split()[1]) for row in text.splitlines() if row.startswith(line)) / 1024


def step_memory(rollouts: int) -> None:
    """Prints by how many MB one step with `rollouts` summaries a query rises above what the process holds before it."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny(256)
        model.add_lora(PROFILE.stage3.lora, seed=0)
        optimiser = torch.optim.AdamW(model.trainable().values(), lr=1e-4)
        paths = pictures(2 * QUERIES + 1, 256, Path(folder), seed=1)
        rl_step(model, paths[:1], optimiser, 2, seed=0)  # loads what the first step of a process loads
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of the past
        rl_step(model, paths[1:], optimiser, rollouts, seed=0, chunk=MEMORY_CHUNK)
        print(resident("VmHWM") - before)


def memory_growth() -> dict[int, float]:
    """MB that one step adds to the peak, each G in a process of its own."""
    return {
        g: float(subprocess.run([sys.executable, __file__, str(g)], check=True, capture_output=True, text=True).stdout.split()[-1])
        for g in MEMORY_GROUPS
    }


def speed_ratios(table: pd.DataFrame) -> Figure:
    """Speed as a multiple of the alternative's, with range over rounds and target of each comparison."""
    figure, ((axis,),) = figures.axes_of(size=(6.4, 0.6 + 0.6 * len(table)))
    ends = figures.spread(table, "ratio", "lowest ratio", "highest ratio")
    axis.barh(table["comparison"], table["ratio"], xerr=ends, height=0.5, color=figures.BLUE)
    axis.plot(table["target"], table["comparison"], "k|", markersize=22, label="target")
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_xlabel("times as fast (median, range of rounds)")
    axis.set_title(f"Stage 3 against the alternatives (n = {table['rounds'].min()} rounds)")
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=7)
    return figure


def main() -> None:
    distributed.start(PROFILE.threads)
    FOLDER.mkdir(parents=True, exist_ok=True)
    measured: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = {f"rl step, {tokens} visual tokens": against_trl(tokens, Path(folder)) for tokens in SIDES}
        runs |= {f"embedding, {tokens} visual tokens": against_generate(tokens, Path(folder)) for tokens in SIDES}
    for name, seconds in runs.items():
        theirs = next(side for side in seconds if side != "ours")
        ratios = [a / b for a, b in zip(seconds[theirs], seconds["ours"], strict=True)]
        measured.append(
            {
                "comparison": name,
                "against": theirs,
                "rounds": len(ratios),
                "theirs per s": round(BATCH / statistics.median(seconds[theirs]), 1),
                "ours per s": round(BATCH / statistics.median(seconds["ours"]), 1),
                "ratio": round(statistics.median(ratios), 2),
                "lowest ratio": round(min(ratios), 2),
                "highest ratio": round(max(ratios), 2),
                "target": TARGETS[name],
                "met": statistics.median(ratios) >= TARGETS[name],
            }
        )
        if tower := seconds.get("images and tower"):
            # both sides need this work, ours once and theirs twice: the larger its share, the closer the ratio is to two at most
            measured[-1]["share of images and tower in ours"] = round(statistics.median(tower) / statistics.median(seconds["ours"]), 2)
    few, many = memory_growth().items()
    growth, proportional = many[1] / few[1], many[0] / few[0]
    memory = {
        "comparison": f"peak memory of a step, G {few[0]} to {many[0]}",
        "MB": {str(g): round(mb) for g, mb in (few, many)},
        "growth": round(growth, 2),
        "target": round(proportional / 3, 2),
        "met": growth < proportional / 3,
    }
    files.write_whole(FOLDER / "rl.json", json.dumps({"speed": measured, "memory": memory}, indent=1) + "\n")
    speed_ratios(pd.DataFrame(measured)).savefig(FOLDER / "rl.png", dpi=110)
    print(json.dumps({"speed": measured, "memory": memory}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:]:
        step_memory(int(sys.argv[1]))
    else:
        main()
