import contextlib
import json
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import papermill  # noqa: F401  # takes a second, which a time budget here does not have
import pytest
import torch
import yaml
from demo_files import write_demo_file
from pretend_training import train_into, write_pretending_notebook

from trm_helpers import paths
from trm_helpers.config import Config, from_flat
from trm_helpers.files import append_jsonl, exclusive_lock, read_json, read_jsonl, write_json
from trm_helpers.search import optuna_study, trials
from trm_helpers.search import search as searches
from trm_helpers.search.search import rank_trials, run_search, verdict, worker_environments
from trm_helpers.search.trials import read_trial, success_of

SETTINGS = dict(search_lrs=(0.1, 0.2), search_hidden_dims=(16,), search_num_recursions=(1, 2))


@pytest.fixture
def pretend(monkeypatch):
    """Trials train in a function: a list of (name, epochs, environment) of what ran.

    ``pretend.act``, where set, is called with the name first; ``pretend.successes`` says how many
    episodes of a trial succeed.
    """
    class Ran(list):
        act, successes = staticmethod(lambda name, stop: None), {}

    ran = Ran()

    def run_notebook(notebook, given, *, run_dir, environment, log, stop):
        values = {**given, **given.get("more", {})}
        ran.append((run_dir.name, given["stop_epoch"] or given["epochs"], environment))
        ran.act(run_dir.name, stop)
        train_into(run_dir, values, ran.successes.get(run_dir.name, 0))

    monkeypatch.setattr(trials, "run_notebook", run_notebook)
    return ran


def search(tmp_path, name="run", **settings):
    return run_search(from_flat("tiny", **{**SETTINGS, **settings}), tmp_path / name)


def names(rows):
    return [row["trial"] for row in rows]


def point_name(lr, recursions, seed=""):
    return f"lr{lr}-hidden_dim16-num_recursions{recursions}{seed}"


# --- ranking -------------------------------------------------------------------------------------

def test_ranking_takes_the_criteria_in_order():
    def trial(name, loss, epochs, spikes, **more):
        return {"trial": name, "final_val_loss": loss, "epochs_to_converge": epochs,
                "spikes": spikes, **more}

    rows = [trial("spiky", 0.2001, 3, 2), trial("slow", 0.2, 5, 0), trial("calm", 0.2002, 3, 0),
            trial("low", 0.15, 9, 9)]
    assert names(rank_trials(rows)) == ["low", "calm", "spiky", "slow"]
    succeeding = trial("succeeds", 0.9, 9, 9, success_rate=0.4)
    assert rank_trials([*rows, succeeding])[0] is succeeding
    assert rank_trials([*rows, trial("perfect", 0.0, 9, 9)])[0]["trial"] == "perfect"


def rolled(name, successes, episodes=10, seeds=(0,)):
    rows = [{"suite": "s", "task_id": 0, "init_state": seed, "seed": number, "steps": 5,
             "success": number < successes} for seed in seeds for number in range(episodes)]
    return {"trial": name, "state": "complete", "seeds": list(seeds), "final_val_loss": 0.1,
            "seed_success": [successes / episodes] * len(seeds), **success_of(rows)}


def test_the_verdict_is_significant_only_if_the_episodes_are():
    # 9 of 10 and 4 of 10 on the same placements: five pairs differ, all one way, p = 2 / 2^5
    said = verdict([rolled("a", 9), rolled("b", 4)])
    assert "a succeeds in 9 of 10 episodes (95 % Wilson interval 60 to 98 %)" in said
    assert "difference is not significant at 0.05 (McNemar over 10 pairs: p = 0.062)" in said
    said = verdict([rolled("a", 10), rolled("b", 4)])  # six pairs: 2 / 2^6
    assert "difference is significant at 0.05 (McNemar over 10 pairs: p = 0.031)" in said
    assert ("from one training run each, which another seed may reverse. With 10 episodes per "
            "policy" in said)


def test_with_several_seeds_the_trainings_have_to_differ_too():
    a, b = rolled("a", 10, seeds=(0, 1, 2)), rolled("b", 4, seeds=(0, 1, 2))
    a["seed_success"], b["seed_success"] = [1.0, 0.9, 0.95], [0.4, 0.5, 0.3]
    said = verdict([a, b])
    assert "difference is significant at 0.05 (McNemar over 30 pairs: p = 7.6e-06, Welch" in said
    assert "one training" not in said
    a["seed_success"] = [1.0, 0.1, 0.5]  # one lucky seed
    assert "is not significant at 0.05" in verdict([a, b])


