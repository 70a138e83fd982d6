import json
import math
import os
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from demo_files import action_at, data_set, grey_at, write_demo_file

from trm_helpers import schema
from trm_helpers.config import Config, from_flat
from trm_helpers.data import augment, dataset
from trm_helpers.data.augment import augment_images, resize_images
from trm_helpers.data.dataset import LIBERODataset, split_demonstrations
from trm_helpers.data.normalize import ActionNormalizer, fit_proprio, normalize_proprio
from trm_helpers.data.observations import read_batch
from trm_helpers.demos.demo_files import DemoFileError
from trm_helpers.files import digest

ROOT = Path(__file__).resolve().parents[2]
BOTH = ("agentview_rgb", "eye_in_hand_rgb")


@pytest.fixture
def path(tmp_path):
    """Two demonstrations of 5 and 7 steps, obs[t] seen when actions[t] was chosen."""
    return write_demo_file(tmp_path / "soup_demo.hdf5", (5, 7), image_size=8)


def plain(files, **settings):
    """A data set with the actions as stored."""
    return data_set(files, normalize_actions="none", **settings)


def grey(observations, camera="agentview_rgb"):
    return (observations[camera][..., 0, 0, 0] * 255).round().int().tolist()


def same(a, b):
    return (
        torch.equal(a["actions"], b["actions"]) and torch.equal(a["mask"], b["mask"])
        and a["observations"].keys() == b["observations"].keys()
        and all(torch.equal(a["observations"][k], b["observations"][k]) for k in a["observations"])
    )


# --- normaliser ----------------------------------------------------------------------------------
ACTIONS = np.array([[0.0, 0.2, 0.5, 0, 0, -1, -1], [1.0, 0.6, 0.5, 0, 0, 1, 1]], np.float32)


def test_zscore_by_hand():
    normalizer = ActionNormalizer("zscore").fit(ACTIONS)
    assert np.allclose(normalizer.offset, [0.5, 0.4, 0.5, 0, 0, 0])
    expected = [0.5 + 1e-6, 0.2 + 1e-6, 0, 0, 0, 1 + 1e-6]
    assert np.allclose(normalizer.scale, expected, rtol=0, atol=1e-7)
    out = normalizer.normalize(torch.from_numpy(ACTIONS))
    assert out.dtype == torch.float32
    expected = torch.tensor([[-1.0, -1, 0, 0, 0, -1, -1], [1, 1, 0, 0, 0, 1, 1]])
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.equal(out[:, 6], expected[:, 6])  # the gripper to the bit


def test_minmax_by_hand():
    normalizer = ActionNormalizer("minmax").fit(torch.from_numpy(ACTIONS))
    quarter = np.array([0.25, 0.3, 0.5, 0, 0, -0.5, 1], np.float32)
    assert np.allclose(normalizer.normalize(quarter), [-0.5, -0.5, 0, 0, 0, -0.5, 1], atol=1e-6)
    assert np.allclose(normalizer.normalize(ACTIONS)[:, [0, 1, 5]], [[-1] * 3, [1] * 3])


@pytest.mark.parametrize("noise", [0, 1e-7])  # in another dimension, of rounding
def test_a_dimension_that_never_varied_stays_finite_both_ways(noise):
    actions = ACTIONS + np.array([[0, 0, 0, noise, 0, 0, 0], [0] * 7], np.float32)
    for mode in ("zscore", "minmax"):
        normalizer = ActionNormalizer(mode).fit(actions)
        unseen = np.array([0.5, 0.4, 0.9, 0.3, 0, 0, 1], np.float32)
        assert np.allclose(normalizer.normalize(unseen)[:6], 0, atol=1e-6)
        predicted = normalizer.denormalize(np.full(7, 2.0, np.float32))
        assert predicted[2] == 0.5 and predicted[3] == 0.0  # the constants that they were


