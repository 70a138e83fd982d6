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
# # 07 Look inside
#
# What does the policy get wrong, what does the recursion do with its state, how deep does it need
# to think, and which pixels does it look at? The last cell writes a report of the whole run.

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny: settings of this machine, not the run's
run_name = ""  # type: str; a trained run's folder under artifacts/; empty takes the newest
task_ids = None  # type: list; demonstrations of these tasks only; None: all that it was trained on
num_demos = None  # type: int; of each task, to look at; None: as many as it was trained with
# the others
weights = "best"  # type: str; best or last (see 04_train)
num_samples = 256  # type: int; samples behind the averages
depth_episodes = 0  # type: int; per task and depth in the simulator; 0 shows what is there
demo_dir = None  # type: str; folder with the run's demonstrations, where it was given one

# %%
import dataclasses
import json

import pandas as pd
from IPython.display import Markdown, display

from trm_helpers import analyze_model_predictions, load_policy, visualize_recursive_states
from trm_helpers.config import check_parameters
from trm_helpers.demos.collect import demonstrations_of
from trm_helpers.evaluation.compare import stale
from trm_helpers.evaluation.depth import depth_card, depth_rows, plot_depth_card
from trm_helpers.evaluation.robustness import plot_card
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
# ## Prediction against target
#
# Four samples of demonstrations that it was not trained on: what the policy saw, what the
# demonstrator did (blue) and what the policy would do (orange), in the environment's units. A
# large error on one sample need not be a mistake: where the demonstrator goes on to the next phase
# at once, the policy may be a step late. Below, over many samples: is one dimension worse than the
# others, and are predictions shrunk towards the mean (ratio well below 1)?

# %%
report, fig = analyze_model_predictions(policy, data, num_errors=num_samples)
plots.save_figure(fig, run / "figures" / "07_predictions.png")
fig

# %% [markdown]
# ## Where it sees things
#
# Of a policy that first learned where things are (`scenes`): all that it gets from the agent view
# is where these marks are. One far from its thing is a thing that it does not see, often because
# the arm hides it.

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
# Left: each row is one number of the hidden state, from where it starts (of the `block` the
# encoded picture, of the `trm` the same numbers whatever it sees) to the last step. Middle: how
# large the state is. Right: how much it still moves. A loop that has found its answer stops
# moving: the red curve falls below the dotted line, and the columns on the left look alike.

# %%
recursion, fig = visualize_recursive_states(policy, observations)
plots.save_figure(fig, run / "figures" / "07_recursion.png")
print(recursion["sentence"])
fig

# %% [markdown]
# ## How deep does it have to think?
#
# The same weights, stopped earlier or left running longer than in training. An error that falls
# up to the dotted line says that every step is used; a flat curve after it, that further thought
# buys nothing but does no harm either.

# %%
curve = explain.depth_curve(policy, data, num_samples=num_samples)
fig = explain.plot_depth_curve(curve)
plots.save_figure(fig, run / "figures" / "07_depth.png")
fig

# %% [markdown]
# The same for one sample: how its first action forms. The lines should settle by the depth that
# the policy was trained with.

# %%
depths = list(range(1, 2 * config.model.num_recursions + 1))
fig = explain.plot_prediction_by_depth(
    depths, explain.prediction_by_depth(policy, observations, depths))
plots.save_figure(fig, run / "figures" / "07_prediction_by_depth.png")
fig

# %% [markdown]
# A smaller error on demonstrated states need not mean more success. So the same weights act in the
# simulator: as trained, with fewer and more steps, with a rule that stops when the answer no longer
# changes, and with the state carried over from one decision to the next, all from the same init
# states. `depth_episodes` runs that (as many evaluations as there are lines), as does
# `python -m trm_helpers depth RUN`.

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
# ## What is left when something changes?
#
# The card that 06_eval makes with `robustness_episodes`, if it was made: does the policy look, or
# does it remember where things usually are?

# %%
for path in run.glob("robustness.json"):
    card = json.loads(path.read_text())
    if marked := stale(run, card):
        print(marked)
    display(plot_card(card))

# %% [markdown]
# ## Where does it stop?
#
# With `halting="fixed"` every sample uses all steps. With `learned` and `convergence` each stops
# for itself, and is computed no further. `remainder` and `adaptive` weight the answers of all
# steps: shown is when a sample has spent its weight, and a batch goes on until the last has.

# %%
fig = explain.plot_halting(explain.halting_profile(policy, data, num_samples))
plots.save_figure(fig, run / "figures" / "07_halting.png")
fig

# %% [markdown]
# ## Which pixels matter?
#
# Integrated gradients of the arm's command. Bright pixels move the answer most. They should lie
# on the hand, the object and the target, not on the wall. Both cameras share one scale: a camera
# that stays dark hardly matters at this moment. Near the object it is often the wrist camera alone
# that is looked at.

# %%
maps = explain.saliency(policy, observations)
images = {camera: observations[camera][0, 0].numpy() for camera in config.model.cameras}
fig = explain.plot_saliency(images, {camera: maps[camera][0] for camera in images})
plots.save_figure(fig, run / "figures" / "07_saliency.png")
fig

# %% [markdown]
# ## Report
#
# One page with the run's settings, numbers, figures and films: `report.md` in the run folder. Also
# `python -m trm_helpers report RUN`.

# %%
sentences = [
    recursion["sentence"],
    f"Mean squared error of the first action over {report['count']} samples: {report['mse']:.4f}.",
    f"Gripper right in {100 * report['gripper_accuracy']:.1f} % of them.",
]
write_json(run / "explain.json", {"weights": weights, "sha256": policy.sha256,
                                  "sentences": sentences, "predictions": report,
                                  "recursion": recursion})
page = write_report(run)
Markdown(page.read_text().split("## Films")[0].split("## Figures")[0])

# %% [markdown]
# That is the whole way, from a file of demonstrations to a policy and its explanation. From here:
# another task (`task_ids`), more recursions, the human demonstrations, or a policy of your own,
# which needs no more than `reset()` and `act(observation)` to be evaluated.
