"""Rollouts in the simulator on the official init states: success, episode lengths, videos."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm.auto import tqdm

from . import schema
from .checkpoint import find_run, load_config, load_policy
from .config import Config, EvalConfig
from .files import append_jsonl, read_jsonl, write_json
from .plots import caption_frame, upright, write_video
from .preflight import software_versions
from .sim import LiberoEnv, Observation, worker_pool
from .stats import summarize_episodes

VIDEO_FPS = 30  # one frame per control step (20 Hz): half as fast again as in the simulator


class Policy(Protocol):
    """All that evaluation knows of a policy."""

    def reset(self) -> None:
        """Start an episode."""

    def act(self, observation: Mapping) -> np.ndarray:
        """The action (7,) for an observation (see :class:`sim.Observation`)."""


class PolicyEvaluator:
    """Success and length of a policy's episodes.

    Args:
        policy: anything with ``reset()`` and ``act(observation)``.
        horizon: steps allowed per episode; 0 takes the suite's.
        ledger: a JSON-lines file that gets each episode's row the moment it ends.
    """

    def __init__(self, policy: Policy, horizon: int = 0, ledger: str | Path | None = None):
        if horizon < 0:
            raise ValueError(f"horizon={horizon} is not valid; expected >= 0")
        self.policy = policy
        self.horizon = horizon
        self.ledger = ledger

    def evaluate_on_task(self, env: LiberoEnv, init_states: Sequence[int],
                         num_episodes: int) -> dict:
        """Run the first ``num_episodes`` of ``init_states`` (indices of official init states).

        Returns:
            :func:`stats.summarize_episodes` of the rows, and the rows under ``"rows"``.

        Raises:
            ValueError: fewer init states than episodes, or an index that does not exist.
        """
        if not 1 <= num_episodes <= len(init_states):
            raise ValueError(f"num_episodes={num_episodes} is not valid; expected 1 to "
                             f"{len(init_states)}, the init states given")
        rows = []
        chosen = list(init_states)[:num_episodes]
        for init_state in tqdm(chosen, desc=env.task.name, unit="episode"):
            rows.append(run_episode(self.policy, env, init_state, self.horizon))
            if self.ledger:
                append_jsonl(self.ledger, rows[-1])
        return {**summarize_episodes(rows), "rows": rows}


def run_episode(policy: Policy, env: LiberoEnv, init_state: int, horizon: int = 0,
                watch: Callable[[Observation, int], None] | None = None) -> dict:
    """One episode from an official init state; ends with success or at the horizon.

    Args:
        horizon: steps allowed; 0 takes the suite's.
        watch: called with every observation and the number of steps made.

    Returns:
        the episode's row: suite, task_id, init_state, success, steps, seconds, and the mean number
        of recursions per decision where the policy tells it.
    """
    horizon = horizon or env.horizon
    began = time.perf_counter()
    policy.reset()
    observation = env.reset(init_state=init_state)
    success, steps, recursions = False, 0, []
    while not success and steps < horizon:
        action = policy.act(observation)
        recursions.append(getattr(policy, "last_recursions", None))
        observation, success = env.step(action)
        steps += 1
        if watch:
            watch(observation, steps)
    used = [count for count in recursions if count is not None]
    return {"suite": env.task.suite, "task_id": env.task.task_id, "init_state": init_state,
            "success": success, "steps": steps, "horizon": horizon,
            "mean_recursions": float(np.mean(used)) if used else None,
            "seconds": round(time.perf_counter() - began, 3)}


def record_episode(policy: Policy, env: LiberoEnv, init_state: int, path: str | Path,
                   horizon: int = 0) -> tuple[dict, np.ndarray]:
    """:func:`run_episode` with a film: both cameras, upright, with task, step and outcome.

    Args:
        path: of the MP4; ``{outcome}`` in it becomes ``success`` or ``failure``.

    Returns:
        the episode's row, with the film's ``video`` path; the agent view (n, H, W, 3), upright.
    """
    frames: list[np.ndarray] = []

    def watch(observation: Observation, _: int) -> None:
        frames.append(np.stack([upright(observation[camera]) for camera in schema.CAMERAS]))

    row = run_episode(policy, env, init_state, horizon, watch)
    outcome = "success" if row["success"] else "failure"
    titles = " | ".join(schema.CAMERA_TITLES.values())
    steps = [*range(row["steps"]), *[row["steps"] - 1] * VIDEO_FPS]  # the end stands for a second
    captioned = (  # one at a time: enlarged frames of a long episode are half a gigabyte
        caption_frame(np.concatenate(list(frames[step]), axis=1), [
            env.task.language,
            titles,
            f"step {step + 1:3} of {row['horizon']}  "
            f"{outcome if step + 1 == row['steps'] else ''}",
        ])
        for step in steps
    )
    path = Path(str(path).replace("{outcome}", outcome))
    write_video(path, captioned, fps=VIDEO_FPS)
    return {**row, "video": path.name}, np.stack([pair[0] for pair in frames])


def evaluate_run(run: str | Path, config: EvalConfig | None = None, weights: str = "best",
                 suite: str = "", task_ids: Iterable[int] = ()) -> dict:
    """Evaluate a run's policy and write ``episodes.jsonl``, ``results.json`` and ``videos/``.

    Every episode's row is written the moment it ends, and a call that was interrupted goes on with
    those that are missing.

    Args:
        run: folder, or name of a folder in ``artifacts/``.
        config: episodes per task, horizon, videos, processes; ``None`` takes the run's own.
        weights: ``best`` or ``last``.
        suite, task_ids: other tasks than those the policy was trained on.

    Returns:
        what ``results.json`` holds: :func:`stats.summarize_episodes`, protocol, versions.

    Raises:
        ValueError: ``episodes.jsonl`` holds episodes of other weights or another protocol; a policy
            that is told its task by number was not trained on one of ``task_ids``.
    """
    run = find_run(str(run))
    trained = load_config(run)
    config = config or trained.eval
    suite = suite or trained.data.suite
    task_ids = tuple(dict.fromkeys(task_ids)) or trained.data.task_ids
    _refuse_unknown_numbers(trained, suite, task_ids)
    identity = {"weights": weights, "sha256": _digest(run / f"{weights}.safetensors"),
                "horizon": config.horizon or schema.HORIZONS[schema.check_suite(suite)]}
    ledger = run / "episodes.jsonl"
    rows = _finished(ledger, suite, identity)
    done = {_episode(row) for row in rows}
    first = config.first_init_state
    planned = [(suite, schema.check_task_id(suite, task_id), init_state)
               for task_id in task_ids for init_state in range(first, first + config.num_episodes)]
    missing = [episode for episode in planned if episode not in done]
    job = functools.partial(_run_in_worker, run, weights, config)
    with tqdm(total=len(planned), initial=len(planned) - len(missing), desc="episodes",
              unit="episode") as bar:
        for row in _run_all(job, missing, config.eval_workers):
            append_jsonl(ledger, {**row, **identity})
            rows.append(row)
            bar.update()
            bar.set_postfix(successes=sum(row["success"] for row in rows))
    results = {
        **summarize_episodes([row for row in rows if _episode(row) in planned]),
        "protocol": {"suite": suite, "task_ids": list(task_ids),
                     **dataclasses.asdict(config), **identity,
                     "settle_steps": schema.SETTLE_STEPS, "init_states": "official",
                     "observations": "what env.step returned"},
        "software": software_versions(),
    }
    write_json(run / "results.json", results)
    return results


def _refuse_unknown_numbers(trained: Config, suite: str, task_ids: tuple[int, ...]) -> None:
    known = trained.data
    if trained.model.conditioning != "task_id" or (
            suite == known.suite and set(task_ids) <= set(known.task_ids)):
        return
    raise ValueError(f"the policy is told its task by number and knows tasks "
                     f"{', '.join(map(str, known.task_ids))} of {known.suite}; it cannot be asked "
                     f"for tasks {', '.join(map(str, task_ids))} of {suite}. "
                     "Train with conditioning='language' for tasks it has not seen")


def selection_success(run: str | Path, config: Config, episodes: int,
                      weights: str = "last") -> dict:
    """Success on the last ``episodes`` official init states, which reports leave alone.

    For choosing among checkpoints and settings; nothing is written.

    Returns:
        :func:`stats.summarize_episodes` of the episodes on ``config``'s tasks.
    """
    settings = dataclasses.replace(config.eval, num_episodes=episodes, num_videos=0,
                                   first_init_state=schema.NUM_INIT_STATES - episodes)
    planned = [(config.data.suite, task_id, init_state) for task_id in config.data.task_ids
               for init_state in range(settings.first_init_state, schema.NUM_INIT_STATES)]
    job = functools.partial(_run_in_worker, Path(run), weights, settings)
    bar = tqdm(_run_all(job, planned, settings.eval_workers), "selection", len(planned),
               unit="episode", leave=False)
    return summarize_episodes(list(bar))


# --- processes ----------------------------------------------------------------------------------


def _run_all(job, episodes: list, workers: int):
    """Rows of the episodes as they end; in this process for one worker."""
    if workers == 1 or len(episodes) <= 1:
        try:
            yield from map(job, episodes)
        finally:  # weights may be others at the next call
            _worker_policy.cache_clear()
            _worker_env.cache_clear()
        return
    with worker_pool(min(workers, len(episodes))) as pool:
        for future in as_completed([pool.submit(job, episode) for episode in episodes]):
            yield future.result()


def _run_in_worker(run: Path, weights: str, config: EvalConfig, episode: tuple) -> dict:
    suite, task_id, init_state = episode
    policy, env = _worker_policy(run, weights), _worker_env(suite, task_id)
    if init_state - config.first_init_state < config.num_videos:
        name = f"{suite}-task{task_id}-init{init_state:02d}-{{outcome}}.mp4"
        return record_episode(policy, env, init_state, run / "videos" / name, config.horizon)[0]
    return run_episode(policy, env, init_state, config.horizon)


@functools.lru_cache(maxsize=1)
def _worker_policy(run: Path, weights: str) -> Policy:
    return load_policy(run, weights)


@functools.lru_cache(maxsize=1)  # one environment per worker, kept over a task's episodes
def _worker_env(suite: str, task_id: int) -> LiberoEnv:
    return LiberoEnv(suite, task_id)


# --- ledger -------------------------------------------------------------------------------------


def _episode(row: dict) -> tuple[str, int, int]:
    return row["suite"], row["task_id"], row["init_state"]


def _finished(ledger: Path, suite: str, identity: dict) -> list[dict]:
    """The ledger's rows; ``ValueError`` for one of other weights or, in ``suite``, horizon."""
    rows = read_jsonl(ledger)
    for row in rows:
        different = [f"{key}: {row.get(key)!r} there, {value!r} now"
                     for key, value in identity.items()
                     if row.get(key) != value and (key != "horizon" or row["suite"] == suite)]
        if different:
            raise ValueError(f"{ledger} holds episodes of another policy or protocol "
                             f"({'; '.join(different)}); move it away to evaluate afresh")
    return rows


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
