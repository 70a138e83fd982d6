"""Frames of a moment that has passed, to the bit, without drawing what cannot be in the picture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

# What mjv_updateScene reads of the moving scene. A copy of these is enough to draw it later.
_FIELDS = (
    "geom_xpos", "geom_xmat", "site_xpos", "site_xmat",
    "cam_xpos", "cam_xmat", "light_xpos", "light_xdir",
)
_PLANE, _BOX = 0, 6  # of mujoco.mjtGeom: the types that can be mirrors
_MARGIN = 0.005  # metres around a geom


class Scene:
    """The scene as it was when robosuite sampled a camera."""

    def __init__(self, raw):
        self.raw = raw
        self.sim = raw.sim
        data = self.sim.data._data
        self.fields = {name: getattr(data, name).copy() for name in _FIELDS}
        self.site_rgba = self.sim.model._model.site_rgba.copy()  # a stove's flame is a site

    def render(self, camera: str, size: int) -> np.ndarray:
        """uint8 (size, size, 3) of a camera, upside down as in the files."""
        if self.raw.sim is not self.sim:
            raise RuntimeError(
                f"the frame of {camera} was not read before the environment was reset or closed"
            )
        context = self.sim._render_context_offscreen
        groups = self.sim.model._model.geom_group
        kept = groups.copy()
        with self._restored():
            context.gl_ctx.make_current()
            shown = np.asarray(context.vopt.geomgroup, dtype=bool)
            hidden_group = int(np.flatnonzero(~shown)[-1])
            groups[~self._in_view(camera, shown[groups])] = hidden_group
            try:
                return np.asarray(self.sim.render(camera_name=camera, width=size, height=size))
            finally:
                groups[:] = kept

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        data, model = self.sim.data._data, self.sim.model._model
        now = {name: getattr(data, name).copy() for name in _FIELDS}
        rgba_now = model.site_rgba.copy()
        self._assign(data, self.fields)
        model.site_rgba[:] = self.site_rgba
        try:
            yield
        finally:
            self._assign(data, now)
            model.site_rgba[:] = rgba_now

    @staticmethod
    def _assign(data, fields: dict) -> None:
        for name, value in fields.items():
            getattr(data, name)[:] = value

    def _in_view(self, camera: str, shown: np.ndarray) -> np.ndarray:
        """(ngeom,) bool: geoms that may be seen by a camera, directly or in a mirror.

        By bounding spheres. MuJoCo draws every geom, and once more for each mirror: a box or plane
        of a reflecting material. LIBERO's lights cast no shadows.
        """
        model, index = self.sim.model._model, self.sim.model.camera_name2id(camera)
        origin = self.fields["cam_xpos"][index]
        axes = self.fields["cam_xmat"][index].reshape(3, 3)  # columns: right, up, backwards
        edge = np.tan(np.radians(model.cam_fovy[index]) / 2)
        whole = np.array([[-edge, -edge], [edge, edge]])
        centres = self.fields["geom_xpos"]
        radii = np.where(model.geom_rbound > 0, model.geom_rbound + _MARGIN, np.inf)  # of planes 0
        seen = _in_window((centres - origin) @ axes, radii, whole)
        if (model.light_castshadow != 0).any():
            return np.ones_like(seen)
        reflects = (model.geom_matid >= 0) & (model.mat_reflectance[model.geom_matid] > 0)
        mirror = reflects & seen & shown & np.isin(model.geom_type, (_PLANE, _BOX))
        for number in np.flatnonzero(mirror):
            turned = self.fields["geom_xmat"][number].reshape(3, 3)
            half, normal = model.geom_size[number], turned[:, 2]
            point, window = centres[number], whole
            if model.geom_type[number] == _BOX:
                point = point + half[2] * normal
                corners = point + half[:2] * [[1, 1], [1, -1], [-1, 1], [-1, -1]] @ turned[:, :2].T
                window = _window((corners - origin) @ axes, whole)
            if (origin - point) @ normal > 0:
                mirrored = centres - 2 * ((centres - point) @ normal)[:, None] * normal
                seen |= _in_window((mirrored - origin) @ axes, radii, window)
        return seen


def _window(points: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Lowest and highest x / depth and y / depth (2, 2) of points (n, 3), within a window.

    Points and spheres are in the camera's coordinates, where depth is -z.
    """
    if (points[:, 2] > -_MARGIN).any():
        return whole
    slopes = points[:, :2] / -points[:, 2:]
    return np.stack([np.maximum(slopes.min(0), whole[0]), np.minimum(slopes.max(0), whole[1])])


def _in_window(centres: np.ndarray, radii: np.ndarray, window: np.ndarray) -> np.ndarray:
    """(n,) bool: spheres at (n, 3) that reach into what is seen through a window."""
    depth = -centres[:, 2:]
    low, high = window
    above = (centres[:, :2] - low * depth) / np.hypot(1, low)  # distances from the four sides
    below = (high * depth - centres[:, :2]) / np.hypot(1, high)
    return (np.column_stack([above, below, depth]) > -radii[:, None]).all(1)
