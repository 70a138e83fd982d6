"""What is left of a policy's success when something changes: one card per run.

The plain episodes, each of :data:`perturbations.PERTURBATIONS` on the same init states, scenes with
the goal's objects anywhere within reach, and the four LIBERO-PRO suites that vary the policy's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from .. import schema
from ..config import EvalConfig, ModelConfig
from ..files import dispensable, read_json, write_json
from ..stats import detectable, paired_mcnemar
from ..training.runs import find_run, load_config
from ..visuals.colours import BLUE, GREY, ORANGE, PALETTE
from ..visuals.plots import new_figure, save_figure, styled
from .evaluate import Evaluation, plan_run
from .perturbations import PERTURBATIONS, why_unused

PLAIN = "plain"
WIDE = "wide"
_CONDITIONS = ("suite", "task_ids", "weights", "sha256", "protocol", "horizon", "num_episodes",
               "first_init_state")  # cards that differ in one of them are not of the same episodes
FATES = ("nothing lifted", "another object lifted", "the right one lifted")  # of failed episodes
_NUMBERS = ("successes", "episodes", "success_rate", "wilson_low", "wilson_high")


class Change(NamedTuple):
    """A line of the card: what is changed, in words, and where its episodes are played."""

    name: str
    title: str
    suite: str
    perturbation: str = "none"


def changes_of(suite: str) -> dict[str, Change]:
    """Every change of a suite by name, the plain episodes first."""
    changes = [Change(PLAIN, "nothing changed", suite)]
    changes += [Change(name, perturbation.title, suite, name)
                for name, perturbation in PERTURBATIONS.items()]
    changes.append(Change(WIDE, "the goal's objects anywhere within reach", suite))
    changes += [Change(variation, f"LIBERO-PRO: {schema.VARIATIONS[variation]}", varied)
                for varied, (base, variation) in schema.PRO_SUITES.items() if base == suite]
    return {change.name: change for change in changes}


def robustness_card(run: str | Path, config: EvalConfig | None = None, weights: str = "best",
                    task_ids: Iterable[int] = (), only: Iterable[str] = ()) -> dict:
    """Play a run's policy under every change, and write ``robustness.json`` and its figure.

    Each change has a ledger of its own below ``robustness/``, so that a call that was interrupted
    goes on where it was, and what was evaluated before stays as it is.

    Args:
        run: folder, or name of a folder in ``artifacts/``.
        config: episodes per task and all else that :func:`evaluate.evaluate_run` takes, without a
            perturbation; ``None`` takes the run's, without films.
        weights: ``best`` or ``last``.
        task_ids: others than those of the run.
        only: names of the changes to be played beside the plain episodes; none takes all. The rows
            of other changes stay in the card as long as it is about the same episodes.

    Returns:
        what ``robustness.json`` holds: ``rows``, one for each change, with its successes,
        episodes, rate, Wilson interval and number of ``errors``, the ``gap`` to the plain rate and,
        where the init states are the same, the ``p_value`` of :func:`stats.paired_mcnemar`, and
        ``failures``, how many there are of each of :data:`FATES`;
        ``not_used`` and ``failed``, changes that cannot matter for this policy, or could not be
        played, each with its ``reason``; and the conditions.

    Raises:
        ValueError: a name in ``only`` that is none, a ``config`` with a perturbation, or a change
            whose folder holds episodes of other weights or another protocol; nothing was played.
        RuntimeError: no plain episode could be played.
    """
    run = find_run(run, to_write=True)
    trained = load_config(run)
    config = config or dataclasses.replace(trained.eval, num_videos=0, perturbation="none")
    if config.perturbation != "none":
        raise ValueError(f"perturbation={config.perturbation!r} is not valid; expected 'none': the "
                         "card has its own")
    changes = changes_of(trained.data.suite)
    only = tuple(only) or tuple(changes)
    for name in only:
        if name not in changes:
            raise ValueError(f"only={name!r} is not valid; expected one of {', '.join(changes)}")
    task_ids = tuple(task_ids) or trained.data.task_ids

    nothing, path = changes.pop(PLAIN), run / "robustness.json"
    before = read_json(path) if path.exists() else {}
    first = _plan(run, config, weights, task_ids, nothing)
    planned = {change.name: _plan(run, config, weights, task_ids, change)
               for change in changes.values()
               if change.name in only and not _why_unused(change, trained.model)}
    results, plain = first.play(), first.rows()
    card = {"run": run.name, **{key: results["protocol"][key] for key in _CONDITIONS},
            "rows": [], "not_used": [], "failed": [], "software": results["software"]}
    rows = _rows_before(before, card)
    rows[PLAIN] = _row(nothing, results, plain)
    for change in changes.values():
        told = {"name": change.name, "title": change.title}
        if reason := _why_unused(change, trained.model):
            card["not_used"].append({**told, "reason": reason})
        elif change.name in planned:
            evaluation = planned[change.name]
            try:
                rows[change.name] = _compared(change, plain, rows[PLAIN], evaluation.play(),
                                              evaluation.rows())
            except RuntimeError as error:
                rows.pop(change.name, None)
                card["failed"].append({**told, "reason": str(error)})
    card["rows"] = [rows[name] for name in (PLAIN, *changes) if name in rows]
    write_json(path, card)
    with dispensable("the figure of the card"):
        save_figure(plot_card(card), run / "figures" / "robustness.png")
    return card


def _plan(run: Path, config: EvalConfig, weights: str, task_ids: tuple[int, ...],
          change: Change) -> Evaluation:
    """A change's episodes."""
    config = dataclasses.replace(config, perturbation=change.perturbation)
    return plan_run(run, config, weights, change.suite, task_ids, apart=True,
                    wide=change.name == WIDE)


