"""A trained policy in numbers and figures: predictions, recursion, depth, halting, saliency."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
import torch
from captum.attr import IntegratedGradients
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from .. import schema
from ..data.normalize import ActionNormalizer
from ..sim.render import upright
from ..stats import wilson_interval
from .colours import BLUE, GREEN, GREY, ORANGE, PALETTE, RED
from .figure import (
    MAX_WIDTH,
    count_axis,
    describe,
    label_right,
    new_axes,
    new_figure,
    show_image,
    styled,
)

BATCH = 64
STEPS = 64  # of integrated gradients


@contextlib.contextmanager
def evaluating(policy) -> Iterator[None]:
    """Context in which the policy is in evaluation mode. It does not switch gradients off."""
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)


def first_actions(normalizer: ActionNormalizer, actions: torch.Tensor) -> np.ndarray:
    """Normalised (N, 7) or (N, K, 7) to the first action (N, 7) in the environment's units."""
    first = actions.reshape(len(actions), -1, schema.ACTION_DIM)[:, 0]
    return normalizer.denormalize(first).detach().float().cpu().numpy()


def demonstrated(dataset, batch: Mapping) -> np.ndarray:
    """The demonstrated first action (N, 7) of each observation, in the environment's units."""
    return first_actions(dataset.normalizer, batch["actions"].flatten(0, 1))


def _batches(policy, dataset, num_samples: int, seed: int = 0) -> Iterator[dict]:
    """Random samples without replacement or augmentation, batched on the policy's device."""
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} is not valid; expected >= 1")
    order = np.random.default_rng(seed).permutation(len(dataset))[:num_samples]
    yield from batches_of(policy, dataset, order.tolist())


def batches_of(policy, dataset, indices: Sequence[int]) -> Iterator[dict]:
    plain = copy.copy(dataset)
    plain.augmentation = "none"
    device = next(policy.parameters()).device
    for start in range(0, len(indices), BATCH):
        yield plain.batch(indices[start : start + BATCH], device=device)


