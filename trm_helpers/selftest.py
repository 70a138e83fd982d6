"""Twelve faults that silently break LIBERO evaluations, each with a check that detects it.

``python -m trm_helpers preflight --selftest`` shows for every fault that its check passes on the
healthy evaluation and fails once the fault is seeded. The same checks examine your own environment
wrapper and policy adapter::

    with LiberoEnv(*SCENE) as env:
        print(table(examine(Subject(MyWrapper(env), policy=my_policy, play=my_play))))

A wrapper has ``reset(init_state=i)``, which returns the first observation, ``step(action)``, which
returns an observation and whether the task is solved, and passes every other attribute of the
:class:`sim.LiberoEnv` inside through.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from . import schema
from .config import ModelConfig
from .data.normalize import ActionNormalizer
from .evaluation.baselines import NoOpPolicy
from .evaluation.rollout import Policy, run_episode
from .policy.model import TRMPolicy
from .preflight import Check, run_check
from .schema import PROTOCOLS
from .sim import checks
from .sim.checks import BOWL, HOLD, SCENE, Finding, SimulatorCheck, Subject, check
from .sim.env import LiberoEnv


def chunk_policy(chunk: np.ndarray) -> TRMPolicy:
    """A policy of this package whose network predicts one chunk (K, 7), in environment units."""
    normalizer = ActionNormalizer("zscore").fit(np.random.default_rng(0).uniform(-1, 1, (64, 7)))
    policy = TRMPolicy(ModelConfig(chunk=len(chunk), execution_horizon=len(chunk), hidden_dim=16,
                                   image_size=36), normalizer).eval()
    predicted = torch.tensor(normalizer.normalize(chunk), dtype=torch.float32)
    policy.head.forward = lambda features: predicted.expand(1, 1, *chunk.shape)
    return policy


def play_episode(policy: Policy, env: LiberoEnv, suite: str = "") -> dict:
    """One episode from init state 0, with the horizon of ``suite``; its row has the ``steps``."""
    return run_episode(policy, env, 0, PROTOCOLS["openvla"].horizon(suite or env.task.suite))


# --- checks of policies and evaluations ----------------------------------------------------------
@check("chunk",
       "denormalise to [-1, 1], where 1 asks for 5 cm, and send a chunk's first action first")
def chunk(subject: Subject) -> Finding:
    """A predicted chunk moves the arm as far as it says, its first action first."""
    env, half = subject.env, 6
    actions = np.tile(HOLD, (2 * half, 1))
    actions[:half, 1], actions[half:, 1] = 0.8, -0.8
    policy = (subject.policy or chunk_policy)(actions)
    policy.reset()
    observation, places = env.reset(init_state=0), []
    for _ in range(2 * half):
        places.append(env.end_effector()[1])
        observation, _ = env.step(policy.act(observation))
    moved = places[half] - places[0]
    expected = 0.8 * half * schema.METRES_PER_STEP
    return (f"half a chunk moved the arm {100 * moved:+.1f} cm; about {100 * expected:+.1f} cm "
            "was predicted", 0.5 * expected < moved < 2 * expected)


@check("horizon", "take the horizon of the suite that is played")
def horizon(subject: Subject) -> Finding:
    """An episode without success ends after the steps of the protocol for the loaded suite."""
    env = subject.env
    suite = next(name for name in env.raw.bddl_file_name.split("/")[::-1] if name in schema.SUITES)
    expected = PROTOCOLS["openvla"].horizon(suite)
    steps = (subject.play or play_episode)(NoOpPolicy(env), env)["steps"]
    return f"{steps} steps played in {suite}; the protocol allows {expected}", steps == expected


# --- seeded faults -------------------------------------------------------------------------------
class Wrapper:
    """Passes everything through except what a fault replaces.

    Args:
        reset: starts an episode, ``reset(env, init_state)``.
        send: changes an action.
        observe: entries that replace those of an observation, ``observe(env, observation)``.
    """

    def __init__(self, env, reset=lambda env, init_state: env.reset(init_state=init_state),
                 send=np.asarray, observe=lambda env, observation: {}):
        self.env, self._reset, self._send, self._observe = env, reset, send, observe

    def reset(self, init_state: int = 0) -> Mapping:
        return self._observed(self._reset(self.env, init_state))

    def step(self, action) -> tuple[Mapping, bool]:
        observation, done = self.env.step(self._send(action))
        return self._observed(observation), done

    def _observed(self, observation: Mapping) -> Mapping:
        return ChainMap(self._observe(self.env, observation), observation)

    def __getattr__(self, name: str):
        return getattr(self.env, name)


def _slide(env, init_state: int) -> Mapping:
    """The bowl settles about 5 cm off the ramekin's centre, as it does past MuJoCo 3.3."""
    env.reset(init_state=init_state)
    joint = env.raw.objects_dict[BOWL].joints[0]
    env.sim.data.set_joint_qpos(joint, env.sim.data.get_joint_qpos(joint) - [0, .05, 0, 0, 0, 0, 0])
    for _ in range(schema.SETTLE_STEPS):
        observation, _ = env.step(HOLD)
    return observation


