"""Rollouts in the simulator on the official init states: success, episode lengths, videos."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from tqdm.auto import tqdm

from . import schema
from .baselines import BASELINES
from .checkpoint import find_run, load_config, load_policy
from .config import Config, EvalConfig
from .fanout import run_jobs
from .files import append_jsonl, read_jsonl, write_json
from .plots import caption_frame, upright, write_video
from .preflight import software_versions
from .protocols import PROTOCOLS, EvalProtocol
from .sim import LiberoEnv, Observation
from .stats import summarize_episodes

SELECTION_SEED = 1_000_000  # of the placements that choose checkpoints and settings
_HOPELESS = 3  # errors, with no episode played, after which an evaluation gives up
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


def run_episode(policy: Policy, env: LiberoEnv, init_state: int | None, horizon: int = 0,
                watch: Callable[[Observation, int], None] | None = None, seed: int = 0) -> dict:
    """One episode; ends with success or at the horizon.

    Args:
        init_state: an official one; ``None`` draws a placement.
        horizon: steps allowed; 0 takes the suite's.
        watch: called with every observation and the number of steps made.
        seed: of that draw.

    Returns:
        the episode's row: suite, task_id, init_state, seed, success, steps, return, horizon,
        seconds, action_ms and max_action_ms (time per call of the policy, mean and largest, with
        the frames it asks for), and the mean number of recursions per decision where the policy
        tells it.
    """
    horizon = horizon or env.horizon
    began = time.perf_counter()
    policy.reset()
    observation = (env.reset(seed=seed) if init_state is None else env.reset(init_state=init_state))
    success, steps, recursions, took = False, 0, [], []
    while not success and steps < horizon:
        asked = time.perf_counter()
        action = policy.act(observation)
        took.append(1000 * (time.perf_counter() - asked))
        recursions.append(getattr(policy, "last_recursions", None))
        observation, success = env.step(action)
        steps += 1
        if watch:
            watch(observation, steps)
    used = [count for count in recursions if count is not None]
    return {"suite": env.task.suite, "task_id": env.task.task_id, "init_state": init_state,
            "seed": seed, "success": success, "steps": steps, "return": float(success),
            "horizon": horizon, "mean_recursions": float(np.mean(used)) if used else None,
            "action_ms": round(float(np.mean(took)), 3), "max_action_ms": round(max(took), 3),
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

    Which episodes there will be is settled before the first. Every episode's row is written the
    moment it ends, and a call that was interrupted goes on with those that are missing. One that
    raised, hung or lost its process twice is recorded as an error, apart from the failures; the
    next call tries it again.

    Args:
        run: folder, or name of a folder in ``artifacts/``.
        config: protocol, episodes per task, horizon, videos, processes; ``None`` takes the run's.
        weights: ``best`` or ``last``.
        suite, task_ids: other tasks than those the policy was trained on.

    Returns:
        what ``results.json`` holds: :func:`stats.summarize_episodes`, errors, protocol, versions.

    Raises:
        ValueError: ``episodes.jsonl`` holds episodes of other weights or another protocol; a policy
            that is told its task by number was not trained on one of ``task_ids``.
        RuntimeError: no episode could be run; with the first error.
    """
    run = find_run(str(run))
    trained = load_config(run)
    suite = suite or trained.data.suite
    task_ids = tuple(dict.fromkeys(task_ids)) or trained.data.task_ids
    _refuse_unknown_numbers(trained, suite, task_ids)
    source = TrainedPolicy(run, weights, _digest(run / f"{weights}.safetensors"))
    identity = {"weights": weights, "sha256": source.sha256}
    return _evaluate(source, identity, run, config or trained.eval, suite, task_ids)


