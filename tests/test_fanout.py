"""Jobs in real processes: raising, hanging, killed; interrupted and killed parents; a cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trm_helpers import fanout
from trm_helpers.fanout import run_jobs
from trm_helpers.files import write_json

# what a worker does with an item: (name, folder for marks)
JOBS = """
import ctypes, os, signal, sys, time
from pathlib import Path

def job(item):
    name, folder = item
    marks = Path(folder)
    attempt = len(list(marks.glob(f"{name}.*")))
    (marks / f"{name}.{attempt}").touch()
    if name == "dies" or (name == "dies once" and attempt == 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "raises":
        raise ZeroDivisionError("always")
    if name == "hangs" or (name == "hangs once" and attempt == 0):
        time.sleep(60)
    if name == "holds the lock":
        ctypes.PyDLL(None).sleep(60)
    time.sleep(0.3)
    return {"name": name, "pid": os.getpid(), "attempt": attempt}
"""


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


def run_all(job, names, marks, folder, **settings):
    return {item[0]: (result, error) for item, result, error
            in run_jobs(job, [(name, str(marks)) for name in names], folder, **settings)}


def attempts(marks, name):
    return len(list(marks.glob(f"{name}.*")))


@pytest.mark.parametrize("turn", range(3))
def test_whatever_becomes_of_a_worker_every_job_is_settled_once(job, marks, tmp_path, turn):
    good = [f"good{number}" for number in range(6)]
    names = good[:2] + ["dies", "hangs"] + good[2:4] + ["dies once", "raises"] + good[4:]
    outcomes = run_all(job, names, marks, tmp_path / "attempts", workers=2, limit=3.0)
    assert set(outcomes) == set(names) and not (tmp_path / "attempts").exists()
    for name in [*good, "dies once"]:
        assert outcomes[name][0]["name"] == name and not outcomes[name][1]
        assert outcomes[name][0]["pid"] != os.getpid()
    assert outcomes["raises"] == (None, "ZeroDivisionError: always")
    for name in ("dies", "hangs"):
        assert outcomes[name] == (None, "its process died, or took longer than 3 s")
    # a job that was under way when another one killed its process may not have come to its mark
    assert all(1 <= attempts(marks, name) <= 2 for name in ("dies", "hangs", "raises"))
    assert all(attempts(marks, name) <= 2 for name in good)


@pytest.mark.parametrize(("name", "error"), [
    ("hangs", "its process died, or took longer than 3 s"), ("hangs once", ""),
    ("holds the lock", "its process died, or took longer than 3 s"),
])
def test_what_hangs_is_ended_and_tried_once_more(job, marks, tmp_path, name, error):
    result, told = run_all(job, [name], marks, tmp_path / "attempts", workers=2, limit=3.0)[name]
    assert told == error and attempts(marks, name) == 2
    assert result is None if error else result["attempt"] == 1


def test_answers_to_a_call_that_was_killed_are_not_taken(job, marks, tmp_path, monkeypatch):
    """A worker of a cluster may end a job for a call that is no more."""
    folder = tmp_path / "attempts"
    real = fanout._one_round

    def late(run, job, waiting, attempts, *settings):
        for number in (0, 1):
            for place in (folder, folder / "call"):
                write_json(place / f"0.{number}.json", [0, {"name": "of another"}, ""])
        return real(run, job, waiting, attempts, *settings)

    monkeypatch.setattr(fanout, "_one_round", late)
    assert run_all(job, ["good"], marks, folder)["good"][0]["name"] == "good"
    assert not folder.exists()


def test_one_worker_is_this_process(job, marks, tmp_path):
    outcomes = run_all(job, ["good", "raises"], marks, tmp_path / "attempts")
    assert outcomes["good"][0]["pid"] == os.getpid()
    assert outcomes["raises"] == (None, "ZeroDivisionError: always")
    assert attempts(marks, "raises") == 2


PARENT = """
import json, signal, sys
from pathlib import Path
from fanout_jobs import job
from trm_helpers.fanout import run_jobs

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # off where a shell runs it with &
    names = ["first", *["hangs"] * int(sys.argv[2])]
    items = [(name, sys.argv[1]) for name in names]
    for item, result, error in run_jobs(job, items, Path(sys.argv[1], "attempts"), workers=2):
        print(json.dumps([result, error]), flush=True)
"""


@pytest.mark.parametrize("busy", [1, 2])  # of the two workers
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(job, marks, tmp_path, stop, busy):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script, marks, str(busy)], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    worker = json.loads(parent.stdout.readline())[0]["pid"]
    deadline = time.monotonic() + 60
    while attempts(marks, "hangs") < busy and time.monotonic() < deadline:
        time.sleep(0.1)
    if stop == signal.SIGINT:
        os.killpg(parent.pid, stop)  # as Ctrl-C does
    else:
        parent.send_signal(stop)
    parent.communicate(timeout=30)
    assert parent.returncode != 0
    while time.monotonic() < deadline and Path(f"/proc/{worker}").exists():
        time.sleep(0.1)
    left = subprocess.run(["pgrep", "--session", str(parent.pid), "-f", "loky.backend.popen"],
                          capture_output=True, text=True).stdout.split()
    assert not left


@pytest.mark.parametrize(("package", "cluster", "said"), [
    ("distributed", "tcp://127.0.0.1:9", "no Dask scheduler answers at 'tcp://127.0.0.1:9'"),
    ("ray", "ray", "no Ray cluster answers at 'ray'"),
])
def test_no_cluster_is_told_with_its_address(job, tmp_path, monkeypatch, package, cluster, said):
    pytest.importorskip(package)
    monkeypatch.setattr("trm_helpers.fanout._ANSWER_WITHIN", 1.0)
    with pytest.raises(ConnectionError, match=said):
        list(run_jobs(job, [1], tmp_path / "attempts", cluster=cluster))


@pytest.mark.parametrize(("module", "cluster", "extra"),
                         [("ray", "ray", "ray"), ("distributed", "tcp://127.0.0.1:9", "dask")])
def test_a_package_that_is_not_there_is_named(job, tmp_path, monkeypatch, module, cluster, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=rf"pip install 'trm-helpers\[{extra}\]'"):
        list(run_jobs(job, [1], tmp_path / "attempts", cluster=cluster))


@pytest.fixture
def dask_cluster(job):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1,
                                  dashboard_address=None) as made:
        yield made.scheduler_address


@pytest.fixture
def ray_cluster(job):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    yield "ray"
    ray.shutdown()


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_a_cluster_that_loses_a_worker_settles_every_job(kind, job, marks, tmp_path, request):
    cluster = request.getfixturevalue(f"{kind}_cluster")
    names = [f"good{number}" for number in range(6)] + ["dies once", "raises", "dies"]
    outcomes = run_all(job, names, marks, tmp_path / "attempts", cluster=cluster)
    assert set(outcomes) == set(names)
    for name in names[:7]:
        assert outcomes[name][0]["name"] == name and not outcomes[name][1]
    assert outcomes["raises"] == (None, "ZeroDivisionError: always")
    assert outcomes["dies"][0] is None and "its process died" in outcomes["dies"][1]
    assert attempts(marks, "dies") == 2
