"""Committed result files, and the tables and figures of docs/ made from them.

    python benchmarks/suite/publish.py add spatial-all RUN RUN ...
    python benchmarks/suite/publish.py add long RUN --label "first attempt"
    python benchmarks/suite/publish.py card look-or-remember "wide, 128 pixels" RUN/robustness.json
    python benchmarks/suite/publish.py ship spatial-trm RUN
    python benchmarks/suite/publish.py strip spatial FOLDER
    python benchmarks/suite/publish.py write

``add`` writes ``docs/results/<group>/<run>.json``, or ``docs/recursion/<group>/<run>.json`` for
episodes of another suite than the run's (``--suite``); ``card`` copies a run's depth.json,
robustness.json or probes.json to ``docs/recursion/<group>/<label>.json``. Both refuse results of
code with uncommitted changes; ``--dirty`` accepts them, and the page says how many there are.
``ship`` writes a policy for ``load_policy`` to ``pretrained/<name>``. ``strip`` writes one success
per task side by side, from a run's films, as an animation that plays within a page, to
``docs/images/<name>.webp``. ``write`` replaces the text between the marks ``<!-- <group> -->`` and
``<!-- end -->`` of docs/results.md and docs/recursion.md, and writes ``docs/images/<group>.png``
and the package's drawing of both recursions. Cards whose labels begin with a number, "10 with
recoveries", are plotted against that number of demonstrations.
"""

import argparse
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from policies import POLICIES  # noqa: E402
from suite import four_suites, scenes  # noqa: E402
from suite.cards import (  # noqa: E402
    failures_in_short,
    plot_cards,
    plot_depth_cards,
    rate_in_short,
)
from suite.drawing import plot_recursions  # noqa: E402

from trm_helpers import schema  # noqa: E402
from trm_helpers.config import ModelConfig  # noqa: E402
from trm_helpers.evaluation.cards import tasks_in_short  # noqa: E402
from trm_helpers.evaluation.depth import depth_rows, plot_depth_card  # noqa: E402
from trm_helpers.evaluation.plan import evaluation_folder, tasks_in_words  # noqa: E402
from trm_helpers.evaluation.robustness import WIDE, changes_of  # noqa: E402
from trm_helpers.evaluation.rollout import PHASES  # noqa: E402
from trm_helpers.files import atomic_path, read_json, read_jsonl, write_json  # noqa: E402
from trm_helpers.paths import repo_root  # noqa: E402
from trm_helpers.sim.env import load_task  # noqa: E402
from trm_helpers.stats import detectable, interval_text, paired_mcnemar  # noqa: E402
from trm_helpers.training.runs import find_run, load_config  # noqa: E402
from trm_helpers.visuals import figure, plots  # noqa: E402
from trm_helpers.visuals.colours import PALETTE  # noqa: E402
from trm_helpers.visuals.films import FPS, write_grid

DOCS = repo_root() / "docs"
DRAWING = repo_root() / "trm_helpers" / "visuals" / "recursions.png"
_EPISODE = ("suite", "task_id", "init_state", "seed", "success", "steps")
MISSING = "—"  # a cell without a measurement; zero is 0
REFERENCE = "reference"  # the row that the others are compared with
_NUMBERED = re.compile(r"(\d+) (.+)")  # a label that begins with a number of demonstrations
_MOST_TASKS = 3  # listed one by one
_FILM = re.compile(r"(\w+)-task(\d+)-init\d+")
_STRIP_COLUMNS, _STRIP_EVERY, _STRIP_QUALITY = 5, 1, 50


def uncommitted(content) -> bool:
    """Whether any code behind a result had uncommitted changes, or its state is unknown."""

    def states(value) -> list:
        if isinstance(value, list):
            return [state for each in value for state in states(each)]
        if isinstance(value, dict):
            return [value["dirty"]] if "dirty" in value else states(list(value.values()))
        return []

    found = states(content)
    return not found or any(state is not False for state in found)


def run_behind(content: dict) -> str:
    return content.get("card", content).get("run", "")


