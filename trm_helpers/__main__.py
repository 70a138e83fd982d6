"""The command line: ``python -m trm_helpers COMMAND``; what the notebooks do, without them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from . import paths, schema
from .config import PRESETS, Config, DataConfig, EvalConfig, from_flat, parse_parameter

DONE, FAILED, BAD_VERDICT, INTERRUPTED = 0, 1, 3, 130  # 2 is wrong usage
Result = tuple[Any, list[str], bool]  # for --json, lines for a person, whether all is well


@dataclass
class Collect:
    """Find or collect the demonstrations of the tasks, as 01_explore and the others do."""

    data: OmitArgPrefixes[DataConfig]

    def __call__(self) -> Result:
        from .demos.collect import ensure_demonstrations

        files = ensure_demonstrations(dataclasses.replace(Config(), data=self.data))
        return {task_id: str(path) for task_id, path in files.items()}, [], True


@dataclass
class Validate:
    """The quality card of a demonstration file: one verdict for each thing that spoils learning."""

    file: Positional[Path]
    suite: str = ""  # of the file's task: with it pictures and replays are checked in the simulator
    task_id: int = 0
    replays: int = 3  # demonstrations to replay

    def __call__(self) -> Result:
        from .demos.quality import BAD, frame_size, quality_card
        from .sim.env import LiberoEnv

        with contextlib.ExitStack() as stack:
            env = None
            if self.suite:
                env = stack.enter_context(LiberoEnv(self.suite, self.task_id,
                                                    image_size=frame_size(self.file)))
            card = quality_card(self.file, env, self.replays, env.horizon if env else 0)
        lines = [f"{row['verdict']:5} {row['check']}: {row['found']}; expected {row['expected']}"
                 for row in card]
        return card, lines, all(row["verdict"] != BAD for row in card)


@dataclass
class Train:
    """Train a policy into artifacts/RUN_NAME, or go on there, as 04_train does.

    With torchrun in front (`torchrun --nproc_per_node 2 -m trm_helpers train ...`) on several GPUs.
    """

    run_name: str
    config: OmitArgPrefixes[Config]

    def __call__(self) -> Result:
        from .demos.collect import ensure_demonstrations
        from .evaluation.evaluate import selection_rate
        from .policy.keypoints import trained_localizer
        from .training.devices import choose_device
        from .training.distributed import Team
        from .training.runs import create_run
        from .training.train import BehaviorCloningTrainer

        team = Team(choose_device(self.config.train.device).type)
        if not team.is_main:
            team.barrier()  # the first one finds or collects demonstrations and makes the folder
        run = paths.run_dir(self.run_name)
        if team.is_main:
            create_run(self.config, self.run_name, resume=True)
        files = ensure_demonstrations(self.config)
        if team.is_main:
            team.barrier()
        rows = BehaviorCloningTrainer.from_config(
            self.config, files, run, selection_rate(run, self.config),
            functools.partial(trained_localizer, run, self.config)).fit()
        if not team.is_main:
            return None, [], True
        line = f"{run}: {len(rows)} epochs, validation loss {rows[-1]['val_loss']:.4f}"
        return {"run": str(run), **rows[-1]}, [line], True


@dataclass
class Search:
    """Hyper-parameter search into artifacts/RUN_NAME/search, as 05_search does."""

    run_name: str
    config: OmitArgPrefixes[Config]
    export_sweep: str = ""  # only write a W&B sweep of the same trials, into this YAML file

    def __call__(self) -> Result:
        from .demos.collect import ensure_demonstrations
        from .search.search import claim, run_search, verdict
        from .search.sweeps import export_sweep

        folder = paths.run_dir(self.run_name)
        if self.export_sweep:
            file = export_sweep(self.config, folder, self.export_sweep)
            return {"sweep": str(file)}, [f"wandb sweep {file}"], True
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as with Ctrl-C: kernels too
        claim(self.config, folder)  # refuses other settings before anything is collected
        ensure_demonstrations(self.config)
        trials = run_search(self.config, folder)
        lines = [f"{place}. {trial['trial']}: {_told(trial)}"
                 for place, trial in enumerate(trials, 1)]
        well = all(trial["state"] != "failed" for trial in trials)
        return trials, [*lines, verdict(trials)], well


@dataclass
class Trial:
    """One trial of a search that was begun, as an agent of a W&B sweep runs it."""

    run_name: Positional[str]
    point: Positional[str]  # the settings searched over, as JSON: {"lr": 1e-3, ...}
    setting: Annotated[tuple[tuple[str, str], ...], tyro.conf.UseAppendAction,
                       tyro.conf.arg(metavar="NAME VALUE", aliases=["-s"])] = ()
    # ... of this machine, such as device cpu; may be given more than once

    def __call__(self) -> Result:
        from .search.sweeps import run_sweep_trial

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        found = run_sweep_trial(paths.run_dir(self.run_name), self.point,
                                {name: parse_parameter(name, text) for name, text in self.setting})
        return found, [_told({"state": "complete", **found})], True


@dataclass
class Evaluate:
    """Success of a run, or of a baseline, on the official init states, as 06_eval does."""

    run: Positional[str]  # a run under artifacts/; or expert, random, no-op, which need --suite
    eval: OmitArgPrefixes[EvalConfig]
    weights: Literal[schema.WEIGHTS] = "best"  # of a run
    suite: str = ""  # another one than the run's; those of LIBERO-PRO too
    task_ids: tuple[int, ...] = ()  # others than the run's; of a baseline, none is all of the suite
    demo_dir: str = ""  # of a run that was given one: where its demonstrations are, to replay
    against: str = ""  # another run, evaluated before: the two are compared episode by episode

    def __call__(self) -> Result:
        from .evaluation.baselines import BASELINES, plan_baseline, plan_bounds
        from .evaluation.evaluate import comparable, compare_runs, plan_run, stale_episodes
        from .stats import detectable, format_comparison, format_success

        # all of it is known and checked before the first episode
        if self.run in BASELINES:
            if self.against:
                raise ValueError(f"against={self.against!r} compares trained runs; "
                                 f"{self.run!r} is a baseline")
            if not self.suite:
                raise ValueError(f"the baseline {self.run!r} needs a suite; give --suite")
            folder = paths.artifacts_dir() / f"{self.run}-{self.suite}"
            planned = plan_baseline(self.run, folder, self.eval, self.suite, self.task_ids)
            bounds = {}
        else:
            planned = plan_run(self.run, self.eval, self.weights, self.suite, self.task_ids)
            if self.against:
                comparable(planned, self.against)
            bounds = plan_bounds(self.run, self.eval, self.suite, self.task_ids, self.demo_dir)
        results = planned.play()
        bounds = {name: bound.play() for name, bound in bounds.items()}
        lines = [f"{task['suite']} {task['task_id']}: {format_success(task)}"
                 for task in results["tasks"]]
        lines += [format_success(results), *(f"error: {error}" for error in results["errors"])]
        lines += [f"{name}: {format_success(bound)}" for name, bound in bounds.items()]
        test = None
        if self.against:
            test = compare_runs(self.run, self.against, self.suite, self.task_ids)
            lines += [format_comparison(test, self.run, self.against), detectable(results),
                      *stale_episodes(self.against, planned.suite)]
        return ({**results, "bounds": bounds, "comparison": test}, lines, not results["errors"])


@dataclass
class Report:
    """One page on a run, report.md in its folder, as 07_visualize writes it."""

    run: Positional[str]  # a run under artifacts/

    def __call__(self) -> Result:
        from .report import write_report

        path = write_report(self.run)
        return {"report": str(path)}, [str(path)], True


@dataclass
class Robustness:
    """What is left of a run's success when something changes: one card, beside its results."""

    run: Positional[str]  # a run under artifacts/
    eval: OmitArgPrefixes[EvalConfig]
    weights: Literal[schema.WEIGHTS] = "best"
    task_ids: tuple[int, ...] = ()  # others than the run's
    only: tuple[str, ...] = ()  # these changes alone, e.g. swap,brightness

    def __call__(self) -> Result:
        import pandas as pd

        from .evaluation.robustness import card_notes, card_rows, robustness_card

        only = [name for given in self.only for name in given.split(",")]
        card = robustness_card(self.run, self.eval, self.weights, self.task_ids, only)
        well = not card["failed"] and not any(row["errors"] for row in card["rows"])
        table = pd.DataFrame(card_rows(card)).to_string(index=False)
        return card, [table, *card_notes(card)], well


