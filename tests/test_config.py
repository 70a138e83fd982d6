import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from trm_helpers import schema
from trm_helpers.config import (
    PARTS,
    PRESETS,
    REMOVED,
    Config,
    EvalConfig,
    SearchConfig,
    check_parameters,
    from_flat,
    parameter_type,
    parse_parameter,
    settings_by_part,
    types_of,
)
from trm_helpers.schema import PROTOCOLS
from trm_helpers.training.train import GRAD_CLIP, MIN_LR


@pytest.mark.parametrize(("protocol", "episodes", "horizons", "settle"), [
    # Spatial, Object, Goal, Long, LIBERO-90, as published
    ("openvla", 50, (220, 280, 300, 520, 400), (10, -1.0)),
    ("lerobot", 10, (280, 280, 300, 520, 400), (10, -1.0)),
    ("libero", 20, (600,) * 5, (5, 0.0)),
    ("quick", 10, (220, 280, 300, 520, 400), (10, -1.0)),
])
def test_protocols_are_the_published_ones(protocol, episodes, horizons, settle):
    made = PROTOCOLS[protocol]
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    assert EvalConfig(protocol=protocol).episodes == episodes
    assert tuple(map(made.horizon, suites)) == horizons
    assert (made.settle_steps, made.settle_action[-1]) == settle
    assert made.settle_action[:6] == (0.0,) * 6 and made.source


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_json(preset):
    config = from_flat(preset)
    assert config.preset == preset
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_reference_preset_is_the_documented_architecture():
    config = from_flat("reference")
    model, train, search = config.model, config.train, config.search
    assert (model.hidden_dim, model.num_recursions, model.image_size) == (256, 8, 128)
    assert model.cameras == ("agentview_rgb",) and model.chunk == 1
    assert not model.proprioception and model.conditioning == "none"
    assert train.loss == "mse"
    assert (schema.NUM_HEADS, GRAD_CLIP, MIN_LR) == (4, 1.0, 1e-6)
    assert search.search_lrs == (1e-3, 5e-4, 3e-4, 1e-4) and search.search_epochs == 10


def test_settings_are_flat_and_unique_and_none_keeps_the_presets():
    config = from_flat("tiny", lr=5e-4, hidden_dim=64, suite=None, task_ids=[3])
    assert (config.train.lr, config.model.hidden_dim) == (5e-4, 64)
    assert config.data.suite == "libero_object" and config.data.task_ids == (3,)
    whole = from_flat("tiny", lr=1, search_lrs=[1])
    assert type(whole.train.lr) is type(whole.search.search_lrs[0]) is float
    assert {"lr": "train", "hidden_dim": "model", "suite": "data"}.items() \
        <= settings_by_part().items()


def test_a_former_setting_is_accepted_at_its_constant_value_alone():
    values = from_flat("demo", lr=0.5).to_dict()
    values["train"] |= {"grad_clip": 1.0, "wandb_project": "theirs"}
    values["model"] |= {"num_heads": 4}
    assert Config.from_dict(values) == from_flat("demo", {"min_lr": 1e-6}, lr=0.5)
    values["model"]["num_heads"] = 8
    with pytest.raises(ValueError, match="num_heads=8 is not valid; expected 4, now a constant"):
        Config.from_dict(values)
    with pytest.raises(ValueError, match="min_lr=0.1 is not valid; expected 1e-06"):
        from_flat("demo", {"min_lr": 0.1})
    assert not REMOVED.keys() & settings_by_part().keys()


def test_a_variant_without_recursion_is_applied_once():
    for variant in ("transformer", "act"):
        config = from_flat("demo", variant=variant)
        assert config.model.num_recursions == 1 and Config.from_dict(config.to_dict()) == config
    assert from_flat("demo", variant="trm").model.num_recursions == 4


