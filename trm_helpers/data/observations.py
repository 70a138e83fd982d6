"""Observations for the network: a raw mapping as a batch of one, shape checks for batches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from .. import schema
from ..config import ModelConfig, convert
from .augment import resize_images
from .language import embed_instruction
from .normalize import normalize_proprio


def prepare_observation(observation: Mapping, config: ModelConfig, proprio_stats: Mapping | None,
                        device: torch.device) -> dict[str, torch.Tensor]:
    """One raw observation as a batch of one, equal to the data set's sample.

    Entries by ``config``: each camera (1, H, W, 3) float32 in [0, 1], ``proprio`` (1, P) z-scored
    (raw without ``proprio_stats``), ``task_id`` (1,) or ``language`` (1, 384). Raises
    ``ValueError`` for a missing or malformed entry.
    """
    batch = {}
    for camera in config.cameras:
        image = np.ascontiguousarray(_read(observation, camera))
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"observation {camera!r} has shape {image.shape} and type "
                             f"{image.dtype}; expected (H, W, 3) and uint8")
        images = resize_images(torch.tensor(image).unsqueeze(0), config.image_size)
        batch[camera] = images.to(device).float() / 255
    if config.proprioception:
        batch["proprio"] = _read_proprio(observation, proprio_stats).to(device)
    if config.conditioning == "task_id":
        task_id = convert("observation 'task_id'", _read(observation, "task_id"), int)
        if not 0 <= task_id < config.num_tasks:
            raise ValueError(f"observation 'task_id' is {task_id}; expected 0 to "
                             f"{config.num_tasks - 1}")
        batch["task_id"] = torch.tensor([task_id], device=device)
    elif config.conditioning == "language":
        text = convert("observation 'language'", _read(observation, "language"), str)
        batch["language"] = torch.from_numpy(embed_instruction(text)).unsqueeze(0).to(device)
    return batch


def _read_proprio(observation: Mapping, stats: Mapping | None) -> torch.Tensor:
    """(1, P): the arrays of ``schema.PROPRIO_KEYS`` side by side, z-scored."""
    arrays = []
    for key in schema.PROPRIO_KEYS:
        arrays.append(np.asarray(_read(observation, key), dtype=np.float32))
        found, width = arrays[-1].shape, schema.LOW_DIM[key]
        if found != (width,):
            raise ValueError(f"observation {key!r} has shape {found}; expected ({width},)")
    proprio = torch.from_numpy(np.concatenate(arrays)).unsqueeze(0)
    return proprio if stats is None else normalize_proprio(proprio, stats)


def _read(observation: Mapping, key: str):
    # not ``key in observation``, which would render the frame of a lazy observation
    try:
        return observation[key]
    except KeyError as error:
        found = ", ".join(sorted(observation)) or "nothing"
        raise ValueError(f"observation {key!r} is missing; found {found}") from error


def read_batch(observations: Mapping, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """(B, *shape), or (B, T, *shape) with T folded into B."""
    value = _read(observations, key)
    leading = value.ndim - len(shape)
    if leading not in (1, 2) or tuple(value.shape[leading:]) != shape:
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"observation {key!r} has shape {tuple(value.shape)}; expected "
                         f"(B, {sizes}) or (B, T, {sizes})")
    return value.flatten(0, leading - 1)
