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
# # 06 Evaluation in the simulator
#
# This notebook measures the success rate of a trained policy. Each episode starts from one of the
# benchmark's 50 official init states, which scripted demonstrations never use, and ends at success
# or at the horizon, the number of steps allowed.
#
# Five successes in five episodes sound perfect, but a policy with a success rate of 50 % achieves
# that once in 32 evaluations. Every rate is therefore reported with its 95 % Wilson interval, the
# range of success rates that are compatible with the episodes.

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny; only its machine settings apply
run_name = ""  # type: str; a trained run's folder under artifacts/; empty takes the newest
suite = None  # type: str; another suite, LIBERO-PRO's included; None keeps the run's
task_ids = None  # type: list; other tasks; None keeps the run's
# the others
weights = "best"  # type: str; best or last (see 04_train)
protocol = None  # type: str; quick, libero, openvla or lerobot; None keeps the run's setting
num_episodes = None  # type: int; per task, 0 the protocol's; None keeps the run's setting
first_init_state = None  # type: int; the first official init state used; None keeps the run's
horizon = None  # type: int; steps allowed, 0 the protocol's; None keeps the run's setting
num_videos = None  # type: int; episodes filmed per task; None keeps the run's setting
eval_workers = None  # type: int; simulator processes; None keeps the preset's
bound_episodes = None  # type: int; per task of replay, expert, random, no-op; None: the run's
cluster = None  # type: str; address of a Dask scheduler; None evaluates on this machine
demo_dir = None  # type: str; folder of the run's demonstrations, if it was trained with one
baseline_run = ""  # type: str; an evaluated run to compare with on the same episodes
robustness_episodes = 0  # type: int; episodes per task and change; 0 skips the robustness card

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
import dataclasses

import imageio.v3 as imageio
import pandas as pd
from IPython.display import Video, display

from trm_helpers.config import check_parameters
from trm_helpers.evaluation.baselines import plan_bounds
from trm_helpers.evaluation.compare import (
    comparable,
    compare_runs,
    evaluated_episodes,
    stale_episodes,
)
from trm_helpers.evaluation.evaluate import plan_run
from trm_helpers.evaluation.play import films_of
from trm_helpers.evaluation.robustness import card_notes, card_rows, plot_card, robustness_card
from trm_helpers.files import dispensable, inside
from trm_helpers.stats import (
    comparison_rows,
    detectable,
    format_comparison,
    format_success,
    summarize_episodes,
)
from trm_helpers.training.runs import find_run, load_config
from trm_helpers.visuals import plots

# %%
check_parameters(weights=weights, suite=suite, task_ids=task_ids,
                 robustness_episodes=robustness_episodes)
run = find_run(run_name, to_write=True)
settings = dict(protocol=protocol, num_episodes=num_episodes, first_init_state=first_init_state,
                horizon=horizon, num_videos=num_videos, bound_episodes=bound_episodes,
                eval_workers=eval_workers, cluster=cluster, demo_dir=demo_dir)
settings = {name: value for name, value in settings.items() if value is not None}
config = load_config(run, preset).replace(perturbation="none", **settings)
evaluation = plan_run(run, config.eval, weights, suite or "", task_ids or ())
planned_bounds = plan_bounds(run, config.eval, suite or "", task_ids or (), demo_dir or "")
if baseline_run:
    comparable(evaluation, baseline_run)
print("evaluating", run)

# %% [markdown]
# ## Run the episodes
#
# Each episode is written to `episodes.jsonl` as soon as it ends, so that an interrupted evaluation
# resumes with the missing episodes. An episode in which the policy raises an error counts as a
# failure; an episode that fails because of the simulator or the machine is excluded. A success rate
# depends on the protocol: the number of episodes, the horizon and the settling steps before the
# first action. Published protocols differ, so the protocol and its source are printed with the
# rate.

# %%
results = evaluation.play()
print(format_success(results))
print(f"protocol {results['protocol']['protocol']}: {results['protocol']['source']}")
for error in results["errors"]:
    print("excluded, could not be run:", error)

# %% [markdown]
# One row per episode. `mean_recursions` is the mean number of recursions per decision. `action_ms`
# and `max_action_ms` are the policy's mean and longest time per executed action, without rendering.

# %%
asked, episodes = results["protocol"], evaluation.rows()
columns = ["suite", "task_id", "init_state", "success", "steps", "mean_recursions", "action_ms",
           "max_action_ms", "seconds"]
