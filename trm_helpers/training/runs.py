"""Run folders: create, find, save and load.

Weights are safetensors and everything else is JSON, so that loading a policy runs no code from the
file; the training state is loaded with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import io
import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from .. import paths, schema
from ..config import PARTS, SET_BY_TRAINING, Config, ModelConfig, from_flat, local_settings, migrate
from ..data.dataset import LIBERODataset
from ..data.normalize import ActionNormalizer, read_proprio
from ..demos.demo_files import files_trained_on
from ..files import (
    atomic_path,
    differences,
    digest,
    exclusive_lock,
    inside,
    read_bytes,
    read_json,
    read_jsonl,
    visible,
    write_bytes,
    write_json,
)
from ..policy.model import TRMPolicy, read_weights
from ..software import software_versions
from ..stats import counted

TRAINING_LOCK = ".training.lock"
_OF_POLICY = ("model", "normalizer", "proprio_stats")  # in policy.json: the network, the scaling
ANEW = "remove training_state.pt and metrics.jsonl to train from the start"
STATE_VALUES = (  # attributes of the trainer in a training state
    "epoch", "rows", "seconds", "first_loss", "best_score", "lowest_loss", "lowest_epoch")
_STATE_KEYS = {  # all that a trainer reads, except ema and scaler, which only some have
    *STATE_VALUES, "policy", "optimizer", "scheduler", "measured", "precision", "generator",
    "cuda_generators"}


def create_run(config: Config, run_name: str = "", resume: bool = False) -> Path:
    """Create or resume ``artifacts/<run_name>`` with its ``config.json``.

    A folder without a complete epoch is overwritten when the settings differ. A resumed run takes
    over the settings of evaluation and search.

    Args:
        run_name: see :func:`paths.run_dir`; empty gives ``<suite>-<variant>-s<seed>-<date-time>``.
        resume: allow a trained folder.

    Raises:
        FileExistsError: the run is trained and ``resume`` is False.
        ValueError: the name is not valid; the trained run has other data, model or training
            settings (they are listed), or no ``config.json``.
        RuntimeError: another process trains into the folder.
    """
    run = paths.run_dir(run_name or f"{config.data.suite}-{config.model.variant}-"
                                    f"s{config.train.seed}-{time.strftime('%Y%m%d-%H%M%S')}")
    with only_writer(run):
        made = (run / "config.json").exists()
        if is_trained(run):
            if not made:
                raise ValueError(f"{run} is trained but has no config.json; expected the settings "
                                 "it was trained with. Put the file back, or choose another "
                                 "run_name")
            if not resume:
                raise FileExistsError(f"{run} exists already; choose another run_name, remove it, "
                                      "or resume it (resume=True)")
            refuse_other_settings(run, config)
            now = config.to_dict()
            write_json(run / "config.json", {**read_json(run / "config.json"),
                                             "eval": now["eval"], "search": now["search"]})
        else:
            if not made or load_config(run).fixed() != config.fixed():
                for name in ("training_state.pt", "locator.safetensors", "scenes.json"):
                    (run / name).unlink(missing_ok=True)
            write_json(run / "config.json", {**config.to_dict(), "software": software_versions()})
    return run


def is_trained(run: Path) -> bool:
    """Whether a run has a complete epoch."""
    metrics = run / "metrics.jsonl"
    return (run / "last.safetensors").exists() or metrics.exists() and metrics.stat().st_size > 0


def only_writer(run: Path) -> contextlib.AbstractContextManager:
    """Lock of a run folder for training; ``RuntimeError`` while another process holds it.

    Readers need no lock, because files are replaced whole.
    """
    return exclusive_lock(run, wait=False, lock=TRAINING_LOCK)


def refuse_without_state(run: Path) -> None:
    """Raise ``ValueError`` if a run is trained or evaluated but has no state to resume from.

    One epoch without a state was interrupted before the state was saved; it may be repeated.
    """
    epochs = len(read_jsonl(run / "metrics.jsonl"))
    if epochs > 1 or epochs and (run / "episodes.jsonl").exists():
        raise ValueError(f"{run} has {counted(epochs, 'epoch')} but no training_state.pt, "
                         "from which training continues; expected the file beside the weights. Put "
                         "it back, choose another run_name, or remove metrics.jsonl to train from "
                         "the start")


def refuse_other_settings(run: Path, config: Config) -> None:
    """Raise ``ValueError`` listing the fixed settings that differ, see :class:`config.Config`."""
    if different := differences(load_config(run).fixed(), config.fixed()):
        raise ValueError(f"{run} was made with other settings ({different}); "
                         "choose another name or the same settings")


def refuse_other_data(run: Path, data: LIBERODataset) -> None:
    """Raise ``ValueError`` if a run was trained on other demonstrations than ``data``.

    Compares contents, not locations. Different frames are only reported, because another renderer
    gives other pixels.
    """
    trained_on, described = description(run)["trained_on"], data.describe()
    before, now = ({Path(file["file"]).name: file for file in split["files"]}
                   for split in (trained_on, described))
    different = []
    for name in sorted({*before, *now}):
        there, here = (files.get(name, {"demos": []}) for files in (before, now))
        if there["demos"] != here["demos"]:
            both = len({*there["demos"]} & {*here["demos"]})
            different.append(f"{name}: {len(there['demos'])} demonstrations there, "
                             f"{len(here['demos'])} now, {both} of them in both")
        elif there.get("actions", here["actions"]) != here["actions"]:  # older runs have no digest
            different.append(f"{name}: other actions")
        elif there.get("frames", here["frames"]) != here["frames"]:
            print(f"{name}: the frames differ from those that {run} was trained on, as those of "
                  "another renderer do")
    samples = trained_on.get("samples", described["samples"])
    if not different and samples != described["samples"]:
        different.append(f"{samples} samples there, {described['samples']} now, as with another "
                         "frame_stride")
    if different:
        raise ValueError(f"{run} was trained on other demonstrations ({'; '.join(different)}); "
                         "choose another name or give it the same files")


def held_out(run: str | Path, files: Mapping[int, Path], config: Config,
             policy: TRMPolicy) -> LIBERODataset:
    """Demonstrations that a run's policy was not trained on, see :meth:`LIBERODataset.held_out`."""
    return LIBERODataset.held_out(files, config, policy, description(Path(run))["trained_on"])


