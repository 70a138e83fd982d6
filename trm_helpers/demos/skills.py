"""Base of the scripted skills.

A skill is a state machine on privileged positions. Its phase is chosen anew from the scene in every
step, so that it recovers from a push or a lost grip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import schema
from ..sim.env import LiberoEnv

# One control step at full command moves the end effector by schema.METRES_PER_STEP; the command is
# scaled below the remaining distance. A gain of 1.0 overshoots by 9 mm, 0.7 by 2 mm.
_GAIN = 0.7
METRES_PER_UNIT = 0.05
_RADIANS_PER_UNIT = 0.5
_TURN_LIMIT = 0.5  # largest command about an axis; the arm follows faster turns badly
# the end-effector site with the gripper pointing down and the fingers closing along y
DOWNWARD = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
CLOSE_STEPS = 9  # until the fingers hold
OPEN_STEPS = 4
# Steps for which a lowered object stands before it is released. A policy does not see for how long
# it has stood: if the wait is longer than the steps executed per decision, it may never let go.
STILL_STEPS = 2
_STANDS = 0.001  # metres in a step that a lowered object does not sink: it stands


def facing(pointing: np.ndarray, jaw: np.ndarray) -> np.ndarray:
    """The end-effector site of a gripper that points along the one and closes along the other."""
    return np.column_stack([jaw, np.cross(pointing, jaw), pointing])


@dataclass(frozen=True)
class Style:
    """How demonstrations vary, as a person's do."""

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


class Skill:
    """A state machine whose phase sets the goal of the end effector.

    A subclass defines ``_next_phase()``, ``_goal()`` in metres, ``_orientation()`` of the site,
    ``closed``, the phases in which the gripper is closed, ``timed``, the phases of a fixed length,
    and ``last``, the phase that ends it, with the number of steps in it.

    Args:
        env: the environment, already reset.
        style: timing and path; the default does not vary.
    """

    closed: tuple[str, ...] = ()
    timed: dict[str, tuple[int, str]] = {}  # steps in a phase, and the phase that follows
    last: tuple[str, int]

    def __init__(self, env: LiberoEnv, style: Style | None = None):
        self.env = env
        self.style = style or Style()
        self.phase = "approach"
        self._steps_in_phase = 0
        self._height, self._still = np.inf, 0  # of the last step in metres; steps without sinking

    def act(self) -> np.ndarray:
        """The action (7,) for the scene as it is now, in [-1, 1]."""
        steps, after = self.timed.get(self.phase, (np.inf, ""))
        phase = after if self._steps_in_phase >= steps else self._next_phase()
        self._steps_in_phase = self._steps_in_phase + 1 if phase == self.phase else 0
        if phase != self.phase:
            self._height, self._still = np.inf, 0
        self.phase = phase
        gripper = schema.GRIPPER_CLOSED if phase in self.closed else schema.GRIPPER_OPEN
        turn = np.clip(_GAIN * self._turn_left() / _RADIANS_PER_UNIT, -_TURN_LIMIT, _TURN_LIMIT)
        return np.concatenate([self._servo(self._goal()), turn, [gripper]])

    def finished(self) -> bool:
        """Whether the next skill of a sequence may begin."""
        phase, steps = self.last
        return self.phase == phase and self._steps_in_phase >= steps

    def _stands(self, steps: int = STILL_STEPS) -> bool:
        """Whether the end effector has sunk no further for more than ``steps`` steps.

        To be asked in each step of a phase that lowers an object.
        """
        height = self.env.end_effector()[2]
        sunk, self._height = self._height - height, height
        self._still = self._still + 1 if sunk < _STANDS else 0
        return self._still > steps

    def _holds_at(self, grasp: np.ndarray) -> bool:
        """The closing fingers are apart at ``grasp`` (3,), with an object between them."""
        near = np.linalg.norm(self.env.end_effector() - grasp) < 0.04
        return bool(near and self.env.fingers() > 0.002)

    def _orientation(self) -> np.ndarray:
        return DOWNWARD

    def _servo(self, goal: np.ndarray) -> np.ndarray:
        command = _GAIN * (goal - self.env.end_effector()) / METRES_PER_UNIT
        return command * min(1.0, self.style.speed / max(np.abs(command).max(), 1e-9))

    def _turn_left(self) -> np.ndarray:
        """Axis-angle (3,) in radians from the gripper's orientation to the wanted one."""
        from robosuite.utils.transform_utils import mat2quat, quat2axisangle

        return quat2axisangle(mat2quat(self._orientation() @ self._site_rotation().T))

    def _site_rotation(self) -> np.ndarray:
        site = self.env.raw.robots[0].eef_site_id
        return np.array(self.env.sim.data.site_xmat[site]).reshape(3, 3)
