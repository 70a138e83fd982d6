import json
import os
import signal
import subprocess
import sys
import time
import types

import imageio.v3 as imageio
import numpy as np
import pytest

from trm_helpers import evaluate, schema
from trm_helpers.config import EvalConfig
from trm_helpers.evaluate import PolicyEvaluator, evaluate_run, record_episode, run_episode
from trm_helpers.experts import PickPlaceExpert
from trm_helpers.files import read_jsonl
from trm_helpers.sim import LiberoEnv


class CountingPolicy:
    """Always asks for the same full step; counts its episodes."""

    last_recursions = 3

    def __init__(self, axis=0):
        self.action = np.eye(7)[axis] - np.eye(7)[schema.GRIPPER_INDEX]
        self.resets = 0

    def reset(self):
        self.resets += 1

    def act(self, observation):
        return self.action


class StraightRoad:
    """Solved after ``init_state + 1`` steps forward. Stands in for ``sim.LiberoEnv``."""

    horizon = 4
    made = []

    def __init__(self, suite="libero_object", task_id=3, **settle):
        self.settle = settle
        self.task = types.SimpleNamespace(suite=suite, task_id=task_id, name="walk",
                                          language="walk to the end")
        self.made.append(self)

    def reset(self, init_state=None, seed=None):
        self.left = 1 + (init_state if seed is None else seed - evaluate.SELECTION_SEED)
        return self._look()

    def step(self, action):
        self.left -= action[0]
        return self._look(), bool(self.left <= 0)

    def _look(self):
        frame = np.zeros((64, 64, 3), np.uint8)
        frame[0] = 255  # the first row as stored is at the bottom for a person
        return dict.fromkeys(schema.CAMERAS, frame)


def test_an_episode_ends_with_success_or_at_the_horizon():
    policy = CountingPolicy()
    row = run_episode(policy, StraightRoad(), init_state=2)
    assert row.pop("seconds") >= 0 and row.pop("max_action_ms") >= row.pop("action_ms") >= 0
    assert row == {"suite": "libero_object", "task_id": 3, "init_state": 2, "seed": 0,
                   "success": True, "steps": 3, "return": 1.0, "horizon": 4,
                   "mean_recursions": 3.0}
    failed = run_episode(policy, StraightRoad(), init_state=9)
    assert (failed["success"], failed["steps"]) == (False, 4)
    assert run_episode(policy, StraightRoad(), init_state=9, horizon=7)["steps"] == 7
    assert policy.resets == 3


def test_evaluate_on_task_counts_and_keeps_a_ledger(tmp_path):
    ledger = tmp_path / "episodes.jsonl"
    evaluator = PolicyEvaluator(CountingPolicy(), ledger=ledger)
    result = evaluator.evaluate_on_task(StraightRoad(), init_states=[0, 2, 9, 5], num_episodes=3)
    assert (result["successes"], result["episodes"]) == (2, 3)
    assert result["mean_length"] == pytest.approx((1 + 3 + 4) / 3)
    assert result["std_length"] == pytest.approx(np.std([1, 3, 4]))
    assert [row["init_state"] for row in read_jsonl(ledger)] == [0, 2, 9]
    with pytest.raises(ValueError, match="num_episodes=3 is not valid; expected 1 to 2"):
        evaluator.evaluate_on_task(StraightRoad(), [0, 1], 3)
    with pytest.raises(ValueError, match="horizon=-1"):
        PolicyEvaluator(CountingPolicy(), horizon=-1)


def test_a_film_is_upright_with_the_outcome_in_its_name(tmp_path):
    row, frames = record_episode(CountingPolicy(), StraightRoad(), 1, tmp_path / "a-{outcome}.mp4")
    assert row["video"] == "a-success.mp4" and row["steps"] == 2
    assert frames.shape == (2, 64, 64, 3) and (frames[:, -1] == 255).all()
    film = imageio.imread(tmp_path / "a-success.mp4")
    assert len(film) == 2 + 30  # the last frame stands for a second
    assert film[0][-2:, :190].mean() > 150 > film[0][-60:-20, :190].mean()


