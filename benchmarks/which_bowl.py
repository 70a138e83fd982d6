"""Experiment 3 of docs/recursion/preregistration.md: which of several equal bowls is meant.

    python benchmarks/which_bowl_scenes.py FOLDER
    python benchmarks/which_bowl.py FOLDER --seed 0
    python benchmarks/which_bowl.py FOLDER --seed 100 --split dev

trains all arms on the same batches and writes what they answer on the split's scenes to
``FOLDER/<seed>.json``, which belongs in ``docs/recursion/which-bowl``. An answer is the cell of a
16 x 16 grid with the highest score; it is right if the bowl nearest to the cell's centre is the one
that the instruction means. Arms:

- ``recursion``: one transformer layer applied six times, with the input added before each;
- ``two layers``: two untied layers, the rival;
- ``one step``: one layer, applied once;
- ``six layers``: six untied layers;
- ``one step, wide``: one layer with at least the multiply-adds of six steps.

All arms with several steps are trained with a random depth and a progressive loss (DT-nets,
arXiv 2202.05826): half of the updates at full depth, half with a gradient through a random number
of steps after a random number of steps without one.

Shape letters: B batch, I instructions, N = 256 cells, D hidden.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from trm_helpers.data.augment import augment_images
from trm_helpers.files import differences, read_json, write_json
from trm_helpers.policy.layers import Centre, RMSNorm, TransformerLayer
from trm_helpers.software import software_versions
from trm_helpers.stats import mcnemar_p, rate_text
from trm_helpers.training.devices import choose_precision

GRID, INSTRUCTIONS, STEPS, DIM, HEADS = 16, 21, 6, 64, 4
RECURSION, BATCH = "recursion", 32
PRECISION = choose_precision("auto", torch.device("cpu"))  # emulated, bf16 is several times slower


# --- networks ------------------------------------------------------------------------------------
class Arm(nn.Module):
    """Frames (B, 128, 128, 3) in [0, 1] and instructions (B,) to scores (B, N).

    Args:
        layers: number of different layers; one is applied in every step.
        steps: in training, and unless told otherwise.
    """

    def __init__(self, layers: int, steps: int, dim: int = DIM):
        super().__init__()
        self.steps = steps
        self.see = nn.Sequential(Centre(), nn.Conv2d(3, 32, 8, 4, 2), nn.SiLU(),
                                 nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU())
        self.project, self.norm = nn.Linear(64, dim), RMSNorm(dim)
        self.position = nn.Parameter(0.02 * torch.randn(GRID * GRID, dim))
        self.instruction = nn.Embedding(INSTRUCTIONS, dim)
        self.layers = nn.ModuleList([TransformerLayer(dim, HEADS) for _ in range(layers)])
        self.score = nn.Linear(dim, 1)

    def forward(self, frames: torch.Tensor, instructions: torch.Tensor, steps: int | None = None,
                warm: int = 0) -> torch.Tensor:
        """The first ``warm`` of the ``steps`` have no gradient."""
        x = rearrange(self.see(rearrange(frames, "b h w c -> b c h w")), "b c h w -> b (h w) c")
        x = self.norm(self.project(x)) + self.position + self.instruction(instructions)[:, None]
        state = torch.zeros_like(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not warm):
            for step in range(warm):
                state = self.layers[step % len(self.layers)](state + x)
        for step in range(warm, steps or self.steps):
            state = self.layers[step % len(self.layers)](state + x)
        return self.score(state).squeeze(-1).float()


def multiply_adds(dim: int) -> int:
    """Of one layer, for one cell."""
    return 4 * dim ** 2 + 3 * dim * (8 * dim // 3) + 2 * GRID ** 2 * dim


def wide() -> int:
    """Width of one layer with at least the multiply-adds of all steps."""
    dim = DIM
    while multiply_adds(dim) < STEPS * multiply_adds(DIM):
        dim += 2 * HEADS
    return dim


def arms() -> dict[str, Arm]:
    return {RECURSION: Arm(1, STEPS), "two layers": Arm(2, 2), "one step": Arm(1, 1),
            "six layers": Arm(STEPS, STEPS), "one step, wide": Arm(1, 1, wide())}


# --- scenes --------------------------------------------------------------------------------------
def load(folder: Path, split: str) -> tuple[torch.Tensor, ...]:
    """Frames (B, 128, 128, 3) uint8, bowls (B, 6, 2) or NaN, answers (B, I) or -1."""
    with np.load(folder / f"{split}.npz") as file:
        return tuple(torch.from_numpy(file[name]) for name in ("frames", "bowls", "answers"))


def choose(answers: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One instruction (B,) for each scene, of those with a clear answer; all relations alike.

    Instructions differ in how often they are clear; each has one over that share as its weight.
    """
    clear = (answers >= 0).float()
    return torch.multinomial(clear / clear.mean(0).clamp(min=1e-6), 1, generator=generator)[:, 0]


