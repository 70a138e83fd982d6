"""A policy for a whole suite, from no data to its success rate, a few minutes per call.

    python benchmarks/suite/stages.py "trm" --suite libero_spatial --minutes 9 --out brought

Checks the renderer, collects demonstrations, trains, evaluates on the official init states, and
copies the files worth keeping to a folder. Ends with code 3 when the time is up; the same command
then resumes. Policies are those of benchmarks/policies.py.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from policies import POLICIES  # noqa: E402

from trm_helpers import schema  # noqa: E402
from trm_helpers.config import Config, EvalConfig, from_flat, parse_parameter  # noqa: E402
from trm_helpers.demos.collect import ensure_demonstrations  # noqa: E402
from trm_helpers.evaluation.actor import actor_of  # noqa: E402
from trm_helpers.evaluation.evaluate import plan_run, trainer_of  # noqa: E402
from trm_helpers.opengl import ensure_gl  # noqa: E402
from trm_helpers.preflight import preflight, table  # noqa: E402
from trm_helpers.schema import PROTOCOLS  # noqa: E402
from trm_helpers.software import STOP_AT, minutes_left  # noqa: E402
from trm_helpers.stats import format_success  # noqa: E402
from trm_helpers.training.runs import create_run  # noqa: E402

CALL_AGAIN = 3
KEPT = ("config.json", "policy.json", "best.safetensors", "metrics.jsonl", "episodes.jsonl",
        "results.json")


def settings(given: argparse.Namespace) -> Config:
    return from_flat(
        "demo", suite=given.suite, task_ids=given.tasks, num_demos=given.demos,
        epochs=given.epochs, seed=given.seed, conditioning="task_id", num_threads=given.threads,
        **{"frame_stride": 1, **POLICIES[given.policy],
           **{name: parse_parameter(name, value) for name, value in given.set}})


def run_stages(given: argparse.Namespace) -> bool:
    """Whether all of them are complete; ``TimeoutError`` when the time is up."""
    if given.check:
        print(f"OpenGL: {ensure_gl()}", flush=True)
        checks = preflight()
        print(table(checks), flush=True)
        if any(check.status == "fail" for check in checks):
            return False
    config = settings(given)
    files = ensure_demonstrations(config, actor_of(config))
    print(f"{len(files)} tasks demonstrated, {minutes_left():.1f} minutes left", flush=True)
    words = "-".join(given.policy.replace(",", "").split())
    run = create_run(config, given.run_name or f"{given.suite}-{words}-s{given.seed}", resume=True)
    given.run = run
    trainer = trainer_of(config, files, run)
    rows = trainer.fit()
    print(f"{run}: {len(rows)} of {given.epochs} epochs, validation loss "
          f"{rows[-1]['val_loss']:.4f}", flush=True)
    if not trainer.finished:
        return False
    results = plan_run(run, EvalConfig(
        protocol=given.protocol, num_episodes=given.episodes, num_videos=1,
        first_init_state=given.first_init_state, eval_workers=given.workers)).play()
    print(format_success(results), flush=True)
    return not results["errors"] and not results["not_run"]


def bring(run: Path, out: Path) -> None:
    """Copy the files of a run worth keeping, and one film per task."""
    kept = [run / name for name in KEPT] + sorted(run.glob("videos/*/*.mp4"))
    for path in kept:
        if path.exists():
            target = out / run.name / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy", choices=POLICIES)
    parser.add_argument("--suite", default="libero_spatial", choices=schema.SUITES)
    parser.add_argument("--tasks", type=int, nargs="*", help="task ids; all of the suite")
    parser.add_argument("--demos", type=int, default=50, help="demonstrations per task")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--protocol", default="quick", choices=PROTOCOLS)
    parser.add_argument("--episodes", type=int, default=50, help="per task")
    parser.add_argument("--first-init-state", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, in training")
    parser.add_argument("--workers", type=int, default=2, help="processes that evaluate")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call")
    parser.add_argument("--check", action="store_true", help="renderer and versions first")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="any other setting")
    parser.add_argument("--run-name", default="")
    parser.add_argument("--out", type=Path, help="folder for the files worth keeping")
    given = parser.parse_args()
    given.tasks = given.tasks or list(range(schema.SUITES[given.suite]))
    given.run = None
    os.environ[STOP_AT] = str(time.time() + 60 * min(given.minutes, minutes_left()))
    try:
        complete = run_stages(given)
    except TimeoutError as error:
        print(error)
        complete = False
    if given.out and given.run:
        bring(given.run, given.out)
    print("complete" if complete else "call again", flush=True)
    return 0 if complete else CALL_AGAIN


if __name__ == "__main__":
    sys.exit(main())
