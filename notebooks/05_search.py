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
# # 05 Hyper-parameter search
#
# A search trains the policy with several settings and ranks them. The grid combines learning rates,
# widths and numbers of recursions; a point is one combination, a trial is the training of one.
#
# **What you will learn**
# - how to read a ranking, and what it cannot tell: another seed changes a loss too
# - how to see which setting matters, from parallel coordinates and an importance estimate
# - how to choose between a grid, Optuna's sampler and successive halving
# - how to train the best settings in full, which is what the ranking is for
#
# **Time**: 10 minutes to read; 1 to 2 to run (preset `demo`, two CPU cores).
# **Needs** demonstrations (collected if missing, see `00_setup`). **Writes**
# `artifacts/<run_name>/search/`: a run folder per trial, `trials.json`, `best.yaml`; figures.
#
# The `demo` preset trains 4 of the 16 points for three epochs; `max_configs=0` trains all of them.
# Each point is trained by `04_train` in its own process and, if there are several GPUs, on its own
# GPU. With `search_method="tpe"`, Optuna chooses each point from the results so far; `"halving"`
# also trains most points for only a ninth or a third of the epochs. `search_space` adds settings,
# such as `"{weight_decay: [0.0, 0.1]}"`. Completed trials are not repeated: after an interruption
# or after `search_minutes`, the same call resumes.

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
search_method = None  # type: str; grid, tpe or halving; None keeps the preset's
search_space = None  # type: str; further axes as YAML; None keeps the preset's
max_configs = None  # type: int; trials, 0 as many as the grid has points; None: the preset's
search_epochs = None  # type: int; epochs per trial; None keeps the preset's
search_episodes = None  # type: int; rollouts per task and trial; None keeps the preset's
search_replicates = None  # type: int; seeds for each of the three best; None keeps the preset's
search_shard = None  # type: str; "2/4": every fourth point from the second; None: the preset's
search_workers = None  # type: int; parallel trials, 0 one per GPU; None keeps the preset's
search_minutes = None  # type: float; stop and save after this time, 0 never; None: the preset's
search_storage = None  # type: str; database URL; one with a password goes to TRM_SEARCH_STORAGE

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
import pandas as pd
from IPython.display import display

from trm_helpers import paths
from trm_helpers.config import from_flat
from trm_helpers.search import figures
from trm_helpers.search.search import claim, run_search, verdict
from trm_helpers.search.space import all_points, axes
from trm_helpers.visuals.plots import save_figure

# %%
folder = paths.run_dir(run_name or preset)
config = from_flat(
    preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir, num_demos=num_demos,
    placement=placement, frame_stride=frame_stride, search_method=search_method,
    search_space=search_space, max_configs=max_configs, search_epochs=search_epochs,
    search_episodes=search_episodes, search_replicates=search_replicates,
    search_shard=search_shard, search_workers=search_workers, search_minutes=search_minutes,
    search_storage=search_storage)
names = list(axes(config.search))
print(f"{config.search.max_configs or 'all'} of the {len(all_points(config.search))} points, "
      f"{config.search.search_epochs} epochs each")
claim(config, folder)  # refuses trials with other settings before anything is collected
files = session.demonstrations(config)

# %% [markdown]
# ## An example: all sixteen points
#
# A stored search, on demonstrations with all frames: each of the 16 points for ten epochs, the best
# three with two more seeds. Trials are ranked by final validation loss, in steps of 1 %; those on
# the same step by convergence speed, then by the number of spikes (both defined below). With
# `search_episodes` above 0 the success rate in the simulator comes first.
#
# A curve on the right that still falls steeply at the end belongs to a trial that was stopped too
# early; more epochs (`search_epochs`) may change its rank. Low learning rates tend to look worse
# after short training.

# %%
example = figures.stored_example()
stored, varied = example["trials"], ["lr", "hidden_dim", "num_recursions"]
print(f"{example['command']}\n{example['machine']}, revision {example['revision']}")
display(figures.plot_search_ranking(stored, varied))

# %%
print(verdict(stored))
spread = 100 * (max(stored[0]["seed_losses"]) / min(stored[0]["seed_losses"]) - 1)
gap = 100 * (stored[1]["final_val_loss"] / stored[0]["final_val_loss"] - 1)
print(f"The three seeds of the best settings differ by up to {spread:.1f} %; the second-best "
      f"settings are {gap:.1f} % worse on average.")

# %% [markdown]
# Each line is a trial, the best thick, the others from dark (good) to light. Lines through the same
# value are drawn slightly apart, the better above. Where the thick and the dark lines run together
# at an axis, the good trials share that value.

