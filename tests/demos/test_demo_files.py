import errno
import fcntl
import re
import shutil

import h5py
import numpy as np
import pytest
from demo_files import LONG, SCRIPTED, data_set, fingers, grey_at, small

from trm_helpers.data.dataset import LIBERODataset
from trm_helpers.demos import collect, demo_files
from trm_helpers.demos.alignment import measure_alignment, resolve_alignment
from trm_helpers.demos.demo_files import (
    DemoFileError,
    check_demo_file,
    instruction_of,
    source_of,
)
from trm_helpers.demos.explore import explore_libero_dataset
from trm_helpers.demos.find_demos import other_task
from trm_helpers.demos.quality import frame_size, quality_card
from trm_helpers.sim.env import Task


def changed(name, index, value):
    """An override that sets one entry of the last demonstration's data set."""
    def change(values, demo):
        values = values.copy()
        if demo == 1:
            values[index] = value
        return values
    return {name: change}


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
        ({"actions": lambda a, demo: a[0, 0]}, r"demo_0, actions: has shape \(\) and no steps"),
        ({"ee_pos": lambda a, demo: a[:-1]}, r"obs/ee_pos: .*\(4, 3\); expected \(5, 3\)"),
        ({"agentview_rgb": lambda a, demo: a / 255.0}, "agentview_rgb: has type float64; .*int8"),
        ({"agentview_rgb": lambda a, demo: a[..., 0]}, r"rgb: .*expected \(5, any, any, 3\)"),
        ({"actions": lambda a, demo: a.astype(int)}, "actions: has type int64; .*floating"),
        ({"states": lambda a, demo: a[:2]}, r"states: has shape \(2, 110\); expected 5 steps"),
        (changed("actions", (4, 2), np.nan), "demo_1, actions: NaN or infinite at 1 of 7 .*step 4"),
        (changed("ee_ori", (6, 0), np.inf), "demo_1, obs/ee_ori: NaN or infinite .*step 6"),
        (changed("actions", (0, 0), -1.5), "demo_1, actions: values from -1.5 to 1; .*-1, 1"),
        (changed("ee_pos", (6, 0), 1e39), "demo_1, obs/ee_pos: NaN or infinite"),  # in float32
        ({"agentview_rgb": lambda a, demo: a[:, :0]}, r"rgb: has shape \(5, 0, 4, 3\)"),
        ({"states": lambda a, demo: np.full(a.shape, b"x")}, "states: has type .S1"),
        (changed("states", (3, 9), np.nan), "demo_1, states: NaN or infinite at 1 of 7 .*step 3"),
        ({"lengths": (5, 0)}, r"demo_1, actions: has shape \(0, 7\) and no steps"),
        ({"lengths": ()}, r"no demonstrations; expected groups demo_0, .*found nothing"),
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
    with pytest.raises(DemoFileError, match=r"no group 'data'; found weights \(no group\)"):
        check_demo_file(tmp_path / "other_demo.hdf5")


def rewritten(path, change):
    with h5py.File(path, "a") as file:
        change(file)
    return path


def replace(name, value=None):
    """Put a group, or this value, in the place of an object."""
    def change(file):
        del file[name]
        if value is None:
            file.create_group(name)
        else:
            file[name] = value
    return change


