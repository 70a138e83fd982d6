"""The localizer: image positions of the goal's objects, from one look at the frame or from several.

Shape letters: B batch, H W image, K keypoints, T known tasks, D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .layers import convolutional, two_layers

# Of the softmax over cosine similarities of instructions, which within a suite reach 0.9955, but
# 0.9993 for one pair of LIBERO-90. At MOST_ALIKE two of them are mixed 95 : 5.
TASK_TEMPERATURE, MOST_ALIKE = 0.001, 0.997
CROP = 24  # pixels, side of what a further look sees
_LOOK_DIM = 128  # width of the state that is carried from look to look
_LOOK_CONVOLUTIONS = ((24, 5, 2, 2), (48, 3, 2, 1), (64, 3, 2, 1))  # as TOKEN_CONVOLUTIONS


class Localizer(nn.Module):
    """Images (B, H, W, 3) in [0, 1] to the image positions of K keypoints.

    Convolutional maps of half the image size for the position and of a quarter for the identity;
    H and W are multiples of 4. A keypoint is a part in the task, such as the goal's object: the
    task scales and shifts the coarse maps (FiLM, arXiv 1709.07871). Its weights are a sharp softmax
    over its similarity to the ``known`` tasks (T, ``task_dim``), because instructions differ by
    little and may be rephrased.

    With ``looks`` the maps are those of the image at half its size, and their positions are first
    estimates only. Each look then sees the 24 x 24 pixels around an estimate and moves it: one
    :class:`Look` applied again and again, each time at the place where it arrived before.
    """

    def __init__(self, count: int, num_tasks: int = 0, task_dim: int = 0, looks: int = 0):
        super().__init__()
        self.looks = looks
        self.fine = convolutional([(32, 5, 2, 2)], "silu")
        self.coarse = convolutional([(64, 5, 2, 2), (64, 3, 1, 1), (64, 3, 1, 1)], "silu", 32)
        self.task = nn.Linear(num_tasks, 2 * 64) if num_tasks else None
        self.register_buffer("known", torch.zeros(num_tasks, task_dim))
        self.maps = nn.Sequential(*convolutional([(32, 3, 1, 1)], "silu", 96),
                                  nn.Conv2d(32, count, 1))
        self.look = Look(count, max(num_tasks, 1)) if looks else None

    def forward(self, images: torch.Tensor, task: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, K, h, w) of the first look; their softmax is a keypoint's position.

        h and w are half of H and W, with further ``looks`` a quarter.
        """
        images = rearrange(images, "b h w c -> b c h w")
        fine = self.fine(F.avg_pool2d(images, 2) if self.looks else images)
        coarse = self.coarse(fine)
        if self.task is not None:
            scale, shift = self.task(self.which(task))[..., None, None].chunk(2, dim=1)
            coarse = coarse * (1 + scale) + shift
        coarse = F.interpolate(coarse, scale_factor=2)
        return self.maps(torch.cat([fine, coarse], dim=1)).float()

    def locate(self, images: torch.Tensor, task: torch.Tensor | None = None) -> torch.Tensor:
        """Estimates (B, 1 + looks, K, 2) of the first look and of each further one.

        The last estimate is the answer: column and row, from 0 to 1 across the image.
        """
        first = self.points(self(images, task))
        further = self.look_again(images, task, first, self.looks)
        return torch.cat([first.unsqueeze(1), further], dim=1)

    def look_again(self, images: torch.Tensor, task: torch.Tensor | None, estimates: torch.Tensor,
                   looks: int) -> torch.Tensor:
        """Estimates (B, looks, K, 2) after each further look, from initial ones (B, K, 2).

        ``looks`` may differ from the number in training. A look has no gradient through the place
        where it looks, only through its state.
        """
        if not looks:
            return estimates.new_zeros(len(estimates), 0, *estimates.shape[1:])
        if self.look is None:
            raise ValueError(f"looks={looks} is not valid for a localizer trained with looks=0; "
                             "expected 0")
        which = images.new_ones(len(images), 1) if self.task is None else self.which(task)
        state, found = None, []
        for _ in range(looks):
            estimates = estimates.detach()
            move, state = self.look(crops(images, estimates), which, state)
            estimates = estimates + move / images.shape[1]
            found.append(estimates)
        return torch.stack(found, dim=1)

    def which(self, task: torch.Tensor) -> torch.Tensor:
        """Soft assignment (B, T) of each task embedding to the known tasks."""
        # not a matrix product, which autocast would round
        alike = F.cosine_similarity(task.unsqueeze(1), self.known, dim=-1)
        return (alike / TASK_TEMPERATURE).softmax(-1)

    @staticmethod
    def points(maps: torch.Tensor) -> torch.Tensor:
        """(B, K, 2): column and row of each keypoint, from 0 to 1 across the image."""
        height, width = maps.shape[-2:]
        shares = maps.flatten(2).softmax(-1).unflatten(2, (height, width))
        columns = (torch.arange(width, device=maps.device) + 0.5) / width
        rows = (torch.arange(height, device=maps.device) + 0.5) / height
        # sums, not matrix products, which autocast would round to half a pixel of 128
        return torch.stack([(shares.sum(2) * columns).sum(-1), (shares.sum(3) * rows).sum(-1)], -1)


