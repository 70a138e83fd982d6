"""Base of the scripted skills, and the skills on a fixture's joint: drawers and knobs.

A skill is a state machine on privileged positions. Its phase is chosen anew from the scene in every
step, so that it recovers from a push or a lost grip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import schema
from ..sim.env import LiberoEnv
from ..sim.geometry import UP, Boxes, turned

# One control step at full command moves the end effector 13 mm (measured, OSC_POSE at 20 Hz); the
# command is scaled below the remaining distance. A gain of 1.0 overshoots by 9 mm, 0.7 by 2 mm.
_GAIN = 0.7
_METRES_PER_UNIT = 0.05
_RADIANS_PER_UNIT = 0.5
_TURN_LIMIT = 0.5  # largest command about an axis; the arm follows faster turns badly
# the end-effector site with the gripper pointing down and the fingers closing along y
DOWNWARD = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
_SLIDE = 2  # mujoco.mjtJoint.mjJNT_SLIDE, without importing mujoco
CLOSE_STEPS = 9  # until the fingers hold
OPEN_STEPS = 4


@dataclass(frozen=True)
class Style:
    """Variation between demonstrations, as between a person's."""

    speed: float = 1.0  # largest command along any axis
    hover: float = 0.06  # metres above the grasp before descending
    clearance: float = 0.04  # metres between the carried object and the tops below it
    grasp_offset: tuple[float, float] = (0.0, 0.0)  # metres along the jaw and in height

    @classmethod
    def sample(cls, generator: np.random.Generator) -> Style:
        return cls(speed=generator.uniform(0.85, 1.0), hover=generator.uniform(0.05, 0.08),
                   clearance=generator.uniform(0.03, 0.05),
                   grasp_offset=(generator.uniform(-0.004, 0.004),
                                 generator.uniform(-0.003, 0.003)))


# --- motion ---------------------------------------------------------------------------------------


class Skill:
    """A state machine whose phase sets the goal of the end effector.

    A subclass defines ``_next_phase()``, ``_goal()`` in metres, ``_orientation()`` of the site and
    the ``closed`` phases, in which the gripper is closed.

    Args:
        env: the environment, already reset.
        style: timing and path; the default does not vary.
    """

    closed: tuple[str, ...] = ()

    def __init__(self, env: LiberoEnv, style: Style | None = None):
        self.env = env
        self.style = style or Style()
        self.phase = "approach"
        self._steps_in_phase = 0

    def act(self) -> np.ndarray:
        """The action (7,) for the scene as it is now, in [-1, 1]."""
        phase = self._next_phase()
        self._steps_in_phase = self._steps_in_phase + 1 if phase == self.phase else 0
        self.phase = phase
        gripper = schema.GRIPPER_CLOSED if phase in self.closed else schema.GRIPPER_OPEN
        turn = np.clip(_GAIN * self._turn_left() / _RADIANS_PER_UNIT, -_TURN_LIMIT, _TURN_LIMIT)
        return np.concatenate([self._servo(self._goal()), turn, [gripper]])

    def finished(self) -> bool:
        """Whether the next skill of a sequence may begin."""
        return False

    def _next_phase(self) -> str:
        raise NotImplementedError

    def _goal(self) -> np.ndarray:
        raise NotImplementedError

    def _orientation(self) -> np.ndarray:
        return DOWNWARD

    def _servo(self, goal: np.ndarray) -> np.ndarray:
        command = _GAIN * (goal - self.env.end_effector()) / _METRES_PER_UNIT
        return command * min(1.0, self.style.speed / max(np.abs(command).max(), 1e-9))

    def _turn_left(self) -> np.ndarray:
        """Axis-angle (3,) in radians from the gripper's orientation to the wanted one."""
        from robosuite.utils.transform_utils import mat2quat, quat2axisangle

        return quat2axisangle(mat2quat(self._orientation() @ self._site_rotation().T))

    def _site_rotation(self) -> np.ndarray:
        site = self.env.raw.robots[0].eef_site_id
        return np.array(self.env.sim.data.site_xmat[site]).reshape(3, 3)


# --- skills on a joint ----------------------------------------------------------------------------


class Joint:
    """A fixture's joint: its position, its opening direction, the geometries that move with it."""

    def __init__(self, env: LiberoEnv, name: str):
        self.env = env
        model = env.sim.model._model
        self.id = env.sim.model.joint_name2id(name)
        low, high = model.jnt_range[self.id]
        self.sign = 1.0 if high > -low else -1.0  # it rests at zero, at one end of its range
        self.end = max(high, -low)
        self.slides = model.jnt_type[self.id] == _SLIDE
        body = model.jnt_bodyid[self.id]
        self.geoms = [geom for geom in range(model.ngeom)
                      if model.geom_bodyid[geom] == body and model.geom_contype[geom]]

    def opened(self) -> float:
        """Distance from rest, in metres or radians."""
        address = self.env.sim.model._model.jnt_qposadr[self.id]
        return self.sign * float(self.env.sim.data.qpos[address])

    def direction(self) -> np.ndarray:
        """Unit vector (3,) of the opening, along it for a slide, about it for a hinge."""
        return self.sign * np.array(self.env.sim.data._data.xaxis[self.id])


