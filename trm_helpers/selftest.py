"""Twelve faults that silently break LIBERO evaluations, each with a check that finds it.

``python -m trm_helpers preflight --selftest`` shows for every fault that its check passes on the
healthy evaluation and fails once the fault is seeded. The same checks examine somebody else's
environment wrapper and policy adapter::

    with LiberoEnv(*SCENE) as env:
        for row in examine(Subject(MyWrapper(env), policy=my_policy, play=my_play)):
            print(row)

A wrapper has ``reset(init_state=i)``, which returns the first observation, ``step(action)``, which
returns an observation and whether the task is solved, and hands every other attribute of the
:class:`sim.LiberoEnv` inside through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from . import schema
from .config import ModelConfig
from .data.normalize import ActionNormalizer
from .evaluation.rollout import Policy, run_episode
from .policy.model import TRMPolicy
from .preflight import Check, _judge_settling
from .schema import PROTOCOLS
from .sim.env import LiberoEnv, load_init_states, written_instruction

SCENE = ("libero_spatial_lan", 5)  # a bowl on a ramekin, and an instruction in other words
_STEP = 0.0125  # metres that the arm moves on average for a command of 1
_HOLD = np.array(schema.NO_OP)


class _Predicted(torch.nn.Module):
    def __init__(self, chunk: torch.Tensor):
        super().__init__()
        self.chunk = chunk

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.chunk.expand(1, 1, *self.chunk.shape)


def chunk_policy(chunk: np.ndarray) -> TRMPolicy:
    """A policy of this package whose network predicts one chunk (K, 7), in environment units."""
    normalizer = ActionNormalizer("zscore").fit(np.random.default_rng(0).uniform(-1, 1, (64, 7)))
    policy = TRMPolicy(ModelConfig(chunk=len(chunk), execution_horizon=len(chunk), hidden_dim=16,
                                   image_size=36), normalizer).eval()
    predicted = torch.tensor(normalizer.normalize(chunk), dtype=torch.float32)
    policy.head = _Predicted(predicted)
    return policy


def play_episode(policy: Policy, env: LiberoEnv) -> dict:
    """One episode from init state 0 as an evaluation plays it; its row tells the ``steps``."""
    return run_episode(policy, env, 0, PROTOCOLS["openvla"].horizon(env.task.suite))


@dataclass(frozen=True)
class Subject:
    """What is examined: an environment, how predicted chunks become actions, how long it plays."""

    env: Any
    policy: Callable[[np.ndarray], Policy] = chunk_policy
    play: Callable[[Policy, Any], dict] = play_episode


# --- checks: what was found, and whether it is right ----------------------------------------------
Finding = tuple[str, bool]


def check_contacts(subject: Subject) -> Finding:
    """The MuJoCo loaded is the pinned one, and a bowl comes to rest on its ramekin."""
    import mujoco

    env = subject.env
    env.reset(init_state=0)
    check = _judge_settling(math.dist(env.object_position("akita_black_bowl_1")[:2],
                                      env.object_position("glazed_rim_porcelain_ramekin_1")[:2]))
    pinned = mujoco.__version__ == schema.PINNED["mujoco"]
    return f"MuJoCo {mujoco.__version__}, {check.found}", pinned and check.status == "ok"


def check_init_state(subject: Subject) -> Finding:
    """Objects lie where the init state has them; most of them do not move while they settle."""
    env, off = subject.env, []
    for init_state in (3, 7):
        env.reset(init_state=init_state)
        official = load_init_states(env.task.suite, env.task.task_id)[init_state]
        moved = np.linalg.norm(_places(env, env.state()) - _places(env, official), axis=1)
        off.append(float(np.median(moved)))
    return f"objects {1000 * max(off):.1f} mm from the init state's places", max(off) < 0.003


def check_init_ids(subject: Subject) -> Finding:
    """Init states 0, 1 and 2 begin with different placements."""
    env, places = subject.env, []
    for init_state in range(3):
        env.reset(init_state=init_state)
        places.append(_places(env, env.state()))
    apart = min(np.abs(places[i] - places[j]).max() for i, j in ((0, 1), (0, 2), (1, 2)))
    return f"init states 0, 1 and 2 differ by at least {1000 * apart:.1f} mm", apart > 1e-3


def check_instruction(subject: Subject) -> Finding:
    """The policy gets the instruction of the BDDL file that the simulator loaded."""
    told = subject.env.reset(init_state=0)["language"]
    written = written_instruction(subject.env.raw.bddl_file_name)
    return f"the policy gets {told!r}, the BDDL file says {written!r}", told == written


def check_orientation(subject: Subject) -> Finding:
    """Frames are upside down, as rendered and as stored in the demonstrations."""
    observation = _settled(subject.env)
    found = {}
    for camera in schema.CAMERAS:
        truth, frame = _rendered(subject.env, camera), observation[camera].astype(float)
        turned = {"upside down": frame, "upright": frame[::-1],
                  "mirrored": frame[:, ::-1], "turned by 180 degrees": frame[::-1, ::-1]}
        found[camera] = min(turned, key=lambda name: np.abs(turned[name] - truth).mean())
    return ", ".join(f"{camera} {name}" for camera, name in found.items()), set(
        found.values()) == {"upside down"}


def check_quaternion(subject: Subject) -> Finding:
    """The end effector's rotation has the sign of MuJoCo's quaternion, as the demonstrations do."""
    from robosuite.utils.transform_utils import quat2axisangle

    env = subject.env
    seen = np.asarray(_settled(env)["ee_ori"])
    w, *xyz = env.sim.data.get_body_xquat(env.raw.robots[0].robot_model.eef_name)
    off = np.abs(seen - quat2axisangle(np.array([*xyz, w]))).max()
    return f"ee_ori up to {off:.2f} rad from the simulator's", off < 0.05


def check_gripper(subject: Subject) -> Finding:
    """The command -1 opens the fingers, +1 closes them."""
    env, width = subject.env, {}
    env.reset(init_state=0)
    for command in (schema.GRIPPER_OPEN, schema.GRIPPER_CLOSED):
        for _ in range(12):
            env.step(np.array([0, 0, 0, 0, 0, 0, command]))
        width[command] = 100 * env.fingers()
    return (f"fingers {width[schema.GRIPPER_OPEN]:.1f} cm apart after -1, "
            f"{width[schema.GRIPPER_CLOSED]:.1f} cm after +1",
            width[schema.GRIPPER_OPEN] > 6 and width[schema.GRIPPER_CLOSED] < 2)


def check_cameras(subject: Subject) -> Finding:
    """Each frame is of the camera whose name it has, whatever its orientation."""
    observation, found = _settled(subject.env), {}
    truth = {camera: _rendered(subject.env, camera) for camera in schema.CAMERAS}
    for camera in schema.CAMERAS:
        frame = observation[camera].astype(float)
        distances = {name: min(np.abs(frame[::rows, ::columns] - truth[name]).mean()
                               for rows in (1, -1) for columns in (1, -1)) for name in truth}
        found[camera] = min(distances, key=distances.get)
    return (", ".join(f"{key} shows {name}" for key, name in found.items()),
            all(key == name for key, name in found.items()))


def check_frames(subject: Subject) -> Finding:
    """Frames show something."""
    observation = _settled(subject.env)
    spread = {camera: float(observation[camera].std()) for camera in schema.CAMERAS}
    return (", ".join(f"{camera} varies by {value:.0f} grey levels"
                      for camera, value in spread.items()), min(spread.values()) > 5)


def check_chunk(subject: Subject) -> Finding:
    """A predicted chunk moves the arm as far as it says, its first action first."""
    env, half = subject.env, 6
    chunk = np.tile(_HOLD, (2 * half, 1))
    chunk[:half, 1], chunk[half:, 1] = 0.8, -0.8
    policy = subject.policy(chunk)
    policy.reset()
    observation, places = env.reset(init_state=0), []
    for _ in range(2 * half):
        places.append(env.end_effector()[1])
        observation, _ = env.step(policy.act(observation))
    moved = places[half] - places[0]
    expected = 0.8 * half * _STEP
    return (f"half a chunk moved the arm {100 * moved:+.1f} cm; about {100 * expected:+.1f} cm "
            "was predicted", 0.5 * expected < moved < 2 * expected)


def check_horizon(subject: Subject) -> Finding:
    """An episode without success ends after the steps of the protocol for the suite loaded."""
    env = subject.env
    suite = next(name for name in env.raw.bddl_file_name.split("/")[::-1] if name in schema.SUITES)
    expected = PROTOCOLS["openvla"].horizon(suite)
    steps = subject.play(_Still(), env)["steps"]
    return f"{steps} steps played in {suite}; the protocol allows {expected}", steps == expected


def check_first_frame(subject: Subject) -> Finding:
    """The first observation shows the new episode, not the end of the one before."""
    env = subject.env
    env.reset(init_state=0)
    for _ in range(10):
        env.step(np.array([0.5, 1, 0, 0, 0, 0, schema.GRIPPER_CLOSED]))
    observation = env.reset(init_state=1)
    off = max(min(np.abs(observation[camera][::rows].astype(float)
                         - _rendered(env, camera)).mean() for rows in (1, -1))
              for camera in schema.CAMERAS)
    hand = np.linalg.norm(observation["ee_pos"] - env.end_effector())
    return (f"frames {off:.1f} grey levels from the current scene, hand {100 * hand:.1f} cm",
            off < 2 and hand < 0.005)


class _Still:
    """Sends the benchmark's no-op."""

    def reset(self) -> None: ...

    def act(self, observation: Mapping) -> np.ndarray:
        return _HOLD.copy()


