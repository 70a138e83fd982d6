import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trm_helpers import files, paths
from trm_helpers.config import from_flat, local_settings, settings_by_part
from trm_helpers.demos.collect import demonstrations_of
from trm_helpers.files import append_jsonl, exclusive_lock
from trm_helpers.policy import model
from trm_helpers.training import runs
from trm_helpers.training.runs import (
    TRAINING_LOCK,
    create_run,
    find_run,
    load_config,
    load_policy,
    load_training_state,
    save_training_state,
    save_weights,
    shipped_policies,
)


@pytest.fixture(autouse=True)
def no_probe(monkeypatch):
    """Versions without starting a renderer."""
    monkeypatch.setattr(runs, "software_versions", lambda: {"mujoco": "3.3.2"})


def observation(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "agentview_rgb": generator.integers(0, 256, (36, 36, 3), dtype=np.uint8),
        "joint_states": generator.normal(size=7), "gripper_states": np.array([0.04, -0.04]),
        "ee_pos": generator.normal(size=3),
    }


def test_a_run_folder_is_created_once_and_resumed_on_request():
    config = from_flat("tiny")
    run = create_run(config, "a-run")
    assert run == paths.artifacts_dir() / "a-run" and load_config(run) == config
    assert json.loads((run / "config.json").read_text())["software"] == {"mujoco": "3.3.2"}
    append_jsonl(run / "metrics.jsonl", {"epoch": 1})
    with pytest.raises(FileExistsError, match="a-run exists already"):
        create_run(config, "a-run")
    assert create_run(config, "a-run", resume=True) == run


def test_a_resumed_run_takes_over_the_settings_of_evaluation_and_search(monkeypatch):
    run = create_run(from_flat("tiny"), "a-run")
    append_jsonl(run / "metrics.jsonl", {"epoch": 1})
    monkeypatch.setattr(runs, "software_versions", lambda: {"mujoco": "of today"})
    now = from_flat("tiny", num_episodes=5, search_epochs=7, num_threads=3)
    create_run(now, "a-run", resume=True)
    assert load_config(run) == now.replace(num_threads=0)
    assert json.loads((run / "config.json").read_text())["software"] == {"mujoco": "3.3.2"}


def test_resuming_with_other_settings_lists_them_and_writes_nothing():
    run = create_run(from_flat("tiny"), "a-run")
    append_jsonl(run / "metrics.jsonl", {"epoch": 1})
    before = (run / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"lr: 0.001 there, 0.5 now; seed: 0 there, 3 now"):
        create_run(from_flat("tiny", lr=0.5, seed=3, num_threads=7, num_episodes=5), "a-run", True)
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["last.safetensors", "metrics.jsonl"])
def test_weights_or_metrics_alone_make_a_folder_a_trained_run(name):
    run = create_run(from_flat("tiny"), "a-run")
    (run / name).write_text('{"epoch": 1}\n')
    (run / "training_state.pt").write_bytes(b"of the first epoch")
    with pytest.raises(FileExistsError, match="a-run exists already"):
        create_run(from_flat("tiny"), "a-run")
    with pytest.raises(ValueError, match="other settings .lr: 0.001 there, 0.5 now"):
        create_run(from_flat("tiny", lr=0.5), "a-run", resume=True)
    assert (run / "training_state.pt").exists()


def test_an_empty_metrics_file_is_no_epoch():
    run = create_run(from_flat("tiny"), "a-run")
    (run / "metrics.jsonl").touch()
    other = from_flat("tiny", lr=0.5)
    assert create_run(other, "a-run") == run and load_config(run) == other


def test_default_name_of_a_run():
    run = create_run(from_flat("tiny", seed=4))
    assert run.name.startswith("libero_object-block-s4-2") and len(run.name.split("-")) == 5


