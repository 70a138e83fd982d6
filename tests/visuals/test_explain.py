"""Explanations of small policies whose every output is known, then of the real one."""

import json
import math
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from demo_files import action_at, data_set, write_demo_file
from torch import nn

from trm_helpers import schema
from trm_helpers.config import ModelConfig
from trm_helpers.data.normalize import ActionNormalizer
from trm_helpers.policy.model import TRMPolicy
from trm_helpers.visuals import explain, unrolled

matplotlib.use("agg")
CAMERA = "agentview_rgb"


def scaled() -> ActionNormalizer:
    """Arm actions a = 2 n + 1; the gripper as it is."""
    return ActionNormalizer.from_dict({"mode": "zscore", "offset": [1.0] * 6, "scale": [2.0] * 6})


class FakePolicy(nn.Module):
    """At depth d the arm's numbers are the image's mean / d, the gripper +1; states by hand."""

    def __init__(self, chunk: int = 1, normalizer: ActionNormalizer | None = None):
        super().__init__()
        self.config = SimpleNamespace(
            chunk=chunk, cameras=(CAMERA,), num_recursions=2, halting="adaptive"
        )
        self.normalizer = normalizer or ActionNormalizer("none")
        self.weight = nn.Parameter(torch.ones(()))
        self.states = [[0.0, 5.0], [3.0, 4.0], [3.0, 4.0]]
        self.modes = set()

    def forward(self, observations, num_recursions=None, return_all_states=False):
        self.modes.add(self.training)
        images = observations[CAMERA].flatten(0, -4)
        arm = images.mean(dim=(1, 2, 3)) / (num_recursions or self.config.num_recursions)
        actions = torch.cat([arm[:, None].expand(-1, 6), torch.ones(len(images), 1)], dim=1)
        if self.config.chunk > 1:
            actions = torch.stack([actions] + [actions + 9] * (self.config.chunk - 1), dim=1)
        self.last_depth = (images.mean(dim=(1, 2, 3)) > 0.5).long() + 1
        if return_all_states:
            return actions, [torch.tensor([state] * len(images)) for state in self.states]
        return actions


class FakeDataset:
    """Sample i: a grey image of value i / 10, arm targets i / 20 (normalised), gripper -1, +1."""

    augmentation = "shift"

    def __init__(self, count: int = 4, chunk: int = 1, normalizer: ActionNormalizer | None = None):
        self.count, self.chunk = count, chunk
        self.normalizer = normalizer or ActionNormalizer("none")

    def __len__(self):
        return self.count

    def batch(self, indices, device="cpu"):
        assert self.augmentation == "none", "explanations look at images as they are"
        index = torch.tensor(indices, dtype=torch.float32)
        images = (index / 10).view(-1, 1, 1, 1, 1).expand(-1, 1, 4, 4, 3)
        actions = (index / 20).view(-1, 1, 1).repeat(1, 1, 7)
        actions[..., 6] = torch.where(index % 2 == 0, -1.0, 1.0)[:, None]
        if self.chunk > 1:
            actions = torch.stack([actions] + [actions - 9] * (self.chunk - 1), dim=2)
        return {"observations": {CAMERA: images}, "actions": actions, "mask": None}


# --- predictions ---------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 3])
def test_predictions_that_are_right_but_for_the_gripper(chunk):
    policy, dataset = FakePolicy(chunk), FakeDataset(4, chunk)
    report, figure = explain.analyze_model_predictions(policy, dataset, num_samples=3)
    assert report["count"] == 4
    # arm exact: i / 10 / 2; gripper wrong by 2 for two of four samples
    expected = {name: 0.0 for name in schema.ACTION_NAMES[:6]} | {"gripper": 1.0}
    assert report["mean_absolute_error"] == pytest.approx(expected, abs=1e-6)
    assert report["mse"] == pytest.approx(2 * 4 / (4 * 7))
    assert report["gripper_accuracy"] == 0.5
    ratios = {name: 1.0 for name in schema.ACTION_NAMES[:6]} | {"gripper": 0.0}
    assert report["std_ratio"] == pytest.approx(ratios, abs=1e-6)
    assert len(report["samples"]) == 3
    for sample in report["samples"]:
        wrong = sample["target"][6] < 0
        assert sample["mse"] == pytest.approx(4 / 7 if wrong else 0, abs=1e-6)
    json.dumps(report, allow_nan=False)
    pictures = [axes for axes in figure.axes if axes.images]
    shown = sorted(float(axes.images[0].get_array()[0, 0, 0]) for axes in pictures)
    assert shown == pytest.approx(sorted(2 * s["target"][0] for s in report["samples"]))


