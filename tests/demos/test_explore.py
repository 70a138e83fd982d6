import json

import h5py
import numpy as np
import pytest
from demo_files import LONG, SCRIPTED, action_at, grey_at, small

from trm_helpers import schema
from trm_helpers.demos.demo_files import DemoFileError, instruction_of
from trm_helpers.demos.explore import explore_libero_dataset


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
    assert instruction_of(path) == "open it"


def test_explore_refuses_nothing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no demonstrations"):
        explore_libero_dataset(tmp_path)
    with pytest.raises(DemoFileError, match="not found"):
        explore_libero_dataset(tmp_path / "a_demo.hdf5")
    small(tmp_path / "a_demo.hdf5", ee_ori=None)
    with pytest.raises(DemoFileError, match="missing obs/ee_ori"):
        explore_libero_dataset(tmp_path)
