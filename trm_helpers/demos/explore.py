"""The contents of demonstration files in one dictionary."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import schema
from .alignment import measure_alignment
from .demo_files import (
    COLLECTION_ATTR,
    check_demo_file,
    dataset_names,
    demo_names,
    frame_stride,
    instruction_of,
    json_attribute,
    open_demo_file,
    source_of,
)
from .find_demos import find_demonstrations


def explore_libero_dataset(path: str | Path) -> dict:
    """The contents of a demonstration file, or of all below a folder; the first file in detail.

    Returns a dictionary with ``files``; of the first file ``file``, ``source`` (human, scripted or
    dagger), ``collection`` (settings of a scripted or DAgger file, else None), ``structure``
    (name -> shape, type), ``image_shapes`` and ``action_shape`` of its first demonstration,
    ``language_instruction``, ``alignment`` (name and evidence) and ``frames`` (camera ->
    (4, H, W, 3) uint8, equidistant over the first demonstration, as stored: upside down); over all
    files ``num_demos``, ``lengths`` (min, max, mean, total steps) and ``actions`` (one row per
    dimension: name, meaning, min, max, mean, std).

    Raises ``FileNotFoundError`` for a folder without any, :class:`DemoFileError` for a broken file.
    """
    path = Path(path)
    files = list(find_demonstrations([path])[0].values()) if path.is_dir() else [path]
    actions = []
    for each in files:
        check_demo_file(each)
        with open_demo_file(each) as file:
            actions += [file[schema.DATA_GROUP][name]["actions"][()] for name in demo_names(file)]
    alignment, evidence = measure_alignment(files[0])
    lengths = [len(demo) for demo in actions]
    columns = np.concatenate(actions).T.astype(np.float64)
    with open_demo_file(files[0]) as file:
        group = file[schema.DATA_GROUP]
        demo = group[demo_names(file)[0]]
        chosen = np.linspace(0, lengths[0] - 1, 4).round().astype(int)
        chosen -= chosen % frame_stride(demo)
        return {
            "files": [str(each) for each in files],
            "file": str(files[0]),
            "source": source_of(files[0]),
            "language_instruction": instruction_of(files[0]),
            "collection": json_attribute(group, COLLECTION_ATTR) or None,
            "structure": {name: {"shape": demo[name].shape, "dtype": str(demo[name].dtype)}
                          for name in dataset_names(demo)},
            "image_shapes": {camera: demo["obs"][camera].shape for camera in schema.CAMERAS},
            "action_shape": demo["actions"].shape,
            "frames": {camera: np.stack([demo["obs"][camera][t] for t in chosen])
                       for camera in schema.CAMERAS},
            "alignment": {"name": alignment, "evidence": evidence},
            "num_demos": len(lengths),
            "lengths": {"min": min(lengths), "max": max(lengths),
                        "mean": float(np.mean(lengths)), "total": sum(lengths)},
            "actions": [{"name": name, "meaning": meaning,
                         "min": float(column.min()), "max": float(column.max()),
                         "mean": float(column.mean()), "std": float(column.std())}
                        for name, meaning, column in zip(
                            schema.ACTION_NAMES, schema.ACTION_MEANING, columns, strict=True)],
        }
