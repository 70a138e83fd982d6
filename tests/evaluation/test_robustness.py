"""The robustness card: its arithmetic on made-up episodes, and a short one in the simulator."""

import dataclasses
import json

import imageio.v3 as imageio
import nbformat
import numpy as np
import pandas as pd
import pytest
from walking import CountingPolicy, StraightRoad

from trm_helpers import paths, schema
from trm_helpers.config import EvalConfig
from trm_helpers.data import language
from trm_helpers.evaluation import evaluate, play, robustness
from trm_helpers.evaluation.perturbations import PerturbedPolicy
from trm_helpers.evaluation.robustness import (
    FAILURE_MODES,
    card_notes,
    card_rows,
    changes_of,
    failure_modes,
    plot_card,
    robustness_card,
)
from trm_helpers.files import read_jsonl
from trm_helpers.sim.env import LiberoEnv
from trm_helpers.training.runs import load_config

CONFIG = EvalConfig(num_episodes=4, horizon=4, num_videos=0)
UNUSED = {
    "no_eye_in_hand": "it has no wrist camera",
    "wrong_instruction": "it is not conditioned on language",
    "no_instruction": "it is not conditioned on language",
    "lan": "it is not conditioned on language",
    "task": "it is not conditioned on language",
}


class LongerRoad(StraightRoad):
    """Two steps longer in LIBERO-PRO."""

    image_size = 64

    def reset(self, **where):
        observation = super().reset(**where)
        self.left += 2 * (self.task.suite in schema.PRO_SUITES)
        return observation


@pytest.fixture
def run(trained, monkeypatch):
    """A run of LIBERO-Object's task 0 whose episodes are walked, init state n in n + 1 steps."""
    monkeypatch.setattr("trm_helpers.sim.env.LiberoEnv", LongerRoad)
    monkeypatch.setattr(play, "load_policy", lambda *_: CountingPolicy())
    monkeypatch.setattr(play, "software_versions", lambda: {"mujoco": "3.3.2"})
    return trained


def test_every_suite_has_its_changes():
    names = list(changes_of("libero_goal"))
    assert names[0] == "plain" and names[-5:] == ["wide", "swap", "object", "lan", "task"]
    assert changes_of("libero_goal")["object"].suite == "libero_goal_object"
    assert not {"swap", "object", "lan", "task"} & set(changes_of("libero_90"))


def test_a_card_counts_and_compares(run):
    card = robustness_card(run, CONFIG)
    assert card == json.loads((run / "robustness.json").read_text())
    rows = {row["name"]: row for row in card["rows"]}
    assert list(rows) == ["plain", "shift", "brightness", "noise", "delay_1", "delay_2",
                          "no_agentview", "wide", "swap", "object"]
    assert {name: row["successes"] for name, row in rows.items()} \
        == {**dict.fromkeys(rows, 4), "delay_1": 3, "delay_2": 2, "swap": 2, "object": 2}
    assert (rows["plain"]["gap"], rows["plain"]["p_value"]) == (None, None)
    # two episodes lost and none won: both of two coins fall alike with probability 1/2
    assert (rows["delay_2"]["gap"], rows["delay_2"]["p_value"]) == (-0.5, 0.5)
    assert (rows["delay_1"]["gap"], rows["delay_1"]["p_value"]) == (-0.25, 1.0)
    assert (rows["swap"]["gap"], rows["swap"]["p_value"]) == (-0.5, None)  # other init states
    assert (rows["wide"]["gap"], rows["wide"]["p_value"]) == (0, None)
    assert [rows["delay_2"][key] for key in ("wilson_low", "wilson_high")] \
        == pytest.approx([0.1500, 0.8500], abs=1e-4)
    assert {change["name"]: change["reason"] for change in card["not_used"]} == UNUSED
    (failed,) = card["failed"]  # this policy has no statistics
    assert failed["name"] == "no_proprioception" and "no proprio_stats" in failed["reason"]
    assert (card["suite"], card["task_ids"], card["num_episodes"], card["horizon"]) \
        == ("libero_object", [0], 4, 4)
    assert imageio.imread(run / "figures" / "robustness.png").std() > 5


def test_a_card_says_what_failures_lifted(run, monkeypatch):
    monkeypatch.setattr(LongerRoad, "heights", lambda road: {
        "stone": 0.1 * (road.picked and road.left > 2), "stick": 0.1 * (road.left < 2)})
    card = robustness_card(run, CONFIG, only=["swap"])
    # init states 2 and 3 fail there, with 5 and 6 steps to go: neither got to the stick first
    assert [row["failures"] for row in card["rows"]] == [
        {"nothing lifted": 0, "another object lifted": 0, "the right one lifted": 0},
        {"nothing lifted": 0, "another object lifted": 2, "the right one lifted": 0}]
    table = card_rows(card)
    assert table[1]["failed, another object lifted"] == 2
    del card["rows"][1]["failures"]  # kept from an older version: the columns stay the same
    assert [list(row) for row in card_rows(card)] == [list(table[0])] * 2


