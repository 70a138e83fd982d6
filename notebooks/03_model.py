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
# # 03 The recursive policy
#
# A recursive policy applies one small block repeatedly to its own output and to the encoded
# observation. More recursions cost time but no parameters. This notebook writes the recursion out,
# line by line, and checks that it is wired correctly: a faulty loop can give the same output after
# every step without anyone noticing. Whether depth helps is measured in `07_visualize`.
#
# **What you will learn**
# - the two recursions of this package, `block` and `trm`, in ten lines each;
# - what the answer `y` and the latent `z` are, and how an action forms on a real observation;
# - a third recursion, which looks at something new in every step;
# - four checks that every recursive network should pass, and what a recursion costs.
#
# **Time**: 14 minutes to read; less than one to run (preset `demo`, two CPU cores).
#
# **Needs** no other notebook. A demonstration of `00_setup` and the trained run of `04_train` are
# used if they exist. **Writes** four figures to the run folder.

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty takes the preset's name
suite = None  # type: str; LIBERO suite; None keeps the preset's
task_ids = None  # type: list; task indices in the suite; None keeps the preset's
variant = None  # type: str; block, trm, transformer or act; None keeps the preset's
num_recursions = None  # type: int; recursions per decision; None keeps the preset's
# the others
hidden_dim = None  # type: int; width of the state; None keeps the preset's
halting = None  # type: str; fixed, remainder, adaptive, learned or convergence; None keeps it

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

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import display

from trm_helpers import RecursiveBlock, TRMPolicy, load_policy, paths, schema
from trm_helpers.config import from_flat
from trm_helpers.demos.demo_files import demo_names, frame_stride, open_demo_file
from trm_helpers.demos.find_demos import survey_demonstrations
from trm_helpers.policy.keypoints import load_localizer
from trm_helpers.policy.localizer import crops
from trm_helpers.policy.model import count_parameters
from trm_helpers.policy.recursion import TRMBlock, recurse_fixed
from trm_helpers.sim.env import load_task
from trm_helpers.visuals import figure, keypoint_plots, plots, unrolled

# %%
folder = paths.run_dir(run_name or preset)
config = from_flat(preset, suite=suite, task_ids=task_ids, variant=variant, hidden_dim=hidden_dim,
                   num_recursions=num_recursions, halting=halting)
torch.manual_seed(0)
policy = TRMPolicy(config.model).eval()  # untrained
model = config.model
print(f"variant={model.variant!r}, hidden_dim={model.hidden_dim}, "
      f"num_recursions={model.num_recursions}, halting={model.halting!r}; {len(model.cameras)} "
      f"camera(s) of {model.image_size} pixels, {model.chunk} action(s) per decision")

# %% [markdown]
# ## Two recursions
#
# `x` encodes the observation: the camera images and, in some presets, the proprioception (the
# robot's own joint and gripper readings) and the task. It is computed once, does not change, and
# enters every recursion, so that no state has to remember it. In the figure, the dashed parts
# repeat with the same weights; the state (`h`, or `y` and `z`) is carried over. This notebook uses
# four words:
#
# | word | in `block` | in `trm` |
# |---|---|---|
# | application | one pass through the block | one pass through the network `net` |
# | cycle | none | n applications for the latent, one for the answer |
# | recursion | one application | T cycles |
# | decision | `num_recursions` recursions, then K actions | the same |

# %%
display(figure.RECURSIONS)

# %% [markdown]
# ## The recursion, line by line
#
# `variant="block"`: the state `h` and the encoded observation `x` are one vector of width D per
# observation. A recursion adds `x` to the state, then applies self-attention and an MLP, each with
# a residual connection and LayerNorm. The state is a single token, so attention has nothing to
# choose from and is a linear map (exercise 2). All recursions share the same weights. The assertion
# compares these lines with `trm_helpers/policy/recursion.py`.

