"""Token encoder, the paper's recursion against its pseudocode, early exit, deep supervision."""

import dataclasses
import math

import pytest
import torch
from learning import falls_below

from trm_helpers import schema
from trm_helpers.config import ModelConfig
from trm_helpers.policy import model
from trm_helpers.policy.layers import (
    STYLE_DIM,
    ActionHead,
    TokenEncoder,
    TransformerLayer,
    VisualEncoder,
)
from trm_helpers.policy.localizer import Localizer
from trm_helpers.policy.model import TRMPolicy
from trm_helpers.policy.recursion import TRMBlock
from trm_helpers.policy.variants import StyleEncoder, make_block

SIZES = dict(hidden_dim=16, image_size=32, image_grid=2, chunk=3)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trm(**settings) -> TRMPolicy:
    defaults = dict(variant="trm", num_recursions=3, latent_updates=2, cycles=2)
    return TRMPolicy(ModelConfig(**{**SIZES, **defaults, **settings})).eval()


def seen(count: int = 2, size: int = 32) -> dict:
    return {"agentview_rgb": torch.rand(count, size, size, 3)}


def make_batch(count: int = 4, size: int = 32) -> dict:
    """Samples that differ clearly: images of coarse coloured squares."""
    squares = torch.rand(count, 1, 4, 4, 3)
    side = size // 4
    actions = torch.rand(count, 1, 3, 7) * 2 - 1
    actions[..., 6] = actions[..., 6].sign()
    return {"observations": {
                "agentview_rgb": squares.repeat_interleave(side, 2).repeat_interleave(side, 3)},
            "actions": actions, "mask": torch.ones(count, 1, 3)}


# --- tokens --------------------------------------------------------------------------------------
def test_tokens_are_spatial_in_reading_order():
    encoder = TokenEncoder(16, image_size=64, grid=2)
    black = torch.zeros(1, 64, 64, 3)
    before = encoder(black)
    assert before.shape == (1, 4, 16)
    for token, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        image = black.clone()
        image[:, 32 * row + 8:32 * row + 20, 32 * column + 8:32 * column + 20] = 1
        change = (encoder(image) - before).norm(dim=-1)[0]
        assert change.argmax() == token


@pytest.mark.parametrize("encoder", [
    lambda: TokenEncoder(16, 64, 2, "silu"), lambda: VisualEncoder(16, 64, "silu")])
def test_silu_maps_grey_to_zero_and_keeps_every_unit_active(encoder):
    """After a step so large that the reference's ReLU units are inactive."""
    silu = encoder().convolutions
    reached = []
    silu[1].register_forward_hook(lambda _, given, __: reached.append(given[0]))
    silu(torch.full((1, 3, 64, 64), 0.5))
    assert (reached[0] == 0).all()
    relu = torch.nn.Sequential(*[torch.nn.ReLU() if isinstance(layer, torch.nn.SiLU) else layer
                                 for layer in silu])
    with torch.no_grad():
        silu[-2].bias.fill_(-20.0)
    pictures = torch.rand(4, 3, 64, 64)
    for layers, dead in ((relu, True), (silu, False)):
        silu[-2].zero_grad()
        layers(pictures).sum().backward()
        assert (silu[-2].weight.grad == 0).all() == dead


def test_a_token_encodes_positions_within_its_patch():
    encoder = TokenEncoder(16, image_size=64, grid=2)
    left, right = torch.zeros(2, 1, 64, 64, 3)
    left[:, 8:16, 4:12] = 1
    right[:, 8:16, 20:28] = 1
    assert (encoder(left) - encoder(right))[0, 0].abs().max() > 0.01


def test_sequence_holds_cameras_proprioception_task_and_action_queries():
    policy = trm(cameras=tuple(schema.CAMERAS), proprioception=True, conditioning="language")
    x = policy.encode({**{camera: torch.rand(2, 32, 32, 3) for camera in schema.CAMERAS},
                       "proprio": torch.randn(2, schema.PROPRIO_DIM),
                       "language": torch.randn(2, schema.LANGUAGE_DIM)})
    assert x.shape == (2, 4 + 4 + 1 + 1 + 3, 16)
    assert torch.equal(x[0, -3:], policy.action_queries)


