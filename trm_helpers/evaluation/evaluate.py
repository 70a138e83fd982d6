"""Rollouts in the simulator on the official init states: success, episode lengths, videos."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from .. import files, schema
from ..config import Config, EvalConfig
from ..files import (
    append_jsonl,
    differences,
    dispensable,
    exclusive_lock,
    inside,
    read_jsonl,
    short_name,
    write_json,
)
from ..preflight import check_settling
from ..schema import PROTOCOLS, EvalProtocol
from ..sim.env import LiberoEnv
from ..sim.parallel import run_jobs
from ..software import renderer, software_versions
from ..stats import paired_mcnemar, summarize_episodes
from ..training.runs import find_run, load_config, load_policy
from ..visuals.films import write_grid
from .perturbations import PerturbedPolicy, why_unused
from .rollout import Policy, record_episode, run_episode

SELECTION_SEED = 1_000_000  # of the placements that choose checkpoints and settings
WIDE_SEED = 2**31  # of the first wide placement; demonstrations draw theirs below it
ROLLOUT_EPISODES = 10  # per task, of the rollouts that choose the best weights
_HOPELESS = 3  # errors, with no episode played, after which an evaluation gives up


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


def evaluate_run(run: str | Path, config: EvalConfig | None = None, weights: str = "best",
                 suite: str = "", task_ids: Iterable[int] = (), apart: bool = False,
                 wide: bool = False) -> dict:
    """Evaluate a run's policy and write ``episodes.jsonl``, ``results.json`` and ``videos/``.

    Other tasks than the run's have their results in ``results-tasks-....json`` beside it.

    Which episodes there will be is settled before the first. Every episode's row is written the
    moment it ends, and a call that was interrupted goes on with those that are missing. One in
    which the policy raises or gives no valid action is a failure (``policy_errors`` counts them).
    One in which the simulator raised, or that hung or lost its process, twice, is recorded as an
    error, apart from the failures; the next call tries it again.

    Args:
        run: folder, or name of a folder in ``artifacts/``.
        config: protocol, episodes per task, horizon, perturbation, videos, processes; ``None``
            takes the run's.
        weights: ``best`` or ``last``.
        suite, task_ids: other tasks than those the policy was trained on.
        apart: write into :func:`robustness_folder`, as perturbed episodes and those of another
            suite always are, and leave what the run has alone.
        wide: in place of the official init states, which are one scene a task, as many placements
            as :func:`layouts.randomise_layout` draws; also apart.

    Returns:
        what ``results.json`` holds: :func:`stats.summarize_episodes`, errors, protocol, versions
        of this call's software, and every renderer that drew a part of the episodes.

    Raises:
        ValueError: ``episodes.jsonl`` holds episodes of other weights or another protocol; a policy
            that is told its task by number was not trained on one of ``task_ids``; the perturbation
            cannot matter for this policy.
        RuntimeError: no episode could be run; with the first error.
    """
    return plan_run(run, config, weights, suite, task_ids, apart, wide).play()


def plan_run(run: str | Path, config: EvalConfig | None = None, weights: str = "best",
             suite: str = "", task_ids: Iterable[int] = (), apart: bool = False,
             wide: bool = False) -> Evaluation:
    """:func:`evaluate_run`, loaded and checked, and not played yet."""
    run = find_run(run, to_write=True)
    trained = load_config(run)
    suite = suite or trained.data.suite
    task_ids = tuple(dict.fromkeys(task_ids)) or trained.data.task_ids
    _refuse_unknown_numbers(trained, suite, task_ids)
    config = config or trained.eval
    perturbed = config.perturbation != "none"
    if perturbed and (reason := why_unused(config.perturbation, trained.model)):
        raise ValueError(f"perturbation={config.perturbation!r} cannot matter for {run}: {reason}")
    source = TrainedPolicy.load(run, weights)
    folder = evaluation_folder(run, suite)
    if apart or perturbed or wide:
        folder = robustness_folder(run, suite, config.perturbation, wide)
    results = results_name(task_ids, trained.data.task_ids)
    planned = planned_episodes(suite, task_ids, config, wide)
    return Evaluation(source, source.identity, folder, config, suite, planned, results).checked()


def results_name(task_ids: Iterable[int], own: Iterable[int]) -> str:
    """``results.json`` of a run's own tasks; of others their numbers are in the name."""
    asked = sorted(set(task_ids))
    if asked == sorted(set(own)):
        return "results.json"
    return short_name(f"results-tasks-{'-'.join(map(str, asked))}") + ".json"


