"""What policies are made of: encoders, the blocks that are applied over and over, action heads.

Every block has the same three methods, so that one loop in ``model.py`` serves all of them:
``start(x)`` gives the first state, ``forward(state, x)`` the next one, ``answer(state)`` the
features that the action head reads: (B, D), or (B, K, D) with one token per future action. A
state is one tensor with B in front.

Shape letters: B batch, K chunk, H W image, N tokens, D hidden, P proprioception.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from . import schema
from .config import ModelConfig

CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (128, 3, 1))  # channels, kernel, stride
TOKEN_CONVOLUTIONS = ((32, 8, 4, 2), (64, 4, 2, 1), (64, 3, 1, 1))  # ..., stride, padding
STYLE_DIM = 32  # of ACT's latent
TASK_TEMPERATURE = 0.001  # of the locator: instructions of a suite are alike to 0.995
TOKEN_STRIDE = 8  # pixels per cell of the map that image tokens are cut from


# --- images --------------------------------------------------------------------------------------
class Centre(nn.Module):
    """[0, 1] to [-1, 1]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * images - 1


def convolutional(sizes, activation: str) -> nn.Sequential:
    """Convolutions of (channels, kernel, stride, padding), each followed by the activation.

    ``"relu"`` of images in [0, 1] is what the reference documents. A camera that does not move
    shows nearly the same picture always, so that one step too large can switch a unit off for all
    of them, and for good. ``"silu"`` of images centred on 0 has no such units.
    """
    layers, channels = ([Centre()] if activation == "silu" else []), 3
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
        self.convolutions = convolutional([(*sizes, 0) for sizes in CONVOLUTIONS], activation)
        side = image_size
        for _, kernel, stride in CONVOLUTIONS:
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

    Three convolutions to a map (64, H / 8, W / 8), which is cut into ``grid`` x ``grid`` patches,
    each flattened, projected to D and normalised. Nothing is pooled: a token knows where in its
    patch a thing is.
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


class Locator(nn.Module):
    """Images (B, H, W, 3) in [0, 1] to where in them each of K things is.

    Convolutions to maps (B, K, H / 2, W / 2): fine ones of half the picture's size, for the place,
    beside coarse ones of a quarter of it, for what is there. H and W are multiples of 4. What is
    looked for is a part in the task, as the object of the goal: which of the ``known`` tasks
    (T, ``task_dim``) it is told scales and shifts the coarse maps (FiLM, arXiv 1709.07871). It is
    the one most alike, for instructions differ by little and come in other words.
    """

    def __init__(self, count: int, num_tasks: int = 0, task_dim: int = 0):
        super().__init__()

        def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.SiLU()]

        self.fine = nn.Sequential(Centre(), *convolution(3, 32, 5, 2))
        self.coarse = nn.Sequential(*convolution(32, 64, 5, 2), *convolution(64, 64, 3, 1),
                                    *convolution(64, 64, 3, 1))
        self.task = nn.Linear(num_tasks, 2 * 64) if num_tasks else None
        self.register_buffer("known", torch.zeros(num_tasks, task_dim))
        self.maps = nn.Sequential(*convolution(96, 32, 3, 1), nn.Conv2d(32, count, 1))

    def forward(self, images: torch.Tensor, task: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, K, H / 2, W / 2): a softmax over the last two says where a thing is."""
        fine = self.fine(rearrange(images, "b h w c -> b c h w"))
        coarse = self.coarse(fine)
        if self.task is not None:
            scale, shift = self.task(self.which(task))[..., None, None].chunk(2, dim=1)
            coarse = coarse * (1 + scale) + shift
        coarse = F.interpolate(coarse, scale_factor=2)
        return self.maps(torch.cat([fine, coarse], dim=1)).float()

    def which(self, task: torch.Tensor) -> torch.Tensor:
        """(B, T): how much it takes a task to be each of those that it knows."""
        # no product of matrices, which autocast would round
        alike = F.cosine_similarity(task.unsqueeze(1), self.known, dim=-1)
        return (alike / TASK_TEMPERATURE).softmax(-1)

    @staticmethod
    def points(maps: torch.Tensor) -> torch.Tensor:
        """(B, K, 2): column and row of each thing, from 0 to 1 across the picture."""
        height, width = maps.shape[-2:]
        shares = maps.flatten(2).softmax(-1).unflatten(2, (height, width))
        columns = (torch.arange(width, device=maps.device) + 0.5) / width
        rows = (torch.arange(height, device=maps.device) + 0.5) / height
        # sums, not products of matrices, which autocast would round to half a pixel of 128
        return torch.stack([(shares.sum(2) * columns).sum(-1), (shares.sum(3) * rows).sum(-1)], -1)


class KeypointEncoder(nn.Module):
    """Images (B, H, W, 3) in [0, 1] to features (B, D), of nothing but where K things are."""

    def __init__(self, hidden_dim: int, count: int, num_tasks: int = 0, task_dim: int = 0):
        super().__init__()
        self.locator = Locator(count, num_tasks, task_dim)
        self.project = nn.Sequential(nn.Linear(2 * count, hidden_dim), nn.ReLU(),
                                     nn.Linear(hidden_dim, hidden_dim))

    def forward(self, images: torch.Tensor, task: torch.Tensor | None = None) -> torch.Tensor:
        points = self.locator.points(self.locator(images, task))
        return self.project(4 * (2 * points - 1).flatten(1))


# --- blocks --------------------------------------------------------------------------------------
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

    def start(self, x_cond: torch.Tensor) -> torch.Tensor:
        """The encoded observation itself."""
        return x_cond

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

    def answer(self, h: torch.Tensor) -> torch.Tensor:
        """The state itself."""
        return h


class RMSNorm(nn.RMSNorm):
    """With its weight in the type of what comes in: under autocast PyTorch's own is slow."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(values.dtype)
        return F.rms_norm(values, self.normalized_shape, weight, self.eps)


