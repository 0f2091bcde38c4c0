"""Pre-training of the small backbones before the paper's stages: to see, then to summarise.

They are taught what a real backbone already knows: to describe an image, a text, or an image with a change,
in a short summary. The result is an ordinary pretrained folder that AutoProcessor and from_pretrained load.

    folder = teach.ensure(settings.backbone, settings.encoder, root, cache)
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from elva_core import distributed
from elva_core.config import BackboneSettings, EncoderSettings
from elva_core.data import mbeir
from elva_core.data.items import candidate_item, query_item
from elva_core.models import chat, encoder, small_models
from elva_core.models.encoder import Encoder
from elva_core.training import loop
from elva_core.training_settings import LoopSettings, TeachSettings
from elva_core.values import model_source

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
        first: folder of a small Qwen2-VL that was taught here, whose words a small Qwen2.5-VL takes over;
            None teaches the Qwen2-VL itself.
    """
    if settings.path:
        return model_source(settings.path)
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
    teach_vision(taught, root, candidates, settings, work / "vision")
    teach_language(taught, root, [*queries, *candidates], settings, work / "language")
    model.save_pretrained(work / "model")
    processor.save_pretrained(work / "model")
    (work / "model").rename(folder)
    shutil.rmtree(work)
    return str(folder)


def _learn(
    parameters: dict[str, torch.nn.Parameter],
    step_fn: Callable[[int], dict[str, float]],
    lesson: LoopSettings,
    folder: Path,
) -> list[dict]:
    """One lesson, by Muon for the matrices inside the blocks and AdamW for the rest.

    AdamW alone takes twice the steps.
    """
    blocks = [n for n, p in parameters.items() if p.ndim == 2 and re.search(r"(layers|blocks|merger)\.", n)]
    inside = [parameters[n] for n in blocks]
    rest = [p for n, p in parameters.items() if n not in set(blocks)]
    rate, decay = lesson.optimiser.lr, lesson.optimiser.weight_decay
    muon = torch.optim.Muon(inside, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    return loop.train_loop(
        parameters, step_fn, lesson.steps, lesson.optimiser, folder, optimisers=[adamw, muon]
    )


def redrawn(
    pixels: torch.Tensor, grids: torch.Tensor, *, patch: int, teach: TeachSettings, rng: np.random.Generator
) -> torch.Tensor:
    """Patch rows of randomly scaled, turned, shifted and lit images, against overfitting to five vendors.

    Args:
        pixels: (patches, 6 * patch * patch), the processor's order: 2x2 blocks, then channels and two frames.
        grids: (images, 3) patches per side.
    """
    out, owner = pixels.clone(), torch.repeat_interleave(torch.arange(len(grids)), grids.prod(-1))
    for _, height, width in grids.unique(dim=0).tolist():
        members = (grids[:, 1] == height) & (grids[:, 2] == width)
        rows, n = members[owner], int(members.sum())
        # back to pictures: the processor's order of patches undone, and done again below
        blocks = pixels[rows].view(n, height // 2, width // 2, 2, 2, 6, patch, patch)
        image = blocks.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(n, 6, height * patch, width * patch)
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
    settings: BackboneSettings,
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
    teach, seed, patch = settings.teach, settings.seed, taught.processor.image_processor.patch_size
    batch = min(teach.vision.batch, len(images))

    def step_fn(step: int) -> dict[str, float]:
        rng = distributed.rng_for(seed, "redrawn", step)
        taught.vision.augment = partial(redrawn, patch=patch, teach=teach, rng=rng)
        epoch, place = divmod(step * batch, len(images) // batch * batch)
        order = distributed.rng_for(seed, "vision order", epoch).permutation(len(images))
        chosen = [images[i] for i in order[place : place + batch]]
        targets = torch.zeros(batch, len(names))
        for row, c in enumerate(chosen):
            for _, text in mbeir.grains(c):
                targets[row, column[text]] = 1
        pixels = taught.vision.pixels([root.image_path(c.image) for c in chosen])
        features = taught.backbone.model.get_image_features(*pixels).pooler_output
        log_p = readout(torch.stack([f.mean(0) for f in features])).log_softmax(-1)
        loss = -(targets * log_p).sum() / batch
        loss.backward()
        return {"loss": float(loss.detach())}

    rows = _learn(parameters, step_fn, teach.vision, folder)
    tower.requires_grad_(False)
    taught.vision.augment = None
    return rows


def teach_language(
    taught: Encoder,
    root: mbeir.Root,
    records: Sequence[mbeir.Query | mbeir.Candidate],
    settings: BackboneSettings,
    folder: Path,
) -> list[dict]:
    """The language model learns to write the grains of its input as a summary; the tower is frozen by now."""
    by_modality = {
        modality: [r for r in records if r.modality == modality and mbeir.grains(r)]
        for modality in mbeir.MODALITIES
    }
    tokenizer, request = taught.processor.tokenizer, taught.settings.summary_request
    language, lesson = taught.backbone.model.language_model.requires_grad_(True), settings.teach.language
    # one modality per batch: less padding; images are the harder ones
    turns = ("image", "text", "image", "image,text")

    def step_fn(step: int) -> dict[str, float]:
        rng = distributed.rng_for(settings.seed, "language", step)
        rows = by_modality[turns[step % len(turns)]]
        chosen = [rows[i] for i in rng.integers(len(rows), size=lesson.batch)]
        items = [
            query_item(root, r, prompt_index=int(rng.integers(4)))
            if isinstance(r, mbeir.Query)
            else candidate_item(root, r)
            for r in chosen
        ]
        captions = tokenizer([mbeir.caption(r) for r in chosen], add_special_tokens=False).input_ids
        endings = [[*caption, taught.end_id] for caption in captions]
        labels = chat.left_padded(endings, -100)
        states = taught.states(taught.batch(items, request, endings))[:, -labels.shape[1] - 1 : -1]
        written = labels != -100
        logits = taught.backbone.lm_head(states[written])
        loss = torch.nn.functional.cross_entropy(logits, labels[written])
        loss.backward()
        return {"loss": float(loss.detach())}

    rows = _learn(dict(language.named_parameters()), step_fn, lesson, folder)
    language.requires_grad_(False)
    return rows