@pytest.mark.parametrize("mode", ["zscore", "minmax", "none"])
def test_denormalize_inverts_for_any_leading_shape_and_survives_json(mode):
    actions = torch.rand(2, 3, 4, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    normalizer = ActionNormalizer(mode).fit(actions)
    again = ActionNormalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    out = again.normalize(actions)
    assert torch.equal(out, normalizer.normalize(actions))
    assert torch.allclose(again.denormalize(out), actions, atol=1e-6)
    assert torch.equal(out, actions) == (mode == "none")


def test_normalizer_refuses():
    with pytest.raises(ValueError, match="mode='robust'.*'zscore', 'minmax', 'none'"):
        ActionNormalizer("robust")
    with pytest.raises(ValueError, match="zscore normaliser has no statistics; call fit"):
        ActionNormalizer().normalize(ACTIONS)
    with pytest.raises(ValueError, match=r"shape \(2, 6\).*expected \(..., 7\)"):
        ActionNormalizer("none").normalize(ACTIONS[:, :6])
    with pytest.raises(ValueError, match="int64; .*floating"):
        ActionNormalizer("none").normalize(ACTIONS.astype(int))
    with pytest.raises(ValueError, match="actions is empty"):
        ActionNormalizer().fit(ACTIONS[:0])


def test_proprio_statistics_by_hand():
    proprio = torch.tensor([[1.0, 3.0], [3.0, 3.0]])
    stats = fit_proprio(proprio)
    assert stats == {"mean": [2.0, 3.0], "std": [1.0, 1.0]}  # 1 where nothing varies
    assert normalize_proprio(proprio, stats).tolist() == [[-1, 0], [1, 0]]


# --- what a run reads ----------------------------------------------------------------------------
def names_of(*datasets):
    return sorted(demo.name for data in datasets for demo in data.demos)


def test_of_a_collected_file_no_more_is_read_than_was_asked_for(tmp_path):
    lengths = (6, 7, 8, 9, 10)
    ours = write_demo_file(tmp_path / "ours_demo.hdf5", lengths, image_size=36,
                           collection={"by": "scripted expert"})
    human = write_demo_file(tmp_path / "theirs_demo.hdf5", lengths, image_size=36)
    config = from_flat("tiny", num_demos=3, image_size=36)
    assert names_of(*LIBERODataset.from_config({0: ours}, config)) == ["demo_0", "demo_1", "demo_2"]
    assert len(names_of(*LIBERODataset.from_config({0: human}, config))) == 5
    both = LIBERODataset.from_config({0: human, 1: ours}, config.replace(task_ids=[0, 1]))
    assert [sum(len(data.describe()["files"][i]["demos"]) for data in both) for i in (0, 1)] \
        == [5, 3]  # each file by its own kind
    assert len(names_of(*LIBERODataset.from_config({0: ours},
                                                   config.replace(max_demos_per_task=4)))) == 3
    config = config.replace(demo_dir=str(tmp_path))  # that folder was asked for
    assert len(names_of(*LIBERODataset.from_config({0: ours}, config))) == 5
    config = config.replace(max_demos_per_task=4)
    assert len(names_of(*LIBERODataset.from_config({0: ours}, config))) == 4


def test_held_out_is_what_a_policy_was_not_trained_on_in_its_own_normalisation(tmp_path):
    path = write_demo_file(tmp_path / "soup_demo.hdf5", (6, 7, 8, 9, 10), image_size=36)
    config = from_flat("tiny", image_size=36)
    train, val = LIBERODataset.from_config({0: path}, config)
    held = LIBERODataset.held_out({0: path}, config, train, train.describe())
    assert names_of(held) == names_of(val) and held.split == "val"
    assert held.normalizer is train.normalizer and held.proprio_stats == train.proprio_stats
    assert same(held.batch([0, 3]), val.batch([0, 3]))
    known = {"files": [{"file": "elsewhere/soup_demo.hdf5", "demos": ["demo_0", "demo_3"]}]}
    held = LIBERODataset.held_out({0: path}, config.replace(max_demos_per_task=3), train, known)
    assert names_of(held) == ["demo_1", "demo_2"]
    with pytest.raises(ValueError, match="trained on all 1 demonstrations read"):
        LIBERODataset.held_out({0: path}, config.replace(max_demos_per_task=1), train, known)


def test_a_file_renumbered_since_the_training_is_named(tmp_path, capsys):
    """The first demonstration was removed: a name now stands for another demonstration."""
    path = write_demo_file(tmp_path / "soup_demo.hdf5", (6, 7, 8, 9, 10), image_size=36)
    config = from_flat("tiny", image_size=36)
    train, _ = LIBERODataset.from_config({0: path}, config)
    capsys.readouterr()
    LIBERODataset.held_out({0: path}, config, train, train.describe())
    assert "other demonstrations" not in capsys.readouterr().out
    with h5py.File(path, "r+") as file:
        del file["data/demo_0"]
        for number in range(4):
            file.move(f"data/demo_{number + 1}", f"data/demo_{number}")
        file.copy("data/demo_3", "data/demo_4")
        file["data/demo_4/actions"][0, 0] = 0.5
    LIBERODataset.held_out({0: path}, config, train, train.describe())
    assert f"{path} holds other demonstrations than the policy was trained on" \
        in capsys.readouterr().out


@pytest.mark.parametrize("indices", [torch.tensor([True, False]), [1.9], 5, [[0, 1]]])
def test_indices_are_a_list_of_integers(tmp_path, indices):
    data = LIBERODataset(write_demo_file(tmp_path / "soup_demo.hdf5", (6, 7), image_size=36),
                         config=from_flat("tiny", image_size=36))
    with pytest.raises(TypeError, match=r"expected \(B,\) integers"):
        data.batch(indices)
    assert len(data.batch([])["actions"]) == 0


# --- split ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("count", "train"), [
    (50, 40), (12, 10), (10, 8), (9, 7), (7, 6), (5, 4), (4, 3), (3, 2), (2, 1)])  # to the nearest
def test_split_is_80_to_20_and_disjoint(count, train):
    names = [f"demo_{i}" for i in range(count)]
    first, second = split_demonstrations(names, "soup_demo.hdf5")
    assert len(first) == train
    assert sorted(first + second) == sorted(names)


def test_split_is_a_function_of_the_name_of_the_file():
    names = [f"demo_{i}" for i in range(50)]
    split = split_demonstrations(names, "a/soup_demo.hdf5")
    assert split == split_demonstrations(names, "b/soup_demo.hdf5")
    assert split != split_demonstrations(names, "a/milk_demo.hdf5")
    assert split_demonstrations(names[:5], "a/soup_demo.hdf5")[1] == ["demo_4"]  # as ever


