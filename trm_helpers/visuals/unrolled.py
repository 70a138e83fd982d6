"""The recursion unrolled: how a policy's state and action form step by step."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from .. import schema
from ..sim.render import upright
from .colours import BLUE, GREY, ORANGE, PALETTE, RED
from .explain import batches_of, demonstrated, evaluating, prediction_by_depth
from .figure import (
    DASHES,
    MAX_WIDTH,
    count_axis,
    describe,
    label_right,
    new_figure,
    show_image,
    styled,
)

CONVERGED = 0.05  # last change, as a share of the state's norm
DIVERGED_CHANGE = 1.5  # last change over the first
DIVERGED_NORM = 2.0  # last norm over the first
SETTLED = 0.01  # environment units: an action this close to the last step's
_MOMENT_SIZE = 256  # pixels of an image shown beside the recursion


@styled
def plot_refinement(image, changes: Mapping[str, Sequence[float]], actions,
                    title: str, unit: str = "step") -> Figure:
    """How a decision on one observation forms over n steps of a recursion.

    Args:
        image: the observation's stored frame (H, W, 3).
        changes: of each part of the state, the relative change in each step (n,).
        actions: (n + 1, 7), the first action read before the first and after each step.
        unit: name of a step.
    """
    actions = np.asarray(actions)
    steps = np.arange(len(actions))
    fig = new_figure(9, 3.6)
    frame, change, table = fig.subplots(1, 3, width_ratios=(1, 1, 1.5))
    show_image(frame, upright(image))
    frame.set_title("observation")
    for values, colour, dashes in zip(changes.values(), PALETTE, DASHES, strict=False):
        change.plot(steps[1:], 100 * np.asarray(values), dashes, marker="o", color=colour)
    change.set(ylim=(0, 110 * max(map(max, changes.values()))), xlabel=unit,
               title="change of the state, % of the new state's norm")
    label_right(change, {name: (100 * values[-1], colour) for (name, values), colour
                         in zip(changes.items(), PALETTE, strict=False)})
    cells = table.imshow(actions.T, aspect="auto", cmap="PuOr", vmin=-1.5, vmax=1.5)
    table.set(xticks=steps, yticks=range(schema.ACTION_DIM), yticklabels=schema.ACTION_NAMES,
              xlabel=f"{unit}s completed", title="first of the K actions (last column: final)")
    table.axvline(steps[-1] - 0.5, color="black", linewidth=2)
    if len(steps) <= 8:  # numbers would overlap
        for (step, dim), value in np.ndenumerate(np.round(actions, 2) + 0.0):  # no -0.00
            table.text(step, dim, f"{value:+.2f}", ha="center", va="center",
                       color="white" if abs(value) > 0.75 else "black")
    else:
        fig.colorbar(cells, ax=table)
    count_axis(change.xaxis)
    fig.suptitle(title)
    distance = np.abs(actions - actions[-1]).max(axis=1)
    return describe(fig, "Largest distance of the action from the final one: " + ", ".join(
        f"{value:.2f} after {unit} {step}" for step, value in enumerate(distance[:-1])) + ".")


def recursion_verdict(changes: Sequence[float], norms: Sequence[float]) -> tuple[str, str]:
    """Whether the recursion converges, as one word and one sentence.

    ``converged``: the last change is at most 5 % of the last norm. Else ``diverging``: the last
    change is over 1.5 times the first, or the last norm over twice the first, or a number is not
    finite. Else ``settling``: each change is smaller than the one before. Else ``drifting``.

    Args:
        changes: ``||h_k - h_(k-1)||`` for k = 1 ... N.
        norms: ``||h_k||`` for k = 0 ... N.
    """
    if len(changes) == 0 or len(norms) != len(changes) + 1:
        raise ValueError(
            f"{len(changes)} changes and {len(norms)} norms; expected N >= 1 changes, N + 1 norms")
    if not np.isfinite([*changes, *norms]).all():
        return "diverging", "The recursion is diverging: its states are not finite."
    share = changes[-1] / max(norms[-1], 1e-12)
    if share <= CONVERGED:
        word = "converged"
    elif changes[-1] > DIVERGED_CHANGE * changes[0] or norms[-1] > DIVERGED_NORM * norms[0]:
        word = "diverging"
    else:
        word = "settling" if len(changes) > 1 and (np.diff(changes) < 0).all() else "drifting"
    said = {"converged": "has converged", "diverging": "is diverging",
            "settling": "is settling but has not converged",
            "drifting": "is drifting: nothing shows that it converges"}[word]
    return word, (
        f"The recursion {said}. Recursion {len(changes)} changes the state by {100 * share:.1f} % "
        f"of its norm, the first by {100 * changes[0] / max(norms[1], 1e-12):.1f} %.")


@torch.no_grad()
def visualize_recursive_states(policy, observations: Mapping) -> tuple[dict, Figure]:
    """How the hidden state moves over the recursion, for batched observations.

    Returns:
        a dictionary and its figure: ``norms`` (N + 1 floats, ``||h_k||`` from h0), ``changes`` (N
        floats, ``||h_k - h_(k-1)||``), both L2 and averaged over the batch, and ``verdict`` and
        ``sentence`` of :func:`recursion_verdict`. The heat map shows the first sample's features,
        sorted by their last value.
    """
    with evaluating(policy):
        _, states = policy(observations, return_all_states=True)
    states = torch.stack(states).float().cpu().flatten(2)  # (N + 1, B, D), or K * D of tokens
    norms = states.norm(dim=-1).mean(dim=1).tolist()
    changes = states.diff(dim=0).norm(dim=-1).mean(dim=1).tolist()
    verdict, sentence = recursion_verdict(changes, norms)
    report = {"norms": norms, "changes": changes, "verdict": verdict, "sentence": sentence}
    return report, plot_recursion(states[:, 0].numpy(), report)


def _largest(values: np.ndarray | Sequence[float]) -> float:
    """The largest finite absolute value; 1 without one."""
    values = np.abs(values)
    return float(values[np.isfinite(values)].max(initial=0)) or 1.0


@styled
def plot_recursion(states: np.ndarray, report: Mapping) -> Figure:
    """Heat map of one sample's states (N + 1, D), and norm and change of the state by step."""
    steps = np.arange(len(states))
    fig = new_figure(MAX_WIDTH, 3.8)
    heat, norm, change = fig.subplots(1, 3, width_ratios=(1.5, 1, 1))
    limit = _largest(states)
    image = heat.imshow(states[:, np.argsort(states[-1])].T, aspect="auto", cmap="PuOr",
                        vmin=-limit, vmax=limit, origin="lower")
    heat.set(xlabel="recursion (0: before the first)", xlim=(-0.5, len(states) - 0.5),
             ylabel="feature, sorted by last value", title="Hidden state of one sample")
    fig.colorbar(image, ax=heat).ax.set_title("value", fontsize="medium")
    norm.plot(steps, report["norms"], marker="o")
    norm.set(xlabel="recursion", title="L2 norm of the state",
             ylim=(0, 1.15 * _largest(report["norms"])))
    change.plot(steps[1:], report["changes"], marker="o", color=RED)
    change.axhline(CONVERGED * report["norms"][-1], color=GREY, linestyle=":",
                   label=f"converged below\n({100 * CONVERGED:.0f} % of the norm)")
    change.set(xlabel="recursion", title="L2 norm of its change",
               ylim=(0, 1.25 * _largest(report["changes"])))
    change.legend(loc="upper right")
    for axes in (heat, norm, change):
        count_axis(axes.xaxis)
    fig.suptitle(textwrap.fill(report["sentence"], 90))
    return describe(fig, f"Norm of the state {report['norms'][0]:.3g} before the first recursion "
                         f"and {report['norms'][-1]:.3g} after the last; change "
                         f"{report['changes'][0]:.3g} in the first and "
                         f"{report['changes'][-1]:.3g} in the last.")


