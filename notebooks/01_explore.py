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
# Before you train on data, look at it. Most failures of robot policies are failures to look:
# pictures upside down, actions paired with the wrong picture, a gripper that was averaged away.

# %% tags=["parameters"]
preset = "demo"  # type: str; demo, tiny or reference (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty takes the preset's name
suite = None  # type: str; LIBERO suite; None keeps the preset's
task_ids = None  # type: list; task indices in the suite; None keeps the preset's
demos = None  # type: str; auto, human or scripted; None keeps the preset's
demo_dir = None  # type: str; folder with *_demo.hdf5 to use; None searches data/ and Kaggle's input
num_demos = None  # type: int; demonstrations to collect per task; None keeps the preset's

# %%
import h5py
import pandas as pd
from IPython.display import Video

from trm_helpers import explore_libero_dataset, paths, plots, schema
from trm_helpers.collect import ensure_demonstrations
from trm_helpers.config import from_flat

# %%
folder = paths.artifacts_dir() / (run_name or preset)
config = from_flat(preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
                   num_demos=num_demos)
files = ensure_demonstrations(config)
file = next(iter(files.values()))
found = explore_libero_dataset(file)

# %% [markdown]
# ## What is in a file
#
# One HDF5 file holds all demonstrations of one task. `T` differs from demonstration to
# demonstration; `states` is the simulator's complete state, from which every step can be
# replayed.

# %%
print(f"{found['language_instruction']}: {found['num_demos']} demonstrations, {found['source']}")
pd.DataFrame(found["structure"]).T

# %% [markdown]
# ## Four moments
#
# Equidistant frames of the first demonstration, from both cameras. They are stored upside down
# (OpenGL counts rows from below) and turned here only because a person looks.

# %%
fig = plots.plot_frames(found["frames"], found["language_instruction"])
plots.save_figure(fig, folder / "figures" / "01_frames.png")
fig

# %% [markdown]
# ## The seven numbers of an action
#
# The first three move the hand, the next three turn it, the last opens (-1) or closes (+1) the
# gripper. Look at the ranges: position uses all of it, rotation hardly any, and the gripper is
# never in between. That is why the gripper is not normalised.

# %%
pd.DataFrame(found["actions"]).round(3)

# %%
with h5py.File(file) as data:
    demo = data["data/demo_0"]
    actions, frames = demo["actions"][:], demo["obs/agentview_rgb"][:]
    lengths = [len(d["actions"]) for d in data["data"].values()]

# %%
fig = plots.plot_action_statistics(actions)
plots.save_figure(fig, folder / "figures" / "01_action_statistics.png")
fig

# %% [markdown]
# One demonstration over time: where does the gripper close, where does it open again? With a
# scripted expert the sudden strong corrections are its answers to having been pushed.

# %%
fig = plots.plot_action_trace(actions)
plots.save_figure(fig, folder / "figures" / "01_action_trace.png")
fig

# %% [markdown]
# ## How long are they?
#
# The dotted line is the number of steps that the benchmark allows a policy.

# %%
fig = plots.plot_demo_lengths(lengths, schema.HORIZONS[config.data.suite])
plots.save_figure(fig, folder / "figures" / "01_lengths.png")
fig

# %% [markdown]
# ## Which picture belongs to which action?
#
# Files differ: in some, picture `t` is what was seen *before* action `t` ("raw"), in LIBERO's own
# it is what followed ("shift"). Off by one, and the policy learns to act on the past. The file is
# measured, not trusted: the stored joint angles must lie between the states around them.

# %%
fig = plots.plot_alignment(**found["alignment"])
plots.save_figure(fig, folder / "figures" / "01_alignment.png")
fig

# %% [markdown]
# ## Watch one

# %%
video = plots.write_video(folder / "videos" / "01_demonstration.mp4", plots.upright(frames))
Video(video, embed=True, width=384)

# %% [markdown]
# Next: `02_dataset` turns these files into samples.