def _row(change: Change, results: Mapping, episodes: list[dict]) -> dict:
    return {"name": change.name, "title": change.title, "suite": change.suite,
            **{key: results[key] for key in _NUMBERS}, "errors": len(results["errors"]),
            "gap": None, "p_value": None, "failures": failures(episodes)}


def failures(episodes: Iterable[Mapping]) -> dict[str, int]:
    """How many failed episodes (rows of :func:`rollout.run_episode`) met each of :data:`FATES`."""
    fates = [_fate(row) for row in episodes if not row["success"] and "lifted" in row]
    return {fate: fates.count(fate) for fate in FATES}


def _fate(row: Mapping) -> str:
    """Which of :data:`FATES` a failed episode met. Its first object is the one to be moved."""
    if not row["lifted"]:
        return FATES[0]
    return FATES[2] if row["goal_objects"][:1] == row["lifted"][:1] else FATES[1]


def _compared(change: Change, plain: list[dict], plain_row: Mapping, results: Mapping,
              episodes: list[dict]) -> dict:
    row = _row(change, results, episodes)
    if change.suite != plain_row["suite"] or change.name == WIDE:  # other init states
        return {**row, "gap": row["success_rate"] - plain_row["success_rate"]}
    test = paired_mcnemar(plain, episodes)
    return {**row, "gap": test["difference"], "p_value": test["p_value"]}


def _rows_before(before: Mapping, card: Mapping) -> dict[str, dict]:
    """The rows by name of the card that was there, if it is about the same episodes."""
    same = all(before.get(key) == card[key] for key in _CONDITIONS)
    return {row["name"]: row for row in before["rows"]} if same else {}


def _why_unused(change: Change, model: ModelConfig) -> str:
    if change.perturbation != "none":
        return why_unused(change.perturbation, model)
    if change.name in ("lan", "task") and model.conditioning != "language":
        return {"lan": "it is not told an instruction, and nothing else is changed",
                "task": "it is not told an instruction, and could not know the goal"}[change.name]
    return ""


# --- shown ---------------------------------------------------------------------------------------
def card_rows(card: Mapping) -> list[dict]:
    """A table's rows on a card, in percent and points."""
    return [{
        "change": row["title"],
        "successes": f"{row['successes']} of {row['episodes']}",
        "success rate (%)": round(100 * row["success_rate"], 1),
        "95 % Wilson interval (%)": f"{100 * row['wilson_low']:.0f} to "
                                    f"{100 * row['wilson_high']:.0f}",
        "gap (points)": "" if row["gap"] is None else f"{100 * row['gap']:+.0f}",
        "paired p": "" if row["p_value"] is None else f"{row['p_value']:.2g}",
        **{f"failed, {fate}": count for fate, count in row.get("failures", {}).items()},
        "errors": row["errors"],
    } for row in card["rows"]]


def rate_in_short(row: Mapping) -> str:
    """A row's success for a cell of a table: ``6 of 20 (15 to 52 %)``."""
    return (f"{row['successes']} of {row['episodes']} ({100 * row['wilson_low']:.0f} to "
            f"{100 * row['wilson_high']:.0f} %)")


