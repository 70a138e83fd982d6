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
# **What you will learn**
# - why a success rate means little without its number of episodes, its interval and its protocol
# - what bounds it: replayed demonstrations, the scripted expert, random actions, no action
# - how to see from films and counts how a policy fails
# - how to compare two policies on the same episodes, and when a difference is significant
#
# **Time**: 10 minutes to read; 1 to 2 to run (preset `demo`, two CPU cores).
# **Needs** the run folder of `04_train`. **Writes** into it `episodes.jsonl`, `results.json`,
# `videos/`, `bounds/`, figures.
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
import dataclasses

import imageio.v3 as imageio
import pandas as pd
from IPython.display import Video, display

from trm_helpers.config import check_parameters
from trm_helpers.evaluation.baselines import plan_bounds, play_bounds
from trm_helpers.evaluation.compare import (
    comparable,
    compare_runs,
    evaluated_episodes,
    stale_episodes,
)
from trm_helpers.evaluation.evaluate import plan_run
from trm_helpers.evaluation.plan import Episode, protocol_in_words
from trm_helpers.evaluation.play import films_of
from trm_helpers.evaluation.robustness import (
    card_notes,
    card_rows,
    failure_modes,
    plot_card,
    robustness_card,
)
from trm_helpers.files import dispensable, inside
from trm_helpers.schema import CONTROL_HZ
from trm_helpers.stats import (
    comparison_rows,
    detectable,
    format_comparison,
    format_success,
    summarize_episodes,
)
from trm_helpers.training.runs import find_run, load_config
from trm_helpers.visuals import films, plots

# %%
check_parameters(weights=weights, suite=suite, task_ids=task_ids,
                 robustness_episodes=robustness_episodes)
run = find_run(run_name, to_write=True, weights=weights)
settings = dict(protocol=protocol, num_episodes=num_episodes, first_init_state=first_init_state,
                horizon=horizon, num_videos=num_videos, bound_episodes=bound_episodes,
                eval_workers=eval_workers, cluster=cluster, demo_dir=demo_dir)
settings = {name: value for name, value in settings.items() if value is not None}
config = load_config(run, preset).replace(perturbation="none", **settings)
evaluation = plan_run(run, config.eval, weights, suite or "", task_ids or ())
planned_bounds = plan_bounds(run, config.eval, suite or "", task_ids or (), demo_dir or "")
changed = dataclasses.replace(config.eval, num_videos=0,
                              num_episodes=robustness_episodes or config.eval.num_episodes)
if robustness_episodes and suite not in (None, "", config.data.suite):
    raise ValueError("robustness_episodes is for the suite that the run was trained on; leave "
                     f"suite={suite!r} out, or set robustness_episodes=0")
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
print(f"protocol {protocol_in_words(results['protocol'])}")

# %% [markdown]
# Each tile is an episode: its task, its init state, whether it succeeded, and its length in
# simulated seconds. Failures along a row point to a task that the policy has not learned; a single
# failure points to an init state in which the objects lie as the policy does not expect.

# %%
asked, episodes = results["protocol"], evaluation.rows()
fig = plots.plot_episode_tiles(episodes)
plots.save_figure(fig, run / "figures" / "06_episodes.png")
display(fig)

# %% [markdown]
# The same as a table. `mean_recursions` is the mean number of recursions per decision. `action_ms`
# and `max_action_ms` are the policy's mean and longest time per executed action, without rendering.

# %%
columns = ["suite", "task_id", "init_state", "success", "steps", "mean_recursions", "action_ms",
           "max_action_ms", "seconds"]
display(pd.DataFrame(episodes)[columns].sort_values(["suite", "task_id", "init_state"]))

# %% [markdown]
# ## Upper and lower bounds
#
# `bound_episodes` above 0 adds four baselines. Upper bounds: replays of the training demonstrations
# (if replays fail, check the data first) and the scripted expert, which knows the positions of all
# objects. They bound the success rate, not the number of steps: a policy may be quicker. Lower
# bounds: random actions and no action; if these succeed at a task, its success rate says little
# about a policy.

# %%
bounds = play_bounds(planned_bounds)
solved = {name: f"{name} {bound['successes']} of {bound['episodes']}"
          for name, bound in bounds.items()}
by_chance = [bounds[name]["successes"] for name in ("random", "no-op") if name in bounds]
if bounds:
    display(pd.DataFrame(comparison_rows({run.name: results, **bounds})))
    print(f"Solved: {', '.join(solved.values())}. "
          + ("The task can be solved by chance." if any(by_chance) else
             "Neither random actions nor no action solved an episode; their intervals say how "
             "often they still might, and narrow with more bound_episodes."
             if len(by_chance) == 2 else ""))
else:
    print("Not run: set bound_episodes=2 for two episodes of each baseline per task (half a minute "
          "on two CPU cores).")

# %% [markdown]
# ## Success rate and episode length
#
# The error bar is the Wilson interval. In the second figure, failures end at the horizon. Successes
# of similar length show a policy that needs few corrections.

# %%
fig = plots.plot_success({run.name: results, **bounds})
plots.save_figure(fig, run / "figures" / "06_success.png")
display(fig)

# %%
fig = plots.plot_episode_lengths(episodes, asked["horizon"])
plots.save_figure(fig, run / "figures" / "06_lengths.png")
display(fig)

# %%
lengths = [row["steps"] for row in episodes if row["success"]]
print(f"Successes take {min(lengths)} to {max(lengths)} steps "
      f"({min(lengths) / CONTROL_HZ:.1f} to {max(lengths) / CONTROL_HZ:.1f} seconds)."
      if lengths else "No episode succeeded within the horizon.")

