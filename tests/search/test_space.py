import pytest

from trm_helpers.config import SearchConfig, from_flat
from trm_helpers.search.space import (
    axes,
    check_points,
    common_settings,
    grid,
    parameters,
    point_of,
    refuse_others,
    rungs,
    trial_name,
    trial_settings,
    value_of,
)


def test_grid_is_the_documented_sixteen_points():
    points = grid(SearchConfig())
    assert len(points) == 16 and len({tuple(point.values()) for point in points}) == 16
    assert points[0] == {"lr": 1e-3, "hidden_dim": 128, "num_recursions": 4}
    assert points[-1] == {"lr": 1e-4, "hidden_dim": 256, "num_recursions": 8}


def test_part_of_the_grid_is_spread_over_it():
    points = grid(SearchConfig())
    assert grid(SearchConfig(max_configs=4)) == [points[i] for i in (0, 5, 10, 15)]
    assert grid(SearchConfig(max_configs=1)) == points[:1]
    assert grid(SearchConfig(max_configs=99)) == points


def test_shards_share_out_the_points():
    points = grid(SearchConfig(max_configs=7))
    shards = [grid(SearchConfig(max_configs=7, search_shard=f"{n}/3")) for n in (1, 2, 3)]
    assert shards == [[points[0], points[3], points[6]], [points[1], points[4]],
                      [points[2], points[5]]]


def test_a_shard_without_a_point_is_refused():
    with pytest.raises(ValueError, match="search_shard='3/4' holds none of the 2 points"):
        grid(SearchConfig(max_configs=2, search_shard="3/4"))


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "a/b", "1/0"])
def test_a_bad_shard_is_refused(shard):
    with pytest.raises(ValueError, match=f"search_shard='{shard}' is not valid; expected a part"):
        SearchConfig(search_shard=shard)


def test_further_axes():
    search = SearchConfig(search_lrs=(1e-3,), search_hidden_dims=(64,), search_num_recursions=(2,),
                          search_space="{weight_decay: [0.0, 0.1], variant: [block, trm]}")
    assert axes(search) == {"lr": (1e-3,), "hidden_dim": (64,), "num_recursions": (2,),
                            "weight_decay": (0.0, 0.1), "variant": ("block", "trm")}
    assert [(p["weight_decay"], p["variant"]) for p in grid(search)] == [
        (0.0, "block"), (0.0, "trm"), (0.1, "block"), (0.1, "trm")]
    assert trial_name({"weight_decay": 1e6}) == "weight_decay1e06"  # run names have no plus sign
    assert trial_name(grid(search)[3], seed=2) == \
        "lr0.001-hidden_dim64-num_recursions2-weight_decay0.1-varianttrm-seed2"


@pytest.mark.parametrize(("space", "said"), [
    ("{weight_dekay: [0.1]}", "unknown setting in search_space 'weight_dekay'.*'weight_decay'"),
    ("{epochs: [1, 2]}", "unknown setting in search_space 'epochs'"),
    ("{lr: [0.1]}", "no lr, whose values are in search_lrs"),
    ("{chunk: [4, 8]}", "chunk changes what the validation loss means"),
    ("{variant: [block, act]}", "variant changes what the validation loss means"),
    ("{max_demos_per_task: [5, 9]}", "max_demos_per_task changes what the validation"),
    ("{beta: [0.0, 0.5]}", "unknown setting in search_space 'beta'"),  # other demonstrations
    ("{actor: [one, other]}", "unknown setting in search_space 'actor'"),
    ("{weight_decay: 0.1}", "distinct values for each setting"),
    ("{weight_decay: [0.1, 0.1]}", "distinct values for each setting"),
    ("{weight_decay: [0.1", "distinct values for each setting"),
])
def test_a_bad_search_space_is_refused(space, said):
    with pytest.raises(ValueError, match=said):
        axes(SearchConfig(search_space=space))


def test_settings_that_change_the_loss_are_compared_by_rollouts():
    space = "{chunk: [4, 8]}"
    assert "chunk" in axes(SearchConfig(search_space=space, search_episodes=3))
    with pytest.raises(ValueError, match="a search_method other than halving"):
        axes(SearchConfig(search_space=space, search_episodes=3, search_method="halving"))


@pytest.mark.parametrize("given", [dict(search_lrs=(1.2345678e-4, 1.2345679e-4)),
                                   dict(search_space="{ponder_cost: [0.12345678, 0.12345679]}")])
