"""Is this machine ready? Versions, OpenGL, the simulator in a short episode, disk, memory, GPU."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import paths, schema
from .files import nearest, writable
from .opengl import NVIDIA_EGL, configure_gl, renders_on_cpu
from .software import OTHER_GPU, free_memory, gpu_fault, installed_version, version_problems

if TYPE_CHECKING:
    from .sim.checks import SimulatorCheck, Subject

PYTHONS = ((3, 10), (3, 13))  # oldest and newest supported
OLDEST_TORCH = (2, 6)  # in older ones torch.load(weights_only=True) can run code from a file
_GB = 1e9
_WIDTH = 100  # columns of the table


@dataclass(frozen=True)
class Check:
    """One row of the table: ``status`` is ok, warn or fail; ``hint`` says what to do."""

    name: str
    status: str
    found: str
    hint: str = ""


def _row(name: str, fits: bool, found: str, hint: str, otherwise: str = "fail") -> Check:
    return Check(name, "ok" if fits else otherwise, found, "" if fits else hint)


def preflight(quick: bool = False) -> list[Check]:
    """Check this machine. A check that raises is a row that fails.

    Args:
        quick: skip the timed frame and the checks of the simulator (15 s on two CPU cores).
    """
    checks: list[Check] = []

    def run(name: str, probe: Callable[[], Check | Iterable[Check]]) -> None:
        try:
            found = probe()
            checks.extend([found] if isinstance(found, Check) else found)
        except (Exception, SystemExit) as error:  # whatever a broken installation raises
            checks.append(Check(name, "fail", f"{type(error).__name__}: {error}",
                                "the check itself failed; fix what the message names"))

    run("Python", _check_python)
    run("torch", _check_torch)
    run("simulator", _check_versions)
    if not quick:
        run("OpenGL", _check_gl)
        if all(check.status != "fail" for check in checks):
            run("simulator", _check_scene)
    run("GPU", _check_gpu)
    run("CPU cores", _check_cores)
    run("memory", _check_memory)
    run("disk of data", lambda: _check_disk("data", paths.data_dir()))
    run("disk of artifacts", lambda: _check_disk("artifacts", paths.artifacts_dir()))
    return checks


def table(checks: list[Check]) -> str:
    """The checks as aligned text of up to 100 columns, each hint below its row."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        start, indent = f"{check.status:4}  {check.name:{width}}  ", " " * (width + 8)
        lines += textwrap.wrap(check.found, _WIDTH, initial_indent=start, subsequent_indent=indent,
                               break_on_hyphens=False) or [start.rstrip()]
        lines += textwrap.wrap(check.hint, _WIDTH, initial_indent=indent, subsequent_indent=indent,
                               break_on_hyphens=False)
    return "\n".join(lines)


def _check_python() -> Check:
    oldest, newest = (".".join(map(str, version)) for version in PYTHONS)
    fits = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    return _row("Python", fits, platform.python_version(), f"use Python {oldest} to {newest}")


def _check_torch() -> Check:
    found = installed_version("torch")
    if not found:
        return Check("torch", "fail", "missing", "run: make setup")
    fits = tuple(map(int, found.split(".")[:2])) >= OLDEST_TORCH
    return _row("torch", fits, found, "needs {}.{} or newer; in older versions, loading a training "
                "state can run code from the file".format(*OLDEST_TORCH))


def _check_versions() -> Iterator[Check]:
    problems = version_problems()
    for name in dict.fromkeys([*schema.PINNED, *problems]):
        yield _row(name, name not in problems, installed_version(name) or "missing",
                   problems.get(name, ""))


def _check_gl() -> Check:
    try:
        found = configure_gl()
    except (RuntimeError, ValueError) as error:
        return Check("OpenGL", "fail", "no frame", str(error))
    unused = renders_on_cpu(found["renderer"]) and _has_gpu()
    settings = found["settings"]
    device = settings.get("MUJOCO_EGL_DEVICE_ID")
    backend = settings["MUJOCO_GL"] + (f" device {device}" if device else "")
    hints = [f"{NVIDIA_EGL} is missing or does not render: the CPU renders although there is a "
             "GPU"] if unused else []
    return Check("OpenGL", "warn" if unused else "ok",
                 f"{backend}, {found['renderer']}, {found['ms']:.1f} ms a frame",
                 "; ".join([*hints, *found["failures"]]))


def run_check(check: SimulatorCheck, subject: Subject) -> Check:
    """The row of a check of the simulator; a check that raises fails."""
    try:
        found, right = check.measure(subject)
    except Exception as error:
        found, right = f"{type(error).__name__}: {error}", False
    return _row(check.name, right, found, check.hint)


def _check_scene(*chosen: SimulatorCheck) -> Iterator[Check]:
    from .sim.checks import QUICK, SCENE, Subject
    from .sim.env import LiberoEnv

    with LiberoEnv(*SCENE) as env:
        subject = Subject(env)
        for check in chosen or QUICK:
            yield run_check(check, subject)


@functools.cache  # once in a process
def check_settling() -> None:
    """Raise ``RuntimeError`` where LIBERO-Spatial's objects do not settle as in the benchmark."""
    from .sim.checks import contacts

    (row,) = _check_scene(contacts)
    if row.status != "ok":
        raise RuntimeError(f"{row.name}: {row.found}; {row.hint}")


def _has_gpu() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:  # a broken torch fails in the row of the GPU
        return False


def _check_gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("GPU", "ok", "none: everything runs on the CPU")
    if fault := gpu_fault():
        return Check("GPU", "warn", fault, f"everything runs on the CPU. {OTHER_GPU}")
    properties = torch.cuda.get_device_properties(0)
    # by default PyTorch counts the T4's emulation, which is far too slow
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Check("GPU", "ok", f"{torch.cuda.device_count()} x {properties.name}, "
                 f"{properties.total_memory / _GB:.0f} GB, {'bf16' if bf16 else 'fp16'}")


def _check_cores() -> Check:
    return Check("CPU cores", "ok", str(len(os.sched_getaffinity(0))))


def _check_memory() -> Check:
    memory = free_memory() / _GB
    return _row("memory", memory > 4, f"{memory:.1f} GB free",
                "the demo needs 4 GB; close other programs", "warn")


def _check_disk(name: str, folder: Path) -> Check:
    if not writable(folder):
        return Check(f"disk of {name}", "fail", f"{folder} cannot be written",
                     f"set TRM_{name.upper()}_DIR to another folder")
    free = shutil.disk_usage(nearest(folder)).free / _GB
    return _row(f"disk of {name}", free > 3, f"{free:.0f} GB free at {folder}",
                "the demo needs 3 GB; make room, or set TRM_DATA_DIR and TRM_ARTIFACTS_DIR to "
                "folders on another disk", "warn" if free > 1 else "fail")
