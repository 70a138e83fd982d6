"""Tables and figure of docs/recursion.md made from docs/recursion/look-again, for publish.py."""

import numpy as np
from scipy.stats import binomtest

from trm_helpers.stats import wilson_interval
from trm_helpers.visuals import figure
from trm_helpers.visuals.colours import PALETTE

RECURSION = "look again"
ORDER = ("first look", "feed-forward, 128 px", "one look", "one look, wide", "untied looks",
         "same crop", "look again, stopped after one", RECURSION, "look again, 12 looks")


def hits(stored: list[dict], split: str, arm: str, what: str) -> np.ndarray:
    """(runs, scenes): 1 where object and target are close enough."""
    return np.array([[int(digit) for digit in run["splits"][split]["arms"][arm][what]]
                     for run in stored])


def gap_interval(stored: list[dict], split: str, arm: str) -> tuple[float, float]:
    """95 % of the recursion's gap to an arm when tasks and seeds are resampled, in points."""
    cells = {}  # (suite, seed, task): the gap
    for run in stored:
        tasks = np.array(list(run["splits"][split]["tasks"]), dtype=int)
        gap = (hits([run], split, RECURSION, "close") - hits([run], split, arm, "close"))[0]
        for task in set(tasks):
            cells[run["suite"], run["seed"], task] = 100 * gap[tasks == task].mean()
    tasks = sorted({(suite, task) for suite, _, task in cells})
    seeds = sorted({seed for _, seed, _ in cells})
    table = np.array([[cells[suite, seed, task] for seed in seeds] for suite, task in tasks])
    generator = np.random.default_rng(0)
    means = [table[np.ix_(generator.integers(len(tasks), size=len(tasks)),
                          generator.integers(len(seeds), size=len(seeds)))].mean()
             for _ in range(10_000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def having(stored: list[dict], split: str, arm: str) -> list[dict]:
    """The runs in which an arm was trained."""
    return [run for run in stored if arm in run["splits"][split]["arms"]]


def lines(stored: list[dict], split: str) -> list[list[str]]:
    """A head and one line per arm: all suites and seeds together."""
    table = [["arm", "within 1 % of the side", "95 % Wilson interval",
              f"{RECURSION} against it: gap in points, p", "95 %, tasks and seeds resampled",
              "within 5 %"]]
    for arm in ORDER:
        runs = having(stored, split, arm)
        recursion, close, near = (hits(runs, split, *which) for which in (
            (RECURSION, "close"), (arm, "close"), (arm, "near")))
        low, high = wilson_interval(int(close.sum()), close.size)
        seeds = sorted({run["seed"] for run in runs})
        name = arm if len(runs) == len(stored) else f"{arm} (seed {', '.join(map(str, seeds))})"
        row = [name, f"{100 * close.mean():.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"]
        if arm == RECURSION:
            row += ["reference", ""]
        else:
            better, worse = int((recursion > close).sum()), int((recursion < close).sum())
            p = binomtest(better, better + worse).pvalue if better + worse else 1.0
            gap = 100 * (recursion.mean() - close.mean())
            from_, to = gap_interval(runs, split, arm)
            row += [f"{gap:+.1f}, p {'< 0.001' if p < 0.001 else f'= {p:.2g}'} "
                    f"({better} against {worse})", f"{from_:+.1f} to {to:+.1f}"]
        table.append([*row, f"{100 * near.mean():.1f} %"])
    return table


@figure.styled
def plot_looks(stored: list[dict]):
    """Share of test scenes within 1 % after each look, a line for each seed."""
    fig = figure.new_figure(9, 3.8)
    suites = sorted({run["suite"] for run in stored})
    for axes, suite in zip(fig.subplots(1, len(suites), sharey=True, squeeze=False)[0], suites,
                           strict=True):
        runs = [run for run in stored if run["suite"] == suite]
        for arm, colour, style in (("look again, 12 looks", PALETTE[0], "o-"),
                                   ("untied looks", PALETTE[1], "s--"),
                                   ("same crop", PALETTE[2], "^:")):
            by_looks = 100 * np.array([run["splits"]["test"]["arms"][arm]["close by looks"]
                                       for run in runs])
            axes.plot(by_looks.T, style, color=colour, markersize=4)
            axes.plot([], [], style, color=colour, label=arm.removesuffix(", 12 looks"))
        for arm, colour, style in (("one look, wide", PALETTE[3], "--"),
                                   ("feed-forward, 128 px", PALETTE[4], ":")):
            share = 100 * hits(having(runs, "test", arm), "test", arm, "close").mean()
            axes.axhline(share, color=colour, linestyle=style, label=arm)
        axes.axvline(6, color="grey", linewidth=1)
        figure.count_axis(axes.xaxis)
        axes.set(xlabel="looks (at most 6 in training)", title=suite)
    fig.axes[0].set(ylabel="scenes within 1 % of the side (%)")
    fig.axes[-1].legend(loc="lower right")
    fig.suptitle("Accuracy after each look")
    shares = {arm: 100 * hits(stored, "test", arm, "close").mean()
              for arm in ("first look", "one look", RECURSION)}
    return figure.describe(fig, "; ".join(f"{arm}: {share:.0f} % of all scenes"
                                         for arm, share in shares.items()) + ".")


def show(stored: list[dict], markdown):
    """Tables of the test scenes and of exchanged objects, and the figure."""
    test, swap = (markdown(lines(stored, split)) for split in ("test", "swap"))
    return (f"{test}\nFirst frames of LIBERO-PRO's exchanged objects:\n\n{swap}",
            plot_looks(stored))
