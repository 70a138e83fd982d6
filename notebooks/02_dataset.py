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
# A sample is a pair of one observation (camera images and, in most presets, proprioception, the
# robot's own joint and finger positions) and the demonstrator's next actions. This notebook splits,
# normalises, augments and batches the samples, and shows exactly what the network receives.

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
batch_size = None  # type: int; samples per batch; None keeps the preset's
storage = None  # type: str; where frames are kept: ram, mmap or gpu; None keeps the preset's

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
import time

import pandas as pd
import torch

from trm_helpers import ActionNormalizer, LIBERODataset, paths, schema
from trm_helpers.config import from_flat
from trm_helpers.data.augment import augment_images
from trm_helpers.demos.collect import ensure_demonstrations
from trm_helpers.training.devices import choose_device
from trm_helpers.visuals import plots

# %%
folder = paths.run_dir(run_name or preset)
config = from_flat(preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
                   num_demos=num_demos, placement=placement, batch_size=batch_size, storage=storage)
files = ensure_demonstrations(config)

# %% [markdown]
# ## Split by demonstration
#
# Neighbouring steps of a demonstration look almost identical. If steps were split at random, the
# validation set would nearly duplicate the training set. Whole demonstrations are split instead: of
# each task, 80 % for training and 20 % for validation.

# %%
train_data, val_data = LIBERODataset.from_config(files, config)
pd.DataFrame([{"split": data.split, "demonstrations": len(data.demos), "samples": len(data)}
              for data in (train_data, val_data)])

# %% [markdown]
# ## One sample
#
# Images have the shape `(T, H, W, 3)` with values in [0, 1] and `T` consecutive steps, one in every
# preset. `proprio` is the proprioception: seven joint angles, two finger positions and the position
# of the gripper.

# %%
sample = train_data[0]
shapes = {**sample["observations"], "actions": sample["actions"], "mask": sample["mask"]}
pd.DataFrame([{"entry": name, "shape": tuple(value.shape), "type": str(value.dtype)}
              for name, value in shapes.items()])

# %% [markdown]
# ## Chunk and mask
#
# A preset with `chunk` K above 1 predicts the next K actions at once and executes several before it
# reads the next observation, so that it decides less often. `mask` is 1 for actions that count in
# the loss. It is 0 past the end of the demonstration and from a push onwards, because actions after
# a push cannot be predicted from earlier observations. The last column is the share of valid
# actions over up to 512 samples.

# %%
last = train_data[len(train_data) - 1]
batch = next(train_data.batches(512, seed=0, epoch=0))
masks = {"first sample": sample["mask"], "last sample": last["mask"],
         "mean": batch["mask"].mean(dim=0)}
pd.DataFrame({name: mask.flatten() for name, mask in masks.items()}).rename_axis("action").round(2)

# %% [markdown]
# ## Normalisation
#
# Z-scoring subtracts the mean and divides by the standard deviation, so that every dimension has
# the same weight in the loss. Rotations are small; after z-scoring they count as much as
# translations, which is not always an advantage. The gripper command stays -1 or +1. The statistics
# come from the training split alone and are saved with the checkpoint.

# %%
raw = train_data.normalizer.denormalize(batch["actions"].flatten(0, -2))  # (N, 7)
scaled = ActionNormalizer("zscore").fit(raw).normalize(raw)
print("normalize_actions of this preset:", train_data.normalizer.mode)
pd.DataFrame({"mean before": raw.mean(0), "std before": raw.std(0), "mean after": scaled.mean(0),
              "std after": scaled.std(0)}, index=schema.ACTION_NAMES).round(3)

# %% [markdown]
# ## Augmentation
#
# Augmentation randomly changes the images of each sample, for example their brightness and
# position, so that the policy does not rely on single pixels. Compare the rows: most columns should
# differ, and the scene must stay recognisable. Only training samples are augmented.

# %%
camera = config.model.cameras[0]
spread = range(0, len(val_data), -(-len(val_data) // 6))
originals = val_data.batch(spread)["observations"][camera][:, 0]
augmented = augment_images(originals, config.data.augmentation, torch.Generator().manual_seed(0))
fig = plots.plot_augmentation(originals, augmented)
plots.save_figure(fig, folder / "figures" / "02_augmentation.png")
fig

# %% [markdown]
# ## A training batch
#
# A batch mixes samples of all training demonstrations. Their order depends only on the seed and the
# epoch, so that a run can be repeated. The bars show the first target action of each sample. Does
# it fit the image?

# %%
batches = train_data.batches(config.train.batch_size, seed=0, epoch=0)
fig = plots.plot_batch(next(batches))
plots.save_figure(fig, folder / "figures" / "02_batch.png")
fig

# %% [markdown]
# ## Loading speed
#
# Loading should be faster than training. `storage` decides where the frames are kept: `ram` in main
# memory, already resized for the network; `mmap` in the files, read and resized for each batch;
# `gpu` in the GPU's memory. All three give the same batches. The memory needed is printed before it
# is allocated; if it is not available, loading fails at once with an error. `docs/loading.md`
# compares the speed with other loaders.

# %%
rows, device = [], choose_device(config.train.device)
for name in ("ram", "mmap", "gpu")[:3 if device.type == "cuda" else 2]:
    data, _ = LIBERODataset.from_config(files, config.replace(storage=name))
    began = time.perf_counter()
    count = sum(len(batch["actions"]) for batch in
                data.batches(config.train.batch_size, seed=0, epoch=1, device=device))
    torch.cuda.synchronize() if device.type == "cuda" else None  # waits for the GPU to finish
    rows.append({"storage": name, "samples per second, augmentation included":
                 count / (time.perf_counter() - began)})
pd.DataFrame(rows).round()

# %% [markdown]
# Next: `03_model` builds the network that is trained on these samples.
