"""One episode of a policy in the simulator, with or without a film."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .. import schema
from ..sim import layouts
from ..sim.env import LiberoEnv, Observation, SimulatorError, check_action
from ..sim.render import upright
from ..visuals.films import FPS, caption_frame, draw_path, enlarge, intended_path, write_video

PHASES = ("reach", "grasp", "carry", "place")
_GRASPING = 8  # steps that a grasp takes, from the command to close the gripper
_LIFTED = 0.02  # metres above an object's height at the start
_SCALE = 3  # of frames in films
# raised while a policy decides, too; any other error that a policy raises is its own failure
_MACHINE_FAULTS = (SimulatorError, OSError, MemoryError)


class Policy(Protocol):
    """All that evaluation knows of a policy.

    Films also show ``last_recursions``, the number of recursions of the last decision, and
    ``last_chunk`` (K, 7), the actions it predicted, of which ``execution_horizon`` are executed, if
    a policy has them.
    """

    def reset(self) -> None:
        """Start an episode."""

    def act(self, observation: Mapping) -> np.ndarray:
        """The action (7,) for an observation (see :class:`sim.Observation`)."""


def run_episode(policy: Policy, env: LiberoEnv, init_state: int | None, horizon: int = 0,
                watch: Callable[[Observation, int], None] | None = None, seed: int = 0,
                placement: str = "benchmark") -> dict:
    """One episode; ends with success, at the horizon, or when the policy fails.

    A policy that raises or returns anything but seven finite numbers has failed the episode. Faults
    of the machine (the simulator, its memory, its disks) are raised.

    Args:
        init_state: an official one; ``None`` samples a placement.
        horizon: steps allowed; 0 takes the suite's.
        watch: called with each observation and the number of executed steps, after the policy's
            decision and before the arm moves, and once more at the end.
        seed, placement: of a sampled placement, see :func:`layouts.reset`.

    Returns:
        the episode's row: suite, task_id, init_state, seed, placement, success, steps, return,
        horizon, seconds, action_ms and max_action_ms (time per call of the policy, mean and
        largest, without rendering), ``lifted`` (the objects that rose by 2 cm, in that order),
        ``goal_objects``; the mean of the policy's ``last_recursions`` over the steps, as
        ``mean_recursions`` and by :func:`phases` as ``recursions_by_phase``; and ``policy_error``
        if the policy failed.
    """
    horizon = horizon or env.horizon
    began = time.perf_counter()
    _, policy_error = _ask(policy.reset)
    observation = (layouts.reset(env, seed, placement) if init_state is None
                   else env.reset(init_state=init_state))
    success, steps, recursions, took, closed = False, 0, [], [], []
    resting, lifted = env.heights(), []
    while not (success or policy_error) and steps < horizon:
        asked = time.perf_counter()
        action, policy_error = _ask(lambda seen: check_action(policy.act(seen)), observation)
        rendering = getattr(observation, "rendering_seconds", 0.0)  # a plain dict renders nothing
        took.append(1000 * (time.perf_counter() - asked - rendering))
        if policy_error:
            break
        recursions.append(getattr(policy, "last_recursions", None))
        if watch:
            watch(observation, steps)
        observation, success = env.step(action)
        closed.append(action[schema.GRIPPER_INDEX] > 0)
        steps += 1
        lifted += [name for name, height in env.heights().items()
                   if height > resting[name] + _LIFTED and name not in lifted]
    if watch:
        watch(observation, steps)
    used = np.array([count for count in recursions if isinstance(count, Real)])
    phase = np.array(phases(closed))[:len(used)]
    return {"suite": env.task.suite, "task_id": env.task.task_id, "init_state": init_state,
            "seed": seed, "placement": placement, "success": success, "steps": steps,
            "return": float(success), "horizon": horizon,
            "lifted": lifted, "goal_objects": env.goal_objects(),
            "mean_recursions": float(used.mean()) if len(used) else None,
            "recursions_by_phase": {name: float(used[phase == name].mean()) for name in PHASES
                                    if (phase == name).any()},
            "action_ms": round(float(np.mean(took)), 3) if took else None,
            "max_action_ms": round(max(took), 3) if took else None,
            "seconds": round(time.perf_counter() - began, 3),
            **({"policy_error": policy_error} if policy_error else {})}


def _ask(call: Callable, *given) -> tuple[Any, str]:
    """What a policy returns, or how it failed; faults of the machine are raised."""
    try:
        return call(*given), ""
    except (Exception, SystemExit) as error:
        if isinstance(error, _MACHINE_FAULTS) or type(error).__name__ == "OutOfMemoryError":
            raise
        return None, f"{type(error).__name__}: {error}"


def phases(closed: Sequence[bool]) -> list[str]:
    """One of :data:`PHASES` per step, from whether the command closes the gripper.

    ``reach`` until it first closes, ``grasp`` for 8 steps from each closing, ``carry`` while it
    then stays closed, ``place`` after it has opened again.
    """
    named, steps, ever = [], 0, False  # steps for which it has been closed
    for now in closed:
        steps, ever = (steps + 1 if now else 0), ever or now
        if steps:
            named.append("grasp" if steps <= _GRASPING else "carry")
        else:
            named.append("place" if ever else "reach")
    return named


def record_episode(policy: Policy, env: LiberoEnv, init_state: int, path: str | Path,
                   horizon: int = 0) -> tuple[dict, np.ndarray]:
    """:func:`run_episode` with a film: both cameras, upright, with task, step and outcome.

    The rest of a policy's chunk is drawn as dots where the arm would go, one per step, orange until
    the next decision and blue after it. The caption has the policy's recursions.

    Args:
        path: of the MP4; ``{outcome}`` in it becomes ``success`` or ``failure``.

    Returns:
        the episode's row, with the film's path as ``video`` or the reason why there is none as
        ``video_error``: filming never costs an episode; and the agent view (steps + 1, H, W, 3),
        upright, without dots, as far as it was filmed.
    """
    film = _Film(policy, env)
    row = run_episode(policy, env, init_state, horizon, film.watch)
    outcome = "success" if row["success"] else "failure"
    path = Path(str(path).replace("{outcome}", outcome))
    try:
        if film.error:
            raise film.error
        write_video(path, film.frames(row["horizon"], outcome))
        row["video"] = str(path)
    except Exception as error:  # of ffmpeg, the disk, fonts, a renderer, a policy's last_chunk
        row["video_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row, np.array([views[0] for views in film.views])


class _Film:
    """An episode's frames, kept small: they are enlarged one at a time at the end."""

    def __init__(self, policy: Policy, env: LiberoEnv):
        self.policy, self.env = policy, env
        self.views: list[np.ndarray] = []  # (C, H, W, 3)
        self.paths: list[tuple[list[np.ndarray], int]] = []  # pixels (n, 2) by camera; executed
        self.recursions: list[int | None] = []
        self.chunk, self.age = None, 0
        self.error: Exception | None = None

    def watch(self, observation: Observation, _: int) -> None:
        if self.error is None:
            try:
                self._watch(observation)
            except Exception as error:
                self.error = error

    def _watch(self, observation: Observation) -> None:
        self.views.append(np.stack([upright(observation[camera]) for camera in schema.CAMERAS]))
        self.recursions.append(getattr(self.policy, "last_recursions", None))
        chunk = getattr(self.policy, "last_chunk", None)
        if chunk is None:
            self.paths.append(([], 0))
            return
        self.age = 0 if chunk is not self.chunk else self.age + 1
        self.chunk = chunk
        path = intended_path(observation["ee_pos"], chunk[self.age:])
        pixels = [self.env.project(path, camera) for camera in schema.CAMERAS]
        self.paths.append((pixels, self.policy.execution_horizon - self.age))

    def frames(self, horizon: int, outcome: str):
        last = len(self.views) - 1
        for step in [*range(last + 1), *[last] * FPS]:  # the last frame stays for a second
            images = [enlarge(view, _SCALE) for view in self.views[step]]
            pixels, executed = self.paths[step]
            if step < last:  # after it nothing is predicted
                images = [draw_path(image, _SCALE * points, executed)
                          for image, points in zip(images, pixels, strict=False)] or images
            used = self.recursions[step]
            yield caption_frame(np.concatenate(images, axis=1), [
                self.env.task.language,
                " | ".join(schema.CAMERA_TITLES.values())
                + (" | dots: predicted path" if pixels else ""),
                f"step {step:3} of {horizon}"
                + ("" if used is None else f"  recursions {used:2}")
                + (f"  {outcome}" if step == last else ""),
            ])
