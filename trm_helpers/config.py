"""Frozen settings for data, model, training, evaluation and search, and the presets built on them.

A setting lives in exactly one dataclass, so that a notebook's flat parameters
(``lr=1e-3, hidden_dim=128``) name it without a prefix: see :func:`from_flat`. Its type says which
values there are (``Literal``), and whether it belongs to the run or to the machine (:func:`local`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import numbers
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from . import paths, schema
from .schema import PROTOCOLS


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} is not valid; expected {expected}")


def _different(name: str, values: tuple) -> None:
    _require(len(set(values)) == len(values), name, values, "no value twice")


def local(default: Any) -> Any:
    """A setting of the machine and the call: where, how fast and how far, never what.

    It may differ when a run is resumed, and what a run's file says about it is never used: reading
    somebody's run must not choose this machine's folders, databases or processes.
    """
    return field(default=default, metadata={"local": True})


def _convert_types(part) -> None:
    """Give each setting the type of its annotation, or raise ``ValueError``.

    Whole numbers serve as floats and lists as tuples. Notebooks and YAML files bring other types:
    YAML reads ``1e-3`` as a string and ``1.0e-3`` as a number.
    """
    for name, kind in types_of(type(part)).items():
        object.__setattr__(part, name, convert(name, getattr(part, name), kind))


@functools.cache
def types_of(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    return typing.get_type_hints(kind)


def convert(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the type ``kind``; raises ``ValueError``, with ``name``, where it is another."""
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
        options = typing.get_args(kind)
        fits = isinstance(value, (list, tuple)) and (options or all(_is_a(v, kind) for v in value))
        _require(fits, name, value, f"a list of {'names' if options else kind.__name__}")
        return tuple(convert(name, item, kind) for item in value)
    if options := typing.get_args(kind):
        return schema.check_option(name, value, options)
    _require(_is_a(value, kind), name, value, kind.__name__)
    return kind(value)


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    fits = isinstance(value, {int: numbers.Integral, float: numbers.Real}.get(kind, kind))
    return fits and not (kind is float and math.isinf(value))


