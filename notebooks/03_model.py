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
# line by line, and checks that it has an effect: in several public implementations every step after
# the first gave the same output, unnoticed.

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty takes the preset's name
variant = None  # type: str; block, trm, transformer or act; None keeps the preset's
num_recursions = None  # type: int; recursions (of trm: supervision steps); None keeps the preset's
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

from trm_helpers import RecursiveBlock, TRMPolicy, paths, schema
from trm_helpers.config import from_flat
from trm_helpers.policy.model import count_parameters
from trm_helpers.policy.recursion import TRMBlock, recurse_fixed
from trm_helpers.visuals import plots

# %%
folder = paths.run_dir(run_name or preset)
config = from_flat(preset, variant=variant, hidden_dim=hidden_dim, num_recursions=num_recursions,
                   halting=halting)
torch.manual_seed(0)
policy = TRMPolicy(config.model).eval()
config.model

# %% [markdown]
# ## The recursion, line by line
#
# `variant="block"`: the state `h` and the encoded observation `x` are one vector of width D per
# observation. A step adds `x` to the state, then applies self-attention and an MLP, each with a
# residual connection and LayerNorm. All steps share the same weights. The assertion compares these
# lines with `trm_helpers/policy/recursion.py`.

# %%
width, heads, steps = config.model.hidden_dim, schema.NUM_HEADS, 4
block = RecursiveBlock(width, heads).eval()
x = torch.randn(2, width)  # (B, D): two encoded observations
h = x  # the initial state
for _ in range(steps):
    tokens = (h + x).unsqueeze(1)  # (B, 1, D)
    attended, _ = block.attention(tokens, tokens, tokens, need_weights=False)
    tokens = block.attention_norm(tokens + attended)
    h = block.mlp_norm(tokens + block.mlp(tokens)).squeeze(1)  # (B, D)

torch.testing.assert_close(h, recurse_fixed(block, x, x, steps).output)

# %% [markdown]
# `variant="trm"`, the recursion of Tiny Recursive Models: `x` is a sequence of tokens, and the
# state is an answer `y` and a latent `z` of the same shape. One network updates both: `n` times the
# latent, given observation and answer, then the answer, given the latent. This is one cycle; a
# recursion is `T` cycles. The policy reads its actions from the last K tokens of `y`.

# %%
n, cycles, K = 2, 2, 3  # n and T in the paper; K actions
block = TRMBlock(width, heads, num_layers=2, chunk=K, latent_updates=n, cycles=cycles).eval()
x = torch.randn(2, 10, width)  # (B, N, D): tokens of two observations, the last K for the actions
first = block.initial_state(x)  # (B, 2, N, D): y and z, the same for every observation
y, z = first[:, 0], first[:, 1]
for _ in range(steps * cycles):
    for _ in range(n):
        z = block.net(x + y + z)
    y = block.net(y + z)

torch.testing.assert_close(y[:, -K:], recurse_fixed(block, x, first, steps).output)

# %% [markdown]
# ## Parameters
#
# With the default widths most parameters are in the image encoders. The block is shared by all
# `num_recursions` recursions. A recursion applies its network once in `block` and
# `cycles * (latent_updates + 1)` times in `trm`, where it is one supervision step of the paper. The
# other variants, `transformer` and `act` (Action Chunking with Transformers), are baselines that
# apply their network once.

# %%
parts = pd.Series(count_parameters(policy), name="parameters")
print(f"{parts.sum():,} parameters in all")
parts.to_frame()

# %% [markdown]
# ## Shapes
#
# A batch of two random observations: images -> one vector `x_cond` of width D -> a state of the
# same width after every recursion -> seven numbers per future action. With `variant="trm"`,
# `x_cond` is a sequence of tokens: of the images, of the proprioception, of the task, and one per
# future action, from which the answer is read.

# %%
size = config.model.image_size
observations = {camera: torch.rand(2, size, size, 3) for camera in config.model.cameras}
observations |= {"proprio": torch.randn(2, schema.PROPRIO_DIM),
                 "task_id": torch.zeros(2, dtype=torch.int64),
                 "language": torch.randn(2, schema.LANGUAGE_DIM)}
x_cond = policy.encode(observations)
actions, states = policy(observations, return_all_states=True)
print("x_cond", tuple(x_cond.shape), "| states", len(states), "x", tuple(states[-1].shape),
      "| actions", tuple(actions.shape))

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
x = x_cond.detach().requires_grad_()  # the encoded observation
carry = policy.recurse(x_cond).carry.detach()  # the final state, as a constant
policy.recurse(x, 1, carry=carry).output[..., 0].sum().backward()  # one of the D numbers

# %%
change = (once - often).abs().max().item()
more = sum(count_parameters(deeper).values()) - parts.sum()
gradient = x.grad.abs().max().item()
print(f"1. largest change of an action from 1 to 8 recursions: {change:.3g}")
print(f"2. parameters added by four times the recursions: {more}")
print(f"3. largest gradient of the observation at the last recursion: {gradient:.3g}")
print(f"4. largest action after 64 recursions: {far.abs().max().item():.3g}")
assert change > 1e-6 and more == 0 and gradient > 1e-3 and far.isfinite().all()

# %% [markdown]
# ## Time per recursion
#
# Milliseconds per decision (one observation), median of 20. The encoder runs once; each further
# recursion adds a little.

# %%
single = {name: value[:1] for name, value in observations.items()}
depths, milliseconds = [1, 2, 4, 8, 16], []
for depth in depths:
    times = []
    for _ in range(20):
        began = time.perf_counter()
        with torch.inference_mode():
            policy(single, num_recursions=depth)
        times.append(1000 * (time.perf_counter() - began))
    milliseconds.append(sorted(times)[10])

# %%
fig = plots.plot_latency(depths, milliseconds)
plots.save_figure(fig, folder / "figures" / "03_latency.png")
fig

# %% [markdown]
# Next: `04_train` trains the policy.
