"""How much of its image encoders a policy uses.

    python benchmarks/dead_units.py RUN RUN ...

For each camera of each run, over 512 observations it was trained on: how many channels of the last
convolution are off (within 0.001 of zero) everywhere in every picture, and how much the encoder's
answer differs between pictures: its standard deviation, relative to its root mean square.
"""

import argparse
import dataclasses

import torch

from trm_helpers import LIBERODataset, load_policy
from trm_helpers.checkpoint import find_run, load_config
from trm_helpers.collect import ensure_demonstrations

_PICTURES = 512
_OFF = 1e-3


@torch.inference_mode()
def lines(run: str) -> list[str]:
    config = load_config(find_run(run))
    data = dataclasses.replace(config.data, augmentation="none")
    train, _ = LIBERODataset.from_config(ensure_demonstrations(config),
                                         dataclasses.replace(config, data=data))
    observations = next(iter(train.batches(_PICTURES, 0, 0)))["observations"]
    rows = []
    for camera, encoder in load_policy(run).encoders.items():
        maps = []
        hook = encoder.convolutions.register_forward_hook(
            lambda _, __, out, kept=maps: kept.append(out))
        answer = encoder(observations[camera].flatten(0, -4))
        hook.remove()
        off = (maps[0].abs() < _OFF).all(dim=3).all(dim=2).all(dim=0)
        spread = answer.std(0).mean() / answer.square().mean().sqrt()
        rows.append(f"| {run} | {camera} | {int(off.sum())} of {len(off)} | {spread:.3f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("| run | camera | channels that are always off | spread of the answer |\n"
          "|---|---|---|---|")
    for run in given.runs:
        print(*lines(run), sep="\n", flush=True)


if __name__ == "__main__":
    main()
