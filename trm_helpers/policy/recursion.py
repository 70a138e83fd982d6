"""The recursion: one small network applied again and again to its own output.

    state = block.initial_state(x)         # x: the encoded observation
    for _ in range(num_recursions):
        state = block(state, x)            # the same weights every time
    features = block.readout(state)        # what the action head reads

Two blocks recurse. :class:`RecursiveBlock` refines one vector per observation.
:class:`TRMBlock`, the recursion of Tiny Recursive Models (arXiv 2510.04871), refines an answer y
and a latent z over tokens. Four functions repeat a block and differ in when they stop:

===============================  ============================  ============================
function                         setting ``halting``           output
===============================  ============================  ============================
:func:`recurse_fixed`            ``fixed``                     the last answer
:func:`recurse_remainder`        ``remainder``                 weighted sum of all answers
:func:`recurse_adaptive`         ``adaptive``                  weighted mean of all answers
:func:`recurse_with_early_exit`  ``learned``, ``convergence``  each sample's last answer
===============================  ============================  ============================

Shape letters: B batch, K chunk, N tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .layers import TransformerLayer


# --- the network that is applied again and again -------------------------------------------------
class RecursiveBlock(nn.Module):
    """One step ``h = block(h, x)`` of the reference recursion.

    The observation is re-injected (``h + x``), then self-attention and an MLP follow, each with a
    residual connection and LayerNorm. ``h`` and ``x`` have the same shape: (B, D), one token, or
    (B, N, D). Over one token the softmax has one key and equals 1, so attention reduces to a linear
    map of that token (value and output projections); query and key have no effect.
    """

    def __init__(self, hidden_dim: int = 256, num_heads: int = 4):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(hidden_dim)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim), nn.GELU(), nn.Linear(4 * hidden_dim, hidden_dim)
        )
        self.mlp_norm = nn.LayerNorm(hidden_dim)

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        """The encoded observation itself."""
        return x

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if h.shape != x.shape or h.ndim not in (2, 3):
            raise ValueError(f"h has shape {tuple(h.shape)} and x {tuple(x.shape)}; "
                             "expected the same shape, (B, D) or (B, N, D)")
        tokens = (h + x).view(len(h), -1, h.shape[-1])  # (B, N, D), N = 1 for one vector
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        tokens = self.attention_norm(tokens + attended)
        return self.mlp_norm(tokens + self.mlp(tokens)).view(h.shape)

    def readout(self, h: torch.Tensor) -> torch.Tensor:
        """The state itself."""
        return h


class TRMBlock(nn.Module):
    """One supervision step of Tiny Recursive Models (arXiv 2510.04871, figure 3).

    x (B, N, D) is the encoded observation, with one query token per future action at the end. The
    answer y and the latent z have the same shape; the state stacks them as (B, 2, N, D). A step is
    ``cycles`` times :meth:`refine_latent_then_answer`. In training only the last cycle has a
    gradient; in evaluation mode all of them do, which saliency needs.

    ``latent_updates`` and ``cycles`` may be changed after training.
    """

    def __init__(self, dim: int, num_heads: int, num_layers: int, chunk: int,
                 latent_updates: int, cycles: int):
        super().__init__()
        self.chunk = chunk
        self.latent_updates = latent_updates  # n in the paper
        self.cycles = cycles  # T in the paper
        self.net = nn.Sequential(*[TransformerLayer(dim, num_heads) for _ in range(num_layers)])
        # the initial y and z: sampled once and never trained, as in the paper's code
        self.register_buffer("first", nn.init.trunc_normal_(torch.empty(2, 1, dim), std=1.0))

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        return self.first.to(x.dtype).expand(len(x), 2, *x.shape[1:]).clone()  # (B, 2, N, D)

    def forward(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y, z = state.unbind(dim=1)  # (B, N, D) each
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
            for _ in range(self.cycles - 1):
                y, z = self.refine_latent_then_answer(x, y, z)
        if self.training and not torch.compiler.is_compiling():
            # PyTorch 2.10 would use the casts of weights made there, which have no gradient
            torch.clear_autocast_cache()
        return torch.stack(self.refine_latent_then_answer(x, y, z), dim=1)  # (B, 2, N, D)

    def refine_latent_then_answer(self, x: torch.Tensor, y: torch.Tensor,
                                  z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """n updates of the latent, then one of the answer; returns y and z, (B, N, D) each."""
        for _ in range(self.latent_updates):
            z = self.net(x + y + z)
        return self.net(y + z), z

    def readout(self, state: torch.Tensor) -> torch.Tensor:
        """y at the action queries: (B, K, D)."""
        return state[:, 0, -self.chunk:]


# --- the loop ------------------------------------------------------------------------------------
class Recursion(NamedTuple):
    """Result of a recursion over a batch. Features are (B, D), of token variants (B, K, D)."""

    output: torch.Tensor  # features that the action head reads
    states: list[torch.Tensor]  # features after 0 ... n steps; those of a halted sample repeat
    depth: torch.Tensor  # (B,) int64, steps that each sample used before it halted
    ponder: torch.Tensor  # (B,) Graves' N + R; for other rules, the depth
    carry: torch.Tensor  # (B, ...) the block's last state, from which another recursion can start


def recurse_fixed(block: nn.Module, x: torch.Tensor, state: torch.Tensor, steps: int,
                  detach: bool = False) -> Recursion:
    """Exactly ``steps`` applications; the output is the last answer.

    ``detach`` cuts the gradient between steps: with a loss after every step this is the paper's
    deep supervision.
    """
    states = [block.readout(state)]
    for _ in range(steps):
        state = block(state.detach() if detach else state, x)
        states.append(block.readout(state))
    depth = torch.full((len(x),), steps, device=x.device)
    return Recursion(states[-1], states, depth, depth.float(), state)


def recurse_remainder(block: nn.Module, x: torch.Tensor, state: torch.Tensor, limit: int,
                      halting_logit: Callable, threshold: float) -> Recursion:
    """``r = 1``; ``h = block(h, x)``, ``output += r h``, ``r *= 1 - sigmoid(w h)``.

    Stops when the largest r of the batch is below ``threshold``. The weights 1, r1, r2 ... do not
    sum to one. A sample's depth counts the steps until its own r is below the threshold.
    """
    def weigh(r, p, is_last):
        return r, r * (1 - p)

    return _recurse_weighted(block, x, state, limit, halting_logit, threshold, weigh)


def recurse_adaptive(block: nn.Module, x: torch.Tensor, state: torch.Tensor, limit: int,
                     halting_logit: Callable, threshold: float) -> Recursion:
    """Adaptive computation time (Graves 2016, arXiv 1603.08983, section 2).

    A step halts with probability ``p = sigmoid(w h + b)``. The first step at which the sum of p
    reaches ``1 - threshold``, or the last step allowed, gets the remainder R instead, so that the
    weights of a sample sum to one. The ponder cost is N + R.
    """
    remainders = []

    def weigh(r, p, is_last):
        halts = (r - p <= threshold) | is_last  # stays true: r is 0 from then on
        remainders.append(torch.where(halts, r, 0))
        return torch.where(halts, r, p), torch.where(halts, 0, r - p)

    recursion = _recurse_weighted(block, x, state, limit, halting_logit, threshold, weigh)
    return recursion._replace(ponder=recursion.depth + sum(remainders))


def _recurse_weighted(block: nn.Module, x: torch.Tensor, state: torch.Tensor, limit: int,
                      halting_logit: Callable, threshold: float, weigh: Callable) -> Recursion:
    """The sum of all answers, times their weights.

    ``weigh(r, p, is_last)`` gives a step's weight and the next r (B,), which begins at 1.
    """
    states, weights = [block.readout(state)], []
    r = x.new_ones(len(x), dtype=torch.float32)
    depth = torch.zeros_like(r, dtype=torch.int64)
    for step in range(1, limit + 1):
        state = block(state, x)
        states.append(block.readout(state))
        depth = depth + (r >= threshold)
        weight, r = weigh(r, torch.sigmoid(halting_logit(states[-1])), step == limit)
        weights.append(weight)
        if not (r >= threshold).any():
            break
    output = torch.einsum("bn,nb...->b...", torch.stack(weights, dim=1),
                          torch.stack(states[1:]).float())
    return Recursion(output, states, depth, depth.float(), state)


def recurse_with_early_exit(block: nn.Module, x: torch.Tensor, state: torch.Tensor, limit: int,
                            is_done: Callable[[torch.Tensor], torch.Tensor]) -> Recursion:
    """Each sample stops at the first answer that ``is_done``, and is computed no further.

    ``is_done`` takes the answers of the samples that are still active and returns a mask: of a
    positive logit of the halting head, or see :class:`Convergence`.
    """
    answer, carry = block.readout(state), state
    states = [answer]
    depth = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    active = torch.arange(len(x), device=x.device)
    for step in range(1, limit + 1):
        state = block(state, x)
        latest = block.readout(state)
        answer = answer.to(latest.dtype).index_copy(0, active, latest)
        carry = carry.to(state.dtype).index_copy(0, active, state)
        states.append(answer)
        depth[active] = step
        going_on = ~is_done(latest)
        state, x, active = state[going_on], x[going_on], active[going_on]
        if not len(active):
            break
    return Recursion(answer, states, depth, depth.float(), carry)


# --- when to stop --------------------------------------------------------------------------------
class Convergence:
    """Done when the actions change by less than ``threshold`` from one step to the next.

    The change is the squared distance between two actions (7); of a chunk, the largest.
    """

    def __init__(self, actions_of: Callable[[torch.Tensor], torch.Tensor], threshold: float):
        self.actions_of, self.threshold = actions_of, threshold
        self.previous: torch.Tensor | None = None  # (B, K, 7) of the samples still active

    def __call__(self, answers: torch.Tensor) -> torch.Tensor:
        actions = self.actions_of(answers)
        done = torch.zeros(len(actions), dtype=torch.bool, device=actions.device)
        if self.previous is not None:
            distance = (actions - self.previous).square().sum(-1).amax(-1)
            done = distance < self.threshold
        self.previous = actions[~done]
        return done
