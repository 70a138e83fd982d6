"""Finding the demonstration file of each task: attached, on disk or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from .. import paths, schema
from ..files import walk
from ..sim.env import Task, written_instruction
from .demo_files import (
    COLLECTION_ATTR,
    DemoFileError,
    check_demo_file,
    data_group,
    instruction_of,
    json_attribute,
    normalize_instruction,
    open_demo_file,
    source_of,
)

HUMAN_REPOSITORY = "yifengzhu-hf/LIBERO-datasets"  # CC BY 4.0, on the Hugging Face hub
HUMAN_REVISION = "f13aa24a3da8c43c7225569f28c562979fa0e35a"  # of May 2025


def scripted_dir(suite: str, placement: str, actor: str = "", beta: float = 0.0,
                 frame_stride: int = 1) -> Path:
    """Where scripted demonstrations of a suite are collected, or those with a run as the actor."""
    kind = f"dagger-{Path(actor).name}-beta{beta:g}" if actor else "scripted"
    kind += "" if placement == "benchmark" else f"-{placement}"
    kind += "" if frame_stride == 1 else f"-stride{frame_stride}"
    return paths.data_dir() / kind / suite


def survey_demonstrations(
    folders: Iterable[str | Path],
    task_names: Collection[str] | None = None,
    sources: Sequence[str] = (),
) -> tuple[dict[str, Path], dict[Path, str]]:
    """Demonstration files below folders, by task name, and the reason to leave out each other file.

    Links are followed, hidden files and folders ignored. The name of a file,
    ``<task name>_demo.hdf5``, says its task: no two training suites share one. Of several usable
    files of a task the first is taken, ordered by ``sources``, folder and name; unusable ones are
    skipped with a printed line.

    Args:
        task_names: tasks to find; None finds all.
        sources: of ``human``, ``scripted``, ``dagger``; empty takes any without opening the file.

    Raises :class:`DemoFileError` where every file of a task is unusable.
    """
    candidates: dict[str, list[Path]] = {}
    left_out: dict[Path, str] = {}
    for path in (path for folder in folders for path in _hdf5_files(Path(folder))):
        task = path.name.removesuffix(schema.DEMO_FILE_SUFFIX)
        if task == path.name:
            left_out[path] = f"not named <task name>{schema.DEMO_FILE_SUFFIX}"
        elif task_names is not None and task not in task_names:
            left_out[path] = "another task"
        else:
            candidates.setdefault(task, []).append(path)
    found = {}
    for task, files in candidates.items():
        chosen, others = _choose(list(dict.fromkeys(files)), sources)
        left_out |= others
        if chosen:
            found[task] = chosen
    return found, left_out


def _choose(files: list[Path], sources: Sequence[str]) -> tuple[Path | None, dict[Path, str]]:
    """The file to use of one task's, None without any of ``sources``, and why not the others."""
    ranks, left_out, errors = {}, {}, []
    for path in files:
        try:
            source = source_of(path) if sources else ""
            if sources and source not in sources:
                left_out[path] = f"{source}, not {', '.join(sources)}"
                continue
            if len(files) > 1:  # a single file is checked by its reader
                check_demo_file(path)
            ranks[path] = sources.index(source) if sources else 0
        except DemoFileError as error:
            errors.append(error)
            left_out[path] = "unusable" + str(error).removeprefix(str(path))
    if len(errors) == len(files):
        raise DemoFileError("; ".join(map(str, errors)))
    chosen = min(ranks, key=ranks.get, default=None)
    for error in errors:
        print(f"skipped {error}" + (f"; {chosen} is used" if chosen else ""))
    return chosen, left_out | {path: f"{chosen} comes first" for path in ranks if path != chosen}


def _hdf5_files(folder: Path) -> list[Path]:
    return sorted(place / name for place, _, names in walk(folder) for name in names
                  if name.lower().endswith((".hdf5", ".h5")))


def find_demonstrations(
    folders: Sequence[str | Path],
    task_names: Collection[str] | None = None,
    sources: Sequence[str] = (),
) -> tuple[dict[str, Path], dict[Path, str]]:
    """:func:`survey_demonstrations`, with an error for a missing task.

    Raises ``FileNotFoundError`` when nothing or not every one of ``task_names`` was found, with the
    folders and the files left out.
    """
    found, left_out = survey_demonstrations(folders, task_names, sources)
    missing = [name for name in task_names or () if name not in found]
    if missing or not found:
        searched = ", ".join(f"{each}{'' if Path(each).is_dir() else ' (no such folder)'}"
                             for each in folders)
        what = f"{' or '.join(sources)} demonstrations".strip()
        raise FileNotFoundError(
            f"no {what} for {', '.join(missing) or 'any task'}; "
            f"looked for *{schema.DEMO_FILE_SUFFIX} below: {searched}"
            + (f"; left out: {left_out_text(left_out)}" if left_out else ""))
    return found, left_out


def left_out_text(left_out: dict[Path, str]) -> str:
    """Files left out, grouped by reason, in one line."""
    reasons: dict[str, list[str]] = {}
    for path, reason in left_out.items():
        reasons.setdefault(reason, []).append(str(path))
    return "; ".join(f"{', '.join(files)} ({reason})" for reason, files in reasons.items())


def human_demonstrations(suites: Mapping[str, str]) -> dict[str, Path]:
    """Task name -> file of human demonstrations: attached, on disk or from the Hugging Face hub.

    Missing files are downloaded into ``data_dir()/human``. Raises ``FileNotFoundError`` for a task
    without a file.

    Args:
        suites: the suite of each task, by the task's name.
    """
    folders = [paths.data_dir(), paths.KAGGLE_INPUT]
    found, _ = survey_demonstrations(folders, suites, ["human"])
    missing = [f"{suite}/{name}{schema.DEMO_FILE_SUFFIX}" for name, suite in suites.items()
               if name not in found]
    if not missing:
        return found
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(HUMAN_REPOSITORY, repo_type="dataset",
                                          revision=HUMAN_REVISION, allow_patterns=missing,
                                          local_dir=paths.data_dir() / "human")
    except Exception as error:  # the hub's client raises its HTTP library's own types
        raise FileNotFoundError(
            f"could not download {', '.join(missing)} from {HUMAN_REPOSITORY} "
            f"({type(error).__name__}: {error}). Without internet access, attach a data set that "
            "holds these files or use scripted demonstrations") from error
    return find_demonstrations(folders, suites, ["human"])[0]


def other_task(path: str | Path, task: Task) -> str:
    """A sentence if a file has another instruction than the task that its name says; else empty.

    Raises :class:`DemoFileError` for a scripted file, which records its task, of another one.
    """
    suite, task_id = schema.own_suite(task.suite, task.task_id)
    with open_demo_file(path) as file:
        made = json_attribute(data_group(file), COLLECTION_ATTR)
    there = (made.get("suite", suite), made.get("task_id", task_id))
    if there[0] == schema.JOINT_SUITE:  # an actor's
        there = schema.own_suite(*there)
    if there != (suite, task_id):
        raise DemoFileError(f"{path}: demonstrations of {there[0]}, task {there[1]}; expected "
                            f"those of {suite}, task {task_id}, which the file is named after")
    said = instruction_of(path)
    known = (task.language, written_instruction(task.bddl_file))
    if not said or normalize_instruction(said) in map(normalize_instruction, known):
        return ""
    return (f"{path}: its instruction is {said!r}, that of {suite}, task {task_id}, is "
            f"{task.language!r}; is it a file of this task?")
