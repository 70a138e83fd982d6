"""Stand-ins for 04_train that learn nothing: a function, and a notebook that calls it.

They write `metrics.jsonl` with the loss `lr * hidden_dim * num_recursions / epoch`, one minute per
epoch, and go on where they were.
"""

import hashlib
from pathlib import Path

import nbformat

from trm_helpers.files import append_jsonl, read_jsonl

PARAMETERS = """
preset = "tiny"
run_name = ""
epochs = 1
stop_epoch = 0
selection_episodes = 0
seed = 0
lr = 1e-3
hidden_dim = 1
num_recursions = 1
more = {}
"""
CELL = """
import os, pathlib, time
from pretend_training import train_into
train_into(pathlib.Path(os.environ["TRM_ARTIFACTS_DIR"]) / run_name, globals())
"""


def train_into(run: Path, values: dict, successes: int = 0) -> None:
    """``successes`` of the ``selection_episodes`` succeed, the first ones."""
    rows = read_jsonl(run / "metrics.jsonl")
    for epoch in range(len(rows) + 1, (values["stop_epoch"] or values["epochs"]) + 1):
        loss = values["lr"] * values["hidden_dim"] * values["num_recursions"] / epoch
        append_jsonl(run / "metrics.jsonl", {"val_loss": loss, "seconds": 60})
    weights = f"{len(read_jsonl(run / 'metrics.jsonl'))} epochs".encode()
    (run / "last.safetensors").write_bytes(weights)
    for number in range(values["selection_episodes"]):
        append_jsonl(run / "selection.jsonl", {
            "suite": "libero_object", "task_id": 0, "init_state": None, "seed": number,
            "success": number < successes, "steps": 5,
            "sha256": hashlib.sha256(weights).hexdigest()[:16]})


def write_pretending_notebook(path: Path, cell: str = CELL) -> Path:
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3",
                                    "language": "python"}
    notebook.cells = [
        nbformat.v4.new_code_cell(PARAMETERS.strip(), metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]"),
        nbformat.v4.new_code_cell(cell.strip())]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path
