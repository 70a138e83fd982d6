import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import h5py
import imageio.v3 as imageio
import numpy as np
import psutil
import pytest
from walking import CountingPolicy, StraightRoad

from trm_helpers import files, preflight, schema
from trm_helpers.__main__ import main
from trm_helpers.config import EvalConfig, from_flat
from trm_helpers.evaluation import baselines, compare, evaluate, plan, play
from trm_helpers.evaluation.evaluate import PolicyEvaluator, plan_run
from trm_helpers.evaluation.robustness import robustness_card
from trm_helpers.files import exclusive_lock, read_jsonl
from trm_helpers.report import write_report
from trm_helpers.sim.env import Observation
from trm_helpers.sim.parallel import run_jobs
from trm_helpers.stats import format_success
from trm_helpers.training.runs import (
    description,
    description_digest,
    find_run,
    load_config,
    save_weights,
)
from trm_helpers.visuals import films


def evaluate_run(*asked, **more):
    return plan_run(*asked, **more).play()


@pytest.mark.parametrize(("task_ids", "words"), [
    ([0], "task 0"), ([0, 1], "tasks 0 and 1"), ([0, 1, 4], "tasks 0, 1 and 4"),
    (range(40), "tasks 0 to 39"), ([7, 0, 1, 2, 12], "tasks 7, 0 to 2 and 12")])
def test_tasks_in_words(task_ids, words):
    assert plan.tasks_in_words(list(task_ids)) == words


def test_evaluate_on_task_counts():
    evaluator = PolicyEvaluator(CountingPolicy())
    # an init state that is given twice is played once
    result = evaluator.evaluate_on_task(StraightRoad(), init_states=[0, 2, 0, 9, 5], num_episodes=3)
    assert (result["successes"], result["episodes"]) == (2, 3)
    assert result["mean_length"] == pytest.approx((1 + 3 + 4) / 3)
    assert result["std_length"] == pytest.approx(np.std([1, 3, 4]))
    assert [row["init_state"] for row in result["rows"]] == [0, 2, 9]
    with pytest.raises(ValueError, match="num_episodes=3 is not valid; expected 1 to 2"):
        evaluator.evaluate_on_task(StraightRoad(), [0, 1, 1], 3)
    with pytest.raises(ValueError, match="horizon=-1"):
        PolicyEvaluator(CountingPolicy(), horizon=-1)


@pytest.fixture
def run(trained, monkeypatch):
    """A trained run whose simulator is the straight road and whose policy walks it."""
    StraightRoad.made.clear()
    monkeypatch.setattr("trm_helpers.sim.env.LiberoEnv", StraightRoad)
    monkeypatch.setattr(play, "load_policy", lambda *_: CountingPolicy())
    monkeypatch.setattr(play, "software_versions", lambda: {"mujoco": "3.3.2"})
    return trained


def test_a_run_is_evaluated_into_its_folder(run):
    config = EvalConfig(num_episodes=3, first_init_state=1, horizon=3, num_videos=1)
    results = evaluate_run(run, config)
    assert results == json.loads((run / "results.json").read_text())
    assert (results["successes"], results["episodes"]) == (2, 3)
    assert results["protocol"]["horizon"] == 3 and results["protocol"]["weights"] == "best"
    assert results["software"] == {"mujoco": "3.3.2"}
    assert [row["init_state"] for row in read_jsonl(run / "episodes.jsonl")] == [1, 2, 3]
    films = [str(p.relative_to(run / "videos")) for p in (run / "videos").rglob("*.mp4")]
    assert films == ["success/libero_object-task0-init01.mp4"]  # one alone makes no grid
    assert read_jsonl(run / "episodes.jsonl")[0]["video"] == films[0]
    assert len(StraightRoad.made) == 1  # one environment for all episodes of a task


def test_films_lie_apart_by_outcome_and_together_in_a_grid(run):
    evaluate_run(run, EvalConfig(num_episodes=2, first_init_state=2, horizon=3, num_videos=2))
    films = sorted(str(p.relative_to(run / "videos")) for p in (run / "videos").rglob("*.mp4"))
    assert films == ["failure/libero_object-task0-init03.mp4", "libero_object-task0.mp4",
                     "success/libero_object-task0-init02.mp4"]
    assert imageio.improps(run / "videos" / films[1]).shape[2] == 2 * 192
    made = (run / "videos" / films[1]).stat().st_mtime_ns
    evaluate_run(run, EvalConfig(num_episodes=2, first_init_state=2, horizon=3, num_videos=2))
    assert (run / "videos" / films[1]).stat().st_mtime_ns == made  # nothing new to show


@pytest.fixture
def numbered(small_run, run):
    """A policy that is told its task, 0 of LIBERO-Object, by number."""
    trainer = small_run("numbered", conditioning="task_id", epochs=1)
    trainer.fit()
    return trainer.run


@pytest.mark.parametrize("asked", [
    dict(task_ids=[0, 4]), dict(suite="libero_goal"), dict(suite="libero_goal_swap"),
    dict(suite="libero_object_swap", task_ids=[1]), dict(suite="libero_object_task"),
])
def test_a_policy_told_its_task_by_number_is_asked_for_those_it_knows(numbered, asked):
    with pytest.raises(ValueError, match="on task numbers and knows tasks 0 of libero_object"):
        evaluate_run(numbered, **asked)
    assert not (numbered / "episodes.jsonl").exists()


@pytest.mark.parametrize("variation", ["swap", "object", "lan"])
def test_a_variation_keeps_the_numbers_of_its_suite(numbered, variation):
    suite = f"libero_object_{variation}"
    results = evaluate_run(numbered, EvalConfig(num_episodes=1, num_videos=0), suite=suite)
    assert results["tasks"][0]["suite"] == suite and results["protocol"]["horizon"] == 280