def test_split_refuses(path):
    with pytest.raises(ValueError, match="soup_demo.hdf5: 1 demonstration.*at least 2"):
        LIBERODataset(path, max_demos_per_task=1).train_val()


@pytest.fixture
def ten(tmp_path):
    return [
        write_demo_file(tmp_path / f"{name}_demo.hdf5", range(3, 13), image_size=4)
        for name in ("soup", "milk")
    ]


def test_train_and_val_are_the_samples_of_the_whole_and_share_its_memory(ten):
    whole = data_set(ten, image_size=4, proprioception=True, chunk=2, cameras=BOTH)
    train, val = whole.train_val()
    assert whole.split == "all" and len(whole) == len(train) + len(val)
    whole._use(whole.demos, "all", train.normalizer, train.proprio_stats)
    for half in (train, val):
        first = {(demo.file, demo.name): start for demo, start in zip(
            whole.demos, np.cumsum([0] + [d.end - d.first for d in whole.demos]), strict=False)}
        indices = [first[demo.file, demo.name] + step for demo in half.demos
                   for step in range(demo.end - demo.first)]
        assert same(half.batch(range(len(half))), whole.batch(indices))
    assert train._steps is val._steps is whole._steps
    for file, other in zip(train.describe()["files"], val.describe()["files"], strict=True):
        assert (len(file["demos"]), len(other["demos"])) == (8, 2)
        assert not set(file["demos"]) & set(other["demos"])


def test_val_uses_the_statistics_of_train_alone(ten):
    train, val = data_set(ten, image_size=4, proprioception=True,
                          normalize_actions="zscore").train_val()
    rows = [
        action_at(t, int(name.removeprefix("demo_")))
        for file in train.describe()["files"] for name in file["demos"]
        for t in range(3 + int(name.removeprefix("demo_")))
    ]
    assert len(rows) == len(train)
    assert np.allclose(train.normalizer.offset, np.mean(rows, axis=0)[:6])
    assert np.allclose(train.normalizer.scale, np.std(rows, axis=0)[:6] + 1e-6)
    assert val.normalizer is train.normalizer and val.proprio_stats == train.proprio_stats
    everything = train.batch(range(len(train)))
    assert torch.allclose(everything["actions"][..., :6].mean((0, 1)), torch.zeros(6), atol=1e-6)
    proprio = everything["observations"]["proprio"][:, 0]
    assert torch.allclose(proprio.mean(0), torch.zeros(schema.PROPRIO_DIM), atol=1e-5)
    varying = [*range(7), 9, 10, 11]  # joints and position; fingers never vary in these files
    assert torch.allclose(proprio[:, varying].std(0, correction=0), torch.ones(10), atol=1e-5)
    assert (proprio[:, 7:9] == 0).all()


def test_validation_is_not_augmented(path):
    train, val = LIBERODataset(path, image_size=8, augmentation="shift").train_val()
    assert (train.augmentation, val.augmentation) == ("shift", "none")


# --- samples -------------------------------------------------------------------------------------
def test_raw_pairs_each_observation_with_its_own_action(path):
    data = plain(path)
    assert len(data) == 12
    sample = data[3]
    assert {k: (tuple(v.shape), v.dtype) for k, v in sample["observations"].items()} == {
        "agentview_rgb": ((1, 8, 8, 3), torch.float32)
    }
    assert sample["actions"].shape == (1, 7) and sample["mask"].tolist() == [1.0]
    for index, (demo, t) in enumerate([(0, t) for t in range(5)] + [(1, t) for t in range(7)]):
        assert grey(data[index]["observations"]) == [grey_at(t, demo)]
        assert np.allclose(data[index]["actions"][0], action_at(t, demo))


@pytest.mark.parametrize("attribute", ["shift", None])
def test_shift_pairs_an_observation_with_the_next_action(tmp_path, attribute):
    """obs[t] of these files shows what followed actions[t]: time t + 1, the action at t + 1."""
    path = write_demo_file(tmp_path / "soup_demo.hdf5", (5, 7), attribute, image_size=8)
    data = plain(path)
    assert len(data) == 4 + 6
    places = [(0, t) for t in range(4)] + [(1, t) for t in range(6)]
    for index, (demo, t) in enumerate(places):
        assert grey(data[index]["observations"]) == [grey_at(t + 1, demo)]
        assert np.allclose(data[index]["actions"][0], action_at(t + 1, demo))
    assert data.describe()["files"][0]["alignment"] == "shift"


def test_chunks_are_padded_with_the_last_action_and_masked(path):
    data = plain(path, chunk=3)
    sample = data[3]  # the fourth of five steps: two actions left
    assert sample["actions"].shape == (1, 3, 7) and sample["mask"].tolist() == [[1, 1, 0]]
    expected = [action_at(3), action_at(4), action_at(4)]
    assert np.allclose(sample["actions"][0], expected)
    assert data[4]["mask"].tolist() == [[1, 0, 0]]
    assert data[2]["mask"].tolist() == [[1, 1, 1]]
    assert np.allclose(data[5]["actions"][0], [action_at(t, 1) for t in range(3)])


