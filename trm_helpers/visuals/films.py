"""Films of episodes: captions, the path that the policy intends, MP4 files, a grid of films.

All frames here are upright already (`sim.render.upright`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import subprocess
import tempfile
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from .. import schema
from ..files import atomic_path
from .colours import GREEN, ORANGE, RED, SKY

FPS = 10  # every second control step (20 Hz) in real time: rendering takes most of a film's time
MAIN = 320  # pixels of a film's main view; the two small views have half of it
_TILE = 192  # pixels of an episode in a grid
_FONT_SIZE, _LINE, _SPACING, _MARGIN = 14, 19, 6, 8  # pixels; the spacing is part of a line
_PATIENCE = 60.0  # seconds that ffmpeg may take for a frame
_ENCODING = ("-an", "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "23", "-movflags",
             "+faststart")


def intended_path(position: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Positions (n, 3) in metres that ``actions`` (n, 7) aim at from ``position`` (3,).

    A straight extrapolation, without inertia or contact.
    """
    return position + schema.METRES_PER_STEP * np.cumsum(np.asarray(actions)[:, :3], axis=0)


def draw_path(image: np.ndarray, pixels: np.ndarray, executed: int) -> np.ndarray:
    """An image (H, W, 3) with a dot at each of ``pixels`` (n, 2), column and row.

    The first ``executed`` are orange, the others, predicted beyond the next decision, blue. Pixels
    that are not finite or outside are left out.
    """
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    radius = max(2, round(image.shape[0] / 128))
    for number, (column, row) in reversed(list(enumerate(np.asarray(pixels)))):
        if 0 <= column < image.shape[1] and 0 <= row < image.shape[0]:  # false for NaN
            draw.ellipse((column - radius, row - radius, column + radius, row + radius),
                         fill=ORANGE if number < executed else SKY, outline="black")
    return np.asarray(canvas)


def film_frame(main: np.ndarray, views: Mapping[str, np.ndarray], lines: Sequence[str],
               progress: float, outcome: str = "", success: bool = False) -> np.ndarray:
    """A frame (MAIN, 2 * MAIN, 3) of a film, as a player shows it.

    Args:
        main: the large view on the left (MAIN, MAIN, 3).
        views: the policy's own views by their titles, small, on the right below the text.
        lines: the text.
        progress: share of the allowed time, in [0, 1], drawn as a bar.
        outcome: in the frame that ends the film, text on a green (``success``) or red band across
            the top of the main view, where only the wall is hidden.
    """
    canvas = Image.new("RGB", (2 * MAIN, MAIN), "black")
    canvas.paste(Image.fromarray(main), (0, 0))
    draw = ImageDraw.Draw(canvas)
    _write(draw, (MAIN + _MARGIN, _MARGIN), _wrapped(lines, MAIN))
    small = MAIN // 2
    bar = (MAIN + _MARGIN, small - 34, 2 * MAIN - _MARGIN, small - 28)
    draw.rectangle(bar, fill="#444444")
    draw.rectangle((*bar[:2], bar[0] + progress * (bar[2] - bar[0]), bar[3]), fill=SKY)
    for number, (title, view) in enumerate(views.items()):
        left = MAIN + number * small
        image = Image.fromarray(view).resize((small, small), Image.Resampling.BICUBIC)
        canvas.paste(image, (left, small))
        _write(draw, (left + _MARGIN, small - _LINE - 2), title)
    if outcome:
        draw.rectangle((0, 0, MAIN - 1, 60), fill=GREEN if success else RED)
        text = textwrap.fill(outcome, 22, initial_indent="✓ " if success else "✗ ",
                             subsequent_indent="  ")
        draw.text((_MARGIN, 30), text, font=_font(20), fill="black", anchor="lm")
    return np.asarray(canvas)


def _wrapped(lines: Sequence[str], width: int) -> str:
    columns = int((width - 2 * _MARGIN) / _font().getlength("m"))
    return "\n".join(textwrap.fill(line, columns) for line in lines)


def _write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str) -> None:
    draw.text(place, text, font=_font(), fill="white", spacing=_SPACING)