def test_an_interrupted_evaluation_runs_what_is_missing(run, monkeypatch):
    config = EvalConfig(num_episodes=3, horizon=4, num_videos=0)
    run_episode, played = play.run_episode, []

    def interrupt(policy, env, init_state, horizon, **drawn):
        played.append(init_state)
        if played == [0, 1]:
            raise KeyboardInterrupt
        return run_episode(policy, env, init_state, horizon)

    monkeypatch.setattr(play, "run_episode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, config)
    assert evaluate_run(run, config)["episodes"] == 3 and played == [0, 1, 1, 2]
    evaluate_run(run, config)
    assert played == [0, 1, 1, 2]


def test_a_kept_worker_plays_with_the_weights_of_the_last_call(trainer, trained):
    digests = set()
    for change in (1, 2):
        save_weights(trained, {name: weight + change for name, weight
                               in trainer.policy.state_dict().items()}, "last")
        source = play.TrainedPolicy.load(trained, "last")
        ((_, found, error),) = run_jobs(lambda _, source=source: source.make().sha256, [0],
                                        workers=1, keep=True)
        assert error is None and found == source.sha256
        digests.add(found)
    assert len(digests) == 2


def test_an_evaluation_stops_in_time_and_the_next_call_continues(run, monkeypatch, capsys):
    config = EvalConfig(num_episodes=3, horizon=4, num_videos=0)
    monkeypatch.setenv("TRM_STOP_AT", "0")
    with pytest.raises(TimeoutError, match="3 of 3 episodes are not run; the same call continues"):
        evaluate_run(run, config)
    append = play.append_jsonl
    monkeypatch.setattr(play, "append_jsonl", lambda *given: (
        append(*given), monkeypatch.setenv("TRM_STOP_AT", "0")))
    monkeypatch.delenv("TRM_STOP_AT")
    results = evaluate_run(run, config)
    assert (results["episodes"], results["not_run"]) == (1, 2)
    assert "2 of 3 episodes are not run" in capsys.readouterr().out
    assert evaluate.selection_success(run, load_config(run), 2)["episodes"] == 2  # within training
    monkeypatch.setattr(play, "append_jsonl", append)
    monkeypatch.delenv("TRM_STOP_AT")
    results = evaluate_run(run, config)
    assert (results["episodes"], results["not_run"]) == (3, 0)


def test_others_play_the_same_run_meanwhile(run, monkeypatch):
    """As a training with rollouts does while its run is evaluated."""
    config = EvalConfig(num_episodes=2, horizon=4, num_videos=0)
    append, selected = play.append_jsonl, []

    def and_select(*given):
        append(*given)
        if not selected:
            selected.append(evaluate.selection_success(run, load_config(run), 2))

    monkeypatch.setattr(play, "append_jsonl", and_select)
    before = set(run.iterdir())
    results = evaluate_run(run, config)
    assert results["episodes"] == 2 == selected[0]["episodes"] and not results["errors"]
    assert {path.name for path in set(run.iterdir()) - before} == {
        "episodes.jsonl", "results.json", ".evaluation.lock"}


def test_the_protocol_decides_and_is_named(run):
    results = evaluate_run(run, EvalConfig(protocol="libero", num_videos=0))
    told = results["protocol"]
    assert (told["protocol"], told["num_episodes"], told["horizon"]) == ("libero", 20, 600)
    assert "lifelong/metric.py" in told["source"] and told["settle_steps"] == 5
    assert StraightRoad.made[0].settle == dict(settle_steps=5, settle_action=(0.0,) * 7)
    rows = read_jsonl(run / "episodes.jsonl")
    assert len(rows) == 20 and {row["protocol"] for row in rows} == {"libero"}
    with pytest.raises(ValueError, match="protocol: 'libero' there, 'lerobot' now"):
        evaluate_run(run, EvalConfig(protocol="lerobot"))


def test_each_task_of_the_joint_suite_has_the_steps_of_its_own(run, monkeypatch):
    played, run_episode = {}, play.run_episode

    def watch(policy, env, init_state, horizon, **more):
        played[env.task.task_id] = horizon
        return run_episode(policy, env, init_state, horizon, **more)

    monkeypatch.setattr(play, "run_episode", watch)
    monkeypatch.setattr(play, "check_settling", lambda: None)
    config = EvalConfig(num_episodes=1, num_videos=0)
    results = evaluate_run(run, config, suite="libero_40", task_ids=(3, 13, 23, 33))
    assert played == {3: 220, 13: 280, 23: 300, 33: 520}
    assert results["protocol"]["horizon"] == 0 and results["episodes"] == 4
    assert list(results["suites"]) == [*schema.JOINED]
    assert "; libero_goal 1 of 1; libero_10 1 of 1; mean of 4 tasks" in format_success(results)
    rows = read_jsonl(run / "robustness" / "libero_40-none" / "episodes.jsonl")
    assert {row["task_id"]: row["horizon"] for row in rows} == played
    assert evaluate_run(run, config, suite="libero_40", task_ids=(3, 13, 23, 33)) == results
    with pytest.raises(ValueError, match="horizon: 220 there, 50 now"):
        evaluate_run(run, dataclasses.replace(config, horizon=50), suite="libero_40",
                     task_ids=(3,))


def test_replays_of_the_joint_suite_are_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(play, "worker_env", lambda *_, **__: None)

    class Replay:  # its rows give the length of the demonstration as the horizon
        def play(self, env, episode):
            return {**episode._asdict(), "success": True, "steps": 9, "horizon": 9}

    planned = [plan.Episode("libero_40", task_id, 0) for task_id in (13, 23)]
    monkeypatch.setattr(play.worker_env, "cache_clear", lambda: None, raising=False)
    asked = Replay(), {}, tmp_path, EvalConfig(num_videos=0), "libero_40"
    assert play.Evaluation(*asked, planned[:1]).play()["successes"] == 1
    assert play.Evaluation(*asked, planned).play()["successes"] == 2
    assert [row["horizon"] for row in read_jsonl(tmp_path / "episodes.jsonl")] == [280, 300]


def test_a_policy_for_several_suites_is_asked_for_the_tasks_that_it_knows():
    trained = from_flat("demo", suite="libero_40", task_ids=(3, 13, 15), conditioning="language")
    assert plan.trained_tasks(trained, "libero_40") == (3, 13, 15)
    assert plan.trained_tasks(trained, "libero_object") == (3, 5)
    assert plan.trained_tasks(trained, "libero_object_swap") == (3, 5)
    with pytest.raises(ValueError, match="trained on no task of libero_goal; expected task_ids"):
        plan.trained_tasks(trained, "libero_goal")
    one = from_flat("demo", suite="libero_spatial", task_ids=(3,))
    assert plan.trained_tasks(one, "libero_object") == (3,)


def test_an_error_is_tried_again_then_kept_apart_from_failures(run, monkeypatch):
    run_episode, tried = play.run_episode, []

    def fail(policy, env, init_state, horizon, **drawn):
        tried.append(init_state)
        if init_state == 1 or (init_state == 2 and tried.count(2) == 1):
            raise FloatingPointError("the arm is nowhere")
        return run_episode(policy, env, init_state, horizon, **drawn)

    monkeypatch.setattr(play, "run_episode", fail)
    config = EvalConfig(num_episodes=3, horizon=1, num_videos=0)
    results = evaluate_run(run, config)
    assert sorted(tried) == [0, 1, 1, 2, 2]
    assert (results["successes"], results["episodes"]) == (1, 2)
    error = {"suite": "libero_object", "task_id": 0, "init_state": 1, "seed": 0,
             "placement": "benchmark", "error": "FloatingPointError: the arm is nowhere"}
    assert results["errors"] == [error]
    (line,) = [row for row in read_jsonl(run / "episodes.jsonl") if "error" in row]
    assert error.items() <= line.items()

    monkeypatch.setattr(play, "run_episode", run_episode)  # whatever it was is repaired
    results = evaluate_run(run, config)
    assert (results["episodes"], results["errors"]) == (3, [])


def test_an_evaluation_in_which_something_was_played_goes_on(run, monkeypatch, capsys):
    run_episode = play.run_episode

    def fail(policy, env, init_state, horizon, **drawn):
        if init_state in (1, 2, 3, 4):
            raise FloatingPointError("the arm is nowhere")
        return run_episode(policy, env, init_state, horizon, **drawn)

    monkeypatch.setattr(play, "run_episode", fail)
    results = evaluate_run(run, EvalConfig(num_episodes=6, horizon=9, num_videos=0))
    assert (results["episodes"], len(results["errors"])) == (2, 4)
    assert ("Excluded: 4 episodes that could not be run; the first, libero_object task 0, init "
            "state 1: FloatingPointError: the arm is nowhere") in capsys.readouterr().out


def test_the_bar_of_a_resumed_evaluation_counts_all_successes(run, capsys):
    first, both = (EvalConfig(num_episodes=number, horizon=40, num_videos=0) for number in (1, 2))
    won = evaluate_run(run, first)["successes"]
    capsys.readouterr()
    results = evaluate_run(run, both)
    assert won and results["successes"] > won
    assert f"successes={results['successes']}]" in capsys.readouterr().err


def test_an_evaluation_of_errors_alone_gives_up(run, monkeypatch):
    monkeypatch.setattr(StraightRoad, "step", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="no episode could be run; .*ZeroDivisionError"):
        evaluate_run(run, EvalConfig(num_videos=0))
    assert len(read_jsonl(run / "episodes.jsonl")) == 3
    assert not (run / "results.json").exists()


class Failing(CountingPolicy):
    """Fails in its second decision of the second episode, as ``how`` says."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def reset(self):
        super().reset()
        self.decisions = 0

    def act(self, observation):
        self.decisions += 1
        if (self.resets, self.decisions) == (2, 2):
            return self.how()
        return super().act(observation)


@pytest.mark.parametrize(("how", "said"), [
    (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    (lambda: np.full(7, np.nan), "expected 7 finite numbers"),
    (lambda: np.zeros((1, 7)), "expected 7 finite numbers"),
    (lambda: np.zeros(6), "expected 7 finite numbers"),
    (lambda: None, "expected 7 finite numbers"),
    (lambda: ["up"] * 7, "ValueError"),
    (lambda: sys.exit("no gripper"), "SystemExit: no gripper"),
])
def test_an_episode_in_which_the_policy_fails_is_a_failure(run, monkeypatch, capsys, how, said):
    monkeypatch.setattr(play, "load_policy", lambda *_: Failing(how))
    results = evaluate_run(run, EvalConfig(num_episodes=3, horizon=4, num_videos=0))
    assert (results["successes"], results["episodes"], results["policy_errors"]) == (2, 3, 1)
    assert results["errors"] == [] and results["success_rate"] == pytest.approx(2 / 3)
    row = read_jsonl(run / "episodes.jsonl")[1]
    assert (row["success"], row["steps"], "error" in row) == (False, 1, False)
    assert said in row["policy_error"]
    assert "counted as failures: 1 episode in which the policy raised" in format_success(results)
    monkeypatch.setattr(play, "run_episode", None)
    assert evaluate_run(run, EvalConfig(num_episodes=3, horizon=4, num_videos=0)) == results


def test_a_policy_that_cannot_begin_fails_every_episode(run, monkeypatch):
    monkeypatch.setattr(CountingPolicy, "reset", lambda *_: 1 / 0)
    results = evaluate_run(run, EvalConfig(num_episodes=4, num_videos=1))
    assert (results["successes"], results["episodes"], results["policy_errors"]) == (0, 4, 4)
    row = read_jsonl(run / "episodes.jsonl")[0]
    assert (row["steps"], row["action_ms"]) == (0, None)
    assert [film.parent.name for film in run.rglob("*.mp4")] == ["failure"]


class Dark(Observation):
    """Whose frames the driver refuses."""

    def __init__(self):
        super().__init__(dict.fromkeys(schema.CAMERAS, lambda: 1 / 0))


@pytest.mark.parametrize("fault", ["renderer", "memory", "disk"])
def test_a_fault_of_the_machine_while_the_policy_decides_is_not_the_policys(run, monkeypatch,
                                                                          fault):
    def act(policy, observation):
        if fault == "renderer":
            return observation["agentview_rgb"]
        raise MemoryError if fault == "memory" else OSError(28, "No space left on device")

    monkeypatch.setattr(StraightRoad, "_look", lambda _: Dark())
    monkeypatch.setattr(CountingPolicy, "act", act)
    with pytest.raises(RuntimeError, match="no episode could be run; .*(render|Memory|No space)"):
        evaluate_run(run, EvalConfig(num_episodes=2, num_videos=0))
    assert [("error" in row, "success" in row) for row in read_jsonl(run / "episodes.jsonl")] \
        == [(True, False)] * 2


# --- films cost no episode ----------------------------------------------------------------------


def _no_font(*_):
    raise OSError("cannot open resource")


@pytest.mark.parametrize("broken", ["false", "true", "missing", "hanging", "fonts", "chunk"])
def test_an_episode_whose_film_fails_counts(run, monkeypatch, capsys, tmp_path, broken):
    if broken == "fonts":
        monkeypatch.setattr("PIL.ImageFont.truetype", _no_font)
    elif broken == "chunk":
        monkeypatch.setattr(CountingPolicy, "last_chunk", "not a chunk", raising=False)
    else:
        ffmpeg = tmp_path / "hanging" if broken == "hanging" else f"/bin/{broken}"
        (tmp_path / "hanging").write_text("#!/bin/sh\nexec sleep 600\n")
        (tmp_path / "hanging").chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
        monkeypatch.setattr(films, "_PATIENCE", 0.5)
    results = evaluate_run(run, EvalConfig(num_episodes=3, horizon=4, num_videos=2))
    assert (results["successes"], results["episodes"], results["errors"]) == (3, 3, [])
    assert capsys.readouterr().out.count("2 film(s) could not be made; their episodes count") == 1
    rows = read_jsonl(run / "episodes.jsonl")
    assert [("video_error" in row, "video" in row) for row in rows] \
        == [(True, False), (True, False), (False, False)]
    assert "\n" not in rows[0]["video_error"] and not list(run.rglob("*.mp4"))


def test_a_grid_that_fails_costs_no_results(run, monkeypatch, capsys):
    monkeypatch.setattr(play, "write_grid", lambda *_: 1 / 0)
    results = evaluate_run(run, EvalConfig(num_episodes=2, horizon=4, num_videos=2))
    assert results == json.loads((run / "results.json").read_text())
    assert "the grid of films could not be made: ZeroDivisionError" in capsys.readouterr().out


def test_films_that_were_removed_are_left_out(run, capsys):
    config = EvalConfig(num_episodes=3, horizon=4, num_videos=3)
    first = evaluate_run(run, config)
    shutil.rmtree(run / "videos")
    (run / "results.json").unlink()
    assert evaluate_run(run, config) == first == json.loads((run / "results.json").read_text())
    assert "3 film(s) are not in" in capsys.readouterr().out
    assert play.films_of(read_jsonl(run / "episodes.jsonl"), run) == {}
    (run / "episodes.jsonl").unlink()
    evaluate_run(run, config)
    assert len(list((run / "videos").rglob("*.mp4"))) == 4


def test_a_missing_piece_of_a_run_costs_no_results(bounded, tmp_path):
    config = EvalConfig(num_episodes=2, horizon=4, num_videos=2, bound_episodes=1)

    def shown():
        return (evaluate_run(bounded, config)["successes"],
                play_bounds(bounded, config)["replay"]["successes"],
                "2 of 2 episodes" in write_report(bounded).with_suffix(".md").read_text())

    expected = shown()
    assert expected == (2, 1, True)
    robustness_card(bounded, EvalConfig(num_episodes=2, num_videos=0), only=["swap"])
    shutil.copytree(bounded, tmp_path / "whole")
    for piece in ("videos", "results.json", "episodes.jsonl", "metrics.jsonl", "last.safetensors",
                  "robustness", "training_state.pt", "figures", "robustness.json", "bounds",
                  ".evaluation.lock"):
        gone = bounded / piece
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        try:
            found = shown()
        except Exception as error:
            pytest.fail(f"without {piece}: {error!r}")
        assert found == expected, f"without {piece}"
        shutil.rmtree(bounded)
        shutil.copytree(tmp_path / "whole", bounded)


@pytest.mark.parametrize(("line", "problem"), [
    ('{"suite": "libero_object"}', "damaged: it holds no task_id, init_state, seed, suc"),
    ('{"suite": "libero_object", "task_id": 0, "init_state": 0, "seed": null, "steps": 9}',
     "damaged: it holds no success"),
    ('{"suite": "libero_object", "task_id": 0, "init_state": 0, "seed": null}',
     "damaged: it holds no success, steps"),
    ("[1]", "damaged: it holds list"), ("7", "damaged: it holds int")])
def test_a_line_that_is_no_episode_is_named(run, line, problem):
    (run / "episodes.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=f"episodes.jsonl, line 1 is {problem}"):
        evaluate_run(run, EvalConfig(num_episodes=1, num_videos=0))


ROW = {"suite": "libero_object", "task_id": 0, "init_state": 0, "seed": 0, "success": True,
       "steps": 5, "weights": "best", "protocol": "quick", "horizon": 280}


@pytest.mark.parametrize(("change", "problem"), [
    *(({name: value}, f"{name}=.* is not valid; expected")
      for name, values in {
          "suite": (["libero_object"], "libero_best"), "placement": ([], "narrow"),
          "task_id": ([], -1, True), "init_state": ([], -1), "seed": (None, "0"),
          "success": ("false", 1, None), "steps": ("5", None, -5, 5.0)}.items()
      for value in values),
    ({"task_id": 10}, "task_id=10 is not in libero_object; expected 0 to 9"),
    ({"steps": float("nan")}, "it holds NaN; expected JSON"),
    ({"steps": 281}, "steps=281; expected at most 280, the horizon"),
    ({"success": False}, "it contradicts an earlier line"),
    ({"steps": 6}, "it contradicts an earlier line")])
def test_a_damaged_value_of_an_episode_is_named(tmp_path, change, problem):
    def planned():
        return play.Evaluation(None, {"weights": "best"}, tmp_path, EvalConfig(), "libero_object",
                               [])

    ledger, first = tmp_path / "episodes.jsonl", json.dumps(ROW) + "\n"
    ledger.write_text(first * 2)  # the same twice contradicts nothing
    assert len(planned().finished()) == 1
    ledger.write_text(first + json.dumps({**ROW, **change}) + "\n")
    with pytest.raises(ValueError, match=f"episodes.jsonl, line 2 is damaged: {problem}"):
        planned()


def test_a_film_outside_of_the_run_is_not_shown(run, tmp_path, capsys):
    config = EvalConfig(num_episodes=2, horizon=4, num_videos=2)
    evaluate_run(run, config)
    mine = [row["video"] for row in read_jsonl(run / "episodes.jsonl")]
    secret = tmp_path / "secret.mp4"
    shutil.copy(run / "videos" / mine[0], secret)
    (run / "videos" / "success" / "link.mp4").symlink_to(secret)
    (run / "videos" / "outside").symlink_to(tmp_path)
    rows = read_jsonl(run / "episodes.jsonl")
    (grid,) = (run / "videos").glob("*.mp4")
    grid.unlink()
    evaluate_run(run, config)
    assert grid.exists()
    grid.unlink()
    for named in (str(secret), "../" * 9 + str(secret).lstrip("/"), "success/link.mp4",
                  "outside/secret.mp4", 7, "\ud800"):
        rows[0]["video"] = named
        assert list(play.films_of(rows, run)) == [run / "videos" / mine[1]], repr(named)
        said = capsys.readouterr().out
        assert "1 film(s) are not in" in said and said.encode()  # a terminal can show it
        (run / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluate_run(run, config)
        assert not grid.exists(), repr(named)  # of one film alone


# --- everything is checked before the first episode ---------------------------------------------


@pytest.fixture
def bounded(run, monkeypatch):
    """The run with its demonstrations, which replay in a step, and baselines without a scene."""
    (demos,) = json.loads((run / "policy.json").read_text())["trained_on"]["files"]
    monkeypatch.setattr(baselines, "demonstrations_of", lambda *_: {0: demos["file"]})
    monkeypatch.setattr(baselines, "replay_demonstration",
                        lambda _, demo: {"success": True, "steps": len(demo["actions"]),
                                         "divergence": [0.0]})
    monkeypatch.setattr(baselines, "BASELINES", {"no-op": baselines.NoOpPolicy})
    return run


def play_bounds(*given):
    return baselines.play_bounds(baselines.plan_bounds(*given))


def test_bounds_and_a_cards_rows_share_an_environment_which_is_closed_at_the_end(bounded,
                                                                               monkeypatch):
    closed = []
    monkeypatch.setattr(StraightRoad, "close", lambda road: closed.append(road))
    config = EvalConfig(num_episodes=2, bound_episodes=1, num_videos=0)
    assert list(play_bounds(bounded, config)) == ["replay", "no-op"]
    assert len(StraightRoad.made) == 1 and closed == StraightRoad.made
    robustness_card(bounded, config, only=["delay_1", "swap"])
    suites = [road.task.suite for road in StraightRoad.made[1:]]
    assert suites == ["libero_object", "libero_object_swap"] and closed == StraightRoad.made


def test_bounds_for_which_no_time_is_left_are_named_and_left_out(bounded, monkeypatch, capsys):
    config, append = EvalConfig(bound_episodes=1, num_videos=0), play.append_jsonl
    monkeypatch.setattr(play, "append_jsonl", lambda *given: (
        append(*given), monkeypatch.setenv("TRM_STOP_AT", "0")))
    assert list(play_bounds(bounded, config)) == ["replay"]
    assert "no-op: the session's time is up: 1 of 1 episodes are not run" in capsys.readouterr().out
    monkeypatch.delenv("TRM_STOP_AT")
    assert list(play_bounds(bounded, config)) == ["replay", "no-op"]

    def collect(*_):
        raise TimeoutError("the session's time is up; demonstrations so far: 0")

    monkeypatch.setattr(baselines, "demonstrations_of", collect)
    assert list(baselines.plan_bounds(bounded, config)) == ["no-op"]
    assert "no replay: the session's time is up; demonstrations" in capsys.readouterr().out


def test_a_bound_that_cannot_be_played_costs_no_results(bounded, monkeypatch, capsys):
    config = EvalConfig(num_episodes=1, bound_episodes=1, num_videos=0)

    def without_states(*_):
        raise ValueError("the demonstration has no states")

    monkeypatch.setattr(baselines, "replay_demonstration", without_states)
    assert list(play_bounds(bounded, config)) == ["no-op"]
    assert "replay: no episode could be run; the first error" in capsys.readouterr().out

    def other_settings(*_):
        raise ValueError("collected with other settings")

    monkeypatch.setattr(baselines, "demonstrations_of", other_settings)
    assert list(baselines.plan_bounds(bounded, config)) == ["no-op"]
    assert "no replay: collected with other settings" in capsys.readouterr().out


def test_a_folder_of_demonstrations_that_is_none_is_refused(run):
    with pytest.raises(FileNotFoundError, match="demo_dir='/no/such/folder' is not a folder"):
        baselines.plan_bounds(run, EvalConfig(bound_episodes=1), demo_dir="/no/such/folder")


@pytest.mark.parametrize(("actor", "num_demos"), [("", 2), ("other", 5)])
def test_no_more_demonstrations_are_collected_than_replayed(bounded, monkeypatch, actor, num_demos):
    trained, asked = baselines.load_config(bounded).replace(actor=actor), []
    monkeypatch.setattr(baselines, "load_config", lambda _: trained)
    found = baselines.demonstrations_of
    monkeypatch.setattr(baselines, "demonstrations_of", lambda run, config: (
        asked.append(config.data.num_demos), found())[1])
    planned = baselines.plan_bounds(bounded, EvalConfig(bound_episodes=2, num_videos=0))
    assert asked == [num_demos] and len(planned["replay"].planned) == 2


def test_episodes_that_an_actor_left_unsolved_are_not_replayed(bounded):
    """The upper bound of a run trained with DAgger consists of solved demonstrations."""
    (described,) = json.loads((bounded / "policy.json").read_text())["trained_on"]["files"]
    with h5py.File(described["file"], "a") as file:
        file["data/demo_1"].attrs["success"] = False
    play_bounds(bounded, EvalConfig(bound_episodes=2, num_videos=0))
    replayed = read_jsonl(bounded / "bounds" / "replay" / "episodes.jsonl")
    assert [(row["seed"], row["steps"]) for row in replayed] == [(0, 6), (2, 8)]


def test_without_a_solved_demonstration_there_is_no_replay(bounded, capsys):
    (described,) = json.loads((bounded / "policy.json").read_text())["trained_on"]["files"]
    with h5py.File(described["file"], "a") as file:
        for demo in file["data"].values():
            demo.attrs["success"] = False
    assert list(play_bounds(bounded, EvalConfig(bound_episodes=2, num_videos=0))) == ["no-op"]
    said = capsys.readouterr().out
    assert f"no replay: no demonstration was solved in {described['file']}" in said


def test_bounds_of_another_suite_or_tasks_leave_the_runs_own_alone(bounded):
    config = EvalConfig(num_episodes=1, bound_episodes=2, num_videos=0)
    own = play_bounds(bounded, config)
    assert list(own) == ["replay", "no-op"] and own["no-op"]["protocol"]["horizon"] == 280
    replayed = read_jsonl(bounded / "bounds" / "replay" / "episodes.jsonl")
    assert [(row["seed"], row["steps"]) for row in replayed] == [(0, 6), (1, 7)]  # each its own
    kept = {path: path.read_bytes() for path in bounded.glob("bounds/*/results.json")}
    assert len(kept) == 2
    for suite, task_ids in (("libero_object_swap", ()), ("libero_goal", ()), ("", [0, 4])):
        other = play_bounds(bounded, config, suite, task_ids)
        assert list(other) == ["no-op"]
        assert other["no-op"]["protocol"]["suite"] == (suite or "libero_object")
    assert {path: path.read_bytes() for path in kept} == kept
    for suite, horizon in (("libero_object_swap", 280), ("libero_goal", 300)):
        file = bounded / "robustness" / f"{suite}-none" / "bounds" / "no-op" / "results.json"
        assert json.loads(file.read_text())["protocol"]["horizon"] == horizon
    evaluate_run(bounded, config)
    text = write_report(bounded).with_suffix(".md").read_text()
    assert "| no-op | 0 of 2 |" in text and "| replay | 2 of 2 |" in text


def test_random_commands_are_a_function_of_the_state():
    def commands(state):
        env = types.SimpleNamespace(state=lambda: np.array(state))
        policy = baselines.RandomPolicy(env)
        policy.reset()
        return np.stack([policy.act({}) for _ in range(20)])

    first = commands([1.0, 2.0])
    assert np.array_equal(first, commands([1.0, 2.0]))
    assert not np.isclose(first, commands([1.0, 2.5]))[:, :6].any()
    assert set(first[:, 6]) == {-1, 1} and 0.8 < np.abs(first[:, :6]).max() <= 1


def test_the_report_shows_no_bound_of_another_suite(bounded):
    config = EvalConfig(num_episodes=1, bound_episodes=2, num_videos=0)
    evaluate_run(bounded, config)
    baselines.plan_baseline("no-op", bounded / "bounds" / "no-op", config, "libero_goal").play()
    assert "no-op" not in write_report(bounded).with_suffix(".md").read_text()


@pytest.mark.parametrize("wrong", ["bounds", "against", "other suite"])
def test_what_cannot_be_finished_is_refused_before_the_first_episode(bounded, small_run, wrong,
                                                                     capsys):
    other = small_run("other", epochs=1)
    other.fit()
    short = EvalConfig(num_episodes=1, bound_episodes=1, horizon=3, num_videos=0)
    suite = {"other suite": ["--suite", "libero_goal"]}.get(wrong, [])
    if wrong == "against":
        evaluate_run(other.run, short)
    else:
        play_bounds(bounded, short, *suite[1:])
    played = len(StraightRoad.made)
    asked = {"against": ["--against", "other"]}.get(wrong, ["--bound-episodes", "1"])
    assert main(["evaluate", bounded.name, "--horizon", "5", *suite, *asked]) == 1
    assert "horizon" in capsys.readouterr().err
    assert len(StraightRoad.made) == played and not list(bounded.rglob("results-*.json"))
    assert not (bounded / "episodes.jsonl").exists()


def test_results_of_most_tasks_have_a_name_that_every_disk_takes():
    most = [task_id for task_id in range(90) if task_id not in (3, 40)]
    names = {plan.results_name(tasks, [0]) for tasks in (most, range(90), [0, 4], [4, 0])}
    assert len(names) == 3 and "results-tasks-0-4.json" in names
    assert max(map(len, names)) < 150
    assert plan.results_name([2, 1], [1, 2]) == "results.json"


# --- which weights ------------------------------------------------------------------------------


def test_rows_carry_the_digest_of_what_was_loaded(run, monkeypatch):
    """And episodes of weights that were replaced meanwhile are no episodes."""
    loaded = []

    def load(folder, weights):
        file = folder / f"{weights}.safetensors"
        policy = CountingPolicy()
        policy.sha256 = files.digest(file.read_bytes())
        file.write_bytes(f"replaced {len(loaded)} times".encode())  # by a training beside it
        loaded.append(policy.sha256)
        return policy

    monkeypatch.setattr(play, "load_policy", load)
    before = files.digest((run / "best.safetensors").read_bytes())
    results = evaluate_run(run, EvalConfig(num_episodes=2, num_videos=0))
    assert loaded == [before] and results["protocol"]["sha256"] == before
    assert {row["sha256"] for row in read_jsonl(run / "episodes.jsonl")} == {before}
    source = play.TrainedPolicy(run, "best", before)  # as another process gets it
    with pytest.raises(RuntimeError, match="best.safetensors was replaced while it was evaluated"):
        source.make()


def test_a_kept_process_plays_the_policy_that_is_described_now(trained):
    before = play.TrainedPolicy.load(trained, "best")
    assert before.make().config.execution_horizon == 1
    for path in (trained / "policy.json", trained / "config.json"):
        text = path.read_text()
        path.write_text(text.replace('"execution_horizon": 1', '"execution_horizon": 2'))
    now = before._replace(policy=description_digest(description(trained)))  # as a worker gets it
    assert now != before and now.make().config.execution_horizon == 2
    with pytest.raises(RuntimeError, match="policy.json was replaced while it was evaluated"):
        before.make()


def test_results_of_another_description_are_marked(trained):
    source = play.TrainedPolicy.load(trained, "best")
    assert source.policy and compare.stale(trained, source.identity) == ""
    described = (trained / "policy.json").read_text()
    (trained / "policy.json").write_text(
        described.replace('"execution_horizon": 1', '"execution_horizon": 2'))
    assert f"another policy.json ({source.policy}) than" in compare.stale(trained, source.identity)


def test_results_of_older_weights_are_marked(run, capsys):
    evaluate_run(run, EvalConfig(num_episodes=2, num_videos=0))
    robustness_card(run, EvalConfig(num_episodes=2, num_videos=0), only=["swap"])
    assert "Stale" not in write_report(run).with_suffix(".md").read_text()
    assert compare.stale_episodes(run) == []
    (run / "best.safetensors").write_bytes(b"trained further")
    text = write_report(run).with_suffix(".md").read_text()
    success, changed = text.split("## When something changes")
    assert "**Stale: made with other weights" in success and "**Stale" in changed
    (said,) = compare.stale_episodes(run)
    assert "best.safetensors has now" in said


def test_a_simulator_in_which_objects_slide_is_refused_before_libero_spatial(run, monkeypatch):
    preflight.check_settling.cache_clear()
    row = preflight.Check("settle probe", "fail", "bowl 6.0 cm off the ramekin's centre")
    monkeypatch.setattr(preflight, "_check_scene", lambda *_: [row])
    evaluate_run(run, EvalConfig(num_episodes=1, num_videos=0))  # LIBERO-Object, not asked
    with pytest.raises(RuntimeError, match="no episode could be run; .*settle probe: bowl 6.0 cm"):
        evaluate_run(run, EvalConfig(num_videos=0), suite="libero_spatial")


def test_selection_leaves_the_official_init_states_alone(run, monkeypatch):
    asked, reset = [], StraightRoad.reset
    monkeypatch.setattr(StraightRoad, "reset",
                        lambda road, **where: asked.append(where) or reset(road, **where))
    config = load_config(run)
    config = config.replace(horizon=2, perturbation="delay_1")  # of reports alone
    summary = evaluate.selection_success(run, config, episodes=3)
    assert (summary["successes"], summary["episodes"]) == (2, 3)
    assert asked == [{"seed": 1_000_000 + number, "arrange": None} for number in range(3)]
    assert not (run / "episodes.jsonl").exists()


def test_errors_in_a_selection_do_not_count_and_are_told(run, monkeypatch, capsys):
    run_episode = play.run_episode

    def fail(policy, env, init_state, horizon, **drawn):
        if drawn["seed"] == plan.SELECTION_SEED + 1:
            raise FloatingPointError("the arm is nowhere")
        return run_episode(policy, env, init_state, horizon, **drawn)

    monkeypatch.setattr(play, "run_episode", fail)
    summary = evaluate.selection_success(run, load_config(run), episodes=3)
    assert summary["episodes"] == 2 and "the arm is nowhere" in summary["errors"][0]
    assert "selection: 1 of 3 episodes ended in an error" in capsys.readouterr().out


def test_an_error_in_a_selections_ledger_is_tried_again(run, monkeypatch):
    config, ledger = load_config(run).replace(horizon=4), run / "selection.jsonl"
    run_episode, played = play.run_episode, []

    def fail(policy, env, init_state, horizon, **where):
        played.append(where["seed"] - plan.SELECTION_SEED)
        if played[-1] == 1 and played.count(1) <= 2:
            raise FloatingPointError("the arm is nowhere")
        return run_episode(policy, env, init_state, horizon, **where)

    monkeypatch.setattr(play, "run_episode", fail)
    assert evaluate.selection_success(run, config, 3, ledger=ledger)["episodes"] == 2
    assert ["error" in row for row in read_jsonl(ledger)].count(True) == 1
    weights = play.weights_digest(run, "last")
    assert len(evaluate.selection_rows(ledger, weights)) == 2
    summary = evaluate.selection_success(run, config, 3, ledger=ledger)
    assert (summary["episodes"], summary["errors"]) == (3, []) and played == [0, 1, 1, 2, 1]


def test_two_runs_are_compared_episode_by_episode(run, small_run):
    other = small_run("other", epochs=1)
    other.fit()
    with pytest.raises(FileNotFoundError, match="episodes.jsonl does not exist; .*evaluate small"):
        compare.compare_runs("other", run.name)
    with pytest.raises(FileNotFoundError, match="evaluate pretrained/spatial-trm --suite libero_s"):
        compare.compare_runs("other", "pretrained/spatial-trm")  # as the command takes it
    evaluate_run(run, EvalConfig(num_episodes=3, horizon=2, num_videos=0))  # solves 0 and 1
    evaluate_run(other.run, EvalConfig(num_episodes=2, first_init_state=1, horizon=2, num_videos=0))
    test = compare.compare_runs("other", run)
    assert (test["pairs"], test["both"], test["neither"], test["unpaired"]) == (2, 1, 1, 1)
    planned = plan_run(run, EvalConfig(num_episodes=2, horizon=2, num_videos=0)).planned
    assert compare.compare_runs("other", run, episodes=planned)["pairs"] == 1  # not state 2
    evaluate_run(run, EvalConfig(num_episodes=1, horizon=2, num_videos=0), suite="libero_goal")
    with pytest.raises(FileNotFoundError, match="evaluate other --suite libero_goal"):
        compare.compare_runs("other", run, "libero_goal")
    with pytest.raises(ValueError, match=r"small \(0 episodes\) and other \(0\) share no suite"):
        compare.compare_runs("other", run, task_ids=[3])
    (run / "episodes.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="episodes.jsonl holds no episode; .*evaluate"):
        compare.compare_runs("other", run)


def test_two_runs_of_the_joint_suite_are_compared(run, small_run, monkeypatch):
    """Each task has the horizon of its own suite."""
    monkeypatch.setattr(play, "check_settling", lambda: None)
    other = small_run("other", epochs=1)
    other.fit()
    config, asked = EvalConfig(num_episodes=2, num_videos=0), ("libero_40", (3, 13))
    evaluate_run(other.run, config, "best", *asked)
    planned = plan_run(run, config, "best", *asked)
    compare.comparable(planned, other.run)
    with pytest.raises(ValueError, match="small is the run that is evaluated; expected another"):
        compare.comparable(planned, "small")
    planned.play()
    assert compare.compare_runs("other", run, *asked)["pairs"] == 4
    with pytest.raises(ValueError, match="horizon is (220|280) for .*other and 50 for small"):
        compare.comparable(dataclasses.replace(
            planned, config=dataclasses.replace(config, horizon=50), folder=run / "elsewhere"),
            other.run)


def test_which_renderers_drew_the_episodes_is_told(run, monkeypatch):
    for episodes, name in ((1, "llvmpipe"), (2, "a GPU"), (2, "another")):
        monkeypatch.setattr(play, "renderer", lambda name=name: name)
        results = evaluate_run(run, EvalConfig(num_episodes=episodes, horizon=2, num_videos=0))
    assert results["renderers"] == ["a GPU", "llvmpipe"]  # those that drew something


def test_selection_goes_on_with_its_ledger(run):
    config, ledger = load_config(run).replace(horizon=2), run / "selection.jsonl"
    evaluate.selection_success(run, config, 2, ledger=ledger)
    rows = read_jsonl(ledger)
    assert [row["init_state"] for row in rows] == [None, None]
    summary = evaluate.selection_success(run, config, 3, ledger=ledger)
    assert summary == evaluate.selection_success(run, config, 3)
    assert read_jsonl(ledger)[:2] == rows and len(read_jsonl(ledger)) == 3
    assert evaluate.selection_rows(ledger, play.weights_digest(run, "last")) == read_jsonl(ledger)
    assert evaluate.selection_rows(ledger, play.weights_digest(run, "best")[::-1]) == []


@pytest.mark.parametrize("change", [{"horizon": 4}, {"protocol": "libero"}])
def test_selection_under_other_conditions_is_played_anew(run, change):
    config, ledger = load_config(run).replace(horizon=2), run / "selection.jsonl"
    assert evaluate.selection_success(run, config, 3, ledger=ledger)["successes"] == 2
    other = config.replace(**change)
    summary = evaluate.selection_success(run, other, 3, ledger=ledger)
    assert summary == evaluate.selection_success(run, other, 3)
    rows = read_jsonl(ledger)
    assert len(rows) == 6
    assert len({(row["protocol"], row["horizon"]) for row in rows}) == 2
    assert evaluate.selection_success(run, config, 3, ledger=ledger)["successes"] == 2
    assert read_jsonl(ledger) == rows


def test_a_baseline_is_evaluated_like_a_run(monkeypatch, tmp_path):
    monkeypatch.setattr("trm_helpers.sim.env.LiberoEnv", StraightRoad)
    monkeypatch.setattr(play, "software_versions", dict)
    config = EvalConfig(num_episodes=2, horizon=3, num_videos=0)
    results = baselines.plan_baseline("no-op", tmp_path, config, "libero_object").play()
    assert (results["successes"], results["episodes"], len(results["tasks"])) == (0, 20, 10)
    some = baselines.plan_baseline("no-op", tmp_path, config, "libero_object", [1, 0])
    assert some.results_name == "results-tasks-0-1.json"
    with pytest.raises(ValueError, match="baseline='hero' is not valid; expected one of 'expert'"):
        baselines.plan_baseline("hero", tmp_path, EvalConfig(), "libero_object")
    with pytest.raises(ValueError, match="'noise' is for trained policies; the baseline 'no-op'"):
        baselines.plan_baseline("no-op", tmp_path, EvalConfig(perturbation="noise"),
                                    "libero_90")
    with pytest.raises(ValueError, match="suite='libero' is not valid"):
        baselines.plan_baseline("no-op", tmp_path, EvalConfig(), "libero")


def test_perturbed_episodes_have_a_ledger_of_their_own(run):
    """Each walk is two steps longer than init_state + 1: the arm waits for the first action."""
    config = EvalConfig(num_episodes=2, horizon=4, num_videos=0, perturbation="delay_2")
    results = evaluate_run(run, config)
    assert results["mean_length"] == 3.5 and results["protocol"]["perturbation"] == "delay_2"
    folder = run / "robustness" / "libero_object-delay_2"
    assert results == json.loads((folder / "results.json").read_text())
    assert [row["perturbation"] for row in read_jsonl(folder / "episodes.jsonl")] == ["delay_2"] * 2
    assert not (run / "episodes.jsonl").exists() and not (run / "results.json").exists()
    with pytest.raises(ValueError, match="'no_instruction' cannot matter .* not conditioned on"):
        evaluate_run(run, EvalConfig(perturbation="no_instruction"))


def test_a_perturbation_is_a_function_of_the_episode(run, monkeypatch):
    seen = []

    def act(policy, observation):
        seen.append(int(observation["agentview_rgb"].max()))  # 255, or 153 where it is darker
        return policy.action

    monkeypatch.setattr(CountingPolicy, "act", act)
    config = EvalConfig(num_episodes=8, horizon=1, num_videos=0, perturbation="brightness")
    evaluate_run(run, config)
    assert set(seen) == {153, 255} and len(seen) == 8
    shutil.rmtree(run / "robustness")
    evaluate_run(run, dataclasses.replace(config, first_init_state=2, num_episodes=6))
    assert seen[8:] == seen[2:8]


def test_a_ledger_without_perturbations_goes_on(run):
    """Those written before there were any."""
    config = EvalConfig(num_episodes=2, horizon=4, num_videos=0)
    evaluate_run(run, config)
    ledger = run / "episodes.jsonl"
    rows = read_jsonl(ledger)
    assert [row.pop("perturbation") for row in rows] == ["none"] * 2
    ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate_run(run, config)["episodes"] == 2
    assert read_jsonl(ledger) == rows


def test_every_call_loads_the_policy_as_it_is_then(run, monkeypatch):
    loaded = []
    monkeypatch.setattr(play, "load_policy",
                        lambda *given: loaded.append(given) or CountingPolicy())
    evaluate_run(run, EvalConfig(num_episodes=2, horizon=4, num_videos=0))
    assert loaded == [(run, "best")]
    (run / "episodes.jsonl").unlink()
    evaluate_run(run, EvalConfig(num_episodes=1, horizon=4, num_videos=0), weights="best")
    assert len(loaded) == 2


def test_other_suites_and_tasks_leave_the_results_of_the_run_alone(run):
    config = EvalConfig(num_episodes=2, num_videos=0)
    evaluate_run(run, config)
    kept = (run / "results.json").read_bytes()
    results = evaluate_run(run, config, suite="libero_goal")
    assert results["protocol"]["horizon"] == 300
    folder = plan.evaluation_folder(run, "libero_goal")
    assert folder == run / "robustness" / "libero_goal-none"
    assert json.loads((folder / "results.json").read_text()) == results
    assert len(compare.evaluated_episodes(run, "libero_goal")) == 2
    results = evaluate_run(run, config, task_ids=[0, 4])
    assert json.loads((run / "results-tasks-0-4.json").read_text()) == results
    assert (run / "results.json").read_bytes() == kept
    rows = compare.evaluated_episodes(run)  # one ledger: nothing is played twice
    assert [(row["suite"], row["task_id"]) for row in rows] == [("libero_object", 0)] * 2 + [
        ("libero_object", 4)] * 2


def test_episodes_of_another_description_of_the_policy_are_not_mixed_in(run, monkeypatch):
    config = EvalConfig(num_episodes=1, horizon=4, num_videos=0)
    evaluate_run(run, config)  # a policy without a digest of its description: an older row
    monkeypatch.setattr(CountingPolicy, "described", "one", raising=False)
    evaluate_run(run, dataclasses.replace(config, num_episodes=2))
    monkeypatch.setattr(CountingPolicy, "described", "another")
    with pytest.raises(ValueError, match="another policy or protocol .policy: 'one' there"):
        evaluate_run(run, dataclasses.replace(config, num_episodes=2))


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
    with pytest.raises(ValueError, match="suite='libero_best' is not valid"):
        evaluate_run(run, suite="libero_best")
    with pytest.raises(ValueError, match="task_id=10 is not in libero_object"):
        evaluate_run(run, task_ids=[10])


# --- the real simulator -------------------------------------------------------------------------


@pytest.mark.sim
def test_the_expert_succeeds_from_an_official_init_state_at_the_suites_horizon(tmp_path):
    """As a run's upper bound; two of them are too few steps below."""
    config = EvalConfig(num_episodes=2, num_videos=0)
    result = baselines.plan_baseline("expert", tmp_path, config, "libero_object", [0]).play()
    assert (result["successes"], result["episodes"]) == (2, 2)
    rows = read_jsonl(tmp_path / "episodes.jsonl")
    assert all(60 < row["steps"] < row["horizon"] == 280 for row in rows)
    assert all(row["lifted"] == row["objects_to_move"] == ["alphabet_soup_1"] for row in rows)


@pytest.mark.sim
def test_a_shipped_policy_solves_its_task():
    """From an official init state, as `python -m trm_helpers evaluate` would play it."""
    config = EvalConfig(num_episodes=1, first_init_state=3, num_videos=0)
    results = evaluate_run("pretrained/spatial-wide", config, task_ids=[2])
    assert (results["successes"], results["episodes"], results["errors"]) == (1, 1, [])
    run = find_run("pretrained/spatial-wide")
    (row,) = read_jsonl(run / "episodes.jsonl")
    assert (row["task_id"], row["init_state"], row["horizon"]) == (2, 3, 220)
    assert 60 < row["steps"] < 200 and row["mean_recursions"] == 4.0
    assert row["lifted"] == row["objects_to_move"]
    assert set(row["recursions_by_phase"]) >= {"reach", "grasp", "carry"}


EVALUATION = """
import sys
from trm_helpers.config import EvalConfig
from trm_helpers.evaluation.baselines import plan_baseline

if __name__ == "__main__":
    config = EvalConfig(num_episodes=int(sys.argv[2]), horizon=8, num_videos=0, eval_workers=2)
    results = plan_baseline("no-op", sys.argv[1], config, "libero_object", [0]).play()
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
    command = [sys.executable, script, tmp_path / "run", "6"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for_rows(parent, ledger, 1)
    psutil.Process(parent.pid).children()[0].kill()
    wait_for_rows(parent, ledger, 3)
    parent.kill()
    parent.communicate()
    rows = read_jsonl(ledger)
    assert 3 <= len(rows) < 6 and not any("error" in row for row in rows)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert read_jsonl(ledger)[:len(rows)] == rows
    assert sorted(row["init_state"] for row in read_jsonl(ledger)) == list(range(6))


@pytest.mark.sim
@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_loses_no_episode(tmp_path):
    distributed = pytest.importorskip("distributed")
    ledger = tmp_path / "run" / "episodes.jsonl"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1,
                                  dashboard_address=None) as cluster:
        worker = next(iter(cluster.workers.values())).pid

        def kill() -> None:
            while not read_jsonl(ledger):
                time.sleep(0.05)
            os.kill(worker, signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        config = EvalConfig(num_episodes=4, horizon=8, num_videos=0,
                            cluster=cluster.scheduler_address)
        results = baselines.plan_baseline("no-op", tmp_path / "run", config, "libero_object",
                                          [0]).play()
    assert results["episodes"] == 4 and not results["errors"]
    assert sorted(row["init_state"] for row in read_jsonl(ledger)) == list(range(4))


def test_one_process_at_a_time_evaluates_into_a_folder(run):
    with exclusive_lock(run, lock=".evaluation.lock"), \
            pytest.raises(RuntimeError, match="another process works in"):
        evaluate_run(run, EvalConfig(num_episodes=1, num_videos=0))
    assert not (run / "episodes.jsonl").exists()
    assert evaluate_run(run, EvalConfig(num_episodes=1, num_videos=0))["episodes"] == 1


@pytest.mark.sim
def test_demonstrations_are_the_upper_bound_and_chance_the_lower(small_run, monkeypatch, tmp_path):
    """Two real demonstrations are replayed; the baselines play the same task."""
    from trm_helpers.demos.collect import collect_demonstrations

    file = collect_demonstrations("libero_object", 0, 2, tmp_path, workers=0, frame_stride=16)
    trainer = small_run(epochs=1)
    trainer.fit()
    monkeypatch.setattr(baselines, "demonstrations_of", lambda *_: {0: file})
    config = EvalConfig(bound_episodes=2, horizon=5, num_episodes=1,
                        perturbation="noise")  # of the policy's episodes alone
    bounds = play_bounds(trainer.run, config)
    assert list(bounds) == ["replay", "expert", "random", "no-op"]
    assert [bound["episodes"] for bound in bounds.values()] == [2, 2, 2, 2]
    assert [bound["successes"] for bound in bounds.values()] == [2, 0, 0, 0]  # 5 steps are too few
    replayed = read_jsonl(trainer.run / "bounds" / "replay" / "episodes.jsonl")
    assert all(row["steps"] > 50 and row["divergence"] < 0.01 for row in replayed)
    assert bounds["replay"]["protocol"]["init_states"] == "of the demonstrations"
    assert play_bounds(trainer.run, EvalConfig()) == {}
