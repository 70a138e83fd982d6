"""Hyper-parameter search: trials in parallel, each a notebook in its own process, ranked.

Each trial has a folder in ``<run>/search/``, named by its settings. Complete trials are read,
interrupted ones resume.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
import yaml
from tqdm.auto import tqdm

from .. import paths
from ..config import Config
from ..files import exclusive_lock, read_json, visible, write_bytes, write_json
from ..notebooks import notebook_parameters
from ..software import gpu_fault, minutes_left
from ..stats import detectable, interval_text, paired_mcnemar
from .optuna_study import STUDY, Study
from .space import (
    axes,
    check_points,
    common_settings,
    grid,
    parameters,
    point_of,
    refuse_others,
    trial_name,
    trial_settings,
    value_of,
)
from .trials import read_trials, run_trial, success_of

_SAME_LOSS = 1.01  # losses within this factor count as equal, and the next criterion decides
_SIGNIFICANT = 0.05
FINALISTS = 3  # trained with `search_replicates` seeds each


def run_search(config: Config, run: str | Path) -> list[dict]:
    """Run the missing trials of a search, as many at once as there are workers, and rank all.

    A failed trial is recorded with its error and the others continue. After ``search_minutes``
    running trials are ended; the next call resumes them from their last checkpoint. Collect the
    demonstrations before (:func:`collect.ensure_demonstrations`), or each trial collects them.

    Writes into ``<run>/search/``: ``search.json`` (the settings), a folder per trial,
    ``trials.json`` (the returned rows) and ``best.yaml``, with which
    ``papermill 04_train.ipynb -f best.yaml`` trains in full with the best settings.

    Returns:
        the trials, best first: ``trial`` (its name), the settings of its point, ``state``
        (``complete``, ``stopped`` early by halving, ``failed`` with its ``error``), and, unless it
        failed, :func:`trials.measure`, averaged over ``seeds``. Empty if the time sufficed for
        none.

    Raises:
        ValueError: the folder, or the study in the database, belongs to a search with other
            settings; a bad search space; values that do not go together.
        ConnectionError: the database cannot be opened.
        RuntimeError: every trial failed.
    """
    folder = claim(config, run)
    search, stop = config.search, threading.Event()
    environments = worker_environments(config)
    train = functools.partial(run_point, config, folder, stop=stop)
    minutes = min(search.search_minutes or math.inf, minutes_left())
    timer = threading.Timer(60 * minutes, stop.set)
    timer.daemon = True

    def run_points(points: list[tuple[dict, int]], title: str) -> None:
        jobs = iter([functools.partial(train, point, seed=seed) for point, seed in points])
        in_parallel(lambda: next(jobs, None), environments, stop,
                    tqdm(desc=title, unit="trial", total=len(points)))

    with contextlib.ExitStack() as stack:
        records, idle, study = {}, True, None
        if search.search_method != "grid":
            study = stack.enter_context(Study.opened(config, folder))
        if math.isfinite(minutes):
            timer.start()
            stack.callback(timer.cancel)
        if study:
            bar = tqdm(desc="search", unit="trial", total=study.total, initial=study.counted())
            in_parallel(functools.partial(study.next_job, train), environments, stop, bar)
            records, idle = study.records(), study.idle()
        else:
            run_points([(point, config.train.seed) for point in grid(search)], "search")
        if idle and search.search_replicates > 1:
            finalists = [row for row in ranking(config, folder, records)[:FINALISTS]
                         if row["state"] == "complete"]
            run_points([({name: row[name] for name in axes(search)}, config.train.seed + number)
                        for number in range(1, search.search_replicates) for row in finalists],
                       "seeds of the best")
    ranked = ranking(config, folder, records)
    _write(config, folder, ranked)
    return ranked


def claim(config: Config, run: str | Path) -> Path:
    """Prepare the folder of a run's search with its ``search.json``.

    A folder without a trained epoch is overwritten.

    Raises:
        ValueError: trials with other settings, or a bad search space.
        RuntimeError: a search with other settings has just begun its trials.
    """
    check_points(config)
    folder = Path(run).resolve() / "search"
    path = folder / "search.json"
    if path.exists():
        try:
            before = common_settings(Config.from_dict(read_json(path)))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not the configuration of a search: {error}") from error
        now = common_settings(config)
        if any(metrics.stat().st_size for metrics in visible(folder, "*/metrics.jsonl")):
            refuse_others(folder, before, now)
        if before != now:
            with contextlib.ExitStack() as held:
                for lock in sorted(folder.glob("*/.lock")):  # of the trials
                    held.enter_context(exclusive_lock(lock.parent, wait=False))
                for record in (folder / STUDY, *visible(folder, "*/trial.json")):
                    record.unlink(missing_ok=True)
    write_json(path, config.replace(search_storage="").to_dict())  # no password
    return folder


def run_point(config: Config, folder: Path, point: dict, *, seed: int | None = None,
              epochs: int = 0, episodes: int | None = None, environment: dict | None = None,
              stop: threading.Event | None = None) -> dict:
    """:func:`trials.run_trial` of a point of the search in ``folder``.

    ``epochs`` and ``episodes`` (per task) of a rung; by default of the last one.
    """
    seed = config.train.seed if seed is None else seed
    trial = trial_settings(config, point, seed)
    notebook = paths.notebooks_dir() / "04_train.ipynb"
    given = parameters(trial, point, notebook_parameters(notebook))
    asked = {"epochs": trial.train.epochs, "stop_epoch": epochs,
             "selection_episodes": config.search.search_episodes if episodes is None else episodes}
    name = trial_name(point, None if seed == config.train.seed else seed)
    return run_trial(notebook, {**given, **asked}, folder / name, environment, stop,
                     asked["selection_episodes"] * len(trial.data.task_ids))


# --- in parallel ---------------------------------------------------------------------------------


def in_parallel(next_job: Callable[[], Callable[..., object] | None],
                environments: Sequence[dict], stop: threading.Event, bar: tqdm) -> None:
    """Run jobs until there is none, in a thread for each of the environments.

    A ``RuntimeError`` is a failed trial; any other error, or Ctrl-C, ends all threads.
    """
    def work(environment: dict) -> None:
        with contextlib.suppress(KeyboardInterrupt):  # how a notebook ends when `stop` is set
            while not stop.is_set():
                if (job := next_job()) is None:
                    return
                with contextlib.suppress(RuntimeError):  # recorded in its folder
                    job(environment=environment)
                bar.update()

    with bar, ThreadPoolExecutor(len(environments)) as pool:
        try:
            for future in as_completed([pool.submit(work, one) for one in environments]):
                future.result()
        except BaseException:  # Ctrl-C too
            stop.set()
            raise


def worker_environments(config: Config) -> list[dict[str, str]]:
    """Environment variables of each worker: its GPU, if there is any."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if config.train.device == "cpu" or gpu_fault():
        count = 0
    gpus = allowed.split(",")[:count] if allowed else [str(gpu) for gpu in range(count)]
    workers = config.search.search_workers or max(1, len(gpus))
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(workers)]


