import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest
from tqdm import tqdm

from trm_helpers import notebooks, paths
from trm_helpers.config import from_flat
from trm_helpers.files import append_jsonl
from trm_helpers.notebooks import notebook_parameters, run_notebook, run_suite
from trm_helpers.preflight import Check
from trm_helpers.progress import Stage
from trm_helpers.training.runs import create_run

PARAMETERS = '''
preset: str = "reference"  # which settings
run_name: str = ""  # folder under artifacts/
lr: float = 3e-4  # learning rate
'''
RESULTS = {"successes": 8, "episodes": 10, "success_rate": 0.8, "wilson_low": 0.490,
           "wilson_high": 0.943, "mean_length": 100.0, "std_length": 5.0}


def write_notebook(path, *cells, parameters=PARAMETERS):
    """A notebook with a ``parameters`` cell and code cells."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3",
                                    "language": "python"}
    tagged = nbformat.v4.new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]})
    notebook.cells = [tagged, *(nbformat.v4.new_code_cell(textwrap.dedent(c)) for c in cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def only_copies(monkeypatch):
    """Replace a notebook's process by writing the copy; returns what each would have been given."""
    given = []

    def run(stop, log, environment, source, copy, parameters, stage):
        given.append((source.stem, parameters))
        copy.write_text("{}")
        return ""

    monkeypatch.setattr(notebooks, "_in_own_process", run)
    return given


@pytest.fixture
def nb_dir(tmp_path, monkeypatch):
    """An empty notebooks folder in place of the checkout's."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(paths, "notebooks_dir", lambda: folder)
    return folder


# --- one notebook --------------------------------------------------------------------------------

WHERE = """
    import json, os, pathlib, sys
    said = {name: os.environ.get(name) for name in ("TRM_ARTIFACTS_DIR", "TRM_DATA_DIR", "GPU")}
    said |= {"python": sys.executable, "cwd": os.getcwd(), "lr": lr, "run_name": run_name}
    pathlib.Path("said.json").write_text(json.dumps({**said, "demo_dir": demo_dir}))
    print(os.environ.get("GPU"))
