"""Frames of a moment that has passed, to the bit, without drawing what cannot be in the picture."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np

# What mjv_updateScene reads of the moving scene. A copy of these is enough to draw it later.
_FIELDS = (
    "geom_xpos", "geom_xmat", "site_xpos", "site_xmat",
    "cam_xpos", "cam_xmat", "light_xpos", "light_xdir",
)
_PLANE, _BOX, _MESH = 0, 6, 7  # of mujoco.mjtGeom; the first two can be mirrors
_REFLECTION = 2  # of mujoco.mjtRndFlag
_MARGIN = 0.005  # metres around a geom
_CORNERS = np.array(list(itertools.product((-1, 1), repeat=3)))  # (8, 3) of a box


def upright(images) -> np.ndarray:
    """Stored images (..., H, W, 3), which are upside down, as a person sees them."""
    images = np.asarray(images)
    if images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {images.shape}; expected (..., H, W, 3)")
    return np.flip(images, axis=-3)


class Scene:
    """The scene as it was when robosuite sampled a camera."""

    def __init__(self, raw):
        self.raw = raw
        self.sim = raw.sim
        data = self.sim.data._data
        self.fields = {name: getattr(data, name).copy() for name in _FIELDS}
        self.site_rgba = self.sim.model._model.site_rgba.copy()  # a stove's flame is a site

    def render(self, camera: str, size: int) -> np.ndarray:
        """uint8 (size, size, 3) of a camera, upside down as in the files.

        MuJoCo draws every geom that is not hidden, and once more for each mirror in the scene. Here
        it gets those that may be seen; and where a mirror takes up little of the picture, the
        rest is drawn without reflections, and the mirror's pixels from what shows in or before it.
        """
        if self.raw.sim is not self.sim:
            raise RuntimeError(
                f"the frame of {camera} was not read before the environment was reset or closed"
            )
        context = self.sim._render_context_offscreen
        with self._restored():
            context.gl_ctx.make_current()
            shown = np.asarray(context.vopt.geomgroup, dtype=bool)
            direct, mirrored, window = self._in_view(camera, shown[self._groups])
            work = self._faces(direct | mirrored)
            if window is None or self._faces(direct) + 2 * self._faces(mirrored) > 2 * work:
                return self._draw(camera, size, direct | mirrored)
            frame = self._draw(camera, size, direct, reflections=False)
            (left, bottom), (right, top) = _pixels(window, size)
            part = self._draw(camera, size, mirrored)[bottom:top, left:right]
            frame[bottom:top, left:right] = part
            return frame

    @property
    def _groups(self) -> np.ndarray:
        return self.sim.model._model.geom_group

    def _draw(self, camera: str, size: int, drawn: np.ndarray,
              reflections: bool = True) -> np.ndarray:
        """The frame with those geoms (ngeom,) alone."""
        context, groups = self.sim._render_context_offscreen, self._groups
        kept, kept_flag = groups.copy(), context.scn.flags[_REFLECTION]
        shown = np.asarray(context.vopt.geomgroup, dtype=bool)
        groups[~drawn] = int(np.flatnonzero(~shown)[-1])
        context.scn.flags[_REFLECTION] = kept_flag and reflections
        try:
            return np.array(self.sim.render(camera_name=camera, width=size, height=size))
        finally:
            groups[:] = kept
            context.scn.flags[_REFLECTION] = kept_flag

    def _faces(self, drawn: np.ndarray) -> int:
        """Of the meshes among geoms (ngeom,): what drawing costs where no GPU does it."""
        model = self.sim.model._model
        return int(model.mesh_facenum[model.geom_dataid[drawn & (model.geom_type == _MESH)]].sum())

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

    def _in_view(self, camera: str, shown: np.ndarray
                 ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Geoms (ngeom,) bool that a camera may see, and those that show in or before its mirrors.

        A mirror is a box or plane of a reflecting material. The last value is the window that all
        mirrors lie in, or None where that is the whole picture. By bounding boxes; LIBERO's lights
        cast no shadows, where one does everything is drawn.
        """
        model, index = self.sim.model._model, self.sim.model.camera_name2id(camera)
        if (model.light_castshadow != 0).any():
            return shown, shown, None
        origin = self.fields["cam_xpos"][index]
        axes = self.fields["cam_xmat"][index].reshape(3, 3)  # columns: right, up, backwards
        edge = np.tan(np.radians(model.cam_fovy[index]) / 2)
        whole = np.array([[-edge, -edge], [edge, edge]])
        turned = self.fields["geom_xmat"].reshape(-1, 3, 3)
        boxes = model.geom_aabb[:, None, :3] + _CORNERS * model.geom_aabb[:, None, 3:]
        corners = boxes @ turned.transpose(0, 2, 1) + self.fields["geom_xpos"][:, None]
        seen = (corners - origin) @ axes  # (ngeom, 8, 3)
        endless = model.geom_type == _PLANE
        direct = shown & (endless | _in_window(seen, whole))
        reflects = (model.geom_matid >= 0) & (model.mat_reflectance[model.geom_matid] > 0)
        mirrors = np.flatnonzero(reflects & direct & np.isin(model.geom_type, (_PLANE, _BOX)))
        windows = [whole if endless[mirror] else _window(seen[mirror], whole) for mirror in mirrors]
        mirrored = np.zeros_like(direct)
        for mirror, window in zip(mirrors, windows, strict=True):
            mirrored |= endless | _in_window(seen, window)
            normal = turned[mirror, :, 2]
            height = 0 if endless[mirror] else model.geom_size[mirror, 2]
            point = self.fields["geom_xpos"][mirror] + height * normal
            if (origin - point) @ normal > 0:
                behind = corners - 2 * ((corners - point) @ normal)[..., None] * normal
                mirrored |= _in_window((behind - origin) @ axes, window)
        if not windows:
            return direct, mirrored, None
        low, high = np.min(windows, axis=0)[0], np.max(windows, axis=0)[1]
        mirrored |= _in_window(seen, np.array([low, high]))  # between them, for there are several
        small = (low > whole[0]).any() or (high < whole[1]).any()
        return direct, mirrored & shown, np.array([low, high]) / edge if small else None


def _window(points: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Lowest and highest x / depth and y / depth (2, 2) of points (n, 3), within a window.

    Points are in the camera's coordinates, where depth is -z.
    """
    if (points[:, 2] > -_MARGIN).any():
        return whole
    slopes = points[:, :2] / -points[:, 2:]
    return np.clip([slopes.min(0), slopes.max(0)], whole[0], whole[1])


def _in_window(points: np.ndarray, window: np.ndarray) -> np.ndarray:
    """(n,) bool: hulls of points (n, 8, 3) that may reach into what is seen through a window."""
    depth = -points[..., 2:]
    low, high = window
    above = points[..., :2] - low * depth  # distances from the sides, but for a factor near 1
    below = high * depth - points[..., :2]
    return (np.concatenate([above, below, depth], axis=-1) > -_MARGIN).any(1).all(1)


def _pixels(window: np.ndarray, size: int) -> np.ndarray:
    """First and last but one column and row (2, 2) that a window, in (-1, 1), reaches into."""
    low, high = (window + 1) / 2 * size
    return np.clip([np.floor(low) - 1, np.ceil(high) + 1], 0, size).astype(int)
