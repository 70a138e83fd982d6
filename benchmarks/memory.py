"""Experiment 2 (a) of docs/recursion/preregistration.md: a camera that blinks.

    python benchmarks/memory.py FOLDER --seed 0
    python benchmarks/memory.py FOLDER --seed 0 --condition first --arms carried reset
    python benchmarks/memory.py FOLDER --seed 100 --arms "last seen" --sampled --episodes 5

A policy decides every four steps. It sees the agent view at its first decision and then at every
fourth (``--condition fourth``) or never again (``first``), otherwise a black frame. Trains each arm
on 50 demonstrations per task in randomised layouts, collected first if they are missing, and plays
the official init states, or for development randomised layouts (``--sampled``). Keeps
``FOLDER/<condition>-<seed>/<arm>.safetensors`` and a ledger beside it; the same command resumes,
and, unless sampled, writes ``FOLDER/<condition>-<seed>.json`` when all are played.

The localizer of ``pretrained/spatial-wide`` stays as it is, so that images become positions once,
before training. Arms:

- ``carried``: a ``trm`` whose state is carried from decision to decision, trained by
  backpropagation through four decisions, with the state of the four before as a constant;
- ``carried, one step``: the same with one step per decision instead of four;
- ``gated``: as ``carried``, but a gate decides, channel by channel, how much of the state before
  the decision is kept; the answer is the recursion's;
- ``memory token``: ``reset`` with one more token in the input, which every step sees; what the
  latent holds at its place is written to it through a gate, and it is carried;
- ``memory token, one step``: the same with one step per decision;
- ``reset``: the same network, each decision from the initial state;
- ``gru``: a GRU with at most as many parameters in place of the recursion, carried;
- ``stacked``: ``reset`` with the last four decisions' observations;
- ``last seen``: ``reset`` with the positions last seen in place of those of a black frame.

Shape letters: B batch, T decisions, K keypoints, N tokens, D hidden.
"""

import argparse
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from trm_helpers import load_policy, schema
from trm_helpers.config import Config, from_flat
from trm_helpers.data.dataset import LIBERODataset
from trm_helpers.data.observations import read_batch
from trm_helpers.demos.collect import ensure_demonstrations
from trm_helpers.evaluation.rollout import run_episode
from trm_helpers.files import append_jsonl, differences, read_json, read_jsonl, write_json
from trm_helpers.paths import repo_root
from trm_helpers.policy.model import GRIPPER_WEIGHT, TRMPolicy
from trm_helpers.policy.recursion import Recursion
from trm_helpers.sim.env import LiberoEnv
from trm_helpers.software import software_versions
from trm_helpers.stats import paired_mcnemar, rate_text
from trm_helpers.training.devices import choose_precision

PRECISION = choose_precision("auto", torch.device("cpu"))  # emulated, bf16 is several times slower
SUITE, TASKS = "libero_spatial", (0, 1, 2)
SAMPLED_FROM = 100_000  # seed of the first sampled layout
CAMERA = schema.STILL_CAMERA
WINDOW = 4  # decisions with a common gradient; every WINDOW-th sees the frame
NOISE = 0.005  # of positions in training, as a share of the image's side
STEPS, BATCH, LR, WARM_UP = 4800, 16, 3e-4, 100
ARMS = ("carried", "reset", "gru", "stacked", "last seen", "carried, one step", "gated",
        "memory token", "memory token, one step")
ONE_STEP = ("gru", "carried, one step", "memory token, one step")
NOT_CARRIED = ("reset", "stacked", "last seen")
SEEN = {"fourth": lambda decision: decision % WINDOW == 0, "first": lambda decision: decision == 0}


def settings(arm: str, demos: int = 50) -> Config:
    return from_flat(
        "demo", suite=SUITE, task_ids=TASKS, num_demos=demos, placement="wide", frame_stride=1,
        augmentation="none", cameras=[CAMERA], conditioning="language", variant="trm",
        hidden_dim=128, latent_updates=1, cycles=1,
        num_recursions=1 if arm in ONE_STEP else 4, carry_over=arm not in NOT_CARRIED)


