import contextlib
import json

import h5py
import pytest
from demo_files import SCRIPTED, small

from trm_helpers import paths
from trm_helpers.demos import find_demos
from trm_helpers.demos.demo_files import DemoFileError, source_of
from trm_helpers.demos.find_demos import (
    find_demonstrations,
    human_demonstrations,
    left_out_text,
    survey_demonstrations,
)
from trm_helpers.sim.env import Task


def found_in(folders, *tasks, **settings):
    return find_demonstrations(folders, *tasks, **settings)[0]


def test_find_is_recursive_and_names_tasks(tmp_path):
    a = small(tmp_path / "x" / "libero_object" / "soup_demo.hdf5")
    b = small(tmp_path / "milk_demo.hdf5")
    (tmp_path / "notes.hdf5").touch()
    assert found_in([tmp_path]) == {"soup": a, "milk": b}
    assert found_in([str(tmp_path)], task_names=["milk"]) == {"milk": b}


def test_the_first_folder_wins(tmp_path):
    first = small(tmp_path / "one" / "soup_demo.hdf5")
    second = small(tmp_path / "two" / "soup_demo.hdf5")
    folders = [tmp_path / "missing", tmp_path / "two", tmp_path / "one"]
    assert found_in(folders) == {"soup": second}
    assert found_in(folders[::-1]) == {"soup": first}


@pytest.mark.parametrize("folder", ["libero_spatial_no_noops", "libero_goal", "anything"])
def test_the_name_of_a_file_decides_and_no_attribute_or_folder(tmp_path, folder):
    path = small(tmp_path / folder / "soup_demo.hdf5", alignment=None)
    with h5py.File(path, "a") as file:
        file["data"].attrs.clear()
    assert found_in([tmp_path], ["soup"], sources=["human"]) == {"soup": path}


def test_links_are_followed_once(tmp_path):
    elsewhere = small(tmp_path / "disk" / "deep" / "soup_demo.hdf5")
    milk = small(tmp_path / "disk" / "milk.hdf5")
    data = tmp_path / "data"
    data.mkdir()
    (data / "attached").symlink_to(elsewhere.parent.parent)
    (elsewhere.parent / "back").symlink_to(data)  # round and round
    (elsewhere.parent / "itself").symlink_to("itself")
    (data / "milk_demo.hdf5").symlink_to(milk)
    found = found_in([data])
    assert found == {"soup": data / "attached" / "deep" / "soup_demo.hdf5",
                     "milk": data / "milk_demo.hdf5"}
    assert source_of(found["milk"]) == "human"


def test_each_file_that_is_left_out_has_its_reason(tmp_path):
    human = small(tmp_path / "b" / "soup_demo.hdf5", alignment=None)
    scripted = small(tmp_path / "a" / "soup_demo.hdf5", collection=SCRIPTED)
    bread = small(tmp_path / "bread_demo.hdf5", collection=SCRIPTED)
    other, named = small(tmp_path / "milk_demo.hdf5"), tmp_path / "soup.hdf5"
    named.touch()
    (tmp_path / "._soup_demo.hdf5").touch()  # macOS writes such files into archives
    tasks = ["soup", "bread"]
    found, left_out = survey_demonstrations([tmp_path], tasks, ["human", "scripted"])
    assert found == {"soup": human, "bread": bread}
    assert left_out == {scripted: f"{human} comes first", other: "another task",
                        named: "not named <task name>_demo.hdf5"}
    found, left_out = survey_demonstrations([tmp_path], tasks, ["scripted"])
    assert found == {"soup": scripted, "bread": bread}
    assert left_out[human] == "human, not scripted"
    with pytest.raises(FileNotFoundError) as error:
        find_demonstrations([tmp_path], tasks, sources=["human"])
    assert f"for bread; looked for *_demo.hdf5 below: {tmp_path}; left out:" in str(error.value)
    assert f"{scripted}, {bread} (scripted, not human)" in str(error.value)