def failures_in_short(row: Mapping) -> str:
    """How a row's failures failed: ``8 nothing lifted, 8 another object lifted``."""
    return ", ".join(f"{count} {fate}" for fate, count in row.get("failures", {}).items() if count)


def tasks_in_short(card: Mapping) -> str:
    """What a card's rows were played on: ``libero_object, task 0, 1: 20 episodes of each``."""
    return (f"{card['suite']}, task {', '.join(map(str, card['task_ids']))}: "
            f"{card['num_episodes']} episodes{' of each' * (len(card['task_ids']) > 1)}")


def card_notes(card: Mapping) -> list[str]:
    """What the episodes can tell apart; what was not played and why, a line each."""
    return [detectable(card["rows"][0])] + [f"{told}: {row['title']}: {row['reason']}"
            for told, rows in (("not used by this policy", card["not_used"]),
                               ("could not be played", card["failed"])) for row in rows]


@styled
def plot_card(card: Mapping) -> Figure:
    """Success rate under each change with its 95 % Wilson interval; the plain one as a line."""
    rows = card["rows"]
    rate = np.array([row["success_rate"] for row in rows])
    error = [rate - [row["wilson_low"] for row in rows],
             [row["wilson_high"] for row in rows] - rate]
    kinds = {"nothing changed": GREY, "the same init states, disturbed": BLUE,
             "other init states": ORANGE}
    kind = [list(kinds)[(row["name"] != PLAIN) + (row["suite"] != card["suite"]
                                                  or row["name"] == WIDE)] for row in rows]
    fig = new_figure(8.5, 0.32 * len(rows) + 1.9)
    axes = fig.subplots()
    for label, colour in kinds.items():
        places = [i for i, each in enumerate(kind) if each == label]
        if places:
            axes.barh(places, 100 * rate[places], 0.72, color=colour, alpha=0.85, label=label)
    axes.errorbar(100 * rate, range(len(rows)), xerr=100 * np.clip(error, 0, None), fmt="none",
                  ecolor="black", elinewidth=1, capsize=3)
    axes.axvline(100 * rate[0], color="black", linestyle="--", linewidth=1,
                 label="rate with nothing changed")
    for place, row in enumerate(rows):
        axes.text(103, place, f"{row['successes']}/{row['episodes']}", va="center", fontsize=8)
    axes.set(yticks=range(len(rows)), yticklabels=[row["title"] for row in rows],
             ylim=(len(rows) - 0.4, -0.6), xlim=(0, 112), xticks=range(0, 101, 20),
             xlabel="success rate (%), whiskers: 95 % Wilson interval; right: successes/episodes")
    fig.suptitle(f"Success of {card['run']} when something changes\n{tasks_in_short(card)}")
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


@styled
def plot_cards(cards: Mapping[str, Mapping]) -> Figure:
    """Success rate under each change of several policies by name, beside one another."""
    titles = {row["name"]: row["title"] for card in cards.values() for row in card["rows"]}
    width = 0.8 / len(cards)
    fig = new_figure(8.5, (0.18 * len(cards) + 0.14) * len(titles) + 1.9)
    axes = fig.subplots()
    for number, (label, card) in enumerate(cards.items()):
        rows = [row for row in card["rows"] if row["episodes"]]
        place = np.array([list(titles).index(row["name"]) for row in rows])
        place = place + (number - (len(cards) - 1) / 2) * width
        rate = np.array([row["success_rate"] for row in rows])
        error = [rate - [row["wilson_low"] for row in rows],
                 [row["wilson_high"] for row in rows] - rate]
        axes.barh(place, 100 * rate, 0.9 * width, color=PALETTE[number % len(PALETTE)], alpha=0.85,
                  xerr=100 * np.clip(error, 0, None), capsize=2, error_kw={"linewidth": 1},
                  label=label)
        for row, at in zip(rows, place, strict=True):
            axes.text(103, at, f"{row['successes']}/{row['episodes']}", va="center", fontsize=7)
    axes.set(yticks=range(len(titles)), yticklabels=titles.values(),
             ylim=(len(titles) - 0.4, -0.6), xlim=(0, 112), xticks=range(0, 101, 20),
             xlabel="success rate (%), whiskers: 95 % Wilson interval; right: successes/episodes")
    about = {tasks_in_short(card) for card in cards.values()}
    fig.suptitle("\n".join(["Success when something changes", *about][:1 + (len(about) == 1)]))
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig
