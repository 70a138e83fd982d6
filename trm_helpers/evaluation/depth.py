"""Success by the number of recursions: one card per run.

The same weights play the same episodes as trained, at other depths, with each rule that may end the
recursion early, and with the state carried over from one decision to the next.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from .. import schema
from ..config import Config, EvalConfig, ModelConfig
from ..files import dispensable, write_json
from ..sim.env import LiberoEnv
from ..training.runs import description, find_run, held_out, load_config
from ..visuals.colours import GREY, PALETTE
from ..visuals.figure import (
    count_axis,
    describe,
    new_figure,
    save_figure,
    styled,
    success_rates,
)
from .cards import cells, compared, earlier_rows, measured, read_card, tasks_in_short
from .plan import official_episodes, refuse_unknown_tasks
from .play import Evaluation, TrainedPolicy, one_environment
from .rollout import PHASES, Policy

AS_TRAINED = "as trained"
THRESHOLDS = (1e-4, 1e-3)  # of the convergence rule: 1e-3 is the published one
MARKERS = "osD^vPX*"
_SAMPLES = 2048  # of the held-out demonstrations


class ChangedPolicy(NamedTuple):
    """A run's policy with other settings of its recursion."""

    source: TrainedPolicy
    changes: Mapping[str, float | str]

    def make(self, env: LiberoEnv | None = None) -> Policy:
        policy = copy.copy(self.source.make(env))  # the weights are shared
        policy.config = dataclasses.replace(policy.config, **self.changes)
        policy.reset()
        return policy


def recursion_settings(trained: ModelConfig, depths: Sequence[int],
                       thresholds: Sequence[float] = THRESHOLDS) -> dict[str, dict]:
    """The settings that each row of a card changes, by its name; as trained first."""
    deepest = max([*depths, trained.num_recursions])
    # "remainder" and "adaptive" sum over the steps: the same weights allow no other rule
    sums = trained.halting in ("remainder", "adaptive")
    rule = {} if sums else {"halting": "fixed"}
    name = rule.get("halting", trained.halting)
    settings: dict[str, dict] = {AS_TRAINED: {}}
    for depth in sorted({*depths, trained.num_recursions}):
        if depth != trained.num_recursions or trained.halting != name:
            settings[f"{name} {depth}"] = {**rule, "num_recursions": depth}
    for threshold in () if sums else thresholds:
        settings[f"convergence below {threshold:g}, at most {deepest}"] = {
            "halting": "convergence", "num_recursions": deepest,
            "convergence_threshold": threshold}
    other = "not carried over" if trained.carry_over else "carried over"
    settings[f"{AS_TRAINED}, state {other}"] = {"carry_over": not trained.carry_over}
    return settings


def action_errors(source: TrainedPolicy, trained: Config,
                  settings: Mapping[str, Mapping]) -> dict[str, list[float]]:
    """Error of the arm's command on held-out demonstrations, by row name: [mean, low, high].

    The mean absolute error of the first action's six numbers in the environment's units, with its
    95 % interval over the samples. Without rows that carry the state over, which a single decision
    cannot show; empty if a file that the run was trained on has been moved.
    """
    from ..visuals.explain import depth_curve

    described = description(source.run)["trained_on"]["files"]
    files = {task_id: Path(file["file"])
             for task_id, file in zip(trained.data.task_ids, described, strict=True)}
    if not all(path.is_absolute() and path.exists() for path in files.values()):
        return {}
    data = held_out(source.run, files, trained, source.make())
    errors = {}
    for name, changes in settings.items():
        if "carry_over" not in changes:
            policy = ChangedPolicy(source, changes).make()
            curve = depth_curve(policy, data, [policy.config.num_recursions], _SAMPLES)
            errors[name] = [*curve["arm_error"], *curve["arm_interval"][0]]
    return errors


