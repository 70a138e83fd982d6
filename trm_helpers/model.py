"""The policy: images to a conditioning vector, one shared block applied over and over, actions.

Shape letters: B batch, T time, K chunk, H W image, N tokens, D hidden, P proprioception.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from . import schema
from .augment import resize_images
from .config import ModelConfig
from .data import ActionNormalizer, normalize_proprio

CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (128, 3, 1))  # channels, kernel, stride
LOSSES = ("mse", "l1", "mix")


class VisualEncoder(nn.Module):
    """Images (B, H, W, 3) in [0, 1] to features (B, D).

    At H = W = 128: (B, 32, 31, 31), (B, 64, 14, 14), (B, 128, 12, 12), each followed by ReLU;
    flattened to 18432, a linear layer to D, LayerNorm.
    """

    def __init__(self, hidden_dim: int = 256, image_size: int = schema.IMAGE_SIZE):
        super().__init__()
        layers, channels, side = [], 3, image_size
        for out_channels, kernel, stride in CONVOLUTIONS:
            layers += [nn.Conv2d(channels, out_channels, kernel, stride), nn.ReLU()]
            channels, side = out_channels, (side - kernel) // stride + 1
        self.convolutions = nn.Sequential(*layers)
        self.project = nn.Linear(channels * side * side, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # the permuted view is channels_last in memory: the convolutions take it without a copy
        maps = self.convolutions(rearrange(images, "b h w c -> b c h w"))  # (B, 128, 12, 12)
        return self.norm(self.project(rearrange(maps, "b c h w -> b (c h w)")))  # (B, D)


class RecursiveBlock(nn.Module):
    """One step ``h = block(h, x_cond)``; its weights are shared by all steps.

    The observation is re-injected (``h + x_cond``), then self-attention and an MLP, each with a
    residual and LayerNorm after it. ``h`` and ``x_cond`` have the same shape, (B, D), one token,
    or (B, N, D). Over one token the softmax is over one key and always 1, so that attention is
    then a linear map of that token (value and output projections); query and key play no part.
    """

    def __init__(self, hidden_dim: int = 256, num_heads: int = 4):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(hidden_dim)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim), nn.GELU(), nn.Linear(4 * hidden_dim, hidden_dim)
        )
        self.mlp_norm = nn.LayerNorm(hidden_dim)

    def forward(self, h: torch.Tensor, x_cond: torch.Tensor) -> torch.Tensor:
        if h.shape != x_cond.shape or h.ndim not in (2, 3):
            raise ValueError(
                f"h has shape {tuple(h.shape)} and x_cond {tuple(x_cond.shape)}; "
                "expected the same shape, (B, D) or (B, N, D)"
            )
        tokens = (h + x_cond).view(len(h), -1, h.shape[-1])  # (B, N, D), N = 1 for one vector
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        tokens = self.attention_norm(tokens + attended)
        return self.mlp_norm(tokens + self.mlp(tokens)).view(h.shape)


class ActionHead(nn.Module):
    """Features (B, D) to normalised actions (B, K, 7) and, of a classifier, logits (B, K, 2).

    Linear D-D, ReLU, linear. The gripper is the seventh number of that last layer, or, as
    ``"classifier"``, a softmax of its own over (open, closed) whose expected value in (-1, 1)
    becomes the seventh number. ``"mixture"`` has ``num_experts`` last layers and sums them with the
    weights of a softmax gate on the features.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.chunk, self.num_experts = config.chunk, 1
        self.hidden = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.gate = self.gripper = None
        width = schema.ACTION_DIM
        if config.gripper == "classifier":
            width = schema.ARM_DIM
            self.gripper = nn.Linear(config.hidden_dim, 2 * self.chunk)
        elif config.gripper == "mixture":
            self.num_experts = config.num_experts
            self.gate = nn.Linear(config.hidden_dim, self.num_experts)
        self.output = nn.Linear(config.hidden_dim, self.num_experts * self.chunk * width)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = F.relu(self.hidden(features))
        experts = rearrange(
            self.output(hidden).float(), "b (e k a) -> b e k a", e=self.num_experts, k=self.chunk
        )
        if self.gate is not None:
            weights = self.gate(features).float().softmax(-1)  # (B, E)
            return torch.einsum("be,beka->bka", weights, experts), None
        actions = experts.squeeze(1)  # (B, K, 7), of a classifier (B, K, 6)
        if self.gripper is None:
            return actions, None
        logits = rearrange(self.gripper(hidden).float(), "b (k c) -> b k c", c=2)
        p_open, p_closed = logits.softmax(-1).split(1, dim=-1)
        gripper = schema.GRIPPER_OPEN * p_open + schema.GRIPPER_CLOSED * p_closed
        return torch.cat([actions, gripper], dim=-1), logits