@dataclass
class Depth:
    """Does thinking longer help? A run's success by the recursions used, in the simulator."""

    run: Positional[str]  # a run under artifacts/
    eval: OmitArgPrefixes[EvalConfig]
    weights: Literal[schema.WEIGHTS] = "best"
    task_ids: tuple[int, ...] = ()  # others than the run's
    depths: tuple[int, ...] = ()  # none: 1, half, once and twice the trained one
    thresholds: tuple[float, ...] = (1e-4, 1e-3)  # of the convergence rule
    only: tuple[str, ...] = ()  # these rows alone beside the policy as trained, e.g. "fixed 1"

    def __call__(self) -> Result:
        import pandas as pd

        from .evaluation.depth import depth_card, depth_rows
        from .stats import detectable

        card = depth_card(self.run, self.depths, self.thresholds, self.eval, self.weights,
                          self.task_ids, self.only)
        table = pd.DataFrame(depth_rows(card)).to_string(index=False)
        well = not any(row["errors"] for row in card["rows"])
        return card, [table, detectable(card["rows"][0])], well


@dataclass
class Run:
    """All notebooks of the suite with a preset, or one notebook such as 04_train."""

    what: Positional[str]
    run_name: str = ""  # folder under artifacts/
    parameter: Annotated[tuple[tuple[str, str], ...], tyro.conf.UseAppendAction,
                         tyro.conf.arg(metavar="NAME VALUE", aliases=["-p"])] = ()
    # ... of the notebooks; may be given more than once

    def __call__(self) -> Result:
        from .notebooks import run_notebook, run_suite

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as with Ctrl-C: kernels too
        parameters = {name: parse_parameter(name, text) for name, text in self.parameter}
        if self.what in PRESETS:
            folder = run_suite(self.what, self.run_name or None, parameters)
            return {"run": str(folder)}, [], True
        if self.run_name and parameters.setdefault("run_name", self.run_name) != self.run_name:
            raise ValueError(f"--run-name {self.run_name} contradicts run_name="
                             f"{parameters['run_name']!r}; expected one name")
        notebook = run_notebook(self.what, parameters)
        return {"notebook": str(notebook)}, [str(notebook)], True


