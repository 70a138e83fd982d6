"""Image preprocessing for the policy: resizing, and per-sample augmentation on any device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .. import schema

BRIGHTNESS = (0.8, 1.2)
BRIGHTNESS_PROBABILITY = 0.5
COLOUR_PROBABILITY = 0.5
HUE = math.pi / 3  # either way: red becomes at most yellow or magenta, never green or blue
SATURATION = (0.5, 1.5)
CROP_FRACTION = 0.9  # of the side
CROP_PROBABILITY = 0.3
SHIFT_FRACTION = 4 / 64  # of the side: DrQ's 4 pixels (arXiv 2004.13649), there of 84
CUTOUT_PROBABILITY = 0.5
CUTOUT_FRACTION = (0.2, 0.6)  # of the side


def resize_images(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize uint8 images (N, H, W, 3) to (N, size, size, 3), by area averaging.

    A pixel becomes the mean of the pixels it covers, rounded to the nearest integer. Images of that
    size are returned unchanged. Training and control share this function. Raises ``ValueError`` for
    another shape or type.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)} and type {images.dtype}; "
                         "expected (N, H, W, 3) and torch.uint8")
    if size < 1:
        raise ValueError(f"size={size} is not valid; expected >= 1")
    if tuple(images.shape[1:3]) == (size, size):
        return images
    channels_first = images.permute(0, 3, 1, 2).float()  # (N, 3, H, W)
    resized = F.interpolate(channels_first, size=(size, size), mode="area")
    return resized.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def augment_images(images: torch.Tensor, mode: str, generator: torch.Generator) -> torch.Tensor:
    """Augment float images (B, ..., H, W, 3) in [0, 1]; same shape, range and device.

    Each of the B samples has its own random numbers, shared by all its frames (the dimensions
    ``...``, such as T). Call once per camera for independent numbers. They are sampled on the
    generator's device: a CPU generator gives the same ones for images on any device.

    - ``none`` returns the images.
    - ``brightness`` multiplies by a number in [0.8, 1.2] with probability 0.5.
    - ``colour`` is ``brightness``, and with probability 0.5 a rotation of all hues by one angle of
      up to 60 degrees and a saturation multiplied by a number in [0.5, 1.5].
    - ``reference`` is ``brightness``, and with probability 0.3 a random crop of 90 % of each side,
      enlarged to the full size.
    - ``shift`` is ``brightness`` and a random shift by whole pixels, up to 1/16 of the side, with
      the edge repeated (DrQ, arXiv 2004.13649).
    - ``cutout`` is ``shift``, and with probability 0.5 a random rectangle of a random colour (RAD,
      arXiv 2004.14990).

    Raises ``ValueError`` for another mode, shape or type.
    """
    schema.check_option("mode", mode, schema.AUGMENTATIONS)
    if not images.is_floating_point() or images.ndim < 4 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)} and type {images.dtype}; "
                         "expected (B, ..., H, W, 3) and a floating type")
    if mode == "none":
        return images
    frames = images.reshape(len(images), -1, *images.shape[-3:])  # (B, T, H, W, 3)
    steps = {"brightness": [], "colour": [_change_colours], "reference": [_crop],
             "shift": [_shift], "cutout": [_shift, _cut_out]}
    for change in (_change_brightness, *steps[mode]):
        frames = change(frames, generator)
    return frames.reshape(images.shape)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


# The functions below augment frames (B, T, H, W, 3).


def _change_brightness(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    chosen = _uniform(len(frames), 0, 1, generator) < BRIGHTNESS_PROBABILITY
    factor = _uniform(len(frames), *BRIGHTNESS, generator)
    factor = torch.where(chosen, factor, 1.0).to(frames.device, frames.dtype)
    return (frames * factor.view(-1, 1, 1, 1, 1)).clamp_(0, 1)


def _change_colours(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate and stretch some samples' colours about the grey axis; grey is unchanged."""
    chosen = _uniform(len(frames), 0, 1, generator) < COLOUR_PROBABILITY
    angle = _uniform(len(frames), -HUE, HUE, generator).view(-1, 1, 1)
    saturation = _uniform(len(frames), *SATURATION, generator).view(-1, 1, 1)
    grey = torch.full((3, 3), 1 / 3, device=generator.device)
    colour = torch.eye(3, device=generator.device) - grey
    across = colour.roll(1, 0) - colour.roll(-1, 0)  # of (1, 1, 1) with a colour, by sqrt(3)
    turned = grey + saturation * (angle.cos() * colour + angle.sin() * across / 3 ** 0.5)
    matrix = torch.where(chosen.view(-1, 1, 1), turned, torch.eye(3, device=generator.device))
    return torch.einsum("bthwc,bdc->bthwd", frames, matrix.to(frames)).clamp_(0, 1)