def description(run: Path) -> dict:
    """The ``policy.json`` of a run; ``ValueError`` with the file if it is damaged."""
    if not (run / "policy.json").exists():
        raise FileNotFoundError(f"{run / 'policy.json'} does not exist; expected the description "
                                "of the policy beside its weights")
    path = run / "policy.json"
    described = read_json(path, keys=(*_OF_POLICY, "trained_on.files"))
    files_trained_on(path, described)
    return described


def description_digest(described: Mapping) -> str:
    """By which results name the network and the scaling in a :func:`description`."""
    return digest(json.dumps({key: described[key] for key in _OF_POLICY}, sort_keys=True).encode())


def find_run(run_name: str | int | Path = "", to_write: bool = False, weights: str = "") -> Path:
    """Folder of a trained run by name or path; the last trained for an empty name.

    Runs outside ``artifacts/`` (``pretrained/<name>``, an attached data set) are read-only. Results
    go to a copy in ``artifacts/``, which is then read as long as it holds the same weights.

    Args:
        to_write: create the copy.
        weights: ``best`` or ``last``, which the run has to hold.

    Raises:
        FileNotFoundError: no such run; lists the existing ones. Or it lacks ``policy.json`` or the
            ``weights``.
        FileExistsError: the copy's folder holds another run.
        ValueError: a path with ``..``, or no possible path.
    """
    root, name = paths.artifacts_dir(), str(run_name)
    parts = Path(name).parts
    if ".." in parts or "\0" in name or max(map(len, map(os.fsencode, parts)), default=0) > 255:
        raise ValueError(f"run={name[:255]!r} is not valid; expected the name of a run in {root}, "
                         "or the path of its folder without '..', each part of at most 255 bytes")
    saved = [path for path in visible(root, "*/best.safetensors") if path.is_file()]
    saved.sort(key=lambda path: path.stat().st_mtime)
    trained = [path.parent for path in saved if (path.parent / "policy.json").exists()]
    if not name and trained:
        return _holding(trained[-1], weights)
    shipped, beside = shipped_policies(), paths.shipped("pretrained").parent
    if name:
        places = [root / name, beside / name, paths.absolute(name)]
        if str(Path(name)) in shipped:  # its copy may be of the weights of another version
            places = places[1:]
        for run in places:
            if (run / "policy.json").exists():
                _holding(run, weights)  # before it is copied
                return run if run.is_relative_to(root) else _in_artifacts(run, to_write)
        for run in places:
            if any(run.glob("*.safetensors")):
                description(run)  # which is missing
    names = [run.name for run in trained] + shipped
    alike = [each for each in shipped if Path(each).name == name]
    hint = f"; did you mean {alike[0]!r}?" if alike else schema.did_you_mean(name, names)
    found = "no run has been trained" if not name else (
        f"the run {name!r} has not been trained" if (root / name).is_dir()
        else f"no trained run {name!r}")
    there = ", ".join(run.name for run in trained) or "none"
    command = f"python -m trm_helpers train demo --run-name {shlex.quote(name or 'demo')}"
    raise FileNotFoundError(f"{found} in {root}; there are: {there}; shipped: {', '.join(shipped)}"
                            f"{hint or '.'} 04_train trains one, or `{command}`"
                            + ("; Add Input > Your Work > Notebooks attaches its output"
                               if paths.on_kaggle() else ""))


