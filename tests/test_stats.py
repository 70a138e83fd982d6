"""Statistics against published and hand-computed numbers."""

import math

import numpy as np
import pytest

from trm_helpers.stats import (
    cluster_bootstrap,
    comparison_rows,
    detectable,
    duration,
    format_comparison,
    format_success,
    paired_mcnemar,
    summarize_episodes,
    wilson_interval,
)


def episode(init_state, success, steps=100, task_id=0, suite="libero_object"):
    return dict(suite=suite, task_id=task_id, init_state=init_state, success=success, steps=steps)


def episodes(outcomes: str, **settings) -> list[dict]:
    """One episode per character; ``1`` succeeded."""
    return [episode(i, outcome == "1", **settings) for i, outcome in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(5, 5, 57, 100), (45, 50, 79, 96), (450, 500, 87, 92), (8, 10, 49, 94), (0, 10, 0, 28)],
)
def test_wilson_interval_in_percent(successes, count, low, high):
    assert [round(100 * bound) for bound in wilson_interval(successes, count)] == [low, high]


def test_wilson_interval_equals_its_formula():
    n, z = 10, 1.959963984540054  # 95 %
    p = 0.3
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson_interval(3, 10) == pytest.approx((centre - half, centre + half))


@pytest.mark.parametrize("arguments", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses(arguments):
    with pytest.raises(ValueError, match="is not valid; expected"):
        wilson_interval(*arguments)


def test_summary_of_all_and_per_task():
    rows = [
        episode(0, True, 10, task_id=3), episode(1, False, 40, task_id=3),
        episode(0, True, 20, task_id=1), episode(1, True, 30, task_id=1),
    ]
    summary = summarize_episodes(rows)
    assert (summary["successes"], summary["episodes"], summary["success_rate"]) == (3, 4, 0.75)
    assert summary["mean_length"] == 25
    assert summary["std_length"] == pytest.approx(math.sqrt(125))  # (15, 15, 5, 5): population
    assert (summary["wilson_low"], summary["wilson_high"]) == wilson_interval(3, 4)
    assert [task["task_id"] for task in summary["tasks"]] == [1, 3]
    assert [task["success_rate"] for task in summary["tasks"]] == [1.0, 0.5]
    assert [task["mean_length"] for task in summary["tasks"]] == [25, 25]
    assert [task["std_length"] for task in summary["tasks"]] == [5, 15]
    # of two tasks a quarter of the resamples is the one twice, a quarter the other
    assert (summary["task_mean"], summary["task_low"], summary["task_high"]) == (0.75, 0.5, 1.0)
    assert format_success(summary).endswith("; mean of 2 tasks 75 % (tasks resampled: 50 to 100 %)")
    alike = {**summary, "task_low": 0.75, "task_high": 0.75}
    assert format_success(alike).endswith("; mean of 2 tasks 75 %")
    assert "task_mean" not in summarize_episodes(rows[:2])


def test_the_bootstrap_over_tasks_is_that_of_the_mean():
    rates = [0.2, 0.9, 0.5, 0.7, 0.4, 1.0, 0.6, 0.3, 0.8, 0.6]
    low, high = cluster_bootstrap(rates)
    generator = np.random.default_rng(7)
    means = generator.choice(rates, (20_000, 10)).mean(axis=1)
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    assert cluster_bootstrap(rates) == (low, high)
    assert cluster_bootstrap([1.0, 1.0, 1.0]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="1 task.*at least 2"):
        cluster_bootstrap([0.5])


def test_a_single_episode_has_a_summary():
    summary = summarize_episodes([episode(7, False, 280)])
    assert (summary["success_rate"], summary["std_length"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows is empty"),
        ([{"suite": "libero_goal", "success": True}], "lacks task_id, init_state, steps"),
        ([episode(4, True), episode(4, False)], r"\('libero_object', 0, 4, 0\) twice"),
    ],
)
def test_summary_refuses(rows, message):
    with pytest.raises(ValueError, match=message):
        summarize_episodes(rows)


def test_one_line():
    summary = summarize_episodes(episodes("1111111100", steps=120))
    assert format_success(summary) == (
        "8 of 10 episodes, success rate 80 % (95 % Wilson interval 49 to 94 %), "
        "mean length 120.0 steps (standard deviation 0.0)"
    )


def test_mcnemar_by_hand():
    # 1 pair for a, 5 for b: p = 2 (C(6,0) + C(6,1)) / 2^6 = 14 / 64
    a, b = episodes("1000000111"), episodes("0111110110")
    a = [row for row in a if row["init_state"] != 9]
    result = paired_mcnemar(a, list(reversed(b)))
    assert result == {
        "pairs": 9, "both": 2, "only_a": 1, "only_b": 5, "neither": 1, "unpaired": 1,
        "difference": pytest.approx(4 / 9), "p_value": pytest.approx(14 / 64),
    }


def test_mcnemar_pairs_within_task_and_suite():
    a = episodes("10") + episodes("01", task_id=1) + episodes("1", suite="libero_goal")
    assert paired_mcnemar(a, a) == {
        "pairs": 5, "both": 3, "only_a": 0, "only_b": 0, "neither": 2, "unpaired": 0,
        "difference": 0.0, "p_value": 1.0,
    }


def test_mcnemar_refuses_episodes_that_do_not_match():
    with pytest.raises(ValueError, match="share no suite"):
        paired_mcnemar(episodes("11"), episodes("11", task_id=2))


def test_mcnemar_leaves_out_errors():
    rows = [{"suite": "s", "task_id": 0, "init_state": i, "success": i < 2, "steps": 5}
            for i in range(4)]
    broken = [{"suite": "s", "task_id": 0, "init_state": 3, "error": "died"}]
    test = paired_mcnemar(rows, rows[:3] + broken)
    assert (test["pairs"], test["both"], test["unpaired"]) == (3, 2, 1)
    assert paired_mcnemar(rows, rows[:3] + broken + rows[3:])["pairs"] == 4  # tried again


@pytest.mark.parametrize(("condition", "other"), [("protocol", "libero"), ("horizon", 600)])
def test_mcnemar_refuses_pairs_of_different_protocols(condition, other):
    row = {"suite": "s", "task_id": 0, "init_state": 1, "success": True, "steps": 5,
           "protocol": "quick", "horizon": 220}
    assert paired_mcnemar([row], [{**row, "perturbation": "noise"}])["both"] == 1
    with pytest.raises(ValueError, match=f"{condition} is .* for a and {other!r} for b"):
        paired_mcnemar([row], [{**row, condition: other}])


def test_the_detectable_difference_in_a_line():
    # (1.95996 + 0.84162) sqrt(2 * 0.8 * 0.2 / 50) = 2.80158 * 0.08 = 0.224
    assert detectable({"episodes": 50, "success_rate": 0.8}).startswith(
        "With 50 episodes per policy, a true difference of 22 points is detected with a "
        "probability of 80 %")
    assert "of 7 points" in detectable({"episodes": 500, "success_rate": 0.8})  # 0.0709
    assert "17 points" in detectable({"episodes": 50, "success_rate": 1.0})  # as of 90 %
    for few in (1, 5):  # five pairs that all differ: p = 2 / 2**5
        assert detectable({"episodes": few, "success_rate": 1.0}) == (
            f"Too few episodes per policy ({few}) to detect any difference")
    assert "49 points" in detectable({"episodes": 6, "success_rate": 1.0})


def test_a_comparison_in_a_line():
    test = {"pairs": 75, "only_a": 5, "only_b": 2, "difference": -0.04, "p_value": 0.453125}
    assert format_comparison(test, "trm", "block") == (
        "trm against block on 75 shared episodes: -4.0 points (2 that only trm solved, 5 only "
        "block; exact McNemar p = 0.45, not significant at 0.05)")
    assert format_comparison({**test, "p_value": 0.01}, "a", "b").endswith(
        "p = 0.01, significant at 0.05)")


def test_a_comparison_has_a_row_for_each_policy():
    rows = [dict(suite="libero_goal", task_id=0, init_state=i, success=i < 9, steps=100 + i)
            for i in range(10)]
    assert comparison_rows({"mine": summarize_episodes(rows)}) == [{
        "policy": "mine", "successes": "9 of 10", "success rate (%)": 90.0,
        "95 % Wilson interval (%)": "60 to 98", "mean length (steps)": 104.5}]


@pytest.mark.parametrize(("seconds", "words"), [
    (0.043, "0.043 seconds"), (2.13, "2.1 seconds"), (42.4, "42 seconds"), (60, "1.0 minutes"),
    (198, "3.3 minutes")])
def test_a_duration_is_never_zero_minutes(seconds, words):
    assert duration(seconds) == words
