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
# Is this machine ready? This notebook installs what is missing, sees to the renderer, and makes
# sure that there are demonstrations to learn from. Everything after it only reads what it leaves
# behind.
#
# The robot lives in a physics simulator, MuJoCo, with the tasks of the LIBERO benchmark. You do
# not have to know either: the simulator takes seven numbers twenty times a second (where to move
# the hand, how to turn it, open or close the gripper) and gives back two camera pictures.

# %% tags=["parameters"]
preset = "demo"  # type: str; demo, tiny or reference (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty takes the preset's name
suite = None  # type: str; LIBERO suite; None keeps the preset's
task_ids = None  # type: list; task indices in the suite; None keeps the preset's
demos = None  # type: str; auto, human or scripted; None keeps the preset's
demo_dir = None  # type: str; folder with *_demo.hdf5 to use; None searches data/ and Kaggle's input
num_demos = None  # type: int; demonstrations to collect per task; None keeps the preset's

# %% [markdown]
# ## Find the package
#
# In a checkout that was set up with `make setup` there is nothing to do here. Elsewhere, on
# Kaggle say, this cell looks for the repository: in the folders above, in the working folder, and
# in the attached data sets.

# %%
import sys
from pathlib import Path

places = [Path.cwd(), *Path.cwd().parents, *Path("/kaggle/working").glob("*")]
attached = [found.parent for found in Path("/kaggle/input").rglob("trm_helpers/schema.py")]
roots = [place for place in places if (place / "trm_helpers" / "schema.py").exists()]
roots += [found.parent for found in attached]
assert roots, "trm_helpers not found: clone the repository or attach it as a data set"
sys.path.insert(0, str(roots[0]))
print("package in", roots[0])

# %%
from trm_helpers import paths, preflight
from trm_helpers.config import from_flat

# %% [markdown]
# ## Install only what is missing
#
# The versions of MuJoCo, robosuite and LIBERO are pinned: another MuJoCo changes success rates
# silently. What Kaggle already has in a version that fits stays as it is.

# %%
preflight.install_missing(roots[0])

# %% [markdown]
# ## Renderer
#
# The cameras' pictures are drawn by OpenGL without a screen. Look at the name: `llvmpipe` is the
# CPU (a frame of a LIBERO scene takes about a tenth of a second), a GPU's name means
# milliseconds.

# %%
renderer = preflight.ensure_gl()
print(f"{renderer['renderer']} draws a small test frame in {renderer['ms']:.1f} ms")

# %% [markdown]
# ## The whole table
#
# Every row should say `ok`. The settle probe drops a bowl on a ramekin and sees that it stays
# there: with other versions of the simulator it slides off, and the benchmark is another one.

# %%
checks = preflight.preflight()
print(preflight.table(checks))
assert all(check.status != "fail" for check in checks), "see the rows that say fail"

# %%
print("on Kaggle:      ", paths.on_kaggle())
print("demonstrations: ", paths.data_dir())
print("runs:           ", paths.artifacts_dir() / (run_name or preset))

# %% [markdown]
# ## Demonstrations
#
# Behaviour cloning needs somebody to imitate. LIBERO's human demonstrations are used where they
# are attached or can be downloaded; otherwise a scripted expert shows the task in the simulator.
# It is pushed about while it does so, because a policy that has only seen perfect motion does not
# know what to do after its first small mistake.

# %%
from trm_helpers.collect import ensure_demonstrations

config = from_flat(preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
                   num_demos=num_demos)
files = ensure_demonstrations(config)

# %% [markdown]
# Next: `01_explore` looks into these files.