# %%
width, heads, recursions = config.model.hidden_dim, schema.NUM_HEADS, 4
block = RecursiveBlock(width, heads).eval()
x = torch.randn(2, width)  # (B, D): two encoded observations
h = x  # the initial state
for _ in range(recursions):
    tokens = (h + x).unsqueeze(1)  # (B, 1, D)
    attended, _ = block.attention(tokens, tokens, tokens, need_weights=False)
    tokens = block.attention_norm(tokens + attended)
    h = block.mlp_norm(tokens + block.mlp(tokens)).squeeze(1)  # (B, D)

packaged = recurse_fixed(block, x, x, recursions).output
torch.testing.assert_close(h, packaged)
print(f"{recursions} recursions by hand and by the package: h {tuple(h.shape)} differs by at most "
      f"{(h - packaged).abs().max():.1g}")

# %% [markdown]
# `variant="trm"`, the recursion of Tiny Recursive Models: `x` is a sequence of tokens, and the
# state is an answer `y`, from which the actions are read, and a latent `z` of the same shape, a
# working memory that only the network itself reads. In a cycle one network updates the latent `n`
# times, from observation, answer and latent, and then the answer once, from answer and latent. A
# recursion is `T` cycles. The policy reads its actions from the last K tokens of `y`. `net` is two
# transformer layers (self-attention and a gated MLP).
#
# With `deep_supervision` (preset `trm`), training adds rules of the paper: the answer of every
# recursion has a loss, and each recursion starts from the detached state of the one before.
# Gradients always flow only through the last cycle of a recursion.

# %%
n, cycles, K = 2, 2, 3  # n and T, in the paper 6 and 3; K actions
block = TRMBlock(width, heads, num_layers=2, chunk=K, latent_updates=n, cycles=cycles).eval()
x = torch.randn(2, 10, width)  # (B, N, D): tokens of two observations, the last K for the actions
first = block.initial_state(x)  # (B, 2, N, D): y and z, the same for every observation
y, z = first[:, 0], first[:, 1]
for _ in range(recursions * cycles):
    for _ in range(n):
        z = block.net(x + y + z)
    y = block.net(y + z)

packaged = recurse_fixed(block, x, first, recursions).output
torch.testing.assert_close(y[:, -K:], packaged)
print(f"{recursions} recursions by hand and by the package: y of the {K} actions "
      f"{tuple(packaged.shape)} differs by at most {(y[:, -K:] - packaged).abs().max():.1g}")

# %% [markdown]
# ## Parameters
#
# Where are the parameters? The block is shared by all `num_recursions` recursions. A recursion
# applies its network once in `block` and `cycles * (latent_updates + 1)` times in `trm`. The other
# variants, `transformer` and `act` (Action Chunking with Transformers), are baselines that apply
# their network once.

# %%
parts = pd.Series(count_parameters(policy), name="parameters")
display(parts.to_frame())
shares = 100 * parts / parts.sum()
print(f"{parts.sum():,} parameters in all: {shares['encoders']:.0f} % in the image encoders, "
      f"{shares['block']:.0f} % in the block that recurses.")

# %% [markdown]
# ## Shapes
#
# What passes through the network? A batch of two random observations: images -> one vector x of
# width D -> a state of the same width before and after every recursion -> seven numbers per future
# action. With `variant="trm"`, x is a sequence of tokens: of the images, of the proprioception, of
# the task, and one per future action, from which the answer is read.

# %%
size = config.model.image_size
observations = {camera: torch.rand(2, size, size, 3) for camera in config.model.cameras}
observations |= {"proprio": torch.randn(2, schema.PROPRIO_DIM),
                 "task_id": torch.zeros(2, dtype=torch.int64),
                 "language": torch.randn(2, schema.LANGUAGE_DIM)}
encoded = policy.encode(observations)
actions, states = policy(observations, return_all_states=True)
print(f"x {tuple(encoded.shape)} | {len(states)} states {tuple(states[-1].shape)}, the initial one "
      f"included | actions {tuple(actions.shape)}")

# %% [markdown]
# ## Does the recursion have an effect?
#
# Four checks of the loop:
#
# 1. one recursion and eight give different actions;
# 2. the number of parameters does not depend on the number of recursions;
# 3. the observation reaches the last recursion: its gradient there is not zero;
# 4. the actions stay finite far beyond the configured depth.

