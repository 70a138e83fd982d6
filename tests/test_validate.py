import json

import h5py
import numpy as np
import pytest
from demo_files import action_at, grey_at, joints_at, position_at, write_demo_file

from trm_helpers import paths, schema, validate
from trm_helpers.validate import (
    DemoFileError,
    check_demo_file,
    explore_libero_dataset,
    find_demonstrations,
    human_demonstrations,
    measure_alignment,
    resolve_alignment,
    source_of,
)

SCRIPTED = {"expert": "pick and place"}


def small(path, lengths=(5, 7), alignment="raw", **settings):
    return write_demo_file(path, lengths, alignment, image_size=4, **settings)


def changed(name, index, value):
    """An override that sets one entry of the last demonstration's data set."""
    def change(values, demo):
        values = values.copy()
        if demo == 1:
            values[index] = value
        return values
    return {name: change}


# --- finding -------------------------------------------------------------------------------------
def test_find_is_recursive_and_names_tasks(tmp_path):
    a = small(tmp_path / "x" / "libero_object" / "soup_demo.hdf5")
    b = small(tmp_path / "milk_demo.hdf5")
    (tmp_path / "notes.hdf5").touch()
    assert find_demonstrations(tmp_path) == {"soup": a, "milk": b}
    assert find_demonstrations(str(tmp_path), task_names=["milk"]) == {"milk": b}


def test_the_first_folder_wins(tmp_path):
    first = small(tmp_path / "one" / "soup_demo.hdf5")
    second = small(tmp_path / "two" / "soup_demo.hdf5")
    folders = [tmp_path / "missing", tmp_path / "two", tmp_path / "one"]
    assert find_demonstrations(folders) == {"soup": second}
    assert find_demonstrations(reversed(folders)) == {"soup": first}


def test_suite_is_told_by_folder_or_by_the_file(tmp_path):
    by_file = small(tmp_path / "soup_demo.hdf5")  # its bddl file lies in libero_object
    by_folder = small(tmp_path / "libero_goal" / "drawer_demo.hdf5")
    with h5py.File(by_folder, "a") as file:
        del file["data"].attrs["bddl_file_name"]
    assert find_demonstrations(tmp_path, "libero_object") == {"soup": by_file}
    assert find_demonstrations(tmp_path, "libero_goal") == {"drawer": by_folder}
    with pytest.raises(ValueError, match="unknown suite 'libero_9'"):
        find_demonstrations(tmp_path, "libero_9")


def test_source_is_told_by_the_collection_attribute(tmp_path):
    scripted = small(tmp_path / "a" / "soup_demo.hdf5", collection=SCRIPTED)
    human = small(tmp_path / "b" / "soup_demo.hdf5", alignment=None)
    assert (source_of(scripted), source_of(human)) == ("scripted", "human")
    assert find_demonstrations(tmp_path, source="human") == {"soup": human}
    assert find_demonstrations(tmp_path, source="scripted") == {"soup": scripted}


