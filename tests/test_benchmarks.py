"""The scripts in benchmarks/, each at a tiny size.

Scripts that play episodes get a made-up ledger instead of the simulator; scripts that compare
simulators use the real one. ``peers_read.py`` needs the peers, see data/test_dataset.py.
"""

import base64
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import imageio.v3 as imageio
import nbformat
import numpy as np
import pytest
import torch
from demo_files import write_demo_file
from PIL import Image
from safetensors.torch import load_file

from trm_helpers import paths
from trm_helpers.evaluation import evaluate
from trm_helpers.evaluation.plan import SELECTION_SEED
from trm_helpers.evaluation.rollout import run_episode
from trm_helpers.files import append_jsonl, write_json
from trm_helpers.notebooks import suite_notebooks
from trm_helpers.paths import repo_root
from trm_helpers.sim.env import LiberoEnv
from trm_helpers.stats import summarize_episodes
from trm_helpers.training.runs import save_weights

FOLDER = repo_root() / "benchmarks"


@pytest.fixture
def script(monkeypatch, capsys):
    """A function: run a script with arguments and replaced names; the lines it prints."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])

    def run_script(name, *arguments, code=None, **replaced):
        path = FOLDER / f"{name}.py"
        main = runpy.run_path(str(path))["main"]
        unknown = replaced.keys() - main.__globals__.keys()
        assert not unknown, f"{name} has no {unknown}"
        main.__globals__.update(replaced)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        assert main() == code
        return capsys.readouterr().out.splitlines()

    return run_script


def table(lines: list[str]) -> list[list[str]]:
    """The cells of the first table's lines, without its head."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")]
            for line in lines if line.startswith("|")]
    rules = [number for number, row in enumerate(rows) if set("".join(row)) == {"-"}]
    return rows[rules[0] + 1:rules[1] - 1 if len(rules) > 1 else None]


@pytest.fixture
def file(tmp_path):
    return write_demo_file(tmp_path / "files" / "soup_demo.hdf5", (6, 7, 8, 9, 10))


@pytest.fixture
def played(file):
    """What stands in for demonstrations and for playing episodes: two of three succeed."""
    def play(run):
        rows = [{"suite": "libero_object", "task_id": 0, "init_state": state, "success": state > 0,
                 "steps": 80} for state in range(3)]
        for row in rows:
            append_jsonl(Path(run) / "episodes.jsonl", row)
        return {**summarize_episodes(rows), "errors": [], "not_run": 0}

    return {"ensure_demonstrations":
            lambda config, actor=None: dict.fromkeys(config.data.task_ids, file),
            "plan_run": lambda run, *_, **more: types.SimpleNamespace(
                play=lambda: play(run))}


# --- speed ---------------------------------------------------------------------------------------
def test_the_latency_of_decisions(script):
    rows = table(script("latency", "--rounds", 1, DEPTHS=(1, 2)))
    assert [row[:3] for row in rows] == [
        [preset, batch, depth] for preset in ("demo", "trm")
        for batch, depth in (("1", "1"), ("1", "2"), ("64", "1"), ("64", "2"),
                             ("64", "half 1, half 8"))]
    assert all(float(row[4]) > 0 for row in rows)


def test_the_speed_of_training(script):
    names = ["ours, preset demo (block, 64 px, chunk 8)", "ours, preset trm (64 px, chunk 8)"]
    rows = table(script("training", "--here", "--rounds", 1, "--only", *names, BATCH=2))
    assert [row[0] for row in rows] == names
    assert all(float(row[column].replace(",", "")) > 0 for row in rows for column in (2, 3, 5))


def test_the_speed_of_training_steps_on_a_device(script, tmp_path):
    """The table and the JSON file; a peer that is not installed is named."""
    def missing(batch, device):
        import package_that_nobody_has  # noqa: F401

    def present(batch, device):
        network = torch.nn.Linear(3, 1)
        return network, lambda: network(torch.ones(batch, 3)).mean()

    out = tmp_path / "speed.json"
    rows = table(script("training", "--device", "cpu", "--presets", "demo", "--batches", 2, 4,
                        "--steps", 96, "--seconds", 0.01, "--out", out,
                        PEERS={"theirs": missing, "others": present}))
    assert [row[:2] for row in rows] == [["ours, preset demo", "2"], ["ours, preset demo", "4"],
                                         ["theirs", "2"], ["others", "2"], ["others", "4"]]
    assert rows[2][2] == "not installed (package_that_nobody_has)"
    assert all(row[3] == row[4] == "-" for row in rows)  # no CUDA graph on a CPU
    measured = json.loads(out.read_text())
    assert measured["machine"] == "CPU" and len(measured["rows"]) == 5
    assert all(row["samples_per_second"] > 0 for row in measured["rows"] if not row["note"])


