import importlib.metadata
import json
import subprocess
import sys

import pytest

import trm_helpers
from trm_helpers import paths


def test_import_loads_neither_torch_nor_the_simulator():
    code = ("import sys, json, trm_helpers; dir(trm_helpers); "
            "print(json.dumps(sorted(sys.modules)))")
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert "trm_helpers" in loaded
    heavy = {"torch", "numpy", "libero", "robosuite", "mujoco", "papermill"}
    assert not heavy.intersection(loaded)


@pytest.mark.parametrize("name", [n for n in trm_helpers.__all__ if n != "__version__"])
def test_every_public_name_is_there_and_documented(name):
    value = getattr(trm_helpers, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(trm_helpers)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'TRMPolice'"):
        trm_helpers.TRMPolice  # noqa: B018


def test_version_is_the_installed_one():
    assert importlib.metadata.version("trm-helpers") == trm_helpers.__version__


def test_requirements_are_pinned_and_say_which_notebook_needs_them():
    """The exact versions in constraints.txt, the simulator's also in requirements.txt."""
    constraints = (paths.repo_root() / "constraints.txt").read_text().lower()
    lines = (paths.repo_root() / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    assert len(required) > 10
    for line in required:
        requirement, _, comment = line.partition("#")
        name = requirement.split(">=")[0].split("==")[0].split("[")[0].strip()
        assert f"\n{name.lower()}==" in constraints, name
        assert comment.strip(), f"{name} lacks the comment"
