"""Executed copies of the notebooks for readers on the web, ``docs/notebooks``.

    make gallery            # after make demo; python benchmarks/gallery.py artifacts/demo

A strip of six frames follows each film (GitHub plays none), links lead to where they did, and the
paths of the machine and papermill's notes are removed. A part of one figure of each notebook goes
to ``docs/images/thumbs``, for the table in README.md.
"""

import argparse
import base64
import io
import re
import sys
from pathlib import Path

import imageio.v3 as imageio
import nbformat
import numpy as np
from PIL import Image, ImageOps

from trm_helpers import paths
from trm_helpers.files import atomic_path, read_json
from trm_helpers.notebooks import suite_notebooks

_LIMIT = 12e6  # bytes of all copies together
_FRAMES = 6
_THUMBS = {  # figures of the run; left, upper, right and lower end of the part, as shares
    "00_action": (0.02, 0.1, 0.47, 0.97), "01_frames": (0.025, 0.1, 0.51, 0.97),
    "02_mask": (0.02, 0.075, 0.58, 0.83), "03_answer": (0.255, 0.125, 0.565, 1),
    "04_training": (0, 0.07, 0.52, 1), "05_coordinates": (0.245, 0.06, 1, 0.96),
    "06_episodes": (0.145, 0.15, 0.485, 1), "07_saliency": (0.02, 0.53, 0.86, 0.98)}
_THUMB = 240, 180  # pixels
_FILM = re.compile(r"data:video/mp4;base64,([A-Za-z0-9+/=]+)")


def strip(film: bytes) -> str:
    """Frames at equal intervals, the first and the last included, side by side: JPEG, base64."""
    frames = imageio.imread(film, extension=".mp4")
    chosen = frames[np.linspace(0, len(frames) - 1, _FRAMES).round().astype(int)]
    if chosen.shape[2] >= 2 * chosen.shape[1]:  # of an episode: the main view, on the left
        chosen = chosen[:, :, :chosen.shape[1]]
    row = Image.fromarray(np.concatenate(list(chosen), axis=1))
    row.thumbnail((1600, 1600))
    buffer = io.BytesIO()
    row.save(buffer, "JPEG", quality=90, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode()


def executed_copy(path: Path, revision: str) -> nbformat.NotebookNode:
    """The notebook at ``path`` as it is published."""
    notebook = nbformat.read(path, as_version=4)
    record = notebook.metadata.pop("papermill")
    checkout = str(Path(record["input_path"]).parents[1])

    def without_paths(text: str) -> str:
        return text.replace(checkout, "trm").replace(str(Path.home()), "~")

    for cell in notebook.cells:
        cell.source = cell.source.replace("](../docs/", "](../")
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        outputs = []
        for output in cell.get("outputs", []):
            outputs.append(output)
            if "text" in output:
                output.text = without_paths(output.text)
            data = output.get("data", {})
            for kind in data.keys() & {"text/plain", "text/html", "text/markdown"}:
                data[kind] = without_paths(data[kind])
            if film := _FILM.search(data.get("text/html", "")):
                outputs.append(nbformat.v4.new_output("display_data", {
                    "image/jpeg": strip(base64.b64decode(film[1])),
                    "text/plain": f"{_FRAMES} frames of the film"}))
        if outputs:
            cell.outputs = outputs
    note = (f"*Executed copy of [notebooks/{path.name}](../../notebooks/{path.name}), preset "
            f"`demo`, revision {revision}.*")
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(note, id="executed-copy"))
    return notebook


def thumbnails(run: Path, folder: Path) -> None:
    """A small image of a part of one figure per notebook."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in _THUMBS.items():
        with Image.open(run / "figures" / f"{name}.png") as figure, \
                atomic_path(folder / f"{name[:2]}.webp") as temporary:
            box = np.multiply(part, figure.size * 2).round().astype(int).tolist()
            small = ImageOps.pad(figure.convert("RGB").crop(box), _THUMB, color="white",
                                 method=Image.Resampling.LANCZOS)
            small.save(temporary, format="WEBP", quality=80, method=6)


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder with executed notebooks")
    parser.add_argument("--out", type=Path, default=paths.repo_root() / "docs" / "notebooks")
    given = parser.parse_args()
    revision = str(read_json(given.run / "results.json")["software"]["revision"])[:10]
    copies = {}
    for source in suite_notebooks():
        path = given.run / "notebooks" / source.name
        if not path.is_file():
            print(f"no {path}; expected the eight executed notebooks of `make demo`",
                  file=sys.stderr)
            return 2
        copies[path.name] = nbformat.writes(executed_copy(path, revision))
    size = sum(map(len, copies.values()))
    if size > _LIMIT:
        print(f"the copies have {size / 1e6:.1f} MB, more than {_LIMIT / 1e6:.0f}",
              file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    for name, text in copies.items():
        with atomic_path(given.out / name) as temporary:
            temporary.write_text(text + "\n")
        print(f"{given.out / name}: {len(text) / 1e6:.2f} MB")
    thumbnails(given.run, given.out.parent / "images" / "thumbs")
    return None


if __name__ == "__main__":
    sys.exit(main())