def test_the_speed_of_loading(script, file):
    write_demo_file(file, (12, 13))  # long enough for ten frames
    names = runpy.run_path(str(FOLDER / "loading.py"))

    def run_one(python, name, given, **_):
        return names["measure"](name, given.file, 0.01) if name in names["OURS"] else None

    lines = script("loading", file, "--peer-python", "none", "--repeats", 1, run_one=run_one)
    ours = [name for name in names["OURS"] if not name.startswith("gpu")]
    assert [row[0] for row in table(lines)] == [f"ours, {name}" for name in ours]
    *_, measured = script("loading", file, "--only", ours[0], "--seconds", 0.01)
    assert json.loads(measured)["samples_per_s"] > 0


# --- policies ------------------------------------------------------------------------------------
def test_policies_are_trained_and_compared(script, played):
    names = ["block, depth 4", "block, depth 1"]
    rows = table(script("policies", "--suite", "libero_object", "--tasks", 0, "--demos", 5,
                        "--epochs", 1, "--episodes", 3, "--only", *names, **played))
    assert [row[0] for row in rows] == names
    assert rows[0][3] == "2 of 3" and rows[1][5] == "+0 points, p = 1.00"


def test_kinds_and_numbers_of_demonstrations_are_compared(script, file):
    def robustness_card(run, evaluation, only):
        assert (Path(run) / "best.safetensors").exists() and evaluation.num_episodes == 3
        return {"rows": [{"name": name, "successes": 2, "episodes": 3, "wilson_low": 0.2,
                          "wilson_high": 0.9} for name in ("plain", *only)]}

    rows = table(script(
        "demonstrations", "--policy", "block, depth 1", "--tasks", 0, "--demos", 4, "5", "--epochs",
        1, "--episodes", 3, "--kinds", "wide", "--changes", "swap", "--set", "conditioning", "none",
        "--set", "image_size", 36,
        collected=lambda kind, given: {0: file}, robustness_card=robustness_card))
    cell = "2 of 3 (21 to 94 %)"
    assert rows == [["wide", "4", cell, cell], ["wide", "5", cell, cell]]


def test_a_suite_goes_in_stages_and_goes_on(script, played, tmp_path, monkeypatch):
    monkeypatch.setenv("TRM_STOP_AT", "")  # the script sets it
    rolled = []
    monkeypatch.setattr(evaluate, "selection_success",
                        lambda *_: {"success_rate": len(rolled.append(1) or rolled) / 10})
    settings = runpy.run_path(str(FOLDER / "suite" / "stages.py"))["settings"]
    arguments = ["block, depth 1", "--suite", "libero_object", "--tasks", 0, "--demos", 5,
                 "--epochs", 2, "--episodes", 3, "--out", tmp_path / "out", "--run-name", "staged",
                 "--set", "rollout_every", 1]
    stand_ins = {**played,
                 "settings": lambda given: settings(given).replace(conditioning="none")}

    def stages(minutes, code, **more):
        monkeypatch.setenv("TRM_STOP_AT", "")
        return script("suite/stages", *arguments, "--minutes", minutes, code=code,
                      **{**stand_ins, **more})

    def too_late(config, actor):
        raise TimeoutError("5 demonstrations are missing")

    assert stages(0, 3, ensure_demonstrations=too_late)[-2:] == [
        "5 demonstrations are missing", "call again"]
    assert stages(0, 3)[-1] == "call again" and len(rolled) == 1
    lines = stages(5, 0)
    assert len(rolled) == 2
    assert lines[-1] == "complete" and "2 of 3 episodes" in lines[-2]
    brought = {path.name for path in (tmp_path / "out" / "staged").iterdir()}
    assert {"best.safetensors", "metrics.jsonl", "episodes.jsonl"} <= brought


def test_the_speed_of_a_search(script, file, monkeypatch):
    monkeypatch.setenv("TRM_ARTIFACTS_DIR", str(paths.artifacts_dir()))  # the script sets it
    searched = []

    def run_search(config, run):
        searched.append(config.search.search_workers)
        return [{"state": "complete"}] * 2

    lines = script("search", "--preset", "tiny", "--trials", 2, "--epochs", 1, "--rounds", 1,
                   run_search=run_search, ensure_demonstrations=lambda config: {0: file})
    assert searched == [1, 2]
    assert [row[0] for row in table(lines)] == ["in this process", "one worker", "two workers"]