class Recursion(NamedTuple):
    """What the recursion did to a batch."""

    output: torch.Tensor  # (B, D), what the action head reads
    states: list[torch.Tensor]  # h0 ... hn, each (B, D); h0 is x_cond
    weights: torch.Tensor  # (B, n): output is the sum of weights[:, i] * states[i + 1]
    depth: torch.Tensor  # (B,) int64, recursions each sample used before it halted
    ponder: torch.Tensor  # (B,) Graves' N + R; without ACT, the depth


class TRMPolicy(nn.Module):
    """Observations to actions: encoders, the shared block ``num_recursions`` times, action head.

    With one camera and nothing else, ``x_cond`` is the encoder's output. Several cameras (separate
    weights), proprioception and task are concatenated, then a linear layer and LayerNorm.

    Args:
        config: sizes and options.
        normalizer: an ``ActionNormalizer`` that ``act`` undoes; None for unscaled actions.
        proprio_stats: ``mean`` and ``std`` (P floats each) that ``act`` applies; None for raw
            proprioception. Batches bring theirs z-scored.
    """

    def __init__(
        self,
        config: ModelConfig,
        normalizer: ActionNormalizer | None = None,
        proprio_stats: Mapping | None = None,
    ):
        super().__init__()
        self.config = config
        self.normalizer = normalizer
        self.proprio_stats = proprio_stats
        dim = config.hidden_dim
        self.encoders = nn.ModuleDict(
            {camera: VisualEncoder(dim, config.image_size) for camera in config.cameras}
        )
        parts = len(config.cameras)
        if config.proprioception:
            parts += 1
            self.proprio_mlp = nn.Sequential(
                nn.Linear(schema.PROPRIO_DIM, dim), nn.ReLU(), nn.Linear(dim, dim)
            )
        if config.num_tasks:
            parts += 1
            self.task_embedding = nn.Embedding(config.num_tasks, dim)
        if parts > 1:
            self.fuse = nn.Sequential(nn.Linear(parts * dim, dim), nn.LayerNorm(dim))
        self.block = RecursiveBlock(dim, config.num_heads)
        if config.halting != "fixed":
            # sigmoid(w h) as documented for the remainder, sigmoid(w h + b) in Graves' paper
            self.halt = nn.Linear(dim, 1, bias=config.halting == "act")
        self.head = ActionHead(config)
        self.last_depth: torch.Tensor | None = None  # (B,) of the last forward pass
        self.last_recursions = 0  # of the last decision in act
        self.reset()

    # --- network -------------------------------------------------------------------------------

    def encode(self, observations: Mapping) -> torch.Tensor:
        """Batched observations, with or without T, to ``x_cond`` (B, D) or (B*T, D)."""
        size = self.config.image_size
        parts = [
            encoder(_read_batch(observations, camera, (size, size, 3)))
            for camera, encoder in self.encoders.items()
        ]
        if self.config.proprioception:
            proprio = _read_batch(observations, "proprio", (schema.PROPRIO_DIM,))
            parts.append(self.proprio_mlp(proprio))
        if self.config.num_tasks:
            parts.append(self.task_embedding(_read_batch(observations, "task_id", ())))
        return self.fuse(torch.cat(parts, dim=-1)) if len(parts) > 1 else parts[0]

    def recurse(self, x_cond: torch.Tensor, num_recursions: int | None = None) -> Recursion:
        """Apply the block up to ``num_recursions`` times (None: as configured) to (B, D).

        ``halting="fixed"``: all of them; the output is the last state.

        ``"remainder"``: ``r = 1``, then ``h = block(h, x_cond)``, ``output += r h``,
        ``r *= 1 - sigmoid(w h)`` until the largest r of the batch is below ``halting_threshold``.
        The weights 1, r1, r2 ... of that sum, kept as documented, do not sum to one.
        A sample's depth counts the steps until its own r is below the threshold.

        ``"act"``: adaptive computation time (Graves 2016, arXiv 1603.08983, section 2). Step n
        halts with probability ``p = sigmoid(w h + b)``; the first step at which the sum of p is
        at least ``1 - halting_threshold``, or the last one allowed, gets the remainder R instead,
        so that the weights of every sample sum to one. The ponder cost is N + R.
        """
        limit = self.config.num_recursions if num_recursions is None else num_recursions
        if limit < 1:
            raise ValueError(f"num_recursions={limit} is not valid; expected >= 1")
        threshold, halting = self.config.halting_threshold, self.config.halting
        h, states, weights = x_cond, [x_cond], []
        r = x_cond.new_ones(len(x_cond), dtype=torch.float32)  # (B,), what is left to give away
        depth, last_r = torch.zeros_like(r, dtype=torch.int64), torch.zeros_like(r)
        for step in range(1, limit + 1):
            h = self.block(h, x_cond)
            states.append(h)
            depth = depth + (r >= threshold)
            if halting == "fixed":
                weights.append(torch.full_like(r, float(step == limit)))
                continue
            p = torch.sigmoid(self.halt(h).float()).squeeze(-1)  # (B,)
            if halting == "remainder":
                weights.append(r)
                r = r * (1 - p)
            else:
                halts = (r - p <= threshold) | (step == limit)  # stays true: then r is 0
                weights.append(torch.where(halts, r, p))
                last_r = last_r + torch.where(halts, r, 0)
                r = torch.where(halts, 0, r - p)
            if not (r >= threshold).any():
                break
        weights = torch.stack(weights, dim=1)  # (B, n)
        if halting == "fixed":
            output = h
        else:
            output = torch.einsum("bn,nbd->bd", weights, torch.stack(states[1:]).float())
        return Recursion(output, states, weights, depth, depth + last_r)

    def forward(
        self,
        observations: Mapping,
        num_recursions: int | None = None,
        return_all_states: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Normalised actions (B, 7), or (B, K, 7) for a chunk; T folds into B.

        Args:
            observations: each camera float (B, H, W, 3) in [0, 1]; where configured, ``proprio``
                (B, P) z-scored and ``task_id`` (B,) int64; all with or all without T after B.
            num_recursions: another depth than the one configured.
            return_all_states: return ``(actions, [h0 ... hn])``, each state (B, D).

        ``last_depth`` (B,) then holds the recursions each sample used. Raises ``ValueError`` for
        a missing key and for a wrong shape.
        """
        recursion = self.recurse(self.encode(observations), num_recursions)
        actions, _ = self.head(recursion.output)
        if self.config.chunk == 1:
            actions = actions.squeeze(1)
        self.last_depth = recursion.depth
        return (actions, recursion.states) if return_all_states else actions

    def loss(
        self, batch: Mapping, loss: str = "mse", gripper_weight: float = 0.1
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a batch (``observations``, normalised ``actions``, ``mask``) and its parts.

        ``action``: mean over the seven numbers (of a classifier, the six of the arm) and over the
        actions that the mask says exist. ``gripper`` (classifier): cross-entropy over the same
        actions, times ``gripper_weight``. ``ponder`` (ACT): mean of N + R, times the configured
        ``ponder_cost``. The parts are detached and unweighted. ``"mix"`` is the mean of ``"mse"``
        and ``"l1"``.
        """
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is not valid; expected one of {', '.join(LOSSES)}")
        recursion = self.recurse(self.encode(batch["observations"]))
        predicted, logits = self.head(recursion.output)  # (B*T, K, 7)
        target = batch["actions"].reshape(-1, *predicted.shape[1:])
        mask = batch["mask"].reshape(-1, self.config.chunk)
        if target.shape != predicted.shape or mask.shape != predicted.shape[:2]:
            raise ValueError(
                f"actions have shape {tuple(batch['actions'].shape)} and mask "
                f"{tuple(batch['mask'].shape)}; expected {predicted.shape[0]} observations with "
                f"chunk={self.config.chunk} actions each"
            )
        width = schema.ACTION_DIM if logits is None else schema.ARM_DIM
        error = predicted[..., :width] - target[..., :width]
        errors = {"mse": error.square(), "l1": error.abs()}
        errors["mix"] = (errors["mse"] + errors["l1"]) / 2
        parts = {"action": _masked_mean(errors[loss].mean(-1), mask)}
        total = parts["action"]
        if logits is not None:
            closed = (target[..., schema.GRIPPER_INDEX] > 0).long()
            cross_entropy = F.cross_entropy(logits.mT, closed, reduction="none")  # (B*T, K)
            parts["gripper"] = _masked_mean(cross_entropy, mask)
            total = total + gripper_weight * parts["gripper"]
        if self.config.halting == "act":
            parts["ponder"] = _masked_mean(recursion.ponder, mask.amax(dim=1))
            total = total + self.config.ponder_cost * parts["ponder"]
        return total, {name: part.detach() for name, part in parts.items()}

    # --- control -------------------------------------------------------------------------------

    def reset(self) -> None:
        """Start an episode: forget what is left of the last chunk."""
        self._planned: deque[np.ndarray] = deque()

    def act(self, observation: Mapping) -> np.ndarray:
        """The next action (7,) float32 in [-1, 1], in the environment's units.

        ``observation`` is unbatched: each camera uint8 (H, W, 3), resized as in training; where
        configured, the raw arrays of ``schema.PROPRIO_KEYS`` and ``task_id``. It is read when a
        new chunk is needed, once in ``execution_horizon`` calls, so that a simulator which draws
        frames on demand draws no others. Raises ``ValueError`` for a missing or malformed entry,
        ``RuntimeError`` when the network returns a number that is not finite.
        """
        if not self._planned:
            self._planned.extend(self._plan(observation))
        return self._planned.popleft()

    @torch.inference_mode()
    def _plan(self, observation: Mapping) -> np.ndarray:
        """(execution_horizon, 7): the actions to execute before the next look."""
        actions = self(self._prepare(observation)).view(self.config.chunk, schema.ACTION_DIM)
        if not actions.isfinite().all():
            raise RuntimeError(
                f"the policy returned {actions.tolist()}; expected finite numbers. "
                "Its weights or the observation hold NaN or infinity"
            )
        self.last_recursions = int(self.last_depth.max())
        actions = actions[: self.config.execution_horizon]
        if self.normalizer is not None:
            actions = self.normalizer.denormalize(actions)
        if self.config.gripper in ("threshold", "classifier"):
            closed = actions[:, schema.GRIPPER_INDEX] > 0
            actions[:, schema.GRIPPER_INDEX] = torch.where(
                closed, schema.GRIPPER_CLOSED, schema.GRIPPER_OPEN
            )
        return actions.clamp(-1, 1).float().cpu().numpy()

    def _prepare(self, observation: Mapping) -> dict[str, torch.Tensor]:
        """One raw observation as a batch of one on the policy's device, like the data set's."""
        device = next(self.parameters()).device
        batch = {}
        for camera in self.config.cameras:
            image = np.ascontiguousarray(_read(observation, camera))
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(
                    f"observation {camera!r} has shape {image.shape} and type {image.dtype}; "
                    "expected (H, W, 3) and uint8"
                )
            images = resize_images(torch.tensor(image).unsqueeze(0), self.config.image_size)
            batch[camera] = images.to(device).float() / 255
        if self.config.proprioception:
            batch["proprio"] = self._read_proprio(observation).to(device)
        if self.config.num_tasks:
            task_id = int(_read(observation, "task_id"))
            if not 0 <= task_id < self.config.num_tasks:
                raise ValueError(
                    f"observation 'task_id' is {task_id}; expected 0 to {self.config.num_tasks - 1}"
                )
            batch["task_id"] = torch.tensor([task_id], device=device)
        return batch

    def _read_proprio(self, observation: Mapping) -> torch.Tensor:
        """(1, P): the arrays of ``schema.PROPRIO_KEYS`` side by side, z-scored."""
        arrays = []
        for key in schema.PROPRIO_KEYS:
            arrays.append(np.asarray(_read(observation, key), dtype=np.float32))
            found, width = arrays[-1].shape, schema.LOW_DIM[key]
            if found != (width,):
                raise ValueError(f"observation {key!r} has shape {found}; expected ({width},)")
        proprio = torch.from_numpy(np.concatenate(arrays)).unsqueeze(0)
        stats = self.proprio_stats
        return proprio if stats is None else normalize_proprio(proprio, stats)


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Number of parameters of each direct child of ``module``, by name."""
    return {
        name: sum(parameter.numel() for parameter in child.parameters())
        for name, child in module.named_children()
    }


def _read(observation: Mapping, key: str):
    # not ``key in observation``: on a mapping that draws frames on demand that draws one too
    try:
        return observation[key]
    except KeyError as error:
        found = ", ".join(sorted(observation)) or "nothing"
        raise ValueError(f"observation {key!r} is missing; found {found}") from error


def _read_batch(observations: Mapping, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """(B, *shape), or (B, T, *shape) with T folded into B."""
    value = _read(observations, key)
    leading = value.ndim - len(shape)
    if leading not in (1, 2) or tuple(value.shape[leading:]) != shape:
        raise ValueError(
            f"observation {key!r} has shape {tuple(value.shape)}; "
            f"expected B or B, T and then {shape}"
        )
    return value.flatten(0, leading - 1)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)
