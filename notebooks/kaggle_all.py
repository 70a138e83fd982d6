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
# # All eight notebooks in one session
#
# Run all cells. Each notebook runs in a process of its own, and its prose, tables, figures and
# films appear below. To resume in another session, attach the output of this notebook: training
# continues from its last checkpoint, and finished episodes are not repeated.
#
# **Time**: 11 to 13 minutes (preset `demo`, two CPU cores), most of them for demonstrations and
# training.
# **Needs** nothing else. **Writes** the run folder `artifacts/<run_name>/`, with `report.html`.

# %% tags=["parameters"]
preset = "demo"  # type: str; reference, demo, trm or tiny (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty takes the preset's name

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
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from trm_helpers.notebooks import run_notebook, show_notebook

settings = {"preset": preset, "run_name": run_name or preset}

# %%
show_notebook(run_notebook("00_setup", settings))

# %%
show_notebook(run_notebook("01_explore", settings))

# %%
show_notebook(run_notebook("02_dataset", settings))

# %%
show_notebook(run_notebook("03_model", settings))

# %%
show_notebook(run_notebook("04_train", settings))

# %%
show_notebook(run_notebook("05_search", settings))

# %% [markdown]
# ## Two GPUs
#
# With two GPUs (Settings > Accelerator > GPU T4 x2), a second seed trains on the second one while
# the policy of the first seed is evaluated. To compare the two seeds, run `06_eval` with `run_name`
# and `baseline_run`. `05_search` has run one trial on each GPU.

# %%
if (gpus := torch.cuda.device_count()) < 2:
    print(f"Skipped: this session has {gpus} GPU(s). The evaluation runs alone.")
    show_notebook(run_notebook("06_eval", settings))
else:
    second = {**settings, "run_name": f"{settings['run_name']}-seed1", "seed": 1}
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        training = pool.submit(run_notebook, "04_train", second, stop=stop,
                               environment={"CUDA_VISIBLE_DEVICES": "1"})
        try:
            show_notebook(run_notebook("06_eval", settings,
                                       environment={"CUDA_VISIBLE_DEVICES": "0"}))
        except BaseException:  # interrupted, or failed: the training ends too, and can be resumed
            stop.set()
            raise
    show_notebook(training.result())

# %%
show_notebook(run_notebook("07_visualize", settings))
