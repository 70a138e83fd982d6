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
_MEET_WITHIN = timedelta(minutes=2)  # torchrun starts all of them at once
_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Team:
    """The processes of a ``torchrun``, each with a GPU of its own; without one, this process alone.

    Args:
        device: ``cuda`` or ``cpu``: what the processes compute on.
    """

    def __init__(self, device: str):
        self.size, self.rank = 1, 0
        self.device = torch.device(device)
        size = os.environ.get("WORLD_SIZE", "1")
        missing = [name for name in _SET_BY_TORCHRUN if not os.environ.get(name)
                   or name != "MASTER_ADDR" and not os.environ[name].isdecimal()]
        if size in ("", "1") or missing:
            if size not in ("", "1"):
                print(f"WORLD_SIZE={size} without a valid {', '.join(missing)}: not started by "
                      "torchrun; training in this process alone")
            return
        self.size, self.rank = int(size), int(os.environ["RANK"])
        if device == "cuda":
            local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= count:
                raise ValueError(f"LOCAL_RANK={local} has no GPU of its own; this machine has "
                                 f"{count}: give torchrun at most --nproc_per_node {count}")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            self._meet()

    def _meet(self) -> None:
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=_MEET_WITHIN))
        except dist.DistError as error:
            raise RuntimeError(
                f"WORLD_SIZE={self.size}, but the other processes did not come to "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within "
                f"{_MEET_WITHIN.seconds} s; unset WORLD_SIZE to train in one process") from error
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size,
                                timeout=_PATIENCE)

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

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Of all."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.size
