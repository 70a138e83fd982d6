"""Tracking by W&B: what is logged, and that nothing of it delays or ends a training."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
from learning import once, straight

from trm_helpers.files import read_jsonl
from trm_helpers.training import tracking
from trm_helpers.training.tracking import Tracker, allowed_mode

# stands in for the package: writes its calls to a file; $PRETEND makes it misbehave
PRETENDED = """
import json, os, time

def note(**what):
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps(what) + chr(10))

def misbehave(where):
    how, _, place = os.environ.get("PRETEND", "").partition(" in ")
    if place == where:
        note(reached=where)
        if how == "raise":
            raise RuntimeError("server says no" + chr(10) + "a long trace")
        if how == "exit":
            os._exit(3)
        if how == "hang":
            time.sleep(600)

misbehave("import")

class Settings:
    base_url = os.environ["SERVER"]
    def __init__(self, **settings):
        note(limits={key: settings.get(key) for key in ("init_timeout", "login_timeout")})

class Run:
    url = "https://example.org/run"
    def log(self, row, step):
        note(step=step, row=row)
        misbehave("log")
    def finish(self):
        misbehave("finish")
        note(finished=True)

def init(mode, settings, **given):
    note(mode=mode, **given)
    misbehave(mode)
    return Run()
"""


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """The calls of the stand-in, one per row, and a server that accepts connections."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(PRETENDED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.jsonl"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("SERVER", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield lambda: read_jsonl(tmp_path / "seen.jsonl")


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_every_row_is_logged_with_the_settings(small_run, seen, mode, capfd, monkeypatch):
    project = {"online": "a-project", "offline": ""}[mode]  # an empty variable is none
    monkeypatch.setenv("WANDB_PROJECT", project)
    trainer = small_run(wandb_mode=mode)
    rows = trainer.fit()
    asked = [row for row in seen() if "mode" in row]
    assert [(row["mode"], row["project"], row["name"], row["dir"]) for row in asked] == [
        (mode, project or "trm-libero", "small", str(trainer.run))]
    assert asked[0]["config"]["lr"] == 1e-3 and asked[0]["config"]["hidden_dim"] == 16
    assert [row for row in seen() if "step" in row] == [
        {"step": 1, "row": rows[0]}, {"step": 2, "row": rows[1]}]
    assert seen()[-1] == {"finished": True}
    assert ("W&B: https://example.org/run" in capfd.readouterr().out) == (mode == "online")


@pytest.mark.parametrize(("variable", "asked", "mode"), [
    ("", "online", "online"), ("online", "offline", "offline"), ("run", "online", "online"),
    ("offline", "online", "offline"), ("DRYRUN", "online", "offline"),
    ("disabled", "online", "disabled"), ("disabled", "offline", "disabled"),
    ("online", "disabled", "disabled"), ("nonsense", "online", "offline"),
])
def test_the_environment_can_only_restrict_the_mode(monkeypatch, variable, asked, mode):
    monkeypatch.setenv("WANDB_MODE", variable)
    assert allowed_mode(asked) == mode


@pytest.mark.parametrize(("value", "mode"), [
    ("true", "disabled"), (" True ", "disabled"), ("1", "disabled"), ("", "online"),
    ("false", "online"), ("0", "online")])
def test_wandb_can_be_disabled_by_its_own_variable(monkeypatch, value, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert allowed_mode("online") == mode


@pytest.mark.parametrize("url", ["api.wandb.ai", "localhost:8080", "https://"])
def test_an_address_without_a_host_is_refused(url):
    with pytest.raises(ConnectionError, match=f"'{url}' is no address like https://"):
        tracking.connect(url)


def test_disabled_starts_no_process(small_run, seen, monkeypatch):
    assert small_run("a", wandb_mode="disabled").fit()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert small_run("b", wandb_mode="online").fit()
    assert not seen() and Tracker("online", {}).process is None


def test_the_process_runs_the_package_of_its_trainer(monkeypatch, capsys):
    def popen(command, env, **_):
        home = Path(env["PYTHONPATH"].split(os.pathsep)[0])
        module = home / f"{command[-1].replace('.', os.sep)}.py"
        raise OSError("found" if module.samefile(tracking.__file__) else "another package")

    monkeypatch.setattr(tracking.subprocess, "Popen", popen)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    Tracker("offline", {}).close()
    assert capsys.readouterr().out == "W&B is off: found\n"


def test_without_a_network_it_logs_offline_and_says_so(small_run, seen, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    monkeypatch.setenv("SERVER", f"http://127.0.0.1:{closed}")
    small_run(wandb_mode="online").fit()
    assert [row["mode"] for row in seen() if "mode" in row] == ["offline"]
    assert [row["step"] for row in seen() if "step" in row] == [1, 2]
    printed = [line for line in capfd.readouterr().out.splitlines() if "W&B" in line]
    assert printed == ["W&B logs offline (127.0.0.1 cannot be reached); `wandb sync` uploads it "
                       "later"]


def test_a_refused_key_logs_offline(small_run, seen, monkeypatch, capfd):
    monkeypatch.setenv("PRETEND", "raise in online")
    small_run(wandb_mode="online").fit()
    assert [row["mode"] for row in seen() if "mode" in row] == ["online", "offline"]
    assert [row["step"] for row in seen() if "step" in row] == [1, 2]
    assert "W&B logs offline (server says no); `wandb sync`" in capfd.readouterr().out
    limits = seen()[0]["limits"]
    assert limits == {"init_timeout": 10.0, "login_timeout": 10.0}


@pytest.mark.parametrize("misbehaviour", [
    f"{how} in {where}" for how in ("raise", "exit", "hang")
    for where in ("import", "offline", "log", "finish")])
def test_failures_of_the_tracker_do_not_change_training(small_run, seen, monkeypatch,
                                                        misbehaviour):
    plain, _ = once(straight, small_run)
    start, waited = Tracker.__init__, []

    def start_and_wait(tracker, *given):
        start(tracker, *given)
        since = time.monotonic()
        while not any(row.keys() & {"mode", "reached"} for row in seen()):
            assert time.monotonic() - since < 60
            time.sleep(0.01)
        waited.append(time.monotonic() - since)

    monkeypatch.setattr(Tracker, "__init__", start_and_wait)
    monkeypatch.setattr(tracking, "_FINISH_WITHIN", 1.0)
    monkeypatch.setenv("PRETEND", misbehaviour)
    trainer = small_run("tracked", wandb_mode="offline")
    began = time.monotonic()
    rows = trainer.fit()
    assert time.monotonic() - began - waited[0] < 10
    where = misbehaviour.split(" in ")[1]
    assert seen()[-1] == {"reached": where}
    assert [row["step"] for row in seen() if "step" in row] == {
        "log": [1], "finish": [1, 2]}.get(where, [])
    assert [row["val_loss"] for row in rows] == [row["val_loss"] for row in plain]
    assert len(read_jsonl(trainer.run / "metrics.jsonl")) == 2


def test_a_tracker_that_cannot_be_imported_is_said(small_run, seen, monkeypatch, capfd):
    monkeypatch.setenv("PRETEND", "raise in import")
    assert small_run(wandb_mode="offline").fit()
    said = capfd.readouterr().out
    assert "W&B is off: RuntimeError: server says no" in said
    assert "W&B ended before the training and lacks rows" in said


def test_a_process_that_reads_nothing_does_not_delay_rows(seen, monkeypatch):
    monkeypatch.setattr(tracking, "_FINISH_WITHIN", 0.1)
    monkeypatch.setenv("PRETEND", "hang in import")
    tracker = Tracker("offline", {"project": "p", "name": "n", "dir": ".", "config": {}})
    began = time.monotonic()
    for epoch in range(1, 2000):  # more than a pipe holds
        tracker.log({"epoch": epoch, "text": "x" * 200})
    assert time.monotonic() - began < 2
    process = tracker.process
    tracker.close()
    tracker.log({"epoch": 0})
    assert process.poll() is not None


def test_the_installed_package_logs_offline(small_run, monkeypatch, capfd):
    """The real package, with a malformed key and no server."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "malformed")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    trainer = small_run(epochs=1, wandb_mode="online")
    trainer.fit()
    assert "W&B logs offline (127.0.0.1 cannot be reached)" in capfd.readouterr().out
    (folder,) = (trainer.run / "wandb").glob("offline-run-*")
    assert any(path.suffix == ".wandb" for path in folder.iterdir())


@pytest.mark.parametrize(("variable", "value"), [
    ("WANDB_MODE", ""), ("WANDB_MODE", " offline "), ("WANDB_MODE", "DRYRUN"),
    ("WANDB_BASE_URL", "nonsense")])
def test_the_installed_package_logs_offline_whatever_the_environment_says(
        tmp_path, monkeypatch, capfd, variable, value):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(variable, value)
    tracker = Tracker("online", {"project": "p", "name": "n", "dir": str(tmp_path), "config": {}})
    tracker.log({"epoch": 1, "train_loss": 0.5})
    tracker.close()
    assert "lacks rows" not in capfd.readouterr().out
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert any(path.suffix == ".wandb" for path in folder.iterdir())


def test_the_installed_package_refuses_a_malformed_key_at_once(small_run, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "malformed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        trainer = small_run(epochs=1, wandb_mode="online")
        trainer.fit()
    assert time.monotonic() - began < 15
    assert "W&B logs offline (" in capfd.readouterr().out
    assert list((trainer.run / "wandb").glob("offline-run-*"))
    assert json.loads((trainer.run / "config.json").read_text())
