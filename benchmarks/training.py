"""Training speed compared with other projects' policies: docs/results.md.

    python benchmarks/training.py                  # one CPU thread
    python benchmarks/training.py --device cuda    # writes training-speed.json

On one CPU thread: samples per second of forward and backward passes and milliseconds per executed
action, on random images of two cameras, proprioception and chunks of actions. Policies take turns
in one process, so a ratio compares two policies of the same round. Without ``--peer-python`` the
others are installed into a separate environment, build/peers. LIBERO's own BC-Transformer is
excluded: its packages on the index (hf-libero 0.1.4, libero 0.1.1) lack
``lifelong.models.modules``; robomimic's stands in.

With ``--device``: samples per second of whole training steps, in the precision that training picks
there. Ours are the trainer's steps from a file of random frames: sampling and moving an epoch's
order and augmentation, gathering, augmentation, both passes, clipping, AdamW, moving average; one
kernel at a time and as a CUDA graph. The others, if this Python has ``lerobot``, have both passes,
clipping and fused AdamW on a batch that is on the device already.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
BATCH = 32
_FRAMES = 10  # of a sample of robomimic's BC-Transformer


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


def lerobot_policies() -> None:
    """Make single policies of LeRobot importable."""
    import lerobot
    from peers_read import import_torchvision

    import_torchvision()
    bare = types.ModuleType("lerobot.policies")  # its own __init__ imports every other policy
    bare.__path__ = [f"{lerobot.__path__[0]}/policies"]
    sys.modules["lerobot.policies"] = bare


def lerobot_features(size: int) -> dict:
    from lerobot.configs.types import FeatureType, PolicyFeature

    inputs = {f"observation.images.{camera}": PolicyFeature(FeatureType.VISUAL, (3, size, size))
              for camera in CAMERAS}
    return {"input_features": inputs | {"observation.state": PolicyFeature(FeatureType.STATE,
                                                                           (12,))},
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (7,))}}


def random_observations(*leading: int, size: int, device: str = "cpu") -> dict:
    """LeRobot's names."""
    images = {f"observation.images.{camera}": torch.rand(*leading, 3, size, size, device=device)
              for camera in CAMERAS}
    return {**images, "observation.state": torch.randn(*leading, 12, device=device)}


def lerobot_act(size: int, chunk: int = 10, batch: int | None = None,
                device: str = "cpu") -> tuple[torch.nn.Module, Callable, Callable]:
    """LeRobot's ACT as it comes (ResNet-18, width 512), without the download of its weights."""
    lerobot_policies()
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    policy = ACTPolicy(ACTConfig(**lerobot_features(size), device=device, chunk_size=chunk,
                                 n_action_steps=chunk, pretrained_backbone_weights=None))

    def loss() -> torch.Tensor:
        count = batch or BATCH
        return policy({**random_observations(count, size=size, device=device),
                       "action": torch.rand(count, chunk, 7, device=device),
                       "action_is_pad": torch.zeros(count, chunk, dtype=torch.bool,
                                                    device=device)})[0]

    def decide() -> int:
        policy.predict_action_chunk(random_observations(1, size=size, device=device))
        return chunk

    return policy, loss, decide


def lerobot_diffusion(size: int, batch: int, device: str) -> tuple[torch.nn.Module, Callable]:
    """LeRobot's Diffusion Policy as it comes (horizon 16, two frames), without random crops."""
    lerobot_policies()
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    policy = DiffusionPolicy(DiffusionConfig(**lerobot_features(size), device=device,
                                             crop_shape=None, pretrained_backbone_weights=None))
    horizon, frames = policy.config.horizon, policy.config.n_obs_steps

    def loss() -> torch.Tensor:
        return policy({**random_observations(batch, frames, size=size, device=device),
                       "action": torch.rand(batch, horizon, 7, device=device),
                       "action_is_pad": torch.zeros(batch, horizon, dtype=torch.bool,
                                                    device=device)})[0]

    return policy, loss


def robomimic_transformer(size: int) -> tuple[torch.nn.Module, ...]:
    """robomimic's BC-Transformer as it comes, with a ResNet-18 for each camera, ten frames."""
    from peers_read import import_torchvision

    import_torchvision()
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.algo import algo_factory
    from robomimic.config import config_factory

    config = config_factory("bc")
    with config.values_unlocked():
        config.algo.transformer.enabled = True
        config.algo.transformer.context_length = _FRAMES
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
        images = {camera: torch.rand(count, _FRAMES, 3, size, size) for camera in CAMERAS}
        return {**images, "proprio": torch.randn(count, _FRAMES, 12)}

    def loss() -> torch.Tensor:
        batch = {"obs": observations(BATCH), "goal_obs": None,
                 "actions": torch.rand(BATCH, _FRAMES, 7)}
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


# --- whole training steps on a device ------------------------------------------------------------
STEPS = 8192  # in the file of random frames: six batches of 1,024 in its training split
_DEMOS = 16  # in that file
PEERS = {"LeRobot ACT, 64 px, chunk 8": lambda batch, device: lerobot_act(64, 8, batch, device)[:2],
         "LeRobot Diffusion Policy, 64 px, 2 frames":
             lambda batch, device: lerobot_diffusion(64, batch, device)}


