"""Checks for what silently breaks LIBERO evaluations: contacts, init states, frames, signs.

Each check measures an environment and returns what it found and whether that is right.
:mod:`preflight` runs the quick ones, :mod:`selftest` all of them, each with its seeded fault.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import schema
from ..software import pip_command
from .env import load_init_states, written_instruction

SCENE = ("libero_spatial_lan", 5)  # a bowl on a ramekin, and an instruction in other words
BOWL, RAMEKIN = "akita_black_bowl_1", "glazed_rim_porcelain_ramekin_1"
HOLD = np.array(schema.NO_OP)
_IN_VIEW, _OUT_OF_VIEW = (0.0, 0.12, 0.95), (3.0, 3.0, 1.0)  # metres; off-centre in both cameras
_BOWL_CENTRE = (0.0, 0.0, 0.03)  # metres from the body's origin, which is at the bottom
_ORIENTATIONS = {"upright": (1, 1), "upside down": (1, -1), "mirrored": (-1, 1),
                 "turned by 180 degrees": (-1, -1)}  # signs of columns and rows from the centre
_NEAR = 0.08  # of the frame's side, between where the bowl is seen and where it is projected
_CHANGED = 20  # grey levels


class View(NamedTuple):
    """What a frame shows: the camera and its orientation, and the spread of its grey levels."""

    camera: str
    orientation: str
    spread: float


@dataclass(frozen=True)
class Subject:
    """An environment to check, and for :mod:`selftest` a policy adapter and an evaluation loop.

    Args:
        env: a wrapper of :class:`sim.env.LiberoEnv`, see :mod:`selftest`.
        policy: makes a policy that predicts a given chunk (K, 7); None takes this package's.
        play: plays an episode of a policy and returns its row; None takes this package's.
        mujoco: its version; None takes the loaded one's.
    """

    env: Any
    policy: Callable[[np.ndarray], Any] | None = None
    play: Callable[[Any, Any], dict] | None = None
    mujoco: str | None = None

    @functools.cached_property
    def views(self) -> dict[str, View]:
        """What each frame shows, found by a bowl that is moved into the view of both cameras.

        The pixels that change are compared with the bowl's projection through the cameras.
        """
        env, frames = self.env, []
        joint = env.raw.objects_dict[BOWL].joints[0]
        env.reset(init_state=0)
        for place in (_OUT_OF_VIEW, _IN_VIEW):
            env.sim.data.set_joint_qpos(joint, np.array([*place, 1, 0, 0, 0]))
            env.sim.data.set_joint_qvel(joint, np.zeros(6))
            observation, _ = env.step(HOLD)
            frames.append({key: np.array(observation[key], dtype=float) for key in schema.CAMERAS})
        bowl = env.object_position(BOWL) + _BOWL_CENTRE
        projected = {camera: (env.project(bowl[None], camera)[0] + 0.5) / env.image_size - 0.5
                     for camera in schema.CAMERAS}
        return {key: _view(frames[0][key], frames[1][key], projected) for key in schema.CAMERAS}


def _view(without: np.ndarray, frame: np.ndarray, projected: dict[str, np.ndarray]) -> View:
    rows, columns = np.nonzero(np.abs(frame - without).max(axis=2) > _CHANGED)
    best = ("nothing known", "unknown")
    if len(rows):
        seen = (np.array([columns.mean(), rows.mean()]) + 0.5) / len(frame) - 0.5
        distances = {(camera, name): np.linalg.norm(seen - signs * place)
                     for camera, place in projected.items()
                     for name, signs in _ORIENTATIONS.items()}
        nearest = min(distances, key=distances.get)
        best = nearest if distances[nearest] < _NEAR else best
    return View(*best, float(frame.std()))


Finding = tuple[str, bool]  # what was found, and whether it is right


class SimulatorCheck(NamedTuple):
    """A check: its name in tables, how it measures, and what to do when it fails."""

    name: str
    measure: Callable[[Subject], Finding]
    hint: str


def check(name: str, hint: str) -> Callable[[Callable[[Subject], Finding]], SimulatorCheck]:
    """Decorator that makes a :class:`SimulatorCheck` of a function that measures."""
    return lambda measure: SimulatorCheck(name, measure, hint)


@check("settle probe", f"contacts are not the benchmark's; {pip_command(schema.PINNED)}")
def contacts(subject: Subject) -> Finding:
    """The loaded MuJoCo is the pinned version, and a bowl comes to rest on its ramekin.

    Their centres are then 1.5 cm apart; with MuJoCo 3.17 the bowl slides and they are 6 cm apart.
    """
    import mujoco

    env, version = subject.env, subject.mujoco or mujoco.__version__
    env.reset(init_state=0)
    distance = math.dist(env.object_position(BOWL)[:2], env.object_position(RAMEKIN)[:2])
    return (f"MuJoCo {version}, bowl {100 * distance:.1f} cm off the ramekin's centre",
            version == schema.PINNED["mujoco"] and distance < 0.03)


@check("init state", "reset first, then set the init state, then settle")
def init_state(subject: Subject) -> Finding:
    """Objects lie where the init state places them; most do not move while they settle."""
    env, off = subject.env, []
    for init_state in (3, 7):
        env.reset(init_state=init_state)
        official = load_init_states(env.task.suite, env.task.task_id)[init_state]
        moved = np.linalg.norm(_places(env, env.state()) - _places(env, official), axis=1)
        off.append(float(np.median(moved)))
    return f"objects {1000 * max(off):.1f} mm from the init state's places", max(off) < 0.003


@check("init ids", "advance the init state with every episode")
def init_ids(subject: Subject) -> Finding:
    """Init states 0, 1 and 2 begin with different layouts."""
    env, places = subject.env, []
    for init_state in range(3):
        env.reset(init_state=init_state)
        places.append(_places(env, env.state()))
    apart = min(np.abs(places[i] - places[j]).max() for i, j in ((0, 1), (0, 2), (1, 2)))
    return f"init states 0, 1 and 2 differ by at least {1000 * apart:.1f} mm", apart > 1e-3


@check("instruction",
       "read (:language ...) in the BDDL file; LIBERO-PRO keeps the old file names")
def instruction(subject: Subject) -> Finding:
    """The policy gets the instruction of the BDDL file that the simulator loaded."""
    given = subject.env.reset(init_state=0)["language"]
    written = written_instruction(subject.env.raw.bddl_file_name)
    return f"the policy gets {given!r}, the BDDL file says {written!r}", given == written


@check("image orientation",
       "give the policy frames upside down, as stored; flip them for people only")
def orientation(subject: Subject) -> Finding:
    """Frames are upside down, as stored in the demonstrations."""
    found = {key: view.orientation for key, view in subject.views.items()}
    return (", ".join(f"{key} {orientation}" for key, orientation in found.items()),
            set(found.values()) == {"upside down"})


@check("cameras",
       "map agentview_image to agentview_rgb and robot0_eye_in_hand_image to eye_in_hand_rgb")
def cameras(subject: Subject) -> Finding:
    """Each frame is of the camera it is named after, whatever its orientation."""
    return (", ".join(f"{key} shows {view.camera}" for key, view in subject.views.items()),
            all(key == view.camera for key, view in subject.views.items()))


@check("frames",
       "try the other renderer, MUJOCO_GL=osmesa or MUJOCO_GL=egl; to choose again, unset "
       "TRM_RENDERER, which keeps the choice, and run `python -m trm_helpers preflight --gl`")
def frames(subject: Subject) -> Finding:
    """Frames are not black."""
    spread = {key: view.spread for key, view in subject.views.items()}
    return (", ".join(f"{key} varies by {value:.0f} grey levels" for key, value in spread.items()),
            min(spread.values()) > 5)


@check("quaternion", "keep MuJoCo's sign: q and -q give different axis-angle vectors")
def quaternion(subject: Subject) -> Finding:
    """The end effector's rotation has the sign of MuJoCo's quaternion, as in demonstrations."""
    from robosuite.utils.transform_utils import quat2axisangle

    env = subject.env
    seen = np.asarray(env.reset(init_state=0)["ee_ori"])
    w, *xyz = env.sim.data.get_body_xquat(env.raw.robots[0].robot_model.eef_name)
    off = np.abs(seen - quat2axisangle(np.array([*xyz, w]))).max()
    return f"ee_ori up to {off:.2f} rad from the simulator's", off < 0.05


@check("gripper", "send -1 to open and +1 to close")
def gripper(subject: Subject) -> Finding:
    """The command -1 opens the fingers, +1 closes them."""
    env, widths = subject.env, []
    env.reset(init_state=0)
    for command in (schema.GRIPPER_OPEN, schema.GRIPPER_CLOSED):
        for _ in range(12):
            env.step(np.array([0, 0, 0, 0, 0, 0, command]))
        widths.append(100 * env.fingers())
    return (f"fingers {widths[0]:.1f} cm apart after -1, {widths[1]:.1f} cm after +1",
            widths[0] > 6 and widths[1] < 2)


@check("first frame", "observe after the init state is set and the objects have settled")
def first_frame(subject: Subject) -> Finding:
    """The first observation shows the new episode, not the end of the previous one."""
    env = subject.env
    env.reset(init_state=0)
    for _ in range(10):
        env.step(np.array([0.5, 1, 0, 0, 0, 0, schema.GRIPPER_CLOSED]))
    observation = env.reset(init_state=1)
    off = max(min(np.abs(observation[key][::rows].astype(float) - _rendered(env, key)).mean()
                  for rows in (1, -1)) for key in schema.CAMERAS)
    hand = np.linalg.norm(observation["ee_pos"] - env.end_effector())
    return (f"frames {off:.1f} grey levels from the current scene, hand {100 * hand:.1f} cm",
            off < 2 and hand < 0.005)


def _rendered(env, key: str) -> np.ndarray:
    """float (H, W, 3): the current scene as MuJoCo renders it, bottom row first."""
    env.sim.forward()
    return np.array(env.sim.render(camera_name=schema.CAMERAS[key].removesuffix("_image"),
                                   width=env.image_size, height=env.image_size), dtype=float)


def _places(env, state: np.ndarray) -> np.ndarray:
    """(n, 2) horizontal positions of the movable objects in a flattened state, in metres."""
    starts = [1 + env.sim.model.get_joint_qpos_addr(each.joints[0])[0]
              for each in env.raw.objects_dict.values()]
    return np.stack([state[start:start + 2] for start in starts])


QUICK = (contacts, instruction, frames, cameras, orientation, quaternion, gripper)