def test_predictions_are_compared_in_the_environments_units():
    # the policy's own normaliser and the data set's may differ: here 2 n + 1 against n
    policy, dataset = FakePolicy(normalizer=scaled()), FakeDataset(4)
    report, _ = explain.analyze_model_predictions(policy, dataset)
    # 2 * i / 20 + 1 - i / 20 = 1 + i / 20, for i = 0 ... 3
    assert report["mean_absolute_error"]["dx"] == pytest.approx(1 + 1.5 / 20)
    assert report["std_ratio"]["dx"] == pytest.approx(2)
    both = explain.analyze_model_predictions(policy, FakeDataset(4, normalizer=scaled()))[0]
    assert both["mean_absolute_error"]["dx"] == pytest.approx(0, abs=1e-6)


def test_predictions_of_many_samples():
    report, figure = explain.analyze_model_predictions(
        FakePolicy(), FakeDataset(200), num_samples=2, num_errors=150
    )
    assert (report["count"], len(report["samples"])) == (150, 2)
    assert report["mean_absolute_error"]["dx"] == pytest.approx(0, abs=1e-5)
    assert len([axes for axes in figure.axes if axes.images]) == 2


def test_predictions_keep_the_policys_mode_and_the_data_sets_augmentation():
    policy, dataset = FakePolicy(), FakeDataset()
    first = explain.analyze_model_predictions(policy, dataset, num_samples=2, seed=3)[0]
    assert policy.modes == {False} and policy.training
    assert dataset.augmentation == "shift"
    again = explain.analyze_model_predictions(policy, dataset, num_samples=2, seed=3)[0]
    assert first == again


def test_spread_of_targets_that_do_not_vary_is_none():
    targets, predictions = np.zeros((3, 7)), np.eye(3, 7)
    report = explain.prediction_report(targets, predictions, 1)
    assert report["std_ratio"]["dx"] is None
    assert report["samples"] == [
        {"target": [0.0] * 7, "prediction": [1.0] + [0.0] * 6, "mse": pytest.approx(1 / 7)}
    ]


def test_predictions_show_pictures_upright():
    image = np.zeros((4, 4, 3))
    image[0] = 1  # stored first, the picture's last row
    report = explain.prediction_report(np.zeros((1, 7)), np.ones((1, 7)), 1)
    picture = explain.plot_predictions([image], report).axes[0].images[0].get_array()
    assert picture[-1].min() == 1 and picture[:-1].max() == 0


def test_a_sample_is_needed():
    with pytest.raises(ValueError, match="num_samples=0"):
        explain.depth_curve(FakePolicy(), FakeDataset(), num_samples=0)
    with pytest.raises(ValueError, match="num_samples=0"):
        explain.analyze_model_predictions(FakePolicy(), FakeDataset(), num_samples=0)


# --- recursion -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "norms", "word"),
    [
        ([5.0, 0.5], [10, 10, 10], "converged"),  # 0.5 is 5 % of 10
        ([5.0, 0.51], [10, 10, 10], "settling"),
        ([5.0, 3.0, 4.0], [10, 10, 10, 10], "drifting"),
        ([5.0], [10, 10], "drifting"),
        ([5.0, 7.5], [10, 10, 10], "drifting"),  # 1.5 times the first
        ([5.0, 7.6], [10, 10, 10], "diverging"),
        ([5.0, 5.0], [10, 15, 20], "drifting"),  # twice the first norm
        ([5.0, 5.0], [10, 15, 21], "diverging"),
        ([5.0, 0.1], [10, 15, 21], "converged"),
        ([0.0], [10, 10], "converged"),
        ([5.0, math.nan], [10, 10, 10], "diverging"),
        ([5.0, 5.0], [10, 10, math.inf], "diverging"),
    ],
)
def test_recursion_verdict(changes, norms, word):
    found, sentence = unrolled.recursion_verdict(changes, norms)
    assert found == word
    assert word in sentence


