"""What the cards of robustness and of recursion depth share: measured rows and a table's cells."""

from __future__ import annotations

from collections.abc import Mapping

from ..stats import interval_text
from .plan import not_run_in_words, tasks_in_words

NUMBERS = ("successes", "episodes", "success_rate", "wilson_low", "wilson_high", "mean_length")


def measured(results: Mapping) -> dict:
    """A card's numbers from what ``results.json`` holds; no comparison yet.

    Raises ``TimeoutError`` if episodes are missing: the first tasks alone may be the easy ones.
    """
    if results["not_run"]:
        planned = results["episodes"] + len(results["errors"]) + results["not_run"]
        raise TimeoutError(not_run_in_words(results["not_run"], planned))
    return {**{key: results[key] for key in NUMBERS}, "errors": len(results["errors"]),
            "gap": None, "p_value": None}


def cells(row: Mapping, rate: bool = False) -> dict[str, str | float]:
    """What both tables say of a row, in percent and points; ``rate`` adds the success rate."""
    return {"successes": f"{row['successes']} of {row['episodes']}",
            **({"success rate (%)": round(100 * row["success_rate"], 1)} if rate else {}),
            "95 % Wilson interval (%)": interval_text(row["wilson_low"], row["wilson_high"]),
            "gap (points)": "" if row["gap"] is None else f"{100 * row['gap']:+.0f}",
            "paired p": "" if row["p_value"] is None else f"{row['p_value']:.2g}"}


def tasks_in_short(card: Mapping) -> str:
    """The episodes of each row: ``libero_object, tasks 0 and 1: 20 episodes each``."""
    return (f"{card['suite']}, {tasks_in_words(card['task_ids'])}: "
            f"{card['num_episodes']} episodes{' each' * (len(card['task_ids']) > 1)}")
