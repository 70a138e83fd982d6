"""Speed and memory of data loaders: docs/loading.md.

    python benchmarks/loading.py data/scripted/libero_spatial/NAME_demo.hdf5
    python benchmarks/loading.py FILE_demo.hdf5 --peer-python build/peers/bin/python --repeats 7

Our loader and others (robomimic, LIBERO, LeRobot): batches of 64, shuffled, two cameras and
proprioception, one process and one thread each. Loaders take turns, each in a new process, so a
ratio compares two loaders of the same round. Without ``--peer-python`` the others are installed
into a separate environment, build/peers.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH = 64
PEER_FOLDER = Path("build/peers")

# name -> what a sample is; ours take settings of Config, peers a loader and its settings
OURS = {
    "ram, 128 px, bytes": dict(storage="ram", image_size=128, as_bytes=True),
    "mmap, 128 px, bytes": dict(storage="mmap", image_size=128, as_bytes=True),
    "gpu, 128 px, bytes": dict(storage="gpu", image_size=128, as_bytes=True),
    "ram, 128 px, floats": dict(storage="ram", image_size=128),
    "mmap, 128 px, floats": dict(storage="mmap", image_size=128),
    "gpu, 128 px, floats": dict(storage="gpu", image_size=128),
    "ram, 128 px, 10 frames, bytes": dict(storage="ram", image_size=128, sequence_length=10,
                                          as_bytes=True),
    "ram, 64 px, chunk 8, bytes": dict(storage="ram", image_size=64, chunk=8, as_bytes=True),
    "ram, 64 px, chunk 8, floats": dict(storage="ram", image_size=64, chunk=8),
    "mmap, 64 px, chunk 8, floats": dict(storage="mmap", image_size=64, chunk=8),
    "gpu, 64 px, chunk 8, floats": dict(storage="gpu", image_size=64, chunk=8),
    "ram, 64 px, chunk 8, augmented": dict(storage="ram", image_size=64, chunk=8,
                                           augmentation="shift"),
}
PEERS = {
    "robomimic low_dim, bytes": dict(loader="robomimic", cache="low_dim"),
    "robomimic all, bytes": dict(loader="robomimic", cache="all"),
    "robomimic all, floats": dict(loader="robomimic", cache="all", floats=True),
    "LIBERO low_dim, 10 frames, bytes": dict(loader="libero", cache="low_dim"),
    "LeRobot PNG, floats": dict(loader="lerobot"),
}
RATIOS = [
    ("ram, 128 px, bytes", "robomimic all, bytes", "one frame, no resizing, uint8"),
    ("mmap, 128 px, bytes", "robomimic all, bytes", "one frame, no resizing, uint8"),
    ("ram, 128 px, floats", "robomimic all, floats", "one frame, no resizing, float32"),
    ("ram, 128 px, bytes", "robomimic low_dim, bytes", "one frame, no resizing, uint8"),
    ("mmap, 128 px, bytes", "robomimic low_dim, bytes", "one frame, no resizing, uint8"),
    ("ram, 64 px, chunk 8, floats", "robomimic all, bytes", "our preset's sample, theirs"),
    ("ram, 64 px, chunk 8, floats", "robomimic low_dim, bytes", "our preset's sample, theirs"),
    ("ram, 64 px, chunk 8, floats", "LIBERO low_dim, 10 frames, bytes",
     "our preset's sample (1 frame), its default (10)"),
    ("ram, 64 px, chunk 8, bytes", "LIBERO low_dim, 10 frames, bytes",
     "our preset's sample (1 frame), its default (10)"),
    ("ram, 128 px, bytes", "LIBERO low_dim, 10 frames, bytes",
     "our sample of 1 frame, its default of 10"),
    ("ram, 128 px, 10 frames, bytes", "LIBERO low_dim, 10 frames, bytes", "ten frames, uint8"),
    ("ram, 128 px, floats", "LeRobot PNG, floats", "one frame, no resizing, float32"),
]


# --- one loader, in a process of its own ---------------------------------------------------------
def our_batches(path: str, settings: dict):
    import torch

    from trm_helpers.config import Config
    from trm_helpers.data.dataset import LIBERODataset

    settings = {"augmentation": "none", **settings}
    as_bytes = settings.pop("as_bytes", False)
    device = "cuda" if settings["storage"] == "gpu" else "cpu"
    data = LIBERODataset(path, config=Config().replace(
        cameras=("agentview_rgb", "eye_in_hand_rgb"), proprioception=True, **settings))
    epoch = 0
    while True:
        batches = data.batches(BATCH, 0, epoch, device=device)
        if as_bytes:
            batches = (data.batch(indices, device, as_bytes=True)
                       for indices in torch.randperm(len(data)).split(BATCH))
        for batch in batches:
            if device == "cuda":
                torch.cuda.synchronize()
            yield len(batch["mask"])
        epoch += 1


def peer_batches(path: str, settings: dict):
    from torch.utils.data import DataLoader

    settings = dict(settings)
    loader, floats = settings.pop("loader"), settings.pop("floats", False)
    sys.path.insert(0, str(Path(__file__).parent))
    import peers_read

    if loader == "lerobot":
        data = peers_read.lerobot_dataset(path)
    else:
        data = getattr(peers_read, f"{loader}_dataset")(path, **settings)
    batches = DataLoader(data, batch_size=BATCH, shuffle=True)
    while True:
        for batch in batches:
            if floats:  # what robomimic's training does with a batch before its network
                import robomimic.utils.obs_utils as obs_utils

                for camera in peers_read.RGB:
                    obs_utils.process_obs(batch["obs"][camera], obs_modality="rgb")
            yield len(batch["actions"] if "actions" in batch else batch["action"])


def own_memory() -> float:
    """MiB of this process that are not pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024


