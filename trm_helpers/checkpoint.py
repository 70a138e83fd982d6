"""Run folders: the one way to make, find, save and load them.

Weights are safetensors and everything else is JSON, so that loading a policy runs no code from the
file; the optimizer's state goes through ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from . import paths
from .config import Config, ModelConfig
from .data import LIBERODataset
from .files import digest, replacing, write_json
from .model import TRMPolicy
from .normalize import ActionNormalizer
from .preflight import software_versions

WEIGHTS = ("best", "last")
# what may change between a training and its continuation
FREE_SETTINGS = {"max_minutes", "stop_epoch", "storage", "device", "num_threads", "wandb_mode",
                 "wandb_project"}


def create_run(config: Config, run_name: str = "", resume: bool = False) -> Path:
    """Make ``artifacts/<run_name>`` with its ``config.json``, or go on with one.

    Args:
        run_name: letters, digits, ``._-``; empty gives ``<suite>-<variant>-s<seed>-<date-time>``.
        resume: use the folder if it exists; without it an existing folder is refused.

    Raises:
        FileExistsError: the folder exists and ``resume`` is off.
        ValueError: the name is not usable; the folder to be resumed was made with other settings of
            data, model or training (they are listed).
    """
    run_name = run_name or (f"{config.data.suite}-{config.model.variant}-s{config.train.seed}-"
                            f"{time.strftime('%Y%m%d-%H%M%S')}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_name):
        raise ValueError(f"run_name={run_name!r} is not valid; expected letters, digits, '._-'")
    run = paths.artifacts_dir() / run_name
    if (run / "config.json").exists():
        if not resume:
            raise FileExistsError(f"{run} exists already; choose another run_name, remove it, or "
                                  "resume it (resume=True)")
        refuse_other_settings(run, config)
        return run
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", {**config.to_dict(), "software": software_versions()})
    return run


def refuse_other_settings(run: Path, config: Config) -> None:
    """Raise ``ValueError`` that lists how a run's data, model or training settings differ."""
    before, now = load_config(run).to_dict(), config.to_dict()
    different = [
        f"{name}: {before[part][name]!r} there, {now[part][name]!r} now"
        for part in ("data", "model", "train") for name in now[part]
        if before[part][name] != now[part][name] and name not in FREE_SETTINGS
    ]
    if different:
        raise ValueError(f"{run} was made with other settings ({'; '.join(different)}); "
                         "choose another name or the same settings")


def refuse_other_data(run: Path, data: LIBERODataset) -> None:
    """Raise ``ValueError`` where a run was trained on other demonstrations than ``data``."""
    before, now = ({Path(file["file"]).name: file["demos"] for file in described["files"]}
                   for described in (_described(run)["trained_on"], data.describe()))
    different = [f"{name}: {len(before.get(name, ()))} demonstrations there, "
                 f"{len(now.get(name, ()))} now" for name in sorted({*before, *now})
                 if before.get(name) != now.get(name)]
    if different:
        raise ValueError(f"{run} was trained on other demonstrations ({'; '.join(different)}); "
                         "choose another name or give it the same files")


def held_out(run: str | Path, files: Mapping[int, Path], config: Config,
             policy: TRMPolicy) -> LIBERODataset:
    """:meth:`LIBERODataset.held_out` of a run's policy: demonstrations that it has not seen."""
    return LIBERODataset.held_out(files, config, policy, _described(Path(run))["trained_on"])


def _described(run: Path) -> dict:
    return json.loads((run / "policy.json").read_text())


def find_run(run_name: str = "") -> Path:
    """The folder of a trained run by name or path; the newest one for an empty name.

    ``pretrained/<name>``, a policy that comes with the repository, is first copied to the folder of
    that name in ``artifacts/``, so that what is made with it is kept there.

    Raises ``FileNotFoundError`` that lists the runs there are.
    """
    root = paths.artifacts_dir()
    if run_name in shipped_policies() and not (root / run_name).exists():
        with replacing(root / run_name) as temporary:
            shutil.copytree(paths.shipped("pretrained").parent / run_name, temporary)
    trained = sorted(root.glob("*/policy.json"), key=lambda path: path.stat().st_mtime)
    names = [path.parent.name for path in trained] + shipped_policies()
    if not run_name and trained:
        return trained[-1].parent
    for run in (root / run_name, Path(run_name)):
        if run_name and (run / "policy.json").exists():
            return run
    raise FileNotFoundError(f"no trained run {run_name!r} in {root}; "
                            f"there are: {', '.join(names) or 'none'}. 04_train makes one")


