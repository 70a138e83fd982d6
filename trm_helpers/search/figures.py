"""Figures of a search: the ranking, each setting's importance, and every trial's settings.

All take the rows of `search.run_search`, best first, and the names of the settings searched over
(`space.axes`); they show the complete trials.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution

from ..files import read_json
from ..visuals.colours import BLUE, GREY, RED
from ..visuals.figure import (
    MAX_WIDTH,
    count_axis,
    describe,
    log_axis,
    new_figure,
    styled,
    success_bars,
)
from .space import value_of

_SHORT = {"hidden_dim": "D", "num_recursions": "N"}
_BEST = 1 / 3  # importance is for being in this part of the ranking
_LEAST = 15  # trials: PED-ANOVA's authors advise five in the best third
_SPREAD = 0.06  # share of an axis' height over which lines through one value are spread


def stored_example() -> dict:
    """A search of all sixteen points: ``command``, ``revision``, ``machine`` and ``trials``."""
    return read_json(Path(__file__).with_name("example.json"), keys=("command", "trials"))


@styled
def plot_search_ranking(trials: Sequence[Mapping], names: Sequence[str]) -> Figure:
    """Success rates with intervals, or final validation losses, beside the loss curves."""
    trials = _complete(trials)
    fig = new_figure(MAX_WIDTH, max(3.2, 0.28 * len(trials) + 1.4))
    ranking, curves = fig.subplots(1, 2)
    colours = [RED, *matplotlib.colormaps["viridis"](np.linspace(0.15, 0.9, len(trials)))[1:]]
    losses = [trial["final_val_loss"] for trial in trials]
    labels = [_label(trial, names) for trial in trials]
    if all("success_rate" in trial for trial in trials):
        success_bars(ranking, range(len(trials)), trials, 0.8, color=colours, alpha=1, labels=[
            f"{trial['successes']} of {trial['episodes']}, loss {trial['final_val_loss']:.3g}"
            for trial in trials])
        ranking.set(xlim=(0, 150), xticks=range(0, 101, 20), yticks=range(len(trials)),
                    yticklabels=labels, xlabel="success rate (%) with 95 % Wilson interval")
    else:
        bars = ranking.barh(labels, losses, color=colours)
        ranking.bar_label(bars, [f"{loss:.4f}" for loss in losses], padding=3)
        ranking.set(xlim=(0, 1.2 * max(losses)), xlabel="final validation loss")
        ranking.locator_params(axis="x", nbins=5)
    seeds = max(len(trial.get("seeds", [0])) for trial in trials)
    ranking.set_title(f"Ranking (best in bold{'; means over seeds' if seeds > 1 else ''})")
    ranking.invert_yaxis()
    ranking.get_yticklabels()[0].set_fontweight("bold")
    for trial, colour in reversed(list(zip(trials, colours, strict=True))):
        epochs = range(1, len(trial["val_losses"]) + 1)
        curves.plot(epochs, trial["val_losses"], color=colour, marker=".",
                    linewidth=2.5 if trial is trials[0] else 1.2)
    curves.set(xlabel="epoch", ylabel="validation loss (log scale)",
               title=f"Training (colours as left{'; first seed' if seeds > 1 else ''})")
    log_axis(curves.yaxis)
    count_axis(curves.xaxis)
    legend = "".join(f", {short} {name}" for name, short in _SHORT.items() if name in names)
    fig.suptitle(f"Search over {len(trials)} configurations: lr learning rate{legend}")
    solved = [f"{trial['successes']} of {trial['episodes']} successes and "
              if "successes" in trial else "" for trial in trials]
    ends = [f"{place} {labels[i]} with {solved[i]}validation loss {losses[i]:.4g}"
            for place, i in (("Best", 0), ("last", -1))]
    return describe(fig, f"{'; '.join(ends)}.")


def importance(trials: Sequence[Mapping], names: Sequence[str]) -> dict[str, float] | str:
    """Importance of each setting for being in the best third, by Optuna's PED-ANOVA.

    A sentence instead if there are too few trials, or fewer than two settings vary.
    """
    trials = _complete(trials)
    varied = [name for name in names if len({trial[name] for trial in trials}) > 1]
    if len(trials) < _LEAST or len(varied) < 2:
        return (f"The importance of the settings cannot be estimated: it needs {_LEAST} complete "
                f"trials (now {len(trials)}) and 2 settings that vary (now {len(varied)}).")
    distributions = {
        name: FloatDistribution(min(values), max(values), log=True) if name == "lr"
        else CategoricalDistribution(sorted(set(values)))
        for name, values in ((name, [trial[name] for trial in trials]) for name in varied)}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    study.add_trials([optuna.create_trial(params={name: trial[name] for name in varied},
                                          distributions=distributions, value=value_of(trial))
                      for trial in trials])
    ped_anova = optuna.importance.PedAnovaImportanceEvaluator
    known = inspect.signature(ped_anova).parameters
    quantile = "target_quantile" if "target_quantile" in known else "baseline_quantile"  # 4.5
    with warnings.catch_warnings():  # experimental in Optuna 4
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = ped_anova(**{quantile: _BEST})
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


@styled
def plot_search_importance(shares: Mapping[str, float], trials: Sequence[Mapping]) -> Figure:
    """The shares of :func:`importance`, the most important setting first."""
    shares = dict(sorted(shares.items(), key=lambda entry: -entry[1]))
    fig = new_figure(6, 0.35 * len(shares) + 1.4)
    axes = fig.subplots()
    bars = axes.barh(list(shares), [100 * share for share in shares.values()], color=BLUE)
    axes.bar_label(bars, fmt="%.0f %%", padding=3)
    axes.invert_yaxis()
    axes.set(xlim=(0, 110), xlabel="share of the importance (%)")
    fig.suptitle("Importance for being in the best third of "
                 f"{len(_complete(trials))} trials (PED-ANOVA)")
    return describe(fig, ", ".join(f"{name} {100 * share:.0f} %"
                                   for name, share in shares.items()) + ".")


@styled
def plot_search_coordinates(trials: Sequence[Mapping], names: Sequence[str]) -> Figure:
    """A line per trial through its settings to its result, the best thick and in front."""
    trials = _complete(trials)
    result = "success_rate" if all("success_rate" in t for t in trials) else "final_val_loss"
    title = {"success_rate": "success rate (%)", "final_val_loss": "final validation loss"}[result]
    fig = new_figure(1.9 * len(names) + 3.0, 4.0)
    axes = fig.subplots()
    # spread by rank, to separate lines through the same value
    spread = _SPREAD * np.linspace(0.5, -0.5, len(trials)) if len(trials) > 1 else np.zeros(1)
    heights = []
    for place, name in enumerate([*names, result]):
        values = [trial[name] for trial in trials]
        height = _heights(values, "log" if name == "lr" else "" if name == result else "rank")
        ticks = dict(zip(values, height, strict=True))
        if len(ticks) > 5 and name in ("lr", result):
            ticks = {value: ticks[value] for value in (min(values), max(values))}
        shared = np.array([values.count(value) > 1 for value in values])
        heights.append(height + (0 if name == result else spread * shared))
        axes.axvline(place, color=GREY, linewidth=1, zorder=0)
        for value, at in ticks.items():
            text = f"{100 * value:.0f}" if name == "success_rate" else (
                f"{value:.3g}" if isinstance(value, float) else str(value))
            axes.text(place + 0.04, at, text, va="center", zorder=4,
                      bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.15, 0.9, len(trials)))
    for rank, line in reversed(list(enumerate(np.transpose(heights)))):
        axes.plot(line, color=shades[rank] if rank else RED, zorder=1 if rank else 3,
                  linewidth=1.2 if rank else 2.5)
    axes.set(xticks=range(len(heights)), xticklabels=[*names, title], yticks=[],
             xlim=(-0.1, len(heights) - 0.6))
    axes.set_xlabel("lines through the same value are drawn apart"
                    + "; a lower loss is better" * (result != "success_rate"))
    axes.spines[["left", "bottom"]].set_visible(False)
    fig.suptitle(f"{len(trials)} trials across their settings (best: thick; others dark to light; "
                 "lr on a log scale)")
    return describe(fig, f"The best: {_label(trials[0], names)}, {title} "
                         f"{trials[0][result] * (100 if result == 'success_rate' else 1):.4g}.")


def _complete(trials: Sequence[Mapping]) -> list[Mapping]:
    found = [trial for trial in trials if trial["state"] == "complete"]
    if not found:
        raise ValueError(f"none of {len(trials)} trials is complete; expected one")
    return found


def _label(trial: Mapping, names: Sequence[str]) -> str:
    values = (f"{trial[name]:g}" if isinstance(trial[name], float) else trial[name]
              for name in names)
    return ", ".join(f"{_SHORT.get(name, name)} {value}"
                     for name, value in zip(names, values, strict=True))


def _heights(values: list, scale: str) -> np.ndarray:
    """Heights in [0, 1] on a linear or ``log`` scale, or by the values' ``rank``."""
    kinds = sorted(set(values))
    scaled = np.log(values) if scale == "log" else np.asarray(
        [kinds.index(value) for value in values] if scale == "rank" else values)
    extent = np.ptp(scaled)
    return (scaled - scaled.min()) / extent if extent else np.full(len(values), 0.5)
