import dataclasses
import errno
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import SMALL
from demo_files import write_demo_file
from learning import falls_below, once, straight
from safetensors.torch import load_file

from trm_helpers import schema
from trm_helpers.config import Config, from_flat
from trm_helpers.files import DiskFullError, read_json, read_jsonl, write_json
from trm_helpers.policy import model
from trm_helpers.preflight import _check_gpu
from trm_helpers.report import write_report
from trm_helpers.search.search import worker_environments
from trm_helpers.software import gpu_fault
from trm_helpers.training import runs, train
from trm_helpers.training.devices import choose_device, choose_precision, say_cpu, tf32
from trm_helpers.training.runs import create_run, load_policy


def losses(rows):
    return [(row["train_loss"], row["val_loss"]) for row in rows]


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(small_run):
    first, again, other = (small_run(name, seed=seed).fit()
                           for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert losses(first) == losses(again) != losses(other)
    assert [row["epoch"] for row in first] == [1, 2]


def test_without_a_terminal_every_tenth_epoch_is_a_line(small_run, capsys):
    rows = small_run(epochs=12).fit()
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in lines] == [f"epoch {n} of 12" for n in (1, 10, 12)]
    assert f"validation loss {rows[9]['val_loss']:.4f}, about " in lines[1]
    assert lines[2].endswith(f"validation loss {rows[11]['val_loss']:.4f}")
    assert "step/s" not in said.err


def test_order_of_the_samples_follows_seed_and_epoch(small_run, monkeypatch):
    trainer = small_run(seed=5)
    batches, asked = trainer.train_data.batches, []
    monkeypatch.setattr(trainer.train_data, "batches", lambda size, seed, epoch, **given: (
        asked.append((size, seed, epoch)) or batches(size, seed, epoch, **given)))
    trainer.fit()
    assert asked == [(8, 5, 0), (8, 5, 1)]


def test_a_trainer_overfits_a_batch(small_run):
    trainer = small_run(hidden_dim=64, batch_size=8, epochs=100, lr=1e-3, augmentation="none")
    batch = next(trainer.train_data.batches(8, 0, 0))

    def step():
        return trainer._step(batch)[0].item()

    assert falls_below(0.1 * step(), step, 299)


def killed_between_row_and_state(trainer, monkeypatch):
    """Of epoch 3."""
    save = runs.save_training_state

    def die(run, state):
        if state["epoch"] == 3:
            raise KeyboardInterrupt
        save(run, state)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runs, "save_training_state", die)
        trainer.fit()
    assert len(read_jsonl(trainer.run / "metrics.jsonl")) == 3


def killed_in_an_epoch(trainer, monkeypatch):
    """In the third step of epoch 2, after a state within it."""
    step, steps = trainer._step, itertools.count(1)

    def die(batch):
        if next(steps) == trainer.steps_per_epoch + 3:
            raise KeyboardInterrupt
        return step(batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "_CHECK_EVERY", 1)
        patched.setattr(train, "_SAVE_EVERY", 0.0)
        patched.setattr(trainer, "_step", die)
        trainer.fit()
    assert len(runs.load_training_state(trainer.run)["measured"]) == 2


def out_of_time_in_an_epoch(trainer, monkeypatch):
    """After the second step of epoch 2."""
    calls = itertools.count(1)
    with monkeypatch.context() as patched:
        patched.setattr(train, "_CHECK_EVERY", 1)
        patched.setattr(trainer, "_time_is_up", lambda: next(calls)
                        > 1 + trainer.steps_per_epoch + 1 + 1)
        assert len(trainer.fit()) == 1
    assert len(runs.load_training_state(trainer.run)["measured"]) == 2


def out_of_time_after_an_epoch(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "_time_is_up", lambda: trainer.epoch > 0)
    assert len(trainer.fit()) == 1


RESUMED = dict(ema_decay=0.9, epochs=4, augmentation="shift")


@pytest.mark.parametrize(("interrupt", "settings"), [
    (killed_between_row_and_state, RESUMED), (killed_in_an_epoch, RESUMED),
    (out_of_time_in_an_epoch, RESUMED), (out_of_time_after_an_epoch, RESUMED),
    # parts with a state of their own: the scaler, the halting heads, the carry, the gripper's head
    (killed_in_an_epoch, RESUMED | dict(precision="fp16")),
    (killed_in_an_epoch, RESUMED | dict(halting="adaptive", gripper="binary")),
    # uses of PyTorch's own generator: dropout and the style
    (killed_in_an_epoch, RESUMED | dict(variant="act", image_size=64)),
    (killed_in_an_epoch, RESUMED | dict(variant="trm", image_size=64, deep_supervision=True,
                                        halting="learned")),
    (killed_in_an_epoch, RESUMED | dict(normalize_actions="zscore", loss="mix",
                                        conditioning="task_id", augmentation="reference")),
])
def test_resumed_equals_uninterrupted_bit_for_bit(small_run, monkeypatch, interrupt, settings):
    expected, weights = once(straight, small_run, **settings)
    assert len({row["val_loss"] for row in expected}) == 4

    interrupt(small_run("resumed", **settings), monkeypatch)
    resumed = small_run("resumed", resume=True, **settings)
    assert resumed.steps_per_epoch > 2
    assert losses(resumed.fit()) == losses(expected)
    for name, before in weights.items():
        found = load_file(resumed.run / f"{name}.safetensors")
        assert all(torch.equal(found[key], before[key]) for key in before)


