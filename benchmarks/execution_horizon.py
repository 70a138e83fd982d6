"""Success by the number of actions executed of each chunk: docs/results.md.

    python benchmarks/execution_horizon.py RUN RUN --horizons 4 8 --episodes 5

Plays every task that a policy was trained on from sampled placements, never from the official init
states, so that the number can be chosen here and reported there. The episodes of all runs and
numbers begin alike.
"""

import argparse
from pathlib import Path

from trm_helpers import load_policy
from trm_helpers.evaluation.plan import selection_episodes
from trm_helpers.evaluation.rollout import run_episode
from trm_helpers.sim.env import LiberoEnv
from trm_helpers.stats import interval_text, paired_mcnemar, wilson_interval
from trm_helpers.training.runs import find_run, load_config


def play(runs: list[Path], horizons: list[int], episodes: int) -> dict[tuple[str, int], list[dict]]:
    """Rows of the episodes of each run's best weights, by run and number of actions executed."""
    policies = {run.name: load_policy(run, "best") for run in runs}
    rows: dict[tuple[str, int], list[dict]] = {}
    planned = selection_episodes(load_config(runs[0]), episodes)
    for task in sorted({episode[:2] for episode in planned}):
        with LiberoEnv(*task) as env:
            for name, policy in policies.items():
                for horizon in horizons:
                    policy.execution_horizon = horizon
                    new = [{**each._asdict(), **run_episode(policy, env, None, seed=each.seed)}
                           for each in planned if each[:2] == task]
                    rows.setdefault((name, horizon), []).extend(new)
                    print(f"task {task[1]}, {name}, {horizon} executed: "
                          f"{sum(row['success'] for row in new)} of {len(new)}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--horizons", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--episodes", type=int, default=5, help="per task")
    given = parser.parse_args()
    rows = play([*map(find_run, given.runs)], given.horizons, given.episodes)
    print("| run | executed | successes | 95 % Wilson interval | against the first: gap, p |\n"
          "| --- | --- | --- | --- | --- |")
    for (name, horizon), played in rows.items():
        successes = sum(row["success"] for row in played)
        interval = interval_text(*wilson_interval(successes, len(played)))
        test = paired_mcnemar(rows[name, given.horizons[0]], played)
        print(f"| {name} | {horizon} | {successes} of {len(played)} | {interval} % | "
              f"{100 * test['difference']:+.0f} points, p = {test['p_value']:.2g} |")


if __name__ == "__main__":
    main()