# %%
with torch.inference_mode():
    once, often, far = (policy(observations, num_recursions=n) for n in (1, 8, 64))
deeper = TRMPolicy(config.replace(num_recursions=4 * config.model.num_recursions).model)
x = encoded.detach().requires_grad_()
carry = policy.recurse(encoded).carry.detach()  # the final state, as a constant
policy.recurse(x, 1, carry=carry).output[..., 0].sum().backward()  # gradient of one feature

# %%
change = (once - often).abs().max().item()
more = sum(count_parameters(deeper).values()) - parts.sum()
gradient = x.grad.abs().max().item()
print(f"1. largest change of an action from 1 to 8 recursions: {change:.3g}")
print(f"2. parameters added by four times the recursions: {more}")
print(f"3. largest gradient of the observation at the last recursion: {gradient:.3g}")
print(f"4. largest action after 64 recursions: {far.abs().max().item():.3g}")
recursive = model.variant in schema.RECURSIVE
assert (change > 1e-6) == recursive
assert more == 0 and gradient > 1e-3 and far.isfinite().all()
print("All four hold." if recursive else
      f"The first does not hold: variant={model.variant!r} applies its network once.")

# %% [markdown]
# ## Time per recursion
#
# Milliseconds per decision (one observation) on this machine: the fastest of 20, which other
# programs have disturbed least. The encoder runs once; each further recursion applies the block
# once more.

# %%
single = {name: value[:1] for name, value in observations.items()}
times = {depth: [] for depth in (1, 2, 4, 8, 16)}
for _ in range(20):
    for depth, measured in times.items():
        began = time.perf_counter()
        with torch.inference_mode():
            policy(single, num_recursions=depth)
        measured.append(1000 * (time.perf_counter() - began))
depths, milliseconds = list(times), [min(measured) for measured in times.values()]

# %%
fig = plots.plot_latency(depths, milliseconds)
plots.save_figure(fig, folder / "figures" / "03_latency.png")
display(fig)
each = (milliseconds[-1] - milliseconds[0]) / (depths[-1] - depths[0])
print(f"A decision takes {milliseconds[0]:.1f} ms with one recursion and about {each:.2f} ms more "
      f"for each further one. The {model.execution_horizon} action(s) that are executed before the "
      f"next decision take {1000 * model.execution_horizon / schema.CONTROL_HZ:.0f} ms.")

# %% [markdown]
# ## A real observation
#
# The rest of this notebook looks at one moment of a demonstration: a third of the way through the
# first demonstration of this task. If none has been collected, a stored moment of task 2 of
# LIBERO-Spatial is used instead (`pretrained/spatial-trm/observation.npz`).

# %%
task = load_task(config.data.suite, config.data.task_ids[0])
found, _ = survey_demonstrations([paths.data_dir(), paths.KAGGLE_INPUT], [task.name])
if found:
    with open_demo_file(found[task.name]) as data:
        demonstration = data["data"][demo_names(data)[0]]
        step = len(demonstration["actions"]) // 3
        step -= step % frame_stride(demonstration)  # where a frame was rendered
        observation = {key: demonstration["obs"][key][step]
                       for key in (*schema.CAMERAS, *schema.PROPRIO_KEYS)}
    print(f"step {step} of the first demonstration: {task.language}")
else:
    task = load_task("libero_spatial", 2)
    with np.load(paths.shipped("pretrained") / "spatial-trm" / "observation.npz") as stored:
        observation = dict(stored)
    print(f"no demonstration found; the stored moment: {task.language}")
observation |= {"task_id": task.task_id, "language": task.language}

# %% [markdown]
# ## y and z, cycle by cycle
#
# `spatial-trm` is a trained policy with `variant="trm"` that comes with this package. It has
# learned the ten tasks of LIBERO-Spatial, so its actions mean nothing for other suites. The loop is
# the one above. Here the action head reads the answer `y` after every cycle; in an episode it reads
# it only once, at the end. `y` and `z` start from fixed random values that do not depend on the
# observation, so the action before the first cycle carries no information about it.

