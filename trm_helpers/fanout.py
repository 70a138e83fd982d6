"""Jobs over processes of this machine or a Dask cluster, each settled once; processes of our own.

A process started here never runs the caller's main module, whatever that is (a script without a
guard, a notebook, standard input), and ends with its parent, however that ends.
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
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import cloudpickle

_ATTEMPTS = 2
_LOOK_EVERY = 1.0  # seconds between looks at whether workers live
_KEPT = 120.0  # seconds for which an idle worker waits for another call
_ANSWER_WITHIN = 15.0  # seconds, for a cluster's address
_WORKERS_WITHIN = 60.0  # seconds without any worker after which a cluster is given up

Outcome = tuple[Any, "Exception | None"]


class WorkerDied(RuntimeError):
    """The process of a job was killed or ended by itself."""


def run_jobs(job: Callable[[Any], Any], items: Sequence, *, workers: int = 0, cluster: str = "",
             limit: float = 900.0, keep: bool = False
             ) -> Iterator[tuple[Any, Any, Exception | None]]:
    """Yield ``(item, job(item), None)`` as they end, or ``(item, None, error)``.

    A job that raises, takes longer than ``limit`` or loses its process is tried once more before
    that is its error: what it raised, ``TimeoutError`` or :class:`WorkerDied`.

    Args:
        job: pickled by cloudpickle, so that functions of a script or a notebook are fine too.
        items: the caller may append to a list while it takes the results.
        workers: processes on this machine, with one thread each; 0 works in this process.
        cluster: address of a Dask scheduler, which then has its own number of workers and, for a
            job that loses its process, its own number of attempts
            (``distributed.scheduler.allowed-failures``).
        limit: seconds for a job, the start of its process included; 0 is none. In this process a
            job that takes longer goes on, and a traceback shows where it is.
        keep: let the processes wait for the next call, for up to two minutes.

    Raises:
        ConnectionError: no cluster answers at its address, or it has lost all its workers.
        RuntimeError: the cluster's package is not installed.
    """
    waiting: collections.deque[int] = collections.deque()
    begun, known = collections.Counter(), 0
    with contextlib.ExitStack() as stack:
        if cluster:
            crew = stack.enter_context(_Dask(job, cluster, limit))
        elif workers:
            crew = stack.enter_context(_Processes(job, workers, limit, keep))
        else:
            crew = _ThisProcess(job, limit)
        while True:
            waiting.extend(range(known, len(items)))
            known = len(items)
            while waiting and crew.is_free():
                index = waiting.popleft()
                begun[index] += 1
                crew.begin(index, items[index])
            if not crew.running:
                return
            for index, (result, error) in crew.ended():
                if error and begun[index] < crew.attempts:
                    waiting.append(index)
                else:
                    yield items[index], result, error


class _ThisProcess:
    attempts = _ATTEMPTS

    def __init__(self, job: Callable, limit: float):
        self.job, self.limit, self.running = job, limit, []

    def is_free(self) -> bool:
        return not self.running

    def begin(self, index: int, item: Any) -> None:
        self.running.append((index, item))

    def ended(self) -> Iterator[tuple[int, Outcome]]:
        index, item = self.running.pop()
        try:
            with _watched(self.limit, end=False):
                outcome = self.job(item), None
        except Exception as error:  # whatever a policy or the simulator raises
            outcome = None, error
        yield index, outcome


@contextlib.contextmanager
def _watched(limit: float, end: bool) -> Iterator[None]:
    """Show where this process is when ``limit`` seconds are over, and end it there or go on.

    From a thread that Python's lock does not hold up, as the simulator may. 0 is no limit.
    """
    if not limit:
        yield
        return
    faulthandler.dump_traceback_later(limit, exit=end, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


# --- processes of this machine -------------------------------------------------------------------
_START = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from trm_helpers.fanout import _begin
_begin(connection, int(sys.argv[2]))
"""


