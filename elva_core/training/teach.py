"""Teaching of the small backbones that the profiles cpu and smoke start from: to see, then to summarise.

They are taught what a real backbone already knows: to describe a drawing, a text, or both, in a few words.
The result is an ordinary pretrained folder that AutoProcessor and from_pretrained load. The chain never runs
this; `python -m elva_core teach` does, on a CPU or a GPU, and goes on where it was stopped.

    make(config.teaching("qwen2vl"), OUT, WORK, packages=Path("node_modules"))
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, dropout

from elva_core import config, distributed, files
from elva_core.data import mbeir, sources, styles
from elva_core.data.items import candidate_item, query_item
from elva_core.models import chat, encoder, small_models
from elva_core.models.encoder import Encoder
from elva_core.models.lineage import lineage
from elva_core.models.vision import VisionFeatures
from elva_core.retrieval import retriever
from elva_core.training import drawings, loop
from elva_core.training_settings import LoopSettings, TeachSettings
from elva_core.values import model_source

log = logging.getLogger("elva")
TURNS = ("image", "text", "image", "image,text")  # one modality per batch: less padding; images are harder


def make(
    settings: TeachSettings, out: Path, work: Path, *, packages: Path | None = None, device: str = "cpu"
) -> list[Path]:
    """Makes a backbone in the folder `out`, with teaching.json in it: how it was taught, how it reads.

    A run that was stopped goes on from its checkpoint in `work`, if the values are the same.

    Args:
        packages: the node_modules folder of the styles' npm packages.

    Returns:
        the copies of `settings.keep`, <out>-<step>, and `out`.

    Raises:
        FileExistsError: `out` is there. ElvaDataError: a style's package is missing.
        loop.DivergedError: see loop.train_loop.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already; name another folder, or move it away")
    profile, first = config.load(settings.profile), settings.first and model_source(settings.first)
    parts = (settings, profile.encoder, profile.data)
    # without defaults: a new value leaves what was begun
    key = hashlib.sha256("".join(part.model_dump_json(exclude_defaults=True) for part in parts).encode())
    key.update(json.dumps(lineage(first)).encode() if first else b"")
    work = work / f"teach-{key.hexdigest()[:16]}"
    if not (work / "data").is_dir():
        shutil.rmtree(work / "data.partial", ignore_errors=True)
        sources.write(profile.data, work / "data.partial", seed=settings.seed)
        (work / "data.partial").rename(work / "data")
    root, _ = sources.locate(work / "data")

    taught = _untaught(settings, profile.encoder, root, first)
    taught.model.to(device)
    shown = drawings.read(root, settings, work / "styles", packages)
    shown = replace(shown, pictures=shown.pictures.to(device))
    log.info("%d drawings of %d emoji", len(shown.paths), len(shown.numbers))
    made = {"settings": settings.model_dump(mode="json"), "made_by": f"elva_core teach, on {device}"}
    of_style = {name: sum(p.parent.name == name for p in shown.paths) for name in settings.styles}
    made["styles"] = {name: styles.about(packages, name) | {"drawings": n} for name, n in of_style.items()}
    if not (work / "joint/checkpoint").is_dir():  # which holds the tower, too
        teach_tower(taught, shown, settings, work / "tower")
    kept = partial(_save, taught, profile, root, made, out)
    teach_both(taught, shown, root, settings, work / "joint", keep=kept)
    _save(taught, profile, root, made, out)
    shutil.rmtree(work)
    return [*(_kept(out, step) for step in settings.keep), out]


def _kept(out: Path, step: int) -> Path:
    return out.with_name(f"{out.name}-{step}")


def _untaught(
    settings: TeachSettings, prompts: config.EncoderSettings, root: mbeir.Root, first: str | None
) -> Encoder:
    if first:
        model, processor = small_models.build_from(first, settings.sizes, seed=settings.seed)
    else:
        texts = [c.text for c in root.pool("", "train", "global") if c.text]
        texts += [query_item(root, q).text for q in root.union_train()]
        # the prompt's own words must be whole tokens, as they are in a large vocabulary
        requests = (prompts.eol_request, prompts.summary_request)
        frame = [f"user\n{text}\n{request}\nassistant\n" for text in texts[:2000] for request in requests]
        model, processor = small_models.build(texts + frame, settings.sizes, seed=settings.seed)
    if prompts.ret_token not in processor.tokenizer.get_vocab():
        encoder.add_ret_token(model, processor.tokenizer, prompts.ret_token)
    return Encoder(model, processor, prompts)