def test_the_first_epoch_is_completed_after_the_time_limit(small_run):
    trainer = small_run(max_minutes=1e-9)
    assert [row["epoch"] for row in trainer.fit()] == [1]
    assert (trainer.run / "best.safetensors").exists()


def test_the_end_of_the_session_ends_training_with_everything_saved(small_run, monkeypatch):
    monkeypatch.setenv("TRM_STOP_AT", str(time.time() - 1))
    assert len(small_run("run", epochs=3).fit()) == 1
    monkeypatch.setenv("TRM_STOP_AT", str(time.time() + 3600))
    assert len(small_run("run", resume=True, epochs=3).fit()) == 3


def test_training_resumes_exactly_after_stop_epoch(small_run):
    """The learning rate follows the schedule of all epochs."""
    straight = small_run("straight", epochs=4).fit()
    first = small_run("parts", epochs=4, stop_epoch=1)
    assert losses(first.fit()) == losses(straight[:1]) and first.finished
    assert first.fit() == small_run("parts", resume=True, epochs=4, stop_epoch=1).fit()
    rest = small_run("parts", resume=True, epochs=4)
    assert not rest.finished
    assert losses(rest.fit()) == losses(straight) and rest.finished


def test_cosine_annealing_reaches_min_lr_at_the_end(small_run):
    trainer = small_run(epochs=4, lr=1e-3)
    rates = [row["lr"] for row in trainer.fit()]
    # of the way from 1e-3 to 1e-6, (1 + cos) / 2 of 45, 90, 135 and 180 degrees is left
    left = np.array([0.8535534, 0.5, 0.1464466, 0])
    assert rates == pytest.approx(1e-6 + 999e-6 * left, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # fp16: after unscaling
def test_gradients_are_clipped_to_the_norm(small_run, precision, monkeypatch):
    exact = small_run("exact", batch_size=40)
    loss, _ = exact.policy.loss(next(exact.train_data.batches(40, 0, 0)), exact.config.loss)
    loss.backward()
    expected = torch.stack([p.grad.norm() for p in exact.policy.parameters()
                            if p.grad is not None]).norm().item()
    norms, used = {}, {}
    for clip in (1e-3, 1e3):
        monkeypatch.setattr(train, "GRAD_CLIP", clip)
        trainer = small_run(f"clip{clip}", batch_size=40, precision=precision)
        norms[clip] = trainer._step(next(trainer.train_data.batches(40, 0, 0)))[1].item()
        gradients = [p.grad.norm() for p in trainer.policy.parameters() if p.grad is not None]
        used[clip] = torch.stack(gradients).norm().item()
    assert norms[1e-3] == norms[1e3] > 1e-2  # as found, before clipping
    assert norms[1e3] == pytest.approx(expected, rel=0.02)
    assert used[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert used[1e3] == pytest.approx(norms[1e3], rel=1e-5)


def test_early_stopping_and_the_best_weights(small_run, monkeypatch):
    scripted = iter([0.5, 0.3, 0.4, None, 0.35, 0.1])
    saved = []

    def validate(trainer):
        loss = next(scripted)
        if loss is None:
            raise KeyboardInterrupt
        saved.append({k: v.clone() for k, v in trainer.policy.state_dict().items()})
        return {"loss": loss, "action": 0.0}

    monkeypatch.setattr(train.BehaviorCloningTrainer, "validate", validate)
    settings = dict(epochs=9, patience=2)
    with pytest.raises(KeyboardInterrupt):
        small_run(**settings).fit()
    resumed = small_run(resume=True, **settings)
    rows = resumed.fit()
    assert [row["val_loss"] for row in rows] == [0.5, 0.3, 0.4, 0.35]
    assert small_run(resume=True, **settings).fit() == rows  # remains stopped
    best = load_file(resumed.run / "best.safetensors")
    assert all(torch.equal(best[key], saved[1][key]) for key in best)


def test_rollouts_choose_the_best_weights(small_run, monkeypatch):
    rates = {2: 0.5, 4: 0.8, 6: 0.8, 7: 0.3}  # every second epoch, and the last
    losses = iter([0.1, 0.6, 0.2, 0.5, 0.2, 0.4, 0.3])
    asked = []

    def roll_out():
        asked.append(load_file(trainer.run / "last.safetensors"))
        return rates[2 * len(asked) if len(asked) < 4 else 7]

    monkeypatch.setattr(train.BehaviorCloningTrainer, "validate",
                        lambda _: {"loss": next(losses), "action": 0.0})
    trainer = small_run(epochs=7, patience=0, rollout_every=2, roll_out=roll_out)
    rows = trainer.fit()
    assert {row["epoch"]: row["success_rate"] for row in rows if "success_rate" in row} == rates
    best = load_file(trainer.run / "best.safetensors")  # 0.8 twice; the lower loss decides
    assert all(torch.equal(best[key], asked[2][key]) for key in best)
    assert not torch.equal(best["head.output.weight"], asked[1]["head.output.weight"])


def test_patience_follows_the_validation_loss_with_rollouts(small_run, monkeypatch):
    losses = iter([0.9, 0.8, 0.7, 0.6, 0.65, 0.66, 0.67])
    monkeypatch.setattr(train.BehaviorCloningTrainer, "validate",
                        lambda _: {"loss": next(losses), "action": 0.0})
    rows = small_run(epochs=7, patience=2, rollout_every=7, roll_out=lambda: 0.5).fit()
    assert len(rows) == 6  # two epochs after the fourth


def test_resuming_on_other_demonstrations_is_refused(small_run):
    small_run("run", epochs=3, max_minutes=1e-9).fit()
    before = read_jsonl(small_run("run", resume=True, epochs=3).run / "metrics.jsonl")
    other = small_run("run", resume=True, epochs=3)
    other.train_data.demos = other.train_data.demos[:-1]  # like a file with other demonstrations
    with pytest.raises(ValueError, match=r"\(soup_demo.hdf5: 4 demonstrations there, 3 now, "
                                         "3 of them in both\\)"):
        other.fit()
    assert read_jsonl(other.run / "metrics.jsonl") == before
    assert len(small_run("run", resume=True, epochs=3).fit()) == 3


def test_resuming_on_the_same_demonstrations_with_fewer_frames_is_refused(small_run):
    first = small_run("run", epochs=3, stop_epoch=1)
    samples = len(first.train_data)
    first.fit()
    (described,) = first.train_data.describe()["files"]
    with h5py.File(described["file"], "a") as file:
        for demo in file["data"].values():
            demo.attrs["frame_stride"] = 2
    other = small_run("run", resume=True, epochs=3)
    with pytest.raises(ValueError, match=f"{samples} samples there, {len(other.train_data)} now, "
                                         "as with another frame_stride"):
        other.fit()
    described = read_json(other.run / "policy.json")
    del described["trained_on"]["samples"]  # as a description from elsewhere may lack it
    write_json(other.run / "policy.json", described)
    assert len(small_run("run", resume=True, epochs=3).fit()) == 3


def test_a_state_with_another_number_of_updates_is_refused(small_run):
    """As a version made it that visited each of fewer frames once in an epoch."""
    first = small_run("run", epochs=3, stop_epoch=1)
    first.scheduler.T_max -= 3
    first.fit()
    updates = 3 * first.steps_per_epoch
    with pytest.raises(ValueError, match=f"a schedule of {updates - 3} updates; {updates} now"):
        small_run("run", resume=True, epochs=3).fit()


def test_rollouts_need_a_function_that_rolls_out(trainer, small_run):
    config = trainer.config
    with pytest.raises(ValueError, match="rollout_every=3"):
        train.BehaviorCloningTrainer(trainer.policy, trainer.train_data, trainer.val_data,
                                     dataclasses.replace(config, rollout_every=3), trainer.run)

# --- run folder: one writer, damaged files ------------------------------------------------------


def test_a_second_training_into_the_same_folder_is_refused_at_once(small_run, tmp_path):
    """Also before its demonstrations are read; a killed process releases the folder."""
    first = small_run("run", epochs=3, max_minutes=1e-9)
    first.fit()
    before = {path.name: path.read_bytes() for path in first.run.iterdir()}
    code = ("import sys, time; from trm_helpers.training.runs import only_writer\n"
            f"with only_writer({str(first.run)!r}): print('mine', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(RuntimeError, match="another process works in .*run; wait"):
            first.fit()
        with pytest.raises(RuntimeError, match="another process works in"):
            small_run("run", resume=True, epochs=3)
        assert {path.name: path.read_bytes() for path in first.run.iterdir()} == before
        load_policy("run")  # readers need no lock
        write_report("run")
    finally:
        other.kill()
        other.wait()
    assert len(small_run("run", resume=True, epochs=3).fit()) == 3


def test_a_folder_overwritten_by_another_run_is_refused(small_run, tmp_path):
    """A run without an epoch may be overwritten while its demonstrations are collected."""
    first = from_flat("tiny", **{**SMALL, "lr": 0.5})
    run = create_run(first, "run")
    second = small_run("run", lr=0.25)
    for train_it in (lambda: None, second.fit):
        train_it()
        with pytest.raises(ValueError, match="other settings .lr: 0.25 there, 0.5 now"):
            train.BehaviorCloningTrainer.from_config(first, {0: tmp_path / "soup_demo.hdf5"}, run)


def test_a_folder_overwritten_before_the_first_step_is_refused(small_run):
    first = small_run("run", lr=0.5)
    small_run("run", lr=0.25)
    with pytest.raises(ValueError, match="other settings .lr: 0.25 there, 0.5 now"):
        first.fit()
    assert not (first.run / "last.safetensors").exists()


def removed(path):
    path.unlink()


def emptied(path):
    path.write_text("")


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def shortened(path):
    path.write_text(path.read_text().splitlines(keepends=True)[0])


def overwritten(path):
    path.write_text("nonsense\n")


@pytest.mark.parametrize("damage", [removed, emptied, cut, shortened, overwritten])
@pytest.mark.parametrize("epochs", [2, 3])
def test_metrics_are_restored_from_the_training_state(small_run, damage, epochs):
    """Of a finished run and of a resumed one."""
    rows = small_run("run", epochs=3, stop_epoch=2).fit()
    metrics = small_run("run", True, epochs=3).run / "metrics.jsonl"
    before = metrics.read_bytes()
    damage(metrics)
    again = small_run("run", True, epochs=3, stop_epoch=epochs).fit()
    assert again[:2] == rows and len(again) == epochs
    assert metrics.read_bytes()[:len(before)] == before
    assert read_jsonl(metrics) == again


def test_a_repeated_first_epoch_replaces_the_metrics_at_its_end(small_run, monkeypatch):
    """So that a second full disk in it leaves the first row."""
    def full(*_):
        raise OSError("full")

    trainer = small_run("run")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(train.runs, "save_training_state", full)
        trainer.fit()
    metrics = trainer.run / "metrics.jsonl"
    before = metrics.read_bytes()
    again = small_run("run", True)
    monkeypatch.setattr(again, "_train_epoch", full)
    with pytest.raises(OSError, match="full"):
        again.fit()
    assert metrics.read_bytes() == before != b""
    rows = small_run("run", True).fit()
    assert read_jsonl(metrics) == rows and len(rows) == 2


def test_a_run_of_a_gpu_resumes_with_the_optimizer_of_this_device(small_run, monkeypatch):
    """A GPU's is fused, which its state says."""
    expected = small_run("straight", epochs=2).fit()
    small_run("run", epochs=2, stop_epoch=1).fit()
    load = runs.load_training_state

    def saved_on_a_gpu(run):
        state = load(run)
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = True
        return state

    monkeypatch.setattr(runs, "load_training_state", saved_on_a_gpu)
    trainer = small_run("run", resume=True, epochs=2)
    assert losses(trainer.fit()) == losses(expected)
    assert trainer.optimizer.param_groups[0]["fused"] is None


def test_missing_weights_are_restored_or_reported(small_run):
    run = small_run("run").run
    small_run("run", True).fit()
    last, best = run / "last.safetensors", run / "best.safetensors"
    before = last.read_bytes()
    last.unlink()
    small_run("run", True).fit()
    assert last.read_bytes() == before
    cut(best)
    with pytest.raises(ValueError, match="best.safetensors is damaged"):
        small_run("run", True).fit()
    best.unlink()
    with pytest.raises(ValueError, match="best.safetensors does not exist; expected .* 2 epochs"):
        small_run("run", True).fit()


@pytest.mark.parametrize("setting", [dict(seed=1), dict(lr=0.5), dict(weight_decay=0.5),
                                     dict(num_recursions=3), dict(ema_decay=0.5)], ids=str)
def test_a_training_state_of_other_settings_is_refused(small_run, setting):
    other = small_run("other", epochs=3, stop_epoch=1, **setting)
    ours = small_run("ours", epochs=3, stop_epoch=1)
    other.fit()
    ours.fit()
    state = other.run / "training_state.pt"
    state.replace(ours.run / state.name)
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"ours.training_state.pt is .*{name}: {value} there, "):
        small_run("ours", True, epochs=3).fit()


@pytest.mark.parametrize("stored", [
    lambda settings: None, lambda settings: {**settings, "num_heads": 4},
    lambda settings: {name: settings[name] for name in settings if name != "head_activation"}])
def test_a_training_state_of_another_version_loads(small_run, stored):
    """Without settings, with a former one, and without one that was new later."""
    trainer = small_run("run", epochs=2, stop_epoch=1)
    trainer.fit()
    state = runs.load_training_state(trainer.run)
    if settings := stored(state.pop("settings")):
        state["settings"] = settings
    runs.save_training_state(trainer.run, state)
    assert len(small_run("run", True, epochs=2).fit()) == 2


def test_a_training_state_without_a_setting_had_its_default(small_run):
    settings = dict(epochs=2, head_activation="silu")
    trainer = small_run("run", stop_epoch=1, **settings)
    trainer.fit()
    state = runs.load_training_state(trainer.run)
    del state["settings"]["head_activation"]
    runs.save_training_state(trainer.run, state)
    with pytest.raises(ValueError, match="head_activation: 'relu' there, 'silu' now"):
        small_run("run", True, **settings).fit()


@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors", "training_state.pt"])
def test_a_full_disk_keeps_the_last_complete_state(small_run, monkeypatch, name):
    """In the second epoch; once space is free, training ends with the same weights."""
    straight = small_run("straight", epochs=3)
    expected = losses(straight.fit())
    trainer = small_run("full", epochs=3)
    replace, times = os.replace, itertools.count(1)

    def full(source, target):
        if Path(target).name == name and next(times) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(DiskFullError, match=f"full: {name}"):
        patched.setattr(os, "replace", full)
        trainer.fit()
    assert runs.load_training_state(trainer.run)["epoch"] == 1
    assert load_policy("full", "last") and load_policy("full", "best")
    assert losses(small_run("full", True, epochs=3).fit()) == expected
    for weights in ("best", "last"):
        one, other = (load_policy(run, weights).sha256 for run in ("straight", "full"))
        assert one == other


def test_demonstrations_may_move(small_run, tmp_path, capsys):
    """Contents decide, not locations."""
    config = from_flat("tiny", **SMALL | dict(epochs=3, demo_dir=str(tmp_path / "there")))
    there = write_demo_file(tmp_path / "there" / "soup_demo.hdf5", (6, 7, 8, 9, 10), image_size=36)

    def trainer(config, file):
        run = create_run(config, "moved", resume=True)
        return train.BehaviorCloningTrainer.from_config(config, {0: file}, run)

    first = trainer(config.replace(stop_epoch=1), there)
    first.fit()
    here = tmp_path / "mounted" / "elsewhere" / there.name
    here.parent.mkdir(parents=True)
    there.rename(here)
    moved = config.replace(demo_dir=str(here.parent))
    second = trainer(moved, here)
    assert len(second.fit()) == 3
    assert "frames differ" not in capsys.readouterr().out

    write_demo_file(here, (6, 7, 8, 9, 10), image_size=36,
                    agentview_rgb=lambda frames, demo: frames + np.uint8(1))
    assert len(trainer(moved, here).fit()) == 3
    assert "soup_demo.hdf5: the frames differ" in capsys.readouterr().out
    write_demo_file(here, (6, 7, 8, 9, 10), image_size=36,
                    actions=lambda actions, demo: actions * [*6 * [0.9], 1])
    with pytest.raises(ValueError, match=r"other demonstrations \(soup_demo.hdf5: other actions"):
        trainer(moved, here).fit()


# --- precision and device -----------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [
    ("fp32", "fp16"), ("bf16", "fp16"), ("fp16", "fp32"), ("fp16", "bf16"), ("fp32", "bf16")])
