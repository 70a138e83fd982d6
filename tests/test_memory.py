"""benchmarks/memory.py: what a policy sees where a camera blinks, in training as in control."""

import contextlib
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from demo_files import write_demo_file

from trm_helpers import schema
from trm_helpers.data.normalize import ActionNormalizer
from trm_helpers.paths import repo_root

memory = SimpleNamespace(**runpy.run_path(str(repo_root() / "benchmarks" / "memory.py")))
LENGTHS, APART, CHUNK, KEYPOINTS = (30, 21), 4, 8, ("bowl", "plate")


class Localizer(torch.nn.Module):
    """Positions that are the image's mean; of a black image 0."""

    known = torch.zeros(3, schema.LANGUAGE_DIM)

    def locate(self, images, task):
        return images.mean((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 1, len(KEYPOINTS), 2)


@pytest.fixture
def steps(monkeypatch):
    for name in ("observed", "windows"):
        monkeypatch.setitem(getattr(memory, name).__globals__, "NOISE", 0.0)
    torch.manual_seed(0)
    count = sum(LENGTHS)
    levels = torch.randint(1, 256, (count,))  # of a grey image at each step
    points = (levels / 255).view(-1, 1, 1).expand(-1, len(KEYPOINTS), 2)
    return levels, memory.Steps(
        points, torch.zeros_like(points), torch.randn(count, schema.PROPRIO_DIM),
        torch.randn(count, schema.LANGUAGE_DIM), torch.rand(count, CHUNK, 7) * 2 - 1,
        torch.ones(count, CHUNK), [(0, LENGTHS[0]), (LENGTHS[0], count)])


def make_policy(arm, condition="fourth"):
    data = SimpleNamespace(
        normalizer=ActionNormalizer("none").fit(np.zeros((2, 7))),
        proprio_stats={"mean": [0.0] * schema.PROPRIO_DIM, "std": [1.0] * schema.PROPRIO_DIM})
    return memory.BlinkingPolicy(arm, condition, data, Localizer(), KEYPOINTS)


def test_windows_hold_every_decision_of_every_episode_once(steps):
    stream = memory.windows(steps[1], 100, APART, torch.Generator().manual_seed(0))
    seen, firsts = [], 0
    for number in range(2 * 2):  # two epochs of all eight episodes: 8 decisions in 2 windows
        index, exists, is_first = next(stream)
        assert index.shape == (8, memory.WINDOW) and is_first == (number % 2 == 0)
        seen += index[exists].tolist()
        firsts += is_first
    assert firsts == 2 and sorted(seen) == sorted(2 * list(range(sum(LENGTHS))))


@pytest.mark.parametrize("condition", memory.SEEN)
@pytest.mark.parametrize("arm", memory.ARMS)
def test_training_shows_what_control_shows(steps, arm, condition, monkeypatch):
    """Every decision of one episode: the same positions, proprioception and age."""
    levels, steps = steps
    policy = make_policy(arm, condition)
    generator, before, shown = torch.Generator(), [], []
    one = steps._replace(demos=[(0, LENGTHS[0])])
    stream = memory.windows(one, APART, APART, torch.Generator().manual_seed(0))
    while len(shown) < 8:
        index, exists, is_first = next(stream)
        seen = memory.observed(arm, condition, steps, index, is_first, before, generator)
        row = index[:, 0].argmin()  # the episode that begins with the demonstration
        shown += [{key: value[row, place] for key, value in seen.items()}
                  for place in range(memory.WINDOW)]
    policy.reset()
    for decision in range(LENGTHS[0] // APART):
        step = APART * decision
        monkeypatch.setattr(
            memory.TRMPolicy, "prepare", lambda self, _, step=step: {
                memory.CAMERA: (levels[step] / 255).expand(1, 4, 4, 3),
                "proprio": steps.proprio[step][None], "language": steps.language[step][None]})
        found = policy.prepare({})
        for key in ("points", "proprio"):
            torch.testing.assert_close(found[key][0], shown[decision][key].reshape(
                found[key][0].shape))


def loss_of_first_decisions(policy, steps):
    """Of the four in an episode's first window, with what the arm remembers of those before."""
    index, exists, is_first = next(memory.windows(steps, 100, APART, torch.Generator()))
    assert is_first and exists.all()
    seen = memory.observed(policy.arm, "fourth", steps, index, True, [], torch.Generator())
    features, carry = [], None
    for place in range(memory.WINDOW):
        x = policy.encode({name: value[:, place] for name, value in seen.items()})
        recursion = policy.recurse(x, carry=carry)
        carry = recursion.carry if policy.config.carry_over else None
        features.append(recursion.output)
    return memory.loss_of(policy, torch.cat(features), steps.actions[index.T].flatten(0, 1),
                          steps.mask[index.T].flatten(0, 1)).item()


@pytest.mark.parametrize("arm", memory.ARMS)
def test_every_arm_learns_and_plays(steps, arm, monkeypatch):
    _, steps = steps
    monkeypatch.setitem(memory.train.__globals__, "WARM_UP", 1)
    torch.manual_seed(0)
    policy = make_policy(arm)
    first = loss_of_first_decisions(policy, steps)
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    memory.train(policy, "fourth", steps, 3, 0)
    assert loss_of_first_decisions(policy, steps) < first
    still = [name for name, weight in policy.named_parameters()
             if torch.equal(weight, before[name])]
    assert still == []
    policy.eval().reset()
    observation = {schema.STILL_CAMERA: np.full((64, 64, 3), 9, np.uint8),
                   "language": "pick up the black bowl from table center and place it on the plate",
                   **{key: np.zeros(schema.LOW_DIM[key]) for key in schema.PROPRIO_KEYS}}
    for _ in range(2 * APART):
        assert policy.act(observation).shape == (7,)
    assert (policy._carry is not None) == policy.config.carry_over and policy.decision == 2


def test_episodes_are_played_once_and_no_more_are_counted_than_asked_for(tmp_path, monkeypatch):
    played = []

    def run_episode(policy, env, init_state, seed=0, placement="benchmark"):
        played.append((policy, init_state, seed, placement))
        broken = {"policy_error": "ValueError: no"} if policy == "broken" else {}
        return {"task_id": env, "init_state": init_state, "seed": seed, "success": True, **broken}

    for name, fake in (("LiberoEnv", lambda _, task_id: contextlib.nullcontext(task_id)),
                       ("run_episode", run_episode)):
        monkeypatch.setitem(memory.play.__globals__, name, fake)
    memory.play({"reset": "a"}, tmp_path, 2)
    rows = memory.play({"reset": "a", "gru": "b"}, tmp_path, 3)
    assert [len(rows[arm]) for arm in ("reset", "gru")] == [9, 9]
    assert len(played) == len(set(played)) * len(memory.TASKS) == 18
    assert len(memory.play({"reset": "a"}, tmp_path, 1)["reset"]) == 3 and len(played) == 18
    other = tmp_path / "sampled"
    other.mkdir()
    memory.play({"reset": "a"}, other, 1, sampled=True)
    assert played[18:] == 3 * [("a", None, memory.SAMPLED_FROM, "wide")]
    with pytest.raises(RuntimeError, match="carried: ValueError: no"):
        memory.play({"carried": "broken"}, other, 1)


def test_positions_are_located_in_the_frames_as_they_are(tmp_path):
    files = [write_demo_file(tmp_path / f"{name}_demo.hdf5", (9, 6)) for name in "abc"]
    config = memory.settings("reset", 2).replace(conditioning="none")
    data = memory.LIBERODataset(files, config=config)
    data._language = torch.zeros(3, schema.LANGUAGE_DIM)
    data._use(data.demos, "all")
    found = memory.located(data, Localizer())
    frames = torch.cat([data._frames(memory.CAMERA, torch.arange(demo.first, demo.end),
                                     torch.device("cpu"), False) for demo in data.demos])
    torch.testing.assert_close(found.points[:, 0, 0], frames.mean((1, 2, 3)))
    assert len(found.points) == 3 * 15 and found.demos[1] == (9, 15)


def test_the_gru_is_not_larger_than_the_recursion():
    gru, recursion = (sum(weight.numel() for weight in make_policy(arm).block.parameters())
                      for arm in ("gru", "reset"))
    assert 0.95 * recursion < gru <= recursion


@pytest.mark.parametrize("arm", ["gated", "memory token", "memory token, one step"])
def test_a_gate_keeps_or_replaces_what_is_carried(arm):
    torch.manual_seed(0)
    policy = make_policy(arm).eval()
    x = torch.randn(2, 3 + CHUNK, policy.config.hidden_dim)
    with torch.no_grad():
        for weight in policy.gate.parameters():
            weight.zero_()
        half = policy.recurse(x).carry
        policy.gate.keep.bias.fill_(50.0)
        old = policy.recurse(x).carry
        assert torch.equal(policy.recurse(x, carry=old).carry, old)  # kept, whatever is seen
        policy.gate.keep.bias.fill_(-50.0)
        new = policy.recurse(x).carry
        torch.testing.assert_close(half, (old + new) / 2)
        assert not torch.allclose(policy.recurse(x, carry=new).output, policy.recurse(x).output)
