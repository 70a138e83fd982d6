"""A trained policy in numbers and figures: predictions, recursion, depth, halting, saliency."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
import torch
from captum.attr import IntegratedGradients
from matplotlib.figure import Figure
from PIL import Image

from .. import schema
from ..sim.render import upright
from ..stats import wilson_interval
from .colours import BLUE, GREEN, GREY, ORANGE, PALETTE, RED
from .plots import (
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
CONVERGED = 0.05  # last change, as a share of the state's norm
DIVERGED_CHANGE = 1.5  # last change over the first
DIVERGED_NORM = 2.0  # last norm over the first
SETTLED = 0.01  # environment units: an action this close to the last step's
STEPS = 64  # of integrated gradients
_MOMENT_SIZE = 256  # pixels of an image shown beside the recursion


@contextlib.contextmanager
def _evaluating(policy) -> Iterator[None]:
    """Evaluation mode for a while; gradients are the caller's business."""
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)


def _first_actions(policy, actions: torch.Tensor) -> np.ndarray:
    """Normalised (N, 7) or (N, K, 7) to the first action (N, 7) in the environment's units."""
    if policy.config.chunk > 1:
        actions = actions[:, 0]
    if policy.normalizer is not None:
        actions = policy.normalizer.denormalize(actions)
    return actions.detach().float().cpu().numpy()


def _targets(dataset, batch: Mapping) -> np.ndarray:
    """The demonstrated first action (N, 7) of each observation, in the environment's units."""
    actions = batch["actions"]  # (B, T, 7) or (B, T, K, 7)
    first = actions if dataset.chunk == 1 else actions[:, :, 0]
    return dataset.normalizer.denormalize(first.flatten(0, 1)).cpu().numpy()


def _batches(policy, dataset, num_samples: int, seed: int = 0) -> Iterator[dict]:
    """Random samples without replacement or augmentation, batched on the policy's device."""
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} is not valid; expected >= 1")
    order = np.random.default_rng(seed).permutation(len(dataset))[:num_samples]
    yield from _batches_of(policy, dataset, order.tolist())


def _batches_of(policy, dataset, indices: Sequence[int]) -> Iterator[dict]:
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
    targets, predictions, images = [], [], []
    with _evaluating(policy):
        for batch in _batches(policy, dataset, max(num_samples, num_errors), seed):
            predictions.append(_first_actions(policy, policy(batch["observations"])))
            targets.append(_targets(dataset, batch))
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
                 xlim=(-limit, limit), xlabel="environment units")
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


# --- recursion -----------------------------------------------------------------------------------
def recursion_verdict(changes: Sequence[float], norms: Sequence[float]) -> tuple[str, str]:
    """Whether the recursion converges, as one word and one sentence.

    ``converged``: the last change is at most 5 % of the last norm. Else ``diverging``: the last
    change is over 1.5 times the first, or the last norm over twice the first, or a number is not
    finite. Else ``drifting``: the state still moves, at a bounded size.

    Args:
        changes: ``||h_k - h_(k-1)||`` for k = 1 ... N.
        norms: ``||h_k||`` for k = 0 ... N.
    """
    if len(changes) == 0 or len(norms) != len(changes) + 1:
        raise ValueError(
            f"{len(changes)} changes and {len(norms)} norms; expected N >= 1 changes, N + 1 norms")
    if not np.isfinite([*changes, *norms]).all():
        return "diverging", "The recursion is diverging: its states are not finite."
    share = changes[-1] / max(norms[-1], 1e-12)
    if share <= CONVERGED:
        word = "converged"
    elif changes[-1] > DIVERGED_CHANGE * changes[0] or norms[-1] > DIVERGED_NORM * norms[0]:
        word = "diverging"
    else:
        word = "drifting"
    verb = "has converged" if word == "converged" else f"is {word}"
    return word, (
        f"The recursion {verb}: step {len(changes)} changes the state by {100 * share:.1f} % of "
        f"its norm (the first step by {100 * changes[0] / max(norms[1], 1e-12):.1f} %).")