def test_transformer_layer_equals_plain_loops():
    layer = TransformerLayer(8, num_heads=2)
    tokens = torch.randn(1, 3, 8)
    qkv = tokens[0] @ layer.qkv.weight.T  # (3, 24)
    heads = []
    for head in range(2):
        q, k, v = (qkv[:, 8 * part + 4 * head:8 * part + 4 * head + 4] for part in range(3))
        heads.append((q @ k.T / math.sqrt(4)).softmax(-1) @ v)

    def rms_norm(values):
        return values / (values.square().mean(-1, keepdim=True)
                         + torch.finfo(values.dtype).eps).sqrt()

    h = rms_norm(tokens[0] + torch.cat(heads, dim=-1) @ layer.attended.weight.T)
    gate, up = (h @ layer.gate_up.weight.T).chunk(2, dim=-1)
    expected = rms_norm(h + (gate / (1 + (-gate).exp()) * up) @ layer.down.weight.T)
    torch.testing.assert_close(layer(tokens)[0], expected, atol=1e-6, rtol=1e-5)


def test_tokens_encode_the_position_of_their_patch():
    encoder = TokenEncoder(16, 32, 2)
    with torch.no_grad():
        encoder.project.weight.zero_()
        encoder.project.bias.zero_()
    tokens = encoder(torch.rand(3, 32, 32, 3))
    assert torch.equal(tokens, encoder.position.expand(3, 4, 16)) and tokens.abs().max() > 0


def test_a_task_without_scale_and_shift_leaves_the_localizer_unchanged():
    plain, conditioned = Localizer(2), Localizer(2, num_tasks=3, task_dim=4)
    missing, unknown = conditioned.load_state_dict(
        {name: weight for name, weight in plain.state_dict().items() if name != "known"}, False)
    assert set(missing) == {"known", "task.weight", "task.bias"} and not unknown
    with torch.no_grad():
        conditioned.task.weight.zero_()
        conditioned.task.bias.zero_()
    images = torch.rand(2, 32, 32, 3)
    torch.testing.assert_close(conditioned(images, torch.rand(2, 4)), plain(images))


# --- the paper's recursion -----------------------------------------------------------------------
def latent_recursion(net, x, y, z, n):
    """Figure 3 of arXiv 2510.04871, written again."""
    for _ in range(n):
        z = net(x + y + z)
    y = net(y + z)
    return y, z


def deep_recursion(net, x, y, z, n, T):
    with torch.no_grad():
        for _ in range(T - 1):
            y, z = latent_recursion(net, x, y, z, n)
    return latent_recursion(net, x, y, z, n)