def test_the_verdict_compares_common_seeds(tmp_path, pretend):
    config = from_flat("tiny", **{**SETTINGS, "search_num_recursions": (1,)}, search_episodes=3)
    folder = tmp_path / "run" / "search"
    search(tmp_path, search_episodes=3, search_num_recursions=(1,))
    searches.run_point(config, folder, {"lr": 0.1, "hidden_dim": 16, "num_recursions": 1}, seed=1)
    rows = searches.ranking(config.replace(search_replicates=2), folder, {})
    assert [row["seeds"] for row in rows] == [[0, 1], [0]]
    assert "(McNemar over 3 pairs: p = 1)" in verdict(rows)


def test_the_trainings_of_one_trial_may_vary_more_than_those_of_the_other():
    """Welch's t has 2.1 degrees of freedom here; one variance for both would have 4: p = 0.027."""
    a = {"trial": "a", "state": "complete", "seeds": [0, 1, 2], "final_val_loss": 0.1,
         "seed_losses": [0.10, 0.11, 0.09]}
    b = {**a, "trial": "b", "final_val_loss": 0.2, "seed_losses": [0.15, 0.25, 0.20]}
    said = verdict([a, b])
    assert "difference is not significant at 0.05 (Welch over seeds: p = 0.069)" in said


def test_the_verdict_on_losses_needs_seeds():
    a = {"trial": "a", "state": "complete", "seeds": [0], "final_val_loss": 0.1}
    b = {**a, "trial": "b", "final_val_loss": 0.2}
    assert "with one training run each: no difference can be claimed" in verdict([a, b])
    for row, losses in ((a, [0.10, 0.11, 0.09]), (b, [0.20, 0.21, 0.19])):
        row.update(seeds=[0, 1, 2], seed_losses=losses)
    assert "difference is significant at 0.05 (Welch over seeds: p = 0.00026)" in verdict([a, b])
    b["seed_losses"] = [0.1, 0.3, 0.05]
    assert "is not significant at 0.05" in verdict([a, b])
    a["seed_losses"], b["seed_losses"] = [0.1, 0.1], [0.2, 0.2]
    assert "Welch over seeds: p = 1" in verdict([a, b])  # no variance is no certainty
    assert verdict([a, {"trial": "c", "state": "failed"}]).startswith("1 trial is complete")
    assert verdict([]) == "No trial is complete: there is nothing to compare."


# --- the grid ------------------------------------------------------------------------------------

def test_a_search_writes_its_ranking_and_the_best_settings(tmp_path, pretend):
    rows = search(tmp_path, search_epochs=2, ema_decay=0.5)
    folder = tmp_path / "run" / "search"
    assert json.loads((folder / "trials.json").read_text()) == rows
    assert names(rows) == [point_name(0.1, 1), point_name(0.1, 2), point_name(0.2, 1),
                           point_name(0.2, 2)]
    assert [row["final_val_loss"] for row in rows] == pytest.approx([0.8, 1.6, 1.6, 3.2])
    assert rows[0]["state"] == "complete" and rows[0]["seeds"] == [0]
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["preset"] == "tiny" and "epochs" not in best  # trained in full
    assert best["more"] == {"ema_decay": 0.5}
    more = best.pop("more")
    config = from_flat("tiny", **SETTINGS, search_epochs=2)
    expected = config.replace(lr=0.1, hidden_dim=16, num_recursions=1, ema_decay=0.5)
    assert from_flat(**best, **more).train == expected.train
    assert from_flat(**best, **more).model == expected.model


def test_a_small_learning_rate_survives_yaml(tmp_path, pretend):
    search(tmp_path, search_lrs=(1e-5,))  # as Python writes it, 1e-05, YAML reads a string
    best = yaml.safe_load((tmp_path / "run" / "search" / "best.yaml").read_text())
    assert from_flat(**best).train.lr == 1e-5


def test_complete_trials_are_not_run_again(tmp_path, pretend):
    first = search(tmp_path, max_configs=2)
    assert len(pretend) == 2
    assert search(tmp_path, max_configs=2) == first and len(pretend) == 2
    assert len(search(tmp_path)) == 4 and len(pretend) == 4


