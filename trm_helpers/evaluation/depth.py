"""Does thinking longer help in control? Success by the number of recursions: one card per run.

The same weights play the same episodes as trained, at other depths, with each rule that may end the
recursion early, and with the state carried over from one decision to the next.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from ..config import Config, EvalConfig, ModelConfig
from ..files import dispensable, read_json, write_json
from ..sim.env import LiberoEnv
from ..stats import paired_mcnemar
from ..training.runs import find_run, held_out, load_config
from ..visuals.colours import GREY, PALETTE
from ..visuals.plots import count_axis, new_figure, save_figure, styled
from .evaluate import Evaluation, TrainedPolicy, official_episodes
from .rollout import PHASES, Policy

THRESHOLDS = (1e-4, 1e-3)  # of the convergence rule: 1e-3 is the published one
_NUMBERS = ("successes", "episodes", "success_rate", "wilson_low", "wilson_high", "mean_length")
_RECURSIVE = ("block", "trm")
_OTHER_DEPTH = "another depth"
_SAMPLES = 2048  # of the held-out demonstrations
_MARKERS = "osD^vPX*"


class ChangedPolicy(NamedTuple):
    """A run's policy with other settings of its recursion."""

    source: TrainedPolicy
    changes: tuple[tuple[str, float | str], ...]

    def make(self, env: LiberoEnv | None = None) -> Policy:
        policy = copy.copy(self.source.make(env))  # the weights are shared
        policy.config = dataclasses.replace(policy.config, **dict(self.changes))
        policy.reset()
        return policy


def ways_to_think(trained: ModelConfig, depths: Sequence[int],
                  thresholds: Sequence[float] = THRESHOLDS) -> dict[str, dict]:
    """Settings that are changed, by name; the first is the policy as it was trained."""
    deepest = max([*depths, trained.num_recursions])
    ways: dict[str, dict] = {"as trained": {}}
    rule = {} if trained.halting in ("remainder", "act") else {"halting": "fixed"}
    name = rule.get("halting", trained.halting)  # those two sum over the steps: kept
    for depth in sorted({*depths, trained.num_recursions}):
        if depth != trained.num_recursions or trained.halting != name:
            ways[f"{name} {depth}"] = {**rule, "num_recursions": depth}
    if rule:
        for threshold in thresholds:
            ways[f"convergence below {threshold:g}, at most {deepest}"] = {
                "halting": "convergence", "num_recursions": deepest,
                "convergence_threshold": threshold}
    return ways | {"as trained, state carried over": {"carry_over": not trained.carry_over}}


def action_errors(source: TrainedPolicy, trained: Config,
                  ways: Mapping[str, Mapping]) -> dict[str, list[float]]:
    """How far the arm's command is from the demonstrator's, in demonstrations not trained on.

    Returns, for each of the ways that tell (one decision alone carries nothing over), the mean
    absolute error of the first action's six numbers in the environment's units, and its 95 %
    interval over the samples: [mean, low, high]. Nothing where a file that the run was trained on
    is no longer where it was.
    """
    from ..visuals.explain import depth_curve

    described = read_json(source.run / "policy.json")["trained_on"]["files"]
    files = {task_id: Path(file["file"])
             for task_id, file in zip(trained.data.task_ids, described, strict=True)}
    if not all(path.is_absolute() and path.exists() for path in files.values()):
        return {}
    data = held_out(source.run, files, trained, source.make())
    found = {}
    for name, changes in ways.items():
        if "carry_over" not in changes:
            policy = ChangedPolicy(source, tuple(changes.items())).make()
            curve = depth_curve(policy, data, [policy.config.num_recursions], _SAMPLES)
            found[name] = [*curve["arm_error"], *curve["arm_interval"][0]]
    return found


