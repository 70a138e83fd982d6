"""Collection of scripted demonstrations in LIBERO's HDF5 layout: parallel, resumable, atomic.

Each attempt has a number and a seed of its own, and the file holds the first successful ones in
order: the result depends neither on the number of workers nor on interruptions.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import h5py
import numpy as np
from tqdm.auto import tqdm

from .. import paths, schema
from ..config import Config, DataConfig
from ..files import atomic_path, differences, exclusive_lock, read_json
from ..opengl import simulator_imports
from ..sim import layouts
from ..sim.env import (
    LayoutError,
    LiberoEnv,
    load_task,
    quiet,
    renewed_after_errors,
    worker_env,
)
from ..sim.parallel import run_jobs
from ..software import minutes_left
from ..stats import counted
from .dagger import Actor, Mixture
from .demo_files import (
    COLLECTION_ATTR,
    VERSION_ATTR,
    DemoFileError,
    check_demo_file,
    demo_names,
    files_trained_on,
    json_attribute,
    open_demo_file,
    source_of,
    version_notes,
)
from .experts import Expert
from .find_demos import (
    find_demonstrations,
    human_demonstrations,
    left_out_text,
    other_task,
    scripted_dir,
    survey_demonstrations,
)
from .skills import Style

_BURST_PROBABILITY = 0.04  # of a burst of pushing beginning in a step
_START_PROBABILITY = 0.5  # of a longer burst in the first steps, for a varied start
_MAX_FAILURES = 20  # this many failures, and more than successes: the expert cannot do the task


class Disturbance:
    """Bursts of pushing, so that a demonstration shows how to recover.

    During a burst a random command is executed in place of the expert's; the stored action remains
    the expert's answer to its new position (after DART, arXiv 1703.09327, with bursts instead of
    noise).
    """

    def __init__(self, generator: np.random.Generator):
        self.generator = generator
        self.left = 0
        self.push = np.zeros(schema.ARM_DIM)
        if generator.random() < _START_PROBABILITY:
            self._begin(generator.integers(6, 16))

    def apply(self, action: np.ndarray) -> np.ndarray:
        """The command executed for ``action`` (7,); the gripper is never disturbed."""
        if self.left == 0 and self.generator.random() < _BURST_PROBABILITY:
            self._begin(self.generator.integers(3, 8))
        if self.left == 0:
            return action
        self.left -= 1
        return np.concatenate([self.push, action[schema.ARM_DIM:]])

    def _begin(self, steps: int) -> None:
        self.left = int(steps)
        direction = self.generator.normal(size=3) * (1.0, 1.0, 0.7)
        strength = self.generator.uniform(0.3, 0.9)
        self.push[:3] = strength * direction / np.linalg.norm(direction)
        self.push[3:] = self.generator.uniform(-0.05, 0.05, 3)


def collect_demonstrations(suite: str, task_id: int, num_demos: int, folder: str | os.PathLike,
                           **options) -> Path:
    """The file of one task, see :func:`collect_tasks`, which takes the same ``options``."""
    return collect_tasks(suite, [task_id], num_demos, folder, **options)[task_id]


def collect_tasks(suite: str, task_ids: Iterable[int], num_demos: int, folder: str | os.PathLike,
                  *, seed: int = 0, workers: int | None = None, disturb: bool = True,
                  placement: str = "benchmark", actor: Actor | None = None,
                  frame_stride: int = 1) -> dict[int, Path]:
    """Write ``<folder>/<task name>_demo.hdf5`` with successful demonstrations of each task.

    Returns the file of each task in order. Layouts are sampled by the environment's reset, never
    taken from the official init states. Finished attempts are kept beside the file until it holds
    them; after an interruption the same call resumes. A complete file is returned unchanged, a
    smaller one extended.

    Args:
        num_demos: successful demonstrations in the file.
        seed: of the layouts, the demonstrator's style and the disturbances.
        workers: see :func:`parallel.run_jobs`.
        disturb: push the arm (see :class:`Disturbance`).
        placement: of the objects: ``benchmark`` or ``wide``, see :func:`layouts.reset`.
        actor: acts in place of the expert, which labels (DAgger, see :class:`dagger.Mixture`). The
            file begins with the demonstrations that the actor was trained on. Nothing else pushes
            the arm. An episode ends with success or at the suite's horizon; either way it is kept,
            because its labels are right whether or not the actor succeeds.
        frame_stride: steps per rendered frame; the file repeats a frame until the next one.
            Rendering is most of the work on a CPU.

    Raises:
        ValueError: unknown suite, task or placement; a suite of LIBERO-PRO; a task without an
            expert; an existing file with other settings, as of another actor.
        RuntimeError: the expert fails too often on a task; the others are completed first.
        OSError: the disk is full; finished attempts are kept.
        TimeoutError: an attempt twice took longer than 15 minutes; or the session's time is up, and
            the files hold the demonstrations so far.
        WorkerDied: an attempt twice lost its process.
    """
    if num_demos < 1:
        raise ValueError(f"num_demos={num_demos} is not valid; expected at least 1")
    if frame_stride < 1:
        raise ValueError(f"frame_stride={frame_stride} is not valid; expected at least 1")
    schema.check_option("placement", placement, schema.PLACEMENTS)
    schema.check_training_suite(suite)
    if suite == schema.JOINT_SUITE and not actor:  # an actor knows the tasks by this suite's ids
        raise ValueError(f"suite={suite!r} has no demonstrations of its own; expected one of "
                         f"{', '.join(schema.JOINED)}, or ensure_demonstrations")
    task_ids, tasks = [int(task_id) for task_id in task_ids], {}  # Python's own, for the JSON
    for task_id in sorted(set(task_ids)):  # in one order, as two calls may lock the same tasks
        settings = {"by": "scripted expert", "suite": suite, "task_id": task_id, "seed": int(seed),
                    "disturb": disturb and actor is None, "placement": placement,
                    schema.FRAME_STRIDE_ATTR: int(frame_stride),
                    "observations": "what env.step returned", **schema.PINNED}
        if actor:
            settings |= {"by": "a policy, labelled by the scripted expert (DAgger)",
                         "actor": actor.run, "beta": actor.beta}
            if actor.sha256:  # unknown while complete files are read
                settings["actor_sha256"] = actor.sha256
        tasks[task_id] = _Collection(load_task(suite, task_id), Path(folder), settings, num_demos,
                                     actor)
    incomplete = [task for task in tasks.values() if not task.is_complete()]
    for task in incomplete:
        task.require_policy()
    with contextlib.ExitStack() as locks:  # not of complete files: a call may be extending one
        for task in incomplete:
            locks.enter_context(exclusive_lock(task.path.parent, lock=f".{task.name}.lock"))
        # another call may have been faster
        incomplete = [task for task in incomplete if not task.is_complete()]
        for task in incomplete:
            task.open()
        if incomplete:
            count = sum(task.num_demos - task.found for task in incomplete)
            print(f"collecting {counted(count, 'missing demonstration')}", flush=True)
            _collect(incomplete, workers)
    return {task_id: tasks[task_id].path for task_id in task_ids}


class _Collection:
    """The demonstrations of one task: its file, and the attempts beside it that it lacks."""

    def __init__(self, task, folder: Path, settings: dict, num_demos: int,
                 actor: Actor | None = None):
        self.task, self.name = task, task.name
        self.settings, self.num_demos, self.actor = settings, num_demos, actor
        self.path = folder / f"{self.name}{schema.DEMO_FILE_SUFFIX}"
        calm = "" if settings["disturb"] else ".calm"
        if actor:
            calm = f".{actor.sha256[:12]}.beta{actor.beta}"
        if (stride := settings[schema.FRAME_STRIDE_ATTR]) > 1:
            calm += f".stride{stride}"
        self.parts = self.path.with_name(
            f".{self.name}.{settings['placement']}{calm}.seed{settings['seed']}.parts")
        self.attempts: dict[int, Path | None] = {}  # the file of a success, None for a failure

    def is_complete(self) -> bool:
        """Raises ``ValueError`` for an existing file that is damaged or has other settings."""
        if not self.path.exists():
            return False
        check_demo_file(self.path)
        with open_demo_file(self.path) as file:
            count = len(demo_names(file))
            found = json_attribute(file[schema.DATA_GROUP], COLLECTION_ATTR)
        found.pop("failed_attempts", None)
        # former files name neither
        found = {"placement": "benchmark", schema.FRAME_STRIDE_ATTR: 1, **found}
        if "actor_sha256" not in self.settings:
            found.pop("actor_sha256", None)
        if different := differences(found, self.settings):
            raise ValueError(f"{self.path} was made with other settings ({different}); "
                             "move it away or collect into another folder")
        return count >= self.num_demos

    def open(self) -> None:
        """Read the attempts that are finished: those in the file and those beside it."""
        if self.actor:
            self._refuse_other_actor()
        if self.path.exists():
            self.attempts = _of_file(self.path)
        elif self.actor:
            self.attempts = _of_file(self.actor.base[self.settings["task_id"]],
                                     self.actor.base_count)
        self.parts.mkdir(parents=True, exist_ok=True)
        self.attempts.update((number, part if part.suffix == ".hdf5" else None)
                             for number, part in self._finished())

    def _finished(self) -> list[tuple[int, Path]]:
        """Number and file of each finished attempt beside the file."""
        return [(int(part.stem.split("_")[1]), part) for part in self.parts.glob("attempt_*")]

    def require_policy(self) -> None:
        """Raise ``FileNotFoundError`` for an actor of which only the name is known."""
        if self.actor and not self.actor.source:
            raise FileNotFoundError(
                f"{self.num_demos} demonstrations are needed in {self.path}; collect them: "
                f"python -m trm_helpers collect --actor {self.actor.run} --beta "
                f"{self.actor.beta} --suite {self.settings['suite']} --task-ids "
                f"{self.settings['task_id']} --placement {self.settings['placement']} "
                f"--num-demos {self.num_demos} "
                f"--frame-stride {self.settings[schema.FRAME_STRIDE_ATTR]}")

    def _refuse_other_actor(self) -> None:
        for parts in self.path.parent.glob(f".{self.name}.*.parts"):
            if parts != self.parts:
                raise ValueError(f"{parts} holds unfinished demonstrations by another actor, "
                                 f"beta, frame_stride or seed than {self.actor.run!r} with the "
                                 f"weights {self.actor.sha256[:12]} and beta={self.actor.beta}; "
                                 "remove it")

    def missing(self) -> list[tuple]:
        """Arguments of :func:`_attempt` for the attempts to make if each of them succeeds."""
        not_failed = (number for number in itertools.count() if self.attempts.get(number, True))
        return [(self.settings, self.actor, self.parts, number)
                for number in itertools.islice(not_failed, self.num_demos)
                if number not in self.attempts]

    @property
    def chosen(self) -> list[int]:
        """The first successful attempts, in order, up to the first unfinished one."""
        finished = itertools.takewhile(self.attempts.__contains__, itertools.count())
        return [number for number in finished if self.attempts[number]][:self.num_demos]

    @property
    def found(self) -> int:
        return len(self.chosen)

    def hopeless(self) -> str:
        """Why the task is given up, or an empty text."""
        failures = sum(part is None for part in self.attempts.values())
        if failures < _MAX_FAILURES or failures <= len(self.attempts) / 2:
            return ""
        return (f"the scripted expert failed {failures} of {len(self.attempts)} attempts at "
                f"{self.name}; it cannot demonstrate this task")

    def write(self) -> None:
        """Write the file and remove the attempts that it holds; others wait for a longer file."""
        with atomic_path(self.path) as temporary:
            _assemble(temporary, self.task, self.settings, self.attempts, self.chosen)
            check_demo_file(temporary)
        for number, part in self._finished():
            if number <= self.chosen[-1]:
                part.unlink()
        if not self._finished():
            shutil.rmtree(self.parts)


def _collect(tasks: Sequence[_Collection], workers: int | None) -> None:
    """Make attempts until the first ``num_demos`` successes of each task are known."""
    by_folder, given_up = {task.parts: task for task in tasks}, {}
    attempts = [attempt for task in tasks for attempt in task.missing()]
    numbers = " ".join(str(task.settings["task_id"]) for task in tasks)
    named = f"task {numbers}" if len(tasks) == 1 else (
        f"tasks {numbers}" if len(tasks) <= 10 else f"{len(tasks)} tasks")
    with tqdm(total=sum(task.num_demos for task in tasks), unit="demo",
              initial=sum(task.found for task in tasks),
              desc=f"demonstrations of {tasks[0].settings['suite']}, {named}") as bar:
        for task in tasks:
            if task.found == task.num_demos:  # cut off before the file was written
                task.write()
        outcomes = run_jobs(
            lambda arguments: _attempt(*arguments), attempts, workers=workers,
            group=lambda arguments: arguments[-2],
            wanted=lambda arguments: arguments[-2] not in given_up and minutes_left() > 0)
        with contextlib.closing(outcomes):  # an error ends the workers too
            for (*_, folder, number), part, error in outcomes:
                if error:
                    raise error
                task = by_folder[folder]
                task.attempts[number] = part
                attempts += [new for new in task.missing() if new not in attempts]
                bar.update(sum(task.found for task in tasks) - bar.n)
                if task.found == task.num_demos:
                    given_up.pop(folder, None)  # attempts that ran on when it was given up
                    task.write()
                elif reason := task.hopeless():
                    given_up[folder] = reason
    short = [task for task in tasks if task.found < task.num_demos and task.parts not in given_up]
    for task in short:
        if task.found:
            task.write()  # the next call extends it
    if given_up:
        raise RuntimeError("; ".join(given_up.values()))
    if short:
        counts = ", ".join(f"{task.found} of {task.num_demos} of {task.name}" for task in short)
        raise TimeoutError(f"the session's time is up; demonstrations so far: {counts}. They are "
                           f"in {short[0].path.parent}, and the same call continues")


def ensure_demonstrations(config: Config, actor: Actor | None = None) -> dict[int, Path]:
    """The demonstration file of each task of ``config.data``, found, downloaded or collected.

    With ``demo_dir`` no other folder is searched, and nothing is collected or downloaded.
    Otherwise ``demos="auto"`` uses human demonstrations of the tasks that have any and scripted
    ones of the others, and with ``config.data.actor`` all tasks have its file. Prints one line for
    each kind, and one for each file that may be of another task or of another version.

    Args:
        actor: of :func:`evaluation.actor.actor_of`, to collect with; without it only complete
            files are found.
    """
    data = config.data
    if data.actor and not data.demo_dir:
        folder = scripted_dir(data.suite, data.placement, data.actor, data.beta, data.frame_stride)
        print(f"{data.num_demos} demonstrations per task, with the run {data.actor!r} acting and "
              f"the scripted expert labelling, in {folder}")
        files = collect_tasks(data.suite, data.task_ids, data.num_demos, folder,
                              placement=data.placement,
                              actor=actor or Actor(data.actor, data.beta),
                              frame_stride=data.frame_stride)
    else:
        files = _find_or_collect(data)
    of_others = (other_task(path, load_task(data.suite, task_id))
                 for task_id, path in files.items())
    for note in (*filter(None, of_others), *version_notes(files.values())):
        print(note)
    return files


def _find_or_collect(data: DataConfig) -> dict[int, Path]:
    """The file of each task: in ``demo_dir``, of a person's demonstrations, or of scripted ones."""
    tasks = {task_id: load_task(data.suite, task_id) for task_id in data.task_ids}
    names = [task.name for task in tasks.values()]
    kinds = ["human", "scripted"] if data.demos == "auto" else [data.demos]
    kinds += ["dagger"] if "scripted" in kinds else []
    places = [paths.data_dir(), paths.KAGGLE_INPUT]
    searched = [str(place) for place in places if place.is_dir()] or [str(places[0])]
    found = {}
    if data.demo_dir:
        if not Path(data.demo_dir).is_dir():
            raise FileNotFoundError(f"demo_dir={data.demo_dir!r} is not a folder; expected one "
                                    f"with <task name>{schema.DEMO_FILE_SUFFIX} files")
        found, left_out = find_demonstrations([data.demo_dir], names, kinds)
        if left_out:
            print(f"left out: {left_out_text(left_out)}")
    elif data.demos == "human":
        found = human_demonstrations({task.name: schema.own_suite(data.suite, task_id)[0]
                                      for task_id, task in tasks.items()})
    elif data.demos == "auto":
        found, _ = survey_demonstrations(places, names, ["human"])
    for kind in kinds:
        of_kind = [str(path) for path in found.values() if source_of(path) == kind]
        if of_kind:
            print(f"{kind} demonstrations of {counted(len(of_kind), 'task')}: {', '.join(of_kind)}")
    missing = [task_id for task_id, task in tasks.items() if task.name not in found]
    owned = [schema.own_suite(data.suite, task_id) for task_id in missing]
    for suite in dict.fromkeys(suite for suite, _ in owned):
        folder = scripted_dir(suite, data.placement, frame_stride=data.frame_stride)
        wanted = [task_id for each, task_id in owned if each == suite]
        print(f"{data.num_demos} scripted demonstrations "
              + ("of 1 task" if len(wanted) == 1 else f"for each of {len(wanted)} tasks")
              + (f" (no human ones below {' or '.join(searched)})" * (data.demos == "auto"))
              + f" in {folder}")
        made = collect_tasks(suite, wanted, data.num_demos, folder, placement=data.placement,
                             frame_stride=data.frame_stride)
        found.update((load_task(suite, task_id).name, path) for task_id, path in made.items())
    return {task_id: found[task.name] for task_id, task in tasks.items()}


