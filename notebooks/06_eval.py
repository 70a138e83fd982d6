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
preset = "demo"  # type: str; only names the run where run_name is empty
run_name = ""  # type: str; a trained run's folder under artifacts/; empty takes the newest
weights = "best"  # type: str; best (lowest validation loss) or last
suite = None  # type: str; another suite than the run's; None keeps it
task_ids = None  # type: list; other tasks than the run's; None keeps them
num_episodes = None  # type: int; per task; None keeps the run's setting
first_init_state = None  # type: int; the first official init state used; None keeps the run's
horizon = None  # type: int; steps allowed; None keeps the run's, 0 is the suite's
num_videos = None  # type: int; episodes filmed per task; None keeps the run's setting
eval_workers = None  # type: int; simulator processes; None keeps the run's setting
baseline_run = ""  # type: str; another evaluated run to compare with, on the same episodes

# %%
import json

import imageio.v3 as imageio
import pandas as pd
from IPython.display import Video, display

from trm_helpers import plots
from trm_helpers.checkpoint import find_run, load_config
from trm_helpers.evaluate import VIDEO_FPS, evaluate_run
from trm_helpers.files import read_jsonl
from trm_helpers.stats import format_success, minimum_detectable_difference, paired_mcnemar

# %%
run = find_run(run_name)
settings = dict(num_episodes=num_episodes, first_init_state=first_init_state, horizon=horizon,
                num_videos=num_videos, eval_workers=eval_workers)
config = load_config(run).replace(**{k: v for k, v in settings.items() if v is not None})
print("evaluating", run)

# %% [markdown]
# ## Run the episodes

# %%
results = evaluate_run(run, config.eval, weights, suite or "", task_ids or ())
print(format_success(results))

# %%
episodes = read_jsonl(run / "episodes.jsonl")
columns = ["suite", "task_id", "init_state", "success", "steps", "mean_recursions", "seconds"]
pd.DataFrame(episodes)[columns]

# %% [markdown]
# ## Success and length
#
# The whisker is the interval. Failures run until the steps are used up, so look at the lengths of
# successes to see how sure the policy is of itself.

# %%
fig = plots.plot_success({run.name: results})
plots.save_figure(fig, run / "figures" / "06_success.png")
fig

# %%
fig = plots.plot_episode_lengths(episodes, results["protocol"]["horizon"])
plots.save_figure(fig, run / "figures" / "06_lengths.png")
fig

# %% [markdown]
# ## Watch it
#
# Agent view on the left, wrist camera on the right. Where it fails, ask: did it miss the object,
# drop it, or miss the target?

# %%
videos = sorted((run / "videos").glob("*-init*.mp4"))
for video in videos:
    print(video.name)
    display(Video(video, embed=True, width=640))

# %%
film = imageio.imread(videos[0])[:-VIDEO_FPS, -384:, :384]  # the agent view, without the hold
chosen = [round(i * (len(film) - 1) / 5) for i in range(6)]
fig = plots.plot_rollout_strip(film[chosen], chosen, videos[0].stem.replace("-", ", "))
plots.save_figure(fig, run / "figures" / "06_rollout.png")
fig

# %% [markdown]
# ## Against another run
#
# On the same init states two policies can be compared pair by pair: only the episodes on which
# they disagree count (McNemar's test). The last number is the gap that so many episodes can see
# at all.

# %%
rate = min(max(results["success_rate"], 0.1), 0.9)
gap = minimum_detectable_difference(results["episodes"], rate)
print(f"{results['episodes']} episodes can tell rates apart that differ by {100 * gap:.0f} points")
if baseline_run:
    baseline = find_run(baseline_run)
    print(json.dumps(paired_mcnemar(episodes, read_jsonl(baseline / "episodes.jsonl")), indent=2))

# %% [markdown]
# Next: `07_visualize` looks inside.
