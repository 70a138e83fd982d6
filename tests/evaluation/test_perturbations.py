"""What a perturbation does to what the policy sees, is told and sends."""

import copy
import pickle
import types

import numpy as np
import pytest
import torch
from walking import CountingPolicy

from trm_helpers import schema
from trm_helpers.config import EvalConfig, ModelConfig
from trm_helpers.evaluation import perturbations
from trm_helpers.evaluation.perturbations import (
    PERTURBATIONS,
    PerturbedPolicy,
    as_image,
    shift_image,
    why_unused,
)
from trm_helpers.policy.model import TRMPolicy
from trm_helpers.sim.env import LiberoEnv, Observation

ENV = types.SimpleNamespace(image_size=4, task=types.SimpleNamespace(
    suite="libero_object", task_id=0,
    language="pick up the alphabet soup and place it in the basket"))
KEY = ("libero_object", 0, 3, 0)


def observation(size=64, value=100):
    """Frames of one grey level but for their columns, and readings of one."""
    frame = np.full((size, size, 3), value, np.uint8)
    frame[:, 0] = 0
    low = {key: np.ones(width) for key, width in schema.LOW_DIM.items()}
    return {**dict.fromkeys(schema.CAMERAS, frame), **low, "task_id": 0,
            "language": ENV.task.language}


class Looking(CountingPolicy):
    """Keeps what it is shown; its n-th action has n as its first number."""

    def __init__(self, keys=(), stats=None):
        super().__init__()
        self.keys, self.proprio_stats, self.seen = keys, stats, []

    def act(self, observation):
        self.seen.append({key: observation[key] for key in self.keys or observation})
        return np.array([len(self.seen), 0, 0, 0, 0, 0, 1.0])


def shown(name, given=None, key=KEY, steps=1, **policy):
    """What the policy sees of ``given`` in each step."""
    looking = Looking(**policy)
    perturbed = PerturbedPolicy(looking, name, ENV, key)
    perturbed.reset()
    for _ in range(steps):
        perturbed.act(given or observation())
    return looking.seen


# --- by hand -------------------------------------------------------------------------------------
def test_an_image_moves_and_its_edge_is_repeated():
    image = np.arange(1, 13, dtype=np.uint8).reshape(3, 4, 1)  # 1 2 3 4 / 5 6 7 8 / 9 10 11 12
    moved = shift_image(image, down=1, right=-2)
    assert moved[..., 0].tolist() == [[3, 4, 4, 4], [3, 4, 4, 4], [7, 8, 8, 8]]
    assert np.array_equal(shift_image(image, 0, 0), image)


def test_brightness_is_a_factor_that_saturates():
    image = np.array([[[0, 100, 255]]], np.uint8)
    assert as_image(image * 0.6).tolist() == [[[0, 60, 153]]]
    assert as_image(image * 1.4).tolist() == [[[0, 140, 255]]]


# --- one by one ----------------------------------------------------------------------------------
def test_each_camera_is_shifted_by_12_of_128_pixels_for_the_whole_episode():
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    diagonals = [shift_image(frame, down, right) for down in (-6, 6) for right in (-6, 6)]
    found = set()
    for init_state in range(8):
        steps = shown("shift", {**observation(), **dict.fromkeys(schema.CAMERAS, frame)},
                      key=("libero_object", 0, init_state, 0), steps=2)
        for camera in schema.CAMERAS:
            (which,) = [i for i, moved in enumerate(diagonals)
                        if np.array_equal(steps[0][camera], moved)]
            assert np.array_equal(steps[1][camera], diagonals[which])
            found.add(which)
    assert found == {0, 1, 2, 3}


def test_light_is_darker_or_brighter_for_both_cameras_and_the_whole_episode():
    found = set()
    for init_state in range(8):
        steps = shown("brightness", key=("libero_object", 0, init_state, 0), steps=2)
        values = {int(seen[camera][0, 5, 0]) for seen in steps for camera in schema.CAMERAS}
        assert len(values) == 1
        found |= values
    assert found == {60, 140}


