"""The real simulator: observations, and the order of an episode."""

import logging
import os
import shutil
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from trm_helpers import schema
from trm_helpers.sim import env as sim
from trm_helpers.sim.env import LiberoEnv, load_init_states, load_task

SUITE, TASK = "libero_object", 0
MOVES = np.random.default_rng(0).uniform(-1, 1, (12, 7))
pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def env():
    with LiberoEnv(SUITE, TASK) as made:
        yield made


def played(env, observation, moves):
    """The observations of a sequence of actions, read only after the last one."""
    seen = [observation]
    for action in moves:
        seen.append(env.step(action)[0])
    return [{key: np.array(each[key]) for key in each} for each in seen]


def test_an_environment_without_settle_steps_is_refused():
    with pytest.raises(ValueError, match="settle_steps=0 is not valid; expected at least 1"):
        LiberoEnv(SUITE, TASK, settle_steps=0)


@pytest.mark.parametrize("level", [logging.NOTSET, logging.INFO, logging.CRITICAL])
def test_a_program_that_has_silenced_logging_keeps_it_silenced(level):
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        with sim.quiet():
            assert logging.root.manager.disable == max(level, logging.WARNING)
        assert logging.root.manager.disable == level
    finally:
        logging.disable(before)


def test_lazy_frames_equal_frames_rendered_in_every_step_bit_for_bit(env):
    lazy = played(env, env.reset(init_state=3), MOVES)
    with LiberoEnv(SUITE, TASK, lazy=False) as eager_env:
        eager = played(eager_env, eager_env.reset(init_state=3), MOVES)
    assert set(lazy[0]) == {*schema.CAMERAS, *schema.LOW_DIM, "task_id", "language"}
    for one, other in zip(lazy, eager, strict=True):
        for key in one:
            assert np.array_equal(one[key], other[key]), key
    moving = [np.abs(a["agentview_rgb"].astype(int) - b["agentview_rgb"]).max()
              for a, b in zip(lazy, lazy[1:], strict=False)]
    assert min(moving) > 0  # the arm was in motion throughout


@pytest.mark.parametrize("start", [{"init_state": 3}, {"seed": 4}])
def test_an_episode_in_the_same_model_equals_one_in_a_rebuilt_model_bit_for_bit(
        env, start, monkeypatch):
    model = env.sim.model
    played(env, env.reset(seed=7), MOVES[::-1])
    model._model.geom_rgba[:] = model._model.body_pos[:] = 0.5  # whatever a user has changed
    model._model.opt.gravity[:], model._model.opt.iterations = (0, 0, 1), 1
    kept = played(env, env.reset(**start), MOVES)
    assert env.sim.model is model
    state, places = env.state(), model._model.body_pos.copy()
    monkeypatch.setattr(env.raw.kept_model, "xml", "another model's")
    built = played(env, env.reset(**start), MOVES)
    assert env.sim.model is not model
    assert np.array_equal(env.state(), state)
    assert np.array_equal(env.sim.model._model.body_pos, places)
    for one, other in zip(built, kept, strict=True):
        for key in one:
            assert np.array_equal(one[key], other[key]), key


def test_collection_sees_what_control_sees_while_the_arm_moves(env, monkeypatch):
    """A sampled layout, and the same layout set as an init state: equal bit for bit."""
    placements = []
    set_state = env._env.set_init_state
    monkeypatch.setattr(env._env, "set_init_state",
                        lambda state: placements.append(state.copy()) or set_state(state))
    collected = played(env, env.reset(seed=0), MOVES)
    monkeypatch.setattr(env, "_init_states", np.stack(placements))
    controlled = played(env, env.reset(init_state=0), MOVES)
    for one, other in zip(collected, controlled, strict=True):
        for key in one:
            assert np.array_equal(one[key], other[key]), key


def test_an_observation_is_not_the_current_state(env):
    """robosuite samples it during the step; at rest there is no difference."""
    observation = env.reset(init_state=0)
    assert np.allclose(observation["ee_pos"], env.end_effector(), atol=1e-4)
    for _ in range(4):
        observation, _ = env.step(np.array([1.0, 0, 0, 0, 0, 0, -1]))
    assert 1e-4 < np.linalg.norm(observation["ee_pos"] - env.end_effector()) < 6e-3


def test_an_episode_begins_in_the_benchmarks_order(env, monkeypatch):
    env.reset(seed=0)  # the next init state then needs its own fixtures
    calls = []

    def spy(owner, name, note):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name,
                            lambda *given: calls.append(note(*given)) or original(*given))

    spy(env._env, "seed", lambda seed: ("seed", seed))
    spy(env.raw, "reset", lambda: "reset")
    spy(env._env, "set_init_state", lambda state: ("state", state.tolist()))
    spy(env._env, "step", lambda action: ("step", action.tolist()))
    states = load_init_states(SUITE, TASK)
    assert states.shape == (schema.NUM_INIT_STATES, 110)
    observation = env.reset(init_state=7)
    settle = ("step", [0, 0, 0, 0, 0, 0, -1])
    assert calls == [("seed", 0), "reset", ("state", states[7].tolist()), *[settle] * 10]
    assert np.allclose(observation["joint_states"], states[7, 1:8], atol=0.05)
    assert np.array_equal(env.set_state(states[3])["joint_states"], states[3, 1:8])

    calls.clear()
    observation = env.reset(init_state=4)
    assert calls == [("seed", 0), "reset", ("state", states[4].tolist()), *[settle] * 10]
    assert np.allclose(observation["joint_states"], states[4, 1:8], atol=0.05)
    assert np.isclose(env.state()[0], states[4, 0] + 10 / schema.CONTROL_HZ)  # its time


