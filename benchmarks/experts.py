"""Success of the scripted expert: docs/experts.md.

    python benchmarks/experts.py --suite libero_spatial --episodes 10
    python benchmarks/experts.py --suite libero_object --episodes 10 --init-states
    python benchmarks/experts.py --suite libero_object --episodes 10 --placement wide
    python benchmarks/experts.py --suite libero_90 --init-states --out docs/experts/libero_90.json

``--out`` keeps the results; the tasks that the file holds already are not run again. A row that
another revision than the file's has made says which. Without
``--init-states``, resets with seeds 1000, 1001, ... sample the layouts; with it episodes begin in
the official init states 0, 1, ..., which are never used for collection.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np

from trm_helpers import schema
from trm_helpers.demos.collect import Disturbance
from trm_helpers.demos.experts import Expert
from trm_helpers.demos.skills import Style
from trm_helpers.files import read_json, write_json
from trm_helpers.sim import layouts
from trm_helpers.sim.env import LiberoEnv, load_task
from trm_helpers.sim.parallel import run_jobs
from trm_helpers.software import software_versions
from trm_helpers.stats import interval_text, wilson_interval


def run_task(suite: str, episodes: int, init_states: bool, placement: str, disturb: bool,
             task_id: int) -> dict:
    """Successes and mean length of successful episodes of one task."""
    lengths, failed = [], []
    with LiberoEnv(suite, task_id) as env:
        for episode in range(episodes):
            if init_states:
                env.reset(init_state=episode)
            else:
                layouts.reset(env, 1000 + episode, placement)
            generator = np.random.default_rng([task_id, episode])
            expert = Expert(env, Style.sample(generator))
            disturbance = Disturbance(generator) if disturb else None
            for step in range(env.horizon):
                action = expert.act()
                _, success = env.step(disturbance.apply(action) if disturb else action)
                if success:
                    lengths.append(step + 1)
                    break
            else:
                failed.append(episode)
    return {"task_id": task_id, "successes": len(lengths), "failed": failed,
            "mean_length": round(float(np.mean(lengths)), 1) if lengths else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="libero_spatial", choices=schema.SUITES)
    parser.add_argument("--tasks", type=int, nargs="*", help="task ids; all of the suite")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--init-states", action="store_true")
    parser.add_argument("--placement", default="benchmark", choices=schema.PLACEMENTS,
                        help="layouts without --init-states: LIBERO's own, or anywhere within "
                             "reach")
    parser.add_argument("--disturb", action="store_true", help="push the arm as in collection")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    software = software_versions()  # of the code as it is now
    kept = {"software": software, "suite": given.suite, "episodes": given.episodes,
            "init_states": given.init_states, "placement": given.placement,
            "disturb": given.disturb, "tasks": []}
    if given.out and given.out.exists():
        found = read_json(given.out)
        other = [key for key in ("suite", "episodes", "init_states", "placement", "disturb")
                 if found[key] != kept[key]]
        if other:
            parser.error(f"{given.out} holds results with another {', '.join(other)}")
        kept = found
    rows = kept["tasks"]
    wanted = given.tasks or range(schema.SUITES[given.suite])
    job = functools.partial(run_task, given.suite, given.episodes, given.init_states,
                            given.placement, given.disturb)
    missing = [task for task in wanted if task not in {row["task_id"] for row in rows}]
    for task, row, error in run_jobs(job, missing, workers=given.workers, limit=0):
        if isinstance(error, ValueError):  # no skill reaches the goal
            row = {"task_id": task, "successes": 0, "failed": list(range(given.episodes)),
                   "mean_length": None, "error": str(error)}
        elif error:
            raise error
        if software["revision"] != kept["software"]["revision"]:
            row |= {"revision": software["revision"], "dirty": software["dirty"]}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)  # the failed episodes, to look into
        if given.out:
            write_json(given.out, kept)
    print("| task | instruction | successes | 95 % interval | mean steps |\n|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row["task_id"]):
        interval = interval_text(*wilson_interval(row["successes"], given.episodes))
        language = load_task(given.suite, row["task_id"]).language
        print(f"| {row['task_id']} | {language} | {row['successes']} of {given.episodes} | "
              f"{interval} % | {row['mean_length'] or '—'} |")
    solved = sum(row["successes"] for row in rows)
    print(f"\n{solved} of {given.episodes * len(rows)} episodes; at least 80 % in "
          f"{sum(row['successes'] >= 0.8 * given.episodes for row in rows)} of {len(rows)} tasks")


if __name__ == "__main__":
    main()