def evaluation_folder(run: Path, suite: str = "") -> Path:
    """Where an evaluation's ledger and results are: the run's, but for another suite than its own.
    """
    own = suite in ("", load_config(run).data.suite)
    return run if own else robustness_folder(run, suite, "none")


def robustness_folder(run: Path, suite: str, perturbation: str, wide: bool = False) -> Path:
    """Where other suites, perturbed episodes and all those of a robustness card have a ledger."""
    return run / "robustness" / f"{suite}-{'wide-' * wide}{perturbation}"


def selection_success(run: str | Path, config: Config, episodes: int, weights: str = "last",
                      ledger: str | Path | None = None) -> dict:
    """Success of ``episodes`` a task from drawn placements, never the official init states.

    For choosing among checkpoints and settings: reports, on the init states, see none of it.

    Args:
        ledger: a JSON-lines file that gets each episode's row, with the digest of the weights, the
            moment it ends. What is in it of these weights is not played again; other weights' rows
            stay. Without one nothing is written.

    Returns:
        :func:`stats.summarize_episodes` of the episodes on ``config``'s tasks, and ``errors``: of
        those that raised, hung or lost their process twice. They count neither way; a line is
        printed about them, and with a ledger the next call tries them again.
    """
    run = Path(run)
    settings = dataclasses.replace(config.eval, num_videos=0, perturbation="none")
    source = TrainedPolicy.load(run, weights)
    planned = [Episode(config.data.suite, task_id, None, SELECTION_SEED + number)
               for task_id in config.data.task_ids for number in range(episodes)]
    before = {} if ledger is None else {
        Episode.of(row): row for row in read_jsonl(ledger) if row["sha256"] == source.sha256}
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
    if errors:
        print(f"selection: {len(errors)} of {len(planned)} episodes ended in an error and do not "
              f"count; the first: {errors[0]}")
    return {**summarize_episodes(rows), "errors": errors}


def selection_rate(run: str | Path, config: Config) -> Callable[[], float]:
    """What a trainer takes as ``roll_out``: success of the run's ``last`` weights, whenever called.
    """
    return lambda: selection_success(run, config, ROLLOUT_EPISODES)["success_rate"]


def selection_rows(run: str | Path, ledger: str | Path, weights: str = "last") -> list[dict]:
    """What a ledger of :func:`selection_success` holds of a run's present weights."""
    present = digest(Path(run) / f"{weights}.safetensors")
    return [row for row in read_jsonl(ledger) if row["sha256"] == present]


# --- what is played -----------------------------------------------------------------------------


class Episode(NamedTuple):
    """Where an episode begins: an official init state, or a placement drawn with ``seed``."""

    suite: str
    task_id: int
    init_state: int | None
    seed: int = 0
    placement: str = "benchmark"

    @classmethod
    def of(cls, row: Mapping) -> Episode:
        return cls(*(row[key] for key in cls._fields[:4]), row.get("placement", "benchmark"))