def test_a_chunk_longer_than_every_demonstration_is_reported(path, capsys):
    longest = max(demo.end - demo.first for demo in plain(path).demos)
    plain(path, chunk=longest)
    assert "chunk" not in capsys.readouterr().out
    plain(path, chunk=longest + 1).train_val()
    assert capsys.readouterr().out.count(f"chunk={longest + 1} is longer than every") == 1


def test_windows_stay_inside_their_demonstration(path):
    data = plain(path, sequence_length=4, chunk=2)
    assert len(data) == 2 + 4
    assert [grey(data[i]["observations"]) for i in (1, 2)] == [[2, 3, 4, 5], [11, 12, 13, 14]]
    sample = data[1]
    assert sample["actions"].shape == (4, 2, 7)
    assert sample["mask"].tolist() == [[1, 1], [1, 1], [1, 1], [1, 0]]
    assert np.allclose(sample["actions"][2], [action_at(3), action_at(4)])
    with pytest.raises(ValueError, match="demo_0: 5 steps are shorter than sequence_length=6"):
        plain(path, sequence_length=6)


def test_samples_begin_at_rendered_frames(path):
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["frame_stride"] = 3
    data = plain(path, chunk=4)
    assert len(data) == 2 + 7
    assert [data.samples_of(number) for number in (0, 1)] == [range(2), range(2, 9)]
    assert [grey(data[i]["observations"])[0] for i in range(4)] == [1, 4, 11, 12]
    assert np.allclose(data[1]["actions"][0, :2], [action_at(3), action_at(4)])
    assert data[1]["mask"].tolist() == [[1, 1, 0, 0]]
    with pytest.raises(ValueError, match="demo_0: a frame in every 3 steps.*sequence_length=2"):
        plain(path, sequence_length=2)


def test_an_epoch_visits_a_frame_as_often_as_it_stands_for_steps(path):
    def visited(**given):
        return torch.cat([draw["indices"] for draw in data.draws(4, seed=0, epoch=1, **given)])

    data = plain(path, chunk=4)
    assert data.epoch_size == len(data) and sorted(visited().tolist()) == list(range(len(data)))
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["frame_stride"] = 3  # the other has all frames
    data = plain(path, chunk=4)
    assert data.epoch_size == 5 + 7  # its steps: the second frame stands for two
    assert torch.bincount(visited()).tolist() == [3, 2] + [1] * 7
    assert visited().tolist() != sorted(visited().tolist())
    assert visited(shuffle=False).tolist() == list(range(9))  # of validation: each once


def test_actions_between_frames_that_no_chunk_reaches_are_reported(path, capsys):
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["frame_stride"] = 3
    plain(path, chunk=3)
    assert "frame_stride" not in capsys.readouterr().out
    plain(path, chunk=2).train_val()
    assert capsys.readouterr().out.count(
        "frame_stride=3 is above chunk=2: only 2 of every 3 actions are trained on") == 1


def test_images_are_resized_once_and_scaled_to_one(path):
    data = plain(path, image_size=4, cameras=BOTH)
    with h5py.File(path) as file:
        stored = torch.from_numpy(file["data/demo_1/obs/eye_in_hand_rgb"][2:3])
    expected = resize_images(stored, 4).float() / 255
    assert torch.allclose(data[7]["observations"]["eye_in_hand_rgb"], expected)
    assert data._steps.frames.images["eye_in_hand_rgb"].dtype == torch.uint8
    assert data._steps.frames.images["eye_in_hand_rgb"].shape == (12, 4, 4, 3)


def test_proprioception_holds_joints_fingers_position(path):
    stats = {"mean": [0.0] * schema.PROPRIO_DIM, "std": [0.5] * schema.PROPRIO_DIM}
    data = plain(path, proprioception=True)
    data._use(data.demos, "all", None, stats)
    with h5py.File(path) as file:
        obs = file["data/demo_0/obs"]
        joints, position = obs["joint_states"][2], obs["ee_pos"][2]
    proprio = data[2]["observations"]["proprio"]
    assert proprio.shape == (1, 12) and proprio.dtype == torch.float32
    assert np.allclose(proprio[0], [*(2 * joints), 0.08, -0.08, *(2 * position)])


def test_task_ids_follow_their_file(ten):
    data = plain(ten, image_size=4, task_ids=[7, 2], conditioning="task_id", sequence_length=2)
    tasks = data.batch(range(len(data)))["observations"]["task_id"]
    per_file = sum(range(3, 13)) - 10  # two-step windows
    assert tasks.dtype == torch.int64 and tasks.shape == (2 * per_file, 2)
    assert tasks[:per_file].unique().tolist() == [7] and tasks[per_file:].unique().tolist() == [2]


def test_max_demos_takes_the_first(ten):
    data = plain(ten[0], image_size=4, max_demos_per_task=3)
    assert data.describe()["files"][0]["demos"] == ["demo_0", "demo_1", "demo_2"]
    assert len(data) == 3 + 4 + 5