def test_reset_is_reproducible_and_leaves_numpys_generator_alone(env):
    np.random.seed(11)
    expected = np.random.get_state()[1].copy()
    env.reset(seed=1)
    first = env.state()
    assert np.array_equal(np.random.get_state()[1], expected)
    env.reset(seed=2)
    assert not np.allclose(env.state(), first)
    env.reset(seed=1)
    assert np.array_equal(env.state(), first)


def test_an_unread_frame_is_lost_with_the_model_and_says_so(env, monkeypatch):
    seen = env.reset(init_state=0)
    in_time = seen["agentview_rgb"]
    old = env.reset(init_state=0)
    env.reset(seed=1)  # in the same model
    assert np.array_equal(old["agentview_rgb"], in_time)
    old = env.reset(init_state=0)
    monkeypatch.setattr(env.raw.kept_model, "xml", "another model's")
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match="frame of agentview was not read before"):
        old["agentview_rgb"]
    assert old["ee_pos"].shape == (3,)


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan), np.zeros((1, 7))])
def test_a_malformed_action_is_refused(env, action):
    with pytest.raises(ValueError, match="expected 7 finite numbers"):
        env.step(action)


def test_unknown_names_and_indices_are_refused(env):
    with pytest.raises(ValueError, match="init_state=50 is not valid .* expected 0 to 49"):
        env.reset(init_state=50)
    with pytest.raises(ValueError, match="no object 'teapot'.*alphabet_soup_1"):
        env.object_position("teapot")
    with pytest.raises(ValueError, match="state has shape"):
        env.set_state(np.zeros(3))
    with pytest.raises(ValueError, match="suite='libero' is not valid"):
        load_task("libero", 0)
    with pytest.raises(ValueError, match="task_id=10 .* expected 0 to 9"):
        load_task(SUITE, 10)


def test_a_layout_that_is_never_found_ends_in_an_error(env, monkeypatch):
    from robosuite.utils.errors import RandomizationError

    tries = []

    def fail():
        tries.append(1)
        raise RandomizationError("no room")

    monkeypatch.setattr(env.raw, "reset", fail)
    with pytest.raises(RuntimeError, match="no collision-free layout of the objects in 20"):
        env.reset(seed=0)
    assert len(tries) == 20


def test_a_suite_whose_files_are_not_installed_is_named(monkeypatch, tmp_path):
    benchmark = types.SimpleNamespace(
        get_task=lambda _: types.SimpleNamespace(name="a", language="a"),
        get_task_bddl_file_path=lambda _: tmp_path / "a.bddl")
    monkeypatch.setattr("trm_helpers.sim.env._benchmark", lambda _: benchmark)
    with pytest.raises(FileNotFoundError, match="the files of libero_goal are not installed: no "
                                                "/.*a.bddl.*make kaggle SUITES=libero_goal"):
        load_task("libero_goal", 3)


def test_init_states_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr("libero.libero.benchmark.get_libero_path", lambda _: "/nowhere")
    with pytest.raises(FileNotFoundError, match="the files of libero_goal are not installed: no "
                                                "/nowhere/libero_goal/open_the.*npz; "):
        load_init_states("libero_goal", 0)


@pytest.mark.parametrize("kind", ["model", "mesh"])
def test_an_asset_that_is_not_installed_is_named(tmp_path, kind):
    """In a process of its own: LIBERO finds the folder of the assets when it is imported."""
    from libero.libero import get_libero_path

    assets = Path(get_libero_path("assets"))
    found = assets / "stable_hope_objects" / "alphabet_soup" / "alphabet_soup.xml"
    if kind == "mesh":
        found = found.parent / ElementTree.parse(found).find(".//mesh").get("file")
    copy = tmp_path / "assets"
    shutil.copytree(assets, copy, copy_function=os.symlink)
    (copy / found.relative_to(assets)).unlink()
    done = subprocess.run(
        [sys.executable, "-c", "from trm_helpers.sim.env import LiberoEnv, load_task\n"
         f"load_task({SUITE!r}, {TASK})\nimport libero.libero\n"
         f"libero.libero._packaged_asset_path = lambda: {str(copy)!r}\n"
         f"LiberoEnv({SUITE!r}, {TASK})"], capture_output=True, text=True)
    assert f"the files of {SUITE} are not installed: no {copy}" in done.stderr, done.stderr
    assert found.name in done.stderr.splitlines()[-1]


