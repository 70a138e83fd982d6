"""Runs that were evaluated before: compared episode by episode, and checked for older weights."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..stats import paired_mcnemar
from ..training.runs import description, description_digest, find_run, load_config
from .plan import Episode, evaluation_folder, read_ledger
from .play import Evaluation, weights_digest


def compare_runs(run: str | Path, other: str | Path, suite: str = "",
                 task_ids: Iterable[int] = (), episodes: Iterable[Episode] = ()) -> dict:
    """:func:`stats.paired_mcnemar` of ``other`` (a) and ``run`` (b), both evaluated before.

    Args:
        suite, task_ids: of the episodes compared; default the suite of each run and all its tasks.
        episodes: the only ones to compare, such as an evaluation's ``planned``; default all.

    Raises:
        FileNotFoundError: one of them has no episodes yet.
        ValueError: they share none, or have played them by different protocols.
    """
    tasks, wanted = set(task_ids), set(episodes)
    return paired_mcnemar(*(
        [row for row in evaluated_episodes(folder, suite)
         if (not tasks or row["task_id"] in tasks) and (not wanted or Episode.of(row) in wanted)]
        for folder in (other, run)), names=(str(other), str(run)))


def evaluated_episodes(run: str | Path, suite: str = "") -> list[dict]:
    """Rows of a run's ledger; ``FileNotFoundError`` if it was not evaluated (on that suite)."""
    folder = find_run(run)
    suite = suite or load_config(folder).data.suite
    ledger = evaluation_folder(folder, suite) / "episodes.jsonl"
    rows = [row for episode, row in read_ledger(ledger) if episode.suite == suite]
    if not rows:
        command = f"python -m trm_helpers evaluate {shlex.quote(str(run))} --suite {suite}"
        raise FileNotFoundError(
            f"{ledger} {'holds no episode' if ledger.exists() else 'does not exist'}; expected a "
            f"run that was evaluated ({command})")
    return rows


def comparable(planned: Evaluation, other: str | Path) -> None:
    """Raise ``ValueError`` if none of the planned episodes has a pair among another run's.

    Also for the same run; ``FileNotFoundError`` if the other was not evaluated.
    """
    run = getattr(planned.source, "run", planned.folder)
    if find_run(other) == run:
        raise ValueError(f"{other} is the run that is evaluated; expected another one to compare "
                         "with")
    if planned.config.perturbation != "none":
        raise ValueError(f"perturbation={planned.config.perturbation!r} is not valid in a "
                         "comparison; expected 'none'")
    rows = [{**episode._asdict(), **planned.conditions_of(episode), "success": False, "steps": 0}
            for episode in planned.planned]
    paired_mcnemar(evaluated_episodes(other, planned.suite), rows, names=(str(other), run.name))


def stale(run: str | Path, made: Mapping) -> str:
    """A sentence if results are of other weights or settings than the run has now; else empty.

    Args:
        made: ``weights``, ``sha256`` and, if known, ``policy``: a row, a card, or the ``protocol``
            of results.
    """
    run, weights = Path(run), made.get("weights", "")
    if not made.get("sha256") or not (run / f"{weights}.safetensors").exists():
        return ""
    present = weights_digest(run, weights)
    if present != made["sha256"]:
        return (f"Stale: made with other weights ({made['sha256']}) than {weights}.safetensors has "
                f"now ({present}); the run was trained further or replaced since.")
    now = description_digest(description(run))
    return "" if made.get("policy", now) == now else (
        f"Stale: made with another policy.json ({made['policy']}) than the run has now ({now}); "
        "its network or its scaling was changed since.")


def stale_episodes(run: str | Path, suite: str = "") -> list[str]:
    """The sentence of :func:`stale` on :func:`evaluated_episodes`; none if they are fresh."""
    said = stale(find_run(run), evaluated_episodes(run, suite)[0])
    return [f"{run}: {said}"] if said else []
