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
# A recursive policy applies one small block repeatedly to its own output and to the encoded image.
# More recursions cost time but no parameters. This notebook walks through the network and checks
# that the recursion has an effect: in several public implementations every step after the first
# gave the same output, unnoticed.

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny (config.PRESETS)
run_name = ""  # type: str; folder under artifacts/; empty takes the preset's name
variant = None  # type: str; block, trm, transformer or act; None keeps the preset's
num_recursions = None  # type: int; recursions (of trm: supervision steps); None keeps the preset's
# the others
hidden_dim = None  # type: int; width of the state; None keeps the preset's
halting = None  # type: str; fixed, remainder, adaptive, learned or convergence; None keeps it

# %%
import time

import pandas as pd
import torch

from trm_helpers import TRMPolicy, paths, schema
from trm_helpers.config import from_flat
from trm_helpers.policy.model import count_parameters
from trm_helpers.visuals import plots

# %%
folder = paths.run_dir(run_name or preset)
config = from_flat(preset, variant=variant, hidden_dim=hidden_dim, num_recursions=num_recursions,
                   halting=halting)
torch.manual_seed(0)
policy = TRMPolicy(config.model).eval()
config.model

# %% [markdown]
# ## Where the parameters are
#
# Most parameters are in the image encoders. The block is small and shared by all `num_recursions`
# recursions. A recursion applies the network once in `block` and `cycles * (latent_updates + 1)`
# times in `trm`, where it is one of the paper's supervision steps.

# %%
parts = pd.Series(count_parameters(policy), name="parameters")
print(f"{parts.sum():,} parameters in all")
parts.to_frame()

# %% [markdown]
# ## Shapes
#
# A batch of two random observations: images -> one vector `x_cond` of width `D` -> a state of the
# same width after every recursion -> seven numbers per future action. With `variant="trm"`,
# `x_cond` is a sequence of tokens: those of the images, the proprioception, the task, and one per
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
# 3. the image reaches the last recursion: its gradient there is not zero;
# 4. the actions stay finite far beyond the configured depth.

# %%
with torch.inference_mode():
    once, often, far = (policy(observations, num_recursions=n) for n in (1, 8, 64))
deeper = TRMPolicy(config.replace(num_recursions=4 * config.model.num_recursions).model)
x = x_cond.detach().requires_grad_()
carry = policy.recurse(x_cond).carry.detach()  # the final state, as a constant
policy.recurse(x, 1, carry=carry).output[..., 0].sum().backward()  # one of the D numbers

# %%
change = (once - often).abs().max().item()
more = sum(count_parameters(deeper).values()) - parts.sum()
gradient = x.grad.abs().max().item()
print(f"1. largest change of an action from 1 to 8 recursions: {change:.3g}")
print(f"2. parameters added by four times the recursions: {more}")
print(f"3. largest gradient of the image at the last recursion: {gradient:.3g}")
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
