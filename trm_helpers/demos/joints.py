"""Skills on a fixture's joint: drawers, doors and knobs."""

from __future__ import annotations

import numpy as np

from ..sim.env import LiberoEnv
from ..sim.geometry import UP, Boxes, geoms_of, turned
from .skills import CLOSE_STEPS, DOWNWARD, METRES_PER_UNIT, OPEN_STEPS, Skill, Style, facing

_RETREAT_STEPS = 10
_ON_ANGLE, _OFF_ANGLE = 0.8, -0.001  # radians; the predicates change at 0.5 and at 0
_SLIDE = 2  # mujoco.mjtJoint.mjJNT_SLIDE, without importing mujoco


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
                      if model.geom_bodyid[geom] == body
                      and (model.geom_contype[geom] or model.geom_conaffinity[geom])]
        self._address = model.jnt_qposadr[self.id]

    def opened(self) -> float:
        """Distance from rest, in metres or radians."""
        return self.sign * float(self.env.sim.data.qpos[self._address])

    def direction(self) -> np.ndarray:
        """Unit vector (3,) of the opening, along it for a slide, about it for a hinge."""
        return self.sign * np.array(self.env.sim.data._data.xaxis[self.id])

    def anchor(self) -> np.ndarray:
        """A point (3,) on a hinge's axis."""
        return np.array(self.env.sim.data._data.xanchor[self.id])


class OpenDrawer(Skill):
    """Grasps a drawer's handle with a tilted gripper and pulls along the rail, its ``joint``."""

    closed = ("close", "pull")
    timed = {"close": (CLOSE_STEPS, "pull"), "release": (OPEN_STEPS, "back")}
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
        return facing(self._pointing, self._jaw)

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
            case "pull":
                if self.env.fingers() < 0.003 or np.linalg.norm(from_handle) > 0.03:
                    return "release"
                if self.joint.opened() > 0.97 * self.joint.end:
                    return "release"
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
                return self._handle() + METRES_PER_UNIT * out
            case "release":
                return ee
            case "back":
                return ee - 0.05 * self._pointing
        return ee + 0.02 * UP + 0.02 * out  # away


