"""What the cards of robustness and of recursion depth share: measured rows and a table's cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..files import read_json
from ..stats import paired_mcnemar, rate_cells
from .plan import Episode, not_run_in_words, tasks_in_words

NUMBERS = ("successes", "episodes", "success_rate", "wilson_low", "wilson_high", "mean_length")


def read_card(path: Path) -> dict:
    """An earlier card, empty if there is none; ``ValueError`` for a damaged one."""
    card = read_json(path) if path.exists() else {}
    rows = card.get("rows", [])
    if not isinstance(rows, list) or not all(
            isinstance(row, dict) and row.keys() >= {"name", *NUMBERS} for row in rows):
        raise ValueError(f"{path} is damaged: expected rows with name, {', '.join(NUMBERS)}")
    return card


def measured(results: Mapping) -> dict:
    """A card's numbers from what ``results.json`` holds; no comparison yet.

    Raises ``TimeoutError`` if episodes are missing: the first tasks alone may be the easy ones.
    """
    if results["not_run"]:
        planned = results["episodes"] + len(results["errors"]) + results["not_run"]
        raise TimeoutError(not_run_in_words(results["not_run"], planned))
    return {**{key: results[key] for key in NUMBERS}, "errors": len(results["errors"]),
            "gap": None, "p_value": None}


def earlier_rows(before: Mapping, conditions: Mapping, first: Mapping) -> dict[str, dict]:
    """Rows of an earlier card by name, to be kept; only ``first`` if it is about other episodes.

    Their gaps are to the first row of that card, which therefore has to have the same numbers.
    """
    rows = {row["name"]: row for row in before.get("rows", ())}
    same = {key: before.get(key) for key in conditions} == conditions and all(
        rows.get(first["name"], {}).get(key) == first[key] for key in NUMBERS)
    return (rows if same else {}) | {first["name"]: first}


def compared(first: Iterable[Mapping], rows: Iterable[Mapping]) -> dict[str, float]:
    """``gap`` and ``p_value`` of a row's episodes against those of the first row.

    Empty if none was played in both, because the machine failed in the others.
    """
    first, rows = list(first), list(rows)
    if not {*map(Episode.of, first)} & {*map(Episode.of, rows)}:
        return {}
    test = paired_mcnemar(first, rows)
    return {"gap": test["difference"], "p_value": test["p_value"]}


def cells(row: Mapping, rate: bool = False) -> dict[str, str | float]:
    """What both tables say of a row, in percent and points; ``rate`` adds the success rate."""
    of_rate = rate_cells(row)
    if not rate:
        del of_rate["success rate (%)"]
    return {**of_rate,
            "gap (points)": "" if row["gap"] is None else f"{100 * row['gap']:+.0f}",
            "paired p": "" if row["p_value"] is None else f"{row['p_value']:.2g}"}


def tasks_in_short(card: Mapping) -> str:
    """The episodes of each row: ``libero_object, tasks 0 and 1: 20 episodes each``."""
    return (f"{card['suite']}, {tasks_in_words(card['task_ids'])}: "
            f"{card['num_episodes']} episodes{' each' * (len(card['task_ids']) > 1)}")