def evaluate_baseline(name: str, folder: str | Path, config: EvalConfig, suite: str,
                      task_ids: Iterable[int] = ()) -> dict:
    """:func:`evaluate_run` of a policy of :data:`baselines.BASELINES`, into any ``folder``.

    Args:
        task_ids: none takes all tasks of the suite.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; expected one of {', '.join(BASELINES)}")
    task_ids = tuple(dict.fromkeys(task_ids)) or tuple(range(schema.SUITES[suite]))
    return _evaluate(Baseline(name), {"weights": name, "sha256": ""}, Path(folder), config, suite,
                     task_ids)


def selection_success(run: str | Path, config: Config, episodes: int, weights: str = "last",
                      ledger: str | Path | None = None) -> dict:
    """Success of ``episodes`` a task from drawn placements, never the official init states.

    For choosing among checkpoints and settings: reports, on the init states, see none of it.

    Args:
        ledger: a JSON-lines file that gets each episode's row, with the digest of the weights, the
            moment it ends. What is in it of these weights is not played again; other weights' rows
            stay. Without one nothing is written.

    Returns:
        :func:`stats.summarize_episodes` of the episodes on ``config``'s tasks.
    """
    run = Path(run)
    settings = dataclasses.replace(config.eval, num_videos=0)
    source = TrainedPolicy(run, weights, _digest(run / f"{weights}.safetensors"))
    planned = [Episode(config.data.suite, task_id, None, SELECTION_SEED + number)
               for task_id in config.data.task_ids for number in range(episodes)]
    before = {} if ledger is None else {
        Episode(*(row[key] for key in Episode._fields)): row
        for row in selection_rows(run, ledger, weights)}
    rows = [before[episode] for episode in planned if episode in before]
    missing = [episode for episode in planned if episode not in before]
    errors = []
    bar = tqdm(_play_all(source, settings, run, missing), "selection", len(planned),
               initial=len(rows), unit="episode", leave=False)
    for episode, row, error in bar:
        if error:
            errors.append(f"{tuple(episode)}: {error}")
            continue
        rows.append(row)
        if ledger is not None:
            append_jsonl(ledger, {**row, "sha256": source.sha256})
    if not rows:
        raise RuntimeError(f"no episode could be run; the first error: {errors[0]}")
    return summarize_episodes(rows)


def selection_rows(run: str | Path, ledger: str | Path, weights: str = "last") -> list[dict]:
    """What a ledger of :func:`selection_success` holds of a run's present weights."""
    present = _digest(Path(run) / f"{weights}.safetensors")
    return [row for row in read_jsonl(ledger) if row["sha256"] == present]


# --- what is played -----------------------------------------------------------------------------


class Episode(NamedTuple):
    """Where an episode begins: an official init state, or a placement drawn with ``seed``."""

    suite: str
    task_id: int
    init_state: int | None
    seed: int = 0


class TrainedPolicy(NamedTuple):
    """A run's weights; the digest tells whether they are still those that a worker has."""

    run: Path
    weights: str
    sha256: str

    def make(self, env: LiberoEnv) -> Policy:
        return _loaded(self)


class Baseline(NamedTuple):
    name: str

    def make(self, env: LiberoEnv) -> Policy:
        return BASELINES[self.name](env)


def _evaluate(source: TrainedPolicy | Baseline, identity: dict, folder: Path, config: EvalConfig,
              suite: str, task_ids: tuple[int, ...]) -> dict:
    protocol = PROTOCOLS[config.protocol]
    identity = {**identity, "protocol": protocol.name,
                "horizon": config.horizon or protocol.horizon(suite)}
    ledger = folder / "episodes.jsonl"
    rows = _finished(ledger, suite, identity)
    planned = [Episode(suite, schema.check_task_id(suite, task_id), init_state)
               for task_id in task_ids for init_state in config.init_states]
    missing = [episode for episode in planned if episode not in rows]
    errors: dict[Episode, str] = {}
    with tqdm(total=len(planned), initial=len(planned) - len(missing), desc="episodes",
              unit="episode") as bar:
        for episode, row, error in _play_all(source, config, folder, missing):
            append_jsonl(ledger, {**(row or {**episode._asdict(), "error": error}), **identity})
            if error:
                errors[episode] = error
                if len(errors) >= _HOPELESS and not rows:
                    break
            else:
                rows[episode] = row
            bar.update()
            bar.set_postfix(successes=sum(row["success"] for row in rows.values()))
    played = [rows[episode] for episode in planned if episode in rows]
    if not played:
        first = next(iter(errors.values()))
        raise RuntimeError(f"no episode could be run; the first error: {first}")
    results = {
        **summarize_episodes(played),
        "errors": [{**episode._asdict(), "error": error} for episode, error in errors.items()],
        "protocol": {"suite": suite, "task_ids": list(task_ids), **dataclasses.asdict(config),
                     **identity, "num_episodes": config.episodes, "source": protocol.source,
                     "settle_steps": protocol.settle_steps,
                     "settle_action": list(protocol.settle_action), "init_states": "official",
                     "observations": "what env.step returned"},
        "software": software_versions(),
    }
    write_json(folder / "results.json", results)
    return results


