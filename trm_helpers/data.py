"""Demonstrations as samples: loading into memory, split, normalisation, vectorised batches."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from . import schema
from .augment import AUGMENTATIONS, augment_images, resize_images
from .config import Config
from .validate import check_demo_file, demo_names, open_demo_file, resolve_alignment, source_of

MODES = ("zscore", "minmax", "none")
EPSILON = 1e-6
SPLITS = ("train", "val", "all")


class ActionNormalizer:
    """Affine scaling of the six arm dimensions; the gripper, -1 or +1, is left as it is.

    ``zscore`` maps ``a`` to ``(a - mean) / (std + 1e-6)``, ``minmax`` maps the fitted range to
    [-1, 1], ``none`` changes nothing. A dimension that never varied in the fitted actions would be
    divided by (almost) nothing: it becomes 0 whatever its value, and comes back as the constant it
    was, so that neither an unseen value nor a prediction is blown up.
    """

    def __init__(self, mode: str = "zscore"):
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not valid; expected one of {', '.join(MODES)}")
        self.mode = mode
        fitted = mode == "none"
        self.offset: list[float] | None = [0.0] * schema.ARM_DIM if fitted else None
        self.scale: list[float] | None = [1.0] * schema.ARM_DIM if fitted else None

    def fit(self, actions) -> ActionNormalizer:
        """Fit to actions (..., 7), a tensor or an array; returns itself."""
        arm = np.asarray(actions, dtype=np.float64).reshape(-1, schema.ACTION_DIM)
        arm = arm[:, : schema.ARM_DIM]
        if len(arm) == 0:
            raise ValueError("actions is empty; expected at least one action to fit to")
        low, high = arm.min(axis=0), arm.max(axis=0)
        if self.mode == "zscore":
            offset, scale = arm.mean(axis=0), arm.std(axis=0) + EPSILON
        elif self.mode == "minmax":
            offset, scale = (high + low) / 2, (high - low) / 2
        else:
            return self
        constant = high == low
        self.offset = np.where(constant, low, offset).tolist()
        self.scale = np.where(constant, 0.0, scale).tolist()
        return self

    def normalize(self, actions):
        """Actions (..., 7) in the environment's units to normalised ones; tensor or array."""
        self._check(actions)
        inverse = [1 / scale if scale else 0.0 for scale in self.scale]
        return (actions - _row(self.offset, 0.0, actions)) * _row(inverse, 1.0, actions)

    def denormalize(self, actions):
        """Inverse of :meth:`normalize`, for tensors or arrays (..., 7)."""
        self._check(actions)
        return actions * _row(self.scale, 1.0, actions) + _row(self.offset, 0.0, actions)

    def _check(self, actions) -> None:
        if self.offset is None:
            raise ValueError(f"the {self.mode} normaliser has no statistics; call fit first")
        if actions.shape[-1:] != (schema.ACTION_DIM,) or "float" not in str(actions.dtype):
            raise ValueError(
                f"actions have shape {tuple(actions.shape)} and type {actions.dtype}; "
                "expected (..., 7) and a floating type"
            )

    def to_dict(self) -> dict:
        """``mode``, ``offset`` and ``scale`` (six floats each): all of it, as JSON holds it."""
        return {"mode": self.mode, "offset": self.offset, "scale": self.scale}

    @classmethod
    def from_dict(cls, values: Mapping) -> ActionNormalizer:
        """Inverse of :meth:`to_dict`."""
        normalizer = cls(values["mode"])
        normalizer.offset, normalizer.scale = values["offset"], values["scale"]
        return normalizer


def _row(arm: list[float], gripper: float, like):
    """The seven numbers as a tensor or array of the type and device of ``like``."""
    if isinstance(like, torch.Tensor):
        return torch.tensor([*arm, gripper], dtype=like.dtype, device=like.device)
    return np.array([*arm, gripper], dtype=like.dtype)


