"""Teaches the small backbone to see and to summarise, before any stage of the paper."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from elva_core import distributed
from elva_core.config import BackboneSettings, EncoderSettings, OptimiserSettings, TeachSettings
from elva_core.data import mbeir
from elva_core.data.items import Item, candidate_item, query_item
from elva_core.models import encoder, small_models
from elva_core.models.encoder import Encoder
from elva_core.training import loop

VERSION = "1"  # of what the teaching does: another one teaches anew


def ensure(
    settings: BackboneSettings,
    prompts: EncoderSettings,
    root: mbeir.Root,
    cache: Path,
    *,
    first: str | None = None,
) -> str:
    """Path of the pretrained folder that stages start from: a given one, or a small model taught here.

    The small model is kept under `cache` by the hash of everything it depends on, so it is taught once.

    Args:
        first: folder of a small Qwen2-VL that was taught here; then a Qwen2.5-VL with its words is taught. Without it, a Qwen2-VL.
    """
    if settings.path:
        return settings.path
    depends = settings.model_dump_json() + prompts.model_dump_json() + VERSION
    key = hashlib.sha256(depends.encode() + root.union_train_path().read_bytes())
    if first:  # its folder is named by its own hash
        key.update(Path(first).name.encode())
    folder = cache / f"backbone-{key.hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return str(folder)
    work = folder.with_name(folder.name + ".partial")
    queries, candidates = root.union_train(), root.pool("", "train", "global")
    if first:
        model, processor = small_models.build_second(first, settings.tiny, seed=settings.seed)
    else:
        texts = [c.text for c in candidates if c.text] + [root.query_text(q) for q in queries]
        # the prompt's own words must be whole tokens, as they are in a large vocabulary
        requests = (prompts.eol_request, prompts.summary_request)
        frame = [f"user\n{text}\n{request}\nassistant\n" for text in texts[:2000] for request in requests]
        model, processor = small_models.build(texts + frame, settings.tiny, seed=settings.seed)
    if prompts.ret_token not in processor.tokenizer.get_vocab():
        encoder.add_ret_token(model, processor.tokenizer, prompts.ret_token)
    taught = Encoder(model, processor, prompts)
    teach_vision(taught, root, candidates, settings.teach, settings.seed, work / "vision")
    teach_language(taught, root, queries, candidates, settings.teach, settings.seed, work / "language")
    model.save_pretrained(work / "model")
    processor.save_pretrained(work / "model")
    (work / "model").rename(folder)
    shutil.rmtree(work)
    return str(folder)


def _optimisers(
    parameters: dict[str, torch.nn.Parameter], optimiser: OptimiserSettings
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest: half the steps of AdamW alone (LOG.md)."""
    inside = {
        n: p
        for n, p in parameters.items()
        if p.ndim == 2 and ("layers." in n or "blocks." in n or "merger." in n)
    }
    rest = [p for n, p in parameters.items() if n not in inside]
    rate, decay = optimiser.lr, optimiser.weight_decay
    muon = torch.optim.Muon(inside.values(), lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=decay), muon]