def _play_all(source, config: EvalConfig, folder: Path, episodes: list[Episode]):
    """``(episode, row, error)`` of each, as they end."""
    job = functools.partial(_play, source, config, folder)
    workers = min(config.eval_workers, max(len(episodes), 1))
    try:
        yield from run_jobs(job, episodes, folder / ".attempts", workers=workers,
                            cluster=config.cluster, limit=config.episode_limit)
    finally:  # in this process nobody plays on; a worker's simulator ends with it
        _loaded.cache_clear()
        _worker_env.cache_clear()


def _play(source, config: EvalConfig, folder: Path, episode: Episode) -> dict:
    protocol = PROTOCOLS[config.protocol]
    env = _worker_env(episode.suite, episode.task_id, protocol)
    policy, horizon = source.make(env), config.horizon or protocol.horizon(episode.suite)
    if (episode.init_state is not None
            and episode.init_state - config.first_init_state < config.num_videos):
        name = f"{episode.suite}-task{episode.task_id}-init{episode.init_state:02d}-{{outcome}}.mp4"
        return record_episode(policy, env, episode.init_state, folder / "videos" / name, horizon)[0]
    return run_episode(policy, env, episode.init_state, horizon, seed=episode.seed)


@functools.lru_cache(maxsize=1)
def _loaded(source: TrainedPolicy) -> Policy:
    return load_policy(source.run, source.weights)


@functools.lru_cache(maxsize=1)  # one environment per worker, kept over a task's episodes
def _worker_env(suite: str, task_id: int, protocol: EvalProtocol) -> LiberoEnv:
    return LiberoEnv(suite, task_id, settle_steps=protocol.settle_steps,
                     settle_action=protocol.settle_action)


def _refuse_unknown_numbers(trained: Config, suite: str, task_ids: tuple[int, ...]) -> None:
    known = trained.data
    if trained.model.conditioning != "task_id" or (
            suite == known.suite and set(task_ids) <= set(known.task_ids)):
        return
    raise ValueError(f"the policy is told its task by number and knows tasks "
                     f"{', '.join(map(str, known.task_ids))} of {known.suite}; it cannot be asked "
                     f"for tasks {', '.join(map(str, task_ids))} of {suite}. "
                     "Train with conditioning='language' for tasks it has not seen")


# --- ledger -------------------------------------------------------------------------------------


def _finished(ledger: Path, suite: str, identity: dict) -> dict[Episode, dict]:
    """The episodes that were played; ``ValueError`` for one of other weights or another protocol.

    Another suite has another horizon.
    """
    played = {}
    for row in read_jsonl(ledger):
        different = [f"{key}: {row.get(key)!r} there, {value!r} now"
                     for key, value in identity.items()
                     if row.get(key) != value and (key != "horizon" or row["suite"] == suite)]
        if different:
            raise ValueError(f"{ledger} holds episodes of another policy or protocol "
                             f"({'; '.join(different)}); move it away to evaluate afresh")
        if "error" not in row:
            played[Episode(*(row[key] for key in Episode._fields))] = row
    return played


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