def test_normalisation_accepts_booleans(path):
    assert LIBERODataset(path, normalize_actions=True).normalizer.mode == "zscore"
    assert LIBERODataset(path, normalize_actions=False).normalizer.mode == "none"
    assert LIBERODataset(path, normalize_actions="minmax").normalizer.mode == "minmax"


def test_describe_is_json_and_tells_human_from_scripted(tmp_path, path):
    scripted = write_demo_file(tmp_path / "b_demo.hdf5", (4,), image_size=8, collection={"n": 1})
    described = json.loads(json.dumps(plain([path, scripted], cameras=BOTH).describe()))
    assert described["split"] == "all" and described["samples"] == 16
    first_actions = np.array([action_at(step) for step in range(4)], np.float32)
    with h5py.File(scripted) as file:
        frames = [file["data/demo_0/obs"][camera][0].tobytes() for camera in BOTH]
    assert described["files"][1] == {
        "file": str(scripted), "demos": ["demo_0"], "steps": 4, "alignment": "raw",
        "source": "scripted",
        "actions": digest(first_actions.tobytes()), "frames": digest(b"".join(frames)),
    }
    assert described["files"][0]["source"] == "human"


def test_nothing_is_learned_from_what_follows_a_push(tmp_path):
    path = write_demo_file(tmp_path / "a_demo.hdf5", (6,), image_size=8)
    with h5py.File(path, "a") as file:
        executed = file["data/demo_0/actions"][:]
        executed[2] += 0.1  # pushed in step 2
        file[f"data/demo_0/{schema.EXECUTED_ACTIONS}"] = executed
    mask = plain(path, chunk=3).batch(range(6))["mask"][:, 0]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_a_push_is_found_in_shifted_files_too(tmp_path):
    path = write_demo_file(tmp_path / "a_demo.hdf5", (6,), alignment="shift", image_size=8)
    with h5py.File(path, "a") as file:
        executed = file["data/demo_0/actions"][:]
        executed[2] += 0.1  # the action that obs[1] is paired with
        file[f"data/demo_0/{schema.EXECUTED_ACTIONS}"] = executed
    mask = plain(path, chunk=3).batch(range(5))["mask"][:, 0]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_from_config_follows_the_config(tmp_path):
    files = {4: write_demo_file(tmp_path / "a_demo.hdf5", (4, 5, 6, 7, 8), image_size=72)}
    config = from_flat("demo", task_ids=(4,), image_size=36,
                       conditioning="task_id", max_demos_per_task=4)
    train, val = LIBERODataset.from_config(files, config)
    assert [len(split.demos) for split in (train, val)] == [3, 1]
    assert train.augmentation == "shift" and val.augmentation == "none"
    sample = val[0]
    assert sample["actions"].shape == (1, 8, 7) and sample["mask"].shape == (1, 8)
    assert sample["observations"]["eye_in_hand_rgb"].shape == (1, 36, 36, 3)
    assert sample["observations"]["task_id"].tolist() == [4]
    plain_task = LIBERODataset.from_config(files, from_flat("demo", image_size=36))[0]
    assert "task_id" not in plain_task[0]["observations"]


# --- other projects' loaders ---------------------------------------------------------------------
PEER_PYTHON = Path(os.environ.get("TRM_PEER_PYTHON", ROOT / "build/peers/bin/python"))
needs_peers = pytest.mark.skipif(
    not PEER_PYTHON.exists(), reason="no peers: benchmarks/peers_read.py --install build/peers")


def read_by_peers(path, tmp_path):
    """loader -> name -> (samples, T, ...), as ``benchmarks/peers_read.py`` reads the file."""
    out = tmp_path / "peers.npz"
    command = [PEER_PYTHON, ROOT / "benchmarks/peers_read.py", path, "--out", out]
    subprocess.run(command, check=True, timeout=300)
    loaders = {}
    with np.load(out) as file:
        for key in file.files:
            loader, name = key.split("/")
            loaders.setdefault(loader, {})[name] = file[key]
    assert set(loaders) == {"robomimic_low_dim", "robomimic_all", "libero"}
    return loaders


@needs_peers
def test_robomimic_and_libero_read_our_files_as_we_do(tmp_path, path):
    stats = {"mean": [0.0] * schema.PROPRIO_DIM, "std": [1.0] * schema.PROPRIO_DIM}
    data = plain(path, cameras=BOTH, proprioception=True, chunk=3)
    data._use(data.demos, "all", None, stats)
    ours = data.batch(range(len(data)), as_bytes=True)
    for loader, read in read_by_peers(path, tmp_path).items():
        assert len(read["actions"]) == len(data) == 12
        for camera in BOTH:
            assert np.array_equal(read[camera][:, 0], ours["observations"][camera][:, 0]), loader
        parts = [read[key][:, 0] for key in schema.PROPRIO_KEYS]
        proprio = np.concatenate(parts, axis=1).astype(np.float32)
        assert np.array_equal(proprio, ours["observations"]["proprio"][:, 0])
        # like us, they repeat the last action past the end
        assert np.array_equal(read["actions"][:, :3].astype(np.float32), ours["actions"][:, 0])