@pytest.mark.parametrize(("change", "problem"), [
    ({"parameters": {}}, "its parameters are those of no point of the search; expected those of"),
    ({"parameters": []}, "parameters=.. is not valid; expected a dict"),
    ({"rungs": []}, "rungs=.. is not valid without an error"),
    ({"rungs": [1]}, "rungs=.1. is not valid; expected a list of dict"),
    ({"rungs": [{}]}, "epochs=None is not valid; expected int"),
    ({"trial": 1}, "trial=1 is not valid; expected str"),
    *(({"rungs": [{"epochs": 1, "final_val_loss": 1, "epochs_to_converge": 1, "spikes": 0,
                   "minutes": 1, **wrong}]}, problem) for wrong, problem in [
        ({"final_val_loss": "x"}, "final_val_loss='x' is not valid; expected float"),
        ({"final_val_loss": float("nan")}, "it holds NaN; expected JSON"),
        ({"episodes": 2}, "success_rate=None is not valid"),
        ({"rollouts": [{}]}, "it holds no suite")])])
@pytest.mark.parametrize("method", ["grid", "tpe"])
def test_a_damaged_record_is_named_and_never_left_out(tmp_path, pretend, change, problem, method):
    settings = dict(search_num_recursions=(1,))
    search(tmp_path, **settings)
    path = tmp_path / "run" / "search" / point_name(0.1, 1) / "trial.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"{path} is damaged: {problem}"):
        search(tmp_path, search_method=method, **settings)
    assert len(pretend) == 2


@pytest.mark.parametrize(("change", "problem"), [
    ({"data": [1]}, "'list' object has no attribute"), ({"data": {"spede": 1}}, "unknown data set"),
    ({"train": {"lr": "x"}}, "lr='x' is not valid")])
def test_damaged_settings_of_a_search_are_named(tmp_path, pretend, change, problem):
    search(tmp_path, max_configs=1)
    path = tmp_path / "run" / "search" / "search.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"{path} is not the configuration of a search: {problem}"):
        search(tmp_path, max_configs=1)


def test_the_stored_search_is_that_of_the_last_call(tmp_path, pretend):
    search(tmp_path, max_configs=1)
    search(tmp_path, search_lrs=(0.3,))
    stored = read_json(tmp_path / "run" / "search" / "search.json")
    assert Config.from_dict(stored).search.search_lrs == (0.3,)


def test_a_folder_with_other_settings_is_refused(tmp_path, pretend):
    search(tmp_path)
    with pytest.raises(ValueError, match="search belongs to.*loss: 'l1' there, 'mse'"):
        search(tmp_path, loss="mse")
    assert len(pretend) == 4


def test_a_bad_point_is_refused_before_anything_is_trained(tmp_path, pretend):
    for bad in (dict(search_hidden_dims=(16, 18)), dict(search_space="{spede: [1]}")):
        with pytest.raises(ValueError, match="hidden_dim=18|search_space 'spede'"):
            search(tmp_path, **bad)
    assert not pretend and not (tmp_path / "run").exists()


def test_patience_and_minutes_do_not_cut_trials(tmp_path, pretend):
    search(tmp_path, patience=1, max_minutes=1e-9, search_epochs=3)
    given = read_trial(tmp_path / "run" / "search" / point_name(0.1, 1))["parameters"]
    assert given["epochs"] == 3 and given["patience"] == 0 and "max_minutes" not in given
    best = yaml.safe_load((tmp_path / "run" / "search" / "best.yaml").read_text())
    assert best["patience"] == 1


def test_rollouts_rank_first(tmp_path, pretend):
    pretend.successes = {point_name(0.2, 2): 2, point_name(0.1, 2): 1}
    rows = search(tmp_path, search_episodes=3)
    assert names(rows)[:2] == [point_name(0.2, 2), point_name(0.1, 2)]
    assert rows[0]["successes"] == 2 and rows[0]["episodes"] == 3
    assert "difference is not significant at 0.05 (McNemar over 3 pairs: p = 1)" in verdict(rows)


