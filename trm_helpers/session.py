"""The first call of every notebook: what this session has attached, may use, and renders with.

On Kaggle the output of another notebook lies read-only below ``/kaggle/input``, the network may be
off, and a session ends after twelve hours. Elsewhere :func:`begin` only says where things are.
"""

from __future__ import annotations

import ast
import contextlib
import filecmp
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from . import __version__, opengl, paths, schema, software
from .config import Config
from .demos.collect import Actor, ensure_demonstrations
from .demos.demo_files import (
    COLLECTION_ATTR,
    DemoFileError,
    demo_names,
    json_attribute,
    open_demo_file,
    source_of,
)
from .demos.find_demos import scripted_dir
from .files import atomic_path, inside, read_json, read_jsonl, visible, walk
from .stats import counted
from .training.runs import copy_run, description, load_config
from .training.tracking import connect

SESSION_HOURS = 12.0
_INJECTED, _TYPED = "# Parameters\n", "  # type: "  # of papermill's cell, of the notebook's own
_PAPERMILLS = "PAPERMILL_"  # of what papermill adds with --inject-paths
_SAVING_MINUTES = 20.0  # of a session, kept back for figures, the report and Kaggle's own saving
_ANSWER_WITHIN = 5.0  # seconds, for Kaggle's secrets
_LEAST_FREE = 2e9  # bytes of the working disk
_HUB = "https://huggingface.co"
_SHIPPED = "pretrained"  # below the artifacts folder: evaluations of shipped policies
_OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
_set_offline: list[str] = []  # of these variables, the ones that this process has set


def begin(version: str = __version__) -> None:
    """Prepare this session and print one line for each step; calling it again does no harm.

    On Kaggle: takes over attached runs and demonstrations, moves data to ``/tmp`` (the working
    disk has 20 GB), reads the W&B key from the attached secrets, goes offline where there is no
    network, sets the time at which long work stops, and chooses the renderer. A step that fails is
    printed and costs nothing else.

    Args:
        version: of the notebook.

    Raises:
        RuntimeError: the notebook belongs to another version of the package.
        ValueError: papermill passed a parameter that the notebook does not have.
    """
    home = Path(__file__).resolve().parent
    if version != __version__:
        raise RuntimeError(
            f"this notebook belongs to version {version}, but trm_helpers in {home} is version "
            f"{__version__}; attach the data set of the notebook's version, or open the notebook "
            "that came with it")
    _refuse_unknown_parameters()
    _say("package", f"trm_helpers {__version__}, Python {sys.version.split()[0]}, {home}")
    if paths.on_kaggle():
        for variable, name in (("TRM_DATA_DIR", "data"), ("HF_HOME", "hub")):
            if not os.environ.get(variable, "").strip():
                os.environ[variable] = str(paths.KAGGLE_TEMPORARY / name)
        for what, step in (("GPU", _gpus), ("network", _network), ("W&B", _tracking),
                           ("time", _time_left), ("working disk", _free_space),
                           ("attached runs", _take_over_runs),
                           ("attached demos", _link_demonstrations), ("renderer", _renderer)):
            _say(what, _guarded(step))
    _say("demonstrations", str(paths.data_dir()))
    _say("runs", str(paths.artifacts_dir()))


def demonstrations(config: Config, actor: Actor | None = None) -> dict[int, Path]:
    """:func:`collect.ensure_demonstrations`, and on Kaggle a copy of collected ones in the output.

    Demonstrations are copied also if the session's time is up before all are collected.
    """
    data = config.data
    try:
        return ensure_demonstrations(config, actor)
    finally:
        suites = {schema.own_suite(data.suite, task_id)[0] for task_id in data.task_ids}
        for suite in {data.suite} if data.actor else suites:
            keep(scripted_dir(suite, data.placement, data.actor, data.beta,
                              data.frame_stride).glob(f"*{schema.DEMO_FILE_SUFFIX}"))


def keep(files: Iterable[str | os.PathLike]) -> None:
    """Copy demonstrations collected in this session into the notebook's output, on Kaggle.

    The data folder is in ``/tmp`` there, which ends with the session. Files outside it are left
    out, as are attached ones.
    """
    if not paths.on_kaggle():
        return
    data = paths.absolute(paths.data_dir())
    for path in map(paths.absolute, files):
        if not path.is_relative_to(data):
            continue
        home = paths.KAGGLE_WORKING / "data" / path.relative_to(data)
        if not home.exists() or not filecmp.cmp(path, home, shallow=False):
            with atomic_path(home, path.stat().st_size) as temporary:
                shutil.copyfile(path, temporary)
        print(f"kept: {home}")


