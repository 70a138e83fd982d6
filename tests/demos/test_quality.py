"""The quality card: each defect is found and named, sound files pass, human ones too."""

import json

import h5py
import numpy as np
import pytest
from demo_files import fingers, write_demo_file

from trm_helpers import schema
from trm_helpers.demos import collect, quality
from trm_helpers.demos.quality import (
    ORIENTATIONS,
    frame_size,
    quality_card,
    replay_demonstration,
)
from trm_helpers.sim.env import LiberoEnv


def scene(values, demo):
    """Frames with something to see that changes."""
    return np.random.default_rng([7, demo]).integers(0, 256, values.shape, dtype=np.uint8)


def verdicts(path, **settings):
    return {row["check"]: row for row in quality_card(path, **settings)}


SOUND = dict(agentview_rgb=scene, gripper_states=fingers)


@pytest.fixture
def write(tmp_path):
    def make(alignment="raw", **overrides):
        return write_demo_file(tmp_path / "soup_demo.hdf5", (12, 14), alignment, image_size=16,
                               **{**SOUND, **overrides})
    return make


@pytest.mark.parametrize("alignment", ["raw", "shift", None])
def test_a_sound_file_is_good_in_everything(write, alignment):
    card = verdicts(write(alignment))
    assert [name for name, row in card.items() if row["verdict"] != "good"] == []
    assert {"layout", "frames, agent view", "gripper sign", "no-ops", "length",
            "alignment"} <= set(card)


def test_the_size_of_the_frames_is_read_from_the_file(write):
    assert frame_size(write()) == 16
    assert frame_size(write(agentview_rgb=None, eye_in_hand_rgb=None)) == schema.IMAGE_SIZE


def test_copies_other_names_and_other_sizes_are_found(write):
    with h5py.File(write(), "a") as file:
        data = file["data"]
        data.copy("demo_0", "demo_7")
        data.copy("demo_0", "episode_x")
        frames = data["demo_1/obs/agentview_rgb"][()]
        del data["demo_1/obs/agentview_rgb"]
        data["demo_1/obs/agentview_rgb"] = frames[:, :, :8]
        path = file.filename
    card = verdicts(path)
    assert (card["copies"]["verdict"], card["copies"]["found"]) == (
        "bad", "demo_7 of demo_0 among 3 demonstrations")
    assert (card["names"]["verdict"], card["names"]["found"]) == ("look", "ignored: episode_x")
    view = card["frames, agent view"]
    assert view["verdict"] == "bad" and "16x16 and 16x8 pixels" in view["found"]


def test_a_broken_layout_is_the_only_row(write):
    card = quality_card(write(actions=lambda values, demo: values * np.nan))
    assert [row["verdict"] for row in card] == ["bad"] and "NaN" in card[0]["found"]


@pytest.mark.parametrize(("group", "name", "value"), [
    ("data", "alignment", 3), ("data", "collection", "["),
    ("data/demo_1", "collection_version", "x"), ("data/demo_1", "frame_stride", 0),
    ("data/demo_1", "frame_stride", 2.5)])
def test_an_attribute_of_another_type_is_the_only_row(write, group, name, value):
    path = write()
    with h5py.File(path, "a") as file:
        file[group].attrs[name] = value
    (row,) = quality_card(path)
    assert row["verdict"] == "bad"
    assert all(part in row["found"] for part in (str(path), name, repr(value)))


def set_step(step, value):
    def change(values, demo):
        values = values.copy()
        values[step] = value
        return values
    return change


def first_frame_always(values, demo):
    return np.repeat(scene(values, demo)[:1], len(values), axis=0)


def always(number):
    def change(values, demo):
        values = values.copy()
        values[:, schema.GRIPPER_INDEX] = number
        return values
    return change


@pytest.mark.parametrize("check, verdict, found, change", [
    ("frames, wrist camera", "bad", "2 of 26 black", dict(eye_in_hand_rgb=set_step(4, 0))),
    ("frames, agent view", "bad", "24 repeated while", dict(agentview_rgb=first_frame_always)),
    ("gripper sign", "bad", "2 of 2", dict(gripper_states=lambda v, d: 1.5 * v - fingers(v, d))),
    ("gripper sign", "bad", "never move", dict(gripper_states=lambda v, d: v)),
    ("gripper switches", "bad", "0.0 per demonstration", dict(actions=always(1.0))),
    ("gripper switches", "bad", "1 values, 0.5 to 0.5", dict(actions=always(0.5))),
    ("gripper switches", "bad", "2 values, 0 to 1", dict(actions=lambda v, d: np.maximum(v, 0))),
    ("gripper sign", "bad", "2 of 2", dict(actions=lambda v, d: v * [1, 1, 1, 1, 1, 1, -1],
                                           gripper_states=fingers)),
    ("action range", "look", "never used: dy", dict(
        actions=lambda v, d: v * [1, 0, 1, 1, 1, 1, 1])),
])
def test_each_defect_is_found(write, check, verdict, found, change):
    row = verdicts(write(**change))[check]
    assert row["verdict"] == verdict and found in row["found"]


