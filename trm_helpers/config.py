"""Frozen settings for data, model, training, evaluation and search, and the presets built on them.

A setting lives in exactly one dataclass, so that a notebook's flat parameters
(``lr=1e-3, hidden_dim=128``) need no prefix: see :func:`from_flat`. Its type lists its options
(``Literal``); :func:`local` marks settings of the machine.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import numbers
import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import Fixed, arg  # Fixed: no option of a command

from . import paths, schema
from .schema import PROTOCOLS

# text, by what it names in usage lines
Folder = Annotated[str, arg(metavar="FOLDER")]
Run = Annotated[str, arg(metavar="RUN")]
Url = Annotated[str, arg(metavar="URL")]
Yaml = Annotated[str, arg(metavar="YAML")]
Part = Annotated[str, arg(metavar="PART")]

# Change these first: help and notebooks list them before the others
COMMON = ("suite", "task_ids", "num_demos", "variant", "num_recursions", "epochs", "lr", "seed")

# Numbers that have to be above 0; no other number may be below 0
_POSITIVE = {
    "sequence_length", "hidden_dim", "num_recursions", "num_layers", "latent_updates", "cycles",
    "image_grid", "image_size", "convergence_threshold", "num_tasks", "chunk",
    "execution_horizon", "epochs", "batch_size", "lr", "eval_workers", "search_lrs",
    "search_hidden_dims", "search_num_recursions", "search_epochs", "search_replicates",
    "num_samples", "frame_stride",
}

# The largest value of a number, a million if it is not listed: a policy from elsewhere must not
# exhaust this machine, and training must not overflow. A seed may be any int64
_LARGEST = {"hidden_dim": 2048, "num_recursions": 1024, "num_layers": 32, "latent_updates": 64,
            "cycles": 64, "image_grid": 32, "image_size": 512, "num_tasks": 1000,
            "keypoint_tasks": 1000, "looks": 64, "chunk": 1024, "ponder_cost": 1000,
            "convergence_threshold": 1e12, "num_threads": 1024, "seed": 2**63 - 1,
            "frame_stride": 64}
SET_BY_TRAINING = ("keypoints", "keypoint_tasks")


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} is not valid; expected {expected}")


def local(default: Any) -> Any:
    """A setting of the machine and the call: where, how fast and how far, never what.

    It may differ when a run is resumed, and its value in a run's file is ignored: a run from
    elsewhere must not choose this machine's folders, databases or processes.
    """
    return field(default=default, metadata={"local": True})


class _Part:
    """Base of the dataclasses below: converts each setting to its annotated type, checks its range.
    """

    def __post_init__(self):
        for name, kind in types_of(type(self)).items():
            value = convert(name, getattr(self, name), kind)
            object.__setattr__(self, name, value)
            values = value if isinstance(value, tuple) else (value,)
            self.require(name, len(values) > 0 or name == "keypoints", "at least one value")
            self.require(name, len(set(values)) == len(values), "no value twice")
            for number in values:
                if isinstance(number, str):
                    self.require(name, "\0" not in number, "text without NUL characters")
                else:
                    in_range = number > 0 if name in _POSITIVE else number >= 0
                    self.require(name, in_range, "> 0" if name in _POSITIVE else ">= 0")
                    largest = _LARGEST.get(name, 10**6)
                    self.require(name, number <= largest, f"at most {largest}")

    def require(self, name: str, condition: bool, expected: str) -> None:
        _require(condition, name, getattr(self, name), expected)


@functools.cache
def types_of(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    return typing.get_type_hints(kind)


def convert(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the type ``kind``; raises ``ValueError`` with ``name`` for any other value.

    Integers serve as floats and lists as tuples. Text is never read as a number, although YAML
    takes ``1e-3`` for text and ``1.0e-3`` for a number.
    """
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
        options = typing.get_args(kind)
        fits = isinstance(value, (list, tuple)) and (options or all(_is_a(v, kind) for v in value))
        _require(fits, name, value, f"a list of {'names' if options else kind.__name__}")
        return tuple(convert(name, item, kind) for item in value)
    if options := typing.get_args(kind):
        return schema.check_option(name, value, options)
    _require(_is_a(value, kind), name, value,
             'a dict, such as {"chunk": 4}' if kind is dict else kind.__name__)
    return kind(value)


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    fits = isinstance(value, {int: numbers.Integral, float: numbers.Real}.get(kind, kind))
    return fits and (kind is not float or abs(value) <= sys.float_info.max)  # NaN is not