@torch.no_grad()
def visualize_recursive_states(policy, observations: Mapping) -> tuple[dict, Figure]:
    """How the hidden state moves over the recursion, for batched observations.

    Returns:
        a dictionary and its figure: ``norms`` (N + 1 floats, ``||h_k||`` from h0), ``changes`` (N
        floats, ``||h_k - h_(k-1)||``), both L2 and averaged over the batch, and ``verdict`` and
        ``sentence`` of :func:`recursion_verdict`. The heat map shows the first sample's features,
        sorted by their last value.
    """
    with _evaluating(policy):
        _, states = policy(observations, return_all_states=True)
    states = torch.stack(states).float().cpu().flatten(2)  # (N + 1, B, D), or K * D of tokens
    norms = states.norm(dim=-1).mean(dim=1).tolist()
    changes = states.diff(dim=0).norm(dim=-1).mean(dim=1).tolist()
    verdict, sentence = recursion_verdict(changes, norms)
    report = {"norms": norms, "changes": changes, "verdict": verdict, "sentence": sentence}
    return report, plot_recursion(states[:, 0].numpy(), report)


@styled
def plot_recursion(states: np.ndarray, report: Mapping) -> Figure:
    """Heat map of one sample's states (N + 1, D), and norm and change of the state by step."""
    steps = np.arange(len(states))
    fig = new_figure(MAX_WIDTH, 3.6)
    heat, norm, change = fig.subplots(1, 3, width_ratios=(1.5, 1, 1))
    limit = np.abs(states).max()
    image = heat.imshow(states[:, np.argsort(states[-1])].T, aspect="auto", cmap="PuOr",
                        vmin=-limit, vmax=limit, origin="lower")
    heat.set(xlabel="recursion step (0: before it)", xlim=(-0.5, len(states) - 0.5),
             ylabel="feature, sorted by last value", title="Hidden state of one sample")
    fig.colorbar(image, ax=heat, label="activation")
    norm.plot(steps, report["norms"], marker="o")
    norm.set(xlabel="recursion step", title="L2 norm of the state",
             ylim=(0, 1.15 * max(report["norms"])))
    change.plot(steps[1:], report["changes"], marker="o", color=RED)
    change.axhline(CONVERGED * report["norms"][-1], color=GREY, linestyle=":",
                   label=f"converged below\n({100 * CONVERGED:.0f} % of the norm)")
    change.set(xlabel="recursion step", title="L2 norm of its change",
               ylim=(0, 1.25 * max(report["changes"])))
    change.legend(loc="upper right")
    for axes in (heat, norm, change):
        count_axis(axes.xaxis)
    fig.suptitle(report["sentence"])
    return describe(fig, f"Norm of the state {report['norms'][0]:.3g} before the first step and "
                         f"{report['norms'][-1]:.3g} after the last; change "
                         f"{report['changes'][0]:.3g} in the first and "
                         f"{report['changes'][-1]:.3g} in the last.")


@torch.no_grad()
def recursion_steps(policy, dataset, index: int) -> dict:
    """One sample's recursion, step by step.

    Returns:
        ``images``, the stored image (H, W, 3) by camera; ``target``, the demonstrated first action
        (7,), and ``actions`` (N, 7), the one read out after each step, in the environment's units;
        ``states`` (N + 1, D), or K * D of tokens, from h0.
    """
    batch = next(_batches_of(policy, dataset, [index]))
    observations = batch["observations"]
    with _evaluating(policy):
        _, states = policy(observations, return_all_states=True)
    steps = range(1, len(states))
    return {"images": {camera: observations[camera].flatten(0, -4)[0].cpu().numpy()
                       for camera in policy.config.cameras},
            "target": _targets(dataset, batch)[0],
            "actions": prediction_by_depth(policy, observations, steps),
            "states": torch.stack(states)[:, 0].flatten(1).float().cpu().numpy()}


