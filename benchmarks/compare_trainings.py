"""Two methods compared over several trainings each.

    python benchmarks/compare_trainings.py --a block-s0 block-s1 --b trm-s0 trm-s1

Prints the difference of their success rates on the shared episodes of evaluated runs, with a 95 %
interval over tasks and trainings and the p-value of a sign-flip test.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from trm_helpers.evaluation.compare import evaluated_episodes
from trm_helpers.stats import paired_mcnemar


def compare_trainings(a: Sequence[Sequence[Mapping]], b: Sequence[Sequence[Mapping]],
                      seed: int = 0, resamples: int = 10_000) -> dict:
    """Difference of two methods, with tasks as the unit.

    McNemar's test compares two trainings; another seed of the same method may differ as much. Here
    the difference is the mean over tasks of b's success rate minus a's, each the mean over its
    trainings.

    Args:
        a, b: the rows of each training, as in :func:`stats.summarize_episodes`. Episodes that one
            of the trainings lacks are ignored.

    Returns:
        ``tasks``, ``episodes`` (shared), ``difference``; ``low`` and ``high``, a 95 % percentile
        interval with the tasks and each method's trainings resampled; the two-sided ``p_value`` of
        the sign-flip test: how often the difference is as large when each task's sign is random
        (all 2^tasks choices up to 12 tasks, otherwise ``resamples`` of them).

    Raises:
        ValueError: no shared episode, fewer than two shared tasks, or different protocols.
    """
    played = [[{(row["suite"], row["task_id"], row["init_state"], row.get("seed", 0)): row
                for row in rows if "error" not in row} for rows in trainings]
              for trainings in (a, b)]
    every = [*played[0], *played[1]]
    shared = sorted(set.intersection(*map(set, every))) if all(played) else []
    tasks = sorted({key[:2] for key in shared})
    if len(tasks) < 2:
        raise ValueError(f"the trainings share {len(shared)} episodes of {len(tasks)} task(s); "
                         "expected the same episodes of at least 2 tasks")
    for rows in [*a[1:], *b]:
        paired_mcnemar(a[0], rows)  # refuses duplicates and other protocols
    rates = [np.array([[np.mean([bool(episodes[key]["success"]) for key in shared
                                 if key[:2] == task]) for task in tasks] for episodes in trainings])
             for trainings in played]  # (trainings, tasks) of a and of b
    by_task = rates[1].mean(axis=0) - rates[0].mean(axis=0)
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(tasks), size=(resamples, 1, len(tasks)))
    of_a, of_b = (each[generator.integers(len(each), size=(resamples, len(each), 1)), chosen]
                  .mean(axis=(1, 2)) for each in rates)
    low, high = np.quantile(of_b - of_a, [0.025, 0.975])
    if len(tasks) <= 12:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(tasks))))
    else:
        signs = generator.choice((-1, 1), size=(resamples, len(tasks)))
    as_large = np.abs(signs @ by_task) >= abs(by_task.sum()) - 1e-9
    return {"tasks": len(tasks), "episodes": len(shared), "difference": float(by_task.mean()),
            "low": float(low), "high": float(high), "p_value": float(as_large.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--a", nargs="+", required=True, help="runs of one method")
    parser.add_argument("--b", nargs="+", required=True, help="runs of the other method")
    parser.add_argument("--suite", default="", help="default: the suite of each run")
    given = parser.parse_args()
    test = compare_trainings(*([evaluated_episodes(run, given.suite) for run in runs]
                               for runs in (given.a, given.b)))
    print(f"b against a on {test['episodes']} shared episodes of {test['tasks']} tasks: "
          f"{100 * test['difference']:+.1f} points (95 % interval {100 * test['low']:+.1f} to "
          f"{100 * test['high']:+.1f}; sign-flip p = {test['p_value']:.2g})")


if __name__ == "__main__":
    main()
