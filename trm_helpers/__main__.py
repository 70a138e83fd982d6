"""The command line, ``python -m trm_helpers COMMAND``: the notebooks' steps without notebooks."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro
except ModuleNotFoundError:
    sys.exit(f"{sys.executable} has no tyro, which trm_helpers needs; `source .venv/bin/activate` "
             "after `make setup` chooses the interpreter that has everything")
from tyro.conf import OmitArgPrefixes, Positional, SuppressFixed

from . import config as settings
from . import paths, schema
from .config import (
    COMMON,
    PRESETS,
    Config,
    DataConfig,
    EvalConfig,
    Folder,
    from_flat,
    parse_parameter,
    types_of,
)
from .software import minutes_left
from .stats import counted

DONE, FAILED, BAD_VERDICT, INTERRUPTED = 0, 1, 3, 130  # 2 is wrong usage
Result = tuple[Any, list[str], bool]  # for --json, lines for a person, whether all is well
Pairs = Annotated[tuple[tuple[str, str], ...], tyro.conf.UseAppendAction]
# text by what it names in usage lines
RunName = Annotated[Positional[str], tyro.conf.arg(metavar="RUN")]
Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Suite = Annotated[str, tyro.conf.arg(metavar="SUITE")]
HELP = {"-h", "--help"}
_CHANGES = ("plain", *schema.PERTURBATIONS[1:], "wide", *schema.VARIATIONS)  # of a robustness card


def _default(text: str) -> Any:
    """What help says of an option that is empty by default."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


@dataclass
class Collect:
    """Find the demonstrations of the tasks, or collect scripted ones.

    Example: `python -m trm_helpers collect demo --task-ids 0 2 5`

    DAgger: `python -m trm_helpers collect demo --actor my-run --beta 0.5 --num-demos 40`
    """

    data: OmitArgPrefixes[DataConfig]
    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = "demo"

    def __call__(self) -> Result:
        from .demos.collect import ensure_demonstrations
        from .evaluation.actor import actor_of

        config = dataclasses.replace(from_flat(self.preset), data=self.data)
        files = ensure_demonstrations(config, actor_of(config))
        return {task_id: str(path) for task_id, path in files.items()}, [], True


@dataclass
class Validate:
    """Print the quality card of a demonstration file: a verdict on each known fault.

    Example: `python -m trm_helpers validate NAME_demo.hdf5 --suite libero_spatial --task-id 2`
    """

    file: Annotated[Positional[str], tyro.conf.arg(metavar="FILE")]  # *_demo.hdf5
    # the task's suite; with it, frames and replays are checked in the simulator too
    suite: Suite = ""
    task_id: int = 0  # index of the task in the suite
    replays: int = 3  # demonstrations to replay

    def __call__(self) -> Result:
        for name in ("task_id", "replays"):
            value = getattr(self, name)
            if not self.suite and value != getattr(Validate, name):
                raise ValueError(f"--{name.replace('_', '-')} {value} needs a suite; give --suite")
        from .demos.quality import BAD, frame_size, quality_card
        from .sim.env import LiberoEnv

        file = Path(self.file)
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist; expected a demonstration file")
        with (LiberoEnv(self.suite, self.task_id, image_size=frame_size(file)) if self.suite
              else contextlib.nullcontext()) as env:
            card = quality_card(file, env, self.replays, env.horizon if env else 0)
        lines = [f"{row['verdict']:5} {row['check']}: {row['found']}; expected {row['expected']}"
                 for row in card]
        if not self.suite:
            lines += ["not checked without --suite and --task-id: frames and replays in the "
                      "simulator, lengths against the horizon"]
        return card, lines, all(row["verdict"] != BAD for row in card)