pd.DataFrame(episodes)[columns].sort_values(["suite", "task_id", "init_state"])

# %% [markdown]
# ## Upper and lower bounds
#
# `bound_episodes` above 0 adds four baselines. Upper bounds: replays of the training demonstrations
# (if replays fail, check the data first) and the scripted expert, which knows the positions of all
# objects. Lower bounds: random actions and no action; if these succeed at a task, its success rate
# says little about a policy.

# %%
bounds = {name: bound.play() for name, bound in planned_bounds.items()}
pd.DataFrame(comparison_rows({run.name: results, **bounds}))

# %% [markdown]
# ## Success rate and episode length
#
# The error bar is the Wilson interval. In the second figure, failures end at the horizon. Successes
# of similar length show a policy that needs few corrections.

# %%
fig = plots.plot_success({run.name: results, **bounds})
plots.save_figure(fig, run / "figures" / "06_success.png")
fig

# %%
fig = plots.plot_episode_lengths(episodes, asked["horizon"])
plots.save_figure(fig, run / "figures" / "06_lengths.png")
fig

# %% [markdown]
# ## Watch the episodes
#
# Agent view on the left, wrist camera on the right, 1.5x speed. The dots show the planned path, one
# per action of the chunk: orange for actions that are executed, blue for actions that the next
# decision replaces. In a failed episode, did the policy miss the object, drop it, or miss the
# target? Successes and failures are stored in separate folders.

# %%
filmed = films_of(episodes, evaluation.folder)
for film, row in filmed.items():
    print(row["video"])
    display(Video(film, embed=True, width=640))

# %% [markdown]
# All filmed episodes of a task side by side, with a green frame for success and a red frame for
# failure.

# %%
for grid in sorted((evaluation.folder / "videos").glob(f"{asked['suite']}-task*.mp4")):
    if inside(evaluation.folder, grid.resolve()):
        print(grid.name)
        display(Video(grid, embed=True))

# %% [markdown]
# The first filmed episode as a strip of frames, from its first step to its last.

# %%
for path, row in list(filmed.items())[:1]:
    with dispensable("the strip"):
        film = imageio.imread(path)
        side = film.shape[2] // 2  # the agent view is the square at the lower left
        steps = [round(i * row["steps"] / 5) for i in range(6)]
        frames = [film[step, -side:, :side] for step in steps]
        fig = plots.plot_rollout_strip(frames, steps, path.stem)
        plots.save_figure(fig, run / "figures" / "06_rollout.png")
        display(fig)

# %% [markdown]
# ## Comparison with another run
#
# With few episodes, only a large difference between two policies can be detected.

# %%
print(detectable(results))

# %% [markdown]
# Episodes of two policies from the same init states can be compared in pairs, which detects smaller
# differences: McNemar's test counts only the episodes in which exactly one policy succeeds. Set
# `baseline_run` to an evaluated run. A difference with a p-value above 0.05 is not significant.

# %%
for baseline in [find_run(baseline_run)] if baseline_run else []:
    test = compare_runs(run, baseline, asked["suite"], asked["task_ids"])
    print(format_comparison(test, run.name, baseline.name))
    for marked in stale_episodes(baseline, asked["suite"]):
        print(marked)
    theirs = summarize_episodes([row for row in evaluated_episodes(baseline, asked["suite"])
                                 if row["task_id"] in asked["task_ids"] and "error" not in row])
    fig = plots.plot_success({run.name: results, baseline.name: theirs})
    plots.save_figure(fig, run / "figures" / "06_comparison.png")
    display(fig)

# %% [markdown]
# ## Robustness
#
# With `robustness_episodes` above 0, the policy is evaluated under changes: shifted, darker or
# noisy images, delayed actions, a black camera, randomised layouts, and the suites of LIBERO-PRO, a
# variant of LIBERO with changed scene, objects, instruction or goal. With as many episodes as
# above, this takes about twelve times as long. Changes that cannot affect this policy are listed
# but not evaluated.

# %%
if robustness_episodes:
    changed = dataclasses.replace(config.eval, num_episodes=robustness_episodes, num_videos=0)
    card = robustness_card(run, changed, weights, task_ids or ())
    display(pd.DataFrame(card_rows(card)), plot_card(card))
    print("\n".join(card_notes(card)))

# %% [markdown]
# Next: `07_visualize` explains what the policy does.
