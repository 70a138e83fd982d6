"""The depth card: its arithmetic on made-up episodes, and a short one in the simulator."""

import dataclasses
import json
import shutil
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from walking import CountingPolicy, StraightRoad

from trm_helpers.__main__ import main
from trm_helpers.config import EvalConfig, ModelConfig
from trm_helpers.evaluation import depth, play
from trm_helpers.evaluation.depth import (
    action_errors,
    depth_card,
    depth_rows,
    plot_depth_card,
    recursion_settings,
)
from trm_helpers.evaluation.play import Evaluation
from trm_helpers.evaluation.rollout import phases
from trm_helpers.training.runs import held_out, load_policy
from trm_helpers.visuals.explain import depth_curve

CONFIG = EvalConfig(num_episodes=4, horizon=4, num_videos=0)


class Thinker(CountingPolicy):
    """Takes half a step with one recursion, and a whole one with more; closes in its third."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def reset(self):
        self.asked = 0

    def act(self, observation):
        self.asked += 1
        self.last_recursions = self.config.num_recursions
        if self.config.halting == "convergence":
            self.last_recursions = 1 + self.asked % 2
        action = np.where(np.arange(7) == 0, 0.5 if self.config.num_recursions == 1 else 1.0, 0.0)
        action[-1] = 1.0 if self.asked > 2 else -1.0
        return action


@pytest.fixture
def run(trained, monkeypatch):
    """A run of depth 2 whose episodes are walked: init state n needs n + 1 whole steps of 4."""
    config = depth.load_config(trained).model
    assert config.num_recursions == 2
    monkeypatch.setattr("trm_helpers.sim.env.LiberoEnv", StraightRoad)
    monkeypatch.setattr(play, "load_policy", lambda *_: Thinker(config))
    errors = {"as trained": [0.2, 0.1, 0.3], "fixed 1": [0.4, 0.3, 0.5]}
    monkeypatch.setattr(depth, "action_errors", lambda *_: errors)
    monkeypatch.setattr(play, "software_versions", lambda: {"mujoco": "3.3.2"})
    return trained


def test_phases_are_read_from_the_gripper():
    lost, carried = [True] * 23 + [False] * 2, [True] * 24 + [False] * 14
    assert phases([False] * 2 + lost + carried + [True, False]) == (
        ["reach"] * 2 + ["grasp"] * 8 + ["carry"] * 15 + ["reach"] * 2
        + ["grasp"] * 8 + ["carry"] * 16 + ["place"] * 12 + ["reach"] * 2 + ["grasp", "reach"])
    assert phases([]) == []


def test_recursion_settings():
    ways = recursion_settings(ModelConfig(num_recursions=4, halting="learned"), [1, 4, 8], [1e-3])
    assert ways == {
        "as trained": {}, "fixed 1": {"halting": "fixed", "num_recursions": 1},
        "fixed 4": {"halting": "fixed", "num_recursions": 4},
        "fixed 8": {"halting": "fixed", "num_recursions": 8},
        "convergence below 0.001, at most 8": {
            "halting": "convergence", "num_recursions": 8, "convergence_threshold": 1e-3},
        "as trained, state carried over": {"carry_over": True}}
    # their answer is a sum over the steps: nothing else can be asked of the same weights
    assert list(recursion_settings(ModelConfig(num_recursions=4, halting="adaptive"), [2])) == [
        "as trained", "adaptive 2", "as trained, state carried over"]
    carried = recursion_settings(ModelConfig(num_recursions=1, carry_over=True), [1], [])
    assert carried == {"as trained": {}, "as trained, state not carried over": {
        "carry_over": False}}


def test_a_card_counts_and_compares(run):
    card = depth_card(run, [1, 4], [1e-3], CONFIG)
    assert card == json.loads((run / "depth.json").read_text())
    rows = {row["name"]: row for row in card["rows"]}
    assert list(rows) == ["as trained", "fixed 1", "fixed 4", "convergence below 0.001, at most 4",
                          "as trained, state carried over"]
    assert [row["successes"] for row in rows.values()] == [4, 2, 4, 4, 4]
    assert (rows["as trained"]["gap"], rows["as trained"]["p_value"]) == (None, None)
    assert (rows["fixed 1"]["gap"], rows["fixed 1"]["p_value"]) == (-0.5, 0.5)
    assert [row["mean_recursions"] for row in rows.values()][:3] == [2, 1, 4]
    # episodes of 1, 2, 3, 4 steps, recursions 2, 1, 2, 1: means 2, 3/2, 5/3, 3/2
    stops = rows["convergence below 0.001, at most 4"]
    assert stops["mean_recursions"] == pytest.approx((2 + 1.5 + 5 / 3 + 1.5) / 4)
    assert stops["by_phase"] == pytest.approx({"reach": (2 + 3 * 1.5) / 4, "grasp": (2 + 1.5) / 2})
    assert depth_rows(card)[1]["successes"] == "2 of 4"
    assert depth_rows(card)[3]["mean in carry"] == ""
    assert [row["action error"] for row in depth_rows(card)] == ["0.2000", "0.4000", "", "", ""]
    left, _, error, right = plot_depth_card(card).axes
    assert right.get_title() == "Recursions by phase"
    row = {**stops, "by_phase": {"reach": 1.0, "place": 2.0}}
    *_, right = plot_depth_card({**card, "rows": [row, stops]}).axes
    assert [label.get_text() for label in right.get_xticklabels()] == [
        "reach", "grasp", "carry", "place"]
    assert [line.get_xdata().tolist() for line in right.lines] == [[0, 3], [0, 1]]
    assert (len(left.containers), len(error.containers)) == (5, 2)
    assert imageio.imread(run / "figures" / "depth_in_control.png").std() > 5
    assert not (run / "episodes.jsonl").exists()


def test_action_errors_are_of_what_each_way_answers(trained):
    config = depth.load_config(trained)
    ways = recursion_settings(config.model, [1, 4], [1e-3])
    source = play.TrainedPolicy.load(trained, "best")
    found = action_errors(source, config, ways)
    assert list(found) == ["as trained", "fixed 1", "fixed 4", "convergence below 0.001, at most 4"]
    policy = load_policy(trained)
    files = json.loads((trained / "policy.json").read_text())["trained_on"]["files"]
    data = held_out(trained, {0: files[0]["file"]}, config, policy)
    curve = depth_curve(policy, data, [1, 2, 4], len(data))
    for name, error, interval in zip(("fixed 1", "as trained", "fixed 4"), curve["arm_error"],
                                     curve["arm_interval"], strict=True):
        assert found[name] == pytest.approx([error, *interval])
    assert found["fixed 1"][0] != found["fixed 4"][0]
    Path(files[0]["file"]).unlink()
    assert action_errors(source, config, ways) == {}


def test_the_rows_of_a_card_share_an_environment_which_is_closed_at_the_end(run, monkeypatch):
    StraightRoad.made.clear()
    closed = []
    monkeypatch.setattr(StraightRoad, "close", lambda road: closed.append(road))
    card = depth_card(run, [1], [], CONFIG, only=["fixed 1"])
    assert [row["episodes"] for row in card["rows"]] == [4, 4]
    assert len(StraightRoad.made) == 1 and closed == StraightRoad.made
    assert play.worker_env.env is None


def test_what_was_played_is_not_played_again(run, monkeypatch):
    depth_card(run, [1], [], CONFIG)
    monkeypatch.setattr(play, "run_episode", None)
    card = depth_card(run, [1], [], CONFIG)
    assert [row["episodes"] for row in card["rows"]] == [4, 4, 4]
    assert main(["report", run.name]) == 0
    assert "| fixed 1 | 2 of 4 | 15 to 85 | -50 | 0.5 | 1.0 |" in (run / "report.md").read_text()


def test_a_way_that_was_played_otherwise_is_refused_before_the_first_episode(run):
    depth_card(run, [1], [], dataclasses.replace(CONFIG, horizon=3), only=["fixed 1"])
    shutil.rmtree(run / "depth" / "as-trained")
    with pytest.raises(ValueError, match="fixed-1/episodes.jsonl .*horizon: 3 there, 4 now"):
        depth_card(run, [1], [], CONFIG)
    assert [path.name for path in (run / "depth").iterdir()] == ["fixed-1"]


def test_rows_for_which_no_time_is_left_are_named(run, monkeypatch, capsys):
    append = play.append_jsonl

    def stop_after_four(ledger, row):
        append(ledger, row)
        if row["init_state"] == 3:
            monkeypatch.setenv("TRM_STOP_AT", "0")

    monkeypatch.setattr(play, "append_jsonl", stop_after_four)
    card = depth_card(run, [1], config=CONFIG, only=["fixed 1"])
    assert [row["name"] for row in card["rows"]] == ["as trained"]
    assert "fixed 1: the session's time is up: 4 of 4 episodes" in capsys.readouterr().out
    monkeypatch.delenv("TRM_STOP_AT")
    card = depth_card(run, [1], config=CONFIG, only=["fixed 1"])
    assert [row["name"] for row in card["rows"]] == ["as trained", "fixed 1"]


def test_a_way_that_cannot_be_played_costs_no_other_row(run, monkeypatch, capsys):
    play_all = Evaluation.play

    def fails(evaluation):
        if evaluation.folder.name == "fixed-4":
            raise RuntimeError("no episode could be run")
        return play_all(evaluation)

    monkeypatch.setattr(Evaluation, "play", fails)
    card = depth_card(run, [1, 4], [], config=CONFIG, only=["fixed 1", "fixed 4"])
    assert [row["name"] for row in card["rows"]] == ["as trained", "fixed 1"]
    assert "fixed 4: no episode could be run" in capsys.readouterr().out
    assert json.loads((run / "depth.json").read_text()) == card


def test_a_policy_that_fails_at_once_has_a_row(run, monkeypatch):
    monkeypatch.setattr(Thinker, "act", lambda *_: 1 / 0)
    card = depth_card(run, [1], [], CONFIG, only=["fixed 1"])
    assert [(row["successes"], row["episodes"], row["errors"]) for row in card["rows"]] \
        == [(0, 4, 0)] * 2
    assert depth_rows(card)[0]["mean recursions"] == "0.0"


def test_a_way_changes_no_other(trained):
    source = play.TrainedPolicy.load(trained, "best")
    deep, shallow = (depth.ChangedPolicy(source, {"num_recursions": count}).make()
                     for count in (7, 1))
    assert [policy.config.num_recursions for policy in (source.make(), deep, shallow)] == [2, 7, 1]


def test_some_ways_alone(run):
    card = depth_card(run, [1, 4], [1e-3], CONFIG, only=["fixed 4"])
    assert [row["name"] for row in card["rows"]] == ["as trained", "fixed 4"]
    assert card["rows"][1]["gap"] == 0
    card = depth_card(run, [1, 4], [1e-3], CONFIG, only=["fixed 1"])  # the other one stays
    assert [row["name"] for row in card["rows"]] == ["as trained", "fixed 1", "fixed 4"]
    card = depth_card(run, [1], [], dataclasses.replace(CONFIG, num_episodes=3), only=["fixed 1"])
    assert [row["name"] for row in card["rows"]] == ["as trained", "fixed 1"]


def test_each_task_is_played_once_and_only_tasks_that_the_policy_knows(run, monkeypatch):
    assert depth_card(run, [1], [], CONFIG, task_ids=[3, 3])["task_ids"] == [3]
    config = depth.load_config(run)
    numbered = dataclasses.replace(
        config, model=dataclasses.replace(config.model, conditioning="task_id"))
    monkeypatch.setattr(depth, "load_config", lambda _: numbered)
    with pytest.raises(ValueError, match="knows tasks 0 of libero_object"):
        depth_card(run, [1], [], CONFIG, task_ids=[7])


def test_bad_input(run, monkeypatch):
    with pytest.raises(ValueError, match=r"depths=\(0,\) is not valid"):
        depth_card(run, [0])
    for wrong in ({"depths": [99999]}, {"depths": [1], "thresholds": [float("nan")]}):
        with pytest.raises(ValueError, match="(num_recursions|convergence_threshold)=.* not valid"):
            depth_card(run, config=CONFIG, **wrong)
    (run / "depth.json").write_text('{"rows": [')
    with pytest.raises(ValueError, match="depth.json"):
        depth_card(run, [1], [], CONFIG)
    (run / "depth.json").unlink()
    assert not (run / "depth").exists()  # nothing was played
    with pytest.raises(ValueError, match="only='fixed 7' is not valid; expected one of 'as"):
        depth_card(run, [1], [], CONFIG, only=["fixed 7"])
    config = depth.load_config(run)
    flat = dataclasses.replace(config, model=ModelConfig(variant="transformer"))
    monkeypatch.setattr(depth, "load_config", lambda _: flat)
    with pytest.raises(ValueError, match="variant='transformer', which is applied once"):
        depth_card(run)


@pytest.mark.sim
def test_the_command_in_the_simulator(trained, capsys):
    assert main(["depth", trained.name, "--num-episodes", "1", "--horizon", "6", "--depths", "3",
                 "--thresholds", "1e-3", "--eval-workers", "1"]) == 0
    table = capsys.readouterr().out
    assert "fixed 3" in table and "convergence below 0.001, at most 3" in table
    rows = json.loads((trained / "depth.json").read_text())["rows"]
    recursions = [row["mean_recursions"] for row in rows]
    assert recursions[:2] == [2, 3] and 1 <= recursions[2] <= 3 and recursions[3] == 2
    assert all(row["episodes"] == 1 and row["mean_length"] == 6 for row in rows)
    assert [row["action_error"] is None for row in rows] == [False, False, False, True]