@dataclass
class Train:
    """Train a policy into artifacts/RUN_NAME, or resume there, as 04_train does.

    Example: `python -m trm_helpers train trm --run-name my-trm --lr 5e-4`

    On several GPUs: `torchrun --nproc_per_node 2 -m trm_helpers train ...`
    """

    run_name: Name  # folder under artifacts/
    config: OmitArgPrefixes[SuppressFixed[Config]]

    def __call__(self) -> Result:
        from .demos.collect import ensure_demonstrations
        from .evaluation.actor import actor_of
        from .evaluation.evaluate import trainer_of
        from .training.devices import choose_device
        from .training.distributed import Team
        from .training.runs import create_run

        team = Team(choose_device(self.config.train.device).type)
        if not team.is_main:
            team.barrier()  # the main process makes the folder and the demonstrations
        run = paths.run_dir(self.run_name)
        if team.is_main:
            create_run(self.config, self.run_name, resume=True)
        files = ensure_demonstrations(self.config, actor_of(self.config))
        if team.is_main:
            team.barrier()
        trainer = trainer_of(self.config, files, run)
        rows = trainer.fit()
        if not team.is_main:
            return None, [], True
        lines = [f"{run}: {counted(len(rows), 'epoch')}, "
                 f"validation loss {rows[-1]['val_loss']:.4f}"]
        if trainer.finished:
            lines.append(_next("evaluate", self.run_name))
        else:
            lines[0] += (f"; stopped after {len(rows)} of {trainer.last_epoch} epochs because the "
                         "time is up; the same command continues")
        return {"run": str(run), **rows[-1]}, lines, True


_OF_TRIALS = {  # settings of training that a search chooses itself, and how
    **{name: f"whose trials have the values of --{values.replace('_', '-')}" for name, values in (
        ("lr", "search_lrs"), ("hidden_dim", "search_hidden_dims"),
        ("num_recursions", "search_num_recursions"), ("epochs", "search_epochs"))},
    **dict.fromkeys(("patience", "stop_epoch", "max_minutes", "wandb_mode"),
                    "whose trials train to the end, untracked")}


@dataclass
class Search:
    """Search hyper-parameters into artifacts/RUN_NAME/search, as 05_search does.

    Example: `python -m trm_helpers search demo --run-name s --search-workers 2`
    """

    run_name: Name  # folder under artifacts/
    config: OmitArgPrefixes[SuppressFixed[Config]]

    def __call__(self) -> Result:
        from .demos.collect import ensure_demonstrations
        from .evaluation.actor import actor_of
        from .search.search import claim, run_search, verdict

        ignored = self.config.changes().keys() & _OF_TRIALS.keys()
        for name in sorted(ignored):
            raise ValueError(f"--{name.replace('_', '-')} has no effect on a search, "
                             f"{_OF_TRIALS[name]}; leave it out")
        folder = paths.run_dir(self.run_name)
        claim(self.config, folder)  # refuses other settings before anything is collected
        ensure_demonstrations(self.config, actor_of(self.config))
        trials = run_search(self.config, folder)
        lines = [f"{place}. {trial['trial']}: {_summary(trial)}"
                 for place, trial in enumerate(trials, 1)]
        ok = all(trial["state"] != "failed" for trial in trials)
        return trials, [*lines, verdict(trials), f"results  {folder / 'search'}"], ok


@dataclass
class _Rollouts:
    run: RunName  # a run under artifacts/
    eval: OmitArgPrefixes[EvalConfig]
    weights: Literal[schema.WEIGHTS] = "best"  # which of the run's weights to play
    # tasks to play
    task_ids: Annotated[tuple[int, ...], _default("the run's tasks")] = ()


_UNUSED = {"num_videos": 0, "perturbation": "none", "bound_episodes": 0}  # by the cards
_OF_RUNS = {"weights": "best", "demo_dir": "", "against": "", "bound_episodes": 0}  # no baselines


def _refuse_unused(command: _Rollouts, by: str, **unused: int | str) -> None:
    """Raise ``ValueError`` for a setting with another value than its default in ``unused``."""
    for name, usual in unused.items():
        value = getattr(command, name, getattr(command.eval, name, usual))
        if value != usual:
            raise ValueError(f"--{name.replace('_', '-')} {value} has no effect on {by}; "
                             "leave it out")


