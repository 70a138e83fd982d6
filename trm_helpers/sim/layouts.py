"""Wide placements: the goal's objects anywhere within reach, not where the benchmark has them.

A policy that always saw an object in the same five centimetres can succeed without looking at it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np

from .. import schema
from .env import LiberoEnv, Observation
from .geometry import Boxes, geoms_of, overreach

_MARGIN = 0.05  # metres beyond the regions that the task itself uses
_STRETCH = 0.05  # metres beyond the comfortable reach, as far as LIBERO goes
_AT_HOME = 0.5  # of what the goal is not about: what stands beside its object stands there often
_TRIES = 200  # positions for one object before all begin anew
_ROUNDS = 50


def reset(env: LiberoEnv, seed: int = 0, placement: str = "benchmark") -> Observation:
    """Start an episode from a sampled layout: LIBERO's own, or that of :func:`randomise_layout`."""
    schema.check_option("placement", placement, schema.PLACEMENTS)
    return env.reset(seed=seed, arrange=randomise_layout if placement == "wide" else None)


def randomise_layout(env: LiberoEnv, generator: np.random.Generator,
                 staying: Collection[str] = ()) -> None:
    """Move what stands on the task's table or floor to free places that the arm can reach.

    What the goal is about always moves, each other thing in half of the scenes. The places are
    drawn uniformly over the rectangle around all of the task's regions. Things may stand side by
    side, and as far out as in LIBERO's own scenes. Fixtures stay, and so does what lies on or in
    another thing, with the thing; and an object of the goal that is told from others of its kind by
    where it is, as the bowl of LIBERO-Spatial, for the others stand elsewhere. Orientations stay
    too. No thing hides what has been moved of the goal's from the agent view.

    Args:
        env: the environment, just reset, before the objects settle.
        generator: of the places.
        staying: names of objects that are not moved, and may hide others.

    Raises:
        RuntimeError: no free places found.
    """
    low, high = _area(env)
    goal = env.goal_parts().values()
    names = [name for name in _free_to_move(env) if name not in staying
             and (name in goal or generator.random() >= _AT_HOME)]
    obstacles = [_footprint(env, name) for name in env.raw.obj_body_id if name not in names]
    largest_first = sorted(names, key=lambda name: -np.prod(np.diff(_footprint(env, name), axis=0)))
    for _ in range(_ROUNDS):
        moves = _draw(env, largest_first, obstacles, low, high, generator)
        if moves is None:
            continue
        _move(env, moves)
        if all(_in_sight(env, name, staying) for name in names if name in goal):
            return
        _move(env, {name: -move for name, move in moves.items()})
    raise RuntimeError(f"{env.task.name}: no free places for {', '.join(names)} in {_ROUNDS} "
                       "rounds; expected room for all within the arm's reach, the goal's in sight")


def _move(env: LiberoEnv, moves: dict[str, np.ndarray]) -> None:
    """Move objects by so much (2,) in metres."""
    for name, move in moves.items():
        joint = env.raw.get_object(name).joints[-1]
        position = env.sim.data.get_joint_qpos(joint).copy()
        position[:2] += move
        env.sim.data.set_joint_qpos(joint, position)
    env.sim.forward()


def _in_sight(env: LiberoEnv, name: str, ignored: Collection[str]) -> bool:
    """Whether nothing stands between a thing's middle and the still camera; the robot may."""
    others = [other for other in env.raw.obj_body_id if other != name and other not in ignored]
    boxes = Boxes.of_geoms(env, geoms_of(env, *others))
    low, high = Boxes.of_geoms(env, geoms_of(env, name)).bounds()
    way = np.linspace((low + high) / 2, env.camera_position(schema.STILL_CAMERA), 200)
    return boxes.share_inside(way) == 0


def _draw(env, names, obstacles, low, high, generator) -> dict[str, np.ndarray] | None:
    """A move (2,) in metres for each object, or ``None`` when one finds no place."""
    taken, moves = list(obstacles), {}
    for name in names:
        footprint, height = _footprint(env, name), env.object_position(name)[2]
        for _ in range(_TRIES):
            place = generator.uniform(low, high)
            move = place - footprint.mean(axis=0)
            there = footprint + move
            reachable = overreach(env, np.array([*place, height])) <= _STRETCH
            if reachable and not any(_overlap(there, other) for other in taken):
                break
        else:
            return None
        taken.append(there)
        moves[name] = move
    return moves


def _told_by_place(env: LiberoEnv) -> set[str]:
    """Objects of the goal of which there are others of the same kind."""
    kinds = Counter(_kind(name) for name in env.raw.objects_dict)
    return {name for predicate in env.raw.parsed_problem["goal_state"] for name in predicate[1:]
            if name in env.raw.objects_dict and kinds[_kind(name)] > 1}


def _kind(name: str) -> str:
    return name.rsplit("_", 1)[0]


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


def _free_to_move(env: LiberoEnv) -> list[str]:
    """Objects that begin on the table or the floor with nothing on them, and may be moved."""
    placed = {predicate[1]: predicate[2] for predicate in
              env.raw.parsed_problem["initial_state"] if len(predicate) == 3}
    regions = _surface_regions(env)
    staying = set(placed.values()) | _told_by_place(env)  # what carries another thing, first
    return [name for name, place in placed.items()
            if place in regions and name in env.raw.objects_dict and name not in staying]


def _footprint(env: LiberoEnv, name: str) -> np.ndarray:
    """Lowest and highest corner (2, 2) on the table."""
    return np.array(Boxes.of_geoms(env, geoms_of(env, name)).bounds())[:, :2]


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a[0] < b[1]).all() and (b[0] < a[1]).all())
