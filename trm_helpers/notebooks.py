"""Notebooks through papermill, one or all.

papermill only warns about a parameter that the notebook does not have; here it is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import paths
from .config import PRESETS, Config, check_parameters, from_flat, settings_by_part
from .files import atomic_path, read_json, visible, write_json
from .schema import did_you_mean
from .sim.parallel import start_process

_TRACEBACK_LINES = 15  # of a failed notebook shown in the error
_LOOK_EVERY = 0.5  # seconds between looks at whether a notebook is to be ended
_PRODUCTS = {
    "notebooks": "notebooks/[0-9]*.ipynb",
    "figures": "figures/*",
    "videos": "videos/**/*.mp4",
    "checkpoints": "*.safetensors",
    "results": "results.json",
}
DEMO_FLOOR = 0.7  # success rate of the demo's task; of ten episodes it usually solves nine or ten
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


# --- one notebook --------------------------------------------------------------------------------

def run_notebook(name_or_path: str | os.PathLike, parameters: dict | None = None, *,
                 output: str | os.PathLike | None = None,
                 run_dir: str | os.PathLike | None = None,
                 environment: Mapping[str, str] | None = None,
                 log: str | os.PathLike | None = None,
                 stop: threading.Event | None = None) -> Path:
    """Execute a notebook with papermill in a process of its own, wherever it is called from.

    The kernel is the Python that calls, its working folder the notebook's. Nothing stands under
    the output's name before every cell has run; the copy of a failed run is kept beside it as
    ``<name>.failed.ipynb``.

    Args:
        name_or_path: ``"04_train"`` for one of the suite, or a path to an ``.ipynb``.
        parameters: values for its ``parameters`` cell.
        output: the executed copy; by default ``<run_dir>/notebooks/<name>.ipynb``.
        run_dir: by default ``artifacts/<run_name>`` with the parameter of that name, else
            ``artifacts``.
        environment: variables for its process alone.
        log: a file for what it prints while it runs, instead of the terminal.
        stop: when set, the notebook is ended; for calls from threads, which no Ctrl-C reaches.

    Returns:
        the path of the executed copy.

    Raises:
        KeyboardInterrupt: ``stop`` was set.
        FileNotFoundError: no such notebook, with those there are.
        ValueError: a parameter that it does not have, with those it has, or a bad value; nothing
            was run.
        RuntimeError: a cell failed, with the end of its traceback.
    """
    source = _find_notebook(name_or_path)
    known = notebook_parameters(source)
    _refuse_unknown(parameters or {}, {source: known})
    parameters, folder = _checked(parameters or {}, known)
    # absolute: the kernel works in the notebook's folder
    environment = {"TRM_ARTIFACTS_DIR": str(paths.artifacts_dir()),
                   "TRM_DATA_DIR": str(paths.data_dir()), **(environment or {})}
    if output is None:
        output = Path(run_dir or folder) / "notebooks" / source.name
    output = Path(output).resolve()
    failed = output.with_suffix(".failed.ipynb")
    with atomic_path(output) as temporary:
        if _in_own_process(stop, log, environment, source, temporary, parameters) != 0:
            if not temporary.exists():
                raise RuntimeError(f"{source.name} did not start; see "
                                   f"{log or 'the messages above'}")
            os.replace(temporary, failed)
            raise RuntimeError(f"{source.name} failed: {_failure(failed)}\n"
                               f"The copy up to there is {failed}")
    failed.unlink(missing_ok=True)
    return output


def notebook_parameters(notebook: str | os.PathLike) -> dict[str, str]:
    """Name and comment of each parameter in the cell tagged ``parameters``."""
    import papermill

    found = papermill.inspect_notebook(str(notebook))
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
    candidates = [path, paths.notebooks_dir() / path.with_suffix(".ipynb").name]
    for candidate in candidates:
        if candidate.suffix == ".ipynb" and candidate.is_file():
            return candidate.resolve()
    known = [p.stem for p in suite_notebooks()]
    raise FileNotFoundError(f"no notebook {str(path)!r}; expected the path of an .ipynb or one of "
                            f"{', '.join(known)}{did_you_mean(str(path), [*known, *PRESETS])}")


def _refuse_unknown(given: dict, known: dict[Path, dict[str, str]]) -> None:
    """Raise ``ValueError`` for a parameter that none of the notebooks has."""
    valid = {name: comment for parameters in known.values()
             for name, comment in parameters.items()}
    unknown = [name for name in given if name not in valid]
    if unknown:
        where = ", ".join(path.stem for path in known)
        width = max(map(len, valid), default=0)
        lines = "\n".join(f"  {name:{width}}  {comment}" for name, comment in valid.items())
        raise ValueError(f"unknown parameter {', '.join(map(repr, unknown))} for {where}; "
                         f"valid:\n{lines or '  none'}")


def _checked(parameters: Mapping, known: Mapping[str, str]) -> tuple[dict, Path]:
    """Parameters as a notebook gets them, and the folder of the run that they name.

    Paths are made absolute, since notebooks run in a folder of their own. Raises ``ValueError`` for
    what the notebook would refuse.
    """
    checked = check_parameters(**parameters)
    if checked.get("demo_dir"):
        checked["demo_dir"] = str(paths.absolute(checked["demo_dir"]))
    run_name = checked.get("run_name")
    folder = paths.run_dir(run_name) if run_name and "weights" not in known \
        else paths.artifacts_dir()
    if "weights" in known:  # it reads a run, which may lie elsewhere
        from .training.runs import find_run

        for name in ("run_name", "baseline_run"):
            if checked.get(name):
                found = find_run(checked[name], to_write=name == "run_name")
                folder = found if name == "run_name" else folder
                checked[name] = checked[name] if found.parent == paths.artifacts_dir() \
                    else str(found)
    elif "preset" in known:
        _configuration(checked)
    return checked, folder


def _configuration(parameters: Mapping) -> Config:
    """What a notebook makes of its parameters."""
    names = {"preset", "more", *settings_by_part()}
    given = {name: value for name, value in parameters.items() if name in names}
    return from_flat(**{"preset": "demo", **given})


def _in_own_process(stop: threading.Event | None, log: str | os.PathLike | None,
                    environment: Mapping[str, str] | None, *args) -> int:
    with open(log, "wb") if log else contextlib.nullcontext() as output:
        process, connection = start_process(_execute, *args, environment=environment,
                                            output=output)
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_EVERY if stop else None)
            if stop and stop.is_set():
                raise KeyboardInterrupt
    finally:
        process.terminate()  # interrupted: let the kernel end with it
        process.wait()
        connection.close()
    return process.returncode


def _execute(_, source: Path, output: Path, parameters: dict) -> None:
    """The child process: exit code 1 for a failed cell, whose traceback is in ``output``."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # before a python3 kernel in the user's home
    os.environ.setdefault("TQDM_MININTERVAL", "1")  # each refresh is stored in the executed copy
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm: text is wanted
    import papermill

    try:
        papermill.execute_notebook(
            source, output, parameters, cwd=source.parent, kernel_name="python3",
            progress_bar={"desc": source.stem}, stderr_file=sys.stderr)
    except papermill.PapermillExecutionError:
        sys.exit(1)


