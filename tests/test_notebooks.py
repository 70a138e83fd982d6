"""The eight notebooks: their form, a run of all of them, and the README's commands."""

import ast
import functools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import imageio.v3 as imageio
import jupytext
import nbformat
import numpy as np
import pytest
import torch
import yaml
from demo_files import write_demo_file
from nbclient import NotebookClient
from pretend_training import train_into
from test_run_notebooks import only_copies

from trm_helpers import paths, schema
from trm_helpers.__main__ import main
from trm_helpers.config import COMMON, from_flat
from trm_helpers.demos import collect
from trm_helpers.files import read_jsonl
from trm_helpers.notebooks import notebook_parameters
from trm_helpers.search import trials
from trm_helpers.sim.env import LiberoEnv

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["00_setup", "01_explore", "02_dataset", "03_model", "04_train", "05_search", "06_eval",
         "07_visualize"]
FIGURES = {
    "00_action",
    "01_frames", "01_action_statistics", "01_action_trace", "01_lengths", "01_alignment",
    "02_mask", "02_augmentation", "02_batch",
    "03_latency", "03_answer", "03_looks", "03_state",
    "04_training",
    "05_search", "05_coordinates",
    "06_episodes", "06_success", "06_lengths", "06_rollout",
    "07_predictions", "07_steps", "07_recursion", "07_moments", "07_depth",
    "07_prediction_by_depth", "07_halting", "07_saliency",
}
RETURN_NOTHING = ("display", "print", "session.begin", "session.keep", "show_notebook",
                  "torch.testing.assert_close")


def read(name: str):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


# --- form ---------------------------------------------------------------------------------------


ALL = [*NAMES, "kaggle_all"]


def test_there_are_eight_one_plays_them_and_each_has_its_source():
    for suffix in (".py", ".ipynb"):
        assert sorted(p.stem for p in (ROOT / "notebooks").glob(f"*{suffix}")) == ALL


@pytest.mark.parametrize("name", ALL)
def test_notebook_is_what_its_source_says_without_outputs(name):
    source = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    notebook = read(name)
    assert [(c.cell_type, c.source, c.metadata.get("tags")) for c in notebook.cells] \
        == [(c.cell_type, c.source, c.metadata.get("tags")) for c in source.cells]
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("name", ALL)
def test_no_text_stands_in_the_head_of_a_cell(name):
    """It would be the cell's title, which a notebook does not show."""
    source = (ROOT / "notebooks" / f"{name}.py").read_text()
    assert set(re.findall(r"^# %%(.*)$", source, re.MULTILINE)) <= {
        "", " [markdown]", ' tags=["parameters"]'}


@pytest.mark.parametrize("name", NAMES)
def test_notebook_defines_nothing_and_keeps_cells_short(name):
    cells = code(read(name))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for cell in cells:
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(cell)))
    assert statistics.median(cell.count("\n") + 1 for cell in cells) < 10


@pytest.mark.parametrize("name", ALL)
def test_no_cell_shows_its_last_value(name):
    """It would appear in an executed notebook, but not with %run: `display` does in both."""
    for cell in code(read(name)):
        last = ast.parse(cell).body[-1]
        if isinstance(last, ast.Expr):
            assert ast.unparse(last).split("(")[0] in RETURN_NOTHING \
                or ast.unparse(last).endswith(".backward()"), cell


@pytest.mark.parametrize("name", NAMES)
def test_notebook_begins_with_what_it_teaches_takes_and_writes(name):
    first = read(name).cells[0].source
    learned = first.split("**What you will learn**\n")[1].split("\n\n")[0]
    assert 3 <= sum(line.startswith("- ") for line in learned.splitlines()) <= 4
    assert re.search(r"\*\*Time\*\*: \d+ minutes to read[;.]", first)
    assert "two CPU cores" in first and "**Needs**" in first and "**Writes**" in first


@pytest.mark.parametrize("name", ALL)
def test_notebook_imports_in_one_block_after_its_parameters_and_the_first_cell(name):
    kinds = (ast.Import, ast.ImportFrom)
    cells = [[isinstance(node, kinds) for node in ast.walk(ast.parse(cell))]
             for cell in code(read(name))]
    assert [i for i, nodes in enumerate(cells) if any(nodes)] == [1, 2]


