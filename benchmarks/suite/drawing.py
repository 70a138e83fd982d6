"""The drawing of both recursions, of which ``publish.py write`` stores the image in the package."""

import matplotlib
from matplotlib.figure import Figure

from trm_helpers.visuals.colours import ORANGE, SKY
from trm_helpers.visuals.figure import describe, new_figure, styled


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