@dataclass
class Evaluate(_Rollouts):
    """Measure a run's success on the official init states, as 06_eval does.

    RUN may also be expert, random or no-op, with a suite and, by default, all its tasks.

    Example: `python -m trm_helpers evaluate my-trm --num-episodes 20 --against demo`
    """

    suite: Suite = ""  # suite to play, LIBERO-PRO's included; empty: the run's
    # folder of the run's demonstrations, for replays, if it was trained with --demo-dir
    demo_dir: Folder = ""
    against: Name = ""  # another evaluated run to compare with, episode by episode

    def __call__(self) -> Result:
        from .evaluation.baselines import BASELINES, plan_baseline, plan_bounds, play_bounds
        from .evaluation.compare import comparable, compare_runs, stale_episodes
        from .evaluation.evaluate import plan_run
        from .stats import detectable, format_comparison, format_success

        # everything is checked before the first episode
        if self.run in BASELINES:
            _refuse_unused(self, f"the baseline {self.run!r}", **_OF_RUNS)
            if not self.suite:
                raise ValueError(f"the baseline {self.run!r} needs a suite; give --suite")
            folder = paths.artifacts_dir() / f"{self.run}-{self.suite}"
            planned = plan_baseline(self.run, folder, self.eval, self.suite, self.task_ids)
            bounds = {}
        else:
            if not self.eval.bound_episodes:
                _refuse_unused(self, "an evaluation without --bound-episodes", demo_dir="")
            planned = plan_run(self.run, self.eval, self.weights, self.suite, self.task_ids)
            if self.against:
                comparable(planned, self.against)
            bounds = plan_bounds(self.run, self.eval, self.suite, self.task_ids, self.demo_dir)
        results = planned.play()
        bounds = play_bounds(bounds)
        lines = [f"{task['suite']} {task['task_id']}: {format_success(task)}"
                 for task in results["tasks"]]
        lines.append(format_success(results))
        lines += [f"{name}: {format_success(bound)}" for name, bound in bounds.items()]
        if self.run not in BASELINES:
            places = {"results": planned.folder / planned.results_name,
                      "films": planned.folder / "videos"}
            lines += [f"{what}  {path}" for what, path in places.items() if path.exists()]
            lines += [_next("report", self.run)]
        test = None
        if self.against and results["not_run"]:
            lines += [f"not compared with {self.against}: episodes are missing"]
        elif self.against:
            test = compare_runs(self.run, self.against, planned.suite, episodes=planned.planned)
            lines += [format_comparison(test, self.run, self.against), detectable(results),
                      *stale_episodes(self.against, planned.suite)]
        complete = not results["errors"] and not results["not_run"]
        return {**results, "bounds": bounds, "comparison": test}, lines, complete


@dataclass
class Report:
    """Write report.html and report.md, summaries of a run, into its folder, as 07_visualize does.

    Example: `python -m trm_helpers report my-trm`
    """

    run: RunName  # a run under artifacts/

    def __call__(self) -> Result:
        from .report import write_report

        path = write_report(self.run)
        return {"report": str(path)}, [str(path)], True


@dataclass
class Robustness(_Rollouts):
    """Measure a run's success when images, actions, layouts or instructions change.

    Writes robustness.json into the run's folder.

    Example: `python -m trm_helpers robustness my-trm --num-episodes 10 --only swap brightness`
    """

    # changes to play
    only: Annotated[tuple[Literal[_CHANGES], ...], _default("all")] = ()

    def __call__(self) -> Result:
        import pandas as pd

        from .evaluation.robustness import card_notes, card_rows, robustness_card

        _refuse_unused(self, "robustness, only on evaluate", bound_episodes=0)
        card = robustness_card(self.run, self.eval, self.weights, self.task_ids, self.only)
        ok = not card["failed"] and not any(row["errors"] for row in card["rows"])
        table = pd.DataFrame(card_rows(card)).to_string(index=False)
        return card, [table, *card_notes(card), _next("report", self.run)], ok


@dataclass
class Depth(_Rollouts):
    """Measure a run's success with fewer and more recursions; writes depth.json.

    Example: `python -m trm_helpers depth my-trm --num-episodes 10 --depths 1 2 4`
    """

    # recursions per decision
    depths: Annotated[tuple[int, ...], _default("1, and half, once and twice the trained")] = ()
    # squared change of an action below which the convergence rule stops
    thresholds: tuple[float, ...] = (1e-4, 1e-3)
    # rows to play beside the policy as trained, such as "fixed 1"
    only: Annotated[tuple[str, ...], _default("all")] = ()

    def __call__(self) -> Result:
        import pandas as pd

        from .evaluation.depth import depth_card, depth_rows
        from .stats import detectable

        _refuse_unused(self, "depth, only on evaluate", **_UNUSED)
        card = depth_card(self.run, self.depths, self.thresholds, self.eval, self.weights,
                          self.task_ids, self.only)
        table = pd.DataFrame(depth_rows(card)).to_string(index=False)
        ok = not any(row["errors"] for row in card["rows"])
        return card, [table, detectable(card["rows"][0]), _next("report", self.run)], ok