# --- ranking -------------------------------------------------------------------------------------


def ranking(config: Config, folder: Path, records: dict[str, dict]) -> list[dict]:
    """The trials in a search's folder and in ``records``, of other machines, best first.

    The order is: finalists, by all their seeds; other complete trials; trials stopped by halving;
    failed trials.
    """
    found = read_trials(folder, config)
    found |= {name: record for name, record in records.items()  # completed there, begun here
              if name not in found or len(record["rungs"]) > len(found[name]["rungs"])}
    points: dict[str, dict[int, dict]] = {}  # by name: the record of each seed
    for record in found.values():
        point, seed = point_of(record["parameters"], config.search)
        points.setdefault(trial_name(point), {})[seed] = record
    base = config.train.seed
    rows = [_row(name, {base: by_seed[base]}, config)
            for name, by_seed in points.items() if base in by_seed]
    complete, stopped, failed = ([row for row in rows if row["state"] == state]
                                 for state in ("complete", "stopped", "failed"))
    complete = rank_trials(complete)
    count = FINALISTS if config.search.search_replicates > 1 else 0
    finalists = [_row(row["trial"], points[row["trial"]], config) for row in complete[:count]]
    stopped.sort(key=lambda row: (-row["epochs"], value_of(row)))
    return rank_trials(finalists) + complete[count:] + stopped + failed