def _font(size: int = _FONT_SIZE) -> ImageFont.FreeTypeFont:
    from matplotlib.font_manager import findfont  # slow to import, and only captions need it

    return ImageFont.truetype(findfont("DejaVu Sans Mono"), size)  # comes with matplotlib


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: int = FPS) -> Path:
    """Write uint8 frames (H, W, 3) of one size as an MP4 that browsers play.

    H.264 with 4:2:0 colours needs even sides: an odd one gets its last row or column twice.

    Raises:
        ValueError: no frame, another shape or type, or a path that is not ``.mp4``.
        OSError: ffmpeg failed, or took no frame for a minute.
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"path={str(path)!r} is not valid; expected a name that ends in .mp4")
    with atomic_path(path) as temporary:
        written = _encode(temporary, _even(frames), fps)
        found = _count_frames(temporary)  # ffmpeg may end well on a full disk
        if found != written:
            raise OSError(f"{path} has {found} frames of {written}; is the disk full?")
    return path


def _encode(path: Path, frames: Iterator[np.ndarray], fps: int) -> int:
    """Write the frames through ffmpeg; their number."""
    first = next(frames, None)
    if first is None:
        raise ValueError("frames is empty; expected at least one")
    written = 0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            _ffmpeg("-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
                    "-s", f"{first.shape[1]}x{first.shape[0]}", "-r", str(fps), "-i", "-",
                    *_ENCODING, str(path)),
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
        try:
            for frame in itertools.chain([first], frames):
                with _killed_if_it_hangs(process), contextlib.suppress(BrokenPipeError):
                    process.stdin.write(frame.tobytes())
                written += 1
        except BaseException:
            process.kill()
            raise
        finally:
            with _killed_if_it_hangs(process):
                process.communicate()
        if process.returncode:
            log.seek(0)
            raise OSError(f"ffmpeg ended with status {process.returncode}: "
                          f"{log.read().strip() or f'killed, or no frame in {_PATIENCE:g} s'}")
    return written


def _even(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames, checked, with an odd side's last row or column twice."""
    shape = None
    for number, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.shape != shape or frame.ndim != 3 or frame.dtype != np.uint8:
            raise ValueError(f"frame {number} has shape {frame.shape} and type {frame.dtype}; "
                             f"expected uint8 (H, W, 3), all of one size (the first is {shape})")
        yield np.pad(frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")


def _count_frames(path: Path) -> int:
    """Frames of a video; 0 if it cannot be read. Decoded: ffmpeg 7 counts no copied ones."""
    done = subprocess.run(_ffmpeg("-i", str(path), "-map", "0:v:0", "-vf", "null", "-f", "null",
                                  "-"), stdin=subprocess.DEVNULL, capture_output=True)
    return int((re.findall(rb"frame= *(\d+)", done.stderr) or [0])[-1])


def _ffmpeg(*arguments: str) -> list[str]:
    import imageio_ffmpeg  # without it, only films cannot be made

    return [imageio_ffmpeg.get_ffmpeg_exe(), *arguments]


@contextlib.contextmanager
def _killed_if_it_hangs(process: subprocess.Popen) -> Iterator[None]:
    timer = threading.Timer(_PATIENCE, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def write_grid(path: str | os.PathLike, films: Sequence[str | os.PathLike],
               labels: Sequence[str], successes: Sequence[bool], columns: int = 0) -> Path:
    """Films of `rollout.record_episode` side by side, main view only, each under its label.

    A film that has ended keeps its last frame, outlined in green (success) or red (failure).
    ``columns`` 0 makes about as many rows as columns.
    """
    columns = columns or math.ceil(math.sqrt(len(films))) or 1
    rows = math.ceil(len(films) / columns)
    texts = [_wrapped([label], _TILE) for label in labels]
    band = _LINE * max((len(text.splitlines()) for text in texts), default=0) + _MARGIN
    with contextlib.ExitStack() as stack:
        tiles = [_tiles(stack.enter_context(imageio.get_reader(film)), text, band, success)
                 for film, text, success in zip(films, texts, successes, strict=True)]

        def frames() -> Iterator[np.ndarray]:
            shown = [None] * len(films)
            for new in itertools.zip_longest(*tiles):
                shown = [before if now is None else now
                         for now, before in zip(new, shown, strict=True)]
                empty = [np.zeros_like(shown[0])] * (columns * rows - len(shown))
                yield rearrange([*shown, *empty], "(r c) h w rgb -> (r h) (c w) rgb", c=columns)

        return write_video(path, frames())


def _tiles(reader, text: str, band: int, success: bool) -> Iterator[np.ndarray]:
    """A film's main view under a ``band`` of text, a tile of the grid; the last one is outlined."""
    tile = None
    for frame in reader.iter_data():
        if tile:
            yield np.asarray(tile)
        side = frame.shape[1] // 2  # a square at the lower left
        view = Image.fromarray(frame[-side:, :side])
        tile = Image.new("RGB", (_TILE, band + _TILE), "black")
        _write(ImageDraw.Draw(tile), (_MARGIN, _MARGIN // 2), text)
        tile.paste(view.resize((_TILE, _TILE), Image.Resampling.LANCZOS), (0, band))
    ImageDraw.Draw(tile).rectangle((0, band, _TILE - 1, band + _TILE - 1), width=_TILE // 32,
                                   outline=GREEN if success else RED)
    yield np.asarray(tile)
