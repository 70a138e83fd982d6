"""Scripted experts that demonstrate a task as a person would, planned from the goal's predicates.

They command the same seven numbers as a policy: end-effector deltas and the gripper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from ..sim.env import LiberoEnv
from ..sim.geometry import Boxes, geoms_of, region_box
from .joints import Joint, OpenDrawer, PushShut, TurnKnob
from .pick_place import PickPlace
from .put_inside import PutInside, way_into
from .skills import STILL_STEPS, Skill, Style

Predicate = tuple[str, ...]  # a lower-case verb and the names that it relates
_PLACING = ("on", "in")
_SPREAD = 0.65  # of a region's half size, from its middle to the outer objects that share it


class Expert:
    """Makes the predicates of the task's goal true, one skill after another.

    Whenever a skill has finished, the goal is planned again from the scene as it is then: an object
    that fell out is placed again, a drawer that was pushed open is closed again.

    Args:
        env: the environment, already reset.
        style: timing and path; the default does not vary.

    Raises:
        ValueError: no skill for predicates of the goal, which it names.
    """

    def __init__(self, env: LiberoEnv, style: Style | None = None):
        self.env = env
        self.style = style
        self.goal = [(verb.lower(), *names)
                     for verb, *names in env.raw.parsed_problem["goal_state"]]
        if lacking := self._lacking(self.goal) or self._lacking(self._plan()):
            written = ", ".join(f"{verb}({', '.join(names)})" for verb, *names in lacking)
            raise ValueError(f"{env.task.name}: no skill for {written} in the goal or "
                             "on the way to it; expected On or In of an object, Open of a drawer, "
                             "Close of a drawer or a door, TurnOn or TurnOff of a knob")
        self._beside = _share_targets(env, self.goal)
        self._begin(self._next_predicate())

    @property
    def phase(self) -> str:
        return self.skill.phase

    def act(self) -> np.ndarray:
        """The action (7,) for the scene as it is now, in [-1, 1]."""
        if self.skill.finished():
            predicate = self._next_predicate()
            if predicate != self.predicate:  # otherwise the skill itself tries again
                self._begin(predicate)
        return self.skill.act()

    def _begin(self, predicate: Predicate) -> None:
        self.predicate = predicate
        self.skill = self._skill(predicate)

    def _next_predicate(self) -> Predicate:
        # a door that was pushed half shut stays so: there is no skill to open it
        return next(predicate for predicate in self._plan() if not self._lacking([predicate]))

    def _lacking(self, predicates: Sequence[Predicate]) -> list[Predicate]:
        return [predicate for predicate in predicates if not _is_served(self.env, predicate)]

    def _plan(self) -> list[Predicate]:
        return plan(self.goal, self.env.raw._eval_predicate,
                    functools.partial(_joint_name, self.env), self._is_shut)

    def _is_shut(self, joint: str) -> bool:
        joint = Joint(self.env, joint)
        return joint.opened() < joint.end / 2

    def _skill(self, predicate: Predicate) -> Skill:
        verb, name = predicate[:2]
        if verb in _PLACING:
            if (out := way_into(self.env, predicate[2])) is not None:
                return PutInside(self.env, name, predicate[2], out, self.style)
            # A single placement ends the episode on contact. In a sequence, an object that stands
            # is released early, so that its lowering does not use up the time.
            timing = {"still_steps": STILL_STEPS} if len(self.goal) > 1 else {}
            return PickPlace(self.env, name, predicate[2], self.style, self._beside[predicate],
                             **timing)
        joint = Joint(self.env, _joint_name(self.env, predicate))
        match verb:
            case "open":
                return OpenDrawer(self.env, joint, self.style)
            case "close":
                return PushShut(self.env, joint, self.style)
        return TurnKnob(self.env, joint, self.style, on=verb == "turnon")


# --- planning -------------------------------------------------------------------------------------


def plan(goal: Sequence[Predicate], holds: Callable[[Predicate], bool],
         joint_of: Callable[[Predicate], Hashable], is_shut: Callable[[Hashable], bool],
         ) -> list[Predicate]:
    """The predicates to make true, in order; the whole goal if all hold.

    Drawers and doors that stay empty are closed first. Then others are opened and knobs turned,
    while nothing stands beside them. Then objects are placed, the lower one of a stack first, each
    after what it goes into has been opened. Filled drawers and doors are closed last.

    Args:
        goal: its order decides between equals.
        holds: whether a predicate is true.
        joint_of: the joint that a predicate depends on, or ``None``: a drawer's rail for ``In``.
        is_shut: whether a joint bars the way into what it closes.
    """
    todo = [predicate for predicate in goal if not holds(predicate)] or list(goal)
    placed = [predicate for predicate in todo if predicate[0] in _PLACING]
    filled = {joint_of(predicate) for predicate in placed if predicate[0] == "in"} - {None}
    opened = {joint_of(predicate) for predicate in todo if predicate[0] == "open"}
    opening = [("open", predicate[2]) for predicate in placed
               if joint_of(predicate) in filled - opened and is_shut(joint_of(predicate))]

    def rank(predicate: Predicate) -> tuple[int, int]:
        if predicate[0] == "close":
            return (3, 0) if joint_of(predicate) in filled else (0, 0)
        if predicate[0] in _PLACING:
            return 2, sum(below[1] == predicate[2] for below in placed)
        return 1, 0

    return sorted([*dict.fromkeys(opening), *todo], key=rank)


def _is_served(env: LiberoEnv, predicate: Predicate) -> bool:
    verb = predicate[0]
    if verb in _PLACING:
        return predicate[1] in env.raw.objects_dict
    if verb not in ("open", "close", "turnon", "turnoff") or not _joint_name(env, predicate):
        return False
    return verb != "open" or Joint(env, _joint_name(env, predicate)).slides


def _joint_name(env: LiberoEnv, predicate: Predicate) -> str | None:
    """The joint of a predicate's fixture or region; of ``On`` none, as it moves no surface."""
    if predicate[0] == "on":
        return None
    site = env.raw.object_sites_dict.get(predicate[-1])
    joints = getattr(site, "joints", None)
    if not joints:  # a fixture, or a region behind a fixture's only door
        fixture = env.raw.fixtures_dict.get(getattr(site, "parent_name", predicate[-1]))
        joints = getattr(fixture, "joints", ())
    return joints[0] if len(joints) == 1 else None


def _share_targets(env: LiberoEnv, goal: Sequence[Predicate]) -> dict[Predicate, np.ndarray]:
    """Metres (2,) from its target's middle for each object: those in one region stand in a row.

    The row runs along the axis in which the objects are narrower. Its far end is filled first.
    """
    beside = {predicate: np.zeros(2) for predicate in goal if predicate[0] in _PLACING}
    for target in {predicate[2] for predicate in beside}:
        row = [predicate for predicate in beside if predicate[2] == target]
        if len(row) == 1 or target not in env.raw.object_sites_dict:
            continue
        sizes = [Boxes.of_geoms(env, geoms_of(env, item)).size() for _, item, _ in row]
        axis = int(np.argmin(np.max(sizes, axis=0)[:2]))
        spread = _SPREAD * region_box(env, target)[1][axis]
        for predicate, place in zip(row, np.linspace(spread, -spread, len(row)), strict=True):
            beside[predicate][axis] = place
    return beside
