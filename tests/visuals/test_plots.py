"""Figures show the numbers they are given; pictures are the right way up."""

import matplotlib
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from IPython.utils.capture import capture_output
from matplotlib.image import imread
from matplotlib.text import Text
from PIL import Image

from trm_helpers.evaluation import depth, robustness
from trm_helpers.schema import ACTION_NAMES
from trm_helpers.search import figures
from trm_helpers.sim.render import upright
from trm_helpers.stats import summarize_episodes, wilson_interval
from trm_helpers.visuals import action_plots, explain, keypoint_plots, plots, unrolled
from trm_helpers.visuals import figure as base

matplotlib.use("agg")


def stored(count: int = 2, size: int = 8) -> np.ndarray:
    """(n, size, size, 3) uint8 frames as stored: the first row, the picture's bottom, is red."""
    images = np.zeros((count, size, size, 3), np.uint8)
    images[:, 0] = (255, 0, 0)
    return images


def assert_upright(axes) -> None:
    shown = axes.images[0].get_array()
    assert (shown[-1] == shown[-1, 0]).all() and shown[-1, 0, 0] > 0 and shown[0].sum() == 0


def episodes(successes: int, count: int, task_id: int = 0) -> list[dict]:
    return [dict(suite="libero_object", task_id=task_id, init_state=i, success=i < successes,
                 steps=100 if i < successes else 280) for i in range(count)]


def bar_heights(axes) -> list[float]:
    return [patch.get_height() for patch in axes.patches]


# --- pictures ------------------------------------------------------------------------------------
def test_upright_flips_the_vertical_axis_only():
    images = np.arange(2 * 3 * 4 * 5 * 3).reshape(2, 3, 4, 5, 3)
    flipped = upright(images)
    assert flipped.shape == images.shape
    for row in range(4):
        np.testing.assert_array_equal(flipped[:, :, row], images[:, :, 3 - row])
    np.testing.assert_array_equal(upright(flipped), images)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 4), (3,)])
def test_upright_refuses_what_is_no_image(shape):
    with pytest.raises(ValueError, match=r"expected \(\.\.\., H, W, 3\)"):
        upright(np.zeros(shape))


def test_frames_are_upright_in_every_figure_of_images():
    batch = {
        "observations": {"agentview_rgb": stored()[:, None] / 255, "proprio": np.zeros((2, 1, 8))},
        "actions": np.arange(2 * 1 * 4 * 7).reshape(2, 1, 4, 7) / 10,
    }
    figures = [
        plots.plot_frames({"agentview_rgb": stored(), "eye_in_hand_rgb": stored()}, "a task"),
        plots.plot_augmentation(stored() / 255, stored() / 255),
        plots.plot_rollout_strip(upright(stored()), [0, 30], "success after 31 steps"),
        plots.plot_batch(batch),
    ]
    for figure, count in zip(figures, (4, 4, 2, 2), strict=True):
        with_images = [axes for axes in figure.axes if axes.images]
        assert len(with_images) == count
        for axes in with_images:
            assert_upright(axes)
    assert [axes.get_title() for axes in figures[2].axes] == ["step 0 (0.0 s)", "step 30 (1.5 s)"]
    widths = [[bar.get_width() for bar in axes.patches] for axes in figures[3].axes[2:]]
    np.testing.assert_allclose(widths, batch["actions"][:, 0, 0])  # first step, first of the chunk


def test_places_are_marked_where_the_upright_picture_shows_them():
    places = np.array([[[0.25, 0.0], [1.0, 0.5]], [[0.5, 1.0], [0.0, 0.0]]])
    figure = keypoint_plots.plot_places(stored(), places, ["plate_1", "basket_1"])
    height, width = stored().shape[1:3]
    for axes, expected in zip(figure.axes, places, strict=True):
        assert_upright(axes)
        marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
        np.testing.assert_allclose(marks, [(u * width - 0.5, (1 - v) * height - 0.5)
                                           for u, v in expected])
    assert [text.get_text() for text in figure.legends[0].texts] == ["plate 1", "basket 1"]


