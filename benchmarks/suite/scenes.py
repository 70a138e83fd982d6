"""Tables and figures of docs/recursion.md made from preregistered experiments, for publish.py.

A file of docs/recursion/look-again or docs/recursion/which-bowl is one training of all arms: for
each split the task of every scene, and for each arm a digit per scene, 1 where it was right. One of
docs/recursion/memory holds the episodes of all arms, under one condition, instead.
"""

import functools

import numpy as np

from trm_helpers.stats import interval_text, mcnemar_p, rate_text, wilson_interval
from trm_helpers.visuals import figure
from trm_helpers.visuals.colours import PALETTE

LOOKS = ("first look", "feed-forward, 128 px", "one look", "one look, wide", "untied looks",
         "same crop", "look again, stopped after one", "look again", "look again, 12 looks")
CLOSE = {"close": "within 1 % of the side", "near": "within 5 %"}
STEPS = {1: "recursion, stopped after 1", 2: "recursion, stopped after 2",
         4: "recursion, stopped after 4", 6: "recursion", 12: "recursion, 12 steps",
         18: "recursion, 18 steps"}
BOWLS = ("two layers", "one step", "one step, wide", "six layers", *STEPS.values())
RIGHT = {"right": "right bowl"}
CONTROL = ("one look", "six looks")
PLANNED = ("last seen", "stacked", "gru", "reset", "carried, one step", "carried")
GATED = ("gated", "memory token, one step", "memory token")
MEMORY = (*PLANNED, *GATED)
REMEMBERING = ("carried, one step", "carried", *GATED)  # recursions with a memory
CONDITIONS = {"fourth": "seen at every fourth decision", "first": "seen at the first decision only"}
SOLVED = {"success": "episodes solved"}


def hits(stored: list[dict], split: str, arm: str, what: str) -> np.ndarray:
    """(runs, scenes): 1 where the arm was right."""
    return np.array([[int(digit) for digit in run["splits"][split]["arms"][arm][what]]
                     for run in stored])


def gap_interval(stored: list[dict], split: str, arms: tuple[str, str],
                 what: str) -> tuple[float, float] | None:
    """95 % of the first arm's gap to the second when tasks and seeds are resampled, in points.

    None if a task was not run with each of the seeds.
    """
    cells = {}  # (suite, seed, task): the gap
    for run in stored:
        tasks = np.array(list(run["splits"][split]["tasks"]), dtype=int)
        first, second = (hits([run], split, arm, what)[0] for arm in arms)
        for task in set(tasks):
            cells[run["suite"], run["seed"], task] = 100 * (first - second)[tasks == task].mean()
    tasks = sorted({(suite, task) for suite, _, task in cells})
    seeds = sorted({seed for _, seed, _ in cells})
    if len(cells) < len(tasks) * len(seeds):
        return None
    table = np.array([[cells[suite, seed, task] for seed in seeds] for suite, task in tasks])
    low, high = np.percentile(_resampled_means(table), [2.5, 97.5])
    return float(low), float(high)


def gap_cells(runs: list[dict], split: str, arms: tuple[str, str], what: str) -> list[str]:
    """The first arm's gap to the second with its exact McNemar p, and the gap's interval."""
    best, found = (hits(runs, split, arm, what) for arm in arms)
    better, worse = int((best > found).sum()), int((best < found).sum())
    p = mcnemar_p(better, worse)
    gap = 100 * (best.mean() - found.mean())
    interval = gap_interval(runs, split, arms, what)
    ends = "{:+.1f} to {:+.1f}".format(*interval) if interval else ""
    return [f"{gap:+.1f}, p {'< 0.001' if p < 0.001 else f'= {p:.2g}'} "
            f"({better} against {worse})", ends]


def resampled(runs: list[dict]) -> str:
    """The title of a column of ``gap_interval``."""
    several = len({run["seed"] for run in runs}) > 1
    return f"95 %, tasks {'and seeds ' * several}resampled"


def _resampled_means(table: np.ndarray) -> np.ndarray:
    """(R,): means of a table (tasks, seeds) whose rows and columns are resampled."""
    of_tasks, of_seeds = _weights(*table.shape)
    return np.einsum("rt,ts,rs->r", of_tasks, table, of_seeds).round(9)  # ties print alike


