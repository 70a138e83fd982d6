import h5py
import numpy as np
import pytest
from demo_files import data_set, write_demo_file

from trm_helpers import paths, schema
from trm_helpers.config import from_flat
from trm_helpers.data.storage import next_push_steps
from trm_helpers.demos.collect import record_demonstration
from trm_helpers.demos.dagger import Actor, Mixture
from trm_helpers.demos.demo_files import source_of
from trm_helpers.demos.experts import Expert
from trm_helpers.demos.find_demos import scripted_dir
from trm_helpers.demos.pick_place import PickPlace
from trm_helpers.demos.quality import quality_card
from trm_helpers.demos.skills import CLOSE_STEPS, Skill, Style
from trm_helpers.sim import layouts
from trm_helpers.sim.env import LiberoEnv

OPEN, CLOSED = np.append(np.zeros(6), -1.0), np.append(np.zeros(6), 1.0)


class Still:
    """An environment whose gripper stays in one place; a policy that always sends the same."""

    execution_horizon = 4

    def __init__(self, action=OPEN):
        self.action, self.asked = action, 0

    def end_effector(self):
        return np.zeros(3)

    def reset(self):
        self.asked = 0

    def act(self, observation):
        self.asked += 1
        return self.action


class Phases(Skill):
    """An expert that stays in its phase and wants to be ``far`` metres away."""

    closed = ("close", "lift", "lower")
    far = 0.0
    skill = property(lambda self: self)  # an expert with this skill only

    def act(self):
        self._steps_in_phase += 1
        return CLOSED if self.phase in self.closed else OPEN

    def _goal(self):
        return np.array([self.far, 0, 0])


class Picks(Phases, PickPlace):
    """The same with a grasp at ``grasp``."""

    grasp = (0.0, 0.0, 0.0)

    def __init__(self, env):
        Skill.__init__(self, env)

    def _grasp_point(self):
        return np.array(self.grasp)


def in_phase(phase, steps=7, far=0.0, kind=Phases):
    skill = kind(Still())
    skill.phase, skill._steps_in_phase, skill.far = phase, steps, far
    return skill


# --- who acts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_the_expert_acts_with_probability_beta_for_whole_decisions(beta, share):
    policy = Still(np.full(7, 0.5))
    mixture = Mixture(Still(), policy, beta, in_phase("approach"), np.random.default_rng(0))
    by_expert = []
    for _ in range(4000):
        label, executed = mixture.act({})
        assert executed is label or executed is policy.action
        by_expert.append(executed is label)
    decisions = np.reshape(by_expert, (-1, 4))
    assert (decisions == decisions[:, :1]).all()
    assert decisions.mean() == pytest.approx(share, abs=0.04)
    assert policy.asked == 4000  # its plan stays that of the episode


def test_an_actor_that_sends_no_action_is_an_error():
    mixture = Mixture(Still(), Still(np.full(7, np.nan)), 0.5, in_phase("approach"),
                      np.random.default_rng(0))
    with pytest.raises(ValueError, match="action is .*nan"):
        mixture.act({})


# --- labels ---------------------------------------------------------------------------------------


def phase_after(skill, *executed):
    """Phase and steps in it after the actor has sent these actions."""
    policy = Still()
    mixture = Mixture(Still(), policy, 0.0, skill, np.random.default_rng(0))
    for policy.action in (*executed, OPEN):  # the last one is not looked at
        mixture.act({})
    return skill.phase, skill._steps_in_phase


def test_a_phase_waits_until_the_grippers_command_is_executed():
    assert phase_after(in_phase("close", 5), CLOSED) == ("close", 7)
    assert phase_after(in_phase("close", 5), OPEN) == ("close", 0)
    assert phase_after(in_phase("release", 1), OPEN) == ("release", 3)
    assert phase_after(in_phase("release", 1), CLOSED, CLOSED) == ("release", 0)


def test_a_descent_that_the_actor_began_continues():
    """The gripper is at the origin; of the grasp, x and height are given in metres."""
    for grasp, phase in (((0.02, -0.05), "descend"), ((0.04, -0.05), "approach"),
                         ((0.02, -0.15), "approach")):
        skill = in_phase("approach", kind=Picks)
        skill.grasp = (grasp[0], 0.0, grasp[1])
        assert phase_after(skill, OPEN)[0] == phase


def test_what_the_actor_has_left_nearby_does_not_hang_on_a_finger():
    for distance, steps in ((0.02, 7), (0.05, 8)):
        skill = in_phase("retreat", 6, kind=Picks)
        skill.grasp = (0.0, 0.0, -distance)
        assert phase_after(skill, OPEN) == ("retreat", steps)


