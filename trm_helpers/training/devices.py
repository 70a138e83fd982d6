"""Device, precision and random state of a training process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from ..software import OTHER_GPU, gpu_fault


def choose_device(device: str = "auto") -> torch.device:
    """``auto``: a CUDA GPU if PyTorch can use one. ``ValueError`` for ``cuda`` if it cannot."""
    if device == "cpu":
        return torch.device("cpu")
    fault = gpu_fault()
    if device == "cuda" and (fault or not torch.cuda.is_available()):
        raise ValueError("device='cuda' is not valid here; "
                         + (fault or "PyTorch finds no CUDA GPU"))
    if fault:
        say_cpu(fault)
    return torch.device("cuda" if torch.cuda.is_available() and not fault else "cpu")


@functools.cache  # once in a process
def say_cpu(fault: str) -> None:
    print(f"{fault}: the CPU is used. {OTHER_GPU}")


def choose_precision(precision: str, device: torch.device) -> str:
    """``auto``: bf16 with hardware support, otherwise fp16 on a GPU and fp32 on a CPU."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp16"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if has_bf16 else "fp32"


@contextlib.contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Multiply fp32 matrices in TF32 (10-bit mantissa) on a GPU, as convolutions are by default."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """States of PyTorch's CPU generator and of each GPU's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def set_random_state(cpu: torch.Tensor, cuda: list[torch.Tensor]) -> None:
    """Inverse of :func:`random_state`; the number of GPUs may differ."""
    torch.set_rng_state(cpu)
    for device, generator in zip(range(torch.cuda.device_count()), cuda, strict=False):
        torch.cuda.set_rng_state(generator, device)
