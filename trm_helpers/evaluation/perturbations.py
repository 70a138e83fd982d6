"""Light perturbations of an episode: of observations, instruction or actions, without new assets.

They stand between the policy and the simulator, so that they apply to any policy and any suite.
Random numbers are a function of the episode, not of the order in which entries are read.
"""

from __future__ import annotations

import functools
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import schema
from ..config import ModelConfig
from ..sim.env import LiberoEnv, Observation, load_task
from .rollout import Policy

SHIFT = 3 / 32  # of an image's side: 12 of 128 pixels; the augmentation `shift` goes up to 8
BRIGHTNESS = 0.4  # pixel values times 0.6 or 1.4; the augmentations stay within 0.8 and 1.2
PIXEL_NOISE = 10.0  # grey levels of 255, standard deviation in each pixel and colour
PROPRIO_NOISE = {  # standard deviation: rad for joints and angles, m for fingers and positions
    "joint_states": 0.01,
    "gripper_states": 0.001,
    "ee_pos": 0.005,
    "ee_ori": 0.01,
    "ee_states": (0.005, 0.005, 0.005, 0.01, 0.01, 0.01),
}
DELAYS = (1, 2)  # control steps of 0.05 s


@dataclass(frozen=True)
class Perturbation:
    """One of :data:`PERTURBATIONS`.

    ``change(episode, entry, read)`` returns the value that replaces one of the ``entries`` of an
    observation, given the :class:`PerturbedPolicy`, the entry's name and its reader. ``needs`` is
    what a policy must have for it to matter: a camera, ``proprioception``, ``language``.
    """

    title: str
    change: Callable[[PerturbedPolicy, str, Callable[[], Any]], Any] | None = None
    entries: tuple[str, ...] = ()
    needs: str = ""
    delay: int = 0  # control steps


class PerturbedPolicy:
    """A policy behind a perturbation, with the same two calls.

    Entries of an observation are replaced when the policy reads them: a frame that it does not read
    is not rendered.

    Args:
        name: in :data:`PERTURBATIONS`.
        env: of the episode.
        key: of the episode; the same key gives the same perturbation.

    Raises:
        ValueError: proprioception is to be removed from a policy without ``proprio_stats``.
    """

    def __init__(self, policy: Policy, name: str, env: LiberoEnv, key: tuple):
        self.policy, self.name, self.env, self.key = policy, name, env, key
        if name == "no_proprioception" and getattr(policy, "proprio_stats", None) is None:
            raise ValueError("the policy has no proprio_stats; expected means in place of "
                             "proprioception")

    def reset(self) -> None:
        self.step = 0
        self.pending = deque([np.array(schema.NO_OP)] * PERTURBATIONS[self.name].delay)
        self.policy.reset()

    def act(self, observation: Mapping) -> np.ndarray:
        perturbation = PERTURBATIONS[self.name]
        read = {key: functools.partial(observation.__getitem__, key) for key in observation}
        changed = {entry: functools.partial(perturbation.change, self, entry, read[entry])
                   for entry in perturbation.entries if entry in read}
        self.pending.append(self.policy.act(Observation(read | changed)))
        self.step += 1
        return self.pending.popleft()

    def generator(self, *what) -> np.random.Generator:
        """The generator for ``what``, and nothing else, in this episode."""
        return np.random.default_rng(zlib.crc32(repr((*self.key, *what)).encode()))

    def __getattr__(self, name: str):
        # the policy's other attributes, but not how it is copied: a copy has no policy at first
        if name.startswith("__") or "policy" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.policy, name)


def why_unused(needs: str, model: ModelConfig) -> str:
    """Why what ``needs`` something cannot matter for a policy; empty if it can."""
    if needs in schema.CAMERAS and needs not in model.cameras:
        return f"it has no {schema.CAMERA_TITLES[needs]}"
    if needs == "proprioception" and not model.proprioception:
        return "it has no proprioception"
    if needs == "language" and model.conditioning != "language":
        return "it is not conditioned on language"
    return ""


