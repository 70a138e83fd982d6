"""Demonstration files: opening them safely, checking them, reading their attributes."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from .. import schema

COLLECTION_ATTR = "collection"  # JSON with the settings of a scripted file; human files have none
VERSION_ATTR = "collection_version"  # of each scripted demonstration
WRONG_FINGERS = 0.1  # share of steps in which the fingers move against the command
MIN_FINGER_STEPS = 4  # moving steps needed to judge one demonstration by its fingers


class DemoFileError(ValueError):
    """An unusable demonstration file; the message names the file and the fault."""


# --- opening -------------------------------------------------------------------------------------
_CHECKED: set[tuple] = set()  # versions of files whose data are known to lie in their own folder


@contextlib.contextmanager
def open_demo_file(path: str | Path) -> Iterator[h5py.File]:
    """Open for reading; raise :class:`DemoFileError` for a file that cannot or should not be read.

    Missing, truncated, foreign and locked files are refused, and so are files with virtual data
    sets or data outside their own folder: external storage or a link could pass any local file off
    as frames.
    """
    path = Path(path)
    if not path.is_file():
        found = "is not a regular file" if path.exists() else "not found"
        raise DemoFileError(f"{path}: {'is a folder' if path.is_dir() else found}; "
                            "expected a LIBERO demonstration file")
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
            if version not in _CHECKED:  # the check takes 0.1 s for 30 demonstrations
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


def _check_storage(group: h5py.Group, folders: set[Path], seen: set) -> None:
    """Raise :class:`DemoFileError` unless everything below ``group`` lies inside ``folders``."""
    prefix = f"{group.file.filename}, {group.name.rstrip('/')}"
    for name in group:
        where, link = f"{prefix}/{name}", group.get(name, getlink=True)
        if isinstance(link, h5py.HardLink):  # to the same file
            item = group[name]
        else:
            if isinstance(link, h5py.ExternalLink):
                _refuse_outside(link.filename, group, folders, where)
            item = group.get(name)
            if item is None:
                raise DemoFileError(f"{where}: a link to {link.path}, which does not exist")
            _refuse_outside(os.path.abspath(item.file.filename), group, folders, where)
        if item.id in seen:
            continue
        seen.add(item.id)
        if isinstance(item, h5py.Group):
            _check_storage(item, folders, seen)
        elif isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
            kept = f"external storage ({item.external[0][0]})" if item.external else \
                "the sources of a virtual data set"
            raise DemoFileError(f"{where}: kept in {kept}; expected the data inside an HDF5 file")


def _refuse_outside(name: str, item: h5py.Group | h5py.Dataset, folders: set[Path],
                    where: str) -> None:
    """Raise :class:`DemoFileError` unless the file called ``name`` lies in ``folders``."""
    path = (Path(item.file.filename).parent.resolve() / name).resolve()
    if not any(path.is_relative_to(folder) for folder in folders):
        raise DemoFileError(f"{where}: links to {path}; expected a file in the same folder")


# --- names and attributes ------------------------------------------------------------------------
def data_group(file: h5py.File) -> h5py.Group:
    """The group of the demonstrations; :class:`DemoFileError` for a file without one."""
    group = file.get(schema.DATA_GROUP)
    if isinstance(group, h5py.Group):
        return group
    held = [name if isinstance(file.get(name), h5py.Group) else f"{name} (no group)"
            for name in sorted(file)]
    raise DemoFileError(f"{file.filename}: no group {schema.DATA_GROUP!r}; "
                        f"found {', '.join(held) or 'nothing'}")


def demo_names(file: h5py.File) -> list[str]:
    """Names of the demonstrations, in natural order: ``demo_2`` before ``demo_10``.

    Any member of the group ``data`` whose name ends in a digit is a demonstration: ``demo_0``,
    ``demo_007`` or ``3``; numbers may be missing.
    """
    group = data_group(file)
    names = [name for name in group if re.search("[0-9]$", name)]
    if not names:
        raise DemoFileError(f"{file.filename}: no demonstrations; expected groups demo_0, demo_1, "
                            f"... in {schema.DATA_GROUP!r}, found {sorted(group) or 'nothing'}")
    return sorted(names, key=lambda name: (
        re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name), name))


def dataset_names(demo: h5py.Group) -> list[str]:
    """Data sets of a demonstration and of its groups, linked ones too, as paths below it."""
    names = []
    for name, item in demo.items():
        below = item.items() if isinstance(item, h5py.Group) else ()
        names += [f"{name}/{each}" for each, value in below if isinstance(value, h5py.Dataset)]
        names += [name] if isinstance(item, h5py.Dataset) else []
    return names


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


def frame_stride(demo: h5py.Group) -> int:
    """Steps per rendered frame of a demonstration; the steps between repeat the last one."""
    return _integer_attribute(demo, schema.FRAME_STRIDE_ATTR, 1)


def _integer_attribute(group: h5py.Group, name: str, default: int) -> int:
    value = group.attrs.get(name, default)
    if not isinstance(value, int | np.integer) or value < default:
        raise DemoFileError(f"{group.file.filename}, {group.name}: attribute {name}={value!r}; "
                            f"expected an integer of at least {default}")
    return int(value)


def json_attribute(group: h5py.Group, name: str) -> dict:
    """The JSON object of an attribute; empty without the attribute."""
    text = text_attribute(group, name, "{}")
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise DemoFileError(f"{group.file.filename}: attribute {name}={text[:80]!r}; expected a JSON "
                        "object")


def source_of(path: str | Path) -> str:
    """``scripted`` for a file with our ``collection`` attribute, ``dagger`` if it names an actor.

    ``human`` for any other file.
    """
    with open_demo_file(path) as file:
        group = file.get(schema.DATA_GROUP)
        if group is None or COLLECTION_ATTR not in group.attrs:
            return "human"
        return "dagger" if "actor" in json_attribute(group, COLLECTION_ATTR) else "scripted"


def instruction_of(path: str | Path) -> str:
    """The language instruction of a file; empty for a file without one.

    Upstream files hold text or a list of its pieces, some in quotation marks.
    """
    with open_demo_file(path) as file:
        info = json_attribute(data_group(file), "problem_info")
    pieces = info.get("language_instruction", "")
    if not isinstance(pieces, (str, list)) or not all(isinstance(each, str) for each in pieces):
        raise DemoFileError(f"{path}: language_instruction {pieces!r} in attribute problem_info; "
                            "expected text")
    words = not isinstance(pieces, str) and any(len(piece) > 1 for piece in pieces)
    return (" " if words else "").join(pieces).strip('"')


def normalize_instruction(text: str) -> str:
    """Lower case, single spaces, no enclosing quotation marks and no full stop at the end.

    Files and BDDL sources differ in these details of the same instruction.
    """
    return " ".join(text.lower().split()).strip("\"'. ")


def files_trained_on(path: Path, described: Mapping) -> list[dict]:
    """The entries on demonstration files in a run's ``policy.json``, which is at ``path``.

    Raises ``ValueError`` if one lacks its ``file``, ``demos`` or ``source``.
    """
    files = described["trained_on"]["files"]
    if not isinstance(files, list) or not all(
            isinstance(file, dict) and file.keys() >= {"file", "demos", "source"}
            for file in files):
        raise ValueError(f"{path} is damaged: expected files with file, demos and source in "
                         "trained_on")
    return files


def version_notes(paths: Iterable[str | Path]) -> list[str]:
    """One sentence for each scripted file from another version of the collection code."""
    notes = []
    for path in paths:
        with open_demo_file(path) as file:
            versions = {_integer_attribute(file[schema.DATA_GROUP][name], VERSION_ATTR, 0)
                        for name in demo_names(file)}
        if source_of(path) != "human" and versions != {schema.COLLECTION_VERSION}:
            notes.append(f"{path}: collected by version {', '.join(map(str, sorted(versions)))} of "
                         "the code (0: before versions were recorded); this is version "
                         f"{schema.COLLECTION_VERSION}, whose demonstrations may differ")
    return notes


# --- checking ------------------------------------------------------------------------------------
def check_demo_file(path: str | Path) -> None:
    """Raise :class:`DemoFileError` unless every demonstration of the file can be trained on.

    Checked: the file opens; ``actions``, both cameras and the proprioception exist, with the shapes
    and types of LIBERO's layout and one length of at least one step per demonstration; numbers,
    also those of ``states`` if present, are finite; actions lie in [-1, 1]; the attributes with the
    alignment, the collection, its version and the stride of the frames are valid. Images are not
    read.
    """
    with open_demo_file(path) as file:
        names, data = demo_names(file), file[schema.DATA_GROUP]
        text_attribute(data, schema.ALIGNMENT_ATTR)
        json_attribute(data, COLLECTION_ATTR)
        for name in names:
            _check_demo(data[name], f"{path}, {name}")
            _integer_attribute(data[name], VERSION_ATTR, 0)
            frame_stride(data[name])


# data sets of a demonstration: type, and shape after time
_REQUIRED = {"actions": ("f", (schema.ACTION_DIM,)),
             **{f"obs/{name}": ("f", (width,)) for name, width in schema.LOW_DIM.items()},
             **{f"obs/{name}": ("u", (None, None, 3)) for name in schema.CAMERAS}}
_OPTIONAL = {schema.EXECUTED_ACTIONS: _REQUIRED["actions"], "states": ("f", (None,))}


def _check_demo(demo: h5py.Group, where: str) -> None:
    if not isinstance(demo, h5py.Group):
        raise DemoFileError(f"{where}: not a group; expected one with actions and obs")
    datasets = dataset_names(demo)
    missing = [name for name in _REQUIRED if name not in datasets]
    if missing:
        raise DemoFileError(f"{where}: missing {', '.join(missing)}; "
                            f"found data sets {datasets or 'none'}")
    actions = demo["actions"][()]
    if actions.shape[:1] in ((), (0,)):
        raise DemoFileError(f"{where}, actions: has shape {actions.shape} and no steps; expected "
                            "at least one step")
    for name in (*schema.DEMO_DATASETS, schema.EXECUTED_ACTIONS):
        if name in demo and (name not in datasets or demo[name].shape[:1] != (len(actions),)):
            raise DemoFileError(
                f"{where}, {name}: {'has shape' if name in datasets else 'is a group, not'} "
                f"{getattr(demo[name], 'shape', 'a data set')}; expected {len(actions)} steps")
    for name, (kind, shape) in {**_REQUIRED, **_OPTIONAL}.items():
        if name in demo:
            _check_values(demo[name], kind, (len(actions), *shape), f"{where}, {name}")
    if np.abs(actions).max() > 1 + 1e-6:
        raise DemoFileError(f"{where}, actions: values from {actions.min():.4g} to "
                            f"{actions.max():.4g}; expected within [-1, 1]")


def _check_values(dataset: h5py.Dataset, kind: str, expected: tuple, where: str) -> None:
    """``kind`` is ``f`` for any floating type or ``u`` for uint8; None in ``expected`` is any."""
    if len(dataset.shape) != len(expected) or not all(
            found > 0 if size is None else size == found
            for size, found in zip(expected, dataset.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise DemoFileError(f"{where}: has shape {dataset.shape}; expected ({wanted})")
    if not (dataset.dtype.kind == "f" if kind == "f" else dataset.dtype == np.uint8):
        raise DemoFileError(f"{where}: has type {dataset.dtype}; expected "
                            + ("a floating type" if kind == "f" else "uint8"))
    if kind == "f":
        with np.errstate(over="ignore"):  # training computes in float32
            bad = ~np.isfinite(dataset[()].astype(np.float32)).all(axis=-1)
        if bad.any():
            raise DemoFileError(f"{where}: NaN or infinite at {bad.sum()} of {len(bad)} steps, "
                                f"first at step {bad.argmax()}; expected finite numbers")


def finger_motion(demos: Iterable[h5py.Group]) -> tuple[int, int]:
    """Steps in which the fingers move against a steady command, and in which they move at all."""
    against = moving = 0
    for demo in demos:
        width = np.abs(demo["obs/gripper_states"][()]).sum(axis=1)
        change = np.diff(width)[1:]
        sent = schema.EXECUTED_ACTIONS if schema.EXECUTED_ACTIONS in demo else "actions"
        command = np.sign(demo[sent][:, schema.GRIPPER_INDEX])
        # the delay of the fingers depends on the alignment: the steps of a switch do not count
        steady = (command[:-2] == command[1:-1]) & (command[1:-1] == command[2:])
        fast = (np.abs(change) > 1e-3) & steady  # m in a step
        moving += int(fast.sum())
        against += int((np.sign(change[fast]) == command[1:-1][fast]).sum())
    return against, moving


def check_gripper(path: str | Path) -> None:
    """Raise :class:`DemoFileError` unless gripper commands mean the same as in the environment.

    Expected are only -1 (open) and +1 (closed), and fingers that obey. 0 and 1 are not converted:
    data sets differ in which of them closes. A command that never changes is printed.
    """
    with open_demo_file(path) as file:
        demos = {name: file[schema.DATA_GROUP][name] for name in demo_names(file)}
        values = np.unique(np.concatenate([demo["actions"][:, schema.GRIPPER_INDEX]
                                           for demo in demos.values()]))
        motion = {name: finger_motion([demo]) for name, demo in demos.items()}
    where = f"{path}: gripper commands (actions, column {schema.GRIPPER_INDEX})"
    if not set(values.tolist()) <= {schema.GRIPPER_OPEN, schema.GRIPPER_CLOSED}:
        found = ", ".join(f"{value:g}" for value in values[:4])
        found += ", ..." if len(values) > 4 else ""
        raise DemoFileError(f"{where} are {found}; expected {schema.GRIPPER_OPEN:g} (open) and "
                            f"{schema.GRIPPER_CLOSED:g} (closed)")
    # all demonstrations together, and each one with enough moving steps
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
