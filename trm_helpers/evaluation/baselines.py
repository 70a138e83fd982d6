"""Policies that need no training: what a success rate lies between."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import schema
from ..config import EvalConfig
from ..demos import experts, skills
from ..demos.collect import demonstrations_of
from ..demos.demo_files import demo_names, open_demo_file
from ..demos.quality import replay_demonstration
from ..files import digest
from ..sim import geometry
from ..sim.env import LiberoEnv
from ..training.runs import find_run, load_config
from .evaluate import Episode, Evaluation, evaluation_folder, official_episodes, results_name
from .rollout import Policy


class ExpertPolicy:
    """The scripted demonstrator: sees where everything is, which no policy does."""

    def __init__(self, env: LiberoEnv):
        self.env = env

    def reset(self) -> None:
        self.expert = None

    def act(self, observation) -> np.ndarray:
        # made here, not in reset(): it looks at the scene as that was reset
        self.expert = self.expert or experts.make_expert(self.env)
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


class Baseline(NamedTuple):
    name: str

    def make(self, env: LiberoEnv) -> Policy:
        return BASELINES[self.name](env)


class Replay(NamedTuple):
    """Demonstrations; an episode's seed is the number of one in its task's file."""

    files: tuple[tuple[int, str], ...]

    def play(self, env: LiberoEnv, episode: Episode) -> dict:
        began = time.perf_counter()
        with open_demo_file(dict(self.files)[episode.task_id]) as file:
            demo = file[schema.DATA_GROUP][demo_names(file)[episode.seed]]
            replayed, length = replay_demonstration(env, demo), len(demo["actions"])
        return {**episode._asdict(), "success": replayed["success"], "steps": replayed["steps"],
                "horizon": length, "divergence": round(max(replayed["divergence"]), 5),
                "seconds": round(time.perf_counter() - began, 3)}


def evaluate_baseline(name: str, folder: str | Path, config: EvalConfig, suite: str,
                      task_ids: Iterable[int] = ()) -> dict:
    """:func:`evaluate.evaluate_run` of a policy of :data:`BASELINES`, into any ``folder``.

    Args:
        task_ids: none takes all tasks of the suite.

    Raises:
        ValueError: also for a perturbation: baselines read no observation.
    """
    return plan_baseline(name, folder, config, suite, task_ids).play()


def plan_baseline(name: str, folder: str | Path, config: EvalConfig, suite: str,
                  task_ids: Iterable[int] = (), results: str = "results.json") -> Evaluation:
    """:func:`evaluate_baseline`, checked and not played yet."""
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; expected one of {', '.join(BASELINES)}")
    if config.perturbation != "none":
        raise ValueError(f"perturbation={config.perturbation!r} is for trained policies; the "
                         f"baseline {name!r} reads no observation")
    count = schema.SUITES[schema.check_suite(suite)]
    task_ids = tuple(dict.fromkeys(task_ids)) or tuple(range(count))
    return Evaluation(Baseline(name), {"weights": name, "sha256": _source_digest(name)},
                      Path(folder), config, suite, official_episodes(suite, task_ids, config),
                      results).checked()


def _source_digest(name: str) -> str:
    """Of the code that decides: the expert's changes, and its old episodes are another policy's."""
    modules = (experts, skills, geometry) if name == "expert" else ()
    source = b"".join(Path(module.__file__).read_bytes() for module in modules)
    return digest(source) if source else ""


def plan_replay(files: Mapping[int, str | Path], folder: str | Path, config: EvalConfig,
                suite: str, task_ids: Iterable[int] = (),
                results: str = "results.json") -> Evaluation:
    """The demonstrations as a policy, checked and not played yet: what a perfect copy would reach.

    The first ``config.episodes`` of each task's file are replayed from where they began.

    Args:
        files: of each task id.
        task_ids: of them those to replay; none takes all.

    Raises:
        ValueError: ``folder`` holds replays of other demonstrations.
    """
    stored = {task_id: str(Path(path).resolve()) for task_id, path in files.items()}
    numbers, content = {}, b""
    for task_id, path in stored.items():
        with open_demo_file(path) as file:
            names = demo_names(file)
            numbers[task_id] = range(min(config.episodes, len(names)))
            # its first demonstration stands for a file, which may move, or grow at its end
            content += file[schema.DATA_GROUP][names[0]]["actions"][()].tobytes()
    planned = [Episode(suite, task_id, None, number)
               for task_id in tuple(dict.fromkeys(task_ids)) or stored
               for number in numbers[task_id]]
    return Evaluation(Replay(tuple(stored.items())),
                      {"weights": "replay", "sha256": digest(content)}, Path(folder), config,
                      suite, planned, results).checked()


def plan_bounds(run: str | Path, config: EvalConfig, suite: str = "",
                task_ids: Iterable[int] = (), demo_dir: str = "") -> dict[str, Evaluation]:
    """:func:`evaluate_bounds`, checked and not played yet; finds or collects demonstrations."""
    if not config.bound_episodes:
        return {}
    run = find_run(run, to_write=True)
    trained = load_config(run)
    suite, folder = suite or trained.data.suite, evaluation_folder(run, suite) / "bounds"
    task_ids = tuple(dict.fromkeys(task_ids)) or trained.data.task_ids
    results = results_name(task_ids, trained.data.task_ids)
    config = dataclasses.replace(config, num_episodes=config.bound_episodes, num_videos=0,
                                 perturbation="none")
    bounds = {}
    if suite == trained.data.suite and set(task_ids) <= set(trained.data.task_ids):
        try:
            files = demonstrations_of(run, trained.replace(demo_dir=demo_dir))
        except FileNotFoundError as error:
            print(f"no replay: {error}")
        else:
            bounds["replay"] = plan_replay(files, folder / "replay", config, suite, task_ids,
                                           results)
    for name in BASELINES:
        bounds[name] = plan_baseline(name, folder / name, config, suite, task_ids, results)
    return bounds


def evaluate_bounds(run: str | Path, config: EvalConfig, suite: str = "",
                    task_ids: Iterable[int] = (), demo_dir: str = "") -> dict[str, dict]:
    """What a run's success lies between: results of ``replay``, ``expert``, ``random``, ``no-op``.

    ``config.bound_episodes`` a task in the run's protocol, into ``bounds/<name>/`` of the suite's
    :func:`evaluate.evaluation_folder`; nothing when that is 0. Replayed are the run's
    demonstrations, so not for a suite it was not trained on, nor where a run that was given a
    ``demo_dir`` is given none here.
    """
    planned = plan_bounds(run, config, suite, task_ids, demo_dir)
    return {name: bound.play() for name, bound in planned.items()}
