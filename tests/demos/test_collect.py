import errno
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from demo_files import write_demo_file

from trm_helpers import paths, schema
from trm_helpers.config import from_flat
from trm_helpers.demos import collect
from trm_helpers.demos.alignment import measure_alignment
from trm_helpers.demos.collect import (
    _collect,
    _Collection,
    collect_demonstrations,
    collect_tasks,
)
from trm_helpers.demos.dagger import Actor
from trm_helpers.demos.demo_files import DemoFileError, check_demo_file
from trm_helpers.demos.quality import quality_card
from trm_helpers.demos.skills import Style
from trm_helpers.files import exclusive_lock
from trm_helpers.sim.env import LayoutError, LiberoEnv
from trm_helpers.sim.parallel import WorkerDied


def last_first(job, items, *, workers, group, wanted):
    """In place of ``run_jobs``: two at a time end in the opposite order."""
    done = 0
    while done < len(items):
        two = items[done:done + 2]
        done += len(two)
        for item in reversed(two):
            if wanted(item):
                yield item, job(item), None


def alternately(job, items, *, workers, group, wanted):
    """In place of ``run_jobs``: an item of each group in turn."""
    done = []
    while left := [item for item in items if item not in done and wanted(item)]:
        item = min(left, key=lambda item: sum(group(each) == group(item) for each in done))
        done.append(item)
        yield item, job(item), None


def run_attempts(monkeypatch, attempt, known, num_demos):
    """Collect without files: ``attempt(number)`` is its part; the attempts that are known then."""
    task = types.SimpleNamespace(name="a task")
    settings = {"suite": "libero_object", "task_id": 0, "seed": 0, "disturb": True,
                "placement": "benchmark", "frame_stride": 1}
    collection = _Collection(task, Path("folder"), settings, num_demos)
    collection.attempts, collection.write = known, lambda: None
    monkeypatch.setattr(collect, "_attempt", lambda *given: attempt(given[-1]))
    _collect([collection], 0)
    return collection.chosen


@pytest.mark.parametrize(("known", "chosen", "missing"), [
    ({0: "a", 1: None, 2: "b", 4: "c"}, [0, 2], [3]), ({1: "a"}, [], [0, 2]),
    ({0: "a", 1: "b", 2: "c", 3: "d"}, [0, 1, 2], [])])
def test_successes_count_only_up_to_the_first_open_attempt(known, chosen, missing):
    settings = {"disturb": True, "placement": "benchmark", "seed": 0, "frame_stride": 1}
    collection = _Collection(types.SimpleNamespace(name="a task"), Path("folder"), settings, 3)
    collection.attempts = known
    assert collection.chosen == chosen
    assert [number for *_, number in collection.missing()] == missing


@pytest.mark.parametrize("turned", [False, True])
def test_the_first_successes_in_order_are_chosen_in_whatever_order_they_end(turned, monkeypatch):
    if turned:
        monkeypatch.setattr(collect, "run_jobs", last_first)
    made = []

    def attempt(number):
        made.append(number)
        return None if number in (1, 2) else Path(str(number))

    assert run_attempts(monkeypatch, attempt, {}, 3) == [0, 3, 4]
    assert sorted(made) == [0, 1, 2, 3, 4]  # none that the file has no place for
    made.clear()
    assert run_attempts(monkeypatch, attempt, {0: Path("0"), 1: None}, 3) == [0, 3, 4]
    assert 0 not in made and 1 not in made  # what was finished is not done again
    made.clear()
    run_attempts(monkeypatch, attempt, {0: Path("0"), 4: Path("4"), 5: Path("5")}, 3)
    assert sorted(made) == [1, 2, 3]


def test_an_expert_that_cannot_do_it_is_given_up(monkeypatch):
    with pytest.raises(RuntimeError, match="failed 20 of 20 attempts at a task"):
        run_attempts(monkeypatch, lambda number: None, {}, 3)


def test_a_task_that_had_been_given_up_is_written_once_its_demonstrations_are_there(monkeypatch):
    known = {number: Path(str(number)) if number < 2 else None for number in range(22)}
    assert run_attempts(monkeypatch, lambda number: Path(str(number)), known, 3) == [0, 1, 22]


def test_an_error_ends_the_workers_although_its_traceback_is_kept(monkeypatch):
    """As IPython keeps it: the suspended generator is then not collected."""
    ended = []

    def jobs(job, items, **_):
        try:
            yield items[0], None, OSError("disk full")
        finally:
            ended.append(True)

    monkeypatch.setattr(collect, "run_jobs", jobs)
    with pytest.raises(OSError, match="disk full") as kept:
        run_attempts(monkeypatch, None, {}, 3)
    assert ended and kept.tb


