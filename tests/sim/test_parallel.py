"""Jobs in real processes: raising, hanging, killed; interrupted and killed parents; a cluster."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from trm_helpers.sim import parallel
from trm_helpers.sim.parallel import WorkerDied, run_jobs

# the job of an item: (name, folder for marks)
JOBS = """
import ctypes, os, signal, sys, time
from pathlib import Path

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")

def job(item):
    name, folder = item
    marks = Path(folder)
    attempt = len(list(marks.glob(f"{name}.*")))
    (marks / f"{name}.{attempt}").write_text(str(os.getpid()))
    if name == "dies" or (name == "dies once" and attempt == 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exits":
        sys.exit(3)
    if name == "raises":
        raise ZeroDivisionError("always")
    if name == "raises oddly":
        raise Odd(1, 2)
    if name == "answers oddly":
        return sys._getframe()
    if name == "answers unreadably":
        return Odd(1, 2)
    if name == "hangs" or (name == "hangs once" and attempt == 0):
        time.sleep(600)
    if name == "holds the lock":
        ctypes.PyDLL(None).sleep(600)
    if name == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.1)
    print("not for standard output")
    return {"name": name, "pid": os.getpid(), "attempt": attempt,
            "threads": os.environ.get("OMP_NUM_THREADS")}
"""
LIMIT = 5.0  # seconds for a job in these tests
LATE = "a job took longer than 5 s"
KILLED = "a worker process was killed by SIGKILL, as when memory runs out"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The job, importable here and in the workers."""
    (tmp_path / "fanout_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    sys.modules.pop("fanout_jobs", None)
    from fanout_jobs import job

    return job


@pytest.fixture
def marks(tmp_path):
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def run_all(job, names, marks, **settings):
    outcomes = {}
    for (name, _), result, error in run_jobs(job, [(name, str(marks)) for name in names],
                                             **settings):
        assert name not in outcomes
        outcomes[name] = result, error
    return outcomes


def attempts(marks, name):
    return len(list(marks.glob(f"{name}.*")))


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    """A zombie is not: who should have waited for it may have ended before."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_job_is_settled_once_even_if_its_worker_hangs_or_dies(job, marks):
    good = [f"good{number}" for number in range(6)]
    bad = {"dies": WorkerDied(KILLED), "hangs": TimeoutError(LATE),
           "raises": ZeroDivisionError("always"), "raises oddly": RuntimeError("Odd: 1 2"),
           "exits": WorkerDied("a worker process ended with exit code 3; see its messages")}
    names = [*good[:2], *bad, *good[2:4], "dies once", *good[4:], "answers oddly",
             "answers unreadably"]
    outcomes = run_all(job, names, marks, workers=2, limit=LIMIT)
    assert set(outcomes) == set(names)
    for name in [*good, "dies once"]:
        result, error = outcomes[name]
        assert result["name"] == name and error is None
        assert result["pid"] != os.getpid() and result["threads"] == "1"
        assert attempts(marks, name) == (2 if name == "dies once" else 1)  # no neighbour's death
    for name, expected in bad.items():
        result, error = outcomes[name]
        assert result is None and type(error) is type(expected) and str(error) == str(expected)
        assert attempts(marks, name) == 2
    assert "pickle" in str(outcomes["answers oddly"][1])
    assert "missing 1 required" in str(outcomes["answers unreadably"][1])
    assert "fanout_jobs.py" in str(outcomes["raises"][1].__cause__)  # where in the worker


def test_an_item_that_cannot_be_sent_leaves_no_process():
    before = set(psutil.Process().children())
    with pytest.raises(TypeError, match="cannot pickle"):
        list(run_jobs(len, [threading.Lock()], workers=1))
    assert set(psutil.Process().children()) <= before


@pytest.mark.parametrize(("name", "error"), [
    ("hangs once", None), ("holds the lock", LATE), ("stops", LATE)])
def test_a_hanging_job_is_ended_and_tried_once_more(job, marks, capfd, name, error):
    result, raised = run_all(job, [name], marks, workers=1, limit=LIMIT)[name]
    assert attempts(marks, name) == 2
    if error:
        assert result is None and isinstance(raised, TimeoutError) and str(raised) == error
    else:
        assert result["attempt"] == 1
    if name != "stops":
        assert "fanout_jobs.py" in capfd.readouterr().err  # where it hung
    assert not any(alive(path.read_text()) for path in marks.iterdir())


def test_a_job_is_tried_again_although_the_idle_workers_have_ended(marks):
    def job(name):
        parallel._IDLE_SECONDS = 1.0
        seen = marks / name
        if name == "hangs once" and not seen.exists():
            seen.touch()
            time.sleep(600)
        return name

    names = ["a", "b", "hangs once"]
    outcomes = {name: (result, error)
                for name, result, error in run_jobs(job, names, workers=2, limit=LIMIT)}
    assert outcomes == {name: (name, None) for name in names}  # in whichever order they end


def test_a_job_that_ends_while_its_result_waits_is_not_late(marks):
    def job(seconds):
        (marks / f"{seconds}.{len(list(marks.iterdir()))}").touch()
        time.sleep(seconds)

    for seconds, _, error in run_jobs(job, [0.1, 2.0], workers=2, limit=LIMIT):
        assert not error
        if seconds == 0.1:
            time.sleep(LIMIT + 1)  # as when the caller copies a large file
    assert len(list(marks.iterdir())) == 2


def test_a_killed_worker_is_noticed_within_seconds(job, marks):
    def kill() -> None:
        wait_for(lambda: attempts(marks, "hangs once"))
        time.sleep(0.1)
        os.kill(int((marks / "hangs once.0").read_text()), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    outcomes = run_all(job, ["hangs once", "good"], marks, workers=2)  # limit: 15 minutes
    assert outcomes["hangs once"][0]["attempt"] == 1 and outcomes["good"][0]["attempt"] == 0


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_closed_standard_streams_cost_no_job(tmp_path, closed):
    """As of a program that a service starts; a pipe would otherwise take a stream's number."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom trm_helpers.sim.parallel import run_jobs\n"
        "def job(item):\n    print('noise', flush=True)\n    return item + 1\n"
        "for workers in (0, 2):\n"
        "    print([result for _, result, _ in run_jobs(job, [1], workers=workers)])\n")
    done = subprocess.run(["sh", "-c", f'exec "$0" "$1" {closed}', sys.executable, str(script)],
                          stdout=subprocess.PIPE, text=True, timeout=60)
    assert [line for line in done.stdout.splitlines() if line != "noise"] == ["[2]", "[2]"]


