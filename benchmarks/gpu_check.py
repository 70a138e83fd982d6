"""Check of this machine, about five minutes with a GPU: one table, one JSON file for a bug report.

    make gpu-check
    python benchmarks/gpu_check.py --device cpu

Steps: the machine, preflight, frames per second by renderer, the tests that need a GPU, training
speed, one demonstration, and the demo's policy, trained and evaluated in ten episodes. Each runs in
a process of its own with a time limit, so that a step that fails or hangs costs no other. Without a
GPU the sizes are smaller, and no success is expected of a policy trained that briefly. User name,
host name and home folder are removed from the file. The exit code is 1 if a step failed.
"""

import argparse
import contextlib
import getpass
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trm_helpers import opengl, paths, schema, software
from trm_helpers.config import from_flat
from trm_helpers.files import write_json
from trm_helpers.notebooks import DEMO_FLOOR
from trm_helpers.preflight import Check, table

SIZES = {  # by device
    "cuda": dict(batches=(64, 256, 1024), frames=50, demos=30, epochs=70, episodes=10,
                 floor=DEMO_FLOOR),
    "cpu": dict(batches=(64,), frames=10, demos=3, epochs=5, episodes=2, floor=0.0),
}
DEMO = from_flat("demo").data
RUN = "gpu-check"
_OUTPUT = 4000  # characters of a failed step's output that are kept


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, and what to make of its standard output.

    ``read`` returns the table's text, what to store, and whether all is well. Without ``needed`` a
    failure is a warning.
    """

    command: list
    limit: float
    read: Callable[[str], tuple[str, object, bool]]
    environment: dict = field(default_factory=dict)  # None is an absent variable
    needed: bool = True


# --- what steps measure, each in a process of its own ---------------------------------------------
def measure_machine(_: int) -> dict:
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    driver = None
    if gpus and shutil.which("nvidia-smi"):  # not in every container
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True).stdout.split("\n")[0]
    return {
        "gpus": [{"name": gpu.name, "memory": gpu.total_memory,
                  "capability": f"{gpu.major}.{gpu.minor}"} for gpu in gpus],
        "bf16": bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False),
        "cuda": torch.version.cuda, "driver": driver,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)), "free_memory": software.free_memory(),
        "threads": torch.get_num_threads(), **software.software_versions()}


def measure_frames(count: int) -> dict:
    """Milliseconds per frame of each camera, at the policy's moments: after a step."""
    from trm_helpers.sim.env import LiberoEnv

    with LiberoEnv(DEMO.suite, DEMO.task_ids[0]) as env:
        env.reset(init_state=0)
        milliseconds = {}
        for camera in schema.CAMERAS:
            env.step(schema.NO_OP)[0][camera]  # the first frame uploads the scene
            taken = 0.0
            for _ in range(count):
                observation, _ = env.step(schema.NO_OP)
                began = time.perf_counter()
                observation[camera]
                taken += time.perf_counter() - began
            milliseconds[camera] = 1000 * taken / count
    return {"frame_ms": milliseconds, **opengl.configure_gl()}


def measure_demonstration(_: int) -> dict:
    from trm_helpers.demos.collect import collect_demonstrations

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = collect_demonstrations(DEMO.suite, DEMO.task_ids[0], 1, folder, workers=1)
        return {"seconds": time.perf_counter() - began, "bytes": file.stat().st_size}


MEASURES = {"machine": measure_machine, "frames": measure_frames,
            "demonstration": measure_demonstration}


# --- what is read from them -----------------------------------------------------------------------
def read_machine(text: str) -> tuple[str, dict, bool]:
    found = json.loads(text)
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory'] / 1e9:.0f} GB)" for gpu in found["gpus"])
    precision = "bf16" if found["bf16"] else "fp16"
    return (f"{gpus}, {precision}, driver {found['driver']}" if gpus else "no GPU", found, True)


def read_preflight(text: str) -> tuple[str, list, bool]:
    checks = json.loads(text)
    bad = [f"{check['name']}: {check['found']}" for check in checks if check["status"] != "ok"]
    return (f"{len(checks)} checks" + (f"; {'; '.join(bad)}" if bad else ", all ok"), checks, True)


def read_frames(text: str) -> tuple[str, dict, bool]:
    found = json.loads(text)
    speeds = ", ".join(f"{1000 / ms:.0f} frames/s of {camera}" for camera, ms in
                       found["frame_ms"].items())
    return f"{speeds}; {found['renderer']}", found, True


def read_tests(text: str) -> tuple[str, str, bool]:
    last = text.strip().splitlines()[-1].strip("= ")
    return last, last, "passed" in last


def read_speeds(text: str) -> tuple[str, list, bool]:
    """The table that ``training.py`` prints."""
    head, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")]
                      for line in text.splitlines() if line.startswith("|"))
    measured = [dict(zip(head, row, strict=True)) for row in rows]
    found = "; ".join(", ".join(f"{name} {cell}" for name, cell in row.items() if cell != "-")
                      for row in measured if "not installed" not in " ".join(row.values()))
    return found, measured, bool(rows)


def read_demonstration(text: str) -> tuple[str, dict, bool]:
    found = json.loads(text)
    return f"{found['seconds']:.0f} s with one process, its start included", found, True


def read_training(text: str) -> tuple[str, dict, bool]:
    found = json.loads(text)
    return (f"{found['epoch']} epochs, validation loss {found['val_loss']:.3f}, "
            f"{found['samples_per_second']:,.0f} samples/s, {found['precision']}", found, True)