@pytest.mark.parametrize("num_demos", [0, -1])
def test_no_demonstrations_are_not_collected(tmp_path, num_demos):
    with pytest.raises(ValueError, match=f"num_demos={num_demos}"):
        collect_demonstrations("libero_object", 0, num_demos, tmp_path)


# --- killed ---------------------------------------------------------------------------------------

# attempts without a simulator: some of them die, hang or fail
QUICK = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from trm_helpers import schema
from trm_helpers.demos import collect

def record(env, generator, disturb, placement, actor, frame_stride):
    values = generator.uniform(-1, 1, (5, 7))
    seen = {**{key: np.ones(size) for key, size in schema.LOW_DIM.items()},
            **{key: np.zeros((128, 128, 3), np.uint8) for key in schema.CAMERAS}}
    return {"observations": [seen] * 5, "actions": values, "executed_actions": values,
            "states": values, "model_file": "<mujoco/>",
            "attributes": {"frame_stride": frame_stride}}

def attempt(*given):
    number, parts = given[-1], given[-2]
    trouble = Path(os.environ["TROUBLE"])
    first = not (trouble / str(number)).exists()
    (trouble / str(number)).write_text(str(os.getpid()))
    what = os.environ.get(f"ATTEMPT_{number}", "")
    if what == "fails":
        (parts / f"attempt_{number:05d}.failed").touch()
        return None
    if what == "dies" or what == "dies once" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hangs once" and first:
        time.sleep(600)
    collect.worker_env, collect.record_demonstration = lambda *_: None, record
    return real(*given)

