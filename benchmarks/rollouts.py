"""Evaluation speed, in episodes per minute, compared with LIBERO's loop: docs/results.md.

    python benchmarks/rollouts.py RUN --episodes 8 --rounds 3
    python benchmarks/rollouts.py RUN --before CHECKOUT --episodes 2 --horizon 40 --demos 2

Both loops play the same policy from the same official init states with the same number of
processes, taking turns. LIBERO's (``libero/lifelong/metric.py``) steps a ``SubprocVectorEnv``,
whose environments render every camera in every step until the last episode of the batch has ended,
with the policy in the parent. Here it gets the settle steps and the order of reset of our protocol,
so that the episodes are the same: their outcomes and lengths are compared, and in one episode every
observation that reaches the policy, bit for bit. The time to build environments is reported apart.

With ``--before``, another checkout of this repository and this one take turns at all tasks of the
run's suite, building included: episodes of the run, and scripted demonstrations.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from trm_helpers import load_policy, paths, schema
from trm_helpers.config import EvalConfig
from trm_helpers.evaluation.plan import Episode
from trm_helpers.evaluation.play import TrainedPolicy, play_episode
from trm_helpers.evaluation.rollout import run_episode
from trm_helpers.sim.env import LiberoEnv, load_init_states, load_task
from trm_helpers.sim.parallel import run_jobs
from trm_helpers.training.runs import find_run, load_config


def make_libero_env(suite: str, task_id: int):
    from libero.libero.envs import OffScreenRenderEnv

    return OffScreenRenderEnv(bddl_file_name=load_task(suite, task_id).bddl_file,
                              camera_heights=schema.IMAGE_SIZE, camera_widths=schema.IMAGE_SIZE)


def observation(values: dict, task_id: int, language: str) -> dict:
    from robosuite.utils.transform_utils import quat2axisangle

    return {**{key: values[live] for key, live in schema.CAMERAS.items()},
            "joint_states": values["robot0_joint_pos"],
            "gripper_states": values["robot0_gripper_qpos"], "ee_pos": values["robot0_eef_pos"],
            "ee_ori": quat2axisangle(np.array(values["robot0_eef_quat"])),
            "task_id": task_id, "language": language}


def libero_loop(vector, policies: list, suite: str, task_id: int, init_states: list[int],
                horizon: int) -> list[tuple]:
    """(init state, success, steps) of episodes played in batches of the vector's size."""
    states, task = load_init_states(suite, task_id), load_task(suite, task_id)
    played = []
    for first in range(0, len(init_states), len(policies)):
        batch = init_states[first:first + len(policies)]
        vector.seed(0)
        vector.reset()
        vector.set_init_state(states[batch])
        for _ in range(schema.SETTLE_STEPS):
            seen = vector.step(np.tile(schema.NO_OP, (len(batch), 1)))[0]
        for policy in policies:
            policy.reset()
        ended = [0] * len(batch)
        for step in range(1, horizon + 1):
            actions = [policy.act(observation(values, task_id, task.language))
                       for policy, values in zip(policies, seen, strict=True)]
            seen, _, done, _ = vector.step(np.stack(actions))
            ended = [end or step * bool(now) for end, now in zip(ended, done, strict=True)]
            if all(ended):
                break
        played += [(init_state, bool(end), end or horizon)
                   for init_state, end in zip(batch, ended, strict=True)]
    return played


def our_loop(run: Path, suite: str, task_id: int, init_states: list[int], workers: int,
             folder: Path) -> list[tuple]:
    policy = TrainedPolicy.load(run, "best")
    job = functools.partial(play_episode, policy, EvalConfig(num_videos=0), folder)
    episodes = [Episode(suite, task_id, init_state) for init_state in init_states]
    rows = []
    for _, row, error in run_jobs(job, episodes, workers=workers, keep=True):
        if error:
            raise error
        rows.append(row)
    return sorted((row["init_state"], row["success"], row["steps"]) for row in rows)


class Seen:
    """A policy that keeps what reaches the one inside."""

    def __init__(self, policy):
        self.policy, self.reset, self.observations = policy, policy.reset, []

    def act(self, values) -> np.ndarray:
        if not self.policy._planned:
            keys = (*schema.CAMERAS, *schema.PROPRIO_KEYS)
            self.observations.append({key: np.array(values[key]) for key in keys})
        return self.policy.act(values)


def unequal_observations(run: Path, suite: str, task_id: int, init_state: int) -> tuple[int, int]:
    """Observations that reached the policy in one episode; how many of them differ."""
    from libero.libero.envs import DummyVectorEnv

    ours, theirs = Seen(load_policy(run)), Seen(load_policy(run))
    with LiberoEnv(suite, task_id) as env:
        run_episode(ours, env, init_state)
        horizon = env.horizon
    vector = DummyVectorEnv([functools.partial(make_libero_env, suite, task_id)])
    libero_loop(vector, [theirs], suite, task_id, [init_state], horizon)
    vector.close()
    pairs = list(zip(ours.observations, theirs.observations, strict=True))
    return len(pairs), sum(any(not np.array_equal(a[key], b[key]) for key in a) for a, b in pairs)


