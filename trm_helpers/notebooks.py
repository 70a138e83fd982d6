"""Run notebooks through papermill, one or all.

papermill only warns about a parameter that the notebook does not have; here it is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from . import paths
from .config import PRESETS, Config, check_parameters, from_flat, settings_by_part
from .files import atomic_path, digest, read_json, visible, write_json
from .progress import Stage, without_colours
from .schema import did_you_mean
from .sim.parallel import start_process

DEMO_FLOOR = 0.7  # success rate of the demo's task; of ten episodes it usually solves nine or ten
_TRACEBACK_LINES, _ERROR_LENGTH = 15, 10_000  # lines and characters of a failed notebook's error
_LOOK_EVERY = 0.5  # seconds between checks whether a notebook is to be stopped
_PRODUCTS = {
    "notebooks": "notebooks/[0-9]*.ipynb",
    "figures": "figures/*.png",
    "films": "videos/**/*.mp4",
    "checkpoints": "*.safetensors",
}
_MINUTES = {  # of each stage of preset demo on two cores: the first estimate of the time left
    "checks": 0.3, "demonstrations": 2.5, "00_setup": 0.3, "01_explore": 0.3, "02_dataset": 0.1,
    "03_model": 0.1, "04_train": 3.6, "05_search": 1.3, "06_eval": 1.1, "07_visualize": 0.2}


# --- one notebook --------------------------------------------------------------------------------

class _Failed(Exception):
    """A notebook failed. Without a text, in which a full disk would be looked for."""


def run_notebook(name_or_path: str | os.PathLike, parameters: dict | None = None, *,
                 run_dir: str | os.PathLike | None = None,
                 environment: Mapping[str, str] | None = None,
                 log: str | os.PathLike | None = None,
                 stop: threading.Event | None = None, stage: tuple = ()) -> Path:
    """Execute a notebook with papermill in a separate process and return its executed copy.

    The kernel is the calling Python, its working folder the notebook's. The copy,
    ``<run_dir>/notebooks/<name>.ipynb``, appears when all cells have run; that of a failed run is
    ``<name>.failed.ipynb``.

    Args:
        name_or_path: ``"04_train"`` for one of the suite, or a path to an ``.ipynb``.
        parameters: values for its ``parameters`` cell.
        run_dir: by default the run that the notebook evaluates, or ``artifacts/<run_name>`` with
            the parameter of that name, else ``artifacts``.
        environment: additional variables of its process.
        log: a file for its printed output, instead of the terminal.
        stop: ends the notebook when set; for calls from threads, which Ctrl-C does not reach.
        stage: arguments of the :class:`Stage` that shows its progress.

    Raises:
        KeyboardInterrupt: ``stop`` was set.
        FileNotFoundError: no such notebook; the existing ones are listed.
        ValueError: not a notebook; a parameter that it does not have, with the valid ones; a bad
            value. Nothing was run.
        RuntimeError: a cell failed, with the end of its traceback.
    """
    source = _find_notebook(name_or_path)
    known = notebook_parameters(source)
    _refuse_unknown(parameters or {}, {source: known})
    parameters, folder = _checked(parameters or {}, known, run_dir)
    # absolute: the kernel works in the notebook's folder
    environment = {"TRM_ARTIFACTS_DIR": str(paths.artifacts_dir()),
                   "TRM_DATA_DIR": str(paths.data_dir()), **(environment or {})}
    output = folder.resolve() / "notebooks" / source.name
    failed = output.with_suffix(".failed.ipynb")
    kept = False
    try:
        with atomic_path(output) as temporary:
            if error := _in_own_process(stop, log, environment, source, temporary, parameters,
                                        stage or (source.stem,)):
                if kept := temporary.exists():
                    os.replace(temporary, failed)
                raise _Failed
    except _Failed:
        raise RuntimeError(
            f"{source.name} failed: {error}"
            + (f"\nThe copy up to there is {failed}" if kept else "")) from None
    failed.unlink(missing_ok=True)
    return output


def notebook_parameters(notebook: str | os.PathLike) -> dict[str, str]:
    """Name and comment of each parameter in the cell tagged ``parameters``.

    Raises ``ValueError`` with the file's name if it is not a notebook.
    """
    import papermill

    try:
        found = papermill.inspect_notebook(str(notebook))
    except Exception as error:  # from nbformat or papermill, for a file of any content
        raise ValueError(f"{notebook} is not a notebook: {error}") from error
    return {name: entry["help"] for name, entry in found.items()}


def suite_notebooks() -> list[Path]:
    """The notebooks of the suite in order. ``FileNotFoundError`` if there is none."""
    found = sorted(paths.notebooks_dir().glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise FileNotFoundError(f"no notebook in {paths.notebooks_dir()}; expected 00_setup.ipynb "
                                "and so on, which `make notebooks` writes")
    return found


def _find_notebook(name_or_path: str | os.PathLike) -> Path:
    path = Path(name_or_path)
    named = paths.notebooks_dir() / f"{path.name.removesuffix('.ipynb')}.ipynb"
    for candidate in (path, *[named] * (path == Path(path.name))):  # no folder that may be wrong
        if candidate.suffix == ".ipynb" and candidate.is_file():
            return candidate.resolve()
    known = [p.stem for p in suite_notebooks()]
    raise FileNotFoundError(f"no preset or notebook {str(path)!r}; expected the path of an .ipynb, "
                            f"one of {', '.join(known)}, or a preset, one of "
                            f"{', '.join(PRESETS)}{did_you_mean(str(path), [*known, *PRESETS])}")


def _refuse_unknown(given: dict, known: dict[Path, dict[str, str]]) -> None:
    """Raise ``ValueError`` for a parameter that none of the notebooks has."""
    valid = {name: comment for parameters in known.values()
             for name, comment in parameters.items()}
    if unknown := [name for name in given if name not in valid]:
        width = max(map(len, valid), default=0)
        lines = "\n".join(f"  {name:{width}}  {comment}" for name, comment in valid.items())
        hints = "".join(did_you_mean(name, valid) for name in unknown)
        raise ValueError(f"unknown parameter {', '.join(map(repr, unknown))} for "
                         f"{', '.join(path.stem for path in known)}"
                         + (hints or f"; valid:\n{lines or '  none'}"))


def _checked(parameters: Mapping, known: Mapping[str, str],
             run_dir: str | os.PathLike | None = None) -> tuple[dict, Path]:
    """Parameters with absolute paths, and ``run_dir`` or the folder of the run that they name.

    Raises ``ValueError`` for values that the notebook would refuse.
    """
    checked = check_parameters(**parameters)
    for given in (checked, checked.get("more") or {}):
        if given.get("demo_dir"):
            given["demo_dir"] = str(paths.absolute(given["demo_dir"]))
    from .training.runs import (  # they read a run
        find_run,
        is_trained,
        load_config,
        refuse_other_settings,
    )

    if "weights" not in known:
        config = _configuration(checked) if "preset" in known else None
        run_name = checked.get("run_name")
        folder = Path(run_dir or (paths.run_dir(run_name) if run_name else paths.artifacts_dir()))
        resumes = config and run_name and "stop_epoch" in known and is_trained(folder)
        if resumes and (folder / "config.json").exists():
            refuse_other_settings(folder, config)
        return checked, folder
    runs = {}
    if checked.get("baseline_run"):
        runs["baseline_run"] = find_run(checked["baseline_run"])
    runs["run_name"] = find_run(checked.get("run_name") or "", to_write=True,  # "": the newest
                                weights=checked.get("weights") or "")
    checked |= {name: str(run) for name, run in runs.items()
                if run.parent != paths.artifacts_dir()}
    of_evaluation = {name: value for name, value in checked.items()
                     if settings_by_part().get(name) == "eval" and value is not None}
    load_config(runs["run_name"], checked.get("preset") or "demo").replace(**of_evaluation)
    return checked, Path(run_dir or runs["run_name"])


def _configuration(parameters: Mapping) -> Config:
    """The settings that a notebook makes of its parameters."""
    names = {"preset", "more", *settings_by_part()}
    given = {name: value for name, value in parameters.items() if name in names}
    return from_flat(**{"preset": "demo", **given})


def _in_own_process(stop: threading.Event | None, log: str | os.PathLike | None,
                    environment: Mapping[str, str], *args) -> str:
    """Call :func:`_execute`; returns its error, "" without one."""
    with open(log, "wb") if log else contextlib.nullcontext() as output:
        process, connection = start_process(_execute, *args, environment=environment,
                                            output=output)
    with connection:
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_EVERY if stop else None)
                if stop and stop.is_set():
                    raise KeyboardInterrupt
        finally:
            process.terminate()  # interrupted: let the kernel end with it
            process.wait()
        with contextlib.suppress(EOFError, OSError):
            return connection.recv()
    return (f"its kernel ended (out of memory?); see {log or 'the messages above'}"
            if process.returncode else "")


def _execute(connection: Connection, source: Path, output: Path, parameters: dict,
             stage: tuple) -> None:
    """In the child process: sends the error of a failed cell and the end of its traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # before a python3 kernel in the user's home
    os.environ.setdefault("TQDM_MININTERVAL", "1")  # each refresh is stored in the executed copy
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm: text is wanted
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        with Stage(*stage) as progress:
            papermill.execute_notebook(
                source, output, parameters, cwd=source.parent, kernel_name="python3",
                progress_bar=False, stderr_file=progress,
                stdout_file=SimpleNamespace(write=progress.follow, flush=progress.flush),
                coalesce_streams=True,  # of a progress bar, the copy keeps the last state
                # no warning of local TCP sockets, no error when its shutdown interrupts it
                extra_arguments=["--log-level=CRITICAL"])
    except papermill.PapermillExecutionError as error:
        lines = without_colours("\n".join(error.traceback)).splitlines()[-_TRACEBACK_LINES:]
        connection.send("\n".join([f"{error.ename}: {error.evalue}", *lines])[:_ERROR_LENGTH])
        sys.exit(1)
    except DeadKernelError:
        sys.exit(1)
    except Exception as error:  # no kernel starts, or the copy cannot be written
        connection.send(f"{type(error).__name__}: {error}"[:_ERROR_LENGTH])
        sys.exit(1)