def test_a_failed_trial_is_recorded_and_the_others_continue(tmp_path, pretend):
    def fail(name, stop):
        if name.endswith("2"):
            raise RuntimeError(f"{name} is too deep")

    pretend.act = fail
    rows = search(tmp_path)
    assert [row["state"] for row in rows] == ["complete"] * 2 + ["failed"] * 2
    assert rows[2]["error"] == f"{point_name(0.1, 2)} is too deep"
    pretend.act = lambda name, stop: None
    assert [row["state"] for row in search(tmp_path)] == ["complete"] * 4 and len(pretend) == 6


@pytest.mark.parametrize("method", ["grid", "tpe"])
def test_if_every_trial_fails_so_does_the_search(tmp_path, pretend, method):
    def fail(name, stop):
        raise RuntimeError("no GPU")

    pretend.act = fail
    with pytest.raises(RuntimeError, match=r"every trial failed.*; the first, lr0.*: no GPU"):
        search(tmp_path, search_method=method, max_configs=2)


@pytest.mark.parametrize("method", ["grid", "tpe"])
def test_a_search_without_a_trained_epoch_accepts_other_settings(tmp_path, pretend,
                                                                              method):
    def fail(name, stop):
        raise RuntimeError("a split needs at least 2")

    settings = dict(search_method=method, max_configs=2)
    pretend.act = fail
    with pytest.raises(RuntimeError):
        search(tmp_path, max_demos_per_task=1, **settings)
    pretend.act = lambda name, stop: None
    rows = search(tmp_path, max_demos_per_task=4, **settings)
    assert [row["state"] for row in rows] == ["complete"] * 2
    for row in rows:
        given = read_trial(tmp_path / "run" / "search" / row["trial"])["parameters"]
        assert given["max_demos_per_task"] == 4
    with pytest.raises(ValueError, match="max_demos_per_task: 4 there, 1 now"):
        search(tmp_path, max_demos_per_task=1, **settings)


def test_shards_make_one_search(tmp_path, pretend):
    assert len(search(tmp_path, search_shard="1/2")) == 2
    assert len(search(tmp_path, search_shard="2/2")) == 4  # those in the folder
    assert sorted(name for name, *_ in pretend) == sorted(names(search(tmp_path)))


