"""Hard resets of robosuite that compile the model and upload its meshes only once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

_LARGEST = 2**20  # bytes; larger arrays hold meshes and textures, which nothing changes


class KeptModel:
    """An environment's compiled model and its renderer, kept over hard resets.

    A hard reset of robosuite frees both, parses the model's XML and uploads its meshes, which takes
    seconds. This one gives the options and arrays of the model the values that compilation gave
    them, and resets the state. What follows is bit for bit the same. If the XML has changed, it
    builds another model.
    """

    _loaded_last = ""  # the XML of the model that MuJoCo would save

    def __init__(self, raw):
        self.raw, raw.kept_model = raw, self
        self._keep(raw.model.get_xml())
        raw._initialize_sim, raw._destroy_sim = self._initialize, lambda: None

    def _keep(self, xml: str) -> None:
        self.xml = KeptModel._loaded_last = xml
        model = self.raw.sim.model._model
        arrays = {name: value for name in dir(model)
                  if isinstance(value := getattr(model, name), np.ndarray)
                  and value.flags.writeable and value.nbytes <= _LARGEST}
        self.arrays = {name: (array, array.copy()) for name, array in arrays.items()}
        options = {name: getattr(model.opt, name) for name in dir(model.opt) if name[0] != "_"}
        self.options = {name: np.copy(value) if isinstance(value, np.ndarray) else value
                        for name, value in options.items()}

    def _initialize(self, xml_string: str | None = None) -> None:
        xml = xml_string or self.raw.model.get_xml()
        if xml != self.xml:
            self.free()
            type(self.raw)._initialize_sim(self.raw, xml_string)
            self._keep(xml)
            return
        for array, compiled in self.arrays.values():
            array[:] = compiled
        for name, value in self.options.items():
            setattr(self.raw.sim.model._model.opt, name, value)
        self.raw.sim.reset()
        for _ in range(2):  # as for a new model and for its renderer: each warms the solver up
            self.raw.sim.forward()
        self.raw.initialize_time(self.raw.control_freq)

    def saved_xml(self) -> str:
        """The model's XML with its present values.

        MuJoCo saves the XML that was loaded last: if that is another environment's, this one is
        loaded again.
        """
        if KeptModel._loaded_last != self.xml:
            import mujoco

            mujoco.MjModel.from_xml_string(self.xml)
            KeptModel._loaded_last = self.xml
        return self.raw.sim.model.get_xml()

    def use_context(self) -> None:
        """Make the renderer's OpenGL context the current one."""
        context = getattr(self.raw.sim, "_render_context_offscreen", None)
        if context is not None:
            context.gl_ctx.make_current()

    def free(self) -> None:
        self.use_context()  # in another one, that environment's textures and meshes would be freed
        self.arrays = {}
        type(self.raw)._destroy_sim(self.raw)


@contextlib.contextmanager
def keeping_models() -> Iterator[None]:
    """Environments built inside have a :class:`KeptModel`, as ``kept_model``."""
    from robosuite.environments.base import MujocoEnv

    original = MujocoEnv._initialize_sim

    def initialize(raw, xml_string=None):
        original(raw, xml_string)
        KeptModel(raw)

    MujocoEnv._initialize_sim = initialize
    try:
        yield
    finally:
        MujocoEnv._initialize_sim = original
