"""The policy: architecture against hand-computed numbers, recursion, halting, loss, control."""

import copy
import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from learning import falls_below

from trm_helpers import schema
from trm_helpers.config import ModelConfig
from trm_helpers.data.normalize import ActionNormalizer
from trm_helpers.policy import layers, model
from trm_helpers.policy.layers import VisualEncoder
from trm_helpers.policy.model import TRMPolicy, count_parameters
from trm_helpers.policy.recursion import RecursiveBlock

SIGMOID_1 = 1 / (1 + math.exp(-1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(**settings) -> ModelConfig:
    return ModelConfig(**{**dict(hidden_dim=16, num_recursions=3, image_size=36), **settings})


def observations(config: ModelConfig, *batch: int) -> dict:
    size = config.image_size
    values = {camera: torch.rand(*batch, size, size, 3) for camera in config.cameras}
    if config.proprioception:
        values["proprio"] = torch.randn(*batch, schema.PROPRIO_DIM)
    if config.conditioning == "task_id":
        values["task_id"] = torch.randint(config.num_tasks, batch)
    return values


def make_batch(config: ModelConfig, size: int) -> dict:
    shape = (size, 1, config.chunk) if config.chunk > 1 else (size, 1)
    actions = torch.rand(*shape, 7) * 2 - 1
    actions[..., 6] = actions[..., 6].sign()
    return {
        "observations": observations(config, size, 1), "actions": actions, "mask": torch.ones(shape)
    }


def set_output(policy: TRMPolicy, values: list[float]) -> None:
    """Make the policy return ``values`` (of its last layer) for every observation."""
    with torch.no_grad():
        policy.head.output.weight.zero_()
        policy.head.output.bias.copy_(torch.tensor(values))


def set_halting(policy: TRMPolicy, probability: float) -> None:
    """Set the halting probability of every step and state.

    The block's last LayerNorm then returns (1, 0, ...), and w = (logit, 0, ...) gives the logit.
    """
    with torch.no_grad():
        policy.block.mlp_norm.weight.zero_()
        policy.block.mlp_norm.bias.zero_()
        policy.block.mlp_norm.bias[0] = 1.0
        for parameter in policy.halt.parameters():
            parameter.zero_()
        policy.halt.weight[0, 0] = math.log(probability / (1 - probability))


# --- architecture ------------------------------------------------------------------------------


def test_encoder_shapes():
    encoder = VisualEncoder(hidden_dim=256, image_size=128)
    shapes = []
    for layer in encoder.convolutions:
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    assert encoder(torch.rand(2, 128, 128, 3)).shape == (2, 256)
    assert shapes == [(32, 31, 31), (64, 14, 14), (128, 12, 12)]
    assert encoder.project.in_features == 18432


def test_encoder_keeps_the_order_of_channels_and_rows():
    encoder = VisualEncoder(hidden_dim=16, image_size=36)
    images = torch.rand(2, 36, 36, 3)
    maps = encoder.convolutions(images.permute(0, 3, 1, 2).contiguous())
    expected = encoder.norm(encoder.project(maps.flatten(1)))
    torch.testing.assert_close(encoder(images), expected)


def test_reference_parameter_count_worked_out_by_hand():
    encoder = (3 * 8 * 8 * 32 + 32) + (32 * 4 * 4 * 64 + 64) + (64 * 3 * 3 * 128 + 128)
    encoder += (18432 * 256 + 256) + 2 * 256
    attention = (3 * 256 * 256 + 3 * 256) + (256 * 256 + 256)
    mlp = (256 * 1024 + 1024) + (1024 * 256 + 256)
    block = attention + 2 * 256 + mlp + 2 * 256
    head = (256 * 256 + 256) + (256 * 7 + 7)
    counts = count_parameters(TRMPolicy(ModelConfig()))
    assert counts == {"encoders": encoder, "block": block, "head": head}
    assert sum(counts.values()) == 5_689_575
    paper = TRMPolicy(small(variant="trm", image_size=64, image_grid=2))  # has action queries
    assert sum(count_parameters(paper).values()) == sum(map(torch.numel, paper.parameters()))


def test_depth_adds_no_parameters():
    shallow, deep = (TRMPolicy(small(num_recursions=n)) for n in (1, 8))
    assert count_parameters(shallow) == count_parameters(deep)
    deep.load_state_dict(shallow.state_dict())
    seen = observations(shallow.config, 2)
    torch.testing.assert_close(deep(seen, num_recursions=1), shallow(seen))


def test_reference_condition_is_the_encoder_output_alone():
    policy = TRMPolicy(small())
    seen = observations(policy.config, 2)
    expected = policy.encoders["agentview_rgb"](seen["agentview_rgb"])
    assert torch.equal(policy.encode(seen), expected)


def test_every_input_reaches_the_actions():
    config = small(cameras=tuple(schema.CAMERAS), proprioception=True,
                   conditioning="task_id", num_tasks=3)
    policy = TRMPolicy(config)
    seen = observations(config, 2)
    seen["task_id"] = torch.tensor([0, 1])
    before = policy(seen)
    for name in seen:
        other = {**seen, name: seen[name] + 1 if name == "task_id" else seen[name] * 0.5}
        assert (policy(other) - before).abs().amax(dim=1).min() > 1e-4, name
    assert policy.encoders["agentview_rgb"].project.weight is not (
        policy.encoders["eye_in_hand_rgb"].project.weight
    )


# --- recursion ---------------------------------------------------------------------------------


def test_block_on_one_token_equals_a_sequence_of_one():
    block = RecursiveBlock(16, 4)
    h, x_cond = torch.randn(2, 3, 16)
    torch.testing.assert_close(block(h, x_cond), block(h[:, None], x_cond[:, None])[:, 0])


def test_block_is_the_documented_formula_and_one_token_attention_is_linear():
    block = RecursiveBlock(16, 4)
    h, x_cond = torch.randn(2, 3, 16)
    value = block.attention.in_proj_weight[32:], block.attention.in_proj_bias[32:]
    token = h + x_cond
    attended = block.attention.out_proj(torch.nn.functional.linear(token, *value))
    token = block.attention_norm(token + attended)
    expected = block.mlp_norm(token + block.mlp(token))
    torch.testing.assert_close(block(h, x_cond), expected)


def test_block_mixes_several_tokens():
    block = RecursiveBlock(16, 4)
    h, x_cond = torch.randn(2, 3, 5, 16)
    before = block(h, x_cond)
    assert before.shape == (3, 5, 16)
    h[:, 0] += 1
    assert (block(h, x_cond)[:, 4] - before[:, 4]).abs().max() > 1e-4


def test_block_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(5, 5, 16\) and x \(5, 16\)"):
        RecursiveBlock(16, 4)(torch.randn(5, 5, 16), torch.randn(5, 16))


def test_states_run_from_the_condition_to_the_output():
    policy = TRMPolicy(small())
    seen = observations(policy.config, 2)
    actions, states = policy(seen, num_recursions=5, return_all_states=True)
    assert [tuple(state.shape) for state in states] == [(2, 16)] * 6
    x_cond = policy.encode(seen)
    assert torch.equal(states[0], x_cond)
    torch.testing.assert_close(states[3], policy.block(states[2], x_cond))
    torch.testing.assert_close(actions, policy.head(states[5])[0][:, 0])
    assert policy.last_depth.tolist() == [5, 5]


def test_recursion_is_not_a_no_op():
    policy = TRMPolicy(small())
    seen = observations(policy.config, 4)
    difference = policy(seen, num_recursions=1) - policy(seen, num_recursions=8)
    assert difference.abs().amax(dim=1).min() > 1e-3


def test_observation_is_reinjected_in_every_step():
    policy = TRMPolicy(small())
    x_cond = policy.encode(observations(policy.config, 2)).detach().requires_grad_()
    states = policy.recurse(x_cond, 4).states
    last = policy.block(states[3].detach(), x_cond)
    (gradient,) = torch.autograd.grad(last[:, 0].sum(), x_cond)
    assert gradient.abs().amax(dim=1).min() > 1e-4
    without = policy.block(states[3], torch.zeros_like(x_cond))
    assert (without - states[4]).abs().amax(dim=1).min() > 1e-2


def test_depth_must_be_positive():
    policy = TRMPolicy(small())
    with pytest.raises(ValueError, match="num_recursions=0"):
        policy(observations(policy.config, 1), num_recursions=0)


# --- halting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "probability, weights",
    [
        (0.5, [1, 0.5, 0.25, 0.125]),  # the remainder after step 4, 0.0625, is below 0.1
        (0.75, [1, 0.25]),  # 0.0625 after step 2
        (0.95, [1.0]),
        (0.01, [1, 0.99, 0.99**2, 0.99**3, 0.99**4, 0.99**5]),  # never: all six steps
    ],
)
def test_remainder_is_the_documented_sum(probability, weights, monkeypatch):
    monkeypatch.setattr(model, "HALTING_THRESHOLD", 0.1)
    policy = TRMPolicy(small(halting="remainder", num_recursions=6))
    policy.block = _Count()
    set_halting(policy, probability)
    recursion = policy.recurse(_Count.START)
    torch.testing.assert_close(recursion.output, _Count.weighted(weights))
    assert recursion.depth.tolist() == [len(weights)] * 2
    assert len(recursion.states) == len(weights) + 1


def test_remainder_stops_with_the_slowest_sample_and_counts_each(monkeypatch):
    monkeypatch.setattr(model, "HALTING_THRESHOLD", 0.1)
    policy = TRMPolicy(small(halting="remainder", num_recursions=20))
    # states that differ: h is x_cond itself, whose first number is the halting logit
    policy.block = _Repeat()
    with torch.no_grad():
        policy.halt.weight.zero_()
        policy.halt.weight[0, 0] = 1.0
    x_cond = torch.zeros(2, 16)
    x_cond[:, 0] = torch.tensor([0.0, 1.0])  # r: 0.5^n < 0.1 at n=4; 0.269^n at n=2
    recursion = policy.recurse(x_cond)
    assert recursion.depth.tolist() == [4, 2]
    rest = 1 - SIGMOID_1
    expected = [[1, 0.5, 0.25, 0.125], [1, rest, rest**2, rest**3]]
    torch.testing.assert_close(recursion.output, x_cond * torch.tensor(expected).sum(1, True))


class _Repeat(RecursiveBlock):
    def forward(self, h, x_cond):
        return x_cond


class _Count(RecursiveBlock):
    """State n is (1, n, 0, ...), so that a sum of states tells their weights."""

    START = torch.eye(16)[:1].expand(2, -1)

    def __init__(self):
        super().__init__(16)

    def forward(self, h, x_cond):
        return h + torch.eye(16)[1]

    @classmethod
    def weighted(cls, weights):
        states = torch.stack([cls.START[0] + n * torch.eye(16)[1]
                              for n in range(1, len(weights) + 1)])
        return (torch.tensor(weights) @ states).expand(2, -1)


@pytest.mark.parametrize(
    "probability, weights",
    [
        (0.4, [0.4, 0.4, 0.2]),  # the sum reaches 0.95 in step 3, which gets the remainder
        (0.96, [1.0]),
        (0.1, [0.1, 0.1, 0.1, 0.1, 0.6]),  # the last step gets the remainder
    ],
)
def test_adaptive_weights_and_ponder_cost(probability, weights, monkeypatch):
    monkeypatch.setattr(model, "HALTING_THRESHOLD", 0.05)
    policy = TRMPolicy(small(halting="adaptive", num_recursions=5))
    policy.block = _Count()
    set_halting(policy, probability)
    recursion = policy.recurse(_Count.START)
    torch.testing.assert_close(recursion.output, _Count.weighted(weights))
    assert recursion.depth.tolist() == [len(weights)] * 2
    expected = torch.tensor([len(weights) + weights[-1]] * 2)  # N + R
    torch.testing.assert_close(recursion.ponder, expected)


def test_adaptive_halts_per_sample_with_weights_that_sum_to_one():
    policy = TRMPolicy(small(halting="adaptive", num_recursions=6))
    policy.block = _Repeat()
    with torch.no_grad():
        policy.halt.weight.zero_()
        policy.halt.bias.zero_()
        policy.halt.weight[0, 0] = 1.0
    x_cond = torch.randn(3, 16)
    x_cond[:, 0] = torch.tensor([0.0, 1.0, -9.0])
    recursion = policy.recurse(x_cond)
    assert recursion.depth.tolist() == [2, 2, 6]
    torch.testing.assert_close(recursion.output, x_cond)  # a mean of equal states
    torch.testing.assert_close(recursion.ponder[:2], torch.tensor([2.5, 3 - SIGMOID_1]))


@pytest.mark.parametrize("halting", ["remainder", "adaptive"])
def test_halting_learns_from_the_loss(halting):
    config = small(halting=halting)
    policy = TRMPolicy(config)
    loss, _ = policy.loss(make_batch(config, 4))
    loss.backward()
    assert policy.halt.weight.grad.abs().max() > 0


def test_ponder_cost_enters_the_loss(monkeypatch):
    monkeypatch.setattr(model, "HALTING_THRESHOLD", 0.05)
    config = small(halting="adaptive", num_recursions=5, ponder_cost=0.5)
    policy = TRMPolicy(config)
    set_halting(policy, 0.4)
    batch = make_batch(config, 2)
    loss, parts = policy.loss(batch)
    assert parts["ponder"].item() == pytest.approx(3.2)
    assert loss.item() == pytest.approx(parts["action"].item() + 0.5 * 3.2)


# --- head and loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("gripper", ["continuous", "threshold", "classifier", "mixture"])
@pytest.mark.parametrize("chunk, shape", [(1, (4, 7)), (3, (4, 3, 7))])
def test_shapes_and_time_folded_into_the_batch(gripper, chunk, shape):
    config = small(gripper=gripper, chunk=chunk, cameras=tuple(schema.CAMERAS),
                   proprioception=True,
                   conditioning="task_id", num_tasks=3)
    policy = TRMPolicy(config)
    seen = observations(config, 2, 2)
    folded = {name: value.flatten(0, 1) for name, value in seen.items()}
    assert policy(seen).shape == shape
    torch.testing.assert_close(policy(seen), policy(folded))


def test_classifier_gripper_is_the_expected_value():
    policy = TRMPolicy(small(gripper="classifier"))
    set_output(policy, [0.0] * 6)
    with torch.no_grad():
        policy.head.gripper.weight.zero_()
        policy.head.gripper.bias.copy_(torch.tensor([0.0, math.log(3)]))  # p(closed) = 3/4
    action = policy(observations(policy.config, 1))
    torch.testing.assert_close(action, torch.tensor([[0.0] * 6 + [0.5]]))


def test_mixture_weights_its_experts_with_the_gate(monkeypatch):
    monkeypatch.setattr(layers, "NUM_EXPERTS", 2)
    policy = TRMPolicy(small(gripper="mixture"))
    set_output(policy, [1.0] * 7 + [5.0] * 7)
    with torch.no_grad():
        policy.head.gate.weight.zero_()
        policy.head.gate.bias.copy_(torch.tensor([math.log(3), 0.0]))  # 3/4 and 1/4
    action = policy(observations(policy.config, 1))
    torch.testing.assert_close(action, torch.full((1, 7), 2.0))


@pytest.mark.parametrize("loss, expected", [("mse", 20 / 21), ("l1", 6 / 21), ("mix", 13 / 21)])
def test_masked_loss_worked_out_by_hand(loss, expected):
    config = small(chunk=2)
    policy = TRMPolicy(config)
    set_output(policy, [0.0] * 14)
    batch = make_batch(config, 2)
    batch["actions"] = torch.zeros(2, 1, 2, 7)
    batch["actions"][0, 0, 0, 0] = 4.0
    batch["actions"][1, 0, 0, 6] = -2.0  # squares add up to 20, over 3 valid actions of 7 numbers
    batch["actions"][1, 0, 1] = 100.0  # masked
    batch["mask"] = torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]])
    total, parts = policy.loss(batch, loss)
    assert total.item() == pytest.approx(expected)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {"action": expected, "final": expected}
    )


