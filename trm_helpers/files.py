"""Files that are never half-written: atomic writes, locks, JSON that names its damage, digests."""

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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

_TEMPORARY = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})\.(?P<pid>\d+)\.part(\..+)?")
_ABANDONED = 24 * 3600.0  # seconds after which another machine's temporary file is removed
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded",
               "inline_container.cc")  # PyTorch's writer gives no other hint


class DiskFullError(OSError):
    """No space is left for a file; completed files are kept."""

    def __str__(self) -> str:
        return self.strerror


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` on success and is removed on failure.

    For a file or a folder, of which an existing one has to be empty. Leftovers of killed processes
    beside it are removed first.

    Args:
        needed: size in bytes if known, for the message about a full disk.

    Raises:
        DiskFullError: for any error that means a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    name = f".{short_name(path.name)}.{machine()}.{os.getpid()}.part{path.suffix}"
    temporary = path.with_name(name)
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:
        needed = needed or _size(temporary)
        _remove(temporary)
        _raise_if_disk_is_full(error, path, needed)
        raise
    finally:
        _remove(temporary)


def _raise_if_disk_is_full(error: BaseException, path: Path, needed: int) -> None:
    """Raise :class:`DiskFullError` if ``error``, or a cause of it, means a full disk."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, DiskFullError):
        named = any(text in str(cause) for text in _FULL_TEXTS)
        if named or getattr(cause, "errno", None) in _FULL:
            free = shutil.disk_usage(path.parent).free
            need = f" needs {_in_bytes(needed)}," if needed else ""
            raise DiskFullError(
                errno.ENOSPC, f"the disk is full: {path.name}{need} in {path.parent}, where "
                f"{_in_bytes(free)} are free; completed files are kept") from error
        cause = cause.__cause__ or cause.__context__


def _in_bytes(size: int) -> str:
    if size < 2**10:
        return f"{size} bytes"
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


@functools.cache
def machine() -> str:
    """The machine, or the container on it, whose process numbers can be compared."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return digest(f"{platform.node()} {processes}".encode())[:8]


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of ended processes here, and of other machines after a day."""
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if not found:
            continue
        with contextlib.suppress(OSError):  # another process removes it too, or another user's
            if found["machine"] == machine():
                abandoned = not psutil.pid_exists(int(found["pid"]))
            else:
                abandoned = time.time() - path.stat().st_mtime > _ABANDONED
            if abandoned:
                _remove(path)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    return 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def writable(folder: Path) -> bool:
    """Whether a folder can be written, or created where there is none yet."""
    existing = nearest(folder)
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def nearest(path: Path) -> Path:
    """``path`` or the nearest folder above it that exists, as far as this user may look."""
    return next(each for each in (path, *path.parents) if os.path.exists(each))


@contextlib.contextmanager
def exclusive_lock(folder: str | Path, stop: threading.Event | None = None,
                   wait: bool = True, lock: str = ".lock") -> Iterator[None]:
    """Hold the file ``lock`` in ``folder`` alone; the system releases it when the process ends.

    Args:
        stop: when set, waiting ends with ``KeyboardInterrupt``.
        wait: ``False`` raises ``RuntimeError`` if another process holds the lock.

    Raises ``PermissionError`` for a folder in which no file can be made, for whatever reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / lock).acquire(blocking=wait, cancel_check=stop and stop.is_set)
    except Timeout:
        if wait:
            raise KeyboardInterrupt from None
        raise RuntimeError(f"another process works in {folder}; wait until it has ended, or choose "
                           "another name") from None
    except OSError as error:
        raise PermissionError(f"{folder} is not writable ({error.strerror}); choose another folder "
                              "with TRM_DATA_DIR or TRM_ARTIFACTS_DIR") from None
    with held:
        yield


def walk(folder: str | os.PathLike) -> Iterator[tuple[Path, list[str], list[str]]]:
    """:func:`os.walk` in sorted order: links are followed, hidden names left out.

    No folder is entered twice, so links in a circle end.
    """
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place), folders, sorted(name for name in names if not name.startswith("."))


def visible(folder: str | os.PathLike, pattern: str) -> list[Path]:
    """Sorted paths below ``folder`` that match a glob ``pattern``, hidden ones excluded."""
    folder = Path(folder)
    return sorted(path for path in folder.glob(pattern)
                  if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def inside(folder: str | os.PathLike, path: str | os.PathLike) -> Path | None:
    """``path``, relative to ``folder``, resolved; ``None`` unless it is a file in that folder.

    A run from elsewhere must not name other files of this machine, by ``..``, a link or an absolute
    path.
    """
    try:
        found = (Path(folder) / path).resolve()
        return found if found.is_relative_to(Path(folder).resolve()) and found.is_file() else None
    except (TypeError, ValueError, OSError, RuntimeError):  # not a path, or circular links
        return None


def short_name(name: str) -> str:
    """``name``, with a digest in place of its end if it is too long for a file system."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 100 else (
        f"{encoded[:83].decode(errors='ignore')}-{digest(encoded)}")


def differences(there: Mapping, now: Mapping, missing: str = "none") -> str:
    """``"lr: 0.001 there, 0.5 now; ..."``: each entry that a file and a call disagree on."""
    return "; ".join(
        f"{key}: {repr(there[key]) if key in there else missing} there, "
        f"{repr(now[key]) if key in now else missing} now"
        for key in sorted({*there, *now}) if there.get(key) != now.get(key))


def digest(content: bytes) -> str:
    """First 16 hexadecimal digits of the SHA-256, by which results name weights and code."""
    return hashlib.sha256(content).hexdigest()[:16]


@contextlib.contextmanager
def dispensable(what: str) -> Iterator[None]:
    """For films, figures and pages: report a failure and go on."""
    try:
        yield
    except Exception as error:  # of ffmpeg, fonts, a disk
        print(f"{what} could not be made: {type(error).__name__}: {error}", flush=True)


# --- reading and writing -------------------------------------------------------------------------
def write_bytes(path: str | os.PathLike, content: bytes | memoryview) -> Path:
    """Write a file atomically, with the permissions of the umask."""
    with atomic_path(path, len(content)) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Content of a regular file; ``ValueError`` for pipes and devices, which may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a regular file; expected one")
    return Path(path).read_bytes()


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Write ``value`` as indented JSON, atomically. NaN raises ``ValueError``."""
    return write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | os.PathLike, kind: type = dict, keys: Iterable[str] = ()) -> Any:
    """The content of a JSON file: a ``kind`` with the ``keys``.

    A key ``a.b`` is the key ``b`` of the object under ``a``.

    Raises ``FileNotFoundError`` for a missing file, ``ValueError`` for a damaged one.
    """
    value = _parse(path, read_bytes(path), kind)
    if missing := [key for key in keys if not _has(value, *key.split("."))]:
        raise ValueError(f"{path} is damaged: it holds no {', '.join(missing)}")
    return value


def _parse(where: Any, content: bytes, kind: type) -> Any:
    try:
        value = json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: {error}; expected JSON") from error
    if not isinstance(value, kind):
        raise ValueError(f"{where} is damaged: it holds {type(value).__name__}; expected "
                         f"{kind.__name__}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _has(value: Any, key: str, *below: str) -> bool:
    return isinstance(value, dict) and key in value and (not below or _has(value[key], *below))


def append_jsonl(path: str | os.PathLike, row: dict) -> None:
    """Append a line and flush it to the disk, so that a kill loses no reported row.

    A last line cut off by a kill or a full disk is removed first. NaN raises ``ValueError``, a full
    disk :class:`DiskFullError`.
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
        _raise_if_disk_is_full(error, Path(path), len(line))
        raise


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """Rows of a JSON-lines file; none for a missing file.

    A last line without its newline was cut off and is ignored. ``ValueError`` gives the number of a
    line that is not a JSON object.
    """
    lines = read_bytes(path).split(b"\n")[:-1] if Path(path).exists() else []
    return [_parse(f"{path}, line {number}", line, dict) for number, line in enumerate(lines, 1)]
