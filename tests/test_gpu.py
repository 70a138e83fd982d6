"""Training and control on a GPU; nearly every body runs on the CPU too, as a test of itself."""

import numpy as np
import pytest
import torch
from demo_files import data_set, write_demo_file
from learning import once
from training.test_train import (
    RULES_AND_HEADS,
    differ,
    losses,
    one_epoch,
    out_of_time_after_an_epoch,
    out_of_time_in_an_epoch,
)

from trm_helpers import schema
from trm_helpers.config import PRESETS
from trm_helpers.training import captured, train
from trm_helpers.training.runs import load_policy


def on_gpu(*values):
    return pytest.param(*values, marks=pytest.mark.gpu)


INTERRUPTS = [out_of_time_in_an_epoch, out_of_time_after_an_epoch]


def device_of(trainer) -> set[str]:
    """Where the weights, their averages and the optimizer's moments are."""
    tensors = [*trainer.policy.parameters(), *trainer.ema.module.parameters()]
    tensors += [state["exp_avg"] for state in trainer.optimizer.state.values()]
    return {tensor.device.type for tensor in tensors}


@pytest.mark.parametrize(("device", "interrupt", "precision"), [
    ("cpu", out_of_time_in_an_epoch, "bf16"),
    *(on_gpu("cuda", interrupt, precision) for interrupt in INTERRUPTS
      for precision in ("fp32", "bf16", "fp16"))])
def test_resumed_goes_on_as_straight(small_run, monkeypatch, device, interrupt, precision):
    settings = dict(precision=precision, device=device, ema_decay=0.9, epochs=3)
    expected = small_run("straight", **settings).fit()
    interrupt(small_run("resumed", **settings), monkeypatch)
    trainer = small_run("resumed", resume=True, **settings)
    found = trainer.fit()
    assert [row["precision"] for row in found] == [precision] * 3
    assert device_of(trainer) == {device}
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    assert np.allclose(losses(found), losses(expected), rtol=1e-2)


@pytest.mark.parametrize(("first", "then", "interrupt", "precision", "tolerance"), [
    ("cpu", "cpu", out_of_time_after_an_epoch, "auto", 0.1),
    *(on_gpu(*devices, interrupt, *precision) for devices in (("cpu", "cuda"), ("cuda", "cpu"))
      for interrupt in INTERRUPTS for precision in (("fp32", 1e-2), ("auto", 0.1)))])
def test_a_run_moves_to_another_device_and_back(small_run, monkeypatch, first, then, interrupt,
                                                precision, tolerance):
    """With ``auto`` in the precision of each; the last epoch is on the first device again."""
    settings = dict(precision=precision, ema_decay=0.9, epochs=4)
    straight = small_run("straight", device=first, **settings)
    expected = straight.fit()
    begun = small_run("moved", device=first, **settings)
    interrupt(begun, monkeypatch)
    moved = small_run("moved", resume=True, device=then, stop_epoch=3, **settings)
    moved.fit()
    assert device_of(moved) == {then}
    back = small_run("moved", resume=True, device=first, **settings)
    found = back.fit()
    assert device_of(back) == {first}
    assert [row["precision"] for row in found] == [
        begun.precision, moved.precision, moved.precision, back.precision]
    assert np.allclose(losses(found), losses(expected), rtol=tolerance)
    policy = load_policy("moved").to(then)
    assert next(policy.parameters()).device.type == then


@pytest.mark.gpu  # minutes on a CPU
@pytest.mark.parametrize("settings", [dict(), dict(variant="trm", image_size=64)])
def test_compiled_training_is_training(small_run, capsys, settings):
    """Forward and backward pass."""
    settings = dict(device="cuda", epochs=1, **settings)
    expected = small_run("eager", **settings).fit()
    trainer = small_run("compiled", compile=True, **settings)
    rows = trainer.fit()
    assert trainer._compiled is not None and "torch.compile" not in capsys.readouterr().out
    assert np.allclose(losses(rows), losses(expected), rtol=1e-2)


# --- the step as a CUDA graph; training/test_captured.py tests its logic on the CPU --------------
def of_preset(preset, **settings):
    """A preset's network and training on the small file of ``small_run``."""
    return PRESETS[preset] | dict(suite="libero_object", task_ids=(0,), num_demos=5, batch_size=8,
                                  epochs=3, device="cuda") | settings


@pytest.fixture
def replays(monkeypatch):
    """The real graphs' replays, counted."""
    replay, counted = captured.CudaGraph.replay, []
    monkeypatch.setattr(captured.CudaGraph, "replay", lambda graph: (
        counted.append(graph) or replay(graph)))
    return counted


def eager(monkeypatch):
    monkeypatch.setattr(train.BehaviorCloningTrainer, "_can_capture", False)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("preset", ["demo", "trm"])
def test_captured_training_is_training(small_run, monkeypatch, capsys, replays, preset, precision):
    """All batches are replayed but an epoch's last, which is smaller."""
    settings = of_preset(preset, precision=precision)
    trainer = small_run("captured", **settings)
    found = trainer.fit()
    assert "without a CUDA graph" not in capsys.readouterr().out
    assert len(trainer.train_data) % 8
    assert len(replays) == captured.STEPS + 3 * (trainer.steps_per_epoch - 1)
    eager(monkeypatch)
    expected = small_run("eager", **settings).fit()
    assert np.allclose(losses(found), losses(expected), rtol=1e-3 if precision == "fp32" else 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [
    dict(augmentation="reference", halting="learned"), dict(augmentation="none", gripper="mixture"),
    dict(augmentation="colour", conditioning="task_id"), dict(augmentation="brightness", chunk=1,
                                                              execution_horizon=1),
    dict(augmentation="cutout", variant="transformer"),
    dict(augmentation="cutout", halting="convergence")], ids=str)
