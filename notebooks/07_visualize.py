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

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny; only its machine settings apply
run_name = ""  # type: str; a trained run's folder under artifacts/; empty takes the newest
task_ids = None  # type: list; demonstrations of these tasks only; None: all that it was trained on
num_demos = None  # type: int; of each task, to look at; None: as many as it was trained with
# the others
weights = "best"  # type: str; best or last (see 04_train)
num_samples = 256  # type: int; samples that the averages are taken over
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
    wheels = [*Path("/kaggle/input").rglob(f"trm_helpers-{version}-*.whl")]
    checkout = [folder for folder in Path.cwd().parents if (folder / "trm_helpers").is_dir()]
    source = (["--no-index", "--find-links", wheels[0].parent, f"trm-helpers=={version}"] if wheels
              else ["--editable", checkout[0]] if checkout else [os.environ.get("TRM_SOURCE", "")])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *map(str, source)]
    assert source != [""] and subprocess.run(pip).returncode == 0, (
        f"trm_helpers {version} was not installed for Python {sys.version.split()[0]}: attach the "
        "data set of `make kaggle`, or set the variable TRM_SOURCE to what pip should install")
    sys.path[:0] = map(str, checkout[:1])
    importlib.invalidate_caches()
from trm_helpers import session

session.begin(version)

# %%
import dataclasses
import json

import imageio.v3 as imageio
import pandas as pd
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
from trm_helpers.visuals import explain, plots

# %%
check_parameters(weights=weights, num_samples=num_samples, depth_episodes=depth_episodes)
run = find_run(run_name, to_write=True)
config = load_config(run, preset)
policy = load_policy(run, weights)
looked_at = dict(task_ids=task_ids, num_demos=num_demos, demo_dir=demo_dir)
seen = config.replace(**{name: value for name, value in looked_at.items() if value is not None})
data = held_out(run, demonstrations_of(run, seen), seen, policy)
observations = data.batch([len(data) // 3])["observations"]

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
fig

# %% [markdown]
# ## Keypoints
#
# Keypoints are the positions of the goal's objects in the agent view, predicted by a small network,
# the localizer. A policy trained with `scenes` above 0 receives only keypoints from the agent view.
# A mark far from its object means that the localizer did not find it, often because the arm hides
# it.

# %%
if policy.config.keypoints:
    looked = data.batch([len(data) * share // 8 for share in (1, 3, 5, 7)])["observations"]
    fig = plots.plot_places(looked["agentview_rgb"][:, 0],
                            keypoints.predicted_keypoints(policy, looked), policy.config.keypoints)
    plots.save_figure(fig, run / "figures" / "07_places.png")
    display(fig)

# %% [markdown]
# ## The state during recursion
#
# Left: each row is one number of the hidden state, each column one step. Step 0 is the initial
# state: the encoded observation with `variant="block"`, constant with `"trm"`. Middle: the norm of
# the state. Right: the norm of its change in each step. A recursion that has converged stops
# changing its state: the red curve falls below the dotted line, and the last columns on the left
# look alike.

# %%
recursion, fig = visualize_recursive_states(policy, observations)
plots.save_figure(fig, run / "figures" / "07_recursion.png")
print(recursion["sentence"])
fig

# %% [markdown]
# Four moments of a held-out demonstration: how the action forms over the recursions. `report.html`
# shows them with a slider.

# %%
first = data.demos[0]
samples = first.end - first.first - data.sequence_length + 1
closed = data.batch(range(samples))["actions"].reshape(samples, -1, schema.ACTION_DIM)[:, 0, -1] > 0
phase = phases(closed.tolist())
moments, images = explain.recursion_moments(policy, data, {
    step: f"{step / schema.CONTROL_HZ:.1f} s, {phase[step]}"
    for step in (samples * share // 8 for share in (1, 3, 5, 7))})
imageio.imwrite(run / "figures" / "07_moments.png", images)
for moment in moments:
    print(f"{moment['title']}: {moment['recursions'][-1]['sentence']}")

# %% [markdown]
# ## How many recursions are needed?
#
# The same weights with fewer and more recursions than in training. If the error falls up to the
# dotted line (training depth), every recursion improves the action. If the curve is flat after it,
# further recursions neither help nor harm. All depths use the same samples, so differences between
# depths can be reliable even where the bands overlap.

# %%
curve = explain.depth_curve(policy, data, num_samples=num_samples)
fig = explain.plot_depth_curve(curve)
plots.save_figure(fig, run / "figures" / "07_depth.png")
fig

# %% [markdown]
# The first action of one sample by depth. The lines should be constant from the training depth
# onwards.

# %%
depths = list(range(1, 2 * config.model.num_recursions + 1))
fig = explain.plot_prediction_by_depth(
    depths, explain.prediction_by_depth(policy, observations, depths))
plots.save_figure(fig, run / "figures" / "07_prediction_by_depth.png")
fig

# %% [markdown]
# A lower error on demonstrated states does not imply a higher success rate. With `depth_episodes`
# above 0, the same weights are evaluated in the simulator from the same init states: as trained,
# with fewer and more recursions, with a rule that stops when the action no longer changes, and with
# the state carried over between decisions. Each row of the table costs one evaluation.
# `python -m trm_helpers depth RUN` does the same.

# %%
if depth_episodes:
    depth_card(run, config=dataclasses.replace(config.eval, num_episodes=depth_episodes),
               weights=weights, task_ids=task_ids or ())
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
fig = explain.plot_halting(explain.halting_profile(policy, data, num_samples))
plots.save_figure(fig, run / "figures" / "07_halting.png")
fig

# %% [markdown]
# ## Which pixels matter?
#
# Integrated gradients of the arm's first predicted action. Bright pixels affect it most; they
# should lie on the gripper, the object and the target, not on the wall. All cameras share one
# scale, so a dark camera has little effect at this moment. Near the object, often only the wrist
# camera has an effect.

# %%
maps = explain.saliency(policy, observations)
images = {camera: observations[camera][0, 0].numpy() for camera in config.model.cameras}
fig = explain.plot_saliency(images, {camera: maps[camera][0] for camera in images})
plots.save_figure(fig, run / "figures" / "07_saliency.png")
fig

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
Markdown(page.with_suffix(".md").read_text().split("## Films")[0].split("## Figures")[0])

# %% [markdown]
# This completes the series, from demonstrations to a trained, evaluated and explained policy. To
# continue, try another task (`task_ids`), more recursions, human demonstrations, or your own
# policy, which needs only the methods `reset()` and `act(observation)`.