@styled
def plot_recursion_steps(steps: Mapping) -> Figure:
    """The figure of :func:`recursion_steps`: observation, then state and action by step.

    Of more than four steps, four from the first to the last.
    """
    states, actions, target = steps["states"], steps["actions"], steps["target"]
    errors = np.abs(actions - target)[:, : schema.ARM_DIM].mean(axis=1)
    shown = np.unique(np.linspace(1, len(actions), min(len(actions), 4)).round().astype(int))
    fig = new_figure(MAX_WIDTH, 4.6)
    grid = fig.add_gridspec(2, len(shown) + 2)
    for line, (camera, image) in enumerate(list(steps["images"].items())[:2]):
        axes = fig.add_subplot(grid[line, 0])
        show_image(axes, upright(image))
        axes.set_title(schema.CAMERA_TITLES[camera])
    side = int(np.ceil(np.sqrt(states.shape[1])))  # of a square that holds the state's numbers
    limit = np.abs(states).max()
    place = np.arange(schema.ACTION_DIM)
    for column, step in enumerate([0, *shown], 1):
        square = np.full(side * side, np.nan)
        square[: states.shape[1]] = states[step]
        top = fig.add_subplot(grid[0, column])
        show_image(top, square.reshape(side, side), cmap="PuOr", vmin=-limit, vmax=limit)
        if step == 0:
            top.set_title("start")
            continue
        moved = np.linalg.norm(states[step] - states[step - 1]) / np.linalg.norm(states[step])
        top.set_title(f"step {step}\nmoved {100 * moved:.1f} %")
        bottom = fig.add_subplot(grid[1, column])
        bottom.barh(place, actions[step - 1], 0.7, color=ORANGE, hatch="//", label="predicted")
        bottom.plot(target, place, "D", color=BLUE, markersize=4, linestyle="",
                    label="demonstrated")
        bottom.axvline(0, color=GREY, linewidth=0.6)
        reach = 1.05 * max(1.0, np.abs([*actions.flat, *target]).max())
        bottom.set(yticks=place, xlim=(-reach, reach),
                   yticklabels=schema.ACTION_NAMES if step == shown[0] else [],
                   title=f"arm error {errors[step - 1]:.3f}")
        bottom.invert_yaxis()
    fig.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    fig.suptitle("The state (above) and the action read from it (below) after each step")
    away = np.abs(actions - actions[-1]).max(axis=1)
    settled = 2 + max(np.flatnonzero(away >= SETTLED), default=-1)
    return describe(fig, f"After step 1 the action is up to {away[0]:.3f} away from that of step "
                         f"{len(actions)}; from step {settled} on it changes by less than "
                         f"{SETTLED:g}.")


def recursion_moments(policy, dataset, titles: Mapping[int, str]) -> tuple[list[dict], np.ndarray]:
    """How the first action forms over the recursions, at a few moments of demonstrations.

    Args:
        titles: the name of each moment by its sample in ``dataset``.

    Returns:
        a list of ``title``, ``demonstrated`` (7 floats, environment units) and ``recursions``, one
        per step: ``action`` (7 floats) read after it, ``change``, the norm of the state's change
        over the norm of the state, and ``sentence``; and the first camera's images, upright and
        enlarged, side by side as uint8 (S, n * S, 3).
    """
    moments, images = [], []
    for index, title in titles.items():
        steps = recursion_steps(policy, dataset, index)
        states, actions, target = steps["states"], steps["actions"], steps["target"]
        norms = np.linalg.norm(states[1:], axis=1).clip(min=1e-12)
        changes = np.linalg.norm(np.diff(states, axis=0), axis=1) / norms
        moments.append({
            "title": title, "demonstrated": target.tolist(),
            "recursions": [
                {"action": actions[k].tolist(), "change": float(changes[k]),
                 "sentence": _moment_sentence(k, actions, target, float(changes[k]))}
                for k in range(len(actions))]})
        image = steps["images"][policy.config.cameras[0]]
        image = Image.fromarray((255 * upright(image)).round().astype(np.uint8))
        images.append(image.resize((_MOMENT_SIZE, _MOMENT_SIZE), Image.Resampling.BICUBIC))
    return moments, np.concatenate(images, axis=1)


