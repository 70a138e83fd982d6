"""Figures of actions (T, 7) in the environment's units."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from .. import schema
from ..sim.render import upright
from .colours import BLUE, GREY, PALETTE, RED
from .figure import DASHES, MAX_WIDTH, describe, new_figure, show_image, styled

_LABEL_BOX = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}


def check_actions(actions) -> np.ndarray:
    """``actions`` as an array (T, 7); raises ``ValueError`` for another shape or no action."""
    actions = np.asarray(actions)
    if actions.ndim != 2 or actions.shape[1] != schema.ACTION_DIM or len(actions) == 0:
        raise ValueError(f"actions have shape {actions.shape}; expected (T, 7) with T >= 1")
    return actions


@styled
def plot_action_statistics(actions) -> Figure:
    """Histogram of each dimension of actions (N, 7) in the environment's units."""
    actions = check_actions(actions)
    fig = new_figure(MAX_WIDTH, 5.6)
    grid = fig.subplots(2, 4).ravel()
    share = np.full(len(actions), 100 / len(actions))
    for dim, axes in enumerate(grid[: schema.ACTION_DIM]):
        values = actions[:, dim]
        axes.hist(values, bins=np.linspace(-1, 1, 42), weights=share, color=BLUE)
        axes.axvline(values.mean(), color=RED, linestyle="--", label="mean")
        axes.set_title(f"{schema.ACTION_NAMES[dim]}: mean {values.mean():+.2f}, "
                       f"std {values.std():.2f}")
        axes.set_xlabel(textwrap.fill(schema.ACTION_MEANING[dim], 27))
        axes.set_ylabel("share of steps (%)" if dim % 4 == 0 else "")
    grid[-1].axis("off")
    grid[-1].legend(*grid[0].get_legend_handles_labels(), loc="upper left")
    fig.suptitle(f"{len(actions):,} actions by dimension (commands, −1 to 1)")
    return describe(fig, f"{'; '.join(axes.get_title() for axes in grid[:-1])}.")


@styled
def plot_action_trace(actions, title: str = "Actions of one demonstration") -> Figure:
    """Actions (T, 7) in the environment's units over time, from the first step."""
    actions = check_actions(actions)
    edges = np.arange(len(actions) + 1) / schema.CONTROL_HZ  # seconds
    fig = new_figure(8, 5.2)
    move, turn, grip = fig.subplots(3, sharex=True, height_ratios=(3, 3, 1))
    for dim in range(schema.ARM_DIM):
        axes = move if dim < 3 else turn
        axes.stairs(actions[:, dim], edges, baseline=None, color=PALETTE[dim % 3], linewidth=1.5,
                    linestyle=DASHES[dim % 3], label=schema.ACTION_NAMES[dim])
    for axes, label in ((move, "translation\n(1 asks for 0.05 m)"),
                        (turn, "rotation\n(1 asks for 0.5 rad)")):
        axes.set(ylabel=label, ylim=(-1.1, 1.1))
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    grip.stairs(actions[:, schema.GRIPPER_INDEX], edges, baseline=None, color="black",
                linewidth=1.5)
    grip.set(ylabel="gripper", ylim=(-1.3, 1.3), xlabel="time (s)",
             yticks=(schema.GRIPPER_OPEN, schema.GRIPPER_CLOSED), yticklabels=("open", "closed"))
    fig.suptitle(title)
    closing = np.flatnonzero(np.diff(actions[:, schema.GRIPPER_INDEX]) != 0) + 1
    times = ", ".join(f"{step / schema.CONTROL_HZ:.1f}" for step in closing)
    return describe(fig, f"{edges[-1]:.1f} s of translation, rotation and gripper; the gripper "
                         f"{f'switches at {times} s' if times else 'never switches'}.")