def _failure(executed: Path) -> str:
    """Error and end of the traceback, from the executed copy."""
    for cell in read_json(executed, keys=["cells"])["cells"]:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                lines = _ANSI.sub("", "\n".join(output["traceback"])).splitlines()
                return (f"{output['ename']}: {output['evalue']}\n"
                        + "\n".join(lines[-_TRACEBACK_LINES:]))
    return "its kernel ended (out of memory?); see the messages above"


# --- the suite -----------------------------------------------------------------------------------

def run_suite(preset: str, run_name: str | None = None, parameters: dict | None = None, *,
              resume: bool = True) -> Path:
    """Preflight, demonstrations, then every notebook in order; ends with the success line.

    A notebook whose executed copy is complete, with the same parameters and source, and no
    notebook run before it, is kept: an interrupted suite continues where it was.

    Args:
        preset: a name in ``config.PRESETS``.
        run_name: the folder under ``artifacts/``; by default the preset's name.
        parameters: more parameters, each given to the notebooks that have it.
        resume: ``False`` refuses a run that has an epoch or results.

    Returns:
        the run folder.

    Raises:
        ValueError: unknown preset; a parameter that no notebook has; a bad value or run name.
        FileExistsError: the run is trained or evaluated and ``resume`` is off.
        RuntimeError: preflight or a notebook failed, or the demo solved its task less often than
            :data:`DEMO_FLOOR`.
    """
    started = float(os.environ.get("TRM_STARTED_AT", time.time()))
    settings = {"preset": preset, **({"run_name": run_name} if run_name else {})}
    for name, value in (parameters or {}).items():
        if settings.setdefault(name, value) != value:
            raise ValueError(f"parameter {name}={value!r} contradicts {settings[name]!r}")
    settings["run_name"] = settings.get("run_name") or preset
    known = {path: notebook_parameters(path) for path in suite_notebooks()}
    _refuse_unknown(settings, known)
    settings, run_dir = _checked(settings, {"preset": ""})
    config = _configuration(settings)
    if not resume and any((run_dir / name).exists() for name in ("metrics.jsonl", "results.json")):
        raise FileExistsError(f"{run_dir} exists; choose another run_name, move it away or resume")
    plan = {path: {k: v for k, v in settings.items() if k in names}
            for path, names in known.items()}
    pending = _pending(plan, run_dir)
    minutes = _minutes_before(run_dir)
    if pending:
        try:
            _prepare(config)
            for path in pending:
                _run_and_record(path, plan[path], run_dir)
        finally:
            minutes += (time.time() - started) / 60
            write_json(run_dir / "notebooks" / "minutes.json", minutes)
    _report(run_dir, minutes)
    _check_floor(run_dir, config)
    return run_dir


