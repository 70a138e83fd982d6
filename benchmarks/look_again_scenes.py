"""Scenes for benchmarks/look_again.py: frames and image positions, without demonstrations.

    python benchmarks/look_again_scenes.py libero_object FOLDER
    python benchmarks/look_again_scenes.py libero_spatial FOLDER

The scripted expert plays episodes in randomised layouts, without rendering; around them scenes are
sampled as :func:`trm_helpers.policy.keypoints.sample_scenes` does for a run's localizer. Of each
task, ``train.npz`` has 400 scenes of 10 episodes, ``dev.npz`` 26 of 2 others, on which choices are
made, and ``test.npz`` 100 of 5 others, which are opened once. ``swap.npz`` has the first
observation of 10 official init states of LIBERO-PRO's exchanged objects.
"""

import argparse
from pathlib import Path

import numpy as np

from trm_helpers import schema
from trm_helpers.demos.experts import Expert
from trm_helpers.demos.skills import Style
from trm_helpers.files import atomic_path
from trm_helpers.policy.keypoints import image_positions, sample_scenes
from trm_helpers.sim import layouts
from trm_helpers.sim.env import LiberoEnv

# split: seed of the first reset, resets, episodes per reset, scenes per episode
SPLITS = {"train": (100, 2, 5, 40), "dev": (200, 1, 2, 13), "test": (300, 1, 5, 20)}
SWAP_INIT_STATES = 10


def play(env: LiberoEnv, generator: np.random.Generator) -> np.ndarray:
    """States (T, S) of an episode of the expert; nothing is rendered."""
    expert, states = Expert(env, Style.sample(generator)), [env.state()]
    for _ in range(env.horizon):
        _, success = env.step(expert.act())
        states.append(env.state())
        if success:
            break
    return np.array(states)


def scenes_of(env: LiberoEnv, first_seed: int, resets: int, episodes: int,
              per_episode: int) -> tuple[np.ndarray, np.ndarray]:
    frames, places = [], []
    for seed in range(first_seed, first_seed + resets):
        layouts.reset(env, seed, "wide")
        begin, generator = env.state(), np.random.default_rng([env.task.task_id, seed])
        for _ in range(episodes):
            env.set_state(begin)
            layouts.randomise_layout(env, generator)
            env.set_state(env.state())
            for _ in range(env.settle_steps):
                env.step(env.settle_action)
            some = sample_scenes(env, play(env, generator), per_episode, generator)
            frames.append(some[0])
            places.append(some[1])
    return np.concatenate(frames), np.concatenate(places)


def swap_scenes(suite: str, task_id: int) -> tuple[np.ndarray, np.ndarray]:
    frames, places = [], []
    with LiberoEnv(f"{suite}_swap", task_id) as env:
        for init_state in range(SWAP_INIT_STATES):
            frames.append(env.reset(init_state=init_state)[schema.STILL_CAMERA])
            points = [env.object_position(name) for name in env.goal_parts().values()]
            places.append(image_positions(env, np.array([*points, env.end_effector()])))
    return np.array(frames), np.array(places)


def write(path: Path, frames: np.ndarray, places: np.ndarray, task_id: int) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        np.savez_compressed(out, frames=frames, places=places[:, :2].astype(np.float32),
                            tasks=np.full(len(frames), task_id))
    print(path, len(frames), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=["libero_object", "libero_spatial"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    suite = given.suite
    for task_id in range(schema.SUITES[suite]):
        paths = {split: given.folder / f"{suite}-{task_id}-{split}.npz"
                 for split in [*SPLITS, "swap"]}
        if not all(paths[split].exists() for split in SPLITS):
            with LiberoEnv(suite, task_id) as env:
                for split, sizes in SPLITS.items():
                    write(paths[split], *scenes_of(env, *sizes), task_id)
        if not paths["swap"].exists():
            write(paths["swap"], *swap_scenes(suite, task_id), task_id)


if __name__ == "__main__":
    main()
