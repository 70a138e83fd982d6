# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 Inside the policy
#
# What does the policy predict wrongly, how does the recursion change its state, how many recursions
# does it need, and which pixels matter? The last code cell writes a report of the whole run.
#
# **What you will learn**
# - how to look for systematic errors of a policy: one wrong dimension, a shrunken range, wrong
#   gripper commands
# - how to watch a recursion form an action, step by step, and see whether it converges
# - how to measure what each recursion contributes, by differences on the same samples
# - how to read a saliency map, and what it does not prove
#
# **Time**: 10 minutes to read; less than one to run (preset `demo`, two CPU cores).
# **Needs** the run folder of `04_train` and its demonstrations. **Writes** into the run folder
# figures, `explain.json`, the report.

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny; only its machine settings apply
run_name = ""  # type: str; a trained run's folder under artifacts/; empty takes the newest
task_ids = None  # type: list; demonstrations of these tasks only; None: all that it was trained on
num_demos = None  # type: int; of each task, to look at; None: as many as it was trained with
# the others
weights = "best"  # type: str; best or last (see 04_train)
num_samples = 256  # type: int; samples, at most, that the averages are taken over
depth_episodes = 0  # type: int; episodes per task and depth; 0 shows earlier results only
demo_dir = None  # type: str; folder of the run's demonstrations, if it was trained with one

# %% [markdown]
# ## The package and this session
#
# This cell uses the installed package, attached wheels, or the checkout that holds this notebook.
# On Kaggle it also makes attached runs and demonstrations available.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

version = "0.1.0"
if importlib.util.find_spec("trm_helpers") is None:
    attached = Path("/kaggle/input").rglob("trm_helpers-*.whl")
    wheels = {wheel.name.split("-")[1]: wheel for wheel in attached}
    checkout = [folder for folder in Path.cwd().parents if (folder / "trm_helpers").is_dir()]
    source = (["--no-index", "--find-links", wheels[version].parent, f"trm-helpers=={version}"]
              if version in wheels else ["--editable", checkout[0]] if checkout else
              [os.environ.get("TRM_SOURCE", "")])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *map(str, source)]
    assert source != [""] and subprocess.run(pip).returncode == 0, (
        f"trm_helpers {version} was not installed for Python {sys.version.split()[0]}; attached: "
        f"{', '.join(wheels) or 'no version of it'}. Add Input > Your Work > Datasets attaches the "
        "data set of this version's `make kaggle`, which has wheels for Python 3.12 and 3.13. Or "
        "turn on Settings > Internet and set TRM_SOURCE to what pip should install")
    sys.path[:0] = map(str, checkout[:1])
    importlib.invalidate_caches()
from trm_helpers import session

session.begin(version)

# %%
import dataclasses
import json

import imageio.v3 as imageio
import pandas as pd
import torch
from IPython.display import Markdown, display

from trm_helpers import (
    analyze_model_predictions,
    load_policy,
    schema,
    visualize_recursive_states,
)
from trm_helpers.config import check_parameters
from trm_helpers.demos.collect import demonstrations_of
from trm_helpers.evaluation.compare import stale
from trm_helpers.evaluation.depth import depth_card, depth_rows, plot_depth_card
from trm_helpers.evaluation.robustness import plot_card
from trm_helpers.evaluation.rollout import phases
from trm_helpers.files import write_json
from trm_helpers.policy import keypoints
from trm_helpers.report import write_report
from trm_helpers.training.runs import find_run, held_out, load_config
from trm_helpers.visuals import explain, keypoint_plots, plots, unrolled

# %%
check_parameters(weights=weights, num_samples=num_samples, depth_episodes=depth_episodes)
run = find_run(run_name, to_write=True)
config = load_config(run, preset)
changed = dataclasses.replace(config.eval,
                              num_episodes=depth_episodes or config.eval.num_episodes)
policy = load_policy(run, weights)
looked_at = dict(task_ids=task_ids, num_demos=num_demos, demo_dir=demo_dir)
seen = config.replace(**{name: value for name, value in looked_at.items() if value is not None})
data = held_out(run, demonstrations_of(run, seen), seen, policy)
sample = len(data) // 3  # of the demonstrations that were held out
observations = data.batch([sample])["observations"]

