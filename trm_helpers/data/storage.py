"""Storage of the demonstrations' steps: in memory, mapped from the files, or on a GPU."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm.auto import tqdm

from .. import schema
from ..demos.alignment import resolve_alignment
from ..demos.demo_files import (
    DemoFileError,
    check_demo_file,
    check_gripper,
    demo_names,
    frame_stride,
    instruction_of,
    open_demo_file,
    source_of,
)
from ..software import free_memory
from .augment import resize_images

_KEPT_FREE = 0.1  # share of the free memory that stays free
_AUTO_SHARE = 0.5  # of a GPU's free memory for frames with storage="auto"; the rest trains


@dataclass(frozen=True)
class DemoFile:
    path: Path
    alignment: str
    source: str
    instruction: str


@dataclass(frozen=True)
class Demo:
    """A demonstration's steps in :class:`Steps`: from ``first`` up to ``end``."""

    file: int
    name: str
    first: int
    end: int
    frame_stride: int  # steps per rendered frame, from ``first`` on; the others repeat it


@dataclass(frozen=True)
class Steps:
    """All steps of all demonstrations one after another, observation and action paired."""

    files: list[DemoFile]
    demos: list[Demo]
    frames: FramesInMemory | FramesOnDisk
    actions: torch.Tensor  # (N, 7) float32, environment's units
    proprio: torch.Tensor  # (N, P) float32, m and rad
    file_of_step: torch.Tensor  # (N,) int64
    next_push_step: torch.Tensor  # (N,) int64, see next_push_steps


class BatchMemory:
    """Memory for large batches, reused once no tensor refers to it.

    The C library returns freed memory of this size to the system; getting it back page by page
    takes longer than filling it. A tensor made from an array keeps the array alive, and so does
    every view of the tensor: once the array is gone, its memory is free.
    """

    KEPT = 4  # the batch being made and the one in use, of two cameras each
    SMALLEST = 2**20  # bytes; the C library itself keeps smaller blocks

    def __init__(self):
        # the memory, and the array over it that a tensor was made from
        self._kept: deque[tuple[np.ndarray, weakref.ref]] = deque()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU, its values undefined."""
        size = math.prod(shape) * dtype.itemsize
        if size < self.SMALLEST:
            return torch.empty(shape, dtype=dtype)
        memory = self._take(size)
        lent = memory[:size]
        self._kept.append((memory, weakref.ref(lent)))
        if len(self._kept) > self.KEPT:
            self._kept.popleft()
        return torch.from_numpy(lent).view(dtype).view(*shape)

    def _take(self, size: int) -> np.ndarray:
        for _ in range(len(self._kept)):
            try:
                memory, lent = self._kept.popleft()
            except IndexError:  # another thread was faster
                break
            if lent() is None and size <= memory.nbytes <= 2 * size:  # half may lie idle
                return memory
            self._kept.append((memory, lent))
        return np.empty(size, dtype=np.uint8)

    def __reduce__(self):
        return BatchMemory, ()  # a copy has memory of its own


class FramesInMemory:
    """Frames resized once and kept as uint8 tensors on one device."""

    def __init__(self, images: dict[str, torch.Tensor]):
        self.images = images  # camera -> (N, S, S, 3)
        stored = next(iter(images.values()))
        self.image_size, self.device = stored.shape[1], stored.device

    def pick(self, camera: str, steps: torch.Tensor,
             out: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 (n, S, S, 3) of the steps (n,), written to ``out`` if given."""
        stored = self.images[camera]
        # whole frames as rows: several times faster than indexing four dimensions
        rows = torch.index_select(stored.flatten(1), 0, steps.to(self.device),
                                  out=None if out is None else out.flatten(1))
        return rows.view(-1, *stored.shape[1:])


