"""Success rates with their uncertainty: intervals, paired comparison, detectable difference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

# scipy.stats, which takes seconds to import, is imported where it is used
EPISODE_KEYS = ("suite", "task_id", "init_state", "success", "steps")


def counted(number: int, what: str) -> str:
    """``1 episode``, ``2 episodes``."""
    return f"{number} {what}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """``3.3 minutes``, or below one minute ``8.2 seconds``."""
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.2g} seconds"


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """95 % Wilson score interval (low, high), in [0, 1], of a success rate.

    It keeps its coverage at few episodes and at rates near 0 and 1, where the usual
    ``p +- 1.96 sqrt(p (1 - p) / n)`` fails (Wilson 1927; Brown, Cai and DasGupta 2001). Raises
    ``ValueError`` for impossible counts.
    """
    from scipy.stats import binomtest

    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(f"successes={successes} of episodes={episodes} is not valid; "
                         "expected episodes >= 1 and successes from 0 to episodes")
    interval = binomtest(int(successes), int(episodes)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def interval_text(low: float, high: float, digits: int = 0) -> str:
    """An interval of rates in percent, without the unit: ``48 to 92``."""
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f}"


def rate_text(successes: int, episodes: int, digits: int = 0) -> str:
    """A success rate with its 95 % Wilson interval: ``6 of 20 (15 to 52 %)``."""
    interval = interval_text(*wilson_interval(successes, episodes), digits)
    return f"{successes} of {episodes} ({interval} %)"


def summarize_episodes(rows: Sequence[Mapping]) -> dict:
    """Success and length of evaluated episodes, overall and per task.

    Args:
        rows: each with ``suite``, ``task_id``, ``init_state``, ``success`` and ``steps``.

    Returns:
        ``successes``, ``episodes``, ``success_rate`` and its 95 % Wilson interval ``wilson_low``
        and ``wilson_high``; ``mean_length`` and ``std_length`` (population) of all episodes in
        steps; ``policy_errors``, failures in which the policy raised or gave no valid action; and
        ``tasks``, a list of the same with ``suite`` and ``task_id``. With several tasks also
        ``task_mean``, the mean of their success rates, and its interval ``task_low`` and
        ``task_high`` from :func:`cluster_bootstrap`.

    Raises:
        ValueError: no rows, a row that lacks a key, or an episode that occurs twice.
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