@pytest.mark.parametrize("lifted, mode", [([], 0), (["plate", "soup"], 1), (["milk"], 2),
                                          (["soup", "plate"], 2)])
def test_either_of_two_objects_to_move_is_the_right_one(lifted, mode):
    row = {"lifted": lifted, "objects_to_move": ["soup", "milk"]}
    counts = failure_modes([{**row, "success": False}, {**row, "success": True}])
    assert counts == {name: int(number == mode) for number, name in enumerate(FAILURE_MODES)}


def test_of_an_older_rows_objects_the_first_was_to_be_moved():
    row = {"success": False, "goal_objects": ["soup", "basket"]}
    counts = failure_modes([{**row, "lifted": ["soup"]}, {**row, "lifted": ["basket"]}])
    assert [*counts.values()] == [0, 1, 1]


def test_a_card_leaves_what_was_evaluated_alone(run):
    robustness_card(run, CONFIG, only=["noise"])
    assert not (run / "results.json").exists() and not (run / "episodes.jsonl").exists()
    assert sorted(path.name for path in (run / "robustness").iterdir()) \
        == ["libero_object-noise", "libero_object-none"]
    rows = read_jsonl(run / "robustness" / "libero_object-noise" / "episodes.jsonl")
    assert [row["perturbation"] for row in rows] == ["noise"] * 4


def test_a_policy_told_in_words_is_asked_for_what_words_change(small_run, run, monkeypatch):
    monkeypatch.setattr(language, "compute_embeddings",
                        lambda texts: np.ones((len(texts), schema.LANGUAGE_DIM), np.float32))
    trainer = small_run("told", conditioning="language", epochs=1)
    trainer.fit()
    card = robustness_card(trainer.run, CONFIG, only=["wrong_instruction", "lan", "task"])
    assert [(row["name"], row["suite"]) for row in card["rows"]] == [
        ("plain", "libero_object"), ("wrong_instruction", "libero_object"),
        ("lan", "libero_object_lan"), ("task", "libero_object_task")]
    assert [change["name"] for change in card["not_used"]] == ["no_eye_in_hand"]


def test_an_interrupted_card_goes_on(run, monkeypatch):
    run_episode, played = play.run_episode, []

    def interrupt(policy, env, init_state, horizon, **drawn):
        played.append(init_state)
        if len(played) == 7:
            raise KeyboardInterrupt
        return run_episode(policy, env, init_state, horizon, **drawn)

    monkeypatch.setattr(play, "run_episode", interrupt)
    chosen = ("delay_1", "swap")
    with pytest.raises(KeyboardInterrupt):
        robustness_card(run, CONFIG, only=chosen)
    assert not (run / "robustness.json").exists()
    card = robustness_card(run, CONFIG, only=chosen)
    assert played == [0, 1, 2, 3, 0, 1, 2, 2, 3, 0, 1, 2, 3]
    assert [row["successes"] for row in card["rows"]] == [4, 3, 2]


def test_a_card_is_written_if_the_machine_fails_in_other_episodes_of_each_row(run, monkeypatch):
    run_episode = play.run_episode

    def fail(policy, env, init_state, horizon, **drawn):
        if init_state == isinstance(policy, PerturbedPolicy):
            raise OSError("the disk is gone")
        return run_episode(policy, env, init_state, horizon, **drawn)

    monkeypatch.setattr(play, "run_episode", fail)
    card = robustness_card(run, dataclasses.replace(CONFIG, num_episodes=2), only=["delay_1"])
    assert [(row["episodes"], row["errors"], row["gap"], row["p_value"]) for row in card["rows"]] \
        == [(1, 1, None, None)] * 2
    assert card == json.loads((run / "robustness.json").read_text())


def test_changes_for_which_no_time_is_left_are_listed(run, monkeypatch):
    config, append = dataclasses.replace(CONFIG, num_episodes=2), play.append_jsonl
    monkeypatch.setenv("TRM_STOP_AT", "0")
    with pytest.raises(TimeoutError, match="2 of 2 episodes are not run; the same call continues"):
        robustness_card(run, config, only=["swap"])
    monkeypatch.delenv("TRM_STOP_AT")

    def stop_after_two(ledger, row):
        append(ledger, row)
        if row["init_state"] == 1:
            monkeypatch.setenv("TRM_STOP_AT", "0")

    monkeypatch.setattr(play, "append_jsonl", stop_after_two)
    card = robustness_card(run, config, only=["swap"])
    assert [(row["name"], row["episodes"]) for row in card["rows"]] == [("plain", 2)]
    assert [(row["name"], "time is up" in row["reason"]) for row in card["failed"]] \
        == [("swap", True)]
    monkeypatch.delenv("TRM_STOP_AT")
    card = robustness_card(run, config, only=["swap"])
    assert [row["episodes"] for row in card["rows"]] == [2, 2] and not card["failed"]