def test_a_former_option_is_read_as_its_new_name():
    values = from_flat("demo").to_dict()
    values["model"]["halting"] = "act"
    assert Config.from_dict(values) == from_flat("demo", halting="adaptive")
    assert from_flat("demo", {"halting": "act"}) == from_flat("demo", halting="adaptive")


def test_unknown_names_are_refused_with_a_suggestion_and_the_valid_ones():
    with pytest.raises(ValueError, match="preset='big' .*'reference', 'demo', 'trm', 'tiny'"):
        from_flat("big")
    with pytest.raises(ValueError, match="'hiden_dim'.*did you mean 'hidden_dim'"):
        from_flat("demo", hiden_dim=3)
    values = from_flat("demo").to_dict()
    values["model"]["depth"] = 3
    with pytest.raises(ValueError, match="unknown model setting 'depth'.*num_recursions"):
        Config.from_dict(values)
    with pytest.raises(ValueError, match="preset='big' .*'reference', 'demo', 'trm', 'tiny'"):
        Config.from_dict({**from_flat("demo").to_dict(), "preset": "big"})


@pytest.mark.parametrize(("setting", "message"), [
    (dict(suite="libero"), "^(?!.*swap)suite='libero' is not valid.*libero_spatial"),
    (dict(suite="libero_goal_swap"), "'libero_goal_swap' measures robustness.*one of libero_spat"),
    (dict(task_ids=[10]), "task_id=10 is not in libero_spatial; expected 0 to 9"),
    (dict(task_ids=[]), "task_ids=.. .*at least one value"),
    (dict(task_ids=[1, 1]), "task_ids=.1, 1. .*no value twice"),
    (dict(task_ids=3), "task_ids=3 .*expected a list of int"),
    (dict(task_ids=[0.5]), "a list of int"),
    (dict(num_demos=1), "at least 2"),
    (dict(max_demos_per_task=-1), "max_demos_per_task"),
    (dict(sequence_length=0), "sequence_length"),
    (dict(num_recursions=0), "num_recursions=0"),
    (dict(hidden_dim=0), "hidden_dim=0"),
    (dict(chunk=0), "chunk=0"),
    (dict(chunk=2.0), "chunk=2.0 .*expected int"),
    (dict(hidden_dim=30), "hidden_dim=30.*multiple of 4, the number of attention heads"),
    (dict(ponder_cost=-1.0), "ponder_cost"),
    (dict(hidden_dim=2**20), "hidden_dim=1048576 .*at most 2048"),
    (dict(num_recursions=2**40), "num_recursions=1099511627776 .*at most 1024"),
    (dict(image_size=2**20), "image_size=1048576 .*at most 512"),
    (dict(cameras=[]), "cameras=.. .*at least one value"),
    (dict(cameras="agentview_rgb"), "expected a list of names"),
    (dict(cameras=["agentview_rgb"] * 2), "no value twice"),
    (dict(proprioception="false"), "proprioception='false' .*expected bool"),
    (dict(image_size=35), "image_size=35.*>= 36"),
    (dict(image_size=0, variant="trm"), "image_size=0 .*> 0"),
    (dict(image_size=62, scenes=10), "image_size=62 .*a multiple of 4 with scenes"),
    (dict(chunk=4, execution_horizon=5), "execution_horizon=5.*1 to chunk=4"),
    (dict(execution_horizon=0), "execution_horizon=0"),
    (dict(num_tasks=0), "num_tasks=0"),
    (dict(conditioning="task_id", num_tasks=2, task_ids=[2]), "num_tasks=2.*highest task id, 2"),
    (dict(epochs=0), "epochs=0"),
    (dict(batch_size=0), "batch_size=0"),
    (dict(batch_size=True), "batch_size=True .*expected int"),
    (dict(lr=0.0), "lr=0.0"),
    (dict(lr="1e-3"), "lr='1e-3' .*expected float"),
    (dict(lr=float("nan")), "lr=nan"),
    (dict(lr=10**400), "lr=10+ is not valid"),
    (dict(weight_decay=-1e-4), "weight_decay"),
    (dict(max_minutes=-1.0), "max_minutes"),
    (dict(num_threads=-1), "num_threads"),
    (dict(num_threads=1025), "num_threads=1025 .*at most 1024"),
    (dict(seed=-1), "seed"),
    (dict(seed=2**63), "seed=9223372036854775808 .*at most 9223372036854775807"),
    (dict(frame_stride=65), "frame_stride=65 .*at most 64"),
    (dict(patience=-1), "patience"),
    (dict(ema_decay=1.0), "ema_decay"),
    (dict(num_episodes=-1), "num_episodes=-1"),
    (dict(num_episodes=51), "num_episodes=51.*0 to 50"),
    (dict(protocol="openvla", first_init_state=1), "first_init_state=1.*0 to 0 with 50 episodes"),
    (dict(num_episodes=10, first_init_state=41), "first_init_state=41.*0 to 40"),
    (dict(horizon=-1), "horizon"),
    (dict(num_videos=-1), "num_videos"),
    (dict(eval_workers=0), "eval_workers"),
    (dict(frame_stride=0), "frame_stride=0"),
    (dict(frame_stride=2, sequence_length=3), "sequence_length=3.*1, or frame_stride=1"),
    (dict(search_lrs=[]), "search_lrs"),
    (dict(search_hidden_dims=[128, 0]), "search_hidden_dims"),
    (dict(variant="transformer", halting="learned"), "expected 'fixed' with variant='transformer'"),
    (dict(variant="act", carry_over=True), "expected False with variant='act', which applies its"),
    (dict(search_num_recursions=[-1]), "search_num_recursions"),
    (dict(search_episodes=-1), "search_episodes=-1"),
    (dict(search_epochs=0), "search_epochs"),
    (dict(max_configs=-1), "max_configs"),
    (dict(search_lrs=[1e-3, 1e-3]), "search_lrs=.*no value twice"),
    (dict(search_workers=-1), "search_workers=-1"),
    (dict(search_minutes=-1), "search_minutes"),
    (dict(search_replicates=0), "search_replicates=0"),
    (dict(search_shard="1/2", search_method="tpe"), "search_shard='1/2'.*'grid', whose points"),
    (dict(search_shard="1/2", search_replicates=2), "search_replicates=2.*1 in a shard"),
    (dict(epochs=3, stop_epoch=4), "stop_epoch=4.*0 to epochs=3"),
    *((dict([(name, value)]), f"{name}=.* is not valid; expected at most {largest}$")
      for name, value, largest in [
          ("lr", 1e300, 10**6), ("weight_decay", 1e300, 10**6), ("ponder_cost", 1e308, 1000),
          ("batch_size", 10**21, 10**6), ("num_demos", 10**21, 10**6), ("epochs", 10**15, 10**6),
          ("search_lrs", [1e300], 10**6), ("horizon", 10**21, 10**6)]),
    (dict(demo_dir="a\0b"), "demo_dir='a.x00b' .*without NUL"),
    (dict(search_storage="sqlite:///s.db"), "search_storage='sqlite:///s.db' .*expected none"),
    (dict(keypoints=["bowl"]), "keypoints=.'bowl'. .*none: training sets it"),
    (dict(more={"keypoints": ["bowl"]}), "keypoints=.'bowl'. .*none: training sets it"),
    (dict(more={"keypoint_tasks": 3}), "keypoint_tasks=3 .*none: training sets it"),
])
def test_a_bad_value_is_refused_and_printed(setting, message):
    with pytest.raises(ValueError, match=message):
        from_flat("reference", **setting)