def _settled(env) -> Mapping:
    """An observation at rest, where it equals a render of the current state."""
    return env.reset(init_state=0)


def _rendered(env, camera: str) -> np.ndarray:
    """float (H, W, 3): the current scene as MuJoCo renders it, bottom row first."""
    env.sim.forward()
    name = schema.CAMERAS[camera].removesuffix("_image")
    return np.array(env.sim.render(camera_name=name, width=env.image_size,
                                   height=env.image_size), dtype=float)


def _places(env, state: np.ndarray) -> np.ndarray:
    """(n, 2) horizontal positions of the movable objects in a flattened state, in metres."""
    model = env.sim.model
    starts = [1 + model.get_joint_qpos_addr(thing.joints[0])[0]
              for thing in env.raw.objects_dict.values()]
    return np.stack([state[start:start + 2] for start in starts])


# --- seeded faults -------------------------------------------------------------------------------


class Wrapper:
    """Hands everything through; a fault overrides what it spoils."""

    def __init__(self, env):
        self.env = env

    def reset(self, **how) -> Mapping:
        return self.spoil(self.env.reset(**how))

    def step(self, action) -> tuple[Mapping, bool]:
        observation, done = self.env.step(self.send(action))
        return self.spoil(observation), done

    def spoil(self, observation: Mapping) -> Mapping:
        return observation

    def send(self, action: np.ndarray) -> np.ndarray:
        return action

    def __getattr__(self, name: str):
        return getattr(self.env, name)


