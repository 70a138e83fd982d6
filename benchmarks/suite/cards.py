"""Cells and figures that compare the cards of several policies."""

import re
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from trm_helpers.evaluation.cards import tasks_in_short
from trm_helpers.evaluation.depth import (
    AS_TRAINED,
    MARKERS,
    adaptive,
    depth_panels,
    draw_depth_row,
)
from trm_helpers.evaluation.robustness import success_axes
from trm_helpers.stats import rate_text
from trm_helpers.visuals.colours import GREY, PALETTE
from trm_helpers.visuals.figure import HATCHES, describe, new_figure, styled, success_bars

_OTHER_DEPTH = "another depth"


def rate_in_short(row: Mapping) -> str:
    """A row's success for a cell of a table: ``6 of 20 (15 to 52 %)``."""
    return rate_text(row["successes"], row["episodes"])


def failures_in_short(row: Mapping) -> str:
    """A row's failure modes: ``8 nothing lifted, 8 another object lifted``."""
    return ", ".join(f"{count} {mode}" for mode, count in row.get("failures", {}).items() if count)


@styled
def plot_cards(cards: Mapping[str, Mapping]) -> Figure:
    """Success rate under each change of several policies by name, beside one another."""
    titles = {row["name"]: row["title"] for card in cards.values() for row in card["rows"]}
    width = 0.8 / len(cards)
    fig = new_figure(8.5, (0.2 * len(cards) + 0.14) * len(titles) + 1.9)
    axes = fig.subplots()
    for number, (label, card) in enumerate(cards.items()):
        rows = [row for row in card["rows"] if row["episodes"]]
        places = np.array([list(titles).index(row["name"]) for row in rows])
        success_bars(axes, places + (number - (len(cards) - 1) / 2) * width, rows, 0.9 * width,
                     color=PALETTE[number % len(PALETTE)], label=label,
                     hatch=HATCHES[number % len(HATCHES)])
    success_axes(axes, list(titles.values()))
    about = {tasks_in_short(card) for card in cards.values()}
    fig.suptitle("\n".join(["Success when something changes", *about][:1 + (len(about) == 1)]))
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return describe(fig, _in_words(cards, "title"))


@styled
def plot_depth_cards(cards: Mapping[str, Mapping]) -> Figure:
    """Success, time and error by recursions per decision, of several policies by name.

    Each policy has a colour, each kind of row a marker, and a line joins a policy's fixed depths.
    """
    first = next(iter(cards.values()))
    kinds = list(dict.fromkeys(_kind(row) for card in cards.values() for row in card["rows"]))
    fig, panels = depth_panels(list(cards.values()))
    for policy, (name, card) in enumerate(cards.items()):
        offset = 0.08 * (policy - (len(cards) - 1) / 2)
        colour = PALETTE[policy % len(PALETTE)]
        for row in card["rows"]:
            draw_depth_row(panels, row, offset, color=colour,
                           marker=MARKERS[kinds.index(_kind(row)) % len(MARKERS)])
        fixed = sorted((row["mean_recursions"] + offset, 100 * row["success_rate"])
                       for row in card["rows"]
                       if not adaptive(row) and _kind(row) in (AS_TRAINED, _OTHER_DEPTH))
        panels["success"].plot(*zip(*fixed, strict=True), color=colour, linewidth=1, alpha=0.6)
        panels["success"].plot([], [], color=colour, linewidth=5, label=name)
    for number, kind in enumerate(kinds):
        panels["success"].plot([], [], linestyle="", color=GREY, label=kind,
                               marker=MARKERS[number % len(MARKERS)])
    fig.suptitle(f"{len(cards)} policies in control: {tasks_in_short(first)}\n"
                 "(marks that would coincide are drawn side by side)")
    fig.legend(*panels["success"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return describe(fig, _in_words(cards, "name"))


def _in_words(cards: Mapping[str, Mapping], key: str) -> str:
    return " ".join(f"{label}: " + "; ".join(
        f"{row[key]} {row['successes']} of {row['episodes']}" for row in card["rows"]) + "."
        for label, card in cards.items())


def _kind(row: Mapping) -> str:
    return re.sub(r"^\w+ \d+$", _OTHER_DEPTH, row["name"])
