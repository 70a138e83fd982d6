"""Success where objects stand anywhere within reach: each episode another scene.

    python benchmarks/wide_placements.py RUN RUN ... --episodes 20

Plays policies of one task of LIBERO-Object from placements drawn as for wide demonstrations (with
seeds that no demonstration has), each policy from the same ones, and prints a table. Official init
states, LIBERO-PRO's too, are 50 draws from within a few centimetres: one scene. These are many.
"""

import argparse

import torch

from trm_helpers import load_policy
from trm_helpers.checkpoint import find_run, load_config
from trm_helpers.files import write_json
from trm_helpers.robustness import failures, failures_in_short, rate_in_short
from trm_helpers.rollout import run_episode
from trm_helpers.sim import LiberoEnv
from trm_helpers.stats import summarize_episodes

_SEED = 2**31  # the first; demonstrations draw theirs below it


class WidelyPlaced(LiberoEnv):
    def reset(self, seed=None, init_state=None):
        return super().reset(seed=seed, placement="wide")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--episodes", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| run | successes (95 % Wilson) | failures |\n|---|---|---|")
    envs: dict[tuple, WidelyPlaced] = {}
    for run in map(find_run, given.runs):
        data = load_config(run).data
        if len(data.task_ids) > 1:
            parser.error(f"{run.name} was trained on tasks {data.task_ids}; expected one task")
        task_id = data.task_ids[0]
        if (data.suite, task_id) not in envs:
            envs[data.suite, task_id] = WidelyPlaced(data.suite, task_id)
        env = envs[data.suite, task_id]
        policy = load_policy(run)
        rows = [run_episode(policy, env, None, seed=_SEED + number)
                for number in range(given.episodes)]
        results = {**summarize_episodes(rows), "failures": failures(rows), "episodes_played": rows}
        write_json(run / "wide.json", results)
        print(f"| {run.name} | {rate_in_short(results)} | {failures_in_short(results)} |",
              flush=True)


if __name__ == "__main__":
    main()
