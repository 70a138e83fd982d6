import types

import numpy as np
import pytest

from trm_helpers.collect import Disturbance, record_demonstration
from trm_helpers.experts import PickPlaceExpert, Style, pick_place_goal
from trm_helpers.sim import LiberoEnv


def scene(goal, bodies=("soup_1", "basket_1")):
    """As much of an environment as the goal is read from."""
    site = types.SimpleNamespace(parent_name="basket_1")
    raw = types.SimpleNamespace(parsed_problem={"goal_state": goal},
                                obj_body_id=dict.fromkeys(bodies, 1),
                                object_sites_dict={"basket_1_contain_region": site})
    return types.SimpleNamespace(raw=raw, task=types.SimpleNamespace(name="a task"))


def test_goal_is_read_from_the_predicates():
    assert pick_place_goal(scene([["in", "soup_1", "basket_1_contain_region"]])) \
        == ("soup_1", "basket_1")
    assert pick_place_goal(scene([["On", "soup_1", "basket_1"]])) == ("soup_1", "basket_1")


@pytest.mark.parametrize("goal", [
    [["open", "drawer_1"]],
    [["on", "soup_1", "basket_1"], ["on", "basket_1", "soup_1"]],
])
def test_other_goals_are_refused(goal):
    with pytest.raises(ValueError, match="a task: the goal .* is not one On or In predicate"):
        pick_place_goal(scene(goal))


def test_styles_vary_within_their_bounds_and_follow_the_seed():
    styles = [Style.sample(np.random.default_rng(seed)) for seed in range(50)]
    assert styles[3] == Style.sample(np.random.default_rng(3)) != styles[4]
    speeds = [style.speed for style in styles]
    assert 0.85 <= min(speeds) < 0.88 and 0.97 < max(speeds) <= 1.0


def test_a_disturbance_comes_in_bursts_and_leaves_the_gripper_alone():
    disturbance = Disturbance(np.random.default_rng(0), probability=0.05)
    action = np.array([0.1, 0.2, 0.3, 0, 0, 0, 1.0])
    executed = np.array([disturbance.apply(action) for _ in range(2000)])
    pushed = (executed != action).any(axis=1)
    bursts = np.diff(np.flatnonzero(np.diff(pushed.astype(int))))
    assert 0.1 < pushed.mean() < 0.35 and bursts.max() >= 3
    assert (executed[:, 6] == 1).all() and (executed[~pushed] == action).all()
    strength = np.linalg.norm(executed[pushed, :3], axis=1)
    assert strength.min() >= 0.3 and strength.max() <= 0.9


def test_no_disturbance_without_probability():
    calm = Disturbance(np.random.default_rng(0), probability=0.0, start_probability=0.0)
    action = np.full(7, 0.5)
    assert all((calm.apply(action) == action).all() for _ in range(100))


@pytest.mark.sim
@pytest.mark.parametrize(("suite", "task_id"), [("libero_object", 5), ("libero_spatial", 2)])
def test_the_expert_succeeds_from_a_fresh_placement(suite, task_id):
    with LiberoEnv(suite, task_id) as env:
        env.reset(seed=1)
        expert, success, steps, actions = PickPlaceExpert(env), False, 0, []
        while not success and steps < 160:
            actions.append(expert.act())
            _, success = env.step(actions[-1])
            steps += 1
        assert success and steps > 50  # the length of the human demonstrations, about 100
        assert np.abs(actions).max() <= 1
        assert set(np.array(actions)[:, 6]) == {-1.0, 1.0}

        record = None
        for attempt in range(3):  # some pushes are too much for it: such attempts are dropped
            record = record or record_demonstration(env, np.random.default_rng(attempt))
        pushed = (np.array(record["actions"]) != np.array(record["executed_actions"])).any(axis=1)
        assert pushed.sum() >= 3
