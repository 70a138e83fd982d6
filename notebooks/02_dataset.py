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
# # 02 From demonstrations to samples
#
# A sample is what the policy sees at one moment (pictures, its own joints) and what the
# demonstrator did next. Here they are split, normalised, augmented and drawn in batches.

# %% tags=["parameters"]
preset = "demo"  # type: str; demo, tiny or reference (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty takes the preset's name
suite = None  # type: str; LIBERO suite; None keeps the preset's
task_ids = None  # type: list; task indices in the suite; None keeps the preset's
demos = None  # type: str; auto, human or scripted; None keeps the preset's
demo_dir = None  # type: str; folder with *_demo.hdf5 to use; None searches data/ and Kaggle's input
num_demos = None  # type: int; demonstrations to collect per task; None keeps the preset's
batch_size = None  # type: int; samples per batch; None keeps the preset's

# %%
import time

import pandas as pd
import torch

from trm_helpers import LIBERODataset, paths, plots, schema
from trm_helpers.augment import augment_images
from trm_helpers.collect import ensure_demonstrations
from trm_helpers.config import from_flat

# %%
folder = paths.artifacts_dir() / (run_name or preset)
config = from_flat(preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
                   num_demos=num_demos,
                   batch_size=batch_size)
files = ensure_demonstrations(config)

# %% [markdown]
# ## Split by demonstration
#
# Neighbouring steps of one demonstration look almost the same. If they were split at random, the
# validation set would be a copy of the training set. So whole demonstrations go to one side or
# the other: 80 % to train, 20 % to validate, for each task.

# %%
train_data, val_data = LIBERODataset.from_config(files, config)
pd.DataFrame([{"split": data.split, "demonstrations": len(data.demos), "samples": len(data)}
              for data in (train_data, val_data)])

# %% [markdown]
# ## One sample
#
# `actions` holds the next `K` actions (a chunk) where the preset predicts chunks. `mask` is 0
# where an action does not exist (past the end) or could not be foreseen (after the arm was
# pushed).

# %%
sample = train_data[0]
shapes = {**sample["observations"], "actions": sample["actions"], "mask": sample["mask"]}
pd.DataFrame([{"entry": name, "shape": tuple(value.shape), "type": str(value.dtype)}
              for name, value in shapes.items()])

# %% [markdown]
# ## Normalisation
#
# Statistics come from the training split alone and travel with the checkpoint. The gripper keeps
# its -1 and +1. `offset` and `scale` below are what is taken off an action and what it is divided
# by.

# %%
statistics = train_data.normalizer.to_dict()
print("mode:", statistics["mode"])
pd.DataFrame({name: statistics[name] for name in ("offset", "scale")},
             index=schema.ACTION_NAMES[: schema.ARM_DIM]).round(4)

# %% [markdown]
# ## Augmentation
#
# Brightness and position of the picture are varied, each sample by itself, so that the policy
# does not count on single pixels. Compare the rows: the scene must stay recognisable.

# %%
camera = config.model.cameras[0]
originals = val_data.batch(range(6))["observations"][camera][:, 0]
augmented = augment_images(originals, config.data.augmentation, torch.Generator().manual_seed(0))
fig = plots.plot_augmentation(originals, augmented)
plots.save_figure(fig, folder / "figures" / "02_augmentation.png")
fig

# %% [markdown]
# ## A batch as the policy gets it

# %%
batches = train_data.batches(config.train.batch_size, seed=0, epoch=0)
fig = plots.plot_batch(next(batches))
plots.save_figure(fig, folder / "figures" / "02_batch.png")
fig

# %% [markdown]
# ## Loading speed
#
# Frames lie in memory as bytes and are gathered a batch at a time, so that loading does not hold
# up training.

# %%
began = time.perf_counter()
count = sum(len(batch["actions"]) for batch in
            train_data.batches(config.train.batch_size, seed=0, epoch=1))
print(f"{count / (time.perf_counter() - began):,.0f} samples per second, augmentation included")

# %% [markdown]
# Next: `03_model` builds the network that these samples go into.