def demonstrations_of(run: Path, config: Config) -> dict[int, Path]:
    """:func:`ensure_demonstrations` of a trained run: only scripted ones if it had no others.

    Raises ``FileNotFoundError`` for a run trained with a ``demo_dir`` if ``config`` has none: the
    path in the run's file is never used, and other demonstrations are not the run's.
    """
    given = read_json(run / "config.json").get("data", {}).get("demo_dir")
    if given and not config.data.demo_dir:
        raise FileNotFoundError(f"{run} was trained with demo_dir={given!r}; expected demo_dir, "
                                "the folder with these demonstrations on this machine")
    path = run / "policy.json"
    trained_on = files_trained_on(path, read_json(path, keys=["trained_on.files"]))
    if "human" not in {file["source"] for file in trained_on}:  # human ones may be new here
        config = config.replace(demos="scripted")
    return ensure_demonstrations(config)


# --- attempts -----------------------------------------------------------------------------------


def _of_file(path: Path, count: int | None = None) -> dict[int, Path | None]:
    """The attempts in a file, or up to its first ``count`` demonstrations."""
    with open_demo_file(path) as file:
        data = file[schema.DATA_GROUP]
        numbers = [_attempt_number(data[name]) for name in demo_names(file)[:count]]
        failed = json_attribute(data, COLLECTION_ATTR).get("failed_attempts")
    if not isinstance(failed, list) or not all(type(number) is int for number in failed):
        raise DemoFileError(f"{path}: failed_attempts={failed!r} in attribute {COLLECTION_ATTR}; "
                            "expected a list of numbers, without which the file cannot be extended")
    return {**{number: None for number in failed if number < numbers[-1]},
            **dict.fromkeys(numbers, path)}


