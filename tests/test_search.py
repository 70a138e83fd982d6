import itertools
import json

import pytest
import yaml
from demo_files import write_demo_file

from trm_helpers import checkpoint, evaluate, search
from trm_helpers.config import SearchConfig, from_flat
from trm_helpers.search import grid, measure_curve, rank_trials, run_search


def test_grid_is_the_documented_sixteen_points():
    points = grid(SearchConfig())
    assert len(points) == 16 and len({tuple(point.values()) for point in points}) == 16
    assert points[0] == {"lr": 1e-3, "hidden_dim": 128, "num_recursions": 4}
    assert points[-1] == {"lr": 1e-4, "hidden_dim": 256, "num_recursions": 8}


def test_part_of_the_grid_is_spread_over_it():
    points = grid(SearchConfig())
    assert grid(SearchConfig(max_configs=4)) == [points[i] for i in (0, 5, 10, 15)]
    assert grid(SearchConfig(max_configs=1)) == points[:1]
    assert grid(SearchConfig(max_configs=99)) == points


def test_curve_is_measured_by_hand():
    # 90 % of the way from 1.0 to 0.2 is 0.28; 0.5 > 1.2 x 0.25 is a spike, 0.26 is none
    curve = [1.0, 0.4, 0.25, 0.5, 0.26, 0.2]
    assert measure_curve(curve) == {"final_val_loss": 0.2, "epochs_to_converge": 3, "spikes": 1}
    assert measure_curve([0.7]) == {"final_val_loss": 0.7, "epochs_to_converge": 1, "spikes": 0}
    with pytest.raises(ValueError, match="val_losses is empty"):
        measure_curve([])


def test_ranking_takes_the_criteria_in_order():
    def trial(name, loss, epochs, spikes, **more):
        return {"trial": name, "final_val_loss": loss, "epochs_to_converge": epochs,
                "spikes": spikes, **more}

    trials = [trial("spiky", 0.2001, 3, 2), trial("slow", 0.2, 5, 0), trial("calm", 0.2002, 3, 0),
              trial("low", 0.15, 9, 9)]
    assert [t["trial"] for t in rank_trials(trials)] == ["low", "calm", "spiky", "slow"]
    succeeding = trial("succeeds", 0.9, 9, 9, success_rate=0.4)
    assert rank_trials([*trials, succeeding])[0] is succeeding
    assert rank_trials([*trials, trial("perfect", 0.0, 9, 9)])[0]["trial"] == "perfect"


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """The arguments of a search of two points."""
    monkeypatch.setattr(checkpoint, "software_versions", dict)
    files = {0: write_demo_file(tmp_path / "soup_demo.hdf5", (6, 7, 8), image_size=36)}
    config = from_flat("tiny", hidden_dim=16, search_hidden_dims=(16,), search_epochs=2,
                       search_num_recursions=(1, 2), image_size=36, num_threads=1)
    return config, files, tmp_path / "run"


def test_a_search_writes_its_ranking_and_the_best_settings(searched):
    trials = run_search(*searched)
    folder = searched[2] / "search"
    assert json.loads((folder / "trials.json").read_text()) == trials
    assert {trial["num_recursions"] for trial in trials} == {1, 2}
    assert trials[0]["final_val_loss"] <= 1.01 * trials[1]["final_val_loss"]
    assert all(len(trial["val_losses"]) == 2 for trial in trials)
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best == {key: trials[0][key] for key in ("lr", "hidden_dim", "num_recursions")}
    assert from_flat("tiny", **best).train.lr == 1e-3


def test_a_small_learning_rate_survives_yaml(searched):
    config, files, run = searched  # as Python writes it, 1e-05, YAML reads a string
    run_search(config.replace(search_lrs=(1e-5,), search_num_recursions=(1,)), files, run)
    best = yaml.safe_load((run / "search" / "best.yaml").read_text())
    assert from_flat("tiny", **best).train.lr == 1e-5


def test_a_search_goes_on_where_it_was(searched, monkeypatch):
    first = run_search(*searched)
    monkeypatch.setattr(search.BehaviorCloningTrainer, "_step",
                        lambda *_: pytest.fail("trained again"))
    assert [t["val_losses"] for t in run_search(*searched)] == [t["val_losses"] for t in first]


def test_trials_run_to_their_end(searched, monkeypatch):
    """Neither patience nor minutes of the settings cut a trial: all are compared alike."""
    config, files, run = searched
    rising = itertools.count(1.0)
    monkeypatch.setattr(search.BehaviorCloningTrainer, "validate", lambda _: {"loss": next(rising)})
    settings = config.replace(search_epochs=3, max_minutes=1e-9, patience=1)
    assert [trial["val_losses"] for trial in run_search(settings, files, run)] \
        == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def test_rollouts_rank_first(searched, monkeypatch):
    config, files, run = searched
    asked = []

    def selection_success(folder, trial, episodes):
        asked.append(episodes)
        success = folder.name.endswith("num_recursions2")
        return {"success_rate": success / 3, "successes": int(success), "episodes": 3}

    monkeypatch.setattr(evaluate, "selection_success", selection_success)
    trials = run_search(config.replace(search_episodes=3), files, run)
    assert asked == [3, 3]
    assert trials[0]["num_recursions"] == 2 and trials[0]["success_rate"] == 1 / 3


def test_a_bad_point_is_refused_before_anything_is_trained(searched):
    config, files, run = searched
    with pytest.raises(ValueError, match="hidden_dim=18.*multiple of num_heads"):
        run_search(config.replace(search_hidden_dims=(16, 18)), files, run)
    assert not run.exists()


def test_a_trial_with_other_settings_is_not_mixed_in(searched):
    config, files, run = searched
    run_search(config, files, run)
    with pytest.raises(ValueError, match="loss: 'l1' there, 'mse' now"):
        run_search(config.replace(loss="mse"), files, run)
