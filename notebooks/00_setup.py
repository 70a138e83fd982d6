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
# This notebook installs missing packages, chooses a renderer, checks the machine, and finds or
# collects the demonstrations that the other notebooks train on.
#
# The tasks come from the LIBERO benchmark and run in MuJoCo, a physics simulator. You need to know
# neither. Twenty times per simulated second the simulator takes an action of seven numbers (move
# the gripper, rotate it, open or close it) and returns the images of two cameras: the agent view, a
# fixed camera in front of the robot, and the wrist camera, which moves with the gripper.

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

# %% [markdown]
# The [glossary](../docs/glossary.md) explains the terms of these notebooks.

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
from trm_helpers import paths, preflight, software
from trm_helpers.config import from_flat
from trm_helpers.demos.collect import ensure_demonstrations

# %% [markdown]
# ## Renderer
#
# OpenGL renders the camera images without a screen. The name below identifies the device:
# `llvmpipe` is the CPU, which needs about 0.1 s per frame of a LIBERO scene; a GPU needs
# milliseconds.

# %%
renderer = software.ensure_gl()
print(f"{renderer['renderer']} renders a small test frame in {renderer['ms']:.1f} ms")

# %% [markdown]
# ## Checks
#
# Every row should say `ok`. The settle probe places a bowl on a ramekin and checks that it stays
# there. With other versions of the simulator it slides off, which changes the benchmark.

# %%
checks = preflight.preflight()
print(preflight.table(checks))
assert all(check.status != "fail" for check in checks), "fix the rows marked fail first"

# %% [markdown]
# ## Folders
#
# Demonstrations are stored in the data folder and results in one folder per run. The environment
# variables `TRM_DATA_DIR` and `TRM_ARTIFACTS_DIR` move them.

# %%
print("on Kaggle:      ", paths.on_kaggle())
print("demonstrations: ", paths.data_dir())
print("runs:           ", paths.run_dir(run_name or preset))

# %% [markdown]
# ## Demonstrations
#
# Behaviour cloning imitates demonstrations. With `demos="auto"`, a task uses LIBERO's human
# demonstrations if its file is found and otherwise those of a scripted expert, collected in the
# simulator. The expert is a program that knows the positions of all objects. Random pushes disturb
# it, so that its demonstrations also show how to recover: a policy trained on perfect motion alone
# cannot correct its first small error. `demos="human"` downloads missing human files;
# `demos="scripted"` ignores human files.

# %%
config = from_flat(preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
                   num_demos=num_demos, placement=placement)
files = ensure_demonstrations(config)
session.keep(files.values())

# %% [markdown]
# Next: `01_explore` inspects these files.
