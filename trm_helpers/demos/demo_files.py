"""What is in a demonstration file: where it is, whether it is whole, how it was aligned."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from .. import paths, schema

HUMAN_REPOSITORY = "yifengzhu-hf/LIBERO-datasets"  # CC BY 4.0, on the Hugging Face hub
HUMAN_REVISION = "f13aa24a3da8c43c7225569f28c562979fa0e35a"  # of May 2025
COLLECTION_ATTR = "collection"  # JSON on how a scripted file was made; human files have none
VERSION_ATTR = "collection_version"  # of each scripted demonstration
IMAGE_SHAPE = (None, None, 3)  # after the time dimension; None: any size

WRONG_FINGERS = 0.1  # share of steps in which the fingers move against the command
MIN_FINGER_STEPS = 4  # in which the fingers move, to judge one demonstration by them
MIN_MOTION = 1e-6  # rad^2, mean over steps: below it the arm stands still
MAX_RESIDUAL = 0.2  # share of the motion that the fitted fraction may leave unexplained
HALF_SUBSTEP = 0.02  # of a control step; an observation after its action is >= 0.04 into it
# Control steps by which the end effector follows the actions, in simulation with smooth, noisy and
# scripted motion: 0.9 to 1.4 in raw files, -0.1 to 0.4 in shift files. Near the middle: unknown.
MIDDLE_DELAY = 0.65
DELAY_MARGIN = 0.15


class DemoFileError(ValueError):
    """A demonstration file that cannot be used; the message names the file and what is wrong."""


@contextlib.contextmanager
def open_demo_file(path: str | Path) -> Iterator[h5py.File]:
    """Open for reading; raise :class:`DemoFileError` for a file that cannot or should not be read.

    Refused are missing, truncated, foreign and locked files, and files whose data lie elsewhere:
    external storage turns any local file into frames, and so do links out of the file's folder.
    """
    path = Path(path)
    if not path.is_file():
        raise DemoFileError(f"{path}: not found; expected a LIBERO demonstration file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if isinstance(error, BlockingIOError) or "already open for write" in str(error):
            raise DemoFileError(f"{path}: locked, it is being written ({error})") from error
        if isinstance(error, PermissionError):
            raise DemoFileError(f"{path}: not readable ({error.strerror})") from error
        raise DemoFileError(f"{path}: truncated, or not an HDF5 file ({error})") from error
    with file:
        try:
            folders = {path.parent.resolve(), path.resolve().parent}
            state = path.stat()
            version = (*sorted(folders), path.name, state.st_ino, state.st_size, state.st_mtime_ns)
            if version not in _CHECKED:  # it takes 0.1 s for 30 demonstrations
                _check_storage(file, folders, {file.id})
                _CHECKED.add(version)
        except (KeyError, OSError, RuntimeError) as error:
            raise DemoFileError(f"{path}: damaged ({error})") from error
        try:
            yield file
        except OSError as error:
            if type(error) is not OSError or error.errno:  # not HDF5's
                raise
            raise DemoFileError(f"{path}: damaged ({error})") from error


_CHECKED: set[tuple] = set()  # files, as they are, whose data lie where they may


def _check_storage(group: h5py.Group, folders: set[Path], seen: set) -> None:
    """Raise :class:`DemoFileError` unless all that ``group`` leads to lies inside ``folders``."""
    prefix = f"{group.file.filename}, {group.name.rstrip('/')}"
    for name in group:
        where, link = f"{prefix}/{name}", group.get(name, getlink=True)
        if isinstance(link, h5py.HardLink):  # to the same file
            item = group[name]
        else:
            if isinstance(link, h5py.ExternalLink):
                _linked_file(link.filename, group, folders, where)
            item = group.get(name)
            if item is None:
                raise DemoFileError(f"{where}: a link to {link.path}, which does not exist")
            _linked_file(os.path.abspath(item.file.filename), group, folders, where)
        if item.id in seen:
            continue
        seen.add(item.id)
        if isinstance(item, h5py.Group):
            _check_storage(item, folders, seen)
        elif isinstance(item, h5py.Dataset):
            _check_dataset(item, folders, seen, where)


def _check_dataset(dataset: h5py.Dataset, folders: set[Path], seen: set, where: str) -> None:
    if dataset.external:
        raise DemoFileError(f"{where}: kept in external storage ({dataset.external[0][0]}); "
                            "expected the data inside an HDF5 file")
    if not dataset.is_virtual:
        return
    sources = dataset.virtual_sources()
    if sum(source.vspace.get_select_npoints() for source in sources) != math.prod(dataset.shape):
        raise DemoFileError(f"{where}: a virtual data set that is not wholly mapped; expected a "
                            "source for every value")
    for source in sources:
        own = source.file_name == "."
        path = Path(dataset.file.filename if own else
                    _linked_file(source.file_name, dataset, folders, where))
        if not path.is_file():
            raise DemoFileError(f"{where}: a virtual data set of {path}, which does not exist")
        with h5py.File(path, "r") as file:
            found = file.get(source.dset_name)
            if not isinstance(found, h5py.Dataset) or not _holds(found, source):
                raise DemoFileError(f"{where}: a virtual data set of {path}, {source.dset_name}, "
                                    f"of shape {getattr(found, 'shape', None)}; expected one that "
                                    "holds all that is mapped")
            _linked_file(os.path.abspath(found.file.filename), dataset, folders, where)
            if found.id not in seen:
                seen.add(found.id)
                _check_dataset(found, folders, seen, f"{path}, {source.dset_name}")


def _holds(dataset: h5py.Dataset, source) -> bool:
    """Whether a virtual data set's source has what is taken from it; else HDF5 makes up values."""
    if source.src_space.get_select_type() == h5py.h5s.SEL_ALL:
        return dataset.size == source.vspace.get_select_npoints()
    last = source.src_space.get_select_bounds()[1]
    return len(last) == dataset.ndim and all(np.less(last, dataset.shape))


