"""Success against the number of recursions in control: the tables in docs/recursion.md.

    python benchmarks/depth.py RUN --depths 1 2 4 --convergence 1e-4 --episodes 20

Plays a trained run closed loop at each depth, fixed; with the convergence rule at up to the largest
depth, for each threshold; and at the trained depth with the state carried over from one decision to
the next. All of them from the same official init states. Each has its ledger in
``<run>/depth/<name>/``: what was played is not played again.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import NamedTuple

from trm_helpers.checkpoint import find_run, load_config, load_policy
from trm_helpers.config import EvalConfig
from trm_helpers.evaluate import digest, evaluate_episodes, official_episodes
from trm_helpers.files import read_jsonl
from trm_helpers.rollout import Policy
from trm_helpers.sim import LiberoEnv
from trm_helpers.stats import paired_mcnemar


class Changed(NamedTuple):
    """A run's policy with other settings of its recursion."""

    run: Path
    changes: tuple[tuple[str, float | str], ...]

    def make(self, env: LiberoEnv) -> Policy:
        policy = load_policy(self.run)
        policy.config = dataclasses.replace(policy.config, **dict(self.changes))
        policy.reset()
        return policy


def variants(trained: int, given: argparse.Namespace) -> dict[str, dict]:
    """What is changed, by the name of its row; the first is the policy as it was trained."""
    rows = {f"fixed {trained}": {}}
    rows |= {f"fixed {depth}": {"num_recursions": depth} for depth in given.depths
             if depth != trained}
    deepest = max([*given.depths, trained])
    rows |= {f"convergence {threshold:g}": {"halting": "convergence", "num_recursions": deepest,
                                            "convergence_threshold": threshold}
             for threshold in given.convergence}
    return rows | {f"fixed {trained}, carried over": {"carry_over": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a trained run that halts at a fixed depth")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--convergence", type=float, nargs="*", default=[1e-4])
    parser.add_argument("--episodes", type=int, default=20, help="of each task")
    parser.add_argument("--first-init-state", type=int, default=25)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    run = find_run(given.run)
    trained = load_config(run)
    suite, tasks = trained.data.suite, trained.data.task_ids
    config = EvalConfig(num_episodes=given.episodes, first_init_state=given.first_init_state,
                        num_videos=0, eval_workers=given.workers)
    identity = {"weights": "best", "sha256": digest(run / "best.safetensors")}
    first = None
    print("| recursions | success | 95 % interval | against the first: gap, p | mean recursions | "
          "ms per action | length |\n|---|---|---|---|---|---|---|")
    for name, changes in variants(trained.model.num_recursions, given).items():
        folder = run / "depth" / name.replace(", ", "-").replace(" ", "-")
        found = evaluate_episodes(Changed(run, tuple(changes.items())), identity, folder, config,
                                  suite, official_episodes(suite, tasks, config))
        rows = read_jsonl(folder / "episodes.jsonl")
        first = first or rows
        test = paired_mcnemar(first, rows)
        gap = "" if first is rows else (f"{100 * test['difference']:+.0f} points, "
                                        f"p = {test['p_value']:.2f}")
        used = sum(row["mean_recursions"] for row in rows) / len(rows)
        milliseconds = sum(row["action_ms"] for row in rows) / len(rows)
        print(f"| {name} | {found['successes']} of {found['episodes']} | "
              f"{100 * found['wilson_low']:.0f} to {100 * found['wilson_high']:.0f} % | {gap} | "
              f"{used:.1f} | {milliseconds:.2f} | {found['mean_length']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
