"""A trained run as the actor of DAgger's collection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import schema
from ..config import Config
from ..demos.collect import demonstrations_of
from ..demos.dagger import Actor
from ..demos.demo_files import open_demo_file
from ..files import digest
from ..training.runs import description, find_run, load_config
from .plan import tasks_in_words
from .play import TrainedPolicy


def actor_of(config: Config) -> Actor | None:
    """The run ``config.data.actor`` with its ``best`` weights and demonstrations, checked.

    The demonstrations that it was trained on are collected now if they are missing. ``None``
    without an actor.

    Raises:
        FileNotFoundError: no such run, or it has no weights.
        ValueError: the run was trained on other cameras than ``config.model.cameras``, on another
            suite or without one of the tasks, on another ``frame_stride`` or ``placement``, on a
            ``demo_dir``, on human demonstrations or on
            others than the files hold now, or its ``policy.json`` does not identify them, as in
            the shipped policies; ``num_demos`` is not above the number of demonstrations that it
            was trained on; or a ``demo_dir`` is given.
    """
    data = config.data
    if not data.actor:
        return None
    data.require("actor", not data.demo_dir, f"none with demo_dir={data.demo_dir!r}, into which "
                 "nothing is collected")
    run = find_run(data.actor)
    trained = load_config(run)
    cameras = trained.model.cameras
    if set(cameras) != set(config.model.cameras):
        raise _unfit(data.actor, f"was trained on the cameras {', '.join(cameras)}",
                     f"those of the policy to train, {', '.join(config.model.cameras)}")
    if trained.data.suite != data.suite or not set(data.task_ids) <= set(trained.data.task_ids):
        raise _unfit(data.actor, f"was trained on {_tasks(trained)}", f"{_tasks(config)}, whose "
                     "demonstrations come first in the file")
    for name in ("frame_stride", "placement"):
        was, now = getattr(trained.data, name), getattr(data, name)
        if was != now:
            raise _unfit(data.actor, f"was trained on demonstrations with {name}={was!r}",
                         f"{now!r}, as now, or {name}={was!r}: they come first in the file")
    source = TrainedPolicy.load(run, "best")
    trained_on = description(run)["trained_on"]["files"]
    if "human" in {file["source"] for file in trained_on}:
        raise _unfit(data.actor, "was trained on human demonstrations",
                     "scripted ones: a file has one alignment of observations and actions")
    if not all(file.get("actions") for file in trained_on):  # shipped, or of an old version
        raise _unfit(data.actor, "is described without a digest of its demonstrations' actions, by "
                     "which they are known again", "a run trained here: a shipped one never has it")
    limits = (trained.data.max_demos_per_task, trained.data.num_demos)  # as the data set has it
    count = min(limit for limit in limits if limit)
    config.data.require("num_demos", data.num_demos > count,
                        f"more than {count}, the demonstrations per task that the actor "
                        f"{data.actor!r} was trained on and with which the file begins")
    try:
        base = demonstrations_of(run, trained.replace(task_ids=data.task_ids))
    except FileNotFoundError as error:
        raise _unfit(data.actor, f"was trained on demonstrations that cannot be found ({error})",
                     "a run trained without demo_dir") from error
    files = {path.name: path for path in base.values()}
    for file in trained_on:
        path = files.get(Path(file["file"]).name)
        if path and _actions(path, file["demos"]) != file["actions"]:
            raise _unfit(data.actor, f"was trained on other demonstrations than {path} holds",
                         "the same, which come first in the new file")
    return Actor(data.actor, data.beta, source.sha256, source, base, count)


def _actions(path: Path, demos: Sequence[str]) -> str:
    """Digest of the demonstrations' actions, as :meth:`LIBERODataset.describe` gives it."""
    with open_demo_file(path) as content:
        actions = [content[schema.DATA_GROUP][name]["actions"][:].astype("float32").tobytes()
                   for name in demos if name in content[schema.DATA_GROUP]]
    return digest(b"".join(actions))


def _tasks(config: Config) -> str:
    return f"{tasks_in_words(config.data.task_ids)} of {config.data.suite}"


def _unfit(actor: str, found: str, expected: str) -> ValueError:
    return ValueError(f"actor={actor!r} {found}; expected {expected}")
