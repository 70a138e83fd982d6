"""Writing files so that nothing half-written ever stands under a final name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_ASK_EVERY = 0.5  # seconds between looks at whether a folder is free


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success it becomes ``path``, else it is removed.

    For a file or a whole folder. What stood at ``path`` stays untouched until the new one is
    complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def short_name(name: str, longest: int = 100) -> str:
    """``name``, its end replaced by a digest where it is too long for a file system's names."""
    if len(name) <= longest:
        return name
    return f"{name[:longest - 17]}-{digest(name.encode())}"


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Write ``value`` as indented JSON, whole or not at all. NaN is refused (``ValueError``)."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    return Path(path)


@contextlib.contextmanager
def dispensable(what: str) -> Iterator[None]:
    """For films, figures and pages: a failure is printed and costs nothing else."""
    try:
        yield
    except Exception as error:  # of ffmpeg, fonts, a disk, whatever
        print(f"{what} could not be made: {type(error).__name__}: {error}", flush=True)


def inside(folder: str | os.PathLike, path: str | os.PathLike) -> Path | None:
    """``path``, relative to ``folder``, where it is a file in it; None for any other.

    A path that leaves the folder, by ``..``, a link or from the root, may name any file of this
    machine: none may be shown because a run that came from elsewhere says so.
    """
    try:
        found = (Path(folder) / path).resolve()
        return found if found.is_relative_to(Path(folder).resolve()) and found.is_file() else None
    except (TypeError, ValueError, OSError, RuntimeError):  # no path, or links in a circle
        return None


def digest(content: bytes) -> str:
    """First 16 hexadecimal digits of the SHA-256: what results name weights and code by."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """What a JSON file holds, which has to be a ``kind``.

    Raises ``FileNotFoundError`` where there is none, and ``ValueError`` for a damaged one.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; expected JSON") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} is damaged: it holds {type(value).__name__}; expected "
                         f"{kind.__name__}")
    return value


def append_jsonl(path: str | os.PathLike, row: dict) -> None:
    """Append one line and flush it to the disk, so that a kill loses nothing that was reported.

    A last line that a kill or a full disk had cut off is removed first. NaN is refused
    (``ValueError``).
    """
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """Rows of a JSON-lines file; none where there is no file.

    A last line without its newline was cut off, and is left out. Raises ``ValueError`` with the
    number of a line that is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


@contextlib.contextmanager
def only_one(folder: str | Path, stop: threading.Event | None = None,
             wait: bool = True, lock: str = ".lock") -> Iterator[None]:
    """Work in a folder alone: others wait, until ``stop`` is set, or get a ``RuntimeError``.

    ``lock`` is the file in it that stands for the work: other work may go on beside it. The system
    lets go when the process ends, however it does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    guard = FileLock(folder / lock)
    while True:
        try:
            guard.acquire(timeout=0)
            break
        except Timeout:
            if not wait:
                raise RuntimeError(f"another process works in {folder}; wait until it has ended, "
                                   "or choose another name") from None
            if stop and stop.is_set():
                raise KeyboardInterrupt from None
            time.sleep(_ASK_EVERY)
    try:
        yield
    finally:
        guard.release()
