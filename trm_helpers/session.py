"""The first call of every notebook: what this session has attached, may use, and renders with.

On Kaggle the output of another notebook lies read-only below ``/kaggle/input``, the network may be
off, and a session ends after twelve hours. Elsewhere :func:`begin` only says where things are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from pathlib import Path

import psutil

from . import __version__, paths, schema, software
from .demos.demo_files import (
    COLLECTION_ATTR,
    DemoFileError,
    json_attribute,
    open_demo_file,
    source_of,
)
from .demos.find_demos import scripted_dir
from .files import atomic_path, read_json, read_jsonl, walk
from .training.runs import copy_run
from .training.tracking import connect

SESSION_HOURS = 12.0
_SAVING_MINUTES = 20.0  # of a session, kept back for figures, the report and Kaggle's own saving
_ANSWER_WITHIN = 5.0  # seconds, for Kaggle's secrets
_LEAST_FREE = 2e9  # bytes of the working disk
_HUB = "https://huggingface.co"
_CODE = {"trm_helpers", "pretrained", "tests", "site-packages"}  # folders, never taken


def begin(version: str = __version__) -> None:
    """Prepare this session and print one line for each step; calling it again does no harm.

    On Kaggle: takes over attached runs and demonstrations, moves data to ``/tmp`` (the working
    disk has 20 GB), reads the W&B key from the attached secrets, goes offline where there is no
    network, sets the time at which training stops, and chooses the renderer.

    Args:
        version: of the notebook.

    Raises:
        RuntimeError: the notebook belongs to another version of the package.
    """
    home = Path(__file__).resolve().parent
    if version != __version__:
        raise RuntimeError(
            f"this notebook is of version {version}, trm_helpers in {home} of {__version__}; "
            "attach the data set of the notebook's version, or open the notebook that came with it")
    print(f"package:         trm_helpers {__version__}, Python {sys.version.split()[0]}, {home}")
    for what, found in _kaggle_steps() if paths.on_kaggle() else ():
        print(f"{what + ':':16} {found}", flush=True)
    print(f"demonstrations:  {paths.data_dir()}")
    print(f"runs:            {paths.artifacts_dir()}", flush=True)


def keep(files: Iterable[Path]) -> None:
    """Copy demonstrations collected in this session into the notebook's output, on Kaggle.

    The data folder is in ``/tmp`` there, which ends with the session. Attached files are left out.
    """
    if not paths.on_kaggle():
        return
    for path in map(Path, files):
        if path.is_symlink() or not path.is_relative_to(paths.data_dir()):
            continue
        home = paths.KAGGLE_WORKING / "data" / path.relative_to(paths.data_dir())
        if not home.exists() or home.stat().st_size != path.stat().st_size:
            with atomic_path(home, path.stat().st_size) as temporary:
                shutil.copyfile(path, temporary)
        print(f"kept: {home}")


# --- the steps on Kaggle -------------------------------------------------------------------------
def _kaggle_steps() -> Iterator[tuple[str, str]]:
    os.environ.setdefault("TRM_DATA_DIR", str(paths.KAGGLE_TEMPORARY / "data"))
    os.environ.setdefault("HF_HOME", str(paths.KAGGLE_TEMPORARY / "hub"))
    yield "GPU", _gpus()
    yield "network", _network()
    yield "W&B", _tracking_key()
    yield "time", _time_left()
    yield "working disk", _free_space()
    yield from _take_over()
    try:
        found = software.ensure_gl()
        yield "renderer", f"{found['renderer']}, {found['ms']:.1f} ms for a small test frame"
    except RuntimeError as error:
        yield "renderer", f"none ({error}); training works, the simulator does not"


def _gpus() -> str:
    try:
        listed = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                                capture_output=True, text=True, timeout=30).stdout.split("\n")
    except (OSError, subprocess.TimeoutExpired):
        listed = []
    names = [name for name in listed if name.strip()]
    return ", ".join(names) or ("none; choose Settings > Accelerator > GPU T4 x2 to train in "
                                "minutes instead of hours")


def _network() -> str:
    try:
        connect(_HUB)
        return "on"
    except ConnectionError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("WANDB_MODE", "offline")
        return "off (Settings > Internet); nothing is downloaded, W&B logs offline"


def _tracking_key() -> str:
    if os.environ.get("WANDB_API_KEY"):
        return "key in WANDB_API_KEY"
    try:
        from kaggle_secrets import UserSecretsClient
    except ImportError:
        return "no key"
    pool = ThreadPoolExecutor(1)  # the client has no time limit
    try:
        os.environ["WANDB_API_KEY"] = pool.submit(
            UserSecretsClient().get_secret, "WANDB_API_KEY").result(_ANSWER_WITHIN)
        return "key from the attached secret WANDB_API_KEY; wandb_mode='online' uses it"
    except Late:
        return "no key (Kaggle's secrets do not answer)"
    except Exception:  # types of Kaggle's client: not attached, no network
        return "no key; Add-ons > Secrets attaches one as WANDB_API_KEY"
    finally:
        pool.shutdown(wait=False)


def _time_left() -> str:
    """Set when training and searches stop, unless the environment says so already."""
    if not os.environ.get(software.STOP_AT):
        ends = psutil.Process(1).create_time() + 3600 * SESSION_HOURS
        if ends < time.time():
            return f"the session is older than {SESSION_HOURS:g} hours; no time limit is set"
        os.environ[software.STOP_AT] = str(ends - 60 * _SAVING_MINUTES)
    left = software.minutes_left()
    return (f"training and searches stop {left / 60:.1f} hours from now with everything saved; "
            "attach this notebook's output to a new session to go on")


def _free_space() -> str:
    disk = shutil.disk_usage(paths.KAGGLE_WORKING)
    said = f"{disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free"
    return said + ("; delete files in /kaggle/working, or checkpoints cannot be written"
                   if disk.free < _LEAST_FREE else "")


# --- attached runs and demonstrations ------------------------------------------------------------
def _take_over() -> Iterator[tuple[str, str]]:
    """Runs are copied into the artifacts folder, scripted demonstrations linked in the data folder.

    Human demonstrations are found where they are. Of several runs of one name the one with the most
    epochs, then episodes, is taken; a run that is in the artifacts folder already stays as it is.
    """
    runs: dict[str, list[Path]] = {}
    demos: list[Path] = []
    for path in _attached(paths.KAGGLE_INPUT):
        if path.is_dir():
            runs.setdefault(path.name, []).append(path)
        else:
            demos.append(path)
    for name, several in sorted(runs.items()):
        yield "attached run", _take_over_run(name, several)
    linked, human = 0, 0
    for path in demos:
        try:
            linked += (taken := _link_scripted(path))
            human += not taken
        except DemoFileError as error:
            yield "left out", str(error)
    if demos:
        yield "attached demos", f"{linked} scripted and {human} human file(s)"
    elif not runs:
        yield "attached", f"neither runs nor demonstrations below {paths.KAGGLE_INPUT}"


def _attached(root: Path) -> Iterator[Path]:
    """Run folders and demonstration files below ``root``."""
    for place, folders, names in walk(root):
        if "config.json" in names and {"policy.json", "metrics.jsonl"} & set(names):
            folders.clear()
            yield place
        else:
            folders[:] = [name for name in folders if name not in _CODE]
            yield from (place / name for name in names if name.endswith(schema.DEMO_FILE_SUFFIX))


def _take_over_run(name: str, several: list[Path]) -> str:
    best = max(several, key=lambda run: (_lines(run / "metrics.jsonl"),
                                         _lines(run / "episodes.jsonl")))
    others = f"; {len(several) - 1} other(s) of this name have no more" if several[1:] else ""
    try:
        home = paths.run_dir(name)
        if home.exists():
            return f"{name} is in {home} already and stays as it is"
        read_json(best / "config.json")
        copy_run(best, home, with_searches=True)
        return (f"{name}, {_lines(home / 'metrics.jsonl')} epochs, "
                f"{_lines(home / 'episodes.jsonl')} episodes, from {best}{others}")
    except (ValueError, OSError) as error:
        return f"{name} was not taken over: {error}"


def _lines(path: Path) -> int:
    try:
        return len(read_jsonl(path))
    except (ValueError, OSError):  # damaged
        return 0


def _link_scripted(path: Path) -> bool:
    """Link a scripted file where collection looks for it; False for a human one."""
    if source_of(path) == "human":
        return False
    with open_demo_file(path) as file:
        made = json_attribute(file[schema.DATA_GROUP], COLLECTION_ATTR)
    placement, suite = made.get("placement", "benchmark"), made.get("suite")
    if suite not in schema.SUITES or placement not in schema.PLACEMENTS:
        raise DemoFileError(f"{path}: made for suite {suite!r}, placement {placement!r}, which "
                            "this version does not have")
    home = scripted_dir(suite, placement) / path.name
    home.parent.mkdir(parents=True, exist_ok=True)
    if not home.exists():
        home.unlink(missing_ok=True)  # a dangling link
        home.symlink_to(path)
    return True
