"""``python -m trm_helpers``: arguments reach the functions; exit codes; JSON."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from demo_files import write_demo_file

from trm_helpers import notebooks, paths, preflight
from trm_helpers.__main__ import COMMANDS, main, parse
from trm_helpers.config import COMMON, PRESETS, from_flat
from trm_helpers.demos import collect
from trm_helpers.evaluation import evaluate, robustness
from trm_helpers.evaluation.play import Evaluation
from trm_helpers.preflight import Check
from trm_helpers.search import search

USAGE = {"collect": "[PRESET]", "train": "[PRESET]", "search": "[PRESET]", "validate": "FILE",
         "run": "PRESET|NOTEBOOK", "preflight": ""}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_how_a_command_is_called(name, capsys):
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as ended:
            parse([name, flag])
        assert ended.value.code == 0
        usage = capsys.readouterr().out.splitlines()[0].split()
        assert usage == ["usage:", "python", "-m", "trm_helpers", name,
                         *USAGE.get(name, "RUN").split(), "[OPTIONS]"]
    (example,) = re.findall("Example: `python -m trm_helpers (.*)`\n", COMMANDS[name].__doc__)
    assert isinstance(parse(shlex.split(example)), COMMANDS[name])


def test_help_lists_settings_with_their_comments_and_choices(capsys):
    with pytest.raises(SystemExit):
        parse(["run", "--help"])
    assert "a parameter of the notebooks, such as lr 1e-3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(["train", "trm", "--help"])
    page = capsys.readouterr().out
    assert "PRESET: " + ", ".join(PRESETS) in page
    assert "--variant {block,trm,transformer,act}" in page
    first = re.findall(r"^  --(\S+) .*\(default: (.+)\)$", page.partition(" options ")[0], re.M)
    assert [name.replace("-", "_") for name, _ in first] == list(COMMON) and len(COMMON) == 8
    assert dict(first)["epochs"] == "70" and dict(first)["task-ids"] == "2"
    assert not {"--preset", "--keypoints"} & set(page.split())  # set by a command itself
    said = " ".join(page.split())
    assert "--latent-updates INT trm: n, updates of z before each update of y (default: 2)" \
        in said


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["-h"], 0), ([], 2), (["trian"], 2)])
def test_the_commands_are_listed(argv, code, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert all(f"  {name} " in printed.out + printed.err for name in COMMANDS)
    said = "unknown command 'trian'; did you mean 'train'?"
    assert (said in printed.err) == (argv == ["trian"])


@pytest.mark.parametrize("name", ["../up", "my run", "a/b", "", ".x"])
def test_a_bad_run_name_is_refused_before_anything_is_collected(name, monkeypatch, capsys):
    monkeypatch.setattr("trm_helpers.demos.collect.ensure_demonstrations", None)
    for command in (["train", "tiny", f"--run-name={name}"],
                    ["search", "tiny", f"--run-name={name}"],
                    ["run", "tiny", f"--run-name={name or '.'}"],
                    ["run", "04_train", f"--run-name={name or '.'}"]):
        if command[0] != "train" or name:  # without a name it gets one from the time
            assert main(command) == 1, command
            assert "run_name=" in capsys.readouterr().err
    assert not paths.artifacts_dir().exists()


@pytest.mark.parametrize("command", ["evaluate", "report", "robustness", "depth"])
def test_a_path_that_climbs_is_refused_by_every_command(command, capsys):
    assert main([command, "../artifacts/x"]) == 1
    assert "without '..'" in capsys.readouterr().err


def test_a_preset_and_settings_on_top():
    command = parse(["train", "trm", "--run-name", "r", "--lr", "2e-3", "--task-ids", "0", "2"])
    assert command.run_name == "r"
    assert command.config == from_flat("trm", lr=2e-3, task_ids=(0, 2))
    assert parse(["collect", "--num-demos", "7"]).data == from_flat("demo", num_demos=7).data


def test_wrong_usage_and_bad_values_have_their_own_codes(capsys):
    for wrong, said in ((["--learning-rate", "1"],
                         "unknown option --learning-rate; did you mean --lr?"),
                        (["--epoch=3"], "--epochs INT"),  # tyro's proposal
                        (["--lr", "-1"], "lr=-1.0 is not valid")):
        with pytest.raises(SystemExit) as ended:
            main(["train", "demo", "--run-name", "r", *wrong])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    assert main(["train", "huge", "--run-name", "r"]) == 1
    assert "error: preset='huge' is not valid" in capsys.readouterr().err
    assert main(["evaluate", "nobody"]) == 1
    assert "no trained run 'nobody'" in capsys.readouterr().err
    assert main(["evaluate", "expert"]) == 1
    assert "'expert' needs a suite" in capsys.readouterr().err


def test_an_option_that_the_command_lacks_is_not_proposed(capsys):
    for argv, proposed in ((["evaluate", "a", "--depth", "3"], False),
                           (["evaluate", "a", "--episodes", "3"], True),
                           (["train", "demo", "--run-name", "a", "--depth", "3"], True)):
        with pytest.raises(SystemExit):
            main(argv)
        assert ("did you mean --num-" in capsys.readouterr().err) == proposed


@pytest.mark.parametrize("ignored", [["--against", "b"], ["--bound-episodes", "2"],
                                     ["--weights", "last"], ["--demo-dir", "folder"]])
def test_a_baseline_refuses_what_only_runs_use(ignored, capsys):
    assert main(["evaluate", "no-op", "--suite", "libero_goal", *ignored]) == 1
    assert f"{' '.join(ignored)} has no effect on the baseline 'no-op'" in capsys.readouterr().err


@pytest.mark.parametrize(("ignored", "said"), [
    (["--lr", "7e-4"], "--lr has no effect on a search, whose trials have the values of "
                       "--search-lrs; leave it out"),
    (["--patience", "5"], "--patience has no effect on a search, whose trials train to the end")])
def test_a_search_refuses_what_it_chooses_itself(ignored, said, capsys):
    assert main(["search", "demo", "--run-name", "s", *ignored]) == 1
    assert said in capsys.readouterr().err


def test_preflight_makes_one_kind_of_check(capsys):
    assert main(["preflight", "--quick", "--selftest"]) == 1
    assert "three different checks; choose one" in capsys.readouterr().err


def test_a_folder_of_demonstrations_is_for_replays_alone(trained, capsys):
    assert main(["evaluate", trained.name, "--bound-episodes", "0", "--demo-dir", "folder"]) == 1
    assert "--demo-dir folder has no effect on an evaluation without --bound-episodes" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("right", ["--no-proprioception", "--epochs=2", "--storage"])
def test_no_other_option_is_proposed_for_one_that_exists(right, capsys):
    with pytest.raises(SystemExit):
        main(["train", "demo", "--run-name", "r", right, "--lr", "abc"])
    assert "unknown option" not in capsys.readouterr().err


def test_training_and_evaluation_from_the_command_line(tmp_path, monkeypatch, capsys):
    name = "pick_up_the_alphabet_soup_and_place_it_in_the_basket_demo.hdf5"
    write_demo_file(tmp_path / "libero_object" / name, (6, 7, 8, 9, 10), image_size=36)
    settings = ["--demo-dir", str(tmp_path), "--image-size", "36", "--cameras", "agentview_rgb",
                "--epochs", "1", "--num-videos", "1"]
    assert main(["train", "tiny", "--run-name", "mine", *settings, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["epoch"] == 1 and "training" in printed.err
    run = paths.artifacts_dir() / "mine"
    assert (run / "best.safetensors").exists()

    asked = []

    def play(evaluation):
        asked.append(evaluation)
        task = {"suite": "libero_object", "task_id": 3, "successes": 1, "episodes": 2,
                "success_rate": 0.5, "wilson_low": 0.1, "wilson_high": 0.9, "mean_length": 4.0,
                "std_length": 1.0}
        return {**task, "tasks": [task],
                "errors": [{"error": "hung"}] if evaluation.suite == "libero_goal" else [],
                "not_run": 1 if evaluation.suite == "libero_10" else 0}

    monkeypatch.setattr(Evaluation, "play", play)
    assert main(["evaluate", "mine", "--task-ids", "3", "--protocol", "libero"]) == 0
    (given,) = asked
    assert given.source[:2] == (run, "best")
    assert {episode[:2] for episode in given.planned} == {("libero_object", 3)}
    assert given.config.num_videos == 1 and given.config.protocol == "libero"
    assert "libero_object 3: 1 of 2 episodes" in capsys.readouterr().out
    assert main(["evaluate", "mine", "--suite", "libero_goal"]) == 3  # there were errors
    assert main(["evaluate", "mine", "--suite", "libero_10"]) == 3  # the session's time was up

    planned = evaluate.plan_run(run)
    conditions = planned.conditions_of(planned.planned[0])
    (run / "episodes.jsonl").write_text("".join(json.dumps({
        "suite": "libero_object", "task_id": 0, "init_state": state, "seed": 0,
        "success": state < 1, "steps": 4, **conditions}) + "\n" for state in range(2)))
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--against", "mine", "mine"])
    assert "the run comes first, because it sets the defaults" in capsys.readouterr().err
    shutil.copytree(run, run.parent / "theirs")
    assert main(["evaluate", "mine", "--against", "theirs"]) == 0
    assert "mine against theirs on 2 shared episodes: +0.0 points" in capsys.readouterr().out
    cut_off = play(asked.pop()) | {"not_run": 1}
    monkeypatch.setattr(Evaluation, "play", lambda _: cut_off)
    assert main(["evaluate", "mine", "--against", "theirs"]) == 3
    assert "not compared with theirs: episodes are missing" in capsys.readouterr().out
    monkeypatch.setattr(Evaluation, "play", play)
    assert main(["evaluate", "mine", "--against", "mine"]) == 1
    assert "mine is the run that is evaluated" in capsys.readouterr().err
    assert main(["evaluate", "mine", "--against", "other"]) == 1 and len(asked) == 4
    assert main(["evaluate", "expert", "--suite", "libero_goal", "--against", "mine"]) == 1


def test_a_robustness_card_from_the_command_line(trained, monkeypatch, capsys):
    asked = []

    def robustness_card(run, config, weights, task_ids, only):
        asked.append((run, config, weights, task_ids, only))
        row = {"name": "plain", "title": "nothing changed", "successes": 1, "episodes": 2,
               "success_rate": 0.5, "wilson_low": 0.1, "wilson_high": 0.9, "errors": 0,
               "gap": None, "p_value": None}
        failed = [{"name": "swap", "title": "objects", "reason": "hung"}] if "swap" in only else []
        return {"rows": [row], "not_used": [], "failed": failed}

    monkeypatch.setattr(robustness, "robustness_card", robustness_card)
    assert main(["robustness", trained.name, "--num-episodes", "7", "--task-ids", "3"]) == 0
    assert "nothing changed    1 of 2              50.0" in capsys.readouterr().out
    assert main(["robustness", trained.name, "--only", "swap", "noise", "shift"]) == 3
    assert "could not be played: objects: hung" in capsys.readouterr().out
    (run, config, *given), (*_, only) = asked
    assert run == trained.name and given == ["best", (3,), ()]
    assert (config.num_episodes, config.horizon, config.num_videos) == (7, 24, 0)  # the run's own
    assert only == ("swap", "noise", "shift")


@pytest.mark.parametrize("argv", [
    ["depth", "--bound-episodes", "2"], ["depth", "--perturbation", "noise"],
    ["depth", "--num-videos", "1"], ["robustness", "--bound-episodes", "2"]])
def test_a_setting_that_a_card_does_not_use_is_refused(trained, argv, capsys):
    command, *settings = argv
    assert main([command, trained.name, *settings]) == 1
    assert f"{' '.join(settings)} has no effect on {command}" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "message"), [
    (["evaluate", ""], "RUN is empty"), (["report", ""], "RUN is empty"),
    (["validate", "file", "--task-id", "9"], "--task-id 9 needs a suite"),
    (["validate", "file", "--replays", "5"], "--replays 5 needs a suite"),
    (["validate", "none_demo.hdf5"], "none_demo.hdf5 does not exist"),
    (["validate", "none_demo.hdf5", "--suite", "libero_goal"], "none_demo.hdf5 does not exist"),
    (["validate", "/dev/null"], "is not a regular file")])
def test_what_is_missing_is_said(trained, argv, message, capsys):
    assert main(argv) == (3 if argv[1] == "/dev/null" else 1)
    printed = capsys.readouterr()
    assert message in printed.err + printed.out


@pytest.mark.parametrize("variable", ["TRM_ARTIFACTS_DIR", "TRM_DATA_DIR"])
def test_a_folder_that_cannot_be_written_names_its_variable(variable, monkeypatch, capsys):
    monkeypatch.setenv(variable, "/dev/null")
    assert main(["train", "tiny", "--run-name", "run"]) == 1
    assert "is not writable (Not a directory); choose another folder with TRM_" in (
        capsys.readouterr().err)


def test_a_bad_verdict_sets_the_exit_code(tmp_path, capsys):
    file = write_demo_file(tmp_path / "soup_demo.hdf5", (6, 7), image_size=36)
    assert main(["validate", str(file), "--json"]) == 3  # its frames are not 128 pixels wide
    card = json.loads(capsys.readouterr().out)
    assert {row["verdict"] for row in card} >= {"bad"}


def test_search_prints_the_trials_in_order(monkeypatch, capsys):
    def run_search(config, run):
        found = {"state": "complete", "final_val_loss": 0.25, "seeds": [0]}
        rows = [{"trial": "a", "lr": config.search.search_lrs[0], "run": run.name, **found,
                 "successes": 1, "episodes": 2},
                {"trial": "b", **found},
                {"trial": "c", **found, "state": "stopped", "epochs": 3},
                {"trial": "d", "state": "failed", "error": "no GPU\nat line 3"}]
        return rows[:config.search.max_configs]

    monkeypatch.setattr(collect, "ensure_demonstrations", lambda *_: {0: "file"})
    monkeypatch.setattr(search, "run_search", run_search)
    usual = ["search", "tiny", "--run-name", "s", "--search-lrs", "0.5", "--max-configs"]
    assert main([*usual, "1", "--json"]) == 0
    (trial,) = json.loads(capsys.readouterr().out)
    assert (trial["lr"], trial["run"]) == (0.5, "s")
    assert main([*usual, "4"]) == 3  # one failed
    assert capsys.readouterr().out.splitlines() == [
        "1. a: 1 of 2 episodes, validation loss 0.25", "2. b: validation loss 0.25",
        "3. c: validation loss 0.25, stopped after 3 epochs", "4. d: failed: no GPU",
        "a has a validation loss of 0.25, b has a validation loss of 0.25, with one training run "
        "each: no difference can be claimed, because another seed changes a loss too.",
        f"results  {paths.artifacts_dir() / 's' / 'search'}"]
    with pytest.raises(SystemExit, match="2"):
        main(["search", "tiny", "--run-name", "s", "--search-shard", "5/4"])


def test_run_reads_values_as_python(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(notebooks, "run_suite", lambda **given: ran.append(given) or tmp_path)
    monkeypatch.setattr(notebooks, "run_notebook", lambda *given: ran.append(given) or tmp_path)
    assert main(["run", "demo", "--run-name", "r", "-p", "lr", "1e-3", "-p", "seed", "4"]) == 0
    assert main(["run", "06_eval", "-p", "run_name", "r", "-p", "task_ids", "[0, 1]"]) == 0
    assert ran == [{"preset": "demo", "run_name": "r", "lr": 0.001, "seed": 4},
                   ("06_eval", {"run_name": "r", "task_ids": [0, 1]})]


@pytest.mark.parametrize("twice", [["demo", "-p", "preset", "tiny"],
                                   ["demo", "--run-name", "r", "-p", "run_name", "s"],
                                   ["06_eval", "--run-name", "r", "-p", "run_name", "s"],
                                   ["04_train", "-p", "lr", "1", "-p", "lr", "2"]])
def test_run_refuses_two_values_of_a_parameter(twice, capsys):
    assert main(["run", *twice]) == 1
    assert "contradicts" in capsys.readouterr().err


def test_an_unknown_notebook_parameter_is_refused(capsys):
    assert main(["run", "06_eval", "-p", "rate", "1e-3"]) == 1
    assert "error: unknown parameter 'rate'" in capsys.readouterr().err


def test_preflight_reports_by_its_exit_code(monkeypatch, capsys):
    for status, code in (("ok", 0), ("fail", 3)):
        monkeypatch.setattr(preflight, "preflight", lambda quick, status=status: [
            Check("mujoco", status, "3.3.2")])
        assert main(["preflight", "--quick"]) == code
        assert capsys.readouterr().out.splitlines() == [
            f"{status:4}  mujoco  3.3.2", f"{int(not code)} of 1 checks passed"]


def test_a_lack_of_memory_is_a_message(monkeypatch, capsys):
    def too_much(*_):
        raise MemoryError("the frames need 9 MiB")

    monkeypatch.setattr("trm_helpers.report.write_report", too_much)
    assert main(["report", "run"]) == 1
    assert capsys.readouterr().err == "error: the frames need 9 MiB\n"


def test_an_interrupted_command_says_how_to_resume(monkeypatch, capsys):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "run_suite", interrupt)
    assert main(["run", "demo"]) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_it_starts_as_a_module():
    done = subprocess.run([sys.executable, "-m", "trm_helpers", "--help"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "evaluate" in done.stdout


def test_a_reader_that_stops_reading_is_no_error():
    done = subprocess.run(["bash", "-c", "set -o pipefail; "
                           f"{shlex.quote(sys.executable)} -m trm_helpers train -h | head -n 0"],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_from_elsewhere_chooses_no_cluster_and_no_workers(trained):
    """A cluster's scheduler could run code here: it comes from the caller alone."""
    file = trained / "config.json"
    settings = json.loads(file.read_text())
    settings["eval"] |= {"cluster": "tcp://theirs:8786", "eval_workers": 64, "horizon": 17}
    file.write_text(json.dumps(settings))
    for command in ("evaluate", "robustness", "depth"):
        given = parse([command, "small"]).eval
        assert (given.cluster, given.eval_workers) == ("", 1)
        assert given.horizon == 17  # the run's own
        assert parse([command, "small", "--cluster", "tcp://mine:1"]).eval.cluster == "tcp://mine:1"


def test_a_stop_that_is_no_time_is_refused_before_the_work(monkeypatch, capsys):
    monkeypatch.setenv("TRM_STOP_AT", "abc")
    assert main(["train", "tiny", "--run-name", "x"]) == 1
    assert "TRM_STOP_AT='abc' is not valid" in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_as_good_as_none(monkeypatch, stream):
    monkeypatch.setattr(sys, stream, None)
    assert main(["report", "nobody"]) == 1


def test_a_log_has_few_lines_of_a_progress_bar():
    code = """
import contextlib, time
from trm_helpers.__main__ import main
with contextlib.suppress(SystemExit):
    main(["--help"])
from tqdm.auto import tqdm
for _ in tqdm(range(200)):
    time.sleep(0.005)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "200/200" in done.stderr and done.stderr.count("\r") <= 3


def test_help_of_a_command_that_needs_a_run_imports_no_torch():
    code = """
import sys
from trm_helpers.__main__ import main
try:
    main(["evaluate", "--help"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--num-episodes" in done.stdout, done.stderr
