"""Randomised layouts: the goal's objects anywhere within reach, not at the benchmark's places.

A policy that has always seen an object in the same five centimetres can succeed without looking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np

from .. import schema
from .env import LayoutError, LiberoEnv, Observation
from .geometry import Boxes, geoms_of, overreach

_MARGIN = 0.05  # metres beyond the regions that the task itself uses
_STRETCH = 0.05  # metres beyond the comfortable reach, as in LIBERO's own layouts
_STAY_PROBABILITY = 0.5  # of an object outside the goal: it often stands beside the goal's object
_TRIES = 200  # positions for one object before all are sampled again
_ROUNDS = 50


def reset(env: LiberoEnv, seed: int = 0, placement: str = "benchmark") -> Observation:
    """Start an episode from a sampled layout: LIBERO's own, or a randomised one (``wide``)."""
    schema.check_option("placement", placement, schema.PLACEMENTS)
    return env.reset(seed=seed, arrange=randomise_layout if placement == "wide" else None)


def randomise_layout(env: LiberoEnv, generator: np.random.Generator,
                     staying: Collection[str] = ()) -> None:
    """Move objects on the task's table or floor to free places within the arm's reach.

    The goal's objects always move, each other object with probability 0.5. Places are uniform over
    the rectangle around all of the task's regions, and orientations are kept. Fixtures do not move;
    nor do objects on or in another object, nor objects of the goal that share their kind with
    another object, because their place identifies them (the bowl of LIBERO-Spatial). Objects in
    ``staying`` are not moved and may hide the goal's from the agent view; no other object does.
    Call it after a reset, before the objects settle.

    Raises:
        LayoutError: no free places found.
    """
    low, high = _area(env)
    goal = env.goal_parts().values()
    names = [name for name in _movable(env) if name not in staying
             and (name in goal or generator.random() >= _STAY_PROBABILITY)]
    obstacles = [_footprint(env, name) for name in env.raw.obj_body_id if name not in names]
    largest_first = sorted(names, key=lambda name: -np.prod(np.diff(_footprint(env, name), axis=0)))
    for _ in range(_ROUNDS):
        moves = _sample_moves(env, largest_first, obstacles, low, high, generator)
        if moves is None:
            continue
        _move(env, moves)
        if all(_in_sight(env, name, staying) for name in names if name in goal):
            return
        _move(env, {name: -move for name, move in moves.items()})
    raise LayoutError(f"{env.task.name}: no free places for {', '.join(names)} in {_ROUNDS} "
                      "rounds; expected all within the arm's reach, the goal's in sight")


def _sample_moves(env, names, obstacles, low, high, generator) -> dict[str, np.ndarray] | None:
    """A move (2,) in metres for each object, or ``None`` when one finds no place."""
    taken, moves = list(obstacles), {}
    for name in names:
        footprint, height = _footprint(env, name), env.object_position(name)[2]
        for _ in range(_TRIES):
            place = generator.uniform(low, high)
            move = place - footprint.mean(axis=0)
            reachable = overreach(env, np.array([*place, height])) <= _STRETCH
            if reachable and not any(_overlap(footprint + move, other) for other in taken):
                break
        else:
            return None
        taken.append(footprint + move)
        moves[name] = move
    return moves


def _move(env: LiberoEnv, moves: dict[str, np.ndarray]) -> None:
    for name, move in moves.items():
        joint = env.raw.get_object(name).joints[-1]
        position = env.sim.data.get_joint_qpos(joint).copy()
        position[:2] += move
        env.sim.data.set_joint_qpos(joint, position)
    env.sim.forward()


def _in_sight(env: LiberoEnv, name: str, ignored: Collection[str]) -> bool:
    """Whether no object stands between an object's centre and the agent view; the robot may."""
    others = [other for other in env.raw.obj_body_id if other != name and other not in ignored]
    boxes = Boxes.of_geoms(env, geoms_of(env, *others))
    middle = Boxes.of_geoms(env, geoms_of(env, name)).middle()
    way = np.linspace(middle, env.camera_position(schema.STILL_CAMERA), 200)
    return boxes.share_inside(way) == 0


def _surface_regions(env: LiberoEnv) -> dict[str, dict]:
    """The regions of the table or the floor, by name."""
    regions = env.raw.parsed_problem["regions"]
    return {name: region for name, region in regions.items()
            if region["ranges"] and region["target"] not in env.raw.obj_body_id}


def _area(env: LiberoEnv) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner (2,) of the rectangle around the task's regions."""
    ranges = np.array([values for region in _surface_regions(env).values()
                       for values in region["ranges"]])
    offset = np.asarray(env.raw.workspace_offset)[:2]
    return (ranges[:, :2].min(axis=0) - _MARGIN + offset,
            ranges[:, 2:].max(axis=0) + _MARGIN + offset)


def _movable(env: LiberoEnv) -> list[str]:
    """Objects that start on the table or the floor, carry no other and may change place."""
    placed = {predicate[1]: predicate[2] for predicate in
              env.raw.parsed_problem["initial_state"] if len(predicate) == 3}
    kinds = Counter(_kind(name) for name in env.raw.objects_dict)
    named = {name for predicate in env.raw.parsed_problem["goal_state"] for name in predicate[1:]}
    identified_by_place = {name for name in named if kinds[_kind(name)] > 1}
    regions, carrying = _surface_regions(env), set(placed.values())
    return [name for name, place in placed.items() if place in regions
            and name in env.raw.objects_dict and name not in carrying | identified_by_place]


def _kind(name: str) -> str:
    return name.rsplit("_", 1)[0]


def _footprint(env: LiberoEnv, name: str) -> np.ndarray:
    """Lowest and highest corner (2, 2) on the table."""
    return np.array(Boxes.of_geoms(env, geoms_of(env, name)).bounds())[:, :2]


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a[0] < b[1]).all() and (b[0] < a[1]).all())