# %%
display(figures.plot_search_coordinates(stored, varied))

# %% [markdown]
# Which setting matters most for being among the best third of the trials? A setting with a share
# near zero has little effect within the range that was searched. At least 15 complete trials are
# needed.

# %%
shares = figures.importance(stored, varied)
display(figures.plot_search_importance(shares, stored))
print("Importance: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
      + ". In the best third: " + ", ".join(
          f"{name} {sorted({trial[name] for trial in stored[:5]})}" for name in shares) + ".")

# %% [markdown]
# ## Run the trials

# %%
trials = run_search(config, folder)
complete = [trial for trial in trials if trial["state"] == "complete"]

# %% [markdown]
# ## Ranking
#
# The table lists the best trial first. `epochs_to_converge` is the first epoch at which a trial had
# made 90 % of its improvement in validation loss; `spikes` counts the epochs whose loss exceeds the
# lowest one before by more than 20 %. Small differences may be chance: the sentence below the table
# says whether the best trial differs significantly from the second.

# %%
table = pd.DataFrame(trials).drop(columns=["trial", "val_losses", "rollouts"], errors="ignore")
display(table.round(4))
print(verdict(trials))

# %%
if complete:
    fig = figures.plot_search_ranking(trials, names)
    save_figure(fig, folder / "figures" / "05_search.png")
    display(fig)

# %% [markdown]
# Do more epochs change the order? With the settings of the `demo` preset, the next cell prints the
# ranks that the points of your trials have in the example, which trained for more epochs, on
# demonstrations with all frames.

# %%
ranks = {trial["trial"]: rank for rank, trial in enumerate(stored, 1)}
shared = [ranks[trial["trial"]] for trial in complete if trial["trial"] in ranks]
if preset == "demo" and shared:
    print(f"Your trials, best first, have the ranks {', '.join(map(str, shared))} of {len(stored)} "
          f"in the example: {'the same' if shared == sorted(shared) else 'another'} order.")
else:
    print("Not compared: the example holds points of the demo preset.")

# %% [markdown]
# The settings of your trials, and their importance.

# %%
if complete:
    fig = figures.plot_search_coordinates(trials, names)
    save_figure(fig, folder / "figures" / "05_coordinates.png")
    display(fig)

# %%
shares = figures.importance(trials, names) if complete else "No trial is complete."
if isinstance(shares, str):
    print(f"{shares} max_configs=0 trains all points of the grid.")
else:
    fig = figures.plot_search_importance(shares, trials)
    save_figure(fig, folder / "figures" / "05_importance.png")
    display(fig)

# %% [markdown]
# ## Train the best settings
#
# `best.yaml` holds the best trial's settings as papermill parameters for `04_train`, without the
# search's number of epochs. Train them in full before you rely on the ranking.

# %%
best = folder / "search" / "best.yaml"
if best.exists():
    print(best.read_text())
    print(f"papermill 04_train.ipynb ../artifacts/trained.ipynb -f {best}")

# %% [markdown]
# ## Exercises
#
# **1.** Compute `epochs_to_converge` of the example's last trial from its validation losses.
#
# <details><summary>Answer</summary>
#
# It is the first epoch whose loss exceeds the lowest loss by at most a tenth of the whole
# improvement. The last trial converges one epoch later than the best: with its low learning rate,
# the early epochs bring a smaller share of the improvement.
#
# ```python
# losses = stored[-1]["val_losses"]
# target = losses[0] - 0.9 * (losses[0] - min(losses))
# epoch = next(epoch for epoch, loss in enumerate(losses, 1) if loss <= target)
# print(f"{stored[-1]['trial']} reaches {target:.4f} in epoch {epoch} of {len(losses)}")
# assert epoch == stored[-1]["epochs_to_converge"]
# ```
#
# </details>
#
# **2.** Suppose that all 16 settings were equally good and their losses differed by the seed alone.
# How much better than the average would the winner look?
#
# <details><summary>Answer</summary>
#
# By 1.77 standard deviations between seeds. Part of a winner's lead is chance, so the winner looks
# better than it is; hence the further seeds for the best three (`search_replicates`).
#
# ```python
# import numpy as np
#
# luck = np.random.default_rng(0).normal(size=(20_000, 16)).min(axis=1).mean()
# deviation = np.std(stored[0]["seed_losses"], ddof=1)
# print(f"{luck:.2f} standard deviations, here {luck * deviation:+.4f} of a loss of "
#       f"{stored[0]['final_val_loss']:.4f}")
# assert -1.82 < luck < -1.72
# ```
#
# </details>

# %% [markdown]
# Next: `06_eval` measures the success rate in the simulator.