@needs_peers
def test_the_peers_pair_shifted_files_one_step_early(tmp_path):
    """They take files as raw: of upstream's, the action that we pair is their next one."""
    path = write_demo_file(tmp_path / "soup_demo.hdf5", (5,), None, image_size=8)
    ours = plain(path).batch(range(4), as_bytes=True)
    for read in read_by_peers(path, tmp_path).values():
        frames = ours["observations"]["agentview_rgb"][:, 0]
        assert np.array_equal(read["agentview_rgb"][:4, 0], frames)
        assert np.array_equal(read["actions"][:4, 1].astype(np.float32), ours["actions"][:, 0])


# --- batches -------------------------------------------------------------------------------------
def everything(path, augmentation="none"):
    return data_set(path, sequence_length=2, augmentation=augmentation, cameras=BOTH,
                    proprioception=True, task_ids=[3], conditioning="task_id", chunk=3)


def test_one_sample_several_samples_and_a_loader_are_the_batch(path):
    data = everything(path)
    batch = data.batch([4, 0, 9])
    assert batch["observations"]["agentview_rgb"].shape == (3, 2, 8, 8, 3)
    assert batch["actions"].shape == (3, 2, 3, 7) and batch["mask"].shape == (3, 2, 3)
    collate = torch.utils.data.default_collate
    assert same(batch, collate([data[4], data[0], data[9]]))
    assert same(batch, collate(data.__getitems__([4, 0, 9])))
    loader = torch.utils.data.DataLoader(data, batch_size=10)
    assert same(next(iter(loader)), data.batch(torch.arange(10)))


def test_an_index_out_of_range_raises(path):
    data = plain(path)
    assert len(list(data)) == 12 and same(data[-1], data[11])
    for index in (12, -13):
        with pytest.raises(IndexError, match="12 samples"):
            data[index]


def test_an_epoch_holds_every_sample_once(path):
    data = plain(path)
    def order(**settings):
        batches = list(data.batches(5, **settings))
        return [g for batch in batches for row in grey(batch["observations"]) for g in row]

    in_order = order(seed=0, epoch=0, shuffle=False)
    assert in_order == [1, 2, 3, 4, 5, 11, 12, 13, 14, 15, 16, 17]
    shuffled = order(seed=0, epoch=0)
    assert shuffled != in_order and sorted(shuffled) == in_order
    assert shuffled == order(seed=0, epoch=0)
    assert shuffled != order(seed=0, epoch=1) and shuffled != order(seed=1, epoch=0)
    assert order(seed=0, epoch=1) != order(seed=1, epoch=0)
    assert [len(batch["mask"]) for batch in data.batches(5, 0, 0)] == [5, 5, 2]
    with pytest.raises(ValueError, match="batch_size=0"):
        next(data.batches(0, 0, 0))


@pytest.mark.parametrize("augmentation", ["reference", "shift"])
def test_augmented_epochs_repeat_and_can_be_entered_later(path, augmentation):
    data = everything(path, augmentation)
    epoch = list(data.batches(4, seed=1, epoch=2))
    torch.manual_seed(0)  # the global generator has no say
    assert all(map(same, epoch, data.batches(4, seed=1, epoch=2)))
    later = list(data.batches(4, seed=1, epoch=2, start=1))
    assert len(later) == len(epoch) - 1 and all(map(same, epoch[1:], later))
    other = list(data.batches(4, seed=1, epoch=3, shuffle=False))
    unshuffled = list(data.batches(4, seed=1, epoch=2, shuffle=False))
    assert all(torch.equal(a["actions"], b["actions"])
               for a, b in zip(other, unshuffled, strict=True))
    assert not all(map(same, other, unshuffled))  # the same samples, drawn anew


def test_augmentation_changes_images_alone_and_cameras_apart(path):
    """Agent-view frames are one grey: what is left of them in a batch is its brightness."""
    plain_batch = everything(path).batch([2] * 64)
    torch.manual_seed(0)
    batch = everything(path, "shift").batch([2] * 64)
    for key in ("proprio", "task_id"):
        assert torch.equal(batch["observations"][key], plain_batch["observations"][key])
    assert torch.equal(batch["actions"], plain_batch["actions"])
    factors = {}
    for camera in BOTH:
        images = batch["observations"][camera].flatten(1)
        factors[camera] = images.mean(1) / plain_batch["observations"][camera].flatten(1).mean(1)
    assert factors["agentview_rgb"].unique().numel() > 16
    ratio = torch.stack(list(factors.values()))
    assert abs(torch.corrcoef(ratio)[0, 1]) < 0.4


def brightness(batch, reference):
    """By how much each sample's frames were brightened; agent-view frames are one grey."""
    return [(images / reference["observations"][camera][..., :1, :1, :]).flatten(1).mean(1)
            for camera, images in batch["observations"].items() if camera == "agentview_rgb"][0]


