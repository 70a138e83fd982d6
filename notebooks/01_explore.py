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
# # 01 Explore the demonstrations
#
# Inspect the data before you train on it. Many failures of robot policies are faults of the data:
# images upside down, actions paired with the wrong image, a gripper command lost to normalisation.
#
# **What you will learn**
# - what a demonstration file holds, and what a policy may use of it;
# - how the seven numbers of an action change while the robot reaches, grasps, carries and places;
# - how to measure which image belongs to which action;
# - which faults spoil training, and how to look for each of them.
#
# **Time**: 8 minutes to read; less than one to run (preset `demo`, two CPU cores).
#
# **Needs** the demonstrations of `00_setup`, or collects them. **Writes** `quality.json`, five
# figures and a film to the run folder.

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty takes the preset's name
suite = None  # type: str; LIBERO suite; None keeps the preset's
task_ids = None  # type: list; task indices in the suite; None keeps the preset's
num_demos = None  # type: int; demonstrations to collect per task; None keeps the preset's
# the others
demos = None  # type: str; auto, human or scripted; None keeps the preset's
demo_dir = None  # type: str; folder of *_demo.hdf5 files; None searches data/ and Kaggle's input
placement = None  # type: str; object layouts, benchmark or wide (randomised); None: the preset's
frame_stride = None  # type: int; steps per rendered frame: 1 renders all; None: the preset's
replays = 2  # type: int; demonstrations replayed in the simulator for the quality card

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
import numpy as np
import pandas as pd
from IPython.display import Video, display

from trm_helpers import explore_libero_dataset, paths, schema
from trm_helpers.config import check_parameters, from_flat
from trm_helpers.demos.demo_files import demo_names, open_demo_file
from trm_helpers.demos.quality import quality_card
from trm_helpers.evaluation.rollout import phases
from trm_helpers.files import write_json
from trm_helpers.sim.env import LiberoEnv
from trm_helpers.visuals import action_plots, films, plots

# %%
check_parameters(replays=replays)
folder = paths.run_dir(run_name or preset)
config = from_flat(preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
                   num_demos=num_demos, placement=placement, frame_stride=frame_stride)
files = session.demonstrations(config)
file = next(iter(files.values()))
found = explore_libero_dataset(file)

# %% [markdown]
# ## Contents of a file
#
# One HDF5 file holds all demonstrations of one task; this is the file of the first task. The table
# lists the arrays of its first demonstration. The first dimension of each shape is the number of
# control steps, 20 per second. `obs` holds the robot's observations. `states` holds the complete
# state of the simulator, from which a demonstration can be replayed. A policy must not use
# `states`, because a real robot has no access to it.

# %%
print(f"{found['language_instruction']}: {found['num_demos']} demonstrations, {found['source']}")
display(pd.DataFrame(found["structure"]).T)

# %% [markdown]
# ## Four moments
#
# Frames of the first demonstration at equal intervals, from both cameras. They are stored upside
# down, because OpenGL counts rows from the bottom, and are flipped only for display. With
# `frame_stride=4` a frame is rendered in every fourth step and repeated in the file until the next
# one, so that the film below moves in jumps; all other arrays have a new row in every step.

# %%
fig = plots.plot_frames(found["frames"], found["language_instruction"])
plots.save_figure(fig, folder / "figures" / "01_frames.png")
display(fig)

# %% [markdown]
# ## The seven numbers of an action
#
# An action is relative: it commands a displacement from the current pose of the gripper. The first
# three numbers translate it, the next three rotate it, and the last opens (-1) or closes (+1) it.
# The arm is slower than its commands: a command of 1 requests 5 cm, and the arm covers about a
# quarter of that before the next command, 0.05 s later.

# %%
pd.set_option("display.max_colwidth", None)
display(pd.DataFrame(found["actions"]).round(3))