@pytest.mark.parametrize(("gripper", "bias"), [
    ("classifier", [0.0, math.log(3), 0.0, math.log(1.5)]),  # (open, closed) of steps 1 and 2
    ("binary", [math.log(3), math.log(1.5)]),
])
def test_gripper_entropy_worked_out_by_hand(gripper, bias, monkeypatch):
    """p(closed) is 3/4 in step 1, closed both times, and 3/5 in step 2, open and masked."""
    monkeypatch.setattr(model, "GRIPPER_WEIGHT", 0.5)
    config = small(gripper=gripper, chunk=2)
    policy = TRMPolicy(config)
    set_output(policy, [1.0] * 12)
    with torch.no_grad():
        policy.head.gripper.weight.zero_()
        policy.head.gripper.bias.copy_(torch.tensor(bias))
    batch = make_batch(config, 2)
    batch["actions"] = torch.zeros(2, 1, 2, 7)
    batch["actions"][..., 6] = torch.tensor([[[1.0, -1.0]], [[1.0, 1.0]]])
    batch["mask"] = torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]])
    entropy = -(2 * math.log(3 / 4) + math.log(2 / 5)) / 3
    for loss in ("mse", "l1"):
        total, parts = policy.loss(batch, loss)
        assert parts["action"].item() == pytest.approx(1.0)  # the arm alone
        assert parts["gripper"].item() == pytest.approx(entropy)
        assert total.item() == pytest.approx(1.0 + 0.5 * entropy)


