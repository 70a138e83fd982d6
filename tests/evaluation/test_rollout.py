"""One episode: its row, its film."""

import time

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image
from walking import CountingPolicy, StraightRoad

from trm_helpers import schema
from trm_helpers.evaluation import rollout
from trm_helpers.evaluation.rollout import record_episode, run_episode
from trm_helpers.sim.env import LiberoEnv, Observation


def test_an_episode_ends_with_success_or_at_the_horizon():
    policy = CountingPolicy()
    row = run_episode(policy, StraightRoad(), init_state=2)
    assert row.pop("seconds") >= 0 and row.pop("max_action_ms") >= row.pop("action_ms") >= 0
    assert row == {"suite": "libero_object", "task_id": 3, "init_state": 2, "seed": 0,
                   "placement": "benchmark", "success": True, "steps": 3, "horizon": 4,
                   "lifted": ["stick"], "objects_to_move": ["stick"],
                   "mean_recursions": 3.0, "recursions_by_phase": {"reach": 3.0},
                   "phases": [["reach", 3]]}
    failed = run_episode(policy, StraightRoad(), init_state=9)
    assert (failed["success"], failed["steps"]) == (False, 4)
    assert run_episode(policy, StraightRoad(), init_state=9, horizon=7)["steps"] == 7
    assert policy.resets == 3


class LiftingRoad(StraightRoad):
    """Its objects rest at 1 m and rise with each step by so many metres."""

    rises = {"stone": 0.0065, "stick": 0.0068, "pebble": 0.03}

    def heights(self):
        return {name: 1 + rise * (3 - self.left) for name, rise in self.rises.items()}


def test_an_object_is_lifted_when_it_has_risen_by_two_centimetres():
    row = run_episode(CountingPolicy(), LiftingRoad(), init_state=2)  # 1.95, 2.04, 9 cm
    assert (row["steps"], row["lifted"]) == (3, ["pebble", "stick"])


CAMERA = next(iter(schema.CAMERAS))


class SlowlyDrawnRoad(StraightRoad):
    """Its agent view takes 200 milliseconds to draw."""

    def _look(self):
        values = super()._look()
        frame = values.pop(CAMERA)

        def draw():
            time.sleep(0.2)
            return frame

        return Observation({**values, CAMERA: draw})


class LookingPolicy(CountingPolicy):
    def act(self, observation):
        observation[CAMERA]
        return super().act(observation)


def test_the_time_of_a_decision_is_without_the_drawing():
    row = run_episode(LookingPolicy(), SlowlyDrawnRoad(), init_state=2)
    assert row["seconds"] > 3 * 0.2 and row["max_action_ms"] < 100


@pytest.fixture
def agent_views(monkeypatch):
    """A function: the agent view of each frame of the last film, upright, without dots."""
    made, film = [], rollout._Film
    monkeypatch.setattr(rollout, "_Film", lambda *given: made.append(film(*given)) or made[-1])
    return lambda: np.array([frame.views[0] for frame in made[-1].filmed])


def test_a_film_is_upright_with_the_outcome_in_its_name(tmp_path, agent_views):
    row = record_episode(CountingPolicy(), StraightRoad(), 1, tmp_path / "a-{outcome}.mp4")
    frames = agent_views()
    assert row["video"] == str(tmp_path / "a-success.mp4") and row["steps"] == 2
    assert frames.shape == (2, 64, 64, 3) and (frames[:, -1] == 255).all()
    film = imageio.imread(tmp_path / "a-success.mp4")
    assert film.shape == (2 + 10, 320, 640, 3)  # steps 0 and 2; the last frame stands for a second
    assert film[0][-2:, 330:470].mean() > 150 > film[0][-60:-20, 330:470].mean()


class BrighteningRoad(StraightRoad):
    """Its agent view has grey level 50 at first and 50 more after each step; the wrist is black."""

    def _look(self):
        frames = super()._look()
        grey = np.full((64, 64, 3), 50 * (4 - self.left), np.uint8)
        return {camera: grey if camera == CAMERA else 0 * frames[camera] for camera in frames}


def test_each_frame_of_a_film_is_of_its_step(tmp_path, agent_views):
    record_episode(CountingPolicy(), BrighteningRoad(), 2, tmp_path / "a.mp4")
    film = imageio.imread(tmp_path / "a.mp4").astype(float)
    views = agent_views()  # every second step, and the last
    assert [view.mean() for view in views] == [50, 150, 200]
    for number, (grey, main) in enumerate(((50, 80), (150, 160), (200, 200), (200, 200))):
        assert abs(film[number, 200:, 340:460] - grey).max() < 20
        assert film[number, 200:, 500:].max() < 20
        assert abs(film[number, 70:, :300] - main).max() < 9


def test_a_film_says_the_task_the_phase_the_time_and_the_outcome(tmp_path, monkeypatch):
    written, draw = [], rollout.film_frame
    monkeypatch.setattr(rollout, "film_frame",
                        lambda *given: written.append(given[1:]) or draw(*given))
    row = record_episode(CountingPolicy(), StraightRoad(), 1, tmp_path / "a-{outcome}.mp4")
    record_episode(CountingPolicy(), StraightRoad(), 9, tmp_path / "a-{outcome}.mp4")
    shown = [(*lines, progress, *end) for _, lines, progress, *end in written]
    assert shown[:2] == [
        ("walk to the end", "reach   0.0 of 0.2 s, 3 recursions", 0, "", True),
        ("walk to the end", "reach   0.1 of 0.2 s, 3 recursions", 0.5, "success after 0.1 s", True)]
    assert shown[-1] == ("walk to the end", "reach   0.2 of 0.2 s, 3 recursions", 1,
                         "failure: time is up (0.2 s)", False)
    assert [*written[0][0]] == ["agent view", "wrist camera"] and row["phases"] == [["reach", 2]]