@dataclass(frozen=True)
class DataConfig(_Part):
    """Demonstrations and how they become samples."""

    suite: Literal[schema.TRAINING_SUITES] = "libero_spatial"  # LIBERO suite; libero_40 joins four
    task_ids: tuple[int, ...] = (0,)  # task indices in the suite
    demos: Literal[schema.DEMOS] = "auto"  # human or scripted; auto: human ones if found
    demo_dir: Folder = local("")  # folder with *_demo.hdf5; "": data/ and Kaggle's input
    num_demos: int = 50  # demonstrations to collect per task if scripted ones are needed
    placement: Literal[schema.PLACEMENTS] = "benchmark"  # layouts of scripted demos; wide: random
    actor: Run = ""  # run that acts while the expert labels (DAgger); "": the expert acts
    beta: float = 0.5  # with an actor: probability that the expert acts in a decision
    frame_stride: int = 1  # scripted demos: steps per rendered frame; samples begin at those
    max_demos_per_task: int = 0  # demonstrations read per task; 0 reads all
    sequence_length: int = 1  # consecutive steps in one sample
    alignment: Literal[schema.ALIGNMENT_OPTIONS] = "auto"  # auto: by the file, else measured
    normalize_actions: Literal[schema.NORMALIZATIONS] = "zscore"  # scaling of the arm's actions
    augmentation: Literal[schema.AUGMENTATIONS] = "reference"  # augmentation of images
    scenes: int = 0  # scenes rendered per demonstration to train a localizer; 0: no localizer
    # where frames are kept; auto: on the GPU if they fit
    storage: Literal[schema.STORAGES] = local("auto")

    def __post_init__(self):
        schema.check_training_suite(self.suite)
        super().__post_init__()
        if self.demo_dir:
            object.__setattr__(self, "demo_dir", str(paths.absolute(self.demo_dir)))
        for task_id in self.task_ids:
            schema.check_task_id(self.suite, task_id)
        self.require("num_demos", self.num_demos >= 2, "at least 2, to split")
        self.require("beta", self.beta <= 1, "a probability in [0, 1]")
        self.require("sequence_length", self.frame_stride == 1 or self.sequence_length == 1,
                     "1, or frame_stride=1: otherwise most steps have no frame of their own")
        self.require("demos", not (self.actor and self.demos == "human"),
                     "auto or scripted with an actor, which the scripted expert labels")


