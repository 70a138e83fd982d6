import errno
import fcntl
import json
import re
import shutil

import h5py
import numpy as np
import pytest
from demo_files import action_at, grey_at, joints_at, position_at, write_demo_file

from trm_helpers import paths, schema
from trm_helpers.data.dataset import LIBERODataset
from trm_helpers.demos import collect, demo_files
from trm_helpers.demos.demo_files import (
    DemoFileError,
    check_demo_file,
    explore_libero_dataset,
    find_demonstrations,
    human_demonstrations,
    measure_alignment,
    resolve_alignment,
    source_of,
    survey_demonstrations,
)
from trm_helpers.demos.quality import frame_size, quality_card

SCRIPTED = {"expert": "pick and place"}
LONG = (40, 40)


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


@pytest.mark.parametrize("folder", ["libero_spatial_no_noops", "libero_goal", "anything"])
def test_the_name_of_a_file_decides_and_no_attribute_or_folder(tmp_path, folder):
    path = small(tmp_path / folder / "soup_demo.hdf5", alignment=None)
    with h5py.File(path, "a") as file:
        file["data"].attrs.clear()
    assert find_demonstrations(tmp_path, ["soup"], sources=["human"]) == {"soup": path}


def test_links_are_followed_once(tmp_path):
    elsewhere = small(tmp_path / "disk" / "deep" / "soup_demo.hdf5")
    milk = small(tmp_path / "disk" / "milk.hdf5")
    data = tmp_path / "data"
    data.mkdir()
    (data / "attached").symlink_to(elsewhere.parent.parent)
    (elsewhere.parent / "back").symlink_to(data)  # round and round
    (elsewhere.parent / "itself").symlink_to("itself")
    (data / "milk_demo.hdf5").symlink_to(milk)
    found = find_demonstrations(data)
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
    found, left_out = survey_demonstrations(tmp_path, tasks, ["human", "scripted"])
    assert found == {"soup": human, "bread": bread}
    assert left_out == {scripted: f"{human} comes first", other: "another task",
                        named: "not named <task name>_demo.hdf5"}
    found, left_out = survey_demonstrations(tmp_path, tasks, ["scripted"])
    assert found == {"soup": scripted, "bread": bread}
    assert left_out[human] == "human, not scripted"
    with pytest.raises(FileNotFoundError) as error:
        find_demonstrations(tmp_path, tasks, sources=["human"])
    assert f"for bread; looked for *_demo.hdf5 below: {tmp_path}; left out:" in str(error.value)
    assert f"{scripted}, {bread} (scripted, not human)" in str(error.value)


def test_source_is_told_by_the_collection_attribute(tmp_path):
    scripted = small(tmp_path / "a" / "soup_demo.hdf5", collection=SCRIPTED)
    human = small(tmp_path / "b" / "soup_demo.hdf5", alignment=None)
    assert (source_of(scripted), source_of(human)) == ("scripted", "human")
    assert find_demonstrations(tmp_path, sources=["human"]) == {"soup": human}
    assert find_demonstrations(tmp_path, sources=["scripted"]) == {"soup": scripted}


