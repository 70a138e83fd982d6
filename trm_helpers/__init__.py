"""Helpers of the Tiny Recursive Model notebooks for robot control in LIBERO.

Public names are loaded on first use, so ``import trm_helpers`` loads neither PyTorch nor the
simulator. Unless ``$OMP_NUM_THREADS`` is set, this process and its children use one thread each.
"""

from __future__ import annotations

import importlib
import os
import warnings

# Libraries read this when they are loaded. On a busy machine several threads that wait for each
# other take ten times as long, and small networks gain little from them.
if not os.environ.get("OMP_NUM_THREADS", "").strip():  # unset or empty
    os.environ["OMP_NUM_THREADS"] = "1"

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm: a bar of text will do

__version__ = "0.1.0"

_MODULE_OF = {
    "LIBERODataset": "data.dataset",
    "ActionNormalizer": "data.normalize",
    "explore_libero_dataset": "demos.explore",
    "VisualEncoder": "policy.layers",
    "RecursiveBlock": "policy.recursion",
    "TRMPolicy": "policy.model",
    "BehaviorCloningTrainer": "training.train",
    "PolicyEvaluator": "evaluation.evaluate",
    "record_episode": "evaluation.rollout",
    "analyze_model_predictions": "visuals.explain",
    "visualize_recursive_states": "visuals.unrolled",
    "collect_demonstrations": "demos.collect",
    "load_policy": "training.runs",
    "run_notebook": "notebooks",
}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
