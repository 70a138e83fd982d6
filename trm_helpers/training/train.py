"""Behaviour cloning: regression of a policy onto the demonstrators' actions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from .. import schema
from ..config import Config, TrainConfig
from ..data.dataset import LIBERODataset
from ..files import append_jsonl, atomic_path, read_jsonl
from ..policy.model import TRMPolicy
from .distributed import Team
from .runs import (
    load_training_state,
    only_writer,
    refuse_other_data,
    refuse_other_settings,
    save_description,
    save_training_state,
    save_weights,
)
from .tracking import Tracker

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CHECK_EVERY = 16  # steps between checks of the clock and the loss
_SAVE_EVERY = 300.0  # seconds between states saved within an epoch
_DIVERGED = 100.0  # times the loss of the first step


class BehaviorCloningTrainer:
    """Train a policy on demonstrations; the run folder is complete after every epoch.

    AdamW, gradient clipping, cosine annealing over all steps down to ``min_lr``, early stopping on
    the validation loss. ``best`` and ``last`` hold averaged weights where ``ema_decay`` is set.
    :meth:`fit` resumes from the folder's training state, also within an epoch; with the same data,
    settings and machine the losses equal those of an uninterrupted run. Under ``torchrun`` each
    process takes its share of every batch, so settings do not depend on the number of GPUs.

    Args:
        policy: trained in place.
        train_data, val_data: the two splits, from :meth:`LIBERODataset.train_val`.
        config: a :class:`TrainConfig`.
        run: folder from :func:`runs.create_run`.
        roll_out: success rate of the run's ``last`` weights, required by ``rollout_every``; the
            ``best`` weights then have the highest success rate and, among equals, the lowest
            validation loss.
    """

    def __init__(self, policy: TRMPolicy, train_data: LIBERODataset, val_data: LIBERODataset,
                 config: TrainConfig, run: str | Path,
                 roll_out: Callable[[], float] | None = None):
        if config.rollout_every and roll_out is None:
            raise ValueError(f"rollout_every={config.rollout_every} needs rollouts; expected "
                             "roll_out, for example evaluation.evaluate.selection_rate")
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.run = Path(run)
        self.roll_out = roll_out
        self.train_data, self.val_data = train_data, val_data
        self.team = Team(choose_device(config.device).type)
        self.device = self.team.device
        self.precision = choose_precision(config.precision, self.device)
        self.policy = policy.to(self.device)
        self.ema = None
        if config.ema_decay:
            self.ema = AveragedModel(self.policy, use_buffers=True,
                                     multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self._compiled = torch.compile(self.policy.loss) if config.compile else None
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=config.lr,
                                           weight_decay=config.weight_decay)
        self.steps_per_epoch = math.ceil(len(train_data) / config.batch_size)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, config.epochs * self.steps_per_epoch, eta_min=config.min_lr)
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**10,
                                           enabled=self.precision == "fp16")
        self.epoch = 0  # complete epochs
        self._rows: list[dict] = []  # of metrics.jsonl
        self._measured: list[tuple[torch.Tensor, ...]] = []  # results of _step in the current epoch
        self._seconds = 0.0  # spent on them
        self._first_loss: float | None = None  # before the first update
        self.best_score = (-1.0, -math.inf)  # success rate, -validation loss
        self.lowest_loss, self.lowest_epoch = math.inf, 0  # of validation, for patience

    @classmethod
    def from_config(cls, config: Config, files: dict[int, Path], run: str | Path,
                    roll_out: Callable[[], float] | None = None,
                    localizer: Callable | None = None) -> BehaviorCloningTrainer:
        """Load the data, then :meth:`from_data`.

        ``files`` is one demonstration file per task id, as ``collect.ensure_demonstrations`` gives.
        """
        data = LIBERODataset.from_config(files, config)
        return cls.from_data(config, *data, run, roll_out, localizer)

    @classmethod
    def from_data(cls, config: Config, train_data: LIBERODataset, val_data: LIBERODataset,
                  run: str | Path, roll_out: Callable[[], float] | None = None,
                  localizer: Callable | None = None) -> BehaviorCloningTrainer:
        """Trainer of a seeded policy on loaded data.

        Args:
            localizer: needed where ``config.data.scenes`` is set; called with the descriptions of
                both splits, ``device`` and ``precision``, it returns the keypoints' names and a
                trained :class:`Localizer`, for example
                ``partial(keypoints.trained_localizer, run, config)``.

        Raises:
            ValueError: ``scenes`` without ``localizer``; another process has since stored other
                settings in the run folder.
        """
        if config.data.scenes and localizer is None:
            raise ValueError(f"scenes={config.data.scenes} needs a localizer; expected localizer, "
                             "for example partial(keypoints.trained_localizer, run, config)")
        refuse_other_settings(Path(run), config)
        torch.manual_seed(config.train.seed)
        model = config.model
        if config.data.scenes:
            torch.set_num_threads(config.train.num_threads or torch.get_num_threads())
            device = choose_device(config.train.device)
            names, locator = localizer(
                train_data.describe(), val_data.describe(), device=device,
                precision=choose_precision(config.train.precision, device))
            model = dataclasses.replace(model, keypoints=names, keypoint_tasks=len(locator.known))
        policy = TRMPolicy(model, train_data.normalizer, train_data.proprio_stats)
        if config.data.scenes:
            policy.encoders[schema.STILL_CAMERA].locator = locator.requires_grad_(False)
        return cls(policy, train_data, val_data, config.train, run, roll_out)

    def fit(self) -> list[dict]:
        """Train until ``epochs``, ``patience`` or ``max_minutes`` is reached.

        The training state is saved every five minutes, after every epoch and when the time is up.
        The first epoch is always completed, so that the run has weights.

        Returns:
            the rows of ``metrics.jsonl``: epoch, train_loss and val_loss (of the final answer, see
            :meth:`TRMPolicy.loss`), objective (minimised in training), the parts of the validation
            loss, lr, grad_norm (mean, before clipping), precision, seconds, samples_per_second.

        Raises:
            RuntimeError: another process writes into the run folder, or training diverged: the
                loss or a weight is not finite, the loss is a hundred times that of the first step,
                or no gradient of an epoch was finite. The run folder keeps the last complete epoch
                and an earlier training state.
        """
        self.team.barrier()
        self._began = self._saved = time.perf_counter()
        with only_writer(self.run) if self.team.is_main else contextlib.nullcontext():
            self._resume()
            if self.team.is_main:
                save_description(self.run, self.policy, self.train_data)
            with self._tracker() as tracker, self._progress() as bar:
                while not self.finished:
                    if self._time_is_up() or not self._run_steps(bar):
                        break
                    self._rows.append(self._end_epoch(bar))
                    self._save_weights(self._rows[-1])
                    if self.team.is_main:
                        append_jsonl(self.run / "metrics.jsonl", self._rows[-1])
                    self._save_state()
                    tracker.log(self._rows[-1])
            self.team.barrier()
        return list(self._rows)

    @property
    def finished(self) -> bool:
        """Whether the last epoch (``stop_epoch`` where set) or the patience is reached."""
        return self.epoch >= self._last_epoch or self._patience_is_over()

    @property
    def _last_epoch(self) -> int:
        return self.config.stop_epoch or self.config.epochs

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss and parts over the valid actions of the validation split.

        With averaged weights where ``ema_decay`` is set.
        """
        model = self._averaged.eval()
        totals: dict[str, float] = {}
        actions = 0.0
        batches = self.val_data.batches(self.config.batch_size, 0, 0, shuffle=False,
                                        device=self.device)
        for batch in batches:
            loss, parts = self._loss(model.loss, batch)
            parts.pop("final")  # in evaluation mode, the loss itself
            weight = float(batch["mask"].sum())
            actions += weight
            for name, value in {"loss": loss, **parts}.items():
                totals[name] = totals.get(name, 0.0) + weight * float(value)
        # the main process's value, so that all processes stop at the same epoch
        return {name: self.team.broadcast(total / actions) for name, total in totals.items()}

    @property
    def _averaged(self) -> TRMPolicy:
        """The policy to validate and save."""
        return self.ema.module if self.ema else self.policy

    # --- one epoch --------------------------------------------------------------------------------

    def _run_steps(self, bar: tqdm) -> bool:
        """Run the remaining updates of the epoch; False if the time is up before the last."""
        self.policy.train()
        done = len(self._measured)
        batches = self.train_data.batches(self.config.batch_size, self.config.seed, self.epoch,
                                          device=self.device, start=done,
                                          part=(self.team.rank, self.team.size))
        started = time.perf_counter() - self._seconds
        for batch in batches:
            self._measured.append(self._step(batch))
            if self._first_loss is None:
                self._first_loss = self._measured[0][0].item()
            bar.update()
            if len(self._measured) % _CHECK_EVERY == 0:
                self._stop_if_broken()
                self._seconds = time.perf_counter() - started
                if self._time_is_up():
                    self._save_state()
                    return False
                if self.team.broadcast(time.perf_counter() - self._saved) > _SAVE_EVERY:
                    self._save_state()
        self._seconds = time.perf_counter() - started
        return True

    def _end_epoch(self, bar: tqdm) -> dict:
        """Validate; the row for ``metrics.jsonl``."""
        self._stop_if_broken()
        objectives, norms, losses = map(torch.stack, zip(*self._measured, strict=True))
        train_loss = losses.mean().item()
        grad_norm = norms[norms.isfinite()].mean().item()  # fp16 skips steps that overflow
        validation = self.validate()
        for name, value in (("validation loss", validation["loss"]), ("gradient", grad_norm)):
            if not math.isfinite(value):
                raise RuntimeError(self._diagnosis(f"the {name} is {value}"))
        seconds, self._measured, self._seconds = self._seconds, [], 0.0
        self.epoch += 1
        bar.set_postfix(epoch=self.epoch, train=f"{train_loss:.4f}",
                        val=f"{validation['loss']:.4f}")
        return {
            "epoch": self.epoch, "train_loss": train_loss, "val_loss": validation.pop("loss"),
            **{f"val_{name}": value for name, value in validation.items()},
            "objective": objectives.mean().item(),
            "lr": self.scheduler.get_last_lr()[0],
            "grad_norm": grad_norm,
            "precision": self.precision,
            "seconds": round(seconds, 3),
            "samples_per_second": round(len(self.train_data) / seconds, 1),
        }

    def _step(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One update; returns objective, gradient norm before clipping and final answer's loss."""
        share = self.team.loss_weight(batch["mask"].sum())
        objective, parts = self._backward(batch, share)
        self.team.average_gradients(self.policy.parameters())
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.ema:
            self.ema.update_parameters(self.policy)
        whole = self.team.sum(share * torch.stack([objective.detach(), parts["final"]]))
        return whole[0] / self.team.size, norm.detach(), whole[1] / self.team.size

    def _backward(self, batch: dict, share: torch.Tensor | float):
        """Compute :meth:`TRMPolicy.loss` and its gradient.

        ``torch.compile`` compiles the backward pass on first use; if either pass fails, both are
        repeated without it, with the same random numbers.
        """
        if self._compiled is not None:
            generators = _generators()
            try:
                return self._backward_through(self._compiled, batch, share)
            except Exception as error:  # of any type, from the compiler or its C++ toolchain
                reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                print(f"torch.compile failed ({type(error).__name__}: {reason}); "
                      "continuing without it")
                self._compiled = None
                _set_generators(*generators)
        return self._backward_through(self.policy.loss, batch, share)

    def _backward_through(self, compute: Callable, batch: dict, share: torch.Tensor | float):
        self.optimizer.zero_grad(set_to_none=True)
        objective, parts = self._loss(compute, batch)
        self.scaler.scale(objective * share).backward()
        return objective, parts

    def _loss(self, compute: Callable, batch: dict):
        autocast = contextlib.nullcontext()
        if self.precision in _AUTOCAST:
            autocast = torch.autocast(self.device.type, dtype=_AUTOCAST[self.precision])
        with autocast:
            return compute(batch, self.config.loss, self.config.gripper_weight)

    def _stop_if_broken(self) -> None:
        """Raise in every process before a diverged state is saved."""
        recent = torch.stack([step[0] for step in self._measured[-_CHECK_EVERY:]]).mean().item()
        finite = math.isfinite(recent) and not self._broken_weights()
        if self.team.any(not finite or recent > _DIVERGED * self._first_loss):
            raise RuntimeError(self._diagnosis(
                f"the training loss went from {self._first_loss:.3g} in the first step to "
                f"{recent:.3g}"))

    def _broken_weights(self) -> list[str]:
        return [name for name, value in self.policy.named_parameters()
                if not value.isfinite().all()]

    def _diagnosis(self, problem: str) -> str:
        norms = torch.stack([step[1] for step in self._measured])
        return (f"training diverged in epoch {self.epoch + 1}: {problem} (largest gradient norm "
                f"{norms.max():.3g}; weights that are not finite: "
                f"{', '.join(self._broken_weights()[:3]) or 'none'}). Lower "
                f"lr={self.config.lr:g} or use precision='fp32'; {self.run} keeps the last "
                "complete epoch")

    # --- run folder -------------------------------------------------------------------------------

    def _time_is_up(self) -> bool:
        minutes = self.team.broadcast((time.perf_counter() - self._began) / 60)
        return self.epoch > 0 and 0 < self.config.max_minutes <= minutes

    def _patience_is_over(self) -> bool:
        return bool(self.config.patience) and self.epoch - self.lowest_epoch >= self.config.patience

    def _save_weights(self, row: dict) -> None:
        """Save ``last`` and ``best``; a row of an epoch with rollouts gets ``success_rate``."""
        weights = self._averaged.state_dict()
        if self.team.is_main:
            save_weights(self.run, weights, "last")
        every = self.config.rollout_every
        if every and (self.epoch % every == 0 or self.epoch == self.config.epochs):
            row["success_rate"] = self.team.broadcast(self.roll_out() if self.team.is_main else 0.0)
        if row["val_loss"] < self.lowest_loss:
            self.lowest_loss, self.lowest_epoch = row["val_loss"], self.epoch
        score = (row.get("success_rate", -1.0), -row["val_loss"])
        if score > self.best_score:
            self.best_score = score
            if self.team.is_main:
                save_weights(self.run, weights, "best")

    def _save_state(self) -> None:
        self._saved = time.perf_counter()
        if not self.team.is_main:
            return
        save_training_state(self.run, {
            "epoch": self.epoch, "best_score": self.best_score,
            "lowest_loss": self.lowest_loss, "lowest_epoch": self.lowest_epoch,
            "rows": self._rows, "precision": self.precision,
            "measured": [tuple(value.item() for value in step) for step in self._measured],
            "seconds": self._seconds, "first_loss": self._first_loss,
            "policy": self.policy.state_dict(),
            "ema": self.ema.state_dict() if self.ema else {},
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            **dict(zip(("generator", "cuda_generators"), _generators(), strict=True)),
        })

    def _resume(self) -> None:
        state = load_training_state(self.run)
        if state:
            refuse_other_data(self.run, self.train_data)
        self._restore_rows(state)
        self.team.barrier()
        if not state:
            return
        self.epoch = state["epoch"]
        self.lowest_loss, self.lowest_epoch = state["lowest_loss"], state["lowest_epoch"]
        self.best_score = tuple(state["best_score"])
        # states of older versions lack the third number, the final answer's loss
        self._measured = [tuple(torch.tensor(value, device=self.device)
                                for value in (*step, step[0])[:3]) for step in state["measured"]]
        self._seconds, self._first_loss = state["seconds"], state["first_loss"]
        self.policy.load_state_dict(state["policy"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        for name in ("optimizer", "scheduler", "scaler"):
            if state[name]:  # a scaler has a state in fp16 only
                getattr(self, name).load_state_dict(state[name])
        _set_generators(state["generator"], state["cuda_generators"])
        if self.epoch and self.team.is_main:
            self._restore_weights()
        before = state.get("precision", self.precision)
        if before != self.precision and self.team.is_main:
            print(f"{self.run} was trained in {before} and resumes in {self.precision}; losses "
                  "will not equal those of an uninterrupted run exactly")

    def _restore_rows(self, state: dict | None) -> None:
        """Restore ``metrics.jsonl`` from the training state; an epoch without a state is repeated.
        """
        path = self.run / "metrics.jsonl"
        if state and "rows" in state:
            self._rows = state["rows"]
        else:  # state of an older version
            done = state["epoch"] if state else 0
            self._rows = read_jsonl(path)[:done]
            if len(self._rows) < done:
                raise ValueError(f"{path} holds {len(self._rows)} of the {done} epochs trained; "
                                 "expected one line each. Put it back, or remove "
                                 "training_state.pt to train from the start")
        lines = "".join(json.dumps(row) + "\n" for row in self._rows)
        if self.team.is_main and (not path.exists() or path.read_text() != lines):
            with atomic_path(path) as temporary:
                temporary.write_text(lines)

    def _restore_weights(self) -> None:
        """Write missing ``last`` weights; ``ValueError`` for ``best``, which no state holds."""
        if not (best := self.run / "best.safetensors").exists():
            raise ValueError(f"{best} does not exist; expected the best weights of {self.epoch} "
                             "epochs. Put them back, or remove training_state.pt to train from the "
                             "start")
        if not (self.run / "last.safetensors").exists():
            save_weights(self.run, self._averaged.state_dict(), "last")

    def _progress(self) -> tqdm:
        return tqdm(total=self._last_epoch * self.steps_per_epoch, desc="training", unit="step",
                    initial=self.epoch * self.steps_per_epoch + len(self._measured),
                    disable=not self.team.is_main)

    @contextlib.contextmanager
    def _tracker(self) -> Iterator[Tracker]:
        settings = {**vars(self.policy.config), **vars(self.config)}
        mode = self.config.wandb_mode if self.team.is_main else "disabled"
        tracker = Tracker(mode, {"project": self.config.wandb_project, "name": self.run.name,
                                 "dir": str(self.run), "config": settings})
        try:
            yield tracker
        finally:
            tracker.close()


def _generators() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """States of PyTorch's CPU generator and of each GPU's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _set_generators(cpu: torch.Tensor, cuda: list[torch.Tensor]) -> None:
    torch.set_rng_state(cpu)
    for device, generator in zip(range(torch.cuda.device_count()), cuda,
                                 strict=False):  # the number of GPUs may differ
        torch.cuda.set_rng_state(generator, device)


def choose_device(device: str = "auto") -> torch.device:
    """``auto``: a CUDA GPU if available. ``ValueError`` for ``cuda`` without one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' is not valid here; PyTorch finds no CUDA GPU")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_precision(precision: str, device: torch.device) -> str:
    """``auto``: bf16 with hardware support, otherwise fp16 on a GPU and fp32 on a CPU."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp16"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if has_bf16 else "fp32"
