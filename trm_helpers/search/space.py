"""The space of a search: its axes, the points of its grid, and a trial's parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import yaml

from ..config import (
    SET_BY_TRAINING,
    Config,
    SearchConfig,
    check_names,
    from_flat,
    local_settings,
    settings_by_part,
)
from ..files import differences, short_name

_LISTS = {"lr": "search_lrs", "hidden_dim": "search_hidden_dims",
          "num_recursions": "search_num_recursions"}
# change the meaning or the samples of the validation loss, so that only rollouts compare
_CHANGE_THE_LOSS = {"loss", "gripper", "normalize_actions", "chunk", "halting", "ponder_cost",
                    "deep_supervision", "alignment", "sequence_length", "max_demos_per_task"}
_ROLLOUT_SETTINGS = {"protocol", "horizon", "eval_workers", "cluster"}  # of selection rollouts
# no axes: set by the search itself, or part of the task
_FIXED = {*_LISTS, *local_settings(), *_ROLLOUT_SETTINGS, "epochs", "patience", "rollout_every",
          "seed", "suite", "task_ids", "demos", "num_demos", "placement", "actor", "beta",
          "frame_stride", *SET_BY_TRAINING}
REDUCTION = 3  # of successive halving: one in three goes on, with three times the budget


def axes(search: SearchConfig) -> dict[str, tuple]:
    """The values of each setting that is searched over.

    Raises ``ValueError`` for a ``search_space`` that is no mapping from settings to lists, for a
    name that cannot be searched over (with the valid ones), and for a setting that makes the
    compared validation losses of two trials mean different things.
    """
    further = _further_axes(search)
    known = [name for name in _training_settings(from_flat()) if name not in _FIXED]
    for name in further:
        if name in _LISTS:
            raise ValueError(f"search_space={search.search_space!r} is not valid; expected no "
                             f"{name}, whose values are in {_LISTS[name]}")
        check_names([name], known, "setting in search_space")
        other_loss = name in _CHANGE_THE_LOSS or "act" in further[name]  # a variant with a KL term
        if other_loss and (search.search_episodes == 0 or search.search_method == "halving"):
            raise ValueError(
                f"search_space={search.search_space!r} is not valid: {name} changes what the "
                "validation loss means, so trials can only be compared by rollouts; expected "
                "search_episodes above 0 and a search_method other than halving")
    found = {**{name: getattr(search, values) for name, values in _LISTS.items()}, **further}
    for name, values in found.items():
        if len({trial_name({name: value}) for value in values}) < len(values):
            raise ValueError(f"{name}: {', '.join(map(repr, values))} are not valid; expected "
                             "values that differ in their first six digits, which name the trials")
    return found


def _further_axes(search: SearchConfig) -> dict[str, tuple]:
    try:
        further = yaml.safe_load(search.search_space) or {}
    except yaml.YAMLError:
        further = None
    if not isinstance(further, dict) or not all(
            isinstance(values, list) and values and len(set(map(str, values))) == len(values)
            and all(isinstance(value, (bool, int, float, str)) for value in values)
            for values in further.values()):
        raise ValueError(f"search_space={search.search_space!r} is not valid; expected a list of "
                         "distinct values for each setting, as YAML: '{chunk: [4, 8], loss: [l1, "
                         "mse]}'")
    return {name: tuple(values) for name, values in further.items()}


def all_points(search: SearchConfig) -> list[dict]:
    """Every combination of the values of all :func:`axes`."""
    values = axes(search)
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def grid(search: SearchConfig) -> list[dict]:
    """All points, or ``max_configs`` spread evenly from first to last; in a shard, every n-th."""
    points = all_points(search)
    count = search.max_configs
    if 0 < count < len(points):
        step = (len(points) - 1) / max(count - 1, 1)
        points = [points[round(i * step)] for i in range(count)]
    first, step = search.shard
    if first >= len(points):
        raise ValueError(f"search_shard={search.search_shard!r} holds none of the {len(points)} "
                         "points; expected at most as many parts as points")
    return points[first::step]


def rungs(search: SearchConfig) -> list[tuple[int, int]]:
    """(epochs, episodes per task) at which a trial is measured; the last one is all of them.

    Successive halving measures at a ninth and a third of the epochs too: first the validation loss
    alone, then a third of the episodes.
    """
    if search.search_method != "halving":
        return [(search.search_epochs, search.search_episodes)]
    third, ninth = (max(1, search.search_epochs // REDUCTION ** power) for power in (1, 2))
    steps = {ninth: 0, third: math.ceil(search.search_episodes / REDUCTION),
             search.search_epochs: search.search_episodes}
    return list(steps.items())  # fewer where there are few epochs


def trial_name(point: dict, seed: int | None = None) -> str:
    """Name and folder of a trial, ``lr0.001-hidden_dim128-num_recursions4``.

    Every method of search thus finds the same trial for the same point. ``seed`` marks a replicate.
    """
    name = "-".join(f"{key}{f'{value:g}'.replace('+', '') if isinstance(value, float) else value}"
                    for key, value in point.items())
    return short_name(name if seed is None else f"{name}-seed{seed}")


def trial_settings(config: Config, point: dict, seed: int) -> Config:
    """The settings of a trial. ``ValueError`` for values that do not go together."""
    return config.replace(**point, seed=seed, epochs=config.search.search_epochs, stop_epoch=0,
                          patience=0, max_minutes=0.0, wandb_mode="disabled")


def check_points(config: Config) -> None:
    """Raise ``ValueError`` for points whose values do not go together, and seeds past the last."""
    search = config.search
    config.replace(seed=config.train.seed + search.search_replicates - 1)
    for point in grid(search) if search.search_method == "grid" else all_points(search):
        trial_settings(config, point, config.train.seed)


def parameters(config: Config, point: dict, known: Iterable[str]) -> dict[str, Any]:
    """Parameters of the training notebook for ``config`` with ``point``.

    They are the preset, what differs from it, the seed and the point. Settings that the notebook
    has no parameter for (``known``) are in its ``more``.
    """
    usual = _training_settings(from_flat(config.preset))
    changes = {name: value for name, value in _training_settings(config).items()
               if value != usual[name]}
    values = {"preset": config.preset, **changes, "seed": config.train.seed, **point}
    more = {name: value for name, value in values.items() if name not in known}
    return {**{name: value for name, value in values.items() if name in known},
            **({"more": more} if more else {})}


def point_of(given: dict, search: SearchConfig) -> tuple[dict, int]:
    """Point and seed of :func:`parameters`; an empty point if an axis is missing."""
    more = given.get("more")
    values = {**given, **(more if isinstance(more, dict) else {})}
    names = axes(search)
    if not values.keys() >= {*names, "seed"}:
        return {}, 0
    return {name: values[name] for name in names}, values["seed"]


def common_settings(config: Config) -> dict[str, Any]:
    """Settings that all trials of a search share on every machine, so that they compare."""
    own = {*local_settings(), *axes(config.search)}
    settings = _training_settings(trial_settings(config, {}, config.train.seed))
    return {**{name: value for name, value in settings.items() if name not in own},
            "search_episodes": config.search.search_episodes}


def _training_settings(config: Config) -> dict[str, Any]:
    """Settings of data, model, training and selection rollouts, with lists as in JSON."""
    part = settings_by_part()
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in config.flat().items()
            if part[name] in ("data", "model", "train") or name in _ROLLOUT_SETTINGS}


def refuse_others(where: object, before: dict, now: dict) -> None:
    """Raise ``ValueError`` if the :func:`common_settings` of a search differ from earlier ones."""
    different = differences(before, now, missing="searched over")
    if different:
        raise ValueError(f"{where} belongs to a search with other settings "
                         f"({different}); choose another run_name or the same settings")


def value_of(found: dict) -> float:
    """The quantity that a guided search minimises: validation loss or, with rollouts, failures.

    The loss, mapped to (0, 1), breaks ties between equal numbers of failures.
    """
    loss = found["final_val_loss"]
    if "episodes" not in found:
        return loss
    return found["episodes"] - found["successes"] + (1 + math.tanh(loss / 2)) / 2