def test_loss_refuses_other_shapes_and_names():
    config = small()
    policy = TRMPolicy(config)
    batch = make_batch(config, 2)
    with pytest.raises(ValueError, match="loss='huber'.*'mse', 'l1', 'mix'"):
        policy.loss(batch, "huber")
    with pytest.raises(ValueError, match="expected 2 observations with chunk=1"):
        policy.loss({**batch, "actions": torch.zeros(3, 1, 7), "mask": torch.ones(3, 1)})


@pytest.mark.parametrize("variant", ["block", "act"])
@pytest.mark.parametrize(("actions", "mask"), [((2, 1, 7, 4), (2, 1, 4)), ((2, 1, 4, 7), (1, 2, 4)),
                                               ((2, 1, 4, 7), (2, 4)), ((2, 1, 4, 7), (2, 1))])
def test_loss_does_not_reshape_transposed_targets(variant, actions, mask):
    """Their number of elements may be the right one."""
    config = small(chunk=4, variant=variant, image_size=64, image_grid=2, num_recursions=1)
    batch = {**make_batch(config, 2), "actions": torch.zeros(actions), "mask": torch.ones(mask)}
    with pytest.raises(ValueError, match="expected observations with chunk=4 actions each"):
        TRMPolicy(config).loss(batch)


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(gripper="classifier", chunk=4, proprioception=True),
     dict(gripper="mixture", halting="adaptive", ponder_cost=0.0), dict(halting="remainder")],
)
def test_overfits_one_batch(settings):
    config = small(hidden_dim=32, **settings)
    policy = TRMPolicy(config)
    batch = make_batch(config, 8)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)

    def step():
        loss, _ = policy.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    assert falls_below(0.01, step, 150)