def test_recursion_verdict_gives_its_numbers():
    assert unrolled.recursion_verdict([6, 2], [8, 12, 10])[1] == (
        "The recursion is settling but has not converged. Recursion 2 changes the state by 20.0 % "
        "of its norm, the first by 50.0 %."
    )


@pytest.mark.parametrize("norms", [[1.0], [1.0, 1.0, 1.0]])
def test_recursion_verdict_refuses_lists_that_do_not_fit(norms):
    with pytest.raises(ValueError, match=r"expected N >= 1 changes, N \+ 1 norms"):
        unrolled.recursion_verdict([1.0], norms)


def test_recursive_states_by_hand():
    batch = FakeDataset()
    batch.augmentation = "none"
    report, figure = unrolled.visualize_recursive_states(
        FakePolicy(), batch.batch([0, 1])["observations"]
    )
    assert report["norms"] == pytest.approx([5, 5, 5])
    assert report["changes"] == pytest.approx([math.sqrt(10), 0])  # (0, 5) -> (3, 4) -> (3, 4)
    assert report["verdict"] == "converged"
    heat, norm, change = figure.axes[:3]
    np.testing.assert_allclose(heat.images[0].get_array(), [[0, 3, 3], [5, 4, 4]])
    np.testing.assert_allclose(norm.lines[0].get_ydata(), report["norms"])
    np.testing.assert_allclose(change.lines[0].get_xydata(), [[1, math.sqrt(10)], [2, 0]])


# --- depth and halting ---------------------------------------------------------------------------
def test_moments_say_how_the_action_forms():
    """Targets are half of the image's mean, predictions the mean / depth; the gripper is +1."""
    data = FakeDataset(4)
    moments, images = unrolled.recursion_moments(FakePolicy(), data, {2: "first", 3: "last"})
    assert [moment["title"] for moment in moments] == ["first", "last"]
    one, two = moments[0]["recursions"]
    assert moments[0]["demonstrated"] == pytest.approx([0.1] * 6 + [-1])
    assert one["action"] == pytest.approx([0.2] * 6 + [1])
    assert two["action"] == pytest.approx([0.1] * 6 + [1])
    # states (0, 5), (3, 4), (3, 4): the first step moves by sqrt(10) of a norm of 5
    assert (one["change"], two["change"]) == pytest.approx((math.sqrt(10) / 5, 0))
    assert one["sentence"] == (
        "After recursion 1 of 2, the arm's movement differs from the demonstrated one by 0.10 on "
        "average; the gripper command is wrong. This recursion changed the state by 63 % of its "
        "norm.")
    assert "by 0.00 on average, 0.10 less than after the previous recursion; " in two["sentence"]
    assert two["sentence"].endswith("by 0 % of its norm: it has almost stopped changing.")
    assert "the gripper command is right" in moments[1]["recursions"][0]["sentence"]
    assert images.shape == (256, 512, 3) and images.dtype == np.uint8
    assert (images[:, 0].mean().round(), images[:, -1].mean().round()) == (51, 76)
    assert data.augmentation == "shift"


def test_depth_curve_by_hand():
    curve = explain.depth_curve(FakePolicy(), FakeDataset(4), depths=(1, 2, 4))
    # |i / 10 / d - i / 20| averaged over i = 0 ... 3 (mean 1.5)
    assert curve["arm_error"] == pytest.approx([1.5 / 20, 0, 1.5 / 40], abs=1e-6)
    spread = 1.96 * np.std([0, 1, 2, 3]) / 20 / np.sqrt(4)  # at depth 1
    np.testing.assert_allclose(curve["arm_interval"][:2],
                               [[1.5 / 20 - spread, 1.5 / 20 + spread], [0, 0]], atol=1e-6)
    assert curve["gripper_accuracy"] == [0.5, 0.5, 0.5]
    assert curve["gripper_interval"][0] == pytest.approx((0.15, 0.85), abs=0.01)  # 2 of 4
    gripper = 2 * 4 / (4 * 7)
    arm = 6 / 7 * 14 / 4  # mean of i^2 = 14 / 4
    assert curve["mse"] == pytest.approx([gripper + arm / 400, gripper, gripper + arm / 1600])
    assert (curve["depths"], curve["trained_depth"]) == ([1, 2, 4], 2)
    # at the trained depth of 2 there is no error: the difference is the error itself
    np.testing.assert_allclose(curve["arm_gap"], curve["arm_error"], atol=1e-6)
    np.testing.assert_allclose(curve["arm_gap_interval"], curve["arm_interval"], atol=1e-6)
    arm_axes, gap_axes, gripper_axes = explain.plot_depth_curve(curve).axes
    np.testing.assert_allclose(arm_axes.lines[0].get_ydata(), curve["arm_error"])
    assert list(arm_axes.lines[1].get_xdata()) == [2, 2]
    for axes, values in ((gap_axes, curve["arm_gap"]), (gripper_axes, [0.5, 0.5, 0.5])):
        assert axes.containers[0].lines[0].get_ydata().tolist() == values