class SlidingContacts(Wrapper):
    """A push of 1 N: the bowl leaves its ramekin as it settles, as it does past MuJoCo 3.3."""

    def reset(self, **how):
        observation = self.env.reset(**how)
        force = self.env.sim.data.xfrc_applied[self.env.raw.obj_body_id["akita_black_bowl_1"]]
        for step in range(8):
            force[0] = 1.0 if step < 4 else 0.0
            observation, _ = self.env.step(_HOLD)
        return observation


class ResetAfterInitState(Wrapper):
    def reset(self, init_state=0):
        self.env.reset(init_state=init_state)
        return self.env.reset(seed=17)


class StuckInitId(Wrapper):
    def reset(self, init_state=0):
        return self.env.reset(init_state=1)


class InstructionOfFileName(Wrapper):
    def spoil(self, observation):
        return {**observation, "language": self.env.task.name.replace("_", " ")}


class FlippedFrames(Wrapper):
    def spoil(self, observation):
        return {**observation, **{name: observation[name][::-1] for name in schema.CAMERAS}}


class OtherQuaternionSign(Wrapper):
    def spoil(self, observation):
        angle = np.linalg.norm(observation["ee_ori"])
        other = observation["ee_ori"] * (angle - 2 * np.pi) / angle  # of -q
        return {**observation, "ee_ori": other}


class OtherGripperSign(Wrapper):
    def send(self, action):
        return np.concatenate([action[:-1], -action[-1:]])


class ExchangedCameras(Wrapper):
    def spoil(self, observation):
        names = list(schema.CAMERAS)
        return {**observation, **{a: observation[b]
                                  for a, b in zip(names, names[::-1], strict=True)}}