def _refuse_unknown_parameters() -> None:
    """papermill only warns of them, and the notebook would run with its defaults for hours."""
    latest_first = getattr(sys.modules["__main__"], "In", [])[::-1]  # IPython's list of cells
    injected = next((cell for cell in latest_first if cell.startswith(_INJECTED)), "")
    own = next((cell for cell in latest_first if _TYPED in cell), "")
    known = _assigned(own)
    for name in _assigned(injected):
        if known and name not in known and not name.startswith(_PAPERMILLS):
            raise ValueError(f"this notebook has no parameter {name!r}"
                             f"{schema.did_you_mean(name, known) or '.'} It has {', '.join(known)}")


def _assigned(cell: str) -> list[str]:
    """The names that a cell's own lines assign to; none of a cell that is no Python."""
    try:
        lines = ast.parse(cell).body
    except SyntaxError:
        return []
    return [target.id for line in lines if isinstance(line, ast.Assign)
            for target in line.targets if isinstance(target, ast.Name)]


def _say(what: str, found: str) -> None:
    for line in found.splitlines():
        print(f"{what + ':':16} {line}", flush=True)


def _guarded(step: Callable[..., str], *arguments) -> str:
    try:
        return step(*arguments)
    except Exception as error:  # of drivers, clients, disks, attached files
        return f"failed: {type(error).__name__}: {error}"


# --- the steps on Kaggle -------------------------------------------------------------------------
def _gpus() -> str:
    names: list[str] = []
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no driver, or one that hangs
        names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                               check=True, capture_output=True, text=True,
                               timeout=30).stdout.splitlines()
    return ", ".join(names) or (
        "none (the demo trains on the CPU too, in minutes); choose Settings > Accelerator > "
        "GPU T4 x2")


def _network() -> str:
    for name in _set_offline:  # by an earlier call: the network may be on now
        os.environ.pop(name, None)
    _set_offline.clear()
    try:
        connect(_HUB)
        return "on"
    except ConnectionError:
        _set_offline.extend(name for name in _OFFLINE if not os.environ.get(name))
        os.environ.update((name, _OFFLINE[name]) for name in _set_offline)
        return "off (Settings > Internet); nothing is downloaded, W&B logs offline"


def _tracking() -> str:
    said, run_id = _tracking_key(), os.environ.get("WANDB_RUN_ID", "").strip()
    if run_id:
        said += (f"\nWANDB_RUN_ID={run_id}: sessions with the same one overwrite each other, so "
                 "delete the cell that sets it and restart, then each gets a run of its own")
    return said


def _tracking_key() -> str:
    if os.environ.get("WANDB_API_KEY", "").strip():
        return "key in WANDB_API_KEY"

    def ask() -> str:
        from kaggle_secrets import UserSecretsClient

        return UserSecretsClient().get_secret("WANDB_API_KEY")

    try:
        key = (software.call_within(_ANSWER_WITHIN, ask) or "").strip()
    except ImportError:
        return "no key"
    except (Exception, SystemExit):  # types of Kaggle's client: not attached, no network
        key = ""
    if not key:
        return "no key; Add-ons > Secrets attaches one as WANDB_API_KEY"
    os.environ["WANDB_API_KEY"] = key
    return "key from the attached secret WANDB_API_KEY; wandb_mode='online' uses it"


def _time_left() -> str:
    """Set when long work stops, unless the environment says so already."""
    if not os.environ.get(software.STOP_AT, "").strip():
        ends = psutil.Process(1).create_time() + 3600 * SESSION_HOURS
        if ends < time.time():
            return f"the session is older than {SESSION_HOURS:g} hours; no time limit is set"
        os.environ[software.STOP_AT] = str(ends - 60 * _SAVING_MINUTES)
    left = software.minutes_left()
    if left <= 0:
        return "the time to stop has passed: training ends after one epoch, the rest at once"
    return (f"collection, training, searches and evaluations stop {left / 60:.1f} hours from now "
            "with everything saved; attach this notebook's output to a new session to resume")


def _free_space() -> str:
    disk = shutil.disk_usage(paths.KAGGLE_WORKING)
    return f"{disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free" + (
        f"; delete files in {paths.KAGGLE_WORKING}, or checkpoints cannot be written"
        if disk.free < _LEAST_FREE else "")


def _renderer() -> str:
    try:
        found = opengl.ensure_gl()
    except RuntimeError as error:
        return f"none ({error}); training works, the simulator does not"
    return f"{found['renderer']}, {found['ms']:.1f} ms for a small test frame"