def test_a_look_shows_the_pixels_around_its_estimate_and_where_the_last_one_is():
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[0, 10:12, 40:42] = 255  # in the stored image; upright at row 52
    trail = np.array([[[0.5, 0.25]], [[41 / 64, 11 / 64]]])[None]  # (1, 2, 1, 2)
    figure = keypoint_plots.plot_looks(image, trail, ["bowl_1"], "bowl_1")
    frame, first, last = figure.axes
    np.testing.assert_allclose(frame.lines[0].get_xydata(), [(31.5, 47.5), (40.5, 52.5)])
    for axes, bright in ((first, (20.5, 16.5)), (last, (11.5, 11.5))):  # column, row in the crop
        seen = np.argwhere(axes.images[0].get_array()[..., 0] > 0.9)[:, ::-1]
        np.testing.assert_allclose(seen.mean(0), bright)
        np.testing.assert_allclose(axes.lines[0].get_xydata()[0], bright)  # the ring is on it
    assert first.get_xlabel() == f"moves {np.hypot(9, 5):.1f} px"


# --- curves and bars -----------------------------------------------------------------------------
def test_action_statistics_are_shares_of_the_steps():
    actions = np.zeros((4, 7))
    actions[:, 0] = (0.5, 0.5, 0.5, -0.5)
    actions[:, 6] = (-1, 1, 1, 1)
    figure = action_plots.plot_action_statistics(actions)
    assert sorted(bar_heights(figure.axes[0]))[-2:] == [25, 75]
    assert (bar_heights(figure.axes[6])[0], bar_heights(figure.axes[6])[-1]) == (25, 75)
    assert figure.axes[0].get_title() == "dx: mean +0.25, std 0.43"


@pytest.mark.parametrize("draw", [action_plots.plot_action_statistics,
                                  action_plots.plot_action_trace])
@pytest.mark.parametrize("shape", [(0, 7), (5, 6), (7,)])
def test_actions_of_another_shape_are_refused(draw, shape):
    with pytest.raises(ValueError, match=r"expected \(T, 7\)"):
        draw(np.zeros(shape))


def test_action_trace_is_in_seconds():
    actions = np.linspace(-1, 1, 40 * 7).reshape(40, 7)
    figure = action_plots.plot_action_trace(actions)
    move, turn, grip = figure.axes
    lines = [*move.patches, *turn.patches, *grip.patches]
    for dim, line in enumerate(lines):
        np.testing.assert_array_equal(line.get_data().values, actions[:, dim])
        assert line.get_data().edges[-1] == 2.0  # 40 steps at 20 Hz
    assert len(lines) == 7


def test_alignment_shows_what_was_measured_and_what_was_not():
    evidence = {"method": "delay", "fraction": None, "residual": None, "delay": 0.25}
    figure = plots.plot_alignment("shift", evidence)
    by_joints, by_delay = figure.axes
    assert any("could not be measured" in text.get_text() for text in by_joints.texts)
    assert [list(line.get_xdata()) for line in by_delay.lines] == [[0.25, 0.25]]
    assert "obs[t] -> actions[t+1]" in figure.get_suptitle()


def test_demo_lengths_count_every_demonstration():
    figure = plots.plot_demo_lengths([100, 100, 120], horizon=280)
    assert sum(bar_heights(figure.axes[0])) == 3
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [280, pytest.approx(320 / 3)]


