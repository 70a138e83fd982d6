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
# This notebook shows the contents of a file, the camera images, the seven numbers of an action, and
# a measurement of which image belongs to which action. Every figure is also saved to `figures/` in
# the run folder.

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
import numpy as np
import pandas as pd
from IPython.display import Video

from trm_helpers import explore_libero_dataset, paths, schema
from trm_helpers.config import check_parameters, from_flat
from trm_helpers.demos.collect import ensure_demonstrations
from trm_helpers.demos.demo_files import demo_names, open_demo_file
from trm_helpers.demos.quality import quality_card
from trm_helpers.files import write_json
from trm_helpers.sim.env import LiberoEnv
from trm_helpers.visuals import films, plots

# %%
check_parameters(replays=replays)
folder = paths.run_dir(run_name or preset)
config = from_flat(preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
                   num_demos=num_demos, placement=placement)
files = ensure_demonstrations(config)
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
pd.DataFrame(found["structure"]).T

# %% [markdown]
# ## Four moments
#
# Frames of the first demonstration at equal intervals, from both cameras. They are stored upside
# down, because OpenGL counts rows from the bottom, and are flipped only for display.

# %%
fig = plots.plot_frames(found["frames"], found["language_instruction"])
plots.save_figure(fig, folder / "figures" / "01_frames.png")
fig

# %% [markdown]
# ## The seven numbers of an action
#
# An action is relative: it commands a displacement from the current pose of the gripper. The first
# three numbers translate it, the next three rotate it, and the last opens (-1) or closes (+1) it.
# The arm is slower than its commands: a command of 1 requests 5 cm, and the arm covers about a
# quarter of that before the next command, 0.05 s later.

# %%
pd.set_option("display.max_colwidth", None)
pd.DataFrame(found["actions"]).round(3)

# %%
with open_demo_file(file) as data:
    demonstrations = [data["data"][name] for name in demo_names(data)]
    actions = [demonstration["actions"][:] for demonstration in demonstrations]
    cameras = [demonstrations[0]["obs"][camera][:] for camera in schema.CAMERAS]

# %% [markdown]
# Compare the ranges. Translations use most of [-1, 1] and rotations much less. The gripper command
# should be -1 or +1 only: its sign decides, so +0.1 closes the gripper just as +1 does. The gripper
# is therefore excluded from normalisation, which would move the zero between open and closed.

# %%
fig = plots.plot_action_statistics(np.concatenate(actions))
plots.save_figure(fig, folder / "figures" / "01_action_statistics.png")
fig

# %% [markdown]
# The actions of the first demonstration over time. In a pick-and-place task, identify the reach,
# the grasp (the gripper closes), the lift (`dz` above 0) and the transport to the target. The
# demonstration ends at success, possibly before the gripper opens. A gripper that opens early and
# closes again indicates a second attempt at the grasp. Sudden large corrections by the scripted
# expert are responses to pushes.

# %%
fig = plots.plot_action_trace(actions[0])
plots.save_figure(fig, folder / "figures" / "01_action_trace.png")
fig

# %% [markdown]
# ## Length of the demonstrations
#
# The dotted line is the horizon: the number of steps that the benchmark allows a policy.
# Demonstrations should end well before it, because a policy also needs time to correct its errors.

# %%
lengths = [len(values) for values in actions]
fig = plots.plot_demo_lengths(lengths, schema.HORIZONS[config.data.suite])
plots.save_figure(fig, folder / "figures" / "01_lengths.png")
fig

# %% [markdown]
# ## Which image belongs to which action?
#
# In some files image `t` was taken *before* action `t` ("raw"); in LIBERO's own files it was taken
# *after* it ("shift"). With the wrong pairing the policy learns to repeat its last action, so the
# alignment is measured rather than assumed. Top: the time of the stored joint angles relative to
# the simulator states. Bottom: the delay between an action and the arm's motion. Both black lines
# should lie in zones of the same name.

# %%
fig = plots.plot_alignment(**found["alignment"])
plots.save_figure(fig, folder / "figures" / "01_alignment.png")
fig

# %% [markdown]
# ## The quality card
#
# The table summarises the checks above and adds two that need the simulator. Orientation: a frame
# of each camera is rendered again from its stored state and compared with the stored frame in all
# eight flips and rotations; the closest match must be LIBERO's orientation. Replay: the actions of
# some demonstrations, executed from their first state, must succeed again. If they do not, a policy
# that imitates them cannot be expected to succeed. `bad` marks a fault that spoils training; `look`
# marks a value to check, which may be harmless.

# %%
size = found["image_shapes"]["agentview_rgb"][1]  # of (steps, height, width, channels)
with LiberoEnv(config.data.suite, next(iter(files)), image_size=size) as env:
    card = quality_card(file, env, replays, env.horizon)
write_json(folder / "quality.json", card)
pd.DataFrame(card)

# %% [markdown]
# ## Watch a demonstration
#
# The first demonstration in real time, with the agent view on the left and the wrist camera on the
# right.

# %%
film = plots.upright(np.concatenate(cameras, axis=2))
video = films.write_video(folder / "videos" / "01_demonstration.mp4", film, schema.CONTROL_HZ)
Video(video, embed=True, width=640)

# %% [markdown]
# Next: `02_dataset` turns these files into training samples.