def test_a_grip_that_the_actor_opened_is_closed_again_or_given_up():
    assert phase_after(in_phase("lift"), OPEN) == ("close", 0)
    assert phase_after(in_phase("lift", far=0.05), OPEN) == ("release", 0)


@pytest.mark.parametrize("far", [0.0, 0.05])
def test_what_the_actor_released_near_its_place_is_not_grasped_again(far):
    assert phase_after(in_phase("lower", far=far), OPEN) == ("release", 0)


@pytest.mark.parametrize(("height", "phase"), [(0.05, "release"), (0.07, "lift")])
def test_what_the_actor_holds_again_is_released_or_above_its_place_carried_on(monkeypatch, height,
                                                                              phase):
    monkeypatch.setattr(Mixture, "_grasped", lambda mixture, skill: True)
    monkeypatch.setattr(Mixture, "_adopt", lambda mixture, skill: setattr(skill, "phase", "lift"))
    skill = in_phase("retreat", 2, kind=Picks)
    skill.grasp, skill._place_point = (0.0, 0.0, -0.5), lambda: np.array([0.0, 0.0, -height])
    assert phase_after(skill, *[CLOSED] * CLOSE_STEPS)[0] == phase


def test_an_arm_that_somebody_else_moves_is_not_blocked():
    assert phase_after(in_phase("approach", 7), OPEN, OPEN) == ("approach", 8)
    skill = in_phase("approach", 7)
    mixture = Mixture(Still(), Still(), 1.0, skill, np.random.default_rng(0))
    for _ in range(3):
        mixture.act({})  # the expert itself
    assert skill._steps_in_phase == 10


@pytest.mark.parametrize(("supported", "steps"), [(False, 0), (True, 3)])
def test_an_object_that_the_actor_holds_in_the_air_does_not_stand(monkeypatch, supported, steps):
    monkeypatch.setattr(Mixture, "_supported", lambda mixture, skill: supported)
    skill = in_phase("lower")
    skill._still = 3
    phase_after(skill, CLOSED)
    assert skill._still == steps


# --- the chunk's mask -----------------------------------------------------------------------------


def labelled(path, differences, **attributes):
    """A demonstration of 6 steps whose executed actions differ from the labels by these."""
    with h5py.File(write_demo_file(path, (6, 6)), "a") as file:
        for name in ("demo_0", "demo_1"):
            demo = file["data"][name]
            demo[schema.EXECUTED_ACTIONS] = demo["actions"][:] + np.array(differences)
            demo.attrs.update(attributes)
    return path


def test_labels_count_until_the_actor_has_departed_from_them(tmp_path):
    differences = np.zeros((6, 7))
    differences[:, 1] = [0.2, 0.2, 0.2, -0.6, 0.1, 0.4]
    differences[5, 6] = 2.0  # the gripper
    path = labelled(tmp_path / "a_demo.hdf5", differences, actor="run")
    with h5py.File(path) as file:
        found = next_push_steps(file["data/demo_0"], 10)
    # from 0: 0.2, 0.4, 0.6; from 1: 0.2, 0.4, -0.2, -0.1, gripper; from 3: -0.6
    assert found.tolist() == [12, 15, 15, 13, 15, 15]
    data = data_set(path, chunk=3)
    assert data.batch(range(4))["mask"][:, 0].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1],
                                                           [1, 0, 0]]


def test_pushes_of_the_expert_still_count_exactly(tmp_path):
    differences = np.zeros((6, 7))
    differences[2, 0] = 0.01
    path = labelled(tmp_path / "a_demo.hdf5", differences)
    with h5py.File(path) as file:
        found = next_push_steps(file["data/demo_0"], 0)
    assert found[:3].tolist() == [2, 2, 2] and (found[3:] > 10**9).all()


# --- settings and files ---------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "said"), [
    ({"beta": 1.1}, "beta=1.1 is not valid; expected a probability"),
    ({"beta": -0.1}, "beta=-0.1 is not valid; expected >= 0"),
    ({"demos": "human"}, "demos='human' is not valid; expected auto or scripted with an actor")])
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        from_flat("demo", actor="run", **settings)


def test_the_folder_names_actor_and_beta():
    assert scripted_dir("libero_goal", "wide", "pretrained/a", 0.25) == \
        paths.data_dir() / "dagger-a-beta0.25-wide" / "libero_goal"
    assert scripted_dir("libero_goal", "benchmark", frame_stride=4) == \
        paths.data_dir() / "scripted-stride4" / "libero_goal"