_PASS = """
import sys, time
from trm_helpers.config import EvalConfig, from_flat
from trm_helpers.demos.collect import ensure_demonstrations
from trm_helpers.evaluation.evaluate import plan_run
from trm_helpers.schema import SUITES
what, run, suite = sys.argv[1:4]
count, horizon, workers = map(int, sys.argv[4:])
tasks, began = tuple(range(SUITES[suite])), time.perf_counter()
if what == "episodes":
    config = EvalConfig(num_episodes=count, horizon=horizon, num_videos=0, eval_workers=workers)
    assert not plan_run(run, config, suite=suite, task_ids=tasks).play()["errors"]
else:
    ensure_demonstrations(from_flat("reference", suite=suite, task_ids=tasks, num_demos=count,
                                    demos="scripted"))
print(time.perf_counter() - began)
"""


def pass_seconds(checkout: Path, what: str, *arguments) -> float:
    """Seconds in which a checkout plays or collects everything, in new folders."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _PASS, what, *map(str, arguments)], cwd=checkout, text=True,
            stdout=subprocess.PIPE, check=True, env={
                **os.environ, "PYTHONPATH": str(checkout), "TRM_DATA_DIR": folder,
                "TRM_ARTIFACTS_DIR": folder, "OMP_NUM_THREADS": "1"})
    return float(done.stdout.splitlines()[-1])


def compare_checkouts(given: argparse.Namespace) -> None:
    """Print a table of both checkouts' episodes and demonstrations per minute."""
    run = find_run(given.run)
    suite = load_config(run).data.suite
    print(f"all {schema.SUITES[suite]} tasks of {suite}, {given.workers} processes, environments "
          "built")
    print("| what | before, per minute | now, per minute | ratio |\n|---|---|---|---|", flush=True)
    for what, count in (("episodes", given.episodes), ("demonstrations", given.demos)):
        took: dict[Path, list[float]] = {Path(given.before).resolve(): [], paths.repo_root(): []}
        for _ in range(given.rounds if count else 0):
            for checkout, seconds in took.items():
                seconds.append(pass_seconds(checkout, what, run, suite, count, given.horizon,
                                            given.workers))
                print(what, took, file=sys.stderr, flush=True)
        if count:
            rates = [60 * count * schema.SUITES[suite] / statistics.median(seconds)
                     for seconds in took.values()]
            ratios = [a / b for a, b in zip(*took.values(), strict=True)]
            print(f"| {what} | {rates[0]:.1f} | {rates[1]:.1f} | {statistics.median(ratios):.2f} "
                  f"({min(ratios):.2f} to {max(ratios):.2f}) |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a trained run")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--before", default="", help="another checkout, to compare with this one")
    parser.add_argument("--horizon", type=int, default=0, help="with --before; 0: the suite's")
    parser.add_argument("--demos", type=int, default=0, help="with --before: of each task")
    given = parser.parse_args()
    if given.before:
        compare_checkouts(given)
        return
    if given.episodes < given.workers:
        parser.error(f"--episodes {given.episodes}: expected at least one for each of the "
                     f"{given.workers} workers")
    from libero.libero.envs import SubprocVectorEnv

    run = find_run(given.run)
    data = load_config(run).data
    suite, task_id = data.suite, data.task_ids[0]
    init_states = list(range(given.episodes - given.episodes % given.workers))
    horizon = schema.HORIZONS[suite]
    began = time.perf_counter()  # before this process renders: these processes are forked
    vector = SubprocVectorEnv([functools.partial(make_libero_env, suite, task_id)] * given.workers)
    policies = [load_policy(run) for _ in range(given.workers)]
    built = [time.perf_counter() - began]
    took: dict[str, list[float]] = {"LIBERO's loop": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        our_loop(run, suite, task_id, init_states[:given.workers], given.workers, Path(folder))
        built.append(time.perf_counter() - began)
        for turn in range(given.rounds):
            began = time.perf_counter()
            theirs = libero_loop(vector, policies, suite, task_id, init_states, horizon)
            middle = time.perf_counter()
            ours = our_loop(run, suite, task_id, init_states, given.workers, Path(folder))
            took["LIBERO's loop"].append(middle - began)
            took["ours"].append(time.perf_counter() - middle)
            same = sum(a == b for a, b in zip(theirs, ours, strict=True))
            print(f"round {turn + 1}: {same} of {len(ours)} episodes have the same outcome and "
                  f"length; {took}", file=sys.stderr, flush=True)
    vector.close()
    compared = [unequal_observations(run, suite, task_id, init_state)
                for init_state in init_states]
    looked_at, unequal = map(sum, zip(*compared, strict=True))
    print(f"{looked_at} observations reached the policy in {len(compared)} episodes; {unequal} "
          "differ")
    ratios = [a / b for a, b in zip(*took.values(), strict=True)]
    print(f"building: LIBERO's {built[0]:.0f} s, ours with a first episode {built[1]:.0f} s")
    print("| loop | processes | episodes per minute | ratio |\n|---|---|---|---|")
    for name, seconds in took.items():
        rate = 60 * len(init_states) / statistics.median(seconds)
        ratio = "1" if name != "ours" else (f"{statistics.median(ratios):.1f} ({min(ratios):.1f} "
                                            f"to {max(ratios):.1f})")
        print(f"| {name} | {given.workers} | {rate:.1f} | {ratio} |")


if __name__ == "__main__":
    main()
