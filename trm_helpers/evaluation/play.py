"""Planned episodes, each played once: in this process, in several, or on a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from .. import files, schema
from ..config import EvalConfig
from ..files import (
    append_jsonl,
    differences,
    dispensable,
    exclusive_lock,
    inside,
    write_json,
)
from ..opengl import renderer
from ..preflight import check_settling
from ..schema import PROTOCOLS
from ..sim.env import LiberoEnv, renewed_after_errors, worker_env
from ..sim.parallel import run_jobs
from ..software import minutes_left, software_versions
from ..stats import summarize_episodes
from ..training.runs import load_policy
from ..visuals.films import write_grid
from .perturbations import PerturbedPolicy
from .plan import Episode, conditions_of, excluded_in_words, not_run_in_words, read_ledger
from .rollout import Policy, record_episode, run_episode

_HOPELESS = 3  # errors, with no episode played, after which an evaluation gives up


class TrainedPolicy(NamedTuple):
    """A run's weights, identified by the digests of what was loaded and of its description."""

    run: Path
    weights: str
    sha256: str
    policy: str = ""

    @classmethod
    def load(cls, run: Path, weights: str) -> TrainedPolicy:
        """Load the policy that plays in this process, and its digests."""
        _loaded.cache_clear()
        return cls(run, weights, *_loaded(run, weights)[1:])

    @property
    def identity(self) -> dict[str, str]:
        described = {"policy": self.policy} if self.policy else {}
        return {"weights": self.weights, "sha256": self.sha256, **described}

    def make(self, env: LiberoEnv | None = None) -> Policy:
        if _loaded(self.run, self.weights)[1:] != self[2:]:
            _loaded.cache_clear()  # a kept process has the policy of an earlier call
        policy, *found = _loaded(self.run, self.weights)
        for file, expected, now in zip((f"{self.weights}.safetensors", "policy.json"), self[2:],
                                       found, strict=True):
            if now != expected:
                raise RuntimeError(f"{self.run / file} was replaced while it was evaluated; "
                                   f"expected {expected} until the end, found {now}")
        return policy


@functools.lru_cache(maxsize=1)
def _loaded(run: Path, weights: str) -> tuple[Policy, str, str]:
    policy = load_policy(run, weights)
    sha256 = getattr(policy, "sha256", "") or weights_digest(run, weights)
    return policy, sha256, getattr(policy, "described", "")


