"""Success rates with their uncertainty: intervals, paired comparison, what a sample can tell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from scipy.stats import binomtest, bootstrap

EPISODE_KEYS = ("suite", "task_id", "init_state", "success", "steps")


def wilson_interval(
    successes: int, episodes: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Wilson score interval (low, high), in [0, 1], of a success rate.

    It keeps its coverage at few episodes and at rates near 0 and 1, where the usual
    ``p +- 1.96 sqrt(p (1 - p) / n)`` fails (Wilson 1927; Brown, Cai and DasGupta 2001). Raises
    ``ValueError`` for counts that can not be and for a confidence outside (0, 1).
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(
            f"successes={successes} of episodes={episodes} is not valid; "
            "expected episodes >= 1 and successes from 0 to episodes"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not valid; expected in (0, 1)")
    interval = binomtest(int(successes), int(episodes)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def summarize_episodes(rows: Sequence[Mapping]) -> dict:
    """Success and length of evaluated episodes, together and under ``"tasks"`` for each task.

    Each row has ``suite``, ``task_id``, ``init_state``, ``success`` and ``steps``. Returns
    ``successes``, ``episodes``, ``success_rate`` with its 95 % Wilson interval ``wilson_low`` and
    ``wilson_high``, ``mean_length`` and ``std_length`` in steps (over all episodes, failed ones
    included; population standard deviation, so that one episode has 0), ``policy_errors``, the
    failures in which the policy raised or gave no valid action, and ``tasks``: a list of the same
    with ``suite`` and ``task_id``, in that order. With several tasks ``task_mean``, the
    mean of their success rates, and its interval ``task_low`` and ``task_high`` from
    :func:`cluster_bootstrap`. Raises ``ValueError`` when there is no row, for one that lacks a key,
    and for an episode that occurs twice.
    """
    episodes = _by_episode(rows, "rows")
    if not episodes:
        raise ValueError("rows is empty; expected at least one episode")
    tasks = [
        {"suite": suite, "task_id": task_id}
        | _summary([row for key, row in episodes.items() if key[:2] == (suite, task_id)])
        for suite, task_id in sorted({key[:2] for key in episodes})
    ]
    summary = _summary(episodes.values()) | {"tasks": tasks}
    if len(tasks) > 1:
        rates = [task["success_rate"] for task in tasks]
        low, high = cluster_bootstrap(rates)
        summary |= {"task_mean": float(np.mean(rates)), "task_low": low, "task_high": high}
    return summary


def cluster_bootstrap(task_rates: Sequence[float], confidence: float = 0.95, seed: int = 0,
                      resamples: int = 10_000) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean over tasks, whole tasks being resampled.

    Episodes of one task are alike, so that many of them say little about other tasks: an interval
    over episodes is too narrow for "tasks like these". With less than ten tasks this one is too
    narrow as well. Raises ``ValueError`` for less than two.
    """
    if len(task_rates) < 2:
        raise ValueError(f"{len(task_rates)} task(s); expected at least 2 to resample")
    interval = bootstrap((np.asarray(task_rates),), np.mean, confidence_level=confidence,
                         n_resamples=resamples, method="percentile",
                         random_state=np.random.default_rng(seed)).confidence_interval
    return float(interval.low), float(interval.high)


def _summary(rows: Iterable[Mapping]) -> dict:
    rows = list(rows)
    success, steps = zip(*((bool(row["success"]), row["steps"]) for row in rows), strict=True)
    low, high = wilson_interval(sum(success), len(success))
    return {
        "successes": sum(success),
        "episodes": len(success),
        "success_rate": sum(success) / len(success),
        "wilson_low": low,
        "wilson_high": high,
        "mean_length": float(np.mean(steps)),
        "std_length": float(np.std(steps)),
        "policy_errors": sum("policy_error" in row for row in rows),
    }


def _by_episode(rows: Sequence[Mapping], name: str) -> dict[tuple, Mapping]:
    """Rows by (suite, task_id, init_state, seed); without a seed it is 0."""
    episodes: dict[tuple, Mapping] = {}
    for row in rows:
        missing = [key for key in EPISODE_KEYS if key not in row]
        if missing:
            raise ValueError(f"a row of {name} lacks {', '.join(missing)}; found {sorted(row)}")
        key = (row["suite"], row["task_id"], row["init_state"], row.get("seed", 0))
        if key in episodes:
            raise ValueError(f"{name} holds suite, task, init state and seed {key} twice; "
                             "expected once")
        episodes[key] = row
    return episodes


