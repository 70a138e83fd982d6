"""The step as a CUDA graph, with a stand-in for the graph that computes its function anew.

``test_gpu.py`` has the tests of real graphs.
"""

import functools
import math
import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training.test_train import losses, out_of_time_after_an_epoch, out_of_time_in_an_epoch

from trm_helpers import schema
from trm_helpers.config import PRESETS
from trm_helpers.policy.localizer import Localizer
from trm_helpers.training import captured
from trm_helpers.training.train import BehaviorCloningTrainer

EMA = dict(ema_decay=0.9, augmentation="shift")


class Rehearsal:
    """Takes the place of ``CudaGraph``: a replay computes the recorded function on its tensors."""

    made: list = []

    def __init__(self):
        self.replays = 0
        self.made.append(self)

    def warm_up(self, function):
        return function()

    def record(self, function):
        self.function, self.results = function, function()
        return self.results

    def replay(self):
        self.replays += 1
        self.results.copy_(self.function())


def fused(monkeypatch):
    """The optimizer of a GPU."""
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(
        lambda kind, *given, **settings: kind(*given, **{**settings, "fused": True}),
        torch.optim.AdamW))


@pytest.fixture
def rehearsed(small_run, monkeypatch):
    """``small_run`` of trainers that capture their step."""
    fused(monkeypatch)
    monkeypatch.setattr(BehaviorCloningTrainer, "_can_capture", True)
    monkeypatch.setattr(captured, "CudaGraph", Rehearsal)
    monkeypatch.setattr(Rehearsal, "made", [])
    return small_run


@pytest.fixture
def eager_losses(rehearsed, monkeypatch):
    """A function: the losses of a run without a graph."""
    def run(**settings):
        with monkeypatch.context() as patched:
            patched.setattr(BehaviorCloningTrainer, "_can_capture", False)
            return losses(rehearsed("eager", **settings).fit())

    return run


@pytest.mark.parametrize("settings", [EMA, EMA | dict(precision="fp16"), dict(batch_size=1000)])
def test_replayed_training_is_training(rehearsed, eager_losses, settings):
    """All batches of an epoch but a smaller last one are replayed."""
    trainer = rehearsed("replayed", epochs=3, **settings)
    sizes = [len(draw["indices"]) for draw in trainer.train_data.draws(
        trainer.config.batch_size, 0, 0)]
    full = sizes.count(sizes[0])
    assert full == len(sizes) - (0 if "batch_size" in settings else 1)
    found = losses(trainer.fit())
    # the graph's learning rate has 24 bits, Python's 53
    assert np.allclose(found, eager_losses(epochs=3, **settings),
                       rtol=2e-3 if "precision" in settings else 1e-4)
    (graph,) = Rehearsal.made
    assert graph.replays == captured.STEPS + 3 * full


@pytest.mark.parametrize(("interrupt", "precision"), [
    (out_of_time_in_an_epoch, "fp16"), (out_of_time_after_an_epoch, "fp32")])
def test_replayed_training_resumes_bit_for_bit(rehearsed, monkeypatch, interrupt, precision):
    settings = dict(EMA, epochs=3, precision=precision)
    expected = rehearsed("straight", **settings).fit()
    interrupt(rehearsed("resumed", **settings), monkeypatch)
    assert losses(rehearsed("resumed", resume=True, **settings).fit()) == losses(expected)
    assert len(Rehearsal.made) == 3


def state_of(trainer):
    """Everything that capturing might leave changed, as one list of tensors and numbers."""
    moments = [value for weight in trainer.policy.parameters()
               for value in trainer.optimizer.state.get(weight, {}).values()]
    return {
        "policy": trainer.policy.state_dict(), "ema": trainer.ema.state_dict(),
        "moments": dict(enumerate(moments)), "scaler": trainer.scaler.state_dict(),
        "schedule": trainer.scheduler.state_dict(), "random": {"cpu": torch.get_rng_state()},
        "group": {name: value for name, value in trainer.optimizer.param_groups[0].items()
                  if name != "params"}}


def copied(state):
    return {part: {name: value.clone() if isinstance(value, torch.Tensor) else value
                   for name, value in values.items()} for part, values in state.items()}


def assert_equal(found, expected):
    for part, values in expected.items():
        assert found[part].keys() == values.keys(), part
        for name, value in values.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(found[part][name], value), (part, name)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_capturing_leaves_no_trace(rehearsed, steps, precision):
    """Before the first step, where the optimizer's moments are those of none, and later."""
    trainer = rehearsed(precision=precision, **EMA)
    for batch in trainer.train_data.batches(8, 0, 0, start=1):
        if steps:
            trainer._step(batch)
    before = copied(state_of(trainer))
    addresses = [weight.data_ptr() for weight in trainer.ema.parameters()]
    assert trainer._capture() is not None
    after = state_of(trainer)
    if not steps:
        assert not any(value.any() for value in after.pop("moments").values())
        assert not before.pop("moments")
    assert_equal(after, before)
    assert [weight.data_ptr() for weight in trainer.ema.parameters()] == addresses
    assert all(weight.grad is None for weight in trainer.policy.parameters())


# --- a graph that does something else -------------------------------------------------------------
def computes_nothing(trainer, monkeypatch):
    monkeypatch.setattr(Rehearsal, "replay", lambda _: None)


def keeps_the_first_batch(trainer, monkeypatch):
    def replay(graph):
        step = graph.function.__self__
        first = getattr(graph, "first", None) or {
            name: value.clone() for name, value in step._inputs.items()}
        for name, value in first.items():
            step._inputs[name].copy_(value)
        graph.first = first
        graph.results.copy_(graph.function())

    monkeypatch.setattr(Rehearsal, "replay", replay)


