"""A policy that walks and a road to walk on: stand-ins for a trained one and the simulator."""

import types

import numpy as np

from trm_helpers import schema
from trm_helpers.evaluation import plan


class CountingPolicy:
    """Always asks for the same full step; counts its episodes."""

    last_recursions = 3

    def __init__(self, axis=0):
        self.action = np.eye(7)[axis] - np.eye(7)[schema.GRIPPER_INDEX]
        self.resets = 0

    def reset(self):
        self.resets += 1

    def act(self, observation):
        return self.action


class StraightRoad:
    """Solved after ``init_state + 1`` steps forward; the first picks up a stick.

    Stands in for ``sim.LiberoEnv``.
    """

    horizon = 4
    made = []

    def __init__(self, suite="libero_object", task_id=3, **settle):
        self.settle = settle
        self.task = types.SimpleNamespace(suite=suite, task_id=task_id, name="walk",
                                          language="walk to the end")
        self.made.append(self)

    def close(self):
        pass

    def reset(self, init_state=None, seed=None, arrange=None):
        self.picked = False
        first = plan.WIDE_SEED if arrange else plan.SELECTION_SEED
        self.left = 1 + (init_state if seed is None else seed - first)
        return self._look()

    def step(self, action):
        self.left -= action[0]
        self.picked = True
        return self._look(), bool(self.left <= 0)

    def heights(self):
        return {"stone": 0.02, "stick": 0.1 * self.picked}

    def objects_to_move(self):
        return ["stick"]

    def film_frame(self, size):
        """Grey, brighter with each step."""
        return np.full((size, size, 3), max(0, 200 - 40 * int(self.left)), np.uint8)

    def _look(self):
        frame = np.zeros((64, 64, 3), np.uint8)
        frame[0] = 255  # the first row as stored is at the bottom for a person
        return dict.fromkeys(schema.CAMERAS, frame)
