"""Scripted experts that demonstrate a task as a person would, chosen by the goal's BDDL predicates.

They command the same seven numbers as a policy: end-effector deltas and the gripper.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..sim.env import LiberoEnv
from ..sim.geometry import UP, Boxes, crowding, geoms_of, overreach, turned, way_out
from .skills import CLOSE_STEPS, DOWNWARD, OPEN_STEPS, Joint, OpenDrawer, Skill, Style, TurnKnob

# Lengths in metres
_OPENING = 0.07  # widest object between the fingers
_RIM_INSET = 0.005  # from an object's outline to its wall
_RIM_DEPTH = 0.018  # of a rim between the fingers; at 0.012 it slips now and then
_FINGER_WIDTH = 0.02  # along the jaw
_FINGERTIP = 0.014  # lowest height of the end-effector site above a support
_REACH = 0.032  # depth of an object between the fingers that touches the palm
_CORRIDOR = 0.06  # the arm passes over objects nearer than this to the straight path
_CONTAINER_DEPTH = 0.045  # a deeper target is filled from above its rim
# Turning the gripper takes time, so a yaw other than zero has to be worth it. Plus 90 degrees
# brings joint 7 near the middle of its range, minus 90 near its end.
_YAWS = np.radians([0, 30, -30, 60, -60, 90])
_ALONG = (0.0, -0.02, 0.02)  # along the jaw from the middle of the object
# A rim is lifted at its left, seen from the arm, unless that side is blocked. If the other objects
# decided the side, a policy trained on few scenes would close between the two, on nothing.
_SAME_SIDE = 3.0
_COLUMN = (0.0, 0.03, 0.06, 0.12, 0.18)  # heights over the grasp where the gripper needs room
_ON_AXIS = 0.01  # beside the vertical; up to this a descent is not slowed
_HANGS = 0.02  # an object this near after the retreat hangs on a finger, as a gable can
_PATIENCE = 60  # steps in a phase; after more, something blocks the arm


def make_expert(env: LiberoEnv, style: Style | None = None) -> Skill | SkillSequence:
    """The expert for the task's goal: an object whose ``act()`` returns each step's action (7,).

    ``On`` and ``In`` are one pick-and-place, after opening a closed drawer around the target;
    ``Open`` pulls a drawer, ``TurnOn`` turns a knob. ``env`` must be reset; ``style`` sets timing
    and path. Raises ``ValueError`` for another goal or more than one predicate.
    """
    goal = env.raw.parsed_problem["goal_state"]
    verb = goal[0][0].lower() if len(goal) == 1 else ""
    if verb == "turnon":
        return TurnKnob(env, Joint(env, env.raw.get_object(goal[0][1]).joints[0]), style)
    if verb == "open" and (joint := _joint_of(env, goal[0][1])) and joint.slides:
        return OpenDrawer(env, joint, style)
    pick_place_goal(env)  # refuses the rest
    joint = _joint_of(env, goal[0][2])
    if joint and joint.slides and joint.opened() < joint.end / 2:
        return SkillSequence(lambda: OpenDrawer(env, joint, style),
                             lambda: PickPlaceExpert(env, style))
    return PickPlaceExpert(env, style)


class SkillSequence:
    """Skills in sequence, each planned once its predecessor has finished."""

    def __init__(self, *makers):
        self._makers = list(makers)
        self.current: Skill = self._makers.pop(0)()

    @property
    def phase(self) -> str:
        return self.current.phase

    def act(self) -> np.ndarray:
        """The action (7,) for the scene as it is now, in [-1, 1]."""
        if self._makers and self.current.finished():
            self.current = self._makers.pop(0)()
        return self.current.act()


@dataclass(frozen=True)
class Grasp:
    """A grasp of an object by the end effector, and its cost."""

    offset: np.ndarray  # (3,) metres from the object's body
    yaw: float  # radians about the vertical; at zero the jaw closes along y
    bottom: float  # metres from the end effector down to the object's lowest point
    key: tuple[float, float, float]  # yaw, side and shift, which identify it in every plan
    cost: float  # without the cost of narrow places


class PickPlaceExpert(Skill):
    """Picks up the object of the task's goal and places it on, or in, the goal's target.

    If the target is part of the table, the object is held at its edge and pushed there. Raises
    ``ValueError`` for a goal that is not one pick-and-place.
    """

    closed = ("close", "lift", "carry", "lower")

    def __init__(self, env: LiberoEnv, style: Style | None = None):
        super().__init__(env, style)
        self.object, self.target = pick_place_goal(env)
        self._region = env.raw.parsed_problem["goal_state"][0][2]  # or the target itself
        self._slides = self.target is None
        self._object_geoms = geoms_of(env, self.object)
        others = [name for name in env.raw.obj_body_id if name != self.object]
        self._other_geoms = geoms_of(env, *others)
        self._target_geoms = geoms_of(env, self.target) if self.target else []
        self._misses: Counter = Counter()
        self._deeper = 0.0  # metres below the target's support, to free a hanging object
        self._plan()

    # --- planning ---------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Choose a grasp and the heights of the gripper's approach and the object's transport."""
        self.grasp = self._choose_grasp()
        others = Boxes.of_geoms(self.env, self._other_geoms)
        ee, start = self.env.end_effector(), self.env.object_position(self.object)
        tops = others.tops_along(ee, start + self.grasp.offset, _CORRIDOR)
        self._approach_height = max(tops, default=0.0) + 0.03
        end, support = self._support()
        self._lift_from = start + self.grasp.offset
        self._way_out = np.zeros(3)
        if self._slides:
            self._travel_height = self._lift_from[2]
            return
        start = start[:2] + 0.25 * (end - start[:2])  # it rises straight up beside its neighbours
        tops = others.tops_along(start, end, _CORRIDOR)
        self._travel_height = max([*tops, support]) + self.grasp.bottom + self.style.clearance
        self._way_out = way_out(self._outline(), self._travel_height - self._lift_from[2],
                                others.near(self._lift_from, 0.3))

    def _outline(self) -> np.ndarray:
        """Points (64, 3) of the object's top and bottom, taken as discs."""
        low, high = Boxes.of_geoms(self.env, self._object_geoms).bounds()
        radius, angle, end = np.meshgrid(
            (0.6, 1.0), np.arange(0, 2 * np.pi, np.pi / 8), (-1.0, 1.0))
        disc = np.stack([radius * np.cos(angle), radius * np.sin(angle), end], axis=-1)
        return (low + high) / 2 + disc.reshape(-1, 3) * (high - low) / 2

    def _choose_grasp(self) -> Grasp:
        """The candidate of least cost; contacts, 5 ms each, are computed only where they matter."""
        candidates = [grasp for yaw in _YAWS for grasp in self._candidates_at(yaw)]
        best, least = candidates[0], np.inf
        for grasp in sorted(candidates, key=lambda grasp: grasp.cost):
            if grasp.cost >= least:  # so is every later one, and crowding costs are not negative
                break
            cost = grasp.cost + self._crowding_cost(grasp)
            if cost < least:
                best, least = grasp, cost
        return best

    def _candidates_at(self, yaw: float) -> list[Grasp]:
        """Grasps at one yaw: at the middle of a narrow object, or at a bowl's rim on two sides."""
        position = self.env.object_position(self.object)
        low, high = Boxes.of_geoms(self.env, self._object_geoms).bounds(yaw)
        width = high[1] - low[1]
        sides, height = (0.0,), max((low[2] + high[2]) / 2, high[2] - _REACH)
        if width > _OPENING:
            sides, height = (1.0, -1.0), high[2] - _RIM_DEPTH
        along, up = self.style.grasp_offset
        room = (high[0] - low[0]) / 2 - _FINGER_WIDTH  # beyond it the fingers miss the object
        shifts = [shift for shift in _ALONG if abs(shift) <= max(room, 0.0)]
        grasps = []
        for side, shift in itertools.product(sides, shifts):
            point = (low + high) / 2
            point[0] += along + shift
            point[1] += side * (width / 2 - _RIM_INSET)
            point[2] = max(height + up, low[2] + _FINGERTIP)
            bottom = point[2] - low[2]
            offset = turned(yaw) @ point - position
            place = self._place_point(offset, bottom)
            key = (float(yaw), side, shift)
            cost = (
                0.5 * abs(yaw) + 10.0 * abs(shift) + 3.0 * abs(side) + 1.5 * self._misses[key]
                + 50.0 * sum(overreach(self.env, reached) for reached in (
                    position + offset, position + offset + self.style.hover * UP, place))
                + abs(place[1]) + 0.1 * (1.0 + place[0])  # preferably near the arm's own plane
                + _SAME_SIDE * (side < 0 and not self._slides)
            )
            grasps.append(Grasp(offset, float(yaw), bottom, key, cost))
        return grasps

    def _crowding_cost(self, grasp: Grasp) -> float:
        """Cost of contacts of the open gripper on its way to the grasp and at the target."""
        others = Boxes.of_geoms(self.env, self._other_geoms)
        start = self.env.object_position(self.object) + grasp.offset
        end = self._place_point(grasp.offset, grasp.bottom)
        around_start, around_end = others.near(start, 0.3), others.near(end, 0.3)
        here = max(crowding(start + height * UP, grasp.yaw, around_start) for height in _COLUMN)
        there = crowding(end, grasp.yaw, around_end)
        return 2.0 * (here > 0) + 60.0 * here + 1.0 * (there > 0) + 30.0 * there

    def _support(self) -> tuple[np.ndarray, float]:
        """Centre (2,) of the object's destination, and the height of its lowest point there."""
        raw = self.env.raw
        if self._region not in raw.obj_body_id and self.target not in raw.objects_dict:
            centre, size = _region_box(self.env, self._region)  # of the table or a fixture
            return centre[:2], centre[2] - size[2]
        low, high = Boxes.of_geoms(self.env, self._target_geoms).bounds()
        height = (low[2] + high[2]) / 2  # of a plate
        if high[2] - low[2] > _CONTAINER_DEPTH:
            height = high[2]  # the object falls from the rim of a container
        return self.env.object_position(self.target)[:2], height

    # --- state ------------------------------------------------------------------------------------

    def _next_phase(self) -> str:
        ee, grasp = self.env.end_effector(), self._grasp_point()
        off_axis = np.linalg.norm((ee - grasp)[:2])
        held = self._holding()
        match self.phase:
            case "approach":
                aligned = np.abs(self._turn_left()).max() < 0.15
                if aligned and off_axis < 0.02 and ee[2] - grasp[2] < self.style.hover + 0.02:
                    return "descend"
                if self._steps_in_phase > _PATIENCE:
                    return self._missed()
            case "descend":
                if off_axis > 0.03:
                    return "approach"
                if off_axis < 0.008 and abs(ee[2] - grasp[2]) < 0.006:
                    return "close"
                if self._steps_in_phase > _PATIENCE / 2:  # blocked
                    return "close" if np.linalg.norm(ee - grasp) < 0.02 else self._missed()
            case "close":
                if self._steps_in_phase >= CLOSE_STEPS:
                    return "lift" if held else self._missed()
            case "lift" if not held:
                return self._missed()
            case "carry" | "lower" if not held:
                return "release"
            case "lift":
                if ee[2] > self._travel_height - 0.015:
                    return "carry"
            case "carry":
                if np.linalg.norm((ee - self._place_point())[:2]) < 0.018:
                    return "lower"
            case "lower":
                if np.linalg.norm((ee - self._place_point())[:2]) > 0.06:
                    return "lift"
                if ee[2] - self._place_point()[2] < 0.008 or self._steps_in_phase > _PATIENCE:
                    return "release"
            case "release":
                if self._steps_in_phase >= OPEN_STEPS:
                    return "retreat"
            case "retreat":
                if self._steps_in_phase >= 8:
                    if np.linalg.norm(ee - grasp) < _HANGS:
                        self._deeper += 0.1
                        return "close"
                    self._plan()
                    return "approach"
        return self.phase

    def _missed(self) -> str:
        self._misses[self.grasp.key] += 1  # raises its cost: another grasp is tried soon
        return "release"

    def _holding(self) -> bool:
        """The closing fingers are apart, with the object between them."""
        near = np.linalg.norm(self.env.end_effector() - self._grasp_point()) < 0.04
        return bool(near and self.env.fingers() > 0.002)

    def _grasp_point(self) -> np.ndarray:
        return self.env.object_position(self.object) + self.grasp.offset

    def _place_point(self, hang: np.ndarray | None = None,
                     bottom: float | None = None) -> np.ndarray:
        """Position of the end effector that brings the object's body over the target's centre.

        ``hang`` leads from the object's body to the end effector, by default as they are now.
        """
        if hang is None:
            hang = self.env.end_effector() - self.env.object_position(self.object)
            bottom = self.grasp.bottom
        centre, support = self._support()
        return np.array([*(centre + hang[:2]), support + bottom + 0.005 - self._deeper])

    # --- motion -----------------------------------------------------------------------------------

    def _orientation(self) -> np.ndarray:
        return turned(self.grasp.yaw) @ DOWNWARD

    def _goal(self) -> np.ndarray:
        ee, grasp = self.env.end_effector(), self._grasp_point()
        match self.phase:
            case "approach":
                return self._approach_goal(ee, grasp)
            case "descend":
                return _straight_down(ee, grasp)
            case "close":
                return grasp
            case "lift":
                return self._lift_goal(ee)
            case "carry":
                return np.array([*self._place_point()[:2], self._travel_height])
            case "lower":
                return _straight_down(ee, self._place_point())
            case "release":
                return ee
        return ee + 0.03 * UP  # retreat

    def _lift_goal(self, ee: np.ndarray) -> np.ndarray:
        """Straight up, or first sideways from under an obstacle."""
        goal = np.array([*ee[:2], self._travel_height])
        out = self._lift_from + self._way_out
        if self._way_out.any() and np.linalg.norm((ee - out)[:2]) > 0.008 \
                and ee[2] < self._lift_from[2] + 0.06:
            goal = out + 0.02 * UP
        return goal

    def _approach_goal(self, ee: np.ndarray, grasp: np.ndarray) -> np.ndarray:
        """Over the obstacles, then to above the grasp."""
        goal = grasp + self.style.hover * UP
        left = np.linalg.norm((ee - grasp)[:2])
        if left < _CORRIDOR:
            return goal
        if ee[2] < self._approach_height - 0.05 and left > 2 * _CORRIDOR:
            return np.array([*ee[:2], self._approach_height])
        goal[2] = max(goal[2], self._approach_height)
        return goal