# --- the suite -----------------------------------------------------------------------------------

def run_suite(preset: str, run_name: str | None = None, **parameters) -> Path:
    """Preflight, demonstrations, then every notebook in order; ends with the success line.

    An interrupted suite resumes: executed copies are kept up to the first that is incomplete or
    has other parameters or another source.

    Args:
        preset: a name in ``config.PRESETS``.
        run_name: the folder under ``artifacts/``; by default the preset's name.
        parameters: further parameters, each for the notebooks that have it.

    Returns:
        the run folder.

    Raises:
        ValueError: unknown preset; a parameter that no notebook has; a bad value or run name.
        RuntimeError: preflight or a notebook failed, or the demo solved its task less often than
            :data:`DEMO_FLOOR`.
    """
    started = float(os.environ.get("TRM_STARTED_AT") or time.time())
    settings = {"preset": preset, "run_name": run_name or preset, **parameters}
    known = {path: notebook_parameters(path) for path in suite_notebooks()}
    _refuse_unknown(settings, known)
    settings, run_dir = _checked(settings, {"preset": "", "stop_epoch": ""})
    config = _configuration(settings)
    plan = {path: {k: v for k, v in settings.items() if k in names}
            for path, names in known.items()}
    folder = run_dir / "notebooks"
    pending = list(itertools.dropwhile(lambda path: _is_kept(path, plan[path], folder), plan))
    minutes = _recorded(folder / "minutes.json").get("minutes", 0.0)
    if pending:
        try:
            stages = _stages(["checks", "demonstrations", *(path.stem for path in pending)], config)
            _prepare(config, stages)
            for path, stage in zip(pending, stages, strict=True):
                record = folder / f"{path.stem}.json"
                record.unlink(missing_ok=True)
                run_notebook(path, plan[path], run_dir=run_dir, stage=stage)
                write_json(record, _identity(path, plan[path]))
        finally:
            minutes += (time.time() - started) / 60
            write_json(folder / "minutes.json", {"minutes": minutes})
    _report(run_dir, config, minutes)
    return run_dir