@pytest.fixture
def run(trained, monkeypatch):
    """A trained run whose simulator is the straight road and whose policy walks it."""
    StraightRoad.made.clear()
    monkeypatch.setattr(evaluate, "LiberoEnv", StraightRoad)
    monkeypatch.setattr(evaluate, "load_policy", lambda *_: CountingPolicy())
    monkeypatch.setattr(evaluate, "software_versions", lambda: {"mujoco": "3.3.2"})
    return trained


def test_a_run_is_evaluated_into_its_folder(run):
    config = EvalConfig(num_episodes=3, first_init_state=1, horizon=3, num_videos=1)
    results = evaluate_run(run, config)
    assert results == json.loads((run / "results.json").read_text())
    assert (results["successes"], results["episodes"]) == (2, 3)
    assert results["protocol"]["horizon"] == 3 and results["protocol"]["weights"] == "best"
    assert results["software"] == {"mujoco": "3.3.2"}
    assert [row["init_state"] for row in read_jsonl(run / "episodes.jsonl")] == [1, 2, 3]
    assert [p.name for p in (run / "videos").iterdir()] == \
        ["libero_object-task0-init01-success.mp4"]
    assert len(StraightRoad.made) == 1  # one environment for all episodes of a task


@pytest.mark.parametrize("asked", [dict(task_ids=[0, 4]), dict(suite="libero_goal")])
def test_a_policy_told_its_task_by_number_is_asked_for_those_it_knows(small_run, asked):
    trainer = small_run(conditioning="task_id", epochs=1)
    trainer.fit()
    run = trainer.run
    with pytest.raises(ValueError, match="by number and knows tasks 0 of libero_object; it cannot"):
        evaluate_run(run, **asked)
    assert not (run / "episodes.jsonl").exists()