@pytest.mark.parametrize("interrupt", [out_of_time_in_an_epoch, out_of_time_after_an_epoch])
def test_a_run_resumes_in_another_precision_and_reports_it(small_run, monkeypatch, capsys, before,
                                                           after, interrupt):
    """As with ``auto`` on another machine."""
    meant = {"auto": before}
    monkeypatch.setattr(train, "choose_precision", lambda precision, device: (
        meant.get(precision, precision)))
    settings = dict(precision="auto", epochs=3, ema_decay=0.9)
    interrupt(small_run("run", **settings), monkeypatch)
    assert "resumes in" not in capsys.readouterr().out
    meant["auto"] = after
    trainer = small_run("run", True, **settings)
    rows = trainer.fit()
    assert [row["precision"] for row in rows] == [before, after, after]
    assert f"trained in {before} and resumes in {after}" in capsys.readouterr().out
    expected, _ = once(straight, small_run, **settings | {"precision": "fp32"})
    assert np.allclose(losses(rows), losses(expected), rtol=0.05)


def test_precision_changes_the_computation(small_run):
    """Rounding tells them apart: fp32 keeps 24 bits, fp16 11, bf16 8."""
    found = {precision: small_run(precision, precision=precision).validate()["loss"]
             for precision in ("fp32", "fp16", "bf16")}
    assert len(set(found.values())) == 3
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)
    assert found["fp16"] == pytest.approx(found["fp32"], rel=0.003)
    assert small_run("scaled", precision="fp16").scaler.is_enabled()
    assert not small_run("unscaled", precision="bf16").scaler.is_enabled()


