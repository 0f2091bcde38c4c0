"""Frames of video files: which of them are looked at, how they are decoded, and writing short clips.

frames = read(Clip(Path("videos/video7020.mp4"), 8))
frames.pixels    # (8, 3, height, width)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from elva_core.data.images import decoding, guard_size
from elva_core.files import ElvaDataError, whole

if TYPE_CHECKING:
    import av  # loaded where a clip is opened: a machine that reads images alone need not have it

FORMATS = "mov,matroska,webm,avi"  # no playlist, which could name other files
TRUNCATED = 0.9  # of the frames that the header declares; AVI counts a few that hold nothing
QUALITY = {"qmin": "2", "qmax": "2"}  # MPEG-4's finest quantiser but one


@dataclass(frozen=True, slots=True)
class Clip:
    """A video file, and how many of its frames are looked at."""

    path: Path
    frames: int


@dataclass(frozen=True, slots=True)
class Frames:
    """Decoded frames of a file.

    pixels: (n, 3, H, W) uint8, RGB, upright. indices: which of the file's `total` frames. rate: of the file,
    per second.
    """

    pixels: np.ndarray
    indices: list[int]
    total: int
    rate: float

    @property
    def sampled_rate(self) -> float:
        """Number of these frames in a second."""
        return len(self.indices) / self.total * self.rate


def sampled(total: int, count: int) -> list[int]:
    """The middle frame of each of `count` equal segments; a file with fewer frames gives some more than once.

    LamRA takes the first, the last and evenly spaced ones between them, rounded. Middles stay clear of
    fades and titles, and one frame alone is the middle one.

    >>> sampled(10, 5), sampled(2, 4), sampled(9, 1)
    ([1, 3, 5, 7, 9], [0, 0, 1, 1], [4])
    """
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def read(clip: Clip) -> Frames:
    """The sampled frames of a file.

    It is decoded twice, for only that tells how many frames there are, and only the sampled ones are kept.

    Raises:
        ElvaDataError: missing, truncated, not a video, too large, or too elongated; names the file.
    """
    with decoding(f"video {clip.path}"):
        total, rate = _measured(clip.path)
        indices = sampled(total, clip.frames)
        wanted = set(indices)
        pixels = {i: _upright(frame) for i, frame in enumerate(_decoded(clip.path)) if i in wanted}
    return Frames(np.stack([pixels[i] for i in indices]).transpose(0, 3, 1, 2), indices, total, rate)


def _opened(path: Path) -> av.container.InputContainer:
    import av

    return av.open(str(path), options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})


def _decoded(path: Path) -> Iterator[av.VideoFrame]:
    with _opened(path) as container:
        yield from container.decode(video=0)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, RGB, turned and mirrored as the file's display matrix says.

    Of its nine numbers four, (a, b, c, d), send a pixel at (x, y) to (a x + c y, b x + d y); a telephone
    held upright writes those of a quarter turn (ISO/IEC 14496-12, 8.3.2). Other angles count as the nearest
    quarter.
    """
    pixels = frame.to_ndarray(format="rgb24")
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV has no name for something else that comes with the frame
        return np.rot90(pixels, round(frame.rotation / 90))
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(np.int64)
    along, down = a, d  # what x and y of the upright frame are counted by
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, along, down = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if down < 0 else 1, :: -1 if along < 0 else 1]


def _measured(path: Path) -> tuple[int, float]:
    """Number of frames, and frames per second."""
    with _opened(path) as container:
        if not container.streams.video:
            raise ElvaDataError(f"video {path} holds no video stream; replace the file")
        stream = container.streams.video[0]
        guard_size(f"video {path}", stream.width, stream.height)
        declared, rate = stream.frames, stream.average_rate or stream.guessed_rate
    total = sum(1 for _ in _decoded(path))
    if not total or not rate or total < TRUNCATED * declared:
        counts = f"{total} frames decode, its header declares {declared}"
        raise ElvaDataError(f"video {path} is truncated: {counts}; replace the file")
    return total, float(rate)


def write(path: Path, frames: Sequence[Image.Image], *, rate: int) -> None:
    """A small MP4 of RGB frames with even sides; whole or not at all, and the same bytes for the same frames.

    Args:
        rate: frames per second.
    """
    import av

    with whole(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate, options=QUALITY)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