def weights_digest(run: Path, weights: str) -> str:
    return files.digest(files.read_bytes(run / f"{weights}.safetensors"))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Episodes that are known before the first is played, and the folder that keeps them.

    Args:
        source: pickled to workers. ``make(env)`` returns a policy, or ``play(env, episode)`` a row.
        identity: the policy's part of :meth:`conditions_of`, ``weights`` and their ``sha256``.

    Raises:
        ValueError: the folder's ledger holds episodes under other conditions.
    """

    source: Any
    identity: dict
    folder: Path
    config: EvalConfig
    suite: str
    planned: list[Episode]
    results_name: str = "results.json"

    def __post_init__(self):
        self.finished()

    def conditions_of(self, episode: Episode) -> dict:
        """Entries of an episode's row that tell the policy and how it is played."""
        return {**self.identity, **conditions_of(self.config, episode)}

    @property
    def ledger(self) -> Path:
        return self.folder / "episodes.jsonl"

    def finished(self) -> dict[Episode, dict]:
        """Rows of all episodes that were played.

        Raises ``ValueError`` for a damaged row, one under other conditions, and a second one of an
        episode with another outcome.
        """
        played: dict[Episode, dict] = {}
        for number, (episode, row) in enumerate(read_ledger(self.ledger), start=1):
            where = f"{self.ledger}, line {number}"
            try:
                conditions = self.conditions_of(episode)
            except ValueError as error:
                raise ValueError(f"{where} is damaged: {error}") from None
            older = {"perturbation": "none", "policy": conditions.get("policy")}
            row = {**older, **row}  # rows of older versions have neither
            different = differences({key: row[key] for key in conditions if key in row}, conditions)
            if different:
                raise ValueError(f"{self.ledger} holds episodes of another policy or protocol "
                                 f"({different}); move it away to evaluate afresh")
            if "error" in row:
                continue
            most = conditions["horizon"]  # a demonstration that is replayed may be longer
            if row["steps"] > most and self.identity["weights"] != "replay":
                raise ValueError(f"{where} is damaged: steps={row['steps']}; expected at most "
                                 f"{most}, the horizon")
            before = played.setdefault(episode, row)
            if before["success"] != row["success"] or before["steps"] != row["steps"]:
                raise ValueError(f"{where} is damaged: it contradicts an earlier line on the same "
                                 "episode; expected one result of each")
        return played

    def rows(self) -> list[dict]:
        """Rows of the planned episodes that were played."""
        finished = self.finished()
        return [finished[episode] for episode in self.planned if episode in finished]

    def play(self) -> dict:
        """Play the missing episodes and write ``episodes.jsonl``, results and ``videos/``.

        Each row is written the moment its episode ends, and an interrupted call resumes. An episode
        in which the policy raises or returns no valid action is a failure (``policy_errors`` counts
        them). One in which the simulator raised, hung or lost its process twice is recorded as an
        error, not as a failure, and the next call tries it again. After the session's time
        (``TRM_STOP_AT``) no further episode begins; ``not_run`` is the number of episodes left.

        Returns:
            :func:`stats.summarize_episodes`, errors, protocol, versions of this call's software,
            and every renderer that drew a part of the episodes.

        Raises:
            RuntimeError: another process evaluates in the folder, or no episode could be run.
            TimeoutError: the time is up before the first episode.
        """
        with exclusive_lock(self.folder, wait=False, lock=".evaluation.lock"):
            finished = self.finished()
            missing = [episode for episode in self.planned if episode not in finished]
            new, errors = collect(
                play_all(self.source, self.config, self.folder, missing, stop_in_time=True),
                len(self.planned), self.rows(), self.ledger, self.conditions_of, desc="episodes")
            rows = self.rows()
            if not_run := len(self.planned) - len(rows) - len(errors):
                message = not_run_in_words(not_run, len(self.planned))
                if not rows:
                    raise TimeoutError(message)
                print(message)
            results = {**self._results(rows, errors), "not_run": not_run}
            if results["errors"]:
                print(excluded_in_words(results["errors"]))
            failed = [row["video_error"] for row in new.values() if "video_error" in row]
            if failed:
                print(f"{len(failed)} film(s) could not be made; their episodes count as usual. "
                      f"The first: {failed[0]}")
            write_json(self.folder / self.results_name, results)
            with dispensable("the grid of films"):
                _write_grids(self.folder, rows, bool(missing))
        return results

    def _results(self, rows: list[dict], errors: Mapping[Episode, str]) -> dict:
        protocol, first = PROTOCOLS[self.config.protocol], self.planned[0]
        return {
            **summarize_episodes(rows), **_by_own_suite(rows),
            "errors": [{**episode._asdict(), "error": error} for episode, error in errors.items()],
            "protocol": {"suite": self.suite,
                         "task_ids": sorted({episode.task_id for episode in self.planned}),
                         **dataclasses.asdict(self.config), **self.identity,
                         "horizon": self.config.horizon or protocol.horizon(self.suite),
                         "num_episodes": self.config.episodes, "source": protocol.source,
                         "settle_steps": protocol.settle_steps,
                         "settle_action": list(protocol.settle_action),
                         "init_states": ("official" if first.init_state is not None
                                         else "randomised" if first.placement == "wide"
                                         else "of the demonstrations"),
                         "observations": "what env.step returned"},
            "software": software_versions(),
            "renderers": sorted({row["renderer"] for row in rows if row.get("renderer")}),
        }


def _by_own_suite(rows: Iterable[Mapping]) -> dict[str, dict]:
    """Of episodes of the joint suite, ``suites``: successes and episodes of each of the four."""
    suites: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["suite"] == schema.JOINT_SUITE:
            own, _ = schema.own_suite(row["suite"], row["task_id"])
            counts = suites.setdefault(own, {"successes": 0, "episodes": 0})
            counts["successes"] += bool(row["success"])
            counts["episodes"] += 1
    return {"suites": suites} if suites else {}


# --- the one loop --------------------------------------------------------------------------------


def collect(outcomes: Iterator[tuple[Episode, dict | None, str]], planned: int,
            finished: Collection[Mapping] = (), ledger: str | Path | None = None,
            stamp: Callable[[Episode], Mapping] = lambda _: {}, **bar
            ) -> tuple[dict[Episode, dict], dict[Episode, str]]:
    """Rows and errors of episodes, each appended to the ledger the moment it ends.

    Args:
        outcomes: an episode with its row, or with what went wrong.
        planned: number of episodes.
        finished: rows of those that were played before.
        stamp: further entries of an episode's line in the ledger.
        bar: how ``tqdm`` shows the progress.

    Raises:
        RuntimeError: no episode could be played; with the first error.
    """
    rows: dict[Episode, dict] = {}
    errors: dict[Episode, str] = {}
    with contextlib.closing(outcomes), \
            tqdm(total=planned, initial=len(finished), unit="episode", **bar) as progress:
        for episode, row, error in outcomes:
            if ledger:
                append_jsonl(ledger, {**(row or {**episode._asdict(), "error": error}),
                                       **stamp(episode)})
            if error:
                errors[episode] = error
            else:
                rows[episode] = row
            if len(errors) >= _HOPELESS and not rows and not finished:
                break
            progress.set_postfix(successes=sum(each["success"]
                                               for each in [*finished, *rows.values()]),
                                 refresh=False)
            progress.update()
    if errors and not rows and not finished:
        raise RuntimeError(f"no episode could be run; the first error: {[*errors.values()][0]}")
    return rows, errors


