import signal
import subprocess
import sys
import threading
import time

import pytest
from pretend_training import train_into, write_pretending_notebook

from trm_helpers.files import append_jsonl, exclusive_lock
from trm_helpers.search.trials import measure, measure_curve, read_trial, run_trial
from trm_helpers.stats import wilson_interval

VALUES = dict(lr=2.0, hidden_dim=3, num_recursions=1, epochs=3, stop_epoch=0, selection_episodes=0)


def test_curve_is_measured_by_hand():
    # 90 % of the way from 1.0 to 0.2 is 0.28; 0.5 > 1.2 x 0.25 is a spike, 0.26 is none
    curve = [1.0, 0.4, 0.25, 0.5, 0.26, 0.2]
    assert measure_curve(curve) == {"final_val_loss": 0.2, "epochs_to_converge": 3, "spikes": 1}
    assert measure_curve([0.7]) == {"final_val_loss": 0.7, "epochs_to_converge": 1, "spikes": 0}


def test_a_folder_is_measured_by_its_files(tmp_path):
    with pytest.raises(RuntimeError, match="metrics.jsonl holds no epoch"):
        measure(tmp_path)
    train_into(tmp_path, {**VALUES, "selection_episodes": 4}, successes=3)
    append_jsonl(tmp_path / "selection.jsonl", {
        "suite": "libero_object", "task_id": 0, "init_state": None, "seed": 9, "success": True,
        "steps": 4, "sha256": "other weights"})
    found = measure(tmp_path)
    assert found["epochs"] == 3 and found["minutes"] == 3.0
    assert found["val_losses"] == [6.0, 3.0, 2.0] and found["final_val_loss"] == 2.0
    assert (found["successes"], found["episodes"], found["success_rate"]) == (3, 4, 0.75)
    assert (found["wilson_low"], found["wilson_high"]) == wilson_interval(3, 4)
    assert [row["seed"] for row in found["rollouts"]] == [0, 1, 2, 3]


def test_a_trial_runs_in_a_notebook_once_per_epoch_asked_for(tmp_path):
    notebook = write_pretending_notebook(tmp_path / "04_train.ipynb")
    parameters = {"lr": 2.0, "epochs": 4, "stop_epoch": 1, "more": {"hidden_dim": 8}}
    with pytest.raises(ValueError, match="unknown parameter 'rate'"):
        run_trial(notebook, {**parameters, "rate": 1}, tmp_path / "t")
    assert read_trial(tmp_path / "t") is None

    first = run_trial(notebook, parameters, tmp_path / "t")
    assert first["val_losses"] == [2.0]
    state = tmp_path / "t" / "training_state.pt"
    state.touch()
    run_trial(notebook, parameters, tmp_path / "t")
    assert state.exists()  # for the epochs that are left
    further = run_trial(notebook, {**parameters, "stop_epoch": 0}, tmp_path / "t")
    assert not state.exists()
    assert further["val_losses"] == [2.0, 1.0, 2 / 3, 0.5]
    notebook.unlink()  # what was measured is not run again
    assert run_trial(notebook, parameters, tmp_path / "t") == first
    said = r"t belongs .* \(hidden_dim: 8 there, 9 now; loss: preset's there, 'l1' now\)"
    with pytest.raises(ValueError, match=said):  # of another search, which ran beside this one
        run_trial(notebook, {**parameters, "more": {"hidden_dim": 9}, "loss": "l1"}, tmp_path / "t")
    elsewhere = {**parameters, "num_threads": 7}
    assert run_trial(notebook, elsewhere, tmp_path / "t") == first
    record = read_trial(tmp_path / "t")
    assert record["rungs"] == [first, further] and record["parameters"]["lr"] == 2.0
    assert (tmp_path / "t" / "notebooks" / "04_train.ipynb").exists()


def test_a_failed_notebook_is_a_failed_trial_and_runs_again(tmp_path):
    notebook = write_pretending_notebook(tmp_path / "04_train.ipynb", "raise ValueError('no GPU')")
    with pytest.raises(RuntimeError, match="04_train.ipynb failed: .*no GPU"):
        run_trial(notebook, {"epochs": 1}, tmp_path / "t")
    record = read_trial(tmp_path / "t")
    assert "no GPU" in record["error"] and record["rungs"] == []
    write_pretending_notebook(notebook)
    assert run_trial(notebook, {"epochs": 1}, tmp_path / "t")["epochs"] == 1
    assert "error" not in read_trial(tmp_path / "t")


def test_a_notebook_that_trains_too_little_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("trm_helpers.search.trials.run_notebook",
                        lambda *_, run_dir, **__: train_into(run_dir, VALUES))
    with pytest.raises(RuntimeError, match="t has 3 epochs; expected 5"):
        run_trial("04_train", {"epochs": 5}, tmp_path / "t")
    assert "expected 5" in read_trial(tmp_path / "t")["error"]


def test_a_trial_that_lost_episodes_to_the_machine_has_failed(tmp_path, monkeypatch):
    """Counted as it is, it would have fewer failures than a better one."""
    monkeypatch.setattr("trm_helpers.search.trials.run_notebook",
                        lambda *_, run_dir, **__: train_into(run_dir, {**VALUES,
                                                                       "selection_episodes": 3}))
    with pytest.raises(RuntimeError, match="3 of 4 episodes of .*t could be played"):
        run_trial("04_train", {"epochs": 3}, tmp_path / "t", rollouts=4)
    assert run_trial("04_train", {"epochs": 3}, tmp_path / "u", rollouts=3)["episodes"] == 3


def test_a_trial_can_be_stopped(tmp_path):
    notebook = write_pretending_notebook(tmp_path / "04_train.ipynb", "import time; time.sleep(60)")
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_trial(notebook, {"epochs": 1}, tmp_path / "t", stop=stop)
    assert time.monotonic() - begun < 30 and read_trial(tmp_path / "t") is None


def test_one_at_a_time_until_the_process_is_dead(tmp_path):
    code = ("import sys, time; from trm_helpers.files import exclusive_lock\n"
            f"with exclusive_lock({str(tmp_path)!r}): print('mine', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(RuntimeError, match="another process works in"), \
                exclusive_lock(tmp_path, wait=False):
            pass
        stop = threading.Event()
        stop.set()
        with pytest.raises(KeyboardInterrupt), exclusive_lock(tmp_path, stop):
            pass
        threading.Timer(0.7, other.send_signal, [signal.SIGKILL]).start()
        with exclusive_lock(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