def _features(
    taught: Encoder,
    shown: drawings.Drawings,
    chosen: Sequence[int],
    settings: TeachSettings,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tower's features (n, tokens, D) of redrawn drawings, with gradient, and the grid of each image."""
    images = drawings.redrawn(shown.pictures[torch.as_tensor(chosen)], settings.redraw, rng)
    side = settings.sizes.image_side // settings.sizes.patch
    grid = torch.tensor([1, side, side], device=images.device)
    rows = drawings.patch_rows(images, taught.processor.image_processor)
    out = taught.backbone.model.get_image_features(rows, grid.expand(len(images), 3))
    return torch.stack(list(out.pooler_output)), grid


@contextmanager
def _lesson(taught: Encoder, settings: TeachSettings, rng: np.random.Generator) -> Iterator[None]:
    """Dropout in the tower, drawn from `rng`, and products in bfloat16 if asked for."""
    torch.manual_seed(int(rng.integers(2**62)))
    blocks = taught.backbone.model.visual.blocks
    drop = [
        part.register_forward_hook(lambda _, __, out: dropout(out, settings.dropout))
        for block in blocks
        for part in (block.attn, block.mlp)
    ]
    try:
        with torch.autocast(taught.device.type, torch.bfloat16, enabled=settings.bfloat16):
            yield
    finally:
        for hook in drop:
            hook.remove()


def _learn(
    parameters: dict[str, torch.nn.Parameter],
    step_fn: Callable[[int], dict[str, float]],
    lesson: LoopSettings,
    folder: Path,
    tower_rate: float = 1.0,
) -> list[dict]:
    """One lesson, by Muon for the matrices inside the blocks and AdamW for the rest.

    AdamW alone takes twice the steps.
    """
    groups: dict[bool, list[dict]] = {}
    for name, parameter in parameters.items():
        inside = parameter.ndim == 2 and bool(re.search(r"(layers|blocks|merger)\.", name))
        rate = tower_rate if name.startswith("visual.") else 1.0
        groups.setdefault(inside, []).append({"params": [parameter], "rate": rate})
    lr, decay = lesson.optimiser.lr, lesson.optimiser.weight_decay
    muon = torch.optim.Muon(groups[True], lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups[False], lr=lr, betas=(0.9, 0.98), weight_decay=decay)
    return loop.train_loop(
        parameters, step_fn, lesson.steps, lesson.optimiser, folder, optimisers=[adamw, muon]
    )


def teach_tower(
    taught: Encoder, shown: drawings.Drawings, settings: TeachSettings, folder: Path
) -> list[dict]:
    """The tower learns to name the grains of a drawing: softmax over all grain texts, several may be right.

    A stand-in for the pretrained tower of Qwen2-VL; the linear readout is thrown away.
    """
    names = sorted({text for grains in shown.grains for _, text in grains})
    column = {text: i for i, text in enumerate(names)}
    targets = torch.zeros(len(shown.grains), len(names))
    for row, grains in enumerate(shown.grains):
        targets[row, [column[text] for _, text in grains]] = 1
    readout = torch.nn.Linear(taught.backbone.config.get_text_config().hidden_size, len(names))
    for parameter in readout.to(taught.device).parameters():
        torch.nn.init.zeros_(parameter)
    tower = taught.backbone.model.visual.requires_grad_(True)
    parameters = {f"visual.{n}": p for n, p in tower.named_parameters()}
    parameters |= {f"readout.{n}": p for n, p in readout.named_parameters()}

    def step_fn(step: int) -> dict[str, float]:
        rng = distributed.rng_for(settings.seed, "tower", step)
        chosen = rng.integers(len(targets), size=settings.tower.batch)
        with _lesson(taught, settings, rng):
            log_p = (
                readout(_features(taught, shown, chosen, settings, rng)[0].mean(1)).float().log_softmax(-1)
            )
        loss = -(targets[chosen].to(log_p.device) * log_p).sum() / len(chosen)
        loss.backward()
        return {"loss": float(loss.detach())}

    rows = _learn(parameters, step_fn, settings.tower, folder)
    tower.requires_grad_(False)
    return rows


def teach_both(
    taught: Encoder,
    shown: drawings.Drawings,
    root: mbeir.Root,
    settings: TeachSettings,
    folder: Path,
    keep: Callable[..., None],
) -> list[dict]:
    """Tower and language model learn to write the grains of an input as a summary.

    Inputs are the train split's queries and candidates, each with any of the drawings of its emoji.

    Args:
        keep: is called with step=n after the steps of `settings.keep`.
    """
    records: dict[str, list[mbeir.Query | mbeir.Candidate]] = {modality: [] for modality in TURNS}
    for r in (*root.union_train(), *root.pool("", "train", "global")):
        if mbeir.grains(r) and (not r.image or Path(r.image).stem in shown.numbers):
            records[r.modality].append(r)
    tokenizer, request = taught.processor.tokenizer, taught.settings.summary_request
    model, number = taught.backbone.requires_grad_(True), {path: n for n, path in enumerate(shown.paths)}
    parameters = {f"visual.{n}": p for n, p in model.model.visual.named_parameters()}
    parameters |= dict(model.model.language_model.named_parameters())

    def item(record: mbeir.Query | mbeir.Candidate, rng: np.random.Generator):
        is_query = isinstance(record, mbeir.Query)
        prompt = {"prompt_index": int(rng.integers(4))} if is_query else {}
        made = query_item(root, record, **prompt) if is_query else candidate_item(root, record)
        return (
            replace(made, image=shown.paths[rng.choice(shown.numbers[made.image.stem])])
            if made.image
            else made
        )

    def step_fn(step: int) -> dict[str, float]:
        if step in settings.keep:
            keep(step=step)
        rng = distributed.rng_for(settings.seed, "joint", step)
        rows = records[TURNS[step % len(TURNS)]]
        chosen = [rows[i] for i in rng.integers(len(rows), size=settings.joint.batch)]
        items = [item(r, rng) for r in chosen]

        def seen(paths: Sequence[Path]) -> list[VisionFeatures]:
            if not paths:
                return []
            features, grid = _features(taught, shown, [number[p] for p in paths], settings, rng)
            return [VisionFeatures(f, grid) for f in features]

        captions = tokenizer([mbeir.caption(r) for r in chosen], add_special_tokens=False).input_ids
        endings = [[*caption, taught.end_id] for caption in captions]
        labels = chat.left_padded(endings, -100).to(taught.device)
        written = labels != -100
        taught.vision.images = seen  # in the place of kept features, which have no gradient
        with _lesson(taught, settings, rng):
            states = taught.states(taught.batch(items, request, endings))[:, -labels.shape[1] - 1 : -1]
            logits = model.lm_head(states[written]).float()
        del taught.vision.images
        loss = cross_entropy(logits, labels[written], label_smoothing=settings.label_smoothing)
        loss.backward()
        return {"loss": float(loss.detach())}

    rows = _learn(parameters, step_fn, settings.joint, folder, settings.tower_rate)
    model.requires_grad_(False)
    return rows


@torch.no_grad()
def _save(
    taught: Encoder,
    profile: config.Settings,
    root: mbeir.Root,
    made: dict,
    out: Path,
    *,
    step: int | None = None,
) -> None:
    """Writes the folder whole, in half precision, with teaching.json; one that is there stays."""
    out = out if step is None else _kept(out, step)
    if out.is_dir():
        return
    model, partial_folder = copy.deepcopy(taught.backbone).half(), out.with_name(out.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    words = model.get_input_embeddings().weight
    words[taught.ret_id] = words[: taught.ret_id].mean(0)  # as in a model that has never seen it
    model.save_pretrained(partial_folder)
    taught.processor.save_pretrained(partial_folder)
    written = encoder.load(partial_folder, profile.encoder, device=str(taught.device))
    record = made | {"joint_steps": made["settings"]["joint"]["steps"] if step is None else step}
    record["sha256"] = lineage(partial_folder)[-1]["sha256"]
    record["reading"] = reading(written, root, batch=profile.evaluation.batch)
    files.write_whole(partial_folder / "teaching.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
    partial_folder.rename(out)


def reading(model: Encoder, root: mbeir.Root, *, batch: int) -> dict[str, dict[str, float]]:
    """Reading accuracy on the drawings of val and test: shares of right greedy summaries, by vendor.

    Returns:
        {vendor: {"drawings": number of them, "exact": share of summaries that are the caption, "new": that
        of compositions that the train split does not have, and for each kind of grain the share of
        summaries that name it}}
    """
    known = {Path(c.image).stem for c in root.pool("", "train", "global") if c.modality == "image"}
    out = {}
    for split in ("val", "test"):
        pool = [c for c in root.pool("", split, "global") if c.modality == "image" and mbeir.grains(c)]
        _, written = retriever.encode(model, [candidate_item(root, c) for c in pool], batch=batch)
        rights: dict[str, dict[str, list[bool]]] = {}
        for c, text in zip(pool, written, strict=True):
            right = rights.setdefault(Path(c.image).parent.name, {})
            right.setdefault("exact", []).append(text == mbeir.caption(c))
            if Path(c.image).stem not in known:
                right.setdefault("new", []).append(text == mbeir.caption(c))
            for kind, grain in mbeir.grains(c):
                # as whole words: "man" is not in "woman", "light skin tone" not in "medium-light skin tone"
                named = re.search(rf"(?<![\w-]){re.escape(grain)}(?![\w-])", text, re.IGNORECASE)
                right.setdefault(kind, []).append(bool(named))
        for vendor, right in rights.items():
            shares = {what: round(float(np.mean(values)), 4) for what, values in right.items()}
            out[vendor] = {"drawings": len(right["exact"]), **shares}
    return out