def test_noise_has_the_stated_strength_and_differs_from_step_to_step():
    first, second = shown("noise", observation(128), steps=2)
    for camera in schema.CAMERAS:
        errors = first[camera][:, 1:].astype(float) - 100
        assert abs(errors.std() - perturbations.PIXEL_NOISE) < 0.2 and abs(errors.mean()) < 0.2
        assert first[camera].dtype == np.uint8 and (first[camera][:, 0] <= 60).all()
        assert not np.array_equal(first[camera], second[camera])
    many = np.stack([seen["joint_states"] for seen in shown("noise", steps=300)])
    assert abs(many.std() - 0.01) < 1e-3 and abs(many.mean() - 1) < 1e-3
    positions = np.stack([seen["ee_states"] for seen in shown("noise", steps=300)])
    assert positions[:, :3].std() == pytest.approx(0.005, rel=0.1)
    assert first["task_id"] == 0 and first["language"] == ENV.task.language


def test_what_is_drawn_depends_on_the_episode_and_not_on_what_is_read():
    whole = shown("noise", steps=3)
    (alone,) = [seen["ee_pos"] for seen in shown("noise", steps=3, keys=["ee_pos"])[2:]]
    assert np.array_equal(whole[2]["ee_pos"], alone)
    other = shown("noise", key=("libero_object", 0, 4, 0), steps=3)
    assert not np.array_equal(whole[2]["ee_pos"], other[2]["ee_pos"])


def test_an_entry_read_twice_is_the_same():
    seen = []

    class Twice(Looking):
        def act(self, observation):
            seen.extend([observation["agentview_rgb"], observation["agentview_rgb"]])
            return np.zeros(7)

    policy = PerturbedPolicy(Twice(), "noise", ENV, KEY)
    policy.reset()
    policy.act(observation())
    assert seen[0] is seen[1]


@pytest.mark.parametrize(("name", "late"), [("delay_1", 1), ("delay_2", 2)])
def test_actions_come_late_and_the_arm_waits_with_an_open_gripper(name, late):
    policy = PerturbedPolicy(Looking(), name, ENV, KEY)
    for _ in range(2):  # nothing is left over from the episode before
        policy.reset()
        policy.policy.seen.clear()
        sent = [policy.act(observation()) for _ in range(4)]
        assert [action[0] for action in sent] == [0] * late + [1, 2, 3, 4][:4 - late]
        assert all(np.array_equal(action, schema.NO_OP) for action in sent[:late])


def test_a_black_camera_is_not_drawn():
    for camera in schema.CAMERAS:
        lazy = Observation({key: lambda: pytest.fail("was drawn") for key in schema.CAMERAS})
        name = f"no_{camera.removesuffix('_rgb')}"
        (seen,) = shown(name, lazy, keys=[camera])
        assert seen[camera].shape == (4, 4, 3) and seen[camera].dtype == np.uint8
        assert not seen[camera].any()


def test_without_proprioception_the_network_gets_zeros():
    config = ModelConfig(hidden_dim=16, num_recursions=1, image_size=36, proprioception=True)
    stats = {"mean": [i / 7 for i in range(12)], "std": [0.5] * 12}
    policy = TRMPolicy(config, None, stats).eval()
    perturbed = PerturbedPolicy(policy, "no_proprioception", ENV, KEY)
    prepared, prepare = [], policy.prepare
    policy.prepare = lambda seen: prepared.append(prepare(seen)) or prepared[-1]
    perturbed.reset()
    perturbed.act(observation())
    assert torch.equal(prepared[0]["proprio"], torch.zeros(1, 12))
    (seen,) = shown("no_proprioception", stats=stats)
    assert seen["gripper_states"].tolist() == [1.0, 8 / 7]
    assert np.isnan(seen["ee_ori"]).all() and seen["ee_states"].shape == (6,)
    with pytest.raises(ValueError, match="the policy has no proprio_stats; expected means"):
        PerturbedPolicy(Looking(), "no_proprioception", ENV, KEY)


def test_the_wrong_instruction_is_of_another_task_of_the_suite():
    told = {shown("wrong_instruction", key=("libero_object", 0, init_state, 0), steps=2)[1]
            ["language"] for init_state in range(10)}
    assert len(told) > 3 and ENV.task.language not in told
    assert all(text.endswith("and place it in the basket") for text in told)
    assert shown("no_instruction")[0]["language"] == ""


