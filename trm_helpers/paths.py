"""Where the repository, the demonstrations and the run folders are, here and on Kaggle."""

from __future__ import annotations

import os
from pathlib import Path

KAGGLE_INPUT = Path("/kaggle/input")
KAGGLE_WORKING = Path("/kaggle/working")


def on_kaggle() -> bool:
    """True in a Kaggle notebook, interactive or committed."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ or KAGGLE_WORKING.is_dir()


def repo_root() -> Path:
    """The checkout this package is in, or the working directory for an installed wheel."""
    parent = Path(__file__).resolve().parent.parent
    return parent if (parent / "pyproject.toml").exists() else Path.cwd()


def _folder(variable: str, name: str) -> Path:
    if variable in os.environ:
        return Path(os.environ[variable]).expanduser().resolve()
    return (KAGGLE_WORKING if on_kaggle() else repo_root()) / name


def data_dir() -> Path:
    """Demonstrations and caches: ``$TRM_DATA_DIR``, ``/kaggle/working/data`` or ``data/``."""
    return _folder("TRM_DATA_DIR", "data")


def artifacts_dir() -> Path:
    """Run folders: ``$TRM_ARTIFACTS_DIR``, ``/kaggle/working/artifacts`` or ``artifacts/``."""
    return _folder("TRM_ARTIFACTS_DIR", "artifacts")


def shipped(folder: str) -> Path:
    """``notebooks`` or ``pretrained``: inside the package in a wheel, beside it in a checkout."""
    inside = Path(__file__).resolve().parent / folder
    return inside if inside.is_dir() else repo_root() / folder


def notebooks_dir() -> Path:
    """The eight notebooks."""
    return shipped("notebooks")