def store(path: Path, content: dict, source: Path, dirty: bool) -> None:
    if path.exists() and run_behind(read_json(path)) != run_behind(content):
        sys.exit(f"{path} holds another run; give this one another --label, or remove the file")
    if uncommitted(content) and not dirty:
        sys.exit(f"{source} was made by code with uncommitted or unknown changes; expected a clean "
                 "commit. Make it again, or give --dirty, and the page will say so")
    write_json(path, content)


def as_label(text: str) -> str:
    """The name of a file and of a row of a table."""
    if not re.fullmatch(r"[^\s./|\\]([^/|\\\n]*[^\s/|\\])?", text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a file's name and a table's cell")
    return text


def add(group: str, runs: list[str], name: str | None = None, dirty: bool = False,
        suite: str = "") -> None:
    for run in map(find_run, runs):
        config = read_json(run / "config.json")
        epochs = read_jsonl(run / "metrics.jsonl")
        played = evaluation_folder(run, suite or config["data"]["suite"])
        results = read_json(played / "results.json")
        weights = load_file(run / f"{results['protocol']['weights']}.safetensors")
        first = results["protocol"]["first_init_state"]
        stem = f"{name.replace(' ', '-')}-from-{first}" if name and not suite else run.name
        store(DOCS / ("recursion" if suite else "results") / group / f"{stem}.json", {
            **({"label": name} if name else {}), "run": run.name,
            "policy": policy_name(run, config),
            "parameters": sum(w.numel() for w in weights.values()),
            "seed": config["train"]["seed"], "epochs": len(epochs),
            "best_epoch": min(epochs, key=lambda row: row["val_loss"])["epoch"],
            "minutes": round(sum(row["seconds"] for row in epochs) / 60, 1),
            "demonstrations": config["data"]["num_demos"], "actor": config["data"].get("actor", ""),
            "trained_with": config["software"],
            "results": results,
            "episodes": [{key: row[key] for key in _EPISODE if key in row}
                         for row in read_jsonl(played / "episodes.jsonl")
                         if row["suite"] == results["protocol"]["suite"] and "error" not in row]},
              run, dirty)


def policy_name(run: Path, config: dict) -> str:
    """Which of the policies of benchmarks/policies.py a run's configuration is."""
    flat = {**vars(ModelConfig()), **config["data"], **config["model"], **config["train"]}
    fitting = [name for name, settings in POLICIES.items()
               if all(flat[key] == value for key, value in settings.items())]
    if not fitting:
        sys.exit(f"{run} has the settings of none of benchmarks/policies.py")
    return fitting[-1]  # later ones say more


def ship(name: str, run_name: str) -> None:
    """The best weights and what ``load_policy`` needs, without this machine's paths."""
    run, folder = find_run(run_name), repo_root() / "pretrained" / name
    folder.mkdir(parents=True, exist_ok=True)  # its card may be there already
    for file in ("best.safetensors", "metrics.jsonl"):
        shutil.copyfile(run / file, folder / file)
    software = read_json(run / "config.json").get("software", {})
    # whoever evaluates it need not collect the demonstrations that bounds replay
    config = load_config(run).replace(bound_episodes=0)
    write_json(folder / "config.json", {**config.to_dict(), "software": software})
    described = read_json(run / "policy.json")
    for file in described["trained_on"]["files"]:
        file["file"] = Path(file["file"]).name
    write_json(folder / "policy.json", described)


def strip(name: str, folder: Path, tasks: list[int]) -> None:
    successes, films = folder / "videos" / "success", {}
    for film in sorted(successes.glob("*-init*.mp4"), reverse=True):  # the first state stays
        if not (named := _FILM.fullmatch(film.stem)):
            sys.exit(f"{film} is not named SUITE-taskN-initN.mp4, as evaluations name films")
        suite, task = named.groups()
        if not tasks or int(task) in tasks:
            films[suite, int(task)] = film
    found = {task for _, task in films}
    if not films or found < set(tasks):
        sys.exit(f"{successes} has films of tasks {sorted(found)}; expected {tasks or 'some'}")
    rows = math.ceil(len(films) / _STRIP_COLUMNS)
    with tempfile.TemporaryDirectory() as scratch:
        film = write_grid(Path(scratch) / "strip.mp4", [films[task] for task in sorted(films)],
                          [load_task(*task).language for task in sorted(films)],
                          [True] * len(films), math.ceil(len(films) / rows))
        frames = [Image.fromarray(frame) for frame in imageio.mimread(film, memtest=False)]
    first, *rest = [*frames[:-1:_STRIP_EVERY], frames[-1]]
    milliseconds = 1000 * _STRIP_EVERY // FPS
    with atomic_path(DOCS / "images" / f"{name}.webp") as temporary:
        first.save(temporary, format="WEBP", save_all=True, append_images=rest, loop=0, method=6,
                   quality=_STRIP_QUALITY, duration=[milliseconds] * len(rest) + [2500])


def card(group: str, name: str, path: Path, dirty: bool = False) -> None:
    store(DOCS / "recursion" / group / f"{name.replace(' ', '-')}.json",
          {"label": name, "kind": path.stem, "card": read_json(path)}, path, dirty)


def write() -> None:
    for kind, show in (("results", show_results), ("recursion", show_cards)):
        page = DOCS / f"{kind}.md"
        text = page.read_text()
        for group in sorted(path for path in (DOCS / kind).glob("*") if path.is_dir()):
            files = sorted(group.glob("*"), key=lambda path: path.stem)
            stored = [read_json(path) for path in files]
            shown, fig = show(stored)
            shown += provenance(stored)
            pattern = rf"(<!-- {re.escape(group.name)} -->\n).*?(<!-- end -->)"
            text, found = re.subn(pattern, lambda match, shown=shown: match[1] + shown + match[2],
                                  text, flags=re.DOTALL)
            if not found:
                sys.exit(f"{page} has no mark <!-- {group.name} --> for {group}")
            if fig is not None:
                figure.save_figure(fig, DOCS / "images" / f"{group.name}.png")
        with atomic_path(page) as temporary:
            temporary.write_text(text)
    figure.save_figure(plot_recursions(), DRAWING)


def provenance(stored: list[dict]) -> str:
    """A line about results of uncommitted code; empty if there are none."""
    many = sum(map(uncommitted, stored))
    return (f"\n{many} of {len(stored)} results came from uncommitted code; no revision repeats "
            "them exactly.\n") if many else ""


def markdown(lines: list[list]) -> str:
    """A table; its first line is the head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


# --- docs/recursion.md ---------------------------------------------------------------------------
def show_cards(stored: list[dict]):
    """Tables and figure of a group's cards, all of one kind."""
    if "results" in stored[0]:
        return scenes.show_control(stored, markdown)
    kind = stored[0]["kind"]
    if kind == "look-again":
        return scenes.show_looks(stored, markdown)
    if kind == "which-bowl":
        return scenes.show_bowls(stored, markdown)
    if kind == "memory":
        return scenes.show_memory(stored, markdown)
    cards = {each["label"]: each["card"] for each in stored}
    if kind == "robustness":
        cards = {label: titled(card) for label, card in cards.items()}
    if kind == "robustness" and all(_NUMBERED.fullmatch(label) for label in cards):
        return compared(efficiency_lines(cards)), plot_efficiency(cards)
    if kind == "robustness":
        return (compared(robustness_lines(cards), "not run, or the policy lacks this input"),
                plot_cards(cards))
    if kind == "depth":
        fig = plot_depth_cards(cards) if len(cards) > 1 else plot_depth_card(*cards.values())
        return depth_tables(cards), fig
    (only,) = cards.values()  # of probes one to a group
    only = {**only, "rows": [{**row, "state": state_name(row, only)} for row in only["rows"]]}
    lines = [["state", *only["quantities"]]]
    lines += [[row["state"], *(f"{middle:.2f} ({low:.2f} to {high:.2f})"
                               for middle, low, high in row["explained"])] for row in only["rows"]]
    return markdown(lines), plot_probes(only)


def state_name(row: dict, probes: dict) -> str:
    """The answer y of a policy without a latent z is its only state, h."""
    two = any(other["state"].startswith("latent") for other in probes["rows"])
    return row["state"] if two else row["state"].replace("answer", "state")


def titled(card: dict) -> dict:
    """A robustness card with the changes' titles of today."""
    changes = changes_of(card["suite"])
    changes.pop(WIDE)  # randomised layouts were others when some of the cards were made
    return {**card, "rows": [{**row, "title": changes[row["name"]].title}
                             if row["name"] in changes else row for row in card["rows"]]}


def depth_tables(cards: dict[str, dict]) -> str:
    """Success of each way to recurse, then its cost."""
    success = [["recursion", "successes", "95 % Wilson interval (%)",
                "against as trained: gap (points), paired p", "mean length, steps"]]
    cost = [["recursion", "mean recursions", f"in {' / '.join(PHASES)}", "ms per action",
             "action error"]]
    for label, card in cards.items():
        for row, made in zip(depth_rows(card), card["rows"], strict=True):
            name = f"{label}, {row['recursion']}" if len(cards) > 1 else row["recursion"]
            by_phase = [f"{made['by_phase'][phase]:.1f}" if phase in made["by_phase"] else ""
                        for phase in PHASES]
            against = f"{row['gap (points)']}, p = {row['paired p']}"
            success.append([name, row["successes"], row["95 % Wilson interval (%)"],
                            against if row["paired p"] else REFERENCE, row["length"]])
            cost.append([name, row["mean recursions"],
                         " / ".join(by_phase), row["ms per action"],
                         row.get("action error") or MISSING])
    if all(line[-1] == MISSING for line in cost[1:]):  # the demonstrations were not there
        return f"{markdown(success)}\n{markdown([line[:-1] for line in cost])}"
    return f"{markdown(success)}\n{markdown(cost)}" + missing("not measured")


def missing(meaning: str) -> str:
    """A line that says what a cell without a number means."""
    return f"\n{MISSING}: {meaning}.\n"


def compared(lines: list[list], meaning: str = "not run") -> str:
    gaps = any(MISSING in line for line in lines)
    return markdown(lines) + missing(meaning) * gaps


def robustness_lines(cards: dict[str, dict]) -> list[list[str]]:
    rows = {label: {row["name"]: row for row in card["rows"]} for label, card in cards.items()}
    titles = {row["name"]: row["title"] for card in cards.values() for row in card["rows"]}
    return [["change", *rows]] + [[title, *(cell(of.get(name)) for of in rows.values())]
                                           for name, title in titles.items()]


def cell(row: dict | None) -> str:
    """Rate with its interval and failure modes."""
    return "; ".join(filter(None, [rate_in_short(row), failures_in_short(row)])) if row else MISSING


def by_kind(cards: dict[str, dict]) -> dict[str, dict[int, dict]]:
    """The plain row of each kind and number of demonstrations, the numbers ascending."""
    kinds: dict[str, dict[int, dict]] = {}
    for label, card in cards.items():
        number, kind = _NUMBERED.fullmatch(label).groups()
        kinds.setdefault(kind, {})[int(number)] = card["rows"][0]
    return {kind: dict(sorted(rows.items())) for kind, rows in sorted(kinds.items(), reverse=True)}


def efficiency_lines(cards: dict[str, dict]) -> list[list]:
    kinds = by_kind(cards)
    numbers = sorted({number for rows in kinds.values() for number in rows})
    return [["demonstrations per task", *numbers]] + [
        [kind, *(rate_in_short(rows[number]) if number in rows else MISSING for number in numbers)]
        for kind, rows in kinds.items()]


@figure.styled
def plot_efficiency(cards: dict[str, dict]):
    """Success by the number of demonstrations, a line for each kind of them."""
    fig = figure.new_figure(7, 4)
    axes = fig.subplots()
    for number, (kind, rows) in enumerate(by_kind(cards).items()):
        rate, whiskers = figure.success_rates(list(rows.values()))
        axes.errorbar(list(rows), rate, whiskers, capsize=3, color=PALETTE[number],
                      marker="os^D"[number % 4], label=kind)
    axes.set(xlabel="demonstrations per task, of which a fifth chooses the epoch",
             xticks=sorted({number for rows in by_kind(cards).values() for number in rows}),
             ylabel="success rate (%)\n(whiskers: 95 % Wilson interval)", ylim=(-2, 104),
             title="Success by the number of demonstrations\n"
                   + tasks_in_short(next(iter(cards.values()))))
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")
    return figure.describe(fig, " ".join(f"{kind}: " + "; ".join(
        f"{number} demonstrations, {row['successes']} of {row['episodes']}"
        for number, row in rows.items()) + "." for kind, rows in by_kind(cards).items()))


@figure.styled
def plot_probes(probes: dict):
    """Variance that the probe explains of each quantity, by depth."""
    rows = {row["state"]: np.array(row["explained"]) for row in probes["rows"]}
    fig = figure.new_figure(9.5, 4)
    axes = fig.subplots()
    for number, quantity in enumerate(probes["quantities"]):
        colour = PALETTE[number % len(PALETTE)]
        axes.axhline(rows["input"][number, 0], color=colour, linestyle=":", linewidth=1)
        for word, style in (("answer", "-"), ("state", "-"), ("latent", "--")):
            depths = [int(name.split()[-1]) for name in rows if name.startswith(word)]
            if not depths:
                continue
            middle, low, high = np.array([rows[f"{word}, depth {depth}"][number]
                                          for depth in depths]).T
            axes.errorbar(np.array(depths) + 0.03 * number, middle, [middle - low, high - middle],
                          color=colour, linestyle=style, marker="o", markersize=3, capsize=2)
        axes.plot([], [], color=colour, linewidth=4, label=quantity)
    for word, style in (("answer y", "-"), ("state h", "-"), ("latent z", "--"), ("input x", ":")):
        if any(name.startswith(word.split()[0]) for name in rows):
            axes.plot([], [], color="black", linestyle=style, label=word)
    figure.count_axis(axes.xaxis)
    below = [quantity for number, quantity in enumerate(probes["quantities"])
             if max(line[number, 0] for line in rows.values()) < 0.02]
    axes.set(xlabel="recursions" + f"\n(below the axis, worse than the mean: {', '.join(below)})"
             * bool(below), ylabel="share of variance explained", ylim=(-0.1, 1.02),
             title="What a linear probe reads from the state after each recursion")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    last = list(rows)[-1]
    return figure.describe(fig, f"At {last}: " + "; ".join(
        f"{quantity} {rows[last][number, 0]:.2f}"
        for number, quantity in enumerate(probes["quantities"])) + ".")


# --- docs/results.md -----------------------------------------------------------------------------
def show_results(rows: list[dict]):
    """Table of a group's runs, and for many tasks a figure of those on the same init states."""
    rows.sort(key=lambda row: (init_states(row), bool(row.get("actor")), "label" in row,
                               list(POLICIES).index(row["policy"]), row.get("actor", ""),
                               row["seed"]))
    if rows[0]["results"]["protocol"]["suite"] == schema.JOINT_SUITE:
        return (f"{markdown(four_suites.success_lines(rows, label))}\n{training_table(rows)}",
                four_suites.plot_forty_tasks(rows[-1]))  # DAgger last
    fig = None
    if len(rows[0]["results"]["tasks"]) > _MOST_TASKS:
        played = [init_states(row) for row in rows]
        most = max(played, key=played.count)
        fig = plots.plot_success({label(row, rows): row["results"] for row in rows
                                  if init_states(row) == most})
    widest = max((row["results"] for row in rows),
                 key=lambda results: results["success_rate"] * (1 - results["success_rate"]))
    return f"{tables(rows)}\n{detectable(widest)}.\n", fig


def init_states(row: dict) -> tuple[int, int]:
    """First and last init state of a run's episodes, including those that could not be run."""
    first = row["results"]["protocol"]["first_init_state"]
    return first, first + max(task["episodes"] for task in row["results"]["tasks"]) - 1


def label(row: dict, rows: list[dict]) -> str:
    if "label" in row:
        return row["label"]
    name = f"{row['policy']}, DAgger" if row.get("actor") else row["policy"]
    several = len({other["seed"] for other in rows}) > 1
    return f"{name}, seed {row['seed']}" if several else name


def tables(rows: list[dict]) -> str:
    """Success, compared with the first policy of the same seed or else seed; then training.

    Only runs on the same init states are compared.
    """
    ranges = sorted({init_states(row) for row in rows})
    first = {(init_states(row), row["seed"]): row for row in reversed(rows)}
    tasks = [task["task_id"] for task in rows[0]["results"]["tasks"]]
    few = len(tasks) <= _MOST_TASKS
    columns = (["95 %, tasks resampled", "worst task"] if not few
               else [f"tasks {' / '.join(map(str, tasks))}"] if len(tasks) > 1 else [])
    against = f"against {label(rows[0], rows[:1])}: gap, paired p"
    if len(ranges) > 1:
        columns[-1:] = ["init states"]
        against = "against the first on the same init states: gap, paired p"
    success = [["policy", "successes", "95 % Wilson interval", *columns, against]]
    for row in rows:
        results = row["results"]
        values = []
        if few and columns:
            values = [" / ".join(str(task["successes"]) for task in results["tasks"])]
        elif columns:
            least = min(results["tasks"], key=lambda task: task["success_rate"])
            worst = [task["task_id"] for task in results["tasks"]
                     if task["success_rate"] == least["success_rate"]]
            values = [f"{interval_text(results['task_low'], results['task_high'])} %",
                      f"{tasks_in_words(worst)}: "
                      f"{least['successes']} of {least['episodes']}"]
        if len(ranges) > 1:
            values[-1:] = ["{} to {}".format(*init_states(row))]
        reference = next(other for other in rows if init_states(other) == init_states(row))
        against = REFERENCE
        if row is not reference:
            other = first[init_states(row), row["seed"]]
            other = reference if other is row else other
            test = paired_mcnemar(other["episodes"], row["episodes"])
            p_value = test["p_value"]
            against = (f"seed {other['seed']}: " * (other["seed"] != row["seed"])
                       + f"{100 * test['difference']:+.1f} points, "
                       f"p {'< 0.001' if p_value < 0.001 else f'= {p_value:.2g}'}")
        interval = interval_text(results["wilson_low"], results["wilson_high"])
        success.append([label(row, rows), f"{results['successes']} of {results['episodes']}",
                        f"{interval} %", *values, against])
    return f"{markdown(success)}\n{training_table(rows)}"


def training_table(rows: list[dict]) -> str:
    varied = len({row["demonstrations"] for row in rows}) > 1
    lines = [["policy", *["demonstrations per task"] * varied, "parameters",
              "mean length, steps", "best epoch", "training time, minutes"]]
    lines += [[label(row, rows), *[row["demonstrations"]] * varied,
               f"{row['parameters'] / 1e6:.1f} M", f"{row['results']['mean_length']:.0f}",
               f"{row['best_epoch']} of {row['epochs']}", f"{row['minutes']:.0f}"] for row in rows]
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("group")
    adding.add_argument("runs", nargs="+")
    adding.add_argument("--label", type=as_label,
                        help="of one run, instead of its policy's name")
    adding.add_argument("--suite", default="", help="of the episodes, if the run's is another")
    adding.add_argument("--dirty", action="store_true")
    showing = commands.add_parser("card")
    showing.add_argument("group")
    showing.add_argument("label", type=as_label)
    showing.add_argument("path", type=Path)
    showing.add_argument("--dirty", action="store_true")
    shipping = commands.add_parser("ship")
    shipping.add_argument("name")
    shipping.add_argument("run")
    stripping = commands.add_parser("strip")
    stripping.add_argument("name")
    stripping.add_argument("folder", type=Path)
    stripping.add_argument("--tasks", type=int, nargs="+", default=[])
    commands.add_parser("write")
    given = parser.parse_args()
    if given.command == "add":
        if given.label and len(given.runs) > 1:
            parser.error("--label names one run")
        add(given.group, given.runs, given.label, given.dirty, given.suite)
    elif given.command == "card":
        card(given.group, given.label, given.path, given.dirty)
    elif given.command == "ship":
        ship(given.name, given.run)
    elif given.command == "strip":
        strip(given.name, given.folder, given.tasks)
    else:
        write()


if __name__ == "__main__":
    main()
