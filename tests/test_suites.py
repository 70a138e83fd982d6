"""The suites by name: LIBERO's own, and LIBERO-PRO's variations of four of them."""

import numpy as np
import pytest

from trm_helpers import schema
from trm_helpers.demos.collect import collect_demonstrations
from trm_helpers.demos.demo_files import normalize_instruction
from trm_helpers.schema import PROTOCOLS
from trm_helpers.sim.env import LiberoEnv, load_init_states, load_task, written_instruction

STANDARD = [suite for suite in schema.SUITES
            if suite not in schema.PRO_SUITES and suite != schema.JOINT_SUITE]


def test_there_are_sixteen_variations():
    assert sum(schema.SUITES[suite] for suite in STANDARD) == 130
    assert len(schema.PRO_SUITES) == 16
    assert schema.PRO_SUITES["libero_object_object"] == ("libero_object", "object")
    assert schema.base_suite("libero_10_lan") == "libero_10"
    assert schema.base_suite("libero_90") == "libero_90"
    with pytest.raises(ValueError, match="suite='libero_90_swap' is not valid"):
        schema.base_suite("libero_90_swap")


def test_a_variation_has_the_horizon_of_what_it_varies():
    found = {name: [protocol.horizon(f"libero_{suite}_swap")
                    for suite in ("spatial", "object", "goal", "10")]
             for name, protocol in PROTOCOLS.items()}
    assert found == {"quick": [220, 280, 300, 520], "libero": [600] * 4,
                     "openvla": [220, 280, 300, 520], "lerobot": [280, 280, 300, 520]}


@pytest.mark.parametrize("suite", schema.PRO_SUITES)
def test_a_variation_goes_task_by_task(suite):
    base, variation = schema.PRO_SUITES[suite]
    for task_id in range(schema.SUITES[suite]):
        task, plain = load_task(suite, task_id), load_task(base, task_id)
        assert task.name == plain.name and task.bddl_file != plain.bddl_file
        states = load_init_states(suite, task_id)
        assert states.shape == load_init_states(base, task_id).shape
        assert len(states) == schema.NUM_INIT_STATES
        assert not np.array_equal(states, load_init_states(base, task_id))
        if variation in ("swap", "object"):
            assert task.language == plain.language
        else:
            assert task.language == written_instruction(task.bddl_file)
            assert normalize_instruction(task.language) != normalize_instruction(plain.language)
    with pytest.raises(ValueError, match=f"task_id=10 is not in {suite}; expected 0 to 9"):
        load_task(suite, 10)


def test_the_joint_suite_has_the_tasks_of_four_one_after_the_other():
    tasks = [load_task("libero_40", task_id) for task_id in range(schema.SUITES["libero_40"])]
    own = [load_task(suite, task_id) for suite in schema.JOINED for task_id in range(10)]
    assert [task.name for task in tasks] == [task.name for task in own]
    assert [task.bddl_file for task in tasks] == [task.bddl_file for task in own]
    assert {(task.suite, task.task_id) for task in tasks} == {("libero_40", n) for n in range(40)}
    assert len({normalize_instruction(task.language) for task in tasks}) == 40
    assert schema.own_suite("libero_40", 39) == ("libero_10", 9)
    assert schema.own_suite("libero_90", 39) == ("libero_90", 39)
    assert np.array_equal(load_init_states("libero_40", 20), load_init_states("libero_goal", 0))
    for task_id in (40, -1):
        with pytest.raises(ValueError, match=f"task_id={task_id} is not in libero_40; expected 0 "):
            load_task("libero_40", task_id)
    assert PROTOCOLS["libero"].horizon("libero_40") == 0  # that of each suite


def test_nothing_is_collected_as_of_the_joint_suite(tmp_path):
    with pytest.raises(ValueError, match="no demonstrations of its own; expected one of libero_sp"):
        collect_demonstrations("libero_40", 0, 2, tmp_path)


@pytest.mark.sim
def test_an_episode_of_the_joint_suite_is_one_of_its_own_suite():
    with LiberoEnv("libero_40", 12) as joint, LiberoEnv("libero_object", 2) as own:
        found, expected = joint.reset(init_state=1), own.reset(init_state=1)
        assert joint.horizon == own.horizon == 280
        assert (found["task_id"], expected["task_id"]) == (12, 2)
        assert found["language"] == expected["language"]
        for key in (*schema.CAMERAS, *schema.LOW_DIM):
            assert np.array_equal(found[key], expected[key]), key


BOWL = "pick up the black bowl from table center and place it on the plate"


@pytest.mark.parametrize(("suite", "task_id", "told"), [
    ("libero_spatial", 2, BOWL), ("libero_spatial_swap", 2, BOWL),
    ("libero_spatial_lan", 2, "lift the black bowl from the table center and put it on the plate"),
    ("libero_goal_task", 7, "Turn off the stove"),
])
def test_the_policy_is_told_what_the_task_asks_for(suite, task_id, told):
    assert load_task(suite, task_id).language == told


def test_a_file_without_an_instruction_is_named(tmp_path):
    (tmp_path / "a.bddl").write_text("(define (problem nothing))")
    with pytest.raises(RuntimeError, match=r"a.bddl holds no \(:language"):
        written_instruction(tmp_path / "a.bddl")


def test_nothing_is_demonstrated_in_a_variation(tmp_path):
    message = "'libero_object_lan' measures robustness.*expected one of libero_spatial, .*libero_90"
    with pytest.raises(ValueError, match=message):
        collect_demonstrations("libero_object_lan", 0, 2, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.sim
def test_an_episode_of_a_variation_begins_as_in_any_suite():
    with LiberoEnv("libero_object_object", 0) as env:  # the soup in a larger tin
        observation = env.reset(init_state=3)
        assert env.horizon == 280 and env.object_position("bigger_alphabet_soup_1").shape == (3,)
        assert observation["language"] == "pick up the alphabet soup and place it in the basket"
        first = [np.array(observation[key]) for key in (*schema.CAMERAS, "joint_states")]
        env.step(np.array(schema.NO_OP))
        again = env.reset(init_state=3)
        for key, value in zip((*schema.CAMERAS, "joint_states"), first, strict=True):
            assert np.array_equal(again[key], value), key