@torch.no_grad()
def recursion_steps(policy, dataset, index: int) -> dict:
    """One sample's recursion, step by step.

    Returns:
        ``images``, the stored image (H, W, 3) by camera; ``target``, the demonstrated first action
        (7,), and ``actions`` (N, 7), the one read out after each step, in the environment's units;
        ``states`` (N + 1, D), or K * D of tokens, from h0; by step, ``errors`` (N,), the mean
        absolute error of the arm's six numbers, and ``changes`` (N,), the norm of the state's
        change over the norm of the state.
    """
    batch = next(batches_of(policy, dataset, [index]))
    observations = batch["observations"]
    with evaluating(policy):
        _, states = policy(observations, return_all_states=True)
    states = torch.stack(states)[:, 0].flatten(1).float().cpu().numpy()
    target = demonstrated(dataset, batch)[0]
    actions = prediction_by_depth(policy, observations, range(1, len(states)))
    return {"images": {camera: observations[camera].flatten(0, -4)[0].cpu().numpy()
                       for camera in policy.config.cameras},
            "target": target, "actions": actions, "states": states,
            "errors": np.abs(actions - target)[:, : schema.ARM_DIM].mean(axis=1),
            "changes": np.linalg.norm(np.diff(states, axis=0), axis=1)
            / np.linalg.norm(states[1:], axis=1).clip(min=1e-12)}


