"""One episode of a policy in the simulator, with or without a film."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import schema
from ..sim import layouts
from ..sim.env import LiberoEnv, Observation, SimulatorError, check_action
from ..sim.render import upright
from ..visuals.films import FPS, MAIN, draw_path, film_frame, intended_path, write_video

PHASES = ("reach", "grasp", "carry", "place")
_GRASPING = 8  # steps that a grasp takes, from the command to close the gripper
_HELD = 24  # steps closed, after which an object was carried; a failed or lost grasp opens sooner
_PLACING = 12  # steps of a release and of the retreat after it
_LIFTED = 0.02  # metres above an object's height at the start
_EVERY = schema.CONTROL_HZ // FPS  # steps between frames of a film
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
                watch: Callable[[Observation, int, bool], None] | None = None, seed: int = 0,
                placement: str = "benchmark") -> dict:
    """One episode; ends with success, at the horizon, or when the policy fails.

    A policy that raises or returns anything but seven finite numbers has failed the episode. Faults
    of the machine (the simulator, its memory, its disks) are raised.

    Args:
        init_state: an official one; ``None`` samples a placement.
        horizon: steps allowed; 0 takes the suite's.
        watch: called with each observation, the number of executed steps and whether the episode
            has ended, after the policy's decision and before the arm moves.
        seed, placement: of a sampled placement, see :func:`layouts.reset`.

    Returns:
        the episode's row: suite, task_id, init_state, seed, placement, success, steps, horizon,
        seconds, action_ms and max_action_ms (time per call of the policy, mean and largest, without
        rendering), ``lifted`` (the objects that rose by 2 cm, in that order),
        ``objects_to_move``; the mean of the policy's ``last_recursions`` over the steps, as
        ``mean_recursions`` and by :func:`phases` as ``recursions_by_phase``; ``phases``, a list of
        name and number of steps in their order; and ``policy_error`` if the policy failed.
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
            watch(observation, steps, False)
        observation, success = env.step(action)
        closed.append(action[schema.GRIPPER_INDEX] > 0)
        steps += 1
        lifted += [name for name, height in env.heights().items()
                   if height > resting[name] + _LIFTED and name not in lifted]
    if watch:
        watch(observation, steps, True)
    used = np.array([count for count in recursions if isinstance(count, Real)])
    named = phases(closed)
    phase = np.array(named)[:len(used)]
    return {"suite": env.task.suite, "task_id": env.task.task_id, "init_state": init_state,
            "seed": seed, "placement": placement, "success": success, "steps": steps,
            "horizon": horizon, "lifted": lifted, "objects_to_move": env.objects_to_move(),
            "mean_recursions": float(used.mean()) if len(used) else None,
            "recursions_by_phase": {name: float(used[phase == name].mean()) for name in PHASES
                                    if (phase == name).any()},
            "phases": [[name, len([*group])] for name, group in itertools.groupby(named)],
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
    then stays closed, ``place`` for 12 steps after it has opened again, then ``reach``. If it was
    closed for less than 24 steps, the grasp failed or was lost: ``reach`` at once.
    """
    named, steps, placing = [], 0, 0  # steps for which it has been closed; that ``place`` goes on
    for now in closed:
        if now:
            steps, placing = steps + 1, _PLACING if steps + 1 >= _HELD else 0
            named.append("grasp" if steps <= _GRASPING else "carry")
        else:
            named.append("place" if placing else "reach")
            steps, placing = 0, max(placing - 1, 0)
    return named


def record_episode(policy: Policy, env: LiberoEnv, init_state: int, path: str | Path,
                   horizon: int = 0) -> dict:
    """:func:`run_episode` with a film in real time, every second step, which ends with the outcome.

    The main view is from ``schema.FILM_CAMERA``, which no policy sees; ``schema.CAMERAS`` are small
    beside it, whether or not the policy receives them, with task, phase, time and recursions. The
    rest of a policy's chunk is drawn as dots where the arm would go, one per step, orange until the
    next decision and blue after it.

    Args:
        path: of the MP4; ``{outcome}`` in it becomes ``success`` or ``failure``.

    Returns:
        the episode's row, with the film's path as ``video`` or the reason why there is none as
        ``video_error``: filming never costs an episode.
    """
    film = _Film(policy, env)
    row = run_episode(policy, env, init_state, horizon, film.watch)
    outcome = "success" if row["success"] else "failure"
    path = Path(str(path).replace("{outcome}", outcome))
    try:
        if film.error:
            raise film.error
        write_video(path, film.frames(row))
        row["video"] = str(path)
    except Exception as error:  # of ffmpeg, the disk, fonts, a renderer, a policy's last_chunk
        row["video_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


class _Frame(NamedTuple):
    step: int
    main: np.ndarray  # (MAIN, MAIN, 3)
    views: list[np.ndarray]  # of schema.CAMERAS (H, W, 3)
    paths: list[np.ndarray]  # pixels (n, 2) of the path, in the main view and in each of the views
    executed: int  # of the path, before the next decision
    recursions: int | None


class _Film:
    """An episode's frames, drawn one at a time at the end."""

    def __init__(self, policy: Policy, env: LiberoEnv):
        self.policy, self.env = policy, env
        self.filmed: list[_Frame] = []
        self.chunk, self.age = None, 0
        self.error: Exception | None = None

    def watch(self, observation: Observation, step: int, ended: bool) -> None:
        chunk = getattr(self.policy, "last_chunk", None)
        self.age = 0 if chunk is not self.chunk else self.age + 1
        self.chunk = chunk
        if self.error is None and (ended or step % _EVERY == 0):
            try:
                self.filmed.append(self._frame(observation, step))
            except Exception as error:
                self.error = error

    def _frame(self, observation: Observation, step: int) -> _Frame:
        paths, executed = [], 0
        if self.chunk is not None:
            path = intended_path(observation["ee_pos"], self.chunk[self.age:])
            paths = [self.env.project(path, camera)
                     for camera in (schema.FILM_CAMERA, *schema.CAMERAS)]
            executed = self.policy.execution_horizon - self.age
        return _Frame(step, self.env.film_frame(MAIN),
                      [upright(observation[camera]) for camera in schema.CAMERAS], paths, executed,
                      getattr(self.policy, "last_recursions", None))

    def frames(self, row: Mapping) -> Iterator[np.ndarray]:
        phase = [name for name, steps in row["phases"] for _ in range(steps)] or [""]
        seconds = row["steps"] / schema.CONTROL_HZ
        end = (f"success after {seconds:.1f} s" if row["success"]
               else "failure: error of the policy" if "policy_error" in row
               else f"failure: time is up ({seconds:.1f} s)")
        last = self.filmed[-1]
        for frame in [*self.filmed, *[last] * FPS]:  # the last frame stays for a second
            now, limit = frame.step / schema.CONTROL_HZ, row["horizon"] / schema.CONTROL_HZ
            images = [frame.main, *frame.views]
            if frame is not last:  # after it nothing is predicted
                images = [draw_path(image, points * (len(image) / self.env.image_size),
                                    frame.executed)
                          for image, points in zip(images, frame.paths, strict=False)] or images
            yield film_frame(images[0], dict(zip(schema.CAMERA_TITLES.values(), images[1:],
                                                 strict=True)), [
                self.env.task.language,
                f"{phase[min(frame.step, len(phase) - 1)]:6} {now:4.1f} of {limit:.1f} s"
                + ("" if frame.recursions is None else f", {frame.recursions} recursions"),
                *(["dots: predicted path"] if frame.paths else ()),
            ], min(1, now / limit), end if frame is last else "", row["success"])
