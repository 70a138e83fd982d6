"""Writing files so that nothing half-written ever stands under a final name."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_ASK_EVERY = 0.5  # seconds between looks at whether a folder is free
_TEMPORARY = re.compile(r"\..+?(?:\.(?P<machine>[0-9a-f]{8}))?\.(?P<pid>\d+)\.part(?:\.\w+)?")
_LEFT_OVER = 24 * 3600.0  # seconds after which a temporary file is nobody's any more
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded",
               "inline_container.cc")  # PyTorch, whose writer says no more than that


class DiskFullError(OSError):
    """No space is left for a file; what was complete before is kept."""

    def __str__(self) -> str:
        return self.strerror


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success it becomes ``path``, else it is removed.

    For a file or a whole folder. What stood at ``path`` stays untouched until the new one is
    complete. What killed processes left beside it is removed first.

    Args:
        needed: bytes, where they are known, for the message of a full disk.

    Raises:
        DiskFullError: whatever the writer raised for a lack of space.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    name = f".{short_name(path.name)}.{_machine()}.{os.getpid()}.part{path.suffix}"
    temporary = path.with_name(name)
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:
        needed = needed or _size(temporary)
        _remove(temporary)
        raise_if_disk_is_full(error, path, needed)
        raise
    finally:
        _remove(temporary)


def raise_if_disk_is_full(error: BaseException, path: Path, needed: int = 0) -> None:
    """Raise :class:`DiskFullError` where ``error`` means that, in whatever words a library has.

    Args:
        path: the file that could not be written.
        needed: its size in bytes; 0 where that is not known.
    """
    told: BaseException | None = error
    while told is not None and not isinstance(told, DiskFullError):
        if getattr(told, "errno", None) in _FULL or any(text in str(told) for text in _FULL_TEXTS):
            free = shutil.disk_usage(path.parent).free
            need = f" needs {needed / 2**20:,.1f} MiB," if needed else ""
            raise DiskFullError(
                errno.ENOSPC, f"the disk is full: {path.name}{need} in {path.parent}, where "
                f"{free / 2**20:,.1f} MiB are free; what was complete before is kept") from error
        told = told.__cause__ or told.__context__


@functools.cache
def _machine() -> str:
    """Of the processes whose numbers can be compared: the machine, or the container on it."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return digest(f"{platform.node()} {processes}".encode())[:8]


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that no longer run.

    Of other machines, whose processes cannot be asked, those untouched for a day.
    """
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        with contextlib.suppress(OSError):  # another process removes it too
            if found and (
                    time.time() - path.stat().st_mtime > _LEFT_OVER
                    or found["machine"] in (None, _machine()) and not _runs(int(found["pid"]))):
                _remove(path)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    return 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def visible(folder: str | os.PathLike, pattern: str) -> list[Path]:
    """Sorted paths below ``folder`` that match a glob ``pattern``, without hidden ones."""
    folder = Path(folder)
    return sorted(path for path in folder.glob(pattern)
                  if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def short_name(name: str, longest: int = 100) -> str:
    """``name``, its end replaced by a digest where it is too long for a file system's names."""
    if len(name) <= longest:
        return name
    return f"{name[:longest - 17]}-{digest(name.encode())}"


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Write ``value`` as indented JSON, whole or not at all. NaN is refused (``ValueError``)."""
    return write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: str | os.PathLike, content: bytes | memoryview) -> Path:
    """Write ``content``, whole or not at all. Modes follow the umask: others may read it."""
    with atomic_path(path, len(content)) as temporary:
        temporary.write_bytes(content)
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


def read_bytes(path: str | os.PathLike) -> bytes:
    """Content of a regular file; ``ValueError`` for pipes and devices, whose end may never come."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a regular file; expected one")
    return Path(path).read_bytes()


def read_json(path: str | os.PathLike, kind: type = dict, keys: Iterable[str] = ()) -> Any:
    """What a JSON file holds, which has to be a ``kind`` and to have the ``keys``.

    A key ``a.b`` is the key ``b`` of the object under ``a``.

    Raises ``FileNotFoundError`` where there is none, and ``ValueError`` for a damaged one.
    """
    content = read_bytes(path)
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; expected JSON") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} is damaged: it holds {type(value).__name__}; expected "
                         f"{kind.__name__}")
    if missing := [key for key in keys if not _has(value, *key.split("."))]:
        raise ValueError(f"{path} is damaged: it holds no {', '.join(missing)}")
    return value


def _has(value: Any, key: str, *below: str) -> bool:
    return isinstance(value, dict) and key in value and (not below or _has(value[key], *below))


def append_jsonl(path: str | os.PathLike, row: dict) -> None:
    """Append one line and flush it to the disk, so that a kill loses nothing that was reported.

    A last line that a kill or a full disk had cut off is removed first. NaN is refused
    (``ValueError``), a full disk named (:class:`DiskFullError`).
    """
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    try:
        with open(path, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise_if_disk_is_full(error, Path(path), len(line))
        raise


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """Rows of a JSON-lines file; none where there is no file.

    A last line without its newline was cut off, and is left out. Raises ``ValueError`` with the
    number of a line that is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], 1):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is {type(row).__name__}; expected an object")
        rows.append(row)
    return rows


@contextlib.contextmanager
def exclusive_lock(folder: str | Path, stop: threading.Event | None = None,
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
