"""Small demonstration files in LIBERO's layout whose every number is known."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

from trm_helpers.config import Config

LONG = (40, 40)
SCRIPTED = {"expert": "pick and place"}
RAW_FRACTION, SHIFT_FRACTION = -0.1, 0.9  # where on the step robosuite samples an observation


def action_at(t, demo: int = 0) -> np.ndarray:
    """Seven numbers: arm ((3 t + demo + k) mod 7 - 3) / 10 for k < 6; gripper closed from t = 3."""
    arm = [((3 * t + demo + k) % 7 - 3) / 10 for k in range(6)]
    return np.array([*arm, -1.0 if t < 3 else 1.0])


def joints_at(t: float) -> np.ndarray:
    """The arm's seven joint angles (rad) at a time in control steps; a curved, uneven path."""
    return 0.01 * np.arange(1, 8) * t + 0.002 * t**2


def position_at(t: float, demo: int = 0) -> np.ndarray:
    """The end effector (m) at a time in control steps; each step executes the action before it."""
    whole = int(np.floor(t))
    done = sum((action_at(s - 1, demo)[:3] for s in range(whole)), np.zeros(3))
    return 0.05 * (done + (t - whole) * action_at(whole - 1, demo)[:3])


def grey_at(t: int, demo: int = 0) -> int:
    """The one grey value of agent-view frame t; wrist frames are noise from the seed."""
    return (10 * demo + t + 1) % 256


def write_demo_file(
    path,
    lengths=(5, 7),
    alignment: str | None = "raw",
    image_size: int = 128,
    seed: int = 0,
    *,
    collection: dict | None = None,
    **overrides,
) -> Path:
    """Write ``path`` with one demonstration per length and return it.

    ``alignment`` "raw" or "shift" writes such a file with its attribute; None writes a shift file
    without the attribute, as upstream's are. ``collection`` adds the attribute of scripted files.
    An override, by data set name, replaces the values by ``function(values, demo)``; None leaves
    the data set out.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["num_demos"] = len(lengths)
        group.attrs["total"] = sum(lengths)
        group.attrs["bddl_file_name"] = f"bddl_files/libero_object/{path.stem}.bddl"
        group.attrs["problem_info"] = json.dumps({"language_instruction": "pick up the soup"})
        if alignment is not None:
            group.attrs["alignment"] = alignment
        if collection is not None:
            group.attrs["collection"] = json.dumps(collection)
        for demo, length in enumerate(lengths):
            values = _values(demo, length, alignment, image_size, seed)
            _write_demo(group.create_group(f"demo_{demo}"), values, overrides, demo)
    return path


def small(path, lengths=(5, 7), alignment="raw", **settings):
    """:func:`write_demo_file` with frames of four pixels."""
    return write_demo_file(path, lengths, alignment, image_size=4, **settings)


def fingers(values, demo):
    """Open (8 cm) until a step after the command to close, which comes at step 3; an override."""
    width = np.where(np.arange(len(values)) < 5, 0.04, 0.02)
    return np.stack([width, -width], axis=1)


def _values(demo, length, alignment, image_size, seed) -> dict[str, np.ndarray]:
    steps = range(length)
    offset = RAW_FRACTION if alignment == "raw" else SHIFT_FRACTION
    seen = [max(0.0, t + offset) for t in steps]
    states = np.zeros((length, 110))
    states[:, 0] = np.arange(length) / 20
    states[:, 1:8] = np.reshape([joints_at(t) for t in steps], (length, 7))
    first_seen = 0 if alignment == "raw" else 1  # the frame of step t shows time t, or t + 1
    grey = np.array([grey_at(t + first_seen, demo) for t in steps], dtype=np.uint8)
    shape = (length, image_size, image_size, 3)
    ee_pos = np.reshape([position_at(t, demo) for t in seen], (length, 3))
    ee_ori = np.full((length, 3), 0.5)
    return {
        "actions": np.reshape([action_at(t, demo) for t in steps], (length, 7)),
        "states": states,
        "robot_states": np.zeros((length, 9)),
        "rewards": np.zeros(length, np.uint8),
        "dones": np.zeros(length, np.uint8),
        "obs/agentview_rgb": np.broadcast_to(grey[:, None, None, None], shape),
        "obs/eye_in_hand_rgb": np.random.default_rng([seed, demo]).integers(
            0, 256, shape, dtype=np.uint8
        ),
        "obs/joint_states": np.reshape([joints_at(t) for t in seen], (length, 7)),
        "obs/gripper_states": np.tile([0.04, -0.04], (length, 1)),
        "obs/ee_pos": ee_pos,
        "obs/ee_ori": ee_ori,
        "obs/ee_states": np.hstack([ee_pos, ee_ori]),
    }


def _write_demo(group: h5py.Group, values: dict, overrides: dict, demo: int) -> None:
    group.attrs["num_samples"] = len(values["actions"])
    unknown = set(overrides) - {name.removeprefix("obs/") for name in values}
    assert not unknown, f"no such data sets: {unknown}"
    for name, array in values.items():
        change = overrides.get(name.removeprefix("obs/"), lambda array, demo: array)
        if change is not None:
            group[name] = change(array, demo)


def data_set(files, image_size: int = 8, **settings):
    """A ``LIBERODataset`` with these settings; unlike the preset's, it is not augmented."""
    from trm_helpers.data.dataset import LIBERODataset

    config = Config().replace(**{"augmentation": "none", **settings})
    return LIBERODataset(files, image_size=image_size, config=config)