def test_training_continues_when_compiling_fails(small_run, monkeypatch, capsys):
    def broken(function):
        def fail(*_):
            raise RuntimeError("no C++ compiler\nlong trace")
        return fail

    expected = losses(small_run("eager").fit())
    monkeypatch.setattr(torch, "compile", broken)
    assert losses(small_run("broken", compile=True).fit()) == expected
    assert "torch.compile failed (RuntimeError: no C++ compiler)" in capsys.readouterr().out


class _FailsBackward(torch.autograd.Function):
    """Like a graph that is compiled at the first backward pass."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("backward: no C++ compiler")


def test_training_continues_when_compiling_the_backward_pass_fails(small_run, monkeypatch, capsys):
    """Random numbers and gradients are restored: the losses equal those of eager mode."""
    settings = dict(variant="act", image_size=64)
    expected = losses(small_run("eager", **settings).fit())

    def broken(function):
        def compiled(*given):
            loss, parts = function(*given)
            return _FailsBackward.apply(loss) + loss, parts
        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    assert losses(small_run("broken", compile=True, **settings).fit()) == expected
    assert capsys.readouterr().out.count("torch.compile failed (RuntimeError: backward: no") == 1


# --- settings -----------------------------------------------------------------------------------


def test_initial_weights_depend_on_the_seed_alone(small_run):
    def weights(name, seed):
        return small_run(name, seed=seed).policy.state_dict()

    first = weights("a", 0)
    torch.manual_seed(12345)  # whatever was sampled before
    again, other = weights("b", 0), weights("c", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.hidden.weight"], other["head.hidden.weight"])


def test_steps_use_training_mode_and_validation_evaluation_mode(small_run, monkeypatch):
    trainer = small_run(ema_decay=0.0)
    loss, modes = trainer.policy.loss, []
    monkeypatch.setattr(trainer.policy, "loss", lambda batch, *given: (
        modes.append((len(batch["mask"]), trainer.policy.training)) or loss(batch, *given)))
    trainer.fit()
    steps, validations = (math.ceil(len(data) / 8) for data in (trainer.train_data,
                                                                trainer.val_data))
    epoch = [True] * steps + [False] * validations
    assert [training for _, training in modes] == epoch * 2 and steps > 1


def test_weight_decay_is_decoupled(small_run):
    """AdamW (arXiv 1711.05101): weights shrink by lr times the decay, apart from the gradient."""
    after = []
    for decay in (0.0, 0.5):
        trainer = small_run(f"decay{decay}", weight_decay=decay, lr=0.1)
        before = trainer.policy.head.hidden.weight.detach().clone()
        trainer._step(next(trainer.train_data.batches(8, 0, 0)))
        after.append(trainer.policy.head.hidden.weight.detach())
    torch.testing.assert_close(after[1] - after[0], -0.1 * 0.5 * before, atol=1e-6, rtol=1e-4)


def test_each_step_has_the_gradient_of_its_batch_alone(small_run):
    trainer = small_run(lr=1e-12, weight_decay=0.0, augmentation="none")
    norms = [trainer._step(next(trainer.train_data.batches(8, 0, 0)))[1].item() for _ in range(3)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


@pytest.mark.filterwarnings("error")  # PyTorch suspects the order of optimizer and schedule
def test_an_overflowing_gradient_is_skipped_and_the_scale_halved(small_run):
    trainer = small_run(precision="fp16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: weight.clone() for name, weight in trainer.policy.state_dict().items()}
    trainer._step(next(trainer.train_data.batches(8, 0, 0)))
    assert all(torch.equal(weight, before[name])
               for name, weight in trainer.policy.state_dict().items())
    assert trainer.scaler.get_scale() == 2.0**39


def test_the_loss_is_the_configured_one(small_run, monkeypatch):
    found = {loss: small_run(loss, loss=loss, gripper="continuous").validate()["loss"]
             for loss in ("mse", "l1", "mix")}
    assert found["mix"] == pytest.approx((found["mse"] + found["l1"]) / 2, rel=1e-5)
    assert found["mse"] != pytest.approx(found["l1"], rel=1e-2)
    monkeypatch.setattr(model, "GRIPPER_WEIGHT", 0.7)
    values = small_run("heavy", gripper="classifier").validate()
    assert values["loss"] == pytest.approx(values["action"] + 0.7 * values["gripper"], rel=1e-5)


@pytest.mark.parametrize("settings", [
    dict(), dict(halting="adaptive", ponder_cost=0.1), dict(halting="remainder"),
    dict(variant="trm", image_size=64, deep_supervision=True, halting="learned",
         gripper="classifier"),
    dict(variant="trm", image_size=64, deep_supervision=True, cycles=1, latent_updates=1),
])
def test_training_and_validation_loss_are_the_same_quantity(small_run, settings):
    """Equal on the same samples with constant weights."""
    trainer = small_run(lr=1e-12, batch_size=40, epochs=1, augmentation="none", **settings)
    trainer.val_data = trainer.train_data
    (row,) = trainer.fit()
    assert row["train_loss"] == pytest.approx(row["val_loss"], rel=1e-5)
    is_minimised = row["objective"] == pytest.approx(row["train_loss"], rel=1e-5)
    assert is_minimised == ("deep_supervision" not in settings)


def test_all_processes_stop_by_the_main_process_loss(small_run, monkeypatch):
    """Losses differ in the last digits between processes; patience would stop them apart."""
    trainer = small_run(epochs=5, patience=2)
    said = iter([0.5, 0.25, 0.26, 0.27])
    monkeypatch.setattr(trainer.team, "broadcast",
                        lambda value: next(said) if 0 < value < 1 else value)
    monkeypatch.setattr(train.BehaviorCloningTrainer, "_loss", lambda trainer, compute, batch: (
        torch.tensor(0.9, requires_grad=True), {"final": torch.tensor(0.9)}))
    monkeypatch.setattr(trainer, "_time_is_up", lambda: False)
    rows = trainer.fit()
    assert [row["val_loss"] for row in rows] == [0.5, 0.25, 0.26, 0.27] and trainer.finished


def test_averaged_weights_are_validated_and_saved(small_run):
    trainer = small_run(ema_decay=0.75, epochs=2, batch_size=40)  # two updates
    step, weights = trainer._step, []

    def watch(batch):
        done = step(batch)
        weights.append(trainer.policy.head.output.weight.detach().clone())
        return done

    trainer._step = watch
    rows = trainer.fit()
    # the average begins with the weights after the first update (PyTorch's AveragedModel)
    expected = 0.75 * weights[0] + 0.25 * weights[1]
    saved = load_file(trainer.run / "last.safetensors")
    assert torch.allclose(saved["head.output.weight"], expected, atol=1e-7)
    assert not torch.allclose(expected, weights[1], atol=1e-7)
    assert trainer.lowest_epoch == 2  # so they are the best ones too
    best = load_file(trainer.run / "best.safetensors")
    assert all(torch.equal(best[name], saved[name]) for name in saved)
    trainer.policy.load_state_dict(saved)
    trainer.averaged = trainer.policy
    assert trainer.validate()["loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6)


def test_validation_does_not_depend_on_the_batch_size(small_run):
    """With chunks, batches differ in the number of valid actions."""
    values = [small_run(f"b{size}", batch_size=size, chunk=4, gripper="classifier").validate()
              for size in (3, 40)]
    assert values[0].keys() == {"loss", "action", "gripper"}
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0]["loss"] == pytest.approx(
        values[0]["action"] + 0.1 * values[0]["gripper"], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_epoch(small_run):
    small_run("run", epochs=3, max_minutes=1e-9).fit()
    trainer = small_run("run", resume=True, epochs=3)
    good = (trainer.run / "last.safetensors").read_bytes()
    step = trainer._step

    def explode(batch):
        with torch.no_grad():
            trainer.policy.head.hidden.weight.fill_(float("nan"))
        return step(batch)

    trainer._step = explode
    with pytest.raises(RuntimeError, match=r"epoch 2: the training loss went from 0\.\d+ in the "
                                           r"first step to nan.*not finite: encoders.*lr=0\.001"
                                           r".*keeps the last complete epoch"):
        trainer.fit()
    assert (trainer.run / "last.safetensors").read_bytes() == good
    assert len(read_jsonl(trainer.run / "metrics.jsonl")) == 1
    assert len(small_run("run", resume=True, epochs=3).fit()) == 3


@pytest.mark.parametrize(("after", "message"), [
    (lambda weight: weight.fill_(float("nan")), "not finite: head.output.weight"),
    (lambda weight: weight.mul_(1e12), r"from 0\.\d+ in the first step to \d\.\d+e\+1\d"),
])
def test_a_diverged_state_within_an_epoch_is_not_saved(small_run, monkeypatch, after, message):
    """The weights break after the second step of epoch 2; a state is saved after every step."""
    trainer, steps = small_run("run", epochs=3), itertools.count(1)
    step = trainer._step

    def break_down(batch):
        done = step(batch)
        if next(steps) == trainer.steps_per_epoch + 2:
            with torch.no_grad():
                after(trainer.policy.head.output.weight)
        return done

    trainer._step = break_down
    monkeypatch.setattr(train, "_CHECK_EVERY", 1)
    monkeypatch.setattr(train, "_SAVE_EVERY", 0.0)
    with pytest.raises(RuntimeError, match=f"epoch 2: .*{message}"):
        trainer.fit()
    state = runs.load_training_state(trainer.run)
    assert state["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in state["policy"].values())
    if "not finite" in message:  # weights that diverged but are finite are noticed by the next loss
        assert len(state["measured"]) == 1
        assert losses(small_run("run", resume=True, epochs=3).fit()) == losses(
            small_run("straight", epochs=3).fit())


def test_divergence_in_the_first_epoch_stops_training(small_run, monkeypatch):
    """All losses are finite."""
    monkeypatch.setattr(train, "GRAD_CLIP", 1e6)
    with pytest.raises(RuntimeError, match="epoch 1: the training loss went from"):
        small_run("run", epochs=2, lr=1e6, normalize_actions="zscore", loss="mse").fit()


def test_an_epoch_of_skipped_updates_alone_stops_training(small_run):
    """As in fp16, where the scaler skips an update whose gradient overflows."""
    norms = iter([2.0, math.inf, 4.0, math.inf, math.nan, math.inf])
    trainer = small_run(epochs=2, batch_size=11)
    assert trainer.steps_per_epoch == 3
    trainer._step = lambda batch: tuple(map(torch.tensor, (0.5, next(norms), 0.5)))
    with pytest.raises(RuntimeError, match="epoch 2: the gradient is nan"):
        trainer.fit()
    (row,) = read_jsonl(trainer.run / "metrics.jsonl")
    assert row["grad_norm"] == 3.0


PAPERS = dict(variant="trm", image_size=64, latent_updates=2, cycles=2)
DEEP = PAPERS | dict(deep_supervision=True)
LONG = dict(num_recursions=4, convergence_threshold=1e9)  # convergence halts at the second of four
RULES_AND_HEADS = [  # settings, and what changes the training or the actions
    *(({}, dict(halting=halting)) for halting in ("remainder", "adaptive", "learned")),
    *((PAPERS, dict(halting=halting)) for halting in ("remainder", "adaptive")),
    (PAPERS, dict(deep_supervision=True)), (DEEP, dict(halting="learned")),
    *((settings | LONG, dict(halting="convergence")) for settings in ({}, DEEP)),
    *(({}, dict(gripper=gripper)) for gripper in schema.GRIPPERS if gripper != "classifier"),
    *((dict(image_size=64), dict(variant=variant)) for variant in schema.VARIANTS[1:]),
    ({}, dict(conditioning="task_id")), ({}, dict(carry_over=True)),
    ({}, dict(temporal_ensembling=True)),
]


def one_epoch(small_run, **settings):
    """The losses of an epoch, then the numbers of three actions."""
    trainer = small_run(f"run{len(settings)}", epochs=1, **settings)
    (row,) = trainer.fit()
    assert row["grad_norm"] > 0
    policy = load_policy(trainer.run).to(trainer.device)
    assert next(policy.parameters()).device.type == trainer.device.type
    seen = {**dict.fromkeys(schema.CAMERAS, np.full((64, 64, 3), 100, np.uint8)),
            "joint_states": np.zeros(7), "gripper_states": np.array([0.04, -0.04]),
            "ee_pos": np.zeros(3), "task_id": 0}
    policy.reset()
    actions = np.stack([policy.act(seen) for _ in range(3)])
    assert actions.shape == (3, 7) and np.abs(actions).max() <= 1 <= policy.last_recursions
    numbers = [row["train_loss"], row["val_loss"], *actions.ravel()]
    assert np.isfinite(numbers).all()
    return numbers


def differ(one, other):
    """By more than a GPU's arithmetic from call to call."""
    return not np.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("settings", "change"), RULES_AND_HEADS + [({}, change) for change in (
    dict(loss="mse"), dict(loss="mix"), dict(proprioception=False), dict(chunk=1),
    dict(sequence_length=3, frame_stride=1), dict(precision="bf16"), dict(precision="fp16"),
    dict(normalize_actions="minmax"), dict(augmentation="none"), dict(ema_decay=0.9),
    dict(cameras=["eye_in_hand_rgb"]))], ids=str)
