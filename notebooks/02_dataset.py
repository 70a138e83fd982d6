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
#
# **What you will learn**
# - why whole demonstrations are split, not steps;
# - what one sample holds, with shapes and units;
# - which of the next actions count in the loss, and why not all of them do;
# - what normalisation and augmentation change, and what they must not change.
#
# **Time**: 8 minutes to read; less than one to run (preset `demo`, two CPU cores).
#
# **Needs** the demonstrations of `00_setup`, or collects them. **Writes** three figures to the run
# folder.

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
batch_size = None  # type: int; samples per batch; None keeps the preset's
storage = None  # type: str; where frames are kept: auto, ram, mmap or gpu; None keeps the preset's

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
import time

import pandas as pd
import torch
from IPython.display import display

from trm_helpers import ActionNormalizer, LIBERODataset, paths, schema
from trm_helpers.config import from_flat
from trm_helpers.data.augment import augment_images
from trm_helpers.training.devices import choose_device
from trm_helpers.visuals import plots

# %%
folder = paths.run_dir(run_name or preset)
config = from_flat(preset, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
                   num_demos=num_demos, placement=placement, frame_stride=frame_stride,
                   batch_size=batch_size, storage=storage)
files = session.demonstrations(config)

# %% [markdown]
# ## Split by demonstration
#
# Neighbouring steps of a demonstration look almost identical. If steps were split at random, the
# validation set would nearly duplicate the training set. Whole demonstrations are split instead: of
# each task, 80 % for training and 20 % for validation.

# %%
train_data, val_data = LIBERODataset.from_config(files, config)
display(pd.DataFrame([{"split": data.split, "demonstrations": len(data.demos),
                       "samples": len(data), "per epoch": visits}
                      for data, visits in ((train_data, train_data.epoch_size),
                                           (val_data, len(val_data)))]))
shared = {(demo.file, demo.name) for demo in train_data.demos} & {
    (demo.file, demo.name) for demo in val_data.demos}
print(f"{len(shared)} demonstrations are in both splits.")

# %% [markdown]
# ## One sample
#
# Images have the shape `(T, H, W, 3)` with values in [0, 1] and `T` consecutive steps, one in every
# preset. `proprio` is the proprioception: seven joint angles, two finger positions and the position
# of the gripper, each with mean 0 and standard deviation 1 over the training split.

# %%
sample = train_data[0]
shapes = {**sample["observations"], "actions": sample["actions"], "mask": sample["mask"]}
display(pd.DataFrame([{"entry": name, "shape": tuple(value.shape), "type": str(value.dtype)}
                      for name, value in shapes.items()]))

# %% [markdown]
# ## Chunk and mask
#
# A preset with `chunk` K above 1 predicts the next K actions at once and executes several before it
# reads the next observation, so that it decides less often. `mask` is 1 for actions that count in
# the loss. Which do not?
#
# - Actions past the end of the demonstration do not exist.
# - Actions after a push cannot be predicted from earlier observations: the push moves the arm, and
#   the demonstrator responds from the new position.
#
# The figure has a column per sample, in order of time, and a row per action of its chunk. A sample
# begins at each rendered frame, one in `frame_stride` steps. The figure shows a training
# demonstration that was not pushed at its start, if there is one among the first 20. While the arm
# is pushed, only the first action of each chunk counts: the response to what the robot sees now.

# %%
masks = [train_data.batch(train_data.samples_of(i), as_bytes=True)["mask"].flatten(1)[:, -K:]
         for K in [train_data.chunk] for i in range(min(20, len(train_data.demos)))]
number = max(range(len(masks)), key=lambda i: (
    masks[i][0].mean(), bool((masks[i][:-train_data.chunk] == 0).any())))  # the first such
chosen = masks[number]  # (T, K)

# %%
demo = train_data.demos[number]
length = demo.end - demo.first - train_data.sequence_length + 1  # steps at which a chunk can begin
fig = plots.plot_chunk_mask(chosen, f"Chunk mask of {demo.name}", demo.frame_stride, length)
plots.save_figure(fig, folder / "figures" / "02_mask.png")
display(fig)

# %%
K = chosen.shape[1]
begins = torch.arange(0, length, demo.frame_stride)  # step of each sample
beyond = begins[:, None] + torch.arange(K) >= length  # past the end
after_push = (chosen == 0) & ~beyond
print(f"Of {chosen.numel()} actions in {len(begins)} chunks of {K}, {100 * chosen.mean():.0f} % "
      f"count. {after_push.sum()} are masked after a push and {beyond.sum()} past the end.")
if K == 1:
    print("With chunk=1 every sample has one action, the demonstrator's next, which always counts.")

# %% [markdown]
# ## Normalisation
#
# Z-scoring subtracts the mean and divides by the standard deviation, so that every dimension has
# the same weight in the loss. Rotations are small; after z-scoring they count as much as
# translations, which is not always an advantage. The gripper command stays -1 or +1. The statistics
# come from the training split alone and are saved with the checkpoint.