def _prepare(config) -> None:
    from .demos.collect import ensure_demonstrations
    from .preflight import preflight, table

    checks = preflight()
    print(table(checks), flush=True)
    if any(check.status == "fail" for check in checks):
        raise RuntimeError("preflight failed; see the table above")
    ensure_demonstrations(config)


def _pending(plan: dict[Path, dict], run_dir: Path) -> list[Path]:
    """The notebooks from the first that is not complete on."""
    order = list(plan)
    for index, path in enumerate(order):
        copy = run_dir / "notebooks" / path.name
        if not copy.exists() or _recorded(copy.with_suffix(".json")) != _identity(path, plan[path]):
            return order[index:]
        print(f"{path.stem}: kept from before, {copy}")
    return []


def _run_and_record(path: Path, parameters: dict, run_dir: Path) -> None:
    record = run_dir / "notebooks" / f"{path.stem}.json"
    record.unlink(missing_ok=True)
    run_notebook(path, parameters, run_dir=run_dir)
    write_json(record, _identity(path, parameters))


def _identity(path: Path, parameters: dict) -> dict:
    cells = [[cell["cell_type"], "".join(cell["source"])]
             for cell in read_json(path, keys=["cells"])["cells"]]
    return {"parameters": json.loads(json.dumps(parameters)),  # as read back: no tuples
            "source_sha256": hashlib.sha256(json.dumps(cells).encode()).hexdigest()}


def _minutes_before(run_dir: Path) -> float:
    return _recorded(run_dir / "notebooks" / "minutes.json", kind=float) or 0.0


def _recorded(path: Path, kind: type = dict) -> Any:
    """What the runner noted down; None where that is missing or damaged: it can be done again."""
    try:
        return read_json(path, kind=kind)
    except (FileNotFoundError, ValueError):
        return None


def _report(run_dir: Path, minutes: float) -> None:
    """Print where everything is, and the success line."""
    from .stats import format_success

    print(f"\nEverything is in {run_dir}")
    for title, pattern in _PRODUCTS.items():
        found = visible(run_dir, pattern)
        print(f"  {title:11} {len(found):3}  {run_dir / pattern}")
    results = run_dir / "results.json"
    if not results.exists():
        raise RuntimeError(f"{results} is missing; 06_eval should have written it")
    print(f"{format_success(read_json(results))}, {minutes:.1f} minutes", flush=True)


def _check_floor(run_dir: Path, config: Config) -> None:
    """Raise ``RuntimeError`` where the demo failed at its task: then something is broken."""
    changed = config.changes()
    results = read_json(run_dir / "results.json")
    if (config.preset != "demo" or {"suite", "task_ids"} & set(changed)
            or results["success_rate"] >= DEMO_FLOOR):
        return
    settings = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    raise RuntimeError(
        f"the demo solved {results['successes']} of {results['episodes']} episodes; expected at "
        f"least {DEMO_FLOOR:.0%} of them"
        + (f" (with other settings than the preset's: {settings})" if settings else "")
        + f". Look at the films in {run_dir / 'videos' / 'failure'}, at the losses in "
        f"{run_dir / 'figures' / '04_training.png'} and at what 01_explore says of the "
        "demonstrations")