@pytest.mark.parametrize(("change", "message"), [
    (replace("data/demo_0/actions"), "demo_0: missing actions; found"),
    (replace("data/demo_1/obs/agentview_rgb"), "demo_1: missing obs/agentview_rgb"),
    (replace("data/demo_1/obs", [1.0]), "demo_1: missing obs/joint_states, .*found"),
    (replace("data/demo_1/states"), "demo_1, states: is a group, not a data set"),
    (replace("data/demo_1", [1.0]), "demo_1: not a group"),
    (replace("data", [1.0]), r"no group 'data'; found data \(no group\)"),
    (lambda file: file.move("data", "demos"), r"no group 'data'; found demos"),
    (lambda file: [file["data"].move(f"demo_{i}", f"trial {'ab'[i]}") for i in (0, 1)],
     r"expected groups demo_0.*found \['trial a', 'trial b'\]"),
    (replace("data/demo_0/obs/ee_ori", h5py.SoftLink("/data/nothing")),
     "obs/ee_ori: a link to /data/nothing, which does not exist"),
    (lambda file: file["data/demo_1"].create_group("executed_actions"),
     "demo_1, executed_actions: is a group, not a data set; expected 7 steps"),
    (lambda file: file["data/demo_1"].create_dataset("executed_actions", data=np.zeros((7, 6))),
     r"demo_1, executed_actions: has shape \(7, 6\); expected \(7, 7\)"),
])
def test_odd_files_are_named_with_the_cause(tmp_path, change, message):
    path = rewritten(small(tmp_path / "soup_demo.hdf5"), change)
    for read in (check_demo_file, explore_libero_dataset, LIBERODataset):
        with pytest.raises(DemoFileError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("change", [
    lambda file: file.move("data", "demos"), replace("data", [1.0])])
def test_every_reader_names_a_file_without_demonstrations(tmp_path, change):
    path = rewritten(small(tmp_path / "soup_demo.hdf5"), change)
    task = Task("libero_object", 0, "soup", "pick up the soup", "soup.bddl")
    for read in (instruction_of, resolve_alignment, lambda path: other_task(path, task)):
        with pytest.raises(DemoFileError, match=f"{path}: no group 'data'; found d"):
            read(path)


def test_a_file_that_is_being_written_is_said_to_be(tmp_path):
    path = small(tmp_path / "soup_demo.hdf5")
    with open(path) as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        with pytest.raises(DemoFileError, match="soup_demo.hdf5: locked, it is being written"):
            check_demo_file(path)
    check_demo_file(path)
    killed = tmp_path / "milk_demo.hdf5"  # as a writer that was killed leaves it
    with h5py.File(tmp_path / "open.hdf5", "w", libver="latest") as file:
        file.flush()
        shutil.copy(tmp_path / "open.hdf5", killed)
    with pytest.raises(DemoFileError, match="milk_demo.hdf5: locked, .*h5clear"):
        source_of(killed)


def test_damaged_contents_are_named_and_other_errors_pass(tmp_path):
    path = small(tmp_path / "soup_demo.hdf5")
    with h5py.File(path) as file:
        address = h5py.h5o.get_info(file["data/demo_1/obs"].id).addr
    with open(path, "r+b") as file:
        file.seek(address)
        file.write(bytes(64))
    with pytest.raises(DemoFileError, match="soup_demo.hdf5: damaged"):
        check_demo_file(path)
    with pytest.raises(OSError, match="disk full") as error, \
            demo_files.open_demo_file(small(tmp_path / "milk_demo.hdf5")):
        raise OSError(errno.ENOSPC, "disk full")
    assert not isinstance(error.value, DemoFileError)


@pytest.mark.parametrize("as_written", [str, str.encode, np.bytes_, lambda text: [text.encode()]])
def test_attributes_are_read_as_text_and_as_bytes(tmp_path, as_written):
    path = small(tmp_path / "a_demo.hdf5", LONG, "raw", collection=SCRIPTED)
    with h5py.File(path, "a") as file:
        attributes = file["data"].attrs
        for name in ("alignment", "problem_info", "collection"):
            attributes[name] = as_written(attributes[name])
    assert resolve_alignment(path) == "raw"
    found = explore_libero_dataset(path)
    assert found["language_instruction"] == "pick up the soup" and found["collection"] == SCRIPTED


@pytest.mark.parametrize(("name", "value", "message"), [
    ("alignment", 3, "attribute alignment=.*3.*expected text"),
    ("problem_info", "{pick", "attribute problem_info='{pick'; expected a JSON object"),
    ("problem_info", "[1]", "attribute problem_info=.*expected a JSON object"),
    ("problem_info", '{"language_instruction": 3}', "language_instruction 3 .*expected text"),
])
def test_odd_attributes_are_named(tmp_path, name, value, message):
    path = small(tmp_path / "a_demo.hdf5")
    with h5py.File(path, "a") as file:
        file["data"].attrs[name] = value
    with pytest.raises(DemoFileError, match=f"a_demo.hdf5: .*{message}"):
        LIBERODataset(path)


# --- data kept elsewhere -------------------------------------------------------------------------
FRAMES = "data/demo_1/obs/agentview_rgb"


def external_storage(path):
    """Frames that are the bytes of any other file."""
    secret = path.parent.parent / "secret"
    secret.write_bytes(bytes(7 * 4 * 4 * 3))

    def change(file):
        del file[FRAMES]
        file.create_dataset(FRAMES, (7, 4, 4, 3), "u1", external=[(str(secret), 0, 336)])
    rewritten(path, change)


def linked(name):
    def make(path):
        small(path.parent.parent / "other.hdf5")
        target = name.format(folder=path.parent.parent)
        rewritten(path, replace("data/demo_1", h5py.ExternalLink(target, "data/demo_1")))
    return make


def link_to_a_link(path):
    """A neighbour, which leads out of the folder itself."""
    neighbour = small(path.parent / "next.hdf5")
    linked("../other.hdf5")(neighbour)
    rewritten(path, replace("data/demo_1", h5py.ExternalLink("next.hdf5", "data/demo_1")))


def link_to_external_storage(path):
    external_storage(small(path.parent / "next.hdf5"))
    rewritten(path, replace("data/demo_1", h5py.ExternalLink("next.hdf5", "data/demo_1")))


def symbolic_link(path):
    small(path.parent.parent / "other.hdf5")
    (path.parent / "next.hdf5").symlink_to("../other.hdf5")
    rewritten(path, replace("data/demo_1", h5py.ExternalLink("next.hdf5", "data/demo_1")))


def virtual(path):
    """Frames of a virtual data set over the same file's, in the same folder."""
    layout = h5py.VirtualLayout((7, 4, 4, 3), "u1")
    layout[:] = h5py.VirtualSource(small(path.parent / "next.hdf5"), FRAMES, (7, 4, 4, 3))

    def change(file):
        del file[FRAMES]
        file.create_virtual_dataset(FRAMES, layout)
    rewritten(path, change)


def link_to_a_virtual_data_set(path):
    virtual(small(path.parent / "between.hdf5"))
    rewritten(path, replace("data/demo_1", h5py.ExternalLink("between.hdf5", "data/demo_1")))


@pytest.mark.parametrize(("make", "message"), [
    (external_storage, "external storage .*secret"),
    (linked("{folder}/other.hdf5"), "demo_1: links to .*other.hdf5; expected a file in the same"),
    (linked("../other.hdf5"), "demo_1: links to .*other.hdf5; expected a file in the same"),
    (linked("missing.hdf5"), "demo_1: a link to data/demo_1, which does not exist"),
    (link_to_a_link, "demo_1: links to .*other.hdf5; expected a file in the same"),
    (link_to_external_storage, "external storage .*secret"),
    (symbolic_link, "demo_1: links to .*other.hdf5"),
    (virtual, "agentview_rgb: kept in the sources of a virtual data set; expected"),
    (link_to_a_virtual_data_set, "agentview_rgb: kept in the sources of a virtual data set"),
])
def test_data_kept_elsewhere_are_refused_by_every_reader(tmp_path, make, message):
    path = small(tmp_path / "folder" / "soup_demo.hdf5", collection=SCRIPTED)
    make(path)
    readers = [check_demo_file, source_of, explore_libero_dataset, measure_alignment, frame_size,
               LIBERODataset, lambda path: data_set(path, storage="mmap"), collect._of_file]
    for read in readers:
        with pytest.raises(DemoFileError, match=message):
            read(path)
    [row] = quality_card(path)
    assert row["verdict"] == "bad" and re.search(message, row["found"])


@pytest.mark.parametrize(("collection", "attempt", "problem"), [
    ({}, 0, "failed_attempts=None in attribute collection; expected a list"),
    ({"failed_attempts": ["1"]}, 0, "failed_attempts=.'1'. in attribute collection"),
    ({"failed_attempts": []}, None, "demo_0: attribute attempt=None; expected a number"),
    ({"failed_attempts": []}, "x", "demo_0: attribute attempt='x'; expected a number")])
def test_a_file_that_cannot_be_extended_says_what_is_missing(tmp_path, collection, attempt,
                                                             problem):
    path = small(tmp_path / "soup_demo.hdf5", collection=collection)
    if attempt is not None:
        with h5py.File(path, "r+") as file:
            for demo in file["data"].values():
                demo.attrs["attempt"] = attempt
    with pytest.raises(DemoFileError, match=f"{path}.*{problem}"):
        collect._of_file(path)


def test_a_relative_link_does_not_lead_into_the_working_folder(tmp_path, monkeypatch):
    path = small(tmp_path / "folder" / "soup_demo.hdf5")
    small(tmp_path / "other.hdf5")
    rewritten(path, replace("data/demo_1", h5py.ExternalLink("other.hdf5", "data/demo_1")))
    monkeypatch.chdir(tmp_path)  # where HDF5 looks last
    with pytest.raises(DemoFileError, match="links to .*other.hdf5; expected a file in the same"):
        check_demo_file(path)


def test_links_in_circles_end(tmp_path):
    def change(file):
        file["data/demo_1/obs/all"] = file["data"]
        file["round"] = h5py.SoftLink("/data/demo_1/obs")
    check_demo_file(rewritten(small(tmp_path / "soup_demo.hdf5"), change))


# --- gripper -------------------------------------------------------------------------------------
def gripper(function):
    def change(values, demo):
        return np.hstack([values[:, :6], function(values[:, 6:])])
    return change


@pytest.mark.parametrize(("function", "message"), [
    (lambda g: (g + 1) / 2, "column 6.* are 0, 1; expected -1 .open. and 1 .closed."),
    (lambda g: (1 - g) / 2, "are 0, 1; expected"),
    (lambda g: 0.9 * g, "are -0.9, 0.9; expected"),
    (lambda g: 0 * g, "are 0; expected"),
    (lambda g: g * np.linspace(0.1, 1, len(g))[:, None], r"are -0.*, \.\.\.; expected"),
    (lambda g: -g, "contradict the fingers, which in all move against them in 2 of 2 steps"),
    (lambda g: 0 * g - 1, "contradict the fingers, which in all move against them in 2 of 2"),
])
def test_gripper_commands_that_mean_something_else_are_not_trained_on(tmp_path, function, message):
    path = small(tmp_path / "soup_demo.hdf5", (12, 14), actions=gripper(function),
                 gripper_states=fingers)
    with pytest.raises(DemoFileError, match=f"soup_demo.hdf5: gripper commands .*{message}"):
        LIBERODataset(path)
    rows = {row["check"]: row["verdict"] for row in quality_card(path)}
    assert "bad" in (rows["gripper sign"], rows["gripper switches"])


def test_one_demonstration_with_the_opposite_sign_is_found(tmp_path):
    def closing(values, demo):  # from the command at step 3 on, over five steps
        width = 0.04 - 0.004 * np.clip(np.arange(len(values)) - 4, 0, 5)
        return np.stack([width, -width], axis=1)

    def inverted_in(number):
        return lambda values, demo: values * ([1] * 6 + [-1 if demo == number else 1])

    settings = dict(lengths=(12,) * 5, gripper_states=closing)
    sound = small(tmp_path / "a_demo.hdf5", **settings)
    assert len(LIBERODataset(sound)) == 60
    path = small(tmp_path / "b_demo.hdf5", actions=inverted_in(3), **settings)
    with pytest.raises(DemoFileError, match="in demo_3 move against them in 5 of 5 steps"):
        LIBERODataset(path)


@pytest.mark.parametrize(("against", "card", "trained"), [
    (0, "good", True), (1, "good", True), (2, "bad", True), (5, "bad", True), (6, "bad", False)])
def test_fingers_that_slip_now_and_then_are_not_taken_for_another_sign(
        tmp_path, against, card, trained):
    """Ten steps in which the fingers move while they are told to close; in some they open."""
    def slipping(values, demo):
        moves = np.zeros(len(values))
        moves[5:15] = -0.002
        moves[5:5 + against] = 0.002
        width = 0.04 + np.cumsum(moves)
        return np.stack([width, -width], axis=1)

    path = small(tmp_path / "soup_demo.hdf5", (20,), gripper_states=slipping)
    rows = {row["check"]: row for row in quality_card(path)}
    assert f"in {against} of 10 steps" in rows["gripper sign"]["found"]
    assert rows["gripper sign"]["verdict"] == card
    if trained:
        demo_files.check_gripper(path)
    else:
        with pytest.raises(DemoFileError, match="in demo_0 move against them in 6 of 10 steps"):
            demo_files.check_gripper(path)


def test_a_gripper_command_that_never_changes_is_said(tmp_path, capsys):
    still = small(tmp_path / "a_demo.hdf5", actions=gripper(lambda g: 0 * g + 1))
    assert len(LIBERODataset(still)) == 12
    assert "a_demo.hdf5: gripper commands (actions, column 6) are always 1" in \
        capsys.readouterr().out
    sound = small(tmp_path / "b_demo.hdf5", (12, 14), gripper_states=fingers)
    assert len(LIBERODataset(sound)) == 26
    assert "gripper" not in capsys.readouterr().out


# --- names ---------------------------------------------------------------------------------------
def test_demonstrations_are_ordered_by_number(tmp_path):
    path = small(tmp_path / "a_demo.hdf5", (1,) * 12)
    with demo_files.open_demo_file(path) as file:
        assert demo_files.demo_names(file) == [f"demo_{i}" for i in range(12)]


@pytest.mark.parametrize("names", [
    ["demo_1", "demo_2", "demo_5", "demo_10"], ["0", "1", "2", "10"],
    ["demo_007", "demo_8", "demo_0010", "demo_11"], ["a_9", "a_10", "b_1", "b_2"],
    ["demo_1", "demo_2", "demo_" + 5000 * "9", "\u0663_1"],
])
def test_every_reader_takes_the_demonstrations_there_are_in_natural_order(tmp_path, names):
    def rename(file):
        for number in (3, 2, 1, 0):
            file["data"].move(f"demo_{number}", f"x{number}")
        for number, name in enumerate(names):
            file["data"].move(f"x{number}", name)
        file["data"].create_group("mask")  # no demonstration

    path = rewritten(small(tmp_path / "soup_demo.hdf5", (5, 6, 7, 8)), rename)
    with demo_files.open_demo_file(path) as file:
        assert demo_files.demo_names(file) == names
    check_demo_file(path)
    found = explore_libero_dataset(path)
    assert (found["num_demos"], found["action_shape"]) == (4, (5, 7))
    assert found["frames"]["agentview_rgb"][0, 0, 0, 0] == grey_at(0)
    for storage in ("ram", "mmap"):
        data = data_set(path, image_size=4, storage=storage)
        assert data.describe()["files"][0]["demos"] == names
        greys = (data.batch([0, 5])["observations"]["agentview_rgb"][:, 0, 0, 0, 0] * 255).round()
        assert greys.tolist() == [grey_at(0), grey_at(0, 1)]
    first = LIBERODataset(path, max_demos_per_task=1).describe()["files"][0]
    assert (first["demos"], first["steps"]) == (names[:1], 5)
    assert {row["check"]: row for row in quality_card(path)}["length"]["found"].startswith("5 to 8")
    assert frame_size(path) == 4