@dataclass
class Preflight:
    """Is everything there? Versions, OpenGL and a timed frame, settling objects, disk, memory."""

    quick: bool = False  # without the simulator
    gl: bool = False  # only see that OpenGL draws; as root, install what is missing
    selftest: bool = False  # only seed twelve faults of evaluations and see that each is found

    def __call__(self) -> Result:
        from .preflight import preflight, table
        from .software import ensure_gl

        if self.gl:
            found = ensure_gl()
            return found, [json.dumps(found)], True
        if self.selftest:
            from .selftest import selftest

            checks = selftest()
        else:
            checks = preflight(quick=self.quick)
        return ([dataclasses.asdict(check) for check in checks], [table(checks)],
                all(check.status != "fail" for check in checks))


COMMANDS = {kind.__name__.lower(): kind
            for kind in (Collect, Validate, Train, Search, Trial, Evaluate, Robustness, Depth,
                         Report, Run, Preflight)}


def parse(argv: list[str]) -> Any:
    """The command with its arguments; ends the program with a message where they are wrong."""
    if not argv or argv[0] not in COMMANDS:
        asked = argv[:1] in (["-h"], ["--help"])
        if argv and not asked:
            print(f"unknown command {argv[0]!r}{schema.did_you_mean(argv[0], COMMANDS)}\n",
                  file=sys.stderr)
        known = "\n".join(f"  {name:10} {kind.__doc__.splitlines()[0]}"
                          for name, kind in COMMANDS.items())
        print(f"{__doc__}\n\n{known}\n\n`COMMAND --help` lists its settings; --json prints the "
              "result as JSON.", file=sys.stdout if asked or not argv else sys.stderr)
        sys.exit(0 if asked else 2)
    kind, rest = COMMANDS[argv[0]], argv[1:]
    settings: dict[str, Any] = {}
    if kind in (Collect, Train, Search):
        preset = "demo"
        if rest and not rest[0].startswith("-"):
            preset, rest = rest[0], rest[1:]
        config = from_flat(preset)
        settings = {"data": config.data} if kind is Collect else {"config": config}
    elif kind in (Evaluate, Robustness, Depth):
        if rest and rest[0].startswith("-") and not {"-h", "--help"} & set(rest):
            print(f"give the run before its settings, which are those it was made with: python -m "
                  f"trm_helpers {argv[0]} RUN {rest[0]} ...", file=sys.stderr)
            sys.exit(2)
        config = _settings_of(rest[0]) if rest else EvalConfig()
        if kind is not Evaluate:  # films of a dozen evaluations are for those who ask for them
            config = dataclasses.replace(config, num_videos=0, perturbation="none")
        settings = {"eval": config}
    default = None
    if settings:
        given = {part.name: tyro.MISSING for part in dataclasses.fields(kind)
                 if part.default is dataclasses.MISSING}
        default = kind(**{**given, **settings})
    return tyro.cli(kind, args=rest, default=default, prog=f"python -m trm_helpers {argv[0]}")


def _told(trial: dict) -> str:
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
    except FileNotFoundError:  # a baseline, a flag, or said better by the command
        return EvalConfig()


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    argv = [argument for argument in argv if argument != "--json"]
    try:
        command = parse(argv)
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result, lines, well = command()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    if as_json and result is not None:
        print(json.dumps(result, indent=2), flush=True)
    elif lines:
        print("\n".join(lines), flush=True)
    return DONE if well else BAD_VERDICT


if __name__ == "__main__":
    sys.exit(main())
