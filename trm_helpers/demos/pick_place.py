"""The skill that moves an object: grasps, carries and sets down, or pushes over the table."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..sim.env import LiberoEnv
from ..sim.geometry import (
    UP,
    Boxes,
    crowding,
    free_spot,
    geoms_of,
    overreach,
    region_box,
    turned,
    way_out,
)
from .skills import CLOSE_STEPS, DOWNWARD, OPEN_STEPS, Skill, Style

# Lengths in metres
_OPENING = 0.07  # widest object between the fingers
_RIM_INSET = 0.005  # from an object's outline to its wall
_RIM_DEPTH = 0.018  # of a rim between the fingers; at 0.012 it slips now and then
_PAN_DEPTH = 0.03  # the same of a pan, which is heavy and whose wall leans outwards
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
_KNOB = 0.008  # height of an object's narrow part over the rest, from which it is grasped there
_HANDLE = 2.0  # radii by which an object with a handle extends to one side
_FLAT = 0.03  # a wider object of less height is pushed over the table
_ON_AXIS = 0.01  # beside the vertical; up to this a descent is not slowed
_HANGS = 0.02  # an object this near after the retreat hangs on a finger, as a gable can
_RETREAT_STEPS = 8
_PATIENCE = 60  # steps in a phase; after more, something blocks the arm


@dataclass(frozen=True)
class Grasp:
    """A grasp of an object by the end effector, and its cost."""

    offset: np.ndarray  # (3,) metres from the object's body
    yaw: float  # radians about the vertical; at zero the jaw closes along y
    bottom: float  # metres from the end effector down to the object's lowest point
    key: tuple[float, float, float]  # yaw, side and shift, which identify it in every plan
    cost: float  # without the cost of narrow places


class PickPlace(Skill):
    """Picks up an object and places it on, or in, a target.

    A flat object that goes to another part of the table is held at its edge and pushed there.

    Args:
        item: the object's name.
        region: the target's name: an object, or a region of an object, a fixture or the table.
        beside: metres (2,) from the target's middle, for one of several objects on it.
        still_steps: steps without sinking after which a lowered object is released.
    """

    closed = ("close", "lift", "carry", "lower")
    timed = {"release": (OPEN_STEPS, "retreat")}
    last = ("retreat", _RETREAT_STEPS)
    _turning = ("carry", "lower", "release", "retreat")

    def __init__(self, env: LiberoEnv, item: str, region: str, style: Style | None = None,
                 beside: np.ndarray | float = 0.0, still_steps: int = _PATIENCE):
        super().__init__(env, style)
        self.object, self._region, self._beside = item, region, beside
        self._still_steps = still_steps
        sites = env.raw.object_sites_dict
        self.target = region if region in env.raw.obj_body_id else sites[region].parent_name
        self._enclosed = (region in sites and self.target in env.raw.fixtures_dict
                          and region_box(env, region)[1][2] > _FLAT / 2)
        self._object_geoms = geoms_of(env, self.object)
        others = [name for name in env.raw.obj_body_id if name != self.object]
        self._other_geoms = geoms_of(env, *others)
        self._target_geoms = geoms_of(env, self.target) if self.target else []
        self._table = Boxes.of_geoms(env, geoms_of(env, *env.raw.objects_dict)).bounds()[0][2]
        self._knob, self._knob_from = self._find_knob()
        self._handle = [] if self._knob else self._find_handle()
        self._body = [geom for geom in self._object_geoms if geom not in self._handle]
        low, high = Boxes.of_geoms(env, self._object_geoms).bounds()
        self._slides = (self.target is None and high[1] - low[1] > _OPENING
                        and high[2] - low[2] < _FLAT)
        self._misses: Counter = Counter()
        self._plan()

    # --- planning ---------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Choose a grasp and the heights of the gripper's approach and the object's transport."""
        self._turn = self._drop = 0.0  # radians, metres: on the way into a narrow region
        self._deeper = 0.0  # metres below the target's support, to free a hanging object
        self._shift = self._spot() if self._enclosed else np.zeros(2)
        self._rimmed = self._has_rim()  # a push may have turned a box that fitted the gripper
        self.grasp = self._choose_grasp()
        others = Boxes.of_geoms(self.env, self._other_geoms)
        ee, start = self.env.end_effector(), self.env.object_position(self.object)
        tops = others.tops_along(ee, start + self.grasp.offset, _CORRIDOR)
        self._approach_height = max(tops, default=0.0) + 0.03
        self._turn = self._turn_to_fit() if self._enclosed else 0.0
        if self._turn:
            self._shift, self._drop = self._spot(), self._free_height()
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

    def _find_knob(self) -> tuple[list[int], float]:
        """The part by which an object too wide for the gripper is grasped, if it has one.

        Returns its geometry in a list, and the height (m) above the body from which it is free.
        """
        boxes = Boxes.of_geoms(self.env, self._object_geoms)
        width = least_width(boxes)
        low, high = boxes.corners()
        top = int(np.argmax(high[:, 2]))
        rest = np.delete(np.arange(len(high)), top)
        size = high[top] - low[top]
        narrow = size[:2].max() < _OPENING and high[top, 2] - high[rest, 2].max() > _KNOB
        if width < _OPENING or not narrow:
            return [], 0.0
        middle = (low[top, :2] + high[top, :2]) / 2
        away = np.linalg.norm(middle - np.clip(middle, low[rest, :2], high[rest, :2]), axis=1)
        below = max(high[rest[away < _FINGER_WIDTH], 2], default=low[:, 2].min())
        return [self._object_geoms[top]], below - self.env.object_position(self.object)[2]

    def _find_handle(self) -> list[int]:
        """The geometries of a frying pan's handle; empty for other objects."""
        boxes = Boxes.of_geoms(self.env, self._object_geoms)
        middle = self.env.object_position(self.object)[:2]
        low, high = boxes.bounds()
        reach = np.concatenate([high[:2] - middle, middle - low[:2]])
        away = np.linalg.norm(boxes.centre[:, :2] - middle, axis=1)
        if least_width(boxes) < _OPENING or reach.max() < _HANDLE * reach.min():
            return []
        return [geom for geom, distance in zip(self._object_geoms, away, strict=True)
                if distance > reach.min()]

    def _has_rim(self) -> bool:
        """Whether one finger can go inside: the object is hollow, or fits the gripper at no yaw."""
        boxes = Boxes.of_geoms(self.env, self._object_geoms)
        if least_width(boxes) > _OPENING:
            return True
        low, high = boxes.bounds()
        middle = np.array([*(low + high)[:2] / 2, max(high[2] - _RIM_DEPTH, (low + high)[2] / 2)])
        return boxes.share_inside(middle[None]) == 0

    def _spot(self) -> np.ndarray:
        """Metres (2,) from the region's centre to where the object meets least of the fixture."""
        centre, half = region_box(self.env, self._region)
        size = Boxes.of_geoms(self.env, self._object_geoms).size(-self._turn)
        fixture = Boxes.of_geoms(self.env, self._target_geoms)
        return free_spot(fixture, centre, half, size, size[2] + 0.1)

    def _turn_to_fit(self) -> float:
        """Radians by which a long object is turned on its way into a region narrower than it."""
        boxes = Boxes.of_geoms(self.env, self._object_geoms)
        _, half = region_box(self.env, self._region)
        if (boxes.size() <= 2 * half)[:2].all():
            return 0.0
        yaws = np.radians(np.arange(-90, 90, 5))
        thin = min(yaws, key=lambda yaw: boxes.size(yaw)[1])
        wanted = np.pi / 2 if half[0] < half[1] else 0.0  # its thin side along the region's
        turn = (wanted - thin + np.pi / 2) % np.pi - np.pi / 2
        if self.grasp.yaw + turn < -np.pi / 3:  # joint 7 turns less far this way
            turn += np.pi
        return turn

    def _free_height(self) -> float:
        """Metres above the support from which a turned object falls: the hand meets nothing."""
        others = Boxes.of_geoms(self.env, self._other_geoms)
        end = self._place_point(turned(self._turn) @ self.grasp.offset, self.grasp.bottom)
        near = others.near(end, 0.3)
        heights = np.arange(0.0, 0.1, 0.01)
        met = [crowding(end + height * UP, self.grasp.yaw + self._turn, near)
               for height in heights]
        return float(heights[int(np.argmin(met))])

    def _outline(self) -> np.ndarray:
        """Points (64, 3) of the object's top and bottom, taken as discs."""
        boxes = Boxes.of_geoms(self.env, self._object_geoms)
        radius, angle, end = np.meshgrid(
            (0.6, 1.0), np.arange(0, 2 * np.pi, np.pi / 8), (-1.0, 1.0))
        disc = np.stack([radius * np.cos(angle), radius * np.sin(angle), end], axis=-1)
        return boxes.middle() + disc.reshape(-1, 3) * boxes.size() / 2

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
        """Grasps at one yaw, of the object or of its handle."""
        grasps = self._grasps_of(self._knob or self._body, yaw)
        if self._handle:
            grasps += [grasp for grasp in self._grasps_of(self._handle, yaw) if not grasp.key[1]]
        return grasps

    def _grasps_of(self, geoms: list[int], yaw: float) -> list[Grasp]:
        """At the middle of a narrow part, or at a bowl's rim on two sides.

        None of a solid object that is too wide at this yaw: a finger would come down on its top.
        """
        position = self.env.object_position(self.object)
        lowest = Boxes.of_geoms(self.env, self._object_geoms).bounds()[0][2]
        low, high = Boxes.of_geoms(self.env, geoms).bounds(yaw)
        if self._knob:
            low[2] = position[2] + self._knob_from
        width = high[1] - low[1]
        sides, height = (0.0,), max((low[2] + high[2]) / 2, high[2] - _REACH)
        if width > _OPENING and not self._rimmed:
            return []
        if width > _OPENING:
            sides, height = (1.0, -1.0), high[2] - (_PAN_DEPTH if self._handle else _RIM_DEPTH)
        along, up = self.style.grasp_offset
        room = (high[0] - low[0]) / 2 - _FINGER_WIDTH  # beyond it the fingers miss the object
        shifts = [shift for shift in _ALONG if abs(shift) <= max(room, 0.0)]
        grasps = []
        for side, shift in itertools.product(sides, shifts):
            point = (low + high) / 2
            point[0] += along + shift
            point[1] += side * (width / 2 - _RIM_INSET)
            point[2] = max(height + up, low[2] + _FINGERTIP)
            bottom = point[2] - lowest
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
        others = Boxes.of_geoms(self.env, self._other_geoms + self._handle)
        start = self.env.object_position(self.object) + grasp.offset
        end = self._place_point(grasp.offset, grasp.bottom)
        around_start, around_end = others.near(start, 0.3), others.near(end, 0.3)
        here = max(crowding(start + height * UP, grasp.yaw, around_start) for height in _COLUMN)
        there = crowding(end, grasp.yaw, around_end)
        return 2.0 * (here > 0) + 60.0 * here + 1.0 * (there > 0) + 30.0 * there

    def _support(self) -> tuple[np.ndarray, float]:
        """Centre (2,) of the object's destination, and the height of its lowest point there."""
        raw = self.env.raw
        if self._region in raw.object_sites_dict and self.target not in raw.objects_dict:
            centre, size = region_box(self.env, self._region)  # of the table or a fixture
            if self.target is None:
                return centre[:2], centre[2] - size[2] if self._slides else self._table
            return centre[:2] + self._beside + self._shift, centre[2] - size[2]
        low, high = Boxes.of_geoms(self.env, self._target_geoms).bounds()
        height = (low[2] + high[2]) / 2  # of a plate
        if high[2] - low[2] > _CONTAINER_DEPTH:
            height = high[2]  # the object falls from the rim of a container
        return self.env.object_position(self.target)[:2] + self._beside, height

    def finished(self) -> bool:
        """The object stands free of the open, risen gripper."""
        hangs = np.linalg.norm(self.env.end_effector() - self._grasp_point()) < _HANGS
        return super().finished() and not hangs

    # --- state ------------------------------------------------------------------------------------

    def _next_phase(self) -> str:
        ee, grasp = self.env.end_effector(), self._grasp_point()
        off_axis = np.linalg.norm((ee - grasp)[:2])
        held = self._holds_at(grasp)
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
                turned_to_fit = not self._turn or np.abs(self._turn_left()).max() < 0.1
                if turned_to_fit and np.linalg.norm((ee - self._place_point())[:2]) < 0.018:
                    return "lower"
            case "lower":
                if np.linalg.norm((ee - self._place_point())[:2]) > 0.06:
                    return "lift"
                stands = self._stands(self._still_steps)
                if (ee[2] - self._place_point()[2] < 0.008 or self._steps_in_phase > _PATIENCE
                        or stands):
                    return "release"
            case "retreat":
                if self._steps_in_phase >= _RETREAT_STEPS:
                    if np.linalg.norm(ee - grasp) < _HANGS:
                        self._deeper += 0.1
                        return "close"
                    self._plan()
                    return "approach"
        return self.phase

    def _missed(self) -> str:
        self._misses[self.grasp.key] += 1  # raises its cost: another grasp is tried soon
        return "release"

    def _grasp_point(self) -> np.ndarray:
        offset = self.grasp.offset
        if self._turn and self.phase in self._turning:  # the object turns with the gripper
            now = self._site_rotation() @ DOWNWARD.T
            offset = turned(np.arctan2(now[1, 0], now[0, 0]) - self.grasp.yaw) @ offset
        return self.env.object_position(self.object) + offset

    def _place_point(self, hang: np.ndarray | None = None,
                     bottom: float | None = None) -> np.ndarray:
        """Position of the end effector that brings the object's body over the target's centre.

        ``hang`` leads from the object's body to the end effector, by default as they are now.
        """
        if hang is None:
            held = self.env.object_position(self.object)
            if self._turn:  # in a narrow region the walls matter, not the body's own centre
                held = Boxes.of_geoms(self.env, self._object_geoms).middle()
            hang = self.env.end_effector() - held
            bottom = self.grasp.bottom
        centre, support = self._support()
        height = support + bottom + 0.005 + self._drop - self._deeper
        return np.array([*(centre + hang[:2]), height])

    # --- motion -----------------------------------------------------------------------------------

    def _orientation(self) -> np.ndarray:
        turn = self._turn if self.phase in self._turning else 0.0
        return turned(self.grasp.yaw + turn) @ DOWNWARD

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


def least_width(boxes: Boxes) -> float:
    """Metres between the fingers at the yaw at which the boxes are narrowest."""
    return min(boxes.size(yaw)[1] for yaw in _YAWS)