@pytest.mark.parametrize("n, T, supervision", [(1, 1, 1), (6, 3, 1), (2, 3, 4)])
def test_recursion_equals_the_papers_pseudocode(n, T, supervision):
    policy = trm(latent_updates=n, cycles=T, num_recursions=supervision)
    x = policy.encode(seen())
    y, z = (first.expand_as(x) for first in policy.block.first)
    for _ in range(supervision):
        y, z = deep_recursion(policy.block.net, x, y, z, n, T)
    recursion = policy.recurse(x)
    torch.testing.assert_close(recursion.output, y[:, -3:], atol=1e-6, rtol=0)
    torch.testing.assert_close(recursion.carry, torch.stack([y, z], dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("T", [1, 3])  # with one cycle only detaching the state separates steps
def test_gradients_equal_those_of_the_papers_pseudocode(T):
    policy = trm(latent_updates=2, cycles=T, num_recursions=2, deep_supervision=True).train()
    x = policy.encode(seen()).detach().requires_grad_()
    states = policy.recurse(x).states[1:]
    torch.stack([state.square().sum() for state in states]).sum().backward()
    mine = x.grad.clone()
    weights = [parameter.grad.clone() for parameter in policy.block.parameters()]
    x.grad = None
    policy.zero_grad()
    y, z = (first.expand_as(x) for first in policy.block.first)
    for _ in range(2):
        y, z = deep_recursion(policy.block.net, x, y.detach(), z.detach(), 2, T)
        y[:, -3:].square().sum().backward()
    torch.testing.assert_close(mine, x.grad, atol=1e-5, rtol=1e-4)
    for gradient, parameter in zip(weights, policy.block.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-4)


# --- recursion is not a no-op --------------------------------------------------------------------
def test_every_depth_differs():
    policy, observations = trm(num_recursions=4), seen()
    answers = [policy(observations, num_recursions=n) for n in (1, 2, 4)]
    assert (answers[0] - answers[1]).abs().max() > 1e-4
    assert (answers[1] - answers[2]).abs().max() > 1e-4
    for name in ("latent_updates", "cycles"):
        before, kept = policy(observations), getattr(policy.block, name)
        setattr(policy.block, name, kept + 2)
        assert (policy(observations) - before).abs().max() > 1e-4, name
        setattr(policy.block, name, kept)


def test_the_observation_has_gradient_in_the_last_step():
    policy = trm()
    x = policy.encode(seen()).detach()
    carry = policy.recurse(x).carry.detach()
    x.requires_grad_()
    policy.recurse(x, 1, carry=carry).output[:, 0, 0].sum().backward()
    image_tokens = x.grad[:, :4]
    assert (image_tokens.abs().amax(dim=-1) > 1e-6).all()


def test_the_output_depends_on_reinjection():
    policy = trm()
    x = policy.encode(seen())
    first = policy.recurse(x, 1)
    shown = policy.recurse(x, 1, carry=first.carry).output
    hidden = policy.recurse(torch.zeros_like(x), 1, carry=first.carry).output
    assert (shown - hidden).abs().max() > 1e-3


def test_gradient_reaches_the_last_cycle_of_its_own_step_only():
    policy = trm(deep_supervision=True, num_recursions=2).train()
    x = torch.randn(1, 7, 16, requires_grad=True)
    carry = torch.randn(1, 2, 7, 16, requires_grad=True)
    recursion = policy.recurse(x, carry=carry)
    recursion.states[2].sum().backward()
    assert carry.grad is None or not carry.grad.any()  # detached before the first step
    assert x.grad.abs().sum() > 0
    carry.grad = None
    policy.block(carry, x).sum().backward()
    assert carry.grad is None  # the first of two cycles has no gradient
    policy.eval().block(carry, x).sum().backward()
    assert carry.grad.abs().sum() > 0  # in evaluation mode, for saliency, it has one


def test_start_is_the_same_for_every_sample_and_is_not_trained():
    policy = trm()
    start = policy.block.initial_state(policy.encode(seen(3)))
    assert torch.equal(start[0], start[2]) and not torch.equal(start[:, 0], start[:, 1])
    assert "block.first" in policy.state_dict()
    assert "block.first" not in dict(policy.named_parameters())


def test_a_sample_does_not_depend_on_the_others():
    policy, observations = trm(), seen(3)
    alone = {"agentview_rgb": observations["agentview_rgb"][1:2]}
    torch.testing.assert_close(policy(observations)[1:2], policy(alone), atol=1e-5, rtol=1e-4)


def test_far_more_recursions_than_trained_stay_finite():
    answer = trm()(seen(), num_recursions=200)
    assert answer.isfinite().all()


# --- halting -------------------------------------------------------------------------------------
def set_halting(policy: TRMPolicy, weight: torch.Tensor) -> None:
    """Give the halting head this weight (D,) and no bias: samples halt at different depths."""
    with torch.no_grad():
        policy.halt.weight.copy_(weight.view(1, -1))
        policy.halt.bias.zero_()


def test_learned_halting_stops_each_sample_at_its_first_positive_logit():
    policy = trm(halting="learned", num_recursions=6)
    x = torch.randn(16, 7, 16)
    policy.train()
    states = policy.recurse(x).states[1:]
    policy.eval()
    set_halting(policy, torch.randn(16))
    says = torch.stack([policy._halting_logit(state) > 0 for state in states])  # (steps, B)
    expected = torch.where(says.any(0), says.int().argmax(0) + 1, 6)
    recursion = policy.recurse(x)
    assert torch.equal(recursion.depth, expected) and len(set(expected.tolist())) > 1
    for sample, depth in enumerate(expected.tolist()):
        torch.testing.assert_close(recursion.output[sample], states[depth - 1][sample],
                                   atol=1e-5, rtol=1e-4)


def test_convergence_stops_when_actions_no_longer_change():
    policy = trm(halting="convergence", num_recursions=30, convergence_threshold=1e-6)
    recursion = policy.recurse(policy.encode(seen(8)))
    for sample, depth in enumerate(recursion.depth.tolist()):
        actions = [policy.head(state[sample:sample + 1])[0] for state in recursion.states]
        moved = [(b - a).square().sum(-1).max().item()
                 for a, b in zip(actions[1:depth], actions[2:depth + 1], strict=True)]
        assert all(change >= 1e-6 for change in moved[:-1])
        assert depth == 30 or moved[-1] < 1e-6
    loose = trm(halting="convergence", num_recursions=30, convergence_threshold=1e9)
    assert loose.recurse(loose.encode(seen(4))).depth.tolist() == [2] * 4


def test_halted_samples_are_not_computed():
    policy = trm(halting="learned", num_recursions=6)
    x = torch.randn(16, 7, 16)
    set_halting(policy, torch.randn(16))
    sizes = []
    policy.block.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    depth = policy.recurse(x).depth
    assert sizes == [int((depth >= step).sum()) for step in range(1, len(sizes) + 1)]
    assert sum(sizes) == depth.sum() < 6 * 16


def test_converged_samples_are_not_computed():
    policy = trm(halting="convergence", num_recursions=12)
    x = policy.encode(seen(16))
    policy.config = dataclasses.replace(policy.config, convergence_threshold=between_changes(
        policy, x))
    sizes = []
    policy.block.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    depth = policy.recurse(x).depth
    assert sizes == [int((depth >= step).sum()) for step in range(1, len(sizes) + 1)]
    assert sum(sizes) == depth.sum() < 12 * 16 and len(set(depth.tolist())) > 1


def between_changes(policy, x) -> float:
    """A threshold that only some of the samples are below after the second step."""
    policy.config = dataclasses.replace(policy.config, convergence_threshold=1e-12)
    first, second = (policy.head(state)[0] for state in policy.recurse(x).states[1:3])
    return (second - first).square().sum(-1).amax(-1).median().item()


def test_halting_heads_read_the_mean_over_the_answers():
    policy = trm(halting="adaptive")
    answers = torch.randn(4, 3, 16)
    expected = answers.mean(dim=1) @ policy.halt.weight[0] + policy.halt.bias
    torch.testing.assert_close(policy._halting_logit(answers), expected)


def test_learned_halting_is_trained_on_the_tolerance(monkeypatch):
    monkeypatch.setattr(model, "HALTING_TOLERANCE", 0.5)
    policy = trm(halting="learned", deep_supervision=True).train()
    batch = make_batch(8)
    _, parts = policy.loss(batch, "l1")
    expected = []
    target = batch["actions"][:, 0]
    for state in policy.recurse(policy.encode(batch["observations"])).states[1:]:
        right = ((policy.head(state)[0] - target).abs().mean((1, 2)) <= 0.5).float()
        p = policy._halting_logit(state).sigmoid()
        expected.append(-(right * p.log() + (1 - right) * (1 - p).log()).mean())
    torch.testing.assert_close(parts["halting"], torch.stack(expected).mean())
    assert parts["halting"] > 0


def test_learned_halting_masks_missing_actions_and_is_weighted(monkeypatch):
    monkeypatch.setattr(model, "HALTING_TOLERANCE", 1.0)
    monkeypatch.setattr(model, "HALTING_WEIGHT", 0.3)
    policy = trm(halting="learned").train()
    batch = make_batch(4)
    with torch.no_grad():
        policy.halt.bias.fill_(1.0)
    total, parts = policy.loss(batch, "l1")
    batch["mask"][..., -1] = 0.0
    batch["actions"][..., -1, :] = 100.0  # masked: makes no answer wrong
    total, parts = policy.loss(batch, "l1")
    # all answers are right: -log sigmoid(1), as the head's weights begin at 0
    assert parts["halting"].item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-5)
    assert total.item() == pytest.approx(
        parts["action"].item() + 0.3 * parts["halting"].item(), rel=1e-5)
    assert parts["final"].item() == pytest.approx(parts["action"].item())


@pytest.mark.parametrize("supervised", [True, False])
def test_deep_supervision_cuts_the_gradient_between_steps(supervised):
    """Of the reference block too, whose state is its answer."""
    policy = TRMPolicy(ModelConfig(hidden_dim=16, image_size=36, deep_supervision=supervised))
    states = policy.train().recurse(torch.randn(2, 16)).states
    (gradient,) = torch.autograd.grad(states[2].sum(), states[1], allow_unused=True)
    assert (gradient is None) == supervised


def test_learned_halting_learns_to_stop(monkeypatch):
    monkeypatch.setattr(model, "HALTING_TOLERANCE", 0.2)
    policy = trm(halting="learned", deep_supervision=True, hidden_dim=32, latent_updates=1,
                 cycles=1)
    batch = make_batch(4)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)

    def steps():
        policy.train()
        for _ in range(5):
            optimizer.zero_grad()
            policy.loss(batch, "l1")[0].backward()
            optimizer.step()
        policy.eval()
        policy(batch["observations"])
        return max(policy.last_depth.float().mean() / 3, policy.loss(batch, "l1")[0] / 0.2)

    assert falls_below(1, steps, 40)


