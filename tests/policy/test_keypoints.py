"""Scenes rendered around demonstrations, and a localizer trained on them."""

import dataclasses
import json
import shutil
from functools import partial

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from demo_files import write_demo_file

from trm_helpers import TRMPolicy, load_policy, schema
from trm_helpers.config import from_flat
from trm_helpers.data.language import embed_instruction
from trm_helpers.demos.collect import collect_demonstrations
from trm_helpers.demos.demo_files import DemoFileError, demo_names, open_demo_file
from trm_helpers.policy import keypoints
from trm_helpers.policy.keypoints import (
    cross_entropy,
    load_scenes,
    localization_errors,
    render_scenes,
    train_localizer,
    visible_keypoints,
)
from trm_helpers.policy.localizer import CROP, KeypointEncoder, Localizer, crops
from trm_helpers.sim import parallel
from trm_helpers.sim.env import LayoutError, LiberoEnv, load_task
from trm_helpers.training.train import BehaviorCloningTrainer

NAN = float("nan")


# --- the localizer -----------------------------------------------------------------------------
def test_a_keypoint_is_the_mean_of_the_softmax():
    maps = torch.full((1, 2, 4, 8), -100.0)
    maps[0, 0, 1, 6] = 0.0  # one cell: its centre
    maps[0, 1, 3, 0] = maps[0, 1, 3, 1] = 5.0  # two: between them
    torch.testing.assert_close(Localizer.points(maps)[0],
                               torch.tensor([[6.5 / 8, 1.5 / 4], [1 / 8, 3.5 / 4]]))


def test_autocast_does_not_round_keypoints():
    maps = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = Localizer.points(maps)
    torch.testing.assert_close(mixed, Localizer.points(maps), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [36, 64])