def test_a_folder_without_a_complete_epoch_is_overwritten():
    run = create_run(from_flat("tiny"), "a-run")
    made = [run / name for name in ("training_state.pt", "locator.safetensors", "scenes.json")]
    for file in made:
        file.write_bytes(b"of the first epoch")
    again = from_flat("tiny", num_episodes=5)
    assert create_run(again, "a-run") == run and load_config(run) == again
    assert all(file.exists() for file in made)  # the same training resumes from them
    other = from_flat("tiny", max_demos_per_task=4)
    assert create_run(other, "a-run", resume=True) == run and load_config(run) == other
    assert not any(file.exists() for file in made)
    with exclusive_lock(run, lock=TRAINING_LOCK), \
            pytest.raises(RuntimeError, match="another process"):
        create_run(from_flat("tiny"), "a-run")
    assert load_config(run) == other


LOCAL = dict(demo_dir="/theirs", storage="mmap", max_minutes=3.0, stop_epoch=1, device="cuda",
             num_threads=64, wandb_mode="online", eval_workers=64,
             cluster="tcp://theirs:8786", search_workers=64, search_minutes=5.0,
             search_storage="postgresql://theirs/db")


def test_local_settings_in_a_runs_file_are_ignored(trained):
    assert set(LOCAL) == local_settings()
    config = load_config(trained)
    written = json.loads((trained / "config.json").read_text())
    for name, part in settings_by_part().items():
        written[part][name] = LOCAL.get(name, written[part][name])
    (trained / "config.json").write_text(json.dumps(written))
    assert load_config(trained) == config
    assert load_config(trained).local() == from_flat("reference").local()
    assert load_config(trained, "demo").eval.eval_workers == 2  # the caller's preset
    for name, part in settings_by_part().items():  # invalid values are ignored too
        written[part].update({name: ["no", "such"]} if name in LOCAL else {})
    written["search"]["search_storage"] = "postgresql://them:secret@db/theirs"
    (trained / "config.json").write_text(json.dumps(written))
    assert load_config(trained) == config
    mine = from_flat("tiny", **{**config.changes(), "num_threads": 3})
    assert create_run(mine, "small", resume=True) == trained  # refused for none of these


def test_a_missing_run_lists_the_existing_runs(trained):
    assert find_run() == find_run("small") == find_run(str(trained)) == trained
    with pytest.raises(FileNotFoundError, match="no trained run 'other'.*there are: small"):
        load_policy("other")
    with pytest.raises(FileNotFoundError, match="expected a run folder"):
        load_config(trained / "figures")


