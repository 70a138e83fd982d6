"""Films of episodes: captions, the path that the policy intends, MP4 files, a grid of films.

All frames here are upright already (`sim.render.upright`).
"""

from __future__ import annotations

import contextlib
import math
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .. import schema
from ..files import atomic_path
from .colours import GREEN, ORANGE, RED, SKY

FPS = 30  # one frame per control step (20 Hz): half as fast again as in the simulator
# metres that the arm moves in a control step for a command of 1: a quarter of where the controller
# aims. Least squares over 8 steps of 30 demonstrations: 0.011, 0.0125, 0.0128 (x, y, z), r >= 0.95
_STEP = 0.0125
_TILE = 192  # pixels of an episode in a grid
_FONT_SIZE = 14


def intended_path(position: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Where ``actions`` (n, 7) would take an end effector at ``position`` (3,): (n, 3) in metres.

    A straight reckoning, without the arm's inertia and without what it may run into.
    """
    return position + _STEP * np.cumsum(np.asarray(actions)[:, :3], axis=0)


def draw_path(picture: np.ndarray, pixels: np.ndarray, executed: int) -> np.ndarray:
    """A picture (H, W, 3) with a dot at each of ``pixels`` (n, 2), column and row.

    The first ``executed`` are orange, what is predicted beyond the next look is blue. Pixels that
    are not finite or outside are left out.
    """
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    radius = max(2, round(picture.shape[0] / 128))
    for number, (column, row) in reversed(list(enumerate(np.asarray(pixels)))):
        if 0 <= column < picture.shape[1] and 0 <= row < picture.shape[0]:  # false for NaN
            draw.ellipse((column - radius, row - radius, column + radius, row + radius),
                         fill=ORANGE if number < executed else SKY, outline="black")
    return np.asarray(image)


def enlarge(picture: np.ndarray, scale: int) -> np.ndarray:
    """A uint8 picture (H, W, 3) as (scale * H, scale * W, 3)."""
    height, width = scale * picture.shape[0], scale * picture.shape[1]
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def caption_frame(frame: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """A uint8 frame (H, W, 3) under a black band that holds ``lines``.

    Returns uint8 ``(H + band, W, 3)``. Lines too long for the width are wrapped; the band's height
    follows from their number, so that frames of one video need lines of about the same length.
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
        raise ValueError(
            f"frame has shape {frame.shape} and type {frame.dtype}; expected (H, W, 3) and uint8"
        )
    from matplotlib.font_manager import findfont  # slow to import, and only captions need it

    height, width = frame.shape[:2]
    font = ImageFont.truetype(findfont("DejaVu Sans Mono"), _FONT_SIZE)  # comes with matplotlib
    margin, line_height = 8, 19
    columns = int((width - 2 * margin) / font.getlength("m"))
    text = [part for line in lines for part in textwrap.wrap(line, max(columns, 1)) or [""]]
    band = line_height * len(text) + margin if text else 0
    canvas = Image.new("RGB", (width, height + band), "black")
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(text):
        draw.text((margin, margin // 2 + i * line_height), line, font=font, fill="white")
    canvas.paste(Image.fromarray(frame), (0, band))
    return np.asarray(canvas)


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: int = FPS) -> Path:
    """Write uint8 frames (H, W, 3) of one size as an MP4 that browsers play.

    H.264 with 4:2:0 colours, whose sides are even: an odd one gets its last row or column twice.
    The environment runs at 20 Hz, so that 30 frames a second play 1.5 times as fast as life.
    Raises ``ValueError`` for no frame, another shape or type, and a path that is not ``.mp4``, and
    ``OSError`` where ffmpeg did not write all of it.
    """
    path, shape = Path(path), None
    if path.suffix != ".mp4":
        raise ValueError(f"path={str(path)!r} is not valid; expected a name that ends in .mp4")
    settings = dict(codec="libx264", pixelformat="yuv420p", quality=8, macro_block_size=2,
                    ffmpeg_params=["-movflags", "+faststart"])
    with atomic_path(path) as temporary:
        # closing: the writer's own context leaves ffmpeg running, and its file, after an error
        with contextlib.closing(imageio.get_writer(temporary, fps=fps, **settings)) as writer:
            for number, frame in enumerate(frames):
                shape = shape or frame.shape
                if frame.shape != shape or frame.ndim != 3 or frame.dtype != np.uint8:
                    raise ValueError(
                        f"frame {number} has shape {frame.shape} and type {frame.dtype}; expected "
                        f"uint8 (H, W, 3), all of one size (the first is {shape})"
                    )
                padding = ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0))
                writer.append_data(np.pad(frame, padding, mode="edge"))
        if shape is None:
            raise ValueError("frames is empty; expected at least one")
        import imageio_ffmpeg  # where it is missing, only films are

        # the writer says nothing of a disk that is full in the end
        try:
            found, _ = imageio_ffmpeg.count_frames_and_secs(str(temporary))
        except (RuntimeError, ValueError):
            found = 0
        if found != number + 1:
            raise OSError(f"{path} has {found} frames of {number + 1}; is the disk full?")
    return path


def write_grid(path: str | os.PathLike, films: Sequence[str | os.PathLike],
               labels: Sequence[str], successes: Sequence[bool], columns: int = 0) -> Path:
    """Films of `rollout.record_episode` side by side, agent view only, each under its label.

    When one has ended its last frame stays, framed green for a success and red for a failure.
    ``columns`` 0 makes about as many rows as columns.
    """
    columns = columns or math.ceil(math.sqrt(len(films)))
    rows = math.ceil(len(films) / columns)
    with contextlib.ExitStack() as stack:
        tiles = [_tiles(stack.enter_context(imageio.get_reader(film)), label, success)
                 for film, label, success in zip(films, labels, successes, strict=True)]

        def frames() -> Iterator[np.ndarray]:
            shown: list[np.ndarray | None] = [None] * (columns * rows)
            while True:
                new = [next(tile, None) for tile in tiles]
                if all(tile is None for tile in new):
                    return
                shown[:len(new)] = [now if now is not None else before
                                    for now, before in zip(new, shown, strict=False)]
                empty = np.zeros_like(shown[0])
                filled = [empty if tile is None else tile for tile in shown]
                yield np.concatenate([np.concatenate(filled[i * columns:(i + 1) * columns], axis=1)
                                      for i in range(rows)])

        return write_video(path, frames())


def _tiles(reader, label: str, success: bool) -> Iterator[np.ndarray]:
    """A film's agent view, small; the last frame is framed."""
    before = None
    for frame in reader.iter_data():
        if before is not None:
            yield caption_frame(before, [label])
        side = frame.shape[1] // len(schema.CAMERAS)  # a square at the lower left
        view = Image.fromarray(frame[-side:, :side])
        before = np.asarray(view.resize((_TILE, _TILE), Image.Resampling.LANCZOS))
    framed = Image.fromarray(before)
    ImageDraw.Draw(framed).rectangle((0, 0, _TILE - 1, _TILE - 1), width=_TILE // 32,
                                     outline=GREEN if success else RED)
    yield caption_frame(np.asarray(framed), [label])
