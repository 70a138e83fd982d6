"""Bounding boxes of objects and regions, room for the gripper, and the reach of the arm.

Positions are in metres in the world: x away from the robot's base, y to its left, z up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .env import LiberoEnv

UP = np.array([0.0, 0.0, 1.0])
_CLEARANCE = 0.003  # metres that the gripper keeps from every box
# The Panda, in metres
_SHOULDER_HEIGHT = 0.333  # above the base
_WRIST_ABOVE = 0.21  # the site of a gripper that points down
_WRIST_BESIDE = 0.088  # that site: joint 7's offset
_COMFORTABLE_REACH = 0.68  # from shoulder to wrist; the elbow is straight at 0.71


def turned(yaw: float) -> np.ndarray:
    """Rotation matrix (3, 3) about the vertical."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Boxes:
    """Bounding boxes of collision geometries, each in its own axes, at their positions now."""

    centre: np.ndarray  # (G, 3)
    rotation: np.ndarray  # (G, 3, 3)
    half: np.ndarray  # (G, 3)

    @classmethod
    def of_geoms(cls, env: LiberoEnv, geoms: list[int]) -> Boxes:
        model, data = env.sim.model._model, env.sim.data._data
        rotation = data.geom_xmat[geoms].reshape(-1, 3, 3)
        offset = np.einsum("gij,gj->gi", rotation, model.geom_aabb[geoms, :3])
        return cls(data.geom_xpos[geoms] + offset, rotation, model.geom_aabb[geoms, 3:])

    def corners(self, yaw: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corners (G, 3) in world axes turned by ``yaw``."""
        frame = turned(yaw).T
        reach = np.einsum("gij,gj->gi", np.abs(frame @ self.rotation), self.half)
        return self.centre @ frame.T - reach, self.centre @ frame.T + reach

    def bounds(self, yaw: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner (3,) of all boxes together."""
        low, high = self.corners(yaw)
        return low.min(axis=0), high.max(axis=0)

    def size(self, yaw: float = 0.0) -> np.ndarray:
        """Extent (3,) in metres of all boxes together, in axes turned by ``yaw``."""
        low, high = self.bounds(yaw)
        return high - low

    def middle(self) -> np.ndarray:
        """Centre (3,) of all boxes together."""
        low, high = self.bounds()
        return (low + high) / 2

    def share_inside(self, points: np.ndarray) -> float:
        """Fraction of ``points`` (N, 3) inside a box."""
        local = np.einsum("gji,ngj->ngi", self.rotation, points[:, None] - self.centre)
        return float((np.abs(local) < self.half).all(axis=-1).any(axis=-1).mean())

    def near(self, point: np.ndarray, distance: float) -> Boxes:
        """Boxes that may come closer than ``distance`` metres to ``point`` (3,)."""
        radius = np.linalg.norm(self.half, axis=1)
        close = np.linalg.norm(self.centre - point, axis=1) < radius + distance
        return Boxes(self.centre[close], self.rotation[close], self.half[close])

    def tops_along(self, start: np.ndarray, end: np.ndarray, corridor: float) -> np.ndarray:
        """Top heights of the boxes within ``corridor`` metres of the line between two points."""
        low, high = self.corners()
        path = np.linspace(start[:2], end[:2], 20)[:, None]  # (20, 1, 2)
        beside = path - np.clip(path, low[:, :2], high[:, :2])  # from each box's nearest point
        return high[np.linalg.norm(beside, axis=-1).min(axis=0) < corridor, 2]


def geoms_of(env: LiberoEnv, *names: str) -> list[int]:
    """Collision geometries of objects and fixtures named in the BDDL file."""
    return [env.sim.model.geom_name2id(geom)
            for name in names for geom in env.raw.get_object(name).contact_geoms]


def _grid(*axes) -> np.ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def _open_gripper() -> np.ndarray:
    """Points (N, 3) of the open Panda gripper pointing down, in metres from its site.

    Axes: along the jaw, the closing direction, up. Measured on the collision meshes. Points are
    8 mm apart because drawers have thin walls.
    """
    along = (-0.011, 0.0, 0.011)
    tips = _grid(along, (0.037, 0.045, 0.053), np.arange(-0.009, 0.025, 0.008))
    roots = _grid(along, (0.033, 0.041, 0.049, 0.057, 0.065), np.arange(0.025, 0.050, 0.008))
    hand = _grid((-0.022, 0.0, 0.022), np.linspace(-0.1, 0.1, 26), (0.033, 0.06, 0.09))
    flange = _grid((-0.045, 0.0, 0.045), (-0.045, 0.0, 0.045), np.arange(0.1, 0.21, 0.02))
    fingers = np.concatenate([tips, roots])
    return np.concatenate([fingers, fingers * (1, -1, 1), hand, flange])


_GRIPPER = _open_gripper()


def crowding(point: np.ndarray, yaw: float, boxes: Boxes) -> float:
    """Fraction of the open gripper inside the boxes, with its site at ``point`` (3,); 0 is free."""
    enlarged = Boxes(boxes.centre, boxes.rotation, boxes.half + _CLEARANCE)
    return enlarged.share_inside(point + _GRIPPER @ turned(yaw).T)


def way_out(points: np.ndarray, height: float, boxes: Boxes) -> np.ndarray:
    """The shortest horizontal move (3,) after which ``points`` (N, 3) can rise by ``height``.

    Zero where nothing is above, or where no place within 12 cm is free.
    """
    directions = [turned(angle)[0] for angle in np.radians(np.arange(0, 360, 45))]
    moves = [np.zeros(3)] + [r * way for r in (0.02, 0.04, 0.08, 0.12) for way in directions]
    solid = Boxes(boxes.centre, boxes.rotation, np.maximum(boxes.half, 0.003))  # boards are thin
    lift = 0.02  # the object is lifted off its support, moved, and lifted further
    up = np.arange(lift, height, 0.005)[:, None, None] * UP  # (L, 1, 3)
    for move in moves:
        aside = lift * UP + np.linspace(0, 1, 10)[:, None, None] * move  # (10, 1, 3)
        way = np.concatenate([points + aside, points + move + up]).reshape(-1, 3)
        if solid.share_inside(way) == 0:
            return move
    return moves[0]


def overreach(env: LiberoEnv, point: np.ndarray) -> float:
    """Metres beyond the comfortable reach, with the gripper pointing down at ``point``."""
    from_base = point - env.sim.data.body_xpos[env.sim.model.body_name2id("robot0_base")]
    out = np.linalg.norm(from_base[:2]) - _WRIST_BESIDE
    return max(0.0, np.hypot(out, from_base[2] + _WRIST_ABOVE - _SHOULDER_HEIGHT)
               - _COMFORTABLE_REACH)


def free_spot(fixture: Boxes, centre: np.ndarray, half: np.ndarray, size: np.ndarray,
              height: float) -> np.ndarray:
    """Metres (2,) from a region's ``centre`` to where an upright cylinder overlaps the boxes least.

    The region has ``half`` its size (3,), the cylinder the diameters of ``size`` and stands 2 cm
    above the region's bottom with a ``height`` in metres. At equal amounts the nearest is chosen.
    """
    radius, angle = np.meshgrid(np.linspace(0, 0.5, 6), np.arange(0, 2 * np.pi, np.pi / 8))
    disc = np.stack([size[0] * radius * np.cos(angle), size[1] * radius * np.sin(angle),
                     np.zeros_like(angle)], axis=-1).reshape(-1, 3)
    levels = centre[2] - half[2] + 0.02 + np.arange(0.0, height, 0.02)
    column = (disc + levels[:, None, None] * UP).reshape(-1, 3)
    spots = [np.zeros(2)] + [share * turned(angle)[0, :2] * half[:2]
                             for share in np.arange(0.1, 0.9, 0.1)
                             for angle in np.radians(np.arange(0, 360, 45))]
    met = [fixture.share_inside(column + [*(centre[:2] + spot), 0.0]) for spot in spots]
    return spots[int(np.argmin(met))]


def region_box(env: LiberoEnv, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A region's centre and half size (3,) in world axes."""
    size = np.asarray(env.raw.object_sites_dict[name].size, dtype=float)
    rotation = np.array(env.sim.data.get_site_xmat(name)).reshape(3, 3)
    return np.array(env.sim.data.get_site_xpos(name)), np.abs(rotation @ size)
