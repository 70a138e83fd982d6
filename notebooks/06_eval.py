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
# The policy acts. Each episode begins from one of the benchmark's fifty official init states,
# which no demonstration was collected from, and ends with success or when its steps are used up.
#
# Five of five sounds perfect, but a policy that succeeds half the time does that once in 32
# tries. So every rate comes with its 95 % Wilson interval: the rates that the episodes do not
# contradict.

# %% tags=["parameters"]
# change these first
preset = "demo"  # type: str; reference, demo, trm or tiny: settings of this machine, not the run's
run_name = ""  # type: str; a trained run's folder under artifacts/; empty takes the newest
suite = None  # type: str; another suite than the run's, LIBERO-PRO's too; None keeps it
task_ids = None  # type: list; other tasks than the run's; None keeps them
# the others
weights = "best"  # type: str; best or last (see 04_train)
protocol = None  # type: str; quick, libero, openvla or lerobot; None keeps the run's setting
num_episodes = None  # type: int; per task; 0: the protocol's; None keeps the run's setting
first_init_state = None  # type: int; the first official init state used; None keeps the run's
horizon = None  # type: int; steps allowed; None keeps the run's, 0 is the protocol's
num_videos = None  # type: int; episodes filmed per task; None keeps the run's setting
eval_workers = None  # type: int; simulator processes; None keeps the preset's
bound_episodes = None  # type: int; per task of replay, expert, random, no-op; None: the run's
cluster = None  # type: str; address of a Dask scheduler; None plays here
demo_dir = None  # type: str; folder with the run's demonstrations, where it was given one
baseline_run = ""  # type: str; another evaluated run to compare with, on the same episodes
robustness_episodes = 0  # type: int; per task and change of the card; 0 leaves the card out

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
# Every episode is written to `episodes.jsonl` the moment it ends: interrupted and started again,
# only the missing ones are run. An episode in which the policy raises an error counts as a failure;
# one that the simulator or the machine spoils does not count. What a success rate means depends on
# the protocol: how many episodes, how many steps, and what happens before the first. Published ones
# differ, so it is written beside the rate, with its source.

# %%
results = evaluation.play()
print(format_success(results))
print(f"protocol {results['protocol']['protocol']}: {results['protocol']['source']}")
for error in results["errors"]:
    print("could not be run, and does not count:", error)

# %% [markdown]
# Episode by episode (the file may hold others, from evaluations before). `mean_recursions` is how
# many recursions a decision took on average, `action_ms` and `max_action_ms` what the policy took
# per executed action and for the slowest one, without the drawing of the frames it asked for.

# %%
asked, episodes = results["protocol"], evaluation.rows()
columns = ["suite", "task_id", "init_state", "success", "steps", "mean_recursions", "action_ms",
           "max_action_ms", "seconds"]
pd.DataFrame(episodes)[columns].sort_values(["suite", "task_id", "init_state"])

# %% [markdown]
# ## Between which bounds?
#
# No clone can be expected to beat the demonstrations it was made from, so they are replayed: if
# *they* fail, look at the data first. The scripted expert, which sees where everything is, is the
# other bound from above. From below, random commands, and none at all: what solves itself says
# nothing about a policy. (`bound_episodes` above 0 runs them.)

# %%
bounds = {name: bound.play() for name, bound in planned_bounds.items()}
pd.DataFrame(comparison_rows({run.name: results, **bounds}))

# %% [markdown]
# ## Success and length
#
# The whisker is the interval. Failures run until the steps are used up, so look at the lengths of
# successes to see how sure the policy is of itself.

# %%
fig = plots.plot_success({run.name: results, **bounds})
plots.save_figure(fig, run / "figures" / "06_success.png")
fig

# %%
fig = plots.plot_episode_lengths(episodes, asked["horizon"])
plots.save_figure(fig, run / "figures" / "06_lengths.png")
fig

# %% [markdown]
# ## Watch it
#
# Agent view on the left, wrist camera on the right, half as fast again as it was. The dots are
# where the policy means to go: one for each action of its chunk, orange until it looks again, blue
# after that. Where it fails, ask: did it miss the object, drop it, or miss the target? Successes
# and failures have a folder each.

# %%
filmed = films_of(episodes, evaluation.folder)
for film, row in filmed.items():
    print(row["video"])
    display(Video(film, embed=True, width=640))

# %% [markdown]
# All of a task at once, framed green where it succeeded and red where it failed.

# %%
for grid in sorted((evaluation.folder / "videos").glob(f"{asked['suite']}-task*.mp4")):
    if inside(evaluation.folder, grid.resolve()):
        print(grid.name)
        display(Video(grid, embed=True))

# %% [markdown]
# The first of them as a strip, from its first step to its last.

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
# ## Against another run
#
# How large must a difference be before it means anything? With few episodes, very large.

# %%
print(detectable(results))

# %% [markdown]
# On the same init states two policies can be compared pair by pair, which sees more: only the
# episodes on which they disagree count (McNemar's test). Give an evaluated run as `baseline_run`; a
# p-value above 0.05 says that luck explains the difference well enough.

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
# ## What is left when something changes?
#
# The same init states with a moved or darker picture, noise, late actions, a black camera; and the
# suites of LIBERO-PRO, which vary the scene or the instruction. With as many episodes it takes a
# dozen times as long as the evaluation above. What cannot matter for this policy is only listed.

# %%
if robustness_episodes:
    changed = dataclasses.replace(config.eval, num_episodes=robustness_episodes, num_videos=0)
    card = robustness_card(run, changed, weights, task_ids or ())
    display(pd.DataFrame(card_rows(card)), plot_card(card))
    print("\n".join(card_notes(card)))

# %% [markdown]
# Next: `07_visualize` looks inside.