def test_training_curves_mark_the_best_epoch():
    rows = [dict(epoch=e, train_loss=1 / e, val_loss=v, lr=1e-3 / e, seconds=30)
            for e, v in enumerate((0.5, 0.2, 0.4), 1)]
    figure = plots.plot_training_curves(rows)
    losses, rates = figure.axes
    train, val, best = losses.lines
    np.testing.assert_allclose(train.get_ydata(), (1, 1 / 2, 1 / 3))
    np.testing.assert_allclose(val.get_ydata(), (0.5, 0.2, 0.4))
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([2], [0.2])
    np.testing.assert_allclose(rates.lines[0].get_ydata(), (1e-3, 5e-4, 1e-3 / 3))
    assert losses.get_yscale() == "log"
    rows[2]["success_rate"] = 0.5  # rollouts chose the last one
    assert list(plots.plot_training_curves(rows).axes[0].lines[2].get_xdata()) == [3]
    assert figure.get_suptitle() == "Training: 3 epochs in 1.5 minutes"
    rows = [{**row, "seconds": 0.5} for row in rows]
    assert plots.plot_training_curves(rows).get_suptitle() == "Training: 3 epochs in 1.5 seconds"


def test_training_curves_need_an_epoch():
    with pytest.raises(ValueError, match="metrics is empty"):
        plots.plot_training_curves([])


def test_success_bars_have_wilson_intervals_and_counts():
    summary = summarize_episodes(episodes(8, 10) + episodes(0, 10, task_id=3))
    axes = plots.plot_success({"policy": summary}).axes[0]
    assert bar_heights(axes) == [80, 0, 40]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "3", "all"]
    assert axes.get_xlabel() == "task of libero_object"
    assert [text.get_text() for text in axes.texts] == ["8/10", "0/10", "8/20"]
    whiskers = axes.collections[0].get_segments()
    for segment, (successes, count) in zip(whiskers, ((8, 10), (0, 10), (8, 20)), strict=True):
        np.testing.assert_allclose(
            segment[:, 1] / 100, wilson_interval(successes, count), atol=1e-12
        )


def test_success_of_two_policies_side_by_side_on_the_tasks_each_has():
    both = {"a": summarize_episodes(episodes(1, 2)),
            "b": summarize_episodes(episodes(2, 2) + episodes(0, 2, task_id=1))}
    axes = plots.plot_success(both).axes[0]
    assert bar_heights(axes) == [50, 50, 100, 0, 50]
    centres = [patch.get_x() + patch.get_width() / 2 for patch in axes.patches]
    np.testing.assert_allclose(centres, [-0.2, 1.8, 0.2, 1.2, 2.2])
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["a", "b"]


def test_episode_lengths_by_outcome():
    axes = plots.plot_episode_lengths(episodes(3, 5), horizon=280).axes[0]
    assert sum(bar_heights(axes)) == 5
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "horizon 280", "succeeded (3)", "failed (2)"
    }


# --- accessibility -------------------------------------------------------------------------------
BATCH = {"observations": {"agentview_rgb": stored(6)[:, None] / 255},
         "actions": np.linspace(-1, 1, 6 * 7).reshape(6, 1, 1, 7)}
ACTIONS = np.linspace(-1, 1, 40 * 7).reshape(40, 7)
RATE = {"successes": 3, "episodes": 4, "success_rate": 0.75, "wilson_low": 0.3, "wilson_high": 0.95}
CARD = {"run": "demo", "suite": "libero_spatial", "task_ids": [2], "num_episodes": 4,
        "trained_depth": 2, "rows": [
            {**RATE, "name": name, "title": title, "suite": "libero_spatial", "action_ms": 2.0,
             "mean_recursions": used, "by_phase": {"reach": used, "grasp": used + 1},
             "action_error": [0.2, 0.1, 0.3]}
            for name, title, used in (("plain", "nothing changed", 2), ("noise", "noise", 4))]}
TRIALS = [{"state": "complete", "lr": lr, "hidden_dim": dim, "final_val_loss": 0.1 / lr,
           "val_losses": [0.3 / lr, 0.1 / lr]} for lr in (1e-3, 1e-4) for dim in (128, 256)]
HAND = np.array([0.5, 0.1, 1.0])  # metres


def project(points, camera):
    """Columns and rows in the frame of a camera that looks along -x: y to the right, z up."""
    return 128 + 300 * (points - HAND)[:, 1:] * (1, -1)