def _holding(run: Path, weights: str) -> Path:
    """The run, or ``FileNotFoundError`` if it lacks these ``weights``."""
    if weights and not (run / f"{weights}.safetensors").exists():
        there = ", ".join(sorted(path.name for path in run.glob("*.safetensors")))
        raise FileNotFoundError(f"{run} holds no {weights}.safetensors; expected weights that it "
                                f"holds ({there or 'none'})")
    return run


def _in_artifacts(run: Path, to_write: bool) -> Path:
    """Copy of a run from elsewhere; the run itself if there is none and ``to_write`` is False."""
    shipped = run.is_relative_to(paths.shipped("pretrained"))
    home = paths.artifacts_dir() / ("pretrained" if shipped else "") / run.name
    if to_write and not home.exists():
        if not shipped:
            paths.run_dir(run.name)  # refuses what no run may be called
        with exclusive_lock(home.parent, lock=".copy.lock"):
            if not home.exists():  # another process may have made it meanwhile
                copy_run(run, home)
                return home
    if all((home / path.name).exists() and filecmp.cmp(path, home / path.name, shallow=False)
           for path in (run / "policy.json", *run.glob("*.safetensors"))):
        return home
    if to_write:
        raise FileExistsError(f"{home} belongs to another run than {run}, whose results would be "
                              "written there; rename one of the two folders")
    return run


def copy_run(run: Path, home: Path) -> None:
    """Copy a run to ``home``, without hidden files, its search and links that leave the run.

    Files get this user's permissions. The Hugging Face hub's cache is made of links to its own
    folder ``blobs``.
    """
    own = [run, *(folder.parent / "blobs" for folder in run.parents if folder.name == "snapshots"
                  and not (folder.parent / "blobs").is_symlink())]
    places = [source.relative_to(run) for source in visible(run, "**/*") if source.is_file()]
    places = [place for place in places if place.parts[0] != "search"]
    chosen = [place for place in places if any(inside(folder, run / place) for folder in own)]
    if left_out := [str(place) for place in places if place not in chosen]:
        print(f"not copied from {run}, because they link to files outside it: "
              f"{', '.join(left_out)}")
    size = sum((run / place).stat().st_size for place in chosen)
    with atomic_path(home, size) as temporary:
        for place in chosen:
            (temporary / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / place, temporary / place)
            times = (run / place).stat()  # kept: find_run takes the run that was trained last
            os.utime(temporary / place, ns=(times.st_atime_ns, times.st_mtime_ns))


def shipped_policies() -> list[str]:
    """``pretrained/<name>`` of each policy in the repository."""
    described = paths.shipped("pretrained").glob("*/policy.json")
    return sorted(f"pretrained/{path.parent.name}" for path in described)