@dataclass(frozen=True)
class DataConfig:
    """Which demonstrations are used, and how they become samples."""

    suite: Literal[schema.TRAINING_SUITES] = "libero_spatial"
    task_ids: tuple[int, ...] = (0,)
    demos: Literal[schema.DEMOS] = "auto"  # auto: human ones if found, else scripted
    demo_dir: str = local("")  # a folder with *_demo.hdf5; "": data/ and Kaggle's input
    num_demos: int = 50  # demonstrations to collect per task when scripted ones are needed
    placement: Literal[schema.PLACEMENTS] = "benchmark"  # of objects in scripted ones
    max_demos_per_task: int = 0  # demonstrations read per task; 0 reads all
    sequence_length: int = 1  # T: consecutive steps in one sample
    alignment: Literal[("auto", *schema.ALIGNMENTS)] = "auto"  # auto: the file's, else measured
    normalize_actions: Literal[schema.NORMALIZATIONS] = "zscore"  # never applied to the gripper
    augmentation: Literal[schema.AUGMENTATIONS] = "reference"  # of training images
    scenes: int = 0  # drawn around each demonstration, to learn first where things are; 0: none
    storage: Literal[schema.STORAGES] = local("ram")  # of the frames; mmap: read when needed

    def __post_init__(self):
        schema.check_training_suite(self.suite)
        _convert_types(self)
        if self.demo_dir:
            object.__setattr__(self, "demo_dir", str(paths.absolute(self.demo_dir)))
        _require(len(self.task_ids) > 0, "task_ids", self.task_ids, "at least one task id")
        for task_id in self.task_ids:
            schema.check_task_id(self.suite, task_id)
        _different("task_ids", self.task_ids)
        _require(self.num_demos >= 2, "num_demos", self.num_demos, "at least 2, to split")
        for name in ("max_demos_per_task", "scenes"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        _require(self.sequence_length >= 1, "sequence_length", self.sequence_length, ">= 1")


@dataclass(frozen=True)
class ModelConfig:
    """The network, and what it sees and returns: all that is needed to rebuild it."""

    variant: Literal[schema.VARIANTS] = "block"  # the reference; trm: the paper's, on tokens
    hidden_dim: int = 256  # D
    num_recursions: int = 8  # applications of the shared block; of trm, supervision steps (N_sup)
    num_layers: int = 2  # of trm's network, which is shared, of the transformer, of act's three
    latent_updates: int = 6  # of trm: n, updates of z before each of y
    cycles: int = 3  # of trm: T, of which the last has a gradient
    image_grid: int = 4  # of all but block: image_grid x image_grid tokens per camera
    deep_supervision: bool = False  # grade the answer after every recursion, each on its own
    halting: Literal[schema.HALTING] = "fixed"  # see TRMPolicy.recurse
    ponder_cost: float = 0.01  # weight of ACT's expected depth in the loss
    convergence_threshold: float = 1e-3  # squared change of an action that counts as none
    carry_over: bool = False  # in control, begin each decision from the last one's state
    gripper: Literal[schema.GRIPPERS] = "continuous"  # the head of its command
    cameras: tuple[Literal[tuple(schema.CAMERAS)], ...] = ("agentview_rgb",)
    image_size: int = schema.IMAGE_SIZE
    image_activation: Literal[schema.IMAGE_ACTIVATIONS] = "relu"  # silu: of images centred on 0
    keypoints: tuple[str, ...] = ()  # all the agent view says: where these things are; see `scenes`
    keypoint_tasks: int = 0  # that are known to what finds them
    proprioception: bool = False  # joint angles, finger positions, end-effector position
    conditioning: Literal[schema.CONDITIONING] = "none"  # how the policy is told its task
    num_tasks: int = 10  # size of the task embedding
    chunk: int = 1  # K: future actions predicted at once
    execution_horizon: int = 1  # how many of them are executed before the next look
    temporal_ensembling: bool = False  # average what overlapping chunks say of a step

    def __post_init__(self):
        _convert_types(self)
        for name in ("hidden_dim", "num_recursions", "num_layers", "latent_updates", "cycles",
                     "image_grid", "num_tasks", "chunk"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        _require(self.hidden_dim % schema.NUM_HEADS == 0, "hidden_dim", self.hidden_dim,
                 f"a multiple of {schema.NUM_HEADS}, the number of attention heads")
        _require(not self.deep_supervision or self.halting not in ("remainder", "act"),
                 "deep_supervision", self.deep_supervision,
                 f"False with halting={self.halting!r}, which weighs all steps together")
        _require(self.variant in ("block", "trm") or self.num_recursions == 1, "num_recursions",
                 self.num_recursions, f"1 for variant={self.variant!r}, which does not recurse")
        _require(self.ponder_cost >= 0, "ponder_cost", self.ponder_cost, ">= 0")
        _require(self.convergence_threshold > 0, "convergence_threshold",
                 self.convergence_threshold, "> 0")
        _require(len(self.cameras) > 0, "cameras", self.cameras, "at least one camera")
        _different("cameras", self.cameras)
        _different("keypoints", self.keypoints)
        if self.keypoints:
            _require(schema.STILL_CAMERA in self.cameras, "cameras", self.cameras,
                     f"{schema.STILL_CAMERA} among them with keypoints, which are seen there")
            _require(self.image_size % 4 == 0, "image_size", self.image_size,
                     "a multiple of 4 with keypoints")
        if self.variant == "block":
            _require(self.image_size >= 36, "image_size", self.image_size,
                     ">= 36, what the three convolutions need")
        else:
            step = 8 * self.image_grid  # pixels
            _require(self.image_size % step == 0, "image_size", self.image_size,
                     f"a multiple of {step} with image_grid={self.image_grid}")
        _require(1 <= self.execution_horizon <= self.chunk, "execution_horizon",
                 self.execution_horizon, f"1 to chunk={self.chunk}")


@dataclass(frozen=True)
class TrainConfig:
    """Behaviour cloning."""

    epochs: int = 50
    batch_size: int = 64
    lr: float = 3e-4
    weight_decay: float = 1e-4
    loss: Literal[schema.LOSSES] = "mse"  # mix: the mean of both
    ema_decay: float = 0.0  # exponential moving average of the weights; 0 is off
    patience: int = 10  # epochs without a better validation loss before stopping; 0 never stops
    rollout_every: int = 0  # epochs between rollouts that choose `best`; 0: by validation loss
    max_minutes: float = local(0.0)  # save and end cleanly after so long; 0 is no limit
    stop_epoch: int = local(0)  # end cleanly after so many of the epochs; 0 trains all
    precision: Literal[schema.PRECISIONS] = "auto"
    compile: bool = False  # torch.compile; goes on without it where it fails
    device: Literal[schema.DEVICES] = local("auto")
    num_threads: int = local(0)  # CPU threads; 0: $OMP_NUM_THREADS, or one
    seed: int = 0
    wandb_mode: Literal[schema.WANDB_MODES] = local("disabled")  # without a key, online is offline

    def __post_init__(self):
        _convert_types(self)
        for name in ("epochs", "batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        _require(self.lr > 0, "lr", self.lr, "> 0")
        for name in ("weight_decay", "patience", "rollout_every", "max_minutes", "num_threads",
                     "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        _require(0 <= self.stop_epoch <= self.epochs, "stop_epoch", self.stop_epoch,
                 f"0 to epochs={self.epochs}")
        for name, most in (("seed", 2**63 - 1), ("num_threads", 1024)):  # what PyTorch takes
            _require(getattr(self, name) <= most, name, getattr(self, name), f"at most {most}")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")


@dataclass(frozen=True)
class EvalConfig:
    """Rollouts in the simulator on the official init states."""

    protocol: Literal[tuple(PROTOCOLS)] = "quick"  # see schema.PROTOCOLS
    num_episodes: int = 0  # per task; 0 takes the protocol's
    first_init_state: int = 0  # episodes use init states first, first + 1, ...
    horizon: int = 0  # steps allowed; 0 takes the protocol's for the suite
    perturbation: Literal[schema.PERTURBATIONS] = "none"  # see evaluation/perturbations.py
    num_videos: int = 3  # episodes per task filmed
    bound_episodes: int = 0  # per task of replay, expert, random and no-op, for comparison
    eval_workers: int = local(1)  # simulator processes
    cluster: str = local("")  # address of a Dask scheduler whose workers play the episodes

    def __post_init__(self):
        _convert_types(self)
        _require(0 <= self.num_episodes <= schema.NUM_INIT_STATES, "num_episodes",
                 self.num_episodes, f"0 to {schema.NUM_INIT_STATES}, the official init states")
        last = schema.NUM_INIT_STATES - self.episodes
        _require(0 <= self.first_init_state <= last, "first_init_state", self.first_init_state,
                 f"0 to {last} with {self.episodes} episodes")
        for name in ("horizon", "num_videos"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        most = schema.NUM_INIT_STATES - self.first_init_state
        _require(0 <= self.bound_episodes <= most, "bound_episodes", self.bound_episodes,
                 f"0 to {most} with first_init_state={self.first_init_state}")
        _require(self.eval_workers >= 1, "eval_workers", self.eval_workers, ">= 1")

    @property
    def episodes(self) -> int:
        """Of each task: ``num_episodes``, or the protocol's number."""
        return self.num_episodes or PROTOCOLS[self.protocol].episodes

    @property
    def init_states(self) -> range:
        """Of each task: the official init states that episodes begin in."""
        return range(self.first_init_state, self.first_init_state + self.episodes)


# in a URL, also a malformed one
_PASSWORD = re.compile(r":(?!//)[^@]*@|(?i:(pass(word|wd)?|pwd|token|secret)=)")


@dataclass(frozen=True)
class SearchConfig:
    """The sixteen-point grid of the reference, part of it, or a guided search between its ends."""

    search_method: Literal[schema.SEARCH_METHODS] = "grid"  # tpe, halving: through Optuna
    search_lrs: tuple[float, ...] = (1e-3, 5e-4, 3e-4, 1e-4)  # tpe, halving: anywhere between
    search_hidden_dims: tuple[int, ...] = (128, 256)
    search_num_recursions: tuple[int, ...] = (4, 8)
    search_space: str = ""  # further axes, as YAML: "{chunk: [4, 8], loss: [l1, mse]}"
    search_epochs: int = 10
    max_configs: int = 0  # 0 is as many as the grid has points; of it, so many are spread over it
    search_episodes: int = 0  # rollouts per task and trial; 0 ranks by validation loss alone
    search_replicates: int = 1  # seeds for each of the three best
    search_shard: str = ""  # "2/4": every fourth point of the grid from the second on
    search_workers: int = local(0)  # trials at once; 0 is one for each GPU, or one
    search_minutes: float = local(0.0)  # end trials after so long, to go on later; 0: no limit
    search_storage: str = local("")  # URL of a database; "": $TRM_SEARCH_STORAGE, or a file

    def __post_init__(self):
        _convert_types(self)
        if _PASSWORD.search(self.search_storage):  # without the value, which would be printed
            raise ValueError("search_storage holds a password; expected a URL without one. "
                             "Parameters are stored in notebooks and files: put the URL into the "
                             "environment variable TRM_SEARCH_STORAGE instead, and remove the "
                             "executed notebook that holds it")
        for name in ("search_lrs", "search_hidden_dims", "search_num_recursions"):
            values = getattr(self, name)
            _require(len(values) > 0 and min(values) > 0, name, values, "positive values")
            _different(name, values)
        for name in ("search_epochs", "search_replicates"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("max_configs", "search_episodes", "search_workers", "search_minutes"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        _require(not self.search_shard or self.search_method == "grid", "search_shard",
                 self.search_shard, "none but with search_method='grid', whose points are fixed")
        _require(not self.search_shard or self.search_replicates == 1, "search_replicates",
                 self.search_replicates, "1 in a shard: finalists are known when all have ended")
        _ = self.shard  # refuses a bad one

    @property
    def shard(self) -> tuple[int, int]:
        """Which of how many, from 0: (1, 4) for ``search_shard="2/4"``; (0, 1) for all."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.search_shard or "1/1")
        which, count = map(int, found.groups()) if found else (0, 0)
        _require(1 <= which <= count, "search_shard", self.search_shard,
                 "which of how many, from '1/4' to '4/4'")
        return which - 1, count


@dataclass(frozen=True)
class Config:
    """Everything a run is made from; written to its ``config.json``."""

    preset: str = "reference"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self):
        if self.model.conditioning == "task_id":
            highest = max(self.data.task_ids)
            _require(highest < self.model.num_tasks, "num_tasks", self.model.num_tasks,
                     f"more than the highest task id, {highest}")
        _require(not self.data.scenes or schema.STILL_CAMERA in self.model.cameras, "cameras",
                 self.model.cameras, f"{schema.STILL_CAMERA} among them with scenes, for it")
        _require(not self.data.scenes or not self.model.keypoints, "keypoints",
                 self.model.keypoints, "none with scenes, which say what there is")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def flat(self) -> dict[str, Any]:
        """Every setting by its name, without the part it belongs to; not the preset."""
        return {name: value for part in PARTS for name, value in vars(getattr(self, part)).items()}

    def changes(self) -> dict[str, Any]:
        """The settings that are not the preset's: ``from_flat(preset, **changes)`` is this one."""
        usual = from_flat(self.preset).flat()
        return {name: value for name, value in self.flat().items() if value != usual[name]}

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """Inverse of :meth:`to_dict`, also of older versions, see :func:`migrate`.

        Raises ``ValueError`` for a key that is not a setting.
        """
        parts = {}
        for name, kind in PARTS.items():
            part = migrate(values.get(name, {}))
            check_names(part, [f.name for f in dataclasses.fields(kind)], f"{name} setting")
            parts[name] = kind(**part)
        check_names(values, ["preset", *PARTS], "part of a configuration")
        return cls(preset=values.get("preset", "reference"), **parts)

    def local(self) -> dict[str, Any]:
        """The settings of the machine and the call, see :func:`local`."""
        return {name: value for name, value in self.flat().items() if name in local_settings()}

    def replace(self, **settings) -> Config:
        """A copy with the named settings changed, whichever part they belong to."""
        owners = settings_by_part()
        check_names(settings, list(owners), "setting")
        parts = {}
        for name in PARTS:
            mine = {key: value for key, value in settings.items() if owners[key] == name}
            parts[name] = dataclasses.replace(getattr(self, name), **mine)
        return dataclasses.replace(self, **parts)


PARTS = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "search": SearchConfig,
}


def settings_by_part() -> dict[str, str]:
    """Every flat setting name with the part of :class:`Config` that holds it."""
    return {f.name: part for part, kind in PARTS.items() for f in dataclasses.fields(kind)}


def local_settings() -> set[str]:
    """The names of all settings of the machine and the call, see :func:`local`."""
    return {f.name for kind in PARTS.values() for f in dataclasses.fields(kind)
            if f.metadata.get("local")}


# Former settings and the constants that they became; None: of the machine, any value is ignored.
REMOVED = {
    "train_fraction": 0.8, "data_seed": 0, "num_heads": 4, "kl_weight": 10.0,
    "halting_threshold": 0.01, "halting_tolerance": 0.05, "halting_weight": 0.5, "num_experts": 4,
    "min_lr": 1e-6, "grad_clip": 1.0, "gripper_weight": 0.1, "rollout_episodes": 10,
    "wandb_project": None, "episode_limit": None, "search_finalists": 3,
}


def migrate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings written by any version of the package, as today's.

    Raises ``ValueError`` for a former setting whose value is not the constant that replaced it.
    """
    for name, constant in REMOVED.items():
        value = settings.get(name, constant)
        _require(constant is None or value == constant, name, value,
                 f"{constant!r}, which is a constant today and no setting")
    return {name: value for name, value in settings.items() if name not in REMOVED}


def check_names(given, known: list[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}{schema.did_you_mean(name, known)}; valid: "
                             f"{', '.join(sorted(known))}")


# What the demo needs to succeed in the simulator: both cameras, proprioception, action chunks.
_CONTROL = dict(
    cameras=("agentview_rgb", "eye_in_hand_rgb"), image_size=64, image_activation="silu",
    proprioception=True, chunk=8, execution_horizon=4, gripper="classifier",
)
# One task learned and evaluated on two CPU cores in minutes.
_DEMO = dict(
    _CONTROL, suite="libero_spatial", task_ids=(2,), num_demos=30,
    num_recursions=4, epochs=70, lr=1e-3, loss="l1", ema_decay=0.99, patience=0,
    normalize_actions="none", augmentation="shift", num_videos=2, eval_workers=2,
    search_epochs=3, max_configs=4,
)
# The paper's recursion on tokens: eight times the computation of the demo's block.
_TRM = dict(
    variant="trm", hidden_dim=128, image_grid=2, latent_updates=2, cycles=2, num_recursions=2,
    deep_supervision=True, search_hidden_dims=(128,), search_num_recursions=(1, 2),
)
PRESETS: dict[str, dict[str, Any]] = {
    "reference": {},  # the reference architecture exactly as documented
    "demo": _DEMO,
    "trm": {**_DEMO, **_TRM},
    # every code path in seconds; its policy is not expected to succeed
    "tiny": dict(
        _CONTROL, suite="libero_object", num_demos=2, hidden_dim=32,
        num_recursions=2, epochs=2, batch_size=32, lr=1e-3, loss="l1", normalize_actions="none",
        num_episodes=2, horizon=24, num_videos=1, search_hidden_dims=(32,),
        search_num_recursions=(1, 2), search_lrs=(1e-3,), search_epochs=1,
    ),
}


def from_flat(preset: str = "reference", more: Mapping[str, Any] | None = None,
              **settings) -> Config:
    """A preset with flat settings on top.

    Raises ``ValueError`` for an unknown preset or setting (naming the valid ones) and for a value
    that its dataclass rejects. Settings given as ``None`` keep the preset's value, so that a
    notebook can list a parameter without deciding it. ``more`` holds settings too, which may not be
    given twice.
    """
    schema.check_option("preset", preset, PRESETS)
    given = {name: value for name, value in settings.items() if value is not None}
    more = migrate(convert("more", {} if more is None else more, dict))
    twice = ", ".join(map(str, given.keys() & more.keys()))
    _require(not twice, "more", more, f"no setting that is given by itself as well ({twice})")
    check_names(more, list(settings_by_part()), "setting")
    config = Config(preset=preset)
    return config.replace(**{**PRESETS[preset], **given, **more})


@dataclass(frozen=True)
class Parameters:
    """What notebooks are given beside settings, and settings that mean something else there."""

    preset: Literal[tuple(PRESETS)] = "demo"
    run_name: str = ""
    baseline_run: str = ""
    weights: Literal[schema.WEIGHTS] = "best"
    suite: Literal[tuple(schema.SUITES)] = "libero_spatial"  # of an evaluation: LIBERO-PRO's too
    replays: int = 2
    num_samples: int = 256
    selection_episodes: int = 0
    robustness_episodes: int = 0
    depth_episodes: int = 0
    more: dict = field(default_factory=dict)
    resume: bool = True


def parameter_type(name: str) -> Any:
    """The type of a notebook's parameter; None for one that is not the suite's."""
    owner = settings_by_part().get(name)
    return types_of(Parameters).get(name) or (types_of(PARTS[owner])[name] if owner else None)


def check_parameters(**given) -> dict[str, Any]:
    """Parameters of a notebook as JSON-like values of their types.

    None stands for a setting's default. papermill gives a name of digits as a number. Raises
    ``ValueError`` for a value of another type or below 0.
    """
    checked = {}
    for name, value in given.items():
        kind = parameter_type(name)
        if kind is str and type(value) is int:
            value = str(value)
        if kind and not (value is None and (kind is str or name in settings_by_part())):
            value = convert(name, value, kind)
            _require(kind is not int or value >= 0, name, value, ">= 0")
        checked[name] = list(value) if isinstance(value, tuple) else value
    return checked


def parse_parameter(name: str, text: str) -> Any:
    """The value of a notebook's parameter from the text on a command line."""
    kind = parameter_type(name)
    is_text = kind is str or typing.get_origin(kind) is Literal
    return text if is_text and text != "None" else parse_value(text)


def parse_value(text: str) -> Any:
    """``1e-3``, ``True`` or ``[0, 1]`` of a command line as Python reads them; else a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