# %%
with open_demo_file(file) as data:
    demonstrations = [data["data"][name] for name in demo_names(data)]
    actions = [demonstration["actions"][:] for demonstration in demonstrations]
    executed = [demonstration.get(schema.EXECUTED_ACTIONS, demonstration["actions"])[:]
                for demonstration in demonstrations]
    cameras = [demonstrations[0]["obs"][camera][:] for camera in schema.CAMERAS]

# %% [markdown]
# Which range does each number use? The gripper command should be -1 or +1 only: its sign decides,
# so +0.1 closes the gripper just as +1 does. The gripper is therefore excluded from normalisation,
# which would move the zero between open and closed.

# %%
every = np.concatenate(actions)  # (N, 7)
fig = action_plots.plot_action_statistics(every)
plots.save_figure(fig, folder / "figures" / "01_action_statistics.png")
display(fig)
spread, grip = every.std(axis=0), every[:, schema.GRIPPER_INDEX]
print(f"Standard deviations: {spread[:3].min():.2f} to {spread[:3].max():.2f} of the translations, "
      f"{spread[3:6].min():.2f} to {spread[3:6].max():.2f} of the rotations. The gripper command "
      f"takes the values {', '.join(f'{value:+g}' for value in np.unique(grip))} and is closed in "
      f"{100 * np.mean(grip > 0):.0f} % of the steps.")

# %% [markdown]
# What does the robot do at each moment? The figure shows the actions of the first demonstration
# over time. Its phases follow from the gripper command: `reach` while the gripper is open, `grasp`
# while it closes (8 steps), `carry` while it stays closed, `place` for 12 steps after it opens
# again. A gripper that opens after fewer than 24 steps had no hold, and the arm reaches again. The
# task counts as solved as soon as the object is where it belongs, so a demonstration may end before
# the gripper opens.
#
# Grey marks steps in which the arm was pushed: a random command was executed in place of the
# expert's. The figure shows the expert's commands, which respond to the push from wherever it has
# moved the arm. These responses are the training targets: the policy learns to correct a deviation,
# never to make one. Human demonstrations have no pushes.

# %%
closed = [values[:, schema.GRIPPER_INDEX] > 0 for values in actions]
pushed = [(done != asked).any(axis=1) for done, asked in zip(executed, actions, strict=True)]
fig = action_plots.plot_action_phases(actions[0], phases(closed[0]), pushed[0])
plots.save_figure(fig, folder / "figures" / "01_action_trace.png")
display(fig)

# %%
durations = pd.Series(phases(closed[0])).value_counts(sort=False) / schema.CONTROL_HZ
pushes = [int((np.diff(values, prepend=False) & values).sum()) for values in pushed]
print("The first demonstration: " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds
                                              in durations.items())
      + f"; pushed {pushes[0]} times, in {100 * pushed[0].mean():.0f} % of its steps.")
attempts = [int((np.diff(values, prepend=False) & values).sum()) for values in closed]
print(f"Of {len(actions)} demonstrations {np.count_nonzero(pushes)} were pushed, "
      f"{sum(values[-1] for values in closed)} end with the gripper closed, and "
      f"{sum(count > 1 for count in attempts)} close it more than once: a second attempt at the "
      "grasp.")

# %% [markdown]
# ## Length of the demonstrations
#
# The dotted line is the horizon: the number of steps that the benchmark allows a policy. Do the
# demonstrations end well before it? They should, because a policy also needs time to correct its
# errors.

# %%
suite, _ = schema.own_suite(config.data.suite, next(iter(files)))
lengths, horizon = [len(values) for values in actions], schema.HORIZONS[suite]
fig = plots.plot_demo_lengths(lengths, horizon)
plots.save_figure(fig, folder / "figures" / "01_lengths.png")
display(fig)
print(f"The median demonstration has {np.median(lengths):.0f} steps, "
      f"{100 * np.median(lengths) / horizon:.0f} % of the horizon of {horizon}; the longest has "
      f"{max(lengths)}.")