# --- policies ------------------------------------------------------------------------------------
class GRUBlock(nn.Module):
    """A GRU over decisions in place of the recursion, with at most ``limit`` parameters.

    The tokens (B, N, D) of the observation are concatenated; the state is (B, H).
    """

    def __init__(self, tokens: int, dim: int, chunk: int, limit: int):
        super().__init__()
        self.chunk = chunk
        self.join = nn.Sequential(nn.Linear(tokens * dim, dim), nn.SiLU())
        size = 0
        while self._parameters_of(tokens, dim, size + 8) <= limit:
            size += 8
        self.cell = nn.GRUCell(dim, size)
        self.out = nn.Linear(size, chunk * dim)

    def _parameters_of(self, tokens: int, dim: int, size: int) -> int:
        return (dim * (tokens * dim + 1) + 3 * size * (dim + size + 2)
                + self.chunk * dim * (size + 1))

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), self.cell.hidden_size)

    def forward(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.cell(self.join(x[:, :-self.chunk].flatten(1)), state)

    def readout(self, state: torch.Tensor) -> torch.Tensor:
        return self.out(state).unflatten(1, (self.chunk, -1))


class Gate(nn.Module):
    """Old and new (..., D) to a mixture of both; each channel's share is learned."""

    def __init__(self, dim: int):
        super().__init__()
        self.keep = nn.Linear(2 * dim, dim)

    def forward(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        share = torch.sigmoid(self.keep(torch.cat([old, new], dim=-1)).float())
        return torch.lerp(new.float(), old.float(), share)


class BlinkingPolicy(TRMPolicy):
    """A policy that reads positions (B, T, K, 2) and proprioception of its last T decisions.

    T is four for ``stacked``, otherwise one.
    """

    def __init__(self, arm: str, condition: str, data: LIBERODataset, localizer: nn.Module,
                 keypoints: tuple[str, ...]):
        config = settings(arm).replace(keypoints=keypoints,
                                       keypoint_tasks=len(localizer.known)).model
        super().__init__(config, data.normalizer, data.proprio_stats)
        self.arm, self.seen = arm, SEEN[condition]
        self.encoders[CAMERA].locator = localizer
        self.history = WINDOW if arm == "stacked" else 1
        if self.history > 1:
            self.age = nn.Parameter(0.02 * torch.randn(self.history, config.hidden_dim))
        if arm == "gru":
            limit = sum(weight.numel() for weight in self.block.parameters())
            self.block = GRUBlock(3, config.hidden_dim, config.chunk, limit)
        self.has_token = arm.startswith("memory token")
        if self.has_token or arm == "gated":
            self.gate = Gate(config.hidden_dim)
        if self.has_token:
            self.blank = nn.Parameter(0.02 * torch.randn(1, config.hidden_dim))  # nothing kept yet
            self.place = nn.Parameter(0.02 * torch.randn(1, config.hidden_dim))

    def recurse(self, x_cond: torch.Tensor, num_recursions: int | None = None,
                carry: torch.Tensor | None = None) -> Recursion:
        """The carry of ``memory token`` is the token (B, 1, D)."""
        if self.has_token:
            token = self.blank.expand(len(x_cond), 1, -1) if carry is None else carry
            x_cond = torch.cat([(token + self.place).to(x_cond.dtype), x_cond], dim=1)
            recursion = super().recurse(x_cond, num_recursions)
            return recursion._replace(carry=self.gate(token, recursion.carry[:, 1, :1]))
        recursion = super().recurse(x_cond, num_recursions, carry)
        if self.arm == "gated":
            old = self.block.initial_state(x_cond) if carry is None else carry
            return recursion._replace(carry=self.gate(old, recursion.carry))
        return recursion

    def reset(self) -> None:
        super().reset()
        self.decision = 0
        self.last_seen: torch.Tensor | None = None
        self.past: deque = deque(maxlen=WINDOW)

    def encode(self, observations: dict, style: None = None) -> torch.Tensor:
        points = read_batch(observations, "points", (len(self.config.keypoints), 2))
        proprio = read_batch(observations, "proprio", (schema.PROPRIO_DIM,))
        parts = torch.stack([self.encoders[CAMERA].project(4 * (2 * points - 1).flatten(1)),
                             self.proprio_mlp(proprio)], dim=1)  # (B * T, 2, D)
        parts = parts.unflatten(0, (-1, self.history))  # (B, T, 2, D)
        if self.history > 1:
            parts = parts + self.age[:, None]
        language = self.language_mlp(read_batch(observations, "language", (schema.LANGUAGE_DIM,)))
        queries = self.action_queries.to(parts.dtype).expand(len(parts), -1, -1)
        return torch.cat([parts.flatten(1, 2), language.unsqueeze(1).to(parts.dtype), queries],
                         dim=1)

    def prepare(self, observation) -> dict[str, torch.Tensor]:
        """In control: the positions that this decision has, with those it remembers."""
        batch = super().prepare(observation)
        sees = self.seen(self.decision)
        self.decision += 1
        images = batch.pop(CAMERA)
        points = self.encoders[CAMERA].locator.locate(
            images if sees else torch.zeros_like(images), self.task(batch))[:, -1]
        if self.arm == "last seen":
            points = self.last_seen = points if sees else self.last_seen
        now = (points, batch["proprio"])
        self.past.extend([now] * (1 if self.past else WINDOW))
        points, proprio = map(torch.cat, zip(*list(self.past)[-self.history:], strict=True))
        return {**batch, "points": points[None], "proprio": proprio[None]}


# --- training ------------------------------------------------------------------------------------
class Steps(NamedTuple):
    """Steps of demonstrations, one after the other, and where each demonstration begins and ends.
    """

    points: torch.Tensor  # (N, K, 2) of the frame
    black: torch.Tensor  # (N, K, 2) of a black frame
    proprio: torch.Tensor  # (N, P)
    language: torch.Tensor  # (N, 384)
    actions: torch.Tensor  # (N, chunk, 7), normalised
    mask: torch.Tensor  # (N, chunk)
    demos: list[tuple[int, int]]


@torch.inference_mode()
def located(data: LIBERODataset, localizer: nn.Module) -> Steps:
    columns = []
    for indices in torch.arange(len(data)).split(256):
        batch = data.batch(indices)
        seen = batch["observations"]
        images, language = seen[CAMERA][:, 0], seen["language"][:, 0]
        columns.append((localizer.locate(images, language)[:, -1],
                        localizer.locate(torch.zeros_like(images), language)[:, -1],
                        seen["proprio"][:, 0], language, batch["actions"][:, 0],
                        batch["mask"][:, 0]))
    samples = map(data.samples_of, range(len(data.demos)))
    return Steps(*(torch.cat(column).clone() for column in zip(*columns, strict=True)),
                 [(each.start, each.stop) for each in samples])


def windows(steps: Steps, batch_size: int, apart: int,
            generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Yield for ever the steps of WINDOW decisions, as indices (B, T).

    With them: which of the steps exist, and whether they are an episode's first. Decisions are
    ``apart`` steps from each other; an episode begins at any of the first steps.
    """
    starts = [(first + offset, end) for first, end in steps.demos for offset in range(apart)]
    while True:
        order = torch.randperm(len(starts), generator=generator).split(batch_size)
        for chosen in order:
            first, end = torch.tensor([starts[i] for i in chosen.tolist()]).T.unsqueeze(2)
            longest = int((end - first).max())
            for begin in range(0, math.ceil(longest / apart), WINDOW):
                index = first + apart * (begin + torch.arange(WINDOW))
                yield torch.minimum(index, end - 1), index < end, begin == 0


def observed(arm: str, condition: str, steps: Steps, index: torch.Tensor, is_first: bool,
             before: list[torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Observations of decisions (B, T); ``before`` holds the last window's, and is replaced."""
    size = (*index.shape, *steps.points.shape[1:])
    points = steps.points[index] + NOISE * torch.randn(size, generator=generator)
    sees = torch.tensor([SEEN[condition](place if is_first else WINDOW + place)
                         for place in range(WINDOW)])
    proprio = steps.proprio[index]
    if arm == "last seen":
        shown = []
        for place in range(WINDOW):
            last = shown[-1] if shown else None if is_first else before[0][:, -1]
            shown.append(points[:, place] if sees[place] else last)
        points = torch.stack(shown, dim=1)
    else:
        points = torch.where(sees[:, None, None], points, steps.black[index])
    seen = {"points": points, "proprio": proprio, "language": steps.language[index]}
    if arm == "stacked":
        past = [value[:, :1].expand_as(value) for value in (points, proprio)] if is_first \
            else before
        for name, old in zip(("points", "proprio"), past, strict=True):
            both = torch.cat([old, seen[name]], dim=1)
            seen[name] = torch.stack([both[:, place + 1:place + 1 + WINDOW]
                                      for place in range(WINDOW)], dim=1)  # (B, T, WINDOW, ...)
    before[:] = [points, proprio]
    return seen


def loss_of(policy: BlinkingPolicy, features: torch.Tensor, actions: torch.Tensor,
            mask: torch.Tensor) -> torch.Tensor:
    """As the preset's: L1 of the arm and cross-entropy of the gripper."""
    predicted, logits = policy.head(features)
    error = (predicted - actions)[..., :schema.ARM_DIM].abs().mean(-1)
    closed = (actions[..., schema.GRIPPER_INDEX] > 0).long()
    error = error + GRIPPER_WEIGHT * F.cross_entropy(logits.mT, closed, reduction="none")
    return (error * mask).sum() / mask.sum().clamp(min=1)


def train(policy: BlinkingPolicy, condition: str, steps: Steps, updates: int, seed: int) -> float:
    """AdamW with warm-up and cosine annealing; returns the seconds."""
    began, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=1e-4)
    schedules = torch.optim.lr_scheduler
    schedule = schedules.SequentialLR(optimizer, [
        schedules.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP),
        schedules.CosineAnnealingLR(optimizer, max(updates - WARM_UP, 1), 1e-6)], [WARM_UP])
    policy.train()
    stream, before, carry = windows(steps, BATCH, policy.execution_horizon, generator), [], None
    progress = tqdm(range(updates), desc=policy.arm, mininterval=20)
    for _ in progress:
        index, exists, is_first = next(stream)
        seen = observed(policy.arm, condition, steps, index, is_first, before, generator)
        mask = steps.mask[index] * exists.unsqueeze(-1)
        carry = None if is_first or carry is None else carry.detach()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=PRECISION == "bf16"):
            features = []
            if policy.config.carry_over:
                for place in range(WINDOW):
                    x = policy.encode({name: value[:, place] for name, value in seen.items()})
                    recursion = policy.recurse(x, carry=carry)
                    carry = recursion.carry
                    features.append(recursion.output)
                features = torch.stack(features, dim=1).flatten(0, 1)
            else:
                folded = {name: value.flatten(0, 1) for name, value in seen.items()}
                features = policy.recurse(policy.encode(folded)).output
            loss = loss_of(policy, features, steps.actions[index].flatten(0, 1),
                           mask.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return time.perf_counter() - began


# --- evaluation ----------------------------------------------------------------------------------
def play(policies: dict[str, BlinkingPolicy], folder: Path, episodes: int,
         sampled: bool = False) -> dict[str, list[dict]]:
    """Every arm in the same episodes; each row is kept the moment its episode ends."""
    key, first = ("seed", SAMPLED_FROM) if sampled else ("init_state", 0)
    wanted = range(first, first + episodes)
    ledgers = {arm: folder / f"{arm}.jsonl" for arm in policies}
    rows = {arm: [row for row in read_jsonl(ledger) if row[key] in wanted]
            for arm, ledger in ledgers.items()}
    for task_id in TASKS:
        with LiberoEnv(SUITE, task_id) as env:
            for arm, policy in policies.items():
                done = {(row["task_id"], row[key]) for row in rows[arm]}
                for number in wanted:
                    if (task_id, number) not in done:
                        row = (run_episode(policy, env, None, seed=number, placement="wide")
                               if sampled else run_episode(policy, env, number))
                        if "policy_error" in row:  # a fault of this script, not a failure
                            raise RuntimeError(f"{arm}: {row['policy_error']}")
                        append_jsonl(ledgers[arm], row)
                        rows[arm].append(row)
                solved = sum(row["success"] for row in rows[arm] if row["task_id"] == task_id)
                print(f"task {task_id}, {arm}: {solved} of {episodes}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--condition", default="fourth", choices=SEEN)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--demos", type=int, default=50, help="per task")
    parser.add_argument("--updates", type=int, default=STEPS)
    parser.add_argument("--episodes", type=int, default=20, help="per task")
    parser.add_argument("--sampled", action="store_true", help="randomised layouts, no result file")
    given = parser.parse_args()
    if not 1 <= given.episodes <= schema.NUM_INIT_STATES:
        parser.error(f"--episodes {given.episodes}; expected 1 to {schema.NUM_INIT_STATES}")
    torch.set_num_threads(1)
    software = software_versions()  # of the code as it is now
    shipped = load_policy(repo_root() / "pretrained" / "spatial-wide")
    localizer = shipped.encoders[CAMERA].locator.requires_grad_(False).eval()
    config = settings("reset", given.demos)
    files = ensure_demonstrations(config)
    data = LIBERODataset(list(files.values()), config=config)  # nothing is chosen by validation
    steps = located(data, localizer)
    folder = given.folder / f"{given.condition}-{given.seed}{'-sampled' * given.sampled}"
    folder.mkdir(parents=True, exist_ok=True)
    policies, seconds = {}, {}
    used = {"updates": str(given.updates), "demos": str(given.demos)}
    for arm in given.arms:
        torch.manual_seed(given.seed)
        policy = BlinkingPolicy(arm, given.condition, data, localizer, shipped.config.keypoints)
        weights = folder / f"{arm}.safetensors"
        if not weights.exists():
            (folder / f"{arm}.jsonl").unlink(missing_ok=True)  # episodes of other weights
            took = train(policy, given.condition, steps, given.updates, given.seed)
            save_file(policy.state_dict(), weights, metadata={"seconds": f"{took:.0f}", **used})
        policy.load_state_dict(load_file(weights))
        policies[arm] = policy.eval()
        with safe_open(weights, "pt") as file:
            made = file.metadata()
        seconds[arm] = int(made["seconds"])
        stored = {name: made.get(name, value) for name, value in used.items()}
        if other := differences(stored, used):
            parser.error(f"{weights} was trained with other settings ({other})")
    rows = play(policies, folder, given.episodes, given.sampled)
    for arm, played in rows.items():
        successes = sum(row["success"] for row in played)
        print(f"{arm:18} {rate_text(successes, len(played))}")
        if arm != "reset" and "reset" in rows:
            test = paired_mcnemar(rows["reset"], played)
            print(f"{'':18} against reset {100 * test['difference']:+.0f} points, "
                  f"p = {test['p_value']:.2g}")
    if given.sampled:
        return
    path = given.folder / f"{given.condition}-{given.seed}.json"
    settings_used = {"condition": given.condition, "seed": given.seed, "updates": given.updates,
                     "demos": given.demos, "precision": PRECISION, "episodes": given.episodes}
    before = read_json(path) if path.exists() else {**settings_used, "software": software}
    if other := differences({name: before[name] for name in settings_used}, settings_used):
        parser.error(f"{path} holds arms with other settings ({other})")
    write_json(path, {
        "kind": "memory", **settings_used,
        "software": {**software, "dirty": software["dirty"] or before["software"]["dirty"]},
        "seconds": before.get("seconds", {}) | seconds,
        "parameters": before.get("parameters", {}) | {
            arm: sum(w.numel() for w in policy.parameters() if w.requires_grad)
            for arm, policy in policies.items()},
        "arms": before.get("arms", {}) | {
            arm: [{key: row[key] for key in ("task_id", "init_state", "success", "steps")}
                  for row in played] for arm, played in rows.items()}})


if __name__ == "__main__":
    main()