class OpenDrawer(Skill):
    """Grasps a drawer's handle with a tilted gripper and pulls along the rail, its ``joint``."""

    closed = ("close", "pull")
    _TILT = np.radians(75)  # from pointing down; flatter, the hand hits objects on the table
    _BEFORE = 0.10  # metres in front of the handle where the gripper is aligned
    _BACK = 0.004  # metres short of the handle's middle, or the upper finger meets the drawer

    def __init__(self, env: LiberoEnv, joint: Joint, style: Style | None = None):
        super().__init__(env, style)
        self.joint = joint
        out = joint.direction()
        low, high = Boxes.of_geoms(env, joint.geoms).corners()
        self._handle_geom = joint.geoms[int(np.argmax((low + high) @ out))]  # furthest out
        self._pointing = -np.cos(self._TILT) * UP - np.sin(self._TILT) * out
        self._jaw = np.cos(self._TILT) * out - np.sin(self._TILT) * UP  # the closing direction
        self._across = np.cross(self._pointing, self._jaw)

    def finished(self) -> bool:
        upright = np.abs(self._turn_left()).max() < 0.2
        return self.phase == "away" and (upright or self._steps_in_phase > 50)

    def _handle(self) -> np.ndarray:
        middle = np.array(self.env.sim.data.geom_xpos[self._handle_geom])
        along, _ = self.style.grasp_offset
        return middle - self._BACK * self._pointing + along * self._across

    def _orientation(self) -> np.ndarray:
        if self.phase == "away":
            return DOWNWARD
        return np.column_stack([self._jaw, self._across, self._pointing])

    def _next_phase(self) -> str:
        from_handle = self.env.end_effector() - self._handle()
        along = from_handle @ self._pointing
        beside = np.linalg.norm(from_handle - along * self._pointing)
        match self.phase:
            case "approach":
                if beside < 0.01 and along < -0.05 and np.abs(self._turn_left()).max() < 0.1:
                    return "reach"
            case "reach":
                if beside > 0.02:
                    return "approach"
                if np.linalg.norm(from_handle) < 0.007 or self._steps_in_phase > 40:
                    return "close"
            case "close":
                if self._steps_in_phase >= CLOSE_STEPS:
                    return "pull"
            case "pull":
                if self.env.fingers() < 0.003 or np.linalg.norm(from_handle) > 0.03:
                    return "release"
                if self.joint.opened() > 0.97 * self.joint.end:
                    return "release"
            case "release":
                if self._steps_in_phase >= OPEN_STEPS:
                    return "back"
            case "back":
                if self._steps_in_phase >= 8:
                    return "away" if self.joint.opened() > 0.9 * self.joint.end else "approach"
        return self.phase

    def _goal(self) -> np.ndarray:
        ee, out = self.env.end_effector(), self.joint.direction()
        match self.phase:
            case "approach":
                return self._handle() - self._BEFORE * self._pointing
            case "reach" | "close":
                return self._handle()
            case "pull":
                return self._handle() + _METRES_PER_UNIT * out
            case "release":
                return ee
            case "back":
                return ee - 0.05 * self._pointing
        return ee + 0.02 * UP + 0.02 * out  # away


class TurnKnob(Skill):
    """Grasps a knob's ridge from above and turns it about the vertical hinge ``joint``."""

    closed = ("close", "turn")
    _STEP = 0.4  # radians by which the commanded turn is ahead
    _FINGER_DEPTH = 0.014  # metres of the ridge between the fingers

    def __init__(self, env: LiberoEnv, joint: Joint, style: Style | None = None):
        super().__init__(env, style)
        self.joint = joint
        self._plan()

    def _plan(self) -> None:
        """The yaw that puts the jaw across the ridge, the highest part of the knob."""
        _, high = Boxes.of_geoms(self.env, self.joint.geoms).corners()
        self._ridge = self.joint.geoms[int(np.argmax(high[:, 2]))]

        def width(yaw: float) -> float:
            low, high = Boxes.of_geoms(self.env, [self._ridge]).bounds(yaw)
            return (high - low)[1] + 0.001 * abs(yaw)

        self._yaw = min(np.radians(np.arange(-60, 61, 10)), key=width)

    def _grasp_point(self) -> np.ndarray:
        low, high = Boxes.of_geoms(self.env, [self._ridge]).bounds()
        along, up = self.style.grasp_offset
        middle = (low + high) / 2
        return np.array([middle[0] + along, middle[1], high[2] - self._FINGER_DEPTH + up])

    def _orientation(self) -> np.ndarray:
        if self.phase == "turn":
            return turned(self._STEP * self.joint.direction()[2]) @ self._site_rotation()
        return turned(self._yaw) @ DOWNWARD

    def _next_phase(self) -> str:
        ee, grasp = self.env.end_effector(), self._grasp_point()
        off_axis = np.linalg.norm((ee - grasp)[:2])
        match self.phase:
            case "approach":
                aligned = np.abs(self._turn_left()).max() < 0.1
                if aligned and off_axis < 0.008 and ee[2] - grasp[2] < self.style.hover + 0.02:
                    return "descend"
            case "descend":
                if off_axis > 0.03:
                    return "approach"
                if ee[2] - grasp[2] < 0.006 or self._steps_in_phase > 40:
                    return "close"
            case "close":
                if self._steps_in_phase >= CLOSE_STEPS:
                    return "turn"
            case "turn":
                if off_axis > 0.03 or self.env.fingers() < 0.003 or self._steps_in_phase > 60:
                    return "release"
            case "release":
                if self._steps_in_phase >= OPEN_STEPS:
                    return "retreat"
            case "retreat":
                if self._steps_in_phase >= 10:
                    self._plan()
                    return "approach"
        return self.phase

    def _goal(self) -> np.ndarray:
        ee, grasp = self.env.end_effector(), self._grasp_point()
        match self.phase:
            case "approach":
                return grasp + self.style.hover * UP
            case "descend" | "close" | "turn":
                return grasp
            case "release":
                return ee
        return ee + 0.03 * UP  # retreat
