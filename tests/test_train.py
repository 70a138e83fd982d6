import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trm_helpers import train
from trm_helpers.files import read_jsonl
from trm_helpers.train import choose_device, choose_precision


def losses(rows):
    return [(row["train_loss"], row["val_loss"]) for row in rows]


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(small_run):
    first, again, other = (small_run(name, seed=seed).fit()
                           for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert losses(first) == losses(again) != losses(other)
    assert [row["epoch"] for row in first] == [1, 2]


def test_one_batch_is_learned_by_heart(small_run):
    trainer = small_run(hidden_dim=64, batch_size=8, epochs=100, lr=1e-3, augmentation="none")
    batch = next(trainer.train_data.batches(8, 0, 0))
    history = [trainer._step(batch)[0].item() for _ in range(300)]
    assert history[-1] < 0.1 * history[0]


@pytest.mark.parametrize("broken", [None, "save_training_state"])
def test_resumed_equals_straight_to_the_bit(small_run, monkeypatch, broken):
    settings = dict(ema_decay=0.9, epochs=4, augmentation="shift")
    straight = small_run("straight", **settings)
    expected = straight.fit()

    interrupted = small_run("resumed", **settings)
    if broken:  # killed between the row of epoch 3 and its training state
        save, calls = train.save_training_state, []

        def die(run, state):
            calls.append(state["epoch"])
            if len(calls) == 3:
                raise KeyboardInterrupt
            save(run, state)

        monkeypatch.setattr(train, "save_training_state", die)
        with pytest.raises(KeyboardInterrupt):
            interrupted.fit()
        monkeypatch.setattr(train, "save_training_state", save)
        assert len(read_jsonl(interrupted.run / "metrics.jsonl")) == 3
    else:
        interrupted.config = type(interrupted.config)(**{
            **vars(interrupted.config), "max_minutes": 1e-9})
        assert len(interrupted.fit()) == 1

    resumed = small_run("resumed", resume=True, **settings)
    assert losses(resumed.fit()) == losses(expected)
    for name in ("best", "last"):
        weights = [load_file(run / f"{name}.safetensors") for run in (straight.run, resumed.run)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_cosine_annealing_reaches_min_lr_at_the_end(small_run):
    trainer = small_run(epochs=4, lr=1e-3, min_lr=1e-6)
    rates = [row["lr"] for row in trainer.fit()]
    # cosine from 1e-3 to 1e-6: after a quarter (1 + cos 45 deg) / 2 of the way is left
    expected = [1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]
    assert np.allclose(rates, expected, rtol=1e-6) and rates[-1] == pytest.approx(1e-6)


def test_gradients_are_clipped_to_the_norm(small_run):
    trainer = small_run(grad_clip=1e-3, batch_size=40)
    _, norm = trainer._step(next(trainer.train_data.batches(40, 0, 0)))
    after = torch.stack([p.grad.norm() for p in trainer.policy.parameters() if p.grad is not None])
    assert norm > 1e-2 and after.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_early_stopping_and_the_best_weights(small_run, monkeypatch):
    trainer = small_run(epochs=9, patience=2)
    scripted = iter([0.5, 0.3, 0.4, 0.35, 0.1])
    saved = []

    def validate():
        saved.append({k: v.clone() for k, v in trainer.policy.state_dict().items()})
        return {"loss": next(scripted), "action": 0.0}

    monkeypatch.setattr(trainer, "validate", validate)
    rows = trainer.fit()
    assert [row["val_loss"] for row in rows] == [0.5, 0.3, 0.4, 0.35]
    best = load_file(trainer.run / "best.safetensors")
    assert all(torch.equal(best[key], saved[1][key]) for key in best)


def test_averaged_weights_are_what_is_validated_and_saved(small_run):
    trainer = small_run(ema_decay=0.5, epochs=1, batch_size=40)  # one update
    before = {k: v.clone() for k, v in trainer.policy.state_dict().items()}
    trainer.fit()
    # the first update copies the weights into the average (PyTorch's AveragedModel)
    last = load_file(trainer.run / "last.safetensors")
    now = trainer.policy.state_dict()
    assert all(torch.allclose(last[k], now[k]) for k in now)
    assert any(not torch.equal(before[k], now[k]) for k in now)
    batch = next(trainer.train_data.batches(40, 0, 0))
    trainer._step(batch)
    trainer._step(batch)
    averaged = trainer.ema.module.state_dict()
    weight = "head.output.weight"
    assert not torch.equal(averaged[weight], trainer.policy.state_dict()[weight])


def test_a_loss_that_is_not_finite_stops_with_a_diagnosis_and_keeps_the_last_epoch(small_run):
    small_run("run", epochs=3, max_minutes=1e-9).fit()
    trainer = small_run("run", resume=True, epochs=3)
    good = (trainer.run / "last.safetensors").read_bytes()
    step = trainer._step

    def explode(batch):
        with torch.no_grad():
            trainer.policy.head.hidden.weight.fill_(float("nan"))
        return step(batch)

    trainer._step = explode
    with pytest.raises(RuntimeError, match=r"not finite in epoch 2 .*weights with NaN: .*lr=0.001"):
        trainer.fit()
    assert (trainer.run / "last.safetensors").read_bytes() == good
    assert len(read_jsonl(trainer.run / "metrics.jsonl")) == 1


@pytest.mark.parametrize("settings", [
    dict(loss="mse"), dict(loss="l1"), dict(loss="mix"),
    dict(gripper="continuous"), dict(gripper="threshold"), dict(gripper="classifier"),
    dict(gripper="mixture"), dict(halting="fixed"), dict(halting="remainder"), dict(halting="act"),
    dict(proprioception=False), dict(num_tasks=3), dict(chunk=1), dict(sequence_length=3),
    dict(precision="bf16"), dict(normalize_actions="minmax"), dict(augmentation="reference"),
])
def test_every_option_trains(small_run, settings):
    rows = small_run(epochs=1, **settings).fit()
    assert len(rows) == 1 and math.isfinite(rows[0]["train_loss"]) and rows[0]["grad_norm"] > 0


def test_online_tracking_without_a_key_goes_offline(small_run, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = small_run(epochs=1, wandb_mode="online")
    trainer.fit()
    assert "no W&B key found: logging offline" in capsys.readouterr().out
    (folder,) = (trainer.run / "wandb").glob("offline-run-*")
    assert any(path.suffix == ".wandb" for path in folder.iterdir())


def test_device_and_precision():
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu and choose_precision("fp32", cpu) == "fp32"
    assert choose_precision("auto", cpu) in ("fp32", "bf16")
    if not torch.cuda.is_available():
        assert choose_device("auto") == cpu
        with pytest.raises(ValueError, match="finds no CUDA GPU"):
            choose_device("cuda")
