"""Where things are in the agent view, learned from scenes drawn around demonstrations.

A demonstration shows one placement of its objects in a hundred pictures; to find them in a picture
takes thousands of placements. One more costs no physics: the robot as in some step of a
demonstration, the objects elsewhere, one picture, and where in it they are.
"""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tqdm.auto import tqdm

from .. import paths, schema
from ..config import Config
from ..data.augment import augment_images, resize_images
from ..data.language import embed_instruction
from ..demos.demo_files import DemoFileError, open_demo_file
from ..files import only_one, read_json, replacing, write_bytes, write_json
from ..sim.env import LiberoEnv, load_task
from ..sim.layouts import place_widely
from ..sim.parallel import run_jobs
from .layers import Locator
from .model import read_weights, task_dim

HAND = "hand"  # the point between the fingers, a thing like the others
_MOVED = 0.01  # metres from where it began: what the robot has moved stays where it is
_AS_SHOWN = 0.5  # of the scenes have the goal's things as in the demonstration: under the hand
STEPS = 1500  # of teaching
_BATCH, _LR = 64, 3e-3


# --- scenes --------------------------------------------------------------------------------------
def draw_scenes(suite: str, task_id: int, demos: Mapping[str, Sequence[str]], per_demo: int, *,
                workers: int | None = None) -> list[Path]:
    """Pictures of a task's objects in wide placements, around each demonstration.

    Each file, ``data/scenes/<suite>/<task>/<checksum of the demonstration>-<per_demo>.npz``, holds
    ``frames`` (n, H, W, 3) uint8, upside down as in demonstrations, ``places`` (n, things, 2),
    column and row of each thing from 0 to 1 across the frame, also where something hides it and
    NaN outside of it, and the ``things`` by the part that they have in the goal (``object``,
    ``target``, of a second one ``object 2`` ...), and the hand. What is there is not drawn again;
    what another version of this code drew is named.

    Args:
        demos: names of demonstrations in each file.
        per_demo: n, scenes around each of them.
        workers: see :func:`fanout.run_jobs`.
    """
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
    with only_one(folder):  # a second call waits, and finds them drawn
        missing = {path: job for path, job in jobs.items() if not path.exists()}
        old = [path.name for path in set(jobs) - set(missing) if _version(path) !=
               schema.COLLECTION_VERSION]
        if old:
            print(f"{folder}: {', '.join(sorted(old))} drawn by another version of the code than "
                  f"{schema.COLLECTION_VERSION}; remove them to draw them again")
        if missing:
            bar = tqdm(total=len(missing) * per_demo, desc=f"scenes of {suite} {task_id}",
                       unit="scene")
            draw = functools.partial(_draw, suite, task_id, per_demo)
            with bar:
                for _, _, error in run_jobs(draw, list(missing.items()), workers=workers,
                                            limit=max(900.0, 10.0 * per_demo)):
                    if error:
                        raise error
                    bar.update(per_demo)
    return list(jobs)


def _version(path: Path) -> int:
    with np.load(path) as scenes:
        return int(scenes["version"]) if "version" in scenes else 0


@functools.cache
def _worker_env(suite: str, task_id: int) -> LiberoEnv:
    env = LiberoEnv(suite, task_id)
    env.reset()
    return env


def _draw(suite: str, task_id: int, count: int, job: tuple[Path, tuple[str, str, int]]) -> None:
    path, (file, name, seed) = job
    env, generator = _worker_env(suite, task_id), np.random.default_rng(seed)
    objects, goal = sorted(env.raw.obj_body_id), env.goal_things()

    def positions(things: Sequence[str]) -> np.ndarray:
        return np.array([env.object_position(thing) for thing in things])

    frames, places = [], []
    with open_demo_file(file) as content:
        demo = content[schema.DATA_GROUP][name]
        env.set_fixtures(demo.attrs["model_file"])
        states = demo["states"][()]
        env.set_state(states[0])
        first = positions(objects)
        for step in generator.integers(len(states), size=count):
            env.set_state(states[step])
            moved = np.linalg.norm(positions(objects) - first, axis=1) > _MOVED
            staying = set(np.array(objects)[moved])
            if generator.random() < _AS_SHOWN:
                staying.update(goal.values())
            place_widely(env, generator, staying)
            frames.append(env.set_state(env.state())[schema.STILL_CAMERA])
            places.append(_places(env, np.array([*positions(goal.values()),
                                                 env.end_effector()])))
    with replacing(path) as temporary, open(temporary, "wb") as out:
        np.savez_compressed(out, frames=np.array(frames), places=np.array(places),
                            things=np.array([*goal, HAND]), version=schema.COLLECTION_VERSION)