# --- attached runs and demonstrations ------------------------------------------------------------
def _take_over_runs() -> str:
    """Copy attached runs and searches into the artifacts folder, never over one that exists."""
    if (paths.artifacts_dir() / "search.json").exists():
        return "not for a trial of a search"
    found: dict[str, list[Path]] = {}
    for place, folders, names in _attached():
        if place.name == "search" and "search.json" in names:
            found.setdefault(f"{place.parent.name}/search", []).append(place)
            folders.clear()  # its trials are no runs
        elif "config.json" in names and {"policy.json", "metrics.jsonl"} & set(names):
            within = f"{_SHIPPED}/" * (place.parts[-3:-1] == ("artifacts", _SHIPPED))
            found.setdefault(within + place.name, []).append(place)
            folders[:] = [name for name in folders if name == "search"]
    said = [_guarded(_take_over, *pair) for pair in sorted(found.items())]
    return "\n".join([*said, "04 resumes the run of its run_name, 05 its search; other settings "
                      "need another run_name"] if said else ["none"])


def _take_over(name: str, several: list[Path]) -> str:
    """Of the copies of a run, or of its search, take the usable one that got furthest."""
    *above, run_name = name.removesuffix("/search").split("/")
    below = ["search"] * name.endswith("/search")
    home = paths.artifacts_dir().joinpath(*above, paths.run_dir(run_name).name, *below)
    if home.exists():
        return (f"{name} is in {home} already ({_reached(home)}) and stays as it is; attached: "
                f"{'; '.join(map(_reached, several))}; to use the attached one, rename that folder "
                "and run this cell again")
    damaged = []
    for place in sorted(several, key=lambda each: [*_progress(each).values()], reverse=True):
        settings = "search.json" if below else "config.json"
        try:
            if not inside(place, settings):
                raise ValueError(f"{place / settings} is a link to a file outside the run")
            if below:
                Config.from_dict(read_json(place / settings))
            else:
                load_config(place)
                description(place)
            copy_run(place, home)
        except (AttributeError, TypeError, ValueError, OSError) as error:
            damaged.append(str(error))
            continue
        return "; ".join([f"{name}, {_reached(home)}, from {place}", *damaged])
    return f"{name} was not taken over: {'; '.join(damaged)}"


def _progress(place: Path) -> dict[str, int]:
    """How far a run or a search got; the first number decides, then the next."""
    if place.name == "search":
        return {"trial": len(visible(place, "*/trial.json"))}
    return {"epoch": _lines(place / "metrics.jsonl"), "episode": _lines(place / "episodes.jsonl")}


def _reached(place: Path) -> str:
    return ", ".join(counted(count, what) for what, count in _progress(place).items())


def _lines(path: Path) -> int:
    try:
        return len(read_jsonl(path))
    except (ValueError, OSError):  # damaged
        return 0


def _link_demonstrations() -> str:
    """Link attached scripted files where collection looks for them, of several the largest.

    Human demonstrations are found where they are.
    """
    scripted: dict[Path, list[tuple[int, Path]]] = {}
    human, said = 0, []
    for place, _, names in _attached():
        for path in (place / name for name in names if name.endswith(schema.DEMO_FILE_SUFFIX)):
            try:
                if source_of(path) == "human":
                    human += 1
                else:
                    home, count = _collected_as(path)
                    scripted.setdefault(home, []).append((count, path))
            except (ValueError, TypeError, OSError) as error:
                said.append(f"left out: {error}")
    for home, several in scripted.items():
        if home.exists() and not home.is_symlink():
            said += [f"left out: {path}, since {home} exists" for _, path in several]
            continue
        (count, chosen), *others = sorted(several, reverse=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        if not (home.is_symlink() and home.readlink() == chosen):  # others may be reading it
            with atomic_path(home) as temporary:
                temporary.symlink_to(chosen)
        said += [f"left out: {path} ({number} demonstrations), since {chosen} has {count}"
                 for number, path in others]
    return "\n".join([f"{len(scripted)} scripted and {human} human file(s)", *said])


def _collected_as(path: Path) -> tuple[Path, int]:
    """Where collection keeps a scripted file, and its number of demonstrations."""
    with open_demo_file(path) as file:
        count = len(demo_names(file))
        made = json_attribute(file[schema.DATA_GROUP], COLLECTION_ATTR)
    suite, placement = str(made.get("suite")), str(made.get("placement", "benchmark"))
    actor, beta = str(made.get("actor", "")), float(made.get("beta", 0.0))
    stride = int(made.get(schema.FRAME_STRIDE_ATTR, 1))
    if suite not in schema.SUITES or placement not in schema.PLACEMENTS:
        raise DemoFileError(f"{path}: made for suite {suite!r}, placement {placement!r}, which "
                            "this version does not have")
    return scripted_dir(suite, placement, actor, beta, stride) / path.name, count


def _attached() -> Iterator[tuple[Path, list[str], list[str]]]:
    """Attached folders as :func:`files.walk` gives them, without copies of this package's code."""
    for place, folders, names in walk(paths.absolute(paths.KAGGLE_INPUT)):
        checkout = {"pretrained", "tests"} if "trm_helpers" in folders else set()
        folders[:] = [name for name in folders
                      if name not in {"trm_helpers", "site-packages", *checkout}]
        yield place, folders, names