class PushShut(Skill):
    """Pushes a drawer or a door shut with closed fingers.

    A drawer is pushed at its handle, with the gripper tilted against the fixture above it; a door
    at its upper edge, so that the hand stays above the fixture.
    """

    closed = ("approach", "descend", "push", "retreat")
    timed = {"retreat": (_RETREAT_STEPS, "approach")}
    last = ("retreat", _RETREAT_STEPS)
    _TILT = np.radians(30)  # from pointing down, for a drawer
    _BEFORE = 0.06  # metres in front of the contact where the fingers come down
    _FINGERS = 0.015  # half their depth
    _BELOW_EDGE = 0.02  # of a door
    _ALONG_DOOR = 0.7  # of its width, from the hinge
    _ABOVE = 0.05  # metres over everything on the way

    def __init__(self, env: LiberoEnv, joint: Joint, style: Style | None = None):
        super().__init__(env, style)
        self.joint = joint
        self._all_geoms = geoms_of(env, *env.raw.obj_body_id)
        low, high = Boxes.of_geoms(env, joint.geoms).corners()
        if joint.slides:
            self._part = joint.geoms[int(np.argmax((low + high) @ joint.direction()))]
        else:
            self._part = joint.geoms[int(np.argmax(np.prod(high - low, axis=1)))]

    def _contact(self) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) of the fingers that touch the part from outside, and the way out (3,)."""
        low, high = Boxes.of_geoms(self.env, [self._part]).bounds()
        middle, half = (low + high) / 2, (high - low) / 2
        if self.joint.slides:
            out = self.joint.direction()
            return middle + (np.abs(out) @ half + self._FINGERS) * out, out
        axis, hinge = self.joint.direction(), self.joint.anchor()
        along = middle - hinge
        along -= (along @ axis) * axis  # from the hinge to the middle of the door
        out = np.cross(axis, along) / np.linalg.norm(along)
        thickness = 2 * self.env.sim.model._model.geom_aabb[self._part, 3:].min()
        touch = hinge + 2 * self._ALONG_DOOR * along + (thickness + self._FINGERS) * out
        touch[2] = high[2] - self._BELOW_EDGE
        return touch, out

    def _orientation(self) -> np.ndarray:
        if not self.joint.slides:
            return DOWNWARD
        out = self.joint.direction()
        pointing = -np.cos(self._TILT) * UP - np.sin(self._TILT) * out
        jaw = np.cross(UP, -out)  # level: the hand is flat against the drawer
        return facing(pointing, jaw)

    def _next_phase(self) -> str:
        ee, (touch, out) = self.env.end_effector(), self._contact()
        match self.phase:
            case "approach":
                before = touch + self._BEFORE * out
                aligned = np.abs(self._turn_left()).max() < 0.15
                if aligned and np.linalg.norm((ee - before)[:2]) < 0.02:
                    return "descend"
            case "descend":
                if abs(ee[2] - touch[2]) < 0.01 or self._steps_in_phase > 40:
                    return "push"
            case "push":
                if self.joint.opened() < 0 or self._steps_in_phase > 80:
                    return "retreat"
        return self.phase

    def _goal(self) -> np.ndarray:
        ee, (touch, out) = self.env.end_effector(), self._contact()
        before = touch + self._BEFORE * out
        match self.phase:
            case "approach":
                tops = Boxes.of_geoms(self.env, self._all_geoms).tops_along(ee, before, 0.06)
                height = max([*tops, touch[2]]) + self._ABOVE
                if ee[2] < height - 0.03 and np.linalg.norm((ee - before)[:2]) > 0.05:
                    return np.array([*ee[:2], height])
                return np.array([*before[:2], height])
            case "descend":
                return before
            case "push":
                return touch - 2 * METRES_PER_UNIT * out  # with full force
        return ee + 0.03 * UP + 0.03 * out  # retreat


class TurnKnob(Skill):
    """Grasps a knob's ridge from above and turns it, ``on`` or off, about its vertical hinge."""

    closed = ("close", "turn")
    timed = {"close": (CLOSE_STEPS, "turn"), "release": (OPEN_STEPS, "retreat")}
    last = ("retreat", _RETREAT_STEPS)
    _STEP = 0.4  # radians by which the commanded turn is ahead
    _FINGER_DEPTH = 0.014  # metres of the ridge between the fingers

    def __init__(self, env: LiberoEnv, joint: Joint, style: Style | None = None, *,
                 on: bool = True):
        super().__init__(env, style)
        self.joint, self.on = joint, on
        self._plan()

    def _plan(self) -> None:
        """The yaw that puts the jaw across the ridge, the highest part of the knob."""
        _, high = Boxes.of_geoms(self.env, self.joint.geoms).corners()
        self._ridge = self.joint.geoms[int(np.argmax(high[:, 2]))]

        def width(yaw: float) -> float:
            return Boxes.of_geoms(self.env, [self._ridge]).size(yaw)[1] + 0.001 * abs(yaw)

        self._yaw = min(np.radians(np.arange(-60, 61, 10)), key=width)

    def _grasp_point(self) -> np.ndarray:
        low, high = Boxes.of_geoms(self.env, [self._ridge]).bounds()
        along, up = self.style.grasp_offset
        middle = (low + high) / 2
        return np.array([middle[0] + along, middle[1], high[2] - self._FINGER_DEPTH + up])

    def _orientation(self) -> np.ndarray:
        if self.phase == "turn":
            ahead = self._STEP if self.on else -self._STEP
            return turned(ahead * self.joint.direction()[2]) @ self._site_rotation()
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
            case "turn":
                angle = self.joint.opened()
                if angle > _ON_ANGLE if self.on else angle < _OFF_ANGLE:
                    return "release"
                if off_axis > 0.03 or self.env.fingers() < 0.003 or self._steps_in_phase > 60:
                    return "release"
            case "retreat":
                if self._steps_in_phase >= _RETREAT_STEPS:
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
