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
# # 00 Set-up
#
# The tasks come from the LIBERO benchmark and run in MuJoCo, a physics simulator. You need to know
# neither. This notebook checks the machine, shows the robot, and finds or collects the
# demonstrations that the other notebooks train on.
#
# **What you will learn**
# - what the simulator needs, and how to see whether this machine has it;
# - what a policy sees: the images of two cameras;
# - what a policy sends: seven numbers, 20 times per simulated second;
# - where demonstrations come from, and why the scripted expert is pushed while it works.
#
# **Time**: 5 minutes to read. With preset `demo` on two CPU cores it runs for 3 to 4 minutes if
# it collects the demonstrations, and for less than one if they exist.
#
# **Needs** no other notebook. **Writes** demonstrations to the data folder and one figure to the
# run folder (`artifacts/<run_name>/`: a run is one trained policy with all its results). The
# [glossary](../docs/glossary.md) explains the terms of these notebooks.

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
from IPython.display import display

from trm_helpers import opengl, paths, preflight, schema
from trm_helpers.config import from_flat
from trm_helpers.demos.demo_files import demo_names, open_demo_file
from trm_helpers.sim.env import LiberoEnv
from trm_helpers.visuals import action_plots, plots

# %%
config = from_flat(preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
                   num_demos=num_demos, placement=placement, frame_stride=frame_stride)
folder = paths.run_dir(run_name or preset)

# %% [markdown]
# ## Renderer
#
# OpenGL renders the camera images without a screen. The name printed below identifies the device
# that renders: `llvmpipe` is the CPU, which needs about 0.1 s per frame of a LIBERO scene; a GPU
# needs milliseconds.

# %%
renderer = opengl.ensure_gl()
print(f"{renderer['renderer']} renders a small test frame in {renderer['ms']:.1f} ms: the "
      f"{'CPU' if opengl.renders_on_cpu(renderer['renderer']) else 'GPU'} renders")

# %% [markdown]
# ## Checks
#
# Every row should say `ok`. The settle probe places a bowl on a ramekin and checks that the bowl
# stays there. With other versions of the simulator it slides off, which changes success rates.

# %%
checks = preflight.preflight()
print(preflight.table(checks))
assert all(check.status != "fail" for check in checks), "fix the rows marked fail first"
print(f"{sum(check.status == 'ok' for check in checks)} of {len(checks)} checks are ok")

# %% [markdown]
# ## Folders
#
# Demonstrations are stored in the data folder and results in one folder per run. The environment
# variables `TRM_DATA_DIR` and `TRM_ARTIFACTS_DIR` move them.

# %%
print("on Kaggle:      ", paths.on_kaggle())
print("demonstrations: ", paths.data_dir())
print("this run:       ", folder)

# %% [markdown]
# ## What a policy sees and sends
#
# The agent view is a fixed camera in front of the robot; the wrist camera moves with the gripper.
# These frames, rendered just now, show a sampled layout of the first task. Frames are stored upside
# down, because OpenGL counts rows from the bottom, and are flipped only for display.
#
# Twenty times per simulated second the policy sends an action of seven numbers in [-1, 1]. The
# first three move the gripper along the straight arrows and the next three rotate it about them, as
# the bent arrows show. The seventh opens (-1) or closes (+1) the gripper. `dx` points away from the
# robot's base: towards the camera in the agent view.

# %%
env = LiberoEnv(config.data.suite, config.data.task_ids[0], image_size=256)
observation = env.reset(seed=0)
frames = {camera: observation[camera] for camera in schema.CAMERAS}
print(f"{env.task.language}: two frames in {1000 * observation.rendering_seconds:.0f} ms")
fig = action_plots.plot_action_axes(frames, env.end_effector(), env.project)
plots.save_figure(fig, folder / "figures" / "00_action.png")
display(fig)

# %%
pd.set_option("display.max_colwidth", None)
display(pd.DataFrame({"meaning": schema.ACTION_MEANING}, index=schema.ACTION_NAMES))

# %% [markdown]
# How far does the arm move? A command is a displacement from the current pose. The arm follows it
# with a delay, and the next command arrives 0.05 s later. Ten times `dz` = 1:

# %%
up = np.array([0, 0, 1, 0, 0, 0, schema.GRIPPER_OPEN])
heights = [env.end_effector()[2]]
for _ in range(10):
    env.step(up)
    heights.append(env.end_effector()[2])
env.close()
rise = 100 * np.diff(heights)  # cm per action
print(f"Each action asked for 5 cm. The first raised the gripper by {rise[0]:.1f} cm, the tenth by "
      f"{rise[-1]:.1f} cm, all ten by {rise.sum():.1f} cm.")

# %% [markdown]
# ## Demonstrations
#
# Behaviour cloning imitates demonstrations. With `demos="auto"`, a task uses LIBERO's human
# demonstrations if their file is found, and otherwise demonstrations by a scripted expert,
# collected in the simulator. The expert is a program that knows the positions of all objects.
# Random pushes disturb it, so that its demonstrations also show how to recover; on the default
# layout this brought no measured benefit (`docs/recursion.md`). `demos="human"` downloads missing
# human files; `demos="scripted"` ignores human files.
#
# On a CPU, rendering takes most of the collection. With `frame_stride=4`, as in all presets but
# `reference`, only every fourth step is rendered: the demo's 30 demonstrations then take 2.5
# instead of 6.4 minutes. Training sees each of these frames four times per epoch, and the policy
# succeeds as often (`docs/results.md`).

# %%
files = session.demonstrations(config)

# %%
steps = {}
for task, path in files.items():
    with open_demo_file(path) as data:
        steps[task] = [len(data["data"][name]["actions"]) for name in demo_names(data)]
for task, lengths in steps.items():
    print(f"Task {task}: {len(lengths)} demonstrations, {min(lengths)} to {max(lengths)} steps "
          f"long ({min(lengths) / schema.CONTROL_HZ:.1f} to {max(lengths) / schema.CONTROL_HZ:.1f} "
          "s).")

# %% [markdown]
# ## Exercises
#
# **1.** By how much does a policy that sends `dz` = 1 for one second raise the gripper? Estimate it
# from the ten measured actions.
#
# <details><summary>Answer</summary>
#
# One second is 20 actions. After the first few, each adds the same distance, about a quarter of the
# 5 cm that it asks for, so extrapolate from the last one.
#
# ```python
# second = rise.sum() + 10 * rise[-1]
# print(f"about {second:.0f} cm in one second, where 20 commands asked for {20 * 5} cm")
# assert abs(rise[-1] - rise[-2]) < 0.1  # cm: the speed is constant by now
# assert 0.2 < second / 100 < 0.35
# ```
#
# </details>
#
# **2.** Every step stores two images (some of them copies, see above) of three bytes per pixel, and
# one action. How many megabytes
# of images do the demonstrations hold, and how many action values?
#
# <details><summary>Answer</summary>
#
# Steps times cameras times height times width times 3 bytes. For each value that the policy has to
# predict, it receives about 14,000 bytes of images, most of which are irrelevant to that value.
#
# ```python
# total = sum(map(sum, steps.values()))
# with open_demo_file(next(iter(files.values()))) as data:
#     first = data["data"][demo_names(data)[0]]
#     images = sum(first["obs"][camera][0].nbytes for camera in schema.CAMERAS)  # bytes per step
# print(f"{total * images / 1e6:.0f} MB of images and {7 * total:,} action values")
# assert images == 2 * 128 * 128 * 3 and 14_000 < images / 7 < 14_100
# ```
#
# </details>

# %% [markdown]
# Next: `01_explore` inspects these files.