# --- deep supervision, other variants ------------------------------------------------------------
def test_deep_supervision_is_the_mean_over_the_steps():
    policy = trm(deep_supervision=True).train()
    batch = make_batch()
    states = policy.recurse(policy.encode(batch["observations"])).states[1:]
    target = batch["actions"][:, 0]
    expected = torch.stack([(policy.head(state)[0] - target).abs().mean() for state in states])
    total, _ = policy.loss(batch, "l1")
    torch.testing.assert_close(total, expected.mean())
    torch.testing.assert_close(policy.eval().loss(batch, "l1")[0], expected[-1])


def test_blocks_share_weights_but_the_transformer_does_not():
    def count(**settings):
        block = make_block(ModelConfig(**{**SIZES, "num_recursions": 1, **settings}))
        return sum(parameter.numel() for parameter in block.parameters())

    layer = sum(parameter.numel() for parameter in TransformerLayer(16, 4).parameters())
    assert count(variant="trm", latent_updates=6, cycles=3) == count(variant="trm") == 2 * layer
    assert count(variant="transformer", num_layers=14) == 14 * layer


def test_transformer_applies_its_layers_once():
    policy = trm(variant="transformer", num_layers=3)
    x = policy.encode(seen())
    expected = x
    for layer in policy.block.net:
        expected = layer(expected)
    torch.testing.assert_close(policy.recurse(x).output, expected[:, -3:])
    assert not isinstance(policy.block, TRMBlock)