def write_random_file(path: Path, steps: int) -> Path:
    """A demonstration file in LIBERO's layout; the fingers never move."""
    from trm_helpers import schema

    generator, count = np.random.default_rng(0), steps // _DEMOS
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["alignment"] = "raw"
        group.attrs["problem_info"] = json.dumps({"language_instruction": "move at random"})
        for number in range(_DEMOS):
            demo = group.create_group(f"demo_{number}")
            demo["actions"] = generator.uniform(-1, 1, (count, 7)).astype(np.float32)
            demo["actions"][:, 6] = np.where(np.arange(count) < count // 2, -1, 1)
            for name, width in schema.LOW_DIM.items():
                demo[f"obs/{name}"] = np.full((count, width), 0.01 * number)
            for camera in CAMERAS:
                demo[f"obs/{camera}"] = generator.integers(0, 256, (count, 64, 64, 3), np.uint8)
    return path


def our_trainer(preset: str, batch: int, device: str, data: tuple):
    """A trainer of the preset on the (training, validation) data; it writes nothing."""
    from trm_helpers.config import from_flat
    from trm_helpers.policy.model import TRMPolicy
    from trm_helpers.training.train import BehaviorCloningTrainer

    config = from_flat(preset, batch_size=batch, device=device)
    policy = TRMPolicy(config.model, data[0].normalizer, data[0].proprio_stats)
    return BehaviorCloningTrainer(policy, *data, config.train, "unused")


def our_steps(trainer, captured: bool) -> Iterator[None]:
    """Endless steps of whole batches, one kernel at a time or as a CUDA graph."""
    trainer.policy.train()
    data, size, epoch = trainer.train_data, trainer.config.batch_size, 0
    if len(data) < size:
        raise ValueError(f"a batch of {size} needs as many samples; these have {len(data)}: give "
                         "more --steps or smaller --batches")
    while True:
        for draw in data.draws(size, 0, epoch):
            if len(draw["indices"]) == size:
                if captured:
                    trainer._replay(draw)
                else:
                    trainer._step(data.make(draw, trainer.device))
                yield
        epoch += 1


def peer_steps(policy: torch.nn.Module, loss: Callable, precision: str,
               device: str) -> Iterator[None]:
    optimizer = torch.optim.AdamW(policy.parameters(), fused=device == "cuda" or None)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    policy.train()
    while True:
        with torch.autocast(device, kind, enabled=kind is not None):
            value = loss()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        yield


def rate(steps: Iterator[None], batch: int, device: str, seconds: float) -> float:
    """Samples per second, after three steps that are not timed."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        next(steps)
    wait()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(4):
            next(steps)
        wait()  # the GPU must not fall behind: the clock is the CPU's
        count += 4 * batch
    return count / (time.perf_counter() - began)


def measure_on_device(given) -> None:
    from trm_helpers.config import from_flat
    from trm_helpers.data.dataset import LIBERODataset
    from trm_helpers.training.devices import choose_precision

    device = torch.device(given.device)
    precision = choose_precision("auto", device)
    rows = []

    def add(policy: str, batch: int, eager: float | None, captured: float | None, note: str = ""):
        rows.append({"policy": policy, "batch": batch, "samples_per_second": eager,
                     "samples_per_second_captured": captured, "note": note})
        print(f"{policy}, batch {batch}: {eager} and captured {captured} {note}", file=sys.stderr,
              flush=True)

    with tempfile.TemporaryDirectory() as folder:
        file = write_random_file(Path(folder) / "random_demo.hdf5", given.steps)
        for preset in given.presets:
            data = LIBERODataset.from_config(
                {0: file}, from_flat(preset, task_ids=(0,), num_demos=1000), device)
            for batch in given.batches:
                trainer = our_trainer(preset, batch, given.device, data)
                trainer._captured = trainer._capture()
                rates = [rate(our_steps(trainer, captured), batch, given.device, given.seconds)
                         if trainer._captured or not captured else None
                         for captured in (False, True)]
                add(f"ours, preset {preset}", batch, *rates)
    for name, make in PEERS.items():
        for batch in given.batches:
            try:
                policy, loss = make(batch, given.device)
                policy.to(device)
                add(name, batch, rate(peer_steps(policy, loss, precision, given.device), batch,
                                      given.device, given.seconds), None)
            except ImportError as error:
                add(name, batch, None, None, f"not installed ({error.name})")
                break
            except torch.OutOfMemoryError:
                add(name, batch, None, None, "out of memory")
    machine = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    given.out.write_text(json.dumps({
        "machine": machine, "torch": torch.__version__, "precision": precision,
        "threads": torch.get_num_threads(), "seconds": given.seconds, "rows": rows}, indent=1))
    print(f"{machine}, PyTorch {torch.__version__}, {precision}; samples per second\n\n"
          "| policy | batch | one kernel at a time | CUDA graph | ratio |\n|---|---|---|---|---|")
    for row in rows:
        eager, captured = row["samples_per_second"], row["samples_per_second_captured"]
        cells = [f"{value:,.0f}" if value else "-" for value in (eager, captured)]
        ratio = f"{captured / eager:.1f}" if captured else "-"
        print(f"| {row['policy']} | {row['batch']} | {row['note'] or cells[0]} | {cells[1]} | "
              f"{ratio} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=POLICIES, default=[])
    parser.add_argument("--peer-python", type=Path, help="a Python that has the peers")
    parser.add_argument("--here", action="store_true", help="measure in this Python")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="measure whole training steps")
    parser.add_argument("--presets", nargs="*", default=["demo", "trm"])
    parser.add_argument("--batches", nargs="*", type=int, default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=STEPS, help="of the file of random frames")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, per row")
    parser.add_argument("--out", type=Path, default=Path("training-speed.json"))
    given = parser.parse_args()
    if given.device:
        from trm_helpers.training.devices import tf32

        with tf32(torch.device(given.device)):
            measure_on_device(given)
        return
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