def _attempt_number(demo: h5py.Group) -> int:
    number = demo.attrs.get("attempt")
    if not isinstance(number, int | np.integer):
        raise DemoFileError(f"{demo.file.filename}, {demo.name}: attribute attempt={number!r}; "
                            "expected a number, without which the file cannot be extended")
    return int(number)


def _attempt(settings: dict, actor: Actor | None, parts: Path, number: int) -> Path | None:
    """One seeded attempt in a worker; its part file, or ``None`` after a failure."""
    generator = np.random.default_rng([settings["seed"], settings["task_id"], number])
    with renewed_after_errors():
        env = worker_env(settings["suite"], settings["task_id"])
        record = record_demonstration(env, generator, settings["disturb"], settings["placement"],
                                      actor, settings[schema.FRAME_STRIDE_ATTR])
    if record is None:
        (parts / f"attempt_{number:05d}.failed").touch()
        return None
    path = parts / f"attempt_{number:05d}.hdf5"
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        demo = file.create_group("demo")
        _write_demo(demo, record)
        demo.attrs["attempt"] = number
    return path


def record_demonstration(env: LiberoEnv, generator: np.random.Generator,
                         disturb: bool = True, placement: str = "benchmark",
                         actor: Actor | None = None, frame_stride: int = 1) -> dict | None:
    """One episode of the expert, or of an actor that it labels, from a sampled layout.

    Returns:
        ``observations`` before each action, the expert's ``actions`` (T, 7), the
        ``executed_actions`` (T, 7), the ``states`` (T, S) before each action, and ``attributes``.
        ``None`` when the expert fails or the seed gives no layout; an actor's episode is kept.
    """
    try:
        observation = layouts.reset(env, int(generator.integers(2**31)), placement)
    except LayoutError as error:
        print(f"an attempt without a layout counts as a failure: {error}")
        return None
    expert = Expert(env, Style.sample(generator))
    disturbance = Disturbance(generator) if disturb else None
    mixture = actor and Mixture(env, actor.source.make(env), actor.beta, expert, generator)
    record = {"observations": [], "actions": [], schema.EXECUTED_ACTIONS: [], "states": [],
              "model_file": env.model_xml(), "attributes": {schema.FRAME_STRIDE_ATTR: frame_stride}}
    success = False
    while not success and len(record["actions"]) < env.horizon:  # a longer episode is a failure
        if mixture:
            action, executed = mixture.act(observation)
        else:
            action = expert.act()
            executed = disturbance.apply(action) if disturbance else action
        frames = schema.CAMERAS if len(record["actions"]) % frame_stride else ()  # not rendered
        record["observations"].append({
            key: record["observations"][-1][key] if key in frames else observation[key]
            for key in observation})
        record["actions"].append(action)
        record[schema.EXECUTED_ACTIONS].append(executed)
        record["states"].append(env.state())
        observation, success = env.step(executed)
    if mixture:
        record["attributes"] |= {"actor": actor.run, "actor_sha256": actor.sha256,
                                 "beta": actor.beta, "success": success}
    return record if success or mixture else None


