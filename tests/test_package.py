import ast
import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trm_helpers
from trm_helpers import paths


def pins():
    """The version of each distribution in constraints.txt, for this Python."""
    lines = (paths.repo_root() / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in pinned
            if one.marker is None or one.marker.evaluate()}


def test_import_loads_neither_torch_nor_the_simulator():
    code = ("import sys, json, trm_helpers; dir(trm_helpers); "
            "print(json.dumps(sorted(sys.modules)))")
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert "trm_helpers" in loaded
    heavy = {"torch", "numpy", "libero", "robosuite", "mujoco", "papermill"}
    assert not heavy.intersection(loaded)


def test_playing_episodes_loads_no_plotting():
    code = "import sys, trm_helpers.evaluation.evaluate; print('matplotlib' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize(("variable", "threads"), [(None, 1), ("2", 2)])
def test_a_process_has_one_thread_unless_the_environment_says_otherwise(variable, threads):
    environment = {name: value for name, value in os.environ.items()
                   if not name.endswith("_NUM_THREADS")}
    if variable is not None:
        environment["OMP_NUM_THREADS"] = variable
    code = ("import os, trm_helpers.policy.layers, torch; "
            "print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])")
    found = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert found.split() == [str(threads)] * 2  # what it starts has as many


@pytest.mark.parametrize(("variable", "threads"), [(None, "1"), ("", "1"), (" ", "1"), ("2", "2")])
def test_the_package_sets_the_variable_of_threads_where_it_says_nothing(variable, threads,
                                                                        monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", variable or "")
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    runpy.run_path(trm_helpers.__file__)
    assert os.environ["OMP_NUM_THREADS"] == threads


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


def test_requirements_are_pinned_and_say_what_they_are_for():
    """The exact versions in constraints.txt, the simulator's also in requirements.txt."""
    pinned = pins()
    lines = (paths.repo_root() / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    assert len(required) > 10
    for line in required:
        requirement, _, comment = line.partition("#")
        assert canonicalize_name(Requirement(requirement).name) in pinned
        assert comment.strip(), f"{requirement} lacks the comment"


def test_everything_that_set_up_installs_is_pinned():
    """The tools, the build back end, and all that the package with its tests depends on."""
    pinned = pins()
    pending = [("pip", ""), ("setuptools", ""), ("trm-helpers", ""), ("trm-helpers", "dev")]
    seen = set()
    while pending:
        name, extra = pending.pop()
        if (name, extra) in seen or name.startswith(("nvidia-", "cuda-", "triton")):
            continue  # follow from torch's version
        seen.add((name, extra))
        if name != "trm-helpers":
            version = importlib.metadata.version(name).split("+")[0]  # without "+cpu"
            assert pinned.get(name) == version, f"{name} {version}"
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                pending += [(canonicalize_name(needed.name), each)
                            for each in ("", *needed.extras)]
    assert len({name for name, _ in seen}) > 100


def test_all_extras_and_the_build_back_end_are_pinned():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11
    project = tomllib.loads((paths.repo_root() / "pyproject.toml").read_text())
    pinned = pins()
    lines = sum(project["project"]["optional-dependencies"].values(),
                project["build-system"]["requires"])
    names = {canonicalize_name(Requirement(line).name) for line in lines} - {"trm-helpers"}
    assert {"setuptools", "sentence-transformers", "dask"} <= names <= pinned.keys()


def test_every_mark_is_on_a_test():
    """pytest ignores one on a helper or a fixture: what it was meant for goes unmarked."""
    marked = 0
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", ())]
            if any(each.startswith("pytest.mark.") for each in decorators):
                marked += 1
                assert node.name.lower().startswith("test"), f"{path.name}: {node.name}"
    assert marked > 100


def test_make_skips_a_python_of_which_there_is_only_a_shim(tmp_path):
    """As pyenv leaves them for versions that are not active."""
    (tmp_path / "python3.12").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "python3.12").chmod(0o755)
    make = ["make", "--no-print-directory", "test-pythons", "PYTHONS=3.12"]  # also below a make
    done = subprocess.run(make, cwd=paths.repo_root(),
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no python3.12: skipped\n"), done.stderr
