"""One trial of a search: a training notebook in its own process, measured by its files."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from ..config import Config, convert, local_settings
from ..evaluation.evaluate import selection_rows
from ..evaluation.plan import Episode
from ..evaluation.play import weights_digest
from ..files import differences, exclusive_lock, read_json, read_jsonl, visible, write_json
from ..notebooks import run_notebook
from ..software import minutes_left
from ..stats import EPISODE_KEYS, wilson_interval
from .space import point_of, trial_name

RECORD = "trial.json"
_MEASURES = {"epochs": int, "final_val_loss": float, "epochs_to_converge": int, "spikes": int,
             "minutes": float}
_OF_ROLLOUTS = {"success_rate": float, "successes": int, "episodes": int,
                "rollouts": tuple[dict, ...]}
_SPIKE = 1.2  # a validation loss above this multiple of the lowest before it
_CONVERGED = 0.9  # of the way from the first validation loss to the lowest


def run_trial(notebook: str | Path, parameters: dict, run_dir: str | Path,
              environment: Mapping[str, str] | None = None,
              stop: threading.Event | None = None, rollouts: int = 0) -> dict:
    """Train with a notebook in its own process; returns :func:`measure` of the folder.

    The trial resumes, and an epoch that was measured before is not run again. ``trial.json`` holds
    the ``parameters``, the measures at each epoch asked for (``rungs``), and the ``error`` of a
    failed trial; ``notebooks/output.log`` holds the output.

    Args:
        notebook: with the parameters ``run_name``, ``epochs``, ``stop_epoch`` and
            ``selection_episodes``, such as ``04_train``.
        parameters: of the notebook. Training ends after ``stop_epoch`` epochs, or all ``epochs``.
        environment: additional variables of its process, such as its GPU.
        stop: ends the notebook, see :func:`notebooks.run_notebook`.
        rollouts: episodes of all tasks, if the notebook plays any.

    Raises:
        KeyboardInterrupt: ``stop`` was set, or the session's time is up.
        ValueError: the trial was made with other parameters, or the notebook lacks one of these;
            nothing was run.
        RuntimeError: the notebook failed, or trained for another number of epochs, or could not
            play all episodes.
    """
    run_dir = Path(run_dir).resolve()
    wanted = parameters.get("stop_epoch") or parameters["epochs"]
    with exclusive_lock(run_dir, stop):
        before = read_trial(run_dir) or {"parameters": {}, "rungs": []}
        different = differences(_fixed(before["parameters"]), _fixed(parameters), "preset's")
        if before["parameters"] and different:
            raise ValueError(f"{run_dir} belongs to a search with other settings ({different}); "
                             "choose another run_name or the same settings")
        rungs = before["rungs"]
        for found in rungs:
            if found["epochs"] == wanted:
                return found
        record = {"trial": run_dir.name, "parameters": parameters, "rungs": rungs}
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
            if found.get("episodes", rollouts) < rollouts:  # the missing ones would not be failures
                raise RuntimeError(f"{found['episodes']} of {rollouts} episodes of {run_dir} "
                                   "could be played")
        except RuntimeError as error:
            if minutes_left() <= 0:  # the notebook ended by itself before `stop` was set
                raise KeyboardInterrupt from error
            write_json(run_dir / RECORD, {**record, "error": str(error)})
            raise
        rungs.append(found)
        write_json(run_dir / RECORD, record)
        if wanted == parameters["epochs"]:  # nothing is left to resume; two thirds of the folder
            (run_dir / "training_state.pt").unlink(missing_ok=True)
        return found


def _fixed(parameters: Mapping) -> dict:
    """The parameters that are the same at each rung and on every machine."""
    flat = {**parameters, **(parameters.get("more") or {})}
    own = {"more", "stop_epoch", "selection_episodes", *local_settings()}
    return {name: value for name, value in flat.items() if name not in own}


def read_trial(run_dir: str | Path) -> dict | None:
    """The ``trial.json`` of a folder; ``None`` without one, ``ValueError`` for a damaged one."""
    path = Path(run_dir) / RECORD
    if not path.exists():
        return None
    record = read_json(path, keys=("trial", "parameters", "rungs"))
    try:
        for name, kind in {"trial": str, "parameters": dict, "rungs": tuple[dict, ...],
                           **({"error": str} if "error" in record else {})}.items():
            convert(name, record[name], kind)
        if not (record["rungs"] or "error" in record):
            raise ValueError("rungs=[] is not valid without an error; expected measures")
        for rung in record["rungs"]:
            for name, kind in {**_MEASURES, **(_OF_ROLLOUTS if "episodes" in rung else {})}.items():
                convert(name, rung.get(name), kind)
            for row in rung.get("rollouts", ()):
                Episode.of(row)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return record


def is_past(run_dir: str | Path, epochs: int) -> bool:
    """Whether a trial was trained beyond ``epochs`` without being measured there."""
    record = read_trial(run_dir) or {"rungs": []}
    measured = [found["epochs"] for found in record["rungs"]]
    return epochs not in measured and len(read_jsonl(Path(run_dir) / "metrics.jsonl")) > epochs


def read_trials(folder: Path, config: Config) -> dict[str, dict]:
    """The record of each trial in a search's folder, by name.

    Raises ``ValueError`` for a damaged one, and for one of other parameters than its folder's name.
    """
    records = {path.parent.name: read_trial(path.parent) for path in visible(folder, f"*/{RECORD}")}
    for name, record in records.items():
        point, seed = point_of(record["parameters"], config.search)
        expected = trial_name(point, None if seed == config.train.seed else seed)
        if name != expected:
            raise ValueError(f"{folder / name / RECORD} is damaged: its parameters are those of "
                             f"{expected or 'no point of the search'}; expected those of {name}")
    return records


def measure(run_dir: str | Path) -> dict:
    """The criteria of a trial from the files in its folder.

    Returns:
        ``epochs``, :func:`measure_curve` of ``metrics.jsonl``, ``val_losses`` per epoch, and
        ``minutes`` of training; also :func:`success_of` the episodes of the current weights in
        ``selection.jsonl``, if any.

    Raises:
        RuntimeError: no epoch is in ``metrics.jsonl``.
    """
    run_dir = Path(run_dir)
    rows = read_jsonl(run_dir / "metrics.jsonl")
    if not rows:
        raise RuntimeError(f"{run_dir / 'metrics.jsonl'} holds no epoch; expected at least one")
    losses = [row["val_loss"] for row in rows]
    ledger = run_dir / "selection.jsonl"
    episodes = (selection_rows(ledger, weights_digest(run_dir, "last")) if ledger.exists()
                else [])
    return {"epochs": len(rows), **measure_curve(losses), "val_losses": losses,
            "minutes": round(sum(row["seconds"] for row in rows) / 60, 3),
            **(success_of(episodes) if episodes else {})}


def measure_curve(val_losses: list[float]) -> dict:
    """The criteria of a trial from its validation losses per epoch.

    ``final_val_loss``; ``epochs_to_converge``: the first epoch (from 1) within 10 % of the lowest
    loss, measured from the first; ``spikes``: epochs above 1.2 times the lowest loss before them.
    """
    first, lowest = val_losses[0], min(val_losses)
    near = first - _CONVERGED * (first - lowest)
    epochs = next(epoch for epoch, loss in enumerate(val_losses, 1) if loss <= near)
    spikes = sum(loss > _SPIKE * min(val_losses[:i]) for i, loss in enumerate(val_losses) if i)
    return {"final_val_loss": val_losses[-1], "epochs_to_converge": epochs, "spikes": spikes}


def success_of(rows: list[dict]) -> dict:
    """``success_rate`` over ``episodes`` with its 95 % Wilson interval, and the ``rollouts``."""
    successes = sum(bool(row["success"]) for row in rows)
    low, high = wilson_interval(successes, len(rows))
    return {"success_rate": successes / len(rows), "successes": successes, "episodes": len(rows),
            "wilson_low": low, "wilson_high": high,
            "rollouts": [{key: row[key] for key in (*EPISODE_KEYS, "seed")} for row in rows]}