def idle(steps, size):
    """Arm commands of this size in the first steps after the gripper has closed."""
    def change(values, demo):
        values = values.copy()
        values[4:4 + steps, :6] = size
        return values
    return change


def switching(times):
    def change(values, demo):
        values = values.copy()
        values[:, schema.GRIPPER_INDEX] = -1.0
        values[1:1 + times:2, schema.GRIPPER_INDEX] = 1.0
        return values
    return change


def repeated(values, demo):
    """One frame in one demonstration again, while the arm moves."""
    values = scene(values, demo)
    if demo:
        values[7] = values[6]
    return values


@pytest.mark.parametrize(("check", "verdict", "found", "settings", "change"), [
    ("no-ops", "good", "7.7 % of 26 steps", {}, dict(actions=idle(1, 0))),
    ("no-ops", "look", "15.4 % of 26", {}, dict(actions=idle(2, 0))),
    ("no-ops", "look", "15.4 % of 26", {}, dict(actions=idle(2, 0.0009))),
    ("no-ops", "good", "0.0 % of 26", {}, dict(actions=idle(2, 0.002))),  # slow, and not at rest
    ("length", "good", "12 to 14 steps", dict(horizon=14), {}),
    ("length", "look", "12 to 14 steps", dict(horizon=13), {}),
    ("gripper switches", "good", "6.0 per demonstration", {}, dict(actions=switching(6))),
    ("gripper switches", "look", "8.0 per demonstration", {}, dict(actions=switching(8))),
    ("frames, agent view", "bad", "1 repeated while", {}, dict(agentview_rgb=repeated)),
])
def test_verdicts_change_at_their_limits(write, check, verdict, found, settings, change):
    row = verdicts(write(**change), **settings)[check]
    assert row["verdict"] == verdict and found in row["found"]


@pytest.mark.parametrize(("said", "verdict"), [
    ('{"language_instruction": ["pick ", "it"]}', "good"), ("{}", "look"), ("{bad", "bad"),
    ('{"language_instruction": 5}', "bad"), (["a", "b"], "bad")])
def test_an_instruction_that_training_refuses_is_bad(write, said, verdict):
    path = write()
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = said
    assert verdicts(path)["instruction"]["verdict"] == verdict


def test_alignment_that_contradicts_the_attribute_is_bad(write):
    path = write("shift")
    with h5py.File(path, "r+") as file:
        file["data"].attrs[schema.ALIGNMENT_ATTR] = "raw"
    row = verdicts(path)["alignment"]
    assert row["verdict"] == "bad" and row["found"].startswith("shift")


# --- the simulator -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A file with one real demonstration, and its task."""
    path = tmp_path_factory.mktemp("real") / "one_demo.hdf5"
    with LiberoEnv("libero_object", 5) as env:
        record = collect.record_demonstration(env, np.random.default_rng([0, 5, 0]))
        with h5py.File(path, "w") as file:
            collect._write_demo(file.create_group("data/demo_0"), record)
            file["data"].attrs[schema.ALIGNMENT_ATTR] = "raw"
            file["data"].attrs["problem_info"] = json.dumps(
                {"language_instruction": env.task.language})
        yield path, env


@pytest.mark.sim
def test_a_real_demonstration_is_good_in_everything(real):
    path, env = real
    card = verdicts(path, env=env, horizon=env.horizon)
    assert [(name, row) for name, row in card.items() if row["verdict"] != "good"] == []
    assert "1 of 1 succeed" in card["replay"]["found"] and "orientation, wrist camera" in card


@pytest.mark.sim
def test_frames_of_another_size_and_a_damaged_model_are_named(real, tmp_path):
    path, env = real
    with h5py.File(path) as source, h5py.File(tmp_path / "other.hdf5", "w") as file:
        source.copy("data", file)
        small = file["data/demo_0/obs/agentview_rgb"][:, ::2, ::2]
        del file["data/demo_0/obs/agentview_rgb"]
        file["data/demo_0/obs/agentview_rgb"] = small
    card = verdicts(tmp_path / "other.hdf5", env=env)
    assert (card["orientation, agent view"]["verdict"], card["orientation, agent view"]["found"]
            ) == ("bad", "frames have shape (64, 64, 3)")
    assert card["replay"]["verdict"] == "good"  # which needs no frames
    with h5py.File(tmp_path / "other.hdf5", "a") as file:
        file["data/demo_0"].attrs["model_file"] = "<mujoco"
    card = verdicts(tmp_path / "other.hdf5", env=env)
    assert "the stored model has no bodies" in card["states"]["found"]


