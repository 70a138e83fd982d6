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
# Would other settings have done better? The grid has sixteen points: four learning rates, two
# widths, two numbers of recursions. Each, or as many as `max_configs` says, is trained for a few
# epochs. Short trainings only rank roughly, so the ranking looks at three things in this order:
# the final validation loss, how soon it got there, and whether it got there without spikes. With
# `search_episodes` above 0 the success rate in the simulator comes first.

# %% tags=["parameters"]
preset = "demo"  # type: str; demo, trm, tiny or reference (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty takes the preset's name
suite = None  # type: str; LIBERO suite; None keeps the preset's
task_ids = None  # type: list; task indices in the suite; None keeps the preset's
demos = None  # type: str; auto, human or scripted; None keeps the preset's
demo_dir = None  # type: str; folder with *_demo.hdf5 to use; None searches data/ and Kaggle's input
num_demos = None  # type: int; demonstrations to collect per task; None keeps the preset's
placement = None  # type: str; of objects: benchmark or wide (anywhere); None keeps the preset's
max_configs = None  # type: int; points of the grid; 0 is all sixteen; None keeps the preset's
search_epochs = None  # type: int; epochs per point; None keeps the preset's
search_episodes = None  # type: int; rollouts per point; None keeps the preset's

# %%
import pandas as pd

from trm_helpers import paths, plots
from trm_helpers.collect import ensure_demonstrations
from trm_helpers.config import from_flat
from trm_helpers.search import run_search

# %%
folder = paths.artifacts_dir() / (run_name or preset)
config = from_flat(preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
                   num_demos=num_demos, placement=placement, max_configs=max_configs,
                   search_epochs=search_epochs, search_episodes=search_episodes)
files = ensure_demonstrations(config)

# %% [markdown]
# ## Run
#
# A point that was trained before is not trained again.

# %%
trials = run_search(config, files, folder)

# %% [markdown]
# ## Ranking
#
# Best first. `epochs_to_converge` is when a trial had come nine tenths of its way down, `spikes`
# counts epochs that fell back by a fifth. Small differences mean little: another seed moves the
# loss by a few per cent.

# %%
pd.DataFrame(trials).drop(columns="val_losses").round(4)

# %% [markdown]
# On the right, look for curves that still fall steeply at the end: those trials were cut off, and
# more epochs (`search_epochs`) may change their place. A low learning rate always looks worse after
# a short training.

# %%
fig = plots.plot_search_ranking(trials)
plots.save_figure(fig, folder / "figures" / "05_search.png")
fig

# %% [markdown]
# ## The best, for 04_train
#
# Written as parameters that papermill reads. Train it in full before you believe it.

# %%
best = folder / "search" / "best.yaml"
print(best.read_text())
print(f"papermill 04_train.ipynb -p preset {preset} -f {best}")

# %% [markdown]
# Next: `06_eval` measures what counts.