def test_two_trials_at_once_each_on_its_gpu(tmp_path, pretend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    both = threading.Barrier(2)
    pretend.act = lambda name, stop: both.wait(20)  # breaks unless two are under way
    assert all(row["state"] == "complete" for row in search(tmp_path))
    gpus = [environment["CUDA_VISIBLE_DEVICES"] for *_, environment in pretend]
    assert sorted(gpus[:2]) == sorted(gpus[2:]) == ["0", "1"]


def test_workers_share_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    assert worker_environments(from_flat("tiny", search_workers=3)) == [
        {"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("3", "GPU-ab", "3")]
    assert worker_environments(from_flat("tiny", device="cpu")) == [{}]
    assert worker_environments(from_flat("tiny", device="cpu", search_workers=2)) == [{}] * 2


@pytest.mark.parametrize("method", ["grid", "tpe"])
def test_a_time_budget_ends_cleanly_and_the_next_call_resumes(tmp_path, pretend, method):
    def last_for_ever(name, stop):
        if len(pretend) == 2:
            assert stop.wait(20)
            raise KeyboardInterrupt

    pretend.act = last_for_ever
    settings = dict(search_method=method, search_lrs=(0.1, 0.4, 0.9), max_configs=3)
    assert len(search(tmp_path, **settings, search_minutes=1 / 40)) == 1
    interrupted = pretend[1][0]
    pretend.act = lambda name, stop: None
    assert len(search(tmp_path, **settings)) == 3
    assert pretend[2][0] == interrupted


@pytest.mark.parametrize("method", ["grid", "tpe"])
def test_a_trial_that_the_sessions_time_ends_has_not_failed(tmp_path, pretend, monkeypatch, method):
    """A notebook stops by itself, which may be earlier than the search stops it."""
    def end(name, stop):
        if len(pretend) == 2:
            monkeypatch.setenv("TRM_STOP_AT", str(time.time() - 1))
            raise RuntimeError("TimeoutError: the session's time is up")

    pretend.act = end
    settings = dict(search_method=method, search_lrs=(0.1, 0.4, 0.9), max_configs=3)
    assert len(search(tmp_path, **settings)) == 1
    monkeypatch.delenv("TRM_STOP_AT")
    assert [row["state"] for row in search(tmp_path, **settings)] == ["complete"] * 3
    assert pretend[2][0] == pretend[1][0]


def test_the_best_few_are_trained_with_more_seeds(tmp_path, pretend, monkeypatch):
    monkeypatch.setattr(searches, "FINALISTS", 2)
    pretend.successes = {point_name(0.1, 1): 4, point_name(0.2, 1): 3,
                         point_name(0.2, 1, "-seed1"): 4, point_name(0.2, 1, "-seed2"): 3}
    settings = dict(search_episodes=4, search_replicates=3)
    rows = search(tmp_path, **settings)
    assert len(pretend) == 4 + 2 * 2
    assert names(rows)[:2] == [point_name(0.2, 1), point_name(0.1, 1)]  # 10 of 12, 4 of 12
    assert rows[0]["seeds"] == [0, 1, 2] and rows[2]["seeds"] == [0]
    assert (rows[0]["successes"], rows[0]["episodes"]) == (10, 12)
    assert rows[0]["seed_success"] == [0.75, 1.0, 0.75]
    assert rows[1]["seed_losses"] == pytest.approx([1.6] * 3) and len(rows[1]["rollouts"]) == 12
    assert "McNemar over 12 pairs" in verdict(rows) and "Welch over seeds" in verdict(rows)
    assert yaml.safe_load((tmp_path / "run/search/best.yaml").read_text())["seed"] == 0
    search(tmp_path, **settings)
    assert len(pretend) == 8


def test_a_better_trial_found_later_becomes_a_finalist(tmp_path, pretend, monkeypatch):
    monkeypatch.setattr(searches, "FINALISTS", 1)
    settings = dict(search_replicates=2)
    assert search(tmp_path, **settings, search_lrs=(0.2,))[0]["seeds"] == [0, 1]
    rows = search(tmp_path, **settings)
    assert [(row["lr"], row["seeds"]) for row in rows] == [
        (0.1, [0, 1]), (0.1, [0]), (0.2, [0]), (0.2, [0])]


# --- Optuna --------------------------------------------------------------------------------------

def test_a_guided_search_continues(tmp_path, pretend):
    settings = dict(search_method="tpe", search_lrs=(0.1, 10.0))
    assert len(search(tmp_path, **settings, max_configs=3)) == 3
    rows = search(tmp_path, **settings, max_configs=5)
    assert len(rows) == len(pretend) == 5
    assert all(0.1 <= row["lr"] <= 10 and row["num_recursions"] in (1, 2) for row in rows)
    losses = [row["final_val_loss"] for row in rows]
    assert losses == sorted(losses)


def test_a_search_that_has_just_begun_keeps_its_folder(tmp_path):
    config = from_flat("tiny", **SETTINGS)
    folder = searches.claim(config, tmp_path / "run")
    with exclusive_lock(folder / "a-trial"):
        assert searches.claim(config, tmp_path / "run") == folder
        with pytest.raises(RuntimeError, match="another process works in .*a-trial"):
            searches.claim(config.replace(batch_size=8), tmp_path / "run")
    assert load_batch_size(folder) == config.train.batch_size
    searches.claim(config.replace(batch_size=8), tmp_path / "run")
    assert load_batch_size(folder) == 8


def load_batch_size(folder):
    return json.loads((folder / "search.json").read_text())["train"]["batch_size"]


def test_no_worker_is_sent_away_while_another_trial_begins(tmp_path, pretend):
    config = from_flat("tiny", **SETTINGS, search_method="tpe", max_configs=2)
    folder = searches.claim(config, tmp_path / "run")
    with optuna_study.Study.opened(config, folder) as study, ThreadPoolExecutor(1) as pool:
        ask, second = study.study.ask, []

        def begin(*given):  # the first trial is in the study, and its function has not begun
            trial = ask(*given)
            if not second:
                second.append(pool.submit(study.next_job, dict))
                time.sleep(0.3)
            return trial

        study.study.ask = begin
        study.next_job(lambda *_, **__: {"final_val_loss": 1.0})({})
        assert second[0].result() is not None


def test_a_guided_search_starts_with_the_existing_trials(tmp_path, pretend):
    settings = dict(search_lrs=(0.1, 10.0), search_num_recursions=(1,))
    search(tmp_path, **settings)
    rows = search(tmp_path, **settings, search_method="tpe", max_configs=3)
    assert len(pretend) == len(rows) == 3  # two of the grid, read, and one between its ends
    assert {point_name("0.1", 1), point_name("10", 1)} <= set(names(rows))


def test_halving_continues_from_rung_to_rung(tmp_path, pretend):
    rows = search(tmp_path, search_method="halving", search_lrs=(0.1,), max_configs=1,
                  search_epochs=9, search_episodes=3)
    name = rows[0]["trial"]
    assert [(name, epochs) for epochs in (1, 3, 9)] == [ran[:2] for ran in pretend]
    record = read_trial(tmp_path / "run" / "search" / name)
    assert [rung.get("episodes", 0) for rung in record["rungs"]] == [0, 1, 3]
    assert rows[0]["epochs"] == 9 and rows[0]["episodes"] == 3


@pytest.mark.parametrize("trained", [4, 9])
def test_halving_continues_what_a_grid_has_trained(tmp_path, pretend, trained):
    """A trial cannot be measured at epochs that it has passed."""
    settings = dict(search_lrs=(0.1,), search_num_recursions=(1,), search_epochs=9,
                    search_episodes=3)
    if trained == 9:
        search(tmp_path, **settings)
    else:
        folder = tmp_path / "run" / "search" / point_name(0.1, 1)
        folder.mkdir(parents=True)
        train_into(folder, dict(lr=0.1, hidden_dim=16, num_recursions=1, epochs=9,
                                stop_epoch=trained, selection_episodes=0))
    (row,) = search(tmp_path, search_method="halving", **settings)
    assert row["state"] == "complete" and row["epochs"] == 9 and row["episodes"] == 3
    assert [ran[:2] for ran in pretend] == [(row["trial"], 9)]


def test_halving_stops_trials_outside_the_best_third(tmp_path, pretend):
    """One worker; the first trial beats all later ones, so that it alone continues."""
    folder = tmp_path / "run" / "search"
    losses = iter([0.1, 0.5, 0.4, 0.3])

    def train(name, stop):  # the first rung; the pretended training continues from it
        if not (folder / name / "metrics.jsonl").exists():
            append_jsonl(folder / name / "metrics.jsonl", {"val_loss": next(losses), "seconds": 1})

    pretend.act = train
    rows = search(tmp_path, search_method="halving", search_epochs=9, max_configs=4,
                  search_lrs=(0.1, 0.9))
    assert [row["state"] for row in rows] == ["complete"] + ["stopped"] * (len(rows) - 1)
    assert len(rows) > 1 and rows[0]["val_losses"][0] == 0.1
    assert all(row["epochs"] == 1 for row in rows[1:])


def test_halving_ranks_the_stopped_after_the_complete(tmp_path, pretend, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: trial.number % 2 == 1)
    rows = search(tmp_path, search_method="halving", search_epochs=9, max_configs=4,
                  search_lrs=(0.1, 0.4))
    states = [(row["state"], row["epochs"]) for row in rows]
    assert {*states} == {("complete", 9), ("stopped", 1)} and states == sorted(states)


@pytest.mark.parametrize("method", ["tpe", "halving"])
@pytest.mark.parametrize("longer", [dict(search_num_recursions=(1, 2, 3)),
                                    dict(search_lrs=(0.1, 0.2))])
def test_a_guided_search_with_longer_lists_is_another_one(tmp_path, pretend, method, longer):
    settings = dict(search_method=method, search_lrs=(0.1,), max_configs=2, search_epochs=3)
    rows = search(tmp_path, **settings)
    with pytest.raises(ValueError, match="the study run belongs to a search with other settings"):
        search(tmp_path, **{**settings, **longer, "max_configs": 3})
    assert search(tmp_path, **settings) == rows


@pytest.mark.parametrize(("changed", "problem"), [
    ({}, ""), ({"weight_decay": 0.1}, "weight_decay: 0.0001 there, 0.1 now"),
    ({"search_space": "{weight_decay: [0.1, 0.2]}"}, "weight_decay: 0.0001 there, searched over")])
def test_a_study_of_another_version_goes_on(tmp_path, pretend, changed, problem):
    """With a setting that is a constant now, and without one that was new later."""
    url = f"sqlite:///{tmp_path}/study.db"
    settings = dict(search_method="tpe", search_storage=url)
    search(tmp_path, max_configs=1, **settings)
    study = optuna.load_study(study_name="run", storage=url)
    stored = {**study.user_attrs["settings"], "num_heads": 4}
    del stored["weight_decay"]
    study.set_user_attr("settings", stored)
    refused = pytest.raises(ValueError, match=f"the study run belongs to .*{problem}")
    with refused if problem else contextlib.nullcontext():
        assert len(search(tmp_path, "other/run", max_configs=2, **settings, **changed)) == 2


@pytest.mark.parametrize("database", [False, True])
def test_a_killed_search_repeats_its_running_trial(tmp_path, pretend, monkeypatch, database):
    url = f"sqlite:///{tmp_path}/study.db" if database else ""
    code = f"""
        import contextlib, os, sqlite3, sys, time
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        from pathlib import Path
        from test_search import search
        from trm_helpers.search import optuna_study, trials
        from pretend_training import train_into
        optuna_study._HEARTBEAT, optuna_study._GRACE = 1, 4
        ran = []
        def beats():
            with contextlib.closing(sqlite3.connect({str(tmp_path / "study.db")!r})) as file:
                return file.execute("SELECT count(*) FROM trial_heartbeats").fetchone()[0]
        def run_notebook(notebook, given, *, run_dir, **_):
            ran.append(run_dir.name)
            if len(ran) == 2:
                print(run_dir.name, flush=True)
                while {database} and beats() < 2:  # its first sign of life may be late
                    time.sleep(0.1)
                os._exit(9)
            train_into(run_dir, given)
        trials.run_notebook = run_notebook
        search(Path({str(tmp_path)!r}), search_method="tpe", max_configs=3, search_lrs=(.1, 9.),
               search_storage={url!r})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True,
                            text=True)
    assert killed.returncode == 9, killed.stderr
    monkeypatch.setattr(optuna_study, "_HEARTBEAT", 1)
    monkeypatch.setattr(optuna_study, "_GRACE", 4)  # on a busy machine a sign of life may be late
    time.sleep(5.5 if database else 0)  # without a heartbeat
    rows = search(tmp_path, search_method="tpe", max_configs=3, search_lrs=(0.1, 9.0),
                  search_storage=url)
    assert len(rows) == 3 and len(pretend) == 2
    assert pretend[0][0] == killed.stdout.strip()


def test_a_database_file_that_is_busy_is_waited_for(tmp_path, pretend):
    """SQLite itself gives up after five seconds."""
    url = f"sqlite:///{tmp_path}/study.db"
    search(tmp_path, search_method="tpe", max_configs=1, search_storage=url)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as other, \
            ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN EXCLUSIVE")
        call = pool.submit(search, tmp_path, search_method="tpe", max_configs=2, search_storage=url)
        with pytest.raises(TimeoutError):
            call.result(timeout=8)
        other.rollback()
        assert len(call.result(timeout=120)) == 2


def test_no_more_trials_are_started_than_asked_for(tmp_path, pretend):
    rows = search(tmp_path, search_method="tpe", search_lrs=(0.1, 9.0), max_configs=3,
                  search_workers=4)
    assert len(rows) == len(pretend) == 3


def test_one_process_at_a_time_has_the_study_file(tmp_path, pretend):
    with exclusive_lock(tmp_path / "run" / "search"), \
            pytest.raises(RuntimeError, match="another process works in"):
        search(tmp_path, search_method="tpe")


def test_machines_share_a_study_in_a_database(tmp_path, pretend):
    shared = dict(search_method="tpe", search_lrs=(0.1, 10.0),
                  search_storage=f"sqlite:///{tmp_path}/study.db")
    assert len(search(tmp_path, "a/run", **shared, max_configs=3)) == 3
    rows = search(tmp_path, "b/run", **shared, max_configs=5)
    assert len(rows) == 5 == len(pretend)
    assert len(list((tmp_path / "b/run/search").glob("*/trial.json"))) == 2
    assert "sqlite" not in (tmp_path / "b/run/search/search.json").read_text()
    with pytest.raises(ValueError, match="the study run belongs to a search with other settings"):
        search(tmp_path, "c/run", **shared, loss="mse")


def test_a_trial_that_another_machine_completed_is_ranked_as_complete(tmp_path, pretend):
    """Its first machine died between two rungs and left half of the trial in its folder."""
    shared = dict(search_method="halving", search_lrs=(0.1,), search_num_recursions=(1,),
                  search_epochs=9, max_configs=1, search_storage=f"sqlite:///{tmp_path}/study.db")
    (complete,) = search(tmp_path, "b/run", **shared)
    left = tmp_path / "a" / "run" / "search" / complete["trial"]
    record = read_trial(tmp_path / "b" / "run" / "search" / complete["trial"])
    write_json(left / "trial.json", {**record, "rungs": record["rungs"][:1]})
    assert search(tmp_path, "a/run", **shared) == [complete]


@pytest.mark.parametrize("url", ["sqlite:////no/such/folder/study.db", "nonsense",
                                 "postgresql+nodriver://user:secret@localhost/study"])
def test_a_dead_database_is_reported_before_training(tmp_path, pretend, url, monkeypatch):
    monkeypatch.setenv("TRM_SEARCH_STORAGE", url)
    with pytest.raises(ConnectionError, match="search_storage='.*' does not answer") as error:
        search(tmp_path, search_method="tpe")
    shown = "".join(traceback.format_exception(error.value))
    assert "secret" not in shown and not pretend
    assert "secret" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_a_lost_database_is_reported_and_complete_trials_are_kept(tmp_path, pretend):
    file = tmp_path / "study.db"
    shared = dict(search_method="tpe", search_storage=f"sqlite:///{file}", max_configs=3,
                  search_workers=1)
    kept = []

    def act(name, stop):
        if len(pretend) == 2:
            kept.append(file.read_bytes())
            file.write_bytes(b"no database any more" * 1000)

    pretend.act = act
    with pytest.raises(ConnectionError, match="study.db' does not answer .*the same call resumes"):
        search(tmp_path, **shared)
    assert len(pretend) == 2
    file.write_bytes(kept[0])
    rows = search(tmp_path, **shared)
    assert [row["state"] for row in rows] == ["complete"] * 3


def test_a_missing_package_is_not_taken_for_a_database(tmp_path, pretend):
    def fail(name, stop):
        raise ModuleNotFoundError("No module named 'papermill'")

    pretend.act = fail
    with pytest.raises(ModuleNotFoundError, match="No module named 'papermill'"):
        search(tmp_path, search_method="tpe")


# --- the real notebook ---------------------------------------------------------------------------

def test_two_workers_with_notebooks_one_of_which_fails(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    monkeypatch.setattr(paths, "notebooks_dir", lambda: folder)
    write_pretending_notebook(folder / "04_train.ipynb", """
import os, pathlib
from pretend_training import train_into
assert num_recursions == 1, "too deep"
train_into(pathlib.Path(os.environ["TRM_ARTIFACTS_DIR"]) / run_name, globals())
""")
    rows = search(tmp_path, search_workers=2, search_lrs=(0.1,))
    assert [row["state"] for row in rows] == ["complete", "failed"]
    assert "too deep" in rows[1]["error"]


@pytest.mark.slow  # tests/test_notebooks.py asserts the same of the suite's search
def test_the_training_notebook_as_a_trial(tmp_path):
    name = "pick_up_the_alphabet_soup_and_place_it_in_the_basket_demo.hdf5"
    write_demo_file(tmp_path / "libero_object" / name, (6, 7, 8, 9, 10), image_size=36)
    settings = dict(demo_dir=str(tmp_path), image_size=36, cameras=("agentview_rgb",),
                    search_epochs=2, search_hidden_dims=(16,), search_num_recursions=(1,),
                    ema_decay=0.5)
    (row,) = run_search(from_flat("tiny", **settings), paths.artifacts_dir() / "mine")
    folder = paths.artifacts_dir() / "mine" / "search"
    trial = folder / "lr0.001-hidden_dim16-num_recursions1"
    losses = [epoch["val_loss"] for epoch in read_jsonl(trial / "metrics.jsonl")]
    assert row["val_losses"] == losses and len(losses) == 2
    used = json.loads((trial / "config.json").read_text())
    assert used["train"]["ema_decay"] == 0.5 and used["model"]["hidden_dim"] == 16
    assert (trial / "notebooks" / "04_train.ipynb").exists()
    assert yaml.safe_load((folder / "best.yaml").read_text())["hidden_dim"] == 16