# --- the check of a machine ----------------------------------------------------------------------
def test_steps_of_the_machine_check_fail_alone(script, tmp_path, monkeypatch):
    """One step measures, others fail, hang, print nonsense or are not needed."""
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    names = runpy.run_path(str(FOLDER / "gpu_check.py"))
    step, read = names["Step"], lambda text: (text.strip(), json.loads(text), True)

    def prints(code, limit=30.0, **settings):
        return step([sys.executable, "-c", code], limit, read, **settings)

    def steps(device):
        assert device == "cpu"
        return {"good": prints("import os; print(7 if os.environ['TRM_DATA_DIR'] else 0)"),
                "home": prints("import json, os; print(json.dumps(os.environ['HOME']))"),
                "bad": prints("print(1); raise SystemExit('no driver')"),
                "nonsense": prints("print('{')", needed=False),
                "hangs": prints("import time; time.sleep(60)", limit=0.5)}.items()

    out = tmp_path / "check.json"
    arguments = ["--device", "cpu", "--out", out]
    lines = script("gpu_check", *arguments, code=1, steps=steps)
    status = {line.split()[1]: line.split()[0] for line in lines if line[:4].strip()}
    assert status["machine"] == "warn" and "no GPU" in "".join(lines)
    assert [status[name] for name in ("good", "home", "bad", "nonsense", "hangs")] == [
        "ok", "ok", "fail", "warn", "fail"]
    kept = {row["step"]: row for row in json.loads(out.read_text())["steps"]}
    assert kept["good"]["measured"] == 7 and kept["home"]["measured"] == "~"
    assert kept["bad"]["output"].endswith("no driver\n")
    assert "took longer than 0.5 s" in kept["hangs"]["found"]
    assert kept["machine"]["measured"]["mujoco"] == "3.3.2"
    assert str(tmp_path / "somebody") not in out.read_text() + "".join(lines[:-1])
    assert "ok" in script("gpu_check", *arguments, "--only", "good", code=0, steps=steps)[-2]


