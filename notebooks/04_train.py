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
# # 04 Behaviour cloning
#
# Behaviour cloning trains the policy to reproduce the demonstrators' actions from the same
# observations.
#
# **What you will learn**
# - how to write a training loop in ten lines, and what the real trainer adds to it
# - how to read loss curves: when training is finished, and what overfitting looks like
# - why a low loss is not the goal: the loss measures agreement with the demonstrator along
#   demonstrated trajectories; success at the task is measured in the simulator (`06_eval`)
# - how to stop, resume and repeat a training run, and what a run folder holds
#
# **Time**: 10 minutes to read; 4 to run (preset `demo`, two CPU cores).
# **Needs** demonstrations (collected if missing, see `00_setup`). **Writes** a run folder
# `artifacts/<run_name>/`, complete after every epoch: weights, settings, metrics, a figure.
#
# Interrupt at any time; the same `run_name` resumes. Without `run_name`, an unchanged preset is
# stored under its own name; a changed preset gets a new folder named after suite, network, seed and
# time. To train with the best settings of `05_search`, run `papermill 04_train.ipynb
# ../artifacts/trained.ipynb -f ../artifacts/demo/search/best.yaml`. Pass lists as YAML: `-y
# "task_ids: [0, 1]"`.
#
# `actor="demo", num_demos=40` is an iteration of DAgger (dataset aggregation): the policy of the
# run `demo` acts in new episodes, the expert labels every step, and a new run is trained on the
# demonstrations of `demo` and these episodes, which show how to correct the errors of that policy.

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty: the preset's, or a new one (see above)
suite = None  # type: str; LIBERO suite; None keeps the preset's
task_ids = None  # type: list; task indices in the suite; None keeps the preset's
num_demos = None  # type: int; demonstrations to collect per task; None keeps the preset's
variant = None  # type: str; block, trm, transformer or act; None keeps the preset's
num_recursions = None  # type: int; recursions per decision; None keeps the preset's
epochs = None  # type: int; passes over the training demonstrations; None keeps the preset's
lr = None  # type: float; learning rate at the start; None keeps the preset's
seed = None  # type: int; initial weights and order of the samples; None keeps the preset's
# the others
demos = None  # type: str; auto, human or scripted; None keeps the preset's
demo_dir = None  # type: str; folder of *_demo.hdf5 files; None searches data/ and Kaggle's input
placement = None  # type: str; object layouts, benchmark or wide (randomised); None: the preset's
frame_stride = None  # type: int; steps per rendered frame: 1 renders all; None: the preset's
actor = None  # type: str; run that acts while the expert labels (DAgger); None: the expert acts
beta = None  # type: float; with actor: probability that the expert acts in a decision; None: 0.5
scenes = None  # type: int; scenes per demonstration to train a localizer; None: the preset's
looks = None  # type: int; with scenes: how often the localizer looks again; None: the preset's
max_demos_per_task = None  # type: int; demonstrations read per task, 0 all; None keeps the preset's
storage = None  # type: str; where frames are kept: auto, ram, mmap or gpu; None keeps the preset's
augmentation = None  # type: str; none, brightness, colour, reference, shift or cutout
batch_size = None  # type: int; samples per update; None keeps the preset's
loss = None  # type: str; mse, l1 or mix; None keeps the preset's
conditioning = None  # type: str; none, task_id or language; None keeps the preset's
hidden_dim = None  # type: int; width of the state; None keeps the preset's
deep_supervision = None  # type: bool; a loss after every recursion; None keeps the preset's
halting = None  # type: str; fixed, remainder, adaptive, learned or convergence; None keeps it
gripper = None  # type: str; continuous, threshold, classifier, binary or mixture; None: preset's
image_size = None  # type: int; pixels; None keeps the preset's
chunk = None  # type: int; future actions predicted at once; None keeps the preset's
execution_horizon = None  # type: int; how many of them are executed; None keeps the preset's
patience = None  # type: int; stop after this many epochs without progress, 0 never; None: preset's
rollout_every = None  # type: int; epochs between rollouts that select best; None: the preset's
max_minutes = None  # type: float; save and stop after this time; None keeps the preset's
stop_epoch = None  # type: int; stop after this epoch, 0 trains all; None keeps the preset's
num_threads = None  # type: int; CPU threads; None keeps the preset's
wandb_mode = None  # type: str; disabled, offline or online; None keeps the preset's
selection_episodes = 0  # type: int; rollouts per task at the end, from sampled layouts
more = {}  # type: dict; any other settings by name, such as {"ema_decay": 0.999}
resume = True  # type: bool; continue an existing run folder; False refuses it

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
import copy
import math

