"""Success by number of demonstrations, layout and recoveries: docs/recursion.md.

    python benchmarks/demonstrations.py --kinds benchmark wide --demos 20 --epochs 14
    python benchmarks/demonstrations.py --kinds benchmark calm --demos 10 25 50

Trains one policy per kind and number of demonstrations, all on the same number of samples and
conditioned on the instruction, and plays it on the official init states and in LIBERO-PRO's suites.
Kinds: ``benchmark`` samples layouts as LIBERO does; ``wide`` randomises them within reach (except
the bowl of LIBERO-Spatial, whose location defines the task); ``calm`` is ``benchmark`` without the
pushes from which the expert recovers. Each run, in ``artifacts/demonstrations-...``, gets its
robustness card. The same command resumes an interrupted call.
"""

import argparse
import re
from pathlib import Path

from policies import POLICIES
from suite.cards import rate_in_short

from trm_helpers import paths, schema
from trm_helpers.config import Config, EvalConfig, from_flat, parse_parameter
from trm_helpers.demos.collect import collect_demonstrations
from trm_helpers.evaluation.evaluate import trainer_of
from trm_helpers.evaluation.robustness import PLAIN, robustness_card
from trm_helpers.training.runs import create_run

KINDS = {"benchmark": {}, "wide": {"placement": "wide"}, "calm": {"disturb": False}}


def collected(kind: str, given: argparse.Namespace) -> dict[int, Path]:
    """The file of each task, with as many demonstrations as any policy needs."""
    folder = paths.data_dir() / f"scripted-{kind}" / given.suite
    if kind == "benchmark":
        folder = paths.data_dir() / "scripted" / given.suite
    return {task_id: collect_demonstrations(given.suite, task_id, max(given.demos), folder,
                                            **KINDS[kind]) for task_id in given.tasks}


def settings(kind: str, demos: int, given: argparse.Namespace) -> Config:
    return from_flat(
        "demo", suite=given.suite, task_ids=given.tasks, num_demos=max(given.demos),
        max_demos_per_task=demos, placement=KINDS[kind].get("placement", "benchmark"),
        epochs=max(round(given.epochs * 30 / demos), 1), num_threads=given.threads,
        seed=given.seed, frame_stride=1, **{"conditioning": "language", **POLICIES[given.policy],
                            **{name: parse_parameter(name, value) for name, value in given.set}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="trm", choices=POLICIES)
    parser.add_argument("--suite", default="libero_object", choices=schema.SUITES)
    parser.add_argument("--tasks", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--kinds", nargs="+", default=["benchmark", "wide"], choices=KINDS)
    parser.add_argument("--demos", type=int, nargs="+", default=[30], help="per task")
    parser.add_argument("--epochs", type=int, default=40, help="over 30 demonstrations per task")
    parser.add_argument("--episodes", type=int, default=20, help="per task")
    parser.add_argument("--changes", nargs="+", default=["swap", "object", "lan", "task"],
                        help="rows of the robustness card")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="any other setting of the policy or its training")
    given = parser.parse_args()
    evaluation = EvalConfig(num_episodes=given.episodes, num_videos=0, eval_workers=given.workers)
    columns = list(dict.fromkeys([PLAIN, *given.changes]))
    print("| demonstrations | per task | " + " | ".join(columns) + " |")
    print("|" + "---|" * (2 + len(columns)))
    for kind in given.kinds:
        files = collected(kind, given)
        for demos in given.demos:
            config = settings(kind, demos, given)
            words = re.findall(r"[\w.]+", " ".join([given.policy, *sum(given.set, [])]))
            run = create_run(config, f"demonstrations-{given.suite}-{'-'.join(words)}-{kind}-"
                                     f"{demos}-s{given.seed}", resume=True)
            trainer_of(config, files, run).fit()
            card = robustness_card(run, evaluation, only=given.changes)
            rows = {row["name"]: row for row in card["rows"]}
            cells = [rate_in_short(rows[name]) if name in rows else "" for name in columns]
            print(f"| {kind} | {demos} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