def test_changes_to_the_preset_make_the_configuration_again():
    assert from_flat("demo").changes() == {}
    config = from_flat("demo", lr=0.5, task_ids=(1,), epochs=70)  # as the preset has it
    assert config.changes() == {"lr": 0.5, "task_ids": (1,)}
    assert from_flat("demo", **config.changes()) == config
    assert config.flat()["lr"] == 0.5 and "preset" not in config.flat()


# --- options -------------------------------------------------------------------------------------
ROOT = Path(__file__).resolve().parent.parent


def options():
    """``(setting, option)`` of every setting that has a list of options."""
    for kind in PARTS.values():
        for name, of_type in types_of(kind).items():
            if get_origin(of_type) is tuple:
                of_type = get_args(of_type)[0]
            yield from ((name, option) for option in get_args(of_type))


OPTIONS = sorted({name: None for name, _ in options()})
WITH_OPTIONS = {name: [option for known, option in options() if known == name] for name in OPTIONS}


def accepted(name, option):
    value = [option] if name == "cameras" else option
    config = from_flat(**{name: value})
    return config.flat()[name]


@pytest.mark.parametrize(("name", "option"), list(options()))
def test_every_option_is_accepted(name, option):
    assert accepted(name, option) in (option, (option,))


def test_all_settings_with_options_are_known():
    assert OPTIONS == ["alignment", "augmentation", "cameras", "conditioning", "demos", "device",
                       "gripper", "halting", "head_activation", "image_activation", "loss",
                       "normalize_actions", "perturbation", "placement", "precision", "protocol",
                       "search_method", "storage", "suite", "variant", "wandb_mode"]
    assert "colour" in WITH_OPTIONS["augmentation"]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("wrong", ["nonsense", 3, None, ["none"], {}])