def test_an_interrupted_evaluation_runs_what_is_missing(run, monkeypatch):
    config = EvalConfig(num_episodes=3, horizon=4, num_videos=0)
    play, played = evaluate.run_episode, []

    def interrupt(policy, env, init_state, horizon, seed):
        played.append(init_state)
        if played == [0, 1]:
            raise KeyboardInterrupt
        return play(policy, env, init_state, horizon)

    monkeypatch.setattr(evaluate, "run_episode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, config)
    assert evaluate_run(run, config)["episodes"] == 3 and played == [0, 1, 1, 2]
    evaluate_run(run, config)
    assert played == [0, 1, 1, 2]


def test_the_protocol_decides_and_is_named(run):
    results = evaluate_run(run, EvalConfig(protocol="libero", num_videos=0))
    told = results["protocol"]
    assert (told["protocol"], told["num_episodes"], told["horizon"]) == ("libero", 20, 600)
    assert "lifelong/metric.py" in told["source"]
    assert StraightRoad.made[0].settle == dict(settle_steps=5, settle_action=(0.0,) * 7)
    rows = read_jsonl(run / "episodes.jsonl")
    assert len(rows) == 20 and {row["protocol"] for row in rows} == {"libero"}
    with pytest.raises(ValueError, match="protocol: 'libero' there, 'lerobot' now"):
        evaluate_run(run, EvalConfig(protocol="lerobot"))


def test_an_error_is_tried_again_then_kept_apart_from_failures(run, monkeypatch):
    play, tried = evaluate.run_episode, []

    def fail(policy, env, init_state, horizon, seed):
        tried.append(init_state)
        if init_state == 1 or (init_state == 2 and tried.count(2) == 1):
            raise FloatingPointError("the arm is nowhere")
        return play(policy, env, init_state, horizon, seed=seed)

    monkeypatch.setattr(evaluate, "run_episode", fail)
    config = EvalConfig(num_episodes=3, horizon=1, num_videos=0)
    results = evaluate_run(run, config)
    assert sorted(tried) == [0, 1, 1, 2, 2]
    assert (results["successes"], results["episodes"]) == (1, 2)
    error = {"suite": "libero_object", "task_id": 0, "init_state": 1, "seed": 0,
             "error": "FloatingPointError: the arm is nowhere"}
    assert results["errors"] == [error]
    (line,) = [row for row in read_jsonl(run / "episodes.jsonl") if "error" in row]
    assert error.items() <= line.items()

    monkeypatch.setattr(evaluate, "run_episode", play)  # whatever it was is repaired
    results = evaluate_run(run, config)
    assert (results["episodes"], results["errors"]) == (3, [])


def test_an_evaluation_of_errors_alone_gives_up(run, monkeypatch):
    monkeypatch.setattr(CountingPolicy, "act", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="no episode could be run; .*ZeroDivisionError"):
        evaluate_run(run, EvalConfig(num_videos=0))
    assert len(read_jsonl(run / "episodes.jsonl")) == 3
    assert not (run / "results.json").exists()


def test_selection_leaves_the_official_init_states_alone(run):
    config = evaluate.load_config(run)
    summary = evaluate.selection_success(run, config.replace(horizon=2), episodes=3)
    assert (summary["successes"], summary["episodes"]) == (2, 3)
    assert not (run / "episodes.jsonl").exists()


def test_a_baseline_is_evaluated_like_a_run(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "LiberoEnv", StraightRoad)
    monkeypatch.setattr(evaluate, "software_versions", dict)
    results = evaluate.evaluate_baseline("no-op", tmp_path, EvalConfig(num_episodes=2, horizon=3,
                                         num_videos=0), "libero_object")
    assert (results["successes"], results["episodes"], len(results["tasks"])) == (0, 20, 10)
    with pytest.raises(ValueError, match="unknown baseline 'hero'; expected one of expert"):
        evaluate.evaluate_baseline("hero", tmp_path, EvalConfig(), "libero_object")


def test_every_call_loads_the_policy_as_it_is_then(run, monkeypatch):
    loaded = []
    monkeypatch.setattr(evaluate, "load_policy",
                        lambda *given: loaded.append(given) or CountingPolicy())
    evaluate_run(run, EvalConfig(num_episodes=2, horizon=4, num_videos=0))
    assert loaded == [(run, "best")]
    (run / "episodes.jsonl").unlink()
    evaluate_run(run, EvalConfig(num_episodes=1, horizon=4, num_videos=0), weights="best")
    assert len(loaded) == 2


def test_one_ledger_holds_several_suites_each_with_its_horizon(run):
    config = EvalConfig(num_episodes=2, num_videos=0)
    for suite, horizon in (("libero_object", 280), ("libero_goal", 300), ("libero_object", 280)):
        results = evaluate_run(run, config, suite=suite)
        assert results["episodes"] == 2 and results["tasks"][0]["suite"] == suite
        assert results["protocol"]["horizon"] == horizon
    rows = read_jsonl(run / "episodes.jsonl")
    assert [(row["suite"], row["horizon"]) for row in rows] \
        == [("libero_object", 280)] * 2 + [("libero_goal", 300)] * 2


def test_episodes_of_other_weights_or_horizon_are_not_mixed_in(run):
    evaluate_run(run, EvalConfig(num_episodes=1, horizon=4, num_videos=0))
    ledger = (run / "episodes.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another policy or protocol .horizon: 4 there, 5 now"):
        evaluate_run(run, EvalConfig(num_episodes=1, horizon=5, num_videos=0))
    (run / "best.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="sha256"):
        evaluate_run(run, EvalConfig(num_episodes=1, horizon=4, num_videos=0))
    assert (run / "episodes.jsonl").read_bytes() == ledger


def test_an_unknown_suite_or_task_is_refused(run):
    with pytest.raises(ValueError, match="unknown suite 'libero_best'"):
        evaluate_run(run, suite="libero_best")
    with pytest.raises(ValueError, match="task_id 10 is not in libero_object"):
        evaluate_run(run, task_ids=[10])


# --- the real simulator -------------------------------------------------------------------------


class ExpertPolicy:
    """The scripted demonstrator behind the two calls that evaluation knows."""

    def __init__(self, env):
        self.env = env

    def reset(self):
        self.expert = None

    def act(self, observation):
        self.expert = self.expert or PickPlaceExpert(self.env)  # it looks at the scene as reset
        return self.expert.act()


@pytest.fixture(scope="module")
def env():
    with LiberoEnv("libero_object", 0) as made:
        yield made


@pytest.mark.sim
def test_the_expert_succeeds_from_official_init_states(env):
    result = PolicyEvaluator(ExpertPolicy(env)).evaluate_on_task(env, [0, 1], 2)
    assert (result["successes"], result["episodes"]) == (2, 2)
    assert all(60 < row["steps"] < row["horizon"] == 280 for row in result["rows"])


@pytest.mark.sim
def test_a_film_of_the_simulator_is_upright_and_can_be_read(env, tmp_path):
    """The arm rises, so that what changes between frames moves up in the picture."""
    row, frames = record_episode(CountingPolicy(axis=2), env, 0, tmp_path / "{outcome}.mp4", 12)
    assert (row["success"], row["steps"], row["video"]) == (False, 12, "failure.mp4")
    assert frames.shape == (12, 128, 128, 3)
    film = imageio.imread(tmp_path / "failure.mp4")
    assert len(film) == 12 + 30 and imageio.immeta(tmp_path / "failure.mp4")["fps"] == 30
    agent_view = film[:12, -384:, :384][:, 1::3, 1::3].astype(float)

    def mean_row(change):
        strong = np.where(change > 60, change, 0).sum(axis=1)
        return strong @ np.arange(128) / strong.sum()

    early, late = (np.abs(agent_view[a] - agent_view[b]).sum(axis=-1) for a, b in ((0, 2), (9, 11)))
    assert mean_row(late) < mean_row(early) - 2 < 64
    assert np.abs(agent_view - frames).mean() < 10 < np.abs(agent_view - frames[:, ::-1]).mean()


@pytest.mark.sim
def test_doing_nothing_fails_at_the_horizon(env):
    policy = CountingPolicy()
    policy.action = np.array(schema.NO_OP)
    row = run_episode(policy, env, init_state=2, horizon=15)
    assert (row["success"], row["steps"], row["horizon"]) == (False, 15, 15)


EVALUATION = """
import sys
from trm_helpers.config import EvalConfig
from trm_helpers.evaluate import evaluate_baseline

if __name__ == "__main__":
    config = EvalConfig(num_episodes=int(sys.argv[2]), horizon=8, num_videos=0, eval_workers=2)
    results = evaluate_baseline("no-op", sys.argv[1], config, "libero_object", [0])
    assert results["episodes"] == config.episodes and not results["errors"], results["errors"]
"""


def wait_for_rows(process, ledger, count):
    deadline = time.monotonic() + 300
    while len(read_jsonl(ledger)) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.sim
def test_a_killed_worker_and_a_killed_parent_lose_no_episode_and_double_none(tmp_path):
    script, ledger = tmp_path / "evaluation.py", tmp_path / "run" / "episodes.jsonl"
    script.write_text(EVALUATION)
    command = [sys.executable, script, tmp_path / "run", "8"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for_rows(parent, ledger, 1)
    found = subprocess.run(["pgrep", "--parent", str(parent.pid), "-f", "loky.backend.popen"],
                           capture_output=True, text=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    wait_for_rows(parent, ledger, 4)
    parent.kill()
    parent.communicate()
    rows = read_jsonl(ledger)
    assert 4 <= len(rows) < 8 and not any("error" in row for row in rows)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert read_jsonl(ledger)[:len(rows)] == rows
    assert sorted(row["init_state"] for row in read_jsonl(ledger)) == list(range(8))