def test_maps_have_half_the_image_size(size):
    assert Localizer(3)(torch.rand(2, size, size, 3)).shape == (2, 3, size // 2, size // 2)
    assert KeypointEncoder(16, 3)(torch.rand(2, size, size, 3)).shape == (2, 16)


def test_keypoints_enter_the_policy_as_columns_and_rows_from_minus_four_to_four():
    encoder = KeypointEncoder(16, 2)
    maps = torch.full((1, 2, 4, 8), -100.0)
    maps[0, 0, 1, 6] = 0.0  # column 6.5 / 8, row 1.5 / 4
    maps[0, 1, 3, 0] = maps[0, 1, 3, 1] = 0.0  # column 1 / 8, row 3.5 / 4
    encoder.locator.forward = lambda images, task: maps
    encoder.project = torch.nn.Identity()
    torch.testing.assert_close(encoder(torch.rand(1, 8, 16, 3)),
                               torch.tensor([[2.5, -1.0, -3.0, 3.0]]))


def test_the_keypoint_depends_on_the_task():
    """Two identical squares: the first task's object is the left one, the second's the right."""
    frames, places = squares(200)
    frames[frames[..., 1] == 200] = torch.tensor([200, 30, 30], dtype=torch.uint8)  # green to red
    both = ~places.isnan().any(-1).any(-1)
    frames, places = frames[both], places[both]
    frames, places = torch.cat([frames] * 2), torch.cat([places] * 2)
    tasks = F.one_hot(torch.arange(2).repeat_interleave(len(frames) // 2), 2).float()
    left = places[..., 0].argmin(1)
    chosen = torch.where(tasks[:, 0] == 1, left, 1 - left)
    places = places[torch.arange(len(places)), chosen].unsqueeze(1)
    torch.manual_seed(0)
    localizer = Localizer(1, 2, 2)
    localizer.known.copy_(torch.eye(2))
    new = torch.arange(len(frames)) % 10 == 0
    train_localizer(localizer, frames[~new], places[~new], tasks[~new], steps=80)
    right, wrong = (localization_errors(localizer, frames[new], places[new], asked)
                    for asked in (tasks[new], 1 - tasks[new]))
    assert right.median() < 0.05
    assert wrong.median() > 0.1


def test_instructions_are_assigned_to_their_task_also_when_rephrased():
    def instructions(suite):
        return torch.stack([torch.from_numpy(embed_instruction(load_task(suite, task).language))
                            for task in range(10)])

    localizer = Localizer(1, 10, schema.LANGUAGE_DIM)
    localizer.known.copy_(instructions("libero_spatial"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert localizer.which(localizer.known).diagonal().min() > 0.95
    same = localizer.which(instructions("libero_spatial_lan")).argmax(1) == torch.arange(10)
    assert same.sum() >= 8


def test_a_policy_conditions_its_localizer_on_its_task():
    policy = TRMPolicy(from_flat(
        "tiny", cameras=[schema.STILL_CAMERA], image_size=36, conditioning="task_id", num_tasks=3,
        proprioception=False).replace(keypoints=["object"], keypoint_tasks=3).model)
    localizer = policy.encoders[schema.STILL_CAMERA].locator
    localizer.known.copy_(torch.eye(3))
    seen = {schema.STILL_CAMERA: torch.rand(1, 36, 36, 3).expand(2, -1, -1, -1),
            "task_id": torch.tensor([0, 1])}
    first, second = keypoints.predicted_keypoints(policy, seen)[:, -1]
    assert not np.allclose(first, second, atol=1e-5)
    maps = localizer(seen[schema.STILL_CAMERA], F.one_hot(torch.tensor([0, 1]), 3).float())
    torch.testing.assert_close(torch.from_numpy(np.stack([first, second])),
                               localizer.points(maps).detach())


def test_cross_entropy_is_shared_by_the_cells_around_a_position():
    maps = torch.zeros(1, 1, 2, 4)
    maps[0, 0, 0, 1] = np.log(3.0)  # shares: 0.3 there, 0.1 in the seven others
    at = {"its centre": ([1.5 / 4, 0.25], -np.log(0.3)),
          "a quarter of the way to the next": ([1.75 / 4, 0.25],
                                               -0.75 * np.log(0.3) - 0.25 * np.log(0.1)),
          "the middle of four": ([2 / 4, 0.5], -0.25 * np.log(0.3) - 0.75 * np.log(0.1)),
          "beyond the last centre": ([1.0, 1.0], -np.log(0.1))}
    for name, (place, expected) in at.items():
        found = cross_entropy(maps, torch.tensor([[place]], dtype=torch.float32))
        assert found.item() == pytest.approx(expected, abs=1e-5), name


def test_a_keypoint_outside_the_frame_has_no_gradient():
    maps = torch.randn(1, 2, 2, 4, requires_grad=True)
    cross_entropy(maps, torch.tensor([[[0.4, 0.4], [NAN, NAN]]])).backward()
    assert maps.grad[0, 0].abs().sum() > 0 and (maps.grad[0, 1] == 0).all()
    assert cross_entropy(maps, torch.full((1, 2, 2), NAN)).item() == 0


def squares(count, seed=0, size=36):
    """Grey frames with a red and a green square, and the centres; every fifth has no green."""
    generator = np.random.default_rng(seed)
    frames = np.full((count, size, size, 3), 90, dtype=np.uint8)
    corners = generator.integers(0, size - 5, (count, 2, 2))
    for frame, ((x, y), (u, v)), number in zip(frames, corners, range(count), strict=True):
        frame[y:y + 6, x:x + 6] = (200, 30, 30)
        if number % 5:
            frame[v:v + 6, u:u + 6] = (30, 200, 30)
    places = (corners + 3.0) / size
    places[::5, 1] = NAN
    return torch.from_numpy(frames), torch.from_numpy(places).float()


@pytest.fixture(scope="module")
def trained_on_squares():
    torch.manual_seed(0)
    localizer = Localizer(2)
    train_localizer(localizer, *squares(300), steps=60)
    return localizer


def test_a_trained_localizer_finds_the_squares_of_new_frames(trained_on_squares):
    distance = localization_errors(trained_on_squares, *squares(100, seed=1))
    assert distance[:, 0].median() < 0.03  # a pixel of 36; by chance it would be 0.3
    assert distance[:, 1].nanmedian() < 0.03 and distance[::5, 1].isnan().all()


def test_errors_are_measured_on_frames_scaled_as_in_control():
    torch.manual_seed(0)
    localizer, (frames, places) = Localizer(2), squares(20, seed=2)
    with torch.no_grad():
        localizer.maps[-1].weight *= 1000  # maps that depend on the image
    points = localizer.points(localizer(frames.float() / 255)).detach()
    torch.testing.assert_close(localization_errors(localizer, frames, places),
                               (points - places).norm(dim=-1), equal_nan=True)


def test_the_same_seed_gives_the_same_weights():
    trained = []
    for _ in range(2):
        torch.manual_seed(0)
        localizer = Localizer(2)
        train_localizer(localizer, *squares(100), steps=5)
        trained.append(localizer.state_dict())
    for name, weight in trained[0].items():
        assert torch.equal(weight, trained[1][name]), name


# --- looking again ------------------------------------------------------------------------------
def test_a_crop_holds_the_pixels_around_the_estimate():
    images = torch.rand(2, 40, 48, 3)
    estimates = torch.tensor([[[20 / 48, 14 / 40], [0.0, 1.0]], [[30 / 48, 25 / 40], [0.5, 0.5]]])
    found = crops(images, estimates)  # (B, K, 3, 24, 24)
    assert found.shape == (2, 2, 3, CROP, CROP)
    torch.testing.assert_close(found[0, 0].permute(1, 2, 0), images[0, 2:26, 8:32])
    torch.testing.assert_close(found[1, 0].permute(1, 2, 0), images[1, 13:37, 18:42])
    corner = images[0, -1, 0].expand(CROP // 2, CROP // 2, 3)  # outside: the border's pixels
    torch.testing.assert_close(found[0, 1].permute(1, 2, 0)[CROP // 2:, :CROP // 2], corner)


def test_each_look_sees_the_crop_at_the_last_estimate():
    localizer, seen = Localizer(1, looks=3), []

    def step(crop, which, state):
        seen.append(crop)
        return torch.tensor([[[4.0, -2.0]]]), state

    localizer.look.forward = step
    images = torch.rand(1, 64, 64, 3)
    found = localizer.locate(images)
    assert found.shape == (1, 4, 1, 2)
    torch.testing.assert_close(found.diff(dim=1)[0, :, 0], torch.tensor([[4.0, -2.0]] * 3) / 64)
    for crop, estimate in zip(seen, found[:, :3].unbind(1), strict=True):
        torch.testing.assert_close(crop, crops(images, estimate))


def test_all_looks_share_their_weights_and_the_first_look_sees_half_the_size():
    two, six = Localizer(3, looks=2), Localizer(3, looks=6)
    assert [w.shape for w in two.parameters()] == [w.shape for w in six.parameters()]
    assert two(torch.rand(1, 64, 64, 3)).shape == (1, 3, 16, 16)
    more = two.look_again(torch.rand(1, 64, 64, 3), None, torch.rand(1, 3, 2), 9)
    assert more.shape == (1, 9, 3, 2)
    with pytest.raises(ValueError, match="looks=1 is not valid for a localizer trained with"):
        Localizer(3).look_again(torch.rand(1, 64, 64, 3), None, torch.rand(1, 3, 2), 1)


@pytest.mark.parametrize("change", [
    {"keypoints": ["a", "b", "c"]}, {"keypoints": "ab"}, {"keypoints": None},
    {"looks": 0}, {"looks": "6"}, {"looks": -1}, {"looks": None}])
def test_a_saved_localizer_is_loaded_or_named_as_damaged(tmp_path, change):
    torch.manual_seed(0)
    localizer, images = Localizer(2, 3, 4, looks=2), torch.rand(1, 64, 64, 3)
    keypoints.save_localizer(tmp_path, localizer, ["a", "b"], {"scenes": 9})
    names, again = keypoints.load_localizer(tmp_path)
    assert names == ("a", "b")
    torch.testing.assert_close(again.locate(images, torch.eye(4)[:1]),
                               localizer.locate(images, torch.eye(4)[:1]))
    said = json.loads((tmp_path / "scenes.json").read_text())
    (tmp_path / "scenes.json").write_text(json.dumps({**said, **change}))
    with pytest.raises(ValueError, match="does not hold a localizer"):
        keypoints.load_localizer(tmp_path)


def test_training_the_looks_leaves_the_first_look_as_it_is():
    trained = []
    for look_steps in (1, 3):
        torch.manual_seed(0)
        localizer = Localizer(2, looks=3)
        train_localizer(localizer, *squares(100, size=64), steps=3, look_steps=look_steps)
        trained.append(localizer.state_dict())
    for name, weight in trained[1].items():
        assert torch.equal(weight, trained[0][name]) != name.startswith("look."), name


def test_looks_learn_to_correct_the_first_look():
    torch.manual_seed(0)
    localizer, new = Localizer(2, looks=3), squares(200, size=64, seed=1)
    train_localizer(localizer, *squares(400, size=64), steps=40, look_steps=100)
    frames, places = new
    with torch.no_grad():
        trail = localizer.locate(frames.float() / 255)
    by_look = (trail - places.unsqueeze(1)).norm(dim=-1).nanquantile(0.5, dim=0).mean(-1)
    assert by_look[-1] < 0.5 * by_look[0], by_look
    torch.testing.assert_close(localization_errors(localizer, *new),
                               (trail[:, -1] - places).norm(dim=-1), equal_nan=True)


def test_the_task_selects_what_a_look_corrects_towards():
    """Two squares in one crop; the task's number says which of them is the object."""
    frames, places = squares(600, size=64)
    near = (places[:, 0] - places[:, 1]).norm(dim=-1) < 14 / 64  # not so where one is absent
    images, places = frames[near].float() / 255, places[near]
    which = torch.arange(len(images)) % 2
    wanted, between = places[torch.arange(len(images)), which].unsqueeze(1), places.mean(1, True)
    torch.manual_seed(0)
    localizer = Localizer(1, 2, 2, looks=2)
    localizer.known.copy_(torch.eye(2))
    tasks = F.one_hot(which, 2).float()
    optimizer = torch.optim.Adam(localizer.look.parameters(), 3e-3)
    for _ in range(150):
        found = localizer.look_again(images, tasks, between, 2)
        optimizer.zero_grad()
        (found - wanted.unsqueeze(1)).abs().mean().backward()
        optimizer.step()
    error, of_the_other = ((localizer.look_again(images, asked, between, 2)[:, -1] - wanted)
                           .norm(dim=-1).mean() for asked in (tasks, 1 - tasks))
    assert error < 0.5 * of_the_other, (error, of_the_other)


# --- scenes as files, and a run --------------------------------------------------------------
def test_image_positions_are_of_the_stored_frame_upside_down():
    """Pixel centres of an upright 128 x 128 image; the last lies outside."""
    class Camera:
        image_size = 128

        def project(self, positions, camera):
            assert camera == schema.STILL_CAMERA
            return positions[:, :2].copy()

    pixels = np.array([[0.0, 0.0, 9], [31.5, 95.5, 9], [63.5, 10.5, 9], [20.0, 130.0, 9]])
    places = keypoints.image_positions(Camera(), pixels)
    half = 0.5 / 128
    np.testing.assert_allclose(places, [[half, 1 - half], [0.25, 0.25], [0.5, 1 - 11 / 128],
                                        [NAN, NAN]])


def write_scenes(path, frames, places, names=("red", "green")):
    np.savez(path, frames=frames, places=places, keypoints=np.array(names))
    return path


def test_scenes_of_several_tasks_are_read_together(tmp_path):
    frames, places = squares(3)
    first = write_scenes(tmp_path / "a.npz", frames, places)
    second = write_scenes(tmp_path / "b.npz", frames, places.flip(1), ("blue", "red"))
    never = np.full((3, 1, 2), NAN)
    third = write_scenes(tmp_path / "c.npz", frames, never, ("behind",))
    assert visible_keypoints({0: [first], 1: [second, third]}) == ["blue", "green", "red"]
    together, where, told = load_scenes({7: [first], 9: [second]}, ["blue", "green", "red"], 18,
                                        torch.eye(2))
    assert together.shape == (6, 18, 18, 3) and together.dtype == torch.uint8
    torch.testing.assert_close(where[:3, 1:], places.flip(1), equal_nan=True)
    assert where[:3, 0].isnan().all() and where[3:, 1].isnan().all()
    torch.testing.assert_close(where[3:, 0], places[:, 1], equal_nan=True)
    assert told.tolist() == [[1, 0]] * 3 + [[0, 1]] * 3
    assert load_scenes({7: [first]}, ["red"], 18)[2] is None


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_damaged_scenes_are_named(tmp_path, kept):
    path = write_scenes(tmp_path / "a.npz", *squares(3))
    content = path.read_bytes()
    path.write_bytes(content[:kept if isinstance(kept, int) else int(kept * len(content))])
    for read in (visible_keypoints, lambda scenes: load_scenes(scenes, ["red"], 18)):
        with pytest.raises(ValueError, match=r"a.npz is damaged .*remove it, and its scenes"):
            read({0: [path]})


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    """Squares in place of the simulator and short training; the list of calls."""
    asked = []

    def draw(suite, task_id, demos, per_demo):
        asked.append((suite, task_id, per_demo, sum(demos.values(), [])))
        path = tmp_path / f"{len(asked)}.npz"
        return [write_scenes(path, *squares(60, seed=len(asked[-1][3])))]

    monkeypatch.setattr(keypoints, "render_scenes", draw)
    monkeypatch.setattr(train_localizer, "__kwdefaults__", {
        **train_localizer.__kwdefaults__, "steps": 3, "look_steps": 3})
    return asked


@pytest.mark.parametrize("looks", [0, 2])
def test_a_run_trains_its_localizer_first(small_run, rendered, tmp_path, looks):
    trainer = small_run(scenes=20, looks=looks, image_size=40)
    encoder = trainer.policy.encoders[schema.STILL_CAMERA]
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    trainer.fit()
    assert [ask[:3] for ask in rendered] == [("libero_object", 0, 20)] * 2
    train, val = ({name for name in ask[3]} for ask in rendered)
    assert len(train) == 4 and len(val) == 1 and not train & val
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, before[name]) == name.startswith("locator"), name
    policy = load_policy(trainer.run)
    assert policy.config.keypoints == ("green", "red")
    known = json.loads((trainer.run / "scenes.json").read_text())
    assert known["keypoints"] == ["green", "red"] and known["measured_on"] == 60
    held_out = load_scenes({0: [tmp_path / "2.npz"]}, ["green", "red"], 40)[:2]
    errors = localization_errors(policy.encoders[schema.STILL_CAMERA].locator, *held_out).numpy()
    for name, distances in zip(["green", "red"], errors.T, strict=True):
        expected = np.nanquantile(distances, [0.5, 0.9]).tolist()
        assert known["errors"][name] == pytest.approx(expected, abs=1e-4), name
    seen = {schema.STILL_CAMERA: torch.rand(2, 40, 40, 3), "proprio": torch.zeros(2, 12)}
    torch.testing.assert_close(policy(seen), load_policy(trainer.run, "best")(seen))
    found = keypoints.predicted_keypoints(policy, seen)
    assert found.shape == (2, 1 + looks, 2, 2)
    as_bytes = {**seen, "agentview_rgb": (255 * seen["agentview_rgb"]).round().to(torch.uint8)}
    assert np.abs(keypoints.predicted_keypoints(policy, as_bytes) - found).max() < 0.01
    assert any(name.startswith("locator.look.") for name in before) == bool(looks)


def test_instructions_that_the_localizer_would_mix_are_refused(rendered, tmp_path, monkeypatch):
    """LIBERO-90 has the left bowl on the right bowl, and its mirror: cosine similarity 0.9993."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # of which PyTorch would warn
    config = from_flat("demo", suite="libero_90", task_ids=[0, 63, 64], scenes=20,
                       conditioning="language")
    with pytest.raises(ValueError, match=r"task_ids=\[63, 64\] of libero_90 apart .*0.9993"):
        keypoints.trained_localizer(tmp_path, config, {"files": []}, {"files": []})
    assert not rendered
    same = config.replace(task_ids=[74, 79])  # one instruction in two scenes
    files = {"files": [{"file": "a", "demos": ["demo_0"]}] * 2}
    names, localizer = keypoints.trained_localizer(tmp_path, same, files, files)
    torch.testing.assert_close(localizer.which(localizer.known), torch.full((2, 2), 0.5))


@pytest.mark.parametrize("change", [
    lambda demo: demo.__delitem__("states"), lambda demo: None])
def test_scenes_need_states_and_the_model(tmp_path, change):
    path = write_demo_file(tmp_path / "soup_demo.hdf5", image_size=4)
    with h5py.File(path, "a") as file:
        change(file["data/demo_1"])
    with pytest.raises(DemoFileError, match="soup_demo.hdf5, demo_1: scenes need the data set "
                                            "states and the attribute model_file"):
        render_scenes("libero_object", 0, {str(path): ["demo_1"]}, 2)


def test_scenes_and_their_localizer_stop_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setenv("TRM_STOP_AT", "0")
    monkeypatch.setenv("TRM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(parallel, "renderer", lambda: None)
    path = write_demo_file(tmp_path / "soup_demo.hdf5", image_size=4)
    with h5py.File(path, "a") as file:
        file["data/demo_1"].attrs["model_file"] = "<mujoco/>"
    with pytest.raises(TimeoutError, match="scenes of 1 of 1 demonstrations are missing"):
        render_scenes("libero_object", 0, {str(path): ["demo_1"]}, 2)
    with pytest.raises(TimeoutError, match="before the localizer is trained"):
        train_localizer(Localizer(2), *squares(4), steps=1)


def test_scenes_without_a_localizer_are_refused_before_the_run_is_touched(trainer):
    config = from_flat("tiny", cameras=[schema.STILL_CAMERA], scenes=20)
    with pytest.raises(ValueError, match="scenes=20 needs a localizer; expected localizer"):
        BehaviorCloningTrainer.from_config(config, {}, trainer.run)


def test_a_resumed_run_keeps_its_localizer(small_run, rendered, monkeypatch):
    whole = small_run("whole", scenes=20).fit()
    small_run("parts", scenes=20, max_minutes=1e-9).fit()

    def again(*_, **__):
        raise AssertionError("trained twice")

    monkeypatch.setattr(keypoints, "train_localizer", again)
    rows = small_run("parts", resume=True, scenes=20).fit()
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in whole]


def test_a_localizer_with_another_number_of_looks_is_refused_before_training(small_run, rendered):
    small = small_run("small", scenes=20)
    settings = dict(scenes=20, looks=2, image_size=40)
    run = small_run("large", **settings).run
    for name in ("locator.safetensors", "scenes.json"):
        shutil.copy(small.run / name, run)
    with pytest.raises(ValueError, match="locator.safetensors looks again 0 times; .* looks=2"):
        small_run("large", **settings)


def test_a_localizer_of_other_demonstrations_is_refused(small_run, rendered, tmp_path):
    """Its training was interrupted before the first epoch; since then ``demo_dir`` differs."""
    run = small_run("run", scenes=20).run
    assert len(small_run("run", scenes=20).fit()) == 2 and len(rendered) == 2  # the same ones
    for name in ("last.safetensors", "metrics.jsonl"):
        (run / name).unlink()
    write_demo_file(tmp_path / "soup_demo.hdf5", (6, 7, 8, 9, 10), image_size=36,
                    actions=lambda actions, demo: actions * [*6 * [0.9], 1])
    with pytest.raises(ValueError, match="locator.safetensors was trained on scenes of other dem"):
        small_run("run", scenes=20)


# --- the simulator ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    return collect_demonstrations("libero_object", 0, 1, tmp_path_factory.mktemp("scripted"),
                                  workers=0, frame_stride=16)


@pytest.mark.sim
def test_scenes_show_randomised_layouts_with_image_positions(demonstration, monkeypatch, capsys):
    monkeypatch.setattr(keypoints, "run_jobs", partial(parallel.run_jobs, workers=0))
    with open_demo_file(demonstration) as file:
        names = demo_names(file)
    [path] = render_scenes("libero_object", 0, {str(demonstration): names}, 8)
    written = path.stat().st_mtime_ns
    with np.load(path) as scenes:
        frames, places, names_of = scenes["frames"], scenes["places"], list(scenes["keypoints"])
    assert frames.shape == (8, 128, 128, 3) and frames.dtype == np.uint8
    assert names_of == ["object", "target", "hand"]  # the goal's objects, no others
    with open_demo_file(demonstration) as file, LiberoEnv("libero_object", 0) as env:
        env.reset()
        demo = file[schema.DATA_GROUP][names[0]]
        env.set_fixtures(demo.attrs["model_file"])
        env.set_state(demo["states"][0])
        [basket] = keypoints.image_positions(env, env.object_position("basket_1")[None])
    shift = np.linalg.norm(places[:, names_of.index("target")] - basket, axis=1)
    as_shown = shift < 0.005  # of the frame's side
    assert 0 < as_shown.sum() < len(shift)  # about half keep the layout of the demonstration
    assert shift[~as_shown].max() > 0.05
    assert render_scenes("libero_object", 0, {str(demonstration): names}, 8) == [path]
    assert path.stat().st_mtime_ns == written
    assert "version" not in capsys.readouterr().out
    with np.load(path) as scenes:
        kept = {name: scenes[name] for name in scenes if name != "version"}
    np.savez(path, **kept)  # as the code before versions wrote it
    written = path.stat().st_mtime_ns
    assert render_scenes("libero_object", 0, {str(demonstration): names}, 8) == [path]
    assert f"{path.name} rendered by another version" in capsys.readouterr().out
    other = render_scenes("libero_object", 0, {str(demonstration): names}, 2)
    assert other != [path] and path.stat().st_mtime_ns == written


@pytest.mark.sim
def test_an_image_position_is_where_the_frame_changes_without_the_object():
    with LiberoEnv("libero_object", 0) as env:
        there = env.reset(init_state=0)[schema.STILL_CAMERA].astype(int)
        [place] = keypoints.image_positions(env, env.object_position("cream_cheese_1")[None])
        joint = env.raw.get_object("cream_cheese_1").joints[-1]
        position = env.sim.data.get_joint_qpos(joint).copy()
        position[2] -= 5
        env.sim.data.set_joint_qpos(joint, position)
        gone = env.set_state(env.state())[schema.STILL_CAMERA].astype(int)
        [below] = keypoints.image_positions(env, env.object_position("cream_cheese_1")[None])
    rows, columns = np.nonzero(np.abs(there - gone).sum(-1) > 30)
    assert len(rows) > 20
    centre = np.array([np.median(columns) + 0.5, np.median(rows) + 0.5]) / 128
    np.testing.assert_allclose(place, centre, atol=0.03)
    assert np.isnan(below).all()


@pytest.mark.sim
def test_objects_moved_stay_in_place_and_a_step_without_room_is_replaced(demonstration,
                                                                         monkeypatch):
    """In the last steps the soup lies in the basket."""
    with open_demo_file(demonstration) as file, LiberoEnv("libero_object", 0) as env:
        env.reset()
        demo = file[schema.DATA_GROUP][demo_names(file)[0]]
        env.set_fixtures(demo.attrs["model_file"])
        env.set_state(demo["states"][-1])
        soup, basket = (env.object_position(name).copy() for name in ("alphabet_soup_1",
                                                                      "basket_1"))
        from trm_helpers.sim.layouts import randomise_layout

        randomise_layout(env, np.random.default_rng(0), {"alphabet_soup_1"})
        np.testing.assert_allclose(env.object_position("alphabet_soup_1"), soup)
        assert np.linalg.norm(env.object_position("basket_1") - basket) > 0.01

        rooms = iter([False, True, True])

        def randomise(*arguments):
            if not next(rooms, False):
                raise LayoutError("no free places")
            randomise_layout(*arguments)

        monkeypatch.setattr(keypoints, "randomise_layout", randomise)
        frames, places = keypoints.sample_scenes(env, demo["states"][:], 2,
                                                 np.random.default_rng(0))
        assert len(frames) == len(places) == 2 and np.isfinite(places).all()
        with pytest.raises(LayoutError, match="no free places"):
            keypoints.sample_scenes(env, demo["states"][:], 2, np.random.default_rng(0))


def test_keypoints_need_the_agent_view():
    with pytest.raises(ValueError, match=r"cameras=.*agentview_rgb among them, which the"):
        from_flat("tiny", scenes=2, cameras=["eye_in_hand_rgb"])
    with pytest.raises(ValueError, match="image_size=66.*multiple of 4 with keypoints"):
        from_flat("tiny").replace(keypoints=["plate_1"], image_size=66)
    with pytest.raises(ValueError, match="keypoints=.*none with scenes"):
        from_flat("tiny").replace(keypoints=["plate_1"], scenes=2)
    model = from_flat("tiny").replace(keypoints=["plate_1"]).model
    assert dataclasses.replace(model, keypoints=()).keypoints == ()