@dataclass(frozen=True)
class ModelConfig(_Part):
    """The network and its inputs and outputs: all that is needed to rebuild it."""

    variant: Literal[schema.VARIANTS] = "block"  # block (reference), trm (paper) or a baseline
    hidden_dim: int = 256  # D, width of the state
    num_recursions: int = 8  # recursions per decision (baselines: 1)
    num_layers: int = 2  # layers of trm's shared network, the transformer, each network of act
    latent_updates: int = 6  # trm: n, updates of z before each update of y
    cycles: int = 3  # trm: T, cycles per recursion, of which the last has a gradient
    image_grid: int = 4  # image_grid x image_grid tokens per camera; not for block
    deep_supervision: bool = False  # a loss on the answer of every recursion
    halting: Literal[schema.HALTING] = "fixed"  # halting rule, see TRMPolicy.recurse
    ponder_cost: float = 0.01  # adaptive halting: weight of the expected depth in the loss
    convergence_threshold: float = 1e-3  # convergence: squared change of an action to stop at
    carry_over: bool = False  # in control, start each decision from the previous one's state
    gripper: Literal[schema.GRIPPERS] = "continuous"  # head of the gripper's command
    cameras: tuple[Literal[tuple(schema.CAMERAS)], ...] = ("agentview_rgb",)
    image_size: int = schema.IMAGE_SIZE  # pixels
    image_activation: Literal[schema.ACTIVATIONS] = "relu"  # silu: images centred on 0
    head_activation: Literal[schema.ACTIVATIONS] = "relu"  # of the action head's hidden layer
    keypoints: Annotated[tuple[str, ...], Fixed] = ()  # set by training: what is located
    keypoint_tasks: Annotated[int, Fixed] = 0  # set by training: number of its tasks
    looks: int = 0  # with scenes: how often the localizer looks again at its own estimates
    proprioception: bool = False  # observe joint angles, finger positions, end effector
    conditioning: Literal[schema.CONDITIONING] = "none"  # task number or instruction
    num_tasks: int = 10  # size of the task embedding
    chunk: int = 1  # K: future actions predicted at once
    execution_horizon: int = 1  # actions of a chunk executed before the next decision
    temporal_ensembling: bool = False  # average the predictions of overlapping chunks

    def __post_init__(self):
        super().__post_init__()
        self.require("hidden_dim", self.hidden_dim % schema.NUM_HEADS == 0,
                     f"a multiple of {schema.NUM_HEADS}, the number of attention heads")
        if self.halting in ("remainder", "adaptive"):
            self.require("deep_supervision", not self.deep_supervision,
                         f"False with halting={self.halting!r}, which weights all steps together")
        if self.variant not in schema.RECURSIVE:
            object.__setattr__(self, "num_recursions", 1)
            once = f"with variant={self.variant!r}, which applies its network once"
            self.require("halting", self.halting == "fixed", f"'fixed' {once}")
            self.require("carry_over", not self.carry_over, f"False {once}")
        if self.keypoints:
            self.require_localizer("keypoints")
        self.require("image_size", not self.looks or self.image_size % 8 == 0,
                     "a multiple of 8 with looks")
        if self.variant == "block":
            self.require("image_size", self.image_size >= 36,
                         ">= 36, required by the three convolutions")
        else:
            step = 8 * self.image_grid  # pixels
            self.require("image_size", self.image_size % step == 0,
                         f"a multiple of {step} with image_grid={self.image_grid}")
        self.require("execution_horizon", self.execution_horizon <= self.chunk,
                     f"1 to chunk={self.chunk}")

    def require_localizer(self, reason: str) -> None:
        """Raise ``ValueError`` unless a localizer can read the images."""
        self.require("cameras", schema.STILL_CAMERA in self.cameras,
                     f"{schema.STILL_CAMERA} among them, which the localizer reads")
        self.require("image_size", self.image_size % 4 == 0, f"a multiple of 4 with {reason}")


@dataclass(frozen=True)
class TrainConfig(_Part):
    """Behaviour cloning."""

    epochs: int = 50  # passes over the training demonstrations
    batch_size: int = 64  # samples per update
    lr: float = 3e-4  # learning rate at the start; cosine annealing ends at 1e-6
    weight_decay: float = 1e-4  # of AdamW
    loss: Literal[schema.LOSSES] = "mse"  # loss of the actions; mix: the mean of both
    ema_decay: float = 0.0  # decay of the moving average of the weights; 0 is off
    patience: int = 10  # epochs without a lower validation loss before stopping; 0 never stops
    rollout_every: int = 0  # epochs between rollouts that select `best`; 0: by validation loss
    max_minutes: float = local(0.0)  # save and stop after this time; 0: no limit
    stop_epoch: int = local(0)  # stop after this epoch; 0 trains all
    precision: Literal[schema.PRECISIONS] = "auto"  # auto: bf16 or fp16 if supported
    compile: bool = False  # torch.compile; continues without it if it fails
    device: Literal[schema.DEVICES] = local("auto")  # auto: a CUDA GPU if available
    num_threads: int = local(0)  # CPU threads; 0: $OMP_NUM_THREADS, or one
    seed: int = 0  # initial weights and order of the samples
    wandb_mode: Literal[schema.WANDB_MODES] = local("disabled")  # project: $WANDB_PROJECT

    def __post_init__(self):
        super().__post_init__()
        self.require("stop_epoch", self.stop_epoch <= self.epochs, f"0 to epochs={self.epochs}")
        self.require("ema_decay", self.ema_decay < 1, "in [0, 1)")