def test_every_option_changes_the_training_or_the_actions(small_run, settings, change):
    plain, changed = (once(one_epoch, small_run, **each) for each in (settings, settings | change))
    assert differ(plain, changed)


def test_device_and_precision(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu and choose_precision("fp32", cpu) == "fp32"
    assert choose_precision("auto", cpu) in ("fp32", "bf16")
    for native, expected in ((True, "bf16"), (False, "fp16")):  # a T4 emulates bf16 slowly
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation, own=native: including_emulation or own)
        assert choose_precision("auto", torch.device("cuda")) == expected
    assert choose_device("auto") == cpu
    with pytest.raises(ValueError, match="finds no CUDA GPU"):
        choose_device("cuda")


def test_a_gpu_without_kernels_in_this_pytorch_is_left_alone(monkeypatch, capsys):
    """Kaggle's P100 counts as available; its first operation raises."""
    def no_kernel(*_, device):
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch, "ones", no_kernel)
    for cached in (gpu_fault, say_cpu):
        cached.cache_clear()
    try:
        assert choose_device("cpu").type == "cpu" and not capsys.readouterr().out
        assert choose_device("auto").type == "cpu"
        said = capsys.readouterr().out
        assert choose_device("auto").type == "cpu" and not capsys.readouterr().out
        with pytest.raises(ValueError, match="device='cuda' is not valid here; PyTorch .* cannot "):
            choose_device("cuda")
        assert _check_gpu().status == "warn" and "GPU T4 x2" in _check_gpu().hint
        assert worker_environments(Config()) == [{}]
    finally:
        gpu_fault.cache_clear()
    assert "cannot compute on Tesla P100-PCIE-16GB (CUDA error: no kernel image is available)" \
           in said and "GPU T4 x2" in said and "more lines" not in said


