"""The localizer in pretrained/, which 03_model looks again with.

    python benchmarks/look_again_scenes.py libero_spatial FOLDER
    python benchmarks/localizer.py FOLDER --suite libero_spatial --name spatial-looks

trains the package's localizer on the training scenes of experiment 1, prints how many of the test
scenes it locates within 1 % of the side after each look, and writes ``pretrained/<name>``.
"""

import argparse
from pathlib import Path

import torch
from look_again import CLOSE, LOOKS, PRECISION, TASKS, errors, load, within

from trm_helpers.paths import repo_root
from trm_helpers.policy.keypoints import save_localizer, train_localizer
from trm_helpers.policy.localizer import Localizer
from trm_helpers.software import software_versions
from trm_helpers.stats import rate_text

THINGS = ("object", "target")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the scenes")
    parser.add_argument("--suite", required=True, choices=["libero_object", "libero_spatial"])
    parser.add_argument("--name", required=True, help="folder below pretrained/")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    software = software_versions()  # of the code as it is now
    numbers = torch.eye(TASKS)
    frames, places, tasks = load(given.folder, given.suite, "train")
    torch.manual_seed(given.seed)
    localizer = Localizer(len(THINGS), TASKS, TASKS, looks=LOOKS)
    localizer.known.copy_(numbers)
    train_localizer(localizer, frames, places, numbers[tasks], seed=given.seed, precision=PRECISION)
    test = load(given.folder, given.suite, "test")
    close = within(errors(lambda images, told: localizer.locate(images, numbers[told]), test),
                   CLOSE)  # (scenes, 1 + looks)
    hits, scenes = close.sum(0).tolist(), len(close)
    for look, count in enumerate(hits):
        print(f"after {look} further looks, within 1 %: {rate_text(count, scenes, 1)}")
    save_localizer(repo_root() / "pretrained" / given.name, localizer, THINGS, {
        "suite": given.suite, "seed": given.seed, "scenes": len(frames), "measured_on": scenes,
        "within 1 % after each look": hits, "software": software})


if __name__ == "__main__":
    main()