def act(**settings) -> TRMPolicy:
    return trm(variant="act", **settings)


def test_act_queries_attend_to_the_observation_and_not_vice_versa():
    policy = act(num_layers=1)
    x = policy.encode(seen())
    assert x.shape == (2, 4 + 1 + 3, 16)  # image, style, queries
    context = policy.block.net.encoder(x[:, :-3])
    expected = policy.block.net.decoder(x[:, -3:], context)
    torch.testing.assert_close(policy.recurse(x).output, expected)
    nearer = x.clone()
    nearer[:, 0] = nearer[:, 1]
    assert (policy.recurse(nearer).output - policy.recurse(x).output).abs().max() > 1e-3


@pytest.mark.parametrize("variant", schema.RECURSIVE)
@pytest.mark.parametrize("halting", schema.HALTING)
def test_every_recursion_halts_by_every_rule(variant, halting):
    policy = trm(variant=variant, halting=halting, image_size=64)
    x = policy.encode(seen(size=64))
    assert policy.recurse(x).carry.shape == policy.block.initial_state(x).shape
    total, _ = policy.loss(make_batch(size=64), "l1")
    assert total.isfinite()


def test_act_style_is_sampled_in_training_and_zero_in_control(monkeypatch):
    monkeypatch.setattr(model, "KL_WEIGHT", 2.0)
    policy, batch = act(), make_batch()
    zero = policy.encode(batch["observations"], torch.zeros(4, STYLE_DIM))
    assert torch.equal(policy.encode(batch["observations"]), zero)
    assert "kl" not in policy.loss(batch, "l1")[1]

    policy.training = True  # and no dropout below
    mean, log_variance = policy.style(batch["actions"][:, 0], batch["mask"][:, 0])
    torch.manual_seed(3)
    total, parts = policy.loss(batch, "l1")
    torch.manual_seed(3)
    style = mean + torch.randn(4, STYLE_DIM) * log_variance.exp().sqrt()
    answer = policy.recurse(policy.encode(batch["observations"], style)).output
    error = (policy.head(answer)[0] - batch["actions"][:, 0]).abs().mean()
    given = torch.distributions.Normal(mean, log_variance.exp().sqrt())
    kl = torch.distributions.kl_divergence(given, torch.distributions.Normal(0, 1)).sum(-1).mean()
    torch.testing.assert_close(parts["kl"], kl)
    torch.testing.assert_close(total, error + 2.0 * kl)


