"""Figures of the localizer: where it sees the goal's objects, and how it corrects that.

Images are as they are stored, upside down; positions are columns and rows from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..policy.localizer import CROP, crops
from ..sim.render import upright
from .colours import ORANGE, PALETTE
from .figure import MAX_WIDTH, describe, new_figure, show_image, styled


@styled
def plot_places(images, places, names: Sequence[str]) -> Figure:
    """Images (n, H, W, 3) with the predicted position of each object, (n, K, 2) from 0 to 1."""
    side = min(2.4, (MAX_WIDTH - 0.4) / len(images))
    fig = new_figure(side * len(images) + 0.4, side + 1)
    for axes, image, found in zip(fig.subplots(1, len(images), squeeze=False)[0], upright(images),
                                  np.asarray(places), strict=True):
        show_image(axes, image)
        axes.autoscale(False)  # an estimate may lie outside of it
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
def plot_looks(images, trails, names: Sequence[str], name: str) -> Figure:
    """What a localizer sees in each look: the crop around its estimate of one keypoint.

    Args:
        images: (n, H, W, 3) uint8; a row each of the two in which the estimate moves most.
        trails: (n, 1 + looks, K, 2), as of :func:`keypoints.predicted_keypoints`.
        names: of the K keypoints.
        name: the one that is shown.
    """
    images, trail = np.asarray(images), np.asarray(trails)[:, :, list(names).index(name)]
    size = np.array(images.shape[2:0:-1])  # width, height
    looks, label = trail.shape[1] - 1, name.replace("_", " ")
    most = np.linalg.norm(trail[:, -1] - trail[:, 0], axis=-1).argsort()[:-3:-1]
    images, trail = images[most], trail[most]
    seen = crops(torch.from_numpy(images).float() / 255, torch.from_numpy(trail).float())
    seen = upright(seen.permute(0, 1, 3, 4, 2).numpy())
    moved = np.linalg.norm(np.diff(trail, axis=1) * size, axis=-1)  # (n, looks) pixels
    side = MAX_WIDTH / (looks + 2)
    fig = new_figure(MAX_WIDTH, side * len(images) + 1.1)
    grid = fig.subplots(len(images), looks + 2, squeeze=False)
    for line, image, where, crop, steps in zip(grid, upright(images), trail, seen, moved,
                                               strict=True):
        show_image(line[0], image)
        line[0].autoscale(False)  # a crop may reach beyond it
        columns, rows = (where * (1, -1) + (0, 1)).T * size[:, None] - 0.5
        line[0].plot(columns, rows, ".-", color=ORANGE, markersize=4, linewidth=1)
        line[0].add_patch(Rectangle((columns[0] - CROP / 2, rows[0] - CROP / 2), CROP, CROP,
                                    fill=False, edgecolor=ORANGE, linewidth=1.2))
        for number, (axes, part) in enumerate(zip(line[1:], crop, strict=True)):
            show_image(axes, part)
            away = (where[-1] - where[number]) * size * (1, -1) + (CROP - 1) / 2
            axes.plot(*np.clip(away, 0, CROP - 1), "o", color=ORANGE, markersize=11,
                      markerfacecolor="none", markeredgewidth=1.6)
            axes.plot(*[(CROP - 1) / 2] * 2, "+", color="white", markersize=9, markeredgewidth=1.6)
            axes.set_xlabel(f"moves {steps[number]:.1f} px" if number < looks else "the answer")
    grid[0, 0].set_title("frame")
    for number, axes in enumerate(grid[0, 1:-1], start=1):
        axes.set_title(f"look {number}")
    grid[0, -1].set_title(f"after {looks}")
    fig.suptitle(f"Looking again at the {label}: {CROP} x {CROP} pixels around each estimate "
                 "(square: those of look 1).\n"
                 "Cross: the estimate before this look; ring: the final one")
    return describe(fig, "; ".join(
        f"Image {number}: moved by {', '.join(f'{step:.1f}' for step in steps)} pixels"
        for number, steps in enumerate(moved, start=1)) + ".")