def cell_of(bowls: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """The cell (B,) in which the centre of the bowl that is meant lies."""
    place = bowls[torch.arange(len(bowls)), answer.long()]
    column, row = (GRID * place).long().clamp(0, GRID - 1).T
    return GRID * row + column


# --- training ------------------------------------------------------------------------------------
def amp() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=PRECISION == "bf16")


def depth(steps: int, generator: torch.Generator) -> tuple[int, int]:
    """Steps, and how many of them have no gradient."""
    if torch.rand((), generator=generator) < 0.5:
        return steps, 0
    warm = int(torch.randint(steps, (), generator=generator))
    return warm + 1 + int(torch.randint(steps - warm, (), generator=generator)), warm


def train(networks: dict[str, Arm], data: tuple, updates: int, lr: float,
          seed: int) -> dict[str, float]:
    """AdamW with one cycle of the learning rate. Returns the seconds of each arm."""
    frames, bowls, answers = data
    usable = (answers >= 0).any(1).nonzero()[:, 0]
    generator, depths = (torch.Generator().manual_seed(seed) for _ in range(2))
    optimizers = {name: torch.optim.AdamW(arm.parameters(), weight_decay=1e-2)
                  for name, arm in networks.items()}
    schedules = [torch.optim.lr_scheduler.OneCycleLR(each, lr, updates)
                 for each in optimizers.values()]
    seconds = dict.fromkeys(networks, 0.0)
    for _ in tqdm(range(updates), desc="training", mininterval=20):
        chosen = usable[torch.randint(len(usable), (BATCH,), generator=generator)]
        images = augment_images(frames[chosen].float() / 255, "colour", generator)
        told = choose(answers[chosen], generator)
        meant = cell_of(bowls[chosen], answers[chosen, told])
        for name, arm in networks.items():
            began = time.perf_counter()
            steps, warm = depth(arm.steps, depths)
            with amp():
                scores = arm(images, told, steps, warm)
            loss = F.cross_entropy(scores, meant)
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(arm.parameters(), 1.0)
            optimizers[name].step()
            seconds[name] += time.perf_counter() - began
        for schedule in schedules:
            schedule.step()
    return seconds


# --- evaluation ----------------------------------------------------------------------------------
@torch.inference_mode()
def right(arm: Arm, data: tuple, told: torch.Tensor, steps: int | None = None) -> torch.Tensor:
    """(B,): whether the answer lies nearest to the bowl that is meant."""
    frames, bowls, answers = data
    found = []
    for some in torch.arange(len(frames)).split(100):
        with amp():
            scores = arm(frames[some].float() / 255, told[some], steps)
        cell = scores.argmax(1)
        place = (torch.stack([cell % GRID, cell // GRID], 1) + 0.5) / GRID
        away = (bowls[some] - place[:, None]).norm(dim=-1).nan_to_num(torch.inf)
        found.append(away.argmin(1) == answers[some, told[some]])
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", choices=["dev", "test"])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-3)
    given = parser.parse_args()
    path = given.folder / f"{given.seed}.json"
    used = {"split": given.split, "updates": given.updates, "lr": given.lr}
    if path.exists():
        made = read_json(path)
        made["split"] = "dev" if "dev" in made["splits"] else "test"
        if other := differences({name: made[name] for name in used}, used):
            parser.error(f"{path} holds results with other settings ({other})")
    software = software_versions()  # of the code as it is now
    torch.manual_seed(given.seed)
    networks = arms()
    seconds = train(networks, load(given.folder, "train"), given.updates, given.lr, given.seed)
    splits = {}
    for split in ("dev",) if given.split == "dev" else ("test", "more"):
        data = load(given.folder, split)
        data = tuple(each[(data[2] >= 0).any(1)] for each in data)
        told = choose(data[2], torch.Generator().manual_seed(0))  # the same in every run
        found = {name: right(arm, data, told) for name, arm in networks.items()}
        found |= {f"{RECURSION}, {what}": right(networks[RECURSION], data, told, steps)
                  for steps, what in (*((n, f"stopped after {n}") for n in (1, 2, 4)),
                                      *((n, f"{n} steps") for n in (2 * STEPS, 3 * STEPS)))}
        for name, hits in found.items():
            better, worse = (int(n) for n in ((found[RECURSION] & ~hits).sum(),
                                              (~found[RECURSION] & hits).sum()))
            print(f"{split:5} {name:20} {rate_text(int(hits.sum()), len(hits), 1)}, {RECURSION} "
                  f"against it: {better} to {worse}, p {mcnemar_p(better, worse):.2g}", flush=True)
        splits[split] = {"tasks": told.tolist(), "arms": {
            name: {"right": "".join(map(str, hits.int().tolist()))}
            for name, hits in found.items()}}
    write_json(path, {
        "kind": "which-bowl", "software": software, "suite": "own scenes", "seed": given.seed,
        "updates": given.updates, "lr": given.lr, "precision": PRECISION, "splits": splits,
        "seconds": {name: round(value) for name, value in seconds.items()},
        "parameters": {name: sum(p.numel() for p in arm.parameters())
                       for name, arm in networks.items()}})


if __name__ == "__main__":
    main()
