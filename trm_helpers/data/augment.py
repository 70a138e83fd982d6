"""Image preprocessing for the policy: resizing, and per-sample augmentation on any device.

Augmentation has two parts, :func:`sample_augmentation` and :func:`apply_augmentation`, so that
random numbers can be sampled on the CPU ahead of an epoch and applied on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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
    if images.shape[1:3] == (size, size):
        return images
    factor = images.shape[1] // size
    if factor <= 11 and images.shape[1:3] == (factor * size, factor * size):
        # exact sums below 2**15: the same as below in half the time
        rows = sum(images[:, start::factor].short() for start in range(factor))
        sums = sum(rows[:, :, start::factor] for start in range(factor))
        return (sums / factor**2).round().to(torch.uint8)
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
    size = (images.shape[-3], images.shape[-2])
    return apply_augmentation(images, sample_augmentation(len(images), size, mode, generator))


def sample_augmentation(count: int, size: tuple[int, int], mode: str,
                        generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Parameters of :func:`augment_images` for ``count`` samples of H, W pixels.

    One tensor (count, ...) for each change of the mode, in the order of application.
    """
    schema.check_option("mode", mode, _MODES)
    return {change: _CHANGES[change][0](count, size, generator) for change in _MODES[mode]}


def apply_augmentation(images: torch.Tensor,
                       parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Images (B, ..., H, W, 3) changed by :func:`sample_augmentation`'s parameters of B samples.

    On a GPU with parameters there, nothing waits for the device.
    """
    if not parameters or not len(images):
        return images
    frames = images.reshape(len(images), -1, *images.shape[-3:])  # (B, T, H, W, 3)
    for change, values in parameters.items():
        frames = _CHANGES[change][1](frames, values)
    return frames.reshape(images.shape)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


# Each change below is two functions: its parameters of B samples, and their application to frames
# (B, T, H, W, 3).


def _sample_brightness(count: int, size: tuple[int, int],
                       generator: torch.Generator) -> torch.Tensor:
    """(B,): the factor, 1 for a sample that is not changed."""
    chosen = _uniform(count, 0, 1, generator) < BRIGHTNESS_PROBABILITY
    factor = _uniform(count, *BRIGHTNESS, generator)
    return torch.where(chosen, factor, 1.0)


def _change_brightness(frames: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    factor = factor.to(frames.device, frames.dtype)
    return (frames * factor.view(-1, 1, 1, 1, 1)).clamp_(0, 1)


def _sample_colours(count: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """(B, 3, 3): rotation and stretch about the grey axis; grey is unchanged."""
    chosen = _uniform(count, 0, 1, generator) < COLOUR_PROBABILITY
    angle = _uniform(count, -HUE, HUE, generator).view(-1, 1, 1)
    saturation = _uniform(count, *SATURATION, generator).view(-1, 1, 1)
    grey = torch.full((3, 3), 1 / 3, device=generator.device)
    colour = torch.eye(3, device=generator.device) - grey
    across = colour.roll(1, 0) - colour.roll(-1, 0)  # of (1, 1, 1) with a colour, by sqrt(3)
    turned = grey + saturation * (angle.cos() * colour + angle.sin() * across / 3 ** 0.5)
    return torch.where(chosen.view(-1, 1, 1), turned, torch.eye(3, device=generator.device))


def _change_colours(frames: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bthwc,bdc->bthwd", frames, matrix.to(frames)).clamp_(0, 1)


def _sample_crop(count: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """(B, 3): 1 for a sample that is cropped, and the crop's centre in units of half a side."""
    chosen = _uniform(count, 0, 1, generator) < CROP_PROBABILITY
    room = 1 - CROP_FRACTION  # how far the crop's centre can go
    centre = [_uniform(count, -room, room, generator) for _ in "xy"]
    return torch.stack([chosen.float(), *centre], dim=1)


def _crop(frames: torch.Tensor, crop: torch.Tensor) -> torch.Tensor:
    """Enlarge the crop of the chosen samples, bilinearly, in place."""
    if crop.device.type != "cpu":  # the number of chosen samples is on the GPU: crop all of them
        chosen = crop[:, 0].view(-1, 1, 1, 1, 1) > 0
        return torch.where(chosen.to(frames.device), _enlarge(frames, crop[:, 1:]), frames)
    rows = crop[:, 0].nonzero().squeeze(1)
    if len(rows) == 0:
        return frames
    there = rows.to(frames.device)
    cropped = _enlarge(frames.index_select(0, there), crop[rows, 1:])
    return frames.index_copy_(0, there, cropped)


def _enlarge(frames: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """The crops around ``centre`` (B, 2), as large as the frames."""
    affine = torch.zeros(len(frames), 2, 3, device=centre.device)
    affine[:, 0, 0] = affine[:, 1, 1] = CROP_FRACTION
    affine[:, :, 2] = centre
    picked = frames.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, T*3, H, W)
    grid = F.affine_grid(affine.to(picked), list(picked.shape), align_corners=False)
    cropped = F.grid_sample(picked, grid, padding_mode="border", align_corners=False)
    return cropped.unflatten(1, (-1, 3)).permute(0, 1, 3, 4, 2)  # (B, T, H, W, 3)


def _sample_shift(count: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """(B, 2) int64: pixels by which rows and columns move."""
    offsets = []
    for side in size:
        furthest = max(1, round(SHIFT_FRACTION * side))
        offsets.append(torch.randint(-furthest, furthest + 1, (count, 1), generator=generator,
                                     device=generator.device))
    return torch.cat(offsets, dim=1)


def _shift(frames: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Move each sample by whole pixels, repeating the edge."""
    batch, time, height, width, _ = frames.shape
    offset = offset.to(frames.device)
    rows, columns = (
        (torch.arange(side, device=frames.device) + moved.unsqueeze(1)).clamp(0, side - 1)
        for moved, side in zip(offset.unbind(1), (height, width), strict=True))  # (B, H), (B, W)
    frame = torch.arange(batch * time, device=frames.device).view(batch, time, 1, 1)
    pixels = (frame * height + rows.view(batch, 1, height, 1)) * width
    pixels = pixels + columns.view(batch, 1, 1, width)  # (B, T, H, W) into the flattened pixels
    return frames.reshape(-1, 3).index_select(0, pixels.flatten()).view(frames.shape)


def _sample_cutout(count: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """(B, 8): 1 if chosen; middle and half the length of the rows and the columns; colour."""
    values = [(_uniform(count, 0, 1, generator) < CUTOUT_PROBABILITY).float()]
    for side in size:
        values.append(_uniform(count, 0, side, generator))
        values.append(_uniform(count, *CUTOUT_FRACTION, generator) * side / 2)
    colour = torch.rand(count, 3, generator=generator, device=generator.device)
    return torch.cat([torch.stack(values, dim=1), colour], dim=1)


def _cut_out(frames: torch.Tensor, cutout: torch.Tensor) -> torch.Tensor:
    """Cover a rectangle of the chosen samples with a colour."""
    chosen, *intervals, colour = cutout.to(frames.device).split([1, 2, 2, 3], dim=1)
    rows, columns = (
        (torch.arange(side, device=frames.device) + 0.5 - interval[:, :1]).abs() < interval[:, 1:]
        for interval, side in zip(intervals, frames.shape[2:4], strict=True))  # (B, H), (B, W)
    covered = (chosen.unsqueeze(2) > 0) & rows.unsqueeze(2) & columns.unsqueeze(1)  # (B, H, W)
    return torch.where(covered[:, None, ..., None], colour.view(-1, 1, 1, 1, 3).to(frames), frames)


_CHANGES = {  # name -> its parameters, their application
    "brightness": (_sample_brightness, _change_brightness),
    "colours": (_sample_colours, _change_colours),
    "crop": (_sample_crop, _crop),
    "shift": (_sample_shift, _shift),
    "cutout": (_sample_cutout, _cut_out),
}
_MODES = {
    "none": (), "brightness": ("brightness",), "colour": ("brightness", "colours"),
    "reference": ("brightness", "crop"), "shift": ("brightness", "shift"),
    "cutout": ("brightness", "shift", "cutout"),
}
