"""Success and speed of policies with and without recursion: docs/results.md.

    python benchmarks/policies.py --tasks 2 --demos 30 --epochs 70 --episodes 50

Trains every policy on the same demonstrations for the same epochs, evaluates it on the same
official init states, and prints a table: success with its 95 % Wilson interval, the paired McNemar
test against the first policy, parameters, training samples per second (taking turns) and
milliseconds per executed action, both on one thread. Runs are kept in ``artifacts/policies-...``;
the same command resumes an interrupted call.
"""

import argparse
import itertools
import time

import numpy as np
import torch

from trm_helpers import BehaviorCloningTrainer, load_policy, schema
from trm_helpers.config import Config, EvalConfig, from_flat
from trm_helpers.demos.collect import ensure_demonstrations
from trm_helpers.evaluation.evaluate import plan_run, trainer_of
from trm_helpers.files import read_jsonl
from trm_helpers.stats import detectable, interval_text, paired_mcnemar
from trm_helpers.training.runs import create_run

_TOKENS = dict(hidden_dim=128, image_grid=2)
_TRM = dict(_TOKENS, variant="trm", latent_updates=2, cycles=2, num_recursions=2,
            deep_supervision=True)
_LAYERS = 2 * (2 + 1) * 2 * 2  # of _TRM, unrolled: 2 layers, n + 1 updates, T cycles, N_sup steps
POLICIES = {
    "block, depth 4": dict(variant="block", num_recursions=4),
    "block, depth 1": dict(variant="block", num_recursions=1),
    "trm": _TRM,
    "trm, one recursion, one cycle, one update": dict(_TRM, latent_updates=1, cycles=1,
                                                 num_recursions=1),
    "transformer, equal parameters": dict(_TOKENS, variant="transformer"),
    # at the learning rate of the others, 1e-3, so deep a network stays at the mean action
    "transformer, equal depth, untied": dict(_TOKENS, variant="transformer",
                                             num_layers=_LAYERS, lr=1e-4),
    "block, depth 4, SiLU in the head": dict(variant="block", num_recursions=4,
                                             head_activation="silu"),
    # the reference's image encoders: many of their units die
    "block, depth 4, relu": dict(variant="block", num_recursions=4, image_activation="relu"),
    "trm, relu": dict(_TRM, image_activation="relu"),
    "trm, one recursion, one cycle, one update, relu": dict(
        _TRM, latent_updates=1, cycles=1, num_recursions=1, image_activation="relu"),
    "ACT-style": dict(_TOKENS, variant="act"),
    # the whole chunk before the next decision, where the others execute half of it
    "block, depth 4, execute 8": dict(variant="block", num_recursions=4, execution_horizon=8),
}


def train_and_evaluate(name: str, settings: dict, given: argparse.Namespace, seed: int) -> dict:
    """One row of the table; the episodes under ``"rows"``."""
    config = from_flat(
        "demo", suite=given.suite, task_ids=given.tasks, num_demos=given.demos,
        epochs=given.epochs, num_threads=given.threads, seed=seed,
        conditioning="task_id" if len(given.tasks) > 1 else "none", frame_stride=1, **settings)
    words = "-".join(name.replace(",", "").split())
    run = create_run(config, f"policies-{given.suite}-{words}-s{seed}", resume=True)
    trainer = trainer_of(config, ensure_demonstrations(config), run)
    trainer.fit()
    evaluation = EvalConfig(num_episodes=given.episodes, first_init_state=given.first_init_state,
                            num_videos=0, eval_workers=given.workers)
    results = plan_run(run, evaluation).play()
    return {
        "name": name, "seed": seed, **results, "rows": read_jsonl(run / "episodes.jsonl"),
        "parameters": sum(weight.numel() for weight in trainer.policy.parameters()),
        "trainer": trainer, "milliseconds": milliseconds_per_action(run, config),
    }


def training_speeds(trainers: list[BehaviorCloningTrainer]) -> list[float]:
    """Samples per second of each: medians of 5 rounds in which they take turns, 10 steps each."""
    speeds = [[] for _ in trainers]
    for number in range(5):
        for trainer, measured in zip(trainers, speeds, strict=True):
            trainer.policy.train()
            batches = trainer.train_data.batches(trainer.config.batch_size, 0, number,
                                                 device=trainer.device)
            began, count = time.perf_counter(), 0
            for batch in itertools.islice(batches, 10):
                trainer._step(batch)
                count += len(batch["actions"])
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            measured.append(count / (time.perf_counter() - began))
    return [float(np.median(measured)) for measured in speeds]


def milliseconds_per_action(run, config: Config) -> float:
    """Median over five repeats of the mean time of ``act``, one thread, batch of one."""
    policy = load_policy(run)
    generator = np.random.default_rng(0)
    size = (schema.IMAGE_SIZE, schema.IMAGE_SIZE, 3)
    observation = {camera: generator.integers(0, 256, size, dtype=np.uint8)
                   for camera in config.model.cameras}
    observation |= {key: np.zeros(width) for key, width in schema.LOW_DIM.items()}
    observation["task_id"] = config.data.task_ids[0]
    threads, times, actions = torch.get_num_threads(), [], 64
    torch.set_num_threads(1)
    for _ in range(5):
        policy.reset()
        began = time.perf_counter()
        for _ in range(actions):
            policy.act(observation)
        times.append(1000 * (time.perf_counter() - began) / actions)
    torch.set_num_threads(threads)
    return float(np.median(times))


def print_table(rows: list[dict]) -> None:
    print("| policy | seed | parameters | successes | 95 % interval | "
          f"against {rows[0]['name']}: gap, paired p | length | samples/s | ms per action |")
    print("|---|---|---|---|---|---|---|---|---|")
    speeds = training_speeds([row["trainer"] for row in rows])
    for row, speed in zip(rows, speeds, strict=True):
        compared = paired_mcnemar(rows[0]["rows"], row["rows"])
        against = "" if row is rows[0] else (f"{100 * compared['difference']:+.0f} points, "
                                             f"p = {compared['p_value']:.2f}")
        print(f"| {row['name']} | {row['seed']} | {row['parameters'] / 1e6:.2f} M | "
              f"{row['successes']} of {row['episodes']} | "
              f"{interval_text(row['wilson_low'], row['wilson_high'])} % | {against} | "
              f"{row['mean_length']:.0f} | {speed:.0f} | {row['milliseconds']:.2f} |", flush=True)
    print(detectable(rows[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="libero_spatial", choices=schema.SUITES)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2])
    parser.add_argument("--demos", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--first-init-state", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of policies; all of them")
    given = parser.parse_args()
    unknown = set(given.only or ()) - set(POLICIES)
    if unknown:
        parser.error(f"unknown policies {sorted(unknown)}; there are {sorted(POLICIES)}")
    rows = []
    for seed in given.seeds:
        for name in given.only or POLICIES:
            rows.append(train_and_evaluate(name, POLICIES[name], given, seed))
    print_table(rows)


if __name__ == "__main__":
    main()