# --- predictions ---------------------------------------------------------------------------------
@torch.no_grad()
def analyze_model_predictions(policy, dataset, num_samples: int = 4, seed: int = 0, *,
                              num_errors: int = 512) -> tuple[dict, Figure]:
    """Predicted against demonstrated actions, for a few random samples and on average.

    Compares the first action of each chunk in the environment's units, before ``act`` rounds the
    gripper and clips, without augmentation.

    Returns:
        a dictionary and its figure. ``samples`` is a list of ``target`` and ``prediction``, seven
        floats each, and ``mse``, their mean squared error. Over up to ``num_errors`` samples:
        ``count``, ``mse``, ``mean_absolute_error`` by dimension, ``std_ratio`` by dimension
        (standard deviation of predictions over that of targets: well below 1 is shrinkage towards
        the mean; None if targets do not vary) and ``gripper_accuracy`` (share with the right sign).
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} is not valid; expected >= 1")
    targets, predictions, images = [], [], []
    with evaluating(policy):
        for batch in _batches(policy, dataset, max(num_samples, num_errors), seed):
            predictions.append(first_actions(policy.normalizer, policy(batch["observations"])))
            targets.append(demonstrated(dataset, batch))
            if len(images) < num_samples:
                images.extend(batch["observations"][policy.config.cameras[0]].flatten(0, 1).cpu())
    report = prediction_report(np.concatenate(targets), np.concatenate(predictions), num_samples)
    return report, plot_predictions(images[:num_samples], report)


def prediction_report(targets: np.ndarray, predictions: np.ndarray, num_samples: int) -> dict:
    """The dictionary of :func:`analyze_model_predictions` from actions (N, 7)."""
    error = predictions - targets
    right = np.sign(predictions[:, schema.GRIPPER_INDEX]) == targets[:, schema.GRIPPER_INDEX]
    return {
        "samples": [
            {"target": target.tolist(), "prediction": prediction.tolist(),
             "mse": float(np.mean((prediction - target) ** 2))}
            for target, prediction in zip(targets[:num_samples], predictions, strict=False)],
        "count": len(targets),
        "mse": float(np.mean(error**2)),
        "mean_absolute_error": dict(
            zip(schema.ACTION_NAMES, np.abs(error).mean(axis=0).tolist(), strict=True)),
        "std_ratio": {name: float(predicted / target) if target > 1e-6 else None
                      for name, predicted, target in zip(schema.ACTION_NAMES,
                                                         predictions.std(axis=0),
                                                         targets.std(axis=0), strict=True)},
        "gripper_accuracy": float(right.mean()),
    }


@styled
def plot_predictions(images: Sequence[np.ndarray], report: Mapping) -> Figure:
    """Stored images (n, H, W, 3) over target and prediction bars; below, errors on average."""
    samples = report["samples"]
    count = max(len(samples), 3)  # room for the panels below
    fig = new_figure(min(2.7 * count, MAX_WIDTH), 8.2)
    grid = fig.add_gridspec(3, 2 * count, height_ratios=(1.1, 1.2, 1))
    place = np.arange(schema.ACTION_DIM)
    for i, sample in enumerate(samples):
        columns = slice(2 * i, 2 * i + 2)
        image = fig.add_subplot(grid[0, columns])
        show_image(image, upright(images[i]))
        image.set_title(f"sample {i + 1}: MSE {sample['mse']:.4f}")
        bars = fig.add_subplot(grid[1, columns])
        bars.barh(place - 0.2, sample["target"], 0.4, color=BLUE, label="demonstrated")
        bars.barh(place + 0.2, sample["prediction"], 0.4, color=ORANGE, hatch="//",
                  label="predicted")
        bars.axvline(0, color=GREY, linewidth=0.6)
        limit = 1.05 * max(1.0, *np.abs([*sample["target"], *sample["prediction"]]))
        bars.set(yticks=place, yticklabels=schema.ACTION_NAMES if i == 0 else [],
                 xlim=(-limit, limit), xlabel="command (−1 to 1)")
        bars.invert_yaxis()
    fig.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    errors, ratios = fig.add_subplot(grid[2, :count]), fig.add_subplot(grid[2, count:])
    errors.bar(schema.ACTION_NAMES, report["mean_absolute_error"].values(), color=GREEN)
    errors.set(ylabel="mean absolute error",
               title=f"Error over {report['count']} samples "
               f"(gripper right in {100 * report['gripper_accuracy']:.0f} %)")
    values = [np.nan if value is None else value for value in report["std_ratio"].values()]
    ratios.bar(schema.ACTION_NAMES, values, color=GREEN)
    ratios.axhline(1, color="black", linestyle=":")
    ratios.set(ylabel="std(predicted) / std(target)", title="Spread (1: as demonstrated)")
    for axes in (errors, ratios):
        axes.tick_params(axis="x", rotation=30)
    fig.suptitle("First predicted action against the demonstrated one")
    worst = max(report["mean_absolute_error"], key=report["mean_absolute_error"].get)
    return describe(fig, f"Mean squared error {report['mse']:.4f} over {report['count']} samples; "
                         f"the largest mean absolute error is that of {worst}, "
                         f"{report['mean_absolute_error'][worst]:.3f}.")


# --- depth and halting ---------------------------------------------------------------------------
@torch.no_grad()
def depth_curve(policy, dataset, depths: Sequence[int] = (), num_samples: int = 256) -> dict:
    """Error of the first action when the policy recurses ``depths`` times at inference.

    A policy with a halting rule may stop before the depth it is given.

    Args:
        depths: default 1, 2, 4, 8, 16 and the trained depth.

    Returns:
        ``depths`` and, by depth and in the environment's units, ``mse`` over the seven numbers,
        ``arm_error`` (mean absolute error of the arm's six) and ``gripper_accuracy``, the last two
        with ``arm_interval`` and ``gripper_interval``, 95 % intervals [low, high] over the samples;
        and ``trained_depth``. If that is among the depths, also ``arm_gap``, the error minus that
        at the trained depth on the same samples, with ``arm_gap_interval`` of the paired
        differences.
    """
    trained = policy.config.num_recursions
    depths = list(depths) or sorted({1, 2, 4, 8, 16, trained})
    targets, predictions = [], []
    with evaluating(policy):
        for batch in _batches(policy, dataset, num_samples):
            targets.append(demonstrated(dataset, batch))
            predictions.append([first_actions(policy.normalizer, policy(
                batch["observations"], num_recursions=depth)) for depth in depths])
    target, predicted = np.concatenate(targets), np.concatenate(predictions, axis=1)
    errors = np.abs(predicted - target)[..., : schema.ARM_DIM].mean(axis=2)  # (depths, N)
    rows = []
    for depth, actions, error in zip(depths, predicted, errors, strict=True):
        report = prediction_report(target, actions, 0)
        mean, interval = _mean_interval(error)
        right = report["gripper_accuracy"]
        row = {"depths": depth, "mse": report["mse"], "arm_error": mean, "arm_interval": interval,
               "gripper_accuracy": right,
               "gripper_interval": list(wilson_interval(round(right * len(target)), len(target)))}
        if trained in depths:
            gap, interval = _mean_interval(error - errors[depths.index(trained)])
            row |= {"arm_gap": gap, "arm_gap_interval": interval}
        rows.append(row)
    return {**{key: [row[key] for row in rows] for key in rows[0]}, "trained_depth": trained}


def _mean_interval(values: np.ndarray) -> tuple[float, list[float]]:
    """Mean of (N,) and its 95 % interval [low, high]."""
    mean, half = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    return mean, [mean - half, mean + half]


def depth_sentence(curve: Mapping) -> str:
    """The paired differences of a :func:`depth_curve`, and which of them can be measured."""
    trained = curve["trained_depth"]
    digits = 4 if np.abs(curve["arm_gap"]).max() >= 0.005 else 5
    found = [f"depth {depth} {gap:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}"
             + (")" if low * high > 0 else ", not significant)")
             for depth, gap, (low, high) in zip(curve["depths"], curve["arm_gap"],
                                                curve["arm_gap_interval"], strict=True)
             if depth != trained]
    return (f"Error of the arm minus that at the trained depth of {trained}, on the same samples, "
            f"with its 95 % interval: {', '.join(found)}.")


@styled
def plot_depth_curve(curve: Mapping) -> Figure:
    """The figure of a :func:`depth_curve` with paired differences."""
    fig = new_figure(MAX_WIDTH, 3.4)
    error, gap, gripper = fig.subplots(1, 3)
    error.plot(curve["depths"], curve["arm_error"], marker="o")
    error.set(ylabel="mean absolute error", title="Error of the arm\n",
              ylim=(0, 1.1 * max(curve["arm_error"])))
    gap.axhline(0, color=GREY, linewidth=0.6)
    gap.set(ylabel="difference of the error",
            title="Arm, against the trained depth\n(95 % interval of the pairs)")
    for axes, key, ends in ((gap, "arm_gap", "arm_gap_interval"),
                            (gripper, "gripper_accuracy", "gripper_interval")):
        low, high = np.transpose(curve[ends])
        axes.errorbar(curve["depths"], curve[key],
                      [np.subtract(curve[key], low), np.subtract(high, curve[key])],
                      marker="o", capsize=3)
    gripper.set(ylabel="share with the right sign", title="Gripper\n(95 % Wilson interval)")
    for axes in (error, gap, gripper):
        axes.axvline(curve["trained_depth"], color=GREY, linestyle=":",
                     label=f"trained with {curve['trained_depth']}")
        axes.set(xlabel="recursions per decision")
        count_axis(axes.xaxis)
    fig.legend(*gap.get_legend_handles_labels(), loc="outside lower center")
    fig.suptitle("Error of the first action by recursions per decision (of commands, −1 to 1)")
    rows = zip(curve["depths"], curve["arm_error"], curve["gripper_accuracy"], strict=True)
    return describe(fig, "; ".join(
        f"depth {depth}: arm {error:.3f}, gripper right in {100 * right:.0f} %"
        for depth, error, right in rows) + f". {depth_sentence(curve)}")


@torch.no_grad()
def prediction_by_depth(policy, observations: Mapping, depths: Sequence[int]) -> np.ndarray:
    """First action (len(depths), 7), environment units, of the batch's first sample by depth."""
    with evaluating(policy):
        return np.stack([first_actions(policy.normalizer,
                                       policy(observations, num_recursions=depth))[0]
                         for depth in depths])


def _dimension_colour(dim: int) -> str:
    return "black" if dim == schema.GRIPPER_INDEX else PALETTE[dim]


@styled
def plot_prediction_by_depth(depths: Sequence[int], actions: np.ndarray) -> Figure:
    """The figure of :func:`prediction_by_depth`."""
    axes = new_axes(7, 3.6)
    for dim in range(schema.ACTION_DIM):
        axes.plot(depths, actions[:, dim], "--" if dim == schema.GRIPPER_INDEX else "-",
                  marker="osD^v<>"[dim], markersize=4, color=_dimension_colour(dim))
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set(xlabel="recursions per decision", ylabel="first action (command, −1 to 1)",
             title="One sample's action by recursions per decision")
    count_axis(axes.xaxis)
    label_right(axes, {name: (actions[-1, dim], _dimension_colour(dim))
                       for dim, name in enumerate(schema.ACTION_NAMES)})
    dim = np.ptp(actions, axis=0).argmax()
    return describe(axes.figure, f"{schema.ACTION_NAMES[dim]} changes most, from "
                                 f"{actions[0, dim]:+.2f} at depth {depths[0]} to "
                                 f"{actions[-1, dim]:+.2f} at depth {depths[-1]}.")


@torch.no_grad()
def halting_profile(policy, dataset, num_samples: int = 512) -> dict:
    """Recursions used by each of up to ``num_samples`` samples.

    Returns:
        ``depths`` (a list of int), their ``mean``, the policy's ``limit`` and its ``halting`` rule
        (``fixed`` always uses the limit).
    """
    depths: list[int] = []
    with evaluating(policy):
        for batch in _batches(policy, dataset, num_samples):
            policy(batch["observations"])
            depths += policy.last_depth.tolist()
    return {"depths": depths, "mean": float(np.mean(depths)),
            "limit": policy.config.num_recursions, "halting": policy.config.halting}


@styled
def plot_halting(profile: Mapping) -> Figure:
    """The figure of :func:`halting_profile`."""
    steps = np.arange(1, profile["limit"] + 1)
    axes = new_axes(6, 3.2)
    axes.bar(steps, [100 * np.mean(np.equal(profile["depths"], step)) for step in steps],
             color=BLUE)
    axes.axvline(profile["mean"], color=RED, linestyle="--", label=f"mean {profile['mean']:.2f}")
    axes.set(xlabel=f"recursions per decision (at most {profile['limit']})",
             ylabel="share of samples (%)",
             title=f"Recursions of {len(profile['depths'])} samples "
                   f"(halting: {profile['halting']})")
    count_axis(axes.xaxis)
    axes.legend()
    used = " to ".join(map(str, sorted({min(profile["depths"]), max(profile["depths"])})))
    return describe(axes.figure, f"{used} recursions used, mean {profile['mean']:.2f}, of at most "
                                 f"{profile['limit']}.")


# --- saliency ------------------------------------------------------------------------------------
def saliency(policy, observations: Mapping) -> dict[str, np.ndarray]:
    """How much the arm's first action depends on each pixel: a map (B, H, W) per camera.

    Attributes the sum of the absolute six arm outputs (normalised) by integrated gradients
    (Sundararajan et al. 2017, arXiv 1703.01365) in 64 steps from a black image. Absolute
    attributions are summed over colours and divided by the sample's maximum over all cameras, so
    that maps lie in [0, 1] and cameras can be compared; upside down, as images are stored. T folds
    into B.
    """
    cameras = policy.config.cameras
    inputs = tuple(observations[camera].detach().flatten(0, -4).requires_grad_()
                   for camera in cameras)  # (B, H, W, 3)
    names = [name for name in observations if name not in schema.CAMERAS]
    others = tuple(observations[name].flatten(0, -1 if name == "task_id" else -2)
                   for name in names)  # (B, P), (B,)

    def arm_activity(*values: torch.Tensor) -> torch.Tensor:  # (B,)
        actions = policy(dict(zip((*cameras, *names), values, strict=True)))
        first = actions.reshape(len(actions), -1, schema.ACTION_DIM)[:, 0]
        return first[:, : schema.ARM_DIM].abs().sum(dim=1)

    with evaluating(policy):
        maps = IntegratedGradients(arm_activity).attribute(
            inputs, additional_forward_args=others, n_steps=STEPS, internal_batch_size=BATCH)
    maps = torch.stack([each.abs().sum(dim=-1) for each in maps]).detach().cpu()  # (C, B, H, W)
    peak = maps.amax(dim=(0, 2, 3)).clamp(min=1e-12)
    return dict(zip(cameras, (maps / peak[:, None, None]).float().numpy(), strict=True))


@styled
def plot_saliency(images: Mapping[str, np.ndarray], maps: Mapping[str, np.ndarray]) -> Figure:
    """One sample's stored image (H, W, 3) per camera, and its map (H, W) of :func:`saliency` over
    the image in grey."""
    fig = new_figure(6.4, 2.9 * len(maps) + 0.4)
    fig.set_layout_engine("compressed")
    grid = fig.subplots(len(maps), 2, squeeze=False)
    colours = matplotlib.colormaps["inferno"]
    for (image, over), camera in zip(grid, maps, strict=True):
        stored, weight = np.asarray(images[camera]), np.sqrt(maps[camera])[..., None]
        stored = stored / 255 if stored.dtype == np.uint8 else stored
        grey = 0.5 * stored.mean(axis=-1, keepdims=True)  # at half brightness
        show_image(image, upright(stored))
        # the stronger the attribution, the more of its colour
        show_image(over, upright((1 - weight) * grey
                                 + weight * colours(maps[camera])[..., :3]))
        image.set_ylabel(schema.CAMERA_TITLES[camera])
        over.set_title(f"{_percent(camera, maps):.0f} % of the attribution")
    grid[0, 0].set_title("image")
    values = np.linspace(0, 1, 256)[:, None]
    over_grey = (1 - np.sqrt(values)) * 0.25 + np.sqrt(values) * colours(values[:, 0])[:, :3]
    fig.colorbar(matplotlib.cm.ScalarMappable(cmap=ListedColormap(over_grey)), ax=grid[:, 1],
                 label="attribution (1: strongest pixel)")
    fig.suptitle("Saliency of the first predicted arm action")
    return describe(fig, saliency_sentence(maps))


def saliency_sentence(maps: Mapping[str, np.ndarray]) -> str:
    """Each camera's share of the attribution, and how few pixels hold half of it."""
    return "Of the attribution, " + ", ".join(
        f"{_percent(camera, maps):.0f} % is in the {schema.CAMERA_TITLES[camera]} (half of that "
        f"on {100 * _half_of(heat):.1f} % of its pixels)" for camera, heat in maps.items()) + "."


def _percent(camera: str, maps: Mapping[str, np.ndarray]) -> float:
    """A camera's share of the attribution; 0 where nothing that the policy sees affects it."""
    return 100 * maps[camera].sum() / max(sum(heat.sum() for heat in maps.values()), 1e-12)


def _half_of(heat: np.ndarray) -> float:
    """The share of pixels, strongest first, that hold half of a map's attribution."""
    total = np.cumsum(np.sort(heat, axis=None)[::-1])
    pixels = np.count_nonzero(total < total[-1] / 2) + 1 if total[-1] else 0
    return pixels / heat.size
