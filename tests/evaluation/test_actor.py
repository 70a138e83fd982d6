import json
from pathlib import Path

import h5py
import pytest
from conftest import SMALL

from trm_helpers import files
from trm_helpers.__main__ import main
from trm_helpers.config import from_flat
from trm_helpers.demos import collect
from trm_helpers.evaluation import actor
from trm_helpers.evaluation.actor import actor_of


@pytest.fixture
def asked(trained, monkeypatch):
    """A trained run on scripted demonstrations, and settings that collect with it."""
    policy = json.loads((trained / "policy.json").read_text())
    policy["trained_on"]["files"][0]["source"] = "scripted"
    (trained / "policy.json").write_text(json.dumps(policy))
    monkeypatch.setattr(actor, "demonstrations_of",
                        lambda run, config: dict.fromkeys(config.data.task_ids, Path("a file")))
    return from_flat("tiny", **{**SMALL, "num_demos": 8}, actor=trained.name, beta=0.25)


def test_a_run_acts_with_its_weights_and_its_demonstrations(asked, trained):
    found = actor_of(asked)
    assert (found.run, found.beta, found.base, found.base_count) == (
        trained.name, 0.25, {0: Path("a file")}, 5)
    assert found.sha256 == files.digest((trained / "best.safetensors").read_bytes())
    assert found.source.make(None).execution_horizon == 1


def test_an_actor_is_asked_for_by_name_and_not_with_a_folder(asked, tmp_path):
    assert actor_of(asked.replace(actor="")) is None
    with pytest.raises(ValueError, match="actor='small' is not valid; expected none with demo_dir"):
        actor_of(asked.replace(demo_dir=str(tmp_path)))


def test_an_actor_whose_file_holds_other_demonstrations_is_refused(asked, trained, monkeypatch):
    described, = json.loads((trained / "policy.json").read_text())["trained_on"]["files"]
    path = Path(described["file"])
    monkeypatch.setattr(actor, "demonstrations_of", lambda *_: {0: path})
    assert actor_of(asked).base == {0: path}
    with h5py.File(path, "r+") as file:
        file["data"][described["demos"][0]]["actions"][0, 0] *= 0.5
    with pytest.raises(ValueError, match="was trained on other demonstrations than .* holds"):
        actor_of(asked)


def test_an_actor_that_does_not_identify_its_demonstrations_is_refused_at_once(
        asked, trained, monkeypatch):
    """As the shipped policies; nothing is collected for it."""
    policy = json.loads((trained / "policy.json").read_text())
    del policy["trained_on"]["files"][0]["actions"]
    (trained / "policy.json").write_text(json.dumps(policy))
    monkeypatch.setattr(actor, "demonstrations_of", lambda *_: pytest.fail("collected"))
    with pytest.raises(ValueError, match="actor='small' is described without a digest of its "
                                         "demonstrations' actions.*expected a run trained here"):
        actor_of(asked)


@pytest.mark.parametrize(("read", "stored", "count"), [(0, 5, 5), (9, 5, 5), (3, 5, 3)])
def test_an_actor_was_trained_on_the_demonstrations_read_of_those_stored(
        asked, trained, read, stored, count):
    config = json.loads((trained / "config.json").read_text())
    config["data"] |= {"max_demos_per_task": read, "num_demos": stored}
    (trained / "config.json").write_text(json.dumps(config))
    assert actor_of(asked).base_count == count


@pytest.mark.parametrize(("settings", "said"), [
    ({"cameras": ("agentview_rgb", "eye_in_hand_rgb")},
     "was trained on the cameras agentview_rgb; expected those of the policy to train, "
     "agentview_rgb, eye_in_hand_rgb"),
    ({"suite": "libero_goal"},
     "was trained on task 0 of libero_object; expected task 0 of libero_goal"),
    ({"task_ids": (0, 3)},
     "was trained on task 0 of libero_object; expected tasks 0 and 3 of libero_object"),
    ({"placement": "wide"}, "was trained on demonstrations with placement='benchmark'; expected"),
    ({"frame_stride": 1}, "was trained on demonstrations with frame_stride=4; expected 1, as now"),
    ({"num_demos": 5}, "num_demos=5 is not valid; expected more than 5, the demonstrations per")])
def test_an_actor_for_something_else_is_refused(asked, settings, said):
    with pytest.raises(ValueError, match=said):
        actor_of(asked.replace(**settings))


def test_collection_with_an_actor_from_the_command_line(asked, trained, monkeypatch, capsys):
    """The cameras to compare with are those of the preset."""
    given = ["--task-ids", "0", "--num-demos", "9", "--actor", trained.name]
    assert main(["collect", "tiny", *given]) == 1
    assert "error: actor='small' was trained on the cameras agentview_rgb; expected those of the " \
        "policy to train, agentview_rgb, eye_in_hand_rgb" in capsys.readouterr().err
    monkeypatch.setattr(collect, "collect_tasks", lambda *_, actor, **__: {0: actor.sha256})
    monkeypatch.setattr(collect, "version_notes", list)
    monkeypatch.setattr(collect, "other_task", lambda *_: "")
    assert main(["collect", "reference", "--suite", "libero_object", "--frame-stride", "4",
                 *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"0": actor_of(asked).sha256}


def test_an_actor_without_weights_or_without_a_run_is_refused(asked, trained):
    with pytest.raises(FileNotFoundError, match="no trained run 'nobody'"):
        actor_of(asked.replace(actor="nobody"))
    (trained / "best.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="small holds no best.safetensors"):
        actor_of(asked)


def test_an_actor_whose_demonstrations_cannot_come_first_is_refused(asked, trained, monkeypatch):
    def missing(*_):
        raise FileNotFoundError("trained with demo_dir='/elsewhere'")

    monkeypatch.setattr(actor, "demonstrations_of", missing)
    with pytest.raises(ValueError, match="cannot be found .*elsewhere.*; expected a run trained "
                                         "without demo_dir"):
        actor_of(asked)
    policy = json.loads((trained / "policy.json").read_text())
    policy["trained_on"]["files"][0]["source"] = "human"
    (trained / "policy.json").write_text(json.dumps(policy))
    with pytest.raises(ValueError, match="trained on human demonstrations; expected scripted"):
        actor_of(asked)
