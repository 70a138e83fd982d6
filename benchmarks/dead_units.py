"""How much of its image encoders and its action head a policy uses: docs/results.md.

    python benchmarks/dead_units.py RUN RUN ...

For each run, over 512 training observations: hidden units of the action head that are off (within
0.001 of zero) in all of them. For each of its cameras: channels of the last convolution that are
off everywhere in every image; the spread of the encoding between images (standard deviation divided
by root mean square); and the mean absolute change of the arm's commands, which lie in -1 to 1, when
observations exchange this camera's images.
"""

import argparse
import dataclasses

import torch

from trm_helpers import LIBERODataset, load_policy, schema
from trm_helpers.demos.collect import demonstrations_of
from trm_helpers.training.runs import find_run, load_config

_PICTURES = 512
_OFF = 1e-3


@torch.inference_mode()
def lines(run: str) -> list[str]:
    folder = find_run(run)
    config = load_config(folder)
    data = dataclasses.replace(config.data, augmentation="none")
    train, _ = LIBERODataset.from_config(demonstrations_of(folder, config),
                                         dataclasses.replace(config, data=data))
    observations = next(iter(train.batches(_PICTURES, 0, 0)))["observations"]
    policy, rows, features = load_policy(run), [], []
    hook = policy.head.hidden.register_forward_hook(lambda _, __, out: features.append(out))
    before = policy(observations)[..., :schema.ARM_DIM]
    hook.remove()
    off = (policy.head.activation(features[0].flatten(0, -2)).abs() < _OFF).all(0)
    rows.append(f"| {run} | action head | {int(off.sum())} of {len(off)} | – | – |")
    for camera, encoder in policy.encoders.items():
        maps = []
        hook = encoder.convolutions.register_forward_hook(
            lambda _, __, out, kept=maps: kept.append(out))
        answer = encoder(observations[camera].flatten(0, -4))
        hook.remove()
        off = (maps[0].abs() < _OFF).all(dim=3).all(dim=2).all(dim=0)
        spread = answer.std(0).mean() / answer.square().mean().sqrt()
        exchanged = {**observations, camera: observations[camera].flip(0)}
        change = (policy(exchanged)[..., :schema.ARM_DIM] - before).abs().mean()
        rows.append(f"| {run} | {camera} | {int(off.sum())} of {len(off)} | {spread:.3f} "
                    f"| {change:.4f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("| run | part | units always off | spread of the encoding "
          "| change of the action |\n|---|---|---|---|---|")
    for run in given.runs:
        print(*lines(run), sep="\n", flush=True)


if __name__ == "__main__":
    main()