def test_another_option_is_refused_with_those_there_are(name, wrong):
    wrong = "nonsense" if wrong is None else wrong  # None keeps the preset's
    with pytest.raises(ValueError, match=name) as refused:
        from_flat(**{name: [wrong] if name == "cameras" else wrong})
    assert all(option in str(refused.value) for option in WITH_OPTIONS[name])


def test_a_misspelt_option_has_a_suggestion():
    with pytest.raises(ValueError, match="augmentation='color'.*; did you mean 'colour'"):
        from_flat(augmentation="color")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(
    str(path.relative_to(ROOT)) for folder in ("docs", "notebooks", "pretrained")
    for path in sorted((ROOT / folder).glob("**/*")) if path.suffix in (".md", ".py"))])
def test_options_in_the_pages_exist(page):
    """``setting="option"``, ``--setting option`` and ``-p setting option``."""
    text = (ROOT / page).read_text()
    for setting, option in re.findall(r"`?\b([a-z_]+)=\"([a-z_0-9]+)\"", text) \
            + re.findall(r"(?:--|-p )([a-z_-]+)[ =]([a-z_0-9]+)", text):
        setting = setting.replace("-", "_")
        if setting in OPTIONS and setting != "suite" and not option.isdigit():
            assert option in WITH_OPTIONS[setting], (setting, option)


def test_notebooks_list_all_options_of_their_parameters():
    listed = {**WITH_OPTIONS, "preset": list(PRESETS), "weights": list(schema.WEIGHTS)}
    found = set()
    for notebook in sorted((ROOT / "notebooks").glob("*.py")):
        for name, comment in re.findall(r"^(\w+) = .*  # type: str; (.*)$", notebook.read_text(),
                                        re.M):
            if name in listed and name != "suite":
                *first, last = listed[name]
                assert f"{', '.join(first)} or {last}" in comment, (notebook.name, name)
                found.add(name)
    assert {"preset", "weights", "augmentation", "protocol", "storage"} <= found


# --- parameters of notebooks ---------------------------------------------------------------------
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": tuple, "dict": dict}


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "notebooks").glob("*.py"))])
def test_the_types_in_a_notebooks_comments_are_those_that_are_checked(name):
    text = (ROOT / "notebooks" / name).read_text()
    found = re.findall(r"^(\w+) = .*  # type: (\w+); ", text, re.M)
    assert len(found) >= 2  # preset and run_name
    for name, said in found:
        kind = parameter_type(name)
        kind = str if get_origin(kind) is Literal else get_origin(kind) or kind
        assert kind is TYPES[said], (name, said)


