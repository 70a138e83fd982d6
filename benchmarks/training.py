"""Training speed on one CPU thread compared with other projects' policies: docs/results.md.

    python benchmarks/training.py

Samples per second of forward and backward passes and milliseconds per executed action, on random
images of two cameras, proprioception and chunks of actions. Policies take turns in one process, so
a ratio compares two policies of the same round. Without ``--peer-python`` the others are installed
into a separate environment, build/peers. LIBERO's own BC-Transformer is excluded: its packages on
the index (hf-libero 0.1.4, libero 0.1.1) lack ``lifelong.models.modules``; robomimic's stands in.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
BATCH = 32


def ours(preset: str, **settings) -> tuple[torch.nn.Module, Callable, Callable]:
    """Network; function: the loss of a random batch; function: a chunk, actions executed of it."""
    from trm_helpers.config import from_flat
    from trm_helpers.policy.model import TRMPolicy

    config = from_flat(preset, **settings).model
    policy, size = TRMPolicy(config), config.image_size

    def observations(count: int) -> dict:
        images = {camera: torch.rand(count, size, size, 3) for camera in config.cameras}
        return {**images, "proprio": torch.randn(count, 12)}

    def loss() -> torch.Tensor:
        batch = {"observations": observations(BATCH),
                 "actions": torch.rand(BATCH, config.chunk, 7) * 2 - 1,
                 "mask": torch.ones(BATCH, config.chunk)}
        return policy.loss(batch, "l1")[0]

    def decide() -> int:
        policy(observations(1))
        return config.execution_horizon

    return policy, loss, decide


def lerobot_act(size: int, chunk: int = 10) -> tuple[torch.nn.Module, Callable, Callable]:
    """LeRobot's ACT as it comes (ResNet-18, width 512), without the download of its weights."""
    import lerobot
    from peers_read import import_torchvision

    import_torchvision()
    bare = types.ModuleType("lerobot.policies")  # its own __init__ imports every other policy
    bare.__path__ = [f"{lerobot.__path__[0]}/policies"]
    sys.modules["lerobot.policies"] = bare
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    names = [f"observation.images.{camera}" for camera in CAMERAS]
    features = {name: PolicyFeature(FeatureType.VISUAL, (3, size, size)) for name in names}
    features["observation.state"] = PolicyFeature(FeatureType.STATE, (12,))
    policy = ACTPolicy(ACTConfig(
        input_features=features,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))}, device="cpu",
        chunk_size=chunk, n_action_steps=chunk, pretrained_backbone_weights=None))

    def observations(count: int) -> dict:
        images = {name: torch.rand(count, 3, size, size) for name in names}
        return {**images, "observation.state": torch.randn(count, 12)}

    def loss() -> torch.Tensor:
        return policy({**observations(BATCH), "action": torch.rand(BATCH, chunk, 7),
                       "action_is_pad": torch.zeros(BATCH, chunk, dtype=torch.bool)})[0]

    def decide() -> int:
        policy.predict_action_chunk(observations(1))
        return chunk

    return policy, loss, decide


def robomimic_transformer(size: int, context: int = 10) -> tuple[torch.nn.Module, ...]:
    """robomimic's BC-Transformer as it comes, with a ResNet-18 for each camera, ten frames."""
    from peers_read import import_torchvision

    import_torchvision()
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.algo import algo_factory
    from robomimic.config import config_factory

    config = config_factory("bc")
    with config.values_unlocked():
        config.algo.transformer.enabled = True
        config.algo.transformer.context_length = context
        config.observation.modalities.obs.rgb = list(CAMERAS)
        config.observation.modalities.obs.low_dim = ["proprio"]
        encoder = config.observation.encoder.rgb
        encoder.core_class = "VisualCore"
        encoder.core_kwargs = {"feature_dimension": 64, "backbone_class": "ResNet18Conv",
                               "backbone_kwargs": {"pretrained": False},
                               "pool_class": "SpatialSoftmax", "pool_kwargs": {"num_kp": 32}}
    obs_utils.initialize_obs_utils_with_config(config)
    shapes = {**{camera: [3, size, size] for camera in CAMERAS}, "proprio": [12]}
    algorithm = algo_factory("bc", config, shapes, 7, torch.device("cpu"))

    def observations(count: int) -> dict:
        images = {camera: torch.rand(count, context, 3, size, size) for camera in CAMERAS}
        return {**images, "proprio": torch.randn(count, context, 12)}

    def loss() -> torch.Tensor:
        batch = {"obs": observations(BATCH), "goal_obs": None,
                 "actions": torch.rand(BATCH, context, 7)}
        predictions = algorithm._forward_training(batch)
        return algorithm._compute_losses(predictions, {**batch, "actions": batch["actions"][:, -1]}
                                         )["action_loss"]

    def decide() -> int:
        algorithm.nets["policy"](observations(1), actions=None, goal_dict=None)
        return 1

    return algorithm.nets, loss, decide