class TrainedPolicy(NamedTuple):
    """A run's weights, named by the digest of what was loaded."""

    run: Path
    weights: str
    sha256: str

    @classmethod
    def load(cls, run: Path, weights: str) -> TrainedPolicy:
        """Load the policy now: its digest, and what plays in this process."""
        policy = load_policy(run, weights)
        source = cls(run, weights,
                     getattr(policy, "sha256", "") or digest(run / f"{weights}.safetensors"))
        _POLICIES.clear()
        _POLICIES[source] = policy
        return source

    @property
    def identity(self) -> dict[str, str]:
        return {"weights": self.weights, "sha256": self.sha256}

    def make(self, env: LiberoEnv | None = None) -> Policy:
        if self not in _POLICIES and self.load(self.run, self.weights) != self:
            raise RuntimeError(f"{self.run / self.weights}.safetensors was replaced while it was "
                               f"evaluated; expected the weights {self.sha256} until the end")
        return _POLICIES[self]


_POLICIES: dict[TrainedPolicy, Policy] = {}  # at most one: of what this process plays


def official_episodes(suite: str, task_ids: Iterable[int], config: EvalConfig) -> list[Episode]:
    """Of each task those that the protocol asks for, from the official init states."""
    return [Episode(suite, schema.check_task_id(suite, task_id), init_state)
            for task_id in task_ids for init_state in config.init_states]


def planned_episodes(suite: str, task_ids: Iterable[int], config: EvalConfig,
                     wide: bool = False) -> list[Episode]:
    """:func:`official_episodes`, or as many from wide placements, each another scene."""
    official = official_episodes(suite, task_ids, config)
    return [Episode(suite, task_id, None, WIDE_SEED + number, "wide")
            for _, task_id, number, *_ in official] if wide else official


class Evaluation(NamedTuple):
    """Episodes that are known before the first is played, and the folder that keeps them.

    Args:
        source: what workers get: ``make(env)`` gives its policy, or ``play(env, episode)`` the row.
        identity: what an episode's row has to agree with: ``weights`` and their ``sha256``.
    """

    source: Any
    identity: dict
    folder: Path
    config: EvalConfig
    suite: str
    planned: list[Episode]
    results_name: str = "results.json"

    @property
    def conditions(self) -> dict:
        """What all rows of one ledger have in common."""
        protocol = PROTOCOLS[self.config.protocol]
        return {**self.identity, "protocol": protocol.name,
                "horizon": self.config.horizon or protocol.horizon(self.suite),
                "perturbation": self.config.perturbation}

    @property
    def ledger(self) -> Path:
        return self.folder / "episodes.jsonl"

    def checked(self) -> Evaluation:
        """Itself; ``ValueError`` where its ledger holds episodes that are not to be mixed."""
        self.finished()
        return self

    def finished(self) -> dict[Episode, dict]:
        """The rows of what was played; ``ValueError`` as in :meth:`checked`."""
        played = {}
        for number, row in enumerate(read_jsonl(self.ledger), start=1):
            if not set(Episode._fields[:4]) <= set(row):
                raise ValueError(f"{self.ledger}, line {number} is no episode; expected "
                                 f"{', '.join(Episode._fields[:4])} in it")
            row = {"perturbation": "none", **row}  # older rows do not say so
            conditions = self.conditions
            different = differences({key: row[key] for key in conditions if key in row}, conditions)
            if different:
                raise ValueError(f"{self.ledger} holds episodes of another policy or protocol "
                                 f"({different}); move it away to evaluate afresh")
            if "error" not in row:
                played[Episode.of(row)] = row
        return played

    def rows(self) -> list[dict]:
        """The rows of the planned episodes that were played."""
        finished = self.finished()
        return [finished[episode] for episode in self.planned if episode in finished]

    def play(self) -> dict:
        """Play what is missing, and write the files of :func:`evaluate_run`.

        Raises ``RuntimeError`` while another process evaluates in the folder.
        """
        with exclusive_lock(self.folder, wait=False, lock=".evaluation.lock"):
            results = _play_missing(self)
            write_json(self.folder / self.results_name, results)
        return results


