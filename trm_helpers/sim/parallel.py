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
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cloudpickle

_ATTEMPTS = 2
_LOOK_EVERY = 1.0  # seconds between looks at whether workers live
_KEPT = 120.0  # seconds for which an idle worker waits for another call
_ANSWER_WITHIN = 15.0  # seconds, for a cluster's address
_WORKERS_WITHIN = 60.0  # seconds without any worker after which a cluster is given up


class WorkerDied(RuntimeError):
    """The process of a job was killed or ended by itself."""


def run_jobs(job: Callable[[Any], Any], items: Sequence, *, workers: int | None = None,
             cluster: str = "", limit: float = 900.0, keep: bool = False
             ) -> Iterator[tuple[Any, Any, Exception | None]]:
    """Yield ``(item, job(item), None)`` as they end, or ``(item, None, error)``.

    A job that raises, takes longer than ``limit`` or loses its process is tried once more before
    that is its error: what it raised, ``TimeoutError`` or :class:`WorkerDied`.

    Args:
        job: pickled by cloudpickle, so that functions of a script or a notebook are fine too.
        items: the caller may append to a list while it takes the results.
        workers: processes on this machine, with one thread each; ``None`` is one per CPU core, at
            most 8, and 0 works in this process.
        cluster: address of a Dask scheduler, which then has its own number of workers and, for a
            job that loses its process, its own number of attempts
            (``distributed.scheduler.allowed-failures``).
        limit: seconds for a job, the start of its process included; 0 is none. In this process a
            job that hangs outside of Python goes on, and a traceback shows where it is.
        keep: let the processes wait for the next call, for up to two minutes.

    Raises:
        ValueError: fewer than 0 workers.
        ConnectionError: no cluster answers at its address, or it has lost all its workers.
        RuntimeError: the cluster's package is not installed.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers} is not valid; expected at least 0, or None")
    if cluster:
        crew = _Dask(job, cluster, limit)
    elif workers == 0:
        crew = _ThisProcess(job, limit)
    else:
        crew = _Processes(job, workers or min(len(os.sched_getaffinity(0)), 8), limit, keep)
    waiting: collections.deque[int] = collections.deque()
    begun, known = collections.Counter(), 0
    try:
        while True:
            waiting.extend(range(known, len(items)))
            known = len(items)
            while waiting and len(crew.running) < crew.size:
                index = waiting.popleft()
                begun[index] += 1
                crew.begin(index, items[index])
            if not crew.running:
                return
            for index, result, error in crew.ended():
                if error and begun[index] < crew.attempts:
                    waiting.append(index)
                else:
                    yield items[index], result, error
    finally:
        crew.close()


class _ThisProcess:
    attempts, size = _ATTEMPTS, 1

    def __init__(self, job: Callable, limit: float):
        self.job, self.limit, self.running = job, limit, []

    def begin(self, index: int, item: Any) -> None:
        self.running.append((index, item))

    def ended(self) -> Iterator[tuple]:
        index, item = self.running.pop()
        try:
            with _interrupted(self.limit):
                result = _watched(self.job, 2 * self.limit, False, item)
            yield index, result, None
        except Exception as error:  # whatever a policy or the simulator raises
            yield index, None, error

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _interrupted(limit: float) -> Iterator[None]:
    """Raise ``TimeoutError`` after ``limit`` seconds, in the main thread and where Python runs."""
    if not limit or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_) -> None:
        raise TimeoutError(f"a job took longer than {limit:g} s")

    handler = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


def _watched(job: Callable, limit: float, end: bool, item: Any) -> Any:
    """``job(item)``; after ``limit`` seconds a traceback shows where it is, and may end it there.

    From a thread that Python's lock does not hold up, as the simulator may. 0 is no limit.
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
    """Call ``function(connection, *arguments)`` in a Python process of its own.

    Ctrl-C does not reach it. When the thread that starts it ends, the system kills it.

    Args:
        environment: variables for it alone, beside those of this process.
        output: a file for what it prints, instead of where this process prints.

    Returns:
        the process, and the other end of its ``connection``.
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
    """A process that works on one job after another."""

    idle: list[_Worker] = []  # those that wait for another call

    def __init__(self):
        self.surroundings = _surroundings()
        self.process, self.connection = start_process(
            _work, environment={"OMP_NUM_THREADS": "1"})

    def begin(self, index: int, call: bytes, limit: float) -> None:
        self.index, self.until = index, time.monotonic() + (limit or math.inf)
        with contextlib.suppress(OSError):  # it has died, which `ended` finds out
            self.connection.send_bytes(call)

    def answer(self) -> tuple[Any, Exception | None]:
        result, error, told = self.connection.recv()
        if error:
            error.__cause__ = RuntimeError(f"in a worker:\n{told}")
        return result, error

    def death(self) -> WorkerDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_LOOK_EVERY)  # its end of the connection closes a little earlier
        code = self.process.poll() or 0
        if code >= 0:
            return WorkerDied(f"a worker process ended with exit code {code}; see its messages")
        memory = ", as when memory runs out" if -code == signal.SIGKILL else ""
        return WorkerDied(f"a worker process was killed by {signal.Signals(-code).name}{memory}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def _surroundings() -> tuple:
    """What a process takes over when it starts."""
    return dict(os.environ), os.getcwd(), list(sys.path)


class _Processes:
    attempts = _ATTEMPTS

    def __init__(self, job: Callable, workers: int, limit: float, keep: bool):
        self.job, self.size, self.limit, self.keep = job, workers, limit, keep
        self.running: list[_Worker] = []
        self.idle: list[_Worker] = []
        surroundings = _surroundings()
        while _Worker.idle:
            worker = _Worker.idle.pop()
            fits = worker.process.poll() is None and worker.surroundings == surroundings
            if fits and len(self.idle) < workers:
                self.idle.append(worker)
            else:
                worker.end()

    def begin(self, index: int, item: Any) -> None:
        call = cloudpickle.dumps((self.job, item))
        self.running.append(self.idle.pop() if self.idle else _Worker())
        self.running[-1].begin(index, call, self.limit)

    def ended(self) -> Iterator[tuple]:
        remaining = min(worker.until for worker in self.running) - time.monotonic()
        ready = wait([worker.connection for worker in self.running],
                     max(0.0, min(remaining, _LOOK_EVERY)))
        for worker in list(self.running):
            result, lost = None, None
            try:
                if worker.connection in ready:
                    result, error = worker.answer()
                elif worker.process.poll() is not None:
                    raise EOFError
                elif time.monotonic() < worker.until:
                    continue
                else:
                    worker.process.send_signal(signal.SIGUSR1)  # it shows where it is
                    time.sleep(0.2)
                    lost = TimeoutError(f"a job took longer than {self.limit:g} s")
            except (EOFError, OSError):
                lost = worker.death()
            self.running.remove(worker)
            if lost:
                worker.end()
            else:
                self.idle.append(worker)
            yield worker.index, result, lost or error

    def close(self) -> None:
        for worker in self.running + (self.idle if not self.keep else []):
            worker.end()
        if self.keep:
            _Worker.idle += self.idle


def _work(connection: Connection) -> None:
    """In a worker: one job after another, until the parent has had none for a while."""
    with contextlib.suppress(OSError):  # where memory runs out, rather this process than its parent
        Path("/proc/self/oom_score_adj").write_text("500")
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
        self.job, self.address, self.limit, self.running = job, address, limit, {}
        # no more jobs than threads: a worker that dies takes those that wait for it along
        self.size, self.since = 1, time.monotonic()  # when it was last known
        try:
            self.client = Client(address, timeout=_ANSWER_WITHIN)
        except (OSError, ValueError, TypeError) as error:
            raise ConnectionError(f"no Dask scheduler answers at {address!r} ({error}); {_HOW}"
                                  ) from error

    def begin(self, index: int, item: Any) -> None:
        future = self.client.submit(_watched, self.job, self.limit, True, item, pure=False,
                                    retries=_ATTEMPTS - 1)
        self.running[future] = index

    def ended(self) -> Iterator[tuple]:
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
            self.size, self.since = threads, time.monotonic()
        elif time.monotonic() > self.since + _WORKERS_WITHIN:
            raise ConnectionError(f"the Dask scheduler at {self.address!r} has had no worker for "
                                  f"{_WORKERS_WITHIN:g} s; {_HOW}")
        for future in done:
            error = future.exception()
            if isinstance(error, KilledWorker):
                error = WorkerDied("a job lost one worker after another, or took longer "
                                   f"than {self.limit:g} s")
            yield self.running.pop(future), None if error else future.result(), error

    def close(self) -> None:
        self.client.close(timeout=_ANSWER_WITHIN)  # the cluster drops what nobody waits for


_HOW = ("start one with `dask scheduler --host 127.0.0.1` and workers with "
        "`dask worker ADDRESS --nthreads 1`")


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