def test_fewer_than_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers=-1 is not valid; expected at least 0"):
        list(run_jobs(abs, [1], workers=-1))
    assert [result for _, result, _ in run_jobs(abs, [-1])] == [1]  # a worker for each core


def test_a_worker_that_cannot_start_is_an_error(job, marks, monkeypatch, capfd):
    monkeypatch.setattr(parallel, "_START", "import no_such_module")
    _, error = run_all(job, ["good"], marks, workers=2)["good"]
    assert str(error) == "a worker process ended with exit code 1; see its messages"
    assert "No module named 'no_such_module'" in capfd.readouterr().err


def test_workers_inherit_the_choice_of_the_renderer(monkeypatch):
    monkeypatch.setattr(parallel, "renderer", lambda: os.environ.update(TRM_RENDERER="chosen"))
    monkeypatch.setenv("TRM_RENDERER", "")  # restored
    ((_, chosen, _),) = run_jobs(lambda _: os.environ["TRM_RENDERER"], [0], workers=1)
    assert chosen == "chosen"


def test_a_job_that_cannot_be_imported_is_an_error(job, marks, tmp_path):
    (tmp_path / "fanout_jobs.py").write_text("import no_such_module")
    _, error = run_all(job, ["good"], marks, workers=2)["good"]
    assert isinstance(error, ModuleNotFoundError)


def test_no_workers_are_this_process(job, marks):
    outcomes = run_all(job, ["good", "raises"], marks, workers=0)
    assert outcomes["good"][0]["pid"] == os.getpid()
    assert isinstance(outcomes["raises"][1], ZeroDivisionError) and attempts(marks, "raises") == 2