# %% [markdown]
# ## Watch the episodes
#
# The films run in real time and show a view that the policy does not receive, with the agent view
# and the wrist view small beside it. The dots show the predicted path, one for each remaining
# action of the chunk: orange for actions that are executed, blue for actions that the next decision
# replaces. In a failed episode, did the policy miss the object, drop it, or miss the target?
# Successes and failures are stored in separate folders.

# %%
filmed = films_of(episodes, evaluation.folder)
for film, row in filmed.items():
    print(row["video"])
    display(Video(film, embed=True, width=640))
if not filmed:
    print("No film. To film two episodes per task, set num_videos=2, move this run's "
          "episodes.jsonl away, and run the notebook again.")

# %% [markdown]
# What went wrong in the failed episodes? They are counted by the first object that rose by 2 cm:
# none, another object, or the right one.

# %%
modes = failure_modes(episodes)
print("Failed episodes: " + ", ".join(f"{count} with {mode}" for mode, count in modes.items())
      if any(modes.values()) else "No episode failed.")

# %% [markdown]
# All filmed episodes of a task side by side, if there are at least two, with a green frame for
# success and an orange-red frame for failure.

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
        side = film.shape[2] // 2  # the main view is the square on the left
        places = [round(i * (len(film) - films.FPS - 1) / 5) for i in range(6)]
        frames = [film[place, :, :side] for place in places]
        steps = [min(place * CONTROL_HZ // films.FPS, row["steps"]) for place in places]
        outcome = (f"{row['suite']}, task {row['task_id']}, init state {row['init_state']}: "
                   + ("success" if row["success"] else "failure"))
        fig = plots.plot_rollout_strip(frames, steps, outcome)
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
if not baseline_run:
    print("Not run: set baseline_run to the name of a run that this notebook has evaluated before; "
          "the comparison itself takes a second.")
elif results["not_run"]:
    print(f"Not compared with {baseline_run}: episodes are missing.")
for baseline in [find_run(baseline_run)] if baseline_run and not results["not_run"] else []:
    test = compare_runs(run, baseline, asked["suite"], episodes=evaluation.planned)
    other = str(baseline_run) if baseline.name == run.name else baseline.name
    print(format_comparison(test, run.name, other))
    for marked in stale_episodes(baseline, asked["suite"]):
        print(marked)
    theirs = summarize_episodes([row for row in evaluated_episodes(baseline, asked["suite"])
                                 if Episode.of(row) in evaluation.planned and "error" not in row])
    fig = plots.plot_success({run.name: results, other: theirs})
    plots.save_figure(fig, run / "figures" / "06_comparison.png")
    display(fig)

# %% [markdown]
# ## Robustness
#
# With `robustness_episodes` above 0, the policy is evaluated under changes: shifted, darker or
# noisy images, delayed actions, a black camera, randomised layouts, and the suites of LIBERO-PRO, a
# variant of LIBERO with exchanged or different-looking objects, paraphrased instructions, or other
# goals. Changes that cannot affect this policy are listed but not evaluated.

# %%
if robustness_episodes:
    try:
        card = robustness_card(run, changed, weights, task_ids or ())
        display(pd.DataFrame(card_rows(card)), plot_card(card))
        print("\n".join(card_notes(card)))
    except (RuntimeError, TimeoutError) as error:  # before the last plain episode
        print(f"Not finished: {error}")
else:
    print(f"Not run: set robustness_episodes={results['episodes'] // len(results['tasks'])} for as "
          "many episodes as above under each change (on two CPU cores about "
          f"{12 * sum(row['seconds'] for row in episodes) / 120:.0f} minutes).")

# %% [markdown]
# ## Exercises
#
# **1.** A policy succeeds in every episode. How many episodes does it take until the lower end of
# the Wilson interval exceeds 90 %?
#
# <details><summary>Answer</summary>
#
# 35: with n successes in n episodes the lower end is n / (n + 3.84). Ten of ten only exclude rates
# below 72 %, and even 50 of 50, all official init states of a task, only rates below 93 %.
#
# ```python
# from trm_helpers.stats import wilson_interval
#
# needed = next(n for n in range(1, 100) if wilson_interval(n, n)[0] > 0.9)
# low, high = wilson_interval(results["successes"], results["episodes"])
# print(f"{needed} of {needed}; here {results['successes']} of {results['episodes']}, so the rate "
#       f"lies between {100 * low:.0f} and {100 * high:.0f} %")
# assert needed == 35
# ```
#
# </details>
#
# **2.** Two policies play the same episodes. One policy solves k episodes that the other does not,
# and the opposite never happens. For which k is the difference significant at 0.05, and does it
# matter how many episodes both solve?
#
# <details><summary>Answer</summary>
#
# From k = 6 on: if both were equally good, each of the k differing episodes would be a coin toss,
# and all of them fall on one side with probability 2 / 2^k, which is 0.031 for 6 and 0.063 for 5.
# Episodes with the same outcome do not enter McNemar's test.
#
# ```python
# from trm_helpers.stats import paired_mcnemar
#
# row = {**episodes[0], "success": True}
# p_values = {}
# for k in range(1, 9):
#     better = [{**row, "init_state": state} for state in range(20)]
#     worse = [{**other, "success": other["init_state"] >= k} for other in better]
#     p_values[k] = paired_mcnemar(worse, better)["p_value"]
# print({k: round(p, 3) for k, p in p_values.items()})
# assert p_values[5] > 0.05 > p_values[6]
# ```
#
# </details>

# %% [markdown]
# Next: `07_visualize` explains what the policy does.
