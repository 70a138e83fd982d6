"""Two pages on a run from the contents of its folder: ``report.md`` and ``report.html``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from textwrap import indent
from urllib.parse import quote

from ..files import dispensable, read_jsonl, write_bytes
from ..training.runs import find_run
from ..visuals.figure import save_figure
from ..visuals.plots import plot_training_curves
from .page import render
from .sections import Section, media, read_sections

_MARKDOWN = re.compile(r"[\\`*~\[\]<>|&]")


def write_report(run: str | Path) -> Path:
    """Write ``report.md`` and ``report.html`` into a run folder; return the path of the latter.

    Both have the task, success with its protocol and bounds, the episodes, the findings of
    07_visualize, training, robustness, depth, data, search, limits and the commands that reproduce
    the run, as far as they exist. Results of other weights than the run's are marked. A section
    that cannot be read gives the reason instead. ``report.html`` holds its films and figures, loads
    nothing, and has at most 10 MB. Raises ``FileNotFoundError`` for a folder without a trained run,
    ``OSError`` for one in which they cannot be written.
    """
    run = find_run(run, to_write=True)
    names = ("report.md", "report.html")
    for name in names:
        if (run / name).is_dir():
            raise IsADirectoryError(f"{run / name} is a folder; expected a file or nothing there")
    if not os.access(run, os.W_OK):
        raise PermissionError(f"the folder {run} is not writable, so {' and '.join(names)} cannot "
                              "be written")
    with dispensable("the figure of the losses"):
        if epochs := read_jsonl(run / "metrics.jsonl"):
            save_figure(plot_training_curves(epochs), run / "figures" / "04_training.png")
    sections = read_sections(run)
    html = render(run, sections)
    write_bytes(run / "report.md", _markdown(run, sections.values()).encode())
    return write_bytes(run / "report.html", html.encode())


def _markdown(run: Path, sections: Iterable[Section]) -> str:
    parts = [f"# {_text(run.name)}"]
    for section in sections:
        content = [section.warning and f"**{_text(section.warning)}**", *map(_text, section.texts),
                   section.rows and _table(section.rows),
                   "\n".join(f"- {_text(sentence)}" for sentence in section.sentences),
                   indent(section.code, "    ")]  # unlike a fence, nothing in it ends the block
        if any(content):
            parts += [f"## {section.title}", *filter(None, content)]
    films, figures = media(run, "videos/**/*.mp4"), media(run, "figures/*.png")
    if films:
        parts += ["## Films", "\n".join(f"- {_link(name)}" for name in films)]
    if figures:
        parts += ["## Figures", "\n\n".join(f"!{_link(name)}" for name in figures)]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)


def _link(name: str) -> str:
    return f"[{_text(name)}]({quote(name)})"


def _text(value: object) -> str:
    """``value`` with Markdown and HTML characters escaped; a sequence as its items."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))