def test_a_hanging_job_in_this_process_is_interrupted_and_tried_once_more(job, marks):
    before = signal.getsignal(signal.SIGALRM)
    outcomes = run_all(job, ["hangs", "hangs once", "good"], marks, workers=0, limit=1.0)
    assert isinstance(outcomes["hangs"][1], TimeoutError) and attempts(marks, "hangs") == 2
    assert outcomes["hangs once"][0]["attempt"] == 1 and outcomes["good"][0]["attempt"] == 0
    assert signal.getsignal(signal.SIGALRM) == before
    timer = signal.getitimer(signal.ITIMER_REAL)[0]  # pytest's own
    assert timer == 0 or timer > 60


def test_the_callers_timer_goes_on_while_jobs_run():
    pytests, rung = signal.setitimer(signal.ITIMER_REAL, 0.3), []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(len(done)))
    done = []
    try:
        for item, *_ in run_jobs(time.sleep, [0.2] * 4, workers=0):
            done.append(item)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *pytests)
    assert rung and rung[0] < 4


def test_a_job_that_cannot_be_interrupted_in_this_process_prints_its_traceback(capfd):
    with ThreadPoolExecutor(1) as pool:
        ((_, result, error),) = pool.submit(lambda: list(run_jobs(
            lambda item: time.sleep(item) or "done", [0.5], workers=0, limit=0.1))).result()
    assert result == "done" and not error
    assert "test_parallel.py" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_items_that_are_added_meanwhile_are_worked_on_too(workers):
    items, seen = [1], []
    for item, result, _ in run_jobs(lambda item: 10 * item, items, workers=workers):
        seen.append(result)
        if item < 4:
            items.append(item + 1)
    assert seen == [10, 20, 30, 40]


def test_workers_are_kept_for_a_call_like_the_last(job, marks, monkeypatch):
    def pid(name, **settings):
        return run_all(job, [name], marks, workers=1, **settings)[name][0]["pid"]

    first = pid("first", keep=True)
    assert pid("second", keep=True) == first
    monkeypatch.setenv("SOMETHING", "else")  # a worker has the environment of its start
    assert pid("third") != first and not alive(first)
    assert pid("fourth", keep=True) != first and len(parallel._Worker.idle) == 1
    worker = parallel._Worker.idle[0].process.pid
    assert Path(f"/proc/{worker}/oom_score_adj").read_text() == "500\n"  # it, not its parent
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not alive(worker))
    assert pid("fifth") != worker  # one that died meanwhile is not taken
    assert not parallel._Worker.idle


# --- any main module ------------------------------------------------------------------------------
MAIN = """
import os
from trm_helpers.sim.parallel import run_jobs

def job(item):
    return item + 1, os.getpid()

for item, result, error in run_jobs(job, [1, 2], workers=2):
    if error:
        raise error
    assert result[0] == item + 1 and result[1] != os.getpid()
print("done")
"""


@pytest.mark.parametrize("main", ["script", "-c", "stdin", "notebook", "cell"])
def test_processes_start_under_any_main_module(main, tmp_path):
    """A function of the main module, without a guard."""
    script = tmp_path / "script.py"
    script.write_text(MAIN)
    command, text = [sys.executable, script], None
    if main == "-c":
        command[1:] = ["-c", MAIN]
    elif main == "stdin":
        command[1:], text = ["-"], MAIN
    elif main == "notebook":  # which holds null: it is no Python
        import nbformat

        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(MAIN)])
        notebook.cells[0].execution_count = None
        nbformat.write(notebook, tmp_path / "main.ipynb")
        command[1:] = ["-m", "IPython", "-c", f"%run {tmp_path / 'main.ipynb'}"]
    elif main == "cell":
        command[1:] = ["-m", "IPython", "-c", MAIN]
    ended = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    assert "done" in ended.stdout, ended.stderr
    assert "Error" not in ended.stderr