def play_all(source, config: EvalConfig, folder: Path, episodes: list[Episode],
             stop_in_time: bool = False) -> Iterator[tuple[Episode, dict | None, str]]:
    """``(episode, row, error)`` of each, as they end.

    With ``stop_in_time`` none begins after the session's time is up.
    """
    job = functools.partial(play_episode, source, config, folder)
    # starting one worker costs more than playing in this process
    workers = 0 if config.eval_workers == 1 else config.eval_workers
    with one_environment():  # a worker's ends with it
        for episode, row, error in run_jobs(
                job, episodes, workers=workers, keep=True, cluster=config.cluster,
                group=lambda episode: (episode.suite, episode.task_id),
                wanted=lambda _: not stop_in_time or minutes_left() > 0):
            yield episode, row, f"{type(error).__name__}: {error}" if error else ""


_inside = 0  # how many `one_environment`


@contextlib.contextmanager
def one_environment() -> Iterator[None]:
    """This process's environment of a task is kept over evaluations, until the outermost ends."""
    global _inside
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        if not _inside:
            _loaded.cache_clear()
            worker_env.cache_clear()


def play_episode(source, config: EvalConfig, folder: Path, episode: Episode) -> dict:
    """The row of one episode; its film, if it has one, is below ``folder``."""
    protocol = PROTOCOLS[config.protocol]
    if schema.own_suite(*episode[:2])[0].startswith("libero_spatial"):
        check_settling()
    with renewed_after_errors():
        env = worker_env(episode.suite, episode.task_id, settle_steps=protocol.settle_steps,
                         settle_action=protocol.settle_action)
        row = (source.play(env, episode) if hasattr(source, "play")
               else _play_policy(source, env, config, folder, episode))
    return {**row, "renderer": renderer()}


def _play_policy(source, env: LiberoEnv, config: EvalConfig, folder: Path, episode: Episode
                 ) -> dict:
    policy, horizon = source.make(env), conditions_of(config, episode)["horizon"]
    if config.perturbation != "none":
        policy = PerturbedPolicy(policy, config.perturbation, env, tuple(episode))
    number = episode.init_state
    if number is None or number - config.first_init_state >= config.num_videos:
        return run_episode(policy, env, number, horizon, seed=episode.seed,
                           placement=episode.placement)
    videos = folder / "videos"
    name = f"{episode.suite}-task{episode.task_id}-init{number:02d}.mp4"
    row = record_episode(policy, env, number, videos / "{outcome}" / name, horizon)
    if "video" in row:
        row["video"] = str(Path(row["video"]).relative_to(videos))
    return row


# --- films ---------------------------------------------------------------------------------------


def films_of(rows: Iterable[Mapping], folder: Path) -> dict[Path, Mapping]:
    """The films of evaluated episodes with their rows.

    Films that were removed, or that a row places outside of ``folder``, are left out.
    """
    named = [(row, inside(folder, Path("videos", str(row["video"])))) for row in rows
             if row.get("video")]
    missing = [str(row["video"]) for row, path in named if path is None]
    if missing:
        print(f"{len(missing)} film(s) are not in {folder / 'videos'}, and left out; the first: "
              f"{missing[0]!r}")
    return {path: row for row, path in named if path is not None}


def _write_grids(folder: Path, rows: list[dict], anew: bool) -> None:
    """``<suite>-task<id>.mp4``: all filmed episodes of a task at once."""
    filmed = sorted(films_of(rows, folder).items(),
                    key=lambda film: (film[1]["task_id"], film[1]["init_state"]))
    for task_id, group in itertools.groupby(filmed, key=lambda film: film[1]["task_id"]):
        paths, rows = zip(*group, strict=True)
        path = folder / "videos" / f"{rows[0]['suite']}-task{task_id}.mp4"
        if len(rows) > 1 and (anew or not path.exists()):
            write_grid(path, paths, [f"init state {row['init_state']}" for row in rows],
                       [row["success"] for row in rows])
