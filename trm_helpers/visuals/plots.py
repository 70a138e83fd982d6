"""Figures of data, training and evaluation; other modules' figures use the same style.

Figures take images as they are stored, upside down; :func:`plot_rollout_strip` takes upright
frames. All return a :class:`DescribedFigure`, which a notebook shows and :func:`save_figure`
writes, both with its alt text. Text has at least 9 points in a column of 9 inches.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .. import schema
from ..demos.alignment import DELAY_MARGIN, HALF_SUBSTEP, MIDDLE_DELAY
from ..files import atomic_path
from ..sim.render import upright
from ..stats import format_success
from .colours import BLUE, GREEN, GREY, ORANGE, PALETTE, RED, SKY

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "figure.titlesize": 11,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "image.interpolation": "nearest",
    "lines.linewidth": 1.5,
}
TICK_SIZE = 9
MAX_WIDTH = 9  # inches; a wider figure is scaled down, with its text, where it is shown
DPI, SCREEN_DPI = 150, 100  # of files and in notebooks
HATCHES = ("", "//", "..", "xx")
DASHES = ("-", "--", ":", "-.")


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a function that draws a figure in the package's style, not changing matplotlib's."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            fig = draw(*args, **kwargs)
            for axes in fig.axes:  # ticks are made when drawn, after this context
                axes.tick_params(which="both", labelsize=TICK_SIZE)
        return fig

    return wrapper


class DescribedFigure(Figure):
    """A figure with alt text, shown by notebooks where it is displayed or returned.

    Jupyter keeps the alt text in the output's metadata. Most front ends do not show it from there,
    so it also follows the image, as a description to unfold.
    """

    finding = ""

    def _ipython_display_(self) -> None:
        from IPython.display import display

        image, metadata = self._repr_mimebundle_()
        display(image, metadata=metadata, raw=True)
        display({"text/markdown": "<details><summary>Description of the figure</summary>\n\n"
                                  f"{html.escape(alt_text(self))}\n\n</details>"}, raw=True)

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        buffer, text = io.BytesIO(), alt_text(self)
        self.savefig(buffer, format="png", dpi=SCREEN_DPI, bbox_inches="tight")
        png = base64.b64encode(buffer.getvalue()).decode()
        return {"image/png": png, "text/plain": text}, {"image/png": {"alt": text}}


def new_figure(width: float, height: float) -> DescribedFigure:
    """A figure of that size in inches, at most ``MAX_WIDTH`` wide."""
    return DescribedFigure(figsize=(min(width, MAX_WIDTH), height), layout="constrained")


def new_axes(width: float, height: float) -> Axes:
    """The only axes of a :func:`new_figure`."""
    return new_figure(width, height).subplots()


def describe(fig: DescribedFigure, finding: str) -> DescribedFigure:
    """Give ``fig`` the sentence that its alt text holds after its title; returns ``fig``."""
    fig.finding = finding
    return fig


def alt_text(fig: DescribedFigure) -> str:
    """Title and finding, for a reader who does not see the figure."""
    title = " ".join((fig.get_suptitle() or fig.axes[0].get_title()).split())
    return f"{title.rstrip('.')}. {fig.finding}".strip()


def save_figure(fig: DescribedFigure, path: str | os.PathLike) -> Path:
    """Write ``fig`` as PNG with its alt text, whole or not at all, and return the path."""
    with atomic_path(path) as temporary:
        fig.savefig(temporary, dpi=DPI, format="png", metadata={"Description": alt_text(fig)})
    return Path(path)


def read_alt_text(path: str | os.PathLike) -> str:
    """The alt text in a PNG file of :func:`save_figure`; "" if it has none."""
    with Image.open(path) as image:
        return image.info.get("Description", "")


def show_image(axes, image, **look) -> None:
    """Draw an upright image (H, W, 3), uint8 or in [0, 1], without ticks or frame.

    ``look``: how one of (H, W) is coloured, as ``axes.imshow`` takes it.
    """
    axes.imshow(image, **look)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def label_right(axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Label lines at the right edge instead of in a legend.

    Args:
        ends: for each label, the line's last value on the y axis and its colour. Labels keep a
            line's height apart.
    """
    gap = 13 / (72 * axes.figure.get_figheight() * axes.get_position().height)
    right, _ = axes.get_xlim()[1], axes.get_ylim()  # autoscaled when asked
    to_axes = axes.transData - axes.transAxes
    wanted = sorted((to_axes.transform((right, value))[1], label)
                    for label, (value, _) in ends.items())
    raised = list(accumulate((height for height, _ in wanted),
                             lambda below, height: max(height, below + gap)))
    lowered = list(accumulate((height for height, _ in reversed(wanted)),
                              lambda above, height: min(height, above - gap)))[::-1]
    for (_, label), up, down in zip(wanted, raised, lowered, strict=True):
        axes.text(1.01, (up + down) / 2, label, transform=axes.transAxes, va="center",
                  color=ends[label][1])


