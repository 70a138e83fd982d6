"""What is in a demonstration file: where it is, whether it is whole, how it was aligned."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from . import paths, schema

HUMAN_REPOSITORY = "yifengzhu-hf/LIBERO-datasets"  # CC BY 4.0, on the Hugging Face hub
COLLECTION_ATTR = "collection"  # JSON on how a scripted file was made; human files have none
IMAGE_SHAPE = (None, None, 3)  # after the time dimension; None: any size

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
    """Open for reading; a missing, truncated or foreign file raises :class:`DemoFileError`."""
    path = Path(path)
    if not path.is_file():
        raise DemoFileError(f"{path}: not found; expected a LIBERO demonstration file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:
        raise DemoFileError(f"{path}: truncated, or not an HDF5 file ({error})") from error


def demo_names(file: h5py.File) -> list[str]:
    """Names of the demonstrations in the order of their numbers (``demo_2`` before ``demo_10``)."""
    numbers = [name.removeprefix("demo_") for name in file[schema.DATA_GROUP]]
    return [f"demo_{number}" for number in sorted(filter(str.isdigit, numbers), key=int)]


def source_of(path: str | Path) -> str:
    """``scripted`` for a file with our ``collection`` attribute, otherwise ``human``."""
    with open_demo_file(path) as file:
        attributes = file[schema.DATA_GROUP].attrs if schema.DATA_GROUP in file else {}
        return "scripted" if COLLECTION_ATTR in attributes else "human"


# --- finding -------------------------------------------------------------------------------------
def find_demonstrations(
    folder: str | Path | Iterable[str | Path],
    suite: str | None = None,
    task_names: Sequence[str] | None = None,
    *,
    source: str | None = None,
) -> dict[str, Path]:
    """Task name -> ``<task name>_demo.hdf5``, searched for below one or several folders.

    ``suite``, ``task_names`` and ``source`` (``human`` or ``scripted``) narrow the search. A file
    belongs to a suite when a folder above it has the suite's name, or its ``bddl_file_name`` says
    so. Of several files for a task the first is taken: folders in the order given, then names.
    Raises ``FileNotFoundError``, listing where it looked, when nothing or not every one of
    ``task_names`` was found.
    """
    folders = [folder] if isinstance(folder, (str, Path)) else list(folder)
    found: dict[str, Path] = {}
    for path in (path for each in folders for path in _demo_files(Path(each))):
        task = path.name.removesuffix(schema.DEMO_FILE_SUFFIX)
        wanted = task not in found and (task_names is None or task in task_names)
        if (
            wanted
            and (suite is None or _belongs(path, schema.check_suite(suite)))
            and (source is None or source_of(path) == source)
        ):
            found[task] = path
    missing = [name for name in task_names or () if name not in found]
    if missing or not found:
        what = " ".join(filter(None, (source, "demonstrations", suite and f"of {suite}")))
        looked = ", ".join(f"{each}{'' if Path(each).exists() else ' (no such folder)'}"
                           for each in folders)
        raise FileNotFoundError(
            f"no {what} for {', '.join(missing) or 'any task'}; "
            f"looked for *{schema.DEMO_FILE_SUFFIX} below: {looked or 'no folder'}"
        )
    return found


def _demo_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*" + schema.DEMO_FILE_SUFFIX)) if folder.is_dir() else []


def _belongs(path: Path, suite: str) -> bool:
    if suite in path.parts:
        return True
    with open_demo_file(path) as file:
        attributes = file[schema.DATA_GROUP].attrs if schema.DATA_GROUP in file else {}
        return suite in Path(str(attributes.get("bddl_file_name", ""))).parts


def human_demonstrations(
    suite: str, task_names: Sequence[str], folders: Iterable[str | Path], download: bool
) -> dict[str, Path]:
    """Task name -> file of human demonstrations, attached, on disk or from the Hugging Face hub.

    Looks below ``folders`` and Kaggle's input folder. What is not there is fetched into
    ``data_dir()/human`` if ``download`` is true. Raises ``FileNotFoundError`` when a task's file
    is neither there nor downloadable; the message says how to get it.
    """
    target = paths.data_dir() / "human"
    places = [*folders, paths.KAGGLE_INPUT, target]
    try:
        return find_demonstrations(places, suite, task_names, source="human")
    except FileNotFoundError as error:
        if not download:
            raise FileNotFoundError(
                f"{error}. Attach a data set that holds them, let them be downloaded from "
                f"{HUMAN_REPOSITORY}, or use scripted demonstrations"
            ) from error
    wanted = [f"{suite}/{name}{schema.DEMO_FILE_SUFFIX}" for name in task_names]
    _download(wanted, target)
    return find_demonstrations(places, suite, task_names, source="human")


def _download(patterns: list[str], target: Path) -> None:
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(
            HUMAN_REPOSITORY, repo_type="dataset", allow_patterns=patterns, local_dir=target
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
        if schema.DATA_GROUP not in file:
            raise DemoFileError(
                f"{path}: no group {schema.DATA_GROUP!r}; found {sorted(file) or 'nothing'}"
            )
        names = demo_names(file)
        if not names:
            raise DemoFileError(f"{path}: no demonstrations; expected groups demo_0, demo_1, ...")
        for name in names:
            _check_demo(file[schema.DATA_GROUP][name], f"{path}, {name}")


def _check_demo(demo: h5py.Group, where: str) -> None:
    layout = {"actions": ("f", (schema.ACTION_DIM,))}
    layout |= {f"obs/{name}": ("f", (width,)) for name, width in schema.LOW_DIM.items()}
    layout |= {f"obs/{name}": ("u", IMAGE_SHAPE) for name in schema.CAMERAS}
    missing = [name for name in layout if name not in demo]
    if missing:
        raise DemoFileError(f"{where}: missing {', '.join(missing)}; found {_names(demo)}")
    if demo["actions"].shape[:1] == (0,):
        raise DemoFileError(f"{where}: has no steps; expected at least one")
    length = demo["actions"].shape[0] if demo["actions"].shape else None
    for name, (kind, shape) in layout.items():
        _check_layout(demo[name], kind, (length, *shape), f"{where}, {name}")
    for name in schema.DEMO_DATASETS:
        if name in demo and demo[name].shape[:1] != (length,):
            raise DemoFileError(
                f"{where}, {name}: has shape {demo[name].shape}; expected {length} steps"
            )
    for name in ("actions", *(f"obs/{name}" for name in schema.LOW_DIM)):
        _check_finite(demo[name][()], f"{where}, {name}")
    actions = demo["actions"][()]
    if np.abs(actions).max() > 1 + 1e-6:
        raise DemoFileError(
            f"{where}, actions: values from {actions.min():.4g} to {actions.max():.4g}; "
            "expected within [-1, 1]"
        )


def _names(demo: h5py.Group) -> list[str]:
    names: list[str] = []
    demo.visit(names.append)
    return [name for name in names if isinstance(demo[name], h5py.Dataset)]


def _check_layout(dataset: h5py.Dataset, kind: str, expected: tuple, where: str) -> None:
    """``kind`` is ``f`` for any floating type or ``u`` for uint8; None in ``expected`` is any."""
    fits = len(dataset.shape) == len(expected) and all(
        size is None or size == found for size, found in zip(expected, dataset.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise DemoFileError(f"{where}: has shape {dataset.shape}; expected ({wanted})")
    if not (dataset.dtype.kind == "f" if kind == "f" else dataset.dtype == np.uint8):
        expected_type = "a floating type" if kind == "f" else "uint8"
        raise DemoFileError(f"{where}: has type {dataset.dtype}; expected {expected_type}")


def _check_finite(values: np.ndarray, where: str) -> None:
    bad = ~np.isfinite(values).all(axis=-1)
    if bad.any():
        raise DemoFileError(
            f"{where}: NaN or infinite at {bad.sum()} of {len(bad)} steps, first at step "
            f"{bad.argmax()}; expected finite numbers"
        )


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
    if setting not in ("auto", *schema.ALIGNMENTS):
        raise ValueError(f"alignment={setting!r} is not valid; expected auto, raw or shift")
    with open_demo_file(path) as file:
        attribute = file[schema.DATA_GROUP].attrs.get(schema.ALIGNMENT_ATTR)
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
        collection = group.attrs.get(COLLECTION_ATTR)
        return {
            "file": str(path),
            "collection": json.loads(collection) if collection else None,
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
    problem = json.loads(group.attrs.get("problem_info", "{}"))
    pieces = problem.get("language_instruction", "")
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
