"""A search as a Weights & Biases sweep that runs the same trials in the same folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..config import Config, check_names, from_flat, local_settings, settings_by_part
from ..files import write_bytes
from .search import claim, run_point, searched
from .space import all_points, axes, grid

_CRITERIA = ("final_val_loss", "success_rate")  # of a trial, logged to the sweep


def export_sweep(config: Config, run: str | Path, file: str | Path) -> Path:
    """Write the search of a run as a sweep for ``wandb sweep FILE`` and ``wandb agent``.

    The method is grid or, for a guided search, bayes. Agents need the run folder, whose
    ``search/search.json`` holds the other settings; the search itself ranks their trials.

    Raises ``ValueError`` for a part of a grid, because a W&B grid has all points.
    """
    points, guided = all_points(config.search), config.search.search_method != "grid"
    if not guided and len(grid(config.search)) < len(points):
        raise ValueError(f"a W&B grid has all {len(points)} points; expected max_configs=0 and no "
                         "search_shard")
    if (file := Path(file)).exists() and not _is_sweep(file):
        raise FileExistsError(f"{file} exists and is not a sweep; expected a new file")
    folder = claim(config, run)
    usual = from_flat().local()
    local = {name: value for name, value in config.local().items()
             if value != usual[name] and settings_by_part()[name] != "search"}
    sweep = {
        "program": "trm_helpers",  # required by W&B, replaced by the command
        "method": "bayes" if guided else "grid",
        **({"run_cap": config.search.max_configs or len(points)} if guided else {}),
        "metric": ({"name": "success_rate", "goal": "maximize"} if config.search.search_episodes
                   else {"name": "final_val_loss", "goal": "minimize"}),
        "parameters": {
            name: {"distribution": "log_uniform_values", "min": min(values), "max": max(values)}
            if guided and name == "lr" and len(values) > 1 else {"values": list(values)}
            for name, values in axes(config.search).items()},
        "command": ["${env}", "${interpreter}", "-m", "trm_helpers", "trial", folder.parent.name,
                    "${args_json}", *(word for name, value in local.items()
                                      for word in ("-s", name, str(value)))],
    }
    return write_bytes(file, yaml.safe_dump(sweep, sort_keys=False).encode())


def _is_sweep(file: Path) -> bool:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and "program" in content


def run_sweep_trial(run: str | Path, point: str, settings: Mapping | None = None) -> dict:
    """One trial of a run's search; returns its measures and logs them to the agent's sweep.

    Args:
        point: as JSON.
        settings: of this machine (:func:`config.local`); the others are those of the search.

    Raises ``ValueError`` for a point with other axes than the search, ``FileNotFoundError`` for a
    run without a search, and the errors of :func:`trials.run_trial`.
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
            tracked.log({name: found[name] for name in _CRITERIA if name in found})
    return found