@dataclass(frozen=True)
class EvalConfig(_Part):
    """Rollouts in the simulator on the official init states."""

    protocol: Literal[tuple(PROTOCOLS)] = "quick"  # whose protocol, see the glossary
    num_episodes: int = 0  # episodes per task; 0: the protocol's
    first_init_state: int = 0  # official init state of the first episode; the others follow
    horizon: int = 0  # steps allowed; 0: the protocol's for the suite
    perturbation: Literal[schema.PERTURBATIONS] = "none"  # of observations, instruction, actions
    num_videos: int = 3  # films per task
    bound_episodes: int = 0  # episodes per task of replay, expert, random and no-op, for comparison
    eval_workers: int = local(1)  # simulator processes
    cluster: Url = local("")  # address of a Dask scheduler whose workers run the episodes

    def __post_init__(self):
        super().__post_init__()
        for name, most, given in (
                ("num_episodes", schema.NUM_INIT_STATES, ", the number of official init states"),
                ("first_init_state", schema.NUM_INIT_STATES - self.episodes,
                 f" with {self.episodes} episodes"),
                ("bound_episodes", schema.NUM_INIT_STATES - self.first_init_state,
                 f" with first_init_state={self.first_init_state}")):
            self.require(name, getattr(self, name) <= most, f"0 to {most}{given}")

    @property
    def episodes(self) -> int:
        """Per task: ``num_episodes``, or the protocol's number."""
        return self.num_episodes or PROTOCOLS[self.protocol].episodes

    @property
    def init_states(self) -> range:
        """Per task: the official init states of the episodes."""
        return range(self.first_init_state, self.first_init_state + self.episodes)


# in a URL, also a malformed one
_PASSWORD = re.compile(r":(?!//)[^@]*@|(?i:(pass(word|wd)?|pwd|token|secret)=)")