def redrawn(
    pixels: torch.Tensor, grids: torch.Tensor, *, patch: int, teach: TeachSettings, rng: np.random.Generator
) -> torch.Tensor:
    """Patch rows of randomly scaled, turned, shifted and lit images: the model should learn more than five hands' habits.

    Args:
        pixels: (patches, 6 * patch * patch) in the processor's order: merged 2x2 blocks, then channels and two frames.
        grids: (images, 3) patches per side.
    """
    out, owner = pixels.clone(), torch.repeat_interleave(torch.arange(len(grids)), grids.prod(-1))
    for _, height, width in grids.unique(dim=0).tolist():
        members = (grids[:, 1] == height) & (grids[:, 2] == width)
        rows, n = members[owner], int(members.sum())
        image = (
            pixels[rows]
            .view(n, height // 2, width // 2, 2, 2, 6, patch, patch)
            .permute(0, 5, 1, 3, 6, 2, 4, 7)
        )
        image = image.reshape(n, 6, height * patch, width * patch)
        scale, turn, right, down = torch.from_numpy(rng.uniform(-teach.warp, teach.warp, size=(4, n))).float()
        cos, sin = turn.cos() * (1 + scale), turn.sin() * (1 + scale)
        matrix = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
        grid = torch.nn.functional.affine_grid(matrix, list(image.shape), align_corners=False)
        image = torch.nn.functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
        image = image.view(n, 6, height // 2, 2, patch, width // 2, 2, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
        out[rows] = image.reshape(-1, pixels.shape[1])
    gain, offset = (torch.from_numpy(rng.normal(size=(2, len(grids)))).float() * teach.jitter)[:, owner, None]
    return out * (1 + gain) + offset


def teach_vision(
    taught: Encoder,
    root: mbeir.Root,
    candidates: Sequence[mbeir.Candidate],
    teach: TeachSettings,
    seed: int,
    folder: Path,
) -> list[dict]:
    """The tower learns to name the grains of an image: softmax over all grain texts, several may be right.

    A stand-in for the pretrained tower of Qwen2-VL; the linear readout is thrown away.
    """
    images = [c for c in candidates if c.modality == "image" and mbeir.grains(c)]
    names = sorted({text for c in images for _, text in mbeir.grains(c)})
    column = {text: i for i, text in enumerate(names)}
    readout = torch.nn.Linear(taught.backbone.config.get_text_config().hidden_size, len(names))
    for parameter in readout.parameters():
        torch.nn.init.zeros_(parameter)
    tower = taught.backbone.model.visual.requires_grad_(True)
    parameters = dict(tower.named_parameters()) | {f"readout.{n}": p for n, p in readout.named_parameters()}
    lesson, batch = teach.vision, min(teach.vision.batch, len(images))
    patch = taught.processor.image_processor.patch_size

    def step_fn(step: int) -> dict[str, float]:
        taught.vision.augment = partial(
            redrawn, patch=patch, teach=teach, rng=distributed.rng_for(seed, "redrawn", step)
        )
        epoch, place = divmod(step * batch, len(images) // batch * batch)
        order = distributed.rng_for(seed, "vision order", epoch).permutation(len(images))
        chosen = [images[i] for i in order[place : place + batch]]
        targets = torch.zeros(batch, len(names))
        for row, c in enumerate(chosen):
            for _, text in mbeir.grains(c):
                targets[row, column[text]] = 1
        features = taught.backbone.model.get_image_features(
            *taught.vision.pixels([root.image_path(c.image) for c in chosen])
        ).pooler_output
        log_p = readout(torch.stack([f.mean(0) for f in features])).log_softmax(-1)
        loss = -(targets * log_p).sum() / batch
        loss.backward()
        return {"loss": float(loss.detach())}

    rows = loop.optimise(
        parameters,
        step_fn,
        lesson.steps,
        lesson.optimiser,
        folder,
        optimisers=_optimisers(parameters, lesson.optimiser),
    )
    tower.requires_grad_(False)
    taught.vision.augment = None
    return rows


def teach_language(
    taught: Encoder,
    root: mbeir.Root,
    queries: Sequence[mbeir.Query],
    candidates: Sequence[mbeir.Candidate],
    teach: TeachSettings,
    seed: int,
    folder: Path,
) -> list[dict]:
    """The language model learns to write the grains of its input as a summary; the tower is frozen by now."""
    known = {
        modality: [r for r in (*queries, *candidates) if r.modality == modality and mbeir.grains(r)]
        for modality in mbeir.MODALITIES
    }
    tokenizer, request = taught.processor.tokenizer, taught.settings.summary_request
    language = taught.backbone.model.language_model.requires_grad_(True)
    parameters, lesson = dict(language.named_parameters()), teach.language
    turns = (
        "image",
        "text",
        "image",
        "image,text",
    )  # one modality per batch: less padding; images are the harder ones

    def step_fn(step: int) -> dict[str, float]:
        rng = distributed.rng_for(seed, "language", step)
        rows = known[turns[step % len(turns)]]
        chosen = [rows[i] for i in rng.integers(len(rows), size=lesson.batch)]
        items: list[Item] = [
            query_item(root, r, prompt_index=int(rng.integers(4)))
            if isinstance(r, mbeir.Query)
            else candidate_item(root, r)
            for r in chosen
        ]
        endings = [
            [*tokenizer(mbeir.caption(r), add_special_tokens=False).input_ids, taught.end_id] for r in chosen
        ]
        width = max(map(len, endings))
        states = taught.states(taught.batch(items, request, endings))[:, -width - 1 : -1]
        labels = torch.tensor([[-100] * (width - len(e)) + e for e in endings])
        wanted = labels != -100
        loss = torch.nn.functional.cross_entropy(taught.backbone.lm_head(states[wanted]), labels[wanted])
        loss.backward()
        return {"loss": float(loss.detach())}

    rows = loop.optimise(
        parameters,
        step_fn,
        lesson.steps,
        lesson.optimiser,
        folder,
        optimisers=_optimisers(parameters, lesson.optimiser),
    )
    language.requires_grad_(False)
    return rows
