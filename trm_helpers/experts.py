"""Scripted demonstrators: a state machine on privileged object positions, acting as a person would.

It commands the same seven numbers as a policy: end-effector deltas and the gripper. Its state is
re-decided from the scene in every step, so that it recovers when it is pushed or drops the object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import schema
from .sim import LiberoEnv

# One control step at full command moves the end effector 13 mm (measured, OSC_POSE at 20 Hz), so
# the error is scaled to command less than the distance left; 1.0 overshoots by 9 mm, 0.7 by 2 mm.
_GAIN = 0.7
_METRES_PER_UNIT = 0.05
_RADIANS_PER_UNIT = 0.5
# the end-effector site with the gripper pointing down and the fingers closing along y
_DOWNWARD = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
_OPENING = 0.07  # widest thing that goes between the fingers, in metres
_RIM_INSET = 0.004  # how far inside an object's outline its wall is
_FINGER_ROOM = 0.015  # what a finger outside a rim needs, in metres
_FINGERTIP = 0.011  # lowest height of the end-effector site above a support
_REACH = 0.035  # how deep an object goes between the fingers before it meets the palm
_CORRIDOR = 0.06  # what is nearer than this to the straight way is passed over
_CLOSE_STEPS = 9  # until the fingers hold
_OPEN_STEPS = 4


@dataclass(frozen=True)
class Style:
    """What varies from one demonstration to the next, as it does for a person."""

    speed: float = 1.0  # largest command along any axis
    hover: float = 0.06  # metres above the grasp before descending
    clearance: float = 0.04  # metres between the carried object and what it passes over
    grasp_offset: tuple[float, float] = (0.0, 0.0)  # metres along x and in height

    @classmethod
    def sample(cls, generator: np.random.Generator) -> Style:
        return cls(
            speed=generator.uniform(0.85, 1.0),
            hover=generator.uniform(0.05, 0.08),
            clearance=generator.uniform(0.03, 0.05),
            grasp_offset=(generator.uniform(-0.004, 0.004), generator.uniform(-0.003, 0.003)),
        )


class PickPlaceExpert:
    """Picks the object of the task's goal up and places it on, or in, the goal's target.

    The goal is read from the task's BDDL predicates (``On a b``, ``In a b``).

    Args:
        env: the environment, already reset.
        style: timing and path; the default is the plain one.

    Raises:
        ValueError: the goal is not one pick-and-place.
    """

    def __init__(self, env: LiberoEnv, style: Style | None = None):
        self.env = env
        self.style = style or Style()
        self.object, self.target = pick_place_goal(env)
        self.phase = "approach"
        self._steps_in_phase = 0
        low, high = _bounds(env, self.object)
        self._grasp_offset, self._bottom = self._plan_grasp(low, high)
        self._travel_height = self._plan_travel()

    def act(self) -> np.ndarray:
        """The action (7,) for the scene as it is now, in [-1, 1]."""
        phase = self._next_phase()
        self._steps_in_phase = self._steps_in_phase + 1 if phase == self.phase else 0
        self.phase = phase
        gripper = schema.GRIPPER_CLOSED if phase in ("close", "lift", "carry", "lower") \
            else schema.GRIPPER_OPEN
        return np.concatenate([self._servo(self._goal()), self._upright(), [gripper]])

    # --- planning ---------------------------------------------------------------------------------

    def _plan_grasp(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, float]:
        """Where the end effector grasps, from the object's body, and how far the object hangs."""
        position = self.env.object_position(self.object)
        centre = (low + high) / 2 - position
        width = high[1] - low[1]
        along, up = self.style.grasp_offset
        if width > _OPENING:  # a bowl: its rim
            centre[1] += self._rim_side(position, width) * (width / 2 - _RIM_INSET)
            height = high[2] - 0.012
        else:
            height = max((low[2] + high[2]) / 2, high[2] - _REACH)
        grasp = np.array([centre[0] + along, centre[1], height + up - position[2]])
        grasp[2] = max(grasp[2], low[2] + _FINGERTIP - position[2])
        return grasp, height - low[2]

    def _rim_side(self, position: np.ndarray, width: float) -> float:
        """+1 or -1 along y: where the finger outside has room, then where the arm reaches less far.

        At the target the end effector stands on the same side of the object.
        """
        target = self.env.object_position(self.target)

        def cost(side: float) -> float:
            finger = position[:2] + [0.0, side * (width / 2 + _FINGER_ROOM)]
            crowded = any(
                np.linalg.norm(finger - np.clip(finger, low[:2], high[:2])) < _FINGER_ROOM
                for name in self.env.raw.obj_body_id if name != self.object
                for low, high in [_bounds(self.env, name)]
                if high[2] > position[2] + _RIM_INSET
            )
            return 10.0 * crowded + abs(target[1] + side * width / 2)

        return min((1.0, -1.0), key=cost)

    def _plan_travel(self) -> float:
        """Height of the end effector at which the hanging object passes over what is in the way."""
        start, end = (self.env.object_position(name)[:2] for name in (self.object, self.target))
        path = np.linspace(start, end, 20)[5:]  # it leaves what stands beside it straight up
        tops = []
        for name in self.env.raw.obj_body_id:
            low, high = _bounds(self.env, name)
            beside = path - np.clip(path, low[:2], high[:2])  # from the nearest point of its box
            if name != self.object and np.linalg.norm(beside, axis=1).min() < _CORRIDOR:
                tops.append(high[2])
        return max(tops) + self._bottom + self.style.clearance

    # --- state ------------------------------------------------------------------------------------

    def _next_phase(self) -> str:
        ee, grasp = self.env.end_effector(), self._grasp_point()
        off_axis = np.linalg.norm((ee - grasp)[:2])
        held = self._holding()
        match self.phase:
            case "approach":
                if off_axis < 0.012 and ee[2] - grasp[2] < self.style.hover + 0.02:
                    return "descend"
            case "descend":
                if off_axis > 0.03:
                    return "approach"
                if off_axis < 0.008 and abs(ee[2] - grasp[2]) < 0.006:
                    return "close"
            case "close":
                if self._steps_in_phase >= _CLOSE_STEPS:
                    return "lift" if held else "release"
            case "lift" | "carry" | "lower" if not held:
                return "release"
            case "lift":
                if ee[2] > self._travel_height - 0.015:
                    return "carry"
            case "carry":
                if np.linalg.norm((ee - self._place_point())[:2]) < 0.018:
                    return "lower"
            case "lower":
                if np.linalg.norm((ee - self._place_point())[:2]) > 0.03:
                    return "lift"
                if ee[2] - self._place_point()[2] < 0.008:
                    return "release"
            case "release":
                if self._steps_in_phase >= _OPEN_STEPS:
                    return "retreat"
            case "retreat":
                if self._steps_in_phase >= 8:
                    return "approach"
        return self.phase

    def _holding(self) -> bool:
        """The fingers are apart though they are closing, and the object is between them."""
        near = np.linalg.norm(self.env.end_effector() - self._grasp_point()) < 0.03
        return bool(near and self.env.fingers() > 0.002)

    def _grasp_point(self) -> np.ndarray:
        return self.env.object_position(self.object) + self._grasp_offset

    def _place_point(self) -> np.ndarray:
        """Where the end effector opens so that the object's body is over the target's centre."""
        low, high = _bounds(self.env, self.target)
        hang = self.env.end_effector() - self.env.object_position(self.object)
        point = self.env.object_position(self.target) + hang
        inside = self._is_container(low, high)
        # into a container the object falls from its rim; onto a plate it is set down
        support = high[2] if inside else (low[2] + high[2]) / 2
        point[2] = support + self._bottom + 0.005
        return point

    def _is_container(self, low: np.ndarray, high: np.ndarray) -> bool:
        return high[2] - low[2] > 0.05

    # --- motion -----------------------------------------------------------------------------------

    def _goal(self) -> np.ndarray:
        ee, grasp = self.env.end_effector(), self._grasp_point()
        up = np.array([0, 0, 1.0])
        match self.phase:
            case "approach":
                return grasp + up * self.style.hover
            case "descend" | "close":
                return grasp
            case "lift":
                return np.array([*ee[:2], self._travel_height])
            case "carry":
                return np.array([*self._place_point()[:2], self._travel_height])
            case "lower":
                return self._place_point()
            case "release":
                return ee
        return ee + up * 0.03  # retreat

    def _servo(self, goal: np.ndarray) -> np.ndarray:
        command = _GAIN * (goal - self.env.end_effector()) / _METRES_PER_UNIT
        return command * min(1.0, self.style.speed / max(np.abs(command).max(), 1e-9))

    def _upright(self) -> np.ndarray:
        """Axis-angle command that turns the gripper back to pointing down."""
        from robosuite.utils.transform_utils import mat2quat, quat2axisangle

        site = self.env.raw.robots[0].eef_site_id
        now = np.array(self.env.sim.data.site_xmat[site]).reshape(3, 3)
        error = quat2axisangle(mat2quat(_DOWNWARD @ now.T))
        return np.clip(_GAIN * error / _RADIANS_PER_UNIT, -0.5, 0.5)