def read_episodes(text: str, floor: float) -> tuple[str, dict, bool]:
    found = json.loads(text)
    kept = {name: found[name] for name in ("successes", "episodes", "success_rate", "errors")}
    expected = f"; expected {floor:.0%} or more" if floor else "; trained too briefly to succeed"
    return (f"{found['successes']} of {found['episodes']} episodes{expected}", kept,
            not found["errors"] and found["success_rate"] >= floor)


# --- the steps ------------------------------------------------------------------------------------
def own(measure: str, count: int = 0) -> list:
    return [sys.executable, __file__, "--measure", measure, str(count)]


def command(*arguments) -> list:
    return [sys.executable, "-m", "trm_helpers", *map(str, arguments), "--json"]


def frame_steps(count: int) -> Iterator[tuple[str, Step]]:
    """One step for each renderer; only the first has to work."""
    for number, settings in enumerate(opengl.gl_settings()):
        library = Path(settings[opengl.VENDOR_FILES] or "").stem
        name = " ".join(filter(None, ["frames,", settings["MUJOCO_GL"], library]))
        yield name, Step(own("frames", count), 120, read_frames,
                         {**settings, "TRM_RENDERER": None}, needed=not number)


def steps(device: str) -> Iterator[tuple[str, Step]]:
    sizes = SIZES[device]
    yield "preflight", Step(command("preflight"), 120, read_preflight)
    yield from frame_steps(sizes["frames"])
    if device == "cuda":
        yield "tests", Step([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], 600,
                            read_tests)
    yield "training speed", Step(
        [sys.executable, "benchmarks/training.py", "--device", device, "--seconds", 1,
         "--batches", *sizes["batches"], "--out", os.devnull], 240, read_speeds)
    yield "one demonstration", Step(own("demonstration"), 240, read_demonstration)
    yield "training", Step(
        command("train", "demo", "--run-name", RUN, "--device", device, "--demos", "scripted",
                "--num-demos", sizes["demos"], "--epochs", sizes["epochs"]),
        600, read_training)
    yield "episodes", Step(
        command("evaluate", RUN, "--num-episodes", sizes["episodes"], "--num-videos", 0),
        300, lambda text: read_episodes(text, sizes["floor"]))


def run_step(name: str, step: Step, environment: dict) -> tuple[Check, dict]:
    print(f"{name} (at most {step.limit:g} s)", file=sys.stderr, flush=True)
    began, reason, environment = time.perf_counter(), "", {**environment, **step.environment}
    with subprocess.Popen(
            list(map(str, step.command)), cwd=paths.repo_root(), text=True, errors="replace",
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True) as process:
        try:
            output, messages = process.communicate(timeout=step.limit)
        except BaseException as error:  # Ctrl-C too: nothing is left running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, messages = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            reason = f"took longer than {step.limit:g} s"
    seconds, measured, well = time.perf_counter() - began, None, False
    try:
        found, measured, well = step.read(output)
    except (ValueError, LookupError, TypeError, AttributeError):  # it printed something else
        last = (messages or output).strip().splitlines()[-1:]
        found = ": ".join([f"exit code {process.returncode}", *last])
    status = "ok" if well and not reason and process.returncode == 0 else (
        "fail" if step.needed else "warn")
    record = {"step": name, "status": status, "seconds": round(seconds, 1),
              "found": reason or found, "measured": measured}
    if status != "ok":
        record["output"] = f"{output}\n{messages}"[-_OUTPUT:]
    return Check(name, status, f"{seconds:.0f} s: {record['found']}"), record


def without_names(text: str) -> str:
    """``text`` without the home folder and the names of the user and the host."""
    text = text.replace(str(paths.repo_root()), ".")
    if (home := os.path.expanduser("~")) != "/":  # of a user without a home
        text = text.replace(home, "~")
    names = {platform.node(): "HOST"}
    with contextlib.suppress(KeyError, OSError):  # a user without a name
        names[getpass.getuser()] = "USER"
    for name, instead in names.items():
        if name:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return text


def in_texts(change: Callable[[str], str], value: Any) -> Any:
    """JSON-like ``value`` with every text but the keys changed."""
    if isinstance(value, dict):
        return {key: in_texts(change, content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [in_texts(change, content) for content in value]
    return change(value) if isinstance(value, str) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=schema.DEVICES, default="auto")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these steps alone")
    parser.add_argument("--out", type=Path, default=paths.artifacts_dir() / "gpu-check.json",
                        help="the JSON file (default: %(default)s)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure, count = given.measure
        with contextlib.redirect_stdout(sys.stderr):
            found = MEASURES[measure](int(count))
        print(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(paths.repo_root()),
                       "TRM_DATA_DIR": f"{folder}/data", "TRM_ARTIFACTS_DIR": f"{folder}/artifacts"}
        if given.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        row, machine = run_step("machine", Step(own("machine"), 120, read_machine), environment)
        device = "cuda" if (machine["measured"] or {}).get("gpus") else "cpu"
        if device == "cpu" and row.status == "ok":
            status = "fail" if given.device == "cuda" else "warn"
            machine["status"], row = status, Check(row.name, status, row.found, (
                "steps at smaller sizes on the CPU, without the tests that need a GPU"))
        planned = dict(steps(device))
        if unknown := set(given.only) - planned.keys():
            parser.error(f"--only {' '.join(unknown)}: expected some of {', '.join(planned)}")
        done = [(row, machine), *(run_step(name, step, environment)
                                  for name, step in planned.items()
                                  if not given.only or name in given.only)]
        records = in_texts(lambda text: without_names(text.replace(folder, "FOLDER")),
                           [record for _, record in done])
    print(without_names(table([check for check, _ in done])))
    write_json(given.out, {"device": device, "steps": records})
    print(f"for a bug report: {given.out}")
    return int(any(check.status == "fail" for check, _ in done))


if __name__ == "__main__":
    sys.exit(main())
