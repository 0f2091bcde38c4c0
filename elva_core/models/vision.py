"""Vision features of images and clips by the frozen tower of Qwen2-VL and Qwen2.5-VL, which are kept.

The tower computes in fewer, larger operations than in transformers; its features are the same.

    vision = Vision(model, processor, keep=True)
    features = vision.images([Path("a.png")])[0].features    # (patches after merging, D)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.image_utils import SizeDict

from elva_core.data.frames import Clip, Frames
from elva_core.data.frames import read as read_clip
from elva_core.data.images import open_image
from elva_core.data.items import Item

# Models whose features can be spliced: one token stands for an image, and only the first layer sees features
SPLICED = ("qwen2_vl", "qwen2_5_vl")
IMAGES_AT_ONCE = 64  # in one call of the tower
CLIPS_AT_ONCE = 8  # of 12 frames take three quarters of the memory of 64 images
# transformers hands the lengths of packed images only to implementations with "flash" in their name
VISION_ATTENTION = "flash_by_sdpa"


Stamp = tuple[int | None, int | None]  # size in bytes and time of change in ns; None where no file is


def stamp(source: Path | Clip) -> Stamp:
    """Size and time of change of a file, which tell an overwritten one without reading it.

    A missing file has one, too: it is refused where it is opened.
    """
    path = source.path if isinstance(source, Clip) else source
    if not path.is_file():
        return None, None
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _changed(sources: Sequence[Path | Clip], kept: Mapping[Path | Clip, tuple[Stamp, object]]) -> dict:
    """Distinct sources, with the stamp of their file, of which nothing is kept or whose file has changed."""
    stamps = {s: stamp(s) for s in dict.fromkeys(sources)}
    return {s: now for s, now in stamps.items() if s not in kept or kept[s][0] != now}


def moved(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pixels on a device; on the way to a card in pinned memory, so that the host need not wait."""
    return pixels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pixels.to(device)


class VisionFeatures(NamedTuple):
    """Features of an image or a clip by the vision tower.

    features: (n, D). grid: (3,) patches in time, height, width. seconds: from one step in time to the next;
    an image has one step.
    """

    features: torch.Tensor
    grid: torch.Tensor
    seconds: float = 1.0


