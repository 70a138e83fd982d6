"""Policies that need no training, and replayed demonstrations: the bounds of a success rate."""

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
from ..demos import experts, joints, pick_place, put_inside, skills
from ..demos.collect import demonstrations_of
from ..demos.demo_files import demo_names, open_demo_file
from ..demos.quality import replay_demonstration
from ..files import digest
from ..sim import geometry
from ..sim.env import LiberoEnv
from ..training.runs import find_run, load_config
from .plan import Episode, evaluation_folder, official_episodes, results_name, trained_tasks
from .play import Evaluation, one_environment
from .rollout import Policy


class _Untrained:
    """A policy that reads the simulator in place of observations."""

    def __init__(self, env: LiberoEnv):
        self.env = env

    @classmethod
    def make(cls, env: LiberoEnv) -> Policy:
        return cls(env)

    def reset(self) -> None:
        self.source = None  # made by the first decision, because it depends on the scene


class ExpertPolicy(_Untrained):
    """The scripted demonstrator."""

    def act(self, observation) -> np.ndarray:
        self.source = self.source or experts.Expert(self.env)
        return self.source.act()


class RandomPolicy(_Untrained):
    """Uniform commands, with the gripper open or closed; the same ones from the same state."""

    def act(self, observation) -> np.ndarray:
        self.source = self.source or np.random.default_rng(zlib.crc32(self.env.state().tobytes()))
        action = self.source.uniform(-1, 1, schema.ACTION_DIM)
        action[schema.GRIPPER_INDEX] = np.sign(action[schema.GRIPPER_INDEX])
        return action


class NoOpPolicy(_Untrained):
    """Does not move, with the gripper open: tasks that solve themselves."""

    def act(self, observation) -> np.ndarray:
        return np.array(schema.NO_OP)


BASELINES = {"expert": ExpertPolicy, "random": RandomPolicy, "no-op": NoOpPolicy}


class Replay(NamedTuple):
    """Demonstrations; an episode's seed is the index of one in its task's file."""

    files: Mapping[int, str]  # by task id

    def play(self, env: LiberoEnv, episode: Episode) -> dict:
        began = time.perf_counter()
        with open_demo_file(self.files[episode.task_id]) as file:
            demo = file[schema.DATA_GROUP][demo_names(file)[episode.seed]]
            replayed = replay_demonstration(env, demo)
        return {**episode._asdict(), "success": replayed["success"], "steps": replayed["steps"],
                "divergence": round(max(replayed["divergence"]), 5),
                "seconds": round(time.perf_counter() - began, 3)}


def plan_baseline(name: str, folder: str | Path, config: EvalConfig, suite: str,
                  task_ids: Iterable[int] = (), results: str = "") -> Evaluation:
    """Episodes of a policy of :data:`BASELINES`, checked; ``play()`` plays them into ``folder``.

    Args:
        task_ids: default all tasks of the suite.
        results: the file's name; default :func:`plan.results_name` of these tasks of the suite.

    Raises:
        ValueError: also for a perturbation, because baselines read no observation.
    """
    schema.check_option("baseline", name, BASELINES)
    if config.perturbation != "none":
        raise ValueError(f"perturbation={config.perturbation!r} is for trained policies; the "
                         f"baseline {name!r} reads no observation")
    count = schema.SUITES[schema.check_suite(suite)]
    task_ids = tuple(dict.fromkeys(task_ids)) or tuple(range(count))
    # a changed expert is another policy: its code is its weights
    modules = ((experts, joints, pick_place, put_inside, skills, geometry)
               if name == "expert" else ())
    source = b"".join(Path(module.__file__).read_bytes() for module in modules)
    identity = {"weights": name, "sha256": digest(source) if source else ""}
    return Evaluation(BASELINES[name], identity, Path(folder), config, suite,
                      official_episodes(suite, task_ids, config),
                      results or results_name(task_ids, range(count)))


def _plan_replay(files: Mapping[int, Path], folder: Path, config: EvalConfig, suite: str,
                 task_ids: Iterable[int], results: str) -> Evaluation:
    """Replays of the first ``config.episodes`` solved demonstrations of each task, checked.

    Raises ``FileNotFoundError`` if no demonstration was solved.
    """
    stored = {task_id: str(Path(path).resolve()) for task_id, path in files.items()}
    solved, content = {}, b""
    for task_id, path in stored.items():
        with open_demo_file(path) as file:
            names = demo_names(file)
            solved[task_id] = [number for number, name in enumerate(names)  # an actor may fail
                               if file[schema.DATA_GROUP][name].attrs.get("success", True)]
            # the first demonstration identifies a file, which may move or grow at its end
            content += file[schema.DATA_GROUP][names[0]]["actions"][()].tobytes()
    planned = [Episode(suite, task_id, None, number)
               for task_id in task_ids for number in solved[task_id][:config.episodes]]
    if not planned:
        raise FileNotFoundError("no demonstration was solved in "
                                f"{', '.join(stored[task_id] for task_id in task_ids)}")
    return Evaluation(Replay(stored), {"weights": "replay", "sha256": digest(content)}, folder,
                      config, suite, planned, results)


def plan_bounds(run: str | Path, config: EvalConfig, suite: str = "",
                task_ids: Iterable[int] = (), demo_dir: str = "") -> dict[str, Evaluation]:
    """The bounds of a run's success, checked: ``replay``, ``expert``, ``random`` and ``no-op``.

    ``config.bound_episodes`` per task in the run's protocol, into ``bounds/<name>/`` of the suite's
    :func:`plan.evaluation_folder`; none if that is 0. The run's demonstrations, found or collected
    now, are replayed for its own suite and tasks; a run trained with a ``demo_dir`` needs it again.
    Without usable demonstrations there is no ``replay``, and the reason is printed.
    ``FileNotFoundError`` for a ``demo_dir`` that is no folder.
    """
    if not config.bound_episodes:
        return {}
    run = find_run(run, to_write=True)
    trained = load_config(run)
    suite = suite or trained.data.suite
    folder = evaluation_folder(run, suite) / "bounds"
    task_ids = tuple(dict.fromkeys(task_ids)) or trained_tasks(trained, suite)
    results = results_name(task_ids, trained.data.task_ids)
    config = dataclasses.replace(config, num_episodes=config.bound_episodes, num_videos=0,
                                 perturbation="none")
    bounds = {}
    if suite == trained.data.suite and set(task_ids) <= set(trained.data.task_ids):
        needed = trained.replace(demo_dir=demo_dir)
        if not trained.data.actor:  # whose file begins with the demonstrations before it
            needed = needed.replace(num_demos=max(2, min(trained.data.num_demos, config.episodes)))
        try:
            files = demonstrations_of(run, needed)
            bounds["replay"] = _plan_replay(files, folder / "replay", config, suite, task_ids,
                                            results)
        except (OSError, RuntimeError, ValueError) as error:  # none, damaged, no time to collect
            if demo_dir and not Path(demo_dir).is_dir():
                raise
            print(f"no replay: {error}")
    return bounds | {name: plan_baseline(name, folder / name, config, suite, task_ids, results)
                     for name in BASELINES}


@one_environment()
def play_bounds(planned: Mapping[str, Evaluation]) -> dict[str, dict]:
    """Results of :func:`plan_bounds`, without bounds that no time is left for or that fail."""
    results = {}
    for name, bound in planned.items():
        try:
            results[name] = bound.play()
        except (RuntimeError, TimeoutError) as error:
            print(f"{name}: {error}")
    return results
