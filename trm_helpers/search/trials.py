"""One trial of a search: a training notebook in its own process, and what its files say of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from ..evaluation.evaluate import selection_rows
from ..files import exclusive_lock, read_json, read_jsonl, write_json
from ..notebooks import run_notebook
from ..stats import EPISODE_KEYS, wilson_interval

RECORD = "trial.json"
_SPIKE = 1.2  # a validation loss this many times the lowest before it
_CONVERGED = 0.9  # of the way from the first validation loss to the lowest


def run_trial(notebook: str | Path, parameters: dict, run_dir: str | Path,
              environment: Mapping[str, str] | None = None,
              stop: threading.Event | None = None) -> dict:
    """Train in a notebook as far as its parameters say, and read from the files how it went.

    The notebook runs in a process of its own, trains into ``run_dir`` by the ``run_name`` that it
    is given, and goes on where it was. What it prints is in ``<run_dir>/notebooks/``. What was
    measured before at the same epoch is not run again. ``trial.json`` holds the ``parameters``,
    the measures at each epoch that was asked for (``rungs``), and the ``error`` of one that failed.

    Args:
        notebook: with the parameters ``run_name``, ``epochs``, ``stop_epoch`` and
            ``selection_episodes``, such as ``04_train``.
        parameters: of the notebook. Training ends after ``stop_epoch`` epochs, or all ``epochs``.
        environment: variables for its process, such as the GPU that it sees.
        stop: ends the notebook, see :func:`runs.run_notebook`.

    Returns:
        :func:`measure` of the folder.

    Raises:
        KeyboardInterrupt: ``stop`` was set.
        ValueError: a parameter that the notebook does not have; nothing was run.
        RuntimeError: the notebook failed, or did not train as far as it was asked.
    """
    run_dir = Path(run_dir).resolve()
    wanted = parameters.get("stop_epoch") or parameters["epochs"]
    with exclusive_lock(run_dir, stop):
        before = read_trial(run_dir) or {"rungs": []}
        for found in before["rungs"]:
            if found["epochs"] == wanted:
                return found
        record = {"trial": run_dir.name, "parameters": parameters, "rungs": before["rungs"]}
        log = run_dir / "notebooks" / "output.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            run_notebook(notebook, {**parameters, "run_name": run_dir.name}, run_dir=run_dir,
                         environment={**(environment or {}),
                                      "TRM_ARTIFACTS_DIR": str(run_dir.parent)},
                         log=log, stop=stop)
            found = measure(run_dir)
            if found["epochs"] != wanted:
                raise RuntimeError(f"{run_dir} has {found['epochs']} epochs; expected {wanted}")
        except RuntimeError as error:
            write_json(run_dir / RECORD, {**record, "error": str(error)})
            raise
        record["rungs"].append(found)
        write_json(run_dir / RECORD, record)
        return found


def read_trial(run_dir: str | Path) -> dict | None:
    """The ``trial.json`` of a folder; ``None`` where there is none."""
    path = Path(run_dir) / RECORD
    return read_json(path, keys=("trial", "parameters", "rungs")) if path.exists() else None


def measure(run_dir: str | Path) -> dict:
    """The criteria of a trial from the files in its folder.

    Returns:
        ``epochs``, :func:`measure_curve` of ``metrics.jsonl``, ``val_losses`` per epoch,
        ``minutes`` of training; where ``selection.jsonl`` has episodes of the present weights,
        :func:`success_of` them.

    Raises:
        RuntimeError: no epoch is in ``metrics.jsonl``.
    """
    run_dir = Path(run_dir)
    rows = read_jsonl(run_dir / "metrics.jsonl")
    if not rows:
        raise RuntimeError(f"{run_dir / 'metrics.jsonl'} holds no epoch; expected at least one")
    losses = [row["val_loss"] for row in rows]
    found = {"epochs": len(rows), **measure_curve(losses), "val_losses": losses,
             "minutes": round(sum(row["seconds"] for row in rows) / 60, 3)}
    ledger = run_dir / "selection.jsonl"
    played = selection_rows(run_dir, ledger) if ledger.exists() else []
    return {**found, **(success_of(played) if played else {})}


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


def success_of(rows: list[dict]) -> dict:
    """``success_rate`` of ``episodes`` with its 95 % Wilson interval; the ``rollouts`` themselves.
    """
    successes = sum(bool(row["success"]) for row in rows)
    low, high = wilson_interval(successes, len(rows))
    return {"success_rate": successes / len(rows), "successes": successes, "episodes": len(rows),
            "wilson_low": low, "wilson_high": high,
            "rollouts": [{key: row[key] for key in (*EPISODE_KEYS, "seed")} for row in rows]}
