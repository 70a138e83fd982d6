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
#
# You will see what is in a file, what the cameras saw, what the seven numbers of an action do, and
# a check of which picture belongs to which action. Every figure is also written to the run's
# folder, under `figures/`.

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty takes the preset's name
suite = None  # type: str; LIBERO suite; None keeps the preset's
task_ids = None  # type: list; task indices in the suite; None keeps the preset's
num_demos = None  # type: int; demonstrations to collect per task; None keeps the preset's
# the others
demos = None  # type: str; auto, human or scripted; None keeps the preset's
demo_dir = None  # type: str; folder with *_demo.hdf5 to use; None searches data/ and Kaggle's input
placement = None  # type: str; of objects, benchmark or wide (anywhere); None: the preset's
replays = 2  # type: int; demonstrations that the quality card replays in the simulator

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
# ## What is in a file
#
# One HDF5 file holds all demonstrations of one task; this is the first task's. The table is of its
# first demonstration: the first number of each shape counts its steps, twenty of which are one
# second. `obs` is what the robot could perceive; `states` is the simulator's complete state, from
# which every step can be replayed. A policy must never see `states`: no robot has it.

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
# An action does not say where the hand shall be but how far from here it shall go; twenty times a
# second there is a new one. The first three numbers move the hand, the next three turn it, the last
# opens (-1) or closes (+1) the gripper. The arm is slower than its commands: of the 5 cm that a 1
# asks for it makes a quarter before the next command comes.

# %%
pd.set_option("display.max_colwidth", None)
pd.DataFrame(found["actions"]).round(3)

# %%
with open_demo_file(file) as data:
    demonstrations = [data["data"][name] for name in demo_names(data)]
    actions = [demonstration["actions"][:] for demonstration in demonstrations]
    cameras = [demonstrations[0]["obs"][camera][:] for camera in schema.CAMERAS]

# %% [markdown]
# Look at the ranges: positions use all of theirs, rotations hardly any, and the gripper is never
# in between. Only the sign of its command counts: +0.1 closes it as +1 does. That is why it is not
# normalised with the rest: shifted and scaled, its zero would no longer lie between open and
# closed.

# %%
fig = plots.plot_action_statistics(np.concatenate(actions))
plots.save_figure(fig, folder / "figures" / "01_action_statistics.png")
fig

# %% [markdown]
# One demonstration over time. Find the moments: the way to the object, the gripper closing around
# it, the lift (`dz` above 0), the way to the target, the gripper opening. A gripper that opens
# early and closes again is a second try. With a scripted expert, sudden strong corrections are its
# answers to having been pushed.

# %%
fig = plots.plot_action_trace(actions[0])
plots.save_figure(fig, folder / "figures" / "01_action_trace.png")
fig

# %% [markdown]
# ## How long are they?
#
# The dotted line is the number of steps that the benchmark allows a policy. Demonstrations should
# end well before it: a policy is rarely faster than its teacher, and needs time for its mistakes.

# %%
lengths = [len(values) for values in actions]
fig = plots.plot_demo_lengths(lengths, schema.HORIZONS[config.data.suite])
plots.save_figure(fig, folder / "figures" / "01_lengths.png")
fig

# %% [markdown]
# ## Which picture belongs to which action?
#
# Files differ: in some, picture `t` is what was seen *before* action `t` ("raw"), in LIBERO's own
# it is what followed ("shift"). Off by one, and the policy learns to repeat the past. So the file
# is measured, not trusted. Above: when were the stored joint angles true, compared with the
# simulator's states before and after the action? Below: how many steps after an action does the
# hand move? The black lines should fall into zones of the same name.

# %%
fig = plots.plot_alignment(**found["alignment"])
plots.save_figure(fig, folder / "figures" / "01_alignment.png")
fig

# %% [markdown]
# ## The quality card
#
# Everything above in one table, and two things more that only the simulator can tell. Stored
# frames are compared with a render of their own state, turned and flipped in all eight ways: the
# nearest must be the one that LIBERO stores. And some demonstrations are replayed: their actions,
# sent again from their first state, must solve the task again. No clone of these actions can be
# expected to do better than they do themselves. `bad` spoils learning; `look` may be as it should.

# %%
size = found["image_shapes"]["agentview_rgb"][1]  # steps, height, width, colours
with LiberoEnv(config.data.suite, next(iter(files)), image_size=size) as env:
    card = quality_card(file, env, replays, env.horizon)
write_json(folder / "quality.json", card)
pd.DataFrame(card)

# %% [markdown]
# ## Watch one
#
# The first demonstration at its true speed, agent view on the left, wrist camera on the right.

# %%
film = plots.upright(np.concatenate(cameras, axis=2))
video = films.write_video(folder / "videos" / "01_demonstration.mp4", film, schema.CONTROL_HZ)
Video(video, embed=True, width=640)

# %% [markdown]
# Next: `02_dataset` turns these files into samples.
