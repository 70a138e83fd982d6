"""Hyper-parameter search: short trainings over the reference's sixteen-point grid, ranked."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from .checkpoint import refuse_other_settings
from .config import Config, SearchConfig
from .data import LIBERODataset
from .files import replacing, write_json
from .train import BehaviorCloningTrainer

_SPIKE = 1.2  # a validation loss this many times the lowest before it
_CONVERGED = 0.9  # of the way from the first validation loss to the lowest
_SAME_LOSS = 1.01  # losses this close count as equal, and the next criterion decides


def grid(config: SearchConfig) -> list[dict]:
    """The settings of every trial: learning rate x width x recursions, or ``max_configs`` of them.

    A part of the grid is spread evenly over it, first and last point included.
    """
    points = [
        {"lr": lr, "hidden_dim": width, "num_recursions": depth}
        for lr, width, depth in itertools.product(
            config.search_lrs, config.search_hidden_dims, config.search_num_recursions)
    ]
    count = config.max_configs
    if not count or count >= len(points):
        return points
    if count == 1:
        return points[:1]
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def run_search(config: Config, files: dict[int, Path], run: str | Path) -> list[dict]:
    """Train every point of the grid for ``search_epochs`` and rank the trials.

    Each trial has a folder in ``<run>/search/`` and a trial that is complete there is not run
    again. Writes ``trials.json`` (ranked) and ``best.yaml``, which
    ``papermill 04_train.ipynb -f best.yaml`` takes.

    Args:
        files: one demonstration file per task id.

    Returns:
        the trials, best first: the settings, ``trial``, the measures of :func:`measure_curve`,
        ``val_losses`` per epoch, and ``success_rate`` of ``episodes`` where ``search_episodes``
        asks for rollouts.

    Raises:
        ValueError: a trial in the folder was trained with other settings.
    """
    folder = Path(run) / "search"
    points = grid(config.search)
    settings = [  # all of them first: a bad value is refused before anything is trained
        config.replace(**point, epochs=config.search.search_epochs, patience=0, max_minutes=0.0,
                       wandb_mode="disabled")
        for point in points
    ]
    data = LIBERODataset.from_config(files, config)
    trials = []
    with tqdm(zip(points, settings, strict=True), "search", len(points), unit="trial") as bar:
        for point, trial_config in bar:
            name = "-".join(f"{key}{value:g}" for key, value in point.items())
            bar.set_postfix_str(name)
            trials.append({"trial": name, **point, **_run_trial(trial_config, data, folder / name)})
    ranked = rank_trials(trials)
    write_json(folder / "trials.json", ranked)
    with replacing(folder / "best.yaml") as temporary:
        best = {key: ranked[0][key] for key in points[0]}
        temporary.write_text(yaml.safe_dump(best, sort_keys=False))
    return ranked


def measure_curve(val_losses: list[float]) -> dict:
    """The criteria of a trial from its validation losses per epoch.

    ``final_val_loss``; ``epochs_to_converge``: the first epoch (from 1) that has come 90 % of the
    way from the first loss to the lowest; ``spikes``: epochs above 1.2 times the lowest before.
    """
    if not val_losses:
        raise ValueError("val_losses is empty; expected one per epoch")
    first, lowest = val_losses[0], min(val_losses)
    near = first - _CONVERGED * (first - lowest)
    epochs = next(epoch for epoch, loss in enumerate(val_losses, 1) if loss <= near)
    spikes = sum(loss > _SPIKE * min(val_losses[:i]) for i, loss in enumerate(val_losses) if i)
    return {"final_val_loss": val_losses[-1], "epochs_to_converge": epochs, "spikes": spikes}


def rank_trials(trials: list[dict]) -> list[dict]:
    """Best first: success rate where measured, final validation loss, convergence, stability.

    Losses that fall into the same step of 1 % count as equal.
    """
    def key(trial: dict) -> tuple:
        loss = max(trial["final_val_loss"], sys.float_info.min)  # 0 has no logarithm
        loss_step = math.floor(math.log(loss) / math.log(_SAME_LOSS))
        return (-trial.get("success_rate", 0.0), loss_step, trial["epochs_to_converge"],
                trial["spikes"], trial["final_val_loss"])

    return sorted(trials, key=key)


def _run_trial(config: Config, data: tuple[LIBERODataset, LIBERODataset], folder: Path) -> dict:
    """Train (or go on with, or read) one trial and measure it."""
    if (folder / "config.json").exists():
        refuse_other_settings(folder, config)
    write_json(folder / "config.json", config.to_dict())
    rows = BehaviorCloningTrainer.from_data(config, *data, folder).fit()
    losses = [row["val_loss"] for row in rows]
    result = {**measure_curve(losses), "val_losses": losses,
              "minutes": round(sum(row["seconds"] for row in rows) / 60, 3)}
    if config.search.search_episodes:
        result |= _rollouts(config, folder)
    return result


def _rollouts(config: Config, folder: Path) -> dict:
    """From drawn placements, which leaves the official init states to reports."""
    from .evaluate import selection_success

    results = selection_success(folder, config, config.search.search_episodes)
    return {key: results[key] for key in ("success_rate", "successes", "episodes")}