def _places(env: LiberoEnv, positions: np.ndarray) -> np.ndarray:
    """(n, 2) in the stored frame, from 0 to 1, of positions (n, 3) in metres."""
    place = (env.project(positions, schema.STILL_CAMERA) + 0.5) / env.image_size
    place[:, 1] = 1 - place[:, 1]  # frames are stored upside down
    place[((place < 0) | (place > 1)).any(axis=1)] = np.nan
    return place


def read_scenes(files: Sequence[Path], things: Sequence[str],
                image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (N, S, S, 3) uint8 and places (N, things, 2) float32, NaN for what is not there."""
    frames, places = [], []
    for path in files:
        with np.load(path) as scenes:
            frames.append(resize_images(torch.from_numpy(scenes["frames"]), image_size))
            there, where = list(scenes["things"]), scenes["places"].astype(np.float32)
            nowhere = np.full_like(where[:, 0], np.nan)
            places.append(torch.from_numpy(np.stack(
                [where[:, there.index(thing)] if thing in there else nowhere for thing in things],
                axis=1)))
    return torch.cat(frames), torch.cat(places)


def things_in(scenes: Mapping[int, Sequence[Path]]) -> list[str]:
    """All that is in the picture of some of the scenes, of each task so many files."""
    found = set()
    for path in itertools.chain(*scenes.values()):
        with np.load(path) as file:
            seen = ~np.isnan(file["places"]).all(axis=(0, 2))
            found.update(map(str, file["things"][seen]))
    return sorted(found)


# --- teaching ------------------------------------------------------------------------------------
def teach(locator: Locator, frames: torch.Tensor, places: torch.Tensor,
          tasks: torch.Tensor | None = None, *, seed: int = 0, steps: int = STEPS,
          device: torch.device | str = "cpu", precision: str = "fp32") -> None:
    """Train a locator in place: cross-entropy of its maps against where things are.

    A place between the centres of four cells counts for all four, so that the mean of the softmax
    is right to a fraction of a cell. AdamW, one cycle of the learning rate, brightness and colours
    changed at random: a plate with another rim is a plate.

    Args:
        frames: (N, S, S, 3) uint8.
        places: (N, K, 2) from 0 to 1, NaN where a thing is not in the picture.
        tasks: (N, ``task_dim``), what a locator that is told the task is told of each.
        precision: ``bf16`` or another, which means fp32.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(locator.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, steps)
    autocast = torch.autocast(torch.device(device).type, dtype=torch.bfloat16,
                              enabled=precision == "bf16")
    for _ in tqdm(range(steps), desc="learning where things are", unit="step"):
        chosen = torch.randint(len(frames), (_BATCH,), generator=generator)
        images = augment_images(_floats(frames[chosen], device), "colour", generator)
        with autocast:
            maps = locator(images, None if tasks is None else tasks[chosen].to(device))
        optimizer.zero_grad()
        cross_entropy(maps, places[chosen].to(device)).backward()
        optimizer.step()
        schedule.step()


def cross_entropy(maps: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of maps (B, K, h, w) against places (B, K, 2), each shared by the four cells around it."""
    height, width = maps.shape[-2:]
    known = ~places.isnan().any(-1)
    size = places.new_tensor([width, height])
    cell = (places.nan_to_num(0.5) * size - 0.5).clamp(torch.zeros_like(size), size - 1)
    first = torch.minimum(cell.floor(), size - 2)
    share = cell - first
    logs, total = maps.flatten(2).log_softmax(-1), 0.0
    for right in (0, 1):
        for below in (0, 1):
            weight = ((share[..., 0] if right else 1 - share[..., 0])
                      * (share[..., 1] if below else 1 - share[..., 1]))
            index = ((first[..., 1] + below) * width + first[..., 0] + right).long()
            total = total - weight * logs.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return (total * known).sum() / known.sum().clamp(min=1)


@torch.inference_mode()
def errors(locator: Locator, frames: torch.Tensor, places: torch.Tensor,
           tasks: torch.Tensor | None = None,
           device: torch.device | str = "cpu") -> torch.Tensor:
    """Distances (N, K) from where things are, as a share of the picture's side; NaN: not there."""
    said = []
    for some in torch.arange(len(frames)).split(256):
        told = None if tasks is None else tasks[some].to(device)
        said.append(locator.points(locator(_floats(frames[some], device), told)).cpu())
    return (torch.cat(said) - places).norm(dim=-1)


@torch.inference_mode()
def found_places(policy, observations: Mapping) -> np.ndarray:
    """(B, K, 2): where a policy with keypoints takes each to be, from 0 to 1 across the frame."""
    locator = policy.encoders[schema.STILL_CAMERA].locator
    images = observations[schema.STILL_CAMERA]
    images = images.reshape(-1, *images.shape[-3:]).to(next(locator.parameters()))
    return locator.points(locator(images, policy.task(observations))).cpu().numpy()


def _floats(frames: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return frames.to(device).float() / 255


def trained_localizer(run: str | Path, config: Config, trained_on: Mapping, measured_on: Mapping, *,
                      device: torch.device | str = "cpu",
                      precision: str = "fp32") -> tuple[tuple[str, ...], Locator]:
    """The things that a run's policy is to find, and a locator of them.

    It is taught once for a run and kept in ``locator.safetensors``; ``scenes.json`` says how well
    it finds each thing in scenes around the demonstrations of the other split.

    Args:
        config: of the run; ``config.data.scenes`` are drawn around each demonstration.
        trained_on, measured_on: :meth:`LIBERODataset.describe` of the two splits.
    """
    path, known = Path(run) / "locator.safetensors", Path(run) / "scenes.json"
    with only_one(run, lock=".locator.lock"):  # of several processes one teaches
        if not path.exists():
            known_scenes, new = (_scenes_of(split, config) for split in (trained_on, measured_on))
            things = things_in(known_scenes)
            seed = config.train.seed
            with torch.random.fork_rng():  # what follows is the same, taught now or before
                torch.manual_seed(seed)
                locator = _locator(things, config).to(device)
            scenes = _with_tasks(known_scenes, things, config)
            teach(locator, *scenes, seed=seed, device=device, precision=precision)
            measured = _with_tasks(new, things, config)
            distance = errors(locator, *measured, device).nanquantile(
                torch.tensor([0.5, 0.9]), dim=0).T
            write_json(known, {
                "scenes": len(scenes[0]), "measured_on": len(measured[0]),
                "things": things, "median and 90 % error, share of the picture's side": {
                    thing: [None if math.isnan(value) else round(value, 4) for value in row]
                    for thing, row in zip(things, distance.tolist(), strict=True)}})
            write_bytes(path, save({name: weight.cpu().contiguous()
                                    for name, weight in locator.state_dict().items()}))
    things = tuple(read_json(known, keys=["things"])["things"])
    locator = _locator(things, config)
    locator.load_state_dict(read_weights(path)[0])
    return things, locator


def _locator(things: Sequence[str], config: Config) -> Locator:
    """One that knows the run's tasks, if the policy is told its task."""
    if config.model.conditioning == "none":
        return Locator(len(things))
    told = [_told(task_id, config) for task_id in config.data.task_ids]
    locator = Locator(len(things), len(told), task_dim(config.model))
    locator.known.copy_(torch.stack(told))
    return locator


def _told(task_id: int, config: Config) -> torch.Tensor | None:
    """What a policy is told of a task, (task_dim,)."""
    if config.model.conditioning == "language":
        return torch.from_numpy(embed_instruction(load_task(config.data.suite, task_id).language))
    if config.model.conditioning == "task_id":
        return F.one_hot(torch.tensor(task_id), config.model.num_tasks).float()
    return None


def _scenes_of(split: Mapping, config: Config) -> dict[int, list[Path]]:
    """The files of each task."""
    return {task_id: draw_scenes(config.data.suite, task_id, {file["file"]: file["demos"]},
                                 config.data.scenes)
            for task_id, file in zip(config.data.task_ids, split["files"], strict=True)}


def _with_tasks(scenes: Mapping[int, Sequence[Path]], things: Sequence[str], config: Config):
    """Frames, places, and of each what a policy is told of its task (None: nothing)."""
    read, tasks = [], []
    for task_id, files in scenes.items():
        read.append(read_scenes(files, things, config.model.image_size))
        told = _told(task_id, config)
        if told is not None:
            tasks.append(told.expand(len(read[-1][0]), -1))
    frames, places = map(torch.cat, zip(*read, strict=True))
    return frames, places, torch.cat(tasks) if tasks else None
