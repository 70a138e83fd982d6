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
# observations. The run folder is complete after every epoch: weights, settings and one line of
# metrics. Interrupt at any time; the same `run_name` resumes. Without `run_name`, an unchanged
# preset is stored under its own name; a changed preset gets a new folder named after suite,
# network, seed and time.
#
# A low loss is not the goal. It measures agreement with the demonstrator along demonstrated
# trajectories; success at the task is measured in the simulator (`06_eval`).
#
# To train with the best settings of `05_search`, run
# `papermill 04_train.ipynb out.ipynb -f .../best.yaml`. Pass lists as YAML:
# `-y "task_ids: [0, 1]"`. To use two GPUs, train from the command line and open this notebook
# afterwards for the curves:
# `torchrun --nproc_per_node 2 -m trm_helpers train demo --run-name my-run`.

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty: the preset's, or a new one (see above)
suite = None  # type: str; LIBERO suite; None keeps the preset's
task_ids = None  # type: list; task indices in the suite; None keeps the preset's
num_demos = None  # type: int; demonstrations to collect per task; None keeps the preset's
variant = None  # type: str; block, trm, transformer or act; None keeps the preset's
num_recursions = None  # type: int; recursions (of trm: supervision steps); None keeps the preset's
epochs = None  # type: int; passes over the training samples; None keeps the preset's
lr = None  # type: float; learning rate at the start; None keeps the preset's
seed = None  # type: int; initial weights and order of the samples; None keeps the preset's
# the others
demos = None  # type: str; auto, human or scripted; None keeps the preset's
demo_dir = None  # type: str; folder of *_demo.hdf5 files; None searches data/ and Kaggle's input
placement = None  # type: str; object layouts, benchmark or wide (randomised); None: the preset's
scenes = None  # type: int; scenes per demonstration to train a localizer; None: the preset's
max_demos_per_task = None  # type: int; demonstrations read per task, 0 all; None keeps the preset's
storage = None  # type: str; where frames are kept: ram, mmap or gpu; None keeps the preset's
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
from functools import partial

import pandas as pd

from trm_helpers import BehaviorCloningTrainer
from trm_helpers.config import check_parameters, from_flat
from trm_helpers.demos.collect import ensure_demonstrations
from trm_helpers.evaluation.evaluate import selection_rate, selection_success
from trm_helpers.policy.keypoints import trained_localizer
from trm_helpers.stats import format_success
from trm_helpers.training.runs import create_run
from trm_helpers.visuals import plots

# %%
check_parameters(selection_episodes=selection_episodes, resume=resume)
config = from_flat(
    preset, more, suite=suite, task_ids=task_ids, demos=demos, demo_dir=demo_dir,
    num_demos=num_demos, placement=placement, scenes=scenes, max_demos_per_task=max_demos_per_task,
    storage=storage, augmentation=augmentation, epochs=epochs, batch_size=batch_size, lr=lr,
    loss=loss, variant=variant, conditioning=conditioning, hidden_dim=hidden_dim,
    num_recursions=num_recursions, deep_supervision=deep_supervision, halting=halting,
    gripper=gripper, image_size=image_size,
    chunk=chunk, execution_horizon=execution_horizon, seed=seed, patience=patience,
    rollout_every=rollout_every, max_minutes=max_minutes, stop_epoch=stop_epoch,
    num_threads=num_threads, wandb_mode=wandb_mode)
usual = preset if config == from_flat(preset) else ""
run = create_run(config, run_name or usual, resume)
files = ensure_demonstrations(config)

# %% [markdown]
# ## Train
#
# Each update computes the `loss` between predicted and demonstrated actions of a batch and takes
# one AdamW step. The learning rate follows a cosine from `lr` to 1e-6. The progress bar counts
# updates and shows the losses of the last epoch.

# %%
trainer = BehaviorCloningTrainer.from_config(config, files, run, selection_rate(run, config),
                                             partial(trained_localizer, run, config))
print(f"{len(trainer.train_data)} training samples, {trainer.precision} on {trainer.device}")
metrics = trainer.fit()

# %% [markdown]
# ## Curves
#
# Training and validation loss both measure the error of the final action and are comparable. The
# minimised `objective` adds the terms of deep supervision, of learned halting and, with
# `variant="act"` (Action Chunking with Transformers), of its latent style. The training loss is
# measured on augmented samples before each update.
#
# Both losses should fall, and the validation loss should level out rather than rise. A training
# loss far below it indicates overfitting: more demonstrations or stronger augmentation help, more
# epochs do not. The star marks the epoch of the `best` weights: the lowest validation loss or, with
# `rollout_every`, the highest success rate.

# %%
fig = plots.plot_training_curves(metrics)
plots.save_figure(fig, run / "figures" / "04_training.png")
fig

# %% [markdown]
# The last epochs. `grad_norm` is the gradient norm before clipping; if it jumps, lower `lr`.

# %%
pd.DataFrame(metrics).tail().round(6)

# %% [markdown]
# ## Does it succeed?
#
# With `selection_episodes` above 0, the last weights are rolled out from sampled layouts. A search
# ranks trials by this success rate. The official init states are reserved for `06_eval`.

# %%
if selection_episodes and trainer.finished:
    print(format_success(selection_success(run, config, selection_episodes,
                                           ledger=run / "selection.jsonl")))

# %% [markdown]
# ## The run folder
#
# The next notebooks read the run folder: settings, weights (`best`, `last`), metrics per epoch and
# `training_state.pt`, from which training resumes.

# %%
print(run)
pd.DataFrame([{"file": path.name, "kB": path.stat().st_size // 1000}
              for path in sorted(run.iterdir()) if path.is_file()])

# %% [markdown]
# Next: `05_search` compares other settings; `06_eval` evaluates the policy in the simulator.