# --- files --------------------------------------------------------------------------------------


def _write_demo(group: h5py.Group, record: dict) -> None:
    from robosuite.utils.transform_utils import axisangle2quat

    length = len(record["actions"])
    stacked = {key: np.stack([each[key] for each in record["observations"]])
               for key in (*schema.CAMERAS, *schema.LOW_DIM)}
    for key, values in stacked.items():
        group[f"obs/{key}"] = values
    for key in ("actions", schema.EXECUTED_ACTIONS, "states"):
        group[key] = np.stack(record[key])
    quaternions = np.stack([axisangle2quat(vector) for vector in stacked["ee_ori"]])  # x, y, z, w
    group["robot_states"] = np.concatenate(
        [stacked["gripper_states"], stacked["ee_pos"], quaternions], axis=1)
    last = (np.arange(length) == length - 1).astype(np.uint8)
    group["rewards"], group["dones"] = last * record["attributes"].get("success", True), last
    group.attrs.update({"num_samples": length, VERSION_ATTR: schema.COLLECTION_VERSION,
                        "init_state": record["states"][0], "model_file": record["model_file"],
                        **record["attributes"]})


def _assemble(path: Path, task, settings: dict, attempts: dict, chosen: list[int]) -> None:
    failed = [n for n in range(chosen[-1]) if attempts[n] is None]
    with h5py.File(path, "w") as file:
        data = file.create_group(schema.DATA_GROUP)
        for index, number in enumerate(chosen):
            with open_demo_file(attempts[number]) as source:
                demos = source.get(schema.DATA_GROUP, source).values()  # a part has no group
                demo = next(demo for demo in demos if demo.attrs["attempt"] == number)
                source.copy(demo, data, f"demo_{index}")
        kwargs = {"robots": ["Panda"], "controller": "OSC_POSE", "control_freq": schema.CONTROL_HZ,
                  "camera_names": [n.removesuffix("_image") for n in schema.CAMERAS.values()],
                  "camera_heights": schema.IMAGE_SIZE, "camera_widths": schema.IMAGE_SIZE,
                  "bddl_file_name": task.bddl_file}
        name = _problem_name(task.bddl_file)
        data.attrs.update({
            "num_demos": len(chosen),
            "total": sum(int(demo.attrs["num_samples"]) for demo in data.values()),
            "env_name": name,
            "env_args": json.dumps({"type": 1, "env_name": name, "problem_name": name,
                                    "bddl_file": task.bddl_file, "env_kwargs": kwargs}),
            "problem_info": json.dumps({"problem_name": name, "domain_name": "robosuite",
                                        "language_instruction": task.language}),
            "bddl_file_name": task.bddl_file,
            "bddl_file_content": Path(task.bddl_file).read_text(),
            "macros_image_convention": "opengl",
            schema.ALIGNMENT_ATTR: "raw",
            COLLECTION_ATTR: json.dumps({**settings, "failed_attempts": failed})})


def _problem_name(bddl_file: str) -> str:
    with quiet(), simulator_imports():
        from libero.libero.envs import bddl_utils

    return bddl_utils.get_problem_info(bddl_file)["problem_name"]
