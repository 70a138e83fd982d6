"""Hard resets of robosuite that compile the model and upload its meshes only once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from xml.etree import ElementTree

import numpy as np

_LARGEST = 2**20  # bytes; larger arrays hold meshes and textures, which nothing changes


class KeptModel:
    """An environment's compiled model and its renderer, kept over hard resets.

    A hard reset of robosuite frees both, parses the model's XML and uploads its meshes: 2 to 5 s.
    Here it gives the arrays of the model the values that compilation gave them, and resets the
    state, unless the XML has changed. What follows is bit for bit the same.
    """

    def __init__(self, raw):
        self.raw, raw.kept_model = raw, self
        self._keep(raw.model.get_xml())
        raw._initialize_sim, raw._destroy_sim = self._initialize, lambda: None

    def _keep(self, xml: str) -> None:
        self.xml, model = xml, self.raw.sim.model._model
        arrays = {name: value for name in dir(model)
                  if isinstance(value := getattr(model, name), np.ndarray)
                  and value.flags.writeable and value.nbytes <= _LARGEST}
        self.arrays = {name: (array, array.copy()) for name, array in arrays.items()}

    def _initialize(self, xml_string: str | None = None) -> None:
        xml = xml_string or self.raw.model.get_xml()
        if xml != self.xml:
            self.free()
            type(self.raw)._initialize_sim(self.raw, xml_string)
            self._keep(xml)
            return
        for array, compiled in self.arrays.values():
            array[:] = compiled
        self.raw.sim.reset()
        for _ in range(2):  # robosuite's new model, and its renderer: each starts the solver warmer
            self.raw.sim.forward()
        self.raw.initialize_time(self.raw.control_freq)

    def saved_xml(self) -> str:
        """The model's XML with its present values.

        MuJoCo saves the XML that this process loaded last: if it was another model's, this one is
        loaded again.
        """
        import mujoco

        model = self.raw.sim.model
        with contextlib.suppress(mujoco.FatalError, RuntimeError, ValueError):
            xml = model.get_xml()
            named = {body.get("name") for body in ElementTree.fromstring(xml).iter("body")}
            if named == {*model.body_names} - {"world"}:
                return xml
        mujoco.MjModel.from_xml_string(self.xml)
        return model.get_xml()

    def free(self) -> None:
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
