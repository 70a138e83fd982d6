"""Leaving geoms out of a frame changes no pixel."""

import numpy as np
import pytest

from trm_helpers import schema
from trm_helpers.sim.env import LiberoEnv
from trm_helpers.sim.render import Scene

pytestmark = pytest.mark.sim
CAMERA = "agentview"


@pytest.fixture(scope="module")
def env():
    with LiberoEnv("libero_spatial", 2) as made:
        made.reset(init_state=0)
        yield made


def looking(env, generator) -> Scene:
    """The scene now, from a camera put somewhere around the table, which looks at a point of it."""
    scene = Scene(env.raw)
    index = env.sim.model.camera_name2id(CAMERA)
    table = env.object_position("plate_1")
    origin = table + generator.uniform((-0.8, -0.8, 0.02), (0.8, 0.8, 0.9))
    back = origin - table - generator.uniform(-0.2, 0.2, 3)
    back /= np.linalg.norm(back)
    right = np.cross(generator.normal(size=3), back)
    right /= np.linalg.norm(right)
    scene.fields["cam_xpos"][index] = origin
    scene.fields["cam_xmat"][index] = np.column_stack(
        [right, np.cross(back, right), back]).reshape(scene.fields["cam_xmat"][index].shape)
    return scene


def render_everything(monkeypatch) -> None:
    monkeypatch.setattr(Scene, "_in_view", lambda self, camera, shown: (shown, shown, None))


def test_frames_are_equal_to_those_with_all_geoms_wherever_the_camera_is(env, monkeypatch):
    generator = np.random.default_rng(0)
    scenes = [looking(env, generator) for _ in range(40)]
    shown = np.isin(env.sim.model._model.geom_group, (1, 2))
    views = [scene._in_view(CAMERA, shown) for scene in scenes]
    some = np.array([(direct | mirrored)[shown].mean() for direct, mirrored, _ in views])
    assert some.min() < 0.5 and (some < 1).mean() > 0.8
    assert 0.2 < np.mean([window is not None for *_, window in views]) < 0.9
    rendered = []
    real = Scene._render
    monkeypatch.setattr(Scene, "_render", lambda scene, *given, **more: (
        rendered.append(more), real(scene, *given, **more))[1])
    few = [scene.render(CAMERA, 128) for scene in scenes]
    assert rendered.count({"reflections": False}) > 3  # the mirror's pixels separately
    render_everything(monkeypatch)
    for scene, frame in zip(scenes, few, strict=True):
        assert np.array_equal(scene.render(CAMERA, 128), frame)
    assert len({frame.tobytes() for frame in few}) == len(few)


def test_geoms_that_only_a_mirror_shows_are_rendered(env, monkeypatch):
    """The stove's plate reflects what is above it, behind the camera."""
    scene = Scene(env.raw)
    index = env.sim.model.camera_name2id(CAMERA)
    model = env.sim.model._model
    stove = scene.fields["geom_xpos"][env.sim.model.geom_name2id("flat_stove_1_base_vis")].copy()
    scene.fields["cam_xpos"][index] = stove + (0, 0, 0.25)
    scene.fields["cam_xmat"][index] = np.eye(3).reshape(scene.fields["cam_xmat"][index].shape)
    bowl = env.sim.model.geom_name2id("akita_black_bowl_1_g0")
    scene.fields["geom_xpos"][bowl] = stove + (0.17, 0.17, 0.4)  # behind the camera
    shown = np.isin(model.geom_group, (1, 2))
    direct, mirrored, _ = scene._in_view(CAMERA, shown)
    assert mirrored[bowl] and not direct[bowl]
    with_bowl = scene.render(CAMERA, 128)
    render_everything(monkeypatch)
    assert np.array_equal(scene.render(CAMERA, 128), with_bowl)
    scene.fields["geom_xpos"][bowl] = stove + (5, 0, 0.4)
    assert not np.array_equal(scene.render(CAMERA, 128), with_bowl)


def test_the_model_is_left_as_it_was(env):
    model = env.sim.model._model
    before = model.geom_group.copy()
    observation = env.reset(init_state=1)
    for camera in schema.CAMERAS:
        assert observation[camera].shape == (128, 128, 3)
    assert np.array_equal(model.geom_group, before)