def keeps_the_learning_rate(trainer, monkeypatch):
    def replay(graph):
        graph.function.__self__._lr.fill_(trainer.config.lr)
        graph.results.copy_(graph.function())

    monkeypatch.setattr(Rehearsal, "replay", replay)


def leaves_out(owner, name):
    def fault(trainer, monkeypatch):
        def replay(graph):
            with monkeypatch.context() as patched:
                patched.setattr(getattr(trainer, owner) if owner else trainer, name,
                                lambda *_, **__: None)
                graph.results.copy_(graph.function())

        monkeypatch.setattr(Rehearsal, "replay", replay)

    return fault


def clips_otherwise(trainer, monkeypatch):
    def replay(graph):
        with monkeypatch.context() as patched:
            patched.setattr("trm_helpers.training.train.GRAD_CLIP", 1e-3)
            graph.results.copy_(graph.function())

    monkeypatch.setattr(Rehearsal, "replay", replay)


def fails_to_record(trainer, monkeypatch):
    def record(graph, function):
        function()  # some of it
        raise RuntimeError("operation not permitted when stream is capturing\nlong trace")

    monkeypatch.setattr(Rehearsal, "record", record)


@pytest.mark.parametrize(("fault", "reason"), [
    (computes_nothing, "its result 0 differ by"), (keeps_the_first_batch, "its result . differ by"),
    (keeps_the_learning_rate, "its result . differ by"), (clips_otherwise, "its exp_avg differ by"),
    (leaves_out("optimizer", "step"), "differ by"), (leaves_out(None, "_average"), "its averages"),
    (leaves_out("scaler", "update"), "RuntimeError: unscale_"),
    (fails_to_record, r"RuntimeError: operation not permitted when stream is capturing\)"),
])
def test_a_graph_that_differs_is_not_used(rehearsed, eager_losses, monkeypatch, capsys, fault,
                                          reason):
    """Training goes on without it, from the state before."""
    settings = dict(EMA, precision="fp16" if "unscale" in reason else "fp32", epochs=1)
    expected = eager_losses(**settings)
    trainer = rehearsed("replayed", **settings)
    fault(trainer, monkeypatch)
    assert losses(trainer.fit()) == expected
    assert trainer._captured is None
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "CUDA graph" in line]
    assert line.startswith("training steps are launched one kernel at a time, without a CUDA graph")
    assert re.search(reason, line)


def test_a_value_that_is_no_number_differs():
    one = torch.ones(3)
    assert captured._difference({"scale": one}, {"scale": one}) == ""
    assert "its scale differ by nan" in captured._difference({"scale": one * math.nan},
                                                             {"scale": one})


# --- what can be captured -------------------------------------------------------------------------
def test_what_is_captured(small_run, monkeypatch):
    cuda = torch.device("cuda")

    def can(compile=False, frames=cuda, processes=1, device=cuda, **settings):
        trainer = small_run(**settings)
        trainer.config = trainer.config.__class__(compile=compile)
        trainer.device, trainer.team.size = device, processes
        monkeypatch.setattr(type(trainer.train_data), "device", frames)
        try:
            return trainer._can_capture
        finally:
            monkeypatch.undo()

    assert can() and can(variant="trm", image_size=64, deep_supervision=True)
    assert can(halting="learned") and can(halting="convergence")
    cpu = torch.device("cpu")
    assert not any((can(compile=True), can(frames=cpu), can(processes=2), can(device=cpu),
                    can(halting="remainder"), can(halting="adaptive"),
                    can(variant="act", image_size=64)))


class Waits(TorchDispatchMode):
    """Collects the operations for which the CPU would wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2",
             "unique_dim", "lift_fresh")  # the last one: a tensor made of Python's numbers

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, given=(), settings=None):
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(
            index is not None and index.dtype is torch.bool
            for index in (given[1] if isinstance(given[1], (list, tuple)) else ()))
        if name in self.NAMES or masks:
            self.found.add(name)
        return function(*given, **(settings or {}))


def waits_of_a_step(small_run, **settings):
    trainer = small_run(**settings)
    draws = list(trainer.train_data.draws(8, 0, 0))
    trainer._step(trainer.train_data.make(draws[0]))  # the optimizer makes its moments
    with Waits() as waits:
        trainer._update(trainer.train_data.make(draws[1]))
    return waits.found


@pytest.mark.parametrize(("preset", "precision"), [
    ("demo", "fp32"), ("demo", "fp16"), ("trm", "fp32"), ("trm", "bf16")])
def test_the_cpu_waits_for_nothing_within_a_step(small_run, monkeypatch, preset, precision):
    fused(monkeypatch)
    given = PRESETS[preset] | dict(suite="libero_object", task_ids=(0,), num_demos=5, batch_size=8)
    assert waits_of_a_step(small_run, **given, precision=precision) == set()


@pytest.mark.parametrize("variant", ["block", "trm"])
@pytest.mark.parametrize("halting", schema.HALTING)
def test_only_two_halting_rules_read_values_in_training(small_run, monkeypatch, variant, halting):
    fused(monkeypatch)
    found = waits_of_a_step(small_run, variant=variant, halting=halting, augmentation="shift",
                            image_size=64, conditioning="task_id")
    assert bool(found) == (halting in captured.DATA_DEPENDENT)


def test_the_cpu_waits_for_none_of_the_looks():
    images, task = torch.rand(2, 32, 32, 3), torch.rand(2, 4)
    with Waits() as waits:
        Localizer(3, 5, 4, looks=2).locate(images, task)
    assert waits.found == set()


def test_a_wait_is_seen():
    with Waits() as waits:
        values = torch.ones(3)
        values[values > 0], values.sum().item(), torch.tensor(1.0)
    assert waits.found == {"index", "_local_scalar_dense", "lift_fresh"} | (
        waits.found & {"nonzero"})
