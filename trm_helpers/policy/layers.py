"""Layers of the policies: image encoders, transformer layer and action head.

Shape letters: B batch, K chunk, H W image, N tokens, D hidden, P proprioception.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .. import schema
from ..config import ModelConfig

# channels, kernel, stride, padding
CONVOLUTIONS = ((32, 8, 4, 0), (64, 4, 2, 0), (128, 3, 1, 0))
TOKEN_CONVOLUTIONS = ((32, 8, 4, 2), (64, 4, 2, 1), (64, 3, 1, 1))
NUM_EXPERTS = 4  # of the mixture head
STYLE_DIM = 32  # of ACT's latent
TOKEN_STRIDE = 8  # pixels per cell of the feature map


# --- images --------------------------------------------------------------------------------------
class Centre(nn.Module):
    """[0, 1] to [-1, 1]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * images - 1


def convolutional(sizes, activation: str, channels: int = 3) -> nn.Sequential:
    """Convolutions of (channels, kernel, stride, padding), each followed by the activation.

    ``channels`` is the number of input channels: 3 for an image, more for the output of other
    convolutions.

    ``"relu"`` on images in [0, 1] is the reference's. The frames of a fixed camera differ so little
    that one large update can leave a ReLU inactive for all of them; ``"silu"`` on images centred on
    0 avoids this.
    """
    layers = [Centre()] if activation == "silu" and channels == 3 else []
    for out_channels, kernel, stride, padding in sizes:
        layers += [nn.Conv2d(channels, out_channels, kernel, stride, padding),
                   nn.SiLU() if activation == "silu" else nn.ReLU()]
        channels = out_channels
    return nn.Sequential(*layers)


class VisualEncoder(nn.Module):
    """Images (B, H, W, 3) in [0, 1] to features (B, D).

    At H = W = 128: (B, 32, 31, 31), (B, 64, 14, 14), (B, 128, 12, 12), each followed by the
    activation (see :func:`convolutional`); flattened to 18432, a linear layer to D, LayerNorm.
    """

    def __init__(self, hidden_dim: int = 256, image_size: int = schema.IMAGE_SIZE,
                 activation: str = "relu"):
        super().__init__()
        self.convolutions = convolutional(CONVOLUTIONS, activation)
        side = image_size
        for _, kernel, stride, _ in CONVOLUTIONS:
            side = (side - kernel) // stride + 1
        channels = CONVOLUTIONS[-1][0]
        self.project = nn.Linear(channels * side * side, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # the permuted view is channels_last in memory: the convolutions take it without a copy
        maps = self.convolutions(rearrange(images, "b h w c -> b c h w"))  # (B, 128, 12, 12)
        return self.norm(self.project(rearrange(maps, "b c h w -> b (c h w)")))  # (B, D)


class TokenEncoder(nn.Module):
    """Images (B, H, W, 3) in [0, 1] to spatial tokens (B, grid * grid, D), row by row.

    Three convolutions give a map (64, H / 8, W / 8), cut into ``grid`` x ``grid`` patches; each is
    flattened, projected to D and normalised. Without pooling, a token keeps positions inside its
    patch.
    """

    def __init__(self, hidden_dim: int, image_size: int, grid: int, activation: str = "relu"):
        super().__init__()
        self.grid = grid
        self.convolutions = convolutional(TOKEN_CONVOLUTIONS, activation)
        cells = image_size // TOKEN_STRIDE // grid
        self.project = nn.Linear(TOKEN_CONVOLUTIONS[-1][0] * cells * cells, hidden_dim)
        self.norm = RMSNorm(hidden_dim)
        self.position = nn.Parameter(0.02 * torch.randn(grid * grid, hidden_dim))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.convolutions(rearrange(images, "b h w c -> b c h w"))
        patches = rearrange(maps, "b c (g h) (k w) -> b (g k) (c h w)", g=self.grid, k=self.grid)
        return self.norm(self.project(patches)) + self.position


# --- blocks --------------------------------------------------------------------------------------
class RMSNorm(nn.RMSNorm):
    """RMSNorm with the weight cast to the input's type; PyTorch's is slow under autocast.

    Its epsilon is float32's in every precision; that of PyTorch 2.6 depends on the input's type.
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(values.dtype)
        return F.rms_norm(values, self.normalized_shape, weight, torch.finfo(torch.float32).eps)


class TransformerLayer(nn.Module):
    """Self-attention and SwiGLU over tokens (B, N, D), each followed by a residual and RMSNorm.

    As in TRM's network, there are no biases, and normalisation after the residual bounds the state
    over many applications.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attended = nn.Linear(dim, dim, bias=False)
        self.attention_norm = RMSNorm(dim)
        hidden = 8 * dim // 3  # with the gate, as many weights as an MLP of 4 D
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.mlp_norm = RMSNorm(dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(tokens), "b n (three h d) -> three b h n d", three=3,
                            h=self.num_heads)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        tokens = self.attention_norm(tokens + self.attended(attended))
        gate, up = self.gate_up(tokens).chunk(2, dim=-1)
        return self.mlp_norm(tokens + self.down(F.silu(gate) * up))


def two_layers(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))


# --- actions -------------------------------------------------------------------------------------
class ActionHead(nn.Module):
    """Features to normalised actions (B, K, 7) and the logits of a gripper with its own loss.

    Features (B, D) give K actions at once, features (B, K, D) one action each with shared weights:
    linear D-D, ``head_activation``, linear. The gripper is the seventh output or the expected
    value, in (-1, 1),

    - ``"classifier"``: of a softmax over (open, closed), logits (B, K, 2);
    - ``"binary"``: of a sigmoid for closed, logits (B, K, 1).

    ``"mixture"`` sums ``NUM_EXPERTS`` last layers with the weights of a softmax gate on the
    features.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.hidden_dim
        self.chunk = config.chunk if config.variant == "block" else 1  # actions per feature vector
        self.num_experts = 1
        self.hidden = nn.Linear(dim, dim)
        self.activation = {"relu": F.relu, "silu": F.silu}[config.head_activation]
        self.gate = self.gripper = None
        width = schema.ACTION_DIM
        if config.gripper in ("classifier", "binary"):
            width = schema.ARM_DIM
            self.gripper = nn.Linear(dim, self.chunk * (2 if config.gripper == "classifier" else 1))
        elif config.gripper == "mixture":
            self.num_experts = NUM_EXPERTS
            self.gate = nn.Linear(dim, self.num_experts)
        self.output = nn.Linear(dim, self.num_experts * self.chunk * width)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, flat = len(features), features.flatten(0, -2)
        hidden = self.activation(self.hidden(flat))
        experts = rearrange(
            self.output(hidden).float(), "b (e k a) -> b e k a", e=self.num_experts, k=self.chunk
        )
        if self.gate is not None:
            weights = self.gate(flat).float().softmax(-1)  # (B, E)
            experts = torch.einsum("be,beka->bka", weights, experts)
        actions = experts.reshape(batch, -1, experts.shape[-1])  # (B, K, 7), or 6 of the arm
        if self.gripper is None:
            return actions, None
        logits = self.gripper(hidden).float().reshape(batch, actions.shape[1], -1)
        p_closed = (logits.sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1))[..., -1:]
        gripper = schema.GRIPPER_OPEN * (1 - p_closed) + schema.GRIPPER_CLOSED * p_closed
        return torch.cat([actions, gripper], dim=-1), logits
