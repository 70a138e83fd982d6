"""Comparison of trainings: tasks and seeds against numbers worked out by hand."""

import runpy
import sys

import pytest

from trm_helpers.paths import repo_root

SCRIPT = runpy.run_path(str(repo_root() / "benchmarks" / "compare_trainings.py"))
compare_trainings = SCRIPT["compare_trainings"]


def episodes(outcomes: str, task_id: int) -> list[dict]:
    """One episode per character; ``1`` succeeded."""
    return [dict(suite="libero_object", task_id=task_id, init_state=i, success=outcome == "1",
                 steps=100) for i, outcome in enumerate(outcomes)]


def training(*outcomes: str) -> list[dict]:
    """Rows of one training: a string of outcomes for each task."""
    return [row for task, text in enumerate(outcomes) for row in episodes(text, task_id=task)]


def test_trainings_are_compared_over_tasks_and_seeds():
    a = [training("1100", "1000", "1111"), training("1000", "1100", "1111")]
    b = [training("1111", "1110", "1111"), training("1110", "1111", "1111")]
    # by task .875 - .375, .875 - .375 and 1 - 1; signs that give as much: + + and - -, of 4
    test = compare_trainings(a, b)
    assert (test["tasks"], test["episodes"]) == (3, 12)
    assert test["difference"] == pytest.approx(1 / 3) and test["p_value"] == 0.5
    # a resample of all three tasks alike has .5 (or .25 to .75 by its seeds) or 0
    assert test["low"] == pytest.approx(0.0, abs=0.01) and 0.5 < test["high"] <= 0.75
    assert compare_trainings(a, b) == test
    assert compare_trainings(b, a)["difference"] == -test["difference"]
    same = compare_trainings(a, a)
    assert (same["difference"], same["p_value"]) == (0, 1) and same["low"] < 0 < same["high"]


def test_the_spread_of_seeds_widens_the_interval():
    """Two lucky trainings of one method are no evidence, however many episodes they have."""
    tasks = 6
    lucky, unlucky = training(*["1" * 40] * tasks), training(*["0" * 40] * tasks)
    half = training(*["1" * 20 + "0" * 20] * tasks)
    wide = compare_trainings([half, half], [lucky, unlucky])
    assert wide["difference"] == 0 and (wide["low"], wide["high"]) == (-0.5, 0.5)
    sure = compare_trainings([unlucky] * 2, [half] * 2)
    assert (sure["low"], sure["high"], sure["p_value"]) == (0.5, 0.5, 2 / 2**tasks)


def test_many_tasks_are_compared_by_drawn_signs():
    a, b = [training(*["0"] * 14)], [training(*["1"] * 7, *["0"] * 7)]
    # seven of fourteen differ, all one way: 2 / 2^7
    assert compare_trainings(a, b)["p_value"] == pytest.approx(2 / 2**7, abs=0.005)


def test_trainings_on_other_episodes_are_refused():
    a = [training("11", "10")]
    for other in (training("11"), [], [{**row, "suite": "libero_goal"} for row in a[0]]):
        with pytest.raises(ValueError, match="expected the same episodes of at least 2 tasks"):
            compare_trainings(a, [other])
    with pytest.raises(ValueError, match="expected the same episodes"):
        compare_trainings(a, [])
    rows = [{**row, "horizon": 220} for row in a[0]]
    with pytest.raises(ValueError, match="horizon is 220 for a and 300 for b"):
        compare_trainings([rows], [[{**row, "horizon": 300} for row in rows]])


def test_runs_are_compared_by_the_script(monkeypatch, capsys):
    ledgers = {"one": training("11", "10"), "other": training("11", "11")}
    monkeypatch.setitem(SCRIPT["main"].__globals__, "evaluated_episodes",
                        lambda run, suite: ledgers[run])
    monkeypatch.setattr(sys, "argv", ["compare_trainings.py", "--a", "one", "--b", "other"])
    SCRIPT["main"]()
    assert capsys.readouterr().out.startswith("b against a on 4 shared episodes of 2 tasks: "
                                              "+25.0 points (95 % interval +0.0 to +50.0")
