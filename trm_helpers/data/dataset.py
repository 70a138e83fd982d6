"""Demonstrations as samples: split, windows, vectorised batches."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from .. import schema
from ..config import Config, convert
from ..demos.demo_files import normalize_instruction, open_demo_file
from ..files import digest
from .augment import apply_augmentation, sample_augmentation
from .language import embed_instruction
from .normalize import ActionNormalizer, fit_proprio, normalize_proprio
from .storage import BatchMemory, Demo, DemoFile, load_steps, open_files

TRAIN_FRACTION = 0.8  # of each task's demonstrations
_BYTES_AT_ONCE = 2**19  # of frames turned into floats; a share of the second-level cache


def split_demonstrations(names: Sequence[str], path: str | Path) -> tuple[list[str], list[str]]:
    """Training and validation demonstrations of one task: disjoint, at least one in each.

    A function of the names of the file and of its demonstrations: neither other files nor the
    folder change it. Raises ``ValueError`` for fewer than two demonstrations.
    """
    if len(names) < 2:
        raise ValueError(f"{path}: {len(names)} demonstration(s) read; a split needs at least 2, "
                         "in the file and by max_demos_per_task")
    count = min(max(round(TRAIN_FRACTION * len(names)), 1), len(names) - 1)
    generator = np.random.default_rng([0, zlib.crc32(Path(path).name.encode())])
    chosen = set(generator.permutation(len(names))[:count].tolist())
    return ([name for i, name in enumerate(names) if i in chosen],
            [name for i, name in enumerate(names) if i not in chosen])


class LIBERODataset(torch.utils.data.Dataset):
    """Windows of T consecutive steps of LIBERO demonstrations.

    ``dataset[i]`` is ``{"observations": {camera: (T, H, W, 3) float32 in [0, 1], "proprio": (T, P)
    float32 z-scored, "task_id": (T,) int64 or "language": (T, 384) float32}, "actions": (T, 7)
    float32 normalised, "mask": (T,) float32}``. With ``chunk`` K > 1 actions are (T, K, 7) and mask
    (T, K): the action of the step and the K - 1 after it. Past the demonstration's end the last
    action is repeated with mask 0; the mask is also 0 after a push (see
    :class:`collect.Disturbance`) or an actor's departure from the labels (see
    :func:`storage.next_push_steps`). Batches, with B in front, come from :meth:`batch` and
    :meth:`batches`.

    Args:
        hdf5_files: one path or several in LIBERO's layout, one file per task.
        sequence_length: T. A window never leaves its demonstration.
        image_size: H = W in pixels; stored images are resized once, by area.
        normalize_actions: ``zscore``, ``minmax`` or ``none``; True is ``zscore``, False ``none``.
        augmentation: see :func:`augment_images`.
        max_demos_per_task: demonstrations of each file to use, from the first on; 0 uses all.
        config: supplies every setting not given above, and cameras, proprioception, conditioning,
            alignment, chunk and storage. Without it: one frame of the agent view, one action,
            z-scored, no augmentation, all demonstrations. Of each scripted file outside
            ``demo_dir`` at most ``num_demos`` demonstrations are used.
        device: where batches are needed: with ``storage="auto"`` the frames are kept there if they
            fit into half of its free memory, otherwise in main memory.

    Raises :class:`DemoFileError` for an unusable file and ``ValueError`` for an invalid parameter,
    a demonstration shorter than T, or T > 1 where not every step has a frame of its own.
    """

    def __init__(
        self,
        hdf5_files: str | Path | Sequence[str | Path],
        sequence_length: int | None = None,
        image_size: int | None = None,
        normalize_actions: str | bool | None = None,
        augmentation: str | None = None,
        max_demos_per_task: int | None = None,
        *,
        config: Config | None = None,
        device: str | torch.device = "cpu",
    ):
        files = _paths(hdf5_files)
        if isinstance(normalize_actions, bool):
            normalize_actions = "zscore" if normalize_actions else "none"
        given = dict(sequence_length=sequence_length, normalize_actions=normalize_actions,
                     augmentation=augmentation, max_demos_per_task=max_demos_per_task)
        data, model = _settings(config, {k: v for k, v in given.items() if v is not None})
        image_size = model.image_size if image_size is None else \
            convert("image_size", image_size, int)
        if image_size < 1:
            raise ValueError(f"image_size={image_size} is not valid; expected > 0")
        self.task_ids = data.task_ids if model.conditioning == "task_id" else None
        if self.task_ids and len(self.task_ids) != len(files):
            raise ValueError(f"task_ids={self.task_ids} is not valid; expected one per file, of "
                             f"{len(files)}")
        self.normalize_actions, self.augmentation = data.normalize_actions, data.augmentation
        self.still = (schema.STILL_CAMERA,) if data.scenes else ()  # cameras that are never moved
        self.sequence_length, self.chunk = data.sequence_length, model.chunk
        self.cameras, self.proprioception = model.cameras, model.proprioception
        opened = open_files(files, data.alignment)
        collected = data.num_demos if config is not None and not data.demo_dir else 0
        limits = [min(filter(None, (data.max_demos_per_task,  # another run may have collected more
                                    0 if file.source == "human" else collected)), default=0)
                  for file in opened]
        self._steps = load_steps(opened, limits, self.cameras, image_size, data.storage, device)
        self._memory = BatchMemory()
        self._language = None  # (files, 384)
        if model.conditioning == "language":
            self._language = torch.from_numpy(np.stack([_embedded(file) for file in opened]))
        self._use(self._steps.demos, "all")
        longest = max(demo.end - demo.first for demo in self.demos)
        if self.chunk > longest:
            print(f"chunk={self.chunk} is longer than every demonstration: no sample has all "
                  f"actions of its chunk; expected at most {longest}, the steps of the longest")
        stride = max(demo.frame_stride for demo in self.demos)
        if stride > self.chunk:
            print(f"frame_stride={stride} is above chunk={self.chunk}: only {self.chunk} of every "
                  f"{stride} actions are trained on")

    @classmethod
    def from_config(cls, files: Mapping[int, Path], config: Config,
                    device: str | torch.device = "cpu") -> tuple[LIBERODataset, LIBERODataset]:
        """Training and validation data of a :class:`Config`; ``files`` is one file per task id."""
        whole = cls(list(files.values()), config=config.replace(task_ids=tuple(files)),
                    device=device)
        return whole.train_val()

    @classmethod
    def held_out(cls, files: Mapping[int, Path], config: Config, policy,
                 trained_on: Mapping) -> LIBERODataset:
        """The demonstrations that a policy was not trained on, in its own normalisation.

        Args:
            files: one per task id: the files it was trained on, or others under the same names.
            policy: has ``normalizer`` and ``proprio_stats``.
            trained_on: the training split's :meth:`describe`.

        Demonstrations are told apart by their names. A line is printed for a file that holds others
        under these names than when the policy was trained.

        Raises ``ValueError`` when there is no such demonstration.
        """
        whole = cls(list(files.values()), config=config.replace(task_ids=tuple(files)))
        for file in trained_on["files"]:
            demos = [demo for demo in whole.demos if demo.name in file["demos"]
                     and whole._steps.files[demo.file].path.name == Path(file["file"]).name]
            if len(demos) == len(file["demos"]) and file.get("actions", "") not in (
                    "", whole._digest(demos)):
                print(f"{whole._steps.files[demos[0].file].path} holds other demonstrations than "
                      "the policy was trained on; some of these may count as held out")
        known = {(Path(file["file"]).name, name)
                 for file in trained_on["files"] for name in file["demos"]}
        demos = [demo for demo in whole.demos
                 if (whole._steps.files[demo.file].path.name, demo.name) not in known]
        if not demos:
            raise ValueError(f"the policy was trained on all {len(whole.demos)} demonstrations "
                             "read; expected one that it was not: ask for more (num_demos)")
        whole._use(demos, "val", policy.normalizer, policy.proprio_stats)
        return whole

    def train_val(self) -> tuple[LIBERODataset, LIBERODataset]:
        """Both splits over the same images, normalised by the training split's statistics.

        Demonstrations are split file by file, see :func:`split_demonstrations`. Validation samples
        are not augmented.
        """
        train, val = copy.copy(self), copy.copy(self)
        halves: tuple[list[Demo], list[Demo]] = ([], [])
        for index, file in enumerate(self._steps.files):
            demos = [demo for demo in self.demos if demo.file == index]
            names = split_demonstrations([demo.name for demo in demos], file.path)
            for half, members in zip(halves, names, strict=True):
                half.extend(demo for demo in demos if demo.name in members)
        train._use(halves[0], "train")
        val._use(halves[1], "val", train.normalizer, train.proprio_stats)
        return train, val

    def _use(self, demos: Sequence[Demo], split: str, normalizer: ActionNormalizer | None = None,
             proprio_stats: Mapping | None = None) -> None:
        """Make these demonstrations' windows the samples; without statistics, fit to them."""
        self.split, self.demos = split, list(demos)
        if split == "val":
            self.augmentation = "none"
        for demo in self.demos:
            if demo.frame_stride > 1 and self.sequence_length > 1:
                raise ValueError(
                    f"{self._steps.files[demo.file].path}, {demo.name}: a frame in every "
                    f"{demo.frame_stride} steps (frame_stride); sequence_length="
                    f"{self.sequence_length} needs one in each")
            if demo.end - demo.first < self.sequence_length:
                raise ValueError(
                    f"{self._steps.files[demo.file].path}, {demo.name}: {demo.end - demo.first} "
                    f"steps are shorter than sequence_length={self.sequence_length}")
        steps = torch.cat([torch.arange(demo.first, demo.end) for demo in self.demos])
        self.normalizer = normalizer or ActionNormalizer(self.normalize_actions).fit(
            self._steps.actions[steps])
        self.proprio_stats = dict(proprio_stats or fit_proprio(self._steps.proprio[steps]))
        starts = [torch.arange(demo.first, demo.end - self.sequence_length + 1, demo.frame_stride)
                  for demo in self.demos]
        # a frame that stands for four steps is visited four times in an epoch
        stands_for = torch.cat([(demo.end - self.sequence_length + 1 - start).clamp(
            max=demo.frame_stride) for start, demo in zip(starts, self.demos, strict=True)])
        self._visits = torch.arange(len(stands_for)).repeat_interleave(stands_for)
        ends = np.cumsum([len(start) for start in starts]).tolist()
        self._samples = [range(*each) for each in zip([0, *ends], ends, strict=False)]
        tables = {
            "start": torch.cat(starts),  # first step of each sample
            "end": torch.cat([torch.full_like(start, demo.end)
                              for start, demo in zip(starts, self.demos, strict=True)]),
            "actions": self.normalizer.normalize(self._steps.actions),  # (N, 7)
            "proprio": normalize_proprio(self._steps.proprio, self.proprio_stats),  # (N, P)
            "next_push": self._steps.next_push_step, "file": self._steps.file_of_step}  # (N,)
        if self.task_ids is not None:
            tables["task_id"] = torch.tensor(self.task_ids)[self._steps.file_of_step]  # (N,)
        if self._language is not None:
            tables["language"] = self._language  # (files, 384)
        # beside the frames, so that a batch is gathered where they are
        self._tables = {name: table.to(self.device) for name, table in tables.items()}

    @property
    def device(self) -> torch.device:
        """Where the frames are, and a batch is gathered; the CPU if they are in files."""
        return self._steps.frames.device

    def __len__(self) -> int:
        return len(self._tables["start"])

    @property
    def epoch_size(self) -> int:
        """Visits of samples in a shuffled epoch of :meth:`batches`, each augmented anew.

        A sample is visited as often as its frame stands for steps, ``frame_stride`` times except at
        the end, so that the number of updates does not depend on ``frame_stride``.
        """
        return len(self._visits)

    def samples_of(self, number: int) -> range:
        """Indices of the samples of ``demos[number]``, in order of time."""
        return self._samples[number]

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Several samples at once: what PyTorch's ``DataLoader`` calls when there is one."""
        batch = self.batch(indices)
        return [{"observations": {key: value[i] for key, value in batch["observations"].items()},
                 "actions": batch["actions"][i], "mask": batch["mask"][i]}
                for i in range(len(indices))]

    def batch(self, indices: Sequence[int] | torch.Tensor, device: str | torch.device = "cpu",
              as_bytes: bool = False) -> dict:
        """The samples of ``indices`` (B,) as one batch on ``device``.

        PyTorch's global generator samples the augmentation. ``as_bytes`` keeps the frames uint8 in
        [0, 255], without augmentation. Raises ``IndexError`` for an index out of range,
        ``TypeError`` for anything but a list of integers, as a mask.
        """
        given = torch.as_tensor(indices)
        whole = not (given.is_floating_point() or given.dtype == torch.bool)
        if given.ndim != 1 or len(given) and not whole:
            raise TypeError(f"indices have shape {tuple(given.shape)} and type {given.dtype}; "
                            "expected (B,) integers")
        indices = given.long()
        if len(indices) and not -len(self) <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"index out of range; the data set has {len(self)} samples")
        draw = ({"indices": indices} if as_bytes
                else self._draw(indices, torch.default_generator))
        return self.make(draw, device, as_bytes)

    def _draw(self, indices: torch.Tensor,
              generator: torch.Generator) -> dict[str, torch.Tensor]:
        """All that is random in a batch: its ``indices`` and the augmentation of each camera."""
        size = self._steps.frames.image_size
        return {"indices": indices} | {
            f"{camera} {change}": values for camera in self.cameras
            for change, values in sample_augmentation(
                len(indices), (size, size), self._augmentation_of(camera), generator).items()}

    def make(self, draw: Mapping[str, torch.Tensor], device: str | torch.device = "cpu",
             as_bytes: bool = False) -> dict:
        """The batch of a draw, see :meth:`draws`, on ``device``.

        With the frames and the draw on a GPU, nothing waits for it: no value is read, and no shape
        depends on one.
        """
        tables, here = self._tables, self.device
        indices = draw["indices"].to(here)
        steps = tables["start"][indices].unsqueeze(1)
        steps = steps + torch.arange(self.sequence_length, device=here)  # (B, T)
        future = steps.unsqueeze(2) + torch.arange(self.chunk, device=here)  # (B, T, K)
        ends = tables["end"][indices].view(-1, 1, 1)
        # actions after a push cannot be predicted from the observations before it
        next_push = tables["next_push"][steps].unsqueeze(2)
        mask = ((future < ends) & (future <= next_push)).float()
        if "kept" in draw:
            mask = mask * draw["kept"].to(here).view(-1, 1, 1)
        actions = tables["actions"][torch.minimum(future, ends - 1)]  # (B, T, K, 7)
        if self.chunk == 1:
            actions, mask = actions.squeeze(2), mask.squeeze(2)
        observations = {}
        for camera in self.cameras:
            frames = self._frames(camera, steps.flatten(), torch.device(device), as_bytes)
            observations[camera] = apply_augmentation(
                frames.unflatten(0, steps.shape),
                {name.removeprefix(f"{camera} "): values for name, values in draw.items()
                 if name.startswith(f"{camera} ")})
        if self.proprioception:
            observations["proprio"] = tables["proprio"][steps].to(device)
        if self.task_ids is not None:
            observations["task_id"] = tables["task_id"][steps].to(device)
        if self._language is not None:
            observations["language"] = tables["language"][tables["file"][steps]].to(device)
        return {"observations": observations, "actions": actions.to(device),
                "mask": mask.to(device)}

    def _augmentation_of(self, camera: str) -> str:
        moves = self.augmentation not in ("none", "colour")
        return "brightness" if moves and camera in self.still else self.augmentation

    def _frames(self, camera: str, steps: torch.Tensor, device: torch.device,
                as_bytes: bool) -> torch.Tensor:
        """(n, S, S, 3) of the steps (n,): uint8, or float32 in [0, 1]."""
        frames = self._steps.frames
        shape = (len(steps), frames.image_size, frames.image_size, 3)
        on_cpu = frames.device.type == "cpu"
        if as_bytes or not on_cpu or device.type != "cpu":
            out = self._memory.empty(shape, torch.uint8) if on_cpu else None
            picked = frames.pick(camera, steps, out).to(device)
            return picked if as_bytes else picked.float().div_(255)
        floats = self._memory.empty(shape, torch.float32)
        # a few at a time, while their bytes are still in the processor's cache
        some = max(1, _BYTES_AT_ONCE // math.prod(shape[1:]))
        for part, out in zip(steps.split(some), floats.split(some), strict=True):
            torch.div(frames.pick(camera, part), 255, out=out)
        return floats

    def batches(self, batch_size: int, seed: int, epoch: int, shuffle: bool = True,
                device: str | torch.device = "cpu", start: int = 0,
                part: tuple[int, int] = (0, 1)) -> Iterator[dict]:
        """The batches of an epoch; order and augmentation are a function of (seed, epoch).

        With ``shuffle`` an epoch has :attr:`epoch_size` samples, otherwise each sample once.
        ``start`` skips that many batches without changing the others. ``part=(r, n)`` yields every
        n-th sample of each batch from the r-th on, or, of a batch too small for it, the first
        sample with an empty mask.
        """
        for draw in self.draws(batch_size, seed, epoch, shuffle, start, part):
            yield self.make(draw, device)

    def draws(self, batch_size: int, seed: int, epoch: int, shuffle: bool = True, start: int = 0,
              part: tuple[int, int] = (0, 1)) -> Iterable[dict[str, torch.Tensor]]:
        """What :meth:`make` turns into the batches of :meth:`batches`, sampled on the CPU.

        With the frames on a GPU it is a list, sampled for the whole epoch and moved there at once.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not valid; expected >= 1")
        order = torch.arange(len(self))
        if shuffle:
            order = self._visits[torch.randperm(self.epoch_size,
                                                generator=_generator(seed, epoch))]
        draws = self._sampled(order.split(batch_size), (seed, epoch), start, part)
        return draws if self.device.type == "cpu" else _moved_at_once(list(draws), self.device)

    def _sampled(self, order: Sequence[torch.Tensor], key: tuple[int, int], start: int,
                 part: tuple[int, int]) -> Iterator[dict[str, torch.Tensor]]:
        for number, indices in enumerate(order[start:], start + 1):
            mine = indices[part[0]::part[1]]
            draw = self._draw(mine if len(mine) else indices[:1],
                              _generator(*key, number, part[0]))
            if part[1] > 1:
                draw["kept"] = torch.full((len(draw["indices"]),), float(len(mine) > 0))
            yield draw

    def describe(self) -> dict:
        """Provenance of the samples, for JSON.

        Two digests identify a file's contents wherever it lies: of the ``actions``, and of the
        first ``frames`` of the demonstrations, which depend on the renderer.
        """
        files = []
        for index, file in enumerate(self._steps.files):
            demos = [demo for demo in self.demos if demo.file == index]
            with open_demo_file(file.path) as content:
                frames = [content[schema.DATA_GROUP][demo.name]["obs"][camera][0].tobytes()
                          for demo in demos for camera in self.cameras]
            files.append({"file": str(file.path), "demos": [demo.name for demo in demos],
                          "steps": sum(demo.end - demo.first for demo in demos),
                          "alignment": file.alignment, "source": file.source,
                          "actions": self._digest(demos),
                          "frames": digest(b"".join(frames))})
        return {"split": self.split, "samples": len(self), "files": files}

    def _digest(self, demos: Sequence[Demo]) -> str:
        """Digest of the demonstrations' actions."""
        return digest(b"".join(self._steps.actions[demo.first:demo.end].numpy().tobytes()
                               for demo in demos))


def _paths(hdf5_files: str | Path | Sequence[str | Path]) -> list[Path]:
    files = [hdf5_files] if isinstance(hdf5_files, (str, Path)) else hdf5_files
    if not isinstance(files, Sequence) or not files or not all(
            isinstance(file, (str, Path)) for file in files):
        raise ValueError(f"hdf5_files={hdf5_files!r} is not valid; expected a path or a list of "
                         "paths")
    return list(map(Path, files))


def _settings(config: Config | None, given: Mapping):
    """The data and the model part of ``config`` with the ``given`` settings in place."""
    if config is None:
        config = Config().replace(augmentation="none")
    if not isinstance(config, Config):
        raise ValueError(f"config is of type {type(config).__name__}; expected a Config, for "
                         "example from_flat('demo')")
    config = config.replace(**given)
    return config.data, config.model


def _embedded(file: DemoFile) -> np.ndarray:
    if not normalize_instruction(file.instruction):
        raise ValueError(f"{file.path}: instruction {file.instruction!r} is empty; expected the "
                         "task's instruction")
    try:
        return embed_instruction(file.instruction)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _moved_at_once(draws: list[dict[str, torch.Tensor]],
                   device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The draws as views of one tensor per name on ``device``."""
    if not draws:
        return []
    sizes = [len(draw["indices"]) for draw in draws]
    columns = [torch.cat([draw[name] for draw in draws]).to(device).split(sizes)
               for name in draws[0]]
    return [dict(zip(draws[0], values, strict=True)) for values in zip(*columns, strict=True)]


def _generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by ``key``; a trailing 0 would be ignored."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
