"""Scaling of actions and proprioception: fitted on the training split, saved with the policy."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import torch

from .. import schema

EPSILON = 1e-6


class ActionNormalizer:
    """Affine scaling of the six arm dimensions; the gripper, -1 or +1, is left as it is.

    ``zscore`` maps ``a`` to ``(a - mean) / (std + 1e-6)``, ``minmax`` maps the fitted range to
    [-1, 1], ``none`` is the identity. A dimension that is constant in the fitted actions, up to
    1e-6, always normalises to 0 and denormalises to the constant, so that neither an unseen value
    nor a prediction is magnified.
    """

    def __init__(self, mode: str = "zscore"):
        schema.check_option("mode", mode, schema.NORMALIZATIONS)
        self.mode = mode
        fitted = mode == "none"
        self.offset: list[float] | None = [0.0] * schema.ARM_DIM if fitted else None
        self.scale: list[float] | None = [1.0] * schema.ARM_DIM if fitted else None

    def fit(self, actions) -> ActionNormalizer:
        """Fit to actions (..., 7), a tensor or an array; returns itself.

        Raises ``ValueError`` for another shape, no action, and numbers that are not finite.
        """
        arm = torch.as_tensor(actions).detach().cpu().double().numpy()
        if arm.size == 0:
            raise ValueError("actions is empty; expected at least one action to fit to")
        if arm.shape[-1:] != (schema.ACTION_DIM,) or not np.isfinite(arm).all():
            raise ValueError(f"actions have shape {arm.shape} and {np.sum(~np.isfinite(arm))} "
                             "numbers that are not finite; expected (..., 7) and none")
        arm = arm.reshape(-1, schema.ACTION_DIM)[:, :schema.ARM_DIM]
        low, high = arm.min(axis=0), arm.max(axis=0)
        if self.mode == "zscore":
            offset, scale = arm.mean(axis=0), arm.std(axis=0) + EPSILON
        elif self.mode == "minmax":
            offset, scale = (high + low) / 2, (high - low) / 2
        else:
            return self
        constant = high - low < EPSILON
        self.offset = np.where(constant, low, offset).tolist()
        self.scale = np.where(constant, 0.0, scale).tolist()
        return self

    def normalize(self, actions):
        """Actions (..., 7) in the environment's units to normalised ones; tensor or array."""
        self._check(actions)
        inverse = [1 / scale if scale else 0.0 for scale in self.scale]
        return (actions - _row(self.offset, 0.0, actions)) * _row(inverse, 1.0, actions)

    def denormalize(self, actions):
        """Inverse of :meth:`normalize`, for tensors or arrays (..., 7)."""
        self._check(actions)
        return actions * _row(self.scale, 1.0, actions) + _row(self.offset, 0.0, actions)

    def _check(self, actions) -> None:
        if self.offset is None:
            raise ValueError(f"the {self.mode} normaliser has no statistics; call fit first")
        if actions.shape[-1:] != (schema.ACTION_DIM,) or "float" not in str(actions.dtype):
            raise ValueError(f"actions have shape {tuple(actions.shape)} and type {actions.dtype}; "
                             "expected (..., 7) and a floating type")

    def to_dict(self) -> dict:
        """The complete state for JSON: ``mode``, ``offset`` and ``scale`` (six floats each)."""
        return {"mode": self.mode, "offset": self.offset, "scale": self.scale}

    @classmethod
    def from_dict(cls, values: Mapping) -> ActionNormalizer:
        """Inverse of :meth:`to_dict`."""
        normalizer = cls(values["mode"])
        normalizer.offset, normalizer.scale = (
            _finite(name, values[name], schema.ARM_DIM) for name in ("offset", "scale"))
        return normalizer


def _finite(name: str, values, count: int) -> list[float]:
    """``values`` from a file; ``ValueError`` unless they are ``count`` finite numbers."""
    if not isinstance(values, list) or len(values) != count or not all(
            isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
            for value in values):
        raise ValueError(f"{name}={str(values)[:80]} is not valid; expected {count} finite numbers")
    return values


def _row(arm: list[float], gripper: float, like):
    """The seven numbers as a tensor or array of the type and device of ``like``."""
    if isinstance(like, torch.Tensor):
        return torch.tensor([*arm, gripper], dtype=like.dtype, device=like.device)
    return np.array([*arm, gripper], dtype=like.dtype)


def fit_proprio(proprio: torch.Tensor) -> dict[str, list[float]]:
    """``mean`` and ``std`` of proprioception (N, P): P floats each, for ``(p - mean) / std``.

    ``std`` is 1 for constant values, a safe divisor.
    """
    values = proprio.double()
    std = values.std(dim=0, correction=0)
    std[std < EPSILON] = 1.0
    return {"mean": values.mean(dim=0).tolist(), "std": std.tolist()}


def read_proprio(stats: Mapping | None) -> dict[str, list[float]] | None:
    """Statistics of :func:`fit_proprio` from a file; ``ValueError`` for damaged ones."""
    if stats is None:
        return None
    checked = {name: _finite(name, stats[name], schema.PROPRIO_DIM) for name in ("mean", "std")}
    if min(checked["std"]) <= 0:
        raise ValueError(f"std={checked['std']} is not valid; expected numbers > 0")
    return checked


def normalize_proprio(proprio: torch.Tensor, stats: Mapping) -> torch.Tensor:
    """Z-score proprioception (..., P) with the statistics of :func:`fit_proprio`."""
    mean, std = (proprio.new_tensor(stats[name]) for name in ("mean", "std"))
    return (proprio - mean) / std