def measure(name: str, path: str, seconds: float) -> dict:
    """Samples per second and per CPU second, MiB of memory, seconds until the first batch."""
    import torch

    torch.set_num_threads(1)
    before, began = own_memory(), time.perf_counter()
    batches = our_batches(path, OURS[name]) if name in OURS else peer_batches(path, PEERS[name])
    for _ in range(3):  # set-up in the first batches is not timed
        next(batches)
    ready = time.perf_counter() - began
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        count += next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"samples_per_s": count / wall, "samples_per_cpu_s": count / cpu, "ready_s": ready,
            "own_mib": own_memory() - before,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


# --- all of them ---------------------------------------------------------------------------------
def run_one(python: str, name: str, given, **variables) -> dict | None:
    """One measurement in a new process; prints the reason for None, a loader that does not run."""
    command = [python, __file__, given.file, "--only", name, "--seconds", str(given.seconds)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **variables})
    if done.returncode:
        print(f"{name}: excluded ({(done.stderr.strip().splitlines() or ['no reason'])[-1]})")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_all(given) -> dict[str, list[dict]]:
    """name -> one row a round; a loader that fails is not tried again."""
    import torch

    names = [name for name in (*OURS, *PEERS)
             if torch.cuda.is_available() or not name.startswith("gpu")]
    rows: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.repeats):
            for name in list(rows):
                python = sys.executable if name in OURS else str(given.peer_python)
                row = run_one(python, name, given, LEROBOT_COPY=f"{folder}/lerobot")
                if row is None:
                    del rows[name]
                    continue
                rows[name].append(row)
                print(f"round {turn + 1}, {name}: {row['samples_per_s']:,.0f} samples/s",
                      flush=True)
    return rows


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def print_tables(rows: dict[str, list[dict]]) -> None:
    print("\n| loader and sample | samples/s | per CPU second | own memory, MiB | peak, MiB | "
          "ready after, s |\n|---|---|---|---|---|---|")
    for name, results in rows.items():
        columns = {key: [row[key] for row in results] for key in results[0]}
        whose = "ours, " if name in OURS else ""
        rest = [statistics.median(columns[key]) for key in ("own_mib", "peak_mib", "ready_s")]
        print(f"| {whose}{name} | {spread(columns['samples_per_s'])} | "
              f"{spread(columns['samples_per_cpu_s'])} | {rest[0]:,.0f} | {rest[1]:,.0f} | "
              f"{rest[2]:.1f} |")
    print("\n| ours | against | samples compared | ratio of samples/s | per CPU second |\n"
          "|---|---|---|---|---|")
    for ours, peer, alike in RATIOS:
        if not (rows.get(ours) and rows.get(peer)):
            continue
        cells = []
        for key in ("samples_per_s", "samples_per_cpu_s"):
            ratios = [a[key] / b[key] for a, b in zip(rows[ours], rows[peer], strict=True)]
            cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to "
                         f"{max(ratios):.1f})")
        print(f"| {ours} | {peer} | {alike} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a demonstration file")
    parser.add_argument("--peer-python", type=Path, help="a Python that has the peers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, per loader")
    parser.add_argument("--only", choices=[*OURS, *PEERS], help="measure one, here; prints JSON")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.file, given.seconds)))
        return
    if given.peer_python is None:
        import peers_read

        given.peer_python = peers_read.install(PEER_FOLDER)
    print_tables(run_all(given))


if __name__ == "__main__":
    main()
