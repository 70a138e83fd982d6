"""A trained run as the actor of DAgger's collection."""

from __future__ import annotations

from ..config import Config
from ..demos.collect import demonstrations_of
from ..demos.dagger import Actor
from ..training.runs import description, find_run, load_config
from .play import TrainedPolicy


def actor_of(config: Config) -> Actor | None:
    """The run ``config.data.actor`` with its ``best`` weights and demonstrations, checked.

    The demonstrations that it was trained on are collected now if they are missing. ``None``
    without an actor, or with a ``demo_dir``, into which nothing is collected.

    Raises:
        FileNotFoundError: no such run, or it has no weights.
        ValueError: the run was trained on other cameras than ``config.model.cameras``, on another
            suite or without one of the tasks, on a ``demo_dir`` or on human demonstrations; or
            ``num_demos`` is not above the number of demonstrations that it was trained on.
    """
    data = config.data
    if not data.actor or data.demo_dir:
        return None
    run = find_run(data.actor)
    trained = load_config(run)
    cameras = trained.model.cameras
    if set(cameras) != set(config.model.cameras):
        raise _unfit(data.actor, f"was trained on the cameras {', '.join(cameras)}",
                     f"those of the policy to train, {', '.join(config.model.cameras)}")
    if trained.data.suite != data.suite or not set(data.task_ids) <= set(trained.data.task_ids):
        raise _unfit(data.actor, f"was trained on {_tasks(trained)}", f"{_tasks(config)}, whose "
                     "demonstrations come first in the file")
    source = TrainedPolicy.load(run, "best")
    if "human" in {file["source"] for file in description(run)["trained_on"]["files"]}:
        raise _unfit(data.actor, "was trained on human demonstrations",
                     "scripted ones: a file has one alignment of observations and actions")
    count = trained.data.max_demos_per_task or trained.data.num_demos
    config.data.require("num_demos", data.num_demos > count,
                        f"more than {count}, the demonstrations per task that the actor "
                        f"{data.actor!r} was trained on and with which the file begins")
    try:
        base = demonstrations_of(run, trained.replace(task_ids=data.task_ids))
    except FileNotFoundError as error:
        raise _unfit(data.actor, f"has demonstrations that are not found again ({error})",
                     "a run trained without demo_dir") from error
    return Actor(data.actor, data.beta, source.sha256, source, base, count)


def _tasks(config: Config) -> str:
    return f"task {', '.join(map(str, config.data.task_ids))} of {config.data.suite}"


def _unfit(actor: str, found: str, expected: str) -> ValueError:
    return ValueError(f"actor={actor!r} {found}; expected {expected}")