real = collect._attempt
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A function that collects without a simulator, and the folder where attempts leave marks."""
    (tmp_path / "quick.py").write_text(QUICK)
    (tmp_path / "trouble").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TROUBLE", str(tmp_path / "trouble"))
    monkeypatch.setattr(collect, "_problem_name", lambda _: "problem")
    for name in ("worker_env", "record_demonstration"):
        monkeypatch.setattr(collect, name, getattr(collect, name))  # put back afterwards
    sys.modules.pop("quick", None)
    import quick

    def make(folder, workers, num_demos=4, frame_stride=1, **troubles):
        for number in range(9):
            monkeypatch.setenv(f"ATTEMPT_{number}", troubles.get(f"attempt_{number}", ""))
        return collect_demonstrations("libero_object", 0, num_demos, tmp_path / folder,
                                      workers=workers, frame_stride=frame_stride)

    monkeypatch.setattr(collect, "_attempt", quick.attempt)
    make.trouble = tmp_path / "trouble"
    return make


def test_a_killed_worker_costs_one_attempt_which_is_made_again(quick, monkeypatch):
    straight = quick("straight", 0, attempt_2="fails").read_bytes()
    for mark in quick.trouble.iterdir():
        mark.unlink()

    def kill():
        while not (quick.trouble / "3").exists() or not (quick.trouble / "3").read_text():
            time.sleep(0.05)
        os.kill(int((quick.trouble / "3").read_text()), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    began = time.monotonic()
    path = quick("killed", 2, attempt_1="dies once", attempt_2="fails", attempt_3="hangs once")
    assert path.read_bytes() == straight and time.monotonic() - began < 60
    with h5py.File(path) as file:
        assert [demo.attrs["attempt"] for demo in file["data"].values()] == [0, 1, 3, 4]


def test_an_attempt_that_always_kills_its_worker_is_an_error_and_the_others_are_kept(
        quick, tmp_path):
    with pytest.raises(WorkerDied, match="killed by SIGKILL, as when memory runs out"):
        quick("killed", 2, attempt_3="dies")
    for mark in quick.trouble.iterdir():
        mark.unlink()
    (parts,) = (tmp_path / "killed").glob(".*.parts")
    kept = {part.stem[-1] for part in parts.glob("attempt_*")}
    path = quick("killed", 0)
    assert len(kept) >= 2 and {mark.name for mark in quick.trouble.iterdir()} == {*"0123"} - kept
    assert path.read_bytes() == quick("straight", 0).read_bytes()


def test_a_killed_parent_leaves_no_process_and_loses_no_attempt(quick, tmp_path, monkeypatch):
    straight = quick("straight", 0).read_bytes()
    for mark in quick.trouble.iterdir():
        mark.unlink()
    script = tmp_path / "script.py"  # without a guard
    script.write_text("import quick\nfrom trm_helpers.demos import collect\n"
                      "collect._attempt = quick.attempt\n"
                      "collect._problem_name = lambda _: 'problem'\n"
                      f"collect.collect_demonstrations('libero_object', 0, 4, "
                      f"{str(tmp_path / 'killed')!r}, workers=2)\n")
    monkeypatch.setenv("ATTEMPT_2", "hangs once")
    parent = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True)
    parts = tmp_path / "killed"
    deadline = time.monotonic() + 60
    while len(list(parts.glob(".*.parts/attempt_*.hdf5"))) < 3:  # all but the one that hangs
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.kill()
    parent.communicate()
    _, left = psutil.wait_procs(children, timeout=5)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    for mark in quick.trouble.iterdir():
        mark.unlink()
    assert quick("killed", 2).read_bytes() == straight
    assert [mark.name for mark in quick.trouble.iterdir()] == ["2"]


def test_collecting_again_returns_at_once_and_extending_keeps_what_is_there(quick, monkeypatch,
                                                                            capsys):
    path = quick("again", 0, num_demos=2)
    assert "collecting 2 missing demonstrations\n" in capsys.readouterr().out
    before = path.read_bytes()

    def made():
        return sorted(mark.name for mark in quick.trouble.iterdir())

    assert made() == ["0", "1"]
    assert quick("again", 0, num_demos=2) == path and made() == ["0", "1"]
    assert "collecting" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings .*seed: 0 there, 9 now"):
        collect_demonstrations("libero_object", 0, 2, path.parent, seed=9)
    with pytest.raises(ValueError, match="placement: 'benchmark' there, 'wide' now"):
        collect_demonstrations("libero_object", 0, 2, path.parent, placement="wide")
    with h5py.File(path, "a") as file:  # former files say neither
        data = file["data"]
        former = {key: value for key, value in json.loads(data.attrs["collection"]).items()
                  if key not in ("placement", "frame_stride")}
        data.attrs["collection"] = json.dumps(former)
        for demo in data.values():
            del demo.attrs["frame_stride"]
    assert quick("again", 0, num_demos=2) == path and made() == ["0", "1"]
    path.write_bytes(before)
    with pytest.raises(ValueError, match="placement='far' is not valid"):
        collect_demonstrations("libero_object", 0, 2, path.parent, placement="far")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for writes in ("_write_demo", "_assemble"):
        with monkeypatch.context() as patch, pytest.raises(OSError) as error:
            patch.setattr(collect, writes, full)
            quick("again", 0, num_demos=3)
        assert error.value.errno == errno.ENOSPC and path.read_bytes() == before
    (quick.trouble / "2").unlink()
    quick("again", 0, num_demos=3)
    assert made() == ["0", "1"]  # the attempt before the disk was full is kept
    with h5py.File(path) as file:
        assert sorted(file["data"]) == ["demo_0", "demo_1", "demo_2"]
        assert [demo.attrs["attempt"] for demo in file["data"].values()] == [0, 1, 2]
    assert visible(path.parent) == [path]
    assert not list(path.parent.glob(".*.parts"))


def test_a_second_call_waits_for_what_the_first_collects(quick):
    """What is there already is given back at once: somebody may be extending the file for long."""
    path, extended = quick("some", 0, num_demos=2), quick("longer", 0, num_demos=3)
    for mark in quick.trouble.iterdir():
        mark.unlink()
    task = path.name.removesuffix("_demo.hdf5")
    with ThreadPoolExecutor(1) as pool:
        with exclusive_lock(path.parent, lock=f".{task}.lock"):
            assert quick("some", 0, num_demos=2) == path
            call = pool.submit(quick, "some", 0, num_demos=3)
            with pytest.raises(TimeoutError):
                call.result(timeout=2)
            extended.replace(path)  # as the first call does
        assert call.result(timeout=30) == path
    with h5py.File(path) as file:
        assert len(file["data"]) == 3
    assert not list(quick.trouble.iterdir())  # the second made nothing


def test_a_shorter_collection_keeps_the_attempts_of_a_longer_one(quick, monkeypatch):
    def cut_off(*given):
        if given[-1] == 3:
            raise RuntimeError("cut off")
        return real(*given)

    real = collect._attempt
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cut off"):
        patch.setattr(collect, "_attempt", cut_off)
        quick("some", 0, num_demos=4)
    path = quick("some", 0, num_demos=1)
    (parts,) = path.parent.glob(".*.parts")
    assert sorted(part.stem for part in parts.iterdir()) == ["attempt_00001", "attempt_00002"]
    for mark in quick.trouble.iterdir():
        mark.unlink()
    assert quick("some", 0, num_demos=4).read_bytes() == quick("straight", 0).read_bytes()
    assert not parts.exists()


def test_the_command_in_the_error_collects_the_file_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRM_DATA_DIR", str(tmp_path / "data"))
    config = from_flat("demo", actor="my-run", beta=0.3333333, placement="wide", num_demos=40,
                       frame_stride=2)
    with pytest.raises(FileNotFoundError) as error:
        collect.ensure_demonstrations(config)
    _, command = str(error.value).split("python -m trm_helpers collect ")
    given = command.replace("--", "").split()
    found = dict(zip(given[::2], given[1::2], strict=True))
    assert found == {"actor": "my-run", "beta": "0.3333333", "suite": "libero_spatial",
                     "task-ids": "2", "placement": "wide", "num-demos": "40",
                     "frame-stride": "2"}
    assert not (tmp_path / "data").exists()


def test_tasks_are_collected_side_by_side_and_equal_those_made_alone(quick, tmp_path):
    files = collect_tasks("libero_object", np.array([2, 0]), 3, tmp_path / "both", workers=2,
                          seed=np.int64(0))
    assert list(files) == [2, 0]  # a run's tasks and their files are read side by side
    assert [sorted(path.name for path in visible(tmp_path / "both"))] == [
        sorted(path.name for path in files.values())]
    for task_id, path in files.items():
        alone = collect_demonstrations("libero_object", task_id, 3, tmp_path / "alone", workers=0)
        assert alone.name == path.name and alone.read_bytes() == path.read_bytes()


def test_a_task_that_is_given_up_costs_no_other(quick, tmp_path, monkeypatch):
    real = collect._attempt

    def attempt(*given):
        return None if given[0]["task_id"] == 0 else real(*given)

    monkeypatch.setattr(collect, "_attempt", attempt)
    with pytest.raises(RuntimeError, match="failed 20 of 20 attempts at .*alphabet_soup"):
        collect_tasks("libero_object", [0, 1, 2], 3, tmp_path / "some", workers=0)
    made = visible(tmp_path / "some")
    assert len(made) == 2 and not any("alphabet_soup" in path.name for path in made)


def test_a_task_that_is_given_up_as_the_time_ends_costs_no_demonstration_of_another(
        quick, tmp_path, monkeypatch):
    real, made = collect._attempt, []

    def attempt(*given):
        made.append(given[0]["task_id"])
        if made.count(0) >= 20 and 1 in made:
            monkeypatch.setenv("TRM_STOP_AT", "0")
        return None if given[0]["task_id"] == 0 else real(*given)

    monkeypatch.setattr(collect, "_attempt", attempt)
    monkeypatch.setattr(collect, "run_jobs", alternately)
    with pytest.raises(RuntimeError, match="failed 20 of 20 attempts at .*alphabet_soup"):
        collect_tasks("libero_object", [0, 1], 40, tmp_path / "some")
    (path,) = visible(tmp_path / "some")
    with h5py.File(path) as file:
        assert 0 < len(file["data"]) < 40


def test_a_seed_without_a_layout_is_a_failed_attempt(tmp_path, monkeypatch, capsys):
    """It would have none the next time either, and no file could ever be completed."""
    def no_layout(*_):
        raise LayoutError("a task: no free places")

    monkeypatch.setattr(collect.layouts, "reset", no_layout)
    monkeypatch.setattr(collect, "worker_env", lambda *_: None)
    settings = {"suite": "libero_object", "task_id": 0, "seed": 0, "disturb": True,
                "placement": "wide", "frame_stride": 1}
    assert collect._attempt(settings, None, tmp_path, 3) is None
    assert [path.name for path in tmp_path.iterdir()] == ["attempt_00003.failed"]
    assert "counts as a failure: a task: no free places" in capsys.readouterr().out


def test_collecting_stops_in_time_and_the_next_call_continues(quick, tmp_path, monkeypatch):
    real = collect._attempt

    def attempt(*given):
        if given[-1] == 1:
            monkeypatch.setenv("TRM_STOP_AT", "0")
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(collect, "_attempt", attempt)
        with pytest.raises(TimeoutError, match="time is up; demonstrations so far: 2 of 4 of pick"):
            quick("stopped", 0)
    (path,) = visible(tmp_path / "stopped")
    with h5py.File(path) as file:
        assert len(file["data"]) == 2
    monkeypatch.delenv("TRM_STOP_AT")
    for mark in quick.trouble.iterdir():
        mark.unlink()
    quick("stopped", 0)
    assert sorted(mark.name for mark in quick.trouble.iterdir()) == ["2", "3"]
    assert path.read_bytes() == quick("straight", 0).read_bytes()


def test_an_actors_file_begins_with_its_demonstrations_and_keeps_to_the_actor(
        quick, tmp_path, monkeypatch):
    base = quick("base", 0, num_demos=3, attempt_1="fails")
    actor = Actor("run", 0.5, "a" * 64, "a policy", {0: base}, 2)
    folder = tmp_path / "dagger"

    def collect_with(actor, num_demos=4):
        return collect_demonstrations("libero_object", 0, num_demos, folder, workers=0,
                                      actor=actor)

    def attempt(*given):
        if given[-1] == 4:
            raise RuntimeError("cut off")
        assert given[0]["disturb"] is False and given[1] == actor  # nobody pushes
        return real(*given)

    real = collect._attempt
    with monkeypatch.context() as patch:
        patch.setattr(collect, "_attempt", attempt)
        with pytest.raises(RuntimeError, match="cut off"):
            collect_with(actor)
    other = actor._replace(sha256="b" * 64)
    with pytest.raises(ValueError, match="unfinished demonstrations by another actor, .*b{12}"):
        collect_with(other)
    with pytest.raises(ValueError, match="unfinished demonstrations by .*beta=0.25; remove it"):
        collect_with(actor._replace(beta=0.25))
    for mark in quick.trouble.iterdir():
        mark.unlink()
    path = collect_with(actor)
    assert [mark.name for mark in quick.trouble.iterdir()] == ["4"]
    with h5py.File(path) as file, h5py.File(base) as before:
        demos = [file[f"data/demo_{number}"] for number in range(4)]
        assert [demo.attrs["attempt"] for demo in demos] == [0, 2, 3, 4]
        assert np.array_equal(demos[1]["actions"], before["data/demo_1/actions"])
        made = json.loads(file["data"].attrs["collection"])
    assert (made["actor"], made["beta"], made["failed_attempts"]) == ("run", 0.5, [1])
    unknown = Actor("run", 0.5)  # in a notebook that only reads
    assert collect_with(unknown) == path
    with pytest.raises(FileNotFoundError, match="5 demonstrations are needed in .*--actor run"):
        collect_with(unknown, 5)
    with pytest.raises(ValueError, match="other settings .*actor_sha256: 'a{64}' there, 'b{64}'"):
        collect_with(other, 5)
    with pytest.raises(ValueError, match="beta: 0.5 there, 0.0 now"):
        collect_with(actor._replace(beta=0.0))
    with pytest.raises(ValueError, match="actor: 'run' there, none now"):
        collect_with(None)


def test_an_actor_of_the_joint_suite_is_asked_under_the_joint_suites_ids(quick, monkeypatch):
    """A policy conditioned on task numbers knows the first task of LIBERO-Object as 10."""
    base, given = quick("base", 0, num_demos=2, frame_stride=4), []

    def attempt(*arguments):
        given.append(arguments[0])
        return real(*arguments)

    real = collect._attempt
    monkeypatch.setattr(collect, "_attempt", attempt)
    here = functools.partial(collect.collect_tasks, workers=0)  # in this process
    monkeypatch.setattr(collect, "collect_tasks", here)
    actor = Actor("run", 0.5, "a" * 64, "a policy", {10: base}, 2)
    config = from_flat("demo", suite="libero_40", task_ids=(10,), num_demos=3, actor="run",
                       conditioning="language")
    files = collect.ensure_demonstrations(config, actor)
    assert [(each["suite"], each["task_id"]) for each in given] == [("libero_40", 10)]
    assert files[10].parent == paths.data_dir() / "dagger-run-beta0.5-stride4" / "libero_40"
    with h5py.File(files[10]) as file:
        assert len(file["data"]) == 3
    assert collect.ensure_demonstrations(config) == files  # found again, without the policy
    with pytest.raises(ValueError, match="suite='libero_40' has no demonstrations of its own"):
        collect.collect_tasks("libero_40", [10], 3, files[10].parent)


# --- the real simulator ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Two demonstrations really collected, with every fourth frame rendered."""
    folder = tmp_path_factory.mktemp("collected")
    yield collect_demonstrations("libero_object", 5, 2, folder, workers=0, frame_stride=4)
    collect.worker_env.cache_clear()