"""


def test_runs_with_this_python_in_its_folder_with_the_callers_parameters_and_folders(
        nb_dir, monkeypatch, tmp_path):
    """Relative folders are the caller's; the environment and the log are the notebook's own."""
    write_notebook(nb_dir / "04_train.ipynb", WHERE, parameters=PARAMETERS + "demo_dir = None")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRM_ARTIFACTS_DIR", "rel")
    monkeypatch.delenv("TRM_DATA_DIR")
    monkeypatch.setattr(paths, "repo_root", Path.cwd)  # as with an installed wheel
    log = tmp_path / "output.log"
    executed = run_notebook("04_train", {"lr": 1e-3, "run_name": 20240101, "demo_dir": "human"},
                            environment={"GPU": "third"}, log=log)
    assert executed == tmp_path / "rel" / "20240101" / "notebooks" / "04_train.ipynb"
    assert [p.name for p in executed.parent.iterdir()] == ["04_train.ipynb"]
    assert json.loads((nb_dir / "said.json").read_text()) == {
        "TRM_ARTIFACTS_DIR": str(tmp_path / "rel"), "TRM_DATA_DIR": str(tmp_path / "data"),
        "GPU": "third", "python": sys.executable, "cwd": str(nb_dir), "lr": 1e-3,
        "run_name": "20240101", "demo_dir": str(tmp_path / "human")}
    cells = nbformat.read(executed, as_version=4).cells
    assert [cell.execution_count for cell in cells] == [1, 2, 3]  # one injected
    assert cells[2].outputs[0].text == "third\n"
    assert re.fullmatch(r"04_train \.\.\.\n04_train, done after \d.\d min\n", log.read_text())
    checked, _ = notebooks._checked({"preset": "tiny", "more": {"demo_dir": "human"}}, {"more": ""})
    assert checked["more"]["demo_dir"] == str(tmp_path / "human")


def test_unknown_parameter_is_refused_before_anything_runs(nb_dir, tmp_path):
    write_notebook(nb_dir / "04_train.ipynb", "open('ran', 'w').close()")
    with pytest.raises(ValueError) as error:
        run_notebook("04_train", {"learning_rate": 1e-3})
    assert str(error.value) == ("unknown parameter 'learning_rate' for 04_train; did you mean "
                                "'lr'?")
    with pytest.raises(ValueError) as error:
        run_notebook("04_train", {"zzz": 1e-3})
    message = str(error.value)
    assert "unknown parameter 'zzz' for 04_train; valid:" in message
    assert "  lr        learning rate" in message.splitlines()
    assert not (nb_dir / "ran").exists()
    assert not (tmp_path / "artifacts").exists()


def test_other_settings_of_an_existing_run_are_refused_before_anything_runs(nb_dir, monkeypatch):
    write_notebook(nb_dir / "04_train.ipynb",
                   parameters=PARAMETERS + "stop_epoch: int = 0  # stop after this epoch\n")
    given = only_copies(monkeypatch)
    run = create_run(from_flat("tiny"), "first")
    append_jsonl(run / "metrics.jsonl", {"epoch": 1})
    with pytest.raises(ValueError, match="first was made with other settings .*lr"):
        run_notebook("04_train", {"preset": "tiny", "run_name": "first", "lr": 0.5})
    assert not given
    allowed = {"preset": "tiny", "run_name": "first", "stop_epoch": 1}
    run_notebook("04_train", allowed)
    assert given == [("04_train", allowed)]
    # a notebook without a preset decides about its settings itself
    assert notebooks._checked({"run_name": "first"}, {"run_name": "", "stop_epoch": ""})[1] == run


def test_a_notebook_with_a_folder_of_its_own_is_checked_there(nb_dir, tmp_path, monkeypatch):
    """A trial of a search, where ``artifacts`` holds another run of its name."""
    write_notebook(nb_dir / "04_train.ipynb",
                   parameters=PARAMETERS + "stop_epoch: int = 0  # stop after this epoch\n")
    given = only_copies(monkeypatch)
    other = create_run(from_flat("tiny", lr=0.5), "first")
    append_jsonl(other / "metrics.jsonl", {"epoch": 1})
    trial = tmp_path / "search" / "first"
    run_notebook("04_train", {"preset": "tiny", "run_name": "first"}, run_dir=trial)
    shutil.copytree(other, trial, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="search/first was made with other settings .*lr"):
        run_notebook("04_train", {"preset": "tiny", "run_name": "first"}, run_dir=trial)
    assert len(given) == 1


def test_copy_keeps_the_last_state_of_a_progress_bar(tmp_path):
    notebook = write_notebook(tmp_path / "a.ipynb", """
        import sys, time
        for step in range(4):
            print(f"line {step}", flush=True)
            print(f"\\rstep {step}", end="", file=sys.stderr, flush=True)
            time.sleep(0.1)
    """)
    [outputs] = [cell.outputs for cell in nbformat.read(run_notebook(notebook), 4).cells
                 if cell.outputs]
    assert {output.name: output.text.strip() for output in outputs} == {
        "stdout": "line 0\nline 1\nline 2\nline 3", "stderr": "step 3"}


def test_parameters_have_their_comments(tmp_path):
    notebook = write_notebook(tmp_path / "a.ipynb")
    assert notebook_parameters(notebook) == {
        "preset": "which settings", "run_name": "folder under artifacts/", "lr": "learning rate"}


def test_failure_has_the_traceback_and_keeps_its_copy_beside_an_earlier_good_one(tmp_path):
    notebook = tmp_path / "a.ipynb"

    def fail():
        write_notebook(notebook, "print('before')", "wheels = 4\nwheels / 0", "print('after')")
        with pytest.raises(RuntimeError) as error:
            run_notebook(notebook, run_dir=tmp_path)
        assert "a.ipynb failed: ZeroDivisionError: division by zero" in str(error.value)
        assert "wheels / 0" in str(error.value)
        assert "\x1b" not in str(error.value)
        return sorted(path.name for path in (tmp_path / "notebooks").iterdir())

    assert fail() == ["a.failed.ipynb"]
    write_notebook(notebook, "print('good')")
    output = run_notebook(notebook, run_dir=tmp_path)
    assert [*output.parent.iterdir()] == [output]
    good = output.read_bytes()
    assert fail() == ["a.failed.ipynb", "a.ipynb"] and output.read_bytes() == good


def test_a_full_disk_elsewhere_is_the_notebooks_own_error(tmp_path):
    """Its executed copy was written; the disk of the runs is not full."""
    notebook = write_notebook(tmp_path / "a.ipynb", "open('/dev/full', 'w').write('x' * 10**6)")
    with pytest.raises(RuntimeError, match="a.ipynb failed: OSError: .*No space left") as error:
        run_notebook(notebook, run_dir=tmp_path)
    assert str(tmp_path / "notebooks" / "a.failed.ipynb") in str(error.value)


def test_what_fails_outside_a_cell_is_not_called_a_lack_of_memory(tmp_path, monkeypatch):
    notebook = write_notebook(tmp_path / "a.ipynb", "print(1)")
    kernels = tmp_path / "kernels" / "python3"
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(json.dumps(
        {"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="a.ipynb failed: RuntimeError: Kernel died before"):
        run_notebook(notebook, run_dir=tmp_path / "run")


def test_killed_kernel_is_an_error(tmp_path):
    notebook = write_notebook(tmp_path / "a.ipynb", "import os\nos._exit(9)")
    log = tmp_path / "output.log"
    with pytest.raises(RuntimeError, match=rf"a.ipynb failed: its kernel ended .* see {log}"):
        run_notebook(notebook, run_dir=tmp_path, log=log)
    assert not (tmp_path / "notebooks" / "a.ipynb").exists()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_ends_the_kernel_and_its_children(tmp_path, stop):
    notebook = write_notebook(tmp_path / "a.ipynb", """
        import os, pathlib, time
        from trm_helpers.sim.parallel import run_jobs
        def job(seconds):
            pathlib.Path("worker").write_text(str(os.getpid()))
            time.sleep(seconds)
        pathlib.Path("kernel").write_text(str(os.getpid()))
        list(run_jobs(job, [100], workers=1))
    """)
    command = subprocess.Popen([sys.executable, "-m", "trm_helpers", "run", str(notebook)],
                               stderr=subprocess.PIPE, text=True)
    pids = [tmp_path / name for name in ("kernel", "worker")]
    wait_for(lambda: all(path.exists() and path.read_text() for path in pids))
    command.send_signal(stop)
    _, said = command.communicate(timeout=30)
    wait_for(lambda: not any((Path("/proc") / path.read_text()).exists() for path in pids))
    if stop == signal.SIGTERM:
        assert command.returncode == 130 and "interrupted" in said
        assert not [p for p in paths.artifacts_dir().rglob("*") if p.is_file()]


def test_a_notebook_that_is_the_main_module_runs_another(tmp_path):
    """As `%run 05_search.ipynb` does; a notebook file is JSON, whose `null` is no Python."""
    write_notebook(tmp_path / "inner.ipynb", "print('inside')")
    outer = write_notebook(tmp_path / "outer.ipynb", f"""
        from trm_helpers.notebooks import run_notebook
        run_notebook({str(tmp_path / "inner.ipynb")!r}, run_dir={str(tmp_path)!r})
    """)
    done = subprocess.run([sys.executable, "-m", "IPython", "-c", f"%run {outer}"], text=True,
                          capture_output=True, timeout=120)
    assert (tmp_path / "notebooks" / "inner.ipynb").exists(), done.stdout + done.stderr


@pytest.mark.parametrize("content", ["cells = []", "{}", '{"cells": [3], "metadata": {}}', "",
                                     '{"cells": [], "metadata": {}, "nbformat": 4}'])
def test_a_file_that_is_no_notebook_is_named(tmp_path, content):
    (tmp_path / "bad.ipynb").write_text(content)
    with pytest.raises(ValueError, match="bad.ipynb is not a notebook: ."):
        run_notebook(tmp_path / "bad.ipynb")


def test_a_missing_notebook_lists_the_existing_ones(nb_dir):
    with pytest.raises(FileNotFoundError, match="make notebooks"):
        run_notebook("04_train")
    write_notebook(nb_dir / "00_setup.ipynb")
    with pytest.raises(FileNotFoundError, match="no preset or notebook '.'; .*one of 00_setup"):
        run_notebook(".")
    for wrong in ("04_train", "mine/00_setup.ipynb", "mine/00_setup.py", "00_setup.v2"):
        with pytest.raises(FileNotFoundError, match=f"'{wrong}'.*one of 00_setup"):
            run_notebook(wrong)


BAD = [({"run_name": "../up"}, "run_name='../up'"), ({"run_name": "my run"}, "run_name='my run'"),
       ({"resume": "false"}, "resume='false'"), ({"lr": -1}, "lr=-1"), ({"lr": "x"}, "lr='x'"),
       ({"task_ids": 3}, "task_ids=3"), ({"more": {"lr": 1}, "lr": 0.1}, "given by itself as well"),
       ({"search_storage": "mysql://u:PASSWORD@h/d"}, "TRM_SEARCH_STORAGE")]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_a_bad_parameter_is_refused_before_anything_runs(nb_dir, tmp_path, given, message):
    names = "\n".join(f"{name} = None" for name in ("resume", "task_ids", "more", "search_storage"))
    write_notebook(nb_dir / "04_train.ipynb", "open('ran', 'w')", parameters=PARAMETERS + names)
    with pytest.raises(ValueError, match=message) as refused:
        run_notebook("04_train", given)
    assert "PASSWORD" not in str(refused.value)
    with pytest.raises(ValueError, match=message):
        run_suite("tiny", **given)
    assert not (nb_dir / "ran").exists() and not paths.artifacts_dir().exists()


def test_a_notebook_that_reads_a_run_takes_its_path_and_writes_to_a_copy(
        nb_dir, trained, tmp_path, monkeypatch):
    write_notebook(nb_dir / "06_eval.ipynb", WHERE,
                   parameters=PARAMETERS + "weights = 'best'\ndemo_dir = None")
    shutil.copytree(trained, tmp_path / "input" / "theirs")
    monkeypatch.chdir(tmp_path / "input")
    copy = paths.artifacts_dir() / "theirs"
    assert run_notebook("06_eval", {"run_name": "theirs/"}).parent == copy / "notebooks"
    assert json.loads((nb_dir / "said.json").read_text())["run_name"] in ("theirs/", "theirs")
    assert not (tmp_path / "input" / "theirs" / "notebooks").exists()
    given = only_copies(monkeypatch)
    assert run_notebook("06_eval").parent == copy / "notebooks"  # the newest run's
    assert given == [("06_eval", {})]
    monkeypatch.setenv("TRM_ARTIFACTS_DIR", str(tmp_path / "none"))
    for name, error in (("../input/theirs", ValueError), ("nobody", FileNotFoundError),
                        ("", FileNotFoundError)):
        with pytest.raises(error):
            run_notebook("06_eval", {"run_name": name})
    assert len(given) == 1 and not (paths.artifacts_dir() / "notebooks").exists()


@pytest.mark.parametrize(("given", "message"), [
    ({"num_episodes": 51}, "num_episodes=51.*0 to 50"),
    ({"first_init_state": 49}, "first_init_state=49.*0 to 48 with 2 episodes"),  # the run's number
    ({"protocol": "x"}, "protocol='x'")])
def test_a_bad_setting_of_an_evaluation_is_refused_before_anything_runs(nb_dir, trained, given,
                                                                        message):
    write_notebook(nb_dir / "06_eval.ipynb", "open('ran', 'w')", parameters=PARAMETERS + "\n".join(
        f"{name} = None" for name in ("weights", "num_episodes", "first_init_state", "protocol")))
    with pytest.raises(ValueError, match=message):
        run_notebook("06_eval", {"run_name": trained.name, **given})
    assert not (nb_dir / "ran").exists() and not (trained / "notebooks").exists()


# --- the suite -----------------------------------------------------------------------------------

@pytest.fixture
def suite(nb_dir, monkeypatch):
    """Three notebooks that append their number to ``order``; preflight and collection pretended."""
    for name in ("00_setup", "04_train", "06_eval"):
        write_notebook(nb_dir / f"{name}.ipynb",
                       f"with open('order', 'a') as file: file.write('{name[:2]} ')",
                       "print('epoch 2 of 2: training loss 0.1, validation loss 0.1')"
                       if name == "04_train" else "print('done')")
    monkeypatch.setattr("trm_helpers.preflight.preflight", lambda: [Check("Python", "ok", "3")])
    monkeypatch.setattr("trm_helpers.demos.collect.ensure_demonstrations",
                        lambda config, _: [*tqdm(range(3), f"demonstrations of {config.preset}")])
    run_dir = paths.artifacts_dir() / "demo"
    run_dir.mkdir(parents=True)
    (run_dir / "results.json").write_text(json.dumps(RESULTS))
    return nb_dir


def pretend_runs(monkeypatch, fail=()):
    """Replace execution by writing the copy; returns the list of what ran."""
    ran = []

    def run(path, parameters, *, run_dir, stage):
        ran.append((path.stem, parameters))
        if path.stem in fail:
            raise RuntimeError(f"{path.stem} failed")
        copy = run_dir / "notebooks" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("{}")
        (run_dir / "results.json").write_text(json.dumps(RESULTS))

    monkeypatch.setattr(notebooks, "run_notebook", run)
    return ran


def test_suite_runs_in_order_and_ends_with_the_success_line(suite, capfd):
    for name in ("report.html", "videos/success/task2.mp4"):
        file = paths.artifacts_dir() / "demo" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    run_dir = run_suite("demo")
    assert run_dir == paths.artifacts_dir() / "demo"
    assert (suite / "order").read_text() == "00 04 06 "
    printed, stages = capfd.readouterr()
    found, success, page, film, following = printed.strip().splitlines()[-5:]
    assert found == f"{run_dir}: notebooks 3, figures 0, films 1, checkpoints 0"
    assert success.startswith("8 of 10 episodes, success rate 80 %") and success.endswith("minutes")
    assert page == f"page  {run_dir / 'report.html'}"
    assert film == f"film  {run_dir / 'videos' / 'success' / 'task2.mp4'}"
    assert following.endswith("python -m trm_helpers evaluate demo --num-episodes 50")
    lines = re.sub(r"\d+\.\d", "0.0", stages).splitlines()
    assert lines[::2] == [f"{' '.join(line.split()[:2]).strip(',')} ..." for line in lines[1::2]]
    assert lines[1::2] == [  # one line each, nothing foreign
        "[1/5] checks 1 of 1 passed, done after 0.0 min, then about 8 min",
        "[2/5] demonstrations 3 of 3, done after 0.0 min, then about 5 min",
        "[3/5] 00_setup, done after 0.0 min, then about 1 min",
        "[4/5] 04_train epoch 2 of 2, done after 0.0 min, then about 1 min",
        "[5/5] 06_eval, done after 0.0 min"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_stage_is_a_line_of_its_own_that_is_rewritten(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Stage("[2/4] demonstrations", 6.2) as stage:
        for done, seconds in ((0, 0), (19, 19 * 19)):
            stage.write("\r" + tqdm.format_meter(done, 30, seconds, prefix="demonstrations of x"))
        stage.write("\rloading: 50%|##  | 1/2 [1:00:00<1:00:00, 19s/demo]\nUserWarning: ours\n")
    shown = [line.strip() for line in sys.stderr.getvalue().split("\r\x1b[K")]
    assert shown == ["", "[2/4] demonstrations, then about 6 min",
                     "[2/4] demonstrations 0 of 30, then about 6 min",
                     "[2/4] demonstrations 19 of 30, 3.5 min, then about 6 min",
                     "[2/4] demonstrations loading 1 of 2, 60.0 min, then about 6 min",
                     "UserWarning: ours",
                     "[2/4] demonstrations, done after 0.0 min, then about 6 min"]


@pytest.mark.parametrize(("preset", "parameters", "successes", "refused"), [
    ("demo", {}, 7, False), ("demo", {}, 6, True), ("demo", {}, 0, True),
    ("demo", {"lr": 0.5}, 6, True), ("demo", {"task_ids": [7]}, 0, False), ("tiny", {}, 0, False)])
def test_the_demo_has_a_floor(suite, monkeypatch, preset, parameters, successes, refused):
    write_notebook(suite / "00_setup.ipynb", parameters="task_ids = None  # type: list")
    found = {**RESULTS, "successes": successes, "success_rate": successes / 10}
    monkeypatch.setitem(globals(), "RESULTS", found)
    pretend_runs(monkeypatch)
    expected = contextlib.nullcontext()
    if refused:
        expected = pytest.raises(RuntimeError, match=rf"solved {successes} of 10 .*70%.*"
                                                     rf"{'lr=0.5.*' * bool(parameters)}videos/fail")
    for _ in range(2):  # also where every notebook was kept
        with expected:
            run_suite(preset, **parameters)


def test_each_parameter_goes_to_the_notebooks_that_have_it(suite, monkeypatch):
    write_notebook(suite / "00_setup.ipynb", parameters='preset: str = "demo"  # settings')
    ran = pretend_runs(monkeypatch)
    run_suite("demo", "mine", lr=0.01)
    both = {"lr": 0.01, "preset": "demo", "run_name": "mine"}
    assert ran == [("00_setup", {"preset": "demo"}), ("04_train", both), ("06_eval", both)]


def test_an_interrupted_suite_resumes(suite, monkeypatch):
    ran = pretend_runs(monkeypatch, fail=["04_train"])
    with pytest.raises(RuntimeError, match="04_train failed"):
        run_suite("demo")
    assert [name for name, _ in ran] == ["00_setup", "04_train"]
    ran = pretend_runs(monkeypatch)
    run_suite("demo")
    assert [name for name, _ in ran] == ["04_train", "06_eval"]
    ran = pretend_runs(monkeypatch)
    run_suite("demo")
    assert ran == []


@pytest.mark.parametrize("change", ["source", "parameters"])
def test_a_change_runs_that_notebook_and_all_after_it(suite, monkeypatch, change):
    pretend_runs(monkeypatch)
    run_suite("demo", lr=0.01)
    ran = pretend_runs(monkeypatch)
    if change == "source":
        write_notebook(suite / "04_train.ipynb", "print('changed')")
        run_suite("demo", lr=0.01)
        assert [name for name, _ in ran] == ["04_train", "06_eval"]
    else:
        run_suite("demo", lr=0.02)
        assert [name for name, _ in ran] == ["00_setup", "04_train", "06_eval"]


def test_minutes_add_up_over_interruptions(suite, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(notebooks.time, "time", lambda: now[0])

    def run(minutes, fail=()):
        monkeypatch.setenv("TRM_STARTED_AT", str(now[0]))
        now[0] += 60 * minutes  # set-up and all
        pretend_runs(monkeypatch, fail)
        run_suite("demo")

    with pytest.raises(RuntimeError):
        run(7, fail=["06_eval"])
    run(2.5)
    assert ", 9.5 minutes\n" in capsys.readouterr().out
    run(1)  # nothing left to do: still the time that it took
    assert ", 9.5 minutes\n" in capsys.readouterr().out


def test_the_suite_refuses_parameters_that_no_notebook_has(suite, monkeypatch):
    ran = pretend_runs(monkeypatch)
    with pytest.raises(ValueError, match="unknown parameter 'speed' for 00_setup, 04_train, 06"):
        run_suite("demo", speed=1)
    with pytest.raises(ValueError, match="preset='fast' is not valid; .*'reference', 'demo'"):
        run_suite("fast")
    append_jsonl(create_run(from_flat("demo"), "made") / "metrics.jsonl", {"epoch": 1})
    with pytest.raises(ValueError, match="made was made with other settings .*lr"):
        run_suite("demo", "made", lr=0.5)
    assert ran == []


def test_a_suite_collects_with_its_actor(suite, monkeypatch):
    pretend_runs(monkeypatch)
    asked = []
    monkeypatch.setattr("trm_helpers.evaluation.actor.actor_of", lambda config: config.data.actor)
    monkeypatch.setattr("trm_helpers.demos.collect.ensure_demonstrations",
                        lambda config, actor=None: asked.append(actor))
    write_notebook(suite / "04_train.ipynb", parameters=PARAMETERS + 'actor: str = ""  # a run')
    run_suite("demo", actor="a-run")
    assert asked == ["a-run"]


def test_failed_preflight_stops_the_suite(suite, monkeypatch):
    ran = pretend_runs(monkeypatch)
    monkeypatch.setattr("trm_helpers.preflight.preflight", lambda: [Check("GL", "fail", "none")])
    with pytest.raises(RuntimeError, match="preflight failed"):
        run_suite("demo")
    assert ran == []