def fit_proprio(proprio: torch.Tensor) -> dict[str, list[float]]:
    """``mean`` and ``std`` of proprioception (N, P): P floats each, for ``(p - mean) / std``.

    ``std`` is 1 where the values do not vary, so that dividing by it is always safe.
    """
    values = proprio.double()
    std = values.std(dim=0, correction=0)
    std[std < EPSILON] = 1.0
    return {"mean": values.mean(dim=0).tolist(), "std": std.tolist()}


def normalize_proprio(proprio: torch.Tensor, stats: Mapping) -> torch.Tensor:
    """Z-score proprioception (..., P) with the statistics of :func:`fit_proprio`."""
    mean, std = (proprio.new_tensor(stats[name]) for name in ("mean", "std"))
    return (proprio - mean) / std


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


# --- memory --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _File:
    path: Path
    alignment: str
    source: str


@dataclass(frozen=True)
class _Demo:
    """Where a demonstration's steps lie in :class:`_Memory`: ``first`` up to ``end``."""

    file: int
    name: str
    first: int
    end: int


@dataclass(frozen=True)
class _Memory:
    """All steps of all demonstrations one after another, observation and action paired."""

    files: list[_File]
    demos: list[_Demo]
    images: dict[str, torch.Tensor]  # camera -> (N, S, S, 3) uint8
    actions: torch.Tensor  # (N, 7) float32, environment's units
    proprio: torch.Tensor  # (N, P) float32, m and rad
    file_of_step: torch.Tensor  # (N,) int64
    pushed_at: torch.Tensor  # (N,) int64, the first step from here on that was disturbed


def _open_files(files: Sequence[Path], alignment: str) -> list[_File]:
    for path in files:
        check_demo_file(path)
    return [_File(path, resolve_alignment(path, alignment), source_of(path)) for path in files]


def _lay_out(files: list[_File], chosen: list[list[str]]) -> list[_Demo]:
    """Give each chosen demonstration its place; a shift file loses one step to the pairing."""
    demos, first = [], 0
    for index, (file, names) in enumerate(zip(files, chosen, strict=True)):
        with open_demo_file(file.path) as content:
            for name in names:
                length = len(content[schema.DATA_GROUP][name]["actions"])
                end = first + length - (file.alignment == "shift")
                demos.append(_Demo(index, name, first, end))
                first = end
    return demos


def _load(
    files: list[_File], chosen: list[list[str]], cameras: Sequence[str], image_size: int
) -> _Memory:
    """Read the chosen demonstrations of each file, images resized once."""
    demos = _lay_out(files, chosen)
    count = demos[-1].end
    shape = (count, image_size, image_size, 3)
    memory = _Memory(
        files=files,
        demos=demos,
        images={camera: torch.empty(shape, dtype=torch.uint8) for camera in cameras},
        actions=torch.empty(count, schema.ACTION_DIM),
        proprio=torch.empty(count, schema.PROPRIO_DIM),
        file_of_step=torch.empty(count, dtype=torch.int64),
        pushed_at=torch.empty(count, dtype=torch.int64),
    )
    with tqdm(total=len(demos), desc="loading demonstrations", unit="demo") as progress:
        for index, file in enumerate(files):
            with open_demo_file(file.path) as content:
                for demo in (demo for demo in demos if demo.file == index):
                    _fill(memory, demo, content[schema.DATA_GROUP][demo.name])
                    progress.update()
    return memory


def _fill(memory: _Memory, demo: _Demo, group) -> None:
    """Copy one demonstration, pairing obs[t] with actions[t] (raw) or actions[t+1] (shift)."""
    place, length = slice(demo.first, demo.end), demo.end - demo.first
    late = len(group["actions"]) - length
    memory.actions[place] = torch.from_numpy(group["actions"][late:])
    memory.file_of_step[place] = demo.file
    memory.pushed_at[place] = torch.from_numpy(_next_push(group, demo.first - late))[late:]
    parts = [group["obs"][key][:length] for key in schema.PROPRIO_KEYS]
    memory.proprio[place] = torch.from_numpy(np.concatenate(parts, axis=1))
    for camera, images in memory.images.items():
        frames = torch.from_numpy(group["obs"][camera][:length])
        images[place] = resize_images(frames, images.shape[1])