def _stages(names: Sequence[str], config: Config) -> Iterator[tuple]:
    """The arguments of each stage's :class:`Stage`, asked for when it begins."""
    known = config.preset == "demo" and {*config.changes()} <= {"demos"} and {*names} <= {*_MINUTES}
    begun = time.monotonic()
    for place, name in enumerate(names):
        expected = sum(_MINUTES.get(done, 0) for done in names[:place])
        pace = (time.monotonic() - begun) / 60 / expected if expected > 1 else 1
        rest = sum(_MINUTES.get(later, 0) for later in names[place + 1:])
        yield f"[{place + 1}/{len(names)}] {name}", pace * rest if known and rest else None


def _prepare(config: Config, stages: Iterator[tuple]) -> None:
    from .demos.collect import ensure_demonstrations
    from .evaluation.actor import actor_of
    from .preflight import preflight, table

    with Stage(*next(stages)) as stage:
        checks = preflight()
        passed = sum(check.status == "ok" for check in checks)
        stage.share = f" {passed} of {len(checks)} passed"
    if others := [check for check in checks if check.status != "ok"]:
        print(table(others), flush=True)
    if any(check.status == "fail" for check in checks):
        raise RuntimeError("preflight failed; see the table above")
    with (Stage(*next(stages)) as stage, contextlib.redirect_stderr(stage),
          contextlib.redirect_stdout(stage)):
        ensure_demonstrations(config, actor_of(config))


