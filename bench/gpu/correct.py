"""Does a card compute what a CPU computes? Embeddings, log-probabilities, gradients of the stages, resume after a kill, search."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from material import Place, embedder, items, mixed, pairs, ranked, stock, vectors

from elva_core import config
from elva_core.data.items import Item
from elva_core.models import generation
from elva_core.models.arithmetic import ATTENTION
from elva_core.models.encoder import Encoder
from elva_core.retrieval import search
from elva_core.training import contrastive, grpo, loop
from elva_core.training.contrastive import Pair

BOUND = 1e-4  # of the largest number, or of the norm of a gradient, in float32
LENGTHS = (64, 65, 192)  # tokens: cuDNN's attention has given NaN where the length leaves 64 on division by 128
RESUMED = 1e-5
STEPS, KILLED_AT = 4, 2


def gradient(model: Encoder, lora, work: Callable[[], object]) -> torch.Tensor:
    """Gradient of one step by all parameters of an adapter with random weights, flat on the CPU.

    Args:
        work: trains; its loop makes one step and moves nothing.
    """
    taken: list[torch.Tensor] = []

    def once(parameters, step_fn, *_, **__):
        randomise(parameters)
        step_fn(0)
        taken.append(flat(parameters))
        return []

    with mock.patch.object(loop, "train_loop", once), mock.patch.object(Encoder, "merge_lora", lambda self: None):
        work()
    if not taken:  # not a loop, one step
        taken.append(flat(model.trainable()))
    model.model = model.model.unload()
    model.model.eval().requires_grad_(False)
    model.backbone.gradient_checkpointing_disable()
    return taken[0]


def randomise(parameters: dict[str, torch.nn.Parameter]) -> None:
    """The same small numbers on any device: LoRA's second matrices start at zero, and hide the first ones' gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(name for name in parameters if "lora_" in name):
            p = parameters[name]
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02)