def _linked_file(name: str, item: h5py.Group | h5py.Dataset, folders: set[Path],
                 where: str) -> Path:
    """The file that ``item``'s file names ``name``, refused outside of ``folders``."""
    path = (Path(item.file.filename).parent.resolve() / name).resolve()
    if not any(path.is_relative_to(folder) for folder in folders):
        raise DemoFileError(f"{where}: links to {path}; expected a file in the same folder")
    return path


def demo_names(file: h5py.File) -> list[str]:
    """Names of the demonstrations, in natural order: ``demo_2`` before ``demo_10``.

    A demonstration is whatever the group ``data`` holds under a name with a number at its end:
    ``demo_0``, ``demo_007`` or ``3``; numbers may be missing.
    """
    group = file.get(schema.DATA_GROUP)
    if not isinstance(group, h5py.Group):
        raise DemoFileError(f"{file.filename}: no group {schema.DATA_GROUP!r}; "
                            f"found {sorted(file) or 'nothing'}")
    names = [name for name in group if re.search("[0-9]$", name)]
    if not names:
        raise DemoFileError(f"{file.filename}: no demonstrations; expected groups demo_0, demo_1, "
                            f"... in {schema.DATA_GROUP!r}, found {sorted(group) or 'nothing'}")
    return sorted(names, key=lambda name: (
        [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", name)], name))


def text_attribute(group: h5py.Group, name: str, default: str = "") -> str:
    """An attribute as text, whether it was written as text or as bytes."""
    value = group.attrs.get(name, default)
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, str):
        raise DemoFileError(f"{group.file.filename}: attribute {name}={value!r}; expected text")
    return value


def json_attribute(group: h5py.Group, name: str) -> dict:
    """An attribute that holds a JSON object; empty where there is none."""
    text = text_attribute(group, name, "{}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise DemoFileError(f"{group.file.filename}: attribute {name}={text[:80]!r}; expected a "
                            "JSON object")
    return value


def source_of(path: str | Path) -> str:
    """``scripted`` for a file with our ``collection`` attribute, otherwise ``human``."""
    with open_demo_file(path) as file:
        group = file.get(schema.DATA_GROUP)
        return "scripted" if group is not None and COLLECTION_ATTR in group.attrs else "human"


def version_notes(paths: Iterable[str | Path]) -> list[str]:
    """One sentence for each scripted file that another version of the collection code made."""
    notes = []
    for path in paths:
        if source_of(path) == "scripted":
            with open_demo_file(path) as file:
                versions = {int(file[schema.DATA_GROUP][name].attrs.get(VERSION_ATTR, 0))
                            for name in demo_names(file)}
            if versions != {schema.COLLECTION_VERSION}:
                notes.append(f"{path}: collected by version {_list(sorted(versions))} of the code "
                             f"(0: before versions were recorded); now it is version "
                             f"{schema.COLLECTION_VERSION}, whose demonstrations may differ")
    return notes


def _list(items: Iterable) -> str:
    return ", ".join(map(str, items))


# --- finding -------------------------------------------------------------------------------------
def survey_demonstrations(
    folder: str | Path | Iterable[str | Path],
    task_names: Sequence[str] | None = None,
    sources: Sequence[str] = (),
) -> tuple[dict[str, Path], dict[Path, str]]:
    """Demonstration files below folders, by task name, and why each other HDF5 file is left out.

    Links are followed, hidden files and folders passed over. The name of a file,
    ``<task name>_demo.hdf5``, says its task: no two training suites share one. Of several files for
    a task the first is taken: in the order of ``sources``, then of the folders, then of the names.

    Args:
        task_names: tasks that are wanted; None takes all.
        sources: ``human``, ``scripted`` or both; none takes either without looking.
    """
    folders = [folder] if isinstance(folder, (str, Path)) else list(folder)
    candidates: dict[str, list[tuple[int, Path]]] = {}
    left_out: dict[Path, str] = {}
    for path in (path for each in folders for path in _hdf5_files(Path(each))):
        task = path.name.removesuffix(schema.DEMO_FILE_SUFFIX)
        if task == path.name:
            left_out[path] = f"not named <task name>{schema.DEMO_FILE_SUFFIX}"
        elif task_names is not None and task not in task_names:
            left_out[path] = "another task"
        elif sources and source_of(path) not in sources:
            left_out[path] = f"{source_of(path)}, not {_list(sources)}"
        else:
            rank = sources.index(source_of(path)) if sources else 0
            candidates.setdefault(task, []).append((rank, path))
    found = {}
    for task, several in candidates.items():
        found[task] = min(several, key=lambda each: each[0])[1]
        left_out |= {path: f"{found[task]} comes first" for _, path in several
                     if path != found[task]}
    return found, left_out


def _hdf5_files(folder: Path) -> list[Path]:
    """Sorted; links are followed, but no folder is entered twice."""
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in names
                  if name.endswith((".hdf5", ".h5")) and not name.startswith(".")]
    return sorted(files)


def find_demonstrations(
    folder: str | Path | Iterable[str | Path],
    task_names: Sequence[str] | None = None,
    *,
    sources: Sequence[str] = (),
) -> dict[str, Path]:
    """:func:`survey_demonstrations`, of which everything must be there.

    Raises ``FileNotFoundError`` when nothing or not every one of ``task_names`` was found, with the
    folders and the files that were left out.
    """
    folders = [folder] if isinstance(folder, (str, Path)) else list(folder)
    found, left_out = survey_demonstrations(folders, task_names, sources)
    missing = [name for name in task_names or () if name not in found]
    if missing or not found:
        looked = _list(f"{each}{'' if Path(each).exists() else ' (no such folder)'}"
                       for each in folders)
        what = f"{' or '.join(sources)} demonstrations".strip()
        raise FileNotFoundError(
            f"no {what} for {_list(missing) or 'any task'}; "
            f"looked for *{schema.DEMO_FILE_SUFFIX} below: {looked or 'no folder'}"
            + (f"; left out: {left_out_text(left_out)}" if left_out else ""))
    return found


def left_out_text(left_out: dict[Path, str]) -> str:
    """Files by the reason why they were left out, in one line."""
    reasons: dict[str, list[Path]] = {}
    for path, reason in left_out.items():
        reasons.setdefault(reason, []).append(path)
    return "; ".join(f"{_list(files)} ({reason})" for reason, files in reasons.items())


def given_demonstrations(folder: str | Path, task_names: Sequence[str],
                         sources: Sequence[str]) -> dict[str, Path]:
    """Task name -> file in the one folder that was asked for; prints what is left out of it.

    Raises ``FileNotFoundError`` where the folder or a task's file is missing.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"demo_dir={str(folder)!r} is not a folder; expected one with "
                                f"<task name>{schema.DEMO_FILE_SUFFIX} files")
    found = find_demonstrations(folder, task_names, sources=sources)
    left_out = survey_demonstrations(folder, task_names, sources)[1]
    if left_out:
        print(f"left out: {left_out_text(left_out)}")
    return found


def human_demonstrations(
    suite: str, task_names: Sequence[str], folders: Iterable[str | Path], download: bool
) -> dict[str, Path]:
    """Task name -> file of human demonstrations, attached, on disk or from the Hugging Face hub.

    Looks below ``folders`` and Kaggle's input folder. Files that are not there are fetched into
    ``data_dir()/human`` if ``download`` is true. Raises ``FileNotFoundError`` when a task's file
    is neither there nor downloadable; the message says how to get it.
    """
    target = paths.data_dir() / "human"
    places = [*folders, paths.KAGGLE_INPUT, target]
    found, _ = survey_demonstrations(places, task_names, ["human"])
    missing = [name for name in task_names if name not in found]
    if missing and download:
        _download([f"{suite}/{name}{schema.DEMO_FILE_SUFFIX}" for name in missing], target)
    try:
        return find_demonstrations(places, task_names, sources=["human"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. Attach a data set that holds them, let them be downloaded from "
            f"{HUMAN_REPOSITORY}, or use scripted demonstrations"
        ) from error


def _download(patterns: list[str], target: Path) -> None:
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(
            HUMAN_REPOSITORY, repo_type="dataset", revision=HUMAN_REVISION,
            allow_patterns=patterns, local_dir=target
        )
    except Exception as error:  # the hub's client raises its HTTP library's own types
        raise FileNotFoundError(
            f"could not download {', '.join(patterns)} from {HUMAN_REPOSITORY} "
            f"({type(error).__name__}: {error}). Without internet access, attach a data set that "
            "holds these files or use scripted demonstrations"
        ) from error


# --- checking ------------------------------------------------------------------------------------
def check_demo_file(path: str | Path) -> None:
    """Raise :class:`DemoFileError` unless every demonstration of the file can be learned from.

    Checked: the file opens; ``actions``, both cameras and the proprioception are there, with the
    shapes and types of LIBERO's layout and one length per demonstration, at least one step;
    numbers are finite; actions lie in [-1, 1]. Images are not read.
    """
    with open_demo_file(path) as file:
        for name in demo_names(file):
            _check_demo(file[schema.DATA_GROUP][name], f"{path}, {name}")


def _check_demo(demo: h5py.Group, where: str) -> None:
    if not isinstance(demo, h5py.Group):
        raise DemoFileError(f"{where}: not a group; expected one with actions and obs")
    layout = {"actions": ("f", (schema.ACTION_DIM,))}
    layout |= {f"obs/{name}": ("f", (width,)) for name, width in schema.LOW_DIM.items()}
    layout |= {f"obs/{name}": ("u", IMAGE_SHAPE) for name in schema.CAMERAS}
    datasets = _names(demo)
    missing = [name for name in layout if name not in datasets]
    if missing:
        raise DemoFileError(f"{where}: missing {', '.join(missing)}; "
                            f"found data sets {datasets or 'none'}")
    if demo["actions"].shape[:1] == (0,):
        raise DemoFileError(f"{where}: has no steps; expected at least one")
    length = demo["actions"].shape[0] if demo["actions"].shape else None
    if schema.EXECUTED_ACTIONS in demo:
        layout[schema.EXECUTED_ACTIONS] = layout["actions"]
    for name in schema.DEMO_DATASETS:
        if name in demo and (name not in datasets or demo[name].shape[:1] != (length,)):
            raise DemoFileError(
                f"{where}, {name}: {'has shape' if name in datasets else 'is a group, not'} "
                f"{getattr(demo[name], 'shape', 'a data set')}; expected {length} steps"
            )
    for name, (kind, shape) in layout.items():
        _check_layout(demo[name], kind, (length, *shape), f"{where}, {name}")
        if kind == "f":
            _check_finite(demo[name][()], f"{where}, {name}")
    if "states" in demo and demo["states"].dtype.kind not in "fiu":
        raise DemoFileError(f"{where}, states: has type {demo['states'].dtype}; expected numbers")
    actions = demo["actions"][()]
    if np.abs(actions).max() > 1 + 1e-6:
        raise DemoFileError(
            f"{where}, actions: values from {actions.min():.4g} to {actions.max():.4g}; "
            "expected within [-1, 1]"
        )


def _names(demo: h5py.Group) -> list[str]:
    """Data sets of a demonstration and of its groups, linked ones too, as paths below it."""
    names = []
    for name, item in demo.items():
        below = item.items() if isinstance(item, h5py.Group) else ()
        names += [f"{name}/{each}" for each, value in below if isinstance(value, h5py.Dataset)]
        names += [name] if isinstance(item, h5py.Dataset) else []
    return names


def _check_layout(dataset: h5py.Dataset, kind: str, expected: tuple, where: str) -> None:
    """``kind`` is ``f`` for any floating type or ``u`` for uint8; None in ``expected`` is any."""
    fits = len(dataset.shape) == len(expected) and all(
        found > 0 if size is None else size == found
        for size, found in zip(expected, dataset.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise DemoFileError(f"{where}: has shape {dataset.shape}; expected ({wanted})")
    if not (dataset.dtype.kind == "f" if kind == "f" else dataset.dtype == np.uint8):
        expected_type = "a floating type" if kind == "f" else "uint8"
        raise DemoFileError(f"{where}: has type {dataset.dtype}; expected {expected_type}")


def _check_finite(values: np.ndarray, where: str) -> None:
    with np.errstate(over="ignore"):  # training computes in float32
        bad = ~np.isfinite(values.astype(np.float32)).all(axis=-1)
    if bad.any():
        raise DemoFileError(
            f"{where}: NaN or infinite at {bad.sum()} of {len(bad)} steps, first at step "
            f"{bad.argmax()}; expected finite numbers"
        )


# --- gripper -------------------------------------------------------------------------------------
def finger_motion(demos: Iterable[h5py.Group]) -> tuple[int, int]:
    """Steps in which the fingers move against a steady command, and in which they move at all."""
    against = moving = 0
    for demo in demos:
        width = np.abs(demo["obs/gripper_states"][()]).sum(axis=1)
        change = np.diff(width)[1:]
        command = np.sign(demo["actions"][:, schema.GRIPPER_INDEX])
        # how late the fingers follow depends on the alignment: a switch's own steps do not count
        steady = (command[:-2] == command[1:-1]) & (command[1:-1] == command[2:])
        fast = (np.abs(change) > 1e-3) & steady  # m in a step
        moving += int(fast.sum())
        against += int((np.sign(change[fast]) == command[1:-1][fast]).sum())
    return against, moving


def check_gripper(path: str | Path) -> None:
    """Raise :class:`DemoFileError` unless gripper commands mean what the environment takes them as.

    Expected are -1 (open) and +1 (closed) and nothing else, and fingers that obey. 0 and 1 are not
    mapped: which of them closes differs between data sets. A command that never changes is printed.
    """
    with open_demo_file(path) as file:
        demos = {name: file[schema.DATA_GROUP][name] for name in demo_names(file)}
        values = np.unique(np.concatenate([demo["actions"][:, schema.GRIPPER_INDEX]
                                           for demo in demos.values()]))
        motion = {name: finger_motion([demo]) for name, demo in demos.items()}
    where = f"{path}: gripper commands (actions, column {schema.GRIPPER_INDEX})"
    if not set(values.tolist()) <= {schema.GRIPPER_OPEN, schema.GRIPPER_CLOSED}:
        found = f"{_list(f'{value:g}' for value in values[:4])}{', ...' if len(values) > 4 else ''}"
        raise DemoFileError(f"{where} are {found}; expected {schema.GRIPPER_OPEN:g} (open) and "
                            f"{schema.GRIPPER_CLOSED:g} (closed)")
    # of all, and of each one in which they move long enough to tell
    motion = {name: steps for name, steps in motion.items() if steps[1] >= MIN_FINGER_STEPS} | {
        "all": tuple(map(sum, zip(*motion.values(), strict=True)))}
    for name, (against, moving) in motion.items():
        if against > moving * (0.5 if len(values) > 1 else WRONG_FINGERS):
            raise DemoFileError(
                f"{where} contradict the fingers, which in {name} move against them in {against} "
                f"of {moving} steps; expected opening at {schema.GRIPPER_OPEN:g}, closing at "
                f"{schema.GRIPPER_CLOSED:g}")
    if len(values) == 1:
        print(f"{where} are always {values[0]:g}: a policy cannot learn when to close or open")


# --- alignment -----------------------------------------------------------------------------------
def measure_alignment(path: str | Path, max_demos: int = 10) -> tuple[str, dict]:
    """Whether ``obs[t]`` was seen before (``raw``) or after (``shift``) executing ``actions[t]``.

    ``states[t]`` is the simulator's state when ``actions[t]`` is chosen and holds the arm's joints,
    q[t]. The stored ``joint_states[t]`` lie on the arm's path, a fraction f of a control step from
    q[t]: f in (-1, 0] is what the previous step returned, hence ``raw`` (0: drawn again from the
    state), f in (0, 1] is what the step with ``actions[t]`` returned, hence ``shift``. f is fitted
    by least squares over the first ``max_demos`` demonstrations.

    Without states, or when the fit explains too little, the delay decides by which the end
    effector's displacement ``ee_pos[t+1] - ee_pos[t]`` correlates best with the actions. That is
    weaker evidence: the controller answers about one step late, so that the peak is not at
    ``actions[t]`` for ``raw`` and ``actions[t+1]`` for ``shift``, but near ``actions[t-1]`` and
    ``actions[t]``, and it is broad where the motion is smooth. Stored actions that are not the
    executed ones (a disturbed demonstrator) mislead it.

    Returns the name, or ``unknown`` when neither tells, and the evidence: ``method`` (``joints``
    or ``delay``), ``fraction``, ``residual`` (share of the motion not explained) and ``delay``
    (control steps). What could not be measured is None.
    """
    with open_demo_file(path) as file:
        demos = [file[schema.DATA_GROUP][name] for name in demo_names(file)[:max_demos]]
        fraction, residual = _joint_fraction(demos)
        delay = _action_delay(demos)
    evidence = {"method": "joints", "fraction": fraction, "residual": residual, "delay": delay}
    if fraction is not None and residual <= MAX_RESIDUAL and abs(fraction) <= 1 + HALF_SUBSTEP:
        return ("raw" if fraction < HALF_SUBSTEP else "shift"), evidence
    evidence["method"] = "delay"
    if delay is None or abs(delay - MIDDLE_DELAY) < DELAY_MARGIN:
        return "unknown", evidence
    return ("raw" if delay > MIDDLE_DELAY else "shift"), evidence


def _joint_fraction(demos: list[h5py.Group]) -> tuple[float | None, float | None]:
    """Least-squares f with ``joint_states[t] = q[t] + f * step``, and the residual's share.

    The step is the one before q[t] for f <= 0 and the one after it for f > 0; the better of the
    two fits is returned, (None, None) when states are missing or the arm stands still.
    """
    offsets, before, after = [], [], []
    for demo in demos:
        if "states" not in demo or demo["states"].ndim != 2 or demo["states"].shape[1] < 8:
            continue
        joints = demo["states"][:, 1:8].astype(np.float64)  # flattened state: time, qpos, qvel
        steps = np.diff(joints, axis=0)
        offsets.append(demo["obs/joint_states"][1:-1] - joints[1:-1])
        before.append(steps[:-1])
        after.append(steps[1:])
    if not offsets or sum(map(len, offsets)) == 0:
        return None, None
    offset, fits = np.concatenate(offsets), []
    for steps, low, high in ((np.concatenate(before), -np.inf, 0.0),
                             (np.concatenate(after), 0.0, np.inf)):
        motion = (steps**2).sum()
        if motion < MIN_MOTION * len(steps):
            return None, None
        fraction = float(np.clip((offset * steps).sum() / motion, low, high))
        fits.append((float(((offset - fraction * steps) ** 2).sum() / motion), fraction))
    residual, fraction = min(fits)
    return fraction, residual


def _action_delay(demos: list[h5py.Group]) -> float | None:
    """Control steps from an action to the displacement that correlates best with it.

    Correlations with ``actions[t - delay]``, averaged over x, y and z, are taken at whole delays;
    the peak is the vertex of the parabola through the best and its neighbours. None when the arm
    stands still or the best is at either end.
    """
    delays = np.arange(-1, 4)
    moves, actions = [], []
    for demo in demos:
        move = np.diff(demo["obs/ee_pos"][()].astype(np.float64), axis=0)
        steps = np.arange(delays.max(), len(move) + delays.min())
        moves.append(move[steps])
        actions.append(demo["actions"][()][steps - delays[:, None], :3])  # (delays, steps, 3)
    move, action = np.concatenate(moves), np.concatenate(actions, axis=1)
    moving = [i for i in range(3) if len(move) and move[:, i].std() and action[0, :, i].std()]
    if not moving:
        return None
    score = [np.mean([np.corrcoef(move[:, i], late[:, i])[0, 1] for i in moving])
             for late in action]
    best = int(np.argmax(score))
    if best in (0, len(delays) - 1):
        return None
    before, peak, after = score[best - 1 : best + 2]
    return float(delays[best] + (before - after) / (2 * (before - 2 * peak + after)))


def resolve_alignment(path: str | Path, setting: str = "auto") -> str:
    """The file's alignment, ``raw`` or ``shift``.

    ``auto`` takes the file's own attribute, else what :func:`measure_alignment` finds. Raises
    ``ValueError`` for another setting, and :class:`DemoFileError` when the attribute or the joints
    contradict the setting (or each other), or when ``auto`` finds nothing to go by.
    """
    schema.check_option("alignment", setting, schema.ALIGNMENT_OPTIONS)
    with open_demo_file(path) as file:
        attribute = text_attribute(file[schema.DATA_GROUP], schema.ALIGNMENT_ATTR) or None
    if attribute is not None and attribute not in schema.ALIGNMENTS:
        raise DemoFileError(
            f"{path}: attribute alignment={attribute!r}; expected one of {schema.ALIGNMENTS}"
        )
    measured, evidence = measure_alignment(path)
    said = {"the setting": None if setting == "auto" else setting,
            "the file's attribute": attribute}
    if evidence["method"] == "joints":
        said["the stored joint angles"] = measured
    said = {who: name for who, name in said.items() if name}
    if len(set(said.values())) > 1:
        claims = ", ".join(f"{name!r} by {who}" for who, name in said.items())
        raise DemoFileError(f"{path}: contradictory alignment: {claims} (evidence: {evidence})")
    name = next(iter(said.values()), measured)
    if name == "unknown":
        raise DemoFileError(
            f"{path}: alignment can not be measured ({evidence}); set alignment to raw or shift"
        )
    return name


# --- exploring -----------------------------------------------------------------------------------
def explore_libero_dataset(path: str | Path) -> dict:
    """What is in a demonstration file, or in all below a folder; the first file in detail.

    Returns a dictionary with ``files``; of the first file ``file``, ``source`` (human or scripted),
    ``collection`` (how a scripted file was made, else None), ``structure`` (name -> shape, type),
    ``image_shapes`` and ``action_shape`` of its first demonstration, ``language_instruction``,
    ``alignment`` (name and evidence) and ``frames`` (camera -> (4, H, W, 3) uint8, equidistant
    over the first demonstration, as stored: upside down); over all files ``num_demos``,
    ``lengths`` (min, max, mean, total steps) and ``actions`` (one row per dimension: name,
    meaning, min, max, mean, std).

    Raises ``FileNotFoundError`` when there is none, :class:`DemoFileError` for a broken one.
    """
    path = Path(path)
    files = list(find_demonstrations(path).values()) if path.is_dir() else [path]
    for each in files:
        check_demo_file(each)
    alignment, evidence = measure_alignment(files[0])
    actions = [demo for each in files for demo in _read_actions(each)]
    lengths = [len(demo) for demo in actions]
    return {
        "files": [str(each) for each in files],
        "source": source_of(files[0]),
        **_describe_first(files[0]),
        "alignment": {"name": alignment, "evidence": evidence},
        "num_demos": len(lengths),
        "lengths": {"min": min(lengths), "max": max(lengths),
                    "mean": float(np.mean(lengths)), "total": sum(lengths)},
        "actions": _action_table(np.concatenate(actions)),
    }


def _read_actions(path: Path) -> list[np.ndarray]:
    with open_demo_file(path) as file:
        return [file[schema.DATA_GROUP][name]["actions"][()] for name in demo_names(file)]


def _describe_first(path: Path) -> dict:
    with open_demo_file(path) as file:
        group = file[schema.DATA_GROUP]
        demo = group[demo_names(file)[0]]
        length = len(demo["actions"])
        chosen = np.linspace(0, length - 1, 4).round().astype(int)
        return {
            "file": str(path),
            "collection": json_attribute(group, COLLECTION_ATTR) or None,
            "structure": {name: {"shape": demo[name].shape, "dtype": str(demo[name].dtype)}
                          for name in _names(demo)},
            "image_shapes": {camera: demo["obs"][camera].shape for camera in schema.CAMERAS},
            "action_shape": demo["actions"].shape,
            "language_instruction": _instruction(group),
            "frames": {camera: np.stack([demo["obs"][camera][t] for t in chosen])
                       for camera in schema.CAMERAS},
        }


def instruction_of(path: str | Path) -> str:
    """The language instruction of a file; empty where it holds none."""
    with open_demo_file(path) as file:
        return _instruction(file[schema.DATA_GROUP])


def _instruction(group: h5py.Group) -> str:
    """Upstream files hold a string or a list of its pieces, some with quotation marks around."""
    pieces = json_attribute(group, "problem_info").get("language_instruction", "")
    if not isinstance(pieces, (str, list)) or not all(isinstance(each, str) for each in pieces):
        raise DemoFileError(f"{group.file.filename}: language_instruction {pieces!r} in attribute "
                            "problem_info; expected text")
    words = not isinstance(pieces, str) and any(len(piece) > 1 for piece in pieces)
    return (" " if words else "").join(pieces).strip('"')


def _action_table(actions: np.ndarray) -> list[dict]:
    return [
        {"name": name, "meaning": meaning, "min": float(column.min()), "max": float(column.max()),
         "mean": float(column.mean()), "std": float(column.std())}
        for name, meaning, column in zip(
            schema.ACTION_NAMES, schema.ACTION_MEANING, actions.T.astype(np.float64), strict=True
        )
    ]
