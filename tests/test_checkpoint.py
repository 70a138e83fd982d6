import errno
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch

from trm_helpers import checkpoint, paths
from trm_helpers.checkpoint import (
    create_run,
    find_run,
    load_config,
    load_policy,
    load_training_state,
    save_training_state,
    save_weights,
    shipped_policies,
)
from trm_helpers.config import from_flat


@pytest.fixture(autouse=True)
def no_probe(monkeypatch):
    """Versions without starting a renderer."""
    monkeypatch.setattr(checkpoint, "software_versions", lambda: {"mujoco": "3.3.2"})


def observation(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "agentview_rgb": generator.integers(0, 256, (36, 36, 3), dtype=np.uint8),
        "joint_states": generator.normal(size=7), "gripper_states": np.array([0.04, -0.04]),
        "ee_pos": generator.normal(size=3),
    }


def test_a_run_folder_is_made_once_and_resumed_only_when_asked_for():
    config = from_flat("tiny")
    run = create_run(config, "a-run")
    assert run == paths.artifacts_dir() / "a-run" and load_config(run) == config
    assert json.loads((run / "config.json").read_text())["software"] == {"mujoco": "3.3.2"}
    with pytest.raises(FileExistsError, match="a-run exists already"):
        create_run(config, "a-run")
    assert create_run(config, "a-run", resume=True) == run


def test_resuming_with_other_settings_lists_them_and_changes_nothing():
    run = create_run(from_flat("tiny"), "a-run")
    before = (run / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"lr: 0.001 there, 0.5 now; seed: 0 there, 3 now"):
        create_run(from_flat("tiny", lr=0.5, seed=3, num_threads=7, num_episodes=5), "a-run", True)
    assert (run / "config.json").read_bytes() == before


def test_the_name_is_made_from_suite_variant_seed_and_time():
    run = create_run(from_flat("tiny", seed=4))
    assert run.name.startswith("libero_object-block-s4-2") and len(run.name.split("-")) == 5


@pytest.mark.parametrize("name", ["../up", "a b", "/abs", "-x"])
def test_a_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(ValueError, match="run_name"):
        create_run(from_flat("tiny"), name)


def test_a_missing_run_lists_those_there_are(trained):
    assert find_run() == find_run("small") == find_run(str(trained)) == trained
    with pytest.raises(FileNotFoundError, match="no trained run 'other'.*there are: small"):
        load_policy("other")
    with pytest.raises(FileNotFoundError, match="expected a run folder"):
        load_config(trained / "figures")


def test_a_shipped_policy_is_copied_before_anything_is_written_beside_it(
        trained, tmp_path, monkeypatch):
    shipped = tmp_path / "repo" / "pretrained" / "bowl"
    shutil.copytree(trained, shipped)
    monkeypatch.setattr(paths, "repo_root", lambda: tmp_path / "repo")
    assert find_run() == trained  # the newest is one's own
    run = find_run("pretrained/bowl")
    assert run == paths.artifacts_dir() / "pretrained" / "bowl"
    (run / "policy.json").touch()
    (run / "episodes.jsonl").write_text("")
    assert find_run("pretrained/bowl") == run and (run / "episodes.jsonl").exists()
    assert not (shipped / "episodes.jsonl").exists()
    with pytest.raises(FileNotFoundError, match="there are: small, pretrained/bowl"):
        load_policy("pretrained/cup")


@pytest.mark.parametrize("name", shipped_policies())
def test_the_policies_that_come_with_the_repository_load_and_act(name):
    folder = paths.shipped("pretrained").parent / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6
    assert (folder / "README.md").exists()
    assert "/" not in json.loads((folder / "policy.json").read_text())[
        "trained_on"]["files"][0]["file"]
    policy = load_policy(name)
    policy.reset()
    action = policy.act({**observation(), "eye_in_hand_rgb": observation(1)["agentview_rgb"],
                         "ee_ori": np.zeros(3), "task_id": 0,
                         "language": "pick up the black bowl from table center and place it on "
                                     "the plate"})
    assert action.shape == (7,) and np.isfinite(action).all() and np.abs(action).max() <= 1


