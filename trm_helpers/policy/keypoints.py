"""Keypoints: image positions of the goal's objects, learned from scenes rendered for the purpose.

The hundred or so frames of a demonstration show a single layout; a localizer needs thousands. A
further layout needs no physics: take the robot's pose from a step of the demonstration, randomise
the objects, render one frame and project the objects into it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tqdm.auto import tqdm

from .. import paths, schema
from ..config import Config, convert
from ..data.augment import augment_images, resize_images
from ..data.language import embed_instruction
from ..demos.demo_files import DemoFileError, open_demo_file
from ..files import atomic_path, exclusive_lock, read_json, write_bytes, write_json
from ..sim.env import LayoutError, LiberoEnv, load_task, renewed_after_errors, worker_env
from ..sim.layouts import randomise_layout
from ..sim.parallel import run_jobs
from ..software import minutes_left
from .localizer import MOST_ALIKE, Localizer
from .model import read_weights

HAND = "hand"  # keypoint between the fingers
_MOVED = 0.01  # metres; an object further from its start was moved by the robot and stays in place
_GOAL_UNMOVED = 0.5  # share of scenes that keep the goal's objects where the demonstration has them
_STEPS, _BATCH, _LR = 1500, 64, 3e-3  # of training
_LOOK_STEPS, _LOOK_LR = 2500, 2e-3  # of training the further looks
_LOOK_DISCOUNT = 0.8  # weight of a look's error against the next one's
_DISPLACED = (0.0, 2.0, 8.0)  # pixels, standard deviations of the starts in training


# --- scenes --------------------------------------------------------------------------------------
def render_scenes(suite: str, task_id: int, demos: Mapping[str, Sequence[str]],
                  per_demo: int) -> list[Path]:
    """Render a task's objects in randomised layouts around each demonstration.

    Each file, ``data/scenes/<suite>/<task>/<checksum of the demonstration>-<per_demo>.npz``, holds
    ``frames`` (n, H, W, 3) uint8, upside down as in demonstrations; ``places`` (n, K, 2), column
    and row of each keypoint from 0 to 1, also where it is occluded, NaN outside the frame; and
    ``keypoints``, their names by their part in the goal (``object``, ``target``, ``object 2``
    ...) and the hand. Existing files are kept; files of another code version are reported.

    Args:
        demos: names of demonstrations in each file.
        per_demo: n, scenes per demonstration.

    Raises ``TimeoutError`` when the session's time is up; the same call continues.
    """
    suite, task_id = schema.own_suite(suite, task_id)
    folder = paths.data_dir() / "scenes" / suite / load_task(suite, task_id).name
    jobs = {}
    for file, names in demos.items():
        with open_demo_file(Path(file)) as content:
            for name in names:
                demo = content[schema.DATA_GROUP][name]
                if "states" not in demo or "model_file" not in demo.attrs:
                    raise DemoFileError(f"{file}, {name}: scenes need the data set states and the "
                                        "attribute model_file")
                seed = zlib.crc32(demo["states"][()].tobytes())
                jobs[folder / f"{seed:08x}-{per_demo}.npz"] = (file, name, seed)

    def absent() -> dict:
        return {path: job for path, job in jobs.items() if not path.exists()}

    # a concurrent call waits and then finds the files; a folder with all of them may be read-only
    with exclusive_lock(folder) if absent() else contextlib.nullcontext():
        missing = absent()
        old = []
        for path in sorted(set(jobs) - set(missing)):
            with _opened(path) as scenes:
                if scenes.get("version", 0) != schema.COLLECTION_VERSION:
                    old.append(path.name)
        if old:
            print(f"{folder}: {', '.join(old)} rendered by another version of the code "
                  f"than {schema.COLLECTION_VERSION}; remove them to render them again")
        if missing:
            render = functools.partial(_render, suite, task_id, per_demo)
            outcomes = run_jobs(render, list(missing.items()), limit=max(900.0, 10.0 * per_demo),
                                wanted=lambda _: minutes_left() > 0)
            with contextlib.closing(outcomes), \
                    tqdm(total=len(missing) * per_demo, desc=f"scenes of {suite} {task_id}",
                         unit="scene") as bar:
                for _, _, error in outcomes:
                    if error:
                        raise error
                    bar.update(per_demo)
            if left := sum(not path.exists() for path in missing):
                raise TimeoutError(f"the session's time is up; scenes of {left} of {len(jobs)} "
                                   f"demonstrations are missing in {folder}, and the same call "
                                   "continues")
    return list(jobs)


def _render(suite: str, task_id: int, count: int, job: tuple[Path, tuple[str, str, int]]) -> None:
    path, (file, name, seed) = job
    with renewed_after_errors():
        env = worker_env(suite, task_id)
        env.reset()  # before an environment's first, LIBERO's site markers are in the frames
        with open_demo_file(file) as content:
            demo = content[schema.DATA_GROUP][name]
            env.set_fixtures(demo.attrs["model_file"])
            states = demo["states"][()]
        frames, places = sample_scenes(env, states, count, np.random.default_rng(seed))
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        np.savez_compressed(out, frames=frames, places=places, version=schema.COLLECTION_VERSION,
                            keypoints=np.array([*env.goal_parts(), HAND]))


def sample_scenes(env: LiberoEnv, states: np.ndarray, count: int,
                  generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Frames (count, H, W, 3) uint8 and image positions (count, K, 2) of an episode's scenes.

    The robot is as in one of the ``states`` (T, S), the objects are elsewhere; the keypoints are
    the goal's parts in their order, then the hand. Raises ``LayoutError`` if more than ``count``
    steps leave no room for the objects.
    """
    objects, goal = sorted(env.raw.obj_body_id), env.goal_parts()

    def positions(names: Sequence[str]) -> np.ndarray:
        return np.array([env.object_position(name) for name in names])

    frames, places = [], []
    env.set_state(states[0])
    first = positions(objects)
    steps = generator.integers(len(states), size=count).tolist()
    for step in steps:
        env.set_state(states[step])
        moved = np.linalg.norm(positions(objects) - first, axis=1) > _MOVED
        staying = set(np.array(objects)[moved])
        if generator.random() < _GOAL_UNMOVED:
            staying.update(goal.values())
        try:
            randomise_layout(env, generator, staying)
        except LayoutError:  # another step leaves more room
            if len(steps) == 2 * count:
                raise
            steps.append(int(generator.integers(len(states))))
            continue
        frames.append(env.set_state(env.state())[schema.STILL_CAMERA])
        places.append(image_positions(env, np.array([*positions(goal.values()),
                                                     env.end_effector()])))
    return np.array(frames), np.array(places)