# %%
shipped = load_policy("pretrained/spatial-trm")
block, K = shipped.block, shipped.config.chunk
number = task.task_id % 10  # it knows the tasks 0 to 9
inputs = shipped.prepare({**observation, "task_id": number})
with torch.inference_mode():
    x = shipped.encode(inputs)  # (1, N, D)
    y, z = block.initial_state(x).unbind(dim=1)  # (1, N, D) each
    ys, zs = [y], [z]
    for _ in range(shipped.config.num_recursions * block.cycles):
        for _ in range(block.latent_updates):
            z = block.net(x + y + z)
        y = block.net(y + z)
        ys.append(y)
        zs.append(z)
    formed = torch.stack([shipped.head(y[:, -K:])[0][0, 0] for y in ys])  # (cycles + 1, 7)
    torch.testing.assert_close(formed[-1], shipped(inputs)[0, 0])

# %%
changes = {name: [((after - before).norm() / after.norm()).item()
                  for before, after in zip(states, states[1:], strict=False)]
           for name, states in (("y", ys), ("z", zs))}
still = observation[schema.STILL_CAMERA]
fig = unrolled.plot_refinement(still, changes, formed, "spatial-trm: one observation", unit="cycle")
plots.save_figure(fig, folder / "figures" / "03_answer.png")
display(fig)

# %%
distance = (formed - formed[-1]).abs().amax(dim=1)  # of each cycle's action from the last
print(f"The first cycle changes y by {100 * changes['y'][0]:.0f} % of its norm and z by "
      f"{100 * changes['z'][0]:.0f} %, the last y by {100 * changes['y'][-1]:.0f} % and z by "
      f"{100 * changes['z'][-1]:.0f} %.")
print("Largest difference from the final action before the first cycle and after each: "
      + ", ".join(f"{value:.2f}" for value in distance))
print(f"On this observation the action is {distance[1]:.2f} from the final one after the first "
      f"cycle and at most {distance[2:-1].max():.2f} after a later one; commands lie in -1 to 1.")

# %% [markdown]
# ## A recursion that looks again
#
# The recursions above see nothing new between their steps, and more of them did not help on
# LIBERO's tasks. A recursion can help where each step decides what the next one sees.
# `spatial-looks`, which also comes with this package, is a localizer: it estimates where a task's
# object and its target are in the agent view. A first network gives rough estimates from the image
# at half its size. Then one small network is applied six times: it sees the 24 x 24 pixels of the
# full image around each estimate and moves the estimate. After six looks, the estimates of object
# and target are both within 1 % of the image's side in 86 % of 1,000 test images; before the first
# look, in 67 %. On two suites, three seeds each, six looks reach 80 %, and one look trained alone
# 73 %; in the one comparison of episodes so far, policies with six and with one succeed equally
# often (`docs/recursion.md`). The localizer is conditioned on the task's number in LIBERO-Spatial;
# on images of other suites its estimates mean nothing.
#
# To show it at work, we start it 5 pixels to the right of and 5 pixels above its first estimates.
# Replace the 5 in the code with 7: in the demo's first demonstration the estimate of the plate then
# moves to the bowl beside it. A look corrects an estimate by what it sees; it does not search the
# image.

# %%
names, localizer = load_localizer(paths.shipped("pretrained") / "spatial-looks")
frame = torch.tensor(still).unsqueeze(0) / 255  # (1, H, W, 3)
one_hot = F.one_hot(torch.tensor([number]), 10).float()
with torch.inference_mode():
    first = localizer.points(localizer(frame, one_hot))  # (1, K, 2): column and row, 0 to 1
    estimate = start = first + 5 / frame.shape[1]  # images are upside down
    which, state, trail = localizer.which(one_hot), None, [start]
    for _ in range(localizer.looks):
        move, state = localizer.look(crops(frame, estimate), which, state)  # pixels
        estimate = estimate + move / frame.shape[1]
        trail.append(estimate)
    trail = torch.stack(trail, dim=1)  # (1, 1 + looks, K, 2)
    packaged = localizer.look_again(frame, one_hot, start, localizer.looks)
    torch.testing.assert_close(trail[:, 1:], packaged)