@one_environment()
def depth_card(run: str | Path, depths: Iterable[int] = (),
               thresholds: Iterable[float] = THRESHOLDS, config: EvalConfig | None = None,
               weights: str = "best", task_ids: Iterable[int] = (),
               only: Iterable[str] = ()) -> dict:
    """Play a run's policy with all :func:`recursion_settings`; write ``depth.json`` and its figure.

    Each row has a ledger of its own below ``depth/``, so that an interrupted call resumes.

    Args:
        depths: default 1, half, once and twice the trained one.
        thresholds: squared changes of the actions below which the convergence rule stops.
        config: as for :func:`evaluate.plan_run`; default the run's. Nothing is filmed.
        task_ids: default the run's.
        only: names of the rows to be played beside the policy as trained; default all.

    Returns:
        what ``depth.json`` holds: the conditions, and ``rows``, each with the numbers of
        :func:`cards.measured`, ``mean_recursions`` over the episode and ``by_phase``,
        milliseconds per executed action, ``action_error`` of :func:`action_errors`, and against
        the policy as trained the ``gap`` and ``p_value`` of :func:`stats.paired_mcnemar`.

    Raises:
        ValueError: the policy does not recurse, a depth or a threshold that is not valid, an
            unknown name in ``only``, or a policy conditioned on task numbers was not trained on one
            of ``task_ids``.
        RuntimeError: no episode as trained could be played.
        TimeoutError: the session's time is up before the last episode as trained; other rows
            that fail or lack episodes are left out.
    """
    run = find_run(run, to_write=True, weights=weights)
    path = run / "depth.json"
    before = read_card(path)
    trained = load_config(run)
    if trained.model.variant not in schema.RECURSIVE:
        raise ValueError(f"{run} has variant={trained.model.variant!r}, which is applied once; "
                         f"expected one of {', '.join(schema.RECURSIVE)}")
    depth = trained.model.num_recursions
    depths = tuple(depths) or (1, max(depth // 2, 1), depth, 2 * depth)
    if min(depths) < 1:
        raise ValueError(f"depths={depths} is not valid; expected each >= 1")
    settings = recursion_settings(trained.model, depths, tuple(thresholds))
    for changes in settings.values():
        dataclasses.replace(trained.model, **changes)  # refuses values before the first episode
    only = [schema.check_option("only", name, settings) for name in only] or list(settings)
    settings = {name: settings[name] for name in settings if name in (AS_TRAINED, *only)}
    config = dataclasses.replace(config or trained.eval, num_videos=0, perturbation="none")
    task_ids = tuple(dict.fromkeys(task_ids)) or trained.data.task_ids
    refuse_unknown_tasks(trained, trained.data.suite, task_ids)
    source = TrainedPolicy.load(run, weights)
    planned = official_episodes(trained.data.suite, task_ids, config)
    evaluations = {
        name: Evaluation(ChangedPolicy(source, changes), source.identity,
                         run / "depth" / name.replace(",", "").replace(" ", "-"), config,
                         trained.data.suite, planned)
        for name, changes in settings.items()}
    errors: dict[str, list[float]] = {}
    with dispensable("the table of action errors"):
        errors = action_errors(source, trained, settings)
    rows = {}
    conditions = {"suite": trained.data.suite, "task_ids": list(task_ids), **source.identity,
                  "trained_depth": depth, "num_episodes": config.episodes,
                  "first_init_state": config.first_init_state, "protocol": config.protocol}
    for name, evaluation in evaluations.items():
        try:
            results, episodes = evaluation.play(), evaluation.rows()
            row = {"name": name, **settings[name], **measured(results), **_thinking(episodes),
                   "action_error": errors.get(name)}
        except (RuntimeError, TimeoutError) as error:
            if not rows:
                raise
            print(f"{name}: {error}")
            continue
        if name == AS_TRAINED:
            rows = earlier_rows(before, conditions, row)
        else:
            rows[name] = row | compared(evaluations[AS_TRAINED].rows(), episodes)
    order = [*dict.fromkeys([*settings, *rows])]
    card = {"run": run.name, **conditions, "rows": [rows[name] for name in order if name in rows],
            "software": results["software"]}
    write_json(path, card)
    with dispensable("the figure of the card"):
        save_figure(plot_depth_card(card), run / "figures" / "depth_in_control.png")
    return card


def _thinking(episodes: Sequence[Mapping]) -> dict:
    """Recursions used, of the whole episodes and by phase, and milliseconds per action."""
    by_phase = pd.DataFrame([row["recursions_by_phase"] for row in episodes], columns=PHASES)
    means = pd.DataFrame(episodes, columns=["mean_recursions", "action_ms"]).astype(float).mean()
    return {**means.fillna(0).to_dict(),  # none where the policy failed before its first action
            "by_phase": by_phase.mean().dropna().to_dict()}


# --- shown ---------------------------------------------------------------------------------------
def depth_rows(card: Mapping) -> list[dict]:
    """A card as the rows of a table, in percent, points and milliseconds."""
    table = [{
        "recursion": row["name"],
        **cells(row),
        "mean recursions": f"{row['mean_recursions']:.1f}",
        **({f"mean in {phase}": f"{row['by_phase'][phase]:.1f}" if phase in row["by_phase"] else ""
            for phase in PHASES} if any(map(adaptive, card["rows"])) else {}),
        "action error": f"{row['action_error'][0]:.4f}" if row.get("action_error") else "",
        "ms per action": f"{row['action_ms']:.1f}",
        "length": f"{row['mean_length']:.0f}",
    } for row in card["rows"]]
    if not any(row["action error"] for row in table):  # the demonstrations were not there
        for row in table:
            del row["action error"]
    return table


@styled
def plot_depth_card(card: Mapping) -> Figure:
    """Success, time and error by recursions per decision, in a colour for each row."""
    fig, panels = depth_panels([card])
    for number, row in enumerate(card["rows"]):
        draw_depth_row(panels, row, label=row["name"], color=PALETTE[number % len(PALETTE)],
                       marker=MARKERS[number % len(MARKERS)])
    fig.suptitle(f"{card['run']} in control\n{tasks_in_short(card)}")
    fig.legend(*panels["cost"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return describe(fig, "; ".join(
        f"{row['name']}: {row['successes']} of {row['episodes']} with {row['mean_recursions']:.1f} "
        "recursions" for row in card["rows"]) + ".")


def depth_panels(cards: Sequence[Mapping]) -> tuple[Figure, dict]:
    """A figure and its labelled, empty panels: ``success``, ``cost``, ``error`` and ``phases``.

    The last two only if the cards have such numbers.
    """
    rows = [row for card in cards for row in card["rows"]]
    shown = ["success", "cost"]
    shown += ["error"] if any(row.get("action_error") for row in rows) else []
    shown += ["phases"] if any(map(adaptive, rows)) else []
    lines = 1 + (len(shown) > 3)
    columns = len(shown) // lines
    fig = new_figure(4.3 * columns + 0.6, 3.4 * lines + 0.8)
    panels = dict(zip(shown, fig.subplots(lines, columns, squeeze=False).flat, strict=True))
    used = "mean recursions per decision\n(dotted: the limit in training)"
    percent = "success rate (%)"
    labels = {"success": ("Success by recursions\n(whiskers: 95 % Wilson interval)", used,
                          percent),
              "cost": ("Success by time\n", "milliseconds per executed action", percent),
              "error": ("Error by recursions", used,
                        "mean absolute error of the arm's command"),
              "phases": ("Recursions by phase", "phase of the episode",
                         "mean recursions per decision")}
    for name, axes in panels.items():
        title, x, y = labels[name]
        axes.set(title=title, xlabel=x, ylabel=y)
        if x == used:
            axes.axvline(cards[0]["trained_depth"], color=GREY, linestyle=":")
            count_axis(axes.xaxis)
        if y.startswith(percent):
            axes.set_ylim(-2, 104)
        if name == "error":
            axes.axhline(0, color=GREY, linewidth=0.6)
        if name == "phases":  # in their order, also where a row has not all of them
            axes.set(xticks=range(len(PHASES)), xticklabels=PHASES)
    return fig, panels


def draw_depth_row(panels: Mapping, row: Mapping, offset: float = 0.0, label: str = "",
                   **look) -> None:
    """One row of a card in every panel; ``offset`` in recursions separates marks that coincide."""
    (rate,), whiskers = success_rates([row])
    used = row["mean_recursions"] + offset
    panels["success"].errorbar(used, rate, whiskers, capsize=3, **look)
    panels["cost"].plot(row["action_ms"], rate, linestyle="", label=label, **look)
    if row.get("action_error"):
        mean, low, high = row["action_error"]
        panels["error"].errorbar(used, mean, [[mean - low], [high - mean]], capsize=3, **look)
    if adaptive(row):
        panels["phases"].plot([PHASES.index(phase) for phase in row["by_phase"]],
                              list(row["by_phase"].values()), **look)


def adaptive(row: Mapping) -> bool:
    """Whether a policy recurses more in one phase of the episode than in another."""
    used = row["by_phase"].values() or [0.0]
    return max(used) - min(used) > 1e-9