def start_process(function: Callable, *arguments, environment: Mapping[str, str] | None = None,
                  output=None) -> tuple[subprocess.Popen, Connection]:
    """Call ``function(connection, *arguments)`` in a Python process of its own.

    Ctrl-C does not reach it. When the thread that starts it ends, the system kills it.

    Args:
        environment: variables for it alone, beside those of this process.
        output: a file for what it prints, instead of where this process prints.

    Returns:
        the process, and the other end of its ``connection``.
    """
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), str(os.getpid())],
            env={**os.environ, **(environment or {})}, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    with contextlib.suppress(OSError):  # it ended at once, which its exit code tells
        ours.send(sys.path)
        ours.send_bytes(cloudpickle.dumps((function, arguments)))
    return process, ours


def _begin(connection: Connection, parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
    os.set_inheritable(connection.fileno(), False)
    function, arguments = pickle.loads(connection.recv_bytes())
    function(connection, *arguments)


class _Worker:
    """A process that works on one job after another, and what it was started with."""

    idle: list[_Worker] = []  # those that wait for another call

    def __init__(self):
        self.surroundings = _surroundings()
        self.process, self.connection = start_process(
            _work, environment={"OMP_NUM_THREADS": "1"})

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def answer(self) -> Outcome:
        result, error, told = self.connection.recv()
        if error:
            error.__cause__ = RuntimeError(f"in a worker:\n{told}")
        return result, error

    def fate(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_LOOK_EVERY)  # its end of the connection closes a little earlier
        code = self.process.poll()
        if code is None:
            return "a worker process closed its connection"
        if code >= 0:
            return f"a worker process ended with exit code {code}; see its messages"
        by = signal.Signals(-code).name
        memory = ", as when memory runs out" if by == "SIGKILL" else ""
        return f"a worker process was killed by {by}{memory}"


class _Busy(NamedTuple):
    index: int
    until: float


class _Processes:
    attempts = _ATTEMPTS

    def __init__(self, job: Callable, workers: int, limit: float, keep: bool):
        self.job, self.workers, self.limit, self.keep = job, workers, limit or math.inf, keep
        self.running: dict[_Worker, _Busy] = {}
        self.idle: list[_Worker] = []

    def __enter__(self) -> _Processes:
        surroundings = _surroundings()
        while _Worker.idle:
            worker = _Worker.idle.pop()
            if (worker.process.poll() is None and worker.surroundings == surroundings
                    and len(self.idle) < self.workers):
                self.idle.append(worker)
            else:
                worker.end()
        return self

    def __exit__(self, *_) -> None:
        for worker in self.running:
            worker.end()
        if self.keep:
            _Worker.idle += self.idle
        else:
            for worker in self.idle:
                worker.end()

    def is_free(self) -> bool:
        return len(self.running) < self.workers

    def begin(self, index: int, item: Any) -> None:
        call = cloudpickle.dumps((self.job, item))
        worker = self.idle.pop() if self.idle else _Worker()
        self.running[worker] = _Busy(index, time.monotonic() + self.limit)
        with contextlib.suppress(OSError):  # it has died: `ended` finds that out
            worker.connection.send_bytes(call)

    def ended(self) -> Iterator[tuple[int, Outcome]]:
        until = min(busy.until for busy in self.running.values()) - time.monotonic()
        ready = wait([worker.connection for worker in self.running],
                     max(0.0, min(until, _LOOK_EVERY)))
        for worker, busy in list(self.running.items()):
            lost: Exception | None = None
            if worker.connection in ready:
                try:
                    outcome = worker.answer()
                except (EOFError, OSError):
                    lost = WorkerDied(worker.fate())
            elif worker.process.poll() is not None:
                lost = WorkerDied(worker.fate())
            elif time.monotonic() >= busy.until:
                lost = TimeoutError(f"a job took longer than {self.limit:g} s")
                worker.process.send_signal(signal.SIGUSR1)  # it shows where it is
                time.sleep(0.2)
            else:
                continue
            del self.running[worker]
            if lost:
                worker.end()
            else:
                self.idle.append(worker)
            yield busy.index, (None, lost) if lost else outcome


def _surroundings() -> tuple:
    """What a process takes over when it starts."""
    return dict(os.environ), os.getcwd(), list(sys.path)


def _work(connection: Connection) -> None:
    """In a worker: one job after another, until the parent has had none for a while."""
    os.dup2(2, 1)  # standard output is the caller's, who may print JSON there
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    while connection.poll(_KEPT):
        try:
            call = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            job, item = pickle.loads(call)
            answer = cloudpickle.dumps((job(item), None, ""))
        except Exception as error:
            told = traceback.format_exc()
            try:
                answer = cloudpickle.dumps((None, error, told))
                pickle.loads(answer)
            except Exception:  # some errors cannot be made again from what they hold
                error = RuntimeError(f"{type(error).__name__}: {error}")
                answer = pickle.dumps((None, error, told))
        connection.send_bytes(answer)


# --- a cluster -----------------------------------------------------------------------------------
class _Dask:
    attempts = 1  # Dask makes the others

    def __init__(self, job: Callable, address: str, limit: float):
        try:
            from distributed import Client
        except ImportError as error:
            raise RuntimeError(f"a cluster needs a package that is not installed ({error}); "
                               "expected it from pip install 'trm-helpers[dask]'") from error
        _warn_if_open(address)
        self.job = functools.partial(_watched_job, job, limit)
        self.address, self.limit, self.running = address, limit, {}
        self.threads, self.since = 1, time.monotonic()  # when there were some
        try:
            self.client = Client(address, timeout=_ANSWER_WITHIN)
        except (OSError, ValueError, TypeError) as error:
            raise ConnectionError(f"no Dask scheduler answers at {address!r} ({error}); {_HOW}"
                                  ) from error

    def __enter__(self) -> _Dask:
        return self

    def __exit__(self, *_) -> None:
        self.client.close(timeout=_ANSWER_WITHIN)  # the cluster drops what nobody waits for

    def is_free(self) -> bool:
        # no more than can be under way: a worker that dies takes those that wait for it along
        return len(self.running) < self.threads

    def begin(self, index: int, item: Any) -> None:
        future = self.client.submit(self.job, item, pure=False, retries=_ATTEMPTS - 1)
        self.running[future] = index

    def ended(self) -> Iterator[tuple[int, Outcome]]:
        from distributed import CancelledError, KilledWorker, wait

        done = ()
        try:
            threads = sum(self.client.nthreads().values())
            with contextlib.suppress(TimeoutError):
                done, _ = wait(list(self.running), timeout=_LOOK_EVERY,
                               return_when="FIRST_COMPLETED")
        except (CancelledError, OSError) as error:
            raise ConnectionError(f"the Dask scheduler at {self.address!r} is lost; "
                                  "what has ended is kept, and the same call continues") from error
        if threads:
            self.threads, self.since = threads, time.monotonic()
        elif time.monotonic() > self.since + _WORKERS_WITHIN:
            raise ConnectionError(f"the Dask scheduler at {self.address!r} has had no worker for "
                                  f"{_WORKERS_WITHIN:g} s; {_HOW}")
        for future in done:
            error = future.exception()
            if isinstance(error, KilledWorker):
                error = WorkerDied("a job lost one worker after another, or took longer "
                                   f"than {self.limit:g} s")
            yield self.running.pop(future), (None if error else future.result(), error)


_HOW = ("start one with `dask scheduler --host 127.0.0.1` and workers with "
        "`dask worker ADDRESS --nthreads 1`")


def _watched_job(job: Callable, limit: float, item: Any) -> Any:
    with _watched(limit, end=True):
        return job(item)


@functools.cache  # once for each
def _warn_if_open(address: str) -> None:
    """Dask's scheduler runs what anybody sends it, and its answers run here."""
    scheme, _, place = address.rpartition("://")
    host = urlsplit(f"//{place}").hostname or ""
    with contextlib.suppress(ValueError):  # a name
        host = "localhost" if ipaddress.ip_address(host).is_loopback else host
    if scheme not in ("tls", "wss", "inproc") and host != "localhost":
        print(f"warning: the Dask cluster at {address} has no authentication: whoever reaches it "
              "can run code on all its machines, and on this one through its answers. Use "
              "tls://, or bind it to 127.0.0.1 and reach it through an ssh tunnel.",
              file=sys.stderr, flush=True)
