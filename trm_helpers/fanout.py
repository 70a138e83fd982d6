"""Jobs over the processes of this machine or of a cluster, through joblib, none lost or doubled."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed, parallel_config

from .files import write_json

_ATTEMPTS = 2
_ANSWER_WITHIN = 15.0  # seconds, for a cluster's address


def run_jobs(job: Callable[[Any], dict], items: Sequence, folder: Path, *, workers: int = 1,
             cluster: str = "", limit: float = 900.0) -> Iterator[tuple[Any, dict | None, str]]:
    """Yield ``(item, result, error)`` as they end: ``job(item)``, or None and what went wrong.

    What raises, takes longer than ``limit`` or loses its process is tried once more before it
    counts as an error.

    Args:
        job: returns JSON; anything that the workers can import or unpickle.
        folder: made for the call and removed after it: which attempts began and what they gave. On
            a cluster all machines have to see it.
        workers: processes here; 1 works in this process, without a limit of time.
        cluster: of a Dask scheduler (``tcp://host:8786``) or of Ray (``ray://host:10001``, or
            ``ray`` for the one this machine belongs to), which then has its own number of workers.
            One thread for each: a simulator is not for two.
        limit: seconds; a process that takes longer is ended.

    Raises:
        ConnectionError: no cluster answers at its address.
        RuntimeError: the package of the cluster is not installed.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    attempts = folder / uuid.uuid4().hex  # a cluster may still be writing for that one
    attempts.mkdir(parents=True)
    waiting = dict(enumerate(items))
    try:
        if not cluster and workers == 1:
            while waiting:
                yield from _one_round(map, job, waiting, attempts, 0.0, 0)
            return
        parent = 0 if cluster else os.getpid()
        with _backend(cluster, workers) as parallel:
            while waiting:
                yield from _one_round(parallel, job, waiting, attempts, limit, parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _one_round(run: Callable, job, waiting: dict[int, Any], folder: Path, limit: float,
               parent: int) -> Iterator[tuple]:
    """Everything that waits, once; takes out of ``waiting`` what is settled.

    ``run(function, calls)`` gives ``function(call)`` of each, as they end.
    """

    def settle(index: int, result: dict | None, error: str):
        if not error or _begun(folder, index) >= _ATTEMPTS:
            yield waiting.pop(index), result, error

    def attempts(indices):
        calls = [(job, waiting[index], folder, index, _begun(folder, index), limit, parent)
                 for index in indices]
        return run(_attempt, calls)

    before = set(folder.iterdir())
    try:
        for outcome in attempts(list(waiting)):
            yield from settle(*outcome)
    except _broken_pool():
        # results that were on their way
        for index in list(waiting):
            written = _result_file(folder, index, _begun(folder, index) - 1)
            if written not in before and written.exists():
                yield from settle(*json.loads(written.read_text()))
        # one of those under way ended its process, and with it all: each alone now
        begun = {path for path in folder.glob("*.begun")} - before
        for index in sorted({int(path.name.split(".")[0]) for path in begun} & set(waiting)):
            try:
                (outcome,) = attempts([index])
            except _broken_pool():
                outcome = (index, None, _lost(limit))
            yield from settle(*outcome)


def _attempt(call: tuple) -> tuple[int, dict | None, str]:
    """``(index, result, error)`` of one attempt; in a worker."""
    job, item, folder, index, attempt, limit, parent = call
    result_file = _result_file(folder, index, attempt)
    if result_file.exists():  # a cluster lost the answer with the worker that held it
        return tuple(json.loads(result_file.read_text()))
    begun = _begun(folder, index)
    if begun >= _ATTEMPTS:  # a cluster gives what it lost to another worker by itself
        return index, None, _lost(limit)
    (folder / f"{index}.{begun}.begun").touch()
    if parent:
        belong_to(parent)
    with _watched(limit):
        try:
            outcome = (index, job(item), "")
        except Exception as error:  # whatever a policy or the simulator raises
            outcome = (index, None, f"{type(error).__name__}: {error}")
    write_json(result_file, outcome)
    return outcome


def _begun(folder: Path, index: int) -> int:
    return len(list(folder.glob(f"{index}.*.begun")))


def _result_file(folder: Path, index: int, attempt: int) -> Path:
    return folder / f"{index}.{attempt}.json"


def _lost(limit: float) -> str:
    return f"its process died, or took longer than {limit:g} s"


@functools.cache  # once in a process
def belong_to(parent: int) -> None:
    """End with the process ``parent``, however that ends, also between jobs; leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _watched(limit: float):
    """End this process, and show where it is, when ``limit`` seconds are over; 0 is no limit.

    From a thread that Python's lock does not hold up, as the simulator may.
    """
    if not limit:
        yield
        return
    faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


# --- backends ------------------------------------------------------------------------------------
@contextlib.contextmanager
def _backend(cluster: str, workers: int) -> Iterator[Callable]:
    """A function like ``map`` that gives results as they come, from where the jobs go."""

    def parallel(function: Callable, calls: list) -> Iterator:
        run = Parallel(n_jobs=-1 if cluster else workers, return_as="generator_unordered",
                       batch_size=1, pre_dispatch="n_jobs")
        return run(delayed(function)(call) for call in calls)

    if not cluster:
        with parallel_config(backend="loky", inner_max_num_threads=1):
            yield parallel
    elif cluster.startswith("ray"):
        with _installed("ray"):
            import ray
            from ray.util.multiprocessing import Pool  # joblib's backend, but results as they come

        def pool(function: Callable, calls: list) -> Iterator:
            with Pool() as made:
                for outcome in made.imap_unordered(function, calls, chunksize=1):
                    if isinstance(outcome, Exception):  # Ray hands out what a lost worker means
                        raise outcome
                    yield outcome

        try:
            ray.init(address="auto" if cluster == "ray" else cluster, ignore_reinit_error=True)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise ConnectionError(f"no Ray cluster answers at {cluster!r} ({error}); "
                                  "start one with `ray start --head`") from error
        yield pool
    else:
        with _installed("dask"):
            from distributed import Client

        try:
            client = Client(cluster, timeout=_ANSWER_WITHIN)
        except (OSError, ValueError, TimeoutError) as error:
            raise ConnectionError(f"no Dask scheduler answers at {cluster!r} ({error}); start one "
                                  "with `dask scheduler` and workers with "
                                  "`dask worker ADDRESS --nthreads 1`") from error
        with client, parallel_config(backend="dask"):
            yield parallel


@contextlib.contextmanager
def _installed(extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise RuntimeError(f"this cluster needs a package that is not installed ({error}); "
                           f"expected it from pip install 'trm-helpers[{extra}]'") from error


def _broken_pool() -> tuple[type[BaseException], ...]:
    """What is raised when a process of the pool died."""
    kinds: list[type[BaseException]] = [BrokenExecutor]
    distributed = sys.modules.get("distributed")
    if distributed is not None:
        kinds.append(distributed.scheduler.KilledWorker)
    ray = sys.modules.get("ray")
    if ray is not None:
        kinds.append(ray.exceptions.RayActorError)
    return tuple(kinds)
