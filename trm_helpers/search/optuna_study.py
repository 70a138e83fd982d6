"""A search guided by Optuna; the study is a file, or a database shared by several machines."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ..config import Config, SearchConfig, migrate
from ..files import exclusive_lock
from .space import (
    REDUCTION,
    all_points,
    axes,
    common_settings,
    point_of,
    refuse_others,
    rungs,
    trial_name,
    value_of,
)
from .trials import is_past, read_trial, read_trials

STUDY = "study.jsonl"  # in the folder of a search: a study without a database
_HEARTBEAT = 30  # seconds between the heartbeats of a trial in a database
_GRACE = 120  # seconds without one after which its machine is considered dead
_RETRIES = 2  # of a trial whose process died
_SQLITE_WAITS = 60.0  # seconds for a locked file; 5, the default, are too few on a busy disk
_COUNTED = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
_RANDOM_TRIALS = 8  # before the sampler uses a model


class Study:
    """An Optuna study and the folder of its trials."""

    def __init__(self, config: Config, folder: Path, study: optuna.Study):
        self.config, self.folder, self.study = config, folder, study
        self.total = config.search.max_configs or len(all_points(config.search))
        self._lock = threading.Lock()

    @classmethod
    @contextlib.contextmanager
    def opened(cls, config: Config, folder: Path) -> Iterator[Study]:
        """The study of a search, new or continued.

        Trials that were running when their process died are queued again, and trials in the folder
        that the study does not know, for example of a grid, are added first.

        Raises:
            ConnectionError: the database cannot be opened, or is lost later.
            RuntimeError: another process uses the file.
            ValueError: the study belongs to a search with other settings.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        url = config.search.search_storage or os.environ.get("TRM_SEARCH_STORAGE", "")
        with contextlib.ExitStack() as stack:
            if not url:
                stack.enter_context(exclusive_lock(folder, wait=False))
            with _named(url), warnings.catch_warnings():
                # heartbeats: their interface may change, so its release is pinned
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study = optuna.create_study(
                    storage=_storage(url, folder), study_name=folder.parent.name,
                    load_if_exists=True, pruner=optuna.pruners.SuccessiveHalvingPruner(
                        min_resource=1, reduction_factor=REDUCTION),
                    sampler=optuna.samplers.TPESampler(
                        n_startup_trials=_RANDOM_TRIALS, constant_liar=True))
                what, before = f"the study {study.study_name}", study.user_attrs
                common, lists = common_settings(config), _lists(config.search)
                # an older version may have former settings and lack new ones
                usual = {name: value for name, value in common_settings(Config()).items()
                         if name not in before.get("lists", lists)}
                refuse_others(what, {**usual, **migrate(before.get("settings", common))}, common)
                refuse_others(what, before.get("lists", lists), lists)
                study.set_user_attr("settings", common)
                study.set_user_attr("lists", lists)
                if url:
                    optuna.storages.fail_stale_trials(study)
                else:  # what was under way when the process that used the file died
                    for trial in study.get_trials(states=(TrialState.RUNNING,)):
                        study.tell(trial.number, state=TrialState.FAIL)
                        study.enqueue_trial(trial.params)
                opened = cls(config, folder, study)
                opened._enqueue_folder()
                yield opened

    def next_job(self, train: Callable[..., dict]) -> Callable[..., None] | None:
        """A function that runs a trial with an environment; ``None`` if there are enough.

        Other calls wait until its trial is in the study and counted.
        """
        with contextlib.ExitStack() as lock:
            lock.enter_context(self._lock)
            if self.counted() >= self.total:
                return None
            held = lock.pop_all()

        def run(environment: dict) -> None:
            with held:
                self.study.optimize(
                    lambda trial: self._objective(trial, train, environment, held), n_trials=1,
                    catch=(RuntimeError,))

        return run

    def records(self) -> dict[str, dict]:
        """The ``trial.json`` of every trial, also on other machines."""
        return {trial.user_attrs["record"]["trial"]: trial.user_attrs["record"]
                for trial in self.study.get_trials(deepcopy=False) if "record" in trial.user_attrs}

    def idle(self) -> bool:
        """Whether all trials have ended, here and on other machines."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return not running and self.counted() >= self.total

    def counted(self) -> int:
        """Trials that ended or run. An interrupted one is queued again and not counted."""
        return sum(trial.state in _COUNTED or "record" in trial.user_attrs  # failed by itself
                   for trial in self.study.get_trials(deepcopy=False))

    def _objective(self, trial: optuna.Trial, train: Callable[..., dict],
                   environment: dict, lock: contextlib.ExitStack) -> float:
        lock.close()
        point = _suggest(trial, self.config.search)
        steps = rungs(self.config.search)
        try:
            for number, (epochs, episodes) in enumerate(steps):
                if is_past(self.folder / trial_name(point), epochs):
                    continue  # trained by a grid, which measures at the last epoch only
                found = train(point, epochs=epochs, episodes=episodes, environment=environment)
                trial.report(value_of(found), REDUCTION ** number)
                if number < len(steps) - 1 and trial.should_prune():
                    raise optuna.TrialPruned
        except KeyboardInterrupt:
            self.study.enqueue_trial(trial.params)
            raise
        except (RuntimeError, optuna.TrialPruned):
            self._record(trial, point)
            raise
        self._record(trial, point)
        return value_of(found)

    def _record(self, trial: optuna.Trial, point: dict) -> None:
        trial.set_user_attr("record", read_trial(self.folder / trial_name(point)))

    def _enqueue_folder(self) -> None:
        """Queue the complete trials in the folder that the study does not know."""
        search, known = self.config.search, self.records()
        for name, record in read_trials(self.folder, self.config).items():
            point, _ = point_of(record["parameters"], search)
            complete = record["rungs"] and record["rungs"][-1]["epochs"] == search.search_epochs
            if complete and name == trial_name(point) and name not in known and all(
                    min(values) <= point[axis] <= max(values) if axis == "lr"
                    else point[axis] in values for axis, values in axes(search).items()):
                self.study.enqueue_trial(point, skip_if_exists=True)


def _lists(search: SearchConfig) -> dict[str, list]:
    """The axes with a list of values, which Optuna cannot change within a study."""
    return {name: list(values) for name, values in axes(search).items()
            if name != "lr" or len(values) == 1}


def _suggest(trial: optuna.Trial, search: SearchConfig) -> dict:
    """A point: any learning rate between the ends, the other settings from their lists."""
    point = {name: trial.suggest_categorical(name, values)
             for name, values in _lists(search).items()}
    if "lr" not in point:
        rate = trial.suggest_float("lr", min(search.search_lrs), max(search.search_lrs), log=True)
        point = {"lr": float(f"{rate:g}"), **point}  # as in the trial's name
    return point


def _storage(url: str, folder: Path) -> BaseStorage:
    if not url:
        return JournalStorage(JournalFileBackend(str(folder / STUDY)))
    waits = {"connect_args": {"timeout": _SQLITE_WAITS}} if url.startswith("sqlite") else None
    renamed = hasattr(optuna.storages, "RetryHeartbeatStaleTrialCallback")  # not in Optuna 4.5
    retry = (optuna.storages.RetryHeartbeatStaleTrialCallback if renamed
             else optuna.storages.RetryFailedTrialCallback)(_RETRIES)
    return RDBStorage(
        url, engine_kwargs=waits, heartbeat_interval=_HEARTBEAT, grace_period=_GRACE,
        **{"heartbeat_stale_trial_callback" if renamed else "failed_trial_callback": retry})


_DATABASE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError,
                    ImportError)


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """Turn a database error into one that names the database, without the password in its URL."""
    try:
        yield
    except Exception as raised:
        error = raised  # or its cause: Optuna's own clean-up can raise over a database's error
        while error is not None and not isinstance(error, _DATABASE_ERRORS):
            error = error.__cause__ or error.__context__
        if error is None or not url:
            raise
        shown, reason = (re.sub(r":(?!//)\S*@", ":***@", text).partition("?")[0]
                         for text in (url, str(error).splitlines()[0]))
        raise ConnectionError(
            f"search_storage={shown!r} does not answer ({reason}); expected the URL of a database "
            "that can be reached, such as sqlite:////shared/study.db or "
            "postgresql://user@host/name, and its driver installed. Completed trials are kept; the "
            "same call resumes") from None
