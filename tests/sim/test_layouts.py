"""Randomised layouts: spread, free of collisions, at rest, within reach, repeatable."""

import numpy as np
import pytest

from trm_helpers.demos.experts import Expert
from trm_helpers.schema import STILL_CAMERA
from trm_helpers.sim import layouts
from trm_helpers.sim.env import LiberoEnv
from trm_helpers.sim.geometry import overreach
from trm_helpers.sim.layouts import (
    _STRETCH,
    _area,
    _footprint,
    _in_sight,
    _movable,
    _move,
    _overlap,
    randomise_layout,
)

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def env():
    with LiberoEnv("libero_object", 0) as env:
        yield env


def test_footprints_overlap_or_stand_side_by_side():
    box = np.array([[0.0, 0.0], [0.1, 0.1]])
    assert _overlap(box, box + 0.05) and _overlap(box, box + [0.09, 0.0])
    assert not _overlap(box, box + [0.11, 0.0]) and not _overlap(box, box + [0.05, 0.11])


def test_liberos_own_places_can_be_sampled():
    """The bowl that task 1 of LIBERO-Spatial is not about stands further out than any other."""
    with LiberoEnv("libero_spatial", 1) as env:
        low, high = _area(env)
        for init_state in range(0, 50, 10):
            env.reset(init_state=init_state)
            for name in _movable(env):
                position = env.object_position(name)
                assert (low < position[:2]).all() and (position[:2] < high).all()
                assert overreach(env, position) < _STRETCH + 0.01


def test_objects_are_spread_and_stand_free_within_reach(env):
    env.reset(seed=0)
    names = _movable(env)
    heights = {name: env.object_position(name)[2] for name in names}
    low, high = _area(env)
    assert len(names) == 7 and "basket_1" in names
    places = []
    for seed in range(6):
        layouts.reset(env, seed, "wide")
        places.append([env.object_position(name)[:2] for name in names])
        for index, name in enumerate(names):
            position = env.object_position(name)
            assert abs(position[2] - heights[name]) < 0.01, f"{name} fell over"
            assert (low < position[:2]).all() and (position[:2] < high).all()
            assert overreach(env, position) < _STRETCH + 0.01
            for other in names[index + 1:]:
                gap = _footprint(env, name), _footprint(env, other)
                assert not (gap[0][0] < gap[1][1]).all() or not (gap[1][0] < gap[0][1]).all()
    spread = np.std(places, axis=0).mean(axis=1)  # metres, of each object
    assert spread.min() > 0.04
    layouts.reset(env, 5, "wide")
    again = [env.object_position(name)[:2] for name in names]
    np.testing.assert_allclose(again, places[5], atol=1e-9)


def test_the_goals_objects_always_move_and_the_others_in_half_of_the_layouts(env):
    moved = []
    for seed in range(8):
        places = []
        for placement in ("benchmark", "wide"):
            layouts.reset(env, seed, placement)
            places.append([env.object_position(name)[:2] for name in _movable(env)])
        moved.append(np.linalg.norm(np.diff(places, axis=0)[0], axis=1) > 0.01)
    goal = np.isin(_movable(env), ["alphabet_soup_1", "basket_1"])
    moved = np.array(moved)
    assert goal.sum() == 2 and moved[:, goal].all()
    assert 0.3 < moved[:, ~goal].mean() < 0.7


def test_the_goals_objects_are_in_sight():
    """A plate behind the cabinet would be in no frame."""
    with LiberoEnv("libero_spatial", 0) as env:
        env.reset(seed=0)
        assert _in_sight(env, "plate_1", ())
        cabinet, eye = env.object_position("wooden_cabinet_1"), env.camera_position(STILL_CAMERA)
        plate = env.object_position("plate_1")
        way = cabinet[:2] - eye[:2]
        behind = cabinet[:2] + 0.25 * way / np.linalg.norm(way)
        _move(env, {"plate_1": behind - plate[:2]})
        assert not _in_sight(env, "plate_1", ())
        assert _in_sight(env, "plate_1", {"wooden_cabinet_1"})
        for seed in range(8):
            layouts.reset(env, seed, "wide")
            assert _in_sight(env, "plate_1", ())


def solved(env, seed):
    """Whether the expert solves a randomised layout."""
    layouts.reset(env, seed, "wide")
    expert = Expert(env)
    return any(env.step(expert.act())[1] for _ in range(env.horizon))


def test_the_expert_finds_the_object_wherever_it_is(env):
    assert solved(env, 101) and solved(env, 102)


def test_on_a_table_with_furniture_too():
    """LIBERO-Goal: a cabinet, a stove and a rack stay where they are."""
    with LiberoEnv("libero_goal", 8) as env:
        env.reset(seed=0)
        names = _movable(env)
        fixtures = [name for name in env.raw.obj_body_id if name not in env.raw.objects_dict]
        assert {"akita_black_bowl_1", "plate_1"} <= set(names) and len(fixtures) >= 3
        before = [env.object_position(name) for name in fixtures]
        layouts.reset(env, 0, "wide")
        assert np.allclose(before, [env.object_position(name) for name in fixtures])
        assert solved(env, 101)


def test_a_bowl_that_its_place_identifies_keeps_it():
    """LIBERO-Spatial: all else moves, the other bowl and the plate too."""
    with LiberoEnv("libero_spatial", 2) as env:
        bowls = []
        for seed in range(4):
            layouts.reset(env, seed, "wide")
            bowls.append([env.object_position(f"akita_black_bowl_{n}")[:2] for n in (1, 2)])
        bowls = np.array(bowls)
        assert set(_movable(env)) == {"akita_black_bowl_2", "plate_1", "cookies_1",
                                           "glazed_rim_porcelain_ramekin_1"}
        assert np.ptp(bowls[:, 0], axis=0).max() < 0.05 < np.ptp(bowls[:, 1], axis=0).max()
        assert solved(env, 101)


def test_unknown_and_contradicting_arguments_are_refused(env):
    with pytest.raises(ValueError, match="placement='far'.*'benchmark', 'wide'"):
        layouts.reset(env, placement="far")
    with pytest.raises(ValueError, match="init_state=3 cannot be combined with arrange"):
        env.reset(init_state=3, arrange=randomise_layout)