@dataclass
class Run:
    """Run all notebooks with a preset, or one notebook such as 04_train.

    Example: `python -m trm_helpers run 04_train -p preset tiny -p task_ids "[0, 1]"`
    """

    # a preset, a notebook of the suite, or the path of an .ipynb
    what: Annotated[Positional[str], tyro.conf.arg(metavar="PRESET|NOTEBOOK")]
    run_name: Name = ""  # folder under artifacts/
    # a parameter of the notebooks, such as lr 1e-3
    parameter: Annotated[Pairs, tyro.conf.arg(metavar="NAME VALUE", aliases=["-p"])] = ()

    def __call__(self) -> Result:
        from .notebooks import run_notebook, run_suite
        from .training.runs import find_run

        given: dict[str, Any] = {"run_name": self.run_name} if self.run_name else {}
        if self.what in PRESETS:
            given["preset"] = self.what
        for name, text in self.parameter:
            value = parse_parameter(name, text)
            if given.setdefault(name, value) != value:
                raise ValueError(f"{name}={value!r} contradicts {name}={given[name]!r}")
        if self.what in PRESETS:
            return {"run": str(run_suite(**given))}, [], True
        began = time.time()
        notebook = run_notebook(self.what, given)
        lines = [str(notebook)]
        if "run_name" not in given:  # a run that the notebook has named
            with contextlib.suppress(FileNotFoundError):  # no run yet
                newest = find_run()
                if (newest / "policy.json").stat().st_mtime >= began:
                    lines.append(f"run  {newest.name}")
        return {"notebook": str(notebook)}, lines, True


@dataclass
class Preflight:
    """Check this machine: versions, OpenGL, a timed frame, settling objects, disk and memory.

    Example: `python -m trm_helpers preflight --quick`
    """

    quick: bool = False  # skip the simulator
    gl: bool = False  # only check that OpenGL renders; as root, install missing packages
    selftest: bool = False  # only check that twelve seeded faults of evaluations are detected

    def __call__(self) -> Result:
        from .opengl import ensure_gl
        from .preflight import preflight, table

        if self.quick + self.gl + self.selftest > 1:
            raise ValueError("--quick, --gl and --selftest are three different checks; choose one")
        if self.gl:
            found = ensure_gl()
            line = f"OpenGL renders with {found['renderer']}, {found['ms']:.0f} ms a frame"
            return found, [line], True
        if self.selftest:
            from .selftest import selftest

            checks = selftest()
        else:
            checks = preflight(quick=self.quick)
        passed = sum(check.status == "ok" for check in checks)
        return ([dataclasses.asdict(check) for check in checks],
                [table(checks), f"{passed} of {len(checks)} checks passed"],
                all(check.status != "fail" for check in checks))


COMMANDS = {kind.__name__.lower(): kind
            for kind in (Collect, Validate, Train, Search, Evaluate, Robustness, Depth, Report,
                         Run, Preflight)}


def parse(argv: list[str]) -> Any:
    """The command with its arguments; exits with a message on wrong usage."""
    if HELP & {*argv[:1]}:
        _print(_list_commands())
        sys.exit(0)
    if not argv or argv[0] not in COMMANDS:
        _exit_with_usage(_list_commands(*argv[:1]))
    name, *rest = argv
    kind, given, description = COMMANDS[name], {}, None
    takes_preset = kind in (Collect, Train, Search)
    if takes_preset:
        preset = rest.pop(0) if rest and not rest[0].startswith("-") else "demo"
        config = from_flat(preset)
        given = {"config": config}
        if kind is Collect:
            given = {"data": config.data, "preset": preset}
        description = f"{inspect.getdoc(kind)}\n\n{_common_settings(kind, config)}"
    elif issubclass(kind, _Rollouts):
        named = bool(rest) and not rest[0].startswith("-")
        if rest and not named and not HELP & {*rest}:
            _exit_with_usage("the run comes first, because it sets the defaults of the other "
                             f"options: python -m trm_helpers {name} RUN {rest[0]} ...")
        given = {"eval": _settings_of(rest[0]) if named else EvalConfig()}
        if kind is not Evaluate:
            given = {"eval": dataclasses.replace(given["eval"], **_UNUSED)}
    required = {part.name: tyro.MISSING for part in dataclasses.fields(kind)
                if part.default is dataclasses.MISSING}
    page = io.StringIO()
    try:
        with contextlib.redirect_stdout(page):
            return tyro.cli(kind, args=rest, default=kind(**{**required, **given}),
                            description=description, prog=f"python -m trm_helpers {name}")
    except SystemExit as wrong:
        if wrong.code and (hints := _hints(kind, rest)):
            print("\n".join(hints), file=sys.stderr)
        if text := page.getvalue():  # tyro's usage has the options before the positional arguments
            usage, _, options = text.partition("\n")
            usage = re.sub(r" \[.*?\]", "", usage) + " [PRESET]" * takes_preset
            options = re.sub(r"config\.(\w+ options)", r"\1", options)
            _print(f"{usage} [OPTIONS]\n{options}")
        raise