def test_the_machine_check_finds_a_gpu_without_nvidia_smi(monkeypatch, tmp_path):
    found = types.SimpleNamespace(name="Tesla T4", total_memory=16e9, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    names = runpy.run_path(str(FOLDER / "gpu_check.py"))
    measured = json.dumps(names["measure_machine"](0))
    assert names["read_machine"](measured)[0] == "Tesla T4 (16 GB), fp16, driver None"


def test_the_machine_check_needs_no_user_with_a_name(monkeypatch):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.setenv("HOME", "/")
    names = runpy.run_path(str(FOLDER / "gpu_check.py"))
    assert names["without_names"]("/proc/cpuinfo") == "/proc/cpuinfo"


def test_the_machine_check_has_no_names_of_user_and_host_in_its_texts(monkeypatch):
    """Whatever they are: the keys and numbers of the file stay."""
    monkeypatch.setattr("getpass.getuser", lambda: "step")
    monkeypatch.setattr("platform.node", lambda: "7")
    names = runpy.run_path(str(FOLDER / "gpu_check.py"))
    records = [{"step": "step of 7", "seconds": 7, "measured": ("7", None, "steps")}]
    assert names["in_texts"](names["without_names"], records) == [
        {"step": "USER of HOST", "seconds": 7, "measured": ["HOST", None, "steps"]}]


@pytest.mark.sim
@pytest.mark.slow
def test_the_machine_check_measures_frames_and_training(script, tmp_path):
    names = runpy.run_path(str(FOLDER / "gpu_check.py"))
    names["SIZES"]["cpu"] |= {"frames": 1, "batches": [2]}
    out = tmp_path / "check.json"
    planned = dict(names["steps"]("cpu"))
    script("gpu_check", "--device", "cpu", "--out", out, "--only", *list(planned)[1:2],
           "training speed", code=0, SIZES=names["SIZES"])
    _, frames, speed = json.loads(out.read_text())["steps"]
    assert all(ms > 0 for ms in frames["measured"]["frame_ms"].values())
    assert all(preset in speed["found"] for preset in ("preset demo", "preset trm"))


# --- what a policy looks at ----------------------------------------------------------------------
def test_units_that_are_off_are_counted(script, trained, tmp_path):
    (soup,) = tmp_path.glob("soup_demo.hdf5")
    state = load_file(trained / "best.safetensors")
    for layer, units in (("head.hidden", 5), ("encoders.agentview_rgb.convolutions.5", 3)):
        for kind in ("weight", "bias"):
            state[f"{layer}.{kind}"][:units] = 0.0
    save_weights(trained, state, "best")
    head, camera = table(script(
        "dead_units", trained.name, demonstrations_of=lambda run, config: {0: soup}))
    for row, part, least in ((head, "action head", 5), (camera, "agentview_rgb", 3)):
        few, of, many = row[2].split()
        assert row[:2] == [trained.name, part] and of == "of"
        assert least <= int(few) < int(many)


def test_a_probe_reads_where_things_are(script, trained, tmp_path):
    (soup,) = tmp_path.glob("soup_demo.hdf5")
    known = json.loads((trained / "policy.json").read_text())["trained_on"]["files"][0]["demos"]
    write_demo_file(soup, range(6, 15), image_size=36)  # extended since
    probed = []

    def positions(env, demo):
        probed.append(demo.name.split("/")[-1])
        hand = np.asarray(demo["obs/ee_pos"])
        rising = np.linspace(0, 1, len(hand))[:, None]
        return {"object": 0.02 * rising + hand * 0, "hand": hand}

    @contextlib.contextmanager
    def env(suite, task_id):
        yield types.SimpleNamespace(reset=lambda: None, task=types.SimpleNamespace(
            task_id=task_id, language="pick up the soup"))

    rows = table(script(
        "probes", trained.name, "--demos", 4, LiberoEnv=env, positions=positions, _AHEAD=1,
        demonstrations_of=lambda run, config: {0: soup}))
    assert len(known) == len(probed) == 4 and not {*known} & {*probed}
    assert [row[0] for row in rows][:2] == ["proprioception", "input"]
    kept = json.loads((trained / "probes.json").read_text())
    assert [row["state"] for row in kept["rows"]] == [row[0] for row in rows]
    assert kept["rows"][0]["explained"][0][0] > 0.5  # the joints move with time, as the object does
    assert kept["fitted"] == kept["scored"] == 2 and "dirty" in kept["software"]


def test_results_of_the_expert_name_the_code_that_made_them(script, tmp_path):
    out = tmp_path / "expert.json"

    def run(task, revision):
        def run_jobs(job, tasks, **_):
            row = {"successes": 1, "failed": [], "mean_length": 9.0}
            return [(each, {"task_id": each, **row}, None) for each in tasks]

        return script("experts", "--suite", "libero_object", "--tasks", task, "--episodes", 1,
                      "--out", out, run_jobs=run_jobs,
                      software_versions=lambda: {"revision": revision, "dirty": False})

    for task, revision in ((0, "a"), (1, "a"), (2, "b")):
        rows = table(run(task, revision))
    first, second, third = json.loads(out.read_text())["tasks"]
    assert len(rows) == 3 and "revision" not in {**first, **second}
    assert (third["revision"], third["dirty"]) == ("b", False)


# --- the simulator -------------------------------------------------------------------------------
@pytest.mark.sim
@pytest.mark.slow
def test_the_expert_succeeds_in_its_table(script):
    ((task, _, successes, *_),) = table(script(
        "experts", "--suite", "libero_object", "--tasks", 0, "--episodes", 1, "--init-states",
        "--workers", 1))
    assert (task, successes) == ("0", "1 of 1")


@pytest.mark.sim
@pytest.mark.slow
def test_the_number_of_executed_actions_is_chosen_on_sampled_placements(script, small_run):
    trainer = small_run(suite="libero_object", task_ids=(0,), chunk=4, execution_horizon=2)
    trainer.fit()
    seen = []

    def play(policy, env, init_state, seed):
        row = run_episode(policy, env, init_state, horizon=3, seed=seed)
        seen.append((init_state, seed, policy.execution_horizon, env.task.task_id))
        return {**row, "success": policy.execution_horizon == 4}

    rows = table(script("execution_horizon", trainer.run, "--horizons", 2, 4, "--episodes", 2,
                        run_episode=play))
    assert seen == [(None, SELECTION_SEED + number, horizon, 0)
                    for horizon in (2, 4) for number in (0, 1)]
    assert [row[1:3] for row in rows] == [["2", "0 of 2"], ["4", "2 of 2"]]
    assert rows[1][-1].startswith("+100 points")


LOOPS = """
import functools, runpy, sys
from pathlib import Path
from trm_helpers import schema
schema.HORIZONS["libero_object"] = 4
script, run = sys.argv[1:]
sys.path.insert(0, str(Path(script).parent))
main = runpy.run_path(script)["main"]
main.__globals__["EvalConfig"] = functools.partial(main.__globals__["EvalConfig"], horizon=4)
sys.argv = [script, run, "--episodes", "1", "--rounds", "1", "--workers", "1"]
main()
"""


@pytest.mark.sim
@pytest.mark.slow
def test_both_loops_of_evaluation_show_a_policy_the_same(small_run):
    """In a process of its own: LIBERO forks, and a fork of a process that has drawn may not end."""
    trainer = small_run(suite="libero_object", task_ids=(0,))
    trainer.fit()
    lines = run("-c", LOOPS, FOLDER / "rollouts.py", trainer.run).splitlines()
    assert any(line.endswith("reached the policy in 1 episodes; 0 differ") for line in lines)
    assert [row[0] for row in table(lines)] == ["LIBERO's loop", "ours"]


@pytest.mark.sim
@pytest.mark.slow
def test_both_ways_of_collecting_make_the_same_episode(script, monkeypatch):
    real = LiberoEnv.step

    def step(env, action):  # ten settle; twenty more are enough to compare
        return real(env, action)[0], env.raw.timestep >= 30

    monkeypatch.setattr(LiberoEnv, "step", step)
    lines = script("collection", "--suite", "libero_object", "--task", 0, "--rounds", 1,
                   collect_demonstrations=lambda *_, **__: None)
    assert lines[0].startswith("1 episodes, 40 frames; ") and len(table(lines)) == 4
    assert float(re.search(r"at most ([\d.]+) of 255", lines[0])[1]) < 12


def run(*arguments, source=FOLDER.parent, **where) -> str:
    """What a Python process prints; its messages are shown when it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                          timeout=900, env={**os.environ, "PYTHONPATH": str(source)}, **where)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- executed copies -----------------------------------------------------------------------------
@pytest.fixture
def executed_run(tmp_path):
    """A run whose eight notebooks each printed a path, drew a figure and showed a film."""
    figure, film = io.BytesIO(), tmp_path / "film.mp4"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(
        figure, "PNG")
    imageio.imwrite(film, np.zeros((9, 32, 48, 3), np.uint8), fps=10)
    encoded = base64.b64encode(film.read_bytes()).decode()
    outputs = [
        nbformat.v4.new_output("stream", text=f"run: {tmp_path}/artifacts/demo\n"),
        nbformat.v4.new_output("display_data", {
            "image/png": base64.b64encode(figure.getvalue()).decode()}),
        nbformat.v4.new_output("display_data", {
            "text/html": f'<video src="data:video/mp4;base64,{encoded}"></video>'})]
    run = tmp_path / "artifacts" / "demo"
    (run / "notebooks").mkdir(parents=True)
    write_json(run / "results.json", {"software": {"revision": "0123456789abcdef"}})
    for source in suite_notebooks():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=outputs)])
        notebook.metadata.papermill = {"input_path": f"{tmp_path}/notebooks/{source.name}"}
        nbformat.write(notebook, run / "notebooks" / source.name)
    (run / "figures").mkdir()
    for name in runpy.run_path(str(FOLDER / "gallery.py"))["_THUMBS"]:
        Image.new("RGB", (960, 280)).save(run / "figures" / f"{name}.png")
    return run


def test_executed_copies_are_published(script, executed_run, tmp_path):
    script("gallery", executed_run, "--out", tmp_path / "copies")
    copies = sorted((tmp_path / "copies").iterdir())
    assert [copy.name for copy in copies] == [source.name for source in suite_notebooks()]
    for copy in copies:
        assert str(tmp_path) not in copy.read_text()
        note, cell = nbformat.read(copy, as_version=4).cells
        assert f"(../../notebooks/{copy.name})" in note.source and "0123456789" in note.source
        printed, figure, film, frames = cell.outputs
        assert printed.text == "run: trm/artifacts/demo\n"
        assert Image.open(io.BytesIO(base64.b64decode(figure.data["image/png"]))).size == (60, 40)
        assert "<video" in film.data["text/html"]
        assert Image.open(io.BytesIO(base64.b64decode(frames.data["image/jpeg"]))).size == (288, 32)
    for source in suite_notebooks():
        with Image.open(tmp_path / "images" / "thumbs" / f"{source.name[:2]}.webp") as thumb:
            assert thumb.size == (240, 180)


def test_copies_of_an_incomplete_or_too_large_run_are_refused(script, executed_run, tmp_path):
    out = tmp_path / "copies"
    script("gallery", executed_run, "--out", out, code=2, _LIMIT=1000)
    (executed_run / "notebooks" / "03_model.ipynb").unlink()
    script("gallery", executed_run, "--out", out, code=2)
    assert not out.exists()
