"""Images before they reach the policy: resizing, and per-sample augmentation on their device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

AUGMENTATIONS = ("none", "reference", "shift")
BRIGHTNESS = (0.8, 1.2)
BRIGHTNESS_PROBABILITY = 0.5
CROP_FRACTION = 0.9  # of the side
CROP_PROBABILITY = 0.3
SHIFT_FRACTION = 4 / 64  # of the side: DrQ's 4 pixels (arXiv 2004.13649), there of 84


def resize_images(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize uint8 images (N, H, W, 3) to (N, size, size, 3), by area averaging.

    A pixel becomes the mean of the pixels it covers, rounded to the nearest. Images that already
    have the size are returned as they are. Training and control both use this function. Raises
    ``ValueError`` for another shape or type.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and type {images.dtype}; "
            "expected (N, H, W, 3) and torch.uint8"
        )
    if size < 1:
        raise ValueError(f"size={size} is not valid; expected >= 1")
    if tuple(images.shape[1:3]) == (size, size):
        return images
    channels_first = images.permute(0, 3, 1, 2).float()  # (N, 3, H, W)
    resized = F.interpolate(channels_first, size=(size, size), mode="area")
    return resized.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