def _moment_sentence(k: int, actions: np.ndarray, target: np.ndarray, change: float) -> str:
    """The step ``k`` of actions (N, 7) against the demonstrated one (7,)."""
    errors = np.abs(actions - target)[:, : schema.ARM_DIM].mean(axis=1)
    gripper = "right" if (np.sign(actions[k, schema.GRIPPER_INDEX])
                          == np.sign(target[schema.GRIPPER_INDEX])) else "wrong"
    difference = errors[k] - errors[k - 1] if k else 0.0
    compared = "" if not k else (", as after the recursion before" if abs(difference) < 0.005 else
                                 f", {abs(difference):.2f} {'more' if difference > 0 else 'less'} "
                                 "than after the recursion before")
    return (f"After recursion {k + 1} of {len(actions)}, the arm's movement differs from the "
            f"demonstrated one by {errors[k]:.2f} on average{compared}; the gripper command is "
            f"{gripper}. This recursion changed the state by {100 * change:.0f} % of its norm"
            f"{': it has almost stopped changing' if k and change <= CONVERGED else ''}.")


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
    targets, predictions = [], {depth: [] for depth in depths}
    with _evaluating(policy):
        for batch in _batches(policy, dataset, num_samples):
            targets.append(_targets(dataset, batch))
            for depth in depths:
                actions = policy(batch["observations"], num_recursions=depth)
                predictions[depth].append(_first_actions(policy, actions))
    target = np.concatenate(targets)
    predicted = {depth: np.concatenate(actions) for depth, actions in predictions.items()}
    errors = {depth: np.abs(actions - target)[:, : schema.ARM_DIM].mean(axis=1)
              for depth, actions in predicted.items()}  # (N,) each
    rows = []
    for depth in depths:
        report = prediction_report(target, predicted[depth], 0)
        mean, interval = _mean_interval(errors[depth])
        right = report["gripper_accuracy"]
        row = {"depths": depth, "mse": report["mse"], "arm_error": mean, "arm_interval": interval,
               "gripper_accuracy": right,
               "gripper_interval": list(wilson_interval(round(right * len(target)), len(target)))}
        if trained in errors:
            gap, interval = _mean_interval(errors[depth] - errors[trained])
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
    found = [f"depth {depth} {gap:+.4f} ({low:+.4f} to {high:+.4f}"
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
    error.set(ylabel="mean absolute error", title="Error of the arm",
              ylim=(0, 1.1 * max(curve["arm_error"])))
    gap.axhline(0, color=GREY, linewidth=0.6)
    low, high = np.transpose(curve["arm_gap_interval"])
    gap.errorbar(curve["depths"], curve["arm_gap"],
                 [np.subtract(curve["arm_gap"], low), np.subtract(high, curve["arm_gap"])],
                 marker="o", capsize=3, label="with 95 % interval of the pairs")
    gap.set(ylabel="difference of the error", title="Arm, against the trained depth")
    low, high = np.transpose(curve["gripper_interval"])
    gripper.errorbar(curve["depths"], curve["gripper_accuracy"],
                     [np.subtract(curve["gripper_accuracy"], low),
                      np.subtract(high, curve["gripper_accuracy"])], marker="o", capsize=3)
    gripper.set(ylabel="share with the right sign", title="Gripper (95 % Wilson interval)")
    for axes in (error, gap, gripper):
        axes.axvline(curve["trained_depth"], color=GREY, linestyle=":",
                     label=f"trained with {curve['trained_depth']}")
        axes.set(xlabel="recursions at inference")
        count_axis(axes.xaxis)
    fig.legend(*gap.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    fig.suptitle("Error of the first action by recursion depth (environment units)")
    rows = zip(curve["depths"], curve["arm_error"], curve["gripper_accuracy"], strict=True)
    return describe(fig, "; ".join(
        f"depth {depth}: arm {error:.3f}, gripper right in {100 * right:.0f} %"
        for depth, error, right in rows) + f". {depth_sentence(curve)}")


@torch.no_grad()
def prediction_by_depth(policy, observations: Mapping, depths: Sequence[int]) -> np.ndarray:
    """First action (len(depths), 7), environment units, of the batch's first sample by depth."""
    with _evaluating(policy):
        return np.stack([_first_actions(policy, policy(observations, num_recursions=depth))[0]
                         for depth in depths])


@styled
def plot_prediction_by_depth(depths: Sequence[int], actions: np.ndarray) -> Figure:
    """The figure of :func:`prediction_by_depth`."""
    axes = new_axes(7, 3.6)
    for dim in range(schema.ACTION_DIM):
        colour, style = ("black", "--") if dim == schema.GRIPPER_INDEX else (PALETTE[dim], "-")
        axes.plot(depths, actions[:, dim], style, marker="osD^v<>"[dim], markersize=4, color=colour)
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set(xlabel="recursions at inference", ylabel="first action (environment units)",
             title="One sample's action by recursion depth")
    count_axis(axes.xaxis)
    label_right(axes, {name: (actions[-1, dim], "black")
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
    with _evaluating(policy):
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
    axes.set(xlabel=f"recursions used (at most {profile['limit']})", ylabel="share of samples (%)",
             title=f"Recursions of {len(profile['depths'])} samples "
                   f"(halting: {profile['halting']})")
    count_axis(axes.xaxis)
    axes.legend()
    return describe(axes.figure, f"{min(profile['depths'])} to {max(profile['depths'])} "
                                 f"recursions used, mean {profile['mean']:.2f}, of at most "
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
        actions = actions if policy.config.chunk == 1 else actions[:, 0]
        return actions[:, : schema.ARM_DIM].abs().sum(dim=1)

    with _evaluating(policy):
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
    shares = {camera: heat.sum() for camera, heat in maps.items()}
    for (image, over), camera in zip(grid, maps, strict=True):
        stored, weight = np.asarray(images[camera]), np.sqrt(maps[camera])[..., None]
        stored = stored / 255 if stored.dtype == np.uint8 else stored
        grey = 0.5 * stored.mean(axis=-1, keepdims=True)  # at half brightness
        show_image(image, upright(stored))
        # the stronger the attribution, the more of its colour
        show_image(over, upright((1 - weight) * grey
                                 + weight * colours(maps[camera])[..., :3]))
        image.set_ylabel(schema.CAMERA_TITLES[camera])
        over.set_title(f"{100 * shares[camera] / sum(shares.values()):.0f} % of the attribution")
    grid[0, 0].set_title("image")
    fig.colorbar(matplotlib.cm.ScalarMappable(cmap=colours), ax=grid[:, 1],
                 label="attribution (1: strongest pixel)")
    fig.suptitle("Saliency of the first predicted arm action")
    return describe(fig, saliency_sentence(maps))


def saliency_sentence(maps: Mapping[str, np.ndarray]) -> str:
    """Each camera's share of the attribution, and how few pixels hold half of it."""
    total = sum(heat.sum() for heat in maps.values())
    return "Of the attribution, " + ", ".join(
        f"{100 * heat.sum() / total:.0f} % is in the {schema.CAMERA_TITLES[camera]} (half of that "
        f"on {100 * _half_of(heat):.1f} % of its pixels)" for camera, heat in maps.items()) + "."


def _half_of(heat: np.ndarray) -> float:
    """The share of pixels, strongest first, that hold half of a map's attribution."""
    total = np.cumsum(np.sort(heat, axis=None)[::-1])
    return float(np.mean(total < total[-1] / 2))
