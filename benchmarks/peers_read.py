"""Whether other projects' loaders read our demonstration files correctly.

    python -m venv build/peers && python benchmarks/peers_read.py --install build/peers
    build/peers/bin/python benchmarks/peers_read.py FILE_demo.hdf5

The first line installs robomimic, LIBERO's training code and LeRobot into a separate environment,
with the PyTorch that runs the script. The second reads a file there with robomimic's
``SequenceDataset`` and LIBERO's ``get_dataset``, compares every sample with the file as h5py reads
it, and ends with code 1 if any differs. ``--out read.npz`` writes the samples, which
``tests/data/test_dataset.py`` compares with ours. LeRobot reads only its own format.
``benchmarks/loading.py`` times all of them.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch

PEERS = ("robomimic==0.3.0", "hf-libero==0.1.4", "lerobot==0.4.4",
         "torchvision==0.28.0", "six==1.17.0", "accelerate==1.15.0", "av==18.1.0",
         "datasets==5.2.0", "diffusers==0.42.1", "dill==0.4.1", "multiprocess==0.70.19",
         "pyarrow==26.0.1",
         # what LeRobot's policies import
         "cachebox==6.2.10", "deepdiff==9.1.0", "draccus==0.11.6", "mergedeep==1.3.4",
         "mypy-extensions==1.2.0", "orderly-set==5.5.0", "pyserial==3.5", "pyyaml-include==2.2",
         "toml==0.10.2", "typing-inspect==0.9.0")
RGB = ("agentview_rgb", "eye_in_hand_rgb")
LOW_DIM = ("joint_states", "gripper_states", "ee_pos")


def install(folder: Path) -> Path:
    """Install the peers into the virtual environment ``folder``, made if need be; its Python.

    Their own requirements are old or large: they get this interpreter's PyTorch and h5py through a
    .pth file and nothing but themselves is downloaded.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, check=True, capture_output=True, text=True)
                    .stdout.strip())
    (packages / "our_packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PEERS], check=True)
    return python


def import_torchvision() -> None:
    """The index's torchvision is built for CUDA; beside a CPU build of PyTorch its compiled
    operators are missing and its import stops. The loaders use none of them: declare them."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}",
                                 "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def robomimic_dataset(path: str, cache: str | None, chunk: int = 1):
    """robomimic's ``SequenceDataset`` with ``chunk`` observations and actions a sample."""
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.utils.dataset import SequenceDataset

    obs_utils.initialize_obs_utils_with_obs_specs(
        {"obs": {"rgb": list(RGB), "low_dim": list(LOW_DIM)}})
    return SequenceDataset(
        hdf5_path=path, obs_keys=(*RGB, *LOW_DIM), dataset_keys=("actions",),
        frame_stack=1, seq_length=chunk, pad_frame_stack=True, pad_seq_length=True,
        get_pad_mask=False, goal_mode=None, hdf5_cache_mode=cache, hdf5_use_swmr=False,
        load_next_obs=False)


def libero_dataset(path: str, cache: str | None = "low_dim", frames: int = 10):
    """LIBERO's data set as its training code makes it; by default ten frames a sample."""
    import_torchvision()
    from libero.lifelong.datasets import SequenceVLDataset, get_dataset

    dataset, _ = get_dataset(path, {"rgb": list(RGB), "low_dim": list(LOW_DIM)}, seq_len=frames,
                             hdf5_cache_mode=cache)
    return SequenceVLDataset(dataset, torch.zeros(768))  # 768: the width of its BERT embedding


def lerobot_dataset(path: str):
    """LeRobot's data set, one frame a sample, of a copy in its format with PNG images.

    The copy is made once, in the folder that ``$LEROBOT_COPY`` names.
    """
    import_torchvision()
    import h5py
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    folder = Path(os.environ["LEROBOT_COPY"])
    if folder.exists():
        return LeRobotDataset("local/demos", root=folder)
    features = {name: {"dtype": "image", "shape": (128, 128, 3),
                       "names": ["height", "width", "channel"]} for name in RGB}
    features |= {"state": {"dtype": "float32", "shape": (12,), "names": None},
                 "action": {"dtype": "float32", "shape": (7,), "names": None}}
    copy = LeRobotDataset.create("local/demos", fps=20, features=features, root=folder,
                                 use_videos=False)
    with h5py.File(path) as file:
        for demo in file["data"].values():
            state = np.concatenate([demo["obs"][key][:] for key in LOW_DIM], axis=1)
            for t, action in enumerate(demo["actions"][:]):
                frame = {name: demo["obs"][name][t] for name in RGB}
                copy.add_frame({**frame, "state": state[t].astype(np.float32),
                                "action": action.astype(np.float32), "task": "a task"})
            copy.save_episode()
    copy.finalize()
    return LeRobotDataset("local/demos", root=folder)


def everything(dataset) -> dict[str, np.ndarray]:
    """All samples of a data set, one after another: name -> (samples, T, ...)."""
    samples = [dataset[index] for index in range(len(dataset))]
    arrays = {name: np.stack([sample["obs"][name] for sample in samples])
              for name in (*RGB, *LOW_DIM)}
    return {**arrays, "actions": np.stack([sample["actions"] for sample in samples])}


def in_the_file(path: str, length: int) -> dict[str, np.ndarray]:
    """The same from the file itself: ``length`` steps from each on, the last one repeated."""
    import h5py

    arrays: dict[str, list[np.ndarray]] = {}
    with h5py.File(path) as file:
        for name in sorted(file["data"], key=lambda name: int(name.removeprefix("demo_"))):
            demo = file["data"][name]
            steps = np.arange(len(demo["actions"]))
            steps = np.minimum(steps[:, None] + np.arange(length), steps[-1])
            arrays.setdefault("actions", []).append(demo["actions"][()][steps])
            for key in (*RGB, *LOW_DIM):
                arrays.setdefault(key, []).append(demo["obs"][key][()][steps])
    return {name: np.concatenate(parts) for name, parts in arrays.items()}


def differences(read: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    """In the precision that was read: robomimic makes its copy of the actions float32."""
    return [f"{name}: {read[name].shape} read, {array.shape} in the file"
            if read[name].shape != array.shape else f"{name} differs"
            for name, array in expected.items()
            if not np.array_equal(read[name], array.astype(read[name].dtype))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a demonstration file")
    parser.add_argument("--out", help="where to write what was read, an .npz file")
    parser.add_argument("--install", type=Path, metavar="FOLDER",
                        help="install the peers into a virtual environment there, and stop")
    given = parser.parse_args()
    if given.install:
        print(install(given.install))
        return 0
    read = {f"robomimic_{cache}": everything(robomimic_dataset(given.file, cache, chunk=3))
            for cache in ("low_dim", "all")}
    read["libero"] = everything(libero_dataset(given.file, frames=4))
    if given.out:
        np.savez(given.out, **{f"{peer}/{name}": array for peer, arrays in read.items()
                               for name, array in arrays.items()})
    wrong = 0
    for peer, arrays in read.items():
        samples, length = arrays["actions"].shape[:2]
        found = differences(arrays, in_the_file(given.file, length))
        wrong += bool(found)
        print(f"{peer}: {samples} samples of {length} steps, "
              f"{'; '.join(found) or 'all arrays equal to the file'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