def test_what_a_run_lacks_is_said(trained):
    (trained / "last.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"small holds no last.safetensors; .*\(best.safet"):
        load_policy("small", "last")
    (trained / "policy.json").unlink()
    with pytest.raises(FileNotFoundError, match="small/policy.json does not exist; expected the d"):
        find_run("small")
    with pytest.raises(ValueError, match="run='a{255}' is not valid; expected .*at most 255 bytes"):
        find_run("a" * 5000)


def test_a_run_without_the_weights_is_not_copied(shipped):
    (shipped / "last.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="bowl holds no last.safetensors"):
        find_run(str(shipped), to_write=True, weights="last")
    assert not (paths.artifacts_dir() / "pretrained").exists()
    assert find_run(str(shipped), to_write=True, weights="best") != shipped


@pytest.fixture
def shipped(trained, tmp_path, monkeypatch):
    """``pretrained/bowl`` of a checkout; the caller works in that checkout."""
    folder = tmp_path / "repo" / "pretrained" / "bowl"
    shutil.copytree(trained, folder)
    monkeypatch.setattr(paths, "repo_root", lambda: tmp_path / "repo")
    monkeypatch.chdir(tmp_path / "repo")
    return folder


@pytest.mark.parametrize("name", ["pretrained/bowl", "pretrained/bowl/", "./pretrained/bowl",
                                  "{}", "{}/"])
def test_a_run_elsewhere_is_read_there_and_written_to_a_copy(shipped, trained, name):
    name = name.format(shipped)
    assert find_run() == trained  # the newest own run
    assert find_run(name) == shipped and load_policy(name).config
    copy = find_run(name, to_write=True)
    assert copy == paths.artifacts_dir() / "pretrained" / "bowl"
    (copy / "policy.json").touch()
    (copy / "episodes.jsonl").write_text("")
    assert find_run(name) == find_run(name, to_write=True) == copy
    assert (copy / "episodes.jsonl").exists() and not (shipped / "episodes.jsonl").exists()
    with pytest.raises(FileNotFoundError, match="there are: small; shipped: pretrained/bowl"):
        load_policy("pretrained/cup")


def test_a_copy_of_a_shipped_policys_former_weights_is_not_used(shipped):
    copy = find_run("pretrained/bowl", to_write=True)
    save_weights(shipped, {"of": torch.ones(1)}, "best")  # as after an update of the checkout
    assert find_run("pretrained/bowl") == find_run(shipped) == shipped
    with pytest.raises(FileExistsError, match=f"{copy} belongs to another run than {shipped}"):
        find_run("pretrained/bowl/", to_write=True)


def test_a_read_only_run_with_links_becomes_a_writable_copy(trained, tmp_path, capsys):
    attached, secret = tmp_path / "input" / "theirs", tmp_path / "secret"
    secret.write_text("not theirs")
    shutil.copytree(trained, attached)
    (attached / "videos").mkdir(exist_ok=True)
    (attached / "videos" / "a.mp4").symlink_to(secret)
    (attached / "notes.md").symlink_to(secret)
    (attached / ".lock").touch()
    os.utime(attached / "best.safetensors", (1e9, 1e9))
    for path in [*attached.rglob("*"), attached]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    copy = find_run(attached, to_write=True)
    assert copy == paths.artifacts_dir() / "theirs"
    assert find_run() == trained  # which was trained after the other, if copied before it
    assert copy.stat().st_mode & 0o200 and (copy / "config.json").stat().st_mode & 0o200
    assert not (copy / "videos" / "a.mp4").exists() and not (copy / ".lock").exists()
    assert not (copy / "notes.md").exists()
    assert "not copied from" in (said := capsys.readouterr().out) and "notes.md, videos/a" in said
    assert load_config(copy) == load_config(attached)
    (attached / "policy.json").chmod(0o644)
    (attached / "policy.json").write_text((trained / "policy.json").read_text() + " ")
    assert find_run(attached) == attached  # now another run
    with pytest.raises(FileExistsError, match="theirs belongs to another run than .*input"):
        find_run(attached, to_write=True)


def test_a_run_that_another_process_copies_is_awaited(trained, tmp_path):
    attached = Path(shutil.copytree(trained, tmp_path / "input" / "theirs"))
    code = f"""
import shutil, time
from trm_helpers.training import runs
copy = shutil.copyfile
shutil.copyfile = lambda *paths: (print("copies", flush=True), time.sleep(0.2), copy(*paths))
print(runs.find_run({str(attached)!r}, to_write=True), flush=True)
"""
    copy = str(paths.artifacts_dir() / "theirs")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "copies\n"
        assert str(find_run(attached, to_write=True)) == copy
        assert other.stdout.read().split()[-1] == copy


def test_a_run_in_the_hubs_cache_is_copied_through_its_links(trained, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc" / "bowl"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for number, path in enumerate(path for path in trained.iterdir() if path.is_file()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../../blobs") / str(number))
    copy = find_run(snapshot, to_write=True)
    assert copy == paths.artifacts_dir() / "bowl" and not (copy / "policy.json").is_symlink()
    assert load_policy(copy).sha256 == load_policy(trained).sha256


@pytest.mark.parametrize("name", ["expert-libero_spatial", "notebooks", ".hidden", "a b"])
def test_a_run_elsewhere_with_an_invalid_name_is_not_copied(trained, tmp_path, name):
    shutil.copytree(trained, tmp_path / "input" / name)
    assert find_run(tmp_path / "input" / name) == tmp_path / "input" / name  # to read
    with pytest.raises(ValueError, match=f"run_name='{name}' is not valid"):
        find_run(tmp_path / "input" / name, to_write=True)
    assert [path.name for path in paths.artifacts_dir().iterdir()] == ["small"]


@pytest.mark.parametrize("name", ["../repo", "small/../small", "/tmp/../tmp"])
def test_a_path_with_two_dots_is_refused(trained, name):
    with pytest.raises(ValueError, match="without '..'"):
        find_run(name)


def test_an_incomplete_copy_is_not_the_newest_run(trained):
    shutil.copytree(trained, trained.with_name(".copy.7.part"))
    assert find_run() == trained


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policies_load_and_act(name):
    folder = paths.shipped("pretrained").parent / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6
    assert (folder / "README.md").exists()
    assert load_config(folder).eval.bound_episodes == 0  # they need demonstrations
    assert "/" not in json.loads((folder / "policy.json").read_text())[
        "trained_on"]["files"][0]["file"]
    policy = load_policy(name)
    policy.reset()
    action = policy.act({**observation(), "eye_in_hand_rgb": observation(1)["agentview_rgb"],
                         "ee_ori": np.zeros(3), "task_id": 0,
                         "language": "pick up the black bowl from table center and place it on "
                                     "the plate"})
    assert action.shape == (7,) and np.isfinite(action).all() and np.abs(action).max() <= 1


@pytest.mark.parametrize("name", ["pretrained/spatial-trm", "pretrained/spatial-wide"])
def test_former_settings_of_a_run_are_accepted_at_their_constant_values(name, tmp_path):
    source = paths.shipped("pretrained").parent / name
    run = Path(shutil.copytree(source, tmp_path / "run"))
    described, written = (json.loads((run / file).read_text())
                          for file in ("policy.json", "config.json"))
    assert described["model"]["num_heads"] == 4 and written["train"]["grad_clip"] == 1.0
    assert load_config(run).model.hidden_dim == load_policy(run).config.hidden_dim
    described["model"]["num_heads"], written["train"]["grad_clip"] = 8, 2.0
    (run / "policy.json").write_text(json.dumps(described))
    (run / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="policy.json.*num_heads=8 is not valid; expected 4"):
        load_policy(run)
    with pytest.raises(ValueError, match="config.json.*grad_clip=2.0 is not valid; expected 1.0"):
        load_config(run)


def test_a_run_with_a_former_option_loads_and_resumes(small_run):
    small_run("older", halting="adaptive", epochs=3, max_minutes=1e-9).fit()
    run = find_run("older")
    for name in ("config.json", "policy.json"):
        text = (run / name).read_text()
        assert text.count('"halting": "adaptive"') == 1
        (run / name).write_text(text.replace('"halting": "adaptive"', '"halting": "act"'))
    assert load_config(run).model.halting == load_policy(run).config.halting == "adaptive"
    assert len(small_run("older", True, halting="adaptive", epochs=3).fit()) == 3


def test_no_name_means_the_run_that_was_trained_last(small_run):
    for age, name in ((100, "old"), (0, "new"), (50, "other")):
        run = small_run(name, epochs=1).run
        for file in ("policy.json", "best.safetensors"):
            (run / file).write_text("{}")
        os.utime(run / "best.safetensors", (1e9 - age, 1e9 - age))
    (small_run("diverged", epochs=1).run / "policy.json").write_text("{}")  # it has no weights
    assert find_run().name == "new"
    with pytest.raises(FileNotFoundError, match="there are: old, other, new; shipped: pretrained"):
        find_run("nope")


def test_weights_that_a_link_no_longer_leads_to_belong_to_no_run(trained):
    lost = trained.parent / "lost"
    lost.mkdir()
    (lost / "best.safetensors").symlink_to("nowhere")
    assert find_run() == trained


def test_a_network_other_than_the_settings_is_refused(trained):
    settings = json.loads((trained / "config.json").read_text())
    settings["model"]["num_recursions"] += 1
    (trained / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="policy.json and config.json describe different networks "
                                         r"\(num_recursions: 2 there, 3 now\)"):
        load_policy(trained)


def test_the_description_has_a_digest_too(trained):
    before = load_policy(trained).described
    described = json.loads((trained / "policy.json").read_text())
    (trained / "policy.json").write_text(json.dumps(described, indent=1))
    assert load_policy(trained).described == before
    described["normalizer"]["scale"][0] *= 2
    (trained / "policy.json").write_text(json.dumps(described))
    assert load_policy(trained).described != before


def test_a_policy_is_rebuilt_from_the_folder_alone(trained, trainer):
    rebuilt = load_policy("small", "last")
    original = trainer.policy.eval()
    assert rebuilt.config == original.config and not rebuilt.training
    for seed in range(3):
        rebuilt.reset()
        original.reset()
        assert np.array_equal(rebuilt.act(observation(seed)), original.act(observation(seed)))


def test_the_digest_is_of_the_bytes_that_were_loaded(trained, monkeypatch):
    file, load = trained / "best.safetensors", model.load
    content = file.read_bytes()

    def replaced_meanwhile(given):
        file.write_bytes(b"other weights")
        return load(given)

    monkeypatch.setattr(model, "load", replaced_meanwhile)
    assert load_policy(trained).sha256 == hashlib.sha256(content).hexdigest()[:16]


def test_weights_that_are_not_finite_are_refused(trained):
    weights = load_file(trained / "best.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_weights(trained, weights, "best")
    with pytest.raises(ValueError, match="best.safetensors is damaged: .* is not finite"):
        load_policy(trained)


def test_damaged_and_foreign_weights_are_refused(trained):
    best = trained / "best.safetensors"
    whole = best.read_bytes()
    best.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="best.safetensors is damaged"):
        load_policy(trained)
    best.write_bytes(whole)
    described = json.loads((trained / "policy.json").read_text())
    described["model"]["hidden_dim"] = 64
    (trained / "policy.json").write_text(json.dumps(described))
    # the tiny preset's proprioception is 12 numbers; hidden_dim was 16
    with pytest.raises(ValueError, match=r"(?s)does not fit .*policy.json.*size mismatch for "
                                         r"proprio_mlp.0.weight: .*\[16, 12\].* is .*\[64, 12\]"):
        load_policy(trained)
    described["model"] |= {"hidden_dim": 16, "halting": "adaptive"}
    (trained / "policy.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r'Missing key\(s\).*"halt.weight", "halt.bias"\. $'):
        load_policy(trained)
    with pytest.raises(ValueError, match="weights='newest'.*'best', 'last'"):
        load_policy(trained, "newest")
    best.unlink()
    with pytest.raises(FileNotFoundError, match="small holds no best.safetensors"):
        load_policy(trained, "best")


@pytest.mark.parametrize(("foreign", "message"), [
    (dict(cameras=["agentview_rgb", "eye_in_hand_rgb"]),
     r"Missing key\(s\).*encoders.eye_in_hand_rgb"),
    (dict(chunk=4), r"mismatch for head.output.weight: .*\[\d+, 16\].* is .*\[\d+, 16\]"),
    (dict(conditioning="task_id", num_tasks=3), r"Missing key\(s\).*task_embedding"),
    (dict(conditioning="language"), r"Missing key\(s\).*language_mlp"),
    (dict(proprioception=False), r"Unexpected key\(s\).*proprio_mlp.0.weight"),
    (dict(gripper="binary"), r"mismatch for head.gripper.weight: .*\[4, 16\].* is .*\[2, 16\]"),
    (dict(variant="trm", image_size=64), r"Missing key\(s\).*action_queries"),
])
def test_weights_of_another_configuration_are_refused(trained, foreign, message):
    described = json.loads((trained / "policy.json").read_text())
    described["model"] |= foreign
    (trained / "policy.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=f"(?s)does not fit .*in policy.json.*{message}"):
        load_policy(trained)


@pytest.mark.parametrize(("save", "name"), [
    (lambda run: save_weights(run, {"a": torch.ones(2**18)}, "best"), "best.safetensors"),
    (lambda run: save_training_state(run, {"a": torch.ones(2**18)}), "training_state.pt")])
def test_a_full_disk_is_reported_and_keeps_earlier_files(trained, monkeypatch, save, name):
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    monkeypatch.setattr(os, "replace", lambda *_: shutil.copyfile(trained / name, "/dev/full"))
    with pytest.raises(files.DiskFullError, match=f"the disk is full: {name} needs 1.0 MiB, in "
                       f"{trained}, where .* MiB are free; completed files are kept"):
        save(trained)
    assert {path: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before


def test_a_full_disk_is_reported_with_the_size_of_the_copied_run(trained, tmp_path, monkeypatch):
    attached = tmp_path / "input" / "theirs"
    shutil.copytree(trained, attached)
    size = sum(path.stat().st_size for path in attached.iterdir()) / 2**20
    monkeypatch.setattr(shutil, "copyfile", lambda *_: os.write(os.open("/dev/full", 1), b"a"))
    with pytest.raises(files.DiskFullError, match=f"theirs needs {size:.1f} MiB, in"):
        find_run(attached, to_write=True)
    assert not (paths.artifacts_dir() / "theirs").exists()


def test_file_modes_follow_the_umask(trained):
    modes = {path.name: path.stat().st_mode & 0o777 for path in trained.iterdir() if path.is_file()}
    allowed = modes.pop("metrics.jsonl")
    written = {name: mode for name, mode in modes.items() if not name.startswith(".")}
    assert {"best.safetensors", "last.safetensors", "training_state.pt", "policy.json"} \
        <= written.keys() and set(written.values()) == {allowed}


@pytest.mark.parametrize(("name", "content", "call"), [
    ("config.json", b"", load_config), ("config.json", b"[]", load_config),
    ("config.json", b"{}", load_config), ("config.json", b'{"data": ', load_config),
    ("config.json", b"\xff\xfe", load_config),
    ("config.json", b'{"data": 3, "model": {}, "train": {}}', load_config),
    ("config.json", b'{"data": [], "model": {}, "train": {}}', load_config),
    ("config.json", b'{"data": {"suite": 3}, "model": {}, "train": {}}', load_config),
    ("policy.json", b"", load_policy), ("policy.json", b"3", load_policy),
    ("policy.json", b'{"model": {}}', load_policy),
    ("policy.json", b'{"model": [], "normalizer": {}, "proprio_stats": {}, "trained_on": {}}',
     load_policy),
    ("policy.json", b'{"model": {"depth": 3}, "normalizer": {}, "proprio_stats": {}, '
                    b'"trained_on": {}}', load_policy),
    ("config.json", b"[" * 99999, load_config), ("policy.json", b"[" * 99999, load_policy),
    ("best.safetensors", b"", load_policy), ("best.safetensors", b"{}" * 100, load_policy),
])
def test_an_error_names_the_damaged_file(trained, name, content, call):
    (trained / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"small/{name}"):
        call(trained)


@pytest.mark.parametrize(("name", "call"), [
    ("config.json", load_config), ("policy.json", load_policy), ("best.safetensors", load_policy),
    ("training_state.pt", load_training_state)])
@pytest.mark.parametrize("other", [
    os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_an_error_names_a_file_that_is_not_regular(trained, name, call, other):
    (trained / name).unlink(missing_ok=True)
    other(trained / name)
    with pytest.raises(ValueError, match=f"small/{name} is not a regular file"):
        call(trained)


@pytest.mark.parametrize(("part", "name", "value", "problem"), [
    ("normalizer", "offset", [0.0, 0.0], "offset=.*; expected 6 finite numbers"),
    ("normalizer", "offset", None, "offset=None is not valid; expected 6"),
    ("normalizer", "scale", [float("nan")] * 6, "it holds NaN; expected JSON"),
    ("normalizer", "scale", ["1"] * 6, "scale=.*; expected 6 finite"),
    ("normalizer", "scale", [10**400] * 6, "scale=.*; expected 6 finite"),
    ("proprio_stats", "mean", "twelve", "mean=twelve is not valid; expected 12"),
    ("proprio_stats", "mean", [float("inf")] * 12, "it holds Infinity; expected JSON"),
    ("proprio_stats", "std", [1.0], "std=.*; expected 12 finite"),
    ("proprio_stats", "std", [1.0] * 11 + [0.0], "std=.*; expected numbers > 0"),
])
def test_damaged_statistics_are_refused(trained, part, name, value, problem):
    described = json.loads((trained / "policy.json").read_text())
    described[part] = {**described[part], name: value}
    (trained / "policy.json").write_text(json.dumps(described))
    said = f"small/policy.json (describes no policy|is damaged): .*{problem}"
    with pytest.raises(ValueError, match=said):
        load_policy(trained)


@pytest.mark.parametrize("trained_on", [
    {}, [], None, {"files": 3}, {"files": [1]}, {"files": [{}]}])
def test_an_error_names_a_description_without_files(trained, trainer, trained_on):
    described = json.loads((trained / "policy.json").read_text())
    (trained / "policy.json").write_text(json.dumps({**described, "trained_on": trained_on}))
    for call in (lambda: runs.refuse_other_data(trained, trainer.train_data),
                 lambda: demonstrations_of(trained, load_config(trained))):
        with pytest.raises(ValueError, match=r"small/policy.json is damaged"):
            call()


def test_a_trained_run_without_config_is_not_overwritten(trained):
    config = load_config(trained)
    (trained / "config.json").unlink()
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    for resume in (True, False):
        with pytest.raises(ValueError, match="small is trained but has no config.json"):
            create_run(config, "small", resume)
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


@pytest.mark.parametrize("state", [
    {}, {"a": 1}, [1], torch.zeros(2),
    {"epoch": 1, "policy": {}, "optimizer": {}}])  # without the rows of metrics.jsonl
def test_an_error_names_a_training_state_of_other_content(trained, state):
    torch.save(state, trained / "training_state.pt")
    with pytest.raises(ValueError, match="training_state.pt is damaged"):
        load_training_state(trained)


@pytest.mark.parametrize("key", sorted({*runs.STATE_VALUES, "policy", "optimizer", "scheduler",
                                         "measured", "precision", "generator", "cuda_generators"}))
def test_an_error_names_a_training_state_without_one_of_its_parts(trained, key):
    state = load_training_state(trained)
    del state[key]
    torch.save(state, trained / "training_state.pt")
    with pytest.raises(ValueError, match="training_state.pt is damaged"):
        load_training_state(trained)


@pytest.mark.parametrize("content", [
    0, 10, 1000, 5000, 20000, b"\x80\x02.", b"\x80\x02h\x00.", b"\x80\x02s."])
def test_an_error_names_a_truncated_training_state(trained, content):
    """Also pickles from whose empty stack or memory a value is taken."""
    path = trained / "training_state.pt"
    path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(ValueError, match="training_state.pt is damaged"):
        load_training_state(trained)


@pytest.mark.parametrize(("key", "value", "problem"), [
    ("epoch", "1", "concatenate str"), ("rows", [{}], "epoch"), ("epoch", 1, "rows of the epochs"),
    ("generator", torch.zeros(3, dtype=torch.uint8), "size"),
    ("policy", {"a": torch.zeros(2)}, "state_dict")])
def test_a_state_that_does_not_fit_is_named(trained, trainer, key, value, problem):
    state = load_training_state(trained)
    torch.save({**state, key: value}, trained / "training_state.pt")
    with pytest.raises(ValueError, match=rf"training_state.pt is damaged .*{problem}"):
        trainer.fit()


def test_a_trained_run_without_its_state_is_not_trained_again(trained, trainer):
    (trained / "training_state.pt").unlink()
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="has 2 epochs but no training_state.pt"):
        trainer.fit()
    assert before.items() <= {path: path.read_bytes() for path in before}.items()
    first, _ = (trained / "metrics.jsonl").read_text().splitlines(keepends=True)
    (trained / "metrics.jsonl").write_text(first)
    (trained / "episodes.jsonl").touch()
    with pytest.raises(ValueError, match="has 1 epoch but no training_state.pt"):
        trainer.fit()  # it was evaluated
    (trained / "episodes.jsonl").unlink()
    assert len(trainer.fit()) == 2  # its first epoch was interrupted


def test_an_error_says_that_the_description_is_missing(trained):
    (trained / "policy.json").unlink()
    with pytest.raises(FileNotFoundError, match="policy.json does not exist; expected the desc"):
        runs.description(trained)


class _Evil:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_loading_runs_no_code_from_the_file(trained, trainer, capsys):
    assert load_training_state(trained)["epoch"] == 2
    torch.save({"epoch": _Evil()}, trained / "training_state.pt")
    with pytest.raises(ValueError, match="training_state.pt .* more than tensors and numbers"):
        load_training_state(trained)
    with pytest.raises(ValueError, match=f"put an intact one back, or {runs.ANEW}"):
        trainer.fit()
    assert "code from a checkpoint ran" not in capsys.readouterr().out