def test_tf32_is_of_training_on_a_gpu_alone():
    for device, inside in (("cuda", "high"), ("cpu", "highest")):
        with tf32(torch.device(device)):
            assert torch.get_float32_matmul_precision() == inside
        assert torch.get_float32_matmul_precision() == "highest"


def test_training_loads_no_simulator(tmp_path):
    """Also with instructions, whose embeddings come from the table."""
    file = write_demo_file(tmp_path / "soup_demo.hdf5", (6, 7, 8), image_size=36)
    with h5py.File(file, "a") as content:
        content["data"].attrs["problem_info"] = '{"language_instruction": "Turn on the stove"}'
    code = f"""
import sys
from trm_helpers.config import from_flat
from trm_helpers.training import runs, train
config = from_flat("tiny", conditioning="language", num_demos=3, hidden_dim=16, image_size=36,
                   cameras=("agentview_rgb",), chunk=2, execution_horizon=1, epochs=1)
trainer = train.BehaviorCloningTrainer.from_config(config, {{0: {str(file)!r}}},
                                                   runs.create_run(config, "small"))
assert len(trainer.fit()) == 1
simulators = ("trm_helpers.sim", "libero", "robosuite", "mujoco")
print("loaded:", [name for name in sys.modules if name.startswith(simulators)])
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "loaded: []" in out.stdout