@pytest.mark.parametrize(("given", "message"), [
    (dict(resume="false"), "resume='false' is not valid; expected bool"),
    (dict(resume=None), "resume=None"),
    (dict(task_ids=3), "task_ids=3 .*a list of int"),
    (dict(task_ids="0,1"), "task_ids='0,1' .*a list of int"),
    (dict(replays="2"), "replays='2' .*int"),
    (dict(replays=-1), "replays=-1 .*>= 0"),
    (dict(num_samples=0), "num_samples=0 .*>= 1"),
    (dict(robustness_episodes=1.5), "robustness_episodes=1.5"),
    (dict(weights="newest"), "weights='newest'.*'best', 'last'"),
    (dict(suite="libero"), "suite='libero'.*'libero_spatial_swap'"),
    (dict(more="{}"), "more='{}' .*dict"),
    (dict(lr="fast"), "lr='fast' .*float"),
    (dict(run_name=1.5), "run_name=1.5 .*str"),
    (dict(demo_dir=["a"]), "demo_dir"),
    (dict(preset=None), "preset=None"),
])
def test_a_parameter_of_another_type_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_parameters(**given)


def test_parameters_become_what_a_notebook_can_be_given():
    assert check_parameters(run_name=20240101, task_ids=(0, 1), lr=1, suite=None, resume=True,
                            baseline_run=None, other="kept", suite_=[1]) == {
        "run_name": "20240101", "task_ids": [0, 1], "lr": 1.0, "suite": None, "resume": True,
        "baseline_run": None, "other": "kept", "suite_": [1]}


@pytest.mark.parametrize(("name", "text", "value"), [
    ("run_name", "20240101", "20240101"), ("run_name", "1_000", "1_000"),
    ("run_name", "1e3", "1e3"), ("demo_dir", "[a]", "[a]"), ("suite", "None", None),
    ("lr", "1e-3", 1e-3), ("resume", "False", False), ("task_ids", "[0, 1]", [0, 1]),
    ("other", "3", 3), ("more", "{[1]: 2}", "{[1]: 2}"),
])
def test_text_on_a_command_line_is_read_by_the_parameters_type(name, text, value):
    assert parse_parameter(name, text) == value


def test_more_settings_are_checked_and_given_once():
    assert from_flat("tiny", {"lr": 0.5}, lr=None) == from_flat("tiny", lr=0.5)
    for more, message in (({"lr": 0.5}, r"given by itself as well \(lr\)"), ([], "expected a dict"),
                          ({"speed": 1}, "unknown setting 'speed'"), ({3: 1}, "unknown setting 3"),
                          ({"preset": "demo"}, "unknown setting 'preset'")):
        with pytest.raises(ValueError, match=message):
            from_flat("tiny", more, lr=0.1)


@pytest.mark.parametrize("url", [
    "postgresql://u:PASSWORD@h/db", "postgresql+psycopg2://u:PASSWORD@h:5432/db", "u:PASSWORD@h",
    "mysql//u:PASSWORD@h/db", "postgresql://h/db?user=u&password=PASSWORD", "redis://:PASSWORD@h",
    "postgresql://u:PASS WORD PASSWORD@h/db", "mysql://h/db?user=u&PWD=PASSWORD",
    "https://h/db?auth_token=PASSWORD"])
def test_a_password_belongs_into_the_environment_and_is_not_repeated(url):
    with pytest.raises(ValueError, match="TRM_SEARCH_STORAGE") as refused:
        from_flat(search_storage=url)
    assert "PASSWORD" not in str(refused.value)


@pytest.mark.parametrize("url", ["", "sqlite:////shared/study.db", "postgresql://u@h:5432/db"])
def test_a_database_without_a_password_is_a_setting(url):
    assert SearchConfig(search_method="tpe", search_storage=url).search_storage == url
