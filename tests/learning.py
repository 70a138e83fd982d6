"""Trainings that end when a loss has fallen, and trainings that several tests share."""

import json
from collections.abc import Callable

from safetensors.torch import load_file

_DONE = {}


def falls_below(limit: float, step: Callable[[], float], most: int) -> bool:
    """Whether at most ``most`` steps return five values in a row below ``limit``."""
    in_a_row = 0
    for _ in range(most):
        in_a_row = in_a_row + 1 if step() < limit else 0
        if in_a_row == 5:
            return True
    return False


def once(work: Callable, small_run: Callable, **settings):
    """``work(small_run, **settings)``, done once per process."""
    key = work.__qualname__, json.dumps(settings, sort_keys=True)
    if key not in _DONE:
        _DONE[key] = work(small_run, **settings)
    return _DONE[key]


def straight(small_run: Callable, **settings) -> tuple[list[dict], dict]:
    """Rows of a training without interruption, and its weights."""
    trainer = small_run("straight", **settings)
    return trainer.fit(), {name: load_file(trainer.run / f"{name}.safetensors")
                           for name in ("best", "last")}