def test_find_says_where_it_looked(tmp_path):
    small(tmp_path / "soup_demo.hdf5")
    with pytest.raises(FileNotFoundError) as error:
        find_demonstrations([tmp_path, tmp_path / "nowhere"], task_names=["soup", "milk"])
    assert "for milk;" in str(error.value) and "soup," not in str(error.value)
    assert f"{tmp_path}, {tmp_path / 'nowhere'} (no such folder)" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no scripted demonstrations for any task"):
        find_demonstrations(tmp_path, sources=["scripted"])


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

    def snapshot_download(repository, repo_type, revision, allow_patterns, local_dir):
        calls.append((repository, repo_type, len(revision), allow_patterns))
        for pattern in allow_patterns:
            small(local_dir / pattern, alignment=None)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    attached = small(folders / "kaggle" / "bowl_demo.hdf5", alignment=None)
    small(folders / "mine" / "stove_demo.hdf5", collection=SCRIPTED)
    tasks = ["drawer", "bowl", "stove"]
    found = human_demonstrations("libero_goal", tasks, [folders / "mine"], download=True)
    target = folders / "data" / "human" / "libero_goal"
    assert found == {"drawer": target / "drawer_demo.hdf5", "bowl": attached,
                     "stove": target / "stove_demo.hdf5"}
    assert calls == [("yifengzhu-hf/LIBERO-datasets", "dataset", 40,  # a commit, not a branch
                      ["libero_goal/drawer_demo.hdf5", "libero_goal/stove_demo.hdf5"])]
    assert human_demonstrations("libero_goal", tasks, [], download=True) == found
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
        (changed("ee_pos", (6, 0), 1e39), "demo_1, obs/ee_pos: NaN or infinite"),  # in float32
        ({"agentview_rgb": lambda a, demo: a[:, :0]}, r"rgb: has shape \(5, 0, 4, 3\)"),
        ({"states": lambda a, demo: np.full(len(a), b"x")}, "states: has type .S1"),
        ({"lengths": (5, 0)}, "demo_1: has no steps"),
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
    with pytest.raises(DemoFileError, match=r"no group 'data'; found \['weights'\]"):
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
    (replace("data", [1.0]), r"no group 'data'; found \['data'\]"),
    (lambda file: file.move("data", "demos"), r"no group 'data'; found \['demos'\]"),
    (lambda file: [file["data"].move(f"demo_{i}", f"trial {'ab'[i]}") for i in (0, 1)],
     r"expected groups demo_0.*found \['trial a', 'trial b'\]"),
    (replace("data/demo_0/obs/ee_ori", h5py.SoftLink("/data/nothing")),
     "obs/ee_ori: a link to /data/nothing, which does not exist"),
    (lambda file: file["data/demo_1"].create_dataset("executed_actions", data=np.zeros((7, 6))),
     r"demo_1, executed_actions: has shape \(7, 6\); expected \(7, 7\)"),
])
def test_odd_files_are_named_with_the_cause(tmp_path, change, message):
    path = rewritten(small(tmp_path / "soup_demo.hdf5"), change)
    for read in (check_demo_file, explore_libero_dataset, LIBERODataset):
        with pytest.raises(DemoFileError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


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


def virtual(name, source=FRAMES, **of):
    """Frames of a virtual data set over the other file's."""
    def make(path):
        other = of.get("of", True) and small(path.parent / name, **of)
        layout = h5py.VirtualLayout((7, 4, 4, 3), "u1")
        layout[:] = h5py.VirtualSource(name, source, (7, 4, 4, 3))

        def change(file):
            del file[FRAMES]
            file.create_virtual_dataset(FRAMES, layout, fillvalue=7)
        rewritten(path, change)
        return other
    return make


def virtual_of_external_storage(path):
    external_storage(virtual("next.hdf5")(path))


def virtual_by_frames(path):
    """Frame by frame, the last one from a file that has one less."""
    small(path.parent / "next.hdf5", (5, 6))
    layout = h5py.VirtualLayout((7, 4, 4, 3), "u1")
    for t in range(7):
        layout[t] = h5py.VirtualSource("next.hdf5", FRAMES, (7, 4, 4, 3))[t]

    def change(file):
        del file[FRAMES]
        file.create_virtual_dataset(FRAMES, layout)
    rewritten(path, change)


def virtual_in_part(path):
    small(path.parent / "next.hdf5")
    layout = h5py.VirtualLayout((7, 4, 4, 3), "u1")
    layout[:5] = h5py.VirtualSource("next.hdf5", FRAMES, (7, 4, 4, 3))[2:]

    def change(file):
        del file[FRAMES]
        file.create_virtual_dataset(FRAMES, layout)
    rewritten(path, change)


@pytest.mark.parametrize(("make", "message"), [
    (external_storage, "external storage .*secret"),
    (linked("{folder}/other.hdf5"), "demo_1: links to .*other.hdf5; expected a file in the same"),
    (linked("../other.hdf5"), "demo_1: links to .*other.hdf5; expected a file in the same"),
    (linked("missing.hdf5"), "demo_1: a link to data/demo_1, which does not exist"),
    (link_to_a_link, "demo_1: links to .*other.hdf5; expected a file in the same"),
    (link_to_external_storage, "external storage .*secret"),
    (symbolic_link, "demo_1: links to .*other.hdf5"),
    (virtual("../other.hdf5"), "links to .*other.hdf5; expected a file in the same"),
    (virtual_of_external_storage, "external storage .*secret"),
    (virtual("next.hdf5", lengths=(5, 6)), r"next.hdf5, .* of shape \(6, 4, 4, 3\); expected"),
    (virtual("missing/next.hdf5", of=False), "next.hdf5, which does not exist"),
    (virtual("next.hdf5", "data/demo_7/obs/x"), "next.hdf5, .* of shape None"),
    (virtual_in_part, "not wholly mapped"),
    (virtual_by_frames, r"next.hdf5, .* of shape \(6, 4, 4, 3\); expected"),
])
def test_data_kept_elsewhere_are_refused_by_every_reader(tmp_path, make, message):
    path = small(tmp_path / "folder" / "soup_demo.hdf5", collection=SCRIPTED)
    make(path)
    readers = [check_demo_file, source_of, explore_libero_dataset, measure_alignment, frame_size,
               LIBERODataset, lambda path: LIBERODataset(path, storage="mmap"),
               lambda path: collect._complete(path, {}, 2),
               lambda path: collect._known_attempts(path, path.parent)]
    for read in readers:
        with pytest.raises(DemoFileError, match=message):
            read(path)
    [row] = quality_card(path)
    assert row["verdict"] == "bad" and re.search(message, row["found"])


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
def fingers(values, demo):
    """Open (8 cm) until a step after the command to close, which comes at step 3."""
    width = np.where(np.arange(len(values)) < 5, 0.04, 0.02)
    return np.stack([width, -width], axis=1)


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
    assert len(LIBERODataset(sound, split="all")) == 60
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
    assert len(LIBERODataset(still, split="all")) == 12
    assert "a_demo.hdf5: gripper commands (actions, column 6) are always 1" in \
        capsys.readouterr().out
    sound = small(tmp_path / "b_demo.hdf5", (12, 14), gripper_states=fingers)
    assert len(LIBERODataset(sound, split="all")) == 26
    assert "gripper" not in capsys.readouterr().out


# --- alignment -----------------------------------------------------------------------------------
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
    assert abs(evidence["fraction"]) < 1 and evidence["residual"] > demo_files.MAX_RESIDUAL
    assert (name, evidence["method"]) == ("raw", "delay")


def on_the_way(fraction, noise=0.0):
    """Joint angles that lie this share of a step after the state, on a straight path."""
    def change(values, demo):
        steps = np.arange(len(values))[:, None] + fraction
        wobble = noise * (-1.0) ** np.arange(len(values))[:, None]
        return 0.05 * np.arange(1, 8) * (steps + wobble)
    return change


def straight(values, demo):
    values = values.copy()
    values[:, 1:8] = on_the_way(0)(values, demo)
    return values


@pytest.mark.parametrize(("fraction", "noise", "expected"), [
    (-1.0, 0, "raw"), (-0.9, 0, "raw"), (0.01, 0, "raw"), (0.03, 0, "shift"), (0.9, 0, "shift"),
    (1.01, 0, "shift"), (1.1, 0, None), (-1.1, 0, None),  # further than one step: no observation
    (0.5, 0.4, "shift"), (0.5, 0.5, None),  # unexplained: 0.16 and 0.25 of the motion
])
def test_where_the_joints_lie_decides_within_limits(tmp_path, fraction, noise, expected):
    path = small(tmp_path / "soup_demo.hdf5", LONG, None, states=straight,
                 joint_states=on_the_way(fraction, noise))
    name, evidence = measure_alignment(path)
    assert evidence["fraction"] == pytest.approx(fraction, abs=0.02)
    assert evidence["residual"] == pytest.approx(noise**2, abs=0.02)
    assert evidence["method"] == ("joints" if expected else "delay")
    assert expected in (None, name)


@pytest.mark.parametrize(("delay", "expected"), [
    (-0.4, "shift"), (0.49, "shift"), (0.51, "unknown"), (0.79, "unknown"), (0.81, "raw"),
    (1.4, "raw"), (None, "unknown")])
def test_a_delay_near_the_middle_decides_nothing(tmp_path, monkeypatch, delay, expected):
    monkeypatch.setattr(demo_files, "_action_delay", lambda demos: delay)
    path = small(tmp_path / "soup_demo.hdf5", LONG, None, states=None)
    assert measure_alignment(path)[0] == expected


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
    assert demo_files.instruction_of(path) == "open it"


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
    with demo_files.open_demo_file(path) as file:
        assert demo_files.demo_names(file) == [f"demo_{i}" for i in range(12)]


@pytest.mark.parametrize("names", [
    ["demo_1", "demo_2", "demo_5", "demo_10"], ["0", "1", "2", "10"],
    ["demo_007", "demo_8", "demo_0010", "demo_11"], ["a_9", "a_10", "b_1", "b_2"],
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
        data = LIBERODataset(path, image_size=4, split="all", storage=storage)
        assert data.describe()["files"][0]["demos"] == names
        greys = (data.batch([0, 5])["observations"]["agentview_rgb"][:, 0, 0, 0, 0] * 255).round()
        assert greys.tolist() == [grey_at(0), grey_at(0, 1)]
    first = LIBERODataset(path, split="all", max_demos_per_task=1).describe()["files"][0]
    assert (first["demos"], first["steps"]) == (names[:1], 5)
    assert {row["check"]: row for row in quality_card(path)}["length"]["found"].startswith("5 to 8")
    assert frame_size(path) == 4