def load_config(run: str | Path, preset: str = "reference") -> Config:
    """The :class:`Config` of a run; settings of the machine come from ``preset`` instead.

    See :func:`config.local_settings`.
    """
    path = Path(run) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a run folder")
    values = read_json(path, keys=("data", "model", "train"))
    values.pop("software", None)
    if wrong := [part for part in PARTS if not isinstance(values.get(part, {}), dict)]:
        raise ValueError(f"{path} is not the configuration of a run: expected {', '.join(wrong)} "
                         "to be an object")
    try:
        for name in local_settings():
            for part in PARTS:
                values.get(part, {}).pop(name, None)
        config = Config.from_dict(values)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error
    return config.replace(**from_flat(preset).local())


def save_description(run: Path, policy: TRMPolicy, data: LIBERODataset) -> None:
    """Write ``policy.json``, which :func:`load_policy` needs beside the weights."""
    write_json(run / "policy.json", {
        "model": dataclasses.asdict(policy.config),
        "normalizer": policy.normalizer.to_dict(),
        "proprio_stats": policy.proprio_stats,
        "trained_on": data.describe(),
    })


def save_weights(run: Path, weights: dict[str, torch.Tensor], name: str) -> None:
    """Write ``<name>.safetensors`` (``best`` or ``last``) atomically."""
    write_bytes(run / f"{name}.safetensors", save(
        {key: value.detach().cpu().contiguous() for key, value in weights.items()}))


def load_policy(run: str | Path, weights: str = "best") -> TRMPolicy:
    """Rebuild a policy with its normalisers from a run folder alone, in evaluation mode.

    Its ``sha256`` is the digest of the weights file; ``described`` is that of the network and the
    scaling in ``policy.json``.

    Args:
        run: see :func:`find_run`.
        weights: ``best`` (lowest validation loss or, where rollouts chose, most successes) or
            ``last``.

    Raises:
        FileNotFoundError: no such run or weights.
        ValueError: a file is damaged, or the weights belong to another configuration than
            ``policy.json`` (the differences are listed).
    """
    schema.check_option("weights", weights, schema.WEIGHTS)
    run = find_run(str(run), weights=weights)
    described = description(run)
    try:
        policy = TRMPolicy(ModelConfig(**migrate(described["model"])),
                           ActionNormalizer.from_dict(described["normalizer"]),
                           read_proprio(described["proprio_stats"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run / 'policy.json'} describes no policy: "
                         f"{type(error).__name__}: {error}") from error
    path = run / f"{weights}.safetensors"
    state, policy.sha256 = read_weights(path)
    policy.described = description_digest(described)
    try:
        policy.load_state_dict(state)
    except RuntimeError as error:  # lists missing and unexpected weights and other shapes
        raise ValueError(f"{path} does not fit the configuration in policy.json: {error}") from None
    if (run / "config.json").exists():  # which the report and the command to repeat it read
        _refuse_other_network(run, policy.config)
    return policy.eval()


def _refuse_other_network(run: Path, described: ModelConfig) -> None:
    """Raise ``ValueError`` if config.json is about another network than policy.json."""
    trained, described = (
        {name: value for name, value in vars(config).items() if name not in SET_BY_TRAINING}
        for config in (load_config(run).model, described))
    if different := differences(described, trained):
        raise ValueError(f"{run}: policy.json and config.json describe different networks "
                         f"({different}); expected both to be of one training")


def save_training_state(run: Path, state: dict) -> None:
    """Write ``training_state.pt``, from which training resumes exactly."""
    content = io.BytesIO()
    torch.save(state, content)
    write_bytes(run / "training_state.pt", content.getbuffer())


def load_training_state(run: Path) -> dict | None:
    """Inverse of :func:`save_training_state`; None without a file.

    Raises ``ValueError`` for a damaged file and for one with more than tensors and numbers, which
    could run code.
    """
    path = run / "training_state.pt"
    if not path.exists():
        return None
    content, cause = io.BytesIO(read_bytes(path)), None
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and state.keys() >= _STATE_KEYS:
            return state
    except Exception as error:  # of any type, from PyTorch's reader of pickles
        cause = error
    raise ValueError(f"{path} is damaged, of another version of the code, or holds more than "
                     f"tensors and numbers; put an intact one back, or {ANEW}") from cause