def _reset_again(env, init_state: int) -> Mapping:
    env.reset(init_state=init_state)
    return env.reset(seed=17)


def _flip(env, observation: Mapping) -> dict:
    return {key: observation[key][::-1] for key in schema.CAMERAS}


def _exchange(env, observation: Mapping) -> dict:
    return dict(zip(schema.CAMERAS, [observation[key] for key in reversed(schema.CAMERAS)],
                    strict=True))


def _negate_quaternion(env, observation: Mapping) -> dict:
    angle = np.linalg.norm(observation["ee_ori"])
    return {"ee_ori": observation["ee_ori"] * (angle - 2 * np.pi) / angle}


class _StaleFirstFrame(Wrapper):
    last: Mapping | None = None

    def reset(self, init_state: int = 0) -> Mapping:
        before = self.last
        first = super().reset(init_state)
        return before or first

    def _observed(self, observation: Mapping) -> Mapping:
        self.last = dict(observation)
        return observation


def _wrapped(kind: type[Wrapper] = Wrapper, **replaced) -> Callable[[Subject], Subject]:
    return lambda subject: replace(subject, env=kind(subject.env, **replaced))


class Fault(NamedTuple):
    """A fault, the check that detects it, and its variants: each makes the subject faulty."""

    name: str
    check: SimulatorCheck
    seeds: tuple[Callable[[Subject], Subject], ...]


FAULTS = (
    Fault("MuJoCo newer than 3.3", checks.contacts,
          (partial(replace, mujoco="3.17.0"), _wrapped(reset=_slide))),
    Fault("init state wiped by a reset", checks.init_state, (_wrapped(reset=_reset_again),)),
    Fault("every init id is 1", checks.init_ids,
          (_wrapped(reset=lambda env, init_state: env.reset(init_state=1)),)),
    Fault("instruction taken from the file name", checks.instruction,
          (_wrapped(observe=lambda env, _: {"language": env.task.name.replace("_", " ")}),)),
    Fault("frames flipped", checks.orientation, (_wrapped(observe=_flip),)),
    Fault("quaternion negated", checks.quaternion, (_wrapped(observe=_negate_quaternion),)),
    Fault("gripper command negated", checks.gripper,
          (_wrapped(send=lambda action: action * [1, 1, 1, 1, 1, 1, -1]),)),
    Fault("cameras exchanged", checks.cameras, (_wrapped(observe=_exchange),)),
    Fault("black frames", checks.frames, (_wrapped(
        observe=lambda env, seen: {key: np.zeros_like(seen[key]) for key in schema.CAMERAS}),)),
    Fault("chunk in the wrong unit or order", chunk, (
        partial(replace, policy=lambda chunk: chunk_policy(chunk * [.05, .05, .05, .5, .5, .5, 1])),
        partial(replace, policy=lambda chunk: chunk_policy(chunk[::-1].copy())))),
    Fault("horizon of another suite", horizon, (
        partial(replace, play=partial(play_episode, suite="libero_object")),)),
    Fault("stale first frame", checks.first_frame, (_wrapped(_StaleFirstFrame),)),
)


def examine(subject: Subject) -> list[Check]:
    """The twelve checks on your environment and policy; see the module's docstring."""
    return [run_check(fault.check, subject) for fault in FAULTS]


def selftest() -> list[Check]:
    """For each fault: its check passes on the healthy evaluation and detects every variant."""
    with LiberoEnv(*SCENE) as env:
        subject = Subject(env)
        return [_test(fault, subject) for fault in FAULTS]


def _test(fault: Fault, subject: Subject) -> Check:
    healthy = run_check(fault.check, subject)
    if healthy.status != "ok":
        return replace(healthy, name=fault.name)
    found, status, hint = [f"healthy: {healthy.found}"], "ok", fault.check.hint
    for seed in fault.seeds:
        seeded = run_check(fault.check, seed(subject))
        found.append(f"seeded: {seeded.found}")
        if seeded.status == "ok":
            status, hint = "fail", "the seeded fault was not detected"
    return Check(fault.name, status, "; ".join(found), hint)