def test_no_name_means_the_newest_trained_run(small_run):
    for age, name in ((0, "new"), (100, "old")):
        run = small_run(name, epochs=1).run
        (run / "policy.json").write_text("{}")
        os.utime(run / "policy.json", (1e9 - age, 1e9 - age))
    assert find_run().name == "new"


def test_a_policy_is_rebuilt_from_the_folder_alone(trained, trainer):
    rebuilt = load_policy("small", "last")
    original = trainer.policy.eval()
    assert rebuilt.config == original.config and not rebuilt.training
    for seed in range(3):
        rebuilt.reset()
        original.reset()
        assert np.array_equal(rebuilt.act(observation(seed)), original.act(observation(seed)))


def test_the_digest_is_of_the_bytes_that_were_loaded(trained, monkeypatch):
    file, load = trained / "best.safetensors", checkpoint.load
    content = file.read_bytes()

    def replaced_meanwhile(given):
        file.write_bytes(b"other weights")
        return load(given)

    monkeypatch.setattr(checkpoint, "load", replaced_meanwhile)
    assert load_policy(trained).sha256 == hashlib.sha256(content).hexdigest()[:16]


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
    with pytest.raises(ValueError, match=r"does not fit .*policy.json.*"
                                         r"proprio_mlp.0.weight: \(16, 12\) there, \(64, 12\)"):
        load_policy(trained)
    described["model"] |= {"hidden_dim": 16, "halting": "act"}
    (trained / "policy.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"differ: halt.bias: none there, \(1,\) expected; "
                                         r"halt.weight: none there, \(1, 16\) expected$"):
        load_policy(trained)
    with pytest.raises(ValueError, match="weights='newest'.*best, last"):
        load_policy(trained, "newest")
    best.unlink()
    with pytest.raises(FileNotFoundError, match="best.safetensors does not exist"):
        load_policy(trained, "best")


@pytest.mark.parametrize(("foreign", "message"), [
    (dict(cameras=["agentview_rgb", "eye_in_hand_rgb"]),
     r"encoders.eye_in_hand_rgb.\S+: none there"),
    (dict(chunk=4), r"head.output.weight: \(\d+, 16\) there, \(\d+, 16\) expected"),
    (dict(conditioning="task_id", num_tasks=3), r"task\S+: none there"),
    (dict(conditioning="language"), r"none there"),
    (dict(proprioception=False), r"proprio_mlp.0.weight: \(16, 12\) there, none expected"),
    (dict(gripper="binary"), r"head.gripper.weight: \(4, 16\) there, \(2, 16\) expected"),
    (dict(variant="trm", image_size=64), "differ"),
])
def test_weights_of_another_configuration_are_refused(trained, foreign, message):
    described = json.loads((trained / "policy.json").read_text())
    described["model"] |= foreign
    (trained / "policy.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=f"does not fit .*in policy.json.*{message}"):
        load_policy(trained)


@pytest.mark.parametrize("save", ["save_file", "torch.save"])
def test_a_full_disk_keeps_what_was_saved_before(trained, monkeypatch, save):
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}

    def full(_, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    if save == "save_file":
        monkeypatch.setattr(checkpoint, "save_file", full)
        call = save_weights, (trained, {"a": torch.ones(2)}, "best")
    else:
        monkeypatch.setattr(torch, "save", full)
        call = save_training_state, (trained, {"epoch": 9})
    with pytest.raises(OSError, match="No space left"):
        call[0](*call[1])
    assert {path: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before


def test_a_truncated_training_state_is_named(trained):
    path = trained / "training_state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="training_state.pt is damaged"):
        load_training_state(trained)


class _Evil:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_loading_runs_no_code_from_the_file(trained, trainer, capsys):
    assert load_training_state(trained)["epoch"] == 2
    torch.save({"epoch": _Evil()}, trained / "training_state.pt")
    with pytest.raises(ValueError, match="training_state.pt .* more than tensors and numbers"):
        load_training_state(trained)
    with pytest.raises(ValueError, match="remove it to train from the start"):
        trainer.fit()
    assert "code from a checkpoint ran" not in capsys.readouterr().out