def pick_place_goal(env: LiberoEnv) -> tuple[str, str]:
    """The object and the target of a task whose goal is one ``On`` or ``In`` predicate.

    A region such as ``basket_1_contain_region`` stands for the object that it belongs to.
    """
    goal = env.raw.parsed_problem["goal_state"]
    if len(goal) != 1 or goal[0][0].lower() not in ("on", "in"):
        raise ValueError(f"{env.task.name}: the goal {goal} is not one On or In predicate")
    _, item, target = goal[0]
    if target not in env.raw.obj_body_id:
        target = env.raw.object_sites_dict[target].parent_name
    return item, target


def _bounds(env: LiberoEnv, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner (3,) of an object's collision geometry in the world now."""
    model, data = env.sim.model._model, env.sim.data
    lows, highs = [], []
    for geom_name in env.raw.get_object(name).contact_geoms:
        geom = env.sim.model.geom_name2id(geom_name)
        rotation = data.geom_xmat[geom].reshape(3, 3)
        centre = data.geom_xpos[geom] + rotation @ model.geom_aabb[geom, :3]
        reach = np.abs(rotation) @ model.geom_aabb[geom, 3:]
        lows.append(centre - reach)
        highs.append(centre + reach)
    return np.min(lows, axis=0), np.max(highs, axis=0)