class FramesOnDisk:
    """Frames read from the mapped files, and resized, on each use.

    An uncompressed, contiguous HDF5 data set is one run of bytes: its file, which may be the target
    of a link, is mapped, and a frame is a slice of the map. The operating system caches frequently
    used pages. The files must not change. A copy in another process maps them again.

    Raises :class:`DemoFileError` for frames in more than one run of bytes, or of several shapes
    for one camera.
    """

    def __init__(self, files: Sequence[DemoFile], demos: Sequence[Demo], cameras: Sequence[str],
                 image_size: int):
        self.image_size, self.device = image_size, torch.device("cpu")
        self.paths: list[Path] = []
        # of each step, the file and the offset of its frame
        self.places = {camera: np.empty((demos[-1].end, 2), dtype=np.int64) for camera in cameras}
        self.shapes: dict[str, tuple] = {}
        for index, file in enumerate(files):
            with open_demo_file(file.path) as content:
                for demo in (demo for demo in demos if demo.file == index):
                    for camera in cameras:
                        self._locate(file.path, demo, content[schema.DATA_GROUP][demo.name], camera)
        self._map()

    def _locate(self, path: Path, demo: Demo, group: h5py.Group, camera: str) -> None:
        dataset = group["obs"][camera]
        offset, shape = dataset.id.get_offset(), dataset.shape[1:]
        if offset is None:
            raise DemoFileError(
                f"{path}: {dataset.name} is compressed, chunked or kept elsewhere; expected one "
                "run of bytes for storage='mmap'. Use storage='ram'")
        if self.shapes.setdefault(camera, shape) != shape:
            raise DemoFileError(f"{path}: frames of {dataset.name} have shape {shape}; expected "
                                f"{self.shapes[camera]}, that of the others, for storage='mmap'. "
                                "Use storage='ram'")
        holder = Path(dataset.file.filename).resolve()
        if holder not in self.paths:
            self.paths.append(holder)
        steps = np.arange(demo.end - demo.first)
        self.places[camera][demo.first:demo.end, 0] = self.paths.index(holder)
        self.places[camera][demo.first:demo.end, 1] = offset + steps * math.prod(shape)

    def _map(self) -> None:
        # plain arrays over the mapping: slicing a memmap object takes several times as long
        self.maps = [np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) for path in self.paths]

    def __getstate__(self) -> dict:
        """Without the maps, which would be pickled as copies of whole files."""
        return {name: value for name, value in vars(self).items() if name != "maps"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._map()

    def pick(self, camera: str, steps: torch.Tensor,
             out: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 (n, S, S, 3) of the steps (n,), written to ``out`` if given."""
        shape, size = self.shapes[camera], math.prod(self.shapes[camera])
        resized = shape != (self.image_size, self.image_size, 3)
        stored = out
        if resized or out is None:
            stored = torch.empty(len(steps), *shape, dtype=torch.uint8)
        frames = stored.flatten(1).numpy()
        for row, (file, offset) in enumerate(self.places[camera][steps.numpy()].tolist()):
            frames[row] = self.maps[file][offset:offset + size]
        if not resized:
            return stored
        stored = resize_images(stored, self.image_size)
        return stored if out is None else out.copy_(stored)


def open_files(files: Sequence[Path], alignment: str) -> list[DemoFile]:
    """Check each file and resolve its alignment; :class:`DemoFileError` for an unusable one."""
    opened = []
    for path in files:
        check_demo_file(path)
        check_gripper(path)
        opened.append(DemoFile(path, resolve_alignment(path, alignment), source_of(path),
                               instruction_of(path)))
    return opened


def load_steps(files: list[DemoFile], limits: Sequence[int], cameras: Sequence[str],
               image_size: int, storage: str, device: str | torch.device) -> Steps:
    """Read the first demonstrations of each file, as many as its limit; 0 is no limit.

    ``storage="auto"`` is ``gpu`` if ``device`` is one and the frames fit, otherwise ``ram``. Prints
    the memory needed for the frames first. Raises ``MemoryError`` when they do not fit,
    before reading any, ``ValueError`` for ``storage="gpu"`` without a GPU, and
    :class:`DemoFileError` for a file that cannot be mapped with ``storage="mmap"``.
    """
    demos = _lay_out(files, limits)
    count = demos[-1].end
    images: dict[str, torch.Tensor] = {}
    if storage == "mmap":
        frames = FramesOnDisk(files, demos, cameras, image_size)
        mapped = sum(path.stat().st_size for path in frames.paths)
        print(f"frames need no memory of their own: {mapped / 2**20:,.1f} MiB of files are mapped")
    else:
        needed = count * image_size**2 * 3 * len(cameras)
        if storage == "auto":
            fits = (torch.device(device).type == "cuda"
                    and needed <= _AUTO_SHARE * torch.cuda.mem_get_info(device)[0])
            storage = "gpu" if fits else "ram"
        device = _reserve(needed, storage, device)
        images = {camera: torch.empty(count, image_size, image_size, 3, dtype=torch.uint8,
                                      device=device) for camera in cameras}
        frames = FramesInMemory(images)
    steps = Steps(
        files=files, demos=demos, frames=frames,
        actions=torch.empty(count, schema.ACTION_DIM),
        proprio=torch.empty(count, schema.PROPRIO_DIM),
        file_of_step=torch.empty(count, dtype=torch.int64),
        next_push_step=torch.empty(count, dtype=torch.int64))
    with tqdm(total=len(demos), desc="loading demonstrations", unit="demo") as progress:
        for index, file in enumerate(files):
            with open_demo_file(file.path) as content:
                for demo in (demo for demo in demos if demo.file == index):
                    _fill(steps, demo, content[schema.DATA_GROUP][demo.name], images)
                    progress.update()
    return steps


def _reserve(needed: int, storage: str, device: str | torch.device) -> torch.device:
    """The frames' device; prints the bytes needed, ``MemoryError`` when they are not free.

    With ``storage="gpu"`` it is ``device``, or the current GPU if that is none.
    """
    if storage == "gpu" and not torch.cuda.is_available():
        raise ValueError("storage='gpu' needs a CUDA GPU; PyTorch finds none here. "
                         "Expected 'ram' or 'mmap'")
    if storage != "gpu":
        device = "cpu"
    elif torch.device(device).type != "cuda":
        device = "cuda"
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if storage == "gpu" else free_memory()
    print(f"frames need {needed / 2**20:,.1f} MiB of {free / 2**20:,.1f} MiB free ({storage})")
    if needed > (1 - _KEPT_FREE) * free:
        raise MemoryError(
            f"the frames need {needed / 2**20:,.1f} MiB with storage={storage!r}; expected at most "
            f"{100 * (1 - _KEPT_FREE):.0f} % of the {free / 2**20:,.1f} MiB free. Choose a smaller "
            "image_size, fewer demonstrations (max_demos_per_task), or storage="
            + ("'ram' or 'mmap'" if storage == "gpu" else "'mmap'"))
    return device


def _lay_out(files: list[DemoFile], limits: Sequence[int]) -> list[Demo]:
    """The place of each demonstration; the pairing costs a shift file one step."""
    demos, first = [], 0
    for index, (file, limit) in enumerate(zip(files, limits, strict=True)):
        with open_demo_file(file.path) as content:
            for name in demo_names(content)[:limit or None]:
                group = content[schema.DATA_GROUP][name]
                end = first + len(group["actions"]) - (file.alignment == "shift")
                demos.append(Demo(index, name, first, end, frame_stride(group)))
                first = end
    return demos


def _fill(steps: Steps, demo: Demo, group: h5py.Group, images: dict[str, torch.Tensor]) -> None:
    """Copy one demonstration, pairing obs[t] with actions[t] (raw) or actions[t+1] (shift)."""
    place, length = slice(demo.first, demo.end), demo.end - demo.first
    late = len(group["actions"]) - length
    steps.actions[place] = torch.from_numpy(group["actions"][late:].astype(np.float32))
    steps.file_of_step[place] = demo.file
    steps.next_push_step[place] = torch.from_numpy(next_push_steps(group, demo.first - late))[late:]
    parts = [group["obs"][key][:length] for key in schema.PROPRIO_KEYS]
    steps.proprio[place] = torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))
    for camera, stored in images.items():
        frames = torch.from_numpy(group["obs"][camera][:length])
        stored[place] = resize_images(frames, stored.shape[1]).to(stored.device)


def next_push_steps(group: h5py.Group, first: int) -> np.ndarray:
    """(T,) the last step whose action can be predicted at t; a large number if all can.

    It is the first step from t on whose executed action differs from the stored one: a push decides
    the state after it. Where a policy acted (DAgger), hardly any executed action equals
    its label, yet labels stay predictable while the two are close: there it is the first step up to
    which their differences since t add up to more than ``LABEL_TOLERANCE`` along any dimension.

    Steps are counted from ``first``. Only this project's files contain either.
    """
    count, last = len(group["actions"]), np.iinfo(np.int64).max
    if schema.EXECUTED_ACTIONS not in group:
        return np.full(count, last)
    differences = group[schema.EXECUTED_ACTIONS][:] - group["actions"][:]
    if "actor" not in group.attrs:
        pushed = np.where((differences != 0).any(axis=1), first + np.arange(count), last)
        return np.minimum.accumulate(pushed[::-1])[::-1].copy()
    total = np.concatenate([np.zeros((1, schema.ACTION_DIM)), differences.cumsum(axis=0)])
    moved = np.abs(total[1:] - total[:-1, None])  # (t, up to and including this step, 7)
    departed = np.triu((moved > schema.LABEL_TOLERANCE).any(axis=2))
    return np.where(departed.any(axis=1), first + departed.argmax(axis=1), last)
