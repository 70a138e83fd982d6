"""Run jobs in processes of this machine or on a Dask cluster; start processes of our own.

A process started here never runs the caller's main module (a script without a guard, a notebook,
standard input), and ends with its parent, however the parent ends.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import faulthandler
import functools
import ipaddress
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cloudpickle

from ..opengl import renderer
from ..software import free_memory

_ATTEMPTS = 2
_POLL_SECONDS = 1.0
_IDLE_SECONDS = 120.0  # for which a worker waits for another job
PROCESS_BYTES = 2_000_000_000  # resident, with one environment of LIBERO-Spatial on a CPU
_CONNECT_SECONDS = 15.0  # for a scheduler to answer
_NO_WORKER_SECONDS = 60.0  # after which a cluster without workers is given up
_START_CLUSTER = ("start one with `dask scheduler --host 127.0.0.1` and workers with "
                  "`dask worker ADDRESS --nthreads 1`")


class WorkerDied(RuntimeError):
    """The process of a job was killed or ended by itself."""


def run_jobs(job: Callable[[Any], Any], items: Sequence, *, workers: int | None = None,
             cluster: str = "", limit: float = 900.0, keep: bool = False,
             group: Callable[[Any], Hashable] = lambda item: None,
             wanted: Callable[[Any], bool] = lambda item: True,
             ) -> Iterator[tuple[Any, Any, Exception | None]]:
    """Yield ``(item, job(item), None)`` or ``(item, None, error)`` as the jobs end.

    A job that raises, exceeds ``limit`` or loses its process is run once more. Its second error is
    final: what the job raised, ``TimeoutError`` or :class:`WorkerDied`.

    Args:
        job: pickled with cloudpickle, so it may be defined in a script or a notebook.
        items: may be appended to while the results are consumed.
        group: of an item, for example its task. A process takes items of its own group as long as
            there are any; then of a group without a process, else of the group with the most items
            left per process. So few environments are built. A cluster ignores it.
        wanted: asked, often, of each item that waits; one that is not wanted is dropped.
        workers: single-threaded processes on this machine. ``None`` is :func:`default_workers`; 0
            runs the jobs in this process.
        cluster: address of a Dask scheduler. The cluster sets the number of workers and how often
            a job that loses its process is run (``distributed.scheduler.allowed-failures``).
        limit: seconds per job, including the start of its process; 0 means no limit. In this
            process a job that hangs outside of Python is not stopped, only its traceback printed.
        keep: keep the processes for the next call, for up to two minutes.

    Raises:
        ValueError: ``workers`` is negative.
        ConnectionError: no scheduler answers at ``cluster``, or all workers are lost.
        RuntimeError: Dask is not installed.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers} is not valid; expected at least 0, or None")
    if cluster:
        yield from _on_cluster(job, items, cluster, limit, wanted)
    elif workers == 0:
        yield from _in_this_process(job, items, limit, wanted)
    else:
        yield from _in_processes(job, items, workers or default_workers(), limit, keep, group,
                                 wanted)


def default_workers() -> int:
    """One per CPU core, at most 8 and at most as many as the free memory holds; at least 1."""
    return max(1, min(len(os.sched_getaffinity(0)), 8, free_memory() // PROCESS_BYTES))


def _in_this_process(job: Callable, items: Sequence, limit: float, wanted: Callable
                     ) -> Iterator[tuple]:
    for item in items:
        if not wanted(item):
            continue
        for _ in range(_ATTEMPTS):
            result, error = None, None
            try:
                with _interrupt_after(limit):
                    result = _call_watched(job, 2 * limit, False, item)
                break
            except Exception as raised:  # whatever a policy or the simulator raises
                error = raised
        yield item, result, error


@contextlib.contextmanager
def _interrupt_after(limit: float) -> Iterator[None]:
    """Raise ``TimeoutError`` after ``limit`` seconds, in Python code of the main thread."""
    if not limit or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_) -> None:
        raise TimeoutError(f"a job took longer than {limit:g} s")

    handler, began = signal.signal(signal.SIGALRM, interrupt), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if left:  # the caller's own timer goes on; one that ran out meanwhile rings at once
            left = max(left - (time.monotonic() - began), 1e-6)
            signal.setitimer(signal.ITIMER_REAL, left, interval)


def _call_watched(job: Callable, limit: float, end: bool, item: Any) -> Any:
    """``job(item)``; after ``limit`` seconds print its traceback and, with ``end``, exit.

    faulthandler's thread needs no GIL, which a simulator that hangs may hold.
    """
    if limit and sys.__stderr__:  # None where it was closed
        faulthandler.dump_traceback_later(limit, exit=end, file=sys.__stderr__)
    try:
        return job(item)
    finally:
        faulthandler.cancel_dump_traceback_later()


# --- processes of this machine -------------------------------------------------------------------
_START = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from trm_helpers.sim.parallel import _begin
_begin(connection, int(sys.argv[2]))
"""


def start_process(function: Callable, *arguments, environment: Mapping[str, str] | None = None,
                  output=None) -> tuple[subprocess.Popen, Connection]:
    """Call ``function(connection, *arguments)`` in a new Python process.

    Ctrl-C does not reach the process. The system kills it when the thread that started it ends.

    ``environment`` is added to that of this process; ``output`` is a file for standard output and
    error. Returns the process and this end of its ``connection``.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:  # a standard stream was closed
        os.set_inheritable(opened, True)
    os.close(opened)
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), str(os.getpid())],
            env={**os.environ, **(environment or {})}, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    with contextlib.suppress(OSError):  # it ended at once; its exit code tells
        ours.send(sys.path)
        ours.send_bytes(cloudpickle.dumps((function, arguments)))
    return process, ours