# --- the parent ----------------------------------------------------------------------------------
PARENT = """
import json, signal, sys
from fanout_jobs import job
from trm_helpers.sim.parallel import run_jobs

signal.signal(signal.SIGINT, signal.default_int_handler)  # off where a shell runs it with &
items = [(name, sys.argv[1]) for name in ["first", *sys.argv[2:]]]
for item, result, error in run_jobs(job, items, workers=2, keep=True):
    print(json.dumps(result), flush=True)
if len(items) == 1:
    import time
    time.sleep(60)
"""


@pytest.mark.parametrize("busy", [[], ["hangs"], ["hangs", "holds the lock"], ["stops"]])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(job, marks, tmp_path, stop, busy):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script, marks, *busy], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, start_new_session=True)
    json.loads(parent.stdout.readline())  # nothing that a worker printed
    wait_for(lambda: all((marks / f"{name}.0").exists() for name in busy))
    wait_for(lambda: all(path.read_text() for path in marks.iterdir()))
    workers = {int(path.read_text()) for path in marks.iterdir()}
    assert workers and all(alive(worker) for worker in workers)
    if stop == signal.SIGINT:
        os.killpg(parent.pid, stop)  # as Ctrl-C does
    else:
        parent.send_signal(stop)
    _, errors = parent.communicate(timeout=30)
    assert parent.returncode != 0
    if stop == signal.SIGINT:
        assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    wait_for(lambda: not any(alive(worker) for worker in workers), seconds=5)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_stays_in_its_group(workers):
    """Each group has one process, but for the last one, where the other helps."""
    items = [(group, number) for group in "abcd" for number in range(6)]

    def job(item):
        time.sleep(0.01)
        return os.getpid()

    pids = {item: pid for item, pid, _ in run_jobs(job, items, workers=workers,
                                                   group=lambda item: item[0])}
    assert sorted(pids) == items
    visited = {(group, pid) for (group, _), pid in pids.items()}
    assert len(visited) <= 4 + workers - 1


@pytest.mark.parametrize(("waiting", "own", "elsewhere", "chosen"), [
    ("aabb", "b", "", "b"),  # its own
    ("aabb", "c", "a", "b"),  # one without a process
    ("abbcc", None, "", "b"),  # the largest
    ("aaab", None, "aab", "a"),  # where most items per process are left
    ("aabb", "c", "aab", "b")])
def test_the_next_group(waiting, own, elsewhere, chosen):
    assert parallel._next_group([*waiting], own, [*elsewhere]) == chosen


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_items_that_are_no_longer_wanted_are_dropped(workers):
    items, done = list(range(30)), []
    for item, result, error in run_jobs(lambda item: 10 * item, items, workers=workers,
                                        wanted=lambda item: len(done) < 3):
        assert result == 10 * item and error is None
        done.append(item)
    assert 3 <= len(done) <= 3 + max(0, workers - 1)


def test_a_worker_without_work_ends_by_itself():
    process, connection = parallel.start_process(_work_briefly)
    assert process.wait(timeout=60) == 0
    connection.close()


def _work_briefly(connection):
    parallel._IDLE_SECONDS = 0.1
    parallel._work(connection)