def _row(name: str, records: dict[int, dict], config: Config) -> dict:
    """One row of the ranking: the measures of a point, over the seeds that are complete."""
    base = records[config.train.seed]
    point, _ = point_of(base["parameters"], config.search)
    row = {"trial": name, **point}
    if "error" in base:
        return {**row, "state": "failed", "error": base["error"]}
    last = config.search.search_epochs
    if base["rungs"][-1]["epochs"] < last:
        return {**row, "state": "stopped", **base["rungs"][-1]}
    found = {seed: record["rungs"][-1] for seed, record in sorted(records.items())
             if record["rungs"] and record["rungs"][-1]["epochs"] == last}
    row |= {"state": "complete", **base["rungs"][-1], "seeds": list(found),
            "minutes": round(sum(one["minutes"] for one in found.values()), 3)}
    if all("rollouts" in one for one in found.values()):
        # sampled layouts have no init state; here it distinguishes the seeds of the trainings
        row |= success_of([{**episode, "init_state": seed} for seed, one in found.items()
                           for episode in one["rollouts"]])
        row["seed_success"] = [one["success_rate"] for one in found.values()]
    if len(found) == 1:
        return row
    for key in ("final_val_loss", "epochs_to_converge", "spikes"):
        row[key] = statistics.fmean(one[key] for one in found.values())
    row["seed_losses"] = [one["final_val_loss"] for one in found.values()]
    return row


def rank_trials(trials: list[dict]) -> list[dict]:
    """Best first: success rate where measured, final validation loss, convergence, stability.

    Losses in the same step of 1 % count as equal.
    """
    def key(trial: dict) -> tuple:
        loss = max(trial["final_val_loss"], sys.float_info.min)  # 0 has no logarithm
        loss_step = math.floor(math.log(loss) / math.log(_SAME_LOSS))
        return (-trial.get("success_rate", 0.0), loss_step, trial["epochs_to_converge"],
                trial["spikes"], trial["final_val_loss"])

    return sorted(trials, key=key)


def verdict(ranked: Sequence[dict]) -> str:
    """A sentence on whether the best trial differs significantly from the next.

    With rollouts: exact McNemar on the same sampled layouts. With several seeds: Welch's t test
    over the trainings; if both apply, both have to be significant. Losses of one training each
    decide nothing.
    """
    complete = [row for row in ranked if row["state"] == "complete"]
    if len(complete) < 2:
        return f"{len(complete) or 'No'} trial is complete: there is nothing to compare."
    best, second = complete[:2]
    several = min(len(best["seeds"]), len(second["seeds"])) > 1
    rollouts = "rollouts" in best and "rollouts" in second
    p_values = {}
    if rollouts:
        both = [f"{row['trial']} succeeds in {row['successes']} of {row['episodes']} episodes "
                f"(95 % Wilson interval {interval_text(row['wilson_low'], row['wilson_high'])} %)"
                for row in (best, second)]
        test = paired_mcnemar(best["rollouts"], second["rollouts"])
        p_values[f"McNemar over {test['pairs']} pairs"] = test["p_value"]
    else:
        both = [f"{row['trial']} has a validation loss of {row['final_val_loss']:.4g}"
                for row in (best, second)]
    if several:
        measured = "seed_success" if rollouts else "seed_losses"
        p_values["Welch over seeds"] = _welch(best[measured], second[measured])
    said = ", ".join(both)
    if not p_values:
        return (f"{said}, with one training run each: no difference can be claimed, because "
                "another seed changes a loss too.")
    tests = ", ".join(f"{name}: p = {p:.2g}" for name, p in p_values.items())
    able = f" {detectable(best)}." if rollouts else ""
    if max(p_values.values()) >= _SIGNIFICANT:
        return f"{said}: the difference is not significant at 0.05 ({tests}).{able}"
    caution = "" if several else ", from one training run each, which another seed may reverse"
    return f"{said}: the difference is significant at 0.05 ({tests}){caution}.{able}"


def _welch(a: Sequence[float], b: Sequence[float]) -> float:
    from scipy.stats import ttest_ind  # slow to import

    if len({*a}) == len({*b}) == 1:
        return 1.0  # equal rates over seeds leave no variance to test against
    return float(ttest_ind(a, b, equal_var=False).pvalue)


def _write(config: Config, folder: Path, ranked: list[dict]) -> None:
    if not ranked:
        return
    write_json(folder / "trials.json", ranked)
    best = ranked[0]
    if best["state"] == "failed":
        raise RuntimeError(f"every trial failed ({len(ranked)}); the first, {best['trial']}: "
                           f"{best['error']}")
    if best["state"] == "complete":
        point = {name: best[name] for name in axes(config.search)}
        known = notebook_parameters(paths.notebooks_dir() / "04_train.ipynb")
        given = parameters(config.replace(**point), point, known)
        write_bytes(folder / "best.yaml", yaml.safe_dump(given, sort_keys=False).encode())