def _crop(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Enlarge a random crop of some samples, bilinearly, in place."""
    chosen = _uniform(len(frames), 0, 1, generator) < CROP_PROBABILITY
    room = 1 - CROP_FRACTION  # how far the crop's centre can go, in units of half a side
    centre_x = _uniform(len(frames), -room, room, generator)
    centre_y = _uniform(len(frames), -room, room, generator)
    rows = chosen.nonzero().squeeze(1)  # usually on the CPU: no wait for the GPU
    if len(rows) == 0:
        return frames
    affine = torch.zeros(len(rows), 2, 3, device=rows.device)
    affine[:, 0, 0] = affine[:, 1, 1] = CROP_FRACTION
    affine[:, 0, 2] = centre_x[rows]
    affine[:, 1, 2] = centre_y[rows]
    rows = rows.to(frames.device)
    picked = frames.index_select(0, rows).permute(0, 1, 4, 2, 3).flatten(1, 2)  # (b, T*3, H, W)
    grid = F.affine_grid(affine.to(picked), list(picked.shape), align_corners=False)
    cropped = F.grid_sample(picked, grid, padding_mode="border", align_corners=False)
    cropped = cropped.unflatten(1, (-1, 3)).permute(0, 1, 3, 4, 2)  # (b, T, H, W, 3)
    return frames.index_copy_(0, rows, cropped)


def _shift(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move each sample by whole pixels, repeating the edge."""
    batch, time, height, width, _ = frames.shape
    rows = _shifted_positions(batch, height, generator).to(frames.device)  # (B, H)
    columns = _shifted_positions(batch, width, generator).to(frames.device)  # (B, W)
    frame = torch.arange(batch * time, device=frames.device).view(batch, time, 1, 1)
    pixels = (frame * height + rows.view(batch, 1, height, 1)) * width
    pixels = pixels + columns.view(batch, 1, 1, width)  # (B, T, H, W) into the flattened pixels
    return frames.reshape(-1, 3).index_select(0, pixels.flatten()).view(frames.shape)


def _shifted_positions(batch: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """(batch, size): the row (or column) of the image read for each one of the shifted image."""
    furthest = max(1, round(SHIFT_FRACTION * size))
    offset = torch.randint(-furthest, furthest + 1, (batch, 1), generator=generator,
                           device=generator.device)
    return (torch.arange(size, device=generator.device) + offset).clamp(0, size - 1)


def _cut_out(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cover a rectangle of some samples with a colour."""
    chosen = _uniform(len(frames), 0, 1, generator) < CUTOUT_PROBABILITY
    rows, columns = (_random_interval(len(frames), size, generator) for size in frames.shape[2:4])
    covered = chosen.view(-1, 1, 1) & rows.unsqueeze(2) & columns.unsqueeze(1)  # (B, H, W)
    colour = torch.rand(len(frames), 1, 1, 1, 3, generator=generator, device=generator.device)
    return torch.where(covered[:, None, ..., None].to(frames.device), colour.to(frames), frames)


def _random_interval(batch: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """(batch, size), bool: the pixels of a side inside a random interval."""
    middle = _uniform(batch, 0, size, generator)
    reach = _uniform(batch, *CUTOUT_FRACTION, generator) * size / 2
    pixel = torch.arange(size, device=generator.device) + 0.5
    return (pixel - middle.unsqueeze(1)).abs() < reach.unsqueeze(1)