def format_success(summary: Mapping) -> str:
    """One line on a summary of :func:`summarize_episodes`, or on one of its tasks.

    Episodes in which the policy failed to act count, those that the machine spoiled do not; both
    are said.
    """
    tasks = apart = ""
    if summary.get("policy_errors"):
        apart += (f"; counted as failures: {summary['policy_errors']} in which the policy raised "
                  "an error or gave no valid action")
    if summary.get("errors"):
        apart += (f"; not counted: {len(summary['errors'])} that the machine could not run "
                  "(simulator, process or time limit)")
    if "task_mean" in summary:
        tasks = (f"; mean of {len(summary['tasks'])} tasks {100 * summary['task_mean']:.0f} % "
                 f"(tasks resampled: {100 * summary['task_low']:.0f} to "
                 f"{100 * summary['task_high']:.0f} %)")
    return (
        f"{summary['successes']} of {summary['episodes']} episodes, "
        f"success rate {100 * summary['success_rate']:.0f} % (95 % Wilson interval "
        f"{100 * summary['wilson_low']:.0f} to {100 * summary['wilson_high']:.0f} %), "
        f"length {summary['mean_length']:.1f} +- {summary['std_length']:.1f} steps{tasks}{apart}"
    )


def comparison_rows(summaries: Mapping[str, Mapping]) -> list[dict]:
    """A table's rows on summaries of :func:`summarize_episodes` by name."""
    return [{
        "policy": name,
        "successes": f"{summary['successes']} of {summary['episodes']}",
        "success rate (%)": round(100 * summary["success_rate"], 1),
        "95 % Wilson interval (%)": (f"{100 * summary['wilson_low']:.0f} to "
                                     f"{100 * summary['wilson_high']:.0f}"),
        "mean length (steps)": round(summary["mean_length"], 1),
    } for name, summary in summaries.items()]


def paired_mcnemar(a: Sequence[Mapping], b: Sequence[Mapping]) -> dict:
    """Exact McNemar test of two policies on the same episodes.

    Rows as in :func:`summarize_episodes`, paired by suite, task and init state; those without a
    partner are counted in ``unpaired`` and left out, as are errors, uncounted. Returns ``pairs``,
    ``both``, ``only_a``, ``only_b`` and ``neither`` (how many succeeded so), ``difference``
    (success rate of b minus that of a, over the pairs) and the two-sided ``p_value``: under equal
    success rates ``only_a`` is binomial with probability 1/2 among the pairs that differ (McNemar
    1947). Raises ``ValueError``
    when nothing can be paired, or a pair was played by different protocols.
    """
    first, second = (_by_episode([row for row in rows if "error" not in row], name)
                     for rows, name in ((a, "a"), (b, "b")))
    shared = first.keys() & second.keys()
    if not shared:
        raise ValueError(
            f"a ({len(first)} episodes) and b ({len(second)}) share no suite, task and init state; "
            "expected policies evaluated on the same episodes"
        )
    _refuse_other_protocols(first, second, shared)
    outcomes = [(bool(first[key]["success"]), bool(second[key]["success"])) for key in shared]
    only_a, only_b = outcomes.count((True, False)), outcomes.count((False, True))
    differing = only_a + only_b
    return {
        "pairs": len(shared),
        "both": outcomes.count((True, True)),
        "only_a": only_a,
        "only_b": only_b,
        "neither": outcomes.count((False, False)),
        "unpaired": len(first) + len(second) - 2 * len(shared),
        "difference": (only_b - only_a) / len(shared),
        "p_value": float(binomtest(only_a, differing, 0.5).pvalue) if differing else 1.0,
    }


