"""What a notebook's first call finds in a Kaggle session; the folders stand in a test's own."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import types

import psutil
import pytest
from demo_files import write_demo_file

from trm_helpers import __version__, opengl, paths, session, software
from trm_helpers.config import from_flat
from trm_helpers.demos.collect import ensure_demonstrations
from trm_helpers.training.runs import find_run

SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """An emulated /kaggle, without a network, in a session of one hour."""
    for name in ("input", "working", "temporary"):
        (tmp_path / "kaggle" / name).mkdir(parents=True)
        monkeypatch.setattr(paths, f"KAGGLE_{name.upper()}", tmp_path / "kaggle" / name)
    for name in ("TRM_DATA_DIR", "TRM_ARTIFACTS_DIR", "WANDB_API_KEY", "WANDB_MODE", "HF_HOME",
                 "HF_HUB_OFFLINE", software.STOP_AT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what a session sets ends with the test
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")

    def no_network(url):
        raise ConnectionError(f"{url} cannot be reached")

    monkeypatch.setattr(session, "connect", no_network)
    monkeypatch.setattr(session, "_set_offline", [])
    monkeypatch.setattr(opengl, "ensure_gl", lambda: {"renderer": "Tesla T4", "ms": 1.5})
    began = time.time() - 3600
    monkeypatch.setattr(psutil, "Process",
                        lambda pid: types.SimpleNamespace(create_time=lambda: began))
    return tmp_path / "kaggle"


PARAMETERS = "lr = None  # type: float; learning rate\nrun_name = ''  # type: str; folder"


@pytest.mark.parametrize(("cells", "refused"), [
    ([PARAMETERS, "# Parameters\nlrr = 1e-3\n"], "no parameter 'lrr'; did you mean 'lr'"),
    ([PARAMETERS, "# Parameters\nlearning_rate = 1e-3\n"], "did you mean 'lr'"),
    ([PARAMETERS, '# Parameters\nlr = 1e-3\nrun_name = "x"\n'], None),
    (["!ls", "# Parameters\nlrr = 1e-3\n"], None),  # no cell of parameters
    ([PARAMETERS, "lrr = 1e-3"], None),
    ([PARAMETERS, "# Parameters\nlrr = 1\n", "x = 1", "# Parameters\nlr = 1\n"], None),  # mended
    ([PARAMETERS, "# Parameters\nlr = \n"], None),
    ([PARAMETERS, '# Parameters\nPAPERMILL_INPUT_PATH = "a.ipynb"\n'], None)])
def test_a_parameter_that_a_notebook_does_not_have_ends_it(monkeypatch, cells, refused):
    monkeypatch.setattr(sys.modules["__main__"], "In", ["", *cells], raising=False)
    with pytest.raises(ValueError, match=refused) if refused else contextlib.nullcontext():
        session.begin()


SETTINGS = json.dumps(from_flat("tiny").to_dict())


def run_folder(folder, epochs):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(SETTINGS)
    (folder / "policy.json").write_text(json.dumps(
        {"model": {}, "normalizer": {}, "proprio_stats": {}, "trained_on": {"files": []}}))
    (folder / "metrics.jsonl").write_text('{"loss": 1}\n' * epochs)
    return folder


def search_folder(run, trials):
    for number in range(trials):
        (run_folder(run / "search" / f"lr{number}", 1) / "trial.json").write_text("{}")
    (run / "search" / "search.json").write_text(SETTINGS)


def read_only(folder):
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)


def lines(capsys):
    """What was printed, by the step; lines of one step are joined."""
    said = {}
    for line in capsys.readouterr().out.splitlines():
        step, text = line.split(": ", 1)
        said[step] = "\n".join(filter(None, [said.get(step), text.strip()]))
    return said


def test_elsewhere_only_the_folders_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(paths, "on_kaggle", lambda: False)
    session.begin()
    said = lines(capsys)
    assert list(said) == ["package", "demonstrations", "runs"]
    assert said["demonstrations"].strip() == str(tmp_path / "data")


def test_a_notebook_of_another_version_is_refused(kaggle):
    with pytest.raises(RuntimeError, match=f"version 9.9.9, .* is version {__version__}; attach"):
        session.begin("9.9.9")


def test_a_session_without_anything_says_what_to_click(kaggle, capsys):
    session.begin(__version__)
    said = lines(capsys)
    assert "Settings > Internet" in said["network"] and "Accelerator" in said["GPU"]
    assert said["attached runs"] == "none"
    assert said["attached demos"] == "0 scripted and 0 human file(s)"
    assert os.environ["WANDB_MODE"] == "offline" and os.environ["HF_HUB_OFFLINE"] == "1"
    assert said["renderer"].strip().startswith("Tesla T4")
    assert paths.data_dir() == kaggle / "temporary" / "data"
    assert paths.artifacts_dir() == kaggle / "working" / "artifacts"


def test_both_gpus_are_named(kaggle, capsys, monkeypatch, tmp_path):
    client = tmp_path / "bin" / "nvidia-smi"
    client.parent.mkdir()
    client.write_text("#!/bin/sh\necho Tesla T4\necho Tesla T4\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    session.begin()
    assert lines(capsys)["GPU"] == "Tesla T4, Tesla T4"


def test_a_machine_without_opengl_can_still_train(kaggle, capsys, monkeypatch):
    def fail():
        raise RuntimeError("no libEGL")

    monkeypatch.setattr(opengl, "ensure_gl", fail)
    session.begin()
    assert "none (no libEGL); training works" in lines(capsys)["renderer"]


def test_training_stops_before_the_session_ends(kaggle):
    session.begin()
    assert software.minutes_left() == pytest.approx(60 * 11 - 20, abs=0.5)


def test_a_time_that_is_set_already_stays(kaggle, monkeypatch):
    monkeypatch.setenv(software.STOP_AT, str(time.time() + 600))
    session.begin()
    assert software.minutes_left() == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("given", ["noon", "nan", "inf", "-inf"])
def test_a_time_that_is_none_is_named(monkeypatch, given):
    monkeypatch.setenv(software.STOP_AT, given)
    with pytest.raises(ValueError, match=f"TRM_STOP_AT='{given}' is not valid; expected seconds"):
        software.minutes_left()


def test_a_blank_time_is_none_and_a_past_one_is_said(kaggle, capsys, monkeypatch):
    monkeypatch.setenv(software.STOP_AT, " ")
    assert software.minutes_left() == float("inf")
    monkeypatch.setenv(software.STOP_AT, "5")
    session.begin()
    assert lines(capsys)["time"].startswith("the time to stop has passed")


@pytest.mark.parametrize("layout", ["somebody-output", "notebooks/somebody/output"])
def test_the_run_that_was_trained_longest_is_taken_over(kaggle, layout, capsys):
    attached = kaggle / "input" / layout
    search_folder(run_folder(attached / "artifacts" / "demo", 5), 1)
    run_folder(kaggle / "input" / "older" / "artifacts" / "demo", 3)
    run_folder(kaggle / "input" / "older" / "trm" / "pretrained" / "code", 9)
    (kaggle / "input" / "older" / "trm" / "trm_helpers").mkdir()  # a copy of the code
    read_only(kaggle / "input")
    session.begin()
    home = kaggle / "working" / "artifacts" / "demo"
    assert len((home / "metrics.jsonl").read_text().splitlines()) == 5
    assert (home / "search" / "lr0" / "trial.json").exists()
    assert [path.name for path in home.parent.iterdir()] == ["demo"]
    said = lines(capsys)["attached runs"]
    assert f"demo, 5 epochs, 0 episodes, from {attached}" in said
    assert f"demo/search, 1 trial, from {attached}" in said
    assert said.endswith("other settings need another run_name")
    (home / "metrics.jsonl").write_text("")  # this user's modes, and it stays as it is
    session.begin()
    assert "stays as it is" in lines(capsys)["attached runs"]
    assert (home / "metrics.jsonl").read_text() == ""


def test_a_search_resumes_though_its_run_is_another_output_or_none(kaggle, capsys):
    """05 leaves trials and no run; a trial is not taken for one."""
    for name, trials in (("a", 1), ("b", 3), ("c", 5)):
        search_folder(kaggle / "input" / name / "artifacts" / "demo", trials)
    (kaggle / "input" / "c" / "artifacts" / "demo" / "search" / "search.json").write_text("{")
    read_only(kaggle / "input")
    session.begin()
    home = kaggle / "working" / "artifacts"
    assert [path.name for path in home.iterdir()] == ["demo"]
    assert [path.name for path in (home / "demo").iterdir()] == ["search"]
    assert len(list(home.glob("demo/search/*/trial.json"))) == 3
    said = lines(capsys)["attached runs"]
    assert said.startswith("demo/search, 3 trials, from ") and "search.json is damaged" in said
    shutil.rmtree(home / "demo")
    run_folder(kaggle / "input" / "d" / "artifacts" / "demo", 2)
    session.begin()
    assert {path.name for path in (home / "demo").iterdir()} >= {"search", "config.json"}


def test_of_runs_trained_equally_long_the_evaluated_one_is_taken_over(kaggle, capsys):
    run_folder(kaggle / "input" / "04" / "artifacts" / "demo", 2)
    evaluated = run_folder(kaggle / "input" / "06" / "artifacts" / "demo", 2)
    (evaluated / "episodes.jsonl").write_text('{"success": true}\n' * 3)
    session.begin()
    assert "demo, 2 epochs, 3 episodes, from" in lines(capsys)["attached runs"]
    assert (kaggle / "working" / "artifacts" / "demo" / "episodes.jsonl").exists()


def test_a_data_set_may_have_any_name(kaggle, capsys):
    run_folder(kaggle / "input" / "pretrained" / "demo", 1)
    run_folder(kaggle / "input" / "tests" / "other", 1)
    session.begin()
    assert {path.name for path in (kaggle / "working" / "artifacts").iterdir()} == {"demo", "other"}


def test_the_evaluation_of_a_shipped_policy_goes_on(kaggle, capsys):
    run = run_folder(kaggle / "input" / "06" / "artifacts" / "pretrained" / "spatial-trm", 1)
    (run / "episodes.jsonl").write_text('{"success": true}\n')
    session.begin()
    assert "pretrained/spatial-trm, 1 epoch, 1 episode, from" in lines(capsys)["attached runs"]
    home = kaggle / "working" / "artifacts" / "pretrained" / "spatial-trm"
    assert (home / "episodes.jsonl").exists()


def test_a_trial_of_a_search_takes_over_no_run(kaggle, capsys, monkeypatch):
    run_folder(kaggle / "input" / "04" / "artifacts" / "demo", 1)
    (trials := kaggle / "working" / "artifacts" / "demo" / "search").mkdir(parents=True)
    (trials / "search.json").write_text("{}")
    monkeypatch.setenv("TRM_ARTIFACTS_DIR", str(trials))
    session.begin()
    assert lines(capsys)["attached runs"] == "not for a trial of a search"
    assert [path.name for path in trials.iterdir()] == ["search.json"]


def test_links_in_a_circle_end_and_hidden_folders_are_not_entered(kaggle, capsys):
    run_folder(kaggle / "input" / "a" / "demo", 1)
    run_folder(kaggle / "input" / ".hidden" / "other", 1)
    (kaggle / "input" / "a" / "again").symlink_to(kaggle / "input")
    session.begin()
    assert [path.name for path in (kaggle / "working" / "artifacts").iterdir()] == ["demo"]


def test_a_damaged_run_and_a_damaged_file_cost_nothing_else(kaggle, capsys):
    run = run_folder(kaggle / "input" / "a" / "bad", 1)
    (run / "config.json").write_text("{")
    run_folder(kaggle / "input" / "a" / "good", 2)
    (kaggle / "input" / "x_demo.hdf5").write_bytes(b"no HDF5")
    session.begin()
    out = capsys.readouterr().out
    assert "bad was not taken over" in out and "good, 2 epochs, 0 episodes" in out
    assert "x_demo.hdf5: truncated, or not an HDF5 file" in out
    assert [path.name for path in (kaggle / "working" / "artifacts").iterdir()] == ["good"]


def test_attached_scripted_demonstrations_are_used_and_not_collected_again(
        kaggle, capsys, monkeypatch):
    config = from_flat("tiny", suite="libero_object", task_ids=[0], demos="scripted")
    made = {"by": "scripted expert", "suite": "libero_object", "task_id": 0,
            "seed": 0, "disturb": True, "placement": config.data.placement,
            "frame_stride": config.data.frame_stride, "observations": "what env.step returned",
            **session.schema.PINNED}
    attached = write_demo_file(kaggle / "input" / "set" / f"{SOUP}_demo.hdf5",
                               (6, 7, 8, 9, 10), collection=made)
    human = write_demo_file(kaggle / "input" / "human" / "y_demo.hdf5", (6, 7))
    read_only(kaggle / "input")
    session.begin()
    assert lines(capsys)["attached demos"] == "1 scripted and 1 human file(s)"
    files = ensure_demonstrations(config)
    assert files[0].resolve() == attached and files[0].is_relative_to(kaggle / "temporary")
    link = files[0].lstat().st_ino
    session.begin()  # of another notebook, while this one reads the file
    assert files[0].lstat().st_ino == link
    capsys.readouterr()
    session.keep([*files.values(), human])
    assert not (kaggle / "working" / "data").exists()  # both are attached


def test_attached_demonstrations_with_an_actor_are_not_taken_for_plain_ones(kaggle, capsys):
    made = {"suite": "libero_object", "placement": "benchmark", "actor": "a-run", "beta": 0.25,
            "frame_stride": 4}
    attached = write_demo_file(kaggle / "input" / f"{SOUP}_demo.hdf5", collection=made)
    read_only(kaggle / "input")
    session.begin()
    (linked,) = paths.data_dir().rglob("*_demo.hdf5")
    assert linked.resolve() == attached
    assert linked.parent == paths.data_dir() / "dagger-a-run-beta0.25-stride4" / "libero_object"


def test_an_actors_demonstrations_of_the_joint_suite_are_kept(kaggle, monkeypatch):
    def collected(config, actor):
        made = "dagger-a-run-beta0.5-stride4/libero_40"
        return {10: write_demo_file(paths.data_dir() / made / "z_demo.hdf5", (6,))}

    session.begin()
    monkeypatch.setattr(session, "ensure_demonstrations", collected)
    session.demonstrations(from_flat("demo", suite="libero_40", task_ids=[10], actor="a-run",
                                     conditioning="language"))
    assert [path.parent.name for path in (kaggle / "working").rglob("*.hdf5")] == ["libero_40"]


def test_collected_demonstrations_become_part_of_the_output(kaggle, capsys):
    session.begin()
    made = write_demo_file(paths.data_dir() / "scripted" / "libero_object" / "z_demo.hdf5", (6,))
    session.keep([made])
    kept = kaggle / "working" / "data" / "scripted" / "libero_object" / "z_demo.hdf5"
    assert kept.read_bytes() == made.read_bytes()


def test_demonstrations_collected_before_the_time_was_up_are_kept(kaggle, monkeypatch):
    """Of every suite that the joint one has tasks in."""
    def collected(config, actor):
        for folder in ("scripted-stride4/libero_object", "scripted-stride4/libero_goal"):
            write_demo_file(paths.data_dir() / folder / "z_demo.hdf5", (6,))
        raise TimeoutError("the time is up")

    session.begin()
    monkeypatch.setattr(session, "ensure_demonstrations", collected)
    with pytest.raises(TimeoutError, match="the time is up"):
        session.demonstrations(from_flat("demo", suite="libero_40", task_ids=[10, 20],
                                         conditioning="language"))
    assert sorted(path.parent.name for path in (kaggle / "working").rglob("*.hdf5")) == [
        "libero_goal", "libero_object"]


ANSWERS = {
    "a key": lambda: " a-key\n", "blank": lambda: "  \n", "none": lambda: None,
    "not attached": lambda: {}["WANDB_API_KEY"], "exits": lambda: sys.exit("no secrets"),
    "hangs": lambda: time.sleep(3),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("where", ["client", "secret"])
def test_the_tracking_key_comes_from_the_attached_secrets(kaggle, capsys, monkeypatch, answer,
                                                          where):
    class UserSecretsClient:
        def __init__(self):
            if where == "client" and answer not in ("a key", "blank", "none"):
                ANSWERS[answer]()

        def get_secret(self, name):
            assert name == "WANDB_API_KEY"
            return ANSWERS[answer]()

    monkeypatch.setitem(sys.modules, "kaggle_secrets",
                        types.SimpleNamespace(UserSecretsClient=UserSecretsClient))
    monkeypatch.setattr(session, "_ANSWER_WITHIN", 0.2)
    began = time.perf_counter()
    session.begin()
    assert time.perf_counter() - began < 2
    said, key = lines(capsys)["W&B"], os.environ.get("WANDB_API_KEY")
    if answer == "a key":
        assert key == "a-key" and "wandb_mode='online' uses it" in said
    else:
        assert key is None and said.startswith("no key")


def test_one_wandb_run_in_two_sessions_is_said(kaggle, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    session.begin()
    said = lines(capsys)["W&B"]
    assert "WANDB_RUN_ID=abc: sessions with the same one overwrite" in said and "delete" in said


def test_a_session_without_a_run_says_what_to_attach(kaggle):
    with pytest.raises(FileNotFoundError, match="04_train trains one.*; Add Input > .* output$"):
        find_run("demo")


def test_a_process_ends_though_a_call_never_answers():
    code = ("import time\nfrom trm_helpers.software import call_within\n"
            "try: call_within(0.1, lambda: time.sleep(60))\nexcept TimeoutError: print('late')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "late\n"


def test_a_full_working_disk_is_said(kaggle, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(
        free=1e8, total=2e10))
    session.begin()
    assert "0.1 of 20.0 GB free; delete files" in lines(capsys)["working disk"]


def test_a_step_that_fails_costs_no_other(kaggle, capsys, monkeypatch):
    def denied(pid):
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", denied)
    (kaggle / "working").rmdir()
    (kaggle / "temporary").rmdir()
    (kaggle / "temporary").write_text("a file")
    write_demo_file(kaggle / "input" / f"{SOUP}_demo.hdf5", (6,), collection={
        "suite": "libero_object"})
    run_folder(kaggle / "input" / "demo", 2)
    session.begin()
    said = lines(capsys)
    assert said["time"].startswith("failed: AccessDenied")
    assert said["working disk"].startswith("failed: FileNotFoundError")
    assert said["attached demos"].startswith("failed: ")
    assert said["attached runs"].startswith("demo, 2 epochs") and "Tesla" in said["renderer"]


def test_the_network_may_come_back(kaggle, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the user's own
    session.begin()
    assert os.environ["WANDB_MODE"] == "offline"
    monkeypatch.setattr(session, "connect", lambda url: None)
    session.begin()
    assert "WANDB_MODE" not in os.environ and os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_next_copy_of_a_damaged_run_is_taken_over(kaggle, capsys):
    (run_folder(kaggle / "input" / "a" / "demo", 5) / "config.json").write_text('{"data": 1}')
    (run_folder(kaggle / "input" / "b" / "demo", 4) / "policy.json").write_text("{")
    run_folder(kaggle / "input" / "c" / "demo", 3)
    session.begin()
    said = lines(capsys)["attached runs"]
    assert said.startswith("demo, 3 epochs") and "b/demo/policy.json is damaged" in said


def test_a_run_whose_settings_lie_elsewhere_is_not_taken_over(kaggle, capsys, tmp_path):
    """Nor what a link beside it leads to, as the hub's cache has them."""
    run = run_folder(kaggle / "input" / "snapshots" / "demo", 5)
    (run / "config.json").rename(tmp_path / "config.json")
    (run / "config.json").symlink_to(tmp_path / "config.json")
    other = run_folder(kaggle / "input" / "snapshots" / "other", 1)
    (kaggle / "input" / "blobs").symlink_to(tmp_path)
    (other / "note.txt").symlink_to(tmp_path / "config.json")
    session.begin()
    assert "is a link to a file outside the run" in lines(capsys)["attached runs"]
    home = kaggle / "working" / "artifacts"
    assert [path.name for path in home.iterdir()] == ["other"]
    assert not (home / "other" / "note.txt").exists()


