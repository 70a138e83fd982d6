"""The policy: encoders, a shared block applied repeatedly, and an action head.

Shape letters: B batch, T time, K chunk, H W image, N tokens, D hidden, P proprioception.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from .. import schema
from ..config import ModelConfig
from ..data.normalize import ActionNormalizer
from ..data.observations import prepare_observation, read_batch
from ..files import digest, read_bytes
from .layers import STYLE_DIM, ActionHead, TokenEncoder, VisualEncoder, two_layers
from .localizer import KeypointEncoder
from .recursion import (
    Convergence,
    Recursion,
    recurse_adaptive,
    recurse_fixed,
    recurse_remainder,
    recurse_with_early_exit,
)
from .variants import StyleEncoder, make_block

HALTING_THRESHOLD = 0.01  # of remainder and adaptive: the weight left when a sample stops
HALTING_TOLERANCE = 0.05  # of learned halting: largest mean absolute error of a right answer
HALTING_WEIGHT = 0.5  # of the learned halting head's loss
GRIPPER_WEIGHT = 0.1  # of the gripper's cross-entropy beside the arm's loss
KL_WEIGHT = 10.0  # of the style's divergence in the loss of ACT's network
ENSEMBLE_DECAY = 0.01  # of temporal ensembling: weight exp(-decay * i), i = 0 the oldest (ACT)


class TRMPolicy(nn.Module):
    """Observations to actions: encoders, the shared block ``num_recursions`` times, action head.

    With ``variant="block"``, ``x_cond`` is one vector: the encoder's output for a single camera
    alone; otherwise the features of all cameras (separate weights), proprioception and task are
    concatenated and fused by a linear layer and LayerNorm. With ``"trm"`` and the baselines
    ``"transformer"`` and ``"act"`` it is a sequence of tokens: those of each camera, one for
    proprioception, one for the task, for ``"act"`` one for the style, and a learned query for each
    of the K actions.

    Args:
        config: sizes and options.
        normalizer: inverted by ``act``; None for unscaled actions.
        proprio_stats: ``mean`` and ``std`` (P floats each) applied by ``act``; None for raw
            proprioception. Batches are z-scored already.
    """

    def __init__(self, config: ModelConfig, normalizer: ActionNormalizer | None = None,
                 proprio_stats: Mapping | None = None):
        super().__init__()
        self.config = config
        self.normalizer = normalizer or ActionNormalizer("none")
        self.proprio_stats = proprio_stats
        dim, size = config.hidden_dim, config.image_size
        self.tokens = config.variant != "block"
        self.encoders = nn.ModuleDict({
            camera: TokenEncoder(dim, size, config.image_grid, config.image_activation)
            if self.tokens else VisualEncoder(dim, size, config.image_activation)
            for camera in config.cameras
        })
        if config.keypoints:
            task_dim = {"language": schema.LANGUAGE_DIM, "task_id": config.num_tasks, "none": 0}
            self.encoders[schema.STILL_CAMERA] = KeypointEncoder(
                dim, len(config.keypoints), config.keypoint_tasks, task_dim[config.conditioning],
                config.looks)
        parts = len(config.cameras) + config.proprioception + (config.conditioning != "none")
        if config.proprioception:
            self.proprio_mlp = two_layers(schema.PROPRIO_DIM, dim)
        if config.conditioning == "task_id":
            self.task_embedding = nn.Embedding(config.num_tasks, dim)
        elif config.conditioning == "language":
            self.language_mlp = two_layers(schema.LANGUAGE_DIM, dim)
        if self.tokens:
            self.action_queries = nn.Parameter(torch.randn(config.chunk, dim))
        elif parts > 1:
            self.fuse = nn.Sequential(nn.Linear(parts * dim, dim), nn.LayerNorm(dim))
        self.block = make_block(config)
        self.style = None
        if config.variant == "act":
            self.style = StyleEncoder(dim, schema.NUM_HEADS, config.num_layers, config.chunk)
        if config.halting in ("remainder", "adaptive", "learned"):
            # sigmoid(w h) as documented for the remainder, sigmoid(w h + b) in Graves' paper
            self.halt = nn.Linear(dim, 1, bias=config.halting != "remainder")
        if config.halting == "learned":
            nn.init.zeros_(self.halt.weight)  # halting is improbable at first, as in TRM
            nn.init.constant_(self.halt.bias, -5.0)
        self.head = ActionHead(config)
        self.last_depth: torch.Tensor | None = None  # (B,) of the last forward pass
        self.sha256 = ""  # digest of the weights file
        self.last_recursions = 0  # of the last decision in act
        self.reset()

    # --- network -------------------------------------------------------------------------------

    def encode(self, observations: Mapping, style: torch.Tensor | None = None) -> torch.Tensor:
        """Batched observations, with or without T, to ``x_cond``: (B, D), or tokens (B, N, D).

        ``style`` (B, STYLE_DIM) is ACT's latent; None is zero.
        """
        size = self.config.image_size
        parts = []
        for camera, encoder in self.encoders.items():
            images = read_batch(observations, camera, (size, size, 3))
            parts.append(encoder(images, self.task(observations))
                         if isinstance(encoder, KeypointEncoder) else encoder(images))
        if self.config.proprioception:
            proprio = read_batch(observations, "proprio", (schema.PROPRIO_DIM,))
            parts.append(self.proprio_mlp(proprio))
        if self.config.conditioning == "task_id":
            parts.append(self.task_embedding(read_batch(observations, "task_id", ())))
        elif self.config.conditioning == "language":
            parts.append(self.language_mlp(self.task(observations)))
        if not self.tokens:
            return self.fuse(torch.cat(parts, dim=-1)) if len(parts) > 1 else parts[0]
        if self.style is not None:
            nothing = parts[0].new_zeros(len(parts[0]), STYLE_DIM)
            parts.append(self.style.token(nothing if style is None else style))
        parts = [part if part.ndim == 3 else part.unsqueeze(1) for part in parts]
        queries = self.action_queries.to(parts[0].dtype).expand(len(parts[0]), -1, -1)
        return torch.cat([*parts, queries], dim=1)

    def task(self, observations: Mapping) -> torch.Tensor | None:
        """Task vector (B, 384 or num_tasks): language embedding or one-hot; None without one."""
        if self.config.conditioning == "language":
            return read_batch(observations, "language", (schema.LANGUAGE_DIM,))
        if self.config.conditioning == "task_id":
            return F.one_hot(read_batch(observations, "task_id", ()), self.config.num_tasks).float()
        return None

    def recurse(self, x_cond: torch.Tensor, num_recursions: int | None = None,
                carry: torch.Tensor | None = None) -> Recursion:
        """Apply the block up to ``num_recursions`` times (None: as configured).

        ``config.halting`` selects the function of :mod:`recursion`. ``learned`` and ``convergence``
        exit early in evaluation mode only; training takes all steps. For tokens, halting heads read
        the mean over the K answers.

        Args:
            carry: initial state of the block; None for its own.
        """
        config = self.config
        limit = config.num_recursions if num_recursions is None else num_recursions
        if limit < 1:
            raise ValueError(f"num_recursions={limit} is not valid; expected >= 1")
        state = self.block.initial_state(x_cond) if carry is None else carry
        if config.halting in ("remainder", "adaptive"):
            weighted = recurse_remainder if config.halting == "remainder" else recurse_adaptive
            return weighted(self.block, x_cond, state, limit, self._halting_logit,
                            HALTING_THRESHOLD)
        if self.training or config.halting == "fixed":
            return recurse_fixed(self.block, x_cond, state, limit,
                                 detach=self.training and config.deep_supervision)
        if config.halting == "learned":  # done with the first answer that the head judges right
            def is_done(answers: torch.Tensor) -> torch.Tensor:
                return self._halting_logit(answers) > 0
        else:
            is_done = Convergence(lambda answers: self.head(answers)[0],
                                  config.convergence_threshold)
        return recurse_with_early_exit(self.block, x_cond, state, limit, is_done)

    def _halting_logit(self, answer: torch.Tensor) -> torch.Tensor:
        """(B,) of features (B, D), or of the mean of (B, K, D)."""
        pooled = answer.mean(dim=1) if answer.ndim == 3 else answer
        return self.halt(pooled).float().squeeze(-1)

    def forward(self, observations: Mapping, num_recursions: int | None = None,
                return_all_states: bool = False):
        """Normalised actions (B, 7), or (B, K, 7) for a chunk; T folds into B.

        Args:
            observations: each camera float (B, H, W, 3) in [0, 1]; where configured, ``proprio``
                (B, P) z-scored, ``task_id`` (B,) int64 or ``language`` (B, 384); all with or all
                without T after B.
            num_recursions: depth; None as configured.
            return_all_states: return ``(actions, [h0 ... hn])``, each (B, D), or (B, K, D).

        Sets ``last_depth`` (B,), the recursions used per sample. Raises ``ValueError`` for a
        missing key or a wrong shape.
        """
        recursion = self.recurse(self.encode(observations), num_recursions)
        actions, _ = self.head(recursion.output)
        if self.config.chunk == 1:
            actions = actions.squeeze(1)
        self.last_depth = recursion.depth
        return (actions, recursion.states) if return_all_states else actions

    def loss(self, batch: Mapping,
             loss: str = "mse") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a batch (``observations``, normalised ``actions``, ``mask``) and its parts.

        ``action``: mean over valid actions and their seven numbers (the arm's six where the gripper
        has its own loss). ``gripper``: mean cross-entropy, times ``GRIPPER_WEIGHT``. ``ponder``
        (``halting="adaptive"``): mean of N + R, times ``ponder_cost``. ``final``: the weighted sum
        of these for the final answer, comparable between training and evaluation mode. The parts
        are detached and, except ``final``, unweighted. ``"mix"`` is the mean of ``"mse"`` and
        ``"l1"``.

        In training, ``deep_supervision`` takes the mean over the answers of all steps;
        ``halting="learned"`` adds ``halting``, times ``HALTING_WEIGHT``: the binary cross-entropy
        of the head at every step against whether the answer's mean absolute error is within
        ``HALTING_TOLERANCE``; ``variant="act"`` samples its style from the encoder of the actions
        and adds ``kl``, times ``KL_WEIGHT``.
        """
        schema.check_option("loss", loss, schema.LOSSES)
        chunk = (self.config.chunk,) * (self.config.chunk > 1)
        shape = (*batch["mask"].shape[:batch["mask"].ndim - len(chunk)], *chunk)
        if batch["mask"].shape != shape or batch["actions"].shape != (*shape, schema.ACTION_DIM):
            raise _other_shape(batch, self.config.chunk)
        target = batch["actions"].reshape(-1, self.config.chunk, schema.ACTION_DIM)
        mask = batch["mask"].reshape(-1, self.config.chunk)
        style = None
        if self.style is not None and self.training:
            mean, log_variance = self.style(target, mask)
            noise = torch.randn(mean.shape).to(mean)  # from the CPU's generator, like all others
            style = mean + (0.5 * log_variance).exp() * noise
        recursion = self.recurse(self.encode(batch["observations"], style))
        count = len(recursion.output)
        if len(target) != count or len(mask) != count:
            raise _other_shape(batch, self.config.chunk, f"{count} ")
        every_step = self.training and self.config.deep_supervision
        graded = recursion.states[1:] if every_step else [recursion.output]
        grades = [self._grade(*self.head(answer), target, mask, loss) for answer in graded]
        parts = {name: torch.stack([grade[name] for grade in grades]).mean() for name in grades[0]}
        total, final = (grade["action"] + GRIPPER_WEIGHT * grade.get("gripper", 0.0)
                        for grade in (parts, grades[-1]))
        if self.config.halting == "adaptive":
            parts["ponder"] = _masked_mean(recursion.ponder, mask.amax(dim=1))
            total = total + self.config.ponder_cost * parts["ponder"]
            final = final + self.config.ponder_cost * parts["ponder"]
        parts["final"] = final
        if style is not None:
            divergence = self.style.divergence(mean, log_variance)
            parts["kl"] = _masked_mean(divergence, mask.amax(dim=1))
            total = total + KL_WEIGHT * parts["kl"]
        if self.config.halting == "learned" and self.training:
            parts["halting"] = self._grade_halting(recursion.states[1:], target, mask)
            total = total + HALTING_WEIGHT * parts["halting"]
        return total, {name: part.detach() for name, part in parts.items()}

    def _grade(self, predicted, logits, target, mask, loss: str) -> dict[str, torch.Tensor]:
        """``action`` and, with logits, ``gripper`` loss of one answer's actions (B, K, 7)."""
        width = schema.ACTION_DIM if logits is None else schema.ARM_DIM
        error = predicted[..., :width] - target[..., :width]
        errors = {"mse": error.square(), "l1": error.abs()}
        errors["mix"] = (errors["mse"] + errors["l1"]) / 2
        parts = {"action": _masked_mean(errors[loss].mean(-1), mask)}
        if logits is not None:
            closed = target[..., schema.GRIPPER_INDEX] > 0  # (B, K)
            if logits.shape[-1] == 1:
                entropy = F.binary_cross_entropy_with_logits(
                    logits.squeeze(-1), closed.float(), reduction="none")
            else:
                entropy = F.cross_entropy(logits.mT, closed.long(), reduction="none")
            parts["gripper"] = _masked_mean(entropy, mask)
        return parts

    def _grade_halting(self, answers, target, mask) -> torch.Tensor:
        terms = []
        for answer in answers:
            with torch.no_grad():
                error = (self.head(answer)[0] - target).abs().mean(-1)  # (B, K)
                error = (error * mask).sum(1) / mask.sum(1).clamp(min=1)
                right = (error <= HALTING_TOLERANCE).float()
            terms.append(F.binary_cross_entropy_with_logits(self._halting_logit(answer), right,
                                                            reduction="none"))
        return _masked_mean(torch.stack(terms).mean(0), mask.amax(dim=1))

    # --- control -------------------------------------------------------------------------------

    @property
    def execution_horizon(self) -> int:
        """Actions executed per decision; may be set at any time."""
        return self.config.execution_horizon

    @execution_horizon.setter
    def execution_horizon(self, steps: int) -> None:
        self.config = dataclasses.replace(self.config, execution_horizon=steps)

    def reset(self) -> None:
        """Start an episode: discard planned actions, older chunks and the carry."""
        self._planned: deque[np.ndarray] = deque()
        # for ensembling, oldest first: first step and actions (K, 7) of a chunk
        self._chunks: deque[tuple[int, np.ndarray]] = deque()
        self._steps = 0  # planned so far, for ensembling
        self._carry: torch.Tensor | None = None
        self.last_chunk: np.ndarray | None = None  # (K, 7) of the last decision, before rounding

    def act(self, observation: Mapping) -> np.ndarray:
        """The next action (7,) float32 in [-1, 1], in the environment's units.

        ``observation`` is unbatched: each camera uint8 (H, W, 3), resized as in training; where
        configured, the raw arrays of ``schema.PROPRIO_KEYS``, ``task_id``, and the instruction as
        ``language``. It is read once per ``execution_horizon`` calls, when a new chunk is needed,
        so that a simulator renders only the frames used. Raises ``ValueError`` for a missing or
        malformed entry, ``RuntimeError`` for output that is not finite.
        """
        if not self._planned:
            self._planned.extend(self._plan(observation))
        return self._planned.popleft()

    def prepare(self, observation: Mapping) -> dict[str, torch.Tensor]:
        """:func:`prepare_observation` for this policy, on its device."""
        device = next(self.parameters()).device
        return prepare_observation(observation, self.config, self.proprio_stats, device)

    @torch.inference_mode()
    def _plan(self, observation: Mapping) -> np.ndarray:
        """Actions (execution_horizon, 7) until the next observation is read."""
        recursion = self.recurse(self.encode(self.prepare(observation)), carry=self._carry)
        actions = self.head(recursion.output)[0].squeeze(0)  # (K, 7)
        if not actions.isfinite().all():
            raise RuntimeError(f"the policy returned {actions.tolist()}; expected finite numbers. "
                               "Its weights or the observation hold NaN or infinity")
        if self.config.carry_over:
            self._carry = recursion.carry
        self.last_recursions = int(recursion.depth.max())
        planned = self.last_chunk = self.normalizer.denormalize(actions).cpu().numpy()
        if self.config.temporal_ensembling:
            planned = self._ensemble(planned)
        planned = planned[: self.execution_horizon].copy()
        if self.config.gripper in ("threshold", "classifier", "binary"):
            planned[:, schema.GRIPPER_INDEX] = np.where(
                planned[:, schema.GRIPPER_INDEX] > 0, schema.GRIPPER_CLOSED, schema.GRIPPER_OPEN)
        return planned.clip(-1, 1)

    def _ensemble(self, chunk: np.ndarray) -> np.ndarray:
        """Temporal ensembling (ACT, arXiv 2304.13705) of this chunk (K, 7) and older ones.

        Returns (execution_horizon, 7): the average with weights exp(-decay * i), i = 0 for the
        oldest prediction.
        """
        self._chunks.append((self._steps, chunk))
        while self._chunks[0][0] + len(chunk) <= self._steps:  # ends before this step
            self._chunks.popleft()
        planned = []
        for step in range(self._steps, self._steps + self.execution_horizon):
            predictions = [older[step - first] for first, older in self._chunks
                           if step - first < len(older)]
            weights = np.exp(-ENSEMBLE_DECAY * np.arange(len(predictions), dtype=np.float32))
            planned.append(np.average(predictions, axis=0, weights=weights))
        self._steps += len(planned)
        return np.stack(planned).astype(np.float32)


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Weights and the digest of the bytes they were read from.

    Raises ``ValueError`` for a damaged file, and for weights that are not finite.
    """
    content = read_bytes(path)
    try:
        weights = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ValueError(f"{path} is damaged: {', '.join(broken[:3])} "
                         f"{'are' if len(broken) > 1 else 'is'} not finite")
    return weights, digest(content)


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Number of parameters of each direct child of ``module``, and of its own, by name."""
    own = {name: parameter.numel() for name, parameter in module.named_parameters(recurse=False)}
    return own | {name: sum(parameter.numel() for parameter in child.parameters())
                  for name, child in module.named_children()}


def _other_shape(batch: Mapping, chunk: int, count: str = "") -> ValueError:
    return ValueError(f"actions have shape {tuple(batch['actions'].shape)} and mask "
                      f"{tuple(batch['mask'].shape)}; expected {count}observations with "
                      f"chunk={chunk} actions each")


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)
