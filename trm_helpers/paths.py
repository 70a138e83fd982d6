"""Folders of the repository, the demonstrations and the runs, here and on Kaggle."""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import schema

_KAGGLE = Path(os.environ.get("TRM_KAGGLE") or "/kaggle")  # another folder in an emulated session
KAGGLE_INPUT = _KAGGLE / "input"
KAGGLE_WORKING = _KAGGLE / "working"
KAGGLE_TEMPORARY = Path("/tmp/trm") if str(_KAGGLE) == "/kaggle" else _KAGGLE / "temporary"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = {"notebooks", "pretrained", "search", "replay", *schema.BASELINES,
             *(f"{name}-{suite}" for name in schema.BASELINES for suite in schema.SUITES)}


def on_kaggle() -> bool:
    """True in a Kaggle notebook, interactive or committed."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ or KAGGLE_WORKING.is_dir()


def repo_root() -> Path:
    """The checkout this package is in, or the working directory for an installed wheel."""
    parent = Path(__file__).resolve().parent.parent
    return parent if (parent / "pyproject.toml").exists() else Path.cwd()


def absolute(path: str | os.PathLike) -> Path:
    """An absolute path, because notebooks and workers run in other folders; ``~`` is the home."""
    return Path(os.path.expanduser(path)).resolve()  # an unknown user's ~ stays as it is


def _folder(variable: str, name: str) -> Path:
    given = os.environ.get(variable, "").strip()
    if not given:
        return (KAGGLE_WORKING if on_kaggle() else repo_root()) / name
    os.environ[variable] = str(absolute(given))  # for processes that start in another folder
    return Path(os.environ[variable])


def data_dir() -> Path:
    """Demonstrations and caches: ``$TRM_DATA_DIR``, ``/kaggle/working/data`` or ``data/``."""
    return _folder("TRM_DATA_DIR", "data")


def artifacts_dir() -> Path:
    """Run folders: ``$TRM_ARTIFACTS_DIR``, ``/kaggle/working/artifacts`` or ``artifacts/``."""
    return _folder("TRM_ARTIFACTS_DIR", "artifacts")


def shipped(folder: str) -> Path:
    """``notebooks`` or ``pretrained``: in the package of a wheel, in the root of a checkout."""
    inside = Path(__file__).resolve().parent / "shipped" / folder
    return inside if inside.is_dir() else repo_root() / folder


def notebooks_dir() -> Path:
    return shipped("notebooks")


def run_dir(run_name: str | int) -> Path:
    """``artifacts/<run_name>``, not created; ``ValueError`` for an invalid name.

    A name is 1 to 100 letters, digits and ``._-``, the first a letter or digit.
    """
    name = str(run_name) if type(run_name) is int else run_name  # papermill makes 2024 a number
    if not isinstance(name, str) or not _RUN_NAME.fullmatch(name):
        raise ValueError(f"run_name={run_name!r} is not valid; expected text of 1 to 100 letters, "
                         "digits, '._-', beginning with a letter or digit")
    if name in _RESERVED:
        raise ValueError(f"run_name={run_name!r} is not valid; expected a name that is not "
                         "reserved for a baseline, a search or notebooks")
    folder = artifacts_dir() / name
    if folder.is_file():
        raise ValueError(f"run_name={run_name!r} is not valid; {folder} is a file")
    return folder