def test_other_steps_are_captured_too(small_run, monkeypatch, capsys, settings):
    settings = of_preset("demo", epochs=1, **settings)
    found = small_run("captured", **settings).fit()
    assert "without a CUDA graph" not in capsys.readouterr().out
    eager(monkeypatch)
    assert np.allclose(losses(found), losses(small_run("eager", **settings).fit()), rtol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("interrupt", INTERRUPTS)
def test_captured_training_resumes_bit_for_bit(small_run, monkeypatch, replays, interrupt):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings = of_preset("demo", precision="fp32")
    expected = small_run("straight", **settings).fit()
    interrupt(small_run("resumed", **settings), monkeypatch)
    assert losses(small_run("resumed", resume=True, **settings).fit()) == losses(expected)
    assert replays


@pytest.mark.gpu
def test_training_goes_on_when_recording_fails(small_run, monkeypatch, capsys, replays):
    """A value read on the CPU ends a recording with an error of the driver's."""
    settings = of_preset("demo", precision="fp16")
    update = train.BehaviorCloningTrainer._update

    def reads(trainer, batch):
        results = update(trainer, batch)
        results[0].item()
        return results

    with monkeypatch.context() as patched:
        patched.setattr(train.BehaviorCloningTrainer, "_update", reads)
        found = small_run("failed", **settings).fit()
    assert "one kernel at a time, without a CUDA graph (" in capsys.readouterr().out
    assert not replays
    eager(monkeypatch)
    assert np.allclose(losses(found), losses(small_run("eager", **settings).fit()), rtol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("preset", "precision"), [("demo", "fp16"), ("trm", "bf16")])
def test_the_cpu_never_waits_for_the_gpu_within_an_epoch(small_run, preset, precision):
    """Neither replayed nor one kernel at a time."""
    trainer = small_run("run", **of_preset(preset, precision=precision))
    trainer._captured = trainer._capture()
    draws = trainer.train_data.draws(8, 0, 0)
    trainer._replay(draws[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for draw in draws:  # the last one is smaller and not replayed
            trainer._replay(draw)
            trainer._step(trainer.train_data.make(draw, trainer.device))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_auto_keeps_the_frames_on_the_gpu(small_run):
    trainer = small_run(device="cuda")
    assert trainer.train_data.device.type == trainer.val_data.device.type == "cuda"
    assert small_run("other", device="cpu").train_data.device.type == "cpu"


@pytest.mark.parametrize(("kind", "device"), [("mmap", "cpu"), on_gpu("gpu", "cuda"),
                                              on_gpu("ram", "cuda"), on_gpu("mmap", "cuda")])
@pytest.mark.parametrize("augmentation", schema.AUGMENTATIONS)
def test_batches_are_the_same_wherever_the_frames_lie(tmp_path, kind, device, augmentation):
    """Draws are those of the CPU; a GPU's arithmetic may differ in the last digits."""
    file = write_demo_file(tmp_path / "soup_demo.hdf5", (6, 7), image_size=32)
    settings = dict(image_size=32, cameras=tuple(schema.CAMERAS), chunk=2,
                    augmentation=augmentation, proprioception=True)
    ram, other = (data_set(file, storage=storage, **settings) for storage in ("ram", kind))
    pairs = list(zip(ram.batches(5, 3, 1), other.batches(5, 3, 1, device=device), strict=True))
    assert len(pairs) == 3
    for expected, found in pairs:
        assert found["mask"].device.type == device
        assert torch.equal(found["mask"].cpu(), expected["mask"])
        assert torch.equal(found["actions"].cpu(), expected["actions"])
        assert found["observations"].keys() == expected["observations"].keys()
        for name, value in expected["observations"].items():
            assert found["observations"][name].device.type == device
            torch.testing.assert_close(found["observations"][name].cpu(), value, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["mmap", on_gpu("gpu")])
def test_a_run_trains_from_frames_elsewhere_as_from_memory(small_run, kind):
    device = "cuda" if kind == "gpu" else "cpu"
    rows = [small_run(name, storage=storage, device=device, augmentation="shift").fit()
            for name, storage in (("memory", "ram"), ("there", kind))]
    assert np.allclose(losses(rows[0]), losses(rows[1]), rtol=1e-3)


@pytest.mark.parametrize(("device", "settings", "change"), [
    ("cpu", *RULES_AND_HEADS[0]), *(on_gpu("cuda", *case) for case in RULES_AND_HEADS)], ids=str)
def test_every_rule_and_head_trains_and_acts(small_run, device, settings, change):
    plain, changed = (once(one_epoch, small_run, device=device, **each)
                      for each in (settings, settings | change))
    assert differ(plain, changed)


@pytest.mark.gpu
@pytest.mark.sim
def test_lazy_frames_equal_eager_ones_on_the_gpus_renderer():
    from sim.test_env import MOVES, SUITE, TASK, played

    from trm_helpers.opengl import renderer
    from trm_helpers.sim.env import LiberoEnv

    assert "llvmpipe" not in renderer().lower() and "softpipe" not in renderer().lower()
    seen = []
    for lazy in (True, False):
        with LiberoEnv(SUITE, TASK, lazy=lazy) as env:
            seen.append(played(env, env.reset(init_state=3), MOVES))
    for one, other in zip(*seen, strict=True):
        for camera in schema.CAMERAS:
            assert np.array_equal(one[camera], other[camera]), camera
    first, last = (seen[0][step]["agentview_rgb"].astype(int) for step in (0, -1))
    assert np.abs(first - last).max() > 0
