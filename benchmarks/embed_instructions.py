"""Write ``trm_helpers/data/task_embeddings.npz``, the embeddings of the suites' instructions.

    python benchmarks/embed_instructions.py

Needs the extra ``language`` (``pip install -e '.[language]'``); to be repeated when a suite is
added.
"""

import numpy as np

from trm_helpers import schema
from trm_helpers.data.language import TABLE, compute_embeddings, normalize_instruction
from trm_helpers.files import atomic_path
from trm_helpers.sim.env import load_task, written_instruction


def libero_instructions() -> tuple[list[str], dict[str, str]]:
    """The instructions of all tasks, LIBERO-PRO's too, each once, sorted; and other wordings.

    Policies are evaluated with the instruction of :func:`load_task`. Upstream's demonstration files
    hold the wording of the task's BDDL source, which differs for some tasks ("pick the akita black
    bowl ..."): the second value maps such wordings, some of them also used by LIBERO-PRO, to the
    instruction. Raises ``RuntimeError`` if a wording would mean two instructions.
    """
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
    instructions = {normalize_instruction(task.language) for task in tasks}
    return sorted(instructions - aliases.keys()), dict(sorted(aliases.items()))


def main() -> None:
    texts, aliases = libero_instructions()
    texts = ["", *texts]  # no instruction
    with atomic_path(TABLE) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file, instructions=np.array(texts), embeddings=compute_embeddings(texts),
            aliases=np.array(list(aliases)), alias_of=np.array(list(aliases.values())))
    print(f"{TABLE}: {len(texts)} instructions, {len(aliases)} other wordings, "
          f"{TABLE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