def compare_runs(run: str | Path, other: str | Path, suite: str = "",
                 task_ids: Iterable[int] = ()) -> dict:
    """:func:`stats.paired_mcnemar` of ``other`` (a) and ``run`` (b), both evaluated before.

    Args:
        suite, task_ids: of the episodes compared; none takes the suite of each, and all tasks.

    Raises:
        FileNotFoundError: one of them has no episodes yet.
        ValueError: they share none, or have played them by different protocols.
    """
    tasks = set(task_ids)
    return paired_mcnemar(*([row for row in evaluated_episodes(folder, suite)
                             if not tasks or row["task_id"] in tasks] for folder in (other, run)))


def evaluated_episodes(run: str | Path, suite: str = "") -> list[dict]:
    """Rows of a run's ledger; ``FileNotFoundError`` where it was not evaluated (on that suite)."""
    run = find_run(run)
    suite = suite or load_config(run).data.suite
    ledger = evaluation_folder(run, suite) / "episodes.jsonl"
    if not ledger.exists():
        raise FileNotFoundError(f"{ledger} does not exist; expected a run that was evaluated "
                                f"(python -m trm_helpers evaluate {run.name} --suite {suite})")
    return [row for row in read_jsonl(ledger) if row["suite"] == suite]


def comparable(planned: Evaluation, other: str | Path) -> None:
    """Raise ``ValueError`` where what ``planned`` plays has no pair among another run's episodes.

    ``FileNotFoundError`` where that one was not evaluated.
    """
    if planned.config.perturbation != "none":
        raise ValueError(f"perturbation={planned.config.perturbation!r} is not valid in a "
                         "comparison; expected 'none'")
    rows = [{**episode._asdict(), **planned.conditions, "success": False, "steps": 0}
            for episode in planned.planned]
    paired_mcnemar(evaluated_episodes(other, planned.suite), rows)


def stale(run: str | Path, made: Mapping) -> str:
    """A sentence where results are of other weights than the run has now; else empty.

    Args:
        made: what says which: ``weights`` and ``sha256``, of results their ``protocol``.
    """
    file = Path(run) / f"{made.get('weights', '')}.safetensors"
    if not made.get("sha256") or not file.exists() or digest(file) == made["sha256"]:
        return ""
    return (f"Stale: made with other weights ({made['sha256']}) than {file.name} has now "
            f"({digest(file)}); the run was trained further or replaced since.")


def stale_episodes(run: str | Path, suite: str = "") -> list[str]:
    """The sentence of :func:`stale` on what :func:`evaluated_episodes` gives; none where fresh."""
    said = stale(find_run(run), evaluated_episodes(run, suite)[0])
    return [f"{run}: {said}"] if said else []


def films_of(rows: Iterable[Mapping], folder: Path) -> dict[Path, Mapping]:
    """The films of evaluated episodes with their rows, without those that are no longer there.

    A film that a row places outside of ``folder`` is not shown.
    """
    named = [(row, inside(folder, Path("videos", str(row["video"])))) for row in rows
             if row.get("video")]
    missing = [str(row["video"]) for row, path in named if path is None]
    if missing:
        print(f"{len(missing)} film(s) are not in {folder / 'videos'}, and left out; the first: "
              f"{missing[0]!r}")
    return {path: row for row, path in named if path is not None}


def _play_missing(evaluation: Evaluation) -> dict:
    _, _, folder, config, suite, planned, _ = evaluation
    protocol, conditions = PROTOCOLS[config.protocol], evaluation.conditions
    rows = evaluation.finished()
    missing = [episode for episode in planned if episode not in rows]
    errors: dict[Episode, str] = {}
    with tqdm(total=len(planned), initial=len(planned) - len(missing), desc="episodes",
              unit="episode") as bar:
        for episode, row, error in _play_all(evaluation.source, config, folder, missing):
            append_jsonl(evaluation.ledger,
                         {**(row or {**episode._asdict(), "error": error}), **conditions})
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
        "protocol": {"suite": suite, "task_ids": sorted({episode.task_id for episode in planned}),
                     **dataclasses.asdict(config),
                     **conditions, "num_episodes": config.episodes, "source": protocol.source,
                     "settle_steps": protocol.settle_steps,
                     "settle_action": list(protocol.settle_action),
                     "init_states": ("official" if planned[0].init_state is not None
                                     else "drawn, wide" if planned[0].placement == "wide"
                                     else "demonstrations'"),
                     "observations": "what env.step returned"},
        "software": software_versions(),
        "renderers": sorted({row["renderer"] for row in played if row.get("renderer")}),
    }
    missed = [rows[episode]["video_error"] for episode in missing
              if "video_error" in rows.get(episode, ())]
    if missed:
        print(f"{len(missed)} film(s) could not be made, and count for nothing; the first: "
              f"{missed[0]}")
    with dispensable("the grid of films"):
        _write_grids(folder, played, bool(missing))
    return results


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