POLICIES = {
    "ours, preset demo (block, 64 px, chunk 8)": lambda: ours("demo"),
    "ours, preset trm (64 px, chunk 8)": lambda: ours("trm"),
    "ours, preset demo at 128 px": lambda: ours("demo", image_size=128),
    "ours, preset trm at 128 px": lambda: ours("trm", image_size=128),
    "LeRobot 0.4.4 ACT, 128 px, chunk 10": lambda: lerobot_act(128),
    "LeRobot 0.4.4 ACT, 64 px, chunk 10": lambda: lerobot_act(64),
    "robomimic 0.3 BC-Transformer, 128 px, 10 frames": lambda: robomimic_transformer(128),
}


def samples_per_second(network, loss: Callable, bf16: bool) -> float:
    network.train()
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    began = time.perf_counter()
    with autocast:
        total = loss()
    total.backward()
    network.zero_grad(set_to_none=True)
    return BATCH / (time.perf_counter() - began)


@torch.inference_mode()
def milliseconds_per_action(network, decide: Callable) -> float:
    network.eval()
    began, executed = time.perf_counter(), 0
    for _ in range(10):
        executed += decide()
    return 1000 * (time.perf_counter() - began) / executed


def measure(rounds: int, only: list[str]) -> None:
    torch.set_num_threads(1)
    policies, measured = {}, {}
    for name in only or POLICIES:
        try:
            policies[name] = POLICIES[name]()
        except ImportError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
    for turn in range(rounds + 1):  # the first one warms up
        for name, (network, loss, decide) in policies.items():
            row = {"fp32": samples_per_second(network, loss, bf16=False),
                   "bf16": samples_per_second(network, loss, bf16=True),
                   "ms": milliseconds_per_action(network, decide)}
            if turn:
                measured.setdefault(name, []).append(row)
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
    peer = next((name for name in policies if "ACT, 128" in name), None)
    print("| policy | parameters | samples/s, fp32 | samples/s, bf16 | "
          "fp32 against ACT at 128 px | ms per executed action |\n|---|---|---|---|---|---|")
    for name, rows in measured.items():
        column = {key: [row[key] for row in rows] for key in rows[0]}
        parameters = sum(weight.numel() for weight in policies[name][0].parameters())
        against = ""
        if peer:
            ratios = [a / b["fp32"] for a, b in zip(column["fp32"], measured[peer], strict=True)]
            against = (f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to "
                       f"{max(ratios):.1f})")
        fp32, bf16 = (statistics.median(column[key]) for key in ("fp32", "bf16"))
        print(f"| {name} | {parameters / 1e6:.1f} M | {fp32:,.1f} | {bf16:,.1f} | {against} | "
              f"{statistics.median(column['ms']):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=POLICIES, default=[])
    parser.add_argument("--peer-python", type=Path, help="a Python that has the peers")
    parser.add_argument("--here", action="store_true", help="measure in this Python")
    given = parser.parse_args()
    if given.here:
        measure(given.rounds, given.only)
        return
    if given.peer_python is None:
        import peers_read

        given.peer_python = peers_read.install(Path("build/peers"))
    command = [given.peer_python, __file__, "--here", "--rounds", str(given.rounds)]
    subprocess.run(command + (["--only", *given.only] if given.only else []), check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
