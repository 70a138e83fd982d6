"""Scenes for benchmarks/which_bowl.py: equal bowls of which an instruction means one.

    python benchmarks/which_bowl_scenes.py FOLDER

A table of LIBERO with a plate, a ramekin, a box of cookies and up to six equal bowls, all placed at
random and not touching; nothing is simulated but their coming to rest. Writes ``train.npz``
(6,000 scenes), ``dev.npz`` (500) and ``test.npz`` (2,000) with two to four bowls, and ``more.npz``
(1,000) with five and six. Each has

- ``frames`` (N, 128, 128, 3) uint8, the agent view, upright;
- ``bowls`` (N, 6, 2) float32, centres from 0 to 1 across and down the frame, NaN for no bowl;
- ``answers`` (N, 21) int8: the bowl that each of ``INSTRUCTIONS`` means, -1 where it means none or
  several, or nearly so.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from trm_helpers import schema
from trm_helpers.files import atomic_path
from trm_helpers.opengl import configure_gl, simulator_imports
from trm_helpers.sim.env import quiet

SIDE, MOST_BOWLS = 128, 6
CAMERA = "agentview"
ANCHORS = {"plate": "plate_1", "ramekin": "glazed_rim_porcelain_ramekin_1", "cookies": "cookies_1"}
BOWLS = [f"akita_black_bowl_{n + 1}" for n in range(MOST_BOWLS)]
# towards the right of the frame and towards its lower edge, in metres on the table (x, y)
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "in front of": (1, 0), "behind": (-1, 0)}
INSTRUCTIONS = [(relation, (name,)) for relation in (*DIRECTIONS, "nearest to", "farthest from")
                for name in ANCHORS]
INSTRUCTIONS += [("between", pair) for pair in itertools.combinations(ANCHORS, 2)]
SPLITS = {"train": (6000, (2, 4), 0), "dev": (500, (2, 4), 1), "test": (2000, (2, 4), 2),
          "more": (1000, (5, 6), 3)}  # scenes, bowls, seed
LOW, HIGH = np.array([-0.25, -0.3]), np.array([0.2, 0.3])  # of the centres, metres
RADII = {"plate": 0.09, "ramekin": 0.05, "cookies": 0.07, "bowl": 0.065}  # metres, with a margin
UNDER_THE_FLOOR = -2.0  # metres


# --- what an instruction means -------------------------------------------------------------------
def answer(relation: str, anchors: list[np.ndarray], bowls: np.ndarray) -> int:
    """The one bowl (n, 2) that a relation to anchors (2,) means, in metres; -1 if it is unclear."""
    ways = bowls - anchors[0]
    distances = np.linalg.norm(ways, axis=1)
    if relation in ("nearest to", "farthest from"):
        order = np.argsort(distances if relation == "nearest to" else -distances)
        first, second = distances[order[:2]]
        return int(order[0]) if abs(first - second) > 0.03 else -1
    if relation in DIRECTIONS:
        angles = np.degrees(np.arccos(np.clip(ways @ DIRECTIONS[relation] / distances, -1, 1)))
        inside, unclear = angles < 35, (angles >= 35) & (angles < 55)
    else:
        way = anchors[1] - anchors[0]
        length = np.linalg.norm(way)
        along = ways @ way / length ** 2
        aside = np.abs(ways[:, 0] * way[1] - ways[:, 1] * way[0]) / length
        inside = (np.abs(along - 0.5) < 0.3) & (aside < 0.05)
        unclear = (np.abs(along - 0.5) < 0.4) & (aside < 0.08) & ~inside
    return int(inside.argmax()) if inside.sum() == 1 and not unclear.any() else -1


def sample_places(bowls: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places on the table (3, 2) of the anchors and (bowls, 2), none touching another."""
    radii = [RADII[name] for name in ANCHORS] + bowls * [RADII["bowl"]]
    while True:
        places: list[np.ndarray] = []
        for radius in radii:
            for _ in range(50):
                place = generator.uniform(LOW, HIGH)
                if all(np.linalg.norm(place - other) > radius + size
                       for other, size in zip(places, radii, strict=False)):
                    places.append(place)
                    break
            else:
                break
        if len(places) == len(radii):
            return np.array(places[:len(ANCHORS)]), np.array(places[len(ANCHORS):])


