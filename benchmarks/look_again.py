"""Experiment 1 of docs/recursion/preregistration.md: a localizer that looks again.

    python benchmarks/look_again_scenes.py libero_object FOLDER
    python benchmarks/look_again.py FOLDER --suite libero_object --seed 0
    python benchmarks/look_again.py FOLDER --suite libero_object --seed 100 --split dev

trains one frozen first look and all arms on the same batches, and writes what they hit in the
split's scenes to ``FOLDER/<suite>-<seed>.json``; those of the test are in
``docs/recursion/look-again``. ``--parts looks`` or ``--parts feed-forward`` trains a part, with the
same result as both together, and adds it to the file.

Shape letters: B batch, K keypoints, P = B * K.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from trm_helpers.data.augment import augment_images
from trm_helpers.files import differences, read_json, write_json
from trm_helpers.policy.keypoints import cross_entropy
from trm_helpers.policy.layers import Centre
from trm_helpers.policy.localizer import Localizer
from trm_helpers.software import software_versions
from trm_helpers.stats import rate_text
from trm_helpers.training.devices import choose_precision

PRECISION = choose_precision("auto", torch.device("cpu"))  # emulated, bf16 is several times slower
SIDE, CROP = 128, 24  # pixels
LOOKS, MOST_LOOKS = 6, 12  # in training, in evaluation
GAMMA = 0.8  # weight of a look's loss against the next one's
TASKS, KEYPOINTS = 10, 2  # object, target
WIDTHS = (24, 48, 64)  # channels of a look
FORWARD = "feed-forward, 128 px"
CLOSE, NEAR = 0.01, 0.05  # share of the side


# --- networks ------------------------------------------------------------------------------------
class FirstLook(nn.Module):
    """Frames (B, H, W, 3) in [0, 1] and tasks (B,) to maps (B, K, H / 2, W / 2)."""

    def __init__(self, widths: tuple[int, int]):
        super().__init__()
        fine, coarse = widths
        self.fine = nn.Sequential(Centre(), nn.Conv2d(3, fine, 5, 2, 2), nn.SiLU())
        self.coarse = nn.Sequential(
            nn.Conv2d(fine, coarse, 5, 2, 2), nn.SiLU(), nn.Conv2d(coarse, coarse, 3, 1, 1),
            nn.SiLU(), nn.Conv2d(coarse, coarse, 3, 1, 1), nn.SiLU())
        self.task = nn.Embedding(TASKS, 2 * coarse)
        nn.init.zeros_(self.task.weight)
        self.maps = nn.Sequential(nn.Conv2d(fine + coarse, fine, 3, 1, 1), nn.SiLU(),
                                  nn.Conv2d(fine, KEYPOINTS, 1))

    def forward(self, frames: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        fine = self.fine(frames.permute(0, 3, 1, 2))
        scale, shift = self.task(tasks)[..., None, None].chunk(2, dim=1)
        coarse = F.interpolate(self.coarse(fine) * (1 + scale) + shift, scale_factor=2)
        return self.maps(torch.cat([fine, coarse], dim=1)).float()


class Look(nn.Module):
    """Crops (P, 3, 24, 24) to a correction of the estimates, through a recurrent state (P, 128).

    Its other inputs are the task, the keypoint and the estimate's offset from the crop's centre.
    """

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        layers, channels = [Centre()], 3
        for width, kernel in zip(widths, (5, 3, 3), strict=True):
            layers += [nn.Conv2d(channels, width, kernel, 2, kernel // 2), nn.SiLU()]
            channels = width
        self.see = nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * channels, 128), nn.SiLU())
        self.name = nn.Embedding(TASKS * KEYPOINTS, 2 * 128)
        nn.init.zeros_(self.name.weight)
        self.update = nn.GRUCell(128 + 2, 128)
        self.move = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, crop: torch.Tensor, offset: torch.Tensor, name: torch.Tensor,
                state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, shift = self.name(name).chunk(2, dim=1)
        seen = self.see(crop) * (1 + scale) + shift
        state = self.update(torch.cat([seen, offset], dim=1), state)
        return CROP / 2 * torch.tanh(self.move(state).float()), state  # pixels


def crops(frames: torch.Tensor, estimates: torch.Tensor) -> torch.Tensor:
    """24 x 24 pixels (P, 3, 24, 24) of frames (B, S, S, 3) around estimates (P, 2) in pixels."""
    side = torch.arange(CROP, dtype=torch.float32) - (CROP - 1) / 2
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    points = estimates[:, None, None] + torch.stack([columns, rows], dim=-1)  # (P, 24, 24, 2)
    points = points.unflatten(0, (len(frames), KEYPOINTS)).flatten(1, 2)  # (B, K * 24, 24, 2)
    found = F.grid_sample(frames.permute(0, 3, 1, 2), 2 * points / SIDE - 1, align_corners=False,
                          padding_mode="border")
    return found.unflatten(2, (KEYPOINTS, CROP)).transpose(1, 2).flatten(0, 1)


class Looks(nn.Module):
    """The recursion: ``look``s one after the other, each at the last one's estimate.

    Args:
        looks: one module (tied), or one for each step (untied).
        same_crop: all steps see the crop around the initial estimate.
    """

    def __init__(self, looks: list[Look], trained: int, same_crop: bool = False):
        super().__init__()
        self.looks, self.trained, self.same_crop = nn.ModuleList(looks), trained, same_crop

    def forward(self, frames: torch.Tensor, tasks: torch.Tensor, estimates: torch.Tensor,
                steps: int) -> torch.Tensor:
        """Estimates (B, steps + 1, K, 2) in pixels, from initial ones (B, K, 2)."""
        names = (KEYPOINTS * tasks[:, None] + torch.arange(KEYPOINTS)).flatten()
        estimate = middle = estimates.flatten(0, 1)
        state, found = estimate.new_zeros(len(estimate), 128), [estimate]
        if self.same_crop:
            crop = crops(frames, middle)
        for step in range(steps):
            if not self.same_crop:
                middle = estimate.detach()
                crop = crops(frames, middle)
            look = self.looks[min(step, len(self.looks) - 1)]
            move, state = look(crop, (estimate.detach() - middle) / CROP, names, state)
            estimate = estimate.detach() + move
            found.append(estimate)
        return torch.stack(found, dim=1).unflatten(0, (-1, KEYPOINTS)).transpose(1, 2)


def wide() -> tuple[int, ...]:
    """Widths of one look with at least the multiply-adds of six."""
    scale = 1.0
    while multiply_adds_of_look(widths := tuple(round(scale * w) for w in WIDTHS)) \
            < LOOKS * multiply_adds_of_look(WIDTHS):
        scale += 0.01
    return widths


def multiply_adds_of_look(widths: tuple[int, ...]) -> int:
    a, b, c = widths
    return (144 * 25 * 3 * a + 36 * 9 * a * b + 9 * 9 * b * c + 9 * c * 128
            + 3 * 128 * (130 + 128) + 128 * 130)


def arms() -> dict[str, Looks]:
    return {
        "look again": Looks([Look(WIDTHS)], LOOKS),
        "one look": Looks([Look(WIDTHS)], 1),
        "one look, wide": Looks([Look(wide())], 1),
        "untied looks": Looks([Look(WIDTHS) for _ in range(LOOKS)], LOOKS),
        "same crop": Looks([Look(WIDTHS)], LOOKS, same_crop=True),
    }


# --- scenes --------------------------------------------------------------------------------------
def load(folder: Path, suite: str, split: str) -> tuple[torch.Tensor, ...]:
    """Frames (N, S, S, 3) uint8, places (N, K, 2) from 0 to 1 or NaN, tasks (N,)."""
    parts = [np.load(folder / f"{suite}-{task}-{split}.npz") for task in range(TASKS)]
    return tuple(torch.from_numpy(np.concatenate([part[name] for part in parts]))
                 for name in ("frames", "places", "tasks"))


def small(frames: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(frames.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


# --- training ------------------------------------------------------------------------------------
def train(losses: dict[str, Callable], modules: dict[str, nn.Module], data: tuple, steps: int,
          lr: float, seed: int, label: str, first: nn.Module | None = None) -> dict[str, float]:
    """AdamW with one cycle of the learning rate, all modules on the same batches of 64.

    A loss takes images, tasks, places and the ``first`` look's estimates. Returns the seconds of
    each module.
    """
    frames, places, tasks = data
    generator = torch.Generator().manual_seed(seed)
    optimizers = {name: torch.optim.AdamW(module.parameters(), weight_decay=1e-2)
                  for name, module in modules.items()}
    schedules = [torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
                 for optimizer in optimizers.values()]
    seconds = dict.fromkeys(modules, 0.0)
    for _ in tqdm(range(steps), desc=label, mininterval=20):
        chosen = torch.randint(len(frames), (64,), generator=generator)
        images = augment_images(frames[chosen].float() / 255, "colour", generator)
        estimates = None if first is None else initial(first, images, tasks[chosen])
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            loss = losses[name](images, tasks[chosen], places[chosen], estimates)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(modules[name].parameters(), 1.0)
            optimizer.step()
            seconds[name] += time.perf_counter() - began
        for schedule in schedules:
            schedule.step()
    return seconds


def amp() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=PRECISION == "bf16")


def loss_of_maps(network: nn.Module, reduce: Callable = lambda frames: frames) -> Callable:
    def loss(images, tasks, places, _):
        with amp():
            maps = network(reduce(images), tasks)
        return cross_entropy(maps, places)
    return loss


@torch.no_grad()
def initial(first: nn.Module, images: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
    """The first look's estimates (B, K, 2) in pixels."""
    with amp():
        return SIDE * Localizer.points(first(small(images), tasks))


