import itertools

import matplotlib
import pytest

from trm_helpers.config import from_flat
from trm_helpers.search.figures import (
    importance,
    plot_search_coordinates,
    plot_search_importance,
    plot_search_ranking,
    stored_example,
)
from trm_helpers.search.search import rank_trials
from trm_helpers.search.space import all_points, trial_name
from trm_helpers.visuals import plots

NAMES = ["lr", "hidden_dim", "num_recursions"]
RED = matplotlib.colors.to_rgba(plots.RED)


def row(lr, recursions=4, losses=(0.8, 0.2), successes=None, **more):
    found = {} if successes is None else {
        "successes": successes, "episodes": 10, "success_rate": successes / 10,
        "wilson_low": successes / 10 - 0.1, "wilson_high": successes / 10 + 0.2}
    return {"trial": f"{lr}", "lr": lr, "hidden_dim": 128, "num_recursions": recursions,
            "state": "complete", "final_val_loss": losses[-1], "val_losses": list(losses),
            **found, **more}


def test_the_ranking_keeps_its_order_and_highlights_the_first():
    trials = [row(5e-4, losses=(0.8, 0.2)), row(1e-4, losses=(0.7, 0.1)),
              {"trial": "x", "state": "failed", "error": "no GPU"}]
    ranking, curves = plot_search_ranking(trials, NAMES).axes
    assert [bar.get_width() for bar in ranking.patches] == [0.2, 0.1]
    assert [label.get_text() for label in ranking.get_yticklabels()] == [
        "lr 0.0005, D 128, N 4", "lr 0.0001, D 128, N 4"]
    assert [text.get_text() for text in ranking.texts] == ["0.2000", "0.1000"]
    assert [bar.get_facecolor() == RED for bar in ranking.patches] == [True, False]
    highlighted = [line for line in curves.lines
                   if matplotlib.colors.to_rgba(line.get_color()) == RED]
    assert [list(line.get_ydata()) for line in highlighted] == [[0.8, 0.2]]
    with pytest.raises(ValueError, match="none of 1 trials is complete"):
        plot_search_ranking(trials[2:], NAMES)


def test_success_is_drawn_with_its_interval():
    ranking = plot_search_ranking([row(5e-4, successes=9), row(1e-4, successes=5)], NAMES).axes[0]
    assert [bar.get_width() for bar in ranking.patches] == [90, 50]
    (whiskers,) = ranking.collections
    ends = [segment[:, 0].round().tolist() for segment in whiskers.get_segments()]
    assert ends == [[80, 110], [40, 70]]
    assert ranking.texts[0].get_text() == "9 of 10, loss 0.2"


def sixteen():
    """The learning rate decides: only the two highest of eight are among the best."""
    rates = [1e-4 * 1.5 ** i for i in range(8)]
    trials = [row(lr, recursions, losses=(1.0, 1e-4 / lr + 0.001 * recursions))
              for lr, recursions in itertools.product(rates, (4, 8))]
    return sorted(trials, key=lambda trial: trial["final_val_loss"])


def test_importance_finds_the_deciding_setting():
    shares = importance(sixteen(), NAMES)
    assert set(shares) == {"lr", "num_recursions"}  # the width does not vary
    assert shares["lr"] > 0.8 and sum(shares.values()) == pytest.approx(1)
    axes = plot_search_importance(shares, sixteen()).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lr", "num_recursions"]
    assert axes.patches[0].get_width() == pytest.approx(100 * shares["lr"])


def test_importance_needs_enough_trials():
    assert "it needs 15 complete trials (now 14) and 2 settings that vary (now 2)" in importance(
        sixteen()[:14], NAMES)
    assert "2 settings that vary (now 1)" in importance(
        [row(1e-3 + i * 1e-5) for i in range(20)], NAMES)


def test_a_line_crosses_the_settings_of_its_trial():
    axes = plot_search_coordinates(sixteen(), NAMES).axes[0]
    lines = [line for line in axes.lines if len(line.get_ydata()) == 4]
    assert len(lines) == 16
    best = lines[-1]  # drawn last
    assert matplotlib.colors.to_rgba(best.get_color()) == RED
    assert best.get_ydata()[[0, 3]] == pytest.approx([1 + 0.03, 0])  # highest rate, lowest loss
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        *NAMES, "final validation loss"]
    assert len(plot_search_coordinates([row(1e-3)], NAMES).axes[0].lines) == 5  # four axes


def test_the_stored_example_is_a_whole_grid_in_the_order_of_the_ranking():
    trials = stored_example()["trials"]
    points = all_points(from_flat("demo").search)
    assert sorted(trial["trial"] for trial in trials) == sorted(map(trial_name, points))
    assert [trial["epochs"] for trial in trials] == [10] * 16
    assert [len(trial["seeds"]) for trial in trials] == [3] * 3 + [1] * 13
    assert rank_trials(trials[:3]) + rank_trials(trials[3:]) == trials