def compare_trainings(a: Sequence[Sequence[Mapping]], b: Sequence[Sequence[Mapping]],
                      seed: int = 0, resamples: int = 10_000) -> dict:
    """Two methods from several trainings each, on the same episodes, with tasks as the unit.

    McNemar's test compares two trainings; another seed of the same method may differ as much. Here
    the difference is the mean over tasks of b's success rate minus a's, each the mean over its
    trainings.

    Args:
        a, b: of each training its rows, as in :func:`summarize_episodes`. Episodes that one of them
            lacks are left out.

    Returns:
        ``tasks``, ``episodes`` (shared), ``difference``; ``low`` and ``high``, a 95 % percentile
        interval with the tasks and each method's trainings resampled; the two-sided ``p_value`` of
        the sign-flip test: how often the difference is as large when each task's sign is chosen at
        random (all 2^tasks choices up to 12 tasks, else ``resamples`` of them).

    Raises:
        ValueError: no shared episode, less than two shared tasks, or different protocols.
    """
    played = [[_by_episode([row for row in rows if "error" not in row], name) for rows in trainings]
              for trainings, name in ((a, "a"), (b, "b"))]
    every = [*played[0], *played[1]]
    shared = sorted(set.intersection(*map(set, every))) if all(played) else []
    tasks = sorted({key[:2] for key in shared})
    if len(tasks) < 2:
        raise ValueError(f"the trainings share {len(shared)} episodes of {len(tasks)} task(s); "
                         "expected the same episodes of at least 2 tasks")
    for episodes in every:
        _refuse_other_protocols(every[0], episodes, shared)
    rates = [np.array([[np.mean([bool(episodes[key]["success"]) for key in shared
                                 if key[:2] == task]) for task in tasks] for episodes in trainings])
             for trainings in played]  # (trainings, tasks) of a and of b
    by_task = rates[1].mean(axis=0) - rates[0].mean(axis=0)
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(tasks), size=(resamples, 1, len(tasks)))
    of_a, of_b = (each[generator.integers(len(each), size=(resamples, len(each), 1)), chosen]
                  .mean(axis=(1, 2)) for each in rates)
    low, high = np.quantile(of_b - of_a, [0.025, 0.975])
    if len(tasks) <= 12:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(tasks))))
    else:
        signs = generator.choice((-1, 1), size=(resamples, len(tasks)))
    as_large = np.abs(signs @ by_task) >= abs(by_task.sum()) - 1e-9
    return {"tasks": len(tasks), "episodes": len(shared), "difference": float(by_task.mean()),
            "low": float(low), "high": float(high), "p_value": float(as_large.mean())}


def _refuse_other_protocols(first: Mapping, second: Mapping, shared: Iterable[tuple]) -> None:
    """Raise ``ValueError`` for a shared episode that was played by different protocols."""
    for key in shared:
        for condition in ("protocol", "horizon"):
            one, other = first[key].get(condition), second[key].get(condition)
            if None not in (one, other) and one != other:
                raise ValueError(f"{condition} is {one!r} for a and {other!r} for b in episode "
                                 f"{key}; expected the same")


def format_comparison(test: Mapping, name: str, other: str) -> str:
    """One line on a :func:`paired_mcnemar` of ``other`` (a) and ``name`` (b)."""
    told = ("which luck explains well enough" if test["p_value"] >= 0.05
            else "which luck does not explain well")
    return (f"{name} against {other} on {test['pairs']} shared episodes: "
            f"{100 * test['difference']:+.1f} points ({test['only_b']} that only {name} solved, "
            f"{test['only_a']} only {other}; exact McNemar p = {test['p_value']:.2g}, {told})")


def detectable(summary: Mapping) -> str:
    """The gap between success rates that this number of episodes usually reveals, in one line."""
    rate = min(max(summary["success_rate"], 0.1), 0.9)
    gap = minimum_detectable_difference(summary["episodes"], rate)
    return (f"With {summary['episodes']} episodes per policy you will usually (80 %) detect a "
            f"difference of {100 * gap:.0f} points; comparing on the same episodes detects "
            "smaller ones")


def minimum_detectable_difference(
    episodes: int, success_rate: float, power: float = 0.8, alpha: float = 0.05
) -> float:
    """Smallest gap between two success rates that ``episodes`` per policy are likely to reveal.

    Two independent groups, two-sided test at level ``alpha``, found with probability ``power``;
    normal approximation with the variance at ``success_rate``:
    ``(z_(1 - alpha/2) + z_power) sqrt(2 p (1 - p) / n)``. Pairing by init state sees smaller gaps.
    Raises ``ValueError`` for a value out of range.
    """
    if episodes < 1:
        raise ValueError(f"episodes={episodes} is not valid; expected >= 1")
    for name, value in (("success_rate", success_rate), ("power", power), ("alpha", alpha)):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} is not valid; expected in (0, 1)")
    z = NormalDist().inv_cdf
    variance = 2 * success_rate * (1 - success_rate) / episodes
    return (z(1 - alpha / 2) + z(power)) * math.sqrt(variance)
