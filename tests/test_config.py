import json

import pytest

from trm_helpers.config import PRESETS, Config, from_flat, settings_by_part


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_json(preset):
    config = from_flat(preset)
    assert config.preset == preset
    assert Config.from_dict(json.loads(config.to_json())) == config


def test_reference_preset_is_the_documented_architecture():
    config = from_flat("reference")
    model, train, search = config.model, config.train, config.search
    assert (model.hidden_dim, model.num_recursions, model.num_heads, model.image_size) \
        == (256, 8, 4, 128)
    assert model.cameras == ("agentview_rgb",) and model.chunk == 1
    assert not model.proprioception and model.num_tasks == 0
    assert (train.loss, train.grad_clip, train.min_lr) == ("mse", 1.0, 1e-6)
    assert search.search_lrs == (1e-3, 5e-4, 3e-4, 1e-4) and search.search_epochs == 10


def test_settings_are_flat_and_unique_and_none_keeps_the_presets():
    config = from_flat("tiny", lr=5e-4, hidden_dim=64, suite=None, task_ids=[3])
    assert (config.train.lr, config.model.hidden_dim) == (5e-4, 64)
    assert config.data.suite == "libero_object" and config.data.task_ids == (3,)
    assert {"lr": "train", "hidden_dim": "model", "suite": "data"}.items() \
        <= settings_by_part().items()


def test_unknown_names_are_refused_with_a_suggestion_and_the_valid_ones():
    with pytest.raises(ValueError, match="unknown preset 'big'.*reference, demo, tiny"):
        from_flat("big")
    with pytest.raises(ValueError, match="'hiden_dim'.*did you mean 'hidden_dim'"):
        from_flat("demo", hiden_dim=3)
    values = from_flat("demo").to_dict()
    values["model"]["depth"] = 3
    with pytest.raises(ValueError, match="unknown model setting 'depth'.*num_recursions"):
        Config.from_dict(values)


@pytest.mark.parametrize(("setting", "message"), [
    (dict(suite="libero"), "unknown suite 'libero'.*libero_spatial"),
    (dict(task_ids=[10]), "task_id 10 is not in libero_spatial; expected 0 to 9"),
    (dict(task_ids=[]), "at least one task id"),
    (dict(demos="some"), "'auto', 'human', 'scripted'"),
    (dict(num_demos=1), "at least 2"),
    (dict(max_demos_per_task=-1), "max_demos_per_task"),
    (dict(train_fraction=1.0), "train_fraction=1.0"),
    (dict(sequence_length=0), "sequence_length"),
    (dict(alignment="late"), "alignment='late'.*'shift'"),
    (dict(normalize_actions="l2"), "normalize_actions"),
    (dict(augmentation="mixup"), "augmentation"),
    (dict(variant="lstm"), "variant='lstm'"),
    (dict(num_recursions=0), "num_recursions=0"),
    (dict(hidden_dim=30), "hidden_dim=30.*multiple of num_heads=4"),
    (dict(halting="never"), "halting"),
    (dict(halting_threshold=0.0), "halting_threshold"),
    (dict(ponder_cost=-1.0), "ponder_cost"),
    (dict(gripper="soft"), "gripper='soft'.*'mixture'"),
    (dict(cameras=[]), "at least one camera"),
    (dict(cameras=["frontview"]), "cameras='frontview'.*'agentview_rgb'"),
    (dict(image_size=35), "image_size=35.*>= 36"),
    (dict(chunk=4, execution_horizon=5), "execution_horizon=5.*1 to chunk=4"),
    (dict(num_tasks=2, task_ids=[2]), "num_tasks=2.*highest task id, 2"),
    (dict(epochs=0), "epochs=0"),
    (dict(lr=0.0), "lr=0.0"),
    (dict(patience=-1), "patience"),
    (dict(ema_decay=1.0), "ema_decay"),
    (dict(loss="huber"), "loss='huber'"),
    (dict(precision="fp8"), "precision"),
    (dict(device="tpu"), "device"),
    (dict(wandb_mode="yes"), "wandb_mode"),
    (dict(num_episodes=51), "num_episodes=51.*1 to 50"),
    (dict(num_episodes=10, first_init_state=41), "first_init_state=41.*0 to 40"),
    (dict(horizon=-1), "horizon"),
    (dict(eval_workers=0), "eval_workers"),
    (dict(search_lrs=[]), "search_lrs"),
    (dict(search_epochs=0), "search_epochs"),
    (dict(max_configs=-1), "max_configs"),
])
def test_a_bad_value_is_refused_and_printed(setting, message):
    with pytest.raises(ValueError, match=message):
        from_flat("reference", **setting)