def test_an_empty_instruction_changes_what_the_policy_does():
    torch.manual_seed(0)
    policy = TRMPolicy(ModelConfig(hidden_dim=16, num_recursions=1, image_size=36,
                                   conditioning="language")).eval()
    actions = []
    for name in ("delay_1", "no_instruction"):
        perturbed = PerturbedPolicy(policy, name, ENV, KEY)
        perturbed.reset()
        actions.append([perturbed.act(observation()) for _ in range(2)][name == "delay_1"])
    assert not np.allclose(*actions)


def test_what_a_policy_tells_of_itself_comes_through():
    assert PerturbedPolicy(CountingPolicy(), "noise", ENV, KEY).last_recursions == 3
    assert not hasattr(PerturbedPolicy(CountingPolicy(), "noise", ENV, KEY), "last_chunk")


@pytest.mark.parametrize("copied", [
    copy.copy, copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
@pytest.mark.parametrize("name", list(PERTURBATIONS))
def test_a_copy_of_a_perturbed_policy_is_perturbed_alike(name, copied, monkeypatch):
    stats = {"mean": [i / 7 for i in range(12)]}
    # one that copies itself in its own way is still copied behind its perturbation
    monkeypatch.setattr(Looking, "__deepcopy__", lambda *_: Looking(stats=stats), raising=False)
    policy = PerturbedPolicy(Looking(stats=stats), name, ENV, KEY)
    other = copied(policy)
    assert type(other) is PerturbedPolicy and other.last_recursions == 3
    actions = []
    for each in (policy, other):
        each.policy.seen = []
        each.reset()
        actions.append([each.act(observation()) for _ in range(4)])
    np.testing.assert_array_equal(*actions)
    for one, another in zip(policy.policy.seen, other.policy.seen, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], another[key])


# --- which of them matter ------------------------------------------------------------------------
def test_perturbations_that_cannot_matter_are_told():
    blind = ModelConfig()  # one camera, neither proprioception nor instruction
    unused = {name: why for name, perturbation in PERTURBATIONS.items()
              if (why := why_unused(perturbation.needs, blind))}
    assert unused == {
        "no_proprioception": "it has no proprioception",
        "no_eye_in_hand": "it has no wrist camera",
        "wrong_instruction": "it is not conditioned on language",
        "no_instruction": "it is not conditioned on language",
    }
    whole = ModelConfig(cameras=tuple(schema.CAMERAS), proprioception=True, conditioning="language")
    assert not any(why_unused(each.needs, whole) for each in PERTURBATIONS.values())


def test_an_unknown_perturbation_is_refused():
    with pytest.raises(ValueError, match="perturbation='fog'.*'none', 'shift', 'brightness'"):
        EvalConfig(perturbation="fog")


# --- the real simulator --------------------------------------------------------------------------
@pytest.mark.sim
def test_a_perturbed_frame_drawn_on_demand_equals_one_drawn_before():
    """And a frame that the policy does not read is not drawn."""
    moves = np.random.default_rng(0).uniform(-1, 1, (4, 7))
    keys = ["agentview_rgb", "joint_states"]
    on_demand, before = Looking(keys), Looking(keys)
    with LiberoEnv("libero_object", 0) as env:
        policies = [PerturbedPolicy(policy, "noise", env, KEY) for policy in (on_demand, before)]
        for policy in policies:
            policy.reset()
        observation = env.reset(init_state=3)
        for move in moves:
            plain = observation
            policies[0].act(plain)
            rendered = [key for key in schema.CAMERAS if not callable(plain._values[key])]
            assert rendered == ["agentview_rgb"]
            policies[1].act({key: np.array(plain[key]) for key in plain})
            observation, _ = env.step(move)
    for one, other in zip(on_demand.seen, before.seen, strict=True):
        for key in one:
            assert np.array_equal(one[key], other[key]), key
    assert not np.array_equal(on_demand.seen[-1]["agentview_rgb"], plain["agentview_rgb"])