# --- the table in the simulator ------------------------------------------------------------------
def bddl() -> str:
    """The table with everything on a grid, in LIBERO's language."""
    names = [*ANCHORS.values(), *BOWLS]
    spots = itertools.product((-0.22, -0.02, 0.18), (-0.25, 0.0, 0.25))
    regions = "".join(
        f"(spot_{name} (:target main_table) (:ranges (({x} {y} {x + 0.01} {y + 0.01}))))"
        for name, (x, y) in zip(names, spots, strict=True))
    kinds = "".join(f"{name} - {name.rsplit('_', 1)[0]} " for name in ANCHORS.values())
    kinds += f"{' '.join(BOWLS)} - akita_black_bowl"
    on = "".join(f"(On {name} main_table_spot_{name})" for name in names)
    return (f"(define (problem LIBERO_Tabletop_Manipulation) (:domain robosuite) (:language which)"
            f"(:regions {regions}) (:fixtures main_table - table) (:objects {kinds})"
            f"(:obj_of_interest {BOWLS[0]} plate_1) (:init {on})"
            f"(:goal (And (On {BOWLS[0]} plate_1))))")


class Table:
    """The simulator, in which everything has come to rest on the grid."""

    def __init__(self):
        configure_gl()
        with quiet(), simulator_imports(), tempfile.TemporaryDirectory() as folder:
            from libero.libero.envs import OffScreenRenderEnv
            from robosuite.utils import camera_utils

            path = Path(folder) / "which_bowl.bddl"
            path.write_text(bddl())
            self.env = OffScreenRenderEnv(bddl_file_name=str(path), camera_heights=SIDE,
                                          camera_widths=SIDE)
            self.env.seed(0)
            self.env.reset()
        for _ in range(schema.SETTLE_STEPS):
            self.env.step(list(schema.NO_OP))
        self.sim = self.env.env.sim
        self.joints = {name: self.env.env.get_object(name).joints[-1]
                       for name in (*ANCHORS.values(), *BOWLS)}
        self.rest = {name: self.sim.data.get_joint_qpos(joint).copy()
                     for name, joint in self.joints.items()}
        self.offset = np.asarray(self.env.env.workspace_offset)[:2]
        self.transform = camera_utils.get_camera_transform_matrix(
            self.sim, CAMERA, SIDE, SIDE)

    def show(self, anchors: np.ndarray, bowls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frame (128, 128, 3) and centres (6, 2) in it of a scene with these places (n, 2)."""
        places = dict(zip(ANCHORS.values(), anchors, strict=True))
        places |= dict(zip(BOWLS, bowls, strict=False))
        for name, joint in self.joints.items():
            pose = self.rest[name].copy()
            if name in places:
                pose[:2] = places[name] + self.offset
            else:
                pose[2] = UNDER_THE_FLOOR
            self.sim.data.set_joint_qpos(joint, pose)
        self.sim.forward()
        frame = self.sim.render(camera_name=CAMERA, height=SIDE, width=SIDE)[::-1]
        centres = np.full((MOST_BOWLS, 2), np.nan, np.float32)
        for n, name in enumerate(BOWLS[:len(bowls)]):
            body = self.env.env.obj_body_id[name]
            x, y, depth, _ = self.transform @ np.append(self.sim.data.body_xpos[body], 1)
            centres[n] = (np.array([x, y]) / depth + 0.5) / SIDE
        return frame, centres


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    table = Table()
    for split, (scenes, (fewest, most), seed) in SPLITS.items():
        if (folder / f"{split}.npz").exists():
            continue
        generator = np.random.default_rng(seed)
        frames = np.empty((scenes, SIDE, SIDE, 3), np.uint8)
        centres = np.empty((scenes, MOST_BOWLS, 2), np.float32)
        answers = np.empty((scenes, len(INSTRUCTIONS)), np.int8)
        for n in tqdm(range(scenes), desc=split, mininterval=20):
            anchors, bowls = sample_places(int(generator.integers(fewest, most + 1)), generator)
            frames[n], centres[n] = table.show(anchors, bowls)
            where = dict(zip(ANCHORS, anchors, strict=True))
            answers[n] = [answer(relation, [where[name] for name in names], bowls)
                          for relation, names in INSTRUCTIONS]
        with atomic_path(folder / f"{split}.npz") as temporary, open(temporary, "wb") as out:
            np.savez_compressed(out, frames=frames, bowls=centres, answers=answers)
    table.env.close()


if __name__ == "__main__":
    main()
