"""The skill that puts an object under a roof, through the open side: a mug into a microwave."""

from __future__ import annotations

import numpy as np

from ..sim.env import LiberoEnv
from ..sim.geometry import UP, Boxes, free_spot, geoms_of, region_box, turned
from .skills import CLOSE_STEPS, OPEN_STEPS, Skill, Style, facing

_SIDES = [turned(angle)[0] for angle in np.radians([90, 0, 180, 270])]
_BACK_STEPS = 8
_WAY_IN = 0.3  # metres in front of a region that are free at its open side


def way_into(env: LiberoEnv, region: str) -> np.ndarray | None:
    """Direction (3,) from a region under a roof to its open side; ``None`` without a roof."""
    site = env.raw.object_sites_dict.get(region)
    if site is None or site.parent_name not in env.raw.fixtures_dict:
        return None
    centre, half = region_box(env, region)
    fixture = Boxes.of_geoms(env, geoms_of(env, site.parent_name))
    ray = np.linspace(0.0, 1.0, 200)[:, None]  # boards are thin
    if fixture.share_inside(centre + ray * _WAY_IN * UP) == 0 or half[2] < 0.01:
        return None
    return min(_SIDES, key=lambda side: fixture.share_inside(centre + ray * _WAY_IN * side))


class PutInside(Skill):
    """Grasps an object at its side that faces the opening, for a mug its handle, and slides it in.

    Args:
        item: the object's name.
        region: the target's name.
        out: the direction (3,) of its opening, from :func:`way_into`.
    """

    closed = ("close", "lift", "carry", "insert", "lower")
    timed = {"release": (OPEN_STEPS, "back"), "back": (_BACK_STEPS, "approach")}
    last = ("back", _BACK_STEPS)
    _TILT = np.radians(30)  # from pointing down: the hand stays outside
    _PART = 0.015  # metres from the object's end that are grasped
    _BEFORE = 0.08  # metres in front of the grasp where the gripper is aligned
    _OVER = 0.015  # metres between the object and what it slides over
    _DEEP = 0.03  # metres from the region's edge to the object's body

    def __init__(self, env: LiberoEnv, item: str, region: str, out: np.ndarray,
                 style: Style | None = None):
        super().__init__(env, style)
        self.object, self._region, self._out = item, region, out
        self._geoms = geoms_of(env, item)
        self._pointing = -np.cos(self._TILT) * UP - np.sin(self._TILT) * out
        self._jaw = np.cross(UP, -out)
        low, high = Boxes.of_geoms(env, self._geoms).corners()
        reach = (low + high) / 2 @ out
        self._part = [geom for geom, along in zip(self._geoms, reach, strict=True)
                      if along > reach.max() - self._PART]
        centre, half = region_box(env, region)
        self._bottom = env.object_position(item)[2] - low[:, 2].min()
        fixture = geoms_of(env, env.raw.object_sites_dict[region].parent_name)
        size = high.max(axis=0) - low.min(axis=0)
        spot = free_spot(Boxes.of_geoms(env, fixture), centre, half, size, size[2])
        across = spot @ self._jaw[:2] * self._jaw
        self._inside = centre + across + (np.abs(out) @ half - self._DEEP) * out
        self._inside[2] = centre[2] - half[2] + self._bottom

    def _orientation(self) -> np.ndarray:
        return facing(self._pointing, self._jaw)

    def _grasp_point(self) -> np.ndarray:
        return Boxes.of_geoms(self.env, self._part).middle()

    def _in_front(self) -> np.ndarray:
        """The object's position (3,) before it slides in."""
        size = Boxes.of_geoms(self.env, self._geoms).size()
        away = np.abs(self._out) @ size + self._DEEP
        return self._inside + away * self._out + 2 * self._OVER * UP

    def _next_phase(self) -> str:
        ee, grasp = self.env.end_effector(), self._grasp_point()
        along = (ee - grasp) @ self._pointing
        beside = np.linalg.norm(ee - grasp - along * self._pointing)
        held = self._holds_at(grasp)
        at = self.env.object_position(self.object)
        match self.phase:
            case "approach":
                if beside < 0.01 and along < -0.04 and np.abs(self._turn_left()).max() < 0.1:
                    return "reach"
            case "reach":
                if beside > 0.025:
                    return "approach"
                if np.linalg.norm(ee - grasp) < 0.007 or self._steps_in_phase > 40:
                    return "close"
            case "close":
                if self._steps_in_phase >= CLOSE_STEPS:
                    return "lift" if held else "release"
            case "lift" | "carry" | "insert" | "lower" if not held:
                return "release"
            case "lift":
                if at[2] > self._in_front()[2] - 0.01:
                    return "carry"
            case "carry":
                if np.linalg.norm((at - self._in_front())[:2]) < 0.015:
                    return "insert"
            case "insert":
                if (at - self._inside) @ self._out < 0.008 or self._steps_in_phase > 60:
                    return "lower"
            case "lower":
                if self._stands():
                    return "release"
        return self.phase

    def _goal(self) -> np.ndarray:
        ee, grasp = self.env.end_effector(), self._grasp_point()
        hang = ee - self.env.object_position(self.object)
        match self.phase:
            case "approach":
                return grasp - self._BEFORE * self._pointing
            case "reach" | "close":
                return grasp
            case "lift":
                return np.array([*ee[:2], (self._in_front() + hang)[2]])
            case "carry":
                return self._in_front() + hang
            case "insert":
                return self._inside + 2 * self._OVER * UP + hang
            case "lower":
                return np.array([*(self._inside + hang)[:2], ee[2] - 0.04])
            case "release":
                return ee
        return ee - 0.05 * self._pointing  # back