EXAMPLES = {  # every function that draws a figure, and words that its alt text must hold
    "plot_frames": (plots, [{"agentview_rgb": stored(6)}, "lift the bowl"],
                    "lift the bowl. 6 images each of agent view"),
    "plot_action_statistics": (action_plots, [ACTIONS], "dx: mean -0.02"),
    "plot_demo_lengths": (plots, [[66, 70, 80], 220], "66 to 80 steps, mean 72; horizon 220."),
    "plot_action_trace": (action_plots, [np.sign(ACTIONS)],
                          "2.0 s of translation, rotation and gripper; "
                          "the gripper switches at 1.0 s."),
    "plot_action_axes": (action_plots, [{"agentview_rgb": stored(1, 256)[0]}, HAND, project],
                         "dx points away from the robot's base, dy to its left, dz up"),
    "plot_action_phases": (action_plots,
                           [ACTIONS, ["reach"] * 20 + ["grasp"] * 20, ACTIONS[:, 0] > 0],
                           "Phases: reach, then grasp. The arm is pushed in 20 of 40 steps."),
    "plot_chunk_mask": (plots, [[[1, 1], [1, 0], [1, 1], [1, 0]], "Mask of demo_0"],
                        "after a push: 1 of 8 actions; past the end: 1 of 8 actions."),
    "plot_refinement": (unrolled, [stored(1)[0], {"y": [1.2, 0.5], "z": [1.1, 0.4]}, ACTIONS[::19],
                                "trained"], "one: 1.91 after step 0, 0.95 after step 1."),
    "plot_alignment": (plots, ["shift", {"method": "delay", "fraction": None, "delay": 0.25}],
                       "obs[t] -> actions[t+1]. Measured: delay +0.25 control steps."),
    "plot_augmentation": (plots, [stored(6), stored(6)], "each of original, augmented"),
    "plot_looks": (keypoint_plots, [
        stored(2), np.linspace([[0.5, 0.5]] * 2, [[0.75, 0.5]] * 2, 3).swapaxes(0, 1)[:, :, None],
        ["bowl_1"], "bowl_1"], "Image 1: moved by"),
    "plot_places": (keypoint_plots, [stored(6), np.full((6, 2, 2), 0.5), ["plate_1", "bowl_1"]],
                    "6 images, each with a mark for plate 1, bowl 1."),
    "plot_batch": (plots, [BATCH], "The first 6 of 6 samples"),
    "plot_training_curves": (plots, [[
        {"epoch": e, "train_loss": 1 / e, "val_loss": 2 / e, "lr": 1e-3 / e, "seconds": 30}
        for e in (1, 2)]], "validation loss from 2 to 1, best 1 in epoch 2."),
    "plot_latency": (plots, [[1, 8], [1.0, 7.5]], "1.0 ms at depth 1, 7.5 ms at depth 8."),
    "plot_success": (plots, [{f"policy {i}": summarize_episodes(episodes(8, 10)) for i in "ab"}],
                     "policy a: 8 of 10 episodes, success rate 80 %"),
    "plot_episode_lengths": (plots, [episodes(3, 5), 280],
                             "3 succeeded after 100 steps; 2 failed after 280 steps"),
    "plot_episode_tiles": (plots, [[
        {"suite": "libero_goal", "task_id": task, "init_state": state, "success": state != task,
         "steps": 70} for task in (3, 8) for state in range(12)]],
        "22 of 24 episodes succeeded; failed: libero_goal task 3 init state 3, libero_goal task 8 "
        "init state 8."),
    "plot_rollout_strip": (plots, [stored(6), range(0, 60, 10), "success"],
                           "success. 6 images: step 0 (0.0 s), step 10"),
    "plot_predictions": (explain, [stored(4), explain.prediction_report(ACTIONS, ACTIONS**3, 4)],
                         "over 40 samples; the largest mean absolute error is that of "),
    "plot_recursion": (unrolled, [np.eye(3), {"norms": [1, 2, 2.0], "changes": [1, 0.5],
                                             "sentence": "The recursion is drifting."}],
                       "The recursion is drifting. Norm of the state 1 before"),
    "plot_depth_curve": (explain, [{
        "depths": [1, 2], "arm_error": [0.2, 0.1], "arm_interval": [[0.1, 0.3], [0.0, 0.2]],
        "gripper_accuracy": [0.9, 1], "gripper_interval": [[0.8, 1], [0.9, 1]],
        "arm_gap": [0.1, 0], "arm_gap_interval": [[0.05, 0.15], [0, 0]], "trained_depth": 2}],
        "depth 1 +0.1000 (+0.0500 to +0.1500)."),
    "plot_recursion_steps": (unrolled, [{
        "images": {"agentview_rgb": stored(1)[0]}, "target": ACTIONS[0], "actions": ACTIONS[:7],
        "states": np.ones((8, 30)), "errors": np.zeros(7), "changes": np.zeros(7)}],
        "away from that of recursion 7"),
    "plot_prediction_by_depth": (explain, [[1, 2], ACTIONS[:2] * np.arange(7)],
                                 f"{ACTION_NAMES[-1]} changes most, from -5.74 at depth 1"),
    "plot_halting": (explain, [{"depths": [1, 3], "mean": 2, "limit": 4, "halting": "learned"}],
                     "1 to 3 recursions used, mean 2.00, of at most 4."),
    "plot_saliency": (explain, [
        {"agentview_rgb": stored(1, 4)[0]}, {"agentview_rgb": np.eye(4)}],
        "100 % is in the agent view (half of that on "),
    "plot_search_ranking": (figures, [TRIALS, ["lr", "hidden_dim"]],
                            "Best lr 0.001, D 128 with validation loss 100; last lr 0.0001"),
    "plot_search_importance": (figures, [{"lr": 0.2, "hidden_dim": 0.8}, TRIALS],
                               "hidden_dim 80 %, lr 20 %."),
    "plot_search_coordinates": (figures, [TRIALS, ["lr", "hidden_dim"]],
                                "The best: lr 0.001, D 128, final validation loss 100."),
    "plot_depth_card": (depth, [CARD], "plain: 3 of 4 with 2.0 recursions; noise: 3 of 4"),
    "plot_card": (robustness, [CARD], "nothing changed: 3 of 4; noise: 3 of 4."),
}