@dataclass(frozen=True)
class SearchConfig(_Part):
    """The reference's grid of sixteen points, part of it, or a guided search within its bounds."""

    search_method: Literal[schema.SEARCH_METHODS] = "grid"  # grid, or with Optuna: tpe, halving
    search_lrs: tuple[float, ...] = (1e-3, 5e-4, 3e-4, 1e-4)  # tpe, halving: any rate between
    search_hidden_dims: tuple[int, ...] = (128, 256)
    search_num_recursions: tuple[int, ...] = (4, 8)
    search_space: Yaml = ""  # further axes, as YAML: "{chunk: [4, 8], loss: [l1, mse]}"
    search_epochs: int = 10  # epochs per trial
    max_configs: int = 0  # trials; of a grid, points spread evenly over it; 0: all its points
    search_episodes: int = 0  # rollouts per task and trial; 0 ranks by validation loss alone
    search_replicates: int = 1  # seeds for each of the three best
    search_shard: Part = ""  # "2/4": every fourth point of the grid from the second on
    search_workers: int = local(0)  # trials at once; 0: one for each GPU, or one
    search_minutes: float = local(0.0)  # end trials after this time, to resume later; 0: no limit
    search_storage: Url = local("")  # URL of a database; "": $TRM_SEARCH_STORAGE, or a file

    def __post_init__(self):
        super().__post_init__()
        if _PASSWORD.search(self.search_storage):  # without the value, which would be printed
            raise ValueError("search_storage holds a password; expected a URL without one. "
                             "Parameters are stored in notebooks and files: put the URL into the "
                             "environment variable TRM_SEARCH_STORAGE instead, and remove the "
                             "executed notebook that holds it")
        self.require("search_storage", not self.search_storage or self.search_method != "grid",
                     "none except with search_method='tpe' or 'halving', which keep a study there")
        if self.search_shard:
            self.require("search_shard", self.search_method == "grid",
                         "none except with search_method='grid', whose points are fixed")
            self.require("search_replicates", self.search_replicates == 1,
                         "1 in a shard: the best are known when all have ended")
        _ = self.shard  # refuses a bad one

    @property
    def shard(self) -> tuple[int, int]:
        """Index from 0, and number of shards: (1, 4) for ``search_shard="2/4"``; (0, 1) for all."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.search_shard or "1/1")
        which, count = map(int, found.groups()) if found else (0, 0)
        self.require("search_shard", 1 <= which <= count, "a part and a count, '1/4' to '4/4'")
        return which - 1, count


@dataclass(frozen=True)
class Config:
    """All settings of a run; written to its ``config.json``."""

    preset: Annotated[str, Fixed] = "reference"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    search: SearchConfig = SearchConfig()

    def __post_init__(self):
        if self.model.conditioning == "task_id":
            highest = max(self.data.task_ids)
            self.model.require("num_tasks", highest < self.model.num_tasks,
                               f"more than the highest task id, {highest}")
        if self.data.scenes:
            self.model.require_localizer("scenes")
            self.model.require("keypoints", not self.model.keypoints,
                               "none with scenes, from which training derives them")
        else:
            self.model.require("looks", not self.model.looks or bool(self.model.keypoints),
                               "0 without scenes, on which the localizer is trained")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """Every setting by its flat name, without the preset."""
        return {name: value for part in PARTS for name, value in vars(getattr(self, part)).items()}

    def changes(self) -> dict[str, Any]:
        """Settings that differ from the preset: ``from_flat(preset, **changes)`` equals this."""
        usual = from_flat(self.preset).flat()
        return {name: value for name, value in self.flat().items() if value != usual[name]}

    def local(self) -> dict[str, Any]:
        """The settings of the machine and the call, see :func:`local`."""
        return {name: value for name, value in self.flat().items() if name in local_settings()}

    def fixed(self) -> dict[str, Any]:
        """The settings that a run keeps when it is resumed: of data, model and training."""
        kept = {**vars(self.data), **vars(self.model), **vars(self.train)}
        return {name: value for name, value in kept.items() if name not in local_settings()}

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """Inverse of :meth:`to_dict`, also of older versions, see :func:`migrate`.

        Raises ``ValueError`` for a key that is not a setting, or an unknown preset.
        """
        check_names(values, ["preset", *PARTS], "part of a configuration")
        preset = schema.check_option("preset", values.get("preset", "reference"), PRESETS)
        parts = {}
        for name, kind in PARTS.items():
            given = migrate(values.get(name, {}))
            check_names(given, list(types_of(kind)), f"{name} setting")
            parts[name] = kind(**given)
        return cls(preset=preset, **parts)

    def replace(self, **settings) -> Config:
        """A copy with the named settings changed, whichever part they belong to."""
        owners = settings_by_part()
        check_names(settings, list(owners), "setting")
        parts = {name: dataclasses.replace(getattr(self, name), **{
            key: value for key, value in settings.items() if owners[key] == name})
            for name in PARTS}
        return dataclasses.replace(self, **parts)


PARTS = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig, "eval": EvalConfig,
         "search": SearchConfig}

# Former settings and the constants that replaced them; None: of the machine, any value is ignored
REMOVED = {
    "train_fraction": 0.8, "data_seed": 0, "num_heads": 4, "kl_weight": 10.0,
    "halting_threshold": 0.01, "halting_tolerance": 0.05, "halting_weight": 0.5, "num_experts": 4,
    "min_lr": 1e-6, "grad_clip": 1.0, "gripper_weight": 0.1, "rollout_episodes": 10,
    "wandb_project": None, "episode_limit": None, "search_finalists": 3,
}
RENAMED = {"halting": {"act": "adaptive"}}  # former options of settings


def migrate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of any version of the package as current ones.

    Raises ``ValueError`` for a former setting whose value is not the constant that replaced it.
    """
    for name, constant in REMOVED.items():
        value = settings.get(name, constant)
        _require(constant is None or value == constant, name, value,
                 f"{constant!r}, now a constant and no longer a setting")
    return {name: RENAMED.get(name, {}).get(str(value), value)
            for name, value in settings.items() if name not in REMOVED}