def test_explore_looks_at_the_first_demonstration_there_is(tmp_path):
    path = write_demo_file(tmp_path / "soup_demo.hdf5", (9, 5, 6, 7), image_size=4)
    with h5py.File(path, "a") as file:
        for old, new in ((3, 10), (2, 5), (1, 2), (0, 1)):
            file["data"].move(f"demo_{old}", f"demo_{new}")
    cells = code(read("01_explore"))
    [reads] = [cell for cell in cells if "open_demo_file(file)" in cell]
    names = {"file": path}
    exec("from trm_helpers import schema\n"
         "from trm_helpers.demos.demo_files import demo_names, open_demo_file\n" + reads, names)
    assert [len(actions) for actions in names["actions"]] == [9, 5, 6, 7]
    assert [len(frames) for frames in names["cameras"]] == [9, 9]
    [trace] = [cell for cell in cells if "plot_action_phases" in cell]
    assert "plot_action_phases(actions[0], phases(closed[0]), pushed[0])" in trace


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_literals_with_a_comment_each(name):
    cells = [c for c in read(name).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    for line in cells[0].source.splitlines():
        if line.startswith("# "):  # the heading of a group
            continue
        assignment, comment = line.split("#", 1)
        ast.literal_eval(assignment.split("=", 1)[1].strip())
        assert re.match(r" type: (str|int|float|bool|list|dict); \S", comment), line
    known = notebook_parameters(ROOT / "notebooks" / f"{name}.ipynb")
    common = [parameter for parameter in ("preset", "run_name", *COMMON) if parameter in known]
    assert list(known)[:len(common)] == common and {"preset", "run_name"} <= set(common)
    assert cells[0].source.startswith("# change these first\n")


def test_an_unknown_parameter_is_refused_with_the_one_meant_or_the_valid_ones(capsys):
    assert main(["run", "04_train", "-p", "learning_rate", "1e-3"]) == 1
    assert "unknown parameter 'learning_rate' for 04_train; did you mean 'lr'?" in (
        capsys.readouterr().err)
    assert main(["run", "04_train", "-p", "zzz", "1e-3"]) == 1
    said = capsys.readouterr().err
    assert "unknown parameter 'zzz'" in said
    assert "lr" in said and "hidden_dim" in said and "learning rate at the start" in said
    assert not paths.artifacts_dir().exists()


# --- the checks of 03_model ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", schema.VARIANTS)
def test_the_checks_of_a_recursion_pass_with_every_variant(variant, capsys):
    parameters, *cells = code(read("03_model"))
    names = {}
    exec(parameters, names)
    names |= {"preset": "tiny", "variant": variant}
    last = next(number for number, cell in enumerate(cells) if "All four hold" in cell)
    for cell in cells[:last + 1]:
        exec(cell, names)
    assert ("All four hold." in capsys.readouterr().out) == (variant in schema.RECURSIVE)


# --- the run of 04_train ------------------------------------------------------------------------


def run_of_04(**parameters) -> Path:
    """The folder that 04_train makes with these parameters; demonstrations are not looked for."""
    *first, making = code(read("04_train"))[:4]
    names = {}
    for cell in first:
        exec(cell, names)
    names |= {**parameters, "ensure_demonstrations": lambda *_: {}}
    exec(making, names)
    return names["run"]


def test_training_names_an_unchanged_preset_s_run_after_it_and_a_changed_one_by_the_time(
        monkeypatch):
    monkeypatch.setattr("trm_helpers.training.runs.software_versions", dict)
    assert run_of_04(preset="tiny") == paths.artifacts_dir() / "tiny"
    assert run_of_04(preset="tiny", stop_epoch=1) == paths.artifacts_dir() / "tiny"
    changed = run_of_04(preset="tiny", lr=0.5)
    assert re.fullmatch(r"libero_object-block-s0-\d{8}-\d{6}", changed.name)
    assert json.loads((changed / "config.json").read_text())["train"]["lr"] == 0.5
    assert run_of_04(preset="tiny", lr=0.5, run_name="mine") == paths.artifacts_dir() / "mine"


def test_training_does_not_touch_a_run_that_it_may_not_resume(trained):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    with pytest.raises(FileExistsError, match="exists already; choose another run_name"):
        run_of_04(preset="tiny", run_name=trained.name, resume=False)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


# --- exercises ----------------------------------------------------------------------------------


def answers(notebook) -> list[str]:
    """The code of each folded answer of the exercises."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    folded = re.findall(r"<details><summary>Answer</summary>\n\n(.*?)\n</details>", text, re.DOTALL)
    return ["\n".join(re.findall(r"```python\n(.*?)```", answer, re.DOTALL)) for answer in folded]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_ends_with_two_exercises_whose_answers_assert_something(name):
    assert read(name).cells[-2].source.startswith("## Exercises\n")
    found = answers(read(name))
    assert len(found) == 2
    for answer in found:
        assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(answer)))


# --- two GPUs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_kaggle_all_trains_a_second_seed_while_it_evaluates(gpus, monkeypatch, capsys):
    both, ran, displayed = threading.Barrier(2, timeout=10), [], []

    def run(name, settings, environment=None, stop=None):
        if gpus > 1:
            both.wait()  # neither ends before the other has begun
        ran.append((name, settings, environment))
        return name

    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    [cell] = [cell for cell in code(read("kaggle_all")) if "device_count" in cell]
    exec(cell, {"torch": torch, "ThreadPoolExecutor": ThreadPoolExecutor, "run_notebook": run,
                "show_notebook": displayed.append, "threading": threading,
                "settings": {"preset": "tiny", "run_name": "tiny"}})
    evaluation = ("06_eval", {"preset": "tiny", "run_name": "tiny"})
    if gpus < 2:
        assert ran == [(*evaluation, None)] and displayed == ["06_eval"]
        assert f"this session has {gpus} GPU(s)" in capsys.readouterr().out
    else:
        assert sorted(ran, key=lambda call: call[0]) == [
            ("04_train", {"preset": "tiny", "run_name": "tiny-seed1", "seed": 1},
             {"CUDA_VISIBLE_DEVICES": "1"}),
            (*evaluation, {"CUDA_VISIBLE_DEVICES": "0"})]
        assert displayed == ["06_eval", "04_train"]
    for call in ran:
        assert set(call[1]) <= set(notebook_parameters(ROOT / "notebooks" / f"{call[0]}.ipynb"))


def test_kaggle_all_ends_the_second_training_with_a_failed_evaluation(monkeypatch):
    begun, ended = threading.Event(), []

    def run(name, settings, environment=None, stop=None):
        if name == "06_eval":
            begun.wait(10)
            raise KeyboardInterrupt
        begun.set()
        ended.append(stop.wait(10))

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    [cell] = [cell for cell in code(read("kaggle_all")) if "device_count" in cell]
    with pytest.raises(KeyboardInterrupt):
        exec(cell, {"torch": torch, "ThreadPoolExecutor": ThreadPoolExecutor, "run_notebook": run,
                    "threading": threading, "show_notebook": print,
                    "settings": {"preset": "tiny", "run_name": "tiny"}})
    assert ended == [True]


# --- a run of all eight against the real simulator ----------------------------------------------


# the suite from a folder of copies
RUN = """
import pathlib, sys
from trm_helpers import __main__, paths
paths.notebooks_dir = lambda: pathlib.Path(sys.argv[1])
sys.exit(__main__.main(["run", "tiny"]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Environment variables, run folder and output of ``python -m trm_helpers run tiny``.

    The notebooks are copies that end with the code of their exercises' answers.
    """
    folder = tmp_path_factory.mktemp("tiny")
    for name in NAMES:
        notebook = read(name)
        notebook.cells += [nbformat.v4.new_code_cell(answer, metadata={"tags": ["answer"]})
                           for answer in answers(notebook)]
        nbformat.write(notebook, folder / f"{name}.ipynb")
    environment = {**os.environ, "TRM_DATA_DIR": str(folder / "data"),
                   "TRM_ARTIFACTS_DIR": str(folder / "artifacts")}
    done = subprocess.run([sys.executable, "-c", RUN, folder], env=environment,
                          capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return environment, folder / "artifacts" / "tiny", done.stdout


@pytest.mark.sim
@pytest.mark.notebooks
def test_suite_ends_with_the_success_line(tiny):
    _, run, output = tiny
    results = json.loads((run / "results.json").read_text())
    *_, success = [line for line in output.splitlines() if "success rate" in line]
    assert success.startswith(f"{results['successes']} of 2 episodes, success rate")
    assert re.search(r"mean length \d+\.\d steps \(standard deviation \d+\.\d\), \d+\.\d minutes",
                     success)
    assert f"{run}: notebooks 8, figures {len(FIGURES)}, " in output
    assert output.splitlines()[-1].startswith("next ")


@pytest.mark.sim
@pytest.mark.notebooks
def test_suite_executed_every_cell(tiny):
    executed = sorted((tiny[1] / "notebooks").glob("*.ipynb"))
    assert [path.stem for path in executed] == NAMES
    for path in executed:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert cell.execution_count, f"{path.stem}: {cell.source}"
                assert all(output.output_type != "error" for output in cell.outputs)


@pytest.mark.sim
@pytest.mark.notebooks
def test_suite_drew_figures_and_filmed(tiny):
    figures = {path.stem: imageio.imread(path) for path in (tiny[1] / "figures").glob("*.png")}
    assert set(figures) == FIGURES
    for name, pixels in figures.items():
        assert min(pixels.shape[:2]) > 200 and np.asarray(pixels).std() > 5, f"{name} is blank"
    films = sorted((tiny[1] / "videos").rglob("*.mp4"))
    assert [str(film.relative_to(tiny[1] / "videos")) for film in films] == \
        ["01_demonstration.mp4", "failure/libero_object-task0-init00.mp4"]
    frames = 24 // 2 + 1 + 10  # of the preset's horizon, and the last one held for a second
    assert len(imageio.imread(films[1])) == frames
    assert imageio.immeta(films[1])["fps"] == 10


@pytest.mark.sim
@pytest.mark.notebooks
def test_suite_wrote_measurements_that_agree(tiny):
    run = tiny[1]
    config = from_flat("tiny")
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [row["epoch"] for row in metrics] == list(range(1, config.train.epochs + 1))
    card = json.loads((run / "quality.json").read_text())
    assert len(card) == 14 and {row["verdict"] for row in card} == {"good"}, card
    episodes = read_jsonl(run / "episodes.jsonl")
    results = json.loads((run / "results.json").read_text())
    assert sorted(row["init_state"] for row in episodes) == [0, 1]
    assert results["episodes"] == 2
    assert results["successes"] == sum(row["success"] for row in episodes)
    assert results["software"]["mujoco"] == "3.3.2" and results["software"]["gl_renderer"]
    assert results["protocol"]["horizon"] == 24
    rows = json.loads((run / "search" / "trials.json").read_text())
    best = yaml.safe_load((run / "search" / "best.yaml").read_text())
    assert len(rows) == 2 and best["preset"] == "tiny" and "epochs" not in best
    assert all(rows[0][key] == best[key] for key in ("lr", "hidden_dim", "num_recursions"))
    assert from_flat(**best).model.num_recursions == best["num_recursions"]
    for row in rows:
        trial = run / "search" / row["trial"]
        losses = [epoch["val_loss"] for epoch in read_jsonl(trial / "metrics.jsonl")]
        assert row["state"] == "complete" and row["val_losses"] == losses and len(losses) == 1
        model = json.loads((trial / "config.json").read_text())["model"]
        assert all(model[key] == row[key] for key in ("hidden_dim", "num_recursions"))
        assert (trial / "notebooks" / "04_train.ipynb").exists()
    report = (run / "report.md").read_text()
    assert "success rate" in report and report.count("](figures/") == len(FIGURES)


@pytest.mark.sim
@pytest.mark.notebooks
def test_suite_started_again_does_nothing_again(tiny):
    environment, run, _ = tiny
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    done = subprocess.run([sys.executable, "-c", RUN, run.parent.parent], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("kept from before") == 8
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


# --- every way of running one -------------------------------------------------------------------


def shown(notebook) -> list[str]:
    """The kind of each figure, table and film in an executed notebook, in order."""
    data = [output.get("data", {}) for cell in notebook.cells if cell.cell_type == "code"
            for output in cell.outputs]
    return [kind for each in data for kind in ("image/png", "text/html") if kind in each]


@pytest.mark.sim
@pytest.mark.notebooks
@pytest.mark.slow
def test_five_ways_of_running_show_the_same(tiny, tmp_path, monkeypatch):
    """papermill (its copies exist), a client such as JupyterLab's, Kaggle's "Save & Run All", %run
    in another notebook, and the display of executed copies in kaggle_all."""
    environment, run, _ = tiny
    for name in ("TRM_DATA_DIR", "TRM_ARTIFACTS_DIR"):
        monkeypatch.setenv(name, environment[name])
    executed = run / "notebooks" / "04_train.ipynb"
    expected = shown(nbformat.read(executed, as_version=4))
    assert expected == ["image/png", "text/html", "text/html"]

    copy = tmp_path / "__notebook__.ipynb"
    source = (ROOT / "notebooks" / "04_train.ipynb").read_text()
    for parameter, usual in (("preset", "demo"), ("run_name", "")):
        assert f'{parameter} = \\"{usual}\\"' in source
        source = source.replace(f'{parameter} = \\"{usual}\\"', f'{parameter} = \\"tiny\\"')
    copy.write_text(source)
    other = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(f"%run {copy}"),
        nbformat.v4.new_code_cell("from trm_helpers.notebooks import show_notebook\n"
                                  f"show_notebook({str(executed)!r})")])
    for notebook in (other, client := nbformat.read(copy, as_version=4)):
        NotebookClient(notebook, resources={"metadata": {"path": copy.parent}}).execute()
    subprocess.run([sys.executable, "-m", "nbconvert", "--to=notebook", "--execute", "--inplace",
                    copy.name], cwd=copy.parent, check=True)
    ways = {"client": client, "Save & Run All": nbformat.read(copy, as_version=4), **{
        way: nbformat.v4.new_notebook(cells=[cell])
        for way, cell in zip(("%run", "show_notebook"), other.cells, strict=True)}}
    assert {way: shown(notebook) for way, notebook in ways.items()} == dict.fromkeys(ways, expected)


# --- the README ---------------------------------------------------------------------------------


def readme_blocks(language: str) -> list[str]:
    """Blocks of the README, then of docs/commands.md, which it refers to."""
    pages = [(ROOT / page).read_text() for page in ("README.md", "docs/commands.md")]
    return re.findall(rf"```{language}\n(.*?)```", "\n".join(pages), re.DOTALL)


def readme_commands() -> list[str]:
    lines = [line for block in readme_blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(("cd ", "git ", "source "))]


def test_readme_has_make_and_papermill():
    commands = readme_commands()
    assert commands[0] == "make play"
    assert {"`make demo`", "`make test`"} <= set(re.findall("`make \\w+`",
                                                           (ROOT / "README.md").read_text()))
    assert "papermill 04_train.ipynb ../artifacts/trained.ipynb -p lr 5e-4" in commands


@pytest.mark.parametrize("target", ["demo", "test"])
def test_readme_make_commands_end_in_what_is_tested_here(target):
    make = ["make", "--dry-run", "--no-print-directory", target]  # also where a make runs the tests
    plan = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    expected = {"demo": "-m trm_helpers run demo", "test": "-m pytest"}[target]
    assert plan.returncode == 0 and expected in plan.stdout.splitlines()[-1]


SMALL_EVALUATION = ["--num-episodes", "1", "--horizon", "8", "--num-videos", "0"]
OF_THEIR_OWN = ("make ", "papermill ", " run ", " --actor ", " search ")  # tested below


def made_small(command: str, data: Path) -> list[str]:
    """The arguments of a command with the tiny preset, and one short episode."""
    words = [{"10": "1", "40": "3"}.get(word, word) for word in shlex.split(command)]
    assert words[:3] == ["python", "-m", "trm_helpers"]
    words, options = words[3:], words[5:]
    small = {
        "collect": ["collect", "tiny", *(options if "--actor" in options else ["--task-ids", "0"])],
        "validate": ["validate", str(next(data.rglob("*_demo.hdf5"))),
                     "--suite", "libero_object", "--task-id", "0"],
        "train": ["train", "tiny", *options],
        "search": ["search", "tiny", *options],
        "evaluate": words + SMALL_EVALUATION,
        "report": words,
        "robustness": [*words, *SMALL_EVALUATION, "--only", "swap"],
        "depth": [*words, *SMALL_EVALUATION, "--depths", "2", "--thresholds"],
    }[words[0]]
    if "libero_spatial" in small:  # the expert, on all ten tasks
        small[small.index("libero_spatial")] = "libero_object"
        small += ["--task-ids", "0"]
    return small


@pytest.fixture
def typed(tiny, monkeypatch, capsys):
    """A function: run the one command of the README that has this text, made small.

    It runs in this process, which has imported the simulator already.
    """
    environment = tiny[0]
    for name in ("TRM_DATA_DIR", "TRM_ARTIFACTS_DIR"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.chdir(ROOT)

    def type_in(text):
        (command,) = [command for command in readme_commands() if text in command]
        arguments = made_small(command, Path(environment["TRM_DATA_DIR"]))
        assert main(arguments) == 0, capsys.readouterr().err

    return type_in


@pytest.mark.sim
@pytest.mark.notebooks
@pytest.mark.parametrize("command", [command for command in readme_commands()
                                     if not any(own in command for own in OF_THEIR_OWN)])
def test_readme_command_runs(command, typed):
    """In their order: some need what those before them made."""
    typed(command)


@pytest.mark.sim
@pytest.mark.notebooks
def test_readme_dagger_adds_an_episode_of_the_actor_that_was_trained_before(
        tiny, typed, monkeypatch):
    monkeypatch.setattr(LiberoEnv, "horizon", property(lambda _: 8))
    monkeypatch.setattr(collect, "collect_tasks",
                        functools.partial(collect.collect_tasks, workers=0))
    typed("--actor my-trm --beta 0.5")
    plain, added = sorted(Path(tiny[0]["TRM_DATA_DIR"]).rglob("*_demo.hdf5"),
                          key=lambda path: "my-trm" in str(path))
    with h5py.File(added) as file, h5py.File(plain) as before:
        first, second, last = (file[f"data/demo_{number}"] for number in range(3))
        assert len(file["data"]) == 3 and len(last["actions"]) == 8
        for old, demo in enumerate((first, second)):
            assert "actor" not in demo.attrs
            assert np.array_equal(demo["actions"], before[f"data/demo_{old}/actions"])
        assert (last.attrs["actor"], last.attrs["beta"]) == ("my-trm", 0.5)


@pytest.mark.sim
@pytest.mark.notebooks
def test_readme_search_resumes_and_a_shard_trains_its_points_only(tiny, typed, monkeypatch):
    one, two = (f"lr0.001-hidden_dim32-num_recursions{number}" for number in (1, 2))
    folder = tiny[1].parent / "s" / "search"
    shutil.copytree(tiny[1] / "search", folder)
    shutil.rmtree(folder / two)
    kept = {path: path.stat().st_mtime_ns for path in (folder / one).rglob("*")}
    typed("--search-workers 2")
    assert {path: path.stat().st_mtime_ns for path in (folder / one).rglob("*")} == kept
    assert (folder / two / "notebooks" / "04_train.ipynb").exists()
    assert {row["trial"]: row["state"] for row in json.loads(
        (folder / "trials.json").read_text())} == {one: "complete", two: "complete"}

    for trial in (one, two):
        shutil.rmtree(folder / trial)
    ran = []

    def train(notebook, given, *, run_dir, **_):
        ran.append(run_dir.name)
        train_into(run_dir, given)

    monkeypatch.setattr(trials, "run_notebook", train)
    typed("--search-shard 2/4")
    assert ran == [two]


def test_readme_run_gives_its_parameters_to_the_notebook(monkeypatch):
    """The suite runs the notebook, and tests/test_wheel.py this command."""
    (command,) = [command for command in readme_commands() if " run " in command]
    words, given = shlex.split(command), only_copies(monkeypatch)
    assert words[:3] == ["python", "-m", "trm_helpers"] and main(words[3:]) == 0
    assert given == [("04_train", {"run_name": "slower", "lr": 5e-4})]


@pytest.mark.sim
@pytest.mark.notebooks
def test_readme_papermill_trains_a_new_run_and_evaluates_it(tiny):
    environment, first, _ = tiny
    environment = {**environment,
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    small = {"04_train.ipynb": [], "06_eval.ipynb": ["-p", "num_episodes", "1",
                                                     "-p", "num_videos", "1"]}
    before = {*first.parent.glob("*/config.json")}
    results = (first / "results.json").read_bytes()
    commands = [command for command in readme_commands() if command.startswith("papermill")]
    for command, (notebook, settings) in zip(commands, small.items(), strict=True):
        words = shlex.split(command.replace("../artifacts", str(first.parent)))
        assert words[1] == notebook
        done = subprocess.run([*words, "-p", "preset", "tiny", *settings], env=environment,
                              cwd=ROOT / "notebooks", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert Path(words[2]).exists()  # below artifacts/
    (made,) = {*first.parent.glob("*/config.json")} - before
    run = made.parent
    assert json.loads(made.read_text())["train"]["lr"] == 5e-4
    assert json.loads((run / "results.json").read_text())["episodes"] == 1
    assert (first / "results.json").read_bytes() == results


@pytest.mark.sim
@pytest.mark.notebooks
@pytest.mark.slow
def test_papermill_runs_from_the_root_too(tiny):
    environment = tiny[0]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "notebooks/04_train.ipynb", "-p", "lr", "1e-3",
         "-p", "preset", "tiny", "-p", "run_name", "from-the-root"],
        cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Path(environment["TRM_ARTIFACTS_DIR"]) / "from-the-root"
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["lr"] == 1e-3 and len(read_jsonl(run / "metrics.jsonl")) == 2


@pytest.mark.sim
@pytest.mark.notebooks
@pytest.mark.slow
def test_best_of_the_search_is_trained_and_compared(tiny, tmp_path):
    """05's file as 04's parameters, then 06 against the first run, filming nothing."""
    environment, first, _ = tiny
    best = first / "search" / "best.yaml"
    settings = yaml.safe_load(best.read_text())
    for name, options in (("04_train", ["-f", str(best)]),
                          ("06_eval", ["-p", "baseline_run", "tiny", "-p", "num_videos", "0"])):
        done = subprocess.run(
            [sys.executable, "-m", "papermill", f"notebooks/{name}.ipynb",
             str(tmp_path / f"{name}.ipynb"), "-p", "run_name", "searched", *options],
            cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    run = first.parent / "searched"
    config = json.loads((run / "config.json").read_text())
    assert settings == {"preset": "tiny", "lr": config["train"]["lr"], "seed": 0,
                        "hidden_dim": config["model"]["hidden_dim"],
                        "num_recursions": config["model"]["num_recursions"]}
    assert not (run / "videos").exists() and (run / "figures" / "06_comparison.png").exists()
    printed = "".join(output.get("text", "") for cell in nbformat.read(
        tmp_path / "06_eval.ipynb", as_version=4).cells for output in cell.get("outputs", []))
    assert "searched against tiny on 2 shared episodes: +0.0 points" in printed


@pytest.mark.sim
@pytest.mark.notebooks
def test_readme_python_succeeds(monkeypatch, capsys):
    (example,) = readme_blocks("python")
    assert example.count("num_episodes=5") == 1
    monkeypatch.chdir(ROOT)
    exec(example.replace("num_episodes=5", "num_episodes=1"), {})
    rate, low, high = map(float, capsys.readouterr().out.splitlines()[-1].split())
    assert (rate, low, high) == (1, pytest.approx(1 / (1 + 1.96 ** 2), abs=1e-4), 1)
