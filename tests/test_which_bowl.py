"""benchmarks/which_bowl*.py: what an instruction means, and what is scored."""

import sys

import numpy as np
import pytest
import torch

from trm_helpers.paths import repo_root


@pytest.fixture(scope="module", autouse=True)
def benchmarks_importable():
    sys.path.insert(0, str(repo_root() / "benchmarks"))
    yield
    sys.path.pop(0)


@pytest.fixture(scope="module")
def scenes():
    import which_bowl_scenes

    return which_bowl_scenes


@pytest.fixture(scope="module")
def bowl():
    import which_bowl

    return which_bowl


@pytest.mark.parametrize(("relation", "bowls", "expected"), [
    ("left of", [(0, 0.2), (0, -0.2)], 1),
    ("right of", [(0, 0.2), (0, -0.2)], 0),
    ("in front of", [(0.2, 0), (-0.2, 0)], 0),
    ("behind", [(0.2, 0), (-0.2, 0)], 1),
    ("left of", [(0, -0.1), (0.02, -0.2)], -1),  # two are
    ("left of", [(0, -0.2), (0.1, -0.1)], -1),  # another nearly is
    ("left of", [(0.2, 0), (-0.2, 0)], -1),  # none is
    ("nearest to", [(0.3, 0), (0, 0.1), (0.2, 0)], 1),
    ("farthest from", [(0.3, 0), (0, 0.1), (0.2, 0)], 0),
    ("nearest to", [(0.12, 0), (0, 0.1)], -1),  # 2 cm apart
    ("between", [(-0.1, 0), (0.2, 0.01)], 1),
    ("between", [(0.0, -0.1), (0.2, 0.2)], -1),
    ("between", [(0.2, 0), (0.2, 0.06)], -1),  # the second nearly is
])
def test_an_instruction_means_one_bowl_or_none(scenes, relation, bowls, expected):
    anchors = [np.zeros(2), np.array([0.4, 0.0])]
    assert scenes.answer(relation, anchors, np.array(bowls, float)) == expected


def test_sampled_places_do_not_touch(scenes):
    anchors, bowls = scenes.sample_places(6, np.random.default_rng(0))
    radii = [scenes.RADII[name] for name in scenes.ANCHORS] + 6 * [scenes.RADII["bowl"]]
    places = np.concatenate([anchors, bowls])
    gaps = [np.linalg.norm(places[a] - places[b]) - radii[a] - radii[b]
            for a in range(9) for b in range(a)]
    assert min(gaps) > 0


def test_only_clear_instructions_are_told_and_rare_ones_as_often(bowl):
    answers = torch.full((4000, bowl.INSTRUCTIONS), -1)
    answers[:, 0], answers[::4, 1] = 1, 2
    told = bowl.choose(answers, torch.Generator().manual_seed(0))
    assert (answers[torch.arange(4000), told] >= 0).all() and set(told.tolist()) == {0, 1}
    assert (told[::4] == 1).float().mean() > 0.7  # told in 4 of 5 of the scenes where it is clear


def test_the_bowl_nearest_to_the_best_cell_is_the_answer(bowl):
    bowls = torch.full((2, 6, 2), torch.nan)
    bowls[:, 0], bowls[:, 3] = torch.tensor([0.1, 0.9]), torch.tensor([0.8, 0.2])
    answers = torch.full((2, bowl.INSTRUCTIONS), -1)
    answers[:, 5] = torch.tensor([0, 3])
    told = torch.tensor([5, 5])
    meant = bowl.cell_of(bowls, answers[[0, 1], told])
    assert meant.tolist() == [14 * 16 + 1, 3 * 16 + 12]

    def knowing(frames, told, steps):
        return torch.nn.functional.one_hot(meant, 256).float()

    frames = torch.zeros(2, 128, 128, 3, dtype=torch.uint8)
    assert bowl.right(knowing, (frames, bowls, answers), told).tolist() == [True, True]
    answers[:, 5] = torch.tensor([3, 0])
    assert bowl.right(knowing, (frames, bowls, answers), told).tolist() == [False, False]


def test_arms_differ_only_in_layers_steps_and_width(bowl):
    arms = bowl.arms()
    sizes = {name: (len(arm.layers), arm.steps) for name, arm in arms.items()}
    assert sizes == {"recursion": (1, 6), "two layers": (2, 2), "one step": (1, 1),
                     "six layers": (6, 6), "one step, wide": (1, 1)}
    assert bowl.multiply_adds(bowl.wide()) >= 6 * bowl.multiply_adds(bowl.DIM)
    frames, told = torch.rand(1, 128, 128, 3), torch.tensor([3])
    one, six = (arms["recursion"](frames, told, steps) for steps in (1, 6))
    assert one.shape == (1, 256) and not torch.allclose(one, six)
    generator = torch.Generator().manual_seed(0)
    drawn = {bowl.depth(6, generator) for _ in range(500)}
    assert all(0 <= warm < steps <= 6 for steps, warm in drawn) and len(drawn) == 21


def test_steps_without_gradient_change_the_answer_and_not_the_gradient_of_the_rest(bowl):
    arm = bowl.Arm(2, 2)  # the first layer is applied in the step without a gradient
    arm(torch.rand(1, 128, 128, 3), torch.tensor([0]), 2, warm=1).sum().backward()
    assert all(p.grad is None for p in arm.layers[0].parameters())
    assert all(p.grad is not None for p in arm.layers[1].parameters())


@pytest.mark.sim
def test_bowls_are_dark_where_the_scene_says_and_absent_ones_nowhere(scenes):
    table = scenes.Table()
    try:
        anchors = np.array([[-0.2, 0.25], [0.1, 0.2], [0.1, 0.05]])
        bowls = np.array([[0.15, -0.2], [-0.15, -0.2]])
        with_bowls, centres = table.show(anchors, bowls)
        without, none = table.show(anchors, bowls[:0])
    finally:
        table.env.close()
    assert np.isnan(none).all() and np.isnan(centres[2:]).all()
    changed = np.abs(with_bowls.astype(int) - without).max(-1) > 30
    columns, rows = (128 * centres[:2]).astype(int).T
    assert changed[rows - 3, columns].all()
    assert columns[0] < 64 and rows[0] > rows[1] + 10  # left, and nearer to the camera
    assert changed.sum() == sum(changed[max(0, row - 16):row + 12, column - 14:column + 14].sum()
                                for row, column in zip(rows, columns, strict=True))