class GraspingPolicy(CountingPolicy):
    """Closes the gripper from the second step on."""

    def act(self, observation):
        self.steps = getattr(self, "steps", 0) + 1
        return self.action + (self.steps > 1) * 2 * np.eye(7)[schema.GRIPPER_INDEX]


def test_a_row_has_its_phases_in_their_order():
    row = run_episode(GraspingPolicy(), StraightRoad(), 19, horizon=20)
    assert row["phases"] == [["reach", 1], ["grasp", 8], ["carry", 11]]


class PlanningRoad(StraightRoad):
    """The arm is in the middle of both frames; a metre is 160 pixels, up is forward."""

    image_size = 64

    def _look(self):
        return {**super()._look(), "ee_pos": np.zeros(3)}

    def project(self, points, camera):
        return 32 - 160 * points[:, :2][:, ::-1]


class PlanningPolicy(CountingPolicy):
    """Predicts four full steps forward and executes three of them."""

    execution_horizon = 3

    def reset(self):
        self.calls, self.last_chunk = 0, None

    def act(self, observation):
        if self.calls % 3 == 0:
            self.last_chunk = np.tile(self.action, (4, 1))
        self.calls += 1
        return self.action


def test_a_film_shows_what_is_left_of_the_chunk(tmp_path):
    record_episode(PlanningPolicy(), PlanningRoad(), 9, tmp_path / "a.mp4")  # 4 steps
    film = imageio.imread(tmp_path / "a.mp4")[:3].astype(int)
    # a step is 0.0125 m: 2 pixels of 64, 10 of the film's main view, up from its middle
    orange, blue = np.array([0xE6, 0x9F, 0x00]), np.array([0x56, 0xB4, 0xE9])
    for frame, (dots, executed) in zip(film, ((4, 3), (2, 1), (0, 0)), strict=True):
        ground = frame[160, 80]
        for number, row in enumerate((150, 140, 130, 120)):
            expected = orange if number < executed else blue if number < dots else ground
            assert abs(frame[row, 160] - expected).max() < 70, (number, frame[row, 160])


# --- the real simulator -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def env():
    with LiberoEnv("libero_object", 0) as made:
        yield made


@pytest.mark.sim
def test_a_film_of_the_simulator_is_upright_and_can_be_read(env, tmp_path, agent_views):
    """The arm rises, so that what changes between frames moves up in the picture."""
    row = record_episode(CountingPolicy(axis=2), env, 0, tmp_path / "{outcome}.mp4", 12)
    frames = agent_views()
    assert (row["success"], row["steps"]) == (False, 12)
    assert row["video"] == str(tmp_path / "failure.mp4") and frames.shape == (7, 128, 128, 3)
    film = imageio.imread(tmp_path / "failure.mp4")
    assert len(film) == 7 + 10 and imageio.immeta(tmp_path / "failure.mp4")["fps"] == 10
    agent_view = np.stack([Image.fromarray(frame[160:, 320:480]).resize((128, 128))
                           for frame in film[:7]]).astype(float)

    def mean_row(change):
        strong = np.where(change > 60, change, 0).sum(axis=1)
        return strong @ np.arange(len(strong)) / strong.sum()

    for views in (film[:7, 70:, :320].astype(float), agent_view):
        early, late = (np.abs(views[a] - views[b]).sum(axis=-1) for a, b in ((0, 1), (4, 5)))
        assert mean_row(late) < mean_row(early) - 2
    assert np.abs(agent_view - frames).mean() < 10 < np.abs(agent_view - frames[:, ::-1]).mean()


@pytest.mark.sim
def test_filming_changes_no_frame_of_the_policy_and_no_step(env, tmp_path):
    class Watching(CountingPolicy):
        def act(self, observation):
            self.seen.append([observation[name].copy() for name in (*schema.CAMERAS, "ee_pos")])
            return super().act(observation)

    plain, filmed = Watching(axis=2), Watching(axis=2)
    plain.seen, filmed.seen = [], []
    rows = [run_episode(plain, env, 1, 8), record_episode(filmed, env, 1, tmp_path / "a.mp4", 8)]
    assert rows[0]["steps"] == rows[1]["steps"] == 8 and (tmp_path / "a.mp4").exists()
    for one, other in zip(plain.seen, filmed.seen, strict=True):
        for before, after in zip(one, other, strict=True):
            assert np.array_equal(before, after)


@pytest.mark.sim
def test_doing_nothing_fails_at_the_horizon(env):
    policy = CountingPolicy()
    policy.action = np.array(schema.NO_OP)
    row = run_episode(policy, env, init_state=2, horizon=15)
    assert (row["success"], row["steps"], row["horizon"]) == (False, 15, 15)
    assert (row["lifted"], row["objects_to_move"]) == ([], ["alphabet_soup_1"])