def test_differences_between_depths_are_paired():
    # (i / 10 / 1 - i / 20) - (i / 10 / 3 - i / 20): the errors of depth 1 and 3 vary together
    policy, dataset = FakePolicy(), FakeDataset(4)
    policy.config.num_recursions = 3
    curve = explain.depth_curve(policy, dataset)
    assert curve["depths"] == [1, 2, 3, 4, 8, 16]
    one, three = (np.abs(np.arange(4) / 10 / depth - np.arange(4) / 20) for depth in (1, 3))
    assert curve["arm_gap"][0] == pytest.approx(np.mean(one - three))
    half = 1.96 * np.std(one - three) / 2
    assert curve["arm_gap_interval"][0] == pytest.approx(
        [np.mean(one - three) - half, np.mean(one - three) + half], rel=1e-5)
    assert curve["arm_gap_interval"][2] == [0, 0]
    said = explain.depth_sentence(curve)
    assert f"depth 1 {np.mean(one - three):+.4f} (" in said and "depth 3" not in said
    assert "arm_gap" not in explain.depth_curve(policy, dataset, [1, 2])


def test_recursion_steps_are_of_one_sample():
    policy, dataset = FakePolicy(), FakeDataset(4)
    steps = unrolled.recursion_steps(policy, dataset, 3)
    assert steps["states"].shape == (3, 2) and steps["actions"].shape == (2, 7)
    np.testing.assert_allclose(steps["actions"][:, 0], [3 / 10, 3 / 20], rtol=1e-5)
    assert steps["target"][0] == pytest.approx(3 / 20)
    figure = unrolled.plot_recursion_steps(steps)
    assert [axes.get_title() for axes in figure.axes if "change" in axes.get_title()] == [
        "recursion 1\nchange 63.2 %", "recursion 2\nchange 0.0 %"]  # sqrt(10) of 5, as above
    assert "recursion 2; recursion 2 still changes it by 0.150." in figure.finding
    steps["actions"] = np.stack([*steps["actions"], steps["actions"][-1]])
    steps["changes"] = np.append(steps["changes"], 0.0)
    steps["errors"] = np.append(steps["errors"], 0.0)
    steps["states"] = np.stack([*steps["states"], steps["states"][-1]])
    assert "from recursion 2 on it is within 0.01." in unrolled.plot_recursion_steps(steps).finding


def test_prediction_by_depth_is_the_first_samples():
    images = torch.full((2, 1, 4, 4, 3), 0.8)
    images[1] = 0
    actions = explain.prediction_by_depth(FakePolicy(3, scaled()), {CAMERA: images}, [1, 2, 4])
    assert actions.shape == (3, 7)
    np.testing.assert_allclose(actions[:, 0], [2.6, 1.8, 1.4], rtol=1e-6)  # 2 * 0.8 / d + 1
    axes = explain.plot_prediction_by_depth([1, 2, 4], actions).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 2.6], [2, 1.8], [4, 1.4]])