class TransformerLayer(nn.Module):
    """Self-attention and SwiGLU over tokens (B, N, D), each with a residual and RMSNorm after it.

    As in TRM's network: no biases, normalised after the residual so that states keep their size
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


class TRMBlock(nn.Module):
    """The recursion of Tiny Recursive Models (arXiv 2510.04871, figure 3) over tokens.

    x (B, N, D) is the encoded observation with one query token per future action at the end, y
    the current answer, z the latent, all of one shape. One cycle: ``latent_updates`` (n) times
    ``z = net(x + y + z)``, then once ``y = net(y + z)``. A step is ``cycles`` (T) of them, the
    first T - 1 without gradient in training (what is explained afterwards, as saliency, needs
    all). The state is y and z as (B, 2, N, D).

    ``latent_updates`` and ``cycles`` are plain attributes: they may be changed after training.
    """

    def __init__(self, dim: int, num_heads: int, num_layers: int, chunk: int,
                 latent_updates: int, cycles: int):
        super().__init__()
        self.chunk = chunk
        self.latent_updates, self.cycles = latent_updates, cycles
        self.net = nn.Sequential(*[TransformerLayer(dim, num_heads) for _ in range(num_layers)])
        # where y and z begin: drawn once and never trained, as in the paper's code
        self.register_buffer("first", torch.nn.init.trunc_normal_(torch.empty(2, 1, dim), std=1.0))

    def start(self, x: torch.Tensor) -> torch.Tensor:
        return self.first.to(x.dtype).expand(len(x), 2, *x.shape[1:]).clone()

    def forward(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y, z = state.unbind(dim=1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
            for _ in range(self.cycles - 1):
                y, z = self.cycle(x, y, z)
        return torch.stack(self.cycle(x, y, z), dim=1)

    def cycle(self, x: torch.Tensor, y: torch.Tensor,
              z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """y and z after n updates of the latent and one of the answer."""
        for _ in range(self.latent_updates):
            z = self.net(x + y + z)
        return self.net(y + z), z

    def answer(self, state: torch.Tensor) -> torch.Tensor:
        """(B, K, D): y at the action queries."""
        return state[:, 0, -self.chunk:]


class TransformerBlock(nn.Module):
    """Layers with weights of their own, applied once: the baseline without recursion."""

    def __init__(self, dim: int, num_heads: int, num_layers: int, chunk: int):
        super().__init__()
        self.chunk = chunk
        self.net = nn.Sequential(*[TransformerLayer(dim, num_heads) for _ in range(num_layers)])

    def start(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def answer(self, state: torch.Tensor) -> torch.Tensor:
        return state[:, -self.chunk:]


class ActBlock(nn.Module):
    """Encoder and decoder of ACT (Zhao et al. 2023, arXiv 2304.13705), applied once: a baseline.

    The action queries look at the other tokens, which have looked at each other.
    """

    def __init__(self, dim: int, num_heads: int, num_layers: int, chunk: int):
        super().__init__()
        self.chunk = chunk
        self.net = nn.Transformer(dim, num_heads, num_layers, num_layers, 4 * dim,
                                  batch_first=True)

    def start(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.net(x[:, :-self.chunk], x[:, -self.chunk:])

    def answer(self, state: torch.Tensor) -> torch.Tensor:
        return state[:, -self.chunk:]


class StyleEncoder(nn.Module):
    """ACT's conditional VAE: which of several good ways the demonstrator took, as one token.

    The encoder reads the demonstrated actions (B, K, 7) and gives mean and logarithm of the
    variance of the style z, (B, STYLE_DIM) each. It is there for training only: in control z is 0.
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
        missing = F.pad(mask == 0, (1, 0))  # the first token is always there
        summary = self.net(tokens, src_key_padding_mask=missing)[:, 0]
        return self.moments(summary).float().chunk(2, dim=-1)

    @staticmethod
    def divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
        """Of N(mean, variance) from N(0, 1): (B,), summed over the numbers of z."""
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