def test_every_function_that_draws_a_figure_has_an_example():
    modules = action_plots, keypoint_plots, plots, explain, unrolled, figures, depth, robustness
    drawing = {name for module in modules
               for name, value in vars(module).items()
               if hasattr(value, "__wrapped__") and name.startswith("plot_")}
    assert drawing == set(EXAMPLES)


def test_a_chunk_mask_is_drawn_over_steps_where_not_every_step_has_a_frame():
    figure = plots.plot_chunk_mask([[1, 1], [1, 0], [1, 0]], "Mask of demo_0", 2, 5)
    assert "after a push: 1 of 6 actions; past the end: 1 of 6 actions." in base.alt_text(figure)
    assert figure.axes[0].get_xlim() == (-0.5, 5.5)  # the last sample's frame is shown twice


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_figure_describes_itself_and_is_legible(name, tmp_path):
    module, arguments, expected = EXAMPLES[name]
    figure = getattr(module, name)(*arguments)
    description = base.alt_text(figure)
    assert expected in description and description.endswith("."), description
    path = base.save_figure(figure, tmp_path / "figure.png")
    with Image.open(path) as written:
        assert written.info["Description"] == description
    assert imread(path).shape[1] <= base.MAX_WIDTH * base.DPI
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert {text.get_text(): text.get_fontsize() for text in texts
            if text.get_fontsize() < 9} == {}


@pytest.mark.parametrize(("show", "text"), [
    (lambda: display(plots.plot_demo_lengths([100, 120])),
     "Lengths of 2 demonstrations. 100 to 120 steps, mean 110."),
    (lambda: display(base.RECURSIONS),
     "Two recursions: the same weights, applied to their own output. block: h = block(h, x)")])
