"""The drawings that a small backbone is taught from: read, redrawn at random, cut into patches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from elva_core import files
from elva_core.data import mbeir, styles
from elva_core.data.images import open_image
from elva_core.training_settings import RedrawSettings, TeachSettings


@dataclass(frozen=True)
class Drawings:
    """The drawings to teach from: pictures (N, 3, side, side), uint8, of files, and the grains of each.

    numbers: code points of an emoji -> those of its drawings.
    """

    paths: list[Path]
    pictures: torch.Tensor
    grains: list[list[tuple[str, str]]]
    numbers: dict[str, list[int]]


def read(root: mbeir.Root, settings: TeachSettings, folder: Path, packages: Path | None) -> Drawings:
    """Drawings of the vendors and styles, of the emoji of the train split; `folder` is for rendered ones."""
    pool = [c for c in root.pool("", "train", "global") if c.modality == "image" and mbeir.grains(c)]
    grains = {Path(c.image).stem: mbeir.grains(c) for c in pool}
    paths = [root.image_path(c.image) for c in pool if Path(c.image).parent.name in settings.vendors]
    side = settings.sizes.image_side
    for style in settings.styles:
        if packages is None:
            raise files.ElvaDataError(f"style {style}: give --styles, a folder that has it")
        paths += styles.render(packages, style, grains, folder / style, side=side)
    pictures = [np.asarray(open_image(p).resize((side, side), Image.Resampling.BICUBIC)) for p in paths]
    numbers: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        numbers.setdefault(path.stem, []).append(number)
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return Drawings(paths, stacked, [grains[p.stem] for p in paths], numbers)


def redrawn(pictures: torch.Tensor, settings: RedrawSettings, rng: np.random.Generator) -> torch.Tensor:
    """Pictures turned, sheared, scaled, recoloured, blurred or sharpened, some with a hole, at random.

    Args:
        pictures: (n, 3, side, side), uint8.

    Returns:
        the same shape, float32 from 0 to 1.
    """
    (n, *_, side), device, warp = pictures.shape, pictures.device, settings.warp

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, size=(n, *shape)).astype("float32")).to(device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(n, *shape)).astype("float32")).to(device) * settings.jitter

    turn, shear, right, down = (warp * strength * uniform(-1, 1) for strength in (1.5, 0.8, 0.8, 0.8))
    scale, aspect = (1 + warp * strength * uniform(-1, 1) for strength in (1.2, 0.7))
    cos, sin = turn.cos() * scale, turn.sin() * scale
    rows = [torch.stack([cos * aspect, shear - sin, right], 1), torch.stack([sin, cos / aspect, down], 1)]
    grid = affine_grid(torch.stack(rows, 1), list(pictures.shape), align_corners=False)
    # of the negative: what comes in from outside is white
    image = 1 - grid_sample(1 - pictures.float() / 255, grid, align_corners=False)
    mean = image.mean((2, 3), keepdim=True)
    gain = 1 + normal(1, 1, 1) + 0.5 * normal(3, 1, 1)
    image = (image - mean) * gain + mean + 0.3 * normal(3, 1, 1)
    kernel = torch.tensor([0.25, 0.5, 0.25], device=device)
    kernel = torch.outer(kernel, kernel).expand(3, 1, 3, 3)
    blurred = conv2d(pad(image, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    image = image + (blurred - image) * uniform(-0.7, 1, 1, 1, 1) * settings.blur
    place = torch.linspace(0, 1, side, device=device)
    high, wide = ((place - uniform(0, 1, 1)).abs() < 0.11 for _ in range(2))
    hole = high[:, :, None] & wide[:, None, :] & (uniform(0, 1, 1, 1) < settings.holes)
    return image.masked_fill(hole[:, None], 1.0).clamp(0, 1)


def patch_rows(images: torch.Tensor, processor) -> torch.Tensor:
    """(n, 3, side, side) from 0 to 1 -> (n * patches, values) in the image processor's order: 2x2 blocks."""
    images = processor.normalize(images, processor.image_mean, processor.image_std)
    sizes = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    return processor.patchify(images, *sizes)[0].flatten(0, 1)