class Vision:
    """The vision tower of one model with its image and video processors.

    Args:
        model: a Qwen2-VL or Qwen2.5-VL of transformers; its tower is given the faster operations in place.
        keep: the features of each file and clip, until the file changes or `forget`.
    """

    def __init__(self, model, processor, *, keep: bool) -> None:
        self.model, self.processor, self.keep = model, processor, keep
        # file or clip -> what `stamp` said of its file, then what was made of it
        self._features: dict[Path | Clip, tuple[Stamp, VisionFeatures]] = {}
        self._in_step = False
        self.ahead = None  # elva_core.models.ahead.Ahead while images are made ready ahead
        # conv3d alone took a third of its time on a CPU; a bound method of a function cannot be pickled
        tower = model.model.visual
        tower.config._attn_implementation = VISION_ATTENTION
        tower.patch_embed.forward = partial(patches_by_matrix, tower.patch_embed)

    def images(self, paths: Sequence[Path]) -> list[VisionFeatures]:
        """Features of images, in their order; those that were kept are not computed again."""
        return self._kept_or_computed(paths, self.image_features, IMAGES_AT_ONCE)

    def clips(self, clips: Sequence[Clip]) -> list[VisionFeatures]:
        """Features of clips, in their order; those that were kept are not computed again."""
        return self._kept_or_computed(clips, self.clip_features, CLIPS_AT_ONCE)

    def forget(self) -> None:
        """Drops the features that were kept."""
        self._features.clear()

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Within it features are kept; behind it they are dropped, unless `keep`."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
            if not self.keep:
                self.forget()

    def _kept_or_computed(self, sources: Sequence, compute: Callable, at_once: int) -> list[VisionFeatures]:
        missing, fresh = _changed(sources, self._features), {}
        sought = list(missing)
        for start in range(0, len(sought), at_once):
            part = sought[start : start + at_once]
            fresh |= {s: (missing[s], f) for s, f in zip(part, compute(part), strict=True)}
        if self.keep or self._in_step:
            self._features |= fresh
        return [(fresh[s] if s in fresh else self._features[s])[1] for s in sources]

    @torch.no_grad()
    def image_features(self, paths: Sequence[Path]) -> list[VisionFeatures]:
        """One call of the tower on images."""
        pixels, grids = self.pixels(paths)
        return list(map(VisionFeatures, self.model.get_image_features(pixels, grids).pooler_output, grids))

    @torch.no_grad()
    def clip_features(self, clips: Sequence[Clip]) -> list[VisionFeatures]:
        """One call of the tower on clips."""
        frames, processor = [self._ready(clip) for clip in clips], self.processor.video_processor
        videos = [torch.from_numpy(f.pixels) for f in frames]
        # frames are never so many that their number should make them smaller
        inputs = processor(videos, do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        pixels, grids = inputs.pixel_values_videos, inputs.video_grid_thw
        features = self.model.get_video_features(pixels, grids).pooler_output
        seconds = [processor.temporal_patch_size / f.sampled_rate for f in frames]
        return list(map(VisionFeatures, features, grids, seconds))

    def pixels(self, paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch rows (patches, values) and grids (images, 3)."""
        device = self.model.device
        images = [moved(self._ready(path), device) for path in paths]
        inputs = self.processor.image_processor(images, do_resize=False, device=device, return_tensors="pt")
        return inputs.pixel_values.to(device), inputs.image_grid_thw.to(device)

    def _read(self, source: Path | Clip) -> torch.Tensor | Frames:
        """An image as `resized` gives it, or the frames of a clip."""
        return read_clip(source) if isinstance(source, Clip) else resized(self.processor, source)

    def _ready(self, source: Path | Clip) -> torch.Tensor | Frames:
        """An image or a clip, from a worker or opened here."""
        made = self.ahead.take(source) if self.ahead else None
        return made[1] if made and made[0] == stamp(source) else self._read(source)

    def keys(self, items: Sequence[Item], request: str) -> list[Path | Clip]:
        """Keys of what workers make ready for items: images and clips of which no features are kept."""
        kept = self._features if self.keep else {}  # those of a step are gone when another one comes
        return list(_changed([source for item in items for source in (*item.images, *item.clips)], kept))

    def prepared(self, source: Path | Clip) -> tuple[Stamp, torch.Tensor | Frames]:
        """A source made ready, in a worker."""
        return stamp(source), self._read(source)


def resized(processor, path: Path) -> torch.Tensor:
    """(3, height, width) uint8, as the processor resizes an image before it does the rest."""
    images, pixels = processor.image_processor, torch.from_numpy(np.array(open_image(path)))
    size = images.size if isinstance(images.size, SizeDict) else SizeDict(**images.size)
    factor = images.patch_size * images.merge_size
    return images.resize(pixels.permute(2, 0, 1)[None], size, images.resample, factor)[0]


def patches_by_matrix(self, rows: torch.Tensor) -> torch.Tensor:
    """`forward` of the patch embedding: a convolution whose stride is its kernel is a matrix product."""
    weight = self.proj.weight
    return torch.nn.functional.linear(rows.to(weight.dtype), weight.flatten(1), self.proj.bias)


def attend_packed(module, query, key, value, attention_mask, *, cu_seq_lens_q, scaling, **_):
    """Attention inside each image of a packed row, by one call per size of image.

    transformers makes one call per image.

    Args:
        query, key, value: (1, H, patches, d).
        cu_seq_lens_q: (images + 1,) first patch of each image, and the end.

    Returns:
        (1, patches, H, d), None.
    """
    lengths = cu_seq_lens_q.diff()
    sizes, owner, out = lengths.unique().tolist(), torch.repeat_interleave(lengths), torch.empty_like(query)
    for length in sizes:
        rows = (lengths == length)[owner] if len(sizes) > 1 else slice(None)  # a slice copies nothing
        packed = (x[0, :, rows].unflatten(1, (-1, length)) for x in (query, key, value))
        q, k, v = (x.transpose(0, 1) for x in packed)  # (images, H, n, d)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        out[0, :, rows] = attended.transpose(0, 1).flatten(1, 2)
    return out.transpose(1, 2), None


AttentionInterface.register(VISION_ATTENTION, attend_packed)