def test_each_batch_each_process_and_each_epoch_draws_its_own_augmentation(tmp_path):
    """All samples are alike, so that draws that are the same would show."""
    path = write_demo_file(tmp_path / "grey_demo.hdf5", (64, 64), image_size=8,
                           agentview_rgb=lambda values, demo: np.full_like(values, 100))
    data = plain(path, augmentation="brightness")
    reference = plain(path).batch([0])

    def draws(seed=0, epoch=0, part=(0, 1), size=32):
        return [brightness(batch, reference)
                for batch in data.batches(size, seed, epoch, shuffle=False, part=part)]

    epoch = draws()
    others = [*epoch[1:], draws(epoch=1)[0], draws(seed=1)[0], draws(seed=0, epoch=2)[0]]
    for index, other in enumerate(others):
        assert not torch.allclose(epoch[0], other), index
        assert all(not torch.allclose(other, later) for later in others[index + 1:])
    first, second = draws(part=(0, 2), size=64), draws(part=(1, 2), size=64)
    assert len(first[0]) == len(second[0]) == 32
    assert not torch.allclose(first[0], second[0]) and not torch.allclose(first[1], second[1])


def test_cameras_keep_their_order_and_draw_in_it(path):
    for cameras in (BOTH, BOTH[::-1]):
        data = plain(path, cameras=cameras, augmentation="shift")
        assert data.cameras == cameras
        torch.manual_seed(5)
        batch = data.batch([3, 8])
        assert tuple(batch["observations"]) == cameras
        generator = torch.Generator().manual_seed(5)
        frames = plain(path, cameras=cameras).batch([3, 8])["observations"]
        for camera in cameras:
            expected = augment_images(frames[camera], "shift", generator)
            assert torch.equal(batch["observations"][camera], expected)


@pytest.mark.parametrize("dimension", range(6))
def test_a_push_in_any_dimension_counts(tmp_path, dimension):
    path = write_demo_file(tmp_path / "a_demo.hdf5", (4, 6), image_size=8)
    with h5py.File(path, "a") as file:
        for name in ("demo_0", "demo_1"):
            executed = file[f"data/{name}/actions"][:]
            executed[2, dimension] += 0.1 if name == "demo_1" else 0
            file[f"data/{name}/{schema.EXECUTED_ACTIONS}"] = executed
    mask = plain(path, chunk=2).batch(range(10))["mask"][:, 0, 1]
    assert mask.tolist() == [1, 1, 1, 0] + [1, 1, 0, 1, 1, 0]


def test_held_out_demonstrations_are_told_by_file_and_not_augmented(tmp_path):
    files = {task: write_demo_file(tmp_path / f"{name}_demo.hdf5", (6, 7, 8), image_size=36)
             for task, name in enumerate(("soup", "milk"))}
    config = from_flat("tiny", task_ids=[0, 1], image_size=36, augmentation="shift")
    train, _ = LIBERODataset.from_config(files, config)
    known = {"files": [{"file": "soup_demo.hdf5", "demos": ["demo_0", "demo_1", "demo_2"]},
                       {"file": "milk_demo.hdf5", "demos": ["demo_1"]}]}
    held = LIBERODataset.held_out(files, config, train, known)
    assert held.augmentation == "none"
    assert [file["demos"] for file in held.describe()["files"]] == [[], ["demo_0", "demo_2"]]


def test_values_that_hardly_vary_are_not_blown_up():
    stats = fit_proprio(torch.tensor([[0.04, 1.0], [0.04 + 1e-8, 2.0]], dtype=torch.float64))
    assert stats["std"] == [1.0, 0.5]


@pytest.mark.parametrize("augmentation", ["reference", "shift", "cutout"])
def test_a_still_camera_keeps_every_pixel_in_its_place(tmp_path, augmentation):
    """With keypoints a place in its frame means a place; the other camera is moved."""
    def ramp(values, demo):
        rows = np.arange(values.shape[1], dtype=np.uint8)[:, None]
        return np.broadcast_to((3 * rows + rows.T + 60)[..., None], values.shape)

    path = write_demo_file(tmp_path / "a_demo.hdf5", (5, 7, 6), image_size=36, agentview_rgb=ramp,
                           eye_in_hand_rgb=ramp)
    settings = dict(task_ids=[0], augmentation=augmentation, image_size=36, cameras=BOTH)
    train, _ = LIBERODataset.from_config({0: path}, from_flat("tiny", scenes=2, **settings))
    moved, _ = LIBERODataset.from_config({0: path}, from_flat("tiny", **settings))
    reference = train.batch([0], as_bytes=True)["observations"]

    def spread(data, camera):
        """Of the brightness within a frame; 0 where all pixels are where they were."""
        torch.manual_seed(0)
        seen = data.batch([0] * 32)["observations"][camera]
        factor = seen / (reference[camera].float() / 255)
        return factor.flatten(1).std(1).max()

    assert spread(train, "agentview_rgb") < 1e-4 < 0.01 < spread(train, "eye_in_hand_rgb")
    assert spread(moved, "agentview_rgb") > 0.01


@pytest.mark.parametrize("leading", [(), (3,), (3, 2), (3, 2, 1)])
def test_observations_are_batches_with_or_without_time(leading):
    value = torch.arange(12.0).repeat(*leading, 1)
    if len(leading) in (1, 2):
        assert read_batch({"proprio": value}, "proprio", (12,)).shape == (math.prod(leading), 12)
    else:
        with pytest.raises(ValueError, match=r"'proprio' has shape .*expected \(B, 12\) or \(B, T"):
            read_batch({"proprio": value}, "proprio", (12,))