import pandas as pd
import torch
from IPython.display import display

from trm_helpers.config import check_parameters, from_flat
from trm_helpers.evaluation.actor import actor_of
from trm_helpers.evaluation.evaluate import selection_success, trainer_of
from trm_helpers.stats import format_success
from trm_helpers.training.runs import create_run
from trm_helpers.training.train import GRAD_CLIP
from trm_helpers.visuals import plots

# %%
check_parameters(selection_episodes=selection_episodes, resume=resume)
config = from_flat(
    preset, more, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
    num_demos=num_demos, placement=placement, frame_stride=frame_stride, actor=actor,
    beta=beta, scenes=scenes, looks=looks, max_demos_per_task=max_demos_per_task, storage=storage,
    augmentation=augmentation, epochs=epochs, batch_size=batch_size, lr=lr, loss=loss,
    variant=variant, conditioning=conditioning, hidden_dim=hidden_dim,
    num_recursions=num_recursions, deep_supervision=deep_supervision, halting=halting,
    gripper=gripper, image_size=image_size, chunk=chunk, execution_horizon=execution_horizon,
    seed=seed, patience=patience, rollout_every=rollout_every, max_minutes=max_minutes,
    stop_epoch=stop_epoch, num_threads=num_threads, wandb_mode=wandb_mode)
usual = preset if config.fixed() == from_flat(preset).fixed() else ""
run = create_run(config, run_name or usual, resume)
files = session.demonstrations(config, actor_of(config))

# %%
trainer = trainer_of(config, files, run)
print(f"{len(trainer.train_data)} training samples, {trainer.train_data.epoch_size} per epoch, "
      f"{trainer.precision} on {trainer.device}")

# %% [markdown]
# ## A training loop by hand
#
# The whole idea in ten lines, on one batch and a copy of the new policy: predict, compare with the
# demonstrated actions, follow the gradient. The loss of that batch has to fall; a policy that
# cannot even memorise one batch has a bug, and this is the first test to run on any new network.

# %%
batch = next(trainer.train_data.batches(config.train.batch_size, config.train.seed, epoch=0,
                                        device=trainer.device))
by_hand, losses = copy.deepcopy(trainer.policy).train(), []
optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3)
with torch.random.fork_rng():  # the training below is not affected
    for _step in range(30):
        optimizer.zero_grad()
        objective, _parts = by_hand.loss(batch, config.train.loss)  # forward pass and error
        objective.backward()  # gradients of all weights
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), GRAD_CLIP)
        optimizer.step()
        losses.append(objective.item())
print(f"Loss of the batch: {losses[0]:.3f} before the first update, {losses[-1]:.3f} before the "
      f"30th ({len(batch['actions'])} samples).")
assert losses[-1] < losses[0]

# %% [markdown]
# ## Train
#
# The trainer runs the same loop over all batches of every epoch, in an order that depends on seed
# and epoch only. It adds what a real training needs: the learning rate follows a cosine from `lr`
# to 1e-6, an average of the weights is kept (`ema_decay`), the validation split is measured after
# every epoch, and everything is saved. Its first loss is the one computed by hand above, up to the
# rounding of the faster number format (bf16 or fp16).

# %%
metrics = trainer.fit()
assert math.isclose(trainer.first_loss, losses[0], rel_tol=0.05)

# %% [markdown]
# ## Curves
#
# Training and validation loss both measure the error of the final answer and are comparable. The
# minimised `objective` adds the terms of deep supervision, of learned halting and, with
# `variant="act"` (Action Chunking with Transformers), of its variational latent. The training loss
# is measured on augmented samples before each update.
#
# Both losses should fall, and the validation loss should level out rather than rise. A training
# loss far below it indicates overfitting: more demonstrations or stronger augmentation help, more
# epochs do not. The star marks the epoch of the `best` weights: the lowest validation loss or, with
# `rollout_every`, the highest success rate.

# %%
fig = plots.plot_training_curves(metrics)
plots.save_figure(fig, run / "figures" / "04_training.png")
display(fig)