def shipped_policies() -> list[str]:
    """``pretrained/<name>`` of each policy that comes with the repository."""
    described = paths.shipped("pretrained").glob("*/policy.json")
    return sorted(f"pretrained/{path.parent.name}" for path in described)


def load_config(run: str | Path) -> Config:
    """The :class:`Config` a run was made with."""
    path = Path(run) / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected a run folder") from None
    return Config.from_dict({k: v for k, v in values.items() if k != "software"})


def save_description(run: str | Path, policy: TRMPolicy, data: LIBERODataset) -> None:
    """Write ``policy.json``: all that :func:`load_policy` needs beside the weights."""
    write_json(Path(run) / "policy.json", {
        "model": dataclasses.asdict(policy.config),
        "normalizer": policy.normalizer.to_dict(),
        "proprio_stats": policy.proprio_stats,
        "trained_on": data.describe(),
    })


def save_weights(run: str | Path, weights: dict[str, torch.Tensor], name: str) -> None:
    """Write ``<name>.safetensors`` (``best`` or ``last``), whole or not at all."""
    with replacing(Path(run) / f"{name}.safetensors") as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()},
                  temporary)


def load_policy(run: str | Path, weights: str = "best", device: str = "cpu") -> TRMPolicy:
    """Rebuild a policy, its normalisers and its observation mapping from a run folder alone.

    Args:
        run: folder, or name of a folder in ``artifacts/``, or ``pretrained/<name>``.
        weights: ``best`` (lowest validation loss or, where rollouts chose, most successes) or
            ``last``.

    Returns:
        the policy; its ``sha256`` is the digest of the weights file as it was read.

    Raises:
        FileNotFoundError: no such run or weights.
        ValueError: the weights are damaged, or belong to another configuration than
            ``policy.json`` (the differences are listed).
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is not valid; expected one of {', '.join(WEIGHTS)}")
    run = find_run(str(run))
    described = _described(run)
    policy = TRMPolicy(
        ModelConfig(**described["model"]),
        ActionNormalizer.from_dict(described["normalizer"]),
        described["proprio_stats"],
    )
    path = run / f"{weights}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; the run has no {weights} weights yet")
    content = path.read_bytes()  # once: the digest is of what is loaded, whoever writes meanwhile
    try:
        state = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    _refuse_other_weights(path, state, policy.state_dict())
    policy.load_state_dict(state)
    policy.sha256 = digest(content)
    return policy.to(device).eval()


def _refuse_other_weights(path: Path, found: dict, expected: dict) -> None:
    shapes = [{name: tuple(weight.shape) for name, weight in weights.items()}
              for weights in (found, expected)]
    different = [
        f"{name}: {shapes[0].get(name, 'none')} there, {shapes[1].get(name, 'none')} expected"
        for name in sorted({*found, *expected}) if shapes[0].get(name) != shapes[1].get(name)
    ]
    if different:
        raise ValueError(f"{path} does not fit the configuration in policy.json; "
                         f"these weights differ: {'; '.join(different)}")


def save_training_state(run: str | Path, state: dict) -> None:
    """Write ``training_state.pt``: what an exact continuation needs."""
    with replacing(Path(run) / "training_state.pt") as temporary:
        torch.save(state, temporary)


def load_training_state(run: str | Path) -> dict | None:
    """Inverse of :func:`save_training_state`; ``None`` when there is nothing to continue.

    Raises ``ValueError`` for a damaged file, and for one that holds more than tensors and numbers:
    such a file could run code.
    """
    path = Path(run) / "training_state.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or holds more than tensors and numbers; "
                         "remove it to train from the start") from error