def _is_kept(path: Path, parameters: dict, folder: Path) -> bool:
    copy = folder / path.name
    kept = (copy.exists()
            and _recorded(folder / f"{path.stem}.json") == _identity(path, parameters))
    if kept:
        print(f"{path.stem}: kept from before, {copy}")
    return kept


def _identity(path: Path, parameters: dict) -> dict:
    cells = [[cell["cell_type"], "".join(cell["source"])]
             for cell in read_json(path, keys=["cells"])["cells"]]
    return {"parameters": json.loads(json.dumps(parameters)),  # as read back: no tuples
            "source_sha256": digest(json.dumps(cells).encode())}


def _recorded(path: Path) -> dict:
    """The content of a record; empty if it is missing or damaged: the work can be repeated."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return {}


def _report(run_dir: Path, config: Config, minutes: float) -> None:
    """Print the products and the success line.

    Raises ``RuntimeError`` if the demo failed at its task, which means that something is broken.
    """
    from .stats import format_success

    counts = (f"{title} {len(visible(run_dir, pattern))}" for title, pattern in _PRODUCTS.items())
    print(f"\n{run_dir}: {', '.join(counts)}")
    if not (run_dir / "results.json").exists():
        raise RuntimeError(f"{run_dir / 'results.json'} is missing; 06_eval should have written it")
    results = read_json(run_dir / "results.json")
    print(f"{format_success(results)}, {minutes:.1f} minutes")
    for title, pattern in (("page", "report.*"), ("film", "videos/success/*.mp4")):
        if found := visible(run_dir, pattern):
            print(f"{title}  {_from_here(found[0])}")
    print(f"next  {_from_here(sys.executable)} -m trm_helpers evaluate {run_dir.name} "
          f"--num-episodes 50", flush=True)
    changed = config.changes()
    if config.preset == "demo" and not {"suite", "task_ids"} & set(changed) \
            and results["success_rate"] < DEMO_FLOOR:
        settings = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise RuntimeError(
            f"the demo solved {results['successes']} of {results['episodes']} episodes; expected "
            f"at least {DEMO_FLOOR:.0%} of them"
            + (f" (with other settings than the preset's: {settings})" if settings else "")
            + f". See the films in {run_dir / 'videos' / 'failure'}, the losses in "
            f"{run_dir / 'figures' / '04_training.png'} and the quality card in 01_explore")


def _from_here(path: str | os.PathLike) -> Path:
    """Relative to the working folder, if it lies there."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# --- shown elsewhere -----------------------------------------------------------------------------

def show_notebook(executed: str | os.PathLike) -> None:
    """Display prose, printed text, tables, figures and films of an executed copy, without code.

    For a notebook that runs others in processes of their own.
    """
    from IPython.display import Markdown, display

    for cell in read_json(executed, keys=["cells"])["cells"]:
        if cell["cell_type"] == "markdown":
            display(Markdown("".join(cell["source"])))
        for output in cell.get("outputs", []):
            if output.get("name") == "stdout":
                print("".join(output["text"]), end="")
            elif "data" in output:
                display({kind: "".join(content) if isinstance(content, list) else content
                         for kind, content in output["data"].items()}, raw=True,
                        metadata=output.get("metadata"))