def _begin(connection: Connection, parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # the parent ended before that call
        os._exit(1)
    os.set_inheritable(connection.fileno(), False)
    function, arguments = pickle.loads(connection.recv_bytes())
    function(connection, *arguments)


def _in_processes(job: Callable, items: Sequence, size: int, limit: float, keep: bool,
                  group: Callable, wanted: Callable) -> Iterator[tuple]:
    renderer()  # chosen once: workers inherit it
    idle, running = _Worker.take_idle(size), []
    waiting, known = [], 0
    try:
        while True:
            waiting += [(item, 1) for item in items[known:]]
            known = len(items)
            waiting = [(item, attempt) for item, attempt in waiting if wanted(item)]
            for worker in [each for each in idle if each.process.poll() is not None]:
                idle.remove(worker)
                worker.end()  # it had no job for _IDLE_SECONDS
            while waiting and len(running) < size:
                worker = idle.pop() if idle else _Worker()
                groups = [group(item) for item, _ in waiting]
                chosen = _next_group(groups, worker.group, [each.group for each in running])
                worker.group = chosen
                running.append(worker)  # first, as an item that cannot be pickled raises
                worker.begin(job, *waiting.pop(groups.index(chosen)), limit)
            if not running:
                return
            for worker, result, error in _Worker.ended(running):
                running.remove(worker)
                if worker.process.poll() is None:
                    idle.append(worker)
                if error and worker.attempt < _ATTEMPTS:
                    waiting.append((worker.item, worker.attempt + 1))
                else:
                    yield worker.item, result, error
    finally:
        if keep:
            _Worker.idle += idle
        for worker in running if keep else running + idle:
            worker.end()


def _next_group(waiting: Sequence[Hashable], own: Hashable, elsewhere: Sequence[Hashable]
                ) -> Hashable:
    """The group, of those of the waiting items, from which a process takes its next item."""
    if own in waiting:
        return own
    left, processes = collections.Counter(waiting), collections.Counter(elsewhere)
    return max(left, key=lambda group: (group not in processes,
                                        left[group] / max(1, processes[group])))


class _Worker:
    """A process that runs one job after another, until none has come for ``_IDLE_SECONDS``."""

    idle: list[_Worker] = []  # kept for the next call
    group: Hashable = None  # of its last item

    def __init__(self):
        self.inherited = _inherited()
        self.process, self.connection = start_process(_work, environment={"OMP_NUM_THREADS": "1"})

    @classmethod
    def take_idle(cls, most: int) -> list[_Worker]:
        """Workers kept by an earlier call in the same surroundings; the others are ended."""
        kept, cls.idle[:] = list(cls.idle), []
        usable = [worker for worker in kept
                  if worker.process.poll() is None and worker.inherited == _inherited()][:most]
        for worker in kept:
            if worker not in usable:
                worker.end()
        return usable

    def begin(self, job: Callable, item: Any, attempt: int, limit: float) -> None:
        self.item, self.attempt, self.limit = item, attempt, limit
        self.deadline = time.monotonic() + (limit or math.inf)
        call = cloudpickle.dumps((job, item))
        with contextlib.suppress(OSError):  # the process has died; `ended` notices
            self.connection.send_bytes(call)

    @staticmethod
    def ended(workers: Sequence[_Worker]) -> Iterator[tuple[_Worker, Any, Exception | None]]:
        """Wait up to a second; each worker whose job has ended, its result and its error."""
        remaining = min(worker.deadline for worker in workers) - time.monotonic()
        answered = wait([worker.connection for worker in workers],
                        max(0.0, min(remaining, _POLL_SECONDS)))
        for worker in list(workers):
            if worker.connection in answered or worker.connection.poll():
                yield worker, *worker.answer()
            elif worker.process.poll() is not None:
                yield worker, None, worker.cause_of_death()
            elif time.monotonic() >= worker.deadline:
                worker.process.send_signal(signal.SIGUSR1)  # it prints its traceback
                time.sleep(0.2)
                worker.end()
                yield worker, None, TimeoutError(f"a job took longer than {worker.limit:g} s")

    def answer(self) -> tuple[Any, Exception | None]:
        try:
            result, error, trace = self.connection.recv()
        except (EOFError, OSError):
            return None, self.cause_of_death()
        if error:
            error.__cause__ = RuntimeError(f"in a worker:\n{trace}")
        return result, error

    def cause_of_death(self) -> WorkerDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_POLL_SECONDS)  # the connection closes a little earlier
        code = self.process.poll() or 0
        self.end()
        if code >= 0:
            return WorkerDied(f"a worker process ended with exit code {code}; see its messages")
        memory = ", as when memory runs out" if -code == signal.SIGKILL else ""
        return WorkerDied(f"a worker process was killed by {signal.Signals(-code).name}{memory}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def _inherited() -> tuple:
    """What a process takes over from its parent when it starts."""
    return dict(os.environ), os.getcwd(), list(sys.path)


def _work(connection: Connection) -> None:
    """In a worker: one job after another, until none has come for a while."""
    with contextlib.suppress(OSError):  # out of memory, this process is killed before its parent
        Path("/proc/self/oom_score_adj").write_text("500")
    os.dup2(2, 1)  # standard output is the caller's, which may print JSON
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    while connection.poll(_IDLE_SECONDS):
        try:
            call = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            job, item = pickle.loads(call)
            answer = cloudpickle.dumps((job(item), None, ""))
            pickle.loads(answer)  # as the parent does, where an error would end the other jobs
        except Exception as error:
            trace = traceback.format_exc()
            try:
                answer = cloudpickle.dumps((None, error, trace))
                pickle.loads(answer)
            except Exception:  # not every exception can be pickled and rebuilt
                error = RuntimeError(f"{type(error).__name__}: {error}")
                answer = pickle.dumps((None, error, trace))
        connection.send_bytes(answer)


# --- a cluster -----------------------------------------------------------------------------------
def _on_cluster(job: Callable, items: Sequence, address: str, limit: float, wanted: Callable
                ) -> Iterator[tuple]:
    client, running = _connect(address), {}
    begun, threads, seen = 0, 1, time.monotonic()  # seen: when there was a worker
    try:
        while running or begun < len(items):
            # never more jobs than threads: a worker that dies takes its queued jobs along
            while begun < len(items) and len(running) < threads:
                if wanted(items[begun]):
                    future = client.submit(_call_watched, job, limit, True, items[begun],
                                           pure=False, retries=_ATTEMPTS - 1)
                    running[future] = items[begun]
                begun += 1
            now, done = _poll(client, address, list(running))
            if now:
                threads, seen = now, time.monotonic()
            elif time.monotonic() > seen + _NO_WORKER_SECONDS:
                raise ConnectionError(f"the Dask scheduler at {address!r} has had no worker for "
                                      f"{_NO_WORKER_SECONDS:g} s; {_START_CLUSTER}")
            for future in done:
                error = future.exception()
                if type(error).__name__ == "KilledWorker":
                    error = WorkerDied("a job lost one worker after another, or took longer "
                                       f"than {limit:g} s")
                yield running.pop(future), None if error else future.result(), error
    finally:
        client.close(timeout=_CONNECT_SECONDS)  # the cluster drops unfinished jobs


def _connect(address: str):
    try:
        from distributed import Client
    except ImportError as error:
        raise RuntimeError(f"a cluster needs a package that is not installed ({error}); "
                           "expected it from pip install 'trm-helpers[dask]'") from error
    _warn_if_open(address)
    try:
        return Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError, TypeError) as error:
        raise ConnectionError(f"no Dask scheduler answers at {address!r} ({error}); "
                              f"{_START_CLUSTER}") from error


