"""The training step as a CUDA graph: recorded once, then replayed with a single launch.

A step of a small network is a thousand kernels of a few microseconds each. Launched one by one they
take the same time whatever the batch, because the GPU waits for the CPU. A graph repeats recorded
kernels on recorded addresses, so whatever changes between steps is first copied to fixed tensors:
the draw of the batch and the learning rate.

A graph that leaves something out would train wrongly without an error. :func:`capture` therefore
compares it with the steps that it replaces before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from .devices import random_state, set_random_state

DATA_DEPENDENT = ("remainder", "adaptive")  # halting rules that read a value in every recursion
STEPS = 3  # compared; they also warm up PyTorch's libraries before the recording
_ALLOWED = 0.05  # difference relative to the value itself; bf16 rounds to 0.004
# Adam turns a gradient that is nothing but rounding into an update of either sign
_ALLOWED_OF = {"weights": 0.5, "averages": 0.5}

Draw = Mapping[str, torch.Tensor]


class CudaGraph:
    """Warm-up, recording and replay; the first two on a stream of their own."""

    def __init__(self):
        self._graph, self._stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def warm_up(self, function: Callable):
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable):
        current = torch.cuda.current_stream()
        try:
            # other threads may go on using the GPU
            with torch.cuda.graph(self._graph, stream=self._stream,
                                  capture_error_mode="thread_local"):
                return function()
        finally:
            torch.cuda.set_stream(current)  # a recording that fails leaves its own

    def replay(self) -> None:
        self._graph.replay()


class CapturedStep:
    """``update`` of draws of one shape as a graph; returns its results (n,).

    Args:
        update: computes n numbers from a draw, without reading a value on the CPU, and changes
            weights, optimizer and scaler in place.
        optimizer: its learning rate is read before each replay.
    """

    def __init__(self, update: Callable[[Draw], Sequence[torch.Tensor]],
                 optimizer: torch.optim.Optimizer, draw: Draw, graph: CudaGraph):
        self._update, self._optimizer, self._graph = update, optimizer, graph
        self._inputs = {name: value.clone() for name, value in draw.items()}
        self._lr = torch.zeros((), device=draw["indices"].device)
        self._results = graph.record(self._run)

    def _run(self) -> torch.Tensor:
        group = self._optimizer.param_groups[0]
        before = {name: group[name] for name in ("lr", "capturable")}
        group.update(lr=self._lr, capturable=True)
        try:
            return torch.stack(self._update(self._inputs))
        finally:
            group.update(before)

    def fits(self, draw: Draw) -> bool:
        return all(value.shape == self._inputs[name].shape for name, value in draw.items())

    def __call__(self, draw: Draw) -> torch.Tensor:
        for name, value in draw.items():
            self._inputs[name].copy_(value)
        self._lr.fill_(self._optimizer.param_groups[0]["lr"])
        self._graph.replay()
        return self._results.clone()


class _State:
    """All that a step changes: kept, compared, and restored at the addresses that a graph uses."""

    def __init__(self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer,
                 scaler: torch.amp.GradScaler):
        self._modules, self._optimizer, self._scaler = modules, optimizer, scaler
        self._kept = {key: value.detach().clone() for key, value in self._tensors().items()}
        self._scale, self._random = scaler.state_dict(), random_state()

    def _tensors(self) -> dict[tuple[str, int], torch.Tensor]:
        """By kind (``weights``, ``exp_avg``, ...) and position."""
        found = {(name, number): tensor for name, module in self._modules.items()
                 for number, tensor in enumerate([*module.parameters(), *module.buffers()])}
        for number, weight in enumerate(self._optimizer.param_groups[0]["params"]):
            for name, tensor in self._optimizer.state.get(weight, {}).items():
                found[name, number] = tensor
        return found

    @torch.no_grad()
    def restore(self) -> None:
        for key, tensor in self._tensors().items():
            if key in self._kept:
                tensor.copy_(self._kept[key])
            else:
                tensor.zero_()  # state of the optimizer, created by its first step
        if self._scaler.is_enabled():
            self._scaler.scale(self._kept["weights", 0])  # makes its tensors
            self._scaler.update(self._scale["scale"])  # forgets a step that ended early
            self._scaler.load_state_dict(self._scale)
        self._optimizer.zero_grad(set_to_none=True)
        set_random_state(*self._random)

    @torch.no_grad()
    def changes(self) -> dict[str, torch.Tensor]:
        """What has changed since, as one vector for each kind of tensor."""
        parts: dict[str, list[torch.Tensor]] = {}
        for key, tensor in self._tensors().items():
            change = tensor - self._kept[key] if key in self._kept else tensor
            parts.setdefault(key[0], []).append(change.flatten().float())
        scale = self._scaler.state_dict()  # empty unless in fp16
        parts |= {name: [torch.tensor([float(scale[name])])]
                  for name in ("scale", "_growth_tracker") if scale}
        return {name: torch.cat(changes) for name, changes in parts.items()}

    def after(self, step: Callable[[Draw], torch.Tensor],
              draws: Sequence[Draw]) -> dict[str, torch.Tensor]:
        """Results and changes of a step for each draw; the state is as before."""
        group = self._optimizer.param_groups[0]
        rate, results = group["lr"], []
        try:
            for number, draw in enumerate(draws):
                group["lr"] = rate / 4**number  # a graph that had recorded the rate would differ
                results.append(step(draw))
        finally:
            group["lr"] = rate
        columns = torch.stack(results).nan_to_num().unbind(1)  # an overflow has no finite norm
        found = {f"result {number}": column for number, column in enumerate(columns)}
        found |= self.changes()
        self.restore()
        return found


def capture(update: Callable[[Draw], Sequence[torch.Tensor]], modules: Mapping[str, nn.Module],
            optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
            draws: Sequence[Draw]) -> CapturedStep | None:
    """``update`` as a graph that does the same; the state is left as it was.

    Steps of the ``draws``, all of one shape, are computed one kernel at a time and as the graph,
    from the same state, and their losses, weights, averages and moments compared. If they differ,
    or if recording fails, prints the reason and returns None.

    Args:
        update: see :class:`CapturedStep`.
        modules: what it changes beside optimizer and scaler.
    """
    state = _State(modules, optimizer, scaler)
    try:
        graph = CudaGraph()
        expected = graph.warm_up(
            lambda: state.after(lambda draw: torch.stack(update(draw)), draws))
        step = CapturedStep(update, optimizer, draws[0], graph)
        state.restore()
        reason = _difference(state.after(step, draws), expected)
    except Exception as error:  # of any type, from PyTorch or the driver
        while error.__context__:  # ending a failed recording raises too; the first is the reason
            error = error.__context__
        reason = (f"{type(error).__name__}: "
                  + (str(error).strip().splitlines() or ["no reason given"])[0])
    if not reason:
        return step
    state.restore()
    print(f"training steps are launched one kernel at a time, without a CUDA graph ({reason})")
    return None


def _difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """What differs by more than rounding; empty if nothing does."""
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm().clamp(min=1e-30))
        allowed = _ALLOWED_OF.get(name, _ALLOWED)
        if not error <= allowed:
            return f"its {name} differ by {error:.3g}, expected at most {allowed}"
    return ""
