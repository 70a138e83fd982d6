"""Time of a decision by the number of recursions, with and without early exit: docs/results.md.

    python benchmarks/latency.py

Milliseconds per decision (encoders, recursion, head) on one thread, for the presets ``demo``
(block) and ``trm``: with a fixed depth, and with a learned halting rule made to stop at that depth
although 8 are allowed. In the last row one half of 64 samples stops after 1, the other after 8.
Random weights; rows take turns, medians over the rounds.
"""

import argparse
import dataclasses
import statistics
import time

import torch

from trm_helpers.config import from_flat
from trm_helpers.policy.model import TRMPolicy

DEPTHS = (1, 2, 4, 8)


def make_policy(preset: str, halting: str) -> TRMPolicy:
    torch.manual_seed(0)
    config = dataclasses.replace(from_flat(preset).model, halting=halting)
    return TRMPolicy(config).eval()


def make_observations(policy: TRMPolicy, count: int) -> dict:
    size = policy.config.image_size
    images = {camera: torch.rand(count, size, size, 3) for camera in policy.config.cameras}
    return {**images, "proprio": torch.randn(count, 12)}


def stop_at(policy: TRMPolicy, depths: list[int]) -> None:
    """Let the halting head say stop to sample i at ``depths[i]``."""
    going_on, step = list(depths), 0

    def logit(answer: torch.Tensor) -> torch.Tensor:
        nonlocal going_on, step
        step += 1
        stops = [depth <= step for depth in going_on]
        going_on = [depth for depth in going_on if depth > step]
        return torch.tensor([1.0 if stop else -1.0 for stop in stops])

    policy._halting_logit = logit


@torch.inference_mode()
def milliseconds(policy: TRMPolicy, observations: dict, limit: int, depths: list[int] | None,
                 repeats: int) -> float:
    """Mean of ``repeats`` decisions; with ``depths`` they have to be what the recursion used."""
    took = 0.0
    for _ in range(repeats):
        if depths:
            stop_at(policy, depths)
        began = time.perf_counter()
        policy(observations, num_recursions=limit)
        took += time.perf_counter() - began
        if depths and policy.last_depth.tolist() != depths:
            raise RuntimeError(f"depths {policy.last_depth.tolist()}, expected {depths}")
    return 1000 * took / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases = {}
    for preset in ("demo", "trm"):
        fixed, learned = make_policy(preset, "fixed"), make_policy(preset, "learned")
        for batch, repeats in ((1, 10), (64, 1)):
            seen = make_observations(fixed, batch)
            for depth in DEPTHS:
                cases[preset, batch, f"{depth}", "fixed"] = (fixed, seen, depth, None, repeats)
                cases[preset, batch, f"{depth}", "early exit"] = (
                    learned, seen, DEPTHS[-1], [depth] * batch, repeats)
        half = [1] * 32 + [8] * 32
        cases[preset, 64, "half 1, half 8", "early exit"] = (learned, seen, 8, half, 1)
    took = {case: [] for case in cases}
    for _ in range(given.rounds):
        for case, arguments in cases.items():
            took[case].append(milliseconds(*arguments))
    print("| preset | batch | recursions | fixed, ms | early exit of 8, ms |")
    print("|---|---|---|---|---|")
    for preset, batch, depth in dict.fromkeys(case[:3] for case in cases):
        cells = [f"{statistics.median(took[preset, batch, depth, rule]):.2f}"
                 if (preset, batch, depth, rule) in took else ""
                 for rule in ("fixed", "early exit")]
        print(f"| {preset} | {batch} | {depth} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