def test_a_notebook_shows_a_figure_with_its_description(show, text):
    InteractiveShell.instance()
    try:
        with capture_output() as shown:
            show()
    finally:
        InteractiveShell.clear_instance()
    image, description = shown.outputs
    assert image.data["image/png"] and image.metadata["image/png"]["alt"].startswith(text)
    assert image.data["text/plain"] == image.metadata["image/png"]["alt"]
    assert "<summary>" in description.data["text/markdown"]
    assert text in description.data["text/markdown"]


def test_labels_at_the_right_edge_stay_apart_and_in_order():
    axes = base.new_axes(6, 3)
    axes.set(ylim=(0, 1))
    base.label_right(axes, {"b": (0.5, "red"), "a": (0.49, "blue"), "c": (0.9, "black")})
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["c"] == pytest.approx(0.9)
    assert heights["a"] + heights["b"] == pytest.approx(0.99)  # both move by half of what is needed
    assert 0.05 < heights["b"] - heights["a"] < 0.15
    assert [text.get_color() for text in axes.texts] == ["blue", "red", "black"]


# --- files ---------------------------------------------------------------------------------------
def test_style_stays_inside_and_the_figure_is_written_whole(tmp_path):
    before = dict(matplotlib.rcParams)
    figure = plots.plot_demo_lengths([100, 120])
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.pyplot.get_fignums() == []
    path = base.save_figure(figure, tmp_path / "figures" / "lengths.png")
    assert imread(path).shape[:2] == (3.2 * 150, 6 * 150)
    assert [file.name for file in path.parent.iterdir()] == ["lengths.png"]


# --- explanations --------------------------------------------------------------------------------
def test_action_arrows_point_along_the_axes_of_the_upright_frame():
    frames = {"agentview_rgb": stored(size=256)[0], "eye_in_hand_rgb": stored(size=256)[0]}
    figure = action_plots.plot_action_axes(frames, HAND, project)
    for axes in figure.axes:
        assert_upright(axes)
        labels = {text.get_text(): np.array(text.xy) - 128 for text in axes.texts}
        labels.pop("")  # arrow heads
        assert set(labels) == {"dx, d_roll", "dy, d_pitch", "dz, d_yaw", "gripper"}
        assert labels["dy, d_pitch"][0] > 10 and labels["dz, d_yaw"][1] < -10
        np.testing.assert_allclose(labels["dx, d_roll"], 0, atol=1e-9)


def test_phases_and_pushes_are_where_they_happened():
    phases = ["reach"] * 4 + ["grasp"] * 2 + ["carry"] * 14
    pushed = np.arange(20) == 7
    figure = action_plots.plot_action_phases(np.zeros((20, 7)), phases, pushed)
    places = {text.get_text(): text.get_position()[0] for text in figure.axes[0].texts}
    assert {name: places[name] for name in ("reach", "grasp", "carry")} == {
        "reach": 0.1, "grasp": 0.25, "carry": 0.65}  # seconds, in the middle of each
    [push] = [patch for patch in figure.axes[2].patches if patch.get_alpha()]
    assert (push.get_x(), push.get_width()) == (0.35, pytest.approx(0.05))
    assert "reach, then grasp, then carry. The arm is pushed in 1 of 20 steps" in figure.finding


@pytest.mark.parametrize(("low", "high"), [(0.068, 0.095), (0.115, 0.143), (0.07, 0.25),
                                           (1e-6, 1e-3)])
def test_an_axis_of_losses_has_numbers_whatever_their_range(low, high):
    axes = base.new_axes(4, 3)
    axes.plot([1, 2], [low, high])
    base.log_axis(axes.yaxis)
    axes.figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    labelled = [tick for tick in ticks if tick.label1.get_text()
                and bottom <= tick.get_loc() <= top]
    assert len(labelled) >= 3