def visible(folder):
    """What is in it, but for the locks."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


@pytest.mark.sim
def test_a_file_has_liberos_layout(collected):
    check_demo_file(collected)
    assert [path.name for path in visible(collected.parent)] == \
        ["pick_up_the_tomato_sauce_and_place_it_in_the_basket_demo.hdf5"]
    with h5py.File(collected) as file:
        data = file["data"]
        assert data.attrs["num_demos"] == 2 == len(data)
        assert data.attrs["total"] == sum(len(demo["actions"]) for demo in data.values())
        assert json.loads(data.attrs["problem_info"])["language_instruction"] \
            == "pick up the tomato sauce and place it in the basket"
        assert json.loads(data.attrs["env_args"])["env_kwargs"]["controller"] == "OSC_POSE"
        assert data.attrs["macros_image_convention"] == "opengl"
        assert data.attrs["bddl_file_name"].endswith(".bddl")
        assert data.attrs[schema.ALIGNMENT_ATTR] == "raw"
        made = json.loads(data.attrs["collection"])
        assert made["by"] == "scripted expert" and made["mujoco"] == "3.3.2"
        for demo in data.values():
            assert demo.attrs["collection_version"] == schema.COLLECTION_VERSION
            length = demo.attrs["num_samples"]
            layout = {"actions": (7, "f8"), "states": (110, "f8"), "robot_states": (9, "f8"),
                      "executed_actions": (7, "f8"), "obs/joint_states": (7, "f8"),
                      "obs/gripper_states": (2, "f8"), "obs/ee_pos": (3, "f8"),
                      "obs/ee_ori": (3, "f8"), "obs/ee_states": (6, "f8")}
            for name, (width, kind) in layout.items():
                assert demo[name].shape == (length, width) and demo[name].dtype == kind, name
            for camera in schema.CAMERAS:
                images = demo["obs"][camera]
                assert images.shape == (length, 128, 128, 3) and images.dtype == np.uint8
                assert images.chunks is None and images.compression is None  # memory-mappable
            for name in ("rewards", "dones"):
                assert demo[name][:].tolist() == [0] * (length - 1) + [1]
            assert np.array_equal(demo.attrs["init_state"], demo["states"][0])
            assert demo.attrs["model_file"].startswith("<mujoco")
    assert measure_alignment(collected)[0] == "raw"


@pytest.mark.sim
def test_stored_actions_replay_to_the_stored_states_and_success(collected):
    with LiberoEnv("libero_object", 5) as env, h5py.File(collected) as file:
        demo = file["data/demo_1"]
        env.reset(seed=0)
        env.set_state(demo["states"][0])
        success = False
        for state, action in zip(demo["states"], demo["executed_actions"], strict=True):
            assert np.abs(env.state() - state)[1:30].max() < 5e-3
            _, success = env.step(action)
        assert success


@pytest.mark.sim
def test_frames_between_the_rendered_ones_repeat_them(collected, tmp_path):
    with pytest.raises(ValueError, match="frame_stride=0 is not valid"):
        collect_demonstrations("libero_object", 5, 1, tmp_path, frame_stride=0)
    path = collect_demonstrations("libero_object", 5, 1, tmp_path, workers=0)
    with h5py.File(path) as whole, h5py.File(collected) as file:
        every, fourth = whole["data/demo_0"], file["data/demo_0"]
        for name in ("actions", "states", "obs/ee_pos"):
            assert np.array_equal(every[name], fourth[name])
        rendered = np.arange(len(every["actions"])) // 4 * 4
        for camera in schema.CAMERAS:
            assert np.array_equal(every["obs"][camera][()][rendered], fourth["obs"][camera])
        assert fourth.attrs["frame_stride"] == 4
    card = {row["check"]: row["verdict"] for row in quality_card(collected)}
    assert card["frames, agent view"] == card["frames, wrist camera"] == "good"
    with pytest.raises(ValueError, match="frame_stride: 4 there, 2 now"):
        collect_demonstrations("libero_object", 5, 1, collected.parent, frame_stride=2)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """What was collected, in place of the simulator; no network and a Kaggle folder of its own."""
    asked = []

    def collect_tasks(suite, task_ids, num_demos, folder, *, placement, frame_stride):
        assert folder.parent.name.endswith("-stride4") == (frame_stride == 4)
        asked.extend((suite, task_id, num_demos, folder.parent.name, placement)
                     for task_id in task_ids)
        names = {task_id: collect.load_task(suite, task_id).name for task_id in task_ids}
        return {task_id: write_demo_file(folder / f"{name}_demo.hdf5", image_size=4,
                                         collection={"by": "a test"})
                for task_id, name in names.items()}

    monkeypatch.setattr(collect, "collect_tasks", collect_tasks)
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda *_, **__: pytest.fail("downloaded"))
    monkeypatch.setattr(paths, "KAGGLE_INPUT", tmp_path / "kaggle")
    return asked


def human(folder, task_id, suite="libero_spatial", **settings):
    return write_demo_file(folder / f"{collect.load_task(suite, task_id).name}_demo.hdf5",
                           image_size=4, alignment=None, **settings)


def test_what_is_used_is_found_or_collected_and_printed(made, capsys):
    files = collect.ensure_demonstrations(from_flat("tiny"))
    collect.ensure_demonstrations(from_flat("tiny", placement="wide"))
    collect.ensure_demonstrations(from_flat("tiny", frame_stride=1))
    assert made == [("libero_object", 0, 2, "scripted-stride4", "benchmark"),
                    ("libero_object", 0, 2, "scripted-wide-stride4", "wide"),
                    ("libero_object", 0, 2, "scripted", "benchmark")]
    assert list(files) == [0]
    assert "2 scripted demonstrations of 1 task (no human ones below" in capsys.readouterr().out


def test_tasks_of_the_joint_suite_are_collected_with_their_own_suites(made, monkeypatch):
    asked = dict(suite="libero_40", task_ids=(39, 0, 12, 11), num_demos=3)
    files = collect.ensure_demonstrations(from_flat("demo", **asked))
    assert made == [("libero_10", 9, 3, "scripted-stride4", "benchmark"),
                    ("libero_spatial", 0, 3, "scripted-stride4", "benchmark"),
                    ("libero_object", 2, 3, "scripted-stride4", "benchmark"),
                    ("libero_object", 1, 3, "scripted-stride4", "benchmark")]
    assert [path.parent.name for path in files.values()] == [
        "libero_10", "libero_spatial", "libero_object", "libero_object"]
    assert list(files) == [39, 0, 12, 11]
    wanted = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda *_, allow_patterns, **__: wanted.extend(allow_patterns))
    with pytest.raises(FileNotFoundError, match="no human demonstrations for"):
        collect.ensure_demonstrations(from_flat("demo", demos="human", **asked))
    assert [pattern.partition("/")[0] for pattern in wanted] == [
        "libero_10", "libero_spatial", "libero_object", "libero_object"]


@pytest.mark.parametrize("preset", ["demo", "trm", "tiny", "reference"])
def test_each_task_has_human_demonstrations_or_scripted_ones(tmp_path, made, capsys, preset):
    attached = {task: human(tmp_path / "kaggle" / "x", task) for task in (1, 4, 7)}
    attached[9] = human(tmp_path / "data" / "mine", 9)
    config = from_flat(preset, suite="libero_spatial", task_ids=list(range(10)), num_demos=3)
    files = collect.ensure_demonstrations(config)
    assert list(files) == list(range(10))
    assert {task: path for task, path in files.items() if task in attached} == attached
    assert [row[1] for row in made] == [0, 2, 3, 5, 6, 8]
    lines = [line for line in capsys.readouterr().out.splitlines()
             if "demonstrations of " in line or "demonstrations for " in line]
    assert len(lines) == 2
    assert lines[0].startswith("human demonstrations of 4 tasks: ")
    assert lines[1].startswith("3 scripted demonstrations for each of 6 tasks (")
    made.clear()
    collect.ensure_demonstrations(config.replace(demos="scripted"))
    assert len(made) == 10


@pytest.mark.parametrize("demos", ["auto", "human"])
def test_a_truncated_file_is_skipped_for_a_good_one_and_refused_without(
        tmp_path, made, demos, capsys):
    bad = human(tmp_path / "data" / "human", 3)
    bad.write_bytes(bad.read_bytes()[:2000])
    config = from_flat("demo", demos=demos, suite="libero_spatial", task_ids=(3,))
    with pytest.raises(DemoFileError, match=f"{bad}: truncated"):
        collect.ensure_demonstrations(config)
    good = human(tmp_path / "kaggle" / "x", 3)
    assert collect.ensure_demonstrations(config) == {3: good} and made == []
    printed = capsys.readouterr().out
    assert f"skipped {bad}: truncated" in printed and f"; {good} is used" in printed


GIVEN = dict(suite="libero_spatial", task_ids=(3, 5))


@pytest.mark.parametrize("demos", ["auto", "human", "scripted"])
def test_a_folder_that_was_given_is_the_only_one(tmp_path, made, demos, capsys):
    human(tmp_path / "data", 3)
    human(tmp_path / "data", 5)
    given = tmp_path / "libero_spatial_no_noops"
    with pytest.raises(FileNotFoundError, match="demo_dir='.*no_noops' is not a folder"):
        collect.ensure_demonstrations(from_flat("demo", demos=demos, demo_dir=str(given), **GIVEN))
    collection = {"by": "a test"} if demos == "scripted" else None
    expected = {task: human(given / "deep", task, collection=collection) for task in (3, 5)}
    for path in expected.values():
        with h5py.File(path, "a") as file:
            for name in {*file["data"].attrs} - {"collection"}:
                del file["data"].attrs[name]
    (other, unnamed) = human(given, 6), given / "notes.hdf5"
    unnamed.touch()
    config = from_flat("demo", demos=demos, demo_dir=str(given), **GIVEN)
    capsys.readouterr()
    assert collect.ensure_demonstrations(config) == expected
    printed = capsys.readouterr().out
    assert f"{other} (another task)" in printed and f"{unnamed} (not named <task" in printed
    expected[5].rename(given / "renamed_demo.hdf5")
    with pytest.raises(FileNotFoundError) as error:
        collect.ensure_demonstrations(config)
    assert collect.load_task("libero_spatial", 5).name in str(error.value)
    assert "renamed_demo.hdf5" in str(error.value) and made == []


def test_a_given_folder_without_human_demonstrations_is_refused(tmp_path, made):
    scripted = human(tmp_path / "given", 3, collection={"by": "a test"})
    config = from_flat("demo", suite="libero_spatial", task_ids=(3,), demos="human",
                       demo_dir=str(tmp_path / "given"))
    with pytest.raises(FileNotFoundError, match="no human demonstrations") as error:
        collect.ensure_demonstrations(config)
    assert f"{scripted} (scripted, not human)" in str(error.value)


def test_a_seed_gives_the_styles_and_pushes_of_this_version():
    """Where these numbers change, demonstrations do: raise ``schema.COLLECTION_VERSION``."""
    generator = np.random.default_rng([0, 5, 0])
    style, disturbance = Style.sample(generator), collect.Disturbance(generator)
    sent = np.array([disturbance.apply(np.zeros(7)) for _ in range(60)])
    found = schema.COLLECTION_VERSION, style.speed, style.hover, style.clearance, \
        *style.grasp_offset, np.abs(sent).sum()
    assert found == pytest.approx((5, 0.90732042, 0.06643247, 0.03822876, -0.00104877, -0.00217024,
                                   5.4289), rel=1e-4)
    assert np.flatnonzero(sent.any(axis=1)).tolist() == [16, 17, 18, 19]


def test_a_run_on_scripted_demonstrations_keeps_to_them(tmp_path, made):
    run = tmp_path / "run"
    run.mkdir()
    config = from_flat("demo", suite="libero_spatial", task_ids=(3,))
    attached = human(tmp_path / "kaggle", 3)
    for source, expected in {"scripted": [3], "human": []}.items():
        (run / "config.json").write_text(json.dumps(config.to_dict()))
        (run / "policy.json").write_text(json.dumps({"trained_on": {"files": [
            {"file": "x", "demos": [], "source": source}]}}))
        made.clear()
        files = collect.demonstrations_of(run, config)
        assert [row[1] for row in made] == expected
        assert (files == {3: attached}) == (source == "human")


def test_demonstrations_of_another_version_of_the_code_are_used_and_named(tmp_path, made, capsys):
    given = tmp_path / "given"
    path = human(given, 3, collection={"by": "a test"})
    config = from_flat("demo", suite="libero_spatial", task_ids=(3,), demo_dir=str(given))

    def printed(**versions):
        with h5py.File(path, "a") as file:
            for name, version in versions.items():
                file["data"][name].attrs["collection_version"] = version
        assert collect.ensure_demonstrations(config) == {3: path}
        return capsys.readouterr().out

    assert f"{path}: collected by version 0 of the code" in printed()
    now = schema.COLLECTION_VERSION
    assert f"version 0, {now} of the code" in printed(demo_0=now)
    assert "version" not in printed(demo_0=now, demo_1=now)
    assert f"version {now}, {now + 1} of the code" in printed(demo_1=now + 1)
    row = next(row for row in quality_card(path) if row["check"] == "version")
    assert row["verdict"] == "look" and str(path) in row["found"]