def loss_of_looks(arm: Looks, generator: torch.Generator) -> Callable:
    """Weighted distance after each look, from a displaced initial estimate."""
    def loss(images, tasks, places, estimates):
        # a third stays, a third moves by about 2 pixels, a third by about 8
        size = torch.tensor([0.0, 2.0, 8.0])[torch.randint(3, (len(images), KEYPOINTS, 1),
                                                           generator=generator)]
        estimates = estimates + size * torch.randn(estimates.shape, generator=generator)
        steps = int(torch.randint(1, arm.trained + 1, (), generator=generator))
        with amp():
            found = arm(images, tasks, estimates, steps)[:, 1:]
        known = ~places.isnan().any(-1)
        error = (found - SIDE * places.nan_to_num(0.5)[:, None]).abs().sum(-1)  # (B, steps, K)
        weights = GAMMA ** torch.arange(steps - 1, -1, -1)
        return torch.einsum("bsk,s,bk->", error, weights, known.float()) / (
            weights.sum() * known.sum().clamp(min=1))
    return loss


# --- evaluation ----------------------------------------------------------------------------------
@torch.inference_mode()
def errors(predict: Callable, data: tuple) -> torch.Tensor:
    """Distances (N, ..., K) as a share of the side, NaN outside the frame."""
    frames, places, tasks = data
    found = []
    for some in torch.arange(len(frames)).split(100):
        with amp():
            found.append(predict(frames[some].float() / 255, tasks[some]))
    found = torch.cat(found)
    places = places.reshape(len(places), *[1] * (found.ndim - 3), KEYPOINTS, 2)
    return (found - places).norm(dim=-1)