def test_a_sample_without_valid_actions_has_no_divergence():
    """As in the empty share of a process."""
    policy, batch = act(), make_batch()
    policy.training = True
    batch["mask"][1:3] = 0
    divergence = policy.style.divergence(*policy.style(batch["actions"][:, 0], batch["mask"][:, 0]))
    expected = (divergence[0] + divergence[3]) / 2
    assert abs(expected - divergence.mean()) > 1e-6
    torch.testing.assert_close(policy.loss(batch, "l1")[1]["kl"], expected.detach())


def test_act_style_masks_missing_actions():
    style = StyleEncoder(16, 2, 1, chunk=3).eval()
    actions, mask = torch.rand(2, 3, 7), torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    other = actions.clone()
    other[:, 2] += 1
    (mean, _), (changed, _) = style(actions, mask), style(other, mask)
    torch.testing.assert_close(mean[0], changed[0])
    assert (mean[1] - changed[1]).abs().max() > 1e-4


@pytest.mark.parametrize("settings", [
    dict(variant="act"),
    dict(variant="trm", deep_supervision=True), dict(variant="trm", gripper="binary"),
    dict(variant="trm", halting="adaptive"), dict(variant="trm", gripper="mixture"),
    dict(variant="transformer"), dict(variant="block", gripper="binary"),
    dict(variant="block", deep_supervision=True), dict(variant="block", halting="learned"),
])
def test_variants_overfit_a_batch(settings):
    config = {**SIZES, "image_size": 64, "num_recursions": 2, "latent_updates": 1, "cycles": 2,
              "hidden_dim": 32}
    policy = TRMPolicy(ModelConfig(**{**config, **settings}))
    batch = make_batch(4, size=64)
    lr = 1e-3 if settings["variant"] == "act" else 3e-3  # its layers need smaller steps
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)

    def step():
        optimizer.zero_grad()
        loss, parts = policy.loss(batch, "l1")
        loss.backward()
        optimizer.step()
        return parts["action"].item()

    assert falls_below(0.55 * step(), step, 159)  # one answer for all samples is at 0.63


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_hidden_unit_of_the_head_that_is_off_learns_only_with_silu(activation):
    head = ActionHead(ModelConfig(hidden_dim=8, head_activation=activation))
    torch.nn.init.constant_(head.hidden.bias, -3.0)  # off for all inputs, as after one large update
    torch.nn.init.zeros_(head.hidden.weight)
    actions, _ = head(torch.randn(4, 8))
    actions.sum().backward()
    assert bool(head.hidden.bias.grad.abs().sum() > 0) == (activation == "silu")