# --- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("settings", "message"), [
    ({"sequence_length": 0}, "sequence_length=0 .*expected > 0"),
    ({"sequence_length": "2"}, "sequence_length='2' .*expected int"),
    ({"image_size": 0}, "image_size=0 .*expected > 0"),
    ({"image_size": "64"}, "image_size='64' .*expected int"),
    ({"max_demos_per_task": -1}, "max_demos_per_task=-1 .*expected >= 0"),
    ({"max_demos_per_task": [1, 2]}, r"max_demos_per_task=\[1, 2\] .*expected int"),
    ({"normalize_actions": "robust"}, "normalize_actions='robust'.*zscore"),
    ({"augmentation": "rotate"}, "augmentation='rotate'.*shift"),
    ({"augmentation": 3}, "augmentation=3 .*expected one of 'none'"),
    ({"config": {"chunk": 3}}, "config is of type dict; expected a Config"),
    ({"config": "demo"}, "config is of type str; expected a Config"),
    ({"config": Config().replace(conditioning="task_id", task_ids=[1, 2])},
     r"task_ids=\(1, 2\).*one per file, of 1"),
])
def test_settings_out_of_range_are_refused(path, settings, message):
    with pytest.raises(ValueError, match=message):
        LIBERODataset(path, **settings)


@pytest.mark.parametrize("files", [[], 3, None, [3], b"soup_demo.hdf5", {0: "soup_demo.hdf5"}])
def test_what_is_no_path_is_refused(files):
    with pytest.raises(ValueError, match="hdf5_files=.*expected a path or a list of paths"):
        LIBERODataset(files)


def test_without_a_config_all_demonstrations_are_read_plainly(tmp_path):
    path = write_demo_file(tmp_path / "a_demo.hdf5", (2,) * 60, collection={"by": "us"})
    data = LIBERODataset(path, 1, 8, False, "brightness", 0)
    assert len(data.demos) == 60 and data.split == "all"
    assert (data.augmentation, data.normalizer.mode) == ("brightness", "none")
    assert len(LIBERODataset(path, image_size=8, config=Config()).demos) == 50
    few = LIBERODataset(path, image_size=8, max_demos_per_task=3)
    assert len(few.demos) == 3 and few.augmentation == "none"
    assert few[0]["actions"].shape == (1, 7) and list(few[0]["observations"]) == ["agentview_rgb"]


def test_files_are_checked_before_anything_is_loaded(tmp_path, path):
    with pytest.raises(DemoFileError, match="milk_demo.hdf5: not found"):
        LIBERODataset([path, tmp_path / "milk_demo.hdf5"])
    with pytest.raises(DemoFileError, match="is a folder; expected a LIBERO demonstration file"):
        LIBERODataset(tmp_path)
    broken = write_demo_file(tmp_path / "x_demo.hdf5", image_size=8, ee_pos=None)
    with pytest.raises(DemoFileError, match="x_demo.hdf5, demo_0: missing obs/ee_pos"):
        LIBERODataset([path, broken])


@pytest.mark.parametrize("augmentation", schema.AUGMENTATIONS)
def test_draws_moved_at_once_are_those_of_each_batch(path, augmentation):
    """And make the same batches, also of a part that a batch is too small for."""
    data = plain(path, image_size=8, augmentation=augmentation, cameras=BOTH, chunk=2)
    for part in ((0, 1), (2, 3)):
        each = list(data.draws(5, 3, 1, part=part))
        moved = dataset._moved_at_once(each, torch.device("cpu"))
        assert len(moved) == len(each) == 3
        for one, other, batch in zip(each, moved, data.batches(5, 3, 1, part=part), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
            assert same(data.make(other), batch)
        assert bool(batch["mask"].any()) == (part == (0, 1))  # the last batch has 2 samples
        start = [draw["indices"] for draw in data.draws(5, 3, 1, part=part, start=1)]
        assert all(map(torch.equal, start, [draw["indices"] for draw in each[1:]]))
    assert dataset._moved_at_once([], torch.device("cpu")) == []


def test_crops_on_a_gpu_are_those_of_the_cpu(monkeypatch):
    """There all samples are cropped and one is chosen, because their number is not known."""
    images = torch.rand(40, 2, 24, 24, 3, generator=torch.Generator().manual_seed(0))
    drawn = augment.sample_augmentation(40, (24, 24), "reference", torch.Generator().manual_seed(1))
    assert 5 < drawn["crop"][:, 0].sum() < 20
    expected = augment.apply_augmentation(images, drawn)

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    drawn["crop"] = drawn["crop"].as_subclass(Elsewhere)
    enlarged = augment._enlarge
    monkeypatch.setattr(augment, "_enlarge", lambda frames, centre: (
        enlarged(frames, centre.as_subclass(torch.Tensor))))
    found = augment.apply_augmentation(images, drawn).as_subclass(torch.Tensor)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("augmentation", ["none", "shift", "reference", "colour"])
def test_a_batch_may_be_empty(path, augmentation):
    batch = plain([path], augmentation=augmentation).batch([])
    assert batch["observations"]["agentview_rgb"].shape[0] == len(batch["actions"]) == 0
