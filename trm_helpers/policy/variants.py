"""Baselines without recursion, and the block of each variant.

A block has the three methods of :mod:`recursion`: ``initial_state``, ``forward`` and ``readout``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import schema
from ..config import ModelConfig
from .layers import STYLE_DIM, TransformerLayer
from .recursion import RecursiveBlock, TRMBlock


class TransformerBlock(nn.Module):
    """Baseline without recursion: layers with separate weights, applied once."""

    def __init__(self, dim: int, num_heads: int, num_layers: int, chunk: int):
        super().__init__()
        self.chunk = chunk
        self.net = nn.Sequential(*[TransformerLayer(dim, num_heads) for _ in range(num_layers)])

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def readout(self, state: torch.Tensor) -> torch.Tensor:
        return state[:, -self.chunk:]


class ActBlock(TransformerBlock):
    """Baseline: encoder and decoder of ACT (Zhao et al. 2023, arXiv 2304.13705), applied once.

    The encoder reads the observation's tokens; the action queries are decoded.
    """

    def __init__(self, dim: int, num_heads: int, num_layers: int, chunk: int):
        super().__init__(dim, num_heads, 0, chunk)
        self.net = nn.Transformer(dim, num_heads, num_layers, num_layers, 4 * dim,
                                  batch_first=True)

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        """The action queries, (B, K, D) as every state."""
        return x[:, -self.chunk:]

    def forward(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.net(x[:, :-self.chunk], x[:, -self.chunk:])


class StyleEncoder(nn.Module):
    """Encoder of ACT's conditional VAE: the demonstrator's style as one token.

    Demonstrated actions (B, K, 7) and their mask (B, K) to the mean and log-variance of the style
    z, (B, STYLE_DIM) each. Used in training only; in control z is 0.
    """

    def __init__(self, dim: int, num_heads: int, num_layers: int, chunk: int):
        super().__init__()
        self.action = nn.Linear(schema.ACTION_DIM, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1 + chunk, dim))
        layer = nn.TransformerEncoderLayer(dim, num_heads, 4 * dim, batch_first=True)
        self.net = nn.TransformerEncoder(layer, num_layers)
        self.moments = nn.Linear(dim, 2 * STYLE_DIM)
        self.token = nn.Linear(STYLE_DIM, dim)

    def forward(self, actions: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = actions.new_zeros(len(actions), 1, self.position.shape[-1])
        tokens = torch.cat([first, self.action(actions)], dim=1) + self.position
        missing = F.pad(mask == 0, (1, 0))  # the summary token is never masked
        summary = self.net(tokens, src_key_padding_mask=missing)[:, 0]
        return self.moments(summary).float().chunk(2, dim=-1)

    @staticmethod
    def divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
        """KL divergence (B,) of N(mean, variance) from N(0, 1), summed over z."""
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


def make_block(config: ModelConfig) -> nn.Module:
    """The block of ``config.variant``."""
    if config.variant == "block":
        return RecursiveBlock(config.hidden_dim, schema.NUM_HEADS)
    sizes = (config.hidden_dim, schema.NUM_HEADS, config.num_layers, config.chunk)
    if config.variant in ("transformer", "act"):
        return (TransformerBlock if config.variant == "transformer" else ActBlock)(*sizes)
    return TRMBlock(*sizes, config.latent_updates, config.cycles)