# --- observations --------------------------------------------------------------------------------
def shift_image(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """An image (H, W, C) shifted by whole pixels; its edge is repeated."""
    rows, columns = (np.clip(np.arange(size) - by, 0, size - 1)
                     for size, by in zip(image.shape, (down, right), strict=False))
    return image[rows][:, columns]


def as_image(values: np.ndarray) -> np.ndarray:
    """Grey levels rounded to uint8, from 0 to 255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _shift(episode: PerturbedPolicy, camera: str, read: Callable) -> np.ndarray:
    """Along one of the image's diagonals, the same for the whole episode."""
    image, sides = read(), episode.generator(camera).choice((-1, 1), 2)
    return shift_image(image, *np.rint(sides * SHIFT * image.shape[0]).astype(int))


def _light(episode: PerturbedPolicy, camera: str, read: Callable) -> np.ndarray:
    """Darker or brighter, the same for both cameras and the whole episode."""
    return as_image(read() * (1 + episode.generator("light").choice((-1, 1)) * BRIGHTNESS))


def _noise(episode: PerturbedPolicy, entry: str, read: Callable) -> np.ndarray:
    """Independent Gaussian noise in every entry and step."""
    value, generator = read(), episode.generator(entry, episode.step)
    if entry in schema.CAMERAS:
        return as_image(value + generator.normal(0, PIXEL_NOISE, value.shape))
    return value + generator.normal(0, PROPRIO_NOISE[entry], value.shape)


def _black(episode: PerturbedPolicy, camera: str, read: Callable) -> np.ndarray:
    return np.zeros((episode.env.image_size, episode.env.image_size, 3), np.uint8)


def _mean(episode: PerturbedPolicy, entry: str, read: Callable) -> np.ndarray:
    """The mean of the policy's training data, 0 once normalised; NaN where it has no such mean."""
    ends = np.cumsum([schema.LOW_DIM[key] for key in schema.PROPRIO_KEYS])
    means = np.split(np.array(episode.policy.proprio_stats["mean"]), ends[:-1])
    unknown = np.full(schema.LOW_DIM[entry], np.nan)
    return dict(zip(schema.PROPRIO_KEYS, means, strict=True)).get(entry, unknown)


# --- instruction ---------------------------------------------------------------------------------
def _another_instruction(episode: PerturbedPolicy, entry: str, read: Callable) -> str:
    """The instruction of another task of the suite, the same for the whole episode."""
    others = _instructions(episode.env.task.suite) - {episode.env.task.language}
    return str(episode.generator("instruction").choice(sorted(others)))


@functools.cache
def _instructions(suite: str) -> set[str]:
    return {load_task(suite, task_id).language for task_id in range(schema.SUITES[suite])}


def _empty(episode: PerturbedPolicy, entry: str, read: Callable) -> str:
    return ""


_CAMERAS, _READINGS = tuple(schema.CAMERAS), tuple(schema.LOW_DIM)
PERTURBATIONS = {
    "shift": Perturbation(
        f"each camera's image shifted by {128 * SHIFT:g} of 128 pixels", _shift, _CAMERAS),
    "brightness": Perturbation(
        f"light {100 * BRIGHTNESS:g} % darker or brighter", _light, _CAMERAS),
    "noise": Perturbation(f"noise in images ({PIXEL_NOISE:g} of 255 grey levels) and readings",
                          _noise, _CAMERAS + _READINGS),
    **{f"delay_{steps}": Perturbation(f"actions {steps / schema.CONTROL_HZ:g} s late", delay=steps)
       for steps in DELAYS},
    "no_proprioception": Perturbation("arm and gripper readings replaced by their mean",
                                      _mean, _READINGS, needs="proprioception"),
    **{f"no_{camera.removesuffix('_rgb')}": Perturbation(f"{title} black", _black, (camera,),
                                                         needs=camera)
       for camera, title in schema.CAMERA_TITLES.items()},
    "wrong_instruction": Perturbation("another task's instruction", _another_instruction,
                                      ("language",), needs="language"),
    "no_instruction": Perturbation("empty instruction", _empty, ("language",), needs="language"),
}