def cluster_bootstrap(task_rates: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval (low, high) of the mean over tasks, with whole tasks resampled.

    Episodes of one task are alike, so an interval over episodes is too narrow for "tasks like
    these". With fewer than ten tasks this one is too narrow as well. Raises ``ValueError`` for
    fewer than two.
    """
    from scipy.stats import bootstrap

    if len(task_rates) < 2:
        raise ValueError(f"{len(task_rates)} task(s); expected at least 2 to resample")
    interval = bootstrap((np.asarray(task_rates),), np.mean, n_resamples=10_000,
                         method="percentile",
                         random_state=np.random.default_rng(0)).confidence_interval
    return float(interval.low), float(interval.high)


def _summary(rows: Iterable[Mapping]) -> dict:
    rows = list(rows)
    successes, steps = sum(bool(row["success"]) for row in rows), [row["steps"] for row in rows]
    low, high = wilson_interval(successes, len(rows))
    return {"successes": successes, "episodes": len(rows), "success_rate": successes / len(rows),
            "wilson_low": low, "wilson_high": high,
            "mean_length": float(np.mean(steps)), "std_length": float(np.std(steps)),
            "policy_errors": sum("policy_error" in row for row in rows)}


def _by_episode(rows: Sequence[Mapping], name: str) -> dict[tuple, Mapping]:
    """Rows by (suite, task_id, init_state, seed); the seed is 0 by default."""
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

    For the joint suite it gives each suite's counts. It also names failures of the policy, which
    count, and errors of the machine, which do not.
    """
    spread = (f" (standard deviation {summary['std_length']:.1f})"
              if summary["episodes"] > 1 else "")
    parts = [f"{summary['successes']} of {summary['episodes']} episodes, "
             f"success rate {100 * summary['success_rate']:.0f} % (95 % Wilson interval "
             f"{interval_text(summary['wilson_low'], summary['wilson_high'])} %), "
             f"mean length {summary['mean_length']:.1f} steps{spread}"]
    parts += [f"{suite} {counts['successes']} of {counts['episodes']}"
              for suite, counts in summary.get("suites", {}).items()]
    if "task_mean" in summary:
        low, high = summary["task_low"], summary["task_high"]
        resampled = f" (tasks resampled: {interval_text(low, high)} %)" if low < high else ""
        parts.append(f"mean of {len(summary['tasks'])} tasks {100 * summary['task_mean']:.0f} %"
                     f"{resampled}")
    if summary.get("policy_errors"):
        parts.append(f"counted as failures: {counted(summary['policy_errors'], 'episode')} in "
                     "which the policy raised an error or gave no valid action")
    if summary.get("errors"):
        parts.append(f"not counted: {counted(len(summary['errors']), 'episode')} that the machine "
                     "could not run (simulator, process or time limit)")
    return "; ".join(parts)


def comparison_rows(summaries: Mapping[str, Mapping], head: str = "policy") -> list[dict]:
    """Rows of a table from summaries of :func:`summarize_episodes` by name, under this head."""
    return [{head: name, **rate_cells(summary),
             "mean length (steps)": round(summary["mean_length"], 1)}
            for name, summary in summaries.items()]


def rate_cells(summary: Mapping) -> dict[str, str | float]:
    """Successes, rate and interval of a summary as a table has them, in percent."""
    return {"successes": f"{summary['successes']} of {summary['episodes']}",
            "success rate (%)": round(100 * summary["success_rate"], 1),
            "95 % Wilson interval (%)": interval_text(summary["wilson_low"],
                                                      summary["wilson_high"])}


def paired_mcnemar(a: Sequence[Mapping], b: Sequence[Mapping],
                   names: Sequence[str] = ("a", "b")) -> dict:
    """Exact McNemar test of two policies on the same episodes.

    Under equal success rates ``only_a`` is binomial with probability 1/2 among the pairs that
    differ (McNemar 1947).

    Args:
        a, b: rows as in :func:`summarize_episodes`; rows with an ``error`` are ignored.
        names: of both in errors.

    Returns:
        ``pairs`` of the same suite, task, init state and seed, of which ``both``, ``only_a``,
        ``only_b`` or ``neither`` succeeded; ``unpaired``, the number of other episodes;
        ``difference``, success rate of b minus that of a over the pairs; two-sided ``p_value``.

    Raises:
        ValueError: no pairs, or a pair of different protocols.
    """
    first, second = (_by_episode([row for row in rows if "error" not in row], name)
                     for rows, name in zip((a, b), names, strict=True))
    shared = first.keys() & second.keys()
    if not shared:
        raise ValueError(f"{names[0]} ({counted(len(first), 'episode')}) and {names[1]} "
                         f"({len(second)}) share no suite, task and init state; expected policies "
                         "evaluated on the same episodes")
    for key in shared:
        for condition in ("protocol", "horizon"):
            one, other = first[key].get(condition), second[key].get(condition)
            if None not in (one, other) and one != other:
                raise ValueError(f"{condition} is {one!r} for {names[0]} and {other!r} for "
                                 f"{names[1]} in episode {key}; expected the same")
    outcomes = [(bool(first[key]["success"]), bool(second[key]["success"])) for key in shared]
    only_a, only_b = outcomes.count((True, False)), outcomes.count((False, True))
    return {"pairs": len(shared), "both": outcomes.count((True, True)), "only_a": only_a,
            "only_b": only_b, "neither": outcomes.count((False, False)),
            "unpaired": len(first) + len(second) - 2 * len(shared),
            "difference": (only_b - only_a) / len(shared),
            "p_value": mcnemar_p(only_a, only_b)}


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test, from the numbers of pairs that differ each way."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def format_comparison(test: Mapping, name: str, other: str) -> str:
    """One line on a :func:`paired_mcnemar` of ``other`` (a) and ``name`` (b)."""
    significant = "significant" if test["p_value"] < 0.05 else "not significant"
    return (f"{name} against {other} on {test['pairs']} shared episodes: "
            f"{100 * test['difference']:+.1f} points ({test['only_b']} that only {name} solved, "
            f"{test['only_a']} only {other}; exact McNemar p = {test['p_value']:.2g}, "
            f"{significant} at 0.05)")


def detectable(summary: Mapping) -> str:
    """The gap between success rates that this number of episodes usually reveals, in one line.

    Of two independent groups of n episodes, with a two-sided test at level 0.05 and probability
    0.8: ``(z_0.975 + z_0.8) sqrt(2 p (1 - p) / n)``, the normal approximation with the variance at
    this success rate p, which counts as 0.1 to 0.9. With fewer than six episodes the exact paired
    test finds nothing: five pairs that all differ in one direction have p = 0.0625.
    """
    rate, episodes = min(max(summary["success_rate"], 0.1), 0.9), summary["episodes"]
    z = NormalDist().inv_cdf
    gap = (z(0.975) + z(0.8)) * math.sqrt(2 * rate * (1 - rate) / episodes)
    if episodes < 6 or gap > 1:
        return f"Too few episodes per policy ({episodes}) to detect any difference"
    return (f"With {episodes} episodes per policy, a true difference of {100 * gap:.0f} points is "
            "detected with a probability of 80 %; a comparison on the same episodes detects "
            "smaller ones")