def image_positions(env: LiberoEnv, positions: np.ndarray) -> np.ndarray:
    """(n, 2) from 0 to 1 across the stored frame, of positions (n, 3) in metres."""
    place = (env.project(positions, schema.STILL_CAMERA) + 0.5) / env.image_size
    place[:, 1] = 1 - place[:, 1]  # frames are stored upside down
    place[((place < 0) | (place > 1)).any(axis=1)] = np.nan
    return place


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """A file of :func:`render_scenes`; ``ValueError`` with its name if it is damaged."""
    try:
        with np.load(path) as file:
            yield file
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and its scenes are rendered "
                         "again") from error


def load_scenes(scenes: Mapping[int, Sequence[Path]], names: Sequence[str], image_size: int,
                tasks: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Frames (N, S, S, 3) uint8, image positions (N, K, 2) float32 and task vectors of all scenes.

    Args:
        scenes: files of each task.
        names: of the K keypoints; NaN is the position of one that a file lacks.
        tasks: a vector of each task; None gives None.
    """
    frames, places, asked = [], [], []
    for number, path in ((number, path) for number, files in enumerate(scenes.values())
                         for path in files):
        with _opened(path) as file:
            frames.append(resize_images(torch.from_numpy(file["frames"]), image_size))
            stored, where = list(file["keypoints"]), file["places"].astype(np.float32)
        where = np.pad(where, ((0, 0), (0, 1), (0, 0)), constant_values=np.nan)
        index = [stored.index(name) if name in stored else -1 for name in names]
        places.append(torch.from_numpy(where[:, index]))
        if tasks is not None:
            asked.append(tasks[[number] * len(where)])
    return torch.cat(frames), torch.cat(places), torch.cat(asked) if asked else None


def visible_keypoints(scenes: Mapping[int, Sequence[Path]]) -> list[str]:
    """Names of the keypoints inside at least one frame, given the files of each task."""
    found = set()
    for path in itertools.chain(*scenes.values()):
        with _opened(path) as file:
            visible = ~np.isnan(file["places"]).all(axis=(0, 2))
            found.update(map(str, file["keypoints"][visible]))
    return sorted(found)


# --- training and error --------------------------------------------------------------------------
def train_localizer(localizer: Localizer, frames: torch.Tensor, places: torch.Tensor,
                    tasks: torch.Tensor | None = None, *, seed: int = 0, steps: int = _STEPS,
                    look_steps: int = _LOOK_STEPS, device: torch.device | str = "cpu",
                    precision: str = "fp32") -> None:
    """Train in place: the first look by :func:`cross_entropy`, then any further looks alone.

    A batch of further looks begins at displaced first estimates and takes a random number of them.
    The loss is the distance after each look, weighted by ``0.8 ** looks still to come``.

    Args:
        frames: (N, S, S, 3) uint8.
        places: (N, K, 2) from 0 to 1, NaN where a keypoint is outside the frame.
        tasks: (N, ``task_dim``), for a localizer conditioned on the task.
        precision: ``bf16``; any other value means fp32.

    Raises ``TimeoutError`` when the session's time is up; it cannot be resumed.
    """
    def first_look(images, task, known, generator) -> torch.Tensor:
        return cross_entropy(localizer(images, task), known)

    def further_looks(images, task, known, generator) -> torch.Tensor:
        looks = int(torch.randint(1, localizer.looks + 1, (), generator=generator))
        size = torch.tensor(_DISPLACED)[torch.randint(len(_DISPLACED), (*known.shape[:2], 1),
                                                      generator=generator)]
        moved = size * torch.randn(known.shape, generator=generator) / images.shape[1]
        with torch.no_grad():
            first = localizer.points(localizer(images, task))
        found = localizer.look_again(images, task, first + moved.to(device), looks)
        error = images.shape[1] * (found - known.nan_to_num(0.5).unsqueeze(1)).abs().sum(-1)
        weights = _LOOK_DISCOUNT ** torch.arange(looks - 1, -1, -1, device=device)
        inside = (~known.isnan().any(-1)).unsqueeze(1) * weights[:, None]  # (B, looks, K)
        return (error * inside).sum() / inside.sum().clamp(min=1)

    def train(part: torch.nn.Module, loss: Callable, count: int, lr: float, max_norm: float,
              title: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(part.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, count)
        for _ in tqdm(range(count), desc=title, unit="step"):
            if minutes_left() <= 0:
                raise TimeoutError("the session's time is up before the localizer is trained; the "
                                   "same call renders no scene again and trains from the start")
            chosen = torch.randint(len(frames), (_BATCH,), generator=generator)
            # so that an object is found whatever its colour
            images = augment_images(frames[chosen].to(device).float() / 255, "colour", generator)
            task = None if tasks is None else tasks[chosen].to(device)
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16,
                                enabled=precision == "bf16"):
                value = loss(images, task, places[chosen].to(device), generator)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(part.parameters(), max_norm)
            optimizer.step()
            schedule.step()

    train(localizer, first_look, steps, _LR, math.inf, "training the localizer")
    if localizer.looks:
        train(localizer.look, further_looks, look_steps, _LOOK_LR, 1.0,
              "training its further looks")


def cross_entropy(maps: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of maps (B, K, h, w) against image positions (B, K, 2), NaN excluded.

    The target is shared bilinearly by the four cells around a position, so that the mean of the
    softmax is accurate to a fraction of a cell.
    """
    known = ~places.isnan().any(-1)
    logs = maps.flatten(2).log_softmax(-1).view(-1, 1, *maps.shape[2:])  # (B * K, 1, h, w)
    where = 2 * places.nan_to_num(0.5).reshape(-1, 1, 1, 2) - 1
    between = F.grid_sample(logs, where, align_corners=False, padding_mode="border")
    return -(between.view(known.shape) * known).sum() / known.sum().clamp(min=1)


@torch.inference_mode()
def localization_errors(localizer: Localizer, frames: torch.Tensor, places: torch.Tensor,
                        tasks: torch.Tensor | None = None,
                        device: torch.device | str = "cpu") -> torch.Tensor:
    """Distances (N, K) as a share of the frame's side; NaN where a keypoint is outside of it."""
    predicted = []
    for some in torch.arange(len(frames)).split(256):
        task = None if tasks is None else tasks[some].to(device)
        predicted.append(
            localizer.locate(frames[some].to(device).float() / 255, task)[:, -1].cpu())
    return (torch.cat(predicted) - places).norm(dim=-1)


@torch.inference_mode()
def predicted_keypoints(policy, observations: Mapping) -> np.ndarray:
    """Image positions (B, 1 + looks, K, 2) from 0 to 1, of which a policy acts on the last.

    Frames are float in [0, 1], or uint8.
    """
    localizer = policy.encoders[schema.STILL_CAMERA].locator
    images = observations[schema.STILL_CAMERA]
    if images.dtype == torch.uint8:
        images = images / 255
    images = images.reshape(-1, *images.shape[-3:]).to(next(localizer.parameters()))
    task = policy.task(observations)
    task = None if task is None else task.to(images.device)
    return localizer.locate(images, task).cpu().numpy()


# --- a run's localizer ---------------------------------------------------------------------------
def trained_localizer(run: str | Path, config: Config, trained_on: Mapping, measured_on: Mapping, *,
                      device: torch.device | str = "cpu",
                      precision: str = "fp32") -> tuple[tuple[str, ...], Localizer]:
    """Names of a run's keypoints and their localizer, trained on the first call.

    The run folder keeps the weights in ``locator.safetensors`` and, in ``scenes.json``, the error
    per keypoint in scenes around the demonstrations of the other split.

    Args:
        config: of the run; ``config.data.scenes`` are rendered around each demonstration.
        trained_on, measured_on: :meth:`LIBERODataset.describe` of the two splits.

    Raises ``ValueError`` if it could not tell two instructions apart, or if the run's localizer has
    another number of looks than ``config.model.looks`` or saw scenes of other demonstrations;
    ``DemoFileError`` if they cannot be rendered; ``TimeoutError`` when the session's time is up.
    """
    path, splits = Path(run) / "locator.safetensors", (trained_on, measured_on)
    demos = [[file.get("actions") for file in split["files"]] for split in splits]  # digests
    tasks, seed = _task_vectors(config), config.train.seed
    with exclusive_lock(run, lock=".locator.lock"):  # one of several processes trains
        if not path.exists():
            _refuse_alike(config, tasks)
            scenes, other_scenes = (
                {task_id: render_scenes(config.data.suite, task_id, {file["file"]: file["demos"]},
                                        config.data.scenes)
                 for task_id, file in zip(config.data.task_ids, split["files"], strict=True)}
                for split in splits)
            names = visible_keypoints(scenes)
            # the policy's initial weights do not depend on this; no GPU's numbers are used
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                known = torch.zeros(0, 0) if tasks is None else tasks
                localizer = Localizer(len(names), *known.shape, looks=config.model.looks)
                localizer.known.copy_(known)
            localizer.to(device)
            data = load_scenes(scenes, names, config.model.image_size, tasks)
            train_localizer(localizer, *data, seed=seed, device=device, precision=precision)
            held_out = load_scenes(other_scenes, names, config.model.image_size, tasks)
            distance = localization_errors(localizer, *held_out, device).nanquantile(
                torch.tensor([0.5, 0.9]), dim=0).T
            save_localizer(run, localizer, names, {
                "demonstrations": demos, "scenes": len(data[0]), "measured_on": len(held_out[0]),
                "errors": {  # median and 90 %, as shares of the image's side
                    name: [None if math.isnan(value) else round(value, 4) for value in row]
                    for name, row in zip(names, distance.tolist(), strict=True)}})
    names, localizer = load_localizer(run)
    if localizer.looks != config.model.looks:
        raise ValueError(f"{path} looks again {localizer.looks} times; expected "
                         f"looks={config.model.looks}. Remove the file to train another localizer")
    if read_json(Path(run) / "scenes.json").get("demonstrations", demos) != demos:
        raise ValueError(f"{path} was trained on scenes of other demonstrations; remove the file "
                         "to train another localizer, or give it the same demonstrations")
    return names, localizer


def _refuse_alike(config: Config, tasks: torch.Tensor | None) -> None:
    """Raise ``ValueError`` for two instructions that :meth:`Localizer.which` would mix.

    Tasks with the same instruction are one task to it.
    """
    of_task = [] if tasks is None else zip(config.data.task_ids, tasks, strict=True)
    for (one, first), (other, second) in itertools.combinations(of_task, 2):
        alike = F.cosine_similarity(first, second, dim=0)
        if alike > MOST_ALIKE and not torch.equal(first, second):
            raise ValueError(
                f"the localizer cannot tell the instructions of task_ids={[one, other]} of "
                f"{config.data.suite} apart (cosine similarity {alike:.4f}; expected at most "
                f"{MOST_ALIKE}); train them in two runs, or with conditioning='task_id'")


def save_localizer(folder: str | Path, localizer: Localizer, names: Sequence[str],
                   measured: Mapping) -> None:
    """Write ``scenes.json``, which holds ``measured``, and then ``locator.safetensors``."""
    write_json(Path(folder) / "scenes.json", {"keypoints": list(names), "looks": localizer.looks,
                                              **measured})
    write_bytes(Path(folder) / "locator.safetensors", save({
        name: weight.cpu().contiguous() for name, weight in localizer.state_dict().items()}))


def load_localizer(folder: str | Path) -> tuple[tuple[str, ...], Localizer]:
    """Names of the keypoints of a folder's localizer, and the localizer itself.

    ``pretrained/spatial-looks`` knows object and target of the ten tasks of LIBERO-Spatial. Raises
    ``FileNotFoundError`` without its two files, ``ValueError`` if they are damaged.
    """
    found = read_json(Path(folder) / "scenes.json", keys=["keypoints"])
    weights, _ = read_weights(Path(folder) / "locator.safetensors")
    try:
        names = convert("keypoints", found["keypoints"], tuple[str, ...])
        looks = convert("looks", found.get("looks", 0), int)
        localizer = Localizer(len(names), *weights["known"].shape, max(looks, 0))
        localizer.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} does not hold a localizer: {error}") from error
    return names, localizer


def _task_vectors(config: Config) -> torch.Tensor | None:
    """(T, task_dim), as :meth:`TRMPolicy.task` gives them; None without conditioning."""
    if config.model.conditioning == "language":
        tasks = [load_task(config.data.suite, task_id) for task_id in config.data.task_ids]
        return torch.tensor(np.stack([embed_instruction(task.language) for task in tasks]))
    if config.model.conditioning == "task_id":
        return F.one_hot(torch.tensor(config.data.task_ids), config.model.num_tasks).float()
    return None