def _next_push(group, first: int) -> np.ndarray:
    """(T,) the first step from t on whose action was not the one executed; a large number if none.

    Steps are counted from ``first``. Only this project's files push the arm about.
    """
    pushed = np.full(len(group["actions"]), np.iinfo(np.int64).max)
    if schema.EXECUTED_ACTIONS in group:
        differs = (group["actions"][:] != group[schema.EXECUTED_ACTIONS][:]).any(axis=1)
        pushed[differs] = first + np.flatnonzero(differs)
    return np.minimum.accumulate(pushed[::-1])[::-1].copy()


# --- samples -------------------------------------------------------------------------------------
class LIBERODataset(torch.utils.data.Dataset):
    """Windows of T consecutive steps of LIBERO demonstrations, held in memory.

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
        augmentation: ``none``, ``reference`` or ``shift``: see :func:`augment_images`.
        max_demos_per_task: the first so many demonstrations of each file; 0 takes all.
        cameras: names of `schema.CAMERAS`.
        proprioception: add ``proprio``: P = 12, the values of `schema.PROPRIO_KEYS`.
        task_ids: one per file, added as ``task_id``; None leaves it out.
        alignment: ``auto``, ``raw`` or ``shift``: see :func:`resolve_alignment`.
        chunk: K.
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
        max_demos_per_task: int = 0,
        *,
        cameras: Sequence[str] = ("agentview_rgb",),
        proprioception: bool = False,
        task_ids: Sequence[int] | None = None,
        alignment: str = "auto",
        chunk: int = 1,
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
        self.augmentation = augmentation
        self.sequence_length = sequence_length
        self.chunk = chunk
        self.cameras = tuple(cameras)
        self.proprioception = proprioception
        self.task_ids = None if task_ids is None else tuple(int(task) for task in task_ids)
        self._check_settings(files, image_size, max_demos_per_task, split)
        opened = _open_files(files, alignment)
        chosen = []
        for path in files:
            with open_demo_file(path) as content:
                names = demo_names(content)[: max_demos_per_task or None]
            if split != "all":
                train, val = split_demonstrations(names, path, train_fraction, seed)
                names = train if split == "train" else val
            chosen.append(names)
        self._memory = _load(opened, chosen, self.cameras, image_size)
        self._use(self._memory.demos, split, normalizer, proprio_stats)

    @classmethod
    def from_config(cls, files: Mapping[int, Path],
                    config: Config) -> tuple[LIBERODataset, LIBERODataset]:
        """Both splits as a :class:`Config` describes them; ``files`` is one file per task id."""
        data, model = config.data, config.model
        return cls.train_val(
            list(files.values()), train_fraction=data.train_fraction, seed=data.data_seed,
            sequence_length=data.sequence_length, image_size=model.image_size,
            normalize_actions=data.normalize_actions, augmentation=data.augmentation,
            max_demos_per_task=data.max_demos_per_task, cameras=model.cameras,
            proprioception=model.proprioception, alignment=data.alignment, chunk=model.chunk,
            task_ids=list(files) if model.num_tasks else None,
        )

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
        halves: tuple[list[_Demo], list[_Demo]] = ([], [])
        for index, file in enumerate(whole._memory.files):
            demos = [demo for demo in whole._memory.demos if demo.file == index]
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

    def _check_settings(self, files, image_size, max_demos_per_task, split) -> None:
        def require(condition, name, value, expected):
            if not condition:
                raise ValueError(f"{name}={value!r} is not valid; expected {expected}")

        require(files, "hdf5_files", files, "at least one file")
        for name in ("sequence_length", "chunk"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        require(image_size >= 1, "image_size", image_size, ">= 1")
        require(max_demos_per_task >= 0, "max_demos_per_task", max_demos_per_task, ">= 0")
        require(self.normalize_actions in MODES, "normalize_actions", self.normalize_actions,
                f"True, False or one of {', '.join(MODES)}")
        require(self.augmentation in AUGMENTATIONS, "augmentation", self.augmentation,
                f"one of {', '.join(AUGMENTATIONS)}")
        require(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}")
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
                    f"{self._memory.files[demo.file].path}, {demo.name}: "
                    f"{demo.end - demo.first} steps are shorter than "
                    f"sequence_length={self.sequence_length}"
                )
        steps = torch.cat([torch.arange(demo.first, demo.end) for demo in self.demos])
        memory = self._memory
        self.normalizer = normalizer or ActionNormalizer(self.normalize_actions).fit(
            memory.actions[steps]
        )
        self.proprio_stats = dict(proprio_stats or fit_proprio(memory.proprio[steps]))
        self._actions = self.normalizer.normalize(memory.actions)  # (N, 7)
        self._proprio = normalize_proprio(memory.proprio, self.proprio_stats)  # (N, P)
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
    ) -> dict:
        """The samples of ``indices`` (B,) as one batch on ``device``.

        ``generator`` draws the augmentation; None takes PyTorch's global one. Raises
        ``IndexError`` for an index out of range.
        """
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if len(indices) and not -len(self) <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"index out of range; the data set has {len(self)} samples")
        steps = self._starts[indices].unsqueeze(1) + torch.arange(self.sequence_length)  # (B, T)
        future = steps.unsqueeze(2) + torch.arange(self.chunk)  # (B, T, K)
        ends = self._ends[indices].view(-1, 1, 1)
        # after a push the demonstrator answers to what could not be foreseen
        pushed_at = self._memory.pushed_at[steps].unsqueeze(2)
        mask = ((future < ends) & (future <= pushed_at)).float()
        actions = self._actions[torch.minimum(future, ends - 1)]  # (B, T, K, 7)
        if self.chunk == 1:
            actions, mask = actions.squeeze(2), mask.squeeze(2)
        observations = {
            camera: self._images(camera, steps, generator or torch.default_generator, device)
            for camera in self.cameras
        }
        if self.proprioception:
            observations["proprio"] = self._proprio[steps].to(device)
        if self.task_ids is not None:
            tasks = torch.tensor(self.task_ids)[self._memory.file_of_step[steps]]
            observations["task_id"] = tasks.to(device)
        return {
            "observations": observations, "actions": actions.to(device), "mask": mask.to(device)
        }

    def _images(self, camera, steps, generator, device) -> torch.Tensor:
        stored = self._memory.images[camera]
        # whole frames as rows: several times faster than indexing four dimensions
        picked = stored.flatten(1).index_select(0, steps.flatten())
        images = picked.to(device).float().div_(255).view(*steps.shape, *stored.shape[1:])
        return augment_images(images, self.augmentation, generator)

    def batches(
        self,
        batch_size: int,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[dict]:
        """The batches of an epoch; order and augmentation are a function of (seed, epoch).

        ``start`` leaves out so many batches and goes on exactly as if they had been drawn.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not valid; expected >= 1")
        order = torch.arange(len(self))
        if shuffle:
            order = torch.randperm(len(self), generator=_generator(seed, epoch))
        for number, indices in enumerate(order.split(batch_size)):
            if number < start or (drop_last and len(indices) < batch_size):
                continue
            yield self.batch(indices, _generator(seed, epoch, number + 1), device)

    def describe(self) -> dict:
        """Where the samples come from, as JSON: for a run's provenance."""
        files = []
        for index, file in enumerate(self._memory.files):
            demos = [demo for demo in self.demos if demo.file == index]
            files.append({
                "file": str(file.path),
                "demos": [demo.name for demo in demos],
                "steps": sum(demo.end - demo.first for demo in demos),
                "alignment": file.alignment,
                "source": file.source,
            })
        return {"split": self.split, "samples": len(self), "files": files}


def _generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream is a function of ``key``; a trailing 0 would not count."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
