"""Light perturbations of an episode: of observations, instruction or actions, without new assets.

They stand between the policy and the simulator, so that they apply to any policy and any suite.
Random numbers are a function of the episode, not of the order in which entries are read.
"""

from __future__ import annotations

import copy
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

# for an entry of an observation: (its reader, the step) -> its value
Replacement = Callable[[Callable[[], Any], int], Any]


@dataclass(frozen=True)
class Perturbation:
    """One of :data:`PERTURBATIONS`.

    ``changes`` returns the replaced entries of an episode's observations, given the policy, the
    environment and a key that identifies the episode. ``needs`` is what a policy must have for it
    to matter: a camera, ``proprioception``, ``language``.
    """

    title: str
    changes: Callable[[Policy, LiberoEnv, tuple], dict[str, Replacement]] = lambda *_: {}
    needs: str = ""
    delay: int = 0  # control steps


def generator_of(key: tuple, *what) -> np.random.Generator:
    """The generator for ``what``, and nothing else, in the episode of ``key``."""
    return np.random.default_rng(zlib.crc32(repr((*key, *what)).encode()))


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
        self.policy = policy
        self.delay = PERTURBATIONS[name].delay
        self.changes = PERTURBATIONS[name].changes(policy, env, key)

    def reset(self) -> None:
        self.step = 0
        self.pending = deque([np.array(schema.NO_OP)] * self.delay)
        self.policy.reset()

    def act(self, observation: Mapping) -> np.ndarray:
        read = {key: functools.partial(observation.__getitem__, key) for key in observation}
        changed = {key: functools.partial(change, read[key], self.step)
                   for key, change in self.changes.items() if key in read}
        self.pending.append(self.policy.act(Observation(read | changed)))
        self.step += 1
        return self.pending.popleft()

    def __getattr__(self, name: str):
        # the policy's other attributes, but not how it is copied: a copy has no policy at first
        if name.startswith("__") or "policy" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.policy, name)


def why_unused(name: str, model: ModelConfig) -> str:
    """Why a perturbation cannot matter for a policy; empty if it can."""
    needs = PERTURBATIONS[name].needs
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


def scale_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """A uint8 image with its values times ``factor``, rounded, at most 255."""
    return np.clip(np.rint(image * factor), 0, 255).astype(np.uint8)


# replacements are functions of the module, so that a perturbed policy can be copied and pickled
def _shifted(policy: Policy, env: LiberoEnv, key: tuple) -> dict[str, Replacement]:
    """Each camera's image along one of its diagonals, the same for the whole episode."""
    return {camera: functools.partial(_shift, generator_of(key, camera).choice((-1, 1), 2))
            for camera in schema.CAMERAS}


def _shift(sides: np.ndarray, read: Callable, step: int) -> np.ndarray:
    image = read()
    return shift_image(image, *np.rint(sides * SHIFT * image.shape[0]).astype(int))


def _lit_otherwise(policy: Policy, env: LiberoEnv, key: tuple) -> dict[str, Replacement]:
    """Darker or brighter, the same for both cameras and the whole episode."""
    factor = 1 + generator_of(key, "light").choice((-1, 1)) * BRIGHTNESS
    return dict.fromkeys(schema.CAMERAS, functools.partial(_light, factor))


def _light(factor: float, read: Callable, step: int) -> np.ndarray:
    return scale_brightness(read(), factor)


def _noisy(policy: Policy, env: LiberoEnv, key: tuple) -> dict[str, Replacement]:
    """Independent Gaussian noise in every entry and step."""
    return {entry: functools.partial(_add_noise, key, entry)
            for entry in (*schema.CAMERAS, *schema.LOW_DIM)}


def _add_noise(episode: tuple, key: str, read: Callable, step: int) -> np.ndarray:
    value, generator = read(), generator_of(episode, key, step)
    if key in schema.CAMERAS:
        noisy = value + generator.normal(0, PIXEL_NOISE, value.shape)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return value + generator.normal(0, PROPRIO_NOISE[key], value.shape)


def _constant(value, read: Callable, step: int):
    return copy.copy(value)


def _without_camera(camera: str, policy: Policy, env: LiberoEnv,
                    key: tuple) -> dict[str, Replacement]:
    size = env.image_size
    return {camera: functools.partial(_constant, np.zeros((size, size, 3), np.uint8))}


def _without_proprioception(policy: Policy, env: LiberoEnv, key: tuple) -> dict[str, Replacement]:
    """The mean of the policy's training data, 0 once normalised; NaN where it has no such mean."""
    stats = getattr(policy, "proprio_stats", None)
    if stats is None:
        raise ValueError("the policy has no proprio_stats; expected means in place of "
                         "proprioception")
    values = {name: np.full(width, np.nan) for name, width in schema.LOW_DIM.items()}
    first = 0
    for name in schema.PROPRIO_KEYS:
        values[name] = np.array(stats["mean"][first:first + schema.LOW_DIM[name]])
        first += schema.LOW_DIM[name]
    return {name: functools.partial(_constant, value) for name, value in values.items()}


# --- instruction ---------------------------------------------------------------------------------
def _another_instruction(policy: Policy, env: LiberoEnv, key: tuple) -> dict[str, Replacement]:
    """The instruction of another task of the suite, the same for the whole episode."""
    task = env.task
    suite = {load_task(task.suite, task_id).language
             for task_id in range(schema.SUITES[task.suite])}
    other = generator_of(key, "instruction").choice(sorted(suite - {task.language}))
    return {"language": functools.partial(_constant, str(other))}


def _no_instruction(policy: Policy, env: LiberoEnv, key: tuple) -> dict[str, Replacement]:
    return {"language": functools.partial(_constant, "")}


PERTURBATIONS = {
    "shift": Perturbation(
        f"each camera's image shifted by {128 * SHIFT:g} of 128 pixels", _shifted),
    "brightness": Perturbation(
        f"light {100 * BRIGHTNESS:g} % darker or brighter", _lit_otherwise),
    "noise": Perturbation(
        f"noise in images ({PIXEL_NOISE:g} of 255 grey levels) and readings", _noisy),
    **{f"delay_{steps}": Perturbation(f"actions {steps / schema.CONTROL_HZ:g} s late", delay=steps)
       for steps in DELAYS},
    "no_proprioception": Perturbation("arm and gripper readings replaced by their mean",
                                      _without_proprioception, needs="proprioception"),
    **{f"no_{camera.removesuffix('_rgb')}": Perturbation(
        f"{title} black", functools.partial(_without_camera, camera), needs=camera)
       for camera, title in schema.CAMERA_TITLES.items()},
    "wrong_instruction": Perturbation("another task's instruction", _another_instruction,
                                      needs="language"),
    "no_instruction": Perturbation("empty instruction", _no_instruction, needs="language"),
}