def _hints(kind: type, given: Sequence[str]) -> list[str]:
    """A hint for each option that is another library's name of a setting.

    For misspelt options tyro has its own.
    """
    hints, options = [], _options(kind)
    for option in (text.partition("=")[0] for text in given if text.startswith("--")):
        name = option[2:].replace("-", "_")
        ours = schema.OTHER_NAMES.get(name)
        if ours in options and name not in options:
            hints.append(f"unknown option {option}; did you mean --{ours.replace('_', '-')}?")
    return hints


def _options(kind: type) -> set[str]:
    """The settings of a command, with those of the dataclasses in it."""
    types = types_of(kind)
    return {*types}.union(*(_options(part) for part in types.values()
                            if dataclasses.is_dataclass(part)))


def _print(text: str) -> None:
    """Print to the end, or as far as ``| head`` reads."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_with_usage(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


def _list_commands(unknown: str = "") -> str:
    known = "\n".join(f"  {name:10} {kind.__doc__.splitlines()[0]}"
                      for name, kind in COMMANDS.items())
    wrong = f"unknown command {unknown!r}{schema.did_you_mean(unknown, COMMANDS)}\n\n"
    return (f"{wrong if unknown else ''}{__doc__}\n\n{known}\n\n`COMMAND --help` lists its "
            "settings; --json prints the result as JSON.")


def _common_settings(kind: type, config: Config) -> str:
    """The settings to change first, with their comments in config.py and their values."""
    names = COMMON
    if kind is Collect:
        names = [name for name in COMMON if hasattr(config.data, name)]
    elif kind is Search:
        names = [*COMMON[:4], "search_method", "max_configs", "search_epochs", "search_episodes"]
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(settings), re.M))
    values = {name: str(value).strip("(,)") for name, value in config.flat().items()}
    return "\n".join([f"PRESET: {', '.join(PRESETS)} (default: demo)", "",
                      "Change these first:", *(
        f"  {'--' + name.replace('_', '-'):17} {comments[name]} (default: {values[name]})"
        for name in names)])


def _next(command: str, run: str) -> str:
    return f"next  python -m trm_helpers {command} {shlex.quote(run)}"


def _summary(trial: dict) -> str:
    """A trial of a search in a line."""
    if trial["state"] == "failed":
        return "failed: " + trial["error"].splitlines()[0]
    success = (f"{trial['successes']} of {trial['episodes']} episodes, "
               if "episodes" in trial else "")
    stopped = "" if trial["state"] == "complete" else f", stopped after {trial['epochs']} epochs"
    return f"{success}validation loss {trial['final_val_loss']:.4g}{stopped}"


def _settings_of(run: str) -> EvalConfig:
    from .training.runs import find_run, load_config

    try:
        return load_config(find_run(run)).eval
    except FileNotFoundError:  # a baseline, a flag, or an error that the command reports
        return EvalConfig()


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    argv = [argument for argument in argv if argument != "--json"]
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell: 2>&-
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
    if not sys.stderr.isatty():  # in a log: a progress bar every ten seconds, not ten a second
        os.environ["TQDM_MININTERVAL"] = os.environ.get("TQDM_MININTERVAL") or "10"
    try:
        command = parse(argv)
        minutes_left()  # refuses a bad TRM_STOP_AT before the work
        if getattr(command, "run", None) == "":
            raise ValueError("RUN is empty; expected a run under artifacts/, such as demo")
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and isinstance(command, (Search, Run)):
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends kernels as Ctrl-C does
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result, lines, ok = command()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        return INTERRUPTED
    if as_json and result is not None:
        _print(json.dumps(result, indent=2))
    elif lines:
        _print("\n".join(lines))
    return DONE if ok else BAD_VERDICT


if __name__ == "__main__":
    sys.exit(main())