class BlackFrames(Wrapper):
    def spoil(self, observation):
        return {**observation, **{name: np.zeros_like(observation[name])
                                  for name in schema.CAMERAS}}


class StaleFirstFrame(Wrapper):
    last: Mapping | None = None

    def reset(self, **how):
        before, first = self.last, self.env.reset(**how)
        self.last = dict(first)
        return before or first

    def spoil(self, observation):
        self.last = dict(observation)
        return observation


def _in_metres(chunk: np.ndarray) -> Policy:
    return chunk_policy(chunk * [0.05, 0.05, 0.05, 0.5, 0.5, 0.5, 1])


def _horizon_of_another_suite(policy: Policy, env) -> dict:
    return run_episode(policy, env, 0, PROTOCOLS["openvla"].horizon("libero_object"))


class Fault(NamedTuple):
    """A fault, the check that finds it, how it is seeded, and what to do about it."""

    name: str
    check: Callable[[Subject], Finding]
    seed: Callable[[Subject], Subject]
    hint: str


def _wrapped(kind: type[Wrapper]) -> Callable[[Subject], Subject]:
    return lambda subject: replace(subject, env=kind(subject.env))


FAULTS = (
    Fault("contacts of a MuJoCo past 3.3", check_contacts, _wrapped(SlidingContacts),
          f"install mujoco=={schema.PINNED['mujoco']}"),
    Fault("init state wiped by a reset", check_init_state, _wrapped(ResetAfterInitState),
          "reset first, then set the init state, then settle"),
    Fault("init ids stuck at one", check_init_ids, _wrapped(StuckInitId),
          "advance the init state with every episode"),
    Fault("instruction of the file's name", check_instruction, _wrapped(InstructionOfFileName),
          "read (:language ...) in the BDDL file; LIBERO-PRO keeps the old file names"),
    Fault("image flipped", check_orientation, _wrapped(FlippedFrames),
          "give the policy frames upside down, as stored; flip for people only"),
    Fault("quaternion's other sign", check_quaternion, _wrapped(OtherQuaternionSign),
          "keep MuJoCo's sign: q and -q give different axis-angle vectors"),
    Fault("gripper's other sign", check_gripper, _wrapped(OtherGripperSign),
          "send -1 to open and +1 to close"),
    Fault("cameras exchanged", check_cameras, _wrapped(ExchangedCameras),
          "map agentview_image to agentview_rgb, robot0_eye_in_hand_image to eye_in_hand_rgb"),
    Fault("black frame", check_frames, _wrapped(BlackFrames),
          "render after the OpenGL context is current; run preflight --gl"),
    Fault("chunk's unit or order", check_chunk,
          lambda subject: replace(subject, policy=_in_metres),
          "denormalise to [-1, 1], where 1 asks for 5 cm, and send a chunk's first action first"),
    Fault("horizon of another suite", check_horizon,
          lambda subject: replace(subject, play=_horizon_of_another_suite),
          "take the horizon of the suite that is played"),
    Fault("stale first frame", check_first_frame, _wrapped(StaleFirstFrame),
          "observe after the init state is set and the objects have settled"),
)


def run_check(fault: Fault, subject: Subject) -> Check:
    """A row for one fault; whatever the check raises is a failure."""
    try:
        found, well = fault.check(subject)
    except Exception as error:
        found, well = f"{type(error).__name__}: {error}", False
    return Check(fault.name, "ok" if well else "fail", found, "" if well else fault.hint)


def examine(subject: Subject) -> list[Check]:
    """The twelve checks on somebody's environment and policy; see the module's docstring."""
    return [run_check(fault, subject) for fault in FAULTS]


def selftest() -> list[Check]:
    """For each fault: the healthy evaluation passes its check, and the seeded fault is found."""
    rows = []
    with LiberoEnv(*SCENE) as env:
        subject = Subject(env)
        for fault in FAULTS:
            healthy = run_check(fault, subject)
            if healthy.status != "ok":
                rows.append(healthy)
                continue
            seeded = run_check(fault, fault.seed(subject))
            caught = seeded.status == "fail"
            rows.append(Check(fault.name, "ok" if caught else "fail",
                              f"healthy: {healthy.found}; seeded: {seeded.found}",
                              seeded.hint if caught else "the seeded fault was not found"))
    return rows