def _straight_down(ee: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """The goal, raised while the arm is beside it: a fast descent swings the arm by 2 cm."""
    beside = np.linalg.norm((ee - goal)[:2])
    return np.array([*goal[:2], max(goal[2], min(ee[2], goal[2] + 4 * (beside - _ON_AXIS)))])


# --- goals ----------------------------------------------------------------------------------------


def pick_place_goal(env: LiberoEnv) -> tuple[str, str | None]:
    """The object and the target of a task whose goal is one ``On`` or ``In`` predicate.

    A region such as ``basket_1_contain_region`` means its object; a region of the table, ``None``.
    """
    goal = env.raw.parsed_problem["goal_state"]
    if len(goal) != 1 or goal[0][0].lower() not in ("on", "in"):
        raise ValueError(f"{env.task.name}: the goal {goal} is not one On or In predicate")
    _, item, target = goal[0]
    if target not in env.raw.obj_body_id:
        target = env.raw.object_sites_dict[target].parent_name
    return item, target


def _region_box(env: LiberoEnv, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A region's centre and half size (3,) in world axes."""
    size = np.asarray(env.raw.object_sites_dict[name].size, dtype=float)
    rotation = np.array(env.sim.data.get_site_xmat(name)).reshape(3, 3)
    return np.array(env.sim.data.get_site_xpos(name)), np.abs(rotation @ size)


def _joint_of(env: LiberoEnv, name: str) -> Joint | None:
    """The joint of a region: a drawer's rail."""
    joints = getattr(env.raw.object_sites_dict.get(name), "joints", None)
    return Joint(env, joints[0]) if joints else None
