"""A search as a sweep of Weights & Biases, whose runs are the same trials in the same folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..config import Config, check_names, from_flat, local_settings, settings_by_part
from ..files import atomic_path
from .search import claim, run_point, searched
from .space import axes

_TOLD = ("final_val_loss", "success_rate")  # of a trial, to the sweep


def export_sweep(config: Config, run: str | Path, file: str | Path) -> Path:
    """Write the search of a run as a sweep: ``wandb sweep FILE`` and ``wandb agent`` run it.

    The sweep is a grid or, for a guided search, bayes. Agents need the run folder, whose
    ``search/search.json`` holds the other settings; rank what they ran with the search itself.
    """
    folder = claim(config, run)
    guided = config.search.search_method != "grid"
    metric = ({"name": "success_rate", "goal": "maximize"} if config.search.search_episodes
              else {"name": "final_val_loss", "goal": "minimize"})
    sweep = {
        "program": "trm_helpers",  # W&B wants one; what runs is the command
        "method": "bayes" if guided else "grid",
        "metric": metric,
        "parameters": {
            name: {"distribution": "log_uniform_values", "min": min(values), "max": max(values)}
            if guided and name == "lr" and len(values) > 1 else {"values": list(values)}
            for name, values in axes(config.search).items()},
        "command": ["${env}", "${interpreter}", "-m", "trm_helpers", "trial", folder.parent.name,
                    "${args_json}", *(word for name, value in _of_machine(config).items()
                                      for word in ("-s", name, str(value)))],
    }
    with atomic_path(file) as temporary:
        temporary.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return Path(file)


def _of_machine(config: Config) -> dict:
    """The local settings that trials need and that are not the default."""
    usual = from_flat().local()
    return {name: value for name, value in config.local().items()
            if value != usual[name] and settings_by_part()[name] != "search"}


def run_sweep_trial(run: str | Path, point: str, settings: Mapping | None = None) -> dict:
    """One trial of a run's search by its point, as JSON; what it measured.

    ``settings`` are those of this machine (:func:`config.local`); the file says the others.

    Under an agent of a sweep its criteria go to the sweep too.

    Raises ``ValueError`` for a point that is none of the search's, ``FileNotFoundError`` for a run
    without a search, and what :func:`trials.run_trial` raises.
    """
    folder = Path(run).resolve() / "search"
    check_names(settings or {}, sorted(local_settings()), "setting of the machine")
    config = searched(folder).replace(**from_flat().local()).replace(**settings or {})
    try:
        values = json.loads(point)
    except json.JSONDecodeError:
        values = None
    names = list(axes(config.search))
    if not isinstance(values, dict) or set(values) != set(names):
        raise ValueError(f"point={point!r} is not valid; expected JSON with {', '.join(names)}")
    if isinstance(values["lr"], float):
        values["lr"] = float(f"{values['lr']:g}")  # as in the trial's name
    found = run_point(config, folder, {name: values[name] for name in names})
    if "WANDB_SWEEP_ID" in os.environ:
        import wandb

        with wandb.init() as tracked:
            tracked.log({name: found[name] for name in _TOLD if name in found})
    return found
