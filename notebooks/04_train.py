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
# The policy is shown what the demonstrator saw and corrected towards what the demonstrator did.
# After every epoch the run folder is complete: weights, settings, one line of measurements. Start
# the notebook again with the same `run_name` and it goes on where it was. Without a name the preset
# as it is goes to the folder of its name, and one with other settings to a new folder, named after
# suite, network, seed and time.
#
# A low loss is not the goal. It says that the policy agrees with the demonstrator on the
# demonstrator's own path; whether it can *do* the task only the simulator tells (`06_eval`).
#
# What `05_search` found best can be used here: `papermill 04_train.ipynb -f .../best.yaml`. A list
# is given as YAML on the command line: `-y "task_ids: [0, 1]"`. With two GPUs, train outside of the
# notebook, each process on one of them, and open this one afterwards for the curves:
# `torchrun --nproc_per_node 2 -m trm_helpers train demo --run-name my-run`.

# %% tags=["parameters"]
preset = "demo"  # type: str; reference, demo, trm or tiny (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty: the preset's, or a new one (see below)
suite = None  # type: str; LIBERO suite; None keeps the preset's
task_ids = None  # type: list; task indices in the suite; None keeps the preset's
demos = None  # type: str; auto, human or scripted; None keeps the preset's
demo_dir = None  # type: str; folder with *_demo.hdf5 to use; None searches data/ and Kaggle's input
num_demos = None  # type: int; demonstrations to collect per task; None keeps the preset's
placement = None  # type: str; of objects, benchmark or wide (anywhere); None: the preset's
scenes = None  # type: int; drawn around each demonstration, to learn first where things are
max_demos_per_task = None  # type: int; demonstrations read per task, 0 all; None keeps the preset's
storage = None  # type: str; of the frames: ram, mmap or gpu; None keeps the preset's
augmentation = None  # type: str; none, brightness, colour, reference, shift or cutout
epochs = None  # type: int; passes over the training samples; None keeps the preset's
batch_size = None  # type: int; samples per update; None keeps the preset's
lr = None  # type: float; learning rate at the start; None keeps the preset's
loss = None  # type: str; mse, l1 or mix; None keeps the preset's
variant = None  # type: str; block, trm, transformer or act; None keeps the preset's
conditioning = None  # type: str; none, task_id or language; None keeps the preset's
hidden_dim = None  # type: int; width of the state; None keeps the preset's
num_recursions = None  # type: int; recursions (of trm: supervision steps); None keeps the preset's
deep_supervision = None  # type: bool; grade the answer of every recursion; None: the preset's
halting = None  # type: str; fixed, remainder, act, learned or convergence; None: the preset's
gripper = None  # type: str; continuous, threshold, classifier, binary or mixture; None: preset's
image_size = None  # type: int; pixels; None keeps the preset's
chunk = None  # type: int; future actions predicted at once; None keeps the preset's
execution_horizon = None  # type: int; how many of them are executed; None keeps the preset's
seed = None  # type: int; initial weights and order of the samples; None keeps the preset's
patience = None  # type: int; epochs without progress to stop after, 0 never; None keeps the preset's
rollout_every = None  # type: int; epochs between rollouts that choose best; None: the preset's
max_minutes = None  # type: float; save and stop after so long; None keeps the preset's
stop_epoch = None  # type: int; end after so many of the epochs, 0 all; None keeps the preset's
num_threads = None  # type: int; CPU threads; None keeps the preset's
wandb_mode = None  # type: str; disabled, offline or online; None keeps the preset's
selection_episodes = 0  # type: int; rollouts per task at the end, from drawn placements
more = {}  # type: dict; any other settings by name, such as {"ema_decay": 0.999}
resume = True  # type: bool; go on with a run folder that exists; False refuses it

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
# Each update shows the policy a batch, measures how far its actions are from the demonstrator's
# (`loss`), and moves the weights a little against the gradient. The learning rate falls along a
# cosine, from `lr` to almost nothing. The bar counts updates; behind it stand the last epoch's
# losses.

# %%
trainer = BehaviorCloningTrainer.from_config(config, files, run, selection_rate(run, config),
                                             partial(trained_localizer, run, config))
print(f"{len(trainer.train_data)} training samples, {trainer.precision} on {trainer.device}")
metrics = trainer.fit()

# %% [markdown]
# ## Curves
#
# Both losses are of the final answer, so that they can be compared; what training minimises
# (`objective` below) adds the terms of deep supervision, learned halting and ACT's style. The
# training loss is measured on augmented samples, before each update.
#
# Both losses should fall and the validation loss should level out rather than rise. A training
# loss that falls far below it says that the demonstrations are being learned by heart: more
# demonstrations or more augmentation help, more epochs do not. The star is the epoch whose weights
# are kept as `best`: that of the lowest validation loss or, with `rollout_every`, of the most
# successes.

# %%
fig = plots.plot_training_curves(metrics)
plots.save_figure(fig, run / "figures" / "04_training.png")
fig

# %% [markdown]
# The last epochs in numbers. `grad_norm` is the gradient's length before it is clipped to 1: when
# it jumps, lower `lr`.

# %%
pd.DataFrame(metrics).tail().round(6)

# %% [markdown]
# ## Does it succeed?
#
# With `selection_episodes` the last weights act in the simulator, from placements that are drawn:
# the official init states are left to `06_eval`, which reports. A search ranks by this.

# %%
if selection_episodes and trainer.finished:
    print(format_success(selection_success(run, config, selection_episodes,
                                           ledger=run / "selection.jsonl")))

# %% [markdown]
# ## What there is now
#
# Everything that the next notebooks need is in the run folder: settings, weights (`best`, `last`),
# measurements per epoch, and `training_state.pt`, from which training goes on.

# %%
print(run)
pd.DataFrame([{"file": path.name, "kB": path.stat().st_size // 1000}
              for path in sorted(run.iterdir()) if path.is_file()])

# %% [markdown]
# Next: `05_search` asks whether other settings would have done better, `06_eval` lets the policy
# act.