def test_of_attached_scripted_files_the_largest_is_used(kaggle, capsys):
    made = {"suite": "libero_object"}
    for name, lengths in (("a", (6, 7)), ("b", (6, 7, 8)), ("c", (6,))):
        write_demo_file(kaggle / "input" / name / f"{SOUP}_demo.hdf5", lengths, collection=made)
    write_demo_file(kaggle / "input" / "d" / "odd_demo.hdf5", (6,), collection={"suite": ["x"]})
    for beta in ("x", [0.5]):
        write_demo_file(kaggle / "input" / f"beta {beta}" / "odd_demo.hdf5", (6,),
                        collection={**made, "beta": beta})
    session.begin()
    said = lines(capsys)["attached demos"]
    assert said.startswith("1 scripted and 0 human file(s)\n") and said.count("left out") == 5
    home = paths.data_dir() / "scripted" / "libero_object" / f"{SOUP}_demo.hdf5"
    assert home.resolve() == kaggle / "input" / "b" / home.name


def test_what_is_outside_the_data_folder_is_not_kept(kaggle, tmp_path):
    session.begin()
    outside = write_demo_file(tmp_path / "x_demo.hdf5", (6,))
    session.keep([outside, str(paths.data_dir() / ".." / ".." / ".." / outside.name)])
    assert not (kaggle / "working" / "data").exists()
    made = write_demo_file(paths.data_dir() / "y_demo.hdf5", (6,), seed=0)
    session.keep([str(made)])
    write_demo_file(made, (6,), seed=1)  # the same size
    session.keep([str(made)])
    assert (kaggle / "working" / "data" / "y_demo.hdf5").read_bytes() == made.read_bytes()
