"""Several processes that train one policy: ``torchrun`` starts them, each takes a share of a batch.

    torchrun --nproc_per_node 2 -m trm_helpers train trm --run-name two-gpus
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

_PATIENCE = timedelta(hours=6)  # the others wait while the first collects demonstrations


class Team:
    """The processes of a ``torchrun``, each with a GPU of its own; without one, this process alone.

    Args:
        device: ``cuda`` or ``cpu``: what the processes compute on.
    """

    def __init__(self, device: str):
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device(device)
        if self.size > 1 and device == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and talks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, value: float) -> float:
        """The leader's value."""
        if self.size == 1:
            return value
        said = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(said, src=0)
        return said.item()

    def any(self, flag: bool) -> bool:
        """Whether it is so for at least one."""
        if self.size == 1:
            return flag
        said = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said.item())

    def share_of(self, weight: torch.Tensor) -> torch.Tensor | float:
        """What this process's mean counts in the mean over all, times their number."""
        if self.size == 1:
            return 1.0
        total = weight.detach().clone()
        dist.all_reduce(total)
        return weight * self.size / total.clamp(min=1)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.size