def test_the_environment_of_a_process_is_kept_for_a_task_and_closed_for_the_next(monkeypatch):
    made = []

    class Env:
        def __init__(self, *asked, **settings):
            assert all(env.closed for env in made)  # two never take memory at once
            self.closed = False
            made.append(self)

        def close(self):
            self.closed = True

    monkeypatch.setattr(sim, "LiberoEnv", Env)
    kept = sim._WorkerEnv()
    assert kept(SUITE, 0) is kept(SUITE, 0) and len(made) == 1
    kept(SUITE, 1), kept(SUITE, 1, settle_steps=5)
    kept.cache_clear()
    assert len(made) == 3 and all(env.closed for env in made)


def test_another_mujoco_is_refused(monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version",
                        lambda name: "3.4.0" if name == "mujoco" else version(name))
    sim._benchmark.cache_clear()
    with pytest.raises(RuntimeError, match="mujoco.*3.4.0.*3.3.2"):
        load_task(SUITE, TASK)


def test_a_seed_gives_one_layout_however_many_resets_came_before():
    with LiberoEnv("libero_spatial", 4) as env:  # a drawer that begins open
        env.reset(seed=5)
        first = env.state(), env.model_xml()
        env.reset(seed=6)
        assert np.abs(env.state() - first[0]).max() > 1e-3
        env.reset(seed=5)
        np.testing.assert_array_equal(env.state(), first[0])
        assert env.model_xml() == first[1]  # fixtures are placed in the model


def test_a_model_is_saved_as_it_is_although_another_was_loaded_last():
    def places(xml):
        return {body.get("name"): (body.get("pos"), body.get("quat"))
                for body in ElementTree.fromstring(xml).iter("body")}

    with LiberoEnv("libero_spatial", 4) as env:
        env.reset(seed=5)
        alone = places(env.model_xml())
        with LiberoEnv("libero_object", 0) as other:
            assert places(env.model_xml()) == alone and "wooden_cabinet_1_main" in alone
            assert "alphabet_soup_1_main" in places(other.model_xml())


def test_a_region_of_the_table_is_no_part_of_the_goal():
    with LiberoEnv("libero_10", 6) as env:  # a mug on a plate, a pudding to the right of the plate
        assert env.goal_parts() == {"object": "porcelain_mug_1", "target": "plate_1",
                                    "object 2": "chocolate_pudding_1"}
        assert all(env.object_position(name).shape == (3,) for name in env.goal_parts().values())


def test_points_are_projected_as_robosuite_projects_them(env):
    from robosuite.utils.camera_utils import (
        get_camera_transform_matrix,
        project_points_from_world_to_camera,
    )

    env.reset(init_state=0)
    points = np.array([env.end_effector(), env.end_effector() + [0.05, -0.03, -0.1]])
    for camera, live in schema.CAMERAS.items():
        matrix = get_camera_transform_matrix(env.sim, live.removesuffix("_image"), 128, 128)
        rows_columns = project_points_from_world_to_camera(points, matrix, 128, 128)
        assert np.abs(env.project(points, camera) - rows_columns[:, ::-1]).max() <= 1
    behind = env.sim.data.cam_xpos[env.sim.model.camera_name2id("agentview")] + [1, 0, 0]
    assert np.isnan(env.project(behind[None], "agentview_rgb")).all()


@pytest.mark.sim
def test_another_environment_that_is_reset_or_closed_leaves_the_frames_alone():
    other = LiberoEnv("libero_object", 1)
    other.reset(seed=1)["agentview_rgb"]
    with LiberoEnv("libero_object", 2) as env:
        first = np.array(env.reset(init_state=1)["agentview_rgb"])
        other.reset(seed=2)  # while the other's OpenGL context is not the current one
        assert np.array_equal(env.reset(init_state=1)["agentview_rgb"], first)
        other.raw.kept_model.xml = "another model's"  # a reset of LIBERO's own frees the renderer
        other.raw.reset()
        assert np.array_equal(env.reset(init_state=1)["agentview_rgb"], first)
        other.close()
        assert np.array_equal(env.reset(init_state=1)["agentview_rgb"], first)


def test_an_environment_in_which_a_job_failed_is_not_used_again(monkeypatch):
    closed = []

    class Built:
        def __init__(self, *_):
            self.number = len(closed)

        def close(self):
            closed.append(self.number)
            raise RuntimeError("its OpenGL context is lost")

    monkeypatch.setattr(sim, "LiberoEnv", Built)
    monkeypatch.setattr(sim, "worker_env", kept := sim._WorkerEnv())
    first = kept("libero_object", 0)
    with sim.renewed_after_errors():
        assert kept("libero_object", 0) is first
    with pytest.raises(sim.SimulatorError), sim.renewed_after_errors():
        raise sim.SimulatorError("it draws no frame")
    assert kept("libero_object", 0) is not first and closed == [0]