def test_find_says_where_it_looked(tmp_path):
    small(tmp_path / "soup_demo.hdf5")
    with pytest.raises(FileNotFoundError) as error:
        find_demonstrations([tmp_path, tmp_path / "nowhere"], task_names=["soup", "milk"])
    assert "for milk;" in str(error.value) and "soup," not in str(error.value)
    assert f"{tmp_path}, {tmp_path / 'nowhere'} (no such folder)" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no human demonstrations of libero_goal for any"):
        find_demonstrations(tmp_path, "libero_goal", source="human")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A data folder and Kaggle's input folder of this test's own."""
    monkeypatch.setenv("TRM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(paths, "KAGGLE_INPUT", tmp_path / "kaggle")
    return tmp_path


def test_human_demonstrations_attached_on_kaggle(folders):
    small(folders / "mine" / "soup_demo.hdf5", collection=SCRIPTED)
    attached = small(folders / "kaggle" / "datasets" / "me" / "x" / "soup_demo.hdf5",
                     alignment=None)
    found = human_demonstrations("libero_object", ["soup"], [folders / "mine"], download=False)
    assert found == {"soup": attached}


def test_human_demonstrations_are_downloaded_by_name(folders, monkeypatch):
    calls = []

    def snapshot_download(repository, repo_type, allow_patterns, local_dir):
        calls.append((repository, repo_type, allow_patterns))
        small(local_dir / allow_patterns[0], alignment=None)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = human_demonstrations("libero_goal", ["drawer"], [], download=True)
    expected = folders / "data" / "human" / "libero_goal" / "drawer_demo.hdf5"
    assert found == {"drawer": expected}
    assert calls == [("yifengzhu-hf/LIBERO-datasets", "dataset",
                      ["libero_goal/drawer_demo.hdf5"])]
    assert human_demonstrations("libero_goal", ["drawer"], [], download=True) == found
    assert len(calls) == 1  # the second time it is there


def test_human_demonstrations_without_them(folders, monkeypatch):
    with pytest.raises(FileNotFoundError, match="Attach a data set.*scripted demonstrations"):
        human_demonstrations("libero_goal", ["drawer"], [], download=False)

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="could not download libero_goal/drawer.*no route"):
        human_demonstrations("libero_goal", ["drawer"], [], download=True)


# --- checking ------------------------------------------------------------------------------------
def test_a_whole_file_passes(tmp_path):
    assert check_demo_file(small(tmp_path / "soup_demo.hdf5")) is None
    assert check_demo_file(small(tmp_path / "x_demo.hdf5", states=None, rewards=None)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ee_pos": None, "eye_in_hand_rgb": None},
         "demo_0: missing obs/ee_pos, obs/eye_in_hand_rgb; found .*actions"),
        ({"actions": lambda a, demo: a[:, :6]}, r"demo_0, actions: .*\(5, 6\); expected \(5, 7\)"),
        ({"actions": lambda a, demo: a[0, 0]}, r"demo_0, actions: has shape \(\)"),
        ({"ee_pos": lambda a, demo: a[:-1]}, r"obs/ee_pos: .*\(4, 3\); expected \(5, 3\)"),
        ({"agentview_rgb": lambda a, demo: a / 255.0}, "agentview_rgb: has type float64; .*int8"),
        ({"agentview_rgb": lambda a, demo: a[..., 0]}, r"rgb: .*expected \(5, any, any, 3\)"),
        ({"actions": lambda a, demo: a.astype(int)}, "actions: has type int64; .*floating"),
        ({"states": lambda a, demo: a[:2]}, r"states: has shape \(2, 110\); expected 5 steps"),
        (changed("actions", (4, 2), np.nan), "demo_1, actions: NaN or infinite at 1 of 7 .*step 4"),
        (changed("ee_ori", (6, 0), np.inf), "demo_1, obs/ee_ori: NaN or infinite .*step 6"),
        (changed("actions", (0, 0), -1.5), "demo_1, actions: values from -1.5 to 1; .*-1, 1"),
        ({"lengths": (5, 0)}, "demo_1: has no steps"),
        ({"lengths": ()}, "no demonstrations"),
    ],
)
def test_check_names_what_is_wrong(tmp_path, settings, message):
    path = small(tmp_path / "soup_demo.hdf5", **settings)
    with pytest.raises(DemoFileError, match=message) as error:
        check_demo_file(path)
    assert str(path) in str(error.value)


def test_check_refuses_what_is_no_demonstration_file(tmp_path):
    with pytest.raises(DemoFileError, match="nothing_demo.hdf5: not found"):
        check_demo_file(tmp_path / "nothing_demo.hdf5")
    text = tmp_path / "text_demo.hdf5"
    text.write_text("not HDF5")
    with pytest.raises(DemoFileError, match="text_demo.hdf5: truncated, or not an HDF5 file"):
        check_demo_file(text)
    whole = small(tmp_path / "cut_demo.hdf5").read_bytes()
    (tmp_path / "cut_demo.hdf5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DemoFileError, match="cut_demo.hdf5: truncated"):
        check_demo_file(tmp_path / "cut_demo.hdf5")
    with h5py.File(tmp_path / "other_demo.hdf5", "w") as file:
        file["weights"] = [1.0]
    with pytest.raises(DemoFileError, match=r"no group 'data'; found \['weights'\]"):
        check_demo_file(tmp_path / "other_demo.hdf5")


# --- alignment -----------------------------------------------------------------------------------
LONG = (40, 40)


@pytest.mark.parametrize(("alignment", "fraction"), [("raw", -0.1), ("shift", 0.9)])
def test_alignment_is_located_on_the_joints_path(tmp_path, alignment, fraction):
    path = small(tmp_path / "soup_demo.hdf5", LONG, alignment)
    name, evidence = measure_alignment(path)
    assert name == alignment and evidence["method"] == "joints"
    assert evidence["fraction"] == pytest.approx(fraction, abs=0.01)  # the path is curved
    assert evidence["residual"] < 1e-3


def test_observations_drawn_again_from_the_states_are_raw(tmp_path):
    def regenerate(values, demo):
        return np.array([joints_at(t) for t in range(len(values))])

    path = small(tmp_path / "soup_demo.hdf5", LONG, None, joint_states=regenerate)
    name, evidence = measure_alignment(path)
    assert (name, evidence["fraction"], evidence["residual"]) == ("raw", 0.0, 0.0)


@pytest.mark.parametrize(("alignment", "delay"), [("raw", 1.1), ("shift", 0.1)])
def test_without_states_the_delay_decides(tmp_path, alignment, delay):
    """The hand follows one step late; a tenth of a step more is when the observation is drawn."""
    path = small(tmp_path / "soup_demo.hdf5", LONG, alignment, states=None)
    name, evidence = measure_alignment(path)
    assert name == alignment and evidence["method"] == "delay"
    assert evidence["fraction"] is None
    assert evidence["delay"] == pytest.approx(delay, abs=0.1)


def test_a_delay_between_the_two_tells_nothing(tmp_path):
    def between(values, demo):
        return np.array([position_at(t + 0.45, demo) for t in range(len(values))])

    path = small(tmp_path / "soup_demo.hdf5", LONG, None, states=None, ee_pos=between)
    name, evidence = measure_alignment(path)
    assert name == "unknown" and evidence["delay"] == pytest.approx(0.65, abs=0.15)


def test_joints_off_the_path_are_no_evidence(tmp_path):
    def noise(values, demo):
        return values + np.random.default_rng(demo).normal(0, 0.3, values.shape)

    path = small(tmp_path / "soup_demo.hdf5", LONG, "raw", joint_states=noise)
    name, evidence = measure_alignment(path)
    assert abs(evidence["fraction"]) < 1 and evidence["residual"] > validate.MAX_RESIDUAL
    assert (name, evidence["method"]) == ("raw", "delay")


def still(values, demo):
    return np.zeros_like(values)


def test_a_still_arm_tells_nothing(tmp_path):
    path = small(tmp_path / "soup_demo.hdf5", LONG, None, states=still, ee_pos=still)
    name, evidence = measure_alignment(path)
    assert name == "unknown" and evidence["delay"] is None
    with pytest.raises(DemoFileError, match="can not be measured.*set alignment to raw or shift"):
        resolve_alignment(path)
    assert resolve_alignment(path, "shift") == "shift"


def test_resolve_takes_attribute_then_measurement(tmp_path):
    raw = small(tmp_path / "raw_demo.hdf5", LONG, "raw")
    human = small(tmp_path / "human_demo.hdf5", LONG, None)
    quiet = small(tmp_path / "quiet_demo.hdf5", LONG, "raw", states=None, ee_pos=still)
    assert resolve_alignment(raw) == resolve_alignment(raw, "raw") == "raw"
    assert resolve_alignment(human) == resolve_alignment(human, "shift") == "shift"
    assert resolve_alignment(quiet) == "raw"


def test_resolve_refuses_contradictions(tmp_path):
    human = small(tmp_path / "human_demo.hdf5", LONG, None)
    with pytest.raises(DemoFileError, match="'raw' by the setting, 'shift' by the stored joint"):
        resolve_alignment(human, "raw")
    with h5py.File(human, "a") as file:
        file["data"].attrs["alignment"] = "raw"
    with pytest.raises(DemoFileError, match="'raw' by the file's attribute, 'shift' by the stored"):
        resolve_alignment(human)
    with h5py.File(human, "a") as file:
        file["data"].attrs["alignment"] = "late"
    with pytest.raises(DemoFileError, match="attribute alignment='late'"):
        resolve_alignment(human)
    with pytest.raises(ValueError, match="alignment='regenerate' is not valid"):
        resolve_alignment(human, "regenerate")


# --- exploring -----------------------------------------------------------------------------------
def test_explore_reports_what_was_written(tmp_path):
    a = small(tmp_path / "a_demo.hdf5", (5, 7), "raw", collection=SCRIPTED)
    b = small(tmp_path / "b_demo.hdf5", (6,), "raw", collection=SCRIPTED)
    found = explore_libero_dataset(tmp_path)
    assert found["files"] == [str(a), str(b)] and found["file"] == str(a)
    assert (found["source"], found["collection"]) == ("scripted", SCRIPTED)
    assert found["language_instruction"] == "pick up the soup"
    assert found["image_shapes"] == {camera: (5, 4, 4, 3) for camera in schema.CAMERAS}
    assert found["action_shape"] == (5, 7)
    assert found["structure"]["obs/agentview_rgb"] == {"shape": (5, 4, 4, 3), "dtype": "uint8"}
    assert len(found["structure"]) == 12
    assert found["num_demos"] == 3
    assert found["lengths"] == {"min": 5, "max": 7, "mean": 6.0, "total": 18}
    assert found["alignment"]["name"] == "raw"
    grey = [int(frame[0, 0, 0]) for frame in found["frames"]["agentview_rgb"]]
    assert grey == [grey_at(t) for t in (0, 1, 3, 4)]  # equidistant in 0 to 4, rounded
    assert found["frames"]["eye_in_hand_rgb"].shape == (4, 4, 4, 3)
    json.dumps({key: value for key, value in found.items() if key != "frames"})


def test_explore_gives_the_action_statistics(tmp_path):
    found = explore_libero_dataset(small(tmp_path / "a_demo.hdf5", (2, 1)))
    dx, gripper = found["actions"][0], found["actions"][6]
    values = [action_at(0, 0)[0], action_at(1, 0)[0], action_at(0, 1)[0]]
    assert np.allclose(values, [-0.3, 0.0, -0.2])
    assert (dx["name"], dx["meaning"]) == ("dx", schema.ACTION_MEANING[0])
    assert (dx["min"], dx["max"]) == (-0.3, 0.0)
    assert dx["mean"] == pytest.approx(-0.5 / 3)
    assert dx["std"] == pytest.approx((0.14 / 9) ** 0.5)  # mean square .13/3 less (.5/3)^2
    assert (gripper["min"], gripper["max"], gripper["std"]) == (-1.0, -1.0, 0.0)


def test_explore_reads_the_upstream_forms_of_the_instruction(tmp_path):
    path = small(tmp_path / "a_demo.hdf5", LONG, None)
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": list('"open it"')})
    found = explore_libero_dataset(path)
    assert (found["language_instruction"], found["source"]) == ("open it", "human")
    assert found["collection"] is None and found["alignment"]["name"] == "shift"


def test_an_instruction_in_words_keeps_them_apart(tmp_path):
    path = small(tmp_path / "a_demo.hdf5", LONG, None)
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": ["open", "it"]})
    assert validate.instruction_of(path) == "open it"


def test_explore_refuses_nothing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no demonstrations"):
        explore_libero_dataset(tmp_path)
    with pytest.raises(DemoFileError, match="not found"):
        explore_libero_dataset(tmp_path / "a_demo.hdf5")
    small(tmp_path / "a_demo.hdf5", ee_ori=None)
    with pytest.raises(DemoFileError, match="missing obs/ee_ori"):
        explore_libero_dataset(tmp_path)


def test_demonstrations_are_ordered_by_number(tmp_path):
    path = small(tmp_path / "a_demo.hdf5", (1,) * 12)
    with validate.open_demo_file(path) as file:
        assert validate.demo_names(file) == [f"demo_{i}" for i in range(12)]
