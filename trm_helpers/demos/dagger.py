"""DAgger: a policy acts while the scripted expert labels every step (arXiv 1011.0686).

Behaviour cloning shows the policy the states that the expert visits. DAgger adds the states that
the policy itself gets into, with the expert's action for each of them. It is imitation learning:
success and reward play no part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import schema
from ..sim.env import LiberoEnv, Observation, check_action
from ..sim.geometry import Boxes
from .experts import Expert
from .joints import TurnKnob
from .pick_place import PickPlace
from .put_inside import PutInside
from .skills import CLOSE_STEPS, Skill

# In these phases the number of steps counts; in the others it only tells that the arm is blocked.
_TIMED = ("close", "release", "retreat", "back", "away")
_PLACED = 0.06  # metres from the target up to which a release is right
# Metres beside the vertical through the grasp in which a descent continues. The expert begins it
# nearer to the vertical; an actor that is already on its way down would be sent up again, from
# where the demonstrations go down.
_ABOVE = 0.03
_NEAR = 0.04  # metres from the grasp up to which a grip that was opened is closed again
_OPEN = 0.075  # metres between the fingers of an open gripper; an object is narrower


class Actor(NamedTuple):
    """A run's policy that acts in collection, and the demonstrations to aggregate with.

    Args:
        run: its name, as in ``config.data.actor``.
        beta: probability that the expert acts in a decision.
        sha256: digest of the weights; empty while only complete files are read.
        source: pickled to workers; ``make(env)`` returns an object with ``reset()`` and
            ``act(observation)``.
        base: the file of each task with the demonstrations that the policy was trained on.
        base_count: of them, the first ones, which come first in the new file as well.
    """

    run: str
    beta: float
    sha256: str = ""
    source: Any = None
    base: Mapping[int, Path] = {}
    base_count: int = 0


class Mixture:
    """The policy that acts in an episode: the expert with probability beta, else the actor.

    Ross et al. choose in every step. Here one choice holds for a decision, ``execution_horizon``
    steps, because control never executes parts of chunks. The actor is asked in every step, also
    while the expert acts, so that its plan and its memory stay those of the episode.

    The expert's phases assume that its own commands are executed. After a step in which the actor
    acted, the phase is therefore set to what really happened, as docs/design.md describes (DAgger).

    Args:
        policy: an object with ``reset()`` and ``act(observation)``.
        expert: an :class:`experts.Expert` for the scene after the reset.
        generator: the attempt's own.
    """

    def __init__(self, env: LiberoEnv, policy, beta: float, expert: Expert,
                 generator: np.random.Generator):
        self.env, self.policy, self.beta, self.expert = env, policy, beta, expert
        self.generator = generator
        self.decision = getattr(policy, "execution_horizon", 1)  # steps
        self.step = 0
        self._expert_acts = True
        self._closed_steps = 0  # for which the gripper's executed command has been to close
        policy.reset()

    def act(self, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        """The expert's action and the action to execute, (7,) each.

        Raises ``ValueError`` for an action of the policy that is not seven finite numbers.
        """
        if not self._expert_acts:
            self._correct(self.expert.skill)
        if self.step % self.decision == 0:
            self._expert_acts = self.generator.random() < self.beta
        self.step += 1
        label, answer = self.expert.act(), check_action(self.policy.act(observation))
        executed = label if self._expert_acts else answer
        closed = executed[schema.GRIPPER_INDEX] > 0
        self._closed_steps = self._closed_steps + 1 if closed else 0
        return label, executed

    def _correct(self, skill: Skill) -> None:
        """Set the phase to what the last step, in which the actor acted, has left of it."""
        ee, closed = self.env.end_effector(), self._closed_steps > 0
        if "close" in skill.closed and skill.phase in skill.closed and not closed:
            placed = skill.phase == "lower" and np.linalg.norm(ee - skill._goal()) < _PLACED
            skill.phase, skill._steps_in_phase = "close", -1
            if placed or np.linalg.norm(ee - skill._goal()) > _NEAR:
                skill.phase = "release"  # where it belongs, or it has fallen
        elif skill.phase == "release" and closed:
            skill._steps_in_phase = -1
        elif skill.phase not in _TIMED:
            skill._steps_in_phase -= 1
        if skill.phase == "lower" and not self._supported(skill):
            skill._still = 0  # it hangs in the air, where the actor stopped
        if isinstance(skill, PickPlace | TurnKnob):
            ahead = ee - skill._grasp_point()
            if skill.phase == "retreat" and np.linalg.norm(ahead) < _NEAR:
                skill._steps_in_phase -= 1  # or what it left is taken to hang on a finger
            elif skill.phase == "approach" and np.linalg.norm(ahead[:2]) < _ABOVE \
                    and ahead[2] < skill.style.hover + 0.02:
                skill.phase, skill._steps_in_phase = "descend", -1
        if isinstance(skill, PickPlace) and skill.phase != "close" \
                and self._closed_steps >= CLOSE_STEPS and self._grasped(skill):
            away = ee - skill._place_point()
            if skill.phase == "retreat" and np.linalg.norm(away) < _PLACED:
                skill.phase, skill._steps_in_phase = "release", -1  # what was placed is held again
            elif skill.phase != "release" or np.linalg.norm(away[:2]) > _PLACED:
                self._adopt(skill)

    def _supported(self, skill: PickPlace | PutInside) -> bool:
        """The object touches something other than the gripper."""
        raw = self.env.raw
        touched = raw.get_contacts(raw.get_object(skill.object))
        return bool(touched.difference(raw.robots[0].gripper.contact_geoms))

    def _grasped(self, skill: PickPlace) -> bool:
        """Both fingers touch the object, and are not open."""
        raw = self.env.raw
        return self.env.fingers() < _OPEN and raw._check_grasp(
            raw.robots[0].gripper, raw.get_object(skill.object).contact_geoms)

    def _adopt(self, skill: PickPlace) -> None:
        """Carry on with the actor's own grasp, as it is now: an object slips and turns."""
        ee = self.env.end_effector()
        offset = ee - self.env.object_position(skill.object)
        if skill.phase in skill.closed:
            skill.grasp = dataclasses.replace(skill.grasp, offset=offset)
            return
        low, _ = Boxes.of_geoms(self.env, skill._object_geoms).bounds()
        bottom = ee[2] - low[2]
        skill._travel_height += bottom - skill.grasp.bottom
        skill._lift_from, skill._way_out = ee, np.zeros(3)
        skill.grasp = dataclasses.replace(skill.grasp, offset=offset, bottom=bottom)
        skill.phase, skill._steps_in_phase = "lift", -1