def test_values_whose_trials_would_share_a_folder_are_refused(given):
    with pytest.raises(ValueError, match="expected values that differ in their first six digits"):
        axes(SearchConfig(**given, search_episodes=1))


def test_values_that_do_not_go_together_are_refused_for_every_method():
    for method in ("grid", "tpe"):
        with pytest.raises(ValueError, match="hidden_dim=18.*a multiple of 4"):
            check_points(from_flat("tiny", search_hidden_dims=(16, 18), search_method=method))


def test_rungs_of_halving_by_hand():
    assert rungs(SearchConfig(search_epochs=10, search_episodes=4)) == [(10, 4)]
    halving = dict(search_method="halving")
    # a ninth and a third of the epochs; no episodes, then a third of them rounded up
    assert rungs(SearchConfig(**halving, search_epochs=18, search_episodes=10)) == [
        (2, 0), (6, 4), (18, 10)]
    assert rungs(SearchConfig(**halving, search_epochs=10)) == [(1, 0), (3, 0), (10, 0)]
    assert rungs(SearchConfig(**halving, search_epochs=2)) == [(1, 0), (2, 0)]
    assert rungs(SearchConfig(**halving, search_epochs=1)) == [(1, 0)]


def test_parameters_make_the_trial_again():
    config = from_flat("demo", seed=3, batch_size=16, ema_decay=0.5, eval_workers=1, patience=4)
    point = {"lr": 1e-5, "hidden_dim": 128, "num_recursions": 4}
    given = parameters(trial_settings(config, point, 5), point, ["preset", "lr", "seed", "epochs"])
    assert given["preset"] == "demo" and given["lr"] == 1e-5 and given["seed"] == 5
    assert given["epochs"] == config.search.search_epochs
    assert given["more"]["ema_decay"] == 0.5 and given["more"]["hidden_dim"] == 128
    more = given.pop("more")
    again = from_flat(**given, **more)
    assert again == config.replace(**point, seed=5, epochs=3, patience=0)
    assert point_of({**given, "more": more}, config.search) == (point, 5)
    assert point_of({"lr": 0.1}, config.search) == ({}, 0)


def test_searches_with_other_settings_are_refused():
    config = from_flat("tiny")
    same = config.replace(lr=0.5, hidden_dim=64, num_threads=2, demo_dir="elsewhere", device="cpu",
                          search_lrs=(0.1, 0.2))  # what is searched over; of this machine
    refuse_others("x", common_settings(config), common_settings(same))
    for change, said in ((dict(loss="mse"), "loss: 'l1' there, 'mse' now"),
                         (dict(search_epochs=9), "epochs: 1 there, 9 now"),
                         (dict(search_episodes=9), "search_episodes: 0 there, 9 now"),
                         (dict(search_space="{weight_decay: [0.1]}"),
                          "weight_decay: .* there, searched over now")):
        with pytest.raises(ValueError, match=f"x belongs to a search with other settings.*{said}"):
            refuse_others("x", common_settings(config), common_settings(config.replace(**change)))


def test_a_guided_search_minimises_failures_then_the_loss():
    assert value_of({"final_val_loss": 0.3}) == 0.3
    some = dict(episodes=10, successes=7)
    assert value_of({"final_val_loss": 0.0, **some}) == 3.5  # a logistic function of the loss
    assert 3 < value_of({"final_val_loss": -5.0, **some}) < 3.01
    assert value_of({"final_val_loss": 99.0, **some}) <= 4


def test_a_long_name_of_a_trial_is_cut_and_stays_its_own():
    point = {"lr": 1e-3, **{f"setting_{i}": "a" * 20 for i in range(10)}}
    one, other = trial_name(point), trial_name({**point, "setting_9": "b"})
    assert one != other and one == trial_name(dict(point)) and one.startswith("lr0.001-setting_0")
    assert len(one) == len(trial_name(point, 3)) == 100 and one != trial_name(point, 3)
    assert trial_name({"lr": 1e-3}, 3) == "lr0.001-seed3"


def test_seeds_end_where_the_last_replicate_has_one():
    last = from_flat("tiny", seed=2**63 - 3, search_replicates=3)
    check_points(last)
    assert trial_settings(last, {}, 2**63 - 1).train.seed == 2**63 - 1
    with pytest.raises(ValueError, match="seed=9223372036854775808"):
        check_points(last.replace(seed=2**63 - 2))