class Look(nn.Module):
    """What is seen around an estimate, to a correction of the estimate.

    The crops of K keypoints are read by the same convolutions; task and keypoint scale and shift
    what they find. A GRU carries a state from look to look.
    """

    def __init__(self, count: int, num_tasks: int):
        super().__init__()
        seen = _LOOK_CONVOLUTIONS[-1][0] * (CROP // 8) ** 2
        self.see = nn.Sequential(*convolutional(_LOOK_CONVOLUTIONS, "silu"), nn.Flatten(),
                                 nn.Linear(seen, _LOOK_DIM), nn.SiLU())
        self.name = nn.Parameter(torch.zeros(num_tasks, count, 2 * _LOOK_DIM))
        self.update = nn.GRUCell(_LOOK_DIM, _LOOK_DIM)
        self.move = nn.Sequential(nn.Linear(_LOOK_DIM, _LOOK_DIM), nn.SiLU(),
                                  nn.Linear(_LOOK_DIM, 2))

    def forward(self, crop: torch.Tensor, which: torch.Tensor, state: torch.Tensor | None
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Corrections (B, K, 2) in pixels, at most half a crop, and the state (B * K, D).

        Args:
            crop: (B, K, 3, 24, 24).
            which: weights (B, T) of the tasks.
            state: of the look before; None in the first.
        """
        name = (which[..., None, None] * self.name).sum(1).flatten(0, 1)  # (B * K, 2 * D)
        scale, shift = name.chunk(2, dim=1)
        seen = self.see(crop.flatten(0, 1)) * (1 + scale) + shift
        state = self.update(seen, state)
        move = CROP / 2 * torch.tanh(self.move(state).float())
        return move.unflatten(0, crop.shape[:2]), state


def crops(images: torch.Tensor, estimates: torch.Tensor) -> torch.Tensor:
    """The pixels (B, K, 3, 24, 24) of images (B, H, W, 3) around estimates (B, K, 2) from 0 to 1.

    Between pixels they are interpolated; outside the image its border is repeated.
    """
    count, (height, width) = estimates.shape[1], images.shape[1:3]
    side = torch.arange(CROP, device=images.device) - (CROP - 1) / 2
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    around = torch.stack([columns / width, rows / height], dim=-1)
    points = estimates[:, :, None, None] + around
    found = F.grid_sample(rearrange(images, "b h w c -> b c h w"),
                          rearrange(2 * points - 1, "b k h w two -> b (k h) w two"),
                          align_corners=False, padding_mode="border")
    return rearrange(found, "b c (k h) w -> b k c h w", k=count)


class KeypointEncoder(nn.Module):
    """Images (B, H, W, 3) in [0, 1] to features (B, D) of the positions of K keypoints alone."""

    def __init__(self, hidden_dim: int, count: int, num_tasks: int = 0, task_dim: int = 0,
                 looks: int = 0):
        super().__init__()
        # `locator` in the weights of trained policies
        self.locator = Localizer(count, num_tasks, task_dim, looks)
        self.project = two_layers(2 * count, hidden_dim)

    def forward(self, images: torch.Tensor, task: torch.Tensor | None = None) -> torch.Tensor:
        points = self.locator.locate(images, task)[:, -1]
        return self.project(4 * (2 * points - 1).flatten(1))
