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
# demonstrator did next. Here they are split, normalised, augmented and drawn in batches: you will
# see exactly what the network is going to get.

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
batch_size = None  # type: int; samples per batch; None keeps the preset's
storage = None  # type: str; of the frames: ram, mmap or gpu; None keeps the preset's

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
# Pictures come as `(T, H, W, 3)` in [0, 1], with `T` consecutive steps (here mostly one); `proprio`
# is what the robot feels of itself: seven joint angles, two fingers, the hand's position.

# %%
sample = train_data[0]
shapes = {**sample["observations"], "actions": sample["actions"], "mask": sample["mask"]}
pd.DataFrame([{"entry": name, "shape": tuple(value.shape), "type": str(value.dtype)}
              for name, value in shapes.items()])

# %% [markdown]
# ## Chunk and mask
#
# Where the preset predicts chunks, `actions` holds the next `K` actions instead of one: the policy
# plans a short way ahead and looks again later, which makes it faster and its motion smoother.
# `mask` says which of them count in the loss: 0 where an action does not exist (past the end of
# the demonstration) or could not be foreseen (after the arm was pushed). Compare a
# demonstration's first and last moment.

# %%
last = train_data[len(train_data) - 1]
pd.DataFrame({"mask at the first moment": sample["mask"].flatten().tolist(),
              "mask at the last": last["mask"].flatten().tolist()}).rename_axis("action ahead")

# %% [markdown]
# ## Normalisation
#
# Z-scoring takes off the mean and divides by the standard deviation, so that every dimension
# weighs the same in the loss. Look at the rotations: tiny before, as large as the rest after, which
# is not always what you want. The gripper keeps its -1 and +1. Statistics come from the training
# split alone and travel with the checkpoint.

# %%
drawn = next(train_data.batches(512, seed=0, epoch=0))["actions"].flatten(0, -2)  # (N, 7)
raw = train_data.normalizer.denormalize(drawn)
scaled = ActionNormalizer("zscore").fit(raw).normalize(raw)
print("this preset uses:", train_data.normalizer.mode)
pd.DataFrame({"mean before": raw.mean(0), "std before": raw.std(0), "mean after": scaled.mean(0),
              "std after": scaled.std(0)}, index=schema.ACTION_NAMES).round(3)

# %% [markdown]
# ## Augmentation
#
# Brightness and position of the picture are varied, each sample by itself, so that the policy
# does not count on single pixels. Compare the rows: something should differ in every column, and
# the scene must stay recognisable. Only training samples are augmented.

# %%
camera = config.model.cameras[0]
spread = range(0, len(val_data), -(-len(val_data) // 6))
originals = val_data.batch(spread)["observations"][camera][:, 0]
augmented = augment_images(originals, config.data.augmentation, torch.Generator().manual_seed(0))
fig = plots.plot_augmentation(originals, augmented)
plots.save_figure(fig, folder / "figures" / "02_augmentation.png")
fig

# %% [markdown]
# ## A batch as the policy gets it
#
# Samples of all demonstrations, shuffled: the order is a function of the seed and the epoch, so
# that a run can be repeated. The bars are the first action to learn. Does it fit the picture?

# %%
batches = train_data.batches(config.train.batch_size, seed=0, epoch=0)
fig = plots.plot_batch(next(batches))
plots.save_figure(fig, folder / "figures" / "02_batch.png")
fig

# %% [markdown]
# ## Loading speed
#
# Loading must not hold up training. `storage` says where the frames lie: `ram` keeps them in
# memory, already in the size that the network sees; `mmap` takes no memory and reads them from the
# files when they are needed, resizing them each time; `gpu` keeps them beside the network. All give
# the same batches. What is needed is printed before it is taken; where it is not there, you get an
# error at once instead of a crash on the way. `docs/loading.md` has the comparison with others.

# %%
rows, device = [], choose_device(config.train.device)
for name in ("ram", "mmap", "gpu")[:3 if device.type == "cuda" else 2]:
    data, _ = LIBERODataset.from_config(files, config.replace(storage=name))
    began = time.perf_counter()
    count = sum(len(batch["actions"]) for batch in
                data.batches(config.train.batch_size, seed=0, epoch=1, device=device))
    torch.cuda.synchronize() if device.type == "cuda" else None  # a GPU answers before it is done
    rows.append({"storage": name, "samples per second, augmentation included":
                 count / (time.perf_counter() - began)})
pd.DataFrame(rows).round()

# %% [markdown]
# Next: `03_model` builds the network that these samples go into.