@styled
def plot_recursion_steps(steps: Mapping) -> Figure:
    """The figure of :func:`recursion_steps`: observation, then state and action by step.

    Of more than four steps, four from the first to the last.
    """
    states, actions, target = steps["states"], steps["actions"], steps["target"]
    shown = np.unique(np.linspace(1, len(actions), min(len(actions), 4)).round().astype(int))
    fig = new_figure(MAX_WIDTH, 4.6)
    grid = fig.add_gridspec(2, len(shown) + 2)
    for line, (camera, image) in enumerate(list(steps["images"].items())[:2]):
        axes = fig.add_subplot(grid[line, 0])
        show_image(axes, upright(image))
        axes.set_title(schema.CAMERA_TITLES[camera])
    side = int(np.ceil(np.sqrt(states.shape[1])))  # of a square that holds the state's numbers
    limit = np.abs(states).max()
    place = np.arange(schema.ACTION_DIM)
    for column, step in enumerate([0, *shown], 1):
        square = np.full(side * side, np.nan)
        square[: states.shape[1]] = states[step]
        top = fig.add_subplot(grid[0, column])
        show_image(top, square.reshape(side, side), cmap="PuOr", vmin=-limit, vmax=limit)
        if step == 0:
            top.set_title("start")
            continue
        top.set_title(f"recursion {step}\nchange {100 * steps['changes'][step - 1]:.1f} %")
        bottom = fig.add_subplot(grid[1, column])
        bottom.barh(place, actions[step - 1], 0.7, color=ORANGE, hatch="//", label="predicted")
        bottom.plot(target, place, "D", color=BLUE, markersize=4, linestyle="",
                    label="demonstrated")
        bottom.axvline(0, color=GREY, linewidth=0.6)
        reach = 1.05 * max(1.0, np.abs([*actions.flat, *target]).max())
        bottom.set(yticks=place, xlim=(-reach, reach),
                   yticklabels=schema.ACTION_NAMES if step == shown[0] else [],
                   title=f"arm error {steps['errors'][step - 1]:.3f}")
        bottom.invert_yaxis()
    fig.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    which = "each recursion" if len(shown) == len(actions) else (
        f"recursions {', '.join(map(str, shown))} of {len(actions)}")
    fig.suptitle(f"The state (above) and the action read from it (below) after {which}")
    away = np.abs(actions - actions[-1]).max(axis=1)
    settled = 2 + max(np.flatnonzero(away >= SETTLED), default=-1)
    end = (f"from recursion {settled} on it is within {SETTLED:g}" if settled < len(actions) else
           f"recursion {len(actions)} still changes it by {away[-2] if len(away) > 1 else 0:.3f}")
    return describe(fig, f"After recursion 1 the action is up to {away[0]:.3f} away from "
                         f"that of recursion {len(actions)}; {end}.")


def recursion_moments(policy, dataset, titles: Mapping[int, str]) -> tuple[list[dict], np.ndarray]:
    """How the first action forms over the recursions, at a few moments of demonstrations.

    Args:
        titles: the name of each moment by its sample in ``dataset``.

    Returns:
        a list of ``title``, ``demonstrated`` (7 floats, environment units) and ``recursions``, one
        per step: ``action`` (7 floats) read after it, ``change``, the norm of the state's change
        over the norm of the state, and ``sentence``; and the first camera's images, upright and
        enlarged, side by side as uint8 (S, n * S, 3).
    """
    moments, images = [], []
    for index, title in titles.items():
        steps = recursion_steps(policy, dataset, index)
        moments.append({
            "title": title, "demonstrated": steps["target"].tolist(),
            "recursions": [{"action": action.tolist(), "change": float(steps["changes"][k]),
                            "sentence": _moment_sentence(k, steps)}
                           for k, action in enumerate(steps["actions"])]})
        image = steps["images"][policy.config.cameras[0]]
        image = Image.fromarray((255 * upright(image)).round().astype(np.uint8))
        images.append(image.resize((_MOMENT_SIZE, _MOMENT_SIZE), Image.Resampling.BICUBIC))
    return moments, np.concatenate(images, axis=1)


def _moment_sentence(k: int, steps: Mapping) -> str:
    """The step ``k`` of :func:`recursion_steps` against the demonstrated action."""
    actions, target, errors = steps["actions"], steps["target"], steps["errors"]
    change = steps["changes"][k]
    gripper = "right" if (np.sign(actions[k, schema.GRIPPER_INDEX])
                          == np.sign(target[schema.GRIPPER_INDEX])) else "wrong"
    difference = errors[k] - errors[k - 1] if k else 0.0
    compared = "" if not k else ", " + (
        "the same as" if abs(difference) < 0.005 else
        f"{abs(difference):.2f} {'more' if difference > 0 else 'less'} than"
    ) + " after the previous recursion"
    return (f"After recursion {k + 1} of {len(actions)}, the arm's movement differs from the "
            f"demonstrated one by {errors[k]:.2f} on average{compared}; the gripper command is "
            f"{gripper}. This recursion changed the state by {100 * change:.0f} % of its norm"
            f"{': it has almost stopped changing' if k and change <= CONVERGED else ''}.")
