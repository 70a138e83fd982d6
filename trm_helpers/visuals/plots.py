"""Figures of data, training and evaluation.

They take images as they are stored, upside down; :func:`plot_rollout_strip` takes upright frames.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import schema
from ..demos.alignment import DELAY_MARGIN, HALF_SUBSTEP, MIDDLE_DELAY
from ..sim.render import upright
from ..stats import counted, duration, format_success
from .colours import BLUE, GREEN, GREY, ORANGE, RED
from .figure import (
    HATCHES,
    MAX_WIDTH,
    count_axis,
    describe,
    label_right,
    log_axis,
    new_axes,
    new_figure,
    show_image,
    styled,
    success_bars,
)
from .figure import save_figure as save_figure  # for notebooks


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
def plot_demo_lengths(lengths: Sequence[int], horizon: int = 0) -> Figure:
    """Histogram of demonstration lengths in steps; ``horizon`` marks the steps of evaluation."""
    mean = np.mean(lengths)
    axes = _length_axes(horizon, "demonstrations",
                        f"Lengths of {counted(len(lengths), 'demonstration')}")
    axes.hist(lengths, bins=_tens(lengths), color=BLUE, rwidth=0.9)
    axes.axvline(mean, color=RED, linestyle="--", label=f"mean {mean:.0f}")
    axes.legend()
    return describe(axes.figure, f"{min(lengths)} to {max(lengths)} steps, mean {mean:.0f}"
                                 f"{f'; horizon {horizon}' if horizon else ''}.")


def _length_axes(horizon: int, ylabel: str, title: str) -> Axes:
    axes = new_axes(6, 3.2)
    if horizon:
        axes.axvline(horizon, color="black", linestyle=":", label=f"horizon {horizon}")
    axes.set(xlabel=f"length (control steps; {schema.CONTROL_HZ} are one second)", ylabel=ylabel,
             title=title)
    count_axis(axes.yaxis)
    return axes


@styled
def plot_alignment(name: str, evidence: Mapping) -> Figure:
    """The evidence of `alignment.measure_alignment`: when stored observations were sampled."""
    fig = new_figure(8, 3.8)
    by_joints, by_delay = fig.subplots(2)
    zones = {"raw": BLUE, "shift": ORANGE, "unknown": GREY}
    low, high = MIDDLE_DELAY - DELAY_MARGIN, MIDDLE_DELAY + DELAY_MARGIN
    panels = (
        (by_joints, "fraction", {"raw": (-1, HALF_SUBSTEP), "shift": (HALF_SUBSTEP, 1)},
         "by joint angles: fraction, time of obs[t] after deciding on actions[t] (control steps)"),
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
def plot_batch(batch: Mapping) -> Figure:
    """First six samples of a batch: each camera's image and the first action."""
    cameras = [key for key in batch["observations"] if key in schema.CAMERAS]
    size = len(batch["actions"])
    actions = np.asarray(batch["actions"]).reshape(size, -1, schema.ACTION_DIM)[:, 0]
    count = min(6, size)
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
    fig.supxlabel("first action of the chunk, as the network is to predict it")
    fig.suptitle(f"The first {count} of {size} samples in a batch")
    return describe(fig, f"{' and '.join(schema.CAMERA_TITLES[camera] for camera in cameras)} of "
                         "each sample, and the seven values of its first action.")


@styled
def plot_chunk_mask(mask, title: str, frame_stride: int = 1, steps: int = 0) -> Figure:
    """The chunk mask (N, K) of a whole demonstration: a column per sample, a row per action.

    Args:
        frame_stride: steps from one sample to the next.
        steps: of the demonstration; 0 is one per sample.
    """
    mask = np.asarray(mask)
    count, chunk = mask.shape
    starts = frame_stride * np.arange(count)
    beyond = starts[:, None] + np.arange(chunk) >= (steps or count)
    kinds = np.where(mask > 0, 0, np.where(beyond, 2, 1))
    names = ("counts in the loss", "after a push", "past the end")
    colours = (BLUE, ORANGE, "white")
    fig = new_figure(9, 1.5 + 0.2 * chunk)
    axes = fig.subplots()
    axes.imshow(kinds.T, aspect="auto", cmap=matplotlib.colors.ListedColormap(colours), vmin=-0.5,
                vmax=2.5, extent=(-0.5, frame_stride * count - 0.5, chunk + 0.5, 0.5))
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