# %% [markdown]
# ## Predicted and demonstrated actions
#
# Four samples of demonstrations excluded from training: the agent view, the demonstrated action
# (blue) and the predicted action (orange), in the environment's units. A large error on one sample
# is not always a mistake: where the demonstrator starts the next phase, the policy may start it a
# step later. The lower panels average over many samples. Is one dimension worse than the others? Do
# the predictions vary less than the demonstrated actions (ratio well below 1)?

# %%
report, fig = analyze_model_predictions(policy, data, num_errors=num_samples)
plots.save_figure(fig, run / "figures" / "07_predictions.png")
display(fig)

# %%
error, ratio = report["mean_absolute_error"], report["std_ratio"]
worst = max(error, key=error.get)
shrunk = [name for name, value in ratio.items() if value is not None and value < 0.8]
print(f"{worst} has the largest error ({error[worst]:.3f} on average). Shrunk to less than 80 % of "
      f"the demonstrated spread: {', '.join(shrunk) or 'no dimension'}. The gripper command is "
      f"right in {100 * report['gripper_accuracy']:.0f} % of {report['count']} samples.")

# %% [markdown]
# ## Keypoints
#
# Keypoints are the positions of the goal's objects and of the hand in the agent view, predicted by
# a small network, the localizer. A policy trained with `scenes` above 0 receives only keypoints
# from that camera.
# A mark far from its object means that the localizer did not find it, often because the arm hides
# it. A localizer trained with `looks` corrects its first estimate: it looks again, at the pixels
# around the estimate, and the second figure shows what it sees in each look.