def settings_by_part() -> dict[str, str]:
    """Every flat setting name with the part of :class:`Config` that holds it."""
    return {name: part for part, kind in PARTS.items() for name in types_of(kind)}


def local_settings() -> set[str]:
    """The names of all settings of the machine and the call, see :func:`local`."""
    return {f.name for kind in PARTS.values() for f in dataclasses.fields(kind)
            if f.metadata.get("local")}


def check_names(given, known: list[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}{schema.did_you_mean(name, known)}; valid: "
                             f"{', '.join(sorted(known))}")


# What the demo needs to succeed in the simulator: both cameras, proprioception, action chunks.
_CONTROL = dict(
    frame_stride=4, cameras=("agentview_rgb", "eye_in_hand_rgb"), image_size=64,
    image_activation="silu", proprioception=True, chunk=8, execution_horizon=4,
    gripper="classifier",
)
# One task trained and evaluated on two CPU cores in minutes.
_DEMO = dict(
    _CONTROL, suite="libero_spatial", task_ids=(2,), num_demos=30,
    num_recursions=4, epochs=70, lr=1e-3, loss="l1", ema_decay=0.99, patience=0,
    normalize_actions="none", augmentation="shift", num_videos=2, eval_workers=2, bound_episodes=2,
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

    Settings given as ``None`` keep the preset's value, so that a notebook can list a parameter
    without deciding it. ``more`` holds further settings, none of which may be given twice.

    Raises ``ValueError`` for an unknown preset or setting (with the valid ones), for one that only
    training sets, and for a value that its dataclass rejects.
    """
    schema.check_option("preset", preset, PRESETS)
    given = {name: value for name, value in settings.items() if value is not None}
    more = migrate(convert("more", {} if more is None else more, dict))
    twice = ", ".join(map(str, given.keys() & more.keys()))
    _require(not twice, "more", more, f"no setting that is given by itself as well ({twice})")
    check_names(more, list(settings_by_part()), "setting")
    for name in SET_BY_TRAINING:
        value = given.get(name, more.get(name))
        _require(not value, name, value, "none: training sets it")
    return Config(preset=preset).replace(**{**PRESETS[preset], **given, **more})


# Types of notebooks' parameters that are no settings, or have other options there
_PARAMETERS = {
    "preset": Literal[tuple(PRESETS)], "run_name": str, "baseline_run": str, "resume": bool,
    "weights": Literal[schema.WEIGHTS], "more": dict,
    "suite": Literal[tuple(schema.SUITES)],  # of an evaluation: LIBERO-PRO's too
    "replays": int, "num_samples": int,
    "selection_episodes": int, "robustness_episodes": int, "depth_episodes": int,
}


def parameter_type(name: str) -> Any:
    """The type of a notebook's parameter; None for a name unknown to the suite."""
    known = [_PARAMETERS, *map(types_of, PARTS.values())]
    return next((types[name] for types in known if name in types), None)


def check_parameters(**given) -> dict[str, Any]:
    """Parameters of a notebook as JSON-like values of their types.

    None stands for a setting's default. papermill gives a name of digits as a number. Raises
    ``ValueError`` for a value of another type or out of range.
    """
    checked = {}
    for name, value in given.items():
        kind = parameter_type(name)
        if kind is str and type(value) is int:
            value = str(value)
        if kind and not (value is None and (kind is str or name in settings_by_part())):
            value = convert(name, value, kind)
            least = 1 if name in _POSITIVE else 0
            _require(kind is not int or value >= least, name, value, f">= {least}")
        checked[name] = list(value) if isinstance(value, tuple) else value
    return checked


def parse_parameter(name: str, text: str) -> Any:
    """A parameter's value from a command line: text, or ``1e-3``, ``[0, 1]`` ... as in Python."""
    kind = parameter_type(name)
    if (kind is str or typing.get_origin(kind) is Literal) and text != "None":
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        return text