def test_a_file_with_an_actor_is_told_from_a_plain_one(tmp_path):
    attributes = {"actor": "run", "beta": 0.5, "success": False}
    path = labelled(tmp_path / "a_demo.hdf5", np.zeros((6, 7)), **attributes)
    with h5py.File(path, "a") as file:
        file["data"].attrs["collection"] = '{"actor": "run"}'
    assert source_of(path) == "dagger"
    (row,) = [row for row in quality_card(path) if row["check"] == "actor"]
    assert row["found"] == ("a policy acted in 2 of 2 demonstrations and the expert labelled: "
                            "run (beta 0.5); 2 end unsolved")


# --- the real simulator ---------------------------------------------------------------------------


class Grasper:
    """Grasps the object beside the expert's place and carries it, or never closes at that place."""

    execution_horizon = 4

    def __init__(self, env, closes=True):
        self.env, self.closes = env, closes

    def make(self, env):
        return self

    def reset(self):
        self.expert = None

    def act(self, observation):
        if self.expert is None:
            offset = (0.012, -0.006) if self.closes else (0.0, 0.0)
            self.expert = Expert(self.env, Style(grasp_offset=offset))
        action = self.expert.act()
        return action if self.closes else np.append(action[:6], schema.GRIPPER_OPEN)


class Hasty(Grasper):
    """Opens the gripper 2 cm above the place, for one decision, and closes it again."""

    def act(self, observation):
        if self.expert is None:
            self.expert, self.left = Expert(self.env), self.execution_horizon
        action, skill = self.expert.act(), self.expert.skill
        above = self.env.end_effector()[2] - skill._place_point()[2]
        opens = skill.phase not in skill.closed or (
            skill.phase == "lower" and above < 0.02 and self.left > 0)
        self.left -= skill.phase == "lower" and opens
        return np.append(action[:6], schema.GRIPPER_OPEN if opens else schema.GRIPPER_CLOSED)


@pytest.fixture(scope="module")
def env():
    with LiberoEnv("libero_spatial", 2) as env:
        yield env


@pytest.mark.sim
def test_an_unsolved_episode_is_kept_with_its_actor(env, monkeypatch):
    monkeypatch.setattr(LiberoEnv, "horizon", property(lambda _: 24))
    actor = Actor("run", 0.5, "abc", Grasper(env))
    record = record_demonstration(env, np.random.default_rng(0), False, actor=actor)
    assert record["attributes"] == {"frame_stride": 1, "actor": "run", "actor_sha256": "abc",
                                    "beta": 0.5, "success": False}
    by_expert = (np.array(record["actions"]) == np.array(record["executed_actions"])).all(axis=1)
    decisions = by_expert.reshape(6, 4)
    assert (decisions == decisions[:, :1]).all() and set(decisions[:, 0]) == {True, False}


@pytest.mark.sim
@pytest.mark.parametrize("closes", [False, True])
def test_labels_follow_the_scene_whoever_acts(env, closes):
    """An actor that never closes the gripper, and one with a grasp of its own."""
    observation = layouts.reset(env, 3)
    mixture = Mixture(env, Grasper(env, closes), 0.0, Expert(env), np.random.default_rng(0))
    labels, wide = [], []
    for _ in range(60):
        label, executed = mixture.act(observation)
        labels.append(label)
        wide.append(env.fingers())
        observation, _ = env.step(executed)
    labels = np.array(labels)
    to_close = labels[:, 6] > 0
    if closes:
        held = np.flatnonzero(np.array(wide) < 0.03)[CLOSE_STEPS:]
        assert len(held) > 5 and to_close[held].all()
        assert np.abs(labels[held, :2]).max() > 0.5  # and it is carried
    else:  # nothing is lifted before the gripper has closed
        assert to_close.sum() > 5 and labels[to_close, 2].max() < 0.3
    assert mixture._supported(mixture.expert.skill) != closes  # carried, or still on the table


@pytest.mark.sim
def test_a_hasty_release_is_labelled_as_a_release(env):
    observation = layouts.reset(env, 3)
    mixture = Mixture(env, Hasty(env), 0.0, Expert(env), np.random.default_rng(0))
    to_close, opened = [], []
    while len(to_close) < env.horizon and (not opened or len(to_close) < opened[0] + 8):
        label, executed = mixture.act(observation)
        to_close.append(label[6] > 0)
        if any(to_close) and executed[6] < 0 and mixture.expert.skill.phase != "close":
            opened.append(len(to_close))
        observation, _ = env.step(executed)
    assert opened and not any(to_close[opened[0] + 1:])
