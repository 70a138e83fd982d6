"""Behaviour cloning: regression of a policy onto the demonstrators' actions.

In the order in which it happens: set-up, the loop (:meth:`BehaviorCloningTrainer.fit`), an epoch, a
step, validation, reasons to stop, saving and resuming.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from .. import schema
from ..config import Config, TrainConfig, local_settings, migrate
from ..data.dataset import LIBERODataset
from ..files import differences, write_bytes
from ..policy.model import TRMPolicy
from ..software import minutes_left
from . import captured, runs
from .devices import choose_device, choose_precision, random_state, set_random_state, tf32
from .distributed import Team, own_device
from .tracking import Tracker

MIN_LR = 1e-6  # where cosine annealing ends
GRAD_CLIP = 1.0  # norm of the gradient
WANDB_PROJECT = "trm-libero"  # unless $WANDB_PROJECT names another
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WITHOUT_GRADIENT = 4  # how many times larger a validation batch is on a GPU: no activations kept
_CHECK_EVERY = 16  # steps between checks of the clock and the loss
_SAVE_EVERY = 300.0  # seconds between states saved within an epoch
_REPORT_EVERY = 10  # epochs between printed lines, where there is no terminal for a progress bar
_DIVERGED = 100.0  # times the loss of the first step
# attributes of the trainer in a training state that have a state of their own
_OBJECTS = ("policy", "ema", "optimizer", "scheduler", "scaler")


class BehaviorCloningTrainer:
    """Train a policy on demonstrations; the run folder is complete after every epoch.

    AdamW, gradient clipping, cosine annealing over all steps down to 1e-6, early stopping on
    the validation loss. ``best`` and ``last`` hold averaged weights where ``ema_decay`` is set.
    :meth:`fit` resumes from the folder's training state, also within an epoch; with the same data,
    settings and machine the losses equal those of an uninterrupted run (on a GPU within rounding:
    its convolutions add in any order). On a GPU the step is a CUDA graph where it can be, see
    :mod:`captured`. Under ``torchrun`` each process takes its share of every batch: settings do not
    depend on the number of GPUs.

    Args:
        policy: trained in place.
        train_data, val_data: the two splits, from :meth:`LIBERODataset.train_val`.
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
                             "roll_out, as evaluation.evaluate.trainer_of gives it")
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.config, self.run, self.roll_out = config, Path(run), roll_out
        self.settings: Config | None = None  # all of them, which the run folder has to hold
        self.train_data, self.val_data = train_data, val_data
        self.team = Team(choose_device(config.device).type)
        self.device = self.team.device
        self.precision = choose_precision(config.precision, self.device)
        self.policy = policy.to(self.device)
        self.ema = AveragedModel(self.policy) if config.ema_decay else None
        self.averaged = self.ema.module if self.ema else self.policy  # to validate and save
        self._compiled = torch.compile(self.policy.loss) if config.compile else None
        self._captured: captured.CapturedStep | None = None
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=config.lr, weight_decay=config.weight_decay,
            fused=True if self.device.type == "cuda" else None)
        self.steps_per_epoch = math.ceil(train_data.epoch_size / config.batch_size)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, config.epochs * self.steps_per_epoch, eta_min=min(MIN_LR, config.lr))
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**10,
                                           enabled=self.precision == "fp16")
        if self.scaler.is_enabled():
            # it may skip the first update, and PyTorch would warn of a schedule that begins before
            # the optimizer; without gradients this changes nothing
            self.optimizer.step()
        self.last_epoch = config.stop_epoch or config.epochs
        self.epoch = 0  # complete epochs
        self.rows: list[dict] = []  # of metrics.jsonl
        self.measured: list[tuple[torch.Tensor, ...]] = []  # results of _step in this epoch
        self.seconds = 0.0  # spent on them
        self.first_loss: float | None = None  # before the first update
        self.best_score = (-1.0, -math.inf)  # success rate, -validation loss
        self.lowest_loss, self.lowest_epoch = math.inf, 0  # of validation, for patience

    @classmethod
    def from_config(cls, config: Config, files: dict[int, Path], run: str | Path,
                    roll_out: Callable[[], float] | None = None,
                    localizer: Callable | None = None) -> BehaviorCloningTrainer:
        """Load the data and make a seeded policy.

        Args:
            files: one demonstration file per task id, from ``collect.ensure_demonstrations``.
            localizer: returns the keypoints' names and a trained :class:`Localizer`, given the
                descriptions of both splits, ``device`` and ``precision``; required by ``scenes``,
                for example ``partial(keypoints.trained_localizer, run, config)``.

        Raises ``ValueError`` for other settings in the run folder.
        """
        if config.data.scenes and localizer is None:
            raise ValueError(f"scenes={config.data.scenes} needs a localizer; expected localizer, "
                             "for example partial(keypoints.trained_localizer, run, config)")
        runs.refuse_other_settings(Path(run), config)
        device = own_device(choose_device(config.train.device).type)
        train_data, val_data = LIBERODataset.from_config(files, config, device)
        torch.manual_seed(config.train.seed)
        model = config.model
        if config.data.scenes:
            torch.set_num_threads(config.train.num_threads or torch.get_num_threads())
            names, locator = localizer(
                train_data.describe(), val_data.describe(), device=device,
                precision=choose_precision(config.train.precision, device))
            model = dataclasses.replace(model, keypoints=names, keypoint_tasks=len(locator.known))
        policy = TRMPolicy(model, train_data.normalizer, train_data.proprio_stats)
        if config.data.scenes:
            policy.encoders[schema.STILL_CAMERA].locator = locator.requires_grad_(False)
        trainer = cls(policy, train_data, val_data, config.train, run, roll_out)
        trainer.settings = config
        return trainer

    def fit(self) -> list[dict]:
        """Train until ``epochs``, ``patience`` or ``max_minutes`` is reached, or the session ends.

        The training state is saved every five minutes, after every epoch and when the time is up.
        The first epoch is always completed, so that the run has weights.

        Returns:
            the rows of ``metrics.jsonl``: epoch, train_loss and val_loss (of the final answer, see
            :meth:`TRMPolicy.loss`), objective (minimised in training), the parts of the validation
            loss, lr, grad_norm (mean, before clipping), precision, seconds, samples_per_second.

        Raises:
            ValueError: the run folder has other settings, data or a damaged state.
            RuntimeError: another process writes into the run folder, or training diverged: a loss,
                a weight or all gradients of an epoch are not finite, or the loss is a hundred
                times that of the first step. The run folder keeps the last complete epoch.
        """
        self.team.barrier()
        self._began = self._saved = time.perf_counter()
        lock = runs.only_writer(self.run) if self.team.is_main else contextlib.nullcontext()
        with lock, tf32(self.device):
            if self.settings:  # another process may have claimed the folder since it was created
                runs.refuse_other_settings(self.run, self.settings)
            self._resume()
            self._captured = self._capture()
            if self.team.is_main:
                runs.save_description(self.run, self.policy, self.train_data)
            progress = tqdm(total=self.last_epoch * self.steps_per_epoch, desc="training",
                            initial=self.epoch * self.steps_per_epoch + len(self.measured),
                            unit="step",
                            disable=not self.team.is_main or not sys.stderr.isatty())
            tracker = Tracker(self.config.wandb_mode if self.team.is_main else "disabled", {
                "project": os.environ.get("WANDB_PROJECT") or WANDB_PROJECT,
                "name": self.run.name, "dir": str(self.run),
                "config": {**vars(self.policy.config), **vars(self.config)}})
            with progress, contextlib.closing(tracker):
                while not self.finished and not self._time_is_up():
                    if not self._train_epoch(progress):
                        break  # the time is up
                    row = self._end_epoch()
                    self._save_weights(row)
                    self.rows.append(row)
                    self._write_rows()
                    self._save_state()
                    tracker.log(row)
                    progress.set_postfix(epoch=self.epoch, train=f"{row['train_loss']:.4f}",
                                         val=f"{row['val_loss']:.4f}")
                    if progress.disable:
                        self._report(row)
            self.team.barrier()
        return list(self.rows)

    def _report(self, row: dict) -> None:
        """Print the first, every tenth and the last epoch: executed notebooks keep every line."""
        if self.team.is_main and (self.epoch in (1, self.last_epoch) or self.finished
                                  or self.epoch % _REPORT_EVERY == 0):
            minutes = max((self.last_epoch - self.epoch) * row["seconds"] / 60, 0.1)
            left = "" if self.finished else f", about {minutes:.1f} minutes left"
            print(f"epoch {self.epoch} of {self.last_epoch}: training loss "
                  f"{row['train_loss']:.4f}, validation loss {row['val_loss']:.4f}{left}",
                  flush=True)

    # --- an epoch ---------------------------------------------------------------------------------

    def _train_epoch(self, progress: tqdm) -> bool:
        """Run the remaining updates of the epoch; False if the time is up before the last."""
        self.policy.train()
        started = time.perf_counter() - self.seconds
        order = (self.config.batch_size, self.config.seed, self.epoch)
        mine = dict(start=len(self.measured), part=(self.team.rank, self.team.size))
        if self._captured:
            step, batches = self._replay, self.train_data.draws(*order, **mine)
        else:
            step = self._step
            batches = self.train_data.batches(*order, device=self.device, **mine)
        for batch in batches:
            self.measured.append(step(batch))
            if self.first_loss is None:
                self.first_loss = self.measured[0][0].item()
            progress.update()
            if len(self.measured) % _CHECK_EVERY == 0:
                self._stop_if_diverged()
                self.seconds = time.perf_counter() - started
                if self._time_is_up():
                    self._save_state()
                    return False
                if self.team.broadcast(time.perf_counter() - self._saved) > _SAVE_EVERY:
                    self._save_state()
        self._stop_if_diverged()  # waits for a GPU, which the time includes
        self.seconds = time.perf_counter() - started
        return True

    def _end_epoch(self) -> dict:
        """Validate; the row for ``metrics.jsonl``."""
        objectives, norms, losses = map(torch.stack, zip(*self.measured, strict=True))
        train_loss = losses.mean().item()
        grad_norm = norms[norms.isfinite()].mean().item()  # fp16 skips steps that overflow
        validation = self.validate()
        for name, value in (("validation loss", validation["loss"]), ("gradient", grad_norm)):
            self._stop_if(not math.isfinite(value), f"the {name} is {value}")
        seconds, self.measured, self.seconds = self.seconds, [], 0.0
        self.epoch += 1
        return {
            "epoch": self.epoch, "train_loss": train_loss, "val_loss": validation.pop("loss"),
            **{f"val_{name}": value for name, value in validation.items()},
            "objective": objectives.mean().item(), "lr": self.scheduler.get_last_lr()[0],
            "grad_norm": grad_norm, "precision": self.precision, "seconds": round(seconds, 3),
            "samples_per_second": round(self.train_data.epoch_size / seconds, 1),
        }

    # --- a step -----------------------------------------------------------------------------------

    def _step(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One update; returns objective, gradient norm before clipping and final answer's loss."""
        results = self._update(batch)
        self._advance()
        return results

    def _replay(self, draw: dict) -> tuple[torch.Tensor, ...]:
        """:meth:`_step` of a draw as the CUDA graph, which an epoch's smaller last batch lacks."""
        if not self._captured.fits(draw):
            return self._step(self.train_data.make(draw, self.device))
        results = tuple(self._captured(draw))
        self._advance()
        return results

    @property
    def _can_capture(self) -> bool:
        """Whether a step is the same kernels for every batch, none of which the CPU waits for."""
        model = self.policy.config
        return (self.device.type == "cuda" and self.team.size == 1 and not self.config.compile
                and self.train_data.device.type == "cuda"
                and model.halting not in captured.DATA_DEPENDENT
                and model.variant != "act")  # its style is sampled on the CPU

    def _capture(self) -> captured.CapturedStep | None:
        if self.finished or not self._can_capture:
            return None
        self.policy.train()
        draws = [next(iter(self.train_data.draws(self.config.batch_size, self.config.seed, epoch)))
                 for epoch in range(captured.STEPS)]
        modules = {"weights": self.policy} | ({"averages": self.averaged} if self.ema else {})
        return captured.capture(
            lambda draw: self._update(self.train_data.make(draw, self.device)), modules,
            self.optimizer, self.scaler, draws)

    def _update(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The part of a step that a GPU computes, without waiting for it."""
        share = self.team.loss_weight(batch["mask"].sum())
        objective, parts = self._backward(batch, share)
        self.team.average_gradients(self.policy)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), GRAD_CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self._average(self.config.ema_decay)
        whole = self.team.sum(share * torch.stack([objective.detach(), parts["final"]]))
        return whole[0] / self.team.size, norm.detach(), whole[1] / self.team.size

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        """As ``AveragedModel.update_parameters``, which copies its counter to a GPU and waits."""
        averages, weights = ([*module.parameters(), *module.buffers()]
                             for module in (self.averaged, self.policy))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def _advance(self) -> None:
        """The rest of a step: what the CPU counts."""
        self.scheduler.step()
        if self.ema:
            if self.ema.n_averaged == 0:
                self._average(decay=0.0)  # the average begins with the weights after one update
            self.ema.n_averaged += 1

    def _backward(self, batch: dict, share: torch.Tensor | float):
        """Compute :meth:`TRMPolicy.loss` and its gradient.

        ``torch.compile`` compiles the backward pass on first use; if either pass fails, both are
        repeated without it, with the same random numbers.
        """
        state = random_state() if self._compiled else ()
        try:
            self.optimizer.zero_grad(set_to_none=True)
            objective, parts = self._loss(self._compiled or self.policy.loss, batch)
            self.scaler.scale(objective * share).backward()
            return objective, parts
        except Exception as error:  # of any type, from the compiler or its C++ toolchain
            if not self._compiled:
                raise
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            print(f"torch.compile failed ({type(error).__name__}: {reason}); "
                  "continuing without it")
        self._compiled = None
        set_random_state(*state)
        return self._backward(batch, share)

    def _loss(self, compute: Callable, batch: dict):
        with torch.autocast(self.device.type, _AUTOCAST.get(self.precision),
                            enabled=self.precision in _AUTOCAST):
            return compute(batch, self.config.loss)

    # --- validation -------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss and parts of the averaged weights over the validation split's valid actions."""
        model = self.averaged.eval()
        on_gpu = self.device.type == "cuda"
        totals: torch.Tensor | float = 0.0  # float64: of the valid actions, then of each part
        for batch in self.val_data.batches(
                self.config.batch_size * (_WITHOUT_GRADIENT if on_gpu else 1), 0, 0, shuffle=False,
                device=self.device):
            loss, parts = self._loss(model.loss, batch)
            parts.pop("final")  # in evaluation mode, the loss itself
            weight = batch["mask"].sum().double()
            values = [weight * value.double() for value in (loss, *parts.values())]
            totals = totals + torch.stack([weight, *values])  # read once, at the end
        actions, *sums = totals.tolist()
        # the main process's value, so that all processes stop at the same epoch
        return {name: self.team.broadcast(total / actions)
                for name, total in zip(("loss", *parts), sums, strict=True)}

    # --- reasons to stop --------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the last epoch (``stop_epoch`` where set) or the patience is reached."""
        without_progress = self.epoch - self.lowest_epoch
        return self.epoch >= self.last_epoch or 0 < self.config.patience <= without_progress

    def _time_is_up(self) -> bool:
        left = min(minutes_left(), (self.config.max_minutes or math.inf)
                   - (time.perf_counter() - self._began) / 60)
        return self.epoch > 0 and self.team.broadcast(left) <= 0

    def _stop_if_diverged(self) -> None:
        """Called before a state is saved."""
        recent, finite = torch.stack([  # one wait for a GPU
            torch.stack([step[0] for step in self.measured[-_CHECK_EVERY:]]).mean().float(),
            torch.stack([weight.isfinite().all() for weight in self.policy.parameters()]).all(),
        ]).tolist()
        finite = finite and math.isfinite(recent)
        self._stop_if(not finite or recent > _DIVERGED * self.first_loss,
                      f"the training loss went from {self.first_loss:.3g} in the first step to "
                      f"{recent:.3g}")

    def _stop_if(self, diverged: bool, problem: str) -> None:
        """Raise in every process if training diverged in one."""
        if not self.team.any(diverged):
            return
        norms = torch.stack([step[1] for step in self.measured])
        broken = [name for name, weight in self.policy.named_parameters()
                  if not weight.isfinite().all()]
        raise RuntimeError(
            f"training diverged in epoch {self.epoch + 1}: {problem} (largest gradient norm "
            f"{norms.max():.3g}; weights that are not finite: {', '.join(broken[:3]) or 'none'}). "
            f"Lower lr={self.config.lr:g} or use precision='fp32'"
            + (f"; {self.run} keeps the last complete epoch" if self.epoch else ""))

    # --- saving and resuming ----------------------------------------------------------------------

    def _save_weights(self, row: dict) -> None:
        """Save ``last`` and ``best``; a row of an epoch with rollouts gets ``success_rate``."""
        weights = self.averaged.state_dict()
        if self.team.is_main:
            runs.save_weights(self.run, weights, "last")
        every = self.config.rollout_every
        if every and (self.epoch % every == 0 or self.epoch == self.config.epochs):
            row["success_rate"] = self.team.broadcast(self.roll_out() if self.team.is_main else 0.0)
        if row["val_loss"] < self.lowest_loss:
            self.lowest_loss, self.lowest_epoch = row["val_loss"], self.epoch
        score = (row.get("success_rate", -1.0), -row["val_loss"])
        if score > self.best_score:
            self.best_score = score
            if self.team.is_main:
                runs.save_weights(self.run, weights, "best")

    def _write_rows(self) -> None:
        if self.team.is_main:
            lines = [json.dumps(row, allow_nan=False) + "\n" for row in self.rows]
            write_bytes(self.run / "metrics.jsonl", "".join(lines).encode())

    def _save_state(self) -> None:
        self._saved = time.perf_counter()
        if self.team.is_main:
            cpu, cuda = random_state()
            runs.save_training_state(self.run, {
                **{name: getattr(self, name) for name in runs.STATE_VALUES},
                **{name: getattr(self, name).state_dict() for name in _OBJECTS
                   if getattr(self, name)},
                "measured": [tuple(value.item() for value in step) for step in self.measured],
                "settings": self._settings(), "precision": self.precision, "generator": cpu,
                "cuda_generators": cuda})

    def _settings(self) -> dict[str, Any]:
        """The settings of the model and of training, without those of the machine."""
        values = {**vars(self.policy.config), **vars(self.config)}
        return {name: value for name, value in values.items() if name not in local_settings()}

    def _resume(self) -> None:
        """Load the training state and repair the folder.

        An epoch that ended after the last saved state is repeated, and so is a first epoch without
        any state; several epochs without a state are refused.
        """
        state = runs.load_training_state(self.run)
        if not state:
            runs.refuse_without_state(self.run)
        else:
            runs.refuse_other_data(self.run, self.train_data)
            try:
                self._load_state(state)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(f"{self.run / 'training_state.pt'} is damaged or of another "
                                 f"training ({reason}); put an intact one back, or "
                                 f"{runs.ANEW}") from error
        self.team.barrier()
        if not self.team.is_main:
            return
        if self.rows:  # else the first row replaces those of an epoch that is repeated
            self._write_rows()
        if self.epoch:
            best = self.run / "best.safetensors"
            if not best.exists():
                raise ValueError(f"{best} does not exist; expected the best weights of "
                                 f"{self.epoch} epochs. Put them back, or {runs.ANEW}")
            runs.read_weights(best)  # refuses a damaged file
            if not (self.run / "last.safetensors").exists():
                runs.save_weights(self.run, self.averaged.state_dict(), "last")
        if state and state["precision"] != self.precision:
            print(f"{self.run} was trained in {state['precision']} and resumes in "
                  f"{self.precision}; its losses will differ slightly from those of an "
                  "uninterrupted run")

    def _load_state(self, state: dict) -> None:
        epochs = [row["epoch"] for row in state["rows"]]
        if epochs != list(range(1, state["epoch"] + 1)):
            raise ValueError(f"epoch={state['epoch']!r} with rows of the epochs {epochs}")
        ours = self._settings()
        # an older version may have former settings and lack new ones
        theirs = {**Config().flat(), **migrate(state.get("settings", ours))}
        if different := differences(theirs, {**theirs, **ours}):
            raise ValueError(different)
        updates, planned = state["scheduler"]["T_max"], self.scheduler.T_max
        if updates != planned:
            raise ValueError(f"a schedule of {updates} updates; {planned} now")
        for name in runs.STATE_VALUES:
            setattr(self, name, state[name])
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = self.optimizer.defaults["fused"]  # of this device, not of the last
        for name in _OBJECTS:
            if state.get(name):  # a scaler has a state in fp16 only
                getattr(self, name).load_state_dict(state[name])
        self.measured = [tuple(torch.tensor(value, device=self.device) for value in step)
                         for step in state["measured"]]
        set_random_state(state["generator"], state["cuda_generators"])
