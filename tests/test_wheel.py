"""The package installed from its wheel, used from an empty folder."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from demo_files import write_demo_file

from trm_helpers.paths import repo_root

TASK = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
FOLDERS = ("trm_helpers", "notebooks", "pretrained")
FILES = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE")

USE = f"""
import json, trm_helpers
from trm_helpers.training.runs import find_run, shipped_policies
from trm_helpers.data.language import embed_instruction
from trm_helpers.notebooks import suite_notebooks
from trm_helpers.report import write_report
from trm_helpers.search.figures import stored_example
print(json.dumps({{
    "package": trm_helpers.__file__,
    "public": [getattr(trm_helpers, name) is not None for name in trm_helpers.__all__],
    "embedding": embed_instruction({TASK.replace("_", " ")!r}).tolist(),
    "notebooks": [str(path) for path in suite_notebooks()],
    "parameters": [sum(weight.numel() for weight in trm_helpers.load_policy(name).parameters())
                   for name in shipped_policies()],
    "search": len(stored_example()["trials"]),
    "page": write_report(shipped_policies()[0]).read_text(),
    "copies": [str(find_run(name, to_write=True)) for name in shipped_policies()],
}}))
"""


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the unpacked wheel, which was built from a copy of the sources."""
    scratch = tmp_path_factory.mktemp("wheel")
    source = scratch / "source"
    for name in FOLDERS:
        shutil.copytree(repo_root() / name, source / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copyfile(repo_root() / name, source / name)
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", scratch, source)
    (wheel,) = scratch.glob("*.whl")
    pip("install", "--no-index", "--no-deps", "--target", scratch / "site", wheel)
    return scratch / "site"


@pytest.fixture
def python(installed, tmp_path):
    """A function: Python in an empty folder, where the installed wheel is the only copy."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith("TRM_")}
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(*arguments):
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, text=True,
                              capture_output=True,
                              env={**environment, "PYTHONPATH": str(installed)})

    return run


def test_what_the_package_reads_is_inside(python, installed, tmp_path):
    done = python("-c", USE)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["package"] == str(installed / "trm_helpers" / "__init__.py")
    assert len(told["public"]) > 10 and all(told["public"])
    assert told["search"] == 16
    assert (installed / "trm_helpers" / "visuals" / "recursions.png").is_file()
    assert sum(value**2 for value in told["embedding"]) == pytest.approx(1, abs=1e-5)
    assert [path.rsplit("/", 1)[1][:2] for path in told["notebooks"]] == [
        f"{number:02d}" for number in range(8)]
    assert all(path.startswith(f"{installed}/") for path in told["notebooks"])
    assert len(told["parameters"]) == len(list((repo_root() / "pretrained").glob("*/policy.json")))
    assert min(told["parameters"]) > 500_000
    assert "</html>" in told["page"] and "prefers-color-scheme" in told["page"]
    assert told["copies"] and all(
        path.startswith(f"{tmp_path}/empty/artifacts/") for path in told["copies"])


def test_a_notebook_trains_from_an_empty_folder(python, tmp_path):
    assert "valid:" in python("-m", "trm_helpers", "run", "04_train", "-p", "wrong", "1").stderr
    write_demo_file(tmp_path / "files" / "libero_object" / f"{TASK}_demo.hdf5",
                    (6, 7, 8, 9, 10))
    given = {"preset": "tiny", "run_name": "mine", "suite": "libero_object", "task_ids": "[0]",
             "demos": "human", "demo_dir": tmp_path / "files", "epochs": 1}
    parameters = [word for pair in given.items() for word in ("-p", *pair)]
    done = python("-m", "trm_helpers", "run", "04_train", *parameters)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "empty" / "artifacts" / "mine"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert {"best.safetensors", "policy.json"} < {path.name for path in run.iterdir()}
    assert (run / "notebooks" / "04_train.ipynb").exists()
