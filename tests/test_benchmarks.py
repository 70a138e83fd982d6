"""The scripts in benchmarks/, each at a tiny size, in a process of its own."""

import os
import subprocess
import sys
import tarfile

import pytest

from trm_helpers.paths import repo_root

FOLDER = repo_root() / "benchmarks"


def run(*arguments, **variables) -> str:
    """What a Python process prints; its messages are shown when it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(repo_root()), **variables})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- the simulator, packed ------------------------------------------------------------------------
PACK = """
import runpy, sys
from trm_helpers import schema
schema.SUITES = {"libero_object": 1}  # one task
script, out = sys.argv[1:]
names = runpy.run_path(script)
names["main"].__globals__["install_wheels"] = lambda *_: None  # no index is asked
sys.argv = [script, "--suites", "libero_object", "--out", out]
names["main"]()
"""


@pytest.mark.sim
def test_an_episode_is_played_from_what_is_packed(tmp_path):
    run("-c", PACK, FOLDER / "suite" / "pack.py", tmp_path / "pack")
    parts = sorted((tmp_path / "pack").glob("part-*.tar.xz"))
    assert parts
    bare = tmp_path / "bare"
    for part in parts:
        with tarfile.open(part) as archive:
            archive.extractall(bare, filter="data")
    assert run("-c", "import robosuite, trm_helpers; "
               "print(robosuite.__file__, trm_helpers.__file__, sep='\\n')",
               PYTHONPATH=str(bare)).splitlines()[-2:] == [
        str(bare / name / "__init__.py") for name in ("robosuite", "trm_helpers")]
    told = run("-m", "trm_helpers", "evaluate", "expert", "--suite", "libero_object",
               "--task-ids", 0, "--num-episodes", 1, "--num-videos", 0, "--horizon", 3,
               PYTHONPATH=str(bare))
    assert "0 of 1 episodes" in told