def within(distances: torch.Tensor, limit: float) -> torch.Tensor:
    """(N, ...): all keypoints that are inside the frame are within the limit."""
    return ((distances < limit) | distances.isnan()).all(-1)


def report(found: dict[str, torch.Tensor], tasks: torch.Tensor) -> dict:
    rows = {}
    for name, distances in found.items():
        steps = distances if distances.ndim == 3 else distances[:, None]
        close, near = within(steps, CLOSE), within(steps, NEAR)
        rows[name] = {
            "close": "".join(map(str, close[:, -1].int().tolist())),
            "near": "".join(map(str, near[:, -1].int().tolist())),
            "close by looks": [round(share, 4) for share in close.float().mean(0).tolist()],
            "median": [round(v, 4) for v in steps[:, -1].nanquantile(0.5, dim=0).tolist()],
        }
    return {"tasks": "".join(map(str, tasks.tolist())), "arms": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the scenes")
    parser.add_argument("--suite", required=True, choices=["libero_object", "libero_spatial"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", choices=["dev", "test"])
    parser.add_argument("--parts", nargs="+", choices=["looks", "feed-forward"],
                        default=["looks", "feed-forward"])
    parser.add_argument("--first-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=2e-3)
    given = parser.parse_args()
    path = given.folder / f"{given.suite}-{given.seed}.json"
    before = read_json(path) if path.exists() else {}
    settings = {name: getattr(given, name) for name in ("first_steps", "steps", "lr")}
    made = {**before, "split": "dev" if "dev" in before.get("splits", ()) else "test"}
    used = {**settings, "split": given.split}
    if before and (other := differences({name: made[name] for name in used}, used)):
        parser.error(f"{path} holds results with other settings ({other})")
    software = software_versions()  # of the code as it is now
    torch.manual_seed(given.seed)
    data = load(given.folder, given.suite, "train")

    first, forward = FirstLook((24, 48)), FirstLook((16, 32))
    modules, losses = {}, {}
    if "looks" in given.parts:
        modules["first look"], losses["first look"] = first, loss_of_maps(first, small)
    if "feed-forward" in given.parts:
        modules[FORWARD], losses[FORWARD] = forward, loss_of_maps(forward)
    seconds = train(losses, modules, data, given.first_steps, 3e-3, given.seed, "first look")
    first.requires_grad_(False).eval()
    networks = arms() if "looks" in given.parts else {}
    losses = {name: loss_of_looks(arm, torch.Generator().manual_seed(given.seed))
              for name, arm in networks.items()}
    if networks:
        seconds |= train(losses, networks, data, given.steps, given.lr, given.seed, "looks", first)

    def looking(name: str, steps: int) -> Callable:
        def predict(images, tasks):
            return networks[name](images, tasks, initial(first, images, tasks), steps) / SIDE
        return predict

    splits = {}
    for split in ("dev",) if given.split == "dev" else ("test", "swap"):
        scenes = load(given.folder, given.suite, split)
        found = {}
        if "feed-forward" in given.parts:
            found[FORWARD] = errors(
                lambda images, tasks: Localizer.points(forward(images, tasks)), scenes)
        if networks:
            found["first look"] = errors(looking("look again", 0), scenes)
            found |= {name: errors(looking(name, arm.trained), scenes)
                      for name, arm in networks.items()}
            found["look again, stopped after one"] = errors(looking("look again", 1), scenes)
            found[f"look again, {MOST_LOOKS} looks"] = errors(
                looking("look again", MOST_LOOKS), scenes)
        splits[split] = report(found, scenes[2])
        for name, row in splits[split]["arms"].items():
            rate = rate_text(row["close"].count("1"), len(row["close"]), 1)
            print(f"{split:5} {name:30} within 1 %: {rate}, within 5 %: {row['near'].count('1')}  "
                  f"by looks {row['close by looks']} median {row['median']}", flush=True)
    if before:
        for split, content in splits.items():
            content["arms"] = before["splits"][split]["arms"] | content["arms"]
        seconds = before["seconds"] | seconds
        software = {**software, "dirty": software["dirty"] or before["software"]["dirty"]}
    write_json(path, {
        "kind": "look-again", "software": software, "suite": given.suite, "seed": given.seed,
        **settings, "precision": PRECISION, "splits": splits,
        "seconds": {name: round(value) for name, value in seconds.items()}})


if __name__ == "__main__":
    main()
