"""Speed of a search with two workers against one, and the cost of a notebook per trial.

    python benchmarks/search.py --rounds 3

The same grid is searched with one worker and with two, into new folders, taking turns. Its trials
are also trained in this process, as a search without notebooks would; the difference is the cost of
papermill, the kernel and its imports. On a machine without a GPU two workers have half the cores
each, one has all. Missing demonstrations are collected first and not timed.
"""

import argparse
import contextlib
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from trm_helpers.config import Config, from_flat
from trm_helpers.demos.collect import ensure_demonstrations
from trm_helpers.evaluation.evaluate import trainer_of
from trm_helpers.search.search import run_search
from trm_helpers.search.space import grid, trial_settings
from trm_helpers.training.runs import create_run


def search_seconds(config: Config, workers: int) -> float:
    """Wall-clock seconds of the whole grid; every trial has to be complete."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        trials = run_search(config.replace(search_workers=workers), Path(folder) / "run")
        taken = time.perf_counter() - begun
    failed = [trial for trial in trials if trial["state"] != "complete"]
    if failed:
        raise RuntimeError(f"{failed[0]['trial']} failed: {failed[0]['error']}")
    return taken


def training_seconds(config: Config, files: dict) -> float:
    """Seconds of the same trainings in this process, data read for each as a notebook does."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRM_ARTIFACTS_DIR"] = folder
        for number, point in enumerate(grid(config.search)):
            trial = trial_settings(config, point, config.train.seed)
            trainer_of(trial, files, create_run(trial, f"trial{number}")).fit()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--trials", type=int, default=4, help="of the preset's grid")
    parser.add_argument("--epochs", type=int, default=3, help="of each")
    parser.add_argument("--num-demos", type=int, default=0, help="0 takes the preset's")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    config = from_flat(given.preset, max_configs=given.trials, search_epochs=given.epochs,
                       num_demos=given.num_demos or None)
    count = len(grid(config.search))
    files = ensure_demonstrations(config)
    taken: dict[str, list[float]] = {"in this process": [], "one worker": [], "two workers": []}
    for number in range(given.rounds):
        print(f"round {number + 1} of {given.rounds}", file=sys.stderr)
        with contextlib.redirect_stdout(io.StringIO()):
            taken["in this process"].append(training_seconds(config, files))
            taken["one worker"].append(search_seconds(config, 1))
            taken["two workers"].append(search_seconds(config, 2))

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
          f"{device}; {count} trials of {given.epochs} epochs, preset {given.preset}; median of "
          f"{given.rounds} rounds (lowest to highest)\n")
    print("| trials | seconds per trial | trials per hour |\n|---|---|---|")
    for name, seconds in taken.items():
        each = sorted(one / count for one in seconds)
        print(f"| {name} | {statistics.median(each):.1f} ({each[0]:.1f} to {each[-1]:.1f}) "
              f"| {3600 / statistics.median(each):.0f} |")
    rounds = list(zip(*taken.values(), strict=True))
    speed = statistics.median(one / two for _, one, two in rounds)
    cost = statistics.median((one - bare) / count for bare, one, _ in rounds)
    print(f"\nTwo workers: {speed:.2f} times the trials per hour of one. A notebook of its own "
          f"costs a trial {cost:.1f} s.")


if __name__ == "__main__":
    main()