@functools.cache
def _weights(tasks: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """(R, tasks) and (R, seeds): the share of each row and column in each of R resamples."""
    generator = np.random.default_rng(0)
    weights = [tuple(np.bincount(generator.integers(count, size=count), minlength=count) / count
                     for count in (tasks, seeds)) for _ in range(10_000)]
    of_tasks, of_seeds = map(np.array, zip(*weights, strict=True))
    return of_tasks, of_seeds


def having(stored: list[dict], split: str, arm: str) -> list[dict]:
    """The runs in which an arm was trained."""
    return [run for run in stored if arm in run["splits"][split]["arms"]]


def lines(stored: list[dict], split: str, arms: tuple[str, ...], reference: str,
          measures: dict[str, str]) -> list[list[str]]:
    """A head and one line per arm, all suites and seeds together.

    The reference is compared with each arm by the first measure; the others are only listed.
    """
    (what, title), *others = measures.items()
    arms = tuple(arm for arm in arms if having(stored, split, arm))
    table = [["policy" if measures is SOLVED else "network", title, "95 % Wilson interval",
              f"{reference} against it: gap in points, p",
              resampled(having(stored, split, reference) or stored),
              *(name for _, name in others)]]
    for arm in arms:
        runs = having(stored, split, arm)
        found = hits(runs, split, arm, what)
        interval = interval_text(*wilson_interval(int(found.sum()), found.size), 1)
        seeds = sorted({run["seed"] for run in runs})
        name = arm if len(runs) == len(stored) else f"{arm} (seed {', '.join(map(str, seeds))})"
        row = [name, f"{100 * found.mean():.1f} %", f"{interval} %"]
        if arm == reference:
            row += ["reference", ""]
        else:
            both = having(runs, split, reference)
            row += gap_cells(both, split, (reference, arm), what) if both else ["", ""]
        table.append([*row, *(f"{100 * hits(runs, split, arm, other).mean():.1f} %"
                              for other, _ in others)])
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
        axes.set(xlabel="looks (at most 6 in training)",
                 title=suite.replace("libero_", "LIBERO-").title().replace("Libero", "LIBERO"))
    fig.axes[0].set(ylabel="scenes within 1 % of the side (%)")
    fig.axes[-1].legend(loc="lower right")
    fig.suptitle("Accuracy after each look (a line per seed; without marks: their mean)")
    shares = {arm: 100 * hits(stored, "test", arm, "close").mean()
              for arm in ("first look", "one look", "look again")}
    return figure.describe(fig, "; ".join(f"{arm}: {share:.0f} % of all scenes"
                                         for arm, share in shares.items()) + ".")


@figure.styled
def plot_bowls(stored: list[dict]):
    """Share of scenes with the right bowl by the number of steps, a line for each seed."""
    fig = figure.new_figure(9, 3.8)
    titles = {"test": "two to four bowls, as in training", "more": "five and six bowls"}
    for axes, (split, title) in zip(fig.subplots(1, 2, sharey=True), titles.items(), strict=True):
        shares = 100 * np.array([hits(stored, split, arm, "right").mean(1)
                                 for arm in STEPS.values()])
        axes.plot(list(STEPS), shares, "o-", color=PALETTE[0], markersize=4)
        axes.plot([], [], "o-", color=PALETTE[0], markersize=4, label="recursion")
        for arm, colour, style in zip(BOWLS[:4], PALETTE[1:5], ("--", ":", "-.", "-"), strict=True):
            axes.axhline(100 * hits(stored, split, arm, "right").mean(), color=colour,
                         linestyle=style, label=arm)
        axes.axvline(6, color="grey", linewidth=1)
        figure.count_axis(axes.xaxis)
        axes.set(xlabel="steps (at most 6 in training)", title=title)
    fig.axes[0].set(ylabel="scenes with the right bowl (%)")
    fig.axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.suptitle("Accuracy by the number of steps (a line per seed; without marks: their mean)")
    return figure.describe(fig, "; ".join(
        f"{arm}: {100 * hits(stored, 'test', arm, 'right').mean():.0f} % of the scenes with two to "
        f"four bowls, {100 * hits(stored, 'more', arm, 'right').mean():.0f} % with more"
        for arm in BOWLS) + ".")


def show_control(stored: list[dict], markdown):
    """Table of policies with one look and with six in the same episodes, stored by ``add``."""
    played = {(row["results"]["protocol"]["suite"], row["seed"], row["label"]): row
              for row in stored}
    runs = []
    for suite, seed in dict.fromkeys(key[:2] for key in sorted(played)):
        if not all((suite, seed, arm) in played for arm in CONTROL):
            continue
        arms = {arm: {(each["task_id"], each["init_state"]): each["success"]
                      for each in played[suite, seed, arm]["episodes"]} for arm in CONTROL}
        episodes = sorted(set.intersection(*map(set, arms.values())))
        runs.append({"suite": suite, "seed": seed, "splits": {"played": {
            "tasks": [task for task, _ in episodes],
            "arms": {arm: {"success": [won[episode] for episode in episodes]}
                     for arm, won in arms.items()}}}})
    table = [["policies", *CONTROL, "gap in points, p", resampled(runs)]]
    groups = {f"{run['suite']}, seed {run['seed']}": [run] for run in runs}
    for name, some in (groups | ({"all": runs} if len(runs) > 1 else {})).items():
        found = [hits(some, "played", arm, "success") for arm in CONTROL]
        table.append([name, *(rate_text(int(won.sum()), won.size) for won in found),
                      *gap_cells(some, "played", CONTROL[::-1], "success")])
    return markdown(table), None


def played_by_arms(stored: list[dict], condition: str) -> list[dict]:
    """The trainings under one condition as ``lines`` takes them, a digit for each episode."""
    runs = []
    for run in stored:
        if run["condition"] == condition:
            rows = {arm: sorted(played, key=lambda row: (row["task_id"], row["init_state"]))
                    for arm, played in run["arms"].items()}
            (episodes,) = {tuple((row["task_id"], row["init_state"]) for row in played)
                           for played in rows.values()}  # the same of every arm
            runs.append({"suite": "libero_spatial", "seed": run["seed"], "splits": {"played": {
                "tasks": [task for task, _ in episodes],
                "arms": {arm: {"success": [row["success"] for row in played]}
                         for arm, played in rows.items()}}}})
    return runs


def show_memory(stored: list[dict], markdown):
    """A table for each condition, and the figure."""
    runs = {condition: played_by_arms(stored, condition) for condition in CONDITIONS}
    runs = {condition: found for condition, found in runs.items() if found}
    tables = []
    for condition, found in runs.items():
        tables.append(f"The agent view is {CONDITIONS[condition]}:\n\n"
                      + markdown(lines(found, "played", PLANNED, "carried", SOLVED)))
        if any(having(found, "played", arm) for arm in GATED):
            arms = ("gru", "reset", *GATED)
            tables.append("With a gate (exploratory):\n\n"
                          + markdown(lines(found, "played", arms, "memory token", SOLVED)))
    return "\n".join(tables), plot_memory(runs)


@figure.styled
def plot_memory(runs: dict[str, list[dict]]):
    """Success of each arm: all seeds with the interval, and a small mark for each seed."""
    arms = [arm for arm in MEMORY
            if any(having(found, "played", arm) for found in runs.values())]
    fig = figure.new_figure(5 + 3.5 * (len(runs) - 1), 1.6 + 0.4 * len(arms))
    described = []
    for axes, (condition, found) in zip(
            fig.subplots(1, len(runs), sharey=True, squeeze=False)[0], runs.items(), strict=True):
        for place, arm in enumerate(arms):
            if won := [hits([run], "played", arm, "success")
                       for run in having(found, "played", arm)]:
                solved, played = sum(int(one.sum()) for one in won), sum(one.size for one in won)
                rate = 100 * solved / played
                low, high = (100 * end for end in wilson_interval(solved, played))
                axes.errorbar(rate, place, xerr=[[rate - low], [high - rate]], fmt="o", capsize=3,
                              color=PALETTE[0] if arm in REMEMBERING else "0.35")
                if len(won) > 1:
                    axes.plot([100 * one.mean() for one in won], [place + 0.25] * len(won), "|",
                              color="0.5")
                described.append(f"{arm}, {CONDITIONS[condition]}: {solved} of {played}")
        axes.set(xlim=(-3, 103), xlabel="episodes solved (%)", title=CONDITIONS[condition],
                 ylim=(-0.6, len(arms) - 0.4), yticks=range(len(arms)), yticklabels=arms)
    seeds = "; above: each seed" * (max(map(len, runs.values())) > 1)
    fig.suptitle(f"A camera that blinks\n(whiskers: 95 % Wilson interval{seeds})")
    return figure.describe(fig, "; ".join(described) + ".")


def show_looks(stored: list[dict], markdown):
    """Tables of the test scenes and of exchanged objects, and the figure."""
    test, swap = (markdown(lines(stored, split, LOOKS, "look again", CLOSE))
                  for split in ("test", "swap"))
    return (f"{test}\nFirst frames of LIBERO-PRO's exchanged objects:\n\n{swap}",
            plot_looks(stored))


def show_bowls(stored: list[dict], markdown):
    """Tables of the test scenes and of those with more bowls, and the figure."""
    test, more = (markdown(lines(stored, split, BOWLS, "recursion", RIGHT))
                  for split in ("test", "more"))
    return f"{test}\nFive and six bowls, which training never shows:\n\n{more}", plot_bowls(stored)