def test_a_change_whose_last_episodes_are_missing_is_not_compared(run, monkeypatch):
    append = play.append_jsonl

    def stop_early(ledger, row):
        append(ledger, row)
        if "swap" in ledger.parent.name:
            monkeypatch.setenv("TRM_STOP_AT", "0")

    monkeypatch.setattr(play, "append_jsonl", stop_early)
    card = robustness_card(run, CONFIG, only=["swap"])
    assert [row["name"] for row in card["rows"]] == ["plain"]
    assert "3 of 4 episodes are not run" in card["failed"][0]["reason"]


def test_rows_stay_while_the_card_is_about_the_same_episodes(run):
    robustness_card(run, CONFIG, only=["swap"])
    card = robustness_card(run, CONFIG, only=["delay_1"])
    assert [row["name"] for row in card["rows"]] == ["plain", "delay_1", "swap"]
    fewer = EvalConfig(num_episodes=3, horizon=4, num_videos=0)
    card = robustness_card(run, fewer, only=["delay_1"])
    assert [(row["name"], row["successes"], row["episodes"]) for row in card["rows"]] \
        == [("plain", 3, 3), ("delay_1", 3, 3)]


def test_rows_do_not_stay_when_the_plain_episodes_they_were_compared_with_change(run, monkeypatch):
    run_episode = play.run_episode

    def fail(policy, env, init_state, horizon, **drawn):
        if init_state == 3 and env.task.suite == "libero_object":
            raise FloatingPointError("the arm is nowhere")
        return run_episode(policy, env, init_state, horizon, **drawn)

    monkeypatch.setattr(play, "run_episode", fail)
    plain, swap = robustness_card(run, CONFIG, only=["swap"])["rows"]
    assert (plain["episodes"], plain["errors"], swap["gap"]) == (3, 1, -0.5)
    monkeypatch.setattr(play, "run_episode", run_episode)  # its missing episode is played
    monkeypatch.setattr(LongerRoad, "step", lambda road, _: (road._look(), False))
    card = robustness_card(run, CONFIG, only=["noise"])
    assert [(row["name"], row["successes"], row["episodes"]) for row in card["rows"]] \
        == [("plain", 3, 4), ("noise", 0, 4)]


def test_what_cannot_be_asked_is_refused(run):
    with pytest.raises(ValueError, match="only='fog' is not valid; expected one of 'plain', "):
        robustness_card(run, CONFIG, only=["swap", "fog"])
    with pytest.raises(ValueError, match="perturbation='noise' is not valid; expected 'none'"):
        robustness_card(run, EvalConfig(perturbation="noise"))
    assert not (run / "robustness").exists()


def test_a_change_that_was_played_otherwise_is_refused_before_the_first_episode(run):
    evaluate.plan_run(run, dataclasses.replace(CONFIG, horizon=3),
                      suite="libero_object_swap").play()
    with pytest.raises(ValueError, match="swap-none/episodes.jsonl .*horizon: 3 there, 4 now"):
        robustness_card(run, CONFIG)
    assert [path.name for path in (run / "robustness").iterdir()] == ["libero_object_swap-none"]
    robustness_card(run, CONFIG, only=["noise"])  # which has nothing to do with it


@pytest.mark.parametrize("content", ["{", '{"rows": 3}', '{"rows": [1]}', '{"rows": [{}]}'])
def test_a_damaged_card_is_named_before_the_first_episode(run, content):
    (run / "robustness.json").write_text(content)
    with pytest.raises(ValueError, match="robustness.json is damaged"):
        robustness_card(run, CONFIG, only=["noise"])
    assert not (run / "robustness").exists()


def test_a_card_whose_figure_fails_is_written(run, monkeypatch, capsys):
    monkeypatch.setattr(robustness, "save_figure", lambda *_: 1 / 0)
    card = robustness_card(run, CONFIG, only=["noise"])
    assert card == json.loads((run / "robustness.json").read_text())
    assert "the figure of the card could not be made: ZeroDivision" in capsys.readouterr().out


