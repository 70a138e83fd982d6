"""Data-parallel training: ``torchrun`` starts the processes, and each takes its share of a batch.

    torchrun --nproc_per_node 2 -m trm_helpers train trm --run-name two-gpus
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(hours=6)  # the others wait while the main process collects demonstrations
_RENDEZVOUS_TIMEOUT = timedelta(minutes=2)
_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Team:
    """The processes started by ``torchrun``, one GPU each; otherwise this process alone.

    Gradients are averaged here rather than by ``DistributedDataParallel``: a process's mean counts
    by its number of valid actions, and ``torch.compile`` wraps the loss, not the forward pass.

    Args:
        device: type of the device to compute on, ``cuda`` or ``cpu``.
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
            self._join()

    def _join(self) -> None:
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=_RENDEZVOUS_TIMEOUT))
        except dist.DistError as error:
            raise RuntimeError(
                f"WORLD_SIZE={self.size}, but the other processes did not connect to "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within "
                f"{_RENDEZVOUS_TIMEOUT.seconds} s; unset WORLD_SIZE to train in one process"
            ) from error
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)

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
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return shared.item()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the processes."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value

    def loss_weight(self, count: torch.Tensor) -> torch.Tensor | float:
        """Factor of this process's mean, so that averaging over processes gives the batch's mean.

        ``count`` is the number of valid actions in this process's share.
        """
        return 1.0 if self.size == 1 else count * self.size / self.sum(count).clamp(min=1)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        if self.size > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.size
