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

# %% [markdown]
# The [glossary](../docs/glossary.md) explains the terms of these notebooks.

# %% [markdown]
# ## Find the package
#
# With the package installed, as by `make setup`, there is nothing to do here. Elsewhere, on Kaggle
# for instance, this cell looks for the repository in the folders above and in the working folder,
# then for a copy of it in an attached data set. Attached folders are read-only, so that copy is
# copied into the working folder.

# %%
import importlib.util
import shutil
import sys
from pathlib import Path

attached, working = Path("/kaggle/input"), Path("/kaggle/working")
places = [Path.cwd(), *Path.cwd().parents, *working.glob("*")]
installed = importlib.util.find_spec("trm_helpers")
places += [Path(installed.origin).parents[1]] if installed else []
roots = [place for place in places if (place / "trm_helpers" / "schema.py").exists()]
sources = [found.parent.parent for found in attached.rglob("trm_helpers/schema.py")]
assert roots or sources, "trm_helpers not found: clone the repository or attach it"

# %% [markdown]
# ## Install only what is missing
#
# The versions of MuJoCo, robosuite and LIBERO are pinned: another MuJoCo changes success rates
# silently. What is there in a version that fits stays as it is.

# %%
if not roots:
    roots = [shutil.copytree(sources[0], working / "trm", dirs_exist_ok=True)]
sys.path.insert(0, str(roots[0]))
from trm_helpers.software import install_missing

install_missing(roots[0])

# %%
from trm_helpers import paths, preflight, software
from trm_helpers.config import from_flat
from trm_helpers.demos.collect import ensure_demonstrations

# %% [markdown]
# ## Renderer
#
# The cameras' pictures are drawn by OpenGL without a screen. Look at the name: `llvmpipe` is the
# CPU (a frame of a LIBERO scene takes about a tenth of a second), a GPU's name means
# milliseconds.

# %%
renderer = software.ensure_gl()
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

# %% [markdown]
# ## Folders
#
# What is read and what is written has one place each; `TRM_DATA_DIR` and `TRM_ARTIFACTS_DIR`
# move them.

# %%
print("on Kaggle:      ", paths.on_kaggle())
print("demonstrations: ", paths.data_dir())
print("runs:           ", paths.run_dir(run_name or preset))

# %% [markdown]
# ## Demonstrations
#
# Behaviour cloning needs somebody to imitate: LIBERO's human demonstrations where files of a task
# are attached, otherwise a scripted expert, which shows the task in the simulator. It is pushed
# about while it does so, because a policy that has only seen perfect motion does not know what to
# do after its first small mistake. `demos="human"` downloads the human files that are missing,
# `demos="scripted"` ignores them.

# %%
config = from_flat(preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
                   num_demos=num_demos, placement=placement)
files = ensure_demonstrations(config)

# %% [markdown]
# Next: `01_explore` looks into these files.