def test_a_card_as_a_table_and_notes(run):
    card = robustness_card(run, CONFIG, only=["delay_2", "swap", "no_proprioception"])
    assert [list(row.values()) for row in card_rows(card)] == [
        ["nothing changed", "4 of 4", 100.0, "51 to 100", "", "", 0, 0, 0, 0],
        ["actions 0.1 s late", "2 of 4", 50.0, "15 to 85", "-50", "0.5", 0, 0, 2, 0],
        ["LIBERO-PRO: objects exchanged", "2 of 4", 50.0, "15 to 85", "-50", "", 0, 0, 2,
         0],
    ]
    notes = card_notes(card)
    assert notes[0].startswith("Too few episodes per policy (4)")
    assert len(notes) == 1 + len(UNUSED) + 1
    assert notes[1] == ("cannot matter for this policy: wrist camera black, because it has no "
                        "wrist camera")
    assert notes[-1].startswith("could not be played: arm and gripper readings replaced by their ")


def test_the_figure_has_a_bar_for_each_row_and_the_plain_rate_as_a_line(run):
    card = robustness_card(run, CONFIG, only=["delay_2", "swap"])
    (axes,) = plot_card(card).axes
    assert [bar.get_width() for bars in axes.containers[1::2] for bar in bars] == [100, 50, 50]
    assert [label.get_text() for label in axes.get_yticklabels()] \
        == ["nothing changed", "actions 0.1 s late", "LIBERO-PRO: objects exchanged"]
    assert [text.get_text() for text in axes.texts] == ["4/4", "2/4", "2/4"]
    assert 100 in [line.get_xdata()[0] for line in axes.lines]


def test_the_notebook_shows_the_card_when_it_is_asked_for(run, capsys):
    notebook = nbformat.read(paths.notebooks_dir() / "06_eval.ipynb", as_version=4)
    (cell,) = [cell.source for cell in notebook.cells if "robustness_card(" in cell.source]
    shown = []
    names = {"run": run, "config": load_config(run).replace(horizon=4), "weights": "best",
             "task_ids": None, "dataclasses": dataclasses, "robustness_card": robustness_card,
             "plot_card": plot_card, "card_rows": card_rows, "card_notes": card_notes, "pd": pd,
             "display": lambda *given: shown.extend(given),
             "results": {"episodes": 4, "tasks": [{}, {}]}, "episodes": [{"seconds": 100.0}] * 4}
    names["changed"] = dataclasses.replace(names["config"].eval, num_videos=0, num_episodes=2)
    exec(cell, {**names, "robustness_episodes": 0})
    assert "set robustness_episodes=2 for" in capsys.readouterr().out
    assert not shown and not (run / "robustness").exists()
    exec(cell, {**names, "robustness_episodes": 2})
    assert "wrist camera black" in capsys.readouterr().out
    assert shown[0]["change"][0] == "nothing changed" and len(shown) == 2
    assert not (run / "robustness" / "libero_object-none" / "videos").exists()


@pytest.mark.sim
def test_a_card_of_a_trained_policy(trained):
    """Four steps solve nothing: that every part of it runs in the simulator is what is seen."""
    config = EvalConfig(num_episodes=1, horizon=4, num_videos=0)
    card = robustness_card(trained.name, config, only=["no_proprioception"])
    assert [(row["name"], row["suite"], row["successes"], row["episodes"], row["errors"])
            for row in card["rows"]] == [
        ("plain", "libero_object", 0, 1, 0),
        ("no_proprioception", "libero_object", 0, 1, 0),
    ]
    assert not card["failed"] and card["software"]["gl_renderer"]


@pytest.mark.sim
def test_wide_placements_are_other_scenes_each(trained, monkeypatch):
    places = []

    class Watched(LiberoEnv):
        def reset(self, **asked):
            observation = super().reset(**asked)
            places.append(np.concatenate([self.object_position(name)
                                          for name in ("alphabet_soup_1", "basket_1")]))
            return observation

    monkeypatch.setattr("trm_helpers.sim.env.LiberoEnv", Watched)
    card = robustness_card(trained, EvalConfig(num_episodes=2, horizon=2, num_videos=0),
                           only=["wide"])
    plain, wide = card["rows"]
    assert (wide["name"], wide["episodes"], wide["p_value"]) == ("wide", 2, None)
    assert wide["failures"]["nothing lifted"] == 2
    assert np.linalg.norm(places[0] - places[1]) < 0.03 < np.linalg.norm(places[2] - places[3])
    (ledger,) = trained.glob("robustness/libero_object-wide-none/episodes.jsonl")
    assert [(row["init_state"], row["seed"], row["placement"]) for row in read_jsonl(ledger)] \
        == [(None, 2**31, "wide"), (None, 2**31 + 1, "wide")]