# --- a cluster -----------------------------------------------------------------------------------
def test_an_unreachable_cluster_is_an_error_with_its_address(job, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(parallel, "_CONNECT_SECONDS", 1.0)
    with pytest.raises(ConnectionError, match="no Dask scheduler answers at 'tcp://127.0.0.1:9'"):
        list(run_jobs(job, [1], cluster="tcp://127.0.0.1:9"))
    with pytest.raises(ConnectionError, match="no Dask scheduler answers at 'nonsense'"):
        list(run_jobs(job, [1], cluster="nonsense"))


def test_a_package_that_is_not_there_is_named(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RuntimeError, match=r"pip install 'trm-helpers\[dask\]'"):
        list(run_jobs(job, [1], cluster="tcp://127.0.0.1:9"))


@pytest.mark.parametrize(("address", "warned"), [
    ("tcp://10.0.0.5:8786", True), ("10.0.0.5:8786", True), ("tcp://[fe80::1]:8786", True),
    ("tcp://0.0.0.0:8786", True), ("tcp://machine:8786", True), ("ws://machine:8786", True),
    ("tcp://127.0.0.1:8786", False), ("tcp://[::1]:8786", False), ("localhost:8786", False),
    ("tls://10.0.0.5:8786", False)])
def test_an_open_cluster_is_warned_of(address, warned, capsys):
    parallel._warn_if_open.cache_clear()
    parallel._warn_if_open(address)
    parallel._warn_if_open(address)
    assert capsys.readouterr().err.count(f"{address} has no authentication") == warned


@pytest.fixture(scope="module")
def dask_cluster(tmp_path_factory):
    """One for the tests below, in their order; its workers import the job too."""
    distributed = pytest.importorskip("distributed")
    import dask

    folder = tmp_path_factory.mktemp("cluster")
    (folder / "fanout_jobs.py").write_text(JOBS)
    with pytest.MonkeyPatch.context() as patch, \
            dask.config.set({"distributed.deploy.lost-worker-timeout": "60s"}):  # it starts again
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        for attempts_left in (2, 1, 0):  # Dask gives its thread ten seconds to start
            try:
                made = distributed.LocalCluster(n_workers=2, threads_per_worker=1,
                                                host="127.0.0.1", dashboard_address=None)
                break
            except AssertionError:
                if not attempts_left:
                    raise
        with made:
            yield made


def test_a_cluster_drops_items_that_are_not_wanted(job, marks, dask_cluster):
    outcomes = {name: result for (name, _), result, _ in run_jobs(
        job, [(name, str(marks)) for name in ("good1", "good2", "good3")],
        cluster=dask_cluster.scheduler_address, wanted=lambda item: item[0] != "good2")}
    assert set(outcomes) == {"good1", "good3"}


def test_a_cluster_that_loses_a_worker_settles_every_job(job, marks, dask_cluster):
    names = [f"good{number}" for number in range(6)] + ["dies once", "raises", "dies"]
    outcomes = run_all(job, names, marks, cluster=dask_cluster.scheduler_address)
    assert set(outcomes) == set(names)
    for name in names[:7]:
        assert outcomes[name][0]["name"] == name and not outcomes[name][1]
    assert isinstance(outcomes["raises"][1], ZeroDivisionError) and attempts(marks, "raises") == 2
    assert outcomes["dies"][0] is None and isinstance(outcomes["dies"][1], WorkerDied)
    assert attempts(marks, "dies") == 4  # Dask's own setting
    # a cluster that is closed while a nanny starts a worker fails to join it
    dask_cluster.wait_for_workers(2, timeout=60)


def test_a_cluster_without_workers_is_an_error(job, marks, dask_cluster, monkeypatch):
    monkeypatch.setattr(parallel, "_NO_WORKER_SECONDS", 1.0)
    jobs = run_jobs(job, [("good", str(marks)), ("hangs", str(marks))],
                    cluster=dask_cluster.scheduler_address)
    assert next(jobs)[1]["name"] == "good"
    dask_cluster.scale(0)
    with pytest.raises(ConnectionError, match="has had no worker for 1 s"):
        next(jobs)


def test_a_cluster_whose_scheduler_ends_is_an_error(job, marks, dask_cluster, monkeypatch):
    import dask

    dask_cluster.scale(1)  # after the last test
    dask_cluster.wait_for_workers(1, timeout=60)
    with dask.config.set({"distributed.comm.timeouts.connect": "2s"}):
        jobs = run_jobs(job, [("good", str(marks)), ("hangs", str(marks))],
                        cluster=dask_cluster.scheduler_address)
        assert next(jobs)[1]["name"] == "good"
        dask_cluster.close()
        with pytest.raises(ConnectionError, match="is lost; finished jobs are kept"):
            next(jobs)


@pytest.mark.parametrize(("cores", "free", "workers"), [
    (4, 31e9, 4), (4, 5e9, 2), (64, 1e12, 8), (2, 1e9, 1)])
def test_the_default_number_of_processes_fits_cores_and_memory(monkeypatch, cores, free, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(parallel, "free_memory", lambda: int(free))
    assert parallel.default_workers() == workers