# %%
fig = keypoint_plots.plot_looks(still[None], trail, names, "target")
plots.save_figure(fig, folder / "figures" / "03_looks.png")
display(fig)
left = ((trail - first.unsqueeze(1))[0] * frame.shape[1]).norm(dim=-1)  # (1 + looks, K)
for index, name in enumerate(names):
    print(f"{name}: {left[0, index]:.1f} pixels from the first estimate at the start, then "
          f"{', '.join(f'{value:.1f}' for value in left[1:, index])}")

# %% [markdown]
# ## The policy of this run
#
# Now the same figure for this run's own policy. Its state is what the action head reads: `h` in
# `block`, the last K tokens of `y` in `trm`. Before `04_train` has run, the network is untrained
# and its action arbitrary; run this notebook again afterwards. If a trained run exists, its saved
# settings replace the parameters from here on.

# %%
trained = (folder / "best.safetensors").exists()
own = load_policy(folder) if trained else policy
with torch.inference_mode():
    action, states = own(own.prepare(observation), return_all_states=True)
    formed = torch.stack([own.head(state)[0][0, 0] for state in states])  # (recursions + 1, 7)
changes = [((after - before).norm() / after.norm()).item()
           for before, after in zip(states, states[1:], strict=False)]

# %%
title = f"{folder.name}, {'trained' if trained else 'untrained'}"
fig = unrolled.plot_refinement(still, {"state": changes}, formed, title, unit="recursion")
plots.save_figure(fig, folder / "figures" / "03_state.png")
display(fig)
print(f"This network is {'trained' if trained else 'not trained yet'}. Recursion {len(changes)} "
      f"changes its state by {100 * changes[-1]:.0f} % of the norm and its action by up to "
      f"{(formed[-1] - formed[-2]).abs().max():.3f}.")

# %% [markdown]
# Does the recursion improve the result? `07_visualize` measures the error of the action by the
# number of recursions, and `docs/recursion.md` the success rate.

# %% [markdown]
# ## Exercises
#
# **1.** What does `spatial-trm` carry from cycle to cycle? Repeat its loop in three ways: with `z`
# reset to its initial value before each cycle, with `y` reset, and with `x` replaced by zeros
# after the first cycle. By how much does the action change?
#
# <details><summary>Answer</summary>
#
# In a demonstration of LIBERO-Spatial's task 2, forgetting `z` changes the action by 0.03 and
# forgetting `y` by 0.05: every cycle can almost start anew, because it reads the observation again.
# Without `x` the gripper's command changes its sign: the state does not remember what was seen.
#
# ```python
# with torch.inference_mode():
#     for forgotten in ("z", "y", "x"):
#         seen = x
#         y, z = first_y, first_z = block.initial_state(x).unbind(dim=1)
#         for _ in range(shipped.config.num_recursions * block.cycles):
#             y = first_y if forgotten == "y" else y
#             z = first_z if forgotten == "z" else z
#             for _ in range(block.latent_updates):
#                 z = block.net(seen + y + z)
#             y = block.net(y + z)
#             seen = torch.zeros_like(x) if forgotten == "x" else x
#         action = shipped.head(y[:, -K:])[0][0, 0]
#         change = (action - shipped(inputs)[0, 0]).abs().max()
#         print(f"{forgotten} forgotten: the action changes by up to {change:.2f}")
# assert change > 0
# ```
#
# </details>
#
# **2.** The state of `variant="block"` is a single token. Which parameters of its attention have no
# effect?
#
# <details><summary>Answer</summary>
#
# Those of query and key. They only decide how the attention divides its weight of one over the
# tokens, and a single token always gets all of it. Replace them, and the output stays the same:
#
# ```python
# single = RecursiveBlock(width, heads).eval()
# h = torch.randn(2, width)
# before = single(h, h)
# with torch.no_grad():
#     single.attention.in_proj_weight[: 2 * width].normal_()  # query, key; then value
# print(f"largest change: {(single(h, h) - before).abs().max():.1g}")
# torch.testing.assert_close(single(h, h), before)
# assert not torch.equal(single(h + 1, h), before)  # whereas another state gives another output
# ```
#
# </details>

# %% [markdown]
# Next: `04_train` trains the policy.