def flat(parameters: dict[str, torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([p.grad.float().cpu().flatten() for _, p in sorted(parameters.items()) if p.grad is not None])


def readings(place: Place, model: Encoder, written: generation.Rollouts) -> dict[str, torch.Tensor]:
    """Everything that is compared, on the CPU in float32."""
    profile, device = place.profile, model.device
    mix = [item for pair in mixed(place, 6) for item in (pair.query, pair.candidate)]
    out = {"EOL embeddings": model.embed_eol(mix).detach()}
    acting, tokens, actions = mix[:4], written.tokens.to(device), written.actions.to(device)
    rollouts = generation.completed(model, acting, tokens, actions)
    out["log-probabilities"], out["embeddings at [RET]"] = rollouts.log_p, rollouts.embeddings

    def stage(drawn: list[Pair], **changes) -> torch.Tensor:
        changes |= {"steps": 1, "batch": len(drawn), "chunk": 4, "chunk_tokens": None, "lora": {"rank": 8, "dropout": 0.0}}
        s = profile.changed({"stage2": changes}).stage2
        work = lambda: contrastive.train(model, lambda *_: drawn, s, seed=1, folder=place.folder / "none")  # noqa: E731
        return gradient(model, s.lora, work)

    out["gradient of stage 2, EOL"] = stage(mixed(place, 8), ret_share=0.0)
    for length in LENGTHS:
        out[f"gradient of stage 1, {length} tokens"] = stage(of_length(model, length), ret_share=0.0)
    with mock.patch.object(contrastive.SummaryCache, "__call__", lambda self, asked, *_: [[40, 41, 42]] * len(asked)):
        out["gradient of stage 2, [RET]"] = stage(mixed(place, 8), ret_share=1.0)

    s = profile.changed({"stage3": {"gradient": "full", "chunk": 4, "num_generations": 2, "lora": {"rank": 8}}}).stage3
    model.add_lora(s.lora, seed=0)
    model.model.eval()
    randomise(model.trainable())
    rollouts = [generation.completed(model, acting[i : i + 2], tokens[i : i + 2], actions[i : i + 2]) for i in (0, 2)]
    gain = torch.tensor([[1.0, -1.0]] * 4, device=device)
    slope = torch.randn(4, 2, model.backbone.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(1)).to(device)
    out["gradient of stage 3"] = gradient(model, s.lora, lambda: grpo.learn(model, acting, rollouts, gain, slope, s))
    return {name: value.detach().float().cpu() for name, value in out.items()}


def of_length(model: Encoder, length: int) -> list[Pair]:
    """Eight pairs: the first of exactly so many tokens in its EOL prompt, the others short, so that padding masks almost all of a row."""
    request, tokenizer = model.settings.eol_request, model.processor.tokenizer
    frame = len(tokenizer(model.prompts([Item("0")], request)[0], add_special_tokens=False).input_ids) - 1
    if frame >= length:
        raise RuntimeError(f"the prompt alone has {frame} tokens, more than the {length} that are wanted")
    texts = ["0" * (length - frame), *(str(n) for n in range(1, 8))]  # a digit is a token
    if model.batch([Item(texts[0])], request).input_ids.shape[1] != length:
        raise RuntimeError("digits are no single tokens here")
    return [Pair(Item(text), Item(text + "0" if i else text), str(i), (str(i),)) for i, text in enumerate(texts)]


def error(measured: torch.Tensor, expected: torch.Tensor, name: str) -> float:
    """Relative: of the norm for gradients, else the largest difference over the largest number."""
    if name.startswith("gradient"):
        return float((measured - expected).norm() / expected.norm())
    return float((measured - expected).abs().max() / expected.abs().max())


def as_on_the_cpu(place: Place) -> dict:
    """In float32 within BOUND, in bfloat16 no further from float32 than twice a CPU's own bfloat16."""
    reference = embedder(place, "check", "float32", "cpu")
    acting = [item for pair in mixed(place, 2) for item in (pair.query, pair.candidate)]
    noise = torch.rand(4, 2, place.profile.encoder.max_summary_tokens, generator=torch.Generator().manual_seed(2))
    written = generation.generate(reference, acting, noise=noise)
    expected, weights = readings(place, reference, written), reference.backbone.state_dict()
    errors: list[dict[str, float]] = []
    for device, dtype in ((place.device, "float32"), ("cpu", "bfloat16"), (place.device, "bfloat16")):
        model = embedder(place, "check", dtype, device)
        model.backbone.load_state_dict(weights)
        seen = readings(place, model, written)
        errors.append({name: error(seen[name], expected[name], name) for name in expected})
        if dtype == "float32":
            again = generation.generate(model, acting, noise=noise).tokens.cpu()
            same = float((again == written.tokens).float().mean())
    float32, own, half = errors
    bounds = {name: 2 * own[name] + 1e-3 for name in own}
    wrong = [f"{name} in float32" for name, e in float32.items() if not e <= BOUND]
    wrong += [f"{name} in bfloat16" for name, e in half.items() if not e <= bounds[name]]
    return {"ok": not wrong, "differs": wrong, "float32": float32, "bfloat16": half, "bfloat16_bounds": bounds, "same_tokens": same}


def trained(place: Place, folder: Path, *, killed: bool = False) -> torch.Tensor:
    """Weights after a few steps of stage 2 with a checkpoint at each, flat; `killed` kills this process on the way."""
    model = embedder(place, "check", "float32")
    model.settings = model.settings.model_copy(update={"workers": 0})  # they would draw the last step at the first
    changes = {"steps": STEPS, "batch": 6, "chunk": 3, "chunk_tokens": None, "lora": {"rank": 8}, "optimiser": {"checkpoint_every": 1}}
    s = place.profile.changed({"stage2": changes}).stage2

    def draw(step: int, size: int) -> list[Pair]:
        if killed and step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return mixed(place, size, seed=100 * step)

    contrastive.train(model, draw, s, seed=1, folder=folder)
    return torch.cat([p.detach().cpu().flatten() for p in model.backbone.get_decoder().parameters()])


def resumes(place: Place) -> dict:
    """A run whose process is killed at a step and started again ends with the weights of one that was not."""
    folder = place.folder / "killed"
    command = [sys.executable, str(Path(__file__).parent), "--killed", str(folder), "--device", place.device, *["--tiny"] * place.tiny]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != -signal.SIGKILL or not (folder / "checkpoint").is_dir():
        raise RuntimeError(f"the run to be killed ended by itself ({done.returncode}): {done.stderr[-500:]}")
    off = float((trained(place, folder) - trained(place, place.folder / "whole")).abs().max())
    return {"ok": off <= RESUMED, "largest_difference": off}


def small_chain(place: Place) -> dict:
    """The laptop's backbone: losses of the stages' first steps on the card and on the CPU, and the search's answers."""
    profile, losses, step_s = config.load("smoke" if place.tiny else "cpu"), {}, {}
    first, _ = stock(place, "small", "float32", "cpu")
    for device in dict.fromkeys(("cpu", place.device)):
        model, processor = stock(place, "small", "float32", device, ATTENTION)
        model.load_state_dict(first.state_dict())
        here = Encoder(model, processor, profile.encoder)
        rows = {}
        for name, kinds in (("stage1", ("text", "text")), ("stage2", ("image", "text"))):
            s = getattr(profile, name).model_copy(update={"steps": 3})
            drawn = pairs(place, kinds, min(s.batch, 64), 7)
            rows[name] = contrastive.train(here, lambda *_, d=drawn: d, s, seed=1, folder=place.folder / f"small-{name}-{device}")
        s = profile.stage3.model_copy(update={"queries": 2 * profile.stage3.queries_per_step, "candidates": "mined"})
        queries = ranked(here, items(place, "image", s.queries), s.negatives.hard + s.negatives.random)
        rows["stage3"] = grpo.train(here, queries, s, seed=1, folder=place.folder / f"small-stage3-{device}")
        losses[device] = {name: made[0]["loss"] for name, made in rows.items()}
        step_s[device] = {name: round(min(row["step_time"] for row in made), 4) for name, made in rows.items()}
    off = {name: abs(losses[place.device][name] - loss) for name, loss in losses["cpu"].items()}
    wrong = [name for name, difference in off.items() if not difference < 1e-2]
    pool, queries = vectors(20_000), vectors(50)
    there, here = (search.exact(queries, pool, 20, [[i] for i in range(50)], device=device) for device in (place.device, "cpu"))
    if not (np.array_equal(there.rows, here.rows) and there.ranks == here.ranks):
        wrong.append("search")
    return {"ok": not wrong, "differs": wrong, "loss_off": off, "step_s": step_s}