# --- training and policy -------------------------------------------------------------------------
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
    rates.set(xlabel="epoch", ylabel="learning rate (log scale)",
              title="Learning rate after each epoch")
    for axes in (losses, rates):
        log_axis(axes.yaxis)
        count_axis(axes.xaxis)
    label_right(losses, {"training": (train[-1], BLUE), "validation": (val[-1], RED)})
    took = duration(sum(row["seconds"] for row in metrics))
    fig.suptitle(f"Training: {counted(len(metrics), 'epoch')} in {took}")
    return describe(fig, f"Training loss from {train[0]:.4g} to {train[-1]:.4g}; validation loss "
                         f"from {val[0]:.4g} to {val[-1]:.4g}, best {val[best]:.4g} in epoch "
                         f"{epoch[best]}.")


@styled
def plot_latency(depths: Sequence[int], milliseconds: Sequence[float]) -> Figure:
    """Time of one decision against the number of recursions."""
    axes = new_axes(6, 3.2)
    axes.plot(depths, milliseconds, marker="o")
    axes.set(xlabel="recursions", ylabel="milliseconds per decision", ylim=(0, None),
             title="Time of a decision (one observation, fastest of 20)")
    count_axis(axes.xaxis)
    return describe(axes.figure, f"{milliseconds[0]:.1f} ms at depth {depths[0]}, "
                                 f"{milliseconds[-1]:.1f} ms at depth {depths[-1]}.")


# --- evaluation ----------------------------------------------------------------------------------
def short_suite(suite: str) -> str:
    """``goal`` of ``libero_goal``; but ``libero_10`` stays, which a number would not tell."""
    short = suite.removeprefix("libero_")
    return suite if short.isdigit() else short


@styled
def plot_success(summaries: Mapping[str, Mapping]) -> Figure:
    """Success rate per task with 95 % Wilson intervals, for each policy by name.

    Values are summaries of `stats.summarize_episodes`; with several tasks, a last group of bars
    shows them together.
    """
    suites = {task["suite"] for summary in summaries.values() for task in summary["tasks"]}
    (only,) = suites if len(suites) == 1 else ("",)
    groups = {name: {str(task["task_id"]) if only else
                     f"{short_suite(task['suite'])} {task['task_id']}": task
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
             xlabel=f"task of {only}" if only else "suite and task",
             ylim=(0, 126 if crowded and not full else 112),
             yticks=range(0, 101, 20), ylabel="success rate (%)",
             title="Success rate with 95 % Wilson interval"
                   + "\n(above: successes/episodes)" * (not full))
    if len(groups) > 1:
        letters = 13 * fig.get_figwidth()  # in a line
        fig.legend(loc="outside lower center",
                   ncols=int(np.clip(letters // (max(map(len, groups)) + 4), 1, 3)))
    return describe(fig, "; ".join(f"{name}: {format_success(summary)}"
                                   for name, summary in summaries.items()) + ".")


@styled
def plot_episode_lengths(rows: Sequence[Mapping], horizon: int = 0) -> Figure:
    """Histogram of episode lengths by outcome, from rows with ``steps`` and ``success``."""
    lengths = [[row["steps"] for row in rows if bool(row["success"]) is outcome]
               for outcome in (True, False)]
    axes = _length_axes(horizon, "episodes", f"Lengths of {counted(len(rows), 'episode')}")
    axes.hist(lengths, bins=_tens(sum(lengths, [])), stacked=True, color=[BLUE, ORANGE],
              hatch=["", "//"], rwidth=0.9,
              label=[f"succeeded ({len(lengths[0])})", f"failed ({len(lengths[1])})"])
    axes.legend()
    spans = [f"{len(each)} {outcome} after {_span(each)} steps"
             for outcome, each in zip(("succeeded", "failed"), lengths, strict=True) if each]
    return describe(axes.figure, f"{'; '.join(spans) or 'No episode'}.")


def _tens(lengths: Sequence[int]) -> np.ndarray:
    """Edges of bars ten steps wide, each around a multiple of ten, and of one more on each side."""
    least, most = (10 * round(end(lengths, default=0) / 10) for end in (min, max))
    return np.arange(least - 10, most + 21, 10) - 5


def _span(numbers: Sequence[int]) -> str:
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


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
             yticklabels=[f"{short_suite(suite)}, task {task}" for suite, task in tasks],
             ylim=(len(tasks) - 0.4, -0.6))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Episodes: success (\N{CHECK MARK}) or failure (\N{BALLOT X})"
                   + ", and their length" * (len(states) <= 15))
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