# %% [markdown]
# ## Which image belongs to which action?
#
# In files of the scripted expert, image `t` was taken *before* action `t` ("raw"); in LIBERO's own
# files it was taken *after* action `t` ("shift"). With the wrong pairing the policy learns to
# repeat its last action, so the alignment is measured rather than assumed. The upper panel shows
# when the joint angles were stored, in control steps from the decision (negative: before it). The
# lower panel shows the delay between an action and the arm's motion. Both black lines should lie in
# areas of the same name, raw or shift.

# %%
fig = plots.plot_alignment(**found["alignment"])
plots.save_figure(fig, folder / "figures" / "01_alignment.png")
display(fig)
name, evidence = found["alignment"]["name"], found["alignment"]["evidence"]
print(f"This file is {name!r}: judged by the {evidence['method']}, image t belongs to action "
      f"{'t + 1' if name == 'shift' else 't'}.")

# %% [markdown]
# ## The quality card
#
# The table summarises the checks above and adds two that need the simulator. Orientation: a frame
# of each camera is rendered again from its stored state and compared with the stored frame in all
# eight flips and rotations; the closest match must be LIBERO's orientation. Replay: the actions of
# some demonstrations, executed from their first state, must succeed again. If they do not, a policy
# that imitates them cannot be expected to succeed. `bad` marks a fault that spoils training; `look`
# marks a value to check, which may be harmless. In row `alignment`, `residual` is the share of the
# motion that the measured pairing leaves unexplained.

# %%
size = found["image_shapes"]["agentview_rgb"][1]  # of (steps, height, width, channels)
with LiberoEnv(config.data.suite, next(iter(files)), image_size=size) as env:
    card = quality_card(file, env, replays, env.horizon)
write_json(folder / "quality.json", card)
display(pd.DataFrame(card))
doubts = [row["check"] for row in card if row["verdict"] != "good"]
print(f"{len(card) - len(doubts)} of {len(card)} checks are good"
      + (f"; look at: {', '.join(doubts)}." if doubts else "."))

# %% [markdown]
# ## Watch a demonstration
#
# The first demonstration in real time, with the agent view on the left and the wrist camera on the
# right.

# %%
film = plots.upright(np.concatenate(cameras, axis=2))
video = films.write_video(folder / "videos" / "01_demonstration.mp4", film, schema.CONTROL_HZ)
display(Video(video, embed=True, width=640))

# %% [markdown]
# ## Exercises
#
# **1.** The arrays `actions` (the expert's commands) and `executed` (what the arm received) differ
# where the arm was pushed. Which of the seven numbers does a push never change?
#
# <details><summary>Answer</summary>
#
# The gripper command. A push moves and turns the arm, but a hand that is forced open would drop the
# object, and the demonstration would show a new grasp instead of a correction.
#
# ```python
# difference = np.abs(np.concatenate(executed) - every)  # (N, 7)
# print("per cent of the steps in which each of the seven numbers differs:",
#       (100 * (difference > 0).mean(axis=0)).round())
# assert (difference[:, schema.GRIPPER_INDEX] == 0).all()
# assert ((difference[:, :3] > 0).any(axis=1) == np.concatenate(pushed)).all()
# ```
#
# </details>
#
# **2.** Suppose every image was paired with the action before it. Why would a policy trained on
# these pairs have a small loss, and repeat its last action in an episode?
#
# <details><summary>Answer</summary>
#
# The image after an action shows its effect, so the policy can read off the action that was just
# executed instead of deciding on the next one. The loss is small because consecutive actions are
# almost equal.
#
# ```python
# arm = actions[0][:, :schema.ARM_DIM]
# neighbours = np.abs(np.diff(arm, axis=0)).mean()
# others = np.abs(arm - np.random.default_rng(0).permutation(arm)).mean()
# print(f"mean difference of consecutive actions {neighbours:.3f}, of random pairs {others:.3f}")
# assert neighbours < others / 2
# ```
#
# </details>

# %% [markdown]
# Next: `02_dataset` turns these files into training samples.