def test_loss_is_finite_and_trains_in_bfloat16():
    config = small(gripper="classifier", chunk=2, halting="adaptive", proprioception=True)
    policy = TRMPolicy(config)
    batch = make_batch(config, 4)
    exact, _ = policy.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = policy.loss(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


@pytest.mark.parametrize("as_in_2_10", [False, True])
def test_mixed_precision_leaves_no_weight_of_the_recursion_without_gradient(monkeypatch,
                                                                            as_in_2_10):
    """PyTorch 2.10 keeps the cast of a weight made without gradient for the steps that have one."""
    config = small(variant="trm", image_size=64, cycles=2, chunk=2, deep_supervision=True)
    policy = TRMPolicy(config)
    batch = make_batch(config, 4)
    policy.loss(batch)[0].backward()
    exact = {name: weight.grad for name, weight in policy.named_parameters()}
    policy.zero_grad()
    if as_in_2_10:
        casts, linear = {}, torch.nn.functional.linear
        monkeypatch.setattr(torch, "clear_autocast_cache", casts.clear)
        monkeypatch.setattr(torch.nn.functional, "linear", lambda values, weight, bias=None: linear(
            values, casts.setdefault(weight, weight.bfloat16()), bias))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = policy.loss(batch)
    loss.backward()
    for name, weight in policy.block.named_parameters(prefix="block"):
        assert weight.grad is not None, name
        assert (weight.grad - exact[name]).norm() < 0.1 * exact[name].norm(), name


# --- control -----------------------------------------------------------------------------------


class CountingObservation(Mapping):
    """Counts reads, as a simulator does that renders a frame when its key is read."""

    def __init__(self, **values):
        self.values = {
            "agentview_rgb": np.full((48, 48, 3), 128, np.uint8),
            "eye_in_hand_rgb": np.full((48, 48, 3), 64, np.uint8),
            "ee_pos": np.array([0.1, 0.2, 0.3]),
            "joint_states": np.zeros(7),
            "gripper_states": np.array([0.04, -0.04]),
            "task_id": 1,
            **values,
        }
        self.read = []

    def __getitem__(self, key):
        self.read.append(key)
        return self.values[key]

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


def test_act_executes_the_chunk_and_reads_no_observation_in_between():
    config = small(chunk=4, execution_horizon=3, cameras=tuple(schema.CAMERAS))
    policy = TRMPolicy(config)
    set_output(policy, [step / 10 for step in range(4) for _ in range(7)])
    seen = [CountingObservation() for _ in range(4)]
    actions = [policy.act(observation) for observation in seen]
    assert [round(float(action[0]), 3) for action in actions] == [0.0, 0.1, 0.2, 0.0]
    assert [len(observation.read) for observation in seen] == [2, 0, 0, 2]
    assert seen[0].read == list(schema.CAMERAS)
    assert actions[0].dtype == np.float32 and actions[0].shape == (7,)
    policy.reset()
    assert policy.act(seen[0])[0] == 0.0  # a new episode starts a new chunk


def test_act_equals_the_network_on_the_prepared_observation():
    config = small(cameras=tuple(schema.CAMERAS), proprioception=True,
                   conditioning="task_id", num_tasks=2)
    stats = {"mean": [0.1] * schema.PROPRIO_DIM, "std": [2.0] * schema.PROPRIO_DIM}
    policy = TRMPolicy(config, proprio_stats=stats)
    image = np.random.default_rng(0).integers(0, 256, (36, 36, 3), dtype=np.uint8)
    upright = image[::-1]  # a view with a negative stride
    seen = CountingObservation(agentview_rgb=upright, eye_in_hand_rgb=image)
    raw = torch.tensor([*7 * [0.0], 0.04, -0.04, 0.1, 0.2, 0.3])  # in the order of PROPRIO_KEYS
    expected = policy({
        "agentview_rgb": torch.tensor(upright.copy())[None] / 255,
        "eye_in_hand_rgb": torch.tensor(image)[None] / 255,
        "proprio": ((raw - 0.1) / 2)[None],
        "task_id": torch.tensor([1]),
    })
    np.testing.assert_allclose(policy.act(seen), expected[0].detach().numpy(), atol=1e-5)


def test_act_resizes_like_the_data_set():
    policy = TRMPolicy(small())
    image = np.random.default_rng(0).integers(0, 256, (72, 72, 3), dtype=np.uint8)
    means = image.reshape(36, 2, 36, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    action = policy.act({"agentview_rgb": image})
    policy.reset()
    np.testing.assert_allclose(policy.act({"agentview_rgb": means}), action, atol=1e-6)


def test_act_denormalises_the_arm_clips_and_leaves_the_gripper():
    normalizer = ActionNormalizer("minmax").fit(
        np.array([[-0.2] * 6 + [-1.0], [0.6] * 6 + [1.0]])  # offset 0.2, scale 0.4
    )
    policy = TRMPolicy(small(), normalizer)
    set_output(policy, [0.0, 0.5, -1.0, 3.0, -3.0, 0.25, 0.3])
    expected = [0.2, 0.4, -0.2, 1.0, -1.0, 0.3, 0.3]
    np.testing.assert_allclose(policy.act(CountingObservation()), expected, atol=1e-6)


def test_temporal_ensembling_averages_overlapping_chunks():
    config = small(chunk=4, execution_horizon=2, temporal_ensembling=True)
    policy = TRMPolicy(config)
    chunks = [[0.0, 0.1, 0.2, 0.3], [0.4, 0.5, 0.6, 0.7], [-0.4, -0.5, -0.6, -0.7]]
    said = []
    for chunk in chunks:
        set_output(policy, [value for value in chunk for _ in range(7)])
        said += [policy.act(CountingObservation())[0] for _ in range(2)]
    old, new = 1 / (1 + math.exp(-0.01)), math.exp(-0.01) / (1 + math.exp(-0.01))
    # the chunk of step 0 predicts 0.2 and 0.3 for steps 2 and 3, the chunk of step 2 0.4 and 0.5
    expected = [0.0, 0.1, old * 0.2 + new * 0.4, old * 0.3 + new * 0.5,
                old * 0.6 - new * 0.4, old * 0.7 - new * 0.5]
    assert said == pytest.approx(expected, abs=1e-6)
    policy.reset()
    assert policy.act(CountingObservation())[0] == pytest.approx(-0.4)


@pytest.mark.parametrize("ensembling", [False, True])
def test_execution_horizon_can_be_set(ensembling):
    config = small(chunk=4, execution_horizon=1, temporal_ensembling=ensembling)
    policy, seen = TRMPolicy(config), CountingObservation()
    set_output(policy, [value for value in (0.1, 0.2, 0.3, 0.4) for _ in range(7)])
    policy.act(seen)
    policy.execution_horizon = 3
    assert (policy.execution_horizon, policy.config.execution_horizon) == (3, 3)
    said = [policy.act(seen)[0] for _ in range(3)]
    old, new = 1 / (1 + math.exp(-0.01)), math.exp(-0.01) / (1 + math.exp(-0.01))
    # the first chunk, made a step before, says 0.2, 0.3 and 0.4 of these three
    expected = [old * late + new * now for late, now in ((0.2, 0.1), (0.3, 0.2), (0.4, 0.3))]
    assert said == pytest.approx(expected if ensembling else [0.1, 0.2, 0.3], abs=1e-6)
    looks = seen.read.count("agentview_rgb")
    policy.reset()
    for _ in range(6):
        policy.act(seen)
    assert seen.read.count("agentview_rgb") == looks + 2
    policy.config = dataclasses.replace(policy.config, execution_horizon=2)
    assert policy.execution_horizon == 2
    with pytest.raises(ValueError, match="execution_horizon=5 is not valid; expected 1 to chunk=4"):
        policy.execution_horizon = 5


def test_carry_over_starts_from_the_previous_decision():
    seen = CountingObservation()
    plain, carrying = (TRMPolicy(small(variant="trm", image_size=64, image_grid=2, carry_over=over))
                       for over in (False, True))
    carrying.load_state_dict(plain.state_dict())
    first = plain.act(seen)
    np.testing.assert_array_equal(plain.act(seen), first)
    np.testing.assert_array_equal(carrying.act(seen), first)
    twice = plain(plain.prepare(seen), num_recursions=6)[0].detach().numpy()  # 3 and 3 more
    np.testing.assert_allclose(carrying.act(seen), twice.clip(-1, 1), atol=1e-5)
    carrying.reset()
    np.testing.assert_array_equal(carrying.act(seen), first)


def test_a_decision_that_fails_leaves_the_carried_state_as_it_was():
    policy = TRMPolicy(small(carry_over=True, proprioception=True))
    seen, broken = CountingObservation(), CountingObservation(ee_pos=np.full(3, np.nan))
    policy.act(seen)
    with pytest.raises(RuntimeError, match="expected finite numbers"):
        policy.act(broken)
    second = policy.act(seen)
    policy.reset()
    policy.act(seen)
    np.testing.assert_array_equal(policy.act(seen), second)


@pytest.mark.parametrize(
    "gripper, positive, negative",
    [
        ("continuous", 0.3, -0.2),
        ("mixture", 0.3, -0.2),
        ("threshold", 1.0, -1.0),
        ("classifier", 1.0, -1.0),
        ("binary", 1.0, -1.0),
    ],
)
def test_gripper_at_execution(gripper, positive, negative):
    config = small(gripper=gripper, chunk=2, execution_horizon=2)
    policy = TRMPolicy(config)
    if gripper in ("classifier", "binary"):
        set_output(policy, [0.0] * 12)
        logits = [0.0, 0.1, 0.1, 0.0] if gripper == "classifier" else [0.1, -0.1]
        with torch.no_grad():
            policy.head.gripper.weight.zero_()
            policy.head.gripper.bias.copy_(torch.tensor(logits))
    else:
        experts = 4 if gripper == "mixture" else 1
        set_output(policy, ([0.0] * 6 + [0.3] + [0.0] * 6 + [-0.2]) * experts)
    grippers = [policy.act(CountingObservation())[6] for _ in range(2)]
    assert grippers == pytest.approx([positive, negative])


def test_act_reports_the_recursions_used(monkeypatch):
    monkeypatch.setattr(model, "HALTING_THRESHOLD", 0.1)
    policy = TRMPolicy(small(halting="remainder", num_recursions=9))
    set_halting(policy, 0.5)
    policy.act(CountingObservation())
    assert policy.last_recursions == 4


def test_a_policy_that_has_acted_can_be_copied():
    policy = TRMPolicy(small())
    action = policy.act(CountingObservation())
    assert np.array_equal(copy.deepcopy(policy).act(CountingObservation()), action)


def test_act_refuses_numbers_that_are_not_finite():
    policy = TRMPolicy(small())
    set_output(policy, [float("nan")] * 7)
    with pytest.raises(RuntimeError, match="nan.*expected finite"):
        policy.act(CountingObservation())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(agentview_rgb=np.zeros((36, 36, 3))), r"'agentview_rgb'.*\(36, 36, 3\).*float64"),
        (dict(agentview_rgb=np.zeros((1, 36, 36, 3), np.uint8)), r"'agentview_rgb'.*\(H, W, 3\)"),
        (dict(ee_pos=np.zeros(4)), r"'ee_pos' has shape \(4,\); expected \(3,\)"),
        (dict(task_id=2), "'task_id' is 2; expected 0 to 1"),
        (dict(task_id=0.5), "'task_id'=0.5 is not valid; expected int"),
        (dict(task_id=None), "'task_id'=None is not valid; expected int"),
    ],
)
def test_act_reports_a_malformed_observation(change, message):
    policy = TRMPolicy(small(proprioception=True, conditioning="task_id", num_tasks=2))
    with pytest.raises(ValueError, match=message):
        policy.act(CountingObservation(**change))


def test_an_instruction_that_is_no_text_is_reported():
    policy = TRMPolicy(small(conditioning="language"))
    with pytest.raises(ValueError, match="observation 'language'=3 is not valid; expected str"):
        policy.act(CountingObservation(language=3))


def test_missing_observations_are_reported_with_the_found_keys():
    policy = TRMPolicy(small(proprioception=True))
    with pytest.raises(ValueError, match="'agentview_rgb' is missing; found ee_pos"):
        policy.act({"ee_pos": np.zeros(3)})
    images = observations(small(), 1)
    with pytest.raises(ValueError, match="'proprio' is missing; found agentview_rgb"):
        policy(images)


def test_batched_observations_of_another_size_are_refused():
    policy = TRMPolicy(small())
    with pytest.raises(ValueError, match=r"'agentview_rgb' has shape \(2, 3, 36, 36\)"):
        policy({"agentview_rgb": torch.rand(2, 3, 36, 36)})
