"""Success when something changes: one card per run.

The plain episodes, each of :data:`perturbations.PERTURBATIONS` on the same init states, scenes with
randomised layouts, and the four LIBERO-PRO suites that vary the policy's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from .. import schema
from ..config import EvalConfig
from ..files import dispensable, write_json
from ..stats import detectable
from ..training.runs import find_run, load_config
from ..visuals.colours import BLUE, GREY, ORANGE
from ..visuals.figure import HATCHES, describe, new_figure, save_figure, styled, success_bars
from .cards import cells, compared, earlier_rows, measured, read_card, tasks_in_short
from .evaluate import plan_run
from .perturbations import PERTURBATIONS, why_unused
from .play import one_environment

PLAIN = "plain"
WIDE = "wide"
FAILURE_MODES = ("nothing lifted", "another object lifted", "the right one lifted")
_CONDITIONS = ("suite", "task_ids", "weights", "sha256", "protocol", "horizon", "num_episodes",
               "first_init_state")  # cards that differ in one of these have different episodes


class Change(NamedTuple):
    """A row of the card: its name, its title, and where its episodes are played.

    ``needs`` is what a policy must have for it to matter, see :class:`perturbations.Perturbation`.
    """

    name: str
    title: str
    suite: str
    perturbation: str = "none"
    needs: str = ""


def changes_of(suite: str) -> dict[str, Change]:
    """Every change of a suite by name, the plain episodes first."""
    changes = [Change(PLAIN, "nothing changed", suite)]
    changes += [Change(name, perturbation.title, suite, name, perturbation.needs)
                for name, perturbation in PERTURBATIONS.items()]
    changes.append(Change(WIDE, "the goal's objects anywhere within reach", suite))
    changes += [Change(variation, f"LIBERO-PRO: {schema.VARIATIONS[variation]}", varied,
                       needs="language" if variation in ("lan", "task") else "")
                for varied, (base, variation) in schema.PRO_SUITES.items() if base == suite]
    return {change.name: change for change in changes}


@one_environment()
def robustness_card(run: str | Path, config: EvalConfig | None = None, weights: str = "best",
                    task_ids: Iterable[int] = (), only: Iterable[str] = ()) -> dict:
    """Play a run's policy under every change, and write ``robustness.json`` and its figure.

    Each change has a ledger of its own below ``robustness/``, so that an interrupted call resumes,
    and the run's own evaluation stays as it is.

    Args:
        config: as for :func:`evaluate.plan_run`, without a perturbation; default the run's,
            without films.
        task_ids: default the run's.
        only: names of the changes to be played beside the plain episodes; default all. Rows of
            other changes stay in the card while it is about the same episodes.

    Returns:
        what ``robustness.json`` holds: the conditions; ``rows``, each with the numbers of
        :func:`cards.measured`, the ``gap`` to the plain rate, on the same init states the
        ``p_value`` of :func:`stats.paired_mcnemar`, and ``failures``, counted by
        :data:`FAILURE_MODES`; ``not_used`` and ``failed``, changes that cannot matter for this
        policy or could not be played, each with its ``reason``.

    Raises:
        ValueError: an unknown name in ``only``, a ``config`` with a perturbation, or a change
            whose folder holds episodes of other weights or another protocol; nothing was played.
        RuntimeError: no plain episode could be played.
        TimeoutError: the session's time is up before the last plain episode; changes without all
            their episodes are listed under ``failed``.
    """
    run = find_run(run, to_write=True, weights=weights)
    trained = load_config(run)
    config = config or dataclasses.replace(trained.eval, num_videos=0, perturbation="none")
    if config.perturbation != "none":
        raise ValueError(f"perturbation={config.perturbation!r} is not valid; expected 'none': the "
                         "card has its own")
    changes = changes_of(trained.data.suite)
    only = [schema.check_option("only", name, changes) for name in only] or list(changes)
    task_ids = tuple(task_ids) or trained.data.task_ids
    path = run / "robustness.json"
    before = read_card(path)
    unused = {name: reason for name, change in changes.items()
              if (reason := why_unused(change.needs, trained.model))}
    planned = {name: plan_run(run, dataclasses.replace(config, perturbation=change.perturbation),
                              weights, change.suite, task_ids, apart=True, wide=name == WIDE)
               for name, change in changes.items() if name in (PLAIN, *only) and name not in unused}
    plain = planned.pop(PLAIN)
    results = plain.play()
    conditions = {key: results["protocol"][key] for key in _CONDITIONS}
    rows = earlier_rows(before, conditions, _row(changes[PLAIN], results, plain.rows()))
    failed = {}
    for name, evaluation in planned.items():
        try:
            rows[name] = _row(changes[name], evaluation.play(), evaluation.rows())
        except (RuntimeError, TimeoutError) as error:
            rows.pop(name, None)
            failed[name] = str(error)
            continue
        if changes[name].suite != changes[PLAIN].suite or name == WIDE:  # other init states
            rows[name]["gap"] = rows[name]["success_rate"] - rows[PLAIN]["success_rate"]
        else:
            rows[name] |= compared(plain.rows(), evaluation.rows())
    card = {"run": run.name, **conditions, "rows": [rows[name] for name in changes if name in rows],
            **{key: [{"name": name, "title": changes[name].title, "reason": reason}
                     for name, reason in reasons.items()]
               for key, reasons in (("not_used", unused), ("failed", failed))},
            "software": results["software"]}
    write_json(path, card)
    with dispensable("the figure of the card"):
        save_figure(plot_card(card), run / "figures" / "robustness.png")
    return card


def _row(change: Change, results: Mapping, episodes: list[dict]) -> dict:
    return {"name": change.name, "title": change.title, "suite": change.suite,
            **measured(results), "failures": failure_modes(episodes)}


def failure_modes(episodes: Iterable[Mapping]) -> dict[str, int]:
    """Failed episodes (rows of :func:`rollout.run_episode`), counted by :data:`FAILURE_MODES`."""
    counts = dict.fromkeys(FAILURE_MODES, 0)
    for row in episodes:
        if not row["success"] and "lifted" in row:
            # rows of older versions have all objects of the goal, the one to be moved first
            to_move = row.get("objects_to_move") or row.get("goal_objects", [])[:1]
            mode = 1 + (row["lifted"][0] in to_move) if row["lifted"] else 0
            counts[FAILURE_MODES[mode]] += 1
    return counts


# --- shown ---------------------------------------------------------------------------------------
def card_rows(card: Mapping) -> list[dict]:
    """A card as the rows of a table, in percent and points."""
    # rows of older versions, which a card may still hold, have no failure modes
    modes = FAILURE_MODES if any("failures" in row for row in card["rows"]) else ()
    return [{"change": row["title"], **cells(row, rate=True),
             **{f"failed, {mode}": row.get("failures", {}).get(mode, "") for mode in modes},
             "errors": row["errors"]} for row in card["rows"]]


def card_notes(card: Mapping) -> list[str]:
    """The difference that the episodes can show; what was not played and why, a line each."""
    apart = [] if card.get("suite") != schema.JOINT_SUITE else [
        "not part of this card: LIBERO-PRO's variations, which belong to one suite each; evaluate "
        "them by name, for example with --suite libero_goal_swap"]
    return [detectable(card["rows"][0]), *apart,
            *(f"cannot matter for this policy: {row['title']}, because {row['reason']}"
              for row in card["not_used"]),
            *(f"could not be played: {row['title']}: {row['reason']}" for row in card["failed"])]


@styled
def plot_card(card: Mapping) -> Figure:
    """Success rate under each change with its 95 % Wilson interval; the plain rate as a line."""
    rows = card["rows"]
    kinds = {"nothing changed": GREY, "same init states, perturbed": BLUE,
             "other init states": ORANGE}
    kind = [list(kinds)[(row["name"] != PLAIN) + (row["suite"] != card["suite"]
                                                  or row["name"] == WIDE)] for row in rows]
    fig = new_figure(8.5, 0.32 * len(rows) + 1.9)
    axes = fig.subplots()
    for (label, colour), hatch in zip(kinds.items(), HATCHES, strict=False):
        places = [place for place, each in enumerate(kind) if each == label]
        if places:
            success_bars(axes, places, [rows[place] for place in places], 0.72, color=colour,
                         label=label, hatch=hatch)
    axes.axvline(100 * rows[0]["success_rate"], color="black", linestyle="--", linewidth=1,
                 label="rate with nothing changed")
    success_axes(axes, [row["title"] for row in rows])
    fig.suptitle(f"Success of {card['run']} when something changes\n{tasks_in_short(card)}")
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return describe(fig, "; ".join(f"{row['title']}: {row['successes']} of {row['episodes']}"
                                   for row in rows) + ".")


def success_axes(axes, titles: Sequence[str]) -> None:
    """A line for each title, from the top down, and room for the counts on the right."""
    axes.set(yticks=range(len(titles)), yticklabels=titles, ylim=(len(titles) - 0.4, -0.6),
             xlim=(0, 112), xticks=range(0, 101, 20),
             xlabel="success rate (%), whiskers: 95 % Wilson interval; right: successes/episodes")
