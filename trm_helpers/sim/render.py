"""Frames of a past instant, bit for bit, rendered without geoms that cannot be in them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np

# mjv_updateScene reads these of a moving scene; a copy is enough to render it later
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
    """The scene at the instant at which robosuite sampled a camera."""

    def __init__(self, raw):
        self.raw = raw
        self.sim = raw.sim
        self.fields = {name: array.copy() for name, array in self._live().items()}

    def _live(self) -> dict[str, np.ndarray]:
        arrays = {name: getattr(self.sim.data._data, name) for name in _FIELDS}
        return {**arrays, "site_rgba": self.sim.model._model.site_rgba}  # a stove's flame

    def render(self, camera: str, size: int) -> np.ndarray:
        """uint8 (size, size, 3) of a camera, upside down as in the files.

        MuJoCo renders every geom that is not hidden, once for the camera and once more for each
        mirror. This renders only geoms that may be visible. Where mirrors cover little of the
        frame, the frame is rendered without reflections, and the mirrors' pixels separately from
        the geoms that appear in or in front of them.
        """
        if self.raw.sim is not self.sim:
            raise RuntimeError(
                f"the frame of {camera} was not read before the environment was closed or built "
                "another model"
            )
        context = self.sim._render_context_offscreen
        with self._restored():
            context.gl_ctx.make_current()
            groups = np.asarray(context.vopt.geomgroup, dtype=bool)
            direct, mirrored, window = self._in_view(
                camera, groups[self.sim.model._model.geom_group])
            work = self._faces(direct | mirrored)
            if window is None or self._faces(direct) + 2 * self._faces(mirrored) > 2 * work:
                return self._render(camera, size, direct | mirrored)
            frame = self._render(camera, size, direct, reflections=False)
            (left, bottom), (right, top) = _pixels(window, size)
            part = self._render(camera, size, mirrored)[bottom:top, left:right]
            frame[bottom:top, left:right] = part
            return frame

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """The simulator as it was at this scene's instant, and afterwards as it is now."""
        live = self._live()
        now = {name: array.copy() for name, array in live.items()}
        try:
            for name, array in live.items():
                array[:] = self.fields[name]
            yield
        finally:
            for name, array in live.items():
                array[:] = now[name]

    def _render(self, camera: str, size: int, visible: np.ndarray,
                reflections: bool = True) -> np.ndarray:
        """The frame with the geoms ``visible`` (ngeom,) only."""
        context, groups = self.sim._render_context_offscreen, self.sim.model._model.geom_group
        kept, kept_flag = groups.copy(), context.scn.flags[_REFLECTION]
        groups[~visible] = np.flatnonzero(np.asarray(context.vopt.geomgroup) == 0)[-1]
        context.scn.flags[_REFLECTION] = kept_flag and reflections
        try:
            return np.array(self.sim.render(camera_name=camera, width=size, height=size))
        finally:
            groups[:] = kept
            context.scn.flags[_REFLECTION] = kept_flag

    def _faces(self, geoms: np.ndarray) -> int:
        """Mesh faces of geoms (ngeom,) bool: the cost of rendering without a GPU."""
        model = self.sim.model._model
        return int(model.mesh_facenum[model.geom_dataid[geoms & (model.geom_type == _MESH)]].sum())

    def _in_view(self, camera: str, shown: np.ndarray
                 ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Geoms (ngeom,) bool that a camera may see, and geoms in or in front of its mirrors.

        A mirror is a box or plane of a reflecting material. The last value is the window of all
        mirrors, or ``None`` for the whole frame. Geoms are tested by their bounding boxes. LIBERO's
        lights cast no shadows; if one does, every geom counts as visible.
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
        mirrored |= _in_window(seen, np.array([low, high]))  # also between several mirrors
        small = (low > whole[0]).any() or (high < whole[1]).any()
        return direct, mirrored & shown, np.array([low, high]) / edge if small else None


def _window(points: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Lowest and highest x / depth and y / depth (2, 2) of points (n, 3), within a window.

    Points are in camera coordinates, where depth is -z.
    """
    if (points[:, 2] > -_MARGIN).any():
        return whole
    slopes = points[:, :2] / -points[:, 2:]
    return np.clip([slopes.min(0), slopes.max(0)], whole[0], whole[1])


def _in_window(points: np.ndarray, window: np.ndarray) -> np.ndarray:
    """(n,) bool: whether the hull of the points (n, 8, 3) may be seen through a window."""
    depth = -points[..., 2:]
    low, high = window
    above = points[..., :2] - low * depth  # distances from the sides, up to a factor near 1
    below = high * depth - points[..., :2]
    return (np.concatenate([above, below, depth], axis=-1) > -_MARGIN).any(1).all(1)


def _pixels(window: np.ndarray, size: int) -> np.ndarray:
    """First, and one past the last, column and row (2, 2) of a window in (-1, 1)."""
    low, high = (window + 1) / 2 * size
    return np.clip([np.floor(low) - 1, np.ceil(high) + 1], 0, size).astype(int)
