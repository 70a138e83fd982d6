"""Names of runs, and folders that mean the same wherever they are read."""

import os
import subprocess
import sys

import pytest

from trm_helpers import paths


@pytest.mark.parametrize("name", ["a", "tiny-2.s_1", "expert-like", "0", "20240101", "A" * 100])
def test_a_run_name_is_a_folder_in_artifacts(name):
    assert paths.run_dir(name) == paths.artifacts_dir() / name
    assert not paths.artifacts_dir().exists()


def test_a_name_of_digits_that_arrives_as_a_number_is_text():
    assert paths.run_dir(20240101) == paths.artifacts_dir() / "20240101"


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "/abs", "a b", "-x", "_x",
                                  ".hidden", "a\n", "a\\b", "ä", "A" * 101, None, True, 1.5, -3,
                                  ["a"], "expert", "random", "no-op", "pretrained",
                                  "notebooks", "expert-libero_spatial",
                                  "no-op-libero_spatial_swap"])
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match="run_name=.* is not valid; expected"):
        paths.run_dir(name)


def test_a_file_is_no_run():
    file = paths.artifacts_dir() / "README.md"
    file.parent.mkdir()
    file.touch()
    with pytest.raises(ValueError, match=rf"run_name='README.md' is not valid; {file} is a file"):
        paths.run_dir("README.md")


@pytest.mark.parametrize(("variable", "folder"), [("TRM_ARTIFACTS_DIR", paths.artifacts_dir),
                                                  ("TRM_DATA_DIR", paths.data_dir)])
def test_folders_from_the_environment(variable, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "here")
    assert folder() == tmp_path / "here"
    monkeypatch.chdir("/")
    assert folder() == tmp_path / "here"  # where it was read first
    child = f"import os; assert os.environ[{variable!r}] == {str(tmp_path / 'here')!r}"
    subprocess.run([sys.executable, "-c", child], check=True)
    monkeypatch.setenv(variable, "~/x")
    assert folder() == tmp_path.__class__(os.path.expanduser("~/x"))
    monkeypatch.setenv(variable, "~nobody-of-this-name/x")  # a folder like any other
    assert folder() == paths.Path.cwd() / "~nobody-of-this-name" / "x"
    monkeypatch.setattr(paths, "on_kaggle", lambda: False)
    unset = []
    for empty in ("", " "):
        monkeypatch.setenv(variable, empty)
        unset.append(folder())
    monkeypatch.delenv(variable)
    assert unset == [folder()] * 2
    assert folder() == paths.repo_root() / folder.__name__.split("_")[0]
