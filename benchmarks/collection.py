"""Collection speed, in demonstrations per minute, compared with LIBERO's: docs/loading.md.

    python benchmarks/collection.py --task 2 --rounds 5

LIBERO records an episode as states and actions (``scripts/collect_demonstration.py``), then replays
the actions in an environment that renders every camera in every step, and writes the observations
(``scripts/create_dataset.py``: a reset, the episode's own model, its first state, its actions).
Its resets build the model anew. Here frames are rendered while the expert acts, all of them or
every fourth, in one model. All ways make the same episodes, taking turns in one process, and the
frames of the first two are compared. Then two processes collect episodes. The first three rows
include writing files, but not building environments.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from trm_helpers import schema
from trm_helpers.demos.collect import _write_demo, collect_demonstrations, record_demonstration
from trm_helpers.demos.experts import Expert
from trm_helpers.demos.skills import Style
from trm_helpers.sim.env import LiberoEnv

STRIDE = 4


def collect(env: LiberoEnv, seed: int, path: Path, frame_stride: int = 1) -> float:
    """One episode as ``collect_demonstrations`` makes it, without pushes; the seconds it took."""
    began = time.perf_counter()
    record = record_demonstration(env, np.random.default_rng(seed), disturb=False,
                                  frame_stride=frame_stride)
    with h5py.File(path, "w") as file:
        _write_demo(file.create_group("demo"), record)
    return time.perf_counter() - began


def forget_model(env: LiberoEnv) -> None:
    """Let the next reset build the model, as it does without :class:`kept_model.KeptModel`."""
    env.raw.kept_model.xml = ""


def record_states(env: LiberoEnv, seed: int) -> dict:
    """The same episode as LIBERO records it, without rendering."""
    generator = np.random.default_rng(seed)
    forget_model(env)
    env.reset(seed=int(generator.integers(2**31)))
    expert = Expert(env, Style.sample(generator))
    states, actions, success, xml = [], [], False, env.model_xml()
    while not success and len(actions) < env.horizon:
        actions.append(expert.act())
        states.append(env.state())
        _, success = env.step(actions[-1])
    return {"states": states, "actions": actions, "model": xml}


def play_again(env: LiberoEnv, recorded: dict, path: Path) -> None:
    """LIBERO's second step, on its own environment."""
    libero = env.raw
    forget_model(env)
    libero.reset()
    libero.reset_from_xml_string(recorded["model"])
    libero.sim.reset()
    libero.sim.set_state_from_flattened(recorded["states"][0])
    libero.sim.forward()
    seen = [libero.step(action)[0] for action in recorded["actions"]]
    with h5py.File(path, "w") as file:
        for name, key in schema.CAMERAS.items():
            file[f"demo/obs/{name}"] = np.stack([values[key] for values in seen])
        file["demo/actions"] = np.stack(recorded["actions"])
        file["demo/states"] = np.stack(recorded["states"])


def frame_difference(ours: Path, theirs: Path) -> tuple[int, float]:
    """Frames of both cameras in ours; largest mean difference in grey values of a frame.

    LIBERO's frame t is rendered after action t, ours before: they are compared one step apart.
    """
    worst, count = 0.0, 0
    with h5py.File(ours) as a, h5py.File(theirs) as b:
        for camera in schema.CAMERAS:
            one, other = a[f"demo/obs/{camera}"][1:], b[f"demo/obs/{camera}"][:-1]
            count += len(one) + 1
            difference = np.abs(one.astype(int) - other).mean(axis=(1, 2, 3))
            worst = max(worst, float(difference.max()))
    return count, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="libero_spatial", choices=schema.SUITES)
    parser.add_argument("--task", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    ours_took, fewer_took, theirs_took, differences, frames = [], [], [], [], 0
    with (tempfile.TemporaryDirectory() as folder, LiberoEnv(given.suite, given.task) as env,
          LiberoEnv(given.suite, given.task, lazy=False) as theirs):
        ours_file, their_file = Path(folder, "ours.hdf5"), Path(folder, "theirs.hdf5")
        for seed in range(given.rounds):
            ours_took.append(collect(env, seed, ours_file))
            fewer_took.append(collect(env, seed, Path(folder, "fewer.hdf5"), STRIDE))
            began = time.perf_counter()
            play_again(theirs, record_states(env, seed), their_file)
            theirs_took.append(time.perf_counter() - began)
            count, difference = frame_difference(ours_file, their_file)
            frames += count
            differences.append(difference)
        began = time.perf_counter()
        collect_demonstrations(given.suite, given.task, 2 * given.rounds, folder, disturb=False,
                               workers=given.workers)
        together = time.perf_counter() - began
    print(f"{given.rounds} episodes, {frames} frames; mean difference of a frame between the two "
          f"at most {max(differences):.2f} of 255")
    print("| way | processes | demonstrations per minute | ratio to LIBERO's |\n|---|---|---|---|")
    print(f"| LIBERO's: record, replay | 1 | {60 / statistics.mean(theirs_took):.1f} | "
          "1 |")
    for way, took in (("ours", ours_took), (f"ours, `frame_stride={STRIDE}`", fewer_took)):
        ratios = [b / a for a, b in zip(took, theirs_took, strict=True)]
        print(f"| {way} | 1 | {60 / statistics.mean(took):.1f} | "
              f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
    rate = 2 * given.rounds / together
    print(f"| ours, environments built | {given.workers} | {60 * rate:.1f} | "
          f"{rate * statistics.mean(theirs_took):.2f} |")


if __name__ == "__main__":
    main()