def _play_all(source, config: EvalConfig, folder: Path, episodes: list[Episode]):
    """``(episode, row, error)`` of each, as they end."""
    job = functools.partial(_play, source, config, folder)
    renderer()  # chosen once: workers inherit it
    # a simulator of its own costs more to start than to have in this process
    workers = 0 if config.eval_workers == 1 else config.eval_workers
    try:
        for episode, row, error in run_jobs(job, episodes, workers=workers, keep=True,
                                            cluster=config.cluster):
            yield episode, row, f"{type(error).__name__}: {error}" if error else ""
    finally:  # in this process nobody plays on; a worker's simulator ends with it
        _POLICIES.clear()
        _worker_env.cache_clear()


def _play(source, config: EvalConfig, folder: Path, episode: Episode) -> dict:
    return {**_played(source, config, folder, episode), "renderer": renderer()}


def _played(source, config: EvalConfig, folder: Path, episode: Episode) -> dict:
    protocol = PROTOCOLS[config.protocol]
    env = _worker_env(episode.suite, episode.task_id, protocol)
    if hasattr(source, "play"):
        return source.play(env, episode)
    policy, horizon = source.make(env), config.horizon or protocol.horizon(episode.suite)
    if config.perturbation != "none":
        policy = PerturbedPolicy(policy, config.perturbation, env, tuple(episode))
    if (episode.init_state is not None
            and episode.init_state - config.first_init_state < config.num_videos):
        videos = folder / "videos"
        name = f"{episode.suite}-task{episode.task_id}-init{episode.init_state:02d}.mp4"
        path = videos / "{outcome}" / name
        row, _ = record_episode(policy, env, episode.init_state, path, horizon)
        if "video" in row:
            row["video"] = str(Path(row["video"]).relative_to(videos))
        return row
    return run_episode(policy, env, episode.init_state, horizon, seed=episode.seed,
                       placement=episode.placement)


@functools.lru_cache(maxsize=1)  # one environment per worker, kept over a task's episodes
def _worker_env(suite: str, task_id: int, protocol: EvalProtocol) -> LiberoEnv:
    if suite.startswith("libero_spatial"):
        check_settling()
    return LiberoEnv(suite, task_id, settle_steps=protocol.settle_steps,
                     settle_action=protocol.settle_action)


def _refuse_unknown_numbers(trained: Config, suite: str, task_ids: tuple[int, ...]) -> None:
    """Where a number tells the task it has to be one that the policy was trained on.

    LIBERO-PRO's variations keep the numbers of the suite they vary, but for those with other goals:
    "task 2" has come to mean the old one.
    """
    known = trained.data
    if trained.model.conditioning != "task_id" or (
            schema.base_suite(suite) == known.suite and set(task_ids) <= set(known.task_ids)
            and not schema.has_other_goals(suite)):
        return
    raise ValueError(f"the policy is told its task by number and knows tasks "
                     f"{', '.join(map(str, known.task_ids))} of {known.suite}; it cannot be asked "
                     f"for tasks {', '.join(map(str, task_ids))} of {suite}. "
                     "Train with conditioning='language' for tasks it has not seen")


def digest(path: Path) -> str:
    return files.digest(files.read_bytes(path))
