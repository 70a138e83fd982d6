"""Which episodes an evaluation plays, and the folder that keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from .. import schema
from ..config import Config, EvalConfig, convert
from ..files import read_jsonl, short_name
from ..stats import counted
from ..training.runs import load_config

SELECTION_SEED = 1_000_000  # of the placements that choose checkpoints and settings
WIDE_SEED = 2**31  # of the first randomised layout; demonstrations have seeds below it


class Episode(NamedTuple):
    """Where an episode begins: an official init state, or a placement sampled with ``seed``."""

    suite: str
    task_id: int
    init_state: int | None
    seed: int = 0
    placement: str = "benchmark"

    @classmethod
    def of(cls, row: Mapping) -> Episode:
        """The episode of a ledger's row; ``ValueError`` for a row that names none, or no result."""
        result = () if "error" in row else ("success", "steps")
        if missing := [key for key in (*cls._fields[:4], *result) if key not in row]:
            raise ValueError(f"it holds no {', '.join(missing)}")
        for name, kind in _TYPES.items():
            if name in row and not (name == "init_state" and row[name] is None):
                value = convert(name, row[name], kind)
                if kind is int and value < 0:
                    raise ValueError(f"{name}={value} is not valid; expected >= 0")
        return cls(*(row[key] for key in cls._fields[:4]), row.get("placement", "benchmark"))


_TYPES = {"suite": str, "task_id": int, "init_state": int, "seed": int,
          "placement": Literal[schema.PLACEMENTS], "success": bool, "steps": int, "horizon": int}


def read_ledger(path: Path) -> list[tuple[Episode, dict]]:
    """Episodes and rows of a ledger; ``ValueError`` with the number of a damaged line."""
    found = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            found.append((Episode.of(row), row))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged: {error}") from None
    return found


def conditions_of(config: EvalConfig, episode: Episode) -> dict:
    """Entries of an episode's row that tell how it is played; the steps are those of its suite."""
    suite, _ = schema.own_suite(episode.suite, episode.task_id)
    return {"protocol": config.protocol, "perturbation": config.perturbation,
            "horizon": config.horizon or schema.PROTOCOLS[config.protocol].horizon(suite)}


def official_episodes(suite: str, task_ids: Iterable[int], config: EvalConfig) -> list[Episode]:
    """The protocol's episodes of each task, from the official init states."""
    return [Episode(suite, schema.check_task_id(suite, task_id), init_state)
            for task_id in task_ids for init_state in config.init_states]


def wide_episodes(suite: str, task_ids: Iterable[int], config: EvalConfig) -> list[Episode]:
    """As many episodes, each in another randomised layout."""
    return [Episode(suite, task_id, None, WIDE_SEED + number, "wide")
            for _, task_id, number, *_ in official_episodes(suite, task_ids, config)]


def selection_episodes(config: Config, count: int) -> list[Episode]:
    """``count`` episodes per task from sampled placements, never the official init states."""
    return [Episode(config.data.suite, task_id, None, SELECTION_SEED + number)
            for task_id in config.data.task_ids for number in range(count)]


def protocol_in_words(protocol: Mapping) -> str:
    """Name and source of the protocol of ``results.json``, and what settings changed of it."""
    usual = schema.PROTOCOLS[protocol["protocol"]]
    changed = [f"{counted(now, what)} instead of {before}" for what, now, before in (
        ("episode", protocol["num_episodes"], usual.episodes),
        ("step", protocol["horizon"], usual.horizon(protocol["suite"]))) if now != before]
    return f"{usual.name} ({usual.source})" + ", with " * bool(changed) + " and ".join(changed)


def excluded_in_words(errors: Sequence[Mapping]) -> str:
    """What is said of the ``errors`` of ``results.json``."""
    first = errors[0]
    start = (f"seed {first['seed']}" if first["init_state"] is None
             else f"init state {first['init_state']}")
    return (f"Excluded: {counted(len(errors), 'episode')} that could not be run; the first, "
            f"{first['suite']} task {first['task_id']}, {start}: {first['error']}")


def not_run_in_words(not_run: int, planned: int) -> str:
    """What is said of episodes for which no time was left."""
    return (f"the session's time is up: {not_run} of {planned} episodes are not run; the same call "
            "continues")


def tasks_in_words(task_ids: Sequence[int]) -> str:
    """``task 0``, ``tasks 0 and 1``, ``tasks 0, 1 and 4`` or ``tasks 0 to 9 and 12``."""
    runs: list[list[int]] = []
    for task_id in task_ids:
        if runs and task_id == runs[-1][-1] + 1:
            runs[-1].append(task_id)
        else:
            runs.append([task_id])
    *others, last = (part for run in runs for part in (
        map(str, run) if len(run) < 3 else [f"{run[0]} to {run[-1]}"]))
    if not others and len(task_ids) > 1:
        return f"tasks {last}"
    return f"tasks {', '.join(others)} and {last}" if others else f"task {last}"


def results_name(task_ids: Iterable[int], own: Iterable[int]) -> str:
    """``results.json`` for a run's own tasks; for others their numbers are in the name."""
    asked = sorted(set(task_ids))
    if asked == sorted(set(own)):
        return "results.json"
    return short_name(f"results-tasks-{'-'.join(map(str, asked))}") + ".json"


def evaluation_folder(run: Path, suite: str) -> Path:
    """The folder of an evaluation's ledger and results: the run's own for the suite it trained on.
    """
    own = suite == load_config(run).data.suite
    return run if own else robustness_folder(run, suite, "none")


def robustness_folder(run: Path, suite: str, perturbation: str, wide: bool = False) -> Path:
    """The folder of other suites, perturbed episodes and all episodes of a robustness card."""
    return run / "robustness" / f"{suite}-{'wide-' * wide}{perturbation}"


def trained_tasks(trained: Config, suite: str) -> tuple[int, ...]:
    """The tasks of a suite that a run was trained on; of an unrelated suite the run's own ids.

    Raises ``ValueError`` for a run of the joint suite that was trained on none of them.
    """
    own, task_ids = trained.data.suite, trained.data.task_ids
    if own != schema.JOINT_SUITE or suite == own:
        return task_ids
    base = schema.base_suite(suite)
    found = [task_id for name, task_id in (schema.own_suite(own, each) for each in task_ids)
             if name == base]
    if not found:
        raise ValueError(f"the policy was trained on no task of {base}; expected task_ids, the "
                         "tasks that it should try")
    return tuple(found)


def refuse_unknown_tasks(trained: Config, suite: str, task_ids: tuple[int, ...]) -> None:
    """Raise ``ValueError`` if a policy conditioned on task numbers was not trained on these.

    LIBERO-PRO's variations keep the numbers of the suite they vary, except those with other goals.
    """
    known = trained.data
    if trained.model.conditioning != "task_id" or (
            schema.base_suite(suite) == known.suite and set(task_ids) <= set(known.task_ids)
            and not schema.has_other_goals(suite)):
        return
    raise ValueError(f"the policy is conditioned on task numbers and knows tasks "
                     f"{', '.join(map(str, known.task_ids))} of {known.suite}; it cannot be asked "
                     f"for tasks {', '.join(map(str, task_ids))} of {suite}. "
                     "Train with conditioning='language' for tasks it has not seen")
