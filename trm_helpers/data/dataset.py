"""Demonstrations as samples: split, windows, vectorised batches."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from .. import schema
from ..config import Config
from ..demos.demo_files import demo_names, open_demo_file, source_of
from ..files import digest
from .augment import augment_images
from .language import embed_instruction, normalize_instruction
from .normalize import ActionNormalizer, fit_proprio, normalize_proprio
from .storage import BatchMemory, Demo, DemoFile, load_steps, open_files

SPLITS = ("train", "val", "all")
_BYTES_AT_ONCE = 2**19  # of frames turned into floats; a share of the second-level cache


def split_demonstrations(
    names: Sequence[str], path: str | Path, train_fraction: float = 0.8, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Training and validation demonstrations of one task: disjoint, at least one in each.

    A function of the seed, the file's name and the demonstrations' names: neither other files nor
    the folder change it. Raises ``ValueError`` for fewer than two demonstrations.
    """
    if len(names) < 2:
        raise ValueError(f"{path}: {len(names)} demonstration(s); a split needs at least 2")
    if not 0 < train_fraction < 1:
        raise ValueError(f"train_fraction={train_fraction} is not valid; expected in (0, 1)")
    count = min(max(round(train_fraction * len(names)), 1), len(names) - 1)
    order = np.random.default_rng([seed, zlib.crc32(Path(path).name.encode())]).permutation(
        len(names)
    )
    chosen = set(order[:count].tolist())
    return (
        [name for i, name in enumerate(names) if i in chosen],
        [name for i, name in enumerate(names) if i not in chosen],
    )