def count_axis(axis) -> None:
    """Whole numbers only: epochs, recursions, episodes."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def log_axis(axis) -> None:
    """Logarithmic, labelled with plain numbers at 1, 2, 3 and 5 of each decade."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "235" else "")


def success_rates(results: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    """Success rates (n,) in percent, and their distances (2, n) to the Wilson interval's ends."""
    rate, low, high = 100 * np.array([[result["success_rate"], result["wilson_low"],
                                       result["wilson_high"]] for result in results]).T
    return rate, np.clip([rate - low, high - rate], 0, None)


def success_bars(axes, places, results: Sequence[Mapping], thickness: float, *,
                 vertical: bool = False, labels: Sequence[str] = (), text: Mapping = {},
                 **look) -> None:
    """Bars of success rates (%) with their Wilson intervals, each with its counts beyond 100 %.

    Args:
        results: summaries of `stats.summarize_episodes`.
        labels: in place of the counts.
        text: how those are written, as ``axes.text`` takes it.
        look: how bars are drawn, as ``axes.bar`` takes it.
    """
    rate, whiskers = success_rates(results)
    draw, error = (axes.bar, "yerr") if vertical else (axes.barh, "xerr")
    draw(places, rate, thickness, **{error: whiskers}, capsize=3, error_kw={"linewidth": 1},
         **{"alpha": 0.85, **look})
    labels = labels or [f"{result['successes']}/{result['episodes']}" for result in results]
    for place, label in zip(places, labels, strict=True):
        at, aligned = ((place, 103), {"ha": "center"}) if vertical else (
            (103, place), {"va": "center"})
        axes.text(*at, label, **{**aligned, **text})


def check_actions(actions) -> np.ndarray:
    """``actions`` as an array (T, 7); raises ``ValueError`` for another shape or no action."""
    actions = np.asarray(actions)
    if actions.ndim != 2 or actions.shape[1] != schema.ACTION_DIM or len(actions) == 0:
        raise ValueError(f"actions have shape {actions.shape}; expected (T, 7) with T >= 1")
    return actions


def _image_grid(rows: Mapping[str, np.ndarray], columns: Sequence[str], title: str) -> Figure:
    """Upright images (n, H, W, 3) per row, labelled on the left; a title over each column."""
    side = min(1.8, (MAX_WIDTH - 0.4) / len(columns))
    fig = new_figure(side * len(columns) + 0.4, side * len(rows) + 0.7)
    fig.set_layout_engine("compressed")
    grid = fig.subplots(len(rows), len(columns), squeeze=False)
    for line, (label, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            show_image(axes, image)
        line[0].set_ylabel(label)
    for axes, text in zip(grid[0], columns, strict=True):
        axes.set_title(text)
    fig.suptitle(textwrap.fill(title, int(13 * fig.get_figwidth())))  # characters per inch
    shown = ", ".join(label for label in rows if label)
    return describe(fig, f"{len(columns)} images{f' each of {shown}' if shown else ''}: "
                         f"{', '.join(columns)}.")


# --- data ----------------------------------------------------------------------------------------
@styled
def plot_frames(frames: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """Frames (n, H, W, 3) of each camera, one row per camera, in order of time."""
    count = len(next(iter(frames.values())))
    rows = {schema.CAMERA_TITLES[camera]: upright(images) for camera, images in frames.items()}
    return _image_grid(rows, [f"frame {i + 1} of {count}" for i in range(count)], title)


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
    fig.suptitle(f"{len(actions):,} actions by dimension (environment units)")
    return describe(fig, f"{'; '.join(axes.get_title() for axes in grid[:-1])}.")


@styled
def plot_demo_lengths(lengths: Sequence[int], horizon: int = 0) -> Figure:
    """Histogram of demonstration lengths in steps; ``horizon`` marks the steps of evaluation."""
    mean = np.mean(lengths)
    axes = _length_axes(horizon, "demonstrations", f"Lengths of {len(lengths)} demonstrations")
    axes.hist(lengths, bins=12, color=BLUE, rwidth=0.9)
    axes.axvline(mean, color=RED, linestyle="--", label=f"mean {mean:.0f}")
    axes.legend()
    return describe(axes.figure, f"{min(lengths)} to {max(lengths)} steps, mean {mean:.0f}"
                                 f"{f'; horizon {horizon}' if horizon else ''}.")


def _length_axes(horizon: int, counted: str, title: str) -> Axes:
    axes = new_axes(6, 3.2)
    if horizon:
        axes.axvline(horizon, color="black", linestyle=":", label=f"horizon {horizon}")
    axes.set(xlabel=f"length (control steps; {schema.CONTROL_HZ} are one second)", ylabel=counted,
             title=title)
    count_axis(axes.yaxis)
    return axes


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
def plot_alignment(name: str, evidence: Mapping) -> Figure:
    """The evidence of `alignment.measure_alignment`: when stored observations were sampled."""
    fig = new_figure(8, 3.8)
    by_joints, by_delay = fig.subplots(2)
    zones = {"raw": BLUE, "shift": ORANGE, "unknown": GREY}
    low, high = MIDDLE_DELAY - DELAY_MARGIN, MIDDLE_DELAY + DELAY_MARGIN
    panels = (
        (by_joints, "fraction", {"raw": (-1, HALF_SUBSTEP), "shift": (HALF_SUBSTEP, 1)},
         "by joint angles: time of obs[t] from the decision on actions[t] (control steps)"),
        (by_delay, "delay", {"shift": (-1, low), "unknown": (low, high), "raw": (high, 2.5)},
         "by motion: delay from actions[t] to the arm's displacement after obs[t] (control steps)"),
    )
    for axes, key, spans, label in panels:
        for zone, (start, end) in spans.items():
            axes.axvspan(start, end, color=zones[zone], alpha=0.25, linewidth=0)
            axes.text((start + end) / 2, 0.85, zone, ha="center", va="top")
        value = evidence[key]
        edges = [edge for span in spans.values() for edge in span]
        axes.set(xlim=(min(edges), max(edges)), ylim=(0, 1), yticks=[], xlabel=label)
        if value is None:
            axes.text(sum(axes.get_xlim()) / 2, 0.35, "could not be measured", ha="center",
                      bbox={"facecolor": "white", "edgecolor": "none"})
        else:
            axes.axvline(value, color="black", linewidth=2)
            axes.annotate(f"{value:+.2f} ", (value, 0.3), ha="right")
    meaning = {
        "raw": "obs[t] was sampled before actions[t] was executed: learn obs[t] -> actions[t]",
        "shift": "obs[t] was sampled after actions[t] was executed: learn obs[t] -> actions[t+1]",
        "unknown": "not measurable in this file: set the alignment by hand",
    }[name]
    fig.suptitle(f"Alignment: {name}, judged by the {evidence['method']}:\n{meaning}")
    found = [f"{key} {evidence[key]:+.2f} control steps" for key in ("fraction", "delay")
             if evidence[key] is not None]
    return describe(fig, f"Measured: {', '.join(found) or 'nothing'}.")


@styled
def plot_augmentation(original, augmented) -> Figure:
    """The same images (n, H, W, 3) without and with augmentation."""
    columns = [f"sample {i + 1}" for i in range(len(original))]
    rows = {"original": upright(original), "augmented": upright(augmented)}
    return _image_grid(rows, columns, "Augmentation, sampled anew for every sample and epoch")


@styled
def plot_places(images, places, names: Sequence[str]) -> Figure:
    """Images (n, H, W, 3) with the predicted position of each object, (n, K, 2) from 0 to 1."""
    side = min(2.4, (MAX_WIDTH - 0.4) / len(images))
    fig = new_figure(side * len(images) + 0.4, side + 1)
    for axes, image, found in zip(fig.subplots(1, len(images), squeeze=False)[0], upright(images),
                                  np.asarray(places), strict=True):
        show_image(axes, image)
        height, width = image.shape[:2]
        for index, ((column, row), name) in enumerate(zip(found, names, strict=True)):
            axes.plot(column * width - 0.5, (1 - row) * height - 0.5, linestyle="",
                      marker="o^s"[index // len(PALETTE) % 3], markersize=7,
                      markerfacecolor="none", markeredgewidth=1.6,
                      color=PALETTE[index % len(PALETTE)], label=name.replace("_", " "))
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center",
               ncols=min(len(names), 4))
    fig.suptitle("Predicted object positions in the agent view")
    return describe(fig, f"{len(images)} images, each with a mark for "
                         f"{', '.join(name.replace('_', ' ') for name in names)}.")


@styled
def plot_batch(batch: Mapping, count: int = 6) -> Figure:
    """First samples of a batch: each camera's image and the first action, normalised."""
    cameras = [key for key in batch["observations"] if key in schema.CAMERAS]
    size = len(batch["actions"])
    actions = np.asarray(batch["actions"]).reshape(size, -1, schema.ACTION_DIM)[:, 0]
    count = min(count, size)
    side = min(1.9, (MAX_WIDTH - 0.8) / count)
    fig = new_figure(side * count + 0.8, side * len(cameras) + 2.1)
    grid = fig.subplots(len(cameras) + 1, count, squeeze=False)
    for line, camera in zip(grid, cameras, strict=False):
        for axes, images in zip(line, batch["observations"][camera], strict=False):
            show_image(axes, upright(images[0]))
        line[0].set_ylabel(schema.CAMERA_TITLES[camera])
    limit = 1.1 * max(1.0, np.abs(actions[:count]).max())
    for i, axes in enumerate(grid[-1]):
        axes.barh(schema.ACTION_NAMES, actions[i], color=BLUE)
        axes.axvline(0, color=GREY, linewidth=0.6)
        axes.set(xlim=(-limit, limit))
        axes.invert_yaxis()
        axes.tick_params(labelleft=i == 0)
        grid[0, i].set_title(f"sample {i + 1}")
    fig.supxlabel("normalised action")
    fig.suptitle(f"The first {count} of {size} samples in a batch, each at its first step")
    return describe(fig, f"{' and '.join(schema.CAMERA_TITLES[camera] for camera in cameras)} of "
                         "each sample, and its seven normalised action values.")


# --- how the notebooks explain actions, masks and recursions --------------------------------------
_LABEL_BOX = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}


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
        fig.axes[0].text((edges[start] + edges[end]) / 2, 1.02, phases[start], ha="center",
                         va="bottom", transform=fig.axes[0].get_xaxis_transform())
    order = ", then ".join(phases[start] for start in starts)
    return describe(fig, f"{fig.finding} Phases: {order}. The arm is pushed in "
                         f"{np.count_nonzero(pushed)} of {len(phases)} steps.")


@styled
def plot_chunk_mask(mask, title: str) -> Figure:
    """The chunk mask (T, K) of a whole demonstration: a column per step, a row per action."""
    mask = np.asarray(mask)
    steps, chunk = mask.shape
    beyond = np.arange(steps)[:, None] + np.arange(chunk) >= steps
    kinds = np.where(mask > 0, 0, np.where(beyond, 2, 1))
    names = ("counts in the loss", "after a push", "past the end")
    colours = (BLUE, ORANGE, "white")
    fig = new_figure(9, 1.5 + 0.2 * chunk)
    axes = fig.subplots()
    axes.imshow(kinds.T, aspect="auto", cmap=matplotlib.colors.ListedColormap(colours), vmin=-0.5,
                vmax=2.5, extent=(-0.5, steps - 0.5, chunk + 0.5, 0.5))
    for edge in np.arange(1, chunk) + 0.5:
        axes.axhline(edge, color="white", linewidth=0.8)
    axes.set(xlabel="step of the demonstration at which the chunk begins", title=title,
             ylabel="action of\nthe chunk")
    for axis in (axes.xaxis, axes.yaxis):
        count_axis(axis)
    counts = [int((kinds == kind).sum()) for kind in range(3)]
    fig.legend(handles=[matplotlib.patches.Patch(facecolor=colour, edgecolor="grey", label=name)
                        for colour, name in zip(colours, names, strict=True)],
               loc="outside lower center", ncols=3)
    return describe(fig, "; ".join(f"{name}: {count} of {mask.size} actions"
                                   for name, count in zip(names, counts, strict=True)) + ".")


@styled
def plot_recursions() -> Figure:
    """A drawing of both recursions: of ``variant="block"`` and of ``variant="trm"``."""
    fig = new_figure(9, 4.8)
    block, trm = fig.subplots(1, 2)
    for axes, title, start in ((block, "block: one state h", "h starts as x"),
                               (trm, "trm: an answer y and a latent z, one network",
                                "y and z start as\nfixed random values")):
        axes.set(xlim=(0, 10), ylim=(0, 10), title=title)
        axes.axis("off")
        _box(axes, 9.5, "images, proprioception, task", "white")
        _down(axes, 9.0, 8.5, "encoders, once")
        _box(axes, 8.0, "x, the encoded observation", SKY)
        _down(axes, 7.5, 6.1 if axes is trm else 5.5)
        axes.text(6.3, 7.1, start, va="center", style="italic")
        _box(axes, 0.5, "K actions of seven numbers", "white")
        _dashed(axes, 0.1, 2.5, 9.7, 4.1, "repeated num_recursions times")
    _box(block, 4.8, "h = block(h, x)\nadd x, attention, MLP", ORANGE)
    _back(block, 4.4, 5.2, "h")
    _down(block, 4.1, 1.0)
    block.text(4.1, 1.8, "action head reads h", va="center")
    _dashed(trm, 0.4, 3.2, 7.9, 3.2, "one cycle,\nrepeated T times")
    _box(trm, 5.6, "z = net(x + y + z)", ORANGE)
    trm.annotate("", (5.5, 5.9), (5.5, 5.3), arrowprops={
        "arrowstyle": "-|>", "connectionstyle": "arc,angleA=0,angleB=0,armA=20,armB=20,rad=6",
        "color": "black"})
    trm.text(6.05, 5.6, "z, n times", va="center")
    _down(trm, 5.1, 4.7, "z")
    _box(trm, 4.2, "y = net(y + z)", ORANGE)
    _back(trm, 4.2, 5.6, "y")
    _down(trm, 3.7, 1.0)
    trm.text(4.1, 1.8, "action head reads the last K tokens of y", va="center")
    fig.suptitle("Two recursions: the same weights, applied to their own output")
    return describe(fig, "block: h = block(h, x), num_recursions times, then the action head reads "
                         "h. trm: n times z = net(x + y + z), then y = net(y + z), for T cycles in "
                         "each recursion; the action head reads the last K tokens of y.")


def _dashed(axes, left: float, bottom: float, width: float, height: float, label: str) -> None:
    """A dashed frame around what is repeated, with a label in its lower right corner."""
    axes.add_patch(matplotlib.patches.Rectangle((left, bottom), width, height, fill=False,
                                                linestyle="--"))
    axes.text(left + width - 0.2, bottom + 0.15, label, ha="right", va="bottom")


def _box(axes, height: float, text: str, colour: str) -> None:
    axes.text(3.75, height, text, ha="center", va="center", bbox={
        "facecolor": matplotlib.colors.to_rgba(colour, 0.35), "edgecolor": "black",
        "boxstyle": "round,pad=0.4"})


def _back(axes, start: float, end: float, label: str) -> None:
    """An arrow from an output on the left side of its box to the input of the next application."""
    axes.annotate("", (1.95, end), (1.95, start), arrowprops={
        "arrowstyle": "-|>", "connectionstyle": "arc,angleA=180,angleB=180,armA=28,armB=28,rad=6",
        "color": "black"})
    axes.text(0.8, (start + end) / 2, label, ha="right", va="center")


def _down(axes, start: float, end: float, label: str = "") -> None:
    axes.annotate("", (3.75, end), (3.75, start), arrowprops={
        "arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0})
    axes.text(4.1, (start + end) / 2, label, va="center")


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
               title="change of the state, % of its new norm")
    label_right(change, {name: (100 * values[-1], colour) for (name, values), colour
                         in zip(changes.items(), PALETTE, strict=False)})
    cells = table.imshow(actions.T, aspect="auto", cmap="PuOr", vmin=-1.5, vmax=1.5)
    table.set(xticks=steps, yticks=range(schema.ACTION_DIM), yticklabels=schema.ACTION_NAMES,
              xlabel=f"{unit}s completed", title="first of the K actions (final: right)")
    table.axvline(steps[-1] - 0.5, color="black", linewidth=2)
    if len(steps) <= 8:  # numbers would overlap
        for (step, dim), value in np.ndenumerate(np.round(actions, 2) + 0.0):  # no -0.00
            table.text(step, dim, f"{value:+.2f}", ha="center", va="center")
    else:
        fig.colorbar(cells, ax=table)
    count_axis(change.xaxis)
    fig.suptitle(title)
    distance = np.abs(actions - actions[-1]).max(axis=1)
    return describe(fig, "Largest distance of the action from the final one: " + ", ".join(
        f"{value:.2f} after {unit} {step}" for step, value in enumerate(distance[:-1])) + ".")


# --- training and search -------------------------------------------------------------------------
@styled
def plot_training_curves(metrics: Sequence[Mapping]) -> Figure:
    """Rows of a run's ``metrics.jsonl``: ``epoch, train_loss, val_loss, lr, seconds``."""
    if not metrics:
        raise ValueError("metrics is empty; expected one row per epoch")
    epoch, train, val, lr = (
        [row[key] for row in metrics] for key in ("epoch", "train_loss", "val_loss", "lr"))
    # the trainer's rule: successes in rollouts first, if there were any
    best = max(range(len(metrics)), key=lambda i: (metrics[i].get("success_rate", -1.0), -val[i]))
    fig = new_figure(MAX_WIDTH, 3.6)
    losses, rates = fig.subplots(1, 2, width_ratios=(3, 2))
    marker = "o" if len(metrics) == 1 else None
    losses.plot(epoch, train, marker=marker, color=BLUE)
    losses.plot(epoch, val, marker=marker, color=RED, linestyle="--")
    losses.plot(epoch[best], val[best], "*", color="black", markersize=11, linestyle="none",
                label=f"best: epoch {epoch[best]}, {val[best]:.4g}")
    losses.set(xlabel="epoch", ylabel="loss (log scale)", title="Loss")
    losses.legend()
    rates.plot(epoch, lr, marker=marker, color=GREEN)
    rates.set(xlabel="epoch", ylabel="learning rate (log scale)", title="Learning rate")
    for axes in (losses, rates):
        log_axis(axes.yaxis)
        count_axis(axes.xaxis)
    label_right(losses, {"training": (train[-1], BLUE), "validation": (val[-1], RED)})
    minutes = sum(row["seconds"] for row in metrics) / 60
    fig.suptitle(f"Training: {len(metrics)} epochs in {minutes:.1f} minutes")
    return describe(fig, f"Training loss from {train[0]:.4g} to {train[-1]:.4g}; validation loss "
                         f"from {val[0]:.4g} to {val[-1]:.4g}, best {val[best]:.4g} in epoch "
                         f"{epoch[best]}.")


@styled
def plot_latency(depths: Sequence[int], milliseconds: Sequence[float]) -> Figure:
    """Time of one decision against the number of recursions."""
    axes = new_axes(6, 3.2)
    axes.plot(depths, milliseconds, marker="o")
    axes.set(xlabel="recursions", ylabel="milliseconds per decision", ylim=(0, None),
             title="Time of a decision (one observation, median)")
    count_axis(axes.xaxis)
    return describe(axes.figure, f"{milliseconds[0]:.1f} ms at depth {depths[0]}, "
                                 f"{milliseconds[-1]:.1f} ms at depth {depths[-1]}.")


# --- evaluation ----------------------------------------------------------------------------------
@styled
def plot_success(summaries: Mapping[str, Mapping]) -> Figure:
    """Success rate per task with 95 % Wilson intervals, for each policy by name.

    Values are summaries of `stats.summarize_episodes`; with several tasks, a last group of bars
    shows them together.
    """
    groups = {name: {f"{task['suite'].removeprefix('libero_')} {task['task_id']}": task
                     for task in summary["tasks"]} for name, summary in summaries.items()}
    labels = list(dict.fromkeys(label for tasks in groups.values() for label in tasks))
    if len(labels) > 1:
        labels.append("all")
        for name, summary in summaries.items():
            groups[name]["all"] = summary
    width = 0.8 / len(groups)
    bars = len(labels) * len(groups)
    crowded, full = bars > 16, bars > 40  # counts stand upright, then there is no room for them
    fig = new_figure(np.clip(0.65 * bars + 1.6, 4.8, MAX_WIDTH), 4.2 if crowded else 3.8)
    axes = fig.subplots()
    for number, (name, tasks) in enumerate(groups.items()):
        places = [i for i, label in enumerate(labels) if label in tasks]
        success_bars(axes, np.array(places) + (number - (len(groups) - 1) / 2) * width,
                     [tasks[labels[i]] for i in places], 0.9 * width, vertical=True, label=name,
                     labels=[""] * len(places) if full else (),
                     hatch=HATCHES[number % len(HATCHES)], text={"rotation": 90 if crowded else 0})
    axes.set(xticks=range(len(labels)), xticklabels=labels, xlim=(-0.8, len(labels) - 0.2),
             xlabel="suite and task", ylim=(0, 126 if crowded and not full else 112),
             yticks=range(0, 101, 20), ylabel="success rate (%)",
             title="Success rate with 95 % Wilson interval"
                   + "\n(above: successes/episodes)" * (not full))
    if len(groups) > 1:
        fig.legend(loc="outside lower center", ncols=3)
    return describe(fig, "; ".join(f"{name}: {format_success(summary)}"
                                   for name, summary in summaries.items()) + ".")


@styled
def plot_episode_lengths(rows: Sequence[Mapping], horizon: int = 0) -> Figure:
    """Histogram of episode lengths by outcome, from rows with ``steps`` and ``success``."""
    lengths = [[row["steps"] for row in rows if bool(row["success"]) is outcome]
               for outcome in (True, False)]
    axes = _length_axes(horizon, "episodes", f"Lengths of {len(rows)} episodes")
    axes.hist(lengths, bins=20, stacked=True, color=[BLUE, ORANGE], hatch=["", "//"], rwidth=0.9,
              label=[f"succeeded ({len(lengths[0])})", f"failed ({len(lengths[1])})"])
    axes.legend()
    spans = [f"{len(each)} {outcome} after {min(each)} to {max(each)} steps"
             for outcome, each in zip(("succeeded", "failed"), lengths, strict=True) if each]
    return describe(axes.figure, f"{'; '.join(spans) or 'No episode'}.")


@styled
def plot_episode_tiles(rows: Sequence[Mapping]) -> Figure:
    """A tile per episode: task by init state, with outcome and, of up to 15, length in seconds."""
    tasks = sorted({(row["suite"], row["task_id"]) for row in rows})
    states = sorted({row["init_state"] for row in rows})
    fig = new_figure(np.clip(0.55 * len(states) + 1.4, 4.5, 9), 0.55 * len(tasks) + 1.1)
    axes = fig.subplots()
    every = 5 if len(states) > 25 else 1  # label of an init state
    for row in rows:
        x, y = states.index(row["init_state"]), tasks.index((row["suite"], row["task_id"]))
        sign, colour = ("\N{CHECK MARK}", GREEN) if row["success"] else ("\N{BALLOT X}", ORANGE)
        axes.bar(x, 0.9, 0.9, y - 0.45, color=colour, alpha=0.4)
        seconds = f"\n{row['steps'] / schema.CONTROL_HZ:.1f} s" if len(states) <= 15 else ""
        axes.text(x, y, f"{sign}{seconds}", ha="center", va="center")
    axes.set(xticks=range(0, len(states), every), xticklabels=states[::every],
             yticks=range(len(tasks)), xlabel="init state", xlim=(-0.6, len(states) - 0.4),
             yticklabels=[f"{suite.removeprefix('libero_')}, task {task}" for suite, task in tasks],
             ylim=(len(tasks) - 0.4, -0.6))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Episodes: success (\N{CHECK MARK}) or failure (\N{BALLOT X}), and their length")
    failed = [f"{suite} task {task} init state {row['init_state']}" for suite, task in tasks
              for row in rows if (row["suite"], row["task_id"]) == (suite, task)
              and not row["success"]]
    return describe(fig, f"{len(rows) - len(failed)} of {len(rows)} episodes succeeded"
                    + (f"; failed: {', '.join(failed)}." if failed else "."))


@styled
def plot_rollout_strip(frames, steps: Sequence[int], outcome: str) -> Figure:
    """Upright frames (n, H, W, 3) of an episode at its ``steps``; ``outcome`` is the title."""
    columns = [f"step {step} ({step / schema.CONTROL_HZ:.1f} s)" for step in steps]
    return _image_grid({"": np.asarray(frames)}, columns, outcome)
