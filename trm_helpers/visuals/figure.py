"""What all figures share: style, alt text, axes, and bars of success rates.

Every figure is a :class:`DescribedFigure`: notebooks show it and :func:`save_figure` writes it,
with its alt text. Text has at least 9 points in a column of 9 inches.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image

from ..files import atomic_path
from .colours import PALETTE

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
    """A figure with alt text, shown by notebooks where it is displayed or returned."""

    finding = ""

    def _ipython_display_(self) -> None:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=SCREEN_DPI, bbox_inches="tight")
        _show(buffer.getvalue(), alt_text(self))


class StoredFigure:
    """A PNG file of :func:`save_figure`, shown by notebooks as the figure itself."""

    def __init__(self, path: Path):
        self.path = path

    def _ipython_display_(self) -> None:
        with Image.open(self.path) as image:
            _show(self.path.read_bytes(), image.info["Description"])


# a drawing of both recursions, of ``variant="block"`` and of ``variant="trm"``
RECURSIONS = StoredFigure(Path(__file__).with_name("recursions.png"))


def _show(png: bytes, text: str) -> None:
    """Display an image in a notebook, with ``text`` as its alt text.

    Jupyter keeps the alt text in the output's metadata. Most front ends do not show it from there,
    so it also follows the image, as a description to unfold.
    """
    from IPython.display import display

    display({"image/png": base64.b64encode(png).decode(), "text/plain": text},
            metadata={"image/png": {"alt": text}}, raw=True)
    display({"text/markdown": "<details><summary>Description of the figure</summary>\n\n"
                              f"{html.escape(text)}\n\n</details>"}, raw=True)


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
    """Logarithmic, labelled with plain numbers at 1, 2, 3 and 5 of each decade.

    Within one decade every digit is labelled, and a range below a factor of 3 has evenly spaced
    numbers.
    """
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter("{x:g}")
    low, high = getattr(axis.axes, f"get_{axis.axis_name}lim")()
    if high < 3 * low:
        axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
    else:
        digits = "235" if high >= 10 * low else "23456789"
        axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in digits else "")


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
    bars = draw(places, rate, thickness, **{error: whiskers}, capsize=3,
                error_kw={"linewidth": 1}, **{"alpha": 0.85, **look})
    for place, height, bar in zip(places, rate, bars, strict=True):
        if height == 0:  # measured, unlike a place without a bar
            axes.plot(*((place, 0) if vertical else (0, place)), "D", clip_on=False, markersize=4,
                      color=bar.get_facecolor())
    labels = labels or [f"{result['successes']}/{result['episodes']}" for result in results]
    for place, label in zip(places, labels, strict=True):
        at, aligned = ((place, 103), {"ha": "center"}) if vertical else (
            (103, place), {"va": "center"})
        axes.text(*at, label, **{**aligned, **text})
