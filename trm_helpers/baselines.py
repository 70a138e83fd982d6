"""Policies that need no training: what a success rate lies between."""

from __future__ import annotations

import zlib

import numpy as np

from . import schema
from .experts import make_expert
from .sim import LiberoEnv


class ExpertPolicy:
    """The scripted demonstrator: sees where everything is, which no policy does."""

    def __init__(self, env: LiberoEnv):
        self.env = env

    def reset(self) -> None:
        self.expert = None

    def act(self, observation) -> np.ndarray:
        self.expert = self.expert or make_expert(self.env)  # it looks at the scene as it was reset
        return self.expert.act()


class RandomPolicy:
    """Uniform commands, the gripper open or closed; the same ones from the same state."""

    def __init__(self, env: LiberoEnv):
        self.env = env

    def reset(self) -> None:
        self.generator = None

    def act(self, observation) -> np.ndarray:
        if self.generator is None:
            self.generator = np.random.default_rng(zlib.crc32(self.env.state().tobytes()))
        action = self.generator.uniform(-1, 1, schema.ACTION_DIM)
        action[schema.GRIPPER_INDEX] = np.sign(action[schema.GRIPPER_INDEX])
        return action


class NoOpPolicy:
    """Stays where it is with the gripper open: what solves itself."""

    def __init__(self, env: LiberoEnv):
        pass

    def reset(self) -> None:
        pass

    def act(self, observation) -> np.ndarray:
        return np.array(schema.NO_OP)


BASELINES = {"expert": ExpertPolicy, "random": RandomPolicy, "no-op": NoOpPolicy}