# %%
if policy.config.keypoints:
    looked = data.batch([len(data) * share // 8 for share in (1, 3, 5, 7)])["observations"]
    frames = (255 * looked["agentview_rgb"][:, 0]).round().to(torch.uint8).numpy()
    trails, names = keypoints.predicted_keypoints(policy, looked), policy.config.keypoints
    fig = keypoint_plots.plot_places(frames, trails[:, -1], names)
    plots.save_figure(fig, run / "figures" / "07_places.png")
    display(fig)
    if policy.config.looks:
        shown = "object" if "object" in names else names[0]
        fig = keypoint_plots.plot_looks(frames, trails, names, shown)
        plots.save_figure(fig, run / "figures" / "07_looks.png")
        display(fig)
else:
    print("Not shown: this policy has no localizer. Train one with scenes=60 in 04_train (about "
          "seven minutes more for 30 demonstrations of a task on two CPU cores).")

# %% [markdown]
# ## The recursion, step by step
#
# One observation, and what each recursion makes of it. Above: all numbers of the hidden state as
# coloured squares (purple positive, orange negative), and by how much the recursion changed it, as
# a share of its norm. Below: the action that the head reads from that state, as commands from -1 to
# 1, with the demonstrated one as diamonds.

# %%
fig = unrolled.plot_recursion_steps(unrolled.recursion_steps(policy, data, sample))
plots.save_figure(fig, run / "figures" / "07_steps.png")
display(fig)
print(fig.finding)

# %% [markdown]
# Four moments of a held-out demonstration, in words; `report.html` shows them with a slider.

# %%
first, samples = data.demos[0], len(data.samples_of(0))
closed = data.batch(range(samples))["actions"].reshape(samples, -1, schema.ACTION_DIM)[:, 0, -1] > 0
phase = phases(closed.repeat_interleave(first.frame_stride).tolist())
moments, images = unrolled.recursion_moments(policy, data, {
    sample: f"{step / schema.CONTROL_HZ:.1f} s, {phase[step]}"
    for sample in (samples * share // 8 for share in (1, 3, 5, 7))
    for step in [sample * first.frame_stride]})
imageio.imwrite(run / "figures" / "07_moments.png", images)
for moment in moments:
    print(f"{moment['title']}: {moment['recursions'][-1]['sentence']}")

# %% [markdown]
# ## The state during recursion
#
# Left: each row is one number of the hidden state, each column the state after one recursion.
# Column 0 is the initial state: the encoded observation with `variant="block"`, constant with
# `"trm"`. Middle: the norm of the state. Right: the norm of its change in each recursion. A policy
# whose recursion has converged no longer changes its state: the curve on the right falls below the
# dotted line, and the last columns on the left look alike.

# %%
recursion, fig = visualize_recursive_states(policy, observations)
plots.save_figure(fig, run / "figures" / "07_recursion.png")
display(fig)
print(recursion["sentence"])

# %% [markdown]
# ## How many recursions are needed?
#
# The same weights with fewer and more recursions than in training. Errors differ far more between
# samples than between depths, so the middle panel shows differences on the same samples: the error
# at each depth minus the error at the training depth (dotted line), with the 95 % interval of these
# paired differences. Left of the dotted line, an interval above 0 means that the recursions left
# out there improve the action; right of it, one around 0 means that no effect of further ones was
# measured. Steps of one demonstration resemble each other, so these intervals are too narrow. Even
# if this network needs its recursions, the task may not: a network trained with fewer may do as
# well.

# %%
curve = explain.depth_curve(policy, data, num_samples=num_samples)
fig = explain.plot_depth_curve(curve)
plots.save_figure(fig, run / "figures" / "07_depth.png")
display(fig)
print(explain.depth_sentence(curve))

# %% [markdown]
# The first action of one sample by depth, also beyond the training depth. The lines should be
# constant from there on.

# %%
depths = list(range(1, 2 * config.model.num_recursions + 1))
fig = explain.plot_prediction_by_depth(
    depths, explain.prediction_by_depth(policy, observations, depths))
plots.save_figure(fig, run / "figures" / "07_prediction_by_depth.png")
display(fig)
print(fig.finding)

# %% [markdown]
# A lower error on demonstrated states does not imply a higher success rate. With `depth_episodes`
# above 0, the same weights are evaluated in the simulator from the same init states: as trained,
# with fewer and more recursions, with a rule that stops when the action no longer changes, and with
# the state carried over between decisions. `python -m trm_helpers depth RUN` does the same.

# %%
if depth_episodes:
    try:
        depth_card(run, config=changed, weights=weights, task_ids=task_ids or ())
    except (RuntimeError, TimeoutError) as error:  # before the last episode as trained
        print(f"Not finished: {error}")
elif not (run / "depth.json").exists():
    print("Not run: set depth_episodes=10 (seven evaluations of ten episodes per task, about eight "
          "minutes per task on two CPU cores).")
for path in run.glob("depth.json"):
    card = json.loads(path.read_text())
    if marked := stale(run, card):
        print(marked)
    display(pd.DataFrame(depth_rows(card)), plot_depth_card(card))

# %% [markdown]
# ## Robustness
#
# Success rates under changes, if `06_eval` ran with `robustness_episodes`. A policy that fails when
# objects have moved has memorised their usual positions.

# %%
if not (run / "robustness.json").exists():
    print("Not run: set robustness_episodes=10 in 06_eval (about ten minutes per task on two "
          "CPU cores), then run this notebook again.")
for path in run.glob("robustness.json"):
    card = json.loads(path.read_text())
    if marked := stale(run, card):
        print(marked)
    display(plot_card(card))

# %% [markdown]
# ## Recursions used per sample
#
# With `halting="fixed"` every sample uses all recursions. With `"learned"` and `"convergence"` each
# sample stops on its own and is computed no further. `"remainder"` and `"adaptive"` return a
# weighted sum over all steps; the figure shows when a sample's remaining weight falls below the
# threshold. A batch continues until its last sample has stopped.

# %%
profile = explain.halting_profile(policy, data, num_samples)
fig = explain.plot_halting(profile)
plots.save_figure(fig, run / "figures" / "07_halting.png")
display(fig)
print(f"With halting={profile['halting']!r}, a sample uses {profile['mean']:.2f} of at most "
      f"{profile['limit']} recursions.")

# %% [markdown]
# ## Which pixels matter?
#
# Integrated gradients (arXiv 1703.01365) attribute the arm's first predicted action to pixels, by
# gradients averaged along the path from a black image to this one, shown over the grey image.
# Bright pixels contribute most to the action; expect them on the gripper, the object and the
# target, not on the wall. Black pixels equal the black image and get nothing, whatever they show.
# All cameras share one scale, so a camera with hardly any colour has little effect at this moment.
# Near the object, often only the wrist camera has an effect. A map describes one network: in two
# trainings of `demo`, the agent view's share was 5 and 39 %. The convolutions do not reach the
# outermost 4 of 64 pixels at two sides, where the maps are grey.

# %%
maps = explain.saliency(policy, observations)
images = {camera: observations[camera][0, 0].numpy() for camera in config.model.cameras}
fig = explain.plot_saliency(images, {camera: maps[camera][0] for camera in images})
plots.save_figure(fig, run / "figures" / "07_saliency.png")
display(fig)
print(explain.saliency_sentence({camera: maps[camera][0] for camera in images}))

# %% [markdown]
# ## What each figure can and cannot say
#
# - **Predictions** show which numbers are wrong on demonstrated states, and whether they shrink to
#   the mean, but not whether the robot succeeds: small errors add up over an episode.
# - **The recursion, step by step** shows how one action forms, but not that others form in the same
#   way, nor that the last recursion gives the best action.
# - **The state during recursion** shows whether the state settles, but not whether it settles on
#   the right answer.
# - **The error by depth** shows what each recursion contributes on demonstrated states, but not
#   what depth is worth in episodes; `depth_episodes` measures that.
# - **The recursions used** show on which samples a halting rule spends recursions, but not that
#   those samples are harder.
# - **Saliency** shows to which pixels the difference between this image's action and a black
#   image's is attributed, but not why, nor what happens if an object is moved; the robustness card
#   of `06_eval` measures that.

# %% [markdown]
# ## Report
#
# `report.html` in the run folder is a page to send to a colleague: one file with films, every
# episode, the recursion step by step, and the commands that reproduce the run. `report.md` has the
# same numbers as text. `python -m trm_helpers report RUN` also writes both.

# %%
sentences = [
    recursion["sentence"],
    f"Mean squared error of the first action over {report['count']} samples: {report['mse']:.4f}.",
    f"Gripper command correct in {100 * report['gripper_accuracy']:.1f} % of them.",
]
write_json(run / "explain.json", {"weights": weights, "sha256": policy.sha256,
                                  "sentences": sentences, "predictions": report,
                                  "recursion": recursion, "moments": moments})
page = write_report(run)
print("open in a browser:", page)
text = page.with_suffix(".md").read_text().split("## Films")[0].split("## Figures")[0]
display(Markdown(text))

# %% [markdown]
# ## Exercises
#
# **1.** Why is the paired difference at the training depth exactly zero, and its interval without
# width, although the error itself varies from sample to sample?
#
# <details><summary>Answer</summary>
#
# Each sample is compared with itself, so its difficulty cancels out; at the training depth the two
# predictions are the same. The interval of the error itself is wide because samples differ in
# difficulty. That does not matter for the question whether one depth is better than another.
#
# ```python
# place = curve["depths"].index(curve["trained_depth"])
# low, high = curve["arm_interval"][place]
# print(f"error {low:.4f} to {high:.4f}, but difference {curve['arm_gap_interval'][place]}")
# assert curve["arm_gap_interval"][place] == [0, 0] and low < high
# ```
#
# </details>
#
# **2.** The norm of the state hardly changes after the first step. Does that mean that the state no
# longer changes?
#
# <details><summary>Answer</summary>
#
# No: a vector can turn without changing its length, and layer normalisation keeps the length of the
# state nearly constant whatever it holds. The norm of the change is what converges. It is always at
# least as large as the change of the norm (triangle inequality).
#
# ```python
# norms, changes = recursion["norms"], recursion["changes"]
# for step, change in enumerate(changes, 1):
#     print(f"step {step}: norm {norms[step] - norms[step - 1]:+.3f}, state {change:.3f}")
#     assert abs(norms[step] - norms[step - 1]) <= change * 1.001 + 1e-4
# ```
#
# </details>

# %% [markdown]
# This completes the series, from demonstrations to a trained, evaluated and explained policy. To
# continue, try another task (`task_ids`), more recursions, human demonstrations, or your own
# policy, which needs only the methods `reset()` and `act(observation)`.