def depth_card(run: str | Path, depths: Iterable[int] = (),
               thresholds: Iterable[float] = THRESHOLDS, config: EvalConfig | None = None,
               weights: str = "best", task_ids: Iterable[int] = (),
               only: Iterable[str] = ()) -> dict:
    """Play a run's policy in all :func:`ways_to_think`, and write ``depth.json`` and its figure.

    Each way has a ledger of its own below ``depth/``, so that a call that was interrupted goes on
    where it was.

    Args:
        run: folder, or name of a folder in ``artifacts/``.
        depths: none takes 1, half, once and twice the trained one.
        thresholds: squared changes of the actions below which the convergence rule stops.
        config: episodes per task and all else that :func:`evaluate.evaluate_run` takes; ``None``
            takes the run's, without films.
        only: names of the ways to be played beside the policy as trained; none takes all.

    Returns:
        what ``depth.json`` holds: ``rows``, one for each way, with its successes, episodes, rate,
        Wilson interval, mean length, mean recursions, of the whole episode and ``by_phase``,
        milliseconds per executed action, ``action_error`` of :func:`action_errors`, and against
        the policy as trained the ``gap`` and ``p_value`` of :func:`stats.paired_mcnemar`; and the
        conditions.

    Raises:
        ValueError: the policy does not recurse, a depth below 1, or a name in ``only`` that is
            none.
    """
    run = find_run(run, to_write=True)
    trained = load_config(run)
    if trained.model.variant not in _RECURSIVE:
        raise ValueError(f"{run} has variant={trained.model.variant!r}, which is applied once; "
                         f"expected one of {', '.join(_RECURSIVE)}")
    once = trained.model.num_recursions
    depths = tuple(depths) or (1, max(once // 2, 1), once, 2 * once)
    if min(depths) < 1:
        raise ValueError(f"depths={depths} is not valid; expected each >= 1")
    ways = ways_to_think(trained.model, depths, tuple(thresholds))
    only = tuple(only) or tuple(ways)
    for name in only:
        if name not in ways:
            raise ValueError(f"only={name!r} is not valid; expected one of "
                             f"{'; '.join(ways)}")
    first = next(iter(ways))  # what the others are compared with
    ways = {name: changes for name, changes in ways.items() if name in (first, *only)}
    config = dataclasses.replace(config or trained.eval, num_videos=0, perturbation="none")
    task_ids = tuple(task_ids) or trained.data.task_ids
    source = TrainedPolicy.load(run, weights)
    planned = official_episodes(trained.data.suite, task_ids, config)
    evaluations = {
        name: Evaluation(ChangedPolicy(source, tuple(changes.items())), source.identity,
                         run / "depth" / name.replace(",", "").replace(" ", "-"), config,
                         trained.data.suite, planned).checked()
        for name, changes in ways.items()}
    errors: dict[str, list[float]] = {}
    with dispensable("the errors on demonstrations"):
        errors = action_errors(source, trained, ways)
    rows: list[dict] = []
    as_trained: list[dict] = []
    for name, evaluation in evaluations.items():
        results, episodes = evaluation.play(), evaluation.rows()
        as_trained = as_trained or episodes
        test = paired_mcnemar(as_trained, episodes)
        rows.append({
            "name": name, **ways[name], **{key: results[key] for key in _NUMBERS},
            "errors": len(results["errors"]),
            "mean_recursions": _mean(row["mean_recursions"] for row in episodes),
            "by_phase": {phase: _mean(row["recursions_by_phase"][phase] for row in episodes
                                      if phase in row["recursions_by_phase"])
                         for phase in PHASES
                         if any(phase in row["recursions_by_phase"] for row in episodes)},
            "action_error": errors.get(name),
            "action_ms": _mean(row["action_ms"] for row in episodes),
            "gap": test["difference"] if rows else None,
            "p_value": test["p_value"] if rows else None})
    card = {"run": run.name, "suite": trained.data.suite, "task_ids": list(task_ids),
            **source.identity,
            "trained_depth": once, "num_episodes": config.episodes,
            "first_init_state": config.first_init_state, "protocol": config.protocol,
            "rows": rows, "software": results["software"]}
    write_json(run / "depth.json", card)
    with dispensable("the figure of the card"):
        save_figure(plot_depth_cards({run.name: card}), run / "figures" / "depth_in_control.png")
    return card


def _mean(values: Iterable[float | None]) -> float:
    """Of what is there; 0 of nothing, as where the policy failed before its first action."""
    return float(np.mean([value for value in values if value is not None] or [0.0]))


# --- shown ---------------------------------------------------------------------------------------
def depth_rows(card: Mapping) -> list[dict]:
    """A table's rows on a card, in percent, points and milliseconds."""
    table = [{
        "recursion": row["name"],
        "successes": f"{row['successes']} of {row['episodes']}",
        "95 % Wilson interval (%)": f"{100 * row['wilson_low']:.0f} to "
                                    f"{100 * row['wilson_high']:.0f}",
        "gap (points)": "" if row["gap"] is None else f"{100 * row['gap']:+.0f}",
        "paired p": "" if row["p_value"] is None else f"{row['p_value']:.2g}",
        "mean recursions": f"{row['mean_recursions']:.1f}",
        **{f"in {phase}": f"{row['by_phase'][phase]:.1f}" if phase in row["by_phase"] else ""
           for phase in PHASES},
        "action error": f"{row['action_error'][0]:.4f}" if row.get("action_error") else "",
        "ms per action": f"{row['action_ms']:.1f}",
        "length": f"{row['mean_length']:.0f}",
    } for row in card["rows"]]
    if not any(row["action error"] for row in table):  # the demonstrations were not there
        for row in table:
            del row["action error"]
    return table


@styled
def plot_depth_cards(cards: Mapping[str, Mapping]) -> Figure:
    """Success and time by the recursions used; where in an episode the rules think longer.

    Args:
        cards: by name. Of one policy each way to think has a colour; of several each policy has
            one, each kind of way a marker, and a line joins what it does at fixed depths.
    """
    several = len(cards) > 1
    first = next(iter(cards.values()))
    rows = [row for card in cards.values() for row in card["rows"]]
    kinds = list(dict.fromkeys(_kind(row["name"], several) for row in rows))
    shown = ["success", "cost"]
    shown += ["error"] if any(row.get("action_error") for row in rows) else []
    shown += ["phases"] if any(map(_adaptive, rows)) else []
    rows_of_panels = 1 + (len(shown) > 3)
    columns = len(shown) // rows_of_panels
    fig = new_figure(4.3 * columns + 0.6, 3.4 * rows_of_panels + 0.8)
    axes = fig.subplots(rows_of_panels, columns, squeeze=False)
    panels = dict(zip(shown, axes.flat, strict=True))
    for policy, (name, card) in enumerate(cards.items()):
        aside = 0.08 * (policy - (len(cards) - 1) / 2)
        for row in card["rows"]:
            kind = kinds.index(_kind(row["name"], several))
            look = {"color": PALETTE[(policy if several else kind) % len(PALETTE)],
                    "marker": _MARKERS[kind % len(_MARKERS)]}
            rate = 100 * row["success_rate"]
            used = row["mean_recursions"] + aside
            panels["success"].errorbar(
                used, rate, capsize=3, **look,
                yerr=[[max(rate - 100 * row["wilson_low"], 0)],
                      [max(100 * row["wilson_high"] - rate, 0)]])
            panels["cost"].plot(row["action_ms"], rate, linestyle="", **look)
            if row.get("action_error"):
                mean, low, high = row["action_error"]
                panels["error"].errorbar(used, mean, [[mean - low], [high - mean]], capsize=3,
                                         **look)
            if _adaptive(row):
                panels["phases"].plot(list(row["by_phase"]), list(row["by_phase"].values()),
                                      **look)
        if several:
            colour = PALETTE[policy % len(PALETTE)]
            at_depth = sorted((row["mean_recursions"] + aside, 100 * row["success_rate"])
                              for row in card["rows"] if not _adaptive(row)
                              and _kind(row["name"], several) in ("as trained", _OTHER_DEPTH))
            panels["success"].plot(*zip(*at_depth, strict=True), color=colour, linewidth=1,
                                   alpha=0.6)
            panels["success"].plot([], [], color=colour, linewidth=5, label=name)
    for number, kind in enumerate(kinds):
        panels["success"].plot([], [], linestyle="", marker=_MARKERS[number % len(_MARKERS)],
                               color=GREY if several else PALETTE[number % len(PALETTE)],
                               label=kind)
    for name, title in (("success", "Does thinking longer help?"),
                        ("error", "Does it answer better?")):
        if name in panels:
            panels[name].axvline(first["trained_depth"], color=GREY, linestyle=":")
            panels[name].set(title=title,
                             xlabel="recursions used, mean over the steps (dotted: trained)")
            count_axis(panels[name].xaxis)
    panels["cost"].set(xlabel="milliseconds per executed action", title="What does it cost?")
    for name in ("success", "cost"):
        panels[name].set(ylabel="success rate (%), whiskers: 95 % Wilson", ylim=(-2, 104))
    if "error" in panels:
        panels["error"].set(ylabel="error of the arm's command (mean absolute)")
        panels["error"].set_ylim(bottom=0)
    if "phases" in panels:
        panels["phases"].set(xlabel="phase of the episode", ylabel="recursions used, mean",
                             title="Where does it think longer?")
    fig.suptitle(f"{f'{len(cards)} policies' if several else first['run']} in control: "
                 f"{first['suite']}, task {', '.join(map(str, first['task_ids']))}, "
                 f"{first['rows'][0]['episodes']} episodes each")
    fig.legend(*panels["success"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def _kind(name: str, several: bool) -> str:
    return re.sub(r"^\w+ \d+$", _OTHER_DEPTH, name) if several else name


def _adaptive(row: Mapping) -> bool:
    """Does it take more recursions in one phase of the episode than in another?"""
    used = row["by_phase"].values() or [0.0]
    return max(used) - min(used) > 1e-9