@pytest.mark.sim
def test_states_that_are_missing_or_of_another_task_are_bad(real, write, tmp_path):
    path, env = real
    for states in (None, lambda values, demo: values[:, 1:]):  # 109 numbers in place of 110
        card = verdicts(write(states=states), env=env)
        assert card["states"]["verdict"] == "bad" and "replay" not in card
        assert ("/data/demo_0 holds no states" if states is None else "state has shape (109,)"
                ) in card["states"]["found"]
        assert env.task.name in card["states"]["expected"]
    assert "replay" not in (card := verdicts(path, env=env, replays=0)) and "states" not in card
    with pytest.raises(ValueError, match="replays=-1 is not valid; expected >= 0"):
        quality_card(path, env, replays=-1)


@pytest.mark.sim
@pytest.mark.parametrize("name, turn", {
    "flipped upside down": lambda images: images[:, ::-1],
    "mirrored left to right": lambda images: images[:, :, ::-1],
    "turned by 180 degrees": lambda images: images[:, ::-1, ::-1],
    "transposed": lambda images: images.transpose(0, 2, 1, 3),
    "turned by 90 degrees": lambda images: np.rot90(images, -1, axes=(1, 2)),
    "turned by 270 degrees": lambda images: np.rot90(images, 1, axes=(1, 2)),
    "transposed along the other diagonal": lambda images: np.rot90(
        images, 2, axes=(1, 2)).transpose(0, 2, 1, 3),
}.items())
def test_turned_frames_are_found(real, tmp_path, name, turn):
    path, env = real
    assert len(ORIENTATIONS) == 8
    with h5py.File(path) as source, h5py.File(tmp_path / "turned.hdf5", "w") as file:
        source.copy(source["data/demo_0"], file, "demo")
        for camera in schema.CAMERAS:
            file["demo/obs"][camera][...] = turn(source["data/demo_0/obs"][camera][()])
            row = quality._orientation(env, file["demo"], camera)
            assert row["found"].partition(" (")[0] == name and row["verdict"] == "bad"


@pytest.mark.sim
def test_the_files_of_the_authors_are_good_too(real, tmp_path):
    """Their frames are those after the action (``shift``), and they have neither our attribute nor
    the actions as executed."""
    path, env = real
    with h5py.File(path) as source, h5py.File(tmp_path / "theirs.hdf5", "w") as file:
        demo = source["data/demo_0"]
        theirs = file.create_group("data/demo_0")
        for name, values in [*demo.items(), *((f"obs/{key}", v) for key, v in demo["obs"].items())]:
            if isinstance(values, h5py.Dataset) and name != "executed_actions":
                later = name.startswith("obs/") or name == "robot_states"
                theirs[name] = np.concatenate([values[1:], values[-1:]]) if later else values[()]
        theirs["actions"][...] = demo["executed_actions"][()]
        theirs.attrs.update(demo.attrs)
        file["data"].attrs["problem_info"] = source["data"].attrs["problem_info"]
    card = verdicts(tmp_path / "theirs.hdf5", env=env, horizon=env.horizon)
    assert card["alignment"]["found"].startswith("shift")
    assert [(name, row) for name, row in card.items() if row["verdict"] != "good"] == []
    assert {"orientation, agent view", "orientation, wrist camera", "replay"} <= set(card)


@pytest.mark.sim
def test_actions_that_do_not_solve_the_task_fail_the_replay(real, tmp_path):
    path, env = real
    with h5py.File(path) as source, h5py.File(tmp_path / "other.hdf5", "w") as file:
        source.copy(source["data/demo_0"], file, "demo")
        file["demo/executed_actions"][:, :2] *= -1
        replay = replay_demonstration(env, file["demo"])
        assert not replay["success"] and max(replay["divergence"]) > 0.05
        assert replay["steps"] == len(file["demo/actions"])


@pytest.mark.sim
def test_fixtures_stand_where_the_stored_model_has_them():
    with LiberoEnv("libero_spatial", 2) as env:
        env.reset(seed=1)
        places = {name: env.object_position(name) for name in ("wooden_cabinet_1", "flat_stove_1")}
        stored = env.model_xml()
        env.reset(seed=2)
        assert np.abs(env.object_position("flat_stove_1") - places["flat_stove_1"]).max() > 1e-4
        env.set_fixtures(stored)
        for name, place in places.items():
            now = env.object_position(name)
            np.testing.assert_allclose(now, place, atol=1e-6)  # the XML rounds
        with pytest.raises(ValueError, match="teapot.*, which pick_up.* lacks"):
            env.set_fixtures('<mujoco><worldbody><body name="teapot"/></worldbody></mujoco>')
        for damaged in ("", "<mujoco/>", stored[:1000], np.int64(3)):
            with pytest.raises(ValueError, match="has no bodies, which pick_up"):
                env.set_fixtures(damaged)