@styled
def plot_action_phases(actions, phases: Sequence[str], pushed: Sequence[bool]) -> Figure:
    """:func:`plot_action_trace` of actions (T, 7) with the phase (T,) of each step named above.

    Steps in which the arm was ``pushed`` (T,) are grey.
    """
    fig = plot_action_trace(actions, "Actions of one demonstration (grey: the arm is pushed)")
    edges = np.arange(len(phases) + 1) / schema.CONTROL_HZ  # seconds
    starts = [i for i, phase in enumerate(phases) if i == 0 or phase != phases[i - 1]]
    for axes in fig.axes:
        for step in np.flatnonzero(pushed):
            axes.axvspan(edges[step], edges[step + 1], color=GREY, alpha=0.3, linewidth=0)
        for start in starts[1:]:
            axes.axvline(edges[start], color="black", linestyle=":", linewidth=1)
    for start, end in zip(starts, [*starts[1:], len(phases)], strict=True):
        if (end - start) / len(phases) > 0.011 * len(phases[start]):  # it would cover another name
            fig.axes[0].text((edges[start] + edges[end]) / 2, 1.02, phases[start], ha="center",
                             va="bottom", transform=fig.axes[0].get_xaxis_transform())
    order = ", then ".join(phases[start] for start in starts)
    return describe(fig, f"{fig.finding} Phases: {order}. The arm is pushed in "
                         f"{np.count_nonzero(pushed)} of {len(phases)} steps.")


@styled
def plot_action_axes(frames: Mapping[str, np.ndarray], hand: np.ndarray,
                     project: Callable[[np.ndarray, str], np.ndarray]) -> Figure:
    """The seven numbers of an action on a frame (H, W, 3) of each camera, all at +1.

    A straight arrow for each translation, a bent one for the rotation about it. Arrows are as long
    as the frame allows, not to scale.

    Args:
        hand: position (3,) in metres of the end effector.
        project: points (n, 3) in metres to columns and rows (n, 2) of a camera's upright frame, as
            `LiberoEnv.project`.
    """
    fig = new_figure(9, 5)
    for axes, (camera, frame) in zip(fig.subplots(1, len(frames), squeeze=False)[0], frames.items(),
                                     strict=True):
        show_image(axes, upright(frame))
        axes.set(title=schema.CAMERA_TITLES[camera], autoscale_on=False)
        length = 0.2 if camera == schema.STILL_CAMERA else 0.08  # metres; the wrist camera is near
        centre = project(hand[None], camera)[0]
        for dim, colour in enumerate(PALETTE[:3]):
            along, first, second = np.roll(np.eye(3), -dim, axis=0)
            tip = _arrow(axes, project(hand + np.linspace(0, length, 99)[:, None] * along, camera),
                         colour, 2.5, margin=0.13)
            angle = np.linspace(-2.4, 2.4, 99)[:, None]  # radians, counter-clockwise about the axis
            circle = np.cos(angle) * first + np.sin(angle) * second
            _arrow(axes, project(hand + length * (0.4 * along + 0.2 * circle), camera), colour, 1.3)
            away = (tip - centre) / max(np.linalg.norm(tip - centre), 1) * (1, -1)  # points go up
            axes.annotate(f"{schema.ACTION_NAMES[dim]}, {schema.ACTION_NAMES[3 + dim]}", tip,
                          (30 * away[0], 11 * away[1]), textcoords="offset points", color=colour,
                          ha="center", va="center", weight="bold", bbox=_LABEL_BOX)
        axes.plot(*centre, "o", markersize=9, markerfacecolor="none", markeredgecolor="black",
                  markeredgewidth=2)
        side = -1 if project(hand[None] + (0, 0.01, 0), camera)[0, 0] > centre[0] else 1
        axes.annotate("gripper", centre, (32 * side, 0), textcoords="offset points", ha="center",
                      va="center", weight="bold", bbox=_LABEL_BOX)
    fig.suptitle("The seven numbers of an action: directions of +1 (the gripper closes)")
    return describe(fig, "dx points away from the robot's base, dy to its left, dz up; each "
                         "rotation is counter-clockwise about its arrow.")


def _arrow(axes, points: np.ndarray, colour: str, width: float,
           margin: float = 0.0) -> np.ndarray:
    """Draw an arrow through points (n, 2), up to a margin of the frame where its label has room.

    Returns the tip (2,).
    """
    size = axes.get_xlim()[1]
    with np.errstate(invalid="ignore"):  # behind the camera
        inside = ((points > margin * size)
                  & (points < (size - margin * size, size - margin * size / 2))).all(axis=1)
    points = points[: len(points) if inside.all() else max(inside.argmin(), 2)]
    axes.plot(*points.T, color=colour, linewidth=width, solid_capstyle="butt")
    axes.annotate("", points[-1], points[-2], arrowprops={
        "arrowstyle": "-|>", "color": colour, "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0})
    return points[-1]
