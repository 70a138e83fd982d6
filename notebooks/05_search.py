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
# Would other settings have done better? The grid is made of learning rates, widths and numbers of
# recursions: sixteen points for the `demo` preset, of which it tries four for three epochs, to
# show how it goes; `max_configs=0` tries them all. Each is trained by `04_train`, in a process of
# its own, on a GPU of its own where there are several. Short trainings only rank roughly, so the
# ranking looks at three things in this order: the final validation loss, how soon it got there,
# and whether it got there without spikes. With `search_episodes` above 0 the success rate in the
# simulator comes first.
#
# `search_method` `tpe` lets Optuna choose the points, from what it has seen so far; `halving` also
# trains most of them for a ninth or a third of the epochs only. `search_space` adds settings:
# `"{weight_decay: [0.0, 0.1]}"`. What is complete is not run again: after `search_minutes`, or
# an interruption, the same call goes on.

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
search_method = None  # type: str; grid, tpe or halving; None keeps the preset's
search_space = None  # type: str; further axes as YAML; None keeps the preset's
max_configs = None  # type: int; trials; 0 is as many as the grid has points; None: the preset's
search_epochs = None  # type: int; epochs per trial; None keeps the preset's
search_episodes = None  # type: int; rollouts per task and trial; None keeps the preset's
search_replicates = None  # type: int; seeds for each of the three best; None keeps the preset's
search_shard = None  # type: str; "2/4": every fourth point from the second on; None: the preset's
search_workers = None  # type: int; trials at once; 0 is one for each GPU; None keeps the preset's
search_minutes = None  # type: float; end cleanly after so long, 0 never; None keeps the preset's
search_storage = None  # type: str; URL of a database, no password: TRM_SEARCH_STORAGE is for one

# %%
import pandas as pd
from IPython.display import display

from trm_helpers import paths
from trm_helpers.config import from_flat
from trm_helpers.demos.collect import ensure_demonstrations
from trm_helpers.search import figures
from trm_helpers.search.search import run_search, verdict
from trm_helpers.search.space import all_points, axes
from trm_helpers.visuals.plots import save_figure

# %%
folder = paths.run_dir(run_name or preset)
config = from_flat(
    preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir, num_demos=num_demos,
    placement=placement, search_method=search_method, search_space=search_space,
    max_configs=max_configs, search_epochs=search_epochs, search_episodes=search_episodes,
    search_replicates=search_replicates, search_shard=search_shard, search_workers=search_workers,
    search_minutes=search_minutes, search_storage=search_storage)
names = list(axes(config.search))
print(f"{config.search.max_configs or 'all'} of the {len(all_points(config.search))} points, "
      f"{config.search.search_epochs} epochs each")
files = ensure_demonstrations(config)

# %% [markdown]
# ## Run

# %%
trials = run_search(config, folder)
complete = [trial for trial in trials if trial["state"] == "complete"]

# %% [markdown]
# ## Ranking
#
# Best first. `epochs_to_converge` is when a trial had come nine tenths of its way down, `spikes`
# counts epochs that fell back by a fifth. Small differences mean little: the sentence below the
# table says whether the best can be told from the next at all.

# %%
pd.DataFrame(trials).drop(columns=["trial", "val_losses", "rollouts"], errors="ignore").round(4)

# %%
print(verdict(trials))

# %% [markdown]
# On the right, look for curves that still fall steeply at the end: those trials were cut off, and
# more epochs (`search_epochs`) may change their place. A low learning rate always looks worse after
# a short training.

# %%
if complete:
    fig = figures.plot_search_ranking(trials, names)
    save_figure(fig, folder / "figures" / "05_search.png")
    display(fig)

# %% [markdown]
# Every line is a trial. Where the dark lines go through one point of an axis, the good trials have
# that value in common.

# %%
if complete:
    fig = figures.plot_search_coordinates(trials, names)
    save_figure(fig, folder / "figures" / "05_coordinates.png")
    display(fig)

# %% [markdown]
# Which setting decides about being among the best? A share near nothing says that you may set it as
# you like, between the values that were tried. (It takes fifteen trials to say anything.)

# %%
shares = figures.importance(trials, names) if complete else "No trial is complete."
if isinstance(shares, str):
    print(shares)
else:
    fig = figures.plot_search_importance(shares, trials)
    save_figure(fig, folder / "figures" / "05_importance.png")
    display(fig)

# %% [markdown]
# ## The best, for 04_train
#
# Written as parameters that papermill reads: the preset and every setting that makes the trial,
# for as many epochs as the preset has. Train it in full before you believe it.

# %%
best = folder / "search" / "best.yaml"
if best.exists():
    print(best.read_text())
    print(f"papermill 04_train.ipynb out.ipynb -f {best}")

# %% [markdown]
# Next: `06_eval` measures what counts.