# %%
lowest, last = min(metrics, key=lambda row: row["val_loss"]), metrics[-1]
rise = 100 * (last["val_loss"] / lowest["val_loss"] - 1)
ratio = last["val_loss"] / last["train_loss"]
before = metrics[-len(metrics) // 10 - 1:][0]  # a tenth of the epochs earlier
falls = last["val_loss"] < 0.97 * before["val_loss"]
trend = "rises" if rise > 5 else "still falls: train longer" if falls else "levels out"
trend = trend if len(metrics) >= 10 else "has too few epochs for a trend"
print(f"The validation loss {trend}. Its lowest, {lowest['val_loss']:.4f}, is in epoch "
      f"{lowest['epoch']} of {last['epoch']}; at the end it is {rise:.0f} % higher and {ratio:.1f} "
      f"times the training loss, {'a' if ratio > 1.5 else 'no'} sign of overfitting.")

# %% [markdown]
# The last epochs. `grad_norm` is the gradient norm before clipping; if it jumps, lower `lr`.

# %%
display(pd.DataFrame(metrics).tail().round(6))

# %% [markdown]
# ## Does it succeed?
#
# With `selection_episodes` above 0, the weights of the last epoch are rolled out from sampled
# layouts; searches rank their trials by this success rate. The official init states are reserved
# for `06_eval`, which plays `best`, the weights of the epoch with the lowest validation loss.

# %%
if not selection_episodes:
    print("Not run: set selection_episodes=10 for ten rollouts per task (about one minute on two "
          "CPU cores).")
elif trainer.finished:
    print(format_success(selection_success(run, config, selection_episodes,
                                           ledger=run / "selection.jsonl")))
else:
    print(f"Not run: training stopped after {last['epoch']} epochs. Run this notebook again.")

# %% [markdown]
# ## The run folder
#
# The next notebooks read the run folder: settings, weights (`best`, `last`), metrics per epoch and
# `training_state.pt`, from which training resumes.

# %%
print(run)
display(pd.DataFrame([{"file": path.name, "kB": path.stat().st_size // 1000}
                      for path in sorted(run.iterdir()) if path.is_file()]))

# %% [markdown]
# ## Two GPUs
#
# With two T4s, a second seed trains on the second GPU while the policy of the first seed is
# evaluated (the first GPU only renders). `kaggle_all` does this; in a terminal, after `demo`:
#
# ```bash
# CUDA_VISIBLE_DEVICES=1 python -m trm_helpers train demo --seed 1 --run-name demo-seed1 &
# CUDA_VISIBLE_DEVICES=0 python -m trm_helpers evaluate demo
# wait
# ```
#
# `torchrun --nproc_per_node 2 -m trm_helpers train demo --run-name my-run` trains one policy on
# both; open this notebook with that `run_name` afterwards for its curves.

# %% [markdown]
# ## Exercises
#
# **1.** Gradients are clipped at norm 1. Suppose that they were not, and that all were a thousand
# times larger. How far could the first AdamW update move a weight?
#
# <details><summary>Answer</summary>
#
# By at most the learning rate (without weight decay), whatever the gradient: Adam divides each
# gradient by a running average of its own size, and in the first step that is the gradient itself.
# Clipping protects those averages, and with them the next steps, from one extreme batch.
#
# ```python
# fresh = copy.deepcopy(by_hand)
# optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-3, weight_decay=0.0)
# fresh.loss(batch, config.train.loss)[0].mul(1000).backward()
# optimizer.step()
# largest = max((new - old).abs().max().item()
#               for new, old in zip(fresh.parameters(), by_hand.parameters(), strict=True))
# print(f"largest change of a weight: {largest:.6f} with a learning rate of 0.001")
# assert largest < 1.01e-3
# ```
#
# </details>
#
# **2.** The learning rate falls along a cosine over all epochs. Write it as a formula of the epoch,
# and check it against the column `lr` of the metrics. What happens if you double `epochs` after
# half of them?
#
# <details><summary>Answer</summary>
#
# The learning rate in an epoch depends on the number of epochs planned, so training for 70 epochs
# is not the first half of training for 140, halfway through which the learning rate is still half
# of its initial value. That is why `epochs` cannot be changed when a run is resumed.
#
# ```python
# rates = [1e-6 + (config.train.lr - 1e-6)
#          * (1 + math.cos(math.pi * row["epoch"] / config.train.epochs)) / 2 for row in metrics]
# print(f"learning rate after epoch 1: {rates[0]:.3g}, after epoch {len(rates)}: {rates[-1]:.3g}")
# assert all(math.isclose(row["lr"], rate, rel_tol=1e-3, abs_tol=1e-7)
#            for row, rate in zip(metrics, rates, strict=True))
# ```
#
# </details>

# %% [markdown]
# Next: `05_search` compares other settings; `06_eval` evaluates the policy in the simulator.