def test_source_is_told_by_the_collection_attribute(tmp_path):
    scripted = small(tmp_path / "a" / "soup_demo.hdf5", collection=SCRIPTED)
    human = small(tmp_path / "b" / "soup_demo.hdf5", alignment=None)
    assert (source_of(scripted), source_of(human)) == ("scripted", "human")
    assert found_in([tmp_path], sources=["human"]) == {"soup": human}
    assert found_in([tmp_path], sources=["scripted"]) == {"soup": scripted}


def test_find_says_where_it_looked(tmp_path):
    small(tmp_path / "soup_demo.hdf5")
    with pytest.raises(FileNotFoundError) as error:
        find_demonstrations([tmp_path, tmp_path / "nowhere"], task_names=["soup", "milk"])
    assert "for milk;" in str(error.value) and "soup," not in str(error.value)
    assert f"{tmp_path}, {tmp_path / 'nowhere'} (no such folder)" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no scripted demonstrations for any task"):
        find_demonstrations([tmp_path], sources=["scripted"])


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A data folder and Kaggle's input folder of this test's own."""
    monkeypatch.setenv("TRM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(paths, "KAGGLE_INPUT", tmp_path / "kaggle")
    return tmp_path


def test_human_demonstrations_attached_on_kaggle(folders):
    small(folders / "data" / "soup_demo.hdf5", collection=SCRIPTED)
    attached = small(folders / "kaggle" / "datasets" / "me" / "x" / "soup_demo.hdf5",
                     alignment=None)
    assert human_demonstrations({"soup": "libero_object"}) == {"soup": attached}


def test_human_demonstrations_are_downloaded_by_name(folders, monkeypatch):
    calls = []

    def snapshot_download(repository, repo_type, revision, allow_patterns, local_dir):
        calls.append((repository, repo_type, len(revision), allow_patterns))
        for pattern in allow_patterns:
            small(local_dir / pattern, alignment=None)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    attached = small(folders / "kaggle" / "bowl_demo.hdf5", alignment=None)
    small(folders / "data" / "stove_demo.hdf5", collection=SCRIPTED)
    tasks = dict.fromkeys(["drawer", "bowl", "stove"], "libero_goal")
    found = human_demonstrations(tasks)
    target = folders / "data" / "human" / "libero_goal"
    assert found == {"drawer": target / "drawer_demo.hdf5", "bowl": attached,
                     "stove": target / "stove_demo.hdf5"}
    assert calls == [("yifengzhu-hf/LIBERO-datasets", "dataset", 40,  # a commit, not a branch
                      ["libero_goal/drawer_demo.hdf5", "libero_goal/stove_demo.hdf5"])]
    assert human_demonstrations(tasks) == found
    assert len(calls) == 1  # the second time it is there


def test_human_demonstrations_without_them(folders, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: None)
    with pytest.raises(FileNotFoundError, match="no human demonstrations for drawer"):
        human_demonstrations({"drawer": "libero_goal"})
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="could not download libero_goal/drawer.*no route"
                                                ".*attach a data set.*scripted demonstrations"):
        human_demonstrations({"drawer": "libero_goal"})


# --- unusable files ------------------------------------------------------------------------------
def truncated(path):
    content = small(path).read_bytes()
    path.write_bytes(content[:len(content) // 2])
    return path


def damaged(path):
    return small(path, ee_pos=None)


@pytest.mark.parametrize(("make", "reason"), [
    (truncated, ": truncated, or not an HDF5 file"), (damaged, ", demo_0: missing obs/ee_pos")])
@pytest.mark.parametrize("sources", [(), ("human",), ("scripted", "human")])
@pytest.mark.parametrize("names", ["ab", "ba"])  # before and after the good file
def test_an_unusable_file_does_not_hide_a_good_one(tmp_path, capsys, make, reason, sources, names):
    bad = make(tmp_path / names[0] / "soup_demo.hdf5") if names == "ab" else None
    good = small(tmp_path / names[1] / "soup_demo.hdf5")
    bad = bad or make(tmp_path / names[0] / "soup_demo.hdf5")
    found, left_out = survey_demonstrations([tmp_path], ["soup"], sources)
    assert found == {"soup": good}
    assert left_out[bad].startswith(f"unusable{reason}")
    printed = capsys.readouterr().out
    assert f"skipped {bad}{reason}" in printed and f"; {good} is used" in printed
    assert f"{bad} (unusable{reason}" in left_out_text(left_out)


def test_an_unusable_file_of_another_task_is_not_opened(tmp_path):
    truncated(tmp_path / "a" / "milk_demo.hdf5")
    good = small(tmp_path / "b" / "soup_demo.hdf5")
    assert found_in([tmp_path], ["soup"], sources=["human"]) == {"soup": good}


def test_a_task_with_only_unusable_files_is_an_error_that_names_them_all(tmp_path):
    first, second = (make(tmp_path / name / "soup_demo.hdf5")
                     for name, make in (("a", truncated), ("b", damaged)))
    with pytest.raises(DemoFileError) as error:
        survey_demonstrations([tmp_path], ["soup"], ["human"])
    assert f"{first}: truncated" in str(error.value)
    assert f"{second}, demo_0: missing obs/ee_pos" in str(error.value)


def test_faults_of_files_from_another_source_do_not_matter(tmp_path, capsys):
    files = [small(tmp_path / name / "soup_demo.hdf5", collection=SCRIPTED, ee_pos=None)
             for name in "ab"]
    found, left_out = survey_demonstrations([tmp_path], ["soup"], ["human"])
    assert (found, left_out) == ({}, dict.fromkeys(files, "scripted, not human"))
    assert capsys.readouterr().out == ""


def test_a_good_file_of_another_source_leaves_the_task_without_one(tmp_path):
    bad = truncated(tmp_path / "a" / "soup_demo.hdf5")
    good = small(tmp_path / "b" / "soup_demo.hdf5", collection=SCRIPTED)
    found, left_out = survey_demonstrations([tmp_path], ["soup"], ["human"])
    assert found == {} and left_out[good] == "scripted, not human"
    with pytest.raises(FileNotFoundError, match=f"{bad} .unusable: truncated"):
        find_demonstrations([tmp_path], ["soup"], sources=["human"])


TASK = Task("libero_object", 0, "soup", "pick up the soup", "soup.bddl")


@pytest.mark.parametrize(("settings", "problem"), [
    ({"suite": "libero_object", "task_id": 0}, ""),
    ({"suite": "libero_object", "task_id": 1}, "libero_object, task 1; expected those of"),
    ({"suite": "libero_goal", "task_id": 0}, "libero_goal, task 0; expected those of")])
def test_a_scripted_file_of_another_task_is_refused(tmp_path, monkeypatch, settings, problem):
    monkeypatch.setattr(find_demos, "written_instruction", lambda _: "pick up the soup")
    path = small(tmp_path / "soup_demo.hdf5", collection={**SCRIPTED, **settings})
    with pytest.raises(DemoFileError, match=problem) if problem else contextlib.nullcontext():
        assert find_demos.other_task(path, TASK) == ""


@pytest.mark.parametrize(("instruction", "said"), [
    ("Pick up the soup.", False), ("take the soup", False), ("", False), ("open the drawer", True)])
def test_a_file_with_the_instruction_of_another_task_is_named(tmp_path, monkeypatch, instruction,
                                                              said):
    monkeypatch.setattr(find_demos, "written_instruction", lambda _: "take the soup")
    path = small(tmp_path / "soup_demo.hdf5")
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": instruction})
    found = find_demos.other_task(path, TASK)
    assert ("'open the drawer', that of libero_object, task 0, is 'pick up the soup'" in found
            if said else found == "")