# %%
batch = next(train_data.batches(512, seed=0, epoch=0))
raw = train_data.normalizer.denormalize(batch["actions"].flatten(0, -2))  # (N, 7)
scaled = ActionNormalizer("zscore").fit(raw).normalize(raw)
display(pd.DataFrame({"mean before": raw.mean(0), "std before": raw.std(0),
                      "mean after": scaled.mean(0), "std after": scaled.std(0)},
                     index=schema.ACTION_NAMES).round(3))
spread = raw[:, :schema.ARM_DIM].std(0)
print(f"Before, the standard deviations of the arm's six numbers differ by a factor of "
      f"{spread.max() / spread.min():.0f}. This preset trains with "
      f"normalize_actions={train_data.normalizer.mode!r}.")

# %% [markdown]
# ## Augmentation
#
# Augmentation randomly changes the images of each sample, so that the policy does not rely on
# single pixels: "shift" changes the brightness and moves the image by up to a sixteenth of its
# side. Compare the rows: the scene must stay recognisable. Only training samples are augmented.

# %%
camera = config.model.cameras[0]
spread = range(0, len(val_data), -(-len(val_data) // 6))
originals = val_data.batch(spread)["observations"][camera][:, 0]
augmented = augment_images(originals, config.data.augmentation, torch.Generator().manual_seed(0))
fig = plots.plot_augmentation(originals, augmented)
plots.save_figure(fig, folder / "figures" / "02_augmentation.png")
display(fig)

# %%
changes = 255 * (augmented - originals).abs().flatten(1).mean(dim=1)  # grey levels
print(f"Augmentation {config.data.augmentation!r} changed {(changes > 0).sum()} of {len(changes)} "
      f"images, by {changes.mean():.0f} grey levels of 255 per pixel on average.")

# %% [markdown]
# ## A training batch
#
# A batch mixes samples of all training demonstrations. Their order depends only on the seed and the
# epoch, so that a run can be repeated. An epoch visits each sample `frame_stride` times. The bars
# show the first target action of each sample. Does it fit the image? Where the gripper holds the
# object, `gripper` should be +1; where it is open and high above the table, `dz` should usually be
# negative.

# %%
batch = next(train_data.batches(config.train.batch_size, seed=0, epoch=0))
again = next(train_data.batches(config.train.batch_size, seed=0, epoch=0))
fig = plots.plot_batch(batch)
plots.save_figure(fig, folder / "figures" / "02_batch.png")
display(fig)

# %%
same = all(torch.equal(value, again["observations"][name])
           for name, value in batch["observations"].items())
first = batch["actions"].flatten(0, 1).reshape(len(batch["actions"]), -1, schema.ACTION_DIM)[:, 0]
print(f"Asked for twice, the batch is {'the same' if same else 'another'}. "
      f"{100 * (first[:, schema.GRIPPER_INDEX] > 0).float().mean():.0f} % of its samples close the "
      "gripper.")

# %% [markdown]
# ## Loading speed
#
# Loading should be faster than training. `storage` decides where the frames are kept: `ram` in main
# memory, already resized for the network; `mmap` in the files, read and resized for each batch;
# `gpu` in the GPU's memory. All three give the same batches; `auto`, the default, is `gpu` where a
# GPU trains and the frames fit, otherwise `ram`. The memory needed is printed before it is
# allocated; if it is not available, loading fails at once with an error. `docs/loading.md` compares
# the speed with other loaders.

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
speeds = pd.DataFrame(rows).round()
display(speeds)
fastest = speeds.iloc[speeds.iloc[:, 1].argmax()]
print(f"Fastest here: storage={fastest.iloc[0]!r}. This preset uses {config.data.storage!r}.")

# %% [markdown]
# ## Exercises
#
# **1.** Suppose steps were split at random instead of demonstrations. How different would a
# validation image be from its nearest neighbour in the training set? Compare the images of
# neighbouring steps with images of other moments.
#
# <details><summary>Answer</summary>
#
# Hardly different at all: neighbouring images differ far less than random ones. The validation loss
# would measure memorisation, not generalisation.
#
# ```python
# images = val_data.batch(range(len(val_data)))["observations"][camera][:, 0]  # (N, H, W, 3)
# neighbours = 255 * (images[1:] - images[:-1]).abs().mean()
# others = 255 * (images - images[torch.randperm(len(images))]).abs().mean()
# print(f"grey levels between neighbours {neighbours:.1f}, between random images {others:.1f}")
# assert neighbours < others
# ```
#
# </details>
#
# **2.** How many actions of a demonstration without pushes are masked, with chunks of K actions?
# Does the number depend on the length of the demonstration?
#
# <details><summary>Answer</summary>
#
# K (K - 1) / 2, for every length of at least K steps: the chunk that begins at the last step lacks
# K - 1 actions, the one before it K - 2, and so on. Pushes can only add to it. With `frame_stride`
# above 1, chunks begin at fewer of these steps.
#
# ```python
# lacking = [max(0, step + K - length) for step in range(length)]
# print(f"past the end: {int(beyond.sum())}; masked in all: {int((chosen == 0).sum())}")
# assert sum(lacking) == K * (K - 1) // 2 and beyond.sum() == sum(lacking[::demo.frame_stride])
# assert (chosen[beyond] == 0).all() and (chosen == 0).sum() == beyond.sum() + after_push.sum()
# ```
#
# </details>

# %% [markdown]
# Next: `03_model` builds the network that is trained on these samples.
