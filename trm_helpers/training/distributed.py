"""Data-parallel training: ``torchrun`` starts the processes, and each takes its share of a batch.

    torchrun --nproc_per_node 2 -m trm_helpers train trm --run-name two-gpus
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(hours=6)  # the others wait while the main process collects demonstrations


def own_device(device: str) -> torch.device:
    """This process's own GPU for ``cuda`` under ``torchrun``, made the current one."""
    if device != "cuda" or not dist.is_torchelastic_launched():
        return torch.device(device)
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise ValueError(f"LOCAL_RANK={local} has no GPU of its own; this machine has "
                         f"{count}: give torchrun at most --nproc_per_node {count}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


class Team:
    """The processes started by ``torchrun``, one GPU each; otherwise this process alone.

    Gradients are averaged here rather than by ``DistributedDataParallel``: a process's mean counts
    by its number of valid actions, and training calls the policy's loss, not its forward pass.
    """

    def __init__(self, device: str):
        self.size, self.rank, self.device = 1, 0, torch.device(device)
        if not dist.is_torchelastic_launched():
            if (size := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
                print(f"WORLD_SIZE={size} is ignored: torchrun did not start this process")
            return
        self.device = own_device(device)
        if not dist.is_initialized():
            if os.environ.get("RANK") == "0":  # without the others it waits long
                print(f"waiting for all {os.environ.get('WORLD_SIZE')} processes of torchrun",
                      flush=True)
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_TIMEOUT)
        self.size, self.rank = dist.get_world_size(), dist.get_rank()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: float) -> float:
        """The main process's value."""
        if self.size == 1:
            return value
        own = torch.tensor(value if self.is_main else 0.0, dtype=torch.float64, device=self.device)
        return self.sum(own).item()

    def any(self, value: bool) -> bool:
        """Whether it is true in one of the processes."""
        return value if self.size == 1 else bool(
            self.sum(torch.tensor(int(value), device=self.device)))

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the processes."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value

    def loss_weight(self, count: torch.Tensor) -> torch.Tensor:
        """Weight of this process's mean over ``count`` actions in the mean over the batch."""
        return count * self.size / self.sum(count).clamp(min=1)

    def average_gradients(self, module: torch.nn.Module) -> None:
        """In one sum, also of weights that have a gradient in some of the processes only.

        Where all samples of a process halt at their first step, its halting head has none.
        """
        if self.size == 1:
            return
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        found = [weight.grad is not None for weight in weights]
        sums = self.sum(torch.cat([
            torch.tensor(found, dtype=torch.float32, device=self.device),
            *((weight.grad if has else torch.zeros_like(weight)).flatten()
              for weight, has in zip(weights, found, strict=True))]))
        anywhere, *averages = (sums / self.size).split(
            [len(weights), *(weight.numel() for weight in weights)])
        if not all(found):
            found = (anywhere > 0).tolist()
        for weight, has, average in zip(weights, found, averages, strict=True):
            if has:
                weight.grad = average.view_as(weight)