def _poll(client, address: str, futures: Sequence) -> tuple[int, Iterable]:
    """Threads of the cluster now, and the futures that are done, after up to a second."""
    import distributed

    try:
        threads, done = sum(client.nthreads().values()), ()
        with contextlib.suppress(distributed.TimeoutError):
            done, _ = distributed.wait(futures, _POLL_SECONDS, "FIRST_COMPLETED")
        return threads, done
    except (distributed.CancelledError, OSError) as error:
        raise ConnectionError(f"the Dask scheduler at {address!r} is lost; finished jobs are "
                              "kept, and the same call continues") from error


@functools.cache  # one warning per address
def _warn_if_open(address: str) -> None:
    """Warn of a scheduler that runs code from anybody, and whose answers run code here."""
    scheme, _, place = address.rpartition("://")
    host = urlsplit(f"//{place}").hostname or ""
    with contextlib.suppress(ValueError):  # a name
        host = "localhost" if ipaddress.ip_address(host).is_loopback else host
    if scheme not in ("tls", "wss", "inproc") and host != "localhost":
        print(f"warning: the Dask cluster at {address} has no authentication: whoever reaches it "
              "can run code on all its machines, and on this one through its answers. Use "
              "tls://, or bind it to 127.0.0.1 and reach it through an ssh tunnel.",
              file=sys.stderr, flush=True)