def make_block(config: ModelConfig) -> nn.Module:
    """The block of ``config.variant``."""
    if config.variant == "block":
        return RecursiveBlock(config.hidden_dim, config.num_heads)
    sizes = (config.hidden_dim, config.num_heads, config.num_layers, config.chunk)
    if config.variant in ("transformer", "act"):
        return (TransformerBlock if config.variant == "transformer" else ActBlock)(*sizes)
    return TRMBlock(*sizes, config.latent_updates, config.cycles)


# --- actions -------------------------------------------------------------------------------------
class ActionHead(nn.Module):
    """Features to normalised actions (B, K, 7) and, of a gripper with its own loss, its logits.

    Features (B, D) become K actions at once; of features (B, K, D) each becomes one, with shared
    weights. Linear D-D, ReLU, linear. The gripper is the seventh number of that last layer, or

    - ``"classifier"``: a softmax over (open, closed), logits (B, K, 2);
    - ``"binary"``: a sigmoid, the probability of closed, logits (B, K, 1);

    whose expected value in (-1, 1) becomes the seventh number. ``"mixture"`` has ``num_experts``
    last layers and sums them with the weights of a softmax gate on the features.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.hidden_dim
        self.chunk = config.chunk if config.variant == "block" else 1  # actions per feature vector
        self.num_experts = 1
        self.hidden = nn.Linear(dim, dim)
        self.gate = self.gripper = None
        width = schema.ACTION_DIM
        if config.gripper in ("classifier", "binary"):
            width = schema.ARM_DIM
            self.gripper = nn.Linear(dim, self.chunk * (2 if config.gripper == "classifier" else 1))
        elif config.gripper == "mixture":
            self.num_experts = config.num_experts
            self.gate = nn.Linear(dim, self.num_experts)
        self.output = nn.Linear(dim, self.num_experts * self.chunk * width)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, flat = len(features), features.flatten(0, -2)
        hidden = F.relu(self.hidden(flat))
        experts = rearrange(
            self.output(hidden).float(), "b (e k a) -> b e k a", e=self.num_experts, k=self.chunk
        )
        if self.gate is not None:
            weights = self.gate(flat).float().softmax(-1)  # (B, E)
            mixed = torch.einsum("be,beka->bka", weights, experts)
            return mixed.reshape(batch, -1, schema.ACTION_DIM), None
        actions = experts.reshape(batch, -1, experts.shape[-1])  # (B, K, 7), or 6 of the arm
        if self.gripper is None:
            return actions, None
        logits = self.gripper(hidden).float().reshape(batch, actions.shape[1], -1)
        p_closed = (logits.sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1))[..., -1:]
        gripper = schema.GRIPPER_OPEN * (1 - p_closed) + schema.GRIPPER_CLOSED * p_closed
        return torch.cat([actions, gripper], dim=-1), logits
