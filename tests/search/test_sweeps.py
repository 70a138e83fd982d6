import json
import sys
import types

import pytest
import yaml
from pretend_training import train_into
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from trm_helpers import paths
from trm_helpers.__main__ import main
from trm_helpers.search import trials

SPACE = ["--search-hidden-dims", "16", "--search-num-recursions", "1", "2", "--search-lrs", "0.1"]


@pytest.fixture
def pretend(monkeypatch):
    def run_notebook(notebook, given, *, run_dir, **_):
        if given["lr"] > 1:
            raise RuntimeError("diverged")
        train_into(run_dir, given)

    monkeypatch.setattr(trials, "run_notebook", run_notebook)
    monkeypatch.setattr("trm_helpers.demos.collect.ensure_demonstrations", lambda *_: {})


def test_a_sweep_runs_the_trials_of_the_search(tmp_path, pretend, capsys, monkeypatch):
    file = tmp_path / "sweep.yaml"
    assert main(["search", "tiny", "--run-name", "s", *SPACE, "--export-sweep", str(file)]) == 0
    assert f"wandb sweep {file}" in capsys.readouterr().out
    sweep = yaml.safe_load(file.read_text())
    notes = tmp_path / "notes.txt"
    notes.write_text("notes on the program")
    for place, code in ((file, 0), (notes, 1), (tmp_path, 1)):
        assert main(["search", "tiny", "--run-name", "s", *SPACE, "--export-sweep", str(place)]) \
            == code
    assert notes.read_text() == "notes on the program"
    assert "exists and is not a sweep" in capsys.readouterr().err
    assert sweep["method"] == "grid"
    assert sweep["metric"] == {"name": "final_val_loss", "goal": "minimize"}
    assert sweep["parameters"] == {"lr": {"values": [0.1]}, "hidden_dim": {"values": [16]},
                                   "num_recursions": {"values": [1, 2]}}
    assert sweep["command"][:4] == ["${env}", "${interpreter}", "-m", "trm_helpers"]

    for recursions in (1, 2):  # what an agent makes of the command
        sampled = {"lr": 0.1, "hidden_dim": 16, "num_recursions": recursions}
        macros = create_sweep_command_args(
            {"args": {name: {"value": value} for name, value in sampled.items()}})
        (point,) = macros["args_json"]
        argv = [point if part == "${args_json}" else part for part in sweep["command"][4:]]
        assert argv[0] == "trial" and main(argv) == 0
    assert "validation loss 3.2" in capsys.readouterr().out
    monkeypatch.setattr(trials, "run_notebook", None)  # the search itself finds them complete
    assert main(["search", "tiny", "--run-name", "s", *SPACE, "--json"]) == 0
    assert [row["final_val_loss"] for row in json.loads(capsys.readouterr().out)] == [1.6, 3.2]


def test_a_guided_search_is_a_bayesian_sweep(tmp_path, pretend):
    file = tmp_path / "sweep.yaml"
    assert main(["search", "tiny", "--run-name", "s", "--search-lrs", "0.1", "1e-3",
                 "--search-method", "tpe", "--search-episodes", "2",
                 "--export-sweep", str(file)]) == 0
    sweep = yaml.safe_load(file.read_text())
    assert sweep["method"] == "bayes" and sweep["metric"]["name"] == "success_rate"
    assert sweep["parameters"]["lr"] == {"distribution": "log_uniform_values", "min": 1e-3,
                                         "max": 0.1}
    assert sweep["run_cap"] == 2 * 2  # of the learning rates and of preset tiny's recursions


@pytest.mark.parametrize("part", [["--max-configs", "1"], ["--search-shard", "1/2"]])
def test_a_part_of_a_grid_is_no_sweep(tmp_path, pretend, capsys, part):
    file = tmp_path / "sweep.yaml"
    assert main(["search", "tiny", "--run-name", "s", *SPACE, *part,
                 "--export-sweep", str(file)]) == 1
    assert "a W&B grid has all 2 points; expected max_configs=0" in capsys.readouterr().err
    assert not file.exists() and not paths.artifacts_dir().exists()


def test_an_agent_logs_the_measures_to_the_sweep(tmp_path, pretend, monkeypatch):
    logged = []

    class Tracked:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            logged.append("finished")

        log = staticmethod(logged.append)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Tracked))
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert main(["search", "tiny", "--run-name", "s", "--export-sweep", str(tmp_path / "s")]) == 0
    point = {"lr": 0.123456789, "hidden_dim": 32, "num_recursions": 1}
    assert main(["trial", "s", json.dumps(point)]) == 0
    assert logged == [{"final_val_loss": pytest.approx(0.123457 * 32)}, "finished"]
    assert (paths.artifacts_dir() / "s/search/lr0.123457-hidden_dim32-num_recursions1").exists()


@pytest.mark.parametrize(("point", "said"), [
    ("{", "expected JSON with lr, hidden_dim, num_recursions"),
    ('{"lr": 0.1}', "expected JSON with lr, hidden_dim, num_recursions"),
    ('{"lr": 0.1, "hidden_dim": 18, "num_recursions": 1}', "hidden_dim=18"),
    ('{"lr": 9.0, "hidden_dim": 32, "num_recursions": 1}', "diverged"),
])
def test_a_bad_trial_is_an_error(tmp_path, pretend, capsys, point, said):
    main(["search", "tiny", "--run-name", "s", "--export-sweep", str(tmp_path / "s.yaml")])
    assert main(["trial", "s", point]) == 1
    assert said in capsys.readouterr().err


def test_settings_of_the_machine_come_from_the_command_and_not_from_the_file(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(trials, "run_notebook", lambda notebook, asked, *, run_dir, **_: (
        given.append({**asked, **asked.get("more", {})}), train_into(run_dir, asked)))
    file = tmp_path / "sweep.yaml"
    assert main(["search", "tiny", "--run-name", "s", *SPACE, "--device", "cpu", "--demo-dir",
                 str(tmp_path), "--eval-workers", "2", "--export-sweep", str(file)]) == 0
    command = yaml.safe_load(file.read_text())["command"]
    assert command[command.index("-s"):] == ["-s", "demo_dir", str(tmp_path), "-s", "device", "cpu",
                                             "-s", "eval_workers", "2"]
    searched = paths.artifacts_dir() / "s" / "search" / "search.json"
    settings = json.loads(searched.read_text())
    settings["eval"]["cluster"], settings["train"]["num_threads"] = "tcp://theirs:8786", 99
    searched.write_text(json.dumps(settings))
    point = json.dumps({"lr": 0.1, "hidden_dim": 16, "num_recursions": 1})
    assert main(["trial", "s", point, "-s", "device", "cpu", "-s", "num_threads", "3"]) == 0
    assert given[0]["device"] == "cpu" and given[0]["num_threads"] == 3
    assert "cluster" not in given[0] and "demo_dir" not in given[0]
    assert main(["trial", "s", point, "-s", "lr", "3"]) == 1


def test_a_trial_needs_a_search(capsys):
    assert main(["trial", "nobody", "{}"]) == 1
    assert "search.json does not exist; expected the folder of a search" in capsys.readouterr().err