# --- samples -------------------------------------------------------------------------------------
class LIBERODataset(torch.utils.data.Dataset):
    """Windows of T consecutive steps of LIBERO demonstrations.

    ``dataset[i]`` is ``{"observations": {camera: (T, H, W, 3) float32 in [0, 1], "proprio": (T, P)
    float32 z-scored, "task_id": (T,) int64}, "actions": (T, 7) float32 normalised, "mask": (T,)
    float32}``; with ``chunk`` K > 1 actions are (T, K, 7) and mask (T, K): the action of the step
    and the K - 1 after it. Past the demonstration's end the last action is repeated with mask 0;
    the mask is also 0 for what follows a push (see :class:`collect.Disturbance`).
    A batch has B in front; :meth:`batch` and :meth:`batches` make it at once.

    Args:
        hdf5_files: one path or several, one file per task, in LIBERO's layout.
        sequence_length: T. A window never leaves its demonstration.
        image_size: H = W in pixels; stored images are resized once, by area.
        normalize_actions: ``zscore``, ``minmax`` or ``none``; True and False mean the first and
            the last.
        augmentation: ``none``, ``brightness``, ``colour``, ``reference``, ``shift`` or ``cutout``:
            see :func:`augment_images`.
        still: cameras whose pictures are not moved: of ``reference``, ``shift`` and ``cutout`` they
            get the brightness.
        max_demos_per_task: the first so many demonstrations of each file, one number for all files
            or one for each; 0 takes all.
        cameras: names of `schema.CAMERAS`.
        proprioception: add ``proprio``: P = 12, the values of `schema.PROPRIO_KEYS`.
        task_ids: one per file, added as ``task_id``; None leaves it out.
        language: add ``language``: (T, 384) float32, the embedded instruction of the file.
        alignment: ``auto``, ``raw`` or ``shift``: see :func:`resolve_alignment`.
        chunk: K.
        storage: of the frames. ``ram`` and ``gpu`` resize them once and keep them as uint8;
            ``mmap`` reads them from the files when they are needed.
        split: ``train``, ``val`` or ``all`` demonstrations, by :func:`split_demonstrations`.
        train_fraction: share of each task's demonstrations to train on.
        seed: of the split.
        normalizer, proprio_stats: fitted to these samples when None; for ``val`` they must be
            the training split's. :meth:`train_val` sees to that and reads each file once.

    Raises :class:`DemoFileError` for a file that can not be used and ``ValueError`` for a
    parameter out of range, or a demonstration shorter than T.
    """

    def __init__(
        self,
        hdf5_files: str | Path | Sequence[str | Path],
        sequence_length: int = 1,
        image_size: int = schema.IMAGE_SIZE,
        normalize_actions: str | bool = "zscore",
        augmentation: str = "none",
        max_demos_per_task: int | Sequence[int] = 0,
        *,
        cameras: Sequence[str] = ("agentview_rgb",),
        proprioception: bool = False,
        task_ids: Sequence[int] | None = None,
        language: bool = False,
        alignment: str = "auto",
        still: Sequence[str] = (),
        chunk: int = 1,
        storage: str = "ram",
        split: str = "train",
        train_fraction: float = 0.8,
        seed: int = 0,
        normalizer: ActionNormalizer | None = None,
        proprio_stats: Mapping | None = None,
    ):
        single = isinstance(hdf5_files, (str, Path))
        files = [Path(path) for path in ([hdf5_files] if single else hdf5_files)]
        if isinstance(normalize_actions, bool):
            normalize_actions = "zscore" if normalize_actions else "none"
        self.normalize_actions = normalize_actions
        self.augmentation, self.still = augmentation, tuple(still)
        self.sequence_length = sequence_length
        self.chunk = chunk
        self.cameras = tuple(cameras)
        self.proprioception = proprioception
        self.task_ids = None if task_ids is None else tuple(int(task) for task in task_ids)
        self.language = language
        limits = [max_demos_per_task] * len(files) if isinstance(max_demos_per_task, int) \
            else list(max_demos_per_task)
        self._check_settings(files, image_size, limits, split, storage)
        opened = open_files(files, alignment)
        chosen = []
        for path, limit in zip(files, limits, strict=True):
            with open_demo_file(path) as content:
                names = demo_names(content)[:limit or None]
            if split != "all":
                train, val = split_demonstrations(names, path, train_fraction, seed)
                names = train if split == "train" else val
            chosen.append(names)
        self._steps = load_steps(opened, chosen, self.cameras, image_size, storage)
        self._memory = BatchMemory()
        if language:
            self._language = torch.from_numpy(np.stack([_embedded(file) for file in opened]))
        self._use(self._steps.demos, split, normalizer, proprio_stats)

    @classmethod
    def from_config(cls, files: Mapping[int, Path],
                    config: Config) -> tuple[LIBERODataset, LIBERODataset]:
        """Both splits as a :class:`Config` describes them; ``files`` is one file per task id.

        Of files that were collected by ``num_demos`` no more than so many demonstrations are read,
        also where another run has asked for more since.
        """
        return cls.train_val(list(files.values()), **_settings(files, config))

    @classmethod
    def held_out(cls, files: Mapping[int, Path], config: Config, policy,
                 trained_on: Mapping) -> LIBERODataset:
        """The demonstrations that a policy was not trained on, in its own normalisation.

        Args:
            files: of each task id; those that it was trained on, or others under the same names.
            policy: has ``normalizer`` and ``proprio_stats``.
            trained_on: the training split's :meth:`describe`.

        Raises ``ValueError`` when there is no such demonstration.
        """
        whole = cls(list(files.values()), split="all", normalizer=policy.normalizer,
                    proprio_stats=policy.proprio_stats, **_settings(files, config))
        known = {(Path(file["file"]).name, name)
                 for file in trained_on["files"] for name in file["demos"]}
        demos = [demo for demo in whole.demos
                 if (whole._steps.files[demo.file].path.name, demo.name) not in known]
        if not demos:
            raise ValueError(f"the policy was trained on all {len(whole.demos)} demonstrations "
                             "read; expected one that it was not: ask for more (num_demos)")
        whole._use(demos, "val", policy.normalizer, policy.proprio_stats)
        whole.augmentation = "none"
        return whole

    @classmethod
    def train_val(
        cls,
        hdf5_files: str | Path | Sequence[str | Path],
        *,
        train_fraction: float = 0.8,
        seed: int = 0,
        **settings,
    ) -> tuple[LIBERODataset, LIBERODataset]:
        """Both splits over one copy of the images, with the training split's statistics.

        ``settings`` are those of the class. Validation samples are not augmented.
        """
        whole = cls(hdf5_files, split="all", **settings)
        halves: tuple[list[Demo], list[Demo]] = ([], [])
        for index, file in enumerate(whole._steps.files):
            demos = [demo for demo in whole._steps.demos if demo.file == index]
            names = split_demonstrations(
                [demo.name for demo in demos], file.path, train_fraction, seed
            )
            for half, members in zip(halves, names, strict=True):
                half.extend(demo for demo in demos if demo.name in members)
        train, val = copy.copy(whole), copy.copy(whole)
        given = settings.get("normalizer"), settings.get("proprio_stats")
        train._use(halves[0], "train", *given)
        val._use(halves[1], "val", train.normalizer, train.proprio_stats)
        val.augmentation = "none"
        return train, val

    def _check_settings(self, files, image_size, limits, split, storage) -> None:
        def require(condition, name, value, expected):
            if not condition:
                raise ValueError(f"{name}={value!r} is not valid; expected {expected}")

        require(files, "hdf5_files", files, "at least one file")
        for name in ("sequence_length", "chunk"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        require(image_size >= 1, "image_size", image_size, ">= 1")
        require(len(limits) == len(files) and min(limits) >= 0, "max_demos_per_task",
                ", ".join(map(str, limits)), f">= 0, for all or each of {len(files)} files")
        for name, value, options in (
                ("normalize_actions", self.normalize_actions, schema.NORMALIZATIONS),
                ("augmentation", self.augmentation, schema.AUGMENTATIONS),
                ("storage", storage, schema.STORAGES), ("split", split, SPLITS)):
            schema.check_option(name, value, options)
        require(self.cameras and set(self.cameras) <= set(schema.CAMERAS), "cameras", self.cameras,
                f"at least one of {', '.join(schema.CAMERAS)}")
        require(self.task_ids is None or len(self.task_ids) == len(files), "task_ids",
                self.task_ids, f"one per file, of {len(files)}")

    def _use(self, demos, split, normalizer, proprio_stats) -> None:
        """Take these demonstrations' windows as the samples, and their statistics if not given."""
        missing = [name for name, value in (("normalizer", normalizer),
                                            ("proprio_stats", proprio_stats)) if value is None]
        if split == "val" and missing:
            raise ValueError(
                f"split='val' without {' and '.join(missing)}; expected the training split's, "
                "or use LIBERODataset.train_val"
            )
        self.split, self.demos = split, list(demos)
        for demo in self.demos:
            if demo.end - demo.first < self.sequence_length:
                raise ValueError(
                    f"{self._steps.files[demo.file].path}, {demo.name}: "
                    f"{demo.end - demo.first} steps are shorter than "
                    f"sequence_length={self.sequence_length}"
                )
        steps = torch.cat([torch.arange(demo.first, demo.end) for demo in self.demos])
        self.normalizer = normalizer or ActionNormalizer(self.normalize_actions).fit(
            self._steps.actions[steps]
        )
        self.proprio_stats = dict(proprio_stats or fit_proprio(self._steps.proprio[steps]))
        self._actions = self.normalizer.normalize(self._steps.actions)  # (N, 7)
        self._proprio = normalize_proprio(self._steps.proprio, self.proprio_stats)  # (N, P)
        starts = [torch.arange(demo.first, demo.end - self.sequence_length + 1)
                  for demo in self.demos]
        self._starts = torch.cat(starts)  # first step of each sample
        self._ends = torch.cat([torch.full_like(start, demo.end)
                                for start, demo in zip(starts, self.demos, strict=True)])

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Several samples at once: what PyTorch's ``DataLoader`` calls when there is one."""
        batch = self.batch(indices)
        return [
            {
                "observations": {key: value[i] for key, value in batch["observations"].items()},
                "actions": batch["actions"][i],
                "mask": batch["mask"][i],
            }
            for i in range(len(indices))
        ]

    def batch(
        self,
        indices: Sequence[int] | torch.Tensor,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
        as_bytes: bool = False,
    ) -> dict:
        """The samples of ``indices`` (B,) as one batch on ``device``.

        ``generator`` draws the augmentation; None takes PyTorch's global one. ``as_bytes`` leaves
        the frames uint8 in [0, 255], without augmentation, for a program that scales them itself.
        Raises ``IndexError`` for an index out of range.
        """
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if len(indices) and not -len(self) <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"index out of range; the data set has {len(self)} samples")
        steps = self._starts[indices].unsqueeze(1) + torch.arange(self.sequence_length)  # (B, T)
        future = steps.unsqueeze(2) + torch.arange(self.chunk)  # (B, T, K)
        ends = self._ends[indices].view(-1, 1, 1)
        # after a push the demonstrator answers to what could not be foreseen
        pushed_at = self._steps.pushed_at[steps].unsqueeze(2)
        mask = ((future < ends) & (future <= pushed_at)).float()
        actions = self._actions[torch.minimum(future, ends - 1)]  # (B, T, K, 7)
        if self.chunk == 1:
            actions, mask = actions.squeeze(2), mask.squeeze(2)
        observations = {
            camera: self._frames(camera, steps.flatten(), torch.device(device), as_bytes)
                        .unflatten(0, steps.shape)
            for camera in self.cameras
        }
        if not as_bytes:
            for camera, frames in observations.items():
                mode = self.augmentation
                if camera in self.still and mode not in ("none", "colour"):
                    mode = "brightness"
                observations[camera] = augment_images(frames, mode,
                                                      generator or torch.default_generator)
        if self.proprioception:
            observations["proprio"] = self._proprio[steps].to(device)
        if self.task_ids is not None:
            tasks = torch.tensor(self.task_ids)[self._steps.file_of_step[steps]]
            observations["task_id"] = tasks.to(device)
        if self.language:
            embedded = self._language[self._steps.file_of_step[steps]]  # (B, T, 384)
            observations["language"] = embedded.to(device)
        return {
            "observations": observations, "actions": actions.to(device), "mask": mask.to(device)
        }

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
        # a few at a time, so that their bytes are still in the processor's cache
        some = max(1, _BYTES_AT_ONCE // math.prod(shape[1:]))
        for part, out in zip(steps.split(some), floats.split(some), strict=True):
            torch.div(frames.pick(camera, part), 255, out=out)
        return floats

    def batches(
        self,
        batch_size: int,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        start: int = 0,
        as_bytes: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[dict]:
        """The batches of an epoch; order and augmentation are a function of (seed, epoch).

        ``start`` leaves out so many batches and goes on exactly as if they had been drawn;
        ``as_bytes``: see :meth:`batch`. ``part=(r, n)`` gives of each batch every n-th sample from
        the r-th on, or where there is none its first one with an empty mask.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not valid; expected >= 1")
        order = torch.arange(len(self))
        if shuffle:
            order = torch.randperm(len(self), generator=_generator(seed, epoch))
        for number, indices in enumerate(order.split(batch_size)):
            if number < start or (drop_last and len(indices) < batch_size):
                continue
            mine = indices[part[0]::part[1]]
            batch = self.batch(mine if len(mine) else indices[:1],
                               _generator(seed, epoch, number + 1, *part[:1]), device, as_bytes)
            if not len(mine):
                batch["mask"].zero_()
            yield batch

    def describe(self) -> dict:
        """Where the samples come from, as JSON: for a run's provenance.

        Of each file two digests say what it held wherever it lay: of the ``actions`` learned, and
        of the ``frames`` that the demonstrations begin with, which depend on the renderer.
        """
        files = []
        for index, file in enumerate(self._steps.files):
            demos = [demo for demo in self.demos if demo.file == index]
            files.append({
                "file": str(file.path),
                "demos": [demo.name for demo in demos],
                "steps": sum(demo.end - demo.first for demo in demos),
                "alignment": file.alignment,
                "source": file.source,
                "actions": digest(b"".join(self._steps.actions[demo.first:demo.end].numpy()
                                           .tobytes() for demo in demos)),
                "frames": digest(b"".join(_first_frames(file.path, demos, self.cameras))),
            })
        return {"split": self.split, "samples": len(self), "files": files}


def _settings(files: Mapping[int, Path], config: Config) -> dict:
    """What :class:`LIBERODataset` is given besides the files and the split."""
    data, model = config.data, config.model
    collected = [not data.demo_dir and source_of(path) == "scripted" for path in files.values()]
    limits = [data.max_demos_per_task or (data.num_demos if ours else 0) for ours in collected]
    return dict(
        sequence_length=data.sequence_length, image_size=model.image_size,
        normalize_actions=data.normalize_actions, augmentation=data.augmentation,
        max_demos_per_task=limits, cameras=model.cameras, proprioception=model.proprioception,
        still=(schema.STILL_CAMERA,) if data.scenes else (),
        alignment=data.alignment, chunk=model.chunk, storage=data.storage,
        task_ids=list(files) if model.conditioning == "task_id" else None,
        language=model.conditioning == "language")


def _first_frames(path: Path, demos: Sequence[Demo], cameras: Sequence[str]) -> Iterator[bytes]:
    with open_demo_file(path) as content:
        for demo in demos:
            for camera in cameras:
                yield content[schema.DATA_GROUP][demo.name]["obs"][camera][0].tobytes()


def _embedded(file: DemoFile) -> np.ndarray:
    if not normalize_instruction(file.language):
        raise ValueError(f"{file.path}: instruction {file.language!r} is empty; expected what the "
                         "task asks for")
    try:
        return embed_instruction(file.language)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream is a function of ``key``; a trailing 0 would not count."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
