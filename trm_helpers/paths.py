"""Where the repository, the demonstrations and the run folders are, here and on Kaggle."""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import schema

KAGGLE_INPUT = Path("/kaggle/input")
KAGGLE_WORKING = Path("/kaggle/working")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = {"notebooks", "pretrained", *schema.BASELINES,  # and folders of baselines' results
             *(f"{name}-{suite}" for name in schema.BASELINES for suite in schema.SUITES)}


def on_kaggle() -> bool:
    """True in a Kaggle notebook, interactive or committed."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ or KAGGLE_WORKING.is_dir()


def repo_root() -> Path:
    """The checkout this package is in, or the working directory for an installed wheel."""
    parent = Path(__file__).resolve().parent.parent
    return parent if (parent / "pyproject.toml").exists() else Path.cwd()


def absolute(path: str | os.PathLike) -> Path:
    """A path that means the same in another working folder; ``~`` is the user's home.

    Every path is made absolute where it is read: notebooks, workers and trials run elsewhere.
    """
    return Path(os.path.expanduser(path)).resolve()  # an unknown user's stays as it is


def _folder(variable: str, name: str) -> Path:
    if given := os.environ.get(variable, "").strip():  # an empty variable is none
        os.environ[variable] = str(absolute(given))  # for processes that start elsewhere
        return Path(os.environ[variable])
    return (KAGGLE_WORKING if on_kaggle() else repo_root()) / name


def data_dir() -> Path:
    """Demonstrations and caches: ``$TRM_DATA_DIR``, ``/kaggle/working/data`` or ``data/``."""
    return _folder("TRM_DATA_DIR", "data")


def artifacts_dir() -> Path:
    """Run folders: ``$TRM_ARTIFACTS_DIR``, ``/kaggle/working/artifacts`` or ``artifacts/``."""
    return _folder("TRM_ARTIFACTS_DIR", "artifacts")


def shipped(folder: str) -> Path:
    """``notebooks`` or ``pretrained``: inside the package in a wheel, beside it in a checkout."""
    inside = Path(__file__).resolve().parent / "shipped" / folder
    return inside if inside.is_dir() else repo_root() / folder


def notebooks_dir() -> Path:
    """The eight notebooks."""
    return shipped("notebooks")


# --- names of runs -------------------------------------------------------------------------------
def run_dir(run_name: str | int) -> Path:
    """``artifacts/<run_name>``: the one place where a name becomes a folder. Nothing is made.

    Raises ``ValueError`` for a name that is not 1 to 100 letters, digits, ``._-``, the first a
    letter or a digit. papermill gives a name of digits as a number.
    """
    name = str(run_name) if type(run_name) is int else run_name
    if not isinstance(name, str) or not _RUN_NAME.fullmatch(name):
        raise ValueError(f"run_name={run_name!r} is not valid; expected text of 1 to 100 letters, "
                         "digits, '._-', beginning with a letter or digit")
    if name in _RESERVED:
        raise ValueError(f"run_name={run_name!r} is not valid; expected a name that is not "
                         "reserved for a baseline or for notebooks")
    return artifacts_dir() / name