def test_halting_profile_counts_every_sample():
    profile = explain.halting_profile(FakePolicy(), FakeDataset(8))  # 0.6 and 0.7 go on to 2
    assert sorted(profile.pop("depths")) == [1] * 6 + [2] * 2
    assert profile == {"mean": 1.25, "limit": 2, "halting": "adaptive"}
    axes = explain.plot_halting(profile | {"depths": [1] * 6 + [2] * 2}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [75, 25]


# --- saliency ------------------------------------------------------------------------------------
class PixelPolicy(FakePolicy):
    """dx is the upper left pixel's red plus 3 times its neighbour's blue; the rest is 0."""

    def forward(self, observations):
        images = observations[CAMERA]
        actions = torch.zeros(len(images), 7)
        actions[:, 0] = images[:, 0, 0, 0] - 3 * images[:, 0, 1, 2]
        actions[:, 6] = images.sum(dim=(1, 2, 3))  # the gripper is left out
        return actions * self.weight


def test_saliency_of_a_linear_policy():
    images = torch.zeros(2, 1, 4, 4, 3)
    images[:, 0, 0, 0, 0] = 0.5
    images[:, 0, 0, 1, 2] = 0.75
    policy = PixelPolicy()
    maps = explain.saliency(policy, {CAMERA: images, "task_id": torch.zeros(2, 1)})
    assert list(maps) == [CAMERA] and maps[CAMERA].shape == (2, 4, 4)
    expected = np.zeros((4, 4))
    expected[0, :2] = 0.5 / (3 * 0.75), 1
    for found in maps[CAMERA]:
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert policy.weight.grad is None and not images.requires_grad
    figure = explain.plot_saliency({CAMERA: images[0, 0]}, {CAMERA: maps[CAMERA][0]})
    heat = figure.axes[1].images[0].get_array()
    assert heat[3, 1].sum() > heat[3, 0].sum() > heat[0, 0].sum()  # upright: first row at the foot
    assert heat[0, 0].sum() == 0  # black in the image, and without attribution
    # one pixel of 16 holds more than half
    assert "100 % is in the agent view (half of that on 6.2 % of its pixels)" in figure.finding
    blind = explain.plot_saliency({CAMERA: images[0, 0]}, {CAMERA: np.zeros((4, 4))})
    assert "0 % is in the agent view (half of that on 0.0 %" in blind.finding


# --- the real policy and data set ----------------------------------------------------------------
@pytest.mark.parametrize("halting", ["fixed", "adaptive"])
def test_the_real_policy_and_data_set(tmp_path, halting):
    torch.manual_seed(0)
    cameras = ("agentview_rgb", "eye_in_hand_rgb")
    config = ModelConfig(
        hidden_dim=16, num_recursions=6, image_size=36, cameras=cameras, chunk=2,
        proprioception=True, conditioning="task_id", num_tasks=5, gripper="classifier",
        halting=halting,
    )
    dataset = data_set(
        write_demo_file(tmp_path / "soup_demo.hdf5", (5, 7)), sequence_length=2, image_size=36,
        augmentation="shift", cameras=cameras, proprioception=True, task_ids=[4],
        conditioning="task_id", chunk=2)
    policy = TRMPolicy(config, dataset.normalizer, dataset.proprio_stats)

    report, _ = explain.analyze_model_predictions(policy, dataset, num_samples=20)
    assert report["count"] == 2 * len(dataset) == 20
    known = [action_at(t, demo) for demo, length in enumerate((5, 7)) for t in range(length)]
    for sample in report["samples"]:  # the file's own actions, back in the environment's units
        assert np.abs(np.array(known) - sample["target"]).max(axis=1).min() < 1e-5

    observations = dataset.batch([0, 1])["observations"]
    report, _ = unrolled.visualize_recursive_states(policy, observations)
    norms = [state.norm(dim=-1).mean().item() for state in
             policy(observations, return_all_states=True)[1]]
    assert report["norms"] == pytest.approx(norms)

    curve = explain.depth_curve(policy, dataset, depths=(1, 6))
    assert curve["arm_error"][0] != curve["arm_error"][1]
    by_depth = explain.prediction_by_depth(policy, observations, [1, 6])
    executed = dataset.normalizer.denormalize(policy(observations)[0, 0])
    np.testing.assert_allclose(by_depth[1], executed.detach(), rtol=1e-5)

    profile = explain.halting_profile(policy, dataset)
    assert len(profile["depths"]) == 20 and min(profile["depths"]) >= 1
    assert profile["mean"] == 6 if halting == "fixed" else profile["mean"] < 6

    maps = explain.saliency(policy, observations)
    stacked = np.stack([maps[camera] for camera in cameras])
    assert stacked.shape == (2, 4, 36, 36) and stacked.min() >= 0
    np.testing.assert_allclose(stacked.max(axis=(0, 2, 3)), 1)
    assert all(parameter.grad is None for parameter in policy.parameters())
