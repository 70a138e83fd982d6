"""Success rates in the simulator: of a policy on a task, of a run, of the rollouts that select."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..config import Config, EvalConfig
from ..policy.keypoints import trained_localizer
from ..sim.env import LiberoEnv
from ..stats import summarize_episodes
from ..training.runs import find_run, load_config
from ..training.train import BehaviorCloningTrainer
from .perturbations import PERTURBATIONS, why_unused
from .plan import (
    Episode,
    conditions_of,
    evaluation_folder,
    official_episodes,
    read_ledger,
    refuse_unknown_tasks,
    results_name,
    robustness_folder,
    selection_episodes,
    trained_tasks,
    wide_episodes,
)
from .play import Evaluation, TrainedPolicy, collect, play_all
from .rollout import Policy, run_episode

ROLLOUT_EPISODES = 10  # per task, of the rollouts that choose the best weights


class PolicyEvaluator:
    """Success and length of a policy's episodes.

    Args:
        policy: anything with ``reset()`` and ``act(observation)``.
        horizon: steps allowed per episode; 0 takes the suite's.
    """

    def __init__(self, policy: Policy, horizon: int = 0):
        if horizon < 0:
            raise ValueError(f"horizon={horizon} is not valid; expected >= 0")
        self.policy = policy
        self.horizon = horizon

    def evaluate_on_task(self, env: LiberoEnv, init_states: Sequence[int],
                         num_episodes: int) -> dict:
        """Run the first ``num_episodes`` of ``init_states`` (indices of official init states).

        An init state that is given twice is played once.

        Returns:
            :func:`stats.summarize_episodes` of the rows, and the rows under ``"rows"``.

        Raises:
            ValueError: fewer init states than episodes, or an index that does not exist.
        """
        chosen = list(dict.fromkeys(init_states))
        if not 1 <= num_episodes <= len(chosen):
            raise ValueError(f"num_episodes={num_episodes} is not valid; expected 1 to "
                             f"{len(chosen)}, the init states given")
        outcomes = ((Episode(env.task.suite, env.task.task_id, init_state),
                     run_episode(self.policy, env, init_state, self.horizon), "")
                    for init_state in chosen[:num_episodes])
        played, _ = collect(outcomes, num_episodes, desc=env.task.name)
        rows = list(played.values())
        return {**summarize_episodes(rows), "rows": rows}


def plan_run(run: str | Path, config: EvalConfig | None = None, weights: str = "best",
             suite: str = "", task_ids: Iterable[int] = (), apart: bool = False,
             wide: bool = False) -> Evaluation:
    """The episodes of a run's policy, checked, with the policy loaded; ``play()`` plays them.

    Args:
        run: folder, or name of a folder in ``artifacts/``.
        config: default the run's.
        weights: ``best`` or ``last``.
        suite, task_ids: default those the policy was trained on. Results of other tasks are in
            ``results-tasks-....json``.
        apart: write into :func:`plan.robustness_folder`, where perturbed episodes and those of
            another suite always go.
        wide: randomised layouts (:func:`layouts.randomise_layout`) in place of the official init
            states, which are one scene per task; also apart.

    Raises:
        ValueError: ``episodes.jsonl`` holds episodes of other weights or another protocol; a policy
            conditioned on task numbers was not trained on one of ``task_ids``; the perturbation
            cannot matter for this policy.
    """
    run = find_run(run, to_write=True, weights=weights)
    trained = load_config(run)
    suite = suite or trained.data.suite
    task_ids = tuple(dict.fromkeys(task_ids)) or trained_tasks(trained, suite)
    refuse_unknown_tasks(trained, suite, task_ids)
    config = config or trained.eval
    perturbed = config.perturbation != "none"
    needs = PERTURBATIONS[config.perturbation].needs if perturbed else ""
    if reason := why_unused(needs, trained.model):
        raise ValueError(f"perturbation={config.perturbation!r} cannot matter for {run}: {reason}")
    source = TrainedPolicy.load(run, weights)
    folder = evaluation_folder(run, suite)
    if apart or perturbed or wide:
        folder = robustness_folder(run, suite, config.perturbation, wide)
    planned = (wide_episodes if wide else official_episodes)(suite, task_ids, config)
    return Evaluation(source, source.identity, folder, config, suite, planned,
                      results_name(task_ids, trained.data.task_ids))


# --- training, and rollouts that choose among checkpoints and settings ---------------------------


def trainer_of(config: Config, files: dict[int, Path], run: Path) -> BehaviorCloningTrainer:
    """A run's trainer with its rollouts and its localizer, both of which need the simulator."""
    def roll_out() -> float:
        return selection_success(run, config, ROLLOUT_EPISODES)["success_rate"]

    return BehaviorCloningTrainer.from_config(config, files, run, roll_out,
                                              functools.partial(trained_localizer, run, config))


def selection_success(run: str | Path, config: Config, episodes: int,
                      ledger: str | Path | None = None) -> dict:
    """Success of a run's ``last`` weights from sampled placements, never the official init states.

    For choosing among checkpoints and settings, so that the reported episodes are held out.

    Args:
        episodes: per task.
        ledger: a JSON-lines file that gets each episode's row, with the digest of the weights, the
            moment it ends. Episodes that these weights have played in it under the same conditions
            (:func:`plan.conditions_of`) are not played again.

    Returns:
        :func:`stats.summarize_episodes` of the episodes on ``config``'s tasks, and ``errors``, the
        episodes that raised, hung or lost their process twice: printed and excluded.
    """
    run = Path(run)
    settings = dataclasses.replace(config.eval, num_videos=0, perturbation="none")
    source = TrainedPolicy.load(run, "last")
    planned = selection_episodes(config, episodes)

    def conditions(episode: Episode) -> dict:
        return {"sha256": source.sha256, **conditions_of(settings, episode)}

    before = {}
    for row in selection_rows(ledger, source.sha256) if ledger else []:
        episode = Episode.of(row)
        if all(row.get(key, value) == value for key, value in conditions(episode).items()):
            before[episode] = row
    missing = [episode for episode in planned if episode not in before]
    new, errors = collect(play_all(source, settings, run, missing), len(planned),
                          [before[episode] for episode in planned if episode in before],
                          ledger, conditions, desc="selection", leave=False)
    rows = {**before, **new}
    errors = [f"{tuple(episode)}: {error}" for episode, error in errors.items()]
    if errors:
        print(f"selection: {len(errors)} of {len(planned)} episodes ended in an error and do not "
              f"count; the first: {errors[0]}")
    return {**summarize_episodes([rows[episode] for episode in planned if episode in rows]),
            "errors": errors}


def selection_rows(ledger: str | Path, sha256: str) -> list[dict]:
    """Episodes that some weights played in a ledger of :func:`selection_success`."""
    return [row for _, row in read_ledger(Path(ledger))
            if row.get("sha256") == sha256 and "error" not in row]
